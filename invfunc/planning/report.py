"""What a plan tells its reader: the verdict, the table, the curve, and two pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import OptionError
from .costs import HELD, Costs, Ledger, show_bytes
from .schedule import Invert, Recompute, Schedule, Store, predict

if TYPE_CHECKING:
    from .value import Plan, Point


def text(plan: Plan) -> str:
    """The verdict first, then the table, the curve, what binds, and how fixed strategies do."""
    return "\n".join([_verdict(plan), *_table(plan), _curve(plan), _binds(plan), _compared(plan), _truth(plan)])


def _verdict(plan: Plan) -> str:
    plain = plan.fixed()["store all"].peak_bytes
    return (
        f"plan: {plan.time:.2f}x time, {show_bytes(plan.peak_bytes)} of {show_bytes(plain)}, {_precision(plan)}"
        f"      objective: {_objective(plan)}"
    )


def _precision(plan: Plan) -> str:
    if plan.error is None:
        return "gradient error not profiled"
    if plan.error > 0:
        return f"gradient error about {plan.error:.1e}"
    inverted = any("invert" in row.mode for row in rows(plan))
    return "exact gradients" + " (only bit-exact ops are inverted)" * inverted


def _objective(plan: Plan) -> str:
    limits = plan.limits
    goal = "time" if limits.max_time is None else "memory" if limits.budget is None else "error"
    under = [show_bytes(limits.budget)] if limits.budget else []
    under += [f"{limits.max_time:g}x time"] if limits.max_time else []
    under += [f"error {limits.max_error:g}"] if limits.max_error is not None else []
    return f"{goal} under {' and '.join(under)}" if under else "a schedule of your own"


# ---- the table -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What happens to one op."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    op: str
    mode: str
    keeps: int
    extra: float
    why: str


def rows(plan: Plan) -> list[Row]:
    """One row for each op."""
    return list(_rows(plan.costs, Ledger(plan.costs), plan.schedule, 0, len(plan.costs.ops), HELD))


def _rows(costs: Costs, ledger: Ledger, schedule: Schedule, depth: int, j: int, r: int) -> Iterator[Row]:
    for node in schedule:
        i = node.first
        if isinstance(node, Recompute):
            inner = _rows(costs, ledger, node.inner, depth + 1, node.stop, r)
            kept = ledger.in_hand(i, r)
            for row in inner:
                yield row._replace(keeps=kept if row.index == i and depth == 0 else row.keeps * (depth > 0))
            r = 0
        elif isinstance(node, Store):
            yield _stored(costs, i, depth, ledger.store(i, j, r)[0])
            r = HELD
        else:
            for q in range(i, node.stop):
                yield _inverted(costs, q, depth, ledger.a[q + 1] * (q + 1 == node.stop < ledger.L))
            r = 1


def _stored(costs: Costs, i: int, depth: int, kept: int) -> Row:
    op = costs.ops[i]
    if depth == 0:
        return Row(i, op.name, "store", kept, 0.0, "")
    dearer = op.inverse - op.backward
    why = "has no inverse" if math.isinf(op.inverse) else f"inverse would be {_milliseconds(dearer)}"
    return Row(i, op.name, "recompute" + f" x{depth}" * (depth > 1), kept, depth * op.forward, why)


def _inverted(costs: Costs, i: int, depth: int, kept: int) -> Row:
    op = costs.ops[i]
    extra = depth * op.forward + op.inverse - op.backward
    return Row(i, op.name, "recompute, invert" if depth else "invert", kept, extra, "exact" if op.exact else "")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:+.3g} ms"


def _table(plan: Plan) -> list[str]:
    """The rows, equal neighbours folded."""
    folded: list[tuple[int, Row]] = []
    for row in rows(plan):
        if folded and _shown(folded[-1][1]) == _shown(row):
            folded[-1] = row.index, folded[-1][1]
        else:
            folded.append((row.index, row))
    cells = [("#", "op", "mode", "keeps", "extra", "why")]
    cells += [(f"{row.index}-{last}" if last > row.index else f"{last}", *_shown(row)) for last, row in folded]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return [f"  {line}".rstrip() for line in lines]


def _shown(row: Row) -> tuple[str, ...]:
    keeps = show_bytes(row.keeps) if row.keeps else "0"
    return row.op, row.mode, keeps, _milliseconds(row.extra) if row.extra else "0", row.why


# ---- the curve, and what to compare with -----------------------------------------------------------------------------


def _curve(plan: Plan) -> str:
    points = plan.curve
    chosen = [points[round(i * (len(points) - 1) / 6)] for i in range(7)] if len(points) > 7 else list(points)
    return "curve    " + " | ".join(f"{show_bytes(p.peak_bytes)} {p.time:.2f}x" for p in dict.fromkeys(chosen))


def _binds(plan: Plan) -> str:
    found = plan.predicted
    return f"binds    op {found.binds} {plan.costs.ops[found.binds].name}: {found.moment}"


def _compared(plan: Plan) -> str:
    shown = [
        f"{name} {p.seconds / (plan.costs.seconds or 1):.2f}x {show_bytes(p.peak_bytes)}"
        for name, p in plan.fixed().items()
    ]
    return "compare  " + " | ".join(shown)


def _truth(plan: Plan) -> str:
    if all(math.isinf(op.inverse) for op in plan.costs.ops):
        return "truth    no op has an inverse: this is optimal recomputation"
    bound = inversion_pays_below(plan.costs, plan.curve)
    if bound is None:
        return "truth    inversion does not pay: recompute is as small and not slower in every budget"
    return f"truth    recompute is as small and not slower above {show_bytes(bound)}; below, inversion pays"


def inversion_pays_below(costs: Costs, curve: tuple[Point, ...]) -> int | None:
    """The peak from which on recomputation alone is as fast, within 1 %; None if it always is."""
    from .value import curve_of

    alone = curve_of(replace(costs, ops=tuple(replace(op, inverse=math.inf) for op in costs.ops)))
    dearer = [p.peak_bytes for p in curve if _time_at(alone, p.peak_bytes) > 1.01 * p.time]
    if not dearer:
        return None
    above = [p.peak_bytes for p in (*curve, *alone) if p.peak_bytes > max(dearer)]
    return min(above, default=max(dearer))


def _time_at(curve: tuple[Point, ...], peak: int) -> float:
    return min((p.time for p in curve if p.peak_bytes <= peak), default=math.inf)


# ---- pictures --------------------------------------------------------------------------------------------------------


def plot(plan: Plan, figure: Any = None) -> Any:
    """Left, time against peak with the fixed strategies; right, memory over the step, stacked by op."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("plan.plot needs matplotlib", cure="pip install matplotlib") from error
    figure = Figure(figsize=(11, 4), layout="constrained") if figure is None else figure
    left, right = figure.subplots(1, 2)
    _draw_curve(plan, left)
    _draw_memory(plan, right)
    return figure


