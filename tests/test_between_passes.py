"""What users and tools do to a model between forward and backward: what forward saw is used, or an error names it."""

from __future__ import annotations

import warnings
from collections import ChainMap, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from kit import assert_close, loss
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import invfunc as inv
from invfunc.errors import DriftWarning, ReplayError

WIDTH = 4


@dataclass
class Config:
    scale: float = 1.5
    table: dict[str, float] = field(default_factory=lambda: {"k": 2.0})


class Plain:
    def __init__(self) -> None:
        self.scale = 1.0


class Pair(NamedTuple):
    item: Any


class Private:
    __slots__ = "__gain"

    def __init__(self) -> None:
        self.__gain = 1.0

    def gain(self) -> float:
        return self.__gain


@dataclass(slots=True)
class Slots:
    scale: float = 0.5


@dataclass(slots=True)
class Slotted(Slots):
    private: Private = field(default_factory=Private)


class Adapter(nn.Module):
    """A low-rank adapter, which is merged or switched off as peft's are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        self.merged: list[str] = []
        self.disabled = False

    def is_active(self) -> bool:
        return not (self.merged or self.disabled)


class Net(nn.Module):
    """Reads an attribute of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter, self.norm = nn.Linear(WIDTH, WIDTH), Adapter(), nn.BatchNorm1d(WIDTH)
        parametrizations.weight_norm(self.adapter.a)
        self.act, self.dropout = nn.Tanh(), nn.Dropout(0.5)
        self.scale, self.kind, self.config, self.slotted = 1.5, "tanh", Config(), Slotted()
        self.fixed = frozenset([Plain()]), Pair(Plain())
        self.mappings = [UserDict(k=1.0), ChainMap({"k": 1.0}), defaultdict(float, k=1.0)]
        self.objects = SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(c=SimpleNamespace(scale=1.0))))
        self.scales, self.nested, self.flags, self.queue = [1.0, 2.0], {"a": {"b": [1.0]}}, {1}, deque([1.0])

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.adapter.is_active():
            y = y + self.adapter.b(self.adapter.a(x))
        y = self.act(y) * self.scale * self.config.scale * self.config.table["k"] * self.slotted.scale
        y = y * self.slotted.private.gain()
        y = y * self.scales[1] * self.nested["a"]["b"][0] * self.queue[0]
        y = y * self.objects.a.b.c.scale * next(iter(self.fixed[0])).scale * self.fixed[1].item.scale
        for mapping in self.mappings:
            y = y * mapping["k"]
        y = y.sin() if self.kind == "sin" else y
        y = y.exp() if 2 in self.flags else y
        return self.dropout(self.norm(y))


def merge(net: Net, by_data: bool) -> None:
    delta = (net.adapter.b.weight @ net.adapter.a.weight).detach()
    if by_data:
        net.base.weight.data = net.base.weight.data + delta
    else:
        net.base.weight.detach().add_(delta)
    net.adapter.merged.append("default")


def patch_forward(net: Net) -> None:
    net.base.forward = lambda x: 2 * x  # type: ignore[method-assign]


def write(net: Net) -> None:
    with torch.no_grad():
        torch._foreach_add_(list(net.parameters()), 0.1)


def give_other_data(net: Net) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data + 0.1


def doubled(net: Net) -> dict[str, Any]:
    return {name: 2 * value for name, value in net.state_dict().items()}


