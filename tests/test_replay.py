"""Replay: what a function did in forward happens again, identically, in backward, and leaves the world as plain training does."""

import copy
import gc
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kit import WIDTH, Step, assert_close, in_threads, leaf, loss, parameters
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import invfunc as inv
from invfunc import _torch
from invfunc.errors import ReplayError


def lowerings(f: nn.Module, g: nn.Module) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """A network of f and g, plain and lowered, in every way of lowering it; functions of two tensors."""
    net = inv.chain(inv.couple(f, g), inv.swap(), inv.couple(lambda x: g(x)), inv.couple(f))
    residual = inv.pair(lambda a, b: (a + f(b), b), lambda a, b: (a - f(b), b))
    ways = {
        "invert": (net, inv.checkpoint(net)),
        "inverse": (~net, ~inv.checkpoint(net)),
        "recompute": (net, inv.checkpoint(net, mode="recompute")),
        "segments": (net, inv.checkpoint(net, mode="recompute", segments=3)),
        "store": (net, inv.checkpoint(net, mode="store")),
        "pair": (residual, inv.checkpoint(residual)),
        "marks": (net, inv.checkpoint(inv.chain(inv.mark(net.parts[0], "recompute"), *net.parts[1:]))),
    }
    plain = lambda a, b: (a * g(f(b)), f(a))  # noqa: E731
    ways["function"] = plain, inv.checkpoint(plain)
    nested = lambda a, b: inv.checkpoint(plain)(*net(a, b))  # noqa: E731
    ways["nested"] = (lambda a, b: plain(*net(a, b))), inv.checkpoint(nested)
    return ways


WAYS = ["invert", "inverse", "recompute", "segments", "store", "pair", "marks", "function", "nested"]


# ---- random numbers ----------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws in many ways."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5, inplace)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.layer(x))
        return h * torch.rand_like(h) + torch.randn(h.shape) + nn.functional.alpha_dropout(h, 0.3, training=True)


@pytest.mark.parametrize("way", WAYS)
def test_dropout_is_that_of_plain_training_with_the_same_seed(way: str) -> None:
    f, g = Noisy(), Noisy(inplace=True)
    plain, fast = lowerings(f, g)[way]
    x = [leaf(3, WIDTH), leaf(3, WIDTH)]
    tensors = parameters(f) if way == "pair" else parameters(f, g)
    Step(fast, x, tensors).assert_same(Step(plain, x, tensors))


@pytest.mark.parametrize("way", ["invert", "recompute", "function"])
def test_dropout_under_double_backward(way: str) -> None:
    f, g = Noisy(), Noisy()
    plain, fast = lowerings(f, g)[way]
    x, found = [leaf(3, WIDTH), leaf(3, WIDTH)], []
    for fn in plain, fast:
        torch.manual_seed(3)
        once = torch.autograd.grad(loss(fn(*x)), [*x, *parameters(f, g)], create_graph=True)
        found.append(torch.autograd.grad(loss(once), [*x, *parameters(f, g)]))
    assert_close(*found)


def test_two_steps_draw_what_plain_training_draws() -> None:
    f, g = Noisy(), Noisy()
    net, x, found = inv.couple(f, g), [leaf(3, WIDTH), leaf(3, WIDTH)], []
    for fn in net, inv.checkpoint(net):
        torch.manual_seed(0)
        outs = [fn(*x), fn(*x)]  # both forwards before either backward
        found.append([torch.autograd.grad(loss(out), x) for out in reversed(outs)] + [torch.randn(3)])
    assert_close(*found)


def test_nothing_is_remembered_of_a_function_that_draws_nothing() -> None:
    def remembers(fn: Callable[..., Any]) -> bool:
        return "random state" in {row.what for row in inv.look.saved(fn, leaf(3))}

    assert not remembers(inv.checkpoint(torch.tanh))
    assert remembers(inv.checkpoint(nn.functional.dropout))
    assert not remembers(inv.checkpoint(nn.functional.dropout, preserve_rng_state=False))


