"""Trials: one op, run as it will run in a plan. See NOTE [Profile]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from weakref import ref

import torch
from torch import Tensor

from ..core.op import Invertible
from ..engine.lowering import Options, owners_of, rooted, walk
from ..engine.replay import Recording, recorded
from ..engine.strands import State, Strand, carriers, map_state, strands, values
from ..wires import Wire, is_differentiable, leaves, map_wire
from .executor import Stretch, follow, steps_of
from .schedule import Recompute, Store

Through = Callable[[State], State]
Loss = Callable[[Wire], Tensor]


def taped(op: Invertible) -> Through:
    """Through an op with a tape."""
    return lambda state: walk(op, state, Options(mode="store"))


def undone(op: Invertible) -> Through:
    """Through an op on a trunk."""
    return lambda state: walk(op, state, Options())


def rerun(op: Invertible) -> Through:
    """Through a region of one op."""
    stretch = Stretch.of(op)
    steps = steps_of(stretch, (0, len(stretch.parts)), (Recompute(0, (Store(0),)),), Options())

    def through(state: State) -> State:
        handed = [state]
        follow(steps, handed)
        return handed.pop()

    return through


def nothing(state: State) -> State:
    """Through no op."""
    return state


class Place(NamedTuple):
    """Where a tensor lies: in which of some storages, of how many bytes, and where in that."""

    storage: int
    bytes: int
    stride: tuple[int, ...]
    offset: int


Layout: TypeAlias = tuple[Place, ...]  # of tensors
Like: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]


class Layouts(NamedTuple):
    """How gradients lie in memory, and rebuilt values; nothing where each fills a storage of its own, in order.

    Those of a concatenation's inputs lie in one storage. One that passes through an op keeps all of the storage alive
    that it is a part of, and one that does not lie in order is copied for a function that has seen it in order.
    """

    gradients: Layout = ()
    values: Layout = ()


def layout_of(tensors: Sequence[Tensor | None]) -> Layout:
    """How tensors lie in memory, if all are there."""
    given = [t for t in tensors if t is not None]
    numbers = {t.untyped_storage()._cdata: i for i, t in reversed(list(enumerate(given)))}
    places = [numbers[t.untyped_storage()._cdata] for t in given]
    apart = places == list(range(len(given))) and all(map(_fills_its_storage, given))
    if apart or len(given) < len(tensors):
        return ()
    return tuple(
        Place(i, t.untyped_storage().nbytes(), t.stride(), int(t.storage_offset()))
        for i, t in zip(places, given, strict=True)
    )


def _fills_its_storage(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def laid_out(likes: Sequence[Like], layout: Layout) -> list[Tensor]:
    """New tensors that lie in memory like this."""
    if len(layout) != len(likes):
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in likes]
    bases: dict[tuple[int, torch.dtype], Tensor] = {}
    made: list[Tensor] = []
    for (shape, dtype, device), place in zip(likes, layout, strict=True):
        key = place.storage, dtype
        if key not in bases:
            bases[key] = torch.empty(place.bytes // dtype.itemsize, dtype=dtype, device=device)
        made.append(bases[key].as_strided(shape, place.stride, place.offset))
    return made


APART = Layouts()


@dataclass
class Sent:
    """What comes back to an op in backward: values, and gradients, of which it is seen when they are let go."""

    values: list[Tensor]
    layouts: Layouts
    sizes: dict[ref[torch.UntypedStorage], int] = field(default_factory=dict)

    def prepare(self) -> None:
        """Before backward: values lie as an inverse makes them."""
        if self.layouts.values:
            made = laid_out([(v.shape, v.dtype, v.device) for v in self.values], self.layouts.values)
            self.values = [part.copy_(value) for part, value in zip(made, self.values, strict=True)]

    def lend(self, gradients: list[Tensor]) -> None:
        """In backward: the gradients that it begins with; Python has seen them, so that nothing is added in place."""
        self.sizes = {ref(g.untyped_storage()): g.untyped_storage().nbytes() for g in gradients}

    @property
    def gone(self) -> int:
        """Bytes of gradients that have been let go."""
        return sum(size for storage, size in self.sizes.items() if storage() is None)


class Trial:
    """An op that has run forward; `backward` runs it back.

    Args:
        through: How to run it.
        x: Its input.
        parameters: What it closes over.
        carried: Whether its input comes on a trunk.
        layouts: How what comes back to it lies in memory.
    """

    def __init__(
        self, through: Through, x: Wire, parameters: Sequence[Tensor], carried: bool = False, layouts: Layouts = APART
    ) -> None:
        anchor, self.gxs = torch.zeros((), requires_grad=True), list[Any]()
        above = [c.requires_grad_() for c in carriers(filter(is_differentiable, leaves(x)))] if carried else []
        self.inputs, self.carried, left = [anchor, *above, *parameters], len(above), iter(above)
        root = partial(_on_strand, left)
        state = map_state(root, _rooted(anchor, x, self.gxs))
        del x
        state = through(state)
        self.y, ends = values(state), [s.carrier for s in strands(state) if s.carrier is not None]
        roots = [t for t in leaves(self.y) if is_differentiable(t) and t.requires_grad]
        self.sent = Sent([t.detach() for t in leaves(self.y) if ends and is_differentiable(t)], layouts)
        self.seed = _Emit.apply(self.sent, len(roots), *roots, *ends) if roots or ends else anchor.detach()

    def backward(self) -> Layouts:
        """Run back; how what comes out lies in memory."""
        if not self.seed.requires_grad:
            return APART
        found = torch.autograd.grad(self.seed, self.inputs, allow_unused=True)
        return Layouts(layout_of(self.gxs), layout_of(found[1 : 1 + self.carried]))


def _on_strand(carriers: Any, leaf: Any) -> Any:
    return Strand(leaf, next(carriers, None)) if is_differentiable(leaf) else leaf


def _rooted(anchor: Tensor, x: Wire, gxs: list[Any]) -> Wire:
    needs = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves(x)]
    return rooted(anchor, map_wire(_detached, x), needs, gxs)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


class _Emit(torch.autograd.Function):
    """``(sent, n, *ys, *carriers) -> number``: backward makes the gradients that a chain would send, and the values."""

    @staticmethod
    def forward(sent: Sent, count: int, *tensors: Tensor) -> Tensor:
        return tensors[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.sent, count, *tensors = inputs
        ctx.kinds = [(t.shape, t.dtype, t.device) for t in tensors[:count]]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        gys = laid_out(ctx.kinds, ctx.sent.layouts.gradients)
        for gy in gys:
            gy.fill_(1.0)
        ys, ctx.sent.values = ctx.sent.values, []
        ctx.sent.lend(gys)
        return (None, None, *gys, *ys)


def forward_of(op: Invertible, x: Wire) -> tuple[Wire, Recording]:
    """An op's output, and the record of its forward."""
    return recorded(op.forward, map_wire(_detached, x), owners_of(op), True)


def trained(recording: Recording) -> list[Tensor]:
    """What a recorded op closes over and gives gradients to."""
    return [t for t in recording.captured if t.requires_grad]


def parameters_of(op: Invertible, x: Wire) -> list[Tensor]:
    """What an op closes over and gives gradients to."""
    return trained(forward_of(op, x)[1])


@contextmanager
def untouched(*ops: Invertible) -> Iterator[None]:
    """Leave no trace: buffers, such as running statistics, and the random numbers to come are as before."""
    buffers = [b for op in ops for module in owners_of(op).modules for b in module.buffers()]
    before = [b.clone() for b in buffers]
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
