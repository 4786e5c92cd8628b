"""Log-determinants: each rule against the Jacobian, the walk against the algebra, and what flows are built from it."""

import gc
from collections.abc import Callable

import pytest
import torch
from catalogue import EXAMPLES, conv, mlp, weight
from kit import assert_close
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, TransformedDistribution
from torch.distributions import transforms as T

import invfunc as inv
from invfunc.errors import NotDifferentiableError, OptionError, WireError
from invfunc.log_det import autodiff_log_det, zeros_for
from invfunc.look.memory import measure
from invfunc.testing import check_laws

LAWS = ["section", "retraction", "checkpoint_gradients", "checkpoint_twice", "checkpoint_functional", "checkpoint_vmap"]


def counted(op: inv.Invertible, x: object) -> tuple[object, Tensor]:
    """An input of ``with_log_det(op)`` with a total that is not zero."""
    return x, torch.randn_like(zeros_for(x))


# ---- the rules -----------------------------------------------------------------------------------------------------


# Pairs of functions alone, and what is no map between spaces of one size.
WITHOUT_RULE = {
    *("pair", "pair, complex", "pair, closures", "pair, residue", "pair, two components"),
    *("one_way", "checkpoint, one_way", "parallel, residue", "couple, law of nested values"),
    *("couple, law with a pullback", "relu", "tall_linear", "conv2d, tall", "conv2d, groups", "conv2d, padding"),
    *("conv2d, overlap", "conv2d, ceil_mode", "rfft", "rfft, size", "pad", "pad, reflect", "pad_to_multiple"),
    *("pad_to_multiple, replicate", "momentum, 0", "enter_streams", "enter_streams, momentum", "leave_streams"),
    "enter_streams, function",
}


@pytest.mark.parametrize("name", sorted(WITHOUT_RULE))
def test_an_op_without_a_rule_says_so(name):
    with pytest.raises(NotDifferentiableError, match="has no rule for its log-determinant; give it one"):
        inv.log_det(EXAMPLES[name].make(), EXAMPLES[name].inputs()[1])


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in WITHOUT_RULE])
def test_with_its_log_det_an_op_is_an_op(name):
    example = EXAMPLES[name]
    op, without = example.make(), dict(example.without)
    x = example.inputs()[1]
    laws = [law for law in LAWS if law not in without]
    check_laws(inv.with_log_det(op), counted(op, x), laws=laws)


def test_a_rule_is_about_each_element_of_the_batch():
    x = torch.randn(4, 3, 2)
    op = inv.ops.tanh()
    one_by_one = torch.cat([inv.log_det(op, x[i : i + 1])[1] for i in range(4)])
    assert_close(inv.log_det(op, x)[1], one_by_one)


# ---- the walk ------------------------------------------------------------------------------------------------------


def pipeline(depth: int = 2) -> inv.Invertible:
    blocks = [
        part
        for _ in range(depth)
        for part in (
            inv.couple(inv.ops.tanh_scale(mlp(2, 4), 0.5), inv.ops.tanh_scale(mlp(2, 4), 0.5), law=inv.affine),
            inv.parallel(inv.ops.leaky_relu(0.5), inv.chain(inv.ops.asinh(), inv.ops.leaky_tanh(1.0))),
        )
    ]
    return inv.chain(inv.split(2), *blocks, inv.swap(), inv.invert(inv.couple(mlp(2), mlp(2))), inv.concat(2))


def same(f: inv.Invertible, g: inv.Invertible, x: object) -> None:
    """Two ops do the same, forward and inverse."""
    y = g.forward(x)
    assert_close(f.forward(x), y)
    assert_close(f.inverse(y), g.inverse(y))


def test_chains_parallels_and_couplings_derive_theirs():
    op, x = pipeline(), torch.randn(3, 4)
    assert_close(inv.log_det(op, x)[1], autodiff_log_det(op, x, None))


def test_it_respects_composition():
    f, g, x = pipeline(), inv.ops.sinh(), torch.randn(3, 4)
    same(inv.with_log_det(inv.chain(f, g)), inv.chain(inv.with_log_det(f), inv.with_log_det(g)), counted(f, x))


def test_it_respects_inversion():
    f, y = pipeline(), torch.randn(3, 4)
    same(inv.with_log_det(inv.invert(f)), inv.invert(inv.with_log_det(f)), counted(f, y))


def test_it_respects_lowering():
    f, x = pipeline(), torch.randn(3, 4)
    same(inv.with_log_det(inv.checkpoint(f)), inv.checkpoint(inv.with_log_det(f)), counted(f, x))


