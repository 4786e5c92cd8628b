"""Sizes: the bytes that one op takes, alone, in each of the ways in which a plan runs it. Rule 1 of NOTE [Profile]."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .._torch import LOOKS_AT_VALUES, FakeTensor, FakeTensorMode, fake_device, fake_mode
from ..core.op import Invertible
from ..errors import NotInvertibleError
from ..look.memory import StorageLedger
from ..wires import Wire, is_differentiable, leaves
from .costs import OpCosts
from .executor import has_inverse
from .inputs import copied, nbytes, realised, storages
from .trials import Layout, Layouts, Sent, Trial, forward_of, taped, trained, undone


class Books(StorageLedger):
    """A ledger that takes real tensors among fake ones, such as parameters, for what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # real tensors, and the fake ones that stand for them
        self._sent: Sent | None = None  # in backward
        self._kept = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # fake tensors ask for each other's device all the time
            return fake_device(*args) or func(*args)
        if fake_mode() is not None and any(map(_is_real, tree_leaves((args, kwargs)))):
            args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _faked(self, tensor: Tensor) -> Tensor:
        if not _is_real(tensor):
            return tensor
        if id(tensor) not in self._before:
            mode = fake_mode()
            assert mode is not None
            self._before[id(tensor)] = tensor, mode.from_tensor(tensor)
        return self._before[id(tensor)][1]

    def _follow(self, storages: Iterable[torch.UntypedStorage], older: bool = False) -> None:
        super()._follow(storages, older)
        if self._sent is not None:
            self._kept = max(self._kept, self.balance + self._sent.gone)

    def take_peak(self) -> int:
        """The peak since it was last taken."""
        peak, self.peak = max(self.peak, self.balance), self.balance
        return peak

    def run_back(self, trial: Trial) -> Back:
        """What happens while a trial runs back."""
        trial.sent.prepare()
        self.take_peak()
        self._sent, self._kept = trial.sent, self.balance
        sends = trial.backward()
        return Back(self.take_peak(), self._kept, sum(trial.sent.sizes.values()), sends)


class Back(NamedTuple):
    """The peak of a backward; as it is where somebody holds the gradients that it begins with; and what it sends on."""

    peak: int
    kept: int
    given: int  # bytes of those gradients
    sends: Layouts

    def on(self, before: int) -> Back:
        """The peaks beyond what was there before."""
        return self._replace(peak=self.peak - before, kept=self.kept - before)


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)


class Sizes(NamedTuple):
    """What an op takes, and how what it sends back lies in memory."""

    costs: OpCosts
    sends: Layouts


@dataclass(frozen=True)
class Subject:
    """An op on fake tensors, to be measured; on real ones where it looks at their values."""

    op: Invertible
    x: Wire
    mode: FakeTensorMode
    layouts: Layouts  # of what comes back to it

    def measured(self) -> Sizes:
        """Its bytes, way by way."""
        found, parameters = self._try(_forward)
        found = replace(found, parameters=sum(p.numel() * p.element_size() for p in parameters))
        stored = self._try(_taped, found, parameters, self.layouts)
        if not has_inverse(self.op):
            return stored
        try:
            rebuilt = self._rebuilt(replace(stored.costs, inverse=0.0), parameters)
        except NotInvertibleError:  # its structure does not tell
            return stored
        larger = max(stored.sends.gradients, rebuilt.sends.gradients, key=_bytes_in)
        return Sizes(rebuilt.costs, Layouts(larger, rebuilt.sends.values))

    def _rebuilt(self, found: OpCosts, parameters: list[Tensor]) -> Sizes:
        """On a trunk: y comes as the inverse of the op after makes it, or as a tail has kept it; the worse counts."""
        made = self._try(_undone, found, parameters, self.layouts)
        if not self.layouts.values:
            return made
        kept = self._try(_undone, found, parameters, self.layouts._replace(values=()))
        return Sizes(_worse(made.costs, kept.costs), made.sends)

    def _try(self, way: Callable[..., Any], *args: Any) -> Any:
        try:
            with self.mode:
                return way(self.op, self.x, *args)
        except LOOKS_AT_VALUES:
            return way(self.op, realised(None, self.x), *args)


def _bytes_in(layout: Layout) -> int:
    return sum({place.storage: place.bytes for place in layout}.values())


def _worse(a: OpCosts, b: OpCosts) -> OpCosts:
    names = ("peak_forward", "peak_inverse", "peak_inverse_last", "residue")
    return replace(a, **{name: max(getattr(a, name), getattr(b, name)) for name in names})


def _forward(op: Invertible, x: Wire) -> tuple[OpCosts, list[Tensor]]:
    with Books() as books:
        y, recording = forward_of(op, x)
        peak, size = books.take_peak(), nbytes(y)
        given = {storage._cdata for storage in storages(x)}
        shared = tuple([storage.nbytes() if storage._cdata in given else 0 for storage in storages(y)])
        gradient = sum(leaf.numel() * leaf.element_size() for leaf in leaves(y) if is_differentiable(leaf))
        del y
        noted = books.balance
    sizes = {"bytes": size, "gradient": gradient, "shares_output": shared, "recording": noted}
    return OpCosts(op.name, 0.0, 0.0, peak_forward=peak, **sizes), trained(recording)


def _taped(op: Invertible, x: Wire, found: OpCosts, parameters: list[Tensor], layouts: Layouts) -> Sizes:
    with Books() as books:
        xs = copied(x)
        inputs, base = _watched(xs), nbytes(xs)
        books.take_peak()
        trial = Trial(taped(op), xs, parameters, layouts=layouts)
        forward = books.take_peak() - base
        outputs = _watched(trial.y)
        trial.y = xs = None
        held_in, held_out = _alive(inputs), _alive(outputs)
        tape = books.balance - sum(held_in)
        back = books.run_back(trial).on(sum(held_in))
    found = replace(found, tape=tape, holds_input=held_in, holds_output=held_out, peak_taped=forward)
    found = replace(found, gradient=max(found.gradient, back.given))
    return Sizes(replace(found, peak_backward=back.peak, peak_backward_last=back.kept - back.given), back.sends)


def _undone(op: Invertible, x: Wire, found: OpCosts, parameters: list[Tensor], layouts: Layouts) -> Sizes:
    with Books() as books:
        xs = copied(x)
        base = nbytes(xs)
        books.take_peak()
        trial = Trial(undone(op), xs, parameters, carried=True, layouts=layouts)
        forward = books.take_peak() - base
        xs = None
        residue = books.balance - nbytes(trial.y)
        trial.y = None
        back = books.run_back(trial).on(residue)
    found = replace(found, residue=residue, peak_forward=max(found.peak_forward, forward))
    return Sizes(replace(found, peak_inverse=back.peak, peak_inverse_last=back.kept - back.given), back.sends)


def _watched(x: Wire) -> list[Callable[[], Any]]:
    return [weakref.ref(storage) for storage in storages(x)]


def _alive(watched: Sequence[Callable[[], Any]]) -> tuple[int, ...]:
    return tuple(0 if storage() is None else storage().nbytes() for storage in watched)
