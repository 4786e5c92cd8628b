"""Docstrings of ops on numbers say their domain and range; both are read from there and held to, in every dtype."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES
from test_precision import recast
from torch import Tensor

import invfunc as inv
from invfunc.testing import needs_no_residue

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WHOLE = r"(All (numbers|of it|that the law|pairs)|That of )"
NOT_OF_EACH_NUMBER = {"bdia", "dequantize"}  # whole numbers, and a grid: tests of their own

pytestmark = pytest.mark.filterwarnings("ignore::invfunc.errors.DriftWarning")


def domain_of(name: str) -> str:
    """What the docstring of an op says of its domain."""
    doc = inspect.cleandoc(getattr(inv.ops, name).__doc__)
    found = re.search(r"^Domain:\n((?:    .*\n)+)", doc, re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def interval(text: str, variable: str) -> tuple[float, float]:
    """The ends that a text says for a variable: ``x > 0``, ``-1 < y < 1``."""
    found = re.search(rf"(?:(-?\d) < )?\b{variable} (>=?|<) (-?\d)", text)
    if not found:
        return -math.inf, math.inf
    low, sign, end = found.groups()
    return (float(low), float(end)) if sign == "<" else (float(end), math.inf)


MADE = [name for name in inv.ops.__all__ if getattr(inv.ops, name).__annotations__["return"] == "Invertible"]
OF_NUMBERS = [n for n in MADE if re.search(r"All numbers|\bx [<>]", domain_of(n))]


def test_every_op_has_a_domain_that_is_all_or_is_tested_here() -> None:
    for name in set(MADE) - set(OF_NUMBERS) - NOT_OF_EACH_NUMBER - {"log_det_pair"}:  # that of its functions
        assert re.match(WHOLE, domain_of(name)), name
    assert {"exp", "atanh", "power", "mixture_logit", "linear_spline"} < set(OF_NUMBERS)


def test_intervals_are_read() -> None:
    assert interval("-1 < x < 1; the range is all", "x") == (-1, 1)
    assert interval("x > 0, and the range is y > 0", "y") == (0, math.inf)
    assert interval("All numbers; the range is y >= 0", "y") == (0, math.inf)
    assert interval("All numbers", "x") == (-math.inf, math.inf)
    assert {n for n in OF_NUMBERS if interval(domain_of(n), "x") != (-math.inf, math.inf)} == {
        "atanh",
        "log",
        "logit",
        "power",
    }


def inside(low: float, high: float) -> list[float]:
    """Numbers between two ends, also near them."""
    low, high = max(low, -7.0), min(high, 7.0)
    parts = (0.005, 0.01, 0.2, 0.5, 0.7, 0.99)
    return [low + part * (high - low) for part in parts]


def beyond(low: float, high: float) -> list[float]:
    """Numbers outside of two ends."""
    below = [low - 0.01, low - 1, low - 1e4] if low > -math.inf else []
    return below + ([high + 0.01, high + 1, high + 1e4] if high < math.inf else [])


def rows_of(points: list[float], dtype: torch.dtype) -> Tensor:
    """Points as rows of three numbers, as the parameters of the examples have it."""
    return torch.tensor(points, dtype=dtype)[:, None].expand(-1, 3).contiguous()


def evaluate(fn: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """A value and its gradient."""
    x = x.clone().requires_grad_()
    y = fn(x)
    return y.detach(), torch.autograd.grad(y.float().sum() if y.dtype.itemsize < 4 else y.sum(), x)[0]


OURS = [name for name in EXAMPLES if name.partition(",")[0] in OF_NUMBERS]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_an_op_keeps_to_the_domain_and_the_range_of_its_docstring(name: str, dtype: torch.dtype) -> None:
    text, is_turned = domain_of(name.partition(",")[0]), "inverse" in name
    ends = {v: interval(text, v) for v in "xy"}
    ends = {"x": ends["y"], "y": ends["x"]} if is_turned else ends
    op = recast(EXAMPLES[name].make(), dtype, dtype)
    for way in op, inv.checkpoint(op):
        check_direction(way, ends["x"], ends["y"], dtype)
    if needs_no_residue(op, rows_of([0.5], dtype)):
        for way in ~op, inv.checkpoint(~op):
            check_direction(way, ends["y"], ends["x"], dtype)


def check_direction(op: Any, of_x: tuple[float, float], of_y: tuple[float, float], dtype: torch.dtype) -> None:
    """Inside, values and gradients are finite, and values are in the range; beyond, both are NaN."""
    y, gradient = evaluate(op, rows_of(inside(*of_x), dtype))
    assert y.isfinite().all() and gradient.isfinite().all()
    assert (y >= of_y[0]).all() and (y <= of_y[1]).all()
    points = beyond(*of_x)
    if points:
        y, gradient = evaluate(op, rows_of(points, dtype))
        assert y.isnan().all() and gradient.isnan().all()
