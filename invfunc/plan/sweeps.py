"""Errors of inverses: what a run of them does to the gradients, found by undoing it from exact values.

Rule 5 of NOTE [Profile].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.op import Invertible, LiveVJP, Residue
from ..wires import Wire, is_differentiable, leaves, map_wire
from .executor import has_inverse
from .inputs import as_input
from .trials import Loss, number_of, parameters_of

ANCHORS = 8  # at regular distances along a chain: sweeps from all of them take about half as many steps


def sweep(ops: Sequence[Invertible], x: Wire, loss: Loss) -> tuple[tuple[int, int, float], ...]:
    """The gradient error of runs of inverses: ``(i, k, error)`` for anchors k; rule 5 of NOTE [Profile]."""
    found: list[tuple[int, int, float]] = []
    exact = _exact(ops, x, loss)
    for k in _anchors(ops):
        y, gy, worst = exact.xs[k], exact.gs[k], 0.0
        for i in range(k - 1, -1, -1):
            if not has_inverse(ops[i]) or gy is None:
                break
            y, gy, closed = _pull_from_output(ops[i], exact.residues[i], y, gy, exact.parameters[i])
            worst = max(worst, _distance(leaves(gy), leaves(exact.gs[i])), _distance(closed, exact.closed[i]))
            found.append((i, k, worst))
    return tuple(found)


def _anchors(ops: Sequence[Invertible]) -> list[int]:
    """The ends of the longest runs of inverses, and boundaries inside them at regular distances."""
    able, spacing = [has_inverse(op) for op in ops] + [False], -(-len(ops) // ANCHORS)
    ends = [k for k in range(1, len(ops) + 1) if able[k - 1] and not able[k]]
    return sorted({*ends, *(k for k in range(spacing, len(ops), spacing) if able[k - 1])})


class Exact(NamedTuple):
    """A plain step, op by op: every value and its gradient; what each op loses, and closes over, with its gradients."""

    xs: list[Wire]
    gs: list[Wire]
    residues: list[Residue]
    parameters: list[list[Tensor]]
    closed: list[list[Any]]


def _exact(ops: Sequence[Invertible], x: Wire, loss: Loss) -> Exact:
    found = Exact([as_input(x)], [], [], [], [])
    for op in ops:
        found.parameters.append(parameters_of(op, found.xs[-1]))
        with torch.no_grad():
            y, residue = op.forward_with_residue(found.xs[-1])
        found.xs.append(as_input(y))
        found.residues.append(residue)
    tensors = [t for t in leaves(found.xs[-1]) if is_differentiable(t)]
    given = iter(torch.autograd.grad(number_of(loss, found.xs[-1]), tensors, allow_unused=True))
    found.gs.append(map_wire(lambda t: next(given) if is_differentiable(t) else None, found.xs[-1]))
    for op, value, parameters in zip(reversed(ops), found.xs[-2::-1], reversed(found.parameters), strict=True):
        gx, weights = _pull_by_tape(op, value, found.gs[0], parameters)
        found.gs.insert(0, gx)
        found.closed.insert(0, weights)
    return found


def _pull_by_tape(op: Invertible, x: Wire, gy: Wire, parameters: list[Tensor]) -> tuple[Wire, list[Any]]:
    """The gradients of x and of what an op closes over, with a tape."""
    y = op.forward(x)
    pairs = [(t, g) for t, g in zip(leaves(y), leaves(gy), strict=True) if g is not None and t.requires_grad]
    inputs = [t for t in leaves(x) if is_differentiable(t)]
    if not pairs:
        return map_wire(lambda _: None, x), [None] * len(parameters)
    roots, seeds = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(roots, [*inputs, *parameters], seeds, allow_unused=True))
    return map_wire(lambda t: next(found) if is_differentiable(t) else None, x), list(found)


def _pull_from_output(
    op: Invertible, residue: Residue, y: Wire, gy: Wire, parameters: list[Tensor]
) -> tuple[Wire, Wire, list[Any]]:
    """The rebuilt input and the gradients that come with it, from an output that may be a little off."""
    vjp = LiveVJP()
    x, gx = op.pull(residue, y, gy, vjp, None)
    closed = [vjp.closed[id(p)][1] if id(p) in vjp.closed else None for p in parameters]
    return map_wire(lambda t: t.detach() if isinstance(t, Tensor) else t, x), gx, closed


def _distance(found: Sequence[Any], exact: Sequence[Any]) -> float:
    """The largest difference of tensors, each relative to its largest entry."""
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return max((relative(a, b) for a, b in pairs), default=0.0)


def relative(found: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest entry; infinite where something is not a number."""
    if exact.numel() == 0:
        return 0.0
    error = float((found - exact).abs().max() / exact.abs().max().clamp(min=torch.finfo(exact.dtype).tiny))
    return error if math.isfinite(error) else math.inf
