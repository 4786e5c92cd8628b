"""Turns: who may change a thing of the process that others use; rule 5 of NOTE [Conditions]."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ENDED = threading.Condition()
_TURNS: dict[object, frozenset[Hashable]] = {}  # what each holder has to itself
_MINE: ContextVar[tuple[object, ...]] = ContextVar("mine", default=())  # the turns that this context is nested in


def patience() -> float | None:
    """How long to wait for what there is but once: a second on a device's autograd worker, whom its holder may need.

    A holder that needs the worker is inside of a nested gradient, and goes on when the worker has done its work.
    """
    return 1.0 if threading.current_thread().name.startswith("Dummy") else None  # Python has not begun this thread


@contextmanager
def turn(things: Iterable[Hashable], patience: float | None = None) -> Iterator[bool]:
    """Have things to oneself, and to what is nested inside; yields whether one has them.

    Args:
        things: What they are, as others name them.
        patience: How long to wait where another holder has one of them, in seconds; without end if it is not given.
    """
    holder = _begin(frozenset(things), patience)
    if holder is None:
        yield False
        return
    token = _MINE.set((*_MINE.get(), holder))
    try:
        yield True
    finally:
        _MINE.reset(token)
        with _ENDED:
            del _TURNS[holder]
            _ENDED.notify_all()


def _begin(things: frozenset[Hashable], patience: float | None) -> object | None:
    with _ENDED:
        if not _ENDED.wait_for(lambda: not _are_taken(things), patience):
            return None
        holder = object()
        _TURNS[holder] = things
        return holder


def _are_taken(things: frozenset[Hashable]) -> bool:
    mine = _MINE.get()
    return any([holder not in mine and not things.isdisjoint(held) for holder, held in _TURNS.items()])
