"""One accelerator in eight minutes: ``python -m benchmarks.device [large|small]``.

The suite's own tests of a device, the table of all engines by events, sizes that fill the card, a step as a graph, and
what part of a step is the second evaluation. It writes a table in Markdown, and the numbers in JSON. What a part
raises, or the clock leaves out, stands in its place.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import table
from .engines import BLOCKWISE, ENGINES, INVFUNC, PLAIN, Call, Engine, attempt, forward, peak, step
from .measures import interleaved, ratio
from .networks import LARGE, SMALL, Net, Network, transformer, twice

SECONDS = 480.0
Row = dict[str, Any]


def volume(width: int) -> nn.Module:
    """A branch over (batch, channels, depth, height, width)."""
    return nn.Sequential(nn.Conv3d(width, width, 3, padding=1), nn.GELU(), nn.Conv3d(width, width, 3, padding=1))


@dataclass(frozen=True)
class Study:
    """What is measured: a table of small networks, and networks that fill a card, at depths."""

    table: dict[str, Network]
    depth: int
    large: dict[str, tuple[Network, int]]
    repeats: int
    engines: Sequence[Engine] = ENGINES
    tests: bool = True


STUDIES = {
    "large": Study(
        LARGE,
        16,
        {
            "transformer, 8k tokens": (Network(transformer, (1, 8192, 2048), dim=2), 24),
            "transformer, 32k tokens": (Network(transformer, (1, 32768, 2048), dim=2), 24),
            "volume, 192^3": (Network(twice(volume), (1, 32, 192, 192, 192)), 8),
        },
        5,
    ),
    "small": Study(
        {"mlp": replace(SMALL["mlp"], shape=(32, 16))},
        4,
        {"transformer, 64 tokens": (Network(transformer, (1, 64, 32), dim=2), 4)},
        1,
        (PLAIN, BLOCKWISE, INVFUNC),
        tests=False,
    ),
}

# ---- parts -----------------------------------------------------------------------------------------------------------


def tests() -> str:
    """What the tests that need a device say."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    return done.stdout.strip().splitlines()[-1]


