"""Bit-exact inverses: a transform over values, after which a lowered backward has the bits of plain autograd.

NOTE [Exact] An inverse rounds, and so it drifts. Two modes undo the rounding; both need functions that give the same
bits when they run again.

1.  *Grid.* Sums of multiples of 2^-k are exact while they stay below 2^(p-k), p being the precision of the carrier. So
    the stream is put on a grid, and what a coupling's function returns is rounded to it; the gradient goes straight
    through. Out of range a grid drifts as silently as any other number, so every state is asked for its range.
2.  *Codes.* Forward is left as it is. Each op is undone at once, and what its inverse misses is kept: the difference
    of bit patterns, one byte an element, whatever the op.
3.  *The same layout.* A kernel may round otherwise on a slice than on a dense copy, and both passes come from slices
    somewhere: so every op makes what it gets dense. A law's first operand is what it changes, so its layout goes there
    and back.
4.  *The same grad mode.* LSTM, and attention in eval, take other kernels without gradients: both passes evaluate with
    gradients on, as every frame does (NOTE [Trunk]).
5.  *The same sums.* A sum of gradients depends on its order. So the gradient of a coupling's untouched component is a
    seed of its function's backward, and autograd adds that of every use to it, one after the other, as it always does.
    Nor is a split left out behind a concat: gradients would come dense, and a bias sums up a slice in another order.
6.  *A witness.* The hash of the bits with which a trunk begins is compared when they are rebuilt: whatever else went
    wrong raises, instead of giving another gradient. Under `inv.debug` every stage has one, and is named.
7.  *No negative zero on a grid.* Rounding makes none, and sums of others do not.
8.  *Transforms.* Under `torch.func` an op keeps its input instead of codes, and has no witness. A gradient of a
    gradient goes through the inverse as it rounds: the correction is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _torch
from ..checkpoint import Wrapper
from ..core.combine import Parallel, Plumbing
from ..core.couple import Additive, DerivedLaw, Half
from ..core.op import VJP, Again, Chain, Invertible, OneWay, Rearrangement, Residue, check_op, name_of
from ..core.packing import pack_codes, unpack_codes
from ..debug import checking
from ..engine import compiled
from ..engine.devices import Late, accelerators, send, when_here
from ..engine.interface import Run, State
from ..engine.lower import walk
from ..engine.random_numbers import RandomState
from ..errors import DomainError, NotInvertibleError, OptionError, ReplayError, WireError
from ..wires import Wire, describe, is_differentiable, leaves, map_wire, refuse_nested, spread
from .bits import bit_hash, corrected, difference
from .escapes import LateDifference

Path: TypeAlias = tuple[str, ...]
Lift: TypeAlias = Callable[[Invertible, Path], Invertible]  # of a primitive, and where it stands

# ---- what is evaluated twice has the same bits (rules 3 to 5) ----------------------------------------------------


def dense(x: Any) -> Any:
    """A tensor as it is if it fills its memory in order, channels first or last; a row-major copy otherwise."""
    if not is_differentiable(x) or x.is_contiguous() or _is_channels_last(x):
        return x
    return x.contiguous()


def _is_channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and not _torch.active() and x.is_contiguous(memory_format=formats[x.dim()])


def _packed(xs: tuple[Wire, ...]) -> Wire:
    """The wire of which positional arguments were made."""
    return xs if len(xs) != 1 else xs[0]


class Exact(Invertible):
    """A primitive with an exact inverse."""

    @cached_property
    def witnessed(self) -> Invertible:
        """The op with a witness: one value, so that what is learnt of its functions is remembered."""
        return Witnessed(self)


@_torch.called_not_traced
def _refuse_graph() -> None:
    raise ReplayError(
        "an exact op is being compiled",
        expected="that it runs as it is written: a graph rounds otherwise than the functions that backward runs again",
        cure="leave it out of torch.compile, and compile the functions inside: couple(torch.compile(f))",
    )


def _check_engine(run: Run) -> None:
    """Raise in a graph, and where `invfunc.compile_stages` would make one of an op and another of its inverse."""
    if compiled.is_active() or (isinstance(run.engine, compiled.Traced) and run.options.mode == "invert"):
        _refuse_graph()


@walk.register
def _(op: Exact, state: State, run: Run) -> State:
    _check_engine(run)
    if isinstance(op, Moved):
        return run.engine.move(op, state, run)
    part = op.witnessed if run.engine.opens(state) or checking() else op
    return walk.default(part, state, run.under(replace(run.options, drift="off", keep=None)))


@dataclass(frozen=True, repr=False)
class Witnessed(Wrapper):
    """An exact op that keeps a hash of its input, and compares it with that of the input it rebuilds."""

    compares = True

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        y, residue = self.op.forward_with_residue(x)
        return y, (() if _torch.active() else _hashes(x), residue)

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        x = self.op.inverse_with_residue(residue[1], y)
        self._compare(x, residue[0])
        return x

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        x, gx = self.op.pull(residue[1], y, gy, vjp, needs)
        self._compare(x, residue[0])
        return x, gx

    def rebuild(self, residue: Residue, y: Wire, again: Again) -> Wire:
        x = self.op.rebuild(residue[1], y, again)
        self._compare(x, residue[0])
        return x

    def _compare(self, x: Wire, before: tuple[Tensor, ...]) -> None:
        if before:
            changed = [send((now != was).reshape(1)) for now, was in zip(_hashes(x), before, strict=True)]
            when_here(changed, partial(self._judge, changed))

    def _judge(self, changed: Sequence[Late]) -> None:
        if any([number.values()[0] for number in changed]):
            raise ReplayError(
                f"{self.op!r} was not rebuilt with the bits of forward",
                cure="a function gave other bits than in forward: weights or buffers changed in between (even through "
                ".data), random numbers that are not torch's, or a kernel that is not deterministic; inv.debug(True) "
                "names the first such stage",
            )

    def inverted(self) -> Invertible:
        return Witnessed(self.op.inverted())

    def __repr__(self) -> str:
        return repr(self.op)


def _hashes(x: Wire) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple([bit_hash(leaf) for leaf in leaves(x) if is_differentiable(leaf)])


@dataclass(frozen=True, repr=False)
class ExactHalf(Exact, Half):
    """Half of a coupling, with an exact inverse."""

    def forward(self, x: Wire) -> Wire:
        x1, x2 = self.target_first(map_wire(dense, x))
        t = spread(self.fn, x2)
        self.check_given(t, x1)
        return self.in_place((self.law.op(t).forward(x1), x2))

    def undo(self, y: Wire) -> Wire:
        y1, x2 = self.target_first(map_wire(dense, y))
        t = spread(self.fn, x2)
        self.check_given(t, y1)
        return self.in_place((self.law.op(t).undo(y1), x2))

    def evaluate(self, x: Wire) -> tuple[Wire, Wire]:
        x = map_wire(dense, x)  # one copy for both steps: gradients add up at it as they do at x (rule 5)
        return x, super().evaluate(x)

    def forward_by(self, t: tuple[Wire, Wire], x: Wire) -> tuple[Wire, Residue]:
        x, given = t
        return super().forward_by(given, x)

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        """Fused, as `Half.pull`; the gradient of the untouched component is a seed (rule 5)."""
        (y1, x2), (gy1, gy2) = self.target_first(map_wire(dense, y)), self.target_first(gy)
        need1, need2 = (None, None) if needs is None else self.target_first(needs)
        (t, _), pull_fn = vjp(self._beside_its_input, x2, need2)
        x1, gx1, gt = self.law.pull(t, residue, y1, gy1, vjp, need1)
        del t
        return self.in_place((x1, x2)), self.in_place((gx1, pull_fn((gt, gy2))))

    def _beside_its_input(self, *x2: Wire) -> tuple[Wire, Wire]:
        return spread(self.fn, _packed(x2)), _packed(x2)

    def rebuild(self, residue: Residue, y: Wire, again: Again) -> Wire:
        """Fused, as `Half.rebuild`."""
        (y1, x2), (like1, like2) = self.target_first(map_wire(dense, y)), self.in_place(again.like)
        t = again.evaluate(self._of_dense, x2, like2)
        x1 = again.quietly(self.law.undo, t, residue, y1)
        again.hand_over(lambda x1: self.law.apply(t, map_wire(dense, x1)), x1, like1)
        return self.in_place((x1, x2))

    def _of_dense(self, *x2: Wire) -> Wire:
        return spread(self.fn, map_wire(dense, _packed(x2)))

    def __repr__(self) -> str:
        return f"exact({Half.__repr__(replace(self, law=self.law.original()))})"


@dataclass(frozen=True, repr=False)
class Moved(Exact):
    """A rearrangement, whose gradient is that of autograd down to the sign of a zero, and its layout (rule 5)."""

    op: Rearrangement

    cancels = False

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        return self.op.forward_with_residue(x)

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        return self.op.inverse_with_residue(residue, y)

    def inverted(self) -> Invertible:
        return Moved(self.op.inverted())  # pyright: ignore[reportArgumentType]

    @property
    def name(self) -> str:
        return self.op.name

    def __repr__(self) -> str:
        return repr(self.op)


# ---- the walk ------------------------------------------------------------------------------------------------------


def lifted(op: Invertible, lift: Lift, path: Path = ()) -> Invertible:
    """A composition with its primitives lifted, each told where it stands."""
    if isinstance(op, (Exact, Gridded, Plumbing)):
        return op
    if isinstance(op, Chain):
        parts = _parts(op, lift, path)
        labels = None if op.labels is None else (f"exact({op.labels[0]})", f"exact({op.labels[1]})")
        return op if all(map(is_, parts, op.parts)) else Chain(parts, labels)
    if isinstance(op, Parallel):
        return Parallel(_parts(op, lift, path))
    if isinstance(op, Wrapper):
        return op.mapped(lambda part: lifted(part, lift, path))
    return lift(op, path)


def _parts(op: Chain | Parallel, lift: Lift, path: Path) -> tuple[Invertible, ...]:
    places = [(op.place(i),) if op.place(i) else () for i in range(len(op.parts))]
    return tuple(lifted(part, lift, (*path, *place)) for part, place in zip(op.parts, places, strict=True))


# ---- codes (rule 2) --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codes:
    """Differences, one byte an element; lifts primitives to ops that keep them."""

    is_packed = False

    def __call__(self, op: Invertible, path: Path) -> Invertible:
        """Lift a primitive."""
        if isinstance(op, OneWay):
            return op
        if isinstance(op, Rearrangement):
            return Moved(op)
        if isinstance(op, Half):
            return ExactHalf(op.fn, CodedLaw(op.law, self), op.target, op.label)
        return CodedStage(op, self)

    def encode(self, x: Any, guess: Any) -> Any:
        """What is kept of a leaf."""
        if not is_differentiable(x):
            return None
        return self.packed(difference(x, guess)) if x.is_cpu else LateDifference(x, guess, self.is_packed)

    def decode(self, guess: Any, kept: Any) -> Any:
        """A leaf of which a guess was made."""
        if kept is None:
            return guess
        plain, is_late = guess.detach(), isinstance(kept, LateDifference)
        return _through(guess, kept.correct(plain) if is_late else corrected(plain, self.unpacked(kept)))

    def packed(self, found: Any) -> Any:
        """A difference as it is kept."""
        return found

    def unpacked(self, kept: Any) -> Any:
        """A difference as it was."""
        return kept


@dataclass(frozen=True)
class PackedCodes(Codes):
    """Differences, two bits an element where they are at most 1."""

    is_packed = True

    def packed(self, found: Any) -> Any:
        dtype, codes, *escapes = found
        return dtype, codes.shape, *pack_codes(codes), *escapes

    def unpacked(self, kept: Any) -> Any:
        dtype, shape, packed, others, *escapes = kept
        return dtype, unpack_codes(packed, others, shape), *escapes


def _through(guess: Tensor, value: Tensor) -> Tensor:
    """A value with the gradient of a guess at it (rule 8)."""
    if not (torch.is_grad_enabled() and guess.requires_grad):
        return value
    return value - (guess.detach() - guess)


@dataclass(frozen=True, repr=False)
class Coded(Exact):
    """An op that keeps what its inverse misses."""

    op: Invertible
    codes: Codes

    def forward(self, x: Wire) -> Wire:
        return self.op.forward(map_wire(dense, x))

    def undo(self, y: Wire) -> Wire:
        return self.op.undo(map_wire(dense, y))

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        return self._undone(map_wire(dense, x), nullcontext())

    def _undone(self, x: Wire, conditions: AbstractContextManager[Any]) -> tuple[Wire, Residue]:
        """The op, and what its inverse misses when it runs as it will in backward."""
        y, residue = self.op.forward_with_residue(x)
        if _torch.active():
            return y, (residue, None, x)
        with torch.no_grad(), conditions:
            guess = self.op.inverse_with_residue(residue, map_wire(dense, y))
        return y, (residue, map_wire(self.codes.encode, x, guess), None)

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        residue, kept, x = self._given(residue)
        if x is not None:
            return x
        return map_wire(self.codes.decode, self.op.inverse_with_residue(residue, map_wire(dense, y)), kept)

    def _given(self, residue: Residue) -> tuple[Residue, Wire, Wire]:
        if residue is None:
            raise NotInvertibleError(
                f"{self!r} needs its codes for the inverse",
                cure="op.inverse(y) is the inverse without them; op.forward_with_residue(x) gives them",
            )
        return residue

    def inverted(self) -> Invertible:
        return replace(self, op=self.op.inverted())

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return self.op.functions

    @property
    def name(self) -> str:
        return self.op.name

    def __repr__(self) -> str:
        return f"exact({self.op!r})"


@dataclass(frozen=True, repr=False)
class CodedStage(Coded):
    """A stage of its own, whose functions may draw: forward and inverse draw the same numbers, in both passes."""

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        dice = RandomState(accelerators([leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]))
        return self._undone(map_wire(dense, x), dice.restored())


@dataclass(frozen=True)
class CodedLaw(DerivedLaw):
    """A law whose op keeps codes."""

    codes: Codes

    def gradients(self, t: Wire, gy: Wire) -> tuple[Wire, Wire] | None:
        return self.law.gradients(t, gy)

    def derive(self, op: Invertible) -> Invertible:
        return Coded(op, self.codes)


# ---- grid (rule 1) ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The multiples of 2^-k in a floating-point dtype, for nets of another; lifts primitives that stay on it."""

    carrier: torch.dtype
    k: int
    net: torch.dtype

    @property
    def bound(self) -> float:
        """Below it, sums are exact."""
        return 2.0 ** (_PRECISION[self.carrier] - self.k)

    def __call__(self, op: Invertible, path: Path) -> Invertible:
        """Lift a primitive."""
        if isinstance(op, Rearrangement):
            return Moved(op)
        if isinstance(op, Half) and isinstance(op.law.original(), Additive):
            return ExactHalf(OnGrid(op.fn, self), RangedLaw(op.law, (*path, op.label)), op.target, op.label)
        error = OptionError(
            f"exact(mode='grid'): {op!r} does not stay on a grid",
            expected="additive couplings, and ops that move elements",
            cure="mode='codes' takes any op; a stem or a head stays outside: chain(stem, exact(trunk), head)",
        )
        error.path = path
        raise error

    def nearest(self, t: Any) -> Any:
        """A leaf rounded to the grid in the carrier; autograd sees the conversion alone."""
        if not is_differentiable(t):
            return t
        wide = t.to(self.carrier, copy=True)
        wide.detach().mul_(2.0**self.k).round_().mul_(2.0**-self.k).add_(0.0)  # rule 7, by the last
        return wide

    def enter(self, x: Wire) -> Wire:
        """A wire of the net's dtype on the grid."""
        refuse_nested("exact", x)
        return map_wire(lambda leaf: _noted(("its input",), self.nearest(leaf)), x)

    def leave(self, y: Wire) -> Wire:
        """A wire on the grid in the net's dtype."""
        return map_wire(lambda leaf: leaf.to(self.net) if is_differentiable(leaf) else leaf, y)


