"""`checkpoint` of plain functions that call one another, raise, or do something else in backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import A, assert_close, assert_same, gradients, leaf, loss
from torch import Tensor, nn
from torch.func import functional_call

import invfunc as inv
from invfunc.engine.conditions import PINS
from invfunc.engine.turns import _TURNS
from invfunc.errors import ReplayError, WireError

# ---- plain functions: nesting, recursion, errors ---------------------------------------------------------------------


def test_checkpoint_in_checkpoint() -> None:
    w, linear, x = leaf(A), nn.Linear(A, A), leaf(2, A)

    def inner(x: Tensor) -> Tensor:
        return torch.tanh(linear(x) * w)

    def outer(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x: inner(inner(x) + w) * x

    def thrice(x: Tensor) -> Tensor:
        return inv.checkpoint(outer(inv.checkpoint(inner)))(x)

    wrt = [x, w, *linear.parameters()]
    assert_same(outer(inner), inv.checkpoint(outer(inv.checkpoint(inner))), wrt, x)
    assert_same(outer(inner), inv.checkpoint(thrice), wrt, x)


def test_a_function_that_calls_itself() -> None:
    w, x = leaf(A), leaf(A)

    def tree(call: Callable[..., Tensor], depth: int, x: Tensor) -> Tensor:
        return x.tanh() if depth == 0 else call(call, depth - 1, x * w) + call(call, depth - 1, x + w)

    fast = inv.checkpoint(tree)
    assert_close(
        gradients(fast(lambda *args: fast(*args), 3, x), [x, w]),
        gradients(tree(lambda *args: tree(*args), 3, x), [x, w]),
    )


def state() -> tuple[Any, ...]:
    return (
        PINS.get(),
        list(_TURNS),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch.overrides._get_current_function_mode_stack(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["function", "couple", "pair"])
def test_an_error_of_the_function_leaves_no_state_behind(when: str, kind: str) -> None:
    w, dropout, calls = leaf(A), nn.Dropout(0.5), []

    def f(x: Tensor) -> Tensor:
        calls.append(None)
        x = inv.pin("half", dropout(x) * w)
        if len(calls) == (1 if when == "forward" else 2):
            raise ZeroDivisionError("mine")
        return x.sin()

    fast = {
        "function": lambda: inv.checkpoint(f),
        "couple": lambda: inv.checkpoint(inv.couple(f)),
        "pair": lambda: inv.checkpoint(inv.pair(lambda a, b: (a + f(b), b), lambda a, b: (a, b)), drift="off"),
    }[kind]()
    x = [leaf(A)] * (1 if kind == "function" else 2)
    before, weights = state(), dict(dropout.named_parameters())
    with pytest.raises(ZeroDivisionError, match="mine"):
        y = fast(*x)
        random = torch.get_rng_state()
        loss(y).backward()
    assert state() == before
    assert dict(dropout.named_parameters()) == weights
    if when == "backward":
        assert torch.equal(torch.get_rng_state(), random)


def test_an_error_in_backward_puts_the_modules_weights_back() -> None:
    linear, calls = nn.Linear(A, A), []

    def f(x: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise ZeroDivisionError
        return linear(x)

    weights = {k: torch.randn_like(v).requires_grad_() for k, v in linear.named_parameters()}
    module = nn.Module()
    module.linear, module.forward = linear, inv.checkpoint(f)
    y = functional_call(module, {f"linear.{k}": v for k, v in weights.items()}, (leaf(A),))
    before = dict(linear.named_parameters())
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    assert all(p is before[k] for k, p in linear.named_parameters())


def test_a_function_that_changes_its_input_is_refused_where_backward_has_to_rebuild_it() -> None:
    with pytest.raises(ReplayError, match=r"changed its input in place, .*; use the out-of-place operation"):
        inv.checkpoint(lambda x: x.mul_(2))(leaf(A))  # as by torch: it is a leaf
    with pytest.raises(ReplayError, match="changed its input in place"):
        inv.checkpoint(inv.couple(lambda x: x.mul_(2)))(leaf(A), leaf(A) * 2)


# ---- a function that does something else in backward -----------------------------------------------------------------


TWICE: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "shape": (lambda x: x.exp(), lambda x: x[:, :2].exp()),
    "broadcast": (lambda x: x.exp(), lambda x: x[:1].exp()),
    "dtype": (lambda x: x.exp(), lambda x: x.float().exp()),
    "fewer": (lambda x: (x.exp(), x.sigmoid()), lambda x: x.exp()),
    "more": (lambda x: x.exp(), lambda x: (x.exp(), x.sigmoid())),
    "none": (lambda x: x.exp(), lambda x: None),
}
SAVED = r"the function saved .* when it ran again, expected .* as in forward; the function must do the same twice"


def unsteady(name: str) -> Callable[[Tensor], Any]:
    first, then = TWICE[name]
    calls: list[None] = []

    def f(x: Tensor) -> Any:
        calls.append(None)
        return first(x) if len(calls) == 1 else then(x)

    return f


@pytest.mark.parametrize("name", ["shape", "broadcast", "dtype", "fewer", "none"])
def test_a_function_that_does_something_else_on_replay(name: str) -> None:
    y = inv.checkpoint(unsteady(name))(leaf(3, 4))
    with pytest.raises(ReplayError, match=r"^checkpoint\(f\): " + SAVED):
        loss(y).backward()


@pytest.mark.parametrize(
    "lower",
    [
        inv.checkpoint,
        lambda f: inv.checkpoint(inv.pair(f, torch.log)),
        lambda f: lambda x: inv.checkpoint(inv.couple(f))(torch.zeros(3, 4), x)[0],
    ],
)
def test_what_a_function_does_behind_the_last_saved_tensor_is_not_run_again(lower: Callable[..., Any]) -> None:
    f, x = unsteady("more"), leaf(3, 4)
    loss(lower(f)(x)).backward()
    assert_close(x.grad, gradients(x.exp(), [x])[0])


@pytest.mark.parametrize("name", ["shape", "broadcast", "dtype", "more", "none"])
def test_a_coupling_function_that_returns_something_else_on_replay(name: str) -> None:
    y = inv.checkpoint(inv.chain(inv.couple(torch.tanh), inv.couple(unsteady(name))))(leaf(3, 4), leaf(3, 4))
    with pytest.raises((ReplayError, WireError), match="f returned|" + SAVED):
        loss(y).backward()


@pytest.mark.parametrize("name", ["shape", "broadcast", "dtype", "none"])
def test_a_pair_whose_forward_does_something_else_on_replay(name: str) -> None:
    y = inv.checkpoint(inv.pair(unsteady(name), torch.log))(leaf(3, 4))
    with pytest.raises(ReplayError, match=SAVED):
        loss(y).backward()


@pytest.mark.parametrize("name", ["shape", "broadcast", "dtype", "more", "none"])
def test_a_pair_whose_inverse_returns_something_else(name: str) -> None:
    net = inv.chain(inv.pair(torch.sinh, torch.asinh), inv.pair(lambda x: x / 2, TWICE[name][1]))
    y = inv.checkpoint(net)(leaf(3, 4) * 1)
    with pytest.raises(ReplayError, match=r"the inverse of pair\(.*\) returned .*, expected .* as in forward"):
        loss(y).backward()
