"""Ops whose inverse solves an equation: residual flows by a fixed point, autoregressive flows element by element.

NOTE [Implicit] An op y = F(x) whose inverse is found by iteration:

1.  Nothing is differentiated through the iterations. If x = F^-1(y), then ``gy = J^-T gx``, and the gradient of what F
    closes over is ``-gy`` pulled back through F, where J is F's Jacobian at x. In ordinary autograd F is evaluated once
    more, at the solution, and the graph is that of ``y - F(x)`` behind a node that solves for gy: so whatever F closes
    over is connected. Below a transform it is `SolvedInverse.pull`.
2.  ``J^-T`` is itself the inverse of an op of the same kind, on the wire ``(g, x)``: see `Adjoint`. So it has a
    gradient, and so on: gradients of every order converge by their own criterion. Those of an unrolled iteration do
    not: it may stop at once because the *value* is there, as at f(0) = 0, with the derivative far from its limit.
3.  Below a transform the inverse is a stage of a trunk even where nobody has lowered it: only so does rule 1 hold.
4.  Forward mode has no such hook. There the solution is found first, without gradients; then as many differentiable
    steps follow as a vector without structure needs to vanish under repeated application of f's Jacobian.
5.  Weights are computed once for all evaluations of one solve: spectral normalisation moves its estimate, and with it
    the weights, in every evaluation in training, so that there would be no fixed point.
6.  To ask a device whether an iteration has ended is to wait for it. So the answers travel on their own, every few
    steps, and the host goes on meanwhile; some answers ahead it waits for the oldest, while the device still has work.
    From the step on that ends it, the device keeps x as it is: the result does not depend on when the answer comes. If
    none has come after the last step, x is NaN where the iteration has not ended, and the error comes late, as that of
    `invfunc.exact` does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..core.context import Context, bind, tell
from ..core.couple import add_wires, affine, as_law, sum_per_sample
from ..core.op import VJP, Again, Inverse, Invertible, Pair, Residue, graph_leaves, name_of
from ..core.precision import at_least
from ..debug import checking
from ..engine.buffers import leave_buffers
from ..engine.devices import Answers, Late, when_here
from ..engine.interface import Options, Run
from ..engine.lower import engine_for, runs_plainly
from ..errors import DomainError, OptionError, WireError, check_option
from ..log_det import log_abs_det, log_det
from ..wires import Wire, describe, is_differentiable, leaves, map_wire, spread

# ---- a primitive whose inverse is solved for -------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Solved(Pair):
    """A primitive on x, or on ``(x, *context)``, whose inverse solves an equation for x; see NOTE [Implicit]."""

    adjoint_fn: Callable[..., Tensor] | None = None  # (gx, x, *context) -> gy with J(x)^T gy = gx

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        return SolvedInverse(self).forward(y)

    def inverted(self) -> Invertible:
        return SolvedInverse(self)


@dataclass(frozen=True, repr=False)
class SolvedInverse(Inverse):
    """The inverse of a `Solved` op, with implicit gradients."""

    op: Solved
    implicit = True

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        if runs_plainly():
            return spread(self.op.inverse_fn, x), None
        if _torch.active() or torch.compiler.is_compiling():
            engine = engine_for(self, x)
            run = Run(engine, Options(drift="off")) if engine is not None else None
            return spread(self.op.inverse_fn, x) if run is None else run.on_trunk(self, x), None
        with torch.no_grad(), leave_buffers(self.op.functions):
            solution = spread(self.op.inverse_fn, map_wire(_detached, x))
        return self._connected(solution, x), None

    def rebuild(self, residue: Residue, y: Wire, again: Again) -> Wire:
        """The op gives x, and what is saved of it; nothing is solved again."""
        like = again.like
        needs = any([leaf is not None and leaf.kind for leaf in leaves(_parts(like)[0])])
        x = again.evaluate(partial(self._evaluated, needs), y, _like(like, None, _parts(like)[1:]))
        return map_wire(_detached, x)

    def _evaluated(self, needs: bool, *solution: Wire) -> Wire:
        found, *context = solution
        value, *_ = _parts(spread(self.op.forward_fn, solution if context else found))
        self._connect(found, context, value.detach().requires_grad_(needs), value)
        return (value, *context) if context else value

    def _connected(self, solution: Wire, x: Wire) -> Wire:
        """The solution with its implicit gradient: rule 1 of NOTE [Implicit]; x is what the op calls y."""
        (y, *context), found = _parts(x), _parts(solution)[0].detach()
        value, *_ = _parts(spread(self.op.forward_fn, _like(x, found, context)))
        return _like(x, self._connect(found, context, y, value), context)

    def _connect(self, found: Tensor, context: list[Any], y: Tensor, value: Tensor) -> Tensor:
        closed = graph_leaves([value], set()) if value.requires_grad else []
        tensors = list({id(t): t for t in [*filter(is_differentiable, leaves(tuple(context))), *closed]}.values())
        return _Solve.apply(self.op, found, tuple(context), y, value, *tensors)

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        """Rule 1 of NOTE [Implicit]; y is what the op calls x."""
        assert self.op.adjoint_fn is not None
        (x, *context), (gx, *gcontext) = _parts(y), _parts(gy)
        solved = vjp.run(self.op.adjoint_fn, (torch.zeros_like(x) if gx is None else gx, x, *context))
        rebuilt, pull = vjp(self.op.forward_fn, y, _like(y, False, map(_differentiable, context)))
        _, *gpassed = _parts(pull(_like(y, -solved, map(_nothing, context))))
        return rebuilt, _like(y, solved, map(add_wires, gcontext, gpassed))

    def inverted(self) -> Invertible:
        return self.op


class _Solve(torch.autograd.Function):
    """``(op, x, context, y, F(x), *tensors) -> x``: its gradient is ``J^-T gx`` for y, and its negative for F(x).

    ``tensors`` are what F depends on beside x. Where the gradient will be differentiated again, F is evaluated at x as
    a function of y and of them, and their gradients are taken from there: that of F(x), where x was a constant, would
    be right, and its own gradient wrong.
    """

    @staticmethod
    def forward(
        ctx: Any, op: Solved, found: Tensor, context: Any, y: Tensor, value: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.op, ctx.context, ctx.count = op, context, 5 + len(tensors)
        ctx.set_materialize_grads(False)
        out = found.detach()
        ctx.save_for_backward(out, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, gx: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if gx is None:  # below `_stopping`
            return (None,) * ctx.count
        x, *tensors = ctx.saved_tensors
        solved = ctx.op.adjoint_fn(gx, x, *ctx.context)
        if not torch.is_grad_enabled():
            return (None, None, None, solved, -solved, *[None] * len(tensors))
        value, *_ = _parts(ctx.op.forward_fn(_Stop.apply(x), *ctx.context))
        wanted = [t for t in tensors if t.requires_grad]
        if not (wanted and value.requires_grad):
            return (None, None, None, solved, None, *[None] * len(tensors))
        with _stopping():
            given = torch.autograd.grad(value, wanted, -solved, create_graph=True, allow_unused=True)
        gradients = {id(t): g for t, g in zip(wanted, given, strict=True)}
        return (None, None, None, solved, None, *[gradients.get(id(t)) for t in tensors])


class _Stop(torch.autograd.Function):
    """``x -> x``, whose gradient does not go on while `_stopping`: it would come back to the node that asks for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None if getattr(_STOPPING, "on", False) else g


