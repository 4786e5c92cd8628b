"""The executor: whatever the plan, the value and the gradient are the plain ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import assert_close
from planning_chains import fake_costs, make_op, step, weights_of
from torch import Tensor, nn

import invfunc as inv
from invfunc.errors import WireError
from invfunc.plan import Costs, Invert, Plan, Recompute, Store
from invfunc.plan.executor import flat_ops
from invfunc.plan.schedule import store_all

KINDS = ("couple", "affine", "closure", "exp", "flip", "noisy", "lossy")


def random_schedule(draw, costs: Costs, first: int, stop: int, inverts: bool, depth: int = 0):
    nodes, at = [], first
    while at < stop:
        longest = at
        while inverts and longest < stop and math.isfinite(costs.ops[longest].inverse):
            longest += 1
        kind = draw(st.sampled_from(["store"] + ["invert"] * (longest > at) + ["recompute"] * (depth < 3)))
        if kind == "store":
            nodes.append(Store(at))
        elif kind == "invert":
            nodes.append(Invert(at, draw(st.integers(at + 1, longest))))
        else:
            end = draw(st.integers(at + 1, stop))
            nodes.append(Recompute(at, random_schedule(draw, costs, at, end, inverts, depth + 1)))
        at = nodes[-1].stop
    return tuple(nodes)


@settings(max_examples=60)
@given(st.data())
def test_any_plan_gives_the_plain_gradient(data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
    f = inv.chain(*[make_op(kind, 6) for kind in kinds])
    costs, x = fake_costs(f), torch.randn(5, 6)
    inverts = data.draw(st.booleans())
    plan = Plan(random_schedule(data.draw, costs, 0, len(costs.ops), inverts), costs)
    weights = weights_of(f, x)
    exact, found = step(f, x, weights), step(inv.checkpoint(f, plan=plan), x, weights)
    for a, b in zip(found, exact, strict=True):
        if inverts:
            assert_close(a, b)
        else:
            assert torch.equal(a, b)


def example(tree=None):
    f = inv.chain(make_op("couple", 6), make_op("lossy", 6), make_op("couple", 6))
    inner = Recompute(4, (Store(4), Invert(5, 7)))  # it ends between the halves of a coupling
    tree = tree or (Recompute(0, (Invert(0, 2), Invert(2, 4), inner, Store(7), Invert(8, 9))),)
    return f, Plan(tree, fake_costs(f)), torch.randn(5, 6)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap", "hessian"])
def test_a_planned_op_under_transforms(transform):
    f, plan, x = example()
    fast = inv.checkpoint(f, plan=plan)

    def value(op):
        return lambda v: op(v[None] if v.dim() == 1 else v).square().sum()

    def run(op):
        if transform == "vmap":
            return torch.func.vmap(torch.func.grad(value(op)))(x)
        given = x[:1] if transform == "hessian" else x
        return getattr(torch.func, transform)(value(op))(given)

    assert_close(run(fast), run(f))


@pytest.mark.compile
# Dynamo instantiates a Function to trace it, and warns of that itself
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
def test_a_compiled_plan_gives_the_plain_gradient():
    f, x = inv.chain(*make_op("exp", 6).parts, make_op("lossy", 6), *make_op("exp", 6).parts), torch.randn(5, 6)
    plan = Plan((Recompute(0, (Invert(0, 1), Recompute(1, (Store(1),)), Store(2))), Invert(3, 5)), fake_costs(f))
    weights = weights_of(f, x)
    fast = torch.compile(inv.checkpoint(f, plan=plan), backend="aot_eager", fullgraph=True)
    for found, exact in zip(step(fast, x, weights, of=f), step(f, x, weights), strict=True):
        assert_close(found, exact)


def test_double_backward_and_a_second_backward():
    f, plan, x = example()
    fast = inv.checkpoint(f, plan=plan)
    second = []
    for op in (f, fast):
        v = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(op(v).square().sum(), v, create_graph=True)
        second.append(torch.autograd.grad(g.square().sum(), v)[0])
    assert_close(*second)
    v = x.clone().requires_grad_()
    loss = fast(v).square().sum()
    (a,) = torch.autograd.grad(loss, v, retain_graph=True)
    (b,) = torch.autograd.grad(loss, v)
    assert torch.equal(a, b)


def off_by(error: float):
    return inv.pair(torch.sinh, lambda y: torch.asinh(y) + error, name="off")


@pytest.mark.parametrize(
    "tree",
    [
        (Store(0), Store(1), Invert(2, 4)),
        (Recompute(0, (Store(0), Store(1))), Invert(2, 4)),
        (Store(0), Recompute(1, (Store(1), Invert(2, 4)))),
    ],
)
def test_drift_is_placed_where_a_trunk_begins(tree):
    f = inv.chain(inv.pair(torch.tanh, torch.atanh), torch.sin, off_by(1e-3), inv.pair(torch.tanh, torch.atanh))
    fast = inv.checkpoint(f, plan=Plan(tree, fake_costs(f)))
    with pytest.warns(inv.errors.DriftWarning, match=r"chain stage 2 \(off\): its input"):
        fast(torch.rand(5, 6, requires_grad=True)).sum().backward()


def test_errors_are_placed_in_the_whole_chain():
    def fails(x):
        raise KeyError("mine")

    f = inv.chain(torch.sin, torch.cos, inv.pair(fails, torch.log, name="bad"))
    for tree in [store_all(3), (Store(0), Recompute(1, (Store(1), Store(2))))]:
        with pytest.raises(KeyError, match="mine") as caught:
            inv.checkpoint(f, plan=Plan(tree, fake_costs(f)))(torch.rand(5, 6, requires_grad=True))
        assert caught.value.__notes__ == ["in chain stage 2 (bad)"]


def test_errors_in_a_coupling_are_placed_by_the_stage():
    def bad(x):
        return x[:, :1, None]

    x = torch.rand(5, 6, requires_grad=True)
    for stage, name, claim in [
        (inv.couple(torch.sin, bad), "couple", "g returned"),
        (inv.invert(inv.couple(torch.sin, bad)), "invert", "g returned"),
        (inv.ops.momentum(bad, 0.5), "momentum", "law blend made"),
    ]:
        f = inv.chain(inv.split(2), inv.couple(torch.sin, torch.cos), stage)
        for tree in [store_all(5), (Store(0), Recompute(1, (Invert(1, 3), Invert(3, 5))))]:
            with pytest.raises(WireError, match=rf"^chain stage 2 \({name}\): {claim} \(5, "):
                inv.checkpoint(f, plan=Plan(tree, fake_costs(f)))(x)


def test_modes_override_plans_and_the_inverse_has_none():
    f, plan, x = example((Recompute(0, tuple(map(Store, range(9)))),))
    fast = inv.checkpoint(f, plan=plan)
    assert inv.checkpoint(fast) == fast
    with inv.mode("store"):
        assert "Recompute" not in fast(x.requires_grad_()).grad_fn.name()
    part = inv.chain(make_op("couple", 6), make_op("exp", 6))
    count = len(flat_ops(part))
    fast = inv.checkpoint(part, plan=Plan(store_all(count), fake_costs(part)))
    torch.testing.assert_close(inv.invert(fast)(fast(x)), x)


@pytest.mark.parametrize("look", [lambda op, x: inv.plan(op, x, max_time=2.0), inv.draw], ids=["plan", "draw"])
def test_what_is_looked_at_under_autocast_leaves_no_cast_without_data(look):
    op, x = inv.chain(inv.split(2), inv.couple(nn.Linear(4, 4).float()), inv.concat(2)), torch.randn(3, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        look(op, x)
        assert type(op(x)) is Tensor


def test_a_planned_call_of_another_shape_under_autocast_gives_numbers():
    op, x = inv.chain(inv.split(2), inv.couple(nn.Linear(4, 4).float()), inv.concat(2)), torch.randn(3, 8).float()
    planned = inv.checkpoint(op, plan=inv.plan(op, x, max_time=2.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert type(planned(torch.randn(2, 8).float())) is Tensor
