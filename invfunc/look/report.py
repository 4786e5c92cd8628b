"""The report: `check` says whether an op can be trusted to be rebuilt, and what to do if not; `calibrate` where to cut.

What is measured, and how, is in diagnosis.py; here it is judged and shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpointed, CheckpointedFunction, checkpoint
from ..core.context import Context, with_context
from ..core.op import Invertible, OneWay, lift
from ..engine.meter import CURE, TOLERANCES, resolvable
from ..errors import OptionError
from ..nn.module import op_of
from ..plan.executor import has_inverse
from ..wires import Wire, describe, is_differentiable, map_wire, refuse_nested
from .diagnosis import (
    Gradient,
    Outcome,
    Run,
    Trip,
    compared_gradients,
    dtype_of,
    name_of_stage,
    pullback_gradients,
    replays,
    require_finite,
    scale_of,
    stages_of,
    stored_in,
    unlowered,
)
from .memory import measure
from .trial import same_dice, untouched

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
"""What the growth of the error is measured in, beside the dtype of the input."""

WRONG = 1e-6
"""From which error on an inverse is wrong in float64, where rounding is 1e-16."""


# ---- the value -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageReport:
    """What was measured of one stage.

    Attributes:
        name: Its place and its op.
        trips: By dtype, the round trips; see `Trip`.
        gradients: Of the tensors that it closes over; see `Gradient`.
        replay: By hazard, the relative error of a replay, or what it raised.
        scale: The largest factor by which an affine coupling multiplies, or divides.
        pullbacks: The gradients by pullbacks, against autograd's; see `Gradient`.
    """

    name: str
    trips: dict[str, Trip]
    gradients: tuple[Gradient, ...]
    replay: dict[str, Outcome]
    scale: float
    pullbacks: tuple[Gradient, ...] = ()


@dataclass(frozen=True)
class Finding:
    """Something that is wrong: where, what, and the cure, as the one sentence that ``str`` gives."""

    stage: str
    claim: str
    cure: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.claim}; {self.cure}"


@dataclass(frozen=True)
class Report:
    """What `check` measured, and what it means; true if nothing is wrong.

    Attributes:
        op: The op, as ``repr`` shows it.
        given: The shapes of the input.
        dtype: Its dtype.
        tolerance: The relative error that was allowed.
        stages: One for each part of a chain.
        inputs: The gradients of the inputs.
        held_bytes: What the lowered op keeps from forward to backward, its output included; None if it can not run.
        plain_bytes: What plain autograd keeps instead.
        findings: What is wrong, the worst first.

    Example:
        >>> import torch, invfunc as inv
        >>> report = inv.check(inv.couple(torch.sin, torch.cos), torch.ones(4), torch.ones(4))
        >>> bool(report), report.findings
        (True, ())
    """

    op: str
    given: str
    dtype: str
    tolerance: float
    stages: tuple[StageReport, ...]
    inputs: tuple[Gradient, ...]
    held_bytes: int | None
    plain_bytes: int | None
    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return not self.findings

    @property
    def verdict(self) -> str:
        """One sentence: what is wrong first of all, and its cure; or that nothing is."""
        if self.findings:
            return str(self.findings[0])
        return (
            f"holds: what is rebuilt is off by {_number(self.drift)} at most, and so is no gradient by more than "
            f"{_number(max((g.error for g in self.gradients), default=0.0))}"
        )

    @property
    def drift(self) -> float:
        """The largest relative error of what backward rebuilds, in the dtype of the input."""
        return max((error for error in self.errors(self.dtype) if error is not None), default=0.0)

    @property
    def gradients(self) -> tuple[Gradient, ...]:
        """Of all inputs, and of all tensors that the stages close over."""
        return (*self.inputs, *(g for stage in self.stages for g in stage.gradients))

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """In what it was measured."""
        return tuple(self.stages[0].trips) if self.stages else ()

    def errors(self, dtype: str) -> list[float | None]:
        """The relative error of each stage's rebuilt input, first stage first; None where it is stored."""
        return [stage.trips[dtype].drift for stage in self.stages]

    def growth(self, dtype: str) -> list[float]:
        """By how much each stage multiplies the error of what it is rebuilt from, rounding at least."""
        eps = torch.finfo(getattr(torch, dtype)).eps
        errors = [eps if error is None else max(error, eps) for error in [*self.errors(dtype), eps]]
        return [before / after for before, after in zip(errors, errors[1:], strict=False)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data: dicts, lists, numbers and strings."""
        found = {**asdict(self), "holds": bool(self), "verdict": self.verdict}
        return _plain(found)

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def plot(self, figure: Any = None) -> Any:
        """Draw the error of each stage, counted as in the table, one line a dtype; needs matplotlib.

        Args:
            figure: A ``matplotlib.figure.Figure`` to draw on; a new one by default.

        Raises:
            OptionError: When matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise OptionError("report.plot needs matplotlib", cure="pip install matplotlib") from error
        figure = Figure(figsize=(7, 4), layout="constrained") if figure is None else figure
        _draw(self, figure.subplots())
        return figure


def _plain(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _plain(part) for key, part in item.items()}
    if hasattr(item, "_asdict"):
        return _plain(item._asdict())
    return [_plain(part) for part in item] if isinstance(item, (tuple, list)) else item


# ---- as text and as a picture ----------------------------------------------------------------------------------------


def _lines(report: Report) -> Iterator[str]:
    shown = report.op if len(report.op) < 100 else f"{report.op[:96]} ..."
    yield f"{shown} on {report.given} {report.dtype}"
    yield from _table([_head(report), *(_row(report, stage) for stage in report.stages), _total(report)])
    for gradient in report.inputs:
        yield f"gradient of {gradient.name}: off by {_number(gradient.error)}, cosine {_cosine([gradient])}"
    if report.held_bytes is not None:
        yield f"kept: {report.held_bytes} bytes; by plain autograd {report.plain_bytes} bytes"
    yield from map(str, report.findings or [report.verdict])


def _head(report: Report) -> list[str]:
    drifts = [f"rebuilt in {dtype}" for dtype in report.dtypes]
    return ["stage", "x -> y -> x", "y -> x -> y", *drifts, "gradients", "cosine", "replay"]


def _row(report: Report, stage: StageReport) -> list[str]:
    own, drifts = stage.trips[report.dtype], [trip.drift for trip in stage.trips.values()]
    errors = [own.section, own.retraction, *drifts]
    return [stage.name, *map(_number, errors), *_worst(stage.gradients), _hazards(stage.replay)]


def _total(report: Report) -> list[str]:
    """The worst of every column."""
    trips = [stage.trips[report.dtype] for stage in report.stages]
    columns = [[t.section for t in trips], [t.retraction for t in trips], *map(report.errors, report.dtypes)]
    worst = [max((e for e in column if e is not None), default=None) for column in columns]
    same = all(outcome == 0.0 for stage in report.stages for outcome in stage.replay.values())
    return ["worst", *map(_number, worst), *_worst(report.gradients), "same" if same else "differs"]


def _worst(gradients: Sequence[Gradient]) -> tuple[str, str]:
    return _number(max((g.error for g in gradients), default=None)), _cosine(gradients)


def _cosine(gradients: Sequence[Gradient]) -> str:
    least = min((g.cosine for g in gradients if g.cosine is not None), default=None)
    return "-" if least is None else f"{least:.6f}"


def _hazards(replay: dict[str, Outcome]) -> str:
    return ", ".join(name for name, outcome in replay.items() if outcome != 0.0) or "same"


def _number(error: float | None) -> str:
    return "-" if error is None else "0" if error == 0 else f"{error:.1e}"


def _table(rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))  # noqa: B905
        yield "  ".join([first, *rest])


