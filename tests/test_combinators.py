"""The algebra by examples: what each combinator computes, how it prints, and what kind of value it is."""

import dataclasses
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from catalogue import mlp
from kit import assert_close
from torch import Tensor, nn

import invfunc as inv
from invfunc.wires import describe, leaves, map_wire, unflatten


def f(x: Tensor) -> Tensor:
    return torch.sin(x) * 2


def g(x: Tensor) -> Tensor:
    return torch.cos(x) + x


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def halved(y: Tensor) -> Tensor:
    return y / 2


double = inv.pair(doubled, halved)
exp = inv.pair(torch.exp, torch.log)
sinh = inv.pair(torch.sinh, torch.asinh)


# ---- wires -----------------------------------------------------------------------------------------------------------


def test_wires_flatten_and_unflatten() -> None:
    wire = (1, ((2, None), "three"), ())
    assert leaves(wire) == [1, 2, None, "three"]
    assert unflatten(wire, leaves(wire)) == wire
    assert map_wire(lambda a, b: (a, b), (1, (2,)), (3, (4,))) == ((1, 3), ((2, 4),))


def test_wires_of_different_structure_are_not_mapped_together() -> None:
    with pytest.raises(ValueError, match="shorter"):
        map_wire(lambda a, b: a, (1, 2), (1,))


def test_a_wire_described() -> None:
    assert describe((torch.zeros(2, 3), (None, 1.5), (torch.zeros(()),))) == "((2, 3), (None, float), ((),))"


# ---- split and concat ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_split_is_torch_chunk(count: int, dim: int) -> None:
    x = torch.randn(6, 6, 6)
    assert_close(inv.split(count, dim)(x), x.chunk(count, dim))
    assert_close(inv.concat(count, dim)(x.chunk(count, dim)), x)


@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 0, 4], (3, 2, 1)])
def test_split_by_sizes_is_torch_split(sizes: Any) -> None:
    x = torch.randn(2, 6)
    assert_close(inv.split(sizes)(x), x.split(list(sizes), 1))
    assert_close(inv.concat(sizes)(x.split(list(sizes), 1)), x)


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_interleaved_split_takes_every_nth_slice(count: int, dim: int) -> None:
    x = torch.randn(6, 6, 6)
    parts = tuple(x.movedim(dim, 0)[i::count].movedim(0, dim) for i in range(count))
    assert_close(inv.split(count, dim, interleaved=True)(x), parts)
    assert_close(inv.concat(count, dim, interleaved=True)(parts), x)


def test_split_moves_any_dtype() -> None:
    x = torch.arange(6)
    assert_close(inv.split(2, dim=0)(x), (x[:3], x[3:]))
    assert_close(inv.concat(2, dim=0)(x[:3] > 1, x[3:] > 1), x > 1)


def test_split_is_concat_inverted() -> None:
    assert inv.concat([1, 2], 0) == inv.invert(inv.split([1, 2], 0))
    assert inv.split(2, interleaved=True) == ~inv.concat(2, interleaved=True)


# ---- tuples ----------------------------------------------------------------------------------------------------------


def test_parallel_acts_on_each_component() -> None:
    a, b = torch.randn(3), torch.randn(3)
    op = inv.parallel(double, sinh)
    assert_close(op(a, b), (2 * a, b.sinh()))
    assert_close(op.inverse((a, b)), (a / 2, b.asinh()))


def test_wires_are_permuted() -> None:
    assert inv.swap()(1, 2) == (2, 1)
    assert inv.permute_wires([2, 0, 1])(1, 2, 3) == (3, 1, 2)
    assert inv.permute_wires([2, 0, 1]).inverse((3, 1, 2)) == (1, 2, 3)
    assert inv.permute_wires([1, 0]) == inv.swap()


def test_an_op_takes_a_tuple_as_arguments_or_as_one() -> None:
    assert inv.swap()((1, 2)) == inv.swap()(1, 2) == (2, 1)


