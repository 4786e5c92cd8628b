"""Checks of what only the data can tell: whether a value lies in a domain. Off by default, and free while off.

Shapes, arities and options are always checked; they cost nothing. Whether a logarithm is fed a negative number is known
only after reading every element (and, on a GPU, waiting for it), so that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from . import _torch
from .errors import DomainError
from .wires import Wire, is_differentiable, leaves

_CHECKING: ContextVar[bool] = ContextVar("checking", default=False)


class debug:  # noqa: N801 - it is called like a function
    """Switch the checks of data on or off: from here on, or inside of a ``with``.

    Args:
        enabled: Whether a value outside of an op's domain raises `DomainError`.

    Cost:
        On: one pass over every input of an op that has a domain, and a synchronisation on a GPU. Off: nothing.

    Limits:
        The switch belongs to the current thread or task. A function that is being compiled is not checked.

    Example:
        >>> import torch, invfunc as inv
        >>> inv.ops.log()(torch.tensor([-1.0]))
        tensor([nan])
        >>> with inv.debug(True):
        ...     inv.ops.log()(torch.tensor([-1.0]))
        Traceback (most recent call last):
        invfunc.errors.DomainError: log received values outside of its domain, expected x > 0, got values from ...
    """

    def __init__(self, enabled: bool = True) -> None:
        self._before = _CHECKING.get()
        _CHECKING.set(enabled)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        _CHECKING.set(self._before)


def checking() -> bool:
    """Whether data are checked now."""
    return not torch.compiler.is_compiling() and _CHECKING.get()


def require(subject: str, wire: Wire, holds: Callable[..., Any], expected: str, cure: str = "", *options: Any) -> None:
    """Raise `DomainError` unless ``holds(leaf, *options)`` is true of every element on a wire; only while checking.

    Args:
        subject: The op that received the wire, as its constructor is called.
        wire: What it received.
        holds: The condition, elementwise. NaN satisfies no comparison, so it is outside of every domain.
        expected: The condition as a reader understands it.
        cure: What to do about it.
        options: Handed to ``holds``.

    Example:
        >>> with debug(True):
        ...     require("log", torch.tensor([1.0, 2.0]), torch.gt, "x > 0", "clamp it", 0)
    """
    if not checking():
        return
    for tensor in filter(is_differentiable, leaves(wire)):
        leaf = _torch.unwrapped(tensor).detach()  # under vmap, all samples: a condition of one is no Python bool
        if not holds(leaf, *options).all():
            what, sizes = ("magnitudes", leaf.abs()) if leaf.is_complex() else ("values", leaf)
            raise DomainError(
                f"{subject} received values outside of its domain",
                expected=expected,
                got=f"{what} from {sizes.min().item():.6g} to {sizes.max().item():.6g}",
                cure=cure,
            )
