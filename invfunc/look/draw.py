"""Pictures of a pipeline: what it is made of, what flows through it, and what a training step keeps where.

A drawing is made in three walks. `_probed` puts a probe around every part, and one run of that on fake tensors, which
have shapes but no memory, tells what flows and what is kept. `_part` reads the structure into parts. `_lines` and
`_picture` show the parts, as text and as SVG.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import singledispatch
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _torch
from .._torch import LOOKS_AT_VALUES, storage_id, storage_of
from ..checkpoint import Checkpointed, CompiledStages, Marked, Wrapper
from ..core.combine import Parallel
from ..core.context import Context, with_context
from ..core.couple import Half, InverseLaw, is_coupling
from ..core.op import Chain, Invertible, OneWay, lift, name_of, named
from ..engine.frame import Frame
from ..engine.interface import Run, State
from ..engine.lower import walk
from ..engine.parts import Parts
from ..engine.snapshot import leave_random_state
from ..errors import OptionError
from ..exact.transform import Gridded
from ..plan import report
from ..plan.costs import show_bytes
from ..plan.executor import Planned, flat_ops, flat_stages, halves
from ..plan.inputs import faked, faking, home_of, realised
from ..plan.trials import forward_of
from ..wires import Wire, describe, is_differentiable, leaves, map_wire
from .pictures import GAP, GREY, LETTER, ROW, Picture, above, at, beside, box, document, framed, line, text, tinted
from .raster import png

# ---- what a run tells ------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """What a probe saw: the wire that left its part, and the bytes that are kept there until backward."""

    wire: Wire = None
    keeps: int = 0


@dataclass(frozen=True, repr=False)
class Probe(Wrapper):
    """A part of a pipeline, watched while it runs."""

    reading: Reading
    keep: Keeper

    def forward(self, x: Wire) -> Wire:
        with self._watching():
            return self._noted(self.op.forward(x))

    def watched(self, state: State, run: Run) -> State:
        """`walk` through the part."""
        with self._watching():
            state = walk(self.op, state, run)
        self._noted(run.engine.wire(state))
        return state

    def _watching(self) -> Any:
        if _runs_again():
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(lambda t: self.keep(self.reading, t), _never)

    def _noted(self, y: Wire) -> Wire:
        self.reading.wire = map_wire(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, y)
        return y

    def inverted(self) -> Invertible:
        return replace(self, op=self.op.inverted())

    @property
    def name(self) -> str:
        return self.op.name

    def __repr__(self) -> str:
        return repr(self.op)


@walk.register
def _(op: Probe, state: State, run: Run) -> State:
    return op.watched(state, run)


def _runs_again() -> bool:
    """Whether a region is around, which keeps nothing of what is saved in it."""
    hooks = _torch.top_hooks()
    return hooks is not None and isinstance(getattr(hooks[0], "__self__", None), Frame)


def _never(_: Any) -> Tensor:
    raise AssertionError("a drawing runs no backward")


@dataclass
class Kept:
    """A tensor that autograd keeps: lives as long as the graph that wants it, and no longer."""

    reading: Reading
    tensor: Tensor


class Keeper:
    """What autograd keeps, and where: not what is kept for a moment, by a graph that is built and dropped."""

    def __init__(self) -> None:
        self.found: list[weakref.ref[Kept]] = []

    def __call__(self, reading: Reading, tensor: Tensor) -> Kept:
        kept = Kept(reading, tensor.detach())
        self.found.append(weakref.ref(kept))
        return kept

    def count(self, known: Sequence[Tensor]) -> None:
        """Add up the storages, each once and where it came first; ``known`` are those that would live anyway."""
        seen = {storage_of(tensor) for tensor in known}
        for kept in filter(None, [ref() for ref in self.found]):
            storage = kept.tensor.untyped_storage()
            kept.reading.keeps += 0 if storage_id(storage) in seen else storage.nbytes()
            seen.add(storage_id(storage))


@singledispatch
def _probed(op: Invertible, probe: Callable[[Invertible], Invertible]) -> Invertible:
    """The op with a probe around every part that is drawn as one, in the order of `_part`."""
    return probe(op)


@_probed.register
def _(op: Chain, probe: Callable[[Invertible], Invertible]) -> Invertible:
    return probe(op) if op.labels or not op.parts else Chain(tuple([_probed(part, probe) for part in op.parts]))


@_probed.register
def _(op: Parallel, probe: Callable[[Invertible], Invertible]) -> Invertible:
    return probe(Parallel(tuple([_probed(part, probe) for part in op.parts])))


@_probed.register(Checkpointed)
@_probed.register(Marked)
def _(op: Any, probe: Callable[[Invertible], Invertible]) -> Invertible:
    return op.mapped(lambda part: _probed(part, probe))


@_probed.register
def _(op: CompiledStages, probe: Callable[[Invertible], Invertible]) -> Invertible:
    return _probed(
        op.op, probe
    )  # what runs and what is kept is as without it, and fake tensors can not be compiled for


@_probed.register
def _(op: Planned, probe: Callable[[Invertible], Invertible]) -> Invertible:
    parts = [named(_probed(part, probe), part.name) for part in flat_ops(op.op)]  # each is one op, as in the plan
    return Planned(Chain(tuple(parts)), op.plan, op.ops)


def _readings(op: Invertible, x: Any) -> list[Reading]:
    """Run an op once, on fake tensors if it lets us, and return what flows into it and out of every part."""
    with _undisturbed(op):
        with faking() as mode:
            fake = faked(x, mode, home_of(op))
            try:
                return _run(op, fake, mode.from_tensor)
            except LOOKS_AT_VALUES:
                pass
        return _run(op, realised(x, fake), lambda t: t)


@contextmanager
def _undisturbed(op: Invertible) -> Iterator[None]:
    """Put back the random numbers and the buffers of modules as they were."""
    found = Parts(op.functions)
    buffers = [*found.tensors, *(buffer for module in found.roots for buffer in module.buffers())]
    before = [buffer.clone() for buffer in buffers]
    with leave_random_state(op.functions):
        yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _run(op: Invertible, x: Wire, seen: Callable[[Tensor], Tensor]) -> list[Reading]:
    """Run an op with probes, each differentiable input needing a gradient as it does in the middle of a network."""
    closed = forward_of(op, x)[1].parameters
    x = map_wire(lambda leaf: _detached(leaf).requires_grad_() if is_differentiable(leaf) else leaf, x)
    keep, readings = Keeper(), [Reading(x)]

    def probe(part: Invertible) -> Invertible:
        readings.append(Reading())
        return Probe(part, readings[-1], keep)

    probed = _probed(op, probe)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: keep(_latest(readings), t), _never):
        y = probed.forward(x)
    keep.count([*(leaf for leaf in leaves(x) if isinstance(leaf, Tensor)), *closed, *map(seen, closed)])
    del y
    return readings


def _latest(readings: Sequence[Reading]) -> Reading:
    """The part that ran last: what is kept outside of all parts is its output, where a trunk is closed."""
    return [reading for reading in readings if reading.wire is not None][-1]


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


# ---- the structure ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A box of a drawing.

    Attributes:
        title: What is written in it.
        kind: ``"op"``, ``"one way"``, ``"couple"``, ``"chain"`` or ``"parallel"``.
        way: How backward finds the part's input, where the part is lowered.
        wire: What leaves the part; empty without an input.
        keeps: The bytes kept in it; None without an input.
        rails: How many components leave the part, as far as that is known.
        parts: The boxes inside.
        steps: What a coupling does.
        times: How often the part stands there, one after the other.
    """

    title: str
    kind: str = "op"
    way: str = ""
    wire: str = ""
    keeps: int | None = None
    rails: int = 1
    parts: tuple[Part, ...] = ()
    steps: tuple[Step, ...] = ()
    times: int = 1