def test_a_pair_receives_components_as_arguments() -> None:
    op = inv.pair(lambda a, b: (a + b, b), lambda a, b: (a - b, b))
    assert op(3, 4) == (7, 4)
    assert op.inverse((7, 4)) == (3, 4)


def test_wires_nest() -> None:
    op = inv.parallel(inv.couple(f), inv.parallel(inv.chain(), inv.swap()))
    a, b, c, d, e = torch.randn(5, 2, 3)
    assert_close(op(((a, b), (c, (d, e)))), ((a + f(b), b), (c, (e, d))))
    assert_close(op.inverse(op(((a, b), (c, (d, e))))), ((a, b), (c, (d, e))))


@pytest.mark.parametrize(
    "side", [None, 3, "text", torch.tensor([1, 2]), torch.tensor(True), {"a": 1}, [1, 2], object()]
)
def test_other_leaves_ride_along(side: Any) -> None:
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    op = inv.chain(inv.parallel(inv.couple(f, g), inv.chain()), inv.swap())
    for made in op, inv.checkpoint(op):
        (same, y) = made((a, b), side)
        assert same is side
        assert_close(y, inv.couple(f, g)(a, b))
        assert made.inverse((side, y))[1] is side
    y[1].sum().backward()
    assert a.grad is not None


def test_other_leaves_come_and_go() -> None:
    """A pair may use a leaf that is not differentiable, and return another."""
    op = inv.pair(lambda x, k: (x * k, (k, "unit")), lambda y, extra: (y / extra[0], extra[0]))
    x = torch.randn(3, requires_grad=True)
    y, extra = inv.checkpoint(op)(x, 4)
    y.sum().backward()
    assert extra == (4, "unit")
    assert_close(x.grad, torch.full((3,), 4.0))
    assert_close(op.inverse((y, extra)), (x, 4))


# ---- couplings -------------------------------------------------------------------------------------------------------


def test_couple_is_the_block_of_a_revnet() -> None:
    f, g = mlp(4), mlp(4)
    x1, x2 = torch.randn(2, 3, 4)
    y1 = x1 + f(x2)
    y2 = x2 + g(y1)
    assert_close(inv.couple(f, g)(x1, x2), (y1, y2))
    assert_close(inv.couple(f, g).inverse((y1, y2)), (x1, x2))


def test_one_half_leaves_the_second_component() -> None:
    x1, x2 = torch.randn(2, 3, 4)
    y1, y2 = inv.couple(f)(x1, x2)
    assert_close(y1, x1 + f(x2))
    assert y2 is x2


def test_a_coupling_within_one_tensor() -> None:
    op = inv.chain(inv.split(2), inv.couple(f, g), inv.concat(2))
    x = torch.randn(2, 6, 3)
    y1 = x[:, :3] + f(x[:, 3:])
    assert_close(op(x), torch.cat([y1, x[:, 3:] + g(y1)], 1))


def test_affine_couplings() -> None:
    x1, x2 = torch.randn(2, 3, 4)
    s, t = lambda x: x.exp(), lambda x: x.sin()
    y1 = x1 * s(x2) + t(x2)
    y2 = x2 * s(y1) + t(y1)
    both = lambda x: (s(x), t(x))  # noqa: E731
    assert_close(inv.couple(both, both, law=inv.affine)(x1, x2), (y1, y2))
    assert_close(inv.couple(both, both, law=inv.affine).inverse((y1, y2)), (x1, x2))


SCALES = [
    (inv.ops.exp_scale, lambda raw: raw.exp()),
    (inv.ops.sigmoid_scale, lambda raw: torch.sigmoid(raw + 2)),
    (partial(inv.ops.sigmoid_scale, shift=-1.0), lambda raw: torch.sigmoid(raw - 1)),
    (inv.ops.tanh_scale, lambda raw: raw.tanh().exp()),
    (partial(inv.ops.tanh_scale, bound=0.5), lambda raw: (0.5 * (raw / 0.5).tanh()).exp()),
]


