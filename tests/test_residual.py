"""Reversible residual networks: the formula of each scheme, two runs a step, and when the original network is kept."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from catalogue import Block, conv, mlp
from kit import Counted, assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import invfunc as inv
from invfunc import ops
from invfunc.errors import DomainError, NotInvertibleError, OptionError, WireError
from invfunc.look.memory import measure

SCHEMES = "couple", "momentum", "midpoint", "leapfrog"


def streams(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape or (3, 4), requires_grad=True), torch.randn(shape or (3, 4), requires_grad=True)


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_momentum_is_its_formula() -> None:
    f, (x, v) = mlp(4), streams()
    y, w = ops.momentum(f, 0.7)(x, v)
    assert_close(w, 0.7 * v + 0.3 * f(x), 1e-14, relative=0)
    assert_close(y, x + w, 1e-14, relative=0)
    _, total = inv.log_det(ops.momentum(f, 0.7), (x, v))
    torch.testing.assert_close(total, torch.full((3,), 4 * torch.tensor(0.7).log().item()))


def test_midpoint_and_leapfrog_are_their_formulas() -> None:
    f, (before, x) = mlp(4), streams()
    same, after = ops.midpoint(f, 0.3)(before, x)
    assert same is x
    assert_close(after, before + 0.6 * f(x), 1e-14, relative=0)
    same, after = ops.leapfrog(f, 0.3)(before, x)
    assert same is x
    assert_close(after, 2 * x - before + 0.09 * f(x), 1e-14, relative=0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_hyperbolic_is_a_symmetric_layer(dims: int) -> None:
    kernel, bias = torch.randn(5, 2, *[3] * dims), torch.randn(5)
    before, x = streams(2, 2, *[4] * dims)

    def conv_of(t: Tensor) -> Tensor:
        return [F.conv1d, F.conv2d, F.conv3d][dims - 1](t, kernel, bias, padding=1)

    hidden, adjoint = torch.func.vjp(lambda t: conv_of(t) - bias.view(-1, *[1] * dims), x)
    force = -adjoint(torch.relu(conv_of(x)))[0]
    torch.testing.assert_close(ops.hyperbolic(kernel, bias, step=0.5)(before, x)[1], 2 * x - before + force / 4)


@pytest.mark.parametrize(("norm", "stable"), [(1.95, True), (2.05, False)])
def test_a_hyperbolic_step_is_stable_within_its_bound(norm: float, stable: bool) -> None:
    weight = torch.randn(6, 4)
    op = ops.hyperbolic(weight * norm / torch.linalg.matrix_norm(weight, 2), activation=nn.Identity())
    state = tuple(t.detach() for t in streams())
    for _ in range(1000):
        state = op(*state)
    assert (state[1].abs().max().item() < 1e3) is stable


@pytest.mark.parametrize(
    "make",
    [
        lambda f: ops.momentum(f, 0.7),
        lambda f: ops.momentum(f, torch.tensor(0.7, requires_grad=True)),
        lambda f: ops.momentum(f, 0),
        lambda f: ops.midpoint(f, 0.3),
        lambda f: ops.leapfrog(f, 0.3),
        lambda f: ops.reversible_residual(f, "couple"),
    ],
)
def test_f_runs_twice_a_step(make: Callable[[nn.Module], inv.Invertible]) -> None:
    f = Counted(mlp(4))
    a, b = inv.checkpoint(make(f))(*streams())
    (a + b).sum().backward()
    assert f.count == 2


def test_gamma_is_trained() -> None:
    gamma, f = torch.tensor(0.8, requires_grad=True), mlp(4)
    op = inv.chain(*(ops.momentum(f, gamma),) * 5)
    x, v = streams()
    plain, lowered = (torch.autograd.grad(run(x, v)[1].sin().sum(), [gamma, x, v]) for run in (op, inv.checkpoint(op)))
    for a, b in zip(plain, lowered, strict=True):
        assert_close(b, a, 1e-11, relative=0)


def test_the_inverse_of_momentum_amplifies_as_documented() -> None:
    op = inv.chain(*(ops.momentum(mlp(4), 0.9),) * 100)
    x = streams()
    with torch.no_grad():
        back = op.inverse(op(*x))
    drift = max((a - b).abs().max().item() for a, b in zip(back, x, strict=True))
    assert drift < 1e-16 * 0.9**-100 * 1000
    op = inv.chain(*(ops.midpoint(torch.sin, 0.01),) * 100)
    with torch.no_grad():
        back = op.inverse(op(*x))
    assert max((a - b).abs().max().item() for a, b in zip(back, x, strict=True)) < 1e-13


# ---- what is kept --------------------------------------------------------------------------------------------------


def held(make: Callable[[], inv.Invertible], depth: int) -> float:
    """What a lowered chain holds after forward, in activations."""
    op = inv.checkpoint(inv.chain(*(make() for _ in range(depth))))
    x = streams(50, 64)
    return measure(lambda: op(*x)).held_bytes / (50 * 64 * 8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_kept_for_each_step(scheme: str) -> None:
    def make() -> inv.Invertible:
        return ops.reversible_residual(Block(64), scheme)

    held(make, 1)
    assert held(make, 8) <= held(make, 2) + 0.1 <= 2.2


def test_gamma_0_keeps_one_activation_for_each_step() -> None:
    def make() -> inv.Invertible:
        return ops.momentum(mlp(64), 0)

    held(make, 1)
    assert held(make, 12) - held(make, 2) == pytest.approx(10, abs=0.2)


# ---- existing blocks ---------------------------------------------------------------------------------------------


class Zero(Block):
    """A block whose last layer is zero at initialisation."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)


