"""Tensors that a lowered pipeline closes over get their gradients, in whatever way they are held."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from catalogue import weight
from kit import WIDTH, Captured, assert_close, in_turn, step_gradients, with_leaf
from torch import Tensor, nn

import invfunc as inv


def leaf() -> Captured:
    return with_leaf()


def non_leaf() -> Captured:
    w = weight(WIDTH)
    scale = w.exp()
    return lambda x: torch.tanh(x * scale), [w]


def leaf_and_what_depends_on_it() -> Captured:
    w = weight(WIDTH)
    scale = w.exp()
    return lambda x: torch.tanh(x * scale + w), [w]


def view() -> Captured:
    w = weight(3, WIDTH)
    row = w[1]
    return lambda x: torch.tanh(x * row), [w]


def in_dict() -> Captured:
    held = {"w": weight(WIDTH), "nested": [weight(WIDTH)]}
    return lambda x: torch.tanh(x * held["w"]) * held["nested"][0], [held["w"], *held["nested"]]


def in_partial() -> Captured:
    w, b = weight(WIDTH), weight(WIDTH)
    return partial(lambda w, x, b: torch.tanh(x * w) + b, w, b=b), [w, b]


def default_argument() -> Captured:
    w = weight(WIDTH)

    def fn(x: Tensor, w: Tensor = w) -> Tensor:
        return torch.tanh(x * w)

    return fn, [w]


def attribute_of_an_object() -> Captured:
    held = SimpleNamespace(w=weight(WIDTH))
    return lambda x: torch.tanh(x * held.w), [held.w]


class Scaler:
    def __init__(self) -> None:
        self.w = weight(WIDTH)

    def scale(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.w)

    __call__ = scale


def bound_method() -> Captured:
    scaler = Scaler()
    return scaler.scale, [scaler.w]


def callable_object() -> Captured:
    scaler = Scaler()
    return scaler, [scaler.w]


GLOBAL = {"w": torch.zeros(())}


def global_variable() -> Captured:
    GLOBAL["w"] = weight(WIDTH)
    return lambda x: torch.tanh(x * GLOBAL["w"]), [GLOBAL["w"]]


def keyword_of_a_torch_function() -> Captured:
    w, b = weight(WIDTH, WIDTH), weight(WIDTH)
    return lambda x: nn.functional.linear(input=x, weight=w, bias=b), [w, b]


def in_a_list_given_to_torch() -> Captured:
    w = weight(WIDTH)
    return lambda x: torch.stack([x, w.expand_as(x)]).prod(0), [w]


def operand_on_the_left() -> Captured:
    w = weight(WIDTH)
    return lambda x: w / (1 + x * x) + w @ w, [w]


def linear_module() -> Captured:
    module = nn.Linear(WIDTH, WIDTH)
    return module, list(module.parameters())


def deep_module() -> Captured:
    module = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, WIDTH))
    return module, list(module.parameters())


def module_in_closure() -> Captured:
    module = nn.Linear(WIDTH, WIDTH)
    return lambda x: torch.tanh(module(x)), list(module.parameters())


def weights_of_a_module_in_closure() -> Captured:
    module = nn.Linear(WIDTH, WIDTH)
    return lambda x: torch.tanh(x @ module.weight.T + module.bias), list(module.parameters())


def bound_method_of_a_module() -> Captured:
    module = nn.Linear(WIDTH, WIDTH)
    return module.forward, list(module.parameters())


def module_in_partial() -> Captured:
    module = nn.Bilinear(WIDTH, WIDTH, WIDTH)
    w = weight(1, WIDTH)
    return lambda x: partial(module, input2=w.expand_as(x))(x), [w, *module.parameters()]


def frozen_parameter() -> Captured:
    module = nn.Linear(WIDTH, WIDTH)
    module.weight.requires_grad_(False)
    return module, [module.bias]


class Reads(nn.Module):
    """Reads a tensor that it does not own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.held = nn.Linear(WIDTH, WIDTH), [weight(WIDTH)]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.held[0]


def module_that_reads_what_it_does_not_own() -> Captured:
    module = Reads()
    return module, [*module.held, *module.parameters()]


def tied_weights() -> Captured:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    module[2].weight = module[0].weight
    return module, list(module.parameters())


def parametrised_module() -> Captured:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    return module, list(module.parameters())


def checkpointed_function() -> Captured:
    w = weight(WIDTH)
    return inv.checkpoint(lambda x: torch.tanh(x * w)), [w]


def returned_as_it_is() -> Captured:
    w = weight(3, WIDTH)
    return lambda x: w, [w]