def _draw(report: Report, axes: Any) -> None:
    for dtype in report.dtypes:
        errors = report.errors(dtype)
        stages = [i for i, error in enumerate(errors) if error]
        axes.semilogy(stages, [error for error in errors if error], ".-", label=dtype)
    axes.axhline(report.tolerance, color="k", linestyle="--", label=f"tolerance in {report.dtype}")
    axes.set(xlabel="stage, as in the table", ylabel="relative error of its rebuilt input")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.legend()


# ---- the judgement ---------------------------------------------------------------------------------------------------


def _findings(report: Report) -> tuple[Finding, ...]:
    """What is wrong, the causes before what they cause."""
    rules = (_impure, _wrong_inverses, _hazardous, _drifted, _wrong_gradients, _wrong_pullbacks)
    return tuple(finding for rule in rules for finding in rule(report))


def _wrong_inverses(report: Report) -> Iterator[Finding]:
    widest = "float64" if "float64" in report.dtypes else report.dtype
    allowed = WRONG if widest in ("float64", "complex128") else report.tolerance
    for stage in report.stages:
        section = stage.trips[widest].section
        if section is not None and section > allowed:
            yield Finding(
                stage.name,
                f"its inverse does not give x back, it is off by {_number(section)} in {widest}",
                "mend it (inv.testing.check_laws shows both sides), or mark the stage: inv.mark(op, 'recompute')",
            )


