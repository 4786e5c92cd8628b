"""What a call keeps for backward: node by node, in bytes, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _torch
from ..core.combine import Parallel
from ..core.context import Context, with_context
from ..core.op import Chain, Invertible, lift
from ..engine.frame import OBSERVER, Observed, Record
from ..engine.interface import places_on
from ..engine.parts import Parts
from ..engine.trunk import is_tail, kept_by_tail
from ..nn.module import Module


@dataclass(frozen=True)
class Saved:
    """One tensor, or one state, that a call keeps until backward.

    Attributes:
        where: The stage, as error messages name it, or the autograd node of a part that runs as plain autograd.
        what: What it is, with its shape and dtype.
        bytes: The memory of its storage; 0 for an input of the call.
        why: What backward needs it for.
    """

    where: str
    what: str
    bytes: int
    why: str


def saved(op: Callable[..., Any], *inputs: Any, context: Context | None = None) -> list[Saved]:
    """What one call of a lowered pipeline, or of any other function, keeps for backward.

    Args:
        op: An op, lowered or not, a checkpointed function, a module, or any callable.
        inputs: Its arguments; they require grad or not as in training.
        context: What the functions are told by name beside the input, as in ``op(x, context=...)``.

    Returns:
        A row for everything that is kept, in the order in which the call made the nodes that keep it; what a gradient
        inside of the call keeps stands at the node that was differentiated. What lives anyway is left out: parameters,
        and what the functions close over. Inputs have a row, of 0 bytes: they were there before the call. So the sum is
        what `draw` shows and, with an output that nobody saves, what `measure` holds.

    Cost:
        The call is made once, in earnest: it draws random numbers and moves running statistics as any other does.

    Limits:
        A tensor that an autograd Function keeps on its ctx, without ``save_for_backward``, is not seen.

    Example:
        >>> import torch, invfunc as inv
        >>> net = inv.checkpoint(inv.chain(inv.pair(torch.sinh, torch.asinh), inv.pair(torch.atan, torch.tan)))
        >>> saved(net, torch.ones(3, requires_grad=True))
        [Saved(where='end of a trunk', what='output (3,) float32', bytes=12, why='backward rebuilds the rest from it')]

    Source:
        JAX's ``saved_residuals``.
    """
    call = op if context is None else _in_context(op, context)
    before, observed = _torch.graph_position(), list[Observed]()
    token = OBSERVER.set(observed)
    try:
        with torch.autograd.set_detect_anomaly(True, check_nan=False):  # tells which nodes a gradient inside has made
            out = call(*inputs)
    finally:
        OBSERVER.reset(token)
    arguments = _torch.trees.tree_leaves((inputs, dict(context or {})))
    given = {_torch.storage_of(t) for t in arguments if isinstance(t, Tensor)}
    book = _Book({_torch.storage_of(t) for t in _owned(op)}, given, _places(call))
    tensors = [leaf for leaf in _torch.trees.tree_leaves(out) if isinstance(leaf, Tensor)]
    calls = [(call.stop, partial(book.rows_of_call, call)) for call in observed]
    nodes = [
        (_torch.number_of(node), partial(book.rows, node))
        for node in _nodes(tensors, before)
        if not any([call.first <= _torch.number_of(node) < call.stop for call in observed])
    ]
    return [row for _, rows in sorted([*calls, *nodes], key=lambda item: item[0]) for row in rows()]


def print_saved(op: Callable[..., Any], *inputs: Any, context: Context | None = None) -> None:
    """Print what one call keeps for backward: a table of `saved`, and its total.

    Args:
        op: An op, lowered or not, a checkpointed function, a module, or any callable.
        inputs: Its arguments.
        context: What the functions are told by name beside the input, as in ``op(x, context=...)``.

    Example:
        >>> import torch, invfunc as inv
        >>> exp = inv.pair(torch.exp, torch.log)
        >>> net = inv.chain(exp, inv.mark(exp, "store"))
        >>> print_saved(inv.checkpoint(net), torch.ones(3, requires_grad=True))
        where           what                 bytes  why
        end of a trunk  output (3,) float32     12  backward rebuilds the rest from it
        ExpBackward0    result (3,) float32     12  stored by plain autograd
        total                                   24
    """
    rows = saved(op, *inputs, context=context)
    rows.append(Saved("total", "", sum(row.bytes for row in rows), ""))
    cells = [("where", "what", "bytes", "why"), *((r.where, r.what, f"{r.bytes:,}", r.why) for r in rows)]
    where, what, size, _ = (max(map(len, column)) for column in zip(*cells, strict=True))
    for row in cells:
        print(f"{row[0]:{where}}  {row[1]:{what}}  {row[2]:>{size}}  {row[3]}".rstrip())


def _in_context(op: Callable[..., Any], context: Context) -> Callable[..., Any]:
    return partial(op, context=context) if isinstance(op, Module) else with_context(lift(op), context)


# ---- the nodes of the call -----------------------------------------------------------------------------------------


def _nodes(outputs: Sequence[Tensor], before: int) -> list[Any]:
    """The autograd nodes that the call has made, in the order in which it made them."""
    todo, found = [t.grad_fn for t in outputs], {}
    while todo:
        node = todo.pop()
        if node is None or node in found or hasattr(node, "variable") or _torch.number_of(node) < before:
            continue
        found[node] = _torch.number_of(node)
        todo += [parent for parent, _ in node.next_functions]
    return sorted(found, key=lambda node: found[node])


def _owned(op: Callable[..., Any]) -> list[Tensor]:
    """The tensors that live whether the call keeps them or not."""
    if not isinstance(op, Invertible):
        op = getattr(op, "op", op)
    if isinstance(op, nn.Module):
        return [*op.parameters(), *op.buffers()]
    if not isinstance(op, Invertible):
        return []
    found = Parts(op.functions)
    modules = [*found.roots, *found.nearby]
    return [*found.tensors, *(t for module in modules for t in [*module.parameters(), *module.buffers()])]


def _places(op: Any, path: tuple[str, ...] = ()) -> dict[int, list[str]]:
    """The paths of the primitives in an op, by identity: a block that is used twice has two."""
    found: dict[int, list[str]] = defaultdict(list)
    if not isinstance(op, Invertible):
        return found
    if not op.parts:
        found[id(op)].append(": ".join(path) or repr(op))
    for index, part in enumerate(op.parts):
        place = op.place(index) if isinstance(op, (Chain, Parallel)) else ""
        for key, places in _places(part, (*path, place) if place else path).items():
            found[key] += places
    return found


class _Book:
    """Counts every storage once."""

    def __init__(self, counted: set[int], given: set[int], places: dict[int, list[str]]) -> None:
        self.counted, self.given, self.places = counted, given, places

    def rows(self, node: Any) -> Iterator[Saved]:
        """What a node outside of recorded calls keeps."""
        if is_tail(node):
            for tensor in kept_by_tail(node):
                yield from self._row("end of a trunk", "output", tensor, "backward rebuilds the rest from it")
        else:
            for name, tensor in _kept_by_torch(node):
                yield from self._row(node.name(), name, tensor, "stored by plain autograd")

    def rows_of_call(self, call: Observed) -> Iterator[Saved]:
        """What is kept to run a call again."""
        record, kept = call.record, getattr(call.owner, "kept", None)
        if not record.kinds and record.kept is None:
            return
        where = self._place_of(record)
        for tensor in kept.tensors() if kept is not None else ():
            if isinstance(tensor, Tensor):
                yield from self._row(where, "input", tensor, "the part runs again from it")
        frame = record.frame()
        for tensor, _ in (frame.held or {}).values() if frame is not None else ():
            yield from self._row(where, "result", tensor, "the part can not run again")
        self.counted |= {_torch.storage_of(t) for t in record.leaves}
        for tensor in record.kept.tensors() if record.kept is not None else ():
            if isinstance(tensor, Tensor):
                yield from self._row(where, "residue", tensor, "what the op loses")
        for copy in record.copies:
            yield from self._row(
                where, f"buffer {copy.name}", copy.copy, "the function runs again on what it was before"
            )
        if record.random is not None:
            yield Saved(where, "random state", record.random.nbytes, "the same numbers are drawn again")

    def _place_of(self, record: Record) -> str:
        places = places_on(record.path)
        if places or record.op is None:
            return ": ".join(places)
        left = self.places.get(id(record.op), [])
        return left.pop(0) if len(left) > 1 else left[0] if left else repr(record.op)

    def _row(self, where: str, what: str, tensor: Tensor, why: str) -> Iterator[Saved]:
        storage = _torch.storage_of(tensor)
        if storage in self.counted:
            return
        self.counted.add(storage)
        kind = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        size = 0 if storage in self.given else tensor.untyped_storage().nbytes()
        yield Saved(where, f"{what} {kind}", size, why)


def _kept_by_torch(node: Any) -> Iterator[tuple[str, Tensor]]:
    """``(name, tensor)`` of what a node of torch, or of a Function of somebody else, has saved."""
    for name, value in _torch.saved_by(node):
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, Tensor):
                yield name, tensor
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        yield from (("saved", tensor) for tensor in node.saved_tensors if isinstance(tensor, Tensor))
