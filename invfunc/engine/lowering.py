"""Lowering: a pipeline as autograd nodes that keep no activations. The only ``torch.autograd.Function``s are here.

See NOTE [Trunk] in trunk.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from .. import _torch
from ..core.combine import Parallel, Plumbing
from ..core.couple import Half, additive, match
from ..core.op import ByKind, Chain, Invertible, OneWay, Rearrangement, Residue
from ..errors import ReplayError, place_error
from ..wires import Wire, is_differentiable, leaves, map_wire
from . import compiled
from .donation import Donation
from .meter import Drift, Probe, probe
from .replay import (
    Kind,
    Last,
    Owners,
    Recording,
    Replay,
    check_kinds,
    kinds,
    owners,
    recorded,
    repeated,
    slots,
    taped,
    tensor_kinds,
)
from .strands import (
    Flat,
    State,
    Strand,
    applicable,
    apply_node,
    at_start,
    begin,
    carriers,
    close,
    fill,
    filled,
    is_flat,
    keep,
    need_gradients,
    needs_gradient,
    on_strands,
    outline,
    residue_spec_of,
    spec_of,
    strands,
    taken,
)

# ---- the walk over the structure -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How a pipeline is lowered; see `invfunc.checkpoint`."""

    mode: str = "invert"
    segments: int | tuple[int, ...] = 1
    donate: bool | tuple[int, ...] = False
    preserve_rng_state: bool = True
    drift: Drift = "warn"
    step: compiled.Step | None = None  # how stages are compiled on their own


def lower(op: Invertible, x: Wire, options: Options) -> Wire:
    """Run an op so that its activations are freed and rebuilt in backward.

    A state instead of a wire comes from a trunk that others have opened, and will close: rule 2 of NOTE [FSDP2]. What
    becomes of it is returned in a tuple of one: a module whose output is no tensor, and no tuple, is warned of.
    """
    if strands(x):
        return (walk(op, x, replace(options, donate=False)),)
    if runs_plainly() or not may_have_gradients(op, x):
        return op.forward(x)
    if not options.donate or compiled.is_active():
        return close(walk(op, begin(x, at_start), options))
    donated = Donation(x, options.donate)
    y = close(walk(op, donated.begin(), replace(options, donate=False)))
    donated.free(y)
    return y


def _any_gradient(x: Wire) -> bool:
    return any(isinstance(leaf, Tensor) and needs_gradient(leaf) for leaf in leaves(x))


def may_have_gradients(op: Invertible, x: Wire) -> bool:
    """Whether the input needs a gradient, or an op's functions could close over anything that does."""
    if compiled.is_active():
        return compiled.may_have_gradients(op, x)
    found = owners_of(op)
    if _any_gradient(x) or found.opaque or any(map(needs_gradient, found.tensors)):
        return True
    seen: set[int] = set()
    return any(needs_gradient(tensor) for module in found.modules for _, _, _, tensor, _ in slots(module, seen))


def runs_plainly() -> bool:
    """Whether nothing has to be kept: no gradients, or forward mode (rule 8 of NOTE [Trunk])."""
    if compiled.is_active():
        return compiled.runs_plainly()
    return not torch.is_grad_enabled() or _torch.forward_mode()


@ByKind
def walk(op: Invertible, state: State, options: Options) -> State:
    """Send a state through an op: a primitive is a stage, or is stored or recomputed if the mode says so."""
    if options.mode == "invert":
        return stage(op, state, options)
    return (store if options.mode == "store" else recompute)(op, state, options)


@walk.register
def _(op: Chain, state: State, options: Options) -> State:
    if options.mode == "recompute" and options.segments == 1 and not has_marks(op):
        return recompute(op, state, options)
    if options.mode == "recompute" and options.segments != 1:
        return _walk_segments(op, state, options)
    index, cuts = 0, cut_points(op, options.segments)
    inner = options if options.segments == 1 else replace(options, segments=1)
    try:
        for index, part in enumerate(op.parts):
            if index in cuts:
                state = begin(close(state), partial(_cut, op, index))
            state = walk(part, state, inner)
    except Exception as error:
        place_error(error, op.place(index))
        raise
    return state


