"""Log-determinants: a walk that turns an op on x into one on ``(x, total)``, which `flow` is built upon.

The total is one number for each element of the batch (dim 0). Forward adds log|det J| of each primitive to it, inverse
subtracts it, so that an op with its log-determinant is an invertible op again: it composes, inverts and lowers like any
other, and what it adds to memory is one vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .checkpoint import Wrapper
from .core.combine import Parallel, Plumbing, check_components, parallel
from .core.context import Context, with_context
from .core.couple import DerivedLaw, Half, InverseLaw, Law
from .core.op import (
    VJP,
    Again,
    ByKind,
    Chain,
    Inverse,
    Invertible,
    OneWay,
    Pair,
    Rearrangement,
    Residue,
    chain,
    check_op,
    invert,
    name_of,
    one_way,
)
from .core.precision import at_least, check_numbers, real_dtype
from .errors import NotDifferentiableError, OptionError, WireError, place_error
from .wires import Wire, describe, is_differentiable, leaves, map_wire, refuse_nested, spread

Rule: TypeAlias = Callable[[Wire, Wire], Any]  # (x, y) -> log|det J|: a tensor (batch,), or a number for all


def with_log_det(op: Invertible, *, exact: str | None = None) -> Invertible:
    r"""An op with its log-determinant: it acts on ``(x, total)``.

    .. math:: (x, t) \mapsto (f(x),\; t + \log|\det J_f(x)|), \qquad
        (y, t) \mapsto (f^{-1}(y),\; t - \log|\det J_f(f^{-1}(y))|)

    It respects composition: ``with_log_det(chain(f, g)) = chain(with_log_det(f), with_log_det(g))``, inversion:
    ``with_log_det(invert(f)) = invert(with_log_det(f))``, and lowering: ``with_log_det(checkpoint(f)) =
    checkpoint(with_log_det(f))``.

    Args:
        op: The op. Compositions are taken apart; primitives bring their rule (``pair(..., log_det=)``), and what only
            moves elements has the log-determinant 0.
        exact: What to do for a primitive without a rule: None raises; ``"autodiff"`` forms the Jacobian of each element
            of the batch with ``torch.func.jacrev``, for small inputs.

    Shapes:
        ``((N, ...), (N,)) -> ((N, ...), (N,))``, where dim 0 is the batch; the total stays in its dtype, which should
        be float32 or wider: in half precision, a sum over many elements or ops is lost to rounding.

    Cost:
        One evaluation of each rule in either direction. Lowered, the total is all that is kept beside the output, and
        the functions of a coupling are still evaluated once in forward and once in backward. ``"autodiff"`` holds a
        D x D matrix for each element of the batch while it is evaluated: O(D^3).

    Raises:
        NotDifferentiableError: When a primitive has no rule, naming it; for the law of a coupling, in the first call.
        OptionError: When ``exact`` is neither None nor ``"autodiff"``.

    Example:
        >>> import invfunc as inv
        >>> op = with_log_det(inv.ops.exp())
        >>> op(torch.tensor([[1.0, 2.0]]), torch.zeros(1))
        (tensor([[2.7183, 7.3891]]), tensor([3.]))

    Source:
        Rezende and Mohamed, Variational inference with normalizing flows (2015).
    """
    if exact not in (None, "autodiff"):
        raise OptionError(f"with_log_det: exact is {exact!r}", expected="None or 'autodiff'")
    labels = f"with_log_det({op!r})", f"with_log_det({check_op('with_log_det', op).inverted()!r})"
    return Chain((lifted(op, exact),), labels)


def log_det(
    op: Invertible, x: Wire, *, exact: str | None = None, context: Context | None = None
) -> tuple[Wire, Tensor]:
    r"""The output of an op and the log-determinant of its Jacobian there.

    .. math:: (f(x),\; \log|\det J_f(x)|)

    Args:
        op: The op.
        x: Its input, whose dim 0 is the batch.
        exact: See `with_log_det`.
        context: What the functions are told by name beside the input, as in ``op(x, context=...)``.

    Returns:
        ``(y, log_det)``, the second of shape (N,), in the dtype of x and at least in float32.

    Cost:
        That of op, and one evaluation of each rule.

    Raises:
        NotDifferentiableError: When a primitive has no rule.
        OptionError: When no function takes a name of the context.

    Example:
        >>> import invfunc as inv
        >>> log_det(inv.ops.exp(), torch.tensor([[1.0, 2.0]]))
        (tensor([[2.7183, 7.3891]]), tensor([3.]))
    """
    told = with_context(check_op("log_det", op), context)
    return with_log_det(told, exact=exact)(x, zeros_for(x))


def zeros_for(x: Wire) -> Tensor:
    """A total to start from: one zero for each element of the batch, in at least float32."""
    first = _first_leaf(x)
    return first.new_zeros(first.shape[:1], dtype=at_least(real_dtype(first)))


def _first_leaf(x: Wire) -> Tensor:
    refuse_nested("log_det", x)
    found = next(filter(is_differentiable, leaves(x)), None)
    if found is None or not found.dim():
        raise WireError(
            f"log-determinants of {describe(x)}", expected="a batch: floating-point tensors whose dim 0 counts samples"
        )
    check_numbers("log_det: the input", found)
    return found


# ---- a primitive that tells both ---------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Joint(Pair):
    """A primitive that can tell value and log-determinant in one call; built by `log_det_pair`."""

    both: tuple[Callable[..., Any], Callable[..., Any]] = field(kw_only=True)  # of forward, and of the inverse
    sees_condition: bool = field(default=False, kw_only=True)  # its functions take one after x; see `given`

    @cached_property
    def functions(self) -> tuple[Callable[..., Any], ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (self.forward_fn, self.inverse_fn, *self.both)


def log_det_pair(forward: Callable[..., Any], inverse: Callable[..., Any], *, name: str | None = None) -> Invertible:
    r"""A primitive from two functions that each return their log-determinant beside the value, in one call.

    .. math:: forward(x) = (y,\; \log|\det J_f(x)|), \qquad inverse(y) = (x,\; \log|\det J_{f^{-1}}(y)|)

    This is how nflows, normflows and FrEIA write a layer; `from_transform` wraps theirs, and whole networks of them.

    Args:
        forward: ``x -> (y, log_det)``. A tuple wire arrives as positional arguments and is returned as a tuple.
        inverse: ``y -> (x, log_det)`` with the log-determinant of the inverse: the negative one of forward.
        name: What ``repr`` and error messages show.

    Shapes:
        ``log_det``: (N,), one number for each element of the batch (dim 0), or one number for all of them.

    Cost:
        As `pair`: lowered, nothing of the size of an activation is kept; backward calls ``inverse`` once and
        ``forward`` once. With its log-determinant (`with_log_det`, `flow`) it costs no further call. Wrap layers, not a
        whole network: what is inside of one pair is rebuilt, and held, at once.

    Raises:
        WireError: When a function does not return ``(value, log_det)``.

    Limits:
        As of `pair`: nothing proves that ``inverse`` undoes ``forward``. `invfunc.testing.check_laws` tests it.

    Example:
        >>> import invfunc as inv
        >>> op = inv.ops.log_det_pair(lambda x: (x.exp(), x.sum(1)), lambda y: (y.log(), -y.log().sum(1)))
        >>> inv.log_det(op, torch.zeros(2, 3))
        (tensor([[1., 1., 1.],
                [1., 1., 1.]]), tensor([0., 0.]))
    """
    return joint(forward, inverse, name or f"log_det_pair({name_of(forward)}, {name_of(inverse)})")


def joint(
    forward: Callable[..., Any], inverse: Callable[..., Any], label: str, sees_condition: bool = False
) -> Invertible:
    """`log_det_pair`, of functions that may take a condition after x."""
    values, both = (partial(_value, forward, label), partial(_value, inverse, label)), (forward, inverse)
    rule = partial(_second, forward, label)
    return Joint(*values, log_det_fn=rule, label=label, both=both, sees_condition=sees_condition)


def _value(fn: Callable[..., Any], label: str, *x: Wire) -> Wire:
    return told(fn, label, x)[0]


def _second(fn: Callable[..., Any], label: str, x: Wire, y: Wire) -> Any:
    return told(fn, label, x if isinstance(x, tuple) else (x,))[1]


def told(fn: Callable[..., Any], label: str, x: tuple[Wire, ...]) -> tuple[Wire, Any]:
    """What a function tells: ``(value, log_det)``."""
    found = spread(fn, x, label)
    if isinstance(found, tuple) and len(found) == 2:
        return found
    raise WireError(f"{label} returned {describe(found)}", expected="(value, log_det)")


# ---- the walk ----------------------------------------------------------------------------------------------------


@ByKind
def lifted(op: Invertible, exact: str | None) -> Invertible:
    """An op on ``(x, total)``."""
    return Counting(op, _autodiff(op, exact))


@lifted.register
def _(op: Pair, exact: str | None) -> Invertible:
    return Counting(op, op.log_det_fn or _autodiff(op, exact))


@lifted.register
def _(op: Joint, exact: str | None) -> Invertible:
    return CountingJoint(op, op.both[0])


@lifted.register
def _(op: Inverse, exact: str | None) -> Invertible:
    return invert(lifted(op.op, exact))


@lifted.register
def _(op: OneWay, exact: str | None) -> Invertible:
    return one_way(partial(_counted, op, _autodiff(op, exact)))


def _beside_total(op: Invertible, exact: str | None) -> Invertible:
    return _shown_as(op, parallel(op, chain()))


lifted.cases |= dict.fromkeys((Rearrangement, Plumbing), _beside_total)


@lifted.register
def _(op: Chain, exact: str | None) -> Invertible:
    return Chain(tuple(_placed(op, i, exact) for i in range(len(op.parts))), op.labels)


@lifted.register
def _(op: Parallel, exact: str | None) -> Invertible:
    alone = [chain()] * len(op.parts)
    wires = f"parallel of {len(alone)} ops", len(alone)
    steps = [
        part
        for i in range(len(alone))
        for part in _beside(i, wires, Parallel((*alone[:i], _placed(op, i, exact), *alone[i + 1 :])))
    ]
    return _shown_as(op, *steps)


@lifted.register
def _(op: Half, exact: str | None) -> Invertible:
    return _shown_as(op, *_beside(op.target, ("couple", 2), replace(op, law=lift_law(op.law, exact))))


@lifted.register
def _(op: Wrapper, exact: str | None) -> Invertible:
    return op.mapped(lambda inner: lifted(inner, exact))


def _placed(op: Chain | Parallel, index: int, exact: str | None) -> Invertible:
    """A part, lifted; an error learns where it stands."""
    try:
        return lifted(op.parts[index], exact)
    except Exception as error:
        place_error(error, op.place(index))
        raise


def _shown_as(op: Invertible, *parts: Invertible) -> Invertible:
    return Chain(parts, (repr(op), repr(op.inverted())))


def _beside(index: int, wires: tuple[str, int], op: Invertible) -> tuple[Invertible, ...]:
    """An op between two plumbings that bring the total to a component and back; who takes how many components."""
    attach = partial(_attach, index, *wires), partial(_detach, index)
    there = Plumbing(*attach, f"attach({index})", f"detach({index})")
    return there, op, invert(there)


def _attach(index: int, owner: str, count: int, wire: Wire) -> Wire:
    check_components("with_log_det", wire, 2)
    xs, total = wire
    check_components(owner, xs, count)
    return (*xs[:index], (xs[index], total), *xs[index + 1 :])


def _detach(index: int, wire: Wire) -> Wire:
    x, total = wire[index]
    return (*wire[:index], x, *wire[index + 1 :]), total


@dataclass(frozen=True)
class LogDetLaw(DerivedLaw):
    """The law with its log-determinant: ``t -> with_log_det(law(t))``."""

    exact: str | None = None

    def derive(self, op: Invertible) -> Invertible:
        return lifted(op, self.exact)

    def acts_on(self, x: Wire) -> Wire:
        return super().acts_on(x[0])


def lift_law(law: Law, exact: str | None) -> Law:
    """``t -> with_log_det(law(t))``; that of an inverse law is the inverse of its law's."""
    return lift_law(law.law, exact).inverted() if isinstance(law, InverseLaw) else LogDetLaw(law, exact)


