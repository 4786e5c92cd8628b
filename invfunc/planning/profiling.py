"""Profiling: what each op of a chain costs, measured on the very mechanisms that a plan is made of.

NOTE [Profile]

1.  *Bytes* come from fake tensors, which have shapes and storages but no memory: exact, so that one can plan
    what does not fit. Each op runs alone, as in a plan: without a tape, with one, and on a trunk. An op that looks at
    its
    values (an iterative inverse) can not run on fake tensors; it is measured on real ones.
2.  *Time* comes from running each kind of op once on real values; the least of a few repeats counts.
3.  *Kinds.* Ops of the same structure, on inputs of the same layout, are measured once.
4.  *Views.* An op whose output lies in its input's storages costs nothing to keep: it belongs to the op before it.
5.  *Errors* come from sweeps: from an exact value and an exact gradient at an anchor, fused inverses go down the chain,
    and each gradient on the way is compared with the exact one. Products of gains would be off by orders of magnitude.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._pytree import tree_map_only

from ..errors import NotInvertibleError
from ..invertible import Chain, Invertible, LiveVJP, OneWay, lift, name_of
from ..lowering import Options, owners_of, rooted, walk
from ..memory import _Ledger
from ..replay import recorded
from ..trunk import State, Strand, carrier, map_state, strands, values
from ..wires import Wire, is_differentiable, leaves, map_wire
from .costs import Costs, OpCosts
from .executor import flat_ops, grouped, has_inverse, is_exact

_LOOKS_AT_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
Loss = Callable[[Wire], Tensor]


def mean_square(y: Wire) -> Tensor:
    """The loss that is assumed where none is given."""
    return torch.stack([leaf.square().mean() for leaf in leaves(y) if is_differentiable(leaf)]).sum()


def profile(
    f: Invertible | Callable[..., Any], x: Any, *, loss: Loss = mean_square, errors: bool = False, repeats: int = 3
) -> Costs:
    """Measure what each op of a chain costs in bytes and seconds: what a plan is made from.

    Args:
        f: A chain of ops. Nested chains flatten; couplings, `parallel` and named blocks are taken whole.
        x: An input: tensors, fake tensors, or a shape like ``(32, 64)`` (a wire of shapes for a tuple wire).
        loss: What turns the output into a number; it counts for the memory between forward and backward.
        errors: Whether to measure the gradient error of runs of inverses too, which takes several steps more and
            keeps every value and gradient of the chain meanwhile.
        repeats: How often each kind of op is timed.

    Returns:
        The costs, pure data: save them, load them, edit them, plan from them.

    Cost:
        About ``repeats`` plain steps if all ops differ, less where they repeat. Bytes are found without allocating.

    Example:
        >>> import torch, invfunc as inv
        >>> costs = inv.profile(inv.chain(inv.pair(torch.exp, torch.log), torch.tanh), (16, 8))
        >>> [op.bytes == 16 * 8 * torch.finfo(torch.get_default_dtype()).bits // 8 for op in costs.ops]
        [True, True]
    """
    ops = flat_ops(lift(f))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = _faked(x, mode)
        units, inputs = _units(ops, fake)
        loss_bytes = _loss_bytes(loss, inputs[-1])
    found = _all_bytes([unit for unit, _ in units], inputs, mode)
    timed: dict[Any, OpCosts] = {}
    costs: list[OpCosts] = []
    for (unit, count), given, like, bytes_ in zip(units, _on_real(units, x, fake), inputs[:-1], found, strict=True):
        kind = _kind(unit, like)
        if kind not in timed:
            timed[kind] = _timed(unit, given, bytes_, repeats)
        del given
        seconds = {name: getattr(timed[kind], name) for name in ("forward", "backward", "inverse")}
        costs.append(replace(bytes_, name=_title(unit), parts=count, exact=is_exact(unit), **seconds))
    made = Costs(tuple(costs), _bytes(fake), loss_bytes, key_of(ops, fake))
    return replace(made, errors=sweep([u for u, _ in units], _realised(x, fake), loss)) if errors else made


def bytes_only(ops: Sequence[Invertible], x: Wire) -> Costs:
    """The costs of ops as they are grouped already, with bytes and without seconds."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [_faked(x, mode)]
        for op in ops:
            with torch.no_grad():
                inputs.append(_as_input(op.forward(inputs[-1])))
        loss_bytes = _loss_bytes(mean_square, inputs[-1])
    found = _all_bytes(ops, inputs, mode)
    return Costs(tuple(found), _bytes(inputs[0]), loss_bytes, (" > ".join(op.name for op in ops), shape_key(x)))


def key_of(ops: Sequence[Invertible], x: Wire) -> tuple[str, ...]:
    """Which chain on which input: the names of its ops, and the shapes and dtypes."""
    return (" > ".join(op.name for op in ops), shape_key(x))


def shape_key(x: Wire) -> str:
    """Shapes and dtypes of a wire as a text."""
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in leaves(x) if isinstance(t, Tensor))


