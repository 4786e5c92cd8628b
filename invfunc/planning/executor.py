"""The executor: a chain lowered as a schedule says, out of the mechanisms that `checkpoint` has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .. import transforms
from ..checkpoint import Checkpointed, Marked, Wrapper, forced_mode
from ..combinators import Plumbing
from ..invertible import Chain, Inverse, Invertible, OneWay, Rearrangement
from ..lowering import Options, recompute, runs_plainly, walk
from ..trunk import State, begin, close, values
from ..wires import Wire, leaves
from .schedule import Invert, Schedule, Store


def flat_ops(op: Invertible) -> list[Invertible]:
    """The ops of a chain, nested ones included; a chain with a name (a coupling, a block) is one op."""
    if type(op) in (Checkpointed, Planned):
        return flat_ops(op.parts[0])
    if isinstance(op, Chain) and op.labels is None:
        return [inner for part in op.parts for inner in flat_ops(part)]
    return [op]


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


def is_exact(op: Invertible) -> bool:
    """Whether an op moves elements without arithmetic, so that its inverse gives the same bits."""
    return isinstance(op, (Rearrangement, Plumbing)) or (bool(op.parts) and all(map(is_exact, op.parts)))


@dataclass(frozen=True)
class Region:
    """Ops that run again in backward, as a schedule of their own says."""

    op: Chain
    steps: tuple[Step, ...]
    options: Options

    def again(self, handed: list[Wire]) -> Wire:
        """Run from the input in the list, which is taken out as soon as it has been used."""
        if runs_plainly():
            return self.op.forward(handed.pop())
        handed[0] = begin(handed[0])
        follow(self.steps, handed, self.options)
        return close(handed.pop())


Step = tuple[str, Any]  # ("store" | "invert", op) or ("recompute", Region), or ("close", None)


def steps_of(ops: Sequence[Invertible], schedule: Schedule, options: Options) -> tuple[Step, ...]:
    """A schedule as the steps that take a state through it."""
    steps: list[Step] = []
    for node in schedule:
        if isinstance(node, Store):
            steps.append(("store", ops[node.first]))
        elif isinstance(node, Invert):
            steps += [("invert", op) for op in ops[node.first : node.stop]] + [("close", None)]
        else:
            region = Region(Chain(tuple(ops[node.first : node.stop])), steps_of(ops, node.inner, options), options)
            steps.append(("recompute", region))
    return tuple(steps)


def follow(steps: Sequence[Step], handed: list[State], options: Options) -> None:
    """Take the state in a list through steps; no frame keeps what a step has used up."""
    for kind, what in steps:
        if kind == "close":
            handed.append(begin(close(handed.pop())))
        elif kind == "recompute":
            handed.append(recompute(what.op, handed.pop(), options, what.again))
        else:
            handed.append(walk(what, handed.pop(), replace(options, mode=kind)))


@dataclass(frozen=True, repr=False)
class Planned(Wrapper):
    """A chain with a plan; built by ``checkpoint(f, plan=plan)``."""

    plan: Any
    ops: tuple[Invertible, ...]
    steps: dict[bool, tuple[Step, ...]] = field(default_factory=dict, compare=False)
    shapes: set[tuple[Any, ...]] = field(default_factory=set, compare=False)  # those that were looked at

    def forward(self, x: Wire) -> Wire:
        return self.op.forward(x)

    def inverse(self, y: Wire) -> Wire:
        return self.op.inverse(y)

    def inverted(self) -> Invertible:
        """The inverse has no plan: it is lowered as its options say."""
        return self.op.inverted()

    def steps_for(self, options: Options) -> tuple[Step, ...]:
        """The plan's steps, made once, so that what is known of each op is found once."""
        key = options.preserve_rng_state
        if key not in self.steps:
            self.steps[key] = steps_of(self.ops, self.plan.schedule, replace(options, segments=1))
        return self.steps[key]

    def check_shape(self, x: Wire) -> None:
        """Once for each shape: `Plan.check_shape`."""
        if torch.compiler.is_compiling() or transforms.active():
            return
        shapes = tuple(t.shape if isinstance(t, torch.Tensor) else None for t in leaves(x))
        if shapes not in self.shapes:
            self.shapes.add(shapes)
            self.plan.check_shape(self.ops, x)

    def __repr__(self) -> str:
        return f"planned({self.op!r})"


@walk.register
def _(op: Planned, state: State, options: Options) -> State:
    if forced_mode() is not None:
        return walk(op.op, state, options)
    op.check_shape(values(state))
    steps = op.steps_for(options)
    handed = [state]
    del state
    follow(steps, handed, options)
    return handed.pop()
