"""Networks that are written out for the tests of `exact`, and the comparison of raw bits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invfunc.exact.bits import bits_of

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Modules = list[nn.Module]


def same_bits(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return len(found) == len(expected) and all(
        a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(bits_of(a), bits_of(b))
        for a, b in zip(found, expected, strict=True)
    )


class Mlp(nn.Sequential):
    def __init__(self, d: int, out: int | None = None):
        super().__init__(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, out or d))


class Spy(nn.Module):
    """Keeps what its net is given."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.given = net, []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.detach().clone())
        return self.net(x)


def nets(count: int, make: Callable[[], nn.Module], dtype: torch.dtype) -> Modules:
    torch.manual_seed(0)
    return [make().to(dtype) for _ in range(count)]


def plain(fs: Modules, x: Tensor, dim: int = 1, law: Callable = lambda x, t: x + t) -> Tensor:
    """The network, written out; its functions get dense tensors."""
    x1, x2 = (part.contiguous() for part in x.chunk(2, dim))
    for f, g in zip(fs[::2], fs[1::2], strict=True):
        x1 = law(x1, f(x2))
        x2 = law(x2, g(x1))
    return torch.cat([x1, x2], dim)


def affine(x: Tensor, t: Tensor) -> Tensor:
    raw, shift = t.chunk(2, 1)
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))  # a scale is computed in float32, and rounded once
    return x * torch.exp(torch.tanh(wide)).to(raw.dtype) + shift


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype, k: int) -> Tensor:
        ctx.dtype = x.dtype
        return torch.round(x.to(dtype) * 2.0**k) * 2.0**-k

    @staticmethod
    def backward(ctx, gy: Tensor):
        return gy.to(ctx.dtype), None, None


def plain_on_grid(fs: Modules, x: Tensor, dtype: torch.dtype, k: int) -> Tensor:
    """The network with its stream on a grid, written out."""
    stream = Straight.apply(x, dtype, k) + 0.0
    onto = [lambda x2, f=f: Straight.apply(f(x2.to(x.dtype)), dtype, k) for f in fs]
    return plain(onto, stream).to(x.dtype)


def step(call: Callable[[Tensor], Tensor], fs: Modules, x: Tensor) -> list[Tensor | None]:
    """The value and all gradients of one training step."""
    torch.manual_seed(1)
    parameters = [p for f in fs for p in f.parameters()]
    for p in parameters:
        p.grad = None
    x = x.detach().requires_grad_()
    y = call(x)
    y.backward(torch.randn_like(y))
    return [y.detach(), x.grad, *[p.grad for p in parameters]]


def batch(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, dtype=F64).to(dtype)


# ---- functions that are hard to run twice ----


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Attention(nn.Module):
    """Reads its input four times."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)) + torch.sin(x)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))


def gelu() -> nn.Module:
    return nn.GELU()


SEQUENCE, IMAGE = (4, 5, 16), (3, 16, 7, 7)
HARD = {
    "lstm": (Lstm, SEQUENCE, True),
    "lstm in eval": (Lstm, SEQUENCE, False),
    "encoder with dropout": (encoder, SEQUENCE, True),
    "encoder in eval": (encoder, SEQUENCE, False),
    "attention": (Attention, SEQUENCE, True),
    "spectral norm": (spectral, SEQUENCE, True),
    "batch norm": (conv, IMAGE, True),
    "batch norm in eval": (conv, IMAGE, False),
    "gelu of slices": (gelu, (3, 7, 16), True),
}


def hard(name: str) -> tuple[Modules, Tensor, int]:
    make, shape, training = HARD[name]
    fs = [f.train(training) for f in nets(4, make, F32)]
    return fs, batch(*shape), 1 if shape == IMAGE else 2
