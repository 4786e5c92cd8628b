"""Plain functions under `checkpoint`: they run again from their stored arguments, which may be anything."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import WRAPPER_ASSIGNMENTS, partial
from io import IOBase
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Size, Tensor, nn

from . import _torch
from .core.context import contents_in, copy_state, has_state
from .core.copies import copy_object
from .core.op import OneWay, missing_attribute, name_of
from .engine.interface import Options, Run
from .engine.lower import engine_for, runs_plainly
from .engine.mode import current
from .engine.region import Region, conditions_of
from .errors import ReplayError, WireError
from .wires import is_differentiable

# ---- in ordinary autograd --------------------------------------------------------------------------------------------


class CheckpointedFunction:
    """A plain function that is recomputed from its stored inputs; built by `checkpoint`."""

    __wrapped__: Callable[..., Any]

    def __init__(self, fn: Callable[..., Any], options: Options) -> None:
        self.options = options
        self.op = OneWay(OnTree(fn))
        set_names(self, fn)

    def __getattr__(self, name: str) -> Any:
        """What modules have and functions have not: the error says where to find it."""
        face = "it is a function; module.forward = inv.checkpoint(module.forward) leaves the module one"
        return missing_attribute(self, name, face)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        if runs_plainly() or current(self.options).mode == "store":
            return self.__wrapped__(*args, **kwargs)
        if torch.compiler.is_compiling() or _torch.active():
            return self._on_tree(args, kwargs)
        arguments = Arguments.of(args, kwargs)
        for leaf in arguments.others:
            self._check_argument(leaf)
        found, within = arguments.contents()
        functions = (self.__wrapped__, *found)
        conditions = conditions_of((self.__wrapped__,), found)
        region = Region(self._call, arguments.build, (None, self, 0), conditions, self.options)
        out = region.run((args, kwargs), arguments.tensors, functions, within)
        region.conditions.snapshot.note()
        return out

    def _call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return self.__wrapped__(*args, **kwargs)

    def place(self, index: int) -> str:
        """The function as the path of an error shows it."""
        return repr(self)

    def _on_tree(self, args: Any, kwargs: Any) -> Any:
        """Below a transform or in a graph: on the tensors in the arguments."""
        x = Tree.flatten((args, kwargs))
        for leaf in x[0].rest:
            self._check_argument(leaf)
        if torch.compiler.is_compiling() and any(map(has_state, x[0].objects())):
            return self.__wrapped__(*args, **kwargs)  # a graph's backward would find a cache as forward has left it
        engine = engine_for(self.op, x)
        if engine is None:
            return self.__wrapped__(*args, **kwargs)
        results, *out = engine.recompute(self.op, x, Run(engine, self.options), self.op.forward)
        return results.unflatten(out)

    def _check_argument(self, leaf: Any) -> None:
        if isinstance(leaf, Iterator) and not _is_only_written(leaf):
            raise ReplayError(
                f"{self!r} got a {type(leaf).__name__}",
                expected="arguments that can be read twice: backward runs the function again",
                cure="pass a list",
            )

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """A checkpointed function in a class is a method, if the function is one there."""
        if instance is None or not _is_method(self.__wrapped__):
            return self
        return CheckpointedFunction(self.__wrapped__.__get__(instance), self.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self if global_name(self) else copy_object(self, memo)

    def __reduce__(self) -> Any:
        return global_name(self) or (_checkpointed, (self.__wrapped__, self.options))

    def __repr__(self) -> str:
        return f"checkpoint({name_of(self.__wrapped__)})"


def _is_only_written(item: Any) -> bool:
    """Whether an object is a stream to print to."""
    return isinstance(item, IOBase) and not item.closed and item.writable() and not item.readable()


def _checkpointed(fn: Callable[..., Any], options: Options) -> CheckpointedFunction:
    return fn if isinstance(fn, CheckpointedFunction) else CheckpointedFunction(fn, options)


@dataclass(slots=True)
class Arguments:
    """Positional and keyword arguments, taken apart: tensors are stored, and containers are made anew for each call."""

    spec: Any  # tuples, lists and dicts as they are, `Tensor` in the place of tensors
    tensors: list[Tensor]
    others: list[Any]

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Take arguments apart."""
        arguments = Arguments(None, [], [])
        arguments.spec = arguments._without_tensors((args, kwargs))
        return arguments

    def _without_tensors(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            self.tensors.append(item)
            return Tensor
        kind = type(item)
        if kind is tuple or kind is list:
            return kind([self._without_tensors(part) for part in item])
        if kind is dict:
            return {key: self._without_tensors(part) for key, part in item.items()}
        self.others.append(item)
        return Stateful(copy_state(item)) if has_state(item) else item

    def contents(self) -> tuple[list[Any], list[Tensor]]:
        """The modules and functions among the arguments, which it may call, and the tensors inside of others."""
        seen: set[int] = set()
        found = [part for item in self.others for part in contents_in(item, seen)]
        return [p for p in found if isinstance(p, _FUNCTIONS)], [p for p in found if isinstance(p, Tensor)]

    def build(self, tensors: Iterable[Tensor]) -> Sequence[Any]:
        """``(args, kwargs)`` with these tensors."""
        return _with_tensors(self.spec, iter(tensors))


_FUNCTIONS = (nn.Module, FunctionType, MethodType, partial)


@dataclass(slots=True)
class Stateful:
    """An argument that the function may write into, such as a cache, as it was before the call."""

    item: Any


def _with_tensors(spec: Any, tensors: Iterator[Tensor]) -> Any:
    if spec is Tensor:
        return next(tensors)
    kind = type(spec)
    if kind is Stateful:
        return copy_state(spec.item)
    if kind is tuple or kind is list:
        return kind([_with_tensors(part, tensors) for part in spec])
    return {key: _with_tensors(part, tensors) for key, part in spec.items()} if kind is dict else spec


# ---- below transforms, and in graphs ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tree:
    """A pytree without its tensors: one leaf of a wire, in front of them."""

    spec: _torch.trees.TreeSpec
    rest: list[Any]  # its leaves, Tensor in the place of tensors

    @staticmethod
    def flatten(tree: Any) -> tuple[Any, ...]:
        """A pytree as a wire: ``(Tree, tensor, tensor, ...)``."""
        flat, spec = _torch.trees.tree_flatten(tree, lambda node: isinstance(node, Size))
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        return Tree(spec, [Tensor if isinstance(leaf, Tensor) else leaf for leaf in flat]), *tensors

    def unflatten(self, tensors: Iterable[Tensor]) -> Any:
        """The pytree with these tensors."""
        left = iter(tensors)
        return _torch.trees.tree_unflatten([next(left) if leaf is Tensor else leaf for leaf in self.rest], self.spec)

    def objects(self) -> list[Any]:
        """Leaves of the user's own classes: they may hold tensors that nobody sees."""
        found = [leaf for leaf in self.rest if not isinstance(leaf, (type, Enum))]
        return [leaf for leaf in found if type(leaf).__module__ not in _PLAIN]


_PLAIN = ("builtins", "torch", "numpy")


@dataclass(frozen=True)
class OnTree:
    """A function of any arguments and results as a function of one wire."""

    fn: Callable[..., Any]

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The user's function."""
        return (self.fn,)

    def __call__(self, arguments: Tree, *tensors: Tensor) -> tuple[Any, ...]:
        args, kwargs = arguments.unflatten(tensors)
        results, *out = Tree.flatten(self.fn(*args, **kwargs))
        for item in results.objects():
            if any(map(is_differentiable, getattr(item, "__dict__", {}).values())):
                raise WireError(
                    f"{name_of(self.fn)} returned a {type(item).__name__} with tensors in it",
                    expected="tensors, or containers that torch.utils._pytree knows",
                    cure="return a tuple or a dict, or register the class with torch.utils._pytree",
                )
        return results, *out

    @property
    def __name__(self) -> str:
        return name_of(self.fn)


# ---- names ----------------------------------------------------------------------------------------------------------


def global_name(value: Any) -> str | None:
    """The name by which a decorated function is found in its module, for pickle; None if it is not."""
    path = getattr(value, "__qualname__", None)
    found: Any = sys.modules.get(getattr(value, "__module__", ""))
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    return path if path and found is value else None


def set_names(wrapper: Any, fn: Callable[..., Any]) -> None:
    """`functools.update_wrapper` for values, which are frozen, and for modules, whose ``__dict__`` is not copied."""
    for name in (n for n in WRAPPER_ASSIGNMENTS if hasattr(fn, n)):
        object.__setattr__(wrapper, name, getattr(fn, name))
    object.__setattr__(wrapper, "__wrapped__", fn)


def _is_method(fn: Callable[..., Any]) -> bool:
    """Whether a function in a class is a method; Python 3.13 warns that a `functools.partial` will be one."""
    return hasattr(fn, "__get__") and not isinstance(fn, partial)
