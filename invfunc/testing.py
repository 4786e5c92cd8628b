"""The laws of the algebra, each a function whose docstring is its equation; `check_laws` tests them on your own values.

Equations between ops compare what they do, forward and inverse, on the given input. An op with a residue is undone with
the residue that it left; the laws of an inverse leave out an op with a one-way stage, and so on: `Law.applies` tells.

Nothing here needs more than torch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .checkpoint import checkpoint
from .core.combine import _concat, _split, parallel
from .core.compare import largest, largest_difference
from .core.context import Context, with_context
from .core.couple import Half
from .core.op import Inverse, Invertible, LiveVJP, OneWay, Rearrangement, chain, check_op, invert, pair
from .engine.parts import Parts
from .errors import DriftWarning, NotDifferentiableError, NotInvertibleError
from .log_det import log_det
from .look.trial import (
    closed_over,
    differentiable,
    fresh,
    gradients_of,
    noise,
    roots,
    same_dice,
    states,
    untouched,
    vjp_of,
)
from .wires import Wire, describe, is_differentiable, leaves, map_wire, spread

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""How far two values may be apart, as a part of the larger of 1 and the largest number among those expected."""

Claim: TypeAlias = tuple[str, Wire, str, Wire]
"""One side of an equation as text and as a value, then the other."""


class LawError(AssertionError):
    """A law does not hold: its name and equation, the op, the two terms, and by how much they differ."""


