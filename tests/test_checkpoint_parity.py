"""Where torch's own tests of its checkpoint ask for something that we do otherwise, or that a user of ours does in
other words."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fuzz.functions import Product
from kit import Counted, assert_close, assert_same, count, gradients, leaf, loss, step_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    GraphExecGroup,
    checkpoint_sequential,
    set_checkpoint_debug_enabled,
)

import invfunc as inv
from invfunc.errors import ReplayError


def test_a_custom_backward_may_read_its_saved_tensors_twice() -> None:
    x, y = leaf(3), leaf(3)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return Product.apply(x.sin(), y.exp()).tanh()

    assert_same(f, inv.checkpoint(f), [x, y], x, y)


@pytest.mark.parametrize("depth", [1, 3])
def test_so_may_that_of_the_first_function_which_stops_early(depth: int) -> None:
    counted = count(lambda x: Product.apply(x.sin(), x.exp()))
    op, x = inv.chain(*[inv.couple(counted)] * depth), (leaf(3), leaf(3))
    assert_same(op, inv.checkpoint(op), x, *x)
    counted.calls = 0
    loss(inv.checkpoint(op)(*x)).backward()
    assert counted.calls == 2 * depth


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("f", [torch.sin, torch.clone])
def test_nothing_runs_again_for_a_tensor_that_is_at_hand(f: Any, early_stop: bool) -> None:
    """The input of a sine is the leaf itself, and a copy needs nothing."""
    counted = count(f)
    x = leaf(3)
    assert_close(gradients(inv.checkpoint(counted, early_stop=early_stop)(x), [x]), gradients(f(x), [x]))
    assert counted.calls == 1


def test_backwards_over_parts_of_a_call_share_its_replay() -> None:
    """In a group or not; in a group, they may overlap."""
    x, ones = leaf(3), torch.ones(3, dtype=torch.float64)

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin().cos()
        return y, y.sin().cos()

    expected = list(torch.autograd.grad(halves(x)[1], x, ones))
    for context in (nullcontext(), GraphExecGroup()):
        counted = count(halves)
        y, z = inv.checkpoint(counted)(x)
        with context:
            (gy,) = torch.autograd.grad(z, y, ones, retain_graph=True)
            assert_close(list(torch.autograd.grad(y, x, gy, retain_graph=True)), expected)
            assert counted.calls == 2
            assert_close(list(torch.autograd.grad(z, x, ones)), expected)


@pytest.mark.parametrize("option", [True, False])
@pytest.mark.parametrize("enforced", [True, False])
def test_torch_s_debug_setting_goes_before_the_option(option: bool, enforced: bool) -> None:
    calls: list[None] = []

    def changes(x: Tensor) -> Tensor:
        calls.append(None)
        return x.sin().exp() if len(calls) == 1 else x.sin() * torch.ones(2, dtype=x.dtype)

    with set_checkpoint_debug_enabled(enforced):
        y = inv.checkpoint(changes, debug=option)(leaf(1))
    with pytest.raises(ReplayError) as caught:
        y.sum().backward()
    assert ("got operator 1 was aten.exp.default in forward and" in str(caught.value)) == enforced


def test_a_policy_is_shown_the_result() -> None:
    seen: list[Any] = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(context.op_output.shape)
        return CheckpointPolicy.PREFER_RECOMPUTE

    inv.checkpoint(lambda x: x[:2].exp().sum(), keep=policy)(leaf(3)).backward()
    assert seen == [(2,), (2,), ()]


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_a_sequence_whose_last_segment_is_stored_runs_as_torch_s(segments: int) -> None:
    stages = [Counted(nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()) for _ in range(8)]
    size = len(stages) // segments
    last = size * (segments - 1)
    net = inv.chain(*stages[:last], inv.mark(inv.chain(*stages[last:]), "store"))
    cuts = tuple(range(size, last + 1, size)) if last else ()
    fast = inv.checkpoint(net, mode="recompute", cuts=cuts)
    x, weights = leaf(2, 4), [p for stage in stages for p in stage.parameters()]
    ours, our_counts = step_gradients(fast, x, weights), [stage.count for stage in stages]

    def sequence(x: Tensor) -> Tensor:
        return checkpoint_sequential(stages, segments, x, use_reentrant=False)

    theirs = step_gradients(sequence, x, weights)
    assert [stage.count - before for stage, before in zip(stages, our_counts, strict=True)] == our_counts
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found, expected)
