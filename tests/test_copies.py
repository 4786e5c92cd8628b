"""Copies and pickles of lowered pipelines and of modules that have them."""

import copy
import functools
import io
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from kit import WIDTH, Counted, Net, assert_close, layer, leaf, loss
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import invfunc as inv
from invfunc.compat import memcnn
from invfunc.errors import OptionError


@inv.checkpoint
def decorated(x: Tensor) -> Tensor:
    return x.sin().exp()


@inv.checkpoint(inverse=lambda y: y - 1)
def invertible(x: Tensor) -> Tensor:
    return x + 1


class Model(nn.Module):
    """A module with a lowered pipeline of its own submodules."""

    def __init__(self, mode: str = "invert") -> None:
        super().__init__()
        self.f, self.g = Counted(layer()), Counted(layer())
        self.op = inv.checkpoint(inv.chain(inv.split(2), inv.couple(self.f, self.g), inv.concat(2)), mode=mode)
        self.head = inv.checkpoint(self.g.net[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(x)[:, :WIDTH])


def copies() -> dict[str, Callable[[Any], Any]]:
    def saved(model: Any) -> Any:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("copied", copies().values(), ids=copies())
def test_a_copy_of_a_lowered_module_trains_its_own_parameters(
    copied: Callable[..., Any], mode: str, used: bool
) -> None:
    model, x = Model(mode), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(model(x)), [x, *model.parameters()])
    if not used:
        state = model.state_dict()
        model = Model(mode)
        model.load_state_dict(state)
    other = copied(model)
    assert {id(p) for p in model.parameters()}.isdisjoint({id(p) for p in other.parameters()})
    loss(other(x)).backward()
    assert_close([p.grad for p in other.parameters()], list(expected[1:]))
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    assert_close(torch.autograd.grad(loss(model(x)), [x, *model.parameters()]), expected)


@pytest.mark.parametrize(
    "op",
    [
        lambda: inv.checkpoint(inv.couple(nn.Linear(WIDTH, WIDTH), torch.tanh), segments=2),
        lambda: inv.chain(inv.mark(inv.swap(), "store"), inv.mark(torch.add, "recompute")),
        lambda: ~inv.checkpoint(inv.chain(inv.concat(2), inv.split(2))),
        lambda: inv.couple(inv.ops.tanh_scale(nn.Linear(WIDTH, 2 * WIDTH)), law=inv.affine),
    ],
)
@pytest.mark.parametrize("copied", copies().values(), ids=copies())
def test_copies_of_ops(copied: Callable[..., Any], op: Callable[[], inv.Invertible]) -> None:
    op = op()
    xs = [torch.randn(3, WIDTH)] * 2
    expected = op(*xs)
    assert repr(copied(op)) == repr(op)
    assert_close(copied(op)(*xs), expected)


# ---- what a copy closes over -----------------------------------------------------------------------------------------

Function = Callable[[Tensor], Tensor]


class Holder:
    """An object that is called, and holds a function."""

    def __init__(self, fn: Function) -> None:
        self.fn = fn

    def __call__(self, x: Tensor) -> Tensor:
        return self.fn(x)


def wrapped(fn: Function) -> Function:
    @functools.wraps(fn)
    def call(x: Tensor) -> Tensor:
        return fn(x)

    return call


def recursive(net: nn.Module) -> Function:
    def call(x: Tensor, left: int = 2) -> Tensor:
        return call(x, left - 1) if left else net(x)

    return call


def of_weight(weight: Tensor) -> Function:
    return lambda x: x @ weight


# Of a module with a layer ``f``.
FUNCTIONS: dict[str, Callable[[Any], Function]] = {
    "the module": lambda m: lambda x: m.f(x),
    "its layer": lambda m: of_layer(m.f),
    "its weight": lambda m: of_weight(m.f.weight),
    "a default": lambda m: lambda x, net=m.f: net(x),
    "a list": lambda m: (lambda nets: lambda x: nets[0](x))([m.f]),
    "another closure": lambda m: (lambda f: lambda x: f(x))(of_layer(m.f)),
    "itself": lambda m: recursive(m.f),
    "wraps": lambda m: wrapped(of_layer(m.f)),
    "an object": lambda m: Holder(of_layer(m.f)),
    "partial": lambda m: functools.partial(lambda net, x: net(x), m.f),
    "partial of a closure": lambda m: functools.partial(of_layer(m.f)),
    "bound method": lambda m: m.layer,
    "method of a tensor": lambda m: m.f.bias.add,
    "transform": lambda m: torch.func.vmap(of_layer(m.f)),
    "compiled": lambda m: torch.compile(of_layer(m.f), backend="eager"),
    "weak reference": lambda m: (lambda r: lambda x: r().f(x))(weakref.ref(m)),
    "weak method": lambda m: (lambda r: lambda x: r()(x))(weakref.WeakMethod(m.layer)),
    "cached": lambda m: functools.lru_cache(of_layer(m.f)),
    "partial of a cached method": lambda m: functools.partial(functools.lru_cache(m.layer)),
    "a set": lambda m: (lambda nets: lambda x: next(iter(nets))(x))({of_layer(m.f)}),
    "a queue": lambda m: (lambda nets: lambda x: nets[0](x))(deque([m.f])),
    "slots": lambda m: (lambda holder: lambda x: holder.net(x))(Slots(m.f)),
    "an attribute": lambda m: with_attribute(m.f),
}


