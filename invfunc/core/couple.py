"""Couplings: one component of a wire changes by what a function of the other says.

How it changes is a *law*, a value with `Law.apply`, `Law.undo` and `Law.pull`; the function need not be invertible.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..debug import require
from ..errors import OptionError, WireError, check_option
from ..wires import Wire, describe, is_differentiable, leaves, map_wire, spread
from .combine import check_components
from .op import VJP, Again, Chain, Invertible, Pair, Residue, invert, name_of, named, pair
from .precision import at_least, real_dtype, widely

# ---- ops that are laws as well -------------------------------------------------------------------------------------


def _add(t: Tensor, x: Tensor) -> Tensor:
    check_meets("additive(t): t", t, x)
    return x + t


def _subtract(t: Tensor, y: Tensor) -> Tensor:
    check_meets("additive(t): t", t, y)
    return y - t


def _pull_add(t: Tensor, y: Tensor, gy: Tensor) -> Any:
    return y - t, gy, [(t, match(gy, t))]


def match(gradient: Tensor, t: Tensor) -> Tensor:
    """The gradient of a tensor that was broadcast or promoted to the gradient's shape and dtype."""
    if gradient.is_complex() and not t.is_complex():
        gradient = gradient.real
    if gradient.shape != t.shape:
        gradient = gradient.sum_to_size(t.shape)
    return gradient if gradient.dtype == t.dtype else gradient.to(t.dtype)


def check_meets(subject: str, t: Tensor, x: Tensor) -> None:
    """Raise unless both are tensors, and t broadcasts to the shape of x."""
    if not isinstance(x, Tensor):
        raise WireError(f"{subject.partition(':')[0]}: the input", expected="a tensor", got=describe(x))
    if not isinstance(t, Tensor):
        raise WireError(subject, expected="a tensor", got=describe(t), cure="wrap a number: torch.tensor(...)")
    if t.shape != x.shape and not broadcasts(t.shape, x.shape):
        expected = f"{describe(x)} like the input, or what broadcasts to it"
        raise WireError(f"{subject} is {describe(t)}", expected=expected)


def _no_log_det(*wires: Wire) -> Tensor:
    x = leaves(wires)[0]
    return x.new_zeros(x.shape[:1])


def sum_per_sample(values: Tensor) -> Tensor:
    """The sum over every dimension but the batch's, in at least float32: ``(N, ...) -> (N,)``."""
    dims, dtype = tuple(range(1, values.dim())), at_least(values.dtype)
    return values.sum(dims, dtype=dtype) if dims else values.to(dtype)


def sum_log_slopes(log_slope: Callable[..., Tensor], x: Tensor, *tensors: Tensor | None) -> Tensor:
    """``log|det J|`` of an elementwise op: its logarithmic slopes, computed and summed in at least float32."""
    return sum_per_sample(widely(log_slope, x, *tensors))


def additive(t: Tensor) -> Invertible:
    r"""Add a tensor; the default law of `couple`.

    .. math:: y = x + t, \qquad \log|\det J| = 0

    Args:
        t: What is added, of the shape of x or broadcast to it.

    Shapes:
        Any, unchanged; t has that of x, or broadcasts to it. A wider dtype of t is that of the result, as in torch.

    Cost:
        The inverse is one subtraction. Lowered, nothing is kept.

    Domain:
        Everything; the range, too.

    Raises:
        WireError: When t is no tensor, or does not broadcast to x.

    Example:
        >>> import torch
        >>> additive(torch.tensor(1.0))(torch.tensor([1.0, 2.0]))
        tensor([2., 3.])

    Source:
        Dinh et al., NICE (2015); Gomez et al., RevNet (2017).
    """
    add, subtract, pull = partial(_add, t), partial(_subtract, t), partial(_pull_add, t)
    return pair(add, subtract, pullback=pull, log_det=_no_log_det, name="additive(t)")


def _scale_shift(s: Tensor, t: Tensor, x: Tensor) -> Tensor:
    check_meets("affine(s, t): s", s, x)
    check_meets("affine(s, t): t", t, x)
    require("affine's scale", s, torch.ne, "a scale that is nowhere 0", "bound it: exp_scale, tanh_scale", 0)
    return x * s + t


