"""Elementwise ops: each is one function of one number, its inverse, and the logarithm of its derivative.

Range and rounding: a function that saturates (`sigmoid`, `tanh`, `softplus`, `exp`) rounds to the end of its open range
when its input is large. Its inverse reads the end as a number that rounds to it: what comes back is finite, forward
makes the end of it again, and the gradient there is 0, as that of a clamp. Near an end that is not 0 few digits are
left. Lowered, an op that rounds to an end of its range, or overflows, keeps its input, in either direction, so that
everything before it gets plain autograd's gradient. Beyond the end there is no inverse: value and gradient are NaN, and
under ``inv.debug(True)`` a `DomainError`. Of NaN, every op makes NaN; of an infinity, the limit; so do the
log-determinants. All three are computed in at least float32: half precision rounds the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.combine import Bound
from ..core.couple import check_meets, match, sum_log_slopes, sum_per_sample
from ..core.op import Chain, Invertible, invert, pair, saturating
from ..core.packing import pack_bits, unpack_bits
from ..core.precision import at_least, check_real, exactly, widely
from ..debug import require
from ..errors import check_option
from ..log_det import Joint
from .shape import check_nonzero, check_tensor


def _undoing(op: Invertible, label: str) -> Invertible:
    """``invert(op)``, shown as the call that built it; inverted again, it is shown as op."""
    return Chain((invert(op),), (label, repr(op)))


@dataclass(frozen=True)
class OfReal:
    """A function of real numbers; anything else is refused in the name of its op."""

    name: str
    fn: Callable[[Tensor], Any]

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The function."""
        return (self.fn,)

    def __call__(self, x: Tensor) -> Any:
        check_real(f"{self.name}: the input", x)
        return self.fn(x)


def elementwise(forward: Callable[..., Any], inverse: Callable[..., Any], name: str, **rules: Any) -> Invertible:
    """A pair of functions of real numbers, which refuses others in its name."""
    fro = inverse if rules.get("residue") else OfReal(f"the inverse of {name}", inverse)
    return pair(OfReal(name, forward), fro, name=name, **rules)


Directions: TypeAlias = tuple[Callable[..., Any], Callable[..., Any]]


def sloped(
    functions: Directions, log_dets: Directions, name: str, pullback: Callable[..., Any] | None = None
) -> Invertible:
    """An elementwise op whose log-determinant is computed from its input, in either direction.

    Where the other end overflows, or rounds to 0, a gradient that went by way of it would be infinite, or NaN.
    """
    there, back = OfReal(name, functions[0]), OfReal(f"the inverse of {name}", functions[1])
    both = partial(_with_log_det, there, log_dets[0]), partial(_with_log_det, back, log_dets[1])
    rule = partial(_of_input, log_dets[0])
    return Joint(there, back, pullback_fn=pullback, log_det_fn=rule, label=name, both=both)


def _with_log_det(fn: Callable[..., Any], log_det: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor]:
    return fn(x), log_det(x)


def _of_input(log_det: Callable[..., Any], x: Tensor, y: Tensor) -> Tensor:
    return log_det(x)


def curved(
    functions: Directions, log_slope: Callable[..., Tensor], name: str, pullback: Callable[..., Any]
) -> Invertible:
    """An elementwise op, by the logarithm of its slope.

    Its inverse computes in at least float32. It is rounded last, so that its log-determinant is of what was not.
    """
    there, back = OfReal(name, functions[0]), OfReal(f"the inverse of {name}", functions[1])
    log_det = LogDet(log_slope)
    both = Bound(_with_log_det, (there, log_det)), Bound(_undone, (back, log_det))
    narrow = Bound(_narrowed, (back,))
    return Joint(there, narrow, pullback_fn=pullback, log_det_fn=log_det, label=name, both=both)


@dataclass(frozen=True)
class LogDet:
    """``log|det J|`` of an elementwise op at x, by the logarithm of its slope."""

    log_slope: Callable[..., Tensor]

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return sum_log_slopes(self.log_slope, x)


