"""Lowered pipelines under plain autograd: gradients of every order, in every place, by any of the tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from catalogue import mlp, weight
from kit import TOLERANCE, WIDTH, assert_close, bowl, in_turn, step_gradients, total, with_leaf
from torch import Tensor, func, nn

import invfunc as inv


def small() -> tuple[inv.Invertible, list[Tensor]]:
    w, v = weight(2), weight(2)
    return in_turn(lambda x: torch.tanh(x * w), lambda x: torch.sin(x) * v), [w, v]


def test_gradcheck() -> None:
    op, tensors = small()
    fn = lambda x, *tensors: inv.checkpoint(op)(x)  # noqa: E731
    inputs = (torch.randn(2, 4, requires_grad=True), *tensors)
    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


def test_gradients_of_every_order() -> None:
    op, tensors = small()
    x = torch.randn(2, 4, requires_grad=True)
    for order in range(4):
        found, expected = ([bowl(f(x))] for f in (inv.checkpoint(op), op))
        for _ in range(order):
            found, expected = (
                torch.autograd.grad(total(ys), [x, *tensors], create_graph=True) for ys in (found, expected)
            )
        assert_close(found, expected, TOLERANCE)


def test_a_graph_that_is_retained_gives_the_same_gradients_again() -> None:
    op, tensors = small()
    x = torch.randn(2, 4, requires_grad=True)
    scalar = bowl(inv.checkpoint(op)(x))
    first, second = (torch.autograd.grad(scalar, [x, *tensors], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_graph_that_is_not_retained_is_used_up() -> None:
    op, _ = small()
    scalar = bowl(inv.checkpoint(op)(torch.randn(2, 4, requires_grad=True)))
    scalar.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        scalar.backward()


def test_gradients_by_some_of_the_inputs() -> None:
    op, (w, v) = small()
    x = torch.randn(2, 4, requires_grad=True)
    for inputs in [x], [w], [v], [v, x]:
        found, expected = (torch.autograd.grad(bowl(f(x)), inputs) for f in (inv.checkpoint(op), op))
        assert_close(found, expected)


def test_a_change_of_the_output_raises_in_backward() -> None:
    op, _ = small()
    y = inv.checkpoint(op)(torch.randn(2, 4, requires_grad=True))
    scalar = y.sum()
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scalar.backward()


def test_an_in_place_activation_after_it_raises_in_backward() -> None:
    op, _ = small()
    x = torch.randn(2, 4, requires_grad=True)
    for activate in torch.relu_, lambda y: y.mul_(3):
        scalar = activate(inv.checkpoint(op)(x)).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            scalar.backward()


def test_components_without_a_gradient() -> None:
    (fn, tensors), other = with_leaf(), nn.Linear(WIDTH, WIDTH)
    block = inv.couple(fn, other)
    a, b = torch.randn(3, WIDTH, requires_grad=True), torch.randn(3, WIDTH)
    for xs in (a, b), (b, a), (b, b):
        inputs = [*filter(lambda t: t.requires_grad, xs), *tensors, *other.parameters()]
        found, expected = (torch.autograd.grad(total(f(xs)), inputs) for f in (inv.checkpoint(block), block))
        assert_close(found, expected)


def test_one_output_of_two_is_used() -> None:
    fn, tensors = with_leaf()
    block = inv.chain(inv.couple(fn, fn), inv.couple(fn))
    x = torch.randn(3, WIDTH, requires_grad=True), torch.randn(3, WIDTH, requires_grad=True)
    for i in range(2):
        found, expected = (torch.autograd.grad(bowl(f(x)[i]), [*x, *tensors]) for f in (inv.checkpoint(block), block))
        assert_close(found, expected)


def test_one_value_in_two_places() -> None:
    fn, tensors = with_leaf()
    x = torch.randn(3, WIDTH, requires_grad=True)
    block = inv.couple(fn, fn)
    found, expected = (torch.autograd.grad(total(f(x, x)), [x, *tensors]) for f in (inv.checkpoint(block), block))
    assert_close(found, expected)


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: lambda x: module(x)], ids=["module", "closure"])
def test_a_hook_on_a_parameter_runs_once(wrap: Callable[[nn.Module], Any]) -> None:
    module = nn.Linear(WIDTH, WIDTH)
    module.weight.register_hook(lambda g: 10 * g)
    op, x = in_turn(wrap(module), torch.tanh), torch.randn(3, 2 * WIDTH)
    found, expected = (torch.autograd.grad(bowl(f(x)), [module.weight]) for f in (inv.checkpoint(op), op))
    assert_close(found, expected)


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: lambda x: module(x)], ids=["module", "closure"])
def test_gradients_accumulate_as_in_plain_autograd(wrap: Callable[[nn.Module], Any]) -> None:
    module = nn.Linear(WIDTH, WIDTH)
    op, x = in_turn(wrap(module), torch.tanh), torch.randn(3, 2 * WIDTH)
    gradients = []
    for f in inv.checkpoint(op), op:
        module.zero_grad()
        for scale in 1, 3:
            (scale * bowl(f(x))).backward()
        gradients.append(module.weight.grad)
    assert_close(*gradients)


def test_batched_gradients() -> None:
    op, tensors = small()
    x, gy = torch.randn(2, 4, requires_grad=True), torch.randn(5, 2, 4)
    found, expected = (
        torch.autograd.grad(f(x), [x, *tensors], gy, is_grads_batched=True) for f in (inv.checkpoint(op), op)
    )
    assert_close(found, expected)


def test_torch_autograd_functional() -> None:
    op, _ = small()
    fast, x = inv.checkpoint(op), torch.randn(2, 4)
    for options in {}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}:
        jacobian = partial(torch.autograd.functional.jacobian, inputs=x, **options)
        assert_close(jacobian(fast), jacobian(op))
    hessian = partial(torch.autograd.functional.hessian, inputs=x)
    assert_close(hessian(lambda x: bowl(fast(x))), hessian(lambda x: bowl(op(x))))


def test_a_pipeline_that_closes_over_what_another_computed() -> None:
    encode, (fn, tensors) = nn.Linear(2 * WIDTH, WIDTH), with_leaf()
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)

    def step(transform: Callable[..., Any]) -> Any:
        hidden = transform(in_turn(fn))(x)
        code = encode(hidden)
        y = transform(in_turn(lambda h: torch.tanh(h * code), lambda h: h.sin() + hidden[:, :WIDTH]))(hidden)
        return torch.autograd.grad(bowl(y) + bowl(code), [x, *tensors, *encode.parameters()])

    assert_close(step(inv.checkpoint), step(lambda op: op))


def gradient_of_an_energy(w: Tensor, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad((x * w).tanh().square().sum(), x, create_graph=True)[0]


def functional_gradient_of_an_energy(w: Tensor, x: Tensor) -> Tensor:
    return func.grad(lambda x: (x * w).tanh().square().sum())(x)


def row_by_row(w: Tensor, x: Tensor) -> Tensor:
    return func.vmap(lambda row: (row * w).tanh())(x)


TEMPLATE = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")


def with_other_weights(w: Tensor, x: Tensor) -> Tensor:
    return func.functional_call(TEMPLATE, {"weight": w.outer(w)}, (x,))


MODULE = nn.Linear(WIDTH, WIDTH).double()


def with_its_weights_scaled(w: Tensor, x: Tensor) -> Tensor:
    return func.functional_call(MODULE, {"weight": MODULE.weight * w}, (x,))


def again_in_backward(w: Tensor, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda x: (x * w).tanh(), x, use_reentrant=False)


def without_gradients(w: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (x * w).sum()
    return x * scale * w.detach() + w


INNER = [
    gradient_of_an_energy,
    functional_gradient_of_an_energy,
    row_by_row,
    with_other_weights,
    with_its_weights_scaled,
    again_in_backward,
    without_gradients,
]


@pytest.mark.parametrize("inner", INNER, ids=lambda inner: inner.__name__)
def test_functions_that_use_autograd_themselves(inner: Callable[[Tensor, Tensor], Tensor]) -> None:
    w, x = weight(WIDTH), torch.randn(3, 2 * WIDTH, requires_grad=True)
    op, tensors = in_turn(partial(inner, w), lambda x: inner(w, x).sin()), [w, MODULE.weight]
    assert_close(step_gradients(inv.checkpoint(op), x, tensors), step_gradients(op, x, tensors))


def test_steps_may_be_differentiated_in_any_order() -> None:
    op, tensors = small()
    xs = [torch.randn(2, 4, requires_grad=True) for _ in range(3)]
    scalars = [bowl(inv.checkpoint(op)(x)) for x in xs]
    for i in 1, 0, 2:
        assert_close(torch.autograd.grad(scalars[i], [xs[i], *tensors]), tuple(step_gradients(op, xs[i], tensors)))


def test_empty_batches() -> None:
    fn = mlp(WIDTH)
    tensors = list(fn.parameters())
    x = torch.randn(0, 2 * WIDTH, requires_grad=True)
    assert_close(step_gradients(inv.checkpoint(in_turn(fn)), x, tensors), step_gradients(in_turn(fn), x, tensors))


def test_a_thousand_blocks() -> None:
    fn, tensors = with_leaf()
    op = inv.chain(inv.split(2), *[inv.couple(lambda x: fn(x) / 99)] * 1000, inv.concat(2))
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)
    assert_close(step_gradients(inv.checkpoint(op), x, tensors), step_gradients(op, x, tensors))


def test_nothing_is_lowered_without_gradients() -> None:
    op, _ = small()
    with torch.no_grad():
        assert not inv.checkpoint(op)(torch.randn(2, 4, requires_grad=True)).requires_grad
    with torch.inference_mode():
        assert inv.checkpoint(op)(torch.randn(2, 4)).is_inference()
