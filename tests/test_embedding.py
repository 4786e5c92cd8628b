"""Maps into a larger space: their inverse loses what lies off their range, and its gradient is right all the same."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from catalogue import conv, kernel, regular
from kit import assert_close
from torch import Tensor, func

import invfunc as inv
from invfunc import ops
from invfunc.errors import NotDifferentiableError
from invfunc.look.memory import measure
from invfunc.wires import leaves


def tall() -> Tensor:
    return torch.linalg.qr(torch.randn(6, 4))[0]


EMBEDDINGS: dict[str, tuple[Callable[[], inv.Invertible], Callable[[], Any]]] = {
    "tall_linear": (lambda: ops.tall_linear(regular(6, 4), torch.ones(6)), lambda: torch.randn(3, 6)),
    "orthogonal": (lambda: ops.orthogonal(tall()), lambda: torch.randn(3, 6)),
    "conv1d": (lambda: ops.conv1d(kernel(5, 2, 2)), lambda: torch.randn(3, 5, 4)),
    "conv2d, overlap": (
        lambda: ops.conv2d(kernel(4, 1, 2, 2), stride=1, patchwise=False),
        lambda: torch.randn(2, 4, 2, 3),
    ),
    "pad": (lambda: ops.pad([1, 2]), lambda: torch.randn(3, 6)),
    "pad, reflect": (lambda: ops.pad([1, 2], mode="reflect"), lambda: torch.randn(3, 6)),
    "pad_to_multiple": (lambda: ops.pad_to_multiple([4], sizes=[3]), lambda: torch.randn(3, 4)),
    "rfft": (lambda: ops.rfft(size=6), lambda: torch.randn(3, 4, dtype=torch.complex128)),
    "enter_streams": (ops.enter_streams, lambda: (torch.randn(3, 4), torch.randn(3, 4))),
    "enter_streams, function": (lambda: ops.enter_streams(torch.sin), lambda: (torch.randn(3, 4), torch.randn(3, 4))),
    "enter_streams, momentum": (lambda: ops.enter_streams("momentum"), lambda: (torch.randn(3, 4), torch.randn(3, 4))),
}


def gradients(run: Callable[..., Any], y: Any, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a function of what comes out, by what goes in and by the tensors that the op closes over."""
    given = tuple(t.clone().requires_grad_() for t in leaves(y))
    x = run(*given)
    return torch.autograd.grad((x.sin() * x).sum(), [*given, *tensors], allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_inverse_has_its_gradient_off_the_range(name: str) -> None:
    make, draw = EMBEDDINGS[name]
    op, y = make(), draw()
    tensors = [t for fn in op.functions for t in getattr(fn, "args", ()) if isinstance(t, Tensor) and t.requires_grad]
    expected = gradients(~op, y, tensors)
    for lower in (inv.checkpoint, partial(inv.checkpoint, mode="recompute"), lambda op: ~inv.checkpoint(~op)):
        for found, wanted in zip(gradients(lower(~op), y, tensors), expected, strict=True):
            assert_close(found, wanted, 1e-11, relative=0)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_it_inverts_and_reads_like_any_op(name: str) -> None:
    op = EMBEDDINGS[name][0]()
    assert ~~op == op and repr(~op) == f"invert({op!r})"
    with pytest.raises(NotDifferentiableError, match="has no rule for its log-determinant"):
        inv.with_log_det(op)
    with pytest.raises(NotDifferentiableError, match="has no rule for its log-determinant"):
        inv.with_log_det(~op)


def cropped(depth: int, channels: int = 4) -> inv.Invertible:
    """Couplings on a padded image, whose border is cropped at the end."""
    half = channels // 2
    blocks = [inv.couple(conv(half), conv(half)) for _ in range(depth)]
    pad = ops.pad([1, 1, 1, 1])
    return inv.chain(pad, inv.split(2), *blocks, inv.concat(2), ~pad)


def test_a_net_that_pads_and_crops_has_the_gradient_of_plain() -> None:
    op, x = cropped(2), torch.randn(2, 4, 3, 3)
    parameters = [p for part in op.parts[2:4] for fn in part.functions for p in getattr(fn, "parameters", list)()]
    for found, wanted in zip(gradients(inv.checkpoint(op), x, parameters), gradients(op, x, parameters), strict=True):
        assert_close(found, wanted, 1e-11, relative=0)

    def loss(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return run(x).sin().sum()

    found, wanted = (func.grad(partial(loss, run))(x) for run in (inv.checkpoint(op), op))
    assert_close(found, wanted, 1e-11, relative=0)


def test_what_is_stored_does_not_grow_with_depth() -> None:
    x = torch.randn(8, 4, 8, 8, requires_grad=True)

    def held(depth: int) -> float:
        fast = inv.checkpoint(cropped(depth))
        return measure(lambda: fast(x)).held_bytes / x.nbytes

    held(1)
    assert held(6) <= held(2) + 0.01 <= 3.2  # the padded image, which is 1.6 of x, and the output
