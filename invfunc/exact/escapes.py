"""Differences on a device: how many escape their byte, or their two bits, is known late; the host goes on meanwhile.

The whole difference is kept until then. So that a host that is ahead of its device does not keep all of them, it is at
most some differences ahead: there it waits for the oldest, while the device still has work.
"""

from __future__ import annotations

from weakref import ref

import torch
from torch import Tensor

from ..core.packing import count_others, pack_codes, unpack_codes
from ..engine.devices import Late, is_captured
from .bits import bits_of, from_bits

AHEAD = 4  # differences that are kept whole


class LateDifference:
    """What turns a guess at x into x: `invfunc.exact.bits.difference`, of tensors on a device.

    Args:
        x: The tensor.
        guess: A guess at it.
        pack: Whether two bits an element are kept, and not a byte.
    """

    __slots__ = ("__weakref__", "codes", "counts", "dtype", "escapes", "whole")

    def __init__(self, x: Tensor, guess: Tensor, pack: bool = False) -> None:
        whole = bits_of(x) - bits_of(guess.to(x.dtype))
        self.dtype = x.dtype
        self.whole: Tensor | None = whole
        self.codes: Tensor | tuple[Tensor, Tensor] | None = None  # or those of `pack_codes`
        self.escapes: tuple[Tensor, Tensor] | None = None  # places, and the differences there
        if not is_captured(x.device):  # nothing arrives while a graph is captured, and the difference stays whole
            codes = whole.to(torch.int8)
            self.counts = Late(torch.stack([(codes != whole).sum(), *[count_others(codes)] * pack]))
            _WHOLE.append(ref(self))
            _make_small()

    def make_small(self) -> None:
        """Keep a byte or two bits an element, and what escapes."""
        whole = self.whole
        if whole is None:
            return
        codes = whole.to(torch.int8)
        count, *others = map(int, self.counts.values(wait=True))
        if count:
            places = torch.nonzero_static((codes != whole).reshape(-1), size=count)[:, 0]
            self.escapes = places, whole.take(places)
        self.codes = pack_codes(codes, *others) if others else codes
        self.whole = None

    def correct(self, guess: Tensor) -> Tensor:
        """The tensor of which a guess was made."""
        guessed, apart = bits_of(guess.to(self.dtype)), self.whole
        codes = self.codes  # which is there once whole is not
        if apart is None:
            codes = unpack_codes(*codes, guessed.shape) if isinstance(codes, tuple) else codes
            assert codes is not None
            apart = codes.to(guessed.dtype)
            if self.escapes is not None:
                apart.put_(*self.escapes)
        return from_bits(apart.add(guessed), self.dtype)


_WHOLE: list[ref[LateDifference]] = []


def _make_small() -> None:
    """Make those small whose counts have come, and the oldest beyond some."""
    whole = [late for late in (place() for place in _WHOLE) if late is not None and late.whole is not None]
    _WHOLE.clear()
    for place, late in enumerate(whole):
        if late.counts.is_here() or len(whole) - place > AHEAD:
            late.make_small()
        else:
            _WHOLE.append(ref(late))
