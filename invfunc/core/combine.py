"""Combinators on tuple wires: components side by side, rearranged, split, and coupled. Built from one another."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..debug import require
from ..engine.replay import returned
from ..errors import OptionError, WireError, place_error
from ..wires import Wire, describe, is_differentiable, leaves, map_wire, spread
from .op import (
    VJP,
    Chain,
    Invertible,
    Pair,
    Rearrangement,
    Residue,
    chain,
    invert,
    join_residues,
    lift,
    name_of,
    named,
    pair,
    split_residue,
)

# ---- side by side ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Parallel(Invertible):
    """Ops on the components of a tuple wire; built by `parallel`."""

    _parts: tuple[Invertible, ...]

    def forward(self, x: Wire) -> Wire:
        return self._each(lambda part, x: part.forward(x), x)

    def inverse(self, y: Wire) -> Wire:
        return self._each(lambda part, y: part.inverse(y), y)

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        stepped = self._each(lambda part, x: part.forward_with_residue(x), x)
        return tuple(y for y, _ in stepped), join_residues([r for _, r in stepped])

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        return self._each(
            lambda part, y, r: part.inverse_with_residue(r, y), y, split_residue(residue, len(self.parts))
        )

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        residues, none = split_residue(residue, len(self.parts)), (None,) * len(self.parts)
        pulled = self._each(lambda part, y, *r: part.pull(r[0], y, r[1], vjp, r[2]), y, residues, gy, needs or none)
        x, gx = zip(*pulled, strict=True) if pulled else ((), ())
        return x, gx

    def inverted(self) -> Invertible:
        return Parallel(tuple(part.inverted() for part in self._parts))

    def _each(self, step: Callable[..., Any], *wires: Wire) -> tuple[Any, ...]:
        check_components(f"parallel of {len(self._parts)} ops", wires[0], len(self._parts))
        results: list[Any] = []
        try:
            for arguments in zip(self._parts, *wires, strict=True):
                results.append(step(*arguments))
        except Exception as error:
            place_error(error, self.place(len(results)))
            raise
        return tuple(results)

    def place(self, index: int) -> str:
        """A part as the path of an error shows it."""
        return f"parallel component {index} ({self._parts[index].name})"

    @property
    def parts(self) -> tuple[Invertible, ...]:
        return self._parts

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return tuple(fn for part in self._parts for fn in part.functions)

    def __repr__(self) -> str:
        return f"parallel({', '.join(map(repr, self._parts))})"


def check_components(subject: str, wire: Wire, count: int) -> None:
    """Raise unless the wire is a tuple of ``count`` components."""
    if isinstance(wire, tuple) and len(wire) == count:
        return
    got = f"{len(wire)} components {describe(wire)}" if isinstance(wire, tuple) else f"one {describe(wire)}"
    raise WireError(
        f"{subject} received the wrong number of components",
        expected=f"a tuple of {count}",
        got=got,
        cure=f"pass a tuple of {count}, or put split({count}) before it",
    )


def parallel(*ops: Invertible | Callable[..., Any]) -> Invertible:
    r"""Ops side by side, one for each component of a tuple wire.

    .. math:: parallel(f, g)(x, y) = (f(x), g(y))

    Args:
        ops: One op for each component.

    Cost:
        That of the ops, each lowered as it would be alone; nothing of its own.

    Raises:
        WireError: When the wire has another number of components.

    Example:
        >>> import torch
        >>> op = parallel(pair(torch.exp, torch.log), chain())
        >>> op(torch.tensor(0.0), torch.tensor(5.0))
        (tensor(1.), tensor(5.))
    """
    return Parallel(tuple(map(lift, ops)))


# ---- rearranged ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """A `functools.partial` that is a value: equal to another of the same function and arguments."""

    func: Callable[..., Any]
    args: tuple[Any, ...]

    def __call__(self, x: Wire) -> Wire:
        return self.func(*self.args, x)


@dataclass(frozen=True, repr=False)
class Plumbing(Invertible):
    """Moves the components of a wire and touches no tensor; lowered, it costs nothing."""

    forward_fn: Callable[[Wire], Wire]
    inverse_fn: Callable[[Wire], Wire]
    label: str
    inverse_label: str

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        return self.forward_fn(x), None

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        return self.inverse_fn(y)

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        return self.inverse_fn(y), self.inverse_fn(gy)

    def inverted(self) -> Invertible:
        return Plumbing(self.inverse_fn, self.forward_fn, self.inverse_label, self.label)

    def __repr__(self) -> str:
        return self.label


def _reorder(order: tuple[int, ...], x: Wire) -> Wire:
    check_components(f"permute_wires({list(order)})", x, len(order))
    return tuple(x[i] for i in order)


def permute_wires(order: Sequence[int]) -> Invertible:
    """Reorder components: component i of the output is component ``order[i]`` of the input.

    .. math:: y_i = x_{order_i}

    Args:
        order: A permutation of ``range(n)`` for a wire of n components.

    Raises:
        OptionError: When ``order`` is not a permutation.

    Cost:
        Nothing: no tensor is touched, and lowered it is no stage at all.

    Example:
        >>> permute_wires([2, 0, 1])(1, 2, 3)
        (3, 1, 2)
    """
    order = tuple(order)
    if sorted(order) != list(range(len(order))):
        raise OptionError(
            f"permute_wires: got {list(order)}", expected=f"each of 0..{max(len(order) - 1, 0)} exactly once"
        )
    back = tuple(order.index(i) for i in range(len(order)))
    texts = [f"permute_wires({list(o)})" if o != (1, 0) else "swap()" for o in (order, back)]
    return Plumbing(Bound(_reorder, (order,)), Bound(_reorder, (back,)), *texts)


def swap() -> Invertible:
    r"""Exchange two components.

    .. math:: (a, b) \mapsto (b, a)

    Cost:
        Nothing: no tensor is touched, and lowered it is no stage at all.

    Example:
        >>> swap()(1, 2)
        (2, 1)
    """
    return permute_wires([1, 0])


# ---- split and concatenated ------------------------------------------------------------------------------------


def _split(sizes: int | tuple[int, ...], dim: int, interleaved: bool, x: Wire) -> Wire:
    length = _length(sizes, dim, x)
    if interleaved:
        assert isinstance(sizes, int)
        return tuple(x[(slice(None),) * (dim % x.dim()) + (slice(i, None, sizes),)] for i in range(sizes))
    return tuple(x.split(length // sizes if isinstance(sizes, int) else list(sizes), dim))


def _length(sizes: int | tuple[int, ...], dim: int, x: Wire) -> int:
    """The size of the dimension that is split, checked."""
    if not isinstance(x, Tensor):
        raise WireError(
            f"split received {describe(x)}", expected="one tensor", cure="split acts on tensors, not tuples"
        )
    if not -x.dim() <= dim < x.dim():
        raise WireError(f"split along dim {dim}", expected=f"a tensor with such a dim, got {tuple(x.shape)}")
    length = x.shape[dim]
    if isinstance(sizes, int) and length % sizes:
        parts = [length // sizes + (i < length % sizes) for i in range(sizes)]
        raise WireError(
            f"split({sizes}, dim={dim}) of {tuple(x.shape)}",
            expected=f"a size that {sizes} divides",
            got=str(length),
            cure=f"pass sizes instead: split({parts}, dim={dim})",
        )
    if not isinstance(sizes, int) and sum(sizes) != length:
        raise WireError(
            f"split({list(sizes)}, dim={dim}) of {tuple(x.shape)}",
            expected=f"sizes that add up to {length}",
            got=str(sum(sizes)),
        )
    return length


def _concat(sizes: int | tuple[int, ...], dim: int, interleaved: bool, y: Wire) -> Wire:
    count = sizes if isinstance(sizes, int) else len(sizes)
    check_components(f"concat({count}, dim={dim})", y, count)
    _check_joint(sizes, dim, y)
    if not interleaved:
        return torch.cat(y, dim)
    stacked = torch.stack(y, dim % y[0].dim() + 1)
    return stacked.flatten(dim % y[0].dim(), dim % y[0].dim() + 1)


def _check_joint(sizes: int | tuple[int, ...], dim: int, y: tuple[Tensor, ...]) -> None:
    got = [part.shape[dim] for part in y]
    expected = [got[0]] * sizes if isinstance(sizes, int) else list(sizes)
    if got != expected:
        raise WireError(
            f"concat along dim {dim} received {describe(y)}",
            expected=f"components of sizes {expected}",
            got=str(got),
            cure=f"pass sizes: concat({got}, dim={dim})",
        )


def split(sizes: int | Sequence[int] = 2, dim: int = 1, *, interleaved: bool = False) -> Invertible:
    r"""One tensor into a tuple of its slices along a dimension.

    .. math:: x = concat(x_1, \dots, x_n) \mapsto (x_1, \dots, x_n)

    Args:
        sizes: A number of equal parts, or the size of each part.
        dim: The dimension to split; negative counts from the end.
        interleaved: Take every n-th slice instead of blocks: part i holds slices i, i + n, i + 2n, ...

    Shapes:
        ``(..., D, ...) -> n x (..., D/n, ...)``, any dtype.

    Raises:
        OptionError: When the sizes are no sizes, or interleaved with several.
        WireError: When the size does not divide or add up; the message says what to pass.

    Cost:
        Forward returns views; backward concatenates. Values and gradients are moved: the inverse is exact.

    Example:
        >>> import torch
        >>> split(2, dim=0)(torch.arange(4))
        (tensor([0, 1]), tensor([2, 3]))
        >>> split(2, dim=0, interleaved=True)(torch.arange(4))
        (tensor([0, 2]), tensor([1, 3]))
        >>> split([1, 3], dim=0)(torch.arange(4))
        (tensor([0]), tensor([1, 2, 3]))
    """
    sizes = sizes if isinstance(sizes, int) else tuple(sizes)
    if (isinstance(sizes, int) and sizes < 1) or (interleaved and not isinstance(sizes, int)):
        expected = "a positive number of parts" if isinstance(sizes, int) else "a number when interleaved"
        raise OptionError(f"split: sizes is {sizes}", expected=expected)
    shown = sizes if isinstance(sizes, int) else list(sizes)
    options = f"({shown}, dim={dim}{', interleaved=True' * interleaved})"
    static = sizes, dim, interleaved
    return Rearrangement(Bound(_split, static), Bound(_concat, static), f"split{options}", f"concat{options}")


def concat(sizes: int | Sequence[int] = 2, dim: int = 1, *, interleaved: bool = False) -> Invertible:
    r"""A tuple of tensors into one: ``concat(...) = invert(split(...))``.

    .. math:: (x_1, \dots, x_n) \mapsto x, \qquad concat = split^{-1}

    Args:
        sizes: A number of equal parts, or the size of each part.
        dim: The dimension to join; negative counts from the end.
        interleaved: Whether part i holds every n-th slice.

    Shapes:
        ``n x (..., D/n, ...) -> (..., D, ...)``, any dtype.

    Cost:
        One copy; backward splits it into views. Values and gradients are moved: the inverse is exact.

    Raises:
        WireError: When the components are not of these sizes.

    Example:
        >>> import torch
        >>> concat(2, dim=0)(torch.tensor([0, 1]), torch.tensor([2, 3]))
        tensor([0, 1, 2, 3])
        >>> concat(2, dim=0) == invert(split(2, dim=0))
        True
    """
    return invert(split(sizes, dim, interleaved=interleaved))


# ---- laws: what a coupling does with the value it was given -------------------------------------------------------


def _add(t: Tensor, x: Tensor) -> Tensor:
    check_meets("additive(t): t", t, x)
    return x + t


def _subtract(t: Tensor, y: Tensor) -> Tensor:
    check_meets("additive(t): t", t, y)
    return y - t


def _pull_add(t: Tensor, y: Tensor, gy: Tensor) -> Any:
    return y - t, gy, [(t, match(gy, t))]


def match(gradient: Tensor, t: Tensor) -> Tensor:
    """The gradient of a tensor that was broadcast or promoted to the gradient's shape and dtype."""
    if gradient.is_complex() and not t.is_complex():
        gradient = gradient.real
    if gradient.shape != t.shape:
        gradient = gradient.sum_to_size(t.shape)
    return gradient if gradient.dtype == t.dtype else gradient.to(t.dtype)


