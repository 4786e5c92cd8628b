"""Log-determinants: a walk that turns an op on x into one on ``(x, total)``, which `flow` is built upon.

The total is one number for each element of the batch (dim 0). Forward adds log|det J| of each primitive to it, inverse
subtracts it, so that an op with its log-determinant is an invertible op again: it composes, inverts and lowers like any
other, and what it adds to memory is one vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Size, Tensor
from torch.distributions import Transform, constraints

from .checkpoint import Wrapper
from .core.combine import Parallel, Plumbing, check_components, parallel
from .core.couple import DerivedLaw, Half, InverseLaw, Law, sum_per_sample
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
    invert,
    one_way,
    pair,
)
from .debug import checking, require
from .errors import NotDifferentiableError, NotInvertibleError, OptionError, WireError, place_error
from .wires import Wire, describe, is_differentiable, leaves, map_wire, refuse_nested

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
        ``((N, ...), (N,)) -> ((N, ...), (N,))``, where dim 0 is the batch; the total has the dtype of x.

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
    labels = f"with_log_det({op!r})", f"with_log_det({op.inverted()!r})"
    return Chain((lifted(op, exact),), labels)


def log_det(op: Invertible, x: Wire, *, exact: str | None = None) -> tuple[Wire, Tensor]:
    r"""The output of an op and the log-determinant of its Jacobian there.

    .. math:: (f(x),\; \log|\det J_f(x)|)

    Args:
        op: The op.
        x: Its input, whose dim 0 is the batch.
        exact: See `with_log_det`.

    Returns:
        ``(y, log_det)``, the second of shape (N,) and the dtype of x.

    Cost:
        That of op, and one evaluation of each rule.

    Raises:
        NotDifferentiableError: When a primitive has no rule.

    Example:
        >>> import invfunc as inv
        >>> log_det(inv.ops.exp(), torch.tensor([[1.0, 2.0]]))
        (tensor([[2.7183, 7.3891]]), tensor([3.]))
    """
    return with_log_det(op, exact=exact)(x, zeros_for(x))


def zeros_for(x: Wire) -> Tensor:
    """A total to start from: one zero for each element of the batch."""
    first = _first_leaf(x)
    return (first.real if first.is_complex() else first).new_zeros(first.shape[:1])


def _first_leaf(x: Wire) -> Tensor:
    refuse_nested("log_det", x)
    found = next(filter(is_differentiable, leaves(x)), None)
    if found is None or not found.dim():
        raise WireError(
            f"log-determinants of {describe(x)}", expected="a batch: floating-point tensors whose dim 0 counts samples"
        )
    return found


# ---- the walk ----------------------------------------------------------------------------------------------------


@ByKind
def lifted(op: Invertible, exact: str | None) -> Invertible:
    """An op on ``(x, total)``."""
    return Counting(op, _autodiff(op, exact))


@lifted.register
def _(op: Pair, exact: str | None) -> Invertible:
    return Counting(op, op.log_det_fn or _autodiff(op, exact))


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
    return replace(op, op=lifted(op.op, exact))


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
        y, residue = self.op.forward_with_residue(x)
        return (y, total + self._by_rule(x, y).to(total.dtype)), residue

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        y, total = _checked(y)
        x = self.op.inverse_with_residue(residue, y)
        return x, total - self._by_rule(x, y).to(total.dtype)

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
        wire = x if is_tuple else x[0]
        y = self.op.forward_with_residue(wire)[0]
        return y, self._by_rule(wire, y)

    def _by_rule(self, x: Wire, y: Wire) -> Tensor:
        found, batch = self.rule(x, y), _first_leaf(x).shape[:1]
        if isinstance(found, (int, float)):  # the same for every element
            return zeros_for(x) + found
        if not isinstance(found, Tensor) or found.shape != batch:
            raise WireError(
                f"log_det of {self.op!r} returned {describe(found)}",
                expected=f"{tuple(batch)}, one number for each element of the batch",
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


# ---- to and from torch.distributions -----------------------------------------------------------------------------


class OpTransform(Transform):
    """An op as a ``torch.distributions.Transform``; built by `as_transform`."""

    bijective = True

    def __init__(self, op: Invertible, event_dim: int, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.op, self.counting, self.cached = op, with_log_det(op), cache_size
        self.latest: tuple[Tensor, Tensor, Tensor] | None = None  # with a cache: x, y and the log-determinant
        self.domain = self.codomain = constraints.independent(constraints.real, event_dim)

    def with_cache(self, cache_size: int = 1) -> Transform:
        """The same transform with another cache."""
        return self if cache_size == self.cached else OpTransform(self.op, self.domain.event_dim, cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpTransform) and (self.op, self.domain.event_dim) == (other.op, other.domain.event_dim)

    __hash__ = None  # type: ignore[assignment]

    def _call(self, x: Tensor) -> Tensor:
        if not self.cached:
            return self._unbatched(x, self.op.forward(self._batched(x)))
        y, total = self._counted(self.counting, x)
        self.latest = x, y, total
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        if not self.cached:
            return self._unbatched(y, self.op.inverse(self._batched(y)))
        x, total = self._counted(invert(self.counting), y)
        self.latest = x, y, -total
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det J|``, of the shape of x without its event."""
        if self.latest is not None and self.latest[0] is x and self.latest[1] is y:
            return self.latest[2]
        return self._counted(self.counting, x)[1]

    def _counted(self, counting: Invertible, x: Tensor) -> tuple[Tensor, Tensor]:
        batched = self._batched(x)
        y, total = counting(batched, zeros_for(batched))
        return self._unbatched(x, y), total.view(self._batch(x))

    def _batch(self, x: Tensor) -> Size:
        return x.shape[: x.dim() - self.domain.event_dim]

    def _batched(self, x: Tensor) -> Tensor:
        """All dims but the event's as one."""
        batch = self._batch(x)
        return x.reshape(batch.numel(), *x.shape[len(batch) :])

    def _unbatched(self, like: Tensor, found: Wire) -> Tensor:
        given = self._batched(like)
        if not isinstance(found, Tensor) or found.shape != given.shape:
            raise WireError(
                f"as_transform: {self.op!r} made {describe(found)} of {describe(given)}",
                expected="events of the same shape",
                cure="let the op end with the inverse of its split or reshape",
            )
        return found.reshape(like.shape)

    def __repr__(self) -> str:
        return f"as_transform({self.op!r}, event_dim={self.domain.event_dim})"


