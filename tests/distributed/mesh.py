"""Tensor parallelism, meshes of two dimensions, pipelines of stages, and checkpoints on disk."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import invfunc as inv

from .fsdp import shard, shard_plain
from .harness import Ranks, agree, case
from .networks import WIDTH, batch, gradients, loss, plain, reversible, train, weights, wide


def split_within(net: nn.Module, mesh: Any) -> nn.Module:
    """Tensor parallelism inside every f and g."""
    for block in net[1:-1]:
        for fn in (block.f, block.g):
            parallelize_module(fn, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return net


@case(2, 4)
def tensor_parallel(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.world,))
    net = train(split_within(reversible(wide), mesh))
    assert isinstance(net[1].f[0].weight.grad, DTensor)
    agree(gradients(net), gradients(train(plain(wide))))
    agree(weights(net), weights(train(plain(wide))))


@case(2)
def tensor_parallel_functional_call(ranks: Ranks) -> None:
    net = split_within(reversible(wide), init_device_mesh("cpu", (ranks.world,)))
    given = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    x, y = batch()
    ((torch.func.functional_call(net, given, x) - y) ** 2).mean().backward()
    found = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in given.values()]
    agree(found, gradients(train(plain(wide), steps=1)))


@case(2)
def sequence_parallel(ranks: Ranks) -> None:
    """The stream itself is split along the sequence; f gathers it, and scatters what it returns."""
    mesh = init_device_mesh("cpu", (ranks.world,))

    def branch() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))

    torch.manual_seed(0)
    fns = [branch() for _ in range(4)]
    torch.manual_seed(0)
    alone = [branch() for _ in range(4)]
    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    for fn in fns:
        parallelize_module(fn, mesh, plan)
    x = torch.randn(2, 6, 2 * WIDTH)
    couplings = [inv.couple(f, g) for f, g in zip(fns[::2], fns[1::2], strict=True)]
    op = inv.checkpoint(inv.chain(inv.split(2, dim=2), *couplings, inv.concat(2, dim=2)))
    op(distribute_tensor(x, mesh, [Shard(1)])).full_tensor().square().mean().backward()
    x1, x2 = x.chunk(2, 2)
    for f, g in zip(alone[::2], alone[1::2], strict=True):
        x1 = x1 + f(x2)
        x2 = x2 + g(x1)
    torch.cat([x1, x2], 2).square().mean().backward()
    agree(*(gradients(nn.ModuleList(found)) for found in (fns, alone)))


@case(2, split=Shard(0), uneven=Shard(1), whole=Replicate())
def dtensor_activations(ranks: Ranks, value: Any) -> None:
    mesh = init_device_mesh("cpu", (ranks.world,))
    net = distribute_module(reversible(), mesh)
    x, y = batch(rows=7)
    out = net(distribute_tensor(x, mesh, [value]))
    ((out.full_tensor() - y) ** 2).mean().backward()
    alone = plain()
    loss(alone, x, y).backward()
    agree(gradients(net), gradients(alone))


# ---- two dimensions --------------------------------------------------------------------------------------------------


@case(4)
def fsdp_and_tensor_parallel(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    inner = Ranks(mesh.get_local_rank("data"), 2)
    nets = [split_within(make(wide), mesh["tensor"]) for make in (reversible, plain)]
    shard(nets[0], mesh=mesh["data"])
    shard_plain(nets[1], mesh=mesh["data"])
    for net in nets:
        train(net, inner.mine)
    agree(*map(gradients, nets))
    agree(gradients(nets[0]), gradients(train(plain(wide))))


@case(4)
def hybrid_sharding(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    nets = [shard(reversible(), mesh=mesh), shard_plain(plain(), mesh=mesh)]
    for net in nets:
        train(net, ranks.mine)
    agree(*map(gradients, nets))
    agree(gradients(nets[0]), gradients(train(plain())))


# ---- pipelines -------------------------------------------------------------------------------------------------------


@case(2, one_forward_one_backward=Schedule1F1B, all_forward_all_backward=ScheduleGPipe)
def pipeline(ranks: Ranks, value: Any) -> None:
    """Each rank has half of the blocks, as one trunk."""
    stem, *blocks, head = reversible()
    halves = inv.nn.Sequential(stem, *blocks[:2]), inv.nn.Sequential(*blocks[2:], head)
    mine = halves[ranks.rank]
    x, y = batch()
    # Without these examples the stage infers shapes by a step on memory that nobody has written.
    between = torch.zeros(2, 2 * WIDTH, requires_grad=True)
    inputs, outputs = (x[:2], between), (between, torch.zeros(2, 3, requires_grad=True))
    examples = {"input_args": inputs[ranks.rank], "output_args": outputs[ranks.rank]}
    stage = PipelineStage(mine, ranks.rank, ranks.world, torch.device("cpu"), **examples)
    schedule = value(stage, n_microbatches=4, loss_fn=lambda out, y: ((out - y) ** 2).mean())
    losses: list[Tensor] = []
    if ranks.rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=y, losses=losses)
    alone = train(plain(), steps=1)
    count = len(list(halves[0].parameters()))
    expected = gradients(alone)
    agree(gradients(mine), expected[:count] if ranks.rank == 0 else expected[count:])


# ---- on disk ---------------------------------------------------------------------------------------------------------


@case(2)
def distributed_checkpoint(ranks: Ranks) -> None:
    """Saved from sharded ranks; loaded into sharded ranks, and into one process that has nothing sharded."""
    folder = [tempfile.mkdtemp() if ranks.rank == 0 else ""]
    dist.broadcast_object_list(folder)
    net = train(shard(reversible()), ranks.mine)
    dcp.save({"net": net.state_dict()}, checkpoint_id=Path(folder[0]))
    other = shard(_zeroed(reversible()))
    state = {"net": other.state_dict()}
    dcp.load(state, checkpoint_id=Path(folder[0]))
    other.load_state_dict(state["net"])
    agree(weights(other), weights(net))
    alone = {"net": _zeroed(plain()).state_dict()}
    dcp.load(alone, checkpoint_id=Path(folder[0]))
    agree(list(alone["net"].values()), weights(net))
    train(other, ranks.mine)


@torch.no_grad()
def _zeroed(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        parameter.zero_()
    return net
