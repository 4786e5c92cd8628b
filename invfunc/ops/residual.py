"""Residual networks made reversible: two streams, of which one function changes one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.combine import swap
from ..core.couple import Half, additive, couple, match, sum_per_sample
from ..core.op import Invertible, chain, name_of, named, one_way, pair
from ..core.precision import at_least
from ..errors import OptionError, WireError, check_option
from ..wires import describe
from .embedding import embedding
from .shape import check_nonzero, check_size, no_log_det

# ---- laws ----------------------------------------------------------------------------------------------------------


def _check_gamma(gamma: float | Tensor) -> None:
    if isinstance(gamma, Tensor):
        check_nonzero("momentum's gamma", gamma, "a gamma that is nowhere 0", "train its logit: gamma = raw.sigmoid()")


def _widened(gamma: float | Tensor, like: Tensor) -> float | Tensor:
    """1 - gamma would be coarse in half precision."""
    return gamma.to(at_least(gamma.dtype, like.dtype)) if isinstance(gamma, Tensor) else gamma


def _to_blend(gamma: float | Tensor, t: Tensor, v: Tensor) -> Tensor:
    _check_gamma(gamma)
    gamma = _widened(gamma, v)
    return (gamma * v + (1 - gamma) * t).to(torch.promote_types(v.dtype, t.dtype))


def _unblend(gamma: float | Tensor, t: Tensor, y: Tensor) -> Tensor:
    _check_gamma(gamma)
    gamma = _widened(gamma, y)
    return ((y - (1 - gamma) * t) / gamma).to(torch.promote_types(y.dtype, t.dtype))


def _pull_blend(gamma: float, t: Tensor, y: Tensor, gy: Tensor) -> Any:
    return _unblend(gamma, t, y), gamma * gy, [(t, match((1 - gamma) * gy, t))]


def _blend_log_det(gamma: float | Tensor, v: Tensor, y: Tensor) -> Tensor:
    gamma = torch.as_tensor(gamma, dtype=at_least(v.dtype), device=v.device)
    return sum_per_sample(gamma.abs().log().expand(v.shape))


def blend(gamma: float | Tensor, t: Tensor) -> Invertible:
    """The law ``v -> gamma v + (1 - gamma) t``."""
    to, fro, log_det = partial(_to_blend, gamma, t), partial(_unblend, gamma, t), partial(_blend_log_det, gamma)
    pull = None if isinstance(gamma, Tensor) else partial(_pull_blend, gamma, t)
    return pair(to, fro, pullback=pull, log_det=log_det, name=f"blend({_number(gamma)}, t)")


def _to_overwrite(t: Tensor, v: Tensor) -> Any:
    return t.expand(v.shape), v


def _restore(residue: Tensor, y: Tensor) -> Tensor:
    return residue


def overwrite(t: Tensor) -> Invertible:
    """The law ``v -> t``, which keeps v."""
    return pair(partial(_to_overwrite, t), _restore, residue=True, name="overwrite(t)")


def _to_reflect(t: Tensor, x: Tensor) -> Tensor:
    return t - x


def _pull_reflect(t: Tensor, y: Tensor, gy: Tensor) -> Any:
    return t - y, -gy, [(t, match(gy, t))]


def reflect(t: Tensor) -> Invertible:
    """The law ``x -> t - x``, its own inverse."""
    op = partial(_to_reflect, t)
    return pair(op, op, pullback=partial(_pull_reflect, t), log_det=no_log_det, name="reflect(t)")


def _number(value: float | Tensor) -> str:
    return describe(value) if isinstance(value, Tensor) else f"{value:g}"


# ---- position and velocity -----------------------------------------------------------------------------------------


def _same(v: Tensor, *given: Any) -> Tensor:
    return v


def momentum(fn: Callable[..., Any], gamma: float | Tensor = 0.9) -> Invertible:
    r"""A residual step with a velocity: the state is ``(x, v)``.

    .. math:: v' = \gamma v + (1 - \gamma) f(x), \quad x' = x + v' \qquad\Longleftrightarrow\qquad
              x = x' - v', \quad v = (v' - (1 - \gamma) f(x)) / \gamma

    Args:
        fn: The residual branch f, any callable or module.
        gamma: Between 0 and 1; a number, or a tensor that broadcasts to v and may be trained (and must not reach 0).
            At 0 this is the residual network ``x + f(x)``, and the velocity that enters is forgotten.

    Shapes:
        ``((N, ...), (N, ...))``, both of one shape, unchanged; floating dtypes.

    Domain:
        All of it, onto all of it. For ``gamma=0``, with its residue.

    Cost:
        The inverse evaluates f once. Lowered: nothing is kept but what f closes over; f is evaluated exactly twice in a
        training step. With ``gamma=0`` the incoming velocity is kept, one activation for each step, and
        ``inverse`` needs it: that is ordinary checkpointing.

    Log-determinant:
        :math:`\sum \log|\gamma|` over the elements of v; none for ``gamma=0``.

    Raises:
        OptionError: When a number gamma is not between 0 and 1.
        DomainError: Under ``inv.debug(True)``, when a gamma in a tensor is 0.

    Limits:
        Every inverse step divides by gamma: rounding in v grows as :math:`\gamma^{-depth}`, by 2e4 in 100 steps at 0.9.

    Example:
        >>> import torch
        >>> op = momentum(torch.sin, 0.5)
        >>> x, v = torch.ones(2), torch.zeros(2)
        >>> y = op(x, v)
        >>> y
        (tensor([1.4207, 1.4207]), tensor([0.4207, 0.4207]))
        >>> [bool(torch.allclose(a, b)) for a, b in zip(op.inverse(y), (x, v))]
        [True, True]

    Source:
        Sander et al., Momentum Residual Neural Networks (2021).
    """
    if not isinstance(gamma, Tensor):
        check_option("momentum: gamma", gamma, lambda gamma: 0 <= gamma <= 1, "a number between 0 and 1")
    forgets = not isinstance(gamma, Tensor) and gamma == 0
    law = overwrite if forgets else partial(blend, gamma)
    kick, drift = Half(fn, law, 1, "f"), Half(_same, additive, 0, "velocity")
    return named(chain(kick, drift), f"momentum({name_of(fn)}, {_number(gamma)})")


# ---- two positions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stepped:
    """``x -> step * fn(x)``."""

    fn: Callable[..., Any]
    step: float

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, *x: Any) -> Tensor:
        return self.step * self.fn(*x)

    @property
    def __name__(self) -> str:
        return name_of(self.fn)


def midpoint(fn: Callable[..., Any], step: float = 1.0) -> Invertible:
    r"""A two-step residual update by the explicit midpoint rule: the state is ``(previous x, x)``.

    .. math:: (x_{-}, x) \mapsto (x, x_{+}), \qquad x_{+} = x_{-} + 2 h f(x)

    Args:
        fn: The residual branch f, any callable or module.
        step: The step h.

    Shapes:
        ``((N, ...), (N, ...))``, both of one shape, unchanged; floating dtypes.

    Domain:
        All of it, onto all of it.

    Cost:
        The inverse, :math:`x_{-} = x_{+} - 2 h f(x)`, evaluates f once and amplifies nothing. Lowered: nothing is kept
        but what f closes over; f is evaluated exactly twice in a training step.

    Log-determinant:
        0.

    Limits:
        As an integrator of :math:`\dot x = f(x)` it is of second order, and stable only where the eigenvalues of f's
        Jacobian are imaginary.

    Example:
        >>> import torch
        >>> midpoint(torch.sin, 0.5)(torch.zeros(1), torch.ones(1))
        (tensor([1.]), tensor([0.8415]))

    Source:
        Chang et al., Reversible Architectures for Arbitrarily Deep Residual Neural Networks (2018); Gal et al.,
        Reversing Large Language Models for Efficient Training and Fine-Tuning (2025).
    """
    half = Half(Stepped(fn, 2.0 * step), additive, 0, "f")
    return named(chain(half, swap()), f"midpoint({name_of(fn)}, {step:g})")


@dataclass(frozen=True)
class Inertial:
    """``x -> 2 x + h^2 f(x)``: where a leapfrog step goes, before the previous position is subtracted."""

    fn: Callable[..., Any]
    step: float

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, x: Tensor, *given: Any) -> Tensor:
        force = self.fn(x, *given)
        if not isinstance(force, Tensor) or force.shape != x.shape:
            raise WireError(f"f returned {describe(force)}", expected=f"{describe(x)} like its input")
        return 2 * x + self.step**2 * force

    @property
    def __name__(self) -> str:
        return name_of(self.fn)


def leapfrog(fn: Callable[..., Any], step: float = 1.0) -> Invertible:
    r"""A two-step residual update of second order in time: the state is ``(previous x, x)``.

    .. math:: (x_{-}, x) \mapsto (x, x_{+}), \qquad x_{+} = 2 x - x_{-} + h^2 f(x)

    Args:
        fn: The force f, any callable or module.
        step: The step h.

    Shapes:
        ``((N, ...), (N, ...))``, both of one shape, unchanged; floating dtypes.

    Domain:
        All of it, onto all of it.

    Cost:
        The inverse is the same formula with :math:`x_{-}` and :math:`x_{+}` exchanged: f once, nothing amplified.
        Lowered: nothing is kept but what f closes over; f is evaluated exactly twice in a training step.

    Log-determinant:
        0.

    Raises:
        WireError: When f returns another shape than it was given.

    Limits:
        Stable only where the eigenvalues of :math:`h^2 \, \partial f` are real, from -4 to 0.

    Example:
        >>> import torch
        >>> leapfrog(torch.sin)(torch.zeros(1), torch.ones(1))
        (tensor([1.]), tensor([2.8415]))

    Source:
        Chang et al., Reversible Architectures for Arbitrarily Deep Residual Neural Networks (2018); Gal et al.,
        Reversing Large Language Models for Efficient Training and Fine-Tuning (2025).
    """
    half = Half(Inertial(fn, step), reflect, 0, "f")
    return named(chain(half, swap()), f"leapfrog({name_of(fn)}, {step:g})")


@dataclass(frozen=True, eq=False)
class Symmetric:
    """``x -> -K^T activation(K x + b)``: a layer whose Jacobian has no positive eigenvalue."""

    weight: Tensor
    bias: Tensor | None
    activation: Callable[[Tensor], Tensor]

    @property
    def functions(self) -> tuple[Any, ...]:
        """What this object closes over."""
        return (self.activation, self.weight, *([] if self.bias is None else [self.bias]))

    def __call__(self, x: Tensor) -> Tensor:
        dims = self.weight.dim() - 2
        check_size("hyperbolic", x, 1 if dims else -1, self.weight.shape[1])
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (self.weight, self.bias))
        return -self._apply(x.to(dtype), weight, bias, dims).to(x.dtype)

    def _apply(self, x: Tensor, weight: Any, bias: Tensor | None, dims: int) -> Tensor:
        if not dims:
            return F.linear(self.activation(F.linear(x, weight, bias)), weight.mT)
        padding = [size // 2 for size in weight.shape[2:]]
        hidden = self.activation(_CONV[dims](x, weight, bias, padding=padding))
        return _CONV_TRANSPOSE[dims](hidden, weight, padding=padding)

    @property
    def __name__(self) -> str:
        return f"symmetric{tuple(self.weight.shape)}"


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def hyperbolic(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    step: float = 1.0,
) -> Invertible:
    r"""A step of a hyperbolic network: a `leapfrog` whose force is a symmetric layer. The state is ``(previous x, x)``.

    .. math:: x_{+} = 2 x - x_{-} - h^2 K^\top \sigma(K x + b)

    Args:
        weight: K, of shape ``(hidden, features)`` for a linear map on the last dimension, or ``(hidden, channels,
            *kernel)`` for a convolution in 1 to 3 dimensions with padding ``kernel // 2``.
        bias: b, of shape ``(hidden,)``.
        activation: A nondecreasing function, so that the layer's Jacobian has no positive eigenvalue.
        step: The step h; the step is stable while :math:`h^2 \|K\|^2 < 4` for an activation with slope at most 1.

    Shapes:
        ``((N, features), (N, features))`` or ``((N, channels, ...), (N, channels, ...))``, of the weight's dtype.

    Domain:
        All of it, onto all of it.

    Cost:
        As `leapfrog`: K and its transpose are applied exactly twice each in a training step, and once in the inverse.

    Log-determinant:
        0.

    Raises:
        OptionError: When the weight has another number of dimensions than 2 to 5, or the bias does not fit it.
        WireError: When the input has other features or channels.

    Example:
        >>> import torch
        >>> op = hyperbolic(torch.eye(2))
        >>> op
        hyperbolic((2, 2), step=1)
        >>> op(torch.zeros(1, 2), torch.ones(1, 2))
        (tensor([[1., 1.]]), tensor([[1., 1.]]))

    Source:
        Lensink et al., Fully Hyperbolic Convolutional Neural Networks (2019); Ruthotto and Haber (2018).
    """
    if not isinstance(weight, Tensor) or not 2 <= weight.dim() <= 5:
        raise OptionError(f"hyperbolic: weight is {describe(weight)}", expected="(hidden, channels, *kernel)")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise OptionError("hyperbolic: the bias", expected=f"({len(weight)},)", got=describe(bias))
    layer = Symmetric(weight, bias, activation)
    return named(leapfrog(layer, step), f"hyperbolic({tuple(weight.shape)}, step={step:g})")


# ---- two functions ---------------------------------------------------------------------------------------------------


def hamiltonian(f: Callable[..., Any], g: Callable[..., Any], step: float = 1.0) -> Invertible:
    r"""A step of a Hamiltonian network, by the symplectic Euler rule: the state is ``(q, p)``.

    .. math:: q' = q + h\, f(p), \qquad p' = p + h\, g(q')

    Args:
        f: What moves q, such as attention: any callable or module.
        g: What moves p, such as a feed-forward net.
        step: The step h; at 1 it is ``couple(f, g)``.

    Shapes:
        ``((N, ...), (N, ...))``, both of one shape, unchanged; floating dtypes.

    Domain:
        All of it, onto all of it.

    Cost:
        The inverse evaluates f and g once each and amplifies nothing. Lowered: nothing is kept but what they close
        over; each is evaluated exactly twice in a training step.

    Log-determinant:
        0.

    Raises:
        WireError: When f or g returns another shape than its partner component has.

    Example:
        >>> import torch
        >>> hamiltonian(torch.sin, torch.cos, 0.5)(torch.zeros(1), torch.zeros(1))
        (tensor([0.]), tensor([0.5000]))

    Source:
        Ruthotto and Haber, Deep Neural Networks Motivated by Partial Differential Equations (2018); Gal et al.,
        Reversing Large Language Models for Efficient Training and Fine-Tuning (2025), with attention for f, a
        feed-forward net for g, and a step of 1.
    """
    halves = [fn if step == 1 else Stepped(fn, step) for fn in (f, g)]
    return named(couple(*halves), f"hamiltonian({name_of(f)}, {name_of(g)}, {step:g})")


# ---- existing residual blocks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Branch:
    """The residual branch of a block: ``x -> block(x) - x``."""

    block: Callable[..., Any]

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's block."""
        return (self.block,)

    def __call__(self, x: Tensor, *given: Any) -> Tensor:
        y = self.block(x, *given)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            raise WireError(
                f"block {name_of(self.block)} returned {describe(y)}",
                expected=f"{describe(x)}: x + f(x) of its input x",
            )
        return y - x

    @property
    def __name__(self) -> str:
        return name_of(self.block)


def residual_branch(block: Callable[..., Any]) -> Callable[..., Any]:
    """The branch f of a block that computes ``x + f(x)``: its method ``residual`` if it has one, else ``block(x) - x``.

    .. math:: f(x) = block(x) - x

    Args:
        block: Any callable or module whose output has the shape of its input.

    Limits:
        The difference loses what the sum rounded away: in float16 or bfloat16 give the block a method ``residual``, or
        keep the streams in float32.

    Example:
        >>> import torch
        >>> def block(x):
        ...     return x + torch.tanh(x)
        >>> f = residual_branch(block)
        >>> x = torch.ones(3)
        >>> bool(torch.allclose(f(x), torch.tanh(x)))
        True
    """
    method = getattr(block, "residual", None)
    return method if callable(method) else Branch(block)


def _alternate(f: Callable[..., Any]) -> Invertible:
    """``(x1, x2) -> (x2, x1 + f(x2))``."""
    return chain(couple(f), swap())


_SCHEMES: dict[str, Callable[..., Invertible]] = {
    "couple": _alternate,
    "momentum": momentum,
    "midpoint": midpoint,
    "leapfrog": leapfrog,
}


def reversible_residual(
    block: Callable[..., Any] | tuple[Callable[..., Any], Callable[..., Any]],
    scheme: str | Callable[[Callable[..., Any]], Invertible] = "midpoint",
) -> Invertible:
    r"""An existing residual block as a reversible op on two streams, with the block's own parameters.

    .. math:: f(x) = block(x) - x, \qquad op = scheme(f)

    - ``couple``, on two streams: :math:`(x_1, x_2) \mapsto (x_2, x_1 + f(x_2))`; for two blocks `couple` itself
    - ``midpoint``, on ``(previous, x)``: :math:`x_{+} = x_{-} + 2 f(x)`
    - ``leapfrog``, on ``(previous, x)``: :math:`x_{+} = 2 x - x_{-} + f(x)`
    - ``momentum``, on ``(x, velocity)``: :math:`v' = 0.9 v + 0.1 f(x),\; x' = x + v'`

    Is the network still the original one? A residual network on one stream is not injective in general, so no scheme of
    fixed memory can reproduce it. Put between `enter_streams` and `leave_streams`, the schemes equal it

    - all of them, where the branches are zero: at initialisation with ReZero, LayerScale at 0 or a zero last layer;
    - ``couple``, for the first block (and for no later one, so it is the right first block for ``midpoint`` too);
    - ``partial(momentum, gamma=0)``, always, at the price of one kept activation for each block; for small gamma the
      difference is proportional to gamma;
    - `residual_flow`, always, on one stream, if every branch is a contraction.

    Args:
        block: A callable or module that computes ``x + f(x)``; for ``couple`` also two of them, such as attention and
            feed-forward. Its method ``residual``, if it has one, is taken for f: see `residual_branch`.
        scheme: One of the names above, or any function from f to an op, such as ``partial(momentum, gamma=0.5)``.

    Shapes:
        ``((N, ...), (N, ...))``, both of one shape, unchanged; floating dtypes.

    Domain:
        All of it, onto all of it.

    Cost:
        The inverse evaluates the block once. Lowered: nothing is kept; the block is evaluated exactly twice in a
        training step.

    Raises:
        OptionError: When the scheme is not known, or two blocks come with another scheme than ``couple``.
        WireError: When the block returns another shape than it was given.

    Example:
        >>> import torch
        >>> from invfunc import chain
        >>> def block(x):
        ...     return x + 0.1 * torch.tanh(x)
        >>> net = chain(enter_streams(), reversible_residual(block, "couple"), leave_streams())
        >>> x = torch.ones(2)
        >>> bool(torch.allclose(net(x), block(x)))
        True

    Source:
        Gomez et al. (2017), Chang et al. (2018), Sander et al. (2021), Mangalam et al., Reversible Vision
        Transformers (2022).
    """
    if isinstance(scheme, str) and scheme not in _SCHEMES:
        expected = f"one of {', '.join(map(repr, _SCHEMES))}, or a function from f to an op"
        raise OptionError(f"reversible_residual: scheme is {scheme!r}", expected=expected)
    build = _SCHEMES[scheme] if isinstance(scheme, str) else scheme
    shown = repr(scheme) if isinstance(scheme, str) else name_of(scheme)
    if not isinstance(block, tuple):
        return named(build(residual_branch(block)), f"reversible_residual({name_of(block)}, {shown})")
    if scheme != "couple" or len(block) != 2:
        raise OptionError(
            f"reversible_residual: {len(block)} blocks with scheme {shown}", expected="two, with 'couple'"
        )
    names = ", ".join(map(name_of, block))
    return named(couple(*map(residual_branch, block)), f"reversible_residual(({names}), {shown})")


def _duplicate(x: Tensor) -> Any:
    return x, x


def _pull_duplicate(y: Any, gy: Any) -> Any:
    return y[0], gy[0] + gy[1]


def _at_rest(x: Tensor) -> Any:
    return x, torch.zeros_like(x)


def _pull_at_rest(y: Any, gy: Any) -> Any:
    return y[0], gy[0]


def _beside(fn: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return fn(x), x


def _first(x: Tensor, other: Tensor) -> Tensor:
    return x


def _second(other: Tensor, x: Tensor) -> Tensor:
    return x


def enter_streams(scheme: str | Callable[[Tensor], Tensor] = "midpoint") -> Invertible:
    r"""One tensor into the two streams of `reversible_residual`: ``(x, 0)`` for ``momentum``, else ``(x, x)``.

    .. math:: x \mapsto (x, 0) \quad \text{or} \quad (x, x) \quad \text{or} \quad (f(x), x)

    Args:
        scheme: As in `reversible_residual`; or a function f that makes the first stream, such as the velocity with
            which `asynchronous_leapfrog` starts.

    Shapes:
        ``(N, ...) -> ((N, ...), (N, ...))``; floating dtypes.

    Domain:
        All of it; the range is the pairs of equal streams, or of those at rest. Of other pairs the inverse loses one.

    Cost:
        Nothing is kept. Lowered, the inverse is a stage that is stored, since it does not tell the other stream.

    Limits:
        Its inverse returns the stream that is x. It is a left inverse: ``inverse(forward(x)) = x``, not conversely.
        There is no log-determinant, since the dimensions differ.

    Raises:
        OptionError: When the scheme is not known.

    Example:
        >>> import torch
        >>> enter_streams("momentum")(torch.ones(2))
        (tensor([1., 1.]), tensor([0., 0.]))

    Source:
        Gomez et al., RevNet (2017), for equal streams; Sander et al. (2021), for those at rest.
    """
    if callable(scheme):
        return embedding(partial(_beside, scheme), _second, name=f"enter_streams({name_of(scheme)})")
    if _known("enter_streams", scheme) == "momentum":
        return embedding(_at_rest, _first, pullback=_pull_at_rest, name="enter_streams('momentum')")
    return embedding(_duplicate, _first, pullback=_pull_duplicate, name=f"enter_streams({scheme!r})")


def leave_streams(scheme: str = "midpoint") -> Invertible:
    r"""The two streams of `reversible_residual` to one tensor: the position, which is the latest of two positions.

    .. math:: (x_1, x_2) \mapsto x_1 \quad \text{or} \quad x_2

    Args:
        scheme: As in `reversible_residual`.

    Shapes:
        ``((N, ...), (N, ...)) -> (N, ...)``, dtype any.

    Domain:
        All pairs; the range is all of it.

    Cost:
        It has no inverse, so it closes the trunk: lowered, both streams are kept.

    Raises:
        OptionError: When the scheme is not known.
        NotInvertibleError: When its inverse is asked for.

    Example:
        >>> import torch
        >>> leave_streams()(torch.zeros(1), torch.ones(1))
        tensor([1.])

    Source:
        Gomez et al., RevNet (2017); Sander et al. (2021).
    """
    return one_way(_first if _known("leave_streams", scheme) == "momentum" else _second)


def _known(subject: str, scheme: str) -> str:
    if scheme not in _SCHEMES:
        raise OptionError(f"{subject}: scheme is {scheme!r}", expected=f"one of {', '.join(map(repr, _SCHEMES))}")
    return scheme
