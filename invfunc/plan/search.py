"""Searching: which schedule keeps to the limits. Each objective reads the solver's tables, and predicts to the byte."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import NamedTuple

from ..errors import OptionError
from .costs import Costs, show_bytes
from .keeping import KINDS
from .schedule import Invert, Prediction, Schedule, keeping, predict, store_all
from .solver import Table

POINTS = 16  # of a curve, from each table
LOWEST = 20  # budgets of a table, among which the least peak is looked for
SHORT, FINE = 32, 30_000  # of chains of so many ops it is looked for longer: ops times units of the last table


class Point(NamedTuple):
    """A point of a plan's curve: the least time (over a plain step) in a peak."""

    peak_bytes: int
    time: float


@dataclass(frozen=True)
class Limits:
    """What a plan was asked to keep to."""

    budget: int | None = None
    max_time: float | None = None
    max_error: float | None = None


def best(costs: Costs, limits: Limits) -> Schedule:
    """The schedule of least time in a budget, of least memory in a time, or of least error in both."""
    if not costs.ops:
        raise OptionError("plan: the chain has no ops", expected="one or more")
    if limits.max_time is None:
        assert limits.budget is not None
        return fastest(costs, limits.budget, limits.max_error)
    if limits.budget is None:
        return smallest(costs, limits.max_time, limits.max_error)
    return most_exact(costs, limits.budget, limits.max_time)


def fastest(costs: Costs, budget: int, max_error: float | None = None) -> Schedule:
    """The fastest schedule whose peak, to the byte, fits: units round up, so that one for a little more may fit too."""
    fitting = [
        s for some in with_fewer_results(costs) for s in _fitting(costs, table_for(some, budget, max_error), budget)
    ]
    if not fitting:
        lean = least(costs, max_error), _leanest(costs, max_error)
        fitting = [schedule for schedule in lean if predict(costs, schedule).peak_bytes <= budget]
        if not fitting:
            raise _below_least(costs, budget, max_error, lean[0])
    return min(fitting, key=lambda schedule: predict(costs, schedule).seconds)


def _fitting(costs: Costs, table: Table, budget: int) -> Iterator[Schedule]:
    """The fastest schedule of a table that fits, if one does."""
    falls = table.budgets()
    count = bisect_left(falls, True, key=lambda at: predict(costs, table.schedule(at)).peak_bytes > budget)
    if count:
        yield with_results(costs, table.schedule(falls[count - 1]), budget)


def with_fewer_results(costs: Costs) -> Iterator[Costs]:
    """The costs where all results may be kept, and where only those may that spare most for a byte."""
    kinds = [kind for kind in KINDS if any(op.keep == kind for op in costs.ops)]
    yield costs
    for count in range(len(kinds) - 1, 0, -1):
        ops = (
            op if op.keep in kinds[:count] else replace(op, keep="", kept=0, spares=(0.0, 0.0, 0.0)) for op in costs.ops
        )
        yield replace(costs, ops=tuple(ops))


def with_results(costs: Costs, schedule: Schedule, budget: int) -> Schedule:
    """The same, with more results of single ops as far as the budget goes: first those that spare most for a byte."""
    inverted = (q for run in schedule if isinstance(run, Invert) for q in range(run.first, run.stop))
    able = [q for q in inverted if costs.ops[q].spares[2] and q not in keeping(schedule)]
    able.sort(key=lambda q: -costs.ops[q].spares[1] / max(costs.ops[q].kept, 1))
    more = [_keeping_more(schedule, able[:count]) for count in range(len(able) + 1)]
    count = bisect_left(more, True, key=lambda found: predict(costs, found).peak_bytes > budget)
    return more[max(count - 1, 0)]


def _keeping_more(schedule: Schedule, ops: Sequence[int]) -> Schedule:
    def changed(run: Invert) -> Invert:
        return replace(run, keeps=tuple(sorted({*run.keeps, *(q for q in ops if run.first <= q < run.stop)})))

    return tuple(changed(node) if isinstance(node, Invert) else node for node in schedule)


def smallest(costs: Costs, max_time: float, max_error: float | None = None) -> Schedule:
    """The schedule of least peak in a time: found roughly over the whole range, then finely below that."""
    if max_time < 1:
        raise OptionError(
            f"plan: max_time is {max_time}", expected="1.0 or more: nothing is faster than plain training"
        )
    limit, found = max_time * costs.seconds * (1 + 1e-6), _peak_first(costs, store_all(len(costs.ops)))
    for _ in range(2):
        table = table_for(costs, found[0], max_error)
        at = next(budget for budget in table.budgets() if table.time(budget) <= limit)
        found = min(found, _peak_first(costs, table.schedule(at)), key=itemgetter(0))
    return found[1]


