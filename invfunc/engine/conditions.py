"""Conditions: what a call runs under, and runs again under in backward.

NOTE [Conditions] A function that runs again has to find what it found in forward, on whatever thread it runs.

1.  *Random numbers* are replayed on the CPU and on every accelerator that is in sight of the call: those of its inputs,
    of what its modules and closures hold, a `torch.device` among it, the default one, or else the current one. States
    are kept only if the call drew, or set the CPU's: one that is as it was may have been put back, as `fork_rng` does,
    which sets it in any case. Python's and NumPy's global generators count, too; a generator of one's own can not be
    seen, and its values have to be pinned. While a graph is captured no state can be read, and a call that draws is
    refused.
2.  *Autocast* of every type of device, the *default device* and, on the thread of forward, the number of *threads*:
    backward may run elsewhere, and no other thread's setting is touched. The *flags* of the process that choose a
    kernel (of attention, matrix products, cuDNN, determinism) are those of forward while a function runs again.
3.  *Context variables*: a replay runs in a copy of forward's context, so that `invfunc.mode`, `invfunc.debug` and the
    user's own are what they were. It is the context in which the pipeline was called, for each of its calls; autocast,
    the default device and the flags may be others at a call: a model's own loop sets them between blocks. The lists,
    dicts and sets in it are copies, too: a model collects outputs in them, and the graph of the call, which would be
    held in a cycle that is never let go; and what a replay collects belongs to nobody.
4.  *Discrete decisions* are pinned by `pin`.
5.  Generators belong to the process. A replay that draws sets them, for itself and all that is nested in it, on
    whatever thread. One that comes meanwhile waits a moment for its *turn*. If it does not come, its holder may be
    waiting for us: in a nested gradient, or where the functions of two threads meet. So the replay goes on with
    *generators of its own*, which a mode hands to each operator that draws. Two things there are but once: Python's and
    NumPy's generators, if the call drew from them; and the places in modules, closures and containers that it puts
    back. There a replay waits as long as it takes; on a device's worker, that the holder may need, for a second.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import Context, ContextVar, copy_context
from typing import Any, Protocol, TypeVar

import torch

from .. import _torch
from ..errors import ReplayError
from .flags import flags, under_flags

T = TypeVar("T")

# ---- autocast, default device, threads, context variables -----------------------------------------------------------


class Conditions:
    """What surrounds a call, and the call again: rules 2 and 3 of NOTE [Conditions]."""

    __slots__ = (
        "autocast", "context", "device", "flags", "has_containers", "has_same_flags", "is_left", "snapshot", "task",
        "thread", "threads",
    )  # fmt: skip

    def __init__(self, snapshot: Any = None) -> None:
        self.snapshot = snapshot  # the modules that are called, if they are to be as they were
        self.is_left = False  # whether other code runs between the calls, which may set something
        self.context = copy_context()
        self.has_containers = _take_apart(self.context)
        self.autocast = autocast_state()
        self.device = _torch.default_device()
        self.flags, self.task, self.has_same_flags = flags(), -1, True
        self.thread, self.threads = threading.get_ident(), torch.get_num_threads()

    def here(self) -> Conditions:
        """The conditions of a call that begins now: themselves, unless something is another than at the beginning."""
        if not self.is_left or self._are_here():
            return self
        found = Conditions(self.snapshot)
        # Not a later one: that may hold what this graph computes, and is never let go.
        found.context, found.has_containers = self.context, self.has_containers
        return found

    def _are_here(self) -> bool:
        same_state = self.autocast == autocast_state() and self.device == _torch.default_device()
        return same_state and self.flags == flags()

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        """``fn(*args)`` as if it were called where the conditions were noted."""
        context = self.context.copy()
        if self.has_containers:
            _take_apart(context)
        return context.run(self._run, fn, args)

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


def _take_apart(context: Context) -> bool:
    """Give a context containers of its own; whether it has any."""
    shared = [(var, value) for var, value in context.items() if type(value) in _CONTAINERS]
    if shared:
        context.run(_set_copies, shared)
    return bool(shared)


def _set_copies(shared: Iterable[tuple[ContextVar[Any], Any]]) -> None:
    copied: dict[int, Any] = {}
    for var, value in shared:
        var.set(_copy(value, copied))


def _copy(item: Any, copied: dict[int, Any]) -> Any:
    """A container and those in it, copied; what else is in them is shared."""
    if type(item) not in _CONTAINERS:
        return item
    if id(item) not in copied:
        new = copied[id(item)] = item.copy()
        for place in range(len(item)) if isinstance(item, list) else item if isinstance(item, dict) else ():
            new[place] = _copy(item[place], copied)
    return copied[id(item)]


_CONTAINERS = frozenset({dict, list, set})


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
