"""Parts: the modules and tensors that functions are made of, and where they find them; rule 1 of NOTE [Snapshot]."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from operator import attrgetter, is_
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.structure import cells_of, defaults_of, globals_of, has_functions, is_empty, is_of_library, slots_of

# ---- places ----------------------------------------------------------------------------------------------------------


ABSENT = object()  # nothing has that name


class Place(NamedTuple):
    """Where a function finds a module or a tensor: a closure's cell, or a name in a dict."""

    table: Any
    name: Any
    value: Any

    def now(self) -> Any:
        """What is there now."""
        if type(self.table) is CellType:
            return ABSENT if is_empty(self.table) else self.table.cell_contents
        if type(self.table) is list:
            return self.table[self.name] if self.name < len(self.table) else ABSENT
        return self.table.get(self.name, ABSENT)

    def put(self, value: Any) -> None:
        """Put something there."""
        if type(self.table) is CellType:
            self.table.cell_contents = value
        elif type(self.table) is list:
            if self.name < len(self.table) and value is not ABSENT:
                self.table[self.name] = value
        elif value is ABSENT:
            self.table.pop(self.name, None)
        else:
            self.table[self.name] = value


class Attribute(NamedTuple):
    """A slot of an object, the class of a module, or a property of such a class."""

    table: Any
    name: str
    value: Any

    def now(self) -> Any:
        """What is there now."""
        return getattr(self.table, self.name, ABSENT)

    def put(self, value: Any) -> None:
        """Put something there, though the object be frozen."""
        kind = type if isinstance(self.table, type) else object
        if value is ABSENT:
            kind.__delattr__(self.table, self.name)
        else:
            kind.__setattr__(self.table, self.name, value)


class Flag(NamedTuple):
    """Whether a module of TorchScript is in training."""

    table: nn.Module
    value: bool
    name: str = "training"

    def now(self) -> bool:
        """Whether it is now."""
        return self.table.training

    def put(self, value: bool) -> None:
        """Say whether it is."""
        self.table.training = value


class Contents(NamedTuple):
    """What a list, a dict or a set consists of."""

    table: Any
    value: Any

    def now(self) -> Any:
        """What it consists of now."""
        return self.table.copy()

    def is_same(self) -> bool:
        """Whether it consists of the same objects as then, in the same order."""
        now, was = self.table, self.value
        if len(now) != len(was):
            return False
        return all(map(is_, now, was)) and (not isinstance(now, dict) or all(map(is_, now.values(), was.values())))

    def put(self, value: Any) -> None:
        """Put something in its place."""
        self.table.clear()
        (self.table.extend if isinstance(self.table, (list, deque)) else self.table.update)(value)

    def unwritten(self) -> list[Place]:
        """Where the call has written into it: the places that it has left alone."""
        if not isinstance(self.table, dict):
            return []
        return [Place(self.table, n, v) for n, v in self.value.items() if self.table.get(n, ABSENT) is v]


class Table(NamedTuple):
    """All that a module has of a kind, in its order."""

    table: dict[str, Any]
    value: dict[str, Any]

    def now(self) -> dict[str, Any]:
        """What there is now."""
        return self.table.copy()

    def put(self, value: dict[str, Any]) -> None:
        """Put something in its place."""
        self.table.clear()
        self.table.update(value)


# ---- what a function is made of --------------------------------------------------------------------------------------

_DEPTH = 4  # of functions and objects inside of each other; containers and partials do not count


