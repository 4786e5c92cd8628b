"""Plans: the solver against the exhaustive optimum, the executor against plain gradients, peaks measured."""

import json
import math
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_chains import (
    ROUNDING,
    demo,
    given_seconds,
    homogeneous,
    make_op,
    mixed,
    mlp,
    new_errors,
    peak_of,
    weights_of,
)
from planning_oracle import optimum
from torch import nn

import invfunc as inv
from invfunc.errors import OptionError, WireError
from invfunc.plan import Costs, Invert, OpCosts, Plan, Recompute, Store, profile, profiling
from invfunc.plan.costs import parse_bytes, show_bytes
from invfunc.plan.executor import flat_ops
from invfunc.plan.report import rows, timeline
from invfunc.plan.schedule import from_data, invert_all, predict, recompute_every, store_all, to_data
from invfunc.plan.search import least
from invfunc.plan.solver import Table

# ---- the solver, on data ----


def random_ops(rng: random.Random) -> list[dict]:
    share = rng.choice([0, 0.3, 0.6, 1])
    ops = []
    for _ in range(rng.choice([3, 4, 5])):
        u, b, v = rng.randint(1, 9), rng.randint(1, 18), rng.randint(1, 9)
        c = rng.choice([u + b, v + u + b]) if rng.random() < share else math.inf
        ops.append(
            {"u": u, "b": b, "c": c, "v": v, "a": rng.randint(1, 5), "t": rng.randint(0, 8), "n": rng.randint(0, 1)}
        )
    return ops


def costs_of(ops: list[dict]) -> Costs:
    """The oracle's ops as costs: bytes of states alone."""
    before, found = 0, []
    for i, op in enumerate(ops):
        a, t = op["a"], op["t"]
        peaks = {"peak_forward": a, "peak_taped": a + t, "peak_backward": t, "peak_inverse": before + a}
        peaks |= {f"{name}_last": peaks[name] for name in ("peak_backward", "peak_inverse")}
        held = {"holds_input": (before * op["n"],), "holds_output": (0,)}
        found.append(OpCosts(f"op{i}", op["u"], op["b"], op["c"], bytes=a, tape=t, **held, **peaks))
        before = a
    return Costs(tuple(found))


def test_the_solver_finds_the_exhaustive_optimum():
    rng, equal, feasible, gap = random.Random(0), 0, 0, 0.0
    while feasible < 500:
        ops = random_ops(rng)
        budget = rng.randint(max(op["a"] for op in ops), sum(op["a"] + op["t"] for op in ops))
        best = optimum(ops, budget)
        costs = costs_of(ops)
        table = Table(costs, budget, budget)
        time = table.time(budget)
        if math.isinf(best):
            assert math.isinf(time)
            continue
        found = predict(costs, table.schedule(budget))
        assert found.peak_bytes <= budget
        assert found.seconds == pytest.approx(time)
        assert time >= best
        feasible, equal, gap = feasible + 1, equal + (time == best), max(gap, time / best - 1)
    assert equal >= 0.98 * feasible
    assert gap <= 0.15


def test_time_falls_as_memory_grows():
    plan = inv.plan(homogeneous(24, lossy=8), max_time=1.2)
    peaks, times = zip(*plan.curve, strict=True)
    assert list(peaks) == sorted(peaks) and list(times) == sorted(times, reverse=True)
    assert times[-1] == pytest.approx(1.0)
    assert plan.time <= 1.2


def test_a_budget_for_plain_training_stores_everything():
    costs = homogeneous(12)
    peak = predict(costs, store_all(12)).peak_bytes
    assert inv.plan(costs, budget=peak).schedule == store_all(12)
    assert inv.plan(costs, budget=peak - 1).schedule != store_all(12)


@pytest.mark.parametrize("share", [0.6, 0.3, 0.15])
def test_no_fixed_strategy_is_better_in_time_and_peak(share):
    costs = homogeneous(24, lossy=6, tape=8000)
    plan = inv.plan(costs, budget=int(share * predict(costs, store_all(24)).peak_bytes))
    for name, fixed in plan.fixed().items():
        assert not (fixed.seconds < plan.predicted.seconds / 1.03 and fixed.peak_bytes < plan.peak_bytes / 1.03), name


