"""Monotone splines on an interval, continued by straight lines: elementwise ops with many parameters.

Parameters are unnormalised: any numbers will do, so that a network can return them. Under autocast it returns them in
half precision; knots, slopes and the spline itself are computed in the dtype of x all the same, or in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.couple import broadcasts, sum_log_slopes
from ..core.op import Invertible
from ..core.precision import exactly
from ..debug import require
from ..errors import OptionError, WireError, check_option
from ..wires import describe
from .elementwise import elementwise
from .shape import check_tensor


@dataclass(frozen=True)
class Shape:
    """What is fixed about a spline: where it lives, and how it continues."""

    name: str
    low: float
    high: float
    tails: str | None
    minimum: float
    boundary: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        ends = self.low, self.high
        check_option(f"{self.name}: interval", ends, lambda ends: ends[0] < ends[1], "(low, high), low < high")
        check_option(f"{self.name}: tails", self.tails, lambda tails: tails in ("linear", None), "'linear' or None")
        check_option(f"{self.name}: minimum", self.minimum, lambda least: 0 <= least < 1, "a number from 0 to 1")
        slopes = self.boundary
        check_option(f"{self.name}: boundary_slopes", slopes, lambda slopes: min(slopes) > 0, "two positive numbers")

    def check(self, x: Tensor, tables: tuple[Tensor, ...]) -> None:
        """The parameters fit x, and x lies where the spline is defined."""
        check_parameters(self.name, x, tables)
        if self.tails is None:
            expected = f"values from {self.low:g} to {self.high:g}"
            require(self.name, x, _between, expected, "pass tails='linear', or a wider interval", self.low, self.high)

    def clamp(self, x: Tensor) -> Tensor:
        """The point of the interval that is nearest to x."""
        return x.clamp(self.low, self.high)


def check_parameters(name: str, x: Tensor, tables: tuple[Tensor, ...]) -> None:
    """Raise unless each table, without its last dimension, broadcasts to the shape of x."""
    check_tensor(name, x)
    require(f"{name}'s parameters", tables, torch.isfinite, "finite numbers")
    for table in tables:
        if not broadcasts(table.shape[:-1], x.shape):
            raise WireError(
                f"{name} got parameters {describe(table)} for x {describe(x)}",
                expected=f"({', '.join(map(str, x.shape))}, parameters), or what broadcasts to it",
                cure="move the parameters of each number of x to the last dimension",
            )


def _between(x: Tensor, low: float, high: float) -> Tensor:
    return (x >= low) & (x <= high)


def _knots(shape: Shape, sizes: Tensor) -> Tensor:
    """``(..., K) -> (..., K + 1)``: where bins of these unnormalised sizes begin and end."""
    count = sizes.shape[-1]
    if shape.minimum * count >= 1:
        raise OptionError(f"{shape.name}: minimum is {shape.minimum}", expected=f"less than 1/{count} for {count} bins")
    parts = shape.minimum + (1 - shape.minimum * count) * sizes.softmax(-1)
    inner = shape.low + (shape.high - shape.low) * parts.cumsum(-1)[..., :-1]
    return F.pad(F.pad(inner, (1, 0), value=shape.low), (0, 1), value=shape.high)


def _bin(knots: Tensor, x: Tensor) -> Tensor:
    """The index of the bin that holds x: ``(...,) -> (..., 1)``."""
    return (x.unsqueeze(-1) >= knots[..., 1:-1]).sum(-1, keepdim=True)


def _ends(table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of a table of knots at the two ends of a bin."""
    table = table.expand(*index.shape[:-1], table.shape[-1])
    return table.gather(-1, index).squeeze(-1), table.gather(-1, index + 1).squeeze(-1)


# ---- rational quadratic --------------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """The knots of a rational-quadratic spline, and its slopes there: each ``(..., K + 1)``."""

    x: Tensor
    y: Tensor
    slopes: Tensor


