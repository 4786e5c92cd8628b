"""`checkpoint` of plain functions: what they close over gets its gradients, under transforms too."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import A, Hiding, assert_close, assert_same, gradients, leaf, loss
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import invfunc as inv
from invfunc.errors import ReplayError

# ---- plain functions: what they close over ---------------------------------------------------------------------------


class Scaled:
    def __init__(self) -> None:
        self.w = leaf(A)
        self.parts = {"b": [leaf(A)]}

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.w + self.parts["b"][0].exp()

    def method(self, x: Tensor) -> Tensor:
        return self(x).tanh()


class Plain(nn.Linear):
    """Reads a tensor that it has not registered."""

    extra: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.extra is None else super().forward(x) * self.extra


def _matmul(x: Tensor, *, weights: dict[str, Tensor]) -> Tensor:
    return torch.tanh(x @ weights["w"])


def _late() -> tuple[Any, list[Tensor]]:
    module, x = Plain(A, A), leaf(2, A)
    inv.checkpoint(module)(x).sum().backward()
    module.zero_grad()
    module.extra = leaf(A)
    return module, [*module.parameters(), module.extra]


def _force(x: Tensor, m: Tensor) -> Tensor:
    """The gradient of a potential, by autograd."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad((x @ m).tanh().sum(), x, create_graph=True)[0]


def _functional(module: nn.Module) -> tuple[Any, list[Tensor]]:
    state = {k: v.detach().clone().requires_grad_() for k, v in module.named_parameters()}
    return lambda x: functional_call(module, state, (x,)), list(state.values())


def closures() -> dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]]:
    w, m, d, obj, linear = leaf(A), leaf(A, A), {"k": [leaf(A)]}, Scaled(), nn.Linear(A, A)
    doubled, normed = w * 2, nn.utils.parametrizations.weight_norm(nn.Linear(A, A))
    tied, batch = nn.Linear(A, A), nn.BatchNorm1d(A)
    return {
        "tensor": (lambda x: x * w, [w]),
        "not a leaf": (lambda x: x * doubled, [w]),
        "both": (lambda x: x * doubled + w, [w]),
        "dictionary": (lambda x: x * d["k"][0], d["k"]),
        "callable object": (obj, [obj.w, *obj.parts["b"]]),
        "bound method": (obj.method, [obj.w, *obj.parts["b"]]),
        "partial of a dictionary": (functools.partial(_matmul, weights={"w": m}), [m]),
        "partial of a torch function": (functools.partial(torch.mul, w), [w]),
        "module": (linear, list(linear.parameters())),
        "module in a closure": (lambda x: linear(x).tanh(), list(linear.parameters())),
        "weights in a closure": (lambda x: x @ linear.weight, [linear.weight]),
        "module and its weights": (lambda x: tied(x) @ tied.weight, list(tied.parameters())),
        "weights and their module": (lambda x: tied(x @ tied.weight), list(tied.parameters())),
        "parametrised module": (normed, list(normed.parameters())),
        "unregistered attribute": _late(),
        "functional_call": _functional(linear),
        "functional_call of batch norm": _functional(batch),
        "torch.ops": (lambda x: torch.ops.aten.mul(x, w), [w]),
        "autograd.Function": (lambda x: Hiding.apply(x, w), [w]),
        "vmap": (lambda x: vmap(lambda row: row @ m)(x), [m]),
        "grad": (lambda x: grad(lambda x: torch.tanh(x @ m).sum())(x), [m]),
        "autograd.grad": (lambda x: _force(x, m), [m]),
        "leaf made inside": (lambda x: x * torch.ones(A, requires_grad=True).exp(), []),
        "checkpoint": (lambda x: inv.checkpoint(lambda y: y * w)(x) + inv.checkpoint(linear)(x), [w, linear.weight]),
        "lowered op": (inv.checkpoint(inv.couple(linear, lambda x: x * w)), [w, linear.weight]),
    }


CLOSURES = list(closures())


def call(fn: Callable[..., Any], x: Tensor) -> Any:
    return fn(x, x + 1) if isinstance(fn, inv.Invertible) else fn(x)


@pytest.mark.parametrize("name", CLOSURES)
def test_a_function_gets_the_gradients_of_its_closure(name: str) -> None:
    fn, wrt = closures()[name]
    x = leaf(2, A)
    fast = inv.checkpoint(lambda x: call(fn, x)) if isinstance(fn, inv.Invertible) else inv.checkpoint(fn)
    found, expected = fast(x), call(fn, x)
    assert_close(found, expected)
    assert_close(gradients(found, [x, *wrt]), gradients(expected, [x, *wrt]))


