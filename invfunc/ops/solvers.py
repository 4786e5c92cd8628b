"""Reversible solvers of differential equations: a neural ODE whose states are rebuilt, so that its gradient is exact.

Each solver is couplings on two streams, of which the second is the solution; `enter_streams` makes the first, and
`leave_streams` takes the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.couple import Half, additive, affine, broadcasts
from ..core.op import Invertible, chain, name_of, named
from ..core.precision import at_least, check_numbers, real_dtype
from ..errors import OptionError, WireError, check_option
from ..wires import describe, is_differentiable
from .residual import blend, reflect

Times: TypeAlias = Sequence[float] | Tensor
Moment: TypeAlias = float | Tensor  # a time, or a span of it; a tensor where it has a gradient
Step: TypeAlias = Callable[[Callable[..., Tensor], Any, Tensor, Any], Tensor]  # (field, t, x, h) -> x(t + h) - x


@dataclass(frozen=True)
class Field:
    """``(t, x) -> fn(t, x)``: the time has the dtype of x, or float32, and what fn returns is at least as wide as x.

    A time in half precision would be another time: between 1 and 2 bfloat16 has 128 numbers.
    """

    fn: Callable[..., Any]

    def __call__(self, time: Moment, x: Tensor) -> Tensor:
        check_numbers("a stream of a solver", x)
        found = self.fn(torch.as_tensor(time, dtype=at_least(real_dtype(x)), device=x.device), x)
        _check_like(x, found, self.fn)
        return found.to(torch.promote_types(found.dtype, x.dtype))


def _check_like(x: Tensor, found: Any, fn: Callable[..., Any]) -> None:
    if not isinstance(found, Tensor) or found.shape != x.shape or found.is_complex() > x.is_complex():
        got = f" of {found.dtype}" if isinstance(found, Tensor) and found.shape == x.shape else ""
        expected = f"{describe(x)}{got and f' of {x.dtype}'} like its input"
        raise WireError(f"{name_of(fn)} returned {describe(found)}{got}", expected=expected)


@dataclass(frozen=True)
class Part:
    """What a coupling of a solver adds to a stream, as a function of the other one."""

    fn: Callable[..., Any]
    time: Moment
    step: Moment

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    @property
    def __name__(self) -> str:
        return name_of(self.fn)


def _grid(subject: str, fn: Any, times: Times) -> list[Any]:
    """The times, as numbers; as tensors in at least float32 where they have a gradient."""
    if not callable(fn):
        raise OptionError(f"{subject}: the field is {type(fn).__name__}", expected="a function or a module, f(t, x)")
    try:
        grid = [float(time.detach() if isinstance(time, Tensor) else time) for time in times]
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{subject}: times are {times!r}", expected="numbers, in a list or a tensor (T,)") from error
    if len(grid) < 2 or any(a == b for a, b in pairwise(grid)) or not all(map(math.isfinite, grid)):
        raise OptionError(f"{subject}: times are {grid}", expected="two finite times or more, no two neighbours equal")
    if not any(isinstance(time, Tensor) and time.requires_grad for time in times):
        return grid
    return [time.to(at_least(time.dtype)) if isinstance(time, Tensor) else time for time in times]


def _named(parts: list[Invertible], kind: str, fn: Callable[..., Any], grid: list[Any]) -> Invertible:
    first, last = (float(end.detach() if isinstance(end, Tensor) else end) for end in (grid[0], grid[-1]))
    steps = f"{len(grid) - 1} steps from {first:g} to {last:g}"
    return named(chain(*parts), f"{kind}({name_of(fn)}, {steps})")


def _staggered(
    grid: list[Any], move: Callable[[int], Invertible], turn: Callable[[Any, Any], Invertible]
) -> list[Invertible]:
    """``move, turn, move, ..., turn, move``: half a step's move on either side of a turn, and neighbours as one."""
    parts = [move(0)]
    for i, (start, end) in enumerate(pairwise(grid)):
        parts += [turn(start, end), move(i + 1)]
    return parts


def _half_steps(grid: list[Any], i: int) -> list[tuple[Any, Any]]:
    """The steps that end and begin at a time of the grid."""
    return list(pairwise(grid[max(i - 1, 0) : i + 2]))


