"""A Glow: squeeze, actnorm, 1x1 convolution, affine coupling, multi-scale split; trained lowered, log-det included."""

import math
from typing import Any

import pytest
import torch
from kit import assert_close
from torch import Tensor, nn
from torch.distributions import Normal

import invfunc as inv
from invfunc import ops
from invfunc.look.memory import measure

# What is freed is freed by reference counts: memory held by a cycle shows.
pytestmark = pytest.mark.usefixtures("no_gc")


class Step(nn.Module):
    """The parameters of a step of flow."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(0.05 * torch.randn(channels))
        self.bias = nn.Parameter(0.05 * torch.randn(channels))
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.net = nn.Sequential(
            nn.Conv2d(channels // 2, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 3, padding=1),
        )
        with torch.no_grad():
            self.net[-1].weight *= 0.2

    def op(self) -> inv.Invertible:
        """The step as an op."""
        return inv.chain(
            ops.actnorm(self.log_scale, self.bias),
            ops.conv1x1(self.weight),
            inv.split(2),
            inv.couple(inv.ops.tanh_scale(self.net), law=inv.affine),
            inv.concat(2),
        )


class Glow(nn.Module):
    """The parameters of a Glow, and the op that they make."""

    def __init__(self, channels: int, scales: int, steps: int, hidden: int = 8) -> None:
        super().__init__()
        sizes = [channels * 2 ** (scale + 2) for scale in range(scales)]
        self.scales = nn.ModuleList([nn.ModuleList([Step(size, hidden) for _ in range(steps)]) for size in sizes])

    def op(self) -> inv.Invertible:
        """From an image to ``(z1, (z2, ... zn))``: each scale but the last sends half of its channels out."""
        whole = inv.chain()
        for i, steps in enumerate(reversed(self.scales)):
            after = inv.chain(inv.split(2), inv.parallel(inv.chain(), whole)) if i else whole
            whole = inv.chain(ops.pixel_unshuffle(2), *(step.op() for step in steps), after)
        return whole

    def flow(self, lowered: bool) -> Any:
        """The density of images."""
        op = inv.checkpoint(self.op()) if lowered else self.op()
        base: Any = Normal(0.0, 1.0)
        for _ in self.scales[1:]:
            base = (Normal(0.0, 1.0), base)
        return inv.flow(op, base)


def test_the_log_density_is_that_of_the_jacobian() -> None:
    glow, x = Glow(1, 2, 3), torch.randn(2, 1, 4, 4)

    def latent(image: Tensor) -> Tensor:
        return torch.cat([z.flatten() for z in inv.wires.leaves(glow.op()(image[None]))])

    z = torch.stack([latent(image) for image in x])
    jacobian = torch.stack([torch.func.jacrev(latent)(image) for image in x]).reshape(2, 16, 16)
    expected = torch.linalg.slogdet(jacobian)[1] - (z**2).sum(1) / 2 - 8 * math.log(2 * math.pi)
    for lowered in (False, True):
        assert_close(glow.flow(lowered).log_prob(x), expected, 1e-8, relative=0)


def gradients(glow: Glow, x: Tensor, lowered: bool) -> tuple[Tensor, ...]:
    nll = -glow.flow(lowered).log_prob(x).mean() / x[0].numel()
    return nll, *torch.autograd.grad(nll, [x, *glow.parameters()])


@pytest.mark.parametrize("scales", [2, 3])
def test_gradients_of_32_steps_a_scale_are_those_of_the_plain_flow(scales: int) -> None:
    glow, x = Glow(3, scales, 32), torch.randn(2, 3, 16, 16, requires_grad=True)
    for found, expected in zip(gradients(glow, x, True), gradients(glow, x, False), strict=True):
        assert_close(found, expected, 1e-8)


def test_there_and_back() -> None:
    glow, x = Glow(3, 3, 4), torch.randn(2, 3, 16, 16)
    z, total = inv.log_det(glow.op(), x)
    assert inv.wires.describe(z) == "((2, 6, 8, 8), ((2, 12, 4, 4), (2, 48, 2, 2)))"
    back, negative = inv.log_det(inv.invert(glow.op()), z)
    assert_close(back, x, 1e-11, relative=0)
    assert_close(negative, -total, 1e-9, relative=0)


# ---- memory --------------------------------------------------------------------------------------------------------


def peak(steps: int, lowered: bool) -> float:
    """The peak of a training step in images of the input; gradients of parameters are dropped as soon as they come."""
    glow, x = Glow(3, 3, steps), torch.randn(8, 3, 16, 16)
    for parameter in glow.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    flow = glow.flow(lowered)
    return measure(lambda: (-flow.log_prob(x).mean()).backward()).peak_bytes / x.nbytes


def test_the_peak_does_not_depend_on_the_number_of_steps() -> None:
    peak(1, True)
    shallow, deep = peak(4, True), peak(32, True)
    assert deep <= 1.02 * shallow
    assert peak(4, False) > 2 * shallow


def test_it_trains() -> None:
    data = torch.randn(16, 1, 8, 8).cumsum(-1) / 3

    def trained(lowered: bool) -> list[float]:
        torch.manual_seed(0)
        glow, losses = Glow(1, 2, 4), []
        optimizer = torch.optim.Adam(glow.parameters(), 1e-2)
        flow = glow.flow(lowered)
        for _ in range(20):
            loss = -flow.log_prob(data).mean() / 64
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    lowered = trained(True)
    assert lowered == pytest.approx(trained(False), abs=1e-8)
    assert lowered[-1] < lowered[0] - 0.3
