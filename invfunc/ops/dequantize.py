"""Whole numbers made continuous, so that a density can be that of images: noise is added, and the inverse rounds down.

It is no bijection: its log-determinant is a term of a lower bound, and what it makes depends on a draw.
"""

from __future__ import annotations

import math
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint import mark
from ..core.couple import sum_per_sample
from ..core.op import Invertible, named, pair
from ..core.precision import at_least, check_real, exactly
from ..debug import require
from ..errors import WireError, check_option
from ..wires import describe, is_differentiable
from .shape import check_tensor


class Noise(Protocol):
    """A density between 0 and 1 that reads a context, such as a flow."""

    def rsample(self, shape: Any = (), context: Any = None) -> Any: ...  # noqa: D102 - of `flow`

    def log_prob(self, x: Any, context: Any = None) -> Tensor: ...  # noqa: D102


def _reads_context(noise: Any) -> bool:
    """Whether it can be called as `Noise` is; raises where it has no such methods."""
    if not (hasattr(noise, "rsample") and hasattr(noise, "log_prob")):
        return False
    signature(noise.rsample).bind(context=None)
    signature(noise.log_prob).bind(None, context=None)
    return True


def _margin(levels: int, x: Any) -> float:
    """How far noise stays from 0 and 1, so that no sum is rounded to the next whole number."""
    check_tensor("dequantize", x)
    margin = 2 * levels * torch.finfo(x.dtype).eps if x.is_floating_point() else 1
    if margin < 1 / 16:
        return margin
    raise WireError(
        f"dequantize received {describe(x)} of {x.dtype}",
        expected=f"floating-point numbers that tell {levels} levels and noise apart",
        cure="pass images.float(), and keep autocast behind it",
    )


def _is_level(x: Tensor, levels: int) -> Tensor:
    return (x == x.floor()) & (x >= 0) & (x < levels)


def _levels_of(levels: int, x: Tensor) -> Tensor:
    """x, and NaN where it is no level; a sum, for which backward needs nothing."""
    return x + torch.zeros_like(x).masked_fill(~_is_level(x, levels), math.nan)


def _add_noise(levels: int, noise: Noise | None, x: Tensor) -> Tensor:
    margin = _margin(levels, x)
    require("dequantize", x, _is_level, f"whole numbers from 0 to {levels - 1}", "round them, or divide", levels)
    drawn = torch.rand_like(x) if noise is None else _drawn(noise.rsample(context=x / levels), x)
    known = _levels_of(levels, x)
    return exactly(lambda x, drawn: (x + margin + (1 - 2 * margin) * drawn) / levels, known, drawn)


def _drawn(found: Any, x: Tensor) -> Tensor:
    """What the noise has drawn."""
    if isinstance(found, Tensor) and found.shape == x.shape and is_differentiable(found):
        return found
    raise WireError("dequantize: the noise's rsample(context=...)", expected=describe(x), got=describe(found))


def _round_down(levels: int, y: Tensor) -> Tensor:
    check_real("the inverse of dequantize: the input", y)
    return (levels * y).floor().clamp(0, levels - 1) + 0 * y.detach()  # NaN of infinity


def _bound(levels: int, noise: Noise | None, x: Tensor, y: Tensor) -> Tensor:
    """``-log q(u | x)`` of the noise in y, and the scale."""
    margin = _margin(levels, x)
    scale = x.shape[1:].numel() * (math.log(1 - 2 * margin) - math.log(levels))
    if noise is None:
        return sum_per_sample(0 * _levels_of(levels, x.detach())) + scale
    edge = torch.finfo(x.dtype).eps
    drawn = ((levels * y - x - margin) / (1 - 2 * margin)).clamp(edge, 1 - edge)
    found = noise.log_prob(drawn, context=x / levels)
    if not is_differentiable(found):
        raise WireError(
            "dequantize: the noise's log_prob(...)", expected="a number for each sample", got=describe(found)
        )
    return scale - found.to(at_least(x.dtype))


def dequantize(levels: int = 256, noise: Noise | None = None) -> Invertible:
    r"""Whole numbers made continuous by noise, for densities of images; the inverse rounds down.

    .. math:: y = (x + u) / K, \quad u \sim q(u \mid x), \qquad x = \lfloor K y \rfloor, \qquad
        \log P(x) \ge E_q [\log p(y) - \log q(u \mid x)] - D \log K

    Args:
        levels: K; x has whole numbers from 0 to K - 1.
        noise: q, a density between 0 and 1: a `flow` that reads ``x / levels`` as its context, trained with the rest,
            for variational dequantization. Uniform noise without it.

    Shapes:
        ``(N, ...)``, unchanged, D numbers in each sample, of a dtype with :math:`2 K \epsilon < 1/16`: float64 and
        float32 for any image, float16 for up to 31 levels, bfloat16 for up to 3.

    Domain:
        Whole numbers from 0 to K - 1; of others, NaN. The range is what lies between 0 and 1; of what is beyond, as the
        samples of a flow may be that ends without a logit, the inverse makes the nearest level.

    Cost:
        A draw of the noise, and for a flow one evaluation more for its density. Lowered: x is kept, which is the data,
        and backward draws the same noise again.

    Log-determinant:
        :math:`-\log q(u \mid x) - D \log K`: what makes `flow` a bound on the probability of x. It is one draw's
        estimate, the exponential of which has that probability as its mean, but for the margin below.

    Raises:
        OptionError: When there are fewer than two levels, or the noise is no density.
        WireError: When the dtype can not tell levels and noise apart, as half precision those of 256, or the noise
            draws no tensor of the shape of x, or has no density for each sample.
        DomainError: Under ``inv.debug(True)``, when x has other numbers.

    Limits:
        Noise stays :math:`2 K \epsilon` away from 0 and 1, 6e-5 for 256 levels in float32, so that rounding never
        reaches another level; the bound counts it.

    Example:
        >>> import torch, invfunc as inv
        >>> op = dequantize(17)
        >>> x = torch.tensor([[0.0, 3.0, 16.0]])
        >>> torch.equal(op.inverse(op(x)), x)
        True
        >>> uniform = inv.flow(op, torch.distributions.Uniform(torch.zeros(3), 1.0))
        >>> bits = -uniform.log_prob(x) / (3 * torch.tensor(2.0).log())
        >>> bits
        tensor([4.0875])

    Source:
        Theis et al., A note on the evaluation of generative models (2016), uniform; Ho et al., Flow++ (2019),
        variational.
    """
    check_option(
        "dequantize: levels", levels, lambda levels: levels >= 2 and levels == int(levels), "2 or more, and whole"
    )
    if noise is not None:
        check_option("dequantize: noise", noise, _reads_context, "a density that reads a context: a flow")
    to, fro = partial(_add_noise, levels, noise), partial(_round_down, levels)
    label = f"dequantize({levels}{'' if noise is None else f', {noise!r}'})"
    return named(mark(pair(to, fro, log_det=partial(_bound, levels, noise), name=label), "recompute"), label)
