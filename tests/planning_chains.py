"""Chains that plans are tried on, by the tests and by the benchmark."""

import gc
import math
from itertools import product

import torch
from torch import nn

import invfunc as inv
from invfunc.commands.demo import Setting, network
from invfunc.errors import OptionError
from invfunc.look.memory import measure
from invfunc.plan import Costs, OpCosts, Plan
from invfunc.plan.clock import Clock, timed
from invfunc.plan.executor import flat_ops, has_inverse
from invfunc.plan.inputs import as_input
from invfunc.plan.profiling import Profiler, mean_square
from invfunc.plan.schedule import predict
from invfunc.plan.search import Limits, best, least
from invfunc.plan.trials import parameters_of
from invfunc.plan.value import distance, gradients, verified


def homogeneous(count: int, lossy: int = 0, tape: int = 4000) -> Costs:
    """Ops of b = 2u, c = 1.07 (u + b); every lossy-th one without inverse."""
    op = OpCosts(
        "op", 1.0, 2.0, 3.21, bytes=1000, gradient=1000, tape=tape, holds_input=(1000,), holds_output=(0,),
        peak_forward=1000, peak_taped=1000 + tape, peak_backward=1000 + tape, peak_inverse=3000 + tape,
    )  # fmt: skip
    one_way = OpCosts(**{**vars(op), "inverse": math.inf})
    return Costs(tuple(one_way if lossy and i % lossy == 0 else op for i in range(count)), input_bytes=1000)


class Noisy(nn.Module):
    """Dropout and running statistics: what has to be the same again when it runs again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x):
        return torch.nn.functional.dropout(self.norm(self.linear(x)), 0.3)


def make_op(kind: str, width: int):
    half = width // 2
    if kind == "couple":
        return inv.chain(inv.split(2), inv.couple(mlp(half), mlp(half)), inv.concat(2))
    if kind == "affine":
        return inv.chain(
            inv.split(2), inv.couple(inv.ops.tanh_scale(nn.Linear(half, width)), law=inv.affine), inv.concat(2)
        )
    if kind == "closure":
        weight = nn.Parameter(0.1 * torch.randn(half, half))
        return inv.chain(inv.split(2), inv.couple(lambda x: torch.tanh(x @ weight)), inv.swap(), inv.concat(2))
    if kind == "exp":
        return inv.chain(inv.pair(torch.tanh, torch.atanh), inv.pair(torch.sinh, torch.asinh))
    if kind == "flip":
        return inv.pair(lambda x: x.flip(1), lambda y: y.flip(1), name="flip")
    if kind == "noisy":
        return Noisy(width)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh())


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def permutation(width: int):
    order = torch.randperm(width)
    back = order.argsort()
    return inv.pair(lambda x: x[:, order], lambda y: y[:, back], name="permute")


def residual(width: int):
    g = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    for p in g.parameters():
        p.data.mul_(0.3)

    def inverse(y):
        x = y
        for _ in range(30):
            x = y - g(x)
        return x

    return inv.pair(lambda x: x + g(x), inverse, name="i-ResNet")


def dense(width: int):
    weight = nn.Parameter(torch.eye(width) + 0.05 * torch.randn(width, width))
    return inv.ops.linear(weight)


def mixed(width: int = 32):
    """The study's chain: 11 couplings, 6 permutations, 2 dense linears, 2 i-ResNets, 3 one-way blocks."""

    def block():
        return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    makers = {"C": lambda: make_op("couple", width), "P": lambda: permutation(width), "D": lambda: dense(width)}
    makers |= {"I": lambda: residual(width), "L": block}
    return inv.chain(*[makers[letter]() for letter in "CPCPDCICPLCPCDCPLCICPCLC"])


def demo(depth: int, dtype: torch.dtype = torch.float32):
    """The network of ``python -m invfunc demo``."""
    return network(depth, Setting(dtype=dtype))


def given_seconds(op, x, invertible, again):
    """A clock of the profiler that measures nothing, so that plans are the same everywhere."""
    size = 1.0 if "Sequential" in repr(op) else 0.1
    given = {"forward": size, "idle": 0.0, "step": 3 * size, "again": 4 * size + 0.1, "idle, carried": 0.0}
    undone = {"undone": (41.0 if "i-ResNet" in repr(op) else 4.2) * size} if invertible else {}
    with torch.no_grad():
        return as_input(op.forward(x)), given | undone


def profile(op, x, **options) -> Costs:
    """`invfunc.plan.profile`, by the seconds that are given."""
    return Profiler(clock=given_seconds, **options).costs(op, x)


