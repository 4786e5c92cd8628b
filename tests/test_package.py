"""What is published says the same everywhere, needs torch alone, and holds what a reader of it is told to look for."""

import re
import subprocess
import sys
from importlib.metadata import metadata, requires, version
from pathlib import Path

import invfunc as inv

ROOT = Path(__file__).parent.parent


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_one() -> None:
    found = version("invfunc")
    assert f'version = "{found}"' in text("pyproject.toml")
    assert f"version: {found}\n" in text("CITATION.cff")
    assert re.search(r"^## \[([\d.]+)\]", text("CHANGELOG.md"), re.MULTILINE)[1] == found  # pyright: ignore


def test_at_run_time_there_is_torch_alone() -> None:
    assert [line for line in requires("invfunc") or [] if "extra ==" not in line] == ["torch>=2.13"]


def test_nothing_but_torch_is_imported() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import invfunc; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT / "tests"
    )
    found = set(done.stdout.split())
    of_torch = {"torch", "torchgen", "triton"}  # the last where torch is a build for CUDA
    assert not found - {"invfunc", *of_torch, *sys.stdlib_module_names}


def test_the_types_are_published() -> None:
    assert (Path(inv.__file__).parent / "py.typed").exists()
    assert "Typing :: Typed" in metadata("invfunc").get_all("Classifier", [])


def test_the_licence_is_named_and_there() -> None:
    assert metadata("invfunc")["License-Expression"] == "MIT"
    assert text("LICENSE").startswith("MIT License")
    assert "license: MIT\n" in text("CITATION.cff")


def test_the_sdist_holds_what_the_readme_speaks_of() -> None:
    listed = set(re.findall(r'"/([\w./]+)"', text("pyproject.toml").partition("[tool.hatch.build.targets.sdist]")[2]))
    for name in (
        "invfunc",
        "tests",
        "notebooks",
        "docs",
        "mkdocs.yml",
        "MIGRATING.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
    ):
        assert name in listed
        assert (ROOT / name).exists()


def test_contributing_names_every_room() -> None:
    map_of_the_house = text("CONTRIBUTING.md")
    for path in (ROOT / "invfunc").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}/`" in map_of_the_house


def test_what_is_installed_is_pinned() -> None:
    pins = {re.split("==", line)[0].lower().replace("_", "-") for line in text("constraints.txt").splitlines()}
    table = text("pyproject.toml").partition("[project.optional-dependencies]")[2].partition("[tool.")[0]
    for name in re.findall(r'"([\w-]+)(?:\[\w+\])?"', table):
        assert name.lower() in pins, name
