"""Spectra: Fourier and cosine transforms in the orthonormal scaling, under which they are rotations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.op import Invertible, pair
from ..errors import OptionError, WireError
from ..wires import describe
from .embedding import embedding
from .shape import as_tuple, check_distinct, check_size, no_log_det, show


def _unitary(to: Callable[[Tensor], Tensor], fro: Callable[[Tensor], Tensor], label: str) -> Invertible:
    """An op whose adjoint is its inverse: the gradient goes back as the value does."""
    return pair(to, fro, pullback=partial(_pull_unitary, fro), log_det=no_log_det, name=label)


def _pull_unitary(fro: Callable[[Tensor], Tensor], y: Tensor, gy: Tensor) -> Any:
    return fro(y), fro(gy), []


def _some(label: str, dims: int | Sequence[int]) -> tuple[int, ...]:
    found = as_tuple(dims)
    if not found:
        raise OptionError(f"{label}: no dims", expected="one or more")
    return found


# ---- Fourier ---------------------------------------------------------------------------------------------------


def _fft(dims: tuple[int, ...], x: Tensor) -> Tensor:
    _check_complex("fft", "for real ones there is rfft", dims, x)
    return torch.fft.fftn(x, dim=dims, norm="ortho")


def _ifft(dims: tuple[int, ...], y: Tensor) -> Tensor:
    _check_complex("the inverse of fft", "", dims, y)
    return torch.fft.ifftn(y, dim=dims, norm="ortho")


def _check_complex(subject: str, cure: str, dims: tuple[int, ...], x: Any) -> None:
    check_distinct(subject, x, dims)
    if not x.is_complex():
        raise WireError(f"{subject}: the input", expected="a complex tensor", got=str(x.dtype), cure=cure)


def fft(dims: int | Sequence[int] = -1) -> Invertible:
    r"""The discrete Fourier transform of complex tensors, unitary.

    .. math:: y_k = \frac{1}{\sqrt n} \sum_j x_j e^{-2 \pi i j k / n}, \qquad \log|\det J| = 0

    Args:
        dims: The dimension, or several.

    Shapes:
        Any, unchanged; complex.

    Domain:
        All of it, onto all of it.

    Cost:
        One transform in each direction, n log n. Lowered, nothing is kept; backward transforms the value and the
        gradient back.

    Raises:
        OptionError: When there are no dims.
        WireError: When the input is real (`rfft` takes those), or lacks a dimension.

    Example:
        >>> import torch
        >>> fft()(torch.ones(4, dtype=torch.complex64))
        tensor([2.+0.j, 0.+0.j, 0.+0.j, 0.+0.j])

    Source:
        Cooley and Tukey (1965).
    """
    static = _some("fft", dims)
    return _unitary(partial(_fft, static), partial(_ifft, static), f"fft({show(dims)})")


def _rfft(dims: tuple[int, ...], x: Tensor) -> Tensor:
    check_distinct("rfft", x, dims)
    if not x.is_floating_point():
        raise WireError("rfft: the input", expected="a real tensor", got=str(x.dtype), cure="fft takes complex ones")
    return torch.fft.rfftn(x, dim=dims, norm="ortho")


def _rfft_kept(dims: tuple[int, ...], x: Tensor) -> tuple[Tensor, int]:
    return _rfft(dims, x), x.shape[dims[-1]]


def _rfft_sized(dims: tuple[int, ...], size: int, x: Tensor) -> Tensor:
    check_size("rfft", x, dims[-1], size)
    return _rfft(dims, x)


def _irfft(dims: tuple[int, ...], size: int, y: Tensor) -> Tensor:
    _check_complex("the inverse of rfft", "", dims, y)
    check_size("the inverse of rfft", y, dims[-1], size // 2 + 1)
    return torch.fft.irfftn(y, s=[*(y.shape[dim] for dim in dims[:-1]), size], dim=dims, norm="ortho")


def _irfft_kept(dims: tuple[int, ...], size: int, y: Tensor) -> Tensor:
    return _irfft(dims, size, y)


def rfft(dims: int | Sequence[int] = -1, size: int | None = None) -> Invertible:
    r"""The discrete Fourier transform of real tensors, as the half of the spectrum that tells the other.

    .. math:: y_k = \frac{1}{\sqrt n} \sum_j x_j e^{-2 \pi i j k / n}, \qquad 0 \le k \le n / 2

    The inverse undoes forward (section). Forward undoes the inverse on spectra of real tensors only: what is imaginary
    in the first and, for even sizes, the last coefficient is dropped.

    Args:
        dims: The dimension, or several, the last of which is halved.
        size: Its size, if it is known: the inverse then needs nothing else. Otherwise forward keeps it, since the size
            of the half does not tell whether n was even.

    Shapes:
        ``(..., n) -> (..., n // 2 + 1)``, real to complex. Not between tensors of one size, so there is no
        log-determinant.

    Domain:
        All of it; the range is the spectra of real tensors.

    Cost:
        One transform in each direction, n log n. Without ``size``, one integer is kept. Lowered,
        the inverse is a stage that is stored, since it does not tell what it dropped.

    Raises:
        OptionError: When there are no dims.
        WireError: When the input is complex, of another size, or lacks a dimension.
        NotInvertibleError: When an inverse without the kept size is asked of an op without ``size``.

    Example:
        >>> import torch
        >>> y, kept = rfft().forward_with_residue(torch.ones(4))
        >>> y
        tensor([2.+0.j, 0.+0.j, 0.+0.j])
        >>> rfft(size=4).inverse(y)
        tensor([1., 1., 1., 1.])

    Source:
        Cooley and Tukey (1965).
    """
    static = _some("rfft", dims)
    if size is None:
        to, fro = partial(_rfft_kept, static), partial(_irfft_kept, static)
        return embedding(to, fro, residue=True, name=f"rfft({show(dims)})")
    to, fro = partial(_rfft_sized, static, size), partial(_irfft, static, size)
    return embedding(to, fro, name=f"rfft({show(dims)}, {size})")


# ---- cosine ----------------------------------------------------------------------------------------------------


def _dct(dims: tuple[int, ...], x: Tensor) -> Tensor:
    return _each_dim("dct", _dct_last, dims, x)


def _idct(dims: tuple[int, ...], y: Tensor) -> Tensor:
    return _each_dim("the inverse of dct", _idct_last, dims, y)


def _each_dim(subject: str, transform: Callable[[Tensor], Tensor], dims: tuple[int, ...], x: Tensor) -> Tensor:
    check_distinct(subject, x, dims)
    if not x.is_floating_point():
        raise WireError(f"{subject}: the input", expected="a real tensor", got=describe(x))
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    for dim in dims:
        y = transform(y.movedim(dim, -1)).movedim(-1, dim)
    return y.to(x.dtype)


def _dct_last(x: Tensor) -> Tensor:
    """Makhoul: even elements, then odd ones backwards; their Fourier transform, turned by a quarter step."""
    spectrum = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1), norm="ortho")
    turned = spectrum * _quarter_turns(x, -1)
    return turned.real * _weights(x)


def _idct_last(y: Tensor) -> Tensor:
    turned = y / _weights(y)
    mirrored = torch.cat([torch.zeros_like(turned[..., :1]), turned[..., 1:].flip(-1)], -1)
    spectrum = torch.complex(turned, -mirrored) * _quarter_turns(y, 1)
    v, half = torch.fft.ifft(spectrum, norm="ortho").real, (y.shape[-1] + 1) // 2
    return _interleaved(v[..., :half], v[..., half:].flip(-1))


def _quarter_turns(x: Tensor, sign: int) -> Tensor:
    angles = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device) * (sign * math.pi / (2 * x.shape[-1]))
    return torch.polar(torch.ones_like(angles), angles)


def _weights(x: Tensor) -> Tensor:
    """The square root of 2, but 1 for the constant."""
    first = torch.arange(x.shape[-1], device=x.device) == 0
    one = torch.ones((), dtype=x.dtype, device=x.device)  # two numbers would be in the default dtype
    return torch.where(first, one, math.sqrt(2))


def _interleaved(even: Tensor, odd: Tensor) -> Tensor:
    lacking = even.shape[-1] - odd.shape[-1]
    joined = torch.stack([even, torch.cat([odd, even[..., :lacking]], -1)], -1).flatten(-2)
    return joined[..., : joined.shape[-1] - lacking]


def dct(dims: int | Sequence[int] = -1) -> Invertible:
    r"""The discrete cosine transform (DCT-II), orthonormal; its inverse is DCT-III.

    .. math:: y_k = w_k \sum_j x_j \cos \frac{\pi k (2 j + 1)}{2 n}, \qquad w_0 = \sqrt{1 / n}, \; w_k = \sqrt{2 / n},
        \qquad \log|\det J| = 0

    Args:
        dims: The dimension, or several; ``(-2, -1)`` is the transform of JPEG's blocks.

    Shapes:
        Any, unchanged; real. Half precisions are computed in float32.

    Domain:
        All of it, onto all of it.

    Cost:
        One Fourier transform of the same size for each dimension and direction. Lowered, nothing is kept; backward
        transforms the value and the gradient back.

    Raises:
        OptionError: When there are no dims.
        WireError: When the input is complex, or lacks a dimension.

    Example:
        >>> import torch
        >>> dct()(torch.ones(4)).round(decimals=4)
        tensor([2., 0., 0., 0.])

    Source:
        Ahmed, Natarajan and Rao (1974); by one Fourier transform: Makhoul (1980).
    """
    static = _some("dct", dims)
    return _unitary(partial(_dct, static), partial(_idct, static), f"dct({show(dims)})")
