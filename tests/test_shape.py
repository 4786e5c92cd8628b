"""Shapes against torch's own; that the laws hold of them is tested in test_laws."""

import numpy as np
import pytest
import torch
from kit import assert_refused
from torch.nn import functional as F

import invfunc as inv
from invfunc import ops
from invfunc.errors import NotDifferentiableError, NotInvertibleError, OptionError, WireError

X = torch.arange(2 * 3 * 4 * 6, dtype=torch.float64).reshape(2, 3, 4, 6)


def assert_maps(op: inv.Invertible, x: torch.Tensor, y: torch.Tensor) -> None:
    """``op(x) = y`` and back, without rounding."""
    found, kept = op.forward_with_residue(x)
    assert torch.equal(found, y)
    assert torch.equal(op.inverse_with_residue(kept, y), x)


# ---- order and sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op, expected",
    [
        (ops.permute([0, 2, 3, 1]), X.permute(0, 2, 3, 1)),
        (ops.permute([0, -1, 1, -2]), X.permute(0, 3, 1, 2)),
        (ops.transpose(1, -1), X.transpose(1, 3)),
        (ops.movedim(1, -1), X.movedim(1, -1)),
        (ops.flip([1, -1]), X.flip(1, 3)),
        (ops.roll([1, -2], [2, 3]), X.roll((1, -2), (2, 3))),
        (ops.permute_channels([2, 0, 1]), X[:, [2, 0, 1]]),
        (ops.permute_channels(torch.tensor([3, 0, 1, 2]), dim=-2), X[..., [3, 0, 1, 2], :]),
        (ops.reshape([4, 6], [3, 8]), X.reshape(2, 3, 3, 8)),
        (ops.reshape([3, 4, 6], [72]), X.reshape(2, 72)),
        (ops.flatten(), X.flatten(1)),
        (ops.flatten(0, 2), X.flatten(0, 2)),
        (ops.flatten(sizes=[3, 4, 6]), X.flatten(1)),
        (ops.flatten(-3, -2, [3, 4]), X.flatten(1, 2)),
        (ops.flatten(1, -2, [3, 4]), X.flatten(1, 2)),
        (ops.pad([1, 2]), F.pad(X, [1, 2])),
        (ops.pad([1, 2, 0, 3], value=7.0), F.pad(X, [1, 2, 0, 3], value=7.0)),
        (ops.pad([1, 2, 3, 1], mode="reflect"), F.pad(X, [1, 2, 3, 1], "reflect")),
        (ops.pad([1, 2, 1, 0], mode="circular"), F.pad(X, [1, 2, 1, 0], "circular")),
        (ops.pad_to_multiple(5), F.pad(X, [2, 2, 0, 1])),
        (ops.pad_to_multiple([5]), F.pad(X, [2, 2])),
        (ops.pad_to_multiple(5, sizes=[4, 6]), F.pad(X, [2, 2, 0, 1])),
        (ops.pad_to_multiple([3, 2], mode="replicate"), F.pad(X, [0, 0, 1, 1], "replicate")),
        (ops.pad_to_multiple(2), X),
    ],
    ids=repr,
)
def test_forward_is_that_of_torch_and_is_undone(op, expected):
    assert_maps(op, X, expected)


@pytest.mark.parametrize(
    "op, text",
    [
        (ops.permute([0, 2, 3, 1]), "permute([0, 3, 1, 2])"),
        (ops.transpose(1, 2), "transpose(1, 2)"),
        (ops.movedim(1, -1), "movedim(-1, 1)"),
        (ops.roll([1, 2], [0, 1]), "roll([-1, -2], [0, 1])"),
        (ops.reshape([4], [2, 2]), "reshape([2, 2], [4])"),
        (ops.flatten(sizes=[2, 3]), "invert(flatten(1, -1, [2, 3]))"),
        (ops.pixel_unshuffle([1, 2], channels_first=False), "pixel_shuffle([1, 2], channels_first=False)"),
        (ops.haar(), "invert(haar())"),
        (ops.checkerboard(), "invert(checkerboard(2))"),
        (ops.pad_to_multiple(2, mode="reflect", sizes=[3]), "invert(pad_to_multiple(2, mode='reflect'))"),
    ],
)
def test_an_inverse_is_shown_as_the_call_that_builds_it(op, text):
    assert repr(~op) == text
    assert repr(~~op) == repr(op)


@pytest.mark.parametrize("name, mode", [("reflect", "reflect"), ("replicate", "edge"), ("circular", "wrap")])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_padding_by_more_than_there_is_is_that_of_numpy(name, mode, size):
    x = X[0, 0, 0, :size]
    assert_maps(ops.pad([5, 7], mode=name), x, torch.from_numpy(np.pad(x.numpy(), (5, 7), mode)))


def test_integers_and_bools_are_moved_too():
    for x in X.long(), X > 5:
        for op in ops.flip(1), ops.pixel_unshuffle(2), ops.flatten(), ops.permute_channels([1, 0, 2]):
            y, kept = op.forward_with_residue(x)
            assert y.dtype == x.dtype and torch.equal(op.inverse_with_residue(kept, y), x)


