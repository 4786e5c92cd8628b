"""What functions find where the compiled form does not look: it raises, and no gradient is lost in silence."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from kit import assert_close
from torch import Tensor, nn

import invfunc as inv

pytestmark = pytest.mark.compile

WIDE = 4


def between(*blocks: inv.Invertible) -> inv.Invertible:
    return inv.chain(inv.split(2), *blocks, inv.concat(2))


class Hiding(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.modules_in_a_list = [module]

    def forward(self, x: Tensor) -> Tensor:
        return self.modules_in_a_list[0](x)


def in_functions(fn: Callable[[Tensor], Tensor], depth: int) -> Callable[[Tensor], Tensor]:
    return fn if not depth else in_functions(lambda x: fn(x), depth - 1)


def on_an_object(module: nn.Module) -> Callable[[Tensor], Tensor]:
    owner = SimpleNamespace(module=module)
    return lambda x: owner.module(x)


HIDING: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "in a list of a module": Hiding,
    "on an object": on_an_object,
    "five functions deep": lambda module: in_functions(module, 5),
}


@pytest.mark.parametrize("stages", [False, True])
@pytest.mark.parametrize("name", HIDING)
def test_a_tensor_that_is_not_found_raises(name: str, stages: bool) -> None:
    """Its gradient would be none, without a word."""
    op = inv.checkpoint(between(inv.couple(HIDING[name](nn.Linear(WIDE, WIDE)))))
    fast = inv.compile_stages(op, backend="eager") if stages else torch.compile(op, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="a function, which is being compiled, closes over a tensor that requires grad"):
        fast(torch.randn(3, 2 * WIDE, requires_grad=True))


@pytest.mark.parametrize("stages", [False, True])
def test_a_checkpointed_function_inside_of_a_pipeline(stages: bool) -> None:
    module = nn.Linear(WIDE, WIDE)
    op = between(inv.couple(inv.checkpoint(module), inv.checkpoint(lambda x: module(x).tanh())))
    fast = inv.checkpoint(op)
    fast = inv.compile_stages(fast, backend="eager") if stages else torch.compile(fast, fullgraph=True, backend="eager")
    x = torch.randn(3, 2 * WIDE, requires_grad=True)
    found, expected = (torch.autograd.grad(f(x).sin().sum(), [x, *module.parameters()]) for f in (fast, op))
    assert_close(found, expected)


@pytest.mark.parametrize("mode", ["invert", "recompute"])
def test_views_of_what_is_found_are_found(mode: str) -> None:
    def forward(x: Tensor, w: Tensor) -> Tensor:
        seen = (2 * w).T

        def fn(h: Tensor) -> Tensor:
            with torch.enable_grad():
                scaled = (3 * w).T
            return (h @ seen.T + h @ w.T @ w.t()[:, :WIDE]).tanh() @ scaled.mT

        return inv.checkpoint(between(inv.couple(fn)), mode=mode)(x)

    x, w = torch.randn(3, 2 * WIDE, requires_grad=True), torch.randn(WIDE, WIDE, requires_grad=True)
    fast = torch.compile(forward, fullgraph=True, backend="eager")
    found, expected = (torch.autograd.grad(f(x, w).sin().sum(), [x, w]) for f in (fast, forward))
    assert_close(found, expected)


class Slotted:
    """An object that is called, whose attributes are in slots alone."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)


def unflattened(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x).unflatten(1, (2, -1)).flatten(1)


@pytest.mark.parametrize("stages", [False, True])
@pytest.mark.parametrize("make", [Slotted, unflattened])
def test_what_dynamo_has_to_be_helped_with(
    make: Callable[[nn.Module], Callable[[Tensor], Tensor]], stages: bool
) -> None:
    module = nn.Linear(WIDE, WIDE)
    op = between(inv.couple(make(module)))
    low = inv.checkpoint(op)
    fast = inv.compile_stages(low, backend="eager") if stages else torch.compile(low, fullgraph=True, backend="eager")
    x = torch.randn(3, 2 * WIDE, requires_grad=True)
    found, expected = (torch.autograd.grad(f(x).square().sum(), [x, *module.parameters()]) for f in (fast, op))
    assert_close(found, expected)


@pytest.mark.parametrize("op", [inv.ops.pixel_shuffle(2), inv.ops.haar(), inv.ops.checkerboard()], ids=repr)
def test_ops_that_unflatten_compile(op: inv.Invertible) -> None:
    x = torch.randn(2, 4, 2, 2, requires_grad=True)
    op = inv.chain(op, inv.parallel(inv.ops.sinh(), inv.ops.sinh())) if isinstance(op(x), tuple) else op
    fast = torch.compile(inv.checkpoint(op), fullgraph=True, backend="eager")
    found, expected = (torch.autograd.grad(sum(y.square().sum() for y in outputs(f(x))), x) for f in (fast, op))
    assert_close(found, expected)


def outputs(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)
