"""The functions that couplings call: ``(n, size) -> (n, out)``, of every kind that people write.

A maker gets the `Parts` of a world, puts every module and tensor that it makes there, and returns a callable. What can
be pickled is a class of this file; what can not, a closure, is a closure on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import invfunc as inv

Function = Callable[..., Any]


def seed_all(seed: int) -> None:
    """Seed the CPU's generator: `torch.manual_seed` does more, and takes as long as a step."""
    torch.default_generator.manual_seed(seed)


@dataclass
class Parts:
    """What the functions of one world are made of."""

    lowered: bool
    modules: list[nn.Module] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    made: dict[Any, Function] = field(default_factory=dict)

    def module(self, module: Any) -> Any:
        """Own a module."""
        self.modules.append(module)
        return module

    def tensor(self, *shape: int) -> nn.Parameter:
        """Make a parameter that belongs to no module."""
        self.tensors.append(nn.Parameter(0.5 * torch.randn(shape)))
        return self.tensors[-1]

    def first_weight(self) -> Any:
        """What holds the first parameter of the world, and its name."""
        found = ((m, name) for owner in self.modules for m in owner.modules() for name in m._parameters)
        return next(((m, name) for m, name in found if isinstance(m._parameters[name], Tensor)), None)


# ---- modules ---------------------------------------------------------------------------------------------------------


def sequential(*between: Callable[[int], nn.Module]) -> Callable[[Parts, int, int], Function]:
    """A linear layer and what follows it, each made for the width."""
    return lambda parts, size, out: parts.module(nn.Sequential(nn.Linear(size, out), *(make(out) for make in between)))


def mlp(parts: Parts, size: int, out: int) -> Function:
    return parts.module(nn.Sequential(nn.Linear(size, 5), nn.GELU(), nn.Linear(5, out)))


class Attention(nn.Module):
    """The batch is the sequence."""

    def __init__(self, size: int, out: int, dropout: float) -> None:
        super().__init__()
        self.attend, self.last = nn.MultiheadAttention(size, 2, dropout=dropout), nn.Linear(size, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attend(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    """The batch is the sequence."""

    def __init__(self, kind: type[nn.RNNBase], size: int, out: int) -> None:
        super().__init__()
        self.cell = kind(size, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Conv(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv1d(1, 2, 3, padding=1), nn.Linear(2 * size, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.conv(x[:, None])).flatten(1))


class OnLinear(nn.Module):
    """What each of these does, it does to a linear layer."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, out)


class Alias(OnLinear):
    """Reads its own weight by a second way."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__(size, out)
        self.hidden = [self.linear.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + x @ self.hidden[0].t())


class Reader(nn.Module):
    """Reads a weight of another module, which it does not own."""

    def __init__(self, size: int, out: int, other: Any) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(size, out), [other]

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))
        return y if self.other[0] is None else y * getattr(*self.other[0]).mean()


class Unused(nn.Module):
    """Has a layer that it does not call."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.idle, self.linear = nn.Linear(size, out), nn.Linear(size, out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Running(OnLinear):
    """Moves a buffer in every call of training, and uses it."""

    mean: Tensor

    def __init__(self, size: int, out: int) -> None:
        super().__init__(size, out)
        self.register_buffer("mean", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x):
            with torch.no_grad():
                self.mean.lerp_(x.detach().mean(0), 0.3)
        return torch.tanh(self.linear(x - self.mean.clone()))


class Auxiliary(OnLinear):
    """Leaves a loss on itself."""

    aux: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))
        self.aux = y.square().sum() / 7
        return y


class Energy(nn.Module):
    """The gradient of an energy, by autograd, inside of the function."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(size, 5), nn.Linear(size, out)

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(torch.tanh(self.linear(z)).sum(), z, create_graph=keep)
        return self.last(slope)


class AsksGradMode(OnLinear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * (2.0 if torch.is_grad_enabled() else 3.0)


class TorchCheckpoint(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size, out), nn.Tanh())

    def forward(self, x: Tensor) -> Any:
        return torch_checkpoint(self.net, x, use_reentrant=False)


class Nested(nn.Module):
    """Calls a function under `inv.checkpoint`, in the lowered world."""

    def __init__(self, size: int, out: int, lowered: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size, out), nn.Dropout(0.3), nn.Tanh())
        self.call = [inv.checkpoint(self.net) if lowered else self.net]

    def forward(self, x: Tensor) -> Tensor:
        return self.call[0](x)


