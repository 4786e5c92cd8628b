"""Replays draw forward's numbers: from the host's generators, and on several threads at once."""

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from kit import assert_close, in_threads
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.testing._internal.two_tensor import TwoTensor

import invfunc as inv

ONES = torch.ones(64)


class Meeting:
    """Runs functions forward one after the other, and again at once: in backward each waits for the others."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.runs = count, threading.Barrier(count, timeout=60), 0

    def step(self, fn: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        """Forward now; gives the backward, which returns the output and what it should be for a product ``x * m``."""
        runs = 0

        def meet(x: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            first = fn(x)
            if runs == 2:
                self.barrier.wait()
            return first * fn(x)

        x = torch.rand(64, requires_grad=True)
        y = inv.checkpoint(meet)(x)
        return lambda: (2 * y.detach(), torch.autograd.grad(y.sum(), x)[0] * x.detach())

    def check(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Of a function that multiplies x by random numbers, every gradient has those of its own forward."""
        for _ in range(5):
            for found, expected in in_threads([self.step(fn) for _ in range(self.count)]):
                assert_close(found, expected, 1e-6)


def nested(x: Tensor) -> Tensor:
    """A gradient inside, of a checkpoint that draws."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        (mask,) = torch.autograd.grad(inv.checkpoint(lambda v: v * dropout(ONES, 0.5))(leaf).sum(), leaf)
    return x * mask


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: x * dropout(ONES, 0.5),
    "no generator among the arguments": lambda x: x * torch.rand(64) * torch.rand_like(ONES) * torch.randn(64),
    "integers": lambda x: x * torch.randint(1, 9, (64,)) * (1 + torch.randperm(64)),
    "a generator among the arguments": lambda x: x * torch.normal(ONES, 0.1) * torch.bernoulli(ONES / 2),
    "attention": lambda x: (
        x * nn.functional.scaled_dot_product_attention(*[torch.eye(8)[None]] * 3, dropout_p=0.5).flatten()
    ),
    "a subclass": lambda x: x * dropout(TwoTensor(ONES, ONES), 0.5).a,
    "nested": nested,
}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("fn", DRAWS.values(), ids=DRAWS)
def test_replays_that_wait_for_each_other_draw_their_own_numbers(fn: Callable[[Tensor], Tensor], count: int) -> None:
    Meeting(count).check(fn)


def test_compiled_functions_stay_compiled_where_replays_meet() -> None:
    Meeting(2).check(torch.compile(lambda x: x * dropout(ONES, 0.5)))


@pytest.mark.parametrize("change", [nn.Module.eval, lambda module: module[0].register_forward_hook(print), lambda m: m])
def test_replays_that_restore_modules_of_their_own_do_not_wait(change: Callable[[Any], Any]) -> None:
    barrier, nets = threading.Barrier(2, timeout=60), [nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)) for _ in "ab"]

    def backward(net: nn.Module) -> Callable[[], list[Tensor]]:
        runs, x = 0, torch.randn(8, 4, requires_grad=True)

        def meet(x: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            if runs == 2:
                barrier.wait()
            return net(x)

        expected = torch.autograd.grad(net(x).pow(3).sum(), [x, *net.parameters()])
        y = inv.checkpoint(meet)(x)
        change(net)
        return lambda: [expected, torch.autograd.grad(y.pow(3).sum(), [x, *net.parameters()])]

    for found, expected in in_threads([backward(net) for net in nets]):
        assert_close(found, expected)


HOST: dict[str, Callable[[], float]] = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "numpy": lambda: float(numpy.random.rand()),
    "numpy, normal": lambda: float(numpy.random.randn()),
    "numpy, gamma": lambda: float(numpy.random.gamma(2.0)),
    "both": lambda: random.gauss(0, 1) * random.random() + float(numpy.random.randn()),
}


@pytest.mark.parametrize("drawn", [0, 1])
@pytest.mark.parametrize("draw", HOST.values(), ids=HOST)
def test_the_second_of_a_pair_of_normal_numbers_belongs_to_the_state(draw: Callable[[], float], drawn: int) -> None:
    random.seed(0)
    numpy.random.seed(0)
    for _ in range(drawn):
        random.gauss(0, 1), numpy.random.randn()
    x = torch.rand(3, requires_grad=True)
    y = inv.checkpoint(lambda x: x * draw())(x) + inv.checkpoint(lambda x: x * draw())(x)
    before = random.getstate(), numpy.random.get_state(legacy=False)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close(gradient * x.detach(), y.detach(), 1e-6)
    (python, array), now = before, numpy.random.get_state(legacy=False)
    assert random.getstate() == python
    assert (now["has_gauss"], now["gauss"]) == (array["has_gauss"], array["gauss"])
    assert (now["state"]["key"] == array["state"]["key"]).all()


WORDS = 624  # of torch's generator on the CPU: after as many it is at the same place, with other words
DRAWS: dict[str, Callable[[], Tensor]] = {
    "one": lambda: torch.rand(1),
    "all words": lambda: torch.rand(WORDS)[-1],
    "all words, as doubles": lambda: torch.rand(WORDS // 2, dtype=torch.float64)[-1].float(),
    "all words, twice": lambda: torch.rand(2 * WORDS)[-1],
    "a normal": lambda: torch.randn(1),
    "a normal double": lambda: torch.randn(1, dtype=torch.float64).float(),
    "a permutation": lambda: 1.0 + torch.randperm(3),
    "a Poisson number": lambda: 1 + torch.poisson(torch.ones(1)),
    "the same seed": lambda: torch.manual_seed(3) and torch.rand(1),
    "and puts the state back": lambda: put_back(torch.rand),
}


def put_back(draw: Callable[[int], Tensor]) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        return draw(1)


@pytest.mark.parametrize("drawn", [0, 1])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_every_draw_of_torchs_generator_is_noticed(draw: Callable[[], Tensor], drawn: int) -> None:
    torch.manual_seed(3)
    for _ in range(drawn):
        torch.randn(1), torch.randn(1, dtype=torch.float64)
    x = torch.rand(3, requires_grad=True)
    y = inv.checkpoint(lambda x: x * draw())(x) + inv.checkpoint(lambda x: x * draw())(x)
    torch.rand(1)
    before = torch.get_rng_state()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close(gradient * x.detach(), y.detach(), 1e-6)
    assert torch.equal(torch.get_rng_state(), before)


def test_who_looks_at_a_function_leaves_the_hosts_generators_as_they_were() -> None:
    def fn(x: Tensor) -> Tensor:
        return x * random.random() * float(numpy.random.rand())

    before = random.getstate(), numpy.random.get_state()[1].copy()
    inv.draw(inv.chain(inv.split(2), inv.couple(fn), inv.concat(2)), (3, 4))
    assert random.getstate() == before[0]
    assert (numpy.random.get_state()[1] == before[1]).all()


def test_replays_that_draw_from_pythons_generator_wait_for_their_turn() -> None:
    def backward() -> Callable[[], tuple[Tensor, Tensor]]:
        x = torch.rand(64, requires_grad=True)
        y = inv.checkpoint(lambda x: x * torch.tensor([random.random() for _ in range(64)]) * dropout(ONES, 0.5))(x)
        return lambda: (y.detach(), torch.autograd.grad(y.sum(), x)[0] * x.detach())

    for found, expected in in_threads([backward() for _ in range(4)]):
        assert_close(found, expected, 1e-6)
