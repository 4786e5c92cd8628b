"""Cases by the number of ranks they run on; one process group runs them all, and each has its own outcome."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ranks:
    """Who runs a case."""

    rank: int
    world: int

    def mine(self, batch: Tensor) -> Tensor:
        """This rank's share of a batch."""
        return batch.chunk(self.world)[self.rank]


CASES: dict[int, dict[str, Callable[[Ranks], Any]]] = {2: {}, 4: {}}


def case(*worlds: int, **variants: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a case; with ``variants``, one for each, named by its key and called with its value."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        found = {f"{fn.__name__}-{key}": partial(fn, value=value) for key, value in variants.items()}
        for world in worlds:
            CASES[world].update(found or {fn.__name__: fn})
        return fn

    return register


def agree(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    """Assert that two lists of tensors are equal, each and everywhere."""
    assert len(found) == len(expected)
    worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    assert worst <= tolerance, f"off by {worst:.3g}"


# ---- in the process of the tests -------------------------------------------------------------------------------------


class Run:
    """What became of every case on every rank; a case that a rank did not reach has no outcome there.

    Who makes the folder starts the ranks; other workers of the same test run wait for what comes of it.
    """

    def __init__(self, world: int, folder: Path, seconds: float) -> None:
        files = [folder / f"{rank}.jsonl" for rank in range(world)]
        deadline, done = time.monotonic() + seconds, folder / "done"
        try:
            folder.mkdir()
        except FileExistsError:
            while not done.exists() and time.monotonic() < deadline + 10:
                time.sleep(0.2)
        else:
            processes = [_start(rank, world, folder, file) for rank, file in enumerate(files)]
            done.write_text("late" * any([_is_late(process, deadline) for process in processes]))
        self.late = not done.exists() or bool(done.read_text())
        self.outcomes = [_read(file) for file in files]

    def seen(self, name: str) -> list[Any]:
        """What a case returned on each rank; an assertion fails where it did not return."""
        for rank, outcomes in enumerate(self.outcomes):
            assert name in outcomes, f"rank {rank} did not come so far{', and had to be killed' * self.late}"
            assert outcomes[name]["error"] is None, f"rank {rank}: {outcomes[name]['error']}"
        return [outcomes[name]["seen"] for outcomes in self.outcomes]


def _is_late(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Wait for a process, and end it at the deadline."""
    try:
        process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def _start(rank: int, world: int, folder: Path, file: Path) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "distributed.worker", str(rank), str(world), str(folder / "store"), str(file)]
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(arguments, cwd=HERE.parent, stdout=log, stderr=log)


def _read(file: Path) -> dict[str, Any]:
    lines = file.read_text().splitlines() if file.exists() else []
    return {outcome["case"]: outcome for outcome in map(json.loads, lines)}


# ---- what is counted -------------------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """The collectives that run inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))
