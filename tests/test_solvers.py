"""Reversible solvers: each is its published formula, has its order, and its gradient is that of plain autograd."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from catalogue import mlp
from kit import Counted, assert_close, assert_refused
from torch import Tensor, nn

import invfunc as inv
from invfunc import ops
from invfunc.errors import OptionError, WireError
from invfunc.look.memory import measure

Solver = Callable[[Callable[..., Tensor], Tensor], inv.Invertible]


def alf(damping: float = 1.0) -> Solver:
    def solve(f: Callable[..., Tensor], times: Tensor) -> inv.Invertible:
        enter = ops.enter_streams(partial(f, times[0]))
        return inv.chain(enter, ops.asynchronous_leapfrog(f, times, damping=damping), ops.leave_streams())

    return solve


def between_streams(make: Callable[..., inv.Invertible], **options: object) -> Solver:
    def solve(f: Callable[..., Tensor], times: Tensor) -> inv.Invertible:
        return inv.chain(ops.enter_streams(), make(f, times, **options), ops.leave_streams())

    return solve


def coupled(method: object, coupling: float = 0.999) -> Solver:
    return between_streams(ops.reversible_solver, method=method, coupling=coupling)


SOLVERS: dict[str, tuple[Solver, int]] = {  # with its order
    "reversible heun": (between_streams(ops.reversible_heun), 2),
    "alf": (alf(), 2),
    "alf, damped": (alf(0.9), 1),
    "alf, from a velocity of x": (between_streams(ops.asynchronous_leapfrog), 2),
    "euler": (coupled("euler"), 1),
    "midpoint": (coupled("midpoint"), 2),
    "heun": (coupled("heun"), 2),
    "ralston3": (coupled("ralston3"), 3),
    "rk4": (coupled("rk4"), 4),
    "rk4, coupling 1": (coupled("rk4", 1.0), 4),
    "method of one's own": (coupled(lambda f, t, x, h: h * f(t + h / 2, x + h / 2 * f(t, x))), 2),
}
every_solver = pytest.mark.parametrize("name", SOLVERS)


class FieldNet(nn.Module):
    """A field that depends on the time and has parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(5, 4)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1))


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_reversible_heun_is_its_formula() -> None:
    f, companion, x = FieldNet(), torch.randn(3, 4), torch.randn(3, 4)
    times = [0.0, 0.1, 0.4, 0.5]
    found = ops.reversible_heun(f, times)(companion, x)
    for t, u in zip(times, times[1:], strict=False):
        h, slope = u - t, f(torch.tensor(t), companion)
        companion = 2 * x - companion + h * slope
        x = x + h / 2 * (slope + f(torch.tensor(u), companion))
    assert_close(found, (companion, x))


@pytest.mark.parametrize("damping", [1.0, 0.8])
def test_asynchronous_leapfrog_is_its_formula(damping: float) -> None:
    f, v, x = FieldNet(), torch.randn(3, 4), torch.randn(3, 4)
    times = [0.0, 0.1, 0.4, 0.5]
    found = ops.asynchronous_leapfrog(f, times, damping=damping)(v, x)
    for t, u in zip(times, times[1:], strict=False):
        h, k = u - t, x + (u - t) / 2 * v
        v = v + 2 * damping * (f(torch.tensor((t + u) / 2), k) - v)
        x = k + h / 2 * v
    assert_close(found, (v, x))


def rk4(f: Callable[..., Tensor], t: float, x: Tensor, h: float) -> Tensor:
    """As textbooks write it."""

    def at(time: float, x: Tensor) -> Tensor:
        return f(torch.tensor(time), x)

    a = at(t, x)
    b = at(t + h / 2, x + h / 2 * a)
    c = at(t + h / 2, x + h / 2 * b)
    d = at(t + h, x + h * c)
    return h / 6 * (a + 2 * b + 2 * c + d)


def test_a_coupled_method_is_its_formula() -> None:
    f, z, x = FieldNet(), torch.randn(3, 4), torch.randn(3, 4)
    times = [0.0, 0.1, 0.4, 0.5]
    found = ops.reversible_solver(f, times, coupling=0.9)(z, x)
    for t, u in zip(times, times[1:], strict=False):
        x = 0.9 * x + 0.1 * z + rk4(f, t, z, u - t)
        z = z - rk4(f, u, x, t - u)
    assert_close(found, (z, x))