_PRECISION = {torch.float32: 24, torch.float64: 53}
_DEFAULTS = {torch.float32: 14, torch.float64: 32}


@dataclass(frozen=True)
class OnGrid:
    """A coupling's function that reads in the net's dtype and whose output is rounded to the grid."""

    fn: Callable[..., Any]
    grid: Grid

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, *x: Wire) -> Wire:
        return map_wire(self.grid.nearest, spread(self.fn, self.grid.leave(_packed(x))))

    @property
    def __name__(self) -> str:
        return name_of(self.fn)


_RANGES: ContextVar[list[tuple[Path, Tensor, Tensor]] | None] = ContextVar("ranges", default=None)


def _noted(path: Path, wire: Wire) -> Wire:
    """A wire as it is, once its range is noted; nobody waits for the numbers yet."""
    ranges = _RANGES.get()
    if ranges is not None:
        for leaf in filter(is_differentiable, leaves(wire)):
            found = _torch.unwrapped(leaf).detach()
            if found.numel():
                low, high = torch.aminmax(found)
                ranges.append((path, low, high))
    return wire


@contextmanager
def _in_range(grid: Grid) -> Iterator[None]:
    """Raise where a state that is noted inside was out of range; a device is not waited for, and tells it later."""
    token = _RANGES.set(ranges := [])
    try:
        yield
    finally:
        _RANGES.reset(token)
    for device in dict.fromkeys([low.device for _, low, _ in ranges]):
        paths, lows, highs = zip(*[noted for noted in ranges if noted[1].device == device], strict=True)
        sent = send(torch.maximum(torch.stack(highs), -torch.stack(lows)))
        when_here([sent], partial(_check_range, grid, paths, sent))


