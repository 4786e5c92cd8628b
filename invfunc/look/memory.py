"""How much memory and arithmetic a call takes.

A tensor's memory is its *storage*, which views share, which autograd may keep long after the tensor is gone, and which
dies at one definite moment. `measure` opens a ledger, follows every storage from the first operator that touches it to
its death, and reports the highest and the last balance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar
from weakref import ref

import torch
from torch.utils.flop_counter import flop_registry

from .._torch import DispatchMode, trees

__all__ = ["Measurement", "measure"]


@dataclass(frozen=True)
class Measurement:
    """What one call took.

    Attributes:
        peak_bytes: The most memory alive at one moment of the call, less what was alive before it.
        held_bytes: The memory alive at the end of the call, its result still held, less what was alive before it.
            Negative if the call freed more than it left.
        flops: Floating point operations of matrix products, convolutions and attention, two per multiply-add, by the
            formulas of `torch.utils.flop_counter`. Pointwise operators count as none.
        seconds: Wall time of a plain call, or None if it was not asked for.
        devices: The peak and the held bytes of each device whose allocator has served the call, by its name. They are
            counted in the sums above, in which each device, and the CPU, has its peak at a moment of its own.

    Example:
        >>> measure(torch.ones, 1000).held_bytes
        4000
    """

    peak_bytes: int
    held_bytes: int
    flops: int
    seconds: float | None = None
    devices: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)


def measure(fn: Callable[..., Any], /, *args: Any, timed: bool = False, **kwargs: Any) -> Measurement:
    """Call `fn(*args, **kwargs)` once and measure the memory and the arithmetic it takes, backward included.

    On the CPU the bytes are those of tensor storages, counted exactly after every operator: a view adds nothing, an
    in-place operator adds nothing, `resize_` counts as what it leaves. A storage older than the call counts by how it
    changes once an operator of the call has touched it: freeing it is negative. Not seen are the scratch memory inside
    a single kernel, sparse tensors, and the allocator's own overhead. What no operator of torch has made (numpy,
    extensions, collectives, `copy.deepcopy`) is taken for older than the call. `torch.compile` steps aside while it is
    measured: the function runs eagerly, or raises if it was compiled with `fullgraph=True`.

    The bytes of every other device that the call uses are those of its caching allocator, kernels' workspaces included,
    and the device's peak statistics are reset. Where a device keeps none (MPS), its tensors are counted as the CPU's.

    Args:
        fn: What to call.
        *args: Handed to `fn`.
        timed: Whether to call `fn` a second time, after the measured one and without any instrument, for `seconds`.
            Leave it off when a second call would do something else, or do harm.
        **kwargs: Handed to `fn`.

    Returns:
        The call's `Measurement`.

    Example:
        >>> import torch
        >>> x = torch.ones(1000)
        >>> measure(lambda: x.exp().sin().sum())
        Measurement(peak_bytes=8000, held_bytes=4, flops=0, seconds=None)
        >>> measure(torch.mm, x.view(10, 100), x.view(100, 10))
        Measurement(peak_bytes=400, held_bytes=400, flops=20000, seconds=None)
    """
    with _Allocators() as allocators, StorageLedger(_kind_with_statistics()) as ledger:
        result = fn(*args, **kwargs)
        measured = allocators.close(ledger.close(ledger.flops))
    del result
    return replace(measured, seconds=_seconds(fn, args, kwargs)) if timed else measured


Ledger = TypeVar("Ledger", bound="StorageLedger")


class StorageLedger(DispatchMode):
    """The storages that operators have touched, from first sight to death.

    A storage's Python object lives exactly as long as the storage itself, even while only autograd holds it, so that a
    weak reference tells the moment at which its memory is freed. The balance is kept by the changes, never summed anew.
    """

    supports_higher_order_operators = True

    def __init__(self, without: str | None = None) -> None:
        super().__init__()
        self.without = without  # a type of device that somebody else counts
        self.flops = 0
        self.peak = 0
        self.balance = 0
        self._sizes: dict[ref[torch.UntypedStorage], int] = {}

    def __enter__(self: Ledger) -> Ledger:
        if not _open_ledgers:
            torch.UntypedStorage.resize_ = _resize
        _open_ledgers.append(self)  # once more while a composite operator is looked into
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _open_ledgers.remove(self)
        if not _open_ledgers:
            del torch.UntypedStorage.resize_
        if self not in _open_ledgers:
            self._sizes.clear()  # their callbacks hold the ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(_wraps_tensors, types)):
            return NotImplemented  # Let the subclass (a DTensor, say) call the operators on the tensors it wraps.
        if (out := self._decomposed(func, args, kwargs)) is not NotImplemented:
            return out
        given = list(_storages((args, kwargs)))
        self._follow(given, older=func not in _TAKES_A_NEW_TENSOR)
        out = func(*args, **kwargs)
        self._follow([*given, *_storages(out)])
        self.flops += _flops(func, args, kwargs, out)
        return out

    def _decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Under `inference_mode` composite operators arrive whole: look inside them."""
        if not hasattr(func, "decompose") or func is torch.ops.prim.device.default:
            return NotImplemented
        with self:
            return func.decompose(*args, **kwargs)

    def _follow(self, storages: Iterable[torch.UntypedStorage], older: bool = False) -> None:
        """Read the sizes of storages; what is older than the call counts by how it changes."""
        for storage in storages:
            if storage.device.type == self.without:
                continue
            if ref(storage) not in self._sizes:
                self._sizes[ref(storage, self._forget)] = storage.nbytes() * older
            self.reread(storage)
        self.peak = max(self.peak, self.balance)

    def _forget(self, storage: ref[torch.UntypedStorage]) -> None:
        self.balance -= self._sizes.pop(storage, 0)

    def reread(self, storage: torch.UntypedStorage) -> None:
        """Follow a change of size."""
        if (known := ref(storage)) in self._sizes:
            self.balance += storage.nbytes() - self._sizes[known]
            self._sizes[known] = storage.nbytes()

    def close(self, flops: int) -> Measurement:
        """Balance the books while the result of the call is still held."""
        return Measurement(max(self.peak, self.balance), self.balance, flops)