def as_transform(op: Invertible, *, event_dim: int = 1) -> Transform:
    r"""An op as a ``torch.distributions.Transform``, for ``TransformedDistribution`` and libraries built on it.

    .. math:: transform(x) = op(x), \qquad transform^{-1}(y) = op^{-1}(y)

    Args:
        op: The op, from a tensor to a tensor of the same shape.
        event_dim: How many dims, from the right, are one event; the others are batch, however many. 0 for an op that
            acts on each number alone, and alike: with a parameter for each place of the last dim, that dim is event.

    Shapes:
        ``(*batch, *event) -> (*batch, *event)``; ``log_abs_det_jacobian`` has the shape ``batch``.

    Cost:
        That of the op, and one more evaluation for each log-determinant; none of it twice with a cache,
        ``as_transform(op).with_cache()``, which keeps the latest x, y and log-determinant, with their graph.

    Limits:
        Domain and codomain are declared real; the op itself says what it takes under ``inv.debug(True)``.

    Raises:
        OptionError: When ``event_dim`` is no number of dims.
        NotDifferentiableError: When a primitive of op has no rule for its log-determinant.
        WireError: When op changes the shape of an event.

    Example:
        >>> import invfunc as inv
        >>> base = torch.distributions.Normal(torch.zeros(2), 1.0)
        >>> log_normal = torch.distributions.TransformedDistribution(base, as_transform(inv.ops.exp(), event_dim=0))
        >>> log_normal.log_prob(torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """
    if not isinstance(event_dim, int) or event_dim < 0:
        raise OptionError(f"as_transform: event_dim is {event_dim}", expected="0, 1, 2, ...")
    return OpTransform(op, event_dim)


def _through(transform: Transform, x: Tensor) -> Tensor:
    if checking():
        require(repr(transform), x, transform.domain.check, f"its domain, {transform.domain}")
    y: Any = transform(x)
    return y


def _transform_log_det(transform: Transform, x: Tensor, y: Tensor) -> Tensor:
    return sum_per_sample(transform.log_abs_det_jacobian(x, y))


def from_transform(transform: Transform) -> Invertible:
    r"""A ``torch.distributions.Transform`` as an op with a log-determinant; ``from_transform(as_transform(op)) = op``.

    .. math:: y = transform(x), \qquad x = transform^{-1}(y)

    Args:
        transform: A bijective transform; tensors in it get their gradients. Its cache is left out: a cached value may
            have been computed without gradients.

    Shapes:
        Those of the transform, whose dim 0 is the batch where log-determinants are wanted.

    Cost:
        That of the transform: forward, inverse and log-determinant are its own methods.

    Raises:
        NotInvertibleError: When it is not bijective.
        DomainError: Under ``inv.debug(True)``, when a value lies outside of the transform's domain.

    Example:
        >>> op = from_transform(torch.distributions.transforms.ExpTransform())
        >>> op
        from_transform(ExpTransform())
        >>> log_det(op, torch.zeros(2, 3))[1]
        tensor([0., 0.])
    """
    if isinstance(transform, OpTransform):
        return transform.op
    if not transform.bijective:
        raise NotInvertibleError(
            f"from_transform: {transform!r} is not bijective",
            cure="use it as a plain function, a one_way stage",
        )
    pure = transform.with_cache(0)
    forward, inverse = partial(_through, pure), partial(_through, pure.inv)
    name = f"from_transform({' '.join(repr(transform).split())})"  # a composition shows itself over several lines
    return pair(forward, inverse, log_det=partial(_transform_log_det, pure), name=name)
