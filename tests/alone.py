"""``python tests/alone.py WHEEL FOLDER``: install a wheel where there is torch alone, and run the core tests there.

The environment in the folder holds the wheel. Torch, what torch requires, and the test runner are linked into it one by
one from this environment, so that nothing is fetched and nothing else can be imported by accident: no checkout, and none
of the packages that only tests, notebooks or the demo use.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

TESTS = Path(__file__).parent
AUTOGRAD = ["test_autograd_calls.py", "test_autograd_hooks.py", "test_autograd_tensors.py", "test_autograd_modes.py"]
CORE = ["test_combinators.py", "test_errors.py", "test_laws.py", "test_copies.py", *AUTOGRAD]
NEEDED = ["conftest.py", "catalogue.py", "kit.py", *CORE]
OUTSIDE = """
import importlib.util, sys
import invfunc
assert invfunc.__file__.startswith(sys.prefix), invfunc.__file__
for name in ("numpy", "sklearn", "matplotlib", "nbclient"):
    assert importlib.util.find_spec(name) is None, f"{name} is there"
print(invfunc.checkpoint(invfunc.ops.exp()))
"""


def closure(names: Iterable[str]) -> set[str]:
    """Packages with all that they require, extras left out, as far as they are installed."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:  # for another platform
            continue
        if name not in found:
            found.add(name)
            left += [re.split(r"[^\w.-]", line)[0] for line in requires if "extra ==" not in line]
    return found


def link(names: Iterable[str], folder: Path) -> None:
    """Link installed packages into a folder."""
    for name in names:
        installed = distribution(name)
        for top in {path.parts[0] for path in installed.files or () if path.parts[0] not in ("..", "__pycache__")}:
            target = folder / top
            if not target.exists():
                target.symlink_to(Path(str(installed.locate_file(top))))


def main(wheel: Path, folder: Path) -> None:
    """Install and test."""
    venv.create(folder, clear=True)
    python = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    link(closure(["torch", "pytest", "pytest-xdist", "hypothesis"]) - {"numpy"}, site)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    subprocess.run([python, "-c", OUTSIDE], check=True, cwd=folder)
    (folder / "tests").mkdir()
    for name in NEEDED:
        shutil.copy(TESTS / name, folder / "tests")
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(TESTS.parent / name, folder)
    quiet = ["-W", "ignore:Failed to initialize NumPy:UserWarning"]  # torch says so where there is none
    subprocess.run([python, "-m", "pytest", "-q", "-n", "auto", *quiet, *CORE], check=True, cwd=folder / "tests")


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:]))
