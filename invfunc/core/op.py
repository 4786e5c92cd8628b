"""The value: `Invertible`, a pair of functions that undo each other, and the category it forms.

A value is immutable. Composition is kept as structure until lowering, because an opaque pair would save nothing at the
peak: `lowering.py` walks the parts, and so do log-determinants, exact streams and plans.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, update_wrapper
from typing import Any, TypeAlias, get_type_hints

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from ..errors import NotInvertibleError, OptionError, place_error
from ..wires import Wire, is_differentiable, leaves, map_wire, spread
from .copies import copy_object

Residue: TypeAlias = Any  # what an op's function loses and its inverse needs; None where nothing is lost


class Invertible(abc.ABC):
    """A pair of functions that undo each other, as an immutable value.

    A wire is a tensor or a (nested) tuple of wires; an op maps one wire to one wire, and ``op(a, b)`` is sugar for
    ``op((a, b))``. Three meanings, each a walk over the structure::

        forward(x) -> y        inverse(y) -> x        pullback(y, gy) -> x, gx, closed

    **Laws** (`invfunc.testing` has each as a function, and `check_laws` tests them on your own values)::

        inverse(forward(x)) = x                               section
        forward(inverse(y)) = y                               retraction
        invert(invert(f)) = f                                 involution
        chain(chain(), f) = f = chain(f, chain())             identity
        chain(chain(f, g), h) = chain(f, chain(g, h))         associativity
        chain(f, g)(x) = g(f(x))                              order: left to right
        invert(chain(f, g)) = chain(invert(g), invert(f))     groupoid
        pullback(y, gy) = x, vjp(f, x)(gy)                    reverse mode

    Subclasses are final. Values are built by the constructors (`pair`, `chain`, `couple`, ...), not by these classes.

    Example:
        >>> op = pair(torch.exp, torch.log) >> pair(torch.sinh, torch.asinh)
        >>> ~op
        chain(invert(pair(sinh, asinh)), invert(pair(exp, log)))
        >>> torch.allclose((~op)(op(torch.ones(2))), torch.ones(2))
        True
    """

    implicit = False  # whether the op finds its own gradient: its forward is not to be differentiated
    compares = False  # whether its inverse is asked for what it tells, though nobody wants the input
    cancels = True  # of one that moves: whether it may be left out behind its inverse, though layouts differ then

    # ---- what each kind defines: forward and inverse, each with the residue that one leaves to the other ----------

    @abc.abstractmethod
    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        """``x -> (y, residue)``: the residue is what the inverse needs beside y."""

    @abc.abstractmethod
    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        """``(residue, y) -> x``."""

    @abc.abstractmethod
    def inverted(self) -> Invertible:
        """The op with forward and inverse exchanged."""

    def evaluate(self, x: Wire) -> Any:
        """The user's function of an op that goes on with what it returned: the first step of forward."""
        return None

    def forward_by(self, t: Any, x: Wire) -> tuple[Wire, Residue]:
        """The op with what its function has returned: `evaluate`, and then this, is `forward_with_residue`."""
        return self.forward_with_residue(x)

    def kept(self, x: Wire) -> Residue:
        """The input of either direction as its residue, where rounding leaves too little of it; else None."""
        return None

    # ---- what follows from them -----------------------------------------------------------------------------------

    def forward(self, x: Wire) -> Wire:
        """``x -> y``."""
        return self.forward_with_residue(x)[0]

    def undo(self, y: Wire) -> Wire:
        """``y -> x``."""
        return self.inverse_with_residue(None, y)

    def inverse(self, *ys: Wire, context: Mapping[str, Any] | None = None) -> Wire:
        """``y -> x``: what ``(~op)(y)`` is, of a wire and a context as a call of the op takes them."""
        return self._with_context(context).undo(_pack(ys))

    def pullback(self, y: Wire, gy: Wire) -> tuple[Wire, Wire, tuple[tuple[Tensor, Tensor], ...]]:
        """``(y, gy) -> (x, gx, closed)``: reverse mode from the output, in ordinary autograd.

        Args:
            y: The output.
            gy: The gradient with respect to it, a wire of the same structure.

        Returns:
            The rebuilt input, the gradient with respect to it, and ``(tensor, gradient)`` for every leaf tensor that
            the op's functions closed over.
        """
        live = LiveVJP()
        x, gx = self.pull(None, y, gy, live, None)
        return x, gx, tuple(live.closed.values())

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        """`pullback` with an engine: ``vjp`` evaluates functions and gathers the gradients of what they closed over.

        Generic rule: rebuild x, then run forward again with gradients. ``needs`` has the structure of x and tells which
        of its gradients are wanted; None means all.
        """
        x = vjp.run(self.inverse_with_residue, (residue, y))
        _, pull = vjp(lambda *x: self.forward(_pack(x)), x, needs)
        return x, pull(gy)

    def rebuild(self, residue: Residue, y: Wire, again: Again) -> Wire:
        """``y -> x`` in backward, evaluating again what forward's graph saved tensors of; see NOTE [Trunk].

        Generic rule: the inverse, then forward again until it has handed over the last of what it saved.
        """
        x = again.quietly(self.inverse_with_residue, residue, y)
        again.rewind()
        again.hand_over(self.forward_with_residue, x, again.like)
        return x

    @property
    def name(self) -> str:
        """The constructor's name, for paths in error messages."""
        return repr(self).partition("(")[0]

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's functions that this op calls: what they close over has to get its gradient."""
        return ()

    @property
    def parts(self) -> tuple[Invertible, ...]:
        """The ops that this op is made of."""
        return ()

    def __call__(self, *xs: Wire, context: Mapping[str, Any] | None = None) -> Wire:
        """``op(x)``, or ``op(a, b)`` for ``op((a, b))``.

        Args:
            xs: The wire.
            context: What functions of the op are told by name, each what it takes as a keyword argument: a mask,
                positions, what an encoder has found. Tensors get their gradient; an object that a function writes
                into, such as a cache, is seen as it was when the function runs again. ``op.inverse``, ``log_det``,
                ``check``, ``draw``, ``plan`` and all else that takes an op and its input take a context as well.

        Raises:
            OptionError: When no function takes one of the names, or one lacks a name that it needs.

        Example:
            >>> def f(x, scale):
            ...     return scale * x
            >>> from invfunc import couple
            >>> couple(f)(torch.ones(1), torch.ones(1), context={"scale": 10.0})
            (tensor([11.]), tensor([1.]))
        """
        try:
            return self._with_context(context).forward(_pack(xs))
        except TraceError as error:  # values of `torch.fx.symbolic_trace` have neither shapes nor parts
            raise OptionError(
                f"{self!r} is traced by torch.fx.symbolic_trace",
                expected="tensors: an op looks at their shapes",
                cure="let is_leaf_module of the torch.fx.Tracer say True of its module, or use torch.export",
            ) from error

    def _with_context(self, context: Mapping[str, Any] | None) -> Invertible:
        if context is None:
            return self
        from .context import with_context

        return with_context(self, context)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy whose functions use copies of what they close over."""
        return copy_object(self, memo)

    def _repr_html_(self) -> str:
        """The structure as a notebook shows it; see `invfunc.draw`."""
        from ..look.draw import draw

        return draw(self)._repr_html_()

    def __getattr__(self, name: str) -> Any:
        """What modules have and values have not: the error says where to find it."""
        face = "an op is a value and no module; inv.nn.Lowered(op) is one, with the parameters of its functions"
        return missing_attribute(self, name, face)

    def __invert__(self) -> Invertible:
        """``~op`` is ``invert(op)``."""
        return self.inverted()

    def __rshift__(self, other: Invertible | Callable[..., Any]) -> Invertible:
        """``f >> g`` is ``chain(f, g)``."""
        return chain(self, other)

    def __rrshift__(self, other: Callable[..., Any]) -> Invertible:
        """``fn >> op`` is ``chain(fn, op)`` for a plain callable ``fn``."""
        return chain(other, self)


def missing_attribute(value: object, name: str, face: str) -> str:
    """Raise for ``value.name``; ``face`` tells where there is what a module has."""
    if name == "__qualname__":  # by which torch names what it refuses as a submodule: "... is not a Module subclass"
        return f"{type(value).__qualname__} ({face})"
    belongs = not name.startswith("_") and hasattr(torch.nn.Module, name)
    raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}" + f": {face}" * belongs)


def _pack(xs: tuple[Wire, ...]) -> Wire:
    return xs[0] if len(xs) == 1 else xs


# ---- the engines of reverse mode, as ops see them ---------------------------------------------------------------


class Again(abc.ABC):
    """Evaluates functions again for `Invertible.rebuild`, as they ran in forward, and hands over what they save."""

    __slots__ = ()
    like: Wire  # of the structure of forward's input: what autograd knew of each leaf

    @abc.abstractmethod
    def quietly(self, fn: Callable[..., Any], *args: Any) -> Any:
        """``fn(*args)`` without gradients."""

    @abc.abstractmethod
    def evaluate(self, fn: Callable[..., Any], x: Wire, like: Wire) -> Any:
        """``fn(*x)`` with gradients; its graph's saved tensors are handed over, in the order of forward."""

    @abc.abstractmethod
    def hand_over(self, fn: Callable[[Wire], Any], x: Wire, like: Wire) -> None:
        """`evaluate` of ``fn(x)``, whose value nobody wants: it stops when the last tensor has been handed over."""

    @abc.abstractmethod
    def rewind(self) -> None:
        """Go back to the random numbers, pins and buffers with which forward began."""


