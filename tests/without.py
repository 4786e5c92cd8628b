"""``python tests/without.py NAME...``: use the package where torch lacks a private name, one name after the other.

Each name is taken away in a process of its own, before the package is imported. What was seen is printed as JSON: for
each name and each task "right", "wrong: ..." where a value is not plain autograd's, or the error.
"""

from __future__ import annotations

import importlib
import json
import operator
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TASKS: dict[str, Callable[[Any], None]] = {}

# What takes more than some milliseconds is tried without the names that it has to do with.
SLOW = {
    "transforms": ["functorch", "forward_ad", "grad"],
    "iterate": ["functorch", "forward_ad", "parametrize"],
    "iterate_while_cached": ["get_unwrapped", "parametrize._cache"],
    "look": ["fake", "dispatch", "Dispatch", "pytree", "_cdata"],
    "compile_": ["transforms_active", "eval_frame.set", "torch._dynamo", "_reparametrize_module"],
}


def task(fn: Callable[[Any], None]) -> Callable[[Any], None]:
    TASKS[fn.__name__] = fn
    return fn


def import_without(path: str) -> None:
    """Import the package, and let its lookups of a private name fail, as they do where torch does not have it."""
    resolve, read = pkgutil.resolve_name, operator.attrgetter

    def resolved(name: str) -> Any:
        if name == path:
            raise AttributeError(name)
        return resolve(name)

    def reader(name: str) -> Any:
        if name == path.rpartition(".")[2]:
            raise AttributeError(name)
        return read(name)

    pkgutil.resolve_name, operator.attrgetter = resolved, reader  # type: ignore[assignment,misc]
    importlib.import_module("invfunc._torch")
    pkgutil.resolve_name, operator.attrgetter = resolve, read  # type: ignore[misc]


def close(a: Any, b: Any) -> None:
    if isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            close(left, right)
    else:
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9), f"off by {(a - b).abs().max():.3g}"


def net(inv: Any) -> Any:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4), nn.Linear(4, 8)]
    couplings = [inv.couple(nets[0], nets[1]), inv.couple(inv.ops.exp_scale(nets[2]), law=inv.affine)]
    return inv.chain(inv.split(2), *couplings, inv.concat(2), inv.ops.sinh()), nn.ModuleList(nets)


def step(fn: Any, x: Tensor, parameters: Any = ()) -> list[Tensor]:
    y = fn(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


@task
def train(inv: Any) -> None:
    op, nets = net(inv)
    x = torch.randn(3, 8, requires_grad=True)
    expected = step(op, x, [*nets.parameters()])
    for mode in ("invert", "recompute", "invert"):  # twice, for what is remembered of the first call
        close(step(inv.checkpoint(op, mode=mode), x, [*nets.parameters()]), expected)


@task
def train_large(inv: Any) -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 64, requires_grad=True)
    op = inv.chain(inv.split(2), *[inv.couple(lambda x: torch.tanh(x @ w), lambda x: x @ w) for _ in range(2)])
    x = torch.randn(512, 128, requires_grad=True)  # so large that sums are written in place
    close(step(lambda x: torch.cat(inv.checkpoint(op)(x), 1), x, [w]), step(lambda x: torch.cat(op(x), 1), x, [w]))


@task
def draw_numbers(inv: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4), nn.Tanh())
    op = inv.chain(inv.split(2), inv.couple(net, net), inv.concat(2))
    x = torch.randn(3, 8, requires_grad=True)
    results = []
    for fn in (op, inv.checkpoint(op), inv.checkpoint(op, mode="recompute")):
        torch.manual_seed(0)
        results.append(step(fn, x, [*net.parameters()]))
    close(results[1:], [results[0], results[0]])


@task
def train_closure(inv: Any) -> None:
    leaf = torch.randn(4, requires_grad=True)
    w = leaf.exp()

    def forward(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return x * w

    op = inv.chain(inv.pair(forward, lambda y: y / w), inv.pair(torch.sinh, torch.asinh))
    x = torch.randn(3, 4, requires_grad=True)
    close(step(inv.checkpoint(op), x, [w]), step(op, x, [w]))


@task
def modules(inv: Any) -> None:
    from invfunc.compat import memcnn

    op, nets = net(inv)
    lowered = inv.nn.Lowered(op)
    x = torch.randn(3, 8, requires_grad=True)
    close(step(lowered, x, [*lowered.parameters()]), step(op, x, [*lowered.parameters()]))
    assert len(lowered.state_dict()) == len(nets.state_dict())
    plain, norm = nn.BatchNorm1d(8), inv.nn.BatchNorm1d(8)
    close(step(norm, x, [*norm.parameters()]), step(plain, x, [*plain.parameters()]))
    act, other = inv.nn.ActNorm(8), inv.nn.ActNorm(8)
    act(x)
    other.load_state_dict(act.state_dict())
    assert act.initialised and other.initialised
    f, g = nn.Linear(4, 4), nn.Linear(4, 4)
    wrapped = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g))

    def plain_coupling(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + f(x2)
        return torch.cat((y1, x2 + g(y1)), 1)

    close(step(lambda x: wrapped(1 * x), x), step(plain_coupling, x))


@task
def transforms(inv: Any) -> None:
    op, _ = net(inv)
    lowered = inv.checkpoint(op)
    x, v = torch.randn(3, 8), torch.randn(3, 8)
    for transformed in (
        lambda f: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x[None]).sum()))(x),
        lambda f: torch.func.vjp(f, x)[1](v),
        lambda f: torch.func.jvp(f, (x,), (v,)),
    ):
        close(transformed(lowered), transformed(op))


