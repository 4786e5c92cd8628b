"""The picture of "Choosing an op": ``python docs/families.py``, what each family does to a grid, or to an image.

It needs what the demo extra installs. The picture is stored, so that the site is built without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor

import invfunc as inv
from invfunc import ops

PLACE = Path(__file__).parent / "how-to" / "families.png"


def wave(x: Tensor) -> Tensor:
    """A function that no coupling has to invert."""
    return torch.sin(1.5 * x)


def halves(op: inv.Invertible) -> inv.Invertible:
    """An op on two numbers as one on points."""
    return inv.chain(inv.split(2), op, inv.concat(2))


def bins(x: Tensor) -> Tensor:
    """The 3 * 4 - 1 parameters of a spline for each point."""
    return torch.cat([torch.sin(x + k) for k in range(11)], 1)


def below(x: Tensor) -> tuple[Tensor, Tensor]:
    """A scale and a shift of each number, by those before it."""
    first = x[:, :1]
    scale = torch.cat([torch.full_like(first, 0.8), torch.exp(wave(first) / 3)], 1)
    return scale, torch.cat([0 * first, 0.7 * wave(first)], 1)


def contraction(x: Tensor) -> Tensor:
    """With a Lipschitz constant below 1."""
    return 0.6 * torch.sin(x.flip(1) + x)


def swing(t: Tensor, x: Tensor) -> Tensor:
    """A pendulum."""
    return torch.stack([x[:, 1], -1.5 * torch.sin(x[:, 0])], 1)


def solved() -> inv.Invertible:
    """A point's way in time."""
    steps = ops.reversible_heun(swing, torch.linspace(0, 1.2, 25))
    return inv.chain(ops.enter_streams(), steps, ops.leave_streams())


MIX = torch.tensor([[0.9, 0.5], [-0.3, 0.8]])
PLANE: dict[str, inv.Invertible] = {
    "elementwise: asinh": ops.asinh(),
    "linear: a matrix": ops.linear(MIX),
    "couple, additive": halves(inv.couple(wave, wave)),
    "couple, affine": halves(inv.couple(ops.tanh_scale(lambda x: (wave(x), 0.5 * x)), law=inv.affine)),
    "couple, spline": halves(inv.couple(ops.per_element(bins, 11), law=ops.rational_quadratic_spline)),
    "autoregressive": ops.autoregressive(below),
    "residual_flow": ops.residual_flow(contraction),
    "reversible_heun": solved(),
}
IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "an image": lambda x: x,
    "pixel_unshuffle": lambda x: tiled(ops.pixel_unshuffle(2)(x)),
    "haar": lambda x: tiled(ops.haar()(x)),
    "dct": ops.dct((-2, -1)),
}


def tiled(x: Tensor) -> Tensor:
    """Four channels side by side."""
    return torch.cat([torch.cat(list(x[:, i : i + 2].unbind(1)), -1) for i in (0, 2)], -2)[:, None]


def lines(count: int = 17, points: int = 100) -> Tensor:
    """The lines of a grid, upright ones first."""
    at, along = torch.linspace(-2, 2, count), torch.linspace(-2, 2, points)
    upright = torch.stack(torch.meshgrid(at, along, indexing="ij"), -1)
    return torch.cat([upright, upright.flip(-1)])


@torch.no_grad()
def draw_plane(ax: Axes, title: str, op: inv.Invertible) -> None:
    """Where the lines of a grid go."""
    found = op(lines().flatten(0, 1)).view_as(lines())
    for i, line in enumerate(found):
        ax.plot(*line.T, lw=0.7, color="tab:blue" if i < len(found) // 2 else "tab:orange")
    ax.set(title=title, xticks=[], yticks=[], aspect="equal")


def draw_image(ax: Axes, title: str, fn: Callable[[Tensor], Tensor]) -> None:
    """What becomes of an image."""
    image: Any = torch.from_numpy(load_digits().images[4:5]).float()[:, None]
    ax.imshow(fn(image)[0, 0], cmap="gray_r")
    ax.set(title=title, xticks=[], yticks=[])


def main() -> None:
    """Draw them all."""
    drawn = [partial(draw_plane, title=name, op=op) for name, op in PLANE.items()]
    drawn += [partial(draw_image, title=name, fn=fn) for name, fn in IMAGES.items()]
    figure, axes = plt.subplots(3, 4, figsize=(9, 7), layout="constrained")
    for ax, draw in zip(axes.flat, drawn, strict=True):
        draw(ax)
    figure.savefig(PLACE, dpi=72)


if __name__ == "__main__":
    main()
