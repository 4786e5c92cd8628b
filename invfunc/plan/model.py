"""Models as they are: an `nn.Sequential` is a chain, and a model with a list of blocks is one with two ends.

NOTE [Blocks] Between the blocks of a model lies its author's own code, a loop that nobody else sees. So each block is
decided on alone, stored or run again, and what is before and behind the blocks is stored. One call with hooks tells
what goes into each block, what the two ends keep, and that the blocks are a chain: each takes what the one before gave.
What blocks leave behind in their arguments, such as the keys and values of a cache, may be held to the end of the step,
whatever is done with the blocks: it counts as kept by what is before them.
The planned model is a copy of the modules on the way to the blocks and of the blocks themselves; it has the same
parameters, under the same names, and the model is as it was.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from .._torch import storage_of
from ..core.context import Context, contents_in, copy_state, with_context
from ..core.op import Invertible, chain, graph_leaves, lift
from ..errors import OptionError
from ..nn.module import Module, op_of
from ..wires import Wire, is_differentiable, spread
from .costs import OpCosts
from .inputs import map_tensors, nbytes, tensors_of
from .sizes import Books
from .work import Work

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Blocks:
    """A model with a list of blocks.

    Attributes:
        model: The model.
        path: The name of the list in it.
    """

    model: nn.Module
    path: str

    @property
    def modules(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.model.get_submodule(self.path).children())

    @property
    def paths(self) -> list[str]:
        """The names of the blocks in the model."""
        return [f"{self.path}.{name}" for name, _ in self.model.get_submodule(self.path).named_children()]

    @property
    def names(self) -> list[str]:
        """How what is planned is shown: the blocks, and the two ends."""
        kinds = [type(block).__name__ for block in self.modules]
        return [f"before {self.path}", *kinds, f"behind {self.path}"]


def planned_as(f: Any) -> Invertible | Blocks:
    """What a plan sees: an op, the children of a sequence, the blocks of another model, or one function.

    Raises:
        OptionError: When a model has no list of blocks.
    """
    if isinstance(f, nn.Sequential):
        return chain(*[_part(child) for child in f.children()])
    if isinstance(f, Module):
        return lift(op_of(f))
    return Blocks(f, _longest(f)) if isinstance(f, nn.Module) else lift(f)


def in_context(f: Any, context: Context) -> Invertible:
    """What a plan sees, whose functions are told a context.

    Raises:
        OptionError: When a model is planned by its blocks, or no function takes a name.
    """
    found = planned_as(f)
    if isinstance(found, Invertible):
        return with_context(found, context)
    raise OptionError(
        f"plan: {type(f).__name__}, which is planned block by block, got a context",
        expected="an op, a function or an nn.Sequential",
        cure="pass a tuple as x: its components become the model's positional arguments",
    )


def _part(child: nn.Module) -> Invertible:
    found = planned_as(child) if isinstance(child, (nn.Sequential, Module)) else lift(child)
    assert isinstance(found, Invertible)
    return found


def _longest(model: nn.Module) -> str:
    """The name of the list of blocks with the most parameters, the outermost of several."""
    lists = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    }
    if not lists:
        raise OptionError(
            f"plan: {type(model).__name__} has no blocks",
            expected="a chain, an nn.Sequential, or a model with an nn.ModuleList of blocks",
        )
    return max(lists, key=lists.__getitem__)


# ---- what goes through a model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A block with what it is given beside its input."""

    block: nn.Module
    rest: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]
    left: list[Callable[[], Any]] = field(default_factory=list, compare=False)  # storages, of the last call

    def __call__(self, x: Tensor) -> Tensor:
        """What it hands on; an argument that it writes into, such as a cache, is as it was in the model's own call."""
        rest, named = copy_state((self.rest, dict(self.named)))
        out = _handed_on(self.block(x, *rest, **named))
        before, after = (_storages_in(state) for state in ((self.rest, self.named), (rest, named)))
        self.left[:] = [weakref.ref(storage) for key, storage in after.items() if key not in before]
        return out

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The block."""
        return (self.block,)

    @property
    def __name__(self) -> str:
        return type(self.block).__name__


def _storages_in(state: Any) -> dict[int, torch.UntypedStorage]:
    tensors = tensors_of(contents_in(state, set()))
    return {storage_of(t): t.untyped_storage() for t in tensors}


def _handed_on(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


class End(NamedTuple):
    """What is before or behind the blocks: its bytes, and its work forward and backward."""

    costs: OpCosts
    forward: Work
    backward: Work


class Shown(NamedTuple):
    """What one call of a model has shown."""

    before: End
    calls: list[Call]
    entry: Tensor  # what goes into the first block
    forward: Work  # of all blocks
    behind: End
    y: Any


class _Watch:
    """Hooks on the blocks of a model: the blocks run without gradients, the ends with."""

    def __init__(self, blocks: Blocks, books: Books) -> None:
        self.blocks, self.modules, self.books = blocks, blocks.modules, books
        self.calls: list[Call] = []
        self.entry = self.last = self.exit = torch.empty(0)
        self.works: list[Work] = []
        self.peak = self.kept = self.left = self.before = 0

    @property
    def base(self) -> int:
        """What is alive beside the second end."""
        return self.kept + nbytes((self.entry, self.exit))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While the model runs."""
        hooks = [m.register_forward_pre_hook(self.enter, with_kwargs=True) for m in self.modules]
        hooks += [m.register_forward_hook(self.leave) for m in self.modules]
        try:
            with torch.enable_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = len(self.calls)
        follows = number < len(self.modules) and block is self.modules[number]
        if not (follows and args and isinstance(args[0], Tensor) and (not number or args[0] is self.last)):
            raise self.no_chain_error(f"block {number} to take what the one before gave, as its first argument")
        if not number:
            self.entry = args[0]
            self.kept, self.peak = self.books.balance - nbytes(args[0]), self.books.take_peak()
            self.works.append(self.books.take_work())
            torch.set_grad_enabled(False)
        self.calls.append(Call(block, *copy_state((args[1:], tuple(sorted(kwargs.items()))))))
        self.before = self.books.balance

    def no_chain_error(self, expected: str, got: str = "") -> OptionError:
        """The error of blocks that do not run one after another."""
        return OptionError(
            f"plan: {type(self.blocks.model).__name__}.{self.blocks.path} is no chain",
            expected=expected,
            got=got,
            cure="write the model as a chain of its parts: inv.chain(...)",
        )

    def check_all_ran(self) -> None:
        """Raise unless the model has called every block."""
        if len(self.calls) < len(self.modules):
            raise self.no_chain_error(f"all of its {len(self.modules)} blocks to run", f"{len(self.calls)}")

    def leave(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        self.last = _handed_on(out)
        self.left += max(self.books.balance - nbytes(tuple(tensors_of(out))) - self.before, 0)
        if len(self.calls) < len(self.modules):
            return None
        torch.set_grad_enabled(True)
        self.works.append(self.books.take_work())
        self.exit = self.last.detach().requires_grad_()
        self.books.take_peak()
        return (self.exit, *out[1:]) if isinstance(out, tuple) else self.exit


def show(blocks: Blocks, x: Wire) -> Shown:
    """Call a model once, and its two ends back."""
    with Books() as books:
        watch = _Watch(blocks, books)
        with watch.hooked():
            out = spread(blocks.model, x)
        watch.check_all_ran()
        ends = tensors_of(out)
        likes = iter([(t.shape, t.dtype, t.device) for t in ends])
        empty = map_tensors(lambda _: torch.empty(0), out)
        del out
        peak, work = books.take_peak() - watch.base, books.take_work()
        behind = _back(f"behind {blocks.path}", books, ends, watch.base, peak, work, [watch.exit])
        base = books.balance - watch.kept
        before = _back(f"before {blocks.path}", books, [watch.entry], base, watch.peak, watch.works[0], [])
        before = before._replace(costs=_holding(before.costs, watch.left))
    y = map_tensors(lambda _: _zeros(*next(likes)), empty)
    return Shown(before, watch.calls, watch.entry, watch.works[1], behind, y)


def _holding(costs: OpCosts, more: int) -> OpCosts:
    """The costs of a stored op, where so many bytes more are held as long as its tape."""
    return replace(costs, tape=costs.tape + more, peak_backward=costs.peak_backward + more)


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _back(
    name: str, books: Books, ends: list[Tensor], base: int, peak: int, forward: Work, inputs: list[Tensor]
) -> End:
    """An end of a model, back from what it gave; ``base`` is what is alive beside it."""
    roots = [t for t in ends if is_differentiable(t) and t.grad_fn is not None]
    closed = graph_leaves(roots, {id(t) for t in inputs})
    edges, likes = [get_gradient_edge(t) for t in roots], [(t.shape, t.dtype, t.device) for t in roots]
    size, gradient = nbytes(tuple(ends)), sum(t.numel() * t.element_size() for t in roots)
    held_in = nbytes(tuple(inputs))
    roots.clear()
    ends.clear()
    tape = books.balance - base
    books.take_peak()
    if edges:
        gradients = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in likes]
        torch.autograd.grad(edges, [*inputs, *closed], gradients, allow_unused=True)
    costs = OpCosts(
        name, 0.0, 0.0, bytes=size, gradient=gradient, tape=tape, holds_input=(held_in,), holds_output=(0,),
        parameters=sum(p.numel() * p.element_size() for p in closed), peak_forward=peak, peak_taped=peak,
        peak_backward=books.take_peak() - base, region=math.inf, alone=True,
    )  # fmt: skip
    return End(costs, forward, books.take_work())


# ---- the planned model -----------------------------------------------------------------------------------------------


def with_forward(module: M, forward: Callable[..., Any]) -> M:
    """A module with the same parameters, and another forward."""
    copy = _copied(module)
    copy.__dict__["forward"] = forward
    return copy


def with_blocks(blocks: Blocks, lower: Callable[[int, nn.Module], nn.Module]) -> nn.Module:
    """A model with the same parameters, and other blocks."""
    model = at = _copied(blocks.model)
    for name in blocks.path.split("."):
        at = _with_child(at, name, _copied(at.get_submodule(name)))
    for i, (name, block) in enumerate(list(at.named_children())):
        _with_child(at, name, lower(i, block))
    return model


def function_of(module: nn.Module) -> Callable[..., Any]:
    """What a module does when it is called, without its hooks, for a copy of it to be called in its place."""
    return module.__dict__.get("forward") or MethodType(type(module).forward, module)


def _with_child(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    module.__dict__["_modules"] = {**module.__dict__["_modules"], name: child}
    return child


def _copied(module: M) -> M:
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    return copy