_STOPPING = threading.local()  # backward runs on the thread that has called it


@contextmanager
def _stopping() -> Iterator[None]:
    before = getattr(_STOPPING, "on", False)
    _STOPPING.on = True
    try:
        yield
    finally:
        _STOPPING.on = before


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _parts(wire: Wire) -> tuple[Any, ...]:
    return wire if isinstance(wire, tuple) else (wire,)


def _like(wire: Wire, first: Any, rest: Iterable[Any]) -> Wire:
    """A wire that is a tuple if another is."""
    return (first, *rest) if isinstance(wire, tuple) else first


def _differentiable(wire: Wire) -> Wire:
    return map_wire(is_differentiable, wire)


def _nothing(wire: Wire) -> Wire:
    return map_wire(_none, wire)


def _none(leaf: Any) -> None:
    return None


# ---- fixed points ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """When an iteration ends, and what its error says."""

    subject: str
    tolerance: float | None
    max_iterations: int


@dataclass(frozen=True)
class FixedPoint:
    """``y -> x`` with ``x + fn(x) = y``."""

    fn: Callable[..., Tensor]
    limits: Limits

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, y: Tensor, *context: Wire) -> Wire:
        x = self._solve_forward(y, context) if _torch.forward_mode() else self._solve(y, context)
        return (x, *context) if context else x

    def _solve(self, y: Tensor, context: tuple[Wire, ...]) -> Tensor:
        with _torch.parametrized_once():  # rule 5 of NOTE [Implicit]
            fn = self.fn.linearised(*context) if isinstance(self.fn, Adjoint) else _with(self.fn, context)
            return _iterate(partial(_fixed_point_step, fn, y), y, self.limits, context)

    def _solve_forward(self, y: Tensor, context: tuple[Wire, ...]) -> Tensor:
        """Rule 4 of NOTE [Implicit]."""
        fn = _with(self.fn, context)
        with _torch.without_tangents(), torch.no_grad():
            x = self._solve(y, context)
            count = _steps_to_forget(fn, x, self.limits)
        with _torch.parametrized_once():  # rule 5 of NOTE [Implicit]
            for _ in range(count):
                x = y - fn(x)
        return x


