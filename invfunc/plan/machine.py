"""The machine: what Python takes here to run a plan, measured once in a process. Rule 7 of NOTE [Profile]."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import outside_modes
from ..checkpoint import Checkpointed
from ..core.couple import couple
from ..core.op import Chain, Invertible
from ..engine.interface import Options
from ..engine.snapshot import leave_random_state
from ..wires import Wire
from .clock import one_thread
from .costs import Costs, OpCosts
from .executor import Planned, flat_ops
from .schedule import Invert, Recompute, Schedule, Store
from .work import Python

# What an ordinary machine takes; what is measured within a factor of the square root of `STEP` of that is the same.
USUAL, STEP = Python(enter=62.0, each=3.0, region=39.0, within=11.5, opens=19.5, level=15.5), 2.0
HALVES, ROUNDS, CALLS = 8, 30, 14  # of what is timed; the kernels of a plain step of each half
WIDTH = 8


@cache
def python_here() -> Python:
    """What Python takes on this machine, as it is used to take it unless that is contradicted."""
    with outside_modes(), one_thread(), torch.enable_grad(), leave_random_state(()):
        return believed(calls_in(_timed()))


def believed(found: Python) -> Python:
    """Each number as it is usually, times a power of `STEP`: two processes find the same."""
    return Python(*[_believed(number, usual) for number, usual in zip(found, USUAL, strict=True)])


def _believed(number: float, usual: float) -> float:
    powers = round(math.log(max(number / usual, STEP**-4), STEP))
    return usual * STEP ** min(powers, 4)


def calls_in(seconds: dict[str, float]) -> Python:
    """The numbers from the seconds of whole steps, each a difference of steps that are long against it."""
    plain, others = seconds["plain"], HALVES - 1
    call, forward = plain / (CALLS * HALVES), plain / (3 * HALVES)
    within = (seconds["region"] - seconds["short region"]) / others - forward
    level = (seconds["run"] - seconds["short run"]) / others - forward
    region = (seconds["regions"] - seconds["region"]) / others
    opens = (seconds["runs"] - seconds["run"]) / others
    enter = (seconds["region"] - region + seconds["run"] - opens - HALVES * (within + level + 2 * forward)) / 2 - plain
    each = USUAL.each * call
    return Python(*[s / call for s in (enter - HALVES * each, each, region, within, opens, level)])


def _schedules() -> dict[str, Schedule]:
    stored = tuple(map(Store, range(HALVES)))
    return {
        "region": (Recompute(0, stored),),
        "short region": (Recompute(0, stored[:1]), *stored[1:]),
        "regions": tuple(Recompute(i, (Store(i),)) for i in range(HALVES)),
        "run": (Invert(0, HALVES),),
        "short run": (Invert(0, 1), *stored[1:]),
        "runs": tuple(Invert(i, i + 1) for i in range(HALVES)),
    }


class Given(NamedTuple):
    """A plan that nobody has made."""

    costs: Costs
    schedule: Schedule

    def check_shape(self, ops: tuple[Invertible, ...], x: Wire) -> None:
        """Any shape will do."""


def _timed() -> dict[str, float]:
    """The least seconds of plain and planned steps of a chain whose kernels take next to nothing, in turns."""
    op = Chain(tuple(couple(_function(), _function()) for _ in range(HALVES // 2)))
    x = tuple(torch.ones(WIDTH, WIDTH, dtype=torch.float32, device="cpu", requires_grad=True) for _ in range(2))
    costs = Costs(tuple(OpCosts("half", 0.0, 0.0, 0.0) for _ in range(HALVES)))
    runs: dict[str, Callable[..., Any]] = {"plain": op}
    for name, schedule in _schedules().items():
        planned = Planned(op, Given(costs, schedule), tuple(flat_ops(op)))
        runs[name] = Checkpointed(planned, Options(drift="off"))
    steps = {name: partial(_step, run, x) for name, run in runs.items()}
    least = {name: math.inf for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            least[name] = min(least[name], time.process_time() - begin)
    return least


def _function() -> nn.Module:
    layers = (nn.Linear(WIDTH, WIDTH, device="cpu", dtype=torch.float32) for _ in range(2))
    return nn.Sequential(next(layers), nn.GELU(), next(layers))


def _step(run: Callable[..., Any], x: tuple[Tensor, ...]) -> None:
    y = run(*x)
    torch.autograd.backward([y[0], y[1]], [torch.ones_like(y[0]), torch.ones_like(y[1])], inputs=list(x))
