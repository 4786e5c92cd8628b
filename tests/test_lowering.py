"""Lowered pipelines: the same values and gradients as plain autograd, at a bounded cost in memory and arithmetic."""

import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.utils.flop_counter import FlopCounterMode

import invfunc as inv
from invfunc.errors import ReplayError, WireError
from invfunc.look.memory import measure

TOLERANCE = 1e-9

WIDTH = 4


def weight(*shape: int) -> Tensor:
    return (0.5 * torch.randn(shape)).requires_grad_()


def net(*fns: Callable[..., Any], dim: int = -1) -> inv.Invertible:
    """Couplings on the halves of a tensor, each with two of the functions in turn."""
    blocks = [inv.couple(f, g) for f, g in zip(fns, fns[1:] + fns[:1], strict=True)]
    return inv.chain(inv.split(2, dim=dim), *blocks, inv.concat(2, dim=dim))


def bowl(y: Tensor) -> Tensor:
    """A scalar with gradients that differ from element to element."""
    return (y.sin() * y).sum()


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


# ---- captured tensors of every kind ----------------------------------------------------------------------------------

# Each returns a function, and the leaf tensors that it depends on.
Captured = tuple[Callable[..., Any], list[Tensor]]


def leaf() -> Captured:
    w = weight(WIDTH)
    return lambda x: torch.tanh(x * w), [w]


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


def gradients(op: Callable[..., Any], x: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """A step, and its gradients by x, if it has one, and by the tensors."""
    x = x.detach().requires_grad_(x.requires_grad)
    inputs = [*[x] * x.requires_grad, *tensors]
    options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(bowl(op(x)), inputs, **options))


