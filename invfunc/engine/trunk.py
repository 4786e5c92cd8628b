"""The trunk: how a pipeline runs in ordinary autograd, so that its activations are freed and rebuilt in backward.

NOTE [Trunk] Every function runs with gradients on, below saved-tensor hooks that keep nothing. So its graph is the one
of plain autograd: whatever the function closes over, leaves on ``self`` or hands to a hook is connected.

1.  A *frame* is one call of one op. What its graph saves is packed as a number; a leaf that requires grad, alive
    anyway, as itself. While the call runs, what it has saved is held, so that it can take a gradient of its own.
2.  A *trunk* is the frames of a pipeline, one level each, and one *state*: a level, and the wire that goes into it. The
    first number that is unpacked in the frame of a level *rebuilds* the state down to it. For a coupling ``t = f(x2)``
    is evaluated again, which hands the saved tensors over, and ``x1 = y1 - t``: each function runs exactly twice.
3.  A level that nobody unpacks is undone only if a level below it is asked for. A saved tensor is handed over once and
    let go at once; if it is asked for again, its level runs again from the state.
4.  The trunk is closed by the *tail*, an autograd Function. It owns the `Output`, the only activation that is kept, and
    hands it to the trunk as the state in every backward. A gradient that enters the trunk elsewhere (a side output, a
    second derivative) finds the output through the trunk, which inherits it when the tail dies. Nothing in a trunk
    refers to a node: a cycle through C++ would never be collected.
5.  ``recompute`` is a `Region`: one frame whose state is the stored input. Evaluation stops as soon as the last tensor
    has been handed over.
6.  Evaluation again happens under the conditions of forward (NOTE [Conditions]), on what its modules were
    (NOTE [Snapshot]), and is compared with it: how many tensors were saved, their shapes and dtypes, and which leaves.
7.  Double backward is autograd's own: it attaches an unpacked tensor to its place in the graph by itself.
8.  The state is taken by the thread that rebuilds, and put back: two threads do not wait for each other, and one that
    finds nothing starts from the output.
9.  A call that can not run again, since it initialises lazy parameters, holds on to what it has saved, and its input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _torch
from ..core.op import Again, Invertible, Residue, name_of
from ..errors import ReplayError, place_error
from ..wires import Wire, is_differentiable, leaves, map_wire, spread, unflatten
from .conditions import PINS, Conditions, Pinned, RandomState, Recorder, accelerators
from .interface import Engine, Options, Path, Place, Run, places_on
from .meter import Probe, probe
from .sharding import check_callees, checking_calls, is_any_sharded
from .snapshot import BufferCopy, Parts, Snapshot, copies_of, version, worth_keeping

Kind: TypeAlias = tuple[torch.Size, torch.dtype]

# ---- one call -------------------------------------------------------------------------------------------------------


class Record:
    """What it takes to evaluate a call again: rule 6 of NOTE [Trunk]."""

    __slots__ = (
        "cache", "conditions", "copies", "frame", "is_checked", "kept", "kinds", "leaves", "like", "op", "path", "pins",
        "random", "residue", "stored",
    )  # fmt: skip

    def __init__(self, op: Invertible | None, path: Path) -> None:
        self.op, self.path = op, path
        self.is_checked = True  # whether what is saved again is compared with `kinds`
        self.kinds: list[Kind] = []  # of what was packed as a number
        self.leaves: list[Tensor] = []  # what was packed as itself
        self.like: Wire = None
        self.residue: Residue = None
        self.kept: Kept | None = None  # the residue's tensors, where hooks around the pipeline take them
        self.pins: list[tuple[str, Any]] = []
        self.random: RandomState | None = None
        self.stored: tuple[Wire] | None = None  # the input of a call that can not run again
        self.cache: dict[Any, Any] | None = None  # weights that the caller has cached
        self.conditions: Conditions
        self.copies: list[BufferCopy] = []
        self.frame: Callable[[], Frame | None] = _gone  # nobody asks any more when it is gone

    def place(self, error: Exception) -> None:
        """Tell an error where in the pipeline it happened."""
        for place in reversed(places_on(self.path)):
            place_error(error, place)

    # ---- as a level of a trunk ----

    def undo(self, y: Wire, is_asked: bool) -> Wire:
        """``y -> x``; if it is asked for, its frame gets the tensors that it has saved."""
        op, again = self.op, None
        assert op is not None
        if self.stored is not None:
            return self.stored[0]
        try:
            again = Evaluation(self)
            if is_asked and self.kinds:
                x = op.rebuild(self._residue(), y, again)
                again.finish()
            else:
                x = op.inverse_with_residue(self._residue(), y)
                again.abandon()
            self._check_wire(x, self.like)
            return x
        except BaseException as error:
            if again is not None:
                again.abandon()
            if isinstance(error, Exception):
                self.place(error)
            raise

    def keep_residue(self, residue: Residue) -> None:
        """Keep what the inverse needs: as autograd keeps what it saves, so that a region around it keeps nothing."""
        self.residue = _detached(residue)
        if residue is not None and _torch.top_hooks() is not None:
            self.kept = Kept(leaves(self.residue))
            self.residue = map_wire(_nothing, self.residue)

    def _residue(self) -> Residue:
        return self.residue if self.kept is None else unflatten(self.residue, self.kept.tensors())

    def _check_wire(self, x: Wire, like: Wire) -> None:
        if type(like) is tuple:
            if type(x) is not tuple or len(x) != len(like):
                raise _rebuilt_otherwise(self.op, leaves(x), leaves(like))
            for part, part_like in zip(x, like, strict=True):
                self._check_wire(part, part_like)
        else:
            self._check(x, like)

    def _check(self, leaf: Any, like: Like | None) -> None:
        if like is not None and (not isinstance(leaf, Tensor) or leaf.shape != like.shape or leaf.dtype != like.dtype):
            raise _rebuilt_otherwise(self.op, leaves(leaf), [like])

    def hand_over(self, x: Wire) -> None:
        """Its frame gets the tensors that it has saved, from its input."""
        op = self.op
        assert op is not None
        evaluate_again(self, lambda again: again.hand_over(op.forward_with_residue, x, self.like))

    def has_saved(self) -> bool:
        """Whether its graph will ask for anything."""
        return bool(self.kinds)

    def let_go(self) -> None:
        """Let go of what was handed over, and nobody has asked for."""
        frame = self.frame()
        if frame is not None and frame.saved:
            frame.saved = {}


def _rebuilt_otherwise(op: Invertible | None, found: Sequence[Any], expected: Sequence[Any]) -> ReplayError:
    given, wanted = ([(t.shape, t.dtype) for t in ts if isinstance(t, (Tensor, Like))] for ts in (found, expected))
    return ReplayError(
        f"the inverse of {op!r} returned {_shown(given)}",
        expected=f"{_shown(wanted)} as in forward",
        cure="the function must be pure; test an op with invfunc.testing.check_laws",
    )


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
        self.held: dict[int, Tensor] | None = {}  # while the call runs, and for good where it can not run again
        self.saved: dict[int, Any] = {}  # handed over, and not yet unpacked; then weak references
        record.frame = weakref.ref(self)

    def pack(self, tensor: Tensor) -> Any:
        """The hook: a number for a tensor, or the leaf and its version."""
        if tensor.requires_grad and tensor.is_leaf:
            self.record.leaves.append(tensor)
            return tensor, tensor._version
        held, kinds = self.held, self.record.kinds
        assert held is not None
        number = len(kinds)
        held[number] = tensor
        kinds.append((tensor.shape, tensor.dtype))
        return number

    def unpack(self, packed: Any) -> Tensor:
        """The hook: the tensor again."""
        if type(packed) is tuple:
            tensor, before = packed
            if tensor._version != before:
                error = _was_changed(tensor)
                self.record.place(error)
                raise error
            return tensor
        if self.held is not None:
            return self.held[packed]
        tensor = self._take(packed)
        while tensor is None:  # again, where another thread has taken what was handed over
            _torch.run_backward(self.owner.rebuild, self)
            tensor = self._take(packed)
        if isinstance(tensor, ReplayError):  # the function wrote into what its graph had saved
            self.record.place(tensor)
            raise tensor
        self.saved[packed] = weakref.ref(tensor)
        return tensor

    def _take(self, packed: int) -> Tensor | None:
        tensor = self.saved.pop(packed, None)
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
        record, snapshot = self.record, self.owner.conditions.snapshot
        record.conditions = self.owner.conditions
        copies = copies_of(functions) if snapshot.has_buffers else ()
        is_lazy = snapshot.is_lazy and any(["_initialize_hook" in m.__dict__ for m in Parts(functions).modules])
        if is_any_sharded():
            check_callees(functions)
        before = None
        if rng:
            before = self.owner.random or _random_state(given, snapshot)
        versions = [t._version for t in given]
        record.cache = _torch.parametrized_so_far()
        observer = OBSERVER.get()
        first = _torch.graph_position() if observer is not None else 0
        token = PINS.set(Recorder(PINS.get(), record.pins))
        try:
            out = self._call(fn, args)
            if out is _REFUSED:  # for the first time in this process
                _torch.allow_hooks_below_transforms()
                self._begin_again(copies, before)
                out = self._call(fn, args)
        except RuntimeError as error:
            if any(text in str(error) for text in _IN_PLACE):
                raise changed_input(fn if record.op is None else record.op.forward_with_residue) from error
            raise
        finally:
            PINS.reset(token)
            held, self.held = self.held, None
        if [t._version for t in given] != versions:
            raise changed_input(fn if record.op is None else record.op.forward_with_residue)
        if is_lazy:
            self.held = held  # rule 9
        if copies:
            record.copies = [copy for copy in copies if worth_keeping(copy)]
        if before is not None:
            self.owner.random = before
            if before.has_moved():
                record.random, self.owner.random = before, before.later()
        if observer is not None:
            observer.append(Observed(record, self.owner, first, _torch.graph_position()))
        return out

    def forward(self, op: Invertible, x: Wire) -> tuple[Wire, Residue]:
        """An op's forward; what its function has saved is let go before memory for the result is taken."""
        t = op.evaluate(x)
        if self.held and not self.record.conditions.snapshot.is_lazy:
            self.held.clear()
        return op.forward_by(t, x)

    def _call(self, fn: Callable[..., Any], args: Sequence[Any]) -> Any:
        """``fn(*args)`` below the hooks."""
        _torch.push_hooks(self.pack, self.unpack)
        try:
            return checking_calls(fn, *args) if is_any_sharded() else fn(*args)
        except RuntimeError as error:
            if "support saved tensor hooks" in str(error):
                return _REFUSED
            raise
        finally:
            _torch.pop_hooks()

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


