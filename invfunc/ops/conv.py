"""Convolutions with an inverse: 1x1, which mix channels, and those whose patches tile or cover the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad

from ..core.couple import match
from ..core.op import Invertible, chain, named, pair
from ..core.precision import at_least, exactly, real_dtype
from ..errors import OptionError, WireError
from ..wires import describe
from .embedding import embedding
from .linear import (
    check_matrix,
    check_orthonormal,
    left_inverse,
    regular_log_det,
    rotation_log_det,
    widened,
    widened_for,
)
from .shape import check_dims, check_size, meeting, pad_to_fit, per_position, sum_but

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11

# ---- 1x1: one matrix at every position --------------------------------------------------------------------------


def _as_matrix(weight: Tensor) -> Tensor:
    """``(C, C, 1, ...)`` as ``(C, C)``."""
    return weight.reshape(weight.shape[:2])


def _columns(x: Tensor) -> Tensor:
    """``(N, C, ...)`` as ``(N, C, P)``: one column for each position."""
    return x.reshape(x.shape[0], x.shape[1], x.shape[2:].numel())


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    """The product with a matrix at every position."""
    return (matrix @ _columns(x)).reshape(x.shape[0], matrix.shape[0], *x.shape[2:])


def _conv1x1(label: str, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    check_size(label, x, 1, weight.shape[1])
    return exactly(_mixed, x, weight, bias, least=None)


def _mixed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _mix(_as_matrix(weight), x)
    return y if bias is None else y + meeting(bias, y)


def _undo_conv1x1(
    inverse_of: Callable[..., Tensor], label: str, weight: Tensor, bias: Tensor | None, y: Tensor
) -> Tensor:
    check_size(f"the inverse of {label}", y, 1, weight.shape[0])
    return exactly(partial(_unmixed, inverse_of, label), y, weight, bias)


def _unmixed(inverse_of: Callable[..., Tensor], label: str, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _mix(inverse_of(label, _as_matrix(weight)), y if bias is None else y - meeting(bias, y))


def _pull_conv1x1(
    inverse_of: Callable[..., Tensor], label: str, weight: Tensor, bias: Tensor | None, y: Tensor, gy: Tensor
) -> Any:
    x = _undo_conv1x1(inverse_of, label, weight, bias, y)
    gx = exactly(_mixed_back, gy, weight, least=None)
    gweight = exactly(_products, widened(gy, weight), x, least=None).reshape(weight.shape)
    return x, gx, [(weight, match(gweight, weight)), *bias_gradient(bias, gy)]


def _mixed_back(gy: Tensor, weight: Tensor) -> Tensor:
    return _mix(_as_matrix(weight).mH, gy)


def _products(gy: Tensor, x: Tensor) -> Tensor:
    """The sum of ``gy_p x_p^H`` over all positions: the gradient of the matrix."""
    gy, x = _columns(gy), _columns(x).conj()
    if gy.shape[1] <= gy.shape[2]:  # a matrix for each element of the batch is smaller than a copy of x, and faster
        return (gy @ x.mT).sum(0)
    return torch.einsum("ncp,ndp->cd", gy, x)


def bias_gradient(bias: Tensor | None, gy: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The gradient of what was added to each channel."""
    return [] if bias is None else [(bias, match(sum_but(gy), bias))]


