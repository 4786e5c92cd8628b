"""Wires: what flows through an op. A wire is a tensor, or a (nested) tuple of wires.

Leaves that are not tensors, ``None``, and integer or bool tensors ride along unchanged and get no gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from torch import Tensor

from .errors import OptionError, WireError

Wire: TypeAlias = Any  # a Tensor, another leaf, or a tuple of wires: recursive types are not worth their errors here


def leaves(wire: Wire) -> list[Any]:
    """The leaves of a wire, left to right.

    Example:
        >>> leaves((1, (2, 3)))
        [1, 2, 3]
    """
    if not isinstance(wire, tuple):
        return [wire]
    found: list[Any] = []
    for part in wire:
        found += leaves(part) if isinstance(part, tuple) else (part,)
    return found


def unflatten(like: Wire, values: Iterable[Any]) -> Wire:
    """A wire of the structure of ``like`` with other leaves: ``unflatten(w, leaves(w)) == w``.

    Example:
        >>> unflatten((1, (2, 3)), "abc")
        ('a', ('b', 'c'))
    """
    left = iter(values)
    return _take(like, left) if isinstance(like, tuple) else next(left)


def _take(like: tuple[Wire, ...], left: Iterator[Any]) -> Wire:
    return tuple([_take(part, left) if isinstance(part, tuple) else next(left) for part in like])


def map_wire(fn: Callable[..., Any], wire: Wire, *others: Wire) -> Wire:
    """Apply ``fn`` to corresponding leaves; the structure is that of the first wire.

    Example:
        >>> map_wire(lambda a, b: a + b, (1, (2, 3)), (10, (20, 30)))
        (11, (22, 33))
    """
    if not isinstance(wire, tuple):
        return fn(wire, *others)
    if not others:
        return tuple([map_wire(fn, part) if isinstance(part, tuple) else fn(part) for part in wire])
    return tuple([map_wire(fn, *parts) for parts in zip(wire, *others, strict=True)])


def detach(wire: Wire) -> Wire:
    """The same values, without their graph; a wire, or one leaf of it."""
    return map_wire(_detach_leaf, wire)


def _detach_leaf(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def blank(wire: Wire) -> Wire:
    """The structure of a wire, with None in the place of every leaf."""
    return map_wire(_no_leaf, wire)


def _no_leaf(leaf: Any) -> None:
    return None


def spread(fn: Callable[..., Any], wire: Wire, label: str | None = None) -> Any:
    """Call a user's function: a tuple wire becomes its positional arguments; ``label`` names it in errors."""
    parts = wire if isinstance(wire, tuple) else (wire,)
    try:
        return fn(*parts)
    except TypeError as error:
        _check_arity(fn, parts, label, error)
        raise


def _check_arity(fn: Callable[..., Any], wire: tuple[Wire, ...], label: str | None, error: TypeError) -> None:
    """Raise a named error where a function does not take as many components as it got, or needs more by name."""
    signature = _signature(fn)
    if "positional argument" not in str(error) if signature is None else _takes(signature, wire):
        return
    name = label or getattr(fn, "__name__", None) or type(fn).__name__
    received = f"{name} received {f'{len(wire)} components' if len(wire) != 1 else 'one component'} {describe(wire)}"
    expected = f"as many as it takes: {signature or error}"
    lacking = _lacking(signature, wire)
    if lacking:
        raise OptionError(
            f"{received} and no {', '.join(map(repr, lacking))}",
            expected=expected,
            cure=f"tell it by name: context={{{', '.join(f'{name!r}: ...' for name in lacking)}}}; or pass a tuple: "
            "its components become positional arguments",
        ) from error
    cure = "a tuple wire becomes positional arguments: concat it first, or let the function take them all"
    raise WireError(received, expected=expected, cure=cure) from error


def _lacking(signature: inspect.Signature | None, wire: tuple[Wire, ...]) -> list[str]:
    """The names that a function needs beside the components of a wire."""
    needed = signature.parameters.values() if signature is not None else ()
    needed = [p for p in needed if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    by_place = [p.name for p in needed if p.kind is not p.KEYWORD_ONLY]
    return by_place[len(wire) :] + [p.name for p in needed if p.kind is p.KEYWORD_ONLY]


def _signature(fn: Callable[..., Any]) -> inspect.Signature | None:
    """A function's, or that of a module's own forward; a builtin may have none."""
    try:
        return inspect.signature(getattr(fn, "forward", fn))
    except (TypeError, ValueError):
        return None


def _takes(signature: inspect.Signature, wire: tuple[Wire, ...]) -> bool:
    try:
        signature.bind(*wire)
    except TypeError:
        return False
    return True


def is_differentiable(leaf: Any) -> bool:
    """Whether a leaf can have a gradient: a floating-point or complex tensor."""
    return isinstance(leaf, Tensor) and ((dtype := leaf.dtype).is_floating_point or dtype.is_complex)


def refuse_nested(subject: str, wire: Wire) -> None:
    """Raise where a leaf is a nested tensor, which torch does not let one compute with there."""
    if has_nested(wire):
        raise nested_error(subject)


def has_nested(wire: Wire) -> bool:
    """Whether a leaf is a nested tensor."""
    return any([isinstance(leaf, Tensor) and leaf.is_nested for leaf in leaves(wire)])


def nested_error(subject: str) -> WireError:
    """The error of a nested tensor where it can not be computed with."""
    return WireError(
        f"{subject} received a nested tensor",
        expected="tensors whose elements are of one size",
        cure="pad it; in ordinary autograd, checkpoint takes nested tensors",
    )


def without_shape() -> WireError:
    """The error of a tensor whose shape torch does not tell: it could not be compared with what is rebuilt."""
    return WireError(
        "a nested tensor in the strided layout has no shape",
        expected="nested tensors in the jagged layout",
        cure='build it with layout=torch.jagged, or lower that part in mode "store"',
    )


def describe(wire: Wire) -> str:
    """A wire as an error message shows it: shapes for tensors, type names for the rest.

    Example:
        >>> import torch
        >>> describe((torch.zeros(2, 3), None, 1.5))
        '((2, 3), None, float)'
    """
    if isinstance(wire, tuple):
        return f"({', '.join(map(describe, wire))}{',' * (len(wire) == 1)})"
    if hasattr(wire, "shape"):
        return str(tuple(wire.shape))
    return "None" if wire is None else type(wire).__name__