class Cube(torch.autograd.Function):
    """Of the old style, with a ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grads[0]


class Cubic(OnLinear):
    def forward(self, x: Tensor) -> Any:
        return Cube.apply(torch.tanh(self.linear(x)))


class Product(torch.autograd.Function):
    """Reads what it has saved twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0] * ctx.saved_tensors[1], grads[0] * ctx.saved_tensors[0]


class ReadsTwice(OnLinear):
    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return Product.apply(y.tanh(), y.sin())


class InPlace(OnLinear):
    """Writes into what it made."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).relu_()
        y[:, :1] = 0.5
        return y.mul_(1.5).add_(x.mean())


class Stopped(nn.Module):
    """Stops the gradient on one way, and computes something without gradients."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.linear, self.target = nn.Linear(size, out), nn.Linear(size, out)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.target(x).tanh()
        return self.linear(x.detach()).tanh() * scale + x.mean()


class Noisy(OnLinear):
    """Draws random numbers of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.tanh(y) * torch.rand_like(y)


class Forked(Noisy):
    """Draws random numbers, and leaves the generator as it was."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return super().forward(x)


class Routed(OnLinear):
    """Takes a discrete decision, once."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        chosen = inv.pin("chosen", y.argmax(-1, keepdim=True))
        return torch.tanh(y) * (1 + y.gather(-1, chosen).sin())


class Named(OnLinear):
    """Names a result, which may be kept."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(inv.keep("named", self.linear(x)))


def weight_norm(parts: Parts, size: int, out: int) -> Function:
    return parts.module(nn.Sequential(parametrizations.weight_norm(nn.Linear(size, out)), nn.Tanh()))


def spectral_norm(parts: Parts, size: int, out: int) -> Function:
    return parts.module(nn.Sequential(parametrizations.spectral_norm(nn.Linear(size, out)), nn.Tanh()))


def frozen(parts: Parts, size: int, out: int) -> Function:
    return parts.module(nn.Sequential(nn.Linear(size, out).requires_grad_(False), nn.Tanh()))


def lazy(parts: Parts, size: int, out: int) -> Function:
    return parts.module(nn.Sequential(nn.LazyLinear(out), nn.Dropout(0.5)))


# ---- callables that are no modules -----------------------------------------------------------------------------------


def affine_of(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ w + b)


def closure(parts: Parts, size: int, out: int) -> Function:
    w, b = parts.tensor(size, out), parts.tensor(out)
    return lambda x: affine_of(w, b, x)


def closure_over_module(parts: Parts, size: int, out: int) -> Function:
    linear = parts.module(nn.Linear(size, out))
    return lambda x: torch.tanh(linear(x))


def closure_with_dropout(parts: Parts, size: int, out: int) -> Function:
    linear, w = parts.module(nn.Linear(size, out)), parts.tensor(out)
    return lambda x: nn.functional.dropout(linear(x), 0.4) * w


def of_partial(parts: Parts, size: int, out: int) -> Function:
    return partial(affine_of, parts.tensor(size, out), parts.tensor(out))


def of_method(parts: Parts, size: int, out: int) -> Function:
    return parts.module(Noisy(size, out)).forward


class Listed:
    """Holds its tensors in a list."""

    def __init__(self, w: Tensor, b: Tensor) -> None:
        self.held: Any = [w, [b]]

    def __call__(self, x: Tensor) -> Tensor:
        return affine_of(self.held[0], self.held[1][0], x)


class InDict:
    """Holds its tensors in a dict."""

    def __init__(self, w: Tensor, b: Tensor) -> None:
        self.held = {"w": w, "more": {"b": b}}

    def __call__(self, x: Tensor) -> Tensor:
        return affine_of(self.held["w"], self.held["more"]["b"], x)


