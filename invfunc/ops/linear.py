"""Linear maps of the last dimension: square, orthogonal, Householder, triangular, LU, diagonal, tall.

A map is a matrix made of the weight, a way to solve with it, and the part of the matrix's gradient that is the
weight's; `_linear_op` makes an op of the three. `along` lets an op act on another dimension than the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.couple import match
from ..core.op import Invertible, chain, named, pair
from ..core.precision import at_least, exactly, real_dtype
from ..debug import require
from ..errors import DomainError, OptionError
from ..log_det import log_abs_det
from ..wires import describe
from .embedding import embedding
from .shape import check_nonzero, check_size, no_log_det, per_position, permute_channels

# ---- y = x A^T + b, for any matrix A that is made of a weight ----------------------------------------------------


def _multiply(make: Callable[[Tensor], Tensor], label: str, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    check_size(label, x, -1, weight.shape[1])
    return exactly(partial(_product, make), x, weight, bias, least=None)


def _product(make: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, make(weight), bias)


def _solve(solver: Callable[..., Tensor], label: str, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    check_size(f"the inverse of {label}", y, -1, weight.shape[0])
    return exactly(partial(_solved, solver, label), y, weight, bias)


def _solved(solver: Callable[..., Tensor], label: str, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return solver(label, weight, y if bias is None else y - bias)


def _pull(
    make: Callable[[Tensor], Tensor],
    part: Callable[[Tensor], Tensor],
    solver: Callable[..., Tensor],
    label: str,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    gy: Tensor,
) -> Any:
    """Solve, and multiply twice; forward's own product is not needed again."""
    x = _solve(solver, label, weight, bias, y)
    gx = exactly(partial(_product, partial(_adjoint, make)), gy, weight, None, least=None)
    closed = [(weight, match(part(exactly(_outer, widened(gy, weight), x, least=None)), weight))]
    return x, gx, closed if bias is None else [*closed, (bias, match(gy, bias))]


