"""Steps of training behind the first: whatever changes between two calls, or before backward, they equal plain ones."""

from __future__ import annotations

import pickle
import warnings
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from kit import TOLERANCE, WIDTH, assert_close, bowl, leaf, network, total
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import invfunc as inv
from invfunc.errors import ReplayError, WireError

DEPTH = 3


class Branch(nn.Module):
    """A network with all that a module can hold: parts, a constant, a place for a tensor, and a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.noise = nn.Dropout(0.0)
        self.register_buffer("scale", torch.full((WIDTH,), 0.7))
        self.shift: Any = 0.0
        self.after: Callable[[Tensor], Tensor] = lambda y: y

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.noise(self.parts(x)) * self.scale + self.shift)


class Net:
    """A pipeline, lowered, that has been trained for two steps already."""

    def __init__(self, branch: Callable[[], nn.Module] = Branch) -> None:
        torch.manual_seed(0)
        self.branches = nn.ModuleList(branch() for _ in range(2 * DEPTH))
        self.op = network(self.branches, dim=-1)
        self.fast = inv.checkpoint(self.op)
        self.x = leaf(5, 2 * WIDTH)
        for _ in range(2):
            bowl(self.fast(self.x)).backward()
        self.branches.zero_grad()
        self.x.grad = None

    def __getitem__(self, index: int) -> Any:
        return self.branches[index]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *(p for p in self.branches.parameters() if p.requires_grad)]

    def step(self, fn: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
        """The output, all gradients, and the random numbers that come next, from one seed."""
        torch.manual_seed(1)
        y = fn(self.x)
        return y.detach(), *torch.autograd.grad(bowl(y), self.leaves, allow_unused=True), torch.rand(3)

    def assert_right(self) -> None:
        """In this step, and in the next one."""
        for _ in range(2):
            assert_close(self.step(self.fast), self.step(self.op), TOLERANCE)


# ---- what changes between two calls ----------------------------------------------------------------------------------


def replace_a_parameter(net: Net) -> None:
    net[2].parts[0].weight = nn.Parameter(torch.randn(WIDTH, WIDTH))


def replace_a_part(net: Net) -> None:
    net[2].parts[1] = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU())


def add_a_part(net: Net) -> None:
    net[2].parts.append(nn.Linear(WIDTH, WIDTH))


def load_by_assignment(net: Net) -> None:
    net.branches.load_state_dict({k: v.clone() + 0.1 for k, v in net.branches.state_dict().items()}, assign=True)


def freeze(net: Net) -> None:
    net[2].requires_grad_(False)


def freeze_all(net: Net) -> None:
    net.branches.requires_grad_(False)


def freeze_and_thaw(net: Net) -> None:
    freeze(net)
    net.assert_right()
    net[2].requires_grad_(True)


def change_a_buffer(net: Net) -> None:
    net[2].scale.mul_(2)


def set_a_tensor(net: Net) -> None:
    net[2].shift = leaf(WIDTH)


def tie_weights(net: Net) -> None:
    net[4].parts[0].weight = net[2].parts[0].weight


def parametrize(net: Net) -> None:
    parametrizations.weight_norm(net[2].parts[0])


def spectral_norm(net: Net) -> None:
    parametrizations.spectral_norm(net[2].parts[0])
    net.branches.eval()


def begin_to_draw(net: Net) -> None:
    net[2].noise.p = 0.5


def leave_training(net: Net) -> None:
    begin_to_draw(net)
    net.assert_right()
    net.branches.eval()


def begin_to_pin(net: Net) -> None:
    net[2].after = lambda y: y * inv.pin("sign", (y > 0).double())


def return_what_broadcasts(net: Net) -> None:
    net[2].after = lambda y: y.mean(-1, keepdim=True)


def return_a_constant(net: Net) -> None:
    net[2].after = torch.ones_like


def return_integers(net: Net) -> None:
    net[2].after = lambda y: (y > 0).long()


def return_a_parameter(net: Net) -> None:
    net[2].after = lambda y: net[2].parts[0].bias.expand_as(y)


def hook_a_parameter(net: Net) -> None:
    net[2].parts[0].weight.register_hook(lambda g: 2 * g)


def hook_a_module(net: Net) -> None:
    net[2].register_forward_hook(lambda module, args, out: out * 2)
    net[3].register_full_backward_hook(lambda module, gi, go: tuple(g * 3 for g in gi))


def another_batch(net: Net) -> None:
    net.x = leaf(3, 2, 2 * WIDTH)


def replace_the_tables(net: Net) -> None:
    net[2].parts[0].__setstate__(nn.Linear(WIDTH, WIDTH).__getstate__())


def visit_autocast(net: Net) -> None:
    begin_to_draw(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net.fast(net.x)


BETWEEN_CALLS = [
    *(replace_a_parameter, replace_a_part, add_a_part, load_by_assignment, freeze, freeze_all),
    *(freeze_and_thaw, change_a_buffer, set_a_tensor, tie_weights, parametrize, spectral_norm, begin_to_draw),
    *(leave_training, begin_to_pin, return_what_broadcasts, return_a_constant),
    *(return_integers, return_a_parameter, hook_a_parameter, hook_a_module, another_batch),
    *(replace_the_tables, visit_autocast),
]


@pytest.mark.parametrize("change", BETWEEN_CALLS, ids=lambda change: change.__name__)
def test_a_change_between_two_calls(change: Callable[[Net], None]) -> None:
    net = Net()
    change(net)
    net.assert_right()


def test_wrong_outputs_are_still_named() -> None:
    net = Net()
    net[2].after = lambda y: y[..., :3]
    with pytest.raises(WireError, match=r"chain stage 2 .*f returned \(5, 3\)"):
        net.fast(net.x)
    net[2].after = lambda y: y
    net[2].register_forward_pre_hook(lambda module, args: (args[0].add_(1),))
    with pytest.raises(ReplayError, match="changed its input in place"):
        net.fast(net.x)


# ---- what changes between forward and backward -----------------------------------------------------------------------

BEFORE_BACKWARD = [
    *(replace_a_parameter, replace_a_part, add_a_part, load_by_assignment, change_a_buffer, set_a_tensor, tie_weights),
    *(begin_to_draw, begin_to_pin, return_what_broadcasts, return_a_constant, hook_a_module, replace_the_tables),
]


@pytest.mark.parametrize("change", BEFORE_BACKWARD, ids=lambda change: change.__name__)
def test_a_change_before_backward_is_none(change: Callable[[Net], None]) -> None:
    """The step is that of the network as forward found it."""
    net = Net()
    expected, leaves, out = net.step(net.op)[1:-1], net.leaves, bowl(net.fast(net.x))
    change(net)
    assert_close(torch.autograd.grad(out, leaves), expected, TOLERANCE)


def test_a_parameter_that_is_frozen_before_backward() -> None:
    net = Net()
    expected, leaves, out = net.step(net.op)[1:-1], net.leaves, bowl(net.fast(net.x))
    freeze(net)
    out.backward()
    frozen = {id(p) for p in net[2].parameters()}
    for tensor, gradient in zip(leaves, expected, strict=True):
        assert_close(tensor.grad, None if id(tensor) in frozen else gradient, TOLERANCE)  # as in plain autograd


def test_a_weight_that_is_written_before_backward_raises() -> None:
    net = Net()
    out = bowl(net.fast(net.x))
    net[2].parts[0].weight.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


# ---- modules that change themselves ----------------------------------------------------------------------------------


class Average(nn.Module):
    """Keeps a running average by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.25
        return self.layer(x).tanh() * self.mean