# ---- reversible Heun -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kick(Part):
    """``x -> h f(t, x) + g(t, x) dW``."""

    diffusion: Callable[..., Any] | None
    noise: Callable[[float, float], Tensor] | None
    beside: tuple[tuple[Any, Any], ...]

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return (self.fn, *(fn for fn in (self.diffusion, self.noise) if fn is not None))

    def __call__(self, x: Tensor) -> Tensor:
        moved = self.step * Field(self.fn)(self.time, x)
        if self.diffusion is None or self.noise is None:
            return moved
        shaken = sum(_drawn(self.noise, x, *step) for step in self.beside) / 2
        return moved + Field(self.diffusion)(self.time, x) * shaken


def _drawn(noise: Callable[[float, float], Any], x: Tensor, start: float, end: float) -> Tensor:
    """The noise between two times."""
    found = noise(start, end)
    if not (is_differentiable(found) and broadcasts(found.shape, x.shape)):
        expected = f"floating-point numbers of shape {describe(x)} like the state, or what broadcasts to it"
        raise WireError(f"the noise {name_of(noise)} returned {describe(found)}", expected=expected)
    return found


def _twice(x: Tensor) -> Tensor:
    return 2 * x


def reversible_heun(
    fn: Callable[..., Any],
    times: Times,
    *,
    diffusion: Callable[..., Any] | None = None,
    noise: Callable[[float, float], Tensor] | None = None,
) -> Invertible:
    r"""The reversible Heun method for :math:`dx = f(t, x)\,dt + g(t, x) \circ dW`: the state is ``(companion, x)``.

    .. math:: \hat x_{n+1} = 2 x_n - \hat x_n + f_n h + g_n \Delta W_n, \qquad
        x_{n+1} = x_n + \tfrac12 (f_n + f_{n+1}) h + \tfrac12 (g_n + g_{n+1}) \Delta W_n, \qquad
        f_n = f(t_n, \hat x_n), \; g_n = g(t_n, \hat x_n)

    Args:
        fn: The field, ``f(t, x)``; t is a tensor without dimensions, in the dtype of x and at least in float32.
        times: The times of the grid, in order: a list or a tensor. Backwards in time where they decrease. Those that
            require grad get theirs.
        diffusion: ``g(t, x)`` of the shape of x, for noise on each element; none for an ordinary equation.
        noise: ``(t_n, t_{n+1}) -> Delta W_n``, of the shape of x or broadcast to it, and the same at every call: a
            Brownian path, or draws from a generator that is seeded by the time. Steps look at it twice in forward and
            twice in backward; nothing of it is kept.

    Shapes:
        ``((N, ...), (N, ...))``, both of one shape, unchanged; floating dtypes.

    Domain:
        All of it, onto all of it.

    Cost:
        One evaluation of f a step and one more, in either direction: ``len(times)``. Lowered: nothing is kept, whatever
        the number of steps, and each of these is evaluated exactly twice in a training step.

    Log-determinant:
        0, since the companion carries what x loses; it is not that of the flow of the equation.

    Raises:
        OptionError: When a function is none, there are fewer than two times, one is not finite, only one of
            ``diffusion`` and ``noise``, or noise at times that require grad.
        WireError: When a function returns another shape than that of x, or a stream has no floating-point numbers.

    Limits:
        Of second order; of strong order 1/2 with noise, in the sense of Stratonovich. Stable on the imaginary axis
        alone: where solutions decay, errors of the companion do not.

    Example:
        >>> import torch
        >>> from invfunc import chain
        >>> from invfunc.ops import enter_streams, leave_streams
        >>> def decay(t, x):
        ...     return -x
        >>> steps = reversible_heun(decay, torch.linspace(0, 1, 51))
        >>> steps
        reversible_heun(decay, 50 steps from 0 to 1)
        >>> solve = chain(enter_streams(), steps, leave_streams())
        >>> bool((solve(torch.ones(1)) - torch.tensor(-1.0).exp()).abs() < 1e-4)
        True

    Source:
        Kidger, Foster, Li and Lyons, Efficient and Accurate Gradients for Neural SDEs (2021).
    """
    grid = _grid("reversible_heun", fn, times)
    if (diffusion is None) != (noise is None):
        raise OptionError("reversible_heun: one of diffusion and noise is None", expected="both, or neither")
    for name, part in (("diffusion", diffusion), ("noise", noise)):
        if part is not None and not callable(part):
            got = f"reversible_heun: the {name} is {type(part).__name__}"
            raise OptionError(got, expected="a function or a module")
    if noise is not None and any(isinstance(time, Tensor) for time in grid):
        raise OptionError("reversible_heun: times that require grad, with noise", expected="times.detach()")

    def move(i: int) -> Invertible:
        steps = _half_steps(grid, i)
        half = sum(end - start for start, end in steps) / 2
        return Half(Kick(fn, grid[i], half, diffusion, noise, tuple(steps)), additive, 1, "f")

    def turn(start: Any, end: Any) -> Invertible:
        return Half(_twice, reflect, 0, "companion")

    return _named(_staggered(grid, move, turn), "reversible_heun", fn, grid)


