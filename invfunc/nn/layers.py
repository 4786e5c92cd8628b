"""The catalogue's ops that own parameters or options, as modules with the constructors of `torch.nn`.

Parameters, their initialisation and their names are those of the class of the same name in `torch.nn`, whose state
dicts load here, and the other way round.
"""

# pyright: reportIncompatibleMethodOverride=false
# A module's forward takes what its op takes; those of `torch.nn` take each their own.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .. import _torch, ops
from ..core.op import Invertible, Pair, chain
from ..core.precision import at_least, without_autocast
from ..errors import OptionError
from ..ops.linear import lu_by, orthogonal_by
from ..ops.shape import missing
from .lowered import Coupling, Layer

# ---- linear ----------------------------------------------------------------------------------------------------------


class Linear(Layer, nn.Linear):
    """`torch.nn.Linear` that can be undone: square, or with more outputs than inputs (by the pseudo-inverse).

    Args:
        in_features: The size of the last dimension of the input.
        out_features: That of the output, at least as large.
        bias: Whether to add one.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        OptionError: When there are fewer outputs than inputs.

    Limits:
        A random matrix may be badly conditioned, and rounding grows with it: `OrthogonalLinear` is not.

    Example:
        >>> import torch, invfunc as inv
        >>> layer, x = inv.nn.Linear(3, 5), torch.ones(2, 3)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-4)
        True
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        _check_tall(type(self).__name__, in_features, out_features)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)

    def make(self) -> Invertible:
        square = self.in_features == self.out_features
        return (ops.linear if square else ops.tall_linear)(self.weight, self.bias)

    @property
    def reversible(self) -> bool:
        """Whether it is square."""
        return self.in_features == self.out_features


def _check_tall(name: str, inputs: int, outputs: int) -> None:
    if outputs < inputs:
        raise OptionError(
            f"{name}: {outputs} outputs of {inputs} inputs",
            expected="at least as many outputs",
            cure="fewer would lose something; use torch.nn.Linear, whose input is stored",
        )


class OrthogonalLinear(Linear):
    """A `Linear` whose weight stays orthogonal: its inverse is the transpose, and rounding does not grow.

    Args:
        in_features: See `Linear`.
        out_features: See `Linear`.
        bias: See `Linear`.
        device: See `Linear`.
        dtype: See `Linear`.

    Limits:
        The weight is a parametrization of torch's: such a module is saved by its state dict, not by pickle. It is
        orthogonal in the dtype of the parameters, whatever they were made or saved in: ``.double()`` makes it so in
        float64. In half precision it is computed in float32; for a stream that is wider, in that of the stream, at the
        cost of another matrix exponential in each direction.

    Example:
        >>> import torch, invfunc as inv
        >>> layer, x = inv.nn.OrthogonalLinear(3, 3, bias=False), torch.ones(1, 3)
        >>> torch.allclose(layer(x).norm(), x.norm())
        True
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        dtype = dtype or torch.get_default_dtype()
        super().__init__(in_features, out_features, bias, device, at_least(dtype))
        nn.init.orthogonal_(self.weight)
        parametrizations.orthogonal(self, "weight")
        self._rotation.register_forward_pre_hook(_widen)
        self._rotation.register_load_state_dict_post_hook(_sharpen)
        self.to(dtype)

    @property
    def _rotation(self) -> Any:
        """Torch's parametrization: its buffer ``base`` times a rotation by the parameter."""
        return self.get_submodule("parametrizations.weight.0")

    def make(self) -> Invertible:
        with without_autocast(self._rotation.base.device.type):
            made: Any = self.get_submodule("parametrizations.weight")
            make = partial(_rotation_in_dtype_of, self._rotation, made.original)
            op = orthogonal_by(make, self.weight, self.bias)
        assert isinstance(op, Pair)
        return replace(op, pullback_fn=None)  # a pullback tells gradients of the weight alone, not of what made it

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before = self._rotation.base
        super()._apply(fn, recurse)
        after = self._rotation.base
        if after.dtype != before.dtype:
            self._rotation.base = before.to(after.device, at_least(after.dtype))
            _sharpen(self._rotation)
        return self


