"""Errors in backward say where: our message with the path of the stage, in every mode."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from kit import leaf
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

import invfunc as inv
from invfunc.errors import ReplayError

CURE = "expected the values that forward read; run backward before changing it, or use the out-of-place operation"
AROUND = pytest.mark.parametrize("around", [nullcontext, save_on_cpu])  # on the CPU it keeps the tensor itself
MODES = pytest.mark.parametrize("mode", ["invert", "recompute"])


def network(first: Any = None, second: Any = None) -> inv.Invertible:
    couplings = [inv.couple(first or nn.Linear(4, 4)), inv.couple(second or nn.Linear(4, 4))]
    return inv.chain(inv.split(2), *couplings, inv.concat(2))


def said(y: Tensor) -> str:
    with pytest.raises(ReplayError) as error:
        y.sum().backward()
    return str(error.value)


@AROUND
@pytest.mark.parametrize(
    ("make", "path"),
    [
        (network, "chain stage 2 (couple)"),
        (lambda: inv.chain(network(), inv.ops.exp()), "chain stage 4 (exp)"),
        (inv.ops.exp, "exp()"),
    ],
)
def test_an_output_that_is_changed_in_place(make: Callable[[], inv.Invertible], path: str, around: Any) -> None:
    with around():
        y = inv.checkpoint(make())(leaf(3, 8))
    z = y * 1
    y.add_(1)
    text = "an output of shape (3, 8) that backward needs has been modified by an inplace operation"
    assert said(z) == f"{path}: {text}, {CURE}"


@pytest.mark.parametrize("make, path", [(network, "chain stage 2 (couple)"), (inv.ops.exp, "exp()")])
def test_an_output_whose_memory_was_freed(make: Callable[[], inv.Invertible], path: str) -> None:
    y = inv.checkpoint(make())(leaf(3, 8))
    z = y * 1
    y.untyped_storage().resize_(0)
    assert said(z) == f"{path}: an output of shape (3, 8) that backward needs has been emptied, {CURE}"


@pytest.mark.parametrize("mode", ["invert", "recompute"])
def test_a_stored_input_whose_memory_was_freed(mode: str) -> None:
    x = leaf(3, 8) * 1
    y = inv.checkpoint(torch.tanh, mode=mode)(x)
    x.untyped_storage().resize_(0)
    assert said(y) == f"checkpoint(tanh): an input of shape (3, 8) that backward needs has been emptied, {CURE}"


@AROUND
def test_the_stored_input_of_a_segment_that_is_changed_in_place(around: Any) -> None:
    x = leaf(3, 8) * 1
    text = "an input of shape (3, 8) that backward needs has been modified by an inplace operation"
    for fn, path in (torch.tanh, "checkpoint(tanh)"), (inv.ops.exp(), "exp()"):
        with around():
            y = inv.checkpoint(fn, mode="recompute")(x)
        with torch.no_grad():
            x.add_(1)
        assert said(y) == f"{path}: {text}, {CURE}"


def test_the_input_of_a_stored_component_that_is_changed_in_place() -> None:
    inputs: list[Tensor] = []

    def double(x: Tensor) -> Tensor:
        inputs.append(x)
        return 2 * x

    stored = inv.mark(inv.chain(inv.split(2), inv.couple(double), inv.concat(2)), "store")
    op = inv.chain(inv.split(2), inv.couple(nn.Linear(4, 4)), inv.parallel(inv.chain(), stored), inv.concat(2))
    y = inv.checkpoint(op)(leaf(3, 8))
    inputs[0].detach().add_(1)
    text = "an input of shape (3, 4) that backward needs has been modified by an inplace operation"
    assert said(y) == f"chain stage 2 (parallel): parallel component 1 (mark): {text}, {CURE}"


def written(net: nn.Module) -> None:
    with torch.no_grad():
        net.weight.add_(1)  # pyright: ignore


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "modified by an inplace operation": written,
    "moved to float32": nn.Module.float,
}


@MODES
@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("place", [0, 1])
def test_a_module_that_changes_is_named_with_its_own_stage(place: int, how: str, mode: str) -> None:
    nets = nn.Linear(4, 4), nn.Linear(4, 4)
    y = inv.checkpoint(network(*nets), mode=mode)(leaf(3, 8))
    CHANGES[how](nets[place])
    text = said(y)
    assert text.startswith(f"chain stage {place + 1} (couple): ['weight'")
    assert f"got some that were {how} (in Linear)" in text


@MODES
def test_a_tensor_of_a_closure_whose_dtype_changes(mode: str) -> None:
    w = leaf(4, 4)
    y = inv.checkpoint(network(None, lambda x: torch.tanh(x @ w)), mode=mode)(leaf(3, 8))
    w.data = w.data.float()
    assert said(y).startswith("chain stage 2 (couple): a tensor of shape (4, 4) of its closure changed between forward")


def test_a_leaf_whose_dtype_changes_where_nothing_runs_again() -> None:
    w = leaf(4, 4)
    y = inv.checkpoint(lambda x: x @ w)(leaf(3, 4))
    w.data = w.data.float()
    assert said(y).startswith(
        "checkpoint(<lambda>): a tensor of shape (4, 4) that backward needs has been moved to float32"
    )


class Caching(nn.Module):
    """A net that remembers what it computed, where nobody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        cache = STORE.setdefault(id(self), [])
        if not cache:
            cache.append(self.net(x))
        return cache[0] * x


