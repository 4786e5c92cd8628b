"""The documentation is complete: every public name has its page and, by its kind, the parts that a reader looks for.

The rule:

1.  Everything has a claim, one sentence that ends with a full stop, and stands on exactly one page.
2.  Everything but errors and laws has an example that runs (pytest runs them all) and, if it takes arguments, says
    what they are. An error is shown by what raises it; the docstring of a law is the law.
3.  What raises an error of ours says so.
4.  What makes an op has an equation and a cost; one of the catalogue has shapes too, and one of its own rooms a domain.
5.  What the catalogue has beside ops (estimators, masks, initialisers, adapters) has an equation or shapes.
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import invfunc as inv
from invfunc import errors, ops

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import reference  # noqa: E402

ENTRIES = {entry.path: entry for entry in reference.entries()}
LAWS = {path for path, entry in ENTRIES.items() if isinstance(entry.value, inv.testing.Law)}
ERRORS = {
    path for path, entry in ENTRIES.items() if inspect.isclass(entry.value) and issubclass(entry.value, Exception)
}
SHOWN = sorted(set(ENTRIES) - LAWS - ERRORS)


def doc(path: str) -> str:
    return inspect.getdoc(ENTRIES[path].value) or ""


def sections(path: str) -> dict[str, str]:
    """The sections of a docstring, by title."""
    parts = re.split(r"^([A-Z][\w -]+):\n(?=\s)", doc(path), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def makes_an_op(value: Any) -> bool:
    """Whether something is a constructor of ops, as its annotation says."""
    return inspect.isfunction(value) and value.__annotations__.get("return") == "Invertible"


CONSTRUCTORS = sorted(path for path in SHOWN if makes_an_op(ENTRIES[path].value))
CATALOGUE = sorted(path for path in CONSTRUCTORS if ENTRIES[path].name in ops.__all__)
HELPERS = sorted(path for path in SHOWN if ENTRIES[path].name in ops.__all__ and path not in CATALOGUE)


@pytest.mark.parametrize("room", reference.ROOMS, ids=lambda room: room.__name__)
def test_every_public_name_has_a_page(room: Any) -> None:
    listed = [id(entry.value) for found in reference.pages().values() for entry in found]
    for name in reference.public_names(room):
        value = getattr(room, name)
        if not inspect.ismodule(value):
            assert listed.count(id(value)) == 1, name


def test_pages_show_what_they_list() -> None:
    index = reference.index()
    for page, found in reference.pages().items():
        text = reference.markdown(page)
        for entry in found:
            assert f"::: {entry.path}\n" in text
            assert f"[{entry.path}]" in index


@pytest.mark.parametrize("path", sorted(ENTRIES))
def test_claim(path: str) -> None:
    first = doc(path).partition("\n\n")[0].strip()
    assert first
    if path not in LAWS:
        assert re.search(r"[.:]`*$", first), first


@pytest.mark.parametrize("path", SHOWN)
def test_example(path: str) -> None:
    assert ">>>" in sections(path).get("Example", "")


@pytest.mark.parametrize("path", SHOWN)
def test_arguments(path: str) -> None:
    value = ENTRIES[path].value
    if inspect.isfunction(value):
        named = [p for p in inspect.signature(value).parameters if not p.startswith("_")]
        assert not named or "Args" in sections(path) or makes_an_op(value), named
        for name in re.findall(r"^\s{4}\*{0,2}(\w+):", sections(path).get("Args", ""), re.MULTILINE):
            assert name in named


@pytest.mark.parametrize("path", SHOWN)
def test_raises(path: str) -> None:
    if inspect.isfunction(ENTRIES[path].value):
        raised = set(re.findall(r"raise (\w+Error)\(", inspect.getsource(ENTRIES[path].value)))
        for name in raised & set(vars(errors)):
            assert f"{name}:" in sections(path).get("Raises", ""), name


@pytest.mark.parametrize("path", CONSTRUCTORS)
def test_a_constructor_has_an_equation_and_a_cost(path: str) -> None:
    assert ".. math::" in doc(path)
    assert "Cost" in sections(path)


@pytest.mark.parametrize("path", CATALOGUE)
def test_an_op_of_the_catalogue_has_shapes(path: str) -> None:
    assert "Shapes" in sections(path)


@pytest.mark.parametrize("path", [p for p in CATALOGUE if ENTRIES[p].value.__module__.startswith(ops.__name__)])
def test_an_op_of_the_catalogue_has_a_domain(path: str) -> None:
    assert "Domain" in sections(path)


@pytest.mark.parametrize("path", HELPERS)
def test_a_helper_of_the_catalogue_has_an_equation_or_shapes(path: str) -> None:
    assert ".. math::" in doc(path) or "Shapes" in sections(path)


# ---- the site --------------------------------------------------------------------------------------------------------


def test_equations_become_mathml() -> None:
    pytest.importorskip("latex2mathml", reason="comes with the docs extra")
    pytest.importorskip("griffe", reason="comes with the docs extra")
    import hooks

    for path in ENTRIES:
        text = hooks.with_equations(doc(path))
        assert ".. math::" not in text
        assert ":math:" not in text
        assert ("<math" in text) == (".. math::" in doc(path) or ":math:" in doc(path))


def test_written_pages_load_nothing_from_elsewhere() -> None:
    for path in (ROOT / "docs").rglob("*.*"):
        if path.suffix in (".md", ".css"):
            assert not re.search(r"""(src|href)=["']?https?:|@import|url\(""", path.read_text()), path


def test_written_pages_name_ops_that_exist() -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        for name in re.findall(r"`ops\.(\w+)", path.read_text()):
            assert name in ops.__all__, (path, name)
