"""The trunk: how a pipeline runs in ordinary autograd, so that its activations are freed and rebuilt in backward.

NOTE [Trunk] Every function runs with gradients on, below saved-tensor hooks that keep nothing. So its graph is the one
of plain autograd: whatever the function closes over, leaves on ``self`` or hands to a hook is connected.

1.  A *frame* is one call of one op. What its graph saves is packed as a number; a leaf that requires grad, alive
    anyway, as itself. While its function runs, what it has saved is held, so that it can take a gradient of its own.
2.  A *trunk* is the frames of a pipeline, one level each, and one *state*: a level, and the wire that goes into it. The
    first number that is unpacked in the frame of a level *rebuilds* the state down to it. For a coupling ``t = f(x2)``
    is evaluated again, which hands the saved tensors over, and ``x1 = y1 - t``: each function runs exactly twice.
3.  A level that nobody unpacks is undone only if a level below it is asked for. A saved tensor is handed over once, and
    let go with the node that has it: its packed number holds it until then. Where the graph is retained it is let go at
    once; if it is asked for again, its level runs again from the state.
4.  The trunk is closed by its *tails*, an autograd Function for each tensor: outputs that share no graph are freed one
    by one. They own the `Output`, the only activation that is kept, and hand it to the trunk as the state in every
    backward. A gradient that enters the trunk elsewhere (a side output, a second derivative) finds the output through
    the trunk, which inherits it when the tails die. Nothing in a trunk
    refers to a node: a cycle through C++ would never be collected.
5.  ``recompute`` is a `Region`: one frame whose state is the stored input. Evaluation stops as soon as the last tensor
    has been handed over.
6.  Evaluation again happens under the conditions of forward (NOTE [Conditions]), on what its modules were
    (NOTE [Snapshot]), and is compared with it: how many tensors were saved, their shapes and dtypes, and which leaves.
7.  Double backward is autograd's own: it attaches an unpacked tensor to its place in the graph by itself.
8.  The state is taken by the thread that rebuilds, and put back: two threads do not wait for each other, and one that
    finds nothing starts from the output, which a trunk on several devices therefore keeps as long as its graph.
9.  A call that can not run again, since it initialises lazy parameters, holds on to what it has saved, and its input.
10. A hook on a leaf may write into it when its gradient is there, as optimizers that step in backward do. Where there
    are such hooks, a frame is rebuilt before the gradient of its result goes on.
11. A region that has written into what it was given can not run again either: it holds on to what it has saved, and
    warns. A stage has to: it raises.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..core.op import Invertible, Residue
from ..core.precision import is_wider, narrow
from ..errors import ReplayError, place_error
from ..wires import Wire, blank, detach, is_differentiable, leaves, map_wire, unflatten
from .cause import Visit, cause_of
from .conditions import Conditions
from .evaluation import Evaluation, Stop, evaluate_again, in_backward
from .frame import Frame, Kept, Like, Record, gone, lay_out, like_of, shown
from .interface import Options, Path, Place, places_on, which
from .meter import SAVES, Cause, Drift, Probe, probe, telling
from .random_numbers import RandomState

# ---- the output -----------------------------------------------------------------------------------------------------


class Output:
    """The output of a trunk, owned by its tails; the trunk inherits it when they die: rule 4 of NOTE [Trunk]."""

    __slots__ = ("__weakref__", "is_freed", "kept", "task", "trunk")

    def __init__(self, trunk: Trunk, ys: Sequence[Any]) -> None:
        self.is_freed = True  # whether a backward has freed any of it
        self.trunk, self.kept, self.task = trunk, Kept(ys), -1
        self.is_freed = False
        trunk.output = weakref.ref(self)

    def start(self) -> None:
        """Start the rebuild, with the first of its tails that a backward comes to."""
        task = _torch.graph_task_id()
        if task < 0 or task != self.task:
            self.trunk.start(self.kept)
            self.trunk.levels.is_measured = not torch.is_grad_enabled()
        self.task = task

    def __del__(self) -> None:
        if not self.is_freed:
            self.trunk.inherited = self.kept


class Tail(torch.autograd.Function):
    """``(output, y) -> y``, for each tensor of an output: owns the output, and starts the rebuild in every backward."""

    @staticmethod
    def forward(ctx: Any, output: Output, y: Tensor) -> Tensor:
        ctx.output = output
        ctx.set_materialize_grads(False)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gys: Tensor | None) -> tuple[Tensor | None, ...]:
        _torch.run_backward(Tail.start, ctx)
        return (None, *gys)

    @staticmethod
    def start(ctx: Any) -> None:
        """Start the rebuild."""
        output = ctx.output
        if output is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time (or directly access saved tensors after they have "
                "already been freed). Specify retain_graph=True"
            )
        output.start()
        if not (_torch.keeps_graph() or output.trunk.is_spread(output.kept)):
            ctx.output, output.is_freed = None, True


def is_tail(node: Any) -> bool:
    """Whether an autograd node is a `Tail`'s."""
    return _torch.is_node_of(node, Tail)