@dataclass(frozen=True)
class Step:
    """One half of a coupling: component ``target`` changes by a function of the other."""

    text: str
    fn: str
    target: int
    sign: str


Readings = Iterator[Reading]


def _read(part: Part, readings: Readings) -> Part:
    """The part with the next reading, if there are any."""
    reading = next(readings, None)
    if reading is None:
        return part
    rails = len(reading.wire) if isinstance(reading.wire, tuple) else 1
    return replace(part, wire=describe(reading.wire), keeps=reading.keeps, rails=rails)


@singledispatch
def _part(op: Invertible, way: str, readings: Readings) -> Part:
    """The structure of an op, ``way`` being how it is lowered, with what a run has told of it."""
    return _read(Part(repr(op), way=way), readings)


@_part.register
def _(op: OneWay, way: str, readings: Readings) -> Part:
    return _read(Part(name_of(op.fn), "one way", "store" if way == "invert" else way), readings)


@_part.register
def _(op: Chain, way: str, readings: Readings) -> Part:
    if is_coupling(op):
        return _read(Part(repr(op), "couple", way, rails=2, steps=tuple(map(_step, op.parts))), readings)
    if op.labels or not op.parts:
        return _read(Part(repr(op), way=way), readings)
    return _chain("chain", _folded([_part(part, way, readings) for part in op.parts]))


