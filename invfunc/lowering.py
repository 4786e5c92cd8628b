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
9.  A residue that may have a gradient is an *output* of its stage and saved as one, so that a second backward, to which
    it is a function of x like y itself, goes through the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial, singledispatch
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import transforms
from .combinators import Half, Parallel, Plumbing
from .errors import DonatedError, ReplayError, place_error
from .invertible import Chain, Invertible, OneWay, Rearrangement, Residue
from .packing import pack_bits, unpack_bits
from .replay import Kept, Kind, Owners, Recording, Replay, check_kinds, fetch, kinds, owners, recorded, slots
from .wires import Wire, is_differentiable, leaves, map_wire

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
    return _map_state(lambda leaf: Strand(leaf, None) if is_differentiable(leaf) else leaf, x)


def values(state: State) -> Wire:
    """The wire that a state stands for."""
    if isinstance(state, tuple):
        return tuple([values(part) for part in state])
    return state.value if isinstance(state, Strand) else state


def strands(state: State) -> list[Strand]:
    """The strands of a state, left to right."""
    if isinstance(state, tuple):
        return [strand for part in state for strand in strands(part)]
    return [state] if isinstance(state, Strand) else []


def _map_state(fn: Callable[[Any], Any], state: State) -> Any:
    if isinstance(state, tuple):
        return tuple([_map_state(fn, part) for part in state])
    return fn(state)


def close(state: State) -> Wire:
    """Close a trunk: the tail saves its outputs, and hands out ordinary tensors."""
    open_ends = [s for s in strands(state) if s.carrier is not None]
    if not open_ends:
        return values(state)
    closed = iter(_apply(_Tail, *(s.value for s in open_ends), *(s.carrier for s in open_ends)))
    return _map_state(
        lambda leaf: leaf if not isinstance(leaf, Strand) else leaf.value if leaf.carrier is None else next(closed),
        state,
    )


# ---- the walk over the structure -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How a pipeline is lowered; see `invfunc.checkpoint`."""

    mode: str = "invert"
    segments: int | tuple[int, ...] = 1
    donate: bool | tuple[int, ...] = False
    preserve_rng_state: bool = True


def lower(op: Invertible, x: Wire, options: Options) -> Wire:
    """Run an op so that its activations are freed and rebuilt in backward."""
    if runs_plainly() or not may_have_gradients(op, x):
        return op.forward(x)
    if not options.donate:
        return close(walk(op, begin(x), options))
    donated = Donation(x, options.donate)
    y = close(walk(op, donated.begin(), replace(options, donate=False)))
    donated.free(y)
    return y


def _any_gradient(x: Wire) -> bool:
    return any(isinstance(leaf, Tensor) and _needs_gradient(leaf) for leaf in leaves(x))


def may_have_gradients(op: Invertible, x: Wire) -> bool:
    """Whether the input needs a gradient, or an op's functions could close over anything that does."""
    found = owners_of(op)
    if _any_gradient(x) or found.opaque or any(map(_needs_gradient, found.tensors)):
        return True
    seen: set[int] = set()
    return any(_needs_gradient(tensor) for module in found.modules for _, _, _, tensor, _ in slots(module, seen))


def runs_plainly() -> bool:
    """Whether nothing has to be kept: no gradients, or forward mode (rule 8 of NOTE [Trunk])."""
    return not torch.is_grad_enabled() or transforms.forward_mode()


@singledispatch
def walk(op: Invertible, state: State, options: Options) -> State:
    """Send a state through an op: a primitive is a stage, or is stored or recomputed if the mode says so."""
    return {"invert": stage, "store": store, "recompute": recompute}[options.mode](op, state, options)


@walk.register
def _(op: Chain, state: State, options: Options) -> State:
    if options.mode == "recompute" and options.segments == 1 and not has_marks(op):
        return recompute(op, state, options)
    if options.mode == "recompute" and options.segments != 1:
        return _walk_segments(op, state, options)
    index, cuts, inner = 0, cut_points(op, options.segments), replace(options, segments=1)
    try:
        for index, part in enumerate(op.parts):
            state = walk(part, begin(close(state)) if index in cuts else state, inner)
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
    return (recompute if options.mode == "recompute" else store)(op, state, options)


