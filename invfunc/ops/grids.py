"""Residual blocks that are undone to the bit: two positions on a grid, mixed by powers of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.combine import swap
from ..core.couple import Half, Law, match, sum_per_sample
from ..core.op import Invertible, Residue, chain, name_of, named, pair
from ..core.packing import pack_bits, unpack_bits
from ..core.precision import at_least
from ..errors import OptionError, WireError, check_option
from ..wires import Wire, describe

SPACING = 2.0**-9
"""Nine bits behind the point."""


def on_grid(x: Tensor, spacing: float = SPACING) -> Tensor:
    r"""A tensor rounded to the multiples of ``spacing``; the gradient goes straight through.

    .. math:: Q(x) = spacing \cdot round(x / spacing), \qquad \partial Q = 1

    Args:
        x: In float32 or float64: a grid needs more digits than half precision has.
        spacing: A power of two.

    Raises:
        WireError: When the dtype is another one.

    Example:
        >>> on_grid(torch.tensor([0.3, 0.6]), 0.5)
        tensor([0.5000, 0.5000])
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise WireError(
            f"on_grid received {str(x.dtype).removeprefix('torch.')}",
            expected="float32 or float64",
            cure="keep the stream in float32: autocast computes the branches in half precision",
        )
    at = x.detach()
    return x + torch.round(at / spacing).mul_(spacing).sub_(at)  # exact: r - x and x + (r - x) round nothing


@dataclass(frozen=True)
class OnGrid:
    """``x -> Q(step * fn(x))``."""

    fn: Callable[..., Any]
    spacing: float
    step: float = 1.0

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, x: Tensor, *given: Any) -> Tensor:
        t = _checked(self.fn(x, *given), x)
        return on_grid((t if self.step == 1 else self.step * t).to(x.dtype), self.spacing)

    @property
    def __name__(self) -> str:
        return name_of(self.fn)


@dataclass(frozen=True)
class Mixed:
    """``x -> (gamma, Q((1 - gamma) x + (1 + gamma) fn(x)))``, with a gamma drawn for each sample."""

    fn: Callable[..., Any]
    gammas: tuple[float, ...]
    spacing: float
    batch_dim: int

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        gamma = self.draw(x)
        t = _checked(self.fn(x, *given), x)
        return gamma, on_grid(((1 - gamma) * x + (1 + gamma) * t).to(x.dtype), self.spacing)

    def draw(self, x: Tensor) -> Tensor:
        """A gamma for each sample, of a shape that broadcasts."""
        # Filled there: a copy from the host's memory waits for a device.
        gammas = torch.stack([torch.full((), gamma, dtype=x.dtype, device=x.device) for gamma in self.gammas])
        shape = [size if dim == self.batch_dim else 1 for dim, size in enumerate(x.shape)]
        if len(self.gammas) == 1:
            return gammas.expand(shape)
        return gammas[torch.randint(len(self.gammas), shape, device=x.device)]

    @property
    def __name__(self) -> str:
        return name_of(self.fn)


def _checked(t: Any, x: Tensor) -> Tensor:
    if not isinstance(t, Tensor) or t.shape != x.shape:
        raise WireError(f"f returned {describe(t)}", expected=f"{describe(x)} like its input")
    return t


# ---- the law ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixLaw(Law):
    """``v -> gamma v + u`` on a grid; what gamma, a power of two, shifts out is kept: a few bits of each element."""

    spacing: float
    bits: int
    __name__ = "mix"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def op(self, t: Wire) -> Invertible:
        gamma, u = t
        mix, unmix = partial(self._mix, gamma, u), partial(self._unmix, gamma, u)
        return pair(mix, unmix, log_det=partial(_log_det, gamma), residue=True, name="mix(gamma, u)")

    def apply(self, t: Wire, x: Wire) -> tuple[Wire, Residue]:
        gamma, u = t
        return self._mix(gamma, u, x)

    def undo(self, t: Wire, residue: Residue, y: Wire) -> Wire:
        gamma, u = t
        return self.op(t).inverse(y) if residue is None else self._unmix(gamma, u, residue, y)

    def gradients(self, t: Wire, gy: Wire) -> tuple[Wire, Wire] | None:
        gamma, u = t
        return gamma * gy, (None, match(gy, u))

    def _mix(self, gamma: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Residue]:
        """The bits of x / spacing that the shift would lose are taken off before it, and kept."""
        number = (x.detach() / self.spacing).to(torch.int32 if x.dtype is torch.float32 else torch.int64)
        lost = number & (2**self.bits - 1)
        planes = torch.stack([(lost >> i & 1).bool() for i in range(self.bits)])
        return gamma * (x - lost.to(x.dtype).mul_(self.spacing)) + u, pack_bits(planes)

    def _unmix(self, gamma: Tensor, u: Tensor, residue: Residue, y: Tensor) -> Tensor:
        planes = unpack_bits(residue, (self.bits, *y.shape))
        lost = sum(plane.to(y.dtype) * (self.spacing * 2**i) for i, plane in enumerate(planes))
        return (y - u) / gamma + lost