@_part.register
def _(op: Half, way: str, readings: Readings) -> Part:
    return _read(Part(repr(op), "couple", way, rails=2, steps=(_step(op),)), readings)


@_part.register
def _(op: Parallel, way: str, readings: Readings) -> Part:
    parts = tuple([_part(part, way, readings) for part in op.parts])
    return _read(Part("parallel", "parallel", rails=len(parts), parts=parts), readings)


@_part.register
def _(op: Checkpointed, way: str, readings: Readings) -> Part:
    given = repr(op).removeprefix(f"checkpoint({op.op!r}").removesuffix(")").removeprefix(", ")
    inner = _part(op.op, op.options.mode, readings)
    return _chain(f"checkpoint({given})" if given else "checkpoint", _inside(inner))


@_part.register
def _(op: Marked, way: str, readings: Readings) -> Part:
    inner = _part(op.op, op.mark, readings)
    return _chain(op.mark, inner.parts) if inner.kind == "chain" else inner


@_part.register
def _(op: CompiledStages, way: str, readings: Readings) -> Part:
    return _chain("compile_stages", _inside(_part(op.op, way, readings)))


@_part.register
def _(op: Gridded, way: str, readings: Readings) -> Part:
    inner = _part(op.op, way, iter(()))  # its parts are made anew for each grid, so that none of them can be watched
    return _read(Part("exact", "chain", way, parts=_inside(inner)), readings)


@_part.register
def _(op: Planned, way: str, readings: Readings) -> Part:
    rows = zip(report.rows(op.plan), op.plan.costs.ops, strict=True)
    ways = iter([row.mode for row, cost in rows for _ in range(cost.parts)])
    parts = [
        _joined(stage, [_part(half, next(ways), readings) for half in halves(stage)]) for stage in flat_stages(op.op)
    ]
    return _chain("chain", _folded([part for stage in parts for part in stage]))


def _joined(op: Invertible, parts: Sequence[Part]) -> Sequence[Part]:
    """The halves of a coupling as one, if the same is done with both."""
    if len({part.way for part in parts}) > 1 or not is_coupling(op):
        return parts
    keeps = None if parts[0].keeps is None else sum(part.keeps or 0 for part in parts)
    return [replace(parts[-1], title=repr(op), keeps=keeps, steps=tuple([s for part in parts for s in part.steps]))]


def _chain(title: str, parts: tuple[Part, ...]) -> Part:
    return Part(title, "chain", rails=parts[-1].rails, parts=parts)


def _inside(part: Part) -> tuple[Part, ...]:
    """The parts of a chain that needs no box of its own."""
    return part.parts if part.title == "chain" else (part,)