def _walk_segments(op: Chain, state: State, options: Options) -> State:
    """Recompute in segments: each is one region, run again from its stored input."""
    bounds = [0, *cut_points(op, options.segments), len(op.parts)]
    for first, last in pairwise(bounds):
        state = walk(Chain(op.parts[first:last]), state, replace(options, segments=1))
    return state


def cut_points(op: Invertible, segments: int | tuple[int, ...]) -> tuple[int, ...]:
    """Before which parts of a chain the trunk is closed."""
    count = len(op.parts)
    if isinstance(segments, int):
        return tuple(count * i // segments for i in range(1, segments))
    return segments


def has_marks(op: Invertible) -> bool:
    """Whether a part has a mode of its own."""
    return any(getattr(part, "marked", False) or has_marks(part) for part in op.parts)


def store(op: Invertible, state: State, options: Options) -> State:
    """Run an op as plain autograd between two trunks."""
    return begin(op.forward(close(state)))


# ---- stages ----------------------------------------------------------------------------------------------------------


Again: TypeAlias = Callable[[list[Wire]], Wire]  # takes its input out of the list: nobody else keeps it alive


@dataclass
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
    dead: tuple[int, ...]  # outputs that depend on nothing differentiable
    count_lost: int = 0  # differentiable tensors of the residue
    again: Again | None = None  # how a recomputed op runs in backward, where that is not as in forward


class _Strand:
    """The place of a differentiable tensor in a spec."""

    def __repr__(self) -> str:
        return "STRAND"


STRAND = _Strand()


def stage(op: Invertible, state: State, options: Options) -> State:
    """Run a primitive, recorded, and put its node on the trunk; without a node where nothing needs a gradient."""
    x, xs = values(state), strands(state)
    needs = [_needs_gradient(s.value) for s in xs]
    partly = not (all(needs) or op.implicit or isinstance(op, (Half, Rearrangement)))
    (y, residue), recording = recorded(op.forward_with_residue, x, owners_of(op), options.preserve_rng_state, partly)
    carried = any([s.carrier is not None for s in xs])
    if not (carried or recording.captured or any(needs)):
        return begin(y)
    call, kept, ys = _call(op, recording, x, y, residue, carried)
    found = recording.dead if recording.captured or any(needs) else range(len(ys))
    call.dead = _dead(op, x, needs, tuple(i for i in found if i < len(ys)))  # residues come behind
    carriers = [s.carrier if s.carrier is not None else carrier(s.value) for s in xs] if carried else []
    out = _apply(_Stage, call, *[s.value for s in xs], *carriers, *kept, *ys)
    return _filled(call.y_spec, list(map(Strand, out[: len(ys)], out[len(ys) :])), kept)


def recompute(op: Invertible, state: State, options: Options, again: Again | None = None) -> State:
    """Run an op from a stored input; backward runs it again, with its tape or as ``again`` says, from there."""
    return begin(recompute_values(op, close(state), options, again))


def recompute_values(op: Invertible, x: Wire, options: Options, again: Again | None = None) -> Wire:
    """`recompute` on a wire."""
    y, recording = recorded(op.forward, x, owners_of(op), options.preserve_rng_state, again is None)
    if not (recording.captured or _any_gradient(x)):
        return y
    call, kept, ys = _call(op, recording, x, y, None, False)
    call.x_spec = map_wire(lambda leaf: STRAND if is_differentiable(leaf) else _keep(leaf, kept), x)
    call.count_kept, call.dead, call.again = len(kept), recording.dead, again
    out = iter(_apply(_Recompute, call, *filter(is_differentiable, leaves(x)), *kept, *ys))
    return map_wire(lambda leaf: next(out) if is_differentiable(leaf) else leaf, y)


def _call(
    op: Invertible, recording: Recording, x: Wire, y: Wire, residue: Residue, carried: bool
) -> tuple[Call, list[Tensor], list[Tensor]]:
    """The static part of a node, the tensors that it keeps, and its outputs."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    kept = list(recording.captured)
    x_spec, y_spec = _spec(x, xs, None), _spec(y, ys, kept)
    lost: list[Tensor] = []
    residue_spec = None if residue is None else _residue_spec(residue, lost, kept)
    if recording.pins:
        recording.pins[:] = [(name, _keep(value, kept)) for name, value in recording.pins]
    call = Call(op, recording, x_spec, y_spec, residue_spec, kinds(xs), kinds(ys), carried, len(kept), ())
    call.count_lost = len(lost)
    return call, [*kept, *lost], ys


def _residue_spec(residue: Residue, lost: list[Tensor], kept: list[Tensor]) -> Residue:
    """The structure of a residue; what may have a gradient of its own is lost by the op, the rest is kept."""
    if isinstance(residue, (tuple, list)):
        return tuple([_residue_spec(part, lost, kept) for part in residue])
    if is_differentiable(residue):
        lost.append(residue)
        return STRAND
    return _keep(residue, kept)


def _spec(wire: Wire, on_strands: list[Tensor], kept: list[Tensor] | None) -> Wire:
    """The structure of a wire; collects its differentiable tensors, and the others to be kept."""
    if isinstance(wire, tuple):
        return tuple([_spec(part, on_strands, kept) for part in wire])
    if is_differentiable(wire):
        on_strands.append(wire)
        return STRAND
    return None if kept is None else _keep(wire, kept)


def owners_of(op: Invertible) -> Owners:
    """`owners` of an op's functions, found once for each value."""
    found = vars(op).get("_owners")
    if found is None:
        object.__setattr__(op, "_owners", found := owners(op.functions))  # values are frozen; this is a cache
    return found


def owning(op: Invertible, **changes: Any) -> Invertible:
    """The op, with something else known of its owners than its structure tells."""
    twin = copy(op)
    object.__setattr__(twin, "_owners", replace(owners_of(op), **changes))
    return twin


_ZEROS: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def carrier(value: Tensor) -> Tensor:
    """A one-element stand-in of the shape of a value."""
    if type(value) is not Tensor or torch.compiler.is_compiling() or transforms.active():
        return value.new_zeros(()).expand(value.shape)
    key = value.dtype, value.device
    zero = _ZEROS.get(key)
    if zero is None:
        zero = _ZEROS[key] = torch.zeros((), dtype=value.dtype, device=value.device)
    return zero.expand_as(value)


def _apply(node: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    """``node.apply``; outside of transforms without binding a signature, which costs more than the node itself."""
    if transforms.active() or torch.compiler.is_compiling():
        return node.apply(*args)
    return super(torch.autograd.Function, node).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]


def _needs_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad or (transforms.active() and transforms.is_wrapped(tensor))


def _keep(leaf: Any, kept: list[Tensor]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    kept.append(leaf)
    return Kept(len(kept) - 1)


def _dead(op: Invertible, x: Wire, needs: Sequence[bool], found: tuple[int, ...]) -> tuple[int, ...]:
    """Outputs without a gradient: found by the recording, or of the untouched component of a coupling."""
    if not isinstance(op, Half) or all(needs):
        return found
    first = sum(map(is_differentiable, leaves(x[0])))
    untouched = range(first, len(needs)) if op.target == 0 else range(first)
    return tuple(i for i in untouched if not needs[i])


# ---- the nodes -------------------------------------------------------------------------------------------------------


class _Stage(torch.autograd.Function):
    """``(call, *xs, *carriers, *kept, *lost, *ys) -> (*ys, *carriers, *lost)``; see NOTE [Trunk]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        last = len(tensors) - len(call.y_kinds)
        ys, lost = tensors[last:], tensors[last - call.count_lost : last]
        return (*[y.detach() for y in ys], *map(carrier, ys), *[r.detach() for r in lost])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.call = call
        first = len(call.x_kinds) * (1 + call.carried)
        ctx.save_for_backward(*tensors[first : first + call.count_kept], *output[2 * len(call.y_kinds) :])
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
        ctx.mark_non_differentiable(*(output[i] for i in call.dead))

    @staticmethod
    def backward(ctx: Any, *gys: Tensor | None) -> tuple[Tensor | None, ...]:
        return (_rerun if ctx.call.again is None or _functional() else _rerun_lean)(ctx, ctx.call, gys)


class _Root(torch.autograd.Function):
    """``(sink, anchor, *xs) -> xs``: roots that their graph does not keep alive, as an AccumulateGrad does its leaf."""

    @staticmethod
    def forward(sink: Any, anchor: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.gxs, wanted = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out for out, want in zip(output, wanted, strict=True) if not want))

    @staticmethod
    def backward(ctx: Any, *gxs: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.gxs[:] = gxs
        return (None,) * (2 + len(gxs))


def _pull(ctx: Any, call: Call, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """``(gys, ys) -> (gxs, xs, gkept)``: the backward of a stage."""
    count, grads = len(call.y_kinds), transforms.alive(grads)
    saved = transforms.alive(ctx.saved_tensors)
    kept, lost = saved[: call.count_kept], iter(saved[call.count_kept :])
    y, gy = _filled(call.y_spec, grads[count : 2 * count], kept), _filled(call.y_spec, grads[:count], None)
    residue = None if call.residue_spec is None else _fill(call.residue_spec, lost, kept)
    replay, needs = _replay(ctx, call, kept)
    if any(g is not None for g in grads[2 * count :]):  # rule 9: a second backward goes through the residue
        x = replay.run(call.op.inverse_with_residue, (residue, y))
        _, pull = replay(lambda x: call.op.forward_with_residue(x), (x,), (needs,))
        (gx,) = pull((gy, _filled(call.residue_spec, grads[2 * count :], None)))
        return _arranged(call, gx, x, replay.finish())
    if any(g is not None for g in grads[:count]):
        x, gx = call.op.pull(residue, y, gy, replay, needs)
        return _arranged(call, gx, x, replay.finish())
    x = replay.run(call.op.inverse_with_residue, (residue, y)) if call.carried else None
    return _arranged(call, None, x, replay.gradients)


def _rerun(ctx: Any, call: Call, gys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """``gys -> (gxs, gkept)``: the backward of a recomputed op."""
    count = len(call.x_kinds)
    saved, gys = transforms.alive(ctx.saved_tensors), transforms.alive(gys)
    xs, kept = saved[:count], saved[count:]
    replay, needs = _replay(ctx, call, kept)
    y, pull = replay(_on_wire(call), (_filled(call.x_spec, xs, kept),), (needs,))
    check_kinds("{!r} on replay", call.op, y, call.y_kinds)
    (gx,) = pull(_filled(call.y_spec, gys, None))
    return _arranged(call, gx, None, replay.finish())


def _rerun_lean(ctx: Any, call: Call, gys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """`_rerun`, with x let go: nothing of the new graph keeps it, but what the op itself saves."""
    count = len(call.x_kinds)
    kept = ctx.saved_tensors[count:]
    handed = [_filled(call.x_spec, [x.detach() for x in ctx.saved_tensors[:count]], kept)]
    ctx.maybe_clear_saved_tensors()
    replay, needs = _replay(ctx, call, kept)
    gxs: list[Tensor | None] = [None] * count

    def run(anchor: Tensor) -> Wire:
        if not handed:
            raise ReplayError(
                f"{call.op!r} makes tensors that require grad of its own", cure="mark it inv.store(...) and plan again"
            )
        handed[0] = _rooted(anchor, handed[0], leaves(needs), gxs)
        return call.again(handed)  # pyright: ignore[reportOptionalCall]

    y, pull = replay(run, torch.zeros(()), True)
    check_kinds("{!r} on replay", call.op, y, call.y_kinds)
    del y
    pull(_filled(call.y_spec, gys, None))
    return _arranged(call, _filled(call.x_spec, gxs, None), None, replay.finish())


def _rooted(anchor: Tensor, x: Wire, needs: Sequence[bool], gxs: list[Tensor | None]) -> Wire:
    """A wire as roots of a graph; backward puts their gradients into a list."""
    xs = [leaf for leaf in leaves(x) if is_differentiable(leaf)]
    wanted = [need for leaf, need in zip(leaves(x), needs, strict=True) if is_differentiable(leaf)]
    roots = iter(_Root.apply((gxs, wanted), anchor, *xs))
    return map_wire(lambda leaf: next(roots) if is_differentiable(leaf) else leaf, x)


def _on_wire(call: Call) -> Callable[[Wire], Wire]:
    again = call.again
    return call.op.forward if again is None else lambda x: again([x])


def _functional() -> bool:
    """Whether gradients must be differentiable, or belong to a transform (rule 7 of NOTE [Trunk])."""
    return torch.is_grad_enabled() or transforms.active()


def _replay(ctx: Any, call: Call, kept: Sequence[Tensor]) -> tuple[Replay, Wire]:
    """The replay of a node's call, and which of the gradients of x are wanted."""
    needed, count = ctx.needs_input_grad[1:], len(call.x_kinds)
    captured = kept[: len(call.recording.captured)]
    wants = needed[count * (1 + call.carried) :]
    replay = Replay(
        call.recording,
        captured,
        [want and is_differentiable(c) for want, c in zip(wants, captured, strict=False)],
        kept,
        rebuilds=call.carried,
        functional=_functional(),
        inverse=(call.op.inverse_with_residue, call.x_kinds),
    )
    left = iter(needed[:count])
    return replay, map_wire(lambda leaf: leaf is STRAND and next(left), call.x_spec)


def _filled(spec: Wire, found: Sequence[Any], kept: Sequence[Tensor] | None) -> Wire:
    """A wire from its spec; without kept tensors, None stands where no strand is."""
    return _fill(spec, iter(found), kept)


def _fill(spec: Wire, left: Iterator[Any], kept: Sequence[Tensor] | None) -> Wire:
    if spec is STRAND:
        return next(left)
    if isinstance(spec, tuple) and not isinstance(spec, Kept):
        return tuple([_fill(part, left, kept) for part in spec])
    return None if kept is None else fetch(spec, kept)


def _arranged(call: Call, gx: Wire, x: Wire, gcaptured: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of apply's arguments, in order."""
    count = len(call.x_kinds)
    gxs = _on_strands(call, gx) if gx is not None else [None] * count
    if call.carried:
        check_kinds("the inverse of {!r}", call.op, x, call.x_kinds)
    xs = [leaf for leaf in leaves(x) if is_differentiable(leaf)] if call.carried else []
    return (
        None,
        *gxs,
        *xs,
        *gcaptured,
        *([None] * (call.count_kept - len(gcaptured) + call.count_lost + len(call.y_kinds))),
    )


def _on_strands(call: Call, wire: Wire) -> list[Any]:
    return [leaf for leaf, spec in zip(leaves(wire), leaves(call.x_spec), strict=True) if spec is STRAND]


# ---- donation --------------------------------------------------------------------------------------------------------
#
# NOTE [Donation] A donated tensor must never be read while it is empty, and C++ would read a null pointer.
#
# 1.  Its Python object is given another implementation meanwhile, an empty one that raises in every dispatch; its own
#     waits in the `Donation`, with its place in the graph, its hooks and its version.
# 2.  Nothing else may hold it, then: not Python (counted on the storage), not C++ (counted on the tensor), nor the
#     pipeline itself (counted again when it has run).
# 3.  One holder is let in, the node that made the tensor, so that a ReLU may come before: it runs after the head, where
#     the tensor is back; should it be reached by another way, it raises.
# 4.  That node compares with zero what it saved, and what comes back is rounded: a zero that returns as 1e-17 would
#     open the ReLU. So the signs of such a tensor are kept, one bit for each element.


class Donated(Tensor):
    """What a donated tensor is while its storage is empty: reading it raises."""

    @staticmethod
    def __new__(cls, like: Tensor) -> Donated:
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=torch.device("meta"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.storage, Tensor.untyped_storage):  # whether it is empty may be asked
            return func(torch.empty(0))
        raise _was_read()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _was_read()


def _was_read() -> DonatedError:
    return DonatedError(
        "a donated tensor was read",
        expected="that nobody reads it between forward and backward",
        cure="use it before the call, keep x.clone(), or leave donate=False",
    )


class Donation:
    """Frees the storage of a pipeline's inputs until backward rebuilds them; see NOTE [Donation].

    Args:
        x: The input.
        which: True for every differentiable tensor on the wire, or the places of some.

    Raises:
        DonatedError: When a tensor can not be freed, with the reason.
    """

    def __init__(self, x: Wire, which: bool | tuple[int, ...]) -> None:
        found = leaves(x)
        self.x = x
        self.given: list[Tensor] = []
        self.signs: list[Tensor | None] = []
        self.empty: list[tuple[Tensor, Tensor, int, list[bool]]] = []  # object, implementation, bytes, whether empty
        for place in [i for i, t in enumerate(found) if is_differentiable(t)] if which is True else which or ():
            tensor = found[place] if 0 <= place < len(found) else None
            reason = "it is there twice" if any(tensor is t for t in self.given) else why_not_donate(tensor)
            if reason or tensor is None:
                raise _not_donated(place, reason or "it is None")
            self.given.append(tensor)

    def begin(self) -> State:
        """Open a trunk whose first node puts the rebuilt inputs back."""
        nonce = torch.zeros((), requires_grad=True)  # backward has to reach the head even if no input needs a gradient
        out = _Head.apply(self, nonce, *self.given)
        half = len(self.given)
        linked = {id(t): Strand(out[i], out[half + i]) for i, t in enumerate(self.given)}
        return _map_state(
            lambda leaf: linked.get(id(leaf), Strand(leaf, None)) if is_differentiable(leaf) else leaf, self.x
        )

    def free(self, y: Wire) -> None:
        """Empty the storages, unless somebody holds one after the pipeline has run."""
        outputs = {leaf.untyped_storage().data_ptr() for leaf in leaves(y) if isinstance(leaf, Tensor)}
        for tensor in self.given:
            if tensor.untyped_storage().data_ptr() in outputs:
                raise DonatedError("donate: the output is a view of the input", cure="leave donate=False")
            if why_not_donate(tensor):
                raise DonatedError(
                    "donate: the pipeline itself keeps the input",
                    expected="one that begins with what can be rebuilt, and closes over no input",
                    cure="leave donate=False, or move stored and recomputed parts, and cuts, behind the first coupling",
                )
        for tensor in self.given:
            self.signs.append(_signs(tensor))
            storage, empty, hidden = tensor.untyped_storage(), [True], Donated(tensor)
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(partial(_raise_if, empty))
            size = storage.nbytes()
            torch._C._swap_tensor_impl(tensor, hidden)
            tensor.__class__, hidden.__class__ = Donated, Tensor  # pyright: ignore[reportAttributeAccessIssue]
            storage.resize_(0)
            self.empty.append((tensor, hidden, size, empty))

    def restore(self, values: Sequence[Tensor]) -> None:
        """Fill the same storages with the rebuilt values, at the version that others have seen."""
        for (tensor, hidden, size, empty), value, signs in zip(self.empty, values, self.signs, strict=True):
            hidden.untyped_storage().resize_(size)
            with torch.no_grad(), transforms.preserved_version(hidden):
                hidden.detach().copy_(value if signs is None else _signed(value, signs))
            torch._C._swap_tensor_impl(tensor, hidden)
            tensor.__class__, hidden.__class__ = Tensor, Donated  # pyright: ignore[reportAttributeAccessIssue]
            empty[0] = False
        self.empty.clear()


def _signs(tensor: Tensor) -> Tensor | None:
    """Rule 4 of NOTE [Donation]: where a tensor is positive, if its maker saved it; a tail does not compare."""
    if _is_tail(tensor.grad_fn) or not tensor.is_floating_point() or not _saved_by_its_maker(tensor):
        return None
    with torch.no_grad():
        return pack_bits(tensor > 0)


def _is_tail(node: Any) -> bool:
    return isinstance(node, _Tail._backward_cls)  # pyright: ignore[reportAttributeAccessIssue]


def _signed(value: Tensor, signs: Tensor) -> Tensor:
    """A rebuilt tensor, positive exactly where the original was."""
    positive = value.clamp_min(torch.finfo(value.dtype).tiny)
    return torch.where(unpack_bits(signs, value.shape), positive, value.clamp_max(0))


def _raise_if(empty: list[bool], *_: Any) -> None:
    if empty[0]:
        raise _was_read()


def _not_donated(place: int, reason: str) -> DonatedError:
    return DonatedError(f"donate: input {place} can not be freed: {reason}", cure="leave it out of donate=...")


def why_not_donate(tensor: Any) -> str | None:
    """The reason why a tensor's storage must not be freed; None if it may."""
    if tensor is None or not isinstance(tensor, Tensor):
        return "there is no tensor at this place of the wire"
    if type(tensor) is Donated:
        return "it has been donated already"
    if transforms.active():
        return "a torch.func transform is active"
    if tensor.grad_fn is not None and not _can_tell(tensor.grad_fn):
        return "the operation that made it has already run backward"
    if tensor.is_leaf and tensor.requires_grad:
        return "it is a leaf that requires grad, which its owner will read"
    if type(tensor) is not Tensor or not is_differentiable(tensor):
        return f"it is a {type(tensor).__name__} of {tensor.dtype}, not a plain floating-point tensor"
    storage = tensor.untyped_storage()
    if tensor._is_view() or not storage.resizable() or storage.nbytes() != tensor.numel() * tensor.element_size():
        return "it is a view, does not fill its storage, or lies in memory that is not torch's own"
    users = torch._C._storage_Use_Count(storage._cdata) - 1 - _saved_by_its_maker(tensor)
    if users > 1:
        return f"{users - 1} other tensors share its storage (views, detached aliases, or results saved for backward)"
    if transforms.use_count(tensor) > 1:
        return "an operation has saved it for backward, or a view of it is alive"
    if tensor.retains_grad and not tensor.is_leaf:
        return "its gradient is to be retained, which needs the tensor itself"
    return None


def _can_tell(node: Any) -> bool:
    """Whether a node still has what it saved: after its backward it can not tell whether that was the tensor."""
    try:
        for name in dir(node):
            if name.startswith("_saved_"):
                getattr(node, name)
        return not _is_tail(node) or node.saved_tensors is not None  # pyright: ignore
    except RuntimeError:
        return False


def _saved_by_its_maker(tensor: Tensor) -> int:
    """How often the node that made a tensor has saved it: rule 3 of NOTE [Donation]."""
    node = tensor.grad_fn
    names = [name for name in dir(node) if name.startswith("_saved_")] if node is not None else []
    saved = [getattr(node, name, None) for name in names]
    saved += node.saved_tensors if _is_tail(node) else []  # pyright: ignore
    pointer = tensor.untyped_storage().data_ptr()
    return sum(isinstance(s, Tensor) and s.untyped_storage().data_ptr() == pointer for s in saved)


class _Head(torch.autograd.Function):
    """``(donation, nonce, *xs) -> (*xs, *carriers)``; its backward puts the rebuilt values back where they were."""

    @staticmethod
    def forward(donation: Donation, nonce: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        return (*(x.view_as(x) for x in xs), *map(carrier, xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        donation, _, *xs = inputs
        ctx.donation = donation
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(o for o, x in zip(output, xs, strict=False) if not x.requires_grad))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        half = len(grads) // 2
        if ctx.donation.empty:
            ctx.donation.restore(grads[half:])
        return (None, None, *grads[:half])
