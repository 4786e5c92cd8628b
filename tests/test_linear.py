"""Linear maps and spectra against torch's own; that the laws hold of them is tested in test_laws."""

from functools import partial

import pytest
import torch
from catalogue import regular, rotation, weight
from kit import assert_close, assert_refused
from torch import Tensor, nn
from torch.nn import functional as F

import invfunc as inv
from invfunc import ops
from invfunc.errors import DomainError, NotDifferentiableError, OptionError, WireError

X = torch.linspace(-1, 2, 24, dtype=torch.float64).reshape(2, 3, 4).sin()


def matrix(op: inv.Invertible, size: int = 4) -> Tensor:
    """The matrix of a linear op: what it makes of each unit vector, as columns."""
    return op(torch.eye(size)).mT


# ---- what forward computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [ops.linear, ops.tall_linear, ops.orthogonal])
def test_forward_is_that_of_torch(op):
    w, b = regular(4, 4), weight(4)
    assert torch.equal(op(w, b)(X), F.linear(X, w, b))


def test_householder_is_the_product_of_its_reflections():
    v = weight(3, 4)
    reflections = [torch.eye(4) - 2 * torch.outer(a, a) / a.dot(a) for a in v]
    torch.testing.assert_close(ops.householder(v)(X), X @ reflections[0] @ reflections[1] @ reflections[2])


def test_householder_does_not_see_the_lengths_of_its_vectors():
    v = weight(3, 4)
    lengths = torch.tensor([[0.01], [1.0], [100.0]])
    torch.testing.assert_close(ops.householder(v * lengths)(X), ops.householder(v)(X))


def test_householder_may_have_more_vectors_than_dimensions():
    op = ops.householder(weight(7, 4))
    torch.testing.assert_close(op.inverse(op(X)), X)
    torch.testing.assert_close(matrix(op) @ matrix(~op), torch.eye(4))


def test_triangular_reads_one_triangle():
    w = regular(4, 4)
    torch.testing.assert_close(matrix(ops.triangular(w)), w.tril())
    torch.testing.assert_close(matrix(ops.triangular(w, upper=True)), w.triu())
    torch.testing.assert_close(matrix(ops.triangular(w, unit=True)), w.tril(-1) + torch.eye(4))
    torch.testing.assert_close(matrix(ops.triangular(w, upper=True, unit=True)), w.triu(1) + torch.eye(4))


def test_lu_undoes_the_factorisations_of_torch():
    w = torch.randn(4, 4)
    p, l, u = torch.linalg.lu(w)  # noqa: E741
    packed, pivots = torch.linalg.lu_factor(w)
    torch.testing.assert_close(matrix(ops.lu(l, u, p)), w)
    torch.testing.assert_close(matrix(ops.lu(packed, permutation=torch.lu_unpack(packed, pivots)[0])), w)
    torch.testing.assert_close(matrix(ops.lu(packed, permutation=p.argmax(1).tolist())), w)
    torch.testing.assert_close(ops.lu(l, u, p, torch.ones(4))(X), F.linear(X, w, torch.ones(4)))


def test_diagonal_is_a_diagonal_matrix():
    s, b = weight(4), weight(4)
    torch.testing.assert_close(ops.diagonal(s, b)(X), F.linear(X, torch.diag(s), b))


def test_tall_linear_is_undone_by_the_pseudo_inverse():
    w, b, y = torch.randn(7, 4), torch.randn(7), torch.randn(5, 7)
    torch.testing.assert_close(ops.tall_linear(w, b).inverse(y), (y - b) @ torch.linalg.pinv(w).mT)


def test_tall_linear_projects_to_its_range():
    op, y = ops.tall_linear(torch.randn(7, 4)), torch.randn(5, 7)
    projected = op(op.inverse(y))
    assert not torch.allclose(projected, y)
    torch.testing.assert_close(op(op.inverse(projected)), projected)


def test_a_tall_orthogonal_is_undone_by_its_transpose():
    op = ops.orthogonal(torch.linalg.qr(torch.randn(7, 4))[0])
    torch.testing.assert_close(op.inverse(op(X)), X)


def test_along_acts_on_the_channels():
    w, x = regular(4, 4), torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(ops.along(ops.linear(w))(x), torch.einsum("dc,nchw->ndhw", w, x))
    assert repr(~ops.along(ops.linear(w), dim=2)) == "invert(along(linear(weight), dim=2))"


# ---- training ----------------------------------------------------------------------------------------------------


