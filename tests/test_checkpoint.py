"""`checkpoint` of plain functions, modes, marks and segments: the same function, in value and in every gradient."""

import asyncio
import functools
import gc
import inspect
import threading
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import invfunc as inv
from invfunc.engine import lowering, replay
from invfunc.errors import NotInvertibleError, OptionError, ReplayError, WireError
from invfunc.look.memory import measure

TOLERANCE = 1e-9


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def tensors_of(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def loss(tree: Any) -> Tensor:
    """A number that depends on every differentiable tensor of a tree, with a gradient that depends on its place."""
    return sum(((i + 1) * t.abs().pow(2)).sum() for i, t in enumerate(tensors_of(tree)) if t.requires_grad)


def gradients(tree: Any, wrt: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss(tree), wrt, allow_unused=True, retain_graph=True))


def assert_close(found: Any, expected: Any) -> None:
    found, expected = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert [isinstance(t, Tensor) for t in found] == [isinstance(t, Tensor) for t in expected]
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        else:
            assert a == b


def assert_same(fn: Callable[..., Any], fast: Callable[..., Any], wrt: list[Tensor], *args: Any, **kwargs: Any) -> None:
    """Same value, same structure, same requires_grad, same gradients."""
    expected, found = fn(*args, **kwargs), fast(*args, **kwargs)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    assert_close(found, expected)
    assert [t.requires_grad for t in tensors_of(found)] == [t.requires_grad for t in tensors_of(expected)]
    assert_close(gradients(found, wrt), gradients(expected, wrt))


# ---- plain functions: what goes in and what comes out ----------------------------------------------------------------

Point = namedtuple("Point", "a b")

A, B, C = 3, 4, 5
ARGUMENTS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[list[Tensor], tuple[Any, ...], dict[str, Any]]]]] = {}


def case(make: Callable[[], tuple[Callable[..., Any], list[Tensor], tuple[Any, ...], dict[str, Any]]]) -> Any:
    """A function, the tensors that get gradients, and its arguments."""
    ARGUMENTS[make.__name__] = make
    return make


@case
def one_tensor():
    x = leaf(A, B)
    return lambda x: x.sin().exp(), [x], (x,), {}


@case
def several_tensors():
    x, y = leaf(A, B), leaf(B)
    return lambda x, y: (x * y, x + y), [x, y], (x, y), {}


@case
def the_same_tensor_twice():
    x = leaf(A)
    return lambda x, y: x * y.exp(), [x], (x, x), {}


@case
def keyword_tensors():
    x, w = leaf(A), leaf(A)
    return lambda x, *, w, scale=1.0: scale * x * w, [x, w], (x,), {"w": w, "scale": 3.0}


@case
def nested_containers():
    x, y, z = leaf(A), leaf(A), leaf(A)
    return lambda d, p: {"u": [d["x"] * d["l"][0]], "v": p.a - p.b}, [x, y, z], ({"x": x, "l": [y]}, Point(y, z)), {}


@case
def named_tuple_out():
    x = leaf(A)
    return lambda x: Point(x.exp(), Point(x, None)), [x], (x,), {}


@case
def everything_rides_along():
    x = leaf(A)
    i = torch.tensor([2, 0, 1])
    return lambda x, i, flag, text, f: (x[i], i, x > 0, text, None, f(x), flag), [x], (x, i, True, "t", torch.tanh), {}


@case
def a_size():
    x = leaf(A, B)
    return lambda x, size: (x.reshape(size.numel()), x.T.shape), [x], (x, x.shape), {}


@case
def an_output_without_gradient():
    x, y = leaf(A), torch.randn(A)
    return lambda x, y: (x * 2, y * 2, x.detach() + 1, x.argmax()), [x], (x, y), {}


@case
def no_input_needs_a_gradient():
    x, w = torch.randn(A), leaf(A)
    return lambda x: (x * w, x), [w], (x,), {}


@case
def no_input_at_all():
    w = leaf(A)
    return lambda: w.exp(), [w], (), {}


@case
def it_returns_its_input():
    x = leaf(A)
    return lambda x: (x, x * 2, x), [x], (x,), {}


@case
def it_returns_what_it_closes_over():
    x, w = leaf(A), leaf(A)
    return lambda x: (w, x * 2), [x, w], (x,), {}


@case
def it_returns_an_inner_tensor_twice():
    x = leaf(A)

    def f(x):
        y = x.exp()
        return y, y, y.view(-1)

    return f, [x], (x,), {}