@pytest.mark.parametrize("needs", [True, False], ids=["x requires grad", "x does not"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
class TestCapturedTensors:
    def test_in_couplings(self, kind: Callable[[], Captured], needs: bool) -> None:
        (fn, tensors), (other, more) = kind(), leaf()
        op = net(fn, other, fn)  # shared by several stages
        x = torch.randn(3, 2 * WIDTH, requires_grad=needs)
        assert_same(gradients(inv.checkpoint(op), x, tensors + more), gradients(op, x, tensors + more))

    def test_in_pairs(self, kind: Callable[[], Captured], needs: bool) -> None:
        fn, tensors = kind()
        shift = inv.pair(lambda a, b: (a, b + fn(a)), lambda a, b: (a, b - fn(a)))
        op = inv.chain(inv.split(2), shift, inv.swap(), shift, inv.concat(2))
        x = torch.randn(3, 2 * WIDTH, requires_grad=needs)
        assert_same(gradients(inv.checkpoint(op), x, tensors), gradients(op, x, tensors))

    def test_in_one_way_stages_and_plain_functions(self, kind: Callable[[], Captured], needs: bool) -> None:
        fn, tensors = kind()
        op = inv.chain(fn, inv.pair(torch.sinh, torch.asinh), inv.mark(fn, "recompute"))
        x = torch.randn(3, WIDTH, requires_grad=needs)
        assert_same(gradients(inv.checkpoint(op), x, tensors), gradients(op, x, tensors))
        assert_same(gradients(inv.checkpoint(fn), x, tensors), gradients(fn, x, tensors))


# ---- transforms ------------------------------------------------------------------------------------------------------

Params = dict[str, Tensor]


def params() -> Params:
    return {"w": 0.5 * torch.randn(2, WIDTH), "v": 0.5 * torch.randn(WIDTH, WIDTH), "s": 0.1 * torch.randn(2 * WIDTH)}


def build(p: Params) -> inv.Invertible:
    """A pipeline of pairs and couplings that closes over tensors of whatever transform it is built in."""
    scale = inv.pair(lambda x: x * p["s"].exp(), lambda y: y / p["s"].exp())
    return inv.chain(scale, net(lambda x: torch.tanh(x * p["w"][0]), lambda x: torch.sin(x @ p["v"]) * p["w"][1]))


def plain(p: Params, x: Tensor) -> Tensor:
    return build(p)(x)


def lowered(p: Params, x: Tensor, mode: str = "invert") -> Tensor:
    return inv.checkpoint(build(p), mode=mode)(x)


def loss(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda p, x: bowl(fn(p, x))


def total(gradients: Any) -> Tensor:
    return sum((bowl(g) for g in torch.utils._pytree.tree_leaves(gradients)), torch.zeros(()))


def stacked(p: Params) -> Params:
    return {name: torch.stack([t, -t, t / 2]) for name, t in p.items()}


BOTH = (0, 1)

# Each is given the function and (params, x), x a batch of rows.
TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Params, Tensor], Any]] = {
    "grad": lambda fn, p, x: func.grad(loss(fn), BOTH)(p, x),
    "grad of parameters": lambda fn, p, x: func.grad(loss(fn))(p, x),
    "grad and value": lambda fn, p, x: func.grad_and_value(loss(fn), BOTH)(p, x),
    "vjp": lambda fn, p, x: func.vjp(fn, p, x)[1](x.cos()),
    "jvp": lambda fn, p, x: func.jvp(fn, (p, x), ({k: t.cos() for k, t in p.items()}, x.cos())),
    "vmap": lambda fn, p, x: func.vmap(fn, (None, 0))(p, x),
    "vmap of grad": lambda fn, p, x: func.vmap(func.grad(loss(fn), BOTH), (None, 0))(p, x),
    "grad of vmap": lambda fn, p, x: func.grad(lambda p, x: bowl(func.vmap(fn, (None, 0))(p, x)), BOTH)(p, x),
    "vmap of vmap of grad": lambda fn, p, x: func.vmap(
        func.vmap(func.grad(loss(fn), BOTH), (None, 0)), (None, 1), out_dims=1
    )(p, torch.stack([x, -x], 1)),
    "ensemble": lambda fn, p, x: func.vmap(func.grad(loss(fn), BOTH), (0, None))(stacked(p), x),
    "ensemble of batches": lambda fn, p, x: func.vmap(func.vmap(func.grad(loss(fn)), (None, 0)), (0, None))(
        stacked(p), x
    ),
    "jacrev": lambda fn, p, x: func.jacrev(fn, BOTH)(p, x),
    "jacfwd": lambda fn, p, x: func.jacfwd(fn, BOTH)(p, x),
    "hessian": lambda fn, p, x: func.hessian(loss(fn), BOTH)(p, x),
    "jacrev of jacrev": lambda fn, p, x: func.jacrev(func.jacrev(loss(fn), BOTH), BOTH)(p, x),
    "grad of grad": lambda fn, p, x: func.grad(lambda p, x: total(func.grad(loss(fn), BOTH)(p, x)), BOTH)(p, x),
    "jvp of grad": lambda fn, p, x: func.jvp(func.grad(partial(loss(fn), p)), (x,), (x.cos(),)),
    "grad of jvp": lambda fn, p, x: func.grad(lambda p: bowl(func.jvp(partial(fn, p), (x,), (x.cos(),))[1]))(p),
    "vmap of hessian": lambda fn, p, x: func.vmap(func.hessian(loss(fn), 1), (None, 0))(p, x),
}


@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_the_lowered_pipeline_is_that_of_the_plain_one(name: str, mode: str) -> None:
    p, x = params(), torch.randn(3, 2 * WIDTH)
    assert_same(TRANSFORMS[name](partial(lowered, mode=mode), p, x), TRANSFORMS[name](plain, p, x))


@pytest.mark.parametrize("mode", ["invert", "recompute", "store"])
def test_other_leaves_ride_along_under_a_transform(mode: str) -> None:
    op = inv.chain(inv.parallel(inv.pair(torch.sinh, torch.asinh), inv.chain()), inv.swap())
    side = None, torch.tensor([1, 2])
    found = func.grad(lambda x: bowl(inv.checkpoint(op, mode=mode)(x, side)[1]))
    x = torch.randn(3)
    assert_same(found(x), func.grad(lambda x: bowl(x.sinh()))(x))


