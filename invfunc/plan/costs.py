"""Costs: what a plan is made from, as pure data. Bytes and seconds of each op of a chain, to be saved and edited."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import OptionError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}iB": 1024**e for e, p in enumerate("KMGT", 1)} | {f"{p}B": 1000**e for e, p in enumerate("KMGT", 1)}


def parse_bytes(size: int | float | str, subject: str = "budget") -> int:
    """A number of bytes: an int, or a number with a unit.

    Raises:
        OptionError: When the unit is unknown or the size is below one byte.

    Example:
        >>> parse_bytes("1.5KiB"), parse_bytes("2 MB"), parse_bytes(7)
        (1536, 2000000, 7)
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:e\d+)?)\s*([A-Za-z]*)\s*", size)
        units = {name.lower(): factor for name, factor in _UNITS.items()}
        if match is None or match[2].lower() not in units:
            raise OptionError(f"{subject} is {size!r}", expected=f"bytes, or a number of {', '.join(list(_UNITS)[1:])}")
        size = float(match[1]) * units[match[2].lower()]
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not 1 <= size < math.inf:
        raise OptionError(f"{subject} is {size!r}", expected="one byte or more, or a text like '2GiB'")
    return int(size)


def show_bytes(size: float, to_whole: Callable[[float], int] = round) -> str:
    """Bytes as a reader wants them, rounded; by `math.ceil`, where they are to be enough.

    Example:
        >>> show_bytes(6.5 * 2**20), show_bytes(12), show_bytes(2001), show_bytes(2001, math.ceil)
        ('6.5 MiB', '12 B', '1.95 KiB', '1.96 KiB')
    """
    exponent = min(max(int(math.log(max(size, 1), 1024)), 0), 4)
    value = size / 1024**exponent
    places = 2 - min(int(math.log10(max(value, 1))), 2)
    value = to_whole(value * 10**places) / 10**places
    return f"{value:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"


