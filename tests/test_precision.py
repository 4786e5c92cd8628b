"""What an op computes from its parameters is as precise as its stream: against float64 with the same parameters."""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from types import CellType
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES, Example
from kit import assert_close, assert_refused, bowl
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import invfunc as inv
from invfunc.engine.snapshot import Parts
from invfunc.errors import NotDifferentiableError, ReplayError, WireError
from invfunc.testing import needs_no_residue
from invfunc.wires import is_differentiable, leaves, map_wire

ops, inn = inv.ops, inv.nn
HALVES = [torch.bfloat16, torch.float16]
F32, F64 = torch.float32, torch.float64
IN_SINGLE = 3e-5  # of a value in float32, as a part of the largest


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """The default dtype is float32, as users have it: a constant of that dtype is seen in a stream of float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F32)
    yield
    torch.set_default_dtype(before)


# ---- the same op in other dtypes -----------------------------------------------------------------------------------


def is_users(example: Example) -> bool:
    """Whether an example closes over tensors in a function of its own, whose precision is not the op's."""
    places = Parts(example.make().functions).places
    return any(isinstance(place.table, CellType) and isinstance(place.value, Tensor) for place in places)


OURS = [name for name, example in EXAMPLES.items() if not is_users(example) and "complex" not in name]
DRAWS = "dequantize", "dequantize, variational"  # other numbers in float32 than in float64; see `Still`
USERS_FLOW = "dequantize, variational"  # in float64, deeper than `recast` looks


def test_every_op_of_the_catalogue_is_tested_for_its_precision() -> None:
    """But for that whose functions are its user's; `test_laws.py` asks that all are in the catalogue."""
    names = {name.partition(",")[0] for name in EXAMPLES}
    of_core = {"pair", "invert", "chain", "parallel", "checkpoint"}  # which compute nothing
    assert names - {name.partition(",")[0] for name in OURS} - of_core == {"log_det_pair"}


def cast(leaf: Any, dtype: torch.dtype) -> Any:
    """A leaf in another dtype, where it has one; a complex one in that of its parts."""
    if not is_differentiable(leaf):
        return leaf
    return leaf.detach().to(dtype.to_complex() if leaf.is_complex() else dtype)


def recast(op: inv.Invertible, parameters: torch.dtype, stream: torch.dtype) -> inv.Invertible:
    """An op with its tensors in one dtype, and its networks, which are users' functions, in that of the stream."""
    parts = Parts(op.functions)
    if not (parts.tensors or parts.roots):
        return op
    memo: dict[int, Any] = {id(t): cast(t, parameters).requires_grad_(t.requires_grad) for t in parts.tensors}
    for module in parts.roots:
        owns = any(True for _ in module.parameters())
        memo[id(module)] = copy.deepcopy(module).to(stream if owns else parameters)
    return copy.deepcopy(op, memo)


def trained(op: inv.Invertible) -> list[Tensor]:
    """An op's own parameters."""
    return [t for t in Parts(op.functions).tensors if is_differentiable(t) and t.requires_grad]


def tensors_of(wire: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(wire) if is_differentiable(leaf)]


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    """Wires are near, as a part of the largest number of each tensor."""
    for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        assert_close(a.to(b.dtype) / scale, b / scale, tolerance)


def assert_kept(wire: Any, like: Any) -> None:
    """No tensor of a wire has left its stream's dtype."""
    assert {leaf.dtype.to_real() for leaf in tensors_of(wire)} <= {leaf.dtype.to_real() for leaf in tensors_of(like)}


def log_det(op: inv.Invertible, x: Any) -> Tensor | None:
    """The log-determinant, where there is one."""
    try:
        return inv.log_det(op, x)[1]
    except (NotDifferentiableError, WireError):
        return None


def gradients(op: Callable[..., Any], x: Any, parameters: list[Tensor]) -> list[Tensor]:
    """By the input's tensors, then by the parameters."""
    x = map_wire(lambda leaf: leaf.detach().requires_grad_() if is_differentiable(leaf) else leaf, x)
    total = sum(bowl(leaf.abs() if leaf.is_complex() else leaf) for leaf in tensors_of(op(x)))
    return list(torch.autograd.grad(total, [*tensors_of(x), *parameters], materialize_grads=True, allow_unused=True))


