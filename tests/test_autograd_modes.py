"""Modes of autograd, torch's checkpoint and threads around a lowered pipeline, and inside of it."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from kit import WIDTH, Net, assert_close, assert_same, every_lowering, in_threads, leaf, loss
from torch import Tensor, nn

import invfunc as inv

# ---- modes of autograd around it ---------------------------------------------------------------------------------------


@every_lowering
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_mode(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(net.op(x)), [x, *net.parameters])
    with torch.autograd.detect_anomaly():
        assert_close(torch.autograd.grad(loss(lower(net.op)(x)), [x, *net.parameters]), expected)


@every_lowering
def test_save_on_cpu_around_it(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(net.op(x)), [x, *net.parameters])
    with torch.autograd.graph.save_on_cpu():
        out = lower(net.op)(x)
    assert_close(torch.autograd.grad(loss(out), [x, *net.parameters], retain_graph=True), expected)
    assert_close(torch.autograd.grad(loss(out), [x, *net.parameters]), expected)


def test_save_on_cpu_around_a_residue_of_tensors_and_numbers() -> None:
    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, int]]:
        return torch.cat([x[..., 1:].sinh(), x[..., :1]], -1), (x.detach().sign(), x.shape[-1])

    def inverse(residue: tuple[Tensor, int], y: Tensor) -> Tensor:
        sign, width = residue
        x = torch.cat([y[..., width - 1 :], y[..., : width - 1].asinh()], -1)
        return x.abs() * sign

    op, x = inv.pair(forward, inverse, residue=True), leaf(3, WIDTH)
    with torch.autograd.graph.save_on_cpu():
        out = inv.checkpoint(op)(x)
    assert_close(torch.autograd.grad(loss(out), x), torch.autograd.grad(loss(op(x)), x))


@every_lowering
def test_saved_tensors_hooks_see_what_is_kept_and_may_replace_it(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> bytes:
        packed.append(t)
        torch.save(t.detach(), buffer := io.BytesIO())
        return buffer.getvalue()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda raw: torch.load(io.BytesIO(raw))):
        out = lower(net.op)(x)
    expected = torch.autograd.grad(loss(net.op(x)), [x, *net.parameters])
    assert packed
    assert_close(torch.autograd.grad(loss(out), [x, *net.parameters]), expected)


@every_lowering
def test_grad_mode_inside_and_outside(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    fast = lower(net.op)
    with torch.no_grad():
        assert not fast(x).requires_grad
        with torch.enable_grad():
            out = fast(x)
    with torch.inference_mode():
        assert fast(x).is_inference()
    with torch.set_grad_enabled(False):
        with torch.enable_grad():
            found = torch.autograd.grad(loss(out), [x, *net.parameters])
    assert_close(found, torch.autograd.grad(loss(net.op(x)), [x, *net.parameters]))


def test_backward_under_no_grad() -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    total = loss(inv.checkpoint(net.op)(x))
    with torch.no_grad():
        found = torch.autograd.grad(total, [x, *net.parameters])
    assert_close(found, torch.autograd.grad(loss(net.op(x)), [x, *net.parameters]))


# ---- together with torch's checkpoint ----------------------------------------------------------------------------------


@every_lowering
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_inside_of_torchs_checkpoint(reentrant: bool, lower: Callable[..., Any]) -> None:
    net, x, drop = Net(), leaf(3, 2 * WIDTH), nn.Dropout(0.3)
    found = []
    for fn in net.op, lower(net.op):
        torch.manual_seed(0)
        out = torch.utils.checkpoint.checkpoint(lambda x, fn=fn: fn(drop(x)).sin(), x, use_reentrant=reentrant)
        loss(out).backward()
        found.append([t.grad for t in [x, *net.parameters]])
        x.grad = None
        for module in net.modules:
            module.zero_grad()
    assert_close(*found)


@pytest.mark.parametrize("name", ["module", "closure", "function", "recompute"])
def test_torchs_checkpoint_inside_of_ours(name: str) -> None:
    class Rematerialised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.4), nn.Linear(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    f, w, xs = Rematerialised(), leaf(WIDTH), [leaf(3, WIDTH), leaf(3, WIDTH)]
    closure = lambda x: torch.utils.checkpoint.checkpoint(lambda x: f.inner(x) * w, x, use_reentrant=False)  # noqa: E731
    plain, fast = {
        "module": (inv.couple(f), inv.checkpoint(inv.couple(f))),
        "closure": (inv.couple(closure, f), inv.checkpoint(inv.couple(closure, f))),
        "function": (lambda a, b: closure(a) * b, inv.checkpoint(lambda a, b: closure(a) * b)),
        "recompute": (inv.couple(f, closure), inv.checkpoint(inv.couple(f, closure), mode="recompute")),
    }[name]
    wrt = [*xs, *f.parameters(), *([] if name == "module" else [w])]
    found = []
    for fn in plain, fast:
        torch.manual_seed(0)
        found.append(torch.autograd.grad(loss(fn(*xs)), wrt))
    assert_close(*found)


# ---- threads -----------------------------------------------------------------------------------------------------------


@every_lowering
def test_two_threads_on_one_graph(lower: Callable[..., Any]) -> None:
    net, x = Net(depth=6), leaf(3, 2 * WIDTH)
    total, wrt = loss(lower(net.op)(x)), [x, *net.parameters]
    expected = torch.autograd.grad(loss(net.op(x)), wrt)
    for found in in_threads([lambda: torch.autograd.grad(total, wrt, retain_graph=True)] * 4):
        assert_close(found, expected)


@every_lowering
def test_threads_with_steps_of_their_own(lower: Callable[..., Any]) -> None:
    net, xs = Net(depth=3), [leaf(3, 2 * WIDTH) for _ in range(4)]
    fast = lower(net.op)
    found = in_threads([lambda x=x: torch.autograd.grad(loss(fast(x)), [x, *net.parameters]) for x in xs])
    for x, gradients in zip(xs, found, strict=True):
        assert_close(gradients, torch.autograd.grad(loss(net.op(x)), [x, *net.parameters]))


def test_threads_on_a_module_whose_tensors_have_to_be_swapped() -> None:
    norm = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    weights = dict(norm.named_parameters())
    xs = [leaf(5, WIDTH), leaf(5, WIDTH)]
    op = inv.couple(norm)
    totals = [loss(inv.checkpoint(op)(*xs)) for _ in range(4)]
    wrt = [*xs, *norm.parameters()]
    expected = torch.autograd.grad(loss(op(*xs)), wrt)
    state = copy.deepcopy(norm.state_dict())
    for gradients in in_threads([lambda t=t: torch.autograd.grad(t, wrt) for t in totals]):
        assert_close(gradients, expected)
    assert all(p is weights[name] for name, p in norm.named_parameters())
    assert_close(dict(norm.state_dict()), dict(state))


def test_a_function_that_saves_nothing_is_undone_in_the_grad_mode_of_forward() -> None:
    asks = inv.couple(lambda x: x * (2 if torch.is_grad_enabled() else 3))
    op, x = inv.chain(inv.couple(torch.sin, torch.cos), asks, inv.couple(torch.sin)), (leaf(3, WIDTH), leaf(3, WIDTH))
    assert_same(op, inv.checkpoint(op), x, *x)
