"""The drift meter: how far what a trunk rebuilds in backward is from what it was, estimated from 64 of its values.

NOTE [Drift] An inverse rounds, and a chain of them amplifies what the one before has rounded.

1.  *Where.* At the input of every trunk: the pipeline's own, and each cut, where an activation is stored. There the
    error is largest, since it has come all the way down. First stages of which the graph asks for nothing (they move
    or scale values) are not undone for the meter's sake: the input of the first that is rebuilt is compared instead.
    Nor is a first coupling whose function has saved all that its graph asks for: its input is wanted by nobody, and
    the function stops early. What that coupling gave is compared instead, and what its function has saved.
2.  *What.* The root of the sum of squared errors over that of the squared values, as a norm would give it, from values
    at fixed places that are spread over the whole wire. On chains that drift, that lands within a factor of 2 of the
    true error. It does not find a single wrong element: it measures rounding, it does not search for bugs. Nor would
    a sum of all values: errors of rounding that point one way move it by as much, and the largest value tells of a
    wrong one only where that is larger. `invfunc.exact` compares every bit. But a sum finds every number that is not
    finite, and such numbers only become more on the way down: where one is rebuilt that was finite, masks that
    functions make of it differ, and gradients may be finite and wrong. On the host they are counted where a sum is
    not finite. On a device, where that would have to be waited for, any NaN is told, and a sum that was not infinite.
3.  *Cost.* One small gather and one sum in forward and in backward for each tensor of the wire; nothing is evaluated
    again, and nothing of the size of an activation is kept, nor made where all numbers are finite. A stage that is not
    rebuilt, because it is frozen, is not compared.
4.  *When.* In the ordinary backward of an ordinary forward. Under a transform, in a gradient that is differentiated
    again, and while compiling, there is no meter.
5.  *Devices.* Reading a number from a device would wait for it. The samples travel to the host on their own, and are
    judged when a later pipeline begins: a warning comes up to one step late. An error does not, since it belongs to the
    backward that drifts: with "raise", each trunk waits. While a graph is captured, there is no meter.
6.  *Why.* Before it speaks it asks for the cause (NOTE [Cause]), once for the functions from there on, a place and an
    order of magnitude. On a device what was rebuilt is gone by then: the first message has no cause, and the next
    backward waits in order to find it.
"""

from __future__ import annotations

import cmath
import math
import warnings
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import _torch
from ..core.compare import relative_error_of_numbers
from ..errors import DriftError, DriftWarning, OptionError
from ..wires import is_differentiable
from .devices import Late, is_captured, place_on, when_here
from .parts import Parts

Drift: TypeAlias = str | float  # "warn", "raise", "off", or the tolerance from which on to warn
Sample: TypeAlias = list[float] | Late  # numbers, which may be on their way

COUNT = 64
"""How many values of a wire are compared."""

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-6,
    torch.complex128: 1e-6,
    torch.float32: 1e-3,
    torch.complex64: 1e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 3e-2,
}
"""The relative error from which on the meter speaks: far above what a healthy chain shows, far below what hurts."""

CURE = (
    "store more on the way (checkpoint(..., cuts=...)), keep the stream exactly (inv.exact), or let the error grow "
    "less: a wider stream dtype, normalised branches, bounded scales (inv.ops.tanh_scale)"
)
CHECK = "inv.check(op, x) measures every stage"
SAVES = "saves for backward"


class Cause(NamedTuple):
    """Why a wire is not rebuilt as it was, and what to do about it."""

    text: str
    cure: str


Causes: TypeAlias = dict[tuple[str, str], Cause]  # of an error at a place, by its order of magnitude
Why: TypeAlias = Callable[[float, Sequence[float]], Cause]  # of an error, and what some values were
_NOT_YET = Cause("", f"the next backward looks for the cause; {CHECK}")


def check_drift(drift: Drift) -> Drift:
    """Return the option as it is; raise if it is none."""
    number = isinstance(drift, (int, float)) and not isinstance(drift, bool) and 0 < drift < math.inf
    if not number and drift not in ("warn", "raise", "off"):
        raise OptionError(f"checkpoint: drift={drift!r}", expected="'warn', 'raise', 'off', or a tolerance above 0")
    return drift