def test_it_respects_marks_and_modes():
    f = pipeline()
    marked = inv.chain(
        inv.mark(f, "store"), inv.mark(f, "recompute"), inv.checkpoint(inv.mark(f, "invert"), mode="store")
    )
    x = torch.randn(3, 4)
    assert_close(inv.log_det(marked, x), inv.log_det(inv.chain(f, f, f), x))


def test_log_determinants_of_inverse_and_op_cancel():
    f, x = pipeline(), torch.randn(3, 4)
    assert_close(inv.log_det(inv.chain(f, inv.invert(f)), x), (x, torch.zeros(3)))


def test_a_residue_is_threaded():
    op = inv.chain(inv.split(2), inv.parallel(inv.ops.abs(), inv.ops.exp()), inv.couple(mlp(2)))
    x = torch.randn(3, 4)
    lifted = inv.with_log_det(op)
    y, residue = lifted.forward_with_residue((x, torch.zeros(3)))
    assert_close(lifted.inverse_with_residue(residue, y), (x, torch.zeros(3)))
    check_laws(lifted, (x, torch.zeros(3)))


def bent(t: Tensor) -> inv.Invertible:
    """A law that leaves a residue."""
    return inv.chain(inv.additive(t), inv.ops.abs())


LEAVE_RESIDUES = {
    "chain": lambda: inv.chain(lift(), inv.ops.abs(), lift(), inv.ops.abs(), inv.ops.sinh(), inv.split(2)),
    "parallel": lambda: inv.chain(inv.split(2), inv.parallel(inv.ops.abs(), lift()), inv.couple(mlp(2), mlp(2))),
    "couple": lambda: inv.chain(inv.split(2), inv.couple(mlp(2), law=bent), inv.couple(mlp(2), mlp(2), law=bent)),
    "invert": lambda: inv.chain(lift(), inv.invert(inv.invert(inv.ops.abs())), inv.split(2), ~inv.couple(mlp(2))),
    "batch_norm": lambda: inv.chain(inv.ops.batch_norm(1 + weight(4), weight(4), training=True), lift(), inv.split(2)),
}
LOWER = {
    "inverted": inv.checkpoint,
    "in segments": lambda op: inv.checkpoint(op, segments=2),
    "recomputed": lambda op: inv.checkpoint(op, mode="recompute"),
    "recomputed in segments": lambda op: inv.checkpoint(op, mode="recompute", segments=2),
    "stored": lambda op: inv.checkpoint(op, mode="store"),
    "in parts": lambda op: inv.checkpoint(
        inv.chain(inv.mark(op.parts[0], "recompute"), *op.parts[1:-1], inv.mark(op.parts[-1], "store"))
    ),
}


@pytest.mark.parametrize("name", LEAVE_RESIDUES)
@pytest.mark.parametrize("how", LOWER)
def test_residues_however_it_is_lowered(name, how):
    op, x = LEAVE_RESIDUES[name](), torch.randn(6, 4, requires_grad=True)
    parameters = [x, *parameters_of(op)]

    def gradient(op: inv.Invertible) -> tuple[Tensor, ...]:
        (a, b), total = inv.log_det(op, x)
        return torch.autograd.grad(a.sin().sum() + b.cos().sum() + total.square().sum(), parameters)

    lowered = LOWER[how](op)
    assert_close(gradient(lowered), gradient(op), 1e-10)
    counting, start = inv.with_log_det(lowered), (x.detach(), torch.randn(6))
    y, residue = counting.forward_with_residue(start)
    assert_close(counting.inverse_with_residue(residue, y), start, 1e-10)


def test_nested_couplings_and_recursion():
    inner = inv.chain(inv.split(2), inv.couple(mlp(1), law=inv.additive), inv.concat(2))
    op = inv.chain(inv.split(2), inv.parallel(inner, inv.ops.tanh()), inv.couple(mlp(2), mlp(2)), inv.concat(2))
    x = torch.randn(3, 4)
    assert_close(inv.log_det(op, x)[1], autodiff_log_det(op, x, None))


