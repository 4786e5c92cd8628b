"""Snapshot: the modules that a call uses, as forward left them, so that it can run again on what it ran on.

NOTE [Snapshot] No gradient depends on what is found here: it only tells what has changed when a call runs again.

1.  *Where to look.* A function's modules are found in its structure: modules, methods, partials, closures, containers,
    callable objects. What is hidden better is not restored, as with torch's own checkpoint.
2.  *Slots, flags, hooks, submodules, attributes*, the classes of modules, what is in the lists, dicts, sets and objects
    that they or closures hold, and what closures and globals are bound to, are noted behind the call: what it writes
    itself, such as a counter, is not put back, but for buffers that it assigns: it runs again with those that it found.
    What it has computed and left somewhere is not held here: it holds its graph, which holds the snapshot.
    Where one of them has changed since, what it was is put in its place while the call runs again.
3.  *Buffers* that a module may write move once a step: the call runs again on copies of them as they were before it.
    (Batch norm's kernels do not bump the version counter, so that nothing tells what was written.) Large ones, and
    those of a module in eval, are copied if the module's first call was seen to write them.
4.  *A tensor that was written in place*, moved, or given other data can not be restored: it raises, and names the
    module and the tensor.
5.  *Tensors that the call leaves* on a module when it runs again are taken away: those of forward stay.
6.  A module that is shared with another thread is changed by one replay at a time; see `conditions.turn`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from operator import is_, itemgetter
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import _torch
from ..errors import ReplayError
from .conditions import RandomState, turn
from .devices import Late, accelerators, is_captured
from .sharding import is_any_sharded, is_sharded

# ---- what a function is made of: rule 1 of NOTE [Snapshot] ----------------------------------------------------------


class Place(NamedTuple):
    """Where a function finds a module or a tensor: a closure's cell, or a name in a dict."""

    table: Any
    name: Any
    value: Any

    def now(self) -> Any:
        """What is there now."""
        if type(self.table) is CellType:
            return self.table.cell_contents if self.table != _EMPTY_CELL else _ABSENT
        if type(self.table) is list:
            return self.table[self.name] if self.name < len(self.table) else _ABSENT
        return self.table.get(self.name, _ABSENT)

    def put(self, value: Any) -> None:
        """Put something there."""
        if type(self.table) is CellType:
            self.table.cell_contents = value
        elif type(self.table) is list:
            if self.name < len(self.table) and value is not _ABSENT:
                self.table[self.name] = value
        elif value is _ABSENT:
            self.table.pop(self.name, None)
        else:
            self.table[self.name] = value


class Attribute(NamedTuple):
    """A slot of an object, or the class of a module."""

    table: Any
    name: str
    value: Any

    def now(self) -> Any:
        """What is there now."""
        return getattr(self.table, self.name, _ABSENT)

    def put(self, value: Any) -> None:
        """Put something there, though the object be frozen."""
        if value is _ABSENT:
            object.__delattr__(self.table, self.name)
        else:
            object.__setattr__(self.table, self.name, value)


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
        (self.table.extend if isinstance(self.table, list) else self.table.update)(value)

    def unwritten(self) -> list[Place]:
        """Where the call has written into it: the places that it has left alone."""
        if not isinstance(self.table, dict):
            return []
        return [Place(self.table, n, v) for n, v in self.value.items() if self.table.get(n, _ABSENT) is v]


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


_EMPTY_CELL = CellType()
_ABSENT = object()  # nothing has that name
_DEPTH = 4  # of functions and objects inside of each other; containers and partials do not count