def check_meets(subject: str, t: Tensor, x: Tensor) -> None:
    """Raise unless t broadcasts to the shape of x."""
    if t.shape != x.shape and not _broadcasts(t.shape, x.shape):
        expected = f"{describe(x)} like the input, or what broadcasts to it"
        raise WireError(f"{subject} is {describe(t)}", expected=expected)


def _no_log_det(*wires: Wire) -> Tensor:
    x = leaves(wires)[0]
    return x.new_zeros(x.shape[:1])


def sum_per_sample(values: Tensor) -> Tensor:
    """The sum over every dimension but the batch's: ``(N, ...) -> (N,)``."""
    return values.sum(tuple(range(1, values.dim()))) if values.dim() > 1 else values


def additive(t: Tensor) -> Invertible:
    r"""Add a tensor; the default law of `couple`.

    .. math:: y = x + t, \qquad \log|\det J| = 0

    Args:
        t: What is added, of the shape of x or broadcast to it.

    Shapes:
        Any, unchanged; t has that of x, or broadcasts to it.

    Cost:
        The inverse is one subtraction. Lowered, nothing is kept.

    Domain:
        Everything; the range, too.

    Raises:
        WireError: When t does not broadcast to x.

    Example:
        >>> import torch
        >>> additive(torch.tensor(1.0))(torch.tensor([1.0, 2.0]))
        tensor([2., 3.])

    Source:
        Dinh et al., NICE (2015); Gomez et al., RevNet (2017).
    """
    add, subtract, pull = partial(_add, t), partial(_subtract, t), partial(_pull_add, t)
    return pair(add, subtract, pullback=pull, log_det=_no_log_det, name="additive(t)")