@dataclass(frozen=True)
class OpCosts:
    """What one op of a chain costs: ``x -> y``, of ``bytes``.

    Attributes:
        name: How the op is shown.
        forward: Seconds of a forward without a tape.
        backward: Seconds that a step with a tape takes beyond that.
        inverse: Seconds of the fused inverse and backward, which does all that backward does; infinite where there is
            no inverse.
        exact: Whether the inverse gives the same bits: it moves elements and does not compute, or is `invfunc.exact`.
        bytes: Bytes of y.
        gradient: Bytes of the gradient of y.
        saves: Whether a tape holds anything at all: what saves nothing is not run again.
        tape: Bytes that a taped forward leaves behind, without x; with y where the tape holds it.
        left: Bytes of the tape that somebody else keeps to the end of the step, as the keys and values of a cache.
        holds_input: Bytes that the tape holds of each storage of x.
        holds_output: Bytes that the tape holds of each storage of y.
        shares_output: Bytes of each storage of y that is one of x, as of a coupling's untouched component.
        residue: Bytes that the inverse needs beside y.
        recording: Bytes that are kept, beside x, to run the op again as it ran: copies of buffers that it writes.
        parameters: Bytes of the gradients of parameters.
        peak_forward: The most bytes alive in a forward that leaves no tape, beyond x; it has one while it runs.
        peak_taped: The most in a taped forward, beyond x.
        peak_backward: The most in its backward, tape and gradient of y included, beyond x.
        peak_inverse: The most in a fused inverse, y and its gradient included, beyond the residue.
        peak_first: The same where a run of inverses begins here, if that is less; otherwise 0.
        region: Seconds that it takes to begin a region here: to note down what runs in it, and to call it up again;
            infinite where none can begin.
        within: Seconds of Python that it takes inside of a region, beside its forward, each time that runs again.
        opens: Seconds of Python that it takes to begin a run of inverses here.
        ends: Seconds of a forward that a region which ends here does not run again: what comes behind the last tensor
            that is saved.
        begins: Seconds that the inverse takes less where a run of inverses begins here: nobody wants its input.
        keep: Which expensive results may be kept where it runs again or is undone: ``"attention"``, ``"products"`` of
            matrices and convolutions, or none.
        kept: Bytes of them.
        spares: Seconds that it takes less if they are kept: to run again as a region, to be undone, and to be undone
            where a run of inverses begins.
        alone: Whether it can not be in a region with other ops.
        parts: How many ops of the flattened chain this is: those that only make views belong to a neighbour, and in
            long chains both halves of a coupling are one.
        off: How many times longer than flops and bytes say a way of it took; 1.0 where they agree to a factor of 3.
        doubt: Seconds between what was timed and what is said here, in the way in which they differ most.

    Raises:
        OptionError: When seconds are negative, or a part is more than the whole, as a backward is a part of an inverse:
            no plan could keep what such costs promise.

    Example:
        >>> OpCosts("op", forward=1.0, backward=2.0, bytes=100, tape=800).inverse
        inf
    """

    name: str
    forward: float
    backward: float
    inverse: float = math.inf
    exact: bool = False
    bytes: int = 0
    gradient: int = 0
    saves: bool = True
    tape: int = 0
    left: int = 0
    holds_input: tuple[int, ...] = ()
    holds_output: tuple[int, ...] = ()
    shares_output: tuple[int, ...] = ()
    residue: int = 0
    recording: int = 0
    parameters: int = 0
    peak_forward: int = 0
    peak_taped: int = 0
    peak_backward: int = 0
    peak_inverse: int = 0
    peak_first: int = 0
    region: float = 0.0
    within: float = 0.0
    opens: float = 0.0
    ends: float = 0.0
    begins: float = 0.0
    keep: str = ""
    kept: int = 0
    spares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    alone: bool = False
    parts: int = 1
    off: float = 1.0
    doubt: float = 0.0

    def __post_init__(self) -> None:
        none = dict.fromkeys(("forward", "backward", "region", "within", "opens", "ends", "begins"), 0.0)
        least: dict[str, float] = none | {"inverse": self.backward}
        most = {"ends": self.forward, "begins": self.inverse - self.backward}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise OptionError(f"op {self.name!r}: {name} is {getattr(self, name)} s", expected=f"{bound} or more")
        for name, bound in most.items():
            if getattr(self, name) > bound * (1 + 1e-9):  # they were scaled
                raise OptionError(f"op {self.name!r}: {name} is {getattr(self, name)} s", expected=f"{bound} or less")
        undone = self.inverse - self.backward
        bounds = self.forward - self.ends, undone, undone - self.begins
        if any(
            not 0 <= spared <= bound * (1 + 1e-9) + 1e-12 for spared, bound in zip(self.spares, bounds, strict=True)
        ):
            raise OptionError(f"op {self.name!r}: spares is {self.spares} s", expected=f"0.0 to {bounds}")

    def in_units(self, unit: float) -> OpCosts:
        """The same with whole numbers of a unit in the place of seconds."""
        names = ("forward", "backward", "inverse", "region", "within", "opens", "ends", "begins")
        found: dict[str, Any] = {name: _whole(getattr(self, name), unit) for name in names}
        return replace(self, spares=tuple(_whole(s, unit) for s in self.spares), **found)

    def without_seconds(self) -> OpCosts:
        """The same, if it took no time."""
        inverse, region = (0.0 if math.isfinite(seconds) else seconds for seconds in (self.inverse, self.region))
        none: dict[str, Any] = dict.fromkeys(("forward", "backward", "within", "opens", "ends", "begins"), 0.0)
        return replace(self, spares=(0.0, 0.0, 0.0), inverse=inverse, region=region, **none)


