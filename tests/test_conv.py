"""Convolutions against torch's own; that the laws hold of them is tested in test_laws."""

import pytest
import torch
from catalogue import kernel, overlapping, regular, rotation, weight
from kit import assert_refused
from torch.nn import functional as F

import invfunc as inv
from invfunc import ops
from invfunc.errors import DomainError, NotDifferentiableError, NotInvertibleError, OptionError, WireError

CONVS = {1: (ops.conv1d, F.conv1d), 2: (ops.conv2d, F.conv2d), 3: (ops.conv3d, F.conv3d)}


# ---- what forward computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(), (5,), (3, 2), (2, 3, 4)])
def test_conv1x1_is_a_linear_map_of_the_channels(sizes):
    w, b, x = regular(4, 4), weight(4), torch.randn(2, 4, *sizes)
    expected = F.linear(x.movedim(1, -1), w, b).movedim(-1, 1)
    torch.testing.assert_close(ops.conv1x1(w, b)(x), expected)
    torch.testing.assert_close(ops.conv1x1(w[..., None, None], b)(x), expected)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_forward_is_that_of_torch_and_is_undone(dims, groups, padding, stride):
    ours, theirs = CONVS[dims]
    w, b = torch.randn(groups * 2 ** (dims + 1), 1, *[2] * dims), torch.randn(groups * 2 ** (dims + 1))
    x = torch.randn(3, groups, *[4] * dims)
    op = ours(w, b, stride=stride, padding=padding, groups=groups, patchwise=stride == 2)
    torch.testing.assert_close(op(x), theirs(x, w, b, stride=stride, padding=padding, groups=groups))
    torch.testing.assert_close(op.inverse(op(x)), x)


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("kernel_size, stride", [(2, 2), (3, 3), (3, 2), (4, 3), (3, 1)])
@pytest.mark.parametrize("padding", [0, 1])
def test_ceil_mode_takes_every_size_and_gives_it_back(size, kernel_size, stride, padding):
    x, w = torch.randn(2, 1, size), torch.randn(5, 1, kernel_size)
    options = {"stride": stride, "padding": padding, "patchwise": stride == kernel_size}
    op = ops.conv1d(w, ceil_mode=True, **options)
    y, kept = op.forward_with_residue(x)
    torch.testing.assert_close(op.inverse_with_residue(kept, y), x)
    if size + 2 * padding >= kernel_size and not (size + 2 * padding - kernel_size) % stride:
        torch.testing.assert_close(y, ops.conv1d(w, **options)(x))


def test_an_overlap_is_the_mean_of_what_its_patches_say():
    w, y = torch.randn(2, 1, 2), torch.randn(1, 2, 2)
    patches = torch.linalg.solve(w[:, 0], y[0])  # two of them, which share the middle element
    (a, b), (c, d) = patches[:, 0], patches[:, 1]
    expected = torch.stack([a, (b + c) / 2, d])
    torch.testing.assert_close(ops.conv1d(w, stride=1, patchwise=False).inverse(y)[0, 0], expected)


def test_the_inverse_is_nearest_to_what_was_not_in_the_range():
    op, y = ops.conv2d(torch.randn(6, 1, 2, 2)), torch.randn(2, 6, 3, 3)
    projected = op(op.inverse(y))
    torch.testing.assert_close(op(op.inverse(projected)), projected)
    assert (y - projected).norm() < y.norm()


# ---- training ----------------------------------------------------------------------------------------------------


def conv_step(w, b, lower):
    op = lower(inv.chain(ops.mix_channels(rotation(4).detach()), ops.conv2d(w, b, ceil_mode=True)))
    x = torch.linspace(-1, 1, 2 * 4 * 3 * 5).reshape(2, 4, 3, 5).requires_grad_()
    return torch.autograd.grad((op(x) ** 3).sum(), [x, w, b])


def test_lowered_gradients_through_padding_are_those_of_plain():
    w, b = kernel(16, 4, 2, 2), weight(16)
    torch.manual_seed(1)
    plain = conv_step(w, b, lambda op: op)
    torch.manual_seed(1)
    for found, expected in zip(conv_step(w, b, inv.checkpoint), plain, strict=True):
        torch.testing.assert_close(found, expected)


