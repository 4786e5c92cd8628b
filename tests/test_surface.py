"""The public surface: what stands where, that nothing stands twice, and that nothing is left of what is private."""

import ast
from pathlib import Path
from types import ModuleType

import pytest

import invfunc as inv
from invfunc.compat import invtorch, memcnn

ROOT = Path(inv.__file__).parent

MAKE = {"pair", "one_way"}
COMBINE = {"chain", "parallel", "split", "concat", "permute_wires", "swap", "couple", "additive", "affine", "invert"}
LOWER = {"checkpoint", "keep", "mark", "mode", "pin", "compile_stages", "exact", "plan"}
FLOWS = {"with_log_det", "log_det", "flow"}
LOOK = {"check", "measure", "draw", "debug"}
ROOMS = {"compat", "errors", "look", "nn", "ops", "testing"}


def test_the_top_level_is_this() -> None:
    assert set(inv.__all__) == {"Invertible"} | MAKE | COMBINE | LOWER | FLOWS | LOOK | ROOMS
    assert {name for name in inv.__all__ if isinstance(getattr(inv, name), ModuleType)} == ROOMS


def test_no_object_has_two_names() -> None:
    """But for what one looks with, which is at the top and in its room."""
    rooms = {"inv": inv, "inv.ops": inv.ops, "inv.nn": inv.nn}
    names: dict[int, list[str]] = {}
    for room, module in rooms.items():
        for name in module.__all__:
            names.setdefault(id(getattr(module, name)), []).append(f"{room}.{name}")
    assert not [found for found in names.values() if len(found) > 1]


def test_what_looks_is_the_same_in_its_room() -> None:
    assert (inv.look.check, inv.look.measure, inv.look.draw) == (inv.check, inv.measure, inv.draw)
    assert set(inv.look.__all__) == {
        "Drawing", "Measurement", "Report", "calibrate", "check", "draw", "measure", "print_saved", "saved",
    }  # fmt: skip


@pytest.mark.parametrize("module", [inv.ops, inv.nn, inv.look, inv.compat, invtorch, invtorch.nn, memcnn])
def test_what_is_listed_is_there(module: ModuleType) -> None:
    assert module.__all__ == sorted(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)


def test_modules_know_nothing_of_those_they_succeed() -> None:
    for path in (ROOT / "nn").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "compat" not in ast.unparse(node), path


def test_the_base_of_our_modules() -> None:
    for name in inv.nn.__all__:
        value = getattr(inv.nn, name)
        if isinstance(value, type):
            assert issubclass(value, inv.nn.Module)


def test_invtorch_is_where_it_was() -> None:
    assert invtorch.Module is invtorch.nn.Module is inv.nn.InvertibleModule
    assert invtorch.nn.Linear is inv.nn.Linear and not hasattr(inv.nn, "invertible_checkpoint")
