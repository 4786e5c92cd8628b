"""`measure` counts to the byte: each expected number here is worked out by hand."""

import gc
from weakref import WeakSet

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

from invfunc.look import memory
from invfunc.look.memory import Measurement, measure

# What is freed is freed by reference counts: memory held by a cycle shows.
pytestmark = pytest.mark.usefixtures("no_gc")

N = 1000
B = 8 * N  # Bytes of a float64 vector of N elements.
SCALAR = 8


def taken(fn, *args, **kwargs) -> tuple[int, int]:
    measured = measure(fn, *args, **kwargs)
    return measured.peak_bytes, measured.held_bytes


def vector(**kwargs) -> torch.Tensor:
    return torch.ones(N, **kwargs)


# ---- births and deaths ----


def test_nothing_takes_nothing():
    assert measure(lambda: None) == Measurement(0, 0, 0, None)


def test_what_the_call_returns_is_held():
    assert taken(vector) == (B, B)


def test_arguments_are_not_counted():
    x, y = vector(), vector()
    assert taken(torch.add, x, y) == (B, B)
    assert taken(torch.add, input=x, other=y) == (B, B)


def test_a_chain_frees_each_temporary_after_its_use():
    x = vector()
    assert taken(lambda: x.exp().sin().cos().tanh()) == (2 * B, B)


def test_the_peak_may_be_long_before_the_end():
    def rise_and_fall():
        alive = [vector() for _ in range(5)]
        del alive[1:]
        alive.append(vector())
        return alive

    assert taken(rise_and_fall) == (5 * B, 2 * B)


def test_peaks_do_not_add_up():
    def twice():
        vector().add(1)
        vector().add(1)

    assert taken(twice) == (2 * B, 0)


def test_what_the_call_leaves_elsewhere_is_held():
    kept = []
    assert taken(lambda: kept.append(vector())) == (B, B)


def test_a_cycle_holds_until_it_is_collected():
    def cycle():
        knot = [vector()]
        knot.append(knot)

    assert taken(cycle) == (B, B)
    gc.collect()


def test_a_freed_address_may_be_used_again():
    def reuse():
        for _ in range(50):
            x = vector()
            del x
        return vector()

    assert taken(reuse) == (B, B)


# ---- one storage, many tensors ----


def test_views_share():
    x = vector()
    assert taken(lambda: [x.view(10, -1), x[::2], x.expand(7, N), x.detach(), x.real]) == (0, 0)


def test_a_view_keeps_the_whole_storage():
    assert taken(lambda: vector()[:1]) == (B, B)


def test_chunks_of_one_tensor_count_once():
    assert taken(lambda: vector().chunk(4)) == (B, B)


def test_an_expanded_scalar_is_a_scalar():
    assert taken(lambda: vector().new_zeros(()).expand(N)) == (B + SCALAR, SCALAR)


def test_in_place_operators_add_nothing():
    x = vector()
    assert taken(lambda: x.add_(1).mul_(2).sin_()) == (0, 0)


def test_out_is_counted_where_it_was_made():
    x, out = vector(), vector()
    assert taken(lambda: torch.add(x, 1, out=out)) == (0, 0)
    assert taken(lambda: torch.add(x, 1, out=torch.empty(0))) == (B, B)


def test_dtype_counts():
    assert taken(lambda: vector(dtype=torch.bfloat16)) == (2 * N, 2 * N)
    assert taken(lambda: vector(dtype=torch.bool)) == (N, N)


# ---- storages that change size ----


def test_resize_grows_a_tensor():
    assert taken(lambda: vector().resize_(3 * N)) == (3 * B, 3 * B)


def test_resize_of_a_storage_frees_it():
    def swap_memory():
        x = vector()
        x.untyped_storage().resize_(0)
        return x, vector()

    assert taken(swap_memory) == (B, B)


def test_resize_of_an_older_storage_frees_what_was_there():
    x = vector()

    def borrow():
        y = x.sin()
        x.untyped_storage().resize_(0)
        y = y.cos().tanh()
        x.untyped_storage().resize_(B)
        x.copy_(y)

    assert taken(borrow) == (2 * B, 0)  # sin, cos and tanh without x; then tanh beside x.


def test_a_storage_that_grows_at_the_very_end_counts():
    x = vector()
    assert taken(lambda: x.view(-1).untyped_storage().resize_(3 * B)) == (2 * B, 2 * B)