RESTORED: dict[str, Callable[[Net], Any]] = {
    "eval": lambda net: net.eval(),
    "an attribute": lambda net: setattr(net, "scale", 7.0),
    "an attribute of an object": lambda net: setattr(net.config, "scale", 7.0),
    "a slot of an object": lambda net: setattr(net.slotted, "scale", 7.0),
    "an object in a frozen set": lambda net: setattr(next(iter(net.fixed[0])), "scale", 7.0),
    "an object in a named tuple": lambda net: setattr(net.fixed[1].item, "scale", 7.0),
    "a private slot": lambda net: setattr(net.slotted.private, "_Private__gain", 7.0),
    "an item of a dict in an object": lambda net: net.config.table.update(k=7.0),
    "another object": lambda net: setattr(net, "config", Config(3.0)),
    "an item of a list": lambda net: net.scales.__setitem__(1, 9.0),
    "an item far inside": lambda net: net.nested["a"]["b"].__setitem__(0, 9.0),
    "an object far inside of others": lambda net: setattr(net.objects.a.b.c, "scale", 9.0),
    "an item of a UserDict": lambda net: net.mappings[0].update(k=9.0),
    "an item of a ChainMap": lambda net: net.mappings[1].update(k=9.0),
    "an item of a defaultdict": lambda net: net.mappings[2].update(k=9.0),
    "another branch": lambda net: setattr(net, "kind", "sin"),
    "an item of a queue": lambda net: net.queue.__setitem__(0, 9.0),
    "an item of a set": lambda net: net.flags.add(2),
    "an adapter that is switched off": lambda net: setattr(net.adapter, "disabled", True),
    "an adapter that is told to be merged": lambda net: net.adapter.merged.append("default"),
    "another submodule": lambda net: setattr(net, "base", nn.Linear(WIDTH, WIDTH)),
    "another activation": lambda net: setattr(net, "act", nn.Sigmoid()),
    "another class": lambda net: setattr(net.act, "__class__", nn.Sigmoid),
    "a patched forward": patch_forward,
    "a forward hook": lambda net: net.base.register_forward_hook(lambda m, x, y: 3 * y),
    "a forward pre-hook": lambda net: net.base.register_forward_pre_hook(lambda m, x: (3 * x[0],)),
    "a backward hook": lambda net: net.base.register_full_backward_hook(lambda m, gx, gy: tuple(3 * g for g in gx)),
    "another rate of dropout": lambda net: setattr(net.dropout, "p", 0.9),
    "another parameter": lambda net: setattr(net.base, "weight", nn.Parameter(torch.ones(WIDTH, WIDTH))),
    "a parametrization": lambda net: parametrizations.weight_norm(net.base),
    "a parametrization that is removed": lambda net: parametrize.remove_parametrizations(net.adapter.a, "weight"),
    "assigned state": lambda net: net.load_state_dict(doubled(net), assign=True),
    "statistics that are reset": lambda net: net.norm.reset_running_stats(),
    "another call": lambda net: net(torch.randn(3, WIDTH)),
    "frozen": lambda net: net.requires_grad_(False),
}

REFUSED: dict[str, tuple[Callable[[Net], Any], str]] = {
    "an adapter merged in place": (lambda net: merge(net, False), r"\['weight'\].* modified by an inplace operation"),
    "an adapter merged by other data": (lambda net: merge(net, True), r"\['weight'\].* given other data \(in Linear"),
    "a parametrization that writes": (
        lambda net: parametrizations.orthogonal(net.base),
        r"\['weight'\] of a module changed between .* modified by an inplace operation",
    ),
    "an optimizer's step": (write, "modified by an inplace operation"),
    "other data": (give_other_data, "given other data"),
    "loaded state": (lambda net: net.load_state_dict(doubled(net)), "modified by an inplace operation"),
    "another dtype": (lambda net: net.float(), "moved to float32"),
}

FACES: dict[str, tuple[int, Callable[[Net], Any]]] = {  # how wide the input is, and what is called
    "function": (WIDTH, lambda net: inv.checkpoint(net)),
    "closure": (WIDTH, lambda net: inv.checkpoint(lambda x: net(x))),
    "method": (WIDTH, lambda net: inv.checkpoint(net.forward)),
    "coupling": (2 * WIDTH, lambda net: inv.checkpoint(pipeline(net))),
    "coupling of a closure": (2 * WIDTH, lambda net: inv.checkpoint(pipeline(lambda x: net(x)))),
    "recomputed pipeline": (2 * WIDTH, lambda net: inv.checkpoint(pipeline(net), mode="recompute")),
    "module": (2 * WIDTH, lambda net: nn.Sequential(inv.nn.Coupling(net), inv.nn.Coupling(nn.Tanh()))),
    "lowered module": (2 * WIDTH, lambda net: inv.nn.Lowered(pipeline(net))),
    "object of a module": (WIDTH, lambda net: inv.checkpoint(Knows(SimpleNamespace(net=net)))),
    "object of a coupling": (2 * WIDTH, lambda net: inv.nn.Lowered(pipeline(Knows(SimpleNamespace(net=net))))),
}


