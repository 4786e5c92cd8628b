"""Tensors of every kind go into a lowered pipeline and come out, as with a plain one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from kit import LOWERINGS, ROUNDING, TWO, WIDTH, Counted, Net, assert_close, every_lowering, layer, leaf, loss
from torch import Tensor, nn

import invfunc as inv

# ---- kinds of inputs ---------------------------------------------------------------------------------------------------


def images(*shape: int) -> Tensor:
    return torch.randn(2, 4, 6, 6)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda x: x,
    "view": lambda x: x.view(3, -1),
    "slice": lambda x: torch.cat([x, x])[2:5],
    "strided": lambda x: torch.cat([x, x], 1)[:, ::2],
    "transposed": lambda x: x.T.contiguous().T,
    "expanded": lambda x: x[:1].expand(3, -1),
    "expanded in front": lambda x: x.expand(2, 3, -1),
    "narrowed": lambda x: torch.cat([x, x], 1).narrow(1, 3, 2 * WIDTH),
    "permuted": lambda x: torch.stack([x, x]).permute(1, 0, 2),
    "one row": lambda x: x[0],
    "no rows": lambda x: x[:0],
    "split part": lambda x: torch.cat([x, x], 1).split(2 * WIDTH, 1)[1],
}


@every_lowering
@pytest.mark.parametrize("name", INPUTS)
def test_views_and_expanded_inputs(name: str, lower: Callable[..., Any]) -> None:
    net, base = Net(), leaf(3, 2 * WIDTH)
    op = inv.chain(inv.split(2, dim=-1), *net.op.parts[1:-1], inv.concat(2, dim=-1))
    expected = torch.autograd.grad(loss(op(INPUTS[name](base))), [base, *net.parameters])
    found = torch.autograd.grad(loss(lower(op)(INPUTS[name](base))), [base, *net.parameters])
    assert_close(found, expected)


@every_lowering
def test_inputs_are_left_alone(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    before, version, pointer = x.detach().clone(), x._version, x.data_ptr()
    loss(lower(net.op)(x)).backward()
    assert torch.equal(x, before) and (x._version, x.data_ptr()) == (version, pointer)


@pytest.mark.parametrize("name", TWO)
def test_the_same_tensor_twice(name: str) -> None:
    f, g, x = Counted(layer()), Counted(layer()), leaf(3, WIDTH)
    op = inv.couple(f, g)
    for fn in lambda op: op(x, x), lambda op: op(x, x.view(3, -1)), lambda op: op(*op(x, x)), lambda op: op(x, x + x):
        wrt = [x, *f.parameters(), *g.parameters()]
        expected = torch.autograd.grad(loss(fn(op)), wrt)
        assert_close(torch.autograd.grad(loss(fn(LOWERINGS[name](op))), wrt), expected)


@pytest.mark.parametrize("name", TWO)
def test_one_input_needs_no_gradient(name: str) -> None:
    f, g = Counted(layer()), Counted(layer())
    op = inv.chain(inv.couple(f, g), inv.couple(torch.sin))
    for needs in (True, False), (False, True), (False, False):
        xs = [torch.randn(3, WIDTH).requires_grad_(need) for need in needs]
        wrt = [*filter(lambda t: t.requires_grad, xs), *f.parameters(), *g.parameters()]
        expected, found = op(*xs), LOWERINGS[name](op)(*xs)
        assert [t.requires_grad for t in found] == [t.requires_grad for t in expected]
        assert_close(torch.autograd.grad(loss(found), wrt), torch.autograd.grad(loss(expected), wrt))


@every_lowering
def test_channels_last_is_preserved(lower: Callable[..., Any]) -> None:
    f, g = (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)) for _ in range(2))
    f, g = (module.to(memory_format=torch.channels_last) for module in (f, g))
    op = inv.chain(inv.split(2), inv.couple(f, g), inv.couple(g, f), inv.concat(2))
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    wrt = [x, *f.parameters(), *g.parameters()]
    expected, found = op(x), lower(op)(x)
    assert found.stride() == expected.stride()
    assert found.is_contiguous(memory_format=torch.channels_last)
    one, two = torch.autograd.grad(loss(found), wrt), torch.autograd.grad(loss(expected), wrt)
    assert [g.stride() for g in one] == [g.stride() for g in two]
    assert_close(one, two)


@every_lowering
@pytest.mark.parametrize("dtype", [torch.cdouble, torch.cfloat])
def test_complex_numbers(dtype: torch.dtype, lower: Callable[..., Any]) -> None:
    net, x = Net(dtype=dtype), leaf(3, 2 * WIDTH, dtype=dtype)
    wrt = [x, *net.parameters]
    expected, found = (torch.autograd.grad(loss(fn(x)), wrt) for fn in (net.op, lower(net.op)))
    assert_close(found, expected, ROUNDING if dtype is torch.cdouble else 1e-4)


def test_complex_numbers_under_other_laws() -> None:
    a, b = leaf(3, WIDTH, dtype=torch.cdouble), leaf(3, WIDTH, dtype=torch.cdouble)
    w = leaf(WIDTH, dtype=torch.cdouble)
    for op in (
        inv.couple(lambda x: (x * w, w), law=inv.affine),
        inv.couple(lambda x: (x.abs() + 1, x * w), law=inv.affine),
        inv.parallel(inv.pair(torch.exp, torch.log), inv.pair(lambda x: x * w, lambda y: y / w)),
    ):
        expected, found = (torch.autograd.grad(loss(fn(a, b)), [a, b, w]) for fn in (op, inv.checkpoint(op)))
        assert_close(found, expected)


@every_lowering
def test_a_zero_size_batch(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(0, 2 * WIDTH)
    out = lower(net.op)(x)
    assert out.shape == (0, 2 * WIDTH)
    found = torch.autograd.grad(loss(out), [x, *net.parameters])
    assert_close(found, torch.autograd.grad(loss(net.op(x)), [x, *net.parameters]))


@every_lowering
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_dtypes(dtype: torch.dtype, lower: Callable[..., Any]) -> None:
    net, x = Net(dtype=dtype), leaf(3, 2 * WIDTH, dtype=dtype)
    out = lower(net.op)(x)
    gradients = torch.autograd.grad(loss(out), [x, *net.parameters])
    assert {t.dtype for t in [out, *gradients]} == {dtype}


# ---- outputs -----------------------------------------------------------------------------------------------------------


@every_lowering
def test_an_output_may_be_changed_in_place_where_plain_autograd_allows_it(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(net.op(x) * 1 + 1), [x, *net.parameters])
    out = lower(net.op)(x)
    try:
        found = torch.autograd.grad(loss(out.add_(1)), [x, *net.parameters])
    except RuntimeError as error:  # what rebuilds from the output notices that it is gone: an error, no wrong gradient
        assert "modified by an inplace operation" in str(error)
    else:
        assert_close(found, expected)


def test_a_changed_output_raises_instead_of_giving_wrong_gradients() -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    out = inv.checkpoint(net.op)(x)
    total = out.sum()
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@every_lowering
def test_relu_in_place_behind_a_pipeline(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(torch.relu(net.op(x) + 0)), [x, *net.parameters])
    out = lower(net.op)(x) + 0
    assert_close(torch.autograd.grad(loss(out.relu_()), [x, *net.parameters]), expected)