# ---- primitives ----------------------------------------------------------------------------------------------------


def _counted(op: Invertible, rule: Rule, x: Wire, total: Tensor) -> tuple[Wire, Tensor]:
    y = op.forward_with_residue(x)[0]
    return y, total + rule(x, y)


def _checked(wire: Wire) -> tuple[Wire, Tensor]:
    """A wire ``(x, total)`` as it is."""
    if not (isinstance(wire, tuple) and len(wire) == 2 and isinstance(wire[1], Tensor)):
        raise WireError(
            f"with_log_det received {describe(wire)}",
            expected="(x, total), the total of shape (batch,)",
            cure="log_det(op, x) starts from zeros",
        )
    first, total = _first_leaf(wire[0]), wire[1]
    if total.shape != first.shape[:1]:
        raise WireError(
            f"with_log_det received a total of shape {describe(total)}",
            expected=f"{tuple(first.shape[:1])}, the batch of {describe(first)}",
        )
    return wire


@dataclass(frozen=True, repr=False)
class Counting(Invertible):
    """A primitive on ``(x, total)``, by its rule."""

    op: Invertible
    rule: Rule

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        x, total = _checked(x)
        y, residue, added = self._forward(x)
        return (y, total + added.to(total.dtype)), residue

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        y, total = _checked(y)
        x, taken = self._inverse(residue, y)
        return x, total - taken.to(total.dtype)

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        """The rule is evaluated once: its value undoes the total, and its vjp joins that of the op."""
        y, total = y
        x = vjp.run(self.op.inverse_with_residue, (residue, y))
        (_, added), pull = vjp(partial(self._of, isinstance(x, tuple)), x, None if needs is None else needs[0])
        return (x, total - added.to(total.dtype)), (pull(gy), gy[1])

    def rebuild(self, residue: Residue, y: Wire, again: Again) -> Wire:
        """The rule is evaluated once, as in `pull`."""
        y, total = _checked(y)
        x = again.quietly(self.op.inverse_with_residue, residue, y)
        again.rewind()
        like, _ = again.like
        _, added = again.evaluate(partial(self._of, isinstance(x, tuple)), x, like)
        return x, total - added.detach().to(total.dtype)

    def _of(self, is_tuple: bool, *x: Wire) -> tuple[Wire, Tensor]:
        """``x -> (y, log|det J|)``, of a wire that arrives as positional arguments."""
        y, _, added = self._forward(x if is_tuple else x[0])
        return y, added

    def _forward(self, x: Wire) -> tuple[Wire, Residue, Tensor]:
        """``x -> (y, residue, log|det J|)``."""
        y, residue = self.op.forward_with_residue(x)
        return y, residue, self._per_sample(self.rule(x, y), x)

    def kept(self, x: Wire) -> Residue:
        return None if self.op.kept(x[0]) is None else x

    def _inverse(self, residue: Residue, y: Wire) -> tuple[Wire, Tensor]:
        """``y -> (x, log|det J|)``, still that of forward."""
        x = self.op.inverse_with_residue(residue, y)
        return x, self._per_sample(self.rule(x, y), x)

    def _per_sample(self, found: Any, x: Wire) -> Tensor:
        """A log-determinant, checked; a plain number holds for every element of the batch."""
        first = _first_leaf(x)
        if isinstance(found, (int, float)):
            return first.new_full(first.shape[:1], found, dtype=at_least(real_dtype(first)))
        if not isinstance(found, Tensor) or found.shape != first.shape[:1]:
            raise WireError(
                f"log_det of {self.op!r} returned {describe(found)}",
                expected=f"{tuple(first.shape[:1])}, one number for each element of the batch",
            )
        return found

    def inverted(self) -> Invertible:
        return Inverse(self)

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return (*self.op.functions, self.rule)

    @property
    def name(self) -> str:
        return self.op.name

    def __repr__(self) -> str:
        return f"with_log_det({self.op!r})"


