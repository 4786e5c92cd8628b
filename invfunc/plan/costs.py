"""Costs: what a plan is made from, as pure data. Bytes and seconds of each op of a chain, to be saved and edited."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import OptionError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}iB": 1024**e for e, p in enumerate("KMGT", 1)} | {f"{p}B": 1000**e for e, p in enumerate("KMGT", 1)}


def parse_bytes(size: int | float | str, subject: str = "budget") -> int:
    """A number of bytes: an int, or a number with a unit.

    Raises:
        OptionError: When the unit is unknown or the size is not positive.

    Example:
        >>> parse_bytes("1.5KiB"), parse_bytes("2 MB"), parse_bytes(7)
        (1536, 2000000, 7)
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)\s*", size)
        units = {name.lower(): factor for name, factor in _UNITS.items()}
        if match is None or match[2].lower() not in units:
            raise OptionError(f"{subject} is {size!r}", expected=f"bytes, or a number of {', '.join(list(_UNITS)[1:])}")
        size = float(match[1]) * units[match[2].lower()]
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 < size < math.inf:
        raise OptionError(f"{subject} is {size!r}", expected="a positive number of bytes, or a text like '2GiB'")
    return int(size)


def show_bytes(size: float) -> str:
    """Bytes as a reader wants them.

    Example:
        >>> show_bytes(6.5 * 2**20), show_bytes(12)
        ('6.5 MiB', '12 B')
    """
    exponent = min(max(int(math.log(max(size, 1), 1024)), 0), 4)
    value = size / 1024**exponent
    return f"{value:.{3 if value < 1000 else 4}g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"


@dataclass(frozen=True)
class OpCosts:
    """What one op of a chain costs: ``x -> y``, of ``bytes``.

    Attributes:
        name: How the op is shown.
        forward: Seconds of a forward without a tape.
        backward: Seconds that a step with a tape takes beyond that.
        inverse: Seconds of the fused inverse and backward; infinite where there is no inverse.
        exact: Whether the inverse gives the same bits: it moves elements and does not compute, or is `invfunc.exact`.
        bytes: Bytes of y.
        gradient: Bytes of the gradient of y.
        tape: Bytes that a taped forward leaves behind, without x; with y where the tape holds it.
        holds_input: Bytes that the tape holds of each storage of x.
        holds_output: Bytes that the tape holds of each storage of y.
        shares_output: Bytes of each storage of y that is one of x, as of a coupling's untouched component.
        residue: Bytes that the inverse needs beside y.
        recording: Bytes that are kept, beside x, to run the op again as it ran: copies of buffers that it writes.
        parameters: Bytes of the gradients of parameters.
        peak_forward: The most bytes alive in a forward without a tape, beyond x.
        peak_taped: The most in a taped forward, beyond x.
        peak_backward: The most in its backward, tape and gradient of y included, beyond x.
        peak_inverse: The most in a fused inverse, y and its gradient included, beyond the residue.
        peak_backward_last: As peak_backward where the op ends a region, which holds the gradient of y, not counted.
        peak_inverse_last: As peak_inverse, likewise.
        region: Seconds that it takes to begin a region here: to note down what runs in it, and to call it up again.
        parts: How many ops of the flattened chain this is: those that only make views belong to a neighbour, and in
            long chains both halves of a coupling are one.

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
    tape: int = 0
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
    peak_backward_last: int = 0
    peak_inverse_last: int = 0
    region: float = 0.0
    parts: int = 1


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
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: Any) -> Costs:
        """The costs in a parsed text."""
        try:
            ops = tuple(OpCosts(**{k: _frozen(v) for k, v in op.items()}) for op in data["ops"])
            given: dict[str, Any] = {f.name: _frozen(data[f.name]) for f in fields(cls) if f.name in data}
            return cls(**(given | {"ops": ops}))  # pyright: ignore[reportArgumentType]
        except (TypeError, KeyError, AttributeError) as error:
            raise OptionError("these are not costs", expected="what Costs.to_json wrote", got=str(error)) from error

    def save(self, path: str | Path) -> None:
        """Write the costs to a file."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Costs:
        """The costs that `save` has written."""
        return cls.from_json(Path(path).read_text())


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


# ---- what each choice keeps and needs ------------------------------------------------------------------------------

DEMANDS = FREE, EXACT, HELD = range(3)  # what is wanted of a boundary; see NOTE [Plan]
SHARED = 3  # free, behind a region of one op, which pays for what that has only handed on; rule 8 of NOTE [Plan]