def test_two_threads_replay_their_own_numbers() -> None:
    fn = inv.checkpoint(lambda x: nn.functional.dropout(x, 0.5) * nn.functional.dropout(x.exp(), 0.5))
    x = leaf(200, 200)
    outs = [fn(x).sum() for _ in range(8)]
    expected = [torch.autograd.grad(out, x, retain_graph=True)[0] for out in outs]
    before = torch.get_rng_state()
    found = in_threads([lambda out=out: torch.autograd.grad(out, x)[0] for out in outs])
    assert all(map(torch.equal, found, expected))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.cuda
@pytest.mark.parametrize("way", WAYS)
def test_dropout_on_cuda(way: str) -> None:
    f, g = Noisy().cuda(), Noisy().cuda()
    plain, fast = lowerings(f, g)[way]
    x = [torch.randn(3, WIDTH, device="cuda", requires_grad=True) for _ in range(2)]
    tensors, found = parameters(f) if way == "pair" else parameters(f, g), []
    for fn in plain, fast:
        torch.manual_seed(7)
        out = fn(*x)
        gradients = torch.autograd.grad(loss(out), [*x, *tensors])
        found.append([out, gradients, torch.cuda.get_rng_state()])
    assert_close(*found)


# ---- buffers -----------------------------------------------------------------------------------------------------------


