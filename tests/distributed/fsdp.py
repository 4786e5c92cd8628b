"""FSDP2: what trains rightly, at the cost of a plain sharded model; and what would not train, and raises instead."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call

import invfunc as inv

from .harness import Collectives, Ranks, agree, case
from .networks import DEPTH, PlainCoupling, batch, dense, gradients, loss, plain, reversible, train, weights

shard = inv.nn.fully_shard_blocks


def shard_plain(net: nn.Module, **options: Any) -> nn.Module:
    """The control: plain blocks, sharded in the usual way."""
    for block in net:
        if isinstance(block, PlainCoupling):
            fully_shard(block, **options)
    return fully_shard(net, **options)


def both(**options: Any) -> list[nn.Module]:
    return [shard(reversible(), **options), shard_plain(plain(), **options)]


# ---- what trains rightly ---------------------------------------------------------------------------------------------


@case(2, 4, default={}, reshard={"reshard_after_forward": True}, keep={"reshard_after_forward": False})
def fsdp_equals_the_union(ranks: Ranks, value: dict[str, Any]) -> None:
    net, alone = train(shard(reversible(), **value), ranks.mine), train(plain())
    agree(gradients(net), gradients(alone))
    agree(weights(net), weights(alone))


@case(2, default={}, reshard={"reshard_after_forward": True}, keep={"reshard_after_forward": False})
def fsdp_collectives_are_those_of_plain(ranks: Ranks, value: dict[str, Any]) -> list[str]:
    counted = []
    for net in both(**value):
        with Collectives() as collectives:
            loss(net, *map(ranks.mine, batch())).backward()
        counted.append(collectives.names)
    assert counted[0] == counted[1]
    return counted[0]


@case(2)
def fsdp_of_blocks_that_a_module_calls(ranks: Ranks) -> None:
    """R1: `Lowered` blocks in an ordinary module, each sharded by hand; and in one pipeline."""

    def make(container: Any = nn.Sequential) -> nn.Module:
        stem, *blocks, head = plain()
        ops = [inv.chain(inv.split(2), inv.couple(block.f, block.g), inv.concat(2)) for block in blocks]
        return container(stem, *map(inv.nn.Lowered, ops), head)

    net = make()
    for block in net[1:-1]:
        fully_shard(block)
    train(fully_shard(net), ranks.mine)
    agree(gradients(net), gradients(train(plain())))
    for container in (nn.Sequential, inv.nn.Sequential):
        agree(gradients(train(shard(make(container)), ranks.mine)), gradients(net))


@case(2)
def fsdp_of_the_root_alone(ranks: Ranks) -> None:
    """R5: nothing is sharded during the step, and the gradients are right."""
    net = train(fully_shard(reversible()), ranks.mine)
    agree(gradients(net), gradients(train(plain())))


@case(2)
def fsdp_of_half_couplings(ranks: Ranks) -> None:
    """R8: every module that runs a stage of its own is a unit, f and g apart."""
    stem, *blocks, head = plain()
    parts: list[Any] = []
    for block in blocks:
        half = inv.nn.Coupling(block.f, sizes=None), inv.swap(), inv.nn.Coupling(block.g, sizes=None), inv.swap()
        parts += [inv.split(2), *half, inv.concat(2)]
    net = train(shard(inv.nn.Sequential(stem, *parts, head)), ranks.mine)
    agree(gradients(net), gradients(train(plain())))


@case(2)
def fsdp_of_a_chain_of_ops(ranks: Ranks) -> None:
    """Modules in a chain by their ``op``, with other ops between them; one of them turned around."""

    def make(net: nn.Module) -> nn.Module:
        stem, *blocks, head = net
        couplings = [inv.nn.Coupling(block.f, block.g) for block in blocks]
        ops = [couplings[0].op, inv.ops.tanh(), ~couplings[1].op, *(block.op for block in couplings[2:])]
        return inv.nn.Lowered(inv.chain(stem, *ops, head))

    net, alone = train(shard(make(plain())), ranks.mine), make(plain())
    with inv.mode("store"):
        train(alone)
    agree(gradients(net), gradients(alone))


@case(2)
def fsdp_of_a_module_of_ones_own(ranks: Ranks) -> None:
    class Scale(inv.nn.InvertibleModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([2.0, 0.5]))

        def function(self, x: Tensor) -> Tensor:
            return self.scale * x

        def inverse(self, y: Tensor) -> Tensor:
            return y / self.scale

    net = shard(inv.nn.Sequential(Scale(), Scale()))
    x, *_ = batch()
    net(ranks.mine(x[:, :2])).square().mean().backward()
    alone = [torch.tensor([2.0, 0.5], requires_grad=True) for _ in range(2)]
    (alone[1] * (alone[0] * x[:, :2])).square().mean().backward()
    agree(gradients(net), [t.grad for t in alone])


@case(2)
def fsdp_accumulates(ranks: Ranks) -> None:
    nets = both()
    for net in nets:
        for step in range(3):
            net.set_requires_gradient_sync(step == 2)
            loss(net, *map(ranks.mine, batch(step))).backward()
    agree(*map(gradients, nets))


@case(2)
def fsdp_frozen_parts(ranks: Ranks) -> list[str]:
    """A stem, a block, and a single weight that are not trained."""
    nets, counted = [make() for make in (reversible, plain)], []
    for net in nets:
        for part in (net[0], net[1], net[3].f[0].bias):
            part.requires_grad_(False)
    for net in (shard(nets[0]), shard_plain(nets[1])):
        train(net, ranks.mine)
        with Collectives() as collectives:
            loss(net, *map(ranks.mine, batch())).backward()
        counted.append(collectives.names)
    agree(*map(gradients, nets))
    assert [p.grad is None for p in nets[0].parameters()] == [p.grad is None for p in nets[1].parameters()]
    assert counted[0] == counted[1]
    return counted[0]


@case(2)
def fsdp_backward_twice_and_two_forwards(ranks: Ranks) -> None:
    nets = both()
    for net in nets:
        x, y = map(ranks.mine, batch())
        value = loss(net, x, y) + loss(net, *map(ranks.mine, batch(1)))
        value.backward(retain_graph=True)
        value.backward()
    agree(*map(gradients, nets))


@case(2)
def fsdp_marks_modes_and_segments(ranks: Ranks) -> None:
    """A block that is stored, one that is run again, a trunk that is cut, and all modes from outside."""
    expected = gradients(train(plain(), steps=1))
    net = reversible()
    net[1].checkpoint, net[2].invertible = False, False
    agree(gradients(train(shard(net), ranks.mine, steps=1)), expected)
    for mode in "invert", "store", "recompute":
        with inv.mode(mode):
            agree(gradients(train(shard(reversible()), ranks.mine, steps=1)), expected)
    agree(gradients(train(shard(_cut(reversible())), ranks.mine, steps=1)), expected)


def _cut(net: nn.Module) -> nn.Module:
    return inv.nn.Sequential(*net, segments=3)


@case(2)
def fsdp_inverse_and_no_grad(ranks: Ranks) -> None:
    net = shard(inv.nn.Sequential(*reversible()[1:-1]))
    for block in net[1:]:
        assert type(block).__name__ == "FSDPCoupling"
    x = torch.randn(3, 16)
    with torch.no_grad():
        y = net(x)
        agree([y, net[0].inverse(net[0](x))], [plain()[1:-1](x), x])
    loss(net, x, torch.zeros(())).backward()


@case(2)
def fsdp_inverse_trains(ranks: Ranks) -> None:
    """A pipeline read backwards gathers by the same hooks."""
    blocks = reversible()[1:-1]
    net = shard(inv.nn.Lowered(~inv.chain(*(block.op for block in blocks))))
    y = torch.randn(2 * ranks.world, 16)
    net(ranks.mine(y)).square().mean().backward()
    with inv.mode("store"):
        alone = inv.nn.Lowered(~inv.chain(*(block.op for block in reversible()[1:-1])))
        alone(y).square().mean().backward()
    agree(gradients(net), gradients(alone))


@case(2)
def fsdp_memory_is_flat(ranks: Ranks) -> list[int]:
    """Activations held after forward do not grow with the number of blocks; those of the plain control do."""
    held = {}
    for make, by in ((reversible, shard), (plain, shard_plain)):
        for depth in (4, 12):
            net = by(make(depth=depth))
            x, y = batch(rows=512)
            loss(net, x, y).backward()
            held[make, depth] = inv.measure(loss, net, x, y).held_bytes
    assert held[reversible, 12] <= 1.05 * held[reversible, 4]
    assert held[plain, 12] > 2 * held[plain, 4]
    return list(held.values())


@case(2)
def fsdp_keeps_the_stream_in_full_precision(ranks: Ranks) -> list[float]:
    """The worst relative error of a gradient at depth 48: rebuilt and stored on an fp32 stream, and on a bf16 stream."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net, usual = reversible(depth=48).float(), plain(depth=48).float()
    exact = plain(depth=48)
    exact.load_state_dict(usual.state_dict())
    loss(exact, *batch()).backward()
    shard(net, mp_policy=policy)
    shard_plain(usual, mp_policy=policy)
    errors = []
    for mode, sharded in (("invert", net), ("store", net), ("store", usual)):
        sharded.zero_grad()
        with inv.mode(mode):
            loss(sharded, *(ranks.mine(t).float() for t in batch())).backward()
        found = gradients(sharded)
        assert all(g.dtype == torch.float32 for g in found)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(found, gradients(exact), strict=True)))
    assert errors[0] <= 1.01 * errors[1]
    assert errors[0] <= errors[2]
    return errors


