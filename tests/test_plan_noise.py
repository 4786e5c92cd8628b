"""Plans on a busy machine: what noise can not do, whatever the clock says."""

import math
import random
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from kit import assert_refused
from planning_chains import demo, given_seconds, make_op, mlp
from torch import nn

import invfunc as inv
from invfunc.errors import OptionError
from invfunc.plan import Costs, Invert, OpCosts, Plan, Recompute, Store, machine
from invfunc.plan import profile as real_profile
from invfunc.plan.costs import parse_bytes
from invfunc.plan.profiling import Profiler
from invfunc.plan.report import rows, timeline
from invfunc.plan.schedule import fixed_schedules, predict, store_all
from invfunc.plan.search import least
from invfunc.plan.solver import Table
from invfunc.plan.work import CPU, Python, Rates, Work, costs_in, read, unit_of

SPIKES = (1.0, 1.1, 1.3, 2.0, 20.0)  # what a busy machine makes of a second


def busy(seed):
    """A clock on a busy machine: every reading is longer by another factor."""
    noise = random.Random(seed)

    def clock(*args):
        y, found = given_seconds(*args)
        return y, {name: seconds * noise.choice(SPIKES) for name, seconds in found.items()}

    return clock


def couplings(depth=6, width=64):
    torch.manual_seed(0)
    f = [inv.couple(mlp(width // 2), mlp(width // 2)) for _ in range(depth)]
    return inv.chain(inv.split(2), *f, inv.concat(2))


def peak(costs):
    return predict(costs, store_all(len(costs.ops))).peak_bytes


# ---- costs that can not be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ({"forward": -1.0}, "op 'op': forward is -1.0 s, expected 0.0 or more"),
        ({"backward": -0.5}, "op 'op': backward is -0.5 s, expected 0.0 or more"),
        ({"region": -0.5}, "op 'op': region is -0.5 s, expected 0.0 or more"),
        ({"region": math.nan}, "op 'op': region is nan s, expected 0.0 or more"),
        ({"inverse": 1.9}, "op 'op': inverse is 1.9 s, expected 2.0 or more"),
    ],
)
def test_costs_that_promise_less_than_plain_training_are_refused(seconds, message):
    assert_refused(OptionError, message, lambda: OpCosts("op", **{"forward": 1.0, "backward": 2.0} | seconds))


@pytest.mark.parametrize("seed", range(8))
def test_no_clock_makes_a_plan_faster_than_plain_training(seed):
    """Not even one that says anything at all."""
    noise = random.Random(seed)

    def wild(op, x, invertible, again):
        y, found = given_seconds(op, x, invertible, again)
        return y, {name: noise.choice([0.0, 1e-9, 1e-3, 1.0, 1e3]) for name in found}  # less than no op, too

    costs = Profiler(clock=wild).costs(couplings(3), (64, 64))
    for op in costs.ops:
        assert min(op.forward, op.backward, op.region, op.inverse - op.backward) >= 0
    for schedule in [*fixed_schedules(costs).values(), least(costs)]:
        assert Plan(schedule, costs).time >= 1
    assert inv.plan(costs, budget=peak(costs) // 2).time >= 1


def test_seconds_are_whole_numbers_of_a_unit_so_that_like_ops_tie():
    unit = unit_of(0.1)
    found = costs_in({"forward": 0.0123, "step": 0.0345, "again": 0.05, "undone": 0.0001}, unit)
    assert found.pop("spares") == (0.0, 0.0, 0.0)
    assert all(seconds / unit == pytest.approx(round(seconds / unit)) for seconds in found.values())
    assert found["inverse"] == found["backward"]
    costs = Costs((OpCosts("op", **found),), unit=unit)
    assert costs.in_units().ops[0].forward == round(found["forward"] / unit)
    assert Costs.from_json(costs.to_json()) == costs


# ---- plans that agree ------------------------------------------------------------------------------------------------


def test_halves_and_layers_of_one_kind_share_one_cost():
    torch.manual_seed(0)
    costs = Profiler(clock=busy(0)).costs(couplings(), (2048, 64))
    seconds = {(op.forward, op.backward, op.inverse, op.region) for op in costs.ops[1:-1]}
    assert len(costs.ops) == 13 and len(seconds) == 1  # but for the first, whose input needs no gradient


@pytest.mark.parametrize("share", [0.75, 0.5, 0.35, 0.25])
def test_plans_on_a_busy_machine_agree(share):
    found = []
    for seed in range(6):
        costs = Profiler(clock=busy(seed)).costs(couplings(), (2048, 64))
        found.append(inv.plan(costs, budget=int(share * peak(costs))))
    assert {plan.modes for plan in found} == {found[0].modes}
    assert [plan.time for plan in found] == pytest.approx([found[0].time] * 6)


@pytest.mark.parametrize(("longer", "believed"), [(1e-3, False), (5e-3, True)])
def test_a_turn_of_another_process_does_not_contradict_what_is_counted(longer, believed):
    counts = {"a": {"forward": Work(10), "step": Work(30), "again": Work(50)}}
    timed = {"a": {"forward": 40e-6, "step": 120e-6, "again": 200e-6 + longer}}
    (reading,) = read(timed, counts, ["a"], CPU, {}, Python()).values()
    assert (reading.off > 1) == believed


def test_time_that_others_take_does_not_end_the_rounds():
    rounds = []

    def clock(*args):
        rounds.append(args)
        time.sleep(0.1)
        return given_seconds(*args)

    Profiler(clock=clock, patience=(0.0, 0.4)).costs(inv.chain(nn.Linear(64, 64)), (64, 64))
    assert len(rounds) == 5


def test_what_was_found_once_stands_in_the_next_profile():
    """A kernel that is slower than its bytes say, near the factor from which on that is believed."""
    counts = {"a": {way: Work(0, 1, 0) for way in ("forward", "step", "again")} | {"step": Work(0, 2, 0)}}
    counts |= {"b": counts["a"]}
    clock = {"a": {"forward": 1.0, "step": 2.0, "again": 3.0}}
    known = {}
    for slow in (3.1, 2.9, 3.2, 2.8):
        timed = clock | {"b": {way: slow * seconds for way, seconds in clock["a"].items()}}
        readings = read(timed, counts, ["a"] * 9 + ["b"], Rates(1.0, 1.0, 1.0), known, Python())
        known = {kind: reading.factors for kind, reading in readings.items()}
        assert readings["b"].seconds["step"] == pytest.approx(2 * 3**1.5)
    assert not readings["b"].doubt == 0 and readings["a"].off == 1


def test_plans_made_beside_busy_processes_agree():
    f = couplings(4, 128)
    loop = [sys.executable, "-c", "while True: sum(range(10000))"]
    processes = [subprocess.Popen(loop) for _ in range(2)]
    try:
        plans = [inv.plan(f, (1024, 128), budget="12MiB") for _ in range(2)]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert plans[0].modes == plans[1].modes
    assert min(plan.time for plan in plans) >= 1


def test_timing_leaves_the_number_of_threads():
    before = torch.get_num_threads()
    seen = []

    def clock(*args):
        seen.append(torch.get_num_threads())
        return given_seconds(*args)

    torch.set_num_threads(2)
    try:
        Profiler(clock=clock).costs(couplings(1), (8, 64))
        assert torch.get_num_threads() == 2 and set(seen) == {1}
    finally:
        torch.set_num_threads(before)


# ---- what Python takes -----------------------------------------------------------------------------------------------


def steps_of(call, python):
    """The seconds of whole steps where kernels and Python take so long."""
    n, ops = machine.HALVES, machine.HALVES * machine.CALLS * call
    forward, enter = machine.CALLS * call / 3, python.of_step(n, call)
    within, level = python.within * call + forward, python.level * call + forward
    region, opens = ops + enter + python.region * call, ops + enter + python.opens * call
    return {
        "plain": ops,
        "region": region + n * within,
        "short region": region + within,
        "regions": region + (n - 1) * python.region * call + n * within,
        "run": opens + n * level,
        "short run": opens + level,
        "runs": opens + (n - 1) * python.opens * call + n * level,
    }


@pytest.mark.parametrize("call", [1e-6, 5e-6])
def test_what_python_takes_is_read_from_whole_steps(call):
    python = Python(70.0, machine.USUAL.each, 50.0, 12.0, 25.0, 15.0)
    assert machine.calls_in(steps_of(call, python)) == pytest.approx(python)


@pytest.mark.parametrize(("factor", "found"), [(0.75, 1), (1.3, 1), (2.5, 2), (0.3, 0.25), (-1.0, 1 / 16), (99.0, 16)])
def test_what_python_takes_is_as_usual_unless_that_is_contradicted(factor, found):
    python = machine.believed(Python(*[factor * calls for calls in machine.USUAL]))
    assert python == pytest.approx(tuple(found * calls for calls in machine.USUAL))


def test_what_python_takes_here_is_a_number_of_calls():
    python = machine.python_here()
    assert machine.python_here() is python
    assert python.region > python.within > 0 and python.enter > python.opens > 0 and python.level > 0


def with_python(op, shape, python):
    return Profiler(clock=given_seconds, python=lambda: python).costs(op, shape)


def test_plans_promise_what_python_takes():
    """Of the step, of each region and run, of each op that is run in a region, and of each that is undone."""
    none, some = (with_python(couplings(3), (64, 64), python) for python in (Python(), Python(8, 1, 5, 2, 3, 4)))
    count, last = len(none.ops), len(none.ops) - 1
    calls = {
        tuple(map(Store, range(count))): 0,
        (Recompute(0, tuple(map(Store, range(last)))), Store(last)): 8 + count + 5 + 2 * last,
        (*[Recompute(i, (Store(i),)) for i in range(last)], Store(last)): 8 + count + last * (5 + 2),
        (Invert(0, last), Store(last)): 8 + count + 3 + 4 * last,
        (Invert(0, 3), Invert(3, last), Store(last)): 8 + count + 2 * 3 + 4 * last,
        (Recompute(0, (Recompute(0, (Store(0), Store(1))), Store(2))), *map(Store, range(3, count))): 8
        + count + 2 * 5 + 2 * (3 + 2),
    }  # fmt: skip
    found = {s: predict(some, s).seconds - predict(none, s).seconds for s in calls}
    one = some.ops[1].within / 2
    assert {s: seconds / one for s, seconds in found.items()} == pytest.approx(calls, rel=0.01)
    for schedule in calls:
        plan = Plan(schedule, some)
        assert list(timeline(some, schedule))[-1].seconds == pytest.approx(plan.predicted.seconds)
        extra = sum(row.extra for row in rows(plan)) + some.enter * (calls[schedule] > 0)
        assert 1 + extra / some.seconds == pytest.approx(plan.time)


@pytest.mark.parametrize("share", [0.7, 0.5, 0.35])
def test_the_solver_counts_what_python_takes_as_the_promise_does(share):
    costs = with_python(couplings(), (64, 64), machine.USUAL)
    budget = int(share * peak(costs))
    table = Table(costs, budget, 400)
    assert table.time(budget) == pytest.approx(predict(costs, table.schedule(budget)).seconds, rel=1e-5)


def test_where_python_takes_most_there_are_fewer_regions():
    def silent(*args):  # what is counted stands
        y, found = given_seconds(*args)
        return y, dict.fromkeys(found, 0.0)

    pythons = Python(), machine.USUAL
    many, few = (Profiler(clock=silent, python=partial(Python, *p)).costs(couplings(12), (64, 64)) for p in pythons)
    counts = [
        [sum(not isinstance(node, Store) for node in inv.plan(costs, budget=int(share * peak(costs))).schedule)
         for share in (0.75, 0.5, 0.25)]
        for costs in (few, many)
    ]  # fmt: skip
    assert sum(counts[0]) < sum(counts[1])


# ---- bytes -----------------------------------------------------------------------------------------------------------


class Cached(nn.Module):
    """It makes a table in its first call, and keeps it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.ones(16)
        return self.linear(x) * self.table


BYTES = [
    name
    for name in OpCosts.__dataclass_fields__
    if name not in ("forward", "backward", "inverse", "region", "within", "opens", "ends", "begins", "spares")
    and name not in ("off", "doubt")
]


@pytest.mark.parametrize(
    "kind", ["couple", "affine", "closure", "exp", "flip", "noisy", "lossy", "cached", "recurrent"]
)
def test_two_profiles_of_one_op_agree_on_bytes(kind):
    torch.manual_seed(0)
    made = {"cached": Cached, "recurrent": lambda: Recurrent(16)}.get(kind, lambda: make_op(kind, 16))
    f = inv.chain(*[made() for _ in range(3)])
    a, b = (real_profile(f, (32, 16), repeats=1) for _ in range(2))
    for name in BYTES:
        assert [getattr(op, name) for op in a.ops] == [getattr(op, name) for op in b.ops], name
    assert (a.input_bytes, a.loss_bytes, a.key) == (b.input_bytes, b.loss_bytes, b.key)


class Recurrent(nn.Module):
    """A recurrent layer whose weights lie in one block of memory."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.GRU(width, width)

    def forward(self, x):
        return self.layer(x[None])[0][0]


@pytest.mark.parametrize("shape", [(64, 1, 8, 8), (37, 1, 8, 8)])
def test_a_least_budget_that_was_named_is_accepted(shape):
    f = demo(4, torch.float64)
    with pytest.raises(OptionError, match="is below the least found") as caught:
        inv.plan(f, shape, budget="1kB")
    words = str(caught.value).split("least found ")[1].split(" (")[0], str(caught.value).split("; ")[1].split(" ")[0]
    for budget in (words[0], int(words[1])):
        assert inv.plan(f, shape, budget=budget).peak_bytes <= parse_bytes(budget)
    first = str(inv.plan(f, shape, max_time=1.5)).split("curve    ")[1].split(" ")
    assert inv.plan(f, shape, budget=f"{first[0]} {first[1]}").time >= 1


@pytest.mark.parametrize("seed", range(6))
def test_a_least_budget_of_any_chain_is_accepted(seed):
    """Whatever the seconds are."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kinds = [rng.choice(["couple", "affine", "closure", "exp", "flip", "lossy"]) for _ in range(rng.randint(2, 6))]
    costs = Profiler(clock=busy(seed)).costs(inv.chain(*[make_op(kind, 16) for kind in kinds]), (4, 16))
    bound = int(str(refused(costs)).split("; ")[1].split(" ")[0])
    assert inv.plan(costs, budget=bound).peak_bytes == bound
    others = replace(costs, ops=tuple(shaken(seed, op) for op in costs.ops))
    assert inv.plan(others, budget=bound).peak_bytes <= bound


def test_profiles_with_other_seconds_name_the_same_least_budget():
    found = [Profiler(clock=busy(seed)).costs(couplings(3), (64, 64)) for seed in range(3)]
    found = [Costs(tuple(shaken(seed, op) for op in costs.ops), costs.input_bytes) for seed, costs in enumerate(found)]
    names = {str(refused(costs)).split("; ")[1].split(" ")[0] for costs in found}
    assert len(names) == 1
    assert all(inv.plan(costs, budget=int(*names)).peak_bytes <= int(*names) for costs in found)


def shaken(seed, op):
    """An op of other seconds."""
    factor = random.Random(f"{seed} {op.name}").choice([0.1, 1.0, 10.0])
    names = "forward", "backward", "inverse", "ends", "begins"
    seconds = {name: factor * getattr(op, name) for name in names}
    return replace(op, spares=(0.0, 0.0, 0.0), region=op.region / factor, **seconds)


def refused(costs):
    with pytest.raises(OptionError, match="is below the least found") as caught:
        inv.plan(costs, budget="1kB")
    return caught.value


# ---- what the report says --------------------------------------------------------------------------------------------


def test_the_report_says_how_sure_it_is():
    op = OpCosts("op", 1.0, 2.0, 3.0, bytes=1000, tape=4000, doubt=0.3)
    slow = OpCosts("solve", 1.0, 2.0, 3.0, bytes=1000, tape=4000, off=5.2)
    plan = Plan((Store(0), Recompute(1, (Store(1),)), Store(2)), Costs((op, op, slow), 1000))
    assert "sure     give or take 0.03x; what was timed is" in str(plan)
    assert "but for solve (5.2 times)" in str(plan)
    assert "sure" not in str(Plan((Store(0),), Costs((OpCosts("op", 1.0, 2.0, bytes=10),))))
