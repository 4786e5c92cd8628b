"""The work that plans promise, in operations, against what a step is counted to take."""

import math
from dataclasses import replace

import pytest
import torch
from kit import assert_close, assert_refused, network
from planning_chains import mlp, peak_of, step, weights_of
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import invfunc as inv
from invfunc.errors import OptionError
from invfunc.look.memory import measure
from invfunc.plan import Invert, OpCosts, Plan, Recompute, Store, profiling
from invfunc.plan.inputs import as_input
from invfunc.plan.model import planned_as
from invfunc.plan.profiling import Profiler
from invfunc.plan.report import rows, timeline
from invfunc.plan.schedule import fixed_schedules, keeping, predict, store_all
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


class Attention(nn.Module):
    """Over (batch, sequence, width)."""

    def __init__(self, width=WIDTH, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


TOKENS = 64


def transformer(depth=3):
    couplings = [inv.couple(Attention(), mlp(WIDTH)) for _ in range(depth)]
    return inv.chain(inv.split(2, dim=-1), *couplings, inv.concat(2, dim=-1))


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


# ---- results that are kept -------------------------------------------------------------------------------------------


@pytest.fixture
def attentive(in_flops):
    torch.manual_seed(0)
    op, x = transformer(), torch.randn(2, TOKENS, 2 * WIDTH, requires_grad=True)
    return op, x, in_flops(op, tuple(x.shape))


def test_attention_is_worth_keeping_and_else_products(attentive):
    op, x, costs = attentive
    assert [op.keep for op in costs.ops] == ["attention", "products"] * 3 + [""]
    attention, feed = costs.ops[2:4]
    rows, item = 2 * TOKENS, x.element_size()
    assert attention.kept == rows * (WIDTH + 2) * item  # the output, and the logsumexp of two heads
    assert attention.spares[0] == pytest.approx(4 * rows * TOKENS * WIDTH, rel=1e-3)
    assert feed.kept == rows * 3 * WIDTH * item
    whole, last = feed.forward, feed.forward / 2
    assert feed.spares == pytest.approx((whole - last, whole, whole - last), rel=1e-2)


KEEPING = [
    (Invert(0, 7, (0,)),),
    (Invert(0, 7, (2, 4)),),
    (Invert(0, 7, (0, 1, 2, 3, 4, 5)),),
    (Recompute(0, (Store(0),), True), Recompute(1, (Store(1),), True), *map(Store, range(2, 7))),
    (Store(0), Invert(1, 3, (2,)), Recompute(3, (Store(3), Store(4))), Invert(5, 7, (5,))),
]


@pytest.mark.parametrize("number", range(len(KEEPING)))
def test_what_is_kept_takes_the_operations_and_the_bytes_that_are_promised(number, attentive):
    op, x, costs = attentive
    plan = Plan(KEEPING[number], costs)
    fast = inv.checkpoint(op, plan=plan)
    assert flops_of_step(fast, x) / flops_of_step(op, x) == pytest.approx(plan.time, abs=1e-4)
    assert 0.9 * plan.peak_bytes <= peak_of(fast, x, weights_of(op, x)) <= plan.peak_bytes
    assert 1 + sum(row.extra for row in rows(plan)) / costs.seconds == pytest.approx(plan.time)
    assert list(timeline(costs, plan.schedule))[-1].seconds == pytest.approx(plan.predicted.seconds)
    assert "attention kept" in str(plan) or "products kept" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan == plan.with_modes(plan.modes)
    for found, exact in zip(step(fast, x, weights_of(op, x)), step(op, x, weights_of(op, x)), strict=True):
        assert_close(found, exact)


@pytest.mark.parametrize("share", [0.8, 0.6, 0.5, 0.4])
def test_a_plan_keeps_results_where_that_is_cheaper_than_to_store(share, attentive):
    op, x, costs = attentive
    nothing = replace(costs, ops=tuple(replace(op, keep="", kept=0, spares=(0.0, 0.0, 0.0)) for op in costs.ops))
    budget = int(share * predict(costs, store_all(len(costs.ops))).peak_bytes)
    plan, without = inv.plan(costs, budget=budget), inv.plan(nothing, budget=budget)
    assert plan.time < without.time or (share == 0.8 and plan.time == without.time)
    fast = inv.checkpoint(op, plan=plan)
    assert flops_of_step(fast, x) / flops_of_step(op, x) == pytest.approx(plan.time, abs=1e-4)
    assert peak_of(fast, x, weights_of(op, x)) <= budget


def test_two_plans_that_keep_results_agree(attentive):
    op, x, costs = attentive
    budget = predict(costs, store_all(len(costs.ops))).peak_bytes // 2
    again = inv.plan(Profiler(clock=no_time).costs(op, tuple(x.shape)), budget=budget)
    assert again.modes == inv.plan(costs, budget=budget).modes and keeping(again.schedule)


def test_a_user_s_own_policy_goes_before_the_plan_s(attentive):
    op, x, costs = attentive
    plan = Plan((Invert(0, 7, (0, 2, 4)),), costs)
    found = flops_of_step(inv.checkpoint(op, plan=plan, keep=[]), x)
    assert found == flops_of_step(inv.checkpoint(op, plan=Plan((Invert(0, 7),), costs)), x)


def test_the_blocks_of_a_model_keep_attention(in_flops):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Attention() for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x.sin()

    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    costs = in_flops(planned_as(model), tuple(x.shape))
    plan = Plan((Store(0), *[Recompute(i, (Store(i),), True) for i in range(1, 5)], Store(5)), costs)
    fast = inv.checkpoint(model, plan=plan)
    attention = 4 * 2 * TOKENS * TOKENS * WIDTH
    whole = flops_of_step(inv.checkpoint(model, plan=plan, keep=[]), x)
    assert whole - flops_of_step(fast, x) == 4 * attention
    exact, found = (torch.autograd.grad(f(x).sum(), list(model.parameters())) for f in (model, fast))
    assert all(map(torch.equal, found, exact))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((Invert(0, 7, (6,)),), "a schedule keeps results of op 6 (concat(2, dim=-1)), expected an op of a run"),
        ((Store(0), Invert(1, 7, (0,))), "a schedule keeps results of op 0 (couple: f=Attention), expected an op of"),
        ((Recompute(0, (Store(0), Store(1)), True), *map(Store, range(2, 7))), "a schedule keeps results of op 0"),
        (
            (Recompute(0, (Recompute(0, (Store(0),), True), Store(1))), *map(Store, range(2, 7))),
            "a schedule keeps results inside of a region, expected those of ops that are in none",
        ),
    ],
)
def test_a_schedule_that_keeps_what_it_can_not_is_refused(schedule, message, attentive):
    assert_refused(OptionError, message, lambda: Plan(schedule, attentive[2]))


def test_an_input_that_is_not_contiguous_is_profiled_as_it_is_run():
    """A linear layer saves other tensors of a component that is a part of a wider tensor."""
    costs = Profiler(clock=no_time).costs(transformer(1), (2, 8, 2 * WIDTH))
    assert [math.isfinite(op.inverse) for op in costs.ops] == [True] * 3


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ({"ends": 1.5}, "op 'op': ends is 1.5 s, expected 1.0 or less"),
        ({"ends": -1.0}, "op 'op': ends is -1.0 s, expected 0.0 or more"),
        ({"begins": 1.5}, "op 'op': begins is 1.5 s, expected 1.0 or less"),
        ({"spares": (0.0, 2.0, 0.0)}, "op 'op': spares is (0.0, 2.0, 0.0) s, expected 0.0 to (1.0, 1.0, 1.0)"),
    ],
)
def test_what_is_spared_is_a_part(seconds, message):
    assert_refused(OptionError, message, lambda: OpCosts("op", 1.0, 2.0, 3.0, **seconds))
