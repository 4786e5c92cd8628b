"""A lowered pipeline under ``torch.compile``: one graph, eager's gradients, and memory that does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from kit import TOLERANCE, WIDE, assert_close
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode

import invfunc as inv
from invfunc.engine.interface import Options
from invfunc.engine.region import Region, conditions_of

pytestmark = pytest.mark.compile


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def mlp(width: int = WIDE, out: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out or width))


class Network(nn.Module):
    """Stem, pipeline, head; ``make`` builds the pipeline of the modules that it puts into a list."""

    def __init__(self, make: Callable[[nn.ModuleList], Any], **options: Any) -> None:
        super().__init__()
        self.stem, self.owned, self.head = nn.Linear(4, 2 * WIDE), nn.ModuleList(), nn.Linear(2 * WIDE, 3)
        self.op = make(self.owned)
        self.fast = inv.checkpoint(self.op, **options)

    def plain(self, x: Tensor) -> Tensor:
        return self.head(self.op(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fast(self.stem(x)))


def owned(modules: nn.ModuleList, module: Any) -> Any:
    modules.append(module)
    return module


def between(*blocks: Any) -> Any:
    return inv.chain(inv.split(2), *blocks, inv.concat(2))


def couplings(modules: nn.ModuleList, depth: int = 1) -> Any:
    return between(*(inv.couple(owned(modules, mlp()), owned(modules, Tanh())) for _ in range(depth)), inv.swap())


def affine(modules: nn.ModuleList) -> Any:
    return between(inv.couple(inv.ops.tanh_scale(owned(modules, mlp(out=2 * WIDE))), law=inv.affine), inv.swap())


def tensors(modules: nn.ModuleList) -> Any:
    linear = owned(modules, nn.Linear(2 * WIDE, 2 * WIDE))
    return inv.chain(inv.ops.linear(linear.weight, linear.bias), inv.ops.leaky_relu(0.5), inv.ops.tanh())


def closures(modules: nn.ModuleList) -> Any:
    f, g = owned(modules, mlp()), owned(modules, nn.Linear(WIDE, WIDE))

    def h(x: Tensor) -> Tensor:
        return f(x).sin() + g(x)

    return between(inv.couple(h, partial(_scaled, owned(modules, nn.Linear(1, WIDE)).bias)))


def _scaled(scale: Tensor, x: Tensor) -> Tensor:
    return scale * x.cos()


def marks(modules: nn.ModuleList) -> Any:
    blocks = [inv.couple(owned(modules, mlp())) for _ in range(3)]
    return between(blocks[0], inv.mark(blocks[1], "store"), inv.mark(blocks[2], "recompute"), blocks[0])


def buffers(modules: nn.ModuleList) -> Any:
    return between(inv.couple(owned(modules, nn.Sequential(nn.Linear(WIDE, WIDE), nn.BatchNorm1d(WIDE)))))


def one_way(modules: nn.ModuleList) -> Any:
    return inv.chain(between(inv.couple(owned(modules, Tanh()))), torch.tanh, couplings(modules))


CASES: dict[str, tuple[Callable[[nn.ModuleList], Any], dict[str, Any]]] = {
    "couplings": (couplings, {}),
    "affine": (affine, {}),
    "tensors": (tensors, {}),
    "closures": (closures, {}),
    "marks": (marks, {}),
    "buffers": (buffers, {}),
    "one_way": (one_way, {}),
    "segments": (couplings, {"segments": 2}),
    "recompute": (couplings, {"mode": "recompute"}),
    "store": (couplings, {"mode": "store"}),
}


def step(net: Network, fn: Callable[[Tensor], Tensor], batch: int = 5) -> list[Tensor]:
    """Output, gradients and buffers of one step, from the same state."""
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.zero_grad()
    x = torch.randn(batch, 4, generator=torch.Generator().manual_seed(1), dtype=net.stem.weight.dtype)
    y = fn(x.requires_grad_())
    y.pow(2).sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]
    net.load_state_dict(before)
    return found


def assert_same_step(net: Network, fn: Callable[[Tensor], Tensor], batch: int = 5) -> None:
    assert_close(step(net, fn, batch), step(net, net.plain, batch))


# ---- the same numbers, in one graph ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_one_graph_gives_the_gradients_of_plain_autograd(name: str) -> None:
    make, options = CASES[name]
    net = Network(make, **options)
    assert_same_step(net, torch.compile(net, backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_other_backends(backend: str) -> None:
    net = Network(couplings)
    assert_same_step(net, torch.compile(net, backend=backend, fullgraph=True))


def test_without_gradients_it_is_the_plain_op() -> None:
    net = Network(couplings)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 4)
    for context in torch.no_grad, torch.inference_mode:
        with context():
            torch.testing.assert_close(compiled(x), net.plain(x))
    frozen = net.requires_grad_(False)
    torch.testing.assert_close(torch.compile(frozen, backend="aot_eager", fullgraph=True)(x), frozen.plain(x))


def test_a_gradient_that_is_compiled() -> None:
    net = Network(couplings)
    parameters, x = dict(net.named_parameters()), torch.randn(5, 4)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,)).pow(2).sum()

    compiled = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(parameters, x)
    net.plain(x).pow(2).sum().backward()
    for name, parameter in net.named_parameters():
        assert_close(compiled[name], parameter.grad)


def test_a_batch_of_any_size_needs_two_graphs() -> None:
    net, counter = Network(couplings), CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for batch in 5, 6, 7, 11:
        assert_same_step(net, compiled, batch)
    assert counter.frame_count <= 2


# torch looks at the .grad of every tensor that it makes fake
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_width_that_is_split_may_change(dynamic: bool | None, interleaved: bool) -> None:
    ends = [f(2, interleaved=interleaved) for f in (inv.split, inv.concat)]
    fast = inv.checkpoint(inv.chain(ends[0], inv.couple(torch.sin, torch.tanh), ends[1]))
    compiled = torch.compile(lambda x: fast(x).sin(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((4, 6), (3, 6), (7, 8)):
        x = torch.randn(*shape, requires_grad=True)
        found, expected = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, lambda x: fast(x).sin()))
        assert_close(found, expected)


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_size_of_images_may_change(dynamic: bool | None) -> None:
    net = nn.Conv2d(6, 6, 3, padding=1)
    op = inv.chain(inv.ops.pixel_unshuffle(2), inv.split(2), inv.couple(net), inv.concat(2))
    compiled = torch.compile(inv.checkpoint(op), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((8, 8), (8, 12), (16, 10)):
        x = torch.randn(2, 3, *size, requires_grad=True)
        found, expected = (torch.autograd.grad(f(x).sin().sum(), [x, net.weight]) for f in (compiled, op))
        assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_autograd() -> None:
    net = Network(couplings)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        assert_same_step(net, net)
        assert_same_step(net, torch.compile(net, backend="aot_eager", fullgraph=True))


# backward exchanges the tensors of modules, and puts them back; torch sees that their tables were written
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    net, x = Network(couplings), torch.randn(5, 4)
    exported = torch.export.export(net, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), net.plain(x))
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(net, (x,), strict=strict).module()(x), net.plain(x))


class Tied(nn.Module):
    """One weight in two slots."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