def kept_by_tail(node: Any) -> list[Tensor]:
    """The tensors that a tail keeps; none once its graph is freed, or of another node."""
    output = getattr(node, "output", None) if is_tail(node) else None
    return [] if output is None else [t for t in output.kept.tensors() if isinstance(t, Tensor)]


def tell_tail(node: Any, error: float) -> None:
    """Tell the trunk that a tail closes how far off its output is, which another trunk has rebuilt."""
    output = getattr(node, "output", None) if is_tail(node) else None
    if output is not None:
        output.trunk.levels.behind = error


# ---- levels ---------------------------------------------------------------------------------------------------------


class Stage(Record):
    """A level that is the call of an op."""

    __slots__ = ()

    def forth(self, x: Wire, visit: Visit) -> Wire:
        """``x -> y``, once more: for those who ask why x is not what it was."""
        return visit(self, x)

    def back(self, y: Wire, visit: Visit) -> Wire:
        """``y -> x``, likewise."""
        return visit(self, y)

    def undo(self, y: Wire, is_asked: bool, is_last: bool) -> Wire:
        """``y -> x``; if it is asked for, its frame gets the tensors that it has saved.

        Raises:
            Stop: Where it is the last: when they are handed over, though x is not known.
        """
        return self._input() if self.stored is not None else self.run(self._undo, y, is_asked, is_last)

    def _input(self) -> Wire:
        assert self.stored is not None
        try:
            return unflatten(self.like, self.stored.tensors("an input"))
        except ReplayError as error:
            self.place(error)
            raise

    def _undo(self, y: Wire, is_asked: bool, is_last: bool) -> Wire:
        op, again = self.op, None
        assert op is not None
        try:
            again = Evaluation(self)
            again.is_last = is_last
            hands_over = is_asked and self.kinds
            if not hands_over:
                again.count = 0  # functions run with gradients on all the same, as they ran in forward
            x = op.rebuild(self._residue(), y, again)
            (again.finish if hands_over else again.abandon)()
            if _is_alike(x, self.like):
                return x
            self._check_width(x, self.like)
            return map_wire(_narrowed, x, self.like)
        except Stop:
            assert again is not None
            again.finish()
            raise
        except BaseException as error:
            if again is not None:
                again.abandon()
            if isinstance(error, Exception):
                self.place(error)
            raise

    def keep_residue(self, residue: Residue) -> None:
        """Keep what the inverse needs: as autograd keeps what it saves, so that a region around it keeps nothing."""
        own = _detach_residue(residue)
        self.residue, self.kept = blank(own), Kept(leaves(own))

    def _residue(self) -> Residue:
        return self.residue if self.kept is None else unflatten(self.residue, self.kept.tensors())

    def _check_width(self, x: Wire, like: Wire) -> None:
        """Raise unless x is as it was in forward, or the op has made it wider."""
        if type(like) is tuple:
            if type(x) is not tuple or len(x) != len(like):
                raise _rebuilt_otherwise(self.op, leaves(x), leaves(like))
            for part, part_like in zip(x, like, strict=True):
                self._check_width(part, part_like)
        elif not _is_alike(x, like):
            if not (isinstance(x, Tensor) and x.shape == like.shape and is_wider(x.dtype, like.dtype)):
                raise _rebuilt_otherwise(self.op, leaves(x), [like])

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