class Slotted:
    __slots__ = ("b", "w")

    def __init__(self, w: Tensor, b: Tensor) -> None:
        self.w, self.b = w, b

    def __call__(self, x: Tensor) -> Tensor:
        return affine_of(self.w, self.b, x)


@dataclass
class InDataclass:
    w: Tensor
    b: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return affine_of(self.w, self.b, x)


def held_by(kind: Callable[[Tensor, Tensor], Function]) -> Callable[[Parts, int, int], Function]:
    return lambda parts, size, out: kind(parts.tensor(size, out), parts.tensor(out))


def holding_module(parts: Parts, size: int, out: int) -> Function:
    """A module that nobody registered, in a slot."""
    return Slotted.__call__.__get__(Slotted(parts.module(nn.Linear(size, out)).weight.t(), parts.tensor(out)))


def own(kind: Callable[..., nn.Module], *options: Any) -> Callable[[Parts, int, int], Function]:
    """A module of this file."""
    return lambda parts, size, out: parts.module(kind(size, out, *options))


def recurrent(kind: type[nn.RNNBase]) -> Callable[[Parts, int, int], Function]:
    return lambda parts, size, out: parts.module(Recurrent(kind, size, out))


def constant(parts: Parts, size: int, out: int) -> Function:
    """Does not look at its input."""
    b = parts.tensor(out)
    return lambda x: b.expand(len(x), out)


def wave(parts: Parts, size: int, out: int) -> Function:
    """Closes over nothing."""
    return torch.sin if size == out else partial(torch.nn.functional.pad, pad=(0, out - size), value=0.3)


FUNCTIONS: dict[str, Callable[[Parts, int, int], Function]] = {
    "tanh": sequential(lambda size: nn.Tanh()),
    "mlp": mlp,
    "dropout": sequential(lambda size: nn.Dropout(0.4), lambda size: nn.Tanh()),
    "batch_norm": sequential(nn.BatchNorm1d, lambda size: nn.Tanh()),
    "layer_norm": sequential(nn.LayerNorm, lambda size: nn.Tanh()),
    "group_norm": sequential(lambda size: nn.GroupNorm(2, size), lambda size: nn.Tanh()),
    "attention": own(Attention, 0.0),
    "attention_dropout": own(Attention, 0.3),
    "gru": recurrent(nn.GRU),
    "lstm": recurrent(nn.LSTM),
    "rnn": recurrent(nn.RNN),
    "conv": own(Conv),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "frozen": frozen,
    "lazy": lazy,
    "alias": own(Alias),
    "reader": lambda parts, size, out: parts.module(Reader(size, out, parts.first_weight())),
    "unused": own(Unused),
    "running": own(Running),
    "auxiliary": own(Auxiliary),
    "energy": own(Energy),
    "grad_mode": own(AsksGradMode),
    "torch_checkpoint": own(TorchCheckpoint),
    "nested": lambda parts, size, out: parts.module(Nested(size, out, parts.lowered)),
    "old_style": own(Cubic),
    "reads_twice": own(ReadsTwice),
    "in_place": own(InPlace),
    "stopped": own(Stopped),
    "noisy": own(Noisy),
    "forked": own(Forked),
    "routed": own(Routed),
    "named": own(Named),
    "closure": closure,
    "closure_over_module": closure_over_module,
    "closure_with_dropout": closure_with_dropout,
    "partial": of_partial,
    "method": of_method,
    "list": held_by(Listed),
    "dict": held_by(InDict),
    "slots": held_by(Slotted),
    "dataclass": held_by(InDataclass),
    "slots_nonleaf": holding_module,
    "constant": constant,
    "wave": wave,
}
SLOW = {"weight_norm", "spectral_norm", "attention", "attention_dropout", "gru", "lstm", "rnn"}
MOVES_BUFFERS = {"batch_norm", "spectral_norm", "running", "lazy"}
"""What a second call changes."""
CLOSURES = {"closure", "closure_over_module", "closure_with_dropout", "constant"}
"""What can not be copied or pickled."""


class WithSide(nn.Module):
    """A function that also sees integers, through an embedding."""

    def __init__(self, fn: Function, out: int) -> None:
        super().__init__()
        self.fn, self.embed = [fn], nn.Embedding(3, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.fn[0](x) + self.embed(c)