def _adjoint(make: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    return make(weight).mH


def _outer(gy: Tensor, x: Tensor) -> Tensor:
    """The sum of ``gy^T x`` over all positions: the gradient of a matrix."""
    return gy.reshape(-1, gy.shape[-1]).mT @ x.reshape(-1, x.shape[-1]).conj()


def widened(gradient: Tensor, weight: Tensor) -> Tensor:
    """A gradient in a dtype that is wide enough for that of a weight."""
    return gradient.to(torch.promote_types(gradient.dtype, weight.dtype))


def _log_det_of(rule: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return per_position(rule(widened_for(x, weight)), x, -1)


def widened_for(x: Tensor, weight: Tensor) -> Tensor:
    """A weight in the dtype that its log-determinant is computed in: that of the stream x, and at least float32."""
    return weight.to(at_least(weight.dtype, real_dtype(x)))


def _same(matrix: Tensor) -> Tensor:
    return matrix


def _linear_op(
    label: str,
    weight: Tensor,
    bias: Tensor | None,
    *,
    solver: Callable[..., Tensor],
    log_det: Callable[..., Tensor] | None,
    make: Callable[[Tensor], Tensor] = _same,
    part: Callable[[Tensor], Tensor] = _same,
) -> Invertible:
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise OptionError(f"{label}: the bias", expected=f"({weight.shape[0]},)", got=str(tuple(bias.shape)))
    static = label, weight, bias
    build = embedding if log_det is None else partial(pair, log_det=log_det)
    return build(
        partial(_multiply, make, *static),
        partial(_solve, solver, *static),
        pullback=partial(_pull, make, part, solver, *static),
        name=f"{label}(weight{', bias' * (bias is not None)})",
    )


def check_matrix(label: str, weight: Any, *, tall: bool = False) -> None:
    """Raise unless the weight is a matrix (out, in): square, or with more outputs than inputs where that is allowed."""
    got = str(tuple(weight.shape)) if isinstance(weight, Tensor) else type(weight).__name__
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise OptionError(f"{label}: the weight", expected="a matrix (out, in)", got=got)
    out, size = weight.shape
    if out < size or (out > size and not tall):
        raise OptionError(
            f"{label}: the weight",
            expected="at least as many outputs as inputs" if tall else "as many outputs as inputs",
            got=got,
            cure="fewer outputs lose information" if out < size else "tall_linear takes more outputs than inputs",
        )


REGULAR = "start from an orthogonal weight, or train a form that stays invertible: lu, triangular, orthogonal"


@contextmanager
def regular(label: str) -> Iterator[None]:
    """Tell torch's error about a singular matrix in our words."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise DomainError(f"{label}: the weight is singular", expected="a weight of full rank", cure=REGULAR) from error


# ---- square --------------------------------------------------------------------------------------------------------


def _solve_dense(label: str, weight: Tensor, y: Tensor) -> Tensor:
    check_regular(label, weight)
    rows = y.reshape(-1, y.shape[-1])
    with regular(label):
        # To ask a device whether the weight is singular would wait for it; infinities tell, or `invfunc.debug`.
        solve = torch.linalg.solve if weight.is_cpu else lambda a, b, left: torch.linalg.solve_ex(a, b, left=left)[0]
        return solve(weight.mT, rows, left=False).reshape(y.shape)


def check_regular(label: str, weight: Tensor) -> None:
    """While checking, raise where rounding would be all that is left of an inverse."""
    require(label, weight, torch.isfinite, "a weight of finite numbers")
    require(label, weight, _is_regular, "a weight of full rank, with a condition number below 1 / eps", REGULAR)


def _is_regular(weight: Tensor) -> Tensor:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.linalg.cond(wide) < 1 / torch.finfo(wide.dtype).eps


def regular_log_det(label: str, matrix: Tensor) -> Tensor:
    """``log|det|`` of (a batch of) matrices of full rank."""
    check_regular(label, matrix)
    return log_abs_det(matrix)


def linear(weight: Tensor, bias: Tensor | None = None) -> Invertible:
    r"""A square linear map of the last dimension, as `torch.nn.functional.linear`.

    .. math:: y = x W^T + b, \qquad x = (y - b) W^{-T}, \qquad \log|\det J| = n_{positions} \log|\det W|

    Args:
        weight: (n, n), of full rank.
        bias: (n,).

    Shapes:
        ``(..., n) -> (..., n)``, floating-point or complex; half precisions are solved for in float32.

    Domain:
        All of it, onto all of it.

    Cost:
        The inverse factorises W, n^3, once for all positions; so does the log-determinant. `lu` and `triangular` need
        not. Lowered, nothing is kept; backward solves once and multiplies twice.

    Limits:
        Rounding grows with the condition number of W. Autocast is left out: half precision would lose what the inverse
        needs.

    Raises:
        OptionError: When the weight is not square, or the bias does not fit it.
        WireError: When the last dimension has another size.
        DomainError: By the inverse, when W is singular; under ``inv.debug(True)``, by the log-determinant too, and when
            it is nearly so.

    Example:
        >>> import torch
        >>> op = linear(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
        >>> op(torch.tensor([[3.0, 4.0]]))
        tensor([[7., 8.]])
        >>> op.inverse(torch.tensor([[7.0, 8.0]]))
        tensor([[3., 4.]])

    Source:
        In flows: Oliva et al., Transformation Autoregressive Networks (2018).
    """
    check_matrix("linear", weight)
    log_det = partial(_log_det_of, partial(regular_log_det, "linear"), weight)
    return _linear_op("linear", weight, bias, solver=_solve_dense, log_det=log_det)


# ---- tall ----------------------------------------------------------------------------------------------------------


def left_inverse(label: str, matrix: Tensor) -> Tensor:
    """``B`` with ``B A = I`` for (a batch of) matrices of full column rank: the pseudo-inverse, by QR."""
    check_regular(label, matrix)
    if matrix.shape[-1] == matrix.shape[-2]:
        with regular(label):
            return torch.linalg.inv(matrix) if matrix.is_cpu else torch.linalg.inv_ex(matrix)[0]  # as above
    q, r = torch.linalg.qr(matrix)
    return torch.linalg.solve_triangular(r, q.mH, upper=True)


def _solve_tall(label: str, weight: Tensor, y: Tensor) -> Tensor:
    return F.linear(y, left_inverse(label, weight))


def tall_linear(weight: Tensor, bias: Tensor | None = None) -> Invertible:
    r"""A linear map of the last dimension into a larger one, undone by the pseudo-inverse.

    .. math:: y = x W^T + b, \qquad x = (y - b) (W^+)^T, \qquad W^+ W = I

    The inverse undoes forward (section). Forward undoes the inverse on the range of the map only: another y is
    projected to its nearest point there.

    Args:
        weight: (out, in) with in <= out, of full column rank.
        bias: (out,).

    Shapes:
        ``(..., in) -> (..., out)``, floating-point or complex.

    Domain:
        All of it; the range is a space of as many dimensions as the input has.

    Cost:
        The inverse takes a QR of W, once for all positions. Lowered, nothing is kept; but the inverse is a
        stage that is stored, since it does not tell what was off the range.

    Limits:
        No log-determinant: that of a map between dimensions, ``torch.linalg.qr(W).R.diagonal().abs().log().sum()``,
        does not add up over a chain.

    Raises:
        OptionError: When there are fewer outputs than inputs, or the bias does not fit.
        WireError: When the last dimension has another size.
        DomainError: Under ``inv.debug(True)``, when the columns of W are nearly dependent.

    Example:
        >>> import torch
        >>> op = tall_linear(torch.tensor([[1.0], [1.0]]))
        >>> op(torch.tensor([[3.0]]))
        tensor([[3., 3.]])
        >>> op.inverse(torch.tensor([[2.0, 4.0]])).round(decimals=4)
        tensor([[3.]])

    Source:
        InvTorch's ``Linear``.
    """
    check_matrix("tall_linear", weight, tall=True)
    return _linear_op("tall_linear", weight, bias, solver=_solve_tall, log_det=None)


# ---- orthogonal ----------------------------------------------------------------------------------------------------


def _solve_orthogonal(label: str, q: Tensor, y: Tensor) -> Tensor:
    check_orthonormal(label, q)
    return y @ q.conj()


def check_orthonormal(label: str, q: Tensor) -> None:
    """While checking, raise where the transpose is not the inverse."""
    require(label, q, _is_orthonormal, "Q with Q^T Q = I", "make it with torch.nn.utils.parametrizations.orthogonal")


def rotation_log_det(label: str, q: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The log-determinant of a rotation."""
    check_orthonormal(label, q)
    return no_log_det(x, y)


def _is_orthonormal(q: Tensor) -> Tensor:
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return (q.mH @ q - eye).abs() < q.shape[-1] * torch.finfo(q.dtype).eps ** 0.75


def orthogonal(q: Tensor, bias: Tensor | None = None) -> Invertible:
    r"""A rotation or reflection of the last dimension: its inverse is the transpose.

    .. math:: y = x Q^T + b, \qquad x = (y - b) Q, \qquad \log|\det J| = 0

    Args:
        q: (out, in) with orthonormal columns and in <= out. `torch.nn.utils.parametrizations.orthogonal` keeps a weight
            orthogonal while it is trained; build the op from ``module.weight`` in each step.
        bias: (out,).

    Shapes:
        ``(..., in) -> (..., out)``, floating-point or complex (then the inverse is the conjugate transpose).

    Domain:
        All of it, onto all of it when Q is square. A tall Q is undone on its range only, and has no log-determinant.

    Cost:
        Both directions are one product. Rounding does not grow. Lowered, nothing is kept; but the inverse of a tall Q
        is a stage that is stored, since it does not tell what was off the range.

    Limits:
        Q is taken at its word: an inverse of a matrix that is not orthogonal is wrong. ``inv.debug(True)`` checks.

    Raises:
        OptionError: When there are fewer outputs than inputs, or the bias does not fit.
        WireError: When the last dimension has another size.
        DomainError: Under ``inv.debug(True)``, by the inverse and the log-determinant, when Q is not orthogonal.

    Example:
        >>> import torch
        >>> quarter_turn = orthogonal(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> quarter_turn(torch.tensor([[1.0, 0.0]]))
        tensor([[0., 1.]])
        >>> quarter_turn.inverse(torch.tensor([[0.0, 1.0]]))
        tensor([[1., 0.]])

    Source:
        Lezcano-Casado and Martinez-Rubio, Cheap orthogonal constraints in neural networks (2019).
    """
    check_matrix("orthogonal", q, tall=True)
    return orthogonal_by(_same, q, bias)


def orthogonal_by(make: Callable[[Tensor], Tensor], q: Tensor, bias: Tensor | None) -> Invertible:
    """`orthogonal`, whose matrix ``make`` gives for q in any dtype: one that was widened is orthogonal no more."""
    log_det = partial(rotation_log_det, "orthogonal", q) if q.shape[0] == q.shape[1] else None
    solver = partial(_solve_made, make, _solve_orthogonal)
    return _linear_op("orthogonal", q, bias, solver=solver, log_det=log_det, make=make)


def _solve_made(
    make: Callable[[Tensor], Tensor], solver: Callable[..., Tensor], label: str, weight: Tensor, y: Tensor
) -> Tensor:
    return solver(label, make(weight), y)


def _reflect(backwards: bool, vectors: Tensor, x: Tensor) -> Tensor:
    check_size("householder", x, -1, vectors.shape[1])
    require("householder", vectors, _have_lengths, "vectors that are not zero", "give them any direction")
    return exactly(partial(_reflected, backwards), x, vectors)


def _have_lengths(vectors: Tensor) -> Tensor:
    return vectors.norm(dim=-1) > 0


def _reflected(backwards: bool, x: Tensor, vectors: Tensor) -> Tensor:
    """All at once: ``H_1 ... H_k = I - V^T S^-1 V``, where S is the upper part of ``V V^T`` with half its diagonal."""
    products = vectors @ vectors.mT
    s = products.triu(1) + torch.diag_embed(products.diagonal(dim1=-2, dim2=-1) / 2)
    s = s.mT if backwards else s
    return x - (x @ vectors.mT) @ torch.linalg.solve_triangular(s, vectors, upper=not backwards)


def householder(vectors: Tensor) -> Invertible:
    r"""A product of reflections of the last dimension: an orthogonal map from parameters without a constraint.

    .. math:: y = x H_1 H_2 \cdots H_k, \qquad H_i = I - 2 v_i^T v_i / |v_i|^2, \qquad x = y H_k \cdots H_1,
        \qquad \log|\det J| = 0

    Args:
        vectors: (k, n), real, none of them zero; their lengths do not matter. n of them reach every orthogonal matrix
            of determinant (-1)^n.

    Shapes:
        ``(..., n) -> (..., n)``.

    Domain:
        All of it, onto all of it.

    Cost:
        Both directions: two thin products with V and a triangular system of size k, all reflections at once. Lowered,
        nothing is kept.

    Raises:
        OptionError: When the vectors are not a matrix.
        WireError: When the last dimension has another size.
        DomainError: Under ``inv.debug(True)``, when a vector is zero.

    Example:
        >>> import torch
        >>> op = householder(torch.tensor([[1.0, 0.0]]))
        >>> op(torch.tensor([[3.0, 4.0]]))
        tensor([[-3.,  4.]])

    Source:
        Tomczak and Welling, Householder flow (2016); the product as one block: Joffrain et al. (2006).
    """
    if not isinstance(vectors, Tensor) or vectors.dim() != 2:
        raise OptionError("householder: the vectors", expected="a matrix (k, n) of them")
    to, fro = partial(_reflect, False, vectors), partial(_reflect, True, vectors)
    return pair(to, fro, log_det=no_log_det, name="householder(vectors)")


# ---- triangular, LU, diagonal --------------------------------------------------------------------------------------


def _triangle(upper: bool, unit: bool, matrix: Tensor) -> Tensor:
    """The part of a matrix that counts."""
    return matrix.triu(int(unit)) if upper else matrix.tril(-int(unit))


def _triangular(upper: bool, unit: bool, weight: Tensor) -> Tensor:
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device) if unit else 0
    return _triangle(upper, unit, weight) + eye


def _solve_triangular(upper: bool, unit: bool, label: str, weight: Tensor, y: Tensor) -> Tensor:
    if not unit:
        _check_diagonal(label, weight)
    rows, matrix = y.reshape(-1, y.shape[-1]), _triangular(upper, unit, weight)
    solved = torch.linalg.solve_triangular(matrix.mT, rows, upper=not upper, left=False, unitriangular=unit)
    return solved.reshape(y.shape)


def _check_diagonal(label: str, weight: Tensor) -> None:
    check_nonzero(label, weight.diagonal(dim1=-2, dim2=-1), "a diagonal without 0", REGULAR)


def _log_abs_diagonal(weight: Tensor) -> Tensor:
    _check_diagonal("triangular", weight)
    return weight.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def triangular(weight: Tensor, bias: Tensor | None = None, *, upper: bool = False, unit: bool = False) -> Invertible:
    r"""A triangular linear map of the last dimension: solved without a factorisation.

    .. math:: y = x T^T + b, \qquad x = (y - b) T^{-T}, \qquad \log|\det J| = n_{positions} \sum \log|T_{ii}|

    Args:
        weight: (n, n); only the triangle is read. Its diagonal is nowhere 0.
        bias: (n,).
        upper: Whether T is the upper triangle or the lower.
        unit: Whether the diagonal of T is 1, whatever the weight has there.

    Shapes:
        ``(..., n) -> (..., n)``, floating-point or complex.

    Domain:
        All of it, onto all of it.

    Cost:
        The inverse is n^2 a position, the log-determinant n. Lowered, nothing is kept.

    Limits:
        Rounding may grow as 2^n when the diagonal is small against the rest.

    Raises:
        OptionError: When the weight is not square, or the bias does not fit.
        WireError: When the last dimension has another size.
        DomainError: Under ``inv.debug(True)``, by the inverse and the log-determinant, when the diagonal has a 0.

    Example:
        >>> import torch
        >>> op = triangular(torch.tensor([[2.0, 9.0], [1.0, 1.0]]))
        >>> op(torch.tensor([[1.0, 1.0]]))
        tensor([[2., 2.]])

    Source:
        In flows: Oliva et al., Transformation Autoregressive Networks (2018).
    """
    check_matrix("triangular", weight)
    return _linear_op(
        "triangular",
        weight,
        bias,
        solver=partial(_solve_triangular, upper, unit),
        log_det=no_log_det if unit else partial(_log_det_of, _log_abs_diagonal, weight),
        make=partial(_triangular, upper, unit),
        part=partial(_triangle, upper, unit),
    )


def _shift(bias: Tensor, x: Tensor) -> Tensor:
    return exactly(torch.add, x, bias)


def _unshift(bias: Tensor, y: Tensor) -> Tensor:
    return exactly(torch.sub, y, bias)


def lu(
    lower: Tensor,
    upper: Tensor | None = None,
    permutation: Tensor | Sequence[int] | None = None,
    bias: Tensor | None = None,
) -> Invertible:
    r"""A linear map of the last dimension given by its LU factors: solved without a factorisation.

    .. math:: y = x (P L U)^T + b, \qquad \log|\det J| = n_{positions} \sum \log|U_{ii}|

    Args:
        lower: (n, n); what is below its diagonal is that of L, whose diagonal is 1.
        upper: (n, n); what is on and above its diagonal is U. Without it, both are read from ``lower``, as
            `torch.linalg.lu_factor` packs them.
        permutation: P as a matrix, as `torch.linalg.lu` returns it, or the column of the 1 in each of its rows. It is
            a constant.
        bias: (n,).

    Shapes:
        ``(..., n) -> (..., n)``, floating-point or complex.

    Domain:
        All of it, onto all of it; U's diagonal is nowhere 0.

    Cost:
        A chain of two `triangular` and a `permute_channels`: the inverse is n^2 a position, the log-determinant n.
        Lowered, nothing is kept.

    Raises:
        OptionError: When a factor is not square, or P is not a permutation.
        WireError: When the last dimension has another size.
        DomainError: Under ``inv.debug(True)``, by the inverse and the log-determinant, when U's diagonal has a 0.

    Example:
        >>> import torch
        >>> p, l, u = torch.linalg.lu(torch.tensor([[0.0, 2.0], [1.0, 1.0]]))
        >>> op = lu(l, u, p)
        >>> op(torch.tensor([[1.0, 1.0]]))
        tensor([[2., 2.]])

    Source:
        Kingma and Dhariwal, Glow (2018), section 3.2.
    """
    return _lu(triangular(lower if upper is None else upper, upper=True), lower, permutation, bias)


def lu_by(upper: Tensor, sign: Tensor, lower: Tensor, permutation: Tensor, bias: Tensor | None) -> Invertible:
    """`lu`, where the diagonal of ``upper`` has the logarithms of U's magnitudes: it is made in the stream's dtype."""
    make = partial(_exp_diagonal, sign)
    factor = _linear_op(
        "triangular",
        upper,
        None,
        solver=partial(_solve_made, make, partial(_solve_triangular, True, False)),
        log_det=partial(_log_det_of, _trace, upper),
        make=make,
        part=partial(_exp_diagonal_part, sign, upper),
    )
    return _lu(factor, lower, permutation, bias)


def _exp_diagonal(sign: Tensor, upper: Tensor) -> Tensor:
    return upper.triu(1) + (sign * upper.diagonal().exp()).diag_embed()


def _exp_diagonal_part(sign: Tensor, upper: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the matrix that `_exp_diagonal` makes, as that of ``upper``."""
    scale = sign * upper.to(gradient.dtype).diagonal().exp()
    return gradient.triu(1) + (gradient.diagonal() * scale).diag_embed()


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal().sum()


def _lu(
    upper: Invertible, lower: Tensor, permutation: Tensor | Sequence[int] | None, bias: Tensor | None
) -> Invertible:
    parts = [upper, triangular(lower, unit=True)]
    if permutation is not None:
        order = torch.as_tensor(permutation)
        parts.append(permute_channels(order.argmax(1) if order.dim() == 2 else order, dim=-1))
    if bias is not None:
        parts.append(pair(partial(_shift, bias), partial(_unshift, bias), log_det=no_log_det, name="shift"))
    return named(chain(*parts), "lu(lower, upper)")


def _scale(scale: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    check_size("diagonal", x, -1, len(scale))
    return exactly(_scaled, x, scale, bias)


def _scaled(x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x * scale if bias is None else x * scale + bias


def _unscale(scale: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    check_size("the inverse of diagonal", y, -1, len(scale))
    _check_scale(scale)
    return exactly(_unscaled, y, scale, bias)


def _unscaled(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return (y if bias is None else y - bias) / scale


def _pull_scale(scale: Tensor, bias: Tensor | None, y: Tensor, gy: Tensor) -> Any:
    x = _unscale(scale, bias, y)
    closed = [(scale, match(gy * x.conj(), scale))] + ([] if bias is None else [(bias, match(gy, bias))])
    return x, (gy * scale.conj()).to(gy.dtype), closed


def _check_scale(scale: Tensor) -> None:
    check_nonzero("diagonal", scale, "a scale that is nowhere 0", REGULAR)


def _log_abs_sum(scale: Tensor) -> Tensor:
    _check_scale(scale)
    return scale.abs().log().sum()


def diagonal(scale: Tensor, bias: Tensor | None = None) -> Invertible:
    r"""Scale, and shift, each element of the last dimension.

    .. math:: y = s \cdot x + b, \qquad x = (y - b) / s, \qquad \log|\det J| = n_{positions} \sum \log|s_i|

    Args:
        scale: (n,), nowhere 0.
        bias: (n,).

    Shapes:
        ``(..., n) -> (..., n)``, floating-point or complex. `actnorm` is its kin for channels.

    Domain:
        All of it, onto all of it.

    Cost:
        Elementwise in both directions. Lowered, nothing is kept.

    Raises:
        OptionError: When the scale is not a vector, or the bias does not fit it.
        WireError: When the last dimension has another size.
        DomainError: Under ``inv.debug(True)``, by the inverse and the log-determinant, when a scale is 0.

    Example:
        >>> import torch
        >>> diagonal(torch.tensor([2.0, 4.0]))(torch.tensor([[1.0, 1.0]]))
        tensor([[2., 4.]])

    Source:
        The scaling layer of Dinh et al., NICE (2015).
    """
    if not isinstance(scale, Tensor) or scale.dim() != 1 or (bias is not None and bias.shape != scale.shape):
        raise OptionError("diagonal: scale and bias", expected="vectors (n,) of one size", got=describe((scale, bias)))
    return pair(
        partial(_scale, scale, bias),
        partial(_unscale, scale, bias),
        pullback=partial(_pull_scale, scale, bias),
        log_det=partial(_log_det_of, _log_abs_sum, scale),
        name=f"diagonal(scale{', bias' * (bias is not None)})",
    )
