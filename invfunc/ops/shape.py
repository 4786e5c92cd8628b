"""Shapes: ops that move elements without changing them, padding, and the Haar wavelet."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.op import Invertible, Rearrangement, chain, named, pair
from ..core.precision import at_least, real_dtype
from ..debug import checking, require
from ..engine.devices import beside
from ..errors import OptionError, WireError
from ..wires import describe
from .embedding import embedding

# ---- what the families of this catalogue share ----------------------------------------------------------------------


def check_tensor(subject: str, x: Any, least: int = 0) -> None:
    """Raise unless x is one tensor of at least so many dimensions."""
    if not isinstance(x, Tensor) or x.dim() < least:
        raise WireError(f"{subject}: the input", expected=f"a tensor of at least {least} dims", got=describe(x))


def check_dims(subject: str, x: Any, count: int) -> None:
    """Raise unless x is one tensor of so many dimensions."""
    if not isinstance(x, Tensor) or x.dim() != count:
        raise WireError(f"{subject}: the input", expected=f"a tensor of {count} dims", got=describe(x))


def check_size(subject: str, x: Any, dim: int, size: int) -> None:
    """Raise unless x is one tensor of a size along a dimension."""
    check_tensor(subject, x, dim + 1 if dim >= 0 else -dim)
    if x.shape[dim] != size:
        raise WireError(f"{subject}: the input", expected=f"size {size} along dim {dim}", got=describe(x))


def check_distinct(subject: str, x: Any, dims: Sequence[int]) -> None:
    """Raise unless x is one tensor that has these dimensions, and none of them is named twice."""
    check_tensor(subject, x, reach(*dims))
    if len({dim % x.dim() for dim in dims}) < len(dims):
        raise WireError(f"{subject}: dims {list(dims)}", expected="each at most once", got=describe(x))


def check_nonzero(subject: str, values: Tensor, expected: str, cure: str = "") -> None:
    """While checking, raise where a number is 0 or NaN."""
    require(subject, values, _is_nonzero, expected, cure)


def _is_nonzero(values: Tensor) -> Tensor:
    return values.abs() > 0


def no_log_det(x: Tensor, y: Tensor) -> Tensor:
    """The log-determinant of a map that keeps volumes: 0 for each batch element."""
    return x.new_zeros(x.shape[:1], dtype=real_dtype(x))


def per_position(log_det: Tensor, x: Tensor, dim: int) -> Tensor:
    """A log-determinant of a map of one dimension, at all positions: one number for each batch element.

    A complex map is counted as the real one of twice the size.
    """
    check_tensor("the log-determinant", x, 2)
    positions = x.shape[1:].numel() // x.shape[dim] * (1 + x.is_complex())
    return (log_det * positions).to(at_least(real_dtype(x))).expand(x.shape[:1])


def reach(*dims: int) -> int:
    """How many dimensions a tensor needs to have these."""
    return max([0, *(dim + 1 if dim >= 0 else -dim for dim in dims)])


def meeting(vector: Tensor, x: Tensor, dim: int = 1) -> Tensor:
    """A vector in the shape in which it meets x along a dimension."""
    return vector.reshape(-1, *[1] * (x.dim() - 1 - dim % x.dim()))


def sum_but(values: Tensor, dim: int = 1) -> Tensor:
    """The sum over all dimensions but one: the gradient of a vector that met them there."""
    return values.sum([other for other in range(values.dim()) if other != dim % values.dim()])


def as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    """One number, or several, as a tuple."""
    return (value,) if isinstance(value, int) else tuple(value)


def show(value: int | Sequence[int]) -> str:
    """One number, or several, as the call that was given them reads."""
    return str(operator.index(value) if isinstance(value, int) else list(map(operator.index, value)))


# ---- order of dimensions and elements -------------------------------------------------------------------------------


def _permute(dims: tuple[int, ...], x: Tensor) -> Tensor:
    check_dims(f"permute({list(dims)})", x, len(dims))
    return x.permute(dims)


def permute(dims: Sequence[int]) -> Invertible:
    r"""Reorder dimensions: dim i of the output is dim ``dims[i]`` of the input, as `torch.permute`.

    .. math:: y_{i_{dims_1}, \dots, i_{dims_n}} = x_{i_1, \dots, i_n}

    Args:
        dims: Each of the dimensions once. Leave dim 0, the batch, where it is if you want log-determinants.

    Shapes:
        Any, dtype any; the inverse is the inverse permutation.

    Domain:
        All of it, onto all of it. Elements are moved and not changed: the log-determinant is 0.

    Cost:
        Both directions return views; nothing is kept.

    Raises:
        OptionError: When ``dims`` is not a permutation.
        WireError: When the input has another number of dimensions.

    Example:
        >>> import torch
        >>> op = permute([0, 2, 1])
        >>> op(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 4, 3])
        >>> op.inverse(op(torch.zeros(2, 3, 4))).shape
        torch.Size([2, 3, 4])
    """
    count = len(dims)
    dims = tuple(dim + count * (dim < 0) for dim in dims)
    if sorted(dims) != list(range(count)):
        raise OptionError(f"permute: got {list(dims)}", expected=f"each of 0..{max(count - 1, 0)} exactly once")
    back = tuple(dims.index(i) for i in range(count))
    return Rearrangement(
        partial(_permute, dims), partial(_permute, back), f"permute({list(dims)})", f"permute({list(back)})"
    )


def _transpose(dim0: int, dim1: int, x: Tensor) -> Tensor:
    check_tensor(f"transpose({dim0}, {dim1})", x, reach(dim0, dim1))
    return x.transpose(dim0, dim1)


def transpose(dim0: int, dim1: int) -> Invertible:
    r"""Exchange two dimensions, as `torch.transpose`; it is its own inverse.

    .. math:: y_{\dots, i, \dots, j, \dots} = x_{\dots, j, \dots, i, \dots}

    Args:
        dim0: A dimension; negative counts from the end.
        dim1: Another.

    Shapes:
        Any, dtype any.

    Domain:
        All of it, onto all of it. Elements are moved and not changed: the log-determinant is 0.

    Cost:
        Both directions return views; nothing is kept.

    Raises:
        WireError: When the input lacks one of the dimensions.

    Example:
        >>> import torch
        >>> transpose(1, 2)(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 4, 3])
    """
    move, label = partial(_transpose, dim0, dim1), f"transpose({dim0}, {dim1})"
    return Rearrangement(move, move, label, label)


def _movedim(source: int, destination: int, x: Tensor) -> Tensor:
    check_tensor(f"movedim({source}, {destination})", x, reach(source, destination))
    return x.movedim(source, destination)


def movedim(source: int, destination: int) -> Invertible:
    r"""Move a dimension to another place and keep the order of the others, as `torch.movedim`.

    .. math:: y_{\dots, i, \dots} = x_{\dots, i, \dots} \quad \text{with } i \text{ at another place}

    Args:
        source: The dimension to move; negative counts from the end.
        destination: Where to.

    Shapes:
        Any, dtype any; the inverse is ``movedim(destination, source)``.

    Domain:
        All of it, onto all of it. Elements are moved and not changed: the log-determinant is 0.

    Cost:
        Both directions return views; nothing is kept.

    Raises:
        WireError: When the input lacks one of the dimensions.

    Example:
        >>> import torch
        >>> movedim(1, -1)(torch.zeros(2, 3, 4, 5)).shape
        torch.Size([2, 4, 5, 3])
    """
    to, fro = partial(_movedim, source, destination), partial(_movedim, destination, source)
    return Rearrangement(to, fro, f"movedim({source}, {destination})", f"movedim({destination}, {source})")


def along(op: Invertible, dim: int = 1) -> Invertible:
    r"""An op of the last dimension, applied along another: ``chain(movedim(dim, -1), op, movedim(-1, dim))``.

    .. math:: y_{i, :, j} = op(x_{i, :, j})

    Args:
        op: An op that acts on the last dimension: any of the linear ones, for example.
        dim: The dimension that it shall act on; the channels by default.

    Shapes:
        ``(N, C, ...) -> (N, C', ...)`` for an op ``(..., C) -> (..., C')``, of its dtypes.

    Domain:
        That of ``op``.

    Cost:
        That of ``op``: the dimensions are moved as views, and the log-determinant is that of ``op``.

    Raises:
        WireError: When the input lacks the dimension.

    Example:
        >>> import torch
        >>> along(flip(-1), dim=1)
        along(flip(-1), dim=1)
        >>> along(flip(-1), dim=1)(torch.arange(4).reshape(1, 2, 2))
        tensor([[[2, 3],
                 [0, 1]]])
    """
    return named(chain(movedim(dim, -1), op, movedim(-1, dim)), f"along({op!r}, dim={dim})")


def _flip(dims: tuple[int, ...], x: Tensor) -> Tensor:
    check_distinct(f"flip({list(dims)})", x, dims)
    return x.flip(dims)


def flip(dims: int | Sequence[int]) -> Invertible:
    """Reverse the order of elements along dimensions, as `torch.flip`; it is its own inverse.

    .. math:: y_i = x_{size - 1 - i}

    Args:
        dims: The dimension, or several.

    Shapes:
        Any, unchanged; dtype any.

    Domain:
        All of it, onto all of it. Elements are moved and not changed: the log-determinant is 0.

    Cost:
        One copy in each direction; nothing is kept.

    Raises:
        WireError: When the input lacks one of the dimensions.

    Example:
        >>> import torch
        >>> flip(-1)(torch.arange(3))
        tensor([2, 1, 0])

    Source:
        Reversed channels between couplings: Dinh et al., Real NVP (2017).
    """
    move, label = partial(_flip, as_tuple(dims)), f"flip({show(dims)})"
    return Rearrangement(move, move, label, label)


def _roll(shifts: tuple[int, ...], dims: tuple[int, ...], x: Tensor) -> Tensor:
    check_tensor(f"roll({list(shifts)}, {list(dims)})", x, reach(*dims))
    return x.roll(shifts, dims)


def roll(shifts: int | Sequence[int], dims: int | Sequence[int]) -> Invertible:
    r"""Shift elements along dimensions, those that leave at the end enter at the beginning, as `torch.roll`.

    .. math:: y_{(i + shift) \bmod size} = x_i

    Args:
        shifts: How far, for each dimension; the inverse shifts by as much the other way.
        dims: The dimension, or several.

    Shapes:
        Any, unchanged; dtype any.

    Domain:
        All of it, onto all of it. Elements are moved and not changed: the log-determinant is 0.

    Cost:
        One copy in each direction; nothing is kept.

    Raises:
        OptionError: When there are not as many shifts as dimensions.
        WireError: When the input lacks one of the dimensions.

    Example:
        >>> import torch
        >>> roll(1, -1)(torch.arange(3))
        tensor([2, 0, 1])
        >>> ~roll(1, -1)
        roll(-1, -1)

    Source:
        Shifted windows: Liu et al., Swin Transformer (2021).
    """
    if len(as_tuple(shifts)) != len(as_tuple(dims)):
        raise OptionError(f"roll: {show(shifts)} along dims {show(dims)}", expected="one shift for each dim")
    back = -shifts if isinstance(shifts, int) else [-shift for shift in shifts]
    to, fro = (partial(_roll, as_tuple(by), as_tuple(dims)) for by in (shifts, back))
    return Rearrangement(to, fro, f"roll({show(shifts)}, {show(dims)})", f"roll({show(back)}, {show(dims)})")


def _select(order: Tensor, dim: int, x: Tensor) -> Tensor:
    check_size("permute_channels", x, dim, len(order))
    return x.index_select(dim, beside(order, x))


def permute_channels(order: Sequence[int] | Tensor, dim: int = 1) -> Invertible:
    """Reorder the slices of one dimension: slice i of the output is slice ``order[i]`` of the input.

    .. math:: y_i = x_{order_i}

    Args:
        order: A permutation of ``range(C)``; ``torch.randperm(C)`` for a random one.
        dim: The dimension; the channels by default.

    Shapes:
        ``(N, C, ...)``, unchanged; dtype any.

    Domain:
        All of it, onto all of it. Elements are moved and not changed: the log-determinant is 0.

    Cost:
        One copy in each direction; nothing is kept.

    Raises:
        OptionError: When ``order`` is not a permutation; of an order on a device only in debug mode, since to look at
            it is to wait for the device.
        WireError: When the dimension has another size.

    Example:
        >>> import torch
        >>> permute_channels([2, 0, 1])(torch.tensor([[5, 6, 7]]))
        tensor([[7, 5, 6]])

    Source:
        Fixed permutations between couplings; `mix_channels` has the learned ones of Glow.
    """
    order = torch.as_tensor(order)
    if order.dim() != 1 or order.dtype != torch.int64 or not _is_permutation(order):
        raise OptionError(f"permute_channels: order of {len(order)}", expected="each of 0..C-1 exactly once")
    to, fro = partial(_select, order, dim), partial(_select, order.argsort(), dim)
    label = f"permute_channels(order, dim={dim})"
    return Rearrangement(to, fro, label, f"invert({label})")


def _is_permutation(order: Tensor) -> bool:
    """Whether each of 0..C-1 is there once; a graph can not look at values, and to look at a device is to wait."""
    if torch.compiler.is_compiling() or not (order.is_cpu or checking()):
        return True
    return order.sort().values.tolist() == list(range(len(order)))


# ---- sizes ----------------------------------------------------------------------------------------------------------


def _reshape(sizes: tuple[int, ...], new: tuple[int, ...], x: Tensor) -> Tensor:
    check_tensor(f"reshape({list(sizes)}, {list(new)})", x, len(sizes))
    leading = x.dim() - len(sizes)
    if tuple(x.shape[leading:]) != sizes:
        raise WireError(
            f"reshape({list(sizes)}, {list(new)}): the input", expected=f"(..., *{list(sizes)})", got=describe(x)
        )
    return x.reshape(*x.shape[:leading], *new)


def reshape(sizes: Sequence[int], new_sizes: Sequence[int]) -> Invertible:
    r"""Give the last dimensions other sizes; the dimensions before them stay as they are.

    .. math:: y = x \quad \text{element by element, in order}

    Args:
        sizes: The sizes of the last dimensions of the input.
        new_sizes: What they become.

    Shapes:
        ``(..., *sizes) -> (..., *new_sizes)``, dtype any.

    Domain:
        All of it, onto all of it. Elements are moved and not changed: the log-determinant is 0.

    Cost:
        Views where the strides allow it; nothing is kept.

    Raises:
        OptionError: When the two have different numbers of elements.
        WireError: When the input has other sizes.

    Example:
        >>> import torch
        >>> reshape([3, 4], [2, 6])(torch.zeros(5, 3, 4)).shape
        torch.Size([5, 2, 6])
    """
    sizes, new = tuple(sizes), tuple(new_sizes)
    if prod(sizes) != prod(new) or min((*sizes, *new), default=0) < 0:
        raise OptionError(f"reshape: {list(sizes)} to {list(new)}", expected="as many elements")
    to, fro = partial(_reshape, sizes, new), partial(_reshape, new, sizes)
    return Rearrangement(to, fro, f"reshape({list(sizes)}, {list(new)})", f"reshape({list(new)}, {list(sizes)})")


def _flatten(start: int, end: int, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    check_tensor(f"flatten({start}, {end})", x, reach(start, end))
    first, last = start % x.dim(), end % x.dim()
    if first > last:
        raise WireError(f"flatten({start}, {end}): the input", expected="the start before the end", got=describe(x))
    return x.flatten(first, last), (first, *x.shape[first : last + 1])


def _unflatten(kept: tuple[int, ...], y: Tensor) -> Tensor:
    first, *sizes = kept
    check_size("the inverse of flatten", y, first, prod(sizes))
    return y.unflatten(first, sizes)


def _pull_unflatten(kept: tuple[int, ...], y: Tensor, gy: Tensor) -> Any:
    return _unflatten(kept, y), _unflatten(kept, gy), []


def _flatten_sizes(start: int, end: int, sizes: tuple[int, ...], x: Tensor) -> Tensor:
    y, (_, *got) = _flatten(start, end, x)
    if tuple(got) != sizes:
        raise WireError(
            f"flatten({start}, {end}): the input", expected=f"sizes {list(sizes)} in these dims", got=describe(x)
        )
    return y


def _unflatten_sizes(start: int, end: int, sizes: tuple[int, ...], y: Tensor) -> Tensor:
    check_tensor("the inverse of flatten", y)
    first = start if start >= 0 else start + y.dim() + len(sizes) - 1
    return _unflatten((first, *sizes), y)


def flatten(start: int = 1, end: int = -1, sizes: Sequence[int] | None = None) -> Invertible:
    r"""Make one dimension of several neighbours, as `torch.flatten`.

    .. math:: y_{n, (i_1 s_2 + i_2) s_3 + \dots} = x_{n, i_1, i_2, \dots}

    Args:
        start: The first of them.
        end: The last of them.
        sizes: Their sizes, if they are known: the inverse then needs nothing else. Otherwise forward keeps them.

    Shapes:
        ``(N, *sizes) -> (N, prod(sizes))`` by default, dtype any.

    Domain:
        All of it, onto all of it. Elements are moved and not changed: the log-determinant is 0.

    Cost:
        A view where the strides allow it. Without ``sizes``, a few integers are kept.

    Raises:
        WireError: When the input lacks the dimensions, or they are not of these sizes.
        NotInvertibleError: When an inverse without the kept sizes is asked of an op without ``sizes``.

    Example:
        >>> import torch
        >>> y, kept = flatten().forward_with_residue(torch.zeros(2, 3, 4))
        >>> y.shape
        torch.Size([2, 12])
        >>> flatten().inverse_with_residue(kept, y).shape
        torch.Size([2, 3, 4])
        >>> flatten(sizes=[3, 4]).inverse(y).shape
        torch.Size([2, 3, 4])

    Source:
        InvTorch's ``Flatten``.
    """
    label = f"flatten({start}, {end}{'' if sizes is None else f', {list(sizes)}'})"
    if sizes is None:
        to = partial(_flatten, start, end)
        return pair(to, _unflatten, pullback=_pull_unflatten, log_det=no_log_det, residue=True, name=label)
    static = start, end, tuple(sizes)
    return Rearrangement(
        partial(_flatten_sizes, *static), partial(_unflatten_sizes, *static), label, f"invert({label})"
    )


# ---- space to depth -------------------------------------------------------------------------------------------------


def _factors(factor: int | tuple[int, ...], label: str, x: Tensor) -> tuple[int, tuple[int, ...]]:
    """The dimension of the channels, and the factor of each dimension after it."""
    if isinstance(factor, int):
        check_tensor(label, x, 3)
        return 1, (factor,) * (x.dim() - 2)
    check_tensor(label, x, len(factor) + 1)
    return x.dim() - len(factor) - 1, factor


def _unshuffle(factor: int | tuple[int, ...], channels_first: bool, x: Tensor) -> Tensor:
    channels, factors = _factors(factor, f"pixel_unshuffle({show(factor)})", x)
    sizes = x.shape[channels + 1 :]
    if any(size % by for size, by in zip(sizes, factors, strict=True)):
        raise WireError(
            f"pixel_unshuffle({show(factor)}): the input",
            expected=f"sizes that {show(factors)} divide after dim {channels}",
            got=describe(x),
            cure=f"put pad_to_multiple({show(factor)}) before it",
        )
    blocks = [part for size, by in zip(sizes, factors, strict=True) for part in (size // by, by)]
    split = x.reshape(*x.shape[: channels + 1], *blocks)
    return split.permute(_block_order(channels, len(factors), channels_first)).flatten(
        channels, channels + len(factors)
    )


def _shuffle(factor: int | tuple[int, ...], channels_first: bool, y: Tensor) -> Tensor:
    channels, factors = _factors(factor, f"pixel_shuffle({show(factor)})", y)
    if y.shape[channels] % prod(factors):
        raise WireError(
            f"pixel_shuffle({show(factor)}): the input",
            expected=f"channels that {prod(factors)} divides along dim {channels}",
            got=describe(y),
        )
    packed = (-1, *factors) if channels_first else (*factors, -1)
    order = _block_order(channels, len(factors), channels_first)
    back = tuple(order.index(i) for i in range(len(order)))
    blocks = y.unflatten(channels, packed).permute(back)
    return blocks.reshape(*y.shape[:channels], blocks.shape[channels], *_joined(y.shape[channels + 1 :], factors))


def _joined(sizes: Sequence[int], factors: Sequence[int]) -> list[int]:
    return [size * by for size, by in zip(sizes, factors, strict=True)]


def _block_order(channels: int, count: int, channels_first: bool) -> tuple[int, ...]:
    """From ``(..., C, S1, r1, S2, r2)`` to ``(..., C, r1, r2, S1, S2)``, or with the factors before C."""
    sizes, inside = range(channels + 1, channels + 2 * count, 2), range(channels + 2, channels + 2 * count + 1, 2)
    packed = (channels, *inside) if channels_first else (*inside, channels)
    return (*range(channels), *packed, *sizes)


def pixel_unshuffle(factor: int | Sequence[int], channels_first: bool = True) -> Invertible:
    r"""Space to depth: each block of neighbours becomes channels, as `torch.nn.PixelUnshuffle`, in 1 to 3 dimensions.

    .. math:: y_{(c, i, j), h, w} = x_{c, h r + i, w r + j}

    The squeeze of flows: :math:`(N, C, S_1, ...) \to (N, C r_1 \cdots r_d, S_1 / r_1, ...)`.

    Args:
        factor: The size of a block: one number for every dimension after dim 1, or one for each of the last dimensions.
        channels_first: Whether the channel varies slowest in the packed ones (C, r1, r2: torch's order) or fastest
            (r1, r2, C: the blocks' first elements come first, all channels of them).

    Shapes:
        As above, dtype any; several factors allow any number of dimensions before the channels.

    Domain:
        All of it, onto all of it. Elements are moved and not changed: the log-determinant is 0.

    Cost:
        One copy in each direction; nothing is kept. For channels-last layouts, put `movedim` around it.

    Raises:
        OptionError: When a factor is not positive.
        WireError: When the sizes do not divide; `pad_to_multiple` makes them.

    Example:
        >>> import torch
        >>> pixel_unshuffle(2)(torch.zeros(1, 3, 4, 6)).shape
        torch.Size([1, 12, 2, 3])
        >>> pixel_unshuffle([1, 2])(torch.zeros(1, 3, 4, 6)).shape
        torch.Size([1, 6, 4, 3])
        >>> ~pixel_unshuffle(2)
        pixel_shuffle(2)

    Source:
        Shi et al., sub-pixel convolution (2016); the squeeze of Dinh et al., Real NVP (2017).
    """
    factor = factor if isinstance(factor, int) else tuple(factor)
    if min(as_tuple(factor), default=0) < 1:
        raise OptionError(f"pixel_unshuffle: factor is {show(factor)}", expected="positive numbers")
    static = factor, channels_first
    options = f"({show(factor)}{'' if channels_first else ', channels_first=False'})"
    return Rearrangement(
        partial(_unshuffle, *static), partial(_shuffle, *static), f"pixel_unshuffle{options}", f"pixel_shuffle{options}"
    )


def pixel_shuffle(factor: int | Sequence[int], channels_first: bool = True) -> Invertible:
    """Depth to space: ``pixel_shuffle(...) = invert(pixel_unshuffle(...))``, as `torch.nn.PixelShuffle`.

    .. math:: y_{c, h r + i, w r + j} = x_{(c, i, j), h, w}

    Args:
        factor: The size of a block; see `pixel_unshuffle`.
        channels_first: The order of the packed channels; see `pixel_unshuffle`.

    Shapes:
        ``(N, C r_1 ... r_d, S_1, ...) -> (N, C, S_1 r_1, ...)``, dtype any.

    Domain:
        All of it, onto all of it. Elements are moved and not changed: the log-determinant is 0.

    Cost:
        One copy in each direction; nothing is kept.

    Raises:
        WireError: When the channels do not divide.

    Example:
        >>> import torch
        >>> pixel_shuffle(2)(torch.zeros(1, 12, 2, 3)).shape
        torch.Size([1, 3, 4, 6])

    Source:
        Shi et al., sub-pixel convolution (2016).
    """
    return pixel_unshuffle(factor, channels_first).inverted()


def _haar_bands(channels_first: bool, x: Tensor) -> Tensor:
    """The Haar transform of each block of 2^d channels: symmetric and orthogonal, so it is its own inverse."""
    check_tensor("haar", x, 3)
    count = x.dim() - 2
    if x.shape[1] % 2**count:
        expected = f"channels that {2**count} divides along dim 1"
        raise WireError("the inverse of haar: the input", expected=expected, got=describe(x))
    blocks = x.unflatten(1, (-1, *[2] * count) if channels_first else (*[2] * count, -1))
    for place in range(1 + channels_first, 1 + channels_first + count):
        low, high = blocks.unbind(place)
        blocks = torch.stack([low + high, low - high], place)
    return blocks.flatten(1, 1 + count) * 2 ** (-count / 2)


def _pull_haar_bands(channels_first: bool, y: Tensor, gy: Tensor) -> Any:
    return _haar_bands(channels_first, y), _haar_bands(channels_first, gy), []


def haar(channels_first: bool = True) -> Invertible:
    r"""The orthonormal Haar wavelet over all dimensions after dim 1: each block of 2^d neighbours becomes 2^d bands.

    .. math:: y = H_d \, blocks(x), \qquad H_1 = \tfrac{1}{\sqrt 2}
        \begin{pmatrix} 1 & 1 \\ 1 & -1 \end{pmatrix}, \quad H_d = H_1^{\otimes d}, \qquad \log|\det J| = 0

    Args:
        channels_first: Whether the bands of a channel are neighbours (C, 2^d), or all channels of a band are (2^d, C):
            then the first C channels are the averages, and ``split([C, (2**d - 1) * C])`` takes them off.

    Shapes:
        ``(N, C, S1, ...) -> (N, 2^d C, S1/2, ...)`` for d = 1 to 3 dimensions of even size, floating-point or
        complex.

    Domain:
        All of it, onto all of it.

    Cost:
        One copy and d sums and differences in each direction; nothing is kept, and the gradient takes the same way as
        the value.

    Raises:
        WireError: When a size is odd; `pad_to_multiple` makes it even.

    Example:
        >>> import torch
        >>> haar()(torch.ones(1, 1, 2, 2)).flatten()
        tensor([2., 0., 0., 0.])

    Source:
        Haar (1910); as a squeeze: Ardizzone et al., conditional INNs (2019).
    """
    bands = partial(_haar_bands, channels_first)
    transform = pair(bands, bands, pullback=partial(_pull_haar_bands, channels_first), log_det=no_log_det, name="bands")
    return named(
        chain(pixel_unshuffle(2, channels_first), transform), f"haar({'channels_first=False' * (not channels_first)})"
    )


def checkerboard_mask(sizes: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    r"""Where the coordinates add up to an even number: the white squares, as a bool tensor.

    .. math:: m_p = (p_1 + \dots + p_d \text{ is even})

    Args:
        sizes: The sizes of the board, any number of them.
        device: Where to make it.

    Example:
        >>> checkerboard_mask([2, 3])
        tensor([[ True, False,  True],
                [False,  True, False]])
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for size in sizes:
        total = total[..., None] + torch.arange(size, device=device)
    return total % 2 == 0


def _sorted_squares(count: int, blocks: Tensor) -> Tensor:
    """Exchange the two elements of a block ``(..., 2)`` wherever the white one is second; its own inverse."""
    rows = checkerboard_mask(blocks.shape[-1 - count : -2], blocks.device)
    return torch.where(rows[..., None, None], blocks, blocks.flip(-1))


def _checkerboard(count: int, x: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor(f"checkerboard({count})", x, count)
    if x.shape[-1] % 2:
        raise WireError(f"checkerboard({count}): the input", expected="an even size along dim -1", got=describe(x))
    white, black = _sorted_squares(count, x.unflatten(-1, (-1, 2))).unbind(-1)
    return white, black


def _from_checkerboard(count: int, y: Any) -> Tensor:
    if not isinstance(y, tuple) or len(y) != 2 or describe(y[0]) != describe(y[1]):
        raise WireError(
            f"the inverse of checkerboard({count}): the input", expected="two tensors of one shape", got=describe(y)
        )
    return _sorted_squares(count, torch.stack(y, -1)).flatten(-2)


def checkerboard(dims: int = 2) -> Invertible:
    r"""One tensor into its white and its black squares: a split whose halves are everywhere neighbours.

    .. math:: x \mapsto (x_p : p_1 + \dots + p_d \text{ even},\; x_p : p_1 + \dots + p_d \text{ odd})

    Args:
        dims: How many of the last dimensions are the board.

    Shapes:
        ``(..., H, W) -> 2 x (..., H, W/2)``, dtype any; W is even. Square (i, j) of a half lies at column 2j or 2j + 1.

    Domain:
        All of it, onto all of it. Elements are moved and not changed: the log-determinant is 0.

    Cost:
        Two copies in each direction; nothing is kept.

    Raises:
        OptionError: When ``dims`` is not positive.
        WireError: When the last dimension is odd.

    Example:
        >>> import torch
        >>> checkerboard()(torch.arange(8).reshape(2, 4))
        (tensor([[0, 2],
                [5, 7]]), tensor([[1, 3],
                [4, 6]]))

    Source:
        Dinh et al., Real NVP (2017); `checkerboard_mask` is for couplings that mask.
    """
    if dims < 1:
        raise OptionError(f"checkerboard: dims is {dims}", expected="a positive number")
    label = f"checkerboard({dims})"
    return Rearrangement(partial(_checkerboard, dims), partial(_from_checkerboard, dims), label, f"invert({label})")


# ---- padding --------------------------------------------------------------------------------------------------------


def _pad(amounts: tuple[int, ...], mode: str, value: float, x: Tensor) -> Tensor:
    check_tensor("pad", x, len(amounts) // 2)
    if mode == "constant":
        return F.pad(x, amounts, mode, value)
    for dim, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        if before or after:
            source = torch.arange(-before, x.shape[-dim] + after, device=x.device)
            x = x.index_select(-dim, _SOURCES[mode](source, x.shape[-dim]))
    return x


def _reflected(i: Tensor, size: int) -> Tensor:
    i = i.abs() % max(2 * size - 2, 1)
    return torch.where(i < size, i, 2 * size - 2 - i)


def _replicated(i: Tensor, size: int) -> Tensor:
    return i.clamp(0, size - 1)


_SOURCES = {"reflect": _reflected, "replicate": _replicated, "circular": torch.remainder}  # for any number of dims


def _crop(amounts: tuple[int, ...], y: Tensor) -> Tensor:
    check_tensor("the inverse of pad", y, len(amounts) // 2)
    for dim, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        if y.shape[-dim] < before + after:
            expected = f"{before} + {after} or more along dim {-dim}"
            raise WireError("the inverse of pad: the input", expected=expected, got=describe(y))
        y = y.narrow(-dim, before, y.shape[-dim] - before - after)
    return y


def _pull_crop(amounts: tuple[int, ...], y: Tensor, gy: Tensor) -> Any:
    return _crop(amounts, y), _crop(amounts, gy), []


def _check_mode(subject: str, mode: str) -> None:
    if mode not in ("constant", *_SOURCES):
        raise OptionError(f"{subject}: mode is {mode!r}", expected="constant, reflect, replicate or circular")


def pad(amounts: Sequence[int], mode: str = "constant", value: float = 0.0) -> Invertible:
    r"""Pad, as `torch.nn.functional.pad` but in any number of dimensions and by any amount; the inverse crops.

    .. math:: y_{before + i} = x_i \quad \text{for } 0 \le i < size

    The inverse undoes forward (section); forward undoes the inverse on padded tensors only, so there is no
    log-determinant.

    Args:
        amounts: How much before and after, for the last dimension, then the one before it, ...
        mode: ``"constant"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        value: What a constant is padded with.

    Shapes:
        ``(..., W) -> (..., before + W + after)``, dtype any.

    Domain:
        All of it; the range is what is padded so. Of another tensor the inverse loses what it crops.

    Cost:
        One copy; the inverse is a view. Lowered, nothing is kept; but the inverse is a stage that is stored, since it
        does not tell what it cropped.

    Raises:
        OptionError: When ``amounts`` is not a list of pairs of numbers that are not negative.
        WireError: When the input has fewer dimensions.

    Example:
        >>> import torch
        >>> pad([1, 2])(torch.ones(3))
        tensor([0., 1., 1., 1., 0., 0.])
        >>> pad([1, 2]).inverse(torch.arange(6))
        tensor([1, 2, 3])

    Source:
        InvTorch's ``Pad``.
    """
    amounts = tuple(amounts)
    if len(amounts) % 2 or min(amounts, default=0) < 0:
        raise OptionError(
            f"pad: amounts are {list(amounts)}",
            expected="pairs of numbers that are not negative",
            cure="a negative one would lose elements",
        )
    _check_mode("pad", mode)
    return embedding(
        partial(_pad, amounts, mode, value),
        partial(_crop, amounts),
        pullback=partial(_pull_crop, amounts) if mode == "constant" else None,
        name=f"pad({list(amounts)}{f', mode={mode!r}' * (mode != 'constant')})",
    )


Windows: TypeAlias = tuple[int | tuple[int, ...], ...]  # kernel, stride and padding, each for one or all dimensions


def missing(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """What `pad` needs so that windows of these sizes and strides cover everything: half before, the rest after."""
    amounts: list[int] = []
    for size, window, step, around in zip(sizes, kernel, stride, padding, strict=True):
        span = max(size + 2 * around, window)
        lacking = span + -(span - window) % step - size - 2 * around
        amounts[:0] = lacking // 2, -(-lacking // 2)
    return tuple(amounts)


def _pad_to_fit(windows: Windows, mode: str, value: float, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    kernel, stride, padding = (_each(part, x) for part in windows)
    check_tensor("pad_to_multiple", x, len(kernel))
    amounts = missing(x.shape[x.dim() - len(kernel) :], kernel, stride, padding)
    return _pad(amounts, mode, value, x), amounts


def _each(part: int | tuple[int, ...], x: Tensor) -> tuple[int, ...]:
    return (part,) * (x.dim() - 2) if isinstance(part, int) else part


def pad_to_fit(windows: Windows, mode: str, value: float, label: str) -> Invertible:
    """Pad the last dimensions so that windows ``(kernel, stride, padding)`` cover them; the amounts are the residue."""
    to, pull = partial(_pad_to_fit, windows, mode, value), _pull_crop if mode == "constant" else None
    return embedding(to, _crop, pullback=pull, residue=True, name=label)


def pad_to_multiple(
    multiple: int | Sequence[int],
    mode: str = "constant",
    value: float = 0.0,
    *,
    sizes: Sequence[int] | None = None,
) -> Invertible:
    r"""Pad until the sizes are multiples, half before and the rest after; the inverse crops to the exact sizes again.

    .. math:: y_{before + i} = x_i, \qquad \text{multiple divides the size of } y

    Args:
        multiple: What shall divide the sizes: one number for every dimension after dim 1, or one for each of the last.
        mode: ``"constant"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        value: What a constant is padded with.
        sizes: The sizes to expect, if they are known: the inverse then needs nothing else. Otherwise forward keeps how
            much it added.

    Shapes:
        ``(N, C, S, ...) -> (N, C, ceil(S / m) m, ...)``, dtype any. Not a bijection, so there is no log-determinant.

    Domain:
        All of it; the range is what is padded so. Of another tensor the inverse loses what it crops.

    Cost:
        As `pad`. Without ``sizes``, a few integers are kept.

    Raises:
        OptionError: When a multiple is not positive.
        NotInvertibleError: When an inverse without what was kept is asked of an op without ``sizes``.

    Example:
        >>> import torch
        >>> op = pad_to_multiple(4)
        >>> y, kept = op.forward_with_residue(torch.zeros(1, 1, 5, 8))
        >>> y.shape
        torch.Size([1, 1, 8, 8])
        >>> op.inverse_with_residue(kept, y).shape
        torch.Size([1, 1, 5, 8])

    Source:
        InvTorch's ``Pad.multiple``.
    """
    multiple = multiple if isinstance(multiple, int) else tuple(multiple)
    if min(as_tuple(multiple), default=0) < 1:
        raise OptionError(f"pad_to_multiple: got {show(multiple)}", expected="positive numbers")
    _check_mode("pad_to_multiple", mode)
    label = f"pad_to_multiple({show(multiple)}{f', mode={mode!r}' * (mode != 'constant')})"
    if sizes is None:
        zeros = 0 if isinstance(multiple, int) else (0,) * len(multiple)
        return pad_to_fit((multiple, multiple, zeros), mode, value, label)
    by = (multiple,) * len(sizes) if isinstance(multiple, int) else multiple
    return named(chain(pad(missing(sizes, by, by, (0,) * len(by)), mode, value)), label)
