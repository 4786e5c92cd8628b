"""The second call and those after it: what is remembered of the first never shows, but in the time that it takes."""

from __future__ import annotations

import pickle
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import invfunc as inv
from invfunc import _torch, ops
from invfunc.engine import lowering
from invfunc.engine.replay import owners, recorded
from invfunc.errors import DriftWarning, ReplayError, WireError

WIDTH, DEPTH = 4, 3


class Branch(nn.Module):
    """A network with all that a module can hold: parts, a constant, a place for a tensor, and a count of its calls."""

    def __init__(self, width: int = WIDTH, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.Tanh())
        self.noise = nn.Dropout(0.0)
        self.register_buffer("scale", torch.full((width,), 0.7, dtype=dtype))
        self.shift: Any = 0.0
        self.after: Callable[[Tensor], Tensor] = lambda y: y
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.after(self.noise(self.parts(x)) * self.scale + self.shift)


def couplings(branches: list[nn.Module]) -> inv.Invertible:
    """All of them, two in each."""
    couples = [inv.couple(f, g) for f, g in zip(branches[::2], branches[1::2], strict=True)]
    return inv.chain(inv.split(2, dim=-1), *couples, inv.concat(2, dim=-1))


class Net:
    """A pipeline, lowered and called twice already: so its halves are called again."""

    def __init__(
        self,
        branch: Callable[[], nn.Module] = Branch,
        dtype: torch.dtype = torch.float64,
        build: Callable[[list[nn.Module]], inv.Invertible] = couplings,
    ) -> None:
        torch.manual_seed(0)
        self.branches = nn.ModuleList(branch() for _ in range(2 * DEPTH))
        self.op = build(list(self.branches))
        self.fast = inv.checkpoint(self.op)
        self.x = torch.randn(5, 2 * WIDTH, dtype=dtype, requires_grad=True)
        for _ in range(2):
            loss(self.fast(self.x)).backward()
        self.branches.zero_grad()
        self.x.grad = None

    def __getitem__(self, index: int) -> Any:
        return self.branches[index]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *(p for p in self.branches.parameters() if p.requires_grad)]

    def step(self, fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """The output and all gradients, with the same random numbers."""
        torch.manual_seed(1)
        y = fn(self.x)
        return y.detach(), *torch.autograd.grad(loss(y), self.leaves, allow_unused=True), torch.rand(3)

    def assert_right(self) -> None:
        """Twice, since what is remembered of a call shows in the next."""
        for _ in range(2):
            torch.testing.assert_close(self.step(self.fast), self.step(self.op), rtol=1e-9, atol=1e-9)


def loss(y: Tensor) -> Tensor:
    return (y.sin() * y).abs().sum()


def lean(y: Tensor, name: str = "_Sum") -> int:
    """How many nodes of a graph took the short way."""
    seen, todo = set[Any](), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return sum(node.name().startswith(name) for node in seen)


def test_the_short_way_is_taken_and_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    assert lean(net.fast(net.x)) == 2 * DEPTH
    found = net.step(net.fast)
    monkeypatch.setattr(lowering, "again", lambda *_: None)
    assert lean(net.fast(net.x)) == 0
    assert all(map(torch.equal, found, net.step(net.fast)))


def test_each_function_still_runs_twice_in_a_step() -> None:
    net = Net()
    for branch in net.branches:
        branch.calls = 0
    net.step(net.fast)
    assert [branch.calls for branch in net.branches] == [2] * 2 * DEPTH


# ---- what changes between two calls --------------------------------------------------------------------------------


def replace_a_parameter(net: Net) -> None:
    net[2].parts[0].weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64))


def replace_data(net: Net) -> None:
    net[2].parts[0].weight.data = torch.randn(WIDTH, WIDTH, dtype=torch.float64)


def replace_a_part(net: Net) -> None:
    net[2].parts[1] = nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.SiLU())


def replace_the_last_part(net: Net) -> None:
    net[2].noise = nn.Dropout(0.5)


def add_a_part(net: Net) -> None:
    net[2].parts.append(nn.Linear(WIDTH, WIDTH, dtype=torch.float64))


def load_by_assignment(net: Net) -> None:
    net.branches.load_state_dict({k: v.clone() + 0.1 for k, v in net.branches.state_dict().items()}, assign=True)


def freeze(net: Net) -> None:
    net[2].requires_grad_(False)


def freeze_all(net: Net) -> None:
    net.branches.requires_grad_(False)


def freeze_and_thaw(net: Net) -> None:
    net[2].requires_grad_(False)
    net.assert_right()
    net[2].requires_grad_(True)