def _is_alike(x: Wire, like: Wire) -> bool:
    """Whether x has the structure, shapes and dtypes that it had in forward."""
    if type(like) is tuple:
        return type(x) is tuple and len(x) == len(like) and all(map(_is_alike, x, like))
    return like is None or (isinstance(x, Tensor) and x.dtype is like.dtype and x.shape == like.shape)


def _narrowed(leaf: Any, like: Like | None) -> Any:
    return leaf if like is None else narrow(leaf, like.dtype)


def _rebuilt_otherwise(op: Invertible | None, found: Sequence[Any], expected: Sequence[Any]) -> ReplayError:
    given, wanted = ([(t.shape, t.dtype) for t in ts if isinstance(t, (Tensor, Like))] for ts in (found, expected))
    return ReplayError(
        f"the inverse of {op!r} returned {shown(given)}",
        expected=f"{shown(wanted)} as in forward",
        cure="the function must be pure; test an op with invfunc.testing.check_laws",
    )


def _apart(leaf: Any, like: Like | None) -> Any:
    if like is None or like.stride is None or leaf.stride() == like.stride:
        return leaf
    return lay_out(leaf, like.stride)


class Route:
    """A level that only moves what there is."""

    __slots__ = ("like", "op")

    def __init__(self, op: Invertible, like: Wire = None) -> None:
        self.op, self.like = op, like

    def forth(self, x: Wire, visit: Visit) -> Wire:
        """As of a stage."""
        return self.op.forward(x)

    def back(self, y: Wire, visit: Visit) -> Wire:
        """As of a stage."""
        return self.op.inverse(y)

    def undo(self, y: Wire, is_asked: bool, is_last: bool) -> Wire:
        """``y -> x``; what lay in memory of its own does so again, and is let go by itself."""
        x = self.op.inverse(y)
        return x if self.like is None else map_wire(_apart, x, self.like)

    def has_saved(self) -> bool:
        """Nothing is saved of what only moves."""
        return False

    def let_go(self) -> None:
        """Nothing was handed over."""


class Fork:
    """A level of trunks side by side, one for each component."""

    __slots__ = ("components",)

    def __init__(self, components: Sequence[Levels | Detour]) -> None:
        self.components = components

    def forth(self, x: Wire, visit: Visit) -> Wire:
        """As of a stage, for each component."""
        return tuple([component.forth(part, visit) for component, part in zip(self.components, x, strict=True)])

    def back(self, y: Wire, visit: Visit) -> Wire:
        """As of a stage; what was visited last is visited first."""
        parts = zip(reversed(self.components), reversed(y), strict=True)
        return tuple([component.back(part, visit) for component, part in parts][::-1])

    def undo(self, y: Wire, is_asked: bool, is_last: bool) -> Wire:
        """``y -> x``: every component goes down to where its trunk begins."""
        return tuple([component.to_bottom(part) for component, part in zip(self.components, y, strict=True)])

    def has_saved(self) -> bool:
        """Whether any of its trunks has."""
        return any([component.has_saved() for component in self.components])

    def let_go(self) -> None:
        """Its trunks let go by themselves."""