class Parts:
    """The modules and tensors of functions, and where closures find them.

    Attributes:
        roots: Modules that the functions are, or are made of.
        called: Those of them that are called, and not only asked for a method.
        nearby: Modules that a closure or an object can see: it may call them, or read their tensors.
        modules: All of these, and every submodule, each once.
        tensors: Tensors outside of modules.
        places: Where closures and globals find what they are bound to, and slots.
        contents: The lists, dicts, sets and objects that they or their modules hold.
    """

    __slots__ = ("called", "contents", "is_opaque", "modules", "nearby", "places", "roots", "seen", "tensors")

    def __init__(self, functions: Iterable[Any]) -> None:
        self.is_opaque = False  # whether there may be more than is seen
        self.roots: list[nn.Module] = []
        self.called: list[nn.Module] = []
        self.nearby: list[nn.Module] = []
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self.places: list[Any] = []
        self.contents: list[Contents] = []
        self.seen: set[int] = set()
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
        elif type(item) not in _PLAIN and id(item) not in self.seen and depth < _DEPTH:
            self.seen.add(id(item))
            self._look_into(item, depth + 1)

    def _add_module(self, module: nn.Module) -> None:
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        attributes = module.__dict__
        if "_parameters" not in attributes:  # TorchScript keeps them elsewhere
            return
        self.modules.append(module)
        for child in attributes["_modules"].values():
            if child is not None:
                self._add_module(child)
        for value in islice(attributes.values(), _OWN_ATTRIBUTES, None):  # a list hides modules from torch
            if type(value) in _CONTAINERS or isinstance(value, (list, dict, set)):
                self.add(value, 1)
            elif isinstance(value, Tensor):
                name = next(name for name, item in attributes.items() if item is value)
                self._add_at(Place(attributes, name, value), 1)
            else:
                self._add_values(value, 1)

    def _add_values(self, item: Any, depth: int) -> None:
        """What an object that a module holds consists of; what it calls is not looked for."""
        if type(item) in _PLAIN or id(item) in self.seen or depth > _DEPTH:
            return
        self.seen.add(id(item))
        if isinstance(item, (list, dict, set)):
            if self._note_contents(item):
                for part in item.values() if isinstance(item, dict) else item:
                    self._add_values(part, depth + 1)
        elif _has_values(item) and not isinstance(item, (nn.Module, Tensor)):
            self._add_values(getattr(item, "__dict__", None), depth + 1)
            self.places += _slots_of(item)

    def _note_contents(self, table: list[Any] | dict[Any, Any] | set[Any]) -> bool:
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
        elif hasattr(item, "functions"):  # the package's own values and wrappers
            for part in item.functions:
                self.add(part, depth - 1)
        elif isinstance(item, tuple):
            for part in item:
                self.add(part, depth - 1)
        elif isinstance(item, (list, dict, set)):
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
        self.is_opaque |= bool(fn.__closure__) or fn.__module__.partition(".")[0] not in _LIBRARIES
        for cell in fn.__closure__ or ():
            if cell != _EMPTY_CELL:
                self._add_at(Place(cell, None, cell.cell_contents), depth)
        for value in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or _NOTHING).values()):
            self.add(value, depth)
        if fn.__module__.partition(".")[0] not in _LIBRARIES:
            names = fn.__globals__
            for name in fn.__code__.co_names:
                if name in names and (isinstance(names[name], _INTERESTING) or _is_value(names[name])):
                    self._add_at(Place(names, name, names[name]), depth)

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
_CONTAINERS = frozenset((tuple, FunctionType, MethodType, partial))
_PLAIN = frozenset((
    int, float, str, bool, complex, bytes, type(None), torch.Size, torch.dtype, torch.device, torch.Generator,
))  # fmt: skip
_LIBRARIES = ("torch", "invfunc")
_INTERESTING = (nn.Module, Tensor, FunctionType, MethodType, partial)
_CLOSED = sys.stdlib_module_names - {"types", "argparse", "builtins"}  # whose objects are no values: loggers, locks
_MANY = 256  # items


def _has_values(item: Any) -> bool:
    """Whether an object is one of the user's, with attributes that a function may read."""
    kind = type(item)
    is_open = kind.__module__.partition(".")[0] not in _CLOSED
    return is_open and (hasattr(item, "__dict__") or hasattr(kind, "__slots__"))


def _slots_of(item: Any) -> list[Attribute]:
    names = getattr(type(item), "__slots__", ())
    return [Attribute(item, name, getattr(item, name)) for name in names if hasattr(item, name)]


def _is_value(item: Any) -> bool:
    """Whether a function reads a global, and does not call it."""
    return type(item) in _PLAIN or not (callable(item) or isinstance(item, ModuleType))


def version(tensor: Tensor) -> int:
    """A tensor's version counter; inference tensors have none and can not change under autograd."""
    return 0 if tensor.is_inference() else tensor._version


# ---- buffers before a call: rule 3 of NOTE [Snapshot] ---------------------------------------------------------------


