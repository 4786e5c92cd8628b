"""Bit-exact gradients where kernels choose by shape and stride, where functions draw, and at the edge of the numbers."""

from collections.abc import Callable

import pytest
import torch
from exact_networks import F16, F32, F64, batch, nets, plain, plain_on_grid, same_bits
from kit import network
from torch import Tensor, nn

import invfunc as inv

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {  # by the strides of their gradient
    "expanded": lambda y: y.sum(),
    "of one column": lambda y: y[..., 0].sin().sum(),
    "transposed": lambda y: (y.transpose(0, -1) @ torch.linspace(-1, 1, len(y), dtype=y.dtype)).sin().sum(),
    "outer product": lambda y: (y @ torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).sin().sum(),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "every other row": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


def gradients(call: Callable[[Tensor], Tensor], fs: list[nn.Module], x: Tensor, loss: Callable) -> list[Tensor | None]:
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    y = call(x)
    return [y.detach(), *torch.autograd.grad(loss(y), [x, *(p for f in fs for p in f.parameters())])]


def assert_bits(mode: str, fs: list[nn.Module], x: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
    """As written out, as the op unlowered, and as the op lowered."""
    op = inv.exact(network(fs), mode)
    carrier, k = (F32, 14) if x.dtype.itemsize < 4 else (F64, 32)
    written = (lambda x: plain(fs, x)) if mode == "codes" else (lambda x: plain_on_grid(fs, x, carrier, k))
    expected = gradients(written, fs, x, loss)
    assert same_bits(gradients(op, fs, x, loss), expected)
    assert same_bits(gradients(inv.checkpoint(op), fs, x, loss), expected)


@pytest.mark.parametrize("mode", ["grid", "codes"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_linears_of_one_column_and_any_strides(mode: str, layout: str, loss: str) -> None:
    for rows in (1, 9):
        fs = nets(4, lambda: nn.Linear(1, 1), F32)
        assert_bits(mode, fs, LAYOUTS[layout](batch(rows, 2)), LOSSES[loss])
        fs = nets(4, lambda: nn.Sequential(nn.Linear(5, 1), nn.GELU(), nn.Linear(1, 5)), F32)
        assert_bits(mode, fs, LAYOUTS[layout](batch(rows, 10)), LOSSES[loss])


@pytest.mark.parametrize("mode", ["grid", "codes"])
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_dropout(mode: str, p: float) -> None:
    fs = nets(6, lambda: nn.Sequential(nn.Dropout(p), nn.Linear(4, 4), nn.Dropout(p), nn.Tanh(), nn.Dropout(p)), F32)
    assert_bits(mode, fs, batch(5, 8), LOSSES["outer product"])


class Large(nn.Module):
    """Moves a state by up to a share of the range of a grid."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x) * self.scale


@pytest.mark.parametrize("at", [-0.9, -0.45, -0.3, -0.26, 0.0, 0.26, 0.45, 0.9])
@pytest.mark.parametrize("dtype, k", [(F32, 14), (F64, 32)])
def test_a_grid_is_exact_up_to_the_edges_of_its_range(at: float, dtype: torch.dtype, k: int) -> None:
    bound = 2.0 ** ((24 if dtype is F32 else 53) - k)
    fs = nets(4, lambda: Large(0.04 * bound), dtype)
    op = inv.exact(network(fs), carrier=dtype)
    x = at * bound + batch(9, 8, dtype=dtype)
    expected = gradients(lambda x: plain_on_grid(fs, x, dtype, k), fs, x, LOSSES["expanded"])
    assert same_bits(gradients(inv.checkpoint(op), fs, x, LOSSES["expanded"]), expected)
    y = op(x)
    assert torch.equal(op(op.inverse(y)), y)
    assert (op.inverse(y) - x).abs().max() <= 2.0 ** -(k + 1)


@pytest.mark.parametrize("dtype", [F16, F32, F64])
def test_codes_are_exact_at_the_edges_of_a_dtype(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    edges = [info.max, -info.max, info.tiny, -info.tiny, info.smallest_normal / 4, 0.0, -0.0, info.eps]
    x = torch.tensor([edges, edges[::-1]], dtype=dtype)
    fs = nets(4, lambda: Large(float(info.max) / 8), dtype)
    assert_bits("codes", fs, x, LOSSES["of one column"])


def test_in_the_dtype_of_its_grid_the_inverse_gives_the_grid_point_of_the_input() -> None:
    fs, x = nets(8, lambda: nn.Linear(4, 4), F64), batch(5, 8, dtype=F64)
    op = inv.exact(network(fs))
    assert torch.equal(op.inverse(op(x)), torch.round(x * 2**32) / 2**32)


def test_in_a_narrower_dtype_the_stream_is_exact_and_the_output_is_rounded() -> None:
    fs, x = nets(8, lambda: nn.Linear(4, 4), F32), batch(5, 8)
    op = inv.exact(network(fs))
    y = op(x)
    assert y.dtype == F32 and not torch.equal(op.inverse(y), x)
    torch.testing.assert_close(op.inverse(y), x)
    assert_bits("grid", fs, x, LOSSES["expanded"])


def test_with_codes_the_inverse_is_exact_with_its_residue_and_that_of_the_op_without() -> None:
    fs, x = nets(8, lambda: nn.Linear(4, 4), F32), batch(5, 8)
    op = inv.exact(network(fs), "codes")
    y, residue = op.forward_with_residue(x)
    assert torch.equal(op.inverse_with_residue(residue, y), x)
    rounded = network(fs).inverse(y)
    assert torch.equal(op.inverse(y), rounded) and not torch.equal(rounded, x)