def fake_costs(op) -> Costs:
    return Costs(tuple(OpCosts("op", 1.0, 1.0, 1.0 if has_inverse(o) else math.inf) for o in flat_ops(op)))


def weights_of(op, x):
    found, value = {}, x.detach()
    for part in flat_ops(op):
        found |= {id(t): t for t in parameters_of(part, value)}
        value = part(value)
    return list(found.values())


def step(op, x, weights, of=None):
    torch.manual_seed(0)
    norms = [
        m for part in flat_ops(of or op) for fn in part.functions if isinstance(fn, nn.Module) for m in fn.modules()
    ]
    norms = [m for m in norms if isinstance(m, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
    x = x.detach().requires_grad_()
    y = op(x)
    gradients = torch.autograd.grad(y.square().mean(), [x, *weights])
    return [y.detach(), *gradients, torch.rand(1), *[norm.running_mean.clone() for norm in norms]]


def peak_of(op, x, weights) -> int:
    def train():
        y = op(x)
        torch.autograd.backward(y.square().mean())

    for tensor in [x, *weights]:
        tensor.grad = torch.zeros_like(tensor)
    gc.collect()
    gc.disable()
    try:
        return measure(train).peak_bytes
    finally:
        gc.enable()


# ---- chains whose inverses round, for the limit on gradient errors ----


def affine_block(width: int, gain: float, scale) -> inv.Invertible:
    net = nn.Sequential(nn.Linear(width // 2, width), nn.Tanh(), nn.Linear(width, width))
    return inv.chain(inv.split(2), inv.couple(scale(louder(net, gain)), law=inv.affine), inv.swap(), inv.concat(2))


def additive_block(width: int, gain: float) -> inv.Invertible:
    f, g = (louder(mlp(width // 2), gain) for _ in range(2))
    return inv.chain(inv.split(2), inv.couple(f, g), inv.concat(2))


def louder(net: nn.Sequential, gain: float) -> nn.Sequential:
    with torch.no_grad():
        net[-1].weight *= gain
    return net


def stretch(width: int, decades: float) -> inv.Invertible:
    """A dense linear map of this condition number."""
    q, _ = torch.linalg.qr(torch.randn(width, width))
    return inv.ops.linear(nn.Parameter(q * torch.logspace(decades / 2, -decades / 2, width)))


ROUNDING = {
    "affine, bounded scales": lambda: inv.chain(*[affine_block(16, 1.0, inv.ops.tanh_scale) for _ in range(16)]),
    "affine, bounded scales, expansive": lambda: inv.chain(
        *[affine_block(16, 3.0, inv.ops.tanh_scale) for _ in range(32)]
    ),
    "affine, exponential scales": lambda: inv.chain(*[affine_block(16, 1.0, inv.ops.exp_scale) for _ in range(16)]),
    "additive, deep": lambda: inv.chain(*[additive_block(16, 1.0) for _ in range(24)]),
    "additive, expansive": lambda: inv.chain(*[additive_block(16, 3.0) for _ in range(32)]),
    "dense linears": lambda: inv.chain(*[make() for _ in range(8) for make in (stretched, added)]),
    "mixed": lambda: mixed(16),
}


def stretched() -> inv.Invertible:
    return stretch(16, 1.0)


def added() -> inv.Invertible:
    return additive_block(16, 1.0)


LIMITS = [1e-3, 1e-4, 1e-5, 1e-6]  # of the gradient error
SHARES = [1.1, 1.5]  # of the least memory that inverses which may round allow


def new_errors(make, shares=SHARES, limits=LIMITS, clock: Clock = timed):
    """``((share, limit), error)`` for all that can be met: plans from one batch, gradients of another."""
    torch.manual_seed(0)
    f, seen, new = make(), torch.randn(256, 16).requires_grad_(), torch.randn(256, 16).requires_grad_()
    costs, weights = Profiler(errors=True, clock=clock).costs(f, seen), weights_of(f, new)
    exact = gradients(f, new, mean_square, weights)
    bound = predict(costs, least(costs)).peak_bytes
    for share, limit in product(shares, limits):
        asked = Limits(int(share * bound), None, limit)
        try:
            plan = verified(Plan(best(costs, asked), costs, asked, f), f, seen, mean_square)
        except OptionError:
            continue  # not in this memory
        yield (share, limit), distance(gradients(inv.checkpoint(f, plan=plan), new, mean_square, weights), exact)