STORE: dict[int, list[Tensor]] = {}


@MODES
def test_a_cache_that_is_full_when_the_function_runs_again(mode: str) -> None:
    STORE.clear()
    y = inv.checkpoint(network(None, Caching()), mode=mode)(leaf(3, 8))
    try:
        y.sum().backward()
    except ReplayError as error:
        assert str(error).startswith("chain stage 2 (couple): the function saved")
    else:
        pytest.fail("the cache was emptied for the replay")


@MODES
def test_what_torch_says_when_a_function_runs_again_has_the_path(mode: str) -> None:
    sizes = iter([4, 3])
    y = inv.checkpoint(network(None, lambda x: torch.tanh(x + x.detach()[:, : next(sizes)] @ torch.eye(4))), mode=mode)(
        leaf(3, 8)
    )
    text = said(y)
    assert text.startswith("chain stage 2 (couple): the function raised when it ran again: ")
    assert "mat1 and mat2 shapes cannot be multiplied" in text
    assert text.endswith(
        "expected what it did in forward; do not change what a function reads between forward and backward"
    )


def test_a_lack_of_memory_stays_what_it_is() -> None:
    runs = iter([False, True])

    def greedy(x: Tensor) -> Tensor:
        if next(runs):
            raise torch.OutOfMemoryError("no more")
        return x.tanh()

    y = inv.checkpoint(network(None, greedy))(leaf(3, 8))
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        y.sum().backward()


def test_a_law_that_takes_a_gradient_through_what_its_function_has_computed() -> None:
    """Plain autograd gives it; lowered, what the function has saved is let go before the law runs."""

    def law(t: Tensor) -> inv.Invertible:
        (gradient,) = torch.autograd.grad(t.sum(), module.weight)
        return inv.pair(lambda x: x + gradient.sum(), lambda y: y - gradient.sum())

    module = nn.Linear(4, 4)
    op = inv.chain(inv.split(2), inv.couple(module, law=law), inv.concat(2))
    with pytest.raises(ReplayError) as caught:
        inv.checkpoint(op)(leaf(3, 8))
    assert str(caught.value) == (
        "chain stage 1 (couple): the law of half(Linear, target=0, law=law) takes a gradient through what its function "
        "has computed, expected a law that computes from the values; take that gradient inside of the function, and "
        "return it"
    )
    inv.checkpoint(op, mode="recompute")(leaf(3, 8)).sum().backward()
