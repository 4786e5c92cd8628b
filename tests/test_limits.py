"""Sentences under Limits, in docstrings and in the README, that no other test holds."""

import os
import random
import threading
from array import array
from collections.abc import Callable
from functools import partial
from io import StringIO
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from kit import assert_close, leaf
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

import invfunc as inv
from invfunc import ops
from invfunc.compat import memcnn
from invfunc.errors import DomainError, DriftWarning, InvertibleError, NotDifferentiableError, ReplayError
from invfunc.log_det import log_det_pair
from invfunc.plan import simulate
from invfunc.testing import LawError

# ---- rounding --------------------------------------------------------------------------------------------------------


def round_trip(op: Any, x: Any) -> float:
    """How far the inverse comes back, in float32, against the largest value."""
    with torch.no_grad():
        back = op.inverse(op(x))
    return float((back - x).abs().max() / x.abs().max())


def of_condition(number: float) -> Tensor:
    """A matrix with a condition number."""
    u, v = (torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] for _ in range(2))
    return (u * torch.logspace(0, -1, 8, number, dtype=torch.float64) @ v).float()


@pytest.mark.parametrize("make", [ops.linear, ops.conv1x1, lambda w: ops.conv2d(w[:, :, None, None])])
def test_rounding_grows_with_the_condition_number(make: Callable[[Tensor], Any]) -> None:
    x = torch.randn(64, 8, 4, 4, dtype=torch.float32)
    wire = x[..., 0, 0] if make is ops.linear else x
    errors = [round_trip(make(of_condition(number)), wire) for number in (1.0, 1e2, 1e4)]
    assert errors[0] < 1e-5 and 100 * errors[0] < errors[2] and errors[0] < errors[1] < errors[2]


def test_a_random_linear_layer_is_worse_than_an_orthogonal_one() -> None:
    x = torch.randn(64, 128, dtype=torch.float32)
    layers = [kind(128, 128, dtype=torch.float32) for kind in (inv.nn.Linear, inv.nn.OrthogonalLinear)]
    errors = [round_trip(layer, x) for layer in layers]
    assert errors[1] < 1e-5 < errors[0]


def test_the_error_of_a_triangular_map_may_double_with_every_row() -> None:
    errors = []
    for size in (10, 20):
        weight = torch.eye(size).float() - torch.ones(size, size).float().tril(
            -1
        )  # its inverse has 2^(n-2) in a corner
        errors.append(round_trip(ops.triangular(weight), torch.randn(64, size, dtype=torch.float32)))
    assert errors[1] > 2**7 * errors[0]


def test_rounding_grows_with_the_ratio_of_scales() -> None:
    x = torch.randn(64, 8, dtype=torch.float32)
    errors = []
    for ratio in (1.0, 1e4):
        scales = torch.logspace(0, -1, 4, ratio).float()
        law = partial(inv.affine, scales)
        op = inv.chain(inv.split(2), *[inv.couple(torch.sin, law=law), inv.swap()] * 2, inv.concat(2))
        errors.append(round_trip(op, x))
    assert errors[1] > 100 * errors[0]


@pytest.mark.parametrize("make", [lambda: ops.exp_scale(nn.Linear(32, 64).float()), lambda: naive(32)])
def test_four_couplings_with_unbounded_scales_overflow(make: Callable[[], Any]) -> None:
    couplings = [inv.couple(make(), make(), law=inv.affine) for _ in range(4)]
    bounded = [inv.couple(ops.tanh_scale(nn.Linear(32, 64).float()), law=inv.affine) for _ in range(4)]
    x = 3 * torch.randn(64, 64, dtype=torch.float32)
    assert not inv.chain(inv.split(2), *couplings, inv.concat(2))(x).isfinite().all()
    assert inv.chain(inv.split(2), *bounded, inv.concat(2))(x).isfinite().all()


def naive(size: int) -> Any:
    return memcnn.AffineAdapterNaive(nn.Linear(size, size).float())


