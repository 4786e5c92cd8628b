"""Masks, eight elements to a byte."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean tensor of any shape as ``ceil(n / 8)`` bytes, the first element in the lowest bit.

    Example:
        >>> pack_bits(torch.tensor([[True, False], [False, True]]))
        tensor([9], dtype=torch.uint8)
    """
    bits = mask.flatten().to(torch.uint8)
    bits = torch.cat([bits, bits.new_zeros(-bits.shape[0] % 8)]).view(-1, 8)
    return (bits << _places(mask)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean tensor of a shape that `pack_bits` packed: ``unpack_bits(pack_bits(m), m.shape) == m``.

    Example:
        >>> unpack_bits(torch.tensor([9], dtype=torch.uint8), (2, 2))
        tensor([[ True, False],
                [False,  True]])
    """
    bits = (packed.unsqueeze(1) >> _places(packed)) & 1
    return bits.flatten()[: torch.Size(shape).numel()].view(torch.Size(shape)).bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