# ---- space to depth ----------------------------------------------------------------------------------------------


def test_pixel_unshuffle_is_that_of_torch():
    assert_maps(ops.pixel_unshuffle(2), X, F.pixel_unshuffle(X, 2))
    assert_maps(ops.pixel_unshuffle([2, 2]), X[0], F.pixel_unshuffle(X[0], 2))
    assert_maps(ops.pixel_shuffle(2), F.pixel_unshuffle(X, 2), X)


@pytest.mark.parametrize("factor", [(2,), (1, 3), (2, 3), (2, 1, 3), (2, 3, 2)])
@pytest.mark.parametrize("channels_first", [True, False])
def test_pixel_unshuffle_in_each_dimension(factor, channels_first):
    """Element (c, r, s) of the output is element (c, s * factor + r) of the input."""
    x = torch.randn(2, 5, *(3 * by for by in factor))
    y = ops.pixel_unshuffle(factor, channels_first)(x)
    within = torch.cartesian_prod(*map(torch.arange, factor)).reshape(-1, len(factor))
    for i, offsets in enumerate(within.tolist()):
        block = x[(..., *(slice(offset, None, by) for offset, by in zip(offsets, factor, strict=True)))]
        assert torch.equal(y[:, i :: len(within)] if channels_first else y[:, 5 * i : 5 * (i + 1)], block)
    assert_maps(ops.pixel_unshuffle(factor, channels_first), x, y)


def haar_matrix(dims: int) -> torch.Tensor:
    h = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    out = torch.ones(1, 1)
    for _ in range(dims):
        out = torch.kron(out, h)
    return out


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("channels_first", [True, False])
def test_haar_is_the_kronecker_power_of_its_matrix(dims, channels_first):
    x = torch.randn(2, 3, *[4] * dims)
    blocks = ops.pixel_unshuffle(2)(x).unflatten(1, (3, 2**dims))
    expected = torch.einsum("bk,nck...->ncb...", haar_matrix(dims), blocks)
    expected = expected if channels_first else expected.transpose(1, 2)
    y = ops.haar(channels_first)(x)
    torch.testing.assert_close(y, expected.flatten(1, 2))
    torch.testing.assert_close(y.norm(), x.norm())


def test_haar_by_bands_puts_the_averages_first():
    average, _ = inv.chain(ops.haar(channels_first=False), inv.split([3, 9]))(X)
    torch.testing.assert_close(average / 2, F.avg_pool2d(X, 2))


def test_a_checkerboard_separates_neighbours():
    mask = ops.checkerboard_mask([4, 6])
    white, black = ops.checkerboard()(X)
    assert torch.equal(white.flatten(-2), X[..., mask]) and torch.equal(black.flatten(-2), X[..., ~mask])
    assert not (mask[1:] & mask[:-1]).any() and not (mask[:, 1:] & mask[:, :-1]).any()


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_a_checkerboard_may_have_any_number_of_dimensions(dims):
    op = ops.checkerboard(dims)
    mask = ops.checkerboard_mask(X.shape[-dims:]).expand(X.shape)
    white, black = op(X)
    assert torch.equal(white.flatten(), X[mask]) and torch.equal(black.flatten(), X[~mask])
    assert torch.equal(op.inverse((white, black)), X)


def test_a_coupling_of_squares():
    op = inv.chain(ops.checkerboard(), inv.couple(torch.tanh, torch.sin), ~ops.checkerboard())
    x = X.clone().requires_grad_()
    torch.testing.assert_close(op.inverse(op(x)), x)
    (found,) = torch.autograd.grad(inv.checkpoint(op)(x).pow(3).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(op(x).pow(3).sum(), x)[0])


