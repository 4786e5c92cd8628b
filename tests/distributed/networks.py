"""One network twice: by this package, and by torch alone. Both have the same parameters under the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import invfunc as inv

WIDTH, DEPTH, BATCH = 8, 4, 8


class PlainCoupling(nn.Module):
    """`inv.nn.Coupling`, by torch alone."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.f(x2)
        return torch.cat([y1, x2 + self.g(y1)], 1)


def dense(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh())


def normed(width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, width))


def wide(width: int) -> nn.Module:
    """Up and down again: what tensor parallelism splits."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))


def _network(container: Any, block: Any, branch: Callable[[int], nn.Module], depth: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    blocks = [block(branch(width), branch(width)) for _ in range(depth)]
    return container(nn.Linear(6, 2 * width), *blocks, nn.Linear(2 * width, 3))


def reversible(branch: Callable[[int], nn.Module] = dense, depth: int = DEPTH, width: int = WIDTH) -> nn.Module:
    return _network(inv.nn.Sequential, inv.nn.Coupling, branch, depth, width)


def plain(branch: Callable[[int], nn.Module] = dense, depth: int = DEPTH, width: int = WIDTH) -> nn.Module:
    return _network(nn.Sequential, PlainCoupling, branch, depth, width)


def batch(step: int = 0, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    """Inputs and targets, the same on every rank."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 3, generator=generator)


def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ((net(x) - y) ** 2).mean()


def full(tensor: Tensor) -> Tensor:
    """What a parameter or gradient is when all ranks put their parts together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(net: nn.Module) -> list[Tensor]:
    return [full(p.grad) for p in net.parameters() if p.grad is not None]


def weights(net: nn.Module) -> list[Tensor]:
    return [full(p).detach() for p in net.parameters()]


def train(net: nn.Module, share: Callable[[Tensor], Tensor] = lambda t: t, steps: int = 3) -> nn.Module:
    """Some steps of SGD, each on a batch of its own; the last gradients stay."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        loss(net, *map(share, batch(step))).backward()
        optimizer.step()
    return net
