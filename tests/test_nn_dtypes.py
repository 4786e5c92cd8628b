"""Modules that are moved to another dtype, or loaded from one: what held before the move holds after it."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from kit import assert_close
from test_nn import LAYERS
from torch import Tensor, nn

import invfunc as inv

inn = inv.nn
F32, F64 = torch.float32, torch.float64
HALVES = [torch.bfloat16, torch.float16]
WIDTHS = {"square": (8, 8), "tall": (4, 8)}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Modules are made in float32, as users make them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F32)
    yield
    torch.set_default_dtype(before)


def error_of_inverse(layer: nn.Module, x: Tensor) -> Tensor:
    """How far the inverse is from x, as a part of the largest number."""
    return (layer.inverse(layer(x)) - x).abs().max() / x.abs().max()


def is_orthogonal(q: Tensor, tolerance: float) -> bool:
    return torch.allclose(q.mT @ q, torch.eye(q.shape[1], dtype=q.dtype), atol=tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_made_double_is_undone_in_float64(name: str) -> None:
    make, shape = LAYERS[name]
    assert error_of_inverse(make().double(), torch.randn(shape, dtype=F64)) < 1e-11


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "SplineCoupling"])  # its nets take one dtype
def test_a_module_in_half_precision_is_undone_on_a_stream_in_float32(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    layer, x = make().to(dtype), torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.dtype == F32 and error_of_inverse(layer, x) < 1e-4
    if layer.reversible:
        y.square().sum().backward()
        assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_module_and_its_stream_in_half_precision_stay_there(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    layer, x = make().to(dtype), torch.randn(shape).to(dtype)
    y = layer(x)
    assert y.dtype == layer.inverse(y).dtype == dtype


WITHOUT_VOLUME = "OrthogonalLinear tall", "Linear tall", "Conv2d groups", "Conv2d padded", "Conv2d overlapping", "Pad"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in (*WITHOUT_VOLUME, "SplineCoupling")])
def test_the_log_determinant_of_a_module_in_half_precision_is_that_in_float64(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYERS[name]
    layer, x = make().to(dtype), torch.randn(shape)
    layer(x)  # what starts from a batch has started
    _, found = inv.log_det(layer.op, x)
    _, expected = inv.log_det(copy.deepcopy(layer).double().op, x.double())
    assert found.dtype == F32
    assert_close(found.double(), expected, 1e-4)


# ---- orthogonal ------------------------------------------------------------------------------------------------------

MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "double": nn.Module.double,
    "to": lambda m: m.to(F64),
    "as a part": lambda m: nn.Sequential(m).double()[0],
    "by way of half": lambda m: m.half().double(),
    "by way of bfloat16 and float": lambda m: m.bfloat16().float().double(),
    "a copy": lambda m: copy.deepcopy(m).double(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("size", WIDTHS.values(), ids=WIDTHS)
def test_an_orthogonal_weight_is_orthogonal_in_the_dtype_it_is_moved_to(
    size: tuple[int, int], move: Callable[[nn.Module], nn.Module]
) -> None:
    layer = inn.OrthogonalLinear(*size)
    before = layer.weight.detach().clone()
    moved = move(layer)
    assert moved.weight.dtype == F64 and is_orthogonal(moved.weight, 1e-14)
    assert_close(moved.weight.float(), before, 1e-6)


@pytest.mark.parametrize("size", WIDTHS.values(), ids=WIDTHS)
def test_an_orthogonal_weight_is_orthogonal_in_the_dtype_it_is_loaded_in(size: tuple[int, int]) -> None:
    narrow, wide = inn.OrthogonalLinear(*size), inn.OrthogonalLinear(*size, dtype=F64)
    wide.load_state_dict(narrow.state_dict())
    assert is_orthogonal(wide.weight, 1e-14)
    again = inn.OrthogonalLinear(*size)
    again.load_state_dict(narrow.state_dict())
    assert torch.equal(again.weight, narrow.weight)  # what is orthogonal already keeps its bits


OWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "OrthogonalLinear": (lambda: inn.OrthogonalLinear(8, 8), (5, 8)),
    "OrthogonalLinear tall": (lambda: inn.OrthogonalLinear(8, 12), (5, 8)),
    "LULinear": (lambda: inn.LULinear(8), (5, 8)),
    "ActNorm": (lambda: inn.ActNorm(8), (5, 8)),
}


@pytest.mark.parametrize("name", OWN)
def test_what_is_made_of_parameters_is_made_in_the_dtype_of_a_wider_stream(name: str) -> None:
    make, shape = OWN[name]
    narrow, x = make(), torch.randn(shape, dtype=F64, requires_grad=True)
    narrow.initialised = True  # where it starts from a batch
    narrow(x.float()).pow(3).sum().backward()
    torch.optim.SGD(narrow.parameters(), 1e-3).step()
    wide = copy.deepcopy(narrow).double()
    assert error_of_inverse(narrow, x) < 1e-14
    (y, *found), (expected, *gradients) = (
        [y, *torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()])]
        for layer, y in ((layer, layer(x)) for layer in (narrow, wide))
    )
    assert_close(y, expected, 1e-13)
    assert_close([g.double() for g in found], gradients, 1e-6)
    by_name = torch.func.grad(lambda p: torch.func.functional_call(narrow, p, (x,)).pow(3).sum())
    assert_close([g.double() for g in by_name(dict(narrow.named_parameters())).values()], gradients[1:], 1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_a_module_cast_with_all_its_buffers_is_undone_in_float64(name: str) -> None:
    make, shape = LAYERS[name]
    assert error_of_inverse(make().type(F64), torch.randn(shape, dtype=F64)) < 1e-11


@pytest.mark.parametrize("dtype", HALVES)
def test_an_orthogonal_layer_trains_in_half_precision(dtype: torch.dtype) -> None:
    layer = inn.OrthogonalLinear(8, 8, dtype=dtype)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 8).to(dtype)).float().pow(4).mean().backward()
        optimizer.step()
    assert is_orthogonal(layer.weight, 1e-5)
    assert {p.dtype for p in layer.parameters()} == {dtype}


def test_an_orthogonal_layer_is_undone_under_autocast() -> None:
    layer, x = inn.OrthogonalLinear(8, 8), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == F32 and error_of_inverse(layer, x) < 1e-5


def test_lu_starts_from_a_matrix_that_is_orthogonal_in_its_dtype() -> None:
    layer = inn.LULinear(8, bias=False, dtype=F64)
    assert is_orthogonal(layer(torch.eye(8, dtype=F64)), 1e-14)


def test_a_batch_norm_in_half_precision_moves_its_own_statistics() -> None:
    layer, wide = inn.BatchNorm1d(3).half(), nn.BatchNorm1d(3)
    x = torch.randn(64, 3) + 5
    assert_close(layer(x), wide(x), 1e-5)
    assert layer.running_mean.dtype == torch.float16
    assert_close(layer.running_mean.float(), wide.running_mean, 1e-3)
