"""What may travel on a wire, and what is refused, however an op is called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import assert_close
from torch import Tensor, nn

import invfunc as inv
from invfunc.errors import WireError

ON_TUPLES: dict[str, Callable[[], inv.Invertible]] = {
    "couple": lambda: inv.couple(torch.sin, torch.cos),
    "couple, affine": lambda: inv.couple(lambda x: (x.exp(), x), law=inv.affine),
    "couple, inverted": lambda: inv.invert(inv.couple(torch.sin)),
    "couple, in a chain": lambda: inv.chain(inv.ops.exp(), inv.couple(torch.sin)),
    "parallel": lambda: inv.parallel(inv.ops.exp(), inv.ops.exp()),
    "permute_wires": lambda: inv.permute_wires([1, 0]),
    "concat": lambda: inv.concat(2),
    "couple_streams": lambda: inv.ops.couple_streams([torch.sin, torch.cos]),
    "momentum": lambda: inv.ops.momentum(torch.sin, 0.5),
    "given": lambda: inv.ops.given(inv.couple(torch.add)),
}


def counted(op: inv.Invertible, x: Tensor) -> Any:
    return inv.checkpoint(inv.with_log_det(op, exact="autodiff"))(x, torch.zeros(len(x)))


CALLS: dict[str, Callable[[inv.Invertible, Tensor], Any]] = {
    "plain": lambda op, x: op(x),
    "lowered": lambda op, x: inv.checkpoint(op)(x),
    "recomputed": lambda op, x: inv.checkpoint(op, mode="recompute")(x),
    "a module": lambda op, x: inv.nn.Lowered(op)(x),
    "log_det": lambda op, x: inv.log_det(op, x, exact="autodiff"),
    "with_log_det, lowered": counted,
    "with_log_det, inverted": lambda op, x: counted(inv.invert(inv.with_log_det(inv.invert(op), exact="autodiff")), x),
    "flow": lambda op, x: inv.flow(op, torch.distributions.Normal(0, 1), exact="autodiff").log_prob(x),
    "exact": lambda op, x: inv.checkpoint(inv.exact(op, mode="codes"))(x),
    "check": lambda op, x: inv.check(op, x),
    "grad": lambda op, x: torch.func.vjp(inv.checkpoint(op), x),
    "jvp": lambda op, x: torch.func.jvp(inv.checkpoint(op), (x,), (x,)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ON_TUPLES)
def test_one_tensor_is_no_tuple_whatever_its_batch(name: str, call: str) -> None:
    for batch in 2, 5:
        with pytest.raises(WireError):
            CALLS[call](ON_TUPLES[name](), torch.randn(batch, 2, 4, requires_grad=True))


def test_log_det_says_what_the_op_says() -> None:
    op, x = inv.couple(torch.sin), torch.randn(2, 2, 4)
    with pytest.raises(WireError) as plain:
        op(x)
    with pytest.raises(WireError) as found:
        inv.log_det(op, x)
    assert str(found.value) == str(plain.value)


@pytest.mark.parametrize("count", [1, 3])
def test_log_det_refuses_another_number_of_components(count: int) -> None:
    with pytest.raises(WireError, match="couple received the wrong number of components, expected a tuple of 2"):
        inv.log_det(inv.couple(torch.sin), tuple(torch.randn(3, 2) for _ in range(count)))


# ---- rules that return a number --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rule_may_return_a_number(dtype: torch.dtype) -> None:
    turn = inv.pair(lambda x: x.roll(1, -1), lambda y: y.roll(-1, -1), log_det=lambda x, y: 0.0)
    triple = inv.pair(lambda x: 3 * x, lambda y: y / 3, log_det=lambda x, y: 4 * torch.tensor(3.0).log().item())
    op = inv.chain(turn, triple, inv.invert(turn), inv.invert(triple), triple)
    x = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    for counting in inv.with_log_det(op), inv.checkpoint(inv.with_log_det(op)):
        y, total = counting(x, torch.zeros(5, dtype=dtype))
        assert total.dtype == dtype
        assert_close(total, torch.linalg.slogdet(3 * torch.eye(4, dtype=dtype))[1].expand(5), 1e-6)
        (gradient,) = torch.autograd.grad(y.sum() + total.sum(), x)
        assert_close(gradient, torch.full_like(x, 3), 1e-6)
        assert_close(counting.inverse((y, total))[1], torch.zeros(5, dtype=dtype), 1e-6)


# ---- other leaves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["invert", "recompute", "store"])
@pytest.mark.parametrize(
    "leaf", [torch.arange(3), torch.tensor([True, False]), None, "a word", object()], ids=["int", "bool", "None", "str", "object"]
)  # fmt: skip
def test_other_leaves_ride_along(leaf: Any, mode: str) -> None:
    layer = nn.Linear(4, 4)
    op = inv.chain(inv.parallel(inv.couple(layer), inv.chain()), inv.permute_wires([1, 0]))
    a, b = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    found, (y1, y2) = inv.checkpoint(op, mode=mode)((a, b), leaf)
    assert found is leaf
    expected = torch.autograd.grad(layer(b).sin().sum(), b)
    assert_close(torch.autograd.grad((y1 - a).sin().sum(), b), expected, 1e-5)


# ---- nested tensors --------------------------------------------------------------------------------------------------


def ragged(layout: torch.layout) -> Tensor:
    rows = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)]
    return torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)


def layers(count: int, width: int = 4) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(count)).double()


@pytest.mark.parametrize("mode", ["invert", "recompute", "store"])
@pytest.mark.parametrize("how", ["halves", "two streams", "a stem"])
def test_streams_may_be_nested_tensors(how: str, mode: str) -> None:
    f, g, stem = layers(3, 2 if how == "halves" else 4)
    trunk = inv.chain(inv.couple(f, g), inv.couple(g, f))
    if how == "halves":
        op = inv.chain(inv.split(2, dim=-1), trunk, inv.concat(2, dim=-1))
    else:
        op = inv.chain((lambda x: (stem(x), x)) if how == "a stem" else lambda x: (x, 2 * x), trunk, torch.add)
    x = ragged(torch.jagged)
    wrt = [x, *f.parameters(), *g.parameters()]

    def gradients(fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(fn(x).sin().values().sum(), wrt)
        return [found[0].values(), *found[1:]]

    assert_close(gradients(inv.checkpoint(op, mode=mode)), gradients(op))


REFUSALS: dict[str, Callable[[inv.Invertible, Tensor], Any]] = {
    "log_det": inv.log_det,
    "exact": lambda op, x: inv.exact(op)(x),
    "exact ": lambda op, x: inv.checkpoint(inv.exact(op, "codes"))(x),
    "check": inv.check,
    "checkpoint inside of torch.compile": lambda op, x: torch.compile(inv.checkpoint(op), backend="eager")(x),
}


@pytest.mark.parametrize("call", REFUSALS)
def test_nested_tensors_are_refused_by_name_where_torch_does_not_compute_with_them(call: str) -> None:
    op = inv.chain(inv.split(2, dim=-1), inv.couple(torch.sin), inv.concat(2, dim=-1))
    with pytest.raises((WireError, torch._dynamo.exc.InternalTorchDynamoError)) as error:
        REFUSALS[call](op, ragged(torch.jagged))
    assert f"{call.strip()} received a nested tensor, expected tensors whose elements are of one size" in str(
        error.value
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_without_a_shape_are_refused_by_name() -> None:
    x = ragged(torch.strided)
    op = inv.chain(lambda x: x, inv.pair(lambda x: 2 * x, lambda y: y / 2))
    message = (
        "a nested tensor in the strided layout has no shape, expected nested tensors in the jagged layout; build it "
        'with layout=torch.jagged, or lower that part in mode "store"'
    )
    for mode, path in ("invert", "chain stage 1 (pair): "), ("recompute", ""):
        with pytest.raises(WireError) as error:
            inv.checkpoint(op, mode=mode)(x)
        assert str(error.value) == path + message
    assert inv.checkpoint(op, mode="store")(x).requires_grad
    with pytest.raises(
        WireError, match="chain stage 0 \\(split\\): a nested tensor in the strided layout has no shape"
    ):
        inv.checkpoint(inv.chain(inv.split(2, dim=-1), inv.couple(torch.sin)))(x)
