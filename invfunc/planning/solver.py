r"""The solver: a dynamic program over stretches of a chain and memory.

NOTE [Plan] The fastest schedule of a chain ``x[0] -> x[1] -> ... -> x[L]`` in every amount of memory, at once.

``V_r(i, j, m)`` is the least time to run ops i+1..j forward and backward with m bytes left, x[i] in hand, and p = i+1.

1.  *Demands.* r says what has to be known of x[i] when the stretch has been dealt with: ``free``, nothing; ``exact``,
    its very bits, since an inverse ended there; ``held``, nothing either, but somebody pays for it: the caller for
    x[0], the tape of the op before for what it has saved. (A fourth one, "a reconstruction will do", never arises on
    its own: an op whose output may be a reconstruction is undone by an inverse too, in the same run.)
2.  *The end.* ``V_r(j, j, m) = 0``; at the chain's end only if m holds what the loss needs.
3.  *Store* op p, the tape kept from now on::

        u_p + b_p + V_held(p, j, m - tape)

4.  *Recompute* ops i+1..k, x[i] kept; when the rest is done the same problem begins again from x[i]::

        U(i, k) + V_free(k, j, m - a_i) + V_r(i, k, m - g_k)

5.  *Invert* ops i+1..k, only x[k] kept, and that exactly; not where x[i] itself is wanted exactly::

        U(i, k) + C(i, k) + V_exact(k, j, m - residues)

6.  Each choice also needs memory for its own moments (`Ledger`); where m is less, it is infinite.
7.  *Objectives.* One table answers all: least time in a budget is ``V_held(0, L, budget)``, least memory in a time is
    the smallest m with ``V_held(0, L, m) <= time``, and a limit on errors makes C infinite for runs above it.

*Why it is optimal* among schedules that keep a stored value until its op's backward, use an inverse only fused with a
backward, and let bytes add up: op p is back-propagated once. Either its tape was made in the first pass, and lives
through the stretch (3); or later, from a kept x[i]: let k be the first boundary after i where the first pass kept
anything (4); or from a rebuilt x[i]: take the longest run of inverses (5). The parts touch only through m and r, so
each may be replaced by its optimum. ``O(L^3 M)`` time, ``O(L^2 M)`` memory for M units of memory; bytes round up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .costs import EXACT, FREE, HELD, Costs, Ledger
from .schedule import Invert, Node, Recompute, Schedule, Store, run_error


class Table:
    """The solved program: ``time(m)`` and ``schedule(m)`` for every memory up to a budget.

    Args:
        costs: The chain.
        budget: The most memory that is looked at, in bytes, the chain's output included.
        units: In how many steps.
        max_error: The largest gradient error of a run of inverses.
    """

    def __init__(self, costs: Costs, budget: float, units: int, max_error: float | None = None) -> None:
        self.costs, self.ledger, self.limit = costs, Ledger(costs), max_error
        self.L, self.unit = self.ledger.L, unit_for(self.ledger, budget, units)
        self.M = int(budget / self.unit + 1e-9)
        # Column m is for m units left. `V` is by the stretch's end: V[j][r][i]. `again` is rule 4's first and third
        # term, by the stretch's start, so that the sum over k is one addition: again[i][r][k]; `at_top`, where j is L.
        shape = (self.L + 1, 3, self.L + 1, self.M + 1)
        self.V, self.again, self.at_top = (torch.full(shape, math.inf) for _ in range(3))
        self._starts = [Start(self, i) for i in range(self.L)]
        self._same = [FREE if i == self.L or HELD not in self._starts[i].demands else HELD for i in range(self.L + 1)]
        for j in range(self.L + 1):
            self.V[j, :, j, self.units(self.ledger.end(j)) :] = 0
            for i in reversed(range(j)):
                self._solve(i, j)

    def time(self, budget: float) -> float:
        """The least seconds of a step in ``budget`` bytes."""
        m = self._left(budget)
        return self._value(HELD, 0, self.L, m)

    def schedule(self, budget: float) -> Schedule:
        """The schedule that takes them."""
        return self._traced(HELD, 0, self.L, self._left(budget))

    def budgets(self) -> list[float]:
        """The budgets at which the least time falls, in ascending order."""
        times = torch.cat([torch.tensor([math.inf]), self.V[self.L, HELD, 0]])
        falls = torch.nonzero(times[1:] < times[:-1]).flatten().tolist()
        return [m * self.unit + self.ledger.a[self.L] for m in falls]

    def units(self, size: float) -> int:
        """Bytes in units, rounded up; what the chain's output pays for may make a need negative."""
        return max(math.ceil(size / self.unit - 1e-9), 0)

    def _left(self, budget: float) -> int:
        return min(math.floor((budget - self.ledger.a[self.L]) / self.unit + 1e-9), self.M)

    # ---- filling it: every m at once ----

    def _row(self, r: int, i: int) -> int:
        """Where a demand stands in the tables: an x[i] that nobody pays for is as good as free."""
        return self._same[i] if r == HELD else r

    def _solve(self, i: int, j: int) -> None:
        for r in self._starts[i].demands:
            found = self.V[j, r, i]
            self._store(r, i, j, found)
            if j > i + 1:
                self._recompute(r, i, j, found)
            if r != EXACT and self._starts[i].stop > i:
                self._invert(r, i, j, found)
            if j < self.L:
                self._note_again(r, i, j, found)

    def _store(self, r: int, i: int, j: int, found: Tensor) -> None:
        kept, needed = map(self.units, self.ledger.store(i, j, r))
        low, op = max(kept, needed), self.costs.ops[i]
        if low <= self.M:
            rest = self.V[j, self._row(HELD, i + 1), i + 1, low - kept : self.M + 1 - kept]
            torch.add(rest, op.forward + op.backward, out=found[low:])

    def _recompute(self, r: int, i: int, j: int, found: Tensor) -> None:
        kept = self.units(self.ledger.in_hand(i, r))
        if kept > self.M:
            return
        again = (self.at_top if j == self.L else self.again)[i, r, i + 1 : j]
        rows = self.V[j, FREE, i + 1 : j, : self.M + 1 - kept] + again[:, kept:]
        torch.minimum(found[kept:], rows.amin(0), out=found[kept:])

    def _note_again(self, r: int, i: int, k: int, found: Tensor) -> None:
        """Rule 4's first and third term, where the first pass fits."""
        start = self._starts[i]
        for table, j in ((self.again, k), (self.at_top, self.L)):
            reserve = self.units(self.ledger.reserve(i, k, j))
            low = max(start.pass_needs(r, k, j), reserve)
            if low <= self.M:
                rest = found[low - reserve : self.M + 1 - reserve]
                torch.add(rest, start.pass_seconds[k - i - 1], out=table[i, r, k, low:])

    def _invert(self, r: int, i: int, j: int, found: Tensor) -> None:
        start, stop = self._starts[i], min(self._starts[i].stop, j)
        if stop == j < self.L:  # the run ends with the region
            low = start.need_at_end(r, j)
            if low <= self.M:
                torch.minimum(found[low:], start.run_seconds[j - i - 1], out=found[low:])
            stop -= 1
        if stop == i:
            return
        rest = self.V[j, EXACT, i + 1 : stop + 1]
        if start.residues[stop - i - 1]:
            rest = taken_off(rest, start.residues[: stop - i])
        torch.minimum(found, (rest + start.run_costs(r, j)[: stop - i]).amin(0), out=found)

    # ---- reading a schedule off: one m, one rule after the other ----

    def _value(self, r: int, i: int, j: int, m: int) -> float:
        return float(self.V[j, self._row(r, i), i, m]) if m >= 0 else math.inf

    def _choices(self, r: int, i: int, j: int, m: int) -> Iterator[Choice]:
        """Rules 3 to 5 of NOTE [Plan]."""
        op, start, ledger, units = self.costs.ops[i], self._starts[i], self.ledger, self.units
        kept, needed = map(units, ledger.store(i, j, r))
        if m >= needed:
            left = m - kept
            yield Choice(op.forward + op.backward + self._value(HELD, i + 1, j, left), Store(i), HELD, left)
        left = m - units(ledger.in_hand(i, r))
        for k in range(i + 1, j):
            if m >= start.pass_needs(r, k, j):
                inner = m - units(ledger.reserve(i, k, j))
                time = start.pass_seconds[k - i - 1] + self._value(FREE, k, j, left) + self._value(r, i, k, inner)
                yield Choice(time, Stretch(i, k, r, inner), FREE, left)
        for k in range(i + 1, min(start.stop, j) + 1) if r != EXACT else ():
            if m >= (start.need_at_end(r, j) if k == j < self.L else start.run_needs(r, j)[k - i - 1]):
                left = m - start.residues[k - i - 1]
                time = float(start.run_seconds[k - i - 1]) + self._value(EXACT, k, j, left)
                yield Choice(time, Invert(i, k), EXACT, left)

    def _traced(self, r: int, i: int, j: int, m: int) -> Schedule:
        nodes: list[Node] = []
        while i < j:
            best = min(self._choices(r, i, j, m), key=lambda choice: choice.seconds)
            node = best.node
            i, r, m = node.stop, best.demand, best.left
            nodes.append(Recompute(node.first, self._traced(*node.inner)) if isinstance(node, Stretch) else node)
        return tuple(nodes)


