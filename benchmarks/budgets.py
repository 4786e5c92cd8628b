"""Plans beside every engine that fits: ``python -m benchmarks.budgets [quick|full] [network ...]``.

The budgets are shares of plain's peak. All engines and all plans of one network and depth take turns in one run, each
right behind a plain step; one thread on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial

from .engines import ENGINES, PLAIN, Engine, peak, plain, plannable, planned_in
from .networks import Net
from .table import RESULTS, STUDIES, Row, Study, begun, machine, prepare, times

SHARES = (0.05, 0.1, 0.25, 0.5)
OTHERS = tuple(engine for engine in ENGINES if "planned" not in engine.name)
HEAD = (
    "network",
    "depth",
    "budget",
    "the plan's peak",
    "the plan's time",
    "below all that fit",
    "what fits, and its time",
)
LEGEND = """\
Budgets and peaks are shares of plain's peak, without parameters and their gradients; times are over plain training. A
plan keeps gradients of inverses as they are: exact engines that fit stand beside it as all others do."""


def title(share: float) -> str:
    return f"invfunc, planned in {share:.0%}"


def measured(net: Net, turns: int) -> dict[str, Row]:
    """A row for each engine and plan, from one run."""
    top = peak(plain(net), net)
    op, costs = plannable(net)
    plans = [Engine(title(share), partial(planned_in, int(share * top), op, costs)) for share in SHARES]
    found, calls = begun([*OTHERS, *plans], net)
    times(found, calls, net, turns)
    return found


def lines(network: str, depth: int, found: dict[str, Row]) -> Iterator[str]:
    """A line for each budget."""
    top = found[PLAIN.name]["peak"]
    for share in SHARES:
        mine = found[title(share)]
        fitting = [
            found[e.name] for e in OTHERS if "error" not in found[e.name] and found[e.name]["peak"] <= share * top
        ]
        fitting.sort(key=lambda row: row["time"])
        told = "; ".join(f"{row['engine']} {row['time']:.2f}" for row in fitting) or "nothing"
        yield f"| {network} | {depth} | {share:.0%} | {verdict(mine, fitting, top)} | {told} |"


def verdict(mine: Row, fitting: list[Row], top: float) -> str:
    """The plan's peak and time, and whether it is below all that fit."""
    if "error" in mine:
        return f"{mine['error']} | | {'no' if fitting else ''}"
    is_below = all(mine["time"] < row["time"] for row in fitting)
    return f"{mine['peak'] / top:.1%} | {mine['time']:.2f} | {'yes' if is_below else 'no'}"


def table(study: Study, networks: Iterable[str], device: str) -> Iterator[str]:
    """The table in Markdown, told as it comes."""
    yield f"| {' | '.join(HEAD)} |"
    yield "|---|--:|--:|--:|--:|---|---|"
    for depth, network in sorted((depth, name) for name in networks for depth in study.depths[name]):
        net = study.networks[network].at(depth, device=device)
        yield from lines(network, depth, measured(net, study.turns(depth)))


def main(name: str = "quick", *networks: str) -> None:
    device = prepare()
    kept = []
    for text in table(STUDIES[name], networks or STUDIES[name].depths, device):
        print(text, flush=True)
        kept.append(text)
    if not networks:
        (RESULTS / f"budgets-{name}.md").write_text("\n\n".join([machine(device), LEGEND, "\n".join(kept)]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