@dataclass(frozen=True, repr=False)
class CountingJoint(Counting):
    """A `Joint` on ``(x, total)``: one call tells both."""

    op: Joint  # pyright: ignore[reportIncompatibleVariableOverride]

    def _forward(self, x: Wire) -> tuple[Wire, Residue, Tensor]:
        y, added = self._told(0, x)
        return y, self.op.kept(x), self._per_sample(added, x)

    def _inverse(self, residue: Residue, y: Wire) -> tuple[Wire, Tensor]:
        if residue is not None:
            return residue, self._per_sample(self._told(0, residue)[1], residue)
        x, added = self._told(1, y)
        return x, -self._per_sample(added, x)

    def _told(self, way: int, x: Wire) -> tuple[Wire, Any]:
        return told(self.op.both[way], repr(self.op), x if isinstance(x, tuple) else (x,))

    def _per_sample(self, found: Any, x: Wire) -> Tensor:
        """A tensor of one number holds for all, too: so normflows, nflows and FrEIA say it of their linear layers."""
        is_one = isinstance(found, Tensor) and found.shape in ((), (1,))
        return super()._per_sample(found.expand(_first_leaf(x).shape[:1]) if is_one else found, x)


def _autodiff(op: Invertible, exact: str | None) -> Rule:
    """The rule of an op that has none, if that is allowed."""
    if exact == "autodiff":
        return partial(autodiff_log_det, op)
    raise NotDifferentiableError(
        f"{op!r} has no rule for its log-determinant",
        cure="give it one with pair(..., log_det=), or pass exact='autodiff' for small inputs",
    )