# ---- parameters in half precision, a stream in float32 -------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [name for name in OURS if name not in DRAWS])
def test_parameters_in_half_precision_do_not_make_a_stream_coarse(name: str, dtype: torch.dtype) -> None:
    example = EXAMPLES[name]
    narrow = recast(example.make(), dtype, F32)
    exact = recast(narrow, F64, F64)
    for x in example.inputs()[:-1]:
        x, wide = (map_wire(partial(cast, dtype=d), x) for d in (F32, F64))
        y = same_numbers(narrow.forward, exact.forward, x, wide)
        if needs_no_residue(narrow, x):
            same_numbers(narrow.inverse, exact.inverse, y, map_wire(partial(cast, dtype=F64), y))
        if (total := log_det(narrow, x)) is not None:
            assert total.dtype == F32
            assert_near(total, log_det(exact, wide), IN_SINGLE)


def same_numbers(fn: Callable[..., Any], exact: Callable[..., Any], x: Any, wide: Any) -> Any:
    """What a function makes of x, near to what another makes of the same numbers in float64."""
    torch.manual_seed(1)
    y = fn(x)
    torch.manual_seed(1)
    assert_kept(y, x)
    assert_near(y, exact(wide), IN_SINGLE)
    return map_wire(lambda leaf: leaf.detach() if is_differentiable(leaf) else leaf, y)


@pytest.mark.filterwarnings("ignore::invfunc.errors.DriftWarning")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [name for name in OURS if name not in DRAWS])
def test_gradients_with_parameters_in_half_precision_are_those_of_float64(name: str, dtype: torch.dtype) -> None:
    narrow = recast(EXAMPLES[name].make(), dtype, F32)
    exact = recast(narrow, F64, F64)
    x = map_wire(partial(cast, dtype=F32), EXAMPLES[name].inputs()[1])
    torch.manual_seed(1)
    expected = gradients(exact, map_wire(partial(cast, dtype=F64), x), trained(exact))
    for op in narrow, inv.checkpoint(narrow):
        torch.manual_seed(1)
        for found, true in zip(gradients(op, x, trained(narrow)), expected, strict=True):
            assert_near(found, true, 3e-4 if found.dtype == F32 else 4 * torch.finfo(dtype).eps)


# ---- what a net under autocast hands to a law ----------------------------------------------------------------------

LAWS: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "exp_scale": (inv.affine, partial(ops.exp_scale, dim=-1), 8),
    "sigmoid_scale": (inv.affine, partial(ops.sigmoid_scale, dim=-1), 8),
    "tanh_scale": (inv.affine, partial(ops.tanh_scale, dim=-1), 8),
    "rational_quadratic_spline": (ops.rational_quadratic_spline, partial(ops.per_element, count=23, dim=-1), 4 * 23),
    "linear_spline": (ops.linear_spline, partial(ops.per_element, count=8, dim=-1), 4 * 8),
    "mixture_logit": (ops.mixture_logit, partial(ops.per_element, count=12, dim=-1), 4 * 12),
    "mixture_cdf": (ops.mixture_cdf, partial(ops.per_element, count=12, dim=-1), 4 * 12),
    "power": (ops.power, lambda net: net, 4),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", LAWS)
