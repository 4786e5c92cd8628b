"""Why what backward rebuilt is not what it was: rounding, a wrong inverse, or a function that is not the same twice.

NOTE [Cause] Asked for when the drift meter is about to speak, and not before: the stages above what was rebuilt run
again from there, each twice forward and twice back, and nothing of the size of an activation is kept but a few.

1.  A stage that gives two values for one input is *not the same twice*.
2.  A stage whose inverse does not give its input back is *wrong*, unless rounding explains it: as far as the inverse
    moves when the last bit of the output does. If it has one output for both, it has *lost* what it was given.
3.  Where the whole way, forward and back, gives the input back as badly as backward did, or moves as far when the last
    bits of the output do, it is *rounding*, and the stage is named where the error of the output grows most.
4.  Where what was rebuilt is not finite, or explains nothing, the stages run from values that were there in forward.
    An inverse gives for what is lost a value that it keeps; and what has drifted by more than its size comes back well
    from where it has drifted to.
5.  Where an output that a block behind has rebuilt came back with an error that would grow to this one, it is *theirs*.
6.  Else *a function was another one in forward*, or what it lost is gone. Where what was rebuilt is not finite, though
    all that runs from finite values is, some numbers were *not finite in forward*: an inverse makes NaN of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..core.compare import relative_error
from ..core.op import Residue
from ..wires import Wire, is_differentiable, leaves, unflatten
from .evaluation import evaluate_quietly
from .frame import Record
from .interface import places_on
from .meter import CHECK, CURE, Cause

Visit = Callable[[Record, Wire], Wire]


class Levels(Protocol):
    """The levels of a trunk, as they are run through here."""

    behind: float

    def forth(self, x: Wire, visit: Visit, first: int = 0) -> Wire:
        """``x -> y`` from a level on; every call of an op is visited."""
        ...

    def back(self, y: Wire, visit: Visit, first: int = 0) -> Wire:
        """``y -> x`` down to a level."""
        ...


@dataclass(frozen=True)
class Trip:
    """One stage, forward and back."""

    place: str
    twice: float  # how far apart the two values for one input are
    error: float  # how far its input is from what its inverse gives back
    miss: float  # and how far its output is from that of what its inverse gives back
    growth: float  # how far that moves for an error of the output, as a multiple of it


class Trips:
    """A run through levels; see NOTE [Cause]."""

    def __init__(self) -> None:
        self.trips: list[Trip] = []
        self.residues: list[Residue] = []
        self._left: list[Residue] = []

    def forth(self, stage: Record, x: Wire) -> Wire:
        """``x -> y`` of a stage, which is measured."""
        op = stage.op
        assert op is not None
        y, residue = evaluate_quietly(stage, op.forward_with_residue, x)
        again, _ = evaluate_quietly(stage, op.forward_with_residue, x)
        back, moved = (evaluate_quietly(stage, op.inverse_with_residue, residue, out) for out in (y, _nudge_wire(y)))
        regained, _ = evaluate_quietly(stage, op.forward_with_residue, back)
        place = ": ".join(places_on(stage.path)) or repr(op)
        growth = relative_error(moved, back) / _rounding(y)
        twice, error, miss = (relative_error(a, b) for a, b in ((again, y), (back, x), (regained, y)))
        self.trips.append(Trip(place, twice, error, miss, growth))
        self.residues.append(residue)
        return y

    def back(self, stage: Record, y: Wire) -> Wire:
        """``y -> x`` of a stage."""
        op = stage.op
        assert op is not None
        return evaluate_quietly(stage, op.inverse_with_residue, self._left.pop(), y)

    def all_back(self, levels: Levels, first: int, y: Wire) -> Wire:
        """``y -> x`` of all levels."""
        self._left = list(self.residues)
        return levels.back(y, self.back, first)


def cause_of(levels: Levels, first: int, x: Wire, error: float, was: Sequence[float]) -> Cause:
    """Why backward has rebuilt the input of a level with an error: it is x, and values of it were ``was``."""
    finite = list(filter(math.isfinite, was)) or [0.0]
    there = unflatten(x, [_with_values(leaf, finite) for leaf in leaves(x)])
    starts, error, otherwise = ((x, there), error, _ANOTHER) if error < math.inf else ((there,), 1.0, _NOT_FINITE)
    moved = 0.0
    for start in starts:
        trips = Trips()
        y = levels.forth(start, trips.forth, first)
        fault = _fault(trips.trips, _rounding(x), error)
        if fault is not None:
            return fault
        back, nudged = (trips.all_back(levels, first, out) for out in (y, _nudge_wire(y)))
        moved = relative_error(nudged, back)
        if max(relative_error(back, start), moved) >= error / 30:
            return _grown(trips.trips, moved / _rounding(x))
    return _from_behind(levels.behind, moved / _rounding(x), error) or otherwise


def _grown(trips: Sequence[Trip], growth: float) -> Cause:
    """Rounding, rule 3."""
    widest = max(trips, key=lambda trip: trip.growth)
    if not math.isfinite(widest.growth):  # the next number has no inverse
        return _saturated(widest)
    return Cause(
        f"rounding, which grows about {growth:.0e} times on the way, most at {widest.place}, {widest.growth:.2g} times",
        f"{CURE}; {CHECK}",
    )


def _from_behind(off: float, growth: float, error: float) -> Cause | None:
    """What is off since the output was, rule 5."""
    if off * max(growth, 1) < error / 30:
        return None
    return Cause(
        f"its output came back off by about {off:.0e} from the blocks behind, which free their input: rounding adds up "
        "from block to block, unless one of them has warned of another cause",
        f"let some blocks keep their input, {CURE}; {CHECK}",
    )


_ANOTHER = Cause(
    "the inverses undo what the functions do now: the output came back changed, or a function did something else in "
    "forward, or lost values by saturation",
    "do not change what a function reads before backward, decide what is discrete once (inv.pin), and bound what "
    f"saturates; {CHECK}",
)


_NOT_FINITE = Cause(
    "the inverses undo what is finite: in forward some numbers were not, of which an inverse makes NaN, or a function "
    "did something else",
    "keep what is not finite out of the pipeline (mask its input, not its loss alone), recompute it "
    f"(mode='recompute'), or keep what it misses (inv.exact(op, 'codes')); {CHECK}",
)


def _fault(trips: Sequence[Trip], rounding: float, error: float) -> Cause | None:
    """A stage that is not the same twice, or whose inverse is wrong: rules 1 and 2."""
    for trip in trips:
        if trip.twice > 100 * rounding:
            return Cause(
                f"{trip.place} gave two values for one input",
                "a function must do in backward what it did in forward: draw its random numbers from torch, and let it "
                f"keep nothing between calls; {CHECK}",
            )
    worst = max(trips, key=lambda trip: trip.error)
    if worst.error == math.inf:
        return Cause(
            f"the inverse of {worst.place} gives values that are not finite for what it gave",
            f"mend the inverse or, where the function saturates, bound what it is given; {CHECK}",
        )
    if worst.error > max(min(1000 * rounding, 0.1) * max(worst.growth, 1), 1e-3 * error):
        if worst.miss <= 100 * rounding:  # it has one value for both
            return _saturated(worst)
        return Cause(
            f"the inverse of {worst.place} does not give its input back, off by about {worst.error:.0e}",
            f"mend the inverse; {CHECK}",
        )
    return None


def _saturated(trip: Trip) -> Cause:
    cure = f"keep its input (inv.mark(op, 'store')), or bound what it is given; {CHECK}"
    return Cause(f"{trip.place} has lost values, by saturation or a mask", cure)


def _with_values(leaf: Any, values: Sequence[float]) -> Any:
    """A tensor of the same kind, with these values in turn."""
    if not is_differentiable(leaf):
        return leaf
    places = torch.arange(leaf.numel(), device=leaf.device) % len(values)
    return torch.tensor(values, dtype=leaf.dtype, device=leaf.device)[places].view(leaf.shape)


def _rounding(x: Wire) -> float:
    """The relative rounding of the coarsest dtype on a wire."""
    return max((torch.finfo(leaf.dtype).eps for leaf in leaves(x) if is_differentiable(leaf)), default=0.0)


def _nudge_wire(y: Wire) -> Wire:
    """A wire, each number of which has moved by its rounding, up or down as the golden ratio has it."""
    return unflatten(y, [_nudge(leaf, 0.37 * place) for place, leaf in enumerate(leaves(y))])


def _nudge(leaf: Any, phase: float) -> Any:
    if not is_differentiable(leaf):
        return leaf
    places = torch.arange(leaf.numel(), device=leaf.device, dtype=torch.float64)
    up = (places * 0.6180339887498949 + phase).frac().view(leaf.shape) < 0.5
    return torch.where(up, leaf * (1 + torch.finfo(leaf.dtype).eps), leaf * (1 - torch.finfo(leaf.dtype).eps))
