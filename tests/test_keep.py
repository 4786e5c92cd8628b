"""What is kept of a call for its replay, when a replay stops, and what surrounds both: gradients and counts of operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from kit import Operators, assert_close, network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.flop_counter import FlopCounterMode

import invfunc as inv
from invfunc.errors import OptionError, ReplayError

WIDTH = 8
aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.reshape(*t.shape[:2], 2, WIDTH // 2).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = inv.keep("attention", F.scaled_dot_product_attention(q, k, v))
        return self.out(F.dropout(y.transpose(1, 2).reshape(x.shape), 0.3))


def transformer(depth: int = 2) -> inv.Invertible:
    torch.manual_seed(0)
    mlps = [nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)) for _ in range(depth)]
    blocks = [inv.couple(Attention().double(), mlp.double()) for mlp in mlps]
    return inv.chain(inv.split(2, dim=-1), *blocks, inv.concat(2, dim=-1))


def step(fn: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> tuple[list[Tensor], Counter[Any]]:
    """The gradients of a step with dropout, and its operators."""
    torch.manual_seed(1)
    x = torch.randn(2, 6, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    with Operators() as operators:
        gradients = torch.autograd.grad(fn(x).sin().sum(), [x, *weights])
    return list(gradients), operators.counts


def weights_of(op: inv.Invertible) -> list[Tensor]:
    return [p for part in op.parts for fn in part.functions if isinstance(fn, nn.Module) for p in fn.parameters()]


def keeps_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.overloadpacket is ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


KEEPS: dict[str, Any] = {
    "an operator": [ATTENTION],
    "an overload": [ATTENTION.default],
    "a name": ["attention"],
    "a name and an operator": ("attention", aten.tanh),
    "a policy": keeps_attention,
    "a policy that says yes": lambda context, op, *args, **kwargs: op is ATTENTION.default,
}


@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("keep", KEEPS)
def test_attention_that_is_kept_runs_once(keep: str, mode: str) -> None:
    net = transformer()
    expected, plain = step(net, weights_of(net))
    gradients, counts = step(inv.checkpoint(net, mode=mode, keep=KEEPS[keep]), weights_of(net))
    assert_close(gradients, expected)
    assert (plain[ATTENTION], counts[ATTENTION]) == (2, 2)
    assert step(inv.checkpoint(net, mode=mode), weights_of(net))[1][ATTENTION] == 4


@pytest.mark.parametrize("mode", ["invert", "recompute"])
def test_a_random_operator_that_is_kept(mode: str) -> None:
    """What comes behind it draws what it drew in forward."""

    def f(x: Tensor) -> Tensor:
        return F.dropout(F.dropout(x.sin(), 0.5).exp() * torch.rand_like(x), 0.5).cos()

    net = inv.chain(inv.split(2, dim=-1), inv.couple(f, f), inv.concat(2, dim=-1))
    for kept in ([aten.native_dropout], [aten.rand_like], [aten.native_dropout, aten.rand_like]):
        assert_close(step(inv.checkpoint(net, mode=mode, keep=kept), [])[0], step(net, [])[0])


def index_put(x: Tensor) -> Tensor:
    return x.clone().index_put_((torch.tensor([1]),), 2 * x[:1])


def write_out(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.mul(x.detach(), 2, out=out)
    return x * out


@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize(
    ("fn", "operator"),
    [
        (lambda x: F.dropout(x.sin(), 0.5), aten.bernoulli_),
        (lambda x: x * torch.empty_like(x).normal_(), aten.normal_),
        (lambda x: x.sin().add_(1), aten.add_),
        (lambda x: torch.zeros_like(x).copy_(x.sin()), aten.copy_),
        (index_put, aten.index_put_),
        (write_out, aten.mul),
    ],
)
def test_an_operator_that_writes_runs_again(fn: Callable[[Tensor], Tensor], operator: Any, mode: str) -> None:
    """What it writes is read by others, who would find memory that nobody has filled."""
    net = inv.chain(inv.split(2, dim=-1), inv.couple(lambda x: fn(x).cos(), torch.sin), inv.concat(2, dim=-1))
    expected, counts = step(net, [])
    gradients, again = step(inv.checkpoint(net, mode=mode, keep=[operator]), [])
    assert_close(gradients, expected)
    assert again[operator] > counts[operator]


def test_what_is_kept_serves_every_backward() -> None:
    net = transformer()
    x = torch.randn(2, 6, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    y = inv.checkpoint(net, keep=["attention"])(x).sin().sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])


def test_a_kept_result_that_is_written() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        return y.mul_(2).exp()

    y = inv.checkpoint(f, keep=[aten.sin])(torch.ones(3, requires_grad=True))
    with pytest.raises(ReplayError, match="the kept results of aten.sin.default have been modified"):
        y.sum().backward()


@pytest.mark.parametrize("keep", [[aten.tanh], ["a name"], lambda *args, **kwargs: True])
def test_results_in_inference_mode_are_kept(keep: Any) -> None:
    def f(x: Tensor) -> Tensor:
        with torch.inference_mode():
            scale = x.tanh().sum().item()
        return scale * x.tanh()

    net = inv.chain(inv.split(2, dim=-1), inv.couple(f, f), inv.concat(2, dim=-1))
    assert_close(step(inv.checkpoint(net, keep=keep), [])[0], step(net, [])[0])


def test_a_name_outside_of_a_call_is_the_tensor() -> None:
    x = torch.ones(3)
    assert inv.keep("x", x) is x


@pytest.mark.parametrize("keep", ["attention", 3, [3], [torch.tanh]])
def test_what_can_not_be_kept(keep: Any) -> None:
    with pytest.raises(OptionError, match=r"checkpoint: keep=.*expected a policy, or a sequence of operators"):
        inv.checkpoint(torch.tanh, keep=keep)


# ---- early stop ------------------------------------------------------------------------------------------------------


def flops(fn: Callable[[Tensor], Tensor], has_gradient: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        fn(torch.randn(4, 2 * WIDTH, requires_grad=has_gradient)).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("context", [nullcontext, lambda: set_checkpoint_early_stop(False)])
def test_a_block_stops_where_torch_s_does(early_stop: bool, context: Any) -> None:
    block = nn.Sequential(nn.Linear(2 * WIDTH, 8 * WIDTH), nn.GELU(), nn.Linear(8 * WIDTH, 2 * WIDTH))
    fast = inv.checkpoint(block, early_stop=early_stop)
    with context():
        ours = flops(fast)
        theirs = flops(lambda x: checkpoint(block, x, use_reentrant=False, early_stop=early_stop))
    assert ours == theirs
    assert (ours / flops(block) < 1.25) == (early_stop and context is nullcontext)


def mlp(width: int = WIDTH, out: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, out * width))


def last_product(width: int = WIDTH) -> int:
    """The operations of an MLP's last layer."""
    return 2 * 4 * 4 * width * width