def test_a_law_computes_from_a_half_net_in_the_dtype_of_the_stream(name: str, dtype: torch.dtype) -> None:
    law, adapt, size = LAWS[name]
    raw = torch.randn(50, size).add(2 * (name == "power")).to(dtype)
    narrow, exact = (inv.couple(adapt(net), law=law) for net in (lambda x: raw, lambda x: raw.double()))
    x = tuple(torch.rand(50, 4) + 0.1 for _ in range(2))
    y, total = inv.log_det(narrow, x)
    expected, expected_total = inv.log_det(exact, map_wire(Tensor.double, x))
    assert_kept((y, total), x)
    assert_near((y, total), (expected, expected_total), IN_SINGLE)
    assert_near(narrow.inverse(y), exact.inverse(map_wire(Tensor.double, y)), 1e-4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("adapt", [ops.exp_scale, ops.sigmoid_scale, ops.tanh_scale])
def test_a_net_and_a_stream_in_half_precision_stay_there(adapt: Callable[..., Any], dtype: torch.dtype) -> None:
    op = inv.couple(adapt(nn.Linear(4, 8).to(dtype), dim=-1), law=inv.affine)
    y = op(torch.randn(3, 4).to(dtype), torch.randn(3, 4).to(dtype))
    assert {leaf.dtype for leaf in (*y, *op.inverse(y))} == {dtype}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("solver", [ops.reversible_heun, ops.asynchronous_leapfrog, ops.reversible_solver])
def test_a_solver_adds_up_a_half_field_in_the_dtype_of_the_stream(solver: Any, dtype: torch.dtype) -> None:
    raw = torch.randn(50, 4).to(dtype)
    narrow, exact = (solver(field, [0, 0.1, 0.4]) for field in (lambda t, x: raw, lambda t, x: raw.double()))
    x = tuple(torch.randn(50, 4) for _ in range(2))
    y = same_numbers(narrow.forward, exact.forward, x, map_wire(Tensor.double, x))
    same_numbers(narrow.inverse, exact.inverse, y, map_wire(Tensor.double, y))


class Still:
    """Noise that draws the same number, in a dtype of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def rsample(self, shape: Any = (), context: Any = None) -> Tensor:
        return torch.full_like(context, 0.375, dtype=self.dtype)

    def log_prob(self, x: Tensor, context: Any = None) -> Tensor:
        return x.new_full(x.shape[:1], 0.375, dtype=self.dtype)


@pytest.mark.parametrize("dtype", [*HALVES, F64])
def test_noise_of_another_dtype_leaves_whole_numbers_in_that_of_the_stream(dtype: torch.dtype) -> None:
    narrow, exact = ops.dequantize(17, Still(dtype)), ops.dequantize(17, Still(F64))
    x = torch.arange(17.0).repeat(3, 1)
    y = same_numbers(narrow.forward, exact.forward, x, x.double())
    assert torch.equal(narrow.inverse(y), x)
    total = inv.log_det(narrow, x)[1]
    assert total.dtype == F32
    assert_near(total, inv.log_det(exact, x.double())[1], IN_SINGLE)


# ---- what is computed, by its dtype --------------------------------------------------------------------------------


class Narrow(TorchDispatchMode):
    """The operators that return numbers narrower than a dtype; moving and casting does not count."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.ran = torch.finfo(dtype).eps, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or str(func) in ("aten._to_copy.default", "aten.copy_.default")):
            for leaf in out if isinstance(out, (tuple, list)) else (out,):
                if is_differentiable(leaf) and torch.finfo(leaf.dtype).eps > self.eps:
                    self.ran.add(str(func))
        return out


def do_all(op: inv.Invertible, x: Any) -> None:
    """Forward, inverse and log-determinant, as far as there are any."""
    y = op.forward(x)
    if needs_no_residue(op, x):
        op.inverse(y)
    log_det(op, x)


@pytest.mark.parametrize("name", OURS)
def test_in_float64_nothing_is_computed_in_less(name: str) -> None:
    op, x = recast(EXAMPLES[name].make(), F64, F64), EXAMPLES[name].inputs()[1]
    with Narrow(F64) as narrow:
        do_all(op, x)
        gradients(op, x, [])
        gradients(inv.checkpoint(op), x, [])
    assert narrow.ran == set()


@pytest.mark.parametrize("name", [name for name in OURS if name != USERS_FLOW])
def test_in_float32_nothing_is_computed_in_half_precision(name: str) -> None:
    op = recast(EXAMPLES[name].make(), torch.bfloat16, F32)
    x = map_wire(partial(cast, dtype=F32), EXAMPLES[name].inputs()[1])
    with Narrow(F32) as narrow:
        do_all(op, x)
    assert narrow.ran == set()


@pytest.mark.parametrize("n", [1, 2, 5, 6, 64])
def test_dct_is_the_closed_form_in_float64(n: int) -> None:
    k = torch.arange(n, dtype=F64)
    expected = torch.cos(math.pi / n * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / n)
    expected[0] /= math.sqrt(2)
    found = ops.dct()(torch.eye(n, dtype=F64)).T
    assert_close(found, expected, 1e-14)
    assert_close(found @ found.T, torch.eye(n, dtype=F64), 1e-14)
    assert torch.linalg.slogdet(found)[1].abs() < 1e-13


# ---- reports -------------------------------------------------------------------------------------------------------


def test_a_spline_flow_under_autocast_has_a_finite_log_likelihood() -> None:
    net, z = nn.Linear(2, 2 * 23), torch.randn(64, 4)
    flow = inv.chain(inv.split(2), *[ops.spline_couple(net, net, bins=8)] * 3, inv.concat(2))
    expected = inv.log_det(flow, z)
    with torch.autocast("cpu", torch.bfloat16):
        y, total = inv.log_det(flow, z)
        assert y.dtype == total.dtype == F32
        assert flow.inverse(y).isfinite().all()
    assert_near((y, total), expected, 5e-2)


def test_a_spline_with_bf16_parameters_is_undone() -> None:
    p, x = [torch.randn(2000, n).bfloat16() for n in (8, 8, 7)], torch.rand(2000) * 6 - 3
    op = ops.rational_quadratic_spline(*p)
    assert_close(op.inverse(op(x)), x, 2e-3)
    assert op.inverse(x).isfinite().all() and inv.log_det(op, x)[1].isfinite().all()


def test_a_rational_quadratic_spline_in_half_precision_keeps_its_knots_in_order() -> None:
    p, x = torch.randn(500, 14).mul(4).half(), (torch.rand(500) * 6 - 3).half()
    op = ops.rational_quadratic_spline(p)
    assert op(x).dtype == torch.float16 and op(x).isfinite().all()
    near = torch.stack([x, x.nextafter(torch.full_like(x, 9))])
    values = op(near)
    assert (values[1] >= values[0]).all()


# ---- parameters that are wider than the stream -----------------------------------------------------------------------


def wider_laws(p: Tensor) -> dict[str, inv.Invertible]:
    """Ops that promote a stream in half precision, as torch's arithmetic does."""

    def shift(x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), p).tanh()

    def scale_and_shift(x: Tensor) -> tuple[Tensor, Tensor]:
        return shift(x).sigmoid() + 0.5, shift(x)

    affine = inv.couple(scale_and_shift, scale_and_shift, law=inv.affine)
    both = inv.parallel(inv.affine(1.5 + p[0], p[1]), inv.pair(lambda x: x * (1.5 + p[0]), lambda y: y / (1.5 + p[0])))
    return {"affine": affine, "additive": inv.couple(shift, shift), "beside": both}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["affine", "additive", "beside"])