class Knows(nn.Module):
    """A module that calls what an object has, of which torch does not know."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.known = known

    def forward(self, x: Tensor) -> Tensor:
        return self.known.net(x)


def pipeline(f: Callable[..., Tensor]) -> inv.Invertible:
    return inv.chain(inv.split(2), inv.couple(f), inv.swap(), inv.couple(nn.Tanh()), inv.concat(2))


def gradients(face: str, change: Callable[[Net], Any]) -> list[Tensor | None]:
    """Of the input, and of the parameters that forward read."""
    torch.manual_seed(0)
    width, build = FACES[face]
    net = Net().double()
    fast, parameters = build(net), list(net.parameters())
    x = torch.randn(5, width, dtype=torch.float64, requires_grad=True)
    y = fast(x)
    change(net)
    y.sin().sum().backward()
    return [x.grad, *(p.grad for p in parameters)]


def test_the_model_that_a_block_s_trainer_knows_is_no_part_of_the_block() -> None:
    trainer = SimpleNamespace(net=nn.Softplus(), model=None)
    trainer.model = nn.Sequential(Knows(trainer), nn.Linear(WIDTH, WIDTH))
    x = torch.ones(3, WIDTH, requires_grad=True)
    y = inv.checkpoint(trainer.model[0])(x.sin())
    trainer.model[1].weight.data = torch.zeros(WIDTH, WIDTH)
    assert_close(torch.autograd.grad(y.sum(), x)[0], x.sin().sigmoid() * x.cos())


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("change", RESTORED)
def test_forward_s_state_is_used(change: str, face: str) -> None:
    expected = gradients(face, lambda net: None)
    got = gradients(face, RESTORED[change])
    if change == "frozen":  # those that are frozen now get none, as in plain autograd
        got, expected = got[:1], expected[:1]
    assert_close(got, expected)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("change", REFUSED)
def test_a_tensor_that_is_lost_is_named(change: str, face: str) -> None:
    act, text = REFUSED[change]
    with pytest.raises(ReplayError, match=text):
        gradients(face, act)


def test_a_refusal_leaves_the_generators_free() -> None:
    with pytest.raises(ReplayError):
        gradients("function", write)
    assert gradients("function", lambda net: None)[0] is not None


SCALE, TABLE = 2.0, {"k": 2.0}


@pytest.mark.parametrize("lower", [inv.checkpoint, lambda f: inv.checkpoint(inv.chain(inv.split(2), inv.couple(f)))])
def test_what_closures_and_globals_are_bound_to(lower: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    power, offsets, calls = 2.0, [1.0], [0]

    def f(x: Tensor) -> Tensor:
        calls[0] += 1  # what the function writes itself is left alone
        return (SCALE * x + offsets[0]).abs() ** power * TABLE["k"]

    def gradient(is_changed: bool) -> Tensor:
        nonlocal power
        power, offsets[0], calls[0] = 2.0, 1.0, 0
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4).requires_grad_()
        y = lower(f)(x)
        with monkeypatch.context() as patch:
            if is_changed:
                power, offsets[0] = 3.0, 5.0
                patch.setitem(globals(), "SCALE", 9.0)
                patch.setitem(TABLE, "k", 9.0)
            sum(leaf.sin().sum() for leaf in (y if isinstance(y, tuple) else (y,))).backward()
        assert calls[0] == 2
        assert not is_changed or (power, offsets[0]) == (3.0, 5.0)
        assert x.grad is not None
        return x.grad

    assert_close(gradient(True), gradient(False))


def test_the_default_dtype_of_forward_is_used() -> None:
    fast = inv.checkpoint(inv.couple(lambda x: torch.tanh(x) + torch.full((WIDTH,), 0.1)))
    x = [torch.randn(3, WIDTH, requires_grad=True) for _ in range(2)]
    expected = torch.autograd.grad(loss(fast(*x)), x)
    y, before = fast(*x), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        assert_close(torch.autograd.grad(loss(y), x), expected)
        assert torch.get_default_dtype() is torch.float32
    finally:
        torch.set_default_dtype(before)


def test_a_tensor_in_containers_inside_of_each_other_is_found() -> None:
    w = torch.randn(WIDTH, requires_grad=True)
    held = SimpleNamespace(all={"some": [({"one": {"shift": (w,)}},)]})
    fast = inv.checkpoint(
        inv.couple(partial(lambda held, x: x.tanh() + held.all["some"][0][0]["one"]["shift"][0], held))
    )
    y = fast(*[torch.randn(3, WIDTH, requires_grad=True) for _ in range(2)])
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(ReplayError, match="a tensor of shape .* of its closure changed"):
        loss(y).backward()


# ---- what neither is restored nor raises: the meter tells it ---------------------------------------------------------


class OfClass(nn.Module):
    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.net, self.shift = nn.Linear(WIDTH, WIDTH), numpy.zeros(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.net(x) * self.factor + torch.tensor(self.shift)).sin()


def doubled_by_all(module: nn.Module, xs: Any, y: Tensor) -> Tensor:
    return 2 * y


UNSEEN: dict[str, Callable[[OfClass, pytest.MonkeyPatch], Any]] = {
    "an attribute of a class": lambda net, patch: patch.setattr(OfClass, "factor", 3.0),
    "a hook of all modules": lambda net, patch: patch.setitem(
        nn.modules.module._global_forward_hooks, 0, doubled_by_all
    ),
    "a write through .data": lambda net, patch: net.net.weight.data.mul_(2),
    "an array of NumPy": lambda net, patch: net.shift.fill(1.0),
}


@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_nobody_looks_at_is_told_by_the_meter(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = OfClass().double()
    op = inv.chain(inv.split(2), inv.couple(net), inv.swap(), inv.couple(net), inv.concat(2))
    y = inv.checkpoint(op, mode=mode)(torch.randn(3, 2 * WIDTH, dtype=torch.float64, requires_grad=True))
    UNSEEN[name](net, monkeypatch)
    with pytest.warns(DriftWarning, match="when it ran again|did something else|do now|gave two values"):
        y.sum().backward()


def of_own_generator() -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    return lambda x: torch.tanh(x * torch.rand(WIDTH, generator=generator).to(x)).sin()


def of_own_count() -> Callable[[Tensor], Tensor]:
    calls = [0]

    def f(x: Tensor) -> Tensor:
        calls[0] += 1
        return torch.tanh(x * calls[0]).sin()

    return f


@pytest.mark.parametrize("make", [of_own_generator, of_own_count])
def test_what_a_function_changes_itself_is_told(make: Callable[[], Callable[[Tensor], Tensor]]) -> None:
    x = torch.randn(3, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    op = inv.chain(inv.split(2), inv.couple(make()), inv.swap(), inv.couple(make()), inv.concat(2))
    for mode in "invert", "recompute":
        y = inv.checkpoint(op, mode=mode)(x)
        with pytest.warns(DriftWarning):
            y.sum().backward()
    with pytest.raises(ReplayError):
        inv.checkpoint(inv.exact(op, "codes"))(x).sum().backward()


def test_a_tensor_that_a_function_writes_moves_again() -> None:
    mean = torch.zeros(WIDTH, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        mean.add_(x.detach().mean(0))
        return torch.tanh(x)

    x = torch.ones(3, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    inv.checkpoint(inv.chain(inv.split(2), inv.couple(f), inv.concat(2)))(x).sum().backward()
    assert_close(mean, 2 * torch.ones_like(mean))


@dataclass
class Bank:
    """A class of the user's, one of whose fields is called as ours are."""

    functions: Any
    scale: float = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * (self.functions[0] if isinstance(self.functions, list) else torch.sin)(x)


