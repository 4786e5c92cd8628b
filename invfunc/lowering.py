"""Lowering: a pipeline as autograd nodes that keep no activations. The only ``torch.autograd.Function``s are here.

NOTE [Trunk] One node for each primitive, linked by carriers, closed by a tail.

1.  A *stage* runs outside of autograd, once, while it is recorded. Its outputs are handed to `_Stage` as inputs whose
    gradient is None and come back as views: no user code runs inside a Function, and every functorch level unwraps
    them by itself. Saved are captured tensors and residues, nothing of the size of an activation.
2.  A *carrier* is a one-element stand-in, expanded to the shape of an output. Its *gradient* is that output's value:
    backward receives ``(gys, ys)`` and returns ``(gxs, xs)``, so the values travel down the trunk as the gradients do,
    without shared state, and every backward rebuilds them afresh.
3.  The *tail* is the only node that saves activations: the trunk's output. Its backward starts the reconstruction.
4.  Carriers are private. Each is used once; a trunk is closed before a value leaves it and a new one is begun after.
5.  The tail saves its *outputs*: a second backward then flows through the tail, which hands out the values again.
6.  The tail returns ``y.detach()``: a view would forbid ``y.relu_()``, while detach shares the version counter, so that
    a changed output raises in backward instead of giving wrong gradients.
7.  When gradients must be differentiable, or belong to a transform, backward uses ``torch.func.vjp``:
    ``autograd.grad(create_graph=True)`` would walk through the saved output into the same node without end.
8.  Forward mode needs nothing kept: the pipeline runs plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from .combinators import Half, Parallel, Plumbing
from .errors import ReplayError, place_error
from .invertible import Chain, Invertible, OneWay, Residue
from .replay import Kept, Owners, Recording, Replay, fetch, owners, recorded
from .wires import Wire, is_differentiable, leaves, map_wire, spread, unflatten

# ---- what flows along a trunk --------------------------------------------------------------------------------------


class Strand(NamedTuple):
    """A tensor on its way through a trunk, with the carrier that will bring its value back."""

    value: Tensor
    carrier: Tensor | None


State = Any  # a wire whose differentiable tensors are strands


def begin(x: Wire) -> State:
    """Open a trunk: no carriers yet, since nobody upstream needs the values of x."""
    return _map_state(lambda leaf: Strand(leaf, None) if is_differentiable(leaf) else leaf, x)


def values(state: State) -> Wire:
    """The wire that a state stands for."""
    return _map_state(lambda leaf: leaf.value if isinstance(leaf, Strand) else leaf, state)


def strands(state: State) -> list[Strand]:
    """The strands of a state, left to right."""
    if isinstance(state, Strand):
        return [state]
    return [strand for part in state for strand in strands(part)] if isinstance(state, tuple) else []


def _map_state(fn: Callable[[Any], Any], state: State) -> Any:
    if isinstance(state, tuple) and not isinstance(state, Strand):
        return tuple(_map_state(fn, part) for part in state)
    return fn(state)


def close(state: State) -> Wire:
    """Close a trunk: the tail saves its outputs, and hands out ordinary tensors."""
    open_ends = [s for s in strands(state) if s.carrier is not None]
    if not open_ends:
        return values(state)
    closed = iter(_Tail.apply(*(s.value for s in open_ends), *(s.carrier for s in open_ends)))
    return _map_state(
        lambda leaf: leaf if not isinstance(leaf, Strand) else leaf.value if leaf.carrier is None else next(closed),
        state,
    )


# ---- the walk over the structure -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How a pipeline is lowered."""

    preserve_rng_state: bool = True


def lower(op: Invertible, x: Wire, options: Options) -> Wire:
    """Run an op so that its activations are freed and rebuilt in backward."""
    if runs_plainly():
        return op.forward(x)
    return close(walk(op, begin(x), options))


def runs_plainly() -> bool:
    """Whether nothing has to be kept: no gradients, or forward mode (rule 8 of NOTE [Trunk])."""
    return not torch.is_grad_enabled() or _in_forward_mode()


def _in_forward_mode() -> bool:
    if forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.maybe_current_level() is None:
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(interpreter.key() == TransformType.Jvp for interpreter in stack)