def conv(normalise: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(normalise(nn.Conv2d(2, 3, 3, padding=1)), nn.ReLU(), nn.Conv2d(3, 2, 1))


class Momentum(nn.Module):
    """Rebinds its buffer instead of writing it, and counts by writing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, 1, 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3), keepdim=True)[0]
            self.steps += 1
        return (x - self.mean).tanh() / self.steps.clamp(min=1)


BUFFERED: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.BatchNorm2d(2), conv(lambda m: m)),
    "batch norm, cumulative": lambda: nn.Sequential(nn.BatchNorm2d(2, momentum=None), conv(lambda m: m)),
    "batch norm behind": lambda: nn.Sequential(conv(lambda m: m), nn.BatchNorm2d(2, affine=False)),
    "instance norm": lambda: nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True), conv(lambda m: m)),
    "parametrised spectral_norm": lambda: conv(lambda m: spectral_norm(m, n_power_iterations=2)),
    "hooked spectral_norm": lambda: conv(lambda m: nn.utils.spectral_norm(m)),
    "rebound": lambda: nn.Sequential(Momentum(), conv(lambda m: m)),
    "all": lambda: nn.Sequential(nn.BatchNorm2d(2), Momentum(), conv(spectral_norm), nn.Dropout(0.2)),
}


def train(
    lower: Callable[[inv.Invertible], Any], f: nn.Module, g: nn.Module, closures: bool, steps: int = 10
) -> list[Any]:
    """Losses, parameters and buffers of a few steps of training; the last is in eval mode."""
    torch.manual_seed(5)
    pair = (lambda x: f(x), lambda x: g(x)) if closures else (f, g)
    fn = lower(inv.chain(inv.split(2), inv.couple(*pair), inv.couple(*pair), inv.concat(2)))
    optimizer = torch.optim.SGD([*f.parameters(), *g.parameters()], lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(fn(torch.randn(3, 4, 4, 4, requires_grad=True)).pow(2).mean())
        losses[-1].backward()
        optimizer.step()
    f.eval(), g.eval()
    x = torch.randn(3, 4, 4, 4, requires_grad=True)
    losses.append(torch.autograd.grad(fn(x).pow(2).mean(), x)[0])
    state = {**f.state_dict(prefix="f."), **g.state_dict(prefix="g.")}
    return [[t.detach() for t in losses], {k: v.double() for k, v in state.items()}]


@pytest.mark.parametrize("closures", [False, True], ids=["modules", "closures"])
@pytest.mark.parametrize("name", BUFFERED)
def test_buffers_equal_those_of_plain_training(name: str, closures: bool) -> None:
    modules = BUFFERED[name](), BUFFERED[name]()
    found = [
        train(lower, *copy.deepcopy(modules), closures)
        for lower in (lambda op: op, inv.checkpoint, lambda op: inv.checkpoint(op, mode="recompute"))
    ]
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


def test_buffers_of_a_plain_function() -> None:
    found = []
    for lower in lambda fn: fn, inv.checkpoint:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(WIDTH)
        fn = lower(lambda x, norm=norm: norm(x).tanh())
        gradients = [torch.autograd.grad(loss(fn(x)), x) for x in (leaf(5, WIDTH) for _ in range(4))]
        found.append([gradients, dict(norm.named_buffers())])
    assert_close(*found)


def test_one_batch_norm_in_two_blocks() -> None:
    found = []
    for lower in lambda op: op, inv.checkpoint:
        torch.manual_seed(0)
        norm, x = nn.BatchNorm1d(WIDTH), [leaf(5, WIDTH), leaf(5, WIDTH)]
        out = lower(inv.chain(inv.couple(norm, norm), inv.couple(norm)))(*x)
        found.append([out, torch.autograd.grad(loss(out), [*x, *norm.parameters()]), dict(norm.named_buffers())])
    assert_close(*found)


def test_buffers_are_written_once_under_double_backward_and_twice_differentiated() -> None:
    found = []
    for lower in lambda op: op, inv.checkpoint:
        torch.manual_seed(0)
        norm, x = nn.BatchNorm1d(WIDTH), [leaf(5, WIDTH), leaf(5, WIDTH)]
        out = lower(inv.couple(norm))(*x)
        once = torch.autograd.grad(loss(out), x, create_graph=True)
        twice = torch.autograd.grad(loss(once), x)
        found.append([once, twice, dict(norm.named_buffers())])
    assert_close(*found)


@pytest.mark.parametrize("lower", [inv.checkpoint, lambda op: inv.checkpoint(op, mode="recompute")])
def test_a_buffer_changed_between_forward_and_backward_raises(lower: Callable[..., Any]) -> None:
    norm = nn.BatchNorm1d(WIDTH).eval()
    for change in (
        lambda: norm.running_mean.add_(1),
        lambda: norm.num_batches_tracked.add_(1),
        lambda: norm.load_state_dict({k: v + 1 for k, v in norm.named_buffers()}, strict=False),
    ):
        out = lower(inv.couple(norm))(leaf(5, WIDTH), leaf(5, WIDTH))
        change()
        with pytest.raises(
            ReplayError, match=r"of a module changed between forward and backward, expected the tensors that"
        ):
            loss(out).backward()


def test_a_frozen_weight_changed_between_forward_and_backward_raises() -> None:
    layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    out = inv.checkpoint(inv.couple(layer))(leaf(5, WIDTH), leaf(5, WIDTH))
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(ReplayError, match=r"\['weight'\] of a module changed"):
        loss(out).backward()


def test_a_weight_changed_between_forward_and_backward_raises_as_in_plain_autograd() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    for fn in (
        inv.checkpoint(inv.couple(layer)),
        inv.checkpoint(lambda a, b: layer(a)),
        inv.checkpoint(lambda a, b: b @ layer.weight),
    ):
        out = fn(leaf(5, WIDTH), leaf(5, WIDTH))
        with torch.no_grad():
            layer.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss(out).backward()


# ---- autocast ----------------------------------------------------------------------------------------------------------


class Seen(nn.Module):
    """Notes the dtype that its layer computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dtypes = nn.Linear(WIDTH, WIDTH, dtype=torch.float32), []

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self.dtypes.append(out.dtype)
        return out.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["invert", "recompute", "pair", "function", "nested"])
def test_autocast_is_restored_with_its_dtype(way: str, dtype: torch.dtype) -> None:
    f, g = Seen(), Seen()
    plain, fast = lowerings(f, g)[way]
    x = [torch.randn(3, WIDTH, dtype=torch.float32, requires_grad=True) for _ in range(2)]
    tensors, found = parameters(f) if way == "pair" else parameters(f, g), []
    for fn in plain, fast:
        with torch.autocast("cpu", dtype=dtype):
            out = fn(*x)
        found.append([out, torch.autograd.grad(loss(out), [*x, *tensors])])  # outside, as torch advises
        assert not torch.is_autocast_enabled("cpu")
    assert set(f.dtypes) == {dtype}
    assert_close(*found, tolerance=2e-2)  # bf16 itself: the same products, of inputs rebuilt to within fp32


