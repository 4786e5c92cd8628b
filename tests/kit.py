"""What the tests share: tensors, small networks, one loss, and one way of comparing what two functions return.

`catalogue` says what each op is tried on; here is what is done with any of them.
"""

import functools
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from catalogue import weight
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import invfunc as inv
from invfunc.errors import DonatedError

WIDTH, WIDE = 4, 8  # of a component
A, B = 3, 4  # of the tensors of plain functions
TOLERANCE = 1e-9  # of a gradient in float64 that comes by inverses, against the plain one
ROUNDING = 1e-12  # of a value in float64 that is computed in two ways: the default
SINGLE = {"dtype": torch.float32}


# ---- comparing -------------------------------------------------------------------------------------------------------


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a tree."""
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def assert_close(found: Any, expected: Any, tolerance: float = ROUNDING, relative: float | None = None) -> None:
    """Two trees of one shape (a list is as good as a tuple): tensors are close, all other leaves are equal.

    Args:
        found: A tree.
        expected: Another one.
        tolerance: How far elements may be apart.
        relative: How much farther, as a share of the expected element; as much as the tolerance, if it is not given.
    """
    relative = tolerance if relative is None else relative
    found, expected = _by_path(found), _by_path(expected)
    assert found.keys() == expected.keys()
    for path, b in expected.items():
        a = found[path]
        if isinstance(b, Tensor):
            message = f"at {path}: {{}}".format if path else str
            torch.testing.assert_close(a, b, rtol=relative, atol=tolerance, msg=message)
        else:
            assert not isinstance(a, Tensor) and a == b, path


def _by_path(tree: Any) -> dict[str, Any]:
    return {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(tree)[0]}


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors are close, for tests that say what is not."""
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def assert_same(fn: Callable[..., Any], fast: Callable[..., Any], wrt: list[Tensor], *args: Any, **kwargs: Any) -> None:
    """Two functions return the same values in the same structure, with the same requires_grad and gradients."""
    expected, found = fn(*args, **kwargs), fast(*args, **kwargs)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    assert_close(found, expected)
    assert [t.requires_grad for t in tensors_of(found)] == [t.requires_grad for t in tensors_of(expected)]
    assert_close(gradients(found, wrt), gradients(expected, wrt))


def assert_refused(error: type[Exception], message: str, call: Callable[[], Any], anywhere: bool = False) -> None:
    """A call raises this kind of error, with a text that begins with the message, or has it anywhere."""
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value) if anywhere else str(caught.value).startswith(message)


# ---- a step ----------------------------------------------------------------------------------------------------------


def loss(tree: Any) -> Tensor:
    """A number that depends on every tensor with a derivative, with a gradient that depends on the tensor's place."""
    return sum(((i + 1) * t.abs().pow(2)).sum() for i, t in enumerate(tensors_of(tree)) if _is_differentiable(t))