def _random_state(given: list[Tensor], snapshot: Snapshot) -> RandomState:
    if not _torch.has_accelerator():
        return RandomState()
    return RandomState(accelerators([*given, *snapshot.tensors_in_sight()]))


_PLAIN = torch.Tensor, torch.nn.Parameter


class Like:
    """What forward knew of a tensor that backward rebuilds."""

    __slots__ = ("dtype", "kind", "shape", "stride")

    def __init__(self, tensor: Tensor) -> None:
        self.kind = (1 if tensor.is_leaf else 2) if tensor.requires_grad else 0  # no gradient; a leaf's; a result's
        self.shape, self.dtype = tensor.shape, tensor.dtype
        # A kernel may be chosen by the strides, and with it what is saved. A subclass (a DTensor) lays itself out.
        has_strides = tensor.layout is torch.strided and type(tensor) in _PLAIN
        self.stride = tensor.stride() if has_strides else None


def _like(leaf: Any) -> Like | None:
    return Like(leaf) if isinstance(leaf, Tensor) else None


def _laid_out(leaf: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A tensor with other strides."""
    with torch.no_grad():
        once = leaf
        for dim, step in enumerate(stride):
            once = once.narrow(dim, 0, 1) if not step and once.shape[dim] else once  # expanded: all are the same
        out = torch.empty_strided(once.shape, stride, dtype=leaf.dtype, device=leaf.device)
        return out.copy_(once).expand(leaf.shape)


def _was_changed(tensor: Tensor) -> ReplayError:
    return ReplayError(
        f"a tensor of shape {tuple(tensor.shape)} that backward needs has been modified by an inplace operation",
        expected="the values that forward read",
        cure="run backward before changing it, or use the out-of-place operation",
    )


def changed_input(fn: Callable[..., Any]) -> ReplayError:
    """The error of a function that writes into what it is given."""
    return ReplayError(
        f"{name_of(fn)} changed its input in place",
        expected="a function that leaves its input alone: backward runs it again",
        cure="use the out-of-place operation, or clone the input first",
    )


# ---- the call again -------------------------------------------------------------------------------------------------


class _Stop(BaseException):
    """Everything has been handed over."""


class Evaluation(Again):
    """Evaluates the functions of a call again, and hands over what their graphs save; rule 6 of NOTE [Trunk]."""

    __slots__ = (
        "conditions",
        "count",
        "kinds",
        "leaves",
        "like",
        "made",
        "record",
        "roots",
        "stops",
        "versions",
        "was",
    )

    def __init__(self, record: Record) -> None:
        self.record, self.like, self.kinds = record, record.like, record.kinds
        self.count = len(record.kinds)
        self.made: list[Any] = []
        self.versions: list[int] = []  # of what was made, when it was saved
        self.leaves, self.stops = 0, False
        self.roots: list[Tensor] = []  # the inputs that are leaves, as in forward
        self.conditions: ExitStack | None = None
        snapshot = record.conditions.snapshot
        self.was = snapshot.look() if snapshot.written else None
        self.rewind()

    # ---- what an op asks for ----

    def quietly(self, fn: Callable[..., Any], *args: Any) -> Any:
        return fn(*args)

    def evaluate(self, fn: Callable[..., Any], x: Wire, like: Wire) -> Any:
        return self._with_graph(fn, x, like, False, spread)

    def hand_over(self, fn: Callable[[Wire], Any], x: Wire, like: Wire) -> None:
        if len(self.made) < self.count:
            self._with_graph(fn, x, like, True, _call)

    def rewind(self) -> None:
        record = self.record
        if self.conditions is not None:
            self.conditions.close()
            self.conditions = None
        PINS.set(Pinned(record.pins) if record.pins else _NO_PINS)
        snapshot, same_cache = record.conditions.snapshot, self._has_same_cache()
        if record.random is not None or record.copies or not (same_cache and snapshot.is_same()):
            self.conditions = ExitStack()
            if not same_cache:
                self.conditions.enter_context(_torch.parametrized_as(record.cache))
            if record.random is not None:
                self.conditions.enter_context(record.random.restored())
            self.conditions.enter_context(snapshot.restored(record.copies))

    # ---- how ----

    def _has_same_cache(self) -> bool:
        return self.record.cache is None and _torch.parametrized_so_far() is None

    def _with_graph(self, fn: Callable[..., Any], x: Wire, like: Wire, stops: bool, call: Callable[..., Any]) -> Any:
        self.stops, self.roots = stops, []
        _torch.set_grad_enabled(True)
        try:
            x = map_wire(self._root, x, like)
            _torch.push_hooks(self.pack, self.unpack)
            try:
                return call(fn, x)
            except _Stop:
                return None
            finally:
                _torch.pop_hooks()
        finally:
            _torch.set_grad_enabled(False)

    def _root(self, leaf: Any, like: Like | None) -> Any:
        """A rebuilt tensor for a graph, as in forward."""
        if like is None:
            return leaf
        kind, stride = like.kind, like.stride
        if stride is not None and leaf.stride() != stride:
            leaf = _laid_out(leaf, stride)
        if not kind:
            return leaf
        root = leaf.detach().requires_grad_()
        if kind == 1:
            self.roots.append(root)
            return root
        return root.view_as(root) if stride is not None else root.clone()  # a result, for trunks inside as well

    def pack(self, tensor: Tensor) -> Any:
        """The hook: what forward packed as a number is collected."""
        if tensor.requires_grad and tensor.is_leaf:
            if not any([root is tensor for root in self.roots]):
                self._check_leaf(tensor)
            return tensor
        made = self.made
        place = len(made)
        if place < self.count and self.record.is_checked and (tensor.shape, tensor.dtype) != self.kinds[place]:
            raise self._saved_otherwise(f"as number {place} {_shown([(tensor.shape, tensor.dtype)])}", place)
        made.append(tensor)
        self.versions.append(tensor._version)
        if self.stops and place + 1 == self.count:
            raise _Stop
        return place

    def unpack(self, packed: Any) -> Tensor:
        """The hook, for a gradient that the function takes itself."""
        return packed if isinstance(packed, Tensor) else self.made[packed]

    def _check_leaf(self, tensor: Tensor) -> None:
        place, self.leaves = self.leaves, self.leaves + 1
        expected = self.record.leaves
        if place < len(expected) and expected[place] is tensor:
            return
        where = _torch.storage_of(tensor)  # a gradient inside of the function unpacks leaves as other objects
        same = [t for t in (*expected, *self.roots) if t is tensor or _torch.storage_of(t) == where]
        if place >= len(expected) or not same:
            raise ReplayError(
                f"the function met a tensor of shape {tuple(tensor.shape)} that it did not meet in forward",
                expected="the tensors that it closed over in forward",
                cure="do not rebind what a function closes over between forward and backward",
            )

    def _saved_otherwise(self, what: str, place: int) -> ReplayError:
        return ReplayError(
            f"the function saved {what} when it ran again",
            expected=f"{_shown([self.kinds[place]])} as in forward" if place < self.count else "no more",
            cure="the function must do the same twice; test an op with invfunc.testing.check_laws",
        )

    def finish(self) -> None:
        """Hand over what was made, and forget it: the graph of this evaluation is not needed."""
        made = self.made
        self.abandon()
        if len(made) != self.count:
            raise ReplayError(
                f"the function saved {len(made)} tensors when it ran again",
                expected=f"{self.count} as in forward",
                cure="the function must do the same twice; test an op with invfunc.testing.check_laws",
            )
        frame = self.record.frame()
        if frame is not None:
            frame.saved = {place: t if t.is_leaf else t.detach() for place, t in enumerate(made)}
            for place, tensor in enumerate(made):
                if tensor._version != self.versions[place]:
                    frame.saved[place] = _was_changed(tensor)

    def abandon(self) -> None:
        """Forget everything."""
        self.made = []
        if self.conditions is not None:
            self.conditions.close()
        if self.was is not None:
            self.record.conditions.snapshot.take_away(self.was)


def _call(fn: Callable[[Wire], Any], x: Wire) -> Any:
    return fn(x)


_NO_PINS = Pinned(())


def _shown(kinds: Sequence[Kind | None]) -> str:
    given = [kind for kind in kinds if kind is not None]
    return ", ".join(f"{tuple(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in given) or "nothing"


def evaluate_again(record: Record, rebuild: Callable[[Again], Any]) -> Any:
    """What ``rebuild(again)`` returns, with gradients off; what it evaluates with gradients is handed over."""
    again = Evaluation(record)
    try:
        out = rebuild(again)
        again.finish()
        return out
    except BaseException:
        again.abandon()
        raise


def evaluate_quietly(record: Record, fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)`` as the call ran, with gradients off."""
    again = Evaluation(record)
    try:
        return again.quietly(fn, *args)
    finally:
        again.abandon()


# ---- what is kept ---------------------------------------------------------------------------------------------------


class Kept:
    """Tensors that are kept for backward as autograd keeps them: below the hooks in force, and with their versions."""

    __slots__ = ("packed", "shape", "unpack", "versions")

    def __init__(self, tensors: Sequence[Any]) -> None:
        hooks = _torch.top_hooks()
        self.unpack = None if hooks is None else hooks[1]
        self.versions = [version(t) if isinstance(t, Tensor) else 0 for t in tensors]
        pack = None if hooks is None else hooks[0]
        self.packed = [pack(t.detach()) if pack is not None and isinstance(t, Tensor) else t for t in tensors]

    def tensors(self) -> list[Any]:
        """They, unless one has been written in place."""
        if self.unpack is not None:
            return [self.unpack(packed) if packed is not None else None for packed in self.packed]
        for tensor, before in zip(self.packed, self.versions, strict=True):
            if isinstance(tensor, Tensor) and version(tensor) != before:
                raise _was_changed(tensor)
        return list(self.packed)


class Output:
    """The output of a trunk, owned by its tail; the trunk inherits it when the tail dies: rule 4 of NOTE [Trunk]."""

    __slots__ = ("__weakref__", "kept", "trunk")

    def __init__(self, trunk: Trunk, ys: Sequence[Any]) -> None:
        self.trunk: Trunk | None = None
        self.kept = Kept(ys)
        self.trunk = trunk
        trunk.output = weakref.ref(self)

    def __del__(self) -> None:
        if self.trunk is not None:
            self.trunk.inherited = self.kept


class Tail(torch.autograd.Function):
    """``(trunk, wire, *ys) -> ys``: owns the output of a trunk, and starts its rebuild in every backward."""

    @staticmethod
    def forward(ctx: Any, trunk: Trunk, places: Sequence[int], rest: list[Any], *ys: Tensor) -> tuple[Tensor, ...]:
        out = tuple([y.detach() for y in ys])
        whole = list(rest)
        for place, tensor in zip(places, out, strict=True):
            whole[place] = tensor.detach()  # itself would refer to its node, and the node to it
        ctx.output = Output(trunk, whole)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx: Any, *gys: Tensor | None) -> tuple[Tensor | None, ...]:
        _torch.run_backward(Tail.start, ctx)
        return (None, None, None, *gys)

    @staticmethod
    def start(ctx: Any) -> None:
        """Start the rebuild."""
        output = ctx.output
        if output is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time (or directly access saved tensors after they have "
                "already been freed). Specify retain_graph=True"
            )
        trunk = output.trunk
        trunk.start(output.kept)
        trunk.levels.is_measured = not torch.is_grad_enabled()
        if not _torch.keeps_graph():
            output.trunk = ctx.output = None


