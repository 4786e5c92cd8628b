"""What compiling costs and gains: ``python -m benchmarks.compiling``.

A pointwise-heavy network, plain and lowered, eager and compiled (inductor), and compiled stage by stage: the median of
the ratios to the compiled plain step of the same turn, and the seconds that the first step takes, which compiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import invfunc as inv

DEPTH, WIDTH, BATCH, REPEATS = 8, 64, 4096, 25


class Pointwise(nn.Module):
    """Few flops, much memory traffic: what a compiler fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.outer(torch.tanh(h) * torch.sigmoid(h) + torch.sin(h) * torch.exp(-h * h))


def network(depth: int) -> inv.Invertible:
    blocks = [inv.couple(Pointwise(), Pointwise()) for _ in range(depth)]
    return inv.chain(inv.split(2), *blocks, inv.concat(2))


def step(fn: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    fn(x).sum().backward()
    return time.perf_counter() - start


def engines(depth: int) -> dict[str, Callable[[Tensor], Tensor]]:
    op = network(depth)
    fast = inv.checkpoint(op)
    return {
        "plain, compiled": torch.compile(op, fullgraph=True),
        "plain": op,
        "lowered": fast,
        "lowered, compiled": torch.compile(fast, fullgraph=True),
        "lowered, compiled by stages": inv.compile_stages(fast),
    }


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(BATCH, 2 * WIDTH, requires_grad=True)
    found = engines(DEPTH)
    first = {name: step(fn, x) for name, fn in found.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(REPEATS):
        for name, fn in found.items():
            times[name].append(step(fn, x))
    units = times["plain, compiled"]
    threads = torch.get_num_threads()
    print(f"depth {DEPTH}, batch {BATCH}, width {WIDTH}, torch {torch.__version__}, {threads} threads\n")
    print("| engine | step over compiled plain | first step, s |\n|---|--:|--:|")
    for name, seconds in times.items():
        over = statistics.median(a / b for a, b in zip(seconds, units, strict=True))
        print(f"| {name} | {over:.2f} | {first[name]:.1f} |")
    for depth in 4, 32:
        torch._dynamo.reset()
        fast = inv.compile_stages(inv.checkpoint(network(depth)))
        print(f"\nFirst step of depth {depth}, compiled by stages: {step(fast, x):.1f} s")


if __name__ == "__main__":
    main()
