"""Trials: one op, run as it will run in a plan. See NOTE [Profile]."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._torch import storage_of
from ..core.op import Invertible, graph_leaves
from ..engine.hooked import Hooked, OnTrunk
from ..engine.interface import Options, Run
from ..engine.lower import at_start, walk
from ..engine.parts import Parts
from ..engine.region import Region, conditions_of
from ..engine.snapshot import leave_random_state
from ..engine.trunk import Trunk
from ..errors import OptionError
from ..wires import Wire, is_differentiable, leaves, map_wire
from .executor import SubChain, follow, steps_of
from .inputs import tensors_of
from .keeping import POLICIES
from .schedule import Recompute, Store

Through = Callable[[OnTrunk, Run], OnTrunk]
Loss = Callable[[Wire], Tensor]


def by_tape(op: Invertible) -> Through:
    """Through an op with a tape."""
    return lambda state, run: walk(op, state, run.under(Options(mode="store")))


def by_inverse(op: Invertible, keep: str = "") -> Through:
    """Through an op on a trunk; results of this kind are kept."""
    options = Options(drift="off", keep=POLICIES.get(keep))
    return lambda state, run: walk(op, state, run.under(options))


def by_recompute(op: Invertible, keep: str = "") -> Through:
    """Through a region of one op, likewise."""
    stretch = SubChain.of(op)
    schedule = (Recompute(0, (Store(0),), bool(keep)),)
    steps = steps_of(stretch, (0, len(stretch.parts)), schedule, Options(), [keep])

    def through(state: OnTrunk, run: Run) -> OnTrunk:
        box = [state]
        del state
        follow(steps, box, run)
        return box.pop()

    return through


def no_op(state: OnTrunk, run: Run) -> OnTrunk:
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

    Values lie as forward has left them if it is not said how.

    Those of a concatenation's inputs lie in one storage. One that passes through an op keeps all of the storage alive
    that it is a part of, and one that does not lie in order is copied for a function that has seen it in order.
    """

    gradients: Layout = ()
    values: Layout | None = None


def layout_of(tensors: Sequence[Tensor | None]) -> Layout:
    """How tensors lie in memory, if all are there."""
    given = [t for t in tensors if t is not None]
    numbers = {storage_of(t): i for i, t in reversed(list(enumerate(given)))}
    places = [numbers[storage_of(t)] for t in given]
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


APART = Layouts()  # as the last op's output comes back


@dataclass
class Sent:
    """What comes back to an op in backward: values, and gradients."""

    values: list[Tensor]
    layouts: Layouts
    gradient: int = 0  # bytes

    def prepare(self) -> None:
        """Before backward: values lie as an inverse makes them."""
        if self.layouts.values is not None:
            made = laid_out([(v.shape, v.dtype, v.device) for v in self.values], self.layouts.values)
            self.values = [part.copy_(value) for part, value in zip(made, self.values, strict=True)]

    def lend(self, gradients: list[Tensor]) -> None:
        """In backward: the gradients that it begins with; Python has seen them, so that nothing is added in place."""
        self.gradient = sum({storage_of(g): g.untyped_storage().nbytes() for g in gradients}.values())


class Trial:
    """An op that has run forward; `backward` runs it back.

    Args:
        through: How to run it.
        x: Its input.
        parameters: What it closes over.
        carried: Whether its input comes on a trunk.
        layouts: How what comes back to it lies in memory.
        is_first: Whether nobody wants its input again.
    """

    def __init__(
        self,
        through: Through,
        x: Wire,
        parameters: Sequence[Tensor],
        carried: bool = False,
        layouts: Layouts = APART,
        is_first: bool = False,
    ) -> None:
        anchor, self.gxs = torch.zeros((), requires_grad=True), list[Any]()
        self.inputs, self.carried = [anchor, *parameters], carried
        run = Run(Hooked(()), Options(drift="off"))
        state = run.engine.begin(_rooted(anchor, x, self.gxs), run, partial(at_start, through))
        del x
        state = through(state, run)
        self.y, self.trunk = state.wire, state.trunk
        self.trunk.levels.is_wanted = not is_first
        roots = [t for t in leaves(self.y) if is_differentiable(t) and t.requires_grad]
        ends = [t.detach() for t in leaves(self.y) if is_differentiable(t)] if carried else []  # by the op behind
        self.sent = Sent(ends, layouts)
        self.start = partial(_start, self.trunk, map_wire(_other, self.y))
        self.seed = _Emit.apply(self.sent, self.start, *roots) if roots else anchor.detach()

    def backward(self) -> Layouts:
        """Run back; how what comes out lies in memory."""
        if not self.seed.requires_grad:
            return APART
        torch.autograd.grad(self.seed, self.inputs, allow_unused=True)
        rebuilt: list[Any] = []
        if self.carried and self.trunk.levels.items and self.trunk.levels.is_wanted:
            rebuilt = [t for t in leaves(self.trunk.bottom()) if is_differentiable(t)]
        return Layouts(layout_of(self.gxs), layout_of(rebuilt))


def _other(leaf: Any) -> Any:
    """A leaf that can not have a gradient; a mark in the place of others."""
    return Tensor if is_differentiable(leaf) else leaf