def _cut(op: Chain, index: int) -> str:
    return f"{op.place(index)}: its input"


@walk.register
def _(op: Parallel, state: State, options: Options) -> State:
    if options.mode != "invert" or any(map(_leaves_trunk, op.parts)):
        state = begin(close(state), partial(_before, op))  # rule 4: no value leaves a trunk that others still follow
    return op._each(lambda part, state: walk(part, state, options), state)


def _leaves_trunk(op: Invertible) -> bool:
    """Whether the trunk is closed for a part of an op, where all is inverted."""
    if isinstance(op, OneWay) or getattr(op, "mark", "invert") != "invert":
        return True
    inner = getattr(op, "op", None)
    return any(map(_leaves_trunk, op.parts)) or (isinstance(inner, Invertible) and _leaves_trunk(inner))


def _before(op: Invertible) -> str:
    return f"the input of {op!r}"


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
    return begin(op.forward(close(state)), partial(_behind, op))


def _behind(op: Invertible) -> str:
    return f"what {op!r} gives"


# ---- stages ----------------------------------------------------------------------------------------------------------


Again: TypeAlias = Callable[[list[Wire]], Wire]  # takes its input out of the list: nobody else keeps it alive


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
    dead: tuple[int, ...]  # outputs that depend on nothing differentiable
    count_lost: int = 0  # differentiable tensors of the residue
    again: Again | None = None  # how a recomputed op runs in backward, where that is not as in forward
    probe: Probe | None = None  # for the drift meter, where a trunk begins

    def is_usual(self) -> bool:
        """Whether nothing about it is special, so that the next one takes the short way: rule 1 of NOTE [Again]."""
        r, op = self.recording, self.op
        if self.dead or self.count_kept != len(r.captured):
            return False
        if type(op) is Rearrangement:
            return not r.captured and is_flat(self.x_spec) and is_flat(self.y_spec)
        return (
            type(op) is Half
            and op.law is additive
            and type(self.x_spec) is Flat
            and self.x_kinds == self.y_kinds
            and not r.random
            and r.world is not None
            and {*map(type, r.captured)} <= {Tensor, nn.Parameter}
        )


@_torch.unseen_by_dynamo
def stage(op: Invertible, state: State, options: Options) -> State:
    """Run a primitive, recorded, and put its node on the trunk; without a node where nothing needs a gradient."""
    if compiled.is_active():
        return compiled.stage(op, state)
    moves = _only_moves(op)
    if options.step is not None and not (_torch.active() or moves):
        return compiled.stage(op, state, options.step)
    found = owners_of(op)
    if (call := found.last.call) is not None:
        out = moved(call, state) if moves else again(op, found, call, state, options)
        if out is not None:
            return out
    xs: list[Strand] = []
    x = taken(state, xs)
    opened = _opened(xs) if moves and options.step is None else None  # compiled, the first coupling is as the others
    if opened is not None and not any([s.carrier is not None for s in xs]):
        return begin(op.forward(x), opened)  # autograd keeps nothing of what it moves, and nobody above wants it back
    needs = need_gradients([s.value for s in xs])
    partly = op.taped or not (moves or all(needs) or op.implicit or isinstance(op, Half))
    (y, residue), recording = recorded(op.forward_with_residue, x, found, options.preserve_rng_state, partly)
    return _on_trunk(op, state, y, residue, recording, options)