def _tables(shape: Shape, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None) -> Tables:
    if heights is None or derivatives is None:
        widths, heights, derivatives = _taken_apart(shape, widths)
    count = widths.shape[-1]
    if heights.shape[-1] != count or derivatives.shape[-1] not in (count - 1, count + 1):
        raise WireError(
            f"{shape.name} got {count} widths, {heights.shape[-1]} heights and {derivatives.shape[-1]} derivatives",
            expected=f"{count} heights, and {count - 1} derivatives, or {count + 1} with those at both ends",
        )
    slopes = shape.minimum + F.softplus(derivatives)
    if slopes.shape[-1] == count - 1:
        left, right = shape.boundary
        slopes = F.pad(F.pad(slopes, (1, 0), value=left), (0, 1), value=right)
    return Tables(_knots(shape, widths), _knots(shape, heights), slopes)


def _taken_apart(shape: Shape, parameters: Tensor) -> tuple[Tensor, ...]:
    """One tensor of 3K - 1 or 3K + 1 parameters into widths, heights and slopes."""
    total = parameters.shape[-1]
    count = (total + 1) // 3
    if total < 2 or total % 3 == 0:
        raise WireError(
            f"{shape.name} got {total} parameters in the last dimension of {describe(parameters)}",
            expected="3K - 1 of them for K bins, or 3K + 1 with the slopes at the boundaries",
            cure="reshape what the net returns to x.shape + (3K - 1,)",
        )
    return parameters.split([count, count, total - 2 * count], -1)


class Piece(NamedTuple):
    """The bin that holds a point: its corner, its size, its mean slope, and its slopes at both ends."""

    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    mean: Tensor
    left: Tensor
    right: Tensor

    @property
    def bend(self) -> Tensor:
        """How far the slopes at the ends are from those of a straight line."""
        return self.left + self.right - 2 * self.mean


def _piece(tables: Tables, index: Tensor) -> Piece:
    (x0, x1), (y0, y1), (left, right) = (_ends(table, index) for table in tables)
    return Piece(x0, y0, x1 - x0, y1 - y0, (y1 - y0) / (x1 - x0), left, right)


def _edge_slope(shape: Shape, tables: Tables, x: Tensor) -> Tensor:
    return torch.where(x < (shape.low + shape.high) / 2, tables.slopes[..., 0], tables.slopes[..., -1])


def _rq_forward(shape: Shape, w: Tensor, h: Tensor | None, d: Tensor | None, x: Tensor) -> Tensor:
    return exactly(partial(_rq_value, shape), x, w, h, d)


def _rq_value(shape: Shape, x: Tensor, w: Tensor, h: Tensor | None, d: Tensor | None) -> Tensor:
    tables, inner = _tables(shape, w, h, d), shape.clamp(x)
    shape.check(x, tables)
    p = _piece(tables, _bin(tables.x, inner))
    t = (inner - p.x) / p.width
    y = p.y + p.height * (p.mean * t * t + p.left * t * (1 - t)) / (p.mean + p.bend * t * (1 - t))
    return y + _edge_slope(shape, tables, x) * (x - inner)


def _rq_inverse(shape: Shape, w: Tensor, h: Tensor | None, d: Tensor | None, y: Tensor) -> Tensor:
    return exactly(partial(_rq_root, shape), y, w, h, d)


def _rq_root(shape: Shape, y: Tensor, w: Tensor, h: Tensor | None, d: Tensor | None) -> Tensor:
    tables, inner = _tables(shape, w, h, d), shape.clamp(y)
    shape.check(y, tables)
    p = _piece(tables, _bin(tables.y, inner))
    rise = inner - p.y
    a = p.height * (p.mean - p.left) + rise * p.bend
    b = p.height * p.left - rise * p.bend
    c = -p.mean * rise
    root = (b * b - 4 * a * c).clamp_min(torch.finfo(y.dtype).tiny).sqrt()
    return p.x + p.width * 2 * c / (-b - root) + (y - inner) / _edge_slope(shape, tables, y)


