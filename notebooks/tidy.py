"""``python notebooks/tidy.py [NOTEBOOK ...]``: run notebooks from top to bottom and store them with what they show.

They are stored with their outputs, so that they can be read without being run, and without anything that would change
from one run to the next for no reason: cell numbers, random ids, metadata, and what is printed to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def executed(path: Path) -> Any:
    """A notebook after a run in a fresh kernel; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    return notebook


def tidied(notebook: Any) -> Any:
    """A notebook without what is of no use to a reader."""
    notebook.metadata = nbformat.from_dict(KERNEL)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = _joined([_tidied_output(out) for out in cell.outputs if out.get("name") != "stderr"])
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Outputs with what was printed in pieces as one."""
    found: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and found and found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def _tidied_output(output: Any) -> Any:
    if output.output_type in ("execute_result", "display_data"):
        kept = {kind: value for kind, value in output.data.items() if kind in ("text/plain", "text/html", "image/png")}
        output.data, output.metadata = nbformat.from_dict(kept), nbformat.from_dict({})
        if "execution_count" in output:
            output.execution_count = None
    return output


def written(notebook: Any) -> str:
    """A notebook as its file holds it."""
    return nbformat.writes(notebook, indent=1) + "\n"


def main(names: list[str]) -> None:
    """Run and store the notebooks of these names, or all."""
    for path in map(Path, names or sorted(map(str, HERE.glob("*.ipynb")))):
        path.write_text(written(tidied(executed(path))))
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
