"""A small transformer, as it is written every day; the ways to train it; and what is told of each."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import invfunc as inv

HEADS = 4
BRANCHES = "ln_1 attn", "ln_2 mlp"  # what a block adds to its stream


class Attention(nn.Module):
    """Self-attention; causal for text."""

    def __init__(self, width: int, is_causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.is_causal = nn.Linear(width, 3 * width), nn.Linear(width, width), is_causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, width: int, is_causal: bool) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, is_causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """An embedding, blocks, and a head."""

    def __init__(self, embed: nn.Module, length: int, width: int, depth: int, outputs: int, is_causal: bool) -> None:
        super().__init__()
        self.embed, self.places = embed, nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, is_causal) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# ---- the ways --------------------------------------------------------------------------------------------------------


def plain(model: Transformer) -> None:
    """As it is."""


def torch_checkpoint(model: Transformer) -> None:
    """Torch's own checkpoint around each block."""
    for block in model.blocks:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def reversible(scheme: str) -> Callable[[Transformer], None]:
    """Its blocks made reversible by a scheme."""

    def convert(model: Transformer) -> None:
        inv.nn.reversible(model, "blocks.*", scheme=scheme, branches=BRANCHES)

    return convert


# ---- a run -----------------------------------------------------------------------------------------------------------

Batches = Callable[[int], tuple[Tensor, Tensor]]  # the inputs and targets of a step, the same for every way


@dataclass(frozen=True)
class Row:
    """What is told of a way."""

    way: str
    score: float
    peak: int
    seconds: float


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(x).flatten(0, -2), target.flatten())


def train(model: nn.Module, batches: Batches, steps: int, rate: float) -> float:
    """Train, and return the median time of a step."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    times = []
    for step in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, *batches(step)).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return median(times)


def tried(
    model: Transformer,
    ways: dict[str, Callable[[Transformer], None]],
    batches: Batches,
    steps: int,
    score: Callable[[nn.Module], float],
    rate: float = 1e-3,
) -> list[Row]:
    """A copy of the model, trained in each way on the same batches."""
    rows = []
    for name, convert in ways.items():
        torch.manual_seed(1)
        convert(trained := copy.deepcopy(model).train())
        seconds = train(trained, batches, steps, rate)
        peak = inv.measure(lambda: loss_of(trained, *batches(0)).backward()).peak_bytes
        rows.append(Row(name, score(trained.eval()), peak, seconds))
    return rows


def table(rows: Sequence[Row], score: str) -> str:
    """The rows as Markdown; times as ratios to the first."""
    lines = [f"| way | {score} | peak MB | time |", "|---|--:|--:|--:|"]
    for row in rows:
        cells = row.way, f"{row.score:.3f}", f"{row.peak / 1e6:.2f}", f"{row.seconds / rows[0].seconds:.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