def _unshift_unscale(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    check_meets("affine(s, t): s", s, y)
    check_meets("affine(s, t): t", t, y)
    require("affine's scale", s, torch.ne, "a scale that is nowhere 0", "bound it: exp_scale, tanh_scale", 0)
    return (y - t) / s


def _pull_scale_shift(s: Tensor, t: Tensor, y: Tensor, gy: Tensor) -> Any:
    x = (y - t) / s
    return x, gy * s.conj(), [(s, match(gy * x.conj(), s)), (t, match(gy, t))]


def _scale_log_det(s: Tensor, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    log_scale = s.to(at_least(s.dtype, real_dtype(x))).abs().log()
    return sum_per_sample(log_scale.expand(x.shape))


def affine(s: Tensor, t: Tensor) -> Invertible:
    r"""Scale and shift, elementwise; a law of `couple`.

    .. math:: y = s \cdot x + t, \qquad x = (y - t) / s, \qquad \log|\det J| = \sum \log|s|

    Args:
        s: The scale, nowhere zero, of the shape of x or broadcast to it.
        t: The shift, likewise.

    Shapes:
        Any, unchanged; s and t have that of x, or broadcast to it. A wider dtype of theirs is that of the result, as in
        torch; lowered, x is rebuilt as narrow as it was.

    Cost:
        The inverse is one subtraction and one division. Lowered, nothing is kept beside s and t, and in a coupling
        not those.

    Domain:
        Everything; the range, too.

    Raises:
        WireError: When s or t is no tensor, or does not broadcast to x.
        DomainError: Under ``inv.debug(True)``, when a scale is 0.

    Limits:
        Rounding grows with ``max|s| / min|s|``: bound the scale with `sigmoid_scale` or `tanh_scale` in deep chains.

    Example:
        >>> import torch
        >>> affine(torch.tensor(2.0), torch.tensor(1.0))(torch.tensor([1.0, 2.0]))
        tensor([3., 5.])

    Source:
        Dinh et al., Real NVP (2017).
    """
    to, fro, pull = partial(_scale_shift, s, t), partial(_unshift_unscale, s, t), partial(_pull_scale_shift, s, t)
    return pair(to, fro, pullback=pull, log_det=partial(_scale_log_det, s, t), name="affine(s, t)")


@dataclass(frozen=True)
class Scaled:
    """A net whose output is turned into ``(s, t)`` for the law `affine`; built by `exp_scale` and its kin."""

    net: Callable[..., Any]
    squash: Callable[[Tensor], Tensor]
    dim: int
    label: str

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function: what this object closes over is what the net closes over."""
        return (self.net,)

    def __call__(self, *x: Wire) -> tuple[Tensor, Tensor]:
        out = self.net(*x)
        raw, t = out if isinstance(out, tuple) else _halves(out, self.dim, self.label)
        return self._scale(raw, *x), t

    def _scale(self, raw: Tensor, *x: Wire) -> Tensor:
        """Computed in at least float32, and in the dtype of x where that is wider than the net's; never 0."""
        streams = [leaf.real for leaf in leaves(x) if is_differentiable(leaf)]
        dtype = torch.promote_types(raw.dtype, streams[0].dtype) if streams else raw.dtype
        return self.squash(raw.to(at_least(dtype))).to(dtype).clamp_min(torch.finfo(dtype).tiny)

    @property
    def __name__(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.label


def _halves(out: Tensor, dim: int, label: str) -> Sequence[Tensor]:
    if out.dim() <= max(dim, -1 - dim) or out.shape[dim] % 2:
        raise WireError(
            f"{label}: the net returned {describe(out)}",
            expected=f"an even size along dim {dim}: scale and shift",
            cure="let the net return twice the channels of the component that it changes, or a tuple (raw, t)",
        )
    return out.chunk(2, dim)


def _sigmoid_of(shift: float, raw: Tensor) -> Tensor:
    return torch.sigmoid(raw + shift)


def _bounded_exp(bound: float, raw: Tensor) -> Tensor:
    return torch.exp(bound * torch.tanh(raw / bound))


def exp_scale(net: Callable[..., Any], *, dim: int = 1) -> Callable[..., Any]:
    r"""A net's output as ``(s, t)`` for `affine`, with a scale that is an exponential.

    .. math:: f(x) = (\exp(raw), t), \qquad (raw, t) = net(x)

    Args:
        net: Returns ``(raw, t)``, or one tensor whose halves along ``dim`` are raw and t.
        dim: The dimension of the halves.

    Limits:
        The scale is unbounded: with default initialisation, chains of 4 such couplings overflow in fp32. Prefer
        `tanh_scale`. Where it would underflow it is the smallest normal number, so that it has an inverse.

    Example:
        >>> import torch
        >>> f = exp_scale(torch.nn.Linear(2, 4))
        >>> couple(f, law=affine)
        couple(exp_scale(Linear), law=affine)

    Source:
        Dinh et al., Real NVP (2017); MemCNN's ``AffineAdapterNaive``.
    """
    return Scaled(net, torch.exp, dim, f"exp_scale({name_of(net)})")


def sigmoid_scale(net: Callable[..., Any], shift: float = 2.0, *, dim: int = 1) -> Callable[..., Any]:
    r"""A net's output as ``(s, t)`` for `affine`, with a scale between 0 and 1, and never 0 by underflow.

    .. math:: f(x) = (\sigma(raw + shift), t), \qquad (raw, t) = net(x)

    Args:
        net: Returns ``(raw, t)``, or one tensor whose halves along ``dim`` are raw and t.
        shift: Added before the sigmoid; with 2 the scale starts near 0.88.
        dim: The dimension of the halves.

    Example:
        >>> import torch
        >>> s, t = sigmoid_scale(torch.nn.Linear(2, 4))(torch.zeros(1, 2))
        >>> s.shape, t.shape
        (torch.Size([1, 2]), torch.Size([1, 2]))

    Source:
        Kingma and Dhariwal, Glow (2018).
    """
    return Scaled(net, partial(_sigmoid_of, shift), dim, f"sigmoid_scale({name_of(net)})")


def tanh_scale(net: Callable[..., Any], bound: float = 1.0, *, dim: int = 1) -> Callable[..., Any]:
    r"""A net's output as ``(s, t)`` for `affine`, with a scale between e^-b and e^b.

    .. math:: f(x) = (\exp(b \tanh(raw / b)), t), \qquad (raw, t) = net(x)

    Args:
        net: Returns ``(raw, t)``, or one tensor whose halves along ``dim`` are raw and t.
        bound: The bound b on the logarithm of the scale: it limits how much a coupling can amplify rounding.
        dim: The dimension of the halves.

    Raises:
        OptionError: When the bound is not positive.

    Example:
        >>> import torch
        >>> s, t = tanh_scale(torch.nn.Linear(2, 4), 0.5)(1e6 * torch.ones(1, 2))
        >>> bool((s.log().abs() <= 0.5001).all())
        True

    Source:
        Ardizzone et al., soft clamping in conditional INNs (2019).
    """
    check_option("tanh_scale: bound", bound, lambda bound: bound > 0, "a positive number")
    return Scaled(net, partial(_bounded_exp, bound), dim, f"tanh_scale({name_of(net)}, {bound})")


# ---- laws: what a coupling does with the value it was given --------------------------------------------------------


@dataclass(frozen=True)
class Law(abc.ABC):
    """What a coupling does to its target x with what its function returned, t: an op for each t.

    ``apply(t, x) -> (y, residue)`` and ``undo(t, residue, y) -> x`` undo each other, as those of the op do.
    """

    takes: ClassVar[tuple[str, ...]] = ()  # the names of the tensors that t has to be; empty: anything
    signs: ClassVar[tuple[str, str]] = ("∘", "∘")  # how a drawing shows the law and its inverse

    @abc.abstractmethod
    def op(self, t: Wire) -> Invertible:
        """The op for one t."""

    def __call__(self, *t: Wire) -> Invertible:
        """`op`, as a constructor of ops is called."""
        return self.op(t[0] if len(t) == 1 else t)

    def apply(self, t: Wire, x: Wire) -> tuple[Wire, Residue]:
        """``x -> (y, residue)``."""
        return self.op(t).forward_with_residue(x)

    def undo(self, t: Wire, residue: Residue, y: Wire) -> Wire:
        """``y -> x``."""
        return self.op(t).inverse_with_residue(residue, y)

    def gradients(self, t: Wire, gy: Wire) -> tuple[Wire, Wire] | None:
        """``gy -> (gx, gt)`` where these depend on neither x nor y; None where they do."""
        return None

    def pull(
        self, t: Wire, residue: Residue, y: Wire, gy: Wire, vjp: VJP, need: Wire | None
    ) -> tuple[Wire, Wire, Wire]:
        """``(y, gy) -> (x, gx, gt)``."""
        closed = None if gy is None else self.gradients(t, gy)
        if closed is not None:
            return vjp.run(self.undo, (t, residue, y)), *closed
        op = self.op(t)
        if isinstance(op, Pair) and op.pullback_fn and residue is None and gy is not None:
            x, gx, *closed = op.pullback_fn(y, gy)
            by_id = {id(tensor): g for tensor, g in (closed[0] if closed else ())}
            if sorted(by_id) == sorted(map(id, leaves(t))):  # it speaks of t alone
                return x, gx, map_wire(lambda leaf: by_id[id(leaf)] if is_differentiable(leaf) else None, t)
        x = vjp.run(op.inverse_with_residue, (residue, y))
        needs = None if need is None else (map_wire(is_differentiable, t), need)
        _, pull = vjp(lambda t, x: self.op(t).forward(x), (t, x), needs)
        gt, gx = pull(gy)
        return x, gx, gt

    def inverted(self) -> Law:
        """The law that undoes this one."""
        return InverseLaw(self)

    def original(self) -> Law:
        """The law that a user wrote, below those derived from it."""
        return self

    def acts_on(self, x: Wire) -> Wire:
        """The part of the target that the original law changes."""
        return x

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's functions that the law calls."""
        return ()

    @property
    @abc.abstractmethod
    def __name__(self) -> str: ...  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def suffix(self) -> str:
        """The law as ``repr`` shows it behind a coupling's functions; nothing for the default."""
        return f", law={self.__name__}"


@dataclass(frozen=True)
class Additive(Law):
    """``y = x + t``."""

    takes = ("t",)
    signs = ("+", "-")
    suffix = ""  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    __name__ = "additive"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def op(self, t: Wire) -> Invertible:
        return additive(t)

    def apply(self, t: Wire, x: Wire) -> tuple[Wire, Residue]:
        return _add(t, x), None

    def undo(self, t: Wire, residue: Residue, y: Wire) -> Wire:
        return _subtract(t, y)

    def gradients(self, t: Wire, gy: Wire) -> tuple[Wire, Wire] | None:
        return gy, match(gy, t)


@dataclass(frozen=True)
class Affine(Law):
    """``y = s x + t``."""

    takes = ("s", "t")
    signs = ("×", "/")
    __name__ = "affine"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def op(self, t: Wire) -> Invertible:
        return affine(*t)

    def apply(self, t: Any, x: Wire) -> tuple[Wire, Residue]:
        s, b = t
        return _scale_shift(s, b, x), None

    def undo(self, t: Any, residue: Residue, y: Wire) -> Wire:
        s, b = t
        return _unshift_unscale(s, b, y)


@dataclass(frozen=True)
class OpLaw(Law):
    """A law by a constructor of ops: ``t -> make(t)``; a tuple t becomes its positional arguments."""

    make: Callable[..., Invertible]

    def op(self, t: Wire) -> Invertible:
        op = self.make(*t) if isinstance(t, tuple) else self.make(t)
        if not isinstance(op, Invertible):
            raise OptionError(
                f"law {self.__name__} returned {type(op).__name__}",
                expected="an invertible op",
                cure="a law maps what the function returned to an op, as additive and affine do",
            )
        return op

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return (self.make,)

    @property
    def __name__(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return name_of(self.make)


def as_law(law: Law | Callable[..., Invertible]) -> Law:
    """A law as it is, and that of any constructor of ops."""
    return law if isinstance(law, Law) else _LAWS[law] if law in _LAWS else OpLaw(law)


_LAWS: dict[Callable[..., Invertible], Law] = {additive: Additive(), affine: Affine()}


@dataclass(frozen=True)
class DerivedLaw(Law):
    """A law made from another one: ``t -> derive(law(t))``."""

    law: Law

    @abc.abstractmethod
    def derive(self, op: Invertible) -> Invertible:
        """What the op of the other law becomes."""

    def op(self, t: Wire) -> Invertible:
        return self.derive(self.law.op(t))

    def original(self) -> Law:
        return self.law.original()

    def acts_on(self, x: Wire) -> Wire:
        return self.law.acts_on(x)

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return self.law.functions

    @property
    def __name__(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.law.__name__


@dataclass(frozen=True)
class InverseLaw(DerivedLaw):
    """The law that undoes another."""

    def derive(self, op: Invertible) -> Invertible:
        return invert(op)

    def apply(self, t: Wire, x: Wire) -> tuple[Wire, Residue]:
        if type(self.law).undo is Law.undo:
            return super().apply(t, x)
        return self.law.undo(t, None, x), None

    def undo(self, t: Wire, residue: Residue, y: Wire) -> Wire:
        return self.law.apply(t, y)[0] if residue is None else super().undo(t, residue, y)

    def inverted(self) -> Law:
        return self.law

    @property
    def suffix(self) -> str:
        """As that of the law."""
        return self.law.suffix


# ---- coupled -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Half(Invertible):
    """One half of a coupling: component ``target`` changes by ``law(fn(other))``, the other passes untouched."""

    fn: Callable[..., Any]
    law: Any  # a Law, or a constructor of ops that becomes one
    target: int
    label: str

    def __post_init__(self) -> None:
        if not isinstance(self.law, Law):
            object.__setattr__(self, "law", as_law(self.law))

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        return self.forward_by(self.evaluate(x), x)

    def evaluate(self, x: Wire) -> Wire:
        _, x2 = self.target_first(x)
        return spread(self.fn, x2)

    def forward_by(self, t: Wire, x: Wire) -> tuple[Wire, Residue]:
        x1, x2 = self.in_place(x)
        self.check_given(t, x1)
        y1, residue = self.law.apply(t, x1)
        self._check_shape(x1, y1)
        return self.in_place((y1, x2)), residue

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        y1, x2 = self.target_first(y)
        t = spread(self.fn, x2)
        self.check_given(t, y1)
        return self.in_place((self.law.undo(t, residue, y1), x2))

    def rebuild(self, residue: Residue, y: Wire, again: Again) -> Wire:
        """Fused: ``t = fn(x2)`` is evaluated once, and gives both its saved tensors and ``x1 = law(t)^-1(y1)``."""
        y1, x2 = self.target_first(y)
        like1, like2 = self.in_place(again.like)
        t = again.evaluate(self.fn, x2, like2)
        self.check_given(t, y1)
        x1 = again.quietly(self.law.undo, t, residue, y1)
        again.hand_over(lambda x1: self.law.apply(t, x1), x1, like1)
        return self.in_place((x1, x2))

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        """Fused, as `rebuild`."""
        (y1, x2), (gy1, gy2) = self.target_first(y), self.target_first(gy)
        need1, need2 = (None, None) if needs is None else self.in_place(needs)
        t, pull_fn = vjp(self.fn, x2, need2)
        self.check_given(t, y1)
        x1, gx1, gt = self.law.pull(t, residue, y1, gy1, vjp, need1)
        del t
        gx2 = add_wires(gy2, pull_fn(gt))
        return self.in_place((x1, x2)), self.in_place((gx1, gx2))

    def inverted(self) -> Invertible:
        return replace(self, law=self.law.inverted())

    def target_first(self, x: Wire) -> Wire:
        """`in_place`, checked."""
        check_components("couple", x, 2)
        return self.in_place(x)

    def in_place(self, x: Wire) -> Wire:
        """The target before the other, or the two as they were: exchanging two components undoes itself."""
        return x if self.target == 0 else (x[1], x[0])

    def check_given(self, t: Wire, x1: Wire) -> None:
        """Raise unless what the function returned has the law's arity and, for tensors, a shape that fits."""
        if isinstance(t, Tensor) and isinstance(x1, Tensor) and t.shape == x1.shape and len(self.law.takes) == 1:
            return  # what follows would find nothing, in five times the time
        law = self.law.original()
        if not law.takes:
            return
        parts = t if isinstance(t, tuple) else (t,)
        _check_arity(self.label, law, parts)
        for part in parts:
            _check_partner(self.label, part, self.law.acts_on(x1))

    def _check_shape(self, x1: Wire, y1: Wire) -> None:
        if isinstance(x1, Tensor) and isinstance(y1, Tensor) and x1.shape == y1.shape:
            return
        x1, y1 = self.law.acts_on(x1), self.law.acts_on(y1)
        if isinstance(x1, Tensor) and isinstance(y1, Tensor) and x1.shape != y1.shape:
            raise WireError(
                f"law {self.law.__name__} made {describe(y1)} of {describe(x1)}",
                expected="a shape that does not change",
            )

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return (self.fn, *self.law.functions)

    @property
    def name(self) -> str:
        return "couple"

    def __repr__(self) -> str:
        text = f"half({name_of(self.fn)}, target={self.target}{self.law.suffix})"
        return f"invert({text})" if isinstance(self.law, InverseLaw) else text


def _check_arity(label: str, law: Law, parts: tuple[Any, ...]) -> None:
    if len(parts) != len(law.takes) or not all(isinstance(part, Tensor) for part in parts):
        names = ", ".join(law.takes)
        raise WireError(
            f"{label} returned {describe(parts if len(parts) != 1 else parts[0])}",
            expected=f"({names}) for law {law.__name__}",
            cure="return a tuple of tensors, or wrap the net: exp_scale(f), sigmoid_scale(f), tanh_scale(f, bound)"
            if len(law.takes) > 1
            else "return one tensor, or pass another law",
        )


def _check_partner(label: str, t: Tensor, x1: Wire) -> None:
    if not isinstance(x1, Tensor):
        raise WireError(
            f"{label}'s partner component is {describe(x1)}",
            expected="one tensor",
            cure="pass a law that acts on nested components",
        )
    if t.shape == x1.shape or broadcasts(t.shape, x1.shape):
        return
    raise WireError(
        f"{label} returned {describe(t)}",
        expected=f"{describe(x1)} like its partner component",
        cure=f"change the output size of {label}, or the sizes of the split before it",
    )


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a shape broadcasts to another without changing it."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def add_wires(a: Wire, b: Wire) -> Wire:
    """The sum of two gradients of one wire, where None is zero."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a + b
    if isinstance(a, tuple) or isinstance(b, tuple):
        count = len(a if isinstance(a, tuple) else b)
        pairs = zip(a or (None,) * count, b or (None,) * count, strict=True)
        return tuple(add_wires(left, right) for left, right in pairs)
    return b if a is None else a


def couple(
    f: Callable[..., Any],
    g: Callable[..., Any] | None = None,
    *,
    law: Callable[..., Invertible] = additive,
) -> Invertible:
    r"""Two components change each other in turn: the block of a reversible network.

    .. math:: y_1 = law(f(x_2))(x_1), \qquad y_2 = law(g(y_1))(x_2)

    Args:
        f: Any callable or module; its output is given to the law. It need not be invertible.
        g: Likewise; without it the second component passes untouched.
        law: Maps what f returns to an op: `additive`, `affine`, or any constructor of an elementwise op. A tuple
            becomes its positional arguments.

    Shapes:
        ``((N, ...), (N, ...)) -> ((N, ...), (N, ...))``, the shapes of the components unchanged.

    Cost:
        Lowered: nothing is kept but what f and g close over; f and g are evaluated exactly twice in a training step,
        once in forward and once in backward (4/3 of plain training's flops).

    Raises:
        OptionError: When f, g or the law is no function.
        WireError: When f or g returns something that does not fit its partner component.
        ReplayError: Lowered, when a law of yours takes a gradient through what f or g has computed.

    Example:
        >>> import torch
        >>> block = couple(torch.tanh, torch.sin)
        >>> block
        couple(tanh, sin)
        >>> y = block(torch.tensor([0.0]), torch.tensor([0.0]))
        >>> y
        (tensor([0.]), tensor([0.]))

    Source:
        Dinh et al., NICE (2015); Gomez et al., RevNet (2017).
    """
    for role, fn in ("f", f), ("g", g), ("law", law):
        if not callable(fn) and not (role == "g" and fn is None):
            raise OptionError(f"couple: {role} is {type(fn).__name__}", expected="a function or a module")
    law = as_law(law)
    if g is None:
        return named(Half(f, law, 0, "f"), f"couple({name_of(f)}{law.suffix})")
    halves = Chain((Half(f, law, 0, "f"), Half(g, law, 1, "g")))
    return named(halves, f"couple({name_of(f)}, {name_of(g)}{law.suffix})")


def is_coupling(op: Invertible) -> bool:
    """Whether an op is halves of couplings one after another, shown as one."""
    parts = op.parts if isinstance(op, Chain) and op.labels else ()
    return bool(parts) and all([isinstance(part, Half) for part in parts])