@case
def an_unused_argument():
    x, y = leaf(A), leaf(A)
    return lambda x, y: x.exp(), [x, y], (x, y), {}


@case
def complex_numbers():
    x, w = torch.randn(A, dtype=torch.cdouble).requires_grad_(), torch.randn(A, dtype=torch.cdouble).requires_grad_()
    return lambda x: (x * w).exp(), [x, w], (x,), {}


@case
def an_empty_batch():
    x, w = torch.randn(0, A, requires_grad=True), leaf(A, B)
    return lambda x: (x @ w).tanh(), [x, w], (x,), {}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_any_arguments_and_results(name: str) -> None:
    fn, wrt, args, kwargs = ARGUMENTS[name]()
    assert_same(fn, inv.checkpoint(fn), wrt, *args, **kwargs)


def test_an_object_that_holds_tensors_gets_their_gradients() -> None:
    @dataclass
    class Batch:
        w: Tensor

    class Scale(nn.Linear):
        def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
            return super().forward(x) if batch is None else super().forward(x) * batch.w

    x, module = leaf(2, A), Scale(A, A)
    fast = inv.checkpoint(module)
    fast(x).sum().backward()  # the module's first call reads nothing but its own
    batch = Batch(leaf(A))
    assert_same(module, fast, [x, batch.w, *module.parameters()], x, batch)


def test_objects_ride_along_in_and_out() -> None:
    class Config:
        scale = 3

    config, fn = Config(), lambda x, config: (x * config.scale, config)
    x = leaf(A)
    y, out = inv.checkpoint(fn)(x, config)
    assert out is config
    assert_close(gradients(y, [x]), gradients(fn(x, config)[0], [x]))


def test_a_registered_class_may_be_returned() -> None:
    x = leaf(A)
    assert_same(lambda x: Registered(x.exp(), 3), inv.checkpoint(lambda x: Registered(x.exp(), 3)), [x], x)


@dataclass
class Registered:
    y: Tensor
    n: int


pytree.register_dataclass(Registered)


def test_a_class_whose_tensors_nobody_sees_is_refused() -> None:
    @dataclass
    class Out:
        y: Tensor

    def f(x: Tensor) -> Out:
        return Out(x.exp())

    with pytest.raises(WireError, match=r"f returned a Out with tensors in it, .* register the class with torch"):
        inv.checkpoint(f)(leaf(A))


def test_an_iterator_is_refused_before_it_is_consumed() -> None:
    items = iter([leaf(A)])
    with pytest.raises(
        ReplayError, match=r"got a list_iterator, expected arguments that can be read twice.*pass a list"
    ):
        inv.checkpoint(lambda x, items: x * sum(items))(leaf(A), items)
    assert len(list(items)) == 1


def test_a_generator_in_a_closure_is_found_when_it_is_empty() -> None:
    factors = (w for w in [leaf(A), leaf(A)])

    def f(x: Tensor) -> Tensor:
        for w in factors:
            x = x * w
        return x

    y = inv.checkpoint(f)(leaf(A))
    with pytest.raises(ReplayError, match="did not meet again a tensor"):
        y.sum().backward()


# ---- plain functions: what they close over ---------------------------------------------------------------------------


class Scaled:
    def __init__(self) -> None:
        self.w = leaf(A)
        self.parts = {"b": [leaf(A)]}

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.w + self.parts["b"][0].exp()

    def method(self, x: Tensor) -> Tensor:
        return self(x).tanh()


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum_to_size(w.shape)


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
        "autograd.Function": (lambda x: Custom.apply(x, w), [w]),
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
def test_a_closure_that_goes_straight_into_a_transform_is_refused(transform: Callable[..., Tensor]) -> None:
    w, x = leaf(2, A), leaf(2, A)
    for fast in inv.checkpoint(lambda x: transform(w, x)), inv.checkpoint(inv.couple(lambda x: transform(w, x))):
        with pytest.raises(
            ReplayError, match=r"a tensor of shape \(2, 3\) of the function's closure goes straight into"
        ):
            fast(*[x] * (1 + isinstance(fast, inv.Invertible)))
    assert_same(
        lambda x: transform(w.clone(), x), inv.checkpoint(lambda x: transform(w.clone(), x)), [w], x
    )  # the cure