def test_what_the_call_frees_of_older_memory_is_negative():
    older = [vector()]
    assert taken(lambda: older.pop().sum()) == (SCALAR, SCALAR - B)


# ---- autograd ----


def test_a_graph_holds_what_it_saved():
    x = vector(requires_grad=True)
    # exp saves its result, sin its argument (the same storage); cos saves sin's result; sum nothing.
    assert taken(lambda: x.exp().sin().cos().sum()) == (3 * B + SCALAR, 2 * B + SCALAR)


def test_backward_frees_the_graph_and_leaves_the_gradient():
    x = vector(requires_grad=True)
    # exp's result, then sum's, its gradient (a scalar, expanded), and the product that becomes x.grad.
    assert taken(lambda: x.exp().sum().backward()) == (2 * B + 2 * SCALAR, B)
    assert taken(lambda: x.exp().sum().backward())[1] == 0  # Accumulated in place.


def test_a_retained_graph_stays():
    x = vector(requires_grad=True)
    loss = None

    def step():
        nonlocal loss
        loss = x.exp().sum()
        loss.backward(retain_graph=True)

    assert taken(step)[1] == 2 * B + SCALAR  # exp's result, the gradient and the loss.
    assert taken(lambda: loss.backward())[1] == -B  # Now the graph lets exp's result go.


def test_an_older_graph_is_freed_as_backward_reads_it():
    x = vector(requires_grad=True)
    y = x.exp().sin().cos().sum()
    assert taken(lambda: torch.autograd.grad(y, x))[1] == B - 2 * B


def test_linear_relu_backward():
    batch, wide, narrow = 10, 6, 4
    linear, x = nn.Linear(wide, narrow), torch.randn(batch, wide)
    out = 8 * batch * narrow
    forward = measure(lambda: linear(x).relu().sum())
    assert forward == Measurement(2 * out, out + SCALAR, 2 * batch * wide * narrow)  # relu saves its result.

    step = measure(lambda: linear(x).relu().sum().backward())
    weight, bias = 8 * wide * narrow, 8 * narrow
    assert step.held_bytes == weight + bias
    assert step.flops == 2 * forward.flops  # x needs no gradient.


def test_a_checkpoint_recomputes():
    x = vector(requires_grad=True)

    def layers(x):
        return x.exp().sin().cos()

    def checkpointed():
        return torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=False)

    assert taken(layers, x) == (3 * B, 3 * B)
    assert taken(checkpointed)[1] == B


def test_custom_functions_are_followed():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x * 1, x * 2)
            return x * x

        @staticmethod
        def backward(ctx, *grads):
            return grads[0] * ctx.saved_tensors[1]

    x = vector(requires_grad=True)
    assert taken(Square.apply, x) == (3 * B, 3 * B)
    assert taken(lambda: Square.apply(x).sum().backward())[1] == B


def test_inference_mode():
    with torch.inference_mode():
        x, linear = torch.ones(10, 6), nn.Linear(6, 4)
        assert measure(linear, x) == Measurement(8 * 40, 8 * 40, 2 * 10 * 6 * 4)


# ---- tensors made outside operators, and wrapped ones ----


def test_tensors_of_data():
    assert taken(torch.tensor, [1.0, 2.0]) == (16, 16)


def test_an_operator_handed_a_storage_did_not_make_it():
    x, y = vector(), vector()
    assert taken(lambda: y.set_(x.untyped_storage())) == (0, -B)


def test_subclasses_are_looked_into():
    from torch.testing._internal.two_tensor import TwoTensor

    pair = TwoTensor(vector(), vector())
    assert taken(lambda: pair.sin().cos()) == (4 * B, 2 * B)


def test_sparse_tensors_do_not_disturb():
    sparse = torch.eye(4).to_sparse()
    assert taken(lambda: sparse @ torch.ones(4, 4)) == (2 * 128, 128)


# ---- torch.func ----


def test_grad_transform():
    x = vector()
    assert taken(torch.func.grad(lambda x: x.exp().sum()), x)[1] == B