def _fixed_point_step(fn: Callable[[Tensor], Tensor], y: Tensor, x: Tensor) -> Tensor:
    return y - fn(x)


def _with(fn: Callable[..., Any], context: tuple[Wire, ...]) -> Callable[[Tensor], Any]:
    return partial(_called_with, fn, context) if context else fn


def _called_with(fn: Callable[..., Any], context: tuple[Wire, ...], x: Tensor) -> Any:
    return fn(x, *context)


@dataclass(frozen=True)
class Adjoint:
    """``(g, x, *context) -> J(x)^T g``, where J is the Jacobian of fn."""

    fn: Callable[..., Tensor]

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, g: Tensor, x: Tensor, *context: Wire) -> Tensor:
        return self.linearised(x, *context)(g)

    def linearised(self, x: Tensor, *context: Wire) -> Callable[[Tensor], Tensor]:
        """The same as a function of g, with fn evaluated here, once for all g."""
        return _transposed(_with(self.fn, context), x)


def _transposed(fn: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """``g -> J(x)^T g``."""
    return partial(_only, torch.func.vjp(fn, x)[1])


def _only(pull: Callable[[Tensor], tuple[Tensor]], g: Tensor) -> Tensor:
    return pull(g)[0]


def _iterate(step: Callable[[Tensor], Tensor], y: Tensor, limits: Limits, context: Wire) -> Tensor:
    """``x <- step(x)`` from y until it stands still, or an error; y sets the scale beside x.

    A row of y, or of its context, that is not finite has no solution, and says nothing of the others: it becomes NaN.
    """
    enough, nearly = (limits.tolerance, 0.0) if limits.tolerance else _tolerances(y)
    rows, hear = _finite_rows(y, context), partial(_has_ended, limits, enough)
    x, ended = _until(_Standstill(_only_of(rows, y), enough, nearly, rows), hear, step, y, limits.max_iterations)
    x = x if rows is None else torch.where(rows, x, float("nan"))
    return x if ended is True else torch.where(ended, x, float("nan"))


def _finite_rows(y: Tensor, context: Wire) -> Tensor | None:
    """Which rows are finite, of a shape that meets y; None where all of them are known to be."""
    beside = [t for t in leaves(context) if isinstance(t, Tensor) and t.dim() and t.shape[:1] == y.shape[:1]]
    rows = torch.stack([t.isfinite() if t.dim() < 2 else t.isfinite().flatten(1).all(1) for t in (y, *beside)]).all(0)
    if y.is_cpu and bool(_torch.unwrapped(rows).all()):  # a device would have to be waited for
        return None
    return rows.view(rows.shape + (1,) * (y.dim() - rows.dim()))


def _only_of(rows: Tensor | None, x: Tensor) -> Tensor:
    return x if rows is None else torch.where(rows, x, 0)


def _has_ended(limits: Limits, enough: float, answer: Iterable[Any]) -> bool:
    """Whether an iteration has ended; raises if it never will."""
    ends, goes_on, moved, ratio, count = answer
    if ends or (goes_on and count < limits.max_iterations):
        return bool(ends)
    raise DomainError(
        f"{limits.subject}: its inverse did not converge in {count:.0f} iterations",
        expected=f"f with a Lipschitz constant below 1, and steps down to {enough:.2g} of x",
        got=f"a step of {moved:.2g}, {ratio:.3g} of the one before it",
        cure="bound every layer of f with torch.nn.utils.parametrizations.spectral_norm (and scale it below 1), leave "
        "dropout out of it, or raise max_iterations or tolerance",
    )


def _until(
    judge: _Standstill, hear: Callable[[Iterable[Any]], bool], step: Callable[[Tensor], Tensor], x: Tensor, most: int
) -> tuple[Tensor, Any]:
    """``x <- step(x)`` until it is heard that it has ended, or a number of times; and whether it has.

    Rule 6 of NOTE [Implicit]: a device tells it late. So x stays there as it was when it had ended.
    """
    ended, made, apart, answers = False, 0, _apart(x), Answers()
    while made < most:
        last, new = x, step(x)
        for _ in range(min(apart, most - made) - 1):
            last, new = new, step(new)
        made = min(made + apart, most)
        ends, goes_on, moved, ratio = judge(last, new)
        x, ended = new if ended is False else torch.where(ended, x, new), ends | ended
        answer = (ended, goes_on, moved, ratio, made)
        if any(map(hear, [answer] if x.is_cpu else answers.ask(_numbers(*answer)))):
            return x, True
    when_here(answers.late, partial(_hear, hear, answers.late))
    return x, ended


def _numbers(ended: Tensor, goes_on: Tensor, moved: Tensor, ratio: Tensor, made: int) -> Tensor:
    return torch.stack([ended.to(moved.dtype), goes_on.to(moved.dtype), moved, ratio, torch.full_like(moved, made)])


def _hear(hear: Callable[[Iterable[Any]], bool], late: Iterable[Late]) -> None:
    any(hear(answer.values()) for answer in late)


def _tolerances(x: Tensor) -> tuple[float, float]:
    """How small a step ends the iteration, and how small one does that is not shorter than the one before.

    The steps of a contraction grow shorter until rounding stops them: that of x, or that of autocast inside f.
    """
    eps, device = torch.finfo(x.dtype).eps, x.device.type
    coarse = torch.finfo(torch.get_autocast_dtype(device)).eps if torch.is_autocast_enabled(device) else eps
    return 8 * eps if eps < 1e-5 else eps, 1024 * coarse if coarse < 1e-5 else coarse**0.5


def _apart(x: Tensor) -> int:
    """How many steps lie between two answers."""
    return 1 if x.is_cpu else 4


@dataclass
class _Standstill:
    """Judges an iteration by its steps: their size beside that of x and y, and whether they still grow shorter."""

    y: Tensor
    enough: float
    nearly: float = 0.0
    rows: Tensor | None = None  # those that count
    before: Any = float("inf")
    first: Any = None

    def __call__(self, last: Tensor, new: Tensor) -> tuple[Any, ...]:
        """Whether it stands still, whether it may yet, and the step beside x and beside the one before."""
        moved, length, scale = _sizes(_only_of(self.rows, new - last), _only_of(self.rows, new), self.y)
        moved = moved / scale
        ends = (moved <= self.enough) | ((moved <= self.nearly) & (length >= self.before))
        self.first = length if self.first is None else self.first
        goes_on = (length <= 1e6 * self.first) & (1e6 * self.first < float("inf"))  # it does not diverge, nor is NaN
        ratio, self.before = (length / self.before) ** (1 / _apart(new)), length
        return ends, goes_on, moved, ratio


def _sizes(step: Tensor, *others: Tensor) -> Iterable[Any]:
    """The largest value and the length of a step, and the largest value of others, over all samples."""
    scale = torch.stack(list(map(_largest_of, others))).max().clamp(min=torch.finfo(step.dtype).tiny)
    sizes = torch.stack((_largest_of(step), torch.linalg.vector_norm(_flat(step)), scale))
    return sizes.tolist() if sizes.is_cpu else sizes.to(torch.promote_types(sizes.dtype, torch.float32)).unbind()


def _flat(tensor: Tensor) -> Tensor:
    return _torch.unwrapped(tensor).detach().flatten()


def _largest_of(tensor: Tensor) -> Tensor:
    flat = _flat(tensor).abs()
    return flat.max() if flat.numel() else flat.new_zeros(())


def _largest(tensor: Tensor) -> float:
    return _largest_of(tensor).item()


def _steps_to_forget(fn: Callable[[Tensor], Tensor], x: Tensor, limits: Limits) -> int:
    """Rule 4 of NOTE [Implicit]: how often f's Jacobian has to be applied until a vector without structure is gone."""
    transposed = _transposed(fn, x)
    noise = torch.arange(1, x.numel() + 1, device=x.device).mul(12.9898).sin().to(x.dtype).view(x.shape)
    vanished, count = torch.finfo(x.dtype).eps * _largest(noise), 0
    while _largest(noise) > vanished and count < limits.max_iterations:
        noise, count = transposed(noise).nan_to_num(0, 0, 0), count + 1  # a row that is not finite does not count
    return count + count // 2 + 1


# ---- residual flows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Residual:
    """``x -> x + fn(x)``."""

    fn: Callable[..., Tensor]
    label: str

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, x: Tensor, *context: Wire) -> Wire:
        t = self.fn(x, *context)
        if not isinstance(t, Tensor) or t.shape != x.shape:
            raise WireError(f"{self.label}: f returned {describe(t)}", expected=f"{describe(x)} like its input")
        if checking():
            self._check_contraction(_with(self.fn, context), x)
        return (x + t, *context) if context else x + t

    def _check_contraction(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with torch.no_grad():
            slope = _steepness(fn, x)
        if slope >= 1:
            raise DomainError(
                f"{self.label}: f is not a contraction",
                expected="a Lipschitz constant below 1",
                got=f"at least {slope:.4g} at this input",
                cure="bound every layer with torch.nn.utils.parametrizations.spectral_norm and scale it below 1",
            )


def _steepness(fn: Callable[[Tensor], Tensor], x: Tensor, steps: int = 20) -> float:
    """A lower bound of the spectral norm of f's Jacobian at x, the largest of the batch, by power iteration."""
    transposed = _transposed(fn, x)
    v, scale = torch.ones_like(x), x.new_zeros(())
    for _ in range(steps):
        u = torch.func.jvp(fn, (x,), (v,))[1]
        scale = sum_per_sample(u * u).sqrt() / sum_per_sample(v * v).sqrt()
        v = transposed(u)
        v = v / _largest(v) if _largest(v) else torch.ones_like(x)
    return _largest(torch.nan_to_num(scale))


def residual_flow(
    fn: Callable[[Tensor], Tensor],
    *,
    tolerance: float | None = None,
    max_iterations: int = 500,
    log_det: Callable[[Callable[..., Any], Tensor], Tensor] | None = None,
) -> Invertible:
    r"""A residual block that is invertible because its branch is a contraction.

    .. math:: y = x + f(x), \qquad x = \lim_k x_k,\; x_{k+1} = y - f(x_k),\; x_0 = y, \qquad Lip(f) < 1

    Args:
        fn: The branch f, a callable or module with Lipschitz constant below 1: layers under
            `torch.nn.utils.parametrizations.spectral_norm`, each followed by a factor below 1, between activations with
            slope at most 1. It is a function of x alone: no dropout, no batch statistics.
        tolerance: The iteration ends when no element moves by more than this part of the largest; by default when it
            moves by a few units in the last place, or has stopped to come closer. The error of x is at most
            ``Lip / (1 - Lip)`` times that.
        max_iterations: When it has not ended by then, it raises.
        log_det: How the log-determinant is computed: `exact_log_det` (the default), `power_series_log_det`,
            `roulette_log_det`, or any function ``(fn, x) -> (N,)``.

    Shapes:
        ``(N, ...)``, unchanged; floating dtypes.

    Domain:
        All of it, onto all of it. In the inverse, a row of the batch that is not finite becomes NaN, and does not count
        for convergence: the others are what they are without it.

    Cost:
        Forward evaluates f once. The inverse evaluates it :math:`\log(tolerance) / \log(Lip)` times, at worst: 20 times
        in float32 at Lip = 0.5 and 130 at 0.9, in float64 50 and 330. Lowered: nothing is kept but what f closes over,
        and backward takes one inverse and one evaluation with its vjp. ``checkpoint(invert(op))`` keeps as little; its
        backward evaluates f twice, and its vjp about as often as forward has evaluated f. Gradients through the inverse
        are implicit in plain autograd too: no iteration is taped. On a device the host does not wait to be told that
        an iteration has ended: some evaluations more are made, at most 20, and change nothing.

    Raises:
        OptionError: When ``fn`` is no function, or a limit is not positive.
        DomainError: When the iteration does not converge for finite rows: always, never silently. On a device it may
            come with a later pipeline; until then x is NaN. In debug mode, also in forward when f's Jacobian at x has a
            norm of 1 or more.
        WireError: When f returns another shape than it was given.

    Limits:
        Outside of debug mode nothing proves that f is a contraction. If it is not, an iteration that converges all the
        same may have found another x. In half precision and under autocast, x comes back to about ``eps / (1 - Lip)``.
        While a CUDA graph is captured nothing is told: ``max_iterations`` are made, and x is NaN if they are too few.
        In forward mode the derivative waits for the device in each iteration.
        The number of iterations depends on data, so neither the inverse nor a lowered step compiles with
        ``fullgraph=True`` (one in mode ``"recompute"`` does), and the inverse's gradient is not one for
        ``torch.autograd.grad(..., is_grads_batched=True)``: `torch.func.jacrev` is.

    Example:
        >>> import torch
        >>> op = residual_flow(torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Softsign()))
        >>> x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
        >>> bool(torch.allclose(op.inverse(op(x)), x))
        True

    Source:
        Behrmann et al., Invertible Residual Networks (2019); Chen et al., Residual Flows (2019); Bai et al., Deep
        Equilibrium Models (2019), for the implicit gradient.
    """
    if not callable(fn):
        raise OptionError(f"residual_flow: got {describe(fn)}", expected="a function or a module")
    check_option("residual_flow: max_iterations", max_iterations, lambda most: most >= 1, "a positive number")
    if tolerance is not None:
        check_option("residual_flow: tolerance", tolerance, lambda tolerance: tolerance > 0, "a positive number")
    limits = Limits(f"residual_flow({name_of(fn)})", tolerance, max_iterations)
    return residual(fn, limits, log_det or exact_log_det())


def residual(fn: Callable[..., Tensor], limits: Limits, rule: Callable[..., Tensor] | None) -> Solved:
    """The op of `residual_flow`; on a wire ``(x, *context)``, fn receives the context, too."""
    log_det_fn = None if rule is None else partial(_residual_log_det, rule, fn)
    forward, inverse = Residual(fn, limits.subject), FixedPoint(fn, limits)
    return Solved(forward, inverse, None, log_det_fn, False, limits.subject, ResidualAdjoint(fn, limits))


@dataclass(frozen=True)
class ResidualAdjoint:
    """``(gx, x, *context) -> gy`` with ``gy + J(x)^T gy = gx``: the inverse of a residual flow."""

    fn: Callable[..., Tensor]
    limits: Limits

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, gx: Tensor, x: Tensor, *context: Wire) -> Tensor:
        limits = Limits(f"{self.limits.subject}, gradient of its inverse", None, 2 * self.limits.max_iterations)
        return residual(Adjoint(self.fn), limits, None).inverse((gx, x, *context))[0]


