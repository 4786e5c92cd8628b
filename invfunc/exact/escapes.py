"""Differences on a device: how many escape their byte is known late, and the host goes on meanwhile.

The whole difference is kept until then. So that a host that is ahead of its device does not keep all of them, it is at
most some differences ahead: there it waits for the oldest, while the device still has work.
"""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor

from ..engine.devices import Late, is_captured
from .bits import bits_of, from_bits

AHEAD = 4  # differences that are kept whole


class LateDifference:
    """What turns a guess at x into x: `invfunc.exact.bits.difference`, of tensors on a device."""

    __slots__ = ("__weakref__", "codes", "count", "dtype", "escapes", "whole")

    def __init__(self, x: Tensor, guess: Tensor) -> None:
        whole = bits_of(x) - bits_of(guess.to(x.dtype))
        self.dtype, self.codes = x.dtype, whole.to(torch.int8)
        self.whole: Tensor | None = whole
        self.escapes: tuple[Tensor, Tensor] | None = None  # places, and the differences there
        if not is_captured(x.device):  # nothing arrives while a graph is captured, and the difference stays whole
            self.count = Late((self.codes != whole).sum().reshape(1))
            _WHOLE.append(ref(self))
            _make_small()

    def make_small(self) -> None:
        """Keep a byte an element, and what escapes."""
        whole = self.whole
        count = int(self.count.values(wait=True)[0])
        if whole is not None and count:
            places = torch.nonzero_static((self.codes != whole).reshape(-1), size=count)[:, 0]
            self.escapes = places, whole.take(places)
        self.whole = None

    def correct(self, guess: Tensor) -> Tensor:
        """The tensor of which a guess was made."""
        guessed, apart = bits_of(guess.to(self.dtype)), self.whole
        if apart is None:
            apart = self.codes.to(guessed.dtype)
            if self.escapes is not None:
                apart.put_(*self.escapes)
        return from_bits(apart.add(guessed), self.dtype)


_WHOLE: list[ref[LateDifference]] = []


def _make_small() -> None:
    """Make those small whose counts have come, and the oldest beyond some."""
    whole = [late for late in (place() for place in _WHOLE) if late is not None and late.whole is not None]
    _WHOLE.clear()
    for place, late in enumerate(whole):
        if late.count.is_here() or len(whole) - place > AHEAD:
            late.make_small()
        else:
            _WHOLE.append(ref(late))
