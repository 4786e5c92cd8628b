"""The watch: what a function closes over, found while it runs below a `torch.func` transform.

NOTE [Watch] Below a transform saved-tensor hooks are refused, and an autograd Function drops the gradients of what it
hides. So what a function closes over is found in every call, and becomes an explicit input of its node.

1.  *Slots.* Modules are read structurally: their parameters and buffers are captured, and put back into the slots while
    the function runs again (as under ``functional_call``).
2.  *Everything else* is seen by a TorchFunctionMode: an argument of a torch function that requires grad or is wrapped
    by a transform, and was not made inside, is captured; when the function runs again, another is put in its place.
3.  *What can not be replayed raises*: a tensor that goes straight into another transform, one that was not met again.
4.  *The chain rule, once.* Functions run again on detached stand-ins, since one captured tensor may depend on another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .. import _torch
from ..core.op import VJP, name_of
from ..core.precision import narrow
from ..errors import ReplayError
from ..wires import Wire, detach, is_differentiable, leaves, map_wire, spread, unflatten
from .conditions import PINS, Conditions, Pinned, Recorder
from .devices import accelerators
from .frame import changed_input
from .parts import Parts, version
from .random_numbers import RandomState
from .sharding import check_callee
from .strands import fetch
from .turns import turn

T = TypeVar("T")

# ---- slots of modules ------------------------------------------------------------------------------------------------


def slots(module: nn.Module, seen: set[int]) -> list[tuple[nn.Module, dict[str, Any], str, Tensor, bool]]:
    """Every ``(owner, its dict, name, tensor, is buffer)`` below a module, each submodule once."""
    found, todo = [], [module]
    while todo:
        owner = todo.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        attributes = owner.__dict__
        if not isinstance(
            attributes.get("_parameters"), dict
        ):  # of TorchScript, which shows copies: they are read, and not replaced
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


def _counts(value: Any) -> bool:
    """Whether an attribute that a module has not registered is a tensor of its own that needs a gradient."""
    if type(value) is not Tensor:
        return False
    return (value.requires_grad and value.is_leaf) or (_torch.active() and _torch.is_wrapped(value))


# ---- the recording -----------------------------------------------------------------------------------------------


Slot: TypeAlias = tuple[dict[str, Any], str]  # where a module keeps a tensor: a dict of it, and a name


@dataclass(slots=True)
class Recording:
    """What one call of a user's functions saw; see NOTE [Watch]."""

    captured: tuple[Tensor, ...]  # explicit inputs of the node
    filled: tuple[tuple[dict[str, Any], str, int], ...]  # slots that hold captured tensors, and which
    fixed: tuple[tuple[dict[str, Any], str, Tensor, int], ...]  # slots of constants, and their versions
    written: tuple[tuple[dict[str, Any], str, Tensor], ...]  # slots, and what they held before
    noted: dict[int, int]  # id of a tensor in a closure -> its place in captured
    alive: tuple[Tensor, ...]  # keeps the ids in ``noted`` from being reused
    expected: frozenset[int]  # those of ``noted`` that forward was seen to use
    copied: tuple[tuple[Tensor, Tensor], ...]  # written tensors without a slot, and copies
    pins: Sequence[tuple[str, Any]]
    random: RandomState | None
    conditions: Conditions