def change_a_buffer(net: Net) -> None:
    net[2].scale.mul_(2)


def set_a_tensor(net: Net) -> None:
    net[2].shift = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)


def tie_weights(net: Net) -> None:
    net[4].parts[0].weight = net[2].parts[0].weight


def parametrize(net: Net) -> None:
    parametrizations.weight_norm(net[2].parts[0])


def spectral_norm(net: Net) -> None:
    parametrizations.spectral_norm(net[2].parts[0].double())
    net.branches.eval()


def begin_to_draw(net: Net) -> None:
    net[2].noise.p = 0.5


def begin_to_draw_for_a_while(net: Net) -> None:
    net[2].noise.p = 0.5
    net.assert_right()
    net[2].noise.p = 0.0


def leave_training(net: Net) -> None:
    begin_to_draw(net)
    net.assert_right()
    net.branches.eval()


def begin_to_pin(net: Net) -> None:
    net[2].after = lambda y: y * inv.pin("sign", (y > 0).double())


def return_what_broadcasts(net: Net) -> None:
    net[2].after = lambda y: y.mean(-1, keepdim=True)


def return_a_narrower_dtype(net: Net) -> None:
    net[2].after = lambda y: y.float().double()
    net.assert_right()
    net[2].after = lambda y: (y * 0).float() + 1


def return_a_constant(net: Net) -> None:
    net[2].after = lambda y: torch.ones_like(y)


def return_a_parameter(net: Net) -> None:
    net[2].after = lambda y: net[2].parts[0].bias.expand_as(y)


def hook_a_parameter(net: Net) -> None:
    net[2].parts[0].weight.register_hook(lambda g: 2 * g)


def hook_a_module(net: Net) -> None:
    net[2].register_forward_hook(lambda module, args, out: out * 2)
    net[3].register_full_backward_hook(lambda module, gi, go: tuple(g * 3 for g in gi))


def another_batch(net: Net) -> None:
    net.x = torch.randn(3, 2, 2 * WIDTH, dtype=torch.float64, requires_grad=True)


def an_empty_batch(net: Net) -> None:
    net.x = torch.randn(0, 2 * WIDTH, dtype=torch.float64, requires_grad=True)


def replace_the_tables(net: Net) -> None:
    layer = net[2].parts[0]
    layer.__setstate__(nn.Linear(WIDTH, WIDTH, dtype=torch.float64).__getstate__())


def replace_the_attributes(net: Net) -> None:
    net[2].__dict__.update(deepcopy(net[2]).__dict__)


def freeze_while_drawing(net: Net) -> None:
    net[2].noise.p = 0.5
    net.branches.requires_grad_(False)
    net.assert_right()
    net.branches.requires_grad_(True)


def visit_autocast(net: Net) -> None:
    net[2].noise.p = 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss(net.fast(net.x)).backward()