def test_normalised_couplings_in_float32_are_good_for_hundreds_of_blocks() -> None:
    def gradient(dtype: torch.dtype, lower: Callable[[Any], Any]) -> Tensor:
        torch.manual_seed(0)
        nets = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(400)]
        nets = [net.to(dtype) for net in nets]
        x = torch.linspace(-2, 2, 64, dtype=dtype).reshape(4, 16).requires_grad_()
        couplings = [inv.couple(f, g) for f, g in zip(nets[::2], nets[1::2], strict=True)]
        lower(inv.chain(inv.split(2), *couplings, inv.concat(2)))(x).float().square().sum().backward()
        assert x.grad is not None
        return x.grad.float()

    fast = partial(inv.checkpoint, drift="off")
    errors = [
        float((gradient(dtype, fast) - plain).norm() / plain.norm())
        for dtype, plain in [(d, gradient(d, lambda op: op)) for d in (torch.float32, torch.bfloat16)]
    ]
    assert errors[0] < 1e-3 and errors[1] > 0.1


def test_a_weight_near_0_loses_its_channel() -> None:
    x = torch.randn(64, 2, dtype=torch.float32)
    errors = []
    for weight in (1.0, 1e-6):
        op = ops.batch_norm(
            torch.tensor([1.0, weight]).float(),
            *map(torch.Tensor.float, (torch.ones(2), torch.zeros(2), torch.ones(2))),
        )
        errors.append(round_trip(op, x))
    assert errors[0] < 1e-6 and errors[1] > 1e-3


def test_a_difference_loses_what_the_sum_has_rounded_away() -> None:
    block = nn.Linear(8, 8)
    residual = lambda x: x + block(x) / 500  # noqa: E731
    x = 1 + torch.rand(64, 8, dtype=torch.bfloat16)
    branch = ops.residual_branch(residual)
    with torch.no_grad():
        block.to(torch.bfloat16)
        found = (branch(x) - block(x) / 500).abs().max() / (block(x) / 500).abs().max()
    assert found > 0.1


# ---- what nobody proves ----------------------------------------------------------------------------------------------


def test_a_wrong_inverse_gives_wrong_gradients_and_laws_find_it() -> None:
    wrong = inv.pair(torch.sinh, lambda y: torch.asinh(y) + 0.1)
    x, op = leaf(3, 4), inv.chain(wrong, wrong)
    with pytest.warns(DriftWarning, match="inverse"):
        (found,) = torch.autograd.grad(inv.checkpoint(op)(x).sum(), x)
    assert not torch.allclose(found, torch.autograd.grad(op(x).sum(), x)[0], rtol=1e-2)
    with_rule = log_det_pair(
        lambda x: (x.sinh(), x.cosh().log().sum(1)), lambda y: (wrong.inverse(y), -(1 + y**2).sqrt().log().sum(1))
    )
    for op in wrong, with_rule:
        with pytest.raises(LawError):
            inv.testing.check_laws(op, x.detach())


def test_is_invertible_module_does_not_look_at_gradients() -> None:
    class Stopped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach() * 2

        def inverse(self, y: Tensor) -> Tensor:
            return y / 2

    assert memcnn.is_invertible_module(Stopped(), test_input_shape=(3, 4))
    op = inv.pair(lambda x: x * 2, lambda y: y / 2, pullback=lambda y, gy: (y / 2, 3 * gy))
    with pytest.raises(LawError, match="pullback"):
        inv.testing.check_laws(op, torch.randn(3, 4))


def test_an_iteration_that_converges_may_have_found_another_x() -> None:
    op = ops.residual_flow(lambda x: 3 * torch.sin(x))  # no contraction, but near where its slope is small
    x = torch.tensor([[4.0]], dtype=torch.float64)
    found = op.inverse(op(x))
    assert_close(op(found), op(x), 1e-4)
    assert not torch.allclose(found, x)
    with inv.debug(), pytest.raises(DomainError):
        op(torch.zeros(1, 1, dtype=torch.float64))


def test_an_exact_log_determinant_takes_samples_one_by_one() -> None:
    mixes = lambda x: 0.5 * torch.tanh(x - x.mean(0))  # noqa: E731
    x = torch.randn(3, 2, dtype=torch.float64)
    whole = torch.func.jacrev(lambda x: (x + mixes(x)).flatten())(x).reshape(6, 6)
    found = inv.log_det(ops.residual_flow(mixes), x)[1].sum()
    assert not torch.allclose(found, torch.linalg.slogdet(whole)[1], rtol=1e-3)