def is_tail(node: Any) -> bool:
    """Whether an autograd node is a `Tail`'s."""
    return _torch.is_node_of(node, Tail)


def kept_by_tail(node: Any) -> list[Tensor]:
    """The tensors that a tail keeps; none once its graph is freed, or of another node."""
    output = getattr(node, "output", None) if is_tail(node) else None
    return [] if output is None else [t for t in output.kept.tensors() if isinstance(t, Tensor)]


# ---- levels ---------------------------------------------------------------------------------------------------------


def _apart(leaf: Any, like: Like | None) -> Any:
    if like is None or like.stride is None or leaf.stride() == like.stride:
        return leaf
    return _laid_out(leaf, like.stride)


class Route:
    """A level that only moves what there is."""

    __slots__ = ("back", "like")

    def __init__(self, back: Callable[[Wire], Wire], like: Wire = None) -> None:
        self.back, self.like = back, like

    def undo(self, y: Wire, is_asked: bool) -> Wire:
        """``y -> x``; what lay in memory of its own does so again, and is let go by itself."""
        x = self.back(y)
        return x if self.like is None else map_wire(_apart, x, self.like)

    def has_saved(self) -> bool:
        """Nothing is saved of what only moves."""
        return False

    def let_go(self) -> None:
        """Nothing was handed over."""


