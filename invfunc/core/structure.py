"""Structure: what a function holds, and what it finds among its globals. The one place where cells are read."""

from __future__ import annotations

import dis
from collections.abc import Mapping
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any

LIBRARIES = ("torch", "invfunc")
"""Whose functions find nothing of the user's among their globals."""

_EMPTY_CELL = CellType()
_OWN = __name__.partition(".")[0]


def is_empty(cell: CellType) -> bool:
    """Whether a cell holds nothing yet: its variable has no value."""
    return cell == _EMPTY_CELL


def is_of_library(module: str | None) -> bool:
    """Whether the module of a function or a class, by its name, is one of torch or of this package."""
    return (module or "").partition(".")[0] in LIBRARIES


def has_functions(item: Any) -> bool:
    """Whether an object is one of this package's that tells its functions: the user's may use the word as well."""
    is_own = any(kind.__module__.partition(".")[0] == _OWN for kind in type(item).__mro__)
    return is_own and hasattr(item, "functions")


def cells_of(fn: FunctionType) -> dict[str, CellType]:
    """The cells of a function that hold something, by name."""
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    return {name: cell for name, cell in cells if not is_empty(cell)}


def defaults_of(fn: FunctionType) -> dict[str, Any]:
    """The defaults of a function's arguments, by name."""
    defaults, code = fn.__defaults__ or (), fn.__code__
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    return {**dict(zip(names, defaults, strict=True)), **(fn.__kwdefaults__ or {})}


def contents_of(fn: FunctionType) -> dict[str, Any]:
    """What a function closes over, and the defaults of its arguments, by name."""
    return {**{name: cell.cell_contents for name, cell in cells_of(fn).items()}, **defaults_of(fn)}


def globals_of(fn: FunctionType) -> dict[str, Any]:
    """What a function of the user's finds among its globals, by name."""
    return globals_in(fn.__code__, fn.__globals__)


def globals_in(code: CodeType, names: Mapping[str, Any]) -> dict[str, Any]:
    """`globals_of`, from a function's code and its globals."""
    if is_of_library(names.get("__name__")):
        return {}
    return {name: names[name] for name in _loaded_names(code) if name in names}


@lru_cache(2**10)
def _loaded_names(code: CodeType) -> tuple[str, ...]:
    """The global names that code loads; names of attributes stand beside them in ``co_names``."""
    own = [i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [name for part in code.co_consts if isinstance(part, CodeType) for name in _loaded_names(part)]
    return tuple(dict.fromkeys([*own, *inner]))


def has_room(item: Any) -> bool:
    """Whether an object can have attributes of its own, though it may have none yet."""
    return getattr(item, "__dict__", None) is not None or bool(slots_in(type(item)))


def slots_of(item: Any) -> list[str]:
    """The slots of an object that hold something, private ones under the names that they have outside."""
    return [name for name in slots_in(type(item)) if hasattr(item, name)]


def slots_in(kind: type) -> list[str]:
    """The slots of a class."""
    kinds = [base for base in kind.__mro__ if "__slots__" in base.__dict__]
    return [name for base in kinds for name in _slot_names(base)]


def _slot_names(kind: type) -> list[str]:
    slots, owner = kind.__dict__["__slots__"], kind.__name__.lstrip("_")
    names = [slots] if isinstance(slots, str) else [n for n in slots if n not in ("__dict__", "__weakref__")]
    is_private = [name.startswith("__") and not name.endswith("__") for name in names]
    return [f"_{owner}{name}" if hides else name for name, hides in zip(names, is_private, strict=True)]
