"""Normalisation against torch's own; that the laws hold of it is tested in test_laws."""

import copy

import pytest
import torch
from catalogue import weight
from kit import assert_close, assert_refused
from torch import Tensor, nn
from torch.nn import functional as F

import invfunc as inv
from invfunc import ops
from invfunc.errors import DomainError, NotInvertibleError, OptionError, ReplayError, WireError
from invfunc.look import memory

SHAPES = [(5, 4), (3, 4, 5), (2, 4, 3, 2), (2, 4, 2, 3, 2)]


def normaliser(dims: int, **options) -> nn.Module:
    """A module of torch with weights and statistics that are not those of a new one."""
    bn = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 2](4, **options).double()
    with torch.no_grad():
        for tensor in (*bn.parameters(), bn.running_mean, bn.running_var):
            if tensor is not None:
                tensor.copy_(torch.rand(4) + 0.5)
    return bn


def as_op(bn: nn.Module) -> inv.Invertible:
    """The same as an op, on the module's own tensors."""
    options = {"training": bn.training, "momentum": bn.momentum, "eps": bn.eps}
    return ops.batch_norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, **options)


def step(fn, bn: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of a training step."""
    x = x.clone().requires_grad_()
    y = fn(x)
    return y, *torch.autograd.grad((y.sin() * y).sum(), [x, *bn.parameters()])


def statistics(bn: nn.Module) -> list[Tensor]:
    return [bn.running_mean, bn.running_var]


# ---- batch norm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "lower",
    [lambda op: op, inv.checkpoint, lambda op: inv.mark(op, "recompute")],
    ids=["plain", "lowered", "recomputed"],
)
def test_a_step_is_that_of_torch(shape, affine, training, lower):
    """Output, gradients through the statistics, and the statistics themselves, which move once."""
    bn = normaliser(len(shape), affine=affine).train(training)
    theirs = copy.deepcopy(bn)
    x = 2 * torch.randn(shape) + 3
    for found, expected in zip(step(lower(as_op(bn)), bn, x), step(theirs, theirs, x), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(statistics(bn), statistics(theirs), strict=True):
        assert torch.equal(found, expected)


def through_log_det(op: inv.Invertible):
    counting = inv.checkpoint(inv.with_log_det(op))
    return lambda x: counting(x, torch.zeros(len(x)))[0]


@pytest.mark.parametrize("steps", [1, 3])
def test_statistics_move_once_a_step_with_log_determinants(steps):
    bn = normaliser(4)
    theirs = copy.deepcopy(bn)
    fn = through_log_det(as_op(bn))
    for _ in range(steps):
        x = torch.randn(2, 4, 3, 2)
        for found, expected in zip(step(fn, bn, x), step(theirs, theirs, x), strict=True):
            torch.testing.assert_close(found, expected)
    for found, expected in zip(statistics(bn), statistics(theirs), strict=True):
        assert torch.equal(found, expected)


def test_statistics_move_once_where_backward_runs_twice_or_never():
    bn, x = normaliser(2), torch.randn(5, 4).requires_grad_()
    once = copy.deepcopy(bn)
    once(x)
    y = inv.checkpoint(as_op(bn))(x)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    for found, expected in zip(statistics(bn), statistics(once), strict=True):
        assert torch.equal(found, expected)


def test_how_often_a_step_normalises(monkeypatch):
    """As often as any pair, and below a transform once: there the kernel of its own gradient takes what is kept."""
    calls = []
    kernel = torch.native_batch_norm
    monkeypatch.setattr(torch, "native_batch_norm", lambda *a: calls.append(1) or kernel(*a))
    op = inv.checkpoint(as_op(normaliser(2)))
    op(torch.randn(5, 4).requires_grad_()).sum().backward()
    assert len(calls) == 2
    torch.func.grad(lambda x: op(x).sum())(torch.randn(5, 4))
    assert len(calls) == 3


@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)])
def test_weight_and_bias_are_optional(given):
    w, b = (weight(4) + 1 if is_given else None for is_given in given)
    x = torch.randn(5, 4).requires_grad_()
    for op in ops.batch_norm(w, b, training=True), ops.batch_norm(w, b, torch.ones(4), torch.ones(4)):
        y, kept = op.forward_with_residue(x)
        torch.testing.assert_close(op.inverse_with_residue(kept, y), x)
        lowered = torch.autograd.grad(inv.checkpoint(op)(x).pow(3).sum(), x)
        torch.testing.assert_close(lowered, torch.autograd.grad(op(x).pow(3).sum(), x))


def test_without_running_statistics_it_always_uses_the_batch():
    x = torch.randn(5, 4)
    torch.testing.assert_close(ops.batch_norm(training=False)(x), F.batch_norm(x, None, None, training=True))
    bn = normaliser(2, track_running_stats=False).eval()
    torch.testing.assert_close(as_op(bn)(x), bn(x))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_statistics_move_by_the_momentum(momentum):
    bn = normaliser(2, momentum=momentum)
    theirs = copy.deepcopy(bn)
    x = torch.randn(5, 4).requires_grad_()
    inv.checkpoint(as_op(bn))(x).sum().backward()
    theirs(x)
    assert torch.equal(bn.running_mean, theirs.running_mean) and torch.equal(bn.running_var, theirs.running_var)


def test_statistics_that_changed_before_backward_raise():
    bn = normaliser(2).eval()
    y = inv.checkpoint(inv.chain(as_op(bn), torch.sin))(torch.randn(5, 4).requires_grad_())
    bn.running_var.add_(1)
    with pytest.raises(ReplayError, match="changed between forward and backward"):
        y.sum().backward()


def test_two_numbers_a_channel_are_kept():
    op = ops.batch_norm(weight(4), weight(4), training=True)
    x = torch.randn(64, 4, 8, 8).requires_grad_()
    y, (mean, inverse_deviation) = op.forward_with_residue(x)
    assert mean.shape == inverse_deviation.shape == (4,)
    net = inv.checkpoint(inv.chain(*(ops.batch_norm(weight(4), weight(4), training=True) for _ in range(8))))
    net(x).sum().backward()
    held = memory.measure(lambda: net(x))
    assert held.held_bytes < 1.1 * x.numel() * x.element_size()


def test_training_under_transforms():
    """Statistics are written under ``func.grad``, where torch's module raises because it counts batches."""
    bn, x = normaliser(2), torch.randn(5, 4)
    theirs = copy.deepcopy(bn)
    found = torch.func.grad(lambda x: (inv.checkpoint(as_op(bn))(x) ** 3).sum())(x)
    given = theirs.running_mean, theirs.running_var, theirs.weight, theirs.bias, True
    torch.testing.assert_close(found, torch.func.grad(lambda x: (F.batch_norm(x, *given) ** 3).sum())(x))
    assert torch.equal(bn.running_mean, theirs.running_mean) and torch.equal(bn.running_var, theirs.running_var)
    op = ops.batch_norm(bn.weight, bn.bias, training=True)
    xs = torch.randn(3, 5, 4)
    found = torch.func.vmap(torch.func.grad(lambda x: (inv.checkpoint(op)(x) ** 3).sum()))(xs)
    torch.testing.assert_close(found, torch.stack([torch.func.grad(lambda x: (op(x) ** 3).sum())(x) for x in xs]))


def test_the_residue_carries_its_gradient():
    """Forward and inverse together are the identity, and so is their derivative."""
    op, x, gx = (
        ops.batch_norm(weight(4), weight(4), training=True),
        torch.randn(5, 4).requires_grad_(),
        torch.randn(5, 4),
    )
    y, kept = op.forward_with_residue(x)
    torch.testing.assert_close(torch.autograd.grad(op.inverse_with_residue(kept, y), x, gx)[0], gx)


def test_recomputed_the_gradient_of_a_gradient_is_that_of_plain():
    op, x = ops.batch_norm(weight(4), weight(4), training=True), torch.randn(5, 4).requires_grad_()

    def second(fn):
        (gx,) = torch.autograd.grad((fn(x) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad((gx**2).sum(), x)[0]

    torch.testing.assert_close(second(inv.checkpoint(inv.mark(op, "recompute"))), second(op))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_log_determinant_in_training_holds_the_statistics_fixed(shape):
    bn, x = normaliser(len(shape)), torch.randn(shape)
    _, found = inv.log_det(as_op(bn), x)
    fixed = copy.deepcopy(bn).eval()
    dims = [d for d in range(len(shape)) if d != 1]
    fixed.running_mean, fixed.running_var = x.mean(dims), x.var(dims, correction=0)
    torch.testing.assert_close(found, inv.log_det(as_op(fixed), x)[1])


# ---- actnorm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_actnorm_is_initialised_to_mean_0_and_variance_1(shape):
    x = 5 * torch.randn(shape) + 7
    y = ops.actnorm(*ops.actnorm_init(x))(x)
    dims = [d for d in range(len(shape)) if d != 1]
    torch.testing.assert_close(y.mean(dims), torch.zeros(4))
    assert_close(y.var(dims, correction=0), torch.ones(4), 1e-4, relative=0)


def test_actnorm_along_another_dimension():
    x = torch.randn(2, 3, 4)
    s, b = ops.actnorm_init(x, dim=-1)
    torch.testing.assert_close(ops.actnorm(s, b, dim=-1)(x), x * s.exp() + b)


def test_actnorm_survives_channels_that_are_constant():
    x = torch.ones(5, 4)
    y = ops.actnorm(*ops.actnorm_init(x))(x)
    assert y.isfinite().all()


def test_actnorm_init_carries_no_gradient():
    s, b = ops.actnorm_init(torch.randn(5, 4).requires_grad_())
    assert not (s.requires_grad or b.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precisions(dtype, training):
    vectors = [torch.rand(4).add(0.5).to(dtype) for _ in range(4)]
    x = torch.randn(8, 4).to(dtype)
    for op in ops.batch_norm(*vectors, training=training), ops.actnorm(*vectors[:2]):
        y, kept = op.forward_with_residue(x)
        back = op.inverse_with_residue(kept, y)
        assert y.dtype == back.dtype == dtype
        assert_close(back, x, 20 * torch.finfo(dtype).eps, relative=0)


@pytest.mark.parametrize("training", [True, False])
def test_weights_in_float32_and_activations_in_half(training):
    vectors = [torch.rand(4).add(0.5).float().requires_grad_(i < 2) for i in range(4)]
    x = torch.randn(8, 4).bfloat16()
    for make in lambda: ops.batch_norm(*vectors, training=training), lambda: ops.actnorm(*vectors[:2]):
        given = x.clone().requires_grad_()
        y = inv.checkpoint(make())(given)
        gradients = torch.autograd.grad(y.float().pow(2).sum(), [given, *vectors[:2]])
        assert y.dtype == torch.bfloat16
        assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ops.actnorm(weight(4), weight(3)),
            "actnorm: log_scale (4,), bias (3,), expected vectors (C,) of one s",
        ),
        (lambda: ops.actnorm(weight(4, 1), weight(4, 1)), "actnorm: log_scale (4, 1), bias (4, 1), expected vectors"),
        (
            lambda: ops.batch_norm(weight(4), weight(3)),
            "batch_norm: weight (4,), bias (3,), expected vectors (C,) of o",
        ),
        (
            lambda: ops.batch_norm(running_mean=torch.ones(4)),
            "batch_norm: one of the running statistics, expected both",
        ),
    ],
)
def test_constructors_say_what_they_take(make, message):
    assert_refused(OptionError, message, make)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: ops.actnorm(weight(4), weight(4))(torch.ones(2, 3)),
            "actnorm: the input, expected size 4 along dim 1",
        ),
        (
            lambda: ops.batch_norm(weight(4))(torch.ones(2, 3)),
            "batch_norm: the input, expected size 4 along dim 1, got",
        ),
        (
            lambda: ops.batch_norm()(torch.ones(3)),
            "batch_norm: the input, expected a tensor of at least 2 dims, got (3,)",
        ),
        (
            lambda: ops.batch_norm()(torch.ones(1, 3)),
            "batch_norm: the input, expected two values or more in each chann",
        ),
        (lambda: ops.actnorm_init(torch.ones(3)), "actnorm_init: the input, expected a tensor of at least 2 dims"),
        (lambda: ops.actnorm_init(torch.ones(3, 2), dim=2), "actnorm_init: the input, expected a tensor of at least 3"),
        (
            lambda: ops.actnorm_init(torch.ones(0, 2)),
            "actnorm_init: the batch, expected a value or more in each channe",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(call, message):
    assert_refused(WireError, message, call, anywhere=True)


def test_an_op_that_trains_needs_its_residue():
    with pytest.raises(NotInvertibleError, match="batch_norm.*needs its residue"):
        ops.batch_norm(training=True).inverse(torch.randn(5, 4))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda op, x: op.inverse(x),
            "batch_norm received .* expected a weight that is nowhere 0, got values from 0 to 0; clamp its magnitude",
        ),
        (lambda op, x: inv.log_det(op, x), "batch_norm received .* expected a weight that is nowhere 0"),
        (
            lambda op, x: ops.batch_norm(running_mean=torch.zeros(4), running_var=-torch.ones(4))(x),
            "batch_norm received .* expected a running_var that is nowhere negative",
        ),
        (lambda op, x: ops.actnorm_init(x / 0), "actnorm_init received .* expected finite numbers"),
    ],
)
def test_debug_finds_what_can_not_be_undone(call, message):
    op, x = ops.batch_norm(torch.zeros(4), None, torch.zeros(4), torch.ones(4)), torch.randn(5, 4)
    call(op, x)
    with inv.debug(True), pytest.raises(DomainError, match=message):
        call(op, x)