class Fork:
    """A level of trunks side by side, one for each component."""

    __slots__ = ("components",)

    def __init__(self, components: Sequence[Levels]) -> None:
        self.components = components

    def undo(self, y: Wire, is_asked: bool) -> Wire:
        """``y -> x``: every component goes down to where its trunk begins."""
        return tuple([levels.to_bottom(part) for levels, part in zip(self.components, y, strict=True)])

    def has_saved(self) -> bool:
        """Whether any of its trunks has."""
        return any([levels.has_saved() for levels in self.components])

    def let_go(self) -> None:
        """Its trunks let go by themselves."""


class Levels:
    """The levels of a trunk, and the state: how far they have been undone. Refers to neither trunk nor frames."""

    __slots__ = ("is_measured", "items", "probe", "probed", "restore", "state")

    def __init__(self) -> None:
        self.restore: Callable[[Wire], None] | None = None  # told what the trunk begins with, when it is rebuilt
        self.items: list[Any] = []
        self.state: Any = None  # (level, wire), or nothing
        self.probe: Probe | None = None
        self.probed = -1  # the level whose input the meter watches
        self.is_measured = True  # not in a gradient that is differentiated again

    def has_saved(self) -> bool:
        """Whether any level has saved anything."""
        return any([level.has_saved() for level in self.items])

    def tensors_in_sight(self) -> Iterator[Tensor]:
        """The tensors that the calls have found in closures and modules."""
        for level in self.items:
            if isinstance(level, Record):
                yield from level.conditions.snapshot.tensors_in_sight()
                return

    def at(self) -> int:
        """How far the levels have been undone; below all of them where there is no state."""
        return -1 if self.state is None else self.state[0]

    def to_bottom(self, y: Wire) -> Wire:
        """What the trunk begins with, from its output; or from its state, if it has come further."""
        if self.state is None:
            self.state = len(self.items), y
        self.go_down(0)
        (_, wire), self.state = self.state, None  # it is the trunk around this one that has it from here
        return wire

    def go_down(self, to: int) -> None:
        """Undo levels; only the last is asked for what it has saved. Nobody else has the state meanwhile (rule 8)."""
        (at, wire), self.state = self.state or (-1, None), None
        levels = self.items
        while at > to:
            if at < len(levels):
                levels[at].let_go()
            at -= 1
            wire = levels[at].undo(wire, at == to)
            if at == self.probed and self.probe is not None and self.is_measured:
                self.probe.compare([leaf for leaf in leaves(wire) if is_differentiable(leaf)])
        if not at and self.restore is not None:
            self.restore(wire)
        self.state = at, wire


