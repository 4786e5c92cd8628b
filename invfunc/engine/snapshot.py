"""Snapshot: the modules that a call uses, as forward left them, so that it can run again on what it ran on.

NOTE [Snapshot] No gradient depends on what is found here: it only tells what has changed when a call runs again.

1.  *Where to look.* A function's modules are found in its structure: modules, methods, partials, closures, containers,
    callable objects. What is hidden better is not restored, as with torch's own checkpoint.
2.  *Slots, flags, hooks, submodules, attributes*, the classes of modules, what is in the lists, dicts, sets and objects
    that they or closures hold, and what closures and globals are bound to, are noted behind the call: what it writes
    itself, such as a counter, is not put back, but for buffers that it assigns: it runs again with those that it found.
    What it has computed and left somewhere is not held here: it holds its graph, which holds the snapshot.
    Where one of them has changed since, what it was is put in its place while the call runs again. What a call writes
    into a module that is its argument, such as a cache, is what it was before the call.
3.  *Buffers* that a module may write move once a step: the call runs again on copies of them as they were before it.
    (Batch norm's kernels do not bump the version counter, so that nothing tells what was written.) Large ones, and
    those of a module in eval, are copied if the module's first call was seen to write them.
4.  *A tensor that was written in place*, moved, or given other data can not be restored: it raises, and names the
    module and the tensor. We look for it when the rest is in its place: these functions read what forward found.
5.  *Tensors that the call leaves* on a module, in a container or in a closure when it runs again are taken away: those
    of forward stay.
6.  A module that is shared with another thread is changed by one replay at a time: rule 5 of NOTE [Conditions].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from .. import _torch
from ..errors import ReplayError
from .buffers import BufferCopy, may_write, may_write_into
from .devices import accelerators
from .parts import ABSENT, Attribute, Contents, Parts, Place, Table, version, versions_of
from .random_numbers import RandomState
from .sharding import is_any_sharded, is_sharded
from .turns import patience, turn

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
_slots_of_tensors = itemgetter("_parameters", "_buffers")
_is_there = partial(is_not, None)
_chained, _values = chain.from_iterable, dict.values
_END = (object(),)


def _flat(tables: Iterable[dict[str, Any]]) -> tuple[Any, ...]:
    """The values of dicts, one after the other: half the time and a tenth of the memory of copies."""
    return tuple(_chained(map(_values, tables)))


def _is_flat(tables: Iterable[dict[str, Any]], flat: tuple[Any, ...]) -> bool:
    """Whether dicts hold the same objects as when `_flat` was asked; without a line of Python for each."""
    return all(map(is_, chain(_chained(map(_values, tables)), _END), chain(flat, _END)))


def _names_in(tables: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    """The names of dicts, one after the other."""
    return tuple(_chained(tables))


def _changed_in(now: dict[str, Any], was: dict[str, Any]) -> list[str]:
    """The names that have something else than they had, or are new, or gone."""
    return [n for n in {**now, **was} if now.get(n, ABSENT) is not was.get(n, ABSENT)]


def _have_hooks(owned: Iterable[dict[str, Any]]) -> bool:
    """Whether a module has any, by the attributes of each."""
    return any(_chained(map(_HOOKS_THAT_RUN, owned)))


def _by_table(names: Sequence[str], sizes: Sequence[int], flat: Sequence[Any]) -> list[dict[str, Any]]:
    """What `_flat` found, by name again."""
    left = zip(names, flat, strict=True)
    return [dict(islice(left, size)) for size in sizes]


class Snapshot:
    """The modules and tensors of functions; made before a call, and completed behind it by `note`."""

    __slots__ = (
        "addresses", "attributes", "before", "buffers", "checked", "classes", "dtypes", "filled", "flags", "given",
        "has_buffers", "has_gradient_hooks", "held", "hooks", "is_lazy", "is_noted", "names", "owned", "parts",
        "sizes", "slots", "tables", "tensors", "versions", "written",
    )  # fmt: skip

    def __init__(self, functions: Iterable[Any], given: Sequence[Any] = ()) -> None:
        self.parts = parts = Parts(functions)
        size, count = len(parts.contents), len(parts.modules)
        for item in given:  # what is among the arguments of a call
            parts.add(item, 0)
        self.given = {id(contents.table) for contents in parts.contents[size:]} if given else set()
        self.before: list[Any] = []  # what the call has written into what it was given, as it was before
        self.is_noted = False
        self.checked = -1  # the backward in which all was found to be the same
        self.written: set[tuple[int, str]] = set()  # attributes that the call writes itself
        self.filled: list[Any] = []  # containers and places that it writes itself, without what was there
        self.owned = owned = [m.__dict__ for m in self.parts.modules]
        self.attributes = _flat(owned)
        self.held = [(i, owned[i].copy()) for i in range(count, len(owned))] if given else []
        # As they are before the call, which may assign one.
        self.buffers = {id(d["_buffers"]): d["_buffers"].copy() for d in owned if d["_buffers"]}
        self.has_buffers = bool(self.buffers) and any(map(may_write, self.parts.modules))
        self.is_lazy = any(["_initialize_hook" in attributes for attributes in owned])
        self.has_gradient_hooks = _torch.have_gradient_hooks(self.tensors_in_sight())

    def tensors_in_sight(self) -> list[Tensor]:
        """The tensors that a call may read, beside its arguments."""
        slots = _chained(map(_values, _chained(map(_slots_of_tensors, self.owned))))
        return [*self.parts.tensors, *filter(_is_there, slots)]

    def note(self) -> None:
        """Note what there is behind the call: rule 2 of NOTE [Snapshot]."""
        parts = self.parts
        if is_any_sharded():
            self._leave_out_sharded()
        if not (all([p.now() is p.value for p in parts.places]) and all([c.is_same() for c in parts.contents])):
            self._forget_written()
        owned = self.owned
        if not _is_flat(owned, self.attributes):
            self._note_given()
            self._note_written()
        self.held = []
        unwritten = self._unwritten()
        self.attributes = _flat(unwritten)
        self.tables = tables = list(_chained(map(_tables_of, owned)))
        was = [_replaced(table, self.buffers.get(id(table), table)) for table in tables] if self.buffers else tables
        self.buffers = {}
        self.slots = slots = _flat(was)
        self.sizes = list(map(len, unwritten)), list(map(len, was))
        self.names = _names_in(unwritten), _names_in(was)
        has_hooks = _have_hooks(owned)
        self.hooks = [{name: attributes[name].copy() for name in _HOOKS} for attributes in owned] if has_hooks else None
        self.tensors = tensors = [t for t in slots if isinstance(t, Tensor)]
        if parts.tensors:
            tensors += parts.tensors
        self.versions = versions_of(tensors)
        self.flags, self.dtypes = list(map(_wants_gradient, tensors)), list(map(_dtype_of, tensors))
        self.addresses = _addresses_of(tensors)
        self.classes = list(map(type, parts.modules))
        self.is_noted = True

    def _unwritten(self) -> list[dict[str, Any]]:
        """The attributes that the call has left alone; of the others, it may hold on to none: they hold its graph."""
        if not self.written:
            return self.owned
        return [{n: v for n, v in d.items() if (i, n) not in self.written} for i, d in enumerate(self.owned)]

    def _note_given(self) -> None:
        """What the call has written on the modules that it was given."""
        for i, was in self.held:
            now = self.owned[i]
            changed = _changed_in(now, was)
            self.before += [Place(now, n, was.get(n, ABSENT)) for n in changed]
            self.written.update([(i, n) for n in changed])

    def _note_written(self) -> None:
        """What the call has written on its modules; as they were is known in order only, and what is new comes last."""
        known = set(map(id, self.attributes))
        read = set(map(id, _flat([table for attributes in self.owned for table in _tables_of(attributes)])))
        for i, attributes in enumerate(self.owned):
            for name, value in attributes.items():
                if id(value) not in known:
                    self.written.add((i, name))
                    if type(value) is list:  # such as the flat weights of an RNN: it stays, its items are put back
                        old = [(n, t) for n, t in enumerate(value) if id(t) in read or not _has_graph(t)]
                        self.parts.places += [Place(value, n, item) for n, item in old]

    def _forget_written(self) -> None:
        """What the call has written itself is not put back."""
        parts = self.parts
        written = {id(place.value) for place in parts.places if place.now() is not place.value}
        self.filled = [place._replace(value=None) for place in parts.places if place.now() is not place.value]
        changed = [contents for contents in parts.contents if not contents.is_same()]
        self.before += [contents for contents in changed if id(contents.table) in self.given]
        self.filled += [c._replace(value=None) for c in changed if id(c.table) not in self.given]
        parts.places = [place for place in parts.places if place.now() is place.value]
        for contents in changed:
            parts.places += [] if id(contents.table) in self.given else contents.unwritten()
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
        attributes, tables = self._unwritten(), self.tables
        if self.before or not (_is_flat(attributes, self.attributes) and _is_flat(tables, self.slots)):
            return False
        if (_names_in(attributes), _names_in(tables)) != self.names:
            return False
        if (list(map(len, attributes)), list(map(len, tables))) != self.sizes:
            return False
        if self.hooks is not None:
            return False
        if _have_hooks(self.owned):
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
            versions_of(tensors) == self.versions
            and list(map(_wants_gradient, tensors)) == self.flags
            and list(map(_dtype_of, tensors)) == self.dtypes
            and _addresses_of(tensors) == self.addresses
        )

    @contextmanager
    def restored(self, copies: Sequence[BufferCopy], functions: Iterable[Any]) -> Iterator[None]:
        """What these functions found in forward, put in its place; raises where that is not possible (rule 4)."""
        if self.is_same() and not copies:
            yield
            return
        # Before we look: another thread's replay may have put copies of its own in these places.
        with turn(self._things(), patience()):
            is_same = self.is_same()
            changes = [] if is_same else self._changes()
            changes += [Place(c.module._buffers, c.name, c.copy.clone()) for c in copies]
            held = [(place, place.now()) for place in changes]
            flags: list[tuple[Tensor, bool]] = []
            try:
                for place in changes:
                    place.put(place.value)
                flags = [] if is_same else self._changed_flags(copies, functions)
                for tensor, flag in flags:
                    tensor.requires_grad_(flag)
                yield
            finally:
                for tensor, flag in flags:
                    tensor.requires_grad_(not flag)
                for place, value in reversed(held):
                    place.put(value)

    def _things(self) -> set[Any]:
        """Where something may have to be put back: modules, and what has changed elsewhere."""
        parts = self.parts
        places = {(id(place.table), place.name) for place in parts.places if place.now() is not place.value}
        contents = [id(contents.table) for contents in parts.contents if not contents.is_same()]
        return places.union(map(id, parts.modules), contents)

    def _changes(self) -> list[Any]:
        """What has to be put in its place."""
        parts = self.parts
        classes = [Attribute(m, "__class__", was) for m, was in zip(parts.modules, self.classes, strict=True)]
        changes: list[Any] = [place for place in [*parts.places, *classes] if place.now() is not place.value]
        changes += [contents for contents in parts.contents if not contents.is_same()]
        return [*changes, *self._changed_names(), *self.before]

    def _changed_names(self) -> list[Any]:
        """What has to be put in its place in the modules' dicts."""
        changes: list[Any] = []
        attributes = _by_table(self.names[0], self.sizes[0], self.attributes)
        for i, (now, was) in enumerate(zip(self.owned, attributes, strict=True)):
            names = [n for n in _changed_in(now, was) if (i, n) not in self.written]
            changes += [Place(now, n, was.get(n, ABSENT)) for n in names]
        for now, was in zip(self.tables, _by_table(self.names[1], self.sizes[1], self.slots), strict=True):
            if not _is_flat([now], tuple(was.values())) or tuple(now) != tuple(was):
                changes.append(Table(now, was))
        for i, now in enumerate(self.owned):  # tables of hooks as a whole, since their order is that of the calls
            for name in _HOOKS:
                was = {} if self.hooks is None else self.hooks[i][name]
                if now[name] != was:
                    changes.append(Place(now, name, type(now[name])(was)))
        return changes

    def look(self) -> list[tuple[Any, Any]]:
        """What is now where the call writes, for `take_away`."""
        places = [Place(self.owned[i], name, None) for i, name in self.written]
        return [(place, place.now()) for place in (*places, *self.filled)]

    def take_away(self, before: list[tuple[Any, Any]]) -> None:
        """Rule 5 of NOTE [Snapshot]: tensors that were not there before the call ran again, and what goes with them."""
        changed = [(place, was) for place, was in before if place.now() is not was]
        owners = {id(place.table) for place, was in changed if _is_left_in(place, was)}
        for place, was in changed:
            if id(place.table) in owners:
                place.put(was)

    def _changed_flags(self, copies: Sequence[BufferCopy], functions: Iterable[Any]) -> list[tuple[Tensor, bool]]:
        """Rule 4 of NOTE [Snapshot]; a tensor that was only frozen, or thawed, is restored."""
        flags: list[tuple[Tensor, bool]] = []
        if self._are_tensors_same():
            return flags
        modules = self.parts.modules
        unread = {
            id(t) for m in modules for name, t in m._buffers.items() if t is not None and may_write_into(m, name, t)
        }
        unread |= {id(copy.tensor) for copy in copies}
        # What others read may have been written: they step in backward. All is where it was, so we see what these read.
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
        scripted = _chained([(*m.named_parameters(), *m.named_buffers()) for m in self.parts.scripts])
        named = [*zip(self.names[1], self.slots, strict=True), *scripted]
        names = [n for n, value in named if value is tensor]
        parameters = _by_table(self.names[1], self.sizes[1], self.slots)[::3]  # the first of `_tables_of`
        pairs = zip(self.parts.modules, parameters, strict=True)
        owners = [module for module, table in pairs if any(t is tensor for t in table.values())]
        subject = f"{names} of a module" if names else f"a tensor of shape {tuple(tensor.shape)} of its closure"
        error = ReplayError(
            f"{subject} changed between forward and backward",
            expected="the tensors that forward read",
            got=f"some that were {how}" + (f" (in {type(owners[0]).__name__})" if owners else ""),
            cure="run backward before changing them, or clone them in forward",
        )
        error.about = tensor
        return error


