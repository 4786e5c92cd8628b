"""Couplings beyond two streams: what each computes, that every function runs twice a step, and what bad input says."""

from functools import partial

import pytest
import torch
from catalogue import Product, conv, mlp
from kit import Counted, assert_close
from torch import Tensor, func, nn

import invfunc as inv
from invfunc import ops
from invfunc.errors import OptionError, WireError
from invfunc.look.memory import measure


def streams(count: int, *shape: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape or (3, 4), requires_grad=True) for _ in range(count))


def runs(op: inv.Invertible, x: object, *fns: Counted) -> list[int]:
    """How often functions run in a lowered training step."""
    out = inv.checkpoint(op).forward(x)
    sum((leaf.sum() for leaf in inv.wires.leaves(out)), torch.zeros(())).backward()
    return [fn.count for fn in fns]


# ---- more than two streams -----------------------------------------------------------------------------------------


def test_each_reads_what_the_others_hold_by_then() -> None:
    f, g, h = Product(4), Product(4), Product(4)
    x1, x2, x3 = streams(3)
    y1, y2, y3 = ops.couple_streams([f, g, h])(x1, x2, x3)
    assert torch.equal(y1, x1 + f(x2, x3))
    assert torch.equal(y2, x2 + g(y1, x3))
    assert torch.equal(y3, x3 + h(y1, y2))


def test_sum_concat_and_previous() -> None:
    f, g, wide = mlp(4), mlp(4), mlp(8, 4)
    x1, x2, x3 = streams(3)
    y = ops.couple_streams([f, None, g], reads="sum")(x1, x2, x3)
    assert torch.equal(y[0], x1 + f(x2 + x3)) and y[1] is x2 and torch.equal(y[2], x3 + g(y[0] + x2))
    y = ops.couple_streams([None, wide, None], reads="concat")(x1, x2, x3)
    assert torch.equal(y[1], x2 + wide(torch.cat((x1, x3), 1)))
    y = ops.couple_streams([f, g, f], reads="previous")(x1, x2, x3)  # the grouped reversible block
    assert torch.equal(y[0], x1 + f(x2 + x3))
    assert torch.equal(y[1], x2 + g(y[0])) and torch.equal(y[2], x3 + f(y[1]))


def test_two_streams_are_a_coupling() -> None:
    f, g = mlp(4), mlp(4)
    x = streams(2)
    for a, b in zip(ops.couple_streams([f, g])(*x), inv.couple(f, g)(*x), strict=True):
        assert torch.equal(a, b)


def test_every_function_runs_twice_a_step() -> None:
    fns = [Counted(mlp(4)) for _ in range(4)]
    assert runs(ops.couple_streams(fns, reads="sum"), streams(4), *fns) == [2] * 4


def test_memory_of_streams_does_not_grow_with_depth() -> None:
    def held(depth: int) -> tuple[int, int]:
        op = inv.checkpoint(inv.chain(*(ops.couple_streams([mlp(64) for _ in range(3)], reads="sum"),) * depth))
        x = streams(3, 50, 64)
        taken = measure(lambda: op(*x))
        back = measure(lambda: torch.autograd.grad(sum(t.sum() for t in op(*x)), x))
        return taken.held_bytes, back.peak_bytes

    held(1)
    shallow, deep = held(2), held(8)
    assert deep[0] <= shallow[0] * 1.05
    assert deep[1] <= shallow[1] * 1.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ops.couple_streams([torch.sin]), "got 1 functions, expected one for each of two or more components"),
        (
            lambda: ops.couple_streams([torch.sin] * 2, reads="all"),
            "reads is 'all', expected one of 'each', 'sum', 'concat', 'previous'",
        ),
    ],
)
def test_options_of_streams(make, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_errors_of_streams_say_where() -> None:
    net = inv.chain(inv.chain(), ops.couple_streams([mlp(4), mlp(4, 3)], reads="sum"), inv.chain())
    with pytest.raises(WireError, match=r"^chain stage 0 .*: fns\[1\] returned \(3, 3\), expected \(3, 4\) like its"):
        inv.chain(net, inv.swap())(*streams(2))
    with pytest.raises(WireError, match="couple_streams of 2 components received the wrong number of components"):
        net(*streams(3))


def test_components_that_are_added_or_joined_fit_each_other() -> None:
    x = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1)
    added, joined = (ops.couple_streams([torch.sin, None, None], reads=reads) for reads in ("sum", "concat"))
    with pytest.raises(
        WireError, match=r"reads='sum' of components \(\(2, 3\), \(2, 1\)\), expected one shape; reads='ea"
    ):
        added(*x)
    with pytest.raises(
        WireError, match=r"reads='concat' of components .* expected shapes that differ along dim 1 alone"
    ):
        joined(x[0], x[1], torch.ones(1, 3))
    with pytest.raises(WireError, match=r"reads='concat': the input, expected a tensor of at least 2 dims, got \(3,\)"):
        joined(*(torch.ones(3),) * 3)


