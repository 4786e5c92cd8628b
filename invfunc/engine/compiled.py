"""The trunk under ``torch.compile``: the same nodes, made of what Dynamo can trace.

NOTE [Compiling] What is different while a graph is being traced:

1.  Nothing is recorded. The tensors that an op's functions use are found in its structure (modules, partials, bound
    methods, containers, closures and defaults, the package's own values), and the functions run again with others in
    their place; see NOTE [Closures]. So a pipeline can be built in the graph, of functions of what is computed there. A
    tensor that requires grad among the globals of a function, or the attributes of an object that is called, can not
    be replaced: it raises, and says what to do instead. So does one that was not found, when a function computes with
    it in forward.
2.  Backward is one `torch.func.vjp` of the whole op: Dynamo does not trace ``autograd.grad``. What the inverse and the
    second forward have in common the compiler merges, so that a coupling function still runs twice in a step.
3.  The compiler would also merge what *forward* and backward have in common, and save it: context nets, untouched
    halves and products of weights would be kept for every stage. A barrier, tied to the incoming gradients, hides that
    they are the same.
4.  No node is made where nothing needs a gradient: Dynamo shifts the arguments of ``forward(*args)`` then.
5.  Dynamo refuses a node that is given one tensor twice: what passes an op untouched is given as a view, and so is an
    input that a function closes over, too.
6.  Random numbers can not be drawn again in a graph. The masks of dropout are kept; a function that draws other numbers
    raises, and says what to do instead. Dynamo hides a few of these from function modes, and is told not to.
7.  Below a `torch.func` transform Dynamo can not trace a backward that is a transform itself: the pipeline runs
    plainly, and keeps what plain autograd keeps.
8.  A whole model is one graph, and takes as long to compile as it is deep. `compile_stages` runs the same nodes outside
    of a graph, and compiles their two functions, once for each kind of op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import _torch
from ..core.op import Invertible, Residue, name_of
from ..core.structure import slots_in
from ..errors import ReplayError
from ..wires import Wire, is_differentiable, leaves, map_wire, nested_error
from .closures import contents_of, is_object, named_by, with_contents
from .interface import Run
from .strands import OnStrands, State, Strand, begin, build_wire, keep, spec_of, strands, values

T = TypeVar("T")


is_active = torch.compiler.is_compiling


def runs_plainly() -> bool:
    """Whether nothing has to be kept, or nothing can be: rules 4 and 7 of NOTE [Compiling]."""
    return not torch.is_grad_enabled() or _torch.active()


# Rule 3 of NOTE [Compiling]: the same values, and the compiler does not know it. (`torch.library.custom_op` would take
# twice as long to call: it compares the storages of what goes in and out.)
torch.library.define(
    "invfunc::barrier", "(Tensor[] tensors, Tensor[] gradients) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.impl("invfunc::barrier", "CompositeExplicitAutograd")
def _(tensors: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


@torch.library.register_fake("invfunc::barrier")
def _(tensors: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


def hide(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Put tensors behind a barrier; outside of a graph, return them as they are."""
    if not (is_active() and tensors):
        return list(tensors)
    return torch.ops.invfunc.barrier(list(tensors), [g for g in gradients if g is not None])


# ---- rule 1: the tensors of an op, and the op with others in their place ------------------------------------------


@dataclass
class Holders:
    """Where an op keeps tensors: in modules, and loose in its structure; each tensor once, and its places."""

    modules: list[nn.Module]
    tensors: list[Tensor]
    count: int  # of those that may have gradients; behind them are buffers, which the modules may write
    places: list[int]  # of the tensors of each module, by name, and then of the loose ones


def holders_of(op: Invertible) -> Holders:
    """Collect the modules and loose tensors that an op holds."""
    search = Search([], [])
    search.add(op, 0)
    modules = _distinct(search.modules)
    slots = [slot for module in modules for slot in slots_of(module)]
    buffers = _distinct([tensor for _, tensor, is_buffer in slots if is_buffer])
    rest = _distinct([*[tensor for _, tensor, is_buffer in slots if not is_buffer], *search.loose])
    inside, tensors = [*[tensor for _, tensor, _ in slots], *search.loose], [*rest, *buffers]
    return Holders(modules, tensors, len(rest), [_place(tensor, tensors) for tensor in inside])


