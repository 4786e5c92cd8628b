"""What exact inverses cost in time, over the same lowered step that drifts: ``python benchmarks/exact.py [case ...]``.

Processor time on one thread, the median of the ratios in each turn. Freed memory stays in the process, or what is
measured would be the kernel clearing pages. The grid of half-precision nets has a stream in float32, twice as wide as
the one that it is compared with.
"""

import ctypes
import statistics
import sys
import time

import torch
from torch import nn

import invfunc as inv

REPEATS, DEPTH = 5, 32


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def conv(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
    )


CASES = {
    "mlp 512": (mlp, 512, (1024, 1024), torch.float32),
    "mlp 512 bf16": (mlp, 512, (1024, 1024), torch.bfloat16),
    "conv 64": (conv, 64, (8, 128, 32, 32), torch.float32),
}
VARIANTS = {
    "grid float32": dict(carrier=torch.float32),
    "grid float64": dict(carrier=torch.float64),
    "codes": dict(mode="codes"),
    "codes packed": dict(mode="codes", pack=True),
}


def keep_freed_memory() -> None:
    """Tell glibc neither to map large blocks one by one nor to give free ones back."""
    trim_threshold, mmap_threshold = -1, -3
    for option in trim_threshold, mmap_threshold:
        ctypes.CDLL(None).mallopt(option, 2**30)


def pipeline(make, width: int, dtype: torch.dtype) -> inv.Invertible:
    blocks = [inv.couple(make(width).to(dtype), make(width).to(dtype)) for _ in range(DEPTH)]
    return inv.chain(inv.split(2), *blocks, inv.concat(2))


def seconds(call, x: torch.Tensor) -> float:
    begin = time.process_time()
    call(x).sum().backward()
    return time.process_time() - begin


def measured(name: str) -> None:
    make, width, shape, dtype = CASES[name]
    torch.manual_seed(0)
    base, x = pipeline(make, width, dtype), torch.randn(shape).to(dtype).requires_grad_()
    calls = {"plain": base, "drifting": inv.checkpoint(base, drift="off")}
    calls |= {label: inv.checkpoint(inv.exact(base, **options)) for label, options in VARIANTS.items()}
    runs = {label: [] for label in calls}
    for _ in range(REPEATS + 1):
        for label, call in calls.items():
            runs[label].append(seconds(call, x))
    print(f"\n{name}, {DEPTH} couplings: plain {1e3 * statistics.median(runs['plain'][1:]):.0f} ms", flush=True)
    for label in list(calls)[1:]:
        print(
            f"  {label:14} {ratio(runs, label, 'plain'):.2f} of plain, {ratio(runs, label, 'drifting'):.2f} of drifting"
        )


def ratio(runs: dict[str, list[float]], label: str, base: str) -> float:
    """The median of the ratios in each turn but the first."""
    return statistics.median(a / b for a, b in zip(runs[label][1:], runs[base][1:], strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()
    for case in sys.argv[1:] or CASES:
        measured(case)
