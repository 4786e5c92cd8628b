"""Normalisation of channels: actnorm, with its initialisation as a function, and an invertible batch norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _torch
from ..core.couple import match
from ..core.op import Invertible, pair
from ..core.precision import at_least, check_real, exactly
from ..debug import require
from ..errors import OptionError, WireError
from ..wires import describe
from .shape import check_nonzero, check_size, check_tensor, meeting, per_position, reach, sum_but


def _check_vectors(subject: str, **vectors: Tensor | None) -> None:
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    sizes = [vector.shape for vector in given.values()]
    if any([len(size) != 1 or size != sizes[0] for size in sizes]):  # and no set: a tracer's sizes are tensors
        shapes = ", ".join(f"{name} {describe(vector)}" for name, vector in given.items())
        raise OptionError(f"{subject}: {shapes}", expected="vectors (C,) of one size")


# ---- actnorm ---------------------------------------------------------------------------------------------------


def _actnorm(log_scale: Tensor, bias: Tensor, dim: int, x: Tensor) -> Tensor:
    check_size("actnorm", x, dim, len(log_scale))
    return exactly(partial(_scaled, dim), x, log_scale, bias)


def _scaled(dim: int, x: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    return x * meeting(log_scale.exp(), x, dim) + meeting(bias, x, dim)


def _undo_actnorm(log_scale: Tensor, bias: Tensor, dim: int, y: Tensor) -> Tensor:
    check_size("the inverse of actnorm", y, dim, len(log_scale))
    return exactly(partial(_unscaled, dim), y, log_scale, bias)


def _unscaled(dim: int, y: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    return (y - meeting(bias, y, dim)) * meeting((-log_scale).exp(), y, dim)


def _pull_actnorm(log_scale: Tensor, bias: Tensor, dim: int, y: Tensor, gy: Tensor) -> Any:
    """The derivative of y by the logarithm of the scale is y - b."""
    dtype = at_least(y.dtype, log_scale.dtype, bias.dtype)
    wide, (s, b) = gy.to(dtype), (vector.to(dtype) for vector in (log_scale, bias))
    scaled = y - meeting(b, y, dim)
    x, gx = (scaled * meeting((-s).exp(), y, dim)).to(y.dtype), wide * meeting(s.exp(), y, dim)
    glog_scale, gbias = match(sum_but(wide * scaled, dim), log_scale), match(sum_but(wide, dim), bias)
    return x, gx.to(gy.dtype), [(log_scale, glog_scale), (bias, gbias)]


def _log_det_actnorm(log_scale: Tensor, dim: int, x: Tensor, y: Tensor) -> Tensor:
    return per_position(log_scale.to(at_least(log_scale.dtype, x.dtype)).sum(), x, dim)


def actnorm(log_scale: Tensor, bias: Tensor, dim: int = 1) -> Invertible:
    r"""Scale and shift each channel.

    .. math:: y_c = e^{s_c} x_c + b_c, \qquad x_c = e^{-s_c} (y_c - b_c),
        \qquad \log|\det J| = n_{positions} \sum_c s_c

    Args:
        log_scale: (C,), the logarithm s of the scale: whatever it is, the op can be undone.
        bias: (C,).
        dim: The dimension of the channels.

    Shapes:
        ``(N, C, ...) -> (N, C, ...)``, floating-point; computed in the widest dtype of x, scale and bias, and at least
        in float32.

    Domain:
        All of it, onto all of it.

    Cost:
        Elementwise in both directions. Lowered, nothing is kept, and the gradients are read off the output.

    Raises:
        OptionError: When scale and bias are not vectors of one size.
        WireError: When the channels are of another number.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> log_scale, bias = actnorm_init(x)
        >>> actnorm(log_scale, bias)(x)
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]])

    Source:
        Kingma and Dhariwal, Glow (2018).
    """
    _check_vectors("actnorm", log_scale=log_scale, bias=bias)
    static = log_scale, bias, dim
    return pair(
        partial(_actnorm, *static),
        partial(_undo_actnorm, *static),
        pullback=partial(_pull_actnorm, *static),
        log_det=partial(_log_det_actnorm, log_scale, dim),
        name="actnorm(log_scale, bias)",
    )


def actnorm_init(x: Tensor, dim: int = 1, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    r"""The ``(log_scale, bias)`` for which `actnorm` gives each channel of a batch mean 0 and variance 1.

    .. math:: s_c = -\log(\sigma_c + \epsilon), \qquad b_c = -\mu_c e^{s_c}

    A channel that is constant up to rounding, as every channel of a batch of one vector is, tells no scale: its s is 0,
    so that actnorm centres it. So is one whose standard deviation is at most :math:`8 \epsilon_{dtype} |\mu_c|`, or
    below the smallest normal number; the dtype is that of x, and at least float32. In any other channel the variance is
    1 up to rounding, however small its numbers are.

    Args:
        x: The batch, as it arrives at the op.
        dim: The dimension of the channels.
        eps: Added to the standard deviation: 1 / eps bounds the scale of channels that vary little, whose variance is
            then below 1.

    Shapes:
        ``(N, C, ...) -> (C,), (C,)``, in the dtype of x, and at least in float32, without gradients: wrap them in
        parameters.

    Raises:
        WireError: When x lacks the dimension, is empty, or has no real numbers.
        DomainError: Under ``inv.debug(True)``, when a value of x is not finite.

    Example:
        >>> import torch
        >>> log_scale, bias = map(torch.nn.Parameter, actnorm_init(torch.randn(8, 3, 4, 4)))
        >>> log_scale.shape
        torch.Size([3])

    Source:
        Salimans and Kingma, data-dependent initialisation (2016); Glow (2018).
    """
    check_channels(x, dim)
    require("actnorm_init", x, torch.isfinite, "finite numbers")
    if not x.numel():
        raise WireError("actnorm_init: the batch", expected="a value or more in each channel", got=describe(x))
    return start_of(x, dim, at_least(x.dtype), torch.positive, eps)


def check_channels(x: Any, dim: int) -> None:
    """Raise unless x is a batch of real numbers with channels."""
    check_tensor("actnorm_init", x, max(2, reach(dim)))
    check_real("actnorm_init: the input", x)


@torch.no_grad()
def start_of(
    x: Tensor, dim: int, dtype: torch.dtype, total: Callable[[Tensor], Tensor], eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`actnorm_init` in a dtype; ``total`` adds a tensor up over the processes that share the batch."""
    values = x.detach().to(at_least(x.dtype)).movedim(dim, 0).flatten(1)
    count = total(values.new_full((), values.shape[1]))
    mean = total(values.sum(1)) / count
    apart, limits = values - mean[:, None], torch.finfo(values.dtype)
    size = (total(apart.abs().sum(1)) / count).clamp_min(
        limits.tiny
    )  # in its units no square rounds to 0, or overflows
    deviation = size * (total((apart / size[:, None]).square().sum(1)) / count).sqrt()
    is_constant = (deviation <= 8 * limits.eps * mean.abs()) | (deviation < limits.tiny)
    log_scale = -(deviation + eps).log().masked_fill(is_constant, 0).to(dtype)
    return log_scale, (-mean * log_scale.to(values.dtype).exp()).to(dtype)