@pytest.mark.parametrize("mode", ["invert", "recompute"])
def test_tied_weights_and_an_input_that_needs_no_gradient(mode: str) -> None:
    f, x = Tied(), torch.randn(5, 2 * WIDE)
    op = between(inv.couple(f), inv.swap(), inv.couple(f))
    parameters = list(f.parameters())
    compiled = torch.compile(inv.checkpoint(op, mode=mode), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).pow(2).sum(), parameters)
    expected = torch.autograd.grad(op(x).pow(2).sum(), parameters)
    assert_close(found, expected)


@pytest.mark.parametrize("transform", ["vmap", "vmap of grad"])
def test_below_vmap_it_runs_plainly(transform: str) -> None:
    net = Network(couplings)

    def loss(x: Tensor) -> Tensor:
        return net(x[None]).pow(2).sum()

    fn = torch.func.vmap(loss if transform == "vmap" else torch.func.grad(loss))
    x = torch.randn(5, 4)
    torch.testing.assert_close(torch.compile(fn, backend="aot_eager", fullgraph=True)(x), fn(x))


# ---- closures, and pipelines that are built in the graph -------------------------------------------------------------


LOOSE = torch.randn(WIDE, requires_grad=True)  # the functions below find it among their globals


class Scale:
    """A plain object that can be called."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize("fn", [lambda x: x * LOOSE, Scale(LOOSE)], ids=["<lambda>", "Scale"])
def test_a_closure_over_a_tensor_says_what_to_pass(fn: Any, request: pytest.FixtureRequest) -> None:
    net = Network(lambda modules: between(inv.couple(fn)))
    message = (
        f"{request.node.callspec.id}, which is being compiled, closes over a tensor that requires grad, expected tensors "
        r"that belong to a module, or are bound in a partial; let a module own the tensor, or bind it: "
        r"functools.partial\(fn, tensor\)"
    )
    with pytest.raises(Exception, match=message):
        torch.compile(net, backend="aot_eager", fullgraph=True)(torch.randn(5, 4))


def _nested(x: Tensor, w: Tensor) -> Any:
    """A function that calls another one, which closes over what is computed in the graph."""
    double = 2 * w

    def inner(h: Tensor) -> Tensor:
        return torch.tanh(h @ double.T)

    return inv.couple(lambda h: inner(h) + inner(h.sin()), inner)


def _recursive(x: Tensor, w: Tensor) -> Any:
    def fn(h: Tensor, left: int = 2) -> Tensor:
        return fn(torch.tanh(h @ w), left - 1) if left else h

    return inv.couple(fn)


def _input(x: Tensor, w: Tensor) -> Any:
    first, second = x.chunk(2, 1)
    return inv.couple(lambda h: h * first + second @ w, lambda h: h * first)


def _containers(x: Tensor, w: Tensor) -> Any:
    held = {"a": [w, (w.sin(),)]}
    return inv.couple(lambda h: h @ held["a"][0] @ held["a"][1][0])


def _own_module(x: Tensor, w: Tensor) -> Any:
    norm = NORM
    return inv.couple(lambda h: torch.tanh(norm(h) @ w))


NORM = nn.BatchNorm1d(WIDE, dtype=torch.float64)
BUILT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "arguments": lambda x, w: inv.couple(lambda h: torch.tanh(h @ w), lambda h: h @ w.T),
    "defaults": lambda x, w: inv.couple(lambda h, w=w: h @ w, lambda h, *, w=w: h @ w),
    "affine": lambda x, w: inv.couple(inv.ops.tanh_scale(lambda h: torch.cat([h @ w, h], 1)), law=inv.affine),
    "global": lambda x, w: inv.couple(lambda h: NORM(h) @ w),
    "nested": _nested,
    "recursive": _recursive,
    "input": _input,
    "containers": _containers,
    "module": _own_module,
    "marked": lambda x, w: inv.mark(inv.couple(lambda h: torch.tanh(h @ w)), "recompute"),
}


def _gradients(fn: Callable[..., Tensor], modules: nn.Module) -> list[Any]:
    before = {name: tensor.clone() for name, tensor in modules.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, m, generator=generator).div_(3).requires_grad_() for n, m in ((5, 2 * WIDE), (WIDE, WIDE)))
    y = fn(x, w)
    parameters = [x, w, *modules.parameters()]
    found = torch.autograd.grad(y.pow(2).sum(), parameters, allow_unused=True, materialize_grads=True)
    buffers = [buffer.clone() for buffer in modules.buffers()]
    modules.load_state_dict(before)
    return [y.detach(), *found, *buffers]


@pytest.mark.parametrize("name", BUILT)
def test_a_pipeline_that_is_built_in_the_graph(name: str) -> None:
    modules = nn.ModuleList([Tanh(), NORM])

    def op(x: Tensor, w: Tensor) -> Any:
        return between(BUILT[name](x, w), inv.swap(), inv.couple(modules[0], lambda h: h @ w))

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return inv.checkpoint(op(x, w))(x)

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    assert_close(_gradients(compiled, modules), _gradients(lambda x, w: op(x, w)(x), modules))


class Built(nn.Module):
    """Builds its pipeline in every forward, of its own modules and an argument."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.fs = nn.ModuleList([Tanh() for _ in range(depth)])

    def op(self, w: Tensor) -> Any:
        blocks = [(inv.couple(lambda h: torch.tanh(h @ w), f), inv.swap()) for f in self.fs]
        return between(*(part for block in blocks for part in block))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return inv.checkpoint(self.op(w))(x)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_module_that_builds_its_pipeline(backend: str) -> None:
    net = Built(2)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    assert_close(_gradients(compiled, net), _gradients(lambda x, w: net.op(w)(x), net))