def _undone(inverse: Callable[..., Any], log_det: LogDet, y: Tensor) -> tuple[Tensor, Tensor]:
    x = inverse(y)
    return x.to(y.dtype), -log_det(x)


def _narrowed(inverse: Callable[..., Any], y: Tensor) -> Tensor:
    return inverse(y).to(y.dtype)


def _with_ends(fn: Callable[[Tensor], Tensor], y: Tensor, middle: float, *ends: tuple[float, float]) -> Tensor:
    """``fn(y)`` in at least float32, where y is not an end of its domain; at an end, what comes with it; NaN beyond.

    The ends are masked before fn: its derivative has a pole there, and 0 times infinity is NaN.
    """
    low, high = ends[0][0], ends[-1][0] if len(ends) > 1 else math.inf
    y = _nan_where((y < low) | (y > high), y)
    masks = [(y == end, value) for end, value in ends]
    for mask, _ in masks:
        y = y.masked_fill(mask, middle)
    y = widely(fn, y)
    for mask, value in masks:
        y = y.masked_fill(mask, value)
    return y


def _nan_where(mask: Tensor, x: Tensor) -> Tensor:
    """x, but NaN where there is a mask, and so is its gradient: a filled-in number would have the gradient 0."""
    return x * torch.ones_like(x).masked_fill(mask, math.nan)


def _log_of_0(x: Tensor) -> float:
    """A number whose exponential rounds to 0: below the logarithm of the smallest one."""
    return math.log(torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps) - 1


def _log_odds_of_1(x: Tensor) -> float:
    """Those of ``1 - eps / 8``, which rounds to 1."""
    return math.log(8 / torch.finfo(x.dtype).eps)


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # above torch's default of 20 it would still differ from the identity in float64


def log_sigmoid(x: Tensor) -> Tensor:
    """``log(sigmoid(x))``; torch's own warns in the backward of ``vmap``."""
    return -_softplus(-x)


def _log_cosh(x: Tensor) -> Tensor:
    size = x * torch.ones_like(x).copysign(x.detach())  # abs() has no second derivative at 0, logaddexp none far out
    return size + _softplus(-2 * size) - math.log(2)


# ---- exp and log -------------------------------------------------------------------------------------------------


def _exp(x: Tensor) -> Tensor:
    return exactly(torch.exp, x)


def _log(y: Tensor) -> Tensor:
    require("log", y, torch.gt, "x > 0", "clamp the input, or put softplus() or exp() before it", 0)
    return _with_ends(torch.log, y, 1, (0, _log_of_0(y)))


def _pull_exp(y: Tensor, gy: Tensor) -> Any:
    return _narrowed(_log, y), gy * y


def exp() -> Invertible:
    r"""The exponential function.

    .. math:: y = e^x, \qquad x = \log y, \qquad \log|\det J| = \sum x

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        All numbers; the range is y > 0. It overflows beyond x = 88 in float32 and 709 in float64.

    Cost:
        Its inverse is one logarithm. Lowered, its input is kept: beyond 88 in float32, 17 in float16, nothing else of
        it is left.

    Raises:
        DomainError: Under ``inv.debug(True)``, by the inverse of a y that is not positive.

    Example:
        >>> exp()(torch.tensor([0.0, 1.0]))
        tensor([1.0000, 2.7183])

    Source:
        As a bijector: Dillon et al., TensorFlow Distributions (2017).
    """
    return saturating(curved((_exp, _log), torch.positive, "exp()", _pull_exp))


def log() -> Invertible:
    r"""The natural logarithm: ``invert(exp())``.

    .. math:: y = \log x, \qquad x = e^y, \qquad \log|\det J| = -\sum \log x

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        x > 0; the range is all numbers. 0 is read as a number that rounds to it (y = -104 in float32), with the
        gradient 0; of less, NaN.

    Cost:
        Its inverse is one exponential. Lowered, its input is kept.

    Raises:
        DomainError: Under ``inv.debug(True)``, when an x is not positive.

    Example:
        >>> log()(torch.tensor([1.0, 10.0]))
        tensor([0.0000, 2.3026])

    Source:
        As a bijector: Dillon et al., TensorFlow Distributions (2017).
    """
    return _undoing(exp(), "log()")


