"""The flow networks of other libraries, by name and depth; what each says of x; and the table of peaks.

python tests/stack/flows.py     # prints the table of docs/how-to/wrap-a-flow.md
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import FrEIA.framework as ff
import FrEIA.modules as fm
import normflows
import torch
import zuko
from nflows.nn.nets import ResidualNet
from nflows.transforms import base, coupling, lu, permutations
from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform
from torch import Tensor, nn

import invfunc as inv

WIDTH = 8

Both = tuple[Any, Tensor]  # a value, and its log-determinant


class Theirs(NamedTuple):
    """A network, and what it says in both directions."""

    net: Any
    forward: Callable[[Tensor], Both]
    inverse: Callable[[Any], Both]

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return trained(self.net)


def trained(net: nn.Module) -> list[Tensor]:
    """Its parameters; FrEIA registers permutations as some that are not trained."""
    return [p for p in net.parameters() if p.requires_grad]


def mlp(inputs: int, outputs: int) -> nn.Module:
    """A subnet, as FrEIA makes one."""
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


# ---- FrEIA ---------------------------------------------------------------------------------------------------------


def sequence(block: Callable[..., Any], depth: int, **options: Any) -> Theirs:
    """A `SequenceINN` of equal blocks with permutations between them."""
    net = ff.SequenceINN(WIDTH)
    for i in range(depth):
        net.append(block, **options)
        net.append(fm.PermuteRandom, seed=i)
    net.to(torch.get_default_dtype())  # AllInOneBlock says float32 of its own
    return Theirs(net, lambda x: per_sample(net(x)), lambda y: per_sample(net(y, rev=True)))


def per_sample(both: Any) -> Both:
    """NICE and GIN say 0.0 for the whole batch."""
    y, log_det = both
    return y, torch.as_tensor(log_det, dtype=y.dtype).expand(len(y))


def graph(depth: int) -> Theirs:
    """A `GraphINN` that branches: two streams of which one waits, each with its own blocks, and then one."""
    first = ff.InputNode(WIDTH, name="x")
    parts = ff.Node(first, fm.Split, {"section_sizes": [4, 4]}, name="split")
    left, right = (parts, 0), (parts, 1)
    nodes = [first, parts]
    for i in range(depth):
        nodes.append(ff.Node(left, fm.RNVPCouplingBlock, {"subnet_constructor": mlp}, name=f"left {i}"))
        nodes.append(ff.Node(right, fm.GLOWCouplingBlock, {"subnet_constructor": mlp}, name=f"right {i}"))
        left, right = (nodes[-1], 0), (nodes[-2], 0)
    nodes.append(ff.Node([left, right], fm.Concat, {}, name="concat"))
    nodes.append(ff.OutputNode(nodes[-1], name="y"))
    net = ff.GraphINN(nodes)
    return Theirs(net, net, lambda y: net(y, rev=True))


# ---- nflows --------------------------------------------------------------------------------------------------------


def nflows_spline(depth: int) -> Theirs:
    """Rational-quadratic couplings, LU layers and permutations."""
    mask = torch.arange(WIDTH) % 2
    layers = []
    for _ in range(depth):
        layers.append(
            coupling.PiecewiseRationalQuadraticCouplingTransform(
                mask, lambda i, o: ResidualNet(i, o, 16, num_blocks=1), num_bins=4, tails="linear", tail_bound=3.0
            )
        )
        layers += [lu.LULinear(WIDTH), permutations.RandomPermutation(WIDTH)]
    net = base.CompositeTransform(layers)
    return Theirs(net, net, net.inverse)


def nflows_maf(depth: int) -> Theirs:
    """Masked autoregressive layers, one of them read backwards."""
    layers = [MaskedAffineAutoregressiveTransform(WIDTH, 16, num_blocks=1) for _ in range(depth)]
    net = base.CompositeTransform([base.InverseTransform(layers[0]), *layers[1:]])
    return Theirs(net, net, net.inverse)


# ---- normflows -----------------------------------------------------------------------------------------------------


def normflows_spline(depth: int) -> Theirs:
    """Coupled splines and LU permutations."""
    kind = normflows.flows.CoupledRationalQuadraticSpline
    layers = [
        layer
        for _ in range(depth)
        for layer in (kind(WIDTH, 1, 16, num_bins=4), normflows.flows.LULinearPermute(WIDTH))
    ]
    net = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(WIDTH), layers)
    return Theirs(net, net.forward_and_log_det, net.inverse_and_log_det)


def normflows_real_nvp(depth: int) -> Theirs:
    """Affine couplings with splits and merges inside, and activation normalisation."""
    layers: list[Any] = []
    for _ in range(depth):
        layers.append(normflows.flows.AffineCouplingBlock(normflows.nets.MLP([4, 16, 8]), scale_map="sigmoid"))
        layers += [normflows.flows.Permute(WIDTH, mode="swap"), normflows.flows.ActNorm((WIDTH,))]
    net = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(WIDTH), layers)
    with torch.no_grad():
        net.forward_and_log_det(torch.randn(8, WIDTH))  # its normalisation initialises itself
    return Theirs(net, net.forward_and_log_det, net.inverse_and_log_det)


# ---- zuko ----------------------------------------------------------------------------------------------------------


def lazy(flow: zuko.flows.Flow) -> Theirs:
    """A flow of zuko, which makes its transform in each call."""

    def inverse(y: Tensor) -> Both:
        return flow.transform().inv.call_and_ladj(y)

    return Theirs(flow, lambda x: flow.transform().call_and_ladj(x), inverse)


Make = Callable[[int], Theirs]

NETWORKS: dict[str, Make] = {
    "FrEIA NICE": lambda depth: sequence(fm.NICECouplingBlock, depth, subnet_constructor=mlp),
    "FrEIA RNVP": lambda depth: sequence(fm.RNVPCouplingBlock, depth, subnet_constructor=mlp),
    "FrEIA GLOW": lambda depth: sequence(fm.GLOWCouplingBlock, depth, subnet_constructor=mlp),
    "FrEIA GIN": lambda depth: sequence(fm.GINCouplingBlock, depth, subnet_constructor=mlp),
    "FrEIA AllInOne": lambda depth: sequence(fm.AllInOneBlock, depth, subnet_constructor=mlp, permute_soft=False),
    "FrEIA GraphINN": graph,
    "nflows spline, LU": nflows_spline,
    "nflows MAF": nflows_maf,
    "normflows spline, LU": normflows_spline,
    "normflows RealNVP": normflows_real_nvp,
    "zuko NSF": lambda depth: lazy(zuko.flows.NSF(WIDTH, transforms=depth, hidden_features=(16,), bins=4)),
    "zuko NSF, couplings": lambda depth: lazy(
        zuko.flows.NSF(WIDTH, transforms=depth, hidden_features=(16,), bins=4, passes=2)
    ),
    "zuko MAF": lambda depth: lazy(zuko.flows.MAF(WIDTH, transforms=depth, hidden_features=(16,))),
    "zuko NICE": lambda depth: lazy(zuko.flows.NICE(WIDTH, transforms=depth, hidden_features=(16,))),
}


def step(forward: Callable[[Tensor], Both], x: Tensor) -> Both:
    """A training step: the negative log-likelihood under a normal base, and its gradients."""
    y, log_det = forward(x)
    (y.square().sum() / 2 - log_det.sum()).backward()
    return y.detach(), log_det.detach()


def lowered(net: Any) -> Callable[[Tensor], Both]:
    """Value and log-determinant of a network that `from_transform` has taken apart, at flat memory."""
    op = inv.checkpoint(inv.ops.from_transform(net))
    return lambda x: inv.log_det(op, x)


def row(name: str, batch: int = 4096, depths: tuple[int, int] = (4, 16)) -> list[str]:
    """A row of the table: the peaks of a step in inputs, plain and lowered, and the flops at the greater depth."""
    peaks: list[tuple[float, float]] = []
    flops = 0.0
    for depth in depths:
        torch.manual_seed(0)
        theirs, x = NETWORKS[name](depth), torch.randn(batch, WIDTH)
        for parameter in theirs.parameters:
            parameter.grad = torch.zeros_like(parameter)
        plain, ours = (inv.measure(step, fn, x) for fn in (theirs.forward, lowered(theirs.net)))
        size = x.untyped_storage().nbytes()
        peaks.append((plain.peak_bytes / size, ours.peak_bytes / size))
        flops = ours.flops / plain.flops
    (plain_4, ours_4), (plain_16, ours_16) = peaks
    return [name, f"{plain_4:.0f}, {plain_16:.0f}", f"{ours_4:.0f}, {ours_16:.0f}", f"{flops:.2f}"]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| network | plain: depth 4, 16 | lowered: depth 4, 16 | flops |\n|---|--:|--:|--:|")
    for name in NETWORKS:
        print(f"| {' | '.join(row(name))} |", flush=True)


if __name__ == "__main__":
    main()
