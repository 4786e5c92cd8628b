"""One call of an op: the hooks below which it runs, and what is known of it; rule 1 of NOTE [Trunk]."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from textwrap import shorten
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from .. import _torch
from ..core.op import Invertible, Residue, name_of
from ..errors import ReplayError, place_error
from ..wires import Wire, without_shape
from .buffers import BufferCopy, copies_of, worth_keeping
from .conditions import PINS, Conditions, Recorder
from .interface import Options, Path, places_on
from .keep import Around
from .parts import Parts, is_lazy, version, versions_of
from .random_numbers import RandomState, random_state
from .sharding import check_callees, checking_calls, is_any_sharded

Kind: TypeAlias = tuple[torch.Size, torch.dtype]
Held: TypeAlias = tuple[Tensor, int]  # and its version when it was saved
T = TypeVar("T")


# ---- what is known of a call ----


class Record:
    """What it takes to evaluate a call again: rule 6 of NOTE [Trunk]."""

    __slots__ = (
        "around", "cache", "conditions", "copies", "evaluated", "frame", "functions", "has_own_conditions",
        "is_checked", "kept", "kinds", "leaves", "like", "op", "path", "pins", "random", "residue", "stops", "stored",
    )  # fmt: skip

    def __init__(self, op: Invertible | None, path: Path, options: Options) -> None:
        self.op, self.path = op, path
        self.is_checked = options.determinism_check == "default"  # whether what is saved again is compared with `kinds`
        self.stops = _torch.stops_early(options.early_stop)  # whether a replay ends with the last that was saved
        debug = _torch.debugs(options.debug)
        has_around = options.keep is not None or options.context_fn is not None or debug
        self.around = Around(options.keep, options.context_fn, debug) if has_around else None
        self.kinds: list[Kind] = []  # of what was packed as a number
        self.evaluated = 0  # how many of them when the op's function returned, and the op went on
        self.leaves: list[Tensor] = []  # what was packed as itself
        self.like: Wire = None
        self.residue: Residue = None
        self.kept: Kept | None = None  # the residue's tensors, where hooks around the pipeline take them
        self.pins: list[tuple[str, Any]] = []
        self.random: RandomState | None = None
        self.stored: Kept | None = None  # the input of a call that can not run again
        self.cache: dict[Any, Any] | None = None  # weights that the caller has cached
        self.conditions: Conditions
        self.has_own_conditions = False  # and not those of the pipeline
        self.functions: Iterable[Any] = ()  # those of the user that it calls
        self.copies: list[BufferCopy] = []
        self.frame: Callable[[], Frame | None] = gone  # nobody asks any more when it is gone

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        """``fn(*args)`` under the conditions of the call; those of its pipeline are in force."""
        return self.conditions.run(fn, *args) if self.has_own_conditions else fn(*args)

    def place(self, error: Exception) -> None:
        """Tell an error where in the pipeline it happened."""
        places = places_on(self.path)
        if isinstance(error, ReplayError) and (error.about is not None or not (places or error.path)):
            places, error.about = self._places_of(error.about, places), None
        for place in reversed(places):
            place_error(error, place)

    def _places_of(self, about: Any, places: list[str]) -> list[str]:
        """Where the stage is that finds a tensor, which may be another one; of what is kept beside, the pipeline."""
        root, path = self.op, self.path
        while path is not None:
            path, root, _ = path
        found = list(_places_in(root, about)) if isinstance(about, Tensor) else []
        return found or places or [shorten(repr(root), 80)]


def _places_in(op: Any, tensor: Tensor) -> Iterator[str]:
    """Where in an op the functions are that find a tensor."""
    for index, part in enumerate(getattr(op, "parts", ())):
        if _finds(part.functions, tensor):
            place = op.place(index) if hasattr(op, "place") else ""
            yield from filter(None, [place, *_places_in(part, tensor)])
            return


def _finds(functions: Iterable[Any], tensor: Tensor) -> bool:
    parts = Parts(functions)
    own = [t for m in parts.modules for t in (*m.parameters(), *m.buffers())]
    return any([t is tensor for t in (*parts.tensors, *own)])


def _without_nodes(held: dict[int, Held]) -> dict[int, Held]:
    """Saved tensors that do not keep the graph alive which has saved them; each has the version of its original."""
    return {number: (t if t.is_leaf else t.detach(), version) for number, (t, version) in held.items()}


class Frame:
    """The hooks of one call: what its graph has saved; rule 1 of NOTE [Trunk].

    Args:
        owner: Whom to ask for the tensors again.
        level: Its place there.
        record: What is known of the call.
    """

    __slots__ = ("__weakref__", "held", "level", "owner", "record", "saved")

    def __init__(self, owner: Any, level: int, record: Record) -> None:
        self.owner, self.level, self.record = owner, level, record
        self.held: dict[int, Held] | None = {}  # while the call runs, and for good where it can not run again
        self.saved: dict[int, Any] = {}  # handed over, and not yet unpacked; then weak references
        record.frame = weakref.ref(self)

    def pack(self, tensor: Tensor) -> Any:
        """The hook: a number for a tensor, or the leaf and its version."""
        if tensor.requires_grad and tensor.is_leaf:
            self.record.leaves.append(tensor)
            return tensor, tensor._version, tensor.dtype
        held, kinds = self.held, self.record.kinds
        assert held is not None
        number = len(kinds)
        held[number] = tensor, tensor._version
        try:
            kinds.append((tensor.shape, tensor.dtype))
        except RuntimeError as error:
            raise without_shape() from error
        return [number]  # its node drops it when it is done: what is unpacked lives as long

    def unpack(self, packed: Any) -> Tensor:
        """The hook: the tensor again."""
        if type(packed) is tuple:
            tensor, before, dtype = packed
            if tensor.dtype is not dtype:
                raise self._with_place(was_changed(tensor, f"moved to {shown_dtype(tensor.dtype)}"))
            return self._check_version(tensor, before)
        if len(packed) > 1:
            return packed[1]
        number = packed[0]
        if self.held is not None:
            return self._check_version(*self._find_held(self.held, number))
        tensor = self._take(number)
        while tensor is None:  # again, where another thread has taken what was handed over
            _torch.run_backward(self.owner.rebuild, self)
            tensor = self._take(number)
        if isinstance(tensor, ReplayError):  # the function wrote into what its graph had saved
            raise self._with_place(tensor)
        if torch.compiler.is_compiling() or _torch.keeps_graph():
            self.saved[number] = weakref.ref(tensor)
        else:
            packed.append(tensor)
        return tensor

    def _find_held(self, held: dict[int, Held], number: int) -> Held:
        """What the call has saved, unless its function has returned and a law goes on: see `forward`."""
        if number not in held:
            raise ReplayError(
                f"the law of {self.record.op!r} takes a gradient through what its function has computed",
                expected="a law that computes from the values",
                cure="take that gradient inside of the function, and return it",
            )
        return held[number]

    def _check_version(self, tensor: Tensor, before: int) -> Tensor:
        if tensor._version != before:
            raise self._with_place(was_changed(tensor))
        return tensor

    def _with_place(self, error: ReplayError) -> ReplayError:
        self.record.place(error)
        return error

    def _take(self, number: int) -> Tensor | None:
        tensor = self.saved.pop(number, None)
        return tensor() if type(tensor) is weakref.ref else tensor

    def run(
        self, fn: Callable[..., Any], args: Sequence[Any], functions: Iterable[Any], given: list[Any], rng: bool
    ) -> Any:
        """``fn(*args)``, recorded.

        Args:
            fn: The call.
            args: Its arguments.
            functions: What it calls: its modules are looked for there.
            given: The tensors among the arguments.
            rng: Whether random numbers are replayed.
        """
        record, snapshot, observer = self.record, self.owner.conditions.snapshot, OBSERVER.get()
        self._note_conditions(functions)
        copies = copies_of(functions) if snapshot.has_buffers else ()
        is_first = snapshot.is_lazy and is_lazy(functions)
        before = random_state(given, snapshot, self.owner.random) if rng else None
        first = 0 if observer is None else _torch.graph_position()
        if before is not None:
            fn = before.watch(fn)
        if is_any_sharded():
            check_callees(functions)
            fn = partial(checking_calls, fn)
        out, held = self._record(fn, args, given, copies, before)
        if is_first:
            self.held = _without_nodes(held)  # rule 9 of NOTE [Trunk]
        if record.op is None and held:
            self.owner.watch([tensor for tensor, _ in held.values()])
        if snapshot.has_gradient_hooks:
            self._go_before_gradients(out, given)
        record.copies = [copy for copy in copies if worth_keeping(copy)] if copies else []
        if before is not None:
            self._note_drawn(before)
        if observer is not None:
            observer.append(Observed(record, self.owner, first, _torch.graph_position()))
        return out

    def _note_conditions(self, functions: Iterable[Any]) -> None:
        record, conditions = self.record, self.owner.conditions
        record.conditions, record.functions = conditions.here(), functions
        record.has_own_conditions = record.conditions is not conditions
        record.cache = _torch.parametrized_so_far()

    def _note_drawn(self, before: RandomState) -> None:
        """Keep the random state before the call only if it has drawn; the next call begins where this one ended."""
        self.owner.random = before
        if before.has_moved():
            self.record.random, self.owner.random = before, before.later()

    def _record(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any],
        given: list[Any],
        copies: Iterable[BufferCopy],
        before: RandomState | None,
    ) -> tuple[Any, dict[int, Held]]:
        """``fn(*args)``, and what it has saved; rule 11 of NOTE [Trunk] where it has written into what it was given."""
        versions = versions_of(given)
        token = PINS.set(Recorder(PINS.get(), self.record.pins))
        try:
            out = self._call(fn, args)
            if out is _REFUSED:  # for the first time in this process
                _torch.allow_hooks_below_transforms()
                self._begin_again(copies, before)
                out = self._call(fn, args)
        except RuntimeError as error:
            if any(text in str(error) for text in _IN_PLACE):
                raise changed_input(_name_of_call(self.record)) from error
            raise
        finally:
            PINS.reset(token)
            held, self.held = self.held, None
        if versions_of(given) != versions:
            self._hold_on(held or {})
        return out, held or {}

    def _hold_on(self, held: dict[int, Held]) -> None:
        """Keep what the call has saved, since it can not run again."""
        if self.record.op is not None:  # backward has to run it again, for its input
            raise changed_input(_name_of_call(self.record))
        self.held = _without_nodes(held)
        warnings.warn(
            f"{_name_of_call(self.record)} writes into a tensor that it is given, so that it can not run again: what "
            "it saves is kept until backward; to free it, clone the tensor first",
            stacklevel=2,
        )

    def forward(self, op: Invertible, x: Wire, show: Callable[[Sequence[Tensor]], None] | None) -> tuple[Wire, Residue]:
        """An op's forward; what its function has saved is shown, and let go before memory for the result is taken."""
        t = op.evaluate(x)
        if self.held and not self.record.conditions.snapshot.is_lazy:
            self.record.evaluated = len(self.held)
            if show is not None:
                show([tensor for tensor, _ in self.held.values()])
            self.held.clear()
        return op.forward_by(t, x)

    def _call(self, fn: Callable[..., Any], args: Sequence[Any]) -> Any:
        """``fn(*args)`` below the hooks."""
        _torch.push_hooks(self.pack, self.unpack)
        try:
            if self.record.around is not None:
                with self.record.around.forward():
                    return fn(*args)
            return fn(*args)
        except RuntimeError as error:
            if "support saved tensor hooks" in str(error):
                return _REFUSED
            raise
        finally:
            _torch.pop_hooks()

    def _go_before_gradients(self, out: Any, given: Iterable[Tensor]) -> None:
        """Be rebuilt before the gradients of results go on: rule 10 of NOTE [Trunk]."""
        known = set(map(id, given))
        for leaf in _torch.trees.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None and id(leaf) not in known:
                leaf.grad_fn.register_prehook(self._be_rebuilt)

    def _be_rebuilt(self, gradients: Any) -> None:
        if not self.saved and self.owner.is_above(self):
            _torch.run_backward(self.owner.rebuild, self)

    def _begin_again(self, copies: Iterable[BufferCopy], before: RandomState | None) -> None:
        """As if the call had not been made."""
        self.held = {}
        self.record.kinds.clear()
        self.record.leaves.clear()
        for copy in copies:
            copy.module._buffers[copy.name] = copy.tensor
            copy.tensor.copy_(copy.copy)
        if before is not None:
            before.put()


