"""Small pre-norm models with the attributes of those that people have: a GPT-2, a Llama with rotary embeddings and a
cache, and torch's own layers. Written here, so that the suite needs torch alone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invfunc.nn.residual import RECIPES

WIDTH, HEADS, WORDS = 8, 2, 11


class Cache:
    """Keys and values of each layer, as it has seen them."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values with those of new words behind them."""
        if layer in self.layers:
            before = self.layers[layer]
            keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        self.layers[layer] = keys, values
        return keys, values


def turn(x: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """A rotary embedding."""
    cos, sin = by
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    """Attention that takes a mask, rotary embeddings, encoder states and a cache, and returns a tuple."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.q_proj, self.kv_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.c_proj, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        encoder_hidden_states: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if source is encoder_hidden_states:
            attention_mask = cache = None  # those of the words
        q, (k, v) = self.heads(self.q_proj(hidden_states)), map(self.heads, self.kv_proj(source).chunk(2, -1))
        if position_embeddings is not None:
            q, k = turn(q, position_embeddings), turn(k, position_embeddings)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.dropout(self.c_proj(y.transpose(1, 2).flatten(2))), None

    def heads(self, x: Tensor) -> Tensor:
        """``(N, words, WIDTH) -> (N, HEADS, words, WIDTH / HEADS)``."""
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class GPT2Block(nn.Module):
    """The attributes of GPT-2's block; all but the stream comes by position."""

    def __init__(self, layer: int, crosses: bool = False) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), Attention(layer)
        if crosses:
            self.ln_cross_attn, self.crossattention = nn.LayerNorm(WIDTH), Attention(layer)
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), mlp()

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        x = hidden_states
        x = x + self.attn(self.ln_1(x), cache=cache, attention_mask=attention_mask, **kwargs)[0]
        if encoder_hidden_states is not None:
            x = x + self.crossattention(self.ln_cross_attn(x), encoder_hidden_states=encoder_hidden_states)[0]
        return x + self.mlp(self.ln_2(x))


class LlamaDecoderLayer(nn.Module):
    """The attributes of Llama's block; all but the stream comes by name."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = nn.RMSNorm(WIDTH), Attention(layer)
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(WIDTH), mlp()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = hidden_states
        x = x + self.self_attn(hidden_states=self.input_layernorm(x), attention_mask=attention_mask, **kwargs)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


RECIPES[f"{__name__}.GPT2Block"] = RECIPES["transformers.models.gpt2.modeling_gpt2.GPT2Block"]
RECIPES[f"{__name__}.LlamaDecoderLayer"] = RECIPES["transformers.models.llama.modeling_llama.LlamaDecoderLayer"]


class GPT2(nn.Module):
    """Embeddings, blocks that are called one after another, a head; with an encoder's states, if it has any."""

    def __init__(self, depth: int = 4, crosses: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.encoder = nn.Linear(WIDTH, WIDTH) if crosses else None
        self.h = nn.ModuleList([GPT2Block(i, crosses) for i in range(depth)])
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.wte(words)
        mask = causal(words.shape[1], cache)
        states = None if self.encoder is None else self.encoder(x)
        for block in self.h:
            x = block(x, cache, mask, states)
        return self.head(self.ln_f(x))


class Llama(nn.Module):
    """The same with rotary embeddings that are learnt, so that they have a gradient."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.embed_tokens, self.angles = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.rand(WIDTH // HEADS))
        self.layers = nn.ModuleList([LlamaDecoderLayer(i) for i in range(depth)])
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor, cache: Cache | None = None) -> Tensor:
        x, first = self.embed_tokens(words), seen(cache)
        angles = torch.arange(first, first + words.shape[1])[:, None] * self.angles
        context = {"attention_mask": causal(words.shape[1], cache), "position_embeddings": (angles.cos(), angles.sin())}
        for layer in self.layers:
            x = layer(x, cache=cache, use_cache=cache is not None, **context)
        return self.head(self.norm(x))


def seen(cache: Cache | None) -> int:
    """How many words a cache has seen."""
    return cache.layers[0][0].shape[2] if cache is not None and cache.layers else 0


def causal(count: int, cache: Cache | None) -> Tensor:
    """Which words the last ``count`` may look at."""
    return torch.ones(count, count + seen(cache), dtype=torch.bool).tril(seen(cache))


class Encoder(nn.Module):
    """torch's encoder, with both masks."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, norm_first=True, batch_first=True)
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        return self.body(self.wte(words), mask=~causal(words.shape[1], None), src_key_padding_mask=words == 0)


class Decoder(nn.Module):
    """torch's decoder, which looks at the states of an encoder that is trained as well."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 16, norm_first=True, batch_first=True)
        self.wte, self.encoder = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.body = nn.TransformerDecoder(layer, depth)

    def forward(self, words: Tensor) -> Tensor:
        x = self.wte(words)
        return self.body(x, self.encoder(x).tanh(), tgt_mask=~causal(words.shape[1], None))


FAMILIES = {
    "gpt2": (GPT2, "h.*"),
    "gpt2, cross": (lambda depth=4: GPT2(depth, crosses=True), "h.*"),
    "llama": (Llama, "layers.*"),
    "torch encoder": (Encoder, "body.layers.*"),
    "torch decoder": (Decoder, "body.layers.*"),
}


def words(count: int = 6, batch: int = 3) -> Tensor:
    """Words, the last of which are padding."""
    return torch.randint(1, WORDS, (batch, count)).index_fill(1, torch.tensor([count - 1]), 0)