def test_an_exact_log_determinant_takes_no_function_that_writes_into_a_buffer() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.scale.copy_(torch.linalg.matrix_norm(self.weight, 2).detach())
            return super().forward(x).tanh() / (2 * self.scale)

    net, x = Scaled(3, 3).double(), torch.randn(4, 3, dtype=torch.float64)
    net.register_buffer("scale", torch.ones((), dtype=torch.float64))
    op = ops.residual_flow(net)
    assert torch.allclose(op.inverse(op(x)), x)
    with pytest.raises(RuntimeError, match="in-place operation"):
        inv.log_det(op, x)
    inv.log_det(ops.residual_flow(ops.residual_branch(nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double())), x)


# ---- what is kept, and where -----------------------------------------------------------------------------------------


def test_debug_belongs_to_the_thread() -> None:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(ops.log()(torch.tensor([-1.0]))))
    with inv.debug():
        thread.start()
        thread.join()
        with pytest.raises(DomainError):
            ops.log()(torch.tensor([-1.0]))
    assert seen[0].isnan().all()


def test_a_grid_rounds_small_changes_away() -> None:
    op = inv.exact(inv.chain(inv.split(2), inv.couple(lambda x: torch.full_like(x, 2.0**-12)), inv.concat(2)), k=10)
    x = torch.ones(2, 4, dtype=torch.float32)
    assert torch.equal(op(x), x)


def test_codes_keep_the_input_under_transforms() -> None:
    net = nn.Linear(4, 4).double()
    op = inv.chain(inv.split(2), inv.couple(net), inv.concat(2))
    x = torch.randn(3, 8, dtype=torch.float64)
    wrong = inv.checkpoint(inv.exact(op, "codes"))
    assert_close(torch.func.grad(lambda x: wrong(x).sin().sum())(x), torch.func.grad(lambda x: op(x).sin().sum())(x))


def test_other_effects_of_a_drawn_op_stay() -> None:
    calls: list[int] = []
    op = ops.residual_flow(lambda x: calls.append(1) or torch.tanh(x) / 2)
    inv.draw(op, torch.randn(2, 3, dtype=torch.float64))
    assert calls


def test_one_wrong_number_among_a_million_hides_from_check() -> None:
    def off(y: Tensor) -> Tensor:
        x = y / 2
        x.view(-1)[:1] += 1e-3
        return x

    large, small = (
        inv.check(inv.pair(lambda x: 2 * x, off), 100 + torch.rand(size)) for size in ((1000, 1000), (1, 8))
    )
    assert large.verdict.startswith("holds") and not small.verdict.startswith("holds")


def test_what_is_calibrated_holds_for_its_data() -> None:
    op = inv.chain(*[ops.tanh(), ops.tanh()] * 4)
    errors = [round_trip(op, size * torch.rand(4, 8, dtype=torch.float32)) for size in (1, 4)]
    assert errors[1] > 2 * errors[0]


def test_what_a_node_keeps_without_telling_autograd_is_not_seen() -> None:
    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.hidden = x.exp()
            return x.sin()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * ctx.hidden.log().cos()

    hides: Any = Hides.apply
    assert sum(kept.bytes for kept in inv.look.saved(hides, leaf(3, 4))) == 0


def test_an_average_from_before_the_first_batch_has_its_zeros() -> None:
    layer = inv.nn.ActNorm(2)
    average = torch.optim.swa_utils.AveragedModel(layer, avg_fn=lambda a, b, n: (a + b) / 2)
    average.update_parameters(layer)
    layer(torch.randn(64, 2) * 5 + 3)
    average.update_parameters(layer)
    assert_close(average.module.bias, layer.bias / 2)