@pytest.mark.parametrize("name", [n for n in CLOSURES if n != "autograd.grad"])  # torch: no autograd.grad in func.vjp
def test_a_closure_is_differentiated_twice(name: str) -> None:
    fn, wrt = closures()[name]
    x, found = leaf(2, A), []
    for f in inv.checkpoint(lambda x: call(fn, x)), functools.partial(call, fn):
        once = torch.autograd.grad(loss(f(x)), [x, *wrt], create_graph=True)
        found.append([*once, *gradients([t for t in once if t.requires_grad], [x, *wrt])])
    assert_close(*found)


@pytest.mark.parametrize("name", [n for n in CLOSURES if n != "lowered op"])
def test_a_coupling_gets_the_gradients_of_its_closure(name: str) -> None:
    fn, wrt = closures()[name]
    a, b = leaf(2, A), leaf(2, A)
    block = inv.couple(fn, torch.sin)
    found, expected = inv.checkpoint(block)(a, b), block(a, b)
    assert_close(found, expected)
    assert_close(gradients(found, [a, b, *wrt]), gradients(expected, [a, b, *wrt]))


def test_a_closure_over_the_input_itself() -> None:
    a, b = leaf(2, A), leaf(2, A)
    block = inv.couple(lambda z: z * b, lambda z: z * a)
    assert_same(block, inv.checkpoint(block), [a, b], a, b)
    assert_same(lambda x: x * a, inv.checkpoint(lambda x: x * a), [a], a)


@pytest.mark.parametrize(
    "transform", [lambda w, x: vmap(torch.mul)(x, w), lambda w, x: grad(lambda w: (x * w).sum())(w)]
)
def test_a_closure_that_goes_straight_into_a_transform(transform: Callable[..., Tensor]) -> None:
    w, x = leaf(2, A), leaf(2, A)
    fn = lambda x: transform(w, x)  # noqa: E731
    assert_same(fn, inv.checkpoint(fn), [w, x], x)
    assert_same(inv.couple(fn), inv.checkpoint(inv.couple(fn)), [w, x], x, x)


@pytest.mark.parametrize("lower", [inv.checkpoint, lambda fn: lambda x: inv.checkpoint(inv.couple(fn))(x, x)[0]])
@pytest.mark.parametrize(
    "transform", [lambda w, x: vmap(torch.mul)(x, w), lambda w, x: grad(lambda w: (x * w.sin()).sum())(w)]
)
def test_below_a_transform_that_is_refused(transform: Callable[..., Tensor], lower: Callable[..., Any]) -> None:
    w, x = torch.randn(2, A), torch.randn(2, A)

    def gradient(lower: Callable[..., Any], given: Callable[[Tensor], Tensor]) -> Tensor:
        return grad(lambda w: lower(lambda x: transform(given(w), x))(x).sum())(w)

    with pytest.raises(ReplayError, match=r"a tensor of shape \(2, 3\) of the function's closure goes straight into"):
        gradient(lower, lambda w: w)
    cured = gradient(lower, torch.clone)
    expected = grad(lambda w: transform(w, x).sum())(w)
    assert_close(cured, expected)


def test_a_tensor_that_a_function_hides() -> None:
    w, x = leaf(A), leaf(A)
    hidden = w * 2  # an autograd.Function hides it, and its graph is not the function's
    fn = lambda x: Hiding.apply(x, hidden)  # noqa: E731
    assert_same(fn, inv.checkpoint(fn), [w, x], x)
    assert_same(inv.couple(fn), inv.checkpoint(inv.couple(fn)), [w, x], x, x)
    of_weight = lambda lower: grad(lambda w: lower(lambda x: Hiding.apply(x, w * 2))(x).sin().sum())  # noqa: E731
    w, x = torch.randn(A), torch.randn(A)
    assert_close(of_weight(inv.checkpoint)(w), of_weight(lambda fn: fn)(w))


def test_a_closure_that_is_rebound_before_backward() -> None:
    x, held = leaf(A), {"w": leaf(A)}
    fn, w = (lambda x: (x * held["w"]).sin()), held["w"]
    expected, y = gradients(fn(x), [x, w]), inv.checkpoint(fn)(x)
    held["w"] = leaf(A)
    assert_close(gradients(y, [x, w]), expected)


class Held:
    """Holds a tensor where nobody looks."""

    w: Tensor


def test_what_is_rebound_where_nobody_looks_can_not_be_replayed() -> None:
    Held.w = leaf(A)
    y = inv.checkpoint(lambda x: (x * Held.w).sin())(leaf(A))
    Held.w = leaf(A)
    with pytest.raises(
        ReplayError, match=r"met a tensor of shape \(3,\) that it did not meet in forward.*do not rebind"
    ):
        y.sum().backward()


