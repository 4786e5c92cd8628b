"""Maps into a larger space, whose inverse is a projection: it undoes them, and loses what lies off their range.

So the inverse is one to one on the range only. Lowered, it can not be trusted to give its own input back: a chain that
pads, works on all that there is, and crops would be rebuilt with the padding in place of what was cropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.op import Invertible, OneWay, Pair, Residue
from ..wires import Wire


@dataclass(frozen=True, repr=False)
class Embedding(Pair):
    """A primitive into a larger space; built by `embedding`."""

    def inverted(self) -> Invertible:
        return Projection(self)


@dataclass(frozen=True, repr=False)
class Projection(OneWay):
    """The inverse of an embedding, which comes after it: a one-way stage, so that what it receives is stored."""

    fn: Embedding  # pyright: ignore[reportIncompatibleMethodOverride]

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        return self.fn.inverse_with_residue(None, x), None

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        return self.fn.forward_with_residue(y)[0]

    def inverted(self) -> Invertible:
        return self.fn

    def __repr__(self) -> str:
        return f"invert({self.fn!r})"


def embedding(
    forward: Callable[..., Any],
    inverse: Callable[..., Any],
    *,
    pullback: Callable[..., Any] | None = None,
    residue: bool = False,
    name: str,
) -> Invertible:
    """A `pair` of which only ``inverse(forward(x)) = x`` holds: it has no log-determinant, and its inverse is stored.

    Args:
        forward: ``x -> y``, into a larger space.
        inverse: ``y -> x``, for every y.
        pullback: As in `pair`.
        residue: As in `pair`.
        name: What ``repr`` and error messages show.

    Example:
        >>> import torch
        >>> twice = embedding(lambda x: torch.cat([x, x]), lambda y: y[: len(y) // 2], name="twice()")
        >>> twice.inverse(twice(torch.ones(2)))
        tensor([1., 1.])
        >>> ~twice
        invert(twice())
    """
    return Embedding(forward, inverse, pullback, None, residue, name)