# ---- what a law is -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """An equation about every op; call it with an op and an input to test it, or use `check_laws`."""

    name: str
    equation: str
    claims: Callable[[Invertible, Wire], Iterable[Claim]] = field(repr=False)
    applies: Callable[[Invertible, Wire], bool] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.equation)

    def __call__(self, op: Invertible, x: Wire, *, tolerance: float | None = None) -> None:
        """Raise `LawError` unless the law holds of ``op`` at ``x``."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DriftWarning)  # a law compares all values, the meter some
                for claim in self.claims(op, x):
                    difference = _difference(claim, tolerance)
                    if difference:
                        raise LawError(self._message(op, difference))
        except LawError:
            raise
        except Exception as error:
            raise LawError(self._message(op, f"raised {type(error).__name__}: {error}")) from error

    def _message(self, op: Invertible, difference: str) -> str:
        return f"law `{self.name}`: {self.equation}\n  f = {op!r}\n  {difference}"


def _always(op: Invertible, x: Wire) -> bool:
    return True


LAWS: dict[str, Law] = {}
"""Every law by its name."""


def law(applies: Callable[[Invertible, Wire], bool] = _always) -> Callable[[Callable[..., Iterable[Claim]]], Law]:
    """Make a law of a function that yields claims; its docstring is the equation."""

    def decorate(claims: Callable[[Invertible, Wire], Iterable[Claim]]) -> Law:
        equation = (claims.__doc__ or "").strip().removesuffix(".")
        LAWS[claims.__name__] = Law(claims.__name__, equation, claims, applies)
        return LAWS[claims.__name__]

    return decorate


def check_laws(
    op: Invertible,
    x: Wire,
    *,
    laws: Iterable[Law | str] | None = None,
    tolerance: float | None = None,
    context: Context | None = None,
) -> tuple[str, ...]:
    """Test the laws on an op of yours at an input of yours.

    Args:
        op: The op.
        x: An input from its domain; float64 shows errors of the op, not of rounding.
        laws: Which laws, by value or by name; all of `LAWS` that apply to the op by default.
        tolerance: How far the two sides may be apart, for ops whose inverse is approximate; `TOLERANCES` by default.
        context: What the functions are told by name beside the input, as in ``op(x, context=...)``.

    Returns:
        The names of the laws that were tested.

    Cost:
        Some hundred evaluations of the op; take a small input. The law of log-determinants forms the whole Jacobian; it
        leaves out inputs of more than a thousand numbers. Buffers of modules are put back afterwards.

    Raises:
        LawError: The law, the op, the two terms and the largest difference.
        OptionError: When no function takes a name of the context.

    Example:
        >>> import torch, invfunc as inv
        >>> x = torch.linspace(0.1, 1, 6, dtype=torch.float64).reshape(2, 3)
        >>> check_laws(inv.pair(torch.exp, torch.log), x, laws=["section", "retraction", "order"])
        ('section', 'retraction', 'order')
        >>> check_laws(inv.pair(torch.exp, torch.neg), x, laws=["section"])
        Traceback (most recent call last):
        invfunc.testing.LawError: law `section`: inverse(forward(x)) = x
          f = pair(exp, neg)
          inverse(forward(x)) and x: leaf 0 differs by at most 3.72 (tolerance 1e-09)
    """
    op = with_context(check_op("check_laws", op), context)
    chosen = [LAWS[item] if isinstance(item, str) else item for item in (LAWS.values() if laws is None else laws)]
    with untouched(op):
        tested = [item for item in chosen if item.applies(op, x)]
        for item in tested:
            item(op, x, tolerance=tolerance)
    return tuple(item.name for item in tested)


def _buffers(op: Invertible) -> list[Tensor]:
    return [buffer for module in Parts(op.functions).roots for buffer in module.buffers()]


# ---- comparison --------------------------------------------------------------------------------------------------


def _difference(claim: Claim, tolerance: float | None) -> str:
    """What is different about the two sides of a claim, as text; nothing when they agree."""
    left, found, right, expected = claim
    sides = f"{left} and {right}"
    if _structure(found) != _structure(expected):
        return f"{sides}: {describe(found)} is not of the structure of {describe(expected)}"
    for i, (a, b) in enumerate(zip(leaves(found), leaves(expected), strict=True)):
        apart = _leaf_difference(a, b, tolerance)
        if apart:
            return f"{sides}: leaf {i} {apart}"
    return ""


def _structure(wire: Wire) -> Any:
    return tuple(map(_structure, wire)) if isinstance(wire, tuple) else None


def _leaf_difference(a: Any, b: Any, tolerance: float | None) -> str:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return "" if a is b or (type(a) is type(b) and a == b) else f"is {a!r}, not {b!r}"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"is {a.dtype} of shape {tuple(a.shape)}, not {b.dtype} of shape {tuple(b.shape)}"
    if not is_differentiable(b):
        return "" if torch.equal(a, b) else "differs, and is not a floating-point tensor"
    return _distance(a.detach(), b.detach(), TOLERANCES[b.dtype] if tolerance is None else tolerance)


def _distance(a: Tensor, b: Tensor, tolerance: float) -> str:
    apart, allowed = largest_difference(a, b), tolerance * max(1.0, largest(b))
    if apart == math.inf:
        return "is not finite where the other is"
    return f"differs by at most {apart:.3g} (tolerance {allowed:.3g})" if apart > allowed else ""


# ---- what the laws are stated with -------------------------------------------------------------------------------


def has_inverse(op: Invertible) -> bool:
    """Whether no part of an op is one-way."""
    inner = (op.op,) if isinstance(op, Inverse) else op.parts
    return not isinstance(op, OneWay) and all(map(has_inverse, inner))


def is_undone(op: Invertible, x: Wire) -> bool:
    """Whether the op has an inverse and draws no random numbers: with them, it is another function on its way back."""
    return has_inverse(op) and not _draws(op, x)


def needs_no_residue(op: Invertible, x: Wire) -> bool:
    """Whether ``inverse(y)`` alone undoes the op at x."""
    if not is_undone(op, x):
        return False
    y, residue = op.forward_with_residue(x)
    return residue is None or _is_inverted(op, y)


def _is_inverted(op: Invertible, y: Wire) -> bool:
    try:
        op.inverse(y)
    except NotInvertibleError:
        return False
    return True


def _draws(op: Invertible, x: Wire) -> bool:
    with same_dice():
        before = states()
        op.forward_with_residue(x)
        return not all(map(torch.equal, before, states()))


def _at(op: Invertible, x: Wire) -> Wire:
    with same_dice():
        return op.forward(x)


def _undone(op: Invertible, x: Wire, y: Wire) -> Wire:
    """``op.inverse(y)``, with the residue that op leaves at x, if any."""
    with same_dice():
        residue = op.forward_with_residue(x)[1]
    with same_dice():
        return op.inverse(y) if residue is None else op.inverse_with_residue(residue, y)


def _equal(left: str, f: Invertible, right: str, g: Invertible, x: Wire) -> Iterator[Claim]:
    """Two ops do the same, forward and inverse."""
    y = _at(g, x)
    yield f"{left}(x)", _at(f, x), f"{right}(x)", y
    if is_undone(f, x) and is_undone(g, x):
        yield f"{left}.inverse(y)", _undone(f, x, y), f"{right}.inverse(y)", _undone(g, x, y)


def _double(x: Tensor) -> Tensor:
    return 2 * x


def _halve(y: Tensor) -> Tensor:
    return y / 2


def _increase(x: Tensor) -> Tensor:
    return x + 1


def _decrease(y: Tensor) -> Tensor:
    return y - 1


DOUBLE, INCREASE = pair(_double, _halve, name="double"), pair(_increase, _decrease, name="increase")


def _everywhere(op: Invertible, like: Wire) -> Invertible:
    """An elementwise op on every differentiable leaf of a wire."""
    if isinstance(like, tuple):
        return parallel(*(_everywhere(op, part) for part in like))
    return op if is_differentiable(like) else chain()


# ---- iso -----------------------------------------------------------------------------------------------------------


@law(is_undone)
def section(f: Invertible, x: Wire) -> Iterator[Claim]:
    """inverse(forward(x)) = x."""
    yield "inverse(forward(x))", _undone(f, x, _at(f, x)), "x", x


@law(is_undone)
def retraction(f: Invertible, x: Wire) -> Iterator[Claim]:
    """forward(inverse(y)) = y."""
    y = _at(f, x)
    yield "forward(inverse(y))", _at(f, _undone(f, x, y)), "y", y


@law(needs_no_residue)
def involution(f: Invertible, x: Wire) -> Iterator[Claim]:
    """invert(invert(f)) = f, invert(f)(y) = f.inverse(y)."""
    yield from _equal("invert(invert(f))", invert(invert(f)), "f", f, x)
    y = _at(f, x)
    yield "invert(f)(y)", _at(invert(f), y), "f.inverse(y)", f.inverse(y)
    yield "invert(f).inverse(x)", invert(f).inverse(x), "f(x)", y


@law()
def hidden(f: Invertible, x: Wire) -> Iterator[Claim]:
    """forward(x), _ = forward_with_residue(x)."""
    with same_dice():
        y, _ = f.forward_with_residue(x)
    yield "forward(x)", _at(f, x), "forward_with_residue(x)", y


# ---- category and groupoid -----------------------------------------------------------------------------------------


@law()
def identities(f: Invertible, x: Wire) -> Iterator[Claim]:
    """chain(chain(), f) = f = chain(f, chain())."""
    yield from _equal("chain(chain(), f)", chain(chain(), f), "f", f, x)
    yield from _equal("chain(f, chain())", chain(f, chain()), "f", f, x)


def _g_and_h(f: Invertible, x: Wire) -> tuple[Invertible, Invertible]:
    """Two ops that can follow f, and that do not commute."""
    y = _at(f, x)
    return _everywhere(DOUBLE, y), _everywhere(INCREASE, y)


@law()
def associativity(f: Invertible, x: Wire) -> Iterator[Claim]:
    """chain(chain(f, g), h) = chain(f, chain(g, h))."""
    g, h = _g_and_h(f, x)
    left, right = chain(chain(f, g), h), chain(f, chain(g, h))
    yield from _equal("chain(chain(f, g), h)", left, "chain(f, chain(g, h))", right, x)


@law()
def order(f: Invertible, x: Wire) -> Iterator[Claim]:
    """chain(f, g, h)(x) = h(g(f(x)))."""
    g, h = _g_and_h(f, x)
    yield "chain(f, g, h)(x)", _at(chain(f, g, h), x), "h(g(f(x)))", h.forward(g.forward(_at(f, x)))


@law(needs_no_residue)
def groupoid(f: Invertible, x: Wire) -> Iterator[Claim]:
    """invert(chain(f, g, h)) = chain(invert(h), invert(g), invert(f)), chain(f, invert(f)) = chain()."""
    g, h = _g_and_h(f, x)
    whole = chain(f, g, h)
    left, right = invert(whole), chain(invert(h), invert(g), invert(f))
    yield from _equal("invert(chain(f, g, h))", left, "chain(invert(h), invert(g), invert(f))", right, _at(whole, x))
    yield from _equal("chain(f, invert(f))", chain(f, invert(f)), "chain()", chain(), x)


# ---- monoidal ------------------------------------------------------------------------------------------------------


@law()
def parallel_pointwise(f: Invertible, x: Wire) -> Iterator[Claim]:
    """parallel(f, g)(x1, x2) = (f(x1), g(x2))."""
    g = _everywhere(INCREASE, x)
    yield "parallel(f, g)(x, x)", _at(parallel(f, g), (x, x)), "(f(x), g(x))", (_at(f, x), g.forward(x))
    with same_dice():
        found = parallel(g, f).forward((x, x))
    yield "parallel(g, f)(x, x)", found, "(g(x), f(x))", (g.forward(x), _at(f, x))


@law()
def parallel_identity(f: Invertible, x: Wire) -> Iterator[Claim]:
    """parallel(chain(), chain()) = chain()."""
    y = _at(f, x)
    both = parallel(chain(), chain())
    yield from _equal("parallel(chain(), chain())", both, "chain()", chain(), (x, y))


@law()
def interchange(f: Invertible, x: Wire) -> Iterator[Claim]:
    """chain(parallel(f, g), parallel(h, k)) = parallel(chain(f, h), chain(g, k))."""
    g, (h, _) = _everywhere(INCREASE, x), _g_and_h(f, x)
    k = _everywhere(DOUBLE, x)
    left, right = chain(parallel(f, g), parallel(h, k)), parallel(chain(f, h), chain(g, k))
    names = "chain(parallel(f, g), parallel(h, k))", "parallel(chain(f, h), chain(g, k))"
    yield from _equal(names[0], left, names[1], right, (x, x))


@law(needs_no_residue)
def parallel_inverse(f: Invertible, x: Wire) -> Iterator[Claim]:
    """invert(parallel(f, g)) = parallel(invert(f), invert(g))."""
    g = _everywhere(INCREASE, x)
    left, right = invert(parallel(f, g)), parallel(invert(f), invert(g))
    yield from _equal("invert(parallel(f, g))", left, "parallel(invert(f), invert(g))", right, (_at(f, x), x))


# ---- pointwise: what the algebra alone can not see -----------------------------------------------------------------


def _is_split(op: Invertible, x: Wire) -> bool:
    return isinstance(op, Rearrangement) and getattr(op.forward_fn, "func", None) in (_split, _concat)


@law(_is_split)
def split_pointwise(f: Invertible, x: Wire) -> Iterator[Claim]:
    """split(n, dim)(x) = torch.split(x, size, dim), interleaved x[i::n]; concat(...) = invert(split(...))."""
    forwards = isinstance(x, Tensor)
    whole, parts = (x, _at(f, x)) if forwards else (f.forward(x), x)
    static = f.forward_fn.args  # type: ignore[attr-defined]
    slices = tuple(whole.index_select(static[1], index.to(whole.device)) for index in _indices(whole, *static))
    yield "the components", parts, "the slices of the whole", slices


def _indices(whole: Tensor, sizes: int | tuple[int, ...], dim: int, interleaved: bool) -> list[Tensor]:
    """Where the components of a split come from."""
    all_ = torch.arange(whole.shape[dim])
    if isinstance(sizes, int):
        return [all_[i::sizes] if interleaved else all_.chunk(sizes)[i] for i in range(sizes)]
    return list(all_.split(sizes))


def _is_coupling(op: Invertible, x: Wire) -> bool:
    return isinstance(op, Half) or (bool(op.parts) and all(isinstance(part, Half) for part in op.parts))


@law(_is_coupling)
def couple_pointwise(f: Invertible, x: Wire) -> Iterator[Claim]:
    """couple(f, g)(x1, x2) = (y1, law(g(y1))(x2)) where y1 = law(f(x2))(x1)."""
    y = x
    with same_dice():
        for half in f.parts or (f,):
            assert isinstance(half, Half)
            changed, other = y if half.target == 0 else y[::-1]
            t = spread(half.fn, other)
            changed = (half.law(*t) if isinstance(t, tuple) else half.law(t)).forward(changed)
            y = (changed, other) if half.target == 0 else (other, changed)
    yield "couple(f, g)(x1, x2)", _at(f, x), "the formula", y


# ---- reverse mode --------------------------------------------------------------------------------------------------


def _same_step(left: str, f: Invertible, right: str, g: Invertible, x: Wire, twice: bool = False) -> Iterator[Claim]:
    """Two ops have the same value, and the same gradients by all that g's value depends on."""
    closed = closed_over(g, x)
    found, expected = gradients_of(f, x, closed, twice), gradients_of(g, x, closed, twice)
    for what, a, b in zip(("value", "gradient of x", "gradient of closed-over"), found, expected, strict=True):
        yield f"{what} of {left}", a, f"{what} of {right}", b


