"""The engine of ordinary autograd: it runs pipelines on trunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from ..core.op import Invertible
from ..wires import Wire, blank, leaves, map_wire, unflatten
from .devices import settle
from .frame import like_of
from .interface import Engine, Place, Run, Whole
from .region import Region, conditions_of
from .trunk import Detour, Levels, Route, Stage, Trunk


class OnTrunk:
    """A wire, and the trunk that it came by; behind a move, its op and what it moved."""

    __slots__ = ("moved", "trunk", "wire")

    def __init__(self, trunk: Trunk, wire: Wire, moved: tuple[Invertible, Wire] | None = None) -> None:
        self.trunk, self.wire, self.moved = trunk, wire, moved


class Hooked(Engine):
    """Runs pipelines in ordinary autograd."""

    def __init__(self, functions: Iterable[Any]) -> None:
        settle()  # here, where an error of another pipeline is not told to be in a stage of this one
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
        return not any([isinstance(level, Stage) for level in state.trunk.levels.items])

    def resume(self, state: OnTrunk) -> None:
        state.trunk.random = None
        self.conditions.is_left = True

    def with_wire(self, state: OnTrunk, wire: Wire) -> OnTrunk:
        self.resume(state)
        return OnTrunk(state.trunk, wire)

    def call(self, op: Invertible, state: OnTrunk, run: Run) -> OnTrunk:
        state.moved = None  # let go of it while the op runs
        return OnTrunk(state.trunk, state.trunk.call(op, state.wire, run.path, run.options))

    def move(self, op: Invertible, state: OnTrunk, run: Run) -> OnTrunk:
        x, moved = state.wire, state.moved
        if op.cancels and moved is not None and moved[0].inverted() == op:  # a split behind a concat gives what it had
            state.trunk.levels.items.pop()
            return OnTrunk(state.trunk, moved[1])
        y = op.forward(x)
        like = map_wire(like_of, x) if isinstance(x, tuple) and not isinstance(y, tuple) else None
        state.trunk.levels.items.append(Route(op, like))
        return OnTrunk(state.trunk, y, (op, x))

    def route(self, op: Any, state: OnTrunk) -> OnTrunk:
        y = op.forward_fn(state.wire)
        state.trunk.levels.items.append(Route(op))
        return OnTrunk(state.trunk, y)

    def fork(self, op: Any, state: OnTrunk, step: Callable[[Invertible, OnTrunk], OnTrunk], run: Run) -> OnTrunk:
        trunk, numbers = state.trunk, count()

        def run_component(part: Invertible, x: Wire) -> tuple[OnTrunk, Levels | Detour]:
            begun, path = trunk.component(), (run.path, op, next(numbers))
            end = step(part, OnTrunk(begun, x))
            levels = end.trunk.levels
            has_left = end.trunk is not begun and begun.levels.is_wanted
            return end, Detour(levels, part, path, x) if has_left else levels

        steps = op._each(run_component, state.wire)
        trunk.join([(end.trunk, component) for end, component in steps])
        return OnTrunk(trunk, tuple([end.wire for end, _ in steps]))

    def recompute(self, op: Invertible, x: Wire, run: Run, fn: Callable[[Wire], Wire]) -> Wire:
        path = (None, Whole(op), 0) if run.path is None else run.path
        region = Region(fn, lambda tensors: (unflatten(x_spec, tensors),), path, self.conditions, run.options)
        x_spec = blank(x)
        return region.run((x,), leaves(x), op.functions)
