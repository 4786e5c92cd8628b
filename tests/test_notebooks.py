"""The notebooks run from top to bottom, and are stored tidily with what they show."""

import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

sys.path.insert(0, str(Path(__file__).parent.parent / "notebooks"))
nbformat = pytest.importorskip("nbformat", reason="comes with the dev extra")
pytest.importorskip("nbclient", reason="comes with the dev extra")
pytest.importorskip("sklearn", reason="comes with the demo extra")

import tidy  # noqa: E402

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.notebook
@each
# The client runs its own event loop; sockets of the kernel that has just ended are closed when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_notebook_runs(path: Path) -> None:
    assert [cell.cell_type for cell in tidy.executed(path).cells].count("code") > 2


@each
def test_notebook_is_tidy(path: Path) -> None:
    text = path.read_text()
    assert tidy.written(tidy.tidied(nbformat.reads(text, as_version=4))) == text, "run python notebooks/tidy.py"


@each
def test_notebook_shows_what_it_computes(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert path.stat().st_size < 200_000


@each
def test_notebook_begins_with_a_title_and_a_sentence(path: Path) -> None:
    first = nbformat.read(path, as_version=4).cells[0].source
    assert first.startswith("# ")
    assert len(first.splitlines()) > 1


def test_there_are_eight() -> None:
    assert [path.name.partition("-")[0] for path in NOTEBOOKS] == [str(i) for i in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 8
