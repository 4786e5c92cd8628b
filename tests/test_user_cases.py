"""What users of reversible libraries ran into, each thread a test named after its symptom."""

import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import assert_close, network
from torch import Tensor, nn

import invfunc as inv
from invfunc.errors import DonatedError
from invfunc.look.memory import measure


def conv(channels: int, *extra: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), *extra, nn.ReLU(), nn.Conv2d(channels, channels, 1)
    )


class Network(nn.Module):
    """A reversible residual network as people write it: stem, blocks on two streams, head."""

    def __init__(self, lower: Callable[[inv.Invertible], Any], *extra: Callable[[], nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.ModuleList(conv(2, *(make() for make in extra)) for _ in range(2 * depth))
        self.trunk = lower(network(self.blocks))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(torch.relu(self.stem(x))).mean((2, 3)))


def networks(*extra: Callable[[], nn.Module], depth: int = 3) -> tuple[Network, Network]:
    """The same network twice, plain and lowered."""
    plain, fast = (Network(lower, *extra, depth=depth) for lower in (lambda op: op, inv.checkpoint))
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def train(net: nn.Module, steps: int = 3, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(3, 1, 4, 4)).pow(2).sum().backward()
        optimizer.step()
    return [p.grad for p in net.parameters()]


ONE = torch.ones(())  # a tensor, so that backward asks for what it was multiplied with


# 1. silvandeleemput/memcnn#56
@pytest.mark.parametrize("op", ["op", "inverse"])
def test_dropout_in_a_block_makes_the_rebuilt_input_and_the_gradients_wrong(op: str) -> None:
    plain, fast = networks(lambda: nn.Dropout(0.5), lambda: nn.Dropout2d(0.5))
    gradients = train(plain)
    expected = torch.get_rng_state()
    assert_close(train(fast), gradients)
    assert torch.equal(torch.get_rng_state(), expected)

    f, g, rebuilt = nn.Dropout(0.5), nn.Dropout(0.3), {}

    def spy(name: str) -> inv.Invertible:
        """Sees what backward rebuilds."""
        return inv.pair(lambda x: x * ONE, lambda y: rebuilt.setdefault(name, y) * 1)

    block = inv.couple(f, g) if op == "op" else ~inv.couple(f, g)
    x = torch.randn(2, 8, 5, requires_grad=True)
    inv.checkpoint(inv.chain(inv.split(2), inv.parallel(spy("a"), spy("b")), block, inv.concat(2)))(x).sum().backward()
    assert_close(torch.cat([rebuilt["a"], rebuilt["b"]], 1), x.detach())


# 2. silvandeleemput/memcnn#70
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh, lambda: nn.ReLU(inplace=True), nn.ELU])
@pytest.mark.parametrize("donate", [False, True])
def test_a_relu_before_the_pipeline_raises_an_in_place_error(activation: Callable[[], nn.Module], donate: bool) -> None:
    linear, f, g = nn.Linear(3, 8), nn.Linear(4, 4), nn.Linear(4, 4)
    op, x = inv.chain(inv.split(2), inv.couple(f, g), inv.concat(2)), torch.randn(5, 3)
    parameters = [p for module in (linear, f, g) for p in module.parameters()]
    found = []
    for fn in op, inv.checkpoint(op, donate=donate):
        found.append(torch.autograd.grad(fn(activation()(linear(x))).pow(2).sum(), parameters))
    assert_close(*found)


# 3. memcnn#12, RevTorch#13, efficient_densenet_pytorch#73
def test_batch_norm_counts_a_step_twice() -> None:
    plain, fast = networks(lambda: nn.BatchNorm2d(2))
    assert_close(train(fast), train(plain))
    assert fast.state_dict()["blocks.0.1.num_batches_tracked"] == 3
    for (name, expected), found in zip(plain.state_dict().items(), fast.state_dict().values(), strict=True):
        assert_close(found, expected), name


# 4. memcnn#77
def test_a_step_runs_each_function_three_times_and_takes_twice_as_long() -> None:
    plain, fast = networks()
    counts = {}
    for name, net in ("plain", plain), ("fast", fast):
        calls: list[nn.Module] = []
        for block in net.blocks:
            block.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(module))
        train(net, steps=1)
        counts[name] = [calls.count(block) for block in net.blocks]
    assert counts == {"plain": [1] * 6, "fast": [2] * 6}
    x = torch.randn(3, 1, 8, 8)
    flops = [measure(lambda net=net: net(x).sum().backward()).flops for net in (plain, fast)]
    assert flops[1] <= 1.34 * flops[0]


# 5. memcnn#41, memcnn#53, memcnn#6
def test_memory_grows_with_depth(no_gc: None) -> None:
    def peak(lower: int, depth: int) -> float:
        """In activations, without parameters, their gradients and the input."""
        net = networks(depth=depth)[lower]
        x = torch.randn(8, 1, 32, 32)
        net(x).sum().backward()  # the gradients are there
        return measure(lambda: net(x).sum().backward()).peak_bytes / (8 * 8 * 4 * 32 * 32)

    assert peak(1, 64) <= 1.05 * peak(1, 4)
    assert peak(0, 16) >= 2 * peak(0, 4)  # the measurement can tell