def _is_differentiable(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def gradients(tree: Any, wrt: list[Tensor]) -> list[Tensor | None]:
    """Of the loss of what a function returned; the graph is kept."""
    return list(torch.autograd.grad(loss(tree), wrt, allow_unused=True, retain_graph=True))


def bowl(y: Tensor) -> Tensor:
    """A number with gradients that differ from element to element, and derivatives of every order."""
    return (y.sin() * y).sum()


def total(tree: Any) -> Tensor:
    """The sum of the bowls of a tree's tensors."""
    return sum((bowl(t) for t in pytree.tree_leaves(tree)), torch.zeros(()))


def step_gradients(op: Callable[..., Any], x: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """A step, and its gradients by x, if it has one, and by the tensors."""
    x = x.detach().requires_grad_(x.requires_grad)
    inputs = [*[x] * x.requires_grad, *tensors]
    options: Any = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(bowl(op(x)), inputs, **options))


class Step:
    """One training step: value, gradients and random stream, from a fixed seed."""

    def __init__(self, fn: Callable[..., Any], inputs: list[Tensor], tensors: list[Tensor]) -> None:
        torch.manual_seed(7)
        self.out = fn(*inputs)
        self.after_forward = torch.get_rng_state()
        self.gradients = torch.autograd.grad(loss(self.out), [*inputs, *tensors])
        self.after_backward = torch.get_rng_state()

    def assert_same(self, other: "Step", tolerance: float = ROUNDING) -> None:
        """Neither the numbers nor the random stream differ, and backward has drawn nothing."""
        assert_close(self.out, other.out, tolerance)
        assert_close(self.gradients, other.gradients, tolerance)
        assert torch.equal(self.after_forward, other.after_forward)
        assert torch.equal(self.after_backward, other.after_backward)
        assert torch.equal(self.after_forward, self.after_backward)


# ---- tensors and functions -------------------------------------------------------------------------------------------


def leaf(*shape: int, **options: Any) -> Tensor:
    """A random tensor that requires grad."""
    return torch.randn(shape, **options).requires_grad_()


def traced_by_jit(fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`torch.jit.trace`, which is deprecated and in use; it warns of every look at a shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(fn, args, **options)


def parameters(*modules: nn.Module) -> list[Tensor]:
    """Of all the modules, in order."""
    return [p for module in modules for p in module.parameters()]


def is_free(x: Tensor) -> bool:
    """Whether a tensor is donated, so that reading it raises."""
    try:
        x + 1
    except DonatedError:
        return True
    return False


def count(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that counts its calls."""

    @functools.wraps(fn)
    def counted(*args: Any, **kwargs: Any) -> Any:
        counted.calls += 1
        return fn(*args, **kwargs)

    counted.calls = 0
    return counted


class Counted(nn.Module):
    """A network that counts how often it runs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.count = net, 0

    def forward(self, *x: Tensor) -> Any:
        self.count += 1
        return self.net(*x)


# A function, and the leaf tensors that it depends on.
Captured = tuple[Callable[..., Any], list[Tensor]]


def with_leaf() -> Captured:
    """A function that closes over a leaf."""
    w = weight(WIDTH)
    return lambda x: torch.tanh(x * w), [w]


class Hiding(torch.autograd.Function):
    """Multiplication that hides its second factor from those who watch torch functions."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum_to_size(w.shape)


def branch(width: int, gain: float = 1.0, out: int | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """A small network; its gain says how much it amplifies."""
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out or width)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(gain)
    return net


# ---- networks --------------------------------------------------------------------------------------------------------


def network(functions: Iterable[Callable[..., Any]], dim: int = 1, law: Any = inv.additive) -> inv.Invertible:
    """Couplings on the halves of a tensor, each of the next two functions."""
    left = iter(functions)
    return inv.chain(
        inv.split(2, dim), *(inv.couple(f, g, law=law) for f, g in zip(left, left, strict=True)), inv.concat(2, dim)
    )


def in_turn(*functions: Callable[..., Any], dim: int = -1) -> inv.Invertible:
    """Couplings on the halves of a tensor, one for each function and the next one."""
    return network([f for pair in zip(functions, functions[1:] + functions[:1], strict=True) for f in pair], dim)


class Net:
    """A pipeline on one tensor, and its modules, which count their calls."""

    def __init__(self, depth: int = 3, dtype: torch.dtype | None = None) -> None:
        self.modules = [Counted(layer(dtype)) for _ in range(2 * depth)]
        self.op = network(self.modules, dim=-1)

    @property
    def parameters(self) -> list[Tensor]:
        return parameters(*self.modules)

    @property
    def counts(self) -> list[int]:
        return [module.count for module in self.modules]


def layer(dtype: torch.dtype | None = None) -> nn.Module:
    """Linear, then tanh where numbers are real."""
    linear = nn.Linear(WIDTH, WIDTH, dtype=dtype)
    return linear if linear.weight.is_complex() else nn.Sequential(linear, nn.Tanh())


LOWERINGS: dict[str, Callable[[inv.Invertible], Callable[..., Any]]] = {
    "invert": inv.checkpoint,
    "segments": lambda op: inv.checkpoint(op, segments=2),
    "recompute": lambda op: inv.checkpoint(op, mode="recompute"),
    "recompute in segments": lambda op: inv.checkpoint(op, mode="recompute", segments=2),
    "store": lambda op: inv.checkpoint(op, mode="store"),
    "function": lambda op: inv.checkpoint(lambda *xs: op(*xs)),
    "twice inverted": lambda op: ~inv.checkpoint(~op),
    "marks": lambda op: inv.checkpoint(
        inv.chain(
            op.parts[0], inv.mark(op.parts[1], "recompute"), inv.mark(inv.chain(*op.parts[2:-1]), "store"), op.parts[-1]
        )
    ),
}
every_lowering = pytest.mark.parametrize("lower", LOWERINGS.values(), ids=LOWERINGS)
TWO = ["invert", "recompute", "store", "function", "segments"]  # those that take two tensors


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """The results of functions that run at once; an error of one is raised."""
    results: dict[int, Any] = {}
    errors: list[BaseException] = []
    gate = threading.Barrier(len(works))
    interval = sys.getswitchinterval()

    def run(i: int) -> None:
        try:
            gate.wait()
            results[i] = works[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    sys.setswitchinterval(1e-6)  # a race that comes once in a thousand runs comes in every one
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
    return [results[i] for i in range(len(works))]


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))
