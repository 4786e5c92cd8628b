"""Profiling: what each op of a chain costs, measured on the very mechanisms that a plan is made of.

NOTE [Profile]

1.  *Bytes* come from fake tensors, which have shapes and storages but no memory: exact, so that one can plan
    what does not fit. Each op runs alone, as in a plan: in a region, with a tape, and on a trunk. An op that looks at
    its values (an iterative inverse) can not run on fake tensors; it is measured on real ones. While an op runs, what
    its graph has saved is alive, whatever is kept of it then: rule 1 of NOTE [Trunk].
2.  *Time* comes from running each kind of op on real values, in rounds through the chain: the least of a few rounds
    counts, less what a trial of no op takes. Rounds end early where they would take longer than some plain steps: the
    least of several matters where an op is short. Where an op does not fit, a part of the batch is timed and scaled.
3.  *Kinds.* Ops of the same structure, on inputs of the same layout, are run and measured once; and what flows between
    them is made once. How what comes back to an op lies in memory is a part of its kind where bytes are counted. Where
    time is, the same shapes are enough, and a coupling's halves are of one kind if their functions are.
4.  *Views.* An op whose output lies in its input's storages costs nothing to keep: it belongs to the op before it.
5.  *Errors* come from sweeps: from an exact value and an exact gradient at an anchor, fused inverses go down the chain,
    and each gradient on the way is compared with the exact one. Products of gains would be off by orders of magnitude.
6.  *Noise.* On a busy machine the least of some rounds is still off, and differences of such times are worse: a plan
    could promise to be faster than plain training. So times are checked against what is the same in every profile, the
    flops and bytes of each way. Where they tell the same as the counts, the counts say how long each way takes, in the
    machine's own measure; what contradicts them by more than a factor of 3, and on the CPU by more than 2 ms, is timed
    again, and then believed. So two profiles of one chain agree, but where something truly takes near 3 times as long,
    and `OpCosts.doubt` says how far they are from what was timed. On the CPU, ops run on one thread meanwhile, and what
    counts, for the rounds as well, is the processor's time: what other processes take does not, and threads that wait
    for each other take any time.
7.  *Python.* What it takes to run a plan, and where ops are short that is most of what a plan takes beyond plain
    training, is measured once in a process, on a chain whose kernels take next to nothing, in the time of a kernel's
    call: two processes find the same unless a machine is unusual. It is there whatever else was found of an op.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import LOOKS_AT_VALUES, FakeTensorMode, fake_mode, outside_modes, storage_id, storage_of, trees
from ..core.couple import Half
from ..core.op import Chain, Invertible, OneWay, name_of
from ..core.structure import contents_of
from ..errors import OptionError
from ..wires import Wire, is_differentiable, leaves
from .clock import Clock, beyond_idle, one_thread, timed
from .costs import Costs, OpCosts, parse_bytes
from .executor import flat_ops, flat_stages, grouped, halves, is_exact, only_moves
from .inputs import (
    as_input,
    check_input,
    faked,
    faking,
    free_bytes,
    home_of,
    map_tensors,
    nbytes,
    realised,
    rows,
    storages,
    tensors_of,
)
from .machine import python_here
from .model import Blocks, Shown, planned_as, show
from .sizes import Books, Sizes, Subject
from .sweeps import sweep
from .trials import APART, Loss, Through, by_recompute, number_of, untouched
from .work import ACCELERATOR, CPU, Counts, Factors, Python, Rates, Reading, Seconds, costs_in, read, unit_of, whole

AGAIN = 3  # times as many rounds, and as much patience, where seconds contradict what is counted


def mean_square(y: Any) -> Tensor:
    """The loss that is assumed where none is given."""
    found = [t.square().mean() for t in tensors_of(y) if is_differentiable(t)]
    if not found:
        raise OptionError("plan: no real numbers come out", expected="a tensor of them", cure="pass loss=...")
    return torch.stack(found).sum()


def profile(
    f: Invertible | Callable[..., Any],
    x: Any,
    *,
    loss: Loss = mean_square,
    errors: bool = False,
    repeats: int = 5,
    memory: int | str | None = None,
) -> Costs:
    """Measure what each op of a chain costs in bytes and seconds: what a plan is made from.

    Args:
        f: A chain of ops. Nested chains flatten; `parallel` and named blocks are taken whole, and couplings half by
            half, but in chains of more than 160 halves and other ops. Or a model, as for `invfunc.plan`.
        x: An input: tensors, fake tensors, or a shape like ``(32, 64)`` (a wire of shapes for a tuple wire).
        loss: What turns the output into a number; it counts for the memory between forward and backward.
        errors: Whether to measure the gradient error of runs of inverses too, which takes several steps more and
            keeps every value and gradient of the chain meanwhile.
        repeats: How often each kind of op is timed, the least counts; up to three times as often where what was timed
            contradicts flops and bytes.
        memory: What timing may take, in bytes or as ``"2GiB"``; what is free now, if not given. Where an op takes more,
            a part of the batch is timed, and `Costs.scaled` says how small a part.

    Returns:
        The costs, pure data: save them, load them, edit them, plan from them.

    Cost:
        Each kind of op runs forward, forward and backward, again from its input, and back by its inverse: about
        ``4 * kinds / ops`` plain steps a round, and rounds are left out that would take more than 8 in all and more
        than a second of the processor's time; three times that where what was timed contradicts flops and bytes.
        Bytes are found without allocating, in the time that Python takes to go through each kind
        some five times (0.1 s each).

    Raises:
        OptionError: When ``memory`` is not a size, x is no input, or the loss is not one number.

    Example:
        >>> import torch, invfunc as inv
        >>> costs = profile(inv.chain(inv.pair(torch.exp, torch.log), torch.tanh), (16, 8))
        >>> [op.bytes == 16 * 8 * torch.finfo(torch.get_default_dtype()).bits // 8 for op in costs.ops]
        [True, True]
    """
    return Profiler(loss, errors, repeats, memory, known=_KNOWN, python=python_here).costs(planned_as(f), x)


_KNOWN: dict[Any, Factors] = {}  # of every kind of op that was profiled in this process


@dataclass(frozen=True)
class Profiler:
    """What `profile` measures with: its options, and how it takes the time.

    Args:
        loss: As in `profile`.
        errors: As in `profile`.
        repeats: As in `profile`.
        memory: As in `profile`.
        clock: What times one op. Where plans have to be the same everywhere, another one gives seconds that are known.
        patience: How long the rounds may take: in plain steps, and in seconds of the processor where those are shorter.
        fine: Of chains of more ops, whose plans take longest to find, couplings are taken whole.
        known: What earlier profiles have found out about kinds of ops, which stands until it is contradicted.
        python: What Python takes on the machine of that clock.
    """

    loss: Loss = mean_square
    errors: bool = False
    repeats: int = 5
    memory: int | str | None = None
    clock: Clock = timed
    patience: tuple[float, float] = (8.0, 1.0)
    fine: int = 160
    known: dict[Any, Factors] = field(default_factory=dict)
    python: Callable[[], Python] = Python

    def costs(self, op: Invertible | Blocks, x: Any) -> Costs:
        """What each op of a chain costs, on such an input."""
        check_input(x)
        if isinstance(op, Blocks):
            return self._between_ends(op, x)
        with untouched(op):
            return self._costs(op, x)

    def _between_ends(self, blocks: Blocks, x: Any) -> Costs:
        """What each block of a model costs, and its two ends: NOTE [Blocks]."""
        shown, given, loss_bytes = self._shown(blocks, x)
        calls = [replace(call, rest=_realised(call.rest), named=_realised(call.named)) for call in shown.calls]
        inner = replace(self, errors=False, loss=mean_square).costs(Chain(tuple(map(OneWay, calls))), shown.entry)
        rates = _rates(shown.entry)
        scale = sum(op.forward for op in inner.ops) / shown.forward.seconds(rates)
        unit = inner.unit
        before, behind = (
            replace(
                end.costs,
                forward=whole(scale * end.forward.seconds(rates), unit),
                backward=whole(scale * end.backward.seconds(rates), unit),
            )
            for end in (shown.before, shown.behind)
        )
        ops = (before, *(replace(op, alone=True) for op in inner.ops), behind)
        key = " > ".join(blocks.names), shape_key(given)
        return Costs(ops, nbytes(given), loss_bytes, key, None, inner.scaled, inner.enter, unit)

    def _shown(self, blocks: Blocks, x: Any) -> tuple[Shown, Wire, int]:
        """What goes through a model, on fake tensors if it does not look at values; its input, and the loss's bytes."""
        model = OneWay(blocks.model)
        with untouched(model), faking() as mode:
            given = faked(x, mode, home_of(model))
            try:
                shown = show(blocks, given)
                return shown, given, _loss_bytes(self.loss, shown.y)
            except LOOKS_AT_VALUES:
                pass
        with untouched(model):
            shown = show(blocks, realised(x, given))
            return shown, given, _loss_bytes(self.loss, shown.y)

    def _costs(self, op: Invertible, x: Any) -> Costs:
        ops = flat_ops(op)
        fine = len(ops) <= self.fine
        whole = [1] * len(ops) if fine else [len(halves(stage)) for stage in flat_stages(op)]
        with faking() as mode:
            fake = faked(x, mode, home_of(op))
        with untouched(op):  # before anything real comes to what was made of fake tensors
            with faking(mode), Books():  # who takes parameters for fake ones, too: torch is several times faster
                units, inputs = _units(ops, whole, fake)
                loss_bytes = _loss_bytes(self.loss, inputs[-1])
            chain = [unit for unit, _ in units]
            sizes = _all_bytes(chain, inputs, mode)
        found = [size.costs for size in sizes]
        memory = free_bytes(fake) if self.memory is None else parse_bytes(self.memory, "profile: memory")
        given = realised(x, fake, _part(found, inputs, memory))
        scale = rows(fake) / rows(given)
        with one_thread():
            seconds, enter, unit = self._seconds(chain, inputs, given, sizes)
        titles = iter([title for stage in flat_stages(op) for title in _titles(stage, fine)])
        costs = [
            replace(
                bytes_,
                name=_joined([next(titles) for _ in range(count)]),
                parts=count,
                exact=is_exact(unit),
                **{k: _scaled(v, scale) for k, v in times.items()},
                keep=bytes_.keep * any(times["spares"]),
                kept=bytes_.kept * any(times["spares"]),
                off=reading.off,
                doubt=scale * reading.doubt,
            )
            for (unit, count), bytes_, (reading, times) in zip(units, found, seconds, strict=True)
        ]
        measured = sweep(chain, given, self.loss) if self.errors else None
        return Costs(tuple(costs), nbytes(fake), loss_bytes, key_of(op, fake), measured, scale, enter, scale * unit)

    def _seconds(
        self, ops: Sequence[Invertible], inputs: Sequence[Wire], given: Wire, sizes: Sequence[Sizes]
    ) -> tuple[list[tuple[Reading, dict[str, Any]]], float, float]:
        """What was read of each op, and its seconds; a step's own; a unit that all are whole numbers of.

        Rules 2, 6 and 7 of NOTE [Profile].
        """
        kinds = [_kind_in_time(op, like) for op, like in zip(ops, inputs[:-1], strict=True)]
        ways: dict[Any, tuple[bool, Through]] = {}
        counts: dict[Any, Counts] = {}
        for op, kind, size in zip(ops, kinds, sizes, strict=True):
            ways.setdefault(kind, (math.isfinite(size.costs.inverse), by_recompute(op)))
            counts.setdefault(kind, size.counts)
        python = self.python()
        look = partial(read, counts=counts, kinds=kinds, rates=_rates(given), known=self.known, python=python)
        begin, least = time.process_time(), self._round(ops, kinds, ways, given)
        found, done = look({kind: beyond_idle(seconds) for kind, seconds in least.items()}), 1
        while self._goes_on(done, time.process_time() - begin, [found[kind] for kind in kinds]):
            least = _least(least, self._round(ops, kinds, ways, given))
            found, done = look({kind: beyond_idle(seconds) for kind, seconds in least.items()}), done + 1
        self.known.update({kind: reading.factors for kind, reading in found.items()})
        unit = unit_of(sum(found[kind].seconds["step"] for kind in kinds))
        enter = whole(python.of_step(len(ops), next((reading.call for reading in found.values()), 0.0)), unit)
        return [(found[kind], costs_in(found[kind].seconds, unit)) for kind in kinds], enter, unit

    def _goes_on(self, done: int, spent: float, found: Sequence[Reading]) -> bool:
        """Whether there is another round: more of them where what was timed is not what was expected."""
        more = 1 if all(reading.is_expected for reading in found) else AGAIN
        patience = max(self.patience[0] * sum(reading.seconds["step"] for reading in found), self.patience[1])
        return done < more * self.repeats and spent * (done + 1) / done <= more * patience

    def _round(
        self, ops: Sequence[Invertible], kinds: Sequence[Any], ways: dict[Any, tuple[bool, Through]], x: Wire
    ) -> dict[Any, Seconds]:
        """One trial of each kind of op, on real values that go through the chain until every kind has been met."""
        found: dict[Any, Seconds] = {}
        for op, kind in zip(ops, kinds, strict=True):
            if kind in found:
                with torch.no_grad():
                    x = as_input(op.forward(x))
            else:
                x, found[kind] = self.clock(op, x, *ways[kind])
            if len(found) == len(ways):
                break
        return found


def _scaled(seconds: Any, scale: float) -> Any:
    return tuple(scale * s for s in seconds) if isinstance(seconds, tuple) else scale * seconds


def _least(a: dict[Any, Seconds], b: dict[Any, Seconds]) -> dict[Any, Seconds]:
    return {kind: {name: min(value, b[kind][name]) for name, value in seconds.items()} for kind, seconds in a.items()}


def _rates(x: Wire) -> Rates:
    return CPU if all(t.device.type == "cpu" for t in leaves(x) if isinstance(t, Tensor)) else ACCELERATOR


def _realised(tree: Any) -> Any:
    return trees.tree_map_only(Tensor, partial(realised, None), tree)


def bytes_only(ops: Sequence[Invertible], x: Wire) -> Costs:
    """The costs of ops as they are grouped already, with bytes and without seconds."""
    with untouched(*ops), faking() as mode:
        inputs = [faked(x, mode, home_of(ops[0]))]
        for op in ops:
            inputs.append(_output(op, inputs[-1])[0])
        loss_bytes = _loss_bytes(mean_square, inputs[-1])
    with untouched(*ops):
        sizes = _all_bytes(ops, inputs, mode)
    return Costs(tuple(size.costs for size in sizes), nbytes(inputs[0]), loss_bytes)


def key_of(op: Invertible, x: Wire) -> tuple[str, ...]:
    """Which chain on which input: the names of its stages, and the shapes and dtypes."""
    return (" > ".join(stage.name for stage in flat_stages(op)), shape_key(x))


def shape_key(x: Wire) -> str:
    """Shapes and dtypes of a wire as a text."""
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in leaves(x) if isinstance(t, Tensor))


