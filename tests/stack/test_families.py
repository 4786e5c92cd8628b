"""Families that have a recipe, and those that have none: gradients, keys and evaluation as promised, or a named error."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import timm
import torch
import transformers as hf
from kit import assert_close
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import invfunc as inv
from invfunc.errors import OptionError

WORDS, WIDTH, HEADS, COUNT, DEPTH = 32, 16, 2, 7, 3
SCHEMES = "couple", "momentum", "midpoint", "bdia", "retrofit"
THE_MODEL_ITSELF = partial(inv.ops.momentum, gamma=0)
IDS = torch.randint(3, WORDS, (2, COUNT), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([5, 6]), 0)

TEXT: dict[str, Any] = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT |= {"hidden_size": WIDTH, "num_attention_heads": HEADS, "max_position_embeddings": 16}
USUAL = {**TEXT, "intermediate_size": 32, "num_hidden_layers": DEPTH}
EXPERTS = {"num_key_value_heads": 1, "output_router_logits": True, "experts_implementation": "eager"}
MIXTURE = {**EXPERTS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
IMAGE = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": HEADS, "num_hidden_layers": DEPTH}
SMALL = {"img_size": 32, "num_classes": 3, "drop_path_rate": 0.2}
VIT = {**SMALL, "img_size": 96, "depth": DEPTH, "embed_dim": 24, "num_heads": HEADS}


class Family(NamedTuple):
    """A model with random weights, the path of its blocks, and what it is called with."""

    make: Callable[[], nn.Module]
    blocks: str
    given: str = "words"
    size: int = 32  # of an image


def of_transformers(name: str, blocks: str, given: str = "words", **sizes: Any) -> Family:
    kind = getattr(hf, name)
    return Family(lambda: kind(kind.config_class(**sizes)), blocks, given)


def of_timm(name: str, blocks: str = "blocks.*", **sizes: Any) -> Family:
    return Family(lambda: timm.create_model(name, **sizes), blocks, "images", sizes.get("img_size", 32))


def mixer() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "num_blocks": DEPTH, "embed_dim": 24, "num_classes": 3}
    return timm.models.mlp_mixer.MlpMixer(**sizes, drop_path_rate=0.2)


def whisper() -> nn.Module:
    sizes = {"d_model": WIDTH, "encoder_attention_heads": HEADS, "encoder_ffn_dim": 32, "encoder_layers": DEPTH}
    dropout = {"dropout": 0.1, "activation_dropout": 0.1}
    return WhisperEncoder(
        hf.WhisperConfig(vocab_size=WORDS, num_mel_bins=8, max_source_positions=10, **sizes, **dropout)
    )


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, norm_first=norm_first, batch_first=True)
    return nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)


DECODERS = {
    "opt": of_transformers(
        "OPTForCausalLM",
        "model.decoder.layers.*",
        **TEXT,
        ffn_dim=32,
        num_hidden_layers=DEPTH,
        word_embed_proj_dim=WIDTH,
    ),
    "neox": of_transformers("GPTNeoXForCausalLM", "gpt_neox.layers.*", **USUAL, hidden_dropout=0.1),
    "neox, one after another": of_transformers(
        "GPTNeoXForCausalLM", "gpt_neox.layers.*", **USUAL, hidden_dropout=0.1, use_parallel_residual=False
    ),
    "phi": of_transformers("PhiForCausalLM", "model.layers.*", **USUAL, resid_pdrop=0.1),
    "mistral, window": of_transformers(
        "MistralForCausalLM", "model.layers.*", **USUAL, num_key_value_heads=1, sliding_window=3
    ),
    "mixtral": of_transformers("MixtralForCausalLM", "model.layers.*", **USUAL, **EXPERTS, num_local_experts=4),
    "qwen2 moe": of_transformers(
        "Qwen2MoeForCausalLM", "model.layers.*", **USUAL, **MIXTURE, shared_expert_intermediate_size=8
    ),
    "qwen3 moe": of_transformers("Qwen3MoeForCausalLM", "model.layers.*", **USUAL, **MIXTURE, head_dim=8),
}
WITH_RECIPES = {
    **DECODERS,
    "prenorm roberta, cross": of_transformers(
        "RobertaPreLayerNormForCausalLM",
        "roberta_prelayernorm.encoder.layer.*",
        "words and states",
        **USUAL,
        is_decoder=True,
        add_cross_attention=True,
    ),
    "clip, text": of_transformers("CLIPTextModel", "*.layers.*", "words alone", **USUAL),
    "clip, vision": of_transformers("CLIPVisionModel", "*.layers.*", "images", **IMAGE, image_size=32, patch_size=8),
    "siglip, vision": of_transformers(
        "SiglipVisionModel", "*.layers.*", "images", **IMAGE, image_size=32, patch_size=8
    ),
    "whisper, encoder": Family(whisper, "layers.*", "sound"),
    "deit": of_timm("deit_tiny_distilled_patch16_224", **VIT),
    "deit 3": of_timm("deit3_small_patch16_224", **VIT),
    "beit": of_timm("beit_base_patch16_224", **VIT),
    "eva": of_timm("eva02_tiny_patch14_224", **{**VIT, "img_size": 84}),
    "mixer": Family(mixer, "blocks.*", "images"),
    "torch encoder": Family(partial(encoder, True), "layers.*", "stream"),
}
POST_NORM = {
    "opt, post-norm": of_transformers(
        "OPTForCausalLM",
        "model.decoder.layers.*",
        **TEXT,
        ffn_dim=32,
        num_hidden_layers=DEPTH,
        word_embed_proj_dim=WIDTH,
        do_layer_norm_before=False,
    ),
    "torch encoder, post-norm": Family(partial(encoder, False), "layers.*", "stream"),
}
WITHOUT = {
    "bert": of_transformers("BertForMaskedLM", "bert.encoder.layer.*", **USUAL),
    "roberta": of_transformers("RobertaForMaskedLM", "roberta.encoder.layer.*", **USUAL),
    "distilbert": of_transformers(
        "DistilBertForMaskedLM",
        "distilbert.transformer.layer.*",
        vocab_size=WORDS,
        dim=WIDTH,
        hidden_dim=32,
        n_heads=HEADS,
        n_layers=DEPTH,
        max_position_embeddings=16,
    ),
    "falcon": of_transformers("FalconForCausalLM", "transformer.h.*", **TEXT, num_hidden_layers=DEPTH),
    "bloom": of_transformers("BloomForCausalLM", "transformer.h.*", **TEXT, n_layer=DEPTH, hidden_dropout=0.1),
    "t5, encoder": of_transformers(
        "T5EncoderModel",
        "encoder.block.*",
        "words alone",
        vocab_size=WORDS,
        d_model=WIDTH,
        d_ff=32,
        d_kv=8,
        num_heads=HEADS,
        num_layers=DEPTH,
    ),
    "t5": of_transformers(
        "T5ForConditionalGeneration",
        "*.block.*",
        vocab_size=WORDS,
        d_model=WIDTH,
        d_ff=32,
        d_kv=8,
        num_heads=HEADS,
        num_layers=DEPTH,
        decoder_start_token_id=0,
    ),
    "swin": of_transformers(
        "SwinModel",
        "encoder.layers.*.blocks.*",
        "images",
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
    ),
    "swin of timm": of_timm(
        "swin_tiny_patch4_window7_224",
        "layers.*.blocks.*",
        **SMALL,
        window_size=4,
        depths=(2, 2),
        embed_dim=8,
        num_heads=(2, 2),
    ),
    "convnext": of_timm(
        "convnext_atto", "stages.*.blocks.*", num_classes=3, drop_path_rate=0.2, depths=(1, 2, 2, 1), dims=(4, 8, 8, 8)
    ),
}
ALL = {**WITH_RECIPES, **POST_NORM, **WITHOUT}


def made(name: str) -> tuple[nn.Module, str, dict[str, Any]]:
    """A model with weights so large that every gradient counts."""
    torch.manual_seed(0)
    family = ALL[name]
    model = family.make().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train(), family.blocks, given_to(family)


def given_to(family: Family) -> dict[str, Any]:
    torch.manual_seed(1)
    given: dict[str, dict[str, Any]] = {
        "words": {"input_ids": IDS, "attention_mask": MASK, "labels": IDS},
        "words alone": {"input_ids": IDS, "attention_mask": MASK},
        "words and states": {"input_ids": IDS, "encoder_hidden_states": torch.randn(2, 5, WIDTH, requires_grad=True)},
        "images": {"x": torch.randn(2, 3, family.size, family.size)},
        "sound": {"x": torch.randn(2, 8, 20)},
        "stream": {"x": torch.randn(2, COUNT, WIDTH)},
    }
    return given[family.given]


def called(model: nn.Module, given: dict[str, Any], **options: Any) -> Any:
    return model(given["x"], **options) if "x" in given else model(**given, **options)


def number(out: Any) -> Tensor:
    """A number of what a model gives, in float64."""
    found = [out] if isinstance(out, Tensor) else [getattr(out, n, None) for n in ("logits", "last_hidden_state")]
    total = sum(t.double().sin().sum() for t in found if t is not None)
    return total + getattr(out, "aux_loss", 0.0)


def step(model: nn.Module, given: dict[str, Any], **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    torch.manual_seed(2)
    value = number(called(model, given, **options))
    wrt = [t for t in (*model.parameters(), *given.values()) if t.requires_grad]
    return value.detach(), torch.autograd.grad(value, wrt, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", WITH_RECIPES)
def test_reversible_lowered_is_reversible_stored(name: str, scheme: str) -> None:
    model, blocks, given = made(name)
    keys = list(model.state_dict())
    inv.nn.reversible(model, blocks, scheme=scheme)
    with inv.mode("store"):
        expected = step(model, given)
    found = step(model, given)
    assert torch.equal(found[0], expected[0]) and list(model.state_dict()) == keys
    assert_close(found[1], expected[1])


@pytest.mark.parametrize("name", WITH_RECIPES)
def test_a_recipe_takes_the_block_apart(name: str) -> None:
    """In eval: some draw dropout in another order."""
    model, blocks, given = made(name)
    expected = step(model.eval(), given)
    with torch.no_grad():
        value = number(called(model, given))  # torch's layers have a path of their own
    with inv.nn.reversible(model, blocks, scheme=THE_MODEL_ITSELF):
        assert_close(step(model, given), expected)
        with torch.no_grad():
            assert_close(number(called(model, given)), value)
    with inv.nn.reversible(model, blocks, scheme="bdia"), torch.no_grad():
        assert torch.equal(number(called(model, given)), value)


@pytest.mark.parametrize("name", WITH_RECIPES)
def test_a_recipe_draws_what_the_block_draws(name: str) -> None:
    """As many masks, with the same probabilities: it leaves no dropout out."""
    model, blocks, given = made(name)
    expected = drawn(model, given)
    with inv.nn.reversible(model, blocks, scheme=THE_MODEL_ITSELF), inv.mode("store"):
        assert drawn(model, given) == expected


def drawn(model: nn.Module, given: dict[str, Any]) -> list[str]:
    with torch.profiler.profile(record_shapes=True) as profile:
        called(model, given)
    random = {"aten::bernoulli_", "aten::native_dropout", "aten::_scaled_dot_product_attention_math"}
    events = [event for event in profile.events() if event.name in random]
    return sorted(f"{event.name} of {math.prod(event.input_shapes[0])}" for event in events)


@pytest.mark.parametrize("name", ALL)
def test_checkpointed_blocks_are_the_model_to_the_bit(name: str) -> None:
    model, blocks, given = made(name)
    plain, keys = copy.deepcopy(model), list(model.state_dict())
    with inv.nn.checkpoint_blocks(model, blocks):
        assert_close(step(model, given), step(plain, given), 0.0)
        assert_close(list(model.buffers()), list(plain.buffers()), 0.0)
        with torch.no_grad():
            assert_close(number(called(model.eval(), given)), number(called(plain.eval(), given)), 0.0)
    assert list(model.state_dict()) == keys
    assert_close(step(model.train(), given), step(plain.train(), given), 0.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, of a fake tensor
@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].given != "words and states" and name != "t5"])
def test_a_plan_is_the_model_to_the_bit(name: str) -> None:
    """It chooses the longest list of blocks."""
    model, _, given = made(name)
    x = next(iter(given.values()))
    plain = inv.plan(model, x, max_time=1.0, loss=number)
    plan = plain.at(min(point.peak_bytes for point in plain.curve))
    assert plan.verify(x, loss=number).error == 0
    expected = step(model, given)
    assert len(inv.nn.checkpoint_blocks(model, plan)) > 0
    assert_close(step(model, given), expected, 0.0)


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_is_generation_without(name: str) -> None:
    model, blocks, _ = made(name)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": MASK[:, :5]}
    expected = model.eval().generate(IDS[:, :5], **options)
    for change in (inv.nn.checkpoint_blocks, partial(inv.nn.reversible, scheme="bdia")):
        with change(model, blocks):
            assert torch.equal(model.generate(IDS[:, :5], **options), expected)
    inv.nn.reversible(model, blocks)
    words = [model.generate(IDS[:, :5], use_cache=use_cache, **options) for use_cache in (True, False)]
    assert torch.equal(*words)


OF_OTHERS = "deit", "deit 3", "beit", "eva", "mixer", "torch encoder"


@pytest.mark.parametrize("name", [name for name in WITH_RECIPES if name not in OF_OTHERS])
def test_hidden_states_and_attentions_come_as_before_with_gradients(name: str) -> None:
    model, blocks, given = made(name)
    model.set_attn_implementation("eager")
    expected = seen(model.eval(), given)[0]
    inv.nn.reversible(model, blocks, scheme=THE_MODEL_ITSELF)
    assert_close(seen(model, given)[0], expected)
    with inv.mode("store"):
        stored = seen(model.train(), given)
    assert_close(seen(model, given), stored)


def seen(model: nn.Module, given: dict[str, Any]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Hidden states and attentions, and the gradients of all of them."""
    torch.manual_seed(2)
    out = called(model, given, output_hidden_states=True, output_attentions=True)
    found = [t for t in (*out.hidden_states, *out.attentions) if t is not None]
    wrt = [p for p in model.parameters() if p.requires_grad]
    total = sum(t.sin().sum() for t in found) + number(out)
    return found, torch.autograd.grad(total, wrt, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_recipe_says_so(name: str) -> None:
    model, blocks, _ = made(name)
    with pytest.raises(OptionError, match=r"no recipe for .*branches=.*use inv\.nn\.checkpoint_blocks"):
        inv.nn.reversible(model, blocks)


@pytest.mark.parametrize("name", POST_NORM)
def test_a_block_that_normalises_behind_each_sum_says_so(name: str) -> None:
    model, blocks, _ = made(name)
    with pytest.raises(
        OptionError, match=r"normalises behind each sum, expected .*=True.*use inv\.nn\.checkpoint_blocks"
    ):
        inv.nn.reversible(model, blocks)


def test_states_of_an_encoder_without_cross_attention_are_refused() -> None:
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_head=HEADS, n_layer=2))
    inv.nn.reversible(model, "transformer.h.*")
    with pytest.raises(ValueError, match="cross attention"):
        model(IDS, encoder_hidden_states=torch.randn(2, 5, WIDTH))


def test_layer_drop_is_refused_where_the_last_block_is_left_out() -> None:
    sizes = {**TEXT, "ffn_dim": 32, "num_hidden_layers": DEPTH, "word_embed_proj_dim": WIDTH}
    model = hf.OPTForCausalLM(hf.OPTConfig(**sizes)).train()
    inv.nn.reversible(model, "model.decoder.layers.*")
    model.model.decoder.layers[1].register_forward_hook(lambda *_: setattr(model.model.decoder, "layerdrop", 1.0))
    loss = model(IDS, labels=IDS).loss
    with pytest.raises(inv.errors.ReplayError, match=r"left before its end.* run the blocks up to the last"):
        loss.backward()
