"""Elementwise ops, splines and mixtures: against torch's own, at the edges of their domains, and beyond them."""

import contextlib
import contextvars
import math
import re
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES, mlp, weight
from kit import SINGLE, assert_close
from torch import Tensor, nn
from torch.distributions import transforms as T
from torch.utils._python_dispatch import TorchDispatchMode

import invfunc as inv
from invfunc.core.packing import pack_bits, unpack_bits
from invfunc.debug import checking, require
from invfunc.errors import DomainError, NotDifferentiableError, NotInvertibleError, OptionError, WireError
from invfunc.log_det import autodiff_log_det
from invfunc.look.memory import measure
from invfunc.testing import check_laws

ops = inv.ops


# ---- against torch -------------------------------------------------------------------------------------------------

F64 = {"dtype": torch.float64}  # what is made on import is made before the fixtures
REAL, POSITIVE = torch.linspace(-5, 5, 41, **F64).unsqueeze(1), torch.linspace(0.01, 5, 41, **F64).unsqueeze(1)

TWINS = [
    (ops.exp(), T.ExpTransform(), REAL),
    (ops.log(), T.ExpTransform().inv, POSITIVE),
    (ops.sigmoid(), T.SigmoidTransform(), REAL),
    (ops.logit(), T.SigmoidTransform().inv, torch.linspace(0.01, 0.99, 41, **F64).unsqueeze(1)),
    (ops.tanh(), T.TanhTransform(), REAL),
    (ops.atanh(), T.TanhTransform().inv, torch.linspace(-0.99, 0.99, 41, **F64).unsqueeze(1)),
    (ops.softplus(), T.SoftplusTransform(), REAL),
    (ops.power(1.7), T.PowerTransform(torch.tensor(1.7, **F64)), POSITIVE),
    (inv.affine(torch.tensor(2.0, **F64), torch.tensor(1.0, **F64)), T.AffineTransform(1.0, 2.0), REAL),
]


@pytest.mark.parametrize(("op", "twin", "x"), TWINS, ids=[repr(op) for op, _, _ in TWINS])
def test_an_op_does_what_torch_does(op, twin, x):
    y, log_det = inv.log_det(op, x)
    assert_close(y, twin(x))
    assert_close(op.inverse(y), twin.inv(y), 1e-10)
    assert_close(log_det, twin.log_abs_det_jacobian(x, y).sum(1).expand(len(x)))


@pytest.mark.parametrize(
    ("op", "fn"),
    [
        (ops.sinh(), torch.sinh),
        (ops.asinh(), torch.asinh),
        (ops.leaky_relu(0.1), nn.LeakyReLU(0.1)),
        (ops.relu(), torch.relu),
        (ops.abs(), torch.abs),
        (ops.cbrt(), lambda x: x.sign() * x.abs() ** (1 / 3)),
    ],
    ids=["sinh", "asinh", "leaky_relu", "relu", "abs", "cbrt"],
)
def test_a_function_is_that_of_its_name(op, fn):
    assert_close(op(REAL), fn(REAL))


def test_derived_ops_read_like_the_code():
    names = ["exp", "log", "sigmoid", "logit", "tanh", "atanh", "softplus", "sinh", "asinh", "cbrt", "relu", "abs"]
    for name in names:
        assert repr(getattr(ops, name)()) == f"{name}()"
    assert repr(inv.invert(ops.log())) == "exp()"
    assert repr(ops.leaky_relu(0.1)) == "leaky_relu(0.1)"
    assert repr(ops.power(torch.tensor(2.0))) == "power(p)" and repr(ops.power(2)) == "power(2)"
    assert repr(ops.mixture_cdf(torch.zeros(3))) == "mixture_cdf(parameters)"
    assert ops.exp() == ops.exp()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh", "leaky_tanh", "softplus", "sinh", "cbrt", "leaky_relu"])
def test_dtypes_are_kept(name, dtype):
    op, x = getattr(ops, name)(), torch.randn(2, 3).to(dtype)
    for each in (op, inv.invert(op)):
        y, total = inv.log_det(each, op(x) if each is not op else x)
        assert y.dtype == dtype and total.dtype == torch.float32


