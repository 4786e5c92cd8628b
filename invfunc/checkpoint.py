"""The transformer: `checkpoint` lowers a pipeline, or any plain function, into memory-freeing autograd nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .invertible import Invertible, Residue, lift
from .lowering import Options, State, lower, walk
from .wires import Wire


@dataclass(frozen=True, repr=False)
class Checkpointed(Invertible):
    """A lowered op; built by `checkpoint`."""

    op: Invertible
    options: Options = Options()

    def forward(self, x: Wire) -> Wire:
        return lower(self.op, x, self.options)

    def inverse(self, y: Wire) -> Wire:
        return lower(self.op.inverted(), y, self.options)

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        return self.op.forward_with_residue(x)

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        return self.op.inverse_with_residue(residue, y)

    def pull(self, residue, y, gy, vjp, needs):
        return self.op.pull(residue, y, gy, vjp, needs)

    def inverted(self) -> Invertible:
        return Checkpointed(self.op.inverted(), self.options)

    @property
    def parts(self) -> tuple[Invertible, ...]:
        return (self.op,)

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return self.op.functions

    def __repr__(self) -> str:
        return f"checkpoint({self.op!r})"


@walk.register
def _(op: Checkpointed, state: State, options: Options) -> State:
    return walk(op.op, state, options)


def checkpoint(op: Invertible | Callable[..., Any]) -> Invertible:
    """Lower."""
    op = lift(op)
    return op if isinstance(op, Checkpointed) else Checkpointed(op)