# ---- the trunk ------------------------------------------------------------------------------------------------------


class Trunk:
    """A pipeline's call; see NOTE [Trunk].

    Args:
        conditions: What the pipeline runs under.
        place: Where the trunk begins, for the drift meter.
    """

    __slots__ = (
        "__weakref__", "conditions", "donation", "inherited", "levels", "output", "parent", "place", "random", "spec",
    )  # fmt: skip

    def __init__(self, conditions: Conditions, place: Place) -> None:
        self.conditions, self.place = conditions, place
        self.levels = Levels()
        self.random: RandomState | None = None  # behind the last call
        self.donation: Callable[[], Any] = _gone
        self.output: Callable[[], Output | None] = _gone
        self.inherited: Kept | None = None
        self.spec: Wire = None  # the structure of the output
        self.parent: tuple[Trunk, int, int] | None = None  # the trunk that it is a component of, its level, its place

    # ---- forward ----

    def call(self, op: Invertible, x: Wire, path: Path, options: Options) -> Wire:
        """Run an op on top of the trunk."""
        levels, record = self.levels, Record(op, path)
        record.is_checked = options.determinism_check == "default"
        frame = Frame(self, len(levels.items), record)
        flat = leaves(x)
        record.like = map_wire(_like, x)
        given = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        y, residue = frame.run(frame.forward, (op, x), op.functions, given, options.preserve_rng_state)
        if levels.probed < 0 and options.drift != "off" and record.kinds:
            levels.probed = frame.level
            levels.probe = probe([t for t in given if is_differentiable(t)], options.drift, self.place)
        record.keep_residue(residue)
        if frame.held is not None:  # rule 9 of NOTE [Trunk]
            record.stored = (map_wire(_without_graph, x),)
        levels.items.append(record)
        return y

    def component(self) -> Trunk:
        """A trunk for one component of a wire."""
        return Trunk(self.conditions, self.place)

    def join(self, trunks: Sequence[Trunk]) -> None:
        """Put trunks side by side on top of this one."""
        for place, trunk in enumerate(trunks):
            trunk.parent = self, len(self.levels.items), place
        self.levels.items.append(Fork([trunk.levels for trunk in trunks]))

    def close(self, y: Wire) -> Wire:
        """Close the trunk: what comes out of it can be used like any other tensor."""
        flat = leaves(y)
        places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not (places and (self.levels.has_saved() or self.donation() is not None)):
            return y
        self.spec = map_wire(_nothing, y)
        rest = [None if i in places else leaf for i, leaf in enumerate(flat)]
        out = Tail.apply(self, places, rest, *[flat[i] for i in places])
        for place, tensor in zip(places, out, strict=True):
            flat[place] = tensor
        return unflatten(y, flat)

    # ---- backward ----

    def start(self, kept: Kept) -> None:
        """Begin at the output."""
        self.start_at(unflatten(self.spec, list(map(_without_graph, kept.tensors()))))

    def start_at(self, y: Wire) -> None:
        """Begin at a wire that has the values of the output."""
        self.levels.state = len(self.levels.items), y
        donation = self.donation()
        if donation is not None and donation.empty:
            _torch.at_end_of_backward(self.finish_donation)

    def finish_donation(self) -> None:
        """Rebuild the input for its owner, where backward had no use for it."""
        donation = self.donation()
        if donation is not None and donation.empty:
            self.bottom()

    def rebuild(self, frame: Frame) -> None:
        """Hand a frame its tensors: go down to its level, under the conditions of forward."""
        self.conditions.run(in_backward, self._rebuild, frame)

    def _rebuild(self, frame: Frame) -> None:
        levels = self.levels
        at = levels.at()
        if at == frame.level:  # rule 3: asked for once more
            levels.items[at].hand_over(levels.state[1])
            return
        if at < frame.level:
            self._go_to_top()
        levels.go_down(frame.level)

    def _go_to_top(self) -> None:
        """Begin at the output, wherever that is kept."""
        if self.parent is not None:
            trunk, level, place = self.parent
            self.start_at(trunk.above(level)[place])
            return
        output = self.output()
        kept = self.inherited if output is None else output.kept
        if kept is None:
            raise ReplayError(
                "the graph of this pipeline has been freed",
                expected="one backward for each forward",
                cure="pass retain_graph=True to the backward before this one",
            )
        self.start(kept)

    def above(self, level: int) -> Wire:
        """The wire that comes out of a level: its components' trunks go down from there."""
        if self.levels.at() <= level:
            self._go_to_top()
        self.levels.go_down(level + 1)
        wire = self.levels.state[1]
        fork = self.levels.items[level]
        for levels, part in zip(fork.components, wire, strict=True):
            levels.state = len(levels.items), part
        return wire

    def bottom(self) -> Wire:
        """What the trunk begins with, rebuilt; the state is used up."""
        return self.conditions.run(in_backward, self._bottom)

    def _bottom(self) -> Wire:
        if self.levels.at() < 0:
            self._go_to_top()
        self.levels.go_down(0)
        return self.levels.state[1]