@pytest.mark.parametrize(
    ("make", "components", "couplings"),
    [
        (lambda f: ops.couple_streams([f, f, f], reads="sum", law=inv.affine), 3, 3),
        (lambda f: ops.masked_couple(f, torch.arange(4) > 1, law=inv.affine), 1, 1),
    ],
)
def test_with_its_log_determinant_too(make, components: int, couplings: int) -> None:
    f = Counted(inv.ops.tanh_scale(mlp(4, 8), dim=-1))  # type: ignore[arg-type]
    x = streams(components, 8, 4)
    runs(inv.with_log_det(make(f)), (x if components > 1 else x[0], torch.zeros(8)), f)
    assert f.count == 2 * couplings


# ---- a condition ---------------------------------------------------------------------------------------------------


class Conditioned(nn.Module):
    """A network on an input, a condition, and indices into a table."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.table = mlp(4), nn.Parameter(torch.randn(7, 4))

    def forward(self, x: Tensor, condition: Tensor, index: Tensor) -> Tensor:
        return self.net(x) * condition + self.table[index]


def test_a_condition_reaches_every_function_and_gets_its_gradient() -> None:
    nets = [Conditioned() for _ in range(6)]
    op = inv.chain(*(ops.given(inv.couple(f, g)) for f, g in zip(nets[::2], nets[1::2], strict=True)))
    x1, x2, c = streams(3)
    index = torch.tensor([0, 6, 2])
    (y1, y2), (same, i) = op((x1, x2), (c, index))
    assert torch.equal(same, c) and i is index
    a = x1 + nets[0](x2, c, index)
    assert torch.equal(ops.given(inv.couple(*nets[:2]))((x1, x2), (c, index))[0][0], a)

    def gradients(op: inv.Invertible) -> tuple[Tensor, ...]:
        (y1, y2), _ = op((x1, x2), (c, index))
        return torch.autograd.grad((y1.sin() + y2.cos()).sum(), [x1, x2, c, *(p for n in nets for p in n.parameters())])

    for plain, lowered in zip(gradients(op), gradients(inv.checkpoint(op)), strict=True):
        assert_close(lowered, plain, 1e-11, relative=0)
        assert plain.abs().max() > 0


def test_a_condition_on_the_wire_is_one_in_a_closure() -> None:
    f = Product(4)
    x1, x2, c = streams(3)
    closed = inv.couple(lambda x: f(x, c))
    (y1, _), _ = ops.given(inv.couple(f))((x1, x2), c)
    assert torch.equal(closed(x1, x2)[0], y1)
    on_wire = torch.autograd.grad(inv.checkpoint(ops.given(inv.couple(f)))((x1, x2), c)[0][0].sin().sum(), [x2, c])
    in_closure = torch.autograd.grad(inv.checkpoint(closed)(x1, x2)[0].sin().sum(), [x2, c])
    for a, b in zip(on_wire, in_closure, strict=True):
        assert_close(a, b, 1e-12, relative=0)


def test_given_goes_through_compositions() -> None:
    f, g = Product(4), Product(4)
    inner = inv.chain(inv.couple(f), inv.swap(), inv.pair(torch.exp, torch.log) >> inv.chain())
    op = inv.parallel(inv.couple(f, g), inv.chain(inv.couple(g), inv.swap()))
    x1, x2, x3, x4, c = streams(5)
    (left, right), same = ops.given(op)(((x1, x2), (x3, x4)), c)
    assert torch.equal(left[0], x1 + f(x2, c)) and torch.equal(left[1], x2 + g(left[0], c))
    assert right[0] is x4 and torch.equal(right[1], x3 + g(x4, c)) and same is c
    assert isinstance(ops.given(inv.checkpoint(inner)), inv.Invertible)
    back = ops.given(inv.invert(op))((left, right), c)
    for a, b in zip(inv.wires.leaves(back), (x1, x2, x3, x4, c), strict=True):
        assert_close(a, b, 1e-12, relative=0)


def test_given_goes_through_marks() -> None:
    f, (x1, x2, c) = Product(4), streams(3)
    block = inv.couple(f, f)
    marked = inv.chain(inv.mark(block, "recompute"), inv.mark(block, "store"), inv.mark(block, "invert"))
    plain, lowered = (
        torch.autograd.grad(run((x1, x2), c)[0][0].sin().sum(), [x1, x2, c, *f.parameters()])
        for run in (ops.given(inv.chain(block, block, block)), inv.checkpoint(ops.given(marked)))
    )
    for a, b in zip(plain, lowered, strict=True):
        assert_close(b, a, 1e-11, relative=0)


def test_given_works_with_every_coupling() -> None:
    f, c = Product(4), torch.randn(3, 4)
    x1, x2, x3 = streams(3)
    cases = [
        (ops.couple_streams([f, None, f], reads="sum"), (x1, x2, x3)),
        (ops.masked_couple(f, torch.arange(4) > 1), x1),
        (ops.momentum(f, 0.5), (x1, x2)),
        (ops.midpoint(f, 0.5), (x1, x2)),
        (ops.leapfrog(f, 0.5), (x1, x2)),
        (ops.recursive_couple(lambda x, c: x * c[:, :2], sizes=2), x1),
    ]
    for op, x in cases:
        y, _ = ops.given(op)(x, c)
        closed, _ = ops.given(op).inverse((y, c))
        for a, b in zip(inv.wires.leaves(closed), inv.wires.leaves(x), strict=True):
            assert_close(a, b, 1e-12, relative=0)


def test_the_log_determinant_of_a_conditioned_op() -> None:
    op = ops.given(inv.couple(lambda x, c: (torch.exp(x * c), x), law=inv.affine))
    x1, x2, c = streams(3)
    _, total = inv.log_det(op, ((x1, x2), c))
    assert_close(total, (x2 * c).sum(1), 1e-12, relative=0)


def test_a_condition_can_be_mapped_over() -> None:
    f = Product(4)
    x1, x2 = streams(2)
    cs = torch.randn(5, 3, 4)
    op = inv.checkpoint(ops.given(inv.couple(f, f)))

    def loss(c: Tensor) -> Tensor:
        return op((x1, x2), c)[0][0].sin().sum()

    found = func.vmap(func.grad(loss))(cs)
    for i in range(5):
        assert_close(found[i], func.grad(loss)(cs[i]), 1e-12, relative=0)


def test_conditioned_functions_run_twice_a_step() -> None:
    f, g = Counted(Product(4)), Counted(Product(4))
    x1, x2, c = streams(3)
    assert runs(ops.given(inv.couple(f, g)), ((x1, x2), c), f, g) == [2, 2]


def test_errors_of_given() -> None:
    with pytest.raises(OptionError, match=r"given: pair\(exp, log\) has no coupling, expected a function that could"):
        ops.given(inv.pair(torch.exp, torch.log))
    with pytest.raises(OptionError, match="given: got exp, expected an invertible op"):
        ops.given(torch.exp)  # type: ignore[arg-type]
    with pytest.raises(WireError, match=r"given received \(3, 4\), expected a pair \(x, condition\); pass op"):
        ops.given(inv.couple(torch.add))(torch.zeros(3, 4))


# ---- a mask --------------------------------------------------------------------------------------------------------


def test_a_masked_coupling_is_the_formula_of_real_nvp() -> None:
    mask = ops.checkerboard_mask([4, 6])
    net = inv.ops.tanh_scale(conv(3, 6))
    x = torch.randn(2, 3, 4, 6)
    m = mask.double()
    s, t = net(m * x)
    expected = m * x + (1 - m) * (s * x + t)
    y, total = inv.log_det(ops.masked_couple(net, mask, law=inv.affine), x)
    assert_close(y, expected, 1e-13, relative=0)
    assert_close(total, ((1 - m) * s.log()).sum((1, 2, 3)), 1e-12, relative=0)


def test_a_masked_function_runs_twice_a_step() -> None:
    f = Counted(mlp(4))
    assert runs(ops.masked_couple(f, torch.arange(4) > 1), streams(1)[0], f) == [2]


def test_what_a_net_says_under_the_mask_is_not_used() -> None:
    class Wild(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(torch.arange(4) > 1, torch.nan, x.flip(-1))

    x = streams(1)[0]
    op = ops.masked_couple(Wild(), torch.arange(4) > 1)
    for run in (op, inv.checkpoint(op)):
        y = run(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert y.isfinite().all() and torch.equal(gradient, torch.tensor([1.0, 1, 2, 2]).expand(3, 4))


def test_masks_of_other_kinds() -> None:
    x = torch.randn(2, 4)
    a = ops.masked_couple(torch.sin, torch.tensor([1, 0, 0, 1]))(x)
    b = ops.masked_couple(torch.sin, torch.tensor([True, False, False, True]))(x)
    assert torch.equal(a, b) and torch.equal(a[:, 0], x[:, 0]) and torch.equal(a[:, 1:3], x[:, 1:3])  # sin(0) = 0
    everything = ops.masked_couple(torch.cos, torch.ones(4, dtype=torch.bool))
    assert torch.equal(everything(x), x)
    one = ops.masked_couple(torch.cos, torch.tensor([True, False, False, True]))
    assert torch.equal(func.vmap(one)(x), one(x))  # without a batch, too


def test_split_mask_moves_elements() -> None:
    mask = ops.checkerboard_mask([2, 3])
    x = torch.arange(12).reshape(2, 2, 3)
    on, off = ops.split_mask(mask)(x)
    assert torch.equal(on, x[:, mask]) and torch.equal(off, x[:, ~mask])
    assert torch.equal(ops.split_mask(mask).inverse((on, off)), x)


def test_errors_of_masks() -> None:
    op = ops.masked_couple(mlp(4, 3), torch.arange(4) > 1)
    with pytest.raises(
        WireError, match=r"a mask of shape \(4,\) on \(2, 3\), expected a tensor of shape \(batch, ..., 4\)"
    ):
        op(torch.zeros(2, 3))
    with pytest.raises(
        WireError, match=r"Sequential returned \(2, 3\), expected \(2, 4\) like the tensor that is masked"
    ):
        op(torch.zeros(2, 4))
    with pytest.raises(
        WireError, match=r"merge_mask received \(\(2, 2\), \(2, 1\)\), expected .* 1\) and \(batch, \.\.\., 2\)"
    ):
        ops.split_mask(torch.arange(3) > 1).inverse((torch.zeros(2, 2), torch.zeros(2, 1)))
    with pytest.raises(OptionError, match="mask is None, expected a bool tensor with at least one dimension"):
        ops.split_mask(None)  # type: ignore[arg-type]


# ---- splines -------------------------------------------------------------------------------------------------------


def test_a_spline_coupling_takes_its_parameters_from_channels() -> None:
    f = Counted(conv(2, 3 * 11))
    op = ops.spline_couple(f, bins=4)
    x = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 4, 4)
    parameters = f(x[1]).reshape(2, 3, 11, 4, 4).permute(0, 1, 3, 4, 2)
    y = op(*x)
    assert_close(y[0], ops.rational_quadratic_spline(parameters)(x[0]), 1e-13, relative=0)
    f.count = 0
    assert runs(op, tuple(t.requires_grad_() for t in x), f) == [2]


def test_errors_of_per_element() -> None:
    with pytest.raises(
        WireError, match=r"per_element\(Sequential, 5\): the net returned \(3, 4\), expected a multiple of 5"
    ):
        inv.couple(ops.per_element(mlp(4), 5), law=ops.linear_spline)(*streams(2))
    with pytest.raises(OptionError, match="per_element: count is 0, expected a positive number"):
        ops.per_element(torch.sin, 0)
    with pytest.raises(OptionError, match="spline_couple: bins is 0, expected a positive number"):
        ops.spline_couple(torch.sin, bins=0)


# ---- recursion -----------------------------------------------------------------------------------------------------


def test_a_recursive_coupling_is_triangular_and_dense_below() -> None:
    inner = partial(ops.recursive_couple, mlp(1), dim=-1)
    op = ops.recursive_couple(mlp(2), inner(), inner(), dim=-1)
    jacobian = func.jacrev(op)(torch.randn(4))
    assert torch.equal(jacobian.triu(1), torch.zeros(4, 4))
    assert torch.equal(jacobian.tril(-1) != 0, torch.ones(4, 4).tril(-1).bool())


def test_functions_of_a_tree_run_twice_a_step() -> None:
    f, g, h = Counted(mlp(2)), Counted(mlp(1)), Counted(mlp(1))
    op = ops.recursive_couple(f, ops.recursive_couple(g, dim=-1), ops.recursive_couple(h, dim=-1), dim=-1)
    assert runs(op, streams(1)[0], f, g, h) == [2, 2, 2]


def test_recursion_with_other_sizes() -> None:
    op = ops.recursive_couple(mlp(1, 3), second=ops.recursive_couple(mlp(2, 1), sizes=[2, 1]), sizes=[1, 3])
    x = streams(1)[0]
    assert_close(op.inverse(op(x)), x, 1e-13, relative=0)
    with pytest.raises(OptionError, match=r"recursive_couple: sizes is \[1, 1, 2\], expected 2, or two sizes"):
        ops.recursive_couple(torch.sin, sizes=[1, 1, 2])
