"""Context: what the functions of an op are told by name beside the wire: a mask, positions, what another net has found.

A function is told the names that it takes, and no others, so that an op and a module need not know of each other. What
it is told gets its gradient as anything does that a function closes over.
"""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import OptionError, ReplayError
from ..wires import describe
from .combine import Parallel
from .couple import Half
from .op import ByKind, Chain, Inverse, Invertible, OneWay, Pair, name_of
from .structure import has_functions, has_room, slots_of

Context: TypeAlias = Mapping[str, Any]

# ---- ops -------------------------------------------------------------------------------------------------------------


def with_context(op: Invertible, context: Context | None) -> Invertible:
    """An op whose functions are told what they take of a context, if any; raises where nobody takes a name."""
    if context is None:
        return op
    if not isinstance(context, Mapping):
        raise OptionError(f"context is {describe(context)}", expected="a dict of names", cure=_BY_NAME)
    unknown = [name for name in context if not any(takes(fn, name) for fn in op.functions)]
    if unknown:
        names = ", ".join(dict.fromkeys(map(name_of, op.functions))) or "no function"
        raise OptionError(
            f"context has {', '.join(map(repr, unknown))}",
            expected=f"names that one of the op's functions takes as keyword arguments: {names}",
            cure="let one of them take it, or leave it out",
        )
    return bind(op, context)


_BY_NAME = 'context={"mask": mask}, where a function takes mask as a keyword argument'


@ByKind
def bind(op: Invertible, context: Context) -> Invertible:
    """An op whose functions are told what they take of a context; names that nobody takes are left out."""
    for fn in op.functions:
        if any(takes(fn, name) for name in context):
            raise OptionError(f"context: {op!r} hides {name_of(fn)}", expected="chain, parallel and couple around it")
    return op


@bind.register
def _(op: Chain, context: Context) -> Invertible:
    return Chain(tuple([bind(part, context) for part in op.parts]), op.labels)


@bind.register
def _(op: Parallel, context: Context) -> Invertible:
    return Parallel(tuple([bind(part, context) for part in op.parts]))


@bind.register
def _(op: Inverse, context: Context) -> Invertible:
    return bind(op.op, context).inverted()


@bind.register
def _(op: Half, context: Context) -> Invertible:
    return replace(op, fn=tell(op.fn, context))


@bind.register
def _(op: OneWay, context: Context) -> Invertible:
    return replace(op, fn=tell(op.fn, context))


@bind.register
def _(op: Pair, context: Context) -> Invertible:
    found = {name: getattr(op, name) for name in ("forward_fn", "inverse_fn", "pullback_fn", "log_det_fn")}
    return replace(op, **{name: tell(fn, context) for name, fn in found.items() if fn is not None})


# ---- functions -------------------------------------------------------------------------------------------------------


def tell(fn: Callable[..., Any], context: Context) -> Callable[..., Any]:
    """A function with what it takes of a context; the function itself where that is nothing."""
    if isinstance(fn, Invertible):
        return bind(fn, context)
    inner = _inner(fn)
    if inner:
        return replace(fn, **{name: tell(part, context) for name, part in inner.items()})  # pyright: ignore
    given = taken(fn, context)
    if not given:
        return fn
    return Told(fn, given) if any(map(has_state, given.values())) else partial(fn, **given)


def taken(fn: Callable[..., Any], context: Context) -> dict[str, Any]:
    """What a function takes of a context."""
    if isinstance(fn, Invertible) or _inner(fn):
        return {name: value for name, value in context.items() if takes(fn, name)}
    names, takes_all = _keywords(fn)
    return dict(context) if takes_all else {name: value for name, value in context.items() if name in names}


def takes(fn: Callable[..., Any], name: str) -> bool:
    """Whether a function, or one that it is a wrapper of, takes a name as a keyword argument."""
    inner = fn.functions if isinstance(fn, Invertible) else tuple(_inner(fn).values())
    if inner:
        return any(takes(part, name) for part in inner)
    names, takes_all = _keywords(fn)
    return takes_all or name in names


def _inner(fn: Any) -> dict[str, Any]:
    """The user's functions inside of one of the package's wrappers, by the field that they are in."""
    if not is_dataclass(fn) or isinstance(fn, type) or hasattr(fn, "keywords_taken"):
        return {}
    parts: tuple[Any, ...] = getattr(fn, "functions", ()) if has_functions(fn) else ()
    values = {f.name: getattr(fn, f.name) for f in fields(fn)} if parts else {}
    return {name: value for name, value in values.items() if any(value is part for part in parts)}


Keywords: TypeAlias = tuple[frozenset[str], bool]  # names, and whether any other name will do
_KNOWN: WeakKeyDictionary[FunctionType, dict[int, Keywords]] = WeakKeyDictionary()  # by how many arguments it has


