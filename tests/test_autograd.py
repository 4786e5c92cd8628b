"""The semantics of autograd: whatever a user of PyTorch does with a graph, lowered pipelines do as plain ones."""

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import invfunc as inv

TOLERANCE = 1e-9
WIDTH = 4


def leaf(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, **options).requires_grad_()


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def loss(out: Any) -> Tensor:
    outs = out if isinstance(out, (tuple, list)) else [out]
    return sum(((i + 1) * t.abs().pow(2)).sum() for i, t in enumerate(outs))


class Counted(nn.Module):
    """A network that counts its calls."""

    def __init__(self, width: int = WIDTH, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(width, width, dtype=dtype), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x).tanh() if not x.is_complex() else self.layer(x)


class Net:
    """A pipeline on one tensor, and its modules."""

    def __init__(self, depth: int = 3, dtype: torch.dtype | None = None) -> None:
        self.modules = [Counted(dtype=dtype) for _ in range(2 * depth)]
        blocks = [inv.couple(*self.modules[i : i + 2]) for i in range(0, 2 * depth, 2)]
        self.op = inv.chain(inv.split(2, dim=-1), *blocks, inv.concat(2, dim=-1))

    @property
    def parameters(self) -> list[Tensor]:
        return [p for module in self.modules for p in module.parameters()]

    @property
    def calls(self) -> list[int]:
        return [module.calls for module in self.modules]


LOWERINGS: dict[str, Callable[[inv.Invertible], Callable[..., Any]]] = {
    "invert": inv.checkpoint,
    "segments": lambda op: inv.checkpoint(op, segments=2),
    "recompute": lambda op: inv.checkpoint(op, mode="recompute"),
    "recompute in segments": lambda op: inv.checkpoint(op, mode="recompute", segments=2),
    "store": lambda op: inv.checkpoint(op, mode="store"),
    "function": lambda op: inv.checkpoint(lambda *xs: op(*xs)),
    "twice inverted": lambda op: ~inv.checkpoint(~op),
    "marks": lambda op: inv.checkpoint(
        inv.chain(
            op.parts[0], inv.mark(op.parts[1], "recompute"), inv.mark(inv.chain(*op.parts[2:-1]), "store"), op.parts[-1]
        )
    ),
}
every_lowering = pytest.mark.parametrize("lower", LOWERINGS.values(), ids=LOWERINGS)


# ---- calls of the engine -----------------------------------------------------------------------------------------------


