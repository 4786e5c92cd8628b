"""`checkpoint` of plain functions: what goes in and comes out, decorators, and when nothing has to be kept."""

import functools
import gc
import inspect
from collections import defaultdict, deque, namedtuple
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from kit import A, B, assert_close, assert_same, count, gradients, leaf
from torch import Tensor, nn

import invfunc as inv
from invfunc.errors import ReplayError, WireError
from invfunc.look.memory import measure

# ---- plain functions: what goes in and what comes out ----------------------------------------------------------------


Point = namedtuple("Point", "a b")

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


def test_a_class_that_hides_its_tensors_may_be_returned() -> None:
    """But for transforms, which take results apart."""

    @dataclass
    class Out:
        y: Tensor

    def f(x: Tensor) -> Out:
        return Out(x.exp().sin())

    x = leaf(A)
    assert_same(lambda x: f(x).y, lambda x: inv.checkpoint(f)(x).y, [x], x)
    with pytest.raises(WireError, match=r"f returned a Out with tensors in it, .* register the class with torch"):
        torch.func.grad(lambda x: inv.checkpoint(f)(x).y.sum())(torch.randn(A))


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
    with pytest.raises(ReplayError, match=r"^checkpoint\(f\): the function saved 0 tensors when it ran again"):
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


def test_a_method_of_a_plain_class_may_be_decorated() -> None:
    class Layer:
        def __init__(self) -> None:
            self.w = leaf(A)

        @inv.checkpoint
        def __call__(self, x: Tensor) -> Tensor:
            return x * self.w

    layer, x = Layer(), leaf(A)
    assert_same(lambda x: x * layer.w, layer, [x, layer.w], x)


class InSlots:
    __slots__ = ("h",)

    def __init__(self, h: Tensor) -> None:
        self.h = h


class Steps(NamedTuple):
    found: list[Tensor]


