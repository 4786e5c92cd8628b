"""Networks of FrEIA, nflows, normflows and zuko as ops: theirs and ours say the same, and memory is flat."""

import re
from collections.abc import Callable
from functools import partial

import FrEIA.framework as ff
import FrEIA.modules as fm
import nflows.flows
import normflows
import pytest
import torch
import zuko
from flows import NETWORKS, WIDTH, Theirs, lowered, mlp, nflows_maf, nflows_spline, sequence, step, trained
from kit import assert_close
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import invfunc as inv
from invfunc.errors import NotInvertibleError, OptionError, WireError
from invfunc.testing import check_laws

pytestmark = pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")  # nflows calls it
EXPENSIVE = {"nflows MAF", "zuko NSF", "zuko MAF"}  # their inverse solves for one feature after the other


def randomise(parameters: list[Tensor]) -> None:
    """Away from an initialisation that is the identity."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", NETWORKS)
def test_values_log_determinants_gradients_and_inverses_are_theirs(name: str) -> None:
    theirs, x = NETWORKS[name](3), torch.randn(6, WIDTH)
    randomise(theirs.parameters)
    plain, ours = (step_of(fn, theirs.parameters, x) for fn in (theirs.forward, lowered(theirs.net)))
    assert_close(ours, plain, 1e-10)
    y = plain[0]
    op = inv.with_log_det(inv.ops.from_transform(theirs.net))
    x_again, log_det = theirs.inverse(y)
    assert_close(op.inverse((y, torch.zeros(6))), (x_again, log_det), 1e-10)


def step_of(forward: object, parameters: list[Tensor], x: Tensor) -> tuple[object, ...]:
    """Value, log-determinant and all gradients of a step."""
    x = x.clone().requires_grad_()
    for parameter in parameters:
        parameter.grad = None
    y, log_det = step(forward, x)
    return y, log_det, x.grad, [p.grad for p in parameters]


def normal() -> normflows.distributions.DiagGaussian:
    return normflows.distributions.DiagGaussian(WIDTH, trainable=False)


def monte_carlo() -> nn.Module:
    return normflows.flows.HamiltonianMonteCarlo(normal(), 2, torch.full((WIDTH,), -1.0), torch.zeros(WIDTH))


def metropolis() -> nn.Module:
    return normflows.flows.MetropolisHastings(normal(), normflows.distributions.DiagGaussianProposal((WIDTH,), 0.1), 2)


def nflows_net(layer: Callable[[], nn.Module]) -> Theirs:
    net = nflows.transforms.CompositeTransform([layer(), nflows.transforms.LULinear(WIDTH), layer()])
    return Theirs(net, net, net.inverse)


def normflows_net(layer: Callable[[], nn.Module]) -> Theirs:
    layers = [layer(), normflows.flows.LULinearPermute(WIDTH), layer()]
    net = normflows.NormalizingFlow(normal(), layers)
    return Theirs(net, net.forward_and_log_det, net.inverse_and_log_det)


RESIDUAL = {"hutchinson_samples": 1, "internal_size": 16, "n_internal_layers": 2}
NOT_REBUILT: dict[str, Callable[[], Theirs]] = {
    "batch normalisation of nflows": lambda: nflows_net(lambda: nflows.transforms.BatchNorm(WIDTH)),
    "batch normalisation of normflows": lambda: normflows_net(normflows.flows.BatchNorm),
    "planar": lambda: normflows_net(lambda: normflows.flows.Planar((WIDTH,))),
    "radial": lambda: normflows_net(lambda: normflows.flows.Radial((WIDTH,))),
    "Hamiltonian Monte Carlo": lambda: normflows_net(monte_carlo),
    "Metropolis Hastings": lambda: normflows_net(metropolis),
    "IResNetLayer": lambda: sequence(fm.IResNetLayer, 2, **RESIDUAL),
}


@pytest.mark.parametrize("name", NOT_REBUILT)
def test_a_layer_without_an_inverse_for_training_is_run_again(name: str) -> None:
    x, found = torch.randn(6, WIDTH), []
    for way in (lambda theirs: theirs.forward, lambda theirs: lowered(theirs.net)):
        torch.manual_seed(1)
        theirs = NOT_REBUILT[name]()
        randomise(theirs.parameters)
        y, log_det, *gradients = step_of(way(theirs), theirs.parameters, x)
        found.append((y, log_det.expand(6), gradients, list(theirs.net.buffers())))
    assert_close(*found, 1e-12)


def test_a_log_determinant_of_one_number_in_a_list_holds_for_the_batch() -> None:
    theirs, x = sequence(fm.LearnedElementwiseScaling, 2), torch.randn(6, WIDTH)
    randomise(theirs.parameters)
    plain, ours = (step_of(fn, theirs.parameters, x) for fn in (theirs.forward, lowered(theirs.net)))
    assert_close(ours, plain, 1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_memory_is_flat(name: str, no_gc: None) -> None:
    peaks, held = zip(*(memory(name, depth) for depth in (4, 12)), strict=True)
    masks = 8 * sum(buffer.numel() for buffer in NETWORKS[name](12).net.buffers())
    assert held[1] <= 1.05 * held[0] + masks  # small buffers are copied
    assert peaks[1] <= 1.05 * peaks[0]
    assert name in EXPENSIVE or peaks[1] <= 0.4 * plain_peak(name, 12)


def network_on(name: str, depth: int) -> tuple[object, Tensor]:
    """A network whose gradients are there, so that a step makes none, and a batch that outweighs them."""
    torch.manual_seed(0)
    theirs = NETWORKS[name](depth)
    for parameter in theirs.parameters:
        parameter.grad = torch.zeros_like(parameter)
    return theirs, torch.randn(512, WIDTH)


def memory(name: str, depth: int) -> tuple[int, int]:
    """The peak of a lowered step, and what is held between forward and backward."""
    theirs, x = network_on(name, depth)
    fn = partial(inv.log_det, inv.checkpoint(inv.ops.from_transform(theirs.net)))
    return inv.measure(step, fn, x).peak_bytes, inv.measure(fn, x).held_bytes


def plain_peak(name: str, depth: int) -> int:
    """The peak of their step."""
    theirs, x = network_on(name, depth)
    return inv.measure(step, theirs.forward, x).peak_bytes


@pytest.mark.parametrize("name", ["FrEIA RNVP", "nflows spline, LU", "normflows spline, LU", "zuko NSF, couplings"])
def test_a_log_determinant_costs_no_call_of_its_own(name: str) -> None:
    theirs, x = network_on(name, 4)
    plain, ours = (inv.measure(step, fn, x).flops for fn in (theirs.forward, lowered(theirs.net)))
    assert ours <= 2.05 * plain  # an inverse and another forward, of three; zuko's inverse asks its network twice


@pytest.mark.parametrize("name", ["FrEIA GraphINN", "nflows spline, LU", "normflows RealNVP", "zuko NSF, couplings"])
def test_the_laws_hold(name: str) -> None:
    theirs = NETWORKS[name](2)
    laws = ["section", "retraction", "checkpoint_gradients", "checkpoint_twice", "checkpoint_functional"]
    check_laws(inv.ops.from_transform(theirs.net), torch.randn(4, WIDTH), laws=laws)


# ---- conditions ----------------------------------------------------------------------------------------------------


def test_a_context_of_nflows_is_given() -> None:
    layers = [nflows_context_layer() for _ in range(3)]
    net = nflows.transforms.CompositeTransform([*layers, nflows.transforms.InverseTransform(nflows_context_layer())])
    check_given(net, lambda x, c: net(x, context=c), torch.randn(5, WIDTH), torch.randn(5, 3))


def nflows_context_layer() -> nn.Module:
    return nflows.transforms.MaskedAffineAutoregressiveTransform(WIDTH, 16, context_features=3, num_blocks=1)


def test_a_context_of_zuko_is_given() -> None:
    flow = zuko.flows.NSF(WIDTH, context=3, transforms=2, hidden_features=(16,), passes=2)
    check_given(flow, lambda x, c: flow.transform(c).call_and_ladj(x), torch.randn(5, WIDTH), torch.randn(5, 3))


def test_a_flow_of_zuko_and_its_base_read_one_context() -> None:
    theirs, net = zuko.flows.NICE(WIDTH, context=3, transforms=2), nn.Linear(3, WIDTH)
    x, c = torch.randn(5, WIDTH), torch.randn(5, 3)
    op = inv.ops.given(inv.ops.from_transform(theirs))
    z, log_det = theirs.transform(c).call_and_ladj(x)
    found = inv.flow(op, lambda c: Independent(Normal(net(c), 1.0), 1)).log_prob(x, context=c)
    assert_close(found, Normal(net(c), 1.0).log_prob(z).sum(1) + log_det)


def test_samples_of_zuko_with_their_density_train_lowered() -> None:
    theirs, c = zuko.flows.BPF(3, 2, transforms=2, hidden_features=(8,)), torch.randn(5, 2)
    op = inv.ops.given(inv.ops.from_transform(theirs))

    def gradients(wrap: Callable[[inv.Invertible], inv.Invertible]) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        x, log_prob = inv.flow(wrap(op), lambda: theirs.base()).rsample_and_log_prob((2,), context=c)
        return torch.autograd.grad(x.square().sum() + log_prob.sum(), list(theirs.parameters()))

    assert_close(gradients(inv.checkpoint), gradients(lambda op: op), 1e-6)


def test_conditions_of_a_sequence_of_freia_are_given() -> None:
    net = ff.SequenceINN(WIDTH)
    net.append(fm.RNVPCouplingBlock, cond=1, cond_shape=(2,), subnet_constructor=mlp)
    net.append(fm.PermuteRandom, seed=0)
    net.append(fm.GLOWCouplingBlock, cond=0, cond_shape=(3,), subnet_constructor=mlp)
    conditions = torch.randn(5, 3), torch.randn(5, 2)
    check_given(net, lambda x, c: net(x, c=c), torch.randn(5, WIDTH), conditions)


def test_conditions_of_a_graph_of_freia_are_given() -> None:
    first, condition = ff.InputNode(WIDTH), ff.ConditionNode(3)
    block = ff.Node(first, fm.RNVPCouplingBlock, {"subnet_constructor": mlp}, conditions=condition)
    net = ff.GraphINN([first, condition, block, ff.OutputNode(block)])
    check_given(net, lambda x, c: net(x, c=[c]), torch.randn(5, WIDTH), torch.randn(5, 3))


def check_given(net: nn.Module, theirs: object, x: Tensor, condition: object) -> None:
    """Lowered on ``(x, condition)``, a network says what it says on its own, with the condition's gradient."""
    parameters = trained(net)
    randomise(parameters)
    x, given = (
        x.requires_grad_(),
        [c.requires_grad_() for c in (condition if isinstance(condition, tuple) else [condition])],
    )
    op = inv.checkpoint(inv.ops.given(inv.ops.from_transform(net)))
    (y, passed), log_det = inv.log_det(op, (x, condition))
    expected, expected_log_det = theirs(x, condition)
    assert_close((y, log_det, passed), (expected, expected_log_det, condition), 1e-10)
    wrt = [x, *given, *parameters]
    found = torch.autograd.grad(y.square().sum() - log_det.sum(), wrt, allow_unused=True)
    wanted = torch.autograd.grad(expected.square().sum() - expected_log_det.sum(), wrt, allow_unused=True)
    assert_close(found, wanted, 1e-10)
    assert_close(inv.ops.given(inv.ops.from_transform(net)).inverse((y, condition))[0], x, 1e-7)