class Clock(nn.Module):
    """A field that looks at the time and remembers nothing."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return (x * t).sin() + t * t


@every_solver
def test_times_that_require_grad_get_theirs(name: str) -> None:
    solve, _ = SOLVERS[name]
    times, x = torch.tensor([0.0, 0.3, 0.4, 0.9], requires_grad=True), torch.randn(2, 3, requires_grad=True)
    plain = lambda times, x: solve(Clock(), times)(x).square().sum()  # noqa: E731
    assert torch.autograd.gradcheck(plain, (times, x))
    lowered = lambda times, x: inv.checkpoint(solve(Clock(), times))(x).square().sum()  # noqa: E731
    expected = torch.autograd.grad(plain(times, x), (times, x))
    assert_close(torch.autograd.grad(lowered(times, x), (times, x)), expected, 1e-9)
    assert_close(torch.func.grad(lowered, (0, 1))(times.detach(), x.detach()), expected, 1e-9)


def test_times_of_several_tensors_that_require_grad_get_theirs() -> None:
    end, x = torch.tensor(0.7, requires_grad=True), torch.randn(2, 3)
    f = between_streams(ops.reversible_heun)
    assert torch.autograd.gradcheck(lambda end: f(Clock(), [0.0, 0.2, end])(x), end)


def test_noise_at_times_that_require_grad_is_refused() -> None:
    times = torch.linspace(0, 1, 3, requires_grad=True)
    message = "reversible_heun: times that require grad, with noise, expected times.detach()"
    make = partial(ops.reversible_heun, Clock(), times, diffusion=Clock(), noise=lambda a, b: torch.zeros(()))
    assert_refused(OptionError, message, make)


# ---- precision -------------------------------------------------------------------------------------------------------

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@HALVES
@pytest.mark.parametrize("make", [ops.reversible_heun, ops.asynchronous_leapfrog, ops.reversible_solver])
def test_a_stream_in_half_precision_is_told_the_times_in_float32(
    make: Callable[..., inv.Invertible], dtype: torch.dtype
) -> None:
    seen: list[Tensor] = []

    def record(t: Tensor, x: Tensor) -> Tensor:
        seen.append(t)
        return x * t

    x, grid = torch.ones(2, dtype=dtype), torch.linspace(1, 1.1, 401, dtype=torch.float32)
    make(record, grid)(x.double(), x.double())
    expected, seen[:] = list(seen), []
    y = make(record, grid)(x, x)
    assert y[0].dtype == y[1].dtype == dtype
    assert_close(torch.stack(seen), torch.stack(expected).float(), 0)


@HALVES
@pytest.mark.parametrize("of_times", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [ops.reversible_heun, ops.asynchronous_leapfrog, ops.reversible_solver])
def test_times_that_require_grad_are_not_rounded_to_a_stream_in_half_precision(
    make: Callable[..., inv.Invertible], dtype: torch.dtype, of_times: torch.dtype
) -> None:
    given = torch.tensor([1.0, 1.25, 1.75], dtype=of_times, requires_grad=True)
    wide = given.detach().double().requires_grad_()
    seen: list[float] = []

    def record(t: Tensor, x: Tensor) -> Tensor:
        seen.append(t.item())
        return x * t

    found = make(record, (given * given if of_times == torch.float32 else given))
    x = torch.full((2,), 0.5, dtype=dtype)
    y = found(x, x)[1]
    here, seen[:] = list(seen), []
    oracle = make(record, (wide * wide if of_times == torch.float32 else wide))
    z = oracle(x.double(), x.double())[1]
    assert here == seen
    gradients = [torch.autograd.grad(out.sum(), times)[0].double() for out, times in ((y, given), (z, wide))]
    assert_close(*gradients, 8 * torch.finfo(dtype).eps)


@HALVES
def test_a_coupling_that_half_precision_would_round_to_1_is_as_it_was_given(dtype: torch.dtype) -> None:
    op = inv.invert(ops.reversible_solver(lambda t, x: 0 * x, torch.linspace(0, 1, 101)))
    x = torch.ones(2, 3, dtype=dtype)
    _, total = inv.log_det(op, (x, x))
    assert_close(total.double(), torch.full((2,), -300 * math.log(0.999)), 1e-4)


# ---- order -----------------------------------------------------------------------------------------------------------


def riccati(t: Tensor, x: Tensor) -> Tensor:
    """Its solution from 1 at 0 is 1 / (1 + t^2)."""
    return -2 * t * x * x


@every_solver
def test_the_error_shrinks_with_the_order(name: str) -> None:
    make, order = SOLVERS[name]
    errors = []
    for steps in (80, 160):
        x = make(riccati, torch.linspace(0, 1, steps + 1))(torch.ones(1))
        errors.append((x - 0.5).abs().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("coupling", [0.9, 0.94, 0.96, 1.0])
def test_a_coupling_below_the_decay_of_a_step_is_stable(coupling: float) -> None:
    def decay(t: Tensor, x: Tensor) -> Tensor:
        return -x

    x = coupled("rk4", coupling)(decay, torch.linspace(0, 60, 1201))(torch.ones(1))
    assert (x.abs() < 1e-9).item() == (coupling < math.exp(-0.05))


@pytest.mark.parametrize("damping", [0.95, 0.97, 0.98, 1.0])
def test_a_damping_below_the_decay_of_a_step_is_stable(damping: float) -> None:
    def decay(t: Tensor, x: Tensor) -> Tensor:
        return -x

    x = alf(damping)(decay, torch.linspace(0, 60, 1201))(torch.ones(1))
    assert (x.abs() < 1e-9).item() == (2 * damping - 1 < math.exp(-0.05))


# ---- gradients -------------------------------------------------------------------------------------------------------


@every_solver
def test_gradients_are_those_of_plain_autograd(name: str) -> None:
    f, x = FieldNet(), torch.randn(3, 4, requires_grad=True)
    op = SOLVERS[name][0](f, torch.linspace(0, 1, 21))
    wrt = [x, *f.parameters()]
    expected = torch.autograd.grad(op(x).sin().sum(), wrt)
    assert_close(torch.autograd.grad(inv.checkpoint(op)(x).sin().sum(), wrt), expected, 1e-11)


@every_solver
def test_the_gradient_under_torch_func_is_the_same(name: str) -> None:
    f, x = FieldNet(), torch.randn(3, 4)
    op = SOLVERS[name][0](f, torch.linspace(0, 1, 6))
    found = torch.func.grad(lambda x: inv.checkpoint(op)(x).sin().sum())(x)
    assert_close(found, torch.func.grad(lambda x: op(x).sin().sum())(x), 1e-11)


@pytest.mark.compile
# Dynamo instantiates a Function to trace it, and warns of that itself
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
@pytest.mark.parametrize("name", ["reversible heun", "alf", "heun"])
def test_the_gradient_in_a_compiled_graph_is_the_same(name: str) -> None:
    f, x = FieldNet(), torch.randn(3, 4, requires_grad=True)
    op = inv.checkpoint(SOLVERS[name][0](f, torch.linspace(0, 1, 4)))
    compiled = torch.compile(lambda x: op(x).sin().sum(), backend="aot_eager", fullgraph=True)
    wrt = [x, *f.parameters()]
    assert_close(torch.autograd.grad(compiled(x), wrt), torch.autograd.grad(op(x).sin().sum(), wrt), 1e-11)


EVALUATIONS = {"reversible heun": 11, "alf": 10, "euler": 20, "midpoint": 40, "rk4": 80}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_field_is_evaluated_twice_as_often_in_a_step(name: str) -> None:
    f, x = Counted(FieldNet()), torch.randn(3, 4, requires_grad=True)
    op = SOLVERS[name][0](f, torch.linspace(0, 1, 11))
    op(x)
    start = 1 if name == "alf" else 0
    assert f.count == EVALUATIONS[name] + start
    f.count = 0
    inv.checkpoint(op)(x).sum().backward()
    assert f.count == 2 * EVALUATIONS[name] + 2 * start


@pytest.mark.parametrize("name", ["reversible heun", "alf", "rk4"])
def test_memory_does_not_grow_with_the_steps(name: str) -> None:
    f, x = FieldNet(), torch.randn(64, 4, requires_grad=True)

    def step(op: Callable[[Tensor], Tensor]) -> None:
        op(x).sum().backward()

    peaks = []
    for steps in (5, 40):
        op = inv.checkpoint(SOLVERS[name][0](f, torch.linspace(0, 1, steps + 1)))
        step(op)  # gradients are there from now on
        peaks.append(measure(step, op).peak_bytes)
    assert peaks[1] <= 1.05 * peaks[0]


def test_a_solution_backwards_in_time_is_the_way_back() -> None:
    times, x = torch.linspace(0, 1, 21), torch.rand(5)
    op = between_streams(ops.reversible_solver)
    y = op(riccati, times)(x)
    assert_close(op(riccati, times.flip(0))(y), x, 1e-6)


# ---- noise -----------------------------------------------------------------------------------------------------------


class Path:
    """A Brownian path on a grid of 2^12 steps from 0 to 1."""

    def __init__(self, *shape: int) -> None:
        self.count = 0
        self.values = torch.cat([torch.zeros(1, *shape), torch.randn(2**12, *shape).cumsum(0) / 2**6])

    def __call__(self, start: float, end: float) -> Tensor:
        self.count += 1
        return self.values[round(end * 2**12)] - self.values[round(start * 2**12)]


def geometric(steps: int, path: Path) -> inv.Invertible:
    """dx = 0.3 x dt + 0.5 x o dW."""
    times = torch.linspace(0, 1, steps + 1)
    solver = ops.reversible_heun(lambda t, x: 0.3 * x, times, diffusion=lambda t, x: 0.5 * x, noise=path)
    return inv.chain(ops.enter_streams(), solver, ops.leave_streams())


def test_with_noise_it_converges_to_the_solution_of_stratonovich() -> None:
    path, x = Path(200), torch.ones(200)
    expected = torch.exp(0.3 + 0.5 * path.values[-1])
    errors = [(geometric(steps, path)(x) - expected).square().mean().sqrt() for steps in (32, 64, 128)]
    assert errors[2] < 0.01
    assert errors[1] / errors[2] > 1.4  # strong order 1/2, or better


def test_noise_is_looked_at_again_and_the_gradient_is_that_of_plain_autograd() -> None:
    path, x = Path(3), torch.rand(3).requires_grad_()
    op = geometric(16, path)
    (expected,) = torch.autograd.grad(op(x).sin().sum(), x)
    path.count = 0
    (found,) = torch.autograd.grad(inv.checkpoint(op)(x).sin().sum(), x)
    assert_close(found, expected, 1e-11)
    assert path.count == 2 * 2 * 16


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "one time": (lambda: ops.reversible_heun(riccati, [0.0]), "reversible_heun: times are [0.0], expected two finite"),
    "equal times": (lambda: ops.reversible_solver(riccati, [0, 1, 1]), "reversible_solver: times are [0.0, 1.0, 1.0]"),
    "a method": (
        lambda: ops.reversible_solver(riccati, [0, 1], method="rk5"),
        "reversible_solver: method is 'rk5', expected one of 'euler', 'midpoint', 'heun', 'ralston3', 'rk4', or a",
    ),
    "a method that is nothing": (
        lambda: ops.reversible_solver(riccati, [0, 1], method=None),  # pyright: ignore[reportArgumentType]
        "reversible_solver: method is None, expected one of 'euler', ",
    ),
    "a number for times": (
        lambda: ops.reversible_heun(riccati, 3),  # pyright: ignore[reportArgumentType]
        "reversible_heun: times are 3, expected numbers, in a list or a tensor (T,)",
    ),
    "a time that is NaN": (
        lambda: ops.asynchronous_leapfrog(riccati, [0, math.nan]),
        "asynchronous_leapfrog: times are [0.0, nan], expected two finite times or more, no two neighbours equal",
    ),
    "no field": (
        lambda: ops.reversible_heun(None, [0, 1]),  # pyright: ignore[reportArgumentType]
        "reversible_heun: the field is NoneType, expected a function or a module, f(t, x)",
    ),
    "a coupling": (
        lambda: ops.reversible_solver(riccati, [0, 1], coupling=0.0),
        "reversible_solver: coupling is 0.0, expected a number above 0, and at most 1",
    ),
    "no coupling": (
        lambda: ops.reversible_solver(riccati, [0, 1], coupling=None),  # pyright: ignore[reportArgumentType]
        "reversible_solver: coupling is None, expected a number above 0, and at most 1",
    ),
    "a damping of several numbers": (
        lambda: ops.asynchronous_leapfrog(riccati, [0, 1], damping=torch.ones(2)),  # pyright: ignore[reportArgumentType]
        "asynchronous_leapfrog: damping is tensor([1., 1.]",
    ),
    "a coupling of several numbers": (
        lambda: ops.reversible_solver(riccati, [0, 1], coupling=torch.ones(2)),  # pyright: ignore[reportArgumentType]
        "reversible_solver: coupling is tensor([1., 1.]",
    ),
    "a diffusion that is no function": (
        lambda: ops.reversible_heun(riccati, [0, 1], diffusion=1, noise=torch.zeros),  # pyright: ignore
        "reversible_heun: the diffusion is int, expected a function or a module",
    ),
    "a noise that is no function": (
        lambda: ops.reversible_heun(riccati, [0, 1], diffusion=riccati, noise=2),  # pyright: ignore
        "reversible_heun: the noise is int, expected a function or a module",
    ),
    "no damping": (
        lambda: ops.asynchronous_leapfrog(riccati, [0, 1], damping=None),  # pyright: ignore[reportArgumentType]
        "asynchronous_leapfrog: damping is None, expected a number above 0.5, and at most 1",
    ),
    "a damping": (
        lambda: ops.asynchronous_leapfrog(riccati, [0, 1], damping=0.5),
        "asynchronous_leapfrog: damping is 0.5, expected a number above 0.5, and at most 1",
    ),
    "noise alone": (
        lambda: ops.reversible_heun(riccati, [0, 1], noise=Path(1)),
        "reversible_heun: one of diffusion and noise is None, expected both, or neither",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_fit_raise(name: str) -> None:
    call, message = REFUSED[name]
    assert_refused(OptionError, message, call)


@pytest.mark.parametrize("make", [ops.reversible_heun, ops.asynchronous_leapfrog, ops.reversible_solver])
@pytest.mark.parametrize(("stream", "got"), [(None, "None"), (torch.ones(3, 4).long(), "torch.int64; x.float()")])
@pytest.mark.parametrize("lower", [lambda op: op, inv.checkpoint])
def test_a_stream_without_numbers_is_named(make: Solver, stream: object, got: str, lower: Solver) -> None:
    message = f"a stream of a solver, expected a floating-point tensor, got {got}"
    op = lower(make(riccati, [0, 1]))
    assert_refused(WireError, message, lambda: op(stream, torch.ones(3, 4)), anywhere=True)


def test_a_field_or_a_method_that_returns_something_else_is_named() -> None:
    x = torch.ones(3, 4), torch.ones(3, 4)
    for returned, message in (None, "returned None"), (1j * x[0], "returned (3, 4) of torch.complex128"):
        field, method = ops.reversible_heun(lambda t, x: returned, [0, 1]), lambda f, t, x, h: returned
        assert_refused(WireError, f"<lambda> {message}, expected (3, 4)", lambda: field(x), anywhere=True)
        solver = ops.reversible_solver(riccati, [0, 1], method=method)
        assert_refused(WireError, f"<lambda> {message}, expected (3, 4)", lambda: solver(x), anywhere=True)


def test_noise_that_is_no_tensor_is_named() -> None:
    def nothing(start: float, end: float) -> None:
        return None

    op = ops.reversible_heun(riccati, [0, 1], diffusion=riccati, noise=nothing)  # pyright: ignore[reportArgumentType]
    x = torch.ones(2)
    assert_refused(WireError, "the noise nothing returned None, expected floating", lambda: op(x, x), anywhere=True)


def test_a_field_of_another_shape_is_named() -> None:
    def sum_of(t: Tensor, x: Tensor) -> Tensor:
        return x.sum(1)

    op = ops.reversible_solver(sum_of, [0, 1])
    message = "sum_of returned (3,), expected (3, 4) like its input"
    assert_refused(WireError, message, lambda: op(torch.ones(3, 4), torch.ones(3, 4)), anywhere=True)


@pytest.mark.parametrize(
    ("drawn", "got"), [(torch.ones(7), "(7,)"), (torch.ones(2, 3, 4), "(2, 3, 4)"), (torch.ones(4).long(), "(4,)")]
)
def test_a_noise_of_another_shape_than_the_state_is_named(drawn: Tensor, got: str) -> None:
    def noise(start: float, end: float) -> Tensor:
        return drawn

    op, x = ops.reversible_heun(riccati, [0.0, 1.0], diffusion=riccati, noise=noise), torch.ones(3, 4)
    expected = "expected floating-point numbers of shape (3, 4) like the state, or what broadcasts to it"
    assert_refused(WireError, f"the noise noise returned {got}, {expected}", lambda: op(x, x), anywhere=True)