# ---- asynchronous leapfrog -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slope(Part):
    """``x -> f(t, x)``."""

    def __call__(self, x: Tensor) -> Tensor:
        return Field(self.fn)(self.time, x)


def _drift(step: Moment, velocity: Tensor) -> Tensor:
    check_numbers("a stream of a solver", velocity)
    return step * velocity


def asynchronous_leapfrog(fn: Callable[..., Any], times: Times, *, damping: float = 1.0) -> Invertible:
    r"""The asynchronous leapfrog (ALF) for :math:`\dot x = f(t, x)`: the state is ``(velocity, x)``.

    .. math:: k = x_n + \tfrac h2 v_n, \qquad v_{n+1} = v_n + 2 \eta\, (f(t_n + \tfrac h2, k) - v_n), \qquad
        x_{n+1} = k + \tfrac h2 v_{n+1}

    Args:
        fn: The field, ``f(t, x)``; t is a tensor without dimensions, in the dtype of x and at least in float32.
        times: The times of the grid, in order: a list or a tensor. Those that require grad get theirs.
        damping: :math:`\eta`, above 1/2 and at most 1: below 1 the velocity forgets its errors.

    Shapes:
        ``((N, ...), (N, ...))``, both of one shape, unchanged; floating dtypes.

    Domain:
        All of it, onto all of it.

    Cost:
        One evaluation of f a step, in either direction. Lowered: nothing is kept, whatever the number of steps; f is
        evaluated exactly twice for each step.

    Log-determinant:
        :math:`\log|1 - 2 \eta|` for each step and element; it is not that of the flow of the equation.

    Raises:
        OptionError: When fn is no function, there are fewer than two times, one is not finite, or ``damping`` is not
            above 1/2 and at most 1.
        WireError: When f returns another shape than it was given, or a stream has no floating-point numbers.

    Limits:
        Of second order in x where ``damping`` is 1, and of first order below. A velocity that starts elsewhere than as
        f(t_0, x_0), see the example, leaves the order as it is, and makes the error larger. Where solutions decay by
        :math:`e^{-a h}` a step, it is stable while :math:`2 \eta - 1 < e^{-a h}`. The inverse divides by :math:`2 \eta
        - 1` in each step: what a stable step forgets, it has to make again.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from invfunc import chain
        >>> from invfunc.ops import enter_streams, leave_streams
        >>> def decay(t, x):
        ...     return -x
        >>> steps = asynchronous_leapfrog(decay, torch.linspace(0, 1, 51))
        >>> solve = chain(enter_streams(partial(decay, 0.0)), steps, leave_streams())
        >>> bool((solve(torch.ones(1)) - torch.tensor(-1.0).exp()).abs() < 1e-3)
        True

    Source:
        Mutze, An asynchronous leapfrog method II (2013); Zhuang et al., MALI: A memory efficient and reverse accurate
        integrator for Neural ODEs (2021).
    """
    grid = _grid("asynchronous_leapfrog", fn, times)
    name = "asynchronous_leapfrog: damping"
    check_option(name, damping, lambda damping: 0.5 < damping <= 1, "a number above 0.5, and at most 1")

    def move(i: int) -> Invertible:
        half = sum(end - start for start, end in _half_steps(grid, i)) / 2
        return Half(partial(_drift, half), additive, 1, "velocity")

    def turn(start: Any, end: Any) -> Invertible:
        return Half(Slope(fn, (start + end) / 2, end - start), partial(blend, 1 - 2 * damping), 0, "f")

    return _named(_staggered(grid, move, turn), "asynchronous_leapfrog", fn, grid)


# ---- any explicit method ---------------------------------------------------------------------------------------------