@singledispatch
def walk(op: Invertible, state: State, options: Options) -> State:
    """Send a state through an op: a primitive is a stage."""
    return stage(op, state, options)


@walk.register
def _(op: Chain, state: State, options: Options) -> State:
    index = 0
    try:
        for index, part in enumerate(op.parts):
            state = walk(part, state, options)
    except Exception as error:
        place_error(error, op.place(index))
        raise
    return state


@walk.register
def _(op: Parallel, state: State, options: Options) -> State:
    return op._each(lambda part, state: walk(part, state, options), state)


@walk.register
def _(op: Plumbing, state: State, options: Options) -> State:
    return op.forward_fn(state)


@walk.register
def _(op: OneWay, state: State, options: Options) -> State:
    return begin(spread(op.fn, close(state)))


# ---- stages ----------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """All that is static in a stage; an opaque object, so that functorch does not take it apart."""

    op: Invertible
    recording: Recording
    x_spec: Wire  # structure of x: True where a leaf is on a strand
    y_spec: Wire  # structure of y: a leaf that is not on a strand, or _STRAND, or the place of a kept tensor
    residue_spec: Residue
    x_shapes: list[torch.Size]
    carried: bool
    count_x: int
    count_kept: int
    count_y: int
    dead: tuple[int, ...]  # outputs that depend on nothing differentiable


_STRAND = object()


def stage(op: Invertible, state: State, options: Options) -> State:
    """Run a primitive, recorded, and put its node on the trunk; without a node where nothing needs a gradient."""
    x = values(state)
    (y, residue), recording = recorded(
        op.forward_with_residue, x, owners_of(op), randomness=options.preserve_rng_state
    )
    xs = strands(state)
    carried = any(s.carrier is not None for s in xs)
    if not (carried or recording.captured or any(_needs_gradient(s.value) for s in xs)):
        return begin(y)
    kept = list(recording.captured)
    y_spec = map_wire(lambda leaf: _STRAND if is_differentiable(leaf) else _keep(leaf, kept), y)
    residue_spec = _map_residue(lambda leaf: _keep(leaf, kept), residue)
    recording.pins[:] = [(name, _keep(value, kept)) for name, value in recording.pins]
    ys = [leaf for leaf in leaves(y) if is_differentiable(leaf)]
    x_spec = _map_state(lambda leaf: isinstance(leaf, Strand), state)
    dead = _dead(op, [_needs_gradient(s.value) for s in xs], ys)
    shapes = [s.value.shape for s in xs]
    call = Call(op, recording, x_spec, y_spec, residue_spec, shapes, carried, len(xs), len(kept), len(ys), dead)
    carriers = [s.carrier if s.carrier is not None else carrier(s.value) for s in xs] if carried else []
    out = _Stage.apply(call, *(s.value for s in xs), *carriers, *kept, *ys)
    linked = map(Strand, out[: len(ys)], out[len(ys) :])
    return map_wire(lambda leaf: next(linked) if is_differentiable(leaf) else leaf, y)


def owners_of(op: Invertible) -> Owners:
    """`owners` of an op's functions, found once for each value."""
    found = op.__dict__.get("_owners")
    if found is None:
        found = op.__dict__["_owners"] = owners(op.functions)
    return found


def carrier(value: Tensor) -> Tensor:
    """A one-element stand-in of the shape of a value."""
    return value.new_zeros(()).expand(value.shape)


