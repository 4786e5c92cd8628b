"""Buffers before a call, which moves them once a step; rule 3 of NOTE [Snapshot]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .devices import Late, is_captured
from .parts import Parts

_SMALL = 2**13  # elements: cheaper to copy than to ask
_WRITES: WeakKeyDictionary[nn.Module, dict[tuple[str, bool], bool | Late]] = WeakKeyDictionary()
"""Whether a module writes a buffer when it is called: by name, and by whether it is in training. Not for small buffers
in training, which are copied without asking."""


class BufferCopy(NamedTuple):
    """A buffer of a module, as it was before a call."""

    module: nn.Module
    name: str
    tensor: Tensor
    copy: Tensor


def _is_training(module: nn.Module) -> bool:
    return module.__dict__.get("training", False)  # a compiled module asks the one inside


def _is_copied_unasked(module: nn.Module, tensor: Tensor) -> bool:
    return _is_training(module) and tensor.numel() <= _SMALL


def may_write(module: nn.Module) -> bool:
    """Whether a module may write one of its buffers when it is called."""
    return any([may_write_into(module, name, t) for name, t in module.__dict__["_buffers"].items() if t is not None])


def may_write_into(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether it may write this one."""
    if tensor.requires_grad or nn.parameter.is_lazy(tensor):
        return False
    return _is_copied_unasked(module, tensor) or _is_known_to_write(module, (name, _is_training(module))) is not False


def _is_known_to_write(module: nn.Module, key: tuple[str, bool]) -> bool | None:
    """Whether a module writes a buffer; None where nobody has asked, or the answer is still on its way."""
    known = _WRITES.get(module) or {}
    found = known.get(key)
    if not isinstance(found, Late):
        return found
    if not found.is_here():
        return None
    known[key] = wrote = any(found.values())
    return wrote


def copies_of(functions: Iterable[Any]) -> list[BufferCopy]:
    """The buffers that a call of functions may write, as they are."""
    return [
        BufferCopy(module, name, tensor, tensor.detach().clone())
        for module in Parts(functions).modules
        for name, tensor in module.__dict__["_buffers"].items()
        if tensor is not None and may_write_into(module, name, tensor)
    ]


def worth_keeping(copy: BufferCopy) -> bool:
    """Whether a copy is worth keeping: only if the buffer was written, which is asked once for a module."""
    if _is_copied_unasked(copy.module, copy.tensor):
        return True
    known, key = _WRITES.setdefault(copy.module, {}), (copy.name, _is_training(copy.module))
    if key not in known and not is_captured(copy.tensor.device):
        now = copy.module._buffers.get(copy.name)
        known[key] = now is not copy.tensor or _send_difference(copy.tensor, copy.copy)
    return _is_known_to_write(copy.module, key) is not False


def _send_difference(a: Tensor, b: Tensor) -> Late | bool:
    """Whether tensors differ; from a device, that comes later."""
    return not torch.equal(a, b) if a.is_cpu else Late((a != b).any().reshape(1))


@contextmanager
def leave_buffers(functions: Iterable[Any]) -> Iterator[None]:
    """Leave the buffers of modules in training as they were, whatever runs inside."""
    copies = copies_of(functions)
    try:
        yield
    finally:
        with torch.no_grad():
            for copy in copies:
                copy.module._buffers[copy.name] = copy.tensor.copy_(copy.copy)
