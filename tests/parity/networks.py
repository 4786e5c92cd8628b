"""The invertible U-Nets of the package ``iunets``, with `invfunc.compat.memcnn` in the place of MemCNN: ``make parity``.

Both packages are as they were published. The losses of training are those of MemCNN and of plain training, and no step
holds more than MemCNN's at its peak.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import memcnn as theirs
import pytest
import torch
from torch import nn

from invfunc.compat import memcnn as ours
from invfunc.look.memory import measure

SIDES = {1: 128, 2: 16, 3: 8}
CHANNELS = 8


def network(memcnn: ModuleType, dim: int, architecture: tuple[int, ...], **options: bool) -> nn.Module:
    """An iUNet on one of the two, always with the same weights; it is the identity as it comes, so they are moved."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "iunets"]:
        del sys.modules[name]
    sys.modules["memcnn"] = memcnn
    torch.manual_seed(0)
    net = importlib.import_module("iunets").iUNet(CHANNELS, architecture, dim, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def train(net: nn.Module, x: torch.Tensor) -> tuple[list[float], int]:
    """The losses of four steps, and the peak of the last."""
    losses: list[float] = []
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss = (net(x * 1.0) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    for _ in range(3):
        step()
    return losses, measure(step).peak_bytes


@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("architecture", [(2, 2), (4, 4), (1, 2, 2)])
@pytest.mark.parametrize("dim", SIDES)
def test_iunets_train_as_on_memcnn_with_no_higher_peak(
    dim: int, architecture: tuple[int, ...], learnable: bool
) -> None:
    x = torch.randn(4, CHANNELS, *[SIDES[dim]] * dim)
    options = dim, architecture
    expected, highest = train(network(theirs, *options, learnable_resampling=learnable), x)
    plain, _ = train(network(ours, *options, learnable_resampling=learnable, disable_custom_gradient=True), x)
    losses, peak = train(network(ours, *options, learnable_resampling=learnable), x)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses == pytest.approx(plain, rel=1e-5)
    assert losses[-1] < losses[0]
    assert peak <= highest
