"""What a plan may keep of an op that runs again: the results of its expensive operators. See NOTE [Keep]."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}


def _is_attention(name: str) -> bool:
    return "scaled_dot_product" in name and not name.endswith("backward")


def _is_product(name: str) -> bool:
    return name in _PRODUCTS


KINDS: dict[str, Callable[[str], bool]] = {"attention": _is_attention, "products": _is_product}  # the best first


def name_of_operator(op: Any) -> str:
    """The name of an operator without that of its overload.

    Example:
        >>> import torch
        >>> name_of_operator(torch.ops.aten.mm.default)
        'mm'
    """
    return getattr(getattr(op, "overloadpacket", op), "__name__", "")


def kind_of(names: Iterable[str]) -> str:
    """Which results are worth keeping, most for their bytes: attention's where there is attention, else products."""
    seen = list(names)
    return next((kind for kind, is_one in KINDS.items() if any(map(is_one, seen))), "")


def keeps_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
    """A policy of `invfunc.checkpoint` that keeps what attention returns."""
    return _is_attention(name_of_operator(op))


def keeps_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
    """One that keeps what products of matrices and convolutions return."""
    return _is_product(name_of_operator(op))


POLICIES = {"attention": keeps_attention, "products": keeps_products}