# ---- transforms and graphs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: ~ops.residual_flow(lambda x: torch.tanh(x) / 2),
        lambda: ~ops.autoregressive(lambda x: (0 * x + 2, 0 * x)),
    ],
)
def test_an_inverse_that_looks_at_data_has_jacrev_for_batched_gradients(make: Callable[[], Any]) -> None:
    op, x = make(), leaf(1, 3)
    y = op(x)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(y, x, torch.eye(3).reshape(3, 1, 3).to(y), is_grads_batched=True)
    rows = [torch.autograd.grad(op(x)[0, i], x)[0] for i in range(3)]
    assert_close(torch.func.jacrev(op)(x.detach())[0].reshape(3, 3), torch.cat(rows), 1e-6)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_an_iterative_inverse_is_no_full_graph() -> None:
    op = ops.residual_flow(lambda x: torch.tanh(x) / 2)
    inverse = torch.compile(inv.invert(op), backend="eager", fullgraph=True)
    with pytest.raises(Unsupported):
        inverse(torch.randn(2, 3))


def test_probes_under_vmap_ask_for_their_randomness() -> None:
    rule = ops.power_series_log_det(terms=3)
    run = lambda x: rule(nn.Softsign(), x[None])[0]  # noqa: E731
    x = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(run)(x)
    assert torch.func.vmap(run, randomness="different")(x).shape == (4,)


def test_vmap_can_not_write_running_statistics() -> None:
    layer = inv.nn.BatchNorm1d(4)
    with pytest.raises(RuntimeError):
        torch.func.vmap(layer)(torch.randn(2, 5, 4))


def test_random_numbers_below_jacrev_are_refused_unless_they_are_stored() -> None:
    def jacobian(mode: str) -> Tensor:
        torch.manual_seed(0)
        op = inv.chain(inv.split(2), inv.mark(inv.couple(nn.Dropout(0.5)), mode), inv.concat(2))
        return torch.func.jacrev(inv.checkpoint(op))(torch.arange(8.0).reshape(1, 8))

    with pytest.raises(RuntimeError, match="random"):
        jacobian("invert")
    assert jacobian("store").shape == (1, 8, 1, 8)


def test_below_a_transform_a_function_that_takes_gradients_asks_torch_func() -> None:
    def by_autograd(x: Tensor) -> Tensor:
        z = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(z.sin().sum(), z, create_graph=True)[0]

    def gradient(f: Callable[[Tensor], Tensor]) -> Tensor:
        op = inv.checkpoint(inv.chain(inv.split(2), inv.couple(f), inv.concat(2)))
        return torch.func.grad(lambda x: op(x).sin().sum())(torch.arange(8.0).reshape(1, 8))

    with pytest.raises(RuntimeError, match="requires_grad_"):
        gradient(by_autograd)
    assert_close(gradient(torch.func.grad(lambda x: x.sin().sum())), gradient(torch.cos))


def test_nested_tensors_are_refused_below_transforms() -> None:
    op = inv.checkpoint(inv.ops.tanh())
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)
    with pytest.raises((InvertibleError, RuntimeError)):
        torch.func.vmap(op)(x)


@pytest.mark.compile
@pytest.mark.parametrize("draws", [False, True])
def test_compiled_stages_refuse_what_compiled_graphs_refuse(draws: bool) -> None:
    f = (lambda x: x * torch.rand_like(x)) if draws else (lambda x: x * WEIGHT)
    op = inv.compile_stages(inv.checkpoint(inv.chain(inv.split(2), inv.couple(f), inv.concat(2))), backend="aot_eager")
    with pytest.raises(Exception, match="random|requires grad|closes over"):
        op(leaf(3, 8)).sum().backward()


WEIGHT = torch.ones(4, requires_grad=True)