@pytest.mark.parametrize(
    "make",
    [
        lambda: ops.power(2.0),
        lambda: ops.power(torch.tensor(2.0, **SINGLE)),
        lambda: ops.rational_quadratic_spline(torch.zeros(14, **SINGLE)),
        lambda: ops.linear_spline(torch.zeros(4, **SINGLE)),
        lambda: ops.mixture_logit(torch.zeros(6, **SINGLE)),
        lambda: ops.mixture_cdf(torch.zeros(6, **SINGLE)),
    ],
)
def test_dtypes_of_parameters_are_kept(make):
    op, x = make(), torch.rand(2, 3, **SINGLE) + 0.1
    y, total = inv.log_det(op, x)
    assert y.dtype == total.dtype == op.inverse(y).dtype == torch.float32


INVERSES = {  # and a range that rounding of the output would coarsen
    "log": (ops.log(), 0.001, 1.0),
    "logit": (ops.logit(), 0.02, 0.98),
    "atanh": (ops.atanh(), -0.98, 0.98),
    "asinh": (ops.asinh(), -300.0, 300.0),
    "invert(softplus)": (inv.invert(ops.softplus()), 0.001, 3.0),
    "invert(leaky_tanh)": (inv.invert(ops.leaky_tanh(1.5)), -0.9, 0.9),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrap", [lambda op: op, inv.checkpoint], ids=["plain", "lowered"])
@pytest.mark.parametrize("name", INVERSES)
def test_a_log_determinant_in_half_precision_is_not_that_of_a_rounded_output(name, wrap, dtype):
    op, low, high = INVERSES[name]
    x = torch.linspace(low, high, 64).to(dtype).view(1, -1)
    given, exact = x.requires_grad_(), x.detach().double().requires_grad_()
    found, expected = inv.log_det(wrap(op), given)[1], inv.log_det(op, exact)[1]
    assert_close(found.double(), expected, 1e-5)
    (gradient,), (wide,) = torch.autograd.grad(found, given), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), wide, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


# ---- saturation ----------------------------------------------------------------------------------------------------

SATURATED = [(ops.exp, -1e4), (ops.sigmoid, 1e4), (ops.sigmoid, -1e4), (ops.tanh, 1e4), (ops.tanh, -1e4)]
SATURATED += [(ops.softplus, -1e4)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("make", "x"), SATURATED)
def test_what_is_rebuilt_from_a_saturated_output_is_finite(make, x, dtype):
    op, x = make(), torch.tensor([x, 0.5], dtype=dtype)
    back = op.inverse(op(x))
    assert back.dtype == dtype and back.isfinite().all() and back[0].sign() == x[0].sign()
    assert inv.log_det(op, x[:, None])[1].isfinite().all()


