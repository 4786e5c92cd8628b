"""A step of training on a device is plain autograd's: random numbers, devices, and what belongs to a thread."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from kit import TOLERANCE, assert_close, bowl, in_threads, network, parameters
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import invfunc as inv
from invfunc.errors import DomainError, ReplayError

from . import sim
from .cases_sim import NETWORKS

DEVICE = "sim:0"


def branch(kind: str = "dropout", device: Any = DEVICE) -> nn.Module:
    """A small network on a device."""
    last = {"dropout": nn.Dropout(0.3), "batch norm": nn.BatchNorm1d(4), "plain": nn.Tanh()}[kind]
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), last).to(device)


def step(fn: Callable[..., Any], inputs: list[Tensor], tensors: list[Tensor], seed: int = 7) -> list[Tensor]:
    """Output and gradients of a step from a seed, and the states of all generators behind it."""
    torch.manual_seed(seed)
    inputs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    y = fn(*inputs)
    states = random_states()
    found = torch.autograd.grad(bowl(y), [*(x for x in inputs if x.requires_grad), *tensors], allow_unused=True)
    assert_close(random_states(), states)
    return [y.detach(), *found, *states]


def random_states() -> list[Tensor]:
    """Of the CPU and of both devices."""
    return [torch.get_rng_state(), *[torch.sim.get_rng_state(i) for i in range(sim.DEVICES)]]


LOWERINGS: dict[str, Callable[[inv.Invertible], Callable[..., Any]]] = {
    "invert": inv.checkpoint,
    "segments": lambda op: inv.checkpoint(op, segments=2),
    "recompute": lambda op: inv.checkpoint(op, mode="recompute"),
    "store": lambda op: inv.checkpoint(op, mode="store"),
    "function": lambda op: inv.checkpoint(lambda x: op(x)),
    "donate": lambda op: lambda x: inv.checkpoint(op, donate=True)(x * 1),
    "exact": lambda op: inv.checkpoint(inv.exact(op, mode="codes")),
    "mark": lambda op: inv.checkpoint(inv.chain(op.parts[0], inv.mark(op.parts[1], "recompute"), *op.parts[2:])),
}


@pytest.mark.parametrize("kind", ["plain", "dropout", "batch norm"])
@pytest.mark.parametrize("lower", LOWERINGS.values(), ids=LOWERINGS)
def test_a_step_is_plain_autograds(lower: Callable[[inv.Invertible], Callable[..., Any]], kind: str) -> None:
    branches = [branch(kind) for _ in range(4)]
    op, x = network(branches, dim=-1), torch.randn(6, 8, device=DEVICE)
    expected = step(op, [x], parameters(*branches))
    assert_close(step(lower(op), [x], parameters(*branches)), expected, TOLERANCE)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_region_runs_again_as_it_ran(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    net, x = make()
    net, x = net.to(DEVICE), x.to(DEVICE)
    expected = step(net, [x], parameters(net))
    assert_close(step(inv.checkpoint(net), [x], parameters(net)), expected)


def model_parallel() -> tuple[Callable[..., Any], list[Tensor], list[nn.Module]]:
    first, second = branch(device="sim:0"), branch(device="sim:1")
    return lambda x: first(x) + second(x.to("sim:1")).to("sim:0"), [torch.randn(6, 4, device="sim:0")], [first, second]


def token_ids_on_the_cpu() -> tuple[Callable[..., Any], list[Tensor], list[nn.Module]]:
    net = nn.Sequential(nn.Embedding(9, 4), nn.Dropout(0.3)).to("sim:1")
    return lambda ids: net(ids.to("sim:1")), [torch.randint(9, (6,))], [net]


def offloaded_stream() -> tuple[Callable[..., Any], list[Tensor], list[nn.Module]]:
    net = branch(device="sim:1")
    return lambda x: net(x.to("sim:1")).to("cpu"), [torch.randn(6, 4)], [net]


def captured_tensor() -> tuple[Callable[..., Any], list[Tensor], list[nn.Module]]:
    scale = torch.randn(4, device="sim:1")
    return (
        lambda x: nn.functional.dropout(x.to("sim:1") * scale, 0.5).to("sim:0"),
        [torch.randn(6, 4, device="sim:0")],
        [],
    )


def device_made_inside() -> tuple[Callable[..., Any], list[Tensor], list[nn.Module]]:
    return lambda x: x * torch.rand(4, device="sim").to(x.device), [torch.randn(6, 4)], []


def device_of_an_object() -> tuple[Callable[..., Any], list[Tensor], list[nn.Module]]:
    net = nn.Module()
    net.place, net.forward = torch.device("sim:1"), lambda x: nn.functional.dropout(x.to(net.place), 0.5).to("cpu")
    return net, [torch.randn(6, 4)], []


def device_of_a_closure() -> tuple[Callable[..., Any], list[Tensor], list[nn.Module]]:
    place = torch.device("sim:1")
    return lambda x: nn.functional.dropout(x.to(place), 0.5).to("cpu"), [torch.randn(6, 4)], []


ELSEWHERE = [model_parallel, token_ids_on_the_cpu, offloaded_stream, captured_tensor, device_made_inside]
ELSEWHERE += [device_of_an_object, device_of_a_closure]


@pytest.mark.parametrize("make", ELSEWHERE)
@pytest.mark.parametrize("kind", ["function", "recompute", "couple"])
def test_random_numbers_are_replayed_on_every_device(make: Callable[[], Any], kind: str) -> None:
    fn, inputs, modules = make()
    if kind == "couple":
        if make is token_ids_on_the_cpu:
            inputs, base = [torch.randn(6, 4)], fn
            fn = lambda x: base(x.argmax(-1)).to("cpu") * x  # noqa: E731
        halves = [torch.cat([x, x], -1) for x in inputs]
        op = inv.chain(inv.split(2, -1), inv.couple(fn), inv.concat(2, -1))
        assert_close(
            step(inv.checkpoint(op), halves, parameters(*modules)), step(op, halves, parameters(*modules)), 1e-9
        )
        return
    fast = inv.checkpoint(fn) if kind == "function" else inv.checkpoint(inv.one_way(fn), mode="recompute")
    assert_close(step(fast, inputs, parameters(*modules)), step(fn, inputs, parameters(*modules)))


def of_two_devices() -> tuple[inv.Invertible, list[nn.Module]]:
    """Couplings between a wire on one device and a wire on the other one."""
    nets = [[branch(device=f"sim:{i}") for _ in range(2)] for i in (0, 1)]

    def across(net: nn.Module, device: str) -> Callable[[Tensor], Tensor]:
        return lambda x: net(x).to(device)

    couplings = [inv.couple(across(g, "sim:0"), across(f, "sim:1")) for f, g in zip(*nets, strict=True)]
    return inv.chain(*couplings), [net for pair in nets for net in pair]


WIDE_LOWERINGS = {
    **{name: LOWERINGS[name] for name in ("invert", "segments", "recompute", "exact")},
    "packed codes": lambda op: inv.checkpoint(inv.exact(op, mode="codes", pack=True)),
}


@pytest.mark.parametrize("lower", WIDE_LOWERINGS.values(), ids=WIDE_LOWERINGS)
def test_a_wire_lies_on_two_devices(lower: Any) -> None:
    op, modules = of_two_devices()
    inputs = [torch.randn(6, 4, device=f"sim:{i}") for i in (0, 1)]

    def joined(fn: Any) -> Callable[..., Tensor]:
        return lambda *x: torch.cat([t.to("sim:0") for t in fn(x)], -1)

    expected = step(joined(op), inputs, parameters(*modules))
    assert_close(step(joined(lower(op)), inputs, parameters(*modules)), expected, TOLERANCE)


def test_a_grid_lies_on_two_devices() -> None:
    op, x = inv.exact(of_two_devices()[0]), tuple(torch.randn(6, 4, device=f"sim:{i}") for i in (0, 1))
    torch.manual_seed(3)
    expected = op(x)
    torch.manual_seed(3)
    assert all(map(torch.equal, inv.checkpoint(op)(tuple(t.requires_grad_() for t in x)), expected))


@pytest.mark.parametrize("place", ["another stream", "another current device"])
@pytest.mark.parametrize("lower", LOWERINGS.values(), ids=LOWERINGS)
def test_a_step_runs_where_its_tensors_are(lower: Any, place: str) -> None:
    branches = [branch() for _ in range(4)]
    op, x = network(branches, dim=-1), torch.randn(6, 8, device=DEVICE)
    expected = step(op, [x], parameters(*branches))
    with torch.Stream(DEVICE) if place == "another stream" else torch.accelerator.device_index(1):
        found = step(lower(op), [x], parameters(*branches))
    assert_close(found, expected, TOLERANCE)


@pytest.mark.parametrize("place", ["around", "inside"])
def test_torchs_checkpoint_replays_with_ours(place: str) -> None:
    branches = [branch() for _ in range(4)]
    op, x = network(branches, dim=-1), torch.randn(6, 8, device=DEVICE)
    expected = step(op, [x], parameters(*branches))
    inner = network([lambda x, net=net: torch_checkpoint(net, x, use_reentrant=False) for net in branches], dim=-1)
    around = lambda x: torch_checkpoint(inv.checkpoint(op), x, use_reentrant=False)  # noqa: E731
    found = step(around if place == "around" else inv.checkpoint(inner), [x], parameters(*branches))
    assert_close(found, expected, TOLERANCE)


@pytest.mark.parametrize("around", ["with", "set"])
@pytest.mark.parametrize("lower", [inv.checkpoint, lambda op: inv.checkpoint(op, mode="recompute")])
def test_factories_run_again_on_the_default_device(lower: Any, around: str) -> None:
    op = network([lambda x: torch.tanh(x) * torch.rand(4) + torch.ones(4)] * 4, dim=-1)
    x = torch.randn(6, 8, device=DEVICE)
    expected = None
    for fn in (op, lower(op)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        if around == "with":
            with torch.device(DEVICE):
                y = fn(leaf)
        else:
            torch.set_default_device(DEVICE)
            try:
                y = fn(leaf)
            finally:
                torch.set_default_device(None)
        (found,) = torch.autograd.grad(bowl(y), leaf)
        if expected is not None:
            assert_close([y, found], expected, TOLERANCE)
        expected = [y, found]


@pytest.mark.parametrize("lower", LOWERINGS.values(), ids=LOWERINGS)
def test_autocast_is_that_of_forward(lower: Callable[[inv.Invertible], Callable[..., Any]]) -> None:
    branches = [branch().to(torch.float32) for _ in range(4)]
    op, x = network(branches, dim=-1), torch.randn(6, 8, device=DEVICE, dtype=torch.float32)

    def under_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor) -> Any:
            with torch.autocast("sim", torch.bfloat16):
                return fn(x)

        return run

    expected = step(under_autocast(op), [x], parameters(*branches))
    found = step(under_autocast(lower(op)), [x], parameters(*branches))
    assert_close(found, expected, 1e-2)


def test_a_gradient_inside_of_a_function_runs_again() -> None:
    w = torch.randn(4, device=DEVICE, requires_grad=True)

    def drift(x: Tensor) -> Tensor:
        return torch.func.grad(lambda v: (v * w).sin().sum())(x)

    def own(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad((x * w).sin().sum(), x, create_graph=True)[0]

    x = torch.randn(6, 8, device=DEVICE)
    for fn in (drift, own):
        op = inv.chain(inv.split(2, -1), inv.couple(fn, fn), inv.concat(2, -1))
        expected = step(op, [x], [w])
        for lower in (inv.checkpoint, lambda op: inv.checkpoint(op, mode="recompute")):
            assert_close(step(lower(op), [x], [w]), expected, TOLERANCE)


def test_backward_sees_debug() -> None:
    threads = []

    def inverse(y: Tensor) -> Tensor:
        threads.append(threading.get_ident())
        return inv.ops.log()(-y)  # outside of the domain of the logarithm

    x = torch.rand(4, device=DEVICE, requires_grad=True)
    with inv.debug(True):
        y = inv.checkpoint(inv.pair(torch.exp, inverse), drift="off")(x)
    with pytest.raises(DomainError):
        y.sum().backward()
    assert threads and threads[0] != threading.get_ident()


def test_backward_sees_the_mode() -> None:
    calls = []

    def inverse(y: Tensor) -> Tensor:
        calls.append("inverse")
        return y.log()

    inner = inv.checkpoint(inv.pair(torch.exp, inverse))
    x = torch.rand(4, device=DEVICE, requires_grad=True)
    with inv.mode("recompute"):
        y = inv.checkpoint(lambda x: inner(x).sin())(x)
    y.sum().backward()
    assert not calls
    assert_close(x.grad, x.exp() * x.exp().cos())


def test_gradients_nested_across_two_devices_end() -> None:
    scale = torch.rand(64, device="sim:1")

    def inner(x: Tensor) -> Tensor:
        other = x.detach().to("sim:1").requires_grad_()
        y = inv.checkpoint(lambda v: nn.functional.dropout(v.sin() * scale, 0.5))(other)
        return torch.autograd.grad(y.sum(), other)[0].to("sim:0")

    def fn(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return nn.functional.dropout(x, 0.5) * inner(x)

    done: list[Any] = []

    def run() -> None:
        x = torch.randn(64, device="sim:0")
        done.append(step(inv.checkpoint(fn), [x], []))
        done.append(step(fn, [x], []))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "backward waits for ever"
    assert_close(done[0], done[1])


def test_threads_whose_nested_replays_cross_the_devices_in_opposite_ways() -> None:
    def far(x: Tensor, ones: Tensor) -> Tensor:
        leaf = x.detach().to(ones.device).requires_grad_()
        inner = inv.checkpoint(lambda v: v * ones * nn.functional.dropout(ones, 0.5))
        with torch.enable_grad():
            (mask,) = torch.autograd.grad(inner(leaf).sum(), leaf)
        return nn.functional.dropout(x, 0.5) * mask.to(x.device)

    def forward(here: str, there: str) -> tuple[Tensor, Tensor]:
        x = torch.rand(64, device=here).requires_grad_()
        return x, inv.checkpoint(partial(far, ones=torch.ones(64, device=there)))(x)

    def backward(calls: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [(torch.autograd.grad(y.sum(), x)[0] * x.detach(), y.detach()) for x, y in calls]

    devices = ["sim:0", "sim:1"]
    calls = [[forward(*way) for _ in range(5)] for way in (devices, devices[::-1])]
    for pairs in in_threads([partial(backward, each) for each in calls]):
        for found, expected in pairs:
            assert_close(found, expected, TOLERANCE)


@pytest.mark.parametrize("what", ["modules", "NumPy's numbers"])
def test_a_worker_that_a_nested_gradient_needs_does_not_wait_for_ever(what: str) -> None:
    norms = nn.ModuleList([nn.BatchNorm1d(4).to("sim:0"), nn.BatchNorm1d(4).to("sim:1")])
    far = torch.rand(4, device="sim:1", requires_grad=True)
    cubes, is_nested = (far**3).sum(), threading.Event()

    def use(x: Tensor) -> Tensor:
        return norms[x.device.index](x) if what == "modules" else x * numpy.random.rand()

    def nesting(x: Tensor) -> Tensor:
        y = use(x.sin())
        is_nested.set()
        (slopes,) = torch.autograd.grad(cubes, far, retain_graph=True)
        return y * slopes.to(x.device)

    def waiting(x: Tensor) -> Tensor:
        return use(x.cos())

    class Wait(torch.autograd.Function):
        """Holds the other device's worker until the first replay has what the second one needs."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gx: Tensor) -> Tensor:
            is_nested.wait(60)
            return gx

    xs = [torch.rand(3, 4, device=f"sim:{i}", requires_grad=True) for i in range(2)]
    found = []
    for fast in False, True:
        numpy.random.seed(0)
        a, b = [(inv.checkpoint(fn) if fast else fn)(x) for fn, x in zip((nesting, waiting), xs, strict=True)]
        is_nested.clear() if fast else is_nested.set()
        found.append(torch.autograd.grad([a.sum(), Wait.apply(b).pow(3).sum()], xs))
    assert_close(found[1], found[0], TOLERANCE)


