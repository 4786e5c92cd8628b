"""Schedules: what a plan does with each op, as a tree; and what a schedule costs, worked out from `Costs`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from ..errors import OptionError
from .costs import EXACT, HELD, KEPT, Costs, Ledger


@dataclass(frozen=True)
class Store:
    """Run op ``first`` (counted from 0) on autograd's tape.

    Example:
        >>> Store(2).stop
        3
    """

    first: int

    @property
    def stop(self) -> int:
        """The op after the last one."""
        return self.first + 1


@dataclass(frozen=True)
class Invert:
    """Keep nothing of ops ``first .. stop - 1`` but the last one's output; rebuild the rest by inverses.

    Example:
        >>> to_data((Store(0), Invert(1, 4)))
        [['store', 0], ['invert', 1, 4]]
    """

    first: int
    stop: int
    keeps: tuple[int, ...] = ()  # ops whose expensive results are kept


@dataclass(frozen=True)
class Recompute:
    """Keep the input of ops ``first .. stop - 1``; in backward run them again, as ``inner`` says.

    Example:
        >>> Recompute(0, (Store(0), Store(1))).stop
        2
    """

    first: int
    inner: Schedule
    keeps: bool = False  # whether its expensive results are kept; of a region of one op

    @property
    def stop(self) -> int:
        """The op after the last one."""
        return self.inner[-1].stop


Node: TypeAlias = "Store | Invert | Recompute"
Schedule: TypeAlias = "tuple[Node, ...]"


class Prediction(NamedTuple):
    """What a schedule is expected to cost; ``binds`` is the op at whose moment the peak occurs."""

    seconds: float
    peak_bytes: int
    error: float | None
    binds: int
    moment: str


class Need(NamedTuple):
    """The least memory of a part of a schedule, and whose it is."""

    bytes: int
    op: int
    moment: str

    def on(self, kept: int) -> Need:
        """The same on top of bytes that are kept meanwhile."""
        return self._replace(bytes=self.bytes + kept)


def predict(costs: Costs, schedule: Schedule) -> Prediction:
    """Time, peak and error of a schedule."""
    ledger = Ledger(costs, keeping(schedule))
    need = _needs(ledger, schedule, 0, ledger.length, HELD).on(ledger.sizes[ledger.length])
    seconds = costs.seconds + extra_seconds(costs, schedule) + seconds_to_enter(costs, schedule)
    return Prediction(seconds, need.bytes, error_of(costs, schedule), need.op, need.moment)


def seconds_to_enter(costs: Costs, schedule: Schedule) -> float:
    """What a step takes beside its ops: nothing where all is stored."""
    return costs.enter if any(not isinstance(node, Store) for node in schedule) else 0.0


def _needs(ledger: Ledger, schedule: Schedule, i: int, j: int, r: int) -> Need:
    if not schedule:
        return Need(ledger.end(j), j - 1, "turn to backward")
    node, rest = schedule[0], schedule[1:]
    if isinstance(node, Store):
        kept, own = ledger.store(i, j, r)
        return max(Need(own, i, "step with its tape"), _needs(ledger, rest, node.stop, j, HELD).on(kept))
    if isinstance(node, Invert):
        kept, own = ledger.invert(i, node.stop, j, r)
        worst = max(range(i, node.stop), key=lambda q: max(ledger.undo(i, q + 1, j, r)))
        return max(Need(own, worst, "inverse"), _needs(ledger, rest, node.stop, j, EXACT).on(kept))
    k = node.stop
    kept = ledger.region(i, k, r) + notes_inside(ledger, node)
    later = _needs(ledger, rest, k, j, ledger.behind(i, k)).on(kept)
    if not ledger.runs_again(i, k):
        return max(later, _needs(ledger.inside(), node.inner, i, k, r))
    own = _needs(ledger.inside(), node.inner, i, k, KEPT).on(kept + ledger.notes(i, k))
    return max(Need(first_pass(ledger, node, j, r), k - 1, "forward"), later, own)


def first_pass(ledger: Ledger, region: Recompute, j: int, r: int) -> int:
    """Needs of a region forward; the gradient that waits is the one of the region around it."""
    i, k = region.first, region.stop
    return (
        ledger.region(i, k, r) + _needs_forward(ledger.inside(), region.inner) + ledger.waits(j, k) - ledger.output(j)
    )


def _needs_forward(ledger: Ledger, schedule: Schedule) -> int:
    """The most that a stretch inside of a region needs forward, beside its input, where no gradient waits."""
    need = kept = 0
    r = KEPT
    for node in schedule:
        i, k = node.first, node.stop
        if isinstance(node, Store):
            own, keeps, r = ledger.tape(i, k, r)[0] - ledger.waits(k, k), ledger.store(i, k, r)[0], HELD
        elif isinstance(node, Invert):
            own = max(ledger.undo(i, p, k, r)[0] for p in range(i + 1, k + 1)) - ledger.waits(k, k)
            keeps, r = ledger.invert(i, k, k, r)[0], EXACT
        else:
            own, keeps = ledger.region(i, k, r) + _needs_forward(ledger, node.inner), ledger.region(i, k, r)
            keeps, r = keeps + notes_inside(ledger, node), ledger.behind(i, k)
        need, kept = max(need, kept + own), kept + keeps
    return need


def notes_inside(ledger: Ledger, region: Recompute) -> int:
    """Bytes that are kept from forward on for what does not store inside of a region: copies of buffers."""
    total = 0
    for node in region.inner:
        if not isinstance(node, Store):
            total += ledger.notes(node.first, node.stop)
        if isinstance(node, Recompute):
            total += notes_inside(ledger, node)
    return total


def extra_seconds(costs: Costs, schedule: Schedule) -> float:
    """What a schedule takes beyond plain training: a sum of what can not be negative (`OpCosts`)."""
    total = 0.0
    for node in schedule:
        ops = costs.ops[node.first : node.stop]
        if isinstance(node, Invert):
            total += sum(op.inverse - op.backward for op in ops) - ops[0].begins + ops[0].opens
            total -= sum(costs.ops[q].spares[2 if q == node.first else 1] for q in node.keeps)
        elif isinstance(node, Recompute):
            again = sum(op.forward + op.within for op in ops) - seconds_behind(costs, node.inner)
            total += ops[0].region + again + extra_seconds(costs, node.inner) - ops[0].spares[0] * node.keeps
    return max(total, 0.0)


def keeping(schedule: Schedule) -> set[int]:
    """The ops whose expensive results a schedule keeps."""
    found = {q for node in schedule if isinstance(node, Invert) for q in node.keeps}
    return found | {node.first for node in schedule if isinstance(node, Recompute) and node.keeps}


def seconds_behind(costs: Costs, inner: Schedule) -> float:
    """What a region does not run again: what comes behind the last tensor that it saves."""
    total = 0.0
    for node in reversed(inner):
        ops = costs.ops[node.first : node.stop]
        if isinstance(node, Store):
            total += ops[0].ends
        elif isinstance(node, Recompute):  # which has saved its input before it ran
            total += sum(op.forward for op in ops)
        if isinstance(node, Invert) or any(op.saves for op in ops):
            break
    return total


def runs(schedule: Schedule) -> Iterator[Invert]:
    """The runs of inverses in a schedule, nested ones included."""
    for node in schedule:
        if isinstance(node, Invert):
            yield node
        elif isinstance(node, Recompute):
            yield from runs(node.inner)


def regions(schedule: Schedule) -> Iterator[Recompute]:
    """The regions in a schedule, nested ones included."""
    for node in schedule:
        if isinstance(node, Recompute):
            yield node
            yield from regions(node.inner)


def error_of(costs: Costs, schedule: Schedule) -> float | None:
    """The gradient error to expect: that of the worst run of inverses; None when it was not profiled."""
    found = [run_error(costs, run.first, run.stop) for run in runs(schedule)]
    return None if None in found else max(found, default=0.0)  # pyright: ignore[reportReturnType, reportArgumentType]


def run_error(costs: Costs, i: int, k: int) -> float | None:
    """The gradient error of undoing ops i+1..k: that of the next longer sweep that was measured."""
    if all(op.exact for op in costs.ops[i:k]):
        return 0.0
    if costs.errors is None:
        return None
    longer = [(stop - first, error) for first, stop, error in costs.errors if first <= i and k <= stop]
    return min(longer)[1] if longer else float("inf")


# ---- fixed schedules -------------------------------------------------------------------------------------------------


def store_all(count: int) -> Schedule:
    """Plain training."""
    return tuple(map(Store, range(count)))


def recompute_every(costs: Costs, size: int) -> Schedule:
    """Checkpointing with one stored input for each ``size`` ops."""
    count = len(costs.ops)
    spans = [range(i, min(i + size, count)) for i in range(0, count, size)]
    able = [math.isfinite(costs.ops[span[0]].region) for span in spans]
    return tuple(
        node
        for span, can in zip(spans, able, strict=True)
        for node in ((Recompute(span[0], tuple(map(Store, span))),) if can else map(Store, span))
    )


def invert_all(costs: Costs) -> Schedule:
    """Inverses wherever there are any; the other ops are run again."""
    found: list[Node] = []
    for i, op in enumerate(costs.ops):
        if op.inverse == float("inf"):
            found.append(Recompute(i, (Store(i),)))
        elif found and isinstance(found[-1], Invert):
            found[-1] = Invert(found[-1].first, i + 1)
        else:
            found.append(Invert(i, i + 1))
    return tuple(found)


def fixed_schedules(costs: Costs) -> dict[str, Schedule]:
    """What people do without a plan."""
    count = len(costs.ops)
    if any(op.alone for op in costs.ops):
        return {"store all": store_all(count), "recompute every 1": recompute_every(costs, 1)}
    found = {"store all": store_all(count), "invert all": invert_all(costs)}
    return found | {f"recompute every {k}": recompute_every(costs, k) for k in (1, 3, 5) if k < max(count, 2)}


def check(costs: Costs, schedule: Schedule) -> None:
    """Raise unless a schedule covers each op once, in order, and inverts only what has an inverse.

    Raises:
        OptionError: When it does not.
    """
    _check_span(schedule, 0, len(costs.ops))
    for run in runs(schedule):
        for i in range(run.first, run.stop):
            if costs.ops[i].inverse == float("inf"):
                raise OptionError(f"a schedule inverts op {i} ({costs.ops[i].name})", expected="an op with an inverse")
    _check_keeps(costs, schedule)
    for region in regions(schedule):
        ops = costs.ops[region.first : region.stop]
        if ops[0].region == float("inf") or (len(ops) > 1 and any(op.alone for op in ops)):
            raise OptionError(
                f"a schedule recomputes ops {region.first} to {region.stop - 1}",
                expected=f"regions that do without {ops[0].name!r}, or of one op",
            )


def _check_keeps(costs: Costs, schedule: Schedule) -> None:
    for node in schedule:
        kept = node.keeps if isinstance(node, Invert) else (node.first,) * (isinstance(node, Recompute) and node.keeps)
        for q in kept:
            if not (node.first <= q < node.stop and costs.ops[q].keep) or (
                isinstance(node, Recompute) and node.inner != (Store(q),)
            ):
                raise OptionError(
                    f"a schedule keeps results of op {q} ({costs.ops[q].name})",
                    expected="an op of a run of inverses, or of a region of its own, that has results to keep",
                )
    if any(keeping(region.inner) for region in regions(schedule)):
        raise OptionError("a schedule keeps results inside of a region", expected="those of ops that are in none")


def _check_span(schedule: Sequence[Node], first: int, stop: int) -> None:
    at = first
    for node in schedule:
        if node.first != at or node.stop <= node.first:
            raise OptionError(f"a schedule goes on with op {node.first}", expected=f"op {at}")
        if isinstance(node, Recompute):
            _check_span(node.inner, node.first, node.stop)
        at = node.stop
    if at != stop:
        raise OptionError(f"a schedule ends before op {at}", expected=f"{stop} ops")


# ---- as data ---------------------------------------------------------------------------------------------------------


def to_data(schedule: Schedule) -> list[Any]:
    """A schedule as nested lists: ``["store", i]``, ``["invert", i, k]``, ``["recompute", i, [...]]``.

    Where results are kept, the last two say so: ``["invert", i, k, [q, ...]]``, ``["recompute", i, [...], True]``.

    Example:
        >>> to_data((Recompute(0, (Store(0), Store(1))), Invert(2, 5)))
        [['recompute', 0, [['store', 0], ['store', 1]]], ['invert', 2, 5]]
    """
    return [
        ["store", n.first] if isinstance(n, Store)
        else ["invert", n.first, n.stop, *[list(n.keeps)] * bool(n.keeps)] if isinstance(n, Invert)
        else ["recompute", n.first, to_data(n.inner), *[True] * n.keeps]
        for n in schedule
    ]  # fmt: skip


def from_data(data: Any) -> Schedule:
    """The schedule that `to_data` has written.

    Raises:
        OptionError: When the lists are not those of a schedule.
    """
    kinds = {
        "store": Store,
        "invert": lambda first, stop, keeps=(): Invert(first, stop, tuple(keeps)),
        "recompute": lambda first, inner, keeps=False: Recompute(first, from_data(inner), keeps),
    }
    try:
        return tuple(kinds[kind](*rest) for kind, *rest in data)
    except (TypeError, KeyError, ValueError) as error:
        raise OptionError("this is not a schedule", expected="what Plan.to_json wrote", got=str(error)) from error