# ---- inputs ----------------------------------------------------------------------------------------------------------


def _faked(x: Any, mode: FakeTensorMode) -> Wire:
    """An input, or a shape, as fake tensors."""
    if isinstance(x, FakeTensor):
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).requires_grad_(x.requires_grad)
    elif isinstance(x, Tensor):
        return mode.from_tensor(x.detach()).requires_grad_(x.requires_grad)
    elif isinstance(x, (torch.Size, list)) or (isinstance(x, tuple) and x and all(type(n) is int for n in x)):
        x = torch.empty(tuple(x)).requires_grad_()
    elif isinstance(x, tuple):
        return tuple(_faked(part, mode) for part in x)
    return x


def _realised(x: Any, fake: Wire) -> Wire:
    """Real values for an input; random numbers where only shapes are given."""
    if isinstance(fake, tuple):
        parts = x if isinstance(x, tuple) else (None,) * len(fake)
        return tuple(_realised(part, like) for part, like in zip(parts, fake, strict=True))
    if not isinstance(fake, Tensor) or (isinstance(x, Tensor) and not isinstance(x, FakeTensor)):
        return x
    make = torch.randn if is_differentiable(fake) else torch.zeros
    return make(fake.shape, dtype=fake.dtype, device=fake.device).requires_grad_(fake.requires_grad)


def _units(ops: Sequence[Invertible], x: Wire) -> tuple[list[tuple[Invertible, int]], list[Wire]]:
    """The ops with those that only make views joined to a neighbour, and the wires between them."""
    counts, inputs, pending = [], [x], 0
    for op in ops:
        before = x
        with torch.no_grad():
            x = _as_input(op.forward(x))
        pending += 1
        if _storages(x) - _storages(before):
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


def _as_input(y: Wire) -> Wire:
    """An op's output as the next one's input: in a training step it needs a gradient wherever it can have one."""
    return map_wire(lambda leaf: leaf.detach().requires_grad_() if is_differentiable(leaf) else leaf, y)


def _on_real(units: Sequence[tuple[Invertible, int]], x: Any, fake: Wire) -> Iterator[Wire]:
    """A real input for each op, one after the other."""
    given = _realised(x, fake)
    for unit, _ in units:
        yield given
        with torch.no_grad():
            given = _as_input(unit.forward(given))


def _storages(x: Wire) -> set[int]:
    return {t.untyped_storage()._cdata for t in leaves(x) if isinstance(t, Tensor)}


def _by_storage(x: Wire) -> list[torch.UntypedStorage]:
    """The storages of a wire, each once, in order."""
    found: dict[int, torch.UntypedStorage] = {}
    for leaf in leaves(x):
        if isinstance(leaf, Tensor):
            found.setdefault(leaf.untyped_storage()._cdata, leaf.untyped_storage())
    return list(found.values())


def _bytes(x: Wire) -> int:
    return sum(storage.nbytes() for storage in _by_storage(x))


# ---- kinds -----------------------------------------------------------------------------------------------------------


