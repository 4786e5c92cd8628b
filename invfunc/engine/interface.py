"""What a walk through a pipeline needs of the engine that runs it, and what it takes along."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from ..core.op import Invertible
from ..wires import Wire
from .meter import Drift

State: TypeAlias = Any  # a wire on its way through an engine
Path: TypeAlias = Any  # (path of what is around, an op with parts, the number of the part) or None
Place: TypeAlias = Callable[[], str]


def places_on(path: Path) -> list[str]:
    """A path as errors show it, from the outside in."""
    found: list[str] = []
    while path is not None:
        path, op, index = path
        found.append(op.place(index))
    return [place for place in reversed(found) if place]


def which(verb: str, path: Path) -> str:
    """What the call at a path gives or saves, as errors show it."""
    return f"what {': '.join(places_on(path)) or 'the pipeline'} {verb}"


@dataclass(frozen=True)
class Whole:
    """What is around a whole op: the end of its path, which errors do not show."""

    op: Invertible

    @property
    def parts(self) -> tuple[Invertible, ...]:
        """The op."""
        return (self.op,)

    def place(self, index: int) -> str:
        """Nothing."""
        return ""

    def __repr__(self) -> str:
        return repr(self.op)


@dataclass(frozen=True)
class Options:
    """How a pipeline is lowered; see `invfunc.checkpoint`."""

    mode: str = "invert"
    segments: int | tuple[int, ...] = 1
    donate: bool | tuple[int, ...] = False
    preserve_rng_state: bool = True
    drift: Drift = "warn"
    determinism_check: str = "default"
    early_stop: bool = True
    keep: Any = None  # which results are kept for the replay
    context_fn: Any = None  # what surrounds a call and its replay
    debug: bool = False  # whether errors show the operators that ran
    stream: torch.dtype | None = None
    step: Any = None  # how stages are compiled on their own


class Run:
    """A walk through a pipeline: the engine, the options that hold here, and where in the pipeline it is."""

    __slots__ = ("engine", "options", "path")

    def __init__(self, engine: Engine, options: Options, path: Path = None) -> None:
        self.engine, self.options, self.path = engine, options, path

    def at(self, op: Any, index: int) -> Run:
        """The walk in a part of an op."""
        return Run(self.engine, self.options, (self.path, op, index))

    def on_trunk(self, op: Invertible, x: Wire) -> Wire:
        """A primitive on a trunk of its own."""
        return self.engine.close(self.engine.call(op, self.engine.begin(x, self, partial(repr, op)), self))

    def under(self, options: Options) -> Run:
        """The walk with other options."""
        return self if options is self.options else Run(self.engine, options, self.path)


class Engine(abc.ABC):
    """Runs the primitives of a pipeline in one of the ways in which torch can be running."""

    closes_together = False  # whether a component that leaves a trunk takes the others along

    def finish(self) -> None:  # noqa: B027 - most engines have nothing to do
        """The pipeline has run."""

    @abc.abstractmethod
    def begin(self, x: Wire, run: Run, place: Place) -> State:
        """Open a trunk at a wire."""

    @abc.abstractmethod
    def close(self, state: State) -> Wire:
        """Close a trunk: the wire can be used like any other."""

    @abc.abstractmethod
    def wire(self, state: State) -> Wire:
        """The wire that a state stands for, for its shapes."""

    @abc.abstractmethod
    def opens(self, state: State) -> bool:
        """Whether a trunk begins with this state: nobody upstream wants it rebuilt."""

    def resume(self, state: State) -> None:  # noqa: B027 - most engines have nothing to do
        """Go on after others have run, who may have drawn random numbers."""

    def with_wire(self, state: State, wire: Wire) -> State:
        """A state with another wire of the same values, as a module's hooks return it."""
        return wire

    @abc.abstractmethod
    def call(self, op: Invertible, state: State, run: Run) -> State:
        """Run a primitive that computes; backward rebuilds its input."""

    @abc.abstractmethod
    def move(self, op: Invertible, state: State, run: Run) -> State:
        """Run a primitive that moves elements without arithmetic."""

    @abc.abstractmethod
    def route(self, op: Any, state: State) -> State:
        """Move the components of a wire."""

    @abc.abstractmethod
    def fork(self, op: Any, state: State, step: Callable[[Invertible, State], State], run: Run) -> State:
        """Take each component through a part of an op."""

    @abc.abstractmethod
    def recompute(self, op: Invertible, x: Wire, run: Run, fn: Callable[[Wire], Wire]) -> Wire:
        """``fn(x)``, which runs again from x in backward."""