def _on_trunk(op: Invertible, state: State, y: Wire, residue: Residue, recording: Recording, options: Options) -> State:
    """Put the node of a recorded primitive on the trunk; see `stage`."""
    xs: list[Strand] = []
    x = taken(state, xs)
    needs, carried = need_gradients([s.value for s in xs]), any([s.carrier is not None for s in xs])
    if not (carried or recording.captured or any(needs)):
        return begin(y, partial(_behind, op))
    kept, x_kinds = list(recording.captured), tensor_kinds([s.value for s in xs])
    call, ys = _call(op, recording, kept, outline(state), x_kinds, y, residue, carried)
    dead = recording.dead if recording.captured or any(needs) else range(len(ys))
    call.dead = _dead(op, x, needs, tuple([i for i in dead if i < len(ys)]))  # residues come behind
    if call.is_usual():
        owners_of(op).last.call = replace(call, op=bare(op), carried=True)
    values = [s.value for s in xs]
    call.probe = _probe(xs, ys if _only_moves(op) else values, options)
    above = [s.carrier for s in xs] if carried else []
    if any([carrier is None for carrier in above]):
        above = [made if s.carrier is None else s.carrier for s, made in zip(xs, carriers(values), strict=True)]
    out = (_Stage.apply if _torch.active() else _stage)(call, *values, *above, *kept, *ys)
    return filled(call.y_spec, list(map(Strand, out[: len(ys)], out[len(ys) :])), kept)


def _opened(xs: Sequence[Strand]) -> Callable[[], str] | None:
    """Where a trunk begins, if it begins with these strands."""
    return xs[0].opened if xs and all([s.opened is not None for s in xs]) else None


def _probe(xs: Sequence[Strand], watched: Sequence[Tensor], options: Options) -> Probe | None:
    """What the drift meter notes where a trunk begins."""
    opened = None if options.drift == "off" else _opened(xs)
    return None if opened is None else probe(watched, options.drift, opened)


def _only_moves(op: Invertible) -> bool:
    """Whether an op computes nothing: then its output is what the drift meter watches; rule 1 of NOTE [Drift]."""
    return isinstance(op, Rearrangement)


def recompute(op: Invertible, state: State, options: Options, again: Again | None = None) -> State:
    """Run an op from a stored input; backward runs it again, with its tape or as ``again`` says, from there."""
    return begin(recompute_values(op, close(state), options, again), partial(_behind, op))


def recompute_values(op: Invertible, x: Wire, options: Options, again: Again | None = None) -> Wire:
    """`recompute` on a wire."""
    if compiled.is_active():
        return compiled.recompute(op, x)
    y, recording = recorded(op.forward, x, owners_of(op), options.preserve_rng_state, again is None)
    if not (recording.captured or _any_gradient(x)):
        return y
    xs: list[Tensor] = []
    kept = list(recording.captured)
    x_spec = spec_of(x, xs, kept)
    call, ys = _call(op, recording, kept, x_spec, tensor_kinds(xs), y, None, False)
    call.dead, call.again = recording.dead, again
    out = iter(apply_node(_Recompute, call, *xs, *kept, *ys))
    return map_wire(lambda leaf: next(out) if is_differentiable(leaf) else leaf, y)


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
    if recording.pins:
        recording.pins = tuple([(name, keep(value, kept)) for name, value in recording.pins])
    y_kinds, count = tensor_kinds(ys), len(kept)
    if y_kinds == x_kinds:
        y_kinds = x_kinds  # one list less for the garbage collector to visit
    kept += lost
    return Call(op, recording, x_spec, y_spec, residue_spec, x_kinds, y_kinds, carried, count, (), len(lost)), ys


def owners_of(op: Invertible) -> Owners:
    """`owners` of an op's functions, found once for each value."""
    found = vars(op).get("_owners")
    if found is None:
        object.__setattr__(op, "_owners", found := owners(op.functions))  # values are frozen; this is a cache
    return found


def bare(op: Invertible) -> Invertible:
    """The op, without what is remembered of it: what is remembered itself may hold it, and be no cycle."""
    twin = copy(op)
    vars(twin).pop("_owners", None)
    return twin


def owning(op: Invertible, **changes: Any) -> Invertible:
    """The op, with something else known of its owners than its structure tells."""
    twin = copy(op)
    object.__setattr__(twin, "_owners", replace(owners_of(op), last=Last(), **changes))
    return twin


def _dead(op: Invertible, x: Wire, needs: Sequence[bool], found: tuple[int, ...]) -> tuple[int, ...]:
    """Outputs without a gradient: found by the recording, or of the untouched component of a coupling."""
    if not isinstance(op, Half) or all(needs):
        return found
    first = sum(map(is_differentiable, leaves(x[0])))
    untouched = range(first, len(needs)) if op.target == 0 else range(first)
    return tuple(i for i in untouched if not needs[i])


# ---- a stage, again --------------------------------------------------------------------------------------------------

# NOTE [Again] What training does nearly always: an additive half of a coupling runs as it ran a step ago.
#
# 1.  The first time, `stage` finds out all that there is to know of it. Where nothing is special (two tensors that need
#     gradients, functions that depend on the slots of modules alone), the static part of its node is remembered.
# 2.  From then on the few lines here do the same, with the same bits. Between large tensors the processor's caches are
#     cold, and what Python costs is how much of it there is to fetch: the general way takes four times as long.
# 3.  What could be different is asked before (the recording *holds*) and after (the function drew no random numbers,
#     pinned nothing, returned a tensor of its partner's kind). Where it is, `stage` and `_pull` go on from there: no
#     function is evaluated for nothing. So these lines have no cases.
# 4.  What only moves elements has no functions: all there is to ask is whether it moves tensors of the same kinds.
# 5.  Sums are written over what a function or a backward has just made, if nobody else holds it (`is_spare`): memory
#     that is in the caches still, and one tensor less at the peak.


def again(op: Invertible, found: Owners, call: Call, state: State, options: Options) -> State | None:
    """The stage of an additive half that is called as it was before; None where it is not."""
    half, recording = cast(Half, call.op), call.recording
    if not (type(state) is tuple and len(state) == 2 and type(state[0]) is type(state[1]) is Strand):
        return None
    a, b = state
    x = a.value, b.value
    x1, x2 = half.in_place(x)
    if not (_is_usual(a) and _is_usual(b)):
        return None
    above = a.carrier, b.carrier
    if a.carrier is None or b.carrier is None:
        if a.carrier is not b.carrier or _opened(state) is None:
            return None
        call, above = replace(call, probe=_probe(state, x, options)), carriers(x)  # that nobody follows
    if not recording.holds():
        found.last.call = found.last.call if _torch.active() else None
        return None
    if not recording.is_under_way():
        return None
    t, other = repeated(half.fn, x2, found, recording, options.preserve_rng_state)
    if other is not None or not _fits(t, x1):
        y, residue = half.changed_by(t, x)
        other = replace(other or recording, returned=(half.fn, kinds(leaves(t))))
        return _on_trunk(op, state, y, residue, other, options)
    spare = _torch.is_spare(t, x1)
    ya, yb, ca, cb = _sum(call, *x, *above, *recording.captured, t, spare)
    return Strand(ya, ca), Strand(yb, cb)


def _is_usual(x: Strand) -> bool:
    return type(x.value) is Tensor and x.value.requires_grad and (x.carrier is None or x.opened is None)


def _fits(t: Any, x: Tensor) -> bool:
    """Whether the sum is as x is; under autocast, what is added may be of a narrower dtype."""
    if type(t) is not Tensor or t.shape != x.shape:
        return False
    return t.dtype is x.dtype or (is_differentiable(t) and torch.promote_types(t.dtype, x.dtype) is x.dtype)