def test_a_tensor_that_a_function_hides_can_not_be_replayed() -> None:
    w = leaf(A)
    hidden = w * 2  # an autograd.Function hides it, and its graph is not the function's
    y = inv.checkpoint(lambda x: Custom.apply(x, hidden))(leaf(A))
    with pytest.raises(
        ReplayError, match=r"uses a tensor of shape \(3,\) that was not captured, .*autograd.Function hides"
    ):
        y.sum().backward()


def test_a_rebound_closure_can_not_be_replayed() -> None:
    held = {"w": leaf(A)}
    y = inv.checkpoint(lambda x: x * held["w"])(leaf(A))
    held["w"] = leaf(A)
    with pytest.raises(
        ReplayError, match=r"met a tensor of shape \(3,\) that it did not meet in forward.*do not rebind"
    ):
        y.sum().backward()


# ---- plain functions: decorators -------------------------------------------------------------------------------------


@inv.checkpoint
def bare(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """A docstring."""
    return (scale * x).tanh()


@inv.checkpoint(preserve_rng_state=False)
def with_arguments(x: Tensor) -> Tensor:
    return x.exp()


@inv.checkpoint(inverse=lambda y, *, shift=0.0: y - 1 - shift)
def with_inverse(x: Tensor, *, shift: float = 0.0) -> Tensor:
    """Adds one."""
    return x + 1 + shift


@pytest.mark.parametrize("fn", [bare, with_arguments, with_inverse], ids=lambda fn: fn.__name__)
def test_a_decorator_keeps_what_a_function_is(fn: Any) -> None:
    original = fn.__wrapped__
    assert inspect.isfunction(original)
    assert (fn.__name__, fn.__doc__, fn.__module__) == (original.__name__, original.__doc__, __name__)
    assert fn.__qualname__ == original.__qualname__
    assert inspect.signature(fn) == inspect.signature(original)
    assert fn.__name__ in ("bare", "with_arguments", "with_inverse")
    x = leaf(A)
    assert_same(original, fn, [x], x)


def test_keyword_arguments_reach_a_decorated_function() -> None:
    x, shift = leaf(A), leaf(A)
    assert_same(bare.__wrapped__, bare, [x], x, scale=2.0)
    assert_same(with_inverse.__wrapped__, with_inverse, [x, shift], x, shift=shift)


def test_the_repr_of_a_checkpoint() -> None:
    assert repr(bare) == "checkpoint(bare)"
    assert repr(with_inverse) == "checkpoint(pair(with_inverse, <lambda>))"
    assert repr(inv.checkpoint(inv.swap(), mode="store")) == "checkpoint(swap(), mode='store')"


def test_a_decorated_function_with_an_inverse_is_an_op() -> None:
    x = leaf(A)
    assert_close((~with_inverse)(with_inverse(x)), x)
    assert_close(inv.chain(with_inverse, with_inverse)(x), x + 2)
    assert inv.checkpoint(with_inverse) is with_inverse
    assert inv.checkpoint(bare) is bare


def test_a_method_may_be_decorated() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.w = nn.Linear(A, A), nn.Parameter(torch.randn(A))

        @inv.checkpoint
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            """Forward."""
            return scale * self.layer(x).tanh() * self.w

    class Deeper(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, scale=2.0)

    for net in Net(), Deeper():
        plain = functools.partial(Net.forward.__wrapped__, net, scale=1.0 if type(net) is Net else 2.0)
        x = leaf(2, A)
        assert_same(plain, net, [x, *net.parameters()], x)
        assert_same(plain, net, [x, *net.parameters()], x)
    method = Net().forward
    assert (method.__name__, method.__doc__) == ("forward", "Forward.")
    assert list(inspect.signature(method).parameters) == ["x", "scale"]


def test_a_decorated_method_is_not_watched_after_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Linear):
        @inv.checkpoint
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    net, x, watched = Net(A, A), leaf(2, A), []
    monkeypatch.setattr(replay, "Watch", lambda *args: watched.append(args) or Watch(*args))
    for _ in range(3):
        net(x).sum().backward()
    assert len(watched) == 1


Watch = replay.Watch


def test_a_method_of_a_plain_class_may_be_decorated() -> None:
    class Layer:
        def __init__(self) -> None:
            self.w = leaf(A)

        @inv.checkpoint
        def __call__(self, x: Tensor) -> Tensor:
            return x * self.w

    layer, x = Layer(), leaf(A)
    assert_same(lambda x: x * layer.w, layer, [x, layer.w], x)


# ---- plain functions: when nothing has to be kept --------------------------------------------------------------------


