"""Diagnosis: what the stages of an op do to numbers, measured on an input, in several dtypes.

NOTE [Diagnosis]

1.  *Another dtype.* The functions of an op close over parameters that nobody can copy in general. So nothing is copied:
    while an op runs in another dtype, every torch function is given its tensors in that dtype.
2.  *Random numbers.* Each primitive starts from the same seed, forward and back: with others it is another function.
3.  *Errors* come from sweeps: from the exact value where a trunk ends, inverses go down, and what each rebuilds is
    compared with what was there. Products of gains would be off by orders of magnitude.
4.  *Replay.* Each hazard lies between a recorded call and its replay, as it would between forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..checkpoint import Checkpointed
from ..core.combine import Parallel
from ..core.compare import cosine, length, relative_error
from ..core.couple import Affine, Half
from ..core.op import Chain, Invertible, LiveVJP, Pair, Residue, graph_leaves
from ..engine.conditions import threads
from ..engine.lower import cut_points
from ..engine.parts import Parts
from ..engine.region import RecordedCall
from ..errors import DomainError, place_error
from ..plan.executor import Planned, has_inverse
from ..wires import Wire, is_differentiable, leaves, map_wire, spread
from .trial import closed_over, gradients_of, noise, same_dice

# ---- the stages of an op ---------------------------------------------------------------------------------------------


def unlowered(op: Invertible) -> Invertible:
    """The op below its `checkpoint`s and plans."""
    return unlowered(op.op) if isinstance(op, (Checkpointed, Planned)) else op


def stages_of(op: Invertible) -> tuple[Invertible, ...]:
    """What is measured one by one: the parts of a chain; any other op is one stage."""
    return op.parts if isinstance(op, Chain) and op.labels is None else (op,)


def _primitives(op: Invertible) -> list[Invertible]:
    """A stage taken apart as far as it is lowered one by one, each with random numbers of its own."""
    return [inner for part in op.parts for inner in _primitives(part)] if isinstance(op, Chain) else [op]


def stored_in(op: Invertible) -> frozenset[int]:
    """Before which stages the lowered op stores an activation."""
    return frozenset(cut_points(op.op, op.options.segments)) if isinstance(op, Checkpointed) else frozenset()


def name_of_stage(stages: Sequence[Invertible], index: int) -> str:
    """A stage as verdicts name it."""
    return f"stage {index} ({stages[index].name})"


def dtype_of(x: Wire) -> torch.dtype:
    """The dtype of the stream: that of the first tensor that can have a gradient."""
    return next((leaf.dtype for leaf in leaves(x) if is_differentiable(leaf)), torch.get_default_dtype())


def require_finite(subject: str, x: Wire) -> None:
    """Raise where an input holds NaN or infinity: nothing could be measured with it."""
    for place, leaf in enumerate(leaves(x)):
        if is_differentiable(leaf) and not leaf.isfinite().all():
            raise DomainError(
                f"{subject}: input {place}",
                expected="finite numbers",
                got=f"{int((~leaf.isfinite()).sum())} of {leaf.numel()} that are not",
                cure="measure on data as in training",
            )


# ---- another dtype: rule 1 of NOTE [Diagnosis] -----------------------------------------------------------------------


class _Casting(TorchFunctionMode):
    """Gives every torch function its tensors in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*cast(args, self.dtype), **cast(kwargs or {}, self.dtype))


def cast(item: Any, dtype: torch.dtype) -> Any:
    """Floating-point and complex tensors, in containers too, in a dtype of that width."""
    if isinstance(item, Tensor):
        return item.to(dtype.to_complex() if item.is_complex() else dtype) if is_differentiable(item) else item
    if type(item) in (tuple, list):
        return type(item)(cast(part, dtype) for part in item)
    return {key: cast(part, dtype) for key, part in item.items()} if type(item) is dict else item


