"""Ops of the catalogue are the maps of nflows and normflows, given the same parameters: values, densities, gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import nflows.transforms as nt
import normflows as nf
import pytest
import torch
from kit import assert_close
from nflows.transforms.splines import linear as linear_splines
from nflows.transforms.splines import rational_quadratic
from torch import Tensor, nn

import invfunc as inv

ops = inv.ops
lowerings = pytest.mark.parametrize("wrap", [lambda op: op, inv.checkpoint], ids=["plain", "lowered"])


class Same(NamedTuple):
    """An op of ours, their map to a value and a log-determinant, an input, and what both are trained by."""

    op: inv.Invertible
    theirs: Callable[[Tensor], Any]
    x: Tensor
    parameters: list[Tensor]


def parameters(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def per_element(spline: Callable[..., Any], given: list[Tensor], **options: Any) -> Callable[[Tensor], Any]:
    """Their splines have the log-determinant of each number."""

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = spline(x, *given, **options)
        return y, log_det.sum(1)

    return call


def spline_with_tails(inverse: bool) -> Same:
    given = parameters((40, 3, 8), (40, 3, 8), (40, 3, 7))
    theirs = per_element(
        rational_quadratic.unconstrained_rational_quadratic_spline, given, tail_bound=3.0, inverse=inverse
    )
    op = ops.rational_quadratic_spline(*given)
    return Same(~op if inverse else op, theirs, 3 * torch.randn(40, 3), given)


def spline_on_an_interval() -> Same:
    given = parameters((40, 3, 8), (40, 3, 8), (40, 3, 9))
    op = ops.rational_quadratic_spline(*given, interval=(0, 1), tails=None)
    return Same(op, per_element(rational_quadratic.rational_quadratic_spline, given), torch.rand(40, 3), given)


def linear_spline() -> Same:
    given = parameters((40, 3, 8))
    op = ops.linear_spline(*given, interval=(0, 1), minimum=0.0)
    return Same(op, per_element(linear_splines.linear_spline, given), torch.rand(40, 3), given)


def householder() -> Same:
    theirs = nt.HouseholderSequence(6, 4)
    return Same(ops.householder(theirs.q_vectors), theirs, torch.randn(5, 6), list(theirs.parameters()))


def lu() -> Same:
    theirs = nt.LULinear(6)
    for entries in theirs.lower_entries, theirs.upper_entries:
        nn.init.normal_(entries, 0, 0.3)
    lower, upper = theirs._create_lower_upper()
    return Same(ops.lu(lower, upper, None, theirs.bias), theirs, torch.randn(5, 6), list(theirs.parameters()))


def convolution() -> Same:
    theirs = nf.flows.Invertible1x1Conv(4, use_lu=False).double()

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = theirs(x)
        return y, log_det.expand(len(x))

    return Same(~ops.conv1x1(theirs.W), call, torch.randn(3, 4, 5, 5), [theirs.W])


def masked_affine() -> Same:
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    theirs = nf.flows.MaskedAffineFlow(mask, nn.Linear(4, 4), nn.Linear(4, 4)).double()
    op = ops.masked_couple(lambda x: (theirs.s(x).exp(), theirs.t(x)), mask.bool(), law=inv.affine)
    return Same(op, theirs, torch.randn(5, 4), list(theirs.parameters()))


def element_by_element(op: inv.Invertible, make: Callable[[], Any]) -> Callable[[], Same]:
    return lambda: Same(op, make(), torch.tensor([[-3.0, -0.1, 0.7, 3.0, 8.0]]), [])


def squeeze(theirs: Callable[[Tensor], Any]) -> Same:
    x = torch.randn(2, 3, 4, 6)
    return Same(ops.pixel_unshuffle(2), lambda x: (theirs(x)[0], torch.zeros(2)), x, [])


MAPS: dict[str, Callable[[], Same]] = {
    "rational-quadratic spline": lambda: spline_with_tails(False),
    "rational-quadratic spline, inverse": lambda: spline_with_tails(True),
    "rational-quadratic spline on an interval": spline_on_an_interval,
    "linear spline": linear_spline,
    "householder": householder,
    "LU": lu,
    "convolution": convolution,
    "masked affine": masked_affine,
    "sigmoid": element_by_element(ops.sigmoid(), nt.Sigmoid),
    "tanh": element_by_element(ops.tanh(), nt.Tanh),
    "leaky ReLU": element_by_element(ops.leaky_relu(0.01), lambda: nt.LeakyReLU(0.01)),
    "squeeze of nflows": lambda: squeeze(nt.SqueezeTransform(2)),
    "squeeze of normflows": lambda: squeeze(nf.flows.Squeeze().inverse),
}


@lowerings
@pytest.mark.parametrize("name", MAPS)
def test_an_op_is_their_map(name: str, wrap: Callable[..., Any]) -> None:
    op, theirs, x, wrt = MAPS[name]()
    x.requires_grad_()
    found, expected = inv.log_det(wrap(op), x), theirs(x)
    assert_close(found, expected, 1e-10)
    losses = [(y.sin().sum() + log_det.sum()) for y, log_det in (found, expected)]
    assert_close(*[torch.autograd.grad(loss, [x, *wrt]) for loss in losses], 1e-9)


def test_an_activation_norm_of_normflows_goes_on_in_ours() -> None:
    theirs, ours = nf.flows.ActNorm((4, 1, 1)).double(), inv.nn.ActNorm(4)
    x = torch.randn(64, 4, 3, 3) * torch.arange(1.0, 5.0).view(4, 1, 1) + 5
    theirs.inverse(x)  # its start
    scale, shift = (p.detach().flatten() for p in (theirs.s, theirs.t))
    ours.load_state_dict({"log_scale": -scale, "bias": -shift * (-scale).exp()})
    y, log_det = theirs.inverse(x)
    assert_close(inv.log_det(ours.op, x), (y, log_det.expand(64)), 1e-10)
    assert_close(ours.inverse(x), theirs(x)[0], 1e-10)