def test_vmap_transform():
    x = torch.ones(10, N)
    assert taken(torch.func.vmap(lambda x: x.sin().cos()), x) == (20 * B, 10 * B)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_transforms_through_modules(transform):
    linear, x = nn.Linear(3, 3), torch.randn(3)
    result = measure(transform(lambda x: linear(x).pow(2)), x)
    assert result.held_bytes >= 9 * 8 and result.flops > 0


# ---- arithmetic and time ----


@pytest.mark.parametrize("grad", [False, True])
def test_flops_are_those_of_torchs_counter(grad):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5), nn.LayerNorm(5))
    x = torch.randn(3, 2, 8, 8, requires_grad=grad)

    def run():
        y = net(x).sum()
        return y.backward() if grad else y

    with FlopCounterMode(display=False) as counter:
        run()
    assert measure(run).flops == counter.get_total_flops() > 0


def test_fn_is_called_once_and_once_more_for_the_time():
    calls = []
    assert measure(calls.append, 0).seconds is None and len(calls) == 1
    timed = measure(lambda: calls.append(0), timed=True)
    assert timed.seconds is not None and 0 < timed.seconds < 10 and len(calls) == 3


def test_the_timed_call_is_not_instrumented():
    modes = []
    measure(lambda: modes.append(_get_current_dispatch_mode()), timed=True)
    assert modes[0] is not None and modes[1] is None


# ---- manners ----


def test_measurements_nest():
    x = vector()
    inner = []

    def outer():
        y = x.sin()
        inner.append(measure(lambda: y.cos().tanh()))
        return y

    assert taken(outer) == (3 * B, B)
    assert inner == [Measurement(2 * B, B, 0)]


def test_an_exception_leaves_nothing_behind():
    def fails():
        vector().add(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        measure(fails)
    assert _get_current_dispatch_mode() is None
    assert not memory._open_allocators and not memory._open_ledgers
    assert "resize_" not in vars(torch.UntypedStorage)
    assert taken(vector) == (B, B)


def test_the_work_does_not_grow_with_what_is_alive(monkeypatch):
    def looks(count):
        seen = []
        monkeypatch.setattr(memory.StorageLedger, "reread", lambda *_: seen.append(1))
        measure(lambda: [vector() for _ in range(count)])
        return len(seen)

    assert looks(100) == 10 * looks(10)


def test_nothing_is_kept_alive():
    kept = []
    measure(lambda: kept.append(vector()))
    storages = WeakSet([kept[0].untyped_storage()])
    kept.clear()
    assert not storages


def test_the_global_random_stream_is_that_of_a_plain_call():
    state = torch.get_rng_state()
    measured = []
    measure(lambda: measured.append(torch.randn(3)))
    torch.set_rng_state(state)
    assert torch.equal(measured[0], torch.randn(3))


# ---- CUDA ----


class FakeAllocator:
    """The part of the caching allocator's statistics that `measure` reads."""

    def __init__(self) -> None:
        self.served = self.current = self.peak = 100

    def allocate(self, size: int) -> None:
        self.served += 1
        self.current += size
        self.peak = max(self.peak, self.current)

    def stats(self) -> dict[str, int]:
        return {
            "allocation.all.allocated": self.served,
            "allocated_bytes.all.current": self.current,
            "allocated_bytes.all.peak": self.peak,
        }

    def reset(self) -> None:
        self.peak = self.current


@pytest.fixture
def allocator(monkeypatch) -> FakeAllocator:
    fake = FakeAllocator()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "memory_stats", lambda index: fake.stats())
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda index: fake.reset())
    return fake


def test_the_allocators_statistics_are_added_to_the_cpus(allocator):
    def call():
        allocator.allocate(50)
        allocator.allocate(-30)
        return vector()

    assert taken(call) == (50 + B, 20 + B)
    assert measure(call).devices == {"xpu:0": (50, 20)}
    assert taken(vector) == (B, B) and not measure(vector).devices


def test_an_inner_measurement_does_not_lose_the_outer_peak(allocator):
    inner = []

    def call():
        allocator.allocate(50)
        allocator.allocate(-50)
        inner.append(taken(allocator.allocate, 7))

    assert taken(call) == (50, 7)
    assert inner == [(7, 7)]


@pytest.mark.cuda
def test_cuda_counts_a_vector():
    measured = measure(lambda: vector(device="cuda").exp().sin())
    assert measured.peak_bytes >= 2 * B and B <= measured.held_bytes < 2 * B
