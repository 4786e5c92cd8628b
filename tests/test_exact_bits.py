"""The codes of `exact`: how many bytes they take, and that they correct any guess of any bit pattern."""

import pytest
import torch
from exact_networks import BF16, F16, F32, F64, Mlp, batch, nets, same_bits
from kit import network
from torch import Tensor

import invfunc as inv
from invfunc.core.packing import pack_codes, unpack_codes
from invfunc.exact.bits import bit_hash, bits_of, corrected, difference, from_bits

# ---- what is kept ----


def kept_bytes(op: inv.Invertible, x: Tensor | tuple[Tensor, ...]) -> int:
    residue = torch.utils._pytree.tree_leaves(op.forward_with_residue(x)[1])
    return sum(t.numel() * t.element_size() for t in residue if isinstance(t, Tensor))


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_packed_codes_take_a_third_of_a_byte(dtype):
    """Per element and half coupling, where a block moves the stream by a third of its size."""
    x = 3 * batch(1 << 12, 16, dtype=dtype), 3 * batch(1 << 12, 16, dtype=dtype)
    f, g = (lambda x, w=w: x @ w for w in (batch(16, 16, dtype=dtype) / 12 for _ in range(2)))
    changed = 2 * x[0].numel()
    assert kept_bytes(inv.exact(inv.couple(f, g), "codes", pack=True), x) / changed <= 0.35
    assert kept_bytes(inv.exact(inv.couple(f, g), "codes"), x) / changed <= 1.05


def test_packed_codes_of_a_normalised_network_take_a_third_of_a_byte():
    fs = nets(32, lambda: Mlp(32), BF16)
    op = inv.exact(network(fs), "codes", pack=True)
    assert kept_bytes(op, batch(256, 64, dtype=BF16)) / (32 * 256 * 32) <= 0.35


def test_a_grid_keeps_nothing():
    x = batch(64, 16).requires_grad_()
    few, many = (inv.measure(inv.checkpoint(inv.exact(network([torch.sin] * n))), x).held_bytes for n in (4, 32))
    assert many == few


# ---- bit patterns ----


REALS = [BF16, F16, F32, F64]


def awkward(dtype: torch.dtype) -> Tensor:
    finite = torch.randn(64) * 10.0 ** torch.randint(-6, 6, (64,))
    return torch.cat([finite, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])]).to(dtype)


@pytest.mark.parametrize("dtype", [*REALS, torch.complex64, torch.complex128])
def test_a_difference_corrects_any_guess(dtype):
    x = awkward(dtype)
    for guess in (x, x.flip(0), (x + 3) - 3, torch.zeros_like(x)):
        assert same_bits([corrected(guess, difference(x, guess))], [x])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4, 5)])
def test_a_difference_takes_any_shape(shape):
    x = torch.randn(shape)
    codes = difference(x, x + 1)
    assert same_bits([corrected(x + 1, codes)], [x])
    assert torch.equal(unpack_codes(*pack_codes(codes[1]), shape), codes[1])


def test_a_corrected_tensor_has_the_layout_of_the_original():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    found = corrected(x.contiguous() + 1, difference(x, x.contiguous() + 1))
    assert same_bits([found], [x]) and found.stride() == x.stride()


@pytest.mark.parametrize("dtype", REALS)
def test_bits_are_those_of_numpy(dtype):
    x = awkward(dtype)
    if dtype is not BF16:  # which numpy lacks
        assert bits_of(x).tolist() == x.numpy().view(f"int{8 * x.element_size()}").tolist()
    assert same_bits([from_bits(bits_of(x), dtype)], [x])


@pytest.mark.parametrize("dtype", REALS)
def test_a_hash_sees_one_bit_and_one_exchange(dtype):
    x = awkward(dtype)[:-1]
    for i in range(1, len(x), 7):
        flipped, exchanged = x.clone(), x.clone()
        bits_of(flipped)[i] ^= 1
        exchanged[[0, i]] = x[[i, 0]]
        assert bit_hash(flipped) != bit_hash(x) != bit_hash(exchanged)


def test_codes_pack_every_value():
    codes = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(unpack_codes(*pack_codes(codes), codes.shape), codes)