class Scope:
    """Sees what functions use while they run, and makes a `Recording` of it."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.captured: list[Tensor] = []
        self.places: dict[int, int] = {}  # id of a captured tensor -> its place
        self.filled: list[tuple[dict[str, Any], str, int]] = []
        self.fixed: list[tuple[dict[str, Any], str, Tensor, int]] = []
        self.before: list[tuple[nn.Module, dict[str, Any], str, Tensor, Tensor, int]] = []  # buffers, and copies
        self.noted: dict[int, int] = {}
        self.alive: list[Tensor] = []
        self.expected: set[int] = set()
        self.seen: set[int] = set()
        self.made: set[int] = set()  # ids of tensors that the call has made, as far as it was watched
        for module in parts.roots:
            check_callee(module, module in parts.called)
            self.enter(module)
        self.owned = {id(table) for table, *_ in [*self.filled, *self.fixed]}  # known before the call
        self.owned |= {id(table) for _, table, *_ in self.before}
        for tensor in parts.tensors:
            self.note(tensor)

    def capture(self, tensor: Tensor) -> int:
        """The place of a tensor among the captured ones."""
        place = self.places.get(id(tensor))
        if place is None:
            self.places[id(tensor)] = place = len(self.captured)
            self.captured.append(tensor)
        return place

    def matters(self, tensor: Tensor) -> bool:
        """Whether a tensor has to be an explicit input: it may get a gradient, or belongs to a transform."""
        return tensor.requires_grad or _torch.is_wrapped(tensor)

    def see(self, tensor: Tensor, wrapped: bool) -> None:
        """Capture a tensor that a closure was seen to use: when it runs again, it has to use it again."""
        known = id(tensor) in self.places
        if wrapped:
            if tensor.requires_grad and id(tensor) not in {id(self.captured[i]) for *_, i in self.filled}:
                raise _hidden(tensor)
            return
        if not known or self.parts.is_opaque:  # what a slot holds may come from elsewhere
            self.note(tensor)
        if tensor.requires_grad and id(tensor) in self.noted:
            if not known:
                self.expected.add(id(tensor))
            place = self.noted[id(tensor)]
            self.filled += [(table, name, place) for table, name in self.homes.pop(id(tensor), ())]

    @cached_property
    def homes(self) -> dict[int, list[Slot]]:
        """The slots of nearby modules: where a closure that reads a module's tensor will find it again."""
        found: dict[int, list[Slot]] = {}
        seen: set[int] = set()
        for module in self.parts.nearby:
            for _, table, name, tensor, _ in slots(module, seen):
                found.setdefault(id(tensor), []).append((table, name))
        return found

    def note(self, tensor: Tensor) -> None:
        """Capture a tensor that a closure holds, or what an enclosing replay has put in its place.

        Though a slot hold it, too, and be filled: who reads the closure does not see the slot.
        """
        actual = stand_in(tensor)
        if self.matters(actual) and id(tensor) not in self.noted:
            self.noted[id(tensor)] = self.capture(actual)
            self.alive.append(tensor)

    def enter(self, module: nn.Module) -> None:
        """Read the slots of a module that the call uses."""
        for owner, table, name, tensor, is_buffer in slots(module, self.seen):
            if self.matters(tensor):
                self.filled.append((table, name, self.capture(tensor)))
            elif is_buffer and owner.training:
                self.before.append((owner, table, name, tensor, tensor.clone(), version(tensor)))
            else:
                self.fixed.append((table, name, tensor, version(tensor)))

    def leave(self, pins: Sequence[tuple[str, Any]], random: RandomState | None, conditions: Conditions) -> Recording:
        """What was seen."""
        written, copied = self._settle() if self.before else ((), ())
        self._take_back()
        return Recording(
            tuple(self.captured),
            tuple(self.filled),
            tuple(self.fixed),
            tuple(written),
            self.noted,
            tuple(self.alive),
            frozenset(self.expected),
            tuple(copied),
            pins,
            random,
            conditions,
        )

    def _settle(self) -> tuple[list[tuple[dict[str, Any], str, Tensor]], list[tuple[Tensor, Tensor]]]:
        """Tell the buffers that the call wrote, with a slot or without one, from those that it only read."""
        written, copied = [], []
        for _, table, name, tensor, copy, before in self.before:
            if version(tensor) == before and not tensor.is_meta and torch.equal(tensor, copy):
                self.fixed.append((table, name, tensor, before))
            elif self._lent(table, name, tensor):
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


# ---- watching closures ---------------------------------------------------------------------------------------------


