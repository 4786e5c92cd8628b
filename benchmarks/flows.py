"""A flow of handwritten digits, trained by us and by nflows: ``python -m benchmarks.flows [steps]``.

Both start from the same parameters and see the same batches with the same noise, so that they should learn the same
density: a Real NVP of couplings on the 64 pixels of scikit-learn's digits, whole numbers from 0 to 16. Ours runs twice,
lowered and as plain autograd. Bits per dimension are those of the bound, on images that no step has seen.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

import invfunc as inv

from .engines import attempt
from .measures import seconds
from .table import RESULTS, machine

PIXELS, LEVELS, COUPLINGS, HIDDEN, BATCH = 64, 17, 8, 128, 128
CPU = torch.device("cpu")
LogProb = Callable[[Tensor], Tensor]  # of numbers without bounds
Built = tuple[LogProb, Callable[[Tensor], Tensor], list[nn.Parameter]]  # with samples from latents, and what trains


def digits() -> tuple[Tensor, Tensor]:
    """Images to train on, and others."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float().flatten(1)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:-297], images[-297:]


def net() -> nn.Module:
    """From one half of the pixels to scale and shift of the other; it starts as nothing."""
    last = nn.Linear(HIDDEN, PIXELS)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(PIXELS // 2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), last)


def start() -> tuple[list[nn.Module], list[Tensor]]:
    """The nets and the permutations between them: the same at every call."""
    torch.manual_seed(0)
    return [net() for _ in range(COUPLINGS)], [torch.randperm(PIXELS) for _ in range(COUPLINGS)]


def preprocess() -> inv.Invertible:
    """From whole numbers to all numbers."""
    return inv.chain(inv.ops.dequantize(LEVELS), inv.affine(torch.tensor(0.96), torch.tensor(0.02)), inv.ops.logit())


# ---- two ways --------------------------------------------------------------------------------------------------------


def scale_and_shift(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """As nflows makes them of what a net returns."""
    shift, raw = net(x).chunk(2, 1)
    return torch.sigmoid(raw + 2) + 1e-3, shift


def coupling(net: nn.Module, order: Tensor) -> inv.Invertible:
    second = inv.couple(partial(scale_and_shift, net), law=inv.affine)
    return inv.chain(inv.ops.permute_channels(order), inv.split(2), inv.swap(), second, inv.swap(), inv.concat(2))


def ours(lower: Callable[[inv.Invertible], inv.Invertible]) -> Built:
    nets, orders = start()
    op = inv.chain(*map(coupling, nets, orders))
    flow = inv.flow(lower(op), Normal(torch.zeros(PIXELS), 1.0))
    return flow.log_prob, op.inverse, [p for net in nets for p in net.parameters()]


class OfNflows(nn.Module):
    """A net as nflows calls it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        return self.net(x)


def of_nflows() -> Built:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import AffineCouplingTransform, CompositeTransform, Permutation

    nets, orders = start()
    mask, layers = torch.cat([torch.zeros(PIXELS // 2), torch.ones(PIXELS // 2)]), []
    for net, order in zip(nets, orders, strict=True):
        layers += [Permutation(order), AffineCouplingTransform(mask, lambda a, b, net=net: OfNflows(net))]
    transform = CompositeTransform(layers)
    flow = Flow(transform, StandardNormal([PIXELS]))
    return flow.log_prob, lambda z: transform.inverse(z)[0], [p for net in nets for p in net.parameters()]


FLOWS: dict[str, Callable[[], Built]] = {
    "nflows": of_nflows,
    "invfunc, plain": partial(ours, lambda op: op),
    "invfunc, lowered": partial(ours, inv.checkpoint),
}


# ---- a run -----------------------------------------------------------------------------------------------------------


def bits(log_prob: LogProb, images: Tensor) -> Tensor:
    """Bits per dimension of each image: the bound of one draw."""
    x, log_det = inv.log_det(preprocess(), images)
    return -(log_prob(x) + log_det) / (PIXELS * math.log(2))


def train(log_prob: LogProb, parameters: list[nn.Parameter], images: Tensor, steps: int) -> float:
    """Train, and return the seconds of a step."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(parameters, 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        bits(log_prob, images[torch.randint(len(images), (BATCH,))]).mean().backward()
        optimizer.step()

    return seconds(lambda: [step() for _ in range(steps)], CPU) / steps


@torch.no_grad()
def held_out_bits(log_prob: LogProb, images: Tensor, draws: int = 10) -> float:
    torch.manual_seed(2)
    return torch.stack([bits(log_prob, images).mean() for _ in range(draws)]).mean().item()


@torch.no_grad()
def draw(inverse: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Images of whole numbers."""
    torch.manual_seed(3)
    return preprocess().inverse(inverse(torch.randn(count, PIXELS))).clamp(0, LEVELS - 1).view(count, 8, 8)


def row(build: Callable[[], Built], steps: int) -> tuple[list[float], Tensor]:
    images, others = digits()
    log_prob, inverse, parameters = build()
    before = held_out_bits(log_prob, others, 1)
    time = train(log_prob, parameters, images, steps)
    peak = inv.measure(lambda: bits(log_prob, images[:BATCH]).mean().backward()).peak_bytes / 2**20
    count = sum(p.numel() for p in parameters)
    return [count, before, held_out_bits(log_prob, others), peak, 1e3 * time], draw(inverse, 40)


def table(steps: int) -> Iterator[tuple[str, Tensor | None]]:
    for name, build in FLOWS.items():
        match attempt(lambda: row(build, steps)):
            case str(error):
                yield f"| {name} | {error} |", None
            case (count, before, after, peak, time), samples:
                yield f"| {name} | {count} | {before:.4f} | {after:.4f} | {peak:.2f} | {time:.1f} |", samples


def plot(samples: dict[str, Tensor]) -> None:
    import matplotlib.pyplot as plt

    sheets = {"real": digits()[1][:40].view(40, 8, 8), **samples}
    figure, axes = plt.subplots(1, len(sheets), figsize=(3 * len(sheets), 2.2), layout="constrained")
    for ax, (name, images) in zip(axes, sheets.items(), strict=True):
        framed = nn.functional.pad(images, (1, 1, 1, 1)).reshape(5, 8, 10, 10).permute(0, 2, 1, 3).reshape(50, 80)
        ax.imshow(framed, cmap="gray_r", vmin=0, vmax=LEVELS - 1)
        ax.set(title=name, xticks=[], yticks=[])
    figure.savefig(RESULTS / "flows.png", dpi=110)


def main(steps: str = "600") -> None:
    torch.set_num_threads(1)
    lines, samples = (
        ["| | parameters | bits before | bits after | peak, MiB | ms a step |", "|---|--:|--:|--:|--:|--:|"],
        {},
    )
    for (line, drawn), name in zip(table(int(steps)), FLOWS, strict=True):
        print(line, flush=True)
        lines.append(line)
        samples |= {} if drawn is None else {name: drawn}
    plot(samples)
    about = (
        f"{machine('cpu')}\n\nA Real NVP of {COUPLINGS} couplings on handwritten digits, {steps} steps of {BATCH} images from the "
        "same parameters, with the same batches and noise. Bits per dimension of images that no step has seen; a uniform "
        f"guess costs {math.log2(LEVELS):.2f}.\n\n![samples](flows.png)"
    )
    (RESULTS / "flows.md").write_text("\n".join([about, "", *lines, ""]))


if __name__ == "__main__":
    main(*sys.argv[1:])