_SMALL = 2**13  # elements: cheaper to copy than to ask
_WRITES: WeakKeyDictionary[nn.Module, dict[tuple[str, bool], bool | Late]] = WeakKeyDictionary()
"""Whether a module writes a buffer when it is called: by name, and by whether it is in training. Not for small buffers
in training, which are copied without asking."""


class BufferCopy(NamedTuple):
    """A buffer of a module, as it was before a call."""

    module: nn.Module
    name: str
    tensor: Tensor
    copy: Tensor


def _is_training(module: nn.Module) -> bool:
    return module.__dict__.get("training", False)  # a compiled module asks the one inside


def _is_copied_unasked(module: nn.Module, tensor: Tensor) -> bool:
    return _is_training(module) and tensor.numel() <= _SMALL


def may_write(module: nn.Module) -> bool:
    """Whether a module may write one of its buffers when it is called."""
    return any([_may_write(module, name, t) for name, t in module.__dict__["_buffers"].items() if t is not None])


def _may_write(module: nn.Module, name: str, tensor: Tensor) -> bool:
    if tensor.requires_grad:
        return False
    return _is_copied_unasked(module, tensor) or _is_known_to_write(module, (name, _is_training(module))) is not False


def _is_known_to_write(module: nn.Module, key: tuple[str, bool]) -> bool | None:
    """Whether a module writes a buffer; None where nobody has asked, or the answer is still on its way."""
    known = _WRITES.get(module) or {}
    found = known.get(key)
    if not isinstance(found, Late):
        return found
    if not found.is_here():
        return None
    known[key] = wrote = any(found.values())
    return wrote


def copies_of(functions: Iterable[Any]) -> list[BufferCopy]:
    """The buffers that a call of functions may write, as they are."""
    return [
        BufferCopy(module, name, tensor, tensor.detach().clone())
        for module in Parts(functions).modules
        for name, tensor in module.__dict__["_buffers"].items()
        if tensor is not None and _may_write(module, name, tensor)
    ]


def worth_keeping(copy: BufferCopy) -> bool:
    """Whether a copy is worth keeping: only if the buffer was written, which is asked once for a module."""
    if _is_copied_unasked(copy.module, copy.tensor):
        return True
    known, key = _WRITES.setdefault(copy.module, {}), (copy.name, _is_training(copy.module))
    if key not in known and not is_captured(copy.tensor.device):
        now = copy.module._buffers.get(copy.name)
        known[key] = now is not copy.tensor or _send_difference(copy.tensor, copy.copy)
    return _is_known_to_write(copy.module, key) is not False


def _send_difference(a: Tensor, b: Tensor) -> Late | bool:
    """Whether tensors differ; from a device, that comes later."""
    return not torch.equal(a, b) if a.is_cpu else Late((a != b).any().reshape(1))


# ---- the snapshot ----------------------------------------------------------------------------------------------------

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


_HOOKS_THAT_RUN = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_tables_of = itemgetter("_parameters", "_buffers", "_modules")
_chained, _values = chain.from_iterable, dict.values
_END = (object(),)


def _flat(tables: Iterable[dict[str, Any]]) -> tuple[Any, ...]:
    """The values of dicts, one after the other: half the time and a tenth of the memory of copies."""
    return tuple(_chained(map(_values, tables)))


def _is_flat(tables: Iterable[dict[str, Any]], flat: tuple[Any, ...]) -> bool:
    """Whether dicts hold the same objects as when `_flat` was asked; without a line of Python for each."""
    return all(map(is_, chain(_chained(map(_values, tables)), _END), chain(flat, _END)))


def _by_table(names: Sequence[str], sizes: Sequence[int], flat: Sequence[Any]) -> list[dict[str, Any]]:
    """What `_flat` found, by name again."""
    left = zip(names, flat, strict=True)
    return [dict(islice(left, size)) for size in sizes]