# ---- what would not train --------------------------------------------------------------------------------------------


class Trunk(nn.Module):
    """Functions that are sharded by themselves, called by a pipeline: the root's forward calls the Function."""

    def __init__(self, way: str) -> None:
        super().__init__()
        stem, *blocks, head = plain()
        self.stem, self.head, self.way = stem, head, way
        self.blocks = nn.ModuleList(blocks)
        for block in blocks:
            fully_shard(block.f)
            fully_shard(block.g)

    def forward(self, x: Tensor) -> Tensor:
        ways = {"R2": self.stagewise, "R3": self.stagewise, "R6": self.whole, "R6f": self.whole, "R9": self.unsharded}
        return self.head(ways[self.way](self.stem(x)))

    def functions(self) -> list[Any]:
        found = [fn for block in self.blocks for fn in (block.f, block.g)]
        again = [partial(functional_call, fn, dict(fn.named_parameters())) for fn in found]
        return again if self.way in ("R3", "R6f") else found

    def pipeline(self) -> inv.Invertible:
        pairs = zip(*[iter(self.functions())] * 2, strict=True)
        return inv.chain(inv.split(2), *(inv.couple(f, g) for f, g in pairs), inv.concat(2))

    def stagewise(self, x: Tensor) -> Tensor:
        return inv.checkpoint(self.pipeline())(x)

    def whole(self, x: Tensor) -> Tensor:
        op = self.pipeline()
        return inv.checkpoint(inv.pair(lambda x: op.forward(x), lambda y: op.inverse(y)))(x)

    def unsharded(self, x: Tensor) -> Tensor:
        for fn in self.functions():
            fn.unshard()
        return self.stagewise(x)


