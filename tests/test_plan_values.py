"""Plans as values: saved, read at another budget, printed; and what is refused."""

import json
import math

import pytest
import torch
from planning_chains import homogeneous
from torch import nn

import invfunc as inv
from invfunc.errors import OptionError
from invfunc.plan import Costs, Invert, OpCosts, Plan, Store
from invfunc.plan.costs import parse_bytes, show_bytes
from invfunc.plan.report import rows, timeline
from invfunc.plan.schedule import from_data, predict
from invfunc.plan.search import least

# ---- plans as values ----


def test_a_plan_is_a_frozen_value_and_round_trips():
    plan = inv.plan(homogeneous(10, lossy=4), budget="40kB")
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.modes == plan.modes and again.peak_bytes == plan.peak_bytes
    assert plan.with_modes(plan.modes) == plan
    assert plan.with_modes(json.loads(json.dumps(plan.modes))) == plan
    with pytest.raises(AttributeError):
        plan.schedule = ()


def test_plans_and_costs_are_saved_and_loaded(tmp_path):
    plan = inv.plan(homogeneous(6), budget="25kB")
    plan.save(tmp_path / "plan.json")
    plan.costs.save(tmp_path / "costs.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Costs.load(tmp_path / "costs.json") == plan.costs


def test_at_reads_another_budget():
    plan = inv.plan(homogeneous(16), budget="60kB")
    tight = plan.at("30kB")
    assert tight.peak_bytes <= 30_000 < plan.peak_bytes <= 60_000
    assert tight.time > plan.time


def test_print_says_what_matters():
    plan = inv.plan(homogeneous(16, lossy=8, tape=8000), budget="30kB")
    text = str(plan)
    assert text.startswith(f"plan: {plan.time:.2f}x time, ")
    assert "objective: time under 29.3 KiB" in text
    for word in ("mode", "keeps", "extra", "why", "curve", "binds", "compare", "store all 1.00x", "truth"):
        assert word in text
    assert "inversion pays" in text


def test_print_tells_when_inversion_does_not_pay():
    costs = homogeneous(4)
    dear = Costs(tuple(OpCosts(**{**vars(op), "inverse": 100.0}) for op in costs.ops), 1000)
    assert "inversion does not pay" in str(inv.plan(dear, max_time=1.5))
    never = Costs(tuple(OpCosts(**{**vars(op), "inverse": math.inf}) for op in costs.ops), 1000)
    assert "no op has an inverse" in str(inv.plan(never, max_time=1.5))


@pytest.mark.parametrize("budget", ["90kB", "30kB", "15kB"])
def test_what_is_shown_adds_up_to_what_is_predicted(budget):
    costs = homogeneous(16, lossy=8, tape=8000)
    costs = Costs(tuple(OpCosts(**{**vars(op), "region": 0.25}) for op in costs.ops), 1000, 3000)
    plan = inv.plan(costs, budget=budget)
    moments = list(timeline(costs, plan.schedule))
    assert max(sum(m.kept.values()) + m.working for m in moments) == plan.peak_bytes
    assert moments[-1].seconds == pytest.approx(plan.predicted.seconds)
    assert sum(row.extra for row in rows(plan)) == pytest.approx(plan.predicted.seconds - costs.seconds)


def test_plot():
    pytest.importorskip("matplotlib")
    figure = inv.plan(homogeneous(8), budget="30kB").plot()
    left, right = figure.axes
    assert left.get_ylabel() == "time over plain" and right.get_ylabel() == "MiB"


# ---- bad input ----


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "nothing is limited, expected budget (for the least time), max_time (for the least memory), or both"),
        ({"max_error": 1e-3}, "max_error is limited, expected budget"),
        ({"budget": 1, "max_time": 2.0, "max_error": 1e-3}, "everything is limited.*leave one out"),
        ({"budget": "3 floppies"}, "budget is '3 floppies', expected bytes, or a number of B, KiB"),
        ({"budget": -1}, "budget is -1, expected one byte or more"),
        ({"budget": True}, "budget is True, expected one byte or more"),
        ({"max_time": 0.5}, "max_time is 0.5, expected 1.0 or more"),
        ({"max_time": math.nan}, "max_time is nan, expected a number"),
        ({"budget": "40kB", "max_time": 1.5}, "the costs say nothing of errors; invfunc.plan.profile"),
    ],
)
def test_bad_limits(limits, message):
    pattern = ".*".join(map(__import__("re").escape, message.split(".*")))
    with pytest.raises(OptionError, match=pattern):
        inv.plan(homogeneous(8), **limits)