class Snapshot:
    """The modules and tensors of functions; made before a call, and completed behind it by `note`."""

    __slots__ = (
        "addresses", "attributes", "buffers", "checked", "classes", "dtypes", "flags", "has_buffers",
        "has_gradient_hooks", "hooks", "is_lazy", "is_noted", "names", "owned", "parts", "sizes", "slots", "tables",
        "tensors", "versions", "written",
    )  # fmt: skip

    def __init__(self, functions: Iterable[Any]) -> None:
        self.parts = Parts(functions)
        self.is_noted = False
        self.checked = -1  # the backward in which all was found to be the same
        self.written: set[tuple[int, str]] = set()  # attributes that the call writes itself
        self.owned = owned = [m.__dict__ for m in self.parts.modules]
        self.attributes = _flat(owned)
        # As they are before the call, which may assign one.
        self.buffers = {id(d["_buffers"]): d["_buffers"].copy() for d in owned if d["_buffers"]}
        self.has_buffers = any(map(may_write, self.parts.modules))
        self.is_lazy = any(["_initialize_hook" in attributes for attributes in owned])
        self.has_gradient_hooks = any(map(_torch.has_gradient_hooks, self.tensors_in_sight()))

    def tensors_in_sight(self) -> Iterator[Tensor]:
        """The tensors that a call may read, beside its arguments."""
        yield from self.parts.tensors
        yield from [t for t in _flat([t for d in self.owned for t in _tables_of(d)[:2]]) if t is not None]

    def note(self) -> None:
        """Note what there is behind the call: rule 2 of NOTE [Snapshot]."""
        parts = self.parts
        if is_any_sharded():
            self._leave_out_sharded()
        if not (all([p.now() is p.value for p in parts.places]) and all([c.is_same() for c in parts.contents])):
            self._forget_written()
        owned = self.owned
        if not _is_flat(owned, self.attributes):
            self._note_written()
        unwritten = self._unwritten()
        self.attributes = _flat(unwritten)
        self.tables = tables = [table for attributes in owned for table in _tables_of(attributes)]
        was = [_replaced(table, self.buffers.get(id(table), table)) for table in tables] if self.buffers else tables
        self.buffers = {}
        self.slots = slots = _flat(was)
        self.sizes = list(map(len, unwritten)), list(map(len, was))
        self.names = tuple(_chained(unwritten)), tuple(_chained(was))
        has_hooks = any([table for attributes in owned for table in _HOOKS_THAT_RUN(attributes)])
        self.hooks = [{name: attributes[name].copy() for name in _HOOKS} for attributes in owned] if has_hooks else None
        self.tensors = tensors = [t for t in slots if isinstance(t, Tensor)]
        if parts.tensors:
            tensors += parts.tensors
        self.versions = _versions_of(tensors)
        self.flags, self.dtypes = [t.requires_grad for t in tensors], [t.dtype for t in tensors]
        self.addresses = _addresses_of(tensors)
        self.classes = list(map(type, parts.modules))
        self.is_noted = True

    def _unwritten(self) -> list[dict[str, Any]]:
        """The attributes that the call has left alone; of the others, it may hold on to none: they hold its graph."""
        if not self.written:
            return self.owned
        return [{n: v for n, v in d.items() if (i, n) not in self.written} for i, d in enumerate(self.owned)]

    def _note_written(self) -> None:
        """What the call has written on its modules; as they were is known in order only, and what is new comes last."""
        known = set(map(id, self.attributes))
        for i, attributes in enumerate(self.owned):
            for name, value in attributes.items():
                if id(value) not in known:
                    self.written.add((i, name))
                    if type(value) is list:  # such as the flat weights of an RNN: it stays, its items are put back
                        self.parts.places += [Place(value, n, item) for n, item in enumerate(value)]

    def _forget_written(self) -> None:
        """What the call has written itself is not put back."""
        parts = self.parts
        written = {id(place.value) for place in parts.places if place.now() is not place.value}
        parts.places = [place for place in parts.places if place.now() is place.value]
        for contents in (c for c in parts.contents if not c.is_same()):
            parts.places += contents.unwritten()
            items = contents.value.values() if isinstance(contents.value, dict) else contents.value
            written |= set(map(id, items)) - {id(place.value) for place in parts.places}
        parts.contents = [contents for contents in parts.contents if contents.is_same()]
        parts.tensors = [tensor for tensor in parts.tensors if id(tensor) not in written]

    def _leave_out_sharded(self) -> None:
        """FSDP2 changes the parameters of a module, and of those below it, whenever it is called."""
        below = {id(part) for root in self.parts.modules if is_sharded(root) for part in root.modules()}
        if below:
            self.parts.modules = [module for module in self.parts.modules if id(module) not in below]
            self.owned = [module.__dict__ for module in self.parts.modules]
            self.attributes = _flat(self.owned)

    def is_same(self) -> bool:
        """Whether a call would find what it found in forward; asked once in a backward."""
        task = _torch.graph_task_id()
        if not self.is_noted or (task == self.checked and task >= 0):
            return True
        is_same = self._is_same()
        self.checked = task if is_same else -1
        return is_same

    def _is_same(self) -> bool:
        return self._has_same_structure() and self._are_tensors_same()

    def _has_same_structure(self) -> bool:
        """Whether the same objects are where they were, whatever has been written into them."""
        if not (_is_flat(self._unwritten(), self.attributes) and _is_flat(self.tables, self.slots)):
            return False
        if self.hooks is not None:
            return False
        if any([table for attributes in self.owned for table in _HOOKS_THAT_RUN(attributes)]):
            return False
        parts = self.parts
        return (
            all([place.now() is place.value for place in parts.places])
            and all([contents.is_same() for contents in parts.contents])
            and list(map(type, parts.modules)) == self.classes
        )

    def _are_tensors_same(self) -> bool:
        tensors = self.tensors
        return (
            _versions_of(tensors) == self.versions
            and [t.requires_grad for t in tensors] == self.flags
            and [t.dtype for t in tensors] == self.dtypes
            and _addresses_of(tensors) == self.addresses
        )

    @contextmanager
    def restored(self, copies: Sequence[BufferCopy], functions: Iterable[Any]) -> Iterator[None]:
        """What these functions found in forward, put in its place; raises where that is not possible (rule 4)."""
        if self.is_same() and not copies:
            yield
            return
        with turn():  # before we look: another thread's replay may have put copies of its own in these places
            changes, flags = self._changes(copies, functions)
            changes += [Place(c.module._buffers, c.name, c.copy.clone()) for c in copies]
            held = [(place, place.now()) for place in changes]
            for place in changes:
                place.put(place.value)
            for tensor, flag in flags:
                tensor.requires_grad_(flag)
            try:
                yield
            finally:
                for tensor, flag in flags:
                    tensor.requires_grad_(not flag)
                for place, value in reversed(held):
                    place.put(value)

    def _changes(
        self, copies: Sequence[BufferCopy], functions: Iterable[Any]
    ) -> tuple[list[Any], list[tuple[Tensor, bool]]]:
        """What has to be put back, and the tensors whose flag has to be set."""
        if self.is_same():
            return [], []
        parts = self.parts
        classes = [Attribute(m, "__class__", was) for m, was in zip(parts.modules, self.classes, strict=True)]
        changes: list[Any] = [place for place in [*parts.places, *classes] if place.now() is not place.value]
        changes += [contents for contents in parts.contents if not contents.is_same()]
        changes += self._changed_names()
        return changes, [] if self._are_tensors_same() else self._changed_flags(copies, functions)

    def _changed_names(self) -> list[Any]:
        """What has to be put in its place in the modules' dicts."""
        changes: list[Any] = []
        attributes = _by_table(self.names[0], self.sizes[0], self.attributes)
        for i, (now, was) in enumerate(zip(self.owned, attributes, strict=True)):
            names = [n for n in {**now, **was} if now.get(n, _ABSENT) is not was.get(n, _ABSENT)]
            changes += [Place(now, n, was.get(n, _ABSENT)) for n in names if (i, n) not in self.written]
        for now, was in zip(self.tables, _by_table(self.names[1], self.sizes[1], self.slots), strict=True):
            if not _is_flat([now], tuple(was.values())):
                changes.append(Table(now, was))
        for i, now in enumerate(self.owned):  # tables of hooks as a whole, since their order is that of the calls
            for name in _HOOKS:
                was = {} if self.hooks is None else self.hooks[i][name]
                if now[name] != was:
                    changes.append(Place(now, name, type(now[name])(was)))
        return changes

    def look(self) -> list[dict[str, Any]]:
        """The attributes of the modules now, for `take_away`."""
        return [attributes.copy() for attributes in self.owned]

    def take_away(self, before: list[dict[str, Any]]) -> None:
        """Rule 5 of NOTE [Snapshot]: tensors that were not there before the call ran again."""
        for now, was in zip(self.owned, before, strict=True):
            for name, value in list(now.items()):
                if isinstance(value, Tensor) and was.get(name, _ABSENT) is not value:
                    Place(now, name, None).put(was.get(name, _ABSENT))

    def _changed_flags(self, copies: Sequence[BufferCopy], functions: Iterable[Any]) -> list[tuple[Tensor, bool]]:
        """Rule 4 of NOTE [Snapshot]; a tensor that was only frozen, or thawed, is restored."""
        flags: list[tuple[Tensor, bool]] = []
        modules = self.parts.modules
        unread = {id(t) for m in modules for name, t in m._buffers.items() if t is not None and _may_write(m, name, t)}
        unread |= {id(copy.tensor) for copy in copies}
        if self._has_same_structure():  # what others read may have been written: they step in backward
            unread |= _ids_in_sight(self) - _ids_in_sight(Snapshot(functions))
        for i, (tensor, address) in enumerate(zip(self.tensors, _addresses_of(self.tensors), strict=True)):
            if id(tensor) in unread:
                continue
            how = self._how_written(i, tensor, address)
            if how:
                raise self._written(tensor, how)
            if tensor.requires_grad != self.flags[i]:
                flags.append((tensor, self.flags[i]))
        return flags

    def _how_written(self, i: int, tensor: Tensor, address: Any) -> str:
        """What has been done to a tensor since forward; nothing if it holds what it held."""
        if version(tensor) != self.versions[i]:
            return "modified by an inplace operation"
        if tensor.dtype != self.dtypes[i]:
            return f"moved to {str(tensor.dtype).removeprefix('torch.')}"
        return "" if address == self.addresses[i] else "given other data"

    def _written(self, tensor: Tensor, how: str) -> ReplayError:
        names = [n for table in self.tables for n, value in table.items() if value is tensor]
        owners = [m for m in self.parts.modules if any(t is tensor for t in m._parameters.values())]
        subject = f"{names} of a module" if names else f"a tensor of shape {tuple(tensor.shape)} of its closure"
        error = ReplayError(
            f"{subject} changed between forward and backward",
            expected="the tensors that forward read",
            got=f"some that were {how}" + (f" (in {type(owners[0]).__name__})" if owners else ""),
            cure="run backward before changing them, or clone them in forward",
        )
        error.about = tensor
        return error


