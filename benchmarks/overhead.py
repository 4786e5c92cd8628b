"""What lowering costs in Python: ``python -m benchmarks.overhead``, microseconds for each half of a coupling.

64 couplings of 64 x 64 linear layers, batch 8: no arithmetic to speak of, so that what is left of a lowered step less
an unlowered one is overhead. Backward's difference holds one more evaluation of every function, shown beside it. A
second table says in which files the time of a lowered step goes.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

import invfunc as inv

from .engines import (
    Call,
    by_hand,
    checkpointed,
    closures,
    forward,
    lowered,
    module,
    pipeline,
    plain,
    revlib,
    revtorch,
    sequential,
)
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
    "invfunc, closures, built in every call": closures,
    "invfunc, `nn.Lowered`": module,
    "invfunc, `nn.Sequential` of `nn.Coupling`": partial(sequential, inv.nn.Sequential),
    "torch checkpoint, each block": partial(checkpointed, lambda depth: 1),
    "RevTorch": revtorch,
    "revlib": revlib,
    "by hand": by_hand,
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
    lines = ["| | forward | over plain op | backward | over plain op | step, of plain |", "|---|--:|--:|--:|--:|--:|"]
    step = sum(microseconds(taken["plain loop"]) for taken in (ahead, back))
    for name in calls:
        found = [(microseconds(taken[name]), microseconds(taken["plain op"])) for taken in (ahead, back)]
        cells = [f"{own:.1f} | {own - base:+.1f}" for own, base in found]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(own for own, _ in found) / step:.2f} |")
    return "\n".join([*lines, f"\nOne evaluation of f: {evaluation(net):.1f}."])


def by_file(call: Call, net: Net) -> str:
    """Where the time of a step goes: a file's own, and that of the C functions it calls; the profiler makes it longer."""
    with cProfile.Profile() as profile:
        for _ in range(REPEATS):
            forward(call, net).square().mean().backward()
    times: Counter[str] = Counter()
    for file, seconds_taken in _own_times(pstats.Stats(profile)):
        times[file] += 1e6 * seconds_taken / (2 * DEPTH * REPEATS)
    lines = ["| where | microseconds |", "|---|--:|"]
    lines += [f"| {file} | {taken:.1f} |" for file, taken in times.most_common() if taken >= 1]
    return "\n".join(lines)


def _own_times(stats: pstats.Stats) -> Iterator[tuple[str, float]]:
    for (file, _, name), (_, _, own, _, callers) in stats.stats.items():  # type: ignore[attr-defined]
        if file != "~":
            yield _shown(file), own
        elif "linear" in name or "run_backward" in name:
            yield "torch's kernels and autograd", own
        else:
            for (caller, _, _), (_, _, part, _) in callers.items():
                yield _shown(caller), part


def _shown(file: str) -> str:
    path = Path(file)
    package = Path(inv.__file__).parent
    return f"`{path.relative_to(package)}`" if package in path.parents else "torch's Python"


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    net = Network(twice(linear), (8, 128)).at(DEPTH)
    calls = {name: build(net) for name, build in CALLS.items()}
    backward(calls, net)
    found = f"{table(net, calls)}\n\nA lowered step under a profiler, by file:\n\n{by_file(calls['invfunc'], net)}"
    print(found)
    RESULTS.mkdir(exist_ok=True)
    about = f"{machine('cpu')}\n\nMicroseconds for each half of a coupling (one function), {DEPTH} couplings."
    (RESULTS / "overhead.md").write_text(f"{about}\n\n{found}\n")


if __name__ == "__main__":
    main()
