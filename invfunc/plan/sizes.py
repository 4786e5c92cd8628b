"""Sizes: the bytes that one op takes, alone, in each of the ways in which a plan runs it. Rule 1 of NOTE [Profile]."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import LOOKS_AT_VALUES, FakeTensor, FakeTensorMode, fake_device, fake_mode, storage_id, trees
from ..core.op import Invertible
from ..errors import NotInvertibleError
from ..look.memory import StorageLedger
from ..wires import Wire, is_differentiable, leaves
from .costs import OpCosts
from .executor import has_inverse
from .inputs import as_input, copied, faking, nbytes, realised, storages
from .keeping import kind_of, name_of_operator
from .trials import (
    Layout,
    Layouts,
    Trial,
    as_result,
    by_inverse,
    by_recompute,
    by_tape,
    forward_of,
    layout_of,
    no_op,
)
from .work import CONVOLUTION, KEEPING, Counts, Work


class Books(StorageLedger):
    """A ledger that takes real tensors among fake ones, such as parameters, for what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # real tensors, and the fake ones that stand for them
        self.calls = self.traffic = 0
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # fake tensors ask for each other's device all the time
            return fake_device(*args) or func(*args)
        if fake_mode() is not None and any(map(_is_real, trees.tree_leaves((args, kwargs)))):
            args, kwargs = trees.tree_map_only(Tensor, self._faked, (args, kwargs))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.operators.append(name_of_operator(func))
        if not getattr(func, "is_view", False):
            self.calls += CONVOLUTION if self.operators[-1].startswith("convolution") else 1
            self.traffic += sum(map(_size, trees.tree_leaves((args, kwargs, out))))
        return out

    def _faked(self, tensor: Tensor) -> Tensor:
        if not _is_real(tensor):
            return tensor
        if id(tensor) not in self._before:
            mode = fake_mode()
            assert mode is not None
            self._before[id(tensor)] = tensor, mode.from_tensor(tensor)
        return self._before[id(tensor)][1]

    def take_peak(self) -> int:
        """The peak since it was last taken."""
        peak, self.peak = max(self.peak, self.balance), self.balance
        return peak

    def take_work(self) -> Work:
        """The work since it was last taken."""
        work, self.calls, self.flops, self.traffic = self.work, 0, 0, 0
        return work

    @property
    def work(self) -> Work:
        """The work since it was last taken."""
        return Work(self.calls, self.flops, self.traffic)

    def run_back(self, trial: Trial) -> Back:
        """What happens while a trial runs back."""
        trial.sent.prepare()
        self.take_peak()
        sends = trial.backward()
        return Back(self.take_peak(), trial.sent.gradient, sends)


class Back(NamedTuple):
    """The peak of a backward, the bytes of the gradients that it begins with, and what it sends on."""

    peak: int
    given: int
    sends: Layouts

    def on(self, before: int) -> Back:
        """The peak beyond what was there before."""
        return self._replace(peak=self.peak - before)


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)