# ---- log-determinants of I + J -------------------------------------------------------------------------------------


def _residual_log_det(rule: Callable[..., Tensor], fn: Callable[..., Any], x: Wire, y: Wire) -> Tensor:
    x, *context = _parts(x)
    return rule(_with(fn, tuple(context)), x)


@dataclass(frozen=True)
class ExactLogDet:
    """Built by `exact_log_det`."""

    def __call__(self, fn: Callable[..., Any], x: Tensor) -> Tensor:
        size = x.shape[1:].numel()
        basis = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:])
        rows = torch.func.vmap(_transposed(fn, x))(basis.expand(size, *x.shape))
        jacobian = rows.flatten(2).movedim(0, 1)
        return log_abs_det(torch.eye(size, dtype=at_least(x.dtype), device=x.device) + jacobian)


def exact_log_det() -> Callable[..., Tensor]:
    r"""The log-determinant of a residual flow from its whole Jacobian: the default.

    .. math:: \log|\det(I + J_f(x))|

    Cost:
        For D elements in a sample: D vjps of f, :math:`N D^2` numbers, and N factorisations of :math:`O(D^3)`.

    Limits:
        f must treat samples independently, and write into no buffer, as spectral norms of other packages do in every
        call: it runs below `torch.func`, which refuses that. `residual_branch` makes a branch that does not.

    Example:
        >>> import torch
        >>> exact_log_det()(torch.nn.Softsign(), torch.zeros(1, 3))
        tensor([2.0794])
    """
    return ExactLogDet()


