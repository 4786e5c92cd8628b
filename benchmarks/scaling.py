"""How cost grows: ``python -m benchmarks.scaling``: step time and peak of invfunc and plain, against depth, batch, width.

The peak must not grow with depth, and time must grow as depth does: what counts is the last column, the time of one
coupling. One MLP coupling is repeated, so that there is no more to measure than activations; batch and width have a
depth of 16.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from .engines import INVFUNC, PLAIN, step
from .exact import keep_freed_memory
from .measures import costs, interleaved
from .networks import Network, mlp, twice
from .table import RESULTS, machine

REPEATS = 3
STUDIES = {
    "depth": [(depth, 256, 64) for depth in (4, 16, 64, 256, 1024)],
    "batch": [(16, batch, 64) for batch in (16, 64, 256, 1024, 4096)],
    "width": [(16, 256, width) for width in (32, 64, 128, 256, 512)],
}
HEAD = "| depth | batch | width | plain peak | peak | plain ms | ms | time over plain | ms a coupling |"


def row(depth: int, batch: int, width: int, device: str) -> str:
    net = Network(twice(mlp), (batch, width)).at(1, device=device)
    net = replace(net, pairs=net.pairs * depth)
    calls = {engine.name: engine.build(net) for engine in (PLAIN, INVFUNC)}
    for call in calls.values():
        step(call, net)  # from here on its gradients are allocated
    peaks = [costs(call, net)["peak"] for call in calls.values()]
    runs = {name: partial(step, call, net) for name, call in calls.items()}
    taken = interleaved(runs, REPEATS, net.x.device)
    plain, ours = (1e3 * statistics.median(taken[name]) for name in calls)
    numbers = [*peaks, plain, ours, ours / plain, ours / depth]
    return f"| {depth} | {batch} | {width} | " + " | ".join(f"{number:.3g}" for number in numbers) + " |"


def table(name: str, sizes: Sequence[tuple[int, int, int]], device: str) -> str:
    rows = []
    for size in sizes:
        rows.append(row(*size, device))
        print(rows[-1], flush=True)
    return "\n".join([f"## {name}\n", HEAD, "|--:" * HEAD.count(" | ") + "|--:|", *rows])


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    keep_freed_memory()
    tables = [table(name, sizes, device) for name, sizes in STUDIES.items()]
    RESULTS.mkdir(exist_ok=True)
    about = "Peaks in units of the input, without parameters and their gradients; medians of turns."
    (RESULTS / "scaling.md").write_text("\n\n".join([machine(device), about, *tables]) + "\n")


if __name__ == "__main__":
    main()