@pytest.mark.parametrize(("scale", "formula"), SCALES)
def test_scales(scale: Any, formula: Any) -> None:
    x1, x2 = torch.randn(2, 3, 4)
    halves, rows = mlp(4, 8), lambda x: (x.sin(), x.cos())
    raw, t = halves(x2).chunk(2, 1)
    assert_close(inv.couple(scale(halves), law=inv.affine)(x1, x2), (x1 * formula(raw) + t, x2))
    assert_close(inv.couple(scale(rows), law=inv.affine)(x1, x2), (x1 * formula(x2.sin()) + x2.cos(), x2))


def test_the_halves_of_a_scale_lie_along_a_dim() -> None:
    s, t = inv.ops.exp_scale(lambda x: torch.cat([x, x + 1], -1), dim=-1)(torch.randn(2, 3, 4))
    assert_close(t - s.log(), torch.ones(2, 3, 4))


def test_the_scale_of_tanh_is_bounded() -> None:
    s, _ = inv.ops.tanh_scale(lambda x: (1e9 * x, x), 0.25)(torch.tensor([-1.0, 1.0]))
    assert_close(s.log(), torch.tensor([-0.25, 0.25]))


def test_any_constructor_is_a_law() -> None:
    law = lambda t: inv.pair(lambda x: x * t.exp(), lambda y: y / t.exp())  # noqa: E731
    x1, x2 = torch.randn(2, 3, 4)
    assert_close(inv.couple(f, g, law=law)(x1, x2)[0], x1 * f(x2).exp())
    assert_close(inv.couple(f, law=lambda t: inv.chain())(x1, x2), (x1, x2))


def test_a_law_may_broadcast() -> None:
    x1, x2 = torch.randn(3, 4), torch.randn(3, 1)
    assert_close(inv.couple(f)(x1, x2), (x1 + f(x2), x2))


# ---- chains ----------------------------------------------------------------------------------------------------------


def test_a_chain_runs_left_to_right() -> None:
    x = torch.randn(3)
    assert_close(inv.chain(double, exp)(x), (2 * x).exp())
    assert_close(inv.chain(double, exp).inverse(x.exp()), x / 2)
    assert_close((double >> exp)(x), inv.chain(double, exp)(x))


def test_plain_callables_join_a_chain() -> None:
    x = torch.randn(3)
    assert_close((double >> torch.sum)(x), (2 * x).sum())
    assert_close((torch.sum >> double)(x), 2 * x.sum())
    assert inv.chain(f, double) == f >> double


def test_pair_is_a_decorator() -> None:
    @inv.pair
    def shift(x: Tensor) -> Tensor:
        return x + 1

    op = shift(lambda y: y - 1)
    assert op.inverse(op(2)) == 2


def test_a_residue_is_hidden_and_handed_on() -> None:
    op = inv.pair(lambda x: (x.abs(), x.sign()), lambda r, y: r * y, residue=True, name="magnitude")
    x = torch.randn(3)
    assert_close(op(x), x.abs())
    y, r = inv.chain(op, double).forward_with_residue(x)
    assert_close(y, 2 * x.abs())
    assert_close(inv.chain(op, double).inverse_with_residue(r, y), x)


# ---- values ----------------------------------------------------------------------------------------------------------