def _impure(report: Report) -> Iterator[Finding]:
    for stage in report.stages:
        again = stage.replay.get("again", 0.0)
        if isinstance(again, str):
            yield Finding(stage.name, "it can not be replayed", again)
        elif again:
            yield Finding(
                stage.name,
                f"run twice, it gives other values, off by {_number(again)}",
                "it reads what changes from call to call (a clock, a counter, another generator): make that an "
                "argument, or pin it with inv.pin",
            )


def _hazardous(report: Report) -> Iterator[Finding]:
    for stage in report.stages:
        for name, outcome in stage.replay.items():
            if name != "again" and (isinstance(outcome, str) or outcome > report.tolerance):
                what = outcome if isinstance(outcome, str) else f"off by {_number(outcome)}"
                yield Finding(stage.name, f"its replay does not stand the hazard of {name}: {what}", _CURES[name])


_CURES = {
    "grad mode": "its kernels differ with gradients on: keep its input with inv.mark(op, 'recompute')",
    "layout": "its kernels differ with strides: call x.contiguous() first",
    "threads": "keep torch.set_num_threads from forward to backward",
    "random numbers": "draw from torch's global generators, or leave preserve_rng_state=True",
    "buffers": "register what it writes as buffers of a module",
    "autocast": "run backward under the same autocast",
}


def _drifted(report: Report) -> Iterator[Finding]:
    """Where the error in the dtype of the input grows most, if it grows too far."""
    if any(_impure(report)) or any(_wrong_inverses(report)) or report.drift <= report.tolerance:
        return
    worst, growth = _fastest_growth(report)
    far = f"what is rebuilt is off by {_number(report.drift)} in {report.dtype}, more than {_number(report.tolerance)}"
    steepest = max(report.stages, key=lambda stage: stage.scale)
    if steepest.scale > _STEEP:
        yield Finding(
            steepest.name, f"scale reaches {steepest.scale:.0e}, and {far}", "bound it with inv.ops.tanh_scale(f, 1.0)"
        )
    else:
        yield Finding(worst.name, f"the error grows most here, {growth:.2g} times, and {far}", CURE)


_STEEP = 10.0  # beyond tanh_scale(f, 2.0), say


def _fastest_growth(report: Report) -> tuple[StageReport, float]:
    """The stage that multiplies the error most, and by how much."""
    factors = report.growth(report.dtype)
    index = factors.index(max(factors))
    return report.stages[index], factors[index]


def _wrong_gradients(report: Report) -> Iterator[Finding]:
    """Gradients that nothing above explains."""
    if any(any(rule(report)) for rule in (_impure, _wrong_inverses, _drifted)):
        return
    for stage, gradients in (("lowered", report.inputs), *((s.name, s.gradients) for s in report.stages)):
        for g in gradients:
            if g.error > report.tolerance:
                yield Finding(
                    stage,
                    f"the gradient of {g.name} is off by {_number(g.error)}, its cosine {_cosine([g])}",
                    "compare with inv.mark(op, 'store') of the stage: in backward it is not what it was in forward",
                )


def _wrong_pullbacks(report: Report) -> Iterator[Finding]:
    """Pullbacks that give other gradients than autograd, where what they rebuild is right."""
    if any(any(rule(report)) for rule in (_impure, _wrong_inverses, _drifted)):
        return
    for stage in report.stages:
        for g in stage.pullbacks:
            if g.error > report.tolerance:
                yield Finding(
                    stage.name,
                    f"its pullback gives another gradient of {g.name} than autograd, off by {_number(g.error)}",
                    "mend it, or leave it out: torch.func transforms and op.pullback call it",
                )