def _combined(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    first, *others = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return sum(others, first)


def _runge_kutta(
    stages: tuple[tuple[float, ...], ...], weights: tuple[float, ...], field: Any, time: Moment, x: Tensor, step: Moment
) -> Tensor:
    """An explicit Runge-Kutta method by the rows of its tableau."""
    slopes = [field(time, x)]
    for row in stages:
        slopes.append(field(time + step * sum(row), x + step * _combined(row, slopes)))
    return step * _combined(weights, slopes)


_METHODS: dict[str, Step] = {
    "euler": partial(_runge_kutta, (), (1.0,)),
    "midpoint": partial(_runge_kutta, ((0.5,),), (0.0, 1.0)),
    "heun": partial(_runge_kutta, ((1.0,),), (0.5, 0.5)),
    "ralston3": partial(_runge_kutta, ((0.5,), (0.0, 0.75)), (2 / 9, 1 / 3, 4 / 9)),
    "rk4": partial(_runge_kutta, ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}


@dataclass(frozen=True)
class Increment(Part):
    """``x -> method(f, t, x, h)``, with a share of x: as `affine` takes it where there is a coupling."""

    method: Step
    coupling: float | None  # None: the increment, subtracted

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return (self.fn, self.method)

    def __call__(self, x: Tensor) -> Any:
        check_numbers("a stream of a solver", x)
        found = self.method(Field(self.fn), self.time, x, self.step)
        _check_like(x, found, self.method)
        if self.coupling is None:
            return -found
        share = torch.full((), self.coupling, dtype=at_least(real_dtype(x)), device=x.device)  # 0.999 is 1 in bfloat16
        return share, (1 - self.coupling) * x + found


def reversible_solver(
    fn: Callable[..., Any], times: Times, *, method: str | Step = "rk4", coupling: float = 0.999
) -> Invertible:
    r"""Any explicit one-step method, made reversible, for :math:`\dot x = f(t, x)`: the state is ``(companion, x)``.

    .. math:: x_{n+1} = \lambda x_n + (1 - \lambda) z_n + \Psi_h(t_n, z_n), \qquad
        z_{n+1} = z_n - \Psi_{-h}(t_{n+1}, x_{n+1})

    Args:
        fn: The field, ``f(t, x)``; t is a tensor without dimensions, in the dtype of x and at least in float32.
        times: The times of the grid, in order: a list or a tensor. Those that require grad get theirs.
        method: :math:`\Psi`: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"ralston3"``, ``"rk4"``, or a function
            ``(field, t, x, h) -> increment`` that calls ``field(t, x)``.
        coupling: :math:`\lambda`, above 0 and at most 1: below 1 it draws the two streams together.

    Shapes:
        ``((N, ...), (N, ...))``, both of one shape, unchanged; floating dtypes.

    Domain:
        All of it, onto all of it.

    Cost:
        Two increments a step, in either direction: for ``"rk4"`` eight evaluations of f. Lowered: nothing is kept,
        whatever the number of steps; each is evaluated exactly twice in a training step.

    Log-determinant:
        :math:`\log \lambda` for each step and element; it is not that of the flow of the equation.

    Raises:
        OptionError: When fn is no function, there are fewer than two times, one is not finite, the method is not
            known, or ``coupling`` is not above 0 and at most 1.
        WireError: When f returns another shape than it was given, or a stream has no floating-point numbers.

    Limits:
        Of the order of the method. Where solutions decay by :math:`e^{-a h}` a step, it is stable while :math:`\lambda
        < e^{-a h}`. The inverse divides by :math:`\lambda` in each step, so that rounding grows by 2.7 in 1000 steps at
        0.999, and by :math:`10^{45}` at 0.9: what a stable step forgets, it has to make again.

    Example:
        >>> import torch
        >>> from invfunc import chain, checkpoint
        >>> from invfunc.ops import enter_streams, leave_streams
        >>> net = torch.nn.Linear(2, 2)
        >>> def field(t, x):
        ...     return torch.tanh(net(x)) * t
        >>> solve = chain(enter_streams(), reversible_solver(field, torch.linspace(0, 1, 11)), leave_streams())
        >>> checkpoint(solve)(torch.ones(3, 2)).sum().backward()

    Source:
        McCallum and Foster, Efficient, Accurate and Stable Gradients for Neural ODEs (2024).
    """
    grid = _grid("reversible_solver", fn, times)
    if not callable(method) and method not in list(_METHODS):  # it may be a list, which has no hash
        expected = f"one of {', '.join(map(repr, _METHODS))}, or a function (field, t, x, h) -> increment"
        raise OptionError(f"reversible_solver: method is {method!r}", expected=expected)
    name = "reversible_solver: coupling"
    check_option(name, coupling, lambda coupling: 0 < coupling <= 1, "a number above 0, and at most 1")
    step = _METHODS[method] if isinstance(method, str) else method
    parts: list[Invertible] = []
    for start, end in pairwise(grid):
        parts += [
            Half(Increment(fn, start, end - start, step, coupling), affine, 1, "f"),
            Half(Increment(fn, end, start - end, step, None), additive, 0, "f"),
        ]
    return _named(parts, "reversible_solver", fn, grid)