@pytest.mark.compile
def test_in_a_graph_an_op_is_inverted_by_name() -> None:
    op, y = inv.ops.tanh(), torch.rand(3) / 2
    with pytest.raises(Unsupported):
        torch.compile(lambda y: (~op)(y), backend="eager", fullgraph=True)(y)
    assert_close(torch.compile(lambda y: inv.invert(op)(y), backend="eager", fullgraph=True)(y), (~op)(y))


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_a_tall_map_has_the_log_volume_of_its_triangular_factor() -> None:
    weight, x = torch.randn(5, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    volume = torch.linalg.slogdet(weight.T @ weight)[1] / 2
    assert_close(torch.linalg.qr(weight).R.diagonal().abs().log().sum(), volume)
    with pytest.raises(NotDifferentiableError):
        inv.log_det(ops.tall_linear(weight), x)


def test_streams_are_entered_with_a_left_inverse_alone() -> None:
    enter = ops.enter_streams("midpoint")
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(enter.inverse(enter(x)), x)
    again = enter(enter.inverse((x, y)))
    assert not (torch.equal(again[0], x) and torch.equal(again[1], y))
    with pytest.raises(NotDifferentiableError):
        inv.log_det(enter, x)


def test_a_midpoint_step_is_of_second_order_and_unstable_where_solutions_decay() -> None:
    def run(f: Callable[[Tensor], Tensor], steps: int, span: float, start: Tensor) -> Tensor:
        h = span / steps
        first = start + h * f(start + h / 2 * f(start))
        return inv.chain(*[ops.midpoint(f, h)] * (steps - 1))(start, first)[1]

    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    exact = torch.linalg.matrix_exp(turn)
    errors = [float((run(lambda x: x @ turn, n, 1.0, start) - start @ exact).norm()) for n in (50, 100)]
    assert 3.8 < errors[0] / errors[1] < 4.2
    assert float(run(lambda x: x @ turn, 400, 40.0, start).norm()) < 1.1
    assert float(run(lambda x: -x, 400, 40.0, start).norm()) > 1e3


def test_noise_of_256_levels_stays_away_from_their_ends() -> None:
    op = ops.dequantize(256)
    residue = op.forward_with_residue(torch.zeros(200_000, dtype=torch.float32))[0] * 256
    assert residue.min() >= 6e-5 and residue.max() <= 1 - 6e-5


def test_channels_of_one_mask_are_a_split() -> None:
    f = nn.Linear(2, 2)
    mask = torch.tensor([True, True, False, False])
    masked = ops.masked_couple(lambda x: torch.cat([torch.zeros(1, 2), f(x[:, :2])], 1), mask)
    pieces = inv.chain(inv.split(2), inv.swap(), inv.couple(f), inv.swap(), inv.concat(2))
    x = torch.randn(1, 4)
    assert_close(masked(x), pieces(x))


def test_a_spline_coupling_with_other_options() -> None:
    net = nn.Linear(2, 2 * 23)
    given = inv.couple(ops.per_element(net, 23), law=partial(ops.rational_quadratic_spline, interval=(-2.0, 2.0)))
    x = torch.rand(4, 2), torch.rand(4, 2)
    assert_close(given.inverse(given(*x)), x, 1e-5)


def test_a_transform_says_under_debug_what_its_op_takes() -> None:
    transform = ops.as_transform(ops.log())
    assert (
        transform.domain.base_constraint is transform.codomain.base_constraint is torch.distributions.constraints.real
    )
    with inv.debug(), pytest.raises(DomainError):
        transform(torch.tensor([-1.0]))


# ---- models ----------------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.small = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(sizes[0]))
        self.large = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(sizes[1]))

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.small, *self.large):
            x = block(x)
        return x


def test_of_two_lists_of_blocks_the_larger_is_planned() -> None:
    assert "large" in str(inv.plan(Blocks(2, 5), torch.randn(4, 8), budget="20 MB"))
    assert "small" in str(inv.plan(Blocks(5, 2), torch.randn(4, 8), budget="20 MB"))


def test_a_model_that_looks_at_values_can_not_be_simulated() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = inv.nn.Coupling(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x[: int(x.sum().item())])

    with torch.device("meta"):
        model, x = Looks(), torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="meta"):
        simulate(model, x)


def test_a_replica_of_data_parallel_runs_the_block_that_it_was_copied_from() -> None:
    model = Blocks(1, 1)
    inv.nn.checkpoint_blocks(model, "large.*")
    replica = model.large[0]._replicate_for_data_parallel()
    replica._modules = {"0": nn.Linear(8, 8)}
    x = torch.randn(2, 8)
    assert torch.equal(replica(x), model.large[0](x))


# ---- many outputs ----------------------------------------------------------------------------------------------------


def test_of_an_inverted_pipeline_no_output_has_a_gradient_with_respect_to_another() -> None:
    op, x = inv.chain(inv.split(2), inv.couple(torch.sin), inv.couple(torch.cos, torch.sin)), leaf(3, 4)

    def of_another(op: Callable[..., Any]) -> Any:
        a, b = op(x)
        return torch.autograd.grad(b.sum(), a, allow_unused=True)[0]

    assert of_another(inv.checkpoint(op)) is None
    for mode in "recompute", "store":
        assert_close(of_another(inv.checkpoint(op, mode=mode)), of_another(op))
    assert_close(of_another(inv.checkpoint(lambda x: op(x))), of_another(op))