@law(is_undone)
def pullback_is_vjp(f: Invertible, x: Wire) -> Iterator[Claim]:
    """pullback(y, gy) = x, vjp(f, x)(gy)."""
    closed = closed_over(f, x)
    _, gx, gclosed = gradients_of(f, x, closed)
    with torch.no_grad():
        y, residue = f.forward_with_residue(x)
    live = LiveVJP()
    rebuilt, found = f.pull(residue, y, noise(y), live, None)
    yield "x of pullback", rebuilt, "x", x
    yield "gx of pullback", _filled(found, x), "vjp(f, x)(gy)", gx
    theirs = tuple(live.closed[id(t)][1] if id(t) in live.closed else torch.zeros_like(t) for t in closed)
    yield "closed-over gradients of pullback", theirs, "those of autograd", gclosed


def _filled(gx: Wire, x: Wire) -> Wire:
    """The gradients of the differentiable leaves of x, with zero for None."""
    found = [None] * len(leaves(x)) if gx is None else leaves(gx)
    pairs = zip(leaves(x), found, strict=True)
    return tuple(torch.zeros_like(t) if g is None else g for t, g in pairs if is_differentiable(t))


# ---- log-determinants ----------------------------------------------------------------------------------------------


_LARGEST_JACOBIAN = 1000


