"""What a program is, and how one is generated from a seed. A program is a value: its text is Python that makes it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from .functions import CLOSURES, FUNCTIONS, MOVES_BUFFERS, SLOW


@dataclass(frozen=True)
class Fn:
    """A function by its kind and the seed of its weights. Two that are equal are one and the same function."""

    kind: str
    seed: int


@dataclass(frozen=True)
class Stage:
    """A part of the chain, on two streams; or a part of a component, on one.

    Args:
        kind: See `stages.STAGES` and `nested.NESTED`.
        f: Its function.
        g: The second function of a coupling.
        law: Of a coupling: ``additive``, ``tanh_scale`` or ``sigmoid_scale``.
        mark: ``store``, ``recompute`` or ``invert``.
        wrap: What is around the op, below the mark: see `nested.WRAPS`.
        inner: The stages that it is made of.
    """

    kind: str
    f: Fn
    g: Fn | None = None
    law: str = "additive"
    mark: str | None = None
    wrap: str | None = None
    inner: tuple[Stage, ...] = ()

    def all(self) -> Iterator[Stage]:
        """It, and what is inside."""
        yield self
        for stage in self.inner:
            yield from stage.all()


@dataclass(frozen=True)
class Mutation:
    """What happens between two steps, or between a forward and its backward; see `mutations`."""

    kind: str
    at: int = 0  # which of the things that it could change
    seed: int = 0  # of the numbers that it draws


@dataclass(frozen=True)
class Step:
    """Something that is computed and compared.

    Args:
        kind: See `run.STEPS`.
        before: What is changed before it.
        midway: What is changed between its forward and its backward.
        batch: The size of the batch.
        layout: ``plain``, ``transposed``, ``sliced`` or ``expanded``.
        entry: Whether the input is a ``leaf`` that requires grad, an ``inner`` value of a graph, or ``data``.
        around: What surrounds forward: see `run.AROUND`.
        seed: Of the input and of the random numbers.
    """

    kind: str = "backward"
    before: tuple[Mutation, ...] = ()
    midway: tuple[Mutation, ...] = ()
    batch: int = 3
    layout: str = "plain"
    entry: str = "leaf"
    around: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Program:
    """A pipeline, and what is done with it.

    Args:
        stages: On two streams, between a split and a concat.
        steps: One after another, on the same modules.
        face: See `stages.FACES`.
        mode: ``invert``, ``recompute`` or ``store``.
        segments: Into how many trunks the chain is cut.
        side: Whether integers ride along, which every function sees through an embedding.
        interleaved: How the input is split.
    """

    stages: tuple[Stage, ...] = ()
    steps: tuple[Step, ...] = (Step(),)
    face: str = "value"
    mode: str = "invert"
    segments: int = 1
    side: bool = False
    interleaved: bool = False

    def functions(self) -> Iterator[Fn]:
        """Those of all stages."""
        return (fn for top in self.stages for stage in top.all() for fn in (stage.f, stage.g) if fn)


def text(item: Any, indent: str = "") -> str:
    """A program as Python, without what is the default, one stage and one step a line."""
    if isinstance(item, tuple):
        inner = "".join(f"{indent}    {text(part, indent + '    ')},\n" for part in item)
        return f"(\n{inner}{indent})" if isinstance(item[0], (Stage, Step)) else f"({', '.join(map(text, item))},)"
    if not isinstance(item, (Fn, Stage, Mutation, Step, Program)):
        return repr(item)
    shown = [(f.name, getattr(item, f.name)) for f in fields(item) if getattr(item, f.name) != f.default]
    return f"{type(item).__name__}({', '.join(f'{name}={text(value, indent)}' for name, value in shown)})"


# ---- generated -------------------------------------------------------------------------------------------------------

STAGES = {
    "couple": 8,
    "inverse": 2,
    "momentum": 2,
    "momentum_trained": 1,
    "midpoint": 2,
    "leapfrog": 2,
    "residual": 1,
    "hyperbolic": 1,
    "swap": 2,
    "pair": 1,
    "one_way": 1,
    "checkpointed": 1,
}
NESTED = {"group": 3, "inverted": 2, "components": 6, "thirds": 3, "deeper": 2}
INVERTIBLE = {"couple": 4, "inverse": 1, "swap": 2, "pair": 1, "midpoint": 1, "leapfrog": 1}  # by hand, as well
SINGLE = {"grow": 3, "bend": 3, "lossy": 2, "cut": 2, "turn": 2, "halves": 4}  # on one stream
WRAPS = {
    "store": 3,
    "recompute": 3,
    "invert": 2,
    "segments": 1,
    "recompute_segments": 1,
    "drift": 1,
    "keep": 1,
    "whole": 1,
    "stream": 1,
    "plan": 2,
    "lowered": 2,
    "exact": 1,
}
FACES = {"value": 12, "lowered": 3, "sequential": 3, "rebuilt": 2, "function": 2, "module": 2}
KINDS = {
    "backward": 20,
    "grad": 4,
    "subset": 3,
    "retained": 3,
    "output_in_place": 1,
    "two": 4,
    "two_reversed": 3,
    "create_graph": 4,
    "thread": 2,
    "functional_call": 3,
    "raise_forward": 2,
    "raise_backward": 2,
    "leak": 2,
    "no_grad": 1,
    "inference": 1,
    "func_grad": 2,
    "func_grad_parameters": 2,
    "func_vmap": 1,
    "func_vmap_grad": 1,
    "func_jvp": 1,
    "func_jacrev": 1,
    "func_hessian": 1,
}
LAYOUTS = {"plain": 12, "transposed": 2, "sliced": 1, "expanded": 1}
ENTRIES = {"leaf": 8, "inner": 3, "data": 3}
AROUND = {
    None: 30,
    "save_on_cpu": 2,
    "hooks": 2,
    "torch_checkpoint": 2,
    "mode_recompute": 1,
    "mode_invert": 1,
    "mode_store": 1,
}
BATCHES = {3: 20, 5: 4, 1: 2, 0: 1}
BETWEEN = {
    "freeze": 3,
    "freeze_module": 2,
    "freeze_all": 1,
    "thaw": 3,
    "train": 1,
    "eval": 2,
    "eval_one": 2,
    "replace": 3,
    "tie": 2,
    "view_of_data": 1,
    "view_of_leaf": 2,
    "nonleaf": 2,
    "function_of_another_in_place": 2,
    "add_in_place": 2,
    "write_data": 2,
    "swap_data": 1,
    "hook_scales": 2,
    "hook_before": 1,
    "hook_takes": 2,
    "hook_backward": 2,
    "hook_tensor": 2,
    "unhook": 2,
    "state_dict": 2,
    "state_dict_assigned": 1,
    "dtypes": 2,
    "deepcopy": 2,
    "pickle": 2,
    "sgd": 3,
    "replace_child": 2,
    "parametrize": 1,
    "unparametrize": 1,
    "forward_without_grad": 1,
    "forward_in_inference": 1,
    "buffer_in_place": 1,
}
MIDWAY = {
    "freeze": 2,
    "freeze_module": 1,
    "thaw": 1,
    "train": 1,
    "eval": 4,
    "eval_one": 2,
    "replace": 3,
    "tie": 1,
    "view_of_leaf": 1,
    "nonleaf": 1,
    "add_in_place": 1,
    "hook_scales": 2,
    "hook_before": 1,
    "hook_takes": 1,
    "hook_tensor": 1,
    "unhook": 2,
    "state_dict_assigned": 1,
    "copy_aside": 1,
    "sgd": 1,
    "replace_child": 2,
    "forward_without_grad": 2,
    "forward_in_inference": 2,
    "forward": 2,
    "buffer_in_place": 1,
    "input_in_place": 1,
    "draw": 2,
    "zero_grad": 1,
}


class Draw:
    """Draws from tables of weights."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def of(self, table: dict[Any, int]) -> Any:
        return self.random.choices([*table], [*table.values()])[0]

    def chance(self, part: float) -> bool:
        return self.random.random() < part

    def seed(self) -> int:
        return self.random.randrange(1000)