def test_any_constructor_of_an_op_is_a_law():
    nets = [nn.Sequential(mlp(2, 2 * size), nn.Unflatten(-1, (2, size))) for size in (11, 12)]
    spline, mixture = inv.ops.rational_quadratic_spline, inv.ops.mixture_logit
    op = inv.chain(inv.couple(nets[0], law=spline), inv.couple(nets[1], law=mixture), inv.couple(mlp(2), law=power_of))
    x = torch.randn(3, 2), torch.rand(3, 2) + 0.5
    assert_close(inv.log_det(op.parts[0], x)[1], autodiff_log_det(op.parts[0], x, None))
    assert_close(inv.log_det(op.parts[1], x)[1], autodiff_log_det(op.parts[1], x, None))
    check_laws(inv.with_log_det(op.parts[1]), counted(op, x), laws=LAWS)


def power_of(t: Tensor) -> inv.Invertible:
    return inv.ops.power(t.exp())


def test_a_function_is_evaluated_once_in_forward_and_once_in_backward():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = mlp(2, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x)

    nets = [Counter() for _ in range(6)]
    op = inv.chain(
        inv.split(2),
        inv.couple(inv.ops.tanh_scale(nets[0]), inv.ops.tanh_scale(nets[1]), law=inv.affine),
        inv.invert(inv.couple(inv.ops.tanh_scale(nets[2]), inv.ops.tanh_scale(nets[3]), law=inv.affine)),
        inv.couple(inv.ops.tanh_scale(nets[4]), inv.ops.tanh_scale(nets[5]), law=inv.affine),
    )
    _, total = inv.log_det(inv.checkpoint(op), torch.randn(3, 4))
    assert [net.calls for net in nets] == [1] * 6
    total.sum().backward()
    assert [net.calls for net in nets] == [2] * 6


# ---- a flow with many steps ----------------------------------------------------------------------------------------


class Two(nn.Module):
    """Scale and shift for the half of an image that a coupling changes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = conv(channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def steps(count: int, channels: int) -> list[inv.Invertible]:
    scaled = [inv.ops.tanh_scale(Two(channels // 2), 0.3) for _ in range(2 * count)]
    halves = inv.split(2), inv.concat(2)
    return [
        part
        for f, g in zip(scaled[::2], scaled[1::2], strict=True)
        for part in (halves[0], inv.couple(f, g, law=inv.affine), inv.parallel(lift(), lift()), halves[1])
    ]


def lift() -> inv.Invertible:
    return inv.affine(1 + weight(1, scale=0.1), weight(1, scale=0.1))


def multiscale(count: int) -> inv.Invertible:
    """Two scales: half of the channels leave after the first."""
    second = inv.chain(*steps(count, 4))
    return inv.chain(*steps(count, 8), inv.split(2), inv.parallel(second, inv.chain()))


def gradients(op: inv.Invertible, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    density = inv.flow(op, (Normal(0.0, 1.0), Normal(0.0, 1.0)))
    return torch.autograd.grad(-density.log_prob(x).mean(), parameters)


def parameters_of(op: inv.Invertible) -> list[Tensor]:
    from invfunc.engine.snapshot import Parts

    found = Parts(op.functions)
    return [*found.tensors, *(p for module in found.roots for p in module.parameters())]


def test_a_lowered_flow_has_the_gradients_of_a_plain_one():
    op, x = multiscale(8), torch.randn(2, 8, 4, 4)
    parameters = parameters_of(op)
    assert len(parameters) > 100
    assert_close(gradients(inv.checkpoint(op), x, parameters), gradients(op, x, parameters))


def test_the_peak_of_a_lowered_flow_does_not_depend_on_its_depth():
    gc.disable()
    try:
        peaks, x = [], torch.randn(4, 8, 8, 8)
        for depth in (4, 32):
            op = multiscale(depth)
            fast = inv.checkpoint(op, drift="off")  # 64 untrained steps do drift; what counts here is memory
            density = inv.flow(fast, (Normal(0.0, 1.0), Normal(0.0, 1.0)))
            parameters = parameters_of(op)
            for p in parameters:
                p.grad = torch.zeros_like(p)
            peaks.append(measure(lambda d=density: (-d.log_prob(x).mean()).backward()).peak_bytes)
    finally:
        gc.enable()
    assert peaks[1] <= peaks[0] + 0.05 * x.numel() * 8 * 32  # a few vectors of the batch a step, no activation
    assert peaks[1] <= 1.2 * peaks[0]


# ---- without a rule ------------------------------------------------------------------------------------------------


class Mix(nn.Module):
    """An invertible function without a rule, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def inverse(self, y: Tensor) -> Tensor:
        return y @ torch.linalg.inv(self.weight).T


