"""Every op once: how it is built and on what. The laws are tested on each; a new op is one line.

A constructor takes no argument and returns a fresh op in float64 whose parameters require grad. An `Example` holds at
least three inputs; points near the edge of a domain come last.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import invfunc as inv


@dataclass(frozen=True)
class Example:
    """An op and where to try it.

    Args:
        make: Builds the op, in float64.
        inputs: Draws its inputs, at least three.
        without: Laws that do not apply to the op or do not hold of it, each with its reason.
    """

    make: Callable[[], inv.Invertible]
    inputs: Callable[[], Sequence[Any]]
    without: Mapping[str, str] = field(default_factory=dict)


# ---- inputs: each returns a function that draws them ---------------------------------------------------------------


def tensors(*shapes: tuple[int, ...], edge: Sequence[Tensor] = ()) -> Callable[[], list[Any]]:
    """Normal random tensors of these shapes, then the points of ``edge``."""
    return lambda: [*(torch.randn(s, dtype=torch.float64) for s in shapes), *edge]


def between(low: float, high: float, *shapes: tuple[int, ...], edge: Sequence[Tensor] = ()) -> Callable[[], list[Any]]:
    """Uniform random tensors."""
    return lambda: [*(low + (high - low) * torch.rand(s, dtype=torch.float64) for s in shapes), *edge]


def reals(*edge: float) -> Callable[[], list[Any]]:
    """Normal random numbers, then those of ``edge``."""
    return tensors((3,), (2, 3), (2, 2, 2), edge=[torch.tensor(edge, dtype=torch.float64)])


def interval(low: float, high: float, *edge: float) -> Callable[[], list[Any]]:
    """Numbers from an interval, then those of ``edge``."""
    return between(low, high, (3,), (2, 3), (2, 2, 2), edge=[torch.tensor(edge, dtype=torch.float64)])


def on_threes(*edge: float, scale: float = 1.0) -> Callable[[], list[Any]]:
    """Random numbers whose last dimension is 3, then the three numbers of ``edge``."""
    last = [torch.tensor([edge], dtype=torch.float64)]
    return lambda: [*(scale * x for x in tensors((1, 3), (2, 3), (2, 2, 3))()), *last]


def wide(*shapes: tuple[int, ...]) -> Callable[[], list[Any]]:
    """For ops on all of the real numbers: normal random tensors, of which the last are a thousand times as large."""
    return lambda: [x if i + 1 < len(shapes) else 1e3 * x for i, x in enumerate(tensors(*shapes)())]


def pairs(*shapes: tuple[int, ...], count: int = 2) -> Callable[[], list[Any]]:
    """Tuples of ``count`` normal random tensors of the same shape."""
    return lambda: [tuple(torch.randn(s, dtype=torch.float64) for _ in range(count)) for s in shapes]


def wide_pairs(*shapes: tuple[int, ...], count: int = 2) -> Callable[[], list[Any]]:
    """Tuples as `wide` draws tensors."""
    return lambda: list(zip(*(wide(*shapes)() for _ in range(count)), strict=True))


# ---- functions that ops close over ---------------------------------------------------------------------------------


def weight(*shape: int, scale: float = 0.5) -> Tensor:
    """A parameter."""
    return (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()


def mlp(size: int, out: int | None = None) -> nn.Module:
    """A small network on the last dimension."""
    return nn.Sequential(nn.Linear(size, 5), nn.Tanh(), nn.Linear(5, out or size)).double()


def conv(channels: int, out: int | None = None) -> nn.Module:
    """A small network on images."""
    return nn.Sequential(nn.Conv2d(channels, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, out or channels, 1)).double()


def dropped(size: int) -> nn.Module:
    """A network that draws random numbers."""
    return nn.Sequential(nn.Linear(size, 5), nn.Dropout(0.5), nn.Linear(5, size)).double()


def normed(size: int) -> nn.Module:
    """A network with buffers that each step moves."""
    return nn.Sequential(nn.Linear(size, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, size)).double()


def closure(w: Tensor) -> Callable[[Tensor], Tensor]:
    """A plain function that closes over a tensor."""
    return lambda x: torch.tanh(x * w)


def scale_by(w: Tensor) -> inv.Invertible:
    """A pair of closures, with the pullback that autograd would find, and a log-determinant."""

    def pullback(y: Tensor, gy: Tensor) -> Any:
        x = y / w
        return x, gy * w, [(w, (gy * x).sum_to_size(w.shape))]

    def log_det(x: Tensor, y: Tensor) -> Tensor:
        return w.abs().log().expand(x.shape).reshape(len(x), -1).sum(1)

    return inv.pair(lambda x: x * w, lambda y: y / w, pullback=pullback, log_det=log_det, name="scale_by")


def scaled(w: Tensor) -> inv.Invertible:
    """A pair of closures."""
    return inv.pair(lambda x: torch.sinh(x * w), lambda y: torch.asinh(y) / w)


def centre() -> inv.Invertible:
    """A pair with a residue: the mean."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(-1, keepdim=True)
        return x - mean, mean

    return inv.pair(forward, lambda mean, y: y + mean, residue=True, name="centre")


