"""The simulated accelerator itself: plain training on it is the CPU's, and its asynchrony is what it says."""

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from kit import assert_close
from torch import Tensor, nn

from . import sim


class Attention(nn.Module):
    """Self-attention with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x, x, x, need_weights=False)[0]


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8)), torch.randn(4, 8)),
    "convolutions": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.SiLU(), nn.ConvTranspose2d(4, 2, 2, 2), nn.AvgPool2d(2)),
        torch.randn(3, 2, 6, 6),
    ),
    "batch norm": lambda: (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()), torch.randn(16, 8)),
    "group norm": lambda: (nn.Sequential(nn.Conv1d(4, 8, 1), nn.GroupNorm(2, 8)), torch.randn(3, 4, 5)),
    "attention": lambda: (Attention(), torch.randn(2, 5, 8)),
    "embedding": lambda: (nn.Sequential(nn.Embedding(9, 8), nn.Tanh()), torch.randint(9, (4, 3))),
}


def train(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The state after three steps."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    return [t.detach().cpu() for t in net.state_dict().values()]


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_training_is_the_cpus(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    net, x = make()
    expected = train(copy.deepcopy(net), x)
    assert_close(train(net.to("sim"), x.to("sim")), expected, 1e-9)


def test_each_device_has_a_backward_thread_of_its_own() -> None:
    seen = []
    for device in ("cpu", "sim:0", "sim:1"):
        x = torch.ones(2, device=device, requires_grad=True)
        x.register_hook(lambda g: seen.append(threading.get_ident()))
        (2 * x).sum().backward()
    assert seen[0] == threading.get_ident() and len(set(seen)) == 3


def test_each_device_has_random_numbers_of_its_own() -> None:
    states = [torch.get_rng_state(), torch.sim.get_rng_state(1)]
    torch.sim.manual_seed_all(3)
    first, states[1] = torch.rand(5, device="sim:0"), torch.sim.get_rng_state(1)
    nn.functional.dropout(torch.ones(8, device="sim:0"))
    assert torch.equal(states[0], torch.get_rng_state()) and torch.equal(states[1], torch.sim.get_rng_state(1))
    assert torch.equal(torch.rand(5, device="sim:1").cpu(), first.cpu())


def test_devices_are_not_mixed() -> None:
    x, y = torch.ones(2, device="sim:0"), torch.ones(2, device="sim:1")
    for other in (y, torch.ones(2)):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            x + other
    assert torch.equal((x + torch.tensor(1.0)).cpu(), torch.full((2,), 2.0))


def test_memory_is_counted_and_filled_with_nan() -> None:
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    x = torch.empty(1000, device="sim")
    assert x.isnan().all()
    assert torch.accelerator.memory_allocated() - before == 8192
    y = x.zero_()[2:]
    x.untyped_storage().resize_(0)
    assert torch.accelerator.memory_allocated() == before
    assert torch.accelerator.max_memory_allocated() - before >= 8192
    del x, y


def test_pinned_copies_arrive_late() -> None:
    x, host = torch.arange(4.0, device="sim"), torch.empty(4, pin_memory=True)
    assert host.is_pinned()
    host.copy_(x, non_blocking=True)
    event = torch.Event("sim")
    event.record()
    assert host.isnan().all()
    assert [event.query() for _ in range(3)] == [False, False, True]
    assert_close(host, torch.arange(4.0))


@pytest.mark.parametrize("place", ["another device", "another stream"])
def test_an_event_elsewhere_tells_nothing_of_a_copy(place: str) -> None:
    x, host = torch.arange(4.0, device="sim:0"), torch.empty(4, pin_memory=True)
    host.copy_(x, non_blocking=True)
    with torch.Stream("sim:1" if place == "another device" else "sim:0"):
        event = torch.Event("sim")
        event.record()
    while not event.query():
        pass
    assert host.isnan().all()
    torch.accelerator.synchronize("sim:0")
    assert_close(host, torch.arange(4.0))


def test_waits_are_counted_and_can_raise() -> None:
    x = torch.eye(2, device="sim")
    with sim.waits() as seen:
        torch.equal(x, x)
        x.sum().item()
        x.nonzero()
        x.cpu()
        torch.tensor([1.0, 2.0], device="sim")
        torch.linalg.solve(x, x)
        x @ x + 1
    assert seen == {
        "aten::equal": 1, "item": 2, "aten::nonzero": 1, "copy to the host": 1, "copy from pageable memory": 1
    }  # fmt: skip
    with sim.waits(raising=True), pytest.raises(RuntimeError, match="the host waits for the device: item"):
        x.sum().item()


def test_a_generator_is_not_read_while_a_graph_is_captured() -> None:
    with sim.capture():
        assert torch.accelerator.current_stream().is_capturing()
        torch.rand(2, device="sim")
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            torch.sim.get_rng_state()
    assert not torch.accelerator.current_stream().is_capturing()


def test_autocast_lowers_what_it_lowers_elsewhere() -> None:
    x = torch.ones(2, 2, device="sim", dtype=torch.float32)
    with torch.autocast("sim", torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16
        assert (x @ x).softmax(-1).dtype is torch.float32