def _nothing(leaf: Any) -> None:
    return None


def _gone() -> None:
    return None


def _detached(residue: Residue) -> Residue:
    if isinstance(residue, (tuple, list)):
        return tuple([_detached(part) for part in residue])
    return residue.detach() if isinstance(residue, Tensor) else residue


def in_backward(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)`` with gradients off, and outside of transforms that backward itself runs under."""
    before = torch.is_grad_enabled()
    _torch.set_grad_enabled(False)
    try:
        if _torch.active():
            with _torch.below_transforms():
                return fn(*args)
        return fn(*args)
    finally:
        _torch.set_grad_enabled(before)


def conditions_of(functions: Iterable[Any]) -> Conditions:
    """What functions run under from here, and the modules that they use."""
    return Conditions(Snapshot(functions))


# ---- a region that runs again from its input ------------------------------------------------------------------------


class Region:
    """One call that runs again from its stored arguments; rule 5 of NOTE [Trunk].

    Args:
        fn: The function, of whatever ``build`` makes of tensors.
        build: The arguments, from the tensors that are stored.
        path: Where in the pipeline it is.
        conditions: What it runs under.
    """

    __slots__ = ("build", "conditions", "fn", "kept", "random", "record")

    def __init__(
        self,
        fn: Callable[..., Any],
        build: Callable[[Sequence[Any]], Sequence[Any]],
        path: Path,
        conditions: Conditions,
    ) -> None:
        self.fn, self.build = fn, build
        self.record, self.conditions = Record(None, path), conditions
        self.random: RandomState | None = None
        self.kept: Kept | None = None

    def run(self, args: Sequence[Any], tensors: Sequence[Any], functions: Iterable[Any], options: Options) -> Any:
        """``fn(*args)``, recorded; the tensors are those among its arguments."""
        rng, self.record.is_checked = options.preserve_rng_state, options.determinism_check == "default"
        frame, kept = Frame(self, 0, self.record), Kept(tensors)
        self.record.like = tuple(map(_like, tensors))
        out = frame.run(self.fn, args, functions, [t for t in tensors if isinstance(t, Tensor)], rng)
        if self.record.kinds:
            self.kept = kept
        return out

    def rebuild(self, frame: Frame) -> None:
        """Hand the frame its tensors: run again."""
        try:
            self.conditions.run(in_backward, self._rebuild)
        except Exception as error:
            self.record.place(error)
            raise

    def _rebuild(self) -> None:
        assert self.kept is not None
        x = tuple(self.kept.tensors())
        evaluate_again(self.record, lambda again: again.hand_over(self._again, x, self.record.like))

    def _again(self, tensors: tuple[Any, ...]) -> Any:
        return self.fn(*self.build(tensors))


class RecordedCall:
    """One call of an op, recorded; run again to see whether it does the same."""

    def __init__(self, op: Invertible, x: Wire) -> None:
        self.op, self.record, self.conditions = op, Record(op, None), conditions_of(op.functions)
        self.record.like = map_wire(_nothing, x)
        self.random: RandomState | None = None
        frame = Frame(self, 0, self.record)
        given = [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]
        with torch.no_grad():
            self.y = frame.run(op.forward, (x,), op.functions, given, True)
        self.conditions.snapshot.note()

    def again(self, x: Wire, with_gradients: bool) -> Wire:
        """The op on another input, as backward evaluates it."""
        return self.conditions.run(in_backward, self._again, x, with_gradients)

    def _again(self, x: Wire, with_gradients: bool) -> Wire:
        return evaluate_quietly(self.record, self._with_graph if with_gradients else self.op.forward, x)

    def _with_graph(self, x: Wire) -> Wire:
        with torch.enable_grad():
            return map_wire(_without_graph, self.op.forward(x))


def _without_graph(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


# ---- the engine of ordinary autograd --------------------------------------------------------------------------------


class OnTrunk:
    """A wire, and the trunk that it came by."""

    __slots__ = ("trunk", "wire")

    def __init__(self, trunk: Trunk, wire: Wire) -> None:
        self.trunk, self.wire = trunk, wire


class Hooked(Engine):
    """Runs pipelines in ordinary autograd."""

    def __init__(self, functions: Iterable[Any]) -> None:
        self.conditions = conditions_of(functions)

    def finish(self) -> None:
        """The pipeline has run: note what its modules are."""
        self.conditions.snapshot.note()

    def begin(self, x: Wire, run: Run, place: Place) -> OnTrunk:
        return OnTrunk(Trunk(self.conditions, place), x)

    def begin_donated(self, donation: Any, x: Wire, run: Run, place: Place) -> OnTrunk:
        """Open a trunk whose input is freed, and rebuilt by the trunk."""
        state = self.begin(x, run, place)
        state.wire = donation.begin()
        donation.join(state.trunk)
        return state

    def close(self, state: OnTrunk) -> Wire:
        return state.trunk.close(state.wire)

    def wire(self, state: OnTrunk) -> Wire:
        return state.wire

    def opens(self, state: OnTrunk) -> bool:
        return not any([isinstance(level, Record) for level in state.trunk.levels.items])

    def with_wire(self, state: OnTrunk, wire: Wire) -> OnTrunk:
        return OnTrunk(state.trunk, wire)

    def call(self, op: Invertible, state: OnTrunk, run: Run) -> OnTrunk:
        return OnTrunk(state.trunk, state.trunk.call(op, state.wire, run.path, run.options))

    def move(self, op: Invertible, state: OnTrunk, run: Run) -> OnTrunk:
        x = state.wire
        y = op.forward(x)
        like = map_wire(_like, x) if isinstance(x, tuple) and not isinstance(y, tuple) else None
        state.trunk.levels.items.append(Route(op.inverse, like))
        return OnTrunk(state.trunk, y)

    def route(self, op: Any, state: OnTrunk) -> OnTrunk:
        y = op.forward_fn(state.wire)
        state.trunk.levels.items.append(Route(op.inverse_fn))
        return OnTrunk(state.trunk, y)

    def fork(self, op: Any, state: OnTrunk, step: Callable[[Invertible, OnTrunk], OnTrunk], run: Run) -> OnTrunk:
        trunk = state.trunk
        ends = op._each(lambda part, x: step(part, OnTrunk(trunk.component(), x)), state.wire)
        trunk.join([end.trunk for end in ends])
        return OnTrunk(trunk, tuple([end.wire for end in ends]))

    def recompute(self, op: Invertible, x: Wire, run: Run, fn: Callable[[Wire], Wire]) -> Wire:
        region = Region(fn, lambda tensors: (unflatten(x_spec, tensors),), run.path, self.conditions)
        x_spec = map_wire(_nothing, x)
        return region.run((x,), leaves(x), op.functions, run.options)
