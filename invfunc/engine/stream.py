"""The dtype of the stream: what autocast makes of a stem must not decide how finely a chain is rebuilt.

NOTE [Stream] A linear layer under autocast returns half precision. Where it is the stem of a chain, each coupling
behind it adds in half precision, and its inverse loses what that rounds away.

1.  With ``stream=dtype`` what enters the stages that are rebuilt is made at least that wide: the input of a pipeline,
    and what a `one_way` stage returns. What a head returns is not. A stage in between is as wide as its law makes it.
2.  It is the op that changes, and not the engine. So values are the same in every mode, and without gradients.
3.  Without the option, a chain warns whose stem has made its stream narrow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.op import Chain, Invertible, OneWay, name_of
from ..errors import DriftWarning
from ..wires import Wire, is_differentiable, leaves, map_wire

_HALVES = torch.bfloat16, torch.float16


def widen(x: Wire, dtype: torch.dtype) -> Wire:
    """A wire whose tensors are at least as wide as a dtype."""
    return map_wire(lambda leaf: leaf.to(_at_least(leaf, dtype)) if is_differentiable(leaf) else leaf, x)


def _at_least(leaf: Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(leaf.dtype, dtype)


@dataclass(frozen=True)
class Widened:
    """A function whose result is at least as wide as a dtype."""

    fn: Callable[..., Any]
    dtype: torch.dtype

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function."""
        return (self.fn,)

    def __call__(self, *x: Wire) -> Wire:
        return widen(self.fn(*x), self.dtype)

    @property
    def __name__(self) -> str:
        return name_of(self.fn)


def with_stream(op: Invertible, dtype: torch.dtype) -> Invertible:
    """An op whose stems return at least a dtype: rule 1 of NOTE [Stream]."""
    if not isinstance(op, Chain):
        return op
    return Chain(tuple([_wide(part, dtype) if is_stem(op, i) else part for i, part in enumerate(op.parts)]), op.labels)


def _wide(stem: Any, dtype: torch.dtype) -> Invertible:
    return OneWay(Widened(stem.fn, dtype)) if isinstance(stem, OneWay) else replace(stem, op=_wide(stem.op, dtype))


def is_stem(op: Chain, index: int) -> bool:
    """Whether a stream begins behind this part of a chain."""
    behind = index + 1
    return behind < len(op.parts) and is_one_way(op.parts[index]) and not is_one_way(op.parts[behind])


def is_one_way(op: Any) -> bool:
    """Whether an op is a `one_way` stage, marked or not."""
    return isinstance(op, OneWay) or (hasattr(op, "mark") and is_one_way(op.op))


def warn_if_narrow(op: Chain, index: int, x: Wire) -> None:
    """Warn where autocast has made a stem's result half precision."""
    if not any([getattr(leaf, "dtype", None) in _HALVES for leaf in leaves(x)]):
        return
    what = f"{op.place(index)} makes the stream half precision under autocast, and every stage behind it rounds to that"
    warnings.warn(DriftWarning(f"{what}; pass checkpoint(..., stream=torch.float32)"), stacklevel=2)
