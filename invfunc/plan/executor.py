"""The executor: a chain lowered as a schedule says, out of the mechanisms that `checkpoint` has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from .. import _torch
from ..checkpoint import Checkpointed, Marked, Wrapper
from ..core.combine import Plumbing
from ..core.couple import is_coupling
from ..core.op import Chain, Inverse, Invertible, OneWay, Rearrangement
from ..engine.hooked import Hooked
from ..engine.interface import Options, Run, State
from ..engine.lower import cut, recompute, runs_plainly, walk
from ..engine.mode import forced_mode
from ..errors import place_error
from ..exact.transform import Exact, Gridded
from ..wires import Wire, leaves
from .keeping import POLICIES
from .schedule import Recompute, Schedule, Store


def flat_stages(op: Invertible) -> list[Invertible]:
    """The ops of a chain, nested ones included; a chain with a name (a coupling, a block) is one op."""
    if type(op) in (Checkpointed, Planned):
        return flat_stages(op.parts[0])
    if isinstance(op, Chain) and op.labels is None:
        return [stage for part in op.parts for stage in flat_stages(part)]
    return [op]


def flat_ops(op: Invertible) -> list[Invertible]:
    """What a plan decides on: the ops of a chain, and of a coupling its halves."""
    return [part for stage in flat_stages(op) for part in halves(stage)]


def halves(stage: Invertible) -> tuple[Any, ...]:
    """The halves of a coupling; another op as it is."""
    return stage.parts if is_coupling(stage) else (stage,)


def grouped(ops: Sequence[Invertible], counts: Sequence[int]) -> tuple[Invertible, ...]:
    """Ops in groups of these sizes."""
    left = iter(ops)
    groups = [tuple(next(left) for _ in range(count)) for count in counts]
    return tuple(group[0] if len(group) == 1 else Chain(group) for group in groups)


def has_inverse(op: Invertible) -> bool:
    """Whether the structure of an op says that it can be undone; what is marked keeps its mark."""
    if isinstance(op, (OneWay, Marked)) or (isinstance(op, Inverse) and not has_inverse(op.op)):
        return False
    return all(map(has_inverse, op.parts))


def only_moves(op: Invertible) -> bool:
    """Whether an op moves elements without arithmetic."""
    return consists_of(op, Rearrangement, Plumbing)


def is_exact(op: Invertible) -> bool:
    """Whether an inverse gives the same bits: of what only moves elements, and of `invfunc.exact` ops."""
    return consists_of(op, Rearrangement, Plumbing, Exact, Gridded)


def consists_of(op: Invertible, *kinds: type) -> bool:
    """Whether an op, or each of its parts, is of some kinds."""
    return isinstance(op, kinds) or (bool(op.parts) and all([consists_of(part, *kinds) for part in op.parts]))


@dataclass(frozen=True, repr=False)
class SubChain(Chain):
    """Ops of a longer chain, which are named by their places in that."""

    places: tuple[str, ...] = ()

    @classmethod
    def of(cls, op: Invertible) -> SubChain:
        """All ops of a chain; the halves of a coupling are at one place."""
        places = [f"chain stage {i} ({s.name})" for i, s in enumerate(flat_stages(op)) for _ in halves(s)]
        return cls(tuple(flat_ops(op)), places=tuple(places))

    def place(self, index: int) -> str:
        """As in the longer chain."""
        return self.places[index]

    def part(self, first: int, stop: int) -> SubChain:
        """A part of this one."""
        return SubChain(self.parts[first:stop], places=self.places[first:stop])

    def opens(self) -> str:
        """What a trunk that begins here is called, when it drifts."""
        return f"{self.place(0)}: its input"


@dataclass(frozen=True)
class Step:
    """One thing to do on the way through a schedule: with one op, or with a part of the chain."""

    kind: str  # "store" or "invert" an op, "open" a trunk, or "recompute" a region
    ops: SubChain
    options: Options
    region: Region | None = None

    def run(self, box: list[State], run: Run) -> None:
        """Take the state in a box further; no frame keeps what is used up."""
        run = run.under(self.options)
        if self.kind == "open":
            box.append(cut(box.pop(), run, self.ops.opens))
        elif self.region is not None:
            box.append(recompute(self.ops, box.pop(), run, partial(self.region.run, run)))
        else:
            box.append(walk(self.ops.parts[0], box.pop(), run.at(self.ops, 0)))

    @property
    def place(self) -> str:
        """Where it happens; a region finds the place by itself."""
        return "" if self.region else self.ops.place(0)


@dataclass(frozen=True)
class Region:
    """Ops that run again in backward, as a schedule of their own says."""

    ops: SubChain
    steps: tuple[Step, ...]

    def run(self, run: Run, x: Wire) -> Wire:
        """Run from an input, as the region's own schedule says, in forward and again in backward.

        It is the graph of forward that backward goes through: the frames of inner regions and trunks ask the frame of
        this one for what they keep, as they would ask autograd's hooks.
        """
        if runs_plainly() or not isinstance(run.engine, Hooked):
            return self.ops.forward(x)
        inner = Run(Hooked(self.ops.functions), run.options, run.path)
        box = [inner.engine.begin(x, inner, self.ops.opens)]
        del x
        follow(self.steps, box, inner)
        y = inner.engine.close(box.pop())
        inner.engine.finish()
        return y


def steps_of(
    ops: SubChain, starts: Sequence[int], schedule: Schedule, options: Options, kinds: Sequence[str] = ()
) -> tuple[Step, ...]:
    """A schedule as the steps that take a state through it.

    Args:
        ops: The chain.
        starts: Which ops a node's numbers stand for.
        schedule: What to do.
        options: How.
        kinds: Of each number, which results may be kept.
    """
    steps: list[Step] = []
    for node in schedule:
        span = starts[node.first], starts[node.stop]
        stretch, each = ops.part(*span), [ops.part(i, i + 1) for i in range(*span)]
        if isinstance(node, Recompute):
            region = Region(stretch, steps_of(ops, starts, node.inner, options))
            keeps = keeping_options(options, kinds[node.first]) if node.keeps else options
            steps.append(Step("recompute", stretch, keeps, region))
        elif isinstance(node, Store):
            steps += [Step("store", op, replace(options, mode="store")) for op in each]
        else:
            steps += [Step("open", stretch, options)] * bool(steps)
            for q in range(node.first, node.stop):
                keeps = keeping_options(options, kinds[q]) if q in node.keeps else options
                parts = range(starts[q] - span[0], starts[q + 1] - span[0])
                steps += [Step("invert", each[i], replace(keeps, mode="invert")) for i in parts]
    return tuple(steps)


def keeping_options(options: Options, kind: str) -> Options:
    """The same with expensive results kept, unless the user says what is."""
    return options if options.keep is not None else replace(options, keep=POLICIES[kind])


def follow(steps: Sequence[Step], box: list[State], run: Run) -> None:
    """Take the state in a box through steps."""
    for step in steps:
        try:
            step.run(box, run)
        except Exception as error:
            place_error(error, step.place)
            raise


@dataclass(frozen=True, repr=False)
class Planned(Wrapper):
    """A chain with a plan; built by ``checkpoint(f, plan=plan)``."""

    plan: Any
    ops: tuple[Invertible, ...]  # as the costs count them: some joined to a neighbour, as `OpCosts.parts` says
    steps: dict[Options, tuple[Step, ...]] = field(default_factory=dict, compare=False)
    shapes: set[tuple[Any, ...]] = field(default_factory=set, compare=False)  # those that were looked at

    def forward(self, x: Wire) -> Wire:
        return self.op.forward(x)

    def undo(self, y: Wire) -> Wire:
        return self.op.undo(y)

    def inverted(self) -> Invertible:
        """The inverse has no plan: it is lowered as its options say."""
        return self.op.inverted()

    def steps_for(self, options: Options) -> tuple[Step, ...]:
        """The plan's steps, made once, so that what is known of each op is found once."""
        if options not in self.steps:
            starts = tuple(accumulate((cost.parts for cost in self.plan.costs.ops), initial=0))
            inner = replace(options, segments=1)
            kinds = [cost.keep for cost in self.plan.costs.ops]
            self.steps[options] = steps_of(SubChain.of(self.op), starts, self.plan.schedule, inner, kinds)
        return self.steps[options]

    def check_shape(self, x: Wire) -> None:
        """Once for each shape: `Plan.check_shape`."""
        if torch.compiler.is_compiling() or _torch.active():
            return
        shapes = tuple(t.shape if isinstance(t, torch.Tensor) else None for t in leaves(x))
        if shapes not in self.shapes:
            self.shapes.add(shapes)
            self.plan.check_shape(self.ops, x)

    def __repr__(self) -> str:
        return f"planned({self.op!r})"


@walk.register
def _(op: Planned, state: State, run: Run) -> State:
    if forced_mode() is not None:
        return walk(op.op, state, run)
    op.check_shape(run.engine.wire(state))
    steps = op.steps_for(run.options)
    box = [state]
    del state
    follow(steps, box, run)
    return box.pop()