MADE = {
    "chain()": inv.chain(),
    "pair(exp, log)": exp,
    "shift": inv.pair(doubled, halved, name="shift"),
    "invert(pair(exp, log))": inv.invert(exp),
    "one_way(sum)": inv.one_way(torch.sum),
    "one_way(pair(exp, log).inverse)": inv.one_way(exp.inverse),
    "one_way(Linear)": inv.one_way(nn.Linear(2, 2)),
    "chain(pair(exp, log), pair(sinh, asinh))": inv.chain(exp, sinh),
    "chain(invert(pair(sinh, asinh)), invert(pair(exp, log)))": ~inv.chain(exp, sinh),
    "parallel(pair(exp, log), chain())": inv.parallel(exp, inv.chain()),
    "split(2, dim=1)": inv.split(),
    "split([1, 2], dim=-1)": inv.split((1, 2), -1),
    "concat(3, dim=0, interleaved=True)": inv.concat(3, 0, interleaved=True),
    "swap()": inv.swap(),
    "permute_wires([2, 0, 1])": inv.permute_wires((2, 0, 1)),
    "permute_wires([1, 2, 0])": ~inv.permute_wires((2, 0, 1)),
    "couple(f, g)": inv.couple(f, g),
    "couple(Linear)": inv.couple(nn.Linear(2, 2)),
    "couple(f, law=<lambda>)": inv.couple(f, law=lambda t: double),
    "couple(exp_scale(f), law=affine)": inv.couple(inv.ops.exp_scale(f), law=inv.affine),
    "couple(tanh_scale(f, 1.0), law=affine)": inv.couple(inv.ops.tanh_scale(f), law=inv.affine),
    "invert(couple(f, g))": ~inv.couple(f, g),
    "checkpoint(couple(f, g))": inv.checkpoint(inv.couple(f, g)),
    "checkpoint(invert(couple(f, g)))": ~inv.checkpoint(inv.couple(f, g)),
    "additive(t)": inv.additive(torch.zeros(())),
    "affine(s, t)": inv.affine(torch.ones(()), torch.zeros(())),
}


@pytest.mark.parametrize("text", MADE)
def test_repr_reads_like_the_code(text: str) -> None:
    assert repr(MADE[text]) == text


@pytest.mark.parametrize("text", MADE)
def test_inverting_twice_gives_the_value_itself(text: str) -> None:
    assert ~~MADE[text] == MADE[text]
    assert repr(~~MADE[text]) == text


@pytest.mark.parametrize("text", MADE)
def test_values_are_frozen_and_hashable(text: str) -> None:
    op = MADE[text]
    for field in dataclasses.fields(op):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(op, field.name, None)
    assert len({op, op}) == 1


def test_chains_are_equal_however_they_were_built() -> None:
    f, g, h = exp, inv.couple(torch.sin), double
    assert inv.chain(inv.chain(f, g), h) == inv.chain(f, inv.chain(g, h)) == inv.chain(f, g, h)
    assert inv.chain(f) is f
    assert inv.chain(inv.chain(), f) is f
    assert inv.chain() == inv.chain(inv.chain(), inv.chain())
    assert ~inv.chain(f, g) == inv.chain(~g, ~f)
    assert inv.chain(f, g) != inv.chain(g, f)


def test_a_coupling_stays_one_op_in_a_chain() -> None:
    block = inv.couple(f, g)
    assert inv.chain(block, double).parts == (block, double)


def test_lowering_is_idempotent() -> None:
    op = inv.checkpoint(inv.chain(exp, double))
    assert inv.checkpoint(op) == op
    assert ~op == inv.checkpoint(~inv.chain(exp, double))


PICKLED = inv.chain(inv.split(2), inv.couple(f, g), inv.swap(), inv.parallel(double, ~sinh), inv.concat(2))


@pytest.mark.parametrize("op", [PICKLED, ~PICKLED, inv.checkpoint(PICKLED), inv.one_way(f)], ids=repr)
def test_values_made_of_module_level_functions_pickle(op: inv.Invertible) -> None:
    again = pickle.loads(pickle.dumps(op))
    x = torch.randn(2, 4)
    assert repr(again) == repr(op)
    assert_close(again(x), op(x))


def test_a_lowered_value_pickles_after_it_was_used() -> None:
    module = nn.Linear(2, 2)
    op = inv.checkpoint(inv.chain(inv.split(2), inv.couple(module, f), inv.concat(2)))
    x = torch.randn(2, 4, requires_grad=True)
    op(x).sum().backward()
    again = pickle.loads(pickle.dumps(op))
    assert_close(again(x), op(x))
