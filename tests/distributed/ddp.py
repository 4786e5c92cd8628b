"""Data parallelism: every mode of DDP, the order of its buckets, and what a step holds of gradients."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import invfunc as inv

from .harness import Ranks, agree, case
from .networks import batch, gradients, loss, normed, plain, reversible, train, weights


@case(
    2,
    4,
    default={},
    find_unused_parameters={"find_unused_parameters": True},
    static_graph={"static_graph": True},
    gradient_as_bucket_view={"gradient_as_bucket_view": True},
    small_buckets={"bucket_cap_mb": 0.001},
)
def ddp_equals_the_union(ranks: Ranks, value: dict[str, Any]) -> None:
    net = train(DistributedDataParallel(reversible(), **value), ranks.mine)
    alone = train(plain())
    agree(gradients(net), gradients(alone))
    agree(weights(net), weights(alone))


@case(2, 4, default=False, bucket_view=True)
def ddp_no_sync_accumulates(ranks: Ranks, value: bool) -> None:
    net, alone = DistributedDataParallel(reversible(), gradient_as_bucket_view=value), plain()
    with net.no_sync():
        for step in range(2):
            loss(net, *map(ranks.mine, batch(step))).backward()
    loss(net, *map(ranks.mine, batch(2))).backward()
    for step in range(3):
        loss(alone, *batch(step)).backward()
    agree(gradients(net), gradients(alone))


@case(2, synced=True, local=False)
def ddp_buffers_are_those_of_plain(ranks: Ranks, value: bool) -> None:
    """A batch norm sees its rank's share, so that the control is the plain network under DDP."""
    nets = [DistributedDataParallel(make(normed), forward_sync_buffers=value) for make in (reversible, plain)]
    for net in nets:
        train(net, ranks.mine)
    agree(*map(gradients, nets))
    agree(*(list(net.buffers()) for net in nets))
    assert nets[0].get_buffer("module.1.f.0.num_batches_tracked") == 3


