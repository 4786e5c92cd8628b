"""Stages that are made of stages, those on one stream, and what is put around an op: as ops, and in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import invfunc as inv
from invfunc import ops
from invfunc.plan import Costs, OpCosts, Plan
from invfunc.plan.executor import flat_ops, has_inverse
from invfunc.plan.schedule import store_all

from .programs import Stage

BOUND = 0.5
CHAINS = {"group", "inverted"}
"""Their stages see the side input."""
WITHOUT = {*CHAINS, "line", "components", "thirds", "deeper", "grow", "bend", "lossy", "turn", "halves"}
"""What has no function of its own."""


def widths(stage: Stage, size: int) -> list[int]:
    """Of the streams that the stages inside are on."""
    half = size // 2
    known = {"thirds": [half, size, half], "deeper": [half, size]}
    return known.get(stage.kind) or [half if stage.kind == "halves" else size] * len(stage.inner)


# ---- ops -------------------------------------------------------------------------------------------------------------


def beside(op: Any) -> inv.Invertible:
    return inv.parallel(op, inv.chain())


def grow(w: Tensor, x: Tensor) -> Tensor:
    return x * w[0].exp()


def shrink(w: Tensor, y: Tensor) -> Tensor:
    return y / w[0].exp()


def lose(x: Tensor) -> tuple[Tensor, Tensor]:
    return 1.5 * x.abs(), x.sign()


def find(sign: Tensor, y: Tensor) -> Tensor:
    return sign * y / 1.5


def chained(part: Any) -> inv.Invertible:
    return inv.chain(*(inner.op() for inner in part.inner))


def side_by_side(part: Any) -> inv.Invertible:
    return inv.parallel(*(inner.op() for inner in part.inner))


def in_halves(op: inv.Invertible) -> inv.Invertible:
    halves = inv.split(2, dim=-1)
    return inv.chain(halves, op, ~halves)


def thirds(part: Any) -> inv.Invertible:
    """The streams joined, split in three, and turned."""
    half, size, _ = (inner.size for inner in part.inner)
    split, turned = inv.split([half, size, half], dim=-1), inv.split([size, half, half], dim=-1)
    around = inv.split(2, dim=-1)
    return inv.chain(~around, split, side_by_side(part), inv.permute_wires((1, 2, 0)), ~turned, around)


def deeper(part: Any) -> inv.Invertible:
    """A component that is two streams itself."""
    return inv.chain(beside(inv.split(2, dim=-1)), side_by_side(part), beside(inv.concat(2, dim=-1)))


OPS: dict[str, Callable[[Any], inv.Invertible]] = {
    "group": chained,
    "inverted": lambda p: ~chained(p),
    "line": chained,
    "components": side_by_side,
    "thirds": thirds,
    "deeper": deeper,
    "grow": lambda p: inv.pair(partial(grow, p.w), partial(shrink, p.w)),
    "bend": lambda p: inv.pair(torch.asinh, torch.sinh),
    "lossy": lambda p: inv.pair(lose, find, residue=True),
    "cut": lambda p: inv.one_way(p.f),
    "turn": lambda p: ops.flip(-1),
    "halves": lambda p: in_halves(chained(p)),
}

# ---- the same in plain torch -----------------------------------------------------------------------------------------


def through(part: Any, *x: Tensor) -> Any:
    """The stages one after another; a third tensor is the side input."""
    streams, c = x[:2], x[2:]
    for inner in part.inner:
        streams = inner(*streams, *c)
        streams = streams if isinstance(streams, tuple) else (streams,)
    return streams[0] if len(streams) == 1 else streams


def plain_thirds(part: Any, a: Tensor, b: Tensor, *c: Tensor) -> Any:
    parts = torch.cat([a, b], -1).split([inner.size for inner in part.inner], -1)
    x, y, z = (inner(t) for inner, t in zip(part.inner, parts, strict=True))
    return torch.cat([y, z, x], -1).chunk(2, -1)


def plain_deeper(part: Any, a: Tensor, b: Tensor, *c: Tensor) -> Any:
    group, line = part.inner
    return torch.cat(group(*a.chunk(2, -1)), -1), line(b)


def backwards(part: Any, a: Tensor, b: Tensor, *c: Tensor) -> Any:
    for inner in reversed(part.inner):
        a, b = BACK[inner.stage.kind](inner, a, b, *c)
    return a, b


def scale_and_shift(part: Any, t: Tensor) -> Any:
    raw, shift = t.chunk(2, -1)
    return torch.sigmoid(raw + 2) if part.stage.law == "sigmoid_scale" else (
        BOUND * torch.tanh(raw / BOUND)
    ).exp(), shift


def law(part: Any, x: Tensor, t: Tensor) -> Tensor:
    if part.stage.law == "additive":
        return x + t
    s, shift = scale_and_shift(part, t)
    return x * s + shift


def law_back(part: Any, y: Tensor, t: Tensor) -> Tensor:
    if part.stage.law == "additive":
        return y - t
    s, shift = scale_and_shift(part, t)
    return (y - shift) / s


def couple_back(part: Any, a: Tensor, b: Tensor, *c: Tensor) -> Any:
    b = b if part.g is None else law_back(part, b, part.g(a, *c))
    return law_back(part, a, part.f(b, *c)), b


BACK: dict[str, Callable[..., Any]] = {
    "couple": couple_back,
    "inverse": lambda p, a, b, *c: (a + p.f(b, *c), b),
    "swap": lambda p, a, b, *c: (b, a),
    "pair": lambda p, a, b, *c: (shrink(p.w, a), b),
    "midpoint": lambda p, a, b, *c: (b - p.f(a, *c), a),
    "leapfrog": lambda p, a, b, *c: (2 * a - b + 0.7**2 * p.f(a, *c), a),
}
PLAIN: dict[str, Callable[..., Any]] = {
    "group": through,
    "inverted": backwards,
    "line": through,
    "components": lambda p, a, b, *c: (p.inner[0](a), p.inner[1](b)),
    "thirds": plain_thirds,
    "deeper": plain_deeper,
    "grow": lambda p, x: grow(p.w, x),
    "bend": lambda p, x: torch.asinh(x),
    "lossy": lambda p, x: 1.5 * x.abs(),
    "cut": lambda p, x: p.f(x),
    "turn": lambda p, x: x.flip(-1),
    "halves": lambda p, x: torch.cat(through(p, *x.chunk(2, -1)), -1),
}

# ---- what is around an op --------------------------------------------------------------------------------------------

KEPT = ["named", torch.ops.aten.addmm, torch.ops.aten.tanh]


def planned(op: inv.Invertible) -> inv.Invertible:
    """Its ops stored, inverted and recomputed by turns; by no costs that anybody has measured."""
    able = [has_inverse(part) for part in flat_ops(op)]
    costs = Costs(tuple(OpCosts("op", 1.0, 1.0, 1.0 if can else math.inf) for can in able))
    ways = [
        (("store", i), ("invert", i, i + 1) if can else ("store", i), ("recompute", i, (("store", i),)))[i % 3]
        for i, can in enumerate(able)
    ]
    return inv.checkpoint(op, plan=Plan(store_all(len(able)), costs).with_modes(ways)) if ways else op


def segmented(op: inv.Invertible, **options: Any) -> inv.Invertible:
    return inv.checkpoint(op, segments=max(1, len(op.parts)), **options)


WRAPS: dict[str | None, Callable[..., inv.Invertible]] = {
    None: lambda op: op,
    "store": partial(inv.checkpoint, mode="store"),
    "recompute": partial(inv.checkpoint, mode="recompute"),
    "invert": inv.checkpoint,
    "segments": segmented,
    "recompute_segments": partial(segmented, mode="recompute"),
    "drift": partial(inv.checkpoint, drift=0.01),
    "keep": partial(inv.checkpoint, keep=KEPT),
    "whole": partial(inv.checkpoint, early_stop=False),
    "stream": partial(inv.checkpoint, stream=torch.float64),
    "plan": planned,
    "lowered": inv.nn.Lowered,
    "exact": partial(inv.exact, mode="codes"),
}


def wrapped(wrap: str | None, op: inv.Invertible) -> inv.Invertible:
    return WRAPS[wrap](op)