def generate(seed: int) -> Program:
    """The program of a seed."""
    draw = Draw(seed)
    program = Program(
        face=draw.of(FACES),
        mode=draw.of({"invert": 6, "recompute": 3, "store": 1}),
        side=draw.chance(0.1),
        interleaved=draw.chance(0.1),
    )
    if program.face == "sequential":
        program = replace(program, side=False)
    pool = [_function(draw, program.face) for _ in range(draw.random.randint(1, 4))]
    stages = tuple(_stage(draw, program, pool) for _ in range(draw.random.randint(1, 4)))
    segments = draw.random.randint(1, len(stages)) if draw.chance(0.3) else 1
    if program.face in ("function", "module"):
        program, segments = replace(program, mode="recompute"), 1
    steps = tuple(_step(draw) for _ in range(draw.random.randint(1, 3)))
    steps = tuple(_comparable(step, {fn.kind for fn in pool}, first=i == 0) for i, step in enumerate(steps))
    return replace(program, stages=stages, steps=steps, segments=segments)


def _function(draw: Draw, face: str) -> Fn:
    copied = face in ("lowered", "sequential")  # modules that own what they use
    weights = {kind: 1 if kind in SLOW else 2 for kind in FUNCTIONS if not (copied and kind in CLOSURES)}
    return Fn(draw.of(weights), draw.seed())


def _stage(draw: Draw, program: Program, pool: list[Fn]) -> Stage:
    kinds = {"couple": 1} if program.face == "sequential" else STAGES
    kind, f = draw.of(kinds), draw.random.choice(pool)
    stage = Stage(kind, f, mark=draw.of(MARKS))
    if kind == "couple":
        stage = _coupling(draw, stage, pool)
    if program.face != "sequential" and draw.chance(0.4):
        stage = _nested(draw, pool, 2, widest=True)
    return stage


