"""Inputs to measure with: fake ones for bytes, real ones for seconds, smaller ones where the real do not fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._torch import FakeTensor, FakeTensorMode, storage_id, storage_of, trees
from ..core.op import Invertible
from ..engine.snapshot import Snapshot
from ..errors import OptionError
from ..wires import Wire, is_differentiable, leaves, map_wire


def home_of(op: Invertible) -> torch.device:
    """Where an input is that is given by its shape: with the first tensor that the op reads."""
    seen = Snapshot(op.functions).tensors_in_sight()
    return next((tensor.device for tensor in seen), torch.get_default_device())


@contextmanager
def faking(mode: FakeTensorMode | None = None) -> Iterator[FakeTensorMode]:
    """Below a mode of fake tensors; autocast, which keeps casts of weights, keeps none of these for calls to come."""
    try:
        with mode or FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        torch.clear_autocast_cache()


def faked(x: Any, mode: FakeTensorMode, home: torch.device | None = None) -> Wire:
    """An input, or a shape on a device, as fake tensors."""
    if isinstance(x, FakeTensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).requires_grad_(x.requires_grad)
    if isinstance(x, Tensor):
        return mode.from_tensor(x.detach()).requires_grad_(x.requires_grad)
    if is_shape(x):
        return torch.zeros(tuple(x), device=home).requires_grad_()  # real ones, where torch has no fake ones
    return tuple(faked(part, mode, home) for part in x) if isinstance(x, tuple) else x


def is_shape(x: Any) -> bool:
    """Whether an input is given by its shape."""
    return isinstance(x, (torch.Size, list)) or (isinstance(x, tuple) and bool(x) and all(type(n) is int for n in x))


def check_input(x: Any) -> None:
    """Refuse what is no input."""
    given = _given(x)
    shapes = [leaf for leaf in given if is_shape(leaf)]
    has_tensors = bool(shapes) or any(isinstance(leaf, Tensor) for leaf in given)
    if not has_tensors or any(type(size) is not int for shape in shapes for size in shape):
        raise OptionError(
            f"plan: x is of type {type(x).__name__}",
            expected="a tensor, a shape, or a tuple of them",
            cure="the parts of a tuple are positional arguments, with None for those that are left out",
        )
    for shape in shapes:
        if not all(size > 0 for size in shape):
            raise OptionError(f"plan: the shape is {tuple(shape)}", expected="positive sizes")


def _given(x: Any) -> list[Any]:
    """The tensors, shapes and other leaves of an input."""
    return [x] if is_shape(x) or not isinstance(x, tuple) else [leaf for part in x for leaf in _given(part)]


def check_is_real(x: Any) -> None:
    """Refuse a batch without values."""
    if not is_real(x):
        raise OptionError(f"plan.verify: x is of type {type(x).__name__}", expected="a tensor, or a tuple of them")


def is_real(x: Any) -> bool:
    """Whether an input is given by its values."""
    found = [] if is_shape(x) else [leaf for leaf in leaves(x) if isinstance(leaf, Tensor) or is_shape(leaf)]
    return bool(found) and not any(isinstance(leaf, FakeTensor) or is_shape(leaf) for leaf in found)


def realised(x: Any, fake: Wire, part: int = 1) -> Wire:
    """Real values for an input, or for one part of its batch; random numbers where only shapes are given."""
    if isinstance(fake, tuple):
        parts = x if isinstance(x, tuple) and not is_shape(x) else (None,) * len(fake)
        return tuple(realised(given, like, part) for given, like in zip(parts, fake, strict=True))
    if not isinstance(fake, Tensor):
        return x
    shape = [-(-size // part) if i == 0 else size for i, size in enumerate(fake.shape)]
    if isinstance(x, Tensor) and not isinstance(x, FakeTensor):
        return x if list(x.shape) == shape else x[: shape[0]]
    make = torch.randn if is_differentiable(fake) else torch.zeros
    return make(shape, dtype=fake.dtype, device=fake.device).requires_grad_(fake.requires_grad)


def rows(x: Wire) -> int:
    """The size of a batch: that of the first dimension of its first tensor."""
    return next((leaf.shape[0] for leaf in leaves(x) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def as_input(y: Wire) -> Wire:
    """An op's output as the next one's input: in a training step it needs a gradient wherever it can have one."""
    return map_wire(lambda leaf: leaf.detach().requires_grad_() if is_differentiable(leaf) else leaf, y)


def map_tensors(fn: Callable[[Tensor], Any], result: Any) -> Any:
    """A model's result with other tensors; it may be of tuples, lists, dicts, dataclasses, and what torch knows."""
    return trees.tree_map(partial(_map_leaf, fn), result)


def _map_leaf(fn: Callable[[Tensor], Any], leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return fn(leaf)
    if not is_dataclass(leaf) or isinstance(leaf, type):
        return leaf
    new = copy(leaf)
    for each in fields(leaf):
        object.__setattr__(new, each.name, map_tensors(fn, getattr(leaf, each.name)))
    return new


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of a model's result."""
    found: list[Tensor] = []
    map_tensors(found.append, result)
    return found


def storages(x: Wire) -> list[torch.UntypedStorage]:
    """The storages of a wire, each once, in order."""
    found: dict[int, torch.UntypedStorage] = {}
    for leaf in leaves(x):
        if isinstance(leaf, Tensor):
            found.setdefault(storage_of(leaf), leaf.untyped_storage())
    return list(found.values())


def nbytes(x: Wire) -> int:
    """The bytes of the storages of a wire."""
    return sum(storage.nbytes() for storage in storages(x))


def copied(x: Wire) -> Wire:
    """A copy of a wire whose tensors share storages as the original's do."""
    bases: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        storage, plain = leaf.untyped_storage(), leaf.detach()
        if storage_id(storage) not in bases:
            count = storage.nbytes() // leaf.element_size()
            bases[storage_id(storage)] = plain.as_strided((count,), (1,), 0).clone()
        base = bases[storage_id(storage)]
        return base.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset()).requires_grad_(leaf.requires_grad)

    with torch.no_grad():
        return map_wire(copy, x)


def free_bytes(x: Wire) -> float:
    """The memory that is left where an input lies, as far as anybody knows."""
    device = next((leaf.device for leaf in leaves(x) if isinstance(leaf, Tensor)), torch.device("cpu"))
    if device.type != "cpu" and hasattr(torch.get_device_module(device), "mem_get_info"):
        return torch.get_device_module(device).mem_get_info(device)[0]
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")
