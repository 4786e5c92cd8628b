"""Models of transformers, checkpointed and made reversible: gradients, keys, masks, caches, hidden states, adapters."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import invfunc as inv
from invfunc.look.memory import measure

WORDS, WIDTH, HEADS = 64, 32, 4
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # asked by peft

SCHEMES = "couple", "hamiltonian", "momentum", "midpoint", "leapfrog", "bdia", "retrofit"
THE_MODEL_ITSELF = partial(inv.ops.momentum, gamma=0)

SIZES = dict(
    vocab_size=WORDS,
    hidden_size=WIDTH,
    intermediate_size=2 * WIDTH,
    num_attention_heads=HEADS,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def gpt2(depth: int, **options: Any) -> nn.Module:
    sizes = dict(vocab_size=WORDS, n_positions=128, n_embd=WIDTH, n_head=HEADS, bos_token_id=1, eos_token_id=2)
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=depth, **sizes, **options))


def rotary(family: str) -> Callable[[int], nn.Module]:
    def make(depth: int) -> nn.Module:
        kind = getattr(hf, f"{family}TextConfig", None) or getattr(hf, f"{family}Config")
        options = {"num_key_value_heads": 2}
        if family not in OTHERS:
            options["head_dim"] = WIDTH // HEADS
        config = kind(num_hidden_layers=depth, **SIZES, **options)
        return getattr(hf, f"{family}ForCausalLM")(config)

    return make


def bert(family: str, **options: Any) -> Callable[[int], nn.Module]:
    def make(depth: int) -> nn.Module:
        config = getattr(hf, f"{family}Config")(num_hidden_layers=depth, **SIZES, **options)
        return getattr(hf, f"{family}ForMaskedLM")(config)

    return make


def vit(depth: int) -> nn.Module:
    sizes = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=HEADS, image_size=8, patch_size=4)
    return hf.ViTForImageClassification(hf.ViTConfig(num_hidden_layers=depth, num_labels=5, **sizes))


DECODERS = {
    "gpt2": (gpt2, "transformer.h.*"),
    "llama": (rotary("Llama"), "model.layers.*"),
    "mistral": (rotary("Mistral"), "model.layers.*"),
    "qwen2": (rotary("Qwen2"), "model.layers.*"),
    "qwen3": (rotary("Qwen3"), "model.layers.*"),
    "gemma": (rotary("Gemma"), "model.layers.*"),
}
MODELS = {
    **DECODERS,
    "gpt2, cross": (partial(gpt2, add_cross_attention=True), "transformer.h.*"),
    "modernbert": (bert("ModernBert", cls_token_id=1, sep_token_id=2), "model.layers.*"),
    "prenorm roberta": (bert("RobertaPreLayerNorm"), "roberta_prelayernorm.encoder.layer.*"),
    "vit": (vit, "vit.layers.*"),
}


OTHERS = {name: (rotary(name), "model.layers.*") for name in ("Olmo", "Phi3", "SmolLM3", "Starcoder2")}
OTHERS |= {name: (rotary(name), "model.layers.*") for name in ("Gemma2", "Gemma3", "Olmo2", "Olmo3")}


def made(name: str, depth: int = 4) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    make, blocks = {**MODELS, **OTHERS}[name]
    return make(depth).double(), blocks


def batch(name: str) -> dict[str, Any]:
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64), "labels": torch.tensor([1, 2])}
    ids = torch.randint(3, WORDS, (2, 12))
    mask = torch.ones_like(ids)
    # Gemma 2 gives nan in float64 where a row sees nothing: padded behind, every row sees something.
    mask[0, slice(8, None) if name == "Gemma2" else slice(4)] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    if name == "gpt2, cross":
        given["encoder_hidden_states"] = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    return {**given, "use_cache": False} if name in (*DECODERS, *OTHERS) else given


def step(model: nn.Module, given: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(2)
    out = model(**given)
    wrt = [p for p in model.parameters() if p.requires_grad]
    wrt += [t for t in given.values() if isinstance(t, Tensor) and t.requires_grad]
    loss = out.loss
    if out.hidden_states is not None:
        loss = loss + out.hidden_states[2].square().mean()
    found = torch.autograd.grad(loss, wrt, allow_unused=True, materialize_grads=True)
    return out, list(found)


def compiled(model: nn.Module, backend: str) -> Any:
    """Whatever has been compiled before."""
    torch._dynamo.reset()
    return torch.compile(model, backend=backend)


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_reversible_lowered_is_reversible_stored(name: str, scheme: str) -> None:
    if (name, scheme) == ("gpt2, cross", "hamiltonian"):
        return  # three branches: refused, as the suite shows
    model, blocks = made(name)
    keys, given = list(model.state_dict()), batch(name)
    inv.nn.reversible(model, blocks, scheme=scheme)
    with inv.mode("store"):
        expected, gradients = step(model, given)
    found, others = step(model, given)
    assert torch.equal(found.loss, expected.loss) and list(model.state_dict()) == keys
    assert_close(others, gradients)


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_a_recipe_takes_the_block_apart(name: str) -> None:
    """In eval: some draw dropout in another order."""
    model, blocks = made(name)
    expected, gradients = step(model.eval(), batch(name))
    inv.nn.reversible(model, blocks, scheme=THE_MODEL_ITSELF)
    found, others = step(model, batch(name))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    assert_close(others, gradients)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", DECODERS)
def test_generation_and_hidden_states_stay(name: str, scheme: str) -> None:
    model, blocks = made(name)
    inv.nn.reversible(model.eval(), blocks, scheme=scheme)
    ids = batch(name)["input_ids"][:, :5]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    words = model.generate(ids, use_cache=True, **options)
    assert torch.equal(words, model.generate(ids, use_cache=False, **options))
    out, found = step(model.train(), {**batch(name), "output_hidden_states": True})
    with inv.mode("store"):
        stored, expected = step(model, {**batch(name), "output_hidden_states": True})
    assert len(out.hidden_states) == 5 and all(map(torch.equal, out.hidden_states, stored.hidden_states))
    assert_close(found, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_training_with_a_cache(name: str) -> None:
    model, blocks = made(name)
    given = {**batch(name), "use_cache": True, "output_hidden_states": True}
    _, expected = step(model, given)
    with inv.nn.checkpoint_blocks(model, blocks):
        assert all(map(torch.equal, step(model, given)[1], expected))
    inv.nn.reversible(model, blocks)
    with inv.mode("store"):
        _, expected = step(model, given)
    assert_close(step(model, given)[1], expected)


def test_a_mask_gets_the_gradient_of_every_block() -> None:
    model, blocks = made("llama")
    inv.nn.reversible(model, blocks)
    bias = torch.randn(2, 1, 12, 12, dtype=torch.float64, requires_grad=True)
    given = {**batch("llama"), "attention_mask": bias}
    with inv.mode("store"):
        _, expected = step(model, given)
    _, found = step(model, given)
    assert_close(found, expected)
    assert found[-1].shape == bias.shape and found[-1].ne(0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_steps_add_up_with_an_evaluation_between(scheme: str) -> None:
    """With dropout."""
    model, blocks = made("gpt2")
    inv.nn.reversible(model, blocks, scheme=scheme)
    given = batch("gpt2")

    def gradients() -> list[Tensor]:
        torch.manual_seed(2)
        model.zero_grad()
        model.train()(**given).loss.backward()
        with torch.no_grad():
            model.eval()(**given)
        loss = model.train()(**{**given, "labels": given["labels"].flip(0)}).loss
        model.eval()(**given).loss.backward()
        loss.backward()
        return [p.grad for p in model.parameters()]

    with inv.mode("store"):
        expected = gradients()
    assert_close(gradients(), expected)


def test_under_autocast_to_bfloat16_gradients_are_those_of_the_network_stored() -> None:
    torch.manual_seed(0)
    model = rotary("Llama")(4)
    inv.nn.reversible(model, "model.layers.*")
    with torch.autocast("cpu", torch.bfloat16):
        with inv.mode("store"):
            _, expected = step(model, batch("llama"))
        _, found = step(model, batch("llama"))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()  # the bits of a bfloat16 are 8


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's, of the loss's code
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_compiled_reversible_model_is_the_reversible_model(name: str) -> None:
    model, blocks = made(name)
    inv.nn.reversible(model.eval(), blocks)
    expected, gradients = step(model, batch(name))
    found, others = step(compiled(model, "aot_eager"), batch(name))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    assert_close(others, gradients)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's, of the loss's code
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_compiled_model_with_checkpointed_blocks_is_the_model(name: str, use_cache: bool) -> None:
    """Compiled, a cache was written twice, and gradients were off by a tenth."""
    model, blocks = made(name)
    given = {**batch(name), "use_cache": use_cache}
    expected, gradients = step(model.eval(), given)
    with inv.nn.checkpoint_blocks(model, blocks):
        found, others = step(compiled(model, "eager"), given)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    assert_close(others, gradients)


@pytest.mark.parametrize("name", MODELS)
def test_bdia_evaluates_the_model_itself(name: str) -> None:
    model, blocks = made(name)
    model, given = model.float().eval(), batch(name)
    given = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    expected = model(**given).logits
    inv.nn.reversible(model, blocks, scheme="bdia")
    assert torch.equal(model(**given).logits, expected)


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_blocks_are_the_model_to_the_bit(name: str) -> None:
    model, blocks = made(name)
    given = {**batch(name), "output_hidden_states": True}
    expected, gradients = step(model, given)
    with inv.nn.checkpoint_blocks(model, blocks):
        found, others = step(model, given)
    assert type(found) is type(expected) and all(map(torch.equal, found.hidden_states, expected.hidden_states))
    assert all(map(torch.equal, others, gradients))
    assert all(map(torch.equal, step(model, given)[1], gradients))


def scores_squared(out: Any) -> torch.Tensor:
    return out.logits.square().mean()


@pytest.mark.parametrize("name", ["gpt2", "llama", "modernbert", "vit"])
def test_a_plan_chooses_the_blocks(name: str) -> None:
    """The first argument is what is planned for; where a model makes a cache, its blocks write into it."""
    model, blocks = made(name)
    given = batch(name)
    _, expected = step(model, given)
    x = next(iter(given.values()))
    plain = inv.plan(model, x, max_time=1.0, loss=scores_squared)
    least = min(point.peak_bytes for point in plain.curve)
    plan = plain.at((least + plain.peak_bytes) // 2)
    assert plan.verify(x, loss=scores_squared).error == 0
    handle = inv.nn.checkpoint_blocks(model, plan)
    assert 0 < len(handle) < 4 and all(path.startswith(blocks[:-1]) for path in handle.blocks)
    assert all(map(torch.equal, step(model, given)[1], expected))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_plan_counts_the_cache_that_the_output_holds(name: str) -> None:
    model, _ = made(name, 8)
    ids = torch.randint(3, WORDS, (4, 48), generator=torch.Generator().manual_seed(1))
    plain = inv.plan(model, ids, max_time=1.0, loss=scores_squared)
    least = min(point.peak_bytes for point in plain.curve)
    for plan in (plain, plain.at(least), plain.at((least + plain.peak_bytes) // 2)):
        assert plan.verify(ids, loss=scores_squared).peak_bytes <= plan.peak_bytes


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_the_switch_of_transformers_takes_our_function(name: str) -> None:
    model, _ = made(name)
    given = batch(name)
    _, expected = step(model, given)
    calls = []

    def run(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(f)
        return inv.checkpoint(f)(*args, **kwargs)

    model._set_gradient_checkpointing(True, run)
    assert all(map(torch.equal, step(model, given)[1], expected)) and len(calls) == 4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("scheme", ["couple", "midpoint", "bdia"])
def test_the_peak_does_not_grow_with_depth(name: str, scheme: str) -> None:
    peaks = []
    for depth in (8, 32):
        torch.manual_seed(0)
        model = DECODERS[name][0](depth)
        inv.nn.reversible(model, DECODERS[name][1], scheme=scheme)
        ids = torch.randint(3, WORDS, (4, 48))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

        def train(model: nn.Module = model, ids: Tensor = ids) -> None:
            model(ids, labels=ids, use_cache=False).loss.backward()

        train()
        peaks.append(measure(train).peak_bytes)
    assert peaks[1] <= 1.05 * peaks[0]


KEPT = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu]
COUNTED = {  # as the flop counter counts attention's other operators
    KEPT[0]: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v)
    ),
}


NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # with it, attention is no operator on the CPU


def flops_and_peak(name: str, change: Callable[[nn.Module, str], Any]) -> tuple[int, int]:
    """Of a step, with four times as many words as the model is wide."""
    torch.manual_seed(0)
    make, blocks = DECODERS[name]
    model = make(8, **NO_DROPOUT) if name == "gpt2" else make(8)
    change(model, blocks)
    ids = torch.randint(3, WORDS, (2, 128))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def train() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()

    train()
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        train()
    return counter.get_total_flops(), measure(train).peak_bytes


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_reversible_with_attention_kept_is_below_torchs_checkpoint(name: str) -> None:
    """In flops and in bytes."""
    plain, _ = flops_and_peak(name, lambda model, blocks: None)
    theirs = flops_and_peak(name, lambda model, blocks: model.activation_checkpointing_enable({"use_reentrant": False}))
    ours = flops_and_peak(name, lambda model, blocks: inv.nn.reversible(model, blocks, keep=KEPT))
    assert ours[0] < theirs[0] and ours[0] <= 1.25 * plain and ours[1] <= theirs[1]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_is_kept_changes_no_gradient(name: str) -> None:
    model, blocks = made(name)
    model.eval()  # without dropout
    inv.nn.reversible(model, blocks, keep=KEPT)
    with inv.mode("store"):
        expected, gradients = step(model, batch(name))
    found, others = step(model, batch(name))
    assert torch.equal(found.loss, expected.loss)
    assert_close(others, gradients)


# ---- adapters --------------------------------------------------------------------------------------------------------


def with_adapters(model: nn.Module, layers: list[int]) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=layers,
        init_lora_weights=False,
        lora_dropout=0.1,
    )
    return peft.get_peft_model(model, config)


def evaluations(model: nn.Module, given: dict[str, Any], layers: Any) -> tuple[list[int], list[Tensor]]:
    counts = [0] * len(layers)
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
        for i, layer in enumerate(layers)
    ]
    torch.manual_seed(2)
    model.zero_grad()
    model(**given).loss.backward()
    for hook in hooks:
        hook.remove()
    return counts, [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_frozen_blocks_are_not_run_twice() -> None:
    """Adapters in the top two of eight blocks."""
    base, blocks = made("llama", 8)
    given = batch("llama")
    model = with_adapters(base, [6, 7])
    layers = base.model.layers
    counts, expected = evaluations(model, given, layers)
    assert counts == [1] * 8
    with inv.nn.checkpoint_blocks(model, f"base_model.model.{blocks}"):
        counts, found = evaluations(model, given, layers)
    assert counts == [1] * 6 + [2] * 2 and all(map(torch.equal, found, expected))
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    assert evaluations(model, given, layers)[0] == [2] * 8


@pytest.mark.parametrize("first", ["adapters", "reversible"])
def test_adapters_in_a_reversible_model(first: str) -> None:
    base, blocks = made("llama", 8)
    given = batch("llama")
    if first == "reversible":
        inv.nn.reversible(base, blocks)
    model = with_adapters(base, [6, 7])
    if first == "adapters":
        inv.nn.reversible(base, blocks)
    with inv.mode("store"):
        _, expected = step(model, given)
    counts, found = evaluations(model, given, base.model.layers)
    assert_close(found, expected)
    assert counts == [1] * 6 + [2] * 2


ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "low rank, dense": ("prenorm roberta", "Lora", {"target_modules": ["dense"], "init_lora_weights": False}),
    "norms": ("llama", "LNTuning", {"task_type": "CAUSAL_LM"}),
    "a copy of a norm": ("llama", "Lora", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "a copy of attention": ("llama", "Lora", {"target_modules": ["lm_head"], "modules_to_save": ["mlp", "self_attn"]}),
    "prompts": ("llama", "AdaptionPrompt", {"task_type": "CAUSAL_LM", "adapter_len": 4, "adapter_layers": 2}),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # peft's own, of norms
@pytest.mark.parametrize("first", ["adapters", "reversible"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_layer_behind_an_adapter_is_called_as_in_its_block(kind: str, first: str) -> None:
    peft = pytest.importorskip("peft")
    name, config, options = ADAPTERS[kind]
    base, blocks = made(name)
    given = batch(name)
    if first == "reversible":
        handle = inv.nn.reversible(base, blocks, scheme=THE_MODEL_ITSELF)
    model = peft.get_peft_model(base, getattr(peft, f"{config}Config")(**options)).double().eval()
    if first == "adapters":
        handle = inv.nn.reversible(base, blocks, scheme=THE_MODEL_ITSELF)
    found, others = step(model, given)
    handle.remove()
    expected, gradients = step(model, given)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-12, atol=1e-12)
    assert_close(others, gradients)


def test_an_adapter_in_torchs_encoder_is_called_as_the_layer_is() -> None:
    peft = pytest.importorskip("peft")
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, norm_first=True, batch_first=True)
    net = nn.ModuleDict({"body": nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)})
    config = peft.LoraConfig(target_modules=["linear1", "linear2"], init_lora_weights=False)
    body = peft.get_peft_model(net, config).double().base_model.model["body"]
    x, padding, found = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.arange(5) > torch.tensor([[3], [4]]), []
    handle = inv.nn.reversible(body, "layers.*", scheme=THE_MODEL_ITSELF)
    for _ in range(2):
        y = body(x, src_key_padding_mask=padding)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [p for p in body.parameters() if p.requires_grad])])
        handle.remove()
    assert_close(*found)


def test_a_known_blocks_child_with_a_forward_of_its_own_is_refused() -> None:
    kind = hf.models.llama.modeling_llama.LlamaDecoderLayer

    class Other(kind):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return hidden_states + super().forward(hidden_states, **kwargs)

    model, blocks = made("llama")
    model.model.layers[1].__class__ = Other
    with pytest.raises(inv.errors.OptionError, match="Other, whose forward is not that of LlamaDecoderLayer"):
        inv.nn.reversible(model, blocks)


def test_a_copy_trains_apart() -> None:
    model, blocks = made("llama")
    inv.nn.reversible(model, blocks)
    other, given = copy.deepcopy(model), batch("llama")
    _, expected = step(model, given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(step(other, given)[1], expected, 0.0)