def test_parameters_that_are_wider_than_the_stream_promote_it_lowered_as_plain(name: str, dtype: torch.dtype) -> None:
    streams = [torch.randn(5, 4).to(dtype), torch.randn(5, 4).to(dtype)]

    def loss(p: Tensor, x: Tensor, z: Tensor, lower: Callable[[Any], Any]) -> Tensor:
        op = wider_laws(p)[name]
        return sum(bowl(leaf.float()) for leaf in lower(inv.chain(op, inv.swap(), op))(x, z))

    def gradients(lower: Callable[[Any], Any]) -> list[Tensor]:
        inputs = [t.detach().clone().requires_grad_() for t in (0.3 * torch.eye(4), *streams)]
        return list(torch.autograd.grad(loss(*inputs, lower), inputs))

    plain = gradients(lambda op: op)
    found = torch.func.grad(partial(loss, lower=inv.checkpoint), (0, 1, 2))(0.3 * torch.eye(4), *streams)
    for a, b, c in zip(gradients(inv.checkpoint), found, plain, strict=True):
        assert_close(a, c, 1e-5 if c.dtype == F32 else 0)  # a sum of two in float32 has no order
        assert_close(b, c, 1e-5 if c.dtype == F32 else 8 * torch.finfo(dtype).eps)


def test_an_inverse_that_is_narrower_than_forwards_input_is_still_refused() -> None:
    op = inv.chain(inv.ops.sinh(), inv.ops.sinh(), inv.pair(lambda x: 2 * x, lambda y: (y / 2).half(), name="narrow"))
    y = inv.checkpoint(op)(torch.ones(3, requires_grad=True))
    assert_refused(
        ReplayError,
        "chain stage 2 (narrow): the inverse of narrow returned (3,) float16, expected (3,) float32 as in forward",
        lambda: y.sum().backward(),
    )
