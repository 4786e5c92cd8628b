"""Flows against those of zuko and normflows with the same parameters: ``make flow-peers``, which installs them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import invfunc as inv

zuko = pytest.importorskip("zuko", reason="zuko comes with `make flow-peers`")
normflows = pytest.importorskip("normflows", reason="normflows comes with `make flow-peers`")

lowerings = pytest.mark.parametrize("wrap", [lambda op: op, inv.checkpoint], ids=["plain", "lowered"])


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ---- zuko: couplings with a context, and a base that trains ----------------------------------------------------------


class Hyper(nn.Module):
    """What a coupling of zuko computes from the features that it keeps and the context."""

    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, kept: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        features = kept[:, self.transform.mask]
        params = self.transform.hyper(torch.cat([features, context], -1))
        shift, scale = params.unflatten(-1, (-1, 2)).unbind(-1)
        univariate = zuko.transforms.MonotonicAffineTransform(shift, scale)
        return self._in_place(univariate.scale, kept), self._in_place(shift, kept)

    def _in_place(self, values: Tensor, like: Tensor) -> Tensor:
        return torch.zeros_like(like).index_copy(1, (~self.transform.mask).nonzero()[:, 0], values)


def flows_of_zuko() -> tuple[Any, Any]:
    """Theirs, and its transforms as one op of ours with the same parameters."""
    theirs = zuko.flows.RealNVP(4, 3, transforms=3, hidden_features=(8,)).double()
    ours = inv.chain(*(inv.ops.masked_couple(Hyper(t), t.mask, law=inv.affine) for t in theirs.transform.transforms))
    return theirs, inv.ops.given(ours)


def base_of(theirs: Any) -> Any:
    return lambda: theirs.base()


@lowerings
def test_log_prob_of_samples_times_contexts(wrap: Any) -> None:
    theirs, op = flows_of_zuko()
    x, c = torch.randn(5, 6, 4), torch.randn(6, 3, requires_grad=True)
    ours = inv.flow(wrap(op), base_of(theirs))
    found, expected = ours.log_prob(x, context=c), theirs(c).log_prob(x)
    assert_close(found, expected)
    wrt = [c, *theirs.transform.parameters()]
    assert_close(*(torch.autograd.grad(value.sin().sum(), wrt) for value in (found, expected)))


@lowerings
def test_samples_and_their_log_prob(wrap: Any) -> None:
    theirs, op = flows_of_zuko()
    c = torch.randn(6, 3)
    torch.manual_seed(1)
    found = inv.flow(wrap(op), base_of(theirs)).rsample_and_log_prob((5,), context=c)
    torch.manual_seed(1)
    expected = theirs(c).rsample_and_log_prob((5,))
    assert_close(found, expected)
    wrt = list(theirs.transform.parameters())
    assert_close(*(torch.autograd.grad((x.sin().sum() + p.sum()), wrt) for x, p in (found, expected)))


def test_a_base_with_parameters() -> None:
    theirs, op = flows_of_zuko()
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.randn(4), torch.rand(4) + 0.5, buffer=False
    )
    theirs.base = base
    x, c = torch.randn(5, 6, 4), torch.randn(6, 3)
    found = inv.flow(op, base).log_prob(x, context=c)
    wrt = list(base.parameters())
    assert len(wrt) == 2
    assert_close(torch.autograd.grad(found.sum(), wrt), torch.autograd.grad(theirs(c).log_prob(x).sum(), wrt))


def test_a_transform_of_zuko_is_an_op() -> None:
    theirs, op = flows_of_zuko()
    x, c = torch.randn(6, 4), torch.randn(6, 3)
    taken = inv.ops.from_transform(theirs.transform(c))
    assert_close(inv.log_det(taken, x), (op(x, c)[0], inv.log_det(op, (x, c))[1]))


# ---- normflows: two scales -------------------------------------------------------------------------------------------


class Interleaved(nn.Module):
    """Their nets interleave shift and scale."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.net(x)
        return torch.exp(-found[:, 1::2]), -found[:, 0::2] * torch.exp(-found[:, 1::2])


def conv(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 2 * channels, 1)).double()


def step(net: nn.Module) -> inv.Invertible:
    """Their coupling block, read from data to latents."""
    return inv.chain(inv.split(2), inv.swap(), inv.couple(Interleaved(net), law=inv.affine), inv.swap(), inv.concat(2))


def scales() -> tuple[Any, inv.Invertible]:
    """Their multi-scale flow of images of one channel, 8 x 8, and ours with the same nets."""
    nets = [[conv(4) for _ in range(2)], [conv(2) for _ in range(2)]]  # the last scale first, as theirs
    flows = [
        [*(normflows.flows.AffineCouplingBlock(net) for net in level), normflows.flows.Squeeze()] for level in nets
    ]
    bases = [normflows.distributions.DiagGaussian(s, trainable=False).double() for s in ((8, 2, 2), (2, 4, 4))]
    theirs = normflows.MultiscaleFlow(bases, flows, [normflows.flows.Merge()], class_cond=False)
    inner = inv.chain(inv.ops.pixel_unshuffle(2), *map(step, reversed(nets[0])))
    outer = [inv.ops.pixel_unshuffle(2), *map(step, reversed(nets[1]))]
    return theirs, inv.chain(*outer, inv.split(2), inv.parallel(inner, inv.chain()))


@lowerings
def test_two_scales(wrap: Any) -> None:
    theirs, op = scales()
    base = tuple(Independent(Normal(torch.zeros(s), 1.0), 3) for s in ((8, 2, 2), (2, 4, 4)))
    ours, x = inv.flow(wrap(op), base), torch.randn(3, 1, 8, 8)
    found, expected = ours.log_prob(x), theirs.log_prob(x, None)
    assert_close(found, expected)
    wrt = list(theirs.parameters())
    assert_close(*(torch.autograd.grad(value.sum(), wrt) for value in (found, expected)))
    z, _ = theirs.inverse_and_log_det(x)
    assert_close(op.inverse(tuple(z)), theirs.forward_and_log_det(z)[0])
    assert ours.sample((5, 2)).shape == (5, 2, 1, 8, 8)
