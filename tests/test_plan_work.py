"""The work that plans promise, in operations, against what a step is counted to take."""

import math

import pytest
import torch
from kit import assert_refused, network
from planning_chains import mlp
from torch import nn

import invfunc as inv
from invfunc.errors import OptionError
from invfunc.look.memory import measure
from invfunc.plan import Invert, OpCosts, Plan, Recompute, Store, profiling
from invfunc.plan.inputs import as_input
from invfunc.plan.profiling import Profiler
from invfunc.plan.report import rows, timeline
from invfunc.plan.schedule import fixed_schedules, predict, store_all
from invfunc.plan.work import Rates

WIDTH, ROWS = 16, 32


def no_time(op, x, invertible, again):
    """A clock that has nothing to say, so that what is counted stands."""
    ways = ["forward", "idle", "step", "again", *["idle, carried", "undone"] * invertible]
    with torch.no_grad():
        return as_input(op.forward(x)), dict.fromkeys(ways, 0.0)


@pytest.fixture
def in_flops(monkeypatch):
    """Costs whose seconds are operations."""
    monkeypatch.setattr(profiling, "CPU", Rates(0.0, 1.0, math.inf))
    return lambda op, x: Profiler(clock=no_time).costs(op, x)


def block():
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def affine():
    return inv.ops.tanh_scale(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2 * WIDTH)))


CHAINS = {
    "blocks that end in linears": (lambda: inv.chain(*[block() for _ in range(6)]), WIDTH),
    "blocks that end in tanh": (lambda: inv.chain(*[nn.Sequential(block(), nn.Tanh()) for _ in range(6)]), WIDTH),
    "couplings": (lambda: network([mlp(WIDTH) for _ in range(6)]), 2 * WIDTH),
    "couplings whose law saves": (lambda: network([affine() for _ in range(6)], law=inv.affine), 2 * WIDTH),
    "couplings and blocks": (
        lambda: inv.chain(block(), network([mlp(WIDTH // 2) for _ in range(4)]), block(), block()), WIDTH
    ),
}  # fmt: skip


def flops_of_step(op, x):
    return measure(lambda: op(x.clone()).square().mean().backward()).flops


def schedules(costs):
    """Fixed ones, those of plans, and nested ones."""
    yield from fixed_schedules(costs).values()
    plain = predict(costs, store_all(len(costs.ops))).peak_bytes
    yield from (inv.plan(costs, budget=int(share * plain)).schedule for share in (0.9, 0.7, 0.5))
    count = len(costs.ops)
    yield (Recompute(0, (Store(0), Recompute(1, (Store(1),)), Store(2))), *map(Store, range(3, count)))
    yield (Recompute(0, (Store(0), Recompute(1, (Store(1), Store(2))))), *map(Store, range(3, count)))


@pytest.mark.parametrize("name", CHAINS)
def test_plans_promise_the_operations_that_a_step_takes(name, in_flops):
    make, width = CHAINS[name]
    op, x = make(), torch.randn(ROWS, width, requires_grad=True)
    costs, plain = in_flops(op, (ROWS, width)), flops_of_step(op, x)
    for schedule in schedules(costs):
        plan = Plan(schedule, costs)
        assert flops_of_step(inv.checkpoint(op, plan=plan), x) / plain == pytest.approx(plan.time, abs=1e-4), plan.modes
        extra = sum(row.extra for row in rows(plan))
        assert 1 + extra / costs.seconds == pytest.approx(plan.time)
        assert list(timeline(costs, schedule))[-1].seconds == pytest.approx(predict(costs, schedule).seconds)


def test_a_block_that_ends_in_a_linear_is_promised_a_quarter_more(in_flops):
    costs = in_flops(inv.chain(*[block() for _ in range(6)]), (ROWS, WIDTH))
    first = Plan((Store(0), *[Recompute(i, (Store(i),)) for i in range(1, 6)]), costs)
    later = Plan((Store(0), Recompute(1, tuple(map(Store, range(1, 6))))), costs)
    forward, ends = costs.ops[1].forward, costs.ops[1].ends
    assert ends == pytest.approx(forward / 2, rel=1e-3)
    assert first.predicted.seconds - costs.seconds == pytest.approx(5 * (forward - ends))
    assert later.predicted.seconds - costs.seconds == pytest.approx(5 * forward - ends)


def test_a_run_of_inverses_begins_without_a_last_layer(in_flops):
    costs = in_flops(network([mlp(WIDTH) for _ in range(6)]), (ROWS, 2 * WIDTH))
    count = len(costs.ops)
    whole, halved = (
        Plan(runs, costs).predicted.seconds
        for runs in ((Invert(0, count),), (Invert(0, count // 2), Invert(count // 2, count)))
    )
    assert costs.ops[1].begins == pytest.approx(costs.ops[1].forward / 2, rel=1e-3)
    assert halved == pytest.approx(whole - costs.ops[count // 2].begins)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ({"ends": 1.5}, "op 'op': ends is 1.5 s, expected 1.0 or less"),
        ({"ends": -1.0}, "op 'op': ends is -1.0 s, expected 0.0 or more"),
        ({"begins": 1.5}, "op 'op': begins is 1.5 s, expected 1.0 or less"),
    ],
)
def test_what_is_spared_is_a_part(seconds, message):
    assert_refused(OptionError, message, lambda: OpCosts("op", 1.0, 2.0, 3.0, **seconds))