def test_autocast_of_backward_does_not_leak_in() -> None:
    f = Seen()
    op = inv.checkpoint(inv.couple(f), early_stop=False)
    out = op(*[torch.randn(3, WIDTH, dtype=torch.float32, requires_grad=True)] * 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss(out).backward()
        assert torch.is_autocast_enabled("cpu")
    assert f.dtypes == [torch.float32] * 2


class Loop(nn.Module):
    """A model whose own loop computes every second block in half precision."""

    def __init__(self) -> None:
        super().__init__()
        layer = partial(nn.TransformerEncoderLayer, 8, 2, 16, dropout=0.0, norm_first=True, batch_first=True)
        self.layers = nn.ModuleList([layer(dtype=torch.float32) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.layers):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=i % 2 == 1):
                x = block(x)
        return x


def test_autocast_between_the_blocks_of_a_model_is_that_of_each_block() -> None:
    model = Loop()
    inv.nn.reversible(model, "layers.*")
    x, found = torch.randn(2, 3, 8, dtype=torch.float32, requires_grad=True), []
    for mode in "store", "invert":
        with inv.mode(mode):
            out = model(x)
        found.append([out, torch.autograd.grad(loss(out), [x, *model.parameters()])])
    assert_close(*found, tolerance=2e-2)


# ---- compiled functions ------------------------------------------------------------------------------------------------


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["module", "module in a closure", "function", "function in a closure"])
def test_compiled_coupling_functions_are_accepted(kind: str, backend: str) -> None:
    torch.compiler.reset()
    layer, w = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), leaf(WIDTH)
    plain = layer if "module" in kind else lambda x: layer(x) * w
    compiled = torch.compile(plain, backend=backend)
    fast = (lambda x: compiled(x)) if "closure" in kind else compiled
    tensors = [*layer.parameters(), *([] if "module" in kind else [w])]
    for x in [leaf(3, WIDTH), leaf(3, WIDTH)], [leaf(2, WIDTH), leaf(2, WIDTH)]:
        expected = Step(inv.couple(plain, torch.sin), x, tensors)
        Step(inv.checkpoint(inv.couple(fast, torch.sin)), x, tensors).assert_same(expected)
        expected = Step(lambda a, b: plain(a) * b, x, tensors)
        Step(inv.checkpoint(lambda a, b: fast(a) * b), x, tensors).assert_same(expected)


# ---- discrete decisions ------------------------------------------------------------------------------------------------


class Router(nn.Module):
    """A mixture of experts; each row goes to the expert of its largest score."""

    def __init__(self, pinned: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.pinned, self.routes = pinned, []

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, :3].topk(1).indices[:, 0]
        chosen = inv.pin("expert", chosen) if self.pinned else chosen
        self.routes.append(chosen.tolist())
        return torch.stack([expert(x) for expert in self.experts], 1)[torch.arange(len(x)), chosen]


def at_a_tie() -> Tensor:
    """Rows whose two largest scores differ by 1e-6: a perturbation of 1e-3 turns the order around."""
    x = torch.randn(5, WIDTH)
    x[:, 0] = x[:, 1] = x[:, :3].max(1).values
    x[:, 0] += 1e-6
    return x


