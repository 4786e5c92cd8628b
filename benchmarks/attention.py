"""Attention that is kept, at many tokens: ``python -m benchmarks.attention [--tokens 2048 8192 16384] [--depth 16]``.

Transformer couplings of a small width: plain, lowered, lowered with attention's results kept, and torch's checkpoint of
each block without and with the same policy. They take turns, each right behind a plain step; one thread on the CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from .engines import ATTENTION_KEPT, ATTENTION_KEPT_BY_TORCH, BLOCKWISE, INVFUNC, PLAIN
from .exact import keep_freed_memory
from .networks import LARGE
from .table import RESULTS, Row, begun, cell, machine, times

ENGINES = (PLAIN, INVFUNC, ATTENTION_KEPT, BLOCKWISE, ATTENTION_KEPT_BY_TORCH)
COLUMNS = {"tokens": "d", "engine": "s", "peak": ".1f", "held": ".1f", "flops": ".2f", "time": ".2f"}
LEGEND = """\
Of one training step of {depth} couplings of width {width}: peak memory and what is held after forward in units of the
input, without parameters and their gradients; flops and time over plain training."""


def rows(tokens: int, depth: int, width: int, turns: int, device: str) -> Iterator[Row]:
    """One row for each engine."""
    net = replace(LARGE["transformer"], shape=(1, tokens, width)).at(depth, device=device)
    found, calls = begun(ENGINES, net)
    times(found, calls, net, turns)
    yield from ({"tokens": tokens, **row} for row in found.values())


def line(row: Row) -> str:
    if "error" in row:
        return f"| {row['tokens']} | {row['engine']} | {row['error']} |" + " |" * (len(COLUMNS) - 3)
    return f"| {' | '.join(cell(row[column], form) for column, form in COLUMNS.items())} |"


def table(sizes: Sequence[int], depth: int, width: int, turns: int, device: str) -> Iterator[str]:
    """The table in Markdown, told as it comes."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "|".join("---" if column == "engine" else "--:" for column in COLUMNS) + "|"
    for tokens in sizes:
        yield from map(line, rows(tokens, depth, width, turns, device))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"keep the table in {RESULTS.name}")
    asked = parser.parse_args()
    accelerator = torch.accelerator.current_accelerator()
    device = "cpu" if accelerator is None else accelerator.type
    torch.set_num_threads(1)
    keep_freed_memory()
    lines = []
    for text in table(asked.tokens, asked.depth, asked.width, asked.turns, device):
        print(text, flush=True)
        lines.append(text)
    if asked.write:
        legend = LEGEND.format(depth=asked.depth, width=asked.width)
        (RESULTS / "attention.md").write_text("\n\n".join([machine(device), legend, "\n".join(lines)]) + "\n")


if __name__ == "__main__":
    main()
