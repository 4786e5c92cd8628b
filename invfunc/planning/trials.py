"""Trials: one op, run as it will run in a plan, and what that takes in bytes and seconds. See NOTE [Profile]."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._pytree import tree_map_only

from ..errors import NotInvertibleError
from ..invertible import Invertible
from ..lowering import Options, owners_of, rooted, walk
from ..memory import StorageLedger
from ..replay import recorded
from ..trunk import State, Strand, carrier, map_state, strands, values
from ..wires import Wire, is_differentiable, leaves, map_wire
from .costs import OpCosts
from .executor import follow, has_inverse, steps_of
from .inputs import as_input, copied, nbytes, realised, storages
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
    steps = steps_of((op,), (Recompute(0, (Store(0),)),), Options())

    def through(state: State) -> State:
        handed = [state]
        follow(steps, handed, Options())
        return handed.pop()

    return through


def nothing(state: State) -> State:
    """Through no op."""
    return state


class Joined(NamedTuple):
    """Whether gradients lie in one storage, as those of a concatenation's inputs do; and rebuilt values."""

    gradients: bool
    values: bool


APART = Joined(False, False)


@dataclass
class Sent:
    """What comes back to an op in backward."""

    values: list[Tensor]
    joined: Joined
    keeps: bool = False  # whether the gradients live on, as those at the end of a region do
    kept: list[Tensor] = field(default_factory=list)

    def prepare(self, keeps: bool) -> None:
        """Before backward: values that an inverse made can not be freed one by one."""
        self.keeps = keeps
        if self.values and self.joined.values:
            together = _joined([(v.shape, v.dtype, v.device) for v in self.values])
            self.values = [part.copy_(value) for part, value in zip(together, self.values, strict=True)]


class Trial:
    """An op that has run forward; `backward` runs it back.

    Args:
        through: How to run it.
        x: Its input.
        parameters: What it closes over.
        carried: Whether its input comes on a trunk.
        joined: Which of what comes back to it lie in one storage.
    """

    def __init__(
        self, through: Through, x: Wire, parameters: Sequence[Tensor], carried: bool = False, joined: Joined = APART
    ) -> None:
        anchor, self.gxs = torch.zeros((), requires_grad=True), list[Any]()
        carriers = [carrier(leaf).requires_grad_() for leaf in leaves(x) if carried and is_differentiable(leaf)]
        self.inputs, self.carried, left = [anchor, *carriers, *parameters], len(carriers), iter(carriers)
        root = partial(_on_strand, left)
        state = map_state(root, _rooted(anchor, x, self.gxs))
        del x
        state = through(state)
        self.y, ends = values(state), [s.carrier for s in strands(state) if s.carrier is not None]
        roots = [t for t in leaves(self.y) if is_differentiable(t) and t.requires_grad]
        self.sent = Sent([t.detach() for t in leaves(self.y) if ends and is_differentiable(t)], joined)
        self.seed = _Emit.apply(self.sent, len(roots), *roots, *ends)

    def backward(self) -> Joined:
        """Run back; which of what comes out lie in one storage."""
        if not self.seed.requires_grad:
            return APART
        found = torch.autograd.grad(self.seed, self.inputs, allow_unused=True)
        return Joined(_share(self.gxs), _share(found[1 : 1 + self.carried]))


def _share(tensors: Sequence[Tensor | None]) -> bool:
    """Whether tensors lie in one storage."""
    given = [t.untyped_storage()._cdata for t in tensors if t is not None]
    return len(set(given)) < len(given)


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
        gys = [torch.empty(shape, dtype=dtype, device=at) for shape, dtype, at in ctx.kinds if not ctx.sent.joined[0]]
        gys = gys or _joined(ctx.kinds)
        for gy in gys:
            gy.fill_(1.0)
        ys, ctx.sent.values = ctx.sent.values, []
        if ctx.sent.keeps:
            ctx.sent.kept += gys
        return (None, None, *gys, *ys)


def _joined(kinds: Sequence[tuple[torch.Size, torch.dtype, torch.device]]) -> list[Tensor]:
    """Tensors that lie in one storage."""
    _, dtype, device = kinds[0]
    sizes = [shape.numel() for shape, _, _ in kinds]
    parts = torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)
    return [part.view(shape) for part, (shape, _, _) in zip(parts, kinds, strict=True)]


def parameters_of(op: Invertible, x: Wire) -> list[Tensor]:
    """What an op closes over and gives gradients to."""
    _, recording = recorded(op.forward, map_wire(_detached, x), owners_of(op), True)
    return [t for t in recording.captured if t.requires_grad]


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


# ---- bytes -----------------------------------------------------------------------------------------------------------

LOOKS_AT_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


