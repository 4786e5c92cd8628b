"""Flows on a device: densities, samples and their gradients are those of the CPU, and a step of training waits for nothing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import contraction, mlp
from kit import TOLERANCE, assert_close, bowl, parameters
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import invfunc as inv

from . import sim
from .cases_training import DEVICE

ops = inv.ops


def coupled(f: nn.Module, g: nn.Module) -> inv.Invertible:
    law = {"law": inv.affine}
    nets = (ops.tanh_scale(lambda x, c, net=net: net(torch.cat([x, c], 1)), dim=1) for net in (f, g))
    return ops.given(inv.chain(inv.split(2), inv.couple(*nets, **law), inv.concat(2)))


def splines(f: nn.Module, g: nn.Module) -> inv.Invertible:
    def spline(net: nn.Module) -> Callable[[Tensor], Any]:
        return lambda x: (net(x).view(len(x), 2, 5),)

    return inv.chain(inv.split(2), inv.couple(spline(f), spline(g), law=lambda w: ops.linear_spline(w)), inv.concat(2))


def residual(f: nn.Module) -> inv.Invertible:
    return ops.residual_flow(f)


def series(f: nn.Module) -> inv.Invertible:
    return ops.residual_flow(f, log_det=ops.power_series_log_det(4))


FLOWS: dict[str, tuple[Callable[..., inv.Invertible], Callable[[], list[nn.Module]], int]] = {
    "coupled, with a context": (coupled, lambda: [mlp(2 + 3, 4), mlp(2 + 3, 4)], 3),
    "splines": (splines, lambda: [mlp(2, 10), mlp(2, 10)], 0),
    "residual": (residual, lambda: [contraction(4)], 0),
    "residual, by a series": (series, lambda: [contraction(4)], 0),
}


def made(name: str, device: str, wrap: Any) -> tuple[Any, list[Tensor], Tensor, Tensor | None]:
    """A flow, its parameters, points and contexts: the same numbers on every device."""
    build, nets, width = FLOWS[name]
    torch.manual_seed(3)
    modules = [net.to(device) for net in nets()]
    x, c = torch.randn(6, 4).to(device), torch.randn(6, width).to(device) if width else None
    base = Independent(Normal(torch.zeros(4, device=device), 1.0, validate_args=False), 1, validate_args=False)
    return inv.flow(wrap(build(*modules)), base), parameters(*modules), x, c


def density(name: str, device: str, wrap: Any) -> list[Tensor]:
    flow, tensors, x, c = made(name, device, wrap)
    torch.manual_seed(5)
    with sim.waits(raising=True):
        leaf = x.requires_grad_()
        value = flow.log_prob(leaf, context=c)
        found = torch.autograd.grad(bowl(value), [leaf, *tensors])
    return [t.detach().cpu() for t in (value, *found)]


def draws(name: str, device: str, wrap: Any) -> list[Tensor]:
    flow, tensors, _, c = made(name, device, wrap)
    torch.manual_seed(5)
    with sim.waits(raising=True):
        x = flow.rsample((3,) if c is None else 2, context=c)
        found = torch.autograd.grad(bowl(x), tensors, allow_unused=True)
        torch.manual_seed(5)
        assert torch.is_grad_enabled() and not flow.sample(2, context=c).requires_grad
    return [t if t is None else t.detach().cpu() for t in (x, *found)]


@pytest.mark.parametrize("wrap", [lambda op: op, inv.checkpoint], ids=["plain", "lowered"])
@pytest.mark.parametrize("of", [density, draws])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_is_that_of_the_cpu_and_does_not_wait(of: Callable[..., list[Tensor]], name: str, wrap: Any) -> None:
    assert_close(of(name, DEVICE, wrap), of(name, "cpu", lambda op: op), TOLERANCE)


def test_a_flow_trains_on_a_device_as_on_the_cpu() -> None:
    f = nn.ModuleList([mlp(2 + 3, 4), mlp(2 + 3, 4)])
    x, c, found = torch.randn(6, 4), torch.randn(6, 3), {}
    for device in ("cpu", DEVICE):
        nets = copy.deepcopy(f).to(device)
        base = Normal(torch.zeros(4, device=device), 1.0, validate_args=False)
        flow, optimizer = inv.flow(inv.checkpoint(coupled(*nets)), base), torch.optim.Adam(nets.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (-flow.log_prob(x.to(device), context=c.to(device)).mean()).backward()
            optimizer.step()
        found[device] = [p.detach().cpu() for p in nets.parameters()]
    assert_close(found[DEVICE], found["cpu"], TOLERANCE)