def lower_precision(call: Call, device: torch.device) -> Call:
    """A call under autocast in bfloat16; backward is outside, as it should be."""

    def autocast(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return call(x)

    return autocast


def filled(name: str, network: Network, depth: int, repeats: int, device: torch.device) -> list[Row]:
    """A network that fills the card: memory, times over the plain step's, and how they come about."""
    net = network.at(depth, device=str(device))
    found: list[Row] = [{"network": name, "depth": depth, "engine": e.name} for e in (PLAIN, BLOCKWISE, INVFUNC)]
    calls: dict[str, Call] = {}
    for row, engine in zip(found, (PLAIN, BLOCKWISE, INVFUNC), strict=True):
        call = lower_precision(engine.build(net), device)
        taken = attempt(lambda: peak(call, net))
        if isinstance(taken, str):
            row["error"] = taken
        else:
            calls[engine.name], row["peak"] = call, taken
    times = interleaved({name: partial(step, call, net) for name, call in calls.items()}, repeats, device)
    ahead = interleaved({name: partial(forward, call, net) for name, call in calls.items()}, repeats, device)
    for row in found:
        if (own := row["engine"]) in calls:
            row |= {"seconds": min(times[own]), "forward": min(ahead[own])}
            if PLAIN.name in calls:
                row["time"] = ratio(times[own], times[PLAIN.name])
    return found


def captured(net: Net, repeats: int, device: torch.device) -> Row:
    """A step of ours as a graph, and not: the time of both."""
    call = INVFUNC.build(net)
    run = partial(step, call, net)
    with torch.Stream(device):  # warm, on a stream as it is captured on
        for _ in range(3):
            run()
    torch.accelerator.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = interleaved({"eager": run, "graph": graph.replay}, repeats, device)
    return {name: min(taken) for name, taken in times.items()}


def second_evaluation(rows: Sequence[Row]) -> list[str]:
    """What part of a step is the second evaluation: forward's share, which what we add should not exceed by much."""
    lines = []
    for name in dict.fromkeys(row["network"] for row in rows):
        by = {row["engine"]: row for row in rows if row["network"] == name and "error" not in row}
        if PLAIN.name in by and INVFUNC.name in by:
            plain, ours = by[PLAIN.name], by[INVFUNC.name]
            share, added = plain["forward"] / plain["seconds"], ours["seconds"] / plain["seconds"] - 1
            lines.append(
                f"- {name}: a second forward is {share:.0%} of the plain step, and ours takes {added:.0%} more; "
                f"{added - share:+.0%} is neither."
            )
    return lines


# ---- all of it -------------------------------------------------------------------------------------------------------


def measured(study: Study, device: torch.device) -> Row:
    """All parts, in the order in which they matter, until the time is over."""
    begin, found = time.monotonic(), {"rows": [], "filled": [], "left out": []}

    def in_time(what: str) -> bool:
        late = time.monotonic() - begin > SECONDS
        found["left out"] += [what] * late
        return not late

    found["tests"] = attempt(tests) if study.tests else "not run"
    for name, (network, depth) in study.large.items():
        if in_time(name):
            rows = attempt(lambda: filled(name, network, depth, study.repeats, device))
            found["filled"] += [{"network": name, "engine": "all", "error": rows}] if isinstance(rows, str) else rows
    first = next(iter(study.table.values()))
    found["graph"] = attempt(lambda: captured(first.at(study.depth, device=str(device)), study.repeats, device))
    inner = table.Study(study.table, {name: (study.depth,) for name in study.table}, couplings=0)
    for name in study.table:
        if in_time(name):
            found["rows"] += table.rows(name, inner, study.depth, study.engines, str(device))
    return found | {"seconds": time.monotonic() - begin}


LEGEND = """\
A step under autocast in bfloat16: the peak of memory without parameters and their gradients, the time of a step, of its
forward alone, and over that of the plain step in the same turn."""


def markdown(found: Row, machine: str) -> str:
    """What was found, to read."""
    head = "| network | engine | peak, GiB | step, ms | forward, ms | time |\n|---|---|--:|--:|--:|--:|"
    graph = found["graph"]
    shown = graph if isinstance(graph, str) else ", ".join(f"{k} {1e3 * v:.3g} ms" for k, v in graph.items())
    parts = [machine, LEGEND, "\n".join([head, *map(line, found["filled"])])]
    parts += ["## The second evaluation", "\n".join(second_evaluation(found["filled"])) or "No pair of times."]
    parts += ["## A step as a graph", shown, "## Tests of the device", found["tests"]]
    parts += [f"Left out, for want of time: {', '.join(found['left out'])}."] * bool(found["left out"])
    return "\n\n".join(parts) + "\n\n" + table.markdown(found["rows"], "# All engines")


def line(row: Row) -> str:
    """A row of the networks that fill the card."""
    if "error" in row:
        return f"| {row['network']} | {row['engine']} | {row['error']} | | | |"
    numbers = f"{row['peak'] / 2**30:.3g} | {1e3 * row['seconds']:.3g} | {1e3 * row['forward']:.3g}"
    return f"| {row['network']} | {row['engine']} | {numbers} | {row.get('time', float('nan')):.2f} |"


def main(name: str = "large", folder: str | Path = table.RESULTS) -> None:
    """Measure, and write ``device.md`` and ``device.json``."""
    kind = torch.accelerator.current_accelerator()
    assert kind is not None, "no accelerator"
    device = torch.device(kind.type, torch.accelerator.current_device_index())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the drift meter's, in bfloat16; momentumnet's
        found, machine = measured(STUDIES[name], device), table.machine(device.type)
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "device.md").write_text(markdown(found, machine))
    Path(folder, "device.json").write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
