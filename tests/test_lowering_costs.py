"""What a step of a lowered pipeline costs in calls, arithmetic and memory, and that nothing stays alive after it."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import WIDTH, Counted, Operators, in_turn, network
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import invfunc as inv
from invfunc.look.memory import measure

# ---- what is evaluated -----------------------------------------------------------------------------------------------


def counted_closure(module: Counted) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x).sin()


@pytest.mark.parametrize("wrap", [lambda module: module, counted_closure], ids=["modules", "closures"])
@pytest.mark.parametrize("law", [None, inv.affine], ids=["additive", "affine"])
def test_each_function_runs_twice_in_a_step(wrap: Any, law: Any) -> None:
    modules = [Counted(nn.Linear(WIDTH, WIDTH)) for _ in range(6)]
    blocks = [
        inv.couple(wrap(f), wrap(g)) if law is None else inv.couple(*(as_affine(wrap(m)) for m in (f, g)), law=law)
        for f, g in zip(modules[::2], modules[1::2], strict=True)
    ]
    op = inv.checkpoint(inv.chain(inv.split(2), *blocks, inv.concat(2)))
    op(torch.randn(3, 2 * WIDTH, requires_grad=True)).sum().backward()
    assert [module.count for module in modules] == [2] * 6


def as_affine(fn: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return inv.ops.tanh_scale(lambda x: (fn(x), x))


def test_a_frozen_first_half_is_not_rebuilt() -> None:
    modules = [Counted(nn.Linear(WIDTH, WIDTH)) for _ in range(8)]
    for module in modules[:4]:
        module.requires_grad_(False)
    blocks = [inv.couple(f, g) for f, g in zip(modules[::2], modules[1::2], strict=True)]
    inv.checkpoint(inv.chain(inv.split(2), *blocks))(torch.randn(3, 2 * WIDTH))[0].sum().backward()
    assert [module.count for module in modules[:4]] == [1] * 4
    assert all(module.net.weight.grad is not None for module in modules[4:-1])


def test_blocks_that_split_what_the_block_before_has_joined_move_it_once() -> None:
    def operators(op: Callable[[Tensor], Tensor]) -> Counter[Any]:
        x = torch.randn(3, 2 * WIDTH, requires_grad=True)
        with Operators() as operators:
            torch.autograd.grad(op(x).sum(), [x, *weights])
        return operators.counts

    modules = [nn.Linear(WIDTH, WIDTH) for _ in range(8)]
    weights = [weight for module in modules for weight in module.parameters()]
    blocks = [inv.nn.Coupling(f, g) for f, g in zip(modules[::2], modules[1::2], strict=True)]
    found, expected = operators(inv.nn.Sequential(*blocks)), operators(inv.checkpoint(network(modules)))
    assert found == expected + Counter({torch.ops.aten.cat: len(blocks) - 1})


def conv(channels: int) -> nn.Module:
    layers = nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(*layers).float()


def conv_net(depth: int) -> tuple[inv.Invertible, list[nn.Module]]:
    modules = [conv(8) for _ in range(2 * depth)]
    return network(modules), modules


def test_flops_of_a_step() -> None:
    op, _ = conv_net(4)
    counts = []
    for fn in inv.checkpoint(op), op:
        with FlopCounterMode(display=False) as counter:
            fn(torch.randn(1, 16, 8, 8, dtype=torch.float32, requires_grad=True)).square().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] <= 1.345 * counts[1]


# ---- memory ----------------------------------------------------------------------------------------------------------


SHAPE = 4, 16, 32, 32
ACTIVATION = 4 * 4 * 16 * 32 * 32  # bytes


def image() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float32, requires_grad=True)


@pytest.mark.parametrize("depth", [4, 64])
class TestMemory:
    def test_held_after_forward(self, depth: int) -> None:
        op, _ = conv_net(depth)
        x = image()
        assert measure(inv.checkpoint(op), x).held_bytes <= 1.3 * ACTIVATION

    def test_peak_of_a_step(self, depth: int) -> None:
        op, modules = conv_net(depth)
        for module in modules:
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)  # the gradients of weights are not counted
        fast = inv.checkpoint(op)

        def step() -> None:
            fast(image()).square().sum().backward()

        assert measure(step).peak_bytes <= 6.6 * ACTIVATION


def test_a_forward_without_a_backward_leaves_nothing_alive(no_gc: None) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def f(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        seen.extend([weakref.ref(x), weakref.ref(y)])
        return y

    x = torch.randn(3, 2 * WIDTH, requires_grad=True)
    op = inv.checkpoint(in_turn(f, nn.Linear(WIDTH, WIDTH), f))
    y = op(x)
    kept = [weakref.ref(y), weakref.ref(y.grad_fn)]
    del y
    assert [ref() for ref in (*seen, *kept)] == [None] * (len(seen) + 2)
    x = weakref.ref(x)
    assert x() is None


def test_a_step_leaves_nothing_alive(no_gc: None) -> None:
    op = inv.checkpoint(in_turn(torch.tanh, nn.Linear(WIDTH, WIDTH)))
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)
    y = op(x)
    y.sum().backward()
    kept = [weakref.ref(t) for t in (x, y, x.grad)]
    del x, y
    assert [ref() for ref in kept] == [None] * 3