def _needs_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _keep(leaf: Any, kept: list[Tensor]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    kept.append(leaf)
    return Kept(len(kept) - 1)


def _map_residue(fn: Callable[[Any], Any], residue: Residue) -> Any:
    if isinstance(residue, (tuple, list)) and not isinstance(residue, Kept):
        return tuple(_map_residue(fn, part) for part in residue)
    return fn(residue)


def _dead(op: Invertible, needs: Sequence[bool], ys: Sequence[Tensor]) -> tuple[int, ...]:
    """Outputs without a gradient: the untouched component of a coupling, when its input has none."""
    if isinstance(op, Half) and len(needs) == len(ys) == 2:
        return () if needs[1 - op.target] else (1 - op.target,)
    return ()


# NOTE: the boundaries of apply's arguments and results are cut here and nowhere else.


class _Stage(torch.autograd.Function):
    """``(call, *xs, *carriers, *kept, *ys) -> (*ys, *carriers)``; see NOTE [Trunk]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ys = tensors[len(tensors) - call.count_y :]
        return (*(y.view_as(y) for y in ys), *map(carrier, ys))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.call = call
        first = call.count_x * (1 + call.carried)
        ctx.save_for_backward(*tensors[first : first + call.count_kept])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output[i] for i in call.dead))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _pull(ctx, ctx.call, grads)


class _Tail(torch.autograd.Function):
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
        ctx.mark_non_differentiable(*(o for o, y in zip(output, inputs[:half], strict=True) if not _needs_gradient(y)))

    @staticmethod
    def backward(ctx: Any, *gys: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*gys, *ctx.saved_tensors)


def _pull(ctx: Any, call: Call, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """``(gys, ys) -> (gxs, xs, gkept)``: the backward of a stage."""
    gys, ys = iter(grads[: call.count_y]), iter(grads[call.count_y :])
    kept = ctx.saved_tensors
    needs, wants = _wanted(ctx, call)
    y = map_wire(lambda leaf: next(ys) if leaf is _STRAND else fetch(leaf, kept), call.y_spec)
    gy = map_wire(lambda leaf: next(gys) if leaf is _STRAND else None, call.y_spec)
    residue = _map_residue(lambda leaf: fetch(leaf, kept), call.residue_spec)
    captured = kept[: len(call.recording.captured)]
    replay = Replay(
        call.recording,
        captured,
        [w and is_differentiable(c) for w, c in zip(wants, captured, strict=False)],
        kept,
        rebuilds=call.carried,
        functional=torch.is_grad_enabled() or torch._C._functorch.maybe_current_level() is not None,
    )
    x, gx, gcaptured = _pull_op(call, replay, residue, y, gy, needs)
    return _arranged(call, x, gx, gcaptured)


def _pull_op(call: Call, replay: Replay, residue: Residue, y: Wire, gy: Wire, needs: list[bool]) -> Any:
    op, need = call.op, unflatten_strands(call.x_spec, needs, False)
    if all(g is None for g in leaves(gy)):
        x = replay.run(op.inverse_with_residue, (residue, y)) if call.carried else None
        return x, None, replay.gradients
    x, gx = op.pull(residue, y, gy, replay, need)
    return x, gx, replay.finish()


def _wanted(ctx: Any, call: Call) -> tuple[list[bool], list[bool]]:
    """Which of xs and of the kept tensors need a gradient."""
    needed = ctx.needs_input_grad[1:]
    first = call.count_x * (1 + call.carried)
    return list(needed[: call.count_x]), list(needed[first : first + call.count_kept])


def unflatten_strands(spec: Wire, found: Sequence[Any], other: Any) -> Wire:
    """A wire of the structure of x from one item for each strand."""
    left = iter(found)
    return map_wire(lambda on_strand: next(left) if on_strand else other, spec)


def _arranged(call: Call, x: Wire, gx: Wire, gcaptured: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of apply's arguments, in order."""
    gxs = _on_strands(call, gx) if gx is not None else [None] * call.count_x
    xs = _rebuilt(call, x) if call.carried else []
    others = call.count_kept - len(gcaptured) + call.count_y
    return (None, *gxs, *xs, *gcaptured, *([None] * others))


def _on_strands(call: Call, wire: Wire) -> list[Any]:
    return [leaf for leaf, on in zip(leaves(wire), leaves(call.x_spec), strict=True) if on]


def _rebuilt(call: Call, x: Wire) -> list[Tensor]:
    """The rebuilt input's tensors, checked against what forward had."""
    found = leaves(x)
    xs = _on_strands(call, x) if len(found) == len(leaves(call.x_spec)) else []
    if [getattr(t, "shape", None) for t in xs] != call.x_shapes:
        raise ReplayError(
            f"the inverse of {call.op!r} returned {[tuple(getattr(t, 'shape', ())) for t in found]}",
            expected=f"{[tuple(s) for s in call.x_shapes]}, as forward received",
            cure="test the op with invfunc.testing.check_laws",
        )
    return xs