def test_a_limit_on_errors_is_a_limit_on_runs():
    costs = homogeneous(16, tape=8000)
    errors = tuple((i, k, 10.0 ** ((k - i) / 2 - 8)) for k in range(1, 17) for i in range(k))
    costs = Costs(**{**vars(costs), "errors": errors})
    loose = inv.plan(costs, budget="16kB")
    strict = inv.plan(costs, budget="16kB", max_error=1.01e-6)
    exact = inv.plan(costs, budget="16kB", max_error=0)
    assert loose.error > 1.01e-6 >= strict.error > exact.error == 0
    assert exact.time > strict.time >= loose.time
    assert inv.plan(costs, budget="16kB", max_time=strict.time).error <= strict.error
    with pytest.raises(OptionError, match="plan: max_time is 1.1 in 15.6 KiB, expected 1.35 or more"):
        inv.plan(costs, budget="16kB", max_time=1.1)


def test_bit_exact_inverses_need_no_limit():
    op = homogeneous(1).ops[0]
    exact = OpCosts(**{**vars(op), "exact": True})
    costs = Costs((exact,) * 8, 1000)
    bound = predict(costs, least(costs)).peak_bytes
    plan = inv.plan(costs, budget=bound, max_error=0)
    assert plan.error == 0
    assert any(isinstance(node, Invert) for node in plan.schedule)


@pytest.mark.parametrize("mode", ["codes", "grid"])
def test_exact_ops_need_no_limit(monkeypatch, mode):
    monkeypatch.setattr(profiling, "timed", given_seconds)
    torch.manual_seed(0)
    parts = [inv.split(2), *[inv.couple(mlp(8), mlp(8)) for _ in range(3)], inv.concat(2)]
    f, x = inv.exact(inv.chain(*parts), mode=mode), torch.randn(64, 16)
    costs, weights = profile(f, x), weights_of(f, x)
    plan = inv.plan(costs, budget=predict(costs, least(costs)).peak_bytes, max_error=0)
    assert plan.error == 0 and any(isinstance(node, Invert) for node in plan.schedule)
    exact, found = step(f, x, weights), step(inv.checkpoint(f, plan=plan), x, weights)
    assert all(map(torch.equal, found, exact))


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
        ({"budget": -1}, "budget is -1, expected a positive number of bytes"),
        ({"budget": True}, "budget is True, expected a positive number"),
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
    with pytest.raises(OptionError, match=r"budget 2.93 KiB is below the least possible .* \(op \d 'op': ") as caught:
        inv.plan(costs, budget=3000)
    assert f"{bound.peak_bytes} bytes cost {bound.seconds / costs.seconds:.3g}x the time" in str(caught.value)
    assert inv.plan(costs, budget=bound.peak_bytes).peak_bytes <= bound.peak_bytes


def test_a_budget_below_the_least_names_the_limit_on_errors():
    costs = homogeneous(8)
    bound = predict(costs, least(costs)).peak_bytes
    with pytest.raises(OptionError, match=r"is below the least possible .* with gradient errors of 0 \(op \d 'op': "):
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


# ---- the executor: any plan gives the plain gradient ----


KINDS = ("couple", "affine", "closure", "exp", "flip", "noisy", "lossy")


def random_schedule(draw, costs: Costs, first: int, stop: int, inverts: bool, depth: int = 0):
    nodes, at = [], first
    while at < stop:
        longest = at
        while inverts and longest < stop and math.isfinite(costs.ops[longest].inverse):
            longest += 1
        kind = draw(st.sampled_from(["store"] + ["invert"] * (longest > at) + ["recompute"] * (depth < 3)))
        if kind == "store":
            nodes.append(Store(at))
        elif kind == "invert":
            nodes.append(Invert(at, draw(st.integers(at + 1, longest))))
        else:
            end = draw(st.integers(at + 1, stop))
            nodes.append(Recompute(at, random_schedule(draw, costs, at, end, inverts, depth + 1)))
        at = nodes[-1].stop
    return tuple(nodes)