def _has_log_det(op: Invertible, x: Wire) -> bool:
    """Whether every part of the op has a rule, and x and y are batches of real numbers."""
    given = differentiable(x)
    if not given or sum(t.numel() for t in given) > _LARGEST_JACOBIAN or _draws(op, x):
        return False
    if any(t.is_complex() or not t.dim() or not len(t) for t in given):
        return False
    try:
        y, found = log_det(op, x)
    except NotDifferentiableError:
        return False
    return all(t.dim() and len(t) == len(found) for t in (*given, *differentiable(y)))


@law(_has_log_det)
def log_det_is_jacobian(f: Invertible, x: Wire) -> Iterator[Claim]:
    """log_det(f, x) = f(x), log|det jacobian(f, x)|."""
    y, found = log_det(f, x)
    yield "y of log_det(f, x)", y, "f(x)", _at(f, x)
    jacobian, of_y, of_x = _jacobian(f, x), _samples(differentiable(y)), _samples(differentiable(x))
    yield "sum of log_det(f, x)", found.sum(), "log|det jacobian(f, x)|", torch.linalg.slogdet(jacobian)[1]
    if not jacobian[of_y[:, None] != of_x].any():  # no sample depends on another
        blocks = [jacobian[of_y == i][:, of_x == i] for i in range(len(found))]
        each = torch.stack([torch.linalg.slogdet(block)[1] for block in blocks])
        yield "log_det(f, x)", found, "log|det jacobian| of each sample", each