@contextmanager
def unmoved(functions: Iterable[Any]) -> Iterator[None]:
    """Leave the buffers of modules in training as they were, whatever runs inside."""
    copies = copies_of(functions)
    try:
        yield
    finally:
        with torch.no_grad():
            for copy in copies:
                copy.module._buffers[copy.name] = copy.tensor.copy_(copy.copy)


def _replaced(now: dict[str, Any], was: dict[str, Any]) -> dict[str, Any]:
    """What the buffers of a module were; one that the call has replaced is let go with its graph."""
    return {n: t if now.get(n) is t or t is None or t.is_leaf else _with_own_graph(t) for n, t in was.items()}


def _with_own_graph(tensor: Tensor) -> Tensor:
    """The values of a result, as another result: what is computed from it saves the same."""
    return tensor.detach().requires_grad_().view_as(tensor)


def _ids_in_sight(snapshot: Snapshot) -> set[int]:
    return {id(tensor) for tensor in snapshot.tensors_in_sight()}


def _versions_of(tensors: list[Tensor]) -> list[int]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # an inference tensor
        return [version(t) for t in tensors]


def _addresses_of(tensors: list[Tensor]) -> list[tuple[int, int | torch.SymInt] | None]:
    """Where tensors live: in a storage, and not at a pointer, since FSDP empties a storage, and fills it again."""
    return [
        (_torch.storage_of(t), t.storage_offset()) if type(t) in _WITH_ADDRESS and t.layout is torch.strided else None
        for t in tensors
    ]


_WITH_ADDRESS = (Tensor, nn.Parameter, nn.Buffer)


@contextmanager
def undrawn(functions: Iterable[Any], given: Iterable[Tensor] = ()) -> Iterator[None]:
    """Leave the random numbers to come as they are, whatever functions draw inside."""
    seen = Snapshot(functions).tensors_in_sight()
    with RandomState(accelerators([*given, *seen])).restored():
        yield