WRITTEN: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], Callable[[Any, Tensor], Any]]] = {
    "slot": (InSlots, lambda a: a.h, lambda a, t: setattr(a, "h", t)),
    "queue": (lambda t: deque([t]), lambda a: a.popleft(), lambda a, t: a.append(t)),
    "list of a default": (
        lambda t: defaultdict(list, h=[t]), lambda a: a["h"].pop(), lambda a, t: a["h"].append(t)
    ),
    "list in a named tuple": (lambda t: Steps([t]), lambda a: a.found.pop(), lambda a, t: a.found.append(t)),
    "set beside": (
        lambda t: {"h": t, "seen": {1}}, lambda a: a["h"] * (2 if a["seen"] else 3), lambda a, t: a["seen"].clear()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_an_argument_that_is_written_is_found_again_as_it_was(name: str) -> None:
    make, read, write = WRITTEN[name]
    net, x = nn.Linear(A, A), leaf(2, A)

    def f(holder: Any) -> Tensor:
        y = torch.tanh(net(read(holder)))
        write(holder, y)
        return y.sin()

    def run(fn: Callable[[Any], Tensor]) -> Any:
        holder = make(x)
        found = torch.autograd.grad(fn(holder).sum(), [x, *net.parameters()])
        return found, [] if name == "set beside" else read(holder)

    assert_close(run(inv.checkpoint(f)), run(f))


IN_PLACE: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "itself": (lambda t: t, lambda a: a),
    "list": (lambda t: [t], lambda a: a[0]),
    "dict": (lambda t: {"h": (t,)}, lambda a: a["h"][0]),
    "named tuple": (lambda t: Point(t, 1), lambda a: a.a),
    "object": (InSlots, lambda a: a.h),
    "list of objects": (lambda t: [InSlots(t)], lambda a: a[0].h),
}


@pytest.mark.parametrize("has_graph", [False, True])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_tensor_among_the_arguments_is_written_through(name: str, has_graph: bool) -> None:
    make, read = IN_PLACE[name]
    net, x, before = nn.Linear(A, A), leaf(2, A), leaf(2, A)

    def f(x: Tensor, holder: Any) -> Tensor:
        read(holder).mul_(net(x)).add_(1)
        return torch.tanh(net(x) * read(holder))

    def run(fn: Callable[..., Tensor]) -> Any:
        holder = make(before * 1 if has_graph else before.detach().clone())
        y = fn(x, holder)
        loss = (y * read(holder)).sum()
        wrt = [x, *net.parameters(), *[before] * has_graph]
        first = torch.autograd.grad(loss, wrt, create_graph=True)
        return read(holder), first, torch.autograd.grad(first[0].sin().sum(), wrt)

    with pytest.warns(
        UserWarning, match="f writes into a tensor that it is given, .*; to free it, clone the tensor first"
    ):
        found = run(inv.checkpoint(f))
    assert_close(found, run(f))
    with torch.no_grad():
        holders = [make(torch.ones(2, A)) for _ in range(2)]
        assert_close(inv.checkpoint(f)(x, holders[0]), f(x, holders[1]))
    assert_close(read(holders[0]), read(holders[1]))


def test_what_was_overwritten_in_an_argument_and_is_needed_raises_as_in_plain_autograd() -> None:
    def f(x: Tensor, cache: list[Tensor]) -> Tensor:
        y = x * cache[0]
        cache[0].zero_()
        return y

    with pytest.warns(UserWarning, match="writes into"):
        y = inv.checkpoint(f)(leaf(A), [torch.ones(A)])
    with pytest.raises(
        ReplayError, match=r"checkpoint\(f\): a tensor of shape \(3,\) .* modified by an inplace operation"
    ):
        y.sum().backward()


def test_an_inference_tensor_may_be_an_argument() -> None:
    with torch.inference_mode():
        mask = torch.ones(A)
    x = leaf(A)
    assert_same(lambda x, mask: (x + mask).sin(), inv.checkpoint(lambda x, mask: (x + mask).sin()), [x], x, mask)


def test_what_is_no_method_is_none_under_checkpoint() -> None:
    class Net:
        module, part = inv.checkpoint(nn.Linear(A, A)), inv.checkpoint(functools.partial(torch.mul, 2))

    x = leaf(A)
    assert_close(Net().part(x), 2 * x)
    assert Net().module(x).shape == (A,)


# ---- plain functions: when nothing has to be kept --------------------------------------------------------------------


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


def test_the_determinism_check_compares_what_is_saved_twice():
    def narrows(x: torch.Tensor) -> torch.Tensor:
        length = next(lengths)
        return torch.cat([x[:length].exp(), x[length:].exp()]).sum()

    lengths = iter([2, 1, 2, 1])  # another one in every call
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = inv.checkpoint(narrows)(x)
    with pytest.raises(inv.errors.ReplayError, match=r"\(1,\).*expected \(2,\).*as in forward"):
        y.backward()
    y = inv.checkpoint(narrows, determinism_check="none", drift="off")(x)
    with pytest.raises(RuntimeError, match="size of tensor"):  # autograd itself, where it can tell
        y.backward()
    with pytest.raises(inv.errors.OptionError, match="expected 'default' or 'none'"):
        inv.checkpoint(narrows, determinism_check="loud")


# ---- modules that are written ----------------------------------------------------------------------------------------


class Cache(nn.Module):
    """What a step of a decoder is given: it has found something, and adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[Tensor] = []
        self.table: dict[str, Tensor] = {}
        self.calls, self.total = 0, torch.zeros(())
        self.scale = nn.Linear(4, 4)


def append(c: Cache, key: Tensor) -> Tensor:
    c.keys.append(key)
    return torch.stack(c.keys).sum(0)


def fill(c: Cache, key: Tensor) -> Tensor:
    c.table["k"] = c.table.get("k", torch.zeros(())) + key
    return c.table["k"]


def add_up(c: Cache, key: Tensor) -> Tensor:
    c.calls += 1
    c.total = c.total + key.mean()
    return c.total * c.calls * key


def start(c: Cache, key: Tensor) -> Tensor:
    c.started = getattr(c, "started", 0) + 1
    return c.started * key


@pytest.mark.parametrize("write", [append, fill, add_up, start])
@pytest.mark.parametrize("held", [False, True])
def test_a_module_among_the_arguments_that_is_written_is_found_again_as_it_was(
    write: Callable[[Cache, Tensor], Tensor], held: bool
) -> None:
    cache, net, x = Cache(), nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)

    def step(x: Tensor, item: Any) -> Tensor:
        c = item["cache"] if held else item
        return x * write(c, c.scale(net(x).exp()))

    def found(step: Callable[..., Tensor]) -> tuple[list[Tensor], Cache]:
        c = deepcopy(cache)
        y, z = (step(x, {"cache": c} if held else c) for _ in range(2))
        return list(torch.autograd.grad(y.square().sum() + z.sum(), [x, *net.parameters(), *c.parameters()])), c

    (got, c), (expected, plain) = found(inv.checkpoint(step)), found(step)
    assert_close(got, expected)
    assert len(c.keys) == len(plain.keys) and c.calls == plain.calls and vars(c).keys() == vars(plain).keys()
    assert_close([c.total, *c.keys, *c.table.values()], [plain.total, *plain.keys, *plain.table.values()])
