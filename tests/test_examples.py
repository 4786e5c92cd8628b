"""The examples at small size: they learn, and their tables say what each way takes."""

import re

import pytest
import torch

from examples import digits, text
from examples.transformer import Transformer, plain, reversible, tried


@pytest.fixture(autouse=True)
def float32() -> None:
    """As the examples train."""
    torch.set_default_dtype(torch.float32)


def rows_of(table: str) -> dict[str, list[float]]:
    """The numbers of a table by way."""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {name: [float(number) for number in numbers] for name, *numbers in cells[1:]}


def test_text_is_learned_in_every_way() -> None:
    shown = text.main("--depth 3 --width 32 --length 32 --batch 8 --pretrain 30 --steps 15".split())
    before = float(re.match(r"before: (\S+)", shown)[1])
    rows = rows_of(shown)
    assert rows.keys() == text.WAYS.keys()
    assert all(loss < before - 0.05 for loss, _, _ in rows.values())
    assert rows["torch's checkpoint"][0] == rows["plain"][0]
    assert all(peak < 0.7 * rows["plain"][1] for name, (_, peak, _) in rows.items() if name != "plain")


def test_digits_are_learned_by_both_vision_transformers() -> None:
    rows = rows_of(digits.main("--depth 3 --width 32 --batch 64 --steps 60".split()))
    assert rows.keys() == digits.WAYS.keys()
    assert all(accuracy > 0.5 for accuracy, _, _ in rows.values())
    assert rows["RevViT"][1] < rows["ViT, torch's checkpoint"][1] < rows["ViT"][1]


def test_the_peak_of_a_reversible_transformer_does_not_grow_with_depth() -> None:
    def peak(depth: int) -> int:
        model = Transformer(torch.nn.Linear(4, 16), 16, 16, depth, 10, is_causal=False)
        batch = torch.randn(8, 16, 4), torch.randint(10, (8, 16))
        rows = tried(model, {"plain": plain, "reversible": reversible("couple")}, lambda step: batch, 1, lambda _: 0.0)
        return rows[1].peak

    assert peak(12) <= 1.05 * peak(4)