def _log_det(gamma: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return sum_per_sample(gamma.to(at_least(gamma.dtype)).abs().log().expand(x.shape))


# ---- the op ----------------------------------------------------------------------------------------------------------


def bdia(
    fn: Callable[..., Any],
    gammas: float | Sequence[float] = (0.5, -0.5),
    *,
    spacing: float = SPACING,
    batch_dim: int = 0,
) -> Invertible:
    r"""A residual block between two positions, undone to the bit: the state is ``(previous x, x)``.

    .. math:: x_{+} = \gamma (x_{-} - s\,\delta) + Q\bigl((1 - \gamma) x + (1 + \gamma) f(x)\bigr), \qquad
              s = (x_{-} / \delta) \bmod 2^{k}, \quad |\gamma| = 2^{-k}, \quad Q(t) = \delta \cdot round(t / \delta)

    .. math:: x_{-} = \bigl(x_{+} - Q((1 - \gamma) x + (1 + \gamma) f(x))\bigr) / \gamma + s\,\delta

    Without the rounding: the average, with weights :math:`\gamma` and 1, of an Euler step forwards and one backwards.
    At :math:`\gamma = 0` this is the residual network :math:`x + f(x)`, at 1 the explicit midpoint rule.

    - Gammas of plus or minus one half, drawn for each sample and call, are BDIA. Their mean is 0, and that of a step is
      the residual network's: *evaluate the residual network itself* (the authors keep its rounding to the grid).
    - One small gamma, :math:`2^{-k}`, starts near the function of pretrained weights, at k bits for each element and
      block. The difference to the residual network is proportional to gamma.

    Args:
        fn: The residual branch f, any callable or module.
        gammas: One number, or those that are drawn from; each plus or minus a power of two, from 2^-8 to 1/2.
        spacing: The grid's :math:`\delta`, a power of two.
        batch_dim: The dim that counts samples: 1 where positions come first, as in torch's ``batch_first=False``.

    Shapes:
        ``((N, ...), (N, ...))``, both of one shape, unchanged; float32 or float64.

    Domain:
        Pairs on the grid, as `on_grid` makes them; elements below :math:`2^{23} \delta` in float32 (16384 by default).

    Cost:
        The inverse evaluates f once, and is exact. Lowered: k bits are kept for each element, one bit by default; f is
        evaluated exactly twice in a training step.

    Log-determinant:
        Of the map without its rounding: :math:`\sum \log|\gamma|` over the elements of :math:`x_{-}`.

    Raises:
        OptionError: When a gamma or the spacing is no such power of two.
        WireError: When f returns another shape than it was given, or the dtype is half precision.

    Limits:
        The gradient goes straight through the rounding. The inverse needs its residue, as an op alone.

    Example:
        >>> op = bdia(torch.sin, 0.5)
        >>> x = on_grid(torch.tensor([0.3])), on_grid(torch.tensor([0.7]))
        >>> y, bits = op.forward_with_residue(x)
        >>> [torch.equal(a, b) for a, b in zip(op.inverse_with_residue(bits, y), x)]
        [True, True]

    Source:
        Zhang, Lewis and Kleijn, On Exact Bit-level Reversible Transformers Without Changing Architectures (2025). Gal
        et al., Reversing Large Language Models for Efficient Training and Fine-Tuning (2025), for one gamma, with a
        step h in the place of :math:`1 + \gamma`.
    """
    found = (gammas,) if isinstance(gammas, (int, float)) else tuple(gammas)
    bits = max([_exponent("bdia: gamma", abs(gamma), 1, 8) for gamma in found], default=0)
    if not found:
        raise OptionError("bdia: gammas is empty", expected="one number or more")
    check_option("bdia: batch_dim", batch_dim, lambda dim: dim >= 0, "0, 1, 2, ...")
    _exponent("bdia: spacing", spacing, 0, 52)
    half = Half(Mixed(fn, found, spacing, batch_dim), MixLaw(spacing, bits), 0, "f")
    return named(chain(half, swap()), f"bdia({name_of(fn)}, {', '.join(f'{gamma:g}' for gamma in found)})")


def _exponent(subject: str, value: float, least: int, most: int) -> int:
    """K of 2^-k."""
    mantissa, exponent = math.frexp(value)
    if mantissa != 0.5 or not least <= 1 - exponent <= most:
        raise OptionError(f"{subject} is {value:g}", expected=f"a power of two from 2^-{most} to 2^-{least}")
    return 1 - exponent