class Parts:
    """The modules, tensors and devices of functions, and where closures find them.

    Attributes:
        roots: Modules that the functions are, or are made of.
        called: Those of them that are called, and not only asked for a method.
        nearby: Modules that a closure or an object can see: it may call them, or read their tensors.
        modules: All of these, and every submodule, each once.
        scripts: Modules of TorchScript.
        tensors: Tensors outside of modules, and those of TorchScript.
        devices: Those that closures and objects hold by themselves.
        places: Where closures and globals find what they are bound to, and slots.
        contents: The lists, dicts, sets and objects that they or their modules hold.
    """

    __slots__ = (
        "answers", "called", "contents", "devices", "is_opaque", "modules", "nearby", "places", "roots", "scripts",
        "seen", "tensors",
    )  # fmt: skip

    def __init__(self, functions: Iterable[Any]) -> None:
        self.is_opaque = False  # whether there may be more than is seen
        self.roots: list[nn.Module] = []
        self.called: list[nn.Module] = []
        self.nearby: list[nn.Module] = []
        self.modules: list[nn.Module] = []
        self.scripts: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self.devices: list[torch.device] = []
        self.places: list[Any] = []
        self.contents: list[Contents] = []
        self.seen: set[int] = set()
        self.answers: list[Any] = []  # functions that an object makes when it is asked: a known id is of one that lives
        for fn in functions:
            self.add(fn, 0)

    def add(self, item: Any, depth: int) -> None:
        """Look through an item."""
        if isinstance(item, nn.Module):
            self.roots.append(item)
            self.called.append(item)
            self._add_module(item)
        elif isinstance(item, Tensor):
            if id(item) not in self.seen:
                self.seen.add(id(item))
                self.tensors.append(item)
        elif type(item) is torch.device:
            self.devices.append(item)
        elif type(item) not in _PLAIN and id(item) not in self.seen and depth < _DEPTH:
            self.seen.add(id(item))
            self._look_into(item, depth + 1)

    def _add_module(self, module: nn.Module) -> None:
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        attributes = module.__dict__
        if not isinstance(attributes.get("_parameters"), dict):  # TorchScript keeps them elsewhere
            self._add_script(module)
            return
        self.modules.append(module)
        if "parametrizations" in attributes["_modules"]:  # its class is its own, and loses a property with each of them
            self.places += _properties_of(type(module))
        for child in attributes["_modules"].values():
            if child is not None:
                self._add_module(child)
        for value in islice(attributes.values(), _OWN_ATTRIBUTES, None):
            if type(value) in _NUMBERS:
                continue
            if type(value) in _CONTAINERS or isinstance(value, _TABLES):  # a list hides modules from torch
                self.add(value, 1)
            elif isinstance(value, Tensor):
                name = next(name for name, item in attributes.items() if item is value)
                self._add_at(Place(attributes, name, value), 1)
            else:
                self._add_values(value, 1)

    def _add_script(self, module: nn.Module) -> None:
        """A module of TorchScript, whose dicts can not be written: its flag, and tensors that training leaves."""
        self.scripts.append(module)
        for part in module.modules():
            self.places.append(Flag(part, part.training))
            for tensor in (*part.parameters(False), *(() if part.training else part.buffers(False))):
                self.add(tensor, 0)

    def _add_values(self, item: Any, depth: int) -> None:
        """What an object that a module holds consists of; the functions that it calls are not looked for."""
        if type(item) is torch.device:
            self.devices.append(item)
        if type(item) in _PLAIN or id(item) in self.seen or depth > _DEPTH:
            return
        if isinstance(item, nn.Module):
            if not self._is_around(item):
                self._add_near(item, depth)
            return
        self.seen.add(id(item))
        if isinstance(item, _TABLES):
            if self._note_contents(item):
                for part in item.values() if isinstance(item, dict) else item:
                    self._add_values(part, depth + 1)
        elif isinstance(item, (tuple, frozenset)):
            for part in item:
                self._add_values(part, depth + 1)
        elif _has_values(item) and not isinstance(item, Tensor):
            self._add_values(getattr(item, "__dict__", None), depth)
            for place in _slots_of(item):
                self.places.append(place)
                self._add_values(place.value, depth + 1)

    def _is_around(self, module: nn.Module) -> bool:
        """Whether a module has one of ours in it: a trainer's model, that an object of ours happens to know."""
        return not self.seen.isdisjoint(map(id, module.modules()))

    def _note_contents(self, table: list[Any] | dict[Any, Any] | set[Any] | deque[Any]) -> bool:
        """Unless it is large: it is copied in every call."""
        if len(table) > _MANY:
            return False
        self.contents.append(Contents(table, table.copy()))
        return True

    def _look_into(self, item: Any, depth: int) -> None:
        kind = type(item)
        if kind is MethodType:
            self._add_owner(item, depth)
        elif kind is FunctionType:
            self._add_closure(item, depth)
        elif kind is partial:
            for part in (item.func, *item.args, *item.keywords.values()):
                self.add(part, depth - 1)
        elif has_functions(item):
            self.answers.append(answer := item.functions)
            for part in answer:
                self.add(part, depth - 1)
        elif isinstance(item, (tuple, frozenset)):
            for part in item:
                self.add(part, depth - 1)
        elif isinstance(item, _TABLES):
            self._add_items(item, depth - 1)
        elif not isinstance(item, (type, ModuleType, BuiltinFunctionType)):
            self.is_opaque |= callable(item)
            if _has_values(item):
                self._add_object(item, depth)

    def _add_items(self, table: Any, depth: int) -> None:
        is_whole = self._note_contents(table)
        for name, part in list(table.items() if isinstance(table, dict) else enumerate(table)):
            if not (is_whole or isinstance(table, set)) and isinstance(part, (nn.Module, Tensor)):
                self.places.append(Place(table, name, part))
            self.add(part, depth)

    def _add_object(self, item: Any, depth: int) -> None:
        table = getattr(item, "__dict__", _NOTHING)
        is_whole = self._note_contents(table)
        for name, value in list(table.items()):
            if is_whole:
                self._add_near(value, depth)
            elif isinstance(value, (nn.Module, Tensor)):
                self._add_at(Place(table, name, value), depth)
        for place in _slots_of(item):
            self._add_at(place, depth)

    def _add_owner(self, method: MethodType, depth: int) -> None:
        owner = method.__self__
        if isinstance(owner, nn.Module) and method.__func__ is not nn.Module.__call__:
            self.roots.append(owner)
            self._add_module(owner)
        else:
            self.add(owner, depth)

    def _add_closure(self, fn: FunctionType, depth: int) -> None:
        self.is_opaque |= bool(fn.__closure__) or not is_of_library(fn.__module__)
        for cell in cells_of(fn).values():
            self._add_at(Place(cell, None, cell.cell_contents), depth)
        for value in defaults_of(fn).values():
            self.add(value, depth)
        for name, value in globals_of(fn).items():
            if isinstance(value, _INTERESTING) or _is_value(value):
                self._add_at(Place(fn.__globals__, name, value), depth)

    def _add_at(self, place: Place | Attribute, depth: int) -> None:
        self.places.append(place)
        self._add_near(place.value, depth)

    def _add_near(self, value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            self.nearby.append(value)
            self._add_module(value)
        else:
            self.add(value, depth)


_NOTHING: dict[str, Any] = {}
_OWN_ATTRIBUTES = len(vars(nn.Module()))  # every module's own, which come first
_TABLES = (list, dict, set, deque)
_CONTAINERS = frozenset((tuple, FunctionType, MethodType, partial))
_PLAIN = frozenset((
    int, float, str, bool, complex, bytes, type(None), torch.Size, torch.dtype, torch.device, torch.Generator,
))  # fmt: skip
_NUMBERS = frozenset((int, float, str, bool, type(None)))
_INTERESTING = (nn.Module, Tensor, FunctionType, MethodType, partial)
_CLOSED = sys.stdlib_module_names - {
    "types",
    "argparse",
    "builtins",
    "collections",
}  # whose objects are no values: loggers, locks
_MANY = 256  # items


def _has_values(item: Any) -> bool:
    """Whether an object is one of the user's, with attributes that a function may read."""
    kind = type(item)
    is_open = kind.__module__.partition(".")[0] not in _CLOSED
    return is_open and (hasattr(item, "__dict__") or hasattr(kind, "__slots__"))


def _properties_of(kind: type) -> list[Attribute]:
    return [Attribute(kind, name, value) for name, value in vars(kind).items() if isinstance(value, property)]


def _slots_of(item: Any) -> list[Attribute]:
    return [Attribute(item, name, getattr(item, name)) for name in slots_of(item)]


def _is_value(item: Any) -> bool:
    """Whether a function reads a global, and does not call it."""
    return type(item) in _PLAIN or not (callable(item) or isinstance(item, ModuleType))


def version(tensor: Tensor) -> int:
    """A tensor's version counter; inference tensors have none and can not change under autograd."""
    return 0 if tensor.is_inference() else tensor._version


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """Those of several."""
    try:
        return list(map(_version_of, tensors))
    except RuntimeError:  # an inference tensor
        return list(map(version, tensors))


_version_of = attrgetter("_version")


def is_lazy(functions: Iterable[Any]) -> bool:
    """Whether a call of functions initialises parameters."""
    return any(["_initialize_hook" in module.__dict__ for module in Parts(functions).modules])