def test_memory_of_a_pipeline_that_is_built_in_the_graph() -> None:
    kept, peaks = [], []
    for depth in 4, 16:
        torch._dynamo.reset()
        net, saved = Built(depth), Saved()
        compiled = torch.compile(net, backend=saved, fullgraph=True)
        x, w = torch.randn(BATCH, 2 * WIDE, requires_grad=True), torch.randn(WIDE, WIDE, requires_grad=True)

        def run() -> None:
            compiled(x, w).sum().backward()  # noqa: B023 - called below

        run()
        kept.append(saved.bytes)
        peaks.append(peak_bytes(run) - sum(p.numel() * p.element_size() for p in net.parameters()))
    activation = BATCH * 2 * WIDE * 8
    assert kept[0] == kept[1] and sum(kept[0]) <= 2 * activation
    assert peaks[1] <= peaks[0] + activation / 2


def test_functions_that_there_were_before_close_over_tensors_too() -> None:
    w = torch.randn(WIDE, WIDE, requires_grad=True)

    def apply(h: Tensor) -> Tensor:
        return torch.tanh(h @ w)

    op = between(inv.couple(apply), inv.swap(), inv.couple(lambda h: apply(h).sin(), apply))
    x = torch.randn(5, 2 * WIDE, requires_grad=True)
    expected = torch.autograd.grad(op(x).pow(2).sum(), [x, w])
    for fast in (
        torch.compile(inv.checkpoint(op), backend="aot_eager", fullgraph=True),
        inv.compile_stages(inv.checkpoint(op), backend="aot_eager"),
    ):
        assert_close(torch.autograd.grad(fast(x).pow(2).sum(), [x, w]), expected)


