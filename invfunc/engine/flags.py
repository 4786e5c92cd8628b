"""The flags of the process that choose a kernel, and with it what it saves, how it rounds, and how it draws.

The default dtype is one of them: that of the tensors that a function makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.backends import cuda, cudnn

from .. import _torch

Flags = tuple[Any, ...]

_dnn: Any = cudnn  # whose parts have no types


def _matmul_precision() -> Any:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it has been set by its newer name alone, and the older one refuses to tell
        return cuda.matmul.fp32_precision


def _set_matmul_precision(value: str) -> None:
    if value in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(value)
    else:
        cuda.matmul.fp32_precision = value


def _convolution_precision() -> Any:
    try:
        return cudnn.allow_tf32
    except RuntimeError:  # convolutions and recurrent networks differ, and the older name has but one value
        return _dnn.conv.fp32_precision, _dnn.rnn.fp32_precision


def _set_convolution_precision(value: Any) -> None:
    if isinstance(value, bool):
        cudnn.allow_tf32 = value
    else:
        _dnn.conv.fp32_precision, _dnn.rnn.fp32_precision = value


def _set_cudnn(values: tuple[bool, bool, bool]) -> None:
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = values


_FLAGS: dict[Callable[[], Any], Callable[[Any], Any]] = {
    cuda.flash_sdp_enabled: cuda.enable_flash_sdp,
    cuda.mem_efficient_sdp_enabled: cuda.enable_mem_efficient_sdp,
    cuda.math_sdp_enabled: cuda.enable_math_sdp,
    cuda.cudnn_sdp_enabled: cuda.enable_cudnn_sdp,
    _torch.attention_order: _torch.set_attention_order,
    _matmul_precision: _set_matmul_precision,
    _convolution_precision: _set_convolution_precision,
    lambda: (cudnn.enabled, cudnn.benchmark, cudnn.deterministic): _set_cudnn,
    torch.get_default_dtype: torch.set_default_dtype,
    torch.get_deterministic_debug_mode: torch.set_deterministic_debug_mode,
}


def flags() -> Flags:
    """Their values."""
    return tuple([read() for read in _FLAGS])


@contextmanager
def under_flags(values: Flags) -> Iterator[None]:
    """Set the flags inside; they are the process's, so that other threads see them meanwhile."""
    before = flags()
    _set(values, before)
    try:
        yield
    finally:
        _set(before, values)


def _set(values: Sequence[Any], now: Sequence[Any]) -> None:
    for write, value, other in zip(_FLAGS.values(), values, now, strict=True):
        if value != other:
            write(value)