@pytest.mark.parametrize("branch", [Average, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))])
def test_what_a_call_writes_moves_once_a_step(branch: Callable[[], nn.Module]) -> None:
    net = Net(branch)
    twin = deepcopy(net)
    for training in True, True, False, True:
        net.branches.train(training), twin.branches.train(training)
        assert_close(net.step(net.fast), twin.step(twin.op), TOLERANCE)
    assert_close(net.branches.state_dict(), twin.branches.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.jit.trace(m, torch.randn(2, WIDTH)),
        torch.jit.script,
        lambda m: nn.Sequential(torch.jit.script(m)),
    ],
    ids=["traced", "scripted", "scripted inside"],
)
def test_a_module_of_torchscript(make: Callable[[nn.Module], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = make(nn.Linear(WIDTH, WIDTH))
    op, x = inv.couple(traced, torch.tanh), [leaf(3, WIDTH), leaf(3, WIDTH)]
    for lower in inv.checkpoint, inv.checkpoint, lambda op: inv.couple(inv.checkpoint(traced), torch.tanh):
        found, expected = (torch.autograd.grad(total(fn(*x)), [*x, *traced.parameters()]) for fn in (lower(op), op))
        assert_close(found, expected)


@pytest.mark.parametrize("copied", [deepcopy, lambda op: pickle.loads(pickle.dumps(op))], ids=["deepcopy", "pickle"])
def test_a_copy_has_modules_of_its_own(copied: Callable[[Any], Any]) -> None:
    f = nn.Linear(WIDTH, WIDTH)
    op, x = inv.couple(f), [leaf(2, WIDTH), leaf(2, WIDTH)]
    total(inv.checkpoint(op)(*x)).backward()
    f.weight.grad, twin = None, copied(op)
    total(inv.checkpoint(twin)(*x)).backward()
    assert f.weight.grad is None and twin.functions[0].weight.grad is not None


@pytest.mark.usefixtures("no_gc")
def test_nothing_is_kept() -> None:
    net = Net()
    parameters = [weakref.ref(p) for p in net.branches.parameters()]
    load_by_assignment(net)
    assert [p() for p in parameters] == [None] * len(parameters)
    op = weakref.ref(net.op.parts[2])
    del net
    assert op() is None
