"""The dtype of the stream under autocast: an option keeps it, and without the option a narrow one is told."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import assert_close
from torch import Tensor, nn

import invfunc as inv
from invfunc.errors import DriftWarning, NotInvertibleError, OptionError

TEXT = (
    "chain stage 0 (one_way) makes the stream half precision under autocast, and every stage behind it rounds to that; "
    "pass checkpoint(..., stream=torch.float32)"
)


@pytest.fixture(autouse=True)
def float32(float64: None) -> None:
    torch.set_default_dtype(torch.float32)


def branch() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def network(depth: int = 2, stem: Callable[[Any], Any] = lambda stem: stem, *between: Any) -> inv.Invertible:
    trunk = [inv.couple(branch(), branch()) for _ in range(depth)]
    return inv.chain(stem(nn.Linear(6, 16)), *between, inv.split(2), *trunk, inv.concat(2), nn.Linear(16, 3))


def half(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return fn(x)


def gradients(fn: Callable[[Tensor], Tensor], x: Tensor, wrt: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(half(fn, x).float().square().mean(), wrt)


def parameters(op: inv.Invertible) -> list[Tensor]:
    return list(inv.nn.Lowered(op).parameters())


@pytest.mark.parametrize("options", [{}, {"segments": 2}, {"mode": "recompute"}, {"mode": "store"}], ids=str)
def test_the_stream_is_as_wide_as_the_option_says(options: dict[str, Any]) -> None:
    op, x = network(48), torch.randn(5, 6, requires_grad=True)
    by_hand = inv.chain(op.parts[0], Tensor.float, *op.parts[1:])
    wide = inv.checkpoint(op, stream=torch.float32, **options)
    y = half(wide, x)
    assert y.dtype is torch.bfloat16 and torch.equal(y, half(by_hand, x))  # the head is left as it is
    with torch.no_grad():
        assert torch.equal(half(wide, x), y)
    expected = gradients(by_hand, x, parameters(op))
    for found, exact in zip(gradients(wide, x, parameters(op)), expected, strict=True):
        assert (found - exact).norm() <= 1e-3 * exact.norm()


def test_a_narrow_input_is_widened_and_gets_its_gradient() -> None:
    net = nn.Linear(2, 2)
    op = inv.chain(inv.split(2), inv.couple(net), inv.concat(2))
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    y = inv.checkpoint(op, stream=torch.float32)(x)
    assert y.dtype is torch.float32
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype is torch.bfloat16
    wider = inv.checkpoint(op.parts[0], stream=torch.float32)(x.double())
    assert [t.dtype for t in wider] == [torch.float64] * 2  # what is wider stays so


@pytest.mark.parametrize("stem", [lambda stem: stem, lambda stem: inv.mark(stem, "recompute")])
def test_a_stem_that_makes_the_stream_narrow_is_told(stem: Callable[[Any], Any]) -> None:
    op, x = network(2, stem), torch.randn(5, 6)
    with pytest.warns(DriftWarning) as caught:
        gradients(inv.checkpoint(op), x, parameters(op))
    place = op.place(0)
    assert [str(w.message) for w in caught] == [TEXT.replace("chain stage 0 (one_way)", place)]
    gradients(inv.checkpoint(op, stream=torch.float32), x, parameters(op))


def test_python_shows_it_once() -> None:
    op, x = network(), torch.randn(5, 6)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            gradients(inv.checkpoint(op), x, parameters(op))
    assert [str(w.message) for w in shown] == [TEXT]


@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_what_is_not_rebuilt_is_silent(mode: str) -> None:
    op, x = network(), torch.randn(5, 6)
    gradients(inv.checkpoint(op, mode=mode), x, parameters(op))
    gradients(inv.checkpoint(network(2, lambda stem: stem, Tensor.float)), x, [x.requires_grad_()])
    inv.checkpoint(op)(x).sum().backward()  # no autocast
    with torch.no_grad():
        half(inv.checkpoint(op), x)


def test_faces_take_the_option() -> None:
    op, x = network(), torch.randn(5, 6)
    module = inv.nn.Lowered(op, stream=torch.float32)
    fast = inv.checkpoint(op, stream=torch.float32)
    assert torch.equal(half(module, x), half(fast, x))
    assert torch.equal(half(inv.chain(fast, inv.chain()), x), half(fast, x))
    assert torch.equal(half(inv.checkpoint(inv.chain(fast, torch.tanh)), x), half(fast, x).tanh())
    assert repr(fast).endswith("stream=torch.float32)")


def test_below_a_transform_the_stream_is_as_wide() -> None:
    op, x = network(), torch.randn(5, 6)
    fast, by_hand = inv.checkpoint(op, stream=torch.float32), inv.chain(op.parts[0], Tensor.float, *op.parts[1:])
    found, expected = (torch.func.grad(lambda x: half(fn, x).float().sum())(x) for fn in (fast, by_hand))  # noqa: B023
    assert_close(found, expected, 1e-2)


def test_what_is_no_dtype_of_a_stream_is_named() -> None:
    with pytest.raises(OptionError, match=r"checkpoint: stream='float32', expected a floating-point dtype, such as"):
        inv.checkpoint(network(), stream="float32")  # pyright: ignore
    with pytest.raises(OptionError, match=r"checkpoint: stream=torch.int64, expected a floating-point dtype"):
        inv.checkpoint(network(), stream=torch.int64)
    with pytest.raises(NotInvertibleError, match="stream need an invertible op"):
        inv.checkpoint(torch.tanh, stream=torch.float32)
