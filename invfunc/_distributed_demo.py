"""``python -m invfunc demo --distributed ddp|fsdp``: the demo's network on several ranks, against one process.

It starts its ranks itself, on this machine; under ``torchrun -m invfunc demo --distributed ddp`` it is one of those
that were started. Every rank trains on its share of each batch; the first one then trains alone on the whole batches,
and tells how far the two are apart, and what each rank held at its peak beside what `invfunc.plan.simulate` predicts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from . import nn as inn
from ._torch import outside_modes
from .commands.demo import RATE, Images, Setting, batches, data, network
from .commands.shell import Refusal
from .look.memory import measure
from .plan import simulate

STEPS = 8


@dataclass(frozen=True)
class Job:
    """What every rank does."""

    sharding: str
    depth: int
    setting: Setting

    def arguments(self) -> list[str]:
        """The command line that means this job."""
        given = {"distributed": self.sharding, "depth": self.depth, "batch": self.setting.batch}
        return [*(f"--{name}={value}" for name, value in given.items()), f"--dtype={self.setting.dtype_name}"]


def run(job: Job, ranks: int) -> int:
    """Be a rank of ``torchrun``, or have it start so many ranks here; returns the exit code."""
    if job.setting.device.type != "cpu":
        raise Refusal(f"--distributed runs on the CPU, not on {job.setting.device}")
    ranks = int(os.environ.get("WORLD_SIZE", ranks))
    if job.setting.batch % ranks:
        raise Refusal(f"--batch {job.setting.batch} can not be shared evenly by {ranks} ranks")
    if "RANK" not in os.environ:
        alone = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return subprocess.call(
            [*alone, "-m", "invfunc", "demo", *job.arguments()], env={"OMP_NUM_THREADS": "1", **os.environ}
        )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        work(dist.get_rank(), ranks, job)
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread of torch that comes back to Python while Python ends aborts a rank now and then, its work long done:
    # before 3.14 such a thread is unwound, through C++ that forbids it (https://github.com/python/cpython/issues/87135).
    os._exit(0)


def work(rank: int, ranks: int, job: Job) -> None:
    """Train, gather what each rank saw, and let the first one compare and print."""
    steps = batches(data(job.setting)[0], job.setting)[:STEPS]
    mine = [Images(*(t.chunk(ranks)[rank] for t in step)) for step in steps]
    net, kept = sharded(model(job), job.sharding)
    held = kept + sum(map(local_bytes, net.parameters())) + step_peak(net, partial(_backward, net, mine[0]))
    losses = train(net, mine)
    weights = [_whole(p.detach()) for p in net.parameters()]
    seen: list[Any] = [None] * ranks
    dist.all_gather_object(seen, (held, losses))
    if not rank:
        show(job, ranks, seen, *_apart(job, steps, seen, weights))
    dist.barrier()


def model(job: Job) -> nn.Module:
    """The demo's network as modules, which can be sharded one by one."""
    return inn.Sequential(*network(job.depth, job.setting).parts)


# ---- sharding, and what it holds -------------------------------------------------------------------------------------


# What torch 2.13 calls the first was called the second.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Unseen:
    """A reduce-scatter whose own scratch memory, made by no operator, `measure` can not take for part of the model."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What FSDP sends from, and receives into."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        """Reduce and scatter."""
        with outside_modes():
            return _reduce_scatter(output_tensor, input_tensor, op, group, async_op)


def sharded(net: nn.Module, sharding: str) -> tuple[nn.Module, int]:
    """A network under DDP or FSDP2, and what that keeps beside its weights."""
    if sharding == "ddp":
        made: list[nn.Module] = []
        kept = measure(lambda: made.append(DistributedDataParallel(net))).held_bytes
        return made[0], kept
    for module in inn.fully_shard_blocks(net).modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(Unseen())  # pyright: ignore[reportArgumentType]
    return net, 0


def step_peak(net: nn.Module, backward: Callable[[], None]) -> int:
    """What steps of a new network add at most; its gradients are dropped between them."""

    def steps() -> None:
        for _ in range(2):
            net.zero_grad()
            backward()

    def peak() -> int:
        found = measure(steps).peak_bytes
        net.zero_grad()
        return found

    # DDP arranges its buckets after the first step. What FSDP keeps it makes in the first step, and it must be seen
    # then: memory that is older than the measured call counts by how it changes.
    if not isinstance(net, DistributedDataParallel):
        return peak()
    steps()
    net.zero_grad()
    # On a busy machine a thread of gloo may hold what it has reduced until the next step, which then takes more, or is
    # told to let go of it, and takes less: the middle one counts.
    return sorted([peak() for _ in range(3)])[1]


def local_bytes(tensor: Tensor) -> int:
    """The bytes of this rank's part."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage().nbytes()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- training, and the comparison ------------------------------------------------------------------------------------


def _loss(net: nn.Module, images: Images) -> Tensor:
    return F.cross_entropy(net(images.pixels), images.labels)


def _backward(net: nn.Module, images: Images) -> None:
    _loss(net, images).backward()


def train(net: nn.Module, steps: list[Images]) -> list[float]:
    """The loss of every step."""
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9)
    losses: list[float] = []
    for images in steps:
        optimizer.zero_grad()
        (now := _loss(net, images)).backward()
        optimizer.step()
        losses.append(now.item())
    return losses


def _apart(job: Job, steps: list[Images], seen: list[Any], weights: list[Tensor]) -> tuple[float, float]:
    """How far the ranks' losses and weights are from those of one process."""
    alone = model(job)
    expected = train(alone, steps)
    means = [sum(losses) / len(seen) for losses in zip(*(losses for _, losses in seen), strict=True)]
    pairs = zip(weights, alone.parameters(), strict=True)
    return (
        max(abs(a - b) for a, b in zip(means, expected, strict=True)),
        max((a - b.detach()).abs().max().item() for a, b in pairs),
    )


def predicted(job: Job, ranks: int) -> int:
    """What the simulator says of a rank's peak, from shapes alone."""
    nowhere = replace(job, setting=replace(job.setting, device=torch.device("meta")))
    images = torch.empty(job.setting.batch // ranks, 1, 8, 8, dtype=job.setting.stream, device="meta")
    return simulate(model(nowhere), images, ranks=ranks, sharding=job.sharding, optimizer_states=0).peak_bytes


def show(job: Job, ranks: int, seen: list[Any], loss: float, weight: float) -> None:
    """Print the table."""
    print(f"{job.sharding}, {ranks} ranks, {job.depth} couplings, {STEPS} steps; {job.setting}\n")
    print("rank   peak MB   predicted MB   last loss")
    expected = predicted(job, ranks)
    for rank, (held, losses) in enumerate(seen):
        print(f"{rank:>4}   {held / 1e6:7.3f}   {expected / 1e6:12.3f}   {losses[-1]:9.5f}")
    print(f"\nagainst one process on whole batches: losses off by {loss:.1e}, weights by {weight:.1e}")