# ---- lowered -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("make", [lambda m: ops.pad([1, 2], mode=m), lambda m: ops.pad_to_multiple([5], mode=m)])
def test_gradients_through_padding_are_those_of_torch(mode, make):
    x = X.clone().requires_grad_()
    weights = torch.randn(2, 3, 4, 12)

    def gradient(op):
        y = op(x)
        return torch.autograd.grad((y * weights[..., : y.shape[-1]]).sum(), x)[0]

    torch.testing.assert_close(gradient(inv.checkpoint(make(mode))), gradient(make(mode)))


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ops.permute([0, 2]), "permute: got [0, 2], expected each of 0..1 exactly once"),
        (lambda: ops.permute([0, -1, 2]), "permute: got [0, 2, 2], expected each of 0..2 exactly once"),
        (lambda: ops.roll([1, 2], 0), "roll: [1, 2] along dims 0, expected one shift for each dim"),
        (lambda: ops.permute_channels([0, 2]), "permute_channels: order of 2, expected each of 0..C-1 exactly once"),
        (lambda: ops.permute_channels(torch.ones(2)), "permute_channels: order of 2, expected each of 0..C-1"),
        (lambda: ops.reshape([2, 3], [5]), "reshape: [2, 3] to [5], expected as many elements"),
        (lambda: ops.pixel_unshuffle(0), "pixel_unshuffle: factor is 0, expected positive numbers"),
        (lambda: ops.pixel_unshuffle([2, -1]), "pixel_unshuffle: factor is [2, -1], expected positive numbers"),
        (lambda: ops.checkerboard(0), "checkerboard: dims is 0, expected a positive number"),
        (lambda: ops.pad([1]), "pad: amounts are [1], expected pairs of numbers that are not negative; a negative one"),
        (lambda: ops.pad([1, -1]), "pad: amounts are [1, -1], expected pairs of numbers that are not negative"),
        (
            lambda: ops.pad([1, 1], mode="mirror"),
            "pad: mode is 'mirror', expected constant, reflect, replicate or circ",
        ),
        (lambda: ops.pad_to_multiple(0), "pad_to_multiple: got 0, expected positive numbers"),
        (lambda: ops.pad_to_multiple(2, mode="mirror"), "pad_to_multiple: mode is 'mirror', expected constant, reflec"),
    ],
)
def test_constructors_say_what_they_take(make, message):
    assert_refused(OptionError, message, make)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.permute([1, 0])(X), "permute([1, 0]): the input, expected a tensor of 2 dims, got (2, 3, 4, 6)"),
        (lambda: ops.transpose(1, 4)(X), "transpose(1, 4): the input, expected a tensor of at least 5 dims"),
        (lambda: ops.movedim(-5, 0)(X), "movedim(-5, 0): the input, expected a tensor of at least 5 dims"),
        (lambda: ops.flip(4)(X), "flip([4]): the input, expected a tensor of at least 5 dims"),
        (
            lambda: ops.flip(4)((X, X)),
            "flip([4]): the input, expected a tensor of at least 5 dims, got ((2, 3, 4, 6), (",
        ),
        (lambda: ops.flip([1, -3])(X), "flip([1, -3]): dims [1, -3], expected each at most once, got (2, 3, 4, 6)"),
        (lambda: ops.roll(1, 4)(X), "roll([1], [4]): the input, expected a tensor of at least 5 dims"),
        (lambda: ops.permute_channels([1, 0])(X), "permute_channels: the input, expected size 2 along dim 1"),
        (lambda: ops.reshape([5], [5])(X), "reshape([5], [5]): the input, expected (..., *[5]), got (2, 3, 4, 6)"),
        (lambda: ops.flatten(2, 1)(X), "flatten(2, 1): the input, expected the start before the end"),
        (lambda: ops.flatten(sizes=[3, 5])(X), "flatten(1, -1): the input, expected sizes [3, 5] in these dims"),
        (
            lambda: ops.flatten(sizes=[3, 5]).inverse(X),
            "the inverse of flatten: the input, expected size 15 along dim 1",
        ),
        (
            lambda: ops.pixel_unshuffle(4)(X),
            "pixel_unshuffle(4): the input, expected sizes that [4, 4] divide after di",
        ),
        (lambda: ops.pixel_unshuffle(4)(X), "put pad_to_multiple(4) before it"),
        (
            lambda: ops.pixel_unshuffle(2)(X[0, 0]),
            "pixel_unshuffle(2): the input, expected a tensor of at least 3 dims",
        ),
        (lambda: ops.pixel_shuffle(2)(X), "pixel_shuffle(2): the input, expected channels that 4 divides along dim 1"),
        (lambda: ops.haar()(X[..., :5]), "put pad_to_multiple(2) before it"),
        (lambda: (~ops.haar())(X), "the inverse of haar: the input, expected channels that 4 divides along dim 1"),
        (lambda: ops.checkerboard()(X[..., :5]), "checkerboard(2): the input, expected an even size along dim -1"),
        (
            lambda: ops.checkerboard().inverse(X),
            "the inverse of checkerboard(2): the input, expected two tensors of one",
        ),
        (
            lambda: ops.checkerboard().inverse((X, X[..., :1])),
            "the inverse of checkerboard(2): the input, expected two",
        ),
        (lambda: ops.pad([1, 1, 1, 1])(X[0, 0, 0]), "pad: the input, expected a tensor of at least 2 dims, got (6,)"),
        (lambda: ops.pad([4, 4]).inverse(X), "the inverse of pad: the input, expected 4 + 4 or more along dim -1"),
        (lambda: ops.pad_to_multiple([2] * 5)(X), "pad_to_multiple: the input, expected a tensor of at least 5 dims"),
    ],
)
def test_inputs_that_do_not_fit_are_named(call, message):
    assert_refused(WireError, message, call, anywhere=True)


@pytest.mark.parametrize("op", [ops.flatten(), ops.pad_to_multiple(5)])
def test_an_inverse_without_what_was_kept_says_so(op):
    with pytest.raises(NotInvertibleError, match="needs its residue"):
        op.inverse(op(X))


@pytest.mark.parametrize("op", [ops.pad([1, 1]), ops.pad_to_multiple(5)])
def test_padding_has_no_log_determinant(op):
    with pytest.raises(NotDifferentiableError, match="pad"):
        inv.log_det(op, X)
