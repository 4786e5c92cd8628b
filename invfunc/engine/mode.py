"""The mode of everything that is called inside of ``with inv.mode(...)``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch

from ..errors import OptionError
from .interface import Options

MODES = ("invert", "store", "recompute")

_MODE: ContextVar[str | None] = ContextVar("mode", default=None)
# The modes in force, in any thread: they need not end in the order in which they began.
_ENTERED: dict[object, str] = {}
_LATEST: str | None = None  # the last of them. Dynamo reads no context variable; it guards a global name


@contextmanager
def mode(name: str) -> Iterator[None]:
    """Override how everything that is called inside is lowered.

    Args:
        name: ``"invert"`` (keep nothing, rebuild by the inverse), ``"store"`` (plain autograd) or ``"recompute"``
            (keep each segment's input, run it again). It overrides every `checkpoint` option and every mark. What has
            no inverse is stored as marked, whatever the mode.

    A mode changes neither a value nor a gradient, only memory and time. It nests, restores what was before, and is
    local to its thread and its asynchronous task; a compiled graph follows the one that was entered last.

    Example:
        >>> import torch, invfunc as inv
        >>> fast = inv.checkpoint(inv.pair(torch.exp, torch.log))
        >>> x = torch.zeros(1, requires_grad=True)
        >>> with inv.mode("store"):
        ...     fast(x).grad_fn.name()
        'ExpBackward0'
    """
    with (_mode_in_graph if torch.compiler.is_compiling() else _mode)(check_mode(name)):
        yield


@contextmanager
def _mode(name: str) -> Iterator[None]:
    global _LATEST
    token, entry = _MODE.set(name), object()
    _ENTERED[entry] = _LATEST = name
    try:
        yield
    finally:
        _MODE.reset(token)
        del _ENTERED[entry]
        _LATEST = next(reversed(_ENTERED.values()), None)


@contextmanager
def _mode_in_graph(name: str) -> Iterator[None]:
    global _LATEST
    before, _LATEST = _LATEST, name
    try:
        yield
    finally:
        _LATEST = before


def check_mode(name: str) -> str:
    """Return the name of a mode; raise if it is none."""
    if name not in MODES:
        raise OptionError(f"mode is {name!r}", expected=" or ".join(map(repr, MODES)))
    return name


def forced_mode() -> str | None:
    """The mode of the surrounding ``with inv.mode(...)``; it overrides every option, mark and plan."""
    return _LATEST if torch.compiler.is_compiling() else _MODE.get()


def current(options: Options) -> Options:
    """Options under the mode of the surrounding ``with inv.mode(...)``; what is not rebuilt can not be donated."""
    override = forced_mode()
    if override is None:
        return options
    return replace(options, mode=override, donate=override == "invert" and options.donate)