@task
def closures_under_transforms(inv: Any) -> None:
    def loss(f: Any) -> Callable[[Tensor], Tensor]:
        return lambda w: f(inv.pair(lambda x: x * w, lambda y: y / w))(torch.ones(3)).sum()

    w = torch.rand(3)
    close(torch.func.grad(loss(inv.checkpoint))(w), torch.func.grad(loss(lambda op: op))(w))


@task
def iterate(inv: Any) -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    layer.eval()
    op = inv.invert(inv.ops.residual_flow(lambda x: 0.5 * torch.tanh(layer(x))))
    y, v = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    x = op(y)
    close(x + 0.5 * torch.tanh(layer(x)), y)
    (gy,) = torch.autograd.grad(x, y, v)
    jacobian = torch.autograd.functional.jacobian(lambda x: x + 0.5 * torch.tanh(layer(x)), x.detach())
    flat = jacobian.reshape(12, 12)
    close(gy.flatten(), torch.linalg.solve(flat.T, v.flatten()))
    close(torch.func.jvp(op, (y.detach(),), (v,))[1].flatten(), torch.linalg.solve(flat, v.flatten()))


@task
def iterate_while_cached(inv: Any) -> None:
    with nn.utils.parametrize.cached():
        iterate(inv)


@task
def look(inv: Any) -> None:
    op, nets = net(inv)
    x = torch.randn(3, 8)
    assert inv.measure(lambda: x.exp().sin().sum()).peak_bytes == 2 * 3 * 8 * 8
    x.requires_grad_()
    inv.draw(op, x)
    from invfunc.plan import profile

    assert profile(op, torch.Size([3, 8]), repeats=1).ops


@task
def list_saved(inv: Any) -> None:
    op, _ = net(inv)
    x = torch.randn(3, 8, requires_grad=True)
    assert sum(row.bytes for row in inv.look.saved(inv.checkpoint(op), x)) >= 3 * 8 * 8
    assert [row.bytes for row in inv.look.saved(torch.exp, x)] == [3 * 8 * 8]


@task
def check_domains(inv: Any) -> None:
    x = torch.rand(3, 4) + 1
    with inv.debug(True):
        close(inv.ops.log()(x), x.log())
        close(torch.func.vmap(inv.ops.log())(x), x.log())


@task
def donate(inv: Any) -> None:
    op, nets = net(inv)
    x = torch.randn(3, 8, requires_grad=True)
    expected = step(op, x)
    close(step(lambda x: inv.checkpoint(op, donate=True)(1 * x), x), expected)


@task
def round_exactly(inv: Any) -> None:
    op, nets = net(inv)
    exact = inv.exact(inv.chain(*op.parts[:2], inv.concat(2)))
    x = exact.inverse(exact(torch.randn(3, 8)))
    assert torch.equal(exact.inverse(exact(x)), x)


@task
def compile_(inv: Any) -> None:
    f = nn.Linear(4, 4)
    op = inv.chain(inv.split(2), inv.couple(f), inv.concat(2))
    x = torch.randn(3, 8, requires_grad=True)
    lowered = inv.checkpoint(op)

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return lowered(x)

    expected = step(op, x, [*f.parameters()])
    for fn in (lowered, broken):
        close(step(torch.compile(fn, backend="eager"), x, [*f.parameters()]), expected)


def is_tried(name: str, path: str) -> bool:
    """Whether a task has to do with a name of torch."""
    return name not in SLOW or any(part in path for part in SLOW[name])


def outcome(fn: Callable[[Any], None]) -> str:
    try:
        import invfunc

        fn(invfunc)
    except AssertionError:
        return f"wrong: {traceback.format_exc(limit=-2)}"
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and type(cause).__name__ != "TorchNameError":  # Dynamo and autograd wrap what they pass
            cause = cause.__cause__ or cause.__context__
        if cause is not None or "TorchNameError" in str(error):
            return f"TorchNameError: {cause or error}"
        return "".join(traceback.format_exc(limit=-4))
    return "right"


def tried(path: str, tasks: list[str]) -> dict[str, str]:
    """What happens in a fork of this process, which has not imported the package."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # not before the fork, which a pool of threads does not survive
        import_without(path)
        with os.fdopen(writing, "w") as file:
            json.dump({name: outcome(TASKS[name]) for name in tasks}, file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"process": "died"}


if __name__ == "__main__":
    for module in (
        "distributions",
        "utils.flop_counter",
        "_subclasses.schema_check_mode",
        "_decomp.decompositions_for_jvp",
        "_dynamo",
    ):
        importlib.import_module(f"torch.{module}")  # once for all forks
    if any(is_tried("compile_", path) for path in sys.argv[1:]):
        torch.compile(lambda x: x.exp(), backend="eager")(torch.ones(1))
    torch.set_default_dtype(torch.float64)
    for path in sys.argv[1:]:
        print(json.dumps({path: tried(path, [name for name in TASKS if is_tried(name, path)])}), flush=True)