class Watch(TorchFunctionMode):
    """Sees every tensor that goes into a torch function; replaces some, reports those it did not expect."""

    def __init__(
        self, given: Iterable[Any], stand_ins: dict[int, Tensor], report: Callable[[Tensor, bool], None]
    ) -> None:
        super().__init__()
        self.level, self.first = _torch.level(), _torch.graph_position()
        self.inside = {id(leaf) for leaf in given}
        self.born: dict[int, ref[Tensor]] = {}  # what was made inside: its id may be another's when it is gone
        self.stand_ins = stand_ins
        self.placed = {id(tensor): key for key, tensor in stand_ins.items()}  # a slot may hold the stand-in itself
        self.met: set[int] = set()
        self.report = report

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _torch.without_torch_function():  # or every enclosing watch would see what this one asks of a tensor
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
        if id(own) not in self.inside and not self._has_new_node(own):
            self.report(own, own is not tensor)

    def _has_new_node(self, tensor: Tensor) -> bool:
        """Whether a tensor is a result of the call, though no torch function has returned it: a transform has."""
        node = tensor.grad_fn
        if node is None or not _torch.made_since(node, self.first):
            return False
        return not _torch.made_since(node, _torch.graph_position())  # or another thread has made it

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


# ---- what tensors are, and what is kept ------------------------------------------------------------------------------


Kind: TypeAlias = tuple[torch.Size, torch.dtype]


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


def narrowed(found: list[Tensor], expected: list[Kind]) -> list[Tensor]:
    """Tensors that an op has promoted, in the dtypes that they had."""
    if len(found) != len(expected):
        return found
    return [narrow(t, dtype) for t, (_, dtype) in zip(found, expected, strict=True)]


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


# ---- a call, and the call again --------------------------------------------------------------------------------------


def record_call(
    fn: Callable[[Wire], Any], x: Wire, functions: Iterable[Any], rng: bool = True
) -> tuple[Any, Recording]:
    """Run ``fn(x)`` once, without gradients, and record what has to be the same when it runs again.

    Args:
        fn: The call.
        x: Its input.
        functions: The user's functions that it calls.
        rng: Whether random numbers are replayed.
    """
    parts, conditions, recorder = Parts(functions), Conditions(), Recorder(PINS.get(), [])
    scope = Scope(parts)
    given = [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]
    before = RandomState(accelerators([*given, *scope.captured], parts.devices)) if rng else None
    versions = [version(t) for t in given]
    token = PINS.set(recorder)
    try:
        # With gradients on, as in plain autograd; aliases of x, since a closure may hold the input, too.
        call = fn if before is None else before.watch(fn)
        out = map_residue(detach, _watch_call(call, detach(x), scope))
    finally:
        PINS.reset(token)
    if [version(t) for t in given] != versions:
        raise changed_input(name_of(fn))
    drew = before is not None and before.has_moved()
    return out, scope.leave(recorder.pins, before if drew else None, conditions)


def map_residue(fn: Callable[[Any], Any], item: Any) -> Any:
    """`map_wire`, of a wire or of ``(wire, residue)``, in which there may be lists."""
    if isinstance(item, (tuple, list)):
        return type(item)([map_residue(fn, part) for part in item]) if type(item) in (tuple, list) else item
    return fn(item)