class Slots:
    __slots__ = ("net",)

    def __init__(self, net: nn.Module) -> None:
        self.net = net


def with_attribute(net: nn.Module) -> Function:
    def call(x: Tensor) -> Tensor:
        return call.net(x)

    call.net = net
    return call


def method_of_a_local_class(m: Any) -> Function:
    class Local:
        def run(self, x: Tensor) -> Tensor:
            return m.f(x)

    return Local().run


def attribute_of_a_local_class(m: Any) -> Function:
    class Local:
        net = m.f

    return lambda x: Local.net(x)


def weak_dict(m: Any) -> Function:
    nets = weakref.WeakValueDictionary(f=m.f)
    return lambda x: nets["f"](x)


HIDING = {
    "the class Local": [method_of_a_local_class, attribute_of_a_local_class],
    "a WeakValueDictionary": [weak_dict],
    "a WeakSet": [lambda m: (lambda nets: lambda x: next(iter(nets))(x))(weakref.WeakSet([m.f]))],
}


@pytest.mark.parametrize("face", ["lowered", "function"])
@pytest.mark.parametrize("place", HIDING)
def test_what_a_function_finds_in_what_can_not_be_copied_is_refused(place: str, face: str) -> None:
    for function in HIDING[place]:
        with pytest.raises(OptionError, match=f"a function finds a .* by {place}, and a copy has another, .*; pass"):
            copy.deepcopy(Owner(function, FACES[face]))


def test_a_weak_reference_out_of_the_copy_is_refused() -> None:
    owner = Owner(FUNCTIONS["weak reference"], FACES["lowered"])
    with pytest.raises(OptionError, match="a function finds a Owner by a weak reference"):
        copy.deepcopy(nn.ModuleDict({"part": inv.nn.Lowered(owner.op)}))


def of_layer(layer: Function) -> Function:
    return lambda x: layer(x)


def between(f: Any) -> inv.Invertible:
    return inv.chain(inv.split(2), inv.couple(f, f), inv.concat(2))


def twice(f: Function) -> Function:
    return lambda x: torch.cat([f(x[:, :WIDTH]), f(x[:, WIDTH:])], 1)