def _replaced(now: dict[str, Any], was: dict[str, Any]) -> dict[str, Any]:
    """What the buffers of a module were; one that the call has replaced is let go with its graph."""
    return {n: t if now.get(n) is t or t is None or t.is_leaf else _with_own_graph(t) for n, t in was.items()}


def _with_own_graph(tensor: Tensor) -> Tensor:
    """The values of a result, as another result: what is computed from it saves the same."""
    return tensor.detach().requires_grad_().view_as(tensor)


def _has_graph(item: Any) -> bool:
    return any([t.grad_fn is not None for t in _torch.trees.tree_leaves(item) if isinstance(t, Tensor)])


def _is_left_in(place: Any, was: Any) -> bool:
    """Whether tensors are new in a place; in a container, only those with a graph: others are somebody's record."""
    now = place.now()
    return bool(_tensors_of(now) - _tensors_of(was)) and (not isinstance(place, Contents) or _has_graph(now))


def _tensors_of(item: Any) -> set[int]:
    return {id(leaf) for leaf in _torch.trees.tree_leaves(item) if isinstance(leaf, Tensor)}


def _ids_in_sight(snapshot: Snapshot) -> set[int]:
    return {id(tensor) for tensor in snapshot.tensors_in_sight()}


def _addresses_of(tensors: list[Tensor]) -> list[tuple[int, int | torch.SymInt] | None]:
    """Where tensors live: in a storage, and not at a pointer, since FSDP empties a storage, and fills it again."""
    if _WITH_ADDRESS.issuperset(map(type, tensors)):
        try:
            storages = map(_torch.storage_id, map(Tensor.untyped_storage, tensors))
            return list(zip(storages, map(Tensor.storage_offset, tensors), strict=True))
        except RuntimeError:  # one of them is sparse, or belongs to a transform
            pass
    return [_address_of(t) if type(t) in _WITH_ADDRESS else None for t in tensors]


def _address_of(tensor: Tensor) -> tuple[int, int | torch.SymInt] | None:
    is_strided = tensor.layout is torch.strided and not _torch.is_wrapped(tensor)
    return (_torch.storage_of(tensor), tensor.storage_offset()) if is_strided else None


_wants_gradient, _dtype_of = map(attrgetter, ("requires_grad", "dtype"))
_WITH_ADDRESS = frozenset((Tensor, nn.Parameter, nn.Buffer))


@contextmanager
def leave_random_state(functions: Iterable[Any], given: Iterable[Tensor] = ()) -> Iterator[None]:
    """Leave the random numbers to come as they are, whatever functions draw inside."""
    snapshot = Snapshot(functions)
    with RandomState(accelerators([*given, *snapshot.tensors_in_sight()], snapshot.parts.devices)).restored():
        yield
