"""Couplings beyond two streams: many streams, a condition, a mask, splines, recursion. All are built from `couple`.

A coupling with one function is one-sided: ``couple(f)`` changes the first component and passes the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpointed, Marked
from ..core.combine import Parallel, Plumbing, check_components, parallel, split
from ..core.couple import Half, additive, as_law, couple
from ..core.op import ByKind, Chain, Inverse, Invertible, Rearrangement, chain, invert, lift, name_of, named
from ..engine.devices import beside
from ..errors import OptionError, WireError
from ..log_det import Joint
from ..wires import Wire, describe
from .iterative import Solved, with_function
from .shape import check_tensor
from .splines import rational_quadratic_spline

# ---- more than two streams -----------------------------------------------------------------------------------------


def _bring(i: int, count: int, label: str, x: Wire) -> Wire:
    """``(x_0, ..., x_n) -> (x_i, the others)``."""
    check_components(label, x, count)
    return x[i], (*x[:i], *x[i + 1 :])


def _return(i: int, x: Wire) -> Wire:
    changed, others = x
    return (*others[:i], changed, *others[i:])


def _in_front(i: int, count: int, label: str) -> Plumbing:
    return Plumbing(partial(_bring, i, count, label), partial(_return, i), f"bring({i})", f"return({i})")


@dataclass(frozen=True)
class Reads:
    """A stream's function, given the other streams in one of the ways of `couple_streams`."""

    fn: Callable[..., Any]
    reads: str
    place: int
    count: int  # of the other streams; what comes after them is a condition

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, *xs: Wire) -> Wire:
        others, given = xs[: self.count], xs[self.count :]
        return self.fn(*_READS[self.reads](others, self.place), *given)


def _read_each(others: tuple[Tensor, ...], place: int) -> tuple[Tensor, ...]:
    return others


def _read_sum(others: tuple[Tensor, ...], place: int) -> tuple[Tensor, ...]:
    _check_alike("sum", others, [other.shape for other in others])
    total = others[0]
    for other in others[1:]:
        total = total + other
    return (total,)


def _read_concat(others: tuple[Tensor, ...], place: int) -> tuple[Tensor, ...]:
    for other in others:
        check_tensor("couple_streams: reads='concat'", other, 2)
    _check_alike("concat", others, [(other.shape[0], other.shape[2:]) for other in others])
    return (torch.cat(others, 1),)


def _check_alike(reads: str, others: tuple[Tensor, ...], shapes: Sequence[Any]) -> None:
    if any(shape != shapes[0] for shape in shapes):
        raise WireError(
            f"couple_streams: reads={reads!r} of components {describe(others)}",
            expected="one shape" if reads == "sum" else "shapes that differ along dim 1 alone",
            cure="reads='each' hands them over one by one",
        )


def _read_previous(others: tuple[Tensor, ...], place: int) -> tuple[Tensor, ...]:
    return (others[place - 1],) if place else _read_sum(others, place)


_READS = {"each": _read_each, "sum": _read_sum, "concat": _read_concat, "previous": _read_previous}


def couple_streams(
    fns: Sequence[Callable[..., Any] | None],
    *,
    law: Callable[..., Invertible] = additive,
    reads: str = "each",
) -> Invertible:
    r"""Any number of components change one after another, each by what the others hold by then.

    .. math:: y_i = law(f_i(y_1, \dots, y_{i-1}, x_{i+1}, \dots, x_n))(x_i), \qquad i = 1, \dots, n

    Args:
        fns: One callable or module for each component; None where a component passes untouched.
        law: As in `couple`.
        reads: What ``f_i`` receives: ``"each"``, the other components as positional arguments; ``"sum"``, their sum;
            ``"concat"``, their concatenation along dim 1; ``"previous"``, only the component changed just before, and
            for the first the sum of the others, which is the grouped reversible block.

    Shapes:
        A tuple of n components, unchanged; any dtype that the functions and the law take. For ``"sum"`` they have one
        shape.

    Domain:
        All that the law takes, onto all that it makes: for `additive` and `affine` all of it, onto all of it.

    Cost:
        The inverse evaluates each f once. Lowered: nothing is kept but what the functions close over; each f is
        evaluated exactly twice in a training step.

    Log-determinant:
        The sum of the laws'.

    Raises:
        OptionError: When there are fewer than two components, or ``reads`` is none of these.
        WireError: When the wire has another number of components, or an f returns something that does not fit.

    Example:
        >>> import torch
        >>> op = couple_streams([torch.sin, torch.cos, torch.tanh], reads="sum")
        >>> x = (torch.zeros(1), torch.ones(1), torch.ones(1))
        >>> y = op(x)
        >>> [round(t.item(), 4) for t in y]
        [0.9093, 0.6679, 1.9182]
        >>> all(torch.allclose(a, b) for a, b in zip(op.inverse(y), x))
        True

    Source:
        Li et al., Training Graph Neural Networks with 1000 Layers (grouped RevGNN, 2021).
    """
    fns = tuple(fns)
    shown = f"couple_streams([{', '.join('None' if fn is None else name_of(fn) for fn in fns)}]"
    shown += as_law(law).suffix + (f", reads={reads!r}" if reads != "each" else "")
    if len(fns) < 2:
        raise OptionError(
            f"couple_streams: got {len(fns)} functions", expected="one for each of two or more components"
        )
    if reads not in _READS:
        raise OptionError(f"couple_streams: reads is {reads!r}", expected=f"one of {', '.join(map(repr, _READS))}")
    steps = [_stream(fn, law, reads, i, len(fns)) for i, fn in enumerate(fns) if fn is not None]
    return named(chain(*steps), f"{shown})")