def _folded(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Equal neighbours as one."""
    return tuple([replace(part, times=len(list(same))) for part, same in groupby(parts)])


def _step(half: Any) -> Step:
    backwards, fn = isinstance(half.law, InverseLaw), name_of(half.fn)
    call, changed = f"{fn}(x{1 - half.target})", f"x{half.target}"
    sign = half.law.original().signs[backwards]
    if not half.law.suffix:
        return Step(f"{changed} {sign}= {call}", fn, half.target, sign)
    shown = f"{half.law.__name__}({call})"
    shown = f"invert({shown})" if backwards else shown
    return Step(f"{changed} = {shown}({changed})", fn, half.target, sign)


# ---- as text ---------------------------------------------------------------------------------------------------------

Line = tuple[str, str, str, str]  # what stands in a line: part, wire, way, bytes


def _lines(part: Part, before: str = "", last: bool = True, top: bool = True) -> Iterator[Line]:
    """A part as a line, and those inside of it as lines behind a rule."""
    keeps = "" if part.keeps is None else show_bytes(part.keeps) if part.keeps else "0"
    if part.times > 1 and part.keeps:
        keeps += " each"
    rule = "" if top else before + ("└─ " if last else "├─ ")
    times = f" ×{part.times}" if part.times > 1 else ""
    yield rule + part.title + times, part.wire, part.way, keeps
    before = before if top else before + ("   " if last else "│  ")
    yield from ((f"{before}   {step.text}", "", "", "") for step in part.steps)
    for index, inner in enumerate(part.parts):
        yield from _lines(inner, before, index == len(part.parts) - 1, False)


def _table(lines: Sequence[Line]) -> str:
    """Lines in columns, without the columns that are empty."""
    first, *others = zip(*lines, strict=True)
    columns = [first, *(column for column in others if any(column[1:]))]
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _total(part: Part) -> int:
    """The bytes kept in a part and in all inside of it."""
    return part.times * ((part.keeps or 0) + sum(map(_total, part.parts)))


# ---- as SVG ----------------------------------------------------------------------------------------------------------


_COLOURS = {"": GREY, "invert": "#2a9d5c", "store": "#d9822b", "recompute": "#3b7dd8"}


def _colour(part: Part) -> str:
    return _COLOURS.get(part.way, _COLOURS["recompute"])  # a plan recomputes several times over


def _noted(part: Part, picture: Picture) -> Picture:
    """A picture with what is kept, and how its input comes back, at its right."""
    kept = f"keeps {show_bytes(part.keeps)}" if part.keeps else ""
    note = ", ".join(filter(None, [f"×{part.times}" if part.times > 1 else "", part.way, kept]))
    if not note:
        return picture
    margin = LETTER * len(note) + GAP  # on both sides, so that the picture stays in the middle
    shapes = at(margin, 0, picture)
    shapes += text(margin + picture.width + 8, picture.height / 2 + 4, note, 'fill-opacity="0.8"')
    return Picture(picture.width + 2 * margin, picture.height, shapes)


def _picture(part: Part) -> Picture:
    """A part as a picture."""
    if part.kind == "couple":
        return _noted(part, _coupling(part))
    if part.kind == "parallel":
        return _noted(part, framed(part.title, beside(*map(_picture, part.parts))))
    if part.kind == "chain":
        inner = _piped(part.parts)
        return inner if part.title == "chain" else _noted(part, framed(part.title, inner))
    return _noted(part, box(part.title, _colour(part), ' stroke-dasharray="6 3"' if part.kind == "one way" else ""))


def _piped(parts: Sequence[Part]) -> Picture:
    """Parts from top to bottom, with the wires between them."""
    return above(*(picture for part in parts for picture in (_picture(part), _wire(part))))


def _wire(part: Part) -> Picture:
    """What leaves a part, as a line for each component and their shapes."""
    width, height = 150.0 + 2 * (LETTER * len(part.wire)), 20.0
    xs = [width / 2 + (i - (part.rails - 1) / 2) * 75 / max(part.rails - 1, 1) for i in range(part.rails)]
    lines = "".join(line(x, 0, x, height) for x in xs)
    return Picture(width, height, lines + text(xs[-1] + 6 if xs else 0, 14, part.wire, 'font-size="11"'))


def _coupling(part: Part) -> Picture:
    """Two rails; each step reads one of them and changes the other."""
    boxes = max(LETTER * len(step.fn) for step in part.steps) + 2 * GAP
    steps = above(*(_crossing(step, boxes) for step in part.steps))
    width = max(steps.width, LETTER * len(part.title)) + 2 * GAP
    title = Picture(width, ROW, text(width / 2, 18, part.title, 'text-anchor="middle"'))
    inner = above(title, steps)
    return Picture(width, inner.height, tinted(width, inner.height, _colour(part)) + at(0, 0, inner))


def _crossing(step: Step, boxes: float) -> Picture:
    """One step of a coupling: from a rail, through a function, into the other rail."""
    name = box(step.fn, least=boxes)
    width, height, edge = name.width + 80, 40.0, 12.0
    rails = (edge, width - edge)
    target, source = rails[step.target], rails[1 - step.target]
    shapes = "".join(line(x, 0, x, height) for x in rails) + line(source, 20, target, 20)
    shapes += at((width - name.width) / 2, 6, name)
    shapes += f'<circle cx="{target:g}" cy="20" r="8" fill="white" stroke="#888888"/>'
    return Picture(width, height, shapes + text(target, 24, step.sign, 'text-anchor="middle"'))


# ---- the value -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Drawing:
    """A pipeline to look at; built by `draw`.

    Print it for text. A notebook shows it as SVG, and `save` writes it as either, as HTML or as a PNG.

    Attributes:
        part: The boxes, from the outside in.
        given: The wire that flows into it; None without an input.

    Example:
        >>> import torch, invfunc as inv
        >>> inv.draw(inv.split(2) >> inv.couple(torch.sin, torch.cos) >> inv.concat(2)).part.title
        'chain'
    """

    part: Part
    given: Part | None = None

    @property
    def kept_bytes(self) -> int:
        """What a training step keeps in all, beside the input and what the functions close over."""
        return _total(self.part)

    def __str__(self) -> str:
        lines = list(_lines(self.part))
        if self.given is None:
            return _table(lines)
        head: list[Line] = [("", "wire", "backward", "keeps"), ("", self.given.wire, "", "")]
        if self.part.kind == "chain" and not self.part.wire:  # its own line is that of the input
            head, lines = [head[0], (self.part.title, self.given.wire, "", "")], lines[1:]
        return _table([*head, *lines, self._sum])

    @property
    def _sum(self) -> Line:
        return "", "", "in all", show_bytes(self.kept_bytes)

    __repr__ = __str__

    def _repr_svg_(self) -> str:
        """The drawing as an SVG document."""
        return document(above(*([] if self.given is None else [_wire(self.given)]), _picture(self.part)))

    def _repr_html_(self) -> str:
        """The SVG for a notebook, no wider than the page."""
        return f'<div style="overflow-x:auto">{self._repr_svg_()}</div>'

    def save(self, path: str | Path) -> None:
        """Write the drawing, as what the name ends in: ``.svg``, ``.html``, ``.png`` (by matplotlib) or ``.txt``.

        Raises:
            OptionError: When the name ends in anything else, or matplotlib is not installed.
        """
        suffix, makers = Path(path).suffix, self._makers()
        if suffix not in makers:
            raise OptionError(f"draw: can not save {Path(path).name}", expected=f"a name ending in {', '.join(makers)}")
        Path(path).write_bytes(makers[suffix]())

    def _makers(self) -> dict[str, Callable[[], bytes]]:
        return {
            ".svg": lambda: self._repr_svg_().encode(),
            ".html": lambda: f'<!DOCTYPE html><meta charset="utf-8">{self._repr_html_()}\n'.encode(),
            ".png": lambda: png(self._repr_svg_()),
            ".txt": lambda: f"{self}\n".encode(),
        }


def draw(op: Invertible | nn.Module | Callable[..., Any], *inputs: Any, context: Context | None = None) -> Drawing:
    """Draw a pipeline: its structure and, for an input, the wires between its parts and what a training step keeps.

    Args:
        op: An op; a module of `invfunc.nn` stands for its op as it is lowered, any other callable for a `one_way`
            stage. A coupling shows its two steps, a named op is one box, equal neighbours are one with a count.
        inputs: As the op takes them: tensors, or shapes like ``(32, 64)``. None draws the structure alone.
        context: What the functions are told by name beside the input, as in ``op(x, context=...)``.

    Returns:
        A `Drawing`. Under ``backward`` stands how a lowered part finds its input again: ``invert`` by its inverse,
        ``store`` from a tape, ``recompute`` by running again. Under ``keeps`` stand the bytes that autograd keeps there
        until backward: residues, the output of a run of inverted parts, input and tape of what is stored. The
        pipeline's input and its parameters, which live anyway, do not count.

    Cost:
        Without inputs nothing runs. With them the op runs forward twice on fake tensors, which takes milliseconds
        and no memory.

    Raises:
        OptionError: When no function takes a name of the context.

    Limits:
        An op that looks at its values (an iterative inverse, a batch normalisation) runs on real ones: on yours, or on
        random numbers where you gave shapes. Buffers and random numbers are put back; other effects stay.

    Example:
        >>> import torch, invfunc as inv
        >>> net = inv.chain(inv.split(2), *[inv.couple(torch.sin, torch.cos)] * 8, inv.concat(2), torch.tanh)
        >>> print(inv.draw(net))
        chain
        ├─ split(2, dim=1)
        ├─ couple(sin, cos) ×8
        │     x0 += sin(x1)
        │     x1 += cos(x0)
        ├─ concat(2, dim=1)
        └─ tanh
        >>> print(inv.draw(inv.checkpoint(net), torch.zeros(16, 8, dtype=torch.float64)))
                                wire                backward  keeps
        checkpoint              (16, 8)
        ├─ split(2, dim=1)      ((16, 4), (16, 4))  invert    0
        ├─ couple(sin, cos) ×8  ((16, 4), (16, 4))  invert    0
        │     x0 += sin(x1)
        │     x1 += cos(x0)
        ├─ concat(2, dim=1)     (16, 8)             invert    0
        └─ tanh                 (16, 8)             store     2 KiB
                                                    in all    2 KiB
    """
    value = with_context(_value(op), context)
    if not inputs:
        return Drawing(_part(value, "", iter(())))
    readings = iter(_readings(value, inputs[0] if len(inputs) == 1 else inputs))
    given = _read(Part("input"), readings)
    return Drawing(_part(value, "", readings), given)


def _value(op: Any) -> Invertible:
    """What is drawn of an op, or of a module that is one."""
    from ..nn.module import Live, Module

    if isinstance(op, Module):
        return op._lowered(op.build())
    return op.op if isinstance(op, Live) else lift(op)