def rotate(w: Tensor) -> inv.Invertible:
    """A pair of two components that depend on each other."""

    def forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return w.cos() * a - w.sin() * b, w.sin() * a + w.cos() * b

    def inverse(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return w.cos() * a + w.sin() * b, w.cos() * b - w.sin() * a

    return inv.pair(forward, inverse, name="rotate")


def block(size: int) -> inv.Invertible:
    """A coupling of two small networks."""
    return inv.couple(mlp(size), mlp(size))


def pipeline() -> inv.Invertible:
    """A whole pipeline on one tensor."""
    return inv.chain(scale_by(weight(4)), inv.split(2, dim=-1), block(2), inv.swap(), block(2), inv.concat(2, dim=-1))


def affine(f: Callable[..., Any]) -> inv.Invertible:
    """An affine coupling of one half."""
    return inv.couple(f, law=inv.affine)


def shift_both(t: Tensor) -> inv.Invertible:
    """A law for nested components."""
    return inv.parallel(inv.additive(t), inv.additive(2 * t))


def contraction(size: int) -> nn.Module:
    """A network with a Lipschitz constant of at most 0.8 * 0.8."""
    net = mlp(size)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight *= 0.8 / torch.linalg.matrix_norm(layer.weight, 2)
    return net


class Before(nn.Module):
    """A network whose output at place i of the last dimension depends on the places before i."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size, size).double() for _ in range(2)])

    def forward(self, x: Tensor) -> Any:
        """Two outputs, such as a scale and a shift."""
        return tuple(torch.tanh(nn.functional.linear(x, n.weight.tril(-1), n.bias)) for n in self.layers)


class Product(nn.Module):
    """A network on two inputs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = mlp(size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Of the size of x."""
        return self.net(x) * c


def given_pairs(*shapes: tuple[int, ...]) -> Callable[[], list[Any]]:
    """Pairs with a condition."""
    return lambda: [((a, b), c) for a, b, c in pairs(*shapes, count=3)()]


def beside(size: int) -> inv.Invertible:
    """An op on the first of two components."""
    return inv.parallel(scale_by(weight(size)), inv.chain())


class Timed(nn.Module):
    """A field that depends on the time."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Of the size of x."""
        return self.net(x) * (1 + t)


def increment(start: float, end: float) -> Tensor:
    """Of a path that is no Brownian one, but the same at every call."""
    return torch.tensor(math.sin(9 * end) - math.sin(9 * start), dtype=torch.float64)


def levels(*shapes: tuple[int, ...]) -> Callable[[], list[Any]]:
    """Whole numbers from 0 to 16."""
    return lambda: [torch.randint(17, shape).double() for shape in shapes]


def variational(size: int) -> Any:
    """Noise between 0 and 1 as a flow that reads a context."""
    net = mlp(2 * size - size // 2, size)
    couple = inv.couple(inv.ops.tanh_scale(lambda x, c: net(torch.cat([x, c], -1)), dim=-1), law=inv.affine)
    op = inv.chain(inv.ops.logit(), inv.split(2, -1), couple, inv.swap(), inv.concat(2, -1))
    base = torch.distributions.Normal(torch.zeros(size, dtype=torch.float64), 1.0, validate_args=False)
    return inv.flow(inv.ops.given(op), base)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = mlp(size)

    def forward(self, x: Tensor) -> Tensor:
        """``x + f(x)``."""
        return x + self.net(x)


def choice(w: Tensor) -> Callable[[Tensor], Any]:
    """A coupling function that returns nested values, one of them without a gradient."""
    return lambda x: (((x * w).tanh() + 2, x * w), x > 0)


def chosen(affine: tuple[Tensor, Tensor], mask: Tensor) -> inv.Invertible:
    """A law for them."""
    s, t = affine
    return inv.pair(lambda x: torch.where(mask, x * s + t, x), lambda y: torch.where(mask, (y - t) / s, y))


def doubled(t: Tensor) -> inv.Invertible:
    """A law whose pullback leaves the gradient of t to autograd."""
    return inv.pair(lambda x: 2 * x + t, lambda y: (y - t) / 2, pullback=lambda y, gy: ((y - t) / 2, 2 * gy))


def nested_pairs() -> list[Any]:
    """Pairs whose components are pairs."""
    return [(a, b) for a, b in zip(pairs(*ON_PAIRS)(), pairs(*ON_PAIRS)(), strict=True)]


def nested() -> list[Any]:
    """Wires of components within components, with leaves that ride along."""
    x = torch.randn(2, 4, dtype=torch.float64)
    y, mask = x + 1, torch.tensor([1, 0])
    return [((x, y), y), ((x, y), (y, None)), ((x, (y, mask)), "text"), ((x, 2.5), mask.bool())]


def complex_tensors(*shapes: tuple[int, ...]) -> Callable[[], list[Any]]:
    """Normal random complex tensors."""
    return lambda: [torch.randn(s, dtype=torch.complex128) for s in shapes]


def regular(*shape: int) -> Tensor:
    """A weight of full rank: an identity, or several in a batch, and some noise."""
    return (torch.eye(*shape[-2:]).double() + 0.2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()


def rotation(size: int) -> Tensor:
    """An orthogonal matrix as a function of a parameter."""
    a = weight(size, size)
    return torch.linalg.matrix_exp(a - a.mT)


def kernel(out: int, *shape: int) -> Tensor:
    """The weight of a convolution, of full rank as a matrix."""
    return regular(out, math.prod(shape)).detach().reshape(out, *shape).requires_grad_()


def overlapping() -> inv.Invertible:
    """A convolution whose patches overlap, and that pads."""
    return inv.ops.conv2d(kernel(6, 1, 2, 3), weight(6), stride=(2, 1), padding=(0, 1), patchwise=False)


def batch_norm(training: bool) -> inv.Invertible:
    """With weights, and running statistics that are not those of a new module."""
    mean, variance = torch.randn(4).double(), torch.rand(4).double() + 0.5
    return inv.ops.batch_norm(weight(4, scale=0.1) + 1, weight(4), mean, variance, training=training)


ON_PAIRS = (3, 4), (2, 5, 4), (1, 4)
ON_LAST = (3, 4), (2, 5, 4), (1, 2, 3, 4)
ON_IMAGES = (2, 4, 2, 4), (1, 4, 2, 2), (3, 4, 4, 2)
ON_ROWS = (2, 4), (1, 2, 3), (2, 6, 2, 2)
TRANSFORMS = "checkpoint_functional", "checkpoint_vmap"
RANDOM = dict.fromkeys(TRANSFORMS, "a transform draws its own random numbers")
BUFFERS = dict.fromkeys(TRANSFORMS, "torch.func can not write running statistics")
STATISTICS = {
    "log_det_is_jacobian": "it is that with the statistics held fixed",
    "checkpoint_vmap": "torch.vmap can not write running statistics",
}

NOISY = {
    "retraction": "it rounds",
    "pullback_is_vjp": "what it makes depends on a draw",
    **RANDOM,
}


def _log_det_pair() -> inv.Invertible:
    scale = weight(3)
    return inv.ops.log_det_pair(
        lambda x: (x * scale.exp(), scale.sum().expand(len(x))),
        lambda y: (y / scale.exp(), -scale.sum().expand(len(y))),
    )


EXAMPLES: dict[str, Example] = {
    # ---- core ----
    "identity": Example(inv.chain, tensors((3,), (2, 3), (2, 2, 2))),
    "identity, nested": Example(inv.chain, nested),
    "pair": Example(lambda: inv.pair(torch.exp, torch.log), tensors((3,), (2, 3), (2, 2, 2))),
    "pair, complex": Example(lambda: inv.pair(torch.exp, torch.log), complex_tensors((3,), (2, 3), (2, 2, 2))),
    "pair, closures": Example(lambda: scaled(weight(3) + 2), tensors((3,), (2, 3), (1, 2, 3))),
    "pair, pullback": Example(lambda: scale_by(weight(3)), tensors((3,), (2, 3), (1, 2, 3))),
    "pair, residue": Example(centre, tensors((3,), (2, 3), (1, 2, 3))),
    "pair, two components": Example(lambda: rotate(weight()), pairs((3,), (2, 3), (1, 2, 3))),
    "invert": Example(lambda: ~scale_by(weight(3)), tensors((3,), (2, 3), (1, 2, 3))),
    "one_way": Example(lambda: inv.one_way(mlp(3)), tensors((2, 3), (1, 3), (2, 2, 3))),
    "chain": Example(pipeline, tensors((3, 4), (2, 5, 4), (1, 4))),
    "parallel": Example(lambda: inv.parallel(scale_by(weight(4)), inv.ops.sinh()), pairs(*ON_PAIRS)),
    "parallel, residue": Example(lambda: inv.parallel(inv.chain(), centre()), pairs(*ON_PAIRS)),
    "parallel, nested": Example(lambda: inv.parallel(inv.swap(), inv.chain()), nested),
    "swap": Example(inv.swap, nested),
    "permute_wires": Example(lambda: inv.permute_wires([2, 0, 1]), pairs(*ON_PAIRS, count=3)),
    "split": Example(lambda: inv.split(2), tensors(*ON_ROWS)),
    "split, interleaved": Example(lambda: inv.split(2, interleaved=True), tensors(*ON_ROWS)),
    "split, sizes": Example(lambda: inv.split([1, 0, 2], dim=-1), tensors((3,), (2, 3), (1, 2, 3))),
    "concat": Example(lambda: inv.concat(2), pairs(*ON_ROWS)),
    "concat, interleaved": Example(
        lambda: inv.concat(3, dim=0, interleaved=True), pairs((2,), (2, 3), (1, 2), count=3)
    ),
    "checkpoint": Example(lambda: inv.checkpoint(block(4)), pairs(*ON_PAIRS)),
    "checkpoint, one_way": Example(lambda: inv.chain(mlp(4), inv.checkpoint(closure(weight(4)))), tensors(*ON_PAIRS)),
    # ---- elementwise ----
    "affine": Example(lambda: inv.affine(weight(3) + 2, weight(3)), on_threes(-1e6, 0.0, 1e6)),
    "log_det_pair": Example(_log_det_pair, tensors((2, 3), (1, 3), (5, 3))),
    "from_transform": Example(
        lambda: inv.ops.from_transform(torch.distributions.transforms.AffineTransform(1.0, 2.0)), on_threes(0.0)
    ),
    "additive": Example(lambda: inv.additive(weight(3)), on_threes(-1e6, 0.0, 1e6)),
    "exp": Example(inv.ops.exp, reals(-30.0, 0.0, 20.0)),
    "log": Example(inv.ops.log, interval(0.01, 3, 1e-12, 1.0, 1e6)),
    "sigmoid": Example(inv.ops.sigmoid, reals(-30.0, 0.0, 12.0)),
    "logit": Example(inv.ops.logit, interval(0.01, 0.99, 1e-9, 0.5, 1 - 1e-5)),
    "tanh": Example(inv.ops.tanh, reals(-6.0, 0.0, 6.0)),
    "atanh": Example(inv.ops.atanh, interval(-0.99, 0.99, 1e-5 - 1, 0.0, 1 - 1e-5)),
    "leaky_tanh": Example(inv.ops.leaky_tanh, reals(-3.01, -2.99, 0.0, 2.99, 3.01, 1e3)),
    "softplus": Example(inv.ops.softplus, reals(-30.0, 0.0, 30.0, 1e3)),
    "softplus, inverse": Example(lambda: ~inv.ops.softplus(), interval(0.01, 3, 1e-9, 50.0)),
    "sinh": Example(inv.ops.sinh, reals(-12.0, 0.0, 12.0)),
    "asinh": Example(inv.ops.asinh, reals(-1e6, 0.0, 1e6)),
    "power": Example(lambda: inv.ops.power(1.7), interval(0.1, 3, 1e-3, 1e3)),
    "power, negative": Example(lambda: inv.ops.power(-0.5), interval(0.1, 3, 1e-2, 1e3)),
    "power, tensor": Example(lambda: inv.ops.power(weight(3) + 2), lambda: [x.exp() for x in on_threes(-3, 0, 3)()]),
    "cbrt": Example(inv.ops.cbrt, reals(-1e6, -1e-9, 1e-9, 1e6)),
    "cbrt, inverse": Example(lambda: ~inv.ops.cbrt(), reals(-1e3, 1e-3, 1e3)),
    "leaky_relu": Example(lambda: inv.ops.leaky_relu(0.1), reals(-1e6, -1e-12, 0.0, 1e-12, 1e6)),
    "relu": Example(inv.ops.relu, reals(-1e6, -1e-12, 1e-12, 1e6)),
    "abs": Example(inv.ops.abs, reals(-1e6, -1e-12, 1e-12, 1e6)),
    "rational_quadratic_spline": Example(
        lambda: inv.ops.rational_quadratic_spline(weight(3, 5), weight(3, 5), weight(3, 4)),
        on_threes(-3.001, 2.999, 1e3, scale=2),
    ),
    "rational_quadratic_spline, no tails": Example(
        lambda: inv.ops.rational_quadratic_spline(weight(3, 16), interval=(-9, 8), tails=None),
        on_threes(-8.999, 0.0, 7.999, scale=2),
    ),
    "rational_quadratic_spline, inverse": Example(
        lambda: ~inv.ops.rational_quadratic_spline(weight(3, 5), weight(3, 5), weight(3, 6)),
        on_threes(-3.001, 2.999, 1e3, scale=2),
    ),
    "linear_spline": Example(lambda: inv.ops.linear_spline(weight(3, 5)), on_threes(-3.001, 2.999, 1e3, scale=2)),
    "linear_spline, widths": Example(
        lambda: inv.ops.linear_spline(weight(3, 5), weight(3, 5)), on_threes(-3.001, 2.999, 1e3, scale=2)
    ),
    "mixture_logit": Example(
        lambda: inv.ops.mixture_logit(weight(3, 4), weight(3, 4), weight(3, 4)), on_threes(-1e3, 1.0, 30.0)
    ),
    "mixture_logit, inverse": Example(lambda: ~inv.ops.mixture_logit(weight(3, 12)), on_threes(-1e3, 1.0, 30.0)),
    "mixture_cdf": Example(lambda: inv.ops.mixture_cdf(weight(3, 12)), on_threes(-9.0, 1.0, 6.0)),
    # ---- linear ----
    "linear": Example(lambda: inv.ops.linear(regular(4, 4), weight(4)), wide(*ON_LAST)),
    "linear, complex": Example(lambda: inv.ops.linear(regular(4, 4) + 1j * weight(4, 4)), complex_tensors(*ON_LAST)),
    "tall_linear": Example(lambda: inv.ops.tall_linear(regular(6, 4), weight(6)), wide(*ON_LAST)),
    "orthogonal": Example(lambda: inv.ops.orthogonal(rotation(4), weight(4)), wide(*ON_LAST)),
    "householder": Example(lambda: inv.ops.householder(weight(3, 4)), wide(*ON_LAST)),
    "triangular": Example(lambda: inv.ops.triangular(regular(4, 4), weight(4)), wide(*ON_LAST)),
    "triangular, upper": Example(lambda: inv.ops.triangular(regular(4, 4), upper=True), wide(*ON_LAST)),
    "triangular, unit": Example(lambda: inv.ops.triangular(weight(4, 4), unit=True), wide(*ON_LAST)),
    "lu": Example(lambda: inv.ops.lu(weight(4, 4), regular(4, 4), [2, 0, 3, 1], weight(4)), wide(*ON_LAST)),
    "lu, packed": Example(lambda: inv.ops.lu(regular(4, 4)), wide(*ON_LAST)),
    "diagonal": Example(lambda: inv.ops.diagonal(weight(4) + 2, weight(4)), wide(*ON_LAST)),
    "along": Example(lambda: inv.ops.along(inv.ops.lu(regular(4, 4)), dim=1), wide(*ON_IMAGES)),
    "conv1x1": Example(lambda: inv.ops.conv1x1(regular(4, 4), weight(4)), wide((3, 4), (2, 4, 5), (2, 4, 3, 2))),
    "conv1x1, kernel": Example(lambda: inv.ops.conv1x1(kernel(4, 4, 1, 1)), wide(*ON_IMAGES)),
    "mix_channels": Example(lambda: inv.ops.mix_channels(rotation(4), weight(4)), wide(*ON_IMAGES)),
    "conv1d": Example(lambda: inv.ops.conv1d(kernel(6, 2, 3), weight(6)), wide((2, 2, 3), (1, 2, 9), (3, 2, 6))),
    "conv2d": Example(lambda: inv.ops.conv2d(kernel(16, 4, 2, 2), weight(16)), wide(*ON_IMAGES)),
    "conv2d, tall": Example(lambda: inv.ops.conv2d(kernel(9, 4, 1, 2), weight(9)), wide(*ON_IMAGES)),
    "conv2d, groups": Example(lambda: inv.ops.conv2d(kernel(10, 2, 2, 1), groups=2), wide(*ON_IMAGES)),
    "conv2d, padding": Example(lambda: inv.ops.conv2d(kernel(16, 4, 2, 2), padding=(1, 0)), wide(*ON_IMAGES)),
    "conv2d, overlap": Example(overlapping, wide((2, 1, 4, 5), (1, 1, 2, 3), (1, 1, 6, 7))),
    "conv2d, ceil_mode": Example(
        lambda: inv.ops.conv2d(kernel(4, 1, 2, 2), ceil_mode=True), wide((2, 1, 3, 5), (1, 1, 1, 1), (1, 1, 4, 7))
    ),
    "conv3d": Example(
        lambda: inv.ops.conv3d(kernel(8, 1, 2, 2, 2)), wide((2, 1, 2, 4, 2), (1, 1, 2, 2, 2), (1, 1, 4, 2, 6))
    ),
    "fft": Example(lambda: inv.ops.fft((-2, -1)), complex_tensors((2, 3, 4), (1, 2, 5), (3, 4, 1))),
    "rfft": Example(lambda: inv.ops.rfft((-2, -1)), wide((2, 3, 4), (1, 2, 5), (3, 4, 1))),
    "rfft, size": Example(lambda: inv.ops.rfft(size=5), wide((2, 5), (1, 2, 5), (3, 4, 5))),
    "dct": Example(lambda: inv.ops.dct((-2, -1)), wide((2, 3, 4), (1, 2, 5), (3, 4, 1))),
    # ---- shape ----
    "permute": Example(lambda: inv.ops.permute([0, 3, 1, 2]), wide(*ON_IMAGES)),
    "transpose": Example(lambda: inv.ops.transpose(1, -1), wide(*ON_LAST)),
    "movedim": Example(lambda: inv.ops.movedim(1, -1), wide(*ON_IMAGES)),
    "flip": Example(lambda: inv.ops.flip([1, -1]), wide(*ON_IMAGES)),
    "roll": Example(lambda: inv.ops.roll([1, -2], [1, -1]), wide(*ON_LAST)),
    "permute_channels": Example(lambda: inv.ops.permute_channels([2, 0, 3, 1]), wide(*ON_IMAGES)),
    "reshape": Example(lambda: inv.ops.reshape([4], [2, 2]), wide(*ON_LAST)),
    "flatten": Example(inv.ops.flatten, wide(*ON_LAST)),
    "flatten, sizes": Example(lambda: inv.ops.flatten(-2, -1, [5, 4]), wide((5, 4), (2, 5, 4), (1, 2, 5, 4))),
    "pixel_unshuffle": Example(lambda: inv.ops.pixel_unshuffle(2), wide((2, 1, 4), (1, 2, 2, 6), (2, 1, 2, 4, 2))),
    "pixel_unshuffle, sizes": Example(lambda: inv.ops.pixel_unshuffle([1, 2], channels_first=False), wide(*ON_IMAGES)),
    "pixel_shuffle": Example(lambda: inv.ops.pixel_shuffle(2), wide(*ON_IMAGES)),
    "haar": Example(inv.ops.haar, wide((2, 1, 4), (1, 2, 2, 6), (2, 1, 2, 4, 2))),
    "haar, bands": Example(lambda: inv.ops.haar(channels_first=False), wide((2, 3, 4), (1, 2, 2, 6), (2, 2, 2, 4, 2))),
    "checkerboard": Example(inv.ops.checkerboard, wide((3, 4), (1, 2, 5, 2), (2, 1, 2, 6))),
    "pad": Example(lambda: inv.ops.pad([1, 2, 0, 3]), wide((3, 4), (2, 5, 4), (1, 2, 1, 1))),
    "pad, reflect": Example(lambda: inv.ops.pad([1, 2], mode="reflect"), wide((2, 4), (2, 5, 3), (1, 2, 3))),
    "pad_to_multiple": Example(lambda: inv.ops.pad_to_multiple([3, 4]), wide((3, 4), (2, 5, 4), (1, 2, 1, 1))),
    "pad_to_multiple, replicate": Example(
        lambda: inv.ops.pad_to_multiple(4, mode="replicate"), wide((2, 1, 3), (1, 2, 5, 4), (2, 1, 3))
    ),
    # ---- normalisation ----
    "actnorm": Example(lambda: inv.ops.actnorm(weight(4), weight(4)), wide((3, 4), (2, 4, 3), (2, 4, 3, 2))),
    "batch_norm": Example(lambda: batch_norm(training=False), wide((3, 4), (2, 4, 3), (2, 4, 3, 2))),
    "batch_norm, training": Example(
        lambda: batch_norm(training=True), wide((3, 4), (2, 4, 3), (2, 4, 3, 2)), without=STATISTICS
    ),
    # ---- couplings ----
    "couple": Example(lambda: inv.couple(mlp(4), mlp(4)), wide_pairs(*ON_PAIRS)),
    "couple, one half": Example(lambda: inv.couple(mlp(4)), wide_pairs(*ON_PAIRS)),
    "couple, closures": Example(lambda: inv.couple(closure(weight(4)), closure(2 * weight(4))), wide_pairs(*ON_PAIRS)),
    "couple, images": Example(
        lambda: inv.couple(conv(2), conv(2)), wide_pairs((2, 2, 3, 3), (1, 2, 4, 2), (3, 2, 1, 1))
    ),
    "couple, affine": Example(lambda: affine(inv.ops.exp_scale(mlp(4, 8), dim=-1)), wide_pairs(*ON_PAIRS)),
    "couple, sigmoid_scale": Example(lambda: affine(inv.ops.sigmoid_scale(mlp(4, 8), dim=-1)), wide_pairs(*ON_PAIRS)),
    "couple, tanh_scale": Example(lambda: affine(inv.ops.tanh_scale(mlp(4, 8), dim=-1)), wide_pairs(*ON_PAIRS)),
    "couple, inverse": Example(lambda: ~affine(inv.ops.tanh_scale(mlp(4, 8), dim=-1)), wide_pairs(*ON_PAIRS)),
    "couple, any law": Example(lambda: inv.couple(lambda x: x.cos() + 2, law=scale_by), wide_pairs(*ON_PAIRS)),
    "couple, nested": Example(lambda: inv.couple(lambda a, b: a * b, law=shift_both), nested_pairs),
    "couple, law of nested values": Example(lambda: inv.couple(choice(weight(4)), law=chosen), wide_pairs(*ON_PAIRS)),
    "couple, law with a pullback": Example(lambda: inv.couple(closure(weight(4)), law=doubled), wide_pairs(*ON_PAIRS)),
    "couple, dropout": Example(lambda: inv.couple(dropped(4), dropped(4)), wide_pairs(*ON_PAIRS), without=RANDOM),
    "couple, batch norm": Example(lambda: inv.couple(normed(4)), wide_pairs((3, 4), (2, 4), (5, 4)), without=BUFFERS),
    "couple_streams": Example(
        lambda: inv.ops.couple_streams([Product(4), None, torch.mul]), wide_pairs(*ON_PAIRS, count=3)
    ),
    "couple_streams, sum": Example(
        lambda: inv.ops.couple_streams([mlp(4), mlp(4), mlp(4)], reads="sum"), wide_pairs(*ON_PAIRS, count=3)
    ),
    "couple_streams, concat": Example(
        lambda: inv.ops.couple_streams([mlp(8, 4), mlp(8, 4), None], reads="concat"),
        wide_pairs((3, 4), (1, 4), (4, 4), count=3),
    ),
    "couple_streams, previous": Example(
        lambda: inv.ops.couple_streams([inv.ops.tanh_scale(mlp(4, 8), dim=-1)] * 4, law=inv.affine, reads="previous"),
        wide_pairs(*ON_PAIRS, count=4),
    ),
    "given": Example(lambda: inv.ops.given(inv.couple(Product(4), Product(4))), given_pairs(*ON_PAIRS)),
    "given, nested": Example(
        lambda: inv.ops.given(inv.chain(inv.swap(), inv.checkpoint(inv.couple(Product(4))), beside(4))),
        given_pairs(*ON_PAIRS),
    ),
    "split_mask": Example(
        lambda: inv.ops.split_mask(torch.tensor([True, False, True])), wide((2, 3), (1, 3), (2, 2, 3))
    ),
    "masked_couple": Example(
        lambda: inv.ops.masked_couple(
            inv.ops.tanh_scale(conv(2, 4)), inv.ops.checkerboard_mask([3, 4]), law=inv.affine
        ),
        wide((2, 2, 3, 4), (1, 2, 3, 4), (3, 2, 3, 4)),
    ),
    "masked_couple, spline": Example(
        lambda: inv.ops.masked_couple(
            inv.ops.per_element(mlp(4, 44), 11, dim=-1), torch.arange(4) > 1, law=inv.ops.rational_quadratic_spline
        ),
        wide(*ON_PAIRS),
    ),
    "spline_couple": Example(
        lambda: inv.ops.spline_couple(mlp(4, 44), mlp(4, 44), bins=4, dim=-1), wide_pairs(*ON_PAIRS)
    ),
    "recursive_couple": Example(
        lambda: inv.ops.recursive_couple(
            mlp(2), inv.ops.recursive_couple(torch.sin, dim=-1), inv.affine(weight(2) + 2, weight(2)), dim=-1
        ),
        wide(*ON_PAIRS),
    ),
    "momentum": Example(lambda: inv.ops.momentum(mlp(4), 0.7), wide_pairs(*ON_PAIRS)),
    "momentum, trained": Example(lambda: inv.ops.momentum(mlp(4), weight(4).sigmoid()), wide_pairs(*ON_PAIRS)),
    "momentum, 0": Example(lambda: inv.ops.momentum(mlp(4), 0), wide_pairs(*ON_PAIRS)),
    "bdia": Example(lambda: inv.ops.bdia(mlp(4), 0.5, spacing=2.0**-40), wide_pairs(*ON_PAIRS)),
    "hamiltonian": Example(lambda: inv.ops.hamiltonian(mlp(4), mlp(4), 0.3), wide_pairs(*ON_PAIRS)),
    "midpoint": Example(lambda: inv.ops.midpoint(mlp(4), 0.3), wide_pairs(*ON_PAIRS)),
    "leapfrog": Example(lambda: inv.ops.leapfrog(mlp(4), 0.3), wide_pairs(*ON_PAIRS)),
    "hyperbolic": Example(
        lambda: inv.ops.hyperbolic(weight(5, 4), weight(5), activation=torch.tanh), wide_pairs(*ON_PAIRS)
    ),
    "hyperbolic, images": Example(
        lambda: inv.ops.hyperbolic(weight(5, 2, 3, 3), step=0.5), wide_pairs((2, 2, 3, 3), (1, 2, 4, 2), (3, 2, 1, 1))
    ),
    "reversible_residual": Example(lambda: inv.ops.reversible_residual(Block(4)), wide_pairs(*ON_PAIRS)),
    "reversible_residual, couple": Example(
        lambda: inv.ops.reversible_residual((Block(4), Block(4)), "couple"), wide_pairs(*ON_PAIRS)
    ),
    "dequantize": Example(lambda: inv.ops.dequantize(17), levels(*ON_LAST), NOISY),
    "dequantize, variational": Example(
        lambda: inv.ops.dequantize(17, variational(4)), levels((3, 4), (2, 4), (1, 4)), NOISY
    ),
    "reversible_heun": Example(lambda: inv.ops.reversible_heun(Timed(mlp(4)), [0, 0.1, 0.4]), wide_pairs(*ON_PAIRS)),
    "reversible_heun, noise": Example(
        lambda: inv.ops.reversible_heun(Timed(mlp(4)), [0, 0.1, 0.4], diffusion=Timed(mlp(4)), noise=increment),
        wide_pairs(*ON_PAIRS),
    ),
    "asynchronous_leapfrog": Example(
        lambda: inv.ops.asynchronous_leapfrog(Timed(mlp(4)), [0, 0.1, 0.4], damping=0.9), wide_pairs(*ON_PAIRS)
    ),
    "reversible_solver": Example(
        lambda: inv.ops.reversible_solver(Timed(mlp(4)), [0, 0.1, 0.4], coupling=0.9), wide_pairs(*ON_PAIRS)
    ),
    "reversible_solver, coupling 1": Example(
        lambda: inv.ops.reversible_solver(Timed(mlp(4)), [1, 0.8], method="heun", coupling=1.0), wide_pairs(*ON_PAIRS)
    ),
    "enter_streams": Example(inv.ops.enter_streams, wide(*ON_PAIRS)),
    "enter_streams, function": Example(lambda: inv.ops.enter_streams(mlp(4)), wide(*ON_PAIRS)),
    "enter_streams, momentum": Example(lambda: inv.ops.enter_streams("momentum"), wide(*ON_PAIRS)),
    "leave_streams": Example(inv.ops.leave_streams, wide_pairs(*ON_PAIRS)),
    # ---- iterative ----
    "residual_flow": Example(lambda: inv.ops.residual_flow(contraction(4)), tensors((3, 4), (1, 2, 4), (1, 4))),
    "residual_flow, inverse": Example(
        lambda: ~inv.ops.residual_flow(contraction(4)),
        tensors((3, 4), (2, 4), edge=[torch.zeros(1, 4, dtype=torch.float64)]),
    ),
    "autoregressive": Example(
        lambda: inv.ops.autoregressive(inv.ops.tanh_scale(Before(4)), dim=-1), tensors(*ON_PAIRS)
    ),
    "autoregressive, inverse": Example(
        lambda: ~inv.ops.autoregressive(inv.ops.tanh_scale(Before(4)), dim=-1), tensors(*ON_PAIRS)
    ),
}
