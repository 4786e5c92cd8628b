"""Context: functions are told by name what they take, with gradients, and what they write into is seen as it was."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kit import assert_close, assert_refused
from torch import Tensor, nn

import invfunc as inv
from invfunc import ops
from invfunc.errors import OptionError


class Masked(nn.Module):
    """A net that takes a mask, and more by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, states: Any) -> Tensor:
        return torch.tanh(self.net(x) * mask + states[0])


@pytest.fixture
def context() -> dict[str, Any]:
    return {"mask": torch.rand(3, 4), "states": (torch.randn(3, 4, requires_grad=True), "not a tensor")}


def streams() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)


MAKERS: dict[str, Callable[[Any, Any], inv.Invertible]] = {
    "couple": lambda f, g: inv.couple(f, g),
    "one half": lambda f, g: inv.couple(g, f),
    "momentum": lambda f, g: ops.momentum(f, 0.5),
    "midpoint": lambda f, g: ops.midpoint(f, 0.3),
    "leapfrog": lambda f, g: ops.leapfrog(f, 0.3),
    "hamiltonian": lambda f, g: ops.hamiltonian(f, g, 0.3),
    "inverse": lambda f, g: ~ops.hamiltonian(f, g, 0.3),
    "parallel": lambda f, g: (
        inv.parallel(inv.chain(inv.split(2), inv.couple(lambda x, mask: x * mask[:, :2]), inv.concat(2)), inv.chain())
        >> inv.couple(f)
    ),
    "marked": lambda f, g: inv.mark(inv.couple(f, g), "recompute"),
    "many streams": lambda f, g: ops.couple_streams([f, g], reads="sum"),
    "one way": lambda f, g: inv.chain(inv.couple(f), lambda a, b, mask: (a * mask, b)),
}


def told(op: inv.Invertible, x: Any, context: dict[str, Any], wrt: list[Tensor]) -> tuple[Any, list[Tensor]]:
    y = op(*x, context=context)
    return y, list(torch.autograd.grad((y[0].sin() + y[1].square()).sum(), wrt))


@pytest.mark.parametrize("maker", MAKERS)
def test_lowered_is_plain_with_gradients_into_the_context(maker: str, context: dict[str, Any]) -> None:
    f, g, x = Masked(), nn.Linear(4, 4), streams()
    source = context["states"][0]
    context["states"] = source.sin(), "not a tensor"  # a result, not a leaf
    op = MAKERS[maker](f, g)
    wrt = [*x, source, *f.parameters()]
    expected = told(op, x, context, wrt)
    context["states"] = source.sin(), "not a tensor"
    assert_close(told(inv.checkpoint(op), x, context, wrt), expected)


def test_a_context_is_what_a_closure_would_be(context: dict[str, Any]) -> None:
    f, g, x = Masked(), nn.Linear(4, 4), streams()
    assert_close(inv.couple(f, g)(*x, context=context), inv.couple(partial(f, **context), g)(*x), 0.0)


def test_the_inverse_is_told_as_well(context: dict[str, Any]) -> None:
    op, x = inv.chain(*[inv.couple(Masked(), nn.Linear(4, 4))] * 3), streams()
    y = op(*x, context=context)
    assert_close((~op)(*y, context=context), x)


def test_both_functions_of_a_pair_are_told() -> None:
    op = inv.pair(lambda x, scale: x * scale, lambda y, scale: y / scale)
    y = op(torch.ones(2), context={"scale": 3.0})
    assert y.tolist() == [3.0, 3.0] and (~op)(y, context={"scale": 3.0}).tolist() == [1.0, 1.0]


def test_a_function_that_takes_anything_is_told_everything() -> None:
    found: dict[str, Any] = {}

    def f(x: Tensor, **context: Any) -> Tensor:
        found.update(context)
        return x

    inv.couple(f)(*streams(), context={"a": 1, "b": None})
    assert found == {"a": 1, "b": None}