def test_two_threads_train_on_two_devices() -> None:
    plain, lowered, state = [], [], torch.sim.get_rng_state(0)  # type: ignore[attr-defined]

    def steps(fn: Any, x: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        torch.sim.set_rng_state(state, x.device.index)  # type: ignore[attr-defined]
        return [t for _ in range(10) for t in torch.autograd.grad(bowl(fn(x)), [x, *tensors])]

    for index in range(sim.DEVICES):
        branches = [branch(device=f"sim:{index}") for _ in range(4)]
        op, x = network(branches, dim=-1), torch.randn(6, 8, device=f"sim:{index}", requires_grad=True)
        plain.append(steps(op, x, parameters(*branches)))
        lowered.append(partial(steps, inv.checkpoint(op), x, parameters(*branches)))
    assert_close(in_threads(lowered), plain, TOLERANCE)


def test_the_threads_of_two_devices_may_ask_at_once() -> None:
    branches = [(branch("plain", "sim:0"), branch("plain", "sim:1")) for _ in range(4)]

    def both(a: nn.Module, b: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: a(x) + b(x.to("sim:1")).to("sim:0")

    couplings = [inv.couple(both(*pair)) for pair in branches]  # all on one half: none waits for another's gradient
    op = inv.chain(inv.split(2, -1), *couplings, inv.concat(2, -1))
    x, weights = torch.randn(6, 8, device="sim:0"), parameters(*[module for pair in branches for module in pair])
    expected = step(op, [x], weights)
    for _ in range(10):
        assert_close(step(inv.checkpoint(op), [x], weights), expected, TOLERANCE)


@pytest.mark.parametrize(("home", "away"), [("sim:0", "sim:1"), ("cpu", "sim:0"), ("sim:0", "cpu")])
def test_functions_may_be_where_the_stream_is_not(home: str, away: str) -> None:
    net = branch("plain", away)
    far = lambda x: net(x.to(away)).to(home)  # noqa: E731
    op = inv.chain(inv.split(2, -1), inv.couple(torch.sin), inv.couple(far, far), inv.concat(2, -1))
    x = torch.randn(6, 8, device=home)
    expected = step(op, [x], parameters(net))
    for _ in range(5):
        assert_close(step(inv.checkpoint(op), [x], parameters(net)), expected, TOLERANCE)


def test_the_number_of_threads_is_left_alone() -> None:
    x = torch.rand(4, device=DEVICE, requires_grad=True)
    (x * 2).sum().backward()  # its thread has begun
    torch.set_num_threads(2)
    try:
        y = inv.checkpoint(lambda x: nn.functional.dropout(x, 0.5))(x)
        torch.set_num_threads(1)
        y.sum().backward()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_errors_in_backward_come_to_the_caller_and_leave_generators_alone() -> None:
    def fn(x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("not again")
        return nn.functional.dropout(x, 0.5)

    x = torch.rand(4, device=DEVICE, requires_grad=True)
    y, states = inv.checkpoint(fn)(x), random_states()
    with contextlib.suppress(ValueError):
        y.sum().backward()
        raise AssertionError("no error")
    assert_close(random_states(), states)


def flags() -> list[Any]:
    """Of the process, those that choose a kernel."""
    cudnn = torch.backends.cudnn
    return [
        torch.backends.cuda.flash_sdp_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction_split_k,
        [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32],
    ]


@contextlib.contextmanager
def other_flags() -> Iterator[None]:
    """All of them are others inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    matmul: Any = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    cudnn = torch.backends.cudnn.flags(enabled=False, benchmark=True, deterministic=True, allow_tf32=False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), cudnn:
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(False)
        matmul.allow_bf16_reduced_precision_reduction = True


@pytest.mark.parametrize("lower", [inv.checkpoint, lambda op: inv.checkpoint(op, mode="recompute")])
def test_flags_of_the_process_are_those_of_forward(lower: Any) -> None:
    seen: list[Any] = []

    def fn(x: Tensor) -> Tensor:
        seen.append(flags())
        return x.sin().sin()

    x, before = torch.rand(4, 8, device=DEVICE, requires_grad=True), flags()
    with other_flags():
        inside = flags()
        y = lower(inv.chain(inv.split(2, -1), inv.couple(fn), inv.concat(2, -1)))(x)
    y.sum().backward()
    assert seen == [inside] * 2 and flags() == before
    assert all(a != b for a, b in zip(inside[:4] + inside[4], before[:4] + before[4], strict=True))


def test_precisions_that_convolutions_do_not_share_are_those_of_forward() -> None:
    conv, rnn = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    seen: list[Any] = []
    fn = lambda x: seen.append((conv.fp32_precision, rnn.fp32_precision)) or x.sin().sin()  # noqa: E731
    before = conv.fp32_precision, rnn.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        y = inv.checkpoint(fn)(torch.rand(4, device=DEVICE, requires_grad=True))
    finally:
        conv.fp32_precision = before[0]
    y.sum().backward()
    assert seen == [("ieee", before[1])] * 2 and before == (conv.fp32_precision, rnn.fp32_precision)


@pytest.mark.parametrize("lower", LOWERINGS.values(), ids=LOWERINGS)
def test_a_graph_is_captured_of_what_draws_nothing(lower: Any) -> None:
    branches = [branch("batch norm") for _ in range(4)]
    op, x = network(branches, dim=-1), torch.randn(6, 8, device=DEVICE)
    expected = step(op, [x], parameters(*branches))
    step(lower(op), [x], parameters(*branches))  # leaves numbers on their way
    with sim.capture():
        leaf = x.clone().requires_grad_()
        found = torch.autograd.grad(bowl(lower(op)(leaf)), [leaf, *parameters(*branches)])
    assert_close([*found], expected[1 : len(found) + 1], TOLERANCE)


@pytest.mark.parametrize("how", sorted(LOWERINGS.keys() - {"store"}))
def test_a_graph_is_not_captured_of_what_draws(how: str) -> None:
    op, x = network([branch() for _ in range(4)], dim=-1), torch.randn(6, 8, device=DEVICE, requires_grad=True)
    with (
        sim.capture(),
        pytest.raises(ReplayError, match="native_dropout.* draws random numbers while a graph is captur"),
    ):
        LOWERINGS[how](op)(x)


def test_what_has_drawn_outside_of_a_capture_is_not_run_again_inside() -> None:
    x = torch.rand(4, 8, device=DEVICE, requires_grad=True)
    y = inv.checkpoint(lambda x: nn.functional.dropout(x.sin(), 0.5))(x)
    with sim.capture(), pytest.raises(ReplayError, match="drew random numbers runs again while a graph is captured"):
        y.sum().backward()


def test_a_graph_is_captured_of_what_draws_and_is_stored() -> None:
    op, x = network([branch() for _ in range(4)], dim=-1), torch.randn(6, 8, device=DEVICE, requires_grad=True)
    with sim.capture():
        inv.checkpoint(op, mode="store")(x).sum().backward()
        attend = nn.functional.scaled_dot_product_attention
        inv.checkpoint(lambda q: attend(q, q, q))(x.reshape(2, 3, 8)).sum().backward()


def test_torch_func_differentiates_on_a_device() -> None:
    branches = [branch("plain") for _ in range(2)]
    op, x = network(branches, dim=-1), torch.randn(8, device=DEVICE)
    fast = inv.checkpoint(op)
    for transform in (torch.func.grad, torch.func.hessian):
        assert_close(transform(lambda x: bowl(fast(x)))(x), transform(lambda x: bowl(op(x)))(x), TOLERANCE)
    assert_close(torch.func.vmap(fast)(x.expand(3, 8)), torch.func.vmap(op)(x.expand(3, 8)), TOLERANCE)