def _draw_curve(plan: Plan, axes: Any) -> None:
    mib, top = 2**20, 3.0 * max(plan.time, 1.0)
    axes.step([p.peak_bytes / mib for p in plan.curve], [p.time for p in plan.curve], where="post", label="plans")
    for name, p in plan.fixed().items():
        axes.plot(p.peak_bytes / mib, p.seconds / plan.costs.seconds, "o", label=name)
    axes.plot(plan.peak_bytes / mib, plan.time, "k*", markersize=12, label="this plan")
    axes.set(xlabel="peak, MiB", ylabel="time over plain", ylim=(0.95, top))
    axes.legend()


def _draw_memory(plan: Plan, axes: Any) -> None:
    moments = list(timeline(plan.costs, plan.schedule))
    times = [t * 1e3 for t, _ in moments]
    stacks = [[kept.get(i, 0) / 2**20 for _, kept in moments] for i in range(len(plan.costs.ops))]
    axes.stackplot(times, stacks, step="post")
    axes.axhline((plan.limits.budget or plan.peak_bytes) / 2**20, color="k", linestyle="--", label="budget")
    axes.set(xlabel="ms of a step", ylabel="kept, MiB")
    axes.legend()


def timeline(costs: Costs, schedule: Schedule) -> Iterator[tuple[float, dict[int, int]]]:
    """``(seconds, bytes kept by each op)`` at every change during a step."""
    yield 0.0, {}
    yield from ((now, dict(kept)) for now, kept in _Clock(costs).run(schedule, 0.0, {}, len(costs.ops), HELD))


class _Clock:
    """Walks through a schedule as a step does: forward over its nodes, then back."""

    def __init__(self, costs: Costs) -> None:
        self.ops, self.ledger = costs.ops, Ledger(costs)

    def run(
        self, schedule: Schedule, now: float, kept: dict[int, int], j: int, r: int
    ) -> Iterator[tuple[float, dict[int, int]]]:
        done: list[tuple[Any, dict[int, int], int]] = []
        for node in schedule:
            before, demand, i = dict(kept), r, node.first
            if isinstance(node, Store):
                kept[i], r = kept.get(i, 0) + self.ledger.store(i, j, r)[0], HELD
            elif isinstance(node, Recompute):
                kept[i], r = kept.get(i, 0) + self.ledger.in_hand(i, r), 0
            else:
                last = node.stop - 1
                kept[last], r = kept.get(last, 0) + self.ledger.a[node.stop] * (node.stop < self.ledger.L), 1
            now += sum(op.forward for op in self.ops[i : node.stop])
            done.append((node, before, demand))
            yield now, kept
        for node, before, demand in reversed(done):
            ops = self.ops[node.first : node.stop]
            if isinstance(node, Recompute):
                for moment, inner in self.run(node.inner, now, dict(before), node.stop, demand):
                    now = moment
                    yield now, inner
            else:
                now += sum(op.inverse if isinstance(node, Invert) else op.backward for op in ops)
            yield now, before


__all__ = ["plot", "predict", "text"]
