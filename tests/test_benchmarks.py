"""The table generator, on its smallest row: what it counts does not depend on the machine."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import flows, table
from benchmarks.engines import BLOCKWISE, INVFUNC, PLAIN, Engine
from benchmarks.networks import SMALL

DEPTH = 4


def missing(net):
    from no_such_peer import engine  # pyright: ignore[reportMissingImports]

    return engine(net)


ENGINES = (PLAIN, BLOCKWISE, INVFUNC, Engine("peer", missing))


@pytest.fixture(scope="module")
def rows():
    network = {"mlp": replace(SMALL["mlp"], shape=(32, 16))}
    study = table.Study(network, {"mlp": (DEPTH,)}, couplings=0)
    return {row["engine"]: row for row in table.rows("mlp", study, DEPTH, ENGINES, "cpu")}


def test_the_plain_row_is_the_unit(rows):
    plain = rows["plain"]
    assert (plain["flops"], plain["time"], plain["evaluations"], plain["float64"]) == (1, 1, 1, 0)


def test_what_is_counted_of_the_others(rows):
    checkpointed, ours = rows["torch checkpoint, each block"], rows["invfunc"]
    assert checkpointed["evaluations"] == ours["evaluations"] == 2
    assert ours["flops"] == pytest.approx(4 / 3 - 1 / 48)  # a layer of 16, which are run three times in a plain step
    assert ours["held"] == 1 < checkpointed["held"] < rows["plain"]["held"]
    assert ours["peak"] < checkpointed["peak"] < rows["plain"]["peak"]
    assert ours["float64"] < 1e-12 < 1e-8 < ours["float32"] < ours["bfloat16"]


def test_a_peer_that_fails_is_shown_with_its_error(rows):
    assert rows["peer"]["error"] == "ModuleNotFoundError: No module named 'no_such_peer'"


def test_what_is_written(rows, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    table.write("smallest", list(rows.values()), "a machine")
    text = (tmp_path / "smallest.md").read_text()
    assert text.startswith("a machine") and "| 4 | peer | ModuleNotFoundError: No module named 'no_such_peer' |" in text
    assert [row["engine"] for row in json.loads((tmp_path / "smallest.json").read_text())["rows"]] == list(rows)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"smallest-{what}.png" for what in ("memory", "time", "error")
    }


def test_a_flow_of_digits_learns_the_same_lowered_and_plain():
    pytest.importorskip("sklearn", reason="comes with the demo extra")
    torch.set_default_dtype(torch.float32)
    (plain, samples), (lowered, same) = (
        flows.row(flows.FLOWS[f"invfunc, {name}"], 15) for name in ("plain", "lowered")
    )
    assert lowered[1:3] == pytest.approx(plain[1:3], abs=1e-4)
    assert lowered[2] < lowered[1] - 0.5
    assert lowered[3] < 0.5 * plain[3]
    assert samples.shape == same.shape == (40, 8, 8) and samples.min() >= 0 and samples.max() <= 16
