"""What trains it: every library that frees activations, as one value each that turns a `Net` into a callable.

All compute the same function, but for momentumnet, which has one law of its own and is judged by it. Peers are
imported where they are built, so that one that is missing or broken costs no more than its own row.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import invfunc as inv
from invfunc.plan import Costs, profile

from .networks import Net

Call: TypeAlias = Callable[[Tensor], Tensor]
T = TypeVar("T")


def forward(call: Call, net: Net) -> Tensor:
    """The input comes from a layer before, so that it may be freed."""
    return call(net.x.clone())


def step(call: Call, net: Net) -> None:
    """Forward and backward of a loss that needs the output."""
    forward(call, net).square().mean().backward()


class Coupling(nn.Module):
    """``y1 = x1 + f(x2), y2 = x2 + g(y1)``, on one tensor, in plain autograd."""

    def __init__(self, f: nn.Module, g: nn.Module, dim: int) -> None:
        super().__init__()
        self.f, self.g, self.dim = f, g, dim

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, self.dim)
        y1 = x1 + self.f(x2)
        return torch.cat((y1, x2 + self.g(y1)), self.dim)

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2, self.dim)
        x2 = y2 - self.g(y1)
        return torch.cat((y1 - self.f(x2), x2), self.dim)


def streams(pairs: Sequence[tuple[nn.Module, nn.Module]], x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """The same on two tensors, through couplings: the least that training without any help takes."""
    for f, g in pairs:
        x1 = x1 + f(x2)
        x2 = x2 + g(x1)
    return x1, x2


def plain(net: Net) -> Call:
    return lambda x: torch.cat(streams(net.pairs, *x.chunk(2, net.dim)), net.dim)


class Twice(torch.autograd.Function):
    """The least code that evaluates each function twice: no check of anything, and the outputs are written over."""

    @staticmethod
    def forward(ctx: Any, net: Net, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.net, ctx.halves = net, [half.clone(memory_format=torch.contiguous_format) for half in x.chunk(2, net.dim)]
        for i, branch in enumerate(net.branches):
            ctx.halves[i % 2] += branch(ctx.halves[1 - i % 2])
        return torch.cat(ctx.halves, net.dim)

    @staticmethod
    def backward(ctx: Any, *gy: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor] = []
        halves, gradients = ctx.halves, [half.contiguous() for half in gy[0].chunk(2, ctx.net.dim)]
        for i, branch in reversed(list(enumerate(ctx.net.branches))):
            with torch.enable_grad():
                other = halves[1 - i % 2].detach().requires_grad_()
                t = branch(other.view_as(other))
            gx, *found[:0] = torch.autograd.grad(t, [other, *branch.parameters()], gradients[i % 2])
            gradients[1 - i % 2] = gx.add_(gradients[1 - i % 2])
            halves[i % 2] -= t.detach()
        return None, torch.cat(gradients, ctx.net.dim), *found


def by_hand(net: Net) -> Call:
    weights = [weight for branch in net.branches for weight in branch.parameters()]
    return lambda x: Twice.apply(net, x, *weights)  # pyright: ignore[reportReturnType]


def checkpointed(length: Callable[[int], int], net: Net, **options: Any) -> Call:
    """Torch's own, over segments of a length that depends on the depth."""
    size = length(len(net.pairs))
    segments = [net.pairs[i : i + size] for i in range(0, len(net.pairs), size)]

    def call(x: Tensor) -> Tensor:
        halves = x.chunk(2, net.dim)
        for segment in segments:
            halves = checkpoint(streams, segment, *halves, use_reentrant=False, **options)
        return torch.cat(halves, net.dim)  # pyright: ignore[reportArgumentType]

    return call


def couplings(net: Net) -> list[nn.Module]:
    return [Coupling(f, g, net.dim) for f, g in net.pairs]


def memcnn(net: Net) -> Call:
    with warnings.catch_warnings():  # its import warns, and silences every UserWarning of the process
        warnings.simplefilter("ignore")
        from memcnn import AdditiveCoupling, InvertibleModuleWrapper  # pyright: ignore[reportMissingImports]
    blocks = [AdditiveCoupling(f, g, split_dim=net.dim) for f, g in net.pairs]
    return nn.Sequential(*map(InvertibleModuleWrapper, blocks))


def invtorch_blocks(net: Net) -> list[nn.Module]:
    from invtorch.nn import Module  # pyright: ignore[reportMissingImports]

    class Block(Module):
        """InvTorch has no couplings: one as its users write it."""

        def __init__(self, coupling: nn.Module) -> None:
            super().__init__()
            self.function, self.inverse = coupling.forward, coupling.inverse

    return [Block(coupling) for coupling in couplings(net)]


def invtorch(net: Net) -> Call:
    return nn.Sequential(*invtorch_blocks(net))


def invtorch_sequential(net: Net) -> Call:
    from invtorch.nn import Sequential  # pyright: ignore[reportMissingImports]

    return Sequential(*invtorch_blocks(net))


def revtorch(net: Net) -> Call:
    from revtorch import ReversibleBlock, ReversibleSequence  # pyright: ignore[reportMissingImports]

    return ReversibleSequence(nn.ModuleList([ReversibleBlock(f, g, net.dim) for f, g in net.pairs]))


def revlib(net: Net) -> Call:
    from revlib import ReversibleSequential  # pyright: ignore[reportMissingImports]

    return ReversibleSequential(*net.branches, split_dim=net.dim)