def functional_call(net: Net) -> None:
    fast, holder = net.fast, nn.Module()
    holder.branches, holder.forward = net.branches, net.fast
    weights = {f"branches.{k}": (v.detach() + 0.1).requires_grad_() for k, v in net.branches.named_parameters()}
    holder.forward = net.op
    expected = torch.autograd.grad(loss(torch.func.functional_call(holder, weights, net.x)), list(weights.values()))
    holder.forward = fast
    found = torch.autograd.grad(loss(torch.func.functional_call(holder, weights, net.x)), list(weights.values()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


CHANGES = [
    replace_a_parameter,
    replace_data,
    replace_a_part,
    replace_the_last_part,
    add_a_part,
    load_by_assignment,
    freeze,
    freeze_all,
    freeze_and_thaw,
    change_a_buffer,
    set_a_tensor,
    tie_weights,
    parametrize,
    spectral_norm,
    begin_to_draw,
    begin_to_draw_for_a_while,
    leave_training,
    begin_to_pin,
    return_what_broadcasts,
    return_a_narrower_dtype,
    return_a_constant,
    return_a_parameter,
    hook_a_parameter,
    hook_a_module,
    another_batch,
    an_empty_batch,
    replace_the_tables,
    replace_the_attributes,
    freeze_while_drawing,
    visit_autocast,
    functional_call,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_calls(change: Callable[[Net], None]) -> None:
    net = Net()
    change(net)
    net.assert_right()


def test_an_input_without_gradient() -> None:
    net, found = Net(), []
    net.x = net.x.detach()
    for fn in net.op, net.fast, net.fast:
        net.branches.zero_grad()
        loss(fn(net.x)).backward()
        found.append([p.grad.clone() for p in net.branches.parameters()])
    torch.testing.assert_close(found[1:], [found[0]] * 2, rtol=1e-9, atol=1e-9)


def test_a_buffer_and_a_tensor_that_begin_to_be_trained() -> None:
    net = Net()
    net[2].scale.requires_grad_()
    net[4].shift = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    wrt = [net[2].scale, net[4].shift]
    expected = torch.autograd.grad(loss(net.op(net.x)), wrt)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(loss(net.fast(net.x)), wrt), expected, rtol=1e-9, atol=1e-9)


def write_the_input(module: nn.Module, args: tuple[Tensor]) -> None:
    args[0].add_(1)


def test_wrong_outputs_are_still_named() -> None:
    net = Net()
    net[2].after = lambda y: y[..., :3]
    with pytest.raises(WireError, match=r"chain stage 2 .*f returned \(5, 3\)"):
        net.fast(net.x)
    net[2].after = lambda y: y
    net[2].register_forward_pre_hook(write_the_input)
    with pytest.raises(ReplayError, match="changed its input in place"):
        net.fast(net.x)


# ---- what changes between forward and backward -----------------------------------------------------------------------


def gradients_after(net: Net, change: Callable[[], Any]) -> list[Tensor]:
    leaves, out = net.leaves, loss(net.fast(net.x))
    change()
    net.branches.zero_grad()
    out.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("change", [replace_a_parameter, load_by_assignment, tie_weights])
def test_a_parameter_that_is_replaced_before_backward(change: Callable[[Net], None]) -> None:
    net = Net()
    expected = net.step(net.op)[1:-1]
    torch.testing.assert_close(gradients_after(net, lambda: change(net)), list(expected), rtol=1e-9, atol=1e-9)


def test_a_parameter_that_is_frozen_before_backward() -> None:
    net = Net()
    expected = list(net.step(net.op)[1:-1])
    for found, gradient in zip(gradients_after(net, lambda: freeze(net)), expected, strict=True):
        assert found is None or torch.allclose(found, gradient, rtol=1e-9, atol=1e-9)
    assert [leaf.grad is None for leaf in net[2].parameters()] == [True, True]  # as in plain autograd
    assert net.x.grad is not None


@pytest.mark.parametrize("change", [replace_a_part, hook_a_module])
def test_a_function_that_is_another_in_backward_is_noticed(change: Callable[[Net], None]) -> None:
    net = Net()
    with pytest.warns(DriftWarning):
        gradients_after(net, lambda: change(net))


def test_a_function_that_returns_a_constant_in_backward_is_noticed() -> None:
    net = Net()
    with pytest.warns(DriftWarning):
        gradients_after(net, lambda: setattr(net[4], "after", torch.ones_like))


def test_a_weight_that_is_written_before_backward_raises() -> None:
    net = Net()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients_after(net, lambda: net[2].parts[0].weight.detach().add_(1))


def test_a_buffer_that_is_written_before_backward_raises() -> None:
    net = Net()
    with pytest.raises(ReplayError, match="scale"):
        gradients_after(net, lambda: change_a_buffer(net))


def test_a_function_that_returns_another_shape_in_backward_raises() -> None:
    net = Net()
    with pytest.raises(ReplayError, match=r"Branch on replay returned \(5, 1\)"):
        gradients_after(net, lambda: return_what_broadcasts(net))


# ---- the rest of autograd ----------------------------------------------------------------------------------------------


def with_create_graph(fn: Callable[[Tensor], Tensor], net: Net) -> Any:
    first = torch.autograd.grad(loss(fn(net.x)), net.leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), net.leaves)


def with_two_backwards(fn: Callable[[Tensor], Tensor], net: Net) -> Any:
    out = loss(fn(net.x))
    return [torch.autograd.grad(out, net.leaves, retain_graph=True) for _ in range(2)]


def with_a_batch_of_gradients(fn: Callable[[Tensor], Tensor], net: Net) -> Any:
    y = fn(net.x)
    return torch.autograd.grad(y, net.leaves, torch.ones(2, *y.shape, dtype=y.dtype), is_grads_batched=True)


def with_tensors_on_the_way(fn: Callable[[Tensor], Tensor], net: Net) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), lambda a: torch.from_numpy(a.copy())):
        out = loss(fn(net.x))
    return torch.autograd.grad(out, net.leaves)


def with_anomalies(fn: Callable[[Tensor], Tensor], net: Net) -> Any:
    with torch.autograd.set_detect_anomaly(True):
        return torch.autograd.grad(loss(fn(net.x)), net.leaves)


