"""Residual steps on a grid: the published formula, exact for any depth, at the bits that it says."""

from functools import partial

import pytest
import torch
from catalogue import mlp
from kit import assert_close, assert_refused
from torch import Tensor

import invfunc as inv
from invfunc import ops
from invfunc.errors import OptionError, WireError
from invfunc.look.memory import measure

DRAWN = (0.5, -0.5), (0.25, -0.5)
FIXED = 0.5, -0.5, -0.25, 2.0**-5


def positions(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    a, b = torch.randn(4, 6, 8, dtype=dtype, requires_grad=True), torch.randn(4, 6, 8, dtype=dtype)
    return ops.on_grid(a), ops.on_grid(b)


def test_on_grid_rounds_and_lets_the_gradient_through() -> None:
    x = torch.randn(1000, requires_grad=True)
    y = ops.on_grid(x, 0.25)
    assert torch.equal(y, torch.round(x * 4) / 4)
    assert torch.autograd.grad(y.sum(), x)[0].eq(1).all()


@pytest.mark.parametrize("gamma", [0.5, -0.5])
def test_a_step_is_the_published_one(gamma: float) -> None:
    f, (before, x) = mlp(8), positions()
    same, after = ops.bdia(f, gamma)(before, x)
    odd = torch.remainder(before * 2**9, 2)
    assert same is x
    assert torch.equal(after, gamma * (before - odd / 2**9) + ops.on_grid((1 - gamma) * x + (1 + gamma) * f(x)))


def test_each_sample_has_a_gamma_and_their_mean_is_the_residual_network() -> None:
    op, (before, x) = ops.bdia(torch.sin, spacing=2.0**-40), positions()
    torch.manual_seed(0)
    mean = torch.stack([op(before, x)[1] for _ in range(2000)]).mean(0)
    assert_close(mean, x + x.sin(), 0.1)
    moved = (op(before, x)[1] - x - x.sin()) / (before - x + x.sin())
    assert_close(moved.abs(), torch.full_like(moved, 0.5), 1e-6)
    assert torch.equal(moved.sign(), moved[:, :1, :1].sign().expand_as(moved))


@pytest.mark.parametrize("gamma", FIXED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_undone_to_the_bit_for_any_depth(gamma: float, dtype: torch.dtype) -> None:
    op, x = inv.chain(*[ops.bdia(mlp(8).to(dtype), gamma)] * 64), positions(dtype)
    with torch.no_grad():
        y, bits = op.forward_with_residue(x)
        assert all(map(torch.equal, op.inverse_with_residue(bits, y), x))


@pytest.mark.parametrize("gammas", [*FIXED, *DRAWN])
def test_a_lowered_step_has_the_bits_of_the_stored_one(gammas: float | tuple[float, ...]) -> None:
    fs = [mlp(8) for _ in range(24)]
    net, x = inv.chain(*(ops.bdia(f, gammas) for f in fs)), torch.randn(4, 6, 8, requires_grad=True)

    def step(net: inv.Invertible) -> list[Tensor]:
        torch.manual_seed(3)
        q = ops.on_grid(x)
        y = net(q, q)
        return list(torch.autograd.grad((y[0].square() + y[1]).sum(), [x, *(p for f in fs for p in f.parameters())]))

    assert all(map(torch.equal, step(inv.checkpoint(net)), step(net)))


@pytest.mark.parametrize(("gammas", "bits"), [((0.5, -0.5), 1), (0.125, 3)])
def test_what_is_kept_is_these_bits(gammas: float | tuple[float, ...], bits: int) -> None:
    held = []
    for depth in (8, 24):
        x = tuple(t.detach().requires_grad_() for t in positions())
        net = inv.checkpoint(inv.chain(*[ops.bdia(torch.sin, gammas)] * depth))
        held.append(measure(net, *x).held_bytes)
    assert held[1] - held[0] <= 16 * (bits * x[0].numel() // 8 + 64)


def test_below_transforms() -> None:
    net, x = inv.chain(*[ops.bdia(torch.sin, 0.5)] * 4), torch.randn(3, 4, requires_grad=True)

    def loss(net: inv.Invertible, x: Tensor) -> Tensor:
        q = ops.on_grid(x)
        return net(q, q)[1].square().sum()

    (expected,) = torch.autograd.grad(loss(net, x), x)
    assert_close(torch.func.grad(partial(loss, inv.checkpoint(net)))(x.detach()), expected)


def test_hamiltonian_is_its_formula() -> None:
    f, g, (q, p) = mlp(8), mlp(8), positions()
    a, b = ops.hamiltonian(f, g, 0.3)(q, p)
    assert_close(a, q + 0.3 * f(p))
    assert_close(b, p + 0.3 * g(a))
    assert_close((~ops.hamiltonian(f, g, 0.3))(a, b), (q, p))


def test_what_is_no_power_of_two_is_refused() -> None:
    message = "bdia: gamma is 0.3, expected a power of two from 2^-8 to 2^-1"
    assert_refused(OptionError, message, lambda: ops.bdia(torch.sin, 0.3))
    assert_refused(OptionError, "bdia: gamma is 1, expected", lambda: ops.bdia(torch.sin, 1))
    message = "bdia: batch_dim is -1, expected 0, 1, 2, ..."
    assert_refused(OptionError, message, lambda: ops.bdia(torch.sin, batch_dim=-1))
    assert_refused(OptionError, "bdia: gammas is empty, expected one number or more", lambda: ops.bdia(torch.sin, ()))
    message = "bdia: spacing is 0.1, expected a power of two from 2^-52 to 2^-0"
    assert_refused(OptionError, message, lambda: ops.bdia(torch.sin, spacing=0.1))


def test_half_precision_and_other_shapes_are_refused() -> None:
    message = "on_grid received float16, expected float32 or float64; keep the stream in float32: autocast computes the"
    assert_refused(WireError, message, lambda: ops.on_grid(torch.ones(1, dtype=torch.float16)))
    message = "f returned (4,), expected (3, 4) like its input"
    x = torch.zeros(3, 4)
    assert_refused(WireError, message, lambda: ops.bdia(lambda x: x[0])(x, x), anywhere=True)
