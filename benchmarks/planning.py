"""Plans against what they promise: ``python -m benchmarks.planning [solve] [profile] [plans] [errors]``.

Times are the least of several runs that take turns, on one thread, in the processor's own seconds; on a busy machine
they wander by some percent. The chains are those of the tests.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from planning_chains import LIMITS, ROUNDING, SHARES, demo, homogeneous, mixed, new_errors, peak_of, weights_of

import invfunc as inv
from invfunc.plan import Plan
from invfunc.plan import profile as costs_of
from invfunc.plan.schedule import fixed_schedules, predict, store_all
from invfunc.plan.search import curve_of, least
from invfunc.plan.value import gradients, mean_square

from .table import RESULTS, machine

REPEATS = 9
BUDGETS = (0.75, 0.5, 0.35, 0.25, 0.15)  # of plain training
Chain = tuple[str, inv.Invertible, Tensor]


def chains(*sizes: int) -> Iterator[Chain]:
    """The chains that are planned, with an input; sizes are shares of the batch in percent."""
    for size in sizes:
        torch.manual_seed(0)
        rows = 16384 * size // 100
        yield f"mixed, 24 ops, batch {rows}", mixed(64), torch.randn(rows, 64, requires_grad=True)
        rows = 1024 * size // 100
        yield f"demo, 24 couplings, batch {rows}", demo(24), torch.randn(rows, 1, 8, 8, requires_grad=True)


def clock(*runs: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """The least seconds of each, taking turns."""
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            begin = time.process_time()
            run()
            best[i] = min(best[i], time.process_time() - begin)
    return best


def stepping(op: Callable[..., Any], x: Tensor, weights: Sequence[Tensor]) -> Callable[[], Any]:
    return partial(gradients, op, x, mean_square, weights)


def rows(*cells: tuple[Any, ...]) -> Iterator[str]:
    """A table in Markdown: the first row is its head."""
    for i, row in enumerate(cells):
        yield f"| {' | '.join(map(str, row))} |"
        if i == 0:
            yield "|---" + "|--:" * (len(row) - 1) + "|"


# ---- the sections ----------------------------------------------------------------------------------------------------


def solve() -> Iterator[str]:
    yield "## solve\n\nSeconds for one budget, and for the whole curve.\n"
    yield from rows(("ops", "one budget", "curve"), *map(solved, (24, 50, 100)))


def solved(count: int) -> tuple[Any, ...]:
    costs = homogeneous(count, lossy=8, tape=8000)
    budget = predict(costs, store_all(count)).peak_bytes // 4
    one, curve = clock(lambda: inv.plan(costs, budget=budget), lambda: curve_of(costs), repeats=3)
    return count, f"{one:.2f}", f"{curve:.2f}"


def profile() -> Iterator[str]:
    yield "## profile\n\nA profile over a plain step; the first one of a process comes with torch's own lazy imports.\n"
    found = list(map(profiled, chains(25, 100)))
    yield from rows(("chain", "plain, s", "profile, s", "in plain steps"), *found)


def profiled(chain: Chain) -> tuple[Any, ...]:
    name, f, x = chain
    plain, taken = clock(stepping(f, x, weights_of(f, x)), lambda: costs_of(f, x), repeats=3)
    return name, f"{plain:.3f}", f"{taken:.2f}", f"{taken / plain:.1f}"


def plans() -> Iterator[str]:
    yield "## plans\n\nTimes and peaks over those of plain training; then predicted over measured time, measured over"
    yield "predicted peak, and the measured peak over the budget. Last, the fixed strategies."
    for name, f, x in chains(50):
        yield from planned(name, f, x)


def planned(name: str, f: inv.Invertible, x: Tensor) -> Iterator[str]:
    costs, weights = costs_of(f, x), weights_of(f, x)
    top, bound = (predict(costs, s).peak_bytes for s in (store_all(len(costs.ops)), least(costs)))
    budgets = {f"{share:.0%}": int(share * top) for share in BUDGETS if share * top >= bound} | {"least": bound}
    made = {at: inv.plan(costs, budget=budget) for at, budget in budgets.items()}
    fixed = {at: Plan(schedule, costs) for at, schedule in fixed_schedules(costs).items()}
    ops = {at: inv.checkpoint(f, plan=plan) for at, plan in (made | fixed).items()}
    plain, *times = clock(*[stepping(op, x, weights) for op in (f, *ops.values())])
    yield f"\n### {name}\n\nPlain: {plain:.3f} s, {top / 2**20:.1f} MiB; predicted {costs.seconds:.3f} s.\n"
    cells: list[tuple[Any, ...]] = [("plan", "time", "predicted", "off", "peak", "of predicted", "of budget")]
    for (at, plan), seconds in zip((made | fixed).items(), times, strict=True):
        peak, off = peak_of(ops[at], x, weights), plan.time * plain / seconds - 1
        binds = f"{peak / budgets[at]:.3f}" if at in budgets else ""
        found = f"{seconds / plain:.2f}", f"{plan.time:.2f}", f"{off:+.0%}", f"{peak / top:.2f}"
        cells.append((at, *found, f"{peak / plan.peak_bytes:.3f}", binds))
    yield from rows(*cells)
    yield f"\nFixed strategies that are better in both by more than 3 %: {', '.join(beaten(made, fixed)) or 'none'}."


def beaten(made: dict[str, Plan], fixed: dict[str, Plan]) -> list[str]:
    """Fixed strategies that are predicted to be better in both."""
    return [
        f"{name} than {at}"
        for at, plan in made.items()
        for name, other in fixed.items()
        if other.time < plan.time / 1.03 and other.peak_bytes < plan.peak_bytes / 1.03
    ]


def errors() -> Iterator[str]:
    """The suite: every chain, limit and share of memory; a batch that the plan has not seen."""
    yield "## errors\n\nThe gradient error on a new batch over the limit, by memory over the least and limit; an empty"
    yield "cell where that can not be met.\n"
    every = [(share, limit) for share in SHARES for limit in LIMITS]
    found = {name: {at: error / at[1] for at, error in new_errors(make)} for name, make in ROUNDING.items()}
    head = ("chain", *(f"{share:g}x {limit:g}" for share, limit in every))
    yield from rows(head, *[(name, *(shown(cells.get(at)) for at in every)) for name, cells in found.items()])
    ratios = [ratio for cells in found.values() for ratio in cells.values()]
    yield f"\nAt most 10: {sum(ratio <= 10 for ratio in ratios)} of {len(ratios)}."


def shown(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2g}"


SECTIONS = {"solve": solve, "profile": profile, "plans": plans, "errors": errors}


def main(*names: str) -> None:
    """Run sections, all if none is named; only all of them together are kept."""
    torch.set_num_threads(1)
    lines = [machine("cpu")]
    for name in names or SECTIONS:
        for line in ("", *SECTIONS[name]()):
            print(line, flush=True)
            lines.append(line)
    if not names:
        (RESULTS / "planning.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
