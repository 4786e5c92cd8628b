"""Models that exist, made reversible in place: gradients, caches, hidden states, pretrained weights, and the bars."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from kit import assert_close, assert_refused
from residual_models import FAMILIES, GPT2, HEADS, WIDTH, Cache, Llama, LlamaDecoderLayer, words
from torch import Tensor, nn

import invfunc as inv
from invfunc import ops
from invfunc.errors import OptionError, ReplayError, WireError
from invfunc.look.memory import measure

SCHEMES = "couple", "momentum", "midpoint", "leapfrog", "bdia", "retrofit"
THE_MODEL_ITSELF = partial(ops.momentum, gamma=0)  # the residual network, by a scheme that keeps what it overwrites


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(3)
    y = model(x)
    return y.detach(), list(torch.autograd.grad(y.square().sum(), list(model.parameters())))


@pytest.fixture
def model() -> Llama:
    return Llama()


# ---- the same function, stored or not --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_same_network_stored(family: str, scheme: str) -> None:
    make, blocks = FAMILIES[family]
    model, x = make(), words()
    inv.nn.reversible(model, blocks, scheme=scheme)
    with inv.mode("store"):
        expected = step(model, x)
    assert_close(step(model, x), expected, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_takes_the_block_apart(family: str) -> None:
    """By the one scheme that is the residual network: in values and gradients, masks, rotary and encoder states."""
    make, blocks = FAMILIES[family]
    model, x = make(), words()
    expected = step(model.eval(), x)
    inv.nn.reversible(model, blocks, scheme=THE_MODEL_ITSELF)
    assert_close(step(model, x), expected, 1e-12)


def test_two_blocks_are_their_formula(model: Llama) -> None:
    model.layers, x = nn.ModuleList(list(model.layers)[:2]), words()
    context: dict[str, Any] = {}
    model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, given: context.update(given), with_kwargs=True
    )
    model.eval()(x)
    del context["hidden_states"]
    first = second = model.embed_tokens(x)
    for layer in model.layers:
        first = first + layer.self_attn(layer.input_layernorm(second), **context)[0]
        second = second + layer.mlp(layer.post_attention_layernorm(first))
    inv.nn.reversible(model, "layers.*")
    assert_close(model(x), model.head(model.norm(second)))


def test_bdia_is_its_formula_in_training() -> None:
    """The published step, with the gammas that were drawn."""
    spacing, h = 2.0**-9, lambda x: x.sin() - 0.3 * x
    blocks = [Plain(h) for _ in range(5)]
    net = nn.Sequential(*blocks)
    x = torch.randn(4, 6)
    inv.nn.reversible(net, "*", scheme="bdia", branches=(lambda block, x: block.fn(x),))
    torch.manual_seed(5)
    found = net(x)

    def rounded(t: Tensor) -> Tensor:
        return torch.round(t / spacing) * spacing

    torch.manual_seed(5)
    before = rounded(x)
    now = before + rounded(h(before))
    for _ in blocks[1:]:
        gamma = torch.tensor([0.5, -0.5])[torch.randint(2, (4, 1))]
        even = torch.floor(before / (2 * spacing)) * 2 * spacing
        before, now = now, gamma * even + rounded((1 - gamma) * now + (1 + gamma) * h(now))
    assert torch.equal(found, now)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_bdia_draws_for_each_sample_where_positions_come_first(kind: type[nn.Module]) -> None:
    given = [torch.randn(5, 3, WIDTH) for _ in range(1 + (kind is nn.TransformerDecoderLayer))]
    found = []
    for is_batch_first in (False, True):
        torch.manual_seed(0)
        layers = [kind(WIDTH, HEADS, 16, 0.0, norm_first=True, batch_first=is_batch_first) for _ in range(3)]
        net = nn.ModuleList(layers)
        inv.nn.reversible(net, "*", scheme="bdia")
        x, *memory = [t.transpose(0, 1) if is_batch_first else t for t in given]
        for layer in net:
            x = layer(x, *memory)
        found.append(x if is_batch_first else x.transpose(0, 1))
    assert_close(*found)


def test_a_block_in_evaluation_among_blocks_in_training_takes_its_step(model: Llama) -> None:
    x = words()
    for layer in model.layers:
        layer.self_attn.dropout.p = 0.0
    inv.nn.reversible(model, "layers.*", scheme="bdia")
    expected = step(model, x)
    model.layers[0].eval()
    model.layers[2].eval()
    assert_close(step(model, x), expected, 0.0)


class Plain(nn.Module):
    """A residual block of a function."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn, self.unused = fn, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


