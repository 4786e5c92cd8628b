"""What one rank of many holds in a training step, from shapes alone.

NOTE [Simulation] The model runs a whole step on the meta device, where a tensor has a size and no memory, under the
ledger of `invfunc.measure`. What other ranks would make this one hold is played by tensors of the right size.

1.  *Replicated* (DDP): buckets of the size of the parameters exist before the step; gradients come on top of them.
2.  *Sharded* (FSDP2): before a block runs, its parameters arrive in one buffer and are copied out into another; the
    first is let go when the next block's have arrived, the second when the block has run.
3.  In backward a block's parameters come back as in rule 2, but for the first buffer, which is let go at once; the
    block before it is sent for meanwhile. Then the gradients are copied into a buffer, from which this rank's share is
    reduced; that buffer is let go when the next block's gradients are ready.
4.  The root's own parameters are gathered from the first moment to the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.sharding import pretending
from ..errors import OptionError
from ..look.memory import measure
from ..wires import Wire, is_differentiable, leaves, map_wire


@dataclass(frozen=True)
class Simulation:
    """The bytes that one rank holds.

    Attributes:
        weights: Its share of parameters, and all buffers.
        optimizer: Its share of the optimizer's state.
        buckets: What the gradients are sent from, if that outlives a step.
        step: The most that a step adds at one moment: gathered parameters, gradients and activations.

    Example:
        >>> Simulation(weights=400, optimizer=800, buckets=0, step=1000).peak_bytes
        2200
    """

    weights: int
    optimizer: int
    buckets: int
    step: int

    @property
    def peak_bytes(self) -> int:
        """The most that the rank holds at one moment."""
        return self.weights + self.optimizer + self.buckets + self.step


def total(y: Wire) -> Tensor:
    """The sum over all that a model returns, a loss for want of another."""
    return sum((leaf.sum() for leaf in leaves(y) if is_differentiable(leaf)), torch.zeros((), device="meta"))


def simulate(
    model: nn.Module,
    *xs: Any,
    ranks: int = 1,
    sharding: str = "none",
    optimizer_states: int = 2,
    loss: Callable[[Any], Tensor] = total,
) -> Simulation:
    r"""Predict what one rank of many holds in a training step, from shapes alone.

    .. math:: peak = \frac{(1 + k) P}{R} + \max_t\, (gathered_t + gradients_t + activations_t)

    for P bytes of parameters on R ranks and k states of the optimizer for each, if sharded; all of P if replicated.

    Args:
        model: On the meta device: build it inside ``with torch.device("meta")``.
        xs: Its arguments, this rank's share of the batch, on the meta device as well.
        ranks: Over how many ranks the model is replicated or sharded.
        sharding: ``"none"`` (one process), ``"ddp"`` (replicated by `torch.nn.parallel.DistributedDataParallel`) or
            ``"fsdp"`` (sharded by `invfunc.nn.fully_shard_blocks`), each with its default options.
        optimizer_states: How many tensors of a parameter's size the optimizer keeps: 2 for Adam, 0 for plain SGD.
        loss: From the model's output to a scalar.

    Returns:
        The bytes, by what they are for. No gradient is left from an earlier step (``zero_grad(set_to_none=True)``).

    Cost:
        One step of Python on the meta device; ``inv.mode("store")`` around it simulates plain training.

    Raises:
        OptionError: When the model is not on the meta device, or an option is none of those.

    Limits:
        One dtype for parameters and communication; tensor parallelism and offloading are not played; what the
        allocator, the kernels and the network library keep for themselves is not seen; values do not exist, so that a
        model whose shapes depend on them can not run.

    Example:
        >>> import torch, invfunc as inv
        >>> with torch.device("meta"):
        ...     blocks = [inv.nn.Coupling(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512)) for _ in range(8)]
        ...     net, x = inv.nn.Sequential(*blocks), torch.empty(64, 1024, requires_grad=True)
        >>> [simulate(net, x, ranks=ranks, sharding="fsdp").peak_bytes >> 20 for ranks in (1, 2, 8)]
        [69, 39, 16]

    Source:
        Rajbhandari et al., ZeRO (2020); the schedule of `torch.distributed.fsdp.fully_shard`.
    """
    _check(model, ranks, sharding)
    parameters = list(model.parameters())
    whole, buffers = _nbytes(parameters), _nbytes(list(model.buffers()))
    share = _nbytes(parameters, ranks) if sharding == "fsdp" else whole
    with _forgetting(parameters), _playing(model, ranks if sharding == "fsdp" else 0) as finish:
        step = measure(_step, model, xs, loss, finish).peak_bytes
    return Simulation(share + buffers, optimizer_states * share, whole * (sharding == "ddp"), step)


def _step(model: nn.Module, xs: Sequence[Any], loss: Callable[[Any], Tensor], finish: Callable[[], None]) -> None:
    loss(model(*xs)).backward()
    finish()


def _check(model: nn.Module, ranks: int, sharding: str) -> None:
    if sharding not in ("none", "ddp", "fsdp"):
        raise OptionError(f"simulate: sharding is {sharding!r}", expected="'none', 'ddp' or 'fsdp'")
    if ranks < 1 or (ranks > 1 and sharding == "none"):
        raise OptionError(
            f"simulate: {ranks} ranks with sharding={sharding!r}", expected="one rank, or 'ddp' or 'fsdp'"
        )
    found = next((name for name, t in model.named_parameters() if not t.is_meta), None)
    if found is not None:
        raise OptionError(
            f"simulate: {found} is not on the meta device",
            expected="a model without memory",
            cure='build it inside `with torch.device("meta")`',
        )


def _nbytes(tensors: Sequence[Tensor], ranks: int = 1) -> int:
    """The bytes of one rank's shares; a share is a part of the first dimension, rounded up."""
    return sum(t.nbytes if not t.dim() else math.ceil(t.shape[0] / ranks) * t[:1].nbytes for t in tensors)


