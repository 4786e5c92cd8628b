"""Densities of whole numbers, and those of `torch.distributions`, against normflows, nflows and zuko, parameters alike."""

import math
from collections.abc import Callable
from typing import Any

import normflows
import pytest
import torch
import zuko
from flows import lazy, normflows_spline, trained
from kit import Counted, assert_close
from nflows.transforms import MaskedAffineAutoregressiveTransform
from nflows.transforms.base import CompositeTransform
from nflows.transforms.nonlinearities import Logit
from normflows.utils.eval import bitsPerDim
from torch import Tensor
from torch.distributions import Independent, Normal, TransformedDistribution
from zuko.distributions import NormalizingFlow

import invfunc as inv

ops = inv.ops
WIDTH, ALPHA = 8, 0.05
lowerings = pytest.mark.parametrize("wrap", [lambda op: op, inv.checkpoint], ids=["plain", "lowered"])


def normal() -> Independent:
    return Independent(Normal(torch.zeros(WIDTH), 1.0), 1)


def gradients(value: Tensor, wrt: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value.sum(), wrt, retain_graph=True, allow_unused=True, materialize_grads=True)


# ---- whole numbers -------------------------------------------------------------------------------------------------


@lowerings
def test_uniform_dequantisation_has_the_bits_per_dimension_of_normflows(wrap: Callable[..., Any]) -> None:
    theirs = normflows_spline(2).net
    theirs.q0 = normflows.distributions.DiagGaussian(WIDTH, trainable=False).double()
    levels = torch.randint(0, 256, (16, WIDTH)).double()
    op = inv.chain(
        ops.dequantize(256),
        inv.affine(torch.tensor(1 - ALPHA), torch.tensor(ALPHA)),
        ops.logit(),
        ~ops.from_transform(theirs),
    )
    torch.manual_seed(1)
    found = -inv.flow(wrap(op), normal()).log_prob(levels) / (WIDTH * math.log(2))
    torch.manual_seed(1)
    x = levels / 255  # as their data sets have it
    for step in normflows.utils.Scale(255 / 256), normflows.utils.Jitter(1 / 256), normflows.utils.Logit(ALPHA):
        x = step(x)
    expected = bitsPerDim(theirs, x, trans_param=[ALPHA])
    assert_close(found, expected, 1e-9)
    assert_close(gradients(found, trained(theirs)), gradients(expected, trained(theirs)), 1e-9)


@lowerings
def test_variational_dequantisation_has_the_bound_of_nflows(wrap: Callable[..., Any]) -> None:
    layers = [MaskedAffineAutoregressiveTransform(WIDTH, 16, context_features=WIDTH, num_blocks=1) for _ in range(2)]
    noise, net = CompositeTransform([Logit(), *layers]), CompositeTransform([Logit(), *nflows_layers()])
    x, wrt = torch.randint(0, 17, (5, WIDTH)).double(), [*trained(noise), *trained(net)]
    drawn = inv.flow(ops.given(ops.from_transform(noise)), normal())
    density = inv.flow(wrap(inv.chain(ops.dequantize(17, drawn), ops.from_transform(net))), normal())
    torch.manual_seed(1)
    found = density.log_prob(x)
    torch.manual_seed(1)
    z = normal().rsample((5,))
    u, log_det_of_noise = noise.inverse(z, context=x / 17)
    latent, log_det = net((x + u) / 17)
    of_noise = normal().log_prob(z) - log_det_of_noise
    expected = normal().log_prob(latent) + log_det - of_noise - WIDTH * math.log(17)
    assert_close(found, expected, 1e-9)
    assert_close(gradients(found, wrt), gradients(expected, wrt), 1e-8)


def nflows_layers() -> list[Any]:
    return [MaskedAffineAutoregressiveTransform(WIDTH, 16, num_blocks=1) for _ in range(2)]


# ---- torch.distributions -------------------------------------------------------------------------------------------


def real_nvp() -> Any:
    return zuko.flows.RealNVP(WIDTH, transforms=3, hidden_features=(8,)).double()


def counted_nets(flow: Any) -> list[Counted]:
    """Its networks, which count their calls from now on."""
    transforms = [t for t in flow.transform.transforms if hasattr(t, "hyper")]
    for transform in transforms:
        transform.hyper = Counted(transform.hyper)
    return [transform.hyper for transform in transforms]


@lowerings
def test_a_cached_transform_has_the_samples_and_densities_of_zuko(wrap: Callable[..., Any]) -> None:
    theirs = real_nvp()
    nets, op = counted_nets(theirs), wrap(ops.from_transform(theirs))
    torch.manual_seed(1)
    expected, expected_log_prob = theirs().rsample_and_log_prob((5,))
    ours = TransformedDistribution(theirs().base, [ops.as_transform(~op).with_cache()])
    torch.manual_seed(1)
    found = ours.rsample((5,))
    before = [net.count for net in nets]
    log_prob = ours.log_prob(found)
    assert [net.count for net in nets] == before and all(before)
    assert_close((found, log_prob), (expected, expected_log_prob), 1e-10)
    values = found.sin().sum(1) + log_prob, expected.sin().sum(1) + expected_log_prob
    assert_close(*[gradients(value, trained(theirs)) for value in values], 1e-9)
    assert_close(ours.log_prob(expected.detach() + 1), theirs().log_prob(expected.detach() + 1), 1e-10)


@lowerings
@pytest.mark.parametrize("cache", [0, 1])
def test_an_op_is_a_transform_of_a_distribution_of_zuko(wrap: Callable[..., Any], cache: int) -> None:
    theirs = real_nvp()
    transform = ops.as_transform(wrap(ops.from_transform(theirs))).with_cache(cache)
    ours, x = NormalizingFlow(transform, theirs().base), torch.randn(5, WIDTH)
    found, expected = ours.log_prob(x), theirs().log_prob(x)
    assert_close(found, expected, 1e-10)
    assert_close(gradients(found, trained(theirs)), gradients(expected, trained(theirs)), 1e-9)
    seeded = []
    for density in ours, theirs():
        torch.manual_seed(1)
        seeded.append(density.rsample_and_log_prob((5,)))
    assert_close(*seeded, 1e-10)


def test_a_transform_of_zuko_there_and_back_is_itself() -> None:
    theirs, x = (
        lazy(zuko.flows.NSF(WIDTH, transforms=2, passes=2, hidden_features=(8,)).double()),
        torch.randn(5, WIDTH),
    )
    again = ops.as_transform(ops.from_transform(ops.as_transform(ops.from_transform(theirs.net))))
    y, log_det = theirs.forward(x)
    assert_close((again(x), again.log_abs_det_jacobian(x, y)), (y, log_det), 1e-12)
    assert_close(again.inv(y), x, 1e-9)