@dataclass(frozen=True)
class SeriesLogDet:
    """Built by `power_series_log_det` and `roulette_log_det`."""

    terms: int
    keep: float | None
    probes: int

    def __call__(self, fn: Callable[..., Any], x: Tensor) -> Tensor:
        transposed = _transposed(fn, x)
        return torch.stack([self._probe(transposed, x) for _ in range(self.probes)]).mean(0)

    def _probe(self, transposed: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        terms = self.terms + (0 if self.keep is None else _geometric(self.keep))
        probe = torch.randint_like(x, 2) * 2 - 1
        power, weight, total = probe, 1.0, x.new_zeros(x.shape[:1])
        for k in range(1, terms + 1):
            if self.keep is not None and k > self.terms:
                weight /= self.keep  # 1 / the probability of coming as far as this term
            power = transposed(power)
            total = total - (-1) ** k * weight / k * sum_per_sample(power * probe)
        return total


def _geometric(keep: float) -> int:
    """How often a coin that falls on "go on" with this probability does so before it does not."""
    count = 0
    while torch.rand((), device="cpu").item() < keep:
        count += 1
    return count


def power_series_log_det(terms: int = 10, probes: int = 1) -> Callable[..., Tensor]:
    r"""The log-determinant of a residual flow by a truncated power series of Hutchinson's trace estimates.

    .. math:: \log\det(I + J) = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \mathrm{tr}\, J^k
              \approx \sum_{k=1}^{terms} \frac{(-1)^{k+1}}{k} v^\top J^k v, \qquad v \in \{-1, 1\}^D

    Args:
        terms: The terms that are summed. The bias is at most :math:`D \, Lip^{terms+1} / ((terms + 1)(1 - Lip))`.
        probes: The random vectors v that are averaged over; the variance falls as 1 / probes.

    Cost:
        ``terms * probes`` vjps of f.

    Limits:
        A biased estimate with noise. Lowered, backward replays the same v. Under `torch.vmap`, pass
        ``randomness="different"``.

    Example:
        >>> import torch
        >>> rule = power_series_log_det(terms=30)
        >>> x = torch.ones(1, 3)
        >>> bool(torch.allclose(rule(torch.nn.Softsign(), x), exact_log_det()(torch.nn.Softsign(), x)))
        True

    Source:
        Behrmann et al., Invertible Residual Networks (2019).
    """
    _check_series("power_series_log_det", terms, probes)
    return SeriesLogDet(terms, None, probes)


def roulette_log_det(terms: int = 2, keep: float = 0.5, probes: int = 1) -> Callable[..., Tensor]:
    r"""The log-determinant of a residual flow by a power series of random length: an unbiased estimate.

    .. math:: \log\det(I + J) = E_{n, v} \sum_{k=1}^{n} \frac{(-1)^{k+1}}{k \, P(n \ge k)} v^\top J^k v

    Args:
        terms: The terms that are always summed.
        keep: The probability of going on after each further term.
        probes: The random vectors that are averaged over.

    Cost:
        ``(terms + keep / (1 - keep)) * probes`` vjps of f on average.

    Raises:
        OptionError: When ``keep`` is not between 0 and 1.

    Limits:
        The variance is finite only if ``Lip**2 < keep``. Noise is as in `power_series_log_det`.

    Example:
        >>> import torch
        >>> roulette_log_det()(torch.nn.Softsign(), torch.ones(4, 3)).shape
        torch.Size([4])

    Source:
        Chen et al., Residual Flows for Invertible Generative Modeling (2019).
    """
    _check_series("roulette_log_det", terms, probes)
    check_option("roulette_log_det: keep", keep, lambda keep: 0 < keep < 1, "a probability between 0 and 1")
    return SeriesLogDet(terms, keep, probes)


def _check_series(subject: str, terms: int, probes: int) -> None:
    for name, count in ("terms", terms), ("probes", probes):
        check_option(f"{subject}: {name}", count, lambda count: count >= 1, "at least one")


# ---- autoregressive flows --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Autoregressive:
    """``x -> law(net(x))(x)``, and what else is known of it."""

    net: Callable[[Tensor], Wire]
    law: Callable[..., Invertible]
    dim: int
    label: str

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's functions that this object calls."""
        return (self.net, self.law)

    def __call__(self, x: Tensor, *context: Wire) -> Wire:
        t = self.given(x, context)
        if checking():
            self._check_order(x, t, context)
        y = self.op(t).forward(x)
        return (y, *context) if context else y

    def given(self, x: Tensor, context: tuple[Wire, ...]) -> tuple[Tensor, ...]:
        """What the net tells the law, as a tuple."""
        if not isinstance(x, Tensor) or not -x.dim() <= self.dim < x.dim():
            raise WireError(f"{self.label} received {describe(x)}", expected=f"a tensor with a dim {self.dim}")
        told = self.net(x, *context)
        t = _parts(told)
        for part in t:
            fits = isinstance(part, Tensor) and part.dim() >= x.dim()
            if not fits or part.shape[self._at(x)] != x.shape[self.dim]:
                raise WireError(
                    f"{self.label}: the net returned {describe(told)}",
                    expected=f"tensors like {describe(x)}, with {x.shape[self.dim]} elements along dim {self.dim}",
                    cure="wrap the net to get (s, t): exp_scale(net), sigmoid_scale(net), tanh_scale(net, bound)",
                )
        return t

    def op(self, t: tuple[Tensor, ...]) -> Invertible:
        """The law's op."""
        op = self.law(*t)
        if not isinstance(op, Invertible):
            raise OptionError(f"{self.label}: the law returned {type(op).__name__}", expected="an invertible op")
        return op

    def solve(self, y: Tensor, *context: Wire) -> Wire:
        """The inverse: element i needs the parameters of element i alone, which need the elements before it."""
        dim = self._at(y)
        solved, rest = y.narrow(dim, 0, 0), torch.zeros_like(y)
        for i in range(y.shape[dim]):
            t = self.given(torch.cat((solved, rest.narrow(dim, i, y.shape[dim] - i)), dim), context)
            x = self.op(tuple(part.narrow(dim, i, 1) for part in t)).inverse(y.narrow(dim, i, 1))
            solved = torch.cat((solved, x), dim)
        return (solved, *context) if context else solved

    def adjoint(self, gx: Tensor, x: Tensor, *context: Wire) -> Tensor:
        """``J^T g = gx`` for a triangular J: Jacobi's iteration ends after as many steps as there are elements."""
        t = self.given(x, context)
        transposed = _transposed(partial(self._alone, context), x)
        diagonal = _transposed(self.op(t).forward, x)(torch.ones_like(x))
        g, step, count = gx / diagonal, partial(_jacobi_step, transposed, gx, diagonal), x.shape[self.dim]
        if not torch.is_grad_enabled() and not _torch.forward_mode():
            judge = _Standstill(gx.new_zeros(()), 2 * torch.finfo(g.dtype).eps)
            return _until(judge, _is_first, step, g, count)[0]
        for _ in range(count):
            g = step(g)
        return g

    def _alone(self, context: tuple[Wire, ...], x: Tensor) -> Tensor:
        return self.op(self.given(x, context)).forward(x)

    def log_det(self, x: Wire, y: Wire) -> Tensor:
        """The law's."""
        x, *context = _parts(x)
        return log_det(self.op(self.given(x, tuple(context))), x)[1]

    def _at(self, x: Tensor) -> int:
        return self.dim % x.dim()

    def _check_order(self, x: Tensor, t: tuple[Tensor, ...], context: tuple[Wire, ...]) -> None:
        """Change the elements from i on: what the net says of the elements up to i must not change."""
        dim = self._at(x)
        with torch.no_grad():
            for i in range(x.shape[dim]):
                other = torch.cat((x.narrow(dim, 0, i), x.narrow(dim, i, x.shape[dim] - i) + 1), dim)
                for part, moved in zip(t, self.given(other, context), strict=True):
                    self._check_same(i, part.narrow(dim, 0, i + 1), moved.narrow(dim, 0, i + 1))

    def _check_same(self, i: int, part: Tensor, moved: Tensor) -> None:
        apart = _largest(part - moved)
        if not apart <= torch.finfo(part.dtype).eps ** 0.5 * max(_largest(part), 1.0):
            raise DomainError(
                f"{self.label}: the net is not autoregressive along dim {self.dim}",
                expected=f"parameters of elements 0 to {i} that depend only on the elements before each",
                got=f"a change by {apart:.3g} when elements from {i} on change",
                cure="mask the net, and shift its output by one element if element i sees itself",
            )


def _jacobi_step(transposed: Callable[[Tensor], Tensor], gx: Tensor, diagonal: Tensor, g: Tensor) -> Tensor:
    return g + (gx - transposed(g)) / diagonal


def _is_first(answer: Iterable[Any]) -> bool:
    return bool(next(iter(answer)))


def autoregressive(
    net: Callable[[Tensor], Wire], *, law: Callable[..., Invertible] = affine, dim: int = 1
) -> Invertible:
    r"""Each element is changed by what a masked net reads from the elements before it.

    .. math:: y_i = law\bigl(net(x_1, \dots, x_{i-1})\bigr)(x_i)

    Args:
        net: A masked callable or module (MADE, causal convolution, causal transformer), which you supply: what it
            returns at place i along ``dim`` depends on the places before i only. It returns what the law needs, one
            tensor or a tuple; `exp_scale` and its kin make ``(s, t)`` for `affine` of it.
        law: As in `couple`, elementwise.
        dim: The dimension that is ordered.

    Shapes:
        ``(N, ..., D, ...)``, unchanged, with D elements along ``dim``; floating dtypes. Each tensor from the net has
        the same D there.

    Domain:
        All that the law takes, onto all that it makes: for `additive` and `affine` all of it, onto all of it.

    Cost:
        Forward evaluates the net once; the inverse D times, one element after another. Lowered: nothing is kept but
        what the net closes over, and backward takes one inverse. So train the inverse where you can: the forward of
        ``checkpoint(invert(op))`` is sequential, but its backward evaluates the net three times and its vjp up to D
        times. Gradients through the inverse are implicit in plain autograd too.

    Log-determinant:
        The law's; it evaluates the net once more.

    Raises:
        OptionError: When the net is no function.
        DomainError: In debug mode, when the net is not autoregressive; the check evaluates it D times.
        WireError: When the net returns other shapes.

    Limits:
        A net that is not autoregressive has no such inverse and, lowered, trains wrong: check yours once in debug mode.
        The inverse looks at data, so that its gradient is not one for ``torch.autograd.grad(...,
        is_grads_batched=True)``: `torch.func.jacrev` is.

    Example:
        >>> import torch
        >>> class Before(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.exp(x[:, :1].expand(x.shape) * torch.tensor([0.0, 1.0])), torch.zeros_like(x)
        >>> op = autoregressive(Before())
        >>> op(torch.tensor([[1.0, 2.0]]))
        tensor([[1.0000, 5.4366]])
        >>> op.inverse(op(torch.tensor([[1.0, 2.0]])))
        tensor([[1., 2.]])

    Source:
        Papamakarios et al., Masked Autoregressive Flow (2017); Kingma et al., Inverse Autoregressive Flow (2016).
    """
    if not callable(net):
        raise OptionError(f"autoregressive: got {describe(net)}", expected="a function or a module")
    label = f"autoregressive({name_of(net)}{'' if law is affine else as_law(law).suffix})"
    return ordered(Autoregressive(net, law, dim, label))


def ordered(flow: Autoregressive) -> Solved:
    """The op of `autoregressive`; on a wire ``(x, *context)``, the net receives the context, too."""
    return Solved(flow, flow.solve, None, flow.log_det, False, flow.label, flow.adjoint)


def with_function(op: Solved, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Solved:
    """The op of a user's function, wrapped."""
    rule, inverse = op.forward_fn, op.inverse_fn
    if isinstance(rule, Autoregressive):
        return ordered(replace(rule, net=wrap(rule.net)))
    assert isinstance(rule, Residual) and isinstance(inverse, FixedPoint) and isinstance(op.log_det_fn, partial)
    return residual(wrap(rule.fn), inverse.limits, op.log_det_fn.args[0])


@bind.register
def _(op: Solved, context: Context) -> Invertible:
    return with_function(op, partial(tell, context=context))