KINDS = [
    leaf,
    non_leaf,
    leaf_and_what_depends_on_it,
    view,
    in_dict,
    in_partial,
    default_argument,
    attribute_of_an_object,
    bound_method,
    callable_object,
    global_variable,
    keyword_of_a_torch_function,
    in_a_list_given_to_torch,
    operand_on_the_left,
    linear_module,
    deep_module,
    module_in_closure,
    weights_of_a_module_in_closure,
    bound_method_of_a_module,
    module_in_partial,
    frozen_parameter,
    module_that_reads_what_it_does_not_own,
    tied_weights,
    parametrised_module,
    checkpointed_function,
    returned_as_it_is,
]


@pytest.mark.parametrize("needs", [True, False], ids=["x requires grad", "x does not"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
class TestCapturedTensors:
    def test_in_couplings(self, kind: Callable[[], Captured], needs: bool) -> None:
        (fn, tensors), (other, more) = kind(), with_leaf()
        op = in_turn(fn, other, fn)  # shared by several stages
        x = torch.randn(3, 2 * WIDTH, requires_grad=needs)
        assert_close(step_gradients(inv.checkpoint(op), x, tensors + more), step_gradients(op, x, tensors + more))

    def test_in_pairs(self, kind: Callable[[], Captured], needs: bool) -> None:
        fn, tensors = kind()
        shift = inv.pair(lambda a, b: (a, b + fn(a)), lambda a, b: (a, b - fn(a)))
        op = inv.chain(inv.split(2), shift, inv.swap(), shift, inv.concat(2))
        x = torch.randn(3, 2 * WIDTH, requires_grad=needs)
        assert_close(step_gradients(inv.checkpoint(op), x, tensors), step_gradients(op, x, tensors))

    def test_in_one_way_stages_and_plain_functions(self, kind: Callable[[], Captured], needs: bool) -> None:
        fn, tensors = kind()
        op = inv.chain(fn, inv.pair(torch.sinh, torch.asinh), inv.mark(fn, "recompute"))
        x = torch.randn(3, WIDTH, requires_grad=needs)
        assert_close(step_gradients(inv.checkpoint(op), x, tensors), step_gradients(op, x, tensors))
        assert_close(step_gradients(inv.checkpoint(fn), x, tensors), step_gradients(fn, x, tensors))


# ---- the same tensor in a module's slot and in a closure -------------------------------------------------------------


def nested(w: Tensor, depth: int) -> Callable[[Tensor], Tensor]:
    """A function that holds a tensor behind other functions, deeper than anybody looks."""

    def multiply(x: Tensor) -> Tensor:
        return x * w

    fn = multiply
    for _ in range(depth):
        fn = partial(lambda inner, x: inner(x), lambda x, inner=fn: inner(x))
    return fn


def by_both(module: nn.Module, w: Tensor, x: Tensor) -> Tensor:
    return module.w * w * x


class Holder:
    """An object that has a module, and a tensor of it."""

    def __init__(self, module: nn.Module, w: Tensor) -> None:
        self.module, self.w = module, w

    def __call__(self, x: Tensor) -> Tensor:
        return by_both(self.module, self.w, x)


class HeldTwice(nn.Module):
    """A pipeline that reads one parameter by way of its slot and by way of a function."""

    WAYS: dict[str, Callable[["HeldTwice", Tensor], Callable[[Tensor], Tensor]]] = {
        "partial of a module": lambda m, w: partial(by_both, m, w),
        "object": Holder,
        "closure and method": lambda m, w: lambda x: m.slot(x) * w,
        "deep closure and method": lambda m, w: partial(lambda a, b, x: a(b(x)), m.slot, nested(w, 8)),
    }

    def __init__(self, way: str) -> None:
        super().__init__()
        self.w, self.way = nn.Parameter(weight(WIDTH).detach()), self.WAYS[way]
        self.lower: Callable[..., Any] = inv.checkpoint

    def slot(self, x: Tensor) -> Tensor:
        return x * self.w

    def forward(self, x: Tensor) -> Tensor:
        fn, w = self.way(self, self.w), self.w
        twice = inv.pair(fn, lambda y: y / w**2)
        return self.lower(inv.chain(twice, inv.ops.sinh(), inv.mark(one_way_of(fn), "recompute")))(x)


def one_way_of(fn: Callable[[Tensor], Tensor]) -> inv.Invertible:
    return inv.pair(fn, lambda y: y)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
@pytest.mark.parametrize("way", HeldTwice.WAYS)
def test_a_tensor_that_a_slot_and_a_function_hold_gets_both_gradients(way: str, transform: Any) -> None:
    net, x = HeldTwice(way), torch.randn(3, WIDTH)
    given = {name: p.detach().clone() for name, p in net.named_parameters()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, p, (x,)).sin().sum()

    found = transform(loss)(given)
    net.lower = lambda op: op
    assert_close(found, transform(loss)(given), 1e-9)