class Generous:
    """Equal to everything, as `unittest.mock.ANY` is; an array of numpy is not even that."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return True


def test_a_leaf_is_not_compared_with_anything() -> None:
    op, rider = inv.pair(lambda x, r: (2 * x, r), lambda y, r: (y / 2, r)), Generous()
    x = torch.randn(3, requires_grad=True)
    y, out = inv.checkpoint(inv.chain(op, op))(x, rider)
    y.sum().backward()
    assert out is rider and torch.equal(x.grad, torch.full((3,), 4.0))


def sheared(w: Tensor, gx: Callable[..., Any], x: Callable[..., Any] = lambda a, b: (a, b)) -> inv.Invertible:
    """``(2 a + b w, b)`` with a pullback that wraps the gradient, or the rebuilt input, as it is told."""

    def forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * a + b @ w, b

    def inverse(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return (a - b @ w) / 2, b

    def pullback(y: tuple[Tensor, Tensor], gy: tuple[Tensor, Tensor]) -> Any:
        return x(*inverse(*y)), gx(2 * gy[0], gy[1] + gy[0] @ w.T), [(w, y[1].T @ gy[0])]

    return inv.pair(forward, inverse, pullback=pullback)


@pytest.mark.parametrize(
    ("gx", "x"),
    [
        (lambda a, b: (a, b), lambda a, b: (a, b)),
        (lambda a, b: ((a, b),), lambda a, b: (a, b)),
        (lambda a, b: (a, b), lambda a, b: (a, b, None)),
    ],
    ids=["as they are", "nested", "one leaf more in x"],
)
def test_a_pullback_may_wrap_what_it_returns(gx: Callable[..., Any], x: Callable[..., Any]) -> None:
    w, a, b = (torch.randn(3, 3, requires_grad=True) for _ in range(3))
    found, plain = (chain(*[sheared(w, gx, x)] * 2)(a, b) for chain in (lowered_chain, inv.chain))
    for mine, theirs in zip(
        *(torch.autograd.grad(y[0].square().sum(), [a, b, w]) for y in (found, plain)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def lowered_chain(*ops: inv.Invertible) -> inv.Invertible:
    return inv.checkpoint(inv.chain(*ops))


@pytest.mark.parametrize("gx", [lambda a, b: (a, b, None), lambda a, b: torch.stack([a, b])], ids=["None", "stack"])
def test_a_pullback_with_another_number_of_gradients_is_named(gx: Callable[..., Any]) -> None:
    w, a, b = (torch.randn(3, 3, requires_grad=True) for _ in range(3))
    with pytest.raises(ReplayError, match=r"a pullback returned the gradient .*, expected 2 leaves, as the input of"):
        inv.checkpoint(sheared(w, gx))(a, b)[0].sum().backward()


@pytest.mark.parametrize("target", [0, 1])
def test_the_pullback_of_a_coupling_takes_a_gradient_for_each_component(target: int) -> None:
    half = inv.couple(torch.sin, torch.cos).parts[target]
    y = torch.randn(2, 3), torch.randn(2, 3)
    for gy in torch.randn(2, 2, 3), (*y, y[0]):
        with pytest.raises(WireError, match="couple received the wrong number of components, expected a tuple of 2"):
            half.pullback(y, gy)


def test_autograd_outside_of_a_transform_reaches_what_was_captured() -> None:
    p = {name: t.requires_grad_() for name, t in params().items()}
    x = torch.randn(3, 2 * WIDTH)
    steps = [total(func.vmap(func.grad(loss(fn), 1), (None, 0))(p, x)) for fn in (lowered, plain)]
    found, expected = (torch.autograd.grad(step, list(p.values())) for step in steps)
    assert_same(found, expected)


# ---- functional_call -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A network whose forward builds a pipeline from its own submodules."""

    def __init__(self, closures: bool) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, WIDTH))
        self.closures, self.lowered = closures, True

    def forward(self, x: Tensor) -> Tensor:
        f, g = self.f, self.g
        op = net(lambda x: f(x).sin(), lambda x: g(x).cos()) if self.closures else net(f, g)
        return (inv.checkpoint(op) if self.lowered else op)(x)