@contextmanager
def _forgetting(parameters: list[nn.Parameter]) -> Iterator[None]:
    """A step begins without gradients, and leaves those that were."""
    held = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in zip(parameters, held, strict=True):
            p.grad = gradient


# ---- FSDP2, played by tensors without memory -------------------------------------------------------------------------


@dataclass(eq=False)
class Unit:
    """A block, or the root with what is in no block: what of its parameters is here now."""

    module: nn.Module
    parameters: list[nn.Parameter]
    ranks: int
    is_root: bool
    arriving: Tensor | None = None
    gathered: Tensor | None = None
    share: Tensor | None = None  # of its gradients
    done: bool = False

    def buffer(self, parameters: list[nn.Parameter]) -> Tensor:
        """One in which the parameters of all ranks have a place."""
        return _bytes(self.ranks * _nbytes(parameters, self.ranks))

    def send_for(self) -> None:
        """Begin to gather, unless it has been done."""
        if self.gathered is None and self.arriving is None:
            self.arriving = self.buffer(self.parameters)

    def copy_out(self) -> None:
        """Let a module use what has arrived."""
        if self.gathered is None:
            self.gathered = _bytes(_nbytes(self.parameters))


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="meta")


@dataclass
class Rank:
    """One rank of a sharded model during a step: rules 2 to 4 of NOTE [Simulation]."""

    units: list[Unit]
    order: list[Unit] = field(default_factory=list)
    arrived: Tensor | None = None  # what the last unit of forward was copied out of
    sent: Tensor | None = None  # what the last gradients were reduced from

    def before_forward(self, unit: Unit) -> None:
        unit.send_for()
        self.arrived = None
        unit.copy_out()
        self.arrived, unit.arriving = unit.arriving, None

    def after_forward(self, unit: Unit) -> None:
        self.order.append(unit)
        if unit.is_root:
            self.arrived = None
        else:
            unit.gathered = None

    def before_backward(self, unit: Unit) -> None:
        unit.send_for()
        unit.copy_out()
        unit.arriving = None
        before = self.order.index(unit) - 1
        if before >= 0 and not self.order[before].done:
            self.order[before].send_for()

    def after_backward(self, unit: Unit) -> None:
        if unit.done:
            return
        trained = [p for p in unit.parameters if p.grad is not None]
        unit.done, unit.gathered, self.sent = True, None, None
        self.sent = unit.buffer(trained)
        for p in trained:
            p.grad = None
        unit.share = _bytes(_nbytes(trained, unit.ranks))

    def finish(self) -> None:
        """What is left when backward ends: the root, and units whose inputs need no gradient."""
        for unit in self.units:
            self.after_backward(unit)
        self.sent = None


@contextmanager
def _playing(model: nn.Module, ranks: int) -> Iterator[Callable[[], None]]:
    """A model whose modules are sharded in play; gives what has to be done after backward."""
    if not ranks:
        yield lambda: None
        return
    rank = Rank(_units(model, ranks))
    with ExitStack() as stack:
        stack.enter_context(pretending([unit.module for unit in rank.units if not unit.is_root]))
        for unit in rank.units:
            _hook(rank, unit, stack)
        yield rank.finish


def _units(model: nn.Module, ranks: int) -> list[Unit]:
    from ..nn.distributed import blocks_of

    blocks = [block for block in blocks_of(model) if block is not model]
    inside = {id(p) for block in blocks for p in block.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [Unit(model, rest, ranks, True), *(Unit(block, list(block.parameters()), ranks, False) for block in blocks)]


def _hook(rank: Rank, unit: Unit, stack: ExitStack) -> None:
    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rank.before_forward(unit)
        return map_wire(lambda leaf: _watched(leaf, lambda _: rank.after_backward(unit)), args)

    def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        rank.after_forward(unit)
        for tensor in _tensors(out):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: rank.before_backward(unit))

    for handle in (unit.module.register_forward_pre_hook(enter), unit.module.register_forward_hook(leave)):
        stack.callback(handle.remove)


def _tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(out) if isinstance(leaf, Tensor)]


def _watched(leaf: Any, hook: Callable[[Tensor], None]) -> Any:
    """A view of what requires a gradient, with a hook that runs before those of the tensor itself."""
    if not (isinstance(leaf, Tensor) and leaf.requires_grad):
        return leaf
    view = leaf.view_as(leaf)
    view.register_hook(hook)
    return view