def _jacobian(op: Invertible, x: Wire) -> Tensor:
    """The Jacobian of all outputs by all inputs, as one matrix."""
    given, flat = tuple(t.detach() for t in differentiable(x)), _flat(op, x)

    def fn(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in flat(*tensors) if t.numel())  # jacobian takes no empty outputs

    whole: Any = torch.autograd.functional.jacobian(fn, given)
    sizes = [leaf.numel() for leaf in fn(*given)]
    rows = [[part.reshape(n, t.numel()) for part, t in zip(row, given)] for row, n in zip(whole, sizes)]  # noqa: B905
    return torch.cat([torch.cat(row, 1) for row in rows])


def _samples(tensors: Sequence[Tensor]) -> Tensor:
    """Which element of the batch each number belongs to."""
    counts = [torch.arange(len(t), device=t.device).view(-1, *[1] * (t.dim() - 1)).expand(t.shape) for t in tensors]
    return torch.cat([count.flatten() for count in counts])


# ---- lowering ------------------------------------------------------------------------------------------------------


@law()
def checkpoint_gradients(f: Invertible, x: Wire) -> Iterator[Claim]:
    """checkpoint(f) = f, in value and in the gradient of x and of every tensor that f closes over."""
    yield from _same_step("checkpoint(f)", checkpoint(f), "f", f, x)


