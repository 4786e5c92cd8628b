"""What a step may consist of besides couplings, on a device: layers, plans, donated inputs, exact streams, transforms."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import Before, contraction
from kit import TOLERANCE, assert_close, bowl, is_free, network, parameters
from test_nn import LAYERS
from torch import Tensor, nn

import invfunc as inv
from invfunc.compat import memcnn
from invfunc.errors import DonatedError, DriftError
from invfunc.look.saved import saved

from . import sim
from .cases_training import DEVICE, branch, random_states, step

# ---- layers ----------------------------------------------------------------------------------------------------------


def passes(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Value and gradients of two steps; the first may wait."""
    for raising in (False, True):
        layer.zero_grad()
        leaf = x.detach().requires_grad_()
        with sim.waits(raising=raising):
            y = layer(leaf)
            bowl(y).backward()
    return [y.detach().cpu(), *[None if t.grad is None else t.grad.cpu() for t in (leaf, *layer.parameters())]]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_that_of_the_cpu_and_does_not_wait(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    on_device = copy.deepcopy(layer).to(DEVICE)
    assert_close(passes(on_device, x.to(DEVICE)), passes(layer, x), TOLERANCE)


HOST_MADE: dict[str, tuple[Callable[[], inv.Invertible], tuple[int, ...]]] = {
    "permute_channels": (lambda: inv.ops.permute_channels([2, 0, 1]), (4, 3)),
    "split_mask": (lambda: inv.ops.split_mask(torch.tensor([True, False, True])), (4, 3)),
}


@pytest.mark.parametrize("name", HOST_MADE)
def test_what_an_op_holds_on_the_host_is_copied_once(name: str) -> None:
    make, shape = HOST_MADE[name]
    op, x = make(), torch.randn(shape)
    for device in ("sim:0", "sim:1", "cpu"):
        with sim.waits(raising=True):
            y = inv.checkpoint(op)(
                x.to(device, non_blocking=True) if device == "cpu" else x.pin_memory().to(device, non_blocking=True)
            )
        for found, expected in zip(*((t,) if isinstance(t, Tensor) else t for t in (y, op(x))), strict=True):
            assert torch.equal(found.cpu(), expected)


def test_an_order_on_a_device_is_looked_at_in_debug_mode() -> None:
    order = torch.tensor([0, 0], device=DEVICE)
    with sim.waits(raising=True):
        inv.ops.permute_channels(order)
    with inv.debug(True), pytest.raises(inv.errors.OptionError, match="each of 0..C-1 exactly once"):
        inv.ops.permute_channels(order)


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_a_planned_step_is_plain_autograds_and_does_not_wait() -> None:
    branches = [branch() for _ in range(4)]
    op, x = network(branches, dim=-1), torch.randn(6, 8, device=DEVICE)
    expected = step(op, [x], parameters(*branches))
    fast = inv.checkpoint(op, plan=inv.plan(op, (6, 8), budget="2KiB"))
    leaf = x.clone().requires_grad_()
    with sim.waits(raising=True):
        torch.manual_seed(7)
        y = fast(leaf)
        found = torch.autograd.grad(bowl(y), [leaf, *parameters(*branches)])
    assert_close([y, *found], expected[: 1 + len(found)], TOLERANCE)


SHAPED: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "a module": (lambda: inv.nn.Sequential(inv.nn.Coupling(branch("plain")), inv.nn.Coupling(branch("plain"))), (6, 8)),
    "blocks": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(DEVICE), (6, 8)),
    "images": (
        lambda: network([nn.Conv2d(2, 2, 3, padding=1).to(DEVICE) for _ in range(4)]), (2, 4, 5, 5)
    ),
    "iterations": (lambda: inv.chain(*[~inv.ops.residual_flow(contraction(8).to(DEVICE)) for _ in range(2)]), (6, 8)),
    "elements in turn": (lambda: ~inv.ops.autoregressive(Before(8).to(DEVICE), dim=-1), (6, 8)),
    "codes": (lambda: inv.exact(network([branch("plain")] * 2, dim=-1), mode="codes"), (6, 8)),
    "constants of the host": (
        lambda: inv.chain(inv.ops.permute_channels(list(range(7, -1, -1))), network([branch("plain")] * 2, dim=-1)),
        (6, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPED)
def test_a_model_on_a_device_is_planned_from_a_shape(name: str) -> None:
    make, shape = SHAPED[name]
    made = make()
    model = made.to(DEVICE) if isinstance(made, nn.Module) else made
    before = random_states()
    assert inv.plan(model, shape, budget="1GiB").peak_bytes > 0
    assert_close(random_states(), before)
    torch.accelerator.synchronize()
    inv.checkpoint(inv.ops.exp())(torch.randn(6, 8, device=DEVICE).requires_grad_())  # nothing that is late is an error


# ---- donation, exact streams, drift ----------------------------------------------------------------------------------


def test_a_donated_input_is_free_until_backward_is_done() -> None:
    op, x = network([branch() for _ in range(4)], dim=-1), torch.randn(512, 8, device=DEVICE, requires_grad=True)
    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(bowl(op((2 * x).relu())), x)
    held = torch.accelerator.memory_allocated()
    given = (2 * x).relu()
    values = given.detach().clone()
    torch.manual_seed(3)
    y = inv.checkpoint(op, donate=True)(given)
    assert is_free(given) and torch.accelerator.memory_allocated() - held < 4 * x.nbytes
    with pytest.raises(DonatedError):
        given.sum()
    (found,) = torch.autograd.grad(bowl(y), x)
    assert_close([found, given], [expected, values], TOLERANCE)


EXACT: dict[str, Callable[[inv.Invertible], inv.Invertible]] = {
    "grid": inv.exact,
    "codes": lambda op: inv.exact(op, mode="codes"),
    "packed codes": lambda op: inv.exact(op, mode="codes", pack=True),
}


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_an_exact_step_has_the_bits_of_plain_autograd(make: Any, is_captured: bool) -> None:
    branches = [branch("plain") for _ in range(6)]
    op, x = make(network(branches, dim=-1)), torch.randn(6, 8, device=DEVICE)

    def run(fn: Callable[..., Tensor]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = fn(leaf)
        return [y, *torch.autograd.grad(bowl(y), [leaf, *parameters(*branches)])]

    expected = run(op)
    if is_captured:
        with sim.capture():
            found = run(inv.checkpoint(op))
    else:
        found = run(inv.checkpoint(op))
    assert all(map(torch.equal, found, expected))


def test_a_drift_is_never_said_of_another_pipeline() -> None:
    two = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    bad = inv.checkpoint(inv.pair(lambda x: x * two, lambda y: y / two * 1.1, name="bad"), drift="raise")
    good = inv.checkpoint(network([branch("plain") for _ in range(2)], dim=-1))
    x = torch.randn(8, 8, device=DEVICE, requires_grad=True)
    with pytest.raises(DriftError, match="bad"):
        bad(x * 1).sum().backward()
    torch.accelerator.synchronize()
    good(x).sum().backward()


# ---- random numbers, pins, derivatives -------------------------------------------------------------------------------


def test_numbers_drawn_between_forward_and_backward_are_those_of_plain_training() -> None:
    op, x, found = network([branch() for _ in range(4)], dim=-1), torch.randn(6, 8, device=DEVICE), []
    for fn in (op, inv.checkpoint(op)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = fn(leaf)
        drawn = [torch.rand(3, device=device) for device in ("cpu", "sim:0", "sim:1")]
        (g,) = torch.autograd.grad(bowl(y), leaf)
        found.append([y, *drawn, g, *[torch.rand(3, device=device) for device in ("cpu", "sim:0", "sim:1")]])
    assert_close(found[1], found[0], TOLERANCE)


def test_a_pinned_decision_is_that_of_forward() -> None:
    seen = []

    def route(x: Tensor) -> Tensor:
        chosen = inv.pin("expert", torch.randint(4, (x.shape[0],), device=DEVICE, generator=own))
        seen.append(chosen)
        return nn.functional.one_hot(chosen, 4) * x.sin()

    own = torch.Generator(DEVICE).manual_seed(3)
    y = inv.checkpoint(route)(torch.randn(6, 4, device=DEVICE, requires_grad=True))
    y.sum().backward()
    assert len(seen) == 2 and torch.equal(*seen)


def test_second_derivatives_draw_the_same_numbers() -> None:
    branches = [branch() for _ in range(4)]
    op, x = network(branches, dim=-1), torch.randn(6, 8, device=DEVICE)
    found = []
    for fn in (op, inv.checkpoint(op)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(bowl(fn(leaf)), leaf, create_graph=True)
        found.append([first, *torch.autograd.grad(bowl(first), [leaf, *parameters(*branches)], allow_unused=True)])
    assert_close(found[1], found[0], 1e-8)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian])
def test_iterations_are_differentiated_by_transforms(transform: Callable[..., Any]) -> None:
    weight = 0.2 * torch.randn(4, 4)
    found = []
    for device in ("cpu", DEVICE):
        w = weight.to(device)
        op = inv.ops.residual_flow(lambda x, w=w: torch.tanh(x @ w))
        x = torch.linspace(-1, 1, 4, device=device)
        loss = lambda x, op=op: bowl(inv.checkpoint(op).inverse(x[None]))  # noqa: E731
        found.append([transform(loss)(x).cpu(), torch.func.vmap(transform(loss))(x.expand(3, 4)).cpu()])
    assert_close(found[1], found[0], TOLERANCE)


def test_weights_of_functional_call_are_those_that_backward_uses() -> None:
    op, x = network([branch("plain") for _ in range(2)], dim=-1), torch.randn(6, 8, device=DEVICE)
    model = inv.nn.Lowered(op)
    weights = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, weights, (x.requires_grad_(),))
    found = torch.autograd.grad(bowl(y), [x, *weights.values()])
    model.load_state_dict(weights)
    assert_close(found, torch.autograd.grad(bowl(op(x)), [x, *model.parameters()]), TOLERANCE)


# ---- names of others, and what is shown ------------------------------------------------------------------------------


def test_the_names_of_memcnn_check_a_module_under_a_default_device() -> None:
    with torch.device(DEVICE):
        couplings = [memcnn.AdditiveCoupling(nn.Linear(4, 4, dtype=torch.float32)) for _ in range(2)]
        wrapped = [memcnn.InvertibleModuleWrapper(coupling) for coupling in couplings]
        assert all(memcnn.is_invertible_module(coupling, [(2, 8)]) for coupling in couplings)
    x = torch.randn(6, 8, device=DEVICE, dtype=torch.float32).requires_grad_()
    (found,) = torch.autograd.grad(bowl(nn.Sequential(*wrapped)(x * 1)), x)
    (expected,) = torch.autograd.grad(bowl(nn.Sequential(*couplings)(x * 1)), x)
    assert_close(found, expected, 1e-4)


def test_what_is_kept_is_listed_as_on_the_cpu() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.randn(6, 8)
    lowered = inv.checkpoint(network([branch("plain", "cpu") for _ in range(2)], dim=-1))
    on_device = inv.checkpoint(network([branch("plain") for _ in range(2)], dim=-1))
    for fn, other in ((net, copy.deepcopy(net).to(DEVICE)), (lowered, on_device)):
        assert saved(other, x.to(DEVICE).requires_grad_()) == saved(fn, x.clone().requires_grad_())


def differentiated(device: str) -> dict[str, Callable[[Tensor], Any]]:
    """Functions that differentiate, on whatever thread."""
    w = torch.linspace(1, 2, 8, device=device)

    def own(x: Tensor) -> Tensor:
        return torch.autograd.grad((x * w).sin().sum(), x, create_graph=True)[0].exp()

    def transformed(x: Tensor) -> Tensor:
        return torch.func.grad(lambda v: (v.sin() * w).exp().sum())(x).cos()

    return {
        "autograd.grad": own,
        "func.grad": transformed,
        "lowered": inv.checkpoint(lambda x: transformed(x).exp()),
        "around a lowered one": lambda x: torch.func.grad(lambda v: inv.checkpoint(transformed)(v).sum())(x).exp(),
    }


@pytest.mark.parametrize("name", differentiated("cpu"))
def test_what_a_gradient_inside_keeps_is_listed_as_on_the_cpu(name: str) -> None:
    x, other = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, device=DEVICE, requires_grad=True)
    for _ in range(50):
        (x * 1).exp()  # this thread has numbered more nodes than that of the device
    expected = saved(differentiated("cpu")[name], x)
    assert saved(differentiated(DEVICE)[name], other) == expected
    assert len(expected) == {"autograd.grad": 4, "func.grad": 7, "lowered": 1, "around a lowered one": 15}[name]


def test_backward_runs_where_it_is_called_from_another_thread() -> None:
    branches = [branch() for _ in range(4)]
    op, x, found = network(branches, dim=-1), torch.randn(6, 8, device=DEVICE), []
    expected = step(op, [x], parameters(*branches))
    thread = threading.Thread(target=lambda: found.extend(step(inv.checkpoint(op), [x], parameters(*branches))))
    thread.start()
    thread.join(60)
    assert_close(found, expected, TOLERANCE)