# ---- the ops, one by one ---------------------------------------------------------------------------------------------


def _units(ops: Sequence[Invertible], whole: Sequence[int], x: Wire) -> tuple[list[tuple[Invertible, int]], list[Wire]]:
    """The ops, in groups, with those that only make views joined to a neighbour; and the wires between them."""
    counts, inputs, pending = [], [x], 0
    known: dict[Any, tuple[Wire, bool]] = {}
    for op, count in zip(grouped(ops, whole), whole, strict=True):
        kind = _kind(op, x)
        if kind not in known:
            known[kind] = _output(op, x)
        x, is_new = known[kind]
        pending += count
        if is_new:
            counts.append(pending)
            inputs.append(x)
            pending = 0
        elif counts:
            counts[-1] += pending
            inputs[-1], pending = x, 0
    if pending:
        counts.append(pending)
        inputs.append(x)
    return list(zip(grouped(ops, counts), counts, strict=True)), inputs


def _output(op: Invertible, x: Wire) -> tuple[Wire, bool]:
    """What an op gives, as an input, and whether it makes storages; from real values where it looks at them."""
    try:
        with torch.no_grad():
            y = as_input(op.forward(x))
    except LOOKS_AT_VALUES:
        mode = fake_mode()
        assert mode is not None
        torch.clear_autocast_cache()
        with outside_modes(), torch.no_grad():
            y = faked(as_input(op.forward(realised(None, x))), mode)
    return y, _makes_storage(x, y)


