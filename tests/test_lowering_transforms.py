"""Lowered pipelines under the transforms of `torch.func`, and in modules under `functional_call`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kit import TOLERANCE, WIDTH, assert_close, bowl, in_turn, total
from torch import Tensor, func, nn

import invfunc as inv
from invfunc.errors import ReplayError, WireError

# ---- transforms ------------------------------------------------------------------------------------------------------


Params = dict[str, Tensor]


def params() -> Params:
    return {"w": 0.5 * torch.randn(2, WIDTH), "v": 0.5 * torch.randn(WIDTH, WIDTH), "s": 0.1 * torch.randn(2 * WIDTH)}


def build(p: Params) -> inv.Invertible:
    """A pipeline of pairs and couplings that closes over tensors of whatever transform it is built in."""
    scale = inv.pair(lambda x: x * p["s"].exp(), lambda y: y / p["s"].exp())
    return inv.chain(scale, in_turn(lambda x: torch.tanh(x * p["w"][0]), lambda x: torch.sin(x @ p["v"]) * p["w"][1]))


def plain(p: Params, x: Tensor) -> Tensor:
    return build(p)(x)


def lowered(p: Params, x: Tensor, mode: str = "invert") -> Tensor:
    return inv.checkpoint(build(p), mode=mode)(x)


def loss(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda p, x: bowl(fn(p, x))


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
    assert_close(TRANSFORMS[name](partial(lowered, mode=mode), p, x), TRANSFORMS[name](plain, p, x))


@pytest.mark.parametrize("mode", ["invert", "recompute", "store"])
def test_other_leaves_ride_along_under_a_transform(mode: str) -> None:
    op = inv.chain(inv.parallel(inv.pair(torch.sinh, torch.asinh), inv.chain()), inv.swap())
    side = None, torch.tensor([1, 2])
    found = func.grad(lambda x: bowl(inv.checkpoint(op, mode=mode)(x, side)[1]))
    x = torch.randn(3)
    assert_close(found(x), func.grad(lambda x: bowl(x.sinh()))(x))


class Generous:
    """Equal to everything, as `unittest.mock.ANY` is; an array of numpy is not even that."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return True


def test_a_leaf_is_not_compared_with_anything() -> None:
    op, rider = inv.pair(lambda x, r: (x.exp(), r), lambda y, r: (y.log(), r)), Generous()
    x = torch.randn(3, requires_grad=True)
    y, out = inv.checkpoint(inv.chain(op, op))(x, rider)
    y.sum().backward()
    assert out is rider
    assert_close(x.grad, (x + x.exp()).exp())


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
    tensors = tuple(torch.randn(3, 3) for _ in range(3))

    def gradients(chain: Callable[..., inv.Invertible]) -> Any:
        step = lambda a, b, w: chain(*[sheared(w, gx, x)] * 2)(a, b)[0].square().sum()  # noqa: E731
        return func.grad(step, (0, 1, 2))(*tensors)

    assert_close(gradients(lowered_chain), gradients(inv.chain))


def lowered_chain(*ops: inv.Invertible) -> inv.Invertible:
    return inv.checkpoint(inv.chain(*ops))


@pytest.mark.parametrize("gx", [lambda a, b: (a, b, None), lambda a, b: torch.stack([a, b])], ids=["None", "stack"])
def test_a_pullback_with_another_number_of_gradients_is_named(gx: Callable[..., Any]) -> None:
    w, a, b = (torch.randn(3, 3, requires_grad=True) for _ in range(3))
    with pytest.raises(ReplayError, match=r"a pullback returned the gradient .*, expected 2 leaves, as the input of"):
        func.grad(lambda a: inv.checkpoint(sheared(w, gx))(a, b)[0].sum())(a)


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
    assert_close(found, expected)


# ---- functional_call -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A network whose forward builds a pipeline from its own submodules."""

    def __init__(self, closures: bool) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, WIDTH))
        self.closures, self.lowered = closures, True

    def forward(self, x: Tensor) -> Tensor:
        f, g = self.f, self.g
        op = in_turn(lambda x: f(x).sin(), lambda x: g(x).cos()) if self.closures else in_turn(f, g)
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
    assert_close(found, CALLS[name](module, p, x), TOLERANCE)


# ---- what vmap does not map ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [None, inv.affine], ids=["additive", "affine"])
@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("wrt", [0, 1], ids=["weights", "input"])
def test_weights_that_vmap_maps_and_an_input_that_it_does_not(wrt: int, mode: str, law: Any) -> None:
    def branch(w: Tensor) -> Any:
        fn = inv.one_way(lambda t: torch.tanh(t @ w))
        return fn if law is None else inv.ops.tanh_scale(lambda t: torch.cat([fn(t), t], 1))

    def pipeline(w: Tensor) -> inv.Invertible:
        options = {} if law is None else {"law": law}
        return inv.chain(inv.split(2), inv.couple(torch.sin), inv.couple(branch(w), branch(2 * w), **options))

    def total_of(weights: Tensor, x: Tensor, lower: Callable[..., Any]) -> Tensor:
        return func.vmap(lambda w: sum(part.sin().sum() for part in lower(pipeline(w))(x)))(weights).sum()

    given = torch.randn(3, 2, 2), torch.randn(5, 4)
    fast = partial(inv.checkpoint, mode=mode)
    assert_close(func.grad(total_of, wrt)(*given, fast), func.grad(total_of, wrt)(*given, inv.chain))
    leaves = [t.clone().requires_grad_() for t in given]
    found, expected = (torch.autograd.grad(total_of(*leaves, way), leaves) for way in (fast, inv.chain))
    assert_close(found, expected)


def test_an_ensemble_of_stacked_modules() -> None:
    models = [inv.nn.Coupling(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)]
    weights, _ = func.stack_module_state(models)  # type: ignore[arg-type]
    x = torch.randn(5, 4)

    def total_of(weights: Params, mode: str) -> Tensor:
        with inv.mode(mode):
            return func.vmap(lambda p: func.functional_call(models[0], p, (x,)).sin().sum())(weights).sum()

    found, expected = (func.grad(total_of)(weights, mode) for mode in ("invert", "store"))
    assert_close(list(found.values()), list(expected.values()))
