"""What a step of a lowered pipeline costs in calls, arithmetic and memory, and that nothing stays alive after it."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kit import WIDTH, Counted, Operators, in_turn, network
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import invfunc as inv
from invfunc.errors import ReplayError
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


def operators_of_a_step(op: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> Counter[Any]:
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)
    with Operators() as operators:
        torch.autograd.grad(op(x).sum(), [x, *weights])
    return operators.counts


def test_blocks_that_split_what_the_block_before_has_joined_move_it_once() -> None:
    modules = [nn.Linear(WIDTH, WIDTH) for _ in range(8)]
    weights = [weight for module in modules for weight in module.parameters()]
    couplings = [inv.couple(f, g) for f, g in zip(modules[::2], modules[1::2], strict=True)]
    blocks = inv.chain(*(inv.chain(inv.split(2), coupling, inv.concat(2)) for coupling in couplings))
    found = operators_of_a_step(inv.checkpoint(blocks), weights)
    expected = operators_of_a_step(inv.checkpoint(network(modules)), weights)
    assert found == expected + Counter({torch.ops.aten.cat: len(couplings) - 1})


def test_couplings_of_the_same_halves_in_a_sequential_split_once() -> None:
    modules = [nn.Linear(WIDTH, WIDTH) for _ in range(8)]
    weights = [weight for module in modules for weight in module.parameters()]
    blocks = [inv.nn.Coupling(f, g) for f, g in zip(modules[::2], modules[1::2], strict=True)]
    found = operators_of_a_step(inv.nn.Sequential(*blocks), weights)
    assert found == operators_of_a_step(inv.checkpoint(network(modules)), weights)
    own_ways = [{"interleaved": True}, {"sizes": [5, 2 * WIDTH - 5]}, {"mode": "recompute"}, {"mode": "store"}]
    for options in own_ways:  # each is a block by itself, between two that are joined to what is beside them
        other = inv.nn.Coupling(lambda h: h.sum(1, keepdim=True), **options)
        net, x = inv.nn.Sequential(*blocks[:2], other, *blocks[2:]), torch.randn(3, 2 * WIDTH)
        assert torch.equal(net(x), nn.Sequential(*blocks[:2], other, *blocks[2:])(x))
        assert len([part for part in net.build().parts if repr(part).startswith("split(2, dim=1)")]) == 2
    blocks[1].register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(3, 2 * WIDTH)
    assert torch.equal(inv.nn.Sequential(*blocks)(x), nn.Sequential(*blocks)(x))


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


class Leaves(nn.Module):
    """Leaves a result where others take it from."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.layer, self.place = nn.Linear(WIDTH, WIDTH), place
        self.boxed: dict[str, Tensor] = {}
        self.register_buffer("state", torch.zeros(3, WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        if self.place == "dict":
            self.boxed["state"] = y * 1
        else:
            setattr(self, self.place, y * 1)
        return y


@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("place", ["aux", "state", "dict"])
def test_a_result_that_is_left_on_a_module_keeps_one_graph_alive(place: str, mode: str, no_gc: None) -> None:
    nets = [Leaves(place), nn.Linear(WIDTH, WIDTH), Leaves(place), nn.Tanh()]
    op, inputs = inv.checkpoint(network(nets, dim=-1), mode=mode), []
    for _ in range(4):
        x = torch.randn(3, 2 * WIDTH, requires_grad=True)
        inputs.append(weakref.ref(x))
        op(x)
        del x
    assert [ref() is None for ref in inputs] == [True, True, True, False]  # as in plain autograd
    for net in nets[::2]:
        vars(net).pop("aux", None)
        net.state = torch.zeros(3, WIDTH)  # pyright: ignore
        net.boxed.clear()  # pyright: ignore
    assert inputs[-1]() is None


def test_a_lazy_module_keeps_nothing_alive(no_gc: None) -> None:
    lazy = nn.Sequential(nn.LazyLinear(WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)
    y = inv.checkpoint(network([nn.Tanh(), lazy], dim=-1))(x)
    kept = [weakref.ref(t) for t in (x, y)]
    del x, y
    assert [ref() for ref in kept] == [None] * 2


def test_what_the_first_call_of_a_lazy_module_saved_is_checked_for_writes() -> None:
    x = torch.randn(3, WIDTH)
    y = inv.checkpoint(nn.Sequential(nn.LazyLinear(WIDTH), nn.Tanh()))(x)
    x.add_(1)
    with pytest.raises(
        ReplayError, match=r"Sequential.*: a tensor of shape \(3, 4\) that backward needs has been modified"
    ):
        y.sum().backward()


def test_a_step_leaves_nothing_alive(no_gc: None) -> None:
    op = inv.checkpoint(in_turn(torch.tanh, nn.Linear(WIDTH, WIDTH)))
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)
    y = op(x)
    y.sum().backward()
    kept = [weakref.ref(t) for t in (x, y, x.grad)]
    del x, y
    assert [ref() for ref in kept] == [None] * 3
