"""What tools put in the place of modules inside of ours is what runs: it is trained, saved and shown as well."""

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from kit import WIDTH, assert_close, bowl
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

import invfunc as inv
from invfunc.compat import memcnn
from invfunc.errors import OptionError

SIZE = 2 * WIDTH


class Adapter(nn.Module):
    """A low-rank adapter around a layer, as peft's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def adapt(model: nn.Module, name: str) -> None:
    home, _, last = name.rpartition(".")
    parent = model.get_submodule(home)
    setattr(parent, last, Adapter(getattr(parent, last)))


def adapt_in_table(model: nn.Module, name: str) -> None:
    """As `torch.ao.quantization` and bitsandbytes do."""
    home, _, last = name.rpartition(".")
    table = model.get_submodule(home)._modules
    table[last] = Adapter(table[last])


def halved(f: Callable[..., Tensor], g: Callable[..., Tensor], x: Tensor) -> Tensor:
    """A coupling as it is written down in a paper."""
    a, b = x.chunk(2, 1)
    a = a + f(b)
    return torch.cat([a, b + g(a)], 1)


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def scaled(scale: float, net: nn.Module, x: Tensor) -> Tensor:
    return scale * net(x)


def of_two(make: Callable[[nn.Module, nn.Module], Sequence[Any]]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        f, g = make(linear(), linear())
        return inv.nn.Lowered(inv.chain(inv.split(2), inv.couple(f, g), inv.concat(2)))

    return build


# A module, the place of what is replaced, and the same model in plain torch.
Case = tuple[Callable[[], nn.Module], str, Callable[[nn.Module, Tensor], Tensor]]


def plain(f: str, g: str, factor: float = 1.0) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return halved(lambda b: factor * m.get_submodule(f)(b), m.get_submodule(g), x)

    return run


CASES: dict[str, Case] = {
    "modules": (of_two(lambda f, g: (f, g)), "1.f", plain("1.f", "1.g")),
    "the other": (of_two(lambda f, g: (f, g)), "1.g", plain("1.f", "1.g")),
    "one at two places": (of_two(lambda f, g: (f, f)), "1.f", plain("1.f", "1.g")),
    "bound method": (of_two(lambda f, g: (f.forward, g)), "1.f", plain("1.f", "1.g")),
    "partial": (of_two(lambda f, g: (partial(scaled, 2.0, f), g)), "1.f.net", plain("1.f.net", "1.g", 2)),
    "closure": (of_two(lambda f, g: (lambda x: 2 * f(x), g)), "1.f.f", plain("1.f.f", "1.g", 2)),
    "default": (of_two(lambda f, g: (lambda x, net=f: 2 * net(x), g)), "1.f.net", plain("1.f.net", "1.g", 2)),
    "list": (of_two(lambda f, g: (lambda x, nets=[f]: 2 * nets[0](x), g)), "1.f.nets", plain("1.f.nets", "1.g", 2)),
    "marked": (
        lambda: inv.nn.Lowered(
            inv.chain(inv.split(2), inv.mark(inv.couple(linear(), linear()), "recompute"), inv.concat(2))
        ),
        "1.f",
        plain("1.f", "1.g"),
    ),
    "inverse": (
        lambda: inv.nn.Lowered(~inv.chain(inv.split(2), inv.couple(linear(), linear()), inv.concat(2))),
        "1.f",
        lambda m, y: torch.cat(_undone(m.get_submodule("1.f"), m.get_submodule("1.g"), *y.chunk(2, 1)), 1),
    ),
    "component": (
        lambda: inv.nn.Lowered(inv.chain(inv.split(2), inv.parallel(linear(), inv.ops.tanh()), inv.concat(2))),
        "1.0",
        lambda m, x: torch.cat([m.get_submodule("1.0")(x[:, :WIDTH]), torch.tanh(x[:, WIDTH:])], 1),
    ),
    "op of a module": (
        lambda: inv.nn.Lowered(
            inv.chain(inv.split(2), inv.parallel(inv.nn.Linear(WIDTH, WIDTH).op, inv.ops.tanh()), inv.concat(2))
        ),
        "1.0",
        lambda m, x: torch.cat([m.get_submodule("1.0")(x[:, :WIDTH]), torch.tanh(x[:, WIDTH:])], 1),
    ),
    "Coupling": (lambda: inv.nn.Coupling(linear(), linear()), "f", plain("f", "g")),
    "Sequential": (
        lambda: inv.nn.Sequential(inv.nn.Linear(WIDTH, WIDTH), inv.ops.tanh()),
        "0",
        lambda m, x: torch.tanh(m.get_submodule("0")(x)),
    ),
    "memcnn": (
        lambda: memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(linear(), linear())),
        "_fn.Fm",
        plain("_fn.Fm", "_fn.Gm"),
    ),
}


def _undone(f: nn.Module, g: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    b = b - g(a)
    return a - f(b), b


def step(fn: Callable[..., Tensor], module: nn.Module, width: int) -> dict[str, Any]:
    module.zero_grad()
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = fn(1 * x)
    bowl(y).backward()
    return {"y": y.detach(), "x": x.grad, **{n: p.grad for n, p in module.named_parameters()}}


@pytest.mark.parametrize("put", [adapt, adapt_in_table])
@pytest.mark.parametrize("name", CASES)
def test_a_module_that_is_replaced_is_the_one_that_runs(name: str, put: Callable[[nn.Module, str], None]) -> None:
    make, place, run = CASES[name]
    module, width = make(), WIDTH if name == "Sequential" else SIZE
    before = module(torch.ones(1, width))
    put(module, place)
    with torch.no_grad():
        module.get_submodule(place).b.weight.add_(0.5)
    assert not torch.allclose(module(torch.ones(1, width)), before)
    for mode in inv.engine.mode.MODES:
        with inv.mode(mode):
            assert_close(step(module, module, width), step(partial(run, module), module, width), 1e-9)
    other = make()
    put(other, place)
    other.load_state_dict(module.state_dict())
    again = copy.deepcopy(module)
    found = step(again, again, width)
    for twin in module, other:
        assert_close(step(twin, twin, width), found, 1e-9)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    assert_close(functional_call(other, parameters, (torch.ones(1, width),)), module(torch.ones(1, width)))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_module_that_is_replaced_before_it_is_compiled() -> None:
    make, place, run = CASES["modules"]
    module = make()
    adapt(module, place)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_close(step(compiled, module, SIZE), step(partial(run, module), module, SIZE), 1e-9)
    adapt(module, "1.g")
    assert_close(step(compiled, module, SIZE), step(partial(run, module), module, SIZE), 1e-9)


def test_a_replaced_module_can_be_pickled_and_replaced_again() -> None:
    make, place, run = CASES["modules"]
    module = make()
    adapt(module, place)
    module = pickle.loads(pickle.dumps(module))
    module.get_submodule("1").f = nn.Tanh()
    assert_close(step(module, module, SIZE), step(partial(run, module), module, SIZE), 1e-9)


def test_a_replaced_module_beside_parameters_of_the_op() -> None:
    weight = nn.Parameter(torch.randn(SIZE, SIZE))
    module = inv.nn.Lowered(
        inv.chain(inv.split(2), inv.couple(linear()), inv.concat(2), inv.ops.linear(weight, torch.ones(SIZE)))
    )

    def run(x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        held = module.get_submodule("3")
        return torch.cat([a + module.get_submodule("1.f")(b), b], 1) @ held.weight.T + held.bias

    module(torch.ones(1, SIZE))
    adapt(module, "1.f")
    assert_close(step(module, module, SIZE), step(run, module, SIZE), 1e-9)
    module.get_submodule("3").weight = nn.Parameter(torch.randn(SIZE, SIZE))
    assert_close(step(module, module, SIZE), step(run, module, SIZE), 1e-9)
    single = module.to(torch.float32)
    assert single(torch.ones(1, SIZE, dtype=torch.float32)).dtype == torch.float32
    module.to(torch.float64)
    assert_close(step(module, module, SIZE), step(run, module, SIZE), 1e-9)


def test_a_replaced_module_is_inverted() -> None:
    module = CASES["op of a module"][0]()
    module.get_submodule("1")._modules["0"] = inv.nn.OrthogonalLinear(WIDTH, WIDTH)
    x = torch.randn(3, SIZE)
    assert_close(module.inverse(module(x)), x, 1e-9)


def test_a_norm_is_converted_by_torch() -> None:
    module = inv.nn.Lowered(
        inv.chain(inv.nn.BatchNorm1d(SIZE).op, nn.Sequential(nn.BatchNorm1d(SIZE)), nn.BatchNorm1d(SIZE))
    )
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    x = torch.randn(5, SIZE)
    assert [type(m) for m in other.modules()].count(nn.SyncBatchNorm) == 3
    assert_close(other.eval()(x), module.eval()(x))
    with torch.no_grad():
        other.get_submodule("0").running_mean.add_(1)
    assert_close(other(x), other.get_submodule("2")(other.get_submodule("1")(other.get_submodule("0")(x))))


NET = linear()


def finds_its_module(x: Tensor) -> Tensor:
    return NET(x)


def test_a_module_among_the_globals_can_not_be_replaced() -> None:
    module = inv.nn.Lowered(inv.couple(finds_its_module))
    module.get_submodule("f").NET = linear()
    with pytest.raises(OptionError) as caught:
        module(torch.ones(1, WIDTH), torch.ones(1, WIDTH))
    assert str(caught.value) == (
        "finds_its_module finds NET, a Linear, among its globals, and a copy has another, expected a function that is "
        "told what to use; pass the module itself, a bound method or a functools.partial, or let the function close "
        "over it"
    )


# ---- what tools hang on modules --------------------------------------------------------------------------------------


def sequence() -> nn.Module:
    return inv.nn.Sequential(inv.nn.Linear(SIZE, SIZE), inv.nn.Coupling(linear(), linear()), inv.ops.tanh())


def of_ops() -> nn.Module:
    return inv.nn.Lowered(
        inv.chain(inv.nn.Linear(SIZE, SIZE).op, inv.nn.Coupling(linear(), linear()).op, inv.ops.tanh())
    )


def by_hand(module: nn.Module, x: Tensor) -> Tensor:
    return torch.tanh(module.get_submodule("1")(module.get_submodule("0")(x)))


@pytest.mark.parametrize("mode", inv.engine.mode.MODES)
@pytest.mark.parametrize("make", [sequence, of_ops])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_hooks_of_modules_inside_run_once(make: Callable[[], nn.Module], mode: str) -> None:
    module, calls = make(), []
    first, second = module.get_submodule("0"), module.get_submodule("1")
    nn.utils.weight_norm(first)
    second.register_forward_pre_hook(lambda module, xs: (2 * xs[0],))
    second.register_forward_hook(lambda module, xs, y: calls.append(1) or y.sin())
    with inv.mode(mode):
        for _ in range(2):
            found = step(module, module, SIZE)
            assert len(calls) == 1
            assert_close(found, step(partial(by_hand, module), module, SIZE), 1e-9)
            calls.clear()


def test_a_pruned_layer() -> None:
    module = sequence()
    prune.l1_unstructured(module[0], "weight", 0.5)
    for _ in range(2):
        assert_close(step(module, module, SIZE), step(partial(by_hand, module), module, SIZE), 1e-9)
        with torch.no_grad():
            module[0].weight_orig.mul_(2)


def test_a_forward_that_a_tool_has_put_into_a_module() -> None:
    module = sequence()
    inner = module[1].forward
    module[1].forward = lambda x: 3 * inner(x)
    assert_close(step(module, module, SIZE), step(partial(by_hand, module), module, SIZE), 1e-9)
