r"""The solver: a dynamic program over stretches of a chain and memory.

NOTE [Plan] The fastest schedule of a chain ``x[0] -> x[1] -> ... -> x[L]`` in every amount of memory, at once.

``V_r(i, j, m)`` is the least time to run ops i+1..j forward and backward with m bytes left, x[i] in hand, and p = i+1.

1.  *Demands.* r says what has to be known of x[i] when the stretch has been dealt with: ``free``, nothing; ``exact``,
    its very bits, since an inverse ended there; ``held``, nothing either, but somebody pays for it: the caller for
    x[0], the tape of the op before for what it has saved; ``kept``, the same for all of it, by a region. (Another
    one, "a reconstruction will do", never arises on its own: an op whose output may be a reconstruction is undone by an
    inverse too, in the same run.)
2.  *The end.* ``V_r(j, j, m) = 0``; at the chain's end only if m holds what the loss needs.
3.  *Store* op p, the tape kept from now on::

        u_p + b_p + V_held(p, j, m - tape)

    Where a region ends with p, it does not run again what comes behind the last tensor that p saves: `OpCosts.ends`;
    nor where it goes on with ops that save nothing.

4.  *Recompute* ops i+1..k, x[i] kept; when the rest is done the same problem begins again from x[i], which is kept to
    its end, since it may be asked for again. (Ops that save nothing at all do not run again.) ::

        U(i, k) + region_i + W(i, k) + V_free(k, j, m - a_i) + V_kept(i, k, m - a_i)

    The gradient of x[k] waits while they run; then it is that of op k, as anywhere. In the table each op's own gradient
    stands in its place. Forward the ops run once as they will again, and need no more.

5.  *Invert* ops i+1..k, only x[k] kept, and that exactly; not where x[i] itself is wanted exactly::

        U(i, k) + C(i, k) + V_exact(k, j, m - residues)

    Nobody wants x[i] then, so that op p may stop early: `OpCosts.begins` is taken off C, and `OpCosts.opens` is added.

6.  Each choice also needs memory for its own moments (`Ledger`); where m is less, it is infinite.
7.  *Objectives.* One table answers all: least time in a budget is ``V_held(0, L, budget)``, least memory in a time is
    the smallest m with ``V_held(0, L, m) <= time``, and a limit on errors makes C infinite for runs above it.
8.  *Shared.* Behind a region of one op what that has handed on untouched, as half a coupling does, is kept already. The
    table counts it twice, as the price of a demand less. Likewise it does not know of buffers that are copied for
    regions inside of each other. A schedule that is read off is told to the byte (`predict`).

9.  *Keeping.* An op that is not inside of a region may keep expensive results from forward on, attention's, say: a
    region of one op by a term of rule 4 with their bytes and without their seconds, and a run of inverses likewise by
    one of rule 5 in which all ops keep what they can. What is left of a budget keeps results of single ops (`search`).

The letters: u, b and C are the seconds of a forward, a backward and a run of inverses, U(i, k) those of ops i+1..k
forward, W what Python takes for them in a region (`OpCosts.within`), a the bytes of x[i] (`Ledger.sizes`); `Ledger`
names the others.

*Why it is optimal*, but for rule 8, among schedules that keep a stored value until its op's backward, use an inverse
only fused with a backward, and let bytes add up: op p is back-propagated once. Either its tape was made in the first
pass, and lives through the stretch (3); or later, from a kept x[i]: let k be the first boundary after i where the
first pass kept anything (4); or from a rebuilt x[i]: take the longest run of inverses (5). The parts touch only
through m and r, so each may be replaced by its optimum. ``O(L^3 M)`` time, ``O(L^2 M)`` memory for M units of memory;
bytes round up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import accumulate, repeat
from typing import Any

import torch
from torch import Tensor

from .costs import DEMANDS, EXACT, FREE, HELD, KEPT, Costs, Ledger
from .schedule import Invert, Node, Recompute, Schedule, Store, run_error

TIME = torch.float32
INVERTED = [FREE, HELD, KEPT]  # where a run of inverses may begin
INSIDE = 0  # in the place of j: the stretch ends somewhere before the chain does


class Table:
    """The solved program: ``time(m)`` and ``schedule(m)`` for every memory up to a budget.

    Args:
        costs: The chain.
        budget: The most memory that is looked at, in bytes, the chain's output included.
        units: In how many steps.
        max_error: The largest gradient error of a run of inverses.
    """

    def __init__(self, costs: Costs, budget: float, units: int, max_error: float | None = None) -> None:
        self.second = costs.unit or 1.0
        costs = costs.in_units()
        self.costs, self.ledger, self.budget, self.max_error = costs, Ledger(costs), budget, max_error
        self.L, self.unit = self.ledger.length, unit_for(self.ledger, budget, units)
        self.M = int(budget / self.unit + 1e-9)
        starts = range(self.L)
        self.seconds = torch.tensor([op.forward + op.backward for op in costs.ops], dtype=TIME)
        self.spared = torch.tensor([_filled(self._spared(i), self.L, 0.0) for i in starts], dtype=TIME)
        self.in_hand = self.units([[self.ledger.in_hand(i, r) for i in starts] for r in DEMANDS])
        self.inside, self.whole = Moments(self, INSIDE), Moments(self, self.L)
        self.kept = self._kept_moments()  # rule 9
        self.notes = self.units(
            [_filled((self.ledger.notes(i, k) for k in range(i + 1, self.L + 1)), self.L) for i in starts]
        )
        self.again = self.infinite(self.L, self.L)  # rule 4's first and third term, by start and length less one
        self.pass_seconds = self._pass_seconds()
        self.V = self.infinite(len(DEMANDS), self.L + 1, self.L + 1)  # V[r, j, i, m], m for m units left
        self._fill()

    def time(self, budget: float) -> float:
        """The least seconds of a step in ``budget`` bytes."""
        m = self._left(budget)
        found = float(self.V[HELD, self.L, 0, m]) if m >= 0 else math.inf
        return self.second * (found + self.costs.enter * (found > self.costs.seconds * (1 + 1e-6)))

    def schedule(self, budget: float) -> Schedule:
        """The schedule that takes them."""
        return self._traced(HELD, 0, self.L, self._left(budget))

    def budgets(self) -> list[float]:
        """The budgets at which the least time falls, in ascending order."""
        times = torch.cat([torch.tensor([math.inf]), self.V[HELD, self.L, 0]])
        falls = torch.nonzero(times[1:] < times[:-1]).flatten().tolist()
        return [self.every()[m] for m in falls]

    def every(self) -> list[float]:
        """All budgets that the table tells apart, in ascending order."""
        return [m * self.unit + self.ledger.sizes[self.L] for m in range(self.M + 1)]

    def units(self, sizes: Any) -> Tensor:
        """Bytes in units, rounded up; what the chain's output pays for may make a need negative."""
        exact = torch.as_tensor(sizes, dtype=torch.float64) / self.unit
        return torch.ceil(exact - 1e-9).clamp(0, 2.0**40).long()

    def infinite(self, *shape: int) -> Tensor:
        """Times that are not known to be finite, in every memory."""
        return torch.full((*shape, self.M + 1), math.inf, dtype=TIME)

    def _left(self, budget: float) -> int:
        return min(math.floor((budget - self.ledger.sizes[self.L]) / self.unit + 1e-9), self.M)

    # ---- filling it: every m at once, and all stretches of one length that end inside the chain ----

    def _fill(self) -> None:
        for j in range(self.L + 1):
            self.V[:, j, j, int(self.units(self.ledger.end(j))) :] = 0
        for length in range(1, self.L):
            starts = slice(0, self.L - length)
            found = self._best(self.inside, starts, self._rests(length))
            self.V.diagonal(-length, 1, 2)[..., starts] = found.transpose(1, 2)
            self._note_again(length, found[KEPT])
        for i in reversed(range(self.L)):
            self.V[:, self.L, i] = self._best(self.whole, slice(i, i + 1), self._rest(i, self.L))[:, 0]

    def _note_again(self, length: int, inner: Tensor) -> None:
        """Rule 4 for regions of a length, solved by now; in terms of what is left beside x[i]."""
        starts, at = slice(0, self.L - length), length - 1
        self.again[starts, at] = taken_off(inner, self.notes[starts, at]) + self.pass_seconds[starts, at, None]

    def _pass_seconds(self) -> Tensor:
        ops, L = self.costs.ops, self.L
        rows = [_filled(self._region_seconds(i), L + 1)[1:] for i in range(L)]
        found = torch.tensor(rows, dtype=TIME)
        for i in (i for i, op in enumerate(ops) if op.alone):
            found[i, 1:] = math.inf  # a region that begins with it, and those that it ends or lies in
            for first in range(i):
                found[first, i - first :] = math.inf
        return found

    def _region_seconds(self, i: int) -> Iterator[float]:
        """What Python takes to begin a region, and a region to run forward and to be run again, op by op."""
        ops = self.costs.ops
        return accumulate((op.forward + op.within for op in ops[i:]), initial=ops[i].region)

    def _spared(self, i: int) -> Iterator[float]:
        """What an op on a tape does not run again where a region ends behind it, or behind ops that save nothing."""
        yield self.costs.ops[i].ends
        behind = accumulate((not op.saves for op in self.costs.ops[i + 1 :]), min)
        yield from (self.costs.ops[i].ends * quiet for quiet in behind)

    def _rest(self, i: int, j: int) -> Tensor:
        """``[r, 0, k - i - 1]``: the time of what follows each beginning of a stretch."""
        return self.V[:, j : j + 1, i + 1 : j + 1]

    def _rests(self, length: int) -> Tensor:
        """``[r, i, k - i - 1]``: `_rest` of every stretch of a length: ``V[r, i + length, k]``, a view."""
        by_r, by_j, by_k, by_m = self.V.stride()
        shape = len(DEMANDS), self.L - length, length, self.M + 1
        return self.V.as_strided(shape, (by_r, by_j + by_k, by_k, by_m), length * by_j + by_k)

    def _best(self, moments: Moments, starts: slice, rest: Tensor) -> Tensor:
        """``[r, i]``: the least time of stretches of one length."""
        stored, redone, undone = self._choices(moments, starts, rest)
        best = stored
        if redone.shape[1]:
            again = redone.amin(1).expand(len(DEMANDS), -1, -1)
            best = torch.minimum(best, taken_off(again, self.in_hand[:, starts]))
        inverted = cut(undone.amin(1), moments.begins[INVERTED, starts])
        best[INVERTED] = torch.minimum(best[INVERTED], inverted)
        if moments is self.whole and self.kept is not None:
            redone, undone = self._kept_choices(self.kept, starts, rest)
            best = torch.minimum(best, taken_off(redone[:, 0].expand(len(DEMANDS), -1, -1), self.in_hand[:, starts]))
            inverted = cut(undone.amin(1), self.kept.begins[INVERTED, starts])
            best[INVERTED] = torch.minimum(best[INVERTED], inverted)
        return best

    def _kept_choices(self, kept: Moments, starts: slice, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Rule 9: ``[i, 0, m - a_i]`` for a region of one op, and ``[i, k, m]`` for runs, with results kept."""
        length = rest.shape[2]
        redone = taken_off(rest[FREE, :, :1] + self.again[starts, :1], self.results[starts, None])
        redone = redone - self.spares[starts, None, None] if length > 1 else torch.full_like(redone, math.inf)
        undone = taken_off(rest[EXACT], kept.residues[starts, :length]) + kept.runs[starts, :length]
        return redone, undone

    def _choices(self, moments: Moments, starts: slice, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rules 3 to 5 of NOTE [Plan]: ``[r, i, m]``; ``[i, k, m - a_i]`` and ``[i, k, m]``, whatever the demand."""
        length = rest.shape[2]
        held = rest[HELD, :, 0].expand(len(DEMANDS), -1, -1)
        seconds = self.seconds - self.spared[:, length - 1] if moments is self.inside else self.seconds
        stored = taken_off(held, moments.store_keeps[:, starts]) + seconds[starts, None]
        stored = cut(stored, moments.store_needs[:, starts])
        redone = rest[FREE, :, :-1] + self.again[starts, : length - 1]
        exact, residues = rest[EXACT], moments.residues[starts, :length]
        if residues.any():
            exact = taken_off(exact, residues)
        return stored, redone, exact + moments.runs[starts, :length]

    # ---- reading a schedule off: one m, one choice after the other ----

    def _traced(self, r: int, i: int, j: int, m: int) -> Schedule:
        nodes: list[Node] = []
        while i < j:
            node, r, m = self._chosen(r, i, j, m)
            nodes.append(node)
            i = node.stop
        return tuple(nodes)

    def _chosen(self, r: int, i: int, j: int, m: int) -> tuple[Node, int, int]:
        """The best first part of a stretch; what is known of where it ends, and what is left for the rest."""
        moments, hand = self.whole if j == self.L else self.inside, int(self.in_hand[r, i])
        stored, redone, undone = self._choices(moments, slice(i, i + 1), self._rest(i, j))
        store = float(stored[r, 0, m])
        again, k = _least(redone[0, :, m - hand]) if m >= hand else _NONE
        invert, end = _least(undone[0, :, m]) if r != EXACT and m >= moments.begins[r, i] else _NONE
        if moments is self.whole and self.kept is not None:
            seconds, kept = self._chosen_kept(self.kept, r, i, j, m)
            if seconds < min(store, again, invert):
                return kept
        if store <= min(again, invert):
            return Store(i), HELD, m - int(moments.store_keeps[r, i])
        if invert <= again:
            return Invert(i, i + 1 + end), EXACT, m - int(moments.residues[i, end])
        inner = self._traced(KEPT, i, i + 1 + k, m - hand - int(self.notes[i, k]))
        return Recompute(i, inner), FREE, m - hand

    def _chosen_kept(self, kept: Moments, r: int, i: int, j: int, m: int) -> tuple[float, tuple[Node, int, int]]:
        """The same with results kept, and its time."""
        redone, undone = self._kept_choices(kept, slice(i, i + 1), self._rest(i, j))
        hand = int(self.in_hand[r, i])
        again = float(redone[0, 0, m - hand]) if m >= hand else math.inf
        invert, end = _least(undone[0, :, m]) if r != EXACT and m >= kept.begins[r, i] else _NONE
        if invert <= again:
            keeps = tuple(q for q in range(i, i + 1 + end) if self.costs.ops[q].spares[2 if q == i else 1])
            return invert, (Invert(i, i + 1 + end, keeps), EXACT, m - int(kept.residues[i, end]))
        return again, (Recompute(i, (Store(i),), True), FREE, m - hand - int(self.results[i]))

    def _kept_moments(self) -> Moments | None:
        """Those of runs that keep results; None where there is nothing to keep."""
        able = [i for i, op in enumerate(self.costs.ops) if op.keep]
        if not able:
            return None
        self.results = self.units([op.kept for op in self.costs.ops])
        self.spares = torch.tensor([op.spares[0] for op in self.costs.ops], dtype=TIME)
        return Moments(self, self.L, Ledger(self.costs, able))


_NONE = math.inf, 0  # no choice: its time, its place


def _least(seconds: Tensor) -> tuple[float, int]:
    """The least time of some choices, and its place."""
    if not seconds.numel():
        return _NONE
    least, place = seconds.min(0)
    return float(least), int(place)


class Moments:
    """What each choice needs at its own moments (`Ledger`), in units: by start, and by length less one."""

    def __init__(self, table: Table, j: int, ledger: Ledger | None = None) -> None:
        self.table, self.ledger, self.j, self.L = table, table.ledger if ledger is None else ledger, j, table.L
        self.is_kept = ledger is not None  # whether results are
        self._read_store()
        self._read_runs()
        q = self.ledger.residues
        residues = [_filled([q[k] - q[i] for k in range(i + 1, self.L + 1)], self.L) for i in range(self.L)]
        self.residues = table.units(residues)

    def _read_store(self) -> None:
        ledger, starts = self.ledger, range(self.L)
        found = [[ledger.store(i, self.j, r) for i in starts] for r in DEMANDS]
        self.store_keeps, self.store_needs = self.table.units(found).unbind(2)

    def _read_runs(self) -> None:
        starts = range(self.L)
        self.begins = self.table.units([[self.ledger.undo(i, i + 1, self.j, r)[0] for i in starts] for r in DEMANDS])
        seconds = torch.tensor([_filled(self._run_seconds(i), self.L) for i in starts], dtype=TIME)[:, :, None]
        needs = self.table.units([_filled(self._run_needs(i), self.L, 0.0) for i in starts])
        columns = torch.arange(self.table.M + 1)
        self.runs = torch.where(columns < needs[:, :, None], math.inf, seconds)

    def _run_seconds(self, i: int) -> Iterator[float]:
        """The time of a run of inverses from x[i] to each k; infinite where it rounds too much."""
        costs, limit = self.table.costs, self.table.max_error
        spared = [op.spares[1] * self.is_kept for op in costs.ops]
        found = accumulate(op.forward + op.inverse - s for op, s in zip(costs.ops[i:], spared[i:], strict=True))
        for k, seconds in enumerate(found, i + 1):
            error = 0.0 if limit is None or math.isinf(seconds) else run_error(costs, i, k)
            seconds += costs.ops[i].opens - costs.ops[i].begins
            seconds -= costs.ops[i].spares[2] * self.is_kept - spared[i]
            yield seconds if error is not None and (limit is None or error <= limit) else math.inf

    def _run_needs(self, i: int) -> Iterator[float]:
        """The needs of such a run, but for its very beginning."""
        worst = 0.0
        for k in range(i + 1, self.L + 1):
            forward, back = self.ledger.undo(i, k, self.j, HELD)
            worst = max(worst, forward if k > i + 1 else 0, back)
            yield worst


def _filled(row: Iterable[Any], length: int, empty: Any = math.inf) -> list[Any]:
    """A row, filled up to a length."""
    return [*row, *repeat(empty, length)][:length]


def taken_off(rows: Tensor, by: Tensor) -> Tensor:
    """Rows over m, each read at its own number of units less; infinite where that is below none."""
    columns = torch.arange(rows.shape[-1]) - by[..., None]
    return rows.gather(-1, columns.clamp(0, rows.shape[-1] - 1)).masked_fill_(columns < 0, math.inf)


def cut(rows: Tensor, needs: Tensor) -> Tensor:
    """Rows over m, infinite below what each needs."""
    return rows.masked_fill(torch.arange(rows.shape[-1]) < needs[..., None], math.inf)


def unit_for(ledger: Ledger, budget: float, units: int) -> float:
    """The size of a unit, near ``budget / units``, at which rounding up loses least."""
    sizes = [*ledger.sizes, *(op.tape for op in ledger.ops), *ledger.inputs, *(op.gradient for op in ledger.ops)]
    given = torch.tensor([s for s in sizes if s] or [1], dtype=torch.float64)
    candidates = budget / torch.arange(max(units * 2 // 3, 1), units + 1, dtype=torch.float64)
    waste = (torch.ceil(given[:, None] / candidates - 1e-9) * candidates).sum(0)
    return float(candidates[waste.argmin()])