def _makes_storage(x: Wire, y: Wire) -> bool:
    before, after = (set(map(storage_id, storages(wire))) for wire in (x, y))
    return not after <= before


def _all_bytes(ops: Sequence[Invertible], inputs: Sequence[Wire], mode: FakeTensorMode) -> list[Sizes]:
    """The bytes of each op, from the last to the first: how what comes back lies in memory is up to the op after."""
    known: dict[Any, Sizes] = {}
    found: list[Sizes] = []
    layouts = APART
    for op, like in zip(reversed(ops), reversed(inputs[:-1]), strict=True):
        kind = _kind(op, like), layouts
        if kind not in known:
            known[kind] = Subject(op, like, mode, layouts).measured()
        found.append(known[kind])
        layouts = known[kind].sends
    return found[::-1]


def _part(found: Sequence[OpCosts], inputs: Sequence[Wire], memory: float) -> int:
    """Into how many parts a batch has to be divided, so that each op fits into memory."""
    peaks = [
        nbytes(x) + max(op.peak_taped, op.peak_backward, op.peak_inverse) + op.bytes
        for op, x in zip(found, inputs[:-1], strict=True)
    ]
    count = 1
    while max(peaks, default=0) > count * memory and count < rows(inputs[0]):
        count *= 2
    return min(count, rows(inputs[0]))


