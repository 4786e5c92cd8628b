"""The branches of a reversible model's blocks: what they are told, and what they find when they run again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import assert_close, assert_refused
from residual_models import Cache, Llama, words
from torch import Tensor, nn

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


class InTuple(nn.Module):
    """A residual block whose model takes the first of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.mix(x), None


def test_blocks_that_return_a_tuple_are_refused() -> None:
    """The model would take the first sample."""
    blocks = nn.ModuleList([InTuple(), InTuple()])
    inv.nn.reversible(blocks, "*", branches=("mix",))
    message = (
        "reversible: 1 received (4,), expected what 0 has returned, and not a part of it, as of a tuple: its streams go "
        "on from there; use inv.nn.checkpoint_blocks: a block that returns a tuple can not be reversible"
    )
    assert_refused(WireError, message, lambda: blocks[1](blocks[0](torch.randn(3, 4))[0]))


class Doubling(nn.Module):
    """What depends on the flag, and saves the same numbers either way."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if self.training else 1.0)


class TwoSums(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.mix, self.drop1 = nn.LayerNorm(4), nn.Linear(4, 4), Doubling()
        self.norm2, self.net, self.drop2 = nn.LayerNorm(4), nn.Linear(4, 4), Doubling()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop1(self.mix(self.norm1(x)))
        return x + self.drop2(self.net(self.norm2(x)))


def by_name(block: nn.Module, x: Tensor) -> Tensor:
    return block.drop2(block.net(block.norm2(x)))


@pytest.mark.parametrize("second", ["norm2(x) net(x) drop2(x)", "norm2 net drop2", by_name])
def test_every_branch_runs_again_in_the_mode_of_forward(second: Any) -> None:
    """Those whose functions are made in the call were taken for others, and ran again as the model was then."""
    model, x = nn.Sequential(*[TwoSums() for _ in range(6)]), torch.randn(3, 4)
    inv.nn.reversible(model, "*", branches=("norm1(x) mix(x) drop1(x)", second))

    def gradients(mode: str) -> tuple[Tensor, ...]:
        with inv.mode(mode):
            loss = model.train()(x).square().sum()
        model.eval()
        return torch.autograd.grad(loss, list(model.parameters()))

    assert_close(gradients("invert"), gradients("store"))
