"""What compiling costs and gains: ``python -m benchmarks.compiling``.

A pointwise-heavy network, plain and lowered, eager and compiled (inductor), and compiled stage by stage, on one thread:
the median of the ratios to the compiled plain step of the same turn, what is held between forward and backward, and the
seconds that the first step takes, which compiles.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import invfunc as inv

from .engines import Call
from .exact import keep_freed_memory
from .measures import interleaved, ratio, seconds
from .table import RESULTS, machine

DEPTH, WIDTH, HIDDEN, BATCH, REPEATS = 8, 64, 128, 4096, 25


class Pointwise(nn.Module):
    """Few flops, much memory traffic: what a compiler fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.outer(torch.tanh(h) * torch.sigmoid(h) + torch.sin(h) * torch.exp(-h.square()))


class Model(nn.Module):
    """A pipeline between two linear layers, and its loss."""

    def __init__(self, pipeline: Call) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.first, self.last = nn.Linear(2 * WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pipeline(self.first(x))).square().mean()


def network(depth: int) -> inv.Invertible:
    blocks = [inv.couple(Pointwise(), Pointwise()) for _ in range(depth)]
    return inv.chain(inv.split(2), *blocks, inv.concat(2))


def step(call: Call, x: Tensor) -> None:
    call(x).backward()


def held(call: Call, x: Tensor) -> int:
    """Bytes that autograd saves for backward, but for those of parameters."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = call(x)
    y.backward()
    return sum(saved.values())


def engines(depth: int) -> dict[str, Call]:
    op = network(depth)
    plain, lowered = Model(op), Model(inv.checkpoint(op))
    return {
        "plain": plain,
        "plain, compiled": torch.compile(plain, fullgraph=True),
        "lowered": lowered,
        "lowered, compiled": torch.compile(lowered, fullgraph=True),
        "lowered, compiled by stages": Model(inv.compile_stages(inv.checkpoint(op))),
    }


def table(found: dict[str, Call], x: Tensor) -> str:
    """One row for each engine."""
    runs = {name: partial(step, call, x) for name, call in found.items()}
    first = {name: seconds(run, x.device) for name, run in runs.items()}
    kept = {name: held(call, x) / 2**20 for name, call in found.items()}
    taken = interleaved(runs, REPEATS, x.device)
    lines = ["| engine | step, ms | over compiled plain | held, MiB | first step, s |", "|---|--:|--:|--:|--:|"]
    for name, times in taken.items():
        least, over = 1e3 * min(times), ratio(times, taken["plain, compiled"])
        lines.append(f"| {name} | {least:.0f} | {over:.2f} | {kept[name]:.1f} | {first[name]:.1f} |")
    return "\n".join(lines)


def by_stages(depth: int, x: Tensor) -> str:
    torch._dynamo.reset()
    call = Model(inv.compile_stages(inv.checkpoint(network(depth))))
    return f"First step of depth {depth}, compiled by stages: {seconds(partial(step, call, x), x.device):.1f} s"


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    keep_freed_memory()
    x = torch.randn(BATCH, 2 * WIDTH)
    about = f"Depth {DEPTH}, batch {BATCH}, halves of {WIDTH}, hidden {HIDDEN}; {REPEATS} turns."
    parts = [machine("cpu"), about, table(engines(DEPTH), x), *[by_stages(depth, x) for depth in (4, 32)]]
    print(text := "\n\n".join(parts) + "\n")
    (RESULTS / "compiling.md").write_text(text)


if __name__ == "__main__":
    main()