def _loss_bytes(loss: Loss, y: Any) -> int:
    """The most memory between forward and backward, beyond the output."""
    y = map_tensors(as_input, y)
    inputs = [t for t in tensors_of(y) if is_differentiable(t)]
    with Books() as books:
        number = number_of(loss, y)
        gradients = torch.autograd.grad(number, inputs, allow_unused=True)
        del gradients
        return books.take_peak()


# ---- kinds -----------------------------------------------------------------------------------------------------------


def _kind_in_time(op: Invertible, x: Wire) -> Any:
    """What tells apart ops that take different times: which half of a coupling one is does not, nor does a layout."""
    if isinstance(op, Half):
        op, x = replace(op, target=0, label=""), op.in_place(x)
    return _structure(op), tuple(
        (t.shape, t.dtype, t.device, t.requires_grad) if isinstance(t, Tensor) else repr(t) for t in leaves(x)
    )


def _kind(op: Invertible, x: Wire) -> Any:
    places = {storage_id(s): i for i, s in enumerate(storages(x))}
    layout = [
        (t.shape, t.stride(), t.dtype, t.device, t.requires_grad, places[storage_of(t)])
        if isinstance(t, Tensor) else repr(t)
        for t in leaves(x)
    ]  # fmt: skip
    return _structure(op), tuple(layout)