def call(module: Net, p: Params, x: Tensor) -> Tensor:
    return func.functional_call(module, p, (x,))


def eager(module: Net, p: Params, x: Tensor) -> Any:
    """Backward runs after the call, when the module has its own parameters again."""
    p = {name: t.detach().requires_grad_() for name, t in p.items()}
    y = call(module, p, x)
    return torch.autograd.grad(bowl(y), list(p.values()))


CALLS: dict[str, Callable[[Net, Params, Tensor], Any]] = {
    "eager": eager,
    "grad": lambda m, p, x: func.grad(lambda p: bowl(call(m, p, x)))(p),
    "vjp after the call": lambda m, p, x: func.vjp(lambda p: call(m, p, x), p)[1](x.cos()),
    "vmap of grad": lambda m, p, x: func.vmap(func.grad(lambda p, x: bowl(call(m, p, x))), (None, 0))(p, x),
    "ensemble": lambda m, p, x: func.vmap(func.grad(lambda p: bowl(call(m, p, x))))(
        {name: torch.stack([t, -t]) for name, t in p.items()}
    ),
    "hessian": lambda m, p, x: func.hessian(lambda x: bowl(call(m, p, x)))(x),
    "jacrev of grad": lambda m, p, x: func.jacrev(func.grad(lambda p: bowl(call(m, p, x))))(p),
}


@pytest.mark.parametrize("closures", [False, True], ids=["modules", "closures"])
@pytest.mark.parametrize("name", CALLS)
def test_functional_call(name: str, closures: bool) -> None:
    module, x = Net(closures), torch.randn(2, 2 * WIDTH)
    p = {name: t.detach() + 1 for name, t in module.named_parameters()}  # not the module's own
    found = CALLS[name](module, p, x)
    module.lowered = False
    assert_same(found, CALLS[name](module, p, x))


# ---- plain autograd --------------------------------------------------------------------------------------------------


def small() -> tuple[inv.Invertible, list[Tensor]]:
    w, v = weight(2), weight(2)
    return net(lambda x: torch.tanh(x * w), lambda x: torch.sin(x) * v), [w, v]


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
        assert_same(found, expected)


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
        assert_same(found, expected)


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
    (fn, tensors), other = leaf(), nn.Linear(WIDTH, WIDTH)
    block = inv.couple(fn, other)
    a, b = torch.randn(3, WIDTH, requires_grad=True), torch.randn(3, WIDTH)
    for xs in (a, b), (b, a), (b, b):
        inputs = [*filter(lambda t: t.requires_grad, xs), *tensors, *other.parameters()]
        found, expected = (torch.autograd.grad(total(f(xs)), inputs) for f in (inv.checkpoint(block), block))
        assert_same(found, expected)


def test_one_output_of_two_is_used() -> None:
    fn, tensors = leaf()
    block = inv.chain(inv.couple(fn, fn), inv.couple(fn))
    x = torch.randn(3, WIDTH, requires_grad=True), torch.randn(3, WIDTH, requires_grad=True)
    for i in range(2):
        found, expected = (torch.autograd.grad(bowl(f(x)[i]), [*x, *tensors]) for f in (inv.checkpoint(block), block))
        assert_same(found, expected)