def resolvable(subject: str, tolerance: float, dtype: torch.dtype) -> float:
    """A tolerance, if values of a dtype can be that close.

    Raises:
        OptionError: When their rounding alone is more.
    """
    if tolerance < torch.finfo(dtype).eps:
        raise OptionError(
            f"{subject}={tolerance:g}",
            expected=f"at least {torch.finfo(dtype).eps:.2g}, the rounding of {str(dtype)[6:]}",
            cure="ask for less, or widen the stream",
        )
    return tolerance


# ---- samples -----------------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Where the tensors of a wire are read, and how far apart what is read there may be."""

    indices: tuple[Tensor, ...]
    dtype: torch.dtype
    tolerance: float


@lru_cache(maxsize=256)
def _places(drift: Drift, *kinds: tuple[int, torch.dtype, torch.device]) -> Places:
    """For tensors of these sizes, dtypes and devices; the largest is read most, the coarsest tells the tolerance."""
    whole = sum(size for size, *_ in kinds)
    indices = tuple(_spread(size, max(1, COUNT * size // whole), device) for size, _, device in kinds)
    dtype = max((dtype for _, dtype, _ in kinds), key=lambda dtype: torch.finfo(dtype).eps)
    default = TOLERANCES.get(dtype, 3e-2)
    return Places(indices, dtype, default if isinstance(drift, str) else resolvable("checkpoint: drift", drift, dtype))


def _spread(size: int, count: int, device: torch.device) -> Tensor:
    """Places in a flat tensor, spread by the golden ratio: in step with no dimension of it."""
    places = range(size) if size <= count else (int(size * (i * 0.6180339887498949 % 1)) for i in range(1, count + 1))
    return place_on(device, list(places))


def _sample(tensor: Tensor, indices: Tensor) -> Sample:
    """Values of a tensor, whatever its strides; on their way to the host if it is on another device."""
    found = torch.take(tensor.detach() if tensor.requires_grad else tensor, indices)
    if found.is_complex():
        found = torch.view_as_real(found).flatten()
    return found.tolist() if found.is_cpu else Late(found)


def _count_lost(tensor: Tensor) -> int:
    """How many numbers are not finite; a sum is enough where all are."""
    tensor = tensor.detach()
    return 0 if cmath.isfinite(tensor.sum().item()) else tensor.numel() - int(tensor.isfinite().sum())


def _total(tensor: Tensor) -> Tensor:
    total = tensor.detach().sum(dtype=torch.float32 if tensor.dtype.itemsize < 4 else None)
    return (total.abs() if total.is_complex() else total).view(1)


class Reading(NamedTuple):
    """Values of a tensor; and how many of its numbers are not finite, or on another device their sum."""

    values: Sample
    total: Sample

    def has_lost(self, was: Reading) -> bool:
        """Whether a number is not finite that was."""
        (before,), (after,) = _numbers([was.total]), _numbers([self.total])
        if isinstance(self.total, Late):
            return math.isnan(after) or (math.isinf(after) and after != before)
        return after > before


def _read(tensor: Tensor, indices: Tensor) -> Reading:
    total = [float(_count_lost(tensor))] if tensor.is_cpu else Late(_total(tensor))
    return Reading(_sample(tensor, indices), total)


def _can_be_sampled(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_meta or not tensor.numel():
        return False
    return not is_captured(tensor.device)


def _numbers(samples: Sequence[Sample]) -> list[float]:
    return [n for sample in samples for n in (sample.values(wait=True) if isinstance(sample, Late) else sample)]


def telling(saved: Sequence[Tensor], given: Sequence[Tensor] = ()) -> int:
    """Which of the tensors that a call has saved tells most of it: the last of the largest; -1 for none.

    It depends on what was computed before. Constants do not, and are small; nor does a weight that is saved transposed.
    """
    computed = (n for n, t in enumerate(saved) if is_differentiable(t) and not _torch.is_view_of_leaf(t, given))
    return max(computed, key=lambda number: (saved[number].numel(), number), default=-1)


# ---- the probe of a trunk --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Probe:
    """Some values of a wire as they were in forward, and what to do when backward rebuilds others."""

    place: Callable[[], str]
    drift: Drift
    places: Places
    readings: list[Reading]
    error: float = 0.0  # of the latest comparison, as far as it has come

    def compare(self, rebuilt: Sequence[Tensor | None], functions: Iterable[Any], why: Why) -> bool:
        """Compare what was rebuilt with the samples, and speak; later, where reading it would wait for the device.

        Args:
            rebuilt: The tensors of the wire.
            functions: Those of the stage that it goes into.
            why: Finds the cause of an error.

        Returns:
            Whether it has spoken.
        """
        was, now = [], []
        for reading, tensor, indices in zip(self.readings, rebuilt, self.places.indices, strict=True):
            if tensor is not None:
                was.append(reading)
                now.append(_read(tensor, indices))
        late = [sample for reading in (*was, *now) for sample in reading if isinstance(sample, Late)]
        if late and self.drift != "raise" and not (found := _known_causes(list(functions))):
            when_here(late, partial(self.judge, was, now, lambda: found, lambda *_: _NOT_YET))
            return False
        return self.judge(was, now, lambda: _known_causes(list(functions)), why)

    def judge(self, was: Sequence[Reading], now: Sequence[Reading], find: Callable[[], Causes], why: Why) -> bool:
        """Warn or raise if values are further apart than they may be."""
        values = _numbers([reading.values for reading in was])
        error = relative_error_of_numbers(_numbers([reading.values for reading in now]), values)
        has_lost = any([after.has_lost(before) for before, after in zip(was, now, strict=True)])
        self.error = error = math.inf if has_lost else error
        if error <= self.places.tolerance:
            return False
        # One digit: no more is known, and Python shows a warning of the same text once.
        size = f"off by about {error:.0e} of its size" if error < math.inf else "not finite where it was"
        place, found = self.place(), find()
        key = place, f"{error:.0e}".partition("e")[2]
        if found.get(key, _NOT_YET) is _NOT_YET:
            found[key] = _cause(why, error, values)
        self._speak(f"{place}, rebuilt in backward, is {size}", found[key])
        return True

    def _speak(self, subject: str, cause: Cause) -> None:
        expected = f"at most {self.places.tolerance:.0e} ({str(self.places.dtype)[6:]})"
        error = DriftError(": ".join(filter(None, [subject, cause.text])), expected=expected, cure=cause.cure)
        if self.drift == "raise":
            raise error
        warnings.warn(DriftWarning(str(error)), stacklevel=2)


def _cause(why: Why, error: float, was: Sequence[float]) -> Cause:
    """The cause, if it can be found: a function may fail on what was rebuilt."""
    try:
        return why(error, was)
    except Exception:
        return Cause("", f"{CURE}; {CHECK}")


_CAUSES: MutableMapping[Any, dict[tuple[int, ...], Causes]] = WeakIdKeyDictionary()
_MANY = 64  # pipelines that begin with one function


def _known_causes(functions: Sequence[Any]) -> Causes:
    """The causes that were found for these functions: they are remembered with the first that stays."""
    for function in functions:
        try:
            pipelines = _CAUSES.setdefault(_what_stays(function), {})
        except TypeError:  # a builtin
            continue
        if len(pipelines) > _MANY:
            pipelines.clear()
        return pipelines.setdefault(tuple(map(_number_of, functions)), {})
    return {}


def _what_stays(function: Any) -> Any:
    """A module or a tensor of a function: it may itself be made anew for each call."""
    parts = Parts([function])
    return next(iter([*parts.modules, *parts.tensors]), function)


def _number_of(function: Any) -> int:
    """What tells a function from others, though it be made anew."""
    return id(function if isinstance(function, nn.Module) else getattr(function, "__code__", type(function)))


def probe(tensors: Sequence[Tensor], drift: Drift, place: Callable[[], str]) -> Probe | None:
    """A probe of the tensors of a wire; None where there is no meter (rule 4 of NOTE [Drift])."""
    if torch.compiler.is_compiling() or _torch.active() or not all(map(_can_be_sampled, tensors)):
        return None
    places = _places(drift, *[(t.numel(), t.dtype, t.device) for t in tensors])
    return Probe(place, drift, places, list(map(_read, tensors, places.indices)))