def test_autodiff_stands_in_for_a_rule():
    mix, x = Mix(), torch.randn(4, 3)
    op = inv.pair(mix, mix.inverse, name="mix")
    expected = torch.linalg.slogdet(mix.weight)[1]
    assert_close(inv.log_det(op, x, exact="autodiff")[1], expected.expand(4))
    assert_close(inv.log_det(inv.invert(op), x, exact="autodiff")[1], -expected.expand(4))
    check_laws(inv.with_log_det(op, exact="autodiff"), counted(op, x), laws=LAWS)
    check_laws(inv.with_log_det(inv.invert(op), exact="autodiff"), counted(op, x), laws=LAWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autodiff_in_half_precision(dtype):
    x = torch.randn(4, 3)
    _, found = inv.log_det(inv.pair(torch.sinh, torch.asinh), x.to(dtype), exact="autodiff")
    assert found.dtype == torch.float32
    assert_close(found.double(), inv.log_det(inv.ops.sinh(), x)[1], 8 * torch.finfo(dtype).eps)


def test_autodiff_through_closures_and_laws():
    w = weight(2)

    def law(t: Tensor) -> inv.Invertible:
        return inv.pair(lambda x: x * (1 + t.sigmoid() * w**2), lambda y: y / (1 + t.sigmoid() * w**2))

    op, x = inv.couple(mlp(2), mlp(2), law=law), (torch.randn(3, 2), torch.randn(3, 2))
    lifted = inv.with_log_det(op, exact="autodiff")
    assert_close(lifted((x, torch.zeros(3)))[1], autodiff_log_det(op, x, None))
    check_laws(lifted, counted(op, x), laws=LAWS)


def test_autodiff_of_a_one_way_stage_needs_no_inverse():
    op, x = inv.chain(inv.ops.exp(), inv.one_way(mlp(3)), inv.ops.sinh()), torch.randn(2, 3)
    y, total = inv.log_det(inv.checkpoint(op), x, exact="autodiff")
    assert_close(total, autodiff_log_det(op, x, y))


def test_autodiff_needs_a_square_jacobian():
    with pytest.raises(NotDifferentiableError, match="maps 3 numbers to 2, expected as many as it received"):
        inv.log_det(inv.one_way(mlp(3, 2)), torch.randn(2, 3), exact="autodiff")


def opaque() -> inv.Invertible:
    return inv.pair(torch.neg, torch.neg, name="opaque()")


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (opaque, r"^opaque\(\) has no rule for its log-determinant; give it one with pair\(\.\.\., log_det=\), or"),
        (lambda: inv.chain(inv.ops.exp(), opaque()), r"^chain stage 1 \(opaque\): opaque\(\) has no rule"),
        (lambda: inv.invert(inv.chain(opaque(), inv.ops.exp())), r"^chain stage 1 \(invert\): opaque\(\) has no rule"),
        (lambda: inv.parallel(inv.ops.exp(), opaque()), r"^parallel component 1 \(opaque\): opaque\(\)"),
        (lambda: inv.checkpoint(inv.chain(inv.ops.exp(), opaque())), r"^chain stage 1 \(opaque\)"),
        (lambda: inv.chain(inv.ops.exp(), torch.sin), r"^chain stage 1 \(one_way\): one_way\(sin\) has no rule"),
        (inv.ops.relu, r"^relu\(\) has no rule"),
    ],
)
def test_an_op_without_a_rule_is_named_with_its_place(make: Callable[[], inv.Invertible], where: str):
    with pytest.raises(NotDifferentiableError, match=where):
        inv.with_log_det(make())


def test_a_law_without_a_rule_is_named_when_it_is_called():
    op = inv.chain(inv.split(2), inv.couple(mlp(2), law=lambda t: opaque()))
    with pytest.raises(NotDifferentiableError, match=r"chain stage 1 \(couple\): .*opaque\(\) has no rule"):
        inv.log_det(op, torch.randn(3, 4))


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_the_wire_is_checked():
    op = inv.with_log_det(inv.ops.exp())
    with pytest.raises(WireError, match=r"received \(3, 2\), expected \(x, total\).*; log_det\(op, x\) starts"):
        op(torch.randn(3, 2))
    with pytest.raises(WireError, match=r"a total of shape \(2,\), expected \(3,\), the batch of \(3, 2\)"):
        op(torch.randn(3, 2), torch.zeros(2))
    with pytest.raises(WireError, match=r"log-determinants of \(\), expected a batch"):
        inv.log_det(inv.ops.exp(), torch.tensor(1.0))