def _rq_log_det(shape: Shape, w: Tensor, h: Tensor | None, d: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    return sum_log_slopes(partial(_rq_log_slope, shape), x, w, h, d)


def _rq_log_slope(shape: Shape, x: Tensor, w: Tensor, h: Tensor | None, d: Tensor | None) -> Tensor:
    tables, inner = _tables(shape, w, h, d), shape.clamp(x)  # beyond the interval the slope is that of its end
    p = _piece(tables, _bin(tables.x, inner))
    t = (inner - p.x) / p.width
    above = p.right * t * t + 2 * p.mean * t * (1 - t) + p.left * (1 - t) * (1 - t)
    below = p.mean + p.bend * t * (1 - t)
    return 2 * p.mean.log() + above.log() - 2 * below.log()


def rational_quadratic_spline(
    widths: Tensor,
    heights: Tensor | None = None,
    derivatives: Tensor | None = None,
    *,
    interval: tuple[float, float] = (-3.0, 3.0),
    tails: str | None = "linear",
    boundary_slopes: tuple[float, float] = (1.0, 1.0),
    minimum: float = 1e-3,
) -> Invertible:
    r"""A monotone spline of rational quadratics: smooth, flexible, with an inverse in closed form; a law of `couple`.

    In the bin from :math:`(x_0, y_0)` to :math:`(x_1, y_1)`, with :math:`\theta = (x - x_0) / (x_1 - x_0)`, mean slope
    s, and slopes :math:`d_0, d_1` at its ends,

    .. math:: y = y_0 + \frac{(y_1 - y_0)(s \theta^2 + d_0 \theta (1 - \theta))}
        {s + (d_0 + d_1 - 2s) \theta (1 - \theta)}, \qquad
        \frac{dy}{dx} = \frac{s^2 (d_1 \theta^2 + 2 s \theta (1 - \theta) + d_0 (1 - \theta)^2)}
        {(s + (d_0 + d_1 - 2s) \theta (1 - \theta))^2}

    and :math:`\log|\det J| = \sum \log dy/dx`. The interval is mapped to itself.

    Args:
        widths: Unnormalised widths of the K bins: softmax makes them parts of the interval. Alone, all parameters in
            one tensor: widths, heights and slopes, 3K - 1 or 3K + 1 of them.
        heights: Unnormalised heights of the K bins.
        derivatives: Unnormalised slopes, through softplus: K - 1 at the inner knots, or K + 1 with those at both ends.
        interval: Where the knots are.
        tails: ``"linear"`` continues the spline by its tangents at both ends. None means that no value should lie
            beyond them: ``inv.debug(True)`` raises; otherwise it continues all the same, so that nothing is NaN.
        boundary_slopes: The slopes at both ends when K - 1 derivatives are given. With 1 the tails are the identity.
        minimum: The least part of a width and of a height, and the least slope.

    Shapes:
        x of any shape and floating-point dtype; each parameter ``(*x.shape, K)``, or what broadcasts to it, of any
        floating-point dtype: computed in the widest of them, and at least in float32.

    Domain:
        All numbers, and so is the range.

    Cost:
        Its inverse solves one quadratic equation. Forward, inverse and log-determinant each look up the bin of every
        number: K comparisons. Lowered, nothing is kept.

    Raises:
        WireError: When the numbers of parameters do not fit each other, or their shapes do not fit x.
        OptionError: When an option is not as above, or minimum is too large for K bins.
        DomainError: Under ``inv.debug(True)``, when a parameter is not finite, or a value lies beyond the interval
            without tails.

    Example:
        >>> spline = rational_quadratic_spline(torch.zeros(4), torch.zeros(4), torch.zeros(3))
        >>> spline(torch.tensor([-5.0, 0.0, 5.0]))
        tensor([-5.,  0.,  5.])
        >>> spline.inverse(spline(torch.tensor([1.0, 2.0])))
        tensor([1., 2.])

    Source:
        Durkan et al., Neural spline flows (2019); Gregory and Delbourgo (1982).
    """
    shape = Shape("rational_quadratic_spline", *interval, tails, minimum, boundary_slopes)
    static = shape, widths, heights, derivatives
    given = "widths, heights, derivatives" if heights is not None else "parameters"
    return elementwise(
        partial(_rq_forward, *static),
        partial(_rq_inverse, *static),
        f"rational_quadratic_spline({given})",
        log_det=partial(_rq_log_det, *static),
    )


# ---- linear ----------------------------------------------------------------------------------------------------------


def _linear_tables(shape: Shape, heights: Tensor, widths: Tensor | None) -> tuple[Tensor, Tensor]:
    if widths is not None and widths.shape[-1] != heights.shape[-1]:
        raise WireError(
            f"{shape.name} got {widths.shape[-1]} widths, {heights.shape[-1]} heights", expected="as many of each"
        )
    return _knots(shape, torch.zeros_like(heights) if widths is None else widths), _knots(shape, heights)


def _interpolated(shape: Shape, origin: Tensor, target: Tensor, x: Tensor) -> Tensor:
    shape.check(x, (origin, target))
    inner = shape.clamp(x)
    index = _bin(origin, inner)
    (x0, x1), (y0, y1) = _ends(origin, index), _ends(target, index)
    return y0 + (y1 - y0) / (x1 - x0) * (inner - x0) + (x - inner)


def _linear_forward(shape: Shape, heights: Tensor, widths: Tensor | None, x: Tensor) -> Tensor:
    return exactly(partial(_linear_value, shape), x, heights, widths)


def _linear_value(shape: Shape, x: Tensor, heights: Tensor, widths: Tensor | None) -> Tensor:
    xs, ys = _linear_tables(shape, heights, widths)
    return _interpolated(shape, xs, ys, x)


def _linear_inverse(shape: Shape, heights: Tensor, widths: Tensor | None, y: Tensor) -> Tensor:
    return exactly(partial(_linear_root, shape), y, heights, widths)


def _linear_root(shape: Shape, y: Tensor, heights: Tensor, widths: Tensor | None) -> Tensor:
    xs, ys = _linear_tables(shape, heights, widths)
    return _interpolated(shape, ys, xs, y)


def _linear_log_det(shape: Shape, heights: Tensor, widths: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    return sum_log_slopes(partial(_linear_log_slope, shape), x, heights, widths)


def _linear_log_slope(shape: Shape, x: Tensor, heights: Tensor, widths: Tensor | None) -> Tensor:
    xs, ys = _linear_tables(shape, heights, widths)
    index = _bin(xs, x)
    (x0, x1), (y0, y1) = _ends(xs, index), _ends(ys, index)
    inside = torch.where(_between(x, shape.low, shape.high), ((y1 - y0) / (x1 - x0)).log(), 0)
    return inside.masked_fill(x.isnan(), math.nan)


def linear_spline(
    heights: Tensor,
    widths: Tensor | None = None,
    *,
    interval: tuple[float, float] = (-3.0, 3.0),
    tails: str | None = "linear",
    minimum: float = 1e-3,
) -> Invertible:
    r"""A monotone spline of straight lines; a law of `couple`.

    .. math:: y = y_0 + \frac{y_1 - y_0}{x_1 - x_0} (x - x_0), \qquad
        \log|\det J| = \sum \log \frac{y_1 - y_0}{x_1 - x_0}

    in the bin from :math:`(x_0, y_0)` to :math:`(x_1, y_1)`. The interval is mapped to itself; beyond it, y = x.

    Args:
        heights: Unnormalised heights of the K bins: softmax makes them parts of the interval.
        widths: Unnormalised widths of the K bins; without them, all are equal.
        interval: Where the knots are.
        tails: ``"linear"`` continues the spline by the identity. None means that no value should lie beyond the
            interval: ``inv.debug(True)`` raises; otherwise it continues all the same, so that nothing is NaN.
        minimum: The least part of a width and of a height.

    Shapes:
        x of any shape and floating-point dtype; each parameter ``(*x.shape, K)``, or what broadcasts to it, of any
        floating-point dtype: computed in the widest of them, and at least in float32.

    Domain:
        All numbers, and so is the range.

    Cost:
        Its inverse is another linear spline. Lowered, nothing is kept.

    Raises:
        WireError: When the numbers of parameters do not fit each other, or their shapes do not fit x.
        OptionError: When an option is not as above, or minimum is too large for K bins.
        DomainError: Under ``inv.debug(True)``, when a parameter is not finite, or a value lies beyond the interval
            without tails.

    Example:
        >>> spline = linear_spline(torch.tensor([0.0, 1.0]), interval=(0.0, 1.0), minimum=0)
        >>> spline(torch.tensor([0.25, 0.5, 2.0]))
        tensor([0.1345, 0.2689, 2.0000])

    Source:
        Mueller et al., Neural importance sampling (2019).
    """
    static = Shape("linear_spline", *interval, tails, minimum), heights, widths
    return elementwise(
        partial(_linear_forward, *static),
        partial(_linear_inverse, *static),
        "linear_spline(heights)" if widths is None else "linear_spline(heights, widths)",
        log_det=partial(_linear_log_det, *static),
    )