def _start(trunk: Trunk, spec: Wire, values: list[Tensor]) -> None:
    """Begin to undo a trunk at these values."""
    left = iter(values)
    if values:
        trunk.start_at(map_wire(lambda leaf: next(left) if leaf is Tensor else leaf, spec))


def _rooted(anchor: Tensor, x: Wire, gxs: list[Any]) -> Wire:
    """A wire as roots of a graph, which does not keep it alive; backward puts their gradients into a list."""
    xs = [leaf for leaf in leaves(x) if is_differentiable(leaf)]
    gxs[:] = [None] * len(xs)
    roots = iter(_Root.apply((gxs, [leaf.requires_grad for leaf in xs]), anchor, *[leaf.detach() for leaf in xs]))
    return map_wire(lambda leaf: next(roots) if is_differentiable(leaf) else leaf, x)


class _Root(torch.autograd.Function):
    """``(sink, anchor, *xs) -> xs``: roots that their graph does not keep alive, as an AccumulateGrad does its leaf."""

    @staticmethod
    def forward(ctx: Any, sink: Any, anchor: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.gxs, wanted = sink
        ctx.set_materialize_grads(False)
        out = tuple([x.detach() for x in xs])
        ctx.mark_non_differentiable(*[o for o, want in zip(out, wanted, strict=True) if not want])
        return out

    @staticmethod
    def backward(ctx: Any, *gxs: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.gxs[:] = gxs
        return (None,) * (2 + len(gxs))


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


class _Emit(torch.autograd.Function):
    """``(sent, start, *ys) -> number``: backward makes the gradients that a chain would send, and the values."""

    @staticmethod
    def forward(ctx: Any, sent: Sent, start: Callable[[list[Tensor]], None], *ys: Tensor) -> Tensor:
        ctx.sent, ctx.start = sent, start
        ctx.kinds = [(t.shape, t.dtype, t.device) for t in ys]
        return ys[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        gys = laid_out(ctx.kinds, ctx.sent.layouts.gradients)
        for gy in gys:
            gy.fill_(1.0)
        ys, ctx.sent.values = ctx.sent.values, []
        ctx.sent.lend(gys)
        ctx.start(ys)
        return (None, None, *gys)


class Forward(NamedTuple):
    """A forward run of an op: what it closes over and gives gradients to, and what it takes to run it again."""

    parameters: list[Tensor]
    region: Region


def forward_of(op: Invertible, x: Wire) -> tuple[Wire, Forward]:
    """An op's output, and its forward run."""
    roots = map_wire(_as_root, x)
    region = Region(op.forward, lambda tensors: tensors, None, conditions_of(op.functions), Options())
    with torch.enable_grad():
        y = region.run((as_result(roots),), [], op.functions)
    return map_wire(_detached, y), Forward(closed_over(y, roots), region)


def with_graph(op: Invertible, x: Wire) -> tuple[Wire, Wire]:
    """An op's output with its graph, as plain autograd makes it, and the roots of that."""
    roots = map_wire(_as_root, x)
    with torch.enable_grad():
        return op.forward(roots), roots


def closed_over(y: Wire, roots: Wire) -> list[Tensor]:
    """The leaves that an output depends on beside its roots."""
    ends = [t for t in tensors_of(y) if t.requires_grad]
    return graph_leaves(ends, {id(leaf) for leaf in leaves(roots)})


def as_result(x: Wire) -> Wire:
    """A wire as an op's output: a leaf would be saved as it is, and not counted."""
    with torch.enable_grad():
        return map_wire(lambda leaf: leaf.view_as(leaf) if is_differentiable(leaf) else leaf, x)


def _as_root(leaf: Any) -> Any:
    return leaf.detach().requires_grad_() if is_differentiable(leaf) else leaf


def parameters_of(op: Invertible, x: Wire) -> list[Tensor]:
    """What an op closes over and gives gradients to."""
    return forward_of(op, x)[1].parameters


def number_of(loss: Loss, y: Any) -> Tensor:
    """The loss of an output; what is none is refused."""
    if not callable(loss):
        raise OptionError(f"plan: loss is of type {type(loss).__name__}", expected="a function of the output")
    number = loss(y)
    if not (isinstance(number, Tensor) and number.numel() == 1 and number.requires_grad):
        got = f"shape {tuple(number.shape)}" if isinstance(number, Tensor) else type(number).__name__
        without = ", without a graph" * (isinstance(number, Tensor) and not number.requires_grad)
        raise OptionError("plan: loss", expected="one number that depends on the output", got=got + without)
    return number


_DICTS = dict, OrderedDict  # any other may say that it can not be written


@contextmanager
def untouched(*ops: Invertible) -> Iterator[None]:
    """Leave no trace: buffers, attributes, what is in dicts, hooks among it, and the random numbers to come stay."""
    modules = [module for op in ops for module in Parts(op.functions).roots]
    buffers = list({id(b): b for module in modules for b in module.buffers()}.values())
    before = [b.clone() for b in buffers]
    owned = list({id(m): m.__dict__ for module in modules for m in module.modules()}.values())
    tables = [*owned, *(table for attributes in owned for table in attributes.values() if type(table) in _DICTS)]
    entries = [table.copy() for table in tables]
    try:
        with leave_random_state(function for op in ops for function in op.functions):
            yield
    finally:
        for table, entry in zip(tables, entries, strict=True):  # a cache, say, that was made of fake tensors
            table.clear()
            table.update(entry)
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
