"""Precision: an op computes in the widest dtype of its stream and its parameters, and at least in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..errors import WireError
from ..wires import describe, is_differentiable


def at_least(dtype: torch.dtype, *others: torch.dtype) -> torch.dtype:
    """The widest of some dtypes and float32.

    Example:
        >>> at_least(torch.bfloat16), at_least(torch.bfloat16, torch.float64)
        (torch.float32, torch.float64)
    """
    return reduce(torch.promote_types, others, torch.promote_types(dtype, torch.float32))


def is_wider(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether an op that met a wider parameter may have promoted one dtype of numbers to the other.

    Example:
        >>> is_wider(torch.float32, torch.bfloat16), is_wider(torch.float16, torch.bfloat16)
        (True, False)
    """
    is_promoted = dtype != other and torch.promote_types(dtype, other) == dtype
    return is_promoted and other.is_floating_point | other.is_complex and dtype.is_complex == other.is_complex


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that an op has made wider, in the dtype that it had; any other one as it is.

    Example:
        >>> narrow(torch.ones(1), torch.bfloat16).dtype, narrow(torch.ones(1), torch.float64).dtype
        (torch.bfloat16, torch.float32)
    """
    return x.to(dtype) if x.dtype != dtype and is_wider(x.dtype, dtype) else x


def real_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a tensor's real numbers; that of a dtype, `torch.dtype.to_real`, Dynamo does not know.

    Example:
        >>> real_dtype(torch.ones(1, dtype=torch.complex64))
        torch.float32
    """
    return x.real.dtype if x.is_complex() else x.dtype


def check_numbers(subject: str, x: Any) -> None:
    """Raise unless x is one tensor of floating-point or complex numbers."""
    if not is_differentiable(x):
        got, cure = (str(x.dtype), "x.float()") if isinstance(x, Tensor) else (describe(x), "")
        raise WireError(subject, expected="a floating-point tensor", got=got, cure=cure)
    if x.element_size() == 1:
        raise WireError(subject, expected="numbers that torch computes with", got=str(x.dtype), cure="x.float()")


def check_real(subject: str, x: Any) -> None:
    """Raise unless x is one tensor of floating-point numbers."""
    check_numbers(subject, x)
    if x.is_complex():
        raise WireError(subject, expected="real numbers", got=str(x.dtype), cure="torch.view_as_real(x)")


def exactly(
    fn: Callable[..., Tensor], x: Tensor, *tensors: Tensor | None, least: torch.dtype | None = torch.float32
) -> Tensor:
    """``fn(x, *tensors)`` in the widest of their dtypes and ``least``, outside of autocast, and back in the dtype of x.

    Parameters in half precision, as a net under autocast returns them, are widened before anything is computed from
    them: a sum, a softmax or a reciprocal that was rounded to half precision would be another function. And when the
    dtypes of x and y agree, the inverse can tell what forward did. A product of matrices may say ``least=None``: its
    kernel adds in float32 by itself.

    Example:
        >>> halved = torch.tensor([0.5], dtype=torch.bfloat16)
        >>> exactly(lambda x, s: x * s.exp(), torch.ones(1), halved)
        tensor([1.6487])
    """
    return widely(fn, x, *tensors, least=least).to(x.dtype)


def widely(
    fn: Callable[..., Tensor], x: Tensor, *tensors: Tensor | None, least: torch.dtype | None = torch.float32
) -> Tensor:
    """`exactly`, and the result as wide as it was computed: for what is summed up, as a log-determinant is.

    Example:
        >>> widely(torch.exp, torch.zeros(1, dtype=torch.bfloat16))
        tensor([1.])
    """
    check_numbers("an op that computes with real numbers", x)
    if all([t is None or t.dtype == x.dtype for t in tensors]) and (least is None or x.dtype in _WIDE):
        return _outside_of_autocast(fn, x, *tensors)
    given = [tensor.dtype for tensor in (x, *tensors) if tensor is not None]
    dtype = reduce(torch.promote_types, given, least or x.dtype)
    if dtype.is_complex and not x.is_complex():
        raise WireError("a map with complex weights: the input", expected="a complex tensor", got=str(x.dtype))
    wide = [None if tensor is None else tensor.to(dtype) for tensor in (x, *tensors)]
    return _outside_of_autocast(fn, *wide)


_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def _outside_of_autocast(fn: Callable[..., Tensor], *tensors: Any) -> Tensor:
    with without_autocast(tensors[0].device.type):
        return fn(*tensors)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A type of device without autocast; nothing where it is off."""
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()
