"""Bit-exact inverses: every comparison is of raw bits, with plain autograd of networks that are written out here."""

from collections.abc import Callable

import pytest
import torch
from exact_networks import (
    BF16,
    F16,
    F32,
    F64,
    Mlp,
    Modules,
    Spy,
    affine,
    batch,
    nets,
    plain,
    plain_on_grid,
    same_bits,
    step,
)
from kit import network
from torch import Tensor, nn

import invfunc as inv


def assert_exact(op: inv.Invertible, oracle: Callable[[Tensor], Tensor], fs: Modules, x: Tensor) -> None:
    expected = step(oracle, fs, x)
    assert same_bits(step(op, fs, x), expected)
    assert same_bits(step(inv.checkpoint(op), fs, x), expected)


def check_grid(depth: int, net: torch.dtype, carrier: torch.dtype, k: int) -> None:
    fs = nets(2 * depth, lambda: Mlp(8), net)
    assert_exact(inv.exact(network(fs)), lambda x: plain_on_grid(fs, x, carrier, k), fs, batch(4, 16, dtype=net))


def check_codes(depth: int, dtype: torch.dtype, is_affine: bool, pack: bool = False) -> None:
    fs = nets(2 * depth, lambda: Mlp(8, 16 if is_affine else 8), dtype)
    if is_affine:
        op, law = inv.chain(inv.split(2), *_affine_blocks(fs), inv.concat(2)), affine
    else:
        op, law = network(fs), lambda x, t: x + t
    oracle = lambda x: plain(fs, x, law=law)  # noqa: E731
    assert_exact(inv.exact(op, "codes", pack=pack), oracle, fs, batch(4, 16, dtype=dtype))


def _affine_blocks(fs: Modules) -> list[inv.Invertible]:
    def exp_tanh(f: nn.Module) -> Callable:
        return inv.ops.tanh_scale(f, 1.0)

    return [inv.couple(exp_tanh(f), exp_tanh(g), law=inv.affine) for f, g in zip(fs[::2], fs[1::2], strict=True)]


GRIDS = [(BF16, F32, 14), (F16, F32, 14), (F32, F64, 32), (F64, F64, 32)]


@pytest.mark.parametrize("net, carrier, k", GRIDS)
def test_on_a_grid_gradients_have_the_bits_of_plain_autograd(net, carrier, k):
    check_grid(20, net, carrier, k)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("is_affine", [False, True])
def test_with_codes_gradients_have_the_bits_of_plain_autograd(dtype, is_affine):
    check_codes(12, dtype, is_affine)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_packed_codes_are_exact(dtype):
    check_codes(12, dtype, True, pack=True)


@pytest.mark.exact
@pytest.mark.parametrize("net, carrier, k", GRIDS[::2])
def test_a_grid_is_exact_at_depth_1000(net, carrier, k):
    check_grid(1000, net, carrier, k)


@pytest.mark.exact
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_codes_are_exact_at_depth_1000(dtype):
    check_codes(1000, dtype, False)


@pytest.mark.exact
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_affine_codes_are_exact_at_depth_512(dtype):
    check_codes(512, dtype, True)


def test_without_exact_they_drift():
    fs = nets(40, lambda: Mlp(8), F32)
    x = batch(4, 16)
    drifting = inv.checkpoint(network(fs), drift="off")
    assert not same_bits(step(drifting, fs, x), step(lambda x: plain(fs, x), fs, x))


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_every_state_is_rebuilt_bit_for_bit_and_every_function_runs_twice(mode):
    fs = nets(16, lambda: Spy(Mlp(8)), F32)
    step(inv.checkpoint(inv.exact(network(fs), mode)), fs, batch(4, 16))
    assert all(len(f.given) == 2 for f in fs)
    assert all(same_bits(f.given[:1], f.given[1:]) for f in fs)


def losses(fs: Modules, call: Callable[[Tensor], Tensor], steps: int) -> list[Tensor]:
    torch.manual_seed(2)
    x, target = batch(16, 16, dtype=BF16), batch(16, 16, dtype=BF16)
    optimizer = torch.optim.Adam([p for f in fs for p in f.parameters()], 1e-3)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (call(x) - target).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found


def check_training(blocks: int, steps: int, seed: int) -> None:
    def trained(make_call: Callable[[Modules], Callable]) -> list[Tensor]:
        torch.manual_seed(seed)
        fs = [Mlp(8).to(BF16) for _ in range(2 * blocks)]
        return losses(fs, make_call(fs), steps)

    expected = trained(lambda fs: lambda x: plain(fs, x))
    assert expected[-1] < expected[0]
    assert same_bits(trained(lambda fs: inv.checkpoint(inv.exact(network(fs), "codes"))), expected)


def test_the_training_curve_is_that_of_the_plain_network():
    check_training(blocks=6, steps=6, seed=0)


@pytest.mark.exact
@pytest.mark.parametrize("seed", range(3))
def test_the_training_curve_of_64_blocks_is_that_of_the_plain_network(seed):
    check_training(blocks=64, steps=60, seed=seed)