class _Sum(torch.autograd.Function):
    """``(call, *xs, *carriers, *captured, t, spare) -> (*ys, *carriers)``: the `_Stage` of a half, with its sum."""

    @staticmethod
    def forward(ctx: Any, call: Call, *args: Any) -> tuple[Tensor, ...]:
        a, b, above_a, above_b, *captured, t, spare = args
        ctx.call, ctx.dtype = call, t.dtype
        ctx.save_for_backward(*captured)
        ctx.materialize_grads = False
        t = t.detach()
        out = t if spare else None
        on_a = cast(Half, call.op).target == 0
        ys = (torch.add(a, t, out=out), b.detach()) if on_a else (a.detach(), torch.add(b, t, out=out))
        return *ys, above_a.detach(), above_b.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _torch.run_backward(_pull_again, ctx, ctx.call, grads)


_sum = applicable(_Sum)


def _pull_again(ctx: Any, call: Call, grads: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """`_pull` of an additive half, where all is as it was in forward."""
    op, recording, captured = cast(Half, call.op), call.recording, ctx.saved_tensors
    ga, gb, a, b = grads
    (g1, g2), (y1, x2) = op.in_place((ga, gb)), op.in_place((a, b))
    if g1 is None or g2 is None or not (type(y1) is type(x2) is Tensor) or torch.is_grad_enabled():
        return _pulled_otherwise(ctx, call, captured, grads)
    if not (recording.holds() and recording.is_alone_with(captured)) or _torch.in_compiled_backward():
        return _pulled_otherwise(ctx, call, captured, grads)
    inner = x2.detach().requires_grad_()
    t = _torch.with_gradients(True, recording.again, taped, op.fn, inner)
    if not (_fits(t, y1) and t.dtype is ctx.dtype):
        return _pulled_otherwise(ctx, call, captured, grads)
    gx2, gcaptured = g2, [None] * len(captured)
    if t.requires_grad:
        gx2, *gcaptured = _torch.gradients([(t, match(g1, t))], [inner, *captured])
        spare = gx2 is not None and _torch.is_spare(gx2, g2)
        gx2 = g2 if gx2 is None else torch.add(g2, gx2, out=gx2 if spare else None)
    spare, t = _torch.is_spare(t, y1), t.detach()
    x1 = torch.sub(y1, t, out=t if spare else None)  # last, so that the half above finds it in the caches
    if call.probe is not None:
        call.probe.compare(op.in_place((x1, x2)))
    return (None, *op.in_place((g1, gx2)), *op.in_place((x1, x2)), *gcaptured, None, None)


def _pulled_otherwise(
    ctx: Any, call: Call, captured: Sequence[Tensor], grads: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """The general way; the static part was that of another node, whose tensors may have had other shapes."""
    if grads[2] is None or grads[3] is None:
        return _pulled(ctx, call, captured, grads)
    half, found = cast(Half, call.op), tensor_kinds(grads[2:])
    returned = half.fn, [(half.in_place(grads[2:])[0].shape, ctx.dtype)]
    recording = replace(call.recording, returned=returned)
    return _pulled(ctx, replace(call, recording=recording, x_kinds=found, y_kinds=found), captured, grads)


def moved(call: Call, state: State) -> State | None:
    """The stage of a rearrangement that is called as it was before; None where it is not."""
    xs: list[Strand] = []
    taken(state, xs)
    values = [x.value for x in xs]
    if _torch.active() or not all([_is_usual(x) and x.carrier is not None for x in xs]):
        return None
    if outline(state) != call.x_spec or tensor_kinds(values) != call.x_kinds:
        return None
    out, count = _move(call, *values, *[x.carrier for x in xs]), len(call.y_kinds)
    return filled(call.y_spec, list(map(Strand, out[:count], out[count:])), None)


class _Move(torch.autograd.Function):
    """``(call, *xs, *carriers) -> (*ys, *carriers)``: the `_Stage` of a rearrangement, with what it does."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.materialize_grads = call, False
        ys = leaves(cast(Rearrangement, call.op).forward_fn(filled(call.x_spec, tensors[: len(call.x_kinds)], None)))
        return *[y.detach() for y in ys], *carriers(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _torch.run_backward(_pull_moved, ctx, ctx.call, grads)


_move = applicable(_Move)


def _pull_moved(ctx: Any, call: Call, grads: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """`_pull` of a rearrangement, where all is as it was in forward."""
    if any([g is None for g in grads]) or _functional() or _torch.in_compiled_backward():
        return _pull(ctx, call, grads)
    back, count = cast(Rearrangement, call.op).inverse_fn, len(call.y_kinds)
    gx, x = [back(filled(call.y_spec, part, None)) for part in (grads[:count], grads[count:])]
    return (None, *on_strands(call.x_spec, gx), *on_strands(call.x_spec, x))


# ---- the nodes -------------------------------------------------------------------------------------------------------


class _Stage(torch.autograd.Function):
    """``(call, *xs, *carriers, *kept, *lost, *ys) -> (*ys, *carriers, *lost)``; see NOTE [Trunk]."""

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
        if call.dead:
            ctx.mark_non_differentiable(*[output[i] for i in call.dead])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _torch.run_backward(_pull, ctx, ctx.call, grads)


_stage = applicable(_Stage)


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
        pull = _rerun if ctx.call.again is None or _functional() else _rerun_lean
        return _torch.run_backward(pull, ctx, ctx.call, gys)


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
    return _pulled(ctx, call, ctx.saved_tensors, grads)


def _pulled(ctx: Any, call: Call, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """`_pull`, with what was saved: it may be unpacked once only."""
    count, (grads, saved) = len(call.y_kinds), _alive(call, grads, saved)
    kept, lost = saved[: call.count_kept], saved[call.count_kept :]
    y, gy = filled(call.y_spec, grads[count : 2 * count], kept), filled(call.y_spec, grads[:count], None)
    residue = None if call.residue_spec is None else fill(call.residue_spec, iter(lost), kept)
    replay, needs = _replay(ctx, call, kept)
    if lost and any([g is not None for g in grads[2 * count :]]):  # rule 9: a second backward goes through the residue
        x = replay.run(call.op.inverse_with_residue, (residue, y))
        _, pull = replay(lambda x: call.op.forward_with_residue(x), (x,), (needs,))
        (gx,) = pull((gy, filled(call.residue_spec, grads[2 * count :], None)))
        return _arranged(call, gx, x, replay.finish())
    if any([g is not None for g in grads[:count]]):
        x, gx = call.op.pull(residue, y, gy, replay, needs)
        if call.probe is not None and not replay.functional:
            call.probe.compare(grads[count : 2 * count] if _only_moves(call.op) else _rebuilt(call, x))
        return _arranged(call, gx, x, replay.finish())
    x = replay.run(call.op.inverse_with_residue, (residue, y)) if call.carried else None
    return _arranged(call, None, x, replay.gradients)


def _alive(call: Call, *groups: Sequence[Tensor | None]) -> Sequence[Sequence[Any]]:
    """Tensors without the wrappers of transforms that have ended since forward."""
    return list(map(_torch.alive, groups)) if call.recording.wrapping or _torch.active() else groups


def _rebuilt(call: Call, x: Wire) -> list[Tensor]:
    """The tensors that have been rebuilt, if they are of the kinds that they were of."""
    found = leaves(x)
    if len(found) != len(call.x_kinds):
        found = [leaf for leaf in found if is_differentiable(leaf)]
    check_kinds(lambda: f"the inverse of {call.op!r}", found, call.x_kinds)
    return found


def _rerun(ctx: Any, call: Call, gys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """``gys -> (gxs, gkept)``: the backward of a recomputed op."""
    count = len(call.x_kinds)
    saved, gys = _alive(call, ctx.saved_tensors, gys)
    xs, kept = saved[:count], saved[count:]
    replay, needs = _replay(ctx, call, kept)
    y, pull = replay(_on_wire(call), (filled(call.x_spec, xs, kept),), (needs,))
    check_kinds(lambda: f"{call.op!r} on replay", leaves(y), call.y_kinds)
    (gx,) = pull(filled(call.y_spec, gys, None))
    return _arranged(call, gx, None, replay.finish())


def _rerun_lean(ctx: Any, call: Call, gys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """`_rerun`, with x let go: nothing of the new graph keeps it, but what the op itself saves."""
    count = len(call.x_kinds)
    kept = ctx.saved_tensors[count:]
    handed = [filled(call.x_spec, [x.detach() for x in ctx.saved_tensors[:count]], kept)]
    ctx.maybe_clear_saved_tensors()
    replay, needs = _replay(ctx, call, kept)
    gxs: list[Tensor | None] = [None] * count

    def run(anchor: Tensor) -> Wire:
        if not handed:
            raise ReplayError(
                f"{call.op!r} makes tensors that require grad of its own",
                cure="store it with inv.mark(op, 'store') and plan again",
            )
        handed[0] = rooted(anchor, handed[0], leaves(needs), gxs)
        return call.again(handed)  # pyright: ignore[reportOptionalCall]

    y, pull = replay(run, torch.zeros(()), True)
    check_kinds(lambda: f"{call.op!r} on replay", leaves(y), call.y_kinds)
    del y
    pull(filled(call.y_spec, gys, None))
    return _arranged(call, filled(call.x_spec, gxs, None), None, replay.finish())


def rooted(anchor: Tensor, x: Wire, needs: Sequence[bool], gxs: list[Tensor | None]) -> Wire:
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
    return torch.is_grad_enabled() or _torch.active()


def _replay(ctx: Any, call: Call, kept: Sequence[Tensor]) -> tuple[Replay, Wire]:
    """The replay of a node's call, and which of the gradients of x are wanted."""
    needed, count = ctx.needs_input_grad[1:], len(call.x_kinds)
    captured = kept[: len(call.recording.captured)]
    wanted, functional = needed[count * (1 + call.carried) :][: len(captured)], _functional()
    if functional:  # under vmap, every input is said to need a gradient
        wanted = [want and is_differentiable(c) for want, c in zip(wanted, captured, strict=True)]
    replay = Replay(
        call.recording,
        captured,
        wanted,
        kept,
        rebuilds=call.carried,
        functional=functional,
        inverse=(call.op.inverse_with_residue, call.x_kinds),
    )
    return replay, filled(call.x_spec, needed[:count], None)


def _arranged(call: Call, gx: Wire, x: Wire, gcaptured: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of apply's arguments, in order."""
    count = len(call.x_kinds)
    gxs = on_strands(call.x_spec, gx) if gx is not None else [None] * count
    xs = _rebuilt(call, x) if call.carried else []
    rest = [None] * (call.count_kept - len(gcaptured) + call.count_lost)
    if _torch.in_compiled_backward():
        return _without_holes(call, gxs, xs, gcaptured, rest)
    return (None, *gxs, *xs, *gcaptured, *rest, *[None] * len(call.y_kinds))


def _without_holes(
    call: Call, gxs: Sequence[Any], xs: Sequence[Tensor], gcaptured: Sequence[Any], rest: Sequence[None]
) -> tuple[Tensor | None, ...]:
    """`_arranged` for compiled autograd, which adds gradients up without looking for None; x may be among the ys."""
    captured = call.recording.captured
    like = next(t for t in [*gxs, *xs, *captured] if t is not None)
    zeros = [like.new_zeros(shape, dtype=dtype) for shape, dtype in [*call.x_kinds, *kinds(captured), *call.y_kinds]]
    count = len(gxs)
    gxs = [zero if g is None else g for g, zero in zip(gxs, zeros, strict=False)]
    gcaptured = [zero if g is None else g for g, zero in zip(gcaptured, zeros[count:], strict=False)]
    return (None, *gxs, *xs, *gcaptured, *rest, *zeros[len(zeros) - len(call.y_kinds) :])
