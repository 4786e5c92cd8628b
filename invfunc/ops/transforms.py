"""Flows that exist: layers and networks of other libraries as ops, and ops as ``torch.distributions`` transforms.

Nothing of theirs is imported: a class is known by the package and the name that it, or what it inherits from, has.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints

from ..checkpoint import mark
from ..core.combine import Plumbing, check_components, parallel, permute_wires
from ..core.couple import sum_per_sample
from ..core.op import Invertible, chain, check_op, invert, pair, saturating
from ..debug import checking, require
from ..engine.parts import version
from ..engine.snapshot import Snapshot
from ..errors import NotInvertibleError, OptionError, WireError
from ..log_det import Joint, joint, with_log_det, zeros_for
from ..wires import Wire, describe

# ---- an op as a transform ----------------------------------------------------------------------------------------


class Entry:
    """An x and a y that belong together, of which one was made, the log-determinant, and what it was computed under."""

    def __init__(self, op: Invertible, x: Tensor, y: Tensor, log_det: Tensor, made: Tensor) -> None:
        self.x, self.y, self.log_det, self.made = x, y, log_det, made
        self.has_graph, self.states = torch.is_grad_enabled(), [*map(_state, (x, y))]
        self.snapshot = Snapshot(op.functions)
        self.snapshot.note()

    def holds(self) -> bool:
        """Whether the same would be computed again: with its gradient, from the same numbers and parameters."""
        is_enough = self.has_graph or not torch.is_grad_enabled()  # a sample has no graph, its density may need one
        return is_enough and [*map(_state, (self.x, self.y))] == self.states and self.snapshot.is_same()

    def gives(self, value: Tensor) -> bool:
        """Whether a value may be given: what was made is made again where another loss may have freed its graph."""
        return not (value is self.made and value.requires_grad)


def _state(x: Tensor) -> tuple[int, bool]:
    return version(x), x.requires_grad


class OpTransform(Transform):
    """An op as a ``torch.distributions.Transform``; built by `as_transform`."""

    bijective = True

    def __init__(self, op: Invertible, event_dim: int, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.op, self.counting, self.cached = op, with_log_det(op), cache_size
        self.latest: Entry | None = None
        self.domain = self.codomain = constraints.independent(constraints.real, event_dim)

    def with_cache(self, cache_size: int = 1) -> Transform:
        """The same transform with another cache."""
        return self if cache_size == self.cached else OpTransform(self.op, self.domain.event_dim, cache_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OpTransform) and (self.op, self.domain.event_dim) == (other.op, other.domain.event_dim)

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Tensor:
        """``op(x)``."""
        return self._call(x)  # torch's own cache does not ask whether a value still holds

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._inverse(y)

    def _call(self, x: Tensor) -> Tensor:
        if not self._keeps():
            return self._unbatched(x, self.op.forward(self._batched(x)))
        known = self._known()
        if known is None or known.x is not x or not known.gives(known.y):
            y, total = self._counted(self.counting, x)
            known = self.latest = Entry(self.op, x, y, total, y)
        return known.y

    def _inverse(self, y: Tensor) -> Tensor:
        if not self._keeps():
            return self._unbatched(y, self.op.inverse(self._batched(y)))
        known = self._known()
        if known is None or known.y is not y or not known.gives(known.x):
            x, total = self._counted(invert(self.counting), y)
            known = self.latest = Entry(self.op, x, y, -total, x)
        return known.x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det J|``, of the shape of x without its event."""
        known = self._known()
        if known is not None and known.x is x and known.y is y:
            return known.log_det
        return self._counted(self.counting, x)[1]

    @property
    def sign(self) -> int:
        """Nothing of an op tells it."""
        raise NotImplementedError(
            f"{self!r} does not know whether it rises or falls, which cdf and icdf ask: use torch.distributions' own"
        )

    def _keeps(self) -> bool:
        return self.cached > 0 and not torch.compiler.is_compiling()  # a graph computes what is the same once by itself

    def _known(self) -> Entry | None:
        return self.latest if self._keeps() and self.latest is not None and self.latest.holds() else None

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
        ``as_transform(op).with_cache()``, which keeps the latest x, y and log-determinant, with their graph. They are
        computed again where gradients are on and they were made without, and where x, y or a parameter has changed.

    Limits:
        Domain and codomain are declared real; the op itself says what it takes under ``inv.debug(True)``.

    Raises:
        OptionError: When ``event_dim`` is no number of dims.
        NotDifferentiableError: When a primitive of op has no rule for its log-determinant.
        WireError: When op changes the shape of an event.

    Example:
        >>> import torch, invfunc as inv
        >>> base = torch.distributions.Normal(torch.zeros(2), 1.0)
        >>> log_normal = torch.distributions.TransformedDistribution(base, as_transform(inv.ops.exp(), event_dim=0))
        >>> log_normal.log_prob(torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """
    if not isinstance(event_dim, int) or event_dim < 0:
        raise OptionError(f"as_transform: event_dim is {event_dim}", expected="0, 1, 2, ...")
    return OpTransform(check_op("as_transform", op), event_dim)


# ---- what exists as an op ----------------------------------------------------------------------------------------


def from_transform(transform: Any) -> Invertible:
    r"""A transform of `torch.distributions`, or a layer or network of zuko, nflows, normflows or FrEIA, as an op.

    .. math:: y = transform(x), \qquad x = transform^{-1}(y), \qquad from\_transform(as\_transform(op)) = op

    Compositions are taken apart into a chain, so that ``checkpoint`` of it trains at flat memory. An op that holds a
    whole network in one pair would save nothing: it is rebuilt, and held, at once.

    Args:
        transform: One of these, or a list of them:

            - ``torch.distributions``: a bijective transform; ``ComposeTransform`` is taken apart. Its cache is left
              out: a cached value may have been computed without gradients.
            - zuko: the same, with ``ComposedTransform``. A lazy transform, or a ``Flow``, is built anew in each call,
              so that the op is made once and follows the parameters.
            - nflows: a transform; ``CompositeTransform`` is taken apart. Of a ``Flow``, pass the transform.
            - normflows: a flow; ``Composite``, a ``NormalizingFlow``, and the list of its flows are taken apart.
            - FrEIA: an invertible module; ``SequenceINN`` and ``GraphINN`` are taken apart.

    Returns:
        The op, in the direction of the transform's own ``forward``; normflows' go from latents to data, ``~op`` back.
        Modules stay what they are: they own the parameters, under the keys they have. Where they take a context,
        `given` puts it beside x: ``given(op)(x, context)``.

    Shapes:
        Those of the transform, whose dim 0 is the batch where log-determinants are wanted. Several inputs or outputs
        of a ``GraphINN`` are a tuple wire.

    Domain:
        That of the transform.

    Cost:
        That of the transform. A log-determinant is taken from the call that makes the value, where there is one such:
        ``call_and_ladj`` of zuko, ``forward`` and ``inverse`` of nflows, normflows and FrEIA. Lowered, a transform of
        ``torch.distributions`` between numbers that end elsewhere than at 0, as of a tanh, keeps its input. So does a
        layer whose inverse is no help in a training step, which is marked ``"recompute"``: batch normalisation, planar
        and radial flows, Monte Carlo steps of normflows, and FrEIA's ``IResNetLayer``. Give others of that kind the
        mark: ``inv.mark(op, "recompute")``.

    Limits:
        A transform whose numbers end at 0 keeps nothing. Where it rounds to 0 or overflows, what is before it gets
        another gradient, and a `DriftWarning`: `exp`, `softplus` and `power` keep their input.

    Raises:
        NotInvertibleError: When it is not bijective; in a call of its inverse, when it says that it has none.
        OptionError: When it is none of these; `pair` and `log_det_pair` wrap any two functions.
        DomainError: Under ``inv.debug(True)``, when a value lies outside of a ``torch.distributions`` domain.

    Limits:
        A layer that writes its own state in forward (an activation normalisation that initialises itself) should have
        run once before it is trained lowered.

    Example:
        >>> import torch, invfunc as inv
        >>> t = torch.distributions.transforms
        >>> op = from_transform(t.ComposeTransform([t.ExpTransform(), t.AffineTransform(0.0, 2.0)]))
        >>> op
        chain(from_transform(ExpTransform()), from_transform(AffineTransform()))
        >>> inv.log_det(op, torch.zeros(2, 3))[1]
        tensor([2.0794, 2.0794])
    """
    if isinstance(transform, OpTransform):
        return transform.op
    for kind in type(transform).__mro__:
        rule = RULES.get(_key(kind))
        if rule is not None:
            return rule(transform)
    raise OptionError(
        f"from_transform: got {type(transform).__name__}",
        expected="a transform of torch.distributions, a layer of zuko, nflows, normflows or FrEIA, or a list of them",
        cure="inv.ops.log_det_pair(forward, inverse) wraps two functions that return (value, log_det)",
    )


def _key(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def _told(layer: Any, inverted: bool, call: Callable[..., Any], *args: Any) -> Any:
    """What a layer returns; a named error where it says that it has no inverse."""
    try:
        return call(*args)
    except Exception as error:
        is_missing = isinstance(error, NotImplementedError) or type(error).__name__ == "InverseNotAvailable"
        if not (inverted and is_missing):
            raise
        raise NotInvertibleError(
            f"{_shown(layer.inv if isinstance(layer, Transform) else layer)} has no inverse",
            cure="inv.mark(op, 'recompute') runs it again in backward, from its stored input",
        ) from error


def _chained(transforms: Iterable[Any]) -> Invertible:
    return chain(*map(from_transform, transforms))


def _shown(transform: Any) -> str:
    """As ``repr`` shows it, in one line; a module by its class."""
    shown = type(transform).__name__ if isinstance(transform, nn.Module) else " ".join(repr(transform).split())
    return f"from_transform({shown})"


# ---- torch.distributions and zuko --------------------------------------------------------------------------------


def _of_torch(transform: Transform) -> Invertible:
    if not transform.bijective:
        raise NotInvertibleError(
            f"from_transform: {transform!r} is not bijective",
            cure="use it as a plain function, a one_way stage",
        )
    pure = transform.with_cache(0)
    if hasattr(pure, "call_and_ladj"):
        op = _joint(partial(_itself, pure), _shown(transform), False)
    else:
        rule = partial(_transform_log_det, pure)
        there, back = partial(_through, pure), partial(_through, pure.inv, inverted=True)
        op = pair(there, back, log_det=rule, name=_shown(transform))
    return op if _has_fine_ends(pure.domain) and _has_fine_ends(pure.codomain) else saturating(op)


def _has_fine_ends(constraint: Any) -> bool:
    """Whether numbers are close to each other near every end: all numbers, or the positive ones."""
    inner = getattr(constraint, "base_constraint", None)
    fine = constraints.real, constraints.positive, constraints.nonnegative
    return constraint in fine if inner is None else _has_fine_ends(inner)


def _itself(transform: Transform) -> Transform:
    return transform


def _joint(make: Callable[..., Transform], label: str, sees_condition: bool) -> Invertible:
    """An op of the transform that ``make`` gives for a condition, if it sees one."""
    values = partial(_value, make, False), partial(_value, make, True)
    both = partial(_both, make, False), partial(_both, make, True)
    return Joint(*values, log_det_fn=partial(_log_det, make), label=label, both=both, sees_condition=sees_condition)


def _made(make: Callable[..., Transform], inverted: bool, condition: tuple[Any, ...]) -> Transform:
    found = make(*condition)
    return found.inv if inverted else found


def _value(make: Callable[..., Transform], inverted: bool, x: Tensor, *condition: Any) -> Tensor:
    y = _through(_made(make, inverted, condition), x, inverted)
    _let_go(inverted)
    return y


def _both(make: Callable[..., Any], inverted: bool, x: Tensor, *condition: Any) -> tuple[Tensor, Tensor]:
    transform: Any = _made(make, inverted, condition)
    y, log_det = _told(transform, inverted, transform.call_and_ladj, x)
    _let_go(inverted)
    return y, sum_per_sample(log_det)


def _let_go(inverted: bool) -> None:
    """A transform and its inverse refer to each other: what they have made in a call is left to the collector."""
    if inverted:
        gc.collect(0)  # the youngest objects: some microseconds


def _log_det(make: Callable[..., Transform], x: Tensor, y: Tensor) -> Tensor:
    return _transform_log_det(make(), x, y)


def _through(transform: Transform, x: Tensor, inverted: bool = False) -> Tensor:
    if checking():
        require(repr(transform), x, transform.domain.check, f"its domain, {transform.domain}")
    return _told(transform, inverted, transform, x)


def _transform_log_det(transform: Transform, x: Tensor, y: Tensor) -> Tensor:
    return sum_per_sample(transform.log_abs_det_jacobian(x, y))


# ---- nflows and normflows: forward and inverse return (y, log_det) -----------------------------------------------


def _of_layer(layer: Any) -> Invertible:
    takes_context = "context" in signature(layer.forward).parameters
    both = partial(_called, layer, takes_context), partial(_called, layer.inverse, takes_context)
    return _runnable(layer, joint(*both, _shown(layer), takes_context))


def _called(method: Any, takes_context: bool, *x: Any) -> tuple[Wire, Any]:
    """What a method tells, in wires: where theirs are lists, ours are tuples."""
    several = len(x) > 1 and not takes_context
    given = (list(x),) if several else x
    y, log_det = _told(getattr(method, "__self__", method), hasattr(method, "__self__"), method, *given)
    return tuple(y) if isinstance(y, list) else y, log_det


# ---- FrEIA: one method for both directions, on tuples -------------------------------------------------------------


def _of_module(module: Any) -> Invertible:
    counts = len(module.dims_in), len(module.output_dims(module.dims_in))
    return _run_by(module, counts, range(len(module.dims_c)))


def _run_by(module: nn.Module, counts: tuple[int, int], conditions: Sequence[int]) -> Invertible:
    """A module as an op: how many tensors go in and come out, and which of the conditions it takes."""
    there, back = [partial(_run, module, rev, count, tuple(conditions)) for rev, count in enumerate(counts)]
    return _runnable(module, joint(there, back, _shown(module), bool(conditions)))


def _run(module: Any, rev: int, count: int, chosen: tuple[int, ...], *x: Any) -> tuple[Wire, Any]:
    given = x[count:]
    if chosen and max(chosen) >= len(given):
        raise WireError(
            f"{_shown(module)} got {len(given)} conditions",
            expected=f"at least {max(chosen) + 1}",
            cure="inv.ops.given(op)(x, condition), or a tuple of conditions",
        )
    conditions = {"c": [given[i] for i in chosen]} if chosen else {}
    y, log_det = _told(module, bool(rev), partial(module, rev=bool(rev), **conditions), x[:count])
    return y[0] if len(y) == 1 else tuple(y), log_det


def _of_sequence(net: Any) -> Invertible:
    picks = [[] if i is None else [i] for i in net.conditions]
    return chain(*(_run_by(module, (1, 1), pick) for module, pick in zip(net.module_list, picks, strict=True)))


def _of_graph(net: Any) -> Invertible:
    """A stage for each node, on all tensors that a later node, or the end, wants."""
    live = [(node, 0) for node in net.in_nodes]
    stages: list[Invertible] = []
    for node in net.node_list:
        if node.module is not None:
            stages.append(_node_stage(node, net.condition_nodes, live))
    ends = [live.index(tuple(node.inputs[0])) for node in net.out_nodes]
    return chain(*stages, permute_wires(ends) if len(ends) > 1 else chain())


def _node_stage(node: Any, conditions: Sequence[Any], live: list[tuple[Any, int]]) -> Invertible:
    """The stage of a node; ``live`` says which tensors the components are, before it and, changed, after it."""
    before, made = len(live), [(node, i) for i in range(len(node.outputs))]
    taken = [live.index(tuple(source)) for source in node.inputs]
    live[:] = [*(source for i, source in enumerate(live) if i not in taken), *made]
    op = _run_by(node.module, (len(taken), len(made)), [conditions.index(c) for c in node.conditions])
    others = len(live) > len(made)
    take, give = _lend(taken, before), _lend(range(len(live) - len(made), len(live)), len(live))
    return chain(take, parallel(op, chain()) if others else op, invert(give))


def _lend(taken: Sequence[int], count: int) -> Invertible:
    """``(x_0, ..., x_n) -> (the components that are taken, the others)``; without the others where there are none."""
    taken = tuple(taken)
    labels = f"lend({list(taken)})", f"take_back({list(taken)})"
    return Plumbing(partial(_take, taken, count), partial(_give, taken, count), *labels)


def _take(taken: tuple[int, ...], count: int, x: Wire) -> Wire:
    if count > 1:
        check_components("a network of FrEIA", x, count)
    parts = x if count > 1 else (x,)
    own = _wire([parts[i] for i in taken])
    others = tuple(part for i, part in enumerate(parts) if i not in taken)
    return (own, others) if others else own


def _give(taken: tuple[int, ...], count: int, x: Wire) -> Wire:
    own, others = x if len(taken) < count else (x, ())
    left, parts = iter(others), dict(zip(taken, own if len(taken) > 1 else (own,), strict=True))
    return _wire([parts[i] if i in parts else next(left) for i in range(count)])


def _wire(parts: Sequence[Wire]) -> Wire:
    return parts[0] if len(parts) == 1 else tuple(parts)


# ---- layers whose inverse can not rebuild what forward was given ---------------------------------------------------


def _runnable(layer: Any, op: Invertible) -> Invertible:
    """The op of a layer, which is run again from its input where its inverse can not give that back."""
    is_listed = any(_key(kind) in NOT_REBUILT for kind in type(layer).__mro__)
    return mark(op, "recompute") if is_listed else op


NOT_REBUILT = {
    "nflows.BatchNorm",  # none in training
    "normflows.BatchNorm",
    "normflows.Planar",
    "normflows.Radial",
    "normflows.HamiltonianMonteCarlo",  # theirs is forward, with other draws
    "normflows.MetropolisHastings",
    "FrEIA.IResNetLayer",  # takes gradients of its own
}
"""Layers without an inverse that a training step could use."""


# ---- which is which ----------------------------------------------------------------------------------------------


def _of_flow(flow: nn.Module) -> Invertible:
    raise OptionError(
        "from_transform: got a Flow of nflows, which holds a base distribution, too",
        expected="its transform",
        cure="pass what you gave to Flow(transform, distribution)",
    )


RULES: dict[str, Callable[[Any], Invertible]] = {
    "builtins.list": _chained,
    "builtins.tuple": _chained,
    "torch.ModuleList": _chained,
    "torch.Transform": _of_torch,
    "torch.ComposeTransform": lambda t: _chained(t.parts),
    "torch.IndependentTransform": lambda t: from_transform(t.base_transform),
    "zuko.ComposedTransform": lambda t: _chained(t.transforms),
    "zuko.DependentTransform": lambda t: from_transform(t.base),
    "zuko.Flow": lambda flow: from_transform(flow.transform),
    "zuko.LazyComposedTransform": lambda t: _chained(t.transforms),
    "zuko.LazyInverse": lambda t: invert(from_transform(t.transform)),
    "zuko.LazyTransform": lambda t: _joint(t, _shown(t), True),
    "nflows.CompositeTransform": lambda t: _chained(t._transforms),
    "nflows.InverseTransform": lambda t: invert(from_transform(t._transform)),
    "nflows.Transform": _of_layer,
    "nflows.Flow": _of_flow,
    "normflows.NormalizingFlow": lambda flow: _chained(flow.flows),
    "normflows.Composite": lambda flow: _chained(flow._flows),
    "normflows.Reverse": lambda flow: invert(from_transform(flow.flow)),
    "normflows.Flow": _of_layer,
    "FrEIA.SequenceINN": _of_sequence,
    "FrEIA.GraphINN": _of_graph,
    "FrEIA.InvertibleModule": _of_module,
}
"""What to do with a class, by its package and name; the nearest that it inherits from counts."""
