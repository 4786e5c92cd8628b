"""Plans that are solved from data: against the exhaustive optimum, and against every fixed strategy."""

import math
import random

import pytest
import torch
from planning_chains import homogeneous, mlp, profile, step, weights_of
from planning_oracle import optimum

import invfunc as inv
from invfunc.errors import OptionError
from invfunc.plan import Costs, Invert, OpCosts
from invfunc.plan.schedule import predict, store_all
from invfunc.plan.search import least
from invfunc.plan.solver import Table


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
def test_exact_ops_need_no_limit(mode):
    torch.manual_seed(0)
    parts = [inv.split(2), *[inv.couple(mlp(8), mlp(8)) for _ in range(3)], inv.concat(2)]
    f, x = inv.exact(inv.chain(*parts), mode=mode), torch.randn(64, 16)
    costs, weights = profile(f, x), weights_of(f, x)
    plan = inv.plan(costs, budget=int(1.1 * predict(costs, least(costs)).peak_bytes), max_error=0)
    assert plan.error == 0 and any(isinstance(node, Invert) for node in plan.schedule)
    exact, found = step(f, x, weights), step(inv.checkpoint(f, plan=plan), x, weights)
    assert all(map(torch.equal, found, exact))