class Books(StorageLedger):
    """A ledger that takes real tensors among fake ones, such as parameters, for what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # real tensors, and the fake ones that stand for them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # fake tensors ask for each other's device all the time
            return func(*args)
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if mode is not None:
            args, kwargs = tree_map_only(Tensor, partial(self._in_mode, mode), (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _in_mode(self, mode: FakeTensorMode, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._before:
            self._before[id(tensor)] = tensor, mode.from_tensor(tensor)
        return self._before[id(tensor)][1]

    def take_peak(self) -> int:
        """The peak since it was last taken."""
        peak, self.peak = max(self.peak, self.balance()), self.balance()
        return peak

    def backward_peak(self, trial: Trial, keeps: bool) -> tuple[int, Joined]:
        """The peak while a trial runs back, and what it sends on in one storage."""
        trial.sent.prepare(keeps)
        self.take_peak()
        joins = trial.backward()
        return self.take_peak(), joins


@dataclass(frozen=True)
class Subject:
    """An op on fake tensors, to be measured; on real ones where it looks at their values."""

    op: Invertible
    x: Wire
    mode: FakeTensorMode
    joined: Joined  # what comes back to it

    def measured(self) -> tuple[OpCosts, Joined]:
        """Its bytes, and which of what it sends back lie in one storage."""
        op, parameters = self.op, self._try(parameters_of)
        found = self._try(_bytes_plain)
        found, joins = self._try(_bytes_taped, found, parameters, self.joined)
        if has_inverse(op):
            try:
                found, rebuilt = self._try(_bytes_undone, replace(found, inverse=0.0), parameters, self.joined)
                return found, Joined(joins.gradients, rebuilt.values)
            except NotInvertibleError:
                pass  # its structure does not tell
        return found, joins

    def _try(self, way: Callable[..., Any], *args: Any) -> Any:
        try:
            with self.mode:
                return way(self.op, self.x, *args)
        except LOOKS_AT_VALUES:
            return way(self.op, realised(None, self.x), *args)


def _bytes_plain(op: Invertible, x: Wire) -> OpCosts:
    with Books() as books, torch.no_grad():
        y = op.forward(x)
        peak = books.take_peak()
    gradient = sum(leaf.numel() * leaf.element_size() for leaf in leaves(y) if is_differentiable(leaf))
    return OpCosts(op.name, 0.0, 0.0, peak_forward=peak, bytes=nbytes(y), gradient=gradient)


def _bytes_taped(
    op: Invertible, x: Wire, found: OpCosts, parameters: list[Tensor], joined: Joined
) -> tuple[OpCosts, Joined]:
    weights = sum(p.numel() * p.element_size() for p in parameters)
    last, _ = _taped_once(op, x, found, parameters, joined, True)
    found, joins = _taped_once(op, x, replace(found, parameters=weights), parameters, joined, False)
    return replace(found, peak_backward_last=last.peak_backward - found.gradient), joins


def _bytes_undone(
    op: Invertible, x: Wire, found: OpCosts, parameters: list[Tensor], joined: Joined
) -> tuple[OpCosts, Joined]:
    last, _ = _undone_once(op, x, found, parameters, joined, True)
    found, joins = _undone_once(op, x, found, parameters, joined, False)
    return replace(found, peak_inverse_last=last.peak_inverse - found.gradient), joins


def _taped_once(
    op: Invertible, x: Wire, found: OpCosts, parameters: list[Tensor], joined: Joined, keeps: bool
) -> tuple[OpCosts, Joined]:
    with Books() as books:
        xs = copied(x)
        inputs, base = _watched(xs), nbytes(xs)
        books.take_peak()
        trial = Trial(taped(op), xs, parameters, joined=joined)
        forward = books.take_peak() - base
        outputs = _watched(trial.y)
        trial.y = xs = None
        held_in, held_out = _alive(inputs), _alive(outputs)
        tape = books.balance() - sum(held_in)
        back, joins = books.backward_peak(trial, keeps)
    found = replace(found, tape=tape, holds_input=held_in, holds_output=held_out)
    return replace(found, peak_taped=forward, peak_backward=back - sum(held_in)), joins


def _undone_once(
    op: Invertible, x: Wire, found: OpCosts, parameters: list[Tensor], joined: Joined, keeps: bool
) -> tuple[OpCosts, Joined]:
    with Books() as books:
        xs = copied(x)
        base = nbytes(xs)
        books.take_peak()
        trial = Trial(undone(op), xs, parameters, carried=True, joined=joined)
        forward = books.take_peak() - base
        xs = None
        residue = books.balance() - nbytes(trial.y)
        trial.y = None
        back, joins = books.backward_peak(trial, keeps)
    peaks = {"peak_forward": max(found.peak_forward, forward), "peak_inverse": back - residue}
    return replace(found, residue=residue, **peaks), joins


def _watched(x: Wire) -> list[Callable[[], Any]]:
    return [weakref.ref(storage) for storage in storages(x)]


def _alive(watched: Sequence[Callable[[], Any]]) -> tuple[int, ...]:
    return tuple(0 if storage() is None else storage().nbytes() for storage in watched)


# ---- seconds ---------------------------------------------------------------------------------------------------------


def timed(op: Invertible, x: Wire, invertible: bool, repeats: int) -> dict[str, float]:
    """The seconds of an op: what a trial takes beyond one of no op at all."""
    parameters = parameters_of(op, x)
    with torch.no_grad():
        y = as_input(op.forward(x))

    def seconds(through: Through, at: Wire, carried: bool = False) -> float:
        return least_seconds(lambda: Trial(through, at, parameters, carried).backward(), repeats, x)

    forward = least_seconds(lambda: recorded(op.forward, x, owners_of(op), True), repeats, x)
    idle, step, again = seconds(nothing, y), seconds(taped(op), x), seconds(rerun(op), x)
    inverse = seconds(undone(op), x, True) - seconds(nothing, y, True) - forward if invertible else math.inf
    found = {
        "forward": forward,
        "backward": step - idle - forward,
        "inverse": inverse,
        "region": again - step - forward,
    }
    return {name: max(value, 0.0) for name, value in found.items()}


def least_seconds(run: Callable[[], Any], repeats: int, x: Wire) -> float:
    """The least of some repeats."""
    on_cuda = any(isinstance(t, Tensor) and t.is_cuda for t in leaves(x))
    return min((_cuda_seconds if on_cuda else _cpu_seconds)(run) for _ in range(repeats))


def _cpu_seconds(run: Callable[[], Any]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run()
    return clock() - begin


def _cuda_seconds(run: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