def _keywords(fn: Any) -> Keywords:
    """What a function takes by name behind its first argument."""
    if hasattr(fn, "keywords_taken"):
        return fn.keywords_taken
    fn = fn.forward if isinstance(fn, nn.Module) else fn
    plain, given = (fn.__func__, 1) if isinstance(fn, MethodType) else (fn, 0)
    if type(fn) is partial and not fn.keywords:
        plain, given = fn.func, len(fn.args)
    if type(plain) is not FunctionType:
        return _read_keywords(fn, 1)
    known = _KNOWN.setdefault(plain, {})
    if given not in known:
        known[given] = _read_keywords(plain, 1 + given)
    return known[given]


def _read_keywords(fn: Any, skip: int) -> Keywords:
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return frozenset(), False
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [p.name for i, p in enumerate(parameters) if p.kind in named and (i >= skip or p.kind == named[1])]
    return frozenset(names), any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)


# ---- what a function writes into -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Told:
    """A function that is told of objects it may write into, such as a cache of keys and values.

    The first call gets the objects; each later one, which is that call run again, gets them as they were before it.
    """

    fn: Callable[..., Any]
    context: dict[str, Any]
    before: list[dict[str, Any]] = field(default_factory=list, init=False)  # the first call, if it may run again
    written: list[Tensor] = field(default_factory=list, init=False)  # what the first call wrote in place

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function that this object calls."""
        return (self.fn,)

    def __call__(self, *xs: Any) -> Any:
        if self.written:
            raise ReplayError(
                f"{name_of(self.fn)} wrote in place into a tensor {tuple(self.written[0].shape)} of its context",
                expected="tensors that it leaves alone: backward runs it again",
                cure="replace the tensor in its object, or mark the stage 'store'",
            )
        if self.before or not torch.is_grad_enabled():
            return self.fn(*xs, **(copy_state(self.before[0]) if self.before else self.context))
        self.before.append(copy_state(self.context))
        versions = [(t, t._version) for t in self._tensors()]
        out = self.fn(*xs, **self.context)
        self.written.extend([t for t, version in versions if t._version != version])
        return out

    def _tensors(self) -> list[Tensor]:
        if torch.compiler.is_compiling():
            return []
        found = contents_in(tuple(self.context.values()), set())
        return [t for t in found if isinstance(t, Tensor) and not t.is_inference()]

    @property
    def __name__(self) -> str:
        return name_of(self.fn)


def has_state(item: Any) -> bool:
    """Whether a function may write into what it is given, other than into a tensor."""
    if isinstance(item, tuple):
        return any(map(has_state, item))
    if isinstance(item, (list, dict, set, deque)):
        return True
    if isinstance(item, (Tensor, nn.Module, type, Enum, Invertible, FunctionType, MethodType, partial)):
        return False
    return has_room(item) and type(item).__module__.partition(".")[0] not in ("builtins", "torch")


def _attributes_of(item: Any) -> dict[str, Any]:
    return {**getattr(item, "__dict__", {}), **{name: getattr(item, name) for name in slots_of(item)}}


def copy_state(item: Any, copied: dict[int, Any] | None = None) -> Any:
    """An object and what it is made of, copied, down to the tensors, which are shared, as is what can not be copied."""
    copied = {} if copied is None else copied
    if id(item) in copied:
        return copied[id(item)]
    if not has_state(item):
        return item
    if isinstance(item, tuple):
        parts = [copy_state(part, copied) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    new = copied[id(item)] = _copy(item)
    if new is item:
        return item
    if isinstance(item, (list, deque, dict)):
        for place, part in list(item.items() if isinstance(item, dict) else enumerate(item)):
            new[place] = copy_state(part, copied)
    for name, part in _attributes_of(item).items():
        object.__setattr__(new, name, copy_state(part, copied))
    return new


def _copy(item: Any) -> Any:
    """An object without what is in it; the object itself where a copy fails, or would close what it owns."""
    if hasattr(type(item), "__del__"):
        return item
    try:
        return copy.copy(item)
    except Exception:  # a file, a socket: a class says in its own way that it has one of a kind
        return item


def contents_in(item: Any, seen: set[int]) -> list[Any]:
    """What an argument is made of, down to what a copy of its state shares: tensors, modules, functions."""
    if id(item) in seen:
        return []
    seen.add(id(item))
    if not (has_state(item) or isinstance(item, tuple)):
        return [item]
    values = item.values() if isinstance(item, dict) else item if isinstance(item, (tuple, list, set, deque)) else ()
    return [leaf for part in (*values, *_attributes_of(item).values()) for leaf in contents_in(part, seen)]
