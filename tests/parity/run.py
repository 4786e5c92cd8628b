"""Run MemCNN's own tests, and a package that is built on it, against `invfunc.compat.memcnn`: ``make parity``.

The tests ship inside the wheel of MemCNN 1.5.2. The wheels go, without their dependencies, into an environment of their
own, which sees this one's torch and pytest.
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
WHEELS = "memcnn==1.5.2", "iunets==0.1"
NETWORKS = Path(__file__).parent / "networks.py"
TESTS = ("revop", "couplings", "is_invertible_module", "multi", "split_dim", "models")


def prepare() -> Path:
    """The environment's Python, with the wheels installed."""
    python = HOME / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = HOME / "ready"
    if not ready.exists() or ready.read_text() != str(WHEELS):
        venv.create(HOME, clear=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *WHEELS], check=True)
        ready.write_text(str(WHEELS))
    return python


def main() -> int:
    """Run the tests; the worse of pytest's exit statuses."""
    python = prepare()
    seen = [str(ROOT), str(Path(__file__).parent), *site.getsitepackages()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(seen)}
    options = ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(HOME), "-q", "-rx", *sys.argv[1:]]
    shipped = ["-p", "substitute", "--pyargs", *[f"memcnn.models.tests.test_{name}" for name in TESTS]]
    statuses = [
        subprocess.run([str(python), "-m", "pytest", *options, *tests], env=environment, cwd=HOME).returncode
        for tests in (shipped, [str(NETWORKS)])
    ]
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