# ---- sigmoid and logit -------------------------------------------------------------------------------------------


def _sigmoid(x: Tensor) -> Tensor:
    return exactly(torch.sigmoid, x)


def _logit(y: Tensor) -> Tensor:
    require("logit", y, _within, "0 < x < 1", "clamp the input, or put sigmoid() before it", 0, 1)
    return _with_ends(torch.logit, y, 0.5, (0, _log_of_0(y)), (1, _log_odds_of_1(y)))


def _within(x: Tensor, low: float, high: float) -> Tensor:
    return (x > low) & (x < high)


def _pull_sigmoid(y: Tensor, gy: Tensor) -> Any:
    return _narrowed(_logit, y), gy * y * (1 - y)


def _sigmoid_log_slope(x: Tensor) -> Tensor:
    return log_sigmoid(x) + log_sigmoid(-x)


def sigmoid() -> Invertible:
    r"""The logistic function.

    .. math:: y = \sigma(x) = \frac{1}{1 + e^{-x}}, \qquad x = \log \frac{y}{1 - y}, \qquad
        \log|\det J| = \sum \log\sigma(x) + \log\sigma(-x)

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        All numbers; the range is 0 < y < 1. Near 1 the numbers are sparse: beyond x = 8 in float32 and 18 in float64
        less than half of the digits of x come back, beyond 17 and 37 none.

    Cost:
        Its inverse is one logit. Lowered, its input is kept.

    Raises:
        DomainError: Under ``inv.debug(True)``, by the inverse of a y outside of the range.

    Example:
        >>> sigmoid()(torch.tensor([0.0, 2.0]))
        tensor([0.5000, 0.8808])

    Source:
        Its inverse, before a flow on pixels: Dinh et al., Real NVP (2017), section 4.1.
    """
    return saturating(curved((_sigmoid, _logit), _sigmoid_log_slope, "sigmoid()", _pull_sigmoid))


def logit() -> Invertible:
    r"""The logarithm of the odds: ``invert(sigmoid())``.

    .. math:: y = \log \frac{x}{1 - x}, \qquad x = \sigma(y), \qquad \log|\det J| = -\sum \log x + \log(1 - x)

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        0 < x < 1; the range is all numbers. 0 and 1, such as black and white pixels, are read as numbers that round
        to them (y = -104 and 18 in float32), with the gradient 0; beyond them, NaN.

    Cost:
        Its inverse is one sigmoid. Lowered, its input is kept: its derivative near 1 needs all digits of 1 - x.

    Raises:
        DomainError: Under ``inv.debug(True)``, when an x lies outside of the domain.

    Example:
        >>> logit()(torch.tensor([0.5, 0.9]))
        tensor([0.0000, 2.1972])

    Source:
        Before a flow on pixels: Dinh et al., Real NVP (2017), section 4.1.
    """
    return _undoing(sigmoid(), "logit()")


# ---- tanh and atanh ----------------------------------------------------------------------------------------------


def _tanh(x: Tensor) -> Tensor:
    return exactly(torch.tanh, x)


def _atanh(y: Tensor) -> Tensor:
    require("atanh", y, _within, "-1 < x < 1", "clamp the input, or put tanh() before it", -1, 1)
    limit = (_log_odds_of_1(y) + 1) / 2  # tanh(x) = 2 sigmoid(2x) - 1
    return _with_ends(torch.atanh, y, 0, (-1, -limit), (1, limit))


def _pull_tanh(y: Tensor, gy: Tensor) -> Any:
    return _narrowed(_atanh, y), gy * (1 - y * y)


def _tanh_log_slope(x: Tensor) -> Tensor:
    return -2 * _log_cosh(x)


