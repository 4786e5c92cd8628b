"""The two worlds of a program: the same functions, once below invfunc's ops and once in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import invfunc as inv
from invfunc import ops

from . import nested
from .functions import CLOSURES, FUNCTIONS, Parts, WithSide, seed_all
from .nested import BOUND, CHAINS, WITHOUT, beside, grow, law, shrink, widths, wrapped
from .programs import Fn, Program, Stage

SIZE = 4

# `tanh_scale` and `sigmoid_scale` move from the package to its ops.
tanh_scale: Callable[..., Any] = getattr(ops, "tanh_scale", None) or inv.ops.tanh_scale
sigmoid_scale: Callable[..., Any] = getattr(ops, "sigmoid_scale", None) or inv.ops.sigmoid_scale


class Part:
    """A stage: its op, and the same in plain torch. The functions of both worlds are made alike, not shared."""

    def __init__(self, stage: Stage, parts: Parts, side: bool, size: int = SIZE) -> None:
        wide = 1 if stage.law == "additive" else 2
        self.stage, self.side, self.size = stage, side, size
        seed_all(stage.f.seed)
        self.f: Any = None if stage.kind in WITHOUT else make(parts, stage.f, size, wide * size, side)
        self.g = None if stage.g is None else make(parts, stage.g, size, wide * size, side)
        self.w = parts.tensor(size, size) if stage.kind in ("pair", "hyperbolic", "grow") else None
        if stage.kind == "momentum_trained":
            self.w = parts.tensor(size)
            self.w.data.fill_(0.7)
        self.inner = [
            Part(inner, parts, side and stage.kind in CHAINS, width)
            for inner, width in zip(stage.inner, widths(stage, size), strict=True)
        ]

    def op(self) -> inv.Invertible:
        """The stage as an op."""
        op = wrapped(self.stage.wrap, self.bare())
        return inv.mark(op, self.stage.mark) if self.stage.mark else op

    def bare(self) -> inv.Invertible:
        """It, and nothing around."""
        kind = self.stage.kind
        if kind in nested.OPS:
            op = nested.OPS[kind](self)
            return beside(op) if self.side and kind not in CHAINS else op
        op = OPS[kind](self)
        if self.side and kind != "one_way":
            op = beside(op) if kind in ("swap", "pair", "hyperbolic") else ops.given(op)
        return op

    def __call__(self, *x: Tensor) -> Any:
        """The stage in plain torch."""
        return {**PLAIN, **nested.PLAIN}[self.stage.kind](self, *x)


def make(parts: Parts, fn: Fn, size: int, out: int, side: bool) -> Any:
    """The function, which is the same one for the same seed, kind and size."""
    key = fn, size, out, side
    if key not in parts.made:
        seed_all(fn.seed)
        found = FUNCTIONS[fn.kind](parts, size, out)
        parts.made[key] = parts.module(WithSide(found, out)) if side else found
    return parts.made[key]


# ---- ops -------------------------------------------------------------------------------------------------------------

SCALES = {"tanh_scale": lambda f: tanh_scale(f, BOUND, dim=-1), "sigmoid_scale": lambda f: sigmoid_scale(f, dim=-1)}


def coupling(part: Part) -> dict[str, Any]:
    """The arguments of `couple`."""
    if part.stage.law == "additive":
        return {"f": part.f, "g": part.g}
    scale = SCALES[part.stage.law]
    return {"f": scale(part.f), "g": part.g and scale(part.g), "law": inv.affine}


OPS: dict[str, Callable[[Part], inv.Invertible]] = {
    "couple": lambda p: inv.couple(**coupling(p)),
    "inverse": lambda p: ~inv.couple(p.f),
    "momentum": lambda p: ops.momentum(p.f, 0.8),
    "momentum_trained": lambda p: ops.momentum(p.f, p.w),
    "midpoint": lambda p: ops.midpoint(p.f, 0.5),
    "leapfrog": lambda p: ops.leapfrog(p.f, 0.7),
    "residual": lambda p: ops.reversible_residual(p.f, "couple"),
    "hyperbolic": lambda p: ops.hyperbolic(p.w, activation=torch.tanh),
    "swap": lambda p: inv.swap(),
    "pair": lambda p: beside(inv.pair(partial(grow, p.w), partial(shrink, p.w))),
    "one_way": lambda p: inv.one_way(OneWay(p)),
    "checkpointed": lambda p: inv.checkpoint(inv.couple(p.f), mode="recompute"),
}


class OneWay:
    """A stage that has no inverse."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __call__(self, *x: Any) -> Any:
        if not self.part.side:
            return one_way(self.part, *x)
        streams, c = x
        return one_way(self.part, *streams, c), c


def one_way(part: Part, a: Tensor, b: Tensor, *c: Tensor) -> Any:
    return torch.relu(a) + part.f(b, *c), b


# ---- the same in plain torch -----------------------------------------------------------------------------------------


def plain_couple(part: Part, a: Tensor, b: Tensor, *c: Tensor) -> Any:
    a = law(part, a, part.f(b, *c))
    return a, b if part.g is None else law(part, b, part.g(a, *c))


def plain_momentum(gamma: Any, part: Part, x: Tensor, v: Tensor, *c: Tensor) -> Any:
    v = gamma * v + (1 - gamma) * part.f(x, *c)
    return x + v, v