def inside_of_torchs_checkpoint(fn: Callable[[Tensor], Tensor], net: Net) -> Any:
    return torch.autograd.grad(loss(torch_checkpoint(fn, net.x, use_reentrant=False)), net.leaves)


def of_a_part_only(fn: Callable[[Tensor], Tensor], net: Net) -> Any:
    return torch.autograd.grad(loss(fn(net.x)), [net[2].parts[0].weight])


def of_one_half_of_the_output(fn: Callable[[Tensor], Tensor], net: Net) -> Any:
    return torch.autograd.grad(loss(fn(net.x)[..., :WIDTH]), net.leaves, allow_unused=True)


def under_func_grad(fn: Callable[[Tensor], Tensor], net: Net) -> Any:
    return torch.func.grad(lambda x: loss(fn(x)))(net.x)


def under_vmap_of_grad(fn: Callable[[Tensor], Tensor], net: Net) -> Any:
    return torch.func.vmap(torch.func.grad(lambda x: loss(fn(x))))(net.x)


def under_jacrev(fn: Callable[[Tensor], Tensor], net: Net) -> Any:
    return torch.func.jacrev(fn)(net.x[:2])


USES = [
    with_create_graph,
    with_two_backwards,
    with_a_batch_of_gradients,
    with_tensors_on_the_way,
    with_anomalies,
    inside_of_torchs_checkpoint,
    of_a_part_only,
    of_one_half_of_the_output,
    under_func_grad,
    under_vmap_of_grad,
    under_jacrev,
]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("batch", [None, another_batch], ids=["same batch", "another batch"])
def test_every_use_after_a_warm_start(use: Callable[..., Any], batch: Callable[[Net], None] | None) -> None:
    net = Net()
    if batch is not None:
        another_batch(net)
    for _ in range(2):
        torch.testing.assert_close(use(net.fast, net), use(net.op, net), rtol=1e-9, atol=1e-9)


def test_gradcheck_after_a_warm_start() -> None:
    net = Net()
    x = torch.randn(2, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net.fast, x)
    assert torch.autograd.gradgradcheck(net.fast, x)


AUTOCAST = [nullcontext, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]


@pytest.mark.parametrize("forward", AUTOCAST, ids=["off", "on"])
@pytest.mark.parametrize("backward", AUTOCAST, ids=["off", "on"])
def test_autocast(
    forward: Callable[[], AbstractContextManager[Any]], backward: Callable[[], AbstractContextManager[Any]]
) -> None:
    net = Net(lambda: Branch(dtype=torch.float32), torch.float32)
    found = []
    for fn in net.fast, net.fast, net.op:
        with forward():
            out = loss(fn(net.x))
        assert fn is net.op or lean(out) == (2 * DEPTH if found else lean(out))
        with backward():
            found.append(torch.autograd.grad(out, net.leaves))
    tolerance = 2e-2 if forward is not nullcontext or backward is not nullcontext else 1e-5
    for gradients in found[:2]:
        torch.testing.assert_close(gradients, found[2], rtol=tolerance, atol=tolerance)


def test_complex_numbers() -> None:
    net = Net(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.complex128), nn.Tanh()), torch.complex128)
    net.assert_right()
    assert lean(net.fast(net.x)) == 2 * DEPTH


