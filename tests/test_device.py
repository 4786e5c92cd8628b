"""The cases of `device/` on a simulated accelerator, in processes of their own, as CUDA and as any other one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SECONDS = 400.0  # what a run may take on a busy machine, the compiler's time included; a hang is a failure

needs_compiler = pytest.mark.skipif(
    not (shutil.which("ninja") and shutil.which(os.environ.get("CXX", "c++"))),
    reason="no C++ compiler and ninja to build the simulated accelerator with",
)


@needs_compiler
@pytest.mark.parametrize("disguise", ["sim", "cuda"])
def test_cases_pass(disguise: str) -> None:
    """Every case of every file ``cases_*.py``."""
    options = ["-n0", "-q", "-x", "--maxfail=20", "-p", "no:cacheprovider", "-o", "python_files=cases_*.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/device"],
        cwd=HERE.parent,
        env=os.environ | {"INVFUNC_DEVICE": disguise, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