def momentum(net: Net, use_backprop: bool = False) -> Call:
    """Its law on one stream: ``v = gamma v + (1 - gamma) f(x); x = x + v``, with the same functions in the same order."""
    from momentumnet import MomentumNet  # pyright: ignore[reportMissingImports]

    call = MomentumNet(net.branches, gamma=0.9, use_backprop=use_backprop)

    def on_half(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, net.dim)
        return torch.cat((call(x1), x2), net.dim)

    return on_half


def pipeline(net: Net) -> inv.Invertible:
    ends: dict[str, Any] = {"sizes": 2, "dim": net.dim}
    return inv.chain(inv.split(**ends), *[inv.couple(f, g) for f, g in net.pairs], inv.concat(**ends))


def lowered(net: Net) -> Call:
    return inv.checkpoint(pipeline(net))


def closures(net: Net) -> Call:
    """Functions that close over the modules, in a pipeline that is built anew in every call."""

    def call(x: Tensor) -> Tensor:
        blocks = [inv.couple(lambda x, f=f: f(x), lambda x, g=g: g(x)) for f, g in net.pairs]
        ends: dict[str, Any] = {"sizes": 2, "dim": net.dim}
        return inv.checkpoint(inv.chain(inv.split(**ends), *blocks, inv.concat(**ends)))(x)

    return call


def module(net: Net) -> Call:
    return inv.nn.Lowered(pipeline(net))


def sequential(container: Callable[..., Call], net: Net) -> Call:
    return container(*[inv.nn.Coupling(f, g, dim=net.dim) for f, g in net.pairs])


ATTENTION = ["_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"]
ATTENTION += ["_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"]


def attention_operators() -> list[Any]:
    return [getattr(torch.ops.aten, name).default for name in ATTENTION if hasattr(torch.ops.aten, name)]


def attention_kept(net: Net) -> Call:
    """Where there is attention its result is kept, and it runs once."""
    return inv.checkpoint(pipeline(net), keep=attention_operators())


def attention_kept_by_torch(net: Net) -> Call:
    """The same policy for torch's own, each block."""
    contexts = partial(create_selective_checkpoint_contexts, attention_operators())
    return checkpointed(lambda depth: 1, net, context_fn=contexts)


def planned(peer: Engine, net: Net) -> Call:
    """The fastest plan in the memory that a peer takes."""
    return planned_in(peak(peer.build(net), net), *plannable(net), net)


def plannable(net: Net) -> tuple[inv.Invertible, Costs]:
    """What is planned, and its costs.

    A plan leaves the input to its caller, who lets it go here: a copy of it is what the plan decides on, and no region
    begins at the input itself, which it would keep.
    """
    op = inv.chain(torch.clone, pipeline(net))
    costs = profile(op, net.x.detach())
    first, *others = costs.ops
    return op, replace(costs, ops=(replace(first, region=math.inf), *others))


def planned_in(limit: int, op: inv.Invertible, costs: Costs, net: Net) -> Call:
    """The fastest plan in a budget. It does not know of sums that are written in place: more may fit than it says."""
    plans = (inv.plan(costs, budget=limit + eighth * net.x.nbytes // 8) for eighth in range(8, -9, -1))
    return next(call for plan in plans if peak(call := inv.checkpoint(op, plan=plan), net) <= limit)


def exact(mode: str, net: Net) -> Call:
    return inv.checkpoint(inv.exact(pipeline(net), mode=mode))


def peak(call: Call, net: Net) -> int:
    """The most memory of a step, which finds its gradients allocated."""
    step(call, net)
    return inv.measure(step, call, net).peak_bytes


def attempt(build: Callable[[], T]) -> T | str:
    """What is returned, or in one line what is raised: a peer that fails is shown with its error."""
    try:
        return build()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"


@dataclass(frozen=True)
class Engine:
    """A name for the table, what builds the callable, and what its gradients are compared with."""

    name: str
    build: Callable[[Net], Call]
    reference: Callable[[Net], Call] = plain


PLAIN = Engine("plain", plain)
BLOCKWISE = Engine("torch checkpoint, each block", partial(checkpointed, lambda depth: 1))
SEGMENTS = Engine("torch checkpoint, sqrt segments", partial(checkpointed, math.isqrt))
INVFUNC = Engine("invfunc", lowered)
ATTENTION_KEPT = Engine("invfunc, attention kept", attention_kept)
ATTENTION_KEPT_BY_TORCH = Engine("torch checkpoint, each block, attention kept", attention_kept_by_torch)
ENGINES = (
    PLAIN,
    BLOCKWISE,
    SEGMENTS,
    Engine("MemCNN", memcnn),
    Engine("InvTorch, each block", invtorch),
    Engine("InvTorch Sequential", invtorch_sequential),
    Engine("RevTorch", revtorch),
    Engine("revlib", revlib),
    Engine("momentumnet", momentum, partial(momentum, use_backprop=True)),
    Engine("by hand", by_hand),
    INVFUNC,
    Engine("invfunc, closures, built in every call", closures),
    Engine("invfunc, nn.Lowered", module),
    Engine("invfunc, nn.Sequential of nn.Coupling", partial(sequential, inv.nn.Sequential)),
    Engine("invfunc, nn.Coupling in torch's Sequential", partial(sequential, nn.Sequential)),
    ATTENTION_KEPT,
    Engine("invfunc, planned in the peak of checkpoint, each block", partial(planned, BLOCKWISE)),
    Engine("invfunc, planned in the peak of checkpoint, sqrt", partial(planned, SEGMENTS)),
    Engine("invfunc, exact grid", partial(exact, "grid")),
    Engine("invfunc, exact codes", partial(exact, "codes")),
)
