"""The catalogue on a device: every op has the CPU's values and gradients there, waits for nothing, and keeps its laws."""

from typing import Any

import pytest
import torch
from catalogue import EXAMPLES
from kit import TOLERANCE, assert_close, loss, tensors_of
from test_laws import SPECIAL, failure, required
from torch import Tensor

import invfunc as inv
from invfunc.core.op import graph_leaves
from invfunc.testing import LAWS, needs_no_residue
from invfunc.wires import is_differentiable, map_wire

from . import sim
from .cases_training import DEVICE

NAMES = sorted(EXAMPLES)


def made(name: str, device: str) -> tuple[inv.Invertible, Any]:
    """An op of the catalogue and an input, the same numbers on every device."""
    torch.manual_seed(3)
    with torch.device(device):
        x = EXAMPLES[name].inputs()[1]
        return EXAMPLES[name].make(), map_wire(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, x)


def run(op: Any, x: Any, waits: bool, leaves: list[Tensor]) -> list[Any]:
    """Values, and gradients by the input and by leaves."""
    torch.manual_seed(5)
    x = map_wire(lambda leaf: leaf.detach().requires_grad_() if is_differentiable(leaf) else leaf, x)
    inputs = [*(t for t in tensors_of(x) if t.requires_grad), *leaves]
    with sim.waits(raising=not waits):
        y = op(x)
        found = torch.autograd.grad(loss(y), inputs, allow_unused=True, retain_graph=True) if inputs else []
    return [t if t is None else t.detach().cpu() for t in (*tensors_of(y), *found)]


def parameters_of(op: inv.Invertible, x: Any) -> list[Tensor]:
    """What requires grad of what an op closes over, in the order of its graph."""
    torch.manual_seed(5)
    return list(graph_leaves([t for t in tensors_of(op(x)) if t.requires_grad], set()))


@pytest.mark.parametrize("name", NAMES)
def test_an_op_is_that_of_the_cpu_and_does_not_wait(name: str) -> None:
    op, x = made(name, "cpu")
    expected = run(op, x, True, parameters_of(op, x))
    op, x = made(name, DEVICE)
    leaves = parameters_of(op, x)
    for way in (op, inv.checkpoint(op)):
        assert_close(run(way, x, False, leaves), expected, TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_an_inverse_is_that_of_the_cpu_and_does_not_wait(name: str) -> None:
    op, x = made(name, "cpu")
    if not needs_no_residue(op, x):
        return
    with torch.no_grad():
        y = op(x)
    expected = run(~op, y, True, [])
    op, _ = made(name, DEVICE)
    y = map_wire(lambda leaf: leaf.to(DEVICE) if isinstance(leaf, Tensor) else leaf, y)
    for way in (~op, inv.checkpoint(~op)):
        assert_close(run(way, y, False, []), expected, TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_laws_hold_of_every_op(name: str) -> None:
    """Some of the laws for each op, in turn."""
    op, x = made(name, DEVICE)
    laws = [law for i, law in enumerate(LAWS) if (i + NAMES.index(name)) % 24 == 0]
    kept = (required(op, x) | SPECIAL) - EXAMPLES[name].without.keys()
    assert "\n".join(filter(None, (failure(op, x, law) for law in laws if law in kept))) == ""