def shifted(f: Function) -> tuple[Function, Function]:
    def by(sign: int, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([a + sign * f(b), b], 1)

    return lambda x: by(1, x), lambda y: by(-1, y)


# What holds a function, or a function of it.
FACES: dict[str, Callable[[Any], Any]] = {
    "plain": between,
    "lowered": lambda f: inv.checkpoint(between(f)),
    "recomputed": lambda f: inv.checkpoint(between(f), mode="recompute"),
    "function": lambda f: inv.checkpoint(twice(f)),
    "with an inverse": lambda f: inv.checkpoint(*shifted(f)),
    "compiled": lambda f: inv.compile_stages(inv.checkpoint(between(f)), backend="eager"),
    "exact": lambda f: inv.checkpoint(inv.exact(between(f))),
    "law": lambda f: inv.checkpoint(
        inv.chain(inv.split(2), inv.couple(torch.sin, law=lambda t: inv.additive(f(t))), inv.concat(2))
    ),
    "Lowered": lambda f: inv.nn.Lowered(between(f)),
    "Coupling": lambda f: inv.nn.Coupling(f),
    "Sequential": lambda f: inv.nn.Sequential(inv.nn.Coupling(f), inv.ops.tanh()),
    "memcnn": lambda f: memcnn.InvertibleModuleWrapper(inv.nn.Coupling(f), keep_input=True),
}


class Owner(nn.Module):
    """A module that calls its layer through an op."""

    def __init__(self, function: Callable[[Any], Function], face: Callable[[Any], Any]) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)
        self.op = face(function(self))

    def layer(self, x: Tensor) -> Tensor:
        return self.f(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


PAIRS = [
    *[(name, "lowered") for name in FUNCTIONS],
    *[("the module", name) for name in FACES],
    ("its layer", "Lowered"),
]


@pytest.mark.parametrize("function, face", PAIRS)
@pytest.mark.parametrize("copied", [copy.deepcopy, AveragedModel], ids=["deepcopy", "average"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's
def test_a_copy_calls_what_it_has_copied(copied: Callable[[Any], nn.Module], function: str, face: str) -> None:
    model, x = Owner(FUNCTIONS[function], FACES[face]), leaf(3, 2 * WIDTH)
    before = model(x)
    other = copied(model)
    with torch.no_grad():
        for p in model.f.parameters():
            p.add_(1)
    found = other(x)
    assert torch.equal(found, before) and not torch.allclose(model(x), before)
    loss(found).backward()
    assert all(p.grad is None for p in model.f.parameters())
    for name, p in other.named_parameters():
        assert p.grad is not None or (function, name.split(".")[-1]) in BLIND, name
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not torch.allclose(other(x), found)


BLIND = [("its weight", "bias"), ("method of a tensor", "weight")]  # which the function does not read


def test_a_copy_shares_what_is_no_part_of_it() -> None:
    calls, lock, net = 0, threading.Lock(), nn.Linear(WIDTH, WIDTH)

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        with lock:
            calls += 1
        return net(x)

    op, x = inv.couple(counted), (torch.ones(2, WIDTH), torch.ones(2, WIDTH))
    op(*x)
    copy.deepcopy(op)(*x)
    assert calls == 2


NET = nn.Linear(WIDTH, WIDTH)


def finds_it(x: Tensor) -> Tensor:
    return NET(x)


def calls_it(x: Tensor) -> Tensor:
    return finds_it(x)


@pytest.mark.parametrize("fn", [finds_it, calls_it])
@pytest.mark.parametrize("face", sorted(FACES.keys() - {"Lowered"}))
def test_what_is_found_among_globals_is_not_copied(fn: Function, face: str) -> None:
    model = Owner(lambda _: fn, FACES[face])
    copy.deepcopy(model)  # it is no part of the model, as in plain torch
    model.f = NET
    with pytest.raises(OptionError, match="finds_it finds NET, a Linear, among its globals, and a copy has another"):
        copy.deepcopy(model)
    with pytest.raises(OptionError, match="among its globals"):
        copy.deepcopy(inv.nn.Lowered(between(finds_it)))  # which owns it


f = NET  # a global with the name of an attribute


def test_an_attribute_is_no_global() -> None:
    model = Owner(FUNCTIONS["the module"], FACES["lowered"])
    model.other = f
    assert copy.deepcopy(model).op is not model.op
    assert not dict(inv.nn.Lowered(inv.couple(lambda x: x * x.f)).named_parameters())


def test_decorated_functions_are_pickled_by_name() -> None:
    for fn in decorated, invertible:
        assert pickle.loads(pickle.dumps(fn)) is fn
        assert copy.deepcopy(fn) is fn
    layer = nn.Linear(WIDTH, WIDTH)
    other = pickle.loads(pickle.dumps(inv.checkpoint(layer)))
    assert_close(other(torch.ones(2, WIDTH)), layer(torch.ones(2, WIDTH)))
    assert repr(other) == "checkpoint(Linear)" and other.__wrapped__ is not layer


def test_a_graph_outlives_its_op() -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(net.op(x)), x)
    out = inv.checkpoint(copy.deepcopy(net.op))(x)
    del net
    assert_close(torch.autograd.grad(loss(out), x), expected)


# ---- a module that holds what closes over it --------------------------------------------------------------------------


class OfItself(nn.Module):
    """Its lowered pipeline calls its own submodules by closures of it, or by a method."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.a, self.b = layer(), layer()
        f = inv.couple(lambda t: self.a(t), self.second)
        self.net = wrap(inv.nn.Lowered(inv.chain(inv.split(2), f, inv.concat(2))))

    def second(self, x: Tensor) -> Tensor:
        return self.b(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("wrap", [lambda net: net, nn.Sequential], ids=["held", "held deeper"])
@pytest.mark.parametrize(
    "walk",
    [repr, nn.Module.state_dict, lambda m: m.eval().train(), lambda m: m.apply(type), lambda m: m.double(),
     lambda m: m.load_state_dict(m.state_dict()), lambda m: list(m.parameters())],
    ids=["repr", "state_dict", "train", "apply", "double", "load_state_dict", "parameters"],
)  # fmt: skip
def test_a_module_that_holds_a_lowered_closure_of_itself_is_walked_as_any(
    walk: Callable[..., Any], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    model, x = OfItself(wrap), leaf(3, 2 * WIDTH)
    walk(model)
    names = [f"{part}.{name}" for part in "ab" for name in model.a.state_dict()]
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()] == names
    expected = inv.couple(model.a, model.b)(*x.chunk(2, 1))
    assert_close(model(x), torch.cat(expected, 1))
    loss(model(x)).backward()
    assert all([p.grad is not None for p in model.parameters()])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.a[0].weight.zero_()
    assert_close(other(x), torch.cat(inv.couple(other.a, other.b)(*x.chunk(2, 1)), 1))
    assert_close(model(x), torch.cat(expected, 1))
