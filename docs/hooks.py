"""What MkDocs does beside its own work: equations as MathML, pages of the reference, notebooks as pages.

All of it happens on this machine: the site loads no script, font or style from elsewhere.
"""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # MkDocs loads this file by its path

import reference  # noqa: E402

# ---- equations -------------------------------------------------------------------------------------------------------

_BLOCK = re.compile(r"^( *)\.\. math:: (.*\n?(?:\1 +\S.*\n?)*)", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]+)`")
_FENCE = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_WORD = re.compile(r"\\(?:text|mathrm|operatorname|begin|end)\{[^}]*\}|\\[A-Za-z]+|[A-Za-z]{2,}")
_NAME = re.compile(r"(?<![`\[\w])`(?:invfunc\.|inv\.)?([A-Za-z_.]+)`(?![`\]])")


def mathml(latex: str, display: str = "inline") -> str:
    """An equation as MathML, which browsers show by themselves; a name of several letters is one symbol."""
    named = _WORD.sub(lambda word: word[0] if word[0].startswith("\\") else rf"\operatorname{{{word[0]}}}", latex)
    return convert(" ".join(named.split()), display=display).replace("\n", "")


def with_equations(text: str) -> str:
    """A text whose ``.. math::`` blocks, ``:math:`` words and ``math`` fences are MathML."""
    text = _BLOCK.sub(lambda found: f"{found[1]}{mathml(found[2], 'block')}\n\n", text)
    text = _FENCE.sub(lambda found: mathml(found[1], "block"), text)
    return _INLINE.sub(lambda found: mathml(found[1]), text)


def with_links(text: str, known: dict[str, str]) -> str:
    """A text whose single-quoted public names lead to the reference."""
    return _NAME.sub(lambda found: f"[{found[0]}][{known[found[1]]}]" if found[1] in known else found[0], text)


def link_targets() -> dict[str, str]:
    """Every public name as docstrings write it; one of the top level wins over an op's of the same name."""
    found = [(entry.path.removeprefix("invfunc."), entry.path) for entry in reference.entries()]
    short = [(name.rpartition(".")[2], path) for name, path in found if not name.startswith("nn.")]
    return dict([*reversed(short), *found])


class Docstrings(griffe.Extension):
    """Prepares docstrings for Markdown: equations, links, and the section that griffe calls Examples."""

    def __init__(self) -> None:
        self.known = link_targets()

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = with_links(with_equations(text), self.known)


# ---- pages -----------------------------------------------------------------------------------------------------------

NOTEBOOKS = HERE.parent / "notebooks"
COPIED = {"migrating.md": "MIGRATING.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_config(config: Any) -> Any:
    """The navigation: what is there, in the order in which one reads."""
    config.nav = [
        {"Home": "index.md"},
        {"Tutorial": "tutorial.md"},
        {"How to": [*_written("how-to"), *(page for page in _written(".") if page not in ("index.md", "tutorial.md"))]},
        {"Notebooks": [{_title(path): _page_of(path)} for path in _notebooks()]},
        {"Explanation": _written("explanation")},
        {"Reference": ["reference/index.md", *_reference()]},
        {"Moving here": "migrating.md"},
        {"The project": ["contributing.md", "changelog.md"]},
    ]
    return config


def _written(folder: str) -> list[str]:
    return [str(path.relative_to(HERE)) for path in sorted((HERE / folder).glob("*.md"))]


def _reference() -> list[dict[str, str]]:
    return [{reference.title_of(page): f"reference/{page}.md"} for page in reference.pages()]


def _notebooks() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def _page_of(path: Path) -> str:
    return f"notebooks/{path.stem}.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that nobody writes."""
    made = {f"reference/{page}.md": reference.markdown(page) for page in reference.pages()}
    made |= {"reference/index.md": reference.index()}
    made |= {_page_of(path): notebook(path) for path in _notebooks()}
    made |= {name: (HERE.parent / source).read_text() for name, source in COPIED.items()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Equations in written pages."""
    return with_equations(markdown)


# ---- notebooks -------------------------------------------------------------------------------------------------------


def _cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


def _title(path: Path) -> str:
    return "".join(_cells(path)[0]["source"]).splitlines()[0].removeprefix("# ")


def notebook(path: Path) -> str:
    """A notebook as Markdown, with the outputs that are stored in it."""
    return "\n\n".join(block for cell in _cells(path) for block in _blocks(cell)) + "\n"


def _blocks(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        yield _shown(output.get("data", {"text/plain": output.get("text", "")}))


def _shown(data: dict[str, Any]) -> str:
    """An output in the richest form that it has."""
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
    if "text/html" in data:
        return "".join(data["text/html"])
    return f'<pre class="output">{html.escape("".join(data["text/plain"]))}</pre>'
