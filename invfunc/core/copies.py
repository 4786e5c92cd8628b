"""Copies: what a function closes over is copied with it.

For `copy.deepcopy` a function is a constant. So the copy of a module whose op is made of closures would go on to call
the modules that it was copied from, and the average of a model would be the model.
"""

from __future__ import annotations

import copy
import copyreg
import weakref
from collections import deque
from functools import lru_cache, partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from ..errors import OptionError
from .structure import contents_of, globals_of, is_empty, slots_of


def deep_copy(item: Any, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy` of an item, its functions among it; ``memo`` has what is copied already, by id.

    Raises:
        OptionError: When a function finds among its globals what the copy has another of.
    """
    if id(item) in memo:
        return memo[id(item)]
    kind = type(item)
    if kind is FunctionType:
        return _copy_function(item, memo)
    if kind is MethodType or (kind is BuiltinMethodType and isinstance(item.__self__, Tensor)):
        return _copy_method(item, memo)
    if isinstance(item, weakref.ref):
        return _copy_reference(item, memo)
    if kind is _CACHED:
        return lru_cache(**item.cache_parameters())(deep_copy(item.__wrapped__, memo))
    if kind is partial:
        return partial(*[deep_copy(part, memo) for part in (item.func, *item.args)], **deep_copy(item.keywords, memo))
    if kind is tuple:
        parts = tuple([deep_copy(part, memo) for part in item])
        return parts if any([a is not b for a, b in zip(parts, item, strict=True)]) else item
    if kind is list:
        memo[id(item)] = parts = []
        parts += [deep_copy(part, memo) for part in item]
        return parts
    if kind in (set, frozenset, deque):
        parts = [deep_copy(part, memo) for part in item]
        memo[id(item)] = again = deque(parts, item.maxlen) if kind is deque else kind(parts)
        return again
    if kind is dict:
        memo[id(item)] = named = {}
        named.update({deep_copy(name, memo): deep_copy(part, memo) for name, part in item.items()})
        return named
    if not isinstance(item, nn.Module):
        _check_class(kind, memo)
    return copy_object(item, memo) if _is_plain(item) else copy.deepcopy(item, memo)


def copy_object(item: Any, memo: dict[int, Any]) -> Any:
    """A copy of an object, attribute by attribute: the ``__deepcopy__`` of a class with functions."""
    memo[id(item)] = again = object.__new__(type(item))
    again.__dict__.update({name: deep_copy(value, memo) for name, value in item.__dict__.items()})
    return again


def _is_plain(item: Any) -> bool:
    """Whether an item is an object that is called, of a class that says nothing about copies."""
    kind = type(item)
    is_known = isinstance(item, (type, nn.Module)) or hasattr(kind, "__deepcopy__") or kind in copyreg.dispatch_table
    says = any([getattr(kind, name, None) is not getattr(object, name, None) for name in _PROTOCOL])
    return callable(item) and hasattr(item, "__dict__") and not (is_known or says or _has_slots(kind))


_PROTOCOL = "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__new__"


def _has_slots(kind: type) -> bool:
    return any([getattr(base, "__slots__", ()) for base in kind.__mro__])


def _copy_method(method: MethodType | BuiltinMethodType, memo: dict[int, Any]) -> Any:
    owner: Any = deep_copy(method.__self__, memo)
    if isinstance(method, MethodType) and type(owner) is type(method.__self__):
        return MethodType(method.__func__, owner)
    return getattr(owner, method.__name__)  # of what has been put in the owner's place


def _copy_reference(reference: weakref.ref[Any], memo: dict[int, Any]) -> Any:
    """A weak reference to the copy, which somebody else holds."""
    found = reference()
    if not _needs_copy(found, memo):
        return reference
    owner = found.__self__ if isinstance(found, MethodType) else found
    if id(owner) not in memo:
        raise _hidden("a weak reference", owner)
    return type(reference)(deep_copy(found, memo))


def _hidden(place: str, item: Any) -> OptionError:
    return OptionError(
        f"a function finds a {type(item).__name__} by {place}, and a copy has another",
        expected="a function that is told what to use",
        cure=_CURE,
    )


_CURE = "pass the module itself, a bound method or a functools.partial, or let the function close over it"
_CACHED = type(lru_cache(len))


def _copy_function(fn: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """A function with cells of its own for what is copied; others, such as a counter's, stay shared with the first."""
    if not _needs_copy(fn, memo):
        return fn
    cells = [(cell, _cell_for(cell, memo)) for cell in fn.__closure__ or ()]
    again = FunctionType(fn.__code__, fn.__globals__, fn.__name__, None, tuple([new for _, new in cells]))
    memo[id(fn)] = again  # it may close over itself
    for old, new in cells:
        if new is not old and is_empty(new):
            new.cell_contents = deep_copy(old.cell_contents, memo)
    again.__qualname__ = fn.__qualname__
    again.__defaults__ = _copy_if_needed(fn.__defaults__, memo)
    again.__kwdefaults__ = _copy_if_needed(fn.__kwdefaults__, memo)
    again.__dict__.update({name: _copy_if_needed(value, memo) for name, value in fn.__dict__.items()})
    return again


def _cell_for(cell: CellType, memo: dict[int, Any]) -> CellType:
    is_shared = is_empty(cell) or not _needs_copy(cell.cell_contents, memo)
    return cell if is_shared else memo.setdefault(id(cell), CellType())


def _copy_if_needed(item: Any, memo: dict[int, Any]) -> Any:
    return deep_copy(item, memo) if _needs_copy(item, memo) else item


def _needs_copy(item: Any, memo: dict[int, Any]) -> bool:
    """Whether the copy of a function holds another one: if there are tensors inside, or what is copied already."""
    seen: set[int] = set()
    left = [item]
    while left:
        part = left.pop()
        if id(part) in memo:
            if memo[id(part)] is not part:
                return True
        elif isinstance(part, (nn.Module, Tensor)):
            return True
        elif id(part) not in seen:
            seen.add(id(part))
            parts = _parts_of(part)
            left += parts
            if isinstance(part, FunctionType):
                _check_globals(part, memo, set())
            elif isinstance(part, _WEAK):
                _check_found(f"a {type(part).__name__}", parts, memo)
            else:
                _check_class(part if isinstance(part, type) else type(part), memo)
    return False


def _parts_of(item: Any) -> list[Any]:
    if isinstance(item, FunctionType):
        return [*contents_of(item).values(), *item.__dict__.values()]
    if isinstance(item, (MethodType, BuiltinMethodType)):
        return [item.__self__]
    if isinstance(item, partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, weakref.ref):
        return [item()]
    if isinstance(item, (tuple, list, set, frozenset, deque, weakref.WeakSet)):
        return list(item)
    if isinstance(item, (dict, weakref.WeakValueDictionary)):
        return list(item.values())
    if isinstance(item, weakref.WeakKeyDictionary):
        return [*item.keys(), *item.values()]
    if isinstance(item, (type, ModuleType)):
        return []
    return [*getattr(item, "__dict__", {}).values(), *[getattr(item, name) for name in slots_of(item)]]


_WEAK = weakref.WeakValueDictionary, weakref.WeakKeyDictionary, weakref.WeakSet


def _check_found(place: str, items: list[Any], memo: dict[int, Any]) -> None:
    """Raise where a function finds by something that can not be copied what the copy has another of."""
    for item in items:
        if memo.get(id(item), item) is not item:
            raise _hidden(place, item)


def _check_class(kind: type, memo: dict[int, Any]) -> None:
    """Likewise, of a class that is made in a function."""
    if "<locals>" not in kind.__qualname__:
        return
    for item in vars(kind).values():
        fn = getattr(item, "__func__", item)
        parts = list(contents_of(fn).values()) if isinstance(fn, FunctionType) else [item]
        _check_found(f"the class {kind.__name__}", parts, memo)


def _check_globals(fn: FunctionType, memo: dict[int, Any], seen: set[int]) -> None:
    """Raise where a function, or one that it calls, finds among its globals what the copy has another of."""
    for name, value in globals_of(fn).items():
        if memo.get(id(value), value) is not value:
            raise OptionError(
                f"{fn.__name__} finds {name}, a {type(value).__name__}, among its globals, and a copy has another",
                expected="a function that is told what to use",
                cure=_CURE,
            )
        if type(value) is FunctionType and id(value) not in seen:
            seen.add(id(value))
            _check_globals(value, memo, seen)
