"""What a plan refuses: each wrong argument has a message of its own."""

import pytest
import torch
from kit import assert_refused
from torch import nn

import invfunc as inv
from invfunc.errors import OptionError
from invfunc.plan import Costs, OpCosts, profile

X = torch.zeros(8, 4, dtype=torch.float64)
NUMBER = "plan: loss, expected one number that depends on the output, got "


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"budget": 0.5}, "budget is 0.5, expected one byte or more"),
        ({"budget": "0.5B"}, "budget is 0.5, expected one byte or more"),
        ({"budget": "1.2.3"}, "budget is '1.2.3', expected bytes, or a number of B, KiB"),
        ({"budget": "."}, "budget is '.', expected bytes"),
        ({"max_time": "1.2"}, "plan: max_time is '1.2', expected a number, not negative"),
        ({"max_time": True}, "plan: max_time is True, expected a number"),
        ({"max_time": 1.2, "max_error": "small"}, "plan: max_error is 'small', expected a number"),
        ({"max_time": 1.2, "loss": "mse"}, "plan: loss is of type str, expected a function of the output"),
        ({"max_time": 1.2, "loss": lambda y: y}, NUMBER + "shape (8, 4)"),
        ({"max_time": 1.2, "loss": lambda y: 1.0}, NUMBER + "float"),
        ({"max_time": 1.2, "loss": lambda y: y.detach().sum()}, NUMBER + "shape (), without a graph"),
    ],
)
def test_options_that_are_none(limits, message):
    assert_refused(OptionError, message, lambda: inv.plan(net(), X, **limits))


@pytest.mark.parametrize("x", [{"x": X}, 3, "8,4", [X], (), (1.5, 4), ["8", 4]])
def test_inputs_that_are_none(x):
    message = f"plan: x is of type {type(x).__name__}, expected a tensor, a shape, or a tuple of them; the parts of a"
    assert_refused(OptionError, message, lambda: inv.plan(net(), x, max_time=1.5))
    assert_refused(OptionError, message, lambda: profile(net(), x))


@pytest.mark.parametrize("shape", [(-1, 4), (0, 4)])
def test_shapes_that_are_none(shape):
    message = f"plan: the shape is {shape}, expected positive sizes"
    assert_refused(OptionError, message, lambda: inv.plan(net(), shape, max_time=1.5))


def test_outputs_without_real_numbers():
    message = "plan: no real numbers come out, expected a tensor of them; pass loss=..."
    assert_refused(OptionError, message, lambda: inv.plan(inv.chain(net(), lambda y: y.argmax(1)), X, max_time=1.5))


@pytest.mark.parametrize("make", [nn.Sequential, inv.chain])
def test_chains_of_no_ops(make):
    message = "plan: the chain has no ops, expected one or more"
    assert_refused(OptionError, message, lambda: inv.plan(make(), X, max_time=1.5))
    assert_refused(OptionError, message, lambda: inv.plan(make(), X, budget="1MiB"))


def test_what_a_plan_refuses_later():
    plan = inv.plan(net(), X, max_time=1.5)
    assert_refused(OptionError, "budget is 0.5, expected one byte or more", lambda: plan.at(0.5))
    for x in ({"x": X}, (8, 4), None):
        message = f"plan.verify: x is of type {type(x).__name__}, expected a tensor, or a tuple of them"
        assert_refused(OptionError, message, lambda x=x: plan.verify(x))
    assert_refused(OptionError, NUMBER + "shape (8, 4)", lambda: plan.verify(X, loss=lambda y: y))
    message = "checkpoint: plan is of type str, expected that of invfunc.plan"
    assert_refused(OptionError, message, lambda: inv.checkpoint(net(), plan="plan.json"))


def test_costs_that_are_none():
    assert_refused(OptionError, "these are not costs, expected what Costs.to_json wrote", lambda: Costs.from_json("{"))
    costs = Costs((OpCosts("op", 0.0, 0.0, bytes=10, tape=20),))
    message = "budget 1 B is below the least found 30 B (op 0 'op': turn to backward); 30 bytes cost 1x the time"
    assert_refused(OptionError, message, lambda: inv.plan(costs, budget=1))
