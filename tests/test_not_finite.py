"""Numbers that are not finite in a pipeline whose loss leaves them out: no gradient is finite and wrong in silence."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES
from test_saturation import is_elementwise
from torch import Tensor, nn

import invfunc as inv
from invfunc.errors import DomainError, DriftError, DriftWarning
from invfunc.testing import needs_no_residue
from invfunc.wires import is_differentiable, leaves, map_wire

NAN, INF = float("nan"), float("inf")
WHERE = "keep what is not finite out of the pipeline (mask its input, not its loss alone), recompute it (mode='recompute'), or keep what it misses (inv.exact(op, 'codes'))"


class Embed(nn.Module):
    """A function that takes decisions from x and multiplies nothing with it: its gradients are finite, whatever x is."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = (nn.Parameter(torch.randn(4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """One of two parameters for each number."""
        return torch.where(x > 0, self.high, self.low)


class Clamped(nn.Module):
    """A function whose gradient by its bias is masked by x."""

    def __init__(self, squash: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.squash, self.bias = squash, nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        """Of the size of x."""
        return self.squash(x + self.bias)


def mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def over_samples() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU6(), nn.Linear(4, 4))


FUNCTIONS: dict[str, Callable[[], nn.Module]] = {
    "where": Embed,
    "clamp": lambda: Clamped(lambda x: x.clamp(-9, 9)),
    "max": lambda: Clamped(lambda x: torch.maximum(x, torch.zeros(()))),
    "relu": lambda: Clamped(torch.relu),
    "nan_to_num": lambda: Clamped(torch.nan_to_num),
    "linear and relu": mixed,
    "batch norm": over_samples,
}


def pipeline(name: str) -> inv.Invertible:
    """The function is evaluated on what a mixing one makes NaN on the way back."""
    couplings = [inv.couple(FUNCTIONS[name](), mixed()), inv.couple(FUNCTIONS[name](), mixed())]
    return inv.chain(inv.split(2, -1), *couplings, inv.concat(2, -1))


def gradients(way: Callable[..., Any], op: inv.Invertible, x: Tensor) -> list[Tensor]:
    """Of a loss that leaves out what is not finite."""
    x = x.clone().requires_grad_()
    y = way(op)(x)
    loss = torch.where(y.isfinite(), y, 0).square().sum()
    parts = inv.nn.Lowered(op).parameters()
    return list(torch.autograd.grad(loss, [x, *parts], allow_unused=True, materialize_grads=True))


def images(samples: int, at: int, value: float) -> Tensor:
    """Random numbers, of which one in the half that comes first is not finite."""
    x = torch.randn(samples, 8)
    x[at, 1] = value
    return x


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def has_wrong(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether a number is finite and not that of plain."""
    return any((a.isfinite() & ~a.isclose(b, equal_nan=True)).any() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("samples", [4, 300])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_number_that_is_not_finite_gives_no_wrong_gradient_without_a_word(
    name: str, samples: int, value: float
) -> None:
    op, x = pipeline(name), images(samples, samples // 3, value)
    expected = gradients(lambda op: op, op, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gradients(inv.checkpoint, op, x)
    assert caught or not has_wrong(found, expected)
    assert all(issubclass(warning.category, DriftWarning) for warning in caught)


def test_such_a_gradient_may_be_finite_and_wrong() -> None:
    op, x = pipeline("where"), images(300, 7, NAN)
    with pytest.warns(DriftWarning) as caught:
        found = gradients(inv.checkpoint, op, x)
    assert has_wrong(found, gradients(lambda op: op, op, x))
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "is not finite where it was: the inverses undo what is finite: in forward some numbers were not" in text
    assert WHERE in text


def test_where_it_should_raise_it_raises() -> None:
    with pytest.raises(DriftError, match="is not finite where it was: the inverses undo what is finite"):
        gradients(lambda op: inv.checkpoint(op, drift="raise"), pipeline("where"), images(300, 7, NAN))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "way", [lambda op: inv.checkpoint(op, mode="recompute"), lambda op: inv.checkpoint(op, mode="store")]
)
def test_recomputed_and_stored_all_gradients_are_those_of_plain(name: str, way: Callable[..., Any]) -> None:
    op, x = pipeline(name), images(300, 7, NAN)
    assert_same(gradients(way, op, x), gradients(lambda op: op, op, x), 1e-12)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_with_codes_all_gradients_are_those_of_plain_and_a_grid_refuses(name: str, value: float) -> None:
    op, x = pipeline(name), images(40, 7, value)
    coded = gradients(lambda op: inv.checkpoint(inv.exact(op, "codes")), op, x)
    assert_same(coded, gradients(lambda op: op, op, x), 0)
    with pytest.raises(DomainError, match="a state left the range of the grid"):
        gradients(lambda op: inv.checkpoint(inv.exact(op)), op, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_with_its_input_masked_all_gradients_are_those_of_plain(name: str) -> None:
    op, x = pipeline(name), images(300, 7, NAN).nan_to_num()
    assert_same(gradients(inv.checkpoint, op, x), gradients(lambda op: op, op, x), 1e-9)


def test_what_is_not_finite_and_stays_where_it_is_is_no_drift() -> None:
    op = inv.chain(inv.ops.sinh(), inv.affine(nn.Parameter(torch.tensor(2.0)), torch.tensor(1.0)), inv.ops.asinh())
    x = images(300, 7, NAN)
    assert_same(gradients(inv.checkpoint, op, x), gradients(lambda op: op, op, x), 1e-9)


@pytest.mark.parametrize("value", [INF, -INF])
def test_a_condition_with_infinite_numbers_rides_along_without_a_word(value: float) -> None:
    net = nn.Linear(4, 4)
    op = inv.ops.given(
        inv.chain(inv.split(2, -1), inv.couple(lambda x, mask: (net(x) + mask).softmax(-1)), inv.concat(2, -1))
    )
    mask = torch.zeros(300, 4)
    mask[:, 1] = value if value < 0 else 0
    mask[7, 2] = value
    x = torch.randn(300, 8, requires_grad=True)
    found = torch.autograd.grad(inv.checkpoint(op)(x, mask)[0][:7].sin().sum(), [x, *net.parameters()])
    expected = torch.autograd.grad(op(x, mask)[0][:7].sin().sum(), [x, *net.parameters()])
    assert_same(list(found), list(expected), 1e-9)


def test_below_a_transform_where_there_is_no_meter_nobody_tells() -> None:
    mix, high, low = mixed(), torch.randn(4), torch.randn(4)
    x = images(300, 7, NAN)

    def loss(low: Tensor, way: Callable[..., Any]) -> Tensor:
        f = inv.couple(lambda x: torch.where(x > 0, high, low), mix)
        y = way(inv.chain(inv.split(2, -1), f, f, inv.concat(2, -1)))(x)
        return torch.where(y.isfinite(), y, 0).square().sum()

    found, expected = (torch.func.grad(lambda low, w=way: loss(low, w))(low) for way in (inv.checkpoint, lambda op: op))
    assert has_wrong([found], [expected])


# ---- every op ------------------------------------------------------------------------------------------------------

DROP = "pad", "leave_streams", "enter_streams"  # in one direction, by their docstrings
OF_USERS = "pair", "one_way", "checkpoint"  # whose functions saturate
MIXING = [n for n in EXAMPLES if not is_elementwise(n) and n.partition(",")[0] not in (*DROP, *OF_USERS)]


@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("name", MIXING)
def test_of_an_infinity_an_op_on_several_numbers_makes_not_only_finite_ones(name: str, value: float) -> None:
    """In both directions; NaN, see `test_saturation.py`."""
    op, x = EXAMPLES[name].make(), EXAMPLES[name].inputs()[1]
    for way in op, inv.checkpoint(op):
        assert not is_finite(way.forward(with_number(x, value)))
    if needs_no_residue(op, x) and not name.startswith(("residual_flow", "autoregressive")):  # which raise
        assert not is_finite(op.inverse(with_number(op.forward(x), value)))


def with_number(wire: Any, value: float) -> Any:
    """A wire whose first number is another."""
    wire = map_wire(
        lambda leaf: leaf.detach().clone(memory_format=torch.contiguous_format) if is_differentiable(leaf) else leaf,
        wire,
    )
    next(filter(is_differentiable, leaves(wire))).view(-1)[:1] = value
    return wire


def is_finite(wire: Any) -> bool:
    """Whether all numbers of a wire are."""
    return all(leaf.isfinite().all() for leaf in leaves(wire) if is_differentiable(leaf))