# ---- the model around it is as before --------------------------------------------------------------------------------


def test_modules_keys_and_the_list_of_blocks_stay(model: Llama) -> None:
    keys, layers, modules = list(model.state_dict()), list(model.layers), list(model.named_modules())
    handle = inv.nn.reversible(model, "layers.*")
    assert list(model.state_dict()) == keys and list(model.named_modules()) == modules
    assert list(model.layers) == layers and model.layers[1] is layers[1] and len(model.layers[:3]) == 3
    assert list(handle.blocks) == [f"layers.{i}" for i in range(4)] and len(handle) == 4


def test_undoing_it_gives_the_model_back(model: Llama) -> None:
    x = words()
    expected = step(model, x)
    with inv.nn.reversible(model, "layers.*") as handle:
        assert not torch.equal(step(model, x)[0], expected[0])
    handle.remove()
    assert all(map(torch.equal, step(model, x)[1], expected[1])) and "forward" not in vars(model.layers[0])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [GPT2, Llama])
def test_generation_with_a_cache_is_generation_without(make: Callable[[], nn.Module], scheme: str) -> None:
    model, x = make().eval(), words(8)
    inv.nn.reversible(model, FAMILIES[make.__name__.lower()][1], scheme=scheme)
    cache = Cache()
    with torch.no_grad():
        parts = [model(x[:, :3], cache), *(model(x[:, i : i + 1], cache) for i in range(3, 8))]
        assert_close(torch.cat(parts, 1), model(x), 1e-2 if scheme == "retrofit" else 1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_may_write_a_cache(model: Llama, scheme: str) -> None:
    """Backward runs attention again, on the cache as it was."""
    x, cache = words(), Cache()
    inv.nn.reversible(model, "layers.*", scheme=scheme)
    expected = step(model, x)
    torch.manual_seed(3)
    y = model(x, cache)
    assert_close(torch.autograd.grad(y.square().sum(), list(model.parameters())), expected[1])
    assert [keys.shape[2] for keys, _ in cache.layers.values()] == [6] * 4


def test_hidden_states_come_by_hooks_with_their_gradients(model: Llama) -> None:
    x = words()
    inv.nn.reversible(model, "layers.*")
    states: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, y: states.append(y))

    def both() -> list[Tensor]:
        states.clear()
        torch.manual_seed(3)
        y = model(x)
        loss = y.square().sum() + sum(((i + 1) * state.sin()).sum() for i, state in enumerate(states))
        return list(torch.autograd.grad(loss, list(model.parameters())))

    with inv.mode("store"):
        expected = both()
    assert_close(both(), expected)
    assert len(states) == 4 and states[1].shape == (3, 6, WIDTH)


def test_random_numbers_that_are_drawn_between_blocks_change_no_gradient(model: Llama) -> None:
    def draw(*_: Any) -> None:
        torch.rand(3)

    for layer in model.layers:
        layer.register_forward_hook(draw)
    x = words()
    inv.nn.reversible(model, "layers.*")
    with inv.mode("store"):
        expected = step(model, x)
    assert_close(step(model, x), expected)


def test_flags_that_are_set_for_one_block_are_those_of_its_replay(model: Llama) -> None:
    seen: list[bool] = []

    def choose(on: bool) -> Callable[..., None]:
        return lambda *_: torch.use_deterministic_algorithms(on)

    inv.nn.reversible(model, "layers.*")
    for layer in model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    model.layers[1].register_forward_pre_hook(choose(True))
    model.layers[1].register_forward_hook(choose(False))
    loss, others = model(words()).sum(), [False] * (len(model.layers) - 2)
    assert seen == [False, True, *others]
    seen.clear()
    loss.backward()
    assert seen == [*others, True, False]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_module_that_takes_anothers_place_is_called(model: Llama) -> None:
    inv.nn.reversible(model, "layers.*")
    x = words()
    before = step(model, x)[0]
    model.layers[2].mlp = new = nn.Linear(WIDTH, WIDTH)
    assert not torch.equal(step(model, x)[0], before)
    model(x).sum().backward()
    assert new.weight.grad is not None


