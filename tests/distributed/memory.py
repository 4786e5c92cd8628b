"""What a rank holds in a training step, measured; `test_distributed.py` holds the simulator's prediction against it."""

from itertools import product

import torch
from torch import nn

import invfunc as inv
from invfunc._distributed_demo import local_bytes, sharded, step_peak

from .harness import Ranks, case
from .networks import batch, loss, reversible

SHAPES = {"parameters": {"depth": 12, "width": 64}, "activations": {"depth": 6, "width": 16}}
ROWS = {"parameters": 4, "activations": 256}  # of each rank
MODES = "invert", "store"
SHARDINGS = "ddp", "fsdp"


def _momenta(net: nn.Module) -> torch.optim.Optimizer:
    """SGD with its state already made."""
    optimizer = torch.optim.SGD(net.parameters(), 0.0, momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@case(2, 4, **{"-".join(key): key for key in product(SHARDINGS, MODES, SHAPES)})
def peak(ranks: Ranks, value: tuple[str, str, str]) -> int:
    """The peak of a step, with what outlives it."""
    sharding, mode, shape = value
    x, y = batch(rows=ROWS[shape])
    net, kept = sharded(reversible(**SHAPES[shape]), sharding)
    with inv.mode(mode):
        step = step_peak(net, lambda: loss(net, x, y).backward())
    states = [state["momentum_buffer"] for state in _momenta(net).state.values()]
    return sum(map(local_bytes, [*net.parameters(), *states])) + kept + step