def tanh() -> Invertible:
    r"""The hyperbolic tangent.

    .. math:: y = \tanh x, \qquad x = \operatorname{artanh} y, \qquad
        \log|\det J| = \sum \log(1 - \tanh^2 x) = -2 \sum \log\cosh x

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        All numbers; the range is -1 < y < 1. Near its ends the numbers are sparse: beyond \|x\| = 4 in float32 and 9 in
        float64 less than half of the digits of x come back, beyond 9 and 19 none. `leaky_tanh` does not saturate.

    Cost:
        Its inverse is one artanh. Lowered, its input is kept.

    Raises:
        DomainError: Under ``inv.debug(True)``, by the inverse of a y outside of the range.

    Example:
        >>> tanh()(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.7616])

    Source:
        After a density on actions: Haarnoja et al., Soft Actor-Critic (2018), appendix C.
    """
    return saturating(curved((_tanh, _atanh), _tanh_log_slope, "tanh()", _pull_tanh))


def atanh() -> Invertible:
    r"""The inverse hyperbolic tangent: ``invert(tanh())``.

    .. math:: y = \operatorname{artanh} x, \qquad x = \tanh y, \qquad \log|\det J| = -\sum \log(1 - x^2)

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        -1 < x < 1; the range is all numbers. -1 and 1, such as saturated actions, are read as numbers that round to
        them (y = -9 and 9 in float32), with the gradient 0; beyond them, NaN.

    Cost:
        Its inverse is one tanh. Lowered, its input is kept: its derivative near an end needs all digits of 1 - \|x\|.

    Raises:
        DomainError: Under ``inv.debug(True)``, when an x lies outside of the domain.

    Example:
        >>> atanh()(torch.tensor([0.0, 0.5]))
        tensor([0.0000, 0.5493])

    Source:
        The inverse of `tanh`: Haarnoja et al., Soft Actor-Critic (2018), appendix C.
    """
    return _undoing(tanh(), "atanh()")


def _saturates_at(cutoff: float) -> tuple[float, float]:
    """The value and the slope of tanh at the cutoff."""
    return math.tanh(cutoff), 1 / math.cosh(cutoff) ** 2


def _leaky_tanh_forward(cutoff: float, x: Tensor) -> Tensor:
    return exactly(partial(_leaky_tanh, cutoff), x)


def _leaky_tanh(cutoff: float, x: Tensor) -> Tensor:
    value, slope = _saturates_at(cutoff)
    straight = x.sign() * (value + slope * (x.abs() - cutoff))  # at the cutoff: the value to the bit
    return torch.where(x.abs() < cutoff, x.tanh(), straight)


def _leaky_tanh_inverse(cutoff: float, y: Tensor) -> Tensor:
    return widely(partial(_leaky_atanh, cutoff), y)


def _leaky_atanh(cutoff: float, y: Tensor) -> Tensor:
    value, slope = _saturates_at(cutoff)
    inside = y.abs() < value
    straight = y.sign() * (cutoff + (y.abs() - value) / slope)
    return torch.where(inside, torch.where(inside, y, 0).atanh(), straight)


def _pull_leaky_tanh(cutoff: float, y: Tensor, gy: Tensor) -> Any:
    value, slope = _saturates_at(cutoff)
    return _narrowed(partial(_leaky_tanh_inverse, cutoff), y), gy * torch.where(y.abs() < value, 1 - y * y, slope)


def _leaky_tanh_log_slope(cutoff: float, x: Tensor) -> Tensor:
    return _tanh_log_slope(torch.where(x.abs() < cutoff, x, x.detach().clamp(-cutoff, cutoff)))


def _is_flat(cutoff: float, x: Tensor) -> bool:
    """Whether less than half of the digits of some x come back."""
    return math.cosh(cutoff) ** 2 * math.sqrt(torch.finfo(x.dtype).eps) > 1


