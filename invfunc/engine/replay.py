"""Replay: one recorded call of a user's functions, run again in backward with the same bits.

NOTE [Replay] What a function did in forward has to happen again, identically, in backward. Six things could differ:

1.  *Captured tensors.* A function may close over parameters, modules, or tensors of an outer transform. An autograd
    Function that hides them drops their gradients silently; so they are found, and become explicit inputs of the stage.
    Modules are read structurally (their slots: parameters and buffers). Anything else is watched by a
    TorchFunctionMode: an argument that requires grad or is wrapped by functorch, and was not made inside, is captured.
2.  *Which tensors a slot holds.* Under ``functional_call`` a module's tensors in backward are not those of forward:
    the captured ones are put into the slots while the function runs again. Where they are the same objects, which is
    the ordinary case, the module is called directly: hooks fire, FSDP works, threads do not meet.
3.  *Chain rule, once.* A captured tensor may itself depend on another captured one. Unless all are leaves, the function
    runs again on detached stand-ins, or the inner gradient would be counted twice.
4.  *Random numbers.* One snapshot, kept only if the call drew any, governs every evaluation in backward; the global
    stream ends as in a plain run.
5.  *Buffers.* What a call writes (running statistics) moves once: it runs again on copies of the buffers as they were.
    Batch norm's kernels do not bump the version counter, so the first call of each module compares values.
6.  *Autocast*, per device, dtype included; the number of *threads*, by which a kernel may divide its sums; and
    *discrete decisions*, pinned by `pin`.
7.  A module in training is called again and again, and sees the same each time: the slots of its parts, with the same
    tensors in them. A recording is a value; one that still *holds* is used again, in the next forward and to tell
    backward at a glance that nothing has to be put in place.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from operator import attrgetter, getitem, is_, itemgetter
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .. import _torch
from ..core.op import VJP, graph_leaves, name_of
from ..errors import ReplayError
from ..wires import Wire, is_differentiable, leaves, map_wire, spread, unflatten
from .sharding import check_callee

T = TypeVar("T")

# ---- what a function closes over, as far as its structure tells --------------------------------------------------


@dataclass(frozen=True)
class Owners:
    """Where a function keeps tensors: modules and tensors found in its structure; ``opaque`` if it may have more."""

    modules: tuple[nn.Module, ...]
    tensors: tuple[Tensor, ...]
    opaque: bool
    nearby: tuple[nn.Module, ...] = ()  # modules that a closure can see: it may read their tensors without calling them
    called: tuple[nn.Module, ...] = ()  # those of ``modules`` that are called, and not only asked for a method
    self_contained: dict[tuple[int, bool], bool] = field(default_factory=dict)  # (module, training) -> as first seen
    last: Last = field(default_factory=lambda: Last(), compare=False)

    def needs_watch(self) -> bool:
        """Whether a call has to be watched: a closure always, a module until it is known to read only its own."""
        if self.opaque:
            return True
        for index, module in enumerate(self.modules):
            key = index, module.training
            if key not in self.self_contained:
                self.self_contained[key] = _is_compiled(module)  # Dynamo does its own watching
            if not self.self_contained[key]:
                return True
        return False

    def learn(self, foreign: bool) -> None:
        """Remember whether the modules were seen to read tensors that they do not own."""
        self.self_contained.update({(i, module.training): not foreign for i, module in enumerate(self.modules)})


def owners(functions: Iterable[Any]) -> Owners:
    """Look through partials, bound methods, modules and the package's own wrappers; anything else is opaque."""
    called: dict[int, nn.Module] = {}
    asked: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}
    closures: list[Any] = []
    todo = list(functions)
    while todo:
        item = todo.pop()
        if isinstance(item, nn.Module):
            called[id(item)] = item
        elif isinstance(item, Tensor):
            tensors[id(item)] = item
        elif isinstance(item, partial):
            todo += [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, MethodType) and isinstance(item.__self__, nn.Module):
            (called if item.__func__ is nn.Module.__call__ else asked)[id(item.__self__)] = item.__self__
        elif isinstance(item, MethodType):
            todo += [item.__self__, item.__func__]
        elif hasattr(item, "functions"):  # the package's own values and wrappers
            todo += item.functions
        elif isinstance(item, (tuple, list)):
            todo += item
        elif isinstance(item, dict):
            todo += item.values()
        elif callable(item) and not closes_over_nothing(item):
            closures.append(item)
    nearby = {id(m): m for closure in closures for m in visible(closure) if isinstance(m, nn.Module)}
    modules, by_call = tuple({**called, **asked}.values()), tuple(called.values())
    return Owners(modules, tuple(tensors.values()), bool(closures), tuple(nearby.values()), by_call)


def visible(fn: Any) -> list[Any]:
    """What a closure can name: its cells, its globals, or the attributes of a callable object."""
    code = getattr(fn, "__code__", None)
    if code is None:
        return list(getattr(fn, "__dict__", {}).values())
    cells = [cell.cell_contents for cell in fn.__closure__ or () if cell != _EMPTY_CELL]
    return cells + [fn.__globals__[name] for name in code.co_names if name in fn.__globals__]


_EMPTY_CELL = CellType()


def closes_over_nothing(fn: Callable[..., Any]) -> bool:
    """Torch's own functions, and this package's plain ones; a class of torch counts too."""
    home = getattr(fn, "__module__", None) or type(fn).__module__
    ours = home.split(".")[0] in ("torch", "invfunc", "builtins", "math", "_operator")
    plain = isinstance(fn, FunctionType) and not fn.__closure__
    return ours and (plain or isinstance(fn, (BuiltinFunctionType, type)) or type(fn).__name__.endswith("descriptor"))


