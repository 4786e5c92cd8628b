"""Lowering: a walk through the structure of a pipeline, on the engine for the way in which torch is running."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from itertools import pairwise
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..core.combine import Parallel, Plumbing
from ..core.op import ByKind, Chain, Invertible, OneWay, Rearrangement
from ..errors import place_error
from ..wires import Wire, has_nested, map_wire
from . import compiled, functional
from .donation import Donation
from .hooked import Hooked
from .interface import Engine, Options, Run, State
from .stream import is_stem, warn_if_narrow


def lower(op: Invertible, x: Wire, options: Options) -> Wire:
    """Run an op so that its activations are freed and rebuilt in backward."""
    unit = None if torch.compiler.is_compiling() else _UNIT.get()
    if unit is not None and unit.is_waiting:
        return unit.go_on(op, x, options)
    if runs_plainly():
        return op.forward(x)
    engine = engine_for(op, x)
    if engine is None:
        return op.forward(x)
    run = Run(engine, options)
    donates = options.donate and not torch.compiler.is_compiling()
    if donates:
        y = _donate(op, x, run, engine)
    else:
        y = engine.close(walk(op, engine.begin(x, run, partial(at_start, op)), run))
    engine.finish()
    return y


def _donate(op: Invertible, x: Wire, run: Run, engine: Engine) -> Wire:
    """Run an op, and free its input until backward has rebuilt it; see NOTE [Donation]."""
    donation = Donation(x, run.options.donate)
    assert isinstance(engine, Hooked)  # a donation is refused below transforms
    y = engine.close(walk(op, engine.begin_donated(donation, x, run, partial(at_start, op)), run))
    donation.free(y)
    return y


def engine_for(op: Invertible, x: Wire) -> Engine | None:
    """The engine for the way in which torch is running; None where nothing can have a gradient."""
    if torch.compiler.is_compiling():
        if has_nested(x):
            compiled.refuse_nested()
        return compiled.ENGINE if compiled.may_have_gradients(op, x) else None
    if _torch.active():
        functional.refuse_lazy(op)
        return functional.ENGINE if functional.may_have_gradients(op, x) else None
    return Hooked(op.functions)


def runs_plainly() -> bool:
    """Whether nothing has to be kept (no gradients, or forward mode), or a tracer takes forward and leaves backward."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() or compiled.runs_plainly()
    return not torch.is_grad_enabled() or _torch.is_tracing() or _torch.forward_mode() or _torch.is_making_graph()


class Passage:
    """A pipeline whose parts are run one by one, between calls that are somebody else's.

    Args:
        op: The pipeline.
        x: What goes into it.
        options: How it is lowered.
    """

    __slots__ = ("op", "run", "state")

    def __init__(self, op: Chain, x: Wire, options: Options) -> None:
        engine = None if runs_plainly() else engine_for(op, x)
        self.op = op
        self.run = None if engine is None else Run(engine, options)
        self.state = x if self.run is None else self.run.engine.begin(x, self.run, partial(at_start, op))

    @property
    def wire(self) -> Wire:
        """Where it is: a wire like any other, with its gradient."""
        return self.state if self.run is None else self.run.engine.wire(self.state)

    def replace(self, wire: Wire) -> None:
        """Go on with another wire of the same values, as a module's hooks return it."""
        self.state = wire if self.run is None else self.run.engine.with_wire(self.state, wire)

    def step(self, index: int, part: Invertible) -> None:
        """Run what stands for a part of the pipeline."""
        try:
            if self.run is None:
                self.state = part.forward(self.state)
            else:
                self.run.engine.resume(self.state)
                self.state = walk(part, self.state, self.run.at(self.op, index))
        except Exception as error:
            place_error(error, self.op.place(index))
            raise

    def close(self) -> Wire:
        """What comes out of the pipeline."""
        if self.run is None:
            return self.state
        y = self.run.engine.close(self.state)
        self.run.engine.finish()
        return y


# ---- the walk over the structure ------------------------------------------------------------------------------------


@ByKind
def walk(op: Invertible, state: State, run: Run) -> State:
    """Send a state through an op: a primitive is called on the trunk, or stored or recomputed if the mode says so."""
    mode = run.options.mode
    if mode == "invert":
        return run.engine.call(op, state, run)
    return (store if mode == "store" else recompute)(op, state, run)


@walk.register
def _(op: Rearrangement, state: State, run: Run) -> State:
    if run.options.mode == "invert":
        return run.engine.move(op, state, run)
    return walk.default(op, state, run)


@walk.register
def _(op: Plumbing, state: State, run: Run) -> State:
    return run.engine.route(op, state)


@walk.register
def _(op: OneWay, state: State, run: Run) -> State:
    return (recompute if run.options.mode == "recompute" else store)(op, state, run)


@walk.register
def _(op: Chain, state: State, run: Run) -> State:
    options = run.options
    if options.mode == "recompute" and options.segments == 1 and not has_marks(op):
        return recompute(op, state, run)
    if options.mode == "recompute" and options.segments != 1:
        return _walk_segments(op, state, run)
    index, cuts, inner = 0, (), run
    if options.segments != 1:
        cuts, inner = cut_points(op, options.segments), run.under(replace(options, segments=1))
    warns = options.mode == "invert" and isinstance(run.engine, Hooked) and _torch.is_any_autocast_enabled()
    try:
        for index, part in enumerate(op.parts):
            if index in cuts:
                state = cut(state, inner, partial(_at_cut, op, index))
            state = walk(part, state, inner.at(op, index))
            if warns and is_stem(op, index):
                warn_if_narrow(op, index, inner.engine.wire(state))
    except Exception as error:
        place_error(error, op.place(index))
        raise
    return state