def drifting(router: nn.Module) -> inv.Invertible:
    """A coupling whose second component is rebuilt with an error of 1e-3, as a long chain in bf16 would."""
    drift = inv.pair(lambda a, b: (a, b * 1), lambda a, b: (a, b - 1e-3 * (torch.arange(WIDTH) == 0)))
    return inv.chain(inv.couple(router), drift)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_router_at_a_tie_routes_as_in_forward(pinned: bool) -> None:
    router, a, b = Router(pinned), leaf(5, WIDTH), at_a_tie().requires_grad_()
    out = inv.checkpoint(drifting(router))(a, b)
    with pytest.warns(inv.errors.DriftWarning, match=r"what chain stage 0 \(couple\) gives"):
        loss(out).backward()
    forward, backward, *_ = router.routes  # then those who look for the cause
    assert (forward == backward) == pinned  # without a pin, this test's perturbation does turn routes around
    if pinned:
        gradients = [p.grad.clone() for p in router.parameters()]
        router.zero_grad()
        loss(drifting(router)(a, b)).backward()
        assert_close(gradients, [p.grad for p in router.parameters()], tolerance=1e-2)  # the input has drifted by 1e-3


@pytest.mark.parametrize("way", ["invert", "recompute", "function", "nested"])
def test_pinned_values_under_every_lowering(way: str) -> None:
    f, g = Router(True), Router(True)
    plain, fast = lowerings(f, g)[way]
    x = [leaf(5, WIDTH), leaf(5, WIDTH)]
    Step(fast, x, parameters(f, g)).assert_same(Step(plain, x, parameters(f, g)))


def test_pinned_values_of_any_type() -> None:
    seen, x = [], leaf(3)
    decisions = iter([2.0, 5.0])

    def f(x: Tensor) -> Tensor:
        scale, (index, flag) = inv.pin("scale", next(decisions)), inv.pin("more", (torch.tensor(1), True))
        seen.append((scale, int(index), flag))
        return (x * scale).sin()

    inv.checkpoint(f)(x).sum().backward()
    assert seen == [(2.0, 1, True)] * 2
    assert_close(x.grad, 2 * (2 * x).cos())