_open_ledgers: list[StorageLedger] = []


def _resize(self: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    """`torch.UntypedStorage.resize_`, which passes no operator, while a ledger is open."""
    super(torch.UntypedStorage, self).resize_(size)
    for ledger in _open_ledgers:
        ledger.reread(self)
    return self


class _Allocators:
    """The statistics of the caching allocators of all devices."""

    def __enter__(self) -> _Allocators:
        _note_peaks()
        self._served = [_statistic(i, "allocation.all.allocated") for i in _indices()]
        self._before = [_statistic(i, "allocated_bytes.all.current") for i in _indices()]
        self._peaks = list(self._before)
        _open_allocators.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _note_peaks()
        _open_allocators.remove(self)

    def note(self) -> None:
        """Remember the peaks since they were last reset."""
        self._peaks = [max(peak, _statistic(i, "allocated_bytes.all.peak")) for i, peak in enumerate(self._peaks)]

    def close(self, on_the_cpu: Measurement) -> Measurement:
        """Read the statistics while the result of the call is still held, and add them up."""
        self.note()
        found: dict[str, tuple[int, int]] = {}
        for i, before in enumerate(self._before):
            held = _statistic(i, "allocated_bytes.all.current") - before
            if held or _statistic(i, "allocation.all.allocated") > self._served[i]:
                found[f"{_kind_with_statistics()}:{i}"] = (self._peaks[i] - before, held)
        return replace(
            on_the_cpu,
            peak_bytes=on_the_cpu.peak_bytes + sum(peak for peak, _ in found.values()),
            held_bytes=on_the_cpu.held_bytes + sum(held for _, held in found.values()),
            devices=found,
        )


# An allocator has one peak counter. A measurement inside another one resets it, so those outside read it first.
_open_allocators: list[_Allocators] = []


def _note_peaks() -> None:
    for allocators in _open_allocators:
        allocators.note()
    for i in _in_use():
        torch.accelerator.reset_peak_memory_stats(i)


def _kind_with_statistics() -> str | None:
    """The type of the devices whose allocators can be asked."""
    accelerator = torch.accelerator.current_accelerator()
    return None if accelerator is None or accelerator.type == "mps" else accelerator.type


def _indices() -> range:
    return range(0 if _kind_with_statistics() is None else torch.accelerator.device_count())


def _in_use() -> list[int]:
    """The devices whose allocators have served anybody; to reset or wait for another would begin to use it."""
    return [i for i in _indices() if _statistic(i, "allocation.all.allocated")]


def _statistic(index: int, name: str) -> int:
    return torch.accelerator.memory_stats(index).get(name, 0)  # there are none before a first use


# `torch.tensor`, `torch.from_numpy`: their argument is made outside every mode, but inside the call.
_TAKES_A_NEW_TENSOR = frozenset({torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default})


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storages in a tree, and those of its tensors; a sparse tensor has none of its own."""
    for leaf in trees.tree_leaves(tree):
        if isinstance(leaf, torch.UntypedStorage):
            yield leaf
        elif isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
            yield leaf.untyped_storage()


def _wraps_tensors(kind: type) -> bool:
    """Whether a subclass of tensors tells torch which tensors it consists of."""
    subclass = issubclass(kind, torch.Tensor) and kind is not torch.Tensor
    return subclass and hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    # Not `FlopCounterMode`: the hooks by which it follows modules raise under `torch.func.hessian`.
    packet = getattr(func, "overloadpacket", func)
    formula = flop_registry.get(packet) or flop_registry.get(_alike(packet))
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


@cache
def _alike(packet: Any) -> Any:
    """The operator of an accelerator that multiplies what this one of the CPU does, which torch has no formula for."""
    name = getattr(packet, "__name__", "")
    return getattr(torch.ops.aten, name.replace("_for_cpu", ""), None) if "attention_for_cpu" in name else None


def _seconds(fn: Callable[..., Any], args: Any, kwargs: Any) -> float:
    _synchronize()
    start = time.perf_counter()
    result = fn(*args, **kwargs)
    _synchronize()
    seconds = time.perf_counter() - start
    del result  # Freed outside the timed region, as it would be by a caller who keeps it.
    return seconds


def _synchronize() -> None:
    for i in _in_use():
        torch.accelerator.synchronize(i)
    if _kind_with_statistics() is None and torch.accelerator.is_available():
        torch.accelerator.synchronize()