def _check_range(grid: Grid, paths: Sequence[Path], peaks: Late) -> None:
    for path, peak in zip(paths, peaks.values(), strict=True):
        if not peak < grid.bound:  # NaN is not
            raise _left(grid, path, peak)


def _left(grid: Grid, path: Path, peak: float) -> DomainError:
    carrier = str(grid.carrier).removeprefix("torch.")
    error = DomainError(
        f"exact(mode='grid', k={grid.k}): a state left the range of the grid",
        expected=f"magnitudes below {grid.bound:g} = 2^({_PRECISION[grid.carrier]} - k), {carrier}'s exact sums",
        got=f"{peak:g}",
        cure="pass a smaller k or carrier=torch.float64, bound what the functions return, or take mode='codes'",
    )
    error.path = path
    return error


@dataclass(frozen=True, repr=False)
class Ranged(Wrapper):
    """An op whose output is asked for its range."""

    path: Path

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        y, residue = self.op.forward_with_residue(x)
        return _noted(self.path, y), residue

    def inverted(self) -> Invertible:
        return Ranged(self.op.inverted(), self.path)


@dataclass(frozen=True)
class RangedLaw(DerivedLaw):
    """A law whose output is asked for its range."""

    path: Path

    def gradients(self, t: Wire, gy: Wire) -> tuple[Wire, Wire] | None:
        return self.law.gradients(t, gy)

    def derive(self, op: Invertible) -> Invertible:
        return Ranged(op, self.path)


