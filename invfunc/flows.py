"""Normalizing flows: an op and a base distribution as a density, with samples, contexts and latents of several parts.

NOTE [Batch] A flow is asked about any number of samples, of any number of contexts, and its op knows one batch, dim 0.

1.  *Event.* What one sample is, the base says: its event, or all of its shape where it has no event. In x the event is
    the last dims that hold as many numbers. A base of single numbers says nothing: then dim 0 alone is batch.
    A base that is made from contexts has them first: its event is what comes after, ``Independent`` or not.
2.  *Batch.* All dims before the event; with contexts, broadcast with dim 0 of the context, as torch.distributions do
    with a batch of parameters: samples times contexts.
3.  *Flat.* The op is called once, on the batch as one dim, and what it returns has the batch as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution

from .checkpoint import Wrapper
from .core.combine import Parallel
from .core.couple import Half, sum_per_sample
from .core.op import ByKind, Chain, Inverse, Invertible, Pair, check_op, invert, name_of
from .core.precision import at_least
from .errors import NotDifferentiableError, OptionError, WireError, check_option
from .log_det import Joint, with_log_det, zeros_for
from .ops.streams import Given
from .wires import Wire, describe, is_differentiable, leaves, map_wire

Base: TypeAlias = Any  # a Distribution, a function that returns one, or a tuple of bases for a tuple wire
Shape: TypeAlias = int | Sequence[int]


@dataclass(frozen=True, repr=False)
class Flow:
    """A density over x: that of ``z = op(x)`` under a base distribution; built by `flow`."""

    op: Invertible
    base: Base
    counting: Invertible  # the op with its log-determinant
    reads_context: bool  # whether functions of the op do
    takes_two: tuple[bool, bool]  # whether the op, and its inverse, act on two components: on x and a context beside it

    def __repr__(self) -> str:
        return f"flow({self.op!r}, {_shown(self.base)})"

    def log_prob(self, x: Wire, context: Wire = None) -> Tensor:
        """``log p(x)``, of the shape of the batch."""
        _check_context(context)
        base = _made(self.base, context)
        dims = _batch_dims(base, x)
        batch = _with_contexts(leaves(x)[0].shape[:dims], context)
        x = _flat(x, batch, dims)
        joins = self._joins(0, x, context)
        z, total = self.counting(_join(joins, x, context, batch), zeros_for(x))
        return total.view(batch) + _base_log_prob(base, _part(joins, z), batch)

    def sample(self, shape: Shape = (), context: Wire = None) -> Wire:
        """Samples without gradients; see `flow` for the shape."""
        with torch.no_grad():
            return self._from("sample", shape, context)

    def rsample(self, shape: Shape = (), context: Wire = None) -> Wire:
        """Samples as functions of the parameters of op and base."""
        return self._from("rsample", shape, context)

    def _from(self, how: str, shape: Shape, context: Wire) -> Wire:
        z, batch, _ = self._drawn(how, shape, context)
        joins = self._joins(1, z, context)
        return _unflat(_part(joins, self.op.inverse(_join(joins, z, context, batch))), batch)

    def rsample_and_log_prob(self, shape: Shape = (), context: Wire = None) -> tuple[Wire, Tensor]:
        """Samples and their log-densities, from the latents that they were made of: one evaluation of the inverse."""
        z, batch, base = self._drawn("rsample", shape, context)
        negative = -_base_log_prob(base, z, batch).reshape(-1)
        joins = self._joins(1, z, context)
        x, negative = self.counting.inverse((_join(joins, z, context, batch), negative))
        return _unflat(_part(joins, x), batch), -negative.view(batch)

    def _drawn(self, how: str, shape: Shape, context: Wire) -> tuple[Wire, Size, Base]:
        """Latents with a flat batch, and the batch."""
        _check_context(context)
        base = _made(self.base, context)
        z = _draw(base, how, _size(shape), _contexts(context))
        dims = leaves(z)[0].dim() - len(_event(base)) if _event(base) else min(1, leaves(z)[0].dim())
        batch = leaves(z)[0].shape[:dims]
        if _with_contexts(batch, context) != batch:
            raise _mismatch(batch, context)
        return _flat(z, batch, dims), batch, base

    def _joins(self, way: int, x: Wire, context: Wire) -> bool:
        """Whether a context goes to the op, beside x: where the op takes it, or nothing else does."""
        reads = self.reads_context or (isinstance(x, Tensor) and self.takes_two[way])
        if context is None and reads:
            raise WireError(
                f"{self!r} got no context",
                expected="one, since functions of its op take it",
                cure="pass context=, a tensor or a tuple whose dim 0 counts contexts",
            )
        return context is not None and (reads or not _reads(self.base))


def _join(joins: bool, x: Wire, context: Wire, batch: Size) -> Wire:
    return (x, _flat(context, batch, 1)) if joins else x


def _part(joins: bool, wire: Wire) -> Wire:
    return wire[0] if joins else wire


def flow(op: Invertible, base: Base, *, exact: str | None = None) -> Flow:
    r"""A normalizing flow: the density of x when ``op`` sends data x to latents z of a known density.

    .. math:: \log p(x \mid c) = \log p_{base}(f_c(x) \mid c) + \log|\det J_{f_c}(x)|

    Args:
        op: f, from data to latents; ``checkpoint(f)`` trains at constant activation memory. `inv.ops.given` makes one
            that reads a context; so does any other that acts on x and c, ``(x, c) -> (z, c)``.
        base: A ``torch.distributions.Distribution`` over z, whose shape is one sample: ``Normal(zeros(4), 1)``,
            or the event of ``Independent(...)``. Or a single number's, ``Normal(0, 1)``, which serves latents of any
            shape. Or a function or module that returns one, in each call: so a base has parameters, such as ``lambda:
            Normal(mean, log_scale.exp())``. If it takes the context, dim 0 of what it returns counts contexts, and one
            sample is what comes after: ``lambda c: Normal(net(c), 1)``. A tuple of these for a tuple wire.
        exact: See `with_log_det`.

    Returns:
        A value with ``log_prob(x)``, ``sample(shape)``, ``rsample(shape)`` and ``rsample_and_log_prob(shape)``, each
        with a ``context``: a tensor, or a tuple of tensors and anything else, whose dim 0 counts contexts.

    Shapes:
        ``log_prob``: ``(*batch, *event) -> batch``; with C contexts the batch is broadcast with ``(C,)``, so that x of
        ``(S, C, *event)`` or ``(S, 1, *event)`` gives ``(S, C)``. ``sample``: ``(*shape, *event)``, with contexts
        ``(*shape, C, *event)``. Where the base is one of single numbers, dim 0 of x is its batch, and a shape is all of
        it: ``sample((5, 3, 8, 8))``. Log-densities are summed up in at least float32, whatever the dtype of x.

    Cost:
        ``log_prob`` evaluates op once, the others its inverse once; ``rsample_and_log_prob`` needs nothing else.
        Contexts are repeated for each sample.

    Raises:
        OptionError: When the base is nothing of that.
        NotDifferentiableError: When a primitive of op has no rule for its log-determinant, or ``rsample`` is asked of a
            base that has none.
        WireError: When a function returns no distribution, when op or base read a context and none is given, or an
            empty one, when contexts do not fit the samples or what the base makes of them, when the base swallows the
            batch, or what it returns is no tensor.

    Example:
        >>> import invfunc as inv
        >>> log_normal = inv.flow(inv.ops.log(), torch.distributions.Normal(torch.zeros(1), 1.0))
        >>> log_normal.log_prob(torch.tensor([[1.0], [2.0]]))
        tensor([-0.9189, -1.8523])
        >>> log_normal.sample((4, 5)).shape
        torch.Size([4, 5, 1])
        >>> net = torch.nn.Linear(3, 2)
        >>> shift = inv.chain(inv.split(2), inv.couple(lambda x, c: net(torch.cat([x, c], 1))), inv.concat(2))
        >>> posterior = inv.flow(inv.ops.given(shift), torch.distributions.Normal(torch.zeros(4), 1.0))
        >>> x = posterior.sample((7,), context=torch.ones(5, 1))
        >>> x.shape, posterior.log_prob(x, context=torch.ones(5, 1)).shape
        (torch.Size([7, 5, 4]), torch.Size([7, 5]))

    Source:
        Tabak and Turner (2013); Rezende and Mohamed (2015).
    """
    check_op("flow", op)
    _check_base(base)
    reads_context = any(isinstance(fn, Given) for fn in op.functions)
    return Flow(op, base, with_log_det(op, exact=exact), reads_context, (_takes_two(op), _takes_two(invert(op))))


@ByKind
def _takes_two(op: Invertible) -> bool:
    """Whether an op is known to act on two components, and not on one."""
    return False


@_takes_two.register
def _(op: Pair) -> bool:
    return not op.residue and _takes_two_wires(op.both[0] if isinstance(op, Joint) else op.forward_fn)


@_takes_two.register
def _(op: Inverse) -> bool:
    inner = op.op
    if not isinstance(inner, Pair) or inner.residue:
        return False
    return _takes_two_wires(inner.both[1] if isinstance(inner, Joint) else inner.inverse_fn)


@_takes_two.register
def _(op: Chain) -> bool:
    return bool(op.parts) and _takes_two(op.parts[0])


@_takes_two.register
def _(op: Wrapper) -> bool:
    return _takes_two(op.op)


@_takes_two.register
def _(op: Half) -> bool:
    return True


@_takes_two.register
def _(op: Parallel) -> bool:
    return len(op.parts) == 2


def _takes_two_wires(fn: Callable[..., Any]) -> bool:
    return _takes(fn, None, None) and not _takes(fn, None)


# ---- the base --------------------------------------------------------------------------------------------------------


def _check_base(base: Base) -> None:
    """Raise unless a base is one of those that `flow` takes."""
    if isinstance(base, tuple) and base:
        for part in base:
            _check_base(part)
    elif isinstance(base, type) or not (_is_distribution(base) or callable(base)):
        raise OptionError(
            f"flow: the base is {base.__name__ if isinstance(base, type) else type(base).__name__}",
            expected="a distribution, a function that returns one, or a tuple of these",
        )


def _is_distribution(base: Base) -> bool:
    return hasattr(base, "log_prob") and not isinstance(base, type)


def _reads(base: Base) -> bool:
    """Whether a part of the base is a function that takes a context."""
    if isinstance(base, tuple):
        return any(map(_reads, base))
    return not _is_distribution(base) and _takes(base, None)


def _takes(fn: Callable[..., Any], *args: Any) -> bool:
    try:
        inspect.signature(getattr(fn, "forward", fn)).bind(*args)
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    return True


def _made(base: Base, context: Wire) -> Base:
    """The distributions of a base, of this call."""
    if isinstance(base, tuple):
        return tuple([_made(part, context) for part in base])
    if _is_distribution(base):
        return base
    given = () if context is None or not _takes(base, context) else (context,)
    if not _takes(base, *given):
        raise WireError(f"the base {name_of(base)} got no context", expected="one, its argument", cure="pass context=")
    made = base(*given)
    _check_made(made, base)
    return _of_contexts(made, base, _contexts(context)) if given else made


def _check_made(made: Any, fn: Base) -> None:
    for part in leaves(made):
        if not _is_distribution(part):
            raise WireError(f"the base {name_of(fn)} returned {describe(part)}", expected="a distribution, or a tuple")


def _of_contexts(made: Base, fn: Base, contexts: Size) -> Base:
    """A base that was made from contexts: dim 0 of its batch counts them, what comes after is of one sample."""
    if isinstance(made, tuple):
        return tuple([_of_contexts(part, fn, contexts) for part in made])
    batch = getattr(made, "batch_shape", None)
    if not (batch and contexts):
        return made
    if batch[0] not in (1, *contexts) or (len(batch) == 1 and not made.event_shape):
        raise WireError(
            f"the base {name_of(fn)} returned {made!r}",
            expected=f"a batch of shape ({contexts[0]}, ...): contexts first, then one sample",
            got=f"{tuple(batch)}",
            cure="Independent(base, 1) tells the last dim of a base as its event, also where it reads no context",
        )
    made = made.expand(contexts + batch[1:]) if batch[:1] != contexts else made
    return Independent(made, len(batch) - 1) if len(batch) > 1 else made


def _shown(base: Base) -> str:
    return name_of(base) if callable(base) else repr(base)


def _event(base: Base) -> Size:
    """The shape of one sample, of the first component; empty where the base does not say."""
    first = base[0] if isinstance(base, tuple) else base
    if isinstance(first, tuple):
        return _event(first)
    return getattr(first, "event_shape", None) or getattr(first, "batch_shape", Size())


def _numbers(base: Base) -> int:
    """How many numbers one sample has; 0 where the base does not say."""
    if isinstance(base, tuple):
        found = [_numbers(part) for part in base]
        return sum(found) if all(found) else 0
    return _event(base).numel() if _event(base) else 0


def _base_log_prob(base: Base, z: Wire, batch: Size) -> Tensor:
    if isinstance(base, tuple):
        if not (isinstance(z, tuple) and len(z) == len(base)):
            raise WireError(f"{len(base)} base distributions got latents {describe(z)}", expected="as many latents")
        return torch.stack([_base_log_prob(*both, batch) for both in zip(base, z, strict=True)]).sum(0)
    if not isinstance(z, Tensor):
        raise WireError(f"the base got latents {describe(z)}", expected="one tensor", cure="pass a tuple of bases")
    if _event(base) not in (Size(), z.shape[1:]):
        raise WireError(
            "the latents of a flow",
            expected=f"(batch, {', '.join(map(str, _event(base)))}), what one sample of the base is",
            got=describe(z),
            cure="give the base the shape of one latent",
        )
    if not batch.numel():  # torch's Independent knows no empty batch
        return sum_per_sample(z).view(batch)
    found = base.log_prob((z.to(at_least(z.dtype)) if _takes_any_dtype(base) else z).view(batch + z.shape[1:]))
    if not isinstance(found, Tensor) or found.shape[: len(batch)] != batch:
        raise WireError(
            f"the base's log_prob of {describe(z)} returned {describe(found)}",
            expected=f"a tensor of shape ({', '.join(map(str, batch))}, ...): the batch first",
            cure="let the event of the base be one sample",
        )
    return found.flatten(len(batch)).sum(-1, dtype=at_least(found.dtype)) if found.dim() > len(batch) else found


def _takes_any_dtype(base: Base) -> bool:
    """Whether a base is a formula; a flow or a transformed one may hold networks, which take their own dtype alone."""
    inner = base.base_dist if isinstance(base, Independent) else base
    return isinstance(inner, Distribution) and not isinstance(inner, TransformedDistribution)


def _size(shape: Shape) -> Size:
    """A shape of samples."""
    sizes = (shape,) if isinstance(shape, int) else shape
    expected = "a whole number or several, such as () or (5, 3)"
    check_option("a flow's sample: the shape", shape, lambda _: all([size >= 0 for size in Size(sizes)]), expected)
    return Size(sizes)


def _draw(base: Base, how: str, shape: Size, contexts: Size) -> Wire:
    if isinstance(base, tuple):
        return tuple([_draw(part, how, shape, contexts) for part in base])
    is_one_for_all = _event(base) and not (base.event_shape and base.batch_shape)
    try:
        found = getattr(base, how)(shape + contexts if is_one_for_all else shape)
    except NotImplementedError as error:
        raise NotDifferentiableError(
            f"the base {type(base).__name__} has no {how}",
            expected="samples that are functions of its parameters",
            cure="sample() has no gradient, and needs none",
        ) from error
    if not isinstance(found, Tensor):
        raise WireError(f"the base's {how} returned {describe(found)}", expected="a tensor")
    return found


# ---- the batch (NOTE [Batch]) ----------------------------------------------------------------------------------------


def _batch_dims(base: Base, x: Wire) -> int:
    """How many dims of x are batch (rule 1)."""
    own, numbers = [leaf for leaf in leaves(x) if is_differentiable(leaf)], _numbers(base)
    if not own:
        raise WireError(f"a flow got samples {describe(x)}", expected="floating-point tensors")
    likely = max(own[0].dim() - len(_event(base)), 0)
    for dims in (likely, *range(1, own[0].dim() + 1), 0) if numbers else ():
        if sum(prod(leaf.shape[dims:]) for leaf in own) == numbers:
            return dims
    return min(1, own[0].dim())


def _check_context(context: Wire) -> None:
    if not leaves(context):
        raise WireError(
            "a flow got an empty context",
            expected="a tensor, or a tuple of tensors and anything else",
            cure="leave context out where nothing reads one",
        )


def _contexts(context: Wire) -> Size:
    """``(C,)`` for C contexts; empty where there are none."""
    counts = {leaf.shape[0] for leaf in leaves(context) if isinstance(leaf, Tensor) and leaf.dim()}
    return torch.broadcast_shapes(*[(count,) for count in counts]) if counts else Size()


def _with_contexts(batch: Size, context: Wire) -> Size:
    """Rule 2."""
    try:
        return torch.broadcast_shapes(batch, _contexts(context))
    except RuntimeError:
        raise _mismatch(batch, context) from None


def _mismatch(batch: Size, context: Wire) -> WireError:
    return WireError(
        f"a flow got samples {tuple(batch)} and a context of {describe(context)}",
        expected="as many contexts as the last dim of the samples, or one",
        cure="one context for each: (C,) samples; several samples for each: (S, C), or (S, 1)",
    )


def _flat(wire: Wire, batch: Size, dims: int) -> Wire:
    """Rule 3: a wire whose first dims are the batch, or broadcast to it, with the batch as one."""
    return map_wire(partial(_flat_leaf, batch, dims), wire)


def _flat_leaf(batch: Size, dims: int, leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.dim() < dims or (dims == 1 and leaf.shape[:1] == batch):
        return leaf
    return leaf.expand(batch + leaf.shape[dims:]).reshape(batch.numel(), *leaf.shape[dims:])


def _unflat(wire: Wire, batch: Size) -> Wire:
    if len(batch) == 1:
        return wire
    return map_wire(lambda leaf: leaf.view(batch + leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf, wire)
