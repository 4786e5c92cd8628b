"""Blocks of a model that exists, run again in backward: to the bit, in place, and undone."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from kit import assert_close, assert_refused
from residual_models import FAMILIES, Cache, Llama, words
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import invfunc as inv
from invfunc.errors import OptionError
from invfunc.look.memory import measure
from invfunc.plan import Recompute


def step(model: nn.Module, *args: Any) -> tuple[Tensor, list[Tensor | None]]:
    torch.manual_seed(3)
    y = model(*args)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), list(torch.autograd.grad(y.square().sum(), parameters))


@pytest.fixture
def model() -> Llama:
    return Llama()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_the_model_to_the_bit(family: str) -> None:
    make, blocks = FAMILIES[family]
    model, x = make(), words()
    expected = step(model, x)
    inv.nn.checkpoint_blocks(model, blocks)
    assert_close(step(model, x), expected, 0.0)


def test_modules_keys_and_the_list_of_blocks_stay(model: Llama) -> None:
    keys, layers, modules = list(model.state_dict()), list(model.layers), list(model.named_modules())
    handle = inv.nn.checkpoint_blocks(model, "layers.*")
    assert list(model.state_dict()) == keys and list(model.named_modules()) == modules
    assert list(model.layers) == layers and model.layers[1] is layers[1] and len(model.layers) == 4
    assert repr(handle) == "<4 blocks: layers.0, layers.1, layers.2, layers.3>"


def test_undoing_goes_back_to_what_was_before(model: Llama) -> None:
    outer = inv.nn.checkpoint_blocks(model, "layers.*")
    before = [layer.forward for layer in model.layers]
    with inv.nn.reversible(model, "layers.*"):
        assert model.layers[0].forward is not before[0]
    assert [layer.forward for layer in model.layers] == before
    outer.remove()
    outer.remove()
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_what_was_done_last_is_undone_first(model: Llama) -> None:
    outer = inv.nn.checkpoint_blocks(model, "layers.*")
    inv.nn.checkpoint_blocks(model, "layers.*").remove()  # the same function, for which nothing is done
    inner = inv.nn.reversible(model, "layers.*")
    assert_refused(OptionError, "layers.0 has been changed again; undo what was done to it last first", outer.remove)
    inner.remove()
    outer.remove()
    assert all("forward" not in vars(layer) for layer in model.layers)


@pytest.mark.parametrize("change", [inv.nn.checkpoint_blocks, inv.nn.reversible])
def test_nothing_is_put_around_reversible_blocks(model: Llama, change: Callable[..., Any]) -> None:
    inv.nn.reversible(model, "layers.[23]")
    message = "layers.2 is reversible already; call remove() of its handle"
    assert_refused(OptionError, message, lambda: change(model, "layers.*"))
    assert "forward" not in vars(model.layers[0])


def test_a_cache_that_a_block_writes_is_as_it_was_when_it_runs_again(model: Llama) -> None:
    x, first = words(), words(3)

    def both(model: nn.Module) -> tuple[list[Tensor], list[int]]:
        cache = Cache()
        torch.manual_seed(2)
        with torch.no_grad():
            model(first, cache)
        return step(model, x, cache)[1], [keys.shape[2] for keys, _ in cache.layers.values()]

    expected = both(model)
    inv.nn.checkpoint_blocks(model, "layers.*")
    assert_close(both(model), expected, 0.0)


class Keys:
    """What a block writes into, of a class that nobody knows."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


class Writer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        keys.seen.append(self.linear(x).tanh())
        return torch.stack(keys.seen).sum(0)


class Writers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Writer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        keys = Keys()
        for block in self.blocks:
            x = block(x, keys)
        return x


@pytest.mark.compile
def test_a_cache_below_a_compiler_is_written_once() -> None:
    model, x = Writers(), torch.randn(2, 4)
    expected = step(model, x)
    inv.nn.checkpoint_blocks(model, "blocks.*")
    assert_close(step(torch.compile(model, backend="eager", fullgraph=True), x), expected, 0.0)


class Talkative(nn.Module):
    """A block that takes and returns anything."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: Tensor, notes: dict[str, Any]) -> dict[str, Any]:
        notes["calls"] += 1
        return {"x": self.net(x).sin() * scale, "more": (x, None, notes["calls"])}


def test_a_block_may_take_and_return_anything() -> None:
    model, x, scale = (
        nn.ModuleList([Talkative(), Talkative()]),
        torch.randn(3, 4),
        torch.randn(3, 4, requires_grad=True),
    )

    def run() -> Any:
        notes, y, outs = {"calls": 0}, x, []
        for block in model:
            outs.append(block(y, scale=scale.sin(), notes=notes))
            y = outs[-1]["x"]
        return outs, torch.autograd.grad(y.sum(), [scale, *model.parameters()]), notes

    expected = run()
    inv.nn.checkpoint_blocks(model, "*")
    assert_close(run(), expected, 0.0)


def calls_in_a_step(model: nn.Sequential) -> int:
    count = [0]
    for block in model:
        block[0].register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    model(torch.randn(3, 4)).sum().backward()
    return count[0]


def test_a_block_may_run_more_than_once() -> None:
    first, second = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)
    model, x = nn.Sequential(first, second, first, first), torch.randn(3, 4)
    expected = step(model, x)
    assert len(inv.nn.checkpoint_blocks(model, "*")) == 2
    assert_close(step(model, x), expected, 0.0)


def test_frozen_blocks_are_run_once() -> None:
    """Adapters in the top two of eight: two evaluations more; torch's checkpoint makes eight more, or none of x."""

    def blocks() -> nn.Sequential:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(8)))
        for parameter in model[:6].parameters():
            parameter.requires_grad_(False)
        return model

    ours, theirs = blocks(), blocks()
    inv.nn.checkpoint_blocks(ours, "*")
    assert calls_in_a_step(ours) == 8 + 2
    for block in theirs:
        plain = block.forward
        block.forward = lambda x, plain=plain: checkpoint(plain, x.requires_grad_(), use_reentrant=False)
    assert calls_in_a_step(theirs) == 8 + 8


