"""The flags of the process that choose a kernel, and with it what it saves, how it rounds, and how it draws.

The default dtype is one of them: that of the tensors that a function makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.backends import cuda, cudnn, mha

from .. import _torch

Flags = tuple[Any, ...]

# What has a precision of float32 products of its own; the wider ones stand before those that follow them.
_PLACES = (
    ("generic", "all"), ("cuda", "all"), ("mkldnn", "all"),
    *[(library, kind) for library in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn")],
)  # fmt: skip


def _matmul_precision() -> str | None:
    return _told(torch.get_float32_matmul_precision)


def _convolution_precision() -> bool | None:
    return _told(lambda: cudnn.allow_tf32)


def _told(read: Callable[[], Any]) -> Any:
    """What an older name says of precisions, or None where the newer ones say what it has no word for."""
    try:
        return read()
    except RuntimeError:
        return None


def _precisions() -> Flags:
    return _matmul_precision(), _convolution_precision(), [_torch.fp32_precision(*place) for place in _PLACES]


def _set_precisions(values: Flags) -> None:
    matmul, convolution, others = values
    _set_places(others)  # first, so that what follows another place goes on to follow it
    if matmul not in (None, _matmul_precision()):
        torch.set_float32_matmul_precision(matmul)
    if convolution not in (None, _convolution_precision()):
        cudnn.allow_tf32 = convolution
    _set_places(others)


def _set_places(values: Sequence[str]) -> None:
    for place, value in zip(_PLACES, values, strict=True):
        if _torch.fp32_precision(*place) != value:
            _torch.set_fp32_precision(*place, value)


_FLAGS: dict[Callable[[], Any], Callable[[Any], Any]] = {
    cuda.flash_sdp_enabled: cuda.enable_flash_sdp,
    cuda.mem_efficient_sdp_enabled: cuda.enable_mem_efficient_sdp,
    cuda.math_sdp_enabled: cuda.enable_math_sdp,
    cuda.cudnn_sdp_enabled: cuda.enable_cudnn_sdp,
    cuda.fp16_bf16_reduction_math_sdp_allowed: cuda.allow_fp16_bf16_reduction_math_sdp,
    mha.get_fastpath_enabled: mha.set_fastpath_enabled,
    torch.get_default_dtype: torch.set_default_dtype,
    torch.get_deterministic_debug_mode: torch.set_deterministic_debug_mode,
    _precisions: _set_precisions,
    **_torch.kernel_flags,
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