@law(needs_no_residue)
def checkpoint_section(f: Invertible, x: Wire) -> Iterator[Claim]:
    """checkpoint(f).inverse(checkpoint(f)(x)) = x."""
    y = checkpoint(f).forward(map_wire(fresh, x))
    yield "checkpoint(f).inverse(checkpoint(f)(x))", checkpoint(f).inverse(y), "x", x


@law()
def checkpoint_idempotent(f: Invertible, x: Wire) -> Iterator[Claim]:
    """checkpoint(checkpoint(f)) = checkpoint(f)."""
    yield from _same_step("checkpoint(checkpoint(f))", checkpoint(checkpoint(f)), "checkpoint(f)", checkpoint(f), x)


@law()
def checkpoint_modes(f: Invertible, x: Wire) -> Iterator[Claim]:
    """checkpoint(f, mode="recompute") = f = checkpoint(f, mode="store")."""
    for mode in "recompute", "store":
        yield from _same_step(f"checkpoint(f, mode={mode!r})", checkpoint(f, mode=mode), "f", f, x)


@law()
def checkpoint_composes(f: Invertible, x: Wire) -> Iterator[Claim]:
    """checkpoint(chain(f, g)) = chain(checkpoint(f), checkpoint(g)) = chain(f, g)."""
    g, _ = _g_and_h(f, x)
    plain = chain(f, g)
    yield from _same_step("checkpoint(chain(f, g))", checkpoint(plain), "chain(f, g)", plain, x)
    each = chain(checkpoint(f), checkpoint(g))
    yield from _same_step("chain(checkpoint(f), checkpoint(g))", each, "chain(f, g)", plain, x)


@law(needs_no_residue)
def checkpoint_inverse(f: Invertible, x: Wire) -> Iterator[Claim]:
    """invert(checkpoint(f)) = checkpoint(invert(f)) = invert(f)."""
    y = _at(f, x)
    yield from _same_step("invert(checkpoint(f))", invert(checkpoint(f)), "invert(f)", invert(f), y)
    yield from _same_step("checkpoint(invert(f))", checkpoint(invert(f)), "invert(f)", invert(f), y)