class Stretch(NamedTuple):
    """A region to be run again, whose own schedule is still to be read off."""

    first: int
    stop: int
    demand: int
    left: int

    @property
    def inner(self) -> tuple[int, int, int, int]:
        """The arguments of `Table._traced`."""
        return self.demand, self.first, self.stop, self.left


class Choice(NamedTuple):
    """One way to go on: what the whole stretch takes then, and what is left for the rest."""

    seconds: float
    node: Store | Invert | Stretch
    demand: int
    left: int


class Start:
    """What stretches that begin at i have in common, wherever they end; needs are in units."""

    def __init__(self, table: Table, i: int) -> None:
        self.i, self.table, self.ledger, ops = i, table, table.ledger, table.costs.ops
        self.demands = [HELD] if i == 0 else [FREE, EXACT] + [HELD] * bool(self.ledger.paid[i])
        self.pass_seconds = _sums([op.forward for op in ops[i:]])
        beyond = [self.ledger.a[q] * (q > i) + ops[q].peak_forward for q in range(i, table.L)]
        self._widest = list(accumulate(beyond, max))
        self._read_run(table, i)

    def pass_needs(self, r: int, k: int, j: int) -> int:
        """`Ledger.first_pass`."""
        ledger = self.ledger
        return self.table.units(ledger.in_hand(self.i, r) + self._widest[k - self.i - 1] - ledger.output(j))

    def _read_run(self, table: Table, i: int) -> None:
        """The longest run of inverses from x[i] on: times and needs of each of its beginnings."""
        ledger, ops, self.stop = self.ledger, table.costs.ops, i
        while self.stop < table.L and math.isfinite(ops[self.stop].inverse):
            self.stop += 1
        ends = range(i + 1, self.stop + 1)
        seconds = _sums([op.forward + op.inverse for op in ops[i : self.stop]])
        if table.limit is not None:
            over = [_error(table.costs, i, k) > table.limit for k in ends]
            seconds = [math.inf if too_much else time for time, too_much in zip(seconds, over, strict=True)]
        self.run_seconds = torch.tensor(seconds, dtype=torch.float32)
        self.residues = [table.units(ledger.q[k] - ledger.q[i]) for k in ends]
        needs = [ledger.undo(i, p, table.L, HELD) for p in ends]
        self._forward = _running_max([-math.inf, *(f + ledger.output(table.L) for f, _ in needs[1:])][: len(needs)])
        self._backward = _running_max([b for _, b in needs])
        self._known: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def run_needs(self, r: int, j: int) -> Tensor:
        """`Ledger.invert` for every k > i, as if none were j."""
        return self._run(r, j)[0]

    def run_costs(self, r: int, j: int) -> Tensor:
        """The seconds of each run in each memory."""
        return self._run(r, j)[1]

    def _run(self, r: int, j: int) -> tuple[Tensor, Tensor]:
        key = r, j == self.ledger.L
        if key not in self._known:
            first = self.ledger.undo(self.i, self.i + 1, j, r)[0]
            forward = (self._forward - self.ledger.output(j)).clamp(min=first)
            needs = torch.ceil(torch.maximum(forward, self._backward) / self.table.unit - 1e-9)
            columns = torch.arange(self.table.M + 1)
            self._known[key] = needs, torch.where(columns < needs[:, None], math.inf, self.run_seconds[:, None])
        return self._known[key]

    def need_at_end(self, r: int, j: int) -> int:
        """`Ledger.invert` for k = j, where the region ends: its own gradient is set aside already."""
        count, ledger = j - self.i, self.ledger
        own = max(ledger.undo(self.i, j, j, r))
        if count > 1:
            own = max(
                own,
                float(self._backward[count - 2]),
                float(self._forward[count - 1]),
                ledger.undo(self.i, self.i + 1, j, r)[0],
            )
        return self.table.units(own)


def _error(costs: Costs, i: int, k: int) -> float:
    error = run_error(costs, i, k)
    return math.inf if error is None else error


def _running_max(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(accumulate(values, max)), dtype=torch.float64)


def _sums(values: Sequence[float]) -> list[float]:
    return list(accumulate(values))


def taken_off(rows: Tensor, by: Sequence[int]) -> Tensor:
    """Each row read with its own number of units less."""
    columns = torch.arange(rows.shape[-1]) - torch.tensor(by)[:, None]
    return rows.gather(1, columns.clamp(min=0)).masked_fill_(columns < 0, math.inf)


def unit_for(ledger: Ledger, budget: float, units: int) -> float:
    """The size of a unit, near ``budget / units``, at which rounding up loses least."""
    sizes = [*ledger.a, *(op.tape for op in ledger.ops), *ledger.n, *(op.gradient for op in ledger.ops)]
    given = torch.tensor([s for s in sizes if s] or [1], dtype=torch.float64)
    candidates = budget / torch.arange(max(units * 2 // 3, 1), units + 1, dtype=torch.float64)
    waste = (torch.ceil(given[:, None] / candidates - 1e-9) * candidates).sum(0)
    return float(candidates[waste.argmin()])
