"""A call that runs again from its stored input; rule 5 of NOTE [Trunk]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..core.op import Invertible
from ..wires import Wire, blank, detach, leaves
from .conditions import Conditions
from .evaluation import evaluate_again, evaluate_quietly, in_backward
from .frame import Frame, Kept, Record, like_of
from .interface import Options, Path, which
from .meter import CHECK, SAVES, Cause, Probe, probe, telling
from .random_numbers import RandomState
from .snapshot import Snapshot


def conditions_of(functions: Iterable[Any], given: Sequence[Any] = ()) -> Conditions:
    """What functions run under from here, and the modules that they use, or are given."""
    return Conditions(Snapshot(functions, given))


class Region:
    """One call that runs again from its stored arguments; rule 5 of NOTE [Trunk].

    Args:
        fn: The function, of whatever ``build`` makes of tensors.
        build: The arguments, from the tensors that are stored.
        path: Where in the pipeline it is.
        conditions: What it runs under.
        options: How it is lowered.
    """

    __slots__ = ("build", "conditions", "fn", "kept", "options", "probe", "random", "record", "watched")

    def __init__(
        self,
        fn: Callable[..., Any],
        build: Callable[[Sequence[Any]], Sequence[Any]],
        path: Path,
        conditions: Conditions,
        options: Options,
    ) -> None:
        self.fn, self.build = fn, build
        self.record, self.conditions, self.options = Record(None, path, options), conditions, options
        self.random: RandomState | None = None
        self.kept: Kept | None = None
        self.probe: Probe | None = None
        self.watched = -1  # which of the saved tensors is sampled

    @_torch.unseen_by_dynamo
    def run(
        self, args: Sequence[Any], tensors: Sequence[Any], functions: Iterable[Any], within: Sequence[Tensor] = ()
    ) -> Any:
        """``fn(*args)``, recorded; the tensors are those among its arguments, and those within objects among them."""
        frame, kept = Frame(self, 0, self.record), Kept(tensors)
        self.record.like = tuple(map(like_of, tensors))
        given = [t for t in (*tensors, *within) if isinstance(t, Tensor)]
        out = frame.run(self.fn, args, functions, given, self.options.preserve_rng_state)
        if self.record.kinds and frame.held is None:
            self.kept = kept
        return out

    def rebuild(self, frame: Frame) -> None:
        """Hand the frame its tensors: run again."""
        try:
            watched = self.conditions.run(in_backward, self._rebuild)
        except Exception as error:
            self.record.place(error)
            raise
        if self.probe is not None and watched is not None:
            self.probe.compare([watched], (self.fn,), _not_the_same)

    def is_above(self, frame: Frame) -> bool:
        """Whether anything will be asked for."""
        return self.kept is not None

    def watch(self, saved: Sequence[Tensor]) -> None:
        """Sample what tells most of the call, of what it has saved."""
        self.watched = telling(saved) if self.options.drift != "off" else -1
        if self.watched >= 0:
            self.probe = probe([saved[self.watched]], self.options.drift, partial(which, SAVES, self.record.path))

    def _rebuild(self) -> Tensor | None:
        assert self.kept is not None
        x = tuple(self.kept.tensors("an input"))
        return evaluate_again(self.record, lambda again: self._replay(again, x))

    def _replay(self, again: Any, x: tuple[Any, ...]) -> Tensor | None:
        again.hand_over(self._again, x, self.record.like)
        return again.made[self.watched].detach() if 0 <= self.watched < len(again.made) else None

    def _again(self, tensors: tuple[Any, ...]) -> Any:
        return self.fn(*self.build(tensors))


def _not_the_same(error: float, was: Sequence[float]) -> Cause:
    return Cause(
        "the function did something else when it ran again",
        "draw its random numbers from torch, change nothing that it reads before backward, and let it keep nothing "
        f"between calls; {CHECK}",
    )


class RecordedCall:
    """One call of an op, recorded; run again to see whether it does the same."""

    def __init__(self, op: Invertible, x: Wire) -> None:
        self.op, self.record, self.conditions = op, Record(op, None, Options()), conditions_of(op.functions)
        self.record.like = blank(x)
        self.random: RandomState | None = None
        frame = Frame(self, 0, self.record)
        given = [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]
        with torch.no_grad():
            self.y = frame.run(op.forward, (x,), op.functions, given, True)
        self.conditions.snapshot.note()

    def again(self, x: Wire, with_gradients: bool) -> Wire:
        """The op on another input, as backward evaluates it."""
        return self.conditions.run(in_backward, self._again, x, with_gradients)

    def _again(self, x: Wire, with_gradients: bool) -> Wire:
        return evaluate_quietly(self.record, self._with_graph if with_gradients else self.op.forward, x)

    def _with_graph(self, x: Wire) -> Wire:
        with torch.enable_grad():
            return detach(self.op.forward(x))
