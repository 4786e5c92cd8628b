"""`exact` of functions that are hard to run twice: they draw, keep statistics, or take another kernel."""

from collections.abc import Callable

import pytest
import torch
from exact_networks import BF16, F32, HARD, Modules, Spy, batch, hard, plain, same_bits, step
from kit import network
from torch import Tensor

import invfunc as inv


def buffers(fs: Modules) -> list[Tensor]:
    return [b.clone() for f in fs for b in f.buffers()]


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_functions_give_the_same_bits_again(name, mode):
    fs, x, dim = hard(name)
    op = inv.exact(network(fs, dim), mode)
    expected = step(op if mode == "grid" else lambda x: plain(fs, x, dim), fs, x), buffers(fs)
    fs, x, dim = hard(name)
    torch.manual_seed(0)
    assert same_bits(step(inv.checkpoint(inv.exact(network(fs, dim), mode)), fs, x), expected[0])
    assert all(map(torch.equal, buffers(fs), expected[1]))


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_autocast_is_replayed(mode):
    fs, x, _ = hard("attention")

    def under_autocast(op: inv.Invertible) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", BF16):
                return op(x)

        return call

    op = inv.exact(network(fs, 2), mode)
    expected = step(under_autocast(op), fs, x)
    assert same_bits(step(under_autocast(inv.checkpoint(op)), fs, x), expected)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_the_memory_format_is_that_of_forward(mode):
    fs, x, _ = hard("batch norm in eval")
    spies = [Spy(f) for f in fs]
    op = inv.exact(inv.chain(*[inv.couple(f, g) for f, g in (spies[:2], spies[2:])]), mode)
    halves = [half.contiguous(memory_format=torch.channels_last) for half in x.chunk(2, 1)]

    def call(op: inv.Invertible, scale: Tensor) -> Tensor:
        return torch.cat(op(tuple(scale * half for half in halves)), 1)

    scale = torch.ones((), dtype=F32)
    expected = step(lambda scale: call(op, scale), fs, scale)
    for spy in spies:
        spy.given.clear()
    assert same_bits(step(lambda scale: call(inv.checkpoint(op), scale), fs, scale), expected)
    assert all(given.is_contiguous(memory_format=torch.channels_last) for spy in spies for given in spy.given)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_the_number_of_threads_is_that_of_forward(mode):
    seen = []

    def counting(x: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return torch.sin(x)

    y = inv.checkpoint(inv.exact(inv.couple(counting), mode))(
        batch(3).requires_grad_() * 1, batch(3).requires_grad_() * 1
    )
    torch.set_num_threads(2)
    try:
        y[0].sum().backward()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [1, 1]