class Detour:
    """A component that leaves the trunk, since a part of it is stored or recomputed, and comes back on another.

    Args:
        levels: Of the trunk that it came back on.
        op: The component's op.
        path: Where it is.
        x: What goes into it, which is kept: the levels below want it, and nothing above can give it.
    """

    __slots__ = ("kept", "levels", "op", "path", "spec")

    def __init__(self, levels: Levels, op: Invertible, path: Path, x: Wire) -> None:
        self.levels, self.op, self.path = levels, op, path
        self.spec, self.kept = blank(x), Kept(leaves(detach(x)))

    def forth(self, x: Wire, visit: Visit) -> Wire:
        """As of a stage; what is inside is not visited."""
        return self.op.forward(x)

    def back(self, y: Wire, visit: Visit) -> Wire:
        """As of a stage, likewise."""
        return self.to_bottom(y)

    def begin_at(self, y: Wire) -> None:
        """Begin at what comes out of it."""
        self.levels.begin_at(y)

    def to_bottom(self, y: Wire) -> Wire:
        """What goes into it."""
        try:
            return unflatten(self.spec, self.kept.tensors("an input"))
        except ReplayError as error:
            for place in reversed(places_on(self.path)):
                place_error(error, place)
            raise

    def has_saved(self) -> bool:
        """Whether what it came back on has saved anything."""
        return self.levels.has_saved()


_NOTHING = (-1, None)


def _compares(level: Any) -> bool:
    return isinstance(level, Stage) and level.op is not None and level.op.compares