def test_a_budget_below_the_least_names_what_binds():
    costs = homogeneous(8)
    bound = predict(costs, least(costs))
    with pytest.raises(OptionError, match=r"budget 2.93 KiB is below the least found .* \(op \d 'op': ") as caught:
        inv.plan(costs, budget=3000)
    assert f"{bound.peak_bytes} bytes cost {bound.seconds / costs.seconds:.3g}x the time" in str(caught.value)
    assert inv.plan(costs, budget=bound.peak_bytes).peak_bytes <= bound.peak_bytes


def test_a_budget_below_the_least_names_the_limit_on_errors():
    lean = Costs(tuple(OpCosts(**{**vars(op), "peak_inverse": 4000}) for op in homogeneous(8).ops), 1000)
    costs, bound = lean, predict(lean, least(lean)).peak_bytes
    with pytest.raises(OptionError, match=r"is below the least found .* with gradient errors of 0 \(op \d 'op': "):
        inv.plan(costs, budget=bound, max_error=0)


def test_no_input():
    with pytest.raises(OptionError, match="no input, expected plan"):
        inv.plan(inv.pair(torch.exp, torch.log), budget=100)


def test_a_plan_for_another_op():
    plan = inv.plan(inv.chain(inv.pair(torch.exp, torch.log), torch.sin), (4, 4), max_time=2.0)
    with pytest.raises(OptionError, match="this plan is for another op, expected pair > one_way, got pair"):
        inv.checkpoint(inv.pair(torch.exp, torch.log), plan=plan)
    with pytest.raises(OptionError, match="plan=... comes with other options"):
        inv.checkpoint(plan.f, plan=plan, segments=2)


def test_a_plan_for_a_coupling_is_for_no_other_one():
    f, g = nn.Linear(2, 2), nn.Linear(2, 2)
    couple, others = inv.couple(f, g), [inv.couple(f), inv.couple(g)]
    base = inv.chain(inv.split(2), couple, inv.concat(2))
    plan = inv.plan(base, (4, 4), max_time=2.0)
    assert inv.checkpoint(base, plan=Plan.from_json(plan.to_json())) == inv.checkpoint(base, plan=plan)
    for other in ([inv.invert(couple)], others, [inv.exact(couple, mode="codes")], [inv.ops.momentum(f, 0.5)]):
        with pytest.raises(
            OptionError, match="this plan is for another op, expected split > couple > concat, got split >"
        ):
            inv.checkpoint(inv.chain(inv.split(2), *other, inv.concat(2)), plan=plan)


def test_schedules_that_are_none():
    costs = homogeneous(3, lossy=3)
    for schedule, message in [
        ((Store(0), Store(2)), "goes on with op 2, expected op 1"),
        ((Store(0),), "ends before op 1, expected 3 ops"),
        ((Invert(0, 3),), r"inverts op 0 \(op\), expected an op with an inverse"),
    ]:
        with pytest.raises(OptionError, match=message):
            Plan(schedule, costs)
    with pytest.raises(OptionError, match="this is not a schedule"):
        from_data([["melt", 1]])
    with pytest.raises(OptionError, match="this is not a plan"):
        Plan.from_json("{}")
    with pytest.raises(OptionError, match="these are not costs"):
        Costs.from_json("{}")


def test_verify_needs_the_op():
    with pytest.raises(OptionError, match="made from costs alone"):
        inv.plan(homogeneous(3), max_time=2.0).verify(torch.ones(2))


def test_sizes():
    assert parse_bytes("1.5 GiB") == 3 * 2**29 and show_bytes(3 * 2**29) == "1.5 GiB"