def test_a_condition_that_is_not_given_is_named() -> None:
    net = ff.SequenceINN(WIDTH)
    net.append(fm.RNVPCouplingBlock, cond=0, cond_shape=(2,), subnet_constructor=mlp)
    with pytest.raises(WireError, match=r"got 0 conditions, expected at least 1; inv\.ops\.given\(op\)"):
        inv.ops.from_transform(net)(torch.randn(5, WIDTH))


# ---- what it is, and what it is not --------------------------------------------------------------------------------


def test_compositions_are_chains() -> None:
    assert len(inv.ops.from_transform(nflows_spline(3).net).parts) == 9
    op = inv.ops.from_transform(NETWORKS["FrEIA RNVP"](2).net)
    block = "from_transform(RNVPCouplingBlock), from_transform(PermuteRandom)"
    assert repr(op) == f"chain({block}, {block})"


def test_a_list_of_layers_is_a_chain() -> None:
    layers = nflows_spline(1).net._transforms
    assert len(inv.ops.from_transform(list(layers)).parts) == len(inv.ops.from_transform(layers).parts) == 3


def test_an_inverted_layer_is_read_backwards() -> None:
    assert repr(inv.ops.from_transform(nflows_maf(2).net)).startswith("chain(invert(from_transform(Masked")