def test_the_residual_flow_and_its_inverse_are_told() -> None:
    net = nn.Linear(4, 4)
    net.weight.data *= 0.2
    op, x = ops.residual_flow(lambda x, shift: 0.5 * net(x).tanh() + shift), torch.randn(3, 4)
    y = op(x, context={"shift": torch.ones(3, 4)})
    assert_close((~op)(y, context={"shift": torch.ones(3, 4)}), x, 1e-9)


@pytest.mark.parametrize("face", ["Lowered", "Coupling", "Sequential"])
def test_modules_take_a_context(face: str, context: dict[str, Any]) -> None:
    f = Masked()
    inner = inv.chain(inv.split(2), inv.couple(f), inv.concat(2))
    net = {
        "Lowered": lambda: inv.nn.Lowered(inner),
        "Coupling": lambda: inv.nn.Coupling(f),
        "Sequential": lambda: inv.nn.Sequential(inv.nn.Coupling(f)),
    }[face]()
    x = torch.randn(3, 8)
    y = net(x, context=context)
    assert_close(y, inner(x, context=context))
    assert_close(net.inverse(y, context=context), x)
    assert_close(inv.chain(net.op)(x, context=context), y)


def test_below_transforms(context: dict[str, Any]) -> None:
    f, x = Masked(), streams()
    op = inv.chain(*[inv.couple(f, nn.Linear(4, 4))] * 2)

    def loss(op: inv.Invertible, states: Tensor) -> Tensor:
        y = op(*x, context={"mask": context["mask"], "states": (states.sin(),)})
        return (y[0].sin() + y[1].square()).sum()

    states = context["states"][0]
    (expected,) = torch.autograd.grad(loss(op, states), states)
    assert_close(torch.func.grad(partial(loss, inv.checkpoint(op)))(states.detach()), expected)