class Adapter(nn.Module):
    """What adapters put around a layer: it takes anything, and hands it on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.more = layer, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(self.more(x), *args, **kwargs)


ADAPTED = {
    "gpt2": ("ln_1", "ln_2", "mlp", "attn.c_proj"),
    "gpt2, cross": ("ln_cross_attn", "mlp"),
    "llama": ("input_layernorm", "post_attention_layernorm", "mlp"),
    "torch encoder": ("dropout1", "dropout2"),
    "torch decoder": ("norm2", "linear1", "dropout3"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_takes_anything_is_called_as_the_layer_is(family: str) -> None:
    make, blocks = FAMILIES[family]
    model, x = make().eval(), words()
    handle = inv.nn.reversible(model, blocks, scheme=THE_MODEL_ITSELF)
    for block in handle.blocks.values():
        for path in ADAPTED[family]:
            block.set_submodule(path, Adapter(block.get_submodule(path)))
    found = step(model, x)
    handle.remove()
    assert_close(found, step(model, x), 1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_a_compiled_layer_is_called_as_the_layer_is(model: Llama) -> None:
    x = words()
    inv.nn.reversible(model.eval(), "layers.*")
    expected = step(model, x)
    for layer in model.layers:
        layer.mlp = torch.compile(layer.mlp, backend="eager")
    assert_close(step(model, x), expected)


def test_attention_behind_an_adapter_gets_its_mask(model: Llama) -> None:
    x = words()
    for layer in model.eval().layers:
        layer.self_attn = Named(layer.self_attn)
    expected = step(model, x)
    inv.nn.reversible(model, "layers.*", scheme=THE_MODEL_ITSELF)
    assert_close(step(model, x), expected, 1e-12)


class Named(nn.Module):
    """An adapter that takes all by name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, **kwargs: Any) -> Any:
        return self.layer(**kwargs)