def most_exact(costs: Costs, budget: int, max_time: float) -> Schedule:
    """The schedule of least error in a budget and a time: by bisection."""
    if costs.errors is None:
        raise OptionError("plan: the costs say nothing of errors", cure="invfunc.plan.profile(f, x, errors=True)")
    limit, found = max_time * costs.seconds * (1 + 1e-6), fastest(costs, budget)
    if predict(costs, found).seconds > limit:
        time = _over_plain(costs, predict(costs, found))
        raise OptionError(f"plan: max_time is {max_time:g} in {show_bytes(budget)}", expected=f"{time:.3g} or more")
    levels = [0.0, *sorted({error for _, _, error in costs.errors if math.isfinite(error)})]
    while levels:
        middle = (len(levels) - 1) // 2
        schedule = _in_time(costs, budget, levels[middle], limit)
        found, levels = (found, levels[middle + 1 :]) if schedule is None else (schedule, levels[:middle])
    return found


def _in_time(costs: Costs, budget: int, max_error: float, limit: float) -> Schedule | None:
    """The fastest schedule, if it is fast enough."""
    try:
        found = fastest(costs, budget, max_error)
    except OptionError:
        return None
    return found if predict(costs, found).seconds <= limit else None


def least(costs: Costs, max_error: float | None = None) -> Schedule:
    """A schedule of the least peak that is found. Seconds do not decide what that is: two profiles name the same.

    What ops share is counted twice in a table (rule 8 of NOTE [Plan]), so that its least need may not be the least of
    all: where all ops take as long, it has other schedules above that, and some need less.
    """
    ways = [costs.without_seconds(), *[costs.with_like_seconds()] * (len(costs.ops) <= SHORT)]
    found = (_leanest(some, max_error) for some in ways)
    return min(found, key=lambda schedule: predict(costs, schedule).peak_bytes)


def _leanest(costs: Costs, max_error: float | None) -> Schedule:
    """The schedule of least peak: tables know the least needs but roughly, so that a few budgets count."""
    best = min((_lowest(costs, table) for table in tables(costs, max_error)), key=itemgetter(0))
    while (finer := _lowest(costs, table_for(costs, best[0], max_error)))[0] < best[0]:
        best = finer
    if len(costs.ops) <= SHORT:
        table = Table(costs, 1.02 * best[0], FINE // len(costs.ops), max_error)
        best = min(best, _lowest(costs, table), key=itemgetter(0))
    return best[1]


def _lowest(costs: Costs, table: Table) -> tuple[int, Schedule]:
    return min((_peak_first(costs, table.schedule(at)) for at in table.budgets()[:LOWEST]), key=itemgetter(0))


def curve_of(costs: Costs, max_error: float | None = None) -> tuple[Point, ...]:
    """Least time against peak, each to the byte."""
    points: list[Point] = []
    for table in tables(costs, max_error):
        falls = table.budgets()
        for at in dict.fromkeys(falls[round(i * (len(falls) - 1) / (POINTS - 1))] for i in range(POINTS)):
            points.append(_point(costs, table.schedule(at)))
    points.append(_point(costs, store_all(len(costs.ops))))
    found: list[Point] = []
    for point in sorted(points):
        if not found or point.time < found[-1].time - 1e-9:
            found.append(point)
    return tuple(found)


def tables(costs: Costs, max_error: float | None = None) -> Iterator[Table]:
    """A table of the whole range of memory, and finer ones of its lower end."""
    top = predict(costs, store_all(len(costs.ops))).peak_bytes
    yield (table := table_for(costs, top, max_error))
    low = predict(costs, table.schedule(table.budgets()[0])).peak_bytes
    for budget in (3 * low, low):
        if budget < top:
            yield table_for(costs, budget, max_error)


def table_for(costs: Costs, budget: float, max_error: float | None = None) -> Table:
    """The table of every memory up to a budget and a little above; coarser for long chains, to be solved soon.

    But not much coarser than an op: where a unit is larger than what one keeps, rounding up loses much of the budget.
    """
    count = max(len(costs.ops), 1)
    return Table(costs, 1.1 * budget, min(max(16_000 // count, 200, min(6 * count // 5, 320)), 500), max_error)


def _point(costs: Costs, schedule: Schedule) -> Point:
    found = predict(costs, schedule)
    return Point(found.peak_bytes, _over_plain(costs, found))


def _over_plain(costs: Costs, found: Prediction) -> float:
    return found.seconds / costs.seconds if costs.seconds else 1.0


def _peak_first(costs: Costs, schedule: Schedule) -> tuple[int, Schedule]:
    return predict(costs, schedule).peak_bytes, schedule


def _below_least(costs: Costs, budget: int, max_error: float | None, schedule: Schedule) -> OptionError:
    found = predict(costs, schedule)
    fast = predict(costs, fastest(costs, found.peak_bytes, max_error))
    op, limited = costs.ops[found.binds], "" if max_error is None else f" with gradient errors of {max_error:.2g}"
    return OptionError(
        f"budget {show_bytes(budget)} is below the least found {show_bytes(found.peak_bytes, math.ceil)}{limited}"
        f" (op {found.binds} {op.name!r}: {found.moment})",
        cure=f"{found.peak_bytes} bytes cost {_over_plain(costs, fast):.3g}x the time",
    )
