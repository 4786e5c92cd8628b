"""timm's vision transformers, checkpointed and made reversible."""

import copy
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import invfunc as inv
from invfunc.errors import OptionError

SCHEMES = "couple", "momentum", "midpoint", "bdia", "retrofit"


def vit(**options: float) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=5)
    return timm.models.vision_transformer.VisionTransformer(**sizes, **options).double()


def step(model: nn.Module, size: int = 16) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    y = model(torch.randn(2, 3, size, size, dtype=torch.float64))
    return y.detach(), list(torch.autograd.grad(y.square().sum(), list(model.parameters())))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_reversible_lowered_is_reversible_stored(scheme: str) -> None:
    model = vit(init_values=0.1, drop_path_rate=0.2, proj_drop_rate=0.1)
    keys, blocks = list(model.state_dict()), list(model.blocks)
    inv.nn.reversible(model, "blocks.*", scheme=scheme)
    with inv.mode("store"):
        expected = step(model)
    found = step(model)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == keys and list(model.blocks) == blocks and len(model.blocks) == 4


def test_the_recipe_takes_the_block_apart() -> None:
    model = vit(init_values=0.1).eval()
    expected = step(model)
    inv.nn.reversible(model, "blocks.*", scheme=partial(inv.ops.momentum, gamma=0))
    torch.testing.assert_close(step(model), expected, rtol=1e-12, atol=1e-12)


def test_the_block_of_the_same_name_that_works_in_windows_is_refused() -> None:
    """Its forward cuts the image into windows, which the recipe would leave out."""
    sam = timm.models.vision_transformer_sam.VisionTransformerSAM
    model = sam(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, window_size=2)
    with pytest.raises(OptionError, match=r"no recipe for timm\.models\.vision_transformer_sam\.Block, .* branches="):
        inv.nn.reversible(model, "blocks.*")


def test_bdia_evaluates_the_model_itself() -> None:
    model = vit().float().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float32)
    expected = model(x)
    inv.nn.reversible(model, "blocks.*", scheme="bdia")
    assert torch.equal(model(x), expected)


def test_checkpointed_blocks_are_those_of_set_grad_checkpointing() -> None:
    model = vit(drop_path_rate=0.2)
    expected = step(model)
    model.set_grad_checkpointing(True)
    theirs = step(model)
    model.set_grad_checkpointing(False)
    with inv.nn.checkpoint_blocks(model, "blocks.*"):
        ours = step(model)
        model.set_grad_checkpointing(True)
        both = step(model)
    for found in (theirs, ours, both):
        assert torch.equal(found[0], expected[0]) and all(map(torch.equal, found[1], expected[1]))


CONVOLUTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext_atto": ("stages.*.blocks.*", {"depths": (1, 2, 1, 1), "dims": (4, 8, 8, 8), "drop_path_rate": 0.2}),
    "resnet18": ("layer[1-4].*", {"drop_path_rate": 0.2}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_checkpointed_convolutions_move_their_statistics_once(name: str) -> None:
    """To the bit, in buffers, too."""
    blocks, options = CONVOLUTIONS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).double()
    plain = copy.deepcopy(model)
    inv.nn.checkpoint_blocks(model, blocks)
    for _ in range(2):
        (y, found), (expected_y, expected) = step(model, 32), step(plain, 32)
        assert torch.equal(y, expected_y) and all(map(torch.equal, found, expected))
        assert all(map(torch.equal, model.buffers(), plain.buffers()))


def test_intermediate_features_come_as_before() -> None:
    model = vit()
    inv.nn.reversible(model, "blocks.*")
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    found = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    with inv.mode("store"):
        stored = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert all(map(torch.equal, found, stored))