def test_a_parametrized_weight_is_trained_through_its_parametrization():
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4).double())

    def gradients(lower):
        layer.zero_grad()
        op = lower(ops.orthogonal(layer.weight, layer.bias))
        (op(X) ** 3).sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    for found, expected in zip(gradients(inv.checkpoint), gradients(inv.chain().__rshift__), strict=True):
        torch.testing.assert_close(found, expected)


def test_backward_solves_once_and_does_not_run_forward_again(monkeypatch):
    products, solves = [], []
    linear, solve = F.linear, torch.linalg.solve
    monkeypatch.setattr(F, "linear", lambda *a: products.append(1) or linear(*a))
    monkeypatch.setattr(torch.linalg, "solve", lambda *a, **k: solves.append(1) or solve(*a, **k))
    y = inv.checkpoint(ops.linear(regular(4, 4), weight(4)))(X.clone().requires_grad_())
    assert (len(products), len(solves)) == (1, 0)
    y.sum().backward()
    assert (len(products), len(solves)) == (2, 1)  # the gradient of x, and x


def test_the_complex_log_determinant_is_that_of_the_real_map_of_twice_the_size():
    w = torch.complex(torch.randn(3, 3), torch.randn(3, 3))
    as_real = torch.cat([torch.cat([w.real, -w.imag], 1), torch.cat([w.imag, w.real], 1)])
    _, found = inv.log_det(ops.linear(w), torch.randn(2, 5, 3, dtype=torch.complex128))
    torch.testing.assert_close(found.real, (5 * torch.linalg.slogdet(as_real)[1]).expand(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [ops.linear, ops.tall_linear, ops.triangular, ops.lu, ops.householder, ops.conv1x1],
)
def test_half_precisions_are_solved_for(make, dtype):
    op, x = make(regular(4, 4).detach().to(dtype)), X[:, 0].to(dtype).clone().requires_grad_()
    y = inv.checkpoint(op)(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert_close(op.inverse(y), x, 20 * torch.finfo(dtype).eps, relative=0)


@pytest.mark.parametrize("make", [ops.linear, ops.triangular, ops.lu, ops.householder, ops.orthogonal, ops.conv1x1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_left_out(make, dtype):
    w, x = rotation(4).detach().float(), X[:, 0].to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = inv.checkpoint(make(w))(x.clone().requires_grad_())
        y.sum().backward()
        assert y.dtype == make(w).inverse(y).dtype == dtype
    assert_close(y, make(w)(x), 0)


@pytest.mark.parametrize("make", [ops.linear, ops.conv1x1, ops.diagonal, lambda w: ops.lu(w, bias=w[0])])
def test_the_output_has_the_dtype_of_the_input(make):
    w = torch.ones(4) if make is ops.diagonal else torch.eye(4)
    x = X[:, 0].bfloat16()
    assert make(w)(x).dtype == make(w).inverse(x).dtype == torch.bfloat16


ENSEMBLES = {
    "linear": (lambda w: ops.linear(w, w[0]), (4, 4), (3, 4)),
    "tall_linear": (ops.tall_linear, (6, 4), (3, 4)),
    "orthogonal": (lambda w: ops.orthogonal(torch.linalg.matrix_exp(w - w.mT)), (4, 4), (3, 4)),
    "householder": (ops.householder, (2, 4), (3, 4)),
    "lu": (lambda w: ops.lu(w, permutation=[1, 0, 3, 2], bias=w[0]), (4, 4), (3, 4)),
    "diagonal": (lambda w: ops.diagonal(w[0] + 5, w[1]), (2, 4), (3, 4)),
    "conv1x1": (ops.conv1x1, (4, 4), (2, 4, 3, 2)),
    "conv2d": (lambda w: ops.conv2d(w, stride=1, patchwise=False), (6, 1, 2, 2), (2, 1, 4, 3)),
    "conv2d, ceil_mode": (lambda w: ops.conv2d(w, ceil_mode=True), (6, 1, 2, 2), (2, 1, 3, 5)),
    "actnorm": (lambda w: ops.actnorm(w[0], w[1]), (2, 4), (2, 4, 3)),
    "batch_norm": (lambda w: ops.batch_norm(w[0], w[1], training=True), (2, 4), (5, 4, 3)),
}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_of_weights_is_a_loop_over_them(name):
    make, shape, of_x = ENSEMBLES[name]
    weights = torch.randn(3, *shape) + (3 * torch.eye(4) if shape == (4, 4) else 0)
    xs = torch.randn(3, *of_x)

    def loss(lower, w, x):
        return lower(make(w))(x).pow(3).sum()

    lowered = torch.func.grad(partial(loss, inv.checkpoint), argnums=(0, 1))
    plain = torch.func.grad(partial(loss, inv.chain), argnums=(0, 1))
    found = torch.func.vmap(lowered)(weights, xs)
    each = zip(*(plain(w, x) for w, x in zip(weights, xs, strict=True)), strict=True)
    for gradient, expected in zip(found, each, strict=True):
        torch.testing.assert_close(gradient, torch.stack(expected))


# ---- spectra -----------------------------------------------------------------------------------------------------


def test_fft_is_that_of_torch():
    z = torch.complex(torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    torch.testing.assert_close(ops.fft((1, 2))(z), torch.fft.fftn(z, dim=(1, 2), norm="ortho"))
    torch.testing.assert_close(ops.rfft((1, 2))(X), torch.fft.rfftn(X, dim=(1, 2), norm="ortho"))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13])
def test_dct_is_the_orthonormal_cosine_basis(n):
    k, j = torch.arange(n)[:, None], torch.arange(n)
    basis = torch.cos(torch.pi * k * (2 * j + 1) / (2 * n)) * (2 / n) ** 0.5
    basis[0] /= 2**0.5
    torch.testing.assert_close(basis @ basis.mT, torch.eye(n))
    torch.testing.assert_close(matrix(ops.dct(), n), basis)
    torch.testing.assert_close(matrix(~ops.dct(), n), basis.mT)


def test_dct_keeps_its_accuracy_at_large_sizes():
    x = torch.randn(3, 4097)
    assert_close(ops.dct().inverse(ops.dct()(x)), x, 1e-13, relative=0)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_rfft_keeps_whether_the_size_was_even(n):
    x = torch.randn(3, n)
    y, kept = ops.rfft().forward_with_residue(x)
    torch.testing.assert_close(ops.rfft().inverse_with_residue(kept, y), x)


# ---- errors ------------------------------------------------------------------------------------------------------

SINGULAR = torch.ones(2, 2)


@pytest.mark.parametrize("op", [ops.linear(SINGULAR), ops.conv1x1(SINGULAR)])
def test_a_singular_weight_has_an_error_of_ours(op):
    with pytest.raises(
        DomainError, match="the weight is singular, expected a weight of full rank; start from an orthog"
    ):
        op.inverse(torch.ones(1, 2))


@pytest.mark.parametrize(
    "op, subject",
    [
        (ops.linear(torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-15]])), "linear received values outside"),
        (ops.tall_linear(torch.ones(3, 2)), "tall_linear received .* expected a weight of full rank"),
        (ops.triangular(torch.tensor([[1.0, 0.0], [3.0, 0.0]])), "triangular received .* a diagonal without 0"),
        (ops.diagonal(torch.tensor([1.0, 0.0])), "diagonal received .* a scale that is nowhere 0"),
        (ops.orthogonal(torch.tensor([[1.0, 0.0], [0.0, 2.0]])), "orthogonal received .* expected Q with Q"),
        (ops.mix_channels(torch.tensor([[1.0, 0.0], [0.0, 2.0]])), "mix_channels received .* expected Q with Q"),
        (ops.householder(torch.tensor([[0.0, 0.0]])), "householder received .* vectors that are not zero"),
        (ops.linear(torch.full((2, 2), torch.nan)), "linear received .* expected a weight of finite numbers"),
    ],
)
def test_debug_finds_weights_without_an_inverse(op, subject):
    y = torch.ones(1, 3 if "tall" in repr(op) else 2, dtype=torch.float64)
    with inv.debug(True), pytest.raises(DomainError, match=subject):
        op.inverse(y)


