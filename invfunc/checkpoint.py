"""The transformer: `checkpoint` lowers a pipeline, or any plain function, into memory-freeing autograd nodes."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from . import _torch
from .core.context import Context, bind
from .core.op import VJP, Again, Invertible, OneWay, Pair, Residue, check_op, name_of, pair
from .engine import compiled
from .engine.interface import Options, Run, State
from .engine.keep import check_keep
from .engine.lower import lower, walk
from .engine.meter import Drift, check_drift
from .engine.mode import check_mode, current, forced_mode
from .engine.stream import is_one_way, widen, with_stream
from .errors import NotInvertibleError, OptionError
from .functions import CheckpointedFunction, global_name, set_names
from .wires import Wire

# ---- lowered and marked values ---------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Wrapper(Invertible):
    """An op that changes how another is lowered, and not what it means."""

    op: Invertible

    def forward_with_residue(self, x: Wire) -> tuple[Wire, Residue]:
        return self.op.forward_with_residue(x)

    def inverse_with_residue(self, residue: Residue, y: Wire) -> Wire:
        return self.op.inverse_with_residue(residue, y)

    def pull(self, residue: Residue, y: Wire, gy: Wire, vjp: VJP, needs: Wire | None) -> tuple[Wire, Wire]:
        return self.op.pull(residue, y, gy, vjp, needs)

    def rebuild(self, residue: Residue, y: Wire, again: Again) -> Wire:
        return self.op.rebuild(residue, y, again)

    def mapped(self, change: Callable[[Invertible], Invertible]) -> Invertible:
        """The same around what is made of its op."""
        return replace(self, op=change(self.op))

    @property
    def parts(self) -> tuple[Invertible, ...]:
        return (self.op,)

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        return self.op.functions


@bind.register
def _(op: Wrapper, context: Context) -> Invertible:
    return op.mapped(lambda part: bind(part, context))


@dataclass(frozen=True, repr=False)
class Checkpointed(Wrapper):
    """A lowered op; built by `checkpoint`."""

    options: Options = Options()

    def forward(self, x: Wire) -> Wire:
        stream = self.options.stream
        if stream is not None and not is_one_way((self.op.parts or (self.op,))[0]):
            x = widen(x, stream)
        return lower(self.streamed, x, current(self.options))

    def undo(self, y: Wire) -> Wire:
        return self.inverted().forward(y)

    @property
    def streamed(self) -> Invertible:
        """The op, whose stems return what ``stream`` says."""
        return self.op if self.options.stream is None else with_stream(self.op, self.options.stream)

    def inverted(self) -> Invertible:
        segments = self.options.segments
        if not isinstance(segments, int):
            segments = tuple(len(self.op.parts) - cut for cut in reversed(segments))
        return Checkpointed(self.op.inverted(), replace(self.options, segments=segments))

    def __call__(self, *xs: Wire, context: Mapping[str, Any] | None = None, **kwargs: Any) -> Wire:
        """``op(*xs)``, in a context; other keyword arguments go to both functions of a pair."""
        if not kwargs:
            return super().__call__(*xs, context=context)
        if not isinstance(self.op, Pair):
            raise OptionError(
                f"{self!r} got keyword arguments {sorted(kwargs)}", expected="none: only functions take them"
            )
        forward_fn, inverse_fn = partial(self.op.forward_fn, **kwargs), partial(self.op.inverse_fn, **kwargs)
        return replace(self, op=replace(self.op, forward_fn=forward_fn, inverse_fn=inverse_fn))(*xs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self if global_name(self) else super().__deepcopy__(memo)

    def __reduce__(self) -> Any:
        """A decorated function is pickled by its name, as functions are."""
        return global_name(self) or (copyreg.__newobj__, (Checkpointed,), vars(self))  # pyright: ignore

    def __repr__(self) -> str:
        given = {k: v for k, v in vars(self.options).items() if v != getattr(Options(), k)}
        if isinstance(given.get("segments"), tuple):
            given = {"cuts" if k == "segments" else k: v for k, v in given.items()}
        return f"checkpoint({', '.join([repr(self.op), *(f'{k}={v!r}' for k, v in given.items())])})"


@walk.register
def _(op: Checkpointed, state: State, run: Run) -> State:
    return walk(op.streamed, state, run if forced_mode() else in_mode(run, op.options.mode))


def in_mode(run: Run, mode: str) -> Run:
    """A walk in another mode."""
    return run if run.options.mode == mode else run.under(replace(run.options, mode=mode))


@dataclass(frozen=True, repr=False)
class Marked(Wrapper):
    """An op with a mode of its own; built by `mark`."""

    mark: str
    marked = True

    def forward(self, x: Wire) -> Wire:
        return self.op.forward(x)

    def undo(self, y: Wire) -> Wire:
        return self.op.undo(y)

    def inverted(self) -> Invertible:
        return Marked(self.op.inverted(), self.mark)

    def __repr__(self) -> str:
        return f"mark({self.op!r}, {self.mark!r})"


@walk.register
def _(op: Marked, state: State, run: Run) -> State:
    return walk(op.op, state, run if forced_mode() else in_mode(run, op.mark))


def mark(op: Invertible | Callable[..., Any], mode: str) -> Invertible:
    """Give a part of a pipeline a mode of its own, for when the pipeline is lowered.

    .. math:: mark(f, mode) = f

    Args:
        op: The part; the innermost mark wins. A plain callable or module becomes a `one_way` stage, whose input is
            stored in mode ``"invert"``.
        mode: One of the words of `mode`: ``"store"`` runs the part as plain autograd, ``"recompute"`` runs it again
            from its stored input, ``"invert"`` rebuilds it by its inverse where the pipeline has another mode.

    Cost:
        ``"store"`` keeps the part's activations, and one at its entry; nothing is evaluated again. ``"recompute"``
        keeps one at its entry and one at its exit; backward evaluates it once more, with its tape. ``"invert"`` keeps
        nothing of the size of an activation; backward evaluates the inverse once.

    Raises:
        OptionError: When the mode is none of these words.

    Example:
        >>> import torch, invfunc as inv
        >>> inv.mark(torch.tanh, "recompute")
        mark(one_way(tanh), 'recompute')
        >>> body = inv.pair(torch.sinh, torch.asinh)
        >>> fast = inv.checkpoint(inv.chain(body, inv.mark(body, "store"), body))
    """
    return Marked(_lift(op), check_mode(mode))


def _lift(op: Invertible | Callable[..., Any]) -> Invertible:
    return op if isinstance(op, Invertible) else OneWay(op)


@dataclass(frozen=True, repr=False)
class CompiledStages(Wrapper):
    """An op whose stages are compiled one by one; built by `compile_stages`."""

    step: compiled.Steps

    def forward(self, x: Wire) -> Wire:
        return self.op.forward(x)

    def undo(self, y: Wire) -> Wire:
        return self.op.undo(y)

    def inverted(self) -> Invertible:
        return CompiledStages(self.op.inverted(), self.step)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.step.options.items())
        return f"compile_stages({self.op!r}{options})"


@walk.register
def _(op: CompiledStages, state: State, run: Run) -> State:
    if isinstance(run.engine, compiled.Traced) or _torch.active():
        return walk(op.op, state, run)
    engine = compiled.Traced(op.step)
    inner = Run(engine, run.options, run.path)
    y = engine.close(walk(op.op, engine.begin(run.engine.close(state), inner, partial(repr, op)), inner))
    return run.engine.begin(y, run, partial(repr, op))


def compile_stages(op: Invertible, **options: Any) -> Invertible:
    """Compile the forward and the backward of every stage of a lowered pipeline on their own.

    .. math:: checkpoint(compile(f)) = checkpoint(f)

    Args:
        op: The op, lowered or not: ``compile_stages(checkpoint(op)) = checkpoint(compile_stages(op))``.
        options: Of `torch.compile`: ``backend``, ``mode``, ``dynamic``, ...

    Cost:
        One graph for the forward and one for the backward of each kind of stage, so that compiling takes as long at
        depth 64 as at depth 4; a graph of the whole model (``torch.compile(model)``) takes time for every stage, and
        fuses across them. What is kept is as without it; the stages are called from Python.

    Raises:
        NotInvertibleError: When it is no op; a module has one, ``module.op``.

    Limits:
        Random numbers other than dropout's, and global tensors that require grad, raise (as they do in
        ``torch.compile``), and so do exact ops that are inverted. Below a `torch.func` transform and in double backward
        nothing is compiled; inside of an outer ``torch.compile`` the stages become part of its graph.

    Example:
        >>> import torch, invfunc as inv
        >>> net = inv.chain(inv.split(2), inv.couple(torch.nn.Linear(2, 2)), inv.concat(2))
        >>> inv.compile_stages(inv.checkpoint(net), backend="eager")
        checkpoint(compile_stages(chain(split(2, dim=1), couple(Linear), concat(2, dim=1)), backend='eager'))
    """
    if isinstance(op, Checkpointed):
        return op.mapped(partial(compile_stages, **options))
    return CompiledStages(check_op("compile_stages", op), compiled.Steps(options))


# ---- the transformer ------------------------------------------------------------------------------------------------


def checkpoint(
    f: Invertible | Callable[..., Any] | None = None,
    inverse: Callable[..., Any] | None = None,
    *,
    mode: str = "invert",
    segments: int = 1,
    cuts: Sequence[int] = (),
    drift: Drift = "warn",
    donate: bool | Sequence[int] = False,
    preserve_rng_state: bool = True,
    determinism_check: str = "default",
    early_stop: bool = True,
    keep: Any = None,
    context_fn: Callable[[], tuple[Any, Any]] | None = None,
    debug: bool = False,
    stream: torch.dtype | None = None,
    plan: Any = None,
) -> Any:
    r"""Lower a pipeline, or any plain function, so that its activations are freed and rebuilt in backward.

    .. math:: checkpoint(f) = f \quad \text{in value and in every gradient}

    Args:
        f: An op, or any function or module. Usable as a decorator, bare or with arguments.
        inverse: With a plain function: its inverse, so that its input is rebuilt instead of stored. Without one, the
            inputs are stored and the function runs again in backward; it may take and return anything.
        mode: ``"invert"``, ``"store"`` or ``"recompute"``: the default for parts without a mark of their own.
        segments: Into how many trunks of equal length to cut the chain. Each cut stores one activation; it shortens
            what rounding accumulates over, and in mode ``"recompute"`` the region that is run again.
        cuts: In place of a number: before which of the chain's parts to cut. `invfunc.look.calibrate` finds the fewest
            that keep what is rebuilt within a tolerance.
        drift: What to do when the first wire of a trunk is rebuilt too far from what it was, estimated from 64 of its
            values, or any of its numbers is no longer finite: ``"warn"`` (a `DriftWarning`), ``"raise"`` (a
            `DriftError`) or ``"off"``; from a relative error of 1e-6 on in float64, 1e-3 in float32, 3e-2 in half
            precision. A number warns from that on. On a device nothing waits for the numbers: a warning may come in the
            next step. Only ``"raise"`` waits, in the backward of each trunk, since its error belongs there.
        donate: Free the storage of the input, too, until backward rebuilds it: True, or the places on the wire.
        preserve_rng_state: Replay the random numbers of forward. Switch off where nothing is random.
        determinism_check: Whether the shapes and dtypes of what a function saves when it runs again are compared with
            forward (``"default"``) or not (``"none"``), as in `torch.utils.checkpoint`. Their number always is.
        early_stop: Whether a function that runs again stops with the last tensor that backward needs of it: a
            recomputed one, and the first of a pipeline, whose input nobody needs.
            `torch.utils.checkpoint.set_checkpoint_early_stop` goes before it. As with torch's own, a function whose
            last operator fills what it has saved while it runs, as `torch.nn.RReLU` does its noise, needs False.
        keep: Which results are kept from forward in place of being computed again, in the functions of couplings as
            well: operators of ``torch.ops.aten`` and names that `keep` gives, or a policy as in
            `torch.utils.checkpoint.create_selective_checkpoint_contexts`. An operator that writes into what it is given
            runs again. Below a `torch.func` transform, in a compiled graph and in an exact op nothing is kept.
        context_fn: Returns two context managers for every call of a function: one around it, one around its replay.
        debug: Whether an error of a function that is not the same twice tells the first operator that differs.
            `torch.utils.checkpoint.set_checkpoint_debug_enabled` goes before it.
        stream: The least dtype of what is rebuilt: the input, and what a `one_way` stage returns to one that is not,
            are made as wide. With ``torch.float32`` a stem under autocast does not make the stream half precision,
            which would round at every stage; without it, such a call warns.
        plan: What to do with each op of the chain, from `invfunc.plan`, in place of mode, segments and cuts.

    Returns:
        An op for an op or a function with an inverse: it composes, inverts, and ``checkpoint`` of it is itself. A
        function with the name and signature of ``f`` otherwise.

    Cost:
        Mode ``"invert"`` keeps the output alone, whatever the depth; backward evaluates each coupling function once
        (4/3 of plain training's flops) and other ops forward and inverse once each. Mode ``"recompute"`` keeps one
        input a segment. Without gradients to compute, it is the plain function.

    Raises:
        ReplayError: In backward, when a function does not do what it did in forward.
        DriftError: With ``drift="raise"``, in the backward that drifted.
        DonatedError: When a donated tensor can not be freed, or is read while it is empty.
        DriftWarning: With ``drift="warn"``, likewise, with the cause: rounding, a wrong inverse, or a function that is
            not the same twice. To find it, the trunk runs some more times, once for each function and message.
        OptionError: When an option is not one of those above, or a drift is asked for that the dtype can not show.

    Limits:
        Rebuilding by inverse rounds: `invfunc.check` measures how far, stage by stage. Keep streams in fp32.
        With a stream of its own, values are those of the op whose stream is as wide: not those of ``f`` itself.
        Of what is not finite an inverse makes NaN, also in finite numbers beside it. Where a loss leaves them out,
        gradients may be NaN, or finite and wrong, which the drift meter tells: mask the input, not the loss alone.

    Example:
        >>> import torch, invfunc as inv
        >>> block = inv.couple(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> fast = inv.checkpoint(inv.chain(inv.split(2), *[block] * 8, inv.concat(2)))
        >>> fast(torch.randn(3, 8)).sum().backward()
        >>> @inv.checkpoint
        ... def mlp(x, *, scale=1.0):
        ...     return torch.tanh(scale * x)
        >>> mlp(torch.zeros(2), scale=2.0)
        tensor([0., 0.])

    Source:
        Chen et al., Training Deep Nets with Sublinear Memory Cost (2016); Gomez et al., RevNet (2017).
    """
    trunks = _checked_cuts(segments, cuts)
    given = donate if isinstance(donate, bool) else tuple(donate)
    options = Options(
        check_mode(mode),
        trunks,
        given,
        preserve_rng_state,
        check_drift(drift),
        _checked_check(determinism_check),
        early_stop,
        check_keep(keep),
        context_fn,
        debug,
        _checked_stream(stream),
    )
    if given and mode != "invert":
        raise OptionError(f"checkpoint: donate={donate} with mode={mode!r}", expected="mode 'invert': only it rebuilds")
    if plan is not None:
        if inverse is not None or replace(Options(), mode=mode, segments=trunks, donate=given) != Options():
            raise OptionError(
                "checkpoint: plan=... comes with other options",
                expected="f, plan, and neither inverse, mode, segments, cuts nor donate",
            )
        if not hasattr(plan, "lowered"):
            raise OptionError(f"checkpoint: plan is of type {type(plan).__name__}", expected="that of invfunc.plan")
        return plan.lowered(f, options)
    if f is None:
        return partial(_checkpoint, inverse=inverse, options=options)
    return _checkpoint(f, inverse, options)


def _checked_check(determinism_check: str) -> str:
    if determinism_check not in ("default", "none"):
        raise OptionError(f"checkpoint: determinism_check={determinism_check!r}", expected="'default' or 'none'")
    return determinism_check


def _checked_stream(stream: torch.dtype | None) -> torch.dtype | None:
    if stream is not None and not (isinstance(stream, torch.dtype) and stream.is_floating_point):
        raise OptionError(f"checkpoint: stream={stream!r}", expected="a floating-point dtype, such as torch.float32")
    return stream


def _checked_cuts(segments: int, cuts: Sequence[int]) -> int | tuple[int, ...]:
    """The number of trunks or, where cuts are given, before which parts they begin."""
    for name, value, kind, text in (
        ("segments", segments, int, "a number; cuts=... tells before which parts"),
        ("cuts", cuts, Sequence, "a sequence of places; segments=... is a number"),
    ):
        if not isinstance(value, kind) or isinstance(value, str):
            raise OptionError(f"checkpoint: {name}={value!r}", expected=text)
    if cuts and segments != 1:
        raise OptionError(f"checkpoint: segments={segments} with cuts={tuple(cuts)}", expected="one of the two")
    return tuple(cuts) or segments


def _checkpoint(f: Any, inverse: Callable[..., Any] | None, options: Options) -> Any:
    if isinstance(f, Invertible):
        return _checkpoint_op(f, inverse, options)
    if not callable(f):
        raise OptionError(f"checkpoint: got {type(f).__name__}", expected="an op, a function or a module")
    if inverse is None:
        if options.segments != 1 or options.donate or options.stream is not None:
            raise NotInvertibleError(
                f"checkpoint: {name_of(f)} has no inverse",
                cure="segments, cuts, donate and stream need an invertible op, or inverse=...",
            )
        return f if isinstance(f, CheckpointedFunction) else CheckpointedFunction(f, options)
    lowered = Checkpointed(pair(f, inverse), options)
    set_names(lowered, f)
    return lowered


def _checkpoint_op(op: Invertible, inverse: Callable[..., Any] | None, options: Options) -> Invertible:
    if inverse is not None:
        raise OptionError("checkpoint: inverse=... for an op", expected="an inverse for plain functions only")
    if isinstance(op, Checkpointed):
        return op if options in (op.options, Options()) else _checkpoint_op(op.op, None, options)
    _check_segments(op, options.segments)
    return Checkpointed(op, options)


def _check_segments(op: Invertible, segments: int | tuple[int, ...]) -> None:
    count = max(len(op.parts), 1)
    if isinstance(segments, int):
        name, fits, allowed = "segments", 1 <= segments <= count, f"a number from 1 to {count}"
    else:
        fits = list(segments) == sorted(set(segments)) and all(0 < cut < count for cut in segments)
        name, allowed = "cuts", f"increasing places from 1 to {count - 1}"
    if not fits:
        raise OptionError(f"checkpoint: {name}={segments} of an op with {count} parts", expected=allowed)