def test_one_value_in_two_places() -> None:
    fn, tensors = leaf()
    x = torch.randn(3, WIDTH, requires_grad=True)
    block = inv.couple(fn, fn)
    found, expected = (torch.autograd.grad(total(f(x, x)), [x, *tensors]) for f in (inv.checkpoint(block), block))
    assert_same(found, expected)


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: lambda x: module(x)], ids=["module", "closure"])
def test_a_hook_on_a_parameter_runs_once(wrap: Callable[[nn.Module], Any]) -> None:
    module = nn.Linear(WIDTH, WIDTH)
    module.weight.register_hook(lambda g: 10 * g)
    op, x = net(wrap(module), torch.tanh), torch.randn(3, 2 * WIDTH)
    found, expected = (torch.autograd.grad(bowl(f(x)), [module.weight]) for f in (inv.checkpoint(op), op))
    assert_same(found, expected)


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: lambda x: module(x)], ids=["module", "closure"])
def test_gradients_accumulate_as_in_plain_autograd(wrap: Callable[[nn.Module], Any]) -> None:
    module = nn.Linear(WIDTH, WIDTH)
    op, x = net(wrap(module), torch.tanh), torch.randn(3, 2 * WIDTH)
    gradients = []
    for f in inv.checkpoint(op), op:
        module.zero_grad()
        for scale in 1, 3:
            (scale * bowl(f(x))).backward()
        gradients.append(module.weight.grad)
    assert_same(*gradients)


def test_batched_gradients() -> None:
    op, tensors = small()
    x, gy = torch.randn(2, 4, requires_grad=True), torch.randn(5, 2, 4)
    found, expected = (
        torch.autograd.grad(f(x), [x, *tensors], gy, is_grads_batched=True) for f in (inv.checkpoint(op), op)
    )
    assert_same(found, expected)


def test_torch_autograd_functional() -> None:
    op, _ = small()
    fast, x = inv.checkpoint(op), torch.randn(2, 4)
    for options in {}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}:
        jacobian = partial(torch.autograd.functional.jacobian, inputs=x, **options)
        assert_same(jacobian(fast), jacobian(op))
    hessian = partial(torch.autograd.functional.hessian, inputs=x)
    assert_same(hessian(lambda x: bowl(fast(x))), hessian(lambda x: bowl(op(x))))


def test_a_pipeline_that_closes_over_what_another_computed() -> None:
    encode, (fn, tensors) = nn.Linear(2 * WIDTH, WIDTH), leaf()
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)

    def step(transform: Callable[..., Any]) -> Any:
        hidden = transform(net(fn))(x)
        code = encode(hidden)
        y = transform(net(lambda h: torch.tanh(h * code), lambda h: h.sin() + hidden[:, :WIDTH]))(hidden)
        return torch.autograd.grad(bowl(y) + bowl(code), [x, *tensors, *encode.parameters()])

    assert_same(step(inv.checkpoint), step(lambda op: op))


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
    op, tensors = net(partial(inner, w), lambda x: inner(w, x).sin()), [w, MODULE.weight]
    assert_same(gradients(inv.checkpoint(op), x, tensors), gradients(op, x, tensors))


def test_steps_may_be_differentiated_in_any_order() -> None:
    op, tensors = small()
    xs = [torch.randn(2, 4, requires_grad=True) for _ in range(3)]
    scalars = [bowl(inv.checkpoint(op)(x)) for x in xs]
    for i in 1, 0, 2:
        assert_same(torch.autograd.grad(scalars[i], [xs[i], *tensors]), tuple(gradients(op, xs[i], tensors)))


def test_empty_batches() -> None:
    fn, tensors = deep_module()
    x = torch.randn(0, 2 * WIDTH, requires_grad=True)
    assert_same(gradients(inv.checkpoint(net(fn)), x, tensors), gradients(net(fn), x, tensors))


def test_a_thousand_blocks() -> None:
    fn, tensors = leaf()
    op = inv.chain(inv.split(2), *[inv.couple(lambda x: fn(x) / 99)] * 1000, inv.concat(2))
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)
    assert_same(gradients(inv.checkpoint(op), x, tensors), gradients(op, x, tensors))


def test_nothing_is_lowered_without_gradients() -> None:
    op, _ = small()
    with torch.no_grad():
        assert not inv.checkpoint(op)(torch.randn(2, 4, requires_grad=True)).requires_grad
    with torch.inference_mode():
        assert inv.checkpoint(op)(torch.randn(2, 4)).is_inference()


# ---- what is evaluated -----------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


def counted_closure(module: Counted) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x).sin()