def _kind(op: Invertible, x: Wire) -> Any:
    places = {s._cdata: i for i, s in enumerate(_by_storage(x))}
    layout = [
        (t.shape, t.stride(), t.dtype, t.device, t.requires_grad, places[t.untyped_storage()._cdata])
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
        cells = [cell.cell_contents for cell in item.__closure__ or ()]
        return item.__code__, _structure([*(item.__defaults__ or ()), *cells])
    if isinstance(item, (tuple, list)):
        return tuple(map(_structure, item))
    if is_dataclass(item) and not isinstance(item, type):
        return type(item), tuple(_structure(getattr(item, f.name)) for f in fields(item))
    return item if isinstance(item, (int, float, str, bytes, bool, type(None), torch.dtype, torch.Size)) else id(item)


# ---- one op ----------------------------------------------------------------------------------------------------------


def _all_bytes(ops: Sequence[Invertible], inputs: Sequence[Wire], mode: FakeTensorMode) -> list[OpCosts]:
    """The bytes of each op, from the last to the first: how a gradient lies in memory is up to the op after."""
    known: dict[Any, tuple[OpCosts, bool]] = {}
    found: list[OpCosts] = []
    joined = False
    for op, like in zip(reversed(ops), reversed(inputs[:-1]), strict=True):
        kind = _kind(op, like), joined
        if kind not in known:
            known[kind] = _measured(op, like, mode, joined)
        costs, joined = known[kind]
        found.append(costs)
    return found[::-1]


def _measured(op: Invertible, fake: Wire, mode: FakeTensorMode, joined: bool) -> tuple[OpCosts, bool]:
    """Bytes, on fake tensors if the op lets us, else on real ones; and whether the gradients of x share storage."""
    found, inverse = OpCosts(op.name, 0.0, 0.0), 0.0 if has_inverse(op) else math.inf
    shared: list[bool] = []
    for way in (
        _bytes_plain,
        partial(_bytes_taped, joined, shared),
        *([] if inverse else [partial(_bytes_undone, joined)]),
    ):
        try:
            found = _on_fake(way, found, op, fake, mode)
        except NotInvertibleError:
            inverse = math.inf
    return replace(found, inverse=inverse), shared[0]


def _on_fake(way: Callable[..., OpCosts], found: OpCosts, op: Invertible, fake: Wire, mode: FakeTensorMode) -> OpCosts:
    try:
        with mode:
            return way(found, op, fake)
    except _LOOKS_AT_VALUES:
        return way(found, op, _realised(None, fake))


class _Books(_Ledger):
    """A ledger that takes real tensors among fake ones, such as parameters, for what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # real tensors, and the fake ones that stand for them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if mode is not None:
            args, kwargs = tree_map_only(Tensor, partial(self._in_mode, mode), (args, kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _in_mode(self, mode: FakeTensorMode, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._before:
            self._before[id(tensor)] = tensor, mode.from_tensor(tensor)
        return self._before[id(tensor)][1]


def _peak(ledger: _Ledger) -> int:
    """The peak since it was last asked for."""
    peak = max(ledger._peak, ledger._balance())
    ledger._peak = ledger._balance()
    return peak


def _bytes_plain(found: OpCosts, op: Invertible, x: Wire) -> OpCosts:
    with _Books() as ledger, torch.no_grad():
        y = op.forward(x)
        peak = _peak(ledger)
    own = [s.nbytes() for s in _by_storage(y)]
    return replace(found, peak_forward=peak, bytes=sum(own), gradient=_gradient_bytes(y))


def _gradient_bytes(y: Wire) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(y) if is_differentiable(leaf))


def _bytes_taped(joined: bool, shared: list[bool], found: OpCosts, op: Invertible, x: Wire) -> OpCosts:
    last = _taped(joined, shared, True, found, op, x).peak_backward - found.gradient
    return replace(_taped(joined, shared, False, found, op, x), peak_backward_last=last)


def _bytes_undone(joined: bool, found: OpCosts, op: Invertible, x: Wire) -> OpCosts:
    last = _undone_once(joined, True, found, op, x).peak_inverse - found.gradient
    return replace(_undone_once(joined, False, found, op, x), peak_inverse_last=last)


def _taped(joined: bool, shared: list[bool], keeps: bool, found: OpCosts, op: Invertible, x: Wire) -> OpCosts:
    parameters = parameters_of(op, x)
    with _Books() as ledger:
        xs = _copied(x)
        inputs, base = [weakref.ref(s) for s in _by_storage(xs)], _bytes(xs)
        _peak(ledger)
        trial = Trial.taped(op, xs, parameters, joined)
        peak = _peak(ledger) - base
        outputs = [weakref.ref(s) for s in _by_storage(trial.y)]
        trial.y = xs = None
        held_in, held_out = _alive(inputs), _alive(outputs)
        tape = ledger._balance() - sum(held_in)
        trial.keep(keeps)
        _peak(ledger)
        trial.backward()
        back = _peak(ledger) - sum(held_in)
        shared[:] = [trial.shares_gradients()]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return replace(
        found,
        tape=tape,
        holds_input=held_in,
        holds_output=held_out,
        parameters=weights,
        peak_taped=peak,
        peak_backward=back,
    )


def _undone_once(joined: bool, keeps: bool, found: OpCosts, op: Invertible, x: Wire) -> OpCosts:
    parameters = parameters_of(op, x)
    with _Books() as ledger:
        xs = _copied(x)
        base = _bytes(xs)
        _peak(ledger)
        trial = Trial.undone(op, xs, parameters, joined)
        forward = _peak(ledger) - base
        xs = None
        residue = ledger._balance() - _bytes(trial.y)
        trial.y = None
        trial.keep(keeps)
        _peak(ledger)
        trial.backward()
        back = _peak(ledger) - residue
    return replace(found, residue=residue, peak_forward=max(found.peak_forward, forward), peak_inverse=back)


def _alive(storages: Sequence[Any]) -> tuple[int, ...]:
    return tuple(0 if s() is None else s().nbytes() for s in storages)


def _copied(x: Wire) -> Wire:
    """A copy of a wire whose tensors share storages as the original's do."""
    bases: dict[int, Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        storage, plain = leaf.untyped_storage(), leaf.detach()
        if storage._cdata not in bases:
            count = storage.nbytes() // leaf.element_size()
            bases[storage._cdata] = plain.as_strided((count,), (1,), 0).clone()
        base = bases[storage._cdata]
        return base.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset()).requires_grad_(leaf.requires_grad)

    with torch.no_grad():
        return map_wire(copy, x)


def parameters_of(op: Invertible, x: Wire) -> list[Tensor]:
    """What an op closes over and gives gradients to."""
    inner = map_wire(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, x)
    _, recording = recorded(op.forward, inner, owners_of(op), True)
    return [t for t in recording.captured if t.requires_grad]


class Trial:
    """One op, run forward as it will be in a plan; ``backward`` then runs it back."""

    def __init__(self, y: Wire, inputs: list[Any], carriers: Sequence[Tensor], joined: bool, gxs: list[Any]) -> None:
        self.y, self.inputs, self.gxs = y, inputs, gxs
        roots = [t for t in leaves(y) if is_differentiable(t) and t.requires_grad]
        self.kept: list[Any] = [False]
        self.seed = _Emit.apply((y if carriers else (), joined, self.kept), len(roots), *roots, *carriers)

    def keep(self, wanted: bool) -> None:
        """Keep the gradients that backward begins with, as a region does until it has run back."""
        self.kept[:] = [wanted]

    @classmethod
    def taped(cls, op: Invertible, x: Wire, parameters: list[Tensor], joined: bool = False) -> Trial:
        """Run with a tape."""
        gxs: list[Any] = []
        anchor = torch.zeros((), requires_grad=True)
        y = values(walk(op, _strands_of(_root(anchor, x, gxs)), Options(mode="store")))
        return cls(y, [anchor, *parameters], (), joined, gxs)

    @classmethod
    def undone(cls, op: Invertible, x: Wire, parameters: list[Tensor], joined: bool = False) -> Trial:
        """Run on a trunk."""
        anchor = torch.zeros((), requires_grad=True)
        carriers = [carrier(leaf).requires_grad_() for leaf in leaves(x) if is_differentiable(leaf)]
        left = iter(carriers)
        state = map_state(
            lambda leaf: Strand(leaf, next(left)) if is_differentiable(leaf) else leaf, _root(anchor, x, [])
        )
        del x
        state = walk(op, state, Options())
        return cls(values(state), [anchor, *carriers, *parameters], [s.carrier for s in strands(state)], joined, [])  # pyright: ignore[reportArgumentType]

    def backward(self) -> tuple[Tensor | None, ...]:
        """Run back."""
        if not self.seed.requires_grad:
            return ()
        return torch.autograd.grad(self.seed, self.inputs, allow_unused=True)

    def shares_gradients(self) -> bool:
        """Whether the gradients of x lie in one storage."""
        given = [t for t in self.gxs if t is not None]
        return len({t.untyped_storage()._cdata for t in given}) < len(given)


def _strands_of(x: Wire) -> State:
    return map_state(lambda leaf: Strand(leaf, None) if is_differentiable(leaf) else leaf, x)


def _root(anchor: Tensor, x: Wire, gxs: list[Any]) -> Wire:
    needs = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves(x)]
    return rooted(anchor, map_wire(lambda t: t.detach() if isinstance(t, Tensor) else t, x), needs, gxs)