# 6. memcnn#37
def test_memory_climbs_from_step_to_step(no_gc: None) -> None:
    _, net = networks(lambda: nn.Dropout(0.1))
    x = torch.randn(8, 1, 32, 32)
    assert measure(lambda: [net(x) for _ in range(20)].clear()).held_bytes == 0  # forward only
    net(x).sum().backward()
    assert measure(lambda: [net(x).sum().backward() for _ in range(5)].clear()).held_bytes == 0

    out = net.trunk(torch.randn(2, 4, 8, 8))
    alive = weakref.ref(out), weakref.ref(out.grad_fn)
    del out
    assert [ref() for ref in alive] == [None, None]


# 7. memcnn#38
def test_reading_the_input_after_the_call_is_a_segmentation_fault() -> None:
    script = """
import torch, invfunc as inv
op = inv.chain(inv.split(2), inv.couple(torch.nn.Linear(4, 4)), inv.concat(2))
x = torch.relu(torch.nn.Linear(3, 8)(torch.randn(5, 3)))
assert torch.equal(x + inv.checkpoint(op)(x), inv.checkpoint(op)(x) + x)
print(x.sum().item() == (x + 0 * inv.checkpoint(op)(x)).sum().item())
f = inv.checkpoint(op, donate=True)
for use in (lambda: x + f(x), lambda: f(x) + x, lambda: x.tolist(), lambda: x.numpy()):
    x = torch.relu(torch.nn.Linear(3, 8)(torch.randn(5, 3)))
    try:
        y = f(x) if use.__code__.co_names in (("x", "tolist"), ("x", "numpy")) else None
        use()
    except inv.errors.DonatedError as error:
        print("DonatedError")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True"] + ["DonatedError"] * 4


def test_the_input_is_the_callers_by_default() -> None:
    op = inv.chain(inv.split(2), inv.couple(nn.Linear(4, 4)), inv.concat(2))
    x = torch.randn(5, 8, requires_grad=True) * 1
    expected = x.detach().clone()
    assert_close(x + inv.checkpoint(op)(x), x + op(x))
    assert torch.equal(x, expected)
    with pytest.raises(DonatedError):
        x + inv.checkpoint(op, donate=True)(x)  # python holds x on its stack: it is read after the call
    with pytest.raises(DonatedError):
        x.tolist()
    assert "donated" in str(x)


# 8. memcnn#36, RevTorch#7, RevTorch#8, RevTorch#9
def test_a_second_backward_needs_a_setting() -> None:
    plain, fast = networks()
    x, parameters = torch.randn(3, 1, 4, 4), list(fast.parameters())
    expected = torch.autograd.grad(plain(x).pow(2).sum(), list(plain.parameters()))
    total = fast(x).pow(2).sum()
    total.backward(retain_graph=True)
    total.backward()
    assert_close([p.grad for p in parameters], [2 * g for g in expected])
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        total.backward()
    out = fast(x)  # and losses of several heads, each with its own backward
    out[:, 0].sum().backward(retain_graph=True)
    out[:, 1].sum().backward()


# 10. memcnn#57, memcnn PR#60
def test_autocast_is_an_error_or_casts_everything_to_fp32() -> None:
    seen: list[torch.dtype] = []

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            seen.append(out.dtype)
            return out.float()

    f, g = Layer(4, 4, dtype=torch.float32), Layer(4, 4, dtype=torch.float32)
    op = inv.chain(inv.split(2), inv.couple(f, g), inv.couple(g, f), inv.concat(2))
    x = torch.randn(3, 8, dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, rebuilt = inv.checkpoint(op)(x), op.inverse(op(x))
    y.sum().backward()
    gradient = torch.autograd.grad(y_plain(op, x).sum(), x)[0]
    assert set(seen) == {torch.bfloat16}
    assert y.dtype == torch.float32
    assert_close(rebuilt, x, tolerance=1e-5)  # streams in fp32, rounded once: the products are the same
    assert_close(x.grad, gradient, tolerance=1e-5)


def y_plain(op: inv.Invertible, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return op(x)


# 11. lucidrains/reformer-pytorch#29
@pytest.mark.parametrize("mode", ["invert", "recompute", "store"])
def test_without_requires_grad_of_the_input_nothing_trains(mode: str) -> None:
    plain, fast = Network(lambda op: op), Network(lambda op: inv.checkpoint(op, mode=mode))
    fast.load_state_dict(plain.state_dict())
    for net in plain, fast:
        out = net.trunk(torch.ones(2, 4, 4, 4))  # data: no gradient
        assert out.requires_grad
        out.pow(2).sum().backward()
    for expected, found in zip(plain.blocks.parameters(), fast.blocks.parameters(), strict=True):
        assert found.grad is not None
        assert_close(found.grad, expected.grad)

    embedding, f = nn.Embedding(7, 8), nn.Linear(4, 4)
    op = inv.chain(embedding, inv.split(2, dim=-1), inv.couple(f), inv.concat(2, dim=-1))
    tokens = torch.tensor([[1, 2, 3]])
    wrt = [embedding.weight, *f.parameters()]
    found, expected = (torch.autograd.grad(fn(tokens).pow(2).sum(), wrt) for fn in (inv.checkpoint(op, mode=mode), op))
    assert_close(found, expected)
