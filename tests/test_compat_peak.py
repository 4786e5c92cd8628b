"""Blocks of the predecessors' names, wrapped one by one: a step needs no more memory for more of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from invfunc.compat import invtorch, memcnn
from invfunc.compat.invtorch import nn as inn
from invfunc.look.memory import measure

WIDTH = 16


def half(bound: float = 0.05) -> nn.Module:
    """A net with small weights: the stacks are not to drift."""
    layer = nn.Linear(WIDTH // 2, WIDTH // 2)
    nn.init.uniform_(layer.weight, -bound, bound)
    return layer


class Shift(nn.Module):
    """An invertible module of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = half()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([a + self.net(b).tanh(), b], 1)

    def inverse(self, y: Tensor) -> Tensor:
        a, b = y.chunk(2, 1)
        return torch.cat([a - self.net(b).tanh(), b], 1)


class Scale(nn.Module):
    """A net of an affine coupling."""

    def __init__(self) -> None:
        super().__init__()
        self.net = half()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 1 + self.net(x).tanh(), self.net(x)


class OfInvTorch(invtorch.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = Shift()

    def function(self, x: Tensor) -> Tensor:
        return self.shift(x)

    def inverse(self, y: Tensor) -> Tensor:
        return self.shift.inverse(y)


class Called(nn.Module):
    """A block that calls something else with a `Shift`."""

    def __init__(self, call: Callable[[Shift, Tensor], Tensor]) -> None:
        super().__init__()
        self.shift, self.call = Shift(), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.shift, x)


class Backwards(nn.Module):
    """A wrapper, the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.wrapper = memcnn.InvertibleModuleWrapper(Shift())

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapper.inverse(x)


def safe(layer: Any) -> nn.Module:
    layer.donate = "safe"
    if hasattr(layer, "kernel_size") or isinstance(layer, inn.Linear):
        nn.init.orthogonal_(layer.weight)
    return layer


def wrapped(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: memcnn.InvertibleModuleWrapper(make())


FACES: dict[str, Callable[[], nn.Module]] = {
    "memcnn, additive": wrapped(lambda: memcnn.AdditiveCoupling(half())),
    "memcnn, affine": wrapped(lambda: memcnn.AffineCoupling(Scale())),
    "memcnn, adapter": wrapped(
        lambda: memcnn.AffineCoupling(half(1e-3), adapter=memcnn.AffineAdapterNaive)  # whose scales grow like exp(exp)
    ),
    "memcnn, create_coupling": wrapped(lambda: memcnn.create_coupling(half())),
    "memcnn, own module": wrapped(Shift),
    "memcnn, block": lambda: memcnn.ReversibleBlock(half(), coupling="additive"),
    "memcnn, inverse": Backwards,
    "memcnn of invtorch": wrapped(OfInvTorch),
    "invtorch, module": OfInvTorch,
    "invtorch, checkpoint": lambda: Called(lambda m, x: invtorch.checkpoint(m, x, inverse=m.inverse)),
    "invtorch, Sequential": lambda: safe(inn.Sequential(OfInvTorch(), OfInvTorch())),
    "invtorch, Linear": lambda: safe(inn.Linear(WIDTH, WIDTH)),
    "invtorch, Conv1d": lambda: safe(inn.Conv1d(WIDTH, WIDTH, 1)),
    "invtorch, BatchNorm1d": lambda: safe(inn.BatchNorm1d(WIDTH)),
}


@pytest.mark.filterwarnings("ignore:use InvertibleModuleWrapper:DeprecationWarning")
@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("face", FACES)
def test_the_peak_of_a_step_does_not_depend_on_the_number_of_blocks(face: str) -> None:
    x = torch.randn(256, WIDTH, *[1] * ("Conv" in face))

    def numbers(depth: int) -> tuple[int, int]:
        net = nn.Sequential(*[FACES[face]() for _ in range(depth)])
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)

        def step() -> None:
            net(x * 1.0).sum().backward()

        step()
        return measure(lambda: net(x * 1.0)).held_bytes, measure(step).peak_bytes

    small, large = numbers(4), numbers(16)
    statistics = 12 * WIDTH * 64 if "BatchNorm" in face else 0  # of each of 12 more, which the inverse needs
    assert all(0 <= b - a <= statistics for a, b in zip(small, large, strict=True)), (small, large, x.nbytes)