def slots(module: nn.Module, seen: set[int]) -> list[tuple[nn.Module, dict[str, Any], str, Tensor, bool]]:
    """Every ``(owner, its dict, name, tensor, is buffer)`` below a module, each submodule once."""
    found, todo = [], [module]
    while todo:
        owner = todo.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        attributes = owner.__dict__
        if "_parameters" not in attributes:  # of TorchScript, which shows copies: they are read, and not replaced
            attributes = {kind: dict(getattr(owner, kind)) for kind in ("_parameters", "_buffers", "_modules")}
        for table, is_buffer in (attributes["_parameters"], False), (attributes["_buffers"], True):
            for name, tensor in table.items():
                if tensor is not None:
                    found.append((owner, table, name, tensor, is_buffer))
        if attributes["_modules"]:
            todo += [child for child in reversed(attributes["_modules"].values()) if child is not None]
        if Tensor in map(type, attributes.values()):
            found += [(owner, attributes, name, value, False) for name, value in attributes.items() if _counts(value)]
    return found


class World(NamedTuple):
    """The slots of modules as a call found them: what a module's call depends on, apart from its arguments."""

    modules: tuple[nn.Module, ...]
    attributes: tuple[dict[str, Any], ...]
    tables: tuple[dict[str, Any], ...]  # of parameters, buffers and submodules
    seen: tuple[Any, ...]  # all of these, what is in the tables, whether each module is in training, and an end
    sizes: tuple[int, ...]  # how many attributes there are
    others: tuple[tuple[dict[str, Any], ...], tuple[str, ...]]  # dicts of those that could be tensors, and their names

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> World | None:
        """As it is now; None where there is more to see than slots."""
        every = tuple({id(part): part for module in modules for part in module.modules()}.values())
        attributes = tuple(map(_attributes, every))
        if not all([{"training", "_parameters", "_buffers", "_modules"} <= a.keys() for a in attributes]):
            return None
        tables = tuple([a[kind] for a in attributes for kind in ("_parameters", "_buffers", "_modules")])
        if not all([type(table) in (dict, OrderedDict) for table in tables]):
            return None
        seen = *attributes, *_chained(map(_state, attributes)), *_chained(map(_values, tables)), *_END
        names = [a.keys() - _EVERY_MODULES_OWN for a in attributes]
        others = tuple([a for a, own in zip(attributes, names, strict=True) for _ in own]), tuple(_chained(names))
        world = cls(every, attributes, tables, seen, tuple(map(len, attributes)), others)
        return world if world.holds() else None

    def holds(self) -> bool:
        """Whether it is as it was; without a line of Python for each slot, since every call asks."""
        modules, attributes, tables, seen, sizes, others = self
        now = chain(map(_attributes, modules), _chained(map(_state, attributes)), _chained(map(_values, tables)), _END)
        if not all(map(is_, now, seen)) or tuple(map(len, attributes)) != sizes:
            return False
        try:
            return Tensor not in map(type, map(getitem, *others))
        except KeyError:  # one has another name
            return False


_END = (object(),)
_EVERY_MODULES_OWN = frozenset(vars(nn.Module()))
_chained, _values = chain.from_iterable, dict.values
_attributes, _requires_grad = attrgetter("__dict__"), attrgetter("requires_grad")
_state = itemgetter("training", "_parameters", "_buffers", "_modules")


def _counts(value: Any) -> bool:
    """Whether an attribute that a module has not registered is a tensor of its own that needs a gradient."""
    if type(value) is not Tensor:
        return False
    return (value.requires_grad and value.is_leaf) or (_torch.active() and _torch.is_wrapped(value))


# ---- the recording -----------------------------------------------------------------------------------------------


Slot: TypeAlias = tuple[dict[str, Any], str]  # where a module keeps a tensor: a dict of it, and a name


@dataclass(slots=True)
class Recording:
    """What one call of a user's functions saw; see NOTE [Replay]."""

    captured: tuple[Tensor, ...]  # explicit inputs of the stage
    filled: tuple[tuple[dict[str, Any], str, int], ...]  # slots that hold captured tensors, and which
    fixed: tuple[tuple[dict[str, Any], str, Tensor, int], ...]  # slots of constants, and their versions
    written: tuple[tuple[dict[str, Any], str, Tensor], ...]  # slots, and what they held before
    noted: dict[int, int]  # id of a tensor in a closure -> its place in captured
    alive: tuple[Tensor, ...]  # keeps the ids in ``noted`` from being reused
    expected: frozenset[int]  # those of ``noted`` that forward was seen to use
    copied: tuple[tuple[Tensor, Tensor], ...]  # written tensors without a slot, and copies
    pins: tuple[tuple[str, Any], ...]
    returned: tuple[Any, list[Kind]] | None  # a function of an op, and what it returned
    dead: tuple[int, ...]  # outputs that were found to depend on nothing differentiable
    opaque: bool  # whether a closure was called
    random: Streams | None
    autocast: tuple[Any, ...]
    threads: int
    wrapping: bool  # whether a transform was running
    world: World | None = None  # all that the call depended on, if that was the slots of modules and nothing else

    def holds(self) -> bool:
        """Whether a call would now see the same tensors that this one saw."""
        return (
            self.world is not None
            and not _torch.active()
            and self.world.holds()
            and all(map(_requires_grad, self.captured))
            and not (self.fixed and any([t.requires_grad or version(t) != was for _, _, t, was in self.fixed]))
        )

    def is_under_way(self) -> bool:
        """Whether a call would now run under the same conditions."""
        return self.autocast == autocast_state() and self.threads == torch.get_num_threads()

    def again(self, fn: Callable[..., T], *args: Any) -> T:
        """``fn(*args)`` under the conditions that it ran under."""
        if self.is_under_way():
            return fn(*args)
        with autocast(self.autocast), threads(self.threads):
            return fn(*args)

    def is_alone_with(self, captured: Sequence[Tensor]) -> bool:
        """Whether these are the captured tensors, and nobody else asks for their gradients."""
        return all(map(is_, captured, self.captured)) and not any([c._backward_hooks for c in captured])


