"""The table generator, on its smallest row: what it counts does not depend on the machine."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import table
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
    assert ours["flops"] == pytest.approx(4 / 3, abs=0.01)
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
