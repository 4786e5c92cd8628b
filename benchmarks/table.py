"""The table of all engines: ``python -m benchmarks.table [quick|full] [network ...]``, on an accelerator where there is one.

Every engine trains the same network with the same numbers in the same process, taking turns. Memory and flops are
counted, not sampled; times are ratios to plain training right before. One thread on the CPU.
"""

from __future__ import annotations

import json
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .engines import ENGINES, PLAIN, Call, Engine, attempt, step
from .exact import keep_freed_memory
from .measures import beside, costs, evaluations, gradient_errors, ratio
from .networks import LARGE, SMALL, Net, Network

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What is measured: networks at depths, their times over some turns; errors at a smaller size."""

    networks: dict[str, Network]
    depths: dict[str, tuple[int, ...]]
    couplings: int  # as many turns as it takes to run so many of them, but five at least and fifty at most

    def turns(self, depth: int) -> int:
        """The shorter a step, the more of them: what disturbs it is more of it."""
        return min(50, max(5, self.couplings // depth))


STUDIES = {
    "quick": Study(SMALL, {"mlp": (4, 16), "conv": (4, 16), "transformer": (4, 16)}, 20),
    "full": Study(LARGE, {"mlp": (4, 16, 64, 256), "conv": (4, 16, 64, 256), "transformer": (4, 16, 64, 256)}, 500),
}


def rows(network: str, study: Study, depth: int, engines: Sequence[Engine], device: str) -> list[Row]:
    """One row for each engine; what went wrong stands in its row."""
    net = study.networks[network].at(depth, device=device)
    found, calls = begun(engines, net)
    times(found, calls, net, study.turns(depth))
    errors(found, [engine for engine in engines if engine.name in calls], SMALL[network].at(depth, device=device))
    return [{"network": network, "depth": depth, **row} for row in found.values()]


def begun(engines: Sequence[Engine], net: Net) -> tuple[dict[str, Row], dict[str, Call]]:
    """The beginning of each engine's row, and what it has built; or what went wrong."""
    found: dict[str, Row] = {engine.name: {"engine": engine.name} for engine in engines}
    calls: dict[str, Call] = {}
    for engine in engines:
        match attempt(lambda: first_step(engine, net)):
            case str(error):
                found[engine.name]["error"] = error
            case call, costs:
                calls[engine.name] = call
                found[engine.name] |= costs
    return found, calls


def first_step(engine: Engine, net: Net) -> tuple[Call, Row]:
    """What the engine has built, when it has made its gradients; and what a step costs."""
    call = engine.build(net)
    step(call, net)
    return call, costs(call, net) | {"evaluations": evaluations(call, net)}


def times(found: dict[str, Row], calls: dict[str, Call], net: Net, turns: int) -> None:
    runs = {name: partial(step, call, net) for name, call in calls.items()}
    plain, flops = runs.pop(PLAIN.name), found[PLAIN.name]["flops"]
    taken = beside(plain, runs, turns, net.x.device)
    found[PLAIN.name] |= {"time": 1.0, "seconds": [base for pairs in taken.values() for base, _ in pairs]}
    for name, pairs in taken.items():
        bases, own = map(list, zip(*pairs, strict=True))
        found[name] |= {"time": ratio(own, bases), "seconds": own}
    for name in calls:
        found[name]["flops"] /= flops


def errors(found: dict[str, Row], engines: Sequence[Engine], net: Net) -> None:
    net = net.to(torch.bfloat16)  # so that every dtype has the same numbers
    for name, dtype in DTYPES.items():
        for engine, error in zip(engines, gradient_errors(engines, net, dtype), strict=True):
            found[engine.name][name] = error


# ---- output ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "depth": "d",
    "engine": "s",
    "peak": ".1f",
    "held": ".1f",
    "evaluations": ".3g",
    "flops": ".2f",
    "time": ".2f",
    "float64": ".0e",
    "float32": ".0e",
    "bfloat16": ".0e",
}
LEGEND = """\
Of one training step: `peak` and `held` (after forward) memory in units of the network's input, without parameters and
their gradients; `evaluations` of each f and g; `flops` and `time` over plain training; and the relative error of all
gradients in three dtypes against plain autograd in float64 (a smaller input, the same depth). `by hand` is no library:
it is the least code that evaluates each function twice, for these networks alone and without a check of anything."""


def markdown(found: Sequence[Row], machine: str) -> str:
    """The tables, one for each network."""
    parts = [machine, LEGEND]
    for network in dict.fromkeys(row["network"] for row in found):
        lines = [line(row) for row in found if row["network"] == network]
        head = [f"| {' | '.join(COLUMNS)} |", "|" + "|".join("---" if c == "engine" else "--:" for c in COLUMNS) + "|"]
        parts += [f"## {network}", "\n".join([*head, *lines])]
    return "\n\n".join(parts) + "\n"


def line(row: Row) -> str:
    if "error" in row:
        return f"| {row['depth']} | {row['engine']} | {row['error']} |" + " |" * (len(COLUMNS) - 3)
    return f"| {' | '.join(cell(row[column], form) for column, form in COLUMNS.items())} |"


def cell(value: Any, form: str) -> str:
    return value if isinstance(value, str) else format(value, form)


def machine(device: str) -> str:
    """What it ran on."""
    known = Path("/proc/cpuinfo")
    models = [x.partition(": ")[2] for x in known.read_text().splitlines() if x.startswith("model name")]
    chip = (models or [platform.processor()])[0] if device == "cpu" else _name_of(device)
    return f"{chip}, {platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}."


def _name_of(device: str) -> str:
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return device if name is None else name()


def run(study: Study, networks: Iterable[str], device: str) -> Iterator[Row]:
    """All rows of a study, told as they come."""
    for depth, network in sorted((depth, name) for name in networks for depth in study.depths[name]):
        found = rows(network, study, depth, ENGINES, device)
        print(*map(line, found), sep="\n", flush=True)
        yield from found


def write(name: str, found: Sequence[Row], machine: str) -> None:
    """The table, the numbers, and the plots."""
    from .plots import draw

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(markdown(found, machine))
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n")
    draw(name, found, RESULTS)


def prepare() -> str:
    """One thread, freed memory kept, and no warnings, such as the drift meter's in bfloat16; the device to run on."""
    accelerator = torch.accelerator.current_accelerator()
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    return "cpu" if accelerator is None else accelerator.type


def main(name: str = "quick", *networks: str) -> None:
    device = prepare()
    found: list[Row] = []
    for row in run(STUDIES[name], networks or STUDIES[name].depths, device):
        found.append(row)
        if row["engine"] == ENGINES[-1].name:
            write(name, found, machine(device))


if __name__ == "__main__":
    main(*sys.argv[1:])
