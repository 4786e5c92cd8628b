"""Conditions: what a call runs under, and runs again under in backward.

NOTE [Conditions] A function that runs again has to find what it found in forward, on whatever thread it runs.

1.  *Random numbers* are replayed on the CPU and on every accelerator that is in sight of the call: those of its inputs,
    of what its modules and closures hold, those that they name, the default one, or else the current one. States are
    kept only if the call drew. Python's and NumPy's global generators count, too; a generator of one's own can not be
    seen, and its values have to be pinned. While a graph is captured no state can be read, and a call that draws is
    refused.
2.  *Autocast* of every type of device, the *default device* and, on the thread of forward, the number of *threads*:
    backward may run elsewhere, and no other thread's setting is touched. The *flags* of the process that choose a
    kernel (of attention, matrix products, cuDNN, determinism) are those of forward while a function runs again.
3.  *Context variables*: a replay runs in a copy of forward's context, so that `invfunc.mode`, `invfunc.debug` and the
    user's own are what they were. It is the context in which the pipeline was called, for each of its calls; autocast
    and the default device may be others at a call: a model's own loop sets them between blocks.
4.  *Discrete decisions* are pinned by `pin`.
5.  Generators belong to the process. So one replay at a time that needs them has its *turn*, and with it all that is
    nested in that replay, on whatever thread: nested gradients on several devices do not wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .. import _torch
from ..errors import ReplayError
from . import host_random
from .devices import accelerators, generator_of, is_captured
from .flags import flags, under_flags

T = TypeVar("T")

# ---- random numbers --------------------------------------------------------------------------------------------------


class RandomState:
    """The states of the generators that a call may draw from.

    Args:
        devices: The accelerators in sight of the call.
    """

    __slots__ = ("cpu", "devices", "is_captured", "marks", "numpy", "python", "states")

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self.cpu = _torch.cpu_random_state()
        self.devices = devices
        self.is_captured = any(map(is_captured, devices))
        generators = () if self.is_captured else map(generator_of, devices)
        self.states = [(generator, generator.get_state()) for generator in generators]
        self.python = host_random.python_state()
        self.numpy = host_random.numpy_state()
        self.marks = host_random.python_mark(), host_random.numpy_mark()

    @property
    def nbytes(self) -> int:
        """The memory of the states of torch's generators."""
        return self.cpu.nbytes + sum(state.nbytes for _, state in self.states)

    def has_moved(self) -> bool:
        """Whether anything has been drawn since."""
        return not (
            _torch.is_same_state(self.cpu, _torch.cpu_random_state())
            and self.marks == (host_random.python_mark(), host_random.numpy_mark())
            and all([_torch.is_same_state(was, generator.get_state()) for generator, was in self.states])
        )

    def put(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        for generator, state in self.states:
            generator.set_state(state)
        host_random.put_python_state(self.python)
        host_random.put_numpy_state(self.numpy)

    def later(self) -> RandomState:
        """The state of the same generators now."""
        return RandomState(self.devices)

    def watch(self, fn: Callable[..., T]) -> Callable[..., T]:
        """``fn``; where a state could not be read, one that raises if it draws."""
        return partial(_run_without_drawing, fn) if self.is_captured else fn

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Draw the same numbers inside, and leave the generators as they were before."""
        with turn(), _NoDrawing() if self.is_captured else nullcontext():
            now = self.later()
            self.put()
            try:
                yield
            finally:
                now.put()


class _NoDrawing(_torch.DispatchMode):
    """Raises where an operator draws from the generator of a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _draws(func, args) and any([isinstance(t, Tensor) and not t.is_cpu for t in _torch.trees.tree_leaves(out)]):
            raise ReplayError(
                f"{func} draws random numbers while a graph is captured, when no generator can be read",
                expected="a function that backward can run again with the same numbers",
                cure="store that stage, as in invfunc.mark(stage, 'store'), or draw its numbers outside of the graph",
            )
        return out


def _draws(operator: Any, args: Sequence[Any]) -> bool:
    """Whether an operator draws; attention is of those that do, and does not without dropout."""
    names = _torch.arguments_of(operator)
    place = names.index("dropout_p") if "dropout_p" in names else -1
    has_dropout = place < 0 or (place < len(args) and args[place] > 0)
    return torch.Tag.nondeterministic_seeded in operator.tags and has_dropout


def _run_without_drawing(fn: Callable[..., T], *args: Any) -> T:
    with _NoDrawing():
        return fn(*args)


def random_state(given: Sequence[Tensor], snapshot: Any, last: RandomState | None) -> RandomState:
    """The state before a call.

    Args:
        given: Its tensors.
        snapshot: The modules that are called, with what else the call may read.
        last: The state behind the call before it, if nothing has been drawn since.
    """
    if last is not None and all([t.is_cpu or t.device in last.devices for t in given]):
        return last
    return RandomState(accelerators([*given, *snapshot.tensors_in_sight()], snapshot.parts.devices))


# ---- turns: rule 5 of NOTE [Conditions] -----------------------------------------------------------------------------


_TURN = threading.Lock()
_HOLDER: list[object] = []  # who has the turn
_MINE: ContextVar[object] = ContextVar("mine", default=None)  # the turn that this context is nested in


@contextmanager
def turn() -> Iterator[None]:
    """Wait until no other replay uses the process's generators or modules; what is nested in one goes on at once."""
    if _HOLDER and _MINE.get() in _HOLDER:
        yield
        return
    with _TURN:
        holder = object()
        _HOLDER.append(holder)
        token = _MINE.set(holder)
        try:
            yield
        finally:
            _HOLDER.clear()
            _MINE.reset(token)


# ---- autocast, default device, threads, context variables -----------------------------------------------------------


class Conditions:
    """What surrounds a call, and the call again: rules 2 and 3 of NOTE [Conditions]."""

    __slots__ = ("autocast", "context", "device", "flags", "has_same_flags", "snapshot", "task", "thread", "threads")

    def __init__(self, snapshot: Any = None) -> None:
        self.snapshot = snapshot  # the modules that are called, if they are to be as they were
        self.context = copy_context()
        self.autocast = autocast_state()
        self.device = _torch.default_device()
        self.flags, self.task, self.has_same_flags = flags(), -1, True
        self.thread, self.threads = threading.get_ident(), torch.get_num_threads()

    def here(self) -> Conditions:
        """The conditions of a call that begins now: themselves, unless autocast or the default device is another."""
        if self.autocast == autocast_state() and self.device == _torch.default_device():
            return self
        found = Conditions(self.snapshot)
        found.context = self.context  # not a later one: that may hold what this graph computes, and is never let go
        return found

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        """``fn(*args)`` as if it were called where the conditions were noted."""
        return self.context.copy().run(self._run, fn, args)

    def _run(self, fn: Callable[..., T], args: tuple[Any, ...]) -> T:
        others = self.threads != torch.get_num_threads() and self.thread == threading.get_ident()
        same = self.autocast == autocast_state() and self._has_same_flags()
        if same and not others and self.device == _torch.default_device():
            return fn(*args)
        with ExitStack() as stack:
            stack.enter_context(under_flags(self.flags))
            if self.autocast != autocast_state():
                stack.enter_context(autocast(self.autocast))
            if self.device != _torch.default_device():
                stack.enter_context(self.device or torch.device("cpu"))
            if others:
                stack.enter_context(threads(self.threads))
            return fn(*args)

    def _has_same_flags(self) -> bool:
        """Whether the flags are those of forward; asked once in a backward."""
        task = _torch.graph_task_id()
        if task < 0 or task != self.task:
            self.task, self.has_same_flags = task, self.flags == flags()
        return self.has_same_flags


def autocast_state() -> tuple[Any, ...]:
    """Whether autocast is on, and its dtype, for every type of device for which it is."""
    if not _torch.is_any_autocast_enabled():
        return ()
    return tuple([(d, torch.get_autocast_dtype(d)) for d in _device_types() if torch.is_autocast_enabled(d)])


def _device_types() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


@contextmanager
def autocast(state: tuple[Any, ...]) -> Iterator[None]:
    """Autocast as it was."""
    dtypes = dict(state)
    with ExitStack() as stack:
        for device in _device_types():
            enabled, dtype = device in dtypes, dtypes.get(device)
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` threads within an operation."""
    now = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(now)


# ---- pins -----------------------------------------------------------------------------------------------------------


class Pins(Protocol):
    """Who is told of pinned values: a call that records them, or a replay that gives them back."""

    def pin(self, name: str, value: Any) -> Any:
        """The value to go on with."""
        ...


PINS: ContextVar[Pins | None] = ContextVar("pins", default=None)


def pin(name: str, value: T) -> T:
    """Pin a discrete decision: in forward, keep the value and return it; when the function runs again, return that one.

    A rebuilt input differs from the original by rounding, so a top-k routing, an LSH bucket or an argmax may fall the
    other way when a function runs again in backward. A pinned value can not.

    Args:
        name: A name for error messages, the same in every run of the function.
        value: A tensor (of a dtype without gradients) or any other value.

    Cost:
        The value is kept until backward.

    Raises:
        ReplayError: When the function does not pin the same names in the same order in backward.

    Example:
        >>> import torch
        >>> def route(x):
        ...     chosen = pin("expert", x.argmax(-1))
        ...     return torch.nn.functional.one_hot(chosen, x.shape[-1]) * x
        >>> route(torch.tensor([[1.0, 2.0]]))
        tensor([[0., 2.]])
    """
    pins = None if torch.compiler.is_compiling() else PINS.get()
    return value if pins is None else pins.pin(name, value)


class Recorder:
    """Keeps what is pinned while a call runs; a call around it keeps it as well."""

    __slots__ = ("around", "pins")

    def __init__(self, around: Pins | None, pins: list[tuple[str, Any]]) -> None:
        self.around, self.pins = around, pins

    def pin(self, name: str, value: Any) -> Any:
        """Keep a value."""
        if self.around is not None:
            value = self.around.pin(name, value)
        self.pins.append((name, value))
        return value


class Pinned:
    """Gives back what was pinned in forward, in order."""

    __slots__ = ("left",)

    def __init__(self, pins: Iterable[tuple[str, Any]]) -> None:
        self.left = iter(pins)

    def pin(self, name: str, value: Any) -> Any:
        """The value that was pinned in forward under this name."""
        expected, kept = next(self.left, (None, None))
        if expected != name:
            raise ReplayError(
                f"pin({name!r}) on replay",
                expected="nothing more" if expected is None else f"pin({expected!r})",
                cure="pin the same names in the same order in every run of the function",
            )
        return kept
