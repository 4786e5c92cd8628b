"""Ops whose inverse iterates: that it converges or says so, and that gradients of every order are the implicit ones."""

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import Before, contraction
from kit import Counted, assert_close
from torch import Tensor, func, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import invfunc as inv
from invfunc import ops
from invfunc.errors import DomainError, OptionError, WireError
from invfunc.look.memory import measure


class Times(nn.Module):
    """Multiplication by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def rotation(size: int, lipschitz: float, dtype: torch.dtype = torch.float64) -> Callable[[Tensor], Tensor]:
    """The contraction that converges most slowly: a linear map that shrinks every vector alike."""
    q = lipschitz * torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0].to(dtype)
    return lambda x: x @ q


# ---- convergence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "lipschitz", "evaluations", "error"),
    [
        (torch.float32, 0.5, 25, 1e-5),
        (torch.float32, 0.9, 150, 1e-4),
        (torch.float64, 0.5, 55, 1e-13),
        (torch.float64, 0.9, 350, 1e-12),
        (torch.bfloat16, 0.5, 12, 0.2),
    ],
)
def test_the_inverse_costs_what_its_docstring_says(
    dtype: torch.dtype, lipschitz: float, evaluations: int, error: float
) -> None:
    f = rotation(64, lipschitz, dtype)
    count = [0]

    def counted(x: Tensor) -> Tensor:
        count[0] += 1
        return f(x)

    op, x = ops.residual_flow(counted), torch.randn(8, 64, dtype=dtype)
    y = op(x)
    assert count == [1]
    assert (op.inverse(y) - x).abs().max() < error
    assert count[0] < evaluations


def test_autocast_converges_to_its_own_rounding() -> None:
    op, x = inv.chain(*(ops.residual_flow(contraction(4)),) * 3), torch.randn(8, 4, requires_grad=True)
    inputs = [x, *op.parts[0].functions[0].fn.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(op.inverse(op(x)), x, 0.05, relative=0)
        plain, lowered = (torch.autograd.grad(run(x).sin().sum(), inputs) for run in (op, inv.checkpoint(op)))
    for a, b in zip(plain, lowered, strict=True):
        assert (a - b).norm() < 0.02 * a.norm()


def test_an_empty_batch() -> None:
    for op in (ops.residual_flow(contraction(4)), flow(Before(4))):
        x = torch.randn(0, 4, requires_grad=True)
        y, total = inv.log_det(op, x)
        assert op.inverse(y).shape == (0, 4) and total.shape == (0,)
        inv.checkpoint(inv.invert(op))(y).sum().backward()


def test_a_tolerance_bounds_the_error() -> None:
    op, x = ops.residual_flow(rotation(16, 0.8), tolerance=1e-5), torch.randn(8, 16)
    off = (op.inverse(op(x)) - x).abs().max().item()
    assert 1e-8 < off < 0.8 / 0.2 * 1e-5 * op(x).abs().max().item()


@pytest.mark.parametrize(
    ("f", "count", "got"),
    [
        (Times(3.0), r"1\d", r"a step of 1\.3\d*, 3 of the one before it"),
        (lambda x: 3 * torch.cos(5 * x), "500", r"a step of \S+, \S+ of the one before it"),
        (Times(math.nan), "1", "a step of nan, nan of the one before it"),
    ],
)
def test_an_inverse_that_does_not_converge_raises(f: Callable[[Tensor], Tensor], count: str, got: str) -> None:
    op = inv.chain(ops.residual_flow(f), inv.pair(torch.exp, torch.log))
    message = (
        rf"^chain stage 0 \(residual_flow\): residual_flow\(\S+\): its inverse did not converge in {count} iterations, "
        rf"expected f with a Lipschitz constant below 1, and steps down to 1\.8e-15 of x, got {got}; bound every layer"
    )
    y = torch.randn(4, 3).exp()
    with pytest.raises(DomainError, match=message):
        op.inverse(y)


@pytest.mark.filterwarnings("ignore::invfunc.errors.DriftWarning")  # what was finite in the row is rebuilt as NaN
@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others_alone(hole: float) -> None:
    op, y, others = ops.residual_flow(rotation(3, 0.9)), torch.randn(4, 3), [0, 2, 3]
    expected, full = op.inverse(y), op.inverse(torch.full((2, 3), hole))
    y[1, 0] = hole
    found = op.inverse(y)
    assert_close(found[others], expected[others], 1e-12)
    assert found[1].isnan().all() and full.isnan().all()
    for way in op, inv.checkpoint(op), ~op, inv.checkpoint(~op):
        x, alone = y.clone().requires_grad_(), y[others].requires_grad_()
        (gradient,) = torch.autograd.grad(way(x)[others].square().sum(), x)
        assert_close(gradient[others], torch.autograd.grad(way(alone).square().sum(), alone)[0], 1e-11)
    tangents = [torch.func.jvp(op.inverse, (at,), (torch.ones_like(at),))[1] for at in (y, y[others])]
    assert_close(tangents[0][others], tangents[1], 1e-11)
    values = torch.func.vmap(op.inverse)(y[:, None])[:, 0]
    assert_close(values[others], expected[others], 1e-12)


def test_a_lowered_step_that_can_not_rebuild_its_input_raises() -> None:
    op = inv.chain(inv.chain(), ops.residual_flow(lambda x: 3 * torch.cos(5 * x)))
    y = inv.checkpoint(op)(torch.randn(4, 3, requires_grad=True).sin())
    with pytest.raises(DomainError, match="its inverse did not converge"):
        y.sum().backward()


def test_debug_finds_what_is_no_contraction() -> None:
    x = torch.randn(4, 3)
    grows = ops.residual_flow(nn.Sequential(nn.Linear(3, 3), Times(10)))
    with inv.debug(True):
        with pytest.raises(
            DomainError, match=r"residual_flow\(Sequential\): f is not a contraction, .* got at least \d"
        ):
            grows(x)
        ops.residual_flow(contraction(3))(x)
        ops.residual_flow(rotation(3, 0.99))(x)
        ops.residual_flow(torch.zeros_like)(x)
    grows(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ops.residual_flow(1), OptionError, "residual_flow: got int, expected a function or a module"),
        (lambda: ops.residual_flow(torch.sin, max_iterations=0), OptionError, "max_iterations is 0, expected a"),
        (
            lambda: ops.residual_flow(torch.sin, tolerance=-1.0),
            OptionError,
            "residual_flow: tolerance is -1.0, expected a positive number",
        ),
        (
            lambda: ops.residual_flow(nn.Linear(3, 2))(torch.zeros(1, 3)),
            WireError,
            r"residual_flow\(Linear\): f returned \(1, 2\), expected \(1, 3\) like its input",
        ),
        (lambda: ops.power_series_log_det(0), OptionError, "power_series_log_det: terms is 0, expected at least one"),
        (lambda: ops.roulette_log_det(keep=1.0), OptionError, "roulette_log_det: keep is 1.0, expected a probability"),
    ],
)
def test_errors_of_residual_flows(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---- gradients through a fixed point ---------------------------------------------------------------------------------


class Plain(nn.Module):
    """A contraction with f(0) = 0, where the iteration for the value ends at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(self.shrunk(5, 3)), nn.Parameter(self.shrunk(3, 5))

    def shrunk(self, *shape: int) -> Tensor:
        weight = torch.randn(shape)
        return 0.8 * weight / torch.linalg.matrix_norm(weight, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a.T) @ self.b.T


