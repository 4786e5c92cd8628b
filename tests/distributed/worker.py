"""One rank: ``python -m distributed.worker RANK WORLD STORE OUT [NAME]`` runs the cases that begin with a name, or all,
and writes a line for each."""

from __future__ import annotations

import datetime
import gc
import json
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from . import ddp, fsdp, memory, mesh  # noqa: F401  (they register their cases)
from .harness import CASES, Ranks

PATIENCE = datetime.timedelta(seconds=45)  # then a collective that others do not join is an error


def main(rank: int, world: int, store: str, out: Path, beginning: str = "") -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=PATIENCE)
    with out.open("w") as lines:
        for name, run in CASES[world].items():
            if not name.startswith(beginning):
                continue
            outcome = {"case": name, "error": None, "seen": None}
            torch.manual_seed(0)
            try:
                outcome["seen"] = run(Ranks(rank, world))
            except Exception:
                outcome["error"] = traceback.format_exc()
            print(json.dumps(outcome), file=lines, flush=True)
            gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), *sys.argv[5:])