# ---- check -----------------------------------------------------------------------------------------------------------


def check(
    op: Invertible | Callable[..., Any],
    *inputs: Wire,
    tolerance: float | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    context: Context | None = None,
) -> Report:
    r"""Measure, stage by stage, whether an op can be trusted to be rebuilt in backward.

    .. math:: f^{-1}(f(x)) = x, \quad f(f^{-1}(y)) = y, \quad \nabla checkpoint(f) = pullback(f) = \nabla f, \quad
        replay(f) = f

    Args:
        op: An op, lowered or not: what is compared with plain autograd is ``checkpoint(op)`` or, if it is lowered
            already, the op as it is. A plain function or module is checked as one that is recomputed.
        inputs: An input as in training.
        tolerance: The relative error that is allowed; by default where the drift meter speaks, from 1e-6 in float64 and
            1e-3 in float32 to 3e-2 in half precision.
        dtypes: What to measure the growth of the error in, beside the dtype of the input.
        context: What the functions are told by name beside the input, as in ``op(x, context=...)``.

    Returns:
        A report: true if nothing is wrong, a table as ``str``, a picture by ``plot()``, data by ``to_dict()``; its
        ``verdict`` is one sentence with the cure.

    Cost:
        Some twenty evaluations of each stage, and its inverse; every value of the chain is kept meanwhile. The global
        generators, buffers, parameters and their ``grad`` are as before afterwards.

    Raises:
        DomainError: When an input holds NaN or infinity.
        WireError: When it is a nested tensor.
        OptionError: When the tolerance is below the rounding of the dtype, or no function takes a name of the context.

    Limits:
        What is measured holds for this input and these parameters. Errors are of norms: one wrong number among a
        million hides.

    Example:
        >>> import torch, invfunc as inv
        >>> x = torch.linspace(0.1, 1, 6, dtype=torch.float64)
        >>> bool(inv.check(inv.pair(torch.exp, torch.log), x))
        True
        >>> print(inv.check(inv.pair(torch.exp, lambda y: 2 * torch.log(y)), x).verdict)
        stage 0 (pair): its inverse does not give x back, it is off by 1.0e+00 in float64; mend it ...

    Source:
        Behrmann et al., Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (2021).
    """
    x = _copied(inputs[0] if len(inputs) == 1 else inputs)
    refuse_nested("check", x)
    lowered, plain = [with_context(part, context) for part in _both(op)]
    dtype = dtype_of(x)
    require_finite("check", x)
    allowed = TOLERANCES[dtype] if tolerance is None else resolvable("check: tolerance", tolerance, dtype)
    with untouched(plain), same_dice(), torch.enable_grad():
        stages, gradients, held = _measured(plain, lowered, x, dtypes)
    report = Report(repr(op), describe(x), _name(dtype), allowed, stages, gradients, *held, ())
    return replace(report, findings=_findings(report))


def _both(op: Any) -> tuple[Invertible, Invertible]:
    """The lowered op, and the plain one."""
    op = _op_of(op)
    if isinstance(op, Checkpointed):
        return op, unlowered(op)
    plain = lift(op)
    return checkpoint(plain, drift="off", mode="recompute" if isinstance(plain, OneWay) else "invert"), plain


def _op_of(op: Any) -> Any:
    """What a module of the package, or a lowered function, stands for; anything else as it is."""
    return op.__wrapped__ if isinstance(op, CheckpointedFunction) else op_of(op) if isinstance(op, nn.Module) else op


def _measured(
    plain: Invertible, lowered: Invertible, x: Wire, dtypes: Sequence[torch.dtype]
) -> tuple[tuple[StageReport, ...], tuple[Gradient, ...], tuple[int | None, int | None]]:
    """The stages, the gradients of the inputs, and what the lowered op and plain autograd hold."""
    stages, stored = stages_of(plain), stored_in(lowered)
    own = Run(stages, x)
    trips = {_name(dtype_of(x)): own.trips(stored), **_other_trips(stages, x, stored, dtypes)}
    replayed = [replays(stage, value) for stage, value in zip(stages, own.values, strict=False)]
    raises = any(isinstance(outcome, str) for outcomes in replayed for outcome in outcomes.values())
    inputs, gradients = ((), [()] * len(stages)) if raises else compared_gradients(plain, lowered, own)
    found = [
        StageReport(
            name_of_stage(stages, i),
            {name: column[i] for name, column in trips.items()},
            gradients[i],
            replayed[i],
            scale_of(stage, own.values[i]),
            () if raises else pullback_gradients(stage, own.values[i]),
        )
        for i, stage in enumerate(stages)
    ]
    return tuple(found), inputs, (None, None) if raises else (_held(lowered, x), _held(plain, x))