def in_parts(*stages: Any) -> inv.Invertible:
    return inv.chain(inv.split(2), *stages, inv.concat(2))


FIRST: dict[str, tuple[Callable[[], inv.Invertible], int]] = {  # and what its first stage need not run again
    "a coupling": (lambda: in_parts(*[inv.couple(mlp(), mlp())] * 3), last_product()),
    "a linear layer": (lambda: in_parts(inv.couple(nn.Linear(WIDTH, WIDTH), mlp())), 2 * 4 * WIDTH * WIDTH),
    "behind one that saves nothing": (lambda: in_parts(inv.couple(torch.detach), inv.couple(mlp())), last_product()),
    "side by side": (
        lambda: in_parts(inv.parallel(*[in_parts(inv.couple(mlp(WIDTH // 2))) for _ in range(2)]), inv.couple(mlp())),
        2 * last_product(WIDTH // 2),
    ),
    "side by side, behind another": (
        lambda: in_parts(inv.couple(mlp()), inv.parallel(*[in_parts(inv.couple(mlp(WIDTH // 2))) for _ in range(2)])),
        last_product(),
    ),
    "a law that saves": (lambda: in_parts(inv.couple(inv.ops.tanh_scale(mlp(out=2)), law=inv.affine)), 0),
}


@pytest.mark.parametrize("has_gradient", [True, False])
@pytest.mark.parametrize("drift", ["warn", "off"])
@pytest.mark.parametrize("name", FIRST)
def test_the_first_stage_stops_where_nobody_wants_its_input(name: str, drift: str, has_gradient: bool) -> None:
    make, saved = FIRST[name]
    net = make()
    whole, early = (flops(inv.checkpoint(net, drift=drift, early_stop=on), has_gradient) for on in (False, True))
    assert whole - early == saved


@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_chain_runs_all_but_one_layer_again(has_gradient: bool) -> None:
    net = in_parts(*[inv.couple(mlp(), mlp()) for _ in range(4)])
    assert flops(inv.checkpoint(net), has_gradient) - flops(net, has_gradient) == (16 - 1) * last_product()


def test_a_first_stage_that_stops_has_the_gradients_of_plain_autograd() -> None:
    for make, _ in FIRST.values():
        net, x = make(), torch.randn(4, 2 * WIDTH, requires_grad=True)
        weights = [x, *inv.nn.Lowered(net).parameters()]
        found, expected = (torch.autograd.grad(op(x).sin().sum(), weights) for op in (inv.checkpoint(net), net))
        assert_close(found, expected)


# ---- contexts, and debug ---------------------------------------------------------------------------------------------


def test_contexts_surround_the_call_and_its_replay() -> None:
    seen = []

    @contextmanager
    def noting(name: str) -> Any:
        seen.append(name)
        try:
            yield
        finally:  # a replay that stops early leaves by an exception, as torch's does
            seen.append(f"end of {name}")

    net = inv.chain(inv.split(2), inv.couple(torch.tanh), inv.concat(2))
    for op in (net, torch.tanh):
        seen.clear()
        fast = inv.checkpoint(op, context_fn=lambda: (noting("forward"), noting("replay")))
        y = fast(torch.ones(2, 4, requires_grad=True))
        assert seen == ["forward", "end of forward"]
        y.sum().backward()
        assert seen[2:] == ["replay", "end of replay"]


@pytest.mark.parametrize("mode", ["invert", "recompute"])
def test_torch_s_selective_contexts(mode: str) -> None:
    net = transformer()
    contexts = partial(create_selective_checkpoint_contexts, [ATTENTION.default])
    expected, _ = step(net, weights_of(net))
    gradients, counts = step(inv.checkpoint(net, mode=mode, context_fn=contexts), weights_of(net))
    assert_close(gradients, expected)
    assert counts[ATTENTION] == 2


def test_a_context_that_is_no_pair() -> None:
    fast = inv.checkpoint(torch.tanh, context_fn=lambda: nullcontext())  # type: ignore[arg-type, return-value]
    with pytest.raises(OptionError, match="returned nullcontext, expected two context managers"):
        fast(torch.ones(2, requires_grad=True))


def test_debug_tells_the_first_operator_that_differs() -> None:
    turns = iter([lambda x: x.exp()[:2].exp(), lambda x: x.tanh()[:1].exp()])
    y = inv.checkpoint(lambda x: next(turns)(x), debug=True)(torch.ones(3, requires_grad=True))
    with pytest.raises(ReplayError, match="operator 0 was aten.exp.default in forward and aten.tanh.default again"):
        y.sum().backward()


@pytest.mark.parametrize("way", ["invert", "recompute"])
@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_an_exact_op_keeps_nothing_and_gives_the_same_bits(mode: str, way: str) -> None:
    modules = [nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(4)]
    op = inv.exact(network(modules), mode)
    x = torch.randn(3, 8, requires_grad=True)
    wrt = [x, *(weight for module in modules for weight in module.parameters())]
    fast = inv.checkpoint(op, mode=way, keep=[torch.ops.aten.addmm])
    found, expected = (torch.autograd.grad(f(x).sin().sum(), wrt) for f in (fast, op))
    assert all(map(torch.equal, found, expected))


def test_a_named_tensor_that_was_written_in_place_before_is_refused() -> None:
    def f(x: Tensor) -> Tensor:
        h = x @ x
        h *= 3
        return inv.keep("h", h).sin()

    with pytest.raises(ReplayError, match="the kept results of aten.mm.default have been modified"):
        inv.checkpoint(f, keep=["h"])(torch.randn(3, 3, requires_grad=True))


@pytest.mark.parametrize(
    "options",
    [
        {"keep": [aten.addmm]},
        {"context_fn": partial(create_selective_checkpoint_contexts, [aten.addmm.default])},  # it counts the casts
    ],
)
def test_a_cast_that_autocast_spares_the_second_time_moves_no_kept_result(options: dict[str, Any]) -> None:
    module, x = nn.Linear(4, 4, dtype=torch.float32), torch.randn(3, 4, dtype=torch.float32, requires_grad=True)

    def step(call: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        return torch.autograd.grad(y.float().sum(), x)[0]

    def f(x: Tensor) -> Tensor:
        return module(module(x)).sin()

    assert torch.equal(step(inv.checkpoint(f, **options)), step(f))
    assert torch.equal(step(inv.checkpoint(f, early_stop=False, **options)), step(f))


def test_a_policy_may_keep_views_of_weights_that_were_written_before() -> None:
    module, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    nn.init.ones_(module.weight)
    fast = inv.checkpoint(module, keep=lambda *args, **kwargs: True)
    assert_close(torch.autograd.grad(fast(x).sin().sum(), x), torch.autograd.grad(module(x).sin().sum(), x))


def test_an_operator_alone_is_no_policy() -> None:
    with pytest.raises(OptionError, match="checkpoint: keep=.*, expected a policy, or a sequence of operators"):
        inv.checkpoint(torch.sin, keep=torch.ops.aten.sin)