def test_a_function_that_is_checkpointed_in_the_graph() -> None:
    def forward(x: Tensor, w: Tensor, lowered: bool) -> Tensor:
        double = 2 * w

        def fn(x: Tensor, scale: Tensor = w) -> Tensor:
            return torch.tanh(x @ double) @ scale

        return (inv.checkpoint(fn) if lowered else fn)(x[:, :WIDE])

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    nothing = nn.ModuleList()
    found = _gradients(lambda x, w: compiled(x, w, True), nothing)
    assert_close(found, _gradients(lambda x, w: forward(x, w, False), nothing))


# ---- random numbers --------------------------------------------------------------------------------------------------


def test_dropout_draws_the_same_mask_in_backward() -> None:
    op = between(inv.couple(nn.Dropout(0.5)))
    compiled = torch.compile(inv.checkpoint(op), backend="aot_eager", fullgraph=True)
    x, gy = torch.randn(5, 2 * WIDE, requires_grad=True), torch.randn(5, 2 * WIDE)
    y = compiled(x)
    (gx,) = torch.autograd.grad(y, x, gy)
    mask = ((y - x)[:, :WIDE].abs() > TOLERANCE).double()  # dropout is all that was added
    assert 0 < mask.mean() < 1
    torch.testing.assert_close(gx[:, WIDE:], gy[:, WIDE:] + 2 * mask * gy[:, :WIDE])


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x + torch.rand(x.shape),
        lambda x: x + torch.rand_like(x),
        lambda x: x + torch.randn_like(x),
        lambda x: x + torch.randint_like(x, 3),
        lambda x: x + torch.normal(0.0, 1.0, x.shape),
        lambda x: nn.functional.rrelu(x, training=True),
        lambda x: nn.functional.gumbel_softmax(x),
        lambda x: torch.bernoulli(x.sigmoid()),
        lambda x: nn.functional.dropout1d(x[None])[0],
        lambda x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
    ],
    ids=[
        "rand",
        "rand_like",
        "randn_like",
        "randint_like",
        "normal",
        "rrelu",
        "gumbel",
        "bernoulli",
        "dropout1d",
        "attention",
    ],
)
def test_other_random_numbers_are_refused(draw: Callable[[Tensor], Tensor]) -> None:
    op = inv.checkpoint(between(inv.couple(draw)))
    message = "draws random numbers with .*, expected none but those of dropout: a graph can not draw the same again; store it"
    with pytest.raises(Exception, match=message):
        torch.compile(op, backend="eager", fullgraph=True)(torch.randn(5, 2 * WIDE, requires_grad=True))