def _computing_in(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else _Casting(dtype)


# ---- a run, and the way back -----------------------------------------------------------------------------------------


class Trip(NamedTuple):
    """What a stage does to its input in one dtype, as relative errors; None where there is no inverse.

    Attributes:
        section: ``inverse(forward(x))`` against x, from an exact x.
        retraction: ``forward(inverse(y))`` against y, from an exact y.
        drift: What backward rebuilds of x, all the way from where the trunk ends, against x.
    """

    section: float | None
    retraction: float | None
    drift: float | None


class Run:
    """A forward run, kept whole: the wire before each stage and behind the last, and what each inverse needs.

    Args:
        stages: The stages.
        x: The input.
        dtype: What to compute in; None for the dtypes as they are.
    """

    def __init__(self, stages: Sequence[Invertible], x: Wire, dtype: torch.dtype | None = None) -> None:
        self.stages, self.dtype = stages, dtype
        self.values: list[Wire] = [x if dtype is None else map_wire(lambda leaf: cast(leaf, dtype), x)]
        self.residues: list[Residue] = []
        for i in range(len(stages)):
            y, residue = self._on_stage(i, self._forward, self.values[-1])
            self.values.append(y)
            self.residues.append(residue)

    def _on_stage(self, i: int, run: Callable[[int, Wire], Any], wire: Wire) -> Any:
        try:
            with torch.no_grad(), _computing_in(self.dtype):
                return run(i, wire)
        except Exception as error:
            place_error(error, name_of_stage(self.stages, i))
            raise

    def _forward(self, i: int, x: Wire) -> tuple[Wire, Residue]:
        residues: list[Residue] = []
        for op in _primitives(self.stages[i]):
            with same_dice():
                x, residue = op.forward_with_residue(x)
            residues.append(residue)
        return x, residues

    def _inverse(self, i: int, y: Wire) -> Wire:
        ops = _primitives(self.stages[i])
        for op, residue in reversed(list(zip(ops, self.residues[i], strict=True))):
            with same_dice():
                y = op.inverse_with_residue(residue, y)
        return y

    def undo(self, i: int, y: Wire) -> Wire:
        """Stage i backwards."""
        return self._on_stage(i, self._inverse, y)

    def error(self, i: int, x: Wire) -> float:
        """How far a wire is from the one before stage i."""
        return relative_error(x, self.values[i])

    def trips(self, stored: frozenset[int]) -> list[Trip]:
        """A `Trip` for each stage; where an activation is stored, the sweep starts again from it."""
        found: list[Trip] = []
        below = self.values[-1]
        for i in reversed(range(len(self.stages))):
            if not has_inverse(self.stages[i]):
                below = self.values[i]
                found.append(Trip(None, None, None))
                continue
            back = self.undo(i, self.values[i + 1])
            again, _ = self._on_stage(i, self._forward, back)
            below = self.undo(i, below)
            found.append(Trip(self.error(i, back), self.error(i + 1, again), self.error(i, below)))
            below = self.values[i] if i in stored else below
        return found[::-1]


# ---- gradients -------------------------------------------------------------------------------------------------------


class Gradient(NamedTuple):
    """The gradient of one tensor by the lowered op, against plain autograd.

    Attributes:
        name: The tensor.
        error: The relative error of its gradient; relative to a hundredth of the largest gradient where it is smaller
            than that: the bias before a normalisation has a gradient that is rounding alone.
        cosine: The cosine of the angle between the two; None where the gradient is that small.
    """

    name: str
    error: float
    cosine: float | None


def compared_gradients(
    plain: Invertible, lowered: Invertible, run: Run
) -> tuple[tuple[Gradient, ...], list[tuple[Gradient, ...]]]:
    """The gradients of the inputs, and, for each stage, of the tensors that it closes over and no stage before it."""
    owned = _closed_by_stage(run)
    closed = [tensor for stage in owned for tensor in stage.values()]
    _, gx, found = gradients_of(lowered, run.values[0], closed)
    _, expected_gx, expected = gradients_of(plain, run.values[0], closed)
    noise = 0.01 * max((length(g) for g in (*expected_gx, *expected)), default=0.0)
    names = [f"input {i}" for i in range(len(gx))]
    inputs = tuple(map(partial(_against, noise), names, gx, expected_gx))
    pairs = iter(zip(found, expected, strict=True))
    return inputs, [tuple(_against(noise, name, *next(pairs)) for name in stage) for stage in owned]


def _against(noise: float, name: str, found: Tensor, expected: Tensor) -> Gradient:
    if (size := length(expected)) < noise:
        return Gradient(name, relative_error(found, expected) * (size or 1.0) / noise, None)
    return Gradient(name, relative_error(found, expected), cosine(found, expected))


def _closed_by_stage(run: Run) -> list[dict[str, Tensor]]:
    """By stage and name: the leaf tensors that plain autograd reaches from a stage's output, each once."""
    known: set[int] = set()
    found: list[dict[str, Tensor]] = []
    for stage, x in zip(run.stages, run.values, strict=False):
        names = _names(stage)
        with torch.enable_grad(), same_dice():
            y = stage.forward(map_wire(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, x))
        closed = graph_leaves([leaf for leaf in leaves(y) if isinstance(leaf, Tensor)], known)
        found.append({})
        for tensor in closed:
            known.add(id(tensor))
            shown = names.get(id(tensor), f"tensor {len(found[-1])} of shape {tuple(tensor.shape)}")
            found[-1][shown] = tensor
    return found


def _names(stage: Invertible) -> dict[int, str]:
    """What the parameters of a stage are called, by the function of a coupling that has them."""
    found: dict[int, str] = {}
    for part in _primitives(stage):
        prefix = f"{part.label}." if isinstance(part, Half) else ""
        for module in Parts(part.functions).roots:
            for name, parameter in module.named_parameters():
                found.setdefault(id(parameter), prefix + name)
    return found


# ---- pullbacks -------------------------------------------------------------------------------------------------------


def pullback_gradients(stage: Invertible, x: Wire) -> tuple[Gradient, ...]:
    """The gradients by the pullbacks of a stage, against autograd's: ordinary autograd does not call them."""
    return tuple([gradient for op, given in _with_pullbacks(stage, x) for gradient in _by_pullback(op, given)])


def _with_pullbacks(op: Invertible, x: Wire) -> Iterator[tuple[Invertible, Wire]]:
    """The parts of an op that have a pullback of their own, each with what goes into it."""
    if isinstance(op, Chain):
        for part in op.parts:
            yield from _with_pullbacks(part, x)
            with torch.no_grad(), same_dice():
                x = part.forward(x)
    elif isinstance(op, Parallel):
        for part, component in zip(op.parts, x, strict=True):
            yield from _with_pullbacks(part, component)
    elif isinstance(op, Half) or (isinstance(op, Pair) and op.pullback_fn is not None):
        yield op, x


def _by_pullback(op: Invertible, x: Wire) -> Iterator[Gradient]:
    closed, live, names = closed_over(op, x), LiveVJP(), _names(op)
    _, gx, gclosed = gradients_of(op, x, closed)
    with torch.no_grad(), same_dice():
        y, residue = op.forward_with_residue(x)
    with same_dice():
        _, pulled = op.pull(residue, y, noise(y), live, None)
    given = leaves(x)
    pulled = [None] * len(given) if pulled is None else leaves(pulled)
    found = [g for g, leaf in zip(pulled, given, strict=True) if is_differentiable(leaf)]
    found += [live.closed[id(t)][1] if id(t) in live.closed else None for t in closed]
    shown = [f"input {i}" for i in range(len(gx))]
    shown += [names.get(id(t), f"a tensor of shape {tuple(t.shape)}") for t in closed]
    expected = [*gx, *gclosed]
    least = 0.01 * max(map(length, expected), default=0.0)
    for name, mine, theirs in zip(shown, found, expected, strict=True):
        yield _against(least, name, torch.zeros_like(theirs) if mine is None else mine, theirs)


# ---- replay: rule 4 of NOTE [Diagnosis] ------------------------------------------------------------------------------


Outcome: TypeAlias = float | str  # the relative error of what a replay gave, or what it raised


@dataclass(frozen=True)
class Hazard:
    """What may be different in backward.

    Attributes:
        record: Around the recorded call.
        between: What happens between it and its replay.
        replay: Around the replay.
        changed: What becomes of its input.
        with_gradients: Whether the replay builds a graph.
    """

    record: Callable[[Wire], AbstractContextManager[Any]] = lambda x: nullcontext()
    between: Callable[[Invertible, Wire], Any] = lambda op, x: None
    replay: Callable[[], AbstractContextManager[Any]] = nullcontext
    changed: Callable[[Wire], Wire] = lambda x: x
    with_gradients: bool = False


def _autocast(x: Wire) -> AbstractContextManager[Any]:
    device = next((leaf.device.type for leaf in leaves(x) if isinstance(leaf, Tensor)), "cpu")
    return torch.autocast(device, dtype=torch.bfloat16)


def _other_threads() -> AbstractContextManager[Any]:
    return threads(1 if torch.get_num_threads() > 1 else 2)


def _relaid(x: Wire) -> Wire:
    """The same numbers, at other strides."""
    return map_wire(lambda leaf: torch.stack([leaf, leaf], -1)[..., 0] if isinstance(leaf, Tensor) else leaf, x)


def _draw(op: Invertible, x: Wire) -> None:
    torch.rand(7)


def _move_buffers(op: Invertible, x: Wire) -> None:
    with torch.no_grad():
        op.forward(x)


HAZARDS: dict[str, Hazard] = {
    "again": Hazard(),
    "grad mode": Hazard(with_gradients=True),
    "layout": Hazard(changed=_relaid),
    "threads": Hazard(replay=_other_threads),
    "random numbers": Hazard(between=_draw),
    "buffers": Hazard(between=_move_buffers),
    "autocast": Hazard(record=_autocast),
}
"""What a replay has to stand: nothing else, gradients on, other strides, another number of threads, numbers drawn in
between, buffers moved in between, autocast left."""


def replays(stage: Invertible, x: Wire) -> dict[str, Outcome]:
    """How a recorded call of a stage is replayed under every hazard; what can not be replayed at all is tried once."""
    found: dict[str, Outcome] = {}
    for name, hazard in HAZARDS.items():
        found[name] = _replayed(stage, x, hazard)
        if name == "again" and found[name] != 0.0:
            return found
    return found


def _replayed(stage: Invertible, x: Wire, hazard: Hazard) -> Outcome:
    try:
        with same_dice():
            with hazard.record(x):
                call = RecordedCall(stage, x)
            hazard.between(stage, x)
            with hazard.replay(), torch.no_grad():
                again = call.again(hazard.changed(x), hazard.with_gradients)
        return relative_error(again, call.y)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# ---- what amplifies --------------------------------------------------------------------------------------------------


def scale_of(stage: Invertible, x: Wire) -> float:
    """The largest factor by which the affine couplings of a stage scale, or divide; 1 where there are none."""
    found = 1.0
    with torch.no_grad(), same_dice():
        for part in _primitives(stage):
            if isinstance(part, Half) and isinstance(part.law.original(), Affine):
                s = spread(part.fn, x[1 - part.target])[0].abs()
                found = max(found, float(s.max()), float(1 / s.min()))
            x = part.forward(x)
    return found