class _Emit(torch.autograd.Function):
    """``((y, joined, kept), n, *ys, *carriers) -> number``: backward makes the gradients that a chain would send."""

    @staticmethod
    def forward(held: tuple[Wire, bool, list[Any]], count: int, *tensors: Tensor) -> Tensor:
        return tensors[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        held, count, *tensors = inputs
        ctx.kinds = [(t.shape, t.dtype, t.device) for t in tensors[:count]]
        ctx.held, ctx.joined, ctx.kept = [t.detach() for t in leaves(held[0]) if is_differentiable(t)], held[1], held[2]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        gys = _joined(ctx.kinds) if ctx.joined else [torch.ones(s, dtype=d, device=at) for s, d, at in ctx.kinds]
        ys, ctx.held = ctx.held, []
        if ctx.kept[0]:
            ctx.kept += gys
        return (None, None, *gys, *ys)


def _joined(kinds: Sequence[tuple[torch.Size, torch.dtype, torch.device]]) -> list[Tensor]:
    """Gradients that lie in one storage."""
    _, dtype, device = kinds[0]
    sizes = [shape.numel() for shape, _, _ in kinds]
    parts = torch.ones(sum(sizes), dtype=dtype, device=device).split(sizes)
    return [part.view(shape) for part, (shape, _, _) in zip(parts, kinds, strict=True)]


def _title(unit: Invertible) -> str:
    """How an op is shown: a group by those of its ops that are not mere rearrangements."""
    if not (isinstance(unit, Chain) and unit.labels is None):
        return _shown(unit)
    return " > ".join(_shown(part) for part in unit.parts if not is_exact(part)) or _shown(unit.parts[0])


def _shown(op: Invertible) -> str:
    text = name_of(op.fn) if isinstance(op, OneWay) else repr(op)
    return text if len(text) <= 24 else op.name


# ---- seconds ---------------------------------------------------------------------------------------------------------


def _timed(op: Invertible, x: Wire, found: OpCosts, repeats: int) -> OpCosts:
    parameters = parameters_of(op, x)
    x = map_wire(lambda t: t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t, x)

    def plain() -> None:
        with torch.no_grad():
            op.forward(x)

    def taped() -> None:
        Trial.taped(op, x, parameters).backward()

    def undone() -> None:
        Trial.undone(op, x, parameters).backward()

    forward, step = (least_seconds(run, repeats, x) for run in (plain, taped))
    back = max(step - forward, 0.0)
    inverse = max(least_seconds(undone, repeats, x) - forward, 0.0) if math.isfinite(found.inverse) else math.inf
    return replace(found, forward=forward, backward=back, inverse=inverse)


def least_seconds(run: Callable[[], Any], repeats: int, x: Wire) -> float:
    """The least of some repeats."""
    on_cuda = any(isinstance(t, Tensor) and t.is_cuda for t in leaves(x))
    return min((_cuda_seconds if on_cuda else _cpu_seconds)(run) for _ in range(repeats))


def _cpu_seconds(run: Callable[[], None]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run()
    return clock() - begin


def _cuda_seconds(run: Callable[[], None]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


# ---- the loss --------------------------------------------------------------------------------------------------------


def _loss_bytes(loss: Loss, y: Wire) -> int:
    """The most memory between forward and backward, beyond the output."""
    y = _as_input(y)
    inputs = [t for t in leaves(y) if is_differentiable(t)]
    with _Books() as ledger:
        number = loss(y)
        gradients = torch.autograd.grad(number, inputs, allow_unused=True)
        del gradients
        return _peak(ledger)


# ---- errors ----------------------------------------------------------------------------------------------------------

SPACING = 6  # an anchor at every so many boundaries: the sweeps take about SPACING / 2 steps


def sweep(ops: Sequence[Invertible], x: Wire, loss: Loss) -> tuple[tuple[int, int, float], ...]:
    """The gradient error of runs of inverses: ``(i, k, error)`` for anchors k; rule 5 of NOTE [Profile]."""
    found: list[tuple[int, int, float]] = []
    xs, gs, closed = _exact(ops, x, loss)
    for k in _anchors(ops):
        y, gy, worst = xs[k], gs[k], 0.0
        for i in range(k - 1, -1, -1):
            if not has_inverse(ops[i]) or gy is None:
                break
            y, gy, given = _undone(ops[i], y, gy, xs[i])
            worst = max(worst, _distance(leaves(gy), leaves(gs[i])), _distance(given, closed[i]))
            found.append((i, k, worst))
    return tuple(found)


def _anchors(ops: Sequence[Invertible]) -> list[int]:
    """The ends of the longest runs of inverses, and boundaries inside them at regular distances."""
    able = [has_inverse(op) for op in ops] + [False]
    ends = [k for k in range(1, len(ops) + 1) if able[k - 1] and not able[k]]
    return sorted({*ends, *(k for k in range(SPACING, len(ops), SPACING) if able[k - 1])})


def _exact(ops: Sequence[Invertible], x: Wire, loss: Loss) -> tuple[list[Wire], list[Wire], list[list[Any]]]:
    """Every value of the chain, every gradient, and those of what each op closes over: a plain step."""
    xs = [_as_input(x)]
    with torch.no_grad():
        for op in ops:
            xs.append(_as_input(op.forward(xs[-1])))
    tensors = [t for t in leaves(xs[-1]) if is_differentiable(t)]
    given = iter(torch.autograd.grad(loss(xs[-1]), tensors, allow_unused=True))
    gs: list[Wire] = [map_wire(lambda t: next(given) if is_differentiable(t) else None, xs[-1])]
    closed: list[list[Any]] = []
    for op, value in zip(reversed(ops), reversed(xs[:-1]), strict=True):
        gx, weights = _pulled(op, value, gs[0])
        gs.insert(0, gx)
        closed.insert(0, weights)
    return xs, gs, closed


def _pulled(op: Invertible, x: Wire, gy: Wire) -> tuple[Wire, list[Any]]:
    """The gradients of x and of what an op closes over, with a tape."""
    parameters = parameters_of(op, x)
    y = op.forward(x)
    pairs = [(t, g) for t, g in zip(leaves(y), leaves(gy), strict=True) if g is not None and t.requires_grad]
    inputs = [t for t in leaves(x) if is_differentiable(t)]
    if not pairs:
        return map_wire(lambda _: None, x), [None] * len(parameters)
    roots, seeds = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(roots, [*inputs, *parameters], seeds, allow_unused=True))
    return map_wire(lambda t: next(found) if is_differentiable(t) else None, x), list(found)


def _undone(op: Invertible, y: Wire, gy: Wire, like: Wire) -> tuple[Wire, Wire, list[Any]]:
    """The rebuilt input and the gradients that come with it, from an output that may be a little off."""
    parameters = parameters_of(op, like)
    _, residue = op.forward_with_residue(map_wire(lambda t: t.detach() if isinstance(t, Tensor) else t, like))
    vjp = LiveVJP()
    x, gx = op.pull(residue, y, gy, vjp, None)
    given = [vjp.closed[id(p)][1] if id(p) in vjp.closed else None for p in parameters]
    return map_wire(lambda t: t.detach() if isinstance(t, Tensor) else t, x), gx, given


def _distance(found: Sequence[Any], exact: Sequence[Any]) -> float:
    """The largest difference of tensors, each relative to its largest entry."""
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return max((relative(a, b) for a, b in pairs), default=0.0)


def relative(found: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest entry; infinite where something is not a number."""
    if exact.numel() == 0:
        return 0.0
    error = float((found - exact).abs().max() / exact.abs().max().clamp(min=torch.finfo(exact.dtype).tiny))
    return error if math.isfinite(error) else math.inf