@every_lowering
def test_autograd_grad(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    for wrt in [x], net.parameters, [x, *net.parameters], net.parameters[5:6], [x, net.modules[-1].layer.weight]:
        expected = torch.autograd.grad(loss(net.op(x)), wrt)
        assert_close(torch.autograd.grad(loss(lower(net.op)(x)), wrt), expected)
    assert all(t.grad is None for t in [x, *net.parameters])


@every_lowering
def test_backward_accumulates_into_leaves(lower: Callable[..., Any]) -> None:
    found = []
    for fn in lambda op: op, lower:
        torch.manual_seed(0)
        net, x = Net(), leaf(3, 2 * WIDTH)
        for _ in range(2):
            loss(fn(net.op)(x)).backward()
        found.append([t.grad for t in [x, *net.parameters]])
    assert_close(*found)


@every_lowering
def test_backward_with_inputs(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    chosen = [x, net.parameters[3]]
    expected = torch.autograd.grad(loss(net.op(x)), chosen)
    loss(lower(net.op)(x)).backward(inputs=chosen)
    assert_close([t.grad for t in chosen], list(expected))
    assert all(p.grad is None for i, p in enumerate(net.parameters) if i != 3)


@every_lowering
def test_two_backwards_with_retain_graph(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    out = lower(net.op)(x)
    expected = torch.autograd.grad(loss(net.op(x)), [x, *net.parameters])
    total = loss(out)
    for _ in range(3):
        assert_close(torch.autograd.grad(total, [x, *net.parameters], retain_graph=True), expected)
    torch.autograd.grad(total, [x, *net.parameters])
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(total, [x, *net.parameters])


@every_lowering
def test_two_backwards_from_two_places(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    found = []
    for fn in net.op, lower(net.op):
        out = fn(x)
        first = torch.autograd.grad(out[:, 0].sum(), [x, *net.parameters], retain_graph=True)
        found.append([*first, *torch.autograd.grad(out[:, 1:].pow(2).sum(), [x, *net.parameters])])
    assert_close(*found)


@every_lowering
def test_double_backward(lower: Callable[..., Any]) -> None:
    net, x, found = Net(), leaf(3, 2 * WIDTH), []
    for fn in net.op, lower(net.op):
        once = torch.autograd.grad(loss(fn(x)), [x, *net.parameters], create_graph=True)
        found.append([*once, *torch.autograd.grad(loss(once), [x, *net.parameters])])
    assert_close(*found)


@every_lowering
def test_triple_backward(lower: Callable[..., Any]) -> None:
    net, x, found = Net(depth=1), leaf(2, 2 * WIDTH), []
    for fn in net.op, lower(inv.chain(*net.op.parts[:2], inv.chain(), *net.op.parts[2:])):
        (once,) = torch.autograd.grad(loss(fn(x)), x, create_graph=True)
        (twice,) = torch.autograd.grad(loss(once), x, create_graph=True)
        found.append(torch.autograd.grad(loss(twice), [x, *net.parameters]))
    assert_close(*found)


@every_lowering
def test_gradcheck(lower: Callable[..., Any]) -> None:
    op = inv.chain(
        inv.split(2, dim=-1), inv.couple(torch.sin, torch.tanh), inv.couple(torch.cos), inv.concat(2, dim=-1)
    )
    assert torch.autograd.gradcheck(lower(op), leaf(2, 4))
    assert torch.autograd.gradgradcheck(lower(op), leaf(2, 4))


def test_is_grads_batched() -> None:
    net, x, found = Net(), leaf(3, 2 * WIDTH), []
    seeds = torch.randn(5, 3, 2 * WIDTH)
    for fn in net.op, inv.checkpoint(net.op):
        found.append(torch.autograd.grad(fn(x), [x, *net.parameters], seeds, is_grads_batched=True))
    assert_close(*found)


def test_functional_jacobian_and_hessian() -> None:
    net, x = Net(depth=1), torch.randn(2, 2 * WIDTH)
    fast = inv.checkpoint(net.op)
    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    for vectorize in False, True:
        assert_close(jacobian(fast, x, vectorize=vectorize), jacobian(net.op, x))
        found = hessian(lambda x: loss(fast(x)), x, vectorize=vectorize)
        assert_close(found, hessian(lambda x: loss(net.op(x)), x))


# ---- hooks -------------------------------------------------------------------------------------------------------------


@every_lowering
def test_hooks_run_as_often_and_see_the_same(lower: Callable[..., Any]) -> None:
    seen: list[list[Any]] = []
    for fn in lambda op: op, lower:
        torch.manual_seed(0)
        net, x, notes = Net(), leaf(3, 2 * WIDTH), []
        note = lambda name, g, notes=notes: notes.append((name, g.clone()))  # noqa: E731
        for i, p in enumerate(net.parameters):
            p.register_hook(functools.partial(note, f"tensor {i}"))
            p.register_post_accumulate_grad_hook(lambda p, i=i, note=note: note(f"accumulated {i}", p.grad))
        x.register_hook(lambda g, note=note: note("x", g))
        stem = x * 1
        stem.register_hook(lambda g, note=note: note("stem", g))
        stem.retain_grad()
        out = fn(net.op)(stem)
        out.register_hook(lambda g, note=note: note("out", g))
        out.retain_grad()
        loss(out).backward()
        notes += [("kept", stem.grad), ("kept out", out.grad)]
        seen.append(sorted(notes, key=lambda item: item[0]))
    assert [name for name, _ in seen[0]] == [name for name, _ in seen[1]]
    assert_close([g for _, g in seen[1]], [g for _, g in seen[0]])


@every_lowering
def test_hooks_that_change_gradients(lower: Callable[..., Any]) -> None:
    found = []
    for fn in lambda op: op, lower:
        torch.manual_seed(0)
        net, x = Net(), leaf(3, 2 * WIDTH)
        for p in net.parameters[::2]:
            p.register_hook(lambda g: 3 * g)
        stem = x.sin()
        stem.register_hook(lambda g: 5 * g)
        out = fn(net.op)(stem)
        out.register_hook(lambda g: 7 * g)
        loss(out).backward()
        found.append([t.grad for t in [x, *net.parameters]])
    assert_close(*found)


def test_hooks_of_modules_run_in_forward_and_in_backward() -> None:
    module, notes = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), []
    module.register_forward_hook(lambda module, args, out: notes.append("forward"))
    module.register_full_backward_hook(lambda module, gin, gout: notes.append("backward"))
    module[0].register_full_backward_pre_hook(lambda module, gout: notes.append("pre"))
    a, b = leaf(3, WIDTH), leaf(3, WIDTH)
    found = []
    for fn in inv.couple(module), inv.checkpoint(inv.couple(module)):
        notes.clear()
        found.append(torch.autograd.grad(loss(fn(a, b)), [a, b, *module.parameters()]))
        assert notes.count("backward") == notes.count("pre") == 1
    assert_close(*found)
    assert notes.count("forward") == 2


def test_gradients_arrive_stage_by_stage() -> None:
    net, x, order = Net(), leaf(3, 2 * WIDTH), []
    for i, module in enumerate(net.modules):
        module.layer.weight.register_post_accumulate_grad_hook(lambda p, i=i: order.append((i, sum(net.calls))))
    loss(inv.checkpoint(net.op)(x)).backward()
    stages = [i for i, _ in order]
    assert stages == sorted(stages, reverse=True)
    assert order[0][1] < 2 * len(net.modules)  # the last block's gradient is there before the first is run again


# ---- partly frozen, partly used ----------------------------------------------------------------------------------------


def test_a_frozen_first_half_is_not_rebuilt() -> None:
    net, x = Net(depth=4), torch.randn(3, 2 * WIDTH)
    for module in net.modules[:4]:
        module.requires_grad_(False)
    trained = [p for p in net.parameters if p.requires_grad]
    expected = torch.autograd.grad(loss(net.op(x)), trained)
    for module in net.modules:
        module.calls = 0
    found = torch.autograd.grad(loss(inv.checkpoint(net.op)(x)), trained)
    assert_close(found, expected)
    assert net.calls == [1] * 4 + [2] * 4


def test_what_nobody_asks_for_is_not_run_again() -> None:
    net, x = Net(depth=4), leaf(3, 2 * WIDTH)
    out = inv.checkpoint(net.op)(x)
    torch.autograd.grad(loss(out), net.modules[-1].layer.weight)
    assert net.calls == [1] * 7 + [2]


@every_lowering
def test_partly_frozen_networks(lower: Callable[..., Any]) -> None:
    for frozen in [0], [1], [5], [0, 1], [4, 5], [2, 3], [0, 3, 4]:
        for needed in True, False:
            net, x = Net(), torch.randn(3, 2 * WIDTH).requires_grad_(needed)
            for i in frozen:
                net.modules[i].requires_grad_(False)
            net.modules[1].layer.bias.requires_grad_(False)
            wrt = [t for t in [x, *net.parameters] if t.requires_grad]
            expected = torch.autograd.grad(loss(net.op(x)), wrt)
            assert_close(torch.autograd.grad(loss(lower(net.op)(x)), wrt), expected)


def test_a_wholly_frozen_network_needs_no_graph() -> None:
    net, x = Net(), torch.randn(3, 2 * WIDTH)
    for module in net.modules:
        module.requires_grad_(False)
    assert not inv.checkpoint(net.op)(x).requires_grad
    y = inv.checkpoint(net.op)(x.requires_grad_())
    assert_close(torch.autograd.grad(loss(y), x), torch.autograd.grad(loss(net.op(x)), x))


TWO = ["invert", "recompute", "store", "function", "segments"]


@pytest.mark.parametrize("name", TWO)
def test_unused_outputs(name: str) -> None:
    f, g = Counted(), Counted()
    op = inv.chain(inv.couple(f, g), inv.couple(torch.sin, f))
    wrt = [leaf(3, WIDTH), leaf(3, WIDTH), *f.parameters(), *g.parameters()]
    for pick in lambda a, b: a, lambda a, b: b, lambda a, b: a[:1], lambda a, b: b.detach() + a:
        expected = torch.autograd.grad(loss(pick(*op(*wrt[:2]))), wrt, allow_unused=True)
        found = torch.autograd.grad(loss(pick(*LOWERINGS[name](op)(*wrt[:2]))), wrt, allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            assert_close(a if a is not None else torch.zeros_like(b), b if b is not None else torch.zeros_like(a))


def test_an_unused_parameter_gets_no_gradient() -> None:
    class Lazy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    module = Lazy(WIDTH, WIDTH)
    for fn in (
        inv.checkpoint(inv.couple(module)),
        inv.checkpoint(inv.couple(lambda x: module(x))),
        inv.checkpoint(module),
    ):
        xs = [leaf(3, WIDTH)] * (1 if fn.__class__.__name__ == "CheckpointedFunction" else 2)
        weight, bias = torch.autograd.grad(loss(fn(*xs)), [module.weight, module.bias], allow_unused=True)
        assert weight is not None and bias is None


def test_a_parameter_in_many_places() -> None:
    f = Counted()
    op = inv.chain(inv.couple(f, f), inv.swap(), inv.couple(f), inv.couple(lambda x: f(x) * f.layer.bias))
    wrt = [leaf(3, WIDTH), leaf(3, WIDTH), *f.parameters()]
    expected = torch.autograd.grad(loss(op(*wrt[:2])), wrt)
    for name in TWO:
        assert_close(torch.autograd.grad(loss(LOWERINGS[name](op)(*wrt[:2])), wrt), expected)


# ---- kinds of inputs ---------------------------------------------------------------------------------------------------


def images(*shape: int) -> Tensor:
    return torch.randn(2, 4, 6, 6)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda x: x,
    "view": lambda x: x.view(3, -1),
    "slice": lambda x: torch.cat([x, x])[2:5],
    "strided": lambda x: torch.cat([x, x], 1)[:, ::2],
    "transposed": lambda x: x.T.contiguous().T,
    "expanded": lambda x: x[:1].expand(3, -1),
    "expanded in front": lambda x: x.expand(2, 3, -1),
    "narrowed": lambda x: torch.cat([x, x], 1).narrow(1, 3, 2 * WIDTH),
    "permuted": lambda x: torch.stack([x, x]).permute(1, 0, 2),
    "one row": lambda x: x[0],
    "no rows": lambda x: x[:0],
    "split part": lambda x: torch.cat([x, x], 1).split(2 * WIDTH, 1)[1],
}


@every_lowering
@pytest.mark.parametrize("name", INPUTS)
def test_views_and_expanded_inputs(name: str, lower: Callable[..., Any]) -> None:
    net, base = Net(), leaf(3, 2 * WIDTH)
    op = inv.chain(inv.split(2, dim=-1), *net.op.parts[1:-1], inv.concat(2, dim=-1))
    expected = torch.autograd.grad(loss(op(INPUTS[name](base))), [base, *net.parameters])
    found = torch.autograd.grad(loss(lower(op)(INPUTS[name](base))), [base, *net.parameters])
    assert_close(found, expected)


@every_lowering
def test_inputs_are_left_alone(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    before, version, pointer = x.detach().clone(), x._version, x.data_ptr()
    loss(lower(net.op)(x)).backward()
    assert torch.equal(x, before) and (x._version, x.data_ptr()) == (version, pointer)


@pytest.mark.parametrize("name", TWO)
def test_the_same_tensor_twice(name: str) -> None:
    f, g, x = Counted(), Counted(), leaf(3, WIDTH)
    op = inv.couple(f, g)
    for fn in lambda op: op(x, x), lambda op: op(x, x.view(3, -1)), lambda op: op(*op(x, x)), lambda op: op(x, x + x):
        wrt = [x, *f.parameters(), *g.parameters()]
        expected = torch.autograd.grad(loss(fn(op)), wrt)
        assert_close(torch.autograd.grad(loss(fn(LOWERINGS[name](op))), wrt), expected)


@pytest.mark.parametrize("name", TWO)
def test_one_input_needs_no_gradient(name: str) -> None:
    f, g = Counted(), Counted()
    op = inv.chain(inv.couple(f, g), inv.couple(torch.sin))
    for needs in (True, False), (False, True), (False, False):
        xs = [torch.randn(3, WIDTH).requires_grad_(need) for need in needs]
        wrt = [*filter(lambda t: t.requires_grad, xs), *f.parameters(), *g.parameters()]
        expected, found = op(*xs), LOWERINGS[name](op)(*xs)
        assert [t.requires_grad for t in found] == [t.requires_grad for t in expected]
        assert_close(torch.autograd.grad(loss(found), wrt), torch.autograd.grad(loss(expected), wrt))


@every_lowering
def test_channels_last_is_preserved(lower: Callable[..., Any]) -> None:
    f, g = (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)) for _ in range(2))
    f, g = (module.to(memory_format=torch.channels_last) for module in (f, g))
    op = inv.chain(inv.split(2), inv.couple(f, g), inv.couple(g, f), inv.concat(2))
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    wrt = [x, *f.parameters(), *g.parameters()]
    expected, found = op(x), lower(op)(x)
    assert found.stride() == expected.stride()
    assert found.is_contiguous(memory_format=torch.channels_last)
    one, two = torch.autograd.grad(loss(found), wrt), torch.autograd.grad(loss(expected), wrt)
    assert [g.stride() for g in one] == [g.stride() for g in two]
    assert_close(one, two)


@every_lowering
@pytest.mark.parametrize("dtype", [torch.cdouble, torch.cfloat])
def test_complex_numbers(dtype: torch.dtype, lower: Callable[..., Any]) -> None:
    net, x = Net(dtype=dtype), leaf(3, 2 * WIDTH, dtype=dtype)
    wrt = [x, *net.parameters]
    expected, found = (torch.autograd.grad(loss(fn(x)), wrt) for fn in (net.op, lower(net.op)))
    tolerance = TOLERANCE if dtype is torch.cdouble else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_complex_numbers_under_other_laws() -> None:
    a, b = leaf(3, WIDTH, dtype=torch.cdouble), leaf(3, WIDTH, dtype=torch.cdouble)
    w = leaf(WIDTH, dtype=torch.cdouble)
    for op in (
        inv.couple(lambda x: (x * w, w), law=inv.affine),
        inv.couple(lambda x: (x.abs() + 1, x * w), law=inv.affine),
        inv.parallel(inv.pair(torch.exp, torch.log), inv.pair(lambda x: x * w, lambda y: y / w)),
    ):
        expected, found = (torch.autograd.grad(loss(fn(a, b)), [a, b, w]) for fn in (op, inv.checkpoint(op)))
        assert_close(found, expected)


@every_lowering
def test_a_zero_size_batch(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(0, 2 * WIDTH)
    out = lower(net.op)(x)
    assert out.shape == (0, 2 * WIDTH)
    found = torch.autograd.grad(loss(out), [x, *net.parameters])
    assert_close(found, torch.autograd.grad(loss(net.op(x)), [x, *net.parameters]))


@every_lowering
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_dtypes(dtype: torch.dtype, lower: Callable[..., Any]) -> None:
    net, x = Net(dtype=dtype), leaf(3, 2 * WIDTH, dtype=dtype)
    out = lower(net.op)(x)
    gradients = torch.autograd.grad(loss(out), [x, *net.parameters])
    assert {t.dtype for t in [out, *gradients]} == {dtype}


# ---- outputs -----------------------------------------------------------------------------------------------------------


@every_lowering
def test_an_output_may_be_changed_in_place_where_plain_autograd_allows_it(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(net.op(x) * 1 + 1), [x, *net.parameters])
    out = lower(net.op)(x)
    try:
        found = torch.autograd.grad(loss(out.add_(1)), [x, *net.parameters])
    except RuntimeError as error:  # what rebuilds from the output notices that it is gone: an error, no wrong gradient
        assert "modified by an inplace operation" in str(error)
    else:
        assert_close(found, expected)


def test_a_changed_output_raises_instead_of_giving_wrong_gradients() -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    out = inv.checkpoint(net.op)(x)
    total = out.sum()
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@every_lowering
def test_relu_in_place_behind_a_pipeline(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(torch.relu(net.op(x) + 0)), [x, *net.parameters])
    out = lower(net.op)(x) + 0
    assert_close(torch.autograd.grad(loss(out.relu_()), [x, *net.parameters]), expected)


# ---- modes of autograd around it ---------------------------------------------------------------------------------------


@every_lowering
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_mode(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(net.op(x)), [x, *net.parameters])
    with torch.autograd.detect_anomaly():
        assert_close(torch.autograd.grad(loss(lower(net.op)(x)), [x, *net.parameters]), expected)


@every_lowering
def test_save_on_cpu_around_it(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(net.op(x)), [x, *net.parameters])
    with torch.autograd.graph.save_on_cpu():
        out = lower(net.op)(x)
    assert_close(torch.autograd.grad(loss(out), [x, *net.parameters], retain_graph=True), expected)
    assert_close(torch.autograd.grad(loss(out), [x, *net.parameters]), expected)


@every_lowering
def test_saved_tensors_hooks_see_what_is_kept_and_may_replace_it(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> bytes:
        packed.append(t)
        torch.save(t.detach(), buffer := io.BytesIO())
        return buffer.getvalue()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda raw: torch.load(io.BytesIO(raw))):
        out = lower(net.op)(x)
    expected = torch.autograd.grad(loss(net.op(x)), [x, *net.parameters])
    assert packed
    assert_close(torch.autograd.grad(loss(out), [x, *net.parameters]), expected)


@every_lowering
def test_grad_mode_inside_and_outside(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    fast = lower(net.op)
    with torch.no_grad():
        assert not fast(x).requires_grad
        with torch.enable_grad():
            out = fast(x)
    with torch.inference_mode():
        assert fast(x).is_inference()
    with torch.set_grad_enabled(False):
        with torch.enable_grad():
            found = torch.autograd.grad(loss(out), [x, *net.parameters])
    assert_close(found, torch.autograd.grad(loss(net.op(x)), [x, *net.parameters]))


def test_backward_under_no_grad() -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    total = loss(inv.checkpoint(net.op)(x))
    with torch.no_grad():
        found = torch.autograd.grad(total, [x, *net.parameters])
    assert_close(found, torch.autograd.grad(loss(net.op(x)), [x, *net.parameters]))


# ---- together with torch's checkpoint ----------------------------------------------------------------------------------


@every_lowering
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_inside_of_torchs_checkpoint(reentrant: bool, lower: Callable[..., Any]) -> None:
    net, x, drop = Net(), leaf(3, 2 * WIDTH), nn.Dropout(0.3)
    found = []
    for fn in net.op, lower(net.op):
        torch.manual_seed(0)
        out = torch.utils.checkpoint.checkpoint(lambda x, fn=fn: fn(drop(x)).sin(), x, use_reentrant=reentrant)
        loss(out).backward()
        found.append([t.grad for t in [x, *net.parameters]])
        x.grad = None
        for module in net.modules:
            module.zero_grad()
    assert_close(*found)


@pytest.mark.parametrize("name", ["module", "closure", "function", "recompute"])
def test_torchs_checkpoint_inside_of_ours(name: str) -> None:
    class Rematerialised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.4), nn.Linear(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    f, w, xs = Rematerialised(), leaf(WIDTH), [leaf(3, WIDTH), leaf(3, WIDTH)]
    closure = lambda x: torch.utils.checkpoint.checkpoint(lambda x: f.inner(x) * w, x, use_reentrant=False)  # noqa: E731
    plain, fast = {
        "module": (inv.couple(f), inv.checkpoint(inv.couple(f))),
        "closure": (inv.couple(closure, f), inv.checkpoint(inv.couple(closure, f))),
        "function": (lambda a, b: closure(a) * b, inv.checkpoint(lambda a, b: closure(a) * b)),
        "recompute": (inv.couple(f, closure), inv.checkpoint(inv.couple(f, closure), mode="recompute")),
    }[name]
    wrt = [*xs, *f.parameters(), *([] if name == "module" else [w])]
    found = []
    for fn in plain, fast:
        torch.manual_seed(0)
        found.append(torch.autograd.grad(loss(fn(*xs)), wrt))
    assert_close(*found)


# ---- threads -----------------------------------------------------------------------------------------------------------


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """The results of functions that run at once; an error of one is raised."""
    results: dict[int, Any] = {}
    errors: list[BaseException] = []
    gate = threading.Barrier(len(works))

    def run(i: int) -> None:
        try:
            gate.wait()
            results[i] = works[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[i] for i in range(len(works))]


@every_lowering
def test_two_threads_on_one_graph(lower: Callable[..., Any]) -> None:
    net, x = Net(depth=6), leaf(3, 2 * WIDTH)
    total, wrt = loss(lower(net.op)(x)), [x, *net.parameters]
    expected = torch.autograd.grad(loss(net.op(x)), wrt)
    for found in in_threads([lambda: torch.autograd.grad(total, wrt, retain_graph=True)] * 4):
        assert_close(found, expected)


@every_lowering
def test_threads_with_steps_of_their_own(lower: Callable[..., Any]) -> None:
    net, xs = Net(depth=3), [leaf(3, 2 * WIDTH) for _ in range(4)]
    fast = lower(net.op)
    found = in_threads([lambda x=x: torch.autograd.grad(loss(fast(x)), [x, *net.parameters]) for x in xs])
    for x, gradients in zip(xs, found, strict=True):
        assert_close(gradients, torch.autograd.grad(loss(net.op(x)), [x, *net.parameters]))


def test_threads_on_a_module_whose_tensors_have_to_be_swapped() -> None:
    norm = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    weights = dict(norm.named_parameters())
    xs = [leaf(5, WIDTH), leaf(5, WIDTH)]
    op = inv.couple(norm)
    totals = [loss(inv.checkpoint(op)(*xs)) for _ in range(4)]
    wrt = [*xs, *norm.parameters()]
    expected = torch.autograd.grad(loss(op(*xs)), wrt)
    state = copy.deepcopy(norm.state_dict())
    for gradients in in_threads([lambda t=t: torch.autograd.grad(t, wrt) for t in totals]):
        assert_close(gradients, expected)
    assert all(p is weights[name] for name, p in norm.named_parameters())
    assert_close(dict(norm.state_dict()), dict(state))


# ---- copies and pickles ------------------------------------------------------------------------------------------------


@inv.checkpoint
def decorated(x: Tensor) -> Tensor:
    return x.sin().exp()


@inv.checkpoint(inverse=lambda y: y - 1)
def invertible(x: Tensor) -> Tensor:
    return x + 1


class Model(nn.Module):
    """A module with a lowered pipeline of its own submodules."""

    def __init__(self, mode: str = "invert") -> None:
        super().__init__()
        self.f, self.g = Counted(), Counted()
        self.op = inv.checkpoint(inv.chain(inv.split(2), inv.couple(self.f, self.g), inv.concat(2)), mode=mode)
        self.head = inv.checkpoint(self.g.layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(x)[:, :WIDTH])


def copies() -> dict[str, Callable[[Any], Any]]:
    def saved(model: Any) -> Any:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("copied", copies().values(), ids=copies())
def test_a_copy_of_a_lowered_module_trains_its_own_parameters(
    copied: Callable[..., Any], mode: str, used: bool
) -> None:
    model, x = Model(mode), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(model(x)), [x, *model.parameters()])
    if not used:
        state = model.state_dict()
        model = Model(mode)
        model.load_state_dict(state)
    other = copied(model)
    assert {id(p) for p in model.parameters()}.isdisjoint({id(p) for p in other.parameters()})
    loss(other(x)).backward()
    assert_close([p.grad for p in other.parameters()], list(expected[1:]))
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    assert_close(torch.autograd.grad(loss(model(x)), [x, *model.parameters()]), expected)


@pytest.mark.parametrize(
    "op",
    [
        lambda: inv.checkpoint(inv.couple(nn.Linear(WIDTH, WIDTH), torch.tanh), segments=2),
        lambda: inv.chain(inv.mark(inv.swap(), "store"), inv.mark(torch.add, "recompute")),
        lambda: ~inv.checkpoint(inv.chain(inv.concat(2), inv.split(2))),
        lambda: inv.couple(inv.ops.tanh_scale(nn.Linear(WIDTH, 2 * WIDTH)), law=inv.affine),
    ],
)
@pytest.mark.parametrize("copied", copies().values(), ids=copies())
def test_copies_of_ops(copied: Callable[..., Any], op: Callable[[], inv.Invertible]) -> None:
    op = op()
    xs = [torch.randn(3, WIDTH)] * 2
    expected = op(*xs)
    assert repr(copied(op)) == repr(op)
    assert_close(copied(op)(*xs), expected)


def test_decorated_functions_are_pickled_by_name() -> None:
    for fn in decorated, invertible:
        assert pickle.loads(pickle.dumps(fn)) is fn
        assert copy.deepcopy(fn) is fn
    layer = nn.Linear(WIDTH, WIDTH)
    other = pickle.loads(pickle.dumps(inv.checkpoint(layer)))
    assert_close(other(torch.ones(2, WIDTH)), layer(torch.ones(2, WIDTH)))
    assert repr(other) == "checkpoint(Linear)" and other.__wrapped__ is not layer


def test_a_graph_outlives_its_op() -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(net.op(x)), x)
    out = inv.checkpoint(copy.deepcopy(net.op))(x)
    del net
    assert_close(torch.autograd.grad(loss(out), x), expected)