def test_a_rule_of_the_wrong_shape_is_an_error():
    op = inv.pair(torch.exp, torch.log, log_det=lambda x, y: x.sum(), name="exp")
    with pytest.raises(WireError, match=r"log_det of exp returned \(\), expected \(3,\), one number for each"):
        inv.log_det(op, torch.randn(3, 2))


def test_exact_is_checked():
    with pytest.raises(OptionError, match=r"with_log_det: exact is 'yes', expected None or 'autodiff'"):
        inv.with_log_det(inv.ops.exp(), exact="yes")


@pytest.mark.parametrize("wrap", [lambda op: op, inv.with_log_det])
def test_couplings_check_as_they_do_without_log_det(wrap):
    x = torch.randn(3, 2), torch.randn(3, 4)
    wire = x if wrap(inv.chain()) == inv.chain() else (x, torch.zeros(3))
    with pytest.raises(WireError, match=r"f returned \(3, 3\), expected \(3, 2\) like its partner component"):
        wrap(inv.couple(mlp(4, 3)))(*wire)
    with pytest.raises(WireError, match=r"f returned \(3, 4\), expected \(s, t\) for law affine"):
        wrap(inv.couple(mlp(4), law=inv.affine))(*wire)
    with pytest.raises(OptionError, match="law broken returned int, expected an invertible op"):
        wrap(inv.couple(mlp(4), law=broken))(*wire)


def broken(t: Tensor) -> int:
    return 3


def test_it_reads_like_the_code():
    op = inv.chain(inv.ops.exp(), inv.couple(torch.sin))
    assert repr(inv.with_log_det(op)) == "with_log_det(chain(exp(), couple(sin)))"
    assert repr(inv.invert(inv.with_log_det(inv.ops.exp()))) == "with_log_det(invert(exp()))"
    with pytest.raises(WireError, match=r"^chain stage 1 \(couple\)"):
        inv.log_det(op, torch.randn(3, 4))


# ---- flows ---------------------------------------------------------------------------------------------------------


def test_a_density_integrates_to_one():
    op = inv.chain(inv.ops.rational_quadratic_spline(weight(1, 5), weight(1, 5), weight(1, 4)), lift())
    x = torch.linspace(-12, 12, 20001).unsqueeze(1)
    density = inv.flow(op, Normal(0.0, 1.0)).log_prob(x).exp()
    assert torch.trapezoid(density, x[:, 0]).item() == pytest.approx(1, abs=1e-6)


def test_a_flow_is_a_transformed_distribution():
    scale, x = torch.tensor([0.5, 2.0]), torch.rand(5, 2) + 0.1
    expected = TransformedDistribution(Normal(torch.zeros(2), scale), [T.ExpTransform()]).log_prob(x).sum(1)
    assert_close(inv.flow(inv.ops.log(), Normal(torch.zeros(2), scale)).log_prob(x), expected)
    assert_close(inv.flow(inv.ops.log(), Independent(Normal(torch.zeros(2), scale), 1)).log_prob(x), expected)


def test_samples_have_the_density():
    density = inv.flow(inv.invert(inv.ops.asinh()), Normal(0.0, 0.3))
    x = density.sample((40000, 1))
    z = torch.sinh(x)
    assert z.std().item() == pytest.approx(0.3, rel=0.02)
    assert not x.requires_grad


def test_shapes_of_samples():
    whole = inv.flow(pipeline(), Normal(torch.zeros(4), 1.0))
    assert whole.sample(5).shape == whole.sample((5,)).shape == whole.rsample([5]).shape == (5, 4)
    assert inv.flow(pipeline(), Normal(0.0, 1.0)).sample((5, 4)).shape == (5, 4)


@pytest.mark.parametrize("wrap", [lambda op: op, inv.checkpoint])
def test_rsample_has_gradients_and_its_log_prob(wrap):
    op = pipeline()
    density = inv.flow(wrap(op), Normal(torch.zeros(4), 1.0))
    torch.manual_seed(1)
    x, found = density.rsample_and_log_prob(6)
    torch.manual_seed(1)
    assert_close(x, density.rsample(6))
    assert_close(found, density.log_prob(x))
    parameters = parameters_of(op)
    torch.manual_seed(1)
    plain, expected = inv.flow(op, density.base).rsample_and_log_prob(6)
    gradient = torch.autograd.grad(found.sum() + x.square().sum(), parameters)
    assert_close(gradient, torch.autograd.grad(expected.sum() + plain.square().sum(), parameters))