def pinned_twice(decisions: list[Tensor], w: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A pair whose function calls a lowered op with a pin, and pins something itself; its inverse is off at the tie."""

    def near(a: Tensor) -> Tensor:
        above = inv.pin("inner", a > 0.3)
        decisions.append(above)
        return torch.where(above, a @ w * 2, a @ w * 5)

    inner = inv.checkpoint(inv.couple(near), drift="off")

    def forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        p, _ = inner(a, b)
        return p * inv.pin("outer", 2.0), b

    def inverse(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a / 2 - torch.where(b > 0.3, b @ w * 2, b @ w * 5), b + 0.25

    return forward, inverse


@pytest.mark.parametrize("grad", [True, False], ids=["needs grad", "one leaf without"])
def test_pins_of_a_lowered_op_inside_of_a_function(grad: bool) -> None:
    """Without a gradient to compute for one leaf, the stage is taped while it is recorded."""
    w, decisions = leaf(3, 3), []
    forward, inverse = pinned_twice(decisions, w)
    a, b = torch.randn(1, 3, requires_grad=grad), torch.tensor([[0.1, 0.2, 0.5]], requires_grad=True)
    inv.checkpoint(inv.pair(forward, inverse), drift="off")(a, b)[0].sum().backward()
    assert len(decisions) > 1 and all(torch.equal(decision, decisions[0]) for decision in decisions)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], r"pin\('b'\) on replay, expected pin\('a'\); pin the same names in the same order"),
        (["a", None], None),
    ],
)
def test_pins_have_to_come_in_the_same_order(names: list[str | None], message: str | None) -> None:
    left = iter(names)

    def f(x: Tensor) -> Tensor:
        name = next(left)
        return (x * (inv.pin(name, 2.0) if name else 2.0)).sin()

    out = inv.checkpoint(f)(leaf(3))
    if message is None:
        out.sum().backward()
    else:
        with pytest.raises(ReplayError, match=message):
            out.sum().backward()


def test_a_pin_too_many() -> None:
    calls: list[None] = []

    def f(x: Tensor) -> Tensor:
        calls.append(None)
        return (x * sum(inv.pin("scale", 2.0) for _ in calls)).sin()

    out = inv.checkpoint(f)(leaf(3))
    with pytest.raises(ReplayError, match=r"pin\('scale'\) on replay, expected nothing more; pin the same names"):
        out.sum().backward()


def test_pin_outside_of_a_lowered_call_returns_its_value() -> None:
    value = torch.arange(3)
    assert inv.pin("x", value) is value


# ---- networks that people use as f -------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(WIDTH, WIDTH, num_layers=2, batch_first=True, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "MultiheadAttention": Attention,
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True),
    "TransformerEncoderLayer, norm first": lambda: nn.TransformerEncoderLayer(
        WIDTH, 2, 8, batch_first=True, norm_first=True
    ),
    "Embedding in front": lambda: nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Softmax(-1)
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_as_coupling_functions(name: str, training: bool) -> None:
    f, g = (NETWORKS[name]().train(training) for _ in range(2))
    x = [leaf(2, 5, WIDTH), leaf(2, 5, WIDTH)]
    for way in "invert", "recompute", "function":
        plain, fast = lowerings(f, g)[way]
        for _ in range(2):
            Step(fast, x, parameters(f, g)).assert_same(Step(plain, x, parameters(f, g)))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "MultiheadAttention", "TransformerEncoderLayer"])
def test_networks_under_functional_call_with_backward_after_the_call(name: str) -> None:
    class Net(nn.Module):
        def __init__(self, lower: Callable[..., Any], f: nn.Module) -> None:
            super().__init__()
            self.f = f
            self.op = lower(inv.couple(f, lambda x: f(x).sin()))

        def forward(self, a: Tensor, b: Tensor) -> Any:
            return self.op(a, b)

    f = NETWORKS[name]().eval()
    state = {f"f.{k}": leaf(*p.shape) for k, p in f.named_parameters()}
    x = leaf(2, 5, WIDTH), leaf(2, 5, WIDTH)
    found = []
    for lower in lambda op: op, inv.checkpoint, lambda op: inv.checkpoint(op, mode="recompute"):
        out = torch.func.functional_call(Net(lower, f), state, x)
        found.append(torch.autograd.grad(loss(out), [*x, *state.values()]))
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


# ---- nothing is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_step_leaves_nothing_behind(way: str, no_gc: None) -> None:
    f, g = Noisy(), Noisy()
    _, fast = lowerings(f, g)[way]

    def alive() -> int:
        return sum(issubclass(type(item), Tensor) for item in gc.get_objects())

    counts = []
    for _ in range(4):
        out = fast(leaf(3, WIDTH), leaf(3, WIDTH))
        loss(out).backward()
        f.zero_grad(), g.zero_grad()
        del out
        counts.append(alive())
    assert counts[1:] == [counts[1]] * 3


@pytest.mark.compile
def test_watching_in_two_threads_leaves_the_compiler_as_it_was() -> None:
    """Dynamo's stance belongs to the process: set and set back by threads in turns, it would stay ``force_eager``."""
    import torch._dynamo.eval_frame as dynamo

    first_is_in, second_is_in = threading.Event(), threading.Event()

    def enter_first() -> None:
        with _torch.without_compiler():
            first_is_in.set()
            second_is_in.wait(10)

    thread = threading.Thread(target=enter_first)
    thread.start()
    assert first_is_in.wait(10)
    with _torch.without_compiler():
        second_is_in.set()
        thread.join(10)
        assert dynamo._stance.stance == "force_eager"
    assert dynamo._stance.stance == "default"


def test_what_follows_branches_that_draw_draws_its_own_numbers() -> None:
    def drawing(width: int) -> inv.Invertible:
        branch = nn.Sequential(nn.Linear(width // 2, width // 2), nn.Dropout(0.5))
        return inv.chain(inv.split(2, -1), inv.couple(branch), inv.concat(2, -1))

    beside = inv.chain(inv.split(2, -1), inv.parallel(drawing(4), drawing(4)), inv.concat(2, -1))
    op, x = inv.chain(drawing(8), beside, drawing(8)), leaf(5, 8)
    Step(op, [x], []).assert_same(Step(inv.checkpoint(op), [x], []))