class VJP(abc.ABC):
    """Evaluates functions for `Invertible.pull`; gathers the gradients of what they closed over."""

    rebuilds: bool = True  # whether anybody upstream wants x: a rearrangement that nobody asks for is not undone

    @abc.abstractmethod
    def run(self, fn: Callable[..., Any], x: Wire) -> Wire:
        """``fn(*x)``, as it ran in forward."""

    @abc.abstractmethod
    def __call__(self, fn: Callable[..., Any], x: Wire, needs: Wire | None) -> tuple[Wire, Callable[[Wire], Wire]]:
        """``fn(*x)`` and its pullback ``gy -> gx``, with None where ``needs`` is false."""

    @abc.abstractmethod
    def collect(self, closed: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add gradients of tensors that a function closed over."""


class LiveVJP(VJP):
    """The engine of `Invertible.pullback`: plain autograd, where closed-over leaves are found in the graph."""

    def __init__(self) -> None:
        self.closed: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, fn: Callable[..., Any], x: Wire) -> Wire:
        with torch.no_grad():
            return fn(*x) if isinstance(x, tuple) else fn(x)

    def __call__(self, fn: Callable[..., Any], x: Wire, needs: Wire | None) -> tuple[Wire, Callable[[Wire], Wire]]:
        needs = map_wire(is_differentiable, x) if needs is None else needs
        inner = map_wire(lambda leaf, need: leaf.detach().requires_grad_() if need else leaf, x, needs)
        with torch.enable_grad():
            out = spread(fn, inner)
        return map_wire(_detached, out), partial(self._pull, inner, out)

    def _pull(self, inner: Wire, out: Wire, gout: Wire) -> Wire:
        own = [leaf for leaf in leaves(inner) if isinstance(leaf, Tensor) and leaf.requires_grad]
        roots = [(o, g) for o, g in zip(leaves(out), leaves(gout), strict=True) if g is not None and o.requires_grad]
        closed = graph_leaves([o for o, _ in roots], {id(leaf) for leaf in own})
        inputs = [*own, *closed]
        if not (inputs and roots):
            return map_wire(lambda leaf: None, inner)
        outputs, gradients = zip(*roots, strict=True)
        found = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True, retain_graph=True)
        self.collect([(t, g) for t, g in zip(closed, found[len(own) :], strict=True) if g is not None])
        by_id = {id(t): g for t, g in zip(own, found, strict=False)}
        return map_wire(lambda leaf: by_id.get(id(leaf)), inner)

    def collect(self, closed: Sequence[tuple[Tensor, Tensor]]) -> None:
        for tensor, gradient in closed:
            if tensor.grad_fn is not None:  # given by a pullback: it goes on to the leaves that the tensor depends on
                sources = graph_leaves([tensor], set())
                found = torch.autograd.grad(tensor, sources, gradient, retain_graph=True)
                self.collect(list(zip(sources, found, strict=True)))
                continue
            before = self.closed.get(id(tensor))
            self.closed[id(tensor)] = (tensor, gradient if before is None else before[1] + gradient)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def graph_leaves(outputs: Sequence[Tensor], known: set[int]) -> list[Tensor]:
    """The leaf tensors that a graph reaches, found through its AccumulateGrad nodes; without those of known id."""
    nodes, seen, found = [o.grad_fn for o in outputs], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            found.append(leaf)
    return found


# ---- walks over the structure ------------------------------------------------------------------------------------


class ByKind:
    """A function that depends on the kind of its first argument, an op: a `functools.singledispatch` that compiles.

    Args:
        default: What is called for every other kind.
    """

    def __init__(self, default: Callable[..., Any]) -> None:
        self.default = default
        self.cases: dict[type, Callable[..., Any]] = {}
        self.nearest: dict[type, Callable[..., Any]] = {}  # of the kinds that were met
        update_wrapper(self, default)

    def register(self, case: Callable[..., Any]) -> Callable[..., Any]:
        """A decorator: the case for the kind that annotates its argument ``op``."""
        self.cases[get_type_hints(case)["op"]] = case
        self.nearest.clear()
        return case

    def __call__(self, op: Invertible, *args: Any) -> Any:
        """Call the case of the nearest kind."""
        case = self.nearest.get(type(op))
        if case is None:
            cases = [self.cases[kind] for kind in type(op).__mro__ if kind in self.cases]
            case = self.nearest[type(op)] = (*cases, self.default)[0]
        return case(op, *args)


# ---- primitives ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Pair(Invertible):
    """A primitive of two functions; built by `pair`."""

    forward_fn: Callable[..., Any]
    inverse_fn: Callable[..., Any]
    pullback_fn: Callable[..., Any] | None = None
    log_det_fn: Callable[..., Any] | None = None
    residue: bool = False
    label: str | None = None
    saturates: Callable[[Wire], bool] | None = field(default=None, kw_only=True)  # see `saturating`

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        out = spread(self.forward_fn, x, self.label)
        if not self.residue:
            return out, self.kept(x)
        if not (isinstance(out, tuple) and len(out) == 2):
            raise OptionError(
                f"{self!r} returned {type(out).__name__}", expected="(y, residue), as pair(..., residue=True) promises"
            )
        return out

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        if not self.residue:
            return spread(self.inverse_fn, y, self.label) if residue is None else residue
        if residue is None:
            raise NotInvertibleError(
                f"{self!r} needs its residue for the inverse",
                cure="keep it: y, r = op.forward_with_residue(x); op.inverse_with_residue(r, y)",
            )
        return self.inverse_fn(residue, *y) if isinstance(y, tuple) else self.inverse_fn(residue, y)

    def kept(self, x: Wire) -> Residue:
        return x if self.saturates is not None and self.saturates(x) else None

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        if self.pullback_fn is None or (residue is not None and not self.residue):
            return super().pull(residue, y, gy, vjp, needs)
        gy = map_wire(lambda g, leaf: torch.zeros_like(leaf) if g is None else g, gy, y)
        x, gx, *closed = vjp.run(self.pullback_fn, (residue, y, gy) if self.residue else (y, gy))
        vjp.collect(closed[0] if closed else ())
        return x, gx

    def inverted(self) -> Invertible:
        return Inverse(self)

    @cached_property
    def functions(self) -> tuple[Callable[..., Any], ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(fn for fn in (self.forward_fn, self.inverse_fn, self.pullback_fn) if fn is not None)

    def __repr__(self) -> str:
        return self.label or f"pair({name_of(self.forward_fn)}, {name_of(self.inverse_fn)})"


@dataclass(frozen=True, repr=False)
class Rearrangement(Invertible):
    """A primitive that moves elements without arithmetic (split, permute, reshape, ...).

    Its gradient moves as its values do, its log-determinant is 0, and its inverse is exact.
    """

    forward_fn: Callable[..., Any]
    inverse_fn: Callable[..., Any]
    label: str
    inverse_label: str

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        return self.forward_fn(x), None

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        return self.inverse_fn(y)

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        x = self.inverse_fn(y) if vjp.rebuilds else None
        if needs is not None and not any(leaves(needs)):
            return x, None
        return x, self.inverse_fn(map_wire(lambda g, leaf: torch.zeros_like(leaf) if g is None else g, gy, y))

    def inverted(self) -> Invertible:
        return Rearrangement(self.inverse_fn, self.forward_fn, self.inverse_label, self.label)

    def __repr__(self) -> str:
        return self.label


@dataclass(frozen=True, repr=False)
class OneWay(Invertible):
    """A stage without an inverse; built by `one_way`."""

    fn: Callable[..., Any]

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        return spread(self.fn, x), None

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        raise NotInvertibleError(
            f"{self!r} has no inverse", cure="give it one with pair(forward, inverse), or invert the rest without it"
        )

    def inverted(self) -> Invertible:
        return Inverse(self)

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return (self.fn,)

    def __repr__(self) -> str:
        return f"one_way({name_of(self.fn)})"


@dataclass(frozen=True, repr=False)
class Inverse(Invertible):
    """A primitive read backwards; built by `invert`."""

    op: Invertible

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        return self.op.inverse_with_residue(None, x), self.op.kept(x)

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        return self.op.forward_with_residue(y)[0] if residue is None else residue

    def inverted(self) -> Invertible:
        return self.op

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return self.op.functions

    def __repr__(self) -> str:
        return f"invert({self.op!r})"


# ---- composition -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Chain(Invertible):
    """Ops one after another, left to right; built by `chain`, or by `named` to be shown as one op."""

    _parts: tuple[Invertible, ...]
    labels: tuple[str, str] | None = None  # how the op and its inverse are shown

    def forward(self, x: Wire) -> Wire:
        return self._fold(lambda x, part: part.forward(x), x, enumerate(self._parts))

    def undo(self, y: Wire) -> Wire:
        return self._fold(lambda y, part: part.undo(y), y, self._backwards())

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        residues: list[Residue] = []

        def step(x: Wire, part: Invertible) -> Wire:
            y, residue = part.forward_with_residue(x)
            residues.append(residue)
            return y

        y = self._fold(step, x, enumerate(self._parts))
        return y, join_residues(residues)

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        residues = list(split_residue(residue, len(self._parts)))
        return self._fold(lambda y, part: part.inverse_with_residue(residues.pop(), y), y, self._backwards())

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        residues = list(split_residue(residue, len(self._parts)))

        def step(pulled: tuple[Wire, Wire], part: Invertible) -> tuple[Wire, Wire]:
            y, gy = pulled
            return part.pull(residues.pop(), y, gy, vjp, None)

        return self._fold(step, (y, gy), self._backwards())

    def inverted(self) -> Invertible:
        labels = None if self.labels is None else (self.labels[1], self.labels[0])
        return Chain(tuple(part.inverted() for part in reversed(self._parts)), labels)

    def _backwards(self):
        return reversed(list(enumerate(self._parts)))

    def _fold(self, step: Callable[[Any, Invertible], Any], x: Any, parts: Any) -> Any:
        """Run ``step`` through numbered parts; an error on its way up learns where it happened."""
        index = 0
        try:
            for index, part in parts:  # noqa: B007 - where an error happened
                x = step(x, part)
        except Exception as error:
            place_error(error, self.place(index))
            raise
        return x

    def place(self, index: int) -> str:
        """A part as the path of an error shows it; inside a named chain, nothing."""
        return "" if self.labels else f"chain stage {index} ({self._parts[index].name})"

    @property
    def parts(self) -> tuple[Invertible, ...]:
        return self._parts

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return tuple(fn for part in self._parts for fn in part.functions)

    def __repr__(self) -> str:
        if self.labels:
            return self.labels[0]
        return f"chain({', '.join(map(repr, self._parts))})"


def named(op: Invertible, label: str) -> Invertible:
    """Show a composition as the call that built it: ``label`` for the op, ``invert(label)`` for its inverse."""
    return Chain(op.parts if isinstance(op, Chain) else (op,), (label, f"invert({label})"))


def join_residues(residues: Sequence[Residue]) -> Residue:
    """The residues of several parts as one: None where no part lost anything."""
    return None if all(r is None for r in residues) else tuple(residues)


def split_residue(residue: Residue, count: int) -> tuple[Residue, ...]:
    """The inverse of `join_residues`."""
    return (None,) * count if residue is None else residue


def name_of(fn: Callable[..., Any]) -> str:
    """A user's function as ``repr`` shows it: a function by its name, a module by its class."""
    while isinstance(fn, partial):
        fn = fn.func
    if isinstance(fn, nn.Module):  # to ask one for what it has not got takes long
        return type(fn).__name__
    if isinstance(fn, Invertible):
        return repr(fn)
    owner = getattr(fn, "__self__", None)
    prefix = f"{owner!r}." if isinstance(owner, Invertible) else ""
    return prefix + (getattr(fn, "__name__", None) or type(fn).__name__)


# ---- constructors ----------------------------------------------------------------------------------------------


def pair(
    forward: Callable[..., Any],
    inverse: Callable[..., Any] | None = None,
    *,
    pullback: Callable[..., Any] | None = None,
    log_det: Callable[..., Any] | None = None,
    residue: bool = False,
    name: str | None = None,
) -> Any:
    """A primitive from two functions that undo each other; a decorator on ``forward`` when it lacks ``inverse``.

    .. math:: inverse(forward(x)) = x

    Args:
        forward: ``x -> y``. A tuple wire arrives as positional arguments and is returned as a tuple.
        inverse: ``y -> x``.
        pullback: ``(y, gy) -> (x, gx)``, or ``(x, gx, [(tensor, gradient), ...])`` with the gradients of the tensors
            that the functions close over. `Invertible.pullback` and `torch.func` transforms call it; ordinary autograd
            goes through forward's own graph. Without it, x is rebuilt and forward runs once more with gradients.
        log_det: ``(x, y) -> log|det J|``, a tensor with one number for each element of the batch (dim 0), or one
            Python number where it is the same for all.
        residue: ``forward`` returns ``(y, r)`` and ``inverse`` takes ``(r, y)``, ``pullback`` takes ``(r, y, gy)``: r
            is what the function loses. It is kept by the stage and never shown to the next op.
        name: What ``repr`` and error messages show.

    Cost:
        Lowered: nothing of the size of an activation is kept; backward evaluates ``inverse`` once and ``forward`` once
        with its vjp, or, below a `torch.func` transform, ``pullback`` once.

    Raises:
        OptionError: When forward or inverse is no function.

    Limits:
        Nothing proves that ``inverse`` undoes ``forward``, and a wrong one gives wrong gradients when lowered. Test
        yours with `invfunc.testing.check_laws`. A map into a larger space has an inverse that loses what lies off its
        range: lower that one as ``mark(~op, "store")``, or rebuild would put something else in its place.

    Example:
        >>> import torch
        >>> op = pair(torch.exp, torch.log)
        >>> op
        pair(exp, log)
        >>> op.inverse(op(torch.tensor(2.0)))
        tensor(2.)
        >>> @pair
        ... def shift(x):
        ...     return x + 1
        >>> op = shift(lambda y: y - 1)
    """
    if inverse is None:
        return partial(pair, forward, pullback=pullback, log_det=log_det, residue=residue, name=name)
    for role, fn in ("forward", forward), ("inverse", inverse):
        if not callable(fn):
            raise OptionError(f"pair: {role} is {type(fn).__name__}", expected="a function")
    return Pair(forward, inverse, pullback, log_det, residue, name)


def _always(x: Wire) -> bool:
    return True


def saturating(op: Any, saturates: Callable[[Any], bool] = _always) -> Invertible:
    """A pair that keeps its input where it is lowered, in either direction: see `Invertible.kept`.

    Near an end of a range numbers are sparse, and derivatives need all digits of the distance to it.
    """
    return replace(op, saturates=saturates)


def one_way(fn: Callable[..., Any]) -> Invertible:
    """A stage without an inverse (stem, pooling, head); plain callables in a `chain` become this.

    .. math:: y = fn(x)

    Args:
        fn: ``x -> y``, any callable or module. A tuple wire arrives as positional arguments.

    Cost:
        Lowered: it closes the trunk, so its input is stored (one activation), and it runs as plain autograd.

    Raises:
        OptionError: When ``fn`` is no function.
        NotInvertibleError: When its inverse is asked for.

    Example:
        >>> import torch
        >>> one_way(torch.sum)
        one_way(sum)
    """
    if not callable(fn):
        raise OptionError(f"one_way: got {type(fn).__name__}", expected="a function, a module or an invertible op")
    return OneWay(fn)


def lift(op: Invertible | Callable[..., Any]) -> Invertible:
    """An op as it is, any other callable as a `one_way` stage."""
    return op if isinstance(op, Invertible) else one_way(op)


def chain(*ops: Invertible | Callable[..., Any]) -> Invertible:
    r"""Ops one after another, left to right; also ``f >> g``.

    .. math:: chain(f, g)(x) = g(f(x)), \qquad chain(f, g)^{-1} = chain(g^{-1}, f^{-1})

    Args:
        ops: Any number of ops; a plain callable or module becomes a `one_way` stage. ``chain()`` is the identity,
            ``chain(f)`` is f, and nested chains flatten, so the laws of a category hold of the values themselves.

    Cost:
        Lowered: memory does not depend on the number of ops; each is undone once in backward.

    Example:
        >>> import torch
        >>> op = chain(pair(torch.exp, torch.log), pair(torch.sinh, torch.asinh))
        >>> op
        chain(pair(exp, log), pair(sinh, asinh))
        >>> chain(op, chain()) == op
        True
    """
    parts = tuple(part for op in map(lift, ops) for part in (op.parts if _flattens(op) else (op,)))
    return parts[0] if len(parts) == 1 else Chain(parts)


def _flattens(op: Invertible) -> bool:
    return type(op) is Chain and op.labels is None


def invert(op: Invertible) -> Invertible:
    r"""The op with forward and inverse exchanged; also ``~op``.

    .. math:: invert(f)(y) = f^{-1}(y), \qquad invert(invert(f)) = f

    Args:
        op: The op. Compositions are inverted part by part, so the result lowers as well as ``op`` does.

    Cost:
        Nothing until the result is called. It lowers as ``op`` does: its output is kept alone, whatever its depth.

    Raises:
        NotInvertibleError: When the result is called and a part has no inverse.

    Example:
        >>> import torch
        >>> invert(pair(torch.exp, torch.log))(torch.tensor(1.0))
        tensor(0.)
    """
    return check_op("invert", op).inverted()


def check_op(owner: str, op: Any) -> Invertible:
    """An op; raises if it is none, and tells a module with one that it has it."""
    if isinstance(op, Invertible):
        return op
    has_op = isinstance(getattr(op, "op", None), Invertible)
    cure = "pass its op: module.op" if has_op else "build it with pair(...)"
    raise NotInvertibleError(f"{owner}: {name_of(op)} is {type(op).__name__}", expected="an invertible op", cure=cure)
