"""Values and gradients at the edges of domains, beyond them, and of what is no number: lowered as plain."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES, mlp
from kit import assert_close
from torch import Tensor
from torch.distributions import Normal

import invfunc as inv
from invfunc.testing import needs_no_residue
from invfunc.wires import is_differentiable, leaves, map_wire

ops = inv.ops
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan

# A rebuilt value may differ from one that saturated; that is what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::invfunc.errors.DriftWarning")


def value_and_gradients(op: Callable[..., Any], x: Tensor, given: Sequence[Tensor] = ()) -> list[Tensor]:
    """A value, its gradients by x and by what the op closes over, those of a loss that depends on every value."""
    x = x.detach().requires_grad_()
    y = op(x)
    return [y.detach(), *torch.autograd.grad((y * torch.linspace(1, 2, len(y), dtype=y.dtype)).sum(), [x, *given])]


def ways(op: inv.Invertible) -> list[Callable[..., Any]]:
    """Plain, lowered, and lowered between two stages."""
    around = inv.pair(torch.neg, torch.neg)
    return [op, inv.checkpoint(op), inv.checkpoint(inv.chain(around, around, op, around, around))]


# ---- at the edge ---------------------------------------------------------------------------------------------------

# An op, the ends of its domain, and points near them.
EDGES: dict[str, tuple[inv.Invertible, list[float]]] = {
    "log": (ops.log(), [0.0, 1e-3]),
    "logit": (ops.logit(), [0.0, 1e-3, 0.9, 1.0]),
    "atanh": (ops.atanh(), [-1.0, -0.9, 0.0, 0.9, 1.0]),
    "softplus, inverse": (~ops.softplus(), [0.0, 1e-3, 50.0]),
    "mixture_cdf, inverse": (~ops.mixture_cdf(torch.zeros(2), torch.tensor([-1.0, 1.0]), torch.zeros(2)), [0.2, 0.9]),
    "exp": (ops.exp(), [-1e4, 0.0]),
    "sigmoid": (ops.sigmoid(), [-1e4, 0.0, 1e4]),
    "tanh": (ops.tanh(), [-1e4, 0.0, 1e4, 12.0]),
    "softplus": (ops.softplus(), [-1e4, 0.0, 1e4]),
    "leaky_tanh": (ops.leaky_tanh(), [-1e3, -3.0, 0.0, 3.0, 1e3]),
    "power": (ops.power(1.7), [0.0, 1e-3]),
    "power, tensor": (ops.power(torch.tensor(2.0)), [0.0, 1e-3]),
    "cbrt": (ops.cbrt(), [0.0, 1e-3]),
    "abs": (ops.abs(), [-0.5, 0.5]),
    "relu": (ops.relu(), [-1.0, 0.0, 1.0]),
    "leaky_relu": (ops.leaky_relu(), [-1e4, 0.0, 1e4]),
    "rational_quadratic_spline": (ops.rational_quadratic_spline(torch.zeros(11)), [-1e4, -3.0, 0.0, 1.5, 3.0, 1e4]),
    "linear_spline": (ops.linear_spline(torch.zeros(4)), [-1e4, -3.0, 0.1, 3.0, 1e4]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EDGES)
def test_at_the_edge_values_and_gradients_are_finite_lowered_as_plain(name: str, dtype: torch.dtype) -> None:
    op, points = EDGES[name]
    x = torch.tensor(points, dtype=dtype)
    plain, *lowered = [value_and_gradients(way, x) for way in ways(op)]
    assert all(t.dtype == dtype and t.isfinite().all() for t in plain)
    for found in lowered:
        assert_close(found, plain, 0.1 if dtype in DTYPES[2:] else 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["log", "logit", "atanh", "softplus, inverse"])
def test_an_end_of_a_domain_is_undone_to_the_bit_and_gets_no_gradient(name: str, dtype: torch.dtype) -> None:
    op, points = EDGES[name]
    ends = torch.tensor([p for p in points if p in (-1.0, 0.0, 1.0) and (name, p) != ("atanh", 0.0)], dtype=dtype)
    y, gradient = value_and_gradients(op, ends)
    assert torch.equal(op.inverse(y), ends)
    assert torch.equal(gradient, torch.zeros_like(ends))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_density_at_an_end_is_finite_and_so_is_its_gradient(dtype: torch.dtype) -> None:
    for op in ops.log(), ops.logit(), ops.atanh(), ~ops.softplus():
        for way in op, inv.checkpoint(op):
            x = torch.tensor([0.0, 1.0, 0.5], dtype=dtype, requires_grad=True)
            y, total = inv.log_det(way, x)
            (gradient,) = torch.autograd.grad((total - y.square() / 2).sum(), x)
            assert total.isfinite().all() and gradient.isfinite().all()


# An op, its formula, and points where half precision is short of numbers, in the op or in its derivative.
TINY = [6e-8, 3e-5, 1e-4, 1e-3]
FORMULAS: dict[str, tuple[inv.Invertible, Callable[[Tensor], Tensor], list[float]]] = {
    "exp": (ops.exp(), torch.exp, [-16.0, -9.0, 11.0]),
    "log": (ops.log(), torch.log, [*TINY, 0.99, 1.01, 6e4]),
    "sigmoid": (ops.sigmoid(), torch.sigmoid, [-16.0, 5.0, 8.0, 9.0]),
    "logit": (ops.logit(), torch.logit, [*TINY, 0.5, 0.99]),
    "tanh": (ops.tanh(), torch.tanh, [-5.0, 0.01, 3.0, 5.0]),
    "atanh": (ops.atanh(), torch.atanh, [-0.99, 1e-3, 0.9, 0.99]),
    "softplus": (ops.softplus(), torch.nn.functional.softplus, [-15.0, -9.0, 11.0]),
    "softplus, inverse": (~ops.softplus(), lambda y: y + (-(-y).expm1()).log(), [*TINY, 1.0, 16.0]),
    "sinh": (ops.sinh(), torch.sinh, [-11.0, 1e-3, 11.0]),
    "asinh": (ops.asinh(), torch.asinh, [-300.0, 1e-3, 255.0, 256.0, 300.0, 1e4, 6e4]),
    "cbrt": (ops.cbrt(), lambda x: x.sign() * x.abs() ** (1 / 3), [*TINY, -1e-3, -300.0, 6e4]),
    "cbrt, inverse": (~ops.cbrt(), lambda y: y**3, [*TINY, -1e-3, -80.0, 39.0, 300.0, 6e4]),
    "power": (ops.power(3.0), lambda x: x**3, [*TINY, 39.0, 80.0]),
    "power, inverse": (~ops.power(0.4), lambda y: y**2.5, [*TINY, 80.0, 100.0, 300.0]),
    "power, below 0": (ops.power(-1.0), lambda x: 1 / x, [*TINY, 300.0, 6e4]),
    "power, tensor": (ops.power(torch.tensor(2.0)), lambda x: x**2, [*TINY, 80.0, 300.0]),
    "power, tensor, inverse": (~ops.power(torch.tensor(0.5)), lambda y: y**2, [*TINY, 80.0, 300.0]),
}


def check_formula(op: Any, formula: Callable[[Tensor], Tensor], points: list[float], dtype: Any, bound: float) -> None:
    """Values, log-determinants and the gradients of both are those of the formula in float64, where they have digits."""
    rounding = bound * torch.finfo(dtype).eps
    x = torch.tensor(points, dtype=dtype)
    wide = x.double().requires_grad_()
    y = formula(wide)
    (slope,) = torch.autograd.grad(y.sum(), wide, create_graph=True)
    total = slope.abs().log()
    (of_total,) = torch.autograd.grad(total.sum(), wide)
    for way in op, inv.checkpoint(op):
        inner = x.clone().requires_grad_()
        counted = inv.log_det(way, inner)
        gradients = [torch.autograd.grad(t.sum(), inner, retain_graph=True)[0] for t in counted]
        for found, expected in zip([*counted, *gradients], (y, total, slope, of_total), strict=True):
            has_digits = expected.to(dtype).isfinite() & (expected.abs() >= torch.finfo(dtype).tiny)
            near = torch.where(has_digits, found.double(), expected)
            assert_close(near, expected, rounding if found is counted[1] else 0, rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMULAS)
def test_half_precision_rounds_the_result_and_not_what_leads_to_it(name: str, dtype: torch.dtype) -> None:
    check_formula(*FORMULAS[name], dtype, 8)


# An op, its formula, and points whose square, or the like, float32 does not have.
FAR: dict[str, tuple[inv.Invertible, Callable[[Tensor], Tensor], list[float]]] = {
    "asinh": (ops.asinh(), torch.asinh, [-3e38, -2e19, 1e9, 2e9, 2e19, 1e30]),
    "power": (ops.power(8.0), lambda x: x**8, [1e-6, 1e-3, 1e5]),
    "power, down": (ops.power(3.0), lambda x: x**3, [1e-30, 1e-16, 1e-10, 1e20]),
    "power, below 0": (ops.power(-1.0), lambda x: 1 / x, [1e-30, 1e-20, 1e20]),
    "power, inverse": (~ops.power(0.4), lambda y: y**2.5, [1e-30, 1e-20, 1e20]),
    "power, tensor": (ops.power(torch.tensor(2.0)), lambda x: x**2, [1e-30, 1e20]),
    "cbrt": (ops.cbrt(), lambda x: x.sign() * x.abs() ** (1 / 3), [-1e-16, 1e-30, 1e30]),
    "cbrt, inverse": (~ops.cbrt(), lambda y: y**3, [-1e-16, 1e-16, 1e12]),
}


@pytest.mark.filterwarnings("error::invfunc.errors.DriftWarning")
@pytest.mark.parametrize("name", FAR)
def test_what_a_derivative_is_computed_from_does_not_overflow(name: str) -> None:
    check_formula(*FAR[name], torch.float32, 64)  # that of asinh(1e30) grows log(1e30) times on the way back


@pytest.mark.filterwarnings("error::invfunc.errors.DriftWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_is_undone_near_the_largest_number(dtype: torch.dtype) -> None:
    op = ops.mixture_logit(*(p.to(dtype) for p in PARAMETERS))
    x = torch.tensor([-0.9, 1e-3, 0.9], dtype=dtype) * torch.finfo(dtype).max
    assert_close(op.inverse(op(x)), x, 0, 1e-6)
    assert_close(value_and_gradients(inv.checkpoint(op), x), value_and_gradients(op, x), 0, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_scale", [-20.0, -8.0, -3.0])
def test_between_narrow_components_a_mixture_has_an_inverse_and_lowered_a_gradient(
    log_scale: float, dtype: Any
) -> None:
    means = torch.tensor([-10.0, 0.0, 10.0], dtype=dtype)
    op = ops.mixture_logit(torch.zeros(3, dtype=dtype), means, torch.full((3,), log_scale, dtype=dtype))
    x = torch.tensor([-4.0, 1.0, 5.0, 9.0], dtype=dtype)
    assert_close(op(op.inverse(op(x))), op(x), 1e-6)
    for way in op, inv.checkpoint(op):
        assert all(t.isfinite().all() for t in value_and_gradients(way, x))


# ---- beyond it -----------------------------------------------------------------------------------------------------

BEYOND: dict[str, tuple[inv.Invertible, list[float]]] = {
    "log": (ops.log(), [-1e-30, -1.0, -INF]),
    "logit": (ops.logit(), [-1e-30, -1.0, 1.001, 2.0, INF, -INF]),
    "atanh": (ops.atanh(), [-1.001, 1.001, 5.0, INF, -INF]),
    "softplus, inverse": (~ops.softplus(), [-1e-30, -1.0, -INF]),
    "power": (ops.power(0.5), [-1e-30, -1.0, -INF]),
    "power of a whole exponent": (ops.power(2.0), [-1e-30, -1.0, -INF]),
    "power, inverse": (~ops.power(0.5), [-1e-30, -1.0, -INF]),
    "power of a tensor": (ops.power(torch.tensor(2.0)), [-1e-30, -1.0, -INF]),
    "mixture_cdf, inverse": (~ops.mixture_cdf(torch.zeros(3)), [-1.0, 2.0, INF, -INF]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", BEYOND)
def test_beyond_its_domain_an_op_returns_nan_lowered_as_plain(name: str, dtype: torch.dtype) -> None:
    op, points = BEYOND[name]
    for way in ways(op):
        assert way(torch.tensor(points, dtype=dtype).requires_grad_()).isnan().all()


@pytest.mark.parametrize("name", [name for name in BEYOND if name != "mixture_cdf, inverse"])
def test_beyond_its_domain_the_gradients_are_nan_lowered_as_plain(name: str) -> None:
    op, points = BEYOND[name]
    for way in op, inv.checkpoint(op):
        x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
        y, total = inv.log_det(way, x)
        for found in y, total:
            assert torch.autograd.grad(found.sum(), x, retain_graph=True)[0].isnan().all()


# ---- what is before --------------------------------------------------------------------------------------------------

PARAMETERS = torch.tensor([0.3, -0.2]), torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 0.3])
SATURATED: dict[str, tuple[inv.Invertible, list[float]]] = {
    "tanh": (ops.tanh(), [4.0, 8.0, 12.0, 40.0, -12.0]),
    "sigmoid": (ops.sigmoid(), [8.0, 12.0, 40.0, -200.0]),
    "softplus": (ops.softplus(), [-8.0, -80.0, 40.0]),
    "exp": (ops.exp(), [-12.0, -80.0]),
    "mixture_cdf": (ops.mixture_cdf(*PARAMETERS), [12.0, 40.0, -60.0]),
    "leaky_tanh": (ops.leaky_tanh(5.0), [4.5, 10.0, 50.0, -50.0]),
    "power": (ops.power(3.0), [1e-2, 1e-3, 60.0]),
    "power of 8": (ops.power(8.0), [1e-6, 1e-2, 60.0]),
    "cbrt, inverse": (~ops.cbrt(), [1e-16, 1e-3, 60.0]),
    "sinh": (ops.sinh(), [5.0, -8.0, 12.0]),
    "logit": (ops.logit(), [1 - 2**-8, 0.25]),
    "atanh": (ops.atanh(), [1 - 2**-8, -0.25]),
    "from_transform": (ops.from_transform(torch.distributions.transforms.TanhTransform()), [8.0, 12.0]),
}


def as_op(op: inv.Invertible) -> inv.Invertible:
    return op


def as_law(op: inv.Invertible) -> inv.Invertible:
    """One half of a tensor of two equal halves, by a coupling."""
    coupled = inv.couple(lambda x: x, law=lambda t: op)
    return inv.chain(inv.split(2), inv.parallel(inv.affine(torch.tensor(1.0), torch.tensor(0.0)), inv.chain()), coupled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [as_op, as_law])
@pytest.mark.parametrize("name", SATURATED)
def test_a_parameter_before_an_op_that_saturates_gets_the_gradient_of_plain(name: str, place: Any, dtype: Any) -> None:
    """Exactly, where the op keeps what rounding would lose; what is rebuilt from its output has rounded once more."""
    op, points = SATURATED[name]
    x = torch.tensor([points, points], dtype=dtype).T.contiguous()

    def gradients(wrap: Any) -> list[Tensor]:
        scale = torch.ones(2, dtype=dtype, requires_grad=True)
        shift = torch.zeros(2, dtype=dtype, requires_grad=True)
        inner = x.clone().requires_grad_()
        counting = wrap(inv.with_log_det(inv.chain(inv.affine(scale, shift), place(op))))
        y, total = counting(inner, torch.zeros(len(x), dtype=torch.float32))
        value = sum(leaf.float().sum() for leaf in leaves(y)) + (total * torch.arange(1.0, len(x) + 1)).sum()
        return list(torch.autograd.grad(value, [inner, scale, shift]))

    bound = torch.finfo(dtype).eps * (1 if op.kept(x) is not None else 4)
    assert_close(gradients(inv.checkpoint), gradients(as_op), bound)


# Compositions whose value is lost on the way, and where it is.
LOST: dict[str, tuple[inv.Invertible, list[float]]] = {
    "exp of sinh of sinh": (inv.chain(ops.sinh(), ops.sinh(), ops.exp()), [-3.0, -2.5, 1e-3]),
    "exp of sinh": (inv.chain(ops.sinh(), ops.exp()), [-6.0, -3.0, 5.5]),
    "log of softplus": (inv.chain(ops.softplus(), ops.log()), [-120.0, -5.0, 30.0]),
    "actnorm before it": (
        inv.chain(ops.actnorm(torch.ones(1), torch.ones(1)), ops.softplus(), ops.log()),
        [-120.0, -5.0, 30.0],
    ),
    "cbrt of a power": (inv.chain(ops.power(3.0), ops.cbrt()), [1e-16, 1e-3, 20.0]),
    "power of exp": (inv.chain(ops.exp(), ops.power(8.0)), [-14.0, 0.1, 11.5]),
}


@pytest.mark.filterwarnings("error::invfunc.errors.DriftWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOST)
def test_what_a_composition_loses_on_the_way_is_lost_lowered_as_plain(name: str, dtype: torch.dtype) -> None:
    op, points = LOST[name]
    found = []
    for way in op, inv.checkpoint(op):
        x = torch.tensor(points, dtype=dtype)[:, None].requires_grad_()
        y, total = inv.log_det(way, x)
        found.append([y, total, *(torch.autograd.grad(t.sum(), x, retain_graph=True)[0] for t in (y, total))])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, equal_nan=True)


def test_a_squashed_policy_trains_its_scale_lowered_as_plain() -> None:
    found = []
    for way in ops.tanh(), inv.checkpoint(ops.tanh()):
        scale = torch.ones(1, dtype=torch.float32, requires_grad=True)
        _, total = inv.log_det(way, 12 * scale * torch.ones(1, 1, dtype=torch.float32))
        found += torch.autograd.grad(total.sum(), scale)
    assert_close(found, [torch.full((1,), -24.0, dtype=torch.float32)] * 2, 1e-5)


@pytest.mark.parametrize("wrap", [torch.func.grad, torch.func.jacrev])
def test_a_transform_finds_what_an_op_that_saturates_keeps(wrap: Any) -> None:
    def total(scale: Tensor, way: Any) -> Tensor:
        op = way(inv.with_log_det(inv.chain(inv.affine(scale, torch.zeros(1)), ops.tanh())))
        return op(torch.full((1, 1), 40.0), torch.zeros(1))[1].sum()

    scale = torch.ones(1)
    assert_close(wrap(lambda s: total(s, inv.checkpoint))(scale), wrap(lambda s: total(s, as_op))(scale))


def test_an_input_that_an_op_keeps_and_that_is_written_into_is_named() -> None:
    x = torch.randn(3).requires_grad_()
    inner = x * 1
    y = inv.checkpoint(ops.tanh())(inner)
    with torch.no_grad():
        inner.zero_()
    with pytest.raises(
        inv.errors.ReplayError, match=r"tanh\(\): a tensor of shape \(3,\) that backward needs has been modified"
    ):
        y.sum().backward()


# ---- no numbers ----------------------------------------------------------------------------------------------------


def is_elementwise(name: str) -> bool:
    """Whether an example is of an op on each number alone."""
    names = ["exp", "log", "sigmoid", "logit", "tanh", "atanh", "leaky_tanh", "softplus", "sinh", "asinh", "power"]
    names += ["cbrt", "leaky_relu", "relu", "abs", "rational_quadratic_spline", "linear_spline", "mixture_logit"]
    return name.partition(",")[0] in [*names, "mixture_cdf", "affine", "additive"]


def has_nan(wire: Any) -> bool:
    """Whether a tensor of a wire has a NaN."""
    return any(leaf.isnan().any() for leaf in leaves(wire) if is_differentiable(leaf))


ELEMENTWISE = [name for name in EXAMPLES if is_elementwise(name)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_of_nan_an_op_makes_nan(name: str) -> None:
    """In both directions, in every way; what is only moved is only moved."""
    if name.startswith(("residual_flow", "autoregressive")):
        return  # an iteration raises that it does not converge
    op, x = EXAMPLES[name].make(), EXAMPLES[name].inputs()[1]
    for leaf in filter(is_differentiable, leaves(x)):
        leaf.view(-1)[:1] = NAN
    for way in op, inv.checkpoint(op):
        y = way.forward(x)
        assert has_nan(y)
    if needs_no_residue(op, x):
        assert has_nan(op.inverse(y))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_of_an_infinity_an_elementwise_op_makes_its_limit_or_no_number(name: str) -> None:
    made = EXAMPLES[name].make()
    for op in made, ~made:
        for sign in 1, -1:
            x = torch.full((1, 3), sign * INF)
            try:
                y = op(x)
            except inv.errors.NotInvertibleError:
                continue
            far = op(torch.full((1, 3), sign * 1e300))
            assert (~y.isfinite() | ((y - far).abs() < 1e-100)).all()


LIMITS: dict[str, tuple[inv.Invertible, float, float]] = {  # the log-determinant at -inf and at inf
    "exp": (ops.exp(), -INF, INF),
    "sigmoid": (ops.sigmoid(), -INF, -INF),
    "tanh": (ops.tanh(), -INF, -INF),
    "softplus": (ops.softplus(), -INF, 0.0),
    "sinh": (ops.sinh(), INF, INF),
    "asinh": (ops.asinh(), -INF, -INF),
    "cbrt": (ops.cbrt(), -INF, -INF),
    "leaky_tanh": (ops.leaky_tanh(1.0), 2 * math.log(1 / math.cosh(1)), 2 * math.log(1 / math.cosh(1))),
    "leaky_relu": (ops.leaky_relu(0.1), math.log(0.1), 0.0),
    "linear_spline": (ops.linear_spline(torch.randn(4)), 0.0, 0.0),
    "rational_quadratic_spline": (ops.rational_quadratic_spline(torch.zeros(11)), 0.0, 0.0),
    "mixture_logit": (ops.mixture_logit(*PARAMETERS), -0.3, -0.3),  # that of the widest component
    "mixture_cdf": (ops.mixture_cdf(*PARAMETERS), -INF, -INF),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LIMITS)
def test_at_an_infinity_the_log_determinant_is_its_limit(name: str, dtype: torch.dtype) -> None:
    op, low, high = LIMITS[name]
    x = torch.tensor([-INF, INF], dtype=dtype)
    assert_close(inv.log_det(op, x)[1], torch.tensor([low, high], dtype=dtype), 1e-6)


def test_the_inverse_of_a_mixture_at_an_infinity_is_one() -> None:
    x = torch.tensor([-INF, INF, 0.5])
    back = ops.mixture_logit(*PARAMETERS).inverse(x)
    assert torch.equal(back[:2], x[:2]) and back[2].isfinite()


CONSTANT = "abs", "additive", "affine", "actnorm"  # whose derivative does not depend on x


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name.partition(",")[0] not in (*CONSTANT, "relu")])
def test_of_nan_the_log_determinant_is_nan(name: str) -> None:
    op = EXAMPLES[name].make()
    for way in op, ~op, inv.checkpoint(op):
        assert inv.log_det(way, torch.full((1, 3), NAN))[1].isnan().all()


def test_of_nan_the_bound_of_dequantisation_is_nan() -> None:
    assert inv.log_det(ops.dequantize(17), torch.tensor([[NAN, 1.0]]))[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lower", [as_op, inv.checkpoint])
def test_dequantisation_takes_levels_and_gives_the_nearest_ones(dtype: torch.dtype, lower: Any) -> None:
    op, levels = lower(ops.dequantize(8)), torch.arange(8, dtype=dtype)[:, None]
    y, total = inv.log_det(op, levels)
    assert torch.equal(op.inverse(y), levels) and ((y > 0) & (y < 1)).all() and total.isfinite().all()
    ends = torch.tensor([0.0, 1 - torch.finfo(dtype).eps, 1.0], dtype=dtype)
    assert op.inverse(ends).tolist() == [0.0, 7.0, 7.0]
    for other in torch.tensor([NAN, INF, -INF, -1.0, 8.0, 1e10, 2.5], dtype=dtype):
        y, total = inv.log_det(op, other.view(1, 1))
        assert y.isnan().all() and total.isnan().all()
    assert op.inverse(torch.tensor([NAN, INF, -INF], dtype=dtype)).isnan().all()
    assert op.inverse(torch.tensor([-3.0, -1e-6, 1 + 1e-6, 3.0], dtype=dtype)).tolist() == [0.0, 0.0, 7.0, 7.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [200.0, -3e4, 1e6])
def test_far_away_a_mixture_has_the_slope_of_its_widest_component(x: float, dtype: torch.dtype) -> None:
    op = ops.mixture_logit(*(p.to(dtype) for p in PARAMETERS))
    assert_close(inv.log_det(op, torch.tensor([x], dtype=dtype))[1], torch.tensor([-0.3], dtype=dtype), 1e-5)


@pytest.mark.parametrize(
    "name", ["affine", "rational_quadratic_spline", "linear_spline", "mixture_logit", "power, tensor"]
)
def test_of_a_parameter_that_is_nan_an_op_makes_nan(name: str) -> None:
    op = EXAMPLES[name].make()
    parameters = [t for t in inv.engine.parts.Parts(op.functions).tensors if is_differentiable(t)]
    with torch.no_grad():
        parameters[0].view(-1)[0] = NAN
    y = op(torch.full((1, 3), 0.5))
    assert y[0, 0].isnan() and op.inverse(torch.full((1, 3), 0.5))[0, 0].isnan()


# ---- reports -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowered", [False, True])
def test_a_squashed_policy_that_saturates_has_a_finite_gradient(lowered: bool) -> None:
    mean = torch.tensor([12.0, -12.0, 0.0], dtype=torch.float32, requires_grad=True)
    op = ops.atanh()
    flow = inv.flow(inv.checkpoint(op) if lowered else op, Normal(mean, torch.ones(3, dtype=torch.float32)))
    action = flow.rsample((64,)) if not lowered else (mean + torch.randn(64, 3, dtype=torch.float32)).tanh()
    assert (action.abs() == 1).any()
    flow.log_prob(action).mean().backward()
    assert mean.grad is not None and mean.grad.isfinite().all()


@pytest.mark.parametrize("lowered", [False, True])
def test_images_with_black_and_white_pixels_have_a_finite_log_likelihood(lowered: bool) -> None:
    images = torch.randint(0, 256, (8, 4), dtype=torch.int64).to(torch.float32) / 255
    images[0, 0], images[1, 0] = 0.0, 1.0
    images.requires_grad_()
    net = mlp(2).float()
    op = inv.chain(ops.logit(), inv.split(2), inv.couple(net, net), inv.concat(2))
    y, total = inv.log_det(inv.checkpoint(op) if lowered else op, images)
    loss = (y.square() / 2).sum() - total.sum()
    gradients = torch.autograd.grad(loss, [images, *net.parameters()])
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


def test_atanh_of_1_through_a_network_does_not_make_its_weights_nan() -> None:
    w = torch.ones(3, requires_grad=True)
    x = torch.tensor([[1.0, -1.0, 0.5]])
    for way in ways(ops.atanh()):
        (gradient,) = torch.autograd.grad(way((x * w).clamp(-1, 1)).sum(), w)
        assert gradient.isfinite().all() and gradient[2] != 0


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("raw", [-1e4, -200.0, -20.0, 0.0, 20.0])
def test_a_scale_by_a_sigmoid_does_not_underflow_to_0(raw: float, dtype: torch.dtype) -> None:
    raws = torch.full((1, 2), raw, dtype=dtype, requires_grad=True)
    op = inv.couple(ops.sigmoid_scale(lambda x: (raws, torch.zeros_like(raws))), law=inv.affine)
    x = (torch.ones(1, 2, dtype=dtype), torch.ones(1, 2, dtype=dtype))
    y, total = inv.log_det(op, x)
    assert total.isfinite().all() and torch.autograd.grad(total.sum(), raws)[0].isfinite().all()
    assert map_wire(lambda leaf: leaf.isfinite().all().item(), op.inverse(y)) == (True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [ops.tanh, ops.sinh])
def test_log_determinants_far_out_are_differentiated_twice(make: Any, dtype: torch.dtype) -> None:
    for wrap in (lambda op: op, inv.checkpoint):
        x = torch.tensor([[-INF, -80.0, -0.0, 0.0, 1e-3, 80.0, INF]], dtype=dtype, requires_grad=True)
        (first,) = torch.autograd.grad(inv.log_det(wrap(make()), x)[1].sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        sign = -2 if make is ops.tanh else 1
        assert_close(first.detach(), sign * x.detach().tanh(), 1e-6)
        assert_close(second, sign / x.detach().cosh() ** 2, 1e-6)


@pytest.mark.parametrize("size", [1e2, 1e5, 1e8, -1e5, -1e8, 3e38])
@pytest.mark.parametrize("log_scale", [0.0, -3.0])
def test_a_mixture_is_as_steep_in_its_tails_as_one_component(size: float, log_scale: float) -> None:
    op = ops.mixture_logit(torch.zeros(4), torch.arange(4.0), torch.full((4,), log_scale))
    for way in op, inv.checkpoint(op):
        x = torch.tensor([size], requires_grad=True)
        y, log_det = inv.log_det(way, x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert_close((slope, log_det.exp()), (torch.tensor([math.exp(-log_scale)]),) * 2, 1e-6)


STEEP = [
    (ops.power(torch.tensor(-1.0)), 1e-20, -2e20),
    (~ops.power(-1.0), 1e-20, -2e20),
    (ops.power(torch.tensor(20.0)), 100.0, 0.19),
    (~ops.power(torch.tensor(0.05)), 100.0, 0.19),
    (~ops.power(0.05), 100.0, 0.19),
    (~ops.power(-0.5), 1e-20, -3e20),
    (~ops.cbrt(), 1e13, 2e-13),
]


@pytest.mark.parametrize(("op", "at", "expected"), STEEP)
def test_a_log_determinant_has_its_gradient_where_the_output_overflows(
    op: inv.Invertible, at: float, expected: float
) -> None:
    for way in op, inv.checkpoint(op):
        x = torch.tensor([at], requires_grad=True)
        (found,) = torch.autograd.grad(inv.log_det(way, x)[1].sum(), x)
        assert_close(found / expected, torch.ones(1), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cutoff", [1.0, 2.3, 3.0])
def test_a_leaky_tanh_is_lowered_as_plain_exactly_at_its_cutoff(dtype: torch.dtype, cutoff: float) -> None:
    op, x = ops.leaky_tanh(cutoff), torch.tensor([[-cutoff], [cutoff]], dtype=dtype)
    assert_close(op.inverse(op(x)), x, 0)
    found = []
    for way in op, inv.checkpoint(op):
        at = x.clone().requires_grad_()
        y, log_det = inv.log_det(way, at)
        found.append([torch.autograd.grad(out.sum(), at, retain_graph=True)[0] for out in (y, log_det)])
    assert_close(found[0], found[1], 0)


def test_the_log_determinant_of_the_absolute_value_of_nan_is_nan() -> None:
    found = inv.log_det(ops.abs(), torch.tensor([[NAN, 1.0], [2.0, -INF]]))[1]
    assert found.isnan().tolist() == [True, False] and found[1] == 0