def _scale_shift(s: Tensor, t: Tensor, x: Tensor) -> Tensor:
    check_meets("affine(s, t): s", s, x)
    check_meets("affine(s, t): t", t, x)
    require("affine's scale", s, torch.ne, "a scale that is nowhere 0", "bound it: exp_scale, tanh_scale", 0)
    return x * s + t


def _unshift_unscale(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    check_meets("affine(s, t): s", s, y)
    check_meets("affine(s, t): t", t, y)
    require("affine's scale", s, torch.ne, "a scale that is nowhere 0", "bound it: exp_scale, tanh_scale", 0)
    return (y - t) / s


def _pull_scale_shift(s: Tensor, t: Tensor, y: Tensor, gy: Tensor) -> Any:
    x = (y - t) / s
    return x, gy * s.conj(), [(s, match(gy * x.conj(), s)), (t, match(gy, t))]


def _scale_log_det(s: Tensor, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return sum_per_sample(s.abs().log().expand(x.shape))


def affine(s: Tensor, t: Tensor) -> Invertible:
    r"""Scale and shift, elementwise; a law of `couple`.

    .. math:: y = s \cdot x + t, \qquad x = (y - t) / s, \qquad \log|\det J| = \sum \log|s|

    Args:
        s: The scale, nowhere zero, of the shape of x or broadcast to it.
        t: The shift, likewise.

    Shapes:
        Any, unchanged; s and t have that of x, or broadcast to it.

    Cost:
        The inverse is one subtraction and one division. Lowered, nothing is kept beside s and t, and in a coupling
        not those.

    Domain:
        Everything; the range, too.

    Raises:
        WireError: When s or t does not broadcast to x.
        DomainError: Under ``inv.debug(True)``, when a scale is 0.

    Limits:
        Rounding grows with ``max|s| / min|s|``: bound the scale with `sigmoid_scale` or `tanh_scale` in deep chains.

    Example:
        >>> import torch
        >>> affine(torch.tensor(2.0), torch.tensor(1.0))(torch.tensor([1.0, 2.0]))
        tensor([3., 5.])

    Source:
        Dinh et al., Real NVP (2017).
    """
    to, fro, pull = partial(_scale_shift, s, t), partial(_unshift_unscale, s, t), partial(_pull_scale_shift, s, t)
    return pair(to, fro, pullback=pull, log_det=partial(_scale_log_det, s, t), name="affine(s, t)")


@dataclass(frozen=True)
class Scaled:
    """A net whose output is turned into ``(s, t)`` for the law `affine`; built by `exp_scale` and its kin."""

    net: Callable[..., Any]
    squash: Callable[[Tensor], Tensor]
    dim: int
    label: str

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function: what this object closes over is what the net closes over."""
        return (self.net,)

    def __call__(self, *x: Wire) -> tuple[Tensor, Tensor]:
        out = self.net(*x)
        raw, t = out if isinstance(out, tuple) else _halves(out, self.dim, self.label)
        return self.squash(raw), t

    @property
    def __name__(self) -> str:
        return self.label


def _halves(out: Tensor, dim: int, label: str) -> Sequence[Tensor]:
    if out.dim() <= max(dim, -1 - dim) or out.shape[dim] % 2:
        raise WireError(
            f"{label}: the net returned {describe(out)}",
            expected=f"an even size along dim {dim}: scale and shift",
            cure="let the net return twice the channels of the component that it changes, or a tuple (raw, t)",
        )
    return out.chunk(2, dim)


def _sigmoid_of(shift: float, raw: Tensor) -> Tensor:
    return torch.sigmoid(raw + shift)


def _bounded_exp(bound: float, raw: Tensor) -> Tensor:
    return torch.exp(bound * torch.tanh(raw / bound))


def exp_scale(net: Callable[..., Any], *, dim: int = 1) -> Callable[..., Any]:
    r"""A net's output as ``(s, t)`` for `affine`, with :math:`s = \exp(raw)`.

    Args:
        net: Returns ``(raw, t)``, or one tensor whose halves along ``dim`` are raw and t.
        dim: The dimension of the halves.

    Limits:
        The scale is unbounded: with default initialisation, chains of 4 such couplings overflow in fp32. Prefer
        `tanh_scale`.

    Example:
        >>> import torch
        >>> f = exp_scale(torch.nn.Linear(2, 4))
        >>> couple(f, law=affine)
        couple(exp_scale(Linear), law=affine)

    Source:
        Dinh et al., Real NVP (2017); MemCNN's ``AffineAdapterNaive``.
    """
    return Scaled(net, torch.exp, dim, f"exp_scale({name_of(net)})")


def sigmoid_scale(net: Callable[..., Any], shift: float = 2.0, *, dim: int = 1) -> Callable[..., Any]:
    r"""A net's output as ``(s, t)`` for `affine`, with :math:`s = \sigma(raw + shift)`, so that 0 < s < 1.

    Args:
        net: Returns ``(raw, t)``, or one tensor whose halves along ``dim`` are raw and t.
        shift: Added before the sigmoid; with 2 the scale starts near 0.88.
        dim: The dimension of the halves.

    Example:
        >>> import torch
        >>> s, t = sigmoid_scale(torch.nn.Linear(2, 4))(torch.zeros(1, 2))
        >>> s.shape, t.shape
        (torch.Size([1, 2]), torch.Size([1, 2]))

    Source:
        Kingma and Dhariwal, Glow (2018).
    """
    return Scaled(net, partial(_sigmoid_of, shift), dim, f"sigmoid_scale({name_of(net)})")


def tanh_scale(net: Callable[..., Any], bound: float = 1.0, *, dim: int = 1) -> Callable[..., Any]:
    r"""A net's output as ``(s, t)`` for `affine`, with :math:`s = \exp(b \tanh(raw / b))`, so that e^-b < s < e^b.

    Args:
        net: Returns ``(raw, t)``, or one tensor whose halves along ``dim`` are raw and t.
        bound: The bound b on the logarithm of the scale: it limits how much a coupling can amplify rounding.
        dim: The dimension of the halves.

    Raises:
        OptionError: When the bound is not positive.

    Example:
        >>> import torch
        >>> s, t = tanh_scale(torch.nn.Linear(2, 4), 0.5)(1e6 * torch.ones(1, 2))
        >>> bool((s.log().abs() <= 0.5001).all())
        True

    Source:
        Ardizzone et al., soft clamping in conditional INNs (2019).
    """
    if bound <= 0:
        raise OptionError(f"tanh_scale: bound is {bound}", expected="a positive number")
    return Scaled(net, partial(_bounded_exp, bound), dim, f"tanh_scale({name_of(net)}, {bound})")


@dataclass(frozen=True)
class DerivedLaw(abc.ABC):
    """A law made from another one: ``t -> derive(law(t))``. What is checked is what the other one takes."""

    law: Callable[..., Invertible]

    @abc.abstractmethod
    def derive(self, op: Invertible) -> Invertible:
        """What the op of the other law becomes."""

    def acts_on(self, x1: Wire) -> Wire:
        """The part of the changed component that the original law changes."""
        return self.law.acts_on(x1) if isinstance(self.law, DerivedLaw) else x1

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.law,)

    def __call__(self, *t: Wire) -> Invertible:
        op = self.law(*t)
        return self.derive(op) if isinstance(op, Invertible) else op


@dataclass(frozen=True)
class InverseLaw(DerivedLaw):
    """The law that undoes another: ``t -> invert(law(t))``."""

    def derive(self, op: Invertible) -> Invertible:
        return invert(op)


def invert_law(law: Callable[..., Invertible]) -> Callable[..., Invertible]:
    """``t -> invert(law(t))``, an involution."""
    return law.law if isinstance(law, InverseLaw) else InverseLaw(law)


def original_law(law: Callable[..., Invertible]) -> Callable[..., Invertible]:
    """The law that a user wrote, below those derived from it."""
    return original_law(law.law) if isinstance(law, DerivedLaw) else law


# ---- coupled -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Half(Invertible):
    """One half of a coupling: component ``target`` changes by ``law(fn(other))``, the other passes untouched."""

    fn: Callable[..., Any]
    law: Callable[..., Invertible]
    target: int
    label: str

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        return self.changed_by(returned(self.fn, spread(self.fn, self._target_first(x)[1])), x)

    def changed_by(self, t: Wire, x: Wire) -> tuple[Wire, Residue]:
        """``x -> (y, residue)``, with what the function returned."""
        x1, x2 = self._target_first(x)
        y1, residue = self._law(t, x1).forward_with_residue(x1)
        self._check_shape(x1, y1)
        return self.in_place((y1, x2)), residue

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        y1, x2 = self._target_first(y)
        x1 = self._law(spread(self.fn, x2), y1).inverse_with_residue(residue, y1)
        return self.in_place((x1, x2))

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        """Fused: ``t = fn(x2)`` is evaluated once, and gives both ``x1 = law(t)^-1(y1)`` and its own vjp."""
        (y1, x2), (gy1, gy2) = self._target_first(y), self._target_first(gy)
        need1, need2 = (None, None) if needs is None else self.in_place(needs)
        t, pull_fn = vjp(self.fn, x2, need2)
        x1, gx1, gt = self._pull_law(residue, t, y1, gy1, vjp, need1)
        del t
        gx2 = add_wires(gy2, pull_fn(gt))
        return self.in_place((x1, x2)), self.in_place((gx1, gx2))

    def _pull_law(self, residue: Residue, t: Wire, y1: Wire, gy1: Wire, vjp: VJP, need: Wire | None) -> Any:
        """``(y1, gy1) -> (x1, gx1, gt)``: by the law's own pullback where that speaks of t alone, else by vjp."""
        op = self._law(t, y1)
        if isinstance(op, Pair) and op.pullback_fn and not op.residue and gy1 is not None:
            x1, gx1, *closed = op.pullback_fn(y1, gy1)
            gradients = {id(tensor): g for tensor, g in (closed[0] if closed else ())}
            if sorted(gradients) == sorted(map(id, leaves(t))):
                return x1, gx1, map_wire(lambda leaf: gradients[id(leaf)] if is_differentiable(leaf) else None, t)
        x1 = vjp.run(op.inverse_with_residue, (residue, y1))
        needs = None if need is None else (map_wire(is_differentiable, t), need)
        _, pull = vjp(lambda t, x1: self._law(t, x1).forward(x1), (t, x1), needs)
        gt, gx1 = pull(gy1)
        return x1, gx1, gt

    def inverted(self) -> Invertible:
        return replace(self, law=invert_law(self.law))

    def _target_first(self, x: Wire) -> Wire:
        check_components("couple", x, 2)
        return self.in_place(x)

    def in_place(self, x: Wire) -> Wire:
        """The target before the other, or the two as they were: exchanging two components undoes itself."""
        return x if self.target == 0 else (x[1], x[0])

    def _law(self, t: Wire, x1: Wire) -> Invertible:
        self._check_given(t, x1)
        op = self.law(*t) if isinstance(t, tuple) else self.law(t)
        if not isinstance(op, Invertible):
            raise OptionError(
                f"law {self._law_name} returned {type(op).__name__}",
                expected="an invertible op",
                cure="a law maps what the function returned to an op, as additive and affine do",
            )
        return op

    @property
    def _law_name(self) -> str:
        return name_of(original_law(self.law))

    def _check_given(self, t: Wire, x1: Wire) -> None:
        """What the function returned has the law's arity and, for tensors, a shape that fits the partner."""
        if self.law is additive and isinstance(t, Tensor) and isinstance(x1, Tensor) and t.shape == x1.shape:
            return  # what follows would find nothing, in five times the time
        parts = t if isinstance(t, tuple) else (t,)
        law = original_law(self.law)
        if law in _TAKES:
            _check_arity(self.label, law, parts)
            for part in parts:
                _check_partner(self.label, part, self._changed(x1))

    def _changed(self, x1: Wire) -> Wire:
        return self.law.acts_on(x1) if isinstance(self.law, DerivedLaw) else x1

    def _check_shape(self, x1: Wire, y1: Wire) -> None:
        if isinstance(x1, Tensor) and isinstance(y1, Tensor) and x1.shape == y1.shape:
            return
        x1, y1 = self._changed(x1), self._changed(y1)
        if isinstance(x1, Tensor) and isinstance(y1, Tensor) and x1.shape != y1.shape:
            raise WireError(
                f"law {self._law_name} made {describe(y1)} of {describe(x1)}", expected="a shape that does not change"
            )

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return (self.fn, self.law)

    @property
    def name(self) -> str:
        return "couple"

    def __repr__(self) -> str:
        law = "" if original_law(self.law) is additive else f", law={self._law_name}"
        inverse = isinstance(self.law, InverseLaw)
        text = f"half({name_of(self.fn)}, target={self.target}{law})"
        return f"invert({text})" if inverse else text


def _check_arity(label: str, law: Callable[..., Any], parts: tuple[Any, ...]) -> None:
    if len(parts) != len(_TAKES[law]) or not all(isinstance(part, Tensor) for part in parts):
        names = ", ".join(_TAKES[law])
        raise WireError(
            f"{label} returned {describe(parts if len(parts) != 1 else parts[0])}",
            expected=f"({names}) for law {name_of(law)}",
            cure="return a tuple of tensors, or wrap the net: exp_scale(f), sigmoid_scale(f), tanh_scale(f, bound)"
            if law is affine
            else "return one tensor, or pass another law",
        )


_TAKES = {additive: ("t",), affine: ("s", "t")}


def _check_partner(label: str, t: Tensor, x1: Wire) -> None:
    if not isinstance(x1, Tensor):
        raise WireError(
            f"{label}'s partner component is {describe(x1)}",
            expected="one tensor",
            cure="pass a law that acts on nested components",
        )
    if t.shape == x1.shape or _broadcasts(t.shape, x1.shape):
        return
    raise WireError(
        f"{label} returned {describe(t)}",
        expected=f"{describe(x1)} like its partner component",
        cure=f"change the output size of {label}, or the sizes of the split before it",
    )


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def add_wires(a: Wire, b: Wire) -> Wire:
    """The sum of two gradients of one wire, where None is zero."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a + b
    if isinstance(a, tuple) or isinstance(b, tuple):
        count = len(a if isinstance(a, tuple) else b)
        pairs = zip(a or (None,) * count, b or (None,) * count, strict=True)
        return tuple(add_wires(left, right) for left, right in pairs)
    return b if a is None else a


def couple(
    f: Callable[..., Any],
    g: Callable[..., Any] | None = None,
    *,
    law: Callable[..., Invertible] = additive,
) -> Invertible:
    r"""Two components change each other in turn: the block of a reversible network.

    .. math:: y_1 = law(f(x_2))(x_1), \qquad y_2 = law(g(y_1))(x_2)

    Args:
        f: Any callable or module; its output is given to the law. It need not be invertible.
        g: Likewise; without it the second component passes untouched.
        law: Maps what f returns to an op: `additive`, `affine`, or any constructor of an elementwise op. A tuple
            becomes its positional arguments.

    Shapes:
        ``((N, ...), (N, ...)) -> ((N, ...), (N, ...))``, the shapes of the components unchanged.

    Cost:
        Lowered: nothing is kept but what f and g close over; f and g are evaluated exactly twice in a training step,
        once in forward and once in backward (4/3 of plain training's flops).

    Raises:
        OptionError: When f, g or the law is no function.
        WireError: When f or g returns something that does not fit its partner component.

    Example:
        >>> import torch
        >>> block = couple(torch.tanh, torch.sin)
        >>> block
        couple(tanh, sin)
        >>> y = block(torch.tensor([0.0]), torch.tensor([0.0]))
        >>> y
        (tensor([0.]), tensor([0.]))

    Source:
        Dinh et al., NICE (2015); Gomez et al., RevNet (2017).
    """
    for role, fn in ("f", f), ("g", g), ("law", law):
        if not callable(fn) and not (role == "g" and fn is None):
            raise OptionError(f"couple: {role} is {type(fn).__name__}", expected="a function or a module")
    halves = [Half(f, law, 0, "f")] + ([Half(g, law, 1, "g")] if g is not None else [])
    shown = [name_of(fn) for fn in (f, g) if fn is not None] + [f"law={name_of(law)}"] * (law is not additive)
    return named(chain(*halves), f"couple({', '.join(shown)})")


def is_coupling(op: Invertible) -> bool:
    """Whether an op is halves of couplings one after another, shown as one."""
    parts = op.parts if isinstance(op, Chain) and op.labels else ()
    return bool(parts) and all([isinstance(part, Half) for part in parts])