@law()
def checkpoint_effects(f: Invertible, x: Wire) -> Iterator[Claim]:
    """A step with checkpoint(f) leaves random numbers and buffers as one with f does."""
    found, expected = _effects(checkpoint(f), x), _effects(f, x)
    yield "random state after checkpoint(f)", found[0], "after f", expected[0]
    yield "buffers after checkpoint(f)", found[1], "after f", expected[1]


def _effects(op: Invertible, x: Wire) -> tuple[Wire, Wire]:
    """The random state and the buffers after a step."""
    given = map_wire(fresh, x)
    with same_dice(), untouched(op):
        vjp_of(roots(op.forward(given)), differentiable(given))
        return states(), tuple(buffer.clone() for buffer in _buffers(op))


@law()
def checkpoint_twice(f: Invertible, x: Wire) -> Iterator[Claim]:
    """The gradient of a gradient of checkpoint(f) is that of f."""
    yield from _same_step("gradient of checkpoint(f)", checkpoint(f), "gradient of f", f, x, twice=True)


# ---- transforms ----------------------------------------------------------------------------------------------------


def _flat(op: Invertible, x: Wire) -> Callable[..., tuple[Tensor, ...]]:
    """The op as a function of the differentiable leaves of x, to the differentiable leaves of y."""

    def fn(*tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        return tuple(
            differentiable(op.forward(map_wire(lambda leaf: next(left) if is_differentiable(leaf) else leaf, x)))
        )

    return fn


def _functional_vjp(op: Invertible, x: Wire) -> Callable[..., Wire]:
    """``(*tensors) -> (y, gx)`` by ``torch.func.vjp``, with random gradients of y."""
    fn, seeds = _flat(op, x), tuple(differentiable(noise(_at(op, x))))

    def step(*tensors: Tensor) -> Wire:
        y, vjp = torch.func.vjp(fn, *tensors)  # pyright: ignore[reportAssignmentType]
        return y, vjp(seeds)

    return step


def _transforms(op: Invertible, x: Wire) -> bool:
    """Whether the plain op can be differentiated by torch.func: what writes running statistics, or draws, can not."""
    return not _draws(op, x) and _succeeds(lambda: _functional_vjp(op, x)(*differentiable(x)))


def _vmaps(op: Invertible, x: Wire) -> bool:
    """Whether the plain op can also be mapped over a new dimension."""
    mapped = torch.func.vmap(_functional_vjp(op, x))
    return _transforms(op, x) and _succeeds(lambda: mapped(*map(_batch, differentiable(x))))


def _succeeds(call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception:
        return False
    return True


@law(_transforms)
def checkpoint_functional(f: Invertible, x: Wire) -> Iterator[Claim]:
    """torch.func.vjp(checkpoint(f), x)(gy) = torch.func.vjp(f, x)(gy)."""
    found, expected = _functional_vjp(checkpoint(f), x)(*differentiable(x)), _functional_vjp(f, x)(*differentiable(x))
    yield "torch.func.vjp(checkpoint(f), x)", found, "torch.func.vjp(f, x)", expected
    closed = closed_over(f, x)
    theirs, ours = (tuple(vjp_of(roots(y), closed)) for y, _ in (expected, found))
    yield "closed-over gradients of torch.func.vjp(checkpoint(f), x)", ours, "of torch.func.vjp(f, x)", theirs


def _batch(tensor: Tensor) -> Tensor:
    """Two inputs from the same domain: one and the same in another order."""
    return torch.stack([tensor, tensor.roll(1, 0) if tensor.dim() else tensor])


@law(_vmaps)
def checkpoint_vmap(f: Invertible, x: Wire) -> Iterator[Claim]:
    """vmap(checkpoint(f))(xs) = stack(f(x) for x in xs), and so do the gradients."""
    xs = [_batch(t) for t in differentiable(x)]
    found = torch.func.vmap(_functional_vjp(checkpoint(f), x))(*xs)
    each = [_functional_vjp(f, x)(*(t[i] for t in xs)) for i in range(2)]
    yield "vmap(checkpoint(f))", found, "a loop of f", map_wire(lambda *parts: torch.stack(parts), *each)