def fake_costs(op) -> Costs:
    from invfunc.plan.executor import has_inverse

    return Costs(tuple(OpCosts("op", 1.0, 1.0, 1.0 if has_inverse(o) else math.inf) for o in flat_ops(op)))


def step(op, x, weights, of=None):
    torch.manual_seed(0)
    norms = [
        m for part in flat_ops(of or op) for fn in part.functions if isinstance(fn, nn.Module) for m in fn.modules()
    ]
    norms = [m for m in norms if isinstance(m, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
    x = x.detach().requires_grad_()
    y = op(x)
    gradients = torch.autograd.grad(y.square().mean(), [x, *weights])
    return [y.detach(), *gradients, torch.rand(1), *[norm.running_mean.clone() for norm in norms]]


@settings(max_examples=60)
@given(st.data())
def test_any_plan_gives_the_plain_gradient(data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
    f = inv.chain(*[make_op(kind, 6) for kind in kinds])
    costs, x = fake_costs(f), torch.randn(5, 6)
    inverts = data.draw(st.booleans())
    plan = Plan(random_schedule(data.draw, costs, 0, len(costs.ops), inverts), costs)
    weights = weights_of(f, x)
    exact, found = step(f, x, weights), step(inv.checkpoint(f, plan=plan), x, weights)
    for a, b in zip(found, exact, strict=True):
        if inverts:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(a, b)


def example(tree=None):
    f = inv.chain(make_op("couple", 6), make_op("lossy", 6), make_op("couple", 6))
    inner = Recompute(4, (Store(4), Invert(5, 7)))  # it ends between the halves of a coupling
    tree = tree or (Recompute(0, (Invert(0, 2), Invert(2, 4), inner, Store(7), Invert(8, 9))),)
    return f, Plan(tree, fake_costs(f)), torch.randn(5, 6)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap", "hessian"])
def test_a_planned_op_under_transforms(transform):
    f, plan, x = example()
    fast = inv.checkpoint(f, plan=plan)

    def value(op):
        return lambda v: op(v[None] if v.dim() == 1 else v).square().sum()

    def run(op):
        if transform == "vmap":
            return torch.func.vmap(torch.func.grad(value(op)))(x)
        given = x[:1] if transform == "hessian" else x
        return getattr(torch.func, transform)(value(op))(given)

    torch.testing.assert_close(run(fast), run(f), rtol=1e-9, atol=1e-9)


@pytest.mark.compile
# Dynamo instantiates a Function to trace it, and warns of that itself
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
def test_a_compiled_plan_gives_the_plain_gradient():
    f, x = inv.chain(*make_op("exp", 6).parts, make_op("lossy", 6), *make_op("exp", 6).parts), torch.randn(5, 6)
    plan = Plan((Recompute(0, (Invert(0, 1), Recompute(1, (Store(1),)), Store(2))), Invert(3, 5)), fake_costs(f))
    weights = weights_of(f, x)
    fast = torch.compile(inv.checkpoint(f, plan=plan), backend="aot_eager", fullgraph=True)
    for found, exact in zip(step(fast, x, weights, of=f), step(f, x, weights), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_double_backward_and_a_second_backward():
    f, plan, x = example()
    fast = inv.checkpoint(f, plan=plan)
    second = []
    for op in (f, fast):
        v = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(op(v).square().sum(), v, create_graph=True)
        second.append(torch.autograd.grad(g.square().sum(), v)[0])
    torch.testing.assert_close(*second, rtol=1e-9, atol=1e-9)
    v = x.clone().requires_grad_()
    loss = fast(v).square().sum()
    (a,) = torch.autograd.grad(loss, v, retain_graph=True)
    (b,) = torch.autograd.grad(loss, v)
    assert torch.equal(a, b)


def off_by(error: float):
    return inv.pair(torch.sinh, lambda y: torch.asinh(y) + error, name="off")


@pytest.mark.parametrize(
    "tree",
    [
        (Store(0), Store(1), Invert(2, 4)),
        (Recompute(0, (Store(0), Store(1))), Invert(2, 4)),
        (Store(0), Recompute(1, (Store(1), Invert(2, 4)))),
    ],
)
def test_drift_is_placed_where_a_trunk_begins(tree):
    f = inv.chain(inv.pair(torch.tanh, torch.atanh), torch.sin, off_by(1e-3), inv.pair(torch.tanh, torch.atanh))
    fast = inv.checkpoint(f, plan=Plan(tree, fake_costs(f)))
    with pytest.warns(inv.errors.DriftWarning, match=r"chain stage 2 \(off\): its input"):
        fast(torch.rand(5, 6, requires_grad=True)).sum().backward()


def test_errors_are_placed_in_the_whole_chain():
    def fails(x):
        raise KeyError("mine")

    f = inv.chain(torch.sin, torch.cos, inv.pair(fails, torch.log, name="bad"))
    for tree in [store_all(3), (Store(0), Recompute(1, (Store(1), Store(2))))]:
        with pytest.raises(KeyError, match="mine") as caught:
            inv.checkpoint(f, plan=Plan(tree, fake_costs(f)))(torch.rand(5, 6, requires_grad=True))
        assert caught.value.__notes__ == ["in chain stage 2 (bad)"]


def test_errors_in_a_coupling_are_placed_by_the_stage():
    def bad(x):
        return x[:, :1, None]

    x = torch.rand(5, 6, requires_grad=True)
    for stage, name, claim in [
        (inv.couple(torch.sin, bad), "couple", "g returned"),
        (inv.invert(inv.couple(torch.sin, bad)), "invert", "g returned"),
        (inv.ops.momentum(bad, 0.5), "momentum", "law blend made"),
    ]:
        f = inv.chain(inv.split(2), inv.couple(torch.sin, torch.cos), stage)
        for tree in [store_all(5), (Store(0), Recompute(1, (Invert(1, 3), Invert(3, 5))))]:
            with pytest.raises(WireError, match=rf"^chain stage 2 \({name}\): {claim} \(5, "):
                inv.checkpoint(f, plan=Plan(tree, fake_costs(f)))(x)


def test_modes_override_plans_and_the_inverse_has_none():
    f, plan, x = example((Recompute(0, tuple(map(Store, range(9)))),))
    fast = inv.checkpoint(f, plan=plan)
    assert inv.checkpoint(fast) == fast
    with inv.mode("store"):
        assert "Recompute" not in fast(x.requires_grad_()).grad_fn.name()
    part = inv.chain(make_op("couple", 6), make_op("exp", 6))
    count = len(flat_ops(part))
    fast = inv.checkpoint(part, plan=Plan(store_all(count), fake_costs(part)))
    torch.testing.assert_close(inv.invert(fast)(fast(x)), x)


# ---- profile and peak ----


@pytest.fixture(scope="module")
def profiled():
    found, before = {}, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "timed", given_seconds)
        for name, f, x in [
            ("mixed", mixed(), torch.randn(2048, 32)),
            ("demo", demo(24, torch.float64), torch.randn(64, 1, 8, 8)),
        ]:
            x.requires_grad_()
            found[name] = f, x, profile(f, x), weights_of(f, x)
    torch.set_default_dtype(before)
    return found


@pytest.mark.parametrize("name", ["mixed", "demo"])
@pytest.mark.parametrize("share", [0.75, 0.5, 0.25, "least"])
def test_the_measured_peak_keeps_to_the_budget(profiled, name, share):
    f, x, costs, weights = profiled[name]
    plain, bound = predict(costs, store_all(len(costs.ops))).peak_bytes, predict(costs, least(costs)).peak_bytes
    budget = bound if share == "least" else int(share * plain)
    plan = inv.plan(costs, budget=budget)
    measured = peak_of(inv.checkpoint(f, plan=plan), x, weights)
    assert measured <= budget
    assert measured >= 0.95 * plan.peak_bytes
    assert plan.peak_bytes >= 0.95 * budget


@pytest.mark.parametrize("name", ["mixed", "demo"])
def test_plain_training_is_predicted_to_the_byte(profiled, name):
    f, x, costs, weights = profiled[name]
    schedule = store_all(len(costs.ops))
    predicted, plan = predict(costs, schedule).peak_bytes, Plan(schedule, costs)
    slack = max(op.parameters for op in costs.ops)  # gradients that accumulate one by one count as if at once
    for op in (f, inv.checkpoint(f, plan=plan)):
        assert 0 <= predicted * (1 + 1e-3) - peak_of(op, x, weights) <= slack + 2e-3 * predicted


@pytest.mark.parametrize("schedule", [lambda c: recompute_every(c, 1), lambda c: recompute_every(c, 3), invert_all])
def test_fixed_strategies_keep_to_what_is_predicted(profiled, schedule):
    f, x, costs, weights = profiled["mixed"]
    plan = Plan(schedule(costs), costs)
    assert 0.9 * plan.peak_bytes <= peak_of(inv.checkpoint(f, plan=plan), x, weights) <= plan.peak_bytes


def test_halves_of_a_coupling_are_planned_each_on_its_own(monkeypatch):
    monkeypatch.setattr(profiling, "timed", given_seconds)
    wide = nn.Sequential(nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 8))
    f = inv.chain(inv.split(2), *[inv.couple(nn.Linear(8, 8), wide) for _ in range(6)], inv.concat(2))
    costs, x = profile(f, (64, 16)), torch.randn(64, 16)
    assert [op.name for op in costs.ops[:4]] == ["couple: f=Linear", "couple: g=Sequential"] * 2
    assert sorted(costs.ops[1].shares_output) == [0, 64 * 8 * x.element_size()]
    halfway = inv.plan(costs, budget=predict(costs, store_all(13)).peak_bytes // 2)
    ways = {row.op: {r.mode for r in rows(halfway) if r.op == row.op} for row in rows(halfway)}
    assert ways["couple: f=Linear"] == {"store"}
    assert "store" in ways["couple: g=Sequential"] and len(ways["couple: g=Sequential"]) > 1
    weights = weights_of(f, x)
    for found, exact in zip(step(inv.checkpoint(f, plan=halfway), x, weights), step(f, x, weights), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_couplings_of_long_chains_are_planned_whole(monkeypatch):
    monkeypatch.setattr(profiling, "timed", given_seconds)
    monkeypatch.setattr(profiling, "FINE", 7)
    f = [inv.chain(inv.split(2), *[inv.couple(torch.sin, torch.cos)] * depth, inv.concat(2)) for depth in (2, 3)]
    short, long = (profile(op, (8, 8)) for op in f)
    assert [op.parts for op in short.ops] == [2, 1, 1, 1, 1] and [op.parts for op in long.ops] == [3, 2, 2, 1]
    assert inv.checkpoint(f[1], plan=inv.plan(long, max_time=1.5))(torch.randn(8, 8)).shape == (8, 8)


def test_a_run_of_inverses_that_ends_between_halves_keeps_to_what_is_predicted(profiled):
    f, x, costs, weights = profiled["demo"]
    count = len(costs.ops)
    assert costs.ops[-2].name.startswith("concat")  # sends back parts of a tensor, which do not lie in order
    for cut in range(count - 5, count - 1):
        stored = tuple(map(Store, range(count // 2)))
        plan = Plan((*stored, Invert(count // 2, cut), Invert(cut, count - 1), Store(count - 1)), costs)
        assert 0.9 * plan.peak_bytes <= peak_of(inv.checkpoint(f, plan=plan), x, weights) <= plan.peak_bytes, cut


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        Counted.calls += 1
        return super().forward(x)


def test_ops_of_one_kind_are_run_once(monkeypatch):
    monkeypatch.setattr(profiling, "PATIENCE", (math.inf, math.inf))  # no round is left out

    def calls(depth):
        f = inv.chain(inv.split(2), *[inv.couple(Counted(4, 4), Counted(4, 4)) for _ in range(depth)], inv.concat(2))
        before = Counted.calls
        profile(f, (8, 8))
        return Counted.calls - before

    assert calls(24) - calls(6) == 5 * 2 * 18  # in five rounds, forward alone, on the way to the last op


def test_rounds_end_where_they_would_take_too_long(monkeypatch):
    rounds = []
    monkeypatch.setattr(profiling, "timed", lambda *args: rounds.append(1) or given_seconds(*args))
    f = inv.chain(nn.Linear(8, 8))
    for patience, expected in [((0.0, 0.0), 1), ((math.inf, 0.0), 5)]:
        monkeypatch.setattr(profiling, "PATIENCE", patience)
        rounds.clear()
        profile(f, (4, 8))
        assert len(rounds) == expected


LAYOUTS = {
    "a tail keeps the whole of what a view is a part of": (
        ("dense", "affine"),
        (Store(0), Invert(1, 2), Store(2)),
    ),
    "a gradient passes through, and keeps the other half alive": (
        ("exp", "closure", "lossy"),
        (Recompute(0, (Store(0), Store(1))), Invert(2, 4), Store(4)),
    ),
    "an output that a later run keeps exact": (
        ("closure", "flip", "lossy"),
        (Invert(0, 1), Invert(1, 3), Store(3)),
    ),
    "copies of running statistics": (
        ("noisy", "lossy", "noisy"),
        (Recompute(0, (Recompute(0, (Store(0),)), Store(1))), Store(2)),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_model_sees_every_storage(monkeypatch, name):
    monkeypatch.setattr(profiling, "timed", given_seconds)
    kinds, schedule = LAYOUTS[name]
    torch.manual_seed(0)
    f, x = inv.chain(*[make_op(kind, 16) for kind in kinds]), torch.randn(256, 16, requires_grad=True)
    plan = Plan(schedule, profile(f, x))
    assert 0.85 * plan.peak_bytes <= peak_of(inv.checkpoint(f, plan=plan), x, weights_of(f, x)) <= plan.peak_bytes


def test_shapes_are_enough_for_bytes_and_nothing_is_allocated():
    f = demo(2, torch.float64)
    a = profile(f, (16, 1, 8, 8), repeats=1)
    b = profile(f, torch.randn(16, 1, 8, 8, requires_grad=True), repeats=1)
    same = ("bytes", "tape", "holds_input", "holds_output", "peak_taped", "peak_backward", "peak_inverse", "parameters")
    for name in same:
        assert [getattr(op, name) for op in a.ops] == [getattr(op, name) for op in b.ops], name


def test_what_needs_no_gradient_is_planned_too(monkeypatch):
    monkeypatch.setattr(profiling, "timed", given_seconds)
    f, x = inv.chain(*make_op("exp", 6).parts, torch.sin, nn.Linear(6, 6), make_op("couple", 6)), torch.randn(64, 6)
    costs, weights = profile(f, x), weights_of(f, x)
    assert all(op.tape < 100 for op in costs.ops[:3])
    plan = inv.plan(costs, budget=predict(costs, least(costs)).peak_bytes)
    for found, exact in zip(step(inv.checkpoint(f, plan=plan), x, weights), step(f, x, weights), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_another_shape_warns_above_the_budget(profiled):
    f, x, costs, _ = profiled["demo"]
    plan = inv.plan(costs, budget=int(0.5 * predict(costs, store_all(len(costs.ops))).peak_bytes))
    fast = inv.checkpoint(f, plan=plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(torch.randn(32, 1, 8, 8))
    with pytest.warns(UserWarning, match=r"with \(80, 1, 8, 8\) float64 it takes .* more than .*; plan again"):
        fast(torch.randn(80, 1, 8, 8))


def test_a_part_of_the_batch_is_timed_where_all_of_it_does_not_fit():
    f = inv.chain(nn.Linear(8, 8), torch.tanh)
    whole, part = profile(f, (64, 8)), profile(f, (64, 8), memory="8kB")
    assert (whole.scaled, part.scaled) == (1, 4)
    assert [op.bytes for op in part.ops] == [op.bytes for op in whole.ops]
    assert "timing   on a batch 4 times smaller" in str(inv.plan(part, max_time=2.0))
    with pytest.raises(OptionError, match="profile: memory is 'much'"):
        profile(f, (64, 8), memory="much")


def test_planning_leaves_no_trace():
    torch.manual_seed(3)
    norm = nn.BatchNorm1d(6)
    f, x = inv.chain(make_op("couple", 6), norm, lambda v: nn.functional.dropout(v, 0.5)), torch.randn(5, 6)
    before, state = {k: v.clone() for k, v in norm.state_dict().items()}, torch.get_rng_state()
    plan = inv.plan(f, x, max_time=2.0, max_error=1e-9)
    assert plan.verify(x).error <= 1e-9
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in norm.parameters()) and x.grad is None


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("name", ["mixed", "demo"])
def test_no_fixed_strategy_is_better_on_a_real_chain(profiled, name, share):
    costs = profiled[name][2]
    plan = inv.plan(costs, budget=int(share * predict(costs, store_all(len(costs.ops))).peak_bytes))
    for name, fixed in plan.fixed().items():
        assert not (fixed.seconds < plan.predicted.seconds / 1.03 and fixed.peak_bytes < plan.peak_bytes / 1.03), name


@pytest.mark.parametrize("name", ["affine, exponential scales", "dense linears"])
def test_a_limit_on_errors_holds_on_a_new_batch(monkeypatch, name):
    """Two chains of the suite in benchmarks/planning.py."""
    monkeypatch.setattr(profiling, "timed", given_seconds)
    torch.set_default_dtype(torch.float32)
    found = list(new_errors(ROUNDING[name], [1.1], [1e-3, 1e-5]))
    assert found and any(error > 0 for _, error in found)
    assert all(error <= 10 * limit for (_, limit), error in found)


def test_verify_measures_a_step_beside_the_gradients(monkeypatch):
    """Where parameters are as large as activations, gradients that somebody else holds would be seen."""
    monkeypatch.setattr(profiling, "timed", given_seconds)
    torch.manual_seed(0)
    f, x = (
        inv.chain(inv.split(2), *[inv.couple(mlp(16), mlp(16)) for _ in range(8)], inv.concat(2)),
        torch.randn(32, 32),
    )
    costs, weights = profile(f, x), weights_of(f, x)
    for weight in weights[::2]:
        weight.grad = torch.ones_like(weight)
    top, bound = (predict(costs, s).peak_bytes for s in (store_all(len(costs.ops)), least(costs)))
    for share in (0.0, 0.1, 0.3, 0.6):
        budget = int(bound + share * (top - bound))
        assert inv.plan(costs, budget=budget).verify(x, f).peak_bytes <= budget
    assert [w.grad is None for w in weights[:2]] == [False, True] and weights[0].grad.eq(1).all()


def test_verify_and_errors_on_another_batch():
    torch.manual_seed(1)
    ops = [make_op("couple", 16) for _ in range(8)]
    f, x = inv.chain(*ops), torch.randn(64, 16, dtype=torch.float64)
    plan = inv.plan(f, x, max_time=2.5, max_error=1e-10)
    checked = plan.verify(torch.randn(64, 16))
    assert checked.error <= 1e-9
    assert checked.peak_bytes <= 1.05 * plan.peak_bytes + 64 * 1024
    assert plan.error is not None


def test_data_round_trips():
    tree = (Recompute(0, (Store(0), Store(1))), Invert(2, 5))
    assert from_data(to_data(tree)) == tree