_IN_PLACE = "is being used in an in-place operation", "is a view and is being modified inplace"  # what torch says
_REFUSED = object()  # a transform of torch.func does not begin below hooks


class Observed(NamedTuple):
    """A recorded call, for those who ask what is kept: see `invfunc.look.saved`."""

    record: Record
    owner: Any
    first: int  # its nodes have sequence numbers from here
    stop: int


OBSERVER: ContextVar[list[Observed] | None] = ContextVar("observer", default=None)


# ---- what forward knew of a tensor ----


_PLAIN = torch.Tensor, torch.nn.Parameter, _torch.FakeTensor


class Like:
    """What forward knew of a tensor that backward rebuilds."""

    __slots__ = ("dtype", "kind", "shape", "stride")

    def __init__(self, tensor: Tensor) -> None:
        self.kind = (1 if tensor.is_leaf else 2) if tensor.requires_grad else 0  # no gradient; a leaf's; a result's
        try:
            self.shape, self.dtype = tensor.shape, tensor.dtype
        except RuntimeError as error:
            raise without_shape() from error
        # A kernel may be chosen by the strides, and with it what is saved. A subclass (a DTensor) lays itself out.
        self.stride = tensor.stride() if _has_storage(tensor) else None


def like_of(leaf: Any) -> Like | None:
    """What forward knows of a tensor; of anything else nothing."""
    return Like(leaf) if isinstance(leaf, Tensor) else None