@dataclass(frozen=True)
class Costs:
    """The costs of a chain on inputs of one shape; made by `profile`.

    Attributes:
        ops: The costs of each op.
        input_bytes: Bytes of the chain's input, which the caller holds.
        loss_bytes: The most bytes alive between forward and backward, beyond the output, its gradient included.
        key: Which chain and which input shapes these are the costs of.
        errors: ``(i, k, error)``: undoing ops i+1..k from an exact output gives gradients with this relative error.
        scaled: How many times smaller the batch was on which the seconds were taken; they are scaled by it.
        enter: Seconds of Python that a step takes beside those of its ops, if the plan does more than store.
        unit: The seconds are whole multiples of it, or it is 0.0. Sums of them are exact then, so that like ops tie.

    Example:
        >>> ops = tuple(OpCosts(f"op {i}", forward=1.0, backward=2.0, bytes=100, tape=800) for i in range(4))
        >>> Costs(ops).seconds
        12.0
    """

    ops: tuple[OpCosts, ...]
    input_bytes: int = 0
    loss_bytes: int = 0
    key: tuple[str, ...] = ()
    errors: tuple[tuple[int, int, float], ...] | None = None
    scaled: float = 1.0
    enter: float = 0.0
    unit: float = 0.0

    def in_units(self) -> Costs:
        """The costs with whole numbers in the place of seconds, if they have a unit."""
        if not self.unit:
            return self
        ops = tuple(op.in_units(self.unit) for op in self.ops)
        return replace(self, unit=0.0, ops=ops, enter=_whole(self.enter, self.unit))

    def without_seconds(self) -> Costs:
        """The costs of a chain that takes no time: what is impossible still is."""
        return replace(self, unit=0.0, enter=0.0, ops=tuple(op.without_seconds() for op in self.ops))

    def with_like_seconds(self) -> Costs:
        """The costs of a chain whose ops all take as long."""
        found = self.without_seconds()
        return replace(
            found, ops=tuple(replace(op, forward=1.0, backward=2.0, inverse=3.0 + op.inverse) for op in found.ops)
        )

    @property
    def seconds(self) -> float:
        """A plain step: every op forward and backward once."""
        return sum(op.forward + op.backward for op in self.ops)

    def to_json(self) -> str:
        """The costs as text.

        Example:
            >>> costs = Costs((OpCosts("exp", 1.0, 2.0, bytes=8),), input_bytes=8)
            >>> Costs.from_json(costs.to_json()) == costs
            True
        """
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Costs:
        """The costs that `to_json` has written.

        Raises:
            OptionError: When the text is not that of costs.
        """
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise _are_not_costs(error) from error

    @classmethod
    def from_dict(cls, data: Any) -> Costs:
        """The costs in a parsed text."""
        try:
            ops = tuple(OpCosts(**{k: _frozen(v) for k, v in op.items()}) for op in data["ops"])
            given: dict[str, Any] = {f.name: _frozen(data[f.name]) for f in fields(cls) if f.name in data}
            return cls(**(given | {"ops": ops}))  # pyright: ignore[reportArgumentType]
        except (TypeError, KeyError, AttributeError) as error:
            raise _are_not_costs(error) from error

    def save(self, path: str | Path) -> None:
        """Write the costs to a file."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Costs:
        """The costs that `save` has written."""
        return cls.from_json(Path(path).read_text())


def _are_not_costs(error: Exception) -> OptionError:
    return OptionError("these are not costs", expected="what Costs.to_json wrote", got=str(error))


def _whole(seconds: float, unit: float) -> float:
    return seconds if math.isinf(seconds) else float(round(seconds / unit))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


# ---- what each choice keeps and needs ------------------------------------------------------------------------------

DEMANDS = FREE, EXACT, HELD, KEPT = range(4)  # what is wanted of a boundary; see NOTE [Plan]
SHARED = 4  # free, behind a region of one op, which pays for what that has only handed on; rule 8 of NOTE [Plan]


class Ledger:
    """Bytes that each choice keeps and needs, in a chain ``x[0] -> ... -> x[L]``; see NOTE [Plan].

    A stretch ``(i, j)`` is ops i+1..j. ``keeps`` is what stays alive while the rest of the stretch is dealt with;
    ``needs`` the least memory for the choice itself, at its own moments.

    Attributes:
        sizes: Bytes of each x[i] (``a`` in the NOTE).
        inputs: Bytes that the tape of op i+1 holds of x[i].
        residues: Bytes that inverses need beside their outputs, summed up to each op.
        copies: Bytes of buffers that are kept to run ops again, summed likewise.
        paid: Bytes of x[i] that somebody else pays for, by demand.
        paid_inputs: The part of them that the tape of op i+1 holds.
        results: Bytes of the results that are kept of each op.
    """

    def __init__(self, costs: Costs, keeping: Collection[int] = ()) -> None:
        self.ops = costs.ops
        self.results = [op.kept if i in keeping else 0 for i, op in enumerate(costs.ops)]
        self.length = len(costs.ops)
        self.sizes = [costs.input_bytes, *(op.bytes for op in costs.ops)]
        self.loss = costs.loss_bytes
        ins = [*(op.holds_input for op in costs.ops), ()]
        self.inputs = [sum(held) for held in ins]
        nobody = [0] * (self.length + 1)
        self.paid, self.paid_inputs = ({FREE: nobody, EXACT: nobody} for _ in range(2))
        for r, outs in (HELD, [op.holds_output for op in costs.ops]), (SHARED, [op.shares_output for op in costs.ops]):
            self.paid[r] = [self.sizes[0], *map(sum, outs)]
            shared = (sum(map(min, o, n)) for o, n in zip(outs, ins[1:], strict=True))
            self.paid_inputs[r] = [self.inputs[0], *shared]
        self.paid[KEPT], self.paid_inputs[KEPT] = self.sizes, self.inputs
        self.residues = _sums([op.residue + kept for op, kept in zip(costs.ops, self.results, strict=True)])
        self.copies = _sums([op.recording for op in costs.ops])

    def inside(self) -> Ledger:
        """The same for a region that runs again: its end is not the chain's end, wherever it is."""
        ledger = copy(self)
        ledger.length = len(self.ops) + 1
        return ledger

    def in_hand(self, i: int, r: int) -> int:
        """Bytes of x[i], without what somebody else pays for."""
        return self.sizes[i] - self.paid[r][i]

    def output(self, j: int) -> int:
        """Bytes of the chain's output, set aside for the caller, but not there before the end of forward."""
        return self.sizes[j] if j == self.length else 0

    def waits(self, j: int, p: int) -> int:
        """Bytes of the gradient that waits while a region runs again; op p's in its place where its end is unknown."""
        return 0 if j == self.length else self.ops[(j or p) - 1].gradient

    def store(self, i: int, j: int, r: int) -> tuple[int, int]:
        """(keeps, needs) of op i+1 on a tape."""
        own = self.paid[HELD][i + 1] if i + 1 == self.length else 0  # the caller's
        return self._input_kept(i, r) + self.ops[i].tape - own - self._left(i, j), max(self.tape(i, j, r))

    def tape(self, i: int, j: int, r: int) -> tuple[int, int]:
        """(needs forward, needs backward) of op i+1 on a tape."""
        op, p = self.ops[i], i + 1
        own, left = self.paid[HELD][p] if p == self.length else 0, self._left(i, j)  # the caller's
        forward = self.in_hand(i, r) + op.peak_taped + self.waits(j, p) - self.output(j) - left
        return forward, self._input_kept(i, r) + op.peak_backward - own - left

    def _left(self, i: int, j: int) -> int:
        """Bytes of a tape that count elsewhere; those of one that is made again are another's."""
        return self.ops[i].left if j == self.length else 0

    def _input_kept(self, i: int, r: int) -> int:
        return self.sizes[i] if r == EXACT else self.inputs[i] - self.paid_inputs[r][i]

    def runs_again(self, i: int, k: int) -> bool:
        """Whether ops i+1..k run again if they are a region: not if they save nothing."""
        return any([op.saves for op in self.ops[i:k]])

    def region(self, i: int, k: int, r: int) -> int:
        """Keeps of ops i+1..k as a region: x[i], to its end, buffers as they were, and results of one op."""
        if not self.runs_again(i, k):
            return self._input_kept(i, r)
        return self.in_hand(i, r) + self.notes(i, k) + self.results[i] * (k == i + 1)

    def notes(self, i: int, k: int) -> int:
        """Bytes of copies of the buffers that ops i+1..k write."""
        return self.copies[k] - self.copies[i]

    def behind(self, i: int, k: int) -> int:
        """What is wanted of x[k] where ops i+1..k are a region."""
        return SHARED if k == i + 1 and self.runs_again(i, k) else FREE

    def undo(self, i: int, p: int, j: int, r: int) -> tuple[int, int]:
        """(needs forward, needs backward) of op p in a run of inverses that began at i."""
        op, residues = self.ops[p - 1], self.residues[p] - self.residues[i]
        kept = self.sizes[i] * (r == EXACT)  # by somebody who will not take what is rebuilt
        x = self.in_hand(i, r) if p == i + 1 else self.sizes[p - 1] + kept
        own = self.sizes[p] if p == self.length else 0  # the caller's
        forward = residues + x + op.peak_forward + self.waits(j, p) - self.output(j)
        peak = op.peak_first if op.peak_first and p == i + 1 else op.peak_inverse
        return forward, residues + peak + kept - own

    def invert(self, i: int, k: int, j: int, r: int) -> tuple[int, int]:
        """(keeps, needs) of a run of inverses over ops i+1..k."""
        needs = [max(self.undo(i, p, j, r)) for p in range(i + 1, k + 1)]
        return self.residues[k] - self.residues[i] + self.sizes[i] * (r == EXACT), max(needs)

    def end(self, j: int) -> int:
        """Needs of the turn from forward to backward: for the loss, or for the gradient that a region begins with."""
        return self.loss if j == self.length else self.waits(j, j) if j else 0


def _sums(values: Sequence[int]) -> list[int]:
    total = [0]
    for value in values:
        total.append(total[-1] + value)
    return total