@pytest.mark.parametrize("functions", [[torch.sin], "sines", print])
def test_an_object_may_have_functions_of_its_own(functions: Any) -> None:
    bank = Bank(functions)
    x = torch.randn(3, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    for f in bank, lambda x: bank(x):
        op = inv.chain(inv.split(2), inv.couple(f), inv.concat(2))
        for face in inv.checkpoint(op), inv.checkpoint(op, mode="recompute"), inv.nn.Lowered(op):
            expected, y = torch.autograd.grad(loss(op(x)), x), face(x)
            bank.scale = 5.0
            assert_close(torch.autograd.grad(loss(y), x), expected)
            bank.scale = 2.0


def test_recurrent_weights_that_a_transform_has_left_behind() -> None:
    cell = nn.RNN(WIDTH, WIDTH).double()
    op = inv.chain(inv.split(2), inv.couple(lambda x: cell(x)[0]), inv.concat(2))
    x = torch.randn(3, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    fast = inv.checkpoint(op)
    torch.func.grad(lambda x: fast(x).sin().sum())(x.detach())
    found = torch.autograd.grad(fast(x).sin().sum(), [x, *cell.parameters()])
    assert_close(found, torch.autograd.grad(op(x).sin().sum(), [x, *cell.parameters()]))


def test_a_batch_of_one_keeps_its_strides() -> None:
    first, last = nn.Linear(WIDTH, 5).double(), nn.Linear(WIDTH, WIDTH).double()

    def f(x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(torch.tanh(first(x)).sum(), x, create_graph=True)
        return last(slope)

    x = torch.randn(2 * WIDTH, 1, dtype=torch.float64).t().requires_grad_()
    op = inv.chain(inv.split(2), inv.couple(f), inv.concat(2))
    found = torch.autograd.grad(inv.checkpoint(op)(x).sin().sum(), x)
    assert_close(found, torch.autograd.grad(op(x).sin().sum(), x))


# ---- modules that a call is given ------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(WIDTH, WIDTH), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x)


def in_object(module: nn.Module) -> Any:
    return SimpleNamespace(inner=SimpleNamespace(module=module), written=[])


GIVEN: dict[str, tuple[Callable[..., Tensor], Callable[[nn.Module], Any]]] = {
    "module": (lambda x, m: m(x.sin()), lambda m: m),
    "dict": (lambda x, d: d["m"](x.sin()), lambda m: {"m": m}),
    "list": (lambda x, found: found[0](x.sin()), lambda m: [m]),
    "object": (lambda x, o: o.inner.module(x.sin()), in_object),
    "partial": (lambda x, f: f(x.sin()), partial),
    "closure": (lambda x, f: f(x.sin()), lambda m: lambda x: m(x)),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("by_name", [False, True])
def test_what_a_module_among_the_arguments_was_is_used(given: str, by_name: bool) -> None:
    fn, wrap = GIVEN[given]
    module, x = Scaled(), torch.randn(3, WIDTH, requires_grad=True)
    (expected,) = torch.autograd.grad(fn(x, wrap(module)).sum(), x)
    fast = inv.checkpoint(lambda x, *args, **kwargs: fn(x, *args, *kwargs.values()))
    y = fast(x, item=wrap(module)) if by_name else fast(x, wrap(module))
    module.scale = 9.0
    assert_close(torch.autograd.grad(y.sum(), x, retain_graph=True), (expected,))
    with torch.no_grad():
        next(module.parameters()).mul_(5)
    with pytest.raises(ReplayError, match="of a module changed between forward and backward"):
        y.sum().backward()


class Named(nn.Module):
    """Finds two of everything, each by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.k, self.scale = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), 0.5, 2.0
        self.u, self.v = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))
        self.register_buffer("gain", torch.randn(WIDTH))
        self.table = nn.ModuleDict({"first": nn.Linear(WIDTH, WIDTH), "second": nn.Linear(WIDTH, WIDTH)})
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.b(self.a(x).tanh() * self.k) * getattr(self, "scale", 1.0)) * self.u + self.v
        return self.table["second"](self.table["first"](y * self.gain + self.shift).tanh())


def swap_names(table: Any, first: str, second: str) -> None:
    """Each under the other's name, in the order that there was."""
    is_mapping = isinstance(table, nn.ModuleDict)
    take, put = (table.pop, table.__setitem__) if is_mapping else (partial(getattr, table), partial(setattr, table))
    values = take(first), take(second)
    for name in () if is_mapping else (first, second):
        delattr(table, name)
    for name, value in zip((second, first), values, strict=True):
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            table.register_buffer(name, value)
        else:
            put(name, value)


def rename_attribute(net: Named) -> None:
    scale = net.scale
    del net.scale
    net._scale = scale


RENAMED: dict[str, Callable[[Named], Any]] = {
    "modules": lambda net: swap_names(net, "a", "b"),
    "attributes": lambda net: swap_names(net, "k", "scale"),
    "parameters": lambda net: swap_names(net, "u", "v"),
    "buffers": lambda net: swap_names(net, "shift", "gain"),
    "entries of a ModuleDict": lambda net: swap_names(net.table, "first", "second"),
    "a renamed attribute": rename_attribute,
}


@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("name", RENAMED)
def test_what_changes_its_name_is_found_under_that_of_forward(name: str, mode: str) -> None:
    net, x = Named(), torch.randn(3, 2 * WIDTH, requires_grad=True)
    wrt = [x, *net.parameters()]
    lowered = inv.checkpoint(pipeline(net), mode=mode)
    expected = torch.autograd.grad(pipeline(net)(x).square().sum(), wrt)
    y = lowered(x)
    RENAMED[name](net)
    order = [list(vars(part)) + [n for n, _ in part.named_parameters()] for part in net.modules()]
    assert_close(list(torch.autograd.grad(y.square().sum(), wrt)), list(expected))
    assert order == [list(vars(part)) + [n for n, _ in part.named_parameters()] for part in net.modules()]


class Side(nn.Module):
    """All that it may have is one parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * getattr(self, "shift", 1.0)


class Sides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.right, self.left = Side(), Side()  # each table behind the other: all values stay in their order
        self.right.shift = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.right(x) + self.left(2 * x)


def test_a_name_that_moves_to_the_module_beside_it_moves_back() -> None:
    net, x = Sides(), torch.randn(3, 2 * WIDTH, requires_grad=True)
    wrt = [x, net.right.shift]
    expected = torch.autograd.grad(pipeline(net)(x).square().sum(), wrt)
    y = inv.checkpoint(pipeline(net))(x)
    net.left.shift = net.right._parameters.pop("shift")
    assert_close(list(torch.autograd.grad(y.square().sum(), wrt)), list(expected))


def step_in_backward(net: nn.Module) -> None:
    @torch.no_grad()
    def step(p: Tensor) -> None:
        assert p.grad is not None
        p.sub_(0.1 * p.grad)

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(step)


STRUCTURE: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda net: None,
    "eval": lambda net: net.eval(),
    "a tag": lambda net: setattr(net.get_submodule("0"), "tag", "x"),
    "a hook": lambda net: net.get_submodule("0").register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", STRUCTURE)
@pytest.mark.parametrize("mode", ["invert", "recompute"])
def test_an_optimizer_that_steps_in_backward_beside_a_change_of_structure(name: str, mode: str) -> None:
    def found(lower: Callable[[Any], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        nets = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)]
        op = inv.chain(inv.split(2), inv.couple(*nets[:2]), inv.couple(*nets[2:]), inv.concat(2))
        x = torch.randn(3, 2 * WIDTH, requires_grad=True)
        for net in nets:
            step_in_backward(net)
        y = lower(op)(x)
        for net in nets:
            STRUCTURE[name](net)
        y.square().sum().backward()
        assert x.grad is not None
        return [x.grad, *[p.detach() for net in nets for p in net.parameters()]]

    assert_close(found(lambda op: inv.checkpoint(op, mode=mode)), found(lambda op: op))


def test_a_refusal_puts_the_structure_back() -> None:
    net, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), torch.randn(3, 2 * WIDTH, requires_grad=True)
    y = inv.checkpoint(pipeline(net))(x)
    act = net[1] = nn.Sigmoid()
    net.eval()
    net[0].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        net[0].weight.mul_(2)
    with pytest.raises(ReplayError, match=r"\['weight'\] of a module changed"):
        y.sum().backward()
    assert net[1] is act and not net.training and len(net[0]._forward_hooks) == 1


@pytest.fixture
def no_profile() -> Iterator[None]:
    """TorchScript saves other tensors in its first calls, while it looks what to optimise."""
    with torch.jit.optimized_execution(False):
        yield


def script(net: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(net)


SCRIPTED: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda net: net,
    "inside": lambda net: nn.Sequential(net),
    "closure": lambda net: lambda x: net(x),
}


@pytest.mark.usefixtures("no_profile")
@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("face", SCRIPTED)
@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_a_weight_of_torchscript_that_is_written_is_named(name: str, face: str, mode: str) -> None:
    net = script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)
    y = inv.checkpoint(pipeline(SCRIPTED[face](net)), mode=mode)(x)
    with torch.no_grad():
        dict(net.named_parameters())[name].mul_(2)
    with pytest.raises(ReplayError, match=rf"{name}'\] of a module changed .*modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.usefixtures("no_profile")
@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("face", SCRIPTED)
@pytest.mark.parametrize("part", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(WIDTH)], ids=["dropout", "norm"])
def test_a_module_of_torchscript_is_in_training_as_in_forward(
    part: Callable[[], nn.Module], face: str, mode: str
) -> None:
    net = script(nn.Sequential(nn.Linear(WIDTH, WIDTH), part(), nn.Tanh()))
    x = torch.randn(5, 2 * WIDTH, requires_grad=True)

    def found(lower: Callable[[Any], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        y = lower(pipeline(SCRIPTED[face](net.train())))(x)
        net.eval()
        return list(torch.autograd.grad(y.square().sum(), [x, *net.parameters()]))

    assert_close(found(lambda op: inv.checkpoint(op, mode=mode)), found(lambda op: op))
    assert not any(part.training for part in net.modules())
