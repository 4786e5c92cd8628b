"""Random numbers: the states of the generators that a call may draw from; rules 1 and 5 of NOTE [Conditions]."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _torch
from ..errors import ReplayError
from . import host_random
from .devices import accelerators, generator_of, is_captured, with_index
from .turns import patience, turn

T = TypeVar("T")
_CPU = torch.device("cpu")

_PATIENCE = 0.25  # seconds

# ---- states ----------------------------------------------------------------------------------------------------------


class RandomState:
    """The states of the generators that a call may draw from.

    Args:
        devices: The accelerators in sight of the call.
    """

    __slots__ = ("cpu", "devices", "draws_on_host", "host_mark", "is_captured", "mark", "numpy", "python", "states")

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        own = _own_generators()
        self.cpu = (torch.default_generator if own is None else own.cpu).get_state()
        self.devices = devices
        self.is_captured = any(map(is_captured, devices))
        self.states = [] if self.is_captured else [_state_of(device, own) for device in devices]
        self.python = host_random.python_state(), host_random.python_second()
        self.numpy = host_random.numpy_state(), host_random.numpy_second()
        self.mark, self.host_mark = _mark_of(own).begin(), host_random.host_mark()
        self.draws_on_host = (
            True  # whether it draws from Python's or NumPy's, as far as `has_moved` does not know better
        )

    @property
    def nbytes(self) -> int:
        """The memory of the states of torch's generators."""
        return self.cpu.nbytes + sum(state.nbytes for state in self.states)

    def has_moved(self) -> bool:
        """Whether anything has been drawn since."""
        own = _own_generators()
        self.draws_on_host = self.host_mark != host_random.host_mark()
        return (
            self.draws_on_host
            or self.mark != _mark_of(own).read()
            or (bool(self.states) and self._have_devices_moved(own))
        )

    def _have_devices_moved(self, own: _OwnGenerators | None) -> bool:
        found = [_state_of(device, own) for device in self._read()]
        return not all(map(_torch.is_same_state, self.states, found))

    def _read(self) -> Sequence[torch.device]:
        return () if self.is_captured else self.devices

    def put(self) -> None:
        """Set the generators to this state."""
        self._put_torch()
        self._put_host()

    def _put_torch(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in zip(self._read(), self.states, strict=True):
            generator_of(device).set_state(state)

    def _put_host(self) -> None:
        host_random.put_python_state(*self.python)
        host_random.put_numpy_state(*self.numpy)

    def later(self) -> RandomState:
        """The state of the same generators now."""
        return RandomState(self.devices)

    def watch(self, fn: Callable[..., T]) -> Callable[..., T]:
        """``fn``; where a state could not be read, one that raises if it draws."""
        return partial(_run_without_drawing, fn) if self.is_captured else fn

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Draw the same numbers inside, and leave the generators as they were before."""
        if not self.is_captured and any(map(is_captured, self.devices)):
            raise _captured("a function that drew random numbers runs again")
        with ExitStack() as stack:
            if self.is_captured:
                stack.enter_context(_NoDrawing())
            if self.draws_on_host:  # there is but one of each
                stack.enter_context(turn(["Python's and NumPy's generators"], patience()))
                stack.callback(self.later()._put_host)
                self._put_host()
            if _own_generators() is None and stack.enter_context(turn(["torch's generators"], _PATIENCE)):
                stack.callback(self.later()._put_torch)
                self._put_torch()
            else:  # who has them may wait for us
                stack.enter_context(_OwnGenerators(self))
            yield


def _mark_of(own: _OwnGenerators | None) -> _torch.Mark:
    return _torch.cpu_mark if own is None else own.mark


def _state_of(device: torch.device, own: _OwnGenerators | None) -> Tensor:
    state = None if own is None else own.states.get(device)
    return generator_of(device).get_state() if state is None else state


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


# ---- operators that draw ---------------------------------------------------------------------------------------------


def _draws(operator: Any, args: Sequence[Any]) -> bool:
    """Whether an operator draws; attention is of those that do, and does not without dropout."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return False
    names = _torch.arguments_of(operator)
    place = names.index("dropout_p") if "dropout_p" in names else -1
    return place < 0 or (place < len(args) and args[place] > 0)


class _NoDrawing(_torch.DispatchMode):
    """Raises where an operator draws from the generator of a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _draws(func, args) and any([isinstance(t, Tensor) and not t.is_cpu for t in _torch.trees.tree_leaves(out)]):
            raise _captured(f"{func} draws random numbers")
        return out


def _captured(what: str) -> ReplayError:
    return ReplayError(
        f"{what} while a graph is captured, when no generator can be read",
        expected="a function that backward can run again with the same numbers",
        cure="store that stage, as in invfunc.mark(stage, 'store'), or draw its numbers outside of the graph",
    )


def _run_without_drawing(fn: Callable[..., T], *args: Any) -> T:
    with _NoDrawing():
        return fn(*args)


class _OwnGenerators(_torch.DispatchMode):
    """Has operators draw from generators of its own, and not from those of the process.

    On the CPU an operator takes a generator as an argument. On an accelerator the kernels of dropout and attention do
    not: there the device's generator has another state while one operator is launched.
    """

    def __init__(self, state: RandomState) -> None:
        super().__init__()
        self.cpu = torch.Generator()
        self.cpu.set_state(state.cpu)
        self.mark = _torch.mark_of(self.cpu)
        self.states = dict(zip(state._read(), state.states, strict=True))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled below this mode: run eagerly, they would draw other numbers."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any([kind not in _PLAIN for kind in types]):
            return NotImplemented  # a subclass goes first, and calls operators of plain tensors
        has_generator = any([isinstance(arg, torch.Generator) for arg in (*args, *kwargs.values())])
        if has_generator or _LENDING.is_on or not _draws(func, args):
            return func(*args, **kwargs)
        device = _device_of(args, kwargs)
        taking = _taking_generator(func) if device.type == "cpu" else None
        if taking is not None:
            return taking(*args, **{**kwargs, "generator": self.cpu})
        return self._lend(device, func, args, kwargs)

    def _lend(self, device: torch.device, func: Any, args: Any, kwargs: Any) -> Any:
        generator = torch.default_generator if device.type == "cpu" else generator_of(device)
        own = self.cpu.get_state() if device.type == "cpu" else self.states.get(device)
        if generator is None or own is None:
            return func(*args, **kwargs)
        with _LENT:
            now = generator.get_state()
            generator.set_state(own)
            _LENDING.is_on = True
            try:
                return func(*args, **kwargs)
            finally:
                _LENDING.is_on = False
                own = generator.get_state()
                generator.set_state(now)
                if device.type == "cpu":
                    self.cpu.set_state(own)
                else:
                    self.states[device] = own


class _Lending(threading.local):
    """Whether this thread calls an operator that draws from a lent generator: the modes around let it pass."""

    is_on = False


_LENT, _LENDING = threading.Lock(), _Lending()
_PLAIN = torch.Tensor, torch.nn.Parameter, torch.nn.Buffer


def _own_generators() -> _OwnGenerators | None:
    """Those that operators of this thread draw from now, if they are not the process's."""
    for mode in reversed(_torch.dispatch_modes()):
        if isinstance(mode, _OwnGenerators):
            return mode
    return None


def _device_of(args: Any, kwargs: Any) -> torch.device:
    tensor = next((t for t in _torch.trees.tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)
    device = kwargs.get("device") or (_CPU if tensor is None else tensor.device)
    return device if device.type == "cpu" else with_index(device)


@lru_cache
def _taking_generator(operator: Any) -> Any:
    """The overload of an operator that takes a generator, if there is one."""
    if "generator" in _torch.arguments_of(operator):
        return operator
    packet = operator.overloadpacket
    overloads = [getattr(packet, name) for name in packet.overloads()]
    return next((o for o in overloads if _without_generator(o) == _torch.signature_of(operator)), None)


def _without_generator(operator: Any) -> list[tuple[str, str]] | None:
    signature = _torch.signature_of(operator)
    rest = [item for item in signature if item[0] != "generator"]
    return rest if len(rest) < len(signature) else None
