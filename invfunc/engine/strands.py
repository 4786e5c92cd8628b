"""Strands: a pipeline as a chain of explicit autograd Functions, below a `torch.func` transform or in a traced graph.

NOTE [Strands] One node for each primitive, linked by carriers, closed by a tail.

1.  A *stage* runs outside of autograd, once, while it is watched. Its outputs are handed to its node as inputs whose
    gradient is None and come back as views: no user code runs inside a Function, and every functorch level unwraps
    them by itself. Saved are captured tensors and residues, nothing of the size of an activation.
2.  A *carrier* is a one-element stand-in, expanded to the shape of an output. Its *gradient* is that output's value:
    backward receives ``(gys, ys)`` and returns ``(gxs, xs)``, so the values travel down the trunk as the gradients do,
    without shared state, and every backward rebuilds them afresh.
3.  The *tail* is the only node that saves activations: the trunk's output. Its backward starts the rebuild. It saves
    its *outputs*: a second backward then flows through the tail, which hands out the values again.
4.  Carriers are private. Each is used once; a trunk is closed before a value leaves it and a new one is begun after.
5.  The tail returns ``y.detach()``: a view would forbid ``y.relu_()``, while detach shares the version counter, so that
    a changed output raises in backward instead of giving wrong gradients.
6.  Backward uses ``torch.func.vjp``: ``autograd.grad(create_graph=True)`` would walk through the saved output into the
    same node without end.
7.  A residue that may have a gradient is an *output* of its stage and saved as one, so that a second backward, to which
    it is a function of x like y itself, goes through the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch
from ..core.op import Invertible, Residue
from ..errors import ReplayError
from ..wires import Wire, describe, is_differentiable, leaves
from .interface import Engine, Place, Run

# ---- what flows along a trunk --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Strand:
    """A tensor on its way through a trunk, with the carrier that will bring its value back."""

    value: Tensor
    carrier: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """The tensor's, for error messages."""
        return self.value.shape


State = Any  # a wire whose differentiable tensors are strands


def begin(x: Wire) -> State:
    """Open a trunk: no carriers yet, since nobody upstream needs the values of x."""
    return map_state(lambda leaf: Strand(leaf, None) if is_differentiable(leaf) else leaf, x)


def values(state: State) -> Wire:
    """The wire that a state stands for."""
    return map_state(lambda leaf: leaf.value if isinstance(leaf, Strand) else leaf, state)


def strands(state: State) -> list[Strand]:
    """The strands of a state, left to right."""
    if isinstance(state, tuple):
        return [strand for part in state for strand in strands(part)]
    return [state] if isinstance(state, Strand) else []


def map_state(fn: Callable[[Any], Any], state: State) -> Any:
    """Apply ``fn`` to every leaf of a state."""
    if isinstance(state, tuple):
        return tuple([map_state(fn, part) for part in state])
    return fn(state)


def close(state: State) -> Wire:
    """Close a trunk: the tail saves its outputs, and hands out ordinary tensors."""
    open_ends = [s for s in strands(state) if s.carrier is not None]
    if not open_ends:
        return values(state)
    closed = iter(Tail.apply(*(s.value for s in open_ends), *(s.carrier for s in open_ends)))
    return map_state(
        lambda leaf: leaf if not isinstance(leaf, Strand) else leaf.value if leaf.carrier is None else next(closed),
        state,
    )


# ---- carriers and the tail -----------------------------------------------------------------------------------------


def carriers(ys: Iterable[Tensor]) -> list[Tensor]:
    """A one-element stand-in of the shape of each value."""
    return [y.new_zeros(()).expand(y.shape) for y in ys]


class Tail(torch.autograd.Function):
    """``(*ys, *carriers) -> ys``; saves them, and hands them to the carriers in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.detach() for y in tensors[: len(tensors) // 2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)
        half = len(inputs) // 2
        ctx.mark_non_differentiable(*(o for o, y in zip(output, inputs[:half], strict=True) if not needs_gradient(y)))

    @staticmethod
    def backward(ctx: Any, *gys: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*gys, *ctx.saved_tensors)


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a tensor may get a gradient: it requires one, or belongs to a transform."""
    return tensor.requires_grad or (_torch.active() and _torch.is_wrapped(tensor))