def test_a_frame_that_dynamo_gives_up_runs_eagerly() -> None:
    net = Network(closures)
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(5, 4)
    inv.measure(lambda: compiled(x))  # below a dispatch mode nothing is compiled, and closures are watched
    torch.testing.assert_close(compiled(x), net.plain(x))


# ---- memory ----------------------------------------------------------------------------------------------------------


class Saved:
    """A backend that runs graphs op by op, and knows what forward keeps for backward besides its own inputs."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def backward(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        kept = [
            n for n in graph.graph.nodes if n.op == "placeholder" and not n.name.startswith(("tangents", "primals"))
        ]
        self.bytes += [n.meta["val"].numel() * n.meta["val"].element_size() for n in kept]
        return make_boxed_func(graph.forward)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compile_graph = aot_autograd(
            fw_compiler=lambda g, _: make_boxed_func(g.forward),
            bw_compiler=self.backward,
            partition_fn=min_cut_rematerialization_partition,
        )
        return compile_graph(graph, inputs)


BATCH = 64  # so that activations outweigh weights


class Context(nn.Module):
    """Computes from a context that no coupling changes."""

    def __init__(self, context: Tensor) -> None:
        super().__init__()
        self.context, self.outer, self.inner = context, nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) + torch.tanh(self.outer(self.context)).sin())


class LowRank(nn.Module):
    """A weight with an update of rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.a, self.b = (nn.Parameter(torch.randn(s) / 3) for s in ((WIDE, WIDE), (WIDE, 1), (1, WIDE)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.weight + self.a @ self.b))


def additive_chain(depth: int) -> Any:
    return [part for _ in range(depth) for part in (inv.couple(Tanh()), inv.swap())]


def context_chain(depth: int) -> Any:
    context = torch.randn(BATCH, WIDE)
    return [part for _ in range(depth) for part in (inv.couple(Context(context)), inv.swap())]


def pass_through_chain(depth: int) -> Any:
    return [inv.couple(Tanh()) for _ in range(depth)]


def low_rank_chain(depth: int) -> Any:
    return [part for _ in range(depth) for part in (inv.couple(LowRank()), inv.swap())]


def kept_and_peak(chain: Callable[[int], Any], depth: int) -> tuple[list[int], int]:
    op = inv.checkpoint(between(*chain(depth)))
    saved = Saved()
    compiled = torch.compile(op, backend=saved, fullgraph=True)
    x = torch.randn(BATCH, 2 * WIDE, requires_grad=True)

    def run() -> None:
        compiled(x).sum().backward()

    run()
    weights = sum(
        p.numel() * p.element_size() for part in op.functions if isinstance(part, nn.Module) for p in part.parameters()
    )
    return sorted(saved.bytes), peak_bytes(run) - weights  # each has a gradient in the end