def _stream(fn: Callable[..., Any], law: Callable[..., Invertible], reads: str, i: int, count: int) -> Invertible:
    front = _in_front(i, count, f"couple_streams of {count} components")
    return chain(front, Half(Reads(fn, reads, i, count - 1), law, 0, f"fns[{i}]"), invert(front))


# ---- a condition ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """A coupling's function that receives a condition after its own arguments."""

    fn: Callable[..., Any]

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, x: Wire, condition: Wire) -> Wire:
        return self.fn(*_arguments(x), *_arguments(condition))

    @property
    def __name__(self) -> str:
        return name_of(self.fn)


@dataclass(frozen=True)
class Passing(Given):
    """A function of a `Joint` on ``(x, condition)`` that hands the condition on."""

    def __call__(self, x: Wire, condition: Wire) -> tuple[Wire, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, log_det = super().__call__(x, condition)
        return (y, condition), log_det


def _arguments(wire: Wire) -> tuple[Any, ...]:
    return wire if isinstance(wire, tuple) else (wire,)


def given(op: Invertible) -> Invertible:
    r"""An op whose couplings also see a condition: a second component of the wire that passes through untouched.

    .. math:: (x, c) \mapsto (op_c(x), c), \qquad op_c = op \text{ with } f(x_2, c) \text{ for each coupling's } f(x_2)

    Args:
        op: An op that contains at least one coupling, `residual_flow`, `autoregressive`, or layer of `from_transform`
            that takes a context, under any composition. Its other parts act on x alone.

    Shapes:
        ``(x, c) -> (y, c)``: x is the wire of ``op``; c is anything, and a tuple becomes several positional arguments.
        Tensors in c get their gradient, summed over the couplings; integer tensors, None and other objects ride along.

    Domain:
        That of ``op``, at every condition.

    Cost:
        That of ``op``. Lowered: c is kept once, at the end of the trunk; every f is evaluated exactly twice in a step.

    Log-determinant:
        That of ``op`` at this condition.

    Raises:
        OptionError: When no part of ``op`` is a coupling, so that nothing could see the condition.
        WireError: When the wire is not a pair.

    Limits:
        A condition that functions take by name needs no `given`: ``op(x, context={...})`` tells each what it takes. On
        the wire a condition costs no rebuilding of the op for each input, and can be an input of `torch.vmap`.

    Example:
        >>> import torch
        >>> from invfunc import couple
        >>> op = given(couple(torch.add, torch.mul))
        >>> op
        given(couple(add, mul))
        >>> x, c = (torch.tensor([1.0]), torch.tensor([2.0])), torch.tensor([10.0])
        >>> op(x, c)
        ((tensor([13.]), tensor([132.])), tensor([10.]))
        >>> op.inverse(op(x, c)) == (x, c)
        True

    Source:
        Ardizzone et al., Guided image generation with conditional invertible neural networks (2019).
    """
    if not isinstance(op, Invertible):
        raise OptionError(f"given: got {name_of(op)}", expected="an invertible op, such as couple(f, g)")
    if not _couples(op):
        raise OptionError(f"given: {op!r} has no coupling", expected="a function that could take the condition")
    found = _given(op)
    if isinstance(found, Chain) and found.labels:
        return found
    return Chain(found.parts if isinstance(found, Chain) else (found,), (f"given({op!r})", f"given({invert(op)!r})"))


def _couples(op: Invertible) -> bool:
    parts = (op.op,) if isinstance(op, Inverse) else op.parts
    if isinstance(op, Joint):
        return op.sees_condition
    return isinstance(op, (Half, Solved)) or any(map(_couples, parts))


@ByKind
def _given(op: Invertible) -> Invertible:
    """The op on ``(x, condition)``."""
    if _couples(op):
        raise OptionError(f"given: {op!r} hides a coupling", expected="chain, parallel and couple around couplings")
    return parallel(op, chain())


@_given.register
def _(op: Chain) -> Invertible:
    parts = tuple(map(_given, op.parts))
    return Chain(parts, op.labels and (f"given({op.labels[0]})", f"given({op.labels[1]})"))


@_given.register
def _(op: Solved) -> Invertible:
    return with_function(op, Given)


@_given.register
def _(op: Inverse) -> Invertible:
    return invert(_given(op.op))


@_given.register
def _(op: Joint) -> Invertible:
    if not op.sees_condition:
        return parallel(op, chain())
    values = partial(_passing, op.forward_fn), partial(_passing, op.inverse_fn)
    both = Passing(op.both[0]), Passing(op.both[1])
    return Joint(*values, log_det_fn=partial(_passing_log_det, both[0]), label=f"given({op!r})", both=both)


def _passing(fn: Callable[..., Any], x: Wire, condition: Wire) -> Wire:
    """A function on ``(x, condition)`` that hands the condition on."""
    return fn(*_arguments(x), *_arguments(condition)), condition


def _passing_log_det(both: Passing, x: tuple[Wire, Wire], y: Wire) -> Any:
    return both(*x)[1]


def _given_within(op: Checkpointed | Marked) -> Invertible:
    return op.mapped(_given)


_given.cases |= dict.fromkeys((Checkpointed, Marked), _given_within)


@_given.register
def _(op: Parallel) -> Invertible:
    count = len(op.parts)
    return chain(*(_given_component(i, count, part) for i, part in enumerate(op.parts)))


def _given_component(i: int, count: int, part: Invertible) -> Invertible:
    labels = f"lend({i})", f"take_back({i})"
    lend = Plumbing(partial(_lend_component, i, count), partial(_take_component, i), *labels)
    return chain(lend, parallel(_given(part), chain()), invert(lend))


def _lend_component(i: int, count: int, x: Wire) -> Wire:
    """``((x_0, ..., x_n), c) -> ((x_i, c), the others)``."""
    parts, condition = _pair_of(x)
    changed, others = _bring(i, count, f"parallel of {count} ops", parts)
    return (changed, condition), others


def _take_component(i: int, x: Wire) -> Wire:
    (changed, condition), others = x
    return _return(i, (changed, others)), condition


@_given.register
def _(op: Half) -> Invertible:
    labels = f"lend({op.target})", f"take_back({op.target})"
    lend = Plumbing(partial(_lend_other, op.target), partial(_take_other, op.target), *labels)
    return chain(lend, Half(Given(op.fn), op.law, 0, op.label), invert(lend))


def _lend_other(target: int, x: Wire) -> Wire:
    """``((x_target, x_other), c) -> (x_target, (x_other, c))``, whichever comes first."""
    parts, condition = _pair_of(x)
    check_components("couple", parts, 2)
    return parts[target], (parts[1 - target], condition)


def _take_other(target: int, x: Wire) -> Wire:
    changed, (other, condition) = x
    return ((changed, other) if target == 0 else (other, changed)), condition


def _pair_of(x: Wire) -> Wire:
    if isinstance(x, tuple) and len(x) == 2:
        return x
    raise WireError(f"given received {describe(x)}", expected="a pair (x, condition)", cure="pass op(x, condition)")


# ---- a mask --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mask:
    """Which elements of the last dimensions of a tensor are True, as two lists of places."""

    shape: tuple[int, ...]
    places: tuple[Tensor, Tensor]  # of the True and of the False elements, in the flattened dimensions
    order: Tensor  # where each element went in the concatenation of the two

    def split(self, x: Wire) -> Wire:
        """``x -> (elements under the mask, the other elements)``, each flat in the masked dimensions."""
        self.check(x)
        return self.gather(0, x, x.dim()), self.gather(1, x, x.dim())

    def merge(self, y: Wire) -> Tensor:
        """The inverse of `split`."""
        check_components("merge_mask", y, 2)
        self._check_parts(y)
        flat = torch.cat(y, -1).index_select(-1, beside(self.order, y[0]))
        return flat.unflatten(-1, self.shape)

    def gather(self, side: int, t: Tensor, dims: int) -> Tensor:
        """The elements of one side; dimensions of t beyond ``dims`` belong to each element."""
        first = dims - len(self.shape)
        flat = t.flatten(first, dims - 1) if len(self.shape) > 1 else t
        return flat.index_select(first, beside(self.places[side], t))

    def alone(self, kept: Tensor) -> Tensor:
        """The elements under the mask in their places, zero elsewhere."""
        rest = kept.new_zeros(*kept.shape[:-1], self.places[1].numel())
        return self.merge((kept, rest))

    def _check_parts(self, y: tuple[Tensor, Tensor]) -> None:
        counts = [side.numel() for side in self.places]
        if [part.shape[-1] for part in y] != counts or y[0].shape[:-1] != y[1].shape[:-1]:
            raise WireError(
                f"merge_mask received {describe(y)}",
                expected=f"(batch, ..., {counts[0]}) and (batch, ..., {counts[1]})",
            )

    def check(self, x: Wire) -> None:
        """Raise unless the mask covers the last dimensions of x, and not its batch."""
        if isinstance(x, Tensor) and x.shape[max(x.dim() - len(self.shape), 0) :] == self.shape:
            return
        raise WireError(
            f"a mask of shape {self.shape} on {describe(x)}",
            expected=f"a tensor of shape (batch, ..., {', '.join(map(str, self.shape))})",
            cure="expand the mask to the dimensions it covers, without the batch",
        )


def _mask(mask: Tensor) -> Mask:
    if not isinstance(mask, Tensor) or mask.dim() == 0:
        raise OptionError(f"mask is {describe(mask)}", expected="a bool tensor with at least one dimension")
    on = mask if mask.dtype is torch.bool else mask != 0
    places = tuple(side.flatten().nonzero().flatten() for side in (on, ~on))
    order = torch.empty(mask.numel(), dtype=torch.long, device=mask.device)
    order[torch.cat(places)] = torch.arange(mask.numel(), device=mask.device)
    return Mask(tuple(mask.shape), (places[0], places[1]), order)


def split_mask(mask: Tensor) -> Invertible:
    r"""One tensor into the elements under a mask and the other elements.

    .. math:: x \mapsto (x_p : m_p = 1,\; x_p : m_p = 0)

    Args:
        mask: True (or nonzero) for the first part; it covers the last dimensions of the input, without the batch.

    Shapes:
        ``(N, ..., *mask.shape) -> (N, ..., K), (N, ..., M - K)`` where K of the mask's M elements are True; any dtype.

    Domain:
        All of it, onto all of it.

    Cost:
        Two copies of the tensor. Values and gradients are moved, not computed: the inverse is exact, the
        log-determinant 0.

    Raises:
        WireError: When the mask does not cover the last dimensions.

    Example:
        >>> import torch
        >>> op = split_mask(torch.tensor([True, False, True]))
        >>> op(torch.tensor([[1, 2, 3]]))
        (tensor([[1, 3]]), tensor([[2]]))
        >>> op.inverse(op(torch.tensor([[1, 2, 3]])))
        tensor([[1, 2, 3]])

    Source:
        The partition of Dinh et al., Real NVP (2017).
    """
    return _split_by(_mask(mask))


def _split_by(mask: Mask) -> Invertible:
    shown = f"({mask.places[0].numel()} of {mask.order.numel()})"
    return Rearrangement(mask.split, mask.merge, f"split_mask{shown}", f"merge_mask{shown}")


@dataclass(frozen=True)
class Masked:
    """A net on whole tensors, as a function from the kept elements to what the law needs for the others."""

    fn: Callable[..., Any]
    mask: Mask

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, kept: Tensor, *given: Wire) -> Wire:
        x = self.mask.alone(kept)
        t = self.fn(x, *given)
        return tuple(self._others(part, x) for part in t) if isinstance(t, tuple) else self._others(t, x)

    def _others(self, t: Any, x: Tensor) -> Tensor:
        fits = isinstance(t, Tensor) and t.dim() >= x.dim()
        if not fits or any(a not in (1, b) for a, b in zip(t.shape, x.shape, strict=False)):
            raise WireError(
                f"{name_of(self.fn)} returned {describe(t)}", expected=f"{describe(x)} like the tensor that is masked"
            )
        return self.mask.gather(1, t.expand(*x.shape, *t.shape[x.dim() :]), x.dim())

    @property
    def __name__(self) -> str:
        return name_of(self.fn)