def test_what_is_held_is_one_input_for_each_block() -> None:
    held = []
    for depth in (4, 8):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)) for _ in range(depth)))
        inv.nn.checkpoint_blocks(model, "*")
        x = torch.randn(32, 8, requires_grad=True)
        held.append(measure(model, x).held_bytes)
    assert held[1] - held[0] <= 4 * x.nbytes * 1.01


def test_a_plan_chooses_the_blocks(model: Llama) -> None:
    x = words()
    plain = inv.plan(model, x, max_time=1.0)
    plan = plain.at((plain.peak_bytes + min(point.peak_bytes for point in plain.curve)) // 2)
    again = [f"layers.{node.first - 1}" for node in plan.schedule if isinstance(node, Recompute)]
    expected = step(model, x)
    handle = inv.nn.checkpoint_blocks(model, plan)
    assert list(handle.blocks) == again and 0 < len(again) < 4
    assert_close(step(model, x), expected, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert measure(lambda: model(x).square().mean().backward()).peak_bytes <= 1.01 * plan.peak_bytes
    handle.remove()
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_a_plan_for_another_model_is_refused(model: Llama) -> None:
    plan = inv.plan(model, words(), max_time=1.0)
    model.layers = model.layers[:3]
    assert_refused(
        OptionError,
        "this plan is for another op, expected before layers > LlamaDecoderLayer > LlamaDecoderLayer",
        lambda: inv.nn.checkpoint_blocks(model, plan),
    )
    chain = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    assert_refused(
        OptionError,
        "Sequential is planned as a chain, expected a model with a list of blocks",
        lambda: inv.nn.checkpoint_blocks(chain, inv.plan(chain, (8, 4), max_time=1.0)),
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(model: Llama, copied: Callable[[Any], Any]) -> None:
    inv.nn.checkpoint_blocks(model, "layers.*")
    x = words()
    expected, other = step(model, x), copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_close(step(other, x), expected, 0.0)


def test_patterns_are_paths_with_stars(model: Llama) -> None:
    assert list(inv.nn.checkpoint_blocks(model, "layers.*.mlp").blocks) == [f"layers.{i}.mlp" for i in range(4)]
    assert list(inv.nn.checkpoint_blocks(model, "layers.[23]").blocks) == ["layers.2", "layers.3"]
    assert_refused(
        OptionError,
        "Llama has no 'h.*', expected the path of submodules, as in get_submodule, with * for any name; its lists are "
        "layers.*, layers.0.mlp.*",
        lambda: inv.nn.checkpoint_blocks(model, "h.*"),
    )
    assert_refused(
        OptionError,
        "checkpoint: determinism_check='no'",
        lambda: inv.nn.checkpoint_blocks(model, "layers.*", determinism_check="no"),
    )


# ---- what a model collects on the way, in a container in a context variable ------------------------------------------


COLLECTED: ContextVar[dict[str, list[Tensor]] | None] = ContextVar("collected", default=None)


def collecting(model: Llama, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the model gives, and what its layers of attention have put where they were told to."""
    token = COLLECTED.set(found := {"attention": []})
    try:
        return model(x), found["attention"]
    finally:
        COLLECTED.reset(token)


def collect(module: nn.Module, args: Any, out: Any) -> None:
    if (found := COLLECTED.get()) is not None:
        found["attention"].append(out[0])


CHANGES = [inv.nn.checkpoint_blocks, inv.nn.reversible]


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_model_collects_is_let_go_without_a_backward(model: Llama, change: Callable[..., Any]) -> None:
    """The container held the graph, and the graph the context with the container."""
    change(model, "layers.*")
    for layer in model.layers:
        layer.self_attn.register_forward_hook(collect)
    y, found = collecting(model, words())
    gone = [weakref.ref(t) for t in found]
    del y, found
    gc.collect()
    assert len(gone) == 4 and not any(ref() is not None for ref in gone)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_model_collects_when_it_runs_again_belongs_to_nobody(model: Llama, change: Callable[..., Any]) -> None:
    """It held the graph of every block that had run again, so that no memory was saved."""
    change(model, "layers.*")
    for layer in model.layers:
        layer.self_attn.register_forward_hook(collect)
    x, steps = words(), []
    for mode in "store", "invert":
        torch.manual_seed(3)
        with inv.mode(mode):
            y, found = collecting(model, x)
        assert len(found) == 4
        total = y.square().sum() + sum(t.sin().sum() for t in found)
        steps.append(torch.autograd.grad(total, list(model.parameters())))
        assert len(found) == 4
    assert_close(steps[1], steps[0])
