"""The plan: a frozen value that says what to do with each op, and what that is expected to cost."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpointed, checkpoint
from ..core.context import Context
from ..core.op import Invertible, lift
from ..engine.interface import Options
from ..errors import OptionError
from ..functions import CheckpointedFunction
from ..look.memory import measure
from ..wires import Wire, is_differentiable, leaves, map_wire
from . import report
from .clock import least_seconds
from .costs import Costs, parse_bytes, show_bytes
from .executor import Planned, flat_ops, grouped, keeping_options
from .inputs import check_is_real, is_real
from .model import Blocks, function_of, in_context, planned_as, with_blocks, with_forward
from .profiling import bytes_only, key_of, mean_square, profile, shape_key
from .schedule import (
    Prediction,
    Recompute,
    Schedule,
    check,
    fixed_schedules,
    from_data,
    predict,
    recompute_every,
    to_data,
)
from .search import Limits, Point, best, curve_of
from .sweeps import relative
from .trials import Loss, number_of, parameters_of, untouched

TRIES = 6  # how often a plan whose gradients are off is made again, at last with bit-exact inverses alone


class Verified(NamedTuple):
    """What a plan did on a batch: the worst tensor's relative gradient error, the peak, and the time over plain.

    The peak is that of a training step, beside what `Plan.peak_bytes` leaves out.
    """

    error: float
    peak_bytes: int
    time: float


@dataclass(frozen=True)
class Plan:
    """What to do with each op of a chain: store, recompute or invert; made by `invfunc.plan`.

    A plan is never changed behind your back, since another schedule rounds otherwise. Print it to see what it does.

    Attributes:
        schedule: The tree of choices.
        costs: What they were made from.
        limits: What they keep to.
        f: The op that was planned, if one was given.

    Example:
        >>> import torch, invfunc as inv
        >>> costs = profile(inv.chain(inv.pair(torch.exp, torch.log), torch.tanh), (16, 8))
        >>> inv.plan(costs, max_time=1.0).modes
        (('store', 0), ('store', 1))
    """

    schedule: Schedule
    costs: Costs
    limits: Limits = Limits()
    f: Invertible | Callable[..., Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check(self.costs, self.schedule)

    # ---- what it costs ----

    @cached_property
    def predicted(self) -> Prediction:
        """Seconds, peak, error, and the op whose moment the peak is."""
        return predict(self.costs, self.schedule)

    @property
    def time(self) -> float:
        """The time of a step over that of a plain one."""
        return self.predicted.seconds / self.costs.seconds if self.costs.seconds else 1.0

    @property
    def peak_bytes(self) -> int:
        """The most memory of a step, beside the input, the parameters and the ``grad`` of both; the output counts."""
        return self.predicted.peak_bytes

    @property
    def error(self) -> float | None:
        """The relative gradient error to expect; 0.0 if no inverse rounds, None if it was not profiled."""
        return self.predicted.error

    @cached_property
    def curve(self) -> tuple[Point, ...]:
        """Least time against peak, from the least memory that was found to plain training."""
        return curve_of(self.costs, self.limits.max_error)

    @property
    def modes(self) -> tuple[Any, ...]:
        """The schedule as plain data: ``("store", i)``, ``("invert", i, k)``, ``("recompute", i, (...))``."""
        return _tuples(to_data(self.schedule))

    def with_modes(self, modes: Any) -> Plan:
        """The same with a schedule of one's own, in the form of `modes`."""
        return replace(self, schedule=from_data(modes))

    def at(self, budget: int | str) -> Plan:
        """The fastest plan of the same costs in another budget."""
        limits = replace(self.limits, budget=parse_bytes(budget), max_time=None)
        return Plan(best(self.costs, limits), self.costs, limits, self.f)

    def fixed(self) -> dict[str, Prediction]:
        """The fixed strategies, for comparison."""
        return {name: predict(self.costs, schedule) for name, schedule in fixed_schedules(self.costs).items()}

    def verify(
        self,
        x: Wire,
        f: Invertible | Callable[..., Any] | None = None,
        loss: Loss = mean_square,
        context: Context | None = None,
    ) -> Verified:
        """Run a plain and a planned step on a batch and compare.

        Args:
            x: The batch.
            f: The op, where the plan was made from costs alone.
            loss: What turns the output into a number.
            context: What the functions are told by name beside the input, as in ``op(x, context=...)``.

        Returns:
            The gradient error of the worst tensor, the measured peak, and the time over plain.
        """
        given = self.f if f is None else f
        if given is None:
            raise OptionError("plan.verify: the plan was made from costs alone", cure="pass the op: plan.verify(x, f)")
        given = given if context is None else in_context(given, context)
        check_is_real(x)
        batch, x, fast, op = x, _leaves(x), lift(checkpoint(given, plan=self)), lift(given)
        with untouched(op):
            weights = parameters_of(op, x)
            exact, found = (gradients(g, x, loss, weights) for g in (op, fast))
            peak = peak_of_step(fast, _leaves(batch, not weights), loss, weights)
            plain, planned = least_seconds([partial(gradients, g, x, loss, weights) for g in (op, fast)], 3, x)
        return Verified(distance(found, exact), peak, planned / plain)

    # ---- what it is for ----

    def lowered(self, f: Invertible | Callable[..., Any], options: Options) -> Any:
        """What ``checkpoint(f, plan=plan)`` returns: an op for an op, and a module of the same parameters for a module.

        Raises:
            OptionError: When the plan is for another one.
        """
        found = planned_as(f)
        if isinstance(found, Blocks):
            return self._in_blocks(found, options)
        op = Checkpointed(self.applied_to(found), options)
        if isinstance(f, nn.Sequential):
            return PlannedForward.of(f, self, op)
        return with_forward(f, op) if isinstance(f, nn.Module) else op

    def recomputed(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """The paths of the blocks of a model that run again, each with the options that it has by this plan.

        Raises:
            OptionError: When the plan is for another model, or for one without a list of blocks.
        """
        found = planned_as(model)
        if not isinstance(found, Blocks):
            raise OptionError(
                f"{type(model).__name__} is planned as a chain",
                expected="a model with a list of blocks",
                cure="inv.checkpoint(model, plan=plan) returns one that runs as planned",
            )
        ways = zip(found.paths, self._ways(found, Options()), strict=True)
        return {path: {} if how.keep is None else {"keep": how.keep} for path, how in ways if how is not None}

    def _in_blocks(self, blocks: Blocks, options: Options) -> nn.Module:
        """A model whose blocks are stored or run again; in the costs, its ends stand around them."""
        ways = self._ways(blocks, options)

        def lower(i: int, block: nn.Module) -> nn.Module:
            how = ways[i]
            return block if how is None else with_forward(block, CheckpointedFunction(function_of(block), how))

        return with_blocks(blocks, lower)

    def _ways(self, blocks: Blocks, options: Options) -> list[Options | None]:
        """Of each block, how it runs again; None if it does not."""
        got = " > ".join(blocks.names)
        if self.costs.key[:1] != (got,):
            raise self._is_for_another((*self.costs.key, "another op")[0], got)
        found: list[Options | None] = []
        for node, op in zip(self.schedule[1:-1], self.costs.ops[1:-1], strict=True):
            keeps = isinstance(node, Recompute) and node.keeps
            again = keeping_options(options, op.keep) if keeps else options
            found += [again if isinstance(node, Recompute) else None] * op.parts
        return found

    def applied_to(self, op: Invertible) -> Planned:
        """An op that runs as planned.

        Raises:
            OptionError: When the plan is for another one.
        """
        ops, count = flat_ops(op), sum(c.parts for c in self.costs.ops)
        expected = self.costs.key[0] if self.costs.key else f"{count} ops"
        got = key_of(op, ())[0] if self.costs.key else f"{len(ops)} ops"
        if len(ops) != count or expected != got:
            raise self._is_for_another(expected, got)
        return Planned(op, self, grouped(ops, [c.parts for c in self.costs.ops]))

    def _is_for_another(self, expected: str, got: str) -> OptionError:
        cure = "plan again: inv.plan(f, x, ...)"
        return OptionError("this plan is for another op", expected=expected, got=got, cure=cure)

    def check_shape(self, ops: tuple[Invertible, ...], x: Wire) -> None:
        """Warn when an input of another shape than the planned one will take more than the budget."""
        if len(self.costs.key) < 2 or shape_key(x) == self.costs.key[1]:
            return
        limit = self.limits.budget or self.peak_bytes
        peak = predict(bytes_only(ops, x), self.schedule).peak_bytes
        if peak > limit:
            warnings.warn(
                f"the plan is for {self.costs.key[1]}; with {shape_key(x)} it takes {show_bytes(peak)}, more than "
                f"{show_bytes(limit)}; plan again for this shape",
                stacklevel=2,
            )

    # ---- as text ----

    def __str__(self) -> str:
        return report.text(self)

    def plot(self, figure: Any = None) -> Any:
        """Draw the curve with the fixed strategies, and the memory over a step; needs matplotlib."""
        return report.plot(self, figure)

    def to_json(self) -> str:
        """The plan as text; `from_json` reads it back."""
        data = {
            "schedule": to_data(self.schedule),
            "limits": vars(self.limits),
            "costs": json.loads(self.costs.to_json()),
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` has written.

        Raises:
            OptionError: When the text is not that of a plan.
        """
        try:
            data = json.loads(text)
            limits = Limits(**data["limits"])
            return cls(from_data(data["schedule"]), Costs.from_dict(data["costs"]), limits)
        except (TypeError, KeyError, ValueError) as error:
            if isinstance(error, OptionError):
                raise
            raise OptionError("this is not a plan", expected="what Plan.to_json wrote", got=str(error)) from error

    def save(self, path: str | Path) -> None:
        """Write the plan to a file."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan that `save` has written."""
        return cls.from_json(Path(path).read_text())


@dataclass(eq=False, repr=False)
class PlannedForward:
    """The forward of a sequence that runs as planned: of the children that it has when it is called.

    Raises:
        OptionError: In a call, when they are no longer those that the plan is for.
    """

    module: nn.Sequential
    plan: Plan
    lowered: Checkpointed
    __code__ = property(lambda self: type(self).__call__.__code__)  # torch.export asks for it

    @classmethod
    def of(cls, f: nn.Sequential, plan: Plan, lowered: Checkpointed) -> nn.Sequential:
        """A module with the same parameters, which has it."""
        module = with_forward(f, lowered)
        module.__dict__["forward"] = cls(module, plan, lowered)
        return module

    def __call__(self, *xs: Wire) -> Wire:
        """Run the children."""
        op = planned_as(self.module)
        assert isinstance(op, Invertible)
        if self.lowered.op.op != op:  # pyright: ignore[reportAttributeAccessIssue]
            self.lowered = Checkpointed(self.plan.applied_to(op), self.lowered.options)
        return self.lowered(*xs)

    def __repr__(self) -> str:
        return repr(self.lowered)


def _tuples(data: Any) -> Any:
    return tuple(map(_tuples, data)) if isinstance(data, list) else data


def gradients(op: Callable[..., Any], x: Wire, loss: Loss, weights: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a step: of the input, and of what the op's functions close over; each step draws the same."""
    torch.manual_seed(0)
    inputs = [t for t in leaves(x) if is_differentiable(t)]
    found = torch.autograd.grad(number_of(loss, op(x)), [*inputs, *weights], allow_unused=True)
    return [t.new_zeros(()) if g is None else g for t, g in zip([*inputs, *weights], found, strict=True)]


def peak_of_step(op: Callable[..., Any], x: Wire, loss: Loss, weights: Sequence[Tensor]) -> int:
    """The peak of a step beside every ``grad``: gradients are added to those that are there, and not kept besides."""
    inputs = [*(t for t in leaves(x) if is_differentiable(t) and t.requires_grad), *weights]
    before = [t.grad for t in inputs]
    for t in inputs:
        t.grad = torch.zeros_like(t)

    def step() -> None:
        y = op(x)  # the caller's until backward is through
        torch.autograd.backward(number_of(loss, y), inputs=inputs)

    try:
        return measure(step).peak_bytes
    finally:
        for t, grad in zip(inputs, before, strict=True):
            t.grad = grad


def distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max((relative(a, b) for a, b in zip(found, exact, strict=True)), default=0.0)


def _leaves(x: Wire, need_gradients: bool = True) -> Wire:
    """A batch by itself; its tensors need gradients, or do as they did."""
    return map_wire(
        lambda t: t.detach().requires_grad_(need_gradients or t.requires_grad) if is_differentiable(t) else t, x
    )


# ---- making one ------------------------------------------------------------------------------------------------------


def plan(
    f: Invertible | Callable[..., Any] | Costs,
    x: Any = None,
    *,
    budget: int | str | None = None,
    max_time: float | None = None,
    max_error: float | None = None,
    loss: Loss = mean_square,
    context: Context | None = None,
) -> Plan:
    """The best way to train a chain within limits: what to store, what to recompute, what to invert.

    What is not limited is what is made small: with ``budget``, the time; with ``max_time``, the memory; with both, the
    gradient error. ``max_error`` may be added to either.

    Args:
        f: A chain of ops, or the `Costs` of one. Or a model as it is: an `nn.Sequential` is a chain of its children; of
            another one with an `nn.ModuleList` of blocks, each block is stored or run again, and the rest is stored.
        x: An input, real or fake, or its shape; none with costs. It requires grad if the model's will, as one from a
            shape does: in front of frozen layers that decides what is saved.
        budget: The most memory of a step, in bytes or as ``"2GiB"``, beside the input, the parameters and the
            ``grad`` of both. The output counts: the caller is taken to hold it until backward is through.
        max_time: The most time of a step, over that of a plain one.
        max_error: The largest relative gradient error of a run of inverses. An estimate, not a bound: with a real x the
            plan is verified on it and made stricter until it holds there; `Plan.verify` tries another batch.
        loss: What turns the output into a number.
        context: What the functions are told by name beside the input, as in ``op(x, context=...)``.

    Returns:
        A frozen `Plan`; print it, and hand it to ``invfunc.checkpoint(f, plan=plan)``, which makes an op of an op, and
        of a model another one with the same parameters.

    Raises:
        OptionError: When nothing or everything is limited, or the limits can not be met; the message says what can.
            When a model has no blocks, or they are no chain.

    Example:
        >>> import torch, invfunc as inv
        >>> block = inv.couple(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> f = inv.chain(inv.split(2), *[block] * 6, inv.concat(2))
        >>> plan = inv.plan(f, (512, 16), max_time=10.0)
        >>> inv.checkpoint(f, plan=plan)(torch.randn(512, 16)).sum().backward()

    Limits:
        Of a model's blocks no two are one region, since a loop that is not seen lies between them; write the model as
        a chain where memory is short. Of several lists, the one with the most parameters is planned.
        Bytes and seconds are those of a plan that runs as written. Under ``torch.compile`` values and gradients are the
        same, but a region that is run again keeps its whole tape meanwhile, whatever the plan has chosen inside.
        The least budget that an error names is the least that was found, and is accepted; since the search counts bytes
        in coarse units, a plan for some percent less may exist.

    Source:
        Herrmann et al., Optimal checkpointing for heterogeneous chains (2019), with a third choice, the inverse.
    """
    limits = Limits(None if budget is None else parse_bytes(budget), max_time, max_error)
    _check_limits(limits)
    if isinstance(f, Costs):
        return Plan(best(f, limits), f, limits)
    if x is None:
        raise OptionError("plan: no input", expected="plan(f, x, ...), or plan(costs, ...)", cure="x may be a shape")
    by_error = max_error is not None or (budget is not None and max_time is not None)
    told = f if context is None else in_context(f, context)
    costs = profile(told, x, loss=loss, errors=by_error)
    found = Plan(best(costs, limits), costs, limits, f)
    is_bound = max_error is not None and found.error and is_real(x)
    return verified(found, lift(told), _leaves(x), loss) if is_bound else found


def _check_limits(limits: Limits) -> None:
    given = [name for name, value in vars(limits).items() if value is not None]
    if given in ([], ["max_error"]) or len(given) == 3:
        raise OptionError(
            f"plan: {'everything' if len(given) == 3 else ' and '.join(given) or 'nothing'} is limited",
            expected="budget (for the least time), max_time (for the least memory), or both (for the least error)",
            cure="leave one out" if len(given) == 3 else "max_error may be added to budget or to max_time",
        )
    for name in ("max_time", "max_error"):
        value = getattr(limits, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value < math.inf):
            raise OptionError(f"plan: {name} is {value!r}", expected="a number, not negative")


def verified(found: Plan, f: Invertible, x: Wire, loss: Loss) -> Plan:
    """Stricter and stricter, until the gradients on this batch keep to the limit; they are compared with exact ones."""
    limits, costs = found.limits, found.costs
    limit = strict = limits.max_error or 0.0
    with untouched(f):
        weights = parameters_of(f, x)
        anchored = recompute_every(costs, max(math.isqrt(len(costs.ops)), 1))  # plain training may not fit
        exact = gradients(checkpoint(f, plan=replace(found, schedule=anchored)), x, loss, weights)
        for tries in range(TRIES):
            error = distance(gradients(checkpoint(f, plan=found), x, loss, weights), exact)
            if error <= limit or found.error == 0:
                break
            strict = min(strict, found.error or strict) * limit / error / 2 if tries < TRIES - 1 else 0.0
            found = replace(found, schedule=best(costs, replace(limits, max_error=strict)))
    return found


__all__ = ["Limits", "Plan", "Point", "Verified", "plan"]
