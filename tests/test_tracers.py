"""What tracers take of lowered modules: the plain op, so that what they make trains, whatever the mode."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from kit import WIDTH, assert_close, bowl, traced_by_jit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.fx.experimental.proxy_tensor import make_fx

import invfunc as inv
from invfunc.compat import memcnn
from invfunc.errors import OptionError

pytestmark = [
    pytest.mark.compile,
    # what torch warns itself of
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

SIZE = 2 * WIDTH
MODES = [None, "invert", "recompute", "store"]


def layer(out: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, out), nn.Tanh())


class Closures(nn.Module):
    """A pipeline of functions that close over the module, and a plain function behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = layer(), layer()
        f, g = (lambda x: self.f(x)), (lambda x: self.g(x))
        self.op = inv.checkpoint(inv.chain(inv.split(2), inv.couple(f, g), inv.concat(2)))
        self.head = inv.checkpoint(lambda x: torch.sin(self.f(x[:, :WIDTH])))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(x))


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = layer()

    @inv.checkpoint
    def half(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * torch.sin(self.f(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.half(x[:, :WIDTH], scale=2.0)


class Planned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = layer(), layer()
        op = inv.chain(inv.split(2), inv.couple(self.f, self.g), inv.couple(self.g), inv.concat(2))
        self.op = inv.checkpoint(op, plan=inv.plan(op, torch.randn(3, SIZE), budget="20 MB"))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Scale(inv.nn.InvertibleModule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.5 + torch.rand(SIZE))

    def function(self, x: Tensor) -> Tensor:
        return x * self.scale

    def inverse(self, y: Tensor) -> Tensor:
        return y / self.scale


def coupling(**options: Any) -> nn.Module:
    return inv.nn.Coupling(layer(), layer(), **options)


def pipe(*ends: Any) -> inv.Invertible:
    return inv.chain(nn.Linear(SIZE, SIZE), inv.split(2), inv.couple(layer(), layer()), inv.concat(2), *ends)


def actnorm() -> nn.Module:
    module = inv.nn.ActNorm(SIZE)
    module.initialise(torch.randn(5, SIZE))
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "Lowered": lambda: inv.nn.Lowered(pipe(nn.Linear(SIZE, 3))),
    "Lowered, segments": lambda: inv.nn.Lowered(pipe(), segments=2),
    "Sequential": lambda: inv.nn.Sequential(nn.Linear(SIZE, SIZE), coupling(), inv.ops.tanh(), inv.nn.Linear(SIZE, 9)),
    "donated": lambda: nn.Sequential(nn.Linear(SIZE, SIZE), coupling(donate=True)),
    "closures": Closures,
    "planned": Planned,
    "decorated": Decorated,
    "InvertibleModule": lambda: nn.Sequential(nn.Linear(SIZE, SIZE), Scale()),
    "layers": lambda: inv.nn.Sequential(
        inv.nn.OrthogonalLinear(SIZE, SIZE), inv.nn.LULinear(SIZE), inv.nn.BatchNorm1d(SIZE), actnorm()
    ),
    "spline": lambda: inv.nn.SplineCoupling(layer(11 * WIDTH), bins=4),
    "memcnn": lambda: memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(layer())),
    "memcnn, a module of one's own": lambda: memcnn.InvertibleModuleWrapper(Scale()),
}


def step(fn: Callable[..., Any], module: nn.Module) -> dict[str, Any]:
    """The output, and every gradient by name."""
    module.zero_grad()
    x = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = fn(x)
    bowl(y).backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def exported(strict: bool) -> Callable[[nn.Module, Tensor], Any]:
    return lambda module, x: torch.export.export(module, (x,), strict=strict).module()


def decomposed(module: nn.Module, x: Tensor) -> Any:
    """As `torch.onnx.export` by Dynamo has it."""
    return torch.export.export(module.eval(), (x,)).run_decompositions().module()


def seen_by_tensorboard(module: nn.Module, x: Tensor) -> Any:
    return traced_by_jit(module, x, strict=False)


TRACERS = {
    "export": exported(False),
    "decomposed": decomposed,
    "jit": lambda module, x: traced_by_jit(module, x.requires_grad_()),
    "tensorboard": seen_by_tensorboard,
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", MODULES)
def test_what_a_tracer_makes_trains(name: str, tracer: str) -> None:
    module = MODULES[name]()
    program = TRACERS[tracer](module, torch.randn(5, SIZE))
    found = step(program, program)
    with inv.mode("store"):
        assert_close(found, step(module, module))


@pytest.mark.parametrize("name", ["Sequential", "closures", "decorated", "layers", "memcnn"])  # Dynamo takes its time
def test_what_a_strict_export_makes_trains(name: str) -> None:
    module = MODULES[name]()
    program = exported(True)(module, torch.randn(5, SIZE))
    found = step(program, program)
    with inv.mode("store"):
        assert_close(found, step(module, module))


STRICT = [("invert", True, "invert"), ("recompute", True, None)]


@pytest.mark.parametrize("own, strict, mode", [*itertools.product(MODES[1:], [False], MODES), *STRICT])
def test_an_exported_program_trains_in_every_mode(own: str, strict: bool, mode: str | None) -> None:
    module = nn.Sequential(nn.Linear(SIZE, SIZE), inv.nn.Lowered(pipe(), mode=own), nn.Linear(SIZE, 3))
    with nullcontext() if mode is None else inv.mode(mode):
        program = exported(strict)(module, torch.randn(5, SIZE))
    with inv.mode("store"):
        assert_close(step(program, program), step(module, module))


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("name", ["Lowered", "Sequential", "closures", "memcnn"])
def test_what_make_fx_makes_trains(name: str, mode: str) -> None:
    module = MODULES[name]()
    with inv.mode(mode):
        program = make_fx(module)(torch.randn(5, SIZE))
    with inv.mode("store"):
        assert_close(step(program, module), step(module, module))


class WithLeaves(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, inv.nn.Module) or super().is_leaf_module(m, module_qualified_name)


def test_symbolic_trace_is_told_to_take_a_module_as_a_leaf() -> None:
    module = nn.Sequential(nn.Linear(SIZE, SIZE), coupling())
    with pytest.raises(OptionError, match=r"couple.* is traced by torch.fx.symbolic_trace, .*; let is_leaf_module"):
        torch.fx.symbolic_trace(module)
    program = torch.fx.GraphModule(module, WithLeaves().trace(module))
    assert_close(step(program, module), step(module, module))


def test_a_compiled_module_follows_the_mode() -> None:
    module, counter = coupling(), CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for mode, graphs in ("invert", 1), ("store", 2), ("recompute", 3), ("store", 3):
        with inv.mode(mode):
            found = step(compiled, module)
        assert_close(found, step(module, module), 1e-9)
        assert counter.frame_count == graphs


# ---- what can not be traced ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_a_first_batch_is_not_exported(strict: bool) -> None:
    module, x = inv.nn.ActNorm(SIZE), torch.randn(5, SIZE)
    with pytest.raises(Exception, match="ActNorm: exported in training mode before its first batch"):
        exported(strict)(module, x)
    assert not module.initialised
    module(x)
    program = exported(strict)(module, x)
    assert_close(step(program, program), step(module, module))


def test_a_first_batch_is_traced_by_jit() -> None:
    module, x = inv.nn.ActNorm(SIZE), torch.randn(5, SIZE)
    program = traced_by_jit(module, x)
    assert module.initialised and "copy_" not in str(program.graph)
    assert_close(program(x).mean(0), torch.zeros(SIZE))
    assert_close(step(program, program), step(module, module))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exact_op_is_not_exported(strict: bool) -> None:
    with pytest.raises(Exception, match="an exact op is being compiled, expected that it runs as it is written"):
        exported(strict)(
            inv.nn.Lowered(inv.exact(inv.chain(inv.split(2), inv.couple(layer()), inv.concat(2)))), torch.ones(2, SIZE)
        )


# ---- pipelines of several devices ------------------------------------------------------------------------------------

SPLITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torch's Sequential": (lambda: nn.Sequential(nn.Linear(SIZE, SIZE), coupling(), coupling()), "2"),
    "Sequential": (lambda: inv.nn.Sequential(nn.Linear(SIZE, SIZE), coupling(), coupling()), "2"),
    "in a coupling": (lambda: inv.nn.Lowered(pipe(nn.Linear(SIZE, 3))), "2.f"),
    "Lowered": (lambda: inv.nn.Lowered(inv.chain(nn.Linear(SIZE, SIZE), coupling().op, coupling().op)), "2"),
    "memcnn": (
        lambda: nn.Sequential(nn.Linear(SIZE, SIZE), memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(layer()))),
        "1._fn",
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_torch_pipelining_splits_a_lowered_model_and_trains_it(name: str) -> None:
    make, place = SPLITS[name]
    module = make()
    expected = step(module, module)
    found = pipeline(module, (torch.randn(5, SIZE),), split_spec={place: SplitPoint.BEGINNING})
    stages = nn.ModuleList([found.get_stage_module(i) for i in range(found.num_stages)])
    assert len(stages) == 2

    def run(x: Any) -> Any:
        for stage in stages:
            x = stage(*x) if isinstance(x, tuple) else stage(x)
        return x[0] if isinstance(x, tuple) else x

    assert_close({n.partition(".")[2] if "." in n else n: t for n, t in step(run, stages).items()}, expected)


def test_torch_pipelining_is_told_that_names_are_not_called() -> None:
    with pytest.raises(OptionError, match="names of an op's modules"):
        pipeline(inv.nn.Lowered(pipe()), (torch.randn(5, SIZE),), split_spec={"2": SplitPoint.BEGINNING})