def test_what_a_users_branch_calls_with_x_alone_gets_no_context(model: Llama) -> None:
    x = words()
    expected = step(model.eval(), x)
    branches = "input_layernorm(x) self_attn", "post_attention_layernorm(x) mlp(x)"
    for layer in model.layers:
        layer.mlp = Adapter(layer.mlp)
        nn.init.eye_(layer.mlp.more.weight)
        nn.init.zeros_(layer.mlp.more.bias)
    inv.nn.reversible(model, "layers.*", scheme=THE_MODEL_ITSELF, branches=branches)
    assert_close(step(model, x)[0], expected[0], 1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_copy_is_a_model_of_its_own(model: Llama, scheme: str, copied: Callable[[Any], Any]) -> None:
    inv.nn.reversible(model, "layers.*", scheme=scheme)
    x = words()
    expected = step(model, x)
    other = copied(model)
    assert_close(step(other, x), expected, 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_close(step(other, x), expected, 0.0)


def test_a_saved_state_loads_into_the_plain_model(model: Llama) -> None:
    inv.nn.reversible(model, "layers.*", scheme="bdia")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = Llama()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.eval()(words(5)[:1] * 0 + 1), model.eval()(words(5)[:1] * 0 + 1))


def test_under_autocast_the_stream_stays_wide(model: Llama) -> None:
    model.float()
    inv.nn.reversible(model, "layers.*", scheme="bdia")
    with torch.autocast("cpu", torch.bfloat16):
        with inv.mode("store"):
            expected = step(model, words(4))
        found = step(model, words(4))
    assert [g.dtype for g in found[1]] == [torch.float32] * len(found[1]) and expected[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_a_compiled_model_leaves_the_blocks_as_they_are(model: Llama) -> None:
    x = words()
    inv.nn.reversible(model, "layers.*")
    expected = step(model.eval(), x)
    assert_close(step(torch.compile(model, backend="eager"), x), expected)


def test_gradients_of_functions_of_the_parameters(model: Llama) -> None:
    """By torch.func, whose engine is another one."""
    x = words()
    inv.nn.reversible(model.eval(), "layers.*")
    expected = dict(zip(dict(model.named_parameters()), step(model, x)[1], strict=True))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    assert_close(torch.func.grad(loss)(dict(model.named_parameters())), expected)


# ---- pretrained weights ----------------------------------------------------------------------------------------------


def test_bdia_evaluates_the_model_itself(model: Llama) -> None:
    x, model = words(), model.float()
    expected = model.eval()(x)
    inv.nn.reversible(model, "layers.*", scheme="bdia")
    assert not torch.equal(model.train()(x), expected)
    assert torch.equal(model.eval()(x), expected)


def test_retrofit_starts_at_a_distance_in_proportion_to_gamma(model: Llama) -> None:
    x = words()
    expected = model.eval()(x)
    distances = []
    for gamma in (2.0**-3, 2.0**-4, 2.0**-5, 2.0**-6):
        with inv.nn.reversible(model, "layers.*", scheme=partial(ops.bdia, gammas=gamma, spacing=2.0**-30)):
            distances.append((model(x) - expected).norm().item())
    assert distances[-1] < 0.05 * expected.norm().item()
    assert all(1.6 < a / b < 2.4 for a, b in zip(distances, distances[1:], strict=False))


def test_with_weight_zero_the_new_stream_leaves_the_pretrained_function_and_its_first_step(model: Llama) -> None:
    x = words()
    expected = step(model.train(), x)
    inv.nn.reversible(model, "layers.*", scheme=partial(ops.momentum, gamma=0))
    assert_close(step(model, x), expected, 1e-12)


@pytest.mark.parametrize("is_batch_first", [False, True])
def test_one_sample_of_torchs_encoder_is_refused_where_a_number_is_drawn_for_each(is_batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, norm_first=True, batch_first=is_batch_first)
    encoder, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(5, 8)
    with inv.nn.reversible(encoder, "layers.*", scheme="bdia"):
        assert_refused(
            WireError,
            "reversible: layers.0 received (5, 8), one sample, expected a batch: the scheme draws a number for each "
            "sample; x.unsqueeze(0), or x.unsqueeze(1) where positions come first",
            lambda: encoder(x),
        )
        assert encoder(x.unsqueeze(int(not is_batch_first))).numel() == x.numel()
    with inv.nn.reversible(encoder, "layers.*", scheme="retrofit"):  # its gamma is one number for all
        assert encoder(x).shape == x.shape


@pytest.mark.parametrize("scheme", ["couple", "hamiltonian", "momentum", "midpoint", "leapfrog", "bdia", "retrofit"])
def test_every_scheme_is_the_model_where_branches_are_zero(model: Llama, scheme: str) -> None:
    for layer in model.layers:
        for last in (layer.self_attn.c_proj, layer.mlp[2]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    x = words()
    expected = model(x)
    make = partial(ops.bdia, gammas=(0.5, -0.5), spacing=2.0**-45) if scheme == "bdia" else scheme
    inv.nn.reversible(model, "layers.*", scheme=make)
    assert_close(model(x), expected, 1e-2 if scheme == "retrofit" else 1e-12)


# ---- bars ------------------------------------------------------------------------------------------------------------


def peak(model: nn.Module, x: Tensor) -> int:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def train() -> None:
        model(x).square().sum().backward()

    train()
    return measure(train).peak_bytes


@pytest.mark.parametrize(
    ("family", "scheme"), [*(("llama", scheme) for scheme in SCHEMES), ("gpt2", "couple"), ("torch encoder", "couple")]
)
def test_the_peak_does_not_grow_with_depth(family: str, scheme: str) -> None:
    make, blocks = FAMILIES[family]
    x, peaks = words(16, batch=8), []
    for depth in (8, 32):
        model = make(depth)
        inv.nn.reversible(model, blocks, scheme=scheme)
        peaks.append(peak(model, x))
    bits = {"bdia": 1, "retrofit": 4}.get(scheme, 0) * 24 * 16 * 8 * WIDTH // 8
    assert peaks[1] - bits <= 1.05 * peaks[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_branch_is_evaluated_twice_in_a_step(model: Llama, scheme: str) -> None:
    calls = {"attention": 0, "feed forward": 0}
    for layer in model.layers:
        for name, module in (("attention", layer.self_attn), ("feed forward", layer.mlp)):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    inv.nn.reversible(model, "layers.*", scheme=scheme)
    model(words()).sum().backward()
    assert calls == {"attention": 8, "feed forward": 8}


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_model_that_changes_its_hidden_states_between_blocks_is_refused(model: Llama) -> None:
    inv.nn.reversible(model, "layers.*")
    model.layers[1].register_forward_hook(lambda module, args, y: y + 1)
    assert_refused(
        WireError,
        "reversible: layers.2 received (3, 6, 8), expected what layers.1 has returned: its streams go on from there; "
        "call all blocks one after another, without layer drop, and change the hidden states nowhere in between, in place "
        "neither; lists of which one does not go on where another ends take a call each",
        lambda: model(words()),
    )


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "scaled in place": lambda x: x.mul_(2),
    "scaled in place through a view": lambda x: x.view_as(x).mul_(2),
    "masked in place": lambda x: x.masked_fill_(torch.arange(WIDTH) == 1, 0.0),
    "set in part": lambda x: x.__setitem__((slice(None), 0), 0.0),
    "dropped out in place": lambda x: nn.functional.dropout(x, inplace=True),
    "transposed": lambda x: x.transpose(1, 2),
    "shifted": lambda x: x.as_strided(x.shape, (0, 0, 0)),
    "read as other numbers": lambda x: x.view(torch.int64),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("change", CHANGES)
def test_hidden_states_that_change_in_place_or_by_a_view_between_blocks_are_refused(change: str, scheme: str) -> None:
    model = Llama()
    inv.nn.reversible(model, "layers.*", scheme=scheme)
    model.layers[1].register_forward_hook(lambda module, args, y: CHANGES[change](y))
    message = "reversible: layers.2 received (3, 8, 8), expected what layers.1 has returned"
    assert_refused(WireError, message, lambda: model(words(WIDTH)))


def test_hidden_states_that_a_hook_keeps_and_writes_into_later_are_refused() -> None:
    """The midpoint rule still needs what the block before the last has returned."""
    model, kept = Llama(), list[Tensor]()
    inv.nn.reversible(model, "layers.*", scheme="midpoint")
    model.layers[0].register_forward_hook(lambda module, args, y: kept.append(y))
    model.layers[1].register_forward_hook(lambda module, args, y: (kept[0].mul_(2), y)[1])
    assert_refused(WireError, "reversible: layers.2 received (3, 6, 8), expected what", lambda: model(words()))


def test_a_hook_that_returns_a_view_is_no_change(model: Llama) -> None:
    inv.nn.reversible(model, "layers.*")
    expected = step(model, words(1))
    torch.manual_seed(0)
    model.layers[1].register_forward_hook(lambda module, args, y: y.view_as(y))
    assert [g.shape for g in step(model, words(1))[1]] == [g.shape for g in expected[1]]


def test_a_block_that_is_left_out_is_refused(model: Llama) -> None:
    inv.nn.reversible(model, "layers.*")
    del model.layers[1]
    assert_refused(WireError, "reversible: layers.2 received (3, 6, 8), expected what layers.1", lambda: model(words()))


def refuse(error: type[Exception], message: str, model: nn.Module, blocks: str, **options: Any) -> None:
    assert_refused(error, message, lambda: inv.nn.reversible(model, blocks, **options))
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_loss_of_hidden_states_before_the_last_block_is_refused(model: Llama) -> None:
    inv.nn.reversible(model, "layers.*")
    x = model.layers[0](torch.randn(2, 6, WIDTH, requires_grad=True))
    cure = "expected all of its stages to run before backward; run the blocks up to the last"
    message = f"this pipeline was left before its end, {cure}"
    assert_refused(ReplayError, message, x.sum().backward, anywhere=True)


def test_what_has_no_recipe_is_refused(model: Llama) -> None:
    message = "reversible: no recipe for torch.nn.modules.linear.Linear, expected one of GPT2Block, LlamaDecoderLayer"
    refuse(OptionError, message, nn.Sequential(nn.Linear(2, 2)), "*")
    message = (
        "Llama has no 'h.*', expected the path of submodules, as in get_submodule, with * for any name; its lists are"
    )
    refuse(OptionError, message, model, "h.*")
    message = (
        "reversible: LlamaDecoderLayer has no 'norm', expected paths of what the block applies one after another; it"
    )
    refuse(OptionError, message, model, "layers.*", branches=("norm self_attn", "mlp"))


class WithWindows(LlamaDecoderLayer):
    """A known block's child with a forward of its own."""

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        return super().forward(hidden_states.flip(1), **context).flip(1)


class WithAnotherFeedForward(nn.TransformerEncoderLayer):
    """A child whose forward is its parent's, and calls a method of its own."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return -super()._ff_block(x)


class Block(nn.Module):
    """A block with the name and the attributes of timm's, and with another forward."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH))


def test_a_block_that_only_has_the_name_of_a_known_one_is_refused() -> None:
    refuse(OptionError, f"reversible: no recipe for {__name__}.Block, expected one of", nn.Sequential(Block()), "*")


def test_a_known_blocks_child_with_a_forward_of_its_own_is_refused(model: Llama) -> None:
    model.layers[2] = WithWindows(2)
    cause = f"{__name__}.WithWindows, whose forward is not that of LlamaDecoderLayer, expected one of"
    refuse(OptionError, f"reversible: no recipe for {cause}", model, "layers.*")
    layer = WithAnotherFeedForward(WIDTH, HEADS, 16, norm_first=True)
    cause = f"{__name__}.WithAnotherFeedForward, whose _ff_block is not that of TransformerEncoderLayer, expected"
    refuse(OptionError, f"reversible: no recipe for {cause}", nn.Sequential(layer), "*")


def test_a_known_block_with_another_forward_put_into_it_is_refused(model: Llama) -> None:
    layer = model.layers[1]
    layer.forward = lambda hidden_states, **context: hidden_states
    message = "reversible: no recipe for residual_models.LlamaDecoderLayer, whose forward is not that of LlamaDecoder"
    assert_refused(OptionError, message, lambda: inv.nn.reversible(model, "layers.*"))


def test_a_known_block_that_is_checkpointed_has_its_recipe(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its forward is a decorated one, as in transformers."""
    inner, x = LlamaDecoderLayer.forward, words()
    decorated = wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
    monkeypatch.setattr(LlamaDecoderLayer, "forward", decorated)
    with inv.nn.reversible(model, "layers.*"):
        expected = step(model, x)
    inv.nn.checkpoint_blocks(model, "layers.*")
    inv.nn.reversible(model, "layers.*")
    assert_close(step(model, x), expected, 0.0)


def test_a_known_blocks_child_with_the_same_forward_has_its_recipe(model: Llama) -> None:
    x = words()
    inv.nn.reversible(model, "layers.*")
    expected = step(model, x)
    other = Llama()
    for layer in other.layers:
        layer.__class__ = type("Sharded", (LlamaDecoderLayer,), {})
    other.load_state_dict(model.state_dict())
    inv.nn.reversible(other, "layers.*")
    assert_close(step(other, x), expected, 0.0)


@pytest.mark.parametrize(("order", "paths"), [((0, 0), (1, 0)), ((0, 1, 0), (2, 0)), ((0, 1, 1), (2, 1))])
def test_a_block_in_two_places_is_refused(order: tuple[int, ...], paths: tuple[int, int]) -> None:
    blocks = list(Llama().layers)
    message = (
        f"reversible: {paths[0]} is the same module as {paths[1]}, expected a module for each block: by it a call tells "
        "which stage it is; give each a copy, or use inv.nn.checkpoint_blocks, which takes a block that runs more than once"
    )
    refuse(OptionError, message, nn.ModuleList([blocks[i] for i in order]), "*")


def test_an_unknown_scheme_is_refused(model: Llama) -> None:
    message = (
        "reversible: scheme is 'euler', expected one of 'couple', 'hamiltonian', 'momentum', 'midpoint', 'leapfrog',"
    )
    refuse(OptionError, message, model, "layers.*", scheme="euler")
    refuse(
        OptionError,
        "reversible: 1 branches, expected 2 for hamiltonian",
        model,
        "layers.*",
        scheme="hamiltonian",
        branches=("mlp",),
    )


def test_a_post_norm_layer_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    message = (
        "reversible: TransformerEncoderLayer normalises behind each sum, expected norm_first=True: x + f(x); build it"
    )
    refuse(OptionError, message, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), "layers.*")


def test_bdia_refuses_half_precision(model: Llama) -> None:
    inv.nn.reversible(model.bfloat16(), "layers.*", scheme="bdia")
    message = "on_grid received bfloat16, expected float32 or float64; keep the stream in float32: autocast computes"
    assert_refused(WireError, message, lambda: model(words()))


def test_an_error_names_the_block(model: Llama) -> None:
    inv.nn.reversible(model, "layers.*")
    model.layers[2].mlp = nn.Linear(WIDTH, WIDTH + 1)
    with pytest.raises(WireError, match=r"chain stage 2 \(layers\.2\): .* returned \(3, 6, 9\)"):
        model(words())