def leaky_tanh(cutoff: float = 3.0) -> Invertible:
    r"""The hyperbolic tangent, continued beyond a cutoff by its tangents, so that it never saturates.

    .. math:: y = \tanh x \text{ for } |x| < c, \qquad
        y = \pm(\tanh c + (1 - \tanh^2 c)(|x| - c)) \text{ beyond}, \qquad
        \log|\det J| = \sum \log(1 - \tanh^2 \min(|x|, c))

    Args:
        cutoff: c > 0. Rounding of y grows by :math:`\cosh^2 c` on the way back: 101 for 3, 5507 for 5.

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        All numbers, and so is the range.

    Cost:
        Its inverse is one artanh. Lowered, the gradient is read off the output and nothing is kept, unless less than
        half of the digits would come back, for :math:`\cosh^2 c > \epsilon^{-1/2}`: then its input is. So it is from
        c = 4.7 on in float32, 2.4 in float16 and 1.9 in bfloat16.

    Raises:
        OptionError: When the cutoff is not positive, or so large that tanh has saturated in float32.

    Example:
        >>> leaky_tanh()(torch.tensor([1.0, 100.0]))
        tensor([0.7616, 1.9521])

    Source:
        Ward, flowjax's ``LeakyTanh`` (2022).
    """
    check_option("leaky_tanh: cutoff", cutoff, lambda cutoff: 0 < cutoff < 8, "a number between 0 and 8")
    functions = partial(_leaky_tanh_forward, cutoff), partial(_leaky_tanh_inverse, cutoff)
    slope, pull = partial(_leaky_tanh_log_slope, cutoff), partial(_pull_leaky_tanh, cutoff)
    return saturating(curved(functions, slope, f"leaky_tanh({cutoff})", pull), partial(_is_flat, cutoff))


# ---- softplus ----------------------------------------------------------------------------------------------------


def _softplus_forward(x: Tensor) -> Tensor:
    return exactly(_softplus, x)


def _softplus_inverse(y: Tensor) -> Tensor:
    require("invert(softplus())", y, torch.gt, "y > 0", "clamp the input, or put softplus() before it", 0)
    return _with_ends(_softplus_inverse_inside, y, 1, (0, _log_of_0(y)))


def _softplus_inverse_inside(y: Tensor) -> Tensor:
    return y + (-(-y).expm1()).log()


def _pull_softplus(y: Tensor, gy: Tensor) -> Any:
    return _narrowed(_softplus_inverse, y), gy * -(-y).expm1()


def softplus() -> Invertible:
    r"""A smooth positive part.

    .. math:: y = \log(1 + e^x), \qquad x = y + \log(1 - e^{-y}), \qquad \log|\det J| = \sum \log\sigma(x)

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        All numbers; the range is y > 0. The inverse of 0 is a number of which it rounds to 0; of less, NaN.

    Cost:
        Its inverse is one exponential and one logarithm. Lowered, its input is kept, as that of `exp`.

    Raises:
        DomainError: Under ``inv.debug(True)``, by the inverse of a y that is not positive.

    Example:
        >>> softplus()(torch.tensor([-1.0, 0.0]))
        tensor([0.3133, 0.6931])

    Source:
        Dugas et al., Incorporating second-order functional knowledge for better option pricing (2001).
    """
    return saturating(curved((_softplus_forward, _softplus_inverse), log_sigmoid, "softplus()", _pull_softplus))


# ---- sinh and asinh ----------------------------------------------------------------------------------------------


def _sinh(x: Tensor) -> Tensor:
    return exactly(torch.sinh, x)


def _asinh(y: Tensor) -> Tensor:
    return widely(_asinh_inside, y)


def _asinh_inside(y: Tensor) -> Tensor:
    is_far = y.abs() > 1e9  # where the derivative's y * y might overflow, and asinh(y) rounds to log(2 y)
    far = y.sign() * (y.abs().masked_fill(~is_far, 1).log() + math.log(2))
    return torch.where(is_far, far, y.masked_fill(is_far, 0).asinh())


def _pull_sinh(y: Tensor, gy: Tensor) -> Any:
    return _narrowed(_asinh, y), gy * y.hypot(y.new_ones(()))


def sinh() -> Invertible:
    r"""The hyperbolic sine.

    .. math:: y = \sinh x, \qquad x = \operatorname{arsinh} y, \qquad
        \log|\det J| = \sum \log\cosh x

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        All numbers, and so is the range; it overflows beyond \|x\| = 89 in float32 and 710 in float64.

    Cost:
        Its inverse is one arsinh. Lowered, its input is kept, as that of `exp`.

    Example:
        >>> sinh()(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 1.1752])

    Source:
        Jones and Pewsey, Sinh-arcsinh distributions (2009).
    """
    return saturating(curved((_sinh, _asinh), _log_cosh, "sinh()", _pull_sinh))


