"""What a plan tells its reader: the verdict, the table, the curve, and two pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import OptionError
from .costs import EXACT, HELD, KEPT, Costs, Ledger, OpCosts, show_bytes
from .schedule import (
    Invert,
    Recompute,
    Schedule,
    Store,
    first_pass,
    keeping,
    notes_inside,
    seconds_behind,
    seconds_to_enter,
)
from .search import tables
from .solver import Table

if TYPE_CHECKING:
    from .value import Plan


def text(plan: Plan) -> str:
    """The verdict first, then the table, the curve, what binds, and how fixed strategies do."""
    lines = [_verdict(plan), *_table(plan), _curve(plan), _binds(plan), _compared(plan), _truth(plan)]
    return "\n".join(filter(None, [*lines, _sure(plan), _timing(plan)]))


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
    """One row for each op; what they take beyond plain training adds up to what the plan does."""
    ledger = Ledger(plan.costs, keeping(plan.schedule))
    return list(_rows(plan.costs, ledger, plan.schedule, 0, len(plan.costs.ops), HELD))


def _rows(costs: Costs, ledger: Ledger, schedule: Schedule, depth: int, j: int, r: int) -> Iterator[Row]:
    for node in schedule:
        i = node.first
        if isinstance(node, Recompute):
            inner = [
                row._replace(keeps=0)  # what it keeps, it keeps in backward alone
                for row in _rows(costs, ledger, node.inner, depth + 1, node.stop, KEPT)
            ]
            kept = ledger.region(i, node.stop, r) + notes_inside(ledger, node)
            inner[-1] = inner[-1]._replace(extra=inner[-1].extra - seconds_behind(costs, node.inner))
            inner[0] = inner[0]._replace(keeps=kept * (depth == 0), extra=inner[0].extra + costs.ops[i].region)
            if node.keeps:
                inner[0] = _with_results(inner[0], costs.ops[i], 0)
            yield from inner
            r = ledger.behind(i, node.stop)
        elif isinstance(node, Store):
            yield _stored(costs, i, depth, ledger.store(i, j, r)[0])
            r = HELD
        else:
            for q in range(i, node.stop):
                row = _inverted(costs, q, depth, ledger.sizes[q + 1] * (q + 1 == node.stop < ledger.length))
                row = row._replace(extra=row.extra + (costs.ops[q].opens - costs.ops[q].begins) * (q == i))
                yield _with_results(row, costs.ops[q], 2 if q == i else 1) if q in node.keeps else row
            r = EXACT


def _with_results(row: Row, op: OpCosts, way: int) -> Row:
    """The row of an op whose expensive results are kept."""
    return row._replace(
        mode=f"{row.mode}, {op.keep} kept", keeps=row.keeps + op.kept * (way > 0), extra=row.extra - op.spares[way]
    )


def _stored(costs: Costs, i: int, depth: int, kept: int) -> Row:
    op = costs.ops[i]
    if depth == 0:
        return Row(i, op.name, "store", kept, 0.0, "")
    return Row(
        i, op.name, "recompute" + f" x{depth}" * (depth > 1), kept, depth * (op.forward + op.within), _why_again(op)
    )


def _why_again(op: OpCosts) -> str:
    dearer = op.inverse - op.backward - op.forward - op.within
    if math.isinf(op.inverse):
        return "has no inverse"
    return f"inverse would be {_milliseconds(dearer)}" if dearer > 0 else "an inverse would need its exact output"


def _inverted(costs: Costs, i: int, depth: int, kept: int) -> Row:
    op = costs.ops[i]
    mode = "recompute, invert" if depth else "invert"
    extra = depth * (op.forward + op.within) + op.inverse - op.backward
    saved = "its input is not kept" if op.inverse > op.forward + op.backward else "cheaper than to run it again"
    return Row(i, op.name, mode, kept, extra, "bit-exact" if op.exact else saved)


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
    shown = (f"{show_bytes(p.peak_bytes, math.ceil)} {p.time:.2f}x" for p in dict.fromkeys(chosen))
    return "curve    " + " | ".join(shown)


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
    bound = inversion_pays_below(plan.costs, plan.limits.max_error)
    if bound is None:
        return "truth    inversion does not pay: recompute is as small and not slower in every budget"
    return f"truth    recompute is as small and not slower above {show_bytes(bound)}; below, inversion pays"


def inversion_pays_below(costs: Costs, max_error: float | None = None) -> float | None:
    """The budget from which on recomputation alone is as fast, within 1 %; None if it always is."""
    alone = replace(costs, ops=tuple(replace(op, inverse=math.inf) for op in costs.ops))
    for table in tables(costs, max_error):
        other = Table(alone, table.budget, table.M)
        dearer = [at for at in table.every() if other.time(at) > 1.01 * table.time(at)]
        if dearer:
            return dearer[-1] + table.unit
    return None


def _sure(plan: Plan) -> str:
    """How far the promise is from what was timed, op by op; nothing where nothing was timed."""
    ops, again = plan.costs.ops, [row.index for row in rows(plan) if row.mode != "store"]
    if not any(op.doubt for op in ops):
        return ""
    doubt = sum(ops[i].doubt for i in again) / plan.costs.seconds
    contradicted = [f"{name} ({off:.2g} times)" for name, off in {op.name: op.off for op in ops if op.off != 1}.items()]
    but = f", but for {', '.join(contradicted)}" if contradicted else ""
    return f"sure     give or take {doubt:.2f}x; what was timed is what flops and bytes say, within a factor of 3{but}"


def _timing(plan: Plan) -> str:
    if plan.costs.scaled == 1:
        return ""
    return f"timing   on a batch {plan.costs.scaled:.3g} times smaller, which fitted into memory, and scaled"


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
    mib, points = 2**20, plan.curve
    axes.step([p.peak_bytes / mib for p in points], [p.time for p in points], where="post", label="plans")
    fixed = {name: (p.peak_bytes / mib, p.seconds / (plan.costs.seconds or 1)) for name, p in plan.fixed().items()}
    for name, place in fixed.items():
        axes.plot(*place, "o", label=name)
    axes.plot(plan.peak_bytes / mib, plan.time, "k*", markersize=12, label="this plan")
    top = max(points[0].time, *(time for _, time in fixed.values()))
    axes.set(xlabel="peak, MiB", ylabel="time over plain", xlim=(0, None), ylim=(0.95, min(top, 4 * plan.time) * 1.05))
    axes.legend()


def _draw_memory(plan: Plan, axes: Any) -> None:
    mib, count = 2**20, len(plan.costs.ops)
    moments = list(timeline(plan.costs, plan.schedule))
    layers = [[moment.kept.get(i, 0) / mib for moment in moments] for i in range(count)]
    layers.append([moment.working / mib for moment in moments])
    shades = [(0.1, 0.25 + 0.6 * i / count, 0.75 - 0.3 * i / count) for i in range(count)]
    labels = ["kept by the first op", *[None] * (count - 2), "kept by the last op"][-count:]
    milliseconds = [moment.seconds * 1e3 for moment in moments]
    axes.stackplot(milliseconds, layers, step="post", colors=[*shades, "0.85"], labels=[*labels, "at work"])
    budget = (plan.limits.budget or plan.peak_bytes) / mib
    axes.axhline(budget, color="k", linestyle="--", label="budget")
    axes.set(xlabel="ms of a step", ylabel="MiB", xlim=(0, None), ylim=(0, 1.3 * budget))
    axes.legend(loc="upper center", ncols=2)


class Moment(NamedTuple):
    """From when on which ops keep how much, and what is needed beside that."""

    seconds: float
    kept: dict[int, int]
    working: int


def timeline(costs: Costs, schedule: Schedule) -> Iterator[Moment]:
    """The memory over a step: its highest point is the peak of the plan."""
    ledger = Ledger(costs, keeping(schedule))
    clock = _Clock(costs, ledger.sizes[ledger.length])
    clock.now += seconds_to_enter(costs, schedule)
    yield from clock.run(ledger, schedule, {}, ledger.length, HELD)
    yield Moment(clock.now, {}, clock.aside)


class _Clock:
    """Walks through a schedule as a step does: forward over its nodes, then back."""

    def __init__(self, costs: Costs, aside: int) -> None:
        self.costs, self.ops, self.now, self.aside = costs, costs.ops, 0.0, aside

    def run(
        self, ledger: Ledger, schedule: Schedule, kept: dict[int, int], j: int, r: int, behind: float = 0.0
    ) -> Iterator[Moment]:
        back: list[Iterator[Moment]] = []
        for node in schedule:
            i, k, demand = node.first, node.stop, r
            if isinstance(node, Store):
                keeps, need, r = ledger.store(i, j, r)[0], ledger.tape(i, j, r)[0], HELD
                back.append(self._by_tape(ledger, node, kept, j, demand))
            elif isinstance(node, Invert):
                keeps, need = ledger.invert(i, k, j, r)[0], max(ledger.undo(i, p, j, r)[0] for p in range(i + 1, k + 1))
                back.append(self._by_inverse(ledger, node, kept, j, demand))
                r = EXACT
            else:
                keeps, need = ledger.region(i, k, r) + notes_inside(ledger, node), first_pass(ledger, node, j, r)
                r = ledger.behind(i, k)
                back.append(self._again(ledger, node, kept | {i: kept.get(i, 0) + keeps}, demand))
            yield self._moment(kept, need)
            self.now += sum(op.forward + op.within * (ledger.length > len(self.ops)) for op in self.ops[i:k])
            kept = kept | {i: kept.get(i, 0) + keeps}
        self.now -= behind
        yield self._moment(kept, ledger.end(j))
        for moments in reversed(back):
            yield from moments

    def _moment(self, kept: dict[int, int], need: int) -> Moment:
        return Moment(self.now, kept, need + self.aside)

    def _by_tape(self, ledger: Ledger, node: Store, kept: dict[int, int], j: int, r: int) -> Iterator[Moment]:
        yield self._moment(kept, ledger.tape(node.first, j, r)[1])
        self.now += self.ops[node.first].backward

    def _by_inverse(self, ledger: Ledger, node: Invert, kept: dict[int, int], j: int, r: int) -> Iterator[Moment]:
        for p in range(node.stop, node.first, -1):
            yield self._moment(kept, ledger.undo(node.first, p, j, r)[1])
            is_first, op = p == node.first + 1, self.ops[p - 1]
            self.now += op.inverse + (op.opens - op.begins) * is_first - op.spares[1 + is_first] * (p - 1 in node.keeps)

    def _again(self, ledger: Ledger, node: Recompute, kept: dict[int, int], r: int) -> Iterator[Moment]:
        i, k = node.first, node.stop
        runs_again = ledger.runs_again(i, k)
        notes = ledger.notes(i, k) if runs_again else 0
        self.aside += notes
        self.now += self.ops[i].region - self.ops[i].spares[0] * node.keeps
        behind = seconds_behind(self.costs, node.inner)
        yield from self.run(ledger.inside(), node.inner, kept, k, KEPT if runs_again else r, behind)
        self.aside -= notes


__all__ = ["plot", "text"]
