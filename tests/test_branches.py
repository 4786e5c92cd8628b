"""The branches of a reversible model's blocks: what they are told, and what they find when they run again."""

from collections.abc import Callable
from typing import Any

import pytest
from kit import assert_refused
from residual_models import Cache, Llama, words
from torch import Tensor

import invfunc as inv
from invfunc.errors import WireError


def without_turns(block: Any, x: Tensor, attention_mask: Tensor, cache: Cache | None = None) -> Tensor:
    return block.self_attn(block.input_layernorm(x), attention_mask=attention_mask, cache=cache)[0]


def without_cache(block: Any, x: Tensor, attention_mask: Tensor, position_embeddings: Any) -> Tensor:
    return block.self_attn(
        block.input_layernorm(x), attention_mask=attention_mask, position_embeddings=position_embeddings
    )[0]


@pytest.mark.parametrize(("attend", "name"), [(without_turns, "position_embeddings"), (without_cache, "cache")])
def test_what_no_branch_takes_is_refused(attend: Callable[..., Tensor], name: str) -> None:
    """It would be left out, without a word."""
    model = Llama()
    inv.nn.reversible(model, "layers.*", branches=(attend, "post_attention_layernorm(x) mlp(x)"))
    message = (
        f"reversible: layers.0 received {name}, expected names that one of its branches takes; write the branch that "
        f"needs it as a function (block, x, {name}) -> tensor"
    )
    assert_refused(WireError, message, lambda: model(words(), Cache()))