@walk.register
def _(op: Parallel, state: State, run: Run) -> State:
    if run.engine.closes_together and any([leaves_trunk(part, run) for part in op.parts]):
        state = cut(state, run, partial(repr, op))
    numbers = iter(range(len(op.parts)))
    return run.engine.fork(op, state, lambda part, state: walk(part, state, run.at(op, next(numbers))), run)


def _walk_segments(op: Chain, state: State, run: Run) -> State:
    """Recompute in segments: each is one region, run again from its stored input."""
    bounds = [0, *cut_points(op, run.options.segments), len(op.parts)]
    for first, last in pairwise(bounds):
        state = walk(Chain(op.parts[first:last]), state, run.under(replace(run.options, segments=1)))
    return state


def store(op: Invertible, state: State, run: Run) -> State:
    """Run an op as plain autograd between two trunks."""
    return run.engine.begin(op.forward(run.engine.close(state)), run, partial(_behind, op))


def recompute(op: Invertible, state: State, run: Run, fn: Callable[[Wire], Wire] | None = None) -> State:
    """Run an op, or what ``fn`` does in its place, from a stored input; backward runs it again from there."""
    y = run.engine.recompute(op, run.engine.close(state), run, op.forward if fn is None else fn)
    return run.engine.begin(y, run, partial(_behind, op))


def cut(state: State, run: Run, place: Callable[[], str]) -> State:
    """Store the state: close the trunk, and begin another."""
    return run.engine.begin(run.engine.close(state), run, place)


def at_start(op: Any) -> str:
    """Where the first trunk of a pipeline begins; which pipeline, by how it begins."""
    return f"the input of {shorten(repr(op), 80)}"


def _at_cut(op: Chain, index: int) -> str:
    return f"{op.place(index)}: its input"


def _behind(op: Invertible) -> str:
    return f"what {op!r} gives"


# ---- questions ------------------------------------------------------------------------------------------------------


class Leaves(BaseException):
    """A walk would close its trunk."""


class Ask(Engine):
    """Runs nothing: a walk on it ends at once where it would close the trunk that it is on."""

    def close(self, state: State) -> Wire:
        raise Leaves

    def begin(self, x: Wire, run: Run, place: Callable[[], str]) -> State:
        raise Leaves

    def wire(self, state: State) -> Wire:
        raise Leaves

    def opens(self, state: State) -> bool:
        return False

    def call(self, op: Invertible, state: State, run: Run) -> State:
        return state

    def move(self, op: Invertible, state: State, run: Run) -> State:
        return state

    def route(self, op: Any, state: State) -> State:
        return state

    def fork(self, op: Any, state: State, step: Callable[[Invertible, State], State], run: Run) -> State:
        for part in op.parts:
            step(part, state)
        return state

    def recompute(self, op: Invertible, x: Wire, run: Run, fn: Callable[[Wire], Wire]) -> Wire:
        raise Leaves


ASK = Ask()


def leaves_trunk(op: Invertible, run: Run) -> bool:
    """Whether the trunk would be closed inside of an op: the walk itself is asked."""
    try:
        walk(op, None, Run(ASK, run.options, run.path))
    except Leaves:
        return True
    return False


def cut_points(op: Invertible, segments: int | tuple[int, ...]) -> tuple[int, ...]:
    """Before which parts of a chain the trunk is closed."""
    count = len(op.parts)
    if isinstance(segments, int):
        return tuple(count * i // segments for i in range(1, segments))
    return segments


def has_marks(op: Invertible) -> bool:
    """Whether a part has a mode of its own."""
    return any(getattr(part, "marked", False) or has_marks(part) for part in op.parts)


# ---- a module that is called in the middle of a walk: rule 2 of NOTE [FSDP2] ----------------------------------------


class Unit:
    """A module of a pipeline that is called as a module; what it lowers continues the trunk around it."""

    def __init__(self, state: State, run: Run) -> None:
        self.state, self.run, self.is_waiting = state, run, True

    def go_on(self, op: Invertible, x: Wire, options: Options) -> Wire:
        """Lower what the module calls, on the trunk around it."""
        self.is_waiting = False
        run = self.run.under(replace(options, donate=False))
        self.state = walk(op, run.engine.with_wire(self.state, x), run)
        return map_wire(_no_view, run.engine.wire(self.state))


class Passed(torch.autograd.Function):
    """A tensor as it is, and not as a view: FSDP warns of a view that it puts a hook on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _no_view(leaf: Any) -> Any:
    return Passed.apply(leaf) if isinstance(leaf, Tensor) and leaf.requires_grad and _torch.is_view(leaf) else leaf


_UNIT: ContextVar[Unit | None] = ContextVar("unit", default=None)


def call_unit(call: Callable[[Wire], Wire], state: State, run: Run) -> State:
    """Call a module in the middle of a walk; its hooks see the wire."""
    if not isinstance(run.engine, Hooked):
        return run.engine.begin(call(run.engine.close(state)), run, partial(at_start, call))
    unit = Unit(state, run)
    token = _UNIT.set(unit)
    try:
        y = call(run.engine.wire(state))
    finally:
        _UNIT.reset(token)
    return run.engine.with_wire(unit.state, y)