@pytest.mark.parametrize(("make", "x"), SATURATED)
def test_a_saturated_network_trains(make, x):
    w = weight(3)
    x = torch.tensor([[x, 0.0, 1.0]])
    op = inv.chain(inv.affine(1 + w**2, w), make())
    (plain,) = torch.autograd.grad(op(x).sum(), w, retain_graph=True)
    (lowered,) = torch.autograd.grad(inv.checkpoint(op)(x).sum(), w)
    assert plain.isfinite().all()
    assert_close(lowered, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softplus_is_exact_where_torch_switches(dtype):
    x = torch.linspace(-30, 60, 500, dtype=dtype)
    assert_close(ops.softplus().inverse(ops.softplus()(x)) / x, torch.ones_like(x), 20 * torch.finfo(dtype).eps)


# ---- outside of the domain -----------------------------------------------------------------------------------------

OUTSIDE = [
    (ops.log(), -1.0, r"log received values outside of its domain, expected x > 0, got values from -1 to 2; clamp the"),
    (ops.log(), 0.0, r"log received values outside of its domain, expected x > 0, got values from 0 to 2"),
    (inv.invert(ops.exp()), -1.0, r"log received"),
    (ops.logit(), 1.0, r"logit received .*, expected 0 < x < 1, got values from 1 to 2; clamp the input, or put sig"),
    (ops.atanh(), -2.0, r"atanh received .*, expected -1 < x < 1, got values from -2 to 2; clamp the input, or put t"),
    (inv.invert(ops.softplus()), -1.0, r"invert\(softplus\(\)\) received .*, expected y > 0, got values from -1 to 2"),
    (ops.power(0.5), -1.0, r"power received .*, expected x > 0, got values from -1 to 2; put exp\(\) or softplus\(\)"),
    (inv.invert(ops.power(2.0)), -1.0, r"invert\(power\) received .*, expected y > 0"),
    (ops.power(torch.tensor([1.0, 0.0])), 1.0, r"power's exponent received .* expected an exponent that is nowhere 0"),
    (ops.linear_spline(torch.tensor([0.0, math.nan])), 1.0, r"linear_spline's parameters received .* finite numbers"),
    (
        ops.rational_quadratic_spline(torch.full((5,), math.nan)),
        1.0,
        r"rational_quadratic_spline's parameters received values .* expected finite numbers, got values from nan to nan",
    ),
    (
        ops.mixture_logit(torch.tensor([0.0, 0.0, 800.0])),
        1.0,
        r"mixture_logit's log_scales received .* expected logarithms of numbers that the dtype has, got values from 800",
    ),
    (
        ops.rational_quadratic_spline(torch.zeros(7), tails=None, interval=(-1, 1)),
        3.0,
        r"rational_quadratic_spline received .*, expected values from -1 to 1, got .*; pass tails='linear', or a wider",
    ),
    (ops.linear_spline(torch.zeros(4), tails=None, interval=(-1, 1)), 3.0, r"linear_spline received .*from -1 to 1"),
    (
        inv.affine(torch.zeros(2), torch.zeros(2)),
        1.0,
        r"affine's scale received values outside of its domain, expected a scale that is nowhere 0, got values",
    ),
    (inv.invert(ops.mixture_cdf(torch.zeros(3))), 2.0, r"^logit received .*, expected 0 < x < 1"),
]


@pytest.mark.parametrize(("op", "x", "message"), OUTSIDE)
def test_a_value_outside_of_the_domain_is_named(op, x, message):
    x = torch.tensor([x, 2.0])
    op(x)  # off: no error
    with inv.debug(True), pytest.raises(DomainError, match=message):
        op(x)


def test_beyond_the_domain_is_nan_and_beyond_a_spline_is_its_tail():
    assert all(op(torch.tensor([-2.0])).isnan() for op in (ops.log(), ops.logit(), ops.atanh(), ops.power(0.5)))
    far, near = torch.tensor([-40.0, 40.0]), torch.tensor([-1.0, 1.0])
    for spline in (ops.rational_quadratic_spline(weight(14), tails=None), ops.linear_spline(weight(5), tails=None)):
        assert_close(spline(far), far)
        with inv.debug(True):
            spline(near)


def test_nan_is_outside_of_every_domain():
    with inv.debug(True), pytest.raises(DomainError, match="got values from nan to nan"):
        ops.log()(torch.tensor([math.nan]))


# ---- debug ---------------------------------------------------------------------------------------------------------


def test_debug_is_off_nests_and_is_restored():
    assert not checking()
    with inv.debug(True):
        assert checking()
        with inv.debug(False):
            assert not checking()
        assert checking()
    assert not checking()
    with pytest.raises(KeyError), inv.debug(True):
        raise KeyError
    assert not checking()


def test_debug_as_a_plain_call():
    def switched() -> bool:
        inv.debug(True)
        return checking()

    assert contextvars.copy_context().run(switched)
    assert not checking()


class Ledger(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_check_costs_nothing_while_it_is_off():
    x = torch.rand(3) + 0.1
    with Ledger() as off:
        ops.log()(x)
    with Ledger() as on, inv.debug(True):
        ops.log()(x)
    beyond = "lt.Scalar", "gt.Scalar", "bitwise_or.Tensor", "ones_like.default", "masked_fill.Scalar", "mul.Tensor"
    ends = "eq.Scalar", "masked_fill.Scalar", "log.default", "masked_fill.Scalar"
    assert off.ran == [f"aten.{kernel}" for kernel in (*beyond, *ends)]
    assert len(on.ran) > len(off.ran)


WAITS = {
    f"aten.{kernel}.default" for kernel in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")
}


def do_all(op: inv.Invertible, x: Any) -> None:
    """Forward, inverse, and log-determinant where there are any."""
    y, residue = op.forward_with_residue(x)
    with contextlib.suppress(NotInvertibleError):
        op.inverse_with_residue(residue, y)
    with contextlib.suppress(NotDifferentiableError, WireError):
        inv.log_det(op, x)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.startswith("residual_flow")])