def _rotation_in_dtype_of(rotation: Any, parameter: Tensor, weight: Tensor) -> Tensor:
    """The weight, orthogonal in the dtype that it was brought to: made anew where that is wider than its own."""
    if at_least(weight.dtype) == rotation.base.dtype:
        return weight
    base = {"base": _sharp(rotation.base.to(weight.dtype))}
    return torch.func.functional_call(rotation, base, parameter.to(weight.dtype))


def _widen(rotation: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """There is no matrix exponential in half precision, and a rotation that is rounded to it is none."""
    return inputs[0].to(at_least(inputs[0].dtype))


@torch.no_grad()
def _sharpen(rotation: Any, incompatible: Any = None) -> None:
    """Make a base that was orthogonal in a narrower dtype, or is one from a state dict, orthogonal in its own."""
    base = rotation.base
    apart = base.mH @ base - torch.eye(len(base), dtype=base.dtype, device=base.device)
    if not base.is_meta and apart.abs().max() > 10 * len(base) * torch.finfo(base.dtype).eps:
        rotation.base = _sharp(base)


def _sharp(base: Tensor) -> Tensor:
    """The orthogonal matrix near one that is almost so."""
    q, r = torch.linalg.qr(base)
    return q * r.diagonal().sgn()


class LULinear(Layer):
    """A square linear map by its LU factors: its inverse and its log-determinant need no factorisation.

    Args:
        features: The size of the last dimension.
        bias: Whether to add one.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        lower: What is below its diagonal is that of L.
        upper: What is above its diagonal is that of U.
        log_diagonal: The logarithm of the magnitude of U's diagonal, whose signs and rows' order stay as they were.

    Example:
        >>> import torch, invfunc as inv
        >>> layer, x = inv.nn.LULinear(3), torch.ones(1, 3)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True

    Source:
        Kingma and Dhariwal, Glow (2018): it starts from a random orthogonal matrix.
    """

    lower: Tensor
    upper: Tensor
    bias: Tensor | None
    sign: Tensor
    order: Tensor

    def __init__(self, features: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.features = features
        kind = {"device": device, "dtype": dtype}
        for name in ("lower", "upper"):
            self.register_parameter(name, nn.Parameter(torch.empty(features, features, **kind)))
        self.log_diagonal = nn.Parameter(torch.empty(features, **kind))
        self.register_parameter("bias", nn.Parameter(torch.empty(features, **kind)) if bias else None)
        self.register_buffer("sign", torch.empty(features, **kind))
        self.register_buffer("order", torch.empty(features, dtype=torch.long, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start from a random orthogonal matrix, and no bias."""
        start = nn.init.orthogonal_(torch.empty_like(self.lower, dtype=at_least(self.lower.dtype)))
        permutation, lower, upper = torch.linalg.lu(start)
        self.lower.copy_(lower.tril(-1))
        self.upper.copy_(upper.triu(1))
        self.log_diagonal.copy_(upper.diagonal().abs().log())
        self.sign.copy_(upper.diagonal().sign())
        self.order.copy_(permutation.argmax(1))
        if self.bias is not None:
            self.bias.zero_()

    def make(self) -> Invertible:
        dtype = at_least(self.upper.dtype)
        upper = self.upper.to(dtype).triu(1) + self.log_diagonal.to(dtype).diag()
        order = self.order.long()  # `nn.Module.type` casts whole numbers, too
        return lu_by(upper, self.sign, self.lower, order, self.bias)

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(filter(None, [f"{self.features}, bias={self.bias is not None}", super().extra_repr()]))


# ---- convolutions ----------------------------------------------------------------------------------------------------


class _Conv(Layer):
    """What the three convolutions share; `invfunc.ops.conv2d` has the mathematics."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    kernel_size: tuple[int, ...]
    groups: int
    padding_mode: Any
    _op: Callable[..., Invertible]
    ceil_mode: bool
    patchwise: bool

    def _check(self, ceil_mode: bool, patchwise: bool) -> None:
        self.ceil_mode, self.patchwise = ceil_mode, patchwise
        name = type(self).__name__
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            raise OptionError(f"{name}: padding={self.padding!r}, {self.padding_mode}", expected="a number of zeros")
        if any(d != 1 and k != 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)):
            raise OptionError(f"{name}: dilation is {self.dilation}", expected="1: in its gaps, elements would be lost")
        self.make()  # its errors now

    def make(self) -> Invertible:
        return type(self)._op(
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            ceil_mode=self.ceil_mode,
            patchwise=self.patchwise,
        )

    @property
    def reversible(self) -> bool:
        """Whether nothing is padded, patches tile, and there are as many outputs as inputs in each."""
        square = self.weight.shape[0] == self.weight.shape[1:].numel() * self.groups
        return square and self.stride == self.kernel_size and not (self.ceil_mode or any(map(int, self.padding)))

    def extra_repr(self) -> str:
        """The options."""
        given = {"ceil_mode": self.ceil_mode, "patchwise": self.patchwise}
        changed = [f"{k}={v}" for k, v in given.items() if v == (k == "ceil_mode")]
        return ", ".join([super().extra_repr(), *changed])


class Conv1d(_Conv, nn.Conv1d):
    """`torch.nn.Conv1d` that can be undone; all of `Conv2d` holds in one dimension.

    Args:
        in_channels: See `Conv2d`.
        out_channels: See `Conv2d`.
        kernel_size: See `Conv2d`.
        stride: See `Conv2d`.
        padding: See `Conv2d`.
        dilation: See `Conv2d`.
        groups: See `Conv2d`.
        bias: See `Conv2d`.
        padding_mode: See `Conv2d`.
        device: See `Conv2d`.
        dtype: See `Conv2d`.
        ceil_mode: See `Conv2d`.
        patchwise: See `Conv2d`.

    Example:
        >>> import torch, invfunc as inv
        >>> inv.nn.Conv1d(3, 6, 2, stride=2)(torch.ones(1, 3, 8)).shape
        torch.Size([1, 6, 4])
    """

    _op = staticmethod(ops.conv1d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: int | tuple[int] = 0,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        ceil_mode: bool = False,
        patchwise: bool = True,
    ) -> None:
        sizes = kernel_size, stride, padding, dilation
        rest: Any = groups, bias, padding_mode, device, dtype
        nn.Conv1d.__init__(self, in_channels, out_channels, *sizes, *rest)  # pyright: ignore[reportArgumentType]
        self._check(ceil_mode, patchwise)


class Conv2d(_Conv, nn.Conv2d):
    """`torch.nn.Conv2d` that can be undone, because its patches cover the input and none loses anything.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output: in each group at least as many as numbers in a patch of the input.
        kernel_size: The size of a patch.
        stride: From patch to patch; like the kernel, unless ``patchwise=False``, and never larger.
        padding: Zeros around the input.
        dilation: 1.
        groups: Groups of channels that do not meet.
        bias: Whether to add one.
        padding_mode: ``"zeros"``.
        device: Of the parameters.
        dtype: Of the parameters.
        ceil_mode: Pad inputs that patches do not cover, and crop in the inverse; otherwise they raise.
        patchwise: Insist on patches that tile. With False they may overlap, which costs more.

    Raises:
        OptionError: When the weight would lose something, or an option is not as above.
        WireError: By a call, when the patches do not cover the input.

    Example:
        >>> import torch, invfunc as inv
        >>> layer, x = inv.nn.Conv2d(3, 12, 2, stride=2), torch.ones(1, 3, 4, 4)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-3)
        True
    """

    _op = staticmethod(ops.conv2d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        ceil_mode: bool = False,
        patchwise: bool = True,
    ) -> None:
        sizes = kernel_size, stride, padding, dilation
        rest: Any = groups, bias, padding_mode, device, dtype
        nn.Conv2d.__init__(self, in_channels, out_channels, *sizes, *rest)  # pyright: ignore[reportArgumentType]
        self._check(ceil_mode, patchwise)


class Conv3d(_Conv, nn.Conv3d):
    """`torch.nn.Conv3d` that can be undone; all of `Conv2d` holds in three dimensions.

    Args:
        in_channels: See `Conv2d`.
        out_channels: See `Conv2d`.
        kernel_size: See `Conv2d`.
        stride: See `Conv2d`.
        padding: See `Conv2d`.
        dilation: See `Conv2d`.
        groups: See `Conv2d`.
        bias: See `Conv2d`.
        padding_mode: See `Conv2d`.
        device: See `Conv2d`.
        dtype: See `Conv2d`.
        ceil_mode: See `Conv2d`.
        patchwise: See `Conv2d`.

    Example:
        >>> import torch, invfunc as inv
        >>> inv.nn.Conv3d(1, 8, 2, stride=2)(torch.ones(1, 1, 4, 4, 4)).shape
        torch.Size([1, 8, 2, 2, 2])
    """

    _op = staticmethod(ops.conv3d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] = 0,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        ceil_mode: bool = False,
        patchwise: bool = True,
    ) -> None:
        sizes = kernel_size, stride, padding, dilation
        rest: Any = groups, bias, padding_mode, device, dtype
        nn.Conv3d.__init__(self, in_channels, out_channels, *sizes, *rest)  # pyright: ignore[reportArgumentType]
        self._check(ceil_mode, patchwise)


# ---- normalisation ---------------------------------------------------------------------------------------------------


class _BatchNorm(Layer):
    """What the three batch norms share; `invfunc.ops.batch_norm` has the mathematics.

    As in `torch.nn`: the gradient runs through the statistics, and the running ones move once a step.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    eps: float
    momentum: float | None
    track_running_stats: bool
    _torch_class: Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self._torch_class.__init__(self, num_features, eps, momentum, affine, track_running_stats, device, dtype)

    def make(self) -> Invertible:
        affine = self.weight, self.bias
        by_batch = self.training or self.running_mean is None
        moves = self.training and self.track_running_stats
        running = (self.running_mean, self.running_var) if moves or not by_batch else (None, None)
        op = ops.batch_norm(*affine, *running, training=by_batch, momentum=self._factor(), eps=self.eps)
        assert isinstance(op, Pair)
        return replace(op, forward_fn=_Counted(self, op.forward_fn, moves), label=type(self).__name__)

    def _factor(self) -> float:
        """How far the statistics will move: for a cumulative average, the part of this batch among all."""
        if self.momentum is not None or self.num_batches_tracked is None:
            return self.momentum or 0.0
        return 1.0 / (int(self.num_batches_tracked) + 1)


@dataclass(frozen=True, eq=False)
class _Counted:
    """The forward function of a batch norm, which counts its batches."""

    module: _BatchNorm
    fn: Callable[..., Any]
    counts: bool

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The op's function, and the module whose counter it moves."""
        return self.fn, self.module

    def __call__(self, x: Tensor) -> Any:
        _torch.check_input_dim(self.module, x)
        if self.counts and self.module.num_batches_tracked is not None:
            self.module.num_batches_tracked.add_(1)
        return self.fn(x)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` that can be undone; see `BatchNorm2d`.

    Example:
        >>> import torch, invfunc as inv
        >>> inv.nn.BatchNorm1d(3)(torch.randn(4, 3)).shape
        torch.Size([4, 3])
    """

    _torch_class = nn.BatchNorm1d


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that can be undone: constructor, gradient and running statistics are the same.

    In training the inverse needs the statistics of the batch. A pipeline keeps them, two numbers a channel; to undo the
    module on its own, put it in eval mode.

    Args:
        num_features: The number of channels.
        eps: Added to the variance.
        momentum: How far the running statistics move; None for a cumulative average.
        affine: Whether to have a weight and a bias.
        track_running_stats: Whether to have running statistics.
        device: Of the parameters.
        dtype: Of the parameters.

    Limits:
        A weight of 0 can not be undone.

    Raises:
        NotInvertibleError: When the inverse is called in training mode.

    Example:
        >>> import torch, invfunc as inv
        >>> layer, x = inv.nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
        >>> layer(x).sum().backward()
        >>> layer.eval().num_batches_tracked
        tensor(1)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True
    """

    _torch_class = nn.BatchNorm2d


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` that can be undone; see `BatchNorm2d`.

    Example:
        >>> import torch, invfunc as inv
        >>> inv.nn.BatchNorm3d(3)(torch.randn(4, 3, 2, 2, 2)).shape
        torch.Size([4, 3, 2, 2, 2])
    """

    _torch_class = nn.BatchNorm3d


# ---- shape -----------------------------------------------------------------------------------------------------------


class Identity(Layer, nn.Identity):
    """`torch.nn.Identity`, for any number of inputs.

    Args:
        args: Ignored.
        kwargs: Ignored.

    Example:
        >>> import invfunc as inv
        >>> inv.nn.Identity()(1, 2)
        (1, 2)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        nn.Identity.__init__(self)

    def make(self) -> Invertible:
        return chain()


class PixelShuffle(Layer, nn.PixelShuffle):
    """`torch.nn.PixelShuffle` in any number of dimensions: channels become blocks of neighbours.

    Args:
        upscale_factor: The size of a block: a number, or one for each of the last dimensions.
        channels_first: Whether the channel varies slowest in the packed ones, as in torch, or fastest.

    Raises:
        WireError: When the channels do not divide.

    Example:
        >>> import torch, invfunc as inv
        >>> inv.nn.PixelShuffle(2)(torch.zeros(1, 12, 2, 3)).shape
        torch.Size([1, 3, 4, 6])
    """

    def __init__(self, upscale_factor: int | Sequence[int], channels_first: bool = True) -> None:
        nn.PixelShuffle.__init__(self, upscale_factor)  # pyright: ignore[reportArgumentType]
        self.channels_first = channels_first
        self.make()

    def make(self) -> Invertible:
        return ops.pixel_shuffle(self.upscale_factor, self.channels_first)


class PixelUnshuffle(Layer, nn.PixelUnshuffle):
    """`torch.nn.PixelUnshuffle` in any number of dimensions: blocks of neighbours become channels.

    Args:
        downscale_factor: The size of a block: a number, or one for each of the last dimensions.
        channels_first: Whether the channel varies slowest in the packed ones, as in torch, or fastest.

    Raises:
        WireError: When the sizes do not divide.

    Example:
        >>> import torch, invfunc as inv
        >>> inv.nn.PixelUnshuffle(2)(torch.zeros(1, 3, 4, 6)).shape
        torch.Size([1, 12, 2, 3])
    """

    def __init__(self, downscale_factor: int | Sequence[int], channels_first: bool = True) -> None:
        nn.PixelUnshuffle.__init__(self, downscale_factor)  # pyright: ignore[reportArgumentType]
        self.channels_first = channels_first
        self.make()

    def make(self) -> Invertible:
        return ops.pixel_unshuffle(self.downscale_factor, self.channels_first)


class Flatten(Layer, nn.Flatten):
    """`torch.nn.Flatten` that can be undone.

    Args:
        start_dim: The first dimension to flatten.
        end_dim: The last.
        dims: Their sizes, if they are known: the inverse then needs nothing else. Otherwise a pipeline keeps them, and
            the module can not be undone on its own.

    Raises:
        NotInvertibleError: When the inverse is called without ``dims``.

    Example:
        >>> import torch, invfunc as inv
        >>> layer = inv.nn.Flatten(dims=(3, 4))
        >>> layer.inverse(layer(torch.zeros(2, 3, 4))).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1, dims: Sequence[int] | None = None) -> None:
        nn.Flatten.__init__(self, start_dim, end_dim)
        self.dims = dims

    def make(self) -> Invertible:
        return ops.flatten(self.start_dim, self.end_dim, self.dims)


class Pad(Layer):
    """Pads as `torch.nn.functional.pad`; the inverse crops.

    Args:
        padding: How much before and after, for the last dimension, then the one before it, ...; or give it in the call.
        mode: ``"constant"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        value: What a constant is padded with.

    Raises:
        OptionError: When no amounts are given, or not as above.

    Example:
        >>> import torch, invfunc as inv
        >>> layer = inv.nn.Pad([1, 2])
        >>> layer(torch.ones(1, 3))
        tensor([[0., 1., 1., 1., 0., 0.]])
        >>> layer.inverse(layer(torch.ones(1, 3)))
        tensor([[1., 1., 1.]])
        >>> inv.nn.Pad.multiple((5, 8), (4, 4))
        (0, 0, 1, 2)
    """

    def __init__(self, padding: Sequence[int] | None = None, mode: str = "constant", value: float = 0.0) -> None:
        super().__init__()
        self.padding, self.mode, self.value = padding, mode, value
        if isinstance(padding, str):
            raise OptionError(f"Pad: padding is {padding!r}", expected="amounts", cure=f"Pad(mode={padding!r})")
        if padding is not None:
            self.make()

    def make(self) -> Invertible:
        if self.padding is None:
            raise OptionError("Pad: no padding", expected="amounts", cure="Pad([1, 1]), or module(x, [1, 1])")
        return ops.pad(self.padding, self.mode, self.value)

    def forward(self, x: Tensor, pad: Sequence[int] | None = None) -> Tensor:
        """``pad(x)``, by the amounts of this call or of the module."""
        return self._lowered(self.build() if pad is None else ops.pad(pad, self.mode, self.value))(x)

    def inverse(self, y: Tensor, pad: Sequence[int] | None = None) -> Tensor:
        """``crop(y)``, by the amounts of this call or of the module."""
        return self._lowered(self.build() if pad is None else ops.pad(pad, self.mode, self.value)).inverted()(y)

    @property
    def reversible(self) -> bool:
        """No: cropping loses what is cropped."""
        return False

    @staticmethod
    def multiple(size: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
        """How much to pad, so that the sizes become multiples: half before, the rest after.

        Args:
            size: The sizes of the last dimensions.
            stride: What shall divide them.
        """
        return missing(size, stride, stride, (0,) * len(size))

    def extra_repr(self) -> str:
        """The options."""
        shown = [f"{self.padding}"] * (self.padding is not None) + [f"mode={self.mode!r}"] * (self.mode != "constant")
        return ", ".join(filter(None, [*shown, super().extra_repr()]))


# ---- splines ---------------------------------------------------------------------------------------------------------


class SplineCoupling(Coupling):
    """A `Coupling` whose law is a monotone rational-quadratic spline on each element.

    Args:
        f: Returns ``3 * bins - 1`` channels for each channel of its partner.
        g: Likewise; without it, the second half passes untouched.
        bins: How many bins the interval has.
        interval: Where the knots are; elements beyond it pass untouched.
        sizes: See `Coupling`.
        dim: The dimension of the channels, which is split.
        interleaved: See `Coupling`.
        options: Those of `invfunc.checkpoint`.

    Raises:
        WireError: When f or g returns another number of channels.

    Example:
        >>> import torch, invfunc as inv
        >>> layer, x = inv.nn.SplineCoupling(torch.nn.Linear(2, 2 * 11), bins=4), torch.randn(5, 4)
        >>> torch.allclose(layer.inverse(layer(x)), x, atol=1e-5)
        True

    Source:
        Durkan et al., Neural spline flows (2019).
    """

    def __init__(
        self,
        f: Callable[..., Any],
        g: Callable[..., Any] | None = None,
        *,
        bins: int = 8,
        interval: tuple[float, float] = (-3.0, 3.0),
        sizes: Any = 2,
        dim: int = 1,
        interleaved: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(f, g, sizes=sizes, dim=dim, interleaved=interleaved, **options)
        self.bins, self.interval = bins, interval

    def couple(self) -> Invertible:
        return ops.spline_couple(self.f, self.g, bins=self.bins, dim=self.dim, interval=self.interval)
