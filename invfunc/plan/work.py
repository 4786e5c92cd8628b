"""Work: what an op asks of a machine, counted and not timed; and seconds that are read against it.

Rule 6 of NOTE [Profile].
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

Seconds = dict[str, float]


class Work(NamedTuple):
    """Calls of kernels, floating point operations, and bytes that are read and written."""

    calls: float = 0
    flops: float = 0
    traffic: float = 0

    def plus(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def beyond(self, other: Work) -> Work:
        """What it is more than another."""
        return Work(*(max(a - b, 0) for a, b in zip(self, other, strict=True)))

    def seconds(self, rates: Rates) -> float:
        """How long it takes at these rates."""
        return self.calls * rates.call + self.flops / rates.flops + self.traffic / rates.traffic


class Rates(NamedTuple):
    """Seconds of a call; operations and bytes in a second. What counts is how they stand to each other."""

    call: float
    flops: float
    traffic: float
    moment: float = 50e-6  # seconds that are not told from noise


# Where processes share the CPU, they take turns of milliseconds, and find its caches full of what others left there.
CPU, ACCELERATOR = Rates(10e-6, 150e9, 30e9, 2e-3), Rates(5e-6, 60e12, 3e12)
CONVOLUTION = 10  # calls that one of them takes as long as: it chooses among kernels, and lays out its tensors anew
KEEPING = 7  # calls for each operator of an op, to see in both passes which results are kept


class Python(NamedTuple):
    """What Python takes to run a plan, in calls of kernels: so it is nearly the same on any machine.

    Attributes:
        enter: Of a step that does more than store.
        each: Of each op of such a step.
        region: To begin a region, and to call it up again.
        within: Of each op of a region, to run it once more.
        opens: To begin a run of inverses.
        level: To undo an op.
    """

    enter: float = 0.0
    each: float = 0.0
    region: float = 0.0
    within: float = 0.0
    opens: float = 0.0
    level: float = 0.0

    def seconds(self, call: float) -> Seconds:
        """What is added to each way of an op, where a call takes so long."""
        found = {"again": self.region + self.within, "undone": self.level, "within": self.within, "opens": self.opens}
        return {way: calls * call for way, calls in found.items()}

    def of_step(self, ops: int, call: float) -> float:
        """Seconds of a step of so many ops, beside those of its ops."""
        return (self.enter + self.each * ops) * call


Counts = Mapping[str, Work]  # of each way that an op has
SPARED = "spared again", "spared undone", "spared first"  # where results are kept
PARTS = "forward", "ends", "begins", *SPARED  # which are no ways of their own

TICK = 0.02  # of a plain step: what is not told from noise, and decides little
FACTOR = 3.0  # how far seconds may be from what is counted, and still say the same


Factors = dict[str, float]  # of each way: how many times longer than counted it takes; 1.0 where that is not known


class Reading(NamedTuple):
    """Seconds of one kind of op, and how well they are known.

    Attributes:
        seconds: Of each way.
        factors: How many times longer than counted a step takes, and each other way beside a step.
        doubt: Seconds between what was timed and what is said here, in the way in which they differ most.
        is_expected: Whether the factors are those that were known before.
        call: Seconds of a call of a kernel.
    """

    seconds: Seconds
    factors: Factors
    doubt: float
    is_expected: bool
    call: float

    @property
    def off(self) -> float:
        """The factor that is farthest from 1."""
        return max(self.factors.values(), key=lambda factor: abs(math.log(factor)))


def read(
    timed: Mapping[Hashable, Seconds],
    counts: Mapping[Hashable, Counts],
    kinds: Sequence[Hashable],
    rates: Rates,
    known: Mapping[Hashable, Factors],
    python: Python,
) -> dict[Hashable, Reading]:
    """Seconds of each kind of op: what is counted, in the machine's own measure, unless what was timed contradicts.

    Work is the same in every profile, and noise is not. So seconds that tell the same as the counts, within a factor of
    3, are those that are counted; what tells something else (a solver that has no formula, a slow kernel) is believed,
    to a factor of the square root of 3.

    Args:
        timed: The least seconds of each way of each kind.
        counts: Its work.
        kinds: The kind of each op of the chain, in order.
        rates: Those of the device.
        known: What earlier readings have found, which is asked as the counts are.
        python: What is added for Python, whatever the kernels take.
    """
    expected = {kind: _expected(counts[kind], rates) for kind in timed}
    steps = {kind: known.get(kind, {}).get("step", 1.0) * expected[kind]["step"] for kind in timed}
    scale = _weighted_median(sorted((timed[k]["step"] / steps[k], steps[k]) for k in kinds if steps[k]))
    scale = scale if scale > 0 else 1.0  # shorter than a trial of no op
    tick = max(TICK * scale * sum(steps[kind] for kind in kinds), rates.moment)
    call = scale * rates.call
    return {
        kind: _read(timed[kind], {w: scale * s for w, s in e.items()}, python, call, tick, known.get(kind, {}))
        for kind, e in expected.items()
    }


def _expected(counts: Counts, rates: Rates) -> Seconds:
    """What is counted as seconds: no way takes less than a step, but for those that are a part of one."""
    found = {way: work.seconds(rates) for way, work in counts.items()}
    return {way: s if way in PARTS else max(s, found["step"]) for way, s in found.items()}


def _read(timed: Seconds, expected: Seconds, python: Python, call: float, tick: float, known: Factors) -> Reading:
    """A step is compared with other steps; its other ways with a step. Python takes as long where kernels are slow."""
    timed = timed | {"forward": min(timed["forward"], timed["step"])}
    factors = {"step": _believed(timed["step"], expected["step"], tick, known.get("step", 1.0))}
    own = python.seconds(call)
    step = {way: factors["step"] * s + own.get(way, 0.0) for way, s in expected.items()}
    factors |= {way: _believed(timed[way], step[way], tick, known.get(way, 1.0)) for way in timed if way != "step"}
    seconds = {way: (factors.get(way, 1.0) if way != "step" else 1.0) * step[way] for way in step}
    seconds |= {"within": own["within"]} | ({"opens": own["opens"]} if "undone" in seconds else {})
    doubt = max(abs(_extra(timed, way) - _extra(seconds, way)) for way in timed)
    return Reading(seconds, factors, doubt, all(known.get(way, 1.0) == factor for way, factor in factors.items()), call)


def _extra(seconds: Seconds, way: str) -> float:
    """What a way takes beyond a step; of a step, all."""
    return seconds[way] - seconds["step"] * (way != "step")


def _believed(timed: float, expected: float, tick: float, known: float) -> float:
    """How many times longer than expected something is taken to be: what is known, or between powers of `FACTOR`."""
    if abs(timed - known * expected) <= tick or min(timed, expected) <= 0:
        return known
    if abs(math.log(timed / (known * expected), FACTOR)) < (
        1 if known == 1 else 2
    ):  # what is known was believed already
        return known
    powers = math.log(timed / expected, FACTOR)
    return 1.0 if abs(powers) < 1 else FACTOR ** (math.trunc(powers) + math.copysign(0.5, powers))


def costs_in(seconds: Seconds, unit: float) -> dict[str, Any]:
    """The seconds of `OpCosts`: none is negative, and nothing is faster than a plain step."""
    step, ends, begins = (whole(seconds.get(way, 0.0), unit) for way in ("step", "ends", "begins"))
    forward = min(whole(seconds["forward"], unit), step)
    backward, ends = step - forward, min(ends, forward)
    within, opens = (whole(seconds.get(way, 0.0), unit) for way in ("within", "opens"))
    region = max(whole(seconds["again"], unit) - step - forward + ends - within, 0.0)
    inverse = max(whole(seconds["undone"], unit), step) - forward if "undone" in seconds else math.inf
    begins = max(min(begins, inverse - backward), 0.0)
    found = {"forward": forward, "backward": backward, "inverse": inverse, "region": region}
    bounds = forward - ends, inverse - backward, inverse - backward - begins
    spared = [whole(seconds.get(way, 0.0), unit) for way in SPARED]
    spares = tuple(max(min(s, bound), 0.0) for s, bound in zip(spared, bounds, strict=True))
    return found | {"ends": ends, "begins": begins, "within": within, "opens": opens, "spares": spares}


def unit_of(plain: float) -> float:
    """A unit for seconds, so fine that it decides nothing; in whole numbers of it like ops tie on any machine."""
    return plain / 2**18 if plain > 0 else 1.0


def whole(seconds: float, unit: float) -> float:
    """Seconds as so many units."""
    return round(seconds / unit) * unit


def _weighted_median(pairs: Sequence[tuple[float, float]]) -> float:
    """The median of sorted values with their weights."""
    half, total = sum(weight for _, weight in pairs) / 2, 0.0
    for value, weight in pairs:
        total += weight
        if total >= half:
            return value
    return 0.0
