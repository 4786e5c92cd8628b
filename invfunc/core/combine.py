"""Combinators on tuple wires: components side by side, rearranged, split, and coupled. Built from one another."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError, WireError, place_error
from ..wires import Wire, describe, without_shape
from .op import (
    VJP,
    Invertible,
    Rearrangement,
    Residue,
    invert,
    join_residues,
    lift,
    split_residue,
)

# ---- side by side ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Parallel(Invertible):
    """Ops on the components of a tuple wire; built by `parallel`."""

    _parts: tuple[Invertible, ...]

    def forward(self, x: Wire) -> Wire:
        return self._each(lambda part, x: part.forward(x), x)

    def undo(self, y: Wire) -> Wire:
        return self._each(lambda part, y: part.undo(y), y)

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
        >>> import torch, invfunc as inv
        >>> op = parallel(inv.pair(torch.exp, torch.log), inv.chain())
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
        args = map(_constant, self.args) if torch.compiler.is_compiling() else self.args
        return self.func(*args, x)


def _constant(argument: Any) -> Any:
    """An argument of an op: its numbers are no sizes, of which ``torch.compile(dynamic=True)`` makes symbols."""
    if isinstance(argument, tuple):
        return tuple([_constant(part) for part in argument])
    return operator.index(argument) if type(argument) is int else argument


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
    if isinstance(x, Tensor) and x.is_nested and x.layout == torch.strided:
        raise without_shape()
    if not isinstance(x, Tensor):
        raise WireError(
            f"split received {describe(x)}", expected="one tensor", cure="split acts on tensors, not tuples"
        )
    if not -x.dim() <= dim < x.dim():
        raise WireError(f"split along dim {dim}", expected=f"a tensor with such a dim, got {tuple(x.shape)}")
    length = x.shape[dim]
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and dim in (-1, x.dim() - 1):
        # Each length is a graph: Dynamo would read it in backward from the strides of a gradient, which has its own.
        length = operator.index(length)
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
    if not all([isinstance(part, Tensor) for part in y]):
        raise WireError(f"concat along dim {dim} received {describe(y)}", expected=f"{count} tensors")
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