def autodiff_log_det(op: Invertible, x: Wire, y: Wire) -> Tensor:
    """``log|det J|`` from the whole Jacobian of each element of the batch, whatever the op; O(D^3).

    The elements of the batch are independent, so that one gradient of a sum over them is a row of every Jacobian.

    Args:
        op: The op, which must treat the elements of the batch independently.
        x: Its input.
        y: Its output; what a rule receives, not used.

    Example:
        >>> import invfunc as inv
        >>> autodiff_log_det(inv.ops.exp(), torch.tensor([[1.0, 2.0]]), None)
        tensor([3.])
    """
    own = [leaf for leaf in leaves(x) if is_differentiable(leaf)]

    def summed(*tensors: Tensor) -> Tensor:
        left = iter(tensors)
        inner = map_wire(lambda leaf: next(left) if is_differentiable(leaf) else leaf, x)
        outer = leaves(op.forward_with_residue(inner)[0])
        return torch.cat([_rows(leaf) for leaf in outer if is_differentiable(leaf)], 1).sum(0)

    blocks = torch.func.jacrev(summed, tuple(range(len(own))))(*own)  # each (outputs, batch, *shape of one input)
    jacobian = torch.cat([block.flatten(2) if block.dim() > 2 else block.unsqueeze(2) for block in blocks], 2)
    return log_abs_det(_square(op, jacobian.movedim(1, 0)))


def log_abs_det(matrices: Tensor) -> Tensor:
    """``log|det|`` of (a batch of) matrices, in at least float32: LAPACK knows no half precision."""
    return torch.linalg.slogdet(matrices.to(torch.promote_types(matrices.dtype, torch.float32)))[1]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.unsqueeze(1)


def _square(op: Invertible, jacobian: Tensor) -> Tensor:
    outputs, inputs = jacobian.shape[1:]
    if outputs == inputs:
        return jacobian
    raise NotDifferentiableError(
        f"{op!r} maps {inputs} numbers to {outputs}",
        expected="as many as it received: otherwise it has no determinant",
    )
