"""Trials: run an op on an input, twice alike if need be, and leave no trace of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.op import Invertible, graph_leaves
from ..engine.devices import generators
from ..engine.parts import Parts
from ..wires import Wire, is_differentiable, leaves, map_wire


@contextmanager
def untouched(op: Invertible) -> Iterator[None]:
    """Put back what a trial moves in an op's modules: running statistics, and parameters set by their first data."""
    found = Parts(op.functions)
    state = [t for module in (*found.roots, *found.nearby) for t in (*module.buffers(), *module.parameters())]
    before = [tensor.detach().clone() for tensor in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def states() -> tuple[Tensor, ...]:
    """The states of the global generators."""
    return tuple(generator.get_state() for generator in generators())


@contextmanager
def same_dice() -> Iterator[None]:
    """Whatever runs inside draws the same random numbers; the global ones are as they were after."""
    found, before = generators(), states()
    for generator in found:
        generator.manual_seed(0)
    try:
        yield
    finally:
        for generator, state in zip(found, before, strict=True):
            generator.set_state(state)


def noise(like: Wire, seed: int = 0) -> Wire:
    """Random numbers of the shapes of a wire's differentiable leaves; None for the others."""
    generator = torch.Generator().manual_seed(seed)

    def draw(leaf: Any) -> Any:
        if not is_differentiable(leaf):
            return None
        return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device="cpu").to(leaf.device)

    return map_wire(draw, like)


def fresh(leaf: Any) -> Any:
    """A leaf of a wire as a leaf of a graph."""
    return leaf.detach().clone().requires_grad_() if is_differentiable(leaf) else leaf


def _result(leaf: Any) -> Any:
    """A leaf of a graph as a result, which is rebuilt: a leaf lives anyway."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def differentiable(wire: Wire) -> list[Tensor]:
    """The tensors of a wire that can have a gradient."""
    return [leaf for leaf in leaves(wire) if is_differentiable(leaf)]


def roots(y: Wire, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Outputs that have a graph, each with a random gradient."""
    pairs = zip(leaves(y), leaves(noise(y, seed)), strict=True)
    return [(o, s) for o, s in pairs if s is not None and o.requires_grad]


def closed_over(op: Invertible, x: Wire) -> list[Tensor]:
    """The leaf tensors that plain autograd reaches from the op's output, beside its input."""
    given = map_wire(fresh, x)
    with same_dice():
        y = op.forward(given)
    return graph_leaves([o for o, _ in roots(y)], {id(leaf) for leaf in differentiable(given)})


def gradients_of(op: Invertible, x: Wire, closed: list[Tensor], twice: bool = False) -> tuple[Wire, Wire, Wire]:
    """``y, gx, gclosed``: a step of training; with ``twice``, the gradient of a random projection of the gradients."""
    given = map_wire(fresh, x)
    with same_dice():
        y = op.forward(map_wire(_result, given))
    own = differentiable(given)
    found = vjp_of(roots(y), [*own, *closed], create_graph=twice)
    if twice:
        found = vjp_of(roots(tuple(found), seed=1), [*own, *closed])
    return y, tuple(found[: len(own)]), tuple(found[len(own) :])


def vjp_of(roots: list[tuple[Tensor, Tensor]], targets: list[Tensor], create_graph: bool = False) -> Sequence[Tensor]:
    """The gradients of targets, zero where there is none."""
    if not (roots and targets):
        return [torch.zeros_like(target) for target in targets]
    outputs, seeds = zip(*roots, strict=True)
    options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(outputs, targets, seeds, **options)
