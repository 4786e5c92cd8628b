"""The host does not wait for a device in a step of training; drift is judged when its numbers have come."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import TOLERANCE, assert_close, bowl, network
from torch import Tensor, nn

import invfunc as inv
from invfunc.errors import DomainError, DriftError, DriftWarning, ReplayError

from . import sim
from .cases_training import DEVICE, LOWERINGS, branch


def assert_no_waits(fn: Callable[..., Any], *inputs: Tensor) -> None:
    """A step of training waits nowhere."""
    with sim.waits(raising=True):
        xs = [x.detach().requires_grad_() for x in inputs]
        bowl(fn(*xs)).backward()


@pytest.mark.parametrize("kind", ["plain", "dropout", "batch norm"])
@pytest.mark.parametrize("lower", LOWERINGS.values(), ids=LOWERINGS)
def test_a_step_does_not_wait(lower: Callable[[inv.Invertible], Callable[..., Any]], kind: str) -> None:
    op, x = network([branch(kind) for _ in range(4)], dim=-1), torch.randn(6, 8, device=DEVICE)
    assert_no_waits(lower(op), x)


OPS: dict[str, Callable[[], tuple[Any, Tensor]]] = {
    "dense linear": lambda: (
        inv.ops.linear(torch.randn(8, 8, device=DEVICE).add_(4 * torch.eye(8, device=DEVICE)).requires_grad_()),
        torch.randn(6, 8, device=DEVICE),
    ),
    "grid": lambda: (inv.exact(network([branch("plain") for _ in range(4)], dim=-1)), torch.randn(6, 8, device=DEVICE)),
}


@pytest.mark.parametrize("make", OPS.values(), ids=OPS)
def test_an_op_does_not_wait(make: Callable[[], tuple[Any, Tensor]]) -> None:
    op, x = make()
    assert_no_waits(inv.checkpoint(op), x)


# ---- iterations ------------------------------------------------------------------------------------------------------


def flow_of(calls: list[int], device: str, **options: Any) -> tuple[inv.Invertible, Tensor]:
    """A residual flow whose branch counts its calls, and an input; the same numbers on every device."""
    torch.manual_seed(3)
    f = nn.Linear(8, 8).requires_grad_(False).to(device)
    f.weight.mul_(0.5 / torch.linalg.matrix_norm(f.weight, 2))
    branch = lambda x: calls.append(1) or torch.tanh(f(x))  # noqa: E731
    return inv.ops.residual_flow(branch, **options), torch.randn(6, 8).to(device)


def test_an_iteration_ends_where_it_does_on_the_cpu_some_steps_late() -> None:
    counts, found = {}, {}
    for device in ("cpu", DEVICE):
        calls: list[int] = []
        op, y = flow_of(calls, device)
        with sim.waits(raising=True):
            found[device] = op.inverse(y)
        counts[device] = len(calls)
    assert_close(found[DEVICE].cpu(), found["cpu"])
    assert counts["cpu"] < counts[DEVICE] <= counts["cpu"] + 4 * (inv.engine.devices.Answers.AHEAD + 1)


@pytest.mark.parametrize("queries", [0, 1, 5])
def test_a_result_does_not_depend_on_when_the_answer_comes(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    op, y = flow_of([], DEVICE)
    expected = op.inverse(y)
    left: dict[Any, int] = {}

    def is_here(late: Any) -> bool:
        left[late] = left.get(late, queries) - 1
        return left[late] < 0 and late.event.query()

    monkeypatch.setattr(inv.engine.devices.Late, "is_here", is_here)
    assert torch.equal(op.inverse(y), expected)


def test_a_host_is_only_some_answers_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    op, y = flow_of(calls, DEVICE)
    monkeypatch.setattr(inv.engine.devices.Late, "is_here", lambda late: False)
    with sim.waits() as seen:
        op.inverse(y)
    assert set(seen) == {"synchronize an event"} and len(calls) < 100


@pytest.mark.parametrize(
    ("f", "most", "count"), [(lambda x: -x, 500, 500), (lambda x: 2 * x, 500, 24), (lambda x: 2 * x, 6, 6)]
)
def test_an_iteration_that_does_not_end_is_an_error_or_nan_and_then_an_error(f: Any, most: int, count: int) -> None:
    op, y = inv.ops.residual_flow(f, max_iterations=most), torch.randn(6, 8, device=DEVICE)
    with pytest.raises(DomainError, match=f"its inverse did not converge in {count} iterations"):
        assert op.inverse(y).isnan().all()
        torch.accelerator.synchronize()
        inv.checkpoint(inv.ops.exp())(y.requires_grad_())


def test_an_iteration_takes_all_of_its_steps_while_a_graph_is_captured() -> None:
    calls: list[int] = []
    op, y = flow_of(calls, DEVICE, max_iterations=70)
    expected = op.inverse(y)
    calls.clear()
    with sim.capture():
        x = op.inverse(y)
    assert_close(x, expected)
    assert len(calls) == 70 + 1  # and once for the gradient at the solution


def test_the_length_of_a_series_is_drawn_on_the_host() -> None:
    fn, x = lambda x: 0.3 * torch.sin(x), torch.randn(6, 8, device=DEVICE)
    op = inv.with_log_det(inv.ops.residual_flow(fn, log_det=inv.ops.roulette_log_det(2, 0.5)))
    found = []
    for run in (op, inv.checkpoint(op)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        with torch.device(DEVICE), sim.waits(raising=True):
            y, total = run((leaf, torch.zeros(6)))
            found.append([y, total, *torch.autograd.grad(bowl(y) + bowl(total), leaf)])
    assert_close(found[1], found[0], TOLERANCE)


def test_leaves_that_a_function_makes_are_compared_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(x: Tensor) -> Tensor:  # reads what no snapshot sees: an attribute of another Python module
        scale = nn.Parameter(torch.full((8,), sim.factor, device=DEVICE))  # type: ignore[attr-defined]
        return (x * scale).sin()

    monkeypatch.setattr(sim, "factor", 1.0, raising=False)
    x = torch.randn(6, 8, device=DEVICE, requires_grad=True)
    with sim.waits(raising=True):
        inv.checkpoint(fn, drift="off")(x).sum().backward()
        y = inv.checkpoint(fn, drift="off")(x)
        monkeypatch.setattr(sim, "factor", 2.0)
        y.sum().backward()
    torch.accelerator.synchronize()
    with pytest.warns(inv.errors.DriftWarning, match=r"met a tensor of shape \(8,\) that it did not meet in forward"):
        inv.checkpoint(inv.chain(inv.split(2), inv.couple(torch.sin), inv.concat(2)))(x)


# ---- sizes that depend on data ---------------------------------------------------------------------------------------


def test_new_sizes_do_not_wait() -> None:
    fast = inv.checkpoint(network([branch() for _ in range(4)], dim=-1), segments=2)
    for size in range(1, 12):
        assert_no_waits(fast, torch.randn(size, 8, device=DEVICE))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_what_escapes_its_byte_comes_back(scale: float, pack: bool) -> None:
    op = network([lambda x: scale * torch.sin(x)] * 20, dim=-1)  # of a large step little is left of what was small
    x = torch.randn(50, 8, device=DEVICE)
    fast = inv.checkpoint(inv.exact(op, mode="codes", pack=pack))
    for _ in range(2):
        with sim.waits() as seen:
            leaf = x.clone().requires_grad_()
            (found,) = torch.autograd.grad(fast(leaf).sum(), leaf)
        assert not seen.total
    (expected,) = torch.autograd.grad(op(leaf).sum(), leaf)
    assert_close(found, expected, 1e-6)


# ---- drift -----------------------------------------------------------------------------------------------------------


def wrong_by(error: float, device: Any = DEVICE) -> tuple[Any, Tensor]:
    """An op whose inverse is off, and an input."""
    two = torch.tensor(2.0, device=device, requires_grad=True)
    return inv.pair(lambda x: x * two, lambda y: y / two * (1 + error)), torch.randn(8, 8, device=device)


def drift_of(op: Any, x: Tensor, **options: Any) -> None:
    x = x.detach().requires_grad_()
    torch.autograd.grad(inv.checkpoint(op, **options)(x * 1).sum(), x)


@pytest.mark.parametrize("device", ["sim:0", "sim:1"])
def test_the_warning_comes_with_a_later_pipeline(device: str) -> None:
    op, x = wrong_by(0.1, device)
    with sim.waits(raising=True):
        drift_of(op, x)
    torch.accelerator.synchronize(device)
    with pytest.warns(DriftWarning, match="about 1e-01 of its size"):
        drift_of(*wrong_by(0.0))


def test_nothing_is_read_before_it_has_come() -> None:
    op, x = wrong_by(0.0)
    x.requires_grad_()
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    for _ in range(6):
        with torch.Stream(DEVICE):
            y = inv.checkpoint(op)(x * 1)
        torch.autograd.grad(y.sum(), x)


def test_an_error_is_raised_where_it_belongs() -> None:
    op, x = wrong_by(0.1)
    with pytest.raises(DriftError, match="about 1e-01 of its size"):
        drift_of(op, x, drift="raise")
    drift_of(*wrong_by(0.0), drift="raise")


def test_other_bits_are_an_error_when_their_hash_has_come() -> None:
    weight = torch.ones(4, device=DEVICE, requires_grad=True)
    fast = inv.checkpoint(inv.exact(network([lambda x: (x * weight).sin()] * 2, dim=-1), mode="codes"))
    y = fast(torch.randn(6, 8, device=DEVICE).requires_grad_())
    weight.data.mul_(1.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y.sum().backward()
    torch.accelerator.synchronize()
    with pytest.raises(ReplayError, match="was not rebuilt with the bits of forward"):
        fast(torch.randn(6, 8, device=DEVICE))


def spreading(x: Tensor, mask: Tensor) -> tuple[Any, list[Tensor]]:
    """A pipeline that reads a condition, lowered: its value without the last row, and what has a gradient."""
    net = torch.nn.Linear(4, 4).to(DEVICE)
    f = inv.couple(lambda x, mask: (net(x) + mask).softmax(-1), lambda x, mask: net(x))
    op = inv.ops.given(inv.chain(inv.split(2, -1), f, f, inv.concat(2, -1)))
    x = x.to(DEVICE).requires_grad_()
    return inv.checkpoint(op)(x, mask.to(DEVICE))[0][:-1].sin().sum(), [x, *net.parameters()]


def test_a_number_that_is_no_longer_finite_is_told_and_a_mask_of_infinity_is_not() -> None:
    x, mask = torch.randn(300, 8), torch.zeros(300, 4)
    mask[:, 1] = -torch.inf
    torch.autograd.grad(*spreading(x, mask))
    torch.accelerator.synchronize()
    drift_of(*wrong_by(0.0))
    x[-1, 1] = torch.nan
    torch.autograd.grad(*spreading(x, mask))
    torch.accelerator.synchronize()
    with pytest.warns(DriftWarning, match="is not finite where it was"):
        drift_of(*wrong_by(0.0))