# ---- plain functions under transforms --------------------------------------------------------------------------------


def make_function(w: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.tanh(x @ w) * b["v"][0]


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Tensor, Tensor], Any]] = {
    "grad": lambda f, w, x: grad(lambda w: f(w, x).sum())(w),
    "grad input": lambda f, w, x: grad(lambda x: f(w, x).sum())(x),
    "vmap": lambda f, w, x: vmap(lambda x: f(w, x))(x),
    "vmap of weights": lambda f, w, x: vmap(lambda w: f(w, x))(torch.stack([w, 2 * w])),
    "vmap grad": lambda f, w, x: vmap(grad(lambda w, x: f(w, x).sum()), (None, 0))(w, x),
    "grad vmap": lambda f, w, x: grad(lambda w: vmap(lambda x: f(w, x))(x).pow(2).sum())(w),
    "jacrev": lambda f, w, x: jacrev(f)(w, x),
    "jacfwd": lambda f, w, x: jacfwd(f)(w, x),
    "hessian": lambda f, w, x: hessian(lambda w: f(w, x).pow(2).sum())(w),
    "grad grad": lambda f, w, x: grad(lambda w: grad(lambda x: f(w, x).sum())(x).pow(2).sum())(w),
    "vjp": lambda f, w, x: vjp(f, w, x)[1](torch.ones(2, A)),
    "jvp": lambda f, w, x: jvp(f, (w, x), (w, x)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_closure_under_transforms(name: str) -> None:
    w, x, v = torch.randn(A, A), torch.randn(2, A), {"v": [torch.randn(A)]}
    fast = lambda w, x: inv.checkpoint(make_function(w, v))(x)  # noqa: E731
    plain = lambda w, x: make_function(w, v)(x)  # noqa: E731
    assert_close(TRANSFORMS[name](fast, w, x), TRANSFORMS[name](plain, w, x))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_arguments_under_transforms(name: str) -> None:
    w, x = torch.randn(A, A), torch.randn(2, A)
    fast = inv.checkpoint(lambda w, x, *, k: torch.tanh(x @ w).sin() * k)
    found = TRANSFORMS[name](lambda w, x: fast(w, x, k=2.0), w, x)
    assert_close(found, TRANSFORMS[name](lambda w, x: fast.__wrapped__(w, x, k=2.0), w, x))


class Block(nn.Module):
    """Calls a checkpointed module inside; with it or without, by a switch."""

    def __init__(self, lowered: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(A, A), nn.Tanh(), nn.Linear(A, A))
        self.lowered = lowered

    def forward(self, x: Tensor) -> Tensor:
        return inv.checkpoint(self.inner)(x) if self.lowered else self.inner(x)


def test_functional_call_with_backward_after_the_call() -> None:
    fast, plain = Block(True), Block(False)
    other = [{k: leaf(*v.shape) for k, v in plain.named_parameters()} for _ in range(2)]
    x = leaf(2, A)
    wrt = [x, *other[0].values(), *other[1].values()]
    for wrap in (
        lambda module: lambda p: functional_call(module, p, (x,)),
        lambda module: lambda p: inv.checkpoint(functools.partial(functional_call, module))(p, (x,)),
        lambda module: lambda p: inv.checkpoint(lambda x: functional_call(module, p, (x,)))(x),
    ):
        outs = [[wrap(module)(p) for p in other] for module in (fast, plain)]  # both calls before either backward
        assert_close(gradients(outs[0], wrt), gradients(outs[1], wrt))
        assert all(p.grad is None for p in fast.parameters())


@pytest.mark.parametrize("name", ["grad", "vmap grad", "jacrev", "hessian"])
def test_functional_call_under_transforms(name: str) -> None:
    found = []
    for module in Block(True), Block(False):
        torch.manual_seed(1)
        p, x = {k: torch.randn(v.shape) for k, v in module.named_parameters()}, torch.randn(2, A)
        out = {
            "grad": lambda p, m=module: grad(lambda p: functional_call(m, p, (x,)).pow(2).sum())(p),
            "vmap grad": lambda p, m=module: vmap(grad(lambda p, x: functional_call(m, p, (x,)).sum()), (None, 0))(
                p, x
            ),
            "jacrev": lambda p, m=module: jacrev(lambda p: functional_call(m, p, (x,)))(p),
            "hessian": lambda p, m=module: hessian(lambda w: functional_call(m, p | {"inner.0.bias": w}, (x,)).sum())(
                p["inner.0.bias"]
            ),
        }[name](p)
        found.append(out)
    assert_close(*found)
