"""``python -m invfunc demo``: a reversible convolutional network learns real images, plainly and at flat memory.

The network is one `chain`. Each depth is trained twice from one seed on scikit-learn's handwritten digits (1,797 images
of 8x8 pixels, which come with that package): as it is, and lowered by `checkpoint`. A table compares the two, and a
figure shows what a training step takes against depth, for torch's own checkpoint too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import invfunc as inv
from invfunc.look.memory import measure

from .shell import Refusal

SEED = 0
WIDTH = 16  # channels of the stem
RATE = 5e-3
TEST_IMAGES = 450
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


@dataclass(frozen=True)
class Setting:
    """How a network is trained."""

    epochs: int = 6
    batch: int = 128
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @property
    def stream(self) -> torch.dtype:
        """The dtype of images, weights and streams: with bfloat16 only the coupling functions compute in it."""
        return torch.float32 if self.dtype is torch.bfloat16 else self.dtype

    def __str__(self) -> str:
        """The setting as tables and figures show it."""
        return f"digits of 8x8 pixels, batch {self.batch}, {self.dtype_name} on {self.device}"

    @property
    def dtype_name(self) -> str:
        """The dtype as the command line has it."""
        return next(name for name, dtype in DTYPES.items() if dtype is self.dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in bfloat16 where that is asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)


# ---- the network -------------------------------------------------------------------------------------------------


class Stem(nn.Conv2d):
    """A convolution that answers in the dtype of its input, under autocast too: it begins the stream."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        return super().forward(input).to(input.dtype)


def branch(channels: int, depth: int) -> nn.Module:
    """A coupling function; deep networks start with small ones, so that the stream keeps its size."""
    convolution = nn.Conv2d(channels, channels, 3, padding=1)
    nn.init.normal_(convolution.weight, std=(2 / (9 * channels * depth)) ** 0.5)
    return nn.Sequential(nn.GroupNorm(2, channels), nn.ReLU(), convolution)


