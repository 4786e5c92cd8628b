"""Seconds: how long one op takes, in each of the ways in which a plan runs it. Rule 2 of NOTE [Profile]."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.op import Invertible
from ..wires import Wire, leaves
from .inputs import as_input
from .trials import Through, Trial, by_inverse, by_tape, closed_over, no_op, with_graph
from .work import Seconds

# Times an op, on an input, as one that has an inverse or has none, and as a region: its output, and what trials take.
Clock = Callable[[Invertible, Wire, bool, Through], tuple[Wire, Seconds]]


def timed(op: Invertible, x: Wire, invertible: bool, again: Through) -> tuple[Wire, Seconds]:
    """An op's output, and the seconds of one trial of each kind, those of no op at all among them.

    ``again`` is the op as a region, the same one in every round: what it learns of its functions, it learns once.
    """
    found: Seconds = {}
    y, roots = _clocked(found, "forward", x, lambda: with_graph(op, x))
    y, parameters = as_input(y), closed_over(y, roots)

    def run(name: str, through: Through, at: Wire, carried: bool = False) -> None:
        _clocked(found, name, x, lambda: Trial(through, at, parameters, carried).backward())

    run("idle", no_op, y)
    run("step", by_tape(op), x)
    run("again", again, x)
    if invertible:
        run("idle, carried", no_op, y, True)
        run("undone", by_inverse(op), x, True)
    return y, found


def beyond_idle(found: Seconds) -> Seconds:
    """The seconds of each way that an op has: what its trial takes beyond one of no op."""
    ways = {"forward": found["forward"], "step": found["step"] - found["idle"], "again": found["again"] - found["idle"]}
    return ways | ({"undone": found["undone"] - found["idle, carried"]} if "undone" in found else {})


def least_seconds(runs: Sequence[Callable[[], Any]], repeats: int, x: Wire) -> list[float]:
    """The least of some repeats of each, in turns."""
    rounds: list[Seconds] = [{} for _ in range(repeats)]
    for found in rounds:
        for i, run in enumerate(runs):
            _clocked(found, f"{i}", x, run)
    return [min(found[f"{i}"] for found in rounds) for i in range(len(runs))]


def _clocked(found: Seconds, name: str, x: Wire, run: Callable[[], Any]) -> Any:
    """What a call returns; its seconds go into a table."""
    device = next((t.device for t in leaves(x) if isinstance(t, Tensor) and not t.is_cpu), None)
    read = _cpu_clock() if device is None else _device_clock(device)
    result = run()
    found[name] = read()
    return result


def _cpu_clock() -> Callable[[], float]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    return lambda: clock() - begin


@contextmanager
def one_thread() -> Iterator[None]:
    """On the CPU, run ops on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _device_clock(device: torch.device) -> Callable[[], float]:
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    begin.record(torch.accelerator.current_stream(device))

    def read() -> float:
        end.record(torch.accelerator.current_stream(device))
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return read