def test_a_hook_on_an_output_has_what_comes_to_that_output_alone() -> None:
    op, x = inv.chain(inv.split(2), inv.couple(torch.sin), inv.swap(), inv.couple(torch.tanh)), leaf(3, 4)

    def of_the_second(op: Callable[..., Any]) -> Any:
        a, b = op(x)
        b.retain_grad()
        (a.sum() + b.sum()).backward()
        return b.grad

    assert_close(of_the_second(inv.checkpoint(op)), torch.ones(3, 2))
    assert not torch.allclose(of_the_second(op), torch.ones(3, 2))
    for mode in "recompute", "store":
        assert_close(of_the_second(inv.checkpoint(op, mode=mode)), of_the_second(op))


def test_a_recomputed_function_that_writes_into_what_it_is_given_keeps_what_it_saves() -> None:
    def fn(x: Tensor, cache: list[Tensor]) -> Tensor:
        with torch.no_grad():
            cache[0].copy_(x)
        return x.sin().sin().sin().sin()

    kept = lambda fn: sum(item.bytes for item in inv.look.saved(fn, leaf(3, 4), [torch.zeros(3, 4)]))  # noqa: E731
    with pytest.warns(UserWarning, match="is kept until backward"):
        found = kept(inv.checkpoint(fn))
    assert found == kept(fn) > 0


def test_a_function_of_a_pipeline_that_writes_into_what_it_is_given_raises_with_gradients_on() -> None:
    def fn(x: Tensor, cache: list[Tensor]) -> Tensor:
        cache[0].add_(x.detach())
        return x * cache[0]

    op, cache = inv.chain(inv.split(2), inv.couple(fn), inv.concat(2)), [torch.zeros(3, 2)]
    for mode in "invert", "recompute":
        y = inv.checkpoint(op, mode=mode)(leaf(3, 4), context={"cache": cache})
        with pytest.raises(inv.errors.ReplayError, match="couple.*fn wrote in place into a tensor .* of its context"):
            y.sum().backward()
    x, plain = leaf(3, 4), [torch.zeros(3, 2)]
    cache[0].zero_()
    found = inv.checkpoint(op, mode="store")(x, context={"cache": cache})
    assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(op(x, context={"cache": plain}).sum(), x))
    with torch.no_grad():
        inv.checkpoint(op)(x, context={"cache": cache})
        op(x, context={"cache": plain})
    assert_close(cache, plain)


def test_the_numbers_of_a_tensor_in_an_object_that_a_module_holds_are_those_of_backward() -> None:
    class Net(nn.Module):
        def __init__(self, held: Any) -> None:
            super().__init__()
            self.held = held

        def forward(self, x: Tensor) -> Tensor:
            return x.sin() * self.held.scale

    x, held = torch.ones(2, requires_grad=True), SimpleNamespace(scale=torch.ones(2))
    y = inv.checkpoint(Net(held), drift="off")(x)
    held.scale.mul_(2)
    assert_close(torch.autograd.grad(y.sum(), x)[0], 2 * x.cos())


SCALE = 1.0