@case(2, **{way: way for way in ("R2", "R3", "R6", "R6f", "R9")})
def fsdp_guard(ranks: Ranks, value: str) -> str:
    return _refusal(fully_shard(Trunk(value)), ranks)


@case(2, R1fg=False, R1both=True)
def fsdp_guard_in_blocks(ranks: Ranks, value: bool) -> str:
    net = reversible()
    for block in net[1:-1]:
        for unit in (block.f, block.g, *[block] * value):
            fully_shard(unit)
    return _refusal(fully_shard(net), ranks)


@case(2)
def fsdp_guard_of_a_part(ranks: Ranks) -> str:
    """One layer of f is sharded."""
    net = reversible()
    fully_shard(net[1].f[0])
    return _refusal(fully_shard(net), ranks)


@case(2)
def fsdp_guard_of_a_recomputed_function(ranks: Ranks) -> str:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fully_shard(nn.Sequential(nn.Linear(6, 3)))

        def forward(self, x: Tensor) -> Tensor:
            return inv.checkpoint(self.inner)(x)

    return _refusal(fully_shard(Net()), ranks)


def _refusal(net: nn.Module, ranks: Ranks) -> str:
    """The message; no gradient has been written by then."""
    try:
        loss(net, *map(ranks.mine, batch())).backward()
    except inv.errors.ReplayError as error:
        assert all(p.grad is None for p in net.parameters())
        return str(error)
    raise AssertionError("nothing was raised")


@case(2)
def fsdp_errors_of_fully_shard_blocks(ranks: Ranks) -> list[str]:
    sharded = reversible()
    fully_shard(sharded[2].g)
    messages = []
    for net in (nn.Sequential(dense(4)), sharded):
        try:
            shard(net)
        except inv.errors.OptionError as error:
            messages.append(str(error))
    assert len(messages) == 2 and DEPTH > 2
    return messages