def peak_bytes(run: Callable[[], None]) -> int:
    """By the allocator's own events: under the dispatch mode of `inv.measure` nothing would be compiled."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.parametrize("chain", [additive_chain, context_chain, pass_through_chain, low_rank_chain])
def test_memory_does_not_grow_with_depth(chain: Callable[[int], Any]) -> None:
    activation = BATCH * 2 * WIDE * 8
    (shallow, shallow_peak), (deep, deep_peak) = kept_and_peak(chain, 4), kept_and_peak(chain, 16)
    assert shallow == deep
    assert sum(deep) <= 2 * activation
    assert deep_peak <= shallow_peak + activation / 2


# ---- stage by stage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["couplings", "affine", "tensors", "closures", "marks", "buffers", "one_way", "segments"]
)
def test_compiled_stages_give_the_gradients_of_plain_autograd(name: str) -> None:
    make, options = CASES[name]
    net = Network(make, **options)
    net.fast = inv.compile_stages(net.fast, backend="aot_eager")
    assert_same_step(net, net)


def test_one_graph_for_each_kind_of_stage() -> None:
    counts = []
    for depth in 4, 8:  # the first stages are given views, which have a layout of their own
        torch._dynamo.reset()
        counter = CompileCounter()
        op = inv.compile_stages(inv.checkpoint(between(*additive_chain(depth))), backend=counter)
        op(torch.randn(5, 2 * WIDE, requires_grad=True)).sum().backward()
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] <= 6


def test_compiled_stages_inside_of_a_graph_and_of_a_transform() -> None:
    net = Network(couplings)
    net.fast = inv.compile_stages(net.fast, backend="aot_eager")
    assert_same_step(net, torch.compile(net, backend="aot_eager", fullgraph=True))
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.func.vmap(lambda x: net(x[None])[0])(x), net.plain(x))
    torch.autograd.gradgradcheck(net, x.requires_grad_())


def test_stages_that_were_compiled_before_become_part_of_a_graph() -> None:
    net = Network(couplings)
    net.fast = inv.compile_stages(net.fast, backend="aot_eager")
    net(torch.randn(3, 4)).sum().backward()
    assert_same_step(net, torch.compile(net, backend="aot_eager", fullgraph=True))


def test_compiled_stages_on_fake_tensors_are_not_compiled() -> None:
    op = inv.compile_stages(inv.checkpoint(between(inv.couple(Tanh()))), backend="aot_eager")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(5, 2 * WIDE, requires_grad=True)
        op(x).sum().backward()
        assert x.grad.shape == x.shape


def test_a_transform_inside_of_a_call_leaves_dynamo_its_names() -> None:
    """Torch's functions that Dynamo knows by identity are the same after a transform has begun below our hooks."""
    x = torch.randn(4, dtype=torch.float64)
    torch.compile(torch.sin, backend="eager")(x)
    inv.checkpoint(torch.func.grad(lambda t: t.sin().sum()))(x.requires_grad_()).sum().backward()
    assert_close(x.grad, -x.detach().sin())
    pulled = torch.compile(lambda t: torch.func.vjp(torch.sin, t)[1](t)[0], backend="aot_eager", fullgraph=True)
    assert_close(pulled(x.detach()), x.detach().cos() * x.detach())


@pytest.mark.parametrize("mode", ["invert", "recompute", "store"])
def test_a_mode_that_is_entered_in_a_graph(mode: str) -> None:
    net, x = nn.Linear(WIDE, WIDE), torch.randn(3, 2 * WIDE, requires_grad=True)

    def fn(x: Tensor) -> Tensor:
        with inv.mode(mode):
            return inv.checkpoint(between(inv.couple(net, torch.tanh)))(x)

    found = [
        torch.autograd.grad(f(x).sin().sum(), [x, *net.parameters()])
        for f in (fn, torch.compile(fn, backend="aot_eager", fullgraph=True))
    ]
    assert_close(*found, tolerance=TOLERANCE)
    with inv.mode("store"):  # as outside of graphs
        assert inv.checkpoint(inv.ops.exp())(x).grad_fn.name() == "ExpBackward0"


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")  # of what it would trace
def test_what_runs_outside_of_a_graph_runs_as_it_will_in_backward() -> None:
    """Dynamo gives up a frame, and goes on with those that it calls; compiled, a function saves other tensors."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    def fn(x: Tensor) -> Tensor:
        return (x.exp() * x).sin()

    x, region = torch.randn(3, requires_grad=True), Region(fn, tuple, None, conditions_of((fn,)), Options())

    @torch.compiler.disable(recursive=False)
    def given_up() -> Tensor:
        return region.run((x,), [x], (fn,))

    y = torch.compile(given_up, backend=backend)()
    region.conditions.snapshot.note()
    (found,) = torch.autograd.grad(y.sum(), x)
    assert_close(found, torch.autograd.grad(fn(x).sum(), x)[0])
    assert "sin" not in graphs
