"""Run the tests that ship inside the wheel of MemCNN 1.5.2 against `invfunc.compat.memcnn`: ``make parity``.

The wheel goes, without its dependencies, into an environment of its own, which sees this one's torch and pytest.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / "build" / "parity"
WHEEL = "memcnn==1.5.2"
TESTS = ("revop", "couplings", "is_invertible_module", "multi", "split_dim", "models")


def prepare() -> Path:
    """The environment's Python, with the wheel installed."""
    python = HOME / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (HOME / "ready").exists():
        venv.create(HOME, clear=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, WHEEL], check=True)
        (HOME / "ready").touch()
    return python


def main() -> int:
    """Run the tests; pytest's exit status."""
    python = prepare()
    seen = [str(ROOT), str(Path(__file__).parent), *site.getsitepackages()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(seen)}
    options = ["-p", "substitute", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(HOME)]
    tests = [f"memcnn.models.tests.test_{name}" for name in TESTS]
    command = [str(python), "-m", "pytest", *options, "-q", "-rx", *sys.argv[1:], "--pyargs", *tests]
    return subprocess.run(command, env=environment, cwd=HOME).returncode


if __name__ == "__main__":
    sys.exit(main())
