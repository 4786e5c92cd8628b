"""The host does not wait for a device in a step of training; drift is judged when its numbers have come."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import TOLERANCE, assert_close, bowl, network
from torch import Tensor, nn

import invfunc as inv
from invfunc.errors import DriftError, DriftWarning, ReplayError

from . import sim
from .cases_training import DEVICE, LOWERINGS, branch


def assert_no_waits(fn: Callable[..., Any], *inputs: Tensor) -> None:
    """A step of training waits nowhere."""
    with sim.waits(raising=True):
        xs = [x.detach().requires_grad_() for x in inputs]
        bowl(fn(*xs)).backward()


@pytest.mark.parametrize("kind", ["plain", "dropout", "batch norm"])
@pytest.mark.parametrize("lower", LOWERINGS.values(), ids=LOWERINGS)
def test_a_step_does_not_wait(lower: Callable[[inv.Invertible], Callable[..., Any]], kind: str) -> None:
    op, x = network([branch(kind) for _ in range(4)], dim=-1), torch.randn(6, 8, device=DEVICE)
    assert_no_waits(lower(op), x)


OPS: dict[str, Callable[[], tuple[Any, Tensor]]] = {
    "dense linear": lambda: (
        inv.ops.linear(torch.randn(8, 8, device=DEVICE).add_(4 * torch.eye(8, device=DEVICE)).requires_grad_()),
        torch.randn(6, 8, device=DEVICE),
    ),
    "grid": lambda: (inv.exact(network([branch("plain") for _ in range(4)], dim=-1)), torch.randn(6, 8, device=DEVICE)),
}


@pytest.mark.parametrize("make", OPS.values(), ids=OPS)
def test_an_op_does_not_wait(make: Callable[[], tuple[Any, Tensor]]) -> None:
    op, x = make()
    assert_no_waits(inv.checkpoint(op), x)


def test_an_iteration_looks_at_the_device_now_and_then() -> None:
    f = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).to(DEVICE)
    with torch.no_grad():
        f[0].weight.mul_(0.5)
    calls = []
    op = inv.ops.residual_flow(lambda x: calls.append(1) or f(x))
    y = torch.randn(6, 8, device=DEVICE)
    with sim.waits() as seen, torch.no_grad():
        x = op.inverse(y)
    assert_close(op.forward(x), y, TOLERANCE)
    assert 0 < seen.total <= len(calls) / 4


def test_new_sizes_do_not_wait() -> None:
    fast = inv.checkpoint(network([branch() for _ in range(4)], dim=-1), segments=2)
    for size in range(1, 12):
        assert_no_waits(fast, torch.randn(size, 8, device=DEVICE))


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_what_escapes_its_byte_comes_back(scale: float) -> None:
    op = network([lambda x: scale * torch.sin(x)] * 20, dim=-1)  # of a large step little is left of what was small
    x = torch.randn(50, 8, device=DEVICE)
    fast = inv.checkpoint(inv.exact(op, mode="codes"))
    for _ in range(2):
        with sim.waits() as seen:
            leaf = x.clone().requires_grad_()
            (found,) = torch.autograd.grad(fast(leaf).sum(), leaf)
        assert not seen.total
    (expected,) = torch.autograd.grad(op(leaf).sum(), leaf)
    assert_close(found, expected, 1e-6)


# ---- drift -----------------------------------------------------------------------------------------------------------


def wrong_by(error: float, device: Any = DEVICE) -> tuple[Any, Tensor]:
    """An op whose inverse is off, and an input."""
    two = torch.tensor(2.0, device=device, requires_grad=True)
    return inv.pair(lambda x: x * two, lambda y: y / two * (1 + error)), torch.randn(8, 8, device=device)


def drift_of(op: Any, x: Tensor, **options: Any) -> None:
    x = x.detach().requires_grad_()
    torch.autograd.grad(inv.checkpoint(op, **options)(x * 1).sum(), x)


@pytest.mark.parametrize("device", ["sim:0", "sim:1"])
def test_the_warning_comes_with_a_later_pipeline(device: str) -> None:
    op, x = wrong_by(0.1, device)
    with sim.waits(raising=True):
        drift_of(op, x)
    torch.accelerator.synchronize(device)
    with pytest.warns(DriftWarning, match="about 1e-01 of its size"):
        drift_of(*wrong_by(0.0))


def test_nothing_is_read_before_it_has_come() -> None:
    op, x = wrong_by(0.0)
    x.requires_grad_()
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    for _ in range(6):
        with torch.Stream(DEVICE):
            y = inv.checkpoint(op)(x * 1)
        torch.autograd.grad(y.sum(), x)


def test_an_error_is_raised_where_it_belongs() -> None:
    op, x = wrong_by(0.1)
    with pytest.raises(DriftError, match="about 1e-01 of its size"):
        drift_of(op, x, drift="raise")
    drift_of(*wrong_by(0.0), drift="raise")


def test_other_bits_are_an_error_when_their_hash_has_come() -> None:
    weight = torch.ones(4, device=DEVICE, requires_grad=True)
    fast = inv.checkpoint(inv.exact(network([lambda x: (x * weight).sin()] * 2, dim=-1), mode="codes"))
    y = fast(torch.randn(6, 8, device=DEVICE).requires_grad_())
    weight.data.mul_(1.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y.sum().backward()
    torch.accelerator.synchronize()
    with pytest.raises(ReplayError, match="was not rebuilt with the bits of forward"):
        fast(torch.randn(6, 8, device=DEVICE))
