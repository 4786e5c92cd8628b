"""What is asked of devices: numbers that travel on their own, generators, and whether a graph is being captured.

Nothing here is CUDA's: `torch.accelerator` and the module of a device answer for every kind of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import _torch

# ---- numbers on their way --------------------------------------------------------------------------------------------


class Late:
    """The values of a tensor on a device, on their way to the host: reading them at once would make the host wait.

    Each has an event of its own, on the stream that copies them: the one that is current when they are asked for may be
    another, on another device.
    """

    __slots__ = ("event", "host")

    def __init__(self, values: Tensor) -> None:
        if _torch.on_fake_tensors():
            values.tolist()  # raises here, where it is known what to do without them, and not where they would be read
        host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        self.host = _torch.unwrapped(host.copy_(values, non_blocking=True))  # it may be read when a transform has ended
        self.event = torch.Event(values.device)
        self.event.record(torch.accelerator.current_stream(values.device))

    def is_here(self) -> bool:
        """Whether they have arrived; nobody may ask while a graph is captured."""
        return not is_captured(torch.device(self.event.device)) and self.event.query()

    def values(self, wait: bool = False) -> list[float]:
        """They themselves."""
        if wait and not self.event.query():
            self.event.synchronize()
        return self.host.tolist()


def send(values: Tensor) -> Late:
    """Begin to send the values of a tensor, wherever that is."""
    return _Here(values) if values.is_cpu else Late(values)


class _Here(Late):
    """The values of a tensor of the host."""

    __slots__ = ()

    def __init__(self, values: Tensor) -> None:
        self.host = values

    def is_here(self) -> bool:
        return True

    def values(self, wait: bool = False) -> list[float]:
        return self.host.tolist()


class Answers:
    """What a device answers to a question that is asked again and again, in order.

    The host is at most some answers ahead: there it waits for the oldest, while the device still has work.
    """

    AHEAD = 4

    def __init__(self) -> None:
        self.late: deque[Late] = deque()

    def ask(self, values: Tensor) -> Iterator[list[float]]:
        """Send one more answer, and hear those that have arrived: none while a graph is captured."""
        if not is_captured(values.device):
            self.late.append(Late(values))
        while self.late and (self.late[0].is_here() or len(self.late) > self.AHEAD):
            yield self.late.popleft().values(wait=True)


_QUEUE: deque[tuple[Sequence[Late], Callable[[], object]]] = deque()


def when_here(numbers: Sequence[Late], judge: Callable[[], object]) -> None:
    """Call a function when numbers have arrived: now, or when somebody calls `settle` later."""
    if all([number.is_here() for number in numbers]):
        judge()
    else:
        _QUEUE.append((numbers, judge))


def settle() -> None:
    """Call those whose numbers have arrived, in order."""
    while _QUEUE:
        try:
            arrived = _QUEUE.popleft()
        except IndexError:  # another thread was faster
            return
        numbers, judge = arrived
        if not all([number.is_here() for number in numbers]):
            _QUEUE.appendleft(arrived)
            return
        judge()


def place_on(device: torch.device, values: Sequence[int]) -> Tensor:
    """A tensor of whole numbers on a device, made on the host."""
    with _torch.outside_modes():  # what is kept for later calls must not belong to a mode of this one
        if device.type == "cpu":
            return torch.tensor(values, device="cpu")
        return torch.tensor(values, device="cpu", pin_memory=True).to(device, non_blocking=True)


_COPIES: MutableMapping[Tensor, dict[torch.device, Tensor]] = WeakIdKeyDictionary()


def beside(constant: Tensor, x: Tensor) -> Tensor:
    """A tensor that never changes, on the device of another one: copied there once, so that nobody waits for it."""
    if not constant.is_cpu or x.is_cpu or torch.compiler.is_compiling() or is_captured(x.device):
        return constant.to(x.device)
    copies = _COPIES.setdefault(constant, {})
    if x.device not in copies:
        with _torch.outside_modes():
            copies[x.device] = _torch.unwrapped(constant.pin_memory().to(x.device, non_blocking=True))
    return copies[x.device]


def is_captured(device: torch.device) -> bool:
    """Whether what the device is given to do is written down as a graph, and not done."""
    if device.type in ("cpu", "meta"):
        return False
    ask = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return ask is not None and ask()


# ---- generators ------------------------------------------------------------------------------------------------------


class _OnlyOne:
    """The generator of a device whose module has but functions for it, and one device (MPS)."""

    def __init__(self, module: Any) -> None:
        self.get_state, self.set_state = module.get_rng_state, module.set_rng_state
        self.manual_seed = module.manual_seed


@lru_cache
def _only_one(kind: str) -> _OnlyOne | None:
    module = torch.get_device_module(kind)
    return _OnlyOne(module) if hasattr(module, "get_rng_state") else None


def generator_of(device: torch.device) -> Any:
    """What has ``get_state`` and ``set_state``; None where there is nothing to draw from, or the device is not in use.

    To ask a device that is not in use would begin to use it, and take its memory.
    """
    if device.type in ("cpu", "meta"):
        return None
    found = getattr(torch.get_device_module(device), "default_generators", None)
    if found is None:
        return _only_one(device.type)
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return found[index] if index < len(found) else None


def with_index(device: torch.device) -> torch.device:
    """A device that may be named by its type alone, which is then the current one."""
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return torch.device(device.type, index)


def generators() -> tuple[Any, ...]:
    """Those of all devices that are in use, the CPU's first."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return (torch.default_generator,)
    found = [generator_of(torch.device(accelerator.type, i)) for i in range(torch.accelerator.device_count())]
    return (torch.default_generator, *[generator for generator in found if generator is not None])


def accelerators(tensors: Iterable[Tensor], named: Iterable[torch.device] = ()) -> Sequence[torch.device]:
    """The devices to draw from that are in sight, beside the CPU: those of tensors, named ones and the default one.

    Where there are none, the current one; it may be another thread's, whose numbers are not to be touched.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return ()
    devices = {t.device for t in tensors} | {with_index(d) for d in named if d.type == accelerator.type}
    default = _torch.default_device()
    if default is not None:
        devices.add(default)
    if all([d.type == "cpu" for d in devices]) and generator_of(torch.device(accelerator.type, 0)) is not None:
        devices.add(with_index(accelerator))
    return sorted((d for d in devices if generator_of(d) is not None), key=str)