def test_a_graph_with_several_ends_is_an_op_on_tuples() -> None:
    first = ff.InputNode(WIDTH)
    halves = ff.Node(first, fm.Split, {"section_sizes": [3, 5]})
    block = ff.Node((halves, 1), fm.RNVPCouplingBlock, {"subnet_constructor": mlp})
    net = ff.GraphINN([first, halves, block, ff.OutputNode((halves, 0)), ff.OutputNode(block)])
    op, x = inv.ops.from_transform(net), torch.randn(4, WIDTH)
    assert_close(inv.log_det(op, x), net(x), 1e-12)
    assert_close(op.inverse(op(x)), x, 1e-10)


def test_parameters_keep_their_keys_in_lowered() -> None:
    net = NETWORKS["FrEIA RNVP"](2).net
    assert {id(p) for p in inv.nn.Lowered(inv.ops.from_transform(net)).parameters()} == {
        id(p) for p in net.parameters()
    }


def test_a_flow_of_nflows_is_not_a_transform() -> None:
    flow = nflows.flows.Flow(nflows_maf(1).net, nflows.distributions.StandardNormal([WIDTH]))
    with pytest.raises(OptionError, match=re.escape("expected its transform; pass what you gave to Flow(")):
        inv.ops.from_transform(flow)


class NflowsOneWay(nflows.transforms.Transform):
    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs.sinh(), inputs.cosh().log().sum(1)


class NormflowsOneWay(normflows.flows.Flow):
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z.sinh(), z.cosh().log().sum(1)


@pytest.mark.parametrize("kind", [NflowsOneWay, NormflowsOneWay])
def test_a_layer_that_has_no_inverse_is_named_and_trains_where_it_runs_again(kind: Callable[[], nn.Module]) -> None:
    op, x = inv.ops.from_transform(kind()), torch.randn(6, WIDTH, requires_grad=True)
    with pytest.raises(NotInvertibleError, match=r"OneWay\) has no inverse; inv.mark\(op, 'recompute'\) runs it again"):
        inv.checkpoint(op)(x.sin()).sum().backward()
    (found,) = torch.autograd.grad(inv.checkpoint(inv.mark(op, "recompute"))(x.sin()).sum(), x)
    assert_close(found, x.sin().cosh() * x.cos())
