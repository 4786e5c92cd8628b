"""Bit patterns of floating-point tensors: differences that undo any rounding, and a hash that tells tensors apart."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..wires import refuse_nested

Difference: TypeAlias = tuple[torch.dtype, Tensor, Tensor, Tensor]  # dtype, int8 codes, places, patterns there

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(x: Tensor) -> Tensor:
    """The bit pattern of each element as an integer: a view; a complex number has two.

    Example:
        >>> bits_of(torch.tensor([0.0, -0.0, 1.0], dtype=torch.float16))
        tensor([     0, -32768,  15360], dtype=torch.int16)
    """
    refuse_nested("exact", x)
    real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return real.view(_INTEGERS[real.element_size()])


def from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor of a dtype with these bit patterns: ``from_bits(bits_of(x), x.dtype)`` is x.

    Example:
        >>> from_bits(torch.tensor([15360], dtype=torch.int16), torch.float16)
        tensor([1.], dtype=torch.float16)
    """
    return torch.view_as_complex(bits.view(dtype.to_real())) if dtype.is_complex else bits.view(dtype)


def difference(x: Tensor, guess: Tensor) -> Difference:
    """What turns a guess at x into x, in one byte an element: the difference of their bit patterns.

    Neighbouring floating-point numbers of one sign have neighbouring patterns, so a guess that is off by rounding
    differs by little. Differences that do not fit into a byte escape: their places and the patterns of x are listed.
    Integers wrap, so that it is exact for any two tensors, infinities and NaN included.

    Example:
        >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0]))[1:3]
        (tensor([0, 0], dtype=torch.int8), tensor([1], dtype=torch.int32))
    """
    bits = bits_of(x)
    apart = bits - bits_of(guess.to(x.dtype))
    codes = apart.to(torch.int8)
    places = _nonzero(apart.add_(128).bitwise_right_shift_(8))  # nonzero outside of -128 ... 127
    return x.dtype, codes, places, bits.take(places.long())


def _nonzero(flags: Tensor) -> Tensor:
    places = flags.reshape(-1).nonzero()[:, 0]
    return places.to(torch.int32) if flags.numel() < 2**31 else places


def corrected(guess: Tensor, by: Difference) -> Tensor:
    """The tensor of which a guess was made: ``corrected(guess, difference(x, guess))`` has the bits of x.

    Example:
        >>> x, guess = torch.tensor([0.1, -0.0]), torch.tensor([0.1000001, 0.0])
        >>> corrected(guess, difference(x, guess))
        tensor([0.1000, -0.0000])
    """
    dtype, codes, places, patterns = by
    guessed = bits_of(guess.to(dtype))
    bits = codes.to(guessed.dtype).add_(guessed)  # in the layout of x, as the codes are
    if patterns.numel():
        bits.put_(places.long(), patterns)
    return from_bits(bits, dtype)


def bit_hash(x: Tensor) -> Tensor:
    """One integer that depends on every bit of a tensor and on its place.

    Words of 64 bits are weighted by odd numbers of their row and of their place in it, so no change of a single word
    goes unseen, and an exchange of words hardly ever.

    Example:
        >>> bool(bit_hash(torch.tensor([1.0, 2.0])) == bit_hash(torch.tensor([2.0, 1.0])))
        False
    """
    bits = bits_of(x.contiguous()).reshape(-1)
    padding = -bits.numel() % (_ROW * 8 // bits.element_size())
    words = pad(bits, (0, padding)).view(torch.int64).view(-1, _ROW)
    rows = (words * _weights(0, _ROW, x.device)).sum(1)
    return (rows * _weights(_ROW, len(rows), x.device)).sum()


_ROW = 4096
_SPREAD = 0x1E3779B97F4A7C15  # odd, with its bits everywhere


def _weights(first: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(first, first + count, device=device).mul_(_SPREAD).bitwise_or_(1)