def masked_couple(f: Callable[..., Any], mask: Tensor, *, law: Callable[..., Invertible] = additive) -> Invertible:
    r"""A coupling within one tensor: the elements under a mask change the others.

    .. math:: y = m \cdot x + (1 - m) \cdot law(f(m \cdot x))(x)

    Args:
        f: Any callable or module on tensors of the shape of x; it sees x with zeros in the places that will change, and
            returns what the law needs, one tensor or a tuple. What it returns in places under the mask is not used.
        mask: A bool tensor, True where x passes untouched; it covers the last dimensions of x, without the batch.
            `checkerboard_mask` makes the usual one; ``~mask`` changes the others next.
        law: As in `couple`, elementwise: it is given the changing elements alone, flat in the masked dimensions.

    Shapes:
        ``(N, ..., *mask.shape)``, unchanged; any dtype that f and the law take.

    Domain:
        All that the law takes, onto all that it makes: for `additive` and `affine` all of it, onto all of it.

    Cost:
        The inverse evaluates f once. Lowered: nothing is kept but what f closes over; f is evaluated exactly twice in a
        training step. Elements are gathered and put back: about four copies of the tensor beside f.

    Log-determinant:
        The law's, over the changing elements only.

    Raises:
        WireError: When the mask does not cover the last dimensions, or f returns another shape.

    Limits:
        The mask is the same for every element of the batch. For whole channels, ``chain(split(...), couple(f),
        concat(...))`` computes less.

    Example:
        >>> import torch
        >>> op = masked_couple(torch.exp, torch.tensor([True, False, True]))
        >>> op(torch.zeros(1, 3))
        tensor([[0., 1., 0.]])

    Source:
        Dinh et al., Real NVP (2017).
    """
    board = _mask(mask)
    ends = _split_by(board)
    half = Half(Masked(f, board), law, 1, "f")
    return named(chain(ends, half, invert(ends)), f"masked_couple({name_of(f)}, {board.shape}{as_law(law).suffix})")


