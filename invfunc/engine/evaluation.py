"""A call again, in backward: it hands over what its graph saves; rule 6 of NOTE [Trunk]."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..core.op import Again
from ..core.precision import narrow
from ..errors import DriftError, DriftWarning, ReplayError, place_error
from ..wires import Wire, map_wire, spread
from .conditions import PINS, Pinned
from .devices import Late, is_captured, send, when_here
from .frame import Like, Record, lay_out, shown, was_changed


class Stop(BaseException):
    """Everything has been handed over."""


class Evaluation(Again):
    """Evaluates the functions of a call again, and hands over what their graphs save; rule 6 of NOTE [Trunk]."""

    __slots__ = (
        "conditions",
        "count",
        "is_last",
        "kinds",
        "leaves",
        "like",
        "made",
        "record",
        "roots",
        "stops",
        "versions",
        "was",
    )

    def __init__(self, record: Record) -> None:
        self.record, self.like, self.kinds = record, record.like, record.kinds
        self.count = len(record.kinds)
        self.made: list[Any] = []
        self.versions: list[int] = []  # of what was made, when it was saved
        self.leaves, self.stops = 0, False
        self.is_last = False  # whether nobody wants the input that is rebuilt: it stops with the last that was saved
        self.roots: list[Tensor] = []  # the inputs that are leaves, as in forward
        self.conditions: ExitStack | None = None
        snapshot = record.conditions.snapshot
        self.was = snapshot.look() if snapshot.written or snapshot.filled else None
        self.rewind()

    # ---- what an op asks for ----

    def quietly(self, fn: Callable[..., Any], *args: Any) -> Any:
        return fn(*args)

    def evaluate(self, fn: Callable[..., Any], x: Wire, like: Wire) -> Any:
        return self._with_graph(fn, x, like, self.is_last and self.record.stops, spread)

    def hand_over(self, fn: Callable[[Wire], Any], x: Wire, like: Wire) -> None:
        if len(self.made) < self.count:
            try:
                self._with_graph(fn, x, like, self.record.stops, _call)
            except Stop:
                return

    def rewind(self) -> None:
        record = self.record
        if self.conditions is not None:
            self.conditions.close()
            self.conditions = None
        PINS.set(Pinned(record.pins) if record.pins else _NO_PINS)
        snapshot, same_cache = record.conditions.snapshot, self._has_same_cache()
        if record.random is not None or record.copies or not (same_cache and snapshot.is_same()):
            with ExitStack() as conditions:
                if not same_cache:
                    conditions.enter_context(_torch.under_parametrized(record.cache))
                if record.random is not None:
                    conditions.enter_context(record.random.restored())
                conditions.enter_context(snapshot.restored(record.copies, record.functions))
                self.conditions = conditions.pop_all()

    # ---- how ----

    def _has_same_cache(self) -> bool:
        return self.record.cache is None and _torch.parametrized_so_far() is None

    def _with_graph(self, fn: Callable[..., Any], x: Wire, like: Wire, stops: bool, call: Callable[..., Any]) -> Any:
        self.stops, self.roots = stops, []
        _torch.set_grad_enabled(True)
        try:
            x = map_wire(self._root, x, like)
            _torch.push_hooks(self.pack, self.unpack)
            try:
                if self.record.around is not None:
                    with self.record.around.replay():
                        return call(fn, x)
                return call(fn, x)
            except RuntimeError as error:
                if stops and len(self.made) == self.count:  # what TorchScript makes of it
                    raise Stop from error
                if type(error) is RuntimeError:  # torch's own; a subclass is what it says, such as a lack of memory
                    raise _replay_error(error) from error
                raise
            finally:
                _torch.pop_hooks()
        finally:
            _torch.set_grad_enabled(False)

    def _root(self, leaf: Any, like: Like | None) -> Any:
        """A rebuilt tensor for a graph, as in forward."""
        if like is None:
            return leaf
        kind, stride, leaf = like.kind, like.stride, narrow(leaf, like.dtype)
        if stride is not None and leaf.stride() != stride:
            leaf = lay_out(leaf, stride)
        if not kind:  # what rebuilt it may have switched gradients on, to take a derivative of its own
            return leaf.detach() if leaf.requires_grad else leaf
        root = leaf.detach().requires_grad_()
        if kind == 1:
            self.roots.append(root)
            return root
        # A result, for trunks inside as well; `view_as` forgets the strides of dimensions of size 1.
        return root[...] if stride is not None else root.clone()

    def pack(self, tensor: Tensor) -> Any:
        """The hook: what forward packed as a number is collected."""
        if tensor.requires_grad and tensor.is_leaf:
            place, expected = self.leaves, self.record.leaves
            self.leaves = place + 1
            if place >= len(expected) or expected[place] is not tensor:
                self._check_leaf(tensor, place)
            return tensor
        made = self.made
        place = len(made)
        if place < self.count and self.record.is_checked and (tensor.shape, tensor.dtype) != self.kinds[place]:
            found = f"as number {place} {shown([(tensor.shape, tensor.dtype)])}"
            raise self._saved_otherwise(found, shown([self.kinds[place]]))
        made.append(tensor)
        self.versions.append(tensor._version)
        if self.stops and place + 1 == self.count:
            raise Stop
        return place

    def unpack(self, packed: Any) -> Tensor:
        """The hook, for a gradient that the function takes itself."""
        return packed if isinstance(packed, Tensor) else self.made[packed]

    def _check_leaf(self, tensor: Tensor, place: int) -> None:
        if any([root is tensor for root in self.roots]):
            return  # in forward it was the input itself
        expected = self.record.leaves
        where = _torch.storage_of(tensor)  # a gradient inside of the function unpacks leaves as other objects
        same = [t for t in (*expected, *self.roots) if t is tensor or _torch.storage_of(t) == where]
        if place >= len(expected) or not (same or _has_values_of(expected[place], tensor)):
            raise ReplayError(_unmet(tuple(tensor.shape)), expected=_MET, cure=_REBIND)

    def _saved_otherwise(self, found: str, expected: str) -> ReplayError:
        around = self.record.around
        return ReplayError(
            f"the function saved {found} when it ran again",
            expected=f"{expected} as in forward",
            got="" if around is None else around.difference(),
            cure="the function must do the same twice; test an op with invfunc.testing.check_laws",
        )

    def finish(self) -> None:
        """Hand over what was made; this evaluation's graph is not needed, but a hook may have kept a part of it."""
        made = self.made
        self.abandon()
        if len(made) != self.count:
            raise self._saved_otherwise(f"{len(made)} tensors", str(self.count))
        frame, around = self.record.frame(), self.record.around
        if around is not None and not _torch.keeps_graph():
            around.let_go()
        if frame is not None:
            saved = zip(made, self.versions, strict=True)
            frame.saved = dict(enumerate([_without_node(tensor, version) for tensor, version in saved]))

    def abandon(self) -> None:
        """Forget everything."""
        self.made = []
        if self.conditions is not None:
            self.conditions.close()
        if self.was is not None:
            self.record.conditions.snapshot.take_away(self.was)


