"""Comparison: how far apart two wires, or a few numbers, are. One way for laws, the drift meter and reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import compress

import torch
from torch import Tensor

from ..wires import Wire, is_differentiable, leaves


def largest(tensor: Tensor) -> float:
    """The largest finite absolute value.

    Example:
        >>> largest(torch.tensor([-2.0, 1.0, torch.inf]))
        2.0
    """
    return torch.where(tensor.isfinite(), tensor, 0).abs().max().item() if tensor.numel() else 0.0


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite where only one of the two is finite.

    Example:
        >>> largest_difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
        0.5
    """
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return math.inf
    return largest(torch.where(found.isfinite(), found - expected, 0))


def relative_error(found: Wire, expected: Wire) -> float:
    r"""The error of a wire, relative to its size, over all its differentiable tensors.

    .. math:: \|found - expected\| / \|expected\|

    It is absolute where all that is expected is zero, and infinite where a number was lost or a shape differs. What is
    not finite to begin with does not count: plain training has it, too.

    Example:
        >>> relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
        0.1
    """
    apart, size, pairs = [0.0], [0.0], [list(_wide(wire)) for wire in (found, expected)]
    if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        return math.inf
    for a, b in zip(*pairs, strict=True):
        counts = b.isfinite()
        apart.append(length(torch.where(counts, a - b, 0)))
        size.append(length(torch.where(counts, b, 0)))
    error = math.hypot(*apart) / (math.hypot(*size) or 1.0)
    return error if math.isfinite(error) else math.inf


def relative_error_of_numbers(found: Sequence[float], expected: Sequence[float]) -> float:
    """`relative_error` of a few numbers that are on the host already.

    Example:
        >>> relative_error_of_numbers([3.0, 4.5], [3.0, 4.0])
        0.1
    """
    apart, size = math.dist(found, expected), math.hypot(*expected)
    if math.isfinite(apart):
        return apart / (size or 1.0)
    counts = [math.isfinite(number) for number in expected]
    if all(counts):
        return math.inf
    return relative_error_of_numbers(*[list(compress(numbers, counts)) for numbers in (found, expected)])


def cosine(found: Wire, expected: Wire) -> float:
    """The cosine of the angle between two wires, each seen as one vector; 1 if both are zero, 0 if one is.

    Example:
        >>> round(cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])), 3)
        0.707
    """
    pairs = list(zip(_wide(found), _wide(expected), strict=True))
    lengths = [math.hypot(*map(length, side)) for side in zip(*pairs, strict=True)] or [0.0, 0.0]
    if not all(lengths):
        return float(lengths[0] == lengths[1])
    return sum(float((a * b.conj()).real.sum()) for a, b in pairs) / (lengths[0] * lengths[1])


def _wide(wire: Wire) -> Iterator[Tensor]:
    """The differentiable tensors of a wire, so wide that what is compared does not round again."""
    for leaf in leaves(wire):
        if is_differentiable(leaf):
            yield leaf.detach().to(torch.complex128 if leaf.is_complex() else torch.float64)


def length(tensor: Tensor) -> float:
    """The Euclidean norm of a tensor seen as one vector."""
    return float(torch.linalg.vector_norm(tensor))