@case(2)
def ddp_blocks_skipped_by_a_rank(ranks: Ranks) -> None:
    class Skipping(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            stem, *blocks, head = self.net
            x = stem(x)
            for block in blocks[ranks.rank :]:
                x = block(x)
            return head(x)

    nets = [DistributedDataParallel(Skipping(make()), find_unused_parameters=True) for make in (reversible, plain)]
    for net in nets:
        train(net, ranks.mine)
    agree(*map(gradients, nets))


@case(2)
def ddp_module_that_is_one_pipeline(ranks: Ranks) -> None:
    """Functions in a chain, not modules in a container."""

    def make() -> nn.Module:
        net = plain()
        stem, *blocks, head = net
        ops = [inv.couple(block.f, block.g) for block in blocks]
        return inv.nn.Lowered(inv.chain(stem, inv.split(2), *ops, inv.concat(2), head), segments=2)

    net, alone = train(DistributedDataParallel(make()), ranks.mine), train(plain())
    agree(gradients(net), gradients(alone))


@case(2)
def ddp_launches_buckets_block_by_block(ranks: Ranks) -> list[str]:
    """The first bucket leaves before the last block has its gradients."""
    net = DistributedDataParallel(reversible(), bucket_cap_mb=0.001)
    train(net, ranks.mine, steps=1)  # after its first step DDP orders buckets as gradients arrive
    events: list[str] = []

    def launch(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        events.append("bucket")
        future = dist.all_reduce(bucket.buffer().div_(ranks.world), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    net.register_comm_hook(None, launch)
    for name, parameter in net.module.named_parameters():
        if name.endswith("f.0.weight"):
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: events.append(name.partition(".")[0]))
    train(net, ranks.mine, steps=1)
    assert [event for event in events if event != "bucket"] == ["4", "3", "2", "1"]
    assert all("bucket" in events[events.index(a) : events.index(b)] for a, b in ("43", "32", "21"))
    return events


@case(2)
def ddp_holds_one_block_of_gradients(ranks: Ranks) -> float:
    """What a backward holds of gradients on their way to ``.grad``, as a part of the parameters; a batch of one row."""
    net = DistributedDataParallel(reversible(depth=12, width=64), gradient_as_bucket_view=True)
    x, y = batch(rows=1)
    for _ in range(2):
        loss(net, x, y).backward()
    value = loss(net, x, y)
    transient = inv.measure(value.backward).peak_bytes
    share = transient / sum(p.nbytes for p in net.parameters())
    assert share <= 0.15
    return share


@case(2, 4)
def actnorm_starts_alike_from_the_union(ranks: Ranks) -> None:
    """The ranks' shares have other sizes and other statistics."""
    x = torch.randn(4 * ranks.world, 3) * 5 + torch.arange(4.0 * ranks.world)[:, None]
    sizes = [4 * ranks.world - 3 * (ranks.world - 1)] + [3] * (ranks.world - 1)
    net = nn.Sequential(nn.Linear(3, 3), inv.nn.Sequential(inv.nn.ActNorm(3), inv.nn.ActNorm(3)))
    alone = copy.deepcopy(net)
    start_alone(alone, x)
    net = DistributedDataParallel(net)
    net(x.split(sizes)[ranks.rank])
    agree(weights(net.module), weights(alone))
    own = torch.cat(weights(net.module[1]))
    everyone = [torch.zeros_like(own) for _ in range(ranks.world)]
    dist.all_gather(everyone, own)
    assert all(torch.equal(rank, everyone[0]) for rank in everyone)


def start_alone(net: nn.Module, x: torch.Tensor) -> None:
    """Start two `ActNorm` behind a layer as one process would, from all of the batch."""
    with torch.no_grad():
        for i, norm in enumerate(net[1]):
            before = net[0](x) if i == 0 else net[1][0].op(net[0](x))
            for parameter, value in zip((norm.log_scale, norm.bias), inv.ops.actnorm_init(before), strict=True):
                parameter.copy_(value)
            norm.initialised = True


@case(2)
def actnorm_of_one_vector_on_each_rank(ranks: Ranks) -> None:
    net = inv.nn.ActNorm(2)
    x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    net(ranks.mine(x))
    assert net.initialised
    agree([net(x).detach()], [torch.tensor([[-1.0, -1.0], [1.0, 1.0]])], 1e-5)


@case(2)
def actnorm_of_a_batch_with_nan_on_one_rank(ranks: Ranks) -> None:
    """Every rank raises, none has started, and the next batch starts them alike."""
    net, x = inv.nn.ActNorm(2), torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    bad = x.clone()
    bad[1, 1] = torch.nan
    try:
        net(ranks.mine(bad))
    except inv.errors.DomainError as error:
        assert "NaN or infinity in channels [1]" in str(error)
    else:
        raise AssertionError("a rank has started")
    assert not net.initialised
    net(ranks.mine(x))
    agree([net(x).detach()], [torch.tensor([[-1.0, -1.0], [1.0, 1.0]])], 1e-5)


@case(2)
def actnorm_of_a_group_of_ranks(ranks: Ranks) -> None:
    groups = [dist.new_group([rank]) for rank in range(ranks.world)]
    net = inv.nn.ActNorm(1, process_group=groups[ranks.rank])
    y = net(torch.tensor([[1.0], [3.0]]) * (1 + ranks.rank))
    agree([y.detach()], [torch.tensor([[-1.0], [1.0]])], 1e-5)


@case(2)
def actnorm_that_only_the_first_rank_has_loaded(ranks: Ranks) -> None:
    """DDP hands the flag on with the parameters, so that no rank waits for a start that the others have behind them."""
    net = inv.nn.ActNorm(3)
    if not ranks.rank:
        net.load_state_dict({"log_scale": torch.ones(3), "bias": torch.ones(3)})
    net = DistributedDataParallel(net)
    net(torch.randn(4, 3)).sum().backward()
    agree(weights(net), [torch.ones(3), torch.ones(3)])