# ---- splines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerElement:
    """A net whose channels are parameters of each element; built by `per_element`."""

    net: Callable[..., Any]
    count: int
    dim: int

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.net,)

    def __call__(self, *x: Wire) -> Tensor:
        out = self.net(*x)
        dims = out.dim() if isinstance(out, Tensor) else 0
        if not -dims <= self.dim < dims or out.shape[self.dim] % self.count:
            raise WireError(
                f"{self.__name__}: the net returned {describe(out)}",
                expected=f"a multiple of {self.count} along dim {self.dim}",
                cure=f"let it return {self.count} channels for each channel of the component that it changes",
            )
        dim = self.dim % dims
        return out.unflatten(dim, (-1, self.count)).movedim(dim + 1, -1)

    @property
    def __name__(self) -> str:
        return f"per_element({name_of(self.net)}, {self.count})"


def per_element(net: Callable[..., Any], count: int, *, dim: int = 1) -> Callable[..., Any]:
    """A net's channels as ``count`` parameters for each element, in a last dimension: what the laws of splines take.

    Args:
        net: Returns ``(N, C * count, ...)``: the parameters of a channel are neighbours.
        count: How many; a rational-quadratic spline with K bins takes ``3 * K - 1``.
        dim: The dimension of the channels.

    Shapes:
        ``(N, C * count, ...) -> (N, C, ..., count)``.

    Raises:
        OptionError: When ``count`` is not positive.

    Example:
        >>> import torch
        >>> per_element(torch.nn.Linear(2, 6), 3)(torch.zeros(5, 2)).shape
        torch.Size([5, 2, 3])
    """
    if count < 1:
        raise OptionError(f"per_element: count is {count}", expected="a positive number")
    return PerElement(net, count, dim)