# ---- specs: the structure of a wire without its tensors --------------------------------------------------------------


class _Strand:
    """The place of a differentiable tensor in a spec."""

    def __repr__(self) -> str:
        return "STRAND"


STRAND = _Strand()


class Held(NamedTuple):
    """The place of a tensor among those that a node keeps."""

    place: int


def fetch(leaf: Any, kept: Sequence[Tensor]) -> Any:
    """A kept tensor by its place; anything else is itself."""
    return kept[leaf.place] if isinstance(leaf, Held) else leaf


def spec_of(wire: Wire, on_strands: list[Tensor], kept: list[Tensor] | None) -> Wire:
    """The structure of a wire; collects its differentiable tensors, and the others to be kept."""
    if is_differentiable(wire):
        on_strands.append(wire)
        return STRAND
    if isinstance(wire, tuple):
        return tuple([spec_of(part, on_strands, kept) for part in wire])
    return None if kept is None else keep(wire, kept)


def outline(state: State) -> Wire:
    """The spec of the wire that a state stands for, without its other leaves."""
    return map_state(lambda leaf: STRAND if isinstance(leaf, Strand) else None, state)


def residue_spec_of(residue: Residue, lost: list[Tensor], kept: list[Tensor]) -> Residue:
    """The structure of a residue; what may have a gradient of its own is lost by the op, the rest is kept."""
    if isinstance(residue, (tuple, list)):
        return tuple([residue_spec_of(part, lost, kept) for part in residue])
    if is_differentiable(residue):
        lost.append(residue)
        return STRAND
    return keep(residue, kept)


def keep(leaf: Any, kept: list[Tensor]) -> Any:
    """What stands for a leaf in a spec: the place of a tensor, which is kept, or the leaf itself."""
    if not isinstance(leaf, Tensor):
        return leaf
    kept.append(leaf)
    return Held(len(kept) - 1)


def build_wire(spec: Wire, found: Sequence[Any], kept: Sequence[Tensor] | None) -> Wire:
    """A wire from its spec; without kept tensors, None stands where no strand is."""
    return build_wire_from(spec, iter(found), kept)


def tensors_at_strands(spec: Wire, wire: Wire) -> Sequence[Any]:
    """What a wire has where its spec has tensors; the inverse of `build_wire`."""
    found, places = leaves(wire), leaves(spec)
    if len(found) != len(places):
        raise ReplayError(
            f"a pullback returned the gradient {describe(wire)}",
            expected=f"{len(places)} leaves, as the input of its op has",
            cure="return one gradient, or None, for each component",
        )
    return [leaf for leaf, place in zip(found, places, strict=True) if place is STRAND]


def build_wire_from(spec: Wire, left: Iterator[Any], kept: Sequence[Tensor] | None) -> Wire:
    """`build_wire`, from what an iterator has left."""
    if spec is STRAND:
        return next(left)
    if isinstance(spec, tuple) and not isinstance(spec, Held):
        return tuple([build_wire_from(part, left, kept) for part in spec])
    return None if kept is None else fetch(spec, kept)


# ---- what the two engines share --------------------------------------------------------------------------------------


class OnStrands(Engine):
    """Runs pipelines on strands: a wire whose leaves have carriers is the state."""

    closes_together = True

    def begin(self, x: Wire, run: Run, place: Place) -> State:
        return begin(x)

    def close(self, state: State) -> Wire:
        return close(state)

    def wire(self, state: State) -> Wire:
        return values(state)

    def opens(self, state: State) -> bool:
        return all([strand.carrier is None for strand in strands(state)])

    def route(self, op: Any, state: State) -> State:
        return op.forward_fn(state)

    def fork(self, op: Any, state: State, step: Callable[[Invertible, State], State], run: Run) -> State:
        return op._each(step, state)