MARKS = {None: 8, "store": 1, "recompute": 1, "invert": 1}


def _coupling(draw: Draw, stage: Stage, pool: list[Fn]) -> Stage:
    g = draw.random.choice(pool) if draw.chance(0.5) else None
    return replace(stage, g=g, law=draw.of({"additive": 4, "tanh_scale": 1, "sigmoid_scale": 1}))


def _nested(draw: Draw, pool: list[Fn], depth: int, widest: bool) -> Stage:
    """A stage that is made of others; only the widest streams are split once more."""
    kinds = NESTED if widest else {"group": 1, "inverted": 1, "components": 1}
    kind = draw.of(kinds)

    def line(wide: bool) -> Stage:
        inner = [_single(draw, pool, depth, wide) for _ in range(draw.random.randint(0, 3))]
        return _around(draw, Stage("line", pool[0], inner=tuple(inner)), 0.4)

    def chain(kinds: dict[Any, int], wide: bool) -> tuple[Stage, ...]:
        return tuple(_leaf(draw, pool, depth, kinds, wide) for _ in range(draw.random.randint(1, 3)))

    inner = {
        "group": lambda: chain(STAGES, widest),
        "inverted": lambda: chain(INVERTIBLE, False),
        "components": lambda: (line(widest), line(widest)),
        "thirds": lambda: (line(False), line(True), line(False)),
        "deeper": lambda: (_around(draw, Stage("group", pool[0], inner=chain(STAGES, False)), 0.3), line(True)),
    }[kind]()
    return _around(draw, Stage(kind, draw.random.choice(pool), inner=inner), 0.2)


def _leaf(draw: Draw, pool: list[Fn], depth: int, kinds: dict[Any, int], wide: bool) -> Stage:
    if depth and kinds is not INVERTIBLE and draw.chance(0.3):
        return _nested(draw, pool, depth - 1, wide)
    stage = Stage(draw.of(kinds), draw.random.choice(pool))
    return _around(draw, _coupling(draw, stage, pool) if stage.kind == "couple" else stage, 0.2)


def _single(draw: Draw, pool: list[Fn], depth: int, wide: bool) -> Stage:
    """A part of a component."""
    kind = draw.of(SINGLE if wide and depth else {k: v for k, v in SINGLE.items() if k != "halves"})
    inner = [_leaf(draw, pool, 0, STAGES, False) for _ in range(draw.random.randint(1, 2))] if kind == "halves" else []
    return _around(draw, Stage(kind, draw.random.choice(pool), inner=tuple(inner)), 0.25)


def _around(draw: Draw, stage: Stage, part: float) -> Stage:
    return replace(stage, mark=draw.of(MARKS), wrap=draw.of(WRAPS) if draw.chance(part) else None)


def _step(draw: Draw) -> Step:
    return Step(
        kind=draw.of(KINDS),
        before=tuple(_mutation(draw, BETWEEN) for _ in range(draw.of({0: 4, 1: 4, 2: 2}))),
        midway=tuple(_mutation(draw, MIDWAY) for _ in range(draw.of({0: 6, 1: 3, 2: 1}))),
        batch=draw.of(BATCHES),
        layout=draw.of(LAYOUTS),
        entry=draw.of(ENTRIES),
        around=draw.of(AROUND),
        seed=draw.seed(),
    )


def _comparable(step: Step, kinds: set[str], first: bool) -> Step:
    """A step that plain autograd does right.

    Torch's checkpoint runs again on what has changed since, and moves buffers twice. A transform may not make the
    parameters of a lazy module. A graph in evaluation reads buffers that a later forward in training moves. A norm over
    a batch of equal rows is rounding alone, 300 times as large; several of them are more than is tolerated.
    """
    if step.layout == "expanded" and "batch_norm" in kinds:
        step = replace(step, layout="plain")
    if step.kind.startswith("two") and kinds & MOVES_BUFFERS:
        step = replace(step, midway=tuple(m for m in step.midway if m.kind != "train"))
    if step.around == "torch_checkpoint" and kinds & MOVES_BUFFERS:
        step = replace(step, around=None)
    if step.around == "torch_checkpoint" or "torch_checkpoint" in kinds:
        step = replace(step, midway=())
    if (step.kind, step.around) == ("leak", "save_on_cpu"):  # on a CPU torch itself keeps what it saves there alive
        step = replace(step, around=None)
    transforms = step.kind.startswith("func")
    return replace(step, kind="backward") if first and transforms and "lazy" in kinds else step


def _mutation(draw: Draw, table: dict[Any, int]) -> Mutation:
    return Mutation(draw.of(table), draw.random.randrange(12), draw.seed())