def test_no_op_reads_its_data_while_checks_are_off(name):
    """On a GPU that would wait for it. Only an iteration has to know when it has converged."""
    example = EXAMPLES[name]
    op, x = example.make(), example.inputs()[0]
    with Ledger() as ledger, torch.no_grad():
        do_all(op, x)
    assert WAITS.isdisjoint(ledger.ran)


@pytest.mark.parametrize("name", EXAMPLES)
def test_checks_pass_what_is_in_the_domain(name):
    example = EXAMPLES[name]
    with inv.debug(True):
        do_all(example.make(), example.inputs()[-1])


@pytest.mark.parametrize(
    "make, kernels",
    [
        (lambda: ops.householder(weight(3, 4)), "norm"),
        (lambda: ops.linear(weight(4, 4)), "svd"),
        (lambda: ops.orthogonal(torch.eye(4)), "eye"),
        (lambda: ops.diagonal(weight(4) + 2), "abs"),
        (lambda: ops.triangular(torch.eye(4)), "aten.gt"),
        (lambda: ops.rational_quadratic_spline(weight(4, 5)), "isfinite|aten.eq"),
    ],
)
def test_a_check_runs_no_kernel_while_it_is_off(make, kernels):
    op, y = make(), torch.randn(3, 4)
    with Ledger() as off:
        op.inverse(y)
    with Ledger() as on, inv.debug(True):
        op.inverse(y)
    assert not re.search(kernels, " ".join(off.ran)) and re.search(kernels, " ".join(on.ran))


def test_checks_under_transforms_see_all_samples():
    def fn(x: Tensor) -> Tensor:
        return ops.log()(x).sum()

    with inv.debug(True):
        torch.func.vmap(torch.func.grad(fn))(torch.rand(3, 2) + 0.1)
        with pytest.raises(DomainError, match="values from -1 to 1"):
            torch.func.vmap(torch.func.grad(fn))(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))


@pytest.mark.compile
def test_a_compiled_function_is_not_checked():
    with inv.debug(True):
        compiled = torch.compile(lambda x: ops.log()(x), backend="eager", fullgraph=True)
        assert compiled(torch.tensor([-1.0])).isnan()


def test_require_looks_at_every_tensor_of_a_wire():
    with inv.debug(True), pytest.raises(DomainError, match="op received values .*, expected y < 2"):
        require("op", (torch.zeros(2), (None, torch.ones(1) * 3)), torch.lt, "y < 2", "", 2)


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ops.leaky_relu(0), r"leaky_relu: slope is 0, expected a positive number; relu\(\) keeps a residue"),
        (lambda: ops.leaky_tanh(9), "leaky_tanh: cutoff is 9, expected a number between 0 and 8"),
        (lambda: ops.leaky_relu(math.nan), "leaky_relu: slope is nan, expected a positive number"),
        (lambda: ops.power(0), r"power: p is 0, expected a number that is not 0; x \*\* 0 is 1 for every x"),
        (lambda: ops.power("2"), "power: p is '2', expected a number that is not 0"),
        (lambda: ops.leaky_relu(None), "leaky_relu: slope is None, expected a positive number"),
        (lambda: ops.leaky_tanh(None), "leaky_tanh: cutoff is None, expected a number between 0 and 8"),
        (lambda: ops.power(math.nan), "power: p is nan, expected a number that is not 0"),
        (lambda: ops.linear_spline(torch.zeros(4), interval=(1, 1)), r"linear_spline: interval is \(1, 1\), expected"),
        (lambda: ops.linear_spline(torch.zeros(4), tails="no"), "linear_spline: tails is 'no', expected 'linear' or N"),
        (lambda: ops.linear_spline(torch.zeros(4), minimum=-1), "linear_spline: minimum is -1, expected a number from"),
        (
            lambda: ops.linear_spline(torch.zeros(4), minimum=0.3)(torch.zeros(1)),
            "linear_spline: minimum is 0.3, expected less than 1/4 for 4 bins",
        ),
        (
            lambda: ops.rational_quadratic_spline(torch.zeros(5), boundary_slopes=(0, 1)),
            r"rational_quadratic_spline: boundary_slopes is \(0, 1\), expected two positive numbers",
        ),
        (
            lambda: ops.mixture_logit(torch.zeros(3), tolerance=2),
            "mixture_logit: tolerance is 2, expected a number bet",
        ),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (
            ops.rational_quadratic_spline(torch.zeros(6)),
            r"got 6 parameters in the last dimension of \(6\)?,?\)?, expected 3K - 1 of them for K bins, or 3K \+ 1",
        ),
        (
            ops.rational_quadratic_spline(torch.zeros(4), torch.zeros(5), torch.zeros(3)),
            "got 4 widths, 5 heights and 3 derivatives, expected 4 heights, and 3 derivatives, or 5 with those at both",
        ),
        (
            ops.rational_quadratic_spline(torch.zeros(3, 4, 5)),
            r"got parameters \(3, 4, .\) for x \(2, 3\), expected \(2, 3, parameters\), or what broadcasts to it; move",
        ),
        (ops.linear_spline(torch.zeros(4), torch.zeros(5)), "got 5 widths, 4 heights, expected as many of each"),
        (ops.mixture_logit(torch.zeros(4)), r"got 4 parameters in the last dimension of \(4,?\), expected 3K of them"),
        (ops.mixture_logit(torch.zeros(4), torch.zeros(3), torch.zeros(4)), "expected as many components in each"),
        (ops.mixture_logit(torch.zeros(5, 3)), r"got parameters \(5, 1\) for x \(2, 3\), expected"),
        (ops.power(torch.ones(5, 2, 3)), r"power's exponent is \(5, 2, 3\), expected \(2, 3\) like the input, or what"),
        (ops.power(torch.ones(2)), r"power's exponent is \(2,\), expected \(2, 3\) like the input, or what broadcasts"),
    ],
)
def test_parameters_are_checked(op, message):
    with pytest.raises(WireError, match=message):
        op(torch.zeros(2, 3))