class Memory:
    """Something that a function writes into."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


def test_what_a_function_writes_into_is_seen_as_it_was() -> None:
    net, memory, x = nn.Linear(4, 4), Memory(), streams()

    def f(x: Tensor, memory: Memory) -> Tensor:
        memory.seen.append(x)
        return net(x).sin() * len(memory.seen)

    op = inv.chain(*[inv.couple(f)] * 3)
    expected = told(op, x, {"memory": Memory()}, [*x, net.weight])
    found = told(inv.checkpoint(op), x, {"memory": memory}, [*x, net.weight])
    assert_close(found, expected)
    assert len(memory.seen) == 3


def test_a_name_that_nobody_takes_is_refused(context: dict[str, Any]) -> None:
    assert_refused(
        OptionError,
        "context has 'masc', expected names that one of the op's functions takes as keyword arguments: Masked, Linear; "
        "let one of them take it, or leave it out",
        lambda: inv.couple(Masked(), nn.Linear(4, 4))(*streams(), context={"masc": 1, **context}),
    )


def test_a_context_without_names_is_refused() -> None:
    assert_refused(
        OptionError,
        'context is (5, 2), expected a dict of names; context={"mask": mask}, where a function takes mask as a keyword',
        lambda: inv.couple(Masked())(*streams(), context=torch.randn(5, 2)),
    )


def test_an_op_that_hides_its_functions_is_refused(context: dict[str, Any]) -> None:
    op = inv.with_log_det(inv.pair(lambda x, by: x + by, lambda y, by: y - by, log_det=lambda x, y: x.sum(1) * 0))
    assert_refused(
        OptionError,
        "context: with_log_det(pair(<lambda>, <lambda>)) hides <lambda>, expected chain, parallel and couple around it",
        lambda: op(torch.ones(2, 3), torch.zeros(2), context={"by": 1.0}),
    )


# ---- whatever takes an op and its input ------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return torch.tanh(self.net(x)) * scale


ENTRIES: dict[str, Callable[..., Any]] = {
    "call": lambda op, x, **told: op(x, **told),
    "inverse": lambda op, x, **told: op.inverse(x, **told),
    "invert": lambda op, x, **told: inv.invert(op)(x, **told),
    "log_det": inv.log_det,
    "check": inv.check,
    "calibrate": lambda op, x, **told: inv.look.calibrate(op, x, 1e-3, **told),
    "draw": inv.draw,
    "saved": inv.look.saved,
    "print_saved": inv.look.print_saved,
    "measure": inv.measure,
    "check_laws": inv.testing.check_laws,
    "plan": lambda op, x, **told: inv.plan(op, x, budget="1MiB", **told),
    "plan.verify": lambda op, x, **told: inv.plan(op, x, budget="1MiB", context=SCALE).verify(x, **told),
}
SCALE = {"scale": torch.tensor(0.5)}


def scaled(*, lowered: bool) -> inv.Invertible:
    op = inv.chain(inv.split(2), inv.couple(Scaled(), Scaled()), inv.concat(2))
    return inv.checkpoint(op) if lowered else op


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_takes_an_op_and_its_input_takes_a_context(entry: str, lowered: bool) -> None:
    op, x, run = scaled(lowered=lowered), torch.randn(3, 4), ENTRIES[entry]
    run(op, x, context=SCALE)
    with pytest.raises(OptionError, match=r"context has 'masc', expected names that one of the op's functions takes"):
        run(op, x, context={"masc": 1, **SCALE})
    for told in ({}, {"context": {}}):
        with pytest.raises(
            OptionError, match=r"Scaled received one component \(\(3, 2\),\) and no 'scale'.* by name: con"
        ):
            run(op, x, **told)


def test_what_looks_says_of_an_op_in_a_context_what_it_says_of_closures() -> None:
    f, x = Scaled(), torch.randn(3, 4, requires_grad=True)

    def around(fn: Callable[..., Any]) -> inv.Invertible:
        return inv.checkpoint(inv.chain(inv.split(2), inv.couple(fn), inv.mark(inv.couple(fn), "store"), inv.concat(2)))

    op, closed = around(f), around(partial(f, **SCALE))
    assert_close(op.inverse(x, context=SCALE), closed.inverse(x), 0.0)
    assert_close(inv.log_det(op, x, context=SCALE), inv.log_det(closed, x), 0.0)
    assert str(inv.draw(op, x, context=SCALE)) == str(inv.draw(closed, x))
    beside = [row for row in inv.look.saved(op, x, context=SCALE) if "()" not in row.what]  # it is an input, of 0 bytes
    assert beside == inv.look.saved(closed, x)
    assert inv.check(op, x, context=SCALE).to_dict() == inv.check(closed, x).to_dict()
    assert inv.testing.check_laws(op, x.detach(), context=SCALE) == inv.testing.check_laws(closed, x.detach())


def test_an_inverse_takes_a_tuple_wire_as_a_call_does(context: dict[str, Any]) -> None:
    op, x = inv.couple(Masked()), streams()
    assert_close(op.inverse(*op(*x, context=context), context=context), x)


def test_a_plan_made_in_a_context_lowers_the_op() -> None:
    op, x = scaled(lowered=False), torch.randn(3, 4)
    planned = inv.checkpoint(op, plan=inv.plan(op, x, budget="1MiB", context=SCALE))
    assert_close(planned(x, context=SCALE), op(x, context=SCALE))


def test_a_model_that_is_planned_by_its_blocks_takes_no_context() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    assert_refused(
        OptionError,
        "plan: Model, which is planned block by block, got a context, expected an op, a function or an nn.Sequential; "
        "pass a tuple as x: its components become the model's positional arguments",
        lambda: inv.plan(Model(), torch.randn(2, 4), budget="1MiB", context={"mask": 1}),
    )


def test_functions_and_modules_are_looked_at_in_a_context() -> None:
    f, x = Scaled(), torch.randn(3, 2, requires_grad=True)
    assert bool(inv.check(f, x, context=SCALE))
    assert sum(row.bytes for row in inv.look.saved(f, x, context=SCALE)) == 3 * 2 * 8  # what tanh returned
    module = inv.nn.Lowered(inv.chain(inv.split(2), inv.couple(f), inv.concat(2)))
    assert inv.look.saved(module, torch.randn(3, 4), context=SCALE)


class Unset:
    __slots__ = ("calls", "loss")


class Defaults:
    calls, loss = 0, 0.0


@pytest.mark.parametrize("make", [type("Empty", (), {}), SimpleNamespace, Unset, Defaults])
@pytest.mark.parametrize("given", ["argument", "context"])
def test_an_object_without_attributes_yet_is_written_once(make: Callable[[], Any], given: str) -> None:
    net, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)

    def f(x: Tensor, c: Any) -> Tensor:
        c.calls = getattr(c, "calls", 0) + 1
        c.loss = getattr(c, "loss", 0.0) + net(x).square().mean()
        return torch.tanh(net(x) * c.calls)

    def step(lower: Callable[..., Any]) -> tuple[list[Tensor], Any]:
        c = make()
        if given == "argument":
            y = lower(f)(x, c)
        else:
            y = lower(inv.chain(inv.split(2, dim=0), inv.couple(f), inv.concat(2, dim=0)))(
                torch.cat([x, x]), context={"c": c}
            )
        grads = torch.autograd.grad(y.square().sum(), [x, *net.parameters()], retain_graph=True)
        return [*grads, *torch.autograd.grad(c.loss, [x, *net.parameters()])], c

    (found, c), (expected, plain) = step(inv.checkpoint), step(lambda f: f)
    assert_close(found, expected)
    assert c.calls == plain.calls
    assert_close(c.loss, plain.loss)


class Holds:
    """An object beside one that can not be copied."""

    def __init__(self, one: Any) -> None:
        self.one, self.calls = one, 0


class Single:
    def __copy__(self) -> Any:
        raise RuntimeError("there is one")


def with_handler() -> logging.Logger:
    logger = logging.Logger("of a test")
    logger.addHandler(logging.StreamHandler(sys.__stderr__))
    return logger


ONE_OF_A_KIND: dict[str, Callable[[], Any]] = {
    "a stream": lambda: sys.__stderr__,
    "a file that is written": lambda: open(os.devnull, "w"),  # noqa: SIM115
    "a file on disk": lambda: NamedTemporaryFile("w"),  # noqa: SIM115
    "a logger with handlers": with_handler,
    "a logger of the root": logging.getLogger,
    "a socket": socket.socket,
    "a lock": threading.Lock,
    "a class of the user's that refuses": Single,
}


@pytest.fixture(params=ONE_OF_A_KIND)
def one(request: pytest.FixtureRequest) -> Iterator[Any]:
    found = ONE_OF_A_KIND[request.param]()
    yield found
    if isinstance(found, socket.socket) or hasattr(found, "name") and found not in (sys.__stderr__, logging.root):
        getattr(found, "close", lambda: None)()


@pytest.mark.parametrize("given", ["argument", "context", "plain"])
@pytest.mark.parametrize("held", [False, True])
def test_what_can_not_be_copied_is_shared(one: Any, given: str, held: bool) -> None:
    net, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    seen = []

    def f(x: Tensor, c: Any) -> Tensor:
        seen.append(c.one if held else c)
        factor = 1.0
        if held:
            c.calls = c.calls + 1
            factor = c.calls
        return torch.tanh(net(x) * factor)

    c, again = (Holds(one), Holds(one)) if held else (one, one)
    handlers = list(getattr(one, "handlers", []))
    if given == "argument":
        y, plain = inv.checkpoint(f)(x, c), f(x, again)
    else:
        op = inv.chain(inv.split(2, dim=0), inv.couple(f), inv.concat(2, dim=0))
        y = (op if given == "plain" else inv.checkpoint(op))(x.repeat(2, 1), context={"c": c})
        plain = torch.cat([x + f(x, again), x])
    found, expected = (torch.autograd.grad(out.sin().sum(), [x, net.weight]) for out in (y, plain))
    assert_close(list(found), list(expected))
    assert all(item is one for item in seen)
    assert getattr(one, "handlers", []) == handlers
    assert not getattr(one, "closed", False)
