"""Hooks on tensors, on modules and on what lies between run as often in a lowered pipeline, and see the same."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from kit import WIDTH, Counted, Net, assert_close, every_lowering, layer, leaf, loss, network, parameters
from torch import Tensor, nn

import invfunc as inv


@every_lowering
def test_hooks_run_as_often_and_see_the_same(lower: Callable[..., Any]) -> None:
    seen: list[list[Any]] = []
    for fn in lambda op: op, lower:
        torch.manual_seed(0)
        net, x, notes = Net(), leaf(3, 2 * WIDTH), []
        note = lambda name, g, notes=notes: notes.append((name, g.clone()))  # noqa: E731
        for i, p in enumerate(net.parameters):
            p.register_hook(functools.partial(note, f"tensor {i}"))
            p.register_post_accumulate_grad_hook(lambda p, i=i, note=note: note(f"accumulated {i}", p.grad))
        x.register_hook(lambda g, note=note: note("x", g))
        stem = x * 1
        stem.register_hook(lambda g, note=note: note("stem", g))
        stem.retain_grad()
        out = fn(net.op)(stem)
        out.register_hook(lambda g, note=note: note("out", g))
        out.retain_grad()
        loss(out).backward()
        notes += [("kept", stem.grad), ("kept out", out.grad)]
        seen.append(sorted(notes, key=lambda item: item[0]))
    assert [name for name, _ in seen[0]] == [name for name, _ in seen[1]]
    assert_close([g for _, g in seen[1]], [g for _, g in seen[0]])


@every_lowering
def test_hooks_that_change_gradients(lower: Callable[..., Any]) -> None:
    found = []
    for fn in lambda op: op, lower:
        torch.manual_seed(0)
        net, x = Net(), leaf(3, 2 * WIDTH)
        for p in net.parameters[::2]:
            p.register_hook(lambda g: 3 * g)
        stem = x.sin()
        stem.register_hook(lambda g: 5 * g)
        out = fn(net.op)(stem)
        out.register_hook(lambda g: 7 * g)
        loss(out).backward()
        found.append([t.grad for t in [x, *net.parameters]])
    assert_close(*found)


def test_hooks_of_modules_run_in_forward_and_in_backward() -> None:
    module, notes = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), []
    module.register_forward_hook(lambda module, args, out: notes.append("forward"))
    module.register_full_backward_hook(lambda module, gin, gout: notes.append("backward"))
    module[0].register_full_backward_pre_hook(lambda module, gout: notes.append("pre"))
    a, b = leaf(3, WIDTH), leaf(3, WIDTH)
    found = []
    for fn in inv.couple(module), inv.checkpoint(inv.couple(module), early_stop=False):
        notes.clear()
        found.append(torch.autograd.grad(loss(fn(a, b)), [a, b, *module.parameters()]))
        assert notes.count("backward") == notes.count("pre") == 1
    assert_close(*found)
    assert notes.count("forward") == 2


def test_gradients_arrive_stage_by_stage() -> None:
    net, x, order = Net(), leaf(3, 2 * WIDTH), []
    for i, module in enumerate(net.modules):
        module.net[0].weight.register_post_accumulate_grad_hook(lambda p, i=i: order.append((i, sum(net.counts))))
    loss(inv.checkpoint(net.op)(x)).backward()
    stages = [i for i, _ in order]
    assert stages == sorted(stages, reverse=True)
    assert order[0][1] < 2 * len(net.modules)  # the last block's gradient is there before the first is run again


class Shifted(nn.Module):
    """A function whose last operation saves nothing: the gradient of the shift is there before anything is rebuilt."""

    def __init__(self, net: Callable[..., Any]) -> None:
        super().__init__()
        self.net, self.shift = net, nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.shift


def step_when_accumulated(p: Tensor) -> None:
    """As optimizers that step in backward do it."""

    def step(p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(0.3 * p.grad)
        p.grad = None

    p.register_post_accumulate_grad_hook(step)


def step_when_hooked(p: Tensor) -> None:
    def step(g: Tensor) -> None:
        with torch.no_grad():
            p.sub_(0.3 * g)

    p.register_hook(step)


@pytest.mark.parametrize("hook", [step_when_accumulated, step_when_hooked])
@pytest.mark.parametrize("identity", [False, True])
@every_lowering
def test_a_step_in_backward_comes_behind_what_is_rebuilt(
    lower: Callable[..., Any], identity: bool, hook: Callable[[Tensor], None]
) -> None:
    found = []
    for fn in lambda op: op, lower:
        torch.manual_seed(0)
        nets = [Counted(Shifted(same if identity and i < 2 else layer())) for i in range(5)]
        nets.append(Counted(layer()))
        for p in parameters(*nets):
            hook(p)
        x = leaf(3, 2 * WIDTH)
        loss(fn(network(nets, dim=-1))(x)).backward()
        found.append([x.grad, *[p.detach() for p in parameters(*nets)]])
        assert all(net.count <= 2 for net in nets)
    assert_close(*found)


def same(x: Tensor) -> Tensor:
    return x
