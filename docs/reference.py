"""Which public names there are, and on which page of the reference each of them stands.

Nothing is listed by hand: a name that is added to an ``__all__`` has its place here, by the module that defines it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import invfunc
from invfunc import errors, look, nn, ops, testing
from invfunc.compat import invtorch, memcnn

ROOMS = (invfunc, ops, nn, memcnn, invtorch, look, import_module("invfunc.plan"), errors, testing)


class Entry(NamedTuple):
    """A public object."""

    path: str  # the shortest public one
    value: Any
    page: str

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition(".")[2]

    @property
    def claim(self) -> str:
        """The first sentence of its docstring, or what a law of `invfunc.testing` says."""
        return _first_sentence(inspect.getdoc(self.value) or "")


def public_names(room: ModuleType) -> list[str]:
    """What a module offers: its ``__all__`` or, where there is none, its errors, its laws and what checks them."""
    return list(getattr(room, "__all__", [name for name, value in vars(room).items() if _is_offered(value, room)]))


def _is_offered(value: Any, room: ModuleType) -> bool:
    if getattr(value, "__module__", None) != room.__name__:
        return False
    is_error = inspect.isclass(value) and issubclass(value, Exception)
    return is_error or isinstance(value, testing.Law) or value is testing.check_laws


def entries() -> Iterator[Entry]:
    """Every public object once, under its shortest path; modules are pages, not entries."""
    seen: set[int] = set()
    for room in ROOMS:
        for name in public_names(room):
            value = getattr(room, name)
            if id(value) not in seen and not inspect.ismodule(value):
                seen.add(id(value))
                yield Entry(f"{room.__name__}.{name}", value, page_of(value, room))


def page_of(value: Any, room: ModuleType) -> str:
    """The page of an object: the module that defines it, a package's modules being one page unless it is a room."""
    home = getattr(value, "__module__", room.__name__).removeprefix("invfunc.").split(".")
    return "/".join(home[:2] if home[0] in ("ops", "nn", "compat") else home[:1])


def pages() -> dict[str, list[Entry]]:
    """The entries of every page, pages in the order in which their first name is defined."""
    found: dict[str, list[Entry]] = {}
    for entry in entries():
        found.setdefault(entry.page, []).append(entry)
    return dict(sorted(found.items(), key=lambda item: (item[0].count("/"), item[0])))


def title_of(page: str) -> str:
    """``ops/shape`` as a heading."""
    return page.replace("_", " ").replace("/", ": ")


def module_of(page: str) -> str:
    """The module whose docstring begins a page."""
    return "invfunc." + page.replace("/", ".")


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].removesuffix(".") + "." if paragraph else ""


def markdown(page: str) -> str:
    """A page of the reference, for mkdocstrings to fill in."""
    blocks = [f"# {title_of(page)}", f"::: {module_of(page)}\n    options:\n      members: false\n{_BARE}"]
    return "\n\n".join([*blocks, *(f"::: {entry.path}" for entry in pages()[page])]) + "\n"


_BARE = "      show_root_heading: false\n      show_root_toc_entry: false"


def index() -> str:
    """The first page of the reference: every name with its claim."""
    blocks = ["# Reference", "Every public name, by the module that defines it."]
    for page, found in pages().items():
        rows = [f"| [`{entry.path.removeprefix('invfunc.')}`][{entry.path}] | {entry.claim} |" for entry in found]
        blocks.append("\n".join([f"## [{title_of(page)}]({page}.md)\n", "| | |", "|---|---|", *rows]))
    return "\n\n".join(blocks) + "\n"