# ---- log-determinants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [overlapping(), ops.conv2d(kernel(5, 1, 2, 2)), ops.conv2d(kernel(4, 1, 2, 2), padding=2)],
    ids=["overlap", "tall", "padding"],
)
def test_convolutions_that_are_not_bijections_have_no_log_determinant(op):
    with pytest.raises(NotDifferentiableError, match="conv2d"):
        inv.log_det(op, torch.randn(1, 1, 4, 5))


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ops.conv2d(weight(3, 1, 2, 2)),
            "conv2d: the weight (3, 1, 2, 2) makes 3 outputs in each group, expec",
        ),
        (lambda: ops.conv2d(weight(8, 1, 2)), "conv2d: the weight, expected (out, in / groups, k, k), got (8, 1, 2)"),
        (lambda: ops.conv1d(weight(8, 1, 2), groups=3), "conv1d: the weight, expected (out, in / groups, k), got"),
        (
            lambda: ops.conv1d(weight(8, 1, 2), stride=3),
            "conv1d: stride [3] over a kernel of [2], expected a stride tha",
        ),
        (
            lambda: ops.conv1d(weight(8, 1, 2), stride=1),
            "conv1d: stride [1] over a kernel of [2], expected patches that",
        ),
        (lambda: ops.conv2d(weight(8, 1, 2, 2), stride=(2,)), "conv2d: stride is (2,), expected a number"),
        (lambda: ops.conv2d(weight(8, 1, 2, 2), padding=-1), "conv2d: padding is -1, expected a number"),
        (lambda: ops.conv2d(weight(8, 1, 2, 2), stride=0), "conv2d: stride is 0, expected a number"),
        (lambda: ops.conv2d(weight(8, 1, 2, 2), weight(3)), "conv2d: the bias, expected (8,), got (3,)"),
        (lambda: ops.conv1x1(weight(4, 3)), "conv1x1: the weight, expected as many outputs as inputs, got (4, 3)"),
        (lambda: ops.conv1x1(weight(4, 4, 2, 2)), "conv1x1: the weight, expected a matrix (out, in), got (4, 4, 2, 2)"),
        (lambda: ops.conv1x1(weight(4)), "conv1x1: the weight, expected a matrix (out, in), got (4,)"),
        (lambda: ops.conv1x1(weight(4, 4), weight(3)), "conv1x1: the bias, expected (4,), got (3,)"),
    ],
)
def test_constructors_say_what_they_take(make, message):
    assert_refused(OptionError, message, make)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda op: op(torch.ones(1, 1, 3, 4)), "conv2d: the input, expected sizes that patches of [2, 2] with stride"),
        (lambda op: op(torch.ones(1, 1, 3, 4)), "pass ceil_mode=True: it pads, and the inverse crops"),
        (lambda op: op(torch.ones(1, 2, 4, 4)), "conv2d: the input, expected size 1 along dim 1, got (1, 2, 4, 4)"),
        (lambda op: op(torch.ones(1, 4, 4)), "conv2d: the input, expected a tensor of 4 dims, got (1, 4, 4)"),
        (
            lambda op: op.inverse(torch.ones(1, 3, 4, 4)),
            "the inverse of conv2d: the input, expected size 4 along dim 1",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(call, message):
    assert_refused(WireError, message, lambda: call(ops.conv2d(kernel(4, 1, 2, 2))), anywhere=True)


def test_ceil_mode_needs_what_it_padded():
    with pytest.raises(NotInvertibleError, match="needs its residue"):
        ops.conv1d(kernel(2, 1, 2), ceil_mode=True).inverse(torch.ones(1, 2, 3))


def test_a_singular_square_kernel_has_an_error_of_ours():
    with pytest.raises(DomainError, match="conv1d: the weight is singular"):
        ops.conv1d(torch.ones(2, 1, 2)).inverse(torch.ones(1, 2, 3))


def test_debug_finds_a_kernel_without_full_rank():
    with (
        inv.debug(True),
        pytest.raises(DomainError, match="conv1d received values outside of its domain, expected a weig"),
    ):
        ops.conv1d(torch.ones(3, 1, 2)).inverse(torch.ones(1, 3, 3))