def _place(tensor: Tensor, tensors: list[Tensor]) -> int:
    for place, other in enumerate(tensors):
        if tensor is other:
            return place
    raise AssertionError("a tensor is among those that were found")


def _distinct(items: list[T]) -> list[T]:
    """Each item once; a module's own are so by themselves, and few are anything else."""
    found: list[T] = []
    for item in items:
        if not _is_among(item, found):
            found.append(item)
    return found


def _is_among(item: Any, others: list[Any]) -> bool:
    for other in others:
        if item is other:
            return True
    return False


def slots_of(module: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """``(name, tensor, is buffer)`` of a module's parameters, and of the buffers that it may write; tied ones, too."""
    parameters = [(name, tensor, False) for name, tensor in module.named_parameters(remove_duplicate=False)]
    buffers = [(name, tensor, True) for name, tensor in module.named_buffers(remove_duplicate=False)]
    return [*parameters, *(buffers if module.training else [])]


@dataclass
class Search:
    """Collects the modules in the structure of a function or a value, and its loose tensors in order."""

    modules: list[nn.Module]
    loose: list[Tensor]

    def add(self, item: Any, depth: int) -> None:
        """Look through an item."""
        if isinstance(item, nn.Module):
            self.modules.append(item)
        elif is_differentiable(item):
            self.loose.append(item)
        elif depth < _DEPTH or not isinstance(item, FunctionType):
            inside = depth + isinstance(item, FunctionType)
            for part in _parts(item):
                self.add(part, inside)
            if isinstance(item, FunctionType):
                self._add_fixed(item, named_by(item), inside)
            elif is_object(item):
                self._add_fixed(item, _held_by(item), inside)

    def _add_fixed(self, fn: Any, held: list[Any], depth: int) -> None:
        """What a function finds among its globals, and an object that is called among its attributes."""
        loose: list[Tensor] = []
        search = Search(self.modules, loose)
        for value in held:
            search.add(value, depth)
        for tensor in loose:
            if tensor.requires_grad:
                _refuse_closure(name_of(fn))


def _held_by(item: Any) -> list[Any]:
    """What an object has in its attributes and slots."""
    table = list(vars(item).values()) if hasattr(item, "__dict__") else []
    return [*table, *[getattr(item, name) for name in _slots_in(type(item)) if hasattr(item, name)]]


@_torch.called_not_traced
def _slots_in(kind: type) -> tuple[str, ...]:
    return tuple(slots_in(kind))


_DEPTH = 4  # of functions inside of each other; one that calls itself is in its own cells


def _parts(item: Any) -> list[Any]:
    """What a function or a value is made of."""
    if isinstance(item, FunctionType):
        return contents_of(item)
    if isinstance(item, partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, MethodType):
        return [item.__self__]
    if isinstance(item, (tuple, list)):
        return list(item)
    if isinstance(item, dict):
        return list(item.values())
    if isinstance(item, Invertible) and hasattr(item, "held"):  # the op of a module, which is built anew at each use
        return list(item.held)
    if is_dataclass(item) and not isinstance(item, type):
        return [getattr(item, part.name) for part in fields(item) if part.init]
    return []


@_torch.called_not_traced
def _refuse_closure(name: str) -> None:
    raise ReplayError(
        f"{name}, which is being compiled, closes over a tensor that requires grad",
        expected="tensors that belong to a module, or are bound in a partial",
        cure="let a module own the tensor, or bind it: functools.partial(fn, tensor)",
    )


class OnlyFound(TorchFunctionMode):
    """Raises where a function computes with a tensor that requires grad, and that `holders_of` has not found."""

    def __init__(self, known: list[Any]) -> None:
        super().__init__()
        self.known = [*known, *[_torch.base_of(item) for item in known if isinstance(item, Tensor)]]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _that_require_grad((*args, *kwargs.values())):
            # To Dynamo a view that is made without gradients requires grad, as what it is a view of.
            if not (_is_among(tensor, self.known) or _is_among(_torch.base_of(tensor), self.known)):
                _refuse_closure("a function")
        if func is Tensor.unflatten:  # a method of Python's that calls C's by super(), which Dynamo does not find here
            func = torch.unflatten
        out = func(*args, **kwargs)
        self.known += _that_require_grad((out,))  # what it computes with gradients on, whatever they are for
        return out


def _that_require_grad(items: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, (tuple, list)):
            found += _that_require_grad(item)
        elif isinstance(item, Tensor) and item.requires_grad:
            found.append(item)
    return found


def with_tensors(item: Any, loose: Iterator[Tensor], depth: int = 0) -> Any:
    """A function or a value with other loose tensors, taken in the order in which they were found."""
    if is_differentiable(item):
        return next(loose)
    if isinstance(item, nn.Module) or not _has_loose(item, depth):
        return item
    inside = depth + isinstance(item, FunctionType)
    parts = [with_tensors(part, loose, inside) for part in _parts(item)]
    if isinstance(item, FunctionType):
        return with_contents(item, parts)
    if isinstance(item, partial):
        count = 1 + len(item.args)
        return partial(parts[0], *parts[1:count], **dict(zip(item.keywords, parts[count:], strict=True)))
    if isinstance(item, MethodType):
        return getattr(parts[0], item.__name__)
    if isinstance(item, dict):
        return dict(zip(item, parts, strict=True))
    if isinstance(item, Invertible) and hasattr(item, "held"):
        return type(item)(*parts)
    if is_dataclass(item) and not isinstance(item, type):
        return replace(item, **dict(zip([part.name for part in fields(item) if part.init], parts, strict=True)))
    return tuple(parts) if isinstance(item, tuple) else parts


def _has_loose(item: Any, depth: int) -> bool:
    """Whether `Search.add` finds a loose tensor in an item that is none."""
    if isinstance(item, nn.Module) or (isinstance(item, FunctionType) and depth >= _DEPTH):
        return False
    inside = depth + isinstance(item, FunctionType)
    return any([is_differentiable(part) or _has_loose(part, inside) for part in _parts(item)])


def run(op: Invertible, holders: Holders, tensors: Sequence[Tensor], method: str, *args: Any) -> Any:
    """``op.method(*args)`` with other tensors in the place of those that the op holds."""
    found = [tensors[place] for place in holders.places]
    return _run(op, holders.modules, found, method, args)


def _run(op: Invertible, modules: list[nn.Module], found: list[Tensor], method: str, args: Any) -> Any:
    if not modules:
        return getattr(with_tensors(op, iter(found)) if found else op, method)(*args)
    slots = slots_of(modules[0])
    contents = {name: found[i].clone() if buffer else found[i] for i, (name, _, buffer) in enumerate(slots)}
    with _torch.substitute(modules[0], contents):
        return _run(op, modules[1:], found[len(slots) :], method, args)


# ---- rule 6: random numbers --------------------------------------------------------------------------------------


class DropoutMasks(TorchFunctionMode):
    """Keeps the masks of dropout in forward, and hands them out in backward; refuses what else is random."""

    def __init__(self, masks: list[Tensor], rolls: bool) -> None:
        super().__init__()
        self.masks, self.rolls, self.place = masks, rolls, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self.dropout(*args, **kwargs)
        if func in _DRAWS and _DRAWS[func](*args, **kwargs):
            _refuse_random(func.__name__)
        return func(*args, **kwargs)

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """`torch.nn.functional.dropout` with a mask that is kept, one byte an element."""
        if not training or p == 0:
            return x
        if self.rolls:
            self.masks.append(torch.rand(x.shape, device=x.device) >= p)
        mask, self.place = self.masks[self.place], self.place + 1
        return x * mask / (1 - p) if p < 1 else x * mask


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _in_training(x: Any, p: float = 0.5, training: bool = True, *args: Any, **kwargs: Any) -> bool:
    return training and p > 0


def _in_leaks(x: Any, low: float = 0.0, high: float = 0.0, training: bool = False, *args: Any, **kwargs: Any) -> bool:
    return training


def _in_attention(q: Any, k: Any, v: Any, mask: Any = None, dropout_p: float = 0.0, *args: Any, **kwargs: Any) -> bool:
    return dropout_p > 0


def _in_heads(*args: Any, training: bool = True, **kwargs: Any) -> bool:
    return training and args[10] > 0


def _in_recurrent(x: Any, h: Any, weights: Any, biases: Any, layers: Any, dropout: float, train: bool, *_: Any) -> bool:
    return train and dropout > 0


_DRAWS: dict[Any, Callable[..., bool]] = {
    **dict.fromkeys([F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout], _in_training),
    **dict.fromkeys([torch.dropout, torch.alpha_dropout, torch.feature_dropout], _in_training),
    **dict.fromkeys([F.rrelu, torch.rrelu, torch.rrelu_], _in_leaks),
    F.scaled_dot_product_attention: _in_attention,
    F.multi_head_attention_forward: _in_heads,
    **dict.fromkeys([torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu], _in_recurrent),
    **dict.fromkeys([F.gumbel_softmax, F.fractional_max_pool2d, F.fractional_max_pool3d], _always),
    **dict.fromkeys([torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal], _always),
    **dict.fromkeys([torch.rand_like, torch.randn_like, torch.randint_like], _always),
    **dict.fromkeys([torch.bernoulli, torch.multinomial, torch.poisson, torch.binomial], _always),
    **dict.fromkeys([Tensor.bernoulli, Tensor.multinomial], _always),
    _torch.standard_gamma: _always,
    **dict.fromkeys([Tensor.bernoulli_, Tensor.normal_, Tensor.uniform_, Tensor.random_], _always),
    **dict.fromkeys([Tensor.exponential_, Tensor.geometric_, Tensor.cauchy_, Tensor.log_normal_], _always),
}


@_torch.called_not_traced
def _show_draws() -> None:
    _torch.shown_to_modes(_DRAWS)


@_torch.called_not_traced
def _refuse_random(name: str) -> None:
    raise ReplayError(
        f"a function that is being compiled draws random numbers with {name}",
        expected="none but those of dropout: a graph can not draw the same again",
        cure="store it with inv.mark(op, 'store'), draw outside of it, or leave it out of torch.compile",
    )


@_torch.called_not_traced
def refuse_nested() -> None:
    """Raise for a nested tensor: Dynamo does not know how to expand one."""
    raise nested_error("checkpoint inside of torch.compile")


# ---- steps: the functions that are compiled on their own ------------------------------------------------------------

Step: TypeAlias = Callable[..., Any]  # (function, *its arguments) -> its result


def in_place(fn: Callable[..., T], *args: Any) -> T:
    """``fn(*args)``, as part of the graph that is being traced."""
    return fn(*args)


@dataclass(frozen=True, eq=False)
class Steps:
    """``fn(*args)``, each step of each kind of op compiled once; built by `invfunc.compile_stages`."""

    options: dict[str, Any]
    compiled: dict[tuple[str, str], Callable[..., Any]] = field(default_factory=dict, init=False)  # no part of an op

    def __call__(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Compile, or call what has been compiled; in double backward, and on fake tensors, neither."""
        if _torch.on_fake_tensors() or (torch.is_grad_enabled() and fn is not _run_forward):
            return fn(*args)
        first = args[0]
        key = fn.__name__, repr(first.op if isinstance(first, Call) else first)
        if key not in self.compiled:
            self.compiled[key] = torch.compile(_twin(fn), **{"fullgraph": True, **self.options})
        return self.compiled[key](*map(_detached, args))

    def __repr__(self) -> str:
        return f"Steps({self.options})"


def _detached(item: Any) -> Any:
    """Without a graph: Dynamo looks at the ``.grad`` of what a graph is given, and warns where there is none."""
    if isinstance(item, (tuple, list)):
        return type(item)(map(_detached, item))
    return item.detach() if isinstance(item, Tensor) else item


def _twin(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own: Dynamo limits the graphs of one code object, and kinds of op are many."""
    code = fn.__code__  # pyright: ignore[reportFunctionMemberAccess]
    return FunctionType(code.replace(co_firstlineno=code.co_firstlineno), fn.__globals__, fn.__name__)  # pyright: ignore


# ---- the nodes -------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """All that is static in a node that is being traced."""

    op: Invertible
    holders: Holders
    x_spec: Wire
    y_spec: Wire
    residue_spec: Residue
    count_x: int
    count_y: int
    count_kept: int  # captured tensors, others on the wires, residues, and masks
    count_masks: int
    carried: bool
    step: Step

    def run(self, kept: Sequence[Tensor], method: str, *args: Any) -> Any:
        """A method of the op, with kept tensors in the place of those that it holds."""
        if not self.count_masks:
            return run(self.op, self.holders, kept, method, *args)
        with DropoutMasks(list(kept[len(kept) - self.count_masks :]), False):
            return run(self.op, self.holders, kept, method, *args)

    def vjp(self, xs: Sequence[Tensor], kept: Sequence[Tensor], gys: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``gys -> (gxs, gcaptured)`` by running the op forward again."""
        count = self.holders.count

        def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
            inside = [*tensors[self.count_x :], *kept[count:]]
            y, _ = self.run(inside, "forward_with_residue", build_wire(self.x_spec, tensors[: self.count_x], inside))
            return tuple([leaf for leaf in leaves(y) if is_differentiable(leaf)])

        _, pull, *_ = torch.func.vjp(forward, *xs, *kept[:count])
        return pull(tuple(gys))


class TracedStage(torch.autograd.Function):
    """``(call, *xs, *carriers, *kept, *ys) -> (*ys, *carriers)``; see NOTE [Strands] and NOTE [Compiling]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ys = tensors[len(tensors) - call.count_y :]
        return (*[y.view_as(y) for y in ys], *[y.new_zeros(()).expand(y.shape) for y in ys])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.call = call
        first = call.count_x * (1 + call.carried)
        ctx.save_for_backward(*tensors[first : first + call.count_kept])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = hide(ctx.saved_tensors, grads[: ctx.call.count_y])
        return ctx.call.step(_pull, ctx.call, kept, list(grads))


def _pull(call: Call, kept: list[Tensor], grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """``(gys, ys) -> (gxs, xs, gcaptured)``: the backward of a stage."""
    gys, ys = grads[: call.count_y], grads[call.count_y :]
    residue = build_wire(call.residue_spec, [], kept)
    x = call.run(kept, "inverse_with_residue", residue, build_wire(call.y_spec, ys, kept))
    xs = [leaf for leaf in leaves(x) if is_differentiable(leaf)]
    gradients = list(call.vjp(xs, kept, gys))
    none = [None] * (call.count_kept - call.holders.count + call.count_y)
    return (None, *gradients[: call.count_x], *(xs if call.carried else []), *gradients[call.count_x :], *none)


class TracedRecompute(torch.autograd.Function):
    """``(call, *xs, *kept, *ys) -> ys``; saves xs, and runs the op again in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([y.view_as(y) for y in tensors[len(tensors) - call.count_y :]])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.call = call
        ctx.save_for_backward(*tensors[: call.count_x + call.count_kept])

    @staticmethod
    def backward(ctx: Any, *gys: Tensor) -> tuple[Tensor | None, ...]:
        return _rerun(ctx.call, list(ctx.saved_tensors), list(gys))


def _rerun(call: Call, saved: list[Tensor], gys: list[Tensor]) -> tuple[Tensor | None, ...]:
    """``gys -> (gxs, gcaptured)``: the backward of a recomputed op."""
    saved = hide(saved, gys)
    gradients = call.vjp(saved[: call.count_x], saved[call.count_x :], gys)
    none = [None] * (call.count_kept - call.holders.count + call.count_y)
    return (None, *gradients, *none)


# ---- an op in the trunk ----------------------------------------------------------------------------------------------


def trace(
    op: Invertible, x: Wire, xs: list[Tensor], carried: bool, step: Step
) -> tuple[Call, list[Tensor], list[Tensor]]:
    """Run an op outside of autograd: the static part of its node, what it keeps, and its outputs."""
    holders = holders_of(op)
    kept = [*holders.tensors[: holders.count], *[buffer.clone() for buffer in holders.tensors[holders.count :]]]
    y, residue, masks = step(_run_forward, op, x)
    ys: list[Tensor] = []
    x_spec, y_spec = spec_of(x, [], kept), spec_of(y, ys, kept)
    residue_spec = map_wire(lambda leaf: keep(leaf, kept), residue)
    ys = [y.view_as(y) for y in ys]
    kept = [*[t.view_as(t) if _is_among(t, xs) else t for t in kept], *masks]
    return (
        Call(op, holders, x_spec, y_spec, residue_spec, len(xs), len(ys), len(kept), len(masks), carried, step),
        kept,
        ys,
    )


def _run_forward(op: Invertible, x: Wire) -> tuple[Wire, Residue, list[Tensor]]:
    masks: list[Tensor] = []
    _show_draws()
    with torch.no_grad(), DropoutMasks(masks, True), OnlyFound([*holders_of(op).tensors, *leaves(x)]):
        y, residue = op.forward_with_residue(x)
    return y, residue, masks


class Traced(OnStrands):
    """Runs pipelines in a graph, or outside of one with every stage compiled on its own."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def call(self, op: Invertible, state: State, run: Run) -> State:
        return self._call(op, state, self.step)

    def _call(self, op: Invertible, state: State, step: Step) -> State:
        x, found = values(state), strands(state)
        xs = [strand.value for strand in found]
        carried = any([strand.carrier is not None for strand in found])
        call, kept, ys = trace(op, x, xs, carried, step)
        if not (carried or _need_gradients([*xs, *kept])):
            return begin(build_wire(call.y_spec, ys, kept))
        carriers = [_carrier(strand) for strand in found] if carried else []
        out = TracedStage.apply(call, *xs, *carriers, *kept, *ys)
        above = [Strand(y, carrier) for y, carrier in zip(out[: len(ys)], out[len(ys) :], strict=True)]
        return build_wire(call.y_spec, above, kept)

    def move(self, op: Invertible, state: State, run: Run) -> State:
        return self._call(op, state, in_place)

    def recompute(self, op: Invertible, x: Wire, run: Run, fn: Callable[[Wire], Wire]) -> Wire:
        return recompute(op, x)


ENGINE = Traced(in_place)


def _carrier(strand: Strand) -> Tensor:
    return strand.value.new_zeros(()).expand(strand.value.shape) if strand.carrier is None else strand.carrier


def recompute(op: Invertible, x: Wire) -> Wire:
    """Run an op from a stored input."""
    xs = [leaf for leaf in leaves(x) if is_differentiable(leaf)]
    call, kept, ys = trace(op, x, xs, False, in_place)
    if _need_gradients([*xs, *kept]):
        ys = TracedRecompute.apply(call, *xs, *kept, *ys)
    return build_wire(call.y_spec, ys, kept)


def may_have_gradients(op: Invertible, x: Wire) -> bool:
    """Whether the input or a tensor that the op holds needs a gradient."""
    tensors = [*[leaf for leaf in leaves(x) if isinstance(leaf, Tensor)], *holders_of(op).tensors]
    return torch.is_grad_enabled() and _need_gradients(tensors)


def _need_gradients(tensors: Sequence[Tensor]) -> bool:
    """Rule 4 of NOTE [Compiling]."""
    return any([tensor.requires_grad for tensor in tensors])