def spline_couple(
    f: Callable[..., Any],
    g: Callable[..., Any] | None = None,
    *,
    bins: int = 8,
    dim: int = 1,
    interval: tuple[float, float] = (-3.0, 3.0),
) -> Invertible:
    r"""A coupling whose law is a monotone rational-quadratic spline on each element.

    .. math:: y_1 = spline_{f(x_2)}(x_1), \qquad y_2 = spline_{g(y_1)}(x_2)

    Args:
        f: Returns ``3 * bins - 1`` channels for each channel of its partner: widths, heights, inner slopes of the bins.
        g: Likewise; without it the second component passes untouched.
        bins: How many bins the interval has.
        dim: The dimension of the channels.
        interval: Where the knots are; elements beyond it pass untouched.

    Shapes:
        ``((N, C, ...), (N, C, ...))``, unchanged; floating dtypes.

    Domain:
        All of it, onto all of it.

    Cost:
        As `couple`: f and g are evaluated exactly twice in a training step. The spline's own arithmetic handles ``3 *
        bins`` numbers for each element and runs, beside forward, two times in backward.

    Log-determinant:
        The spline's.

    Raises:
        OptionError: When ``bins`` is not positive.
        WireError: When f or g returns another number of channels.

    Limits:
        For other options, or another spline, ``couple(per_element(f, count), law=partial(linear_spline, ...))``.

    Example:
        >>> import torch
        >>> op = spline_couple(torch.nn.Linear(2, 2 * 11), bins=4)
        >>> x = torch.randn(5, 2), torch.randn(5, 2)
        >>> y = op(x)
        >>> bool(torch.allclose(op.inverse(y)[0], x[0], atol=1e-5))
        True

    Source:
        Durkan et al., Neural Spline Flows (2019).
    """
    if bins < 1:
        raise OptionError(f"spline_couple: bins is {bins}", expected="a positive number")
    law = partial(rational_quadratic_spline, interval=interval)
    nets = [per_element(net, 3 * bins - 1, dim=dim) for net in (f, g) if net is not None]
    names = ", ".join(name_of(net) for net in (f, g) if net is not None)
    return named(couple(*nets, law=law), f"spline_couple({names}, bins={bins})")