class Levels:
    """The levels of a trunk, and the state: how far they have been undone. Refers to neither trunk nor frames."""

    __slots__ = (
        "behind", "is_measured", "is_wanted", "items", "last", "probe", "probed", "restore", "state", "watch",
        "watched",
    )  # fmt: skip

    def __init__(self) -> None:
        self.last = -1  # the level whose input nobody wants; known when a rebuild begins
        self.restore: Callable[[Wire], None] | None = None  # told what the trunk begins with, when it is rebuilt
        self.items: list[Any] = []
        self.state: Any = None  # (level, wire), or nothing
        self.probe: Probe | None = None
        self.probed = -1  # the level whose input the meter watches
        self.watched: int | None = None  # or its output, and this of what its function has saved; -1 for nothing
        self.watch: Probe | None = None  # of that
        self.is_wanted = False  # whether anybody wants the input again
        self.behind = 0.0  # how far off the output came back, where a trunk behind has rebuilt it, if that is known
        self.is_measured = True  # not in a gradient that is differentiated again

    def has_saved(self) -> bool:
        """Whether any level has saved anything."""
        return any(level.has_saved() for level in self.items)

    def tensors_in_sight(self) -> Iterator[Tensor]:
        """The tensors that the calls have found in closures and modules."""
        for level in self.items:
            if isinstance(level, Stage):
                yield from level.conditions.snapshot.tensors_in_sight()
                return

    def forth(self, x: Wire, visit: Visit, first: int = 0) -> Wire:
        """``x -> y`` from a level on, once more; every call of an op is visited."""
        for level in self.items[first:]:
            x = level.forth(x, visit)
        return x

    def back(self, y: Wire, visit: Visit, first: int = 0) -> Wire:
        """``y -> x`` down to a level, likewise."""
        for level in reversed(self.items[first:]):
            y = level.back(y, visit)
        return y

    def place_behind(self, error: Exception) -> None:
        """Tell an error about the output behind which stage that is."""
        stage = next((level for level in reversed(self.items) if isinstance(level, Stage)), None)
        if stage is not None:
            stage.place(error)

    def begin_at(self, y: Wire) -> None:
        """Begin above all levels, at a wire that has the values of what comes out of them."""
        self.state, self.last = (len(self.items), y), self.find_last()

    def at(self) -> int:
        """How far the levels have been undone; below all of them where there is no state."""
        return -1 if self.state is None else self.state[0]

    def to_bottom(self, y: Wire) -> Wire:
        """What the trunk begins with, from its output; or from its state, if it has come further."""
        if self.at() < 0:
            self.begin_at(y)
        self.go_down(0)
        (_, wire), self.state = self.state, None  # it is the trunk around this one that has it from here
        return wire

    def find_last(self) -> int:
        """The level whose input nobody wants: the first that has saved anything, unless it is compared there."""
        first = next((at for at, level in enumerate(self.items) if level.has_saved()), -1)
        if first < 0 or (self.probed == first and self.watched is None) or _compares(self.items[first]):
            return -1
        return -1 if self.is_wanted_by(self.items[:first]) else first

    def is_wanted_by(self, levels: Sequence[Any]) -> bool:
        """Whether anybody wants again what these first levels gave."""
        by_trunk = self.is_wanted or self.restore is not None
        return by_trunk or any([level.has_saved() or _compares(level) for level in levels])

    def go_down(self, to: int) -> None:
        """Undo levels; only the last is asked for what it has saved. Nobody else has the state meanwhile (rule 8)."""
        (at, wire), self.state = self.state or _NOTHING, None  # no name of the state's own, which would hold the wire
        if at < 0:  # another thread has it: who needs something asks anew
            return
        levels, last = self.items, self.last
        while at > to:
            if at < len(levels):
                levels[at].let_go()
            at -= 1
            try:
                wire = levels[at].undo(wire, at == to, at == last)
            except Stop:
                self._compare_last(at, wire)
                return
            if at == self.probed and self.probe is not None and self.is_measured:
                self._compare(self.probe, at, wire)
        if not at and self.restore is not None:
            self.restore(wire)
        self.state = at, wire

    def _compare(self, sampled: Probe, at: int, wire: Wire) -> bool:
        """Compare the input of a level."""
        rebuilt = [leaf for leaf in leaves(wire) if is_differentiable(leaf)]
        ops = (level.op for level in islice(self.items, at, None) if isinstance(level, Stage))
        functions = (fn for op in ops if op is not None for fn in op.functions)
        return sampled.compare(rebuilt, functions, partial(cause_of, self, at, wire))

    def _compare_last(self, at: int, y: Wire) -> None:
        """Compare the output of the last level; if it is as it was, what its function has saved again."""
        if not self.is_measured or (self.probe is not None and self._compare(self.probe, at + 1, y)):
            return
        frame = self.items[at].frame()
        rebuilt = None if frame is None else frame.saved.get(self.watched)
        if self.watch is not None and isinstance(rebuilt, Tensor):
            self.watch.compare([rebuilt], self.items[at].op.functions, partial(self._cause_of_saved, at, y))

    def _cause_of_saved(self, at: int, y: Wire, error: float, was: Sequence[float]) -> Cause:
        return cause_of(self, at, self.items[at].undo(y, False, False), error, was)


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
        self.donation: Callable[[], Any] = gone
        self.output: Callable[[], Output | None] = gone
        self.inherited: Kept | None = None
        self.spec: Wire = None  # the structure of the output
        self.parent: tuple[Trunk, int, int] | None = None  # the trunk that it is a component of, its level, its place

    # ---- forward ----

    def call(self, op: Invertible, x: Wire, path: Path, options: Options) -> Wire:
        """Run an op on top of the trunk."""
        levels, record = self.levels, Stage(op, path, options)
        frame = Frame(self, len(levels.items), record)
        flat = leaves(x)
        record.like = map_wire(like_of, x)
        given = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        is_first = levels.probed < 0 and options.drift != "off"
        show = partial(self._watch, record, options.drift, given) if is_first else None
        y, residue = frame.run(frame.forward, (op, x, show), op.functions, given, options.preserve_rng_state)
        if is_first and record.kinds:
            levels.probed = frame.level
            levels.probe = self._probe(record, options.drift, given, y)
        if residue is not None:
            record.keep_residue(residue)
        if frame.held is not None:  # rule 9 of NOTE [Trunk]
            record.stored = Kept(leaves(detach(x)))
        levels.items.append(record)
        return y

    def _watch(self, record: Stage, drift: Drift, given: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        """Sample what a first function has saved: rule 1 of NOTE [Drift]."""
        levels = self.levels
        if record.stops and not (_compares(record) or levels.is_wanted_by(levels.items)):
            levels.watched = telling(saved, given)
            if levels.watched >= 0:
                levels.watch = probe([saved[levels.watched]], drift, partial(which, SAVES, record.path))

    def _probe(self, record: Stage, drift: Drift, given: Sequence[Tensor], y: Wire) -> Probe | None:
        """Sample the input of a first stage, or its output: likewise."""
        levels = self.levels
        if levels.watched is None or record.evaluated < len(record.kinds):
            levels.watched = levels.watch = None
            return probe([t for t in given if is_differentiable(t)], drift, self.place)
        return probe([t for t in leaves(y) if is_differentiable(t)], drift, partial(which, "gives", record.path))

    def component(self) -> Trunk:
        """A trunk for one component of a wire: what it begins with is wanted by the levels below."""
        component, levels = Trunk(self.conditions, self.place), self.levels
        component.levels.is_wanted = levels.is_wanted_by(levels.items)
        return component

    def join(self, ends: Sequence[tuple[Trunk, Levels | Detour]]) -> None:
        """Put trunks side by side on top of this one, each with what this one goes down by."""
        for place, (trunk, _) in enumerate(ends):
            trunk.parent = self, len(self.levels.items), place
        self.levels.items.append(Fork([component for _, component in ends]))
        self.random = None  # they may have drawn

    def close(self, y: Wire) -> Wire:
        """Close the trunk: what comes out of it can be used like any other tensor."""
        flat = leaves(y)
        places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not (places and (self.levels.has_saved() or self.donation() is not None)):
            return y
        self.spec = blank(y)
        # Not the outputs themselves: they would refer to their nodes, and the nodes to them.
        output = Output(self, [leaf.detach() if i in places else leaf for i, leaf in enumerate(flat)])
        for i in places:
            flat[i] = Tail.apply(output, flat[i])
        return unflatten(y, flat)

    # ---- backward ----

    def start(self, kept: Kept) -> None:
        """Begin at the output."""
        try:
            ys = kept.tensors("an output")
        except ReplayError as error:
            self.levels.place_behind(error)
            raise
        self.start_at(unflatten(self.spec, list(map(detach, ys))))

    def start_at(self, y: Wire) -> None:
        """Begin at a wire that has the values of the output."""
        self.levels.begin_at(y)
        donation = self.donation()
        if donation is not None and donation.empty:
            _torch.at_end_of_backward(donation.reminder(self))

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

    def is_above(self, frame: Frame) -> bool:
        """Whether the state has not come down to a frame, and somebody needs it to."""
        levels = self.levels
        has_to_come = levels.at() < 0 or levels.at() > frame.level
        return has_to_come and frame.level >= levels.find_last() and self._has_saved()

    def _has_saved(self) -> bool:
        """Whether anything was saved on the whole way, so that there is an output to begin at."""
        return self.levels.has_saved() if self.parent is None else self.parent[0]._has_saved()

    def is_spread(self, kept: Kept) -> bool:
        """Whether its gradients come by several threads, of which any may have to begin at the output (rule 8)."""
        if not _torch.has_accelerator():
            return False
        return len({t.device for t in (*kept.own, *self.conditions.snapshot.tensors_in_sight())}) > 1

    def _go_to_top(self) -> None:
        """Begin at the output, wherever that is kept."""
        if self.parent is not None:
            trunk, level, place = self.parent
            self.start_at(trunk.above(level)[place])
            return
        output = self.output()
        kept = self.inherited if output is None else output.kept
        if self.output is gone:
            raise ReplayError(
                "this pipeline was left before its end",
                expected="all of its stages to run before backward",
                cure="run the blocks up to the last, whatever the loss is taken from",
            )
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
        for component, part in zip(fork.components, wire, strict=True):
            component.begin_at(part)
        return wire

    def bottom(self) -> Wire:
        """What the trunk begins with, rebuilt; the state is used up."""
        return self.conditions.run(in_backward, self._bottom)

    def _bottom(self) -> Wire:
        if self.levels.at() < 0:
            self._go_to_top()
        self.levels.go_down(0)
        return self.levels.state[1]


def _detach_residue(residue: Residue) -> Residue:
    if isinstance(residue, (tuple, list)):
        return tuple([_detach_residue(part) for part in residue])
    return residue.detach() if isinstance(residue, Tensor) else residue