class Magnitude(nn.Module):
    """Real numbers of complex ones: the gradient of the sum is complex, that of the function's output real."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def test_what_is_added_may_be_of_a_narrower_dtype() -> None:
    net = Net(Magnitude, torch.complex128)
    net.assert_right()
    assert lean(net.fast(net.x)) == 2 * DEPTH


def test_one_value_at_two_places_of_a_chain() -> None:
    f = Branch()
    block = inv.couple(f, f)
    op = inv.chain(inv.split(2, dim=-1), block, inv.swap(), block, inv.concat(2, dim=-1))
    fast, x = inv.checkpoint(op), torch.randn(3, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    wrt = [x, *f.parameters()]
    for _ in range(3):
        found, expected = [torch.autograd.grad(loss(fn(x)), wrt) for fn in (fast, op)]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_batch_norm_moves_its_statistics_once() -> None:
    def branch() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).double()

    net = Net(branch)
    twin = deepcopy(net)
    for training in True, True, False, True:
        net.branches.train(training)
        twin.branches.train(training)
        torch.testing.assert_close(net.step(net.fast), twin.step(twin.op), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net.branches.state_dict(), twin.branches.state_dict())


class Average(nn.Module):
    """Keeps a running average by assignment: its slot is another tensor after every call."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, width, dtype=torch.float64)
        self.register_buffer("mean", torch.ones(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.25
        return self.layer(x).tanh() * self.mean


@pytest.mark.parametrize("law", [inv.additive, inv.affine])
def test_a_slot_that_is_assigned_in_every_call_moves_once(law: Any) -> None:
    def op(*branches: nn.Module) -> inv.Invertible:
        return inv.couple(*(branches if law is inv.additive else map(inv.ops.tanh_scale, branches)), law=law)

    width = WIDTH if law is inv.additive else 2 * WIDTH
    ours = [Average(width), Average(width)]
    theirs = deepcopy(ours)
    x = [torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for _ in range(3):
        found = torch.autograd.grad(loss(torch.cat(inv.checkpoint(op(*ours))(*x))), [*x, *ours[0].layer.parameters()])
        expected = torch.autograd.grad(loss(torch.cat(op(*theirs)(*x))), [*x, *theirs[0].layer.parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close([m.mean for m in ours], [m.mean for m in theirs])


class Growing(nn.Module):
    """Has one more layer after every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, dtype=torch.float64)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def test_a_module_that_grows() -> None:
    net = Net(Growing)
    for _ in range(3):
        net[2].layers.append(nn.Linear(WIDTH, WIDTH, dtype=torch.float64))
        net.assert_right()


def test_a_function_without_a_graph_runs_twice_in_a_step() -> None:
    net = Net()
    for branch in net.branches:
        branch.after, branch.calls = torch.detach, 0
    net.step(net.fast)
    assert [branch.calls for branch in net.branches] == [2] * 2 * DEPTH
    net.assert_right()


def test_integers_may_be_added() -> None:
    net = Net()
    net[2].after = lambda y: (y > 0).long()
    net.assert_right()


def test_a_traced_module() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(nn.Linear(WIDTH, WIDTH).double(), torch.randn(2, WIDTH).double())
    op = inv.couple(traced, torch.tanh)
    x = [torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    expected = torch.autograd.grad(loss(torch.cat(op(*x))), [*x, *traced.parameters()])
    for _ in range(2):
        found = torch.autograd.grad(loss(torch.cat(inv.checkpoint(op)(*x))), [*x, *traced.parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


WAYS_OUT = {
    "store": inv.mark(inv.ops.tanh(), "store"),
    "recompute": inv.mark(inv.ops.tanh(), "recompute"),
    "one way": inv.chain(inv.chain(), inv.one_way(torch.tanh)),
}


@pytest.mark.parametrize("part", WAYS_OUT.values(), ids=WAYS_OUT)
@pytest.mark.parametrize("used", [0, 1])
def test_a_component_that_leaves_the_trunk_before_the_others(part: inv.Invertible, used: int) -> None:
    f, g = Branch(), Branch()
    op = inv.chain(inv.couple(f, g), inv.parallel(inv.chain(), part))
    x = [torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for _ in range(2):
        found, expected = [torch.autograd.grad(loss(fn(*x)[used]), x) for fn in (inv.checkpoint(op), op)]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# ---- what is remembered ------------------------------------------------------------------------------------------------


def test_a_recording_that_holds_is_used_again() -> None:
    module = Branch()
    found, x = owners([module]), torch.randn(2, WIDTH, dtype=torch.float64)
    first, second, third = [recorded(module, x, found)[1] for _ in range(3)]
    assert second is third is first
    module.parts[0].bias = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))
    assert recorded(module, x, found)[1] is not first


@pytest.mark.usefixtures("no_gc")
def test_nothing_is_kept_in_a_cycle() -> None:
    net = Net()
    parameter, op = weakref.ref(net[2].parts[0].weight), weakref.ref(net.op.parts[2])
    del net
    assert parameter() is None
    assert op() is None


@pytest.mark.usefixtures("no_gc")
def test_what_was_replaced_is_let_go_in_the_next_call() -> None:
    net = Net()
    net.branches.eval()
    loss(net.fast(net.x)).backward()
    net.branches.train()
    begin_to_draw(net)
    old = [weakref.ref(p) for p in net.branches.parameters()]
    load_by_assignment(net)
    loss(net.fast(net.x)).backward()
    assert [p() for p in old] == [None] * len(old)


@pytest.mark.parametrize("copied", [deepcopy, lambda op: pickle.loads(pickle.dumps(op))], ids=["deepcopy", "pickle"])
def test_a_copy_has_modules_of_its_own(copied: Callable[[Any], Any]) -> None:
    f, g = nn.Linear(WIDTH, WIDTH).double(), nn.Linear(WIDTH, WIDTH).double()
    op = inv.chain(inv.couple(f, g), inv.couple(g, f))
    x = [torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def out(op: inv.Invertible) -> Tensor:
        return loss(torch.cat(inv.checkpoint(op)(*x)))

    for _ in range(2):
        out(op).backward()
    twin = copied(op)
    theirs = twin.parts[0].parts[0].fn if twin.parts[0].parts else twin.parts[0].fn
    for _ in range(2):
        f.weight.grad = None
        out(twin).backward()
        assert f.weight.grad is None
        assert theirs.weight.grad is not None


class Late(nn.Module):
    """Makes its layer in the first call, as it learns the width of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.layer is None:
            self.layer = nn.Linear(x.shape[-1], x.shape[-1], dtype=x.dtype)
        return self.layer(x).tanh()


def test_layers_that_are_made_in_the_first_call() -> None:
    for count in range(30):  # what the call makes on the way may leave its address to a parameter, or may not
        spare = [torch.randn(3) for _ in range(count % 7)]
        branches = nn.ModuleList([Late(), Late()])
        op = inv.couple(*branches)
        x = [torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        loss(torch.cat(inv.checkpoint(op)(*x))).backward()
        found = [p.grad for p in branches.parameters()]
        expected = torch.autograd.grad(loss(torch.cat(op(*x))), list(branches.parameters()))
        torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-9)
        del spare


# ---- where a trunk begins, and what only moves elements ------------------------------------------------------------


def joined(dim: int = -1) -> inv.Invertible:
    return inv.chain(inv.concat(2, dim=dim), inv.split(2, dim=dim))


def moving(branches: list[nn.Module]) -> inv.Invertible:
    """Rearrangements before, between and behind couplings."""
    f, *others = branches
    turned = inv.chain(ops.flip(-1), ops.roll(1, dims=-1), ops.transpose(0, 1), ops.transpose(0, 1))
    return inv.chain(
        turned, inv.split(2, dim=-1), inv.couple(f), joined(), *map(inv.couple, others), inv.concat(2, dim=-1), turned
    )


def test_what_moves_elements_takes_a_short_way_and_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(build=moving)
    assert (lean(net.fast(net.x)), lean(net.fast(net.x), "_Move")) == (2 * DEPTH, 7)
    net.assert_right()
    found = net.step(net.fast)
    monkeypatch.setattr(lowering, "moved", lambda *_: None)
    assert lean(net.fast(net.x), "_Move") == 0
    assert all(map(torch.equal, found, net.step(net.fast)))


def test_what_moves_elements_may_be_given_others() -> None:
    net = Net(build=moving)
    for shape in (7, 2 * WIDTH), (2, 3, 2 * WIDTH), (5, 2 * WIDTH):
        net.x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        net.assert_right()


def test_an_output_that_nobody_uses_behind_what_moves_elements() -> None:
    net = Net()
    op = inv.chain(inv.couple(net[0], net[1]), joined())
    fast = inv.checkpoint(op)
    a, b = (torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in "ab")
    leaves = [a, b, *net[0].parameters(), *net[1].parameters()]
    for place in 0, 1, 0, 1:
        pair = [torch.autograd.grad(loss(fn(a, b)[place]), leaves, allow_unused=True) for fn in (fast, op)]
        for found, expected in zip(*pair, strict=True):
            zeros = torch.zeros_like(found if expected is None else expected) if None in (found, expected) else None
            torch.testing.assert_close(*[zeros if g is None else g for g in (found, expected)])


def test_second_derivatives_through_what_moves_elements() -> None:
    net = Net(build=moving)
    first = [torch.autograd.grad(loss(fn(net.x)), net.x, create_graph=True)[0] for fn in (net.fast, net.op)]
    second = [torch.autograd.grad(g.square().sum(), net.leaves, allow_unused=True) for g in first]
    torch.testing.assert_close(*second, rtol=1e-9, atol=1e-9)


def test_a_backward_of_many_gradients_at_once() -> None:
    net = Net(build=moving)
    y = net.fast(net.x)
    seeds = torch.randn(3, *y.shape, dtype=y.dtype)
    pair = [torch.autograd.grad(fn(net.x), net.x, seeds, is_grads_batched=True)[0] for fn in (net.fast, net.op)]
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("drift", ["warn", "off"])
def test_a_trunk_that_begins_with_a_coupling(drift: str) -> None:
    net = Net()
    op = inv.couple(net[0], net[1])
    fast = inv.checkpoint(op, drift=drift)
    a, b = (torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in "ab")
    leaves = [a, b, *net[0].parameters(), *net[1].parameters()]
    for _ in range(3):
        found, expected = (torch.autograd.grad(sum(map(loss, fn(a, b))), leaves) for fn in (fast, op))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert lean(fast(a, b)[1]) == 2


def test_the_meter_looks_at_a_trunk_that_begins_with_a_coupling() -> None:
    net = Net()
    fast = inv.checkpoint(inv.couple(net[0], net[1]))
    a, b = (torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in "ab")
    for _ in range(2):
        loss(fast(a, b)[1]).backward()
    y = fast(a, b)[1]
    assert lean(y) == 2
    net[0].parts[0].weight.data = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    with pytest.warns(DriftWarning, match="the input of the pipeline"):
        loss(y).backward()


def test_a_trunk_may_begin_with_a_coupling_whose_input_needs_no_gradient() -> None:
    net = Net()
    op = inv.couple(net[0], net[1])
    fast = inv.checkpoint(op)
    a, b = (torch.randn(3, WIDTH, dtype=torch.float64) for _ in "ab")
    leaves = [*net[0].parameters(), *net[1].parameters()]
    for needs in (True, True), (False, True), (True, False), (False, False), (True, True):
        a.requires_grad_(needs[0]), b.requires_grad_(needs[1])
        for _ in range(2):
            found, expected = (torch.autograd.grad(sum(map(loss, fn(a, b))), leaves) for fn in (fast, op))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# ---- what is written in place ----------------------------------------------------------------------------------------


@pytest.fixture
def writes_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors count as large ones."""
    monkeypatch.setattr(_torch, "_LARGE", 0)


class Ends(nn.Module):
    """A linear layer, what is done to its output, and a place to keep something."""

    def __init__(self, end: Callable[[Ends, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.register_buffer("constant", torch.randn(5, WIDTH, dtype=torch.float64))
        self.end, self.kept, self.array = end, list[Any](), torch.randn(5, WIDTH, dtype=torch.float64).numpy()
        self.workspace = torch.randn(5, WIDTH, dtype=torch.float64).untyped_storage()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self, x, self.layer(x))


def keeping(what: Callable[[Tensor], Any]) -> Callable[[Ends, Tensor, Tensor], Tensor]:
    def end(self: Ends, x: Tensor, y: Tensor) -> Tensor:
        self.kept.append((what(y), y.detach().clone()))
        return y

    return end


def in_three_dimensions(self: Ends, x: Tensor, y: Tensor) -> Tensor:
    return self.layer(x.view(1, *x.shape)).view_as(x)


ENDS: dict[str, Callable[[Ends, Tensor, Tensor], Tensor]] = {
    "as it is": lambda self, x, y: y,
    "what backward has saved": lambda self, x, y: y.tanh(),
    "what backward has saved, of a row": lambda self, x, y: y.softmax(-1),
    "a view of what backward has saved": lambda self, x, y: y.tanh().view(-1).view_as(y),
    "its input": lambda self, x, y: x,
    "a view of its input": lambda self, x, y: x[None][0],
    "its input, turned": lambda self, x, y: x.flip(0),
    "a row for all": lambda self, x, y: y[:1].expand_as(y),
    "a part of more": lambda self, x, y: torch.cat((y, y))[: len(y)],
    "both parts of one": lambda self, x, y: torch.cat((y, y)).chunk(2)[1],
    "a constant": lambda self, x, y: self.constant,
    "a parameter": lambda self, x, y: self.layer.weight[0].expand_as(x),
    "three dimensions": in_three_dimensions,
    "an array's memory": lambda self, x, y: torch.from_numpy(self.array) if x.shape == self.array.shape else y,
    "an array's memory, and more": lambda self, x, y: y + torch.from_numpy(self.array).view_as(x),
    "a workspace": lambda self, x, y: y.new_empty(0).set_(self.workspace, 0, x.shape) if x.shape == (5, WIDTH) else y,
    "kept": keeping(lambda y: y),
    "a part kept": keeping(lambda y: y[0]),
    "kept, detached": keeping(lambda y: y.detach()),
    "kept as an array": keeping(lambda y: y.detach().numpy()),
    "kept for others": keeping(lambda y: torch.utils.dlpack.to_dlpack(y.detach())),
}


@pytest.mark.usefixtures("writes_small")
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_nothing_is_written_that_anybody_else_holds(end: Callable[[Ends, Tensor, Tensor], Tensor]) -> None:
    net = Net(lambda: Ends(end))
    arrays = [(branch.array.copy(), branch.workspace.tolist()) for branch in net.branches]
    net.assert_right()
    for branch, (array, workspace) in zip(net.branches, arrays, strict=True):
        assert (branch.array == array).all() and branch.workspace.tolist() == workspace
        for kept, copy in branch.kept:
            value = kept if isinstance(kept, Tensor) else torch.from_dlpack(kept)
            assert torch.equal(value.detach(), copy[0] if value.dim() == 1 else copy)


@pytest.mark.usefixtures("writes_small")
@pytest.mark.parametrize("keep", [lambda g: g, lambda g: g.detach(), lambda g: g.numpy(), lambda g: g[0]])
def test_no_gradient_is_written_that_a_hook_has_kept(keep: Callable[[Tensor], Any]) -> None:
    net, kept = Net(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.Tanh())), list[Any]()

    def note(module: nn.Module, gi: tuple[Tensor, ...], go: tuple[Tensor, ...]) -> None:
        kept.extend((keep(g), g.clone()) for g in (*gi, *go))

    for branch in net.branches:
        branch.register_full_backward_hook(note)
        branch[0].register_full_backward_hook(note)
    net.assert_right()
    assert kept
    for value, copy in kept:
        value = torch.as_tensor(value)
        assert torch.equal(value, copy[0] if value.dim() == 1 else copy)


@pytest.mark.usefixtures("writes_small")
def test_nothing_is_written_whose_storage_somebody_keeps() -> None:
    net, kept = Net(lambda: nn.Linear(WIDTH, WIDTH, dtype=torch.float64)), list[Any]()

    def keep(tensor: Tensor) -> None:
        kept.append((tensor.untyped_storage(), tensor.untyped_storage().tolist()))

    for branch in net.branches:
        branch.register_forward_hook(lambda module, args, out: keep(out))
        branch.register_forward_pre_hook(
            lambda module, args: args[0].requires_grad and args[0].register_hook(keep) and None
        )
    net.assert_right()
    assert kept and all(storage.tolist() == copy for storage, copy in kept)


@pytest.mark.usefixtures("writes_small")
def test_nothing_is_written_where_elements_overlap() -> None:
    def windows(x: Tensor) -> Tensor:
        return x.flatten().as_strided((2, 4), (1, 1))

    class Windows(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return windows(super().forward(x))

    op = inv.couple(Windows(4, 4, dtype=torch.float64))
    fast = inv.checkpoint(op)
    for _ in range(3):
        a, b = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (8, 8))
        pair = [torch.autograd.grad(sum(map(loss, fn(windows(a), b.view(2, 4)))), [a, b]) for fn in (fast, op)]
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (torch.zeros, True),
        (lambda count: torch.zeros(count // 4, 4).view(-1), True),
        (lambda count: torch.zeros(count).share_memory_(), False),  # another process may hold it
        (lambda count: torch.zeros(2 * count)[:count], False),  # more would be kept alive
        (lambda count: torch.zeros(count, dtype=torch.bfloat16), False),
        (lambda count: torch.zeros(count + 1)[1:], False),
        (lambda count: torch.zeros(count // 2), False),  # too small to ask
    ],
)
def test_what_is_spare(make: Callable[[int], Tensor], expected: bool) -> None:
    tensor, like = make(2**14), torch.zeros(2**14)
    assert _torch.is_spare(tensor, like) == expected
    again = tensor
    assert not _torch.is_spare(again, like)


@pytest.mark.usefixtures("writes_small")
def test_an_output_that_a_forward_hook_has_kept() -> None:
    net, kept = Net(lambda: nn.Linear(WIDTH, WIDTH, dtype=torch.float64)), list[Any]()
    for branch in net.branches:
        branch.register_forward_hook(lambda module, args, out: kept.append((out, out.detach().clone())))
    net.assert_right()
    assert kept and all(torch.equal(out, copy) for out, copy in kept)


@pytest.mark.usefixtures("writes_small")
def test_what_nobody_else_holds_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    net, written = Net(lambda: nn.Linear(WIDTH, WIDTH, dtype=torch.float64)), list[bool]()

    def noted(fn: Callable[..., Tensor], *args: Any, out: Tensor | None = None) -> Tensor:
        written.append(out is not None)
        return fn(*args, out=out)

    for name in "add", "sub":
        monkeypatch.setattr(torch, name, partial(noted, getattr(torch, name)))
    net.assert_right()
    ours = len(written) // 2  # of each of two steps: forward, inverse and gradients of every half
    assert (ours, sum(written[:ours])) == (3 * 2 * DEPTH, 3 * 2 * DEPTH - 6)  # the first halves lie side by side