# ---- batch norm ------------------------------------------------------------------------------------------------


class Statistics(nn.Module):
    """The caller's running statistics, in slots: what a call writes into a slot moves once, whatever runs again."""

    mean: Tensor  # or None, where there are none
    variance: Tensor

    def __init__(self, mean: Tensor | None, variance: Tensor | None, training: bool) -> None:
        super().__init__()
        self.training = training
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)

    @contextmanager
    def written_in(self, dtype: torch.dtype) -> Iterator[list[Any]]:
        """The two in the dtype of a kernel that writes them."""
        own = self.mean, self.variance
        lent = [vector if vector is None or vector.dtype == dtype else vector.to(dtype) for vector in own]
        yield lent
        for vector, written in zip(own, lent, strict=True):
            if vector is not None and vector.dtype != dtype:
                vector.copy_(written)


class Affine(NamedTuple):
    """What follows the normalisation, for each channel."""

    weight: Tensor | None
    bias: Tensor | None

    def closed(self, *gradients: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The gradients of those that there are."""
        pairs = zip(self, gradients, strict=True)
        return [(tensor, match(gradient, tensor)) for tensor, gradient in pairs if tensor is not None]


def _cast(affine: Affine, dtype: torch.dtype) -> Affine:
    """The same in another dtype."""
    weight, bias = (None if vector is None else vector.to(dtype) for vector in affine)
    return Affine(weight, bias)


def _check_batch(x: Any, statistics: Statistics, affine: Affine) -> None:
    check_tensor("batch_norm", x, 2)
    for vector in (*affine, statistics.mean):
        if vector is not None:
            check_size("batch_norm", x, 1, len(vector))


def _normalise(
    statistics: Statistics, affine: Affine, momentum: float, eps: float, x: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """By the statistics of the batch, which are the residue: the mean, and 1 over the standard deviation."""
    _check_batch(x, statistics, affine)
    if x.numel() // x.shape[1] < 2:
        raise WireError("batch_norm: the input", expected="two values or more in each channel", got=describe(x))
    dtype = at_least(x.dtype)
    with statistics.written_in(dtype) as (mean, variance):
        y, *found = torch.native_batch_norm(x, *_cast(affine, dtype), mean, variance, True, momentum, eps)
    wanted = torch.is_grad_enabled() and not _torch.is_tracing()  # a trace is compared with one without gradients
    return y, _of_batch(x, eps) if wanted else (found[0], found[1])


def _of_batch(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The statistics as functions of x: those that the kernel returns have no gradient."""
    values = x.to(at_least(x.dtype))
    dims = [dim for dim in range(x.dim()) if dim != 1]
    mean = values.mean(dims)
    variance = (values - meeting(mean, x)).square().mean(dims)  # torch.var_mean takes twice the time
    return mean, (variance + eps).rsqrt()


def _denormalise(affine: Affine, kept: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    mean, inverse_deviation = kept
    check_size("the inverse of batch_norm", y, 1, len(mean))
    weight, bias = _cast(affine, at_least(y.dtype))  # below an autograd Function, Dynamo knows no names of a tuple
    factor = 1 / inverse_deviation
    if weight is not None:
        _check_weight(weight)
        factor = factor / weight
    shifted = y if bias is None else y - meeting(bias, y)
    return (shifted * meeting(factor, y) + meeting(mean, y)).to(y.dtype)


def _check_weight(weight: Tensor) -> None:
    check_nonzero("batch_norm", weight, "a weight that is nowhere 0", "clamp its magnitude")


def _pull_normalise(affine: Affine, eps: float, kept: tuple[Tensor, Tensor], y: Tensor, gy: Tensor) -> Any:
    """The gradient through the statistics too, by the same kernel as `torch.nn.BatchNorm2d`'s; forward does not run."""
    x = _denormalise(affine, kept, y)
    gx, gweight, gbias = torch.ops.aten.native_batch_norm_backward(
        gy, x, _cast(affine, at_least(x.dtype))[0], None, None, *kept, True, eps, [True, True, True]
    )
    return x, gx, affine.closed(gweight, gbias)


def _log_det_normalise(affine: Affine, eps: float, x: Tensor, y: Tensor) -> Tensor:
    return _log_det_affine(affine, _of_batch(x, eps)[1], x)


def _log_det_affine(affine: Affine, inverse_deviation: Tensor, x: Tensor) -> Tensor:
    log_scale = inverse_deviation.log()
    weight, _ = affine
    if weight is not None:
        _check_weight(weight)
        log_scale = log_scale + weight.to(at_least(x.dtype)).abs().log()
    return per_position(log_scale.sum(), x, 1)


def _apply(statistics: Statistics, affine: Affine, eps: float, x: Tensor) -> Tensor:
    """By the running statistics: elementwise."""
    _check_batch(x, statistics, affine)
    _check_variance(statistics.variance)
    dtype = at_least(x.dtype)
    running = statistics.mean.to(dtype), statistics.variance.to(dtype)
    return torch.batch_norm(x, *_cast(affine, dtype), *running, False, 0.0, eps, False)


def _check_variance(variance: Tensor) -> None:
    require("batch_norm", variance, torch.ge, "a running_var that is nowhere negative", "", 0)


def _fixed(statistics: Statistics, eps: float, like: Tensor) -> tuple[Tensor, Tensor]:
    _check_variance(statistics.variance)
    mean, variance = (vector.to(at_least(like.dtype)) for vector in (statistics.mean, statistics.variance))
    return mean, (variance + eps).rsqrt()


def _undo_apply(statistics: Statistics, affine: Affine, eps: float, y: Tensor) -> Tensor:
    return _denormalise(affine, _fixed(statistics, eps, y), y)


def _log_det_apply(statistics: Statistics, affine: Affine, eps: float, x: Tensor, y: Tensor) -> Tensor:
    return _log_det_affine(affine, _fixed(statistics, eps, x)[1], x)


def batch_norm(
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Invertible:
    r"""Batch normalisation of channels, as `torch.nn.functional.batch_norm`, that can be undone.

    .. math:: y_c = w_c \frac{x_c - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + b_c, \qquad
        \log|\det J| = n_{positions} \sum_c \log \frac{|w_c|}{\sqrt{\sigma_c^2 + \epsilon}}

    In training the statistics are those of the batch, and the inverse needs them: they are the residue. The gradient
    runs through them, as that of `torch.nn.BatchNorm2d` does.

    Args:
        weight: (C,), nowhere 0, or None for 1.
        bias: (C,), or None for 0.
        running_mean: (C,), or None. A training call moves it in place, once, lowered or not.
        running_var: (C,), or None; likewise.
        training: Normalise by the batch rather than by the running statistics; always so without running statistics.
        momentum: How far the running statistics move.
        eps: Added to the variance.

    Shapes:
        ``(N, C, ...) -> (N, C, ...)``, real; in training, with two values or more in each channel. The vectors may be
        of any real dtype: all is computed in that of x, and at least in float32.

    Domain:
        All of it, onto all of it without training.

    Cost:
        The inverse is elementwise. Lowered, two numbers for each channel are kept in training; backward runs forward
        once more, and below a `torch.func` transform only the kernel of batch norm's own gradient.

    Limits:
        The log-determinant in training is that with the statistics held fixed, as flows use it. So is, lowered below a
        `torch.func` transform, the gradient of a gradient by x: mark the op ``"recompute"`` for that. A weight near 0
        loses its channel to rounding. ``torch.vmap`` can not write running statistics.

    Raises:
        OptionError: When the vectors are of different sizes, or only one of the running statistics is given.
        WireError: When the input has other channels, or one value in each.
        NotInvertibleError: When an inverse without the residue is asked of an op that trains.
        DomainError: Under ``inv.debug(True)``, when a weight is 0 (by the inverse and the log-determinant), or a
            running variance is negative.

    Example:
        >>> import torch
        >>> bn, x = torch.nn.BatchNorm1d(3), torch.randn(8, 3)
        >>> op = batch_norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, training=bn.training)
        >>> y, kept = op.forward_with_residue(x)
        >>> torch.allclose(op.inverse_with_residue(kept, y), x, atol=1e-5)
        True

    Source:
        Ioffe and Szegedy (2015); in flows: Dinh et al., Real NVP (2017). InvTorch's ``BatchNorm2d``.
    """
    _check_vectors("batch_norm", weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if (running_mean is None) != (running_var is None):
        raise OptionError("batch_norm: one of the running statistics", expected="both, or neither")
    statistics, affine = Statistics(running_mean, running_var, training), Affine(weight, bias)
    given = "weight, " * (weight is not None) + "bias, " * (bias is not None)
    label = f"batch_norm({given}training={training})"
    if training or running_mean is None:
        return pair(
            partial(_normalise, statistics, affine, momentum, eps),
            partial(_denormalise, affine),
            pullback=partial(_pull_normalise, affine, eps),
            log_det=partial(_log_det_normalise, affine, eps),
            residue=True,
            name=label,
        )
    static = statistics, affine, eps
    return pair(
        partial(_apply, *static),
        partial(_undo_apply, *static),
        log_det=partial(_log_det_apply, *static),
        name=label,
    )