class Ledger:
    """Bytes that each choice keeps and needs, in a chain ``x[0] -> ... -> x[L]``; see NOTE [Plan].

    A stretch ``(i, j)`` is ops i+1..j. ``keeps`` is what stays alive while the rest of the stretch is dealt with;
    ``needs`` the least memory for the choice itself, at its own moments.
    """

    def __init__(self, costs: Costs) -> None:
        self.ops = costs.ops
        self.L = len(costs.ops)
        self.a = [costs.input_bytes, *(op.bytes for op in costs.ops)]
        self.loss = costs.loss_bytes
        ins = [*(op.holds_input for op in costs.ops), ()]
        self.n = [sum(held) for held in ins]
        nothing = [0] * (self.L + 1)
        self.paid, self.both = ({FREE: nothing, EXACT: nothing} for _ in range(2))  # of x[i], and of its tape
        for r, outs in (HELD, [op.holds_output for op in costs.ops]), (SHARED, [op.shares_output for op in costs.ops]):
            self.paid[r] = [self.a[0], *map(sum, outs)]
            self.both[r] = [self.n[0], *(sum(map(min, o, n)) for o, n in zip(outs, ins[1:], strict=True))]
        self.w = _sums([op.parameters for op in costs.ops])
        self.q = _sums([op.residue for op in costs.ops])
        self.notes = _sums([op.recording for op in costs.ops])

    def inside(self) -> Ledger:
        """The same for a region that runs again: its end is not the chain's end, wherever it is."""
        found = copy(self)
        found.L = len(self.ops) + 1
        return found

    def in_hand(self, i: int, r: int) -> int:
        """Bytes of x[i], without what somebody else pays for."""
        return self.a[i] - self.paid[r][i]

    def ends_region(self, p: int, j: int) -> bool:
        """Whether op p is the last one of a region: the gradient that it begins with is set aside already."""
        return p == j < self.L

    def output(self, j: int) -> int:
        """Bytes of the chain's output, set aside for the caller, but not there before the end of forward."""
        return self.a[self.L] if j == self.L else 0

    def store(self, i: int, j: int, r: int) -> tuple[int, int]:
        """(keeps, needs) of op i+1 on a tape."""
        own = self.paid[HELD][i + 1] if i + 1 == self.L else 0  # the caller's
        return self._input_kept(i, r) + self.ops[i].tape - own, max(self.tape(i, j, r))

    def tape(self, i: int, j: int, r: int) -> tuple[int, int]:
        """(needs forward, needs backward) of op i+1 on a tape."""
        op, p = self.ops[i], i + 1
        own = self.paid[HELD][p] if p == self.L else 0  # the caller's
        peak = op.peak_backward_last if self.ends_region(p, j) else op.peak_backward
        return self.in_hand(i, r) + op.peak_taped - self.output(j), self._input_kept(i, r) + peak - own

    def _input_kept(self, i: int, r: int) -> int:
        return self.a[i] if r == EXACT else self.n[i] - self.both[r][i]

    def region(self, i: int, k: int, r: int) -> int:
        """Keeps of ops i+1..k as a region: x[i], and what is noted down."""
        return self.in_hand(i, r) + self.notes[k] - self.notes[i]

    def behind(self, i: int, k: int) -> int:
        """What is wanted of x[k] where ops i+1..k are a region."""
        return SHARED if k == i + 1 else FREE

    def first_pass(self, i: int, k: int, j: int, r: int) -> int:
        """Needs of ops i+1..k forward, as a region."""
        return self.region(i, k, r) + max(self.beyond(i, q) for q in range(i, k)) - self.output(j)

    def beyond(self, i: int, q: int) -> int:
        """Needs of op q+1 forward, in a pass that began at x[i], beyond that."""
        return self.a[q] * (q > i) + self.ops[q].peak_forward

    def reserve(self, i: int, k: int, j: int) -> int:
        """Bytes set aside while ops i+1..k run again: the gradient they begin with, and those of all their parameters.

        And what was noted down. A region inside another one finds its parameters' gradients set aside already.
        """
        return self.ops[k - 1].gradient + self.notes[k] - self.notes[i] + (self.w[k] - self.w[i]) * (j == self.L)

    def undo(self, i: int, p: int, j: int, r: int) -> tuple[int, int]:
        """(needs forward, needs backward) of op p in a run of inverses that began at i."""
        op, q = self.ops[p - 1], self.q[p] - self.q[i]
        kept = self.a[i] * (r == EXACT)  # by somebody who will not take what is rebuilt
        x = self.in_hand(i, r) if p == i + 1 else self.a[p - 1] + kept
        own = self.a[p] if p == self.L else 0  # the caller's
        forward = q + x + op.peak_forward - self.output(j)
        peak = op.peak_inverse_last if self.ends_region(p, j) else op.peak_inverse
        return forward, q + peak + kept - own

    def invert(self, i: int, k: int, j: int, r: int) -> tuple[int, int]:
        """(keeps, needs) of a run of inverses over ops i+1..k."""
        needs = [max(self.undo(i, p, j, r)) for p in range(i + 1, k + 1)]
        return self.q[k] - self.q[i] + self.a[i] * (r == EXACT), max(needs)

    def end(self, j: int) -> int:
        """Needs of the turn from forward to backward."""
        return self.loss if j == self.L else 0


def _sums(values: Sequence[int]) -> list[int]:
    total = [0]
    for value in values:
        total.append(total[-1] + value)
    return total