def lay_out(leaf: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A tensor with other strides."""
    with torch.no_grad():
        once = leaf
        for dim, step in enumerate(stride):
            once = once.narrow(dim, 0, 1) if not step and once.shape[dim] else once  # expanded: all are the same
        out = torch.empty_strided(once.shape, stride, dtype=leaf.dtype, device=leaf.device)
        return out.copy_(once).expand(leaf.shape)


WRITTEN = "modified by an inplace operation"


def was_changed(tensor: Tensor, how: str = WRITTEN, what: str = "a tensor") -> ReplayError:
    """The error of a tensor that was written into after forward, or otherwise changed."""
    return ReplayError(
        f"{what} of shape {tuple(tensor.shape)} that backward needs has been {how}",
        expected="the values that forward read",
        cure="run backward before changing it, or use the out-of-place operation",
    )


def _name_of_call(record: Record) -> str:
    return ", ".join(map(name_of, record.functions)) if record.op is None else name_of(record.op.forward_with_residue)


def changed_input(name: str) -> ReplayError:
    """The error of a function that writes into what it is given."""
    return ReplayError(
        f"{name} changed its input in place",
        expected="a function that leaves its input alone: backward runs it again",
        cure="use the out-of-place operation, or clone the input first",
    )


def shown(kinds: Sequence[Kind | None]) -> str:
    """Shapes and dtypes, as errors show them."""
    given = [kind for kind in kinds if kind is not None]
    return ", ".join(f"{tuple(shape)} {shown_dtype(dtype)}" for shape, dtype in given) or "nothing"


def shown_dtype(dtype: torch.dtype) -> str:
    """A dtype, as errors show it."""
    return str(dtype).removeprefix("torch.")


def gone() -> None:
    """For a reference to nothing."""


# ---- what is kept ----


class Kept:
    """Tensors that are kept for backward as autograd keeps them: below the hooks in force, and with their versions."""

    __slots__ = ("items", "own", "places", "unpack", "versions")

    def __init__(self, items: Sequence[Any]) -> None:
        hooks = _torch.top_hooks()
        self.items, self.unpack = list(items), None if hooks is None else hooks[1]
        self.places = [i for i, item in enumerate(items) if isinstance(item, Tensor)]
        self.own = [self.items[i] for i in self.places]  # what lies in the tensors' memory
        if hooks is not None:
            for i in self.places:
                self.items[i] = hooks[0](items[i].detach())
            # A hook may keep the tensor itself, as save_on_cpu does on the CPU: autograd would not see that it changes.
            self.own = [t for i in self.places for t in _shared(self.items[i], items[i])]
        self.versions = list(map(version, self.own))

    def tensors(self, what: str = "a tensor") -> list[Any]:
        """They, unless one has been written in place; what they are, for the error."""
        for tensor, before in zip(self.own, self.versions, strict=True):
            how = WRITTEN if version(tensor) != before else "emptied" if _is_emptied(tensor) else ""
            if how:
                error = was_changed(tensor, how, what)
                error.about = self
                raise error
        found = list(self.items)
        if self.unpack is not None:
            for i in self.places:
                found[i] = self.unpack(found[i])
        return found


def _shared(packed: Any, tensor: Any) -> list[Tensor]:
    """What a hook has kept of a tensor in the tensor's own memory."""
    if not _has_storage(tensor):
        return []
    kept = filter(_has_storage, _torch.trees.tree_leaves(packed))
    return [leaf for leaf in kept if _torch.storage_of(leaf) == _torch.storage_of(tensor)]


def _is_emptied(tensor: Tensor) -> bool:
    return _has_storage(tensor) and tensor.numel() > 0 and not tensor.untyped_storage().nbytes()


def _has_storage(item: Any) -> bool:
    return type(item) in _PLAIN and item.layout is torch.strided