@pytest.mark.parametrize(
    "op, message",
    [
        (ops.linear(SINGULAR), "linear received .* expected a weight of full rank"),
        (ops.conv1x1(SINGULAR), "conv1x1 received .* expected a weight of full rank"),
        (ops.triangular(torch.tensor([[1.0, 0.0], [3.0, 0.0]])), "triangular received .* a diagonal without 0"),
        (ops.lu(torch.tensor([[1.0, 0.0], [3.0, 0.0]])), "triangular received .* a diagonal without 0"),
        (ops.diagonal(torch.tensor([1.0, 0.0])), "diagonal received .* a scale that is nowhere 0"),
        (ops.orthogonal(SINGULAR), "orthogonal received .* expected Q with Q"),
        (ops.mix_channels(SINGULAR), "mix_channels received .* expected Q with Q"),
    ],
)
def test_debug_finds_weights_without_a_log_determinant(op, message):
    x = torch.ones(1, 2)
    inv.log_det(op, x)
    with inv.debug(True), pytest.raises(DomainError, match=message):
        inv.log_det(op, x)


@pytest.mark.parametrize("op", [ops.linear(SINGULAR + 0j), ops.diagonal(torch.zeros(2) + 0j)])
def test_debug_tells_the_magnitudes_of_complex_weights(op):
    with inv.debug(True), pytest.raises(DomainError, match=r"got magnitudes from [01] to [01]"):
        op.inverse(torch.ones(1, 2) + 0j)