def plain_hyperbolic(part: Part, a: Tensor, b: Tensor, *c: Tensor) -> Any:
    w: Any = part.w
    return b, 2 * b - a - torch.tanh(b @ w.t()) @ w


PLAIN: dict[str, Callable[..., Any]] = {
    "couple": plain_couple,
    "inverse": lambda p, a, b, *c: (a - p.f(b, *c), b),
    "momentum": lambda p, *x: plain_momentum(0.8, p, *x),
    "momentum_trained": lambda p, *x: plain_momentum(p.w, p, *x),
    "midpoint": lambda p, a, b, *c: (b, a + p.f(b, *c)),
    "leapfrog": lambda p, a, b, *c: (b, 2 * b - a + 0.7**2 * p.f(b, *c)),
    "residual": lambda p, a, b, *c: (b, a + (p.f(b, *c) - b)),
    "hyperbolic": plain_hyperbolic,
    "swap": lambda p, a, b, *c: (b, a),
    "pair": lambda p, a, b, *c: (grow(p.w, a), b),
    "one_way": one_way,
    "checkpointed": plain_couple,
}


class Trunk(nn.Module):
    """The whole program as one plain function and, since it owns the modules, as one module."""

    def __init__(self, parts: list[Part], modules: list[nn.Module], interleaved: bool) -> None:
        super().__init__()
        self.parts, self.interleaved = parts, interleaved
        self.functions = nn.ModuleList(modules)

    def forward(self, x: Tensor, *c: Tensor) -> Tensor:
        a, b = (x[..., ::2], x[..., 1::2]) if self.interleaved else x.chunk(2, -1)
        for part in self.parts:
            a, b = part(a, b, *c)
        return torch.stack([a, b], -1).flatten(-2) if self.interleaved else torch.cat([a, b], -1)


# ---- faces -----------------------------------------------------------------------------------------------------------


def op_of(program: Program, trunk: Trunk) -> inv.Invertible:
    """The whole chain."""
    halves = inv.split(2, dim=-1, interleaved=program.interleaved)
    stages = [part.op() for part in trunk.parts]
    return inv.chain(beside(halves), *stages, beside(~halves)) if program.side else inv.chain(halves, *stages, ~halves)


def options(program: Program) -> dict[str, Any]:
    """What `checkpoint` is told."""
    return {"mode": program.mode, "segments": program.segments, "drift": "off"}


class Rebuilt:
    """Makes the op and lowers it in each call."""

    def __init__(self, program: Program, trunk: Trunk) -> None:
        self.program, self.trunk = program, trunk

    def __call__(self, *xs: Tensor) -> Any:
        return inv.checkpoint(op_of(self.program, self.trunk), **options(self.program))(*xs)


def sequential(program: Program, trunk: Trunk) -> nn.Module:
    modes = {"invert": "invert", None: "invert"}
    layers = [
        inv.nn.Coupling(
            **coupling(part),
            dim=-1,
            interleaved=program.interleaved,
            mode=modes.get(part.stage.mark, part.stage.mark),
        )
        for part in trunk.parts
    ]
    return inv.nn.Sequential(*layers, **options(program))


FACES: dict[str, Callable[[Program, Trunk], Any]] = {
    "value": lambda program, trunk: inv.checkpoint(op_of(program, trunk), **options(program)),
    "lowered": lambda program, trunk: inv.nn.Lowered(op_of(program, trunk), **options(program)),
    "sequential": sequential,
    "rebuilt": Rebuilt,
    "function": lambda program, trunk: inv.checkpoint(lambda *xs: trunk(*xs), mode=program.mode),
    "module": lambda program, trunk: inv.checkpoint(trunk, mode=program.mode),
}


class World:
    """The modules and tensors of a program, and the function that is called: lowered, or plain."""

    def __init__(self, program: Program, lowered: bool) -> None:
        parts = Parts(lowered)
        made = []
        for stage in program.stages:
            made.append(Part(stage, parts, program.side))
        self.trunk = Trunk(made, parts.modules, program.interleaved)
        self.loose: list[Tensor] = parts.tensors
        self.lowered, self.side = lowered, program.side
        # In plain Python copies share what a closure holds; copies of ops do not, so that they are the copy's own.
        has_closures = any(fn.kind in CLOSURES for fn in program.functions())
        self.copies = program.face != "function" and not has_closures
        self.hooks: list[Any] = []
        self.face = FACES[program.face](program, self.trunk) if lowered else self.trunk

    def __call__(self, x: Tensor) -> Tensor:
        """The output; the side input is made of the place in the batch."""
        if not self.side:
            return self.face(x)
        y = self.face(x, torch.arange(len(x)) % 3)
        return y[0] if isinstance(y, tuple) else y

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Every parameter, by each of its names, and the tensors that belong to no module."""
        named = list(self.trunk.named_parameters(remove_duplicate=False))
        return [*named, *((f"loose {i}", t) for i, t in enumerate(self.loose))]

    def leaves(self) -> list[Tensor]:
        """What gradients can be asked for, each once."""
        return list({id(t): t for _, t in self.tensors() if t.requires_grad and t.is_leaf}.values())

    def buffers(self) -> list[tuple[str, Tensor]]:
        return list(self.trunk.named_buffers(remove_duplicate=False))