def _structure(item: Any) -> Any:
    """What tells one kind of op from another: code, configuration and shapes, but not values."""
    if isinstance(item, nn.Module):
        shapes = tuple((t.shape, t.dtype, t.requires_grad) for t in [*item.parameters(), *item.buffers()])
        return repr(item), item.training, shapes
    if isinstance(item, Tensor):
        return item.shape, item.dtype, item.requires_grad
    if isinstance(item, partial):
        return _structure([item.func, *item.args, *sorted(item.keywords.items())])
    if isinstance(item, MethodType):
        return _structure([item.__self__, item.__func__])
    if isinstance(item, FunctionType):
        return item.__code__, _structure([*contents_of(item).values()])
    if isinstance(item, (tuple, list)):
        return tuple(map(_structure, item))
    if is_dataclass(item) and not isinstance(item, type):
        return type(item), tuple(_structure(getattr(item, f.name)) for f in fields(item))
    return item if isinstance(item, (int, float, str, bytes, bool, type(None), torch.dtype, torch.Size)) else id(item)


WIDTH = 24  # of how an op is shown


def _titles(stage: Invertible, fine: bool) -> list[tuple[str, bool]]:
    """How each op of a stage is shown, a coupling's half by half or as one; and whether it only moves elements."""
    parts = halves(stage)
    if fine and len(parts) > 1:
        return [(_half_title(stage.name, half), False) for half in parts]
    text = name_of(stage.fn) if isinstance(stage, OneWay) else repr(stage)
    return [(text if len(text) <= WIDTH else stage.name, only_moves(stage))] * len(parts)


def _half_title(stage: str, half: Half) -> str:
    text = f"{stage}: {half.label}={name_of(half.fn)}"
    return text if len(text) <= WIDTH else f"{stage}: {half.label}"


def _joined(titles: Sequence[tuple[str, bool]]) -> str:
    """How ops are shown as one: by those that do more than move elements."""
    return " > ".join(dict.fromkeys(title for title, moves in titles if not moves)) or titles[0][0]