def count(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that counts its calls."""

    @functools.wraps(fn)
    def counted(*args: Any, **kwargs: Any) -> Any:
        counted.calls += 1
        return fn(*args, **kwargs)

    counted.calls = 0
    return counted


def test_a_function_runs_twice_in_a_step() -> None:
    fn, x = count(torch.exp), leaf(A)
    y = inv.checkpoint(fn)(x)
    assert fn.calls == 1
    y.sum().backward()
    assert fn.calls == 2


def test_without_gradients_it_is_the_plain_function() -> None:
    result = object()
    module, x = nn.Linear(A, A).requires_grad_(False), torch.randn(A)
    for fast, given, context in [
        (inv.checkpoint(lambda x: result), leaf(A), torch.no_grad),
        (inv.checkpoint(lambda x: result), leaf(A), torch.inference_mode),
        (inv.checkpoint(lambda x: result), leaf(A), lambda: inv.mode("store")),
    ]:
        with context():
            assert fast(given) is result
    outputs = []
    module.register_forward_hook(lambda module, args, out: outputs.append(out))
    assert inv.checkpoint(module)(x) is outputs[0]
    assert inv.checkpoint(torch.neg)(x).grad_fn is None
    with torch.no_grad():
        lowered = inv.checkpoint(inv.pair(lambda x: x, lambda y: y))
        assert lowered(given := leaf(A)) is given


def test_a_function_keeps_its_output_and_no_activations() -> None:
    x, bytes_each = torch.ones(1000, requires_grad=True), 8000

    def f(x: Tensor) -> Tensor:
        return x.sin().sin().sin().sin().sin()

    gc.disable()
    try:
        assert measure(lambda: f(x)).held_bytes >= 5 * bytes_each
        assert measure(lambda: inv.checkpoint(f)(x)).held_bytes == bytes_each
    finally:
        gc.enable()


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


# ---- plain functions: nesting, recursion, errors ---------------------------------------------------------------------


def test_checkpoint_in_checkpoint() -> None:
    w, linear, x = leaf(A), nn.Linear(A, A), leaf(2, A)

    def inner(x: Tensor) -> Tensor:
        return torch.tanh(linear(x) * w)

    def outer(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: inner(inner(x) + w) * x

    def thrice(x: Tensor) -> Tensor:
        return inv.checkpoint(outer(inv.checkpoint(inner)))(x)

    wrt = [x, w, *linear.parameters()]
    assert_same(outer(inner), inv.checkpoint(outer(inv.checkpoint(inner))), wrt, x)
    assert_same(outer(inner), inv.checkpoint(thrice), wrt, x)


def test_a_function_that_calls_itself() -> None:
    w, x = leaf(A), leaf(A)

    def tree(call: Callable[..., Tensor], depth: int, x: Tensor) -> Tensor:
        return x.tanh() if depth == 0 else call(call, depth - 1, x * w) + call(call, depth - 1, x + w)

    fast = inv.checkpoint(tree)
    assert_close(
        gradients(fast(lambda *args: fast(*args), 3, x), [x, w]),
        gradients(tree(lambda *args: tree(*args), 3, x), [x, w]),
    )


def state() -> tuple[Any, ...]:
    return (
        replay._RUNNING.get(),
        replay._STAND_INS.get(),
        len(torch.nn.modules.module._global_forward_pre_hooks),
        torch.overrides._get_current_function_mode_stack(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["function", "couple", "pair"])
def test_an_error_of_the_function_leaves_no_state_behind(when: str, kind: str) -> None:
    w, dropout, calls = leaf(A), nn.Dropout(0.5), []

    def f(x: Tensor) -> Tensor:
        calls.append(None)
        x = inv.pin("half", dropout(x) * w)
        if len(calls) == (1 if when == "forward" else 2):
            raise ZeroDivisionError("mine")
        return x

    fast = {
        "function": lambda: inv.checkpoint(f),
        "couple": lambda: inv.checkpoint(inv.couple(f)),
        "pair": lambda: inv.checkpoint(inv.pair(lambda a, b: (a + f(b), b), lambda a, b: (a, b))),
    }[kind]()
    x = [leaf(A)] * (1 if kind == "function" else 2)
    before, weights = state(), dict(dropout.named_parameters())
    with pytest.raises(ZeroDivisionError, match="mine"):
        y = fast(*x)
        random = torch.get_rng_state()
        loss(y).backward()
    assert state() == before
    assert dict(dropout.named_parameters()) == weights
    if when == "backward":
        assert torch.equal(torch.get_rng_state(), random)


def test_an_error_in_backward_puts_the_modules_weights_back() -> None:
    linear, calls = nn.Linear(A, A), []

    def f(x: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise ZeroDivisionError
        return linear(x)

    weights = {k: torch.randn_like(v).requires_grad_() for k, v in linear.named_parameters()}
    module = nn.Module()
    module.linear, module.forward = linear, inv.checkpoint(f)
    y = functional_call(module, {f"linear.{k}": v for k, v in weights.items()}, (leaf(A),))
    before = dict(linear.named_parameters())
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    assert all(p is before[k] for k, p in linear.named_parameters())


def test_a_function_that_changes_its_input_is_refused() -> None:
    for given in leaf(A), leaf(A) * 2:
        with pytest.raises(ReplayError, match=r"changed its input in place, .*; use the out-of-place operation"):
            inv.checkpoint(lambda x: x.mul_(2))(given)
    with pytest.raises(ReplayError, match="changed its input in place"):
        inv.checkpoint(inv.couple(lambda x: x.mul_(2)))(leaf(A), leaf(A) * 2)
    with pytest.raises(ReplayError, match="changed its input in place"):
        inv.checkpoint(lambda i, x: x * i.add_(1))(torch.tensor(1), leaf(A))


# ---- a function that does something else in backward -----------------------------------------------------------------

TWICE: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "shape": (lambda x: x * 2, lambda x: x[:, :2] * 2),
    "broadcast": (lambda x: x * 2, lambda x: x[:1] * 2),
    "dtype": (lambda x: x * 2, lambda x: x.float() * 2),
    "fewer": (lambda x: (x * 2, x), lambda x: x * 2),
    "more": (lambda x: x * 2, lambda x: (x * 2, x * 3)),
    "none": (lambda x: x * 2, lambda x: None),
}


def unsteady(name: str) -> Callable[[Tensor], Any]:
    first, then = TWICE[name]
    calls: list[None] = []

    def f(x: Tensor) -> Any:
        calls.append(None)
        return first(x) if len(calls) == 1 else then(x)

    return f


@pytest.mark.parametrize("name", TWICE)
def test_a_function_that_returns_something_else_on_replay(name: str) -> None:
    y = inv.checkpoint(unsteady(name))(leaf(3, 4))
    with pytest.raises(
        ReplayError, match=r"one_way\(f\) on replay returned .*, expected .* as in forward; the function must"
    ):
        loss(y).backward()


@pytest.mark.parametrize("name", ["shape", "broadcast", "dtype", "more", "none"])
def test_a_coupling_function_that_returns_something_else_on_replay(name: str) -> None:
    y = inv.checkpoint(inv.couple(unsteady(name)))(leaf(3, 4), leaf(3, 4))
    with pytest.raises((ReplayError, WireError), match="returned"):
        loss(y).backward()


@pytest.mark.parametrize("name", ["shape", "broadcast", "dtype", "more", "none"])
def test_a_pair_whose_forward_returns_something_else_on_replay(name: str) -> None:
    y = inv.checkpoint(inv.pair(unsteady(name), lambda y: y / 2))(leaf(3, 4))
    with pytest.raises(ReplayError, match=r"on replay returned .*, expected .* as in forward"):
        loss(y).backward()


@pytest.mark.parametrize("name", ["shape", "broadcast", "dtype", "more", "none"])
def test_a_pair_whose_inverse_returns_something_else(name: str) -> None:
    net = inv.chain(inv.pair(torch.sinh, torch.asinh), inv.pair(lambda x: x / 2, TWICE[name][1]))
    y = inv.checkpoint(net)(leaf(3, 4))
    with pytest.raises(ReplayError, match=r"the inverse of pair\(.*\) returned .*, expected .* as in forward"):
        loss(y).backward()


# ---- modes and marks -------------------------------------------------------------------------------------------------


def test_the_modes_keep_what_they_say() -> None:
    n, depth = 8000, 4
    x = torch.ones(1, 1000, requires_grad=True)
    net = inv.chain(*[inv.pair(torch.sinh, torch.asinh)] * depth)
    held = {m: measure(lambda m=m: inv.checkpoint(net, mode=m)(x)).held_bytes for m in ("invert", "store", "recompute")}
    assert held["invert"] == n  # the output, which the caller holds as well
    assert held["store"] == depth * n
    assert held["recompute"] == n
    for m in held:
        with inv.mode(m):
            assert measure(lambda: inv.checkpoint(net)(x)).held_bytes == held[m]


@pytest.mark.parametrize(("mode", "calls"), [("invert", 2), ("store", 1), ("recompute", 2)])
def test_how_often_a_coupling_function_runs(mode: str, calls: int) -> None:
    f, g = count(torch.tanh), count(torch.sin)
    fast = inv.checkpoint(inv.chain(inv.couple(f, g), inv.couple(f)), mode=mode)
    loss(fast(leaf(A), leaf(A))).backward()
    assert (f.calls, g.calls) == (2 * calls, calls)


def mode_of(y: Any) -> str:
    """The mode in which a pair was lowered, by the node that it left."""
    name = tensors_of(y)[0].grad_fn.name()
    return {"TailBackward": "invert", "_RecomputeBackward": "recompute", "SinhBackward0": "store"}[name]


def test_a_mode_nests_and_is_restored() -> None:
    fast, x = inv.checkpoint(inv.pair(torch.sinh, torch.asinh)), leaf(A)
    with inv.mode("store"):
        assert mode_of(fast(x)) == "store"
        with inv.mode("recompute"):
            assert mode_of(fast(x)) == "recompute"
        assert mode_of(fast(x)) == "store"
        with pytest.raises(ZeroDivisionError), inv.mode("invert"):
            raise ZeroDivisionError
        assert mode_of(fast(x)) == "store"
    assert mode_of(fast(x)) == "invert"


def test_a_mode_is_local_to_its_thread_and_task() -> None:
    fast, x, found = inv.checkpoint(inv.pair(torch.sinh, torch.asinh)), leaf(A), {}

    async def task(name: str) -> None:
        with inv.mode(name):
            await asyncio.sleep(0)
            found[name] = mode_of(fast(x))
            await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(*map(task, ("store", "recompute", "invert")))

    asyncio.run(both())
    assert found == {m: m for m in found} and len(found) == 3
    with inv.mode("store"):
        thread = threading.Thread(target=lambda: found.update(thread=mode_of(fast(x))))
        thread.start()
        thread.join()
    assert found["thread"] == "invert"


def test_a_mode_may_change_between_forward_and_backward() -> None:
    w, x = leaf(A), leaf(A)
    net = inv.chain(inv.pair(lambda x: x * w, lambda y: y / w), inv.pair(torch.sinh, torch.asinh))
    with inv.mode("recompute"):
        y = inv.checkpoint(net)(x)
    with inv.mode("store"):
        assert_close(gradients(y, [x, w]), gradients(net(x), [x, w]))


def test_the_innermost_mark_wins_and_a_mode_overrides_marks() -> None:
    op, x = inv.pair(torch.sinh, torch.asinh), leaf(A)
    for mark, expected in [
        (lambda op: inv.mark(op, "store"), "store"),
        (lambda op: inv.mark(op, "recompute"), "recompute"),
        (lambda op: inv.mark(op, "invert"), "invert"),
        (lambda op: inv.mark(inv.mark(op, "recompute"), "store"), "recompute"),
        (lambda op: inv.mark(inv.mark(op, "store"), "recompute"), "store"),
        (lambda op: inv.mark(inv.chain(inv.mark(op, "invert")), "store"), "invert"),
        (lambda op: inv.mark(inv.checkpoint(op, mode="recompute"), "store"), "recompute"),
    ]:
        for mode in ("invert", "store", "recompute"):
            fast = inv.checkpoint(mark(op), mode=mode)
            assert mode_of(fast(x)) == expected
            for override in ("invert", "store", "recompute"):
                with inv.mode(override):
                    assert mode_of(fast(x)) == override


def test_marks_do_not_change_what_an_op_means() -> None:
    op, x = inv.pair(torch.sinh, torch.asinh), leaf(A)
    for word in "store", "recompute", "invert":
        marked = inv.mark(op, word)
        assert_close(marked(x), op(x))
        assert_close((~marked)(op(x)), x)
        assert_same(op, ~~marked, [x], x)
        assert repr(marked) == f"mark(pair(sinh, asinh), {word!r})"
        assert repr(~marked) == f"mark(invert(pair(sinh, asinh)), {word!r})"


def test_a_plain_callable_may_be_marked() -> None:
    linear, x = nn.Linear(A, A), leaf(2, A)
    for word in "store", "recompute":
        net = inv.chain(inv.pair(torch.sinh, torch.asinh), inv.mark(linear, word), torch.tanh)
        assert_same(net, inv.checkpoint(net), [x, *linear.parameters()], x)


def test_store_keeps_what_is_inside_and_recompute_its_entry() -> None:
    n = 8000
    x = torch.ones(1, 1000, requires_grad=True)
    op = inv.pair(torch.sinh, torch.asinh)
    inside = inv.chain(op, op, op)

    def held(net: inv.Invertible) -> int:
        return measure(lambda: inv.checkpoint(net)(x)).held_bytes

    assert held(inv.chain(op, inside, op)) == n
    assert held(inv.chain(op, inv.mark(inside, "store"), op)) == 4 * n  # the inputs of three sinh, and the output
    assert (
        held(inv.chain(op, inv.mark(inside, "recompute"), op)) == 2 * n
    )  # the entry; the exit is rebuilt by the last op


@pytest.mark.parametrize(
    "make",
    [
        lambda: inv.mode("sideways").__enter__(),
        lambda: inv.checkpoint(inv.swap(), mode="fast"),
        lambda: inv.mark(inv.swap(), "keep"),
    ],
)
def test_an_unknown_mode(make: Callable[[], Any]) -> None:
    with pytest.raises(OptionError, match=r"mode is '\w+', expected 'invert' or 'store' or 'recompute'"):
        make()


# ---- segments --------------------------------------------------------------------------------------------------------


def test_memory_grows_by_one_activation_a_cut() -> None:
    n, depth = 8000, 12
    w = torch.ones(1, requires_grad=True)
    blocks = [inv.pair(lambda x: x * w, lambda y: y / w)] * depth
    x = torch.ones(1, 1000, requires_grad=True)
    for mode in "invert", "recompute":
        held = [
            measure(lambda k=k, m=mode: inv.checkpoint(inv.chain(*blocks), segments=k, mode=m)(x)).held_bytes
            for k in (1, 2, 3, 6)
        ]
        assert held == [n, 2 * n, 3 * n, 6 * n]
        cut = inv.checkpoint(inv.chain(*blocks), cuts=(2, 3, 11), mode=mode)
        assert measure(lambda cut=cut: cut(x)).held_bytes == 4 * n


@pytest.mark.parametrize("mode", ["invert", "store", "recompute"])
@pytest.mark.parametrize(
    "where",
    [*({"segments": k} for k in (1, 2, 4, 7)), *({"cuts": c} for c in ((1,), (3, 5), (1, 2, 3, 4, 5, 6)))],
    ids=str,
)
def test_segments_change_no_gradient(where: Any, mode: str) -> None:
    w = leaf(A)
    blocks = [inv.pair(lambda x: x * w, lambda y: y / w), inv.pair(torch.asinh, torch.sinh)] * 4
    net, x = inv.chain(*blocks[:7]), leaf(A)
    assert_same(net, inv.checkpoint(net, mode=mode, **where), [x, w], x)
    fast = inv.checkpoint(net, mode=mode, **where)
    assert_same(~net, ~fast, [x, w], net(x).detach().requires_grad_())
    assert ~~fast == fast


@pytest.mark.parametrize("segments", [0, -1, 4, 10**6])
def test_segments_out_of_range(segments: int) -> None:
    net = inv.chain(*[inv.pair(torch.sinh, torch.asinh)] * 3)
    with pytest.raises(OptionError, match=r"segments=-?\d+ of an op with 3 parts, expected a number from 1 to 3$"):
        inv.checkpoint(net, segments=segments)


@pytest.mark.parametrize("cuts", [(0,), (3,), (2, 1), (1, 1), (-1,)])
def test_cuts_out_of_range(cuts: tuple[int, ...]) -> None:
    net = inv.chain(*[inv.pair(torch.sinh, torch.asinh)] * 3)
    with pytest.raises(OptionError, match=r"cuts=\(.*\) of an op with 3 parts, expected increasing places from 1 to 2"):
        inv.checkpoint(net, cuts=cuts)


def test_segments_of_what_has_no_inverse() -> None:
    for option in {"segments": 2}, {"cuts": [1]}, {"donate": True}:
        with pytest.raises(
            NotInvertibleError, match=r"tanh has no inverse; segments, cuts and donate need an invertible op"
        ):
            inv.checkpoint(torch.tanh, **option)


# ---- other bad input -------------------------------------------------------------------------------------------------


def test_bad_input_of_checkpoint() -> None:
    with pytest.raises(OptionError, match="checkpoint: got int, expected an op, a function or a module"):
        inv.checkpoint(3)
    with pytest.raises(OptionError, match="inverse=... for an op, expected an inverse for plain functions only"):
        inv.checkpoint(inv.swap(), torch.neg)
    with pytest.raises(
        OptionError, match=r"got keyword arguments \['scale'\], expected none: only functions take them"
    ):
        inv.checkpoint(inv.swap())(1, 2, scale=3)
    for mode in "store", "recompute":
        with pytest.raises(
            OptionError, match=f"donate=True with mode='{mode}', expected mode 'invert': only it rebuilds"
        ):
            inv.checkpoint(inv.swap(), donate=True, mode=mode)


# ---- the law: no mode changes a value or a gradient ------------------------------------------------------------------


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(A, A)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def _closure() -> Callable[[Tensor], Tensor]:
    w = leaf(A)
    fn = lambda x: torch.sin(x * w)  # noqa: E731
    fn.tensors = [w]
    return fn


def _residual() -> inv.Invertible:
    """Forgets signs, and keeps them as its residue."""
    return inv.pair(
        lambda a, b: ((a.abs(), b.abs()), (a.sign(), b.sign())),
        lambda r, a, b: (a * r[0], b * r[1]),
        residue=True,
    )


PARTS: dict[str, Callable[[], Any]] = {
    "module": lambda: inv.couple(Affine(), Affine()),
    "closure": lambda: inv.couple(_closure(), torch.sin),
    "affine": lambda: inv.couple(inv.ops.tanh_scale(nn.Linear(A, 2 * A)), law=inv.affine),
    "one half": lambda: inv.couple(Affine()),
    "swap": inv.swap,
    "parallel": lambda: inv.parallel(inv.pair(torch.asinh, torch.sinh), inv.pair(torch.atan, torch.tan)),
    "rearranged": lambda: inv.chain(inv.concat(2), inv.split(2, interleaved=True)),
    "one way": lambda: inv.one_way(lambda a, b: (a + b.tanh(), b - a.tanh())),
    "residue": _residual,
}
MARKS = {
    "store": lambda op: inv.mark(op, "store"),
    "recompute": lambda op: inv.mark(op, "recompute"),
    "invert": lambda op: inv.mark(op, "invert"),
    "checkpoint": inv.checkpoint,
    "checkpoint recompute": lambda op: inv.checkpoint(op, mode="recompute"),
}
modes = st.sampled_from(["invert", "store", "recompute"])
pipelines = st.recursive(
    st.sampled_from(sorted(PARTS)),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(sorted(MARKS)), inner),
        st.lists(inner, min_size=1, max_size=4).map(lambda x: ["chain", *x]),
    ),
    max_leaves=6,
)


def build(plan: Any, parameters: list[Tensor]) -> tuple[inv.Invertible, inv.Invertible]:
    """A pipeline with its marks, and the same one without."""
    if isinstance(plan, str):
        op = PARTS[plan]()
        owned = lowering.owners_of(op)
        parameters += [p for module in owned.modules for p in module.parameters()]
        parameters += [t for fn in op.functions for t in getattr(fn, "tensors", [])]
        return op, op
    if isinstance(plan, tuple):
        marked, plain = build(plan[1], parameters)
        return MARKS[plan[0]](marked), plain
    marked, plain = zip(*[build(part, parameters) for part in plan[1:]], strict=True)
    return inv.chain(*marked), inv.chain(*plain)


@settings(max_examples=60)
@given(
    st.lists(pipelines, min_size=1, max_size=4).map(lambda x: ["chain", *x]),
    modes,
    st.one_of(st.none(), modes),
    st.integers(1, 4),
    st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    st.integers(0, 2**30),
)
def test_no_mode_changes_a_value_or_a_gradient(
    plan: Any, mode: str, override: str | None, segments: int, needs: tuple[bool, bool], seed: int
) -> None:
    torch.manual_seed(seed)
    parameters: list[Tensor] = []
    marked, plain = build(plan, parameters)
    x = tuple(torch.randn(2, A, requires_grad=need) for need in needs)
    wrt = [*filter(lambda t: t.requires_grad, x), *parameters]
    fast = inv.checkpoint(marked, mode=mode, segments=min(segments, max(len(marked.parts), 1)))
    expected = plain(*x)
    with inv.mode(override) if override else torch.enable_grad():
        found = fast(*x)
    assert_close(found, expected)
    assert [t.requires_grad for t in found] == [t.requires_grad for t in expected]
    if any(t.requires_grad for t in expected):
        assert_close(gradients(found, wrt), gradients(expected, wrt))
