"""What is measured of a training step, as functions. Gradients accumulate into memory that is there already."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor

import invfunc as inv
from invfunc.core.compare import relative_error

from .engines import Call, Engine, attempt, forward, step
from .networks import Net


def gradients(call: Call, net: Net) -> tuple[Tensor, ...]:
    for leaf in net.leaves:
        leaf.grad = None
    step(call, net)
    return tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in net.leaves)


def gradient_errors(engines: Iterable[Engine], net: Net, dtype: torch.dtype) -> Iterator[float | str]:
    """The relative errors against plain autograd in float64, of the same numbers."""
    net = net.to(dtype)
    wide = net.to(torch.float64)
    expected = cache(lambda build: gradients(build(wide), wide))
    for engine in engines:
        yield attempt(lambda: relative_error(gradients(engine.build(net), net), expected(engine.reference)))


@contextmanager
def counted(net: Net) -> Iterator[list[int]]:
    """How often the functions of the couplings are called. Not by hooks: MemCNN calls ``forward`` past them."""
    calls = [0]

    def counting(forward: Callable[..., Tensor], *args: Tensor) -> Tensor:
        calls[0] += 1
        return forward(*args)

    for branch in net.branches:
        branch.forward = partial(counting, branch.forward)
    yield calls
    for branch in net.branches:
        del branch.forward


def evaluations(call: Call, net: Net) -> float:
    """How often a training step evaluates f, and g."""
    with counted(net) as calls:
        step(call, net)
    return calls[0] / len(net.branches)


def costs(call: Call, net: Net) -> dict[str, float]:
    """Memory in units of the input's size, and flops; of a step that finds its gradients allocated."""
    training, held = inv.measure(step, call, net), inv.measure(forward, call, net).held_bytes
    unit = net.x.nbytes
    return {"peak": training.peak_bytes / unit, "held": held / unit, "flops": training.flops}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Device time between two events, or the processor time of this process, which a busy machine hardly changes."""
    if device.type == "cpu":
        begin = time.process_time()
        run()
        return time.process_time() - begin
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """The times of each, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for name in back_and_forth(runs, repeats):
        taken[name].append(seconds(runs[name], device))
    return taken


def beside(
    base: Callable[[], object], runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """`interleaved`, each with the time of another one right before it: a machine's speed wanders within a turn."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for name in back_and_forth(runs, repeats):
        taken[name].append((seconds(base, device), seconds(runs[name], device)))
    return taken


def back_and_forth(names: Iterable[str], repeats: int) -> Iterator[str]:
    """All names in each turn, in every other one the last first."""
    for turn in range(repeats):
        yield from list(names)[:: -1 if turn % 2 else 1]


def ratio(taken: list[float], base: list[float]) -> float:
    """The median, over turns, of one time over another."""
    return statistics.median(a / b for a, b in zip(taken, base, strict=True))
