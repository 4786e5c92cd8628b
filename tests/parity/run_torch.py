"""Run torch's own tests of its checkpoint on `invfunc.checkpoint`: ``make parity-torch TORCH_TESTS=pytorch/test``.

The tests are read from a copy of torch's repository, whose version should be the installed one; it is only read. What
torch's test cases import beside torch goes into a folder of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "build" / "parity-torch"
NEEDED = "expecttest==0.3.0"
FILES = ("test_utils.py", "test_autograd.py")


def prepare() -> Path:
    """The folder with what the tests import."""
    if not (LIBRARY / "expecttest").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(LIBRARY)]
        subprocess.run([*pip, NEEDED], check=True)
    return LIBRARY


def main(folder: str = "", *options: str) -> int:
    """Run the tests in this folder; pytest's exit status."""
    tests = [Path(folder).resolve() / name for name in FILES]
    missing = [str(test) for test in tests if not test.exists()]
    if not folder or missing:
        print(f"TORCH_TESTS={folder!r}: expected the folder test of a copy of torch's repository, with {FILES}")
        return 2
    seen = [str(prepare()), str(ROOT), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(seen), "PYTORCH_TEST_WITH_SLOW": "1"}
    plain = ["-p", "no:cacheprovider", "-c", os.devnull, "--noconftest", "--rootdir", folder]
    command = [sys.executable, "-m", "pytest", "-p", "substitute_torch", *plain, "-q", "-rxs", *options]
    return subprocess.run([*command, *map(str, tests)], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