def _watch_call(fn: Callable[[Wire], T], x: Wire, scope: Scope) -> T:
    thread = threading.get_ident()

    def enter(module: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            check_callee(module)
            with _torch.without_torch_function():  # what `Scope` reads, the function does not
                scope.enter(module)

    handle = register_module_forward_pre_hook(enter)
    try:
        with _torch.without_compiler(), Watch(leaves(x), {}, scope.see) as watch:
            out = fn(x)
        watch.see_all(leaves(out))  # a function may return what it closes over
        scope.made = watch.inside
    finally:
        handle.remove()
    return out


_HOLE = object()


class Replay(VJP):
    """Runs the functions of a `Recording` again by ``torch.func.vjp``, and gathers the gradients of what they captured.

    Args:
        recording: The recorded call.
        captured: The captured tensors as the level of this backward sees them.
        wanted: Which of them need a gradient.
        kept: The tensors that pins refer to.
        rebuilds: Whether anybody upstream needs the rebuilt input.
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
        inverse: tuple[Callable[..., Any] | None, list[Kind]] = (None, []),
    ) -> None:
        self.inverse, self.x_kinds = inverse
        self.recording, self.captured, self.wanted, self.kept = recording, captured, wanted, kept
        self.rebuilds = rebuilds
        self.gradients: list[Tensor | None] = [None] * len(captured)
        self.places = [i for i, want in enumerate(wanted) if want]
        self.met: set[int] = set()
        self._check()

    # ---- evaluation ----

    def run(self, fn: Callable[..., Any], x: Wire) -> Wire:
        out = self._evaluate(fn, x, self.captured)
        if fn == self.inverse:
            own = narrowed([leaf for leaf in leaves(out) if is_differentiable(leaf)], self.x_kinds)
            check_kinds(lambda: f"the inverse of {getattr(fn, '__self__', fn)!r}", own, self.x_kinds)
            left = iter(own)
            out = map_wire(lambda leaf: next(left) if is_differentiable(leaf) else leaf, out)
        return out

    def _evaluate(self, fn: Callable[..., Any], x: Wire, captured: Sequence[Tensor]) -> Wire:
        """``fn(*x)`` as it ran in forward; what it returns of its closure is replaced as well."""
        return self.recording.conditions.run(self._evaluate_here, fn, x, captured)

    def _evaluate_here(self, fn: Callable[..., Any], x: Wire, captured: Sequence[Tensor]) -> Wire:
        with self._restore(captured, leaves(x)):
            out = spread(fn, x)
        if not self.recording.noted:
            return out
        table = {key: captured[i] for key, i in self.recording.noted.items()}
        self.met |= table.keys() & set(map(id, leaves(out)))
        return map_wire(lambda leaf: table.get(id(leaf), leaf), out)

    def __call__(self, fn: Callable[..., Any], x: Wire, needs: Wire | None) -> tuple[Wire, Callable[[Wire], Wire]]:
        needs = map_wire(is_differentiable, x) if needs is None else needs
        if not (self.places or any(leaves(needs))):
            return self.run(fn, x), lambda gy: map_wire(lambda leaf: None, x)
        flat = leaves(x)
        own = [i for i, leaf in enumerate(flat) if is_differentiable(leaf)]
        theirs = self.places
        structure: list[Wire] = []

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            inner, captured = list(flat), list(self.captured)
            for i, t in zip(own, tensors[: len(own)], strict=True):
                inner[i] = t
            for i, t in zip(theirs, tensors[len(own) :], strict=True):
                captured[i] = t
            out = self._evaluate(fn, unflatten(x, inner), captured)
            structure[:] = [map_wire(lambda leaf: _HOLE if is_differentiable(leaf) else leaf, out)]
            return tuple(leaf for leaf in leaves(out) if is_differentiable(leaf))

        outs, vjp, *_ = torch.func.vjp(call, *[flat[i] for i in own], *[self.captured[i] for i in theirs])
        left = iter(outs)
        out = map_wire(lambda leaf: next(left) if leaf is _HOLE else leaf, structure[0])
        found = _kinds_of(leaves(out))

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

    @contextmanager
    def _restore(self, captured: Sequence[Tensor], given: Iterable[Any]) -> Iterator[None]:
        r = self.recording
        with ExitStack() as stack:
            if r.random is not None:
                stack.enter_context(r.random.restored())
            PINS.set(Pinned([(name, fetch(value, self.kept)) for name, value in r.pins]))
            stack.enter_context(self._replace(captured, given))
            yield

    @contextmanager
    def _replace(self, captured: Sequence[Tensor], given: Iterable[Any]) -> Iterator[None]:
        """Put captured tensors, constants and copies of written buffers where the functions will read them."""
        r = self.recording
        contents = [(table, name, captured[i]) for table, name, i in r.filled]
        contents += [(table, name, tensor) for table, name, tensor, _ in r.fixed]
        contents += [(table, name, copy.clone()) for table, name, copy in r.written]
        contents = [(table, name, tensor) for table, name, tensor in contents if table[name] is not tensor]
        with ExitStack() as stack:
            if contents:
                stack.enter_context(_swap(contents))
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
            with _torch.without_compiler(), Watch([*given, *captured], table, _unexpected) as watch:
                yield
            self.met |= watch.met
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
def _swap(contents: Sequence[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
    with turn({id(table) for table, _, _ in contents}):
        held = [(table, name, table[name]) for table, name, _ in contents]
        for table, name, tensor in contents:
            table[name] = tensor
        try:
            yield
        finally:
            for table, name, tensor in held:
                table[name] = tensor