# ---- packed masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (8,), (9,), (3, 5), (2, 0, 4), (2, 3, 4, 5)])
def test_packed_bits_are_exact(shape):
    mask = torch.rand(shape) > 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-mask.numel() // 8),)
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


def test_packed_bits_of_views_and_under_vmap():
    mask = (torch.rand(4, 6, 5) > 0.5).transpose(0, 2)
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)
    each = torch.func.vmap(lambda m: unpack_bits(pack_bits(m), m.shape))(mask)
    assert torch.equal(each, mask)


def test_abs_keeps_a_bit_for_each_element():
    x = torch.randn(8, 1000, requires_grad=True)
    op = inv.checkpoint(inv.chain(*[part for _ in range(16) for part in (ops.abs(), inv.affine(weight(1), weight(1)))]))
    kept = measure(lambda: op(x)).held_bytes
    assert kept <= x.numel() * 8 + 16 * (x.numel() // 8 + 100)


# ---- the sharp points ----------------------------------------------------------------------------------------------


def test_gradients_at_zero_are_those_of_torch():
    for op, fn in ((ops.relu(), torch.relu), (ops.abs(), torch.abs), (ops.leaky_relu(0.1), nn.LeakyReLU(0.1))):
        for wrap in (lambda op: op, inv.checkpoint):
            x = torch.tensor([-1.0, -0.0, 0.0, 1.0], requires_grad=True)
            (found,) = torch.autograd.grad(wrap(op)(x).sum(), x)
            (expected,) = torch.autograd.grad(fn(x).sum(), x)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrap", [lambda op: op, inv.checkpoint])
def test_the_cube_root_has_no_nan_at_zero(wrap, dtype):
    x = torch.tensor([0.0, -0.0, 1e-30, -8.0], dtype=dtype, requires_grad=True)
    y = wrap(ops.cbrt())(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert (
        gradient.isfinite().all()
        and (gradient[:3] > 1e15).all()
        and gradient[3].item() == pytest.approx(1 / 12, rel=5e-3)
    )
    (none,) = torch.autograd.grad(y, x, torch.zeros_like(y))
    assert torch.equal(none, torch.zeros_like(x))
    assert inv.log_det(ops.cbrt(), x)[1].isfinite().all()
    assert (
        torch.equal(y[:2], torch.zeros_like(y[:2])) and y[3].item() == pytest.approx(-2, rel=5e-3) and y.dtype == dtype
    )


def test_leaky_tanh_is_smooth_and_never_flat():
    op, x = ops.leaky_tanh(2.0), torch.linspace(-50, 50, 20001, requires_grad=True)
    (slope,) = torch.autograd.grad(op(x).sum(), x)
    assert slope.min().item() == pytest.approx(1 - math.tanh(2) ** 2)
    assert slope.diff().abs().max() < 5e-3
    assert_close(op(x)[10000], torch.tensor(0.0))
    assert_close(op.inverse(op(x)), x, 1e-10)


# ---- splines -------------------------------------------------------------------------------------------------------


def rq_reference(x: float, xs: list[float], ys: list[float], slopes: list[float]) -> float:
    """Equation 4 of Durkan et al., as it stands."""
    k = max(i for i in range(len(xs) - 1) if xs[i] <= x)
    s, t = (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k]), (x - xs[k]) / (xs[k + 1] - xs[k])
    top = (ys[k + 1] - ys[k]) * (s * t**2 + slopes[k] * t * (1 - t))
    return ys[k] + top / (s + (slopes[k + 1] + slopes[k] - 2 * s) * t * (1 - t))


def test_a_rational_quadratic_spline_is_that_of_the_paper():
    w, h, d = torch.randn(5), torch.randn(5), torch.randn(4)
    x = torch.linspace(-2.99, 2.99, 50)

    def knots(sizes: Tensor) -> list[float]:
        parts = 1e-3 + (1 - 5e-3) * sizes.softmax(0)
        return [-3.0, *(-3 + 6 * parts.cumsum(0)[:-1]).tolist(), 3.0]

    slopes = [1.0, *(1e-3 + nn.functional.softplus(d)).tolist(), 1.0]
    expected = torch.tensor([rq_reference(v, knots(w), knots(h), slopes) for v in x.tolist()])
    assert_close(ops.rational_quadratic_spline(w, h, d)(x), expected)
    assert_close(ops.rational_quadratic_spline(torch.cat([w, h, d]))(x), expected)


@pytest.mark.parametrize("count", [14, 16])
def test_a_spline_is_smooth_everywhere_and_increasing(count):
    op, x = ops.rational_quadratic_spline(torch.randn(count)), torch.linspace(-5, 5, 100001, requires_grad=True)
    y = op(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (slope > 0).all() and (y.diff() > 0).all()
    assert slope.diff().abs().max() < 0.01 * slope.max()


def test_boundary_slopes_go_on_beyond_the_interval():
    op = ops.rational_quadratic_spline(torch.zeros(5), boundary_slopes=(0.5, 2.0), interval=(-1, 1))
    assert_close(op(torch.tensor([-3.0, 4.0])), torch.tensor([-2.0, 7.0]))
    assert_close(inv.log_det(op, torch.tensor([[-3.0, 4.0]]))[1], torch.tensor([0.0]))


def test_knots_themselves():
    x = torch.tensor([[-3.0, 3.0, 0.0]])
    for op in (ops.rational_quadratic_spline(torch.randn(17)), ops.linear_spline(torch.randn(6))):
        assert_close(op(x)[:, :2], x[:, :2])
        assert_close(op.inverse(op(x)), x)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_wild_parameters_give_finite_numbers(scale):
    parameters = (scale * torch.randn(500, 3, 23)).float().requires_grad_()
    op, x = ops.rational_quadratic_spline(parameters), (2 * torch.randn(500, 3)).float().requires_grad_()
    y, total = inv.log_det(op, x)
    back = op.inverse(y)
    gradients = torch.autograd.grad(back.sum() + total.sum(), [parameters, x])
    assert all(t.isfinite().all() for t in (y, total, back, *gradients))


def test_splines_and_mixtures_are_laws():
    def net(size: int) -> nn.Module:
        return nn.Sequential(mlp(2, 2 * size), nn.Unflatten(-1, (2, size)))

    x = torch.randn(3, 2), torch.randn(3, 2)
    for size, law in ((11, ops.rational_quadratic_spline), (4, ops.linear_spline), (6, ops.mixture_logit)):
        op = inv.couple(net(size), net(size), law=law)
        check_laws(op, x, laws=["section", "checkpoint_gradients", "log_det_is_jacobian"])


# ---- mixtures ------------------------------------------------------------------------------------------------------


def mixture(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(shape), 3 * torch.randn(shape), torch.randn(shape)


def test_a_mixture_is_its_formula():
    (logits, means, log_scales), x = mixture(50, 3, 4), 5 * torch.randn(50, 3)
    z = (x[..., None] - means) / log_scales.exp()
    cdf = (logits.softmax(-1) * z.sigmoid()).sum(-1)
    density = (logits.softmax(-1) * z.sigmoid() * (-z).sigmoid() / log_scales.exp()).sum(-1)
    y, total = inv.log_det(ops.mixture_cdf(logits, means, log_scales), x)
    assert_close(y, cdf)
    assert_close(total, density.log().sum(1), 1e-10)
    assert_close(ops.mixture_logit(logits, means, log_scales)(x), (cdf / (1 - cdf)).log(), 1e-8)


@pytest.mark.parametrize("reach", [1.0, 1e3, 1e6])
def test_the_inverse_holds_far_out(reach):
    op, x = ops.mixture_logit(*mixture(4)), torch.linspace(-reach, reach, 101)
    assert_close(op.inverse(op(x)) / reach, x / reach, 1e-14)


def test_narrow_and_wide_components_together():
    op = ops.mixture_logit(torch.zeros(3), torch.tensor([-50.0, 0.0, 50.0]), torch.tensor([-9.0, 0.0, 5.0]))
    x = torch.linspace(-60, 60, 201)
    assert_close(op.inverse(op(x)), x, 1e-9)


def test_one_component_is_affine():
    op = ops.mixture_logit(torch.zeros(1), torch.tensor([2.0]), torch.tensor([math.log(3.0)]))
    x = torch.linspace(-1e3, 1e3, 11)
    assert_close(op(x), (x - 2) / 3)


def test_the_inverse_has_every_derivative_of_the_implicit_function():
    op = ops.mixture_logit(*mixture(4))
    x = torch.tensor(0.3)
    forward, inverse = (lambda x: op(x)), (lambda y: op.inverse(y))
    g1, g2, g3 = (d(x) for d in _derivatives(forward))
    h1, h2, h3 = (d(op(x)) for d in _derivatives(inverse))
    assert_close(h1, 1 / g1)
    assert_close(h2, -g2 / g1**3)
    assert_close(h3, (3 * g2**2 - g1 * g3) / g1**5, 1e-9)
    assert_close(torch.func.jacfwd(torch.func.jacrev(inverse))(op(x)), h2)


def _derivatives(fn):
    first = torch.func.grad(fn)
    return first, torch.func.grad(first), torch.func.grad(torch.func.grad(first))


def test_the_inverse_has_the_gradients_of_its_parameters():
    parameters, y = [p.requires_grad_() for p in mixture(3, 4)], torch.randn(2, 3)
    op = ops.mixture_logit(*parameters)
    x = op.inverse(y).detach().requires_grad_()
    (slope,) = torch.autograd.grad(op(x).sum(), x)
    expected = torch.autograd.grad(op(x), parameters, -1 / slope)  # dx/dp = -(dG/dp) / (dG/dx)
    for found, want in zip(torch.autograd.grad(op.inverse(y).sum(), parameters), expected, strict=True):
        assert_close(found, want, 1e-10)


def test_a_loose_tolerance_is_less_exact():
    exact, loose = ops.mixture_logit(*(parts := mixture(4))), ops.mixture_logit(*parts, tolerance=0.2)
    y = torch.linspace(-3, 3, 50)
    with Ledger() as many:
        x = exact.inverse(y)
    with Ledger() as few:
        rough = loose.inverse(y)
    assert (exact(x) - y).abs().max() < 1e-12 < (exact(rough) - y).abs().max()
    assert len(few.ran) < len(many.ran) / 4


def test_log_det_of_a_flow_of_splines_and_mixtures():
    op = inv.chain(ops.mixture_cdf(torch.randn(3, 12)), ops.logit(), ops.rational_quadratic_spline(torch.randn(3, 14)))
    x = torch.randn(4, 3)
    assert_close(inv.log_det(op, x)[1], autodiff_log_det(op, x, None), 1e-8)


def test_relu_has_no_gradient_where_its_output_was_zero() -> None:
    """Below a transform the output is rebuilt, and a bit above the zero that it was."""
    net = inv.chain(inv.ops.relu(), inv.ops.linear(torch.eye(6) + 0.1 * torch.randn(6, 6)))
    x = torch.randn(4, 6)
    x[0, 0] = 0
    found, expected = (torch.func.grad(lambda x, f=f: f(x).sin().sum())(x) for f in (inv.checkpoint(net), net))
    assert_close(found, expected)
    assert torch.equal(found == 0, expected == 0)