class Last:
    """What is known of an op's last call, where the next one may be the same. A copy of the op starts anew.

    It keeps the parameters that the call found in its modules; those that have been replaced, until the next call.
    """

    __slots__ = ("call", "recording")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Let go of what does not hold any more."""
        self.recording: Recording | None = None
        self.call: Any = None  # the static part of its node

    def __reduce__(self) -> Any:
        return Last, ()


class Running:
    """What functions tell while they run: their pins, and what one of them returned."""

    pins: tuple[tuple[str, Any], ...] = ()
    returned: tuple[Any, list[Kind]] | None = None

    def __init__(self, found: Owners, last: Recording | None = None) -> None:
        self.found, self.last = found, last
        self.around = _RUNNING.get()  # the call, or the replay, in which this one runs

    def pin(self, name: str, value: T) -> T:
        """Keep a value for when the call runs again; see `pin`."""
        if self.around is not None:
            value = self.around.pin(name, value)
        self.pins = (*self.pins, (name, value))
        return value


class Repeat(Running):
    """A call that will see what the last one saw, and so needs no other `Recording`; rule 7 of NOTE [Replay]."""

    def run(self, fn: Callable[[Wire], T], x: Wire) -> T:
        """``fn(x)`` without gradients."""
        return _torch.with_gradients(False, fn, x)

    def leave(self, random: Streams | None) -> Recording:
        """The last recording, unless the call drew, pinned or returned something else."""
        last = cast(Recording, self.last)
        if self.returned != last.returned:
            self.found.last.recording = last = replace(last, returned=self.returned)
        if self.pins:
            return replace(last, random=random, pins=self.pins, world=None)
        return last if random is None else replace(last, random=random)


class Scope(Running):
    """Sees what functions use while they run, and makes a `Recording` of it."""

    def __init__(self, found: Owners, graph: bool = False) -> None:
        super().__init__(found)
        self.graph = graph
        self.captured: list[Tensor] = []
        self.places: dict[int, int] = {}  # id of a captured tensor -> its place
        self.filled: list[tuple[dict[str, Any], str, int]] = []
        self.fixed: list[tuple[dict[str, Any], str, Tensor, int]] = []
        self.before: list[tuple[nn.Module, dict[str, Any], str, Tensor, Tensor, int]] = []  # buffers, and copies
        self.noted: dict[int, int] = {}
        self.alive: list[Tensor] = []
        self.expected: set[int] = set()
        self.dead: tuple[int, ...] = ()
        self.seen: set[int] = set()
        self.began: int | None = None  # where the graph of this call begins, when it builds one
        self.wrapping = _torch.active()
        self.made: set[int] = set()  # ids of tensors that the call has made, as far as it was watched
        self.owned: set[int] = set()  # ids of the dicts of modules that were known before the call
        special = found.opaque or found.tensors or self.wrapping or graph
        self.world = None if special else World.of(found.modules)
        self._begin()

    def _begin(self) -> None:
        for module in self.found.modules:
            check_callee(module, module in self.found.called)
            self.enter(module)
        if self.found.opaque:
            self.owned = {id(table) for table, *_ in [*self.filled, *self.fixed]}
            self.owned |= {id(table) for _, table, *_ in self.before}
        for tensor in self.found.tensors:
            self.note(tensor)

    def run(self, fn: Callable[[Wire], Any], x: Wire) -> Any:
        """``fn(x)`` without gradients."""
        return (_graphed if self.graph and not self.wrapping else _quiet)(fn, x, self.found, self)

    def capture(self, tensor: Tensor) -> int:
        """The place of a tensor among the captured ones."""
        place = self.places.get(id(tensor))
        if place is None:
            self.places[id(tensor)] = place = len(self.captured)
            self.captured.append(tensor)
        return place

    def matters(self, tensor: Tensor) -> bool:
        """Whether a tensor has to be an explicit input: it may get a gradient, or belongs to a transform."""
        return tensor.requires_grad or (self.wrapping and _torch.is_wrapped(tensor))

    def see(self, tensor: Tensor, wrapped: bool) -> None:
        """Capture a tensor that a closure was seen to use: when it runs again, it has to use it again."""
        known = id(tensor) in self.places
        if self.began is not None and tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() >= self.began:
            return  # made inside, by something that a TorchFunctionMode does not see
        if wrapped:
            if tensor.requires_grad and id(tensor) not in {id(self.captured[i]) for *_, i in self.filled}:
                raise _hidden(tensor)
            return
        self.note(tensor)
        if not known and tensor.requires_grad and id(tensor) in self.noted:
            self.expected.add(id(tensor))
            place = self.noted[id(tensor)]
            self.filled += [(table, name, place) for table, name in self.homes.get(id(tensor), ())]

    @cached_property
    def homes(self) -> dict[int, list[Slot]]:
        """The slots of nearby modules: where a closure that reads a module's tensor will find it again."""
        found: dict[int, list[Slot]] = {}
        seen: set[int] = set()
        for module in self.found.nearby:
            for _, table, name, tensor, _ in slots(module, seen):
                found.setdefault(id(tensor), []).append((table, name))
        return found

    def note(self, tensor: Tensor) -> None:
        """Capture a tensor that a closure holds, or what an enclosing replay has put in its place."""
        actual = stand_in(tensor)
        if self.matters(actual) and id(tensor) not in self.places:
            self.noted[id(tensor)] = self.capture(actual)
            self.alive.append(tensor)

    def enter(self, module: nn.Module) -> None:
        """Read the slots of a module that the call uses."""
        for owner, table, name, tensor, is_buffer in slots(module, self.seen):
            if self.matters(tensor):
                self.filled.append((table, name, self.capture(tensor)))
            elif is_buffer and _may_write(owner, name):
                self.before.append((owner, table, name, tensor, tensor.clone(), version(tensor)))
            else:
                self.fixed.append((table, name, tensor, version(tensor)))

    def leave(self, random: Streams | None) -> Recording:
        """What was seen."""
        written, copied = self._settle() if self.before else ((), ())
        if self.found.opaque:
            self._take_back()
        seen = Recording(
            tuple(self.captured),
            tuple(self.filled),
            tuple(self.fixed),
            tuple(written),
            self.noted,
            tuple(self.alive),
            frozenset(self.expected),
            tuple(copied),
            self.pins,
            self.returned,
            self.dead,
            self.found.opaque,
            random,
            autocast_state(),
            torch.get_num_threads(),
            self.wrapping,
        )
        if self.world is not None and not (written or copied) and self._is_repeatable():
            seen.world = self.world
            self.found.last.recording = seen if random is None else replace(seen, random=None)
        return seen

    def _is_repeatable(self) -> bool:
        """Whether the call depended on nothing but the slots of modules, apart from what `leave` was told."""
        if self.noted or self.pins or self.found.needs_watch() or not all([t.is_leaf for t in self.captured]):
            return False
        return self.world is not None and self.world.holds()  # a call may fill its modules' slots itself

    def _settle(self) -> tuple[list[tuple[dict[str, Any], str, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Tell the buffers that the call wrote, with a slot or without one, from those that it only read."""
        written, copied = [], []
        for owner, table, name, tensor, copy, before in self.before:
            if not _writes(owner, name, tensor, copy, before):
                self.fixed.append((table, name, tensor, before))
            elif self.found.opaque and self._lent(table, name, tensor):
                copied.append((tensor, copy))
            else:
                written.append((table, name, copy))
        return written, copied

    def _take_back(self) -> None:
        """What the call lent to a slot is no slot of its module, but one of its closure."""
        captured = self.captured
        lent = [(table, name, captured[i]) for table, name, i in self.filled if self._lent(table, name, captured[i])]
        for _, _, tensor in lent:
            if id(tensor) not in self.noted:
                self.noted[id(tensor)] = self.places[id(tensor)]
                self.alive.append(tensor)
        self.filled = [slot for slot in self.filled if not self._lent(*slot[:2], captured[slot[2]])]
        self.fixed = [slot for slot in self.fixed if not self._lent(*slot[:3])]

    def _lent(self, table: dict[str, Any], name: str, tensor: Tensor) -> bool:
        """Whether the call itself put a tensor into a slot and took it out again, as ``functional_call`` does."""
        now = table.get(name)
        return now is not tensor and id(table) not in self.owned and id(now) not in self.made


_WRITES: WeakKeyDictionary[nn.Module, dict[tuple[str, bool], bool]] = WeakKeyDictionary()


def _may_write(owner: nn.Module, name: str) -> bool:
    return _WRITES.get(owner, {}).get((name, owner.training), True)


def _writes(owner: nn.Module, name: str, tensor: Tensor, copy: Tensor, before: int) -> bool:
    """Whether a call writes a buffer; settled by values (if it has any) in a module's first call, then remembered."""
    known = _WRITES.setdefault(owner, {})
    key = name, owner.training
    if key not in known:
        known[key] = version(tensor) != before or tensor.is_meta or not torch.equal(tensor, copy)
    return known[key]


def version(tensor: Tensor) -> int:
    """A tensor's version counter; inference tensors have none and can not change under autograd."""
    return 0 if tensor.is_inference() else tensor._version


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


# ---- watching closures ---------------------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    """Sees every tensor that goes into a torch function; replaces some, reports those it did not expect."""

    def __init__(
        self, given: Iterable[Any], stand_ins: dict[int, Tensor], report: Callable[[Tensor, bool], None]
    ) -> None:
        super().__init__()
        self.level = _torch.level()
        self.inside = {id(leaf) for leaf in given}
        self.born: dict[int, ref[Tensor]] = {}  # what was made inside: its id may be another's when it is gone
        self.stand_ins = stand_ins
        self.placed = {id(tensor): key for key, tensor in stand_ins.items()}  # a slot may hold the stand-in itself
        self.met: set[int] = set()
        self.report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # or every enclosing watch would see what this one asks of a tensor
            args = tuple([self._see(a) for a in args])
            kwargs = {k: self._see(v) for k, v in kwargs.items()} if kwargs else {}
        out = func(*args, **kwargs)
        self._made(out)
        return out

    def _see(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self._see_tensor(item)
        if type(item) in (tuple, list):
            return type(item)(self._see(part) for part in item)
        if type(item) is dict:
            return {k: self._see(part) for k, part in item.items()}
        return item

    def _see_tensor(self, tensor: Tensor) -> Tensor:
        replacement = self.stand_ins.get(id(tensor))
        if replacement is not None:
            self.met.add(id(tensor))
            return replacement
        if id(tensor) in self.placed:
            self.met.add(self.placed[id(tensor)])
        elif not self._is_inside(tensor):
            self._report(tensor)
        return tensor

    def _is_inside(self, tensor: Tensor) -> bool:
        born = self.born.get(id(tensor))
        if born is not None and born() is not tensor:
            self.inside.discard(id(tensor))
        return id(tensor) in self.inside

    def _report(self, tensor: Tensor) -> None:
        """Report what came from outside; a transform that the function itself uses may have wrapped it."""
        own = _torch.below(tensor, self.level)
        if id(own) not in self.inside:
            self.report(own, own is not tensor)

    def see_all(self, items: Iterable[Any]) -> None:
        """See tensors that did not go into a torch function."""
        for item in items:
            self._see(item)

    def _made(self, out: Any) -> None:
        if isinstance(out, Tensor):
            if id(out) not in self.stand_ins:
                self.inside.add(id(out))
                self.born[id(out)] = ref(out)
        elif isinstance(out, (tuple, list)):
            for part in out:
                self._made(part)


_STAND_INS: ContextVar[tuple[dict[int, Tensor], ...]] = ContextVar("stand_ins", default=())


def _hidden(tensor: Tensor) -> ReplayError:
    return ReplayError(
        f"a tensor of shape {tuple(tensor.shape)} of the function's closure goes straight into a torch.func transform",
        expected="tensors that can be replayed: arguments, parameters of modules, or what torch functions are given",
        cure="pass it as an argument, or give the transform tensor.clone()",
    )


def stand_in(tensor: Tensor) -> Tensor:
    """What an enclosing replay has put in the place of a closure's tensor."""
    for table in _STAND_INS.get():
        tensor = table.get(id(tensor), tensor)
    return tensor


# ---- random numbers, autocast, pins ----------------------------------------------------------------------------------


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two states of a generator are the same: ten times faster than as tensors, and not dispatched."""
    return not memcmp(a.data_ptr(), b.data_ptr(), a.nbytes)


_cpu_state = torch.default_generator.get_state
memcmp = (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).memcmp
memcmp.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t


class Streams:
    """The state of the random number generators that a call may draw from."""

    __slots__ = ("cpu", "cuda")

    def __init__(self, devices: Sequence[int]) -> None:
        self.cpu = _cpu_state()
        self.cuda = [(d, torch.cuda.get_rng_state(d)) for d in devices] if devices else ()

    @property
    def nbytes(self) -> int:
        """The memory of the states."""
        return self.cpu.nbytes + sum(state.nbytes for _, state in self.cuda)

    def moved(self) -> bool:
        """Whether anything was drawn since."""
        if not _same(self.cpu, _cpu_state()):
            return True
        return bool(self.cuda) and not all([_same(state, torch.cuda.get_rng_state(d)) for d, state in self.cuda])

    def put(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda:
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers again, and leave the generators as they were: all threads draw from the same."""
        with _DICE:
            now = Streams([device for device, _ in self.cuda])
            self.put()
            try:
                yield
            finally:
                now.put()


_DICE = threading.RLock()


def cuda_devices(tensors: Iterable[Tensor]) -> Sequence[int]:
    """The CUDA devices of tensors: a call draws from their generators as well as from the CPU's."""
    found = [t.get_device() for t in tensors if t.is_cuda]
    return sorted(set(found)) if found and torch.cuda.is_initialized() else ()


def autocast_state() -> tuple[Any, ...]:
    """Whether autocast is on, and its dtype, for every device in use; one object for all calls under the same."""
    if not torch._C._is_any_autocast_enabled():
        return _OFF
    devices = ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",)
    state = tuple([(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices])
    return _STATES.setdefault(state, state)


_STATES: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_OFF = (("cpu", False, None), ("cuda", False, None))


@contextmanager
def autocast(state: tuple[Any, ...]) -> Iterator[None]:
    """Autocast as it was."""
    with ExitStack() as stack:
        for device, enabled, dtype in state:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """As many threads within an operation."""
    now = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(now)


_RUNNING: ContextVar[Running | _Pinned | None] = ContextVar("running", default=None)


def pin(name: str, value: T) -> T:
    """Pin a discrete decision: in forward, keep the value and return it; when the function runs again, return that one.

    A reconstructed input differs from the original by rounding, so a top-k routing, an LSH bucket or an argmax may fall
    the other way when a function runs again in backward. A pinned value can not.

    Args:
        name: A name for error messages, the same in every run of the function.
        value: A tensor (of a dtype without gradients) or any other value.

    Cost:
        The value is kept until backward.

    Raises:
        ReplayError: When the function does not pin the same names in the same order in backward.

    Example:
        >>> import torch
        >>> def route(x):
        ...     chosen = pin("expert", x.argmax(-1))
        ...     return torch.nn.functional.one_hot(chosen, x.shape[-1]) * x
        >>> route(torch.tensor([[1.0, 2.0]]))
        tensor([[0., 2.]])
    """
    running = None if torch.compiler.is_compiling() else _RUNNING.get()
    return value if running is None else running.pin(name, value)


class _Pinned:
    """The values that forward pinned, while the functions run again."""

    def __init__(self, pins: Iterable[tuple[str, Any]]) -> None:
        self.left = iter(pins)

    def pin(self, name: str, value: Any) -> Any:
        recorded, kept = next(self.left, ("nothing more", None))
        if recorded != name:
            raise ReplayError(
                f"pin({name!r}) on replay",
                expected=f"pin({recorded!r})" if kept is not None else recorded,
                cure="pin the same names in the same order in every run of the function",
            )
        return kept


class Kept(NamedTuple):
    """The place of a tensor among those that a stage keeps."""

    place: int


def fetch(leaf: Any, kept: Sequence[Tensor]) -> Any:
    """A kept tensor by its place; anything else is itself."""
    return kept[leaf.place] if isinstance(leaf, Kept) else leaf


def taped(fn: Callable[[Tensor], T], inner: Tensor) -> T:
    """A function of a leaf's view: hooks of modules on their inputs do not run on leaves under `autograd.grad`."""
    return fn(inner.view_as(inner))


# ---- record and replay -------------------------------------------------------------------------------------------


def recorded(
    fn: Callable[[Wire], Any], x: Wire, found: Owners, randomness: bool = True, graph: bool = False
) -> tuple[Any, Recording]:
    """Run ``fn(x)`` once, without gradients, and record what has to be the same when it runs again.

    Args:
        fn: The call.
        x: Its input.
        found: What `owners` found in the functions that ``fn`` calls.
        randomness: Whether to keep a snapshot of the generators when the call draws from them.
        graph: Find out which outputs depend on anything differentiable, by building a graph and dropping it.
    """
    last = found.last.recording
    if last is not None and not last.holds() and not _torch.active():
        found.last.forget()
        last = None
    repeats = last is not None and not graph and not _torch.active() and last.is_under_way()
    scope = Repeat(found, last) if repeats else Scope(found, graph)
    given = [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]
    before = Streams(cuda_devices(given)) if randomness else None
    versions = _versions(given)
    out = _run(scope, fn, x)
    if _versions(given) != versions:
        raise _changed(fn)
    return out, scope.leave(before if before is not None and before.moved() else None)


def repeated(
    fn: Callable[[Tensor], Any], x: Tensor, found: Owners, last: Recording, randomness: bool = True
) -> tuple[Any, Recording | None]:
    """`recorded`, of one function on one tensor, where a recording holds; None stands for that one."""
    before = Streams((x.get_device(),) if x.is_cuda else ()) if randomness else None
    version, running = x._version, Repeat(found, last)
    out = _run(running, fn, x)
    if x._version != version:
        raise _changed(fn)
    drew = before is not None and before.moved()
    if not (drew or running.pins):
        return out, None
    running.returned = fn, kinds(leaves(out))
    return out, running.leave(before if drew else None)


def _run(running: Scope | Repeat, fn: Callable[[Wire], Any], x: Wire) -> Any:
    token = _RUNNING.set(running)
    try:
        return running.run(fn, x)
    except RuntimeError as error:
        if "is being used in an in-place operation" in str(error):
            raise _changed(fn) from error
        raise
    finally:
        _RUNNING.reset(token)


def _changed(fn: Callable[..., Any]) -> ReplayError:
    return ReplayError(
        f"{name_of(fn)} changed its input in place",
        expected="a function that leaves its input alone: backward runs it again",
        cure="use the out-of-place operation, or clone the input first",
    )


Kind: TypeAlias = tuple[torch.Size, torch.dtype]


def returned(fn: Callable[..., Any], out: T) -> T:
    """Note what a function of an op returned, where nothing else would show that it returns something else later."""
    if not torch.compiler.is_compiling() and isinstance(running := _RUNNING.get(), Running):
        running.returned = fn, kinds(leaves(out))
    return out


def kinds(items: Iterable[Any]) -> list[Kind]:
    """The shape and dtype of each differentiable tensor."""
    return [(t.shape, t.dtype) for t in items if is_differentiable(t)]


def tensor_kinds(tensors: Sequence[Tensor]) -> list[Kind]:
    """`kinds` of tensors that are known to be differentiable."""
    return [(t.shape, t.dtype) for t in tensors]


def check_kinds(subject: Callable[[], str], items: Iterable[Any], expected: list[Kind]) -> None:
    """Raise where a function returned something else in backward than forward had."""
    found = kinds(items)
    if found != expected:
        raise _differs(subject(), found, expected)


def _kinds_of(items: Iterable[Any]) -> list[Kind | None]:
    return [(t.shape, t.dtype) if is_differentiable(t) else None for t in items]


def _check_seeds(fn: Callable[..., Any], found: list[Kind | None], seeds: Sequence[Tensor | None]) -> None:
    """Raise where a function returned in backward what the gradient of its output does not fit."""
    given = [None if g is None else (g.shape, g.dtype) for g in seeds]
    if given == found or (len(seeds) == len(found) and all(g in (None, k) for g, k in zip(given, found, strict=True))):
        return
    subject = "the function" if name_of(fn) == "<lambda>" else name_of(fn)
    raise _differs(f"{subject} on replay", [k for k in found if k is not None], kinds(seeds))


def _differs(subject: str, found: list[Kind], expected: list[Kind]) -> ReplayError:
    return ReplayError(
        f"{subject} returned {_shown(found)}",
        expected=f"{_shown(expected)} as in forward",
        cure="the function must be pure; test an op with invfunc.testing.check_laws",
    )


def _shown(found: list[Kind]) -> str:
    return ", ".join(f"{tuple(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in found) or "nothing"


def _quiet(fn: Callable[[Wire], T], x: Wire, found: Owners, scope: Scope) -> T:
    if not found.needs_watch():
        return _torch.with_gradients(False, fn, x)
    with torch.no_grad():
        return _watched(fn, map_wire(_detached, x), found, scope)  # aliases: a closure may hold the input, too


def _graphed(fn: Callable[[Wire], Wire], x: Wire, found: Owners, scope: Scope) -> Wire:
    """Run on detached leaves with gradients on, and drop the graph once it has told which outputs need one."""
    inner = map_wire(lambda leaf: _leaf(leaf, isinstance(leaf, Tensor) and leaf.requires_grad), x)
    scope.began = _torch.graph_position()
    with torch.enable_grad():
        out = _watched(fn, inner, found, scope) if found.needs_watch() else fn(inner)
    flat = [leaf for leaf in leaves(out) if is_differentiable(leaf)]
    scope.dead = tuple(i for i, leaf in enumerate(flat) if not leaf.requires_grad)
    return map_wire(_detached, out)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule) if hasattr(torch, "_dynamo") else False


def _watched(fn: Callable[[Wire], T], x: Wire, found: Owners, scope: Scope) -> T:
    """Run under a `Watch`. A module is watched in its first call only, unless it reads tensors that it does not own."""
    thread = threading.get_ident()

    def entered(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            check_callee(module)
            with torch._C.DisableTorchFunction():  # what `Scope` reads, the function does not
                scope.enter(module)

    handle = register_module_forward_pre_hook(entered) if found.opaque else None
    try:
        with _torch.uncompiled(), Watch(leaves(x), {}, scope.see) as watch:
            out = fn(x)
        watch.see_all(leaves(out))  # a function may return what it closes over
        scope.made = watch.inside
    finally:
        if handle is not None:
            handle.remove()
    if not found.opaque:
        found.learn(foreign=len(scope.noted) > len(found.tensors))
    return out


_HOLE = object()
_SLOTS = threading.RLock()  # a slot that is swapped while another thread reads it would corrupt the module


class Replay(VJP):
    """Runs the functions of a `Recording` again, and gathers the gradients of what they captured.

    Args:
        recording: The recorded call.
        captured: The captured tensors as the level of this backward sees them.
        wanted: Which of them need a gradient.
        kept: The tensors that pins refer to.
        rebuilds: Whether anybody upstream needs the rebuilt input.
        functional: Gradients must be differentiable or belong to a transform: use ``torch.func.vjp``.
        inverse: The op's inverse, and what it has to return.
    """

    def __init__(
        self,
        recording: Recording,
        captured: Sequence[Tensor],
        wanted: Sequence[bool],
        kept: Sequence[Tensor] = (),
        *,
        rebuilds: bool = True,
        functional: bool = False,
        inverse: tuple[Callable[..., Any] | None, list[Kind]] = (None, []),
    ) -> None:
        self.inverse, self.x_kinds = inverse
        self.recording, self.captured, self.wanted, self.kept = recording, captured, wanted, kept
        self.rebuilds, self.functional = rebuilds, functional
        self.gradients: list[Tensor | None] = [None] * len(captured)
        self.places = [i for i, want in enumerate(wanted) if want]
        self.met: set[int] = set()
        self.inside: set[int] = set()
        if not functional and recording.holds() and recording.is_alone_with(captured):
            self.in_place = self.direct = True  # at a glance: rule 7 of NOTE [Replay]
        else:
            self._check()
            self.in_place = self._is_in_place()
            self.direct = self.in_place and not (functional or recording.noted or recording.written or recording.copied)
        self._same = self.direct and self._are_conditions()

    # ---- evaluation ----

    def run(self, fn: Callable[..., Any], x: Wire) -> Wire:
        out = self._evaluate(fn, x, self.captured)
        if fn == self.inverse:
            check_kinds(lambda: f"the inverse of {getattr(fn, '__self__', fn)!r}", leaves(out), self.x_kinds)
        return out

    def __call__(self, fn: Callable[..., Any], x: Wire, needs: Wire | None) -> tuple[Wire, Callable[[Wire], Wire]]:
        needs = map_wire(is_differentiable, x) if needs is None else needs
        if not (self.places or any(leaves(needs))):
            return self.run(fn, x), lambda gy: map_wire(lambda leaf: None, x)
        return (self._functional if self.functional else self._eager)(fn, x, needs)

    def _check_returned(self, fn: Callable[..., Any], outs: Sequence[Any]) -> list[Kind | None]:
        """The kinds of what a function returned, if they are as in forward where that was noted."""
        found = _kinds_of(outs)
        noted = self.recording.returned
        if noted is not None and noted[0] is fn and found != noted[1]:
            check_kinds(lambda: f"{name_of(fn)} on replay", outs, noted[1])
        return found

    def _evaluate(self, fn: Callable[..., Any], x: Wire, captured: Sequence[Tensor]) -> Wire:
        """``fn(*x)`` as it ran in forward; what it returns of its closure is replaced as well."""
        if self._same:
            return spread(fn, x)
        with self._restored(captured, leaves(x)):
            out = spread(fn, x)
        if not self.recording.noted or self.direct:
            return out
        table = {key: captured[i] for key, i in self.recording.noted.items()}
        self.met |= table.keys() & set(map(id, leaves(out)))
        return map_wire(lambda leaf: table.get(id(leaf), leaf), out)

    def _eager(self, fn: Callable[..., Any], x: Wire, needs: Wire) -> tuple[Wire, Callable[[Wire], Wire]]:
        """Autograd on detached leaves: leaner than ``torch.func.vjp``, but not differentiable again."""
        wants = leaves(needs)
        inner = list(map(_leaf, leaves(x), wants))
        captured = self.captured if self.in_place else list(map(_leaf, self.captured, self.wanted))
        out = _torch.with_gradients(True, self._taped, fn, x, inner, wants, captured)
        outs = leaves(out)
        found = self._check_returned(fn, outs)
        edges = [_torch.gradient_edge(o) if _has_graph(o) else None for o in outs]
        sources = [leaf for leaf, want in zip(inner, wants, strict=True) if want]
        sources += [captured[i] for i in self.places]

        def pull(gout: Wire) -> Wire:
            given = leaves(gout)
            _check_seeds(fn, found, given)
            roots = [(e, g) for e, g in zip(edges, given, strict=True) if e is not None and g is not None]
            gradients = iter(_torch.gradients(roots, sources) if roots else [None] * len(sources))
            gx = unflatten(needs, [next(gradients) if want else None for want in wants])
            self._add(gradients)
            return gx

        return map_wire(_detached, out), pull

    def _taped(
        self, fn: Callable[..., Any], x: Wire, inner: list[Any], wants: list[bool], captured: Sequence[Tensor]
    ) -> Wire:
        """Run on leaves, with gradients on; raise where the graph reaches what was not captured."""
        given = unflatten(x, [leaf.view_as(leaf) if want else leaf for leaf, want in zip(inner, wants, strict=True)])
        out = self._evaluate(fn, given, captured)  # views, as in `taped`
        known = [*captured, *inner] if self.recording.opaque else []
        if self.recording.opaque and self._strangers(out, known):
            with self._standing_in({}, captured, leaves(given)):  # tells which leaves the function has made itself
                out = self._evaluate(fn, given, captured)
            self._check_reach(out, known)
        return out

    def _functional(self, fn: Callable[..., Any], x: Wire, needs: Wire) -> tuple[Wire, Callable[[Wire], Wire]]:
        """``torch.func.vjp``: differentiable again, and right under every transform."""
        flat = leaves(x)
        own = [i for i, leaf in enumerate(flat) if is_differentiable(leaf)]
        theirs = self.places
        structure: list[Wire] = []

        def closed(*tensors: Tensor) -> tuple[Tensor, ...]:
            inner, captured = list(flat), list(self.captured)
            for i, t in zip(own, tensors[: len(own)], strict=True):
                inner[i] = t
            for i, t in zip(theirs, tensors[len(own) :], strict=True):
                captured[i] = t
            out = self._evaluate(fn, unflatten(x, inner), captured)
            structure[:] = [map_wire(lambda leaf: _HOLE if is_differentiable(leaf) else leaf, out)]
            return tuple(leaf for leaf in leaves(out) if is_differentiable(leaf))

        outs, vjp, *_ = torch.func.vjp(closed, *[flat[i] for i in own], *[self.captured[i] for i in theirs])
        left = iter(outs)
        out = map_wire(lambda leaf: next(left) if leaf is _HOLE else leaf, structure[0])
        found = self._check_returned(fn, leaves(out))

        def pull(gout: Wire) -> Wire:
            _check_seeds(fn, found, leaves(gout))
            seeds = [g for g, o in zip(leaves(gout), leaves(out), strict=True) if is_differentiable(o)]
            filled = tuple(torch.zeros_like(o) if g is None else g for g, o in zip(seeds, outs, strict=True))
            gradients = iter(vjp(filled))
            gx = map_wire(lambda leaf: next(gradients) if is_differentiable(leaf) else None, x)
            self._add(gradients)
            return gx

        return out, pull

    # ---- gradients of captured tensors ----

    def _add(self, gradients: Iterator[Tensor | None]) -> None:
        for i, gradient in zip(self.places, gradients, strict=True):
            self._add_one(i, gradient)

    def _add_one(self, i: int, gradient: Tensor | None) -> None:
        before = self.gradients[i]
        self.gradients[i] = gradient if before is None else before if gradient is None else before + gradient

    def collect(self, closed: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Gradients that a pullback gave for the tensors in its closure."""
        places = {id(t): i for i, t in enumerate(self.recording.captured)} | self.recording.noted
        places |= {id(t): i for i, t in enumerate(self.captured)}
        given = {places[id(stand_in(t))] if id(stand_in(t)) in places else places.get(id(t)): g for t, g in closed}
        for i, wanted in enumerate(self.wanted):
            if wanted and i in given:
                self._add_one(i, given[i])
            elif wanted:
                raise ReplayError(
                    f"a pullback gave no gradient for a tensor of shape {tuple(self.captured[i].shape)}"
                    " that its op closes over",
                    expected="(x, gx, [(tensor, gradient), ...]) with each of them",
                    cure="return the gradient, or leave the pullback out",
                )

    def finish(self) -> list[Tensor | None]:
        """The gathered gradients, once every captured tensor is known to have been met again."""
        for key, place in self.recording.noted.items():
            if self.wanted[place] and key in self.recording.expected and key not in self.met:
                shape = tuple(self.captured[place].shape)
                raise _rebound(f"the function did not meet again a tensor of shape {shape} that it met in forward")
        return self.gradients

    # ---- the same conditions again ----

    def _check(self) -> None:
        """Raise where a constant has changed since forward: plain autograd would, too."""
        changed = [name for _, name, tensor, before in self.recording.fixed if version(tensor) != before]
        if changed:
            raise ReplayError(
                f"{changed} of a module changed between forward and backward",
                expected="the tensors that forward read",
                cure="run backward before changing them, or clone them in forward",
            )

    def _strangers(self, out: Wire, known: Sequence[Any]) -> list[Tensor]:
        """Leaves that a closure's graph reaches and that are neither captured nor made inside."""
        return graph_leaves([o for o in leaves(out) if _has_graph(o)], {id(t) for t in known} | self.inside)

    def _check_reach(self, out: Wire, known: Sequence[Any]) -> None:
        """Raise where the gradient of a leaf that was not captured would be dropped."""
        for leaf in self._strangers(out, known):
            raise ReplayError(
                f"the function uses a tensor of shape {tuple(leaf.shape)} that was not captured",
                expected="tensors that go through torch functions",
                cure="an autograd.Function hides what it is given: let an nn.Module own the tensor, or make it a leaf",
            )

    def _is_in_place(self) -> bool:
        """Rule 2 and 3 of NOTE [Replay]: the captured tensors are leaves, and where the functions will find them."""
        r = self.recording
        return (
            all([table[name] is self.captured[i] for table, name, i in r.filled])
            and all([table[name] is tensor for table, name, tensor, _ in r.fixed])
            and all([c.is_leaf and not c._backward_hooks for c in self.captured])  # they see the whole gradient, once
            and all([c.requires_grad for c, want in zip(self.captured, self.wanted, strict=True) if want])
        )

    def _are_conditions(self) -> bool:
        """Rules 4 and 6: nothing has to be restored."""
        return self.recording.random is None and not self.recording.pins and self.recording.is_under_way()

    @contextmanager
    def _restored(self, captured: Sequence[Tensor], given: Iterable[Any]) -> Iterator[None]:
        r = self.recording
        with ExitStack() as stack:
            if r.random is not None:
                stack.enter_context(r.random.again())
            if r.autocast != autocast_state():
                stack.enter_context(autocast(r.autocast))
            if r.threads != torch.get_num_threads():
                stack.enter_context(threads(r.threads))
            if r.pins:
                token = _RUNNING.set(_Pinned([(name, fetch(value, self.kept)) for name, value in r.pins]))
                stack.callback(_RUNNING.reset, token)
            if not self.direct:
                stack.enter_context(self._replaced(captured, given))
            yield

    @contextmanager
    def _replaced(self, captured: Sequence[Tensor], given: Iterable[Any]) -> Iterator[None]:
        """Put captured tensors, constants and copies of written buffers where the functions will read them."""
        r = self.recording
        contents = [(table, name, captured[i]) for table, name, i in r.filled]
        contents += [(table, name, tensor) for table, name, tensor, _ in r.fixed]
        contents += [(table, name, copy.clone()) for table, name, copy in r.written]
        contents = [(table, name, tensor) for table, name, tensor in contents if table[name] is not tensor]
        with ExitStack() as stack:
            if contents:
                stack.enter_context(_swapped(contents))
            if r.noted or r.copied:
                table = {key: captured[i] for key, i in r.noted.items()}
                table |= {id(tensor): copy.clone() for tensor, copy in r.copied}
                stack.enter_context(self._standing_in(table, captured, given))
            yield

    @contextmanager
    def _standing_in(
        self, table: dict[int, Tensor], captured: Sequence[Tensor], given: Iterable[Any]
    ) -> Iterator[None]:
        token = _STAND_INS.set((table, *_STAND_INS.get()))
        try:
            with _torch.uncompiled(), Watch([*given, *captured], table, _unexpected) as watch:
                yield
            self.met |= watch.met
            self.inside |= watch.inside
        finally:
            _STAND_INS.reset(token)


def _unexpected(tensor: Tensor, wrapped: bool) -> None:
    if tensor.requires_grad and tensor.is_leaf and not _torch.is_wrapped(tensor):
        raise _rebound(f"the function met a tensor of shape {tuple(tensor.shape)} that it did not meet in forward")


def _rebound(subject: str) -> ReplayError:
    return ReplayError(
        subject,
        expected="the tensors that it closed over in forward",
        cure="do not rebind what a function closes over between forward and backward; under functional_call, let the "
        "function call the module instead of reading its weights",
    )


@contextmanager
def _swapped(contents: Sequence[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
    with _SLOTS:
        held = [(table, name, table[name]) for table, name, _ in contents]
        for table, name, tensor in contents:
            table[name] = tensor
        try:
            yield
        finally:
            for table, name, tensor in held:
                table[name] = tensor


def _leaf(leaf: Any, need: bool) -> Any:
    if need:
        return leaf.detach().requires_grad_()
    return leaf.detach() if is_differentiable(leaf) else leaf


def _has_graph(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad
