"""The engine below a `torch.func` transform: one explicit autograd Function for each primitive; see NOTE [Strands]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..core.couple import Half
from ..core.op import Invertible, Residue
from ..errors import ReplayError
from ..wires import Wire, is_differentiable, leaves, map_wire
from .interface import Place, Run
from .parts import Parts, is_lazy
from .strands import (
    OnStrands,
    State,
    Strand,
    begin,
    build_wire,
    build_wire_from,
    carriers,
    keep,
    needs_gradient,
    outline,
    residue_spec_of,
    spec_of,
    strands,
    tensors_at_strands,
    values,
)
from .watch import Kind, Recording, Replay, check_kinds, narrowed, record_call, slots, tensor_kinds

# ---- the engine -----------------------------------------------------------------------------------------------------


class Functional(OnStrands):
    """Runs pipelines below transforms."""

    def begin(self, x: Wire, run: Run, place: Place) -> State:
        """Open a trunk: values travel back as gradients do, and vmap adds up the gradients of what it does not map."""
        batched = map_wire(lambda leaf: _torch.in_every_vmap(leaf) if is_differentiable(leaf) else leaf, x)
        return super().begin(batched, run, place)

    def call(self, op: Invertible, state: State, run: Run) -> State:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not op.implicit):
            (y, residue), recording = record_call(
                op.forward_with_residue, values(state), op.functions, run.options.preserve_rng_state
            )
        return _on_trunk(op, state, y, residue, recording)

    def move(self, op: Invertible, state: State, run: Run) -> State:
        return self.call(op, state, run)

    def recompute(self, op: Invertible, x: Wire, run: Run, fn: Callable[[Wire], Wire]) -> Wire:
        y, recording = record_call(fn, x, op.functions, run.options.preserve_rng_state)
        if not (recording.captured or any_gradient(x)):
            return y
        xs: list[Tensor] = []
        kept = list(recording.captured)
        x_spec = spec_of(x, xs, kept)
        call, ys = _call(op, recording, kept, x_spec, tensor_kinds(xs), y, None, False)
        call.fn = fn
        out = iter(_Recompute.apply(call, *xs, *kept, *ys))
        return map_wire(lambda leaf: next(out) if is_differentiable(leaf) else leaf, y)


ENGINE = Functional()


def any_gradient(x: Wire) -> bool:
    """Whether a tensor on a wire may get a gradient."""
    return any(isinstance(leaf, Tensor) and needs_gradient(leaf) for leaf in leaves(x))


def refuse_lazy(op: Invertible) -> None:
    """A module whose first call makes its parameters can not make them below a transform: torch itself crashes."""
    if is_lazy(op.functions):
        raise ReplayError(
            f"{op!r} has a lazy module that has not run yet",
            expected="parameters, below a torch.func transform",
            cure="call it once before",
        )


def may_have_gradients(op: Invertible, x: Wire) -> bool:
    """Whether the input needs a gradient, or an op's functions could close over anything that does."""
    if any_gradient(x):
        return True
    parts = Parts(op.functions)
    if parts.is_opaque or any(map(needs_gradient, parts.tensors)):
        return True
    seen: set[int] = set()
    return any(needs_gradient(tensor) for module in parts.roots for _, _, _, tensor, _ in slots(module, seen))


# ---- a stage --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Call:
    """All that is static in a node; an opaque object, so that functorch does not take it apart."""

    op: Invertible
    recording: Recording
    x_spec: Wire  # the structure of x; a leaf is `STRAND`, the place of a kept tensor, or itself
    y_spec: Wire
    residue_spec: Residue
    x_kinds: list[Kind]
    y_kinds: list[Kind]
    carried: bool  # whether x came with carriers
    count_kept: int
    nondifferentiable: tuple[int, ...]  # outputs that depend on nothing differentiable
    count_lost: int = 0  # differentiable tensors of the residue
    fn: Callable[[Wire], Wire] | None = None  # what runs again, of a recomputed op


def _on_trunk(op: Invertible, state: State, y: Wire, residue: Residue, recording: Recording) -> State:
    """Put the node of a recorded primitive on the trunk; without a node where nothing needs a gradient."""
    xs, x = strands(state), values(state)
    needs, carried = [needs_gradient(s.value) for s in xs], any([s.carrier is not None for s in xs])
    if not (carried or recording.captured or any(needs)):
        return begin(y)
    kept, x_kinds = list(recording.captured), tensor_kinds([s.value for s in xs])
    call, ys = _call(op, recording, kept, outline(state), x_kinds, y, residue, carried)
    call.nondifferentiable = _untouched(op, x, needs)
    above = []
    if carried:
        above = [carriers([s.value])[0] if s.carrier is None else s.carrier for s in xs]
    out = _Stage.apply(call, *[s.value for s in xs], *above, *kept, *ys)
    return build_wire(call.y_spec, list(map(Strand, out[: len(ys)], out[len(ys) :])), kept)


def _untouched(op: Invertible, x: Wire, needs: Sequence[bool]) -> tuple[int, ...]:
    """The outputs of a coupling's untouched component that need no gradient."""
    if not isinstance(op, Half) or all(needs):
        return ()
    first = sum(map(is_differentiable, leaves(x[0])))
    untouched = range(first, len(needs)) if op.target == 0 else range(first)
    return tuple(i for i in untouched if not needs[i])


def _call(
    op: Invertible,
    recording: Recording,
    kept: list[Tensor],
    x_spec: Wire,
    x_kinds: list[Kind],
    y: Wire,
    residue: Residue,
    carried: bool,
) -> tuple[Call, list[Tensor]]:
    """The static part of a node, and its outputs; gathers the tensors that it keeps."""
    ys: list[Tensor] = []
    lost: list[Tensor] = []
    y_spec = spec_of(y, ys, kept)
    residue_spec = None if residue is None else residue_spec_of(residue, lost, kept)
    recording.pins = [(name, keep(value, kept)) for name, value in recording.pins]
    y_kinds, count = tensor_kinds(ys), len(kept)
    if y_kinds == x_kinds:
        y_kinds = x_kinds  # one list less for the garbage collector to visit
    kept += lost
    return Call(op, recording, x_spec, y_spec, residue_spec, x_kinds, y_kinds, carried, count, (), len(lost)), ys


# ---- the nodes -------------------------------------------------------------------------------------------------------


class _Stage(torch.autograd.Function):
    """``(call, *xs, *carriers, *kept, *lost, *ys) -> (*ys, *carriers, *lost)``; see NOTE [Strands]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        last = len(tensors) - len(call.y_kinds)
        ys, lost = tensors[last:], tensors[last - call.count_lost : last]
        return (*[y.detach() for y in ys], *carriers(ys), *[r.detach() for r in lost])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.call = call
        first = len(call.x_kinds) * (1 + call.carried)
        ctx.save_for_backward(*tensors[first : first + call.count_kept], *output[2 * len(call.y_kinds) :])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[output[i] for i in call.nondifferentiable])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _pull(ctx, ctx.call, grads)


class _Recompute(torch.autograd.Function):
    """``(call, *xs, *kept, *ys) -> ys``; saves xs, and runs the op again in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.detach() for y in tensors[len(tensors) - len(call.y_kinds) :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.call = call
        ctx.save_for_backward(*tensors[: len(call.x_kinds) + call.count_kept])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output[i] for i in call.nondifferentiable))

    @staticmethod
    def backward(ctx: Any, *gys: Tensor | None) -> tuple[Tensor | None, ...]:
        return _rerun(ctx, ctx.call, gys)


def _pull(ctx: Any, call: Call, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """``(gys, ys) -> (gxs, xs, gkept)``: the backward of a stage."""
    count = len(call.y_kinds)
    grads, saved = _torch.alive(grads), _torch.alive(ctx.saved_tensors)
    kept, lost = saved[: call.count_kept], saved[call.count_kept :]
    y, gy = build_wire(call.y_spec, grads[count : 2 * count], kept), build_wire(call.y_spec, grads[:count], None)
    residue = None if call.residue_spec is None else build_wire_from(call.residue_spec, iter(lost), kept)
    replay, needs = _replay(ctx, call, kept)
    if lost and any([g is not None for g in grads[2 * count :]]):  # rule 7 of NOTE [Strands]
        x = replay.run(call.op.inverse_with_residue, (residue, y))
        _, pull = replay(lambda x: call.op.forward_with_residue(x), (x,), (needs,))
        (gx,) = pull((gy, build_wire(call.residue_spec, grads[2 * count :], None)))
        return _in_argument_order(call, gx, x, replay.finish())
    if any([g is not None for g in grads[:count]]):
        x, gx = call.op.pull(residue, y, gy, replay, needs)
        return _in_argument_order(call, gx, x, replay.finish())
    x = replay.run(call.op.inverse_with_residue, (residue, y)) if call.carried else None
    return _in_argument_order(call, None, x, replay.gradients)


def _rebuilt_leaves(call: Call, x: Wire) -> list[Tensor]:
    """The rebuilt tensors, as narrow as in forward; raises if a shape or dtype differs."""
    found = narrowed([leaf for leaf in leaves(x) if is_differentiable(leaf)], call.x_kinds)
    check_kinds(lambda: f"the inverse of {call.op!r}", found, call.x_kinds)
    return found


def _rerun(ctx: Any, call: Call, gys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """``gys -> (gxs, gkept)``: the backward of a recomputed op."""
    count = len(call.x_kinds)
    saved, gys = _torch.alive(ctx.saved_tensors), _torch.alive(gys)
    xs, kept = saved[:count], saved[count:]
    replay, needs = _replay(ctx, call, kept)
    assert call.fn is not None
    y, pull = replay(call.fn, (build_wire(call.x_spec, xs, kept),), (needs,))
    check_kinds(lambda: f"{call.op!r} on replay", leaves(y), call.y_kinds)
    (gx,) = pull(build_wire(call.y_spec, gys, None))
    return _in_argument_order(call, gx, None, replay.finish())


def _replay(ctx: Any, call: Call, kept: Sequence[Tensor]) -> tuple[Replay, Wire]:
    """The replay of a node's call, and which of the gradients of x are wanted."""
    needed, count = ctx.needs_input_grad[1:], len(call.x_kinds)
    captured = kept[: len(call.recording.captured)]
    wanted = needed[count * (1 + call.carried) :][: len(captured)]
    # under vmap, every input is said to need a gradient
    wanted = [want and is_differentiable(c) for want, c in zip(wanted, captured, strict=True)]
    inverse = call.op.inverse_with_residue, call.x_kinds
    replay = Replay(call.recording, captured, wanted, kept, rebuilds=call.carried, inverse=inverse)
    return replay, build_wire(call.x_spec, needed[:count], None)


def _in_argument_order(call: Call, gx: Wire, x: Wire, gcaptured: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of apply's arguments."""
    gxs = tensors_at_strands(call.x_spec, gx) if gx is not None else [None] * len(call.x_kinds)
    xs = _rebuilt_leaves(call, x) if call.carried else []
    rest = [None] * (call.count_kept - len(gcaptured) + call.count_lost)
    return (None, *gxs, *xs, *gcaptured, *rest, *[None] * len(call.y_kinds))