@pytest.mark.parametrize("wrap", [lambda module: module, counted_closure], ids=["modules", "closures"])
@pytest.mark.parametrize("law", [None, inv.affine], ids=["additive", "affine"])
def test_each_function_runs_twice_in_a_step(wrap: Any, law: Any) -> None:
    modules = [Counted() for _ in range(6)]
    blocks = [
        inv.couple(wrap(f), wrap(g)) if law is None else inv.couple(*(as_affine(wrap(m)) for m in (f, g)), law=law)
        for f, g in zip(modules[::2], modules[1::2], strict=True)
    ]
    op = inv.checkpoint(inv.chain(inv.split(2), *blocks, inv.concat(2)))
    op(torch.randn(3, 2 * WIDTH, requires_grad=True)).sum().backward()
    assert [module.calls for module in modules] == [2] * 6


def as_affine(fn: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return inv.ops.tanh_scale(lambda x: (fn(x), x))


def test_a_frozen_first_half_is_not_rebuilt() -> None:
    modules = [Counted() for _ in range(8)]
    for module in modules[:4]:
        module.requires_grad_(False)
    blocks = [inv.couple(f, g) for f, g in zip(modules[::2], modules[1::2], strict=True)]
    inv.checkpoint(inv.chain(inv.split(2), *blocks))(torch.randn(3, 2 * WIDTH))[0].sum().backward()
    assert [module.calls for module in modules[:4]] == [1] * 4
    assert all(module.linear.weight.grad is not None for module in modules[4:-1])


def conv(channels: int) -> nn.Module:
    layers = nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(*layers).float()


def conv_net(depth: int) -> tuple[inv.Invertible, list[nn.Module]]:
    modules = [conv(8) for _ in range(2 * depth)]
    return inv.chain(inv.split(2), *map(inv.couple, modules[::2], modules[1::2]), inv.concat(2)), modules


def test_flops_of_a_step() -> None:
    op, _ = conv_net(4)
    counts = []
    for fn in inv.checkpoint(op), op:
        with FlopCounterMode(display=False) as counter:
            fn(torch.randn(1, 16, 8, 8, dtype=torch.float32, requires_grad=True)).square().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] <= 1.345 * counts[1]


# ---- memory ----------------------------------------------------------------------------------------------------------

SHAPE = 4, 16, 32, 32
ACTIVATION = 4 * 4 * 16 * 32 * 32  # bytes


def image() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float32, requires_grad=True)


@pytest.mark.parametrize("depth", [4, 64])
class TestMemory:
    def test_held_after_forward(self, depth: int) -> None:
        op, _ = conv_net(depth)
        x = image()
        assert measure(inv.checkpoint(op), x).held_bytes <= 1.3 * ACTIVATION

    def test_peak_of_a_step(self, depth: int) -> None:
        op, modules = conv_net(depth)
        for module in modules:
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)  # the gradients of weights are not counted
        fast = inv.checkpoint(op)

        def step() -> None:
            fast(image()).square().sum().backward()

        assert measure(step).peak_bytes <= 6.6 * ACTIVATION


def test_a_forward_without_a_backward_leaves_nothing_alive(no_gc: None) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def f(x: Tensor) -> Tensor:
        y = torch.tanh(x)
        seen.extend([weakref.ref(x), weakref.ref(y)])
        return y

    x = torch.randn(3, 2 * WIDTH, requires_grad=True)
    op = inv.checkpoint(net(f, nn.Linear(WIDTH, WIDTH), f))
    y = op(x)
    kept = [weakref.ref(y), weakref.ref(y.grad_fn)]
    del y
    assert [ref() for ref in (*seen, *kept)] == [None] * (len(seen) + 2)
    x = weakref.ref(x)
    assert x() is None


def test_a_step_leaves_nothing_alive(no_gc: None) -> None:
    op = inv.checkpoint(net(torch.tanh, nn.Linear(WIDTH, WIDTH)))
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)
    y = op(x)
    y.sum().backward()
    kept = [weakref.ref(t) for t in (x, y, x.grad)]
    del x, y
    assert [ref() for ref in kept] == [None] * 3