def asinh() -> Invertible:
    r"""The inverse hyperbolic sine, ``invert(sinh())``: linear near 0, logarithmic far away.

    .. math:: y = \operatorname{arsinh} x, \qquad x = \sinh y, \qquad
        \log|\det J| = -\tfrac12 \sum \log(1 + x^2)

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        All numbers, and so is the range.

    Cost:
        Its inverse is one sinh. Lowered, its input is kept.

    Example:
        >>> asinh()(torch.tensor([0.0, 1000.0]))
        tensor([0.0000, 7.6009])

    Source:
        Jones and Pewsey, Sinh-arcsinh distributions (2009).
    """
    return _undoing(sinh(), "asinh()")


# ---- powers ------------------------------------------------------------------------------------------------------


def _power(p: float | Tensor, x: Tensor) -> Tensor:
    _check_power("power", "x > 0", p, x)
    return _raised(x, p)


def _root(p: float | Tensor, y: Tensor) -> Tensor:
    _check_power("invert(power)", "y > 0", p, y)
    return _raised(y, p, torch.reciprocal) if isinstance(p, Tensor) else _raised(y, 1 / p)


def _raised(x: Tensor, p: float | Tensor, of_exponent: Callable[[Tensor], Tensor] = torch.positive) -> Tensor:
    """``x ** of_exponent(p)``, NaN below 0: a whole exponent would forget the sign."""
    x = _nan_where(x < 0, x)
    return exactly(lambda x, *p: x ** of_exponent(*p), x, p) if isinstance(p, Tensor) else exactly(lambda x: x**p, x)


def _check_power(subject: str, domain: str, p: float | Tensor, x: Tensor) -> None:
    if isinstance(p, Tensor):
        check_tensor(f"{subject}'s exponent", x)
        check_meets(f"{subject}'s exponent", p, x)
        check_nonzero(f"{subject}'s exponent", p, "an exponent that is nowhere 0")
    require(subject, x, torch.gt, domain, "put exp() or softplus() before it, or use cbrt()", 0)


def _pull_power(p: float | Tensor, y: Tensor, gy: Tensor) -> Any:
    x = _root(p, y)
    if not isinstance(p, Tensor):
        return x, exactly(lambda gy, x: gy * p * x ** (p - 1), gy, x)
    gx = exactly(lambda gy, x, p: gy * p * x ** (p - 1), gy, x, p)
    return x, gx, [(p, match(exactly(lambda gy, x, y: gy * torch.xlogy(y, x), gy, x, y), p))]


def _power_log_slope(x: Tensor, p: float | Tensor) -> Tensor:
    size = p.abs().log() if isinstance(p, Tensor) else math.log(math.fabs(p))
    return (p - 1) * _nan_where(x < 0, x).log() + size


def _root_log_slope(y: Tensor, p: float | Tensor) -> Tensor:
    size = p.abs().log() if isinstance(p, Tensor) else math.log(math.fabs(p))
    return (1 / p - 1) * _nan_where(y < 0, y).log() - size


def power(p: float | Tensor) -> Invertible:
    r"""A power of positive numbers.

    .. math:: y = x^p, \qquad x = y^{1/p}, \qquad \log|\det J| = \sum \log|p| + (p - 1) \log x

    Args:
        p: The exponent, not 0: a number, or a tensor of the shape of x or broadcast to it.

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        x > 0, and the range is y > 0. At 0, what torch's power returns; below 0, NaN, even where p is an integer: no
        inverse tells the sign. For a cube root with its sign, `cbrt`.

    Cost:
        Its inverse is one power. Lowered, its input is kept: a power soon rounds to 0, or overflows.

    Raises:
        OptionError: When p is the number 0, or no number.
        WireError: When p does not broadcast to the shape of x.
        DomainError: Under ``inv.debug(True)``, when an x or a y is not positive, or a p in a tensor is 0.

    Example:
        >>> power(2.0)(torch.tensor([1.0, 3.0]))
        tensor([1., 9.])

    Source:
        Box and Cox, An analysis of transformations (1964).
    """
    if not isinstance(p, Tensor):
        cure = "x ** 0 is 1 for every x"
        check_option("power: p", p, lambda p: 0 < math.fabs(p) < math.inf, "a number that is not 0", cure)
    name = "power(p)" if isinstance(p, Tensor) else f"power({p})"
    functions = partial(_power, p), partial(_root, p)
    slopes = partial(_summed_slopes, _power_log_slope, p), partial(_summed_slopes, _root_log_slope, p)
    return saturating(sloped(functions, slopes, name, partial(_pull_power, p)))


