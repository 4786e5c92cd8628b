"""Mixtures of logistic distributions: their cumulative distribution function as an elementwise op."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.couple import sum_log_slopes
from ..core.op import Invertible, chain, named
from ..core.precision import exactly
from ..debug import require
from ..errors import WireError, check_option
from ..wires import describe
from .elementwise import elementwise, log_sigmoid, sigmoid
from .splines import check_parameters

_NAME = "mixture_logit"


class Logistics(NamedTuple):
    """The components of a mixture, in the last dimension."""

    log_weights: Tensor
    means: Tensor
    log_scales: Tensor


def _logistics(logits: Tensor, means: Tensor | None, log_scales: Tensor | None) -> Logistics:
    if means is None or log_scales is None:
        if logits.shape[-1] % 3:
            raise WireError(
                f"{_NAME} got {logits.shape[-1]} parameters in the last dimension of {describe(logits)}",
                expected="3K of them for K components",
                cure="reshape what the net returns to x.shape + (3K,)",
            )
        logits, means, log_scales = logits.chunk(3, -1)
    if not logits.shape[-1] == means.shape[-1] == log_scales.shape[-1]:
        raise WireError(f"{_NAME} got {describe((logits, means, log_scales))}", expected="as many components in each")
    return Logistics(logits.log_softmax(-1), means, log_scales)


def _standardised(mixture: Logistics, x: Tensor) -> Tensor:
    return (x.unsqueeze(-1) - mixture.means) * (-mixture.log_scales).exp()


def _log_odds(mixture: Logistics, x: Tensor) -> Tensor:
    """``logit F(x)``, from log F and log(1 - F): exact in both tails."""
    z = _standardised(mixture, x)
    below, above = (_log_sum(mixture.log_weights + log_sigmoid(side)) for side in (z, -z))
    return below - above


def _log_sum(terms: Tensor) -> Tensor:
    """``terms.logsumexp(-1)``, whose gradient is a softmax that sums up to 1, however large the terms are.

    torch's is ``exp(terms - result)``: where the result is rounded to whole numbers, it is off by powers of e.
    """
    largest = terms.amax(-1, keepdim=True).detach()
    largest = largest.masked_fill(largest.isinf(), 0)
    return (terms - largest).exp().sum(-1).log() + largest.squeeze(-1)


def _log_slope(mixture: Logistics, x: Tensor) -> Tensor:
    """The logarithm of the derivative of `_log_odds`: ``log f - log F - log(1 - F)``.

    In a tail, log f and one of the others are large and nearly the same: the largest term of each sum is taken out
    before. An infinity is a number so large that only the widest of the components counts.
    """
    largest = math.sqrt(torch.finfo(x.dtype).max)
    z = _standardised(mixture, x.clamp(-largest, largest))
    below, above = (_without_largest(mixture.log_weights, log_sigmoid(side)) for side in (z, -z))
    density = mixture.log_weights + below + above - mixture.log_scales
    return density.logsumexp(-1) - sum((mixture.log_weights + side).logsumexp(-1) for side in (below, above))


def _without_largest(log_weights: Tensor, terms: Tensor) -> Tensor:
    return terms - (log_weights + terms).amax(-1, keepdim=True).detach()


def _check(mixture: Logistics, x: Tensor) -> None:
    check_parameters(_NAME, x, mixture)
    require(f"{_NAME}'s log_scales", mixture.log_scales, _can_be_scales, "logarithms of numbers that the dtype has")


def _can_be_scales(log_scales: Tensor) -> Tensor:
    return log_scales.abs() < -math.log(torch.finfo(log_scales.dtype).tiny)


def bisected(fn: Callable[[Tensor], Tensor], target: Tensor, low: Tensor, high: Tensor, steps: int) -> Tensor:
    """Where an increasing function reaches a target between two points, to ``(high - low) / 2**steps``; no gradient.

    Example:
        >>> bisected(torch.exp, torch.tensor(2.0), torch.tensor(0.0), torch.tensor(1.0), 20)
        tensor(0.6931)
    """
    for _ in range(steps):
        middle = low / 2 + high / 2  # their sum may overflow
        below = fn(middle) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low / 2 + high / 2


def _forward(
    tolerance: float | None, logits: Tensor, means: Tensor | None, log_scales: Tensor | None, x: Tensor
) -> Tensor:
    return exactly(_value, x, logits, means, log_scales)


def _value(x: Tensor, logits: Tensor, means: Tensor | None, log_scales: Tensor | None) -> Tensor:
    mixture = _logistics(logits, means, log_scales)
    _check(mixture, x)
    return _log_odds(mixture, x)


def _inverse(
    tolerance: float | None, logits: Tensor, means: Tensor | None, log_scales: Tensor | None, y: Tensor
) -> Tensor:
    return exactly(partial(_solution, tolerance), y, logits, means, log_scales)


def _solution(
    tolerance: float | None, y: Tensor, logits: Tensor, means: Tensor | None, log_scales: Tensor | None
) -> Tensor:
    mixture = _logistics(logits, means, log_scales)
    _check(mixture, y)
    is_infinite, limit = y.isinf(), y
    y = y.masked_fill(is_infinite, 0)
    x, error = _root(tolerance or torch.finfo(y.dtype).eps, Logistics(*(part.detach() for part in mixture)), y.detach())
    low, high, steepest = x - error, x + error, 0.9 * math.log(torch.finfo(y.dtype).max)
    for _ in range(2):  # each step of Newton's method doubles how many derivatives are right: 0, 1, 3
        moved = x - (_log_odds(mixture, x) - y) * (-_log_slope(mixture, x)).clamp_max(steepest).exp()
        x = moved.detach().clamp(low, high) + (moved - moved.detach())  # no step of a slope that is nearly 0
    return torch.where(is_infinite, limit, x)


def _root(tolerance: float, mixture: Logistics, y: Tensor) -> tuple[Tensor, Tensor]:
    """Where the mixture is y, and how far from there: between the least and the greatest quantile of a component."""
    largest = torch.finfo(y.dtype).max
    quantiles = (mixture.means + mixture.log_scales.exp() * y.unsqueeze(-1)).clamp(-largest, largest)
    low, high = quantiles.amin(-1), quantiles.amax(-1)
    steps = math.ceil(-math.log2(tolerance))
    return bisected(partial(_log_odds, mixture), y, low, high, steps), 2 * tolerance * (high - low)


def _log_det(
    tolerance: float | None, logits: Tensor, means: Tensor | None, log_scales: Tensor | None, x: Tensor, y: Tensor
) -> Tensor:
    return sum_log_slopes(_log_slopes, x, logits, means, log_scales)


def _log_slopes(x: Tensor, logits: Tensor, means: Tensor | None, log_scales: Tensor | None) -> Tensor:
    return _log_slope(_logistics(logits, means, log_scales), x)


def mixture_logit(
    logits: Tensor, means: Tensor | None = None, log_scales: Tensor | None = None, *, tolerance: float | None = None
) -> Invertible:
    r"""The log-odds of a mixture of logistic distributions: `mixture_cdf` followed by a logit; a law of `couple`.

    .. math:: y = \log F(x) - \log(1 - F(x)), \qquad F(x) = \sum_k \pi_k\, \sigma\!\left(\frac{x - \mu_k}{s_k}\right),
        \qquad \log|\det J| = \sum \log f(x) - \log F(x) - \log(1 - F(x))

    With one component it is :math:`(x - \mu) / s`.

    Args:
        logits: Unnormalised logarithms of the weights: :math:`\pi = softmax(logits)`. Alone, all parameters in one
            tensor: logits, means and logarithms of scales, 3K of them.
        means: The means of the K components.
        log_scales: The logarithms of their scales.
        tolerance: How far the bisection narrows its bracket, as a part of it, before two steps of Newton's method; by
            default the rounding of the dtype.

    Shapes:
        x of any shape and floating-point dtype; each parameter ``(*x.shape, K)``, or what broadcasts to it, of any
        floating-point dtype: computed in the widest of them, and at least in float32.

    Domain:
        All numbers, and so is the range: its ends are not rounded to. Between components that are narrow beside their
        distance it is flat, and the inverse gives one of the numbers that have y: what is before it in a lowered chain
        drifts there, and a `DriftWarning` says so.

    Cost:
        Forward: two sums over K. The inverse is found by bisection: 52 evaluations of forward in float64, 23 in
        float32. Its gradients, up to the third, are those of the implicit function: two differentiable steps of
        Newton's method from the root. Lowered, nothing is kept.

    Raises:
        WireError: When the numbers of parameters do not fit each other, or their shapes do not fit x.
        OptionError: When the tolerance is not between 0 and 1.
        DomainError: Under ``inv.debug(True)``, when a parameter is not finite, or the dtype does not have a scale.

    Example:
        >>> op = mixture_logit(torch.zeros(2), torch.tensor([-1.0, 1.0]), torch.zeros(2))
        >>> op(torch.tensor([0.0, 3.0]))
        tensor([0.0000, 2.6085])
        >>> torch.allclose(op.inverse(op(torch.tensor([-9.0, 3.0]))), torch.tensor([-9.0, 3.0]))
        True

    Source:
        Ho et al., Flow++ (2019).
    """
    if tolerance is not None:
        check_option(f"{_NAME}: tolerance", tolerance, lambda part: 0 < part < 1, "a number between 0 and 1")
    static = tolerance, logits, means, log_scales
    given = "logits, means, log_scales" if means is not None else "parameters"
    forward, inverse = partial(_forward, *static), partial(_inverse, *static)
    return elementwise(forward, inverse, f"{_NAME}({given})", log_det=partial(_log_det, *static))


def mixture_cdf(
    logits: Tensor, means: Tensor | None = None, log_scales: Tensor | None = None, *, tolerance: float | None = None
) -> Invertible:
    r"""The cumulative distribution function of a mixture of logistics: ``chain(mixture_logit(...), sigmoid())``.

    .. math:: y = F(x) = \sum_k \pi_k\, \sigma\!\left(\frac{x - \mu_k}{s_k}\right), \qquad
        \log|\det J| = \sum \log f(x)

    Args:
        logits: Unnormalised logarithms of the weights, or all parameters in one tensor; see `mixture_logit`.
        means: The means of the K components.
        log_scales: The logarithms of their scales.
        tolerance: See `mixture_logit`.

    Shapes:
        x of any shape and floating-point dtype; each parameter ``(*x.shape, K)``, or what broadcasts to it, of any
        floating-point dtype: computed in the widest of them, and at least in float32.

    Domain:
        All numbers; the range is 0 < y < 1, near whose end the numbers are sparse: see `sigmoid`. In a network,
        `mixture_logit` does not saturate.

    Cost:
        That of `mixture_logit`, and a sigmoid, whose input is kept where it is lowered.

    Raises:
        WireError: When the numbers of parameters do not fit each other, or their shapes do not fit x.
        DomainError: Under ``inv.debug(True)``, by the inverse of a y outside of the range.

    Example:
        >>> mixture_cdf(torch.zeros(2), torch.tensor([-1.0, 1.0]), torch.zeros(2))(torch.tensor([0.0, 3.0]))
        tensor([0.5000, 0.9314])

    Source:
        Ho et al., Flow++ (2019).
    """
    given = "logits, means, log_scales" if means is not None else "parameters"
    inner = mixture_logit(logits, means, log_scales, tolerance=tolerance)
    return named(chain(inner, sigmoid()), f"mixture_cdf({given})")