def test_debug_passes_what_is_right():
    with inv.debug(True):
        for op in ops.linear(regular(4, 4)), ops.orthogonal(rotation(4)), ops.householder(weight(3, 4)):
            torch.testing.assert_close(op.inverse(op(X)), X)
            inv.log_det(op, X)
        torch.func.vmap(ops.linear(regular(4, 4)).inverse)(X)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ops.linear(weight(4, 3)),
            "linear: the weight, expected as many outputs as inputs, got (4, 3); tall_li",
        ),
        (lambda: ops.linear(weight(3, 4)), "linear: the weight, expected as many outputs as inputs, got (3, 4); fewer"),
        (lambda: ops.tall_linear(weight(3, 4)), "tall_linear: the weight, expected at least as many outputs as inputs"),
        (lambda: ops.linear(weight(4)), "linear: the weight, expected a matrix (out, in), got (4,)"),
        (lambda: ops.linear(None), "linear: the weight, expected a matrix (out, in), got NoneType"),
        (lambda: ops.linear(weight(4, 4), weight(3)), "linear: the bias, expected (4,), got (3,)"),
        (lambda: ops.householder(weight(4)), "householder: the vectors, expected a matrix (k, n) of them"),
        (
            lambda: ops.lu(weight(4, 4), permutation=[0, 0, 1, 2]),
            "permute_channels: order of 4, expected each of 0..C-1",
        ),
        (lambda: ops.diagonal(weight(4), weight(3)), "diagonal: scale and bias, expected vectors (n,) of one size"),
        (lambda: ops.dct(()), "dct: no dims, expected one or more"),
        (lambda: ops.fft(()), "fft: no dims, expected one or more"),
        (lambda: ops.rfft(()), "rfft: no dims, expected one or more"),
    ],
)
def test_constructors_say_what_they_take(make, message):
    assert_refused(OptionError, message, make)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: ops.linear(weight(4, 4))(torch.ones(2, 3)),
            "linear: the input, expected size 4 along dim -1, got (2, 3)",
        ),
        (lambda: ops.linear(weight(4, 4)).inverse(X[..., :3]), "the inverse of linear: the input, expected size 4"),
        (lambda: ops.linear(weight(4, 4) + 1j)(X), "a map with complex weights: the input, expected a complex tensor"),
        (lambda: ops.householder(weight(2, 4))(torch.ones(3)), "householder: the input, expected size 4 along dim -1"),
        (
            lambda: ops.diagonal(weight(4))(torch.ones(2, 1)),
            "diagonal: the input, expected size 4 along dim -1, got (2, 1)",
        ),
        (
            lambda: ops.fft()(X),
            "fft: the input, expected a complex tensor, got torch.float64; for real ones there is rfft",
        ),
        (
            lambda: ops.rfft()(X + 0j),
            "rfft: the input, expected a real tensor, got torch.complex128; fft takes complex",
        ),
        (lambda: ops.dct()(X + 0j), "dct: the input, expected a real tensor"),
        (lambda: ops.fft((1, -2))(X + 0j), "fft: dims [1, -2], expected each at most once, got (2, 3, 4)"),
        (lambda: ops.rfft(size=5)(X), "rfft: the input, expected size 5 along dim -1, got (2, 3, 4)"),
        (
            lambda: inv.log_det(ops.linear(weight(4, 4)), X[0, 0]),
            "the log-determinant: the input, expected a tensor of at least 2 dims",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(call, message):
    assert_refused(WireError, message, call, anywhere=True)


@pytest.mark.parametrize("op", [ops.tall_linear(weight(5, 4)), ops.orthogonal(torch.eye(5, 4)), ops.rfft(size=4)])
def test_maps_between_dimensions_have_no_log_determinant(op):
    with pytest.raises(NotDifferentiableError, match=repr(op).partition("(")[0]):
        inv.log_det(op, X[:, 0])
