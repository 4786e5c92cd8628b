"""Second derivatives of every op, and gradients of many outputs at once: lowered, against numbers and against a loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES, batch_norm
from kit import assert_close, bowl
from torch import Tensor
from torch.autograd import gradgradcheck

import invfunc as inv
from invfunc.core.op import Rearrangement
from invfunc.engine.snapshot import Parts
from invfunc.testing import needs_no_residue
from invfunc.wires import is_differentiable, leaves, map_wire, unflatten

pytestmark = pytest.mark.filterwarnings("ignore::invfunc.errors.DriftWarning")

Function = tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]


def is_counted(leaf: Any) -> bool:
    """Whether a leaf has a derivative, and any element."""
    return is_differentiable(leaf) and bool(leaf.numel())


def on_tensors(op: inv.Invertible, x: Any) -> Function:
    """An op as a function from tensors to tensors, and where to call it."""
    places = [i for i, leaf in enumerate(leaves(x)) if is_counted(leaf)]

    def fn(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(places, tensors, strict=False))  # what an op closes over may follow
        torch.manual_seed(1)
        y = op.forward(unflatten(x, [given.get(i, leaf) for i, leaf in enumerate(leaves(x))]))
        return tuple(filter(is_counted, leaves(y)))

    return fn, [leaves(x)[i].detach().clone().requires_grad_() for i in places]


def smallest(name: str) -> Any:
    """The smallest input of an example, but for that with the edges."""
    return min(EXAMPLES[name].inputs()[:-1], key=lambda x: sum(leaf.numel() for leaf in leaves(x) if is_counted(leaf)))


def directions(name: str) -> list[tuple[inv.Invertible, Any]]:
    """An op with an input, and its inverse with another, both lowered."""
    op, x = EXAMPLES[name].make(), smallest(name)
    found = [(op, x)]
    if needs_no_residue(op, x):
        found.append((~op, map_wire(lambda leaf: leaf.detach() if is_differentiable(leaf) else leaf, op.forward(x))))
    return [(inv.checkpoint(op), x) for op, x in found]


def closed_over(op: inv.Invertible) -> list[Tensor]:
    """The leaves that an op has a gradient for."""
    parts = Parts(op.functions)
    tensors = [*parts.tensors, *(p for module in parts.modules for p in module.parameters(recurse=False))]
    return [t for t in {id(t): t for t in tensors}.values() if is_counted(t) and t.is_leaf and t.requires_grad]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_second_derivative_of_every_op_is_that_of_finite_differences(name: str) -> None:
    for op, x in directions(name):
        fn, inputs = on_tensors(op, x)
        assert gradgradcheck(fn, (*inputs, *closed_over(op)), atol=1e-4, rtol=1e-3, fast_mode=True)


# ---- many gradients at once ----------------------------------------------------------------------------------------

LOOKS_AT_NUMBERS = "residual_flow", "autoregressive"  # an iteration ends by what it sees; their docstrings say so


@pytest.mark.parametrize("name", [n for n in EXAMPLES if not n.startswith(LOOKS_AT_NUMBERS)])
def test_is_grads_batched_is_a_loop(name: str) -> None:
    for op, x in directions(name):
        fn, inputs = on_tensors(op, x)
        outputs = [y for y in fn(*inputs) if y.requires_grad]
        seeds = [torch.randn(3, *y.shape, dtype=y.dtype) for y in outputs]
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        found = torch.autograd.grad(outputs, inputs, seeds, is_grads_batched=True, **options)
        looped = [torch.autograd.grad(outputs, inputs, [s[i] for s in seeds], **options) for i in range(3)]
        expected = [torch.stack(each) for each in zip(*looped, strict=True)]
        unused = [f.expand_as(e) for f, e in zip(found, expected, strict=True)]  # torch makes one zero for all three
        assert_close(unused, expected, 1e-9)


REARRANGEMENTS = [name for name, example in EXAMPLES.items() if isinstance(example.make(), Rearrangement)]


@pytest.mark.parametrize("name", REARRANGEMENTS)
def test_a_rearrangement_is_mapped_and_differentiated_along_any_dimension(name: str) -> None:
    op, x = EXAMPLES[name].make(), smallest(name)
    for each, wire in ((op, x), (~op, op.forward(x))):
        fn, inputs = on_tensors(each, wire)
        fast, _ = on_tensors(inv.checkpoint(each), wire)
        expected = [torch.stack(ys) for ys in zip(fn(*inputs), fn(*[2 * t for t in inputs]), strict=True)]
        last = [torch.stack([t, 2 * t], -1) for t in inputs]
        assert_close(list(torch.func.vmap(fast, in_dims=-1)(*last)), expected, 0)
        jacobian = torch.autograd.functional.jacobian(fn, tuple(inputs))
        assert_close(torch.func.jacrev(fast, tuple(range(len(inputs))))(*inputs), jacobian, 0)
        assert_close(torch.autograd.functional.jacobian(fast, tuple(inputs), vectorize=True), jacobian, 0)


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_has_a_second_derivative_and_a_batched_gradient(training: bool) -> None:
    """Against torch's own, in ordinary autograd; below `torch.func`, see its docstring."""
    op, x = batch_norm(training), torch.randn(5, 4, 3, requires_grad=True)
    module = torch.nn.BatchNorm1d(4).train(training)
    weight, bias = Parts(op.functions).tensors[:2]
    with torch.no_grad():
        module.weight.copy_(weight), module.bias.copy_(bias)
    statistics = [t for m in Parts(op.functions).modules for t in m.buffers()]
    module.running_mean.copy_(statistics[0]), module.running_var.copy_(statistics[1])
    found, expected = (
        torch.autograd.functional.hessian(lambda x, f=f: bowl(f(x)), x) for f in (inv.checkpoint(op), module)
    )
    assert_close(found, expected, 1e-9)
    vectorized = torch.autograd.functional.hessian(lambda x: bowl(inv.checkpoint(op)(x)), x, vectorize=True)
    assert_close(vectorized, expected, 1e-9)
