"""What a call keeps: every byte of it, and where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import invfunc as inv
from invfunc.look.saved import Saved

ACTIVATION = 5 * 8 * 8


def rows(op: object, *inputs: Tensor) -> list[tuple[str, str, int]]:
    return [(row.where, row.what, row.bytes) for row in inv.look.saved(op, *inputs)]


def pipeline(*middle: object) -> inv.Invertible:
    return inv.chain(inv.split(2), *middle, inv.concat(2))


def given() -> Tensor:
    return torch.randn(5, 8, requires_grad=True)


def test_a_pipeline_keeps_its_output_at_any_depth() -> None:
    for depth in 1, 8:
        op = pipeline(*(inv.couple(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(depth)))
        assert rows(inv.checkpoint(op), given()) == [("end of a trunk", "output (5, 8) float64", ACTIVATION)]


def test_what_is_kept_is_what_stays_alive() -> None:
    block = inv.couple(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    ends = pipeline(inv.mark(block, "store"), inv.mark(block, "recompute")), torch.sigmoid
    op = inv.checkpoint(inv.chain(pipeline(block), torch.sigmoid, *ends))
    x = given()
    kept = sum(row.bytes for row in inv.look.saved(op, x))
    assert kept == inv.measure(lambda: op(x)).held_bytes


def test_residues_and_inputs_of_stages_are_named_by_their_place() -> None:
    op = inv.chain(inv.ops.relu(), inv.mark(inv.ops.tanh(), "recompute"), inv.ops.relu())
    found = rows(inv.checkpoint(op), given())
    assert [where for where, *_ in found] == [
        "chain stage 0 (relu)",
        "end of a trunk",
        "chain stage 2 (relu)",
        "end of a trunk",
    ]
    assert all("residue" in what for where, what, _ in found if "relu" in where)


def test_random_states_and_buffers_are_listed() -> None:
    op = pipeline(inv.couple(nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))))
    found = inv.look.saved(inv.checkpoint(op), given())
    assert {row.what for row in found} >= {"random state", "buffer running_mean (4,) float64"}
    assert {row.where for row in found if "random" in row.what} == {"chain stage 1 (couple)"}


def test_plain_functions_modules_and_checkpointed_functions() -> None:
    module, x = nn.Linear(8, 8), given()
    assert rows(module, x) == [("AddmmBackward0", "mat1 (5, 8) float64", 0)]
    assert rows(inv.checkpoint(lambda x: x.sin().cos()), x) == [("checkpoint(<lambda>)", "input (5, 8) float64", 0)]
    assert rows(torch.exp, x) == [("ExpBackward0", "result (5, 8) float64", ACTIVATION)]


@pytest.mark.parametrize("way", ["store", "recompute", "invert"])
def test_drawings_rows_and_measurements_agree(way: str) -> None:
    blocks = [inv.couple(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]
    op = inv.checkpoint(inv.chain(pipeline(*blocks), torch.tanh, pipeline(inv.couple(torch.sin))), mode=way)
    listed = sum(row.bytes for row in inv.look.saved(op, given()))
    output = 0 if way == "invert" else ACTIVATION  # which nobody saves
    assert listed == inv.draw(op, (5, 8)).kept_bytes == inv.measure(op, given()).held_bytes - output


def test_nothing_is_kept_without_gradients() -> None:
    op = inv.checkpoint(pipeline(inv.couple(torch.sin)))
    assert inv.look.saved(op, torch.randn(5, 8)) == []
    with torch.no_grad():
        assert inv.look.saved(op, given()) == []


def test_the_table_ends_with_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    inv.look.print_saved(inv.checkpoint(pipeline(inv.couple(torch.sin))), given())
    head, row, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["where", "what", "bytes", "why"]
    assert row.split("  ")[0] == "end of a trunk" and total.split() == ["total", str(ACTIVATION)]
    assert Saved("a", "b", 1, "c").why == "c"