def _log_det_conv1x1(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return per_position(regular_log_det("conv1x1", _as_matrix(widened_for(x, weight))), x, 1)


def _conv1x1_op(
    label: str,
    weight: Tensor,
    bias: Tensor | None,
    inverse_of: Callable[..., Tensor],
    log_det: Callable[..., Tensor],
) -> Invertible:
    is_kernel = isinstance(weight, Tensor) and weight.dim() > 2 and weight.shape[2:].numel() == 1
    check_matrix(label, _as_matrix(weight) if is_kernel else weight)
    check_channel_bias(label, bias, weight.shape[0])
    static = label, weight, bias
    return pair(
        partial(_conv1x1, *static),
        partial(_undo_conv1x1, inverse_of, *static),
        pullback=partial(_pull_conv1x1, inverse_of, *static),
        log_det=log_det,
        name=f"{label}(weight{', bias' * (bias is not None)})",
    )


def check_channel_bias(label: str, bias: Tensor | None, channels: int) -> None:
    """Raise unless there is no bias, or one number for each channel."""
    if bias is not None and tuple(bias.shape) != (channels,):
        raise OptionError(f"{label}: the bias", expected=f"({channels},)", got=describe(bias))


def conv1x1(weight: Tensor, bias: Tensor | None = None) -> Invertible:
    r"""The same square matrix applied to the channels at every position, in any number of dimensions.

    .. math:: y_p = W x_p + b, \qquad x_p = W^{-1} (y_p - b), \qquad \log|\det J| = n_{positions} \log|\det W|

    Args:
        weight: (C, C), or (C, C, 1, ...) as a convolution has it; of full rank.
        bias: (C,).

    Shapes:
        ``(N, C, ...) -> (N, C, ...)``, floating-point or complex.

    Domain:
        All of it, onto all of it.

    Cost:
        The inverse inverts W, C^3, once for all positions; so does the log-determinant. ``along(lu(...))`` need not.
        Lowered, nothing is kept; backward multiplies three times where plain training does twice.

    Limits:
        Rounding grows with the condition number of W: start from an orthogonal one. Autocast is left out: half
        precision would lose what the inverse needs.

    Raises:
        OptionError: When the weight is not square, or the bias does not fit it.
        WireError: When dim 1 has another size.
        DomainError: By the inverse, when W is singular; under ``inv.debug(True)``, by the log-determinant too, and when
            it is nearly so.

    Example:
        >>> import torch
        >>> op = conv1x1(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        >>> op(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([[[3., 4.],
                 [2., 4.]]])

    Source:
        Kingma and Dhariwal, Glow (2018).
    """
    return _conv1x1_op("conv1x1", weight, bias, left_inverse, partial(_log_det_conv1x1, weight))


def _adjoint(label: str, q: Tensor) -> Tensor:
    check_orthonormal(label, q)
    return q.mH


def _mixing_log_det(q: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return rotation_log_det("mix_channels", _as_matrix(q), x, y)


def mix_channels(q: Tensor, bias: Tensor | None = None) -> Invertible:
    r"""A `conv1x1` whose weight is orthogonal: a learned permutation of channels, undone by the transpose.

    .. math:: y_p = Q x_p + b, \qquad x_p = Q^T (y_p - b), \qquad \log|\det J| = 0

    Args:
        q: (C, C), orthogonal; `torch.nn.utils.parametrizations.orthogonal` keeps it so while it is trained.
        bias: (C,).

    Shapes:
        ``(N, C, ...) -> (N, C, ...)``, floating-point or complex.

    Domain:
        All of it, onto all of it.

    Cost:
        Both directions are one product at every position, and rounding does not grow. Lowered, nothing is kept.

    Limits:
        Q is taken at its word; ``inv.debug(True)`` checks.

    Raises:
        OptionError: When Q is not square, or the bias does not fit it.
        WireError: When dim 1 has another size.
        DomainError: Under ``inv.debug(True)``, by the inverse and the log-determinant, when Q is not orthogonal.

    Example:
        >>> import torch
        >>> net = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(3, 3))
        >>> op, x = mix_channels(net.weight), torch.ones(1, 3, 2, 2)
        >>> torch.allclose(op.inverse(op(x)), x, atol=1e-5)
        True

    Source:
        Kingma and Dhariwal, Glow (2018). After `pixel_unshuffle` it is the learned orthogonal downsampling of Etmann et
        al., iUNets (2020).
    """
    return _conv1x1_op("mix_channels", q, bias, _adjoint, partial(_mixing_log_det, q))


# ---- patches: a tall matrix at every patch -----------------------------------------------------------------------


class Geometry(NamedTuple):
    """What a convolution is beside its weight."""

    label: str
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of torch's functions."""
        return {"stride": self.stride, "padding": self.padding, "groups": self.groups}


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_WEIGHT_GRADIENT = {1: grad.conv1d_weight, 2: grad.conv2d_weight, 3: grad.conv3d_weight}


def _convolve(geometry: Geometry, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    _check_fits(geometry, weight.shape[1] * geometry.groups, x)
    return exactly(partial(_CONV[len(geometry.kernel)], **geometry.options), x, weight, bias, least=None)


def _check_fits(geometry: Geometry, channels: int, x: Tensor) -> None:
    label, kernel, stride, padding, _ = geometry
    check_dims(label, x, len(kernel) + 2)
    check_size(label, x, 1, channels)
    spans = [size + 2 * p - k for size, k, p in zip(x.shape[2:], kernel, padding, strict=True)]
    if any(span < 0 or span % step for span, step in zip(spans, stride, strict=True)):
        raise WireError(
            f"{label}: the input",
            expected=f"sizes that patches of {list(kernel)} with stride {list(stride)} cover",
            got=describe(x),
            cure="pass ceil_mode=True: it pads, and the inverse crops",
        )


def _deconvolve(geometry: Geometry, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    check_dims(f"the inverse of {geometry.label}", y, len(geometry.kernel) + 2)
    check_size(f"the inverse of {geometry.label}", y, 1, weight.shape[0])
    return exactly(partial(_from_patches, geometry), y, weight, bias)


def _from_patches(geometry: Geometry, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each patch by the left-inverse of the weight; where patches overlap, the mean of what they say."""
    shifted = y if bias is None else y - meeting(bias, y)
    inverse = left_inverse(geometry.label, _matrices(geometry, weight)).mT.reshape(weight.shape)
    total = _transposed(geometry)(shifted, inverse)
    if geometry.stride == geometry.kernel:
        return total
    ones = y.new_ones(1, 1, *y.shape[2:]), y.new_ones(1, 1, *geometry.kernel)
    return total / _transposed(geometry._replace(groups=1))(*ones)


def _matrices(geometry: Geometry, weight: Tensor) -> Tensor:
    """What makes outputs of a patch, one matrix for each group."""
    return weight.reshape(geometry.groups, weight.shape[0] // geometry.groups, -1)


def _transposed(geometry: Geometry) -> Callable[..., Tensor]:
    return partial(_CONV_TRANSPOSE[len(geometry.kernel)], **geometry.options)


def _pull_conv(geometry: Geometry, weight: Tensor, bias: Tensor | None, y: Tensor, gy: Tensor) -> Any:
    x = _deconvolve(geometry, weight, bias, y)
    gx = exactly(_transposed(geometry), gy, weight, least=None)
    gweight = exactly(partial(_weight_gradient, geometry, weight.shape), widened(gy, weight), x, least=None)
    return x, gx, [(weight, match(gweight, weight)), *bias_gradient(bias, gy)]


def _weight_gradient(geometry: Geometry, shape: torch.Size, gy: Tensor, x: Tensor) -> Tensor:
    return _WEIGHT_GRADIENT[len(geometry.kernel)](x, shape, gy, **geometry.options)


def _log_det_conv(geometry: Geometry, weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    of_patch = regular_log_det(geometry.label, _matrices(geometry, widened_for(x, weight))).sum()
    return (of_patch * y.shape[2:].numel()).to(at_least(real_dtype(x))).expand(x.shape[:1])


class Options(TypedDict, total=False):
    """How a convolution goes over its input; see `conv2d`."""

    stride: int | Sequence[int] | None
    padding: int | Sequence[int]
    groups: int
    ceil_mode: bool
    patchwise: bool


def _conv(
    dims: int,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    ceil_mode: bool = False,
    patchwise: bool = True,
) -> Invertible:
    label = f"conv{dims}d"
    _check_weight(label, weight, dims, groups)
    check_channel_bias(label, bias, weight.shape[0])
    kernel = tuple(weight.shape[2:])
    steps = kernel if stride is None else _for_each(label, "stride", stride, dims)
    geometry = Geometry(label, kernel, steps, _for_each(label, "padding", padding, dims), groups)
    _check_patches(geometry, patchwise)
    static = geometry, weight, bias
    square = weight.shape[0] == weight.shape[1:].numel() * groups and steps == kernel and not any(geometry.padding)
    build = partial(pair, log_det=partial(_log_det_conv, geometry, weight)) if square else embedding
    op = build(
        partial(_convolve, *static),
        partial(_deconvolve, *static),
        pullback=partial(_pull_conv, *static),
        name=f"{label}(weight{', bias' * (bias is not None)})",
    )
    if not ceil_mode:
        return op
    padded = pad_to_fit((kernel, steps, geometry.padding), "constant", 0.0, f"{label} pads")
    return named(chain(padded, op), f"{label}(weight{', bias' * (bias is not None)}, ceil_mode=True)")


def _for_each(label: str, role: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or min(values) < (role == "stride"):
        raise OptionError(f"{label}: {role} is {value}", expected=f"a number that is not negative, or {dims} of them")
    return values


def _check_weight(label: str, weight: Any, dims: int, groups: int) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != dims + 2 or groups < 1 or weight.shape[0] % groups:
        kernel = ", ".join(["k"] * dims)
        raise OptionError(f"{label}: the weight", expected=f"(out, in / groups, {kernel})", got=describe(weight))
    if weight.shape[0] // groups < weight.shape[1:].numel():
        raise OptionError(
            f"{label}: the weight {describe(weight)} makes {weight.shape[0] // groups} outputs in each group",
            expected=f"at least {weight.shape[1:].numel()}, the inputs of a patch",
            cure="more output channels, a smaller kernel, or more groups",
        )


def _check_patches(geometry: Geometry, patchwise: bool) -> None:
    label, kernel, stride, _, _ = geometry
    if any(step > size for step, size in zip(stride, kernel, strict=True)):
        raise OptionError(
            f"{label}: stride {list(stride)} over a kernel of {list(kernel)}",
            expected="a stride that is not larger than the kernel: between patches, elements would be lost",
        )
    if patchwise and stride != kernel:
        raise OptionError(
            f"{label}: stride {list(stride)} over a kernel of {list(kernel)}",
            expected="patches that tile: a stride like the kernel",
            cure="pass patchwise=False for patches that overlap",
        )


def conv1d(weight: Tensor, bias: Tensor | None = None, **options: Unpack[Options]) -> Invertible:
    r"""A convolution of sequences that can be undone; all of `conv2d` holds in one dimension.

    .. math:: y_{n, o, w} = b_o + \sum_{i, a} W_{o, i, a} \, x_{n, i, stride \cdot w + a}

    Args:
        weight: (out, in / groups, k), with out / groups >= in / groups * k.
        bias: (out,).
        options: Those of `conv2d`.

    Shapes:
        ``(N, in, W) -> (N, out, W / stride)``, floating-point.

    Domain:
        That of `conv2d`.

    Cost:
        That of `conv2d`.

    Example:
        >>> import torch
        >>> op, x = conv1d(torch.randn(6, 3, 2, dtype=torch.float64)), torch.randn(1, 3, 8, dtype=torch.float64)
        >>> torch.allclose(op.inverse(op(x)), x)
        True

    Source:
        InvTorch's ``Conv1d``.
    """
    return _conv(1, weight, bias, **options)


def conv2d(weight: Tensor, bias: Tensor | None = None, **options: Unpack[Options]) -> Invertible:
    r"""A convolution of images that can be undone, because its patches cover the input and none loses anything.

    .. math:: y_p = W \, patch_p(x) + b, \qquad patch_p(x) = W^+ (y_p - b)

    With the patches, the input is known: where they tile it, once; where they overlap, as the mean of what they say.
    The inverse undoes forward (section). Forward undoes the inverse on the range only, unless the patches tile and the
    weight is square.

    Args:
        weight: (out, in / groups, k, k), with out / groups >= in / groups * k * k and of full rank as a matrix of this
            many columns.
        bias: (out,).
        options: Keyword arguments.

            - ``stride``: At most the kernel; the kernel itself by default, so that patches tile.
            - ``padding``: Zeros around the input, as in `torch.nn.functional.conv2d`; none by default.
            - ``groups``: Groups of channels that do not meet; one by default.
            - ``ceil_mode``: With True, pad inputs that patches do not cover, half before and the rest after, and crop
              in the inverse. Otherwise they raise.
            - ``patchwise``: Insist on patches that tile, the default. With False they may overlap, which costs more and
              has no log-determinant.

    Shapes:
        ``(N, in, H, W) -> (N, out, (H + 2 padding - k) / stride + 1, ...)``, floating-point.

    Domain:
        All of it. The log-determinant exists where out = in k k, the patches tile and nothing is padded:
        :math:`n_{patches} \log|\det W|`.

    Cost:
        The inverse takes a QR of W, and one transposed convolution (two, where patches overlap: the second counts).
        Lowered, nothing is kept but, with ``ceil_mode``, how much was padded: a few integers. Unless it is onto, the
        inverse is a stage that is stored, since it does not tell what was off the range.

    Limits:
        Rounding grows with the condition number of W. Autocast is left out: half precision would lose what the inverse
        needs.

    Raises:
        OptionError: When there are too few output channels, or the stride leaves gaps.
        WireError: When patches do not cover the input, or it has other channels.
        DomainError: By the inverse, when a square W is singular; under ``inv.debug(True)``, by the log-determinant
            too, and when any W nearly is.

    Example:
        >>> import torch
        >>> op, x = conv2d(torch.randn(12, 3, 2, 2)), torch.randn(1, 3, 8, 8)
        >>> op(x).shape
        torch.Size([1, 12, 4, 4])
        >>> conv2d(torch.randn(12, 3, 2, 2), ceil_mode=True)(torch.randn(1, 3, 7, 8)).shape
        torch.Size([1, 12, 4, 4])

    Source:
        InvTorch's ``Conv2d``.
    """
    return _conv(2, weight, bias, **options)


def conv3d(weight: Tensor, bias: Tensor | None = None, **options: Unpack[Options]) -> Invertible:
    r"""A convolution of volumes that can be undone; all of `conv2d` holds in three dimensions.

    .. math:: y_{n, o, p} = b_o + \sum_{i, a} W_{o, i, a} \, x_{n, i, stride \cdot p + a}

    Args:
        weight: (out, in / groups, k, k, k), with out / groups >= in / groups * k^3.
        bias: (out,).
        options: Those of `conv2d`.

    Shapes:
        ``(N, in, D, H, W) -> (N, out, ...)``, floating-point.

    Domain:
        That of `conv2d`.

    Cost:
        That of `conv2d`.

    Example:
        >>> import torch
        >>> conv3d(torch.randn(8, 1, 2, 2, 2))(torch.randn(1, 1, 4, 4, 4)).shape
        torch.Size([1, 8, 2, 2, 2])

    Source:
        InvTorch's ``Conv3d``.
    """
    return _conv(3, weight, bias, **options)