def network(depth: int, setting: Setting) -> inv.Invertible:
    """A reversible network of so many couplings, half of them on 8x8 and half on 4x4 pixels."""
    torch.manual_seed(SEED)
    fine, coarse = WIDTH // 2, 2 * WIDTH
    squeeze = inv.ops.pixel_unshuffle(2)
    net = inv.chain(
        Stem(1, WIDTH, 3, padding=1),
        inv.split(2),
        *(inv.couple(branch(fine, depth), branch(fine, depth)) for _ in range(depth - depth // 2)),
        inv.parallel(squeeze, squeeze),
        *(inv.couple(branch(coarse, depth), branch(coarse, depth)) for _ in range(depth // 2)),
        inv.concat(2),
        nn.Sequential(nn.GroupNorm(2, 2 * coarse), nn.ReLU(), nn.Flatten(), nn.Linear(32 * coarse, 10)),
    )
    modules(net).to(setting.device, setting.stream)
    return net


def modules(net: inv.Invertible) -> nn.ModuleList:
    """The modules that a pipeline calls; `to` moves them, `parameters` are what is trained."""
    return nn.ModuleList(fn for fn in net.functions if isinstance(fn, nn.Module))


def per_block(net: inv.Invertible) -> inv.Invertible:
    """The same network with torch's own checkpoint around every coupling."""
    wrap = partial(partial, torch.utils.checkpoint.checkpoint, use_reentrant=False)
    return inv.chain(*(wrap(part) if part.name == "couple" else part for part in net.parts))


WAYS: dict[str, Callable[[inv.Invertible], inv.Invertible]] = {"plain": lambda net: net, "lowered": inv.checkpoint}


# ---- training ----------------------------------------------------------------------------------------------------


class Images(NamedTuple):
    """Pictures and the digits they show."""

    pixels: Tensor
    labels: Tensor


def data(setting: Setting) -> tuple[Images, Images]:
    """The digits for training and for the test; every digit has its share of both, and the split is always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=TEST_IMAGES, random_state=SEED, stratify=labels)
    train_x, test_x = (_pixels(part).to(setting.device, setting.stream) for part in split[:2])
    train_y, test_y = (torch.from_numpy(part).long().to(setting.device) for part in split[2:])
    return Images(train_x, train_y), Images(test_x, test_y)


def _pixels(rows: Any) -> Tensor:
    return torch.from_numpy(rows).reshape(-1, 1, 8, 8) / 8 - 1  # 0..16 becomes -1..1


def batches(images: Images, setting: Setting) -> list[Images]:
    """Every batch of every epoch, shuffled by the seed."""
    generator = torch.Generator().manual_seed(SEED)
    orders = [torch.randperm(len(images.labels), generator=generator) for _ in range(setting.epochs)]
    chosen = [indices.to(setting.device) for order in orders for indices in order.split(setting.batch)]
    return [Images(images.pixels[indices], images.labels[indices]) for indices in chosen]


def loss(net: inv.Invertible, images: Images, setting: Setting) -> Tensor:
    """The cross-entropy of one batch."""
    with setting.autocast():
        return F.cross_entropy(net(images.pixels), images.labels)


def train(net: inv.Invertible, images: Images, setting: Setting, title: str = "") -> list[float]:
    """Train, behind a progress bar, and return the loss of every step."""
    from tqdm import tqdm

    steps = batches(images, setting)
    optimizer = torch.optim.AdamW(modules(net).parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=len(steps))
    losses: list[float] = []
    for batch in (bar := tqdm(steps, title, unit="step")):
        optimizer.zero_grad()
        (now := loss(net, batch, setting)).backward()
        optimizer.step()
        schedule.step()
        losses.append(now.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


@torch.no_grad()
def accuracy(net: inv.Invertible, images: Images, setting: Setting) -> float:
    """The share of images that the network names rightly."""
    with setting.autocast():
        return (net(images.pixels).argmax(1) == images.labels).float().mean().item()


# ---- what a step takes -------------------------------------------------------------------------------------------


def memory(net: inv.Invertible, batch: Images, setting: Setting) -> tuple[int, int]:
    """Bytes at the peak of a training step, and between forward and backward; weights and gradients not counted."""
    step = partial(_step, net, batch, setting)
    step()  # From here on every weight has a gradient, as it has in training.
    return measure(step).peak_bytes, measure(loss, net, batch, setting).held_bytes


def seconds(nets: Iterable[inv.Invertible], batch: Images, setting: Setting, repeats: int = 7) -> list[float]:
    """The median time of a step of each network; they take turns, so that a busy machine slows all of them alike."""
    times = [[_clock(net, batch, setting) for net in nets] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _step(net: inv.Invertible, batch: Images, setting: Setting) -> None:
    loss(net, batch, setting).backward()


def _clock(net: inv.Invertible, batch: Images, setting: Setting) -> float:
    _synchronize(setting)
    start = time.perf_counter()
    _step(net, batch, setting)
    _synchronize(setting)
    return time.perf_counter() - start


def _synchronize(setting: Setting) -> None:
    if setting.device.type != "cpu":
        torch.accelerator.synchronize(setting.device)


# ---- the comparison ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One network of the table."""

    depth: int
    way: str
    accuracy: float
    peak: int
    held: int
    seconds: float


def compare(depth: int, setting: Setting) -> list[Row]:
    """Train one network in every way, each from the same seed, and measure a step of it."""
    images, test = data(setting)
    first = batches(images, setting)[0]
    nets = {way: transform(network(depth, setting)) for way, transform in WAYS.items()}
    for way, net in nets.items():
        train(net, images, setting, f"depth {depth}, {way}")
    times = seconds(nets.values(), first, setting)
    return [
        Row(depth, way, accuracy(net, test, setting), *memory(net, first, setting), time)
        for (way, net), time in zip(nets.items(), times, strict=True)
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as a table, with their ratios: Markdown that reads well in a terminal."""
    lines = [["depth", "network", "test accuracy", "peak MB", "held MB", "ms per step"]]
    for plain, lowered in zip(rows[::2], rows[1::2], strict=True):
        lines += [_cells(plain), _cells(lowered), _ratios(plain, lowered)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, [":" + "-" * (w - 1) if i == 1 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    padded = [
        [_pad(cell, width, i == 1) for i, (cell, width) in enumerate(zip(line, widths, strict=True))] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _cells(row: Row) -> list[str]:
    megabytes = [f"{count / 1e6:.2f}" for count in (row.peak, row.held)]
    return [str(row.depth), row.way, f"{row.accuracy:.3f}", *megabytes, f"{1e3 * row.seconds:.0f}"]


def _ratios(plain: Row, lowered: Row) -> list[str]:
    ratios = [lowered.peak / plain.peak, lowered.held / plain.held, lowered.seconds / plain.seconds]
    return ["", "lowered / plain", "", *(f"{ratio:.2f}" for ratio in ratios)]


def _pad(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


# ---- the figure --------------------------------------------------------------------------------------------------

SHADES = {"plain": "#8a8f98", "torch checkpoint per block": "#d98c3f", "invfunc": "#1f6feb"}
Curves = dict[str, list[tuple[int, float]]]  # the megabytes at each depth


def curves(deepest: int, setting: Setting) -> Curves:
    """Peak memory of a training step against depth."""
    from tqdm import tqdm

    batch = batches(data(setting)[0], setting)[0]
    depths = sorted({max(1, round(deepest * part / 8)) for part in range(1, 9)})
    found: Curves = {name: [] for name in SHADES}
    for depth in tqdm(depths, "memory against depth", unit="depth"):
        net = network(depth, setting)
        for name, way in zip(SHADES, (net, per_block(net), inv.checkpoint(net)), strict=True):
            found[name].append((depth, memory(way, batch, setting)[0] / 1e6))
    return found


def plot(found: Curves, subtitle: str, out: Path) -> None:
    """Draw the curves, each with its name and its last value beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, points in found.items():
        axes.plot(*zip(*points, strict=True), "o-", color=SHADES[name], linewidth=2.2, markersize=4.5, clip_on=False)
    _label_ends(axes, found)
    _dress(axes, subtitle)
    try:
        figure.savefig(out, format="png")
    except OSError as error:
        raise Refusal(f"--out {out}: {error.strerror}") from error


def _label_ends(axes: Any, found: Curves) -> None:
    """Write each curve's name at its end, upwards in order, and far enough apart to be read."""
    deepest, top = found["plain"][-1][0], max(points[-1][1] for points in found.values())
    height = -top
    for name, points in sorted(found.items(), key=lambda item: item[1][-1][1]):
        height = max(points[-1][1], height + 0.075 * top)
        text = f"{name}, {points[-1][1]:.3g} MB"
        axes.annotate(text, (deepest, height), (9, 0), textcoords="offset points", va="center", color=SHADES[name])


def _dress(axes: Any, subtitle: str) -> None:
    axes.set_title("Peak memory of a training step", loc="left", fontweight="bold", fontsize=12, pad=24)
    axes.text(0, 1.035, subtitle, transform=axes.transAxes, fontsize=8.5, color="#57606a")
    axes.set_xlabel("depth (couplings)")
    axes.set_ylabel("MB")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e6e8eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)


# ---- the command -------------------------------------------------------------------------------------------------


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(DTYPES)}")
    return DTYPES[text]


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text} is not a device; pass cpu, cuda or cuda:1, say") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``python -m invfunc demo`` takes."""
    parser.set_defaults(run=demo)
    parser.add_argument("--depth", type=_count, nargs="+", default=[8, 64], help="couplings; one depth or several")
    parser.add_argument("--epochs", type=_count, default=Setting.epochs)
    parser.add_argument("--batch", type=_count, default=Setting.batch)
    parser.add_argument("--device", type=_device, default=Setting.device)
    parser.add_argument("--dtype", type=_dtype, default=Setting.dtype, help=f"{', '.join(DTYPES)}")
    parser.add_argument("--distributed", choices=("ddp", "fsdp"), help="on several ranks, against one process")
    parser.add_argument("--ranks", type=_count, default=2, help="how many, unless torchrun has started them")
    parser.add_argument("--out", type=Path, default=Path("invfunc-demo.png"), help="where the figure goes, a PNG")


def _check_extras() -> None:
    for module, package in EXTRAS.items():
        try:
            import_module(module)
        except ImportError:
            raise Refusal(f"the demo needs {package}; pip install 'invfunc[demo]'") from None


def _check_device(setting: Setting) -> None:
    try:
        torch.ones(1, device=setting.device, dtype=setting.dtype).item()
    except Exception as error:  # Each backend has its own kinds.
        reason = str(error).partition("\n")[0]
        raise Refusal(f"--device {setting.device} can not hold {setting.dtype} here: {reason}") from None


def _check_out(out: Path) -> None:
    try:
        existed = out.exists()
        out.open("ab").close()
        if not existed:
            out.unlink()
    except OSError as error:
        raise Refusal(f"--out {out}: {error.strerror}") from None


def demo(options: argparse.Namespace) -> int | None:
    """Train, compare, draw."""
    start = time.perf_counter()
    setting = Setting(options.epochs, options.batch, options.device, options.dtype)
    _check_extras()
    if options.distributed:
        from .. import _distributed_demo as several  # which imports this file

        return several.run(several.Job(options.distributed, min(options.depth), setting), options.ranks)
    _check_device(setting)
    _check_out(options.out)
    torch.set_num_threads(1)  # Tensors this small gain nothing from a second one, and lose much on a busy machine.
    depths = sorted(set(options.depth))
    rows = [row for depth in depths for row in compare(depth, setting)]
    found = curves(depths[-1], setting)
    plot(found, f"{setting}; weights and their gradients not counted", options.out)
    print(f"\n{table(rows)}\n\n{setting}, {setting.epochs} epochs, torch {torch.__version__}")
    print(f"memory against depth: {options.out}; {time.perf_counter() - start:.0f} s in all")
