"""What lowering costs in Python: ``python -m benchmarks.overhead [profile]``, microseconds for each half of a coupling.

64 couplings of 64 x 64 linear layers, batch 8: no arithmetic to speak of, so that what is left of a lowered step less
an unlowered one is overhead. Backward's difference holds one more evaluation of every function, shown beside it.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .engines import Call, forward, lowered, pipeline, plain, revlib, revtorch
from .exact import keep_freed_memory
from .measures import interleaved, seconds
from .networks import Net, Network, twice
from .table import RESULTS, machine

DEPTH, REPEATS = 64, 30
CPU = torch.device("cpu")
CALLS: dict[str, Callable[[Net], Call]] = {
    "plain loop": plain,
    "plain op": pipeline,
    "invfunc": lowered,
    "RevTorch": revtorch,
    "revlib": revlib,
}


def linear(width: int) -> nn.Module:
    """So weak that the stream does not grow: inverses of 64 strong ones would be far off."""
    layer = nn.Linear(width, width)
    nn.init.normal_(layer.weight, std=0.01)
    return layer


def backward_seconds(call: Call, net: Net) -> float:
    loss = forward(call, net).square().mean()
    return seconds(loss.backward, CPU)


def microseconds(taken: list[float]) -> float:
    """The median, of each half of a coupling."""
    return 1e6 * statistics.median(taken) / (2 * DEPTH)


def backward(calls: dict[str, Call], net: Net) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            taken[name].append(backward_seconds(call, net))
    return taken


def evaluation(net: Net) -> float:
    """One call of a function, with its graph: what every rebuilding backward has to add."""
    branches, x = net.branches, net.x.chunk(2, 1)[0]
    runs = {"": lambda: [branch(x) for branch in branches]}
    return microseconds(interleaved(runs, REPEATS, CPU)[""])


def table(net: Net, calls: dict[str, Call]) -> str:
    ahead = interleaved({name: partial(forward, call, net) for name, call in calls.items()}, REPEATS, CPU)
    back = backward(calls, net)
    lines = ["| | forward | over plain op | backward | over plain op |", "|---|--:|--:|--:|--:|"]
    for name in calls:
        found = [(microseconds(taken[name]), microseconds(taken["plain op"])) for taken in (ahead, back)]
        lines.append(f"| {name} | " + " | ".join(f"{own:.1f} | {own - base:+.1f}" for own, base in found) + " |")
    return "\n".join([*lines, f"\nOne evaluation of f: {evaluation(net):.1f}."])


def profiled(run: Callable[[], object]) -> None:
    """Where the time goes, by own time."""
    with cProfile.Profile() as profile:
        for _ in range(10):
            run()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def main(what: str = "table") -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    net = Network(twice(linear), (8, 128)).at(DEPTH)
    calls = {name: build(net) for name, build in CALLS.items()}
    backward(calls, net)
    if what == "profile":
        profiled(partial(forward, calls["invfunc"], net))
        profiled(partial(backward_seconds, calls["invfunc"], net))
        return
    found = table(net, calls)
    print(found)
    RESULTS.mkdir(exist_ok=True)
    about = f"{machine('cpu')}\n\nMicroseconds for each half of a coupling (one function), {DEPTH} couplings."
    (RESULTS / "overhead.md").write_text(f"{about}\n\n{found}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