def _summed_slopes(log_slope: Callable[..., Tensor], p: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(p, Tensor):
        return sum_log_slopes(log_slope, x, p)
    return sum_log_slopes(lambda x: log_slope(x, p), x)


def _sign_and_size(x: Tensor) -> tuple[Tensor, Tensor]:
    """1 or -1, and ``|x|`` except at 0, where its roots have no derivative."""
    sign = 1 - 2 * (x < 0).to(x.dtype)
    return sign, sign * x + torch.finfo(x.dtype).tiny * (x == 0).to(x.dtype)


def _cbrt(x: Tensor) -> Tensor:
    sign, size = _sign_and_size(x)
    y = sign * exactly(lambda size: size ** (1 / 3), size)
    return torch.where(x == 0, y - y.detach(), y)


def _cube(y: Tensor) -> Tensor:
    return exactly(lambda y: y * y * y, y)


def _cbrt_log_det(x: Tensor) -> Tensor:
    return sum_log_slopes(lambda x: -2 / 3 * _sign_and_size(x)[1].log() - math.log(3), x)


def _cube_log_det(y: Tensor) -> Tensor:
    edge = torch.finfo(y.dtype).tiny ** (1 / 3)  # at 0, the slope of the other direction
    return sum_log_slopes(lambda y: 2 * torch.where(y == 0, edge, y.abs()).log() + math.log(3), y)


def cbrt() -> Invertible:
    r"""The cube root, with the sign of its argument.

    .. math:: y = \operatorname{sign}(x) |x|^{1/3}, \qquad x = y^3, \qquad
        \log|\det J| = -\sum \log 3 + \tfrac23 \log|x|

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        All numbers, and so is the range. At 0 the derivative is infinite; it is taken to be that at the smallest normal
        number, so that no gradient is NaN, and the log-determinant is finite.

    Cost:
        Its inverse is two products. Lowered, its input is kept: a cube soon rounds to 0, or overflows.

    Example:
        >>> cbrt()(torch.tensor([-8.0, 0.0, 27.0]))
        tensor([-2.,  0.,  3.])

    Source:
        A signed power, as zuko's ``SignedPowerTransform``.
    """
    return saturating(sloped((_cbrt, _cube), (_cbrt_log_det, _cube_log_det), "cbrt()"))


# ---- rectified ---------------------------------------------------------------------------------------------------


def _leak(slope: float, x: Tensor) -> Tensor:
    return F.leaky_relu(x, slope)


def _pull_leaky_relu(slope: float, y: Tensor, gy: Tensor) -> Any:
    return F.leaky_relu(y, 1 / slope), torch.where(y > 0, gy, gy * slope)


def _leaky_relu_log_det(slope: float, x: Tensor, y: Tensor) -> Tensor:
    slopes = torch.full_like(x, math.log(slope), dtype=at_least(x.dtype)).masked_fill(x > 0, 0)
    return sum_per_sample(slopes.masked_fill(x.isnan(), math.nan))


def leaky_relu(slope: float = 0.01) -> Invertible:
    r"""Negative numbers are scaled down.

    .. math:: y = \max(x, 0) + a \min(x, 0), \qquad x = \max(y, 0) + \min(y, 0) / a, \qquad
        \log|\det J| = \log a \cdot \#\{x \le 0\}

    Args:
        slope: a > 0. On the way back, rounding of negative numbers grows by 1/a: 0.1 or more suits deep chains.

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        All numbers, and so is the range.

    Cost:
        Its inverse is another leaky_relu. Lowered, the gradient is read off the output, and nothing is kept.

    Raises:
        OptionError: When the slope is not positive: then it has no inverse.

    Example:
        >>> leaky_relu(0.1)(torch.tensor([-1.0, 2.0]))
        tensor([-0.1000,  2.0000])

    Source:
        Maas et al., Rectifier nonlinearities improve neural network acoustic models (2013).
    """
    cure = "relu() keeps a residue"
    check_option("leaky_relu: slope", slope, lambda slope: 0 < slope < math.inf, "a positive number", cure)
    return elementwise(
        partial(_leak, slope),
        partial(_leak, 1 / slope),
        f"leaky_relu({slope})",
        pullback=partial(_pull_leaky_relu, slope),
        log_det=partial(_leaky_relu_log_det, slope),
    )


def _abs(x: Tensor) -> Any:
    return x.abs(), pack_bits(x < 0)


def _sign_again(negative: Tensor, y: Tensor) -> Tensor:
    return torch.where(unpack_bits(negative, y.shape), -y, y)


def _pull_abs(negative: Tensor, y: Tensor, gy: Tensor) -> Any:
    x = _sign_again(negative, y)
    return x, gy * x.sign()


def _abs_log_det(x: Tensor, y: Tensor) -> Tensor:
    return sum_per_sample(torch.zeros_like(x).masked_fill(x.isnan(), math.nan))


def abs() -> Invertible:
    r"""The absolute value, whose signs are kept as the residue.

    .. math:: y = |x|, \; r = [x < 0], \qquad x = (1 - 2r) y, \qquad \log|\det J| = 0

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        All numbers; the range is y >= 0. With its residue it is one to one.

    Cost:
        Kept: one bit for each element, eight to a byte. Its inverse is one selection.

    Raises:
        NotInvertibleError: When its inverse is asked for without the residue.

    Example:
        >>> y, r = abs().forward_with_residue(torch.tensor([-1.0, 2.0]))
        >>> y
        tensor([1., 2.])
        >>> abs().inverse_with_residue(r, y)
        tensor([-1.,  2.])

    Source:
        With a random inverse in place of the residue: Nielsen et al., SurVAE Flows (2020).
    """
    return elementwise(_abs, _sign_again, "abs()", pullback=_pull_abs, log_det=_abs_log_det, residue=True)


def _relu(x: Tensor) -> Any:
    """The negative part tells by its sign where the gradient is 0: y may be rebuilt as a bit more than the 0 it was."""
    return x.relu(), torch.where(x > 0, 0, -x.abs())


def _add_negative_part(negative: Tensor, y: Tensor) -> Tensor:
    return y + negative


def _pull_relu(negative: Tensor, y: Tensor, gy: Tensor) -> Any:
    return y + negative, torch.where(negative.signbit(), 0, gy)


def relu() -> Invertible:
    r"""The positive part, whose negative part is kept as the residue.

    .. math:: y = \max(x, 0), \; r = \min(x, 0), \qquad x = y + r

    Shapes:
        Any shape and floating-point dtype.

    Domain:
        All numbers; the range is y >= 0.

    Cost:
        Kept: the negative part, which is as large as an activation: no mask brings back what relu destroys.
        `leaky_relu` destroys nothing and keeps nothing; `abs` keeps one bit for each element.

    Limits:
        It has no log-determinant: it is not one to one.

    Raises:
        NotInvertibleError: When its inverse is asked for without the residue.

    Example:
        >>> y, r = relu().forward_with_residue(torch.tensor([-1.0, 2.0]))
        >>> y
        tensor([0., 2.])
        >>> relu().inverse_with_residue(r, y)
        tensor([-1.,  2.])

    Source:
        With a random inverse in place of the residue: Nielsen et al., SurVAE Flows (2020).
    """
    return elementwise(_relu, _add_negative_part, "relu()", pullback=_pull_relu, residue=True)
