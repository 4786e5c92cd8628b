"""InvTorch's names over the same values: change ``import invtorch`` to ``from invfunc.compat import invtorch``.

Its modules are in its ``nn``, as they were: ``import invtorch.nn as inn`` becomes ``from invfunc.compat.invtorch import
nn as inn``. MIGRATING.md tells what differs, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from ...checkpoint import checkpoint as _checkpoint
from ...core.op import name_of, pair
from ...nn.module import InvertibleModule, apart, safe_to_donate
from ...wires import Wire
from . import nn

Module = InvertibleModule

__all__ = ["InvertibleModule", "Module", "checkpoint", "invertible_checkpoint", "nn"]


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    seed: bool = True,
    enabled: bool = True,
    inverse: Callable[..., Any] | None = None,
    keep: Iterable[Tensor] | Tensor = (),
) -> Any:
    """``function(*args)``, whose activations, and with ``inverse`` also its inputs, are freed until backward.

    Args:
        function: Takes positional arguments and returns a tensor or a tuple.
        args: Its arguments.
        seed: Not needed: random numbers are always the same in backward.
        enabled: False calls the function plainly.
        inverse: Rebuilds the arguments from the outputs. Inputs that nobody else holds are freed; reading one of them
            before backward raises `invfunc.errors.DonatedError`.
        keep: Inputs that are not to be freed.

    Returns:
        What ``function`` returns.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> checkpoint(torch.exp, x, inverse=torch.log).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """
    if not enabled:
        return function(*args)
    if inverse is None:
        return _checkpoint(function)(*args)
    donate = safe_to_donate(args, (keep,) if isinstance(keep, Tensor) else keep)
    forward = partial(_call_apart, function) if donate else function
    return _checkpoint(pair(forward, inverse, name=name_of(function)), donate=donate)(*args)


def _call_apart(function: Callable[..., Any], *args: Any) -> Wire:
    outputs = function(*args)
    return apart(outputs, args) if isinstance(outputs, tuple) else apart((outputs,), args)[0]


def invertible_checkpoint(
    function: Callable[..., Any], inverse: Callable[..., Any], *args: Any, preserve_rng_state: bool = False
) -> Any:
    """`checkpoint` with an inverse, by the name and in the order that it has in InvTorch 0.1.

    Args:
        function: See `checkpoint`.
        inverse: See `checkpoint`.
        args: See `checkpoint`.
        preserve_rng_state: Not needed: random numbers are always the same in backward.

    Returns:
        What ``function`` returns.

    Example:
        >>> import torch
        >>> invertible_checkpoint(torch.exp, torch.log, torch.zeros(2))
        tensor([1., 1.])
    """
    return checkpoint(function, *args, inverse=inverse)
