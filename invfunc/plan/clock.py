"""Seconds: how long one op takes, in each of the ways in which a plan runs it. Rule 2 of NOTE [Profile]."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.op import Invertible
from ..wires import Wire, leaves
from .inputs import as_input
from .trials import Through, Trial, by_inverse, by_tape, forward_of, no_op

Seconds = dict[str, float]
# Times an op, on an input, as one that has an inverse or has none, and as a region: its output, and what trials take.
Clock = Callable[[Invertible, Wire, bool, Through], tuple[Wire, Seconds]]


def timed(op: Invertible, x: Wire, invertible: bool, again: Through) -> tuple[Wire, Seconds]:
    """An op's output, and the seconds of one trial of each kind, those of no op at all among them.

    ``again`` is the op as a region, the same one in every round: what it learns of its functions, it learns once.
    """
    found: Seconds = {}
    y, recording = _clocked(found, "forward", x, lambda: forward_of(op, x))
    y, parameters = as_input(y), recording.parameters

    def run(name: str, through: Through, at: Wire, carried: bool = False) -> None:
        _clocked(found, name, x, lambda: Trial(through, at, parameters, carried).backward())

    run("idle", no_op, y)
    run("step", by_tape(op), x)
    run("again", again, x)
    if invertible:
        run("idle, carried", no_op, y, True)
        run("undone", by_inverse(op), x, True)
    return y, found


def costs_in(found: Seconds) -> Seconds:
    """The seconds of `OpCosts`: what a trial takes beyond one of no op."""
    forward, step = found["forward"], found["step"]
    inverse = found["undone"] - found["idle, carried"] - forward if "undone" in found else math.inf
    beyond = {
        "forward": forward,
        "backward": step - found["idle"] - forward,
        "inverse": inverse,
        "region": found["again"] - step - forward,
    }
    return {name: max(value, 0.0) for name, value in beyond.items()}


def least_seconds(run: Callable[[], Any], repeats: int, x: Wire) -> float:
    """The least of some repeats."""
    found: Seconds = {}
    for i in range(repeats):
        _clocked(found, f"{i}", x, run)
    return min(found.values())


def _clocked(found: Seconds, name: str, x: Wire, run: Callable[[], Any]) -> Any:
    """What a call returns; its seconds go into a table."""
    on_cuda = any(isinstance(t, Tensor) and t.is_cuda for t in leaves(x))
    read = _cuda_clock() if on_cuda else _cpu_clock()
    result = run()
    found[name] = read()
    return result


def _cpu_clock() -> Callable[[], float]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    return lambda: clock() - begin


def _cuda_clock() -> Callable[[], float]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()

    def read() -> float:
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return read