def unrolled(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The inverse of ``x + f(x)`` by so many taped steps that every derivative has converged."""

    def solve(y: Tensor) -> Tensor:
        x = y
        for _ in range(90):
            x = y - f(x)
        return x

    return solve


INVERSES: dict[str, Callable[[inv.Invertible], Callable[[Tensor], Tensor]]] = {
    "plain": lambda op: op.inverse,
    "inverted": inv.invert,
    "lowered": lambda op: inv.checkpoint(inv.invert(op)),
    "inverse of the lowered": lambda op: inv.invert(inv.checkpoint(op)),
}


@pytest.mark.parametrize("kind", INVERSES)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_gradients_of_the_inverse_are_implicit(kind: str, scale: float) -> None:
    f = Plain()
    y, c = (scale * torch.randn(4, 3)).requires_grad_(), torch.randn(4, 3)
    inputs = [y, *f.parameters()]
    found = torch.autograd.grad((INVERSES[kind](ops.residual_flow(f))(y) * c).sum(), inputs)
    assert_close(found, torch.autograd.grad((unrolled(f)(y) * c).sum(), inputs), 1e-11, relative=0)


LOSSES = {"sine": lambda fn: lambda y: fn(y).sin().sum(), "square": lambda fn: lambda y: (fn(y) ** 2).sum()}
TRANSFORMS: dict[str, Callable[[Any, Any, Tensor], Any]] = {
    "jacrev": lambda fn, loss, y: func.jacrev(fn)(y),
    "jacfwd": lambda fn, loss, y: func.jacfwd(fn)(y),
    "jvp": lambda fn, loss, y: func.jvp(fn, (y,), (y.cos(),)),
    "vmap": lambda fn, loss, y: func.vmap(fn)(torch.stack([y, y + 1, -3 * y])),
    "vmap of grad": lambda fn, loss, y: func.vmap(func.grad(loss(fn)))(torch.stack([y, y + 1, -3 * y])),
    "hessian": lambda fn, loss, y: func.hessian(loss(fn))(y),
    "jacrev of jacrev": lambda fn, loss, y: func.jacrev(func.jacrev(loss(fn)))(y),
    "jvp of grad": lambda fn, loss, y: func.jvp(func.grad(loss(fn)), (y,), (y.cos(),)),
    "third": lambda fn, loss, y: func.grad(lambda y: func.hessian(loss(fn))(y).sin().sum())(y),
    "third, reverse": lambda fn, loss, y: func.grad(lambda y: func.jacrev(func.jacrev(loss(fn)))(y).sin().sum())(y),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_transforms_of_the_inverse(name: str, loss: str, scale: float) -> None:
    f, y = Plain(), scale * torch.randn(2, 3)
    expected = TRANSFORMS[name](unrolled(f), LOSSES[loss], y)
    for kind in ("plain", "lowered"):
        assert_close(
            TRANSFORMS[name](INVERSES[kind](ops.residual_flow(f)), LOSSES[loss], y), expected, 1e-10, relative=0
        )


@pytest.mark.parametrize("kind", INVERSES)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_double_backward_by_parameters_and_closures(kind: str, scale: float) -> None:
    f, w = Plain(), torch.rand(3, requires_grad=True)
    y = (scale * torch.randn(2, 3)).requires_grad_()

    def closure(x: Tensor) -> Tensor:
        return f(x) * w

    def twice(fn: Callable[[Tensor], Tensor]) -> Any:
        inputs = [y, w, *f.parameters()]
        first = torch.autograd.grad((fn(y) ** 2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((g.cos() * g).sum() for g in first), inputs)

    assert_close(twice(INVERSES[kind](ops.residual_flow(closure))), twice(unrolled(closure)), 1e-10, relative=0)


def test_no_iteration_is_taped() -> None:
    f = rotation(64, 0.9)

    def taken(tolerance: float) -> Any:
        op, y = ops.residual_flow(f, tolerance=tolerance), torch.randn(50, 64, requires_grad=True)
        return measure(lambda: op.inverse(y))

    taken(0.1)
    assert taken(1e-13).held_bytes == taken(0.1).held_bytes
    assert taken(1e-13).peak_bytes == taken(0.1).peak_bytes


@pytest.mark.parametrize("backwards", [False, True])
def test_memory_does_not_grow_with_depth(backwards: bool) -> None:
    f, ordered = contraction(16), ops.autoregressive(inv.ops.tanh_scale(Before(16)), dim=-1)

    def taken(make: Callable[[], inv.Invertible], depth: int) -> list[float]:
        op = inv.chain(*(make() for _ in range(depth)))
        fast, x = inv.checkpoint(inv.invert(op) if backwards else op), torch.randn(200, 16, requires_grad=True)
        forward = measure(lambda: fast(x)).held_bytes
        return [t / x.nbytes for t in (forward, measure(lambda: torch.autograd.grad(fast(x).sum(), x)).peak_bytes)]

    for make in (lambda: ops.residual_flow(f), lambda: ordered):
        taken(make, 1)
        shallow, deep = taken(make, 2), taken(make, 5)
        assert deep[0] <= shallow[0] + 0.1 <= 1.2
        assert deep[1] <= shallow[1] * 1.02


def test_functional_call() -> None:
    f, y = Plain(), torch.randn(2, 3)
    net = ops.residual_flow(f)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = f

        def forward(self, y: Tensor) -> Tensor:
            return inv.checkpoint(inv.invert(net))(y)

    model = Model()
    parameters = {k: v.detach() * 0.9 for k, v in model.named_parameters()}
    found = func.grad(lambda p: func.functional_call(model, p, y).sin().sum())(parameters)
    other = Plain()
    other.load_state_dict({k.removeprefix("f."): v for k, v in parameters.items()})
    expected = torch.autograd.grad(unrolled(other)(y).sin().sum(), list(other.parameters()))
    assert_close(tuple(found.values()), expected, 1e-11, relative=0)


# ---- spectral normalisation ------------------------------------------------------------------------------------------


def normalised() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(3, 6)), nn.ELU(), Times(0.7), spectral_norm(nn.Linear(6, 3)))


@pytest.mark.parametrize("backwards", [False, True])
def test_spectral_normalisation_in_training(backwards: bool) -> None:
    """Its weights move in every evaluation; yet a lowered step is a plain one, and moves them once."""
    plain = normalised()
    lowered = copy.deepcopy(plain)
    x = torch.randn(5, 3, requires_grad=True)

    def trained(net: nn.Module, lower: bool) -> Any:
        op = inv.invert(ops.residual_flow(net)) if backwards else ops.residual_flow(net)
        y = (inv.checkpoint(op) if lower else op)(x)
        return torch.autograd.grad(y.sin().sum(), [x, *net.parameters()]), dict(net.named_buffers())

    found, expected = trained(lowered, True), trained(plain, False)
    assert_close(found[0], expected[0], 1e-11, relative=0)
    assert_close(found[1], expected[1], 0, relative=0)


def test_a_callers_cached_weights_are_left_alone() -> None:
    net = normalised().eval()
    op, x = ops.residual_flow(net), torch.randn(5, 3, requires_grad=True)
    with parametrize.cached():
        before = net[0].weight
        y = inv.checkpoint(op)(x)
        y.sum().backward()
        assert net[0].weight is before and before.requires_grad
    assert net[0].parametrizations.weight.original.grad is not None


# ---- log-determinants of residual flows ------------------------------------------------------------------------------


def test_the_exact_log_determinant() -> None:
    f, x = Plain(), torch.randn(4, 3)
    jacobian = torch.stack([func.jacrev(f)(row) for row in x])
    expected = torch.linalg.slogdet(torch.eye(3) + jacobian)[1]
    assert_close(inv.log_det(ops.residual_flow(f), x)[1], expected, 1e-11, relative=0)
    _, back = inv.log_det(inv.invert(ops.residual_flow(f)), x + f(x))
    assert_close(back, -expected, 1e-11, relative=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_log_determinant_in_half_precision(dtype: torch.dtype) -> None:
    op, x = ops.residual_flow(lambda x: torch.tanh(x) / 2), torch.randn(4, 3)
    _, found = inv.log_det(op, x.to(dtype))
    assert found.dtype == torch.float32
    assert_close(found.double(), inv.log_det(op, x)[1], 8 * torch.finfo(dtype).eps, relative=0)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_log_determinant_lowered(backwards: bool) -> None:
    f = Plain()
    op = inv.chain(*(ops.residual_flow(f),) * 3)
    counting = inv.with_log_det(inv.invert(op) if backwards else op)
    x, total = torch.randn(4, 3, requires_grad=True), torch.zeros(4)

    def gradients(run: inv.Invertible) -> Any:
        y, t = run(x, total)
        return torch.autograd.grad(y.sin().sum() + t.sum(), [x, *f.parameters()])

    assert_close(gradients(inv.checkpoint(counting)), gradients(counting), 1e-11, relative=0)


def test_the_power_series_has_the_documented_bias() -> None:
    f, x = Plain(), torch.randn(1, 3)
    exact = ops.exact_log_det()(f, x)
    for terms in (2, 5, 10):
        found = ops.power_series_log_det(terms, probes=20)(f, x.expand(2000, 3)).mean()
        assert (found - exact).abs() < 3 * 0.64 ** (terms + 1) / ((terms + 1) * 0.36) + 0.01
    assert (ops.power_series_log_det(60, probes=20)(f, x.expand(2000, 3)).mean() - exact).abs() < 0.01


def test_roulette_is_unbiased() -> None:
    f, x = Plain(), torch.randn(1, 3).expand(2000, 3)
    exact = ops.exact_log_det()(f, x[:1])
    found = torch.stack([ops.roulette_log_det(terms=1, keep=0.6)(f, x).mean() for _ in range(200)])
    assert 0 < (found.mean() - exact).abs() < 4 * found.std() / 200**0.5


@pytest.mark.parametrize("rule", [ops.power_series_log_det(3), ops.roulette_log_det()])
def test_estimates_draw_the_same_numbers_in_backward(rule: Callable[..., Tensor]) -> None:
    f, x = Plain(), torch.randn(4, 3, requires_grad=True)
    op = inv.with_log_det(ops.residual_flow(f, log_det=rule))

    def gradients(run: inv.Invertible) -> Any:
        torch.manual_seed(1)
        y, t = run(x, torch.zeros(4))
        return t, torch.autograd.grad(y.sin().sum() + t.sum(), [x, *f.parameters()])

    assert_close(gradients(inv.checkpoint(op)), gradients(op), 1e-11, relative=0)


# ---- autoregressive flows --------------------------------------------------------------------------------------------


def scaled(size: int = 4) -> nn.Module:
    return Counted(Before(size))


def flow(net: nn.Module) -> inv.Invertible:
    return ops.autoregressive(inv.ops.tanh_scale(net), dim=-1)


def test_an_autoregressive_flow_is_its_formula_and_costs_what_it_says() -> None:
    net, x = scaled(), torch.randn(3, 4)
    op = flow(net)
    s, t = inv.ops.tanh_scale(net)(x)
    net.count = 0
    y = op(x)
    assert torch.equal(y, s * x + t) and net.count == 1
    net.count = 0
    assert_close(op.inverse(y), x, 1e-11, relative=0)
    assert net.count == 5  # each element, and once more for the gradient at the solution
    with torch.no_grad():
        net.count = 0
        op.inverse(y)
        assert net.count == 4
    assert_close(inv.log_det(op, x)[1], s.log().sum(1), 1e-11, relative=0)
    assert_close(inv.log_det(inv.invert(op), y)[1], -s.log().sum(1), 1e-11, relative=0)


def test_the_jacobian_is_triangular() -> None:
    jacobian = func.jacrev(flow(scaled()))(torch.randn(4))
    assert torch.equal(jacobian.triu(1), torch.zeros(4, 4)) and jacobian.tril(-1).abs().sum() > 0


def test_a_sequence_is_ordered_along_its_own_dimension() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Conv1d(3, 6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(nn.functional.pad(x.mT, (2, -1))).mT

    op, x = ops.autoregressive(inv.ops.tanh_scale(Shifted(), dim=2), dim=1), torch.randn(2, 5, 3)
    with inv.debug(True):
        y = op(x)
    assert_close(op.inverse(y), x, 1e-11, relative=0)


def test_other_laws() -> None:
    class Bins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList([Before(4) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([t for net in self.nets for t in net(x)], -1)

    op, x = ops.autoregressive(Bins(), law=ops.rational_quadratic_spline, dim=-1), torch.randn(3, 4)
    assert_close(op.inverse(op(x)), x, 1e-11, relative=0)
    assert_close(
        inv.log_det(op, x)[1],
        torch.stack([func.jacrev(op)(row[None])[0, :, 0].slogdet()[1] for row in x]),
        1e-11,
        relative=0,
    )


def test_gradients_of_the_sequential_inverse() -> None:
    net = scaled()
    s_t, op = inv.ops.tanh_scale(net), flow(net)

    def taped(y: Tensor) -> Tensor:
        x = y
        for _ in range(4):
            s, t = s_t(x)
            x = (y - t) / s
        return x

    y = torch.randn(3, 4, requires_grad=True)
    inputs = [y, *net.parameters()]
    expected = torch.autograd.grad(taped(y).sin().sum(), inputs)
    for kind in INVERSES.values():
        net.count = 0
        x = kind(op)(y)
        forward = net.count
        assert_close(torch.autograd.grad(x.sin().sum(), inputs), expected, 1e-11, relative=0)
        # The gradient's evaluation is made in forward, and again where it is lowered.
        assert (forward, net.count - forward) == (5, 3 if "checkpoint" in repr(kind(op)) else 2)
    for name in set(TRANSFORMS) - {"third, reverse"}:
        expected = TRANSFORMS[name](taped, LOSSES["square"], y.detach())
        assert_close(TRANSFORMS[name](inv.checkpoint(~op), LOSSES["square"], y.detach()), expected, 1e-9, relative=0)

    def twice(fn: Callable[[Tensor], Tensor]) -> Any:
        first = torch.autograd.grad((fn(y) ** 2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((g.cos() * g).sum() for g in first), inputs)

    assert_close(twice(inv.checkpoint(~op)), twice(taped), 1e-9, relative=0)


def test_debug_finds_a_net_that_sees_too_much() -> None:
    class Sees(Before):
        def forward(self, x: Tensor) -> Any:
            raw, t = super().forward(x)
            return raw, t + x

    op = ops.autoregressive(inv.ops.tanh_scale(Sees(4)), dim=-1)
    with inv.debug(True):
        flow(scaled())(torch.randn(3, 4))
        with pytest.raises(
            DomainError, match="the net is not autoregressive along dim -1, .* a change by 1 when elements"
        ):
            op(torch.randn(3, 4))
    op(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ops.autoregressive(3), OptionError, "autoregressive: got int, expected a function or a module"),
        (
            lambda: ops.autoregressive(nn.Linear(4, 3), dim=-1)(torch.zeros(2, 4)),
            WireError,
            r"autoregressive\(Linear\): the net returned \(2, 3\), expected tensors like \(2, 4\), with 4 elements",
        ),
        (
            lambda: ops.autoregressive(Before(4), dim=2)(torch.zeros(2, 4)),
            WireError,
            r"autoregressive\(Before\) received \(2, 4\), expected a tensor with a dim 2",
        ),
        (
            lambda: ops.autoregressive(Before(4), law=torch.add)(torch.zeros(2, 4)),
            OptionError,
            r"autoregressive\(Before, law=add\): the law returned Tensor, expected an invertible op",
        ),
    ],
)
def test_errors_of_autoregressive_flows(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---- a condition ---------------------------------------------------------------------------------------------------


class Product(nn.Module):
    """A contraction that a condition changes; with an index that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.table = contraction(4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor, c: Tensor, i: Tensor) -> Tensor:
        return self.net(x) * c.cos() + self.table[i]


class Ordered(Before):
    """An autoregressive network that a condition changes."""

    def forward(self, x: Tensor, c: Tensor, i: Tensor) -> Any:
        raw, t = super().forward(x)
        return raw, t * c + i[:, None]


@pytest.mark.parametrize("kind", ["residual", "autoregressive"])
def test_a_condition(kind: str) -> None:
    net = Product() if kind == "residual" else Ordered(4)
    bare = (
        ops.residual_flow(net) if kind == "residual" else ops.autoregressive(inv.ops.tanh_scale(net), dim=-1)  # type: ignore[arg-type]
    )
    op, index = ops.given(bare), torch.tensor([2, 0, 2])
    x, c = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    inputs = [x, c, *net.parameters()]
    with torch.no_grad():
        y = op(x, (c, index))
    assert y[1][0] is c and y[1][1] is index
    assert_close(op.inverse(y)[0], x, 1e-11, relative=0)
    assert_close(inv.log_det(op, (x, (c, index)))[1], -inv.log_det(inv.invert(op), y)[1], 1e-11, relative=0)

    def gradients(run: inv.Invertible, twice: bool) -> Any:
        out, (same, _) = run(x, (c, index))
        first = torch.autograd.grad(out.sin().sum() + (same**2).sum(), inputs, create_graph=twice)
        return torch.autograd.grad(sum((g.cos() * g).sum() for g in first), inputs) if twice else first

    def taped(x: Tensor, condition: Any) -> Any:
        if kind == "residual":
            return unrolled(lambda x: net(x, *condition))(x), condition
        solved = x
        for _ in range(4):
            s, t = inv.ops.tanh_scale(net)(solved, *condition)
            solved = (x - t) / s
        return solved, condition

    for twice in (False, True):
        assert_close(gradients(inv.checkpoint(op), twice), gradients(op, twice), 1e-10, relative=0)
        assert_close(gradients(inv.invert(op), twice), gradients(taped, twice), 1e-9, relative=0)  # type: ignore[arg-type]
        assert_close(gradients(inv.checkpoint(inv.invert(op)), twice), gradients(taped, twice), 1e-9, relative=0)  # type: ignore[arg-type]


def test_an_iteration_holds_the_weights_of_its_own_thread() -> None:
    """What `parametrize` holds is one for all threads: another one would have gone on with weights of a step before."""
    inside, goes_on = threading.Event(), threading.Event()

    def fn(x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert goes_on.wait(60)
        return 0.1 * x.tanh()

    def losses() -> list[float]:
        module = weight_norm(nn.Linear(3, 3))
        module.load_state_dict(state)
        optimizer, found = torch.optim.SGD(module.parameters(), 0.5), []
        with torch.no_grad():
            module(z)
        for _ in range(2):
            optimizer.zero_grad()
            loss = module(z).square().sum()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    state, z = weight_norm(nn.Linear(3, 3)).state_dict(), torch.randn(4, 3)
    loss = inv.checkpoint(inv.ops.residual_flow(fn))(torch.randn(2, 6, requires_grad=True)).sin().sum()
    backward = threading.Thread(target=loss.backward)
    alone = losses()
    backward.start()
    assert inside.wait(60)
    meanwhile = losses()
    goes_on.set()
    backward.join()
    assert meanwhile == alone
    assert (parametrize._cache_enabled, parametrize._cache) == (0, {})
