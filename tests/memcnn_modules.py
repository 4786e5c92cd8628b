"""Modules with MemCNN's names that the tests of them share, and a step of training."""

import copy

import torch
from kit import close
from torch import Tensor, nn

from invfunc.compat import memcnn


def net(channels: int = 2, out: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out or channels, 3, padding=1), nn.Tanh())


def coupling(kind: str = "additive", **options) -> nn.Module:
    return memcnn.create_coupling(net(), net(), kind, adapter=memcnn.AffineAdapterNaive, **options)


def wrapped(kind: str = "additive", **options) -> memcnn.InvertibleModuleWrapper:
    return memcnn.InvertibleModuleWrapper(coupling(kind), **options)


def images() -> tuple[Tensor, Tensor]:
    """A leaf that requires grad, and a tensor made from it, which may be donated."""
    leaf = torch.randn(2, 4, 3, 3, requires_grad=True)
    return leaf, leaf * 1


def disabled(module: nn.Module) -> nn.Module:
    """The same module with every wrapper switched off: plain autograd."""
    plain = copy.deepcopy(module)
    for part in plain.modules():
        if isinstance(part, memcnn.InvertibleModuleWrapper):
            part.disable = True
    return plain


def step(module: nn.Module, x: Tensor, seed: int = 0) -> list[Tensor | None]:
    """One training step: the value, the gradients of input and parameters, the buffers, and the next random number."""
    torch.manual_seed(seed)
    leaf = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(leaf * 1)
    (y * torch.arange(1.0, 1 + y.numel()).view_as(y).cos()).sum().backward()
    return [y, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers(), torch.rand(1)]


def assert_trains_as_plain(module: nn.Module, x: Tensor) -> None:
    plain = disabled(module)
    for found, expected in zip(step(module, x), step(plain, x), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or close(found.double(), expected.double())


class Multiply(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.factor * x

    def inverse(self, y):
        return y / self.factor