class Scaled(nn.Module):
    """A module that reads a global."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * SCALE).sin()


def scaled(x: Tensor) -> Tensor:
    return (x * scaled.by).sin()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("fn", "place", "name"), [(Scaled(), globals(), "SCALE"), (scaled, vars(scaled), "by")])
def test_a_global_of_a_module_and_an_attribute_of_a_function_are_those_of_backward(
    fn: Any, place: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(place, name, 1.0)
    x = torch.ones(2, requires_grad=True)
    y = inv.checkpoint(fn, drift="off")(x)
    place[name] = 2.0
    assert_close(torch.autograd.grad(y.sum(), x)[0], (2 * x).cos())


# ---- early stop ------------------------------------------------------------------------------------------------------


def test_a_function_that_ends_with_noise_of_its_own_runs_to_its_end_if_asked() -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), nn.RReLU()), torch.randn(5, 4)

    def gradients(call: Callable[[Tensor], Tensor]) -> Any:
        torch.manual_seed(1)
        return torch.autograd.grad(call(x).sum(), list(module.parameters()))

    assert_close(gradients(inv.checkpoint(module, early_stop=False)), gradients(module))


# ---- what is not put back for the call that runs again ---------------------------------------------------------------

FACTOR = 2.0


def of_closure() -> tuple[Callable[[Tensor], Tensor], Callable[[], Any]]:
    """A module whose class closes over a number."""
    factor = 2.0

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * factor)

    def change() -> None:
        nonlocal factor
        factor = 3.0

    return Reads(), change


def five() -> float:
    return FACTOR


def four() -> float:
    return five()


def three() -> float:
    return four()


def two() -> float:
    return three()


def one() -> float:
    return two()


def drawn_and_set_back() -> float:
    state = random.getstate()
    number = random.random()
    random.setstate(state)
    return number


def drawn_from_numpy() -> float:
    state = numpy.random.get_state()
    number = float(numpy.random.rand())
    numpy.random.set_state(state)
    return number


LOCAL, BYTES, ARRAY = threading.local(), bytearray(1), array("d", [0.0])


def times(read: Callable[[], float]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.tanh(x * read())


NOT_PUT_BACK: dict[str, Callable[[pytest.MonkeyPatch], tuple[Callable[[Tensor], Tensor], Callable[[], Any]]]] = {
    "a number that a module's class closes over": lambda patch: of_closure(),
    "a global number far down": lambda patch: (times(one), lambda: patch.setitem(globals(), "FACTOR", 3.0)),
    "threading.local": lambda patch: (times(lambda: LOCAL.factor), lambda: setattr(LOCAL, "factor", 3.0)),
    "os.environ": lambda patch: (
        times(lambda: float(os.environ["INVFUNC_FACTOR"])),
        lambda: patch.setenv("INVFUNC_FACTOR", "3"),
    ),
    "a state of Python's generator that it sets back": lambda patch: (times(drawn_and_set_back), random.random),
    "a state of NumPy's generator that it sets back": lambda patch: (times(drawn_from_numpy), numpy.random.rand),
    "a bytearray": lambda patch: (times(lambda: BYTES[0]), lambda: BYTES.__setitem__(0, 3)),
    "an array": lambda patch: (times(lambda: ARRAY[0]), lambda: ARRAY.__setitem__(0, 3.0)),
}


@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("name", NOT_PUT_BACK)
def test_what_is_not_put_back_is_told_by_the_meter(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(0)
    numpy.random.seed(0)
    LOCAL.factor = ARRAY[0] = 2.0
    BYTES[0] = 2
    monkeypatch.setenv("INVFUNC_FACTOR", "2")
    f, change = NOT_PUT_BACK[name](monkeypatch)
    op = inv.chain(inv.split(2), inv.couple(f), inv.swap(), inv.couple(f), inv.concat(2))
    y = inv.checkpoint(op, mode=mode)(torch.randn(3, 8, dtype=torch.float64, requires_grad=True))
    change()
    with pytest.warns(DriftWarning):
        y.sum().backward()


@pytest.mark.parametrize("make", [StringIO, lambda: iter([1]), lambda: open(__file__)])
def test_an_iterator_among_the_arguments_is_refused(make: Callable[[], Any]) -> None:
    item = make()
    with pytest.raises(ReplayError, match="arguments that can be read twice"):
        inv.checkpoint(lambda x, item: x.sin())(leaf(3), item)
    getattr(item, "close", lambda: None)()


def test_what_a_hook_changes_of_another_stage_during_backward_is_told_by_the_meter() -> None:
    first, second = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
    op = inv.chain(
        inv.split(2),
        inv.couple(lambda x: torch.tanh(first(x))),
        inv.swap(),
        inv.couple(lambda x: torch.tanh(second(x))),
        inv.concat(2),
    )
    y = inv.checkpoint(op)(torch.randn(3, 8, dtype=torch.float64, requires_grad=True))
    replaced = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    second.weight.register_post_accumulate_grad_hook(lambda p: setattr(first, "weight", replaced))
    with pytest.warns(DriftWarning):
        y.square().sum().backward()