@dataclass(frozen=True, repr=False)
class Gridded(Wrapper):
    """An op on a grid: its input enters, its output leaves; built by `exact`."""

    carrier: torch.dtype | None
    k: int | None

    def forward(self, x: Wire) -> Wire:
        return self._on_grid(lambda op, x: op.forward(x), x)

    def undo(self, y: Wire) -> Wire:
        return self._on_grid(lambda op, y: op.undo(y), y)

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        return self.forward(x), None

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        return self.undo(y)

    pull = Invertible.pull

    def _on_grid(self, run: Callable[[Invertible, Wire], Wire], x: Wire) -> Wire:
        if torch.compiler.is_exporting():
            _refuse_graph()
        grid = self.grid_for(x)
        op = self._lifted.get(grid)
        if op is None:
            op = self._lifted[grid] = lifted(self.op, grid)
        with _in_range(grid):
            y = run(op, grid.enter(x))
        return grid.leave(y)

    def grid_for(self, x: Wire) -> Grid:
        """The grid for nets of the dtype of a wire."""
        dtypes = {leaf.dtype for leaf in leaves(x) if is_differentiable(leaf)}
        net = dtypes.pop() if len(dtypes) == 1 else None
        if net is None or net.is_complex:
            raise WireError(
                f"{self!r} received {describe(x)}", expected="real floating-point tensors, all of one dtype"
            )
        return self.grid_of(net)

    def grid_of(self, net: torch.dtype) -> Grid:
        """The grid for nets of a dtype."""
        carrier = self.carrier or (torch.float32 if net.itemsize < 4 else torch.float64)
        return Grid(carrier, _DEFAULTS[carrier] if self.k is None else self.k, net)

    @cached_property
    def _lifted(self) -> dict[Grid, Invertible]:
        return {}

    def inverted(self) -> Invertible:
        return replace(self, op=self.op.inverted())

    @property
    def parts(self) -> tuple[Invertible, ...]:
        return self.op.parts if isinstance(self.op, Chain) else (self.op,)

    def __repr__(self) -> str:
        return f"exact({self.op!r})"


