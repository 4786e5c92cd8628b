"""Masks, eight elements to a byte, and small numbers, four to a byte."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean tensor of any shape as ``ceil(n / 8)`` bytes, its first eighth in the lowest bits.

    Example:
        >>> pack_bits(torch.tensor([[True, False], [False, True]]))
        tensor([9], dtype=torch.uint8)
    """
    bits = mask.reshape(-1).view(torch.uint8)
    bits = torch.cat([bits, bits.new_zeros(-bits.shape[0] % 8)]).view(8, -1)
    return (bits << _places(mask)).sum(0, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean tensor of a shape that `pack_bits` packed: ``unpack_bits(pack_bits(m), m.shape) == m``.

    Example:
        >>> unpack_bits(torch.tensor([9], dtype=torch.uint8), (2, 2))
        tensor([[ True, False],
                [False,  True]])
    """
    bits = (packed >> _places(packed)) & 1
    return bits.view(-1)[: torch.Size(shape).numel()].view(torch.Size(shape)).view(torch.bool)


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device).view(8, 1)


def pack_codes(codes: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """An int8 tensor whose values are mostly -1, 0 and 1: four to a byte, and a list of the others in their order.

    Args:
        codes: The tensor.
        count: How many others there are, if it is known: to find out is to wait for a device.

    Example:
        >>> pack_codes(torch.tensor([0, 1, -1, 0, 7], dtype=torch.int8))
        (tensor([49,  6], dtype=torch.uint8), tensor([7], dtype=torch.int8))
    """
    small = _small(codes)
    quarters = torch.cat([small, small.new_zeros(-small.shape[0] % 4)]).view(4, -1)
    packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    others = small == _ELSE
    places = others.nonzero() if count is None else torch.nonzero_static(others, size=count)
    return packed, codes.reshape(-1)[places[:, 0]]


def count_others(codes: Tensor) -> Tensor:
    """How many values of an int8 tensor are not -1, 0 or 1.

    Example:
        >>> count_others(torch.tensor([0, 1, -1, 0, 7], dtype=torch.int8))
        tensor(1)
    """
    return (_small(codes) == _ELSE).sum()


def _small(codes: Tensor) -> Tensor:
    flat = codes.reshape(-1) + 1
    return flat.view(torch.uint8).clamp_(max=_ELSE)  # whatever is not -1, 0 or 1 wraps or lies above


def unpack_codes(packed: Tensor, others: Tensor, shape: Sequence[int]) -> Tensor:
    """The int8 tensor of a shape that `pack_codes` packed.

    Example:
        >>> packed, others = pack_codes(torch.tensor([[0, 1], [-1, 7]], dtype=torch.int8))
        >>> unpack_codes(packed, others, (2, 2))
        tensor([[ 0,  1],
                [-1,  7]], dtype=torch.int8)
    """
    small = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])[: torch.Size(shape).numel()]
    codes = small.view(torch.int8) - 1
    if others.numel():
        codes.masked_scatter_(small == _ELSE, others)
    return codes.view(torch.Size(shape))


_ELSE = 3
