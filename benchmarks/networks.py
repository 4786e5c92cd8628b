"""What is trained: networks of additive couplings, as one value each, and one of them at a depth: `Net`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, eq=False)
class Net:
    """The functions (f, g) of every coupling, an input, and the dimension along which it is split in two."""

    pairs: tuple[tuple[nn.Module, nn.Module], ...]
    x: Tensor
    dim: int

    @property
    def branches(self) -> list[nn.Module]:
        return [branch for pair in self.pairs for branch in pair]

    @property
    def leaves(self) -> Iterator[Tensor]:
        """All that gets a gradient."""
        yield self.x
        for branch in self.branches:
            yield from branch.parameters()

    def to(self, to: torch.dtype | torch.device) -> Net:
        """The same numbers, in another dtype or on another device, with gradients of their own."""
        pairs = tuple((deepcopy(f).to(to), deepcopy(g).to(to)) for f, g in self.pairs)
        return replace(self, pairs=pairs, x=self.x.detach().to(to, copy=True).requires_grad_())


@dataclass(frozen=True)
class Network:
    """A kind of coupling, and the shape of the input."""

    pair: Callable[[int], tuple[nn.Module, nn.Module]]
    shape: tuple[int, ...]
    dim: int = 1

    def at(self, depth: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Net:
        """The network of this depth: the same numbers on every call."""
        torch.manual_seed(0)
        pairs = tuple(self.pair(self.shape[self.dim] // 2) for _ in range(depth))
        return Net(pairs, torch.randn(self.shape), self.dim).to(dtype).to(torch.device(device))


def twice(branch: Callable[[int], nn.Module]) -> Callable[[int], tuple[nn.Module, nn.Module]]:
    return lambda width: (branch(width), branch(width))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def conv(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))


class Attention(nn.Module):
    """Self-attention of the pre-norm kind, over (batch, sequence, width)."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).transpose(1, 3)
        q, k, v = heads.unbind(2)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def transformer(width: int) -> tuple[nn.Module, nn.Module]:
    feed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    return Attention(width), feed


LARGE = {
    "mlp": Network(twice(mlp), (512, 512)),
    "conv": Network(twice(conv), (8, 128, 16, 16)),
    "transformer": Network(transformer, (1, 2048, 64), dim=2),
}
SMALL = {
    "mlp": Network(twice(mlp), (512, 128)),
    "conv": Network(twice(conv), (4, 16, 16, 16)),
    "transformer": Network(transformer, (1, 256, 64), dim=2),
}