@walk.register
def _(op: Gridded, state: State, run: Run) -> State:
    _check_engine(run)
    engine, place, run = run.engine, partial(repr, op), run.under(replace(run.options, keep=None))

    def lowered(op: Invertible, x: Wire) -> Wire:
        return engine.close(walk(op, engine.begin(x, run, place), run))

    return engine.begin(op._on_grid(lowered, engine.close(state)), run, place)


# ---- the transform ---------------------------------------------------------------------------------------------------


def exact(
    op: Invertible,
    mode: str = "grid",
    *,
    carrier: torch.dtype | None = None,
    k: int | None = None,
    pack: bool = False,
) -> Invertible:
    r"""An op that a lowered backward undoes to the last bit, so that its gradients are those of plain autograd.

    .. math:: checkpoint(exact(f)) = exact(f) \quad \text{in every bit of value and gradient}

    Args:
        op: The op. Compositions are taken apart; what has no inverse is left to be stored (codes) or refused (grid).
        mode: ``"grid"``: the stream lives on multiples of 2^-k, for additive couplings and ops that move elements;
            forward rounds once more, and backward keeps nothing. ``"codes"``: forward is unchanged, for any op of any
            dtype, and what each inverse misses is kept.
        carrier: The dtype of a grid; float32 for half-precision nets, float64 for others, when not given.
        k: The spacing 2^-k of a grid; 14 in float32 and 32 in float64, when not given.
        pack: Codes of two bits where they are small, at the price of time.

    Returns:
        An op of the same shapes and dtypes. With codes, ``exact(chain(f, g)) = chain(exact(f), exact(g))``.

        What its ``inverse`` gives: on a grid, the stream is undone exactly, and what enters and leaves is rounded: x to
        the grid, the output to x's dtype. So ``op.inverse(op(x))`` is x on the grid where x has the carrier's dtype,
        and as near as the rounded output tells in a narrower one. With codes ``inverse_with_residue`` is exact; the
        output alone does not have what rounding lost, and ``inverse`` is that of op.

    Cost:
        Grid: a trunk of its own, inside of which nothing is kept; its stream is as wide as the carrier. Codes: one byte
        an element that an op changes (about 0.3 with ``pack``), whatever the dtype, and the inverse is evaluated once
        more in forward. A coupling's functions are evaluated twice in a training step, as without.

    Raises:
        NotInvertibleError: When it is given something that is no op.
        OptionError: When an option is not one of those above, or an op does not stay on a grid.
        DomainError: When a state is infinite, NaN, or leaves the range 2^(p-k) of a grid, naming it.
        ReplayError: In backward, when the input of a trunk was not rebuilt with its bits, because a function did not
            do what it did in forward; and under ``torch.compile``, which would make it do so.

    Limits:
        On a grid, changes below 2^-k-1 are rounded away: with functions that start near zero, take float64. The bits
        are those of ``exact(op)`` unlowered; with codes also those of ``op`` itself, where it gives its functions dense
        inputs. Under `torch.func` transforms codes keep the input instead, and nothing is compared.

    Example:
        >>> import torch, invfunc as inv
        >>> net = inv.exact(inv.chain(*[inv.couple(torch.sin, torch.cos)] * 8))
        >>> x = torch.tensor([0.125], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
        >>> all(torch.equal(a, b) for a, b in zip(net.inverse(net(x)), x))
        True
        >>> inv.exact(inv.couple(torch.nn.Linear(2, 2)), "codes")
        exact(couple(Linear))

    Source:
        Maclaurin et al., Gradient-based Hyperparameter Optimization through Reversible Learning (2015), for keeping
        what a reversal loses; Gomez et al., RevNet (2017).
    """
    check_op("exact", op)
    if mode == "grid" and not pack:
        return _gridded(op, carrier, k)
    if mode == "codes" and carrier is None and k is None:
        return lifted(op, PackedCodes() if pack else Codes())
    given = [name for name, value in (("carrier", carrier), ("k", k), ("pack", pack or None)) if value is not None]
    raise OptionError(
        f"exact: mode={mode!r} with {', '.join(given) or 'no options'}",
        expected="mode='grid' with carrier and k, or mode='codes' with pack",
    )


def _gridded(op: Invertible, carrier: torch.dtype | None, k: int | None) -> Invertible:
    if carrier not in (None, *_PRECISION):
        raise OptionError(f"exact: carrier is {carrier}", expected="torch.float32 or torch.float64")
    gridded = Gridded(op, carrier, k)
    grid = gridded.grid_of(torch.float32)
    if not 0 <= grid.k < _PRECISION[grid.carrier]:
        raise OptionError(
            f"exact: k is {k}", expected=f"0 to {_PRECISION[grid.carrier] - 1}, the bits of {grid.carrier}"
        )
    lifted(op, grid)  # says now what it can not do
    return gridded