def test_a_base_for_each_component():
    base = Normal(torch.zeros(4, 4, 4), 1.0), Normal(torch.zeros(4, 4, 4), 2.0)
    op = multiscale(1)
    density = inv.flow(op, base)
    x = density.sample(3)
    assert x.shape == (3, 8, 4, 4)
    z, total = inv.log_det(op, x)
    expected = sum(b.log_prob(part).flatten(1).sum(1) for b, part in zip(base, z, strict=True)) + total
    assert_close(density.log_prob(x), expected)


class Conditioned(nn.Module):
    """A function of the other component and a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(5, 4)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.net(torch.cat([x, condition], 1))


@pytest.mark.parametrize("wrap", [lambda op: op, inv.checkpoint])
def test_a_conditional_flow(wrap):
    nets = Conditioned(), Conditioned()
    inner = inv.couple(*(inv.ops.tanh_scale(net) for net in nets), law=inv.affine)
    density = inv.flow(wrap(inv.ops.given(inv.chain(inv.split(2), inner, inv.concat(2)))), Normal(torch.zeros(4), 1.0))
    condition = torch.randn(6, 3, requires_grad=True)
    torch.manual_seed(1)
    x, found = density.rsample_and_log_prob(context=condition)
    torch.manual_seed(1)
    assert_close(density.sample(context=condition), x)
    assert_close(density.log_prob(x.detach(), condition), found)
    assert x.shape == (6, 4)
    (gradient,) = torch.autograd.grad(found.sum(), condition)
    assert gradient.abs().min() > 0


class Swallowing(Normal):
    def log_prob(self, value):
        return super().log_prob(value).sum()


def test_bad_bases():
    x = torch.randn(3, 4)
    with pytest.raises(
        WireError,
        match=r"log_prob of \(3, 4\) returned \(\), expected a tensor of shape \(3, \.\.\.\): the batch first",
    ):
        inv.flow(inv.chain(), Swallowing(torch.zeros(4), 1.0)).log_prob(x)
    with pytest.raises(WireError, match=r"got latents \(\(3, 2\), \(3, 2\)\), expected one tensor; pass a tuple"):
        inv.flow(inv.split(2), Normal(0.0, 1.0)).log_prob(x)
    with pytest.raises(WireError, match=r"2 base distributions got latents \(3, 4\), expected as many"):
        inv.flow(inv.chain(), (Normal(0.0, 1.0),) * 2).log_prob(x)
    with pytest.raises(NotDifferentiableError, match="the base Categorical has no rsample, expected samples that are"):
        inv.flow(inv.chain(), Categorical(torch.ones(3))).rsample(2)
    with pytest.raises(NotDifferentiableError, match="opaque"):
        inv.flow(opaque(), Normal(0.0, 1.0))


def test_a_flow_is_frozen_and_reads_like_the_code():
    density = inv.flow(inv.ops.log(), Normal(0.0, 1.0))
    with pytest.raises(AttributeError):
        density.op = inv.ops.exp()
    assert repr(density) == "flow(log(), Normal(loc: 0.0, scale: 1.0))"


# ---- torch.func ----------------------------------------------------------------------------------------------------


def test_a_lowered_flow_under_transforms():
    net, x = mlp(2, 4), torch.randn(3, 4)
    parameters = {k: v.detach() for k, v in net.named_parameters()}

    def loss(parameters, x, wrap):
        def f(z):
            return torch.func.functional_call(net, parameters, (z,))

        op = inv.chain(inv.split(2), inv.couple(inv.ops.tanh_scale(f), law=inv.affine), inv.concat(2), inv.ops.asinh())
        return -inv.flow(wrap(op), Normal(0.0, 1.0)).log_prob(x).mean()

    def plain(op):
        return op

    for transform in (
        lambda wrap: torch.func.grad(loss)(parameters, x, wrap),
        lambda wrap: torch.func.grad(loss, argnums=1)(parameters, x, wrap),
        lambda wrap: torch.func.vmap(lambda row: torch.func.grad(loss)(parameters, row[None], wrap))(x),
        lambda wrap: torch.func.hessian(lambda x: loss(parameters, x, wrap))(x),
        lambda wrap: torch.func.jacrev(torch.func.grad(lambda x: loss(parameters, x, wrap)))(x),
        lambda wrap: torch.func.jvp(lambda x: loss(parameters, x, wrap), (x,), (torch.ones_like(x),)),
    ):
        found, expected = transform(inv.checkpoint), transform(plain)
        for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
            assert_close(a, b)