def _without_node(tensor: Tensor, version: int) -> Tensor | ReplayError:
    """A tensor that was saved, unless it has been written into since."""
    if tensor._version != version:
        return was_changed(tensor)
    return tensor if tensor.is_leaf else tensor.detach()


def _has_values_of(expected: Tensor, tensor: Tensor) -> bool:
    """Whether a leaf has the values of forward's: one that the function makes itself is another object each time."""
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype or tensor.device != expected.device:
        return False
    bound = torch.finfo(tensor.dtype).eps ** 0.5 * expected.detach().abs().sum()  # what it is made of has drifted
    differs = ((tensor - expected).detach().abs() > bound / max(1, expected.numel())).any()
    if tensor.is_cpu:
        return not differs
    if not is_captured(tensor.device):  # nobody waits for the device
        answer = send(differs)
        when_here([answer], partial(_tell_if_other, answer, tuple(tensor.shape)))
    return True


def _tell_if_other(answer: Late, shape: tuple[int, ...]) -> None:
    if answer.values():
        error = DriftError(_unmet(shape), expected=_MET, cure=_REBIND)
        warnings.warn(DriftWarning(str(error)), stacklevel=2)


def _unmet(shape: tuple[int, ...]) -> str:
    return f"the function met a tensor of shape {shape} that it did not meet in forward"


_MET = "the tensors that it closed over in forward"
_REBIND = "do not rebind what a function closes over between forward and backward"


def _replay_error(error: RuntimeError) -> ReplayError:
    found = ReplayError(
        f"the function raised when it ran again: {str(error).partition(chr(10))[0]}",
        expected="what it did in forward",
        cure="do not change what a function reads between forward and backward",
    )
    for note in getattr(error, "__notes__", ()):  # where it happened, from the inside out
        place_error(found, note.removeprefix("in "))
    return found


def _call(fn: Callable[[Wire], Any], x: Wire) -> Any:
    return fn(x)


_NO_PINS = Pinned(())


def evaluate_again(record: Record, rebuild: Callable[[Again], Any]) -> Any:
    """What ``rebuild(again)`` returns, with gradients off; what it evaluates with gradients is handed over."""
    return record.run(_evaluate_again, record, rebuild)


def _evaluate_again(record: Record, rebuild: Callable[[Again], Any]) -> Any:
    again = Evaluation(record)
    try:
        out = rebuild(again)
        again.finish()
        return out
    except BaseException:
        again.abandon()
        raise


def evaluate_quietly(record: Record, fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)`` as the call ran, with gradients off."""
    return record.run(_evaluate_quietly, record, fn, args)


def _evaluate_quietly(record: Record, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    again = Evaluation(record)
    try:
        return again.quietly(fn, *args)
    finally:
        again.abandon()


def in_backward(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)`` with gradients off, and outside of transforms that backward itself runs under."""
    before = torch.is_grad_enabled()
    _torch.set_grad_enabled(False)
    try:
        if _torch.active() or _torch.batched_depth():
            with _torch.below_transforms():
                return fn(*args)
        return fn(*args)
    finally:
        _torch.set_grad_enabled(before)