def _other_trips(
    stages: Sequence[Invertible], x: Wire, stored: frozenset[int], dtypes: Sequence[torch.dtype]
) -> dict[str, list[Trip]]:
    """The round trips in other dtypes, where the ops can compute in them."""
    found: dict[str, list[Trip]] = {}
    for dtype in dtypes:
        if _name(dtype) != _name(dtype_of(x)):
            try:
                found[_name(dtype)] = Run(stages, x, dtype).trips(stored)
            except RuntimeError:  # a kernel that there is not in this dtype
                continue
    return found


def _copied(x: Wire) -> Wire:
    return map_wire(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, x)


def _held(op: Invertible, x: Wire) -> int:
    given = map_wire(lambda leaf: leaf.clone().requires_grad_() if is_differentiable(leaf) else leaf, x)
    return measure(op.forward, given).held_bytes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- calibrate -------------------------------------------------------------------------------------------------------


def calibrate(op: Invertible, x: Wire, tolerance: float, *, context: Context | None = None) -> tuple[int, ...]:
    """The fewest cuts of a chain so that what is rebuilt stays close; ``checkpoint(op, cuts=calibrate(op, x, 1e-3))``.

    From the end of the chain, inverses go down as far as the tolerance lets them; there, a value is stored, and they
    start again from it. Each trunk is as long as it can be, so there are no more than needed.

    Args:
        op: A chain, or a module of `invfunc.nn` that stands for one; each of its parts is taken whole.
        x: An input as in training.
        tolerance: How far what is rebuilt may be from what it was, as a relative error of the whole wire.
        context: What the functions are told by name beside the input, as in ``op(x, context=...)``.

    Returns:
        Before which parts to store, increasing, as ``checkpoint(cuts=...)`` takes them; empty where none is needed.

    Cost:
        One evaluation of each part and one or two of its inverse. Every value of the chain is kept meanwhile.

    Raises:
        OptionError: When the tolerance is below the rounding of the dtype, or one part alone exceeds it.
        DomainError: When an input holds NaN or infinity.

    Limits:
        What is measured holds for this input and these parameters: other data, and training, move it. Leave a margin,
        and the drift meter on.

    Example:
        >>> import torch, invfunc as inv
        >>> op = inv.chain(*[inv.pair(lambda x: x / 3 + 1, lambda y: (y - 1) * 3)] * 8)
        >>> cuts = inv.look.calibrate(op, torch.ones(4, dtype=torch.float32), 1e-5)
        >>> cuts
        (3,)
        >>> fast = inv.checkpoint(op, cuts=cuts)
    """
    plain = unlowered(with_context(lift(_op_of(op)), context))
    require_finite("calibrate", x)
    resolvable("calibrate: tolerance", tolerance, dtype_of(x))
    with untouched(plain):
        return tuple(sorted(_cuts(Run(stages_of(plain), _copied(x)), tolerance)))


def _cuts(run: Run, tolerance: float) -> Iterator[int]:
    """Where to store, from the end."""
    below, exact = run.values[-1], True
    for i in reversed(range(len(run.stages))):
        if not has_inverse(run.stages[i]):
            below, exact = run.values[i], True
            continue
        back = run.undo(i, below)
        if run.error(i, back) > tolerance and not exact:
            yield i + 1
            back = run.undo(i, run.values[i + 1])
        if run.error(i, back) > tolerance:
            raise _unreachable(run, i, run.error(i, back), tolerance)
        below, exact = back, False


def _unreachable(run: Run, i: int, error: float, tolerance: float) -> OptionError:
    return OptionError(
        f"calibrate: {name_of_stage(run.stages, i)} alone is off by {error:.1e}",
        expected=f"at most {tolerance:.1e}",
        cure="allow more, or mark the stage: inv.mark(op, 'recompute' or 'store')",
    )