def _size(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0


class Sizes(NamedTuple):
    """What an op takes, how what it sends back lies in memory, and the work of each way."""

    costs: OpCosts
    sends: Layouts
    counts: Counts


@dataclass(frozen=True)
class Subject:
    """An op on fake tensors, to be measured; on real ones where it looks at their values."""

    op: Invertible
    x: Wire
    mode: FakeTensorMode
    layouts: Layouts  # of what comes back to it

    def measured(self) -> Sizes:
        """Its bytes, way by way."""
        found, parameters, forward = self._try(_bytes_forward)
        found = replace(found, parameters=sum(p.numel() * p.element_size() for p in parameters))
        stored = self._try(_bytes_by_tape, found, parameters, self.layouts)
        step = stored.counts["step"].beyond(self._try(_work_of_no_op, self.layouts, False))
        ends, operators = self._try(_work_behind_what_is_saved)
        again = step.plus(forward).beyond(ends)
        stored = stored._replace(counts={"forward": forward, "step": step, "again": again, "ends": ends})
        keep = kind_of(operators)
        if keep and found.saves:
            stored = self._with_results(stored, keep, len(operators), parameters)
        if not has_inverse(self.op):
            return stored
        try:
            rebuilt = self._rebuilt(replace(stored.costs, inverse=0.0), parameters)
        except NotInvertibleError:  # its structure does not tell
            return stored
        larger = max(stored.sends.gradients, rebuilt.sends.gradients, key=_bytes_in)
        undone = rebuilt.counts["undone"].beyond(self._try(_work_of_no_op, self.layouts, True))
        first, peak = self._try(_undone, parameters, self.layouts, True)
        if self.layouts.values is not None:
            peak = max(peak, self._try(_undone, parameters, self.layouts._replace(values=None), True)[1])
        counts = {**stored.counts, "undone": undone, "begins": rebuilt.counts["undone"].beyond(first)}
        if stored.costs.keep:
            whole, _ = self._try(_undone, parameters, self.layouts, False)
            for way, work in ("spared undone", whole), ("spared first", first):
                kept, _ = self._try(_undone, parameters, self.layouts, way == "spared first", keep)
                counts[way] = _spared(work, kept, len(operators))
        costs = replace(rebuilt.costs, peak_first=peak * (peak < rebuilt.costs.peak_inverse))
        return Sizes(costs, Layouts(larger, rebuilt.sends.values), counts)

    def _with_results(self, stored: Sizes, keep: str, operators: int, parameters: list[Tensor]) -> Sizes:
        """The same, and what is spared where expensive results are kept."""
        (whole, noted), (spared, kept) = (self._try(_again, parameters, self.layouts, k) for k in ("", keep))
        costs = replace(stored.costs, keep=keep, kept=max(kept - noted, 0))
        return stored._replace(costs=costs, counts={**stored.counts, "spared again": _spared(whole, spared, operators)})

    def _rebuilt(self, found: OpCosts, parameters: list[Tensor]) -> Sizes:
        """On a trunk: y comes as the inverse of the op after makes it, or as a tail has kept it; the worse counts."""
        kept, lies = self._try(_bytes_by_inverse, found, parameters, self.layouts._replace(values=None))
        if self.layouts.values in (None, lies):
            return kept
        made, _ = self._try(_bytes_by_inverse, found, parameters, self.layouts)
        return made._replace(costs=_worse(made.costs, kept.costs))

    def _try(self, way: Callable[..., Any], *args: Any) -> Any:
        try:
            with faking(self.mode):
                return way(self.op, self.x, *args)
        except LOOKS_AT_VALUES:
            return way(self.op, realised(None, self.x), *args)


def _spared(whole: Work, kept: Work, operators: int) -> Work:
    """What is spared where results are kept, which may be less than it takes to keep them."""
    found = whole.beyond(kept)
    return found._replace(calls=found.calls - KEEPING * operators)


def _bytes_in(layout: Layout) -> int:
    return sum({place.storage: place.bytes for place in layout}.values())


def _worse(a: OpCosts, b: OpCosts) -> OpCosts:
    names = ("peak_forward", "peak_inverse", "residue")
    return replace(a, **{name: max(getattr(a, name), getattr(b, name)) for name in names})


def _bytes_forward(op: Invertible, x: Wire) -> tuple[OpCosts, list[Tensor], Work]:
    with Books() as books:
        y, recording = forward_of(op, x)
        work = books.take_work()
        peak, size = books.take_peak(), nbytes(y)
        given = set(map(storage_id, storages(x)))
        shared = tuple([storage.nbytes() if storage_id(storage) in given else 0 for storage in storages(y)])
        gradient = sum(leaf.numel() * leaf.element_size() for leaf in leaves(y) if is_differentiable(leaf))
        del y
        noted = books.balance
    sizes = {"bytes": size, "gradient": gradient, "shares_output": shared, "recording": noted}
    saves = bool(recording.region.record.kinds)
    return OpCosts(op.name, 0.0, 0.0, saves=saves, peak_forward=peak, **sizes), recording.parameters, work


def _work_behind_what_is_saved(op: Invertible, x: Wire) -> tuple[Work, list[str]]:
    """What a region that ends with an op does not run again; and the op's operators."""
    with Books() as books:
        last = [Work()]

        def pack(tensor: Tensor) -> Tensor:
            if not (tensor.requires_grad and tensor.is_leaf):  # which is at hand
                last[0] = books.work
            return tensor

        x = as_result(x)
        books.take_work()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            op.forward(x)
        return books.take_work().beyond(last[0]), books.operators


def _undone(
    op: Invertible, x: Wire, parameters: list[Tensor], layouts: Layouts, is_first: bool, keep: str = ""
) -> tuple[Work, int]:
    """The work of running an op and undoing it, and the peak back; where a run begins with it, if it is the first."""
    with Books() as books:
        trial = Trial(by_inverse(op, keep), copied(x), parameters, carried=True, layouts=layouts, is_first=is_first)
        residue = books.balance - nbytes(trial.y)
        trial.y = None
        back = books.run_back(trial).on(residue)
        return books.take_work(), back.peak


def _again(op: Invertible, x: Wire, parameters: list[Tensor], layouts: Layouts, keep: str) -> tuple[Work, int]:
    """What it takes to run an op, and again, as a region; and the bytes that are alive between the two."""
    with Books() as books:
        xs = copied(x)
        trial = Trial(by_recompute(op, keep), xs, parameters, layouts=layouts)
        trial.y = xs = None
        alive = books.balance
        books.run_back(trial)
        return books.take_work(), alive


def _work_of_no_op(op: Invertible, x: Wire, layouts: Layouts, carried: bool) -> Work:
    """What a trial takes where the op's output is passed through no op."""
    with Books() as books:
        with torch.no_grad():
            y = as_input(op.forward(x))
        books.take_work()
        books.run_back(Trial(no_op, y, (), carried, layouts))
        return books.take_work()


def _bytes_by_tape(op: Invertible, x: Wire, found: OpCosts, parameters: list[Tensor], layouts: Layouts) -> Sizes:
    with Books() as books:
        xs = copied(x)
        inputs, base = _watched(xs), nbytes(xs)
        books.take_peak()
        books.take_work()
        trial = Trial(by_tape(op), xs, parameters, layouts=layouts)
        forward = books.take_peak() - base
        outputs = _watched(trial.y)
        trial.y = xs = None
        held_in, held_out = _alive(inputs), _alive(outputs)
        tape, left = books.balance - sum(held_in), _alive([s for fn in op.functions for s in getattr(fn, "left", ())])
        back = books.run_back(trial).on(sum(held_in))
    found = replace(found, tape=tape, left=sum(left), holds_input=held_in, holds_output=held_out, peak_taped=forward)
    found = replace(found, gradient=max(found.gradient, back.given))
    return Sizes(replace(found, peak_backward=back.peak), back.sends, {"step": books.take_work()})


def _bytes_by_inverse(
    op: Invertible, x: Wire, found: OpCosts, parameters: list[Tensor], layouts: Layouts
) -> tuple[Sizes, Layout]:
    """On a trunk, and how its output lies in memory."""
    with Books() as books:
        xs = copied(x)
        base = nbytes(xs)
        books.take_peak()
        books.take_work()
        trial = Trial(by_inverse(op), xs, parameters, carried=True, layouts=layouts)
        forward = books.take_peak() - base
        xs = None
        residue, lies = books.balance - nbytes(trial.y), layout_of(trial.sent.values)
        trial.y = None
        back = books.run_back(trial).on(residue)
    found = replace(found, residue=residue, peak_forward=max(found.peak_forward, forward))
    return Sizes(replace(found, peak_inverse=back.peak), back.sends, {"undone": books.take_work()}), lies


def _watched(x: Wire) -> list[Callable[[], Any]]:
    return [weakref.ref(storage) for storage in storages(x)]


def _alive(watched: Sequence[Callable[[], Any]]) -> tuple[int, ...]:
    return tuple(0 if storage() is None else storage().nbytes() for storage in watched)