def network(blocks: list[nn.Module], scheme: str, build: object = None) -> inv.Invertible:
    """A residual network, reversible."""
    steps = [ops.reversible_residual(block, build or scheme) for block in blocks]  # type: ignore[arg-type]
    return inv.chain(ops.enter_streams(scheme), *steps, ops.leave_streams(scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_branches_keep_the_network(scheme: str) -> None:
    blocks, x = [Zero(4) for _ in range(5)], torch.randn(3, 4)
    assert_close(network(blocks, scheme)(x), nn.Sequential(*blocks)(x), 1e-14, relative=0)


def test_zero_branches_keep_the_network_of_two_kinds_of_blocks() -> None:
    attention, feed_forward, x = Zero(4), Zero(4), torch.randn(3, 4)
    op = ops.reversible_residual((attention, feed_forward), "couple")
    net = inv.chain(ops.enter_streams("couple"), op, op, ops.leave_streams("couple"))
    assert_close(net(x), x, 1e-14, relative=0)


def test_gamma_0_keeps_the_network_always() -> None:
    blocks, x = [Block(4) for _ in range(5)], torch.randn(3, 4, requires_grad=True)
    net, plain = network(blocks, "momentum", partial(ops.momentum, gamma=0)), nn.Sequential(*blocks)
    assert_close(net(x), plain(x), 1e-14, relative=0)
    inputs = [x, *plain.parameters()]
    found = torch.autograd.grad(inv.checkpoint(net)(x).sin().sum(), inputs)
    for a, b in zip(found, torch.autograd.grad(plain(x).sin().sum(), inputs), strict=True):
        assert_close(a, b, 1e-12, relative=0)
    with pytest.raises(NotInvertibleError, match="overwrite.* needs its residue for the inverse"):
        inv.invert(ops.momentum(blocks[0], 0))(x, x)


def test_small_gamma_is_off_in_proportion() -> None:
    blocks, x = [Block(4) for _ in range(5)], torch.randn(3, 4)
    plain = nn.Sequential(*blocks)(x)

    def off(gamma: float) -> float:
        return (network(blocks, "momentum", partial(ops.momentum, gamma=gamma))(x) - plain).abs().max().item()

    assert off(1e-5) / off(1e-6) == pytest.approx(10, rel=0.01)


def test_couple_keeps_the_first_block_and_no_later_one() -> None:
    blocks, x = [Block(4) for _ in range(2)], torch.randn(3, 4)
    assert_close(network(blocks[:1], "couple")(x), blocks[0](x), 1e-14, relative=0)
    assert (network(blocks, "couple")(x) - nn.Sequential(*blocks)(x)).abs().max() > 1e-2


def test_the_branch_of_a_block_is_its_residual_method_or_the_difference() -> None:
    class Own(Block):
        def residual(self, x: Tensor) -> Tensor:
            return self.net(x)

    own, block, x = Own(4), Block(4), torch.randn(3, 4)
    assert torch.equal(ops.residual_branch(own)(x), own.net(x))
    assert_close(ops.residual_branch(block)(x), block.net(x), 1e-14, relative=0)
    gradients = torch.autograd.grad(inv.checkpoint(ops.reversible_residual(own))(x, x)[1].sum(), own.parameters())
    assert all(g.abs().sum() > 0 for g in gradients)


def test_an_existing_transformer_trains_reversibly() -> None:
    layers = [nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True) for _ in range(3)]
    x = torch.randn(2, 5, 8, requires_grad=True)
    net = inv.chain(
        ops.enter_streams(),
        ops.reversible_residual(layers[0], "couple"),
        *(ops.reversible_residual(layer, "midpoint") for layer in layers[1:]),
        ops.leave_streams(),
    )
    inputs = [x, *(p for layer in layers for p in layer.parameters())]
    plain, lowered = (torch.autograd.grad(run(x).sin().sum(), inputs) for run in (net, inv.checkpoint(net)))
    for a, b in zip(plain, lowered, strict=True):
        assert_close(b, a, 1e-10, relative=0)


def test_a_convolutional_block() -> None:
    net = conv(2)
    op = ops.reversible_residual(lambda x: x + net(x), "leapfrog")
    x = streams(2, 2, 4, 4)
    for a, b in zip(op.inverse(op(*x)), x, strict=True):
        assert_close(a, b, 1e-13, relative=0)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ops.momentum(torch.sin, 1.5),
            OptionError,
            "momentum: gamma is 1.5, expected a number between 0 and 1",
        ),
        (
            lambda: ops.hyperbolic(torch.zeros(3)),
            OptionError,
            r"hyperbolic: weight is \(3,\), expected \(hidden, channels, \*kernel\)",
        ),
        (
            lambda: ops.hyperbolic(torch.zeros(5, 4), torch.zeros(4)),
            OptionError,
            r"hyperbolic: the bias, expected \(5,\), got \(4,\)",
        ),
        (
            lambda: ops.hyperbolic(torch.zeros(5, 3))(*streams()),
            WireError,
            r"hyperbolic: the input, expected size 3 along dim -1, got \(3, 4\)",
        ),
        (
            lambda: ops.hyperbolic(torch.zeros(5, 3, 3))(*streams(2, 4, 5)),
            WireError,
            r"hyperbolic: the input, expected size 3 along dim 1, got \(2, 4, 5\)",
        ),
        (
            lambda: ops.reversible_residual(torch.sin, "euler"),
            OptionError,
            "reversible_residual: scheme is 'euler', expected one of 'couple', 'momentum', 'midpoint', 'leapfrog', or",
        ),
        (
            lambda: ops.reversible_residual((torch.sin, torch.cos), "midpoint"),
            OptionError,
            "reversible_residual: 2 blocks with scheme 'midpoint', expected two, with 'couple'",
        ),
        (lambda: ops.enter_streams("euler"), OptionError, "enter_streams: scheme is 'euler', expected one of 'couple'"),
        (lambda: ops.leave_streams("euler"), OptionError, "leave_streams: scheme is 'euler', expected one of 'couple'"),
        (
            lambda: ops.reversible_residual(mlp(4, 3))(*streams()),
            WireError,
            r"block Sequential returned \(3, 3\), expected \(3, 4\): x \+ f\(x\) of its input x",
        ),
        (
            lambda: ops.leapfrog(mlp(4, 1))(*streams()),
            WireError,
            r"f returned \(3, 1\), expected \(3, 4\) like its input",
        ),
        (
            lambda: ops.midpoint(mlp(4, 3))(*streams()),
            WireError,
            r"f returned \(3, 3\), expected \(3, 4\) like its partner",
        ),
        (lambda: inv.invert(ops.leave_streams())(torch.zeros(1)), NotInvertibleError, "one_way.* has no inverse"),
    ],
)
def test_errors(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("call", [inv.Invertible.forward, inv.Invertible.inverse, inv.log_det])
def test_debug_finds_a_gamma_of_zero(call: Callable[..., object]) -> None:
    op, state = ops.momentum(torch.sin, torch.tensor([0.5, 0.0])), streams(3, 2)
    call(op, state)
    with inv.debug(True), pytest.raises(DomainError, match="momentum's gamma received .* a gamma that is nowhere 0"):
        call(op, state)