# ---- recursion -----------------------------------------------------------------------------------------------------


def recursive_couple(
    f: Callable[..., Any],
    first: Invertible | None = None,
    second: Invertible | None = None,
    *,
    sizes: int | Sequence[int] = 2,
    dim: int = 1,
    law: Callable[..., Invertible] = additive,
) -> Invertible:
    r"""A tensor's first half changes its second, then each half goes through an op of its own: another of these, say.

    .. math:: x = (x_1, x_2) \mapsto \bigl(first(x_1),\; second(law(f(x_1))(x_2))\bigr)

    Args:
        f: Any callable or module on the first half.
        first: The op on the first half; nothing by default.
        second: The op on the second half, after it was changed; nothing by default.
        sizes: 2 for equal halves, or the two sizes.
        dim: The dimension that is split.
        law: As in `couple`.

    Shapes:
        One tensor, unchanged; any dtype that the functions take.

    Domain:
        All that the law and the two ops take, onto all that they make.

    Cost:
        The inverse evaluates each f once. Lowered: nothing is kept but what the functions close over, each f is
        evaluated exactly twice in a training step, and each level copies its tensor once.

    Log-determinant:
        The law's and those of the two ops. The Jacobian of a whole tree is triangular and dense below the diagonal,
        where one coupling has a single block.

    Raises:
        OptionError: When ``sizes`` is not of two parts.
        WireError: When the tensor does not split so.

    Example:
        >>> import torch
        >>> inner = recursive_couple(torch.sin)
        >>> op = recursive_couple(torch.tanh, inner, inner)
        >>> x = torch.randn(3, 4)
        >>> bool(torch.allclose(op.inverse(op(x)), x, atol=1e-6))
        True

    Source:
        Kruse et al., HINT: Hierarchical Invertible Neural Transport (2021).
    """
    parts = split(sizes, dim)
    if (sizes if isinstance(sizes, int) else len(sizes)) != 2:
        raise OptionError(f"recursive_couple: sizes is {sizes}", expected="2, or two sizes")
    ops = tuple(chain() if op is None else lift(op) for op in (first, second))
    shown = [name_of(f), *(repr(op) for op in ops if op.parts or not isinstance(op, Chain))]
    whole = chain(parts, Half(f, law, 1, "f"), parallel(*ops), invert(parts))
    return named(whole, f"recursive_couple({', '.join(shown)}{as_law(law).suffix})")
