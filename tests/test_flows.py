"""Flows as their users call them: samples times contexts, bases that train, several latents, dequantisation, caches.

The expected numbers are those of `torch.distributions`, or of the change of variables, written out.
"""

import math
from typing import Any

import pytest
import torch
from catalogue import mlp
from kit import Counted, assert_close, assert_refused
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TransformedDistribution, Uniform

import invfunc as inv
from invfunc import ops
from invfunc.errors import DomainError, NotDifferentiableError, OptionError, WireError
from invfunc.log_det import joint

lowerings = pytest.mark.parametrize("wrap", [lambda op: op, inv.checkpoint], ids=["plain", "lowered"])


class Shift(nn.Module):
    """``x1 -> x1 * s + t`` by a net of the other half and a context."""

    def __init__(self, context: int = 3) -> None:
        super().__init__()
        self.net = mlp(2 + context, 4)

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.net(torch.cat([x, *context], 1)).chunk(2, 1)
        return raw.tanh().exp(), shift


def conditional(f: Any, g: Any) -> inv.Invertible:
    return ops.given(inv.chain(inv.split(2), inv.couple(f, g, law=inv.affine), inv.concat(2)))


def one_by_one(f: nn.Module, g: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """log p(x | c) of a single sample, by the change of variables."""
    x1, x2, c = x[None, :2], x[None, 2:], c[None]
    s, t = f(x2, c)
    z1 = x1 * s + t
    r, u = g(z1, c)
    z = torch.cat([z1, x2 * r + u], 1)
    return Normal(0.0, 1.0).log_prob(z).sum() + s.log().sum() + r.log().sum()


# ---- samples times contexts ------------------------------------------------------------------------------------------


@lowerings
def test_samples_times_contexts_have_the_log_prob_of_each(wrap: Any) -> None:
    f, g = Shift(), Shift()
    density = inv.flow(wrap(conditional(f, g)), Normal(torch.zeros(4), 1.0))
    x, c = torch.randn(5, 6, 4), torch.randn(6, 3)
    expected = torch.stack([torch.stack([one_by_one(f, g, x[i, j], c[j]) for j in range(6)]) for i in range(5)])
    assert_close(density.log_prob(x, context=c), expected)
    assert_close(density.log_prob(x[0], context=c), expected[0])
    assert_close(density.log_prob(x[:, :1], context=c)[:, 0], expected[:, 0])
    assert_close(density.log_prob(x[:, :1], context=c).shape, torch.Size([5, 6]))
    assert_close(density.log_prob(x[:, 2], context=c[2:3]), expected[:, 2])
    assert_close(density.log_prob(x[0, 0], context=c)[:1], expected[0, :1])


@lowerings
def test_samples_have_the_shape_of_torch_distributions_and_their_own_log_prob(wrap: Any) -> None:
    density = inv.flow(wrap(conditional(Shift(), Shift())), Independent(Normal(torch.zeros(4), 1.0), 1))
    c = torch.randn(6, 3)
    for shape, expected in ((), (6,)), (2, (2, 6)), ((2, 5), (2, 5, 6)):
        x, found = density.rsample_and_log_prob(shape, context=c)
        assert x.shape == (*expected, 4) and found.shape == expected
        assert_close(found, density.log_prob(x, context=c))
        assert density.sample(shape, context=c).shape == x.shape and not density.sample(shape, c).requires_grad


def test_the_own_log_prob_of_samples_comes_from_their_latents() -> None:
    f, g = Counted(Shift()), Counted(Shift())
    density = inv.flow(conditional(f, g), Normal(torch.zeros(4), 1.0))
    density.rsample_and_log_prob((2,), context=torch.randn(6, 3))
    assert f.count == g.count == 1


def test_without_context_any_number_of_batch_dims() -> None:
    density = inv.flow(ops.sinh(), Normal(torch.zeros(4), 1.0))
    x = torch.randn(2, 3, 4)
    assert_close(density.log_prob(x), torch.stack([density.log_prob(part) for part in x]))
    assert_close(density.log_prob(x[0, 0]), density.log_prob(x)[0, 0])
    assert density.sample().shape == (4,) and density.sample((2, 3)).shape == (2, 3, 4)


def test_an_op_that_changes_the_dims_has_its_batch() -> None:
    density = inv.flow(ops.flatten(sizes=[1, 4, 4]), Normal(torch.zeros(16), 1.0))
    x = torch.randn(3, 1, 4, 4)
    assert_close(density.log_prob(x), Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1))
    assert density.log_prob(x[None].expand(2, 3, 1, 4, 4)).shape == (2, 3)
    assert density.sample((5,)).shape == (5, 1, 4, 4)


def test_a_context_of_several_parts() -> None:
    table = nn.Embedding(10, 3)

    def read(x: Tensor, label: Tensor, c: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        found = table(label) + c * scale
        return found[:, :2].tanh().exp(), found[:, 1:]

    density = inv.flow(conditional(read, read), Normal(torch.zeros(4), 1.0))
    context = torch.tensor([1, 4, 4]), torch.randn(3, 3), 0.5
    x = density.sample((2,), context=context)
    assert x.shape == (2, 3, 4)
    assert_close(density.log_prob(x, context=context)[1], density.log_prob(x[1], context=context))


def test_a_context_that_changes_between_two_forwards_is_that_of_its_call() -> None:
    f, g, x = Shift(), Shift(), torch.randn(5, 4)
    contexts = [torch.randn(5, 3, requires_grad=True) for _ in range(2)]

    def gradients(wrap: Any) -> list[Tensor]:
        density = inv.flow(wrap(conditional(f, g)), Normal(torch.zeros(4), 1.0))
        first, second = (density.log_prob(x, context=c) for c in contexts)
        wrt = [*contexts, *f.parameters(), *g.parameters()]
        return list(torch.autograd.grad((first - 2 * second).sum(), wrt))

    assert_close(gradients(inv.checkpoint), gradients(lambda op: op), 1e-11)


# ---- contexts that are missing, or do not fit ------------------------------------------------------------------------


def test_a_missing_context_is_named() -> None:
    density, x = inv.flow(conditional(Shift(), Shift()), Normal(torch.zeros(4), 1.0)), torch.randn(5, 4)
    message = "got no context, expected one, since functions of its op take it; pass context=, a tensor or"
    for call in lambda: density.log_prob(x), lambda: density.sample((2,)), density.rsample_and_log_prob:
        assert_refused(WireError, message, call, anywhere=True)


def moved_by(x: Tensor, c: Tensor) -> Any:
    return (x * c.exp(), c), c.sum(1)


def moved_back_by(y: Tensor, c: Tensor) -> Any:
    return (y / c.exp(), c), -c.sum(1)


READERS: dict[str, Any] = {
    "a pair on x and c": lambda: ops.log_det_pair(moved_by, moved_back_by),
    "a layer that is given c": lambda: ops.given(
        joint(lambda x, c: (x * c.exp(), c.sum(1)), lambda y, c: (y / c.exp(), -c.sum(1)), "layer", True)
    ),
    "a coupling of x with c": lambda: inv.chain(inv.couple(torch.exp, law=scale_by)),
}


def scale_by(s: Tensor) -> inv.Invertible:
    return inv.affine(s, torch.zeros_like(s))


@lowerings
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("base_reads", [True, False])
def test_base_and_op_read_one_context_whatever_the_op_is_made_of(reader: str, base_reads: bool, wrap: Any) -> None:
    mean = torch.randn(4, requires_grad=True)
    base = (
        (lambda c: Independent(Normal(mean + c, 1.0), 1)) if base_reads else (lambda: Independent(Normal(mean, 1), 1))
    )
    density, x, c = inv.flow(wrap(READERS[reader]()), base), torch.randn(5, 4), torch.randn(5, 4)
    expected = Normal(mean + c if base_reads else mean, 1).log_prob(x * c.exp()).sum(1) + c.sum(1)
    assert_close(density.log_prob(x, context=c), expected)
    sample, log_prob = density.rsample_and_log_prob((3,), context=c)
    assert_close(density.log_prob(sample, context=c), log_prob)
    for call in lambda: density.log_prob(x), lambda: density.sample((2,)):
        assert_refused(WireError, "got no context, expected one", call, anywhere=True)


def test_an_empty_context_is_named() -> None:
    density = inv.flow(conditional(Shift(), Shift()), Normal(torch.zeros(4), 1.0))
    message = (
        "a flow got an empty context, expected a tensor, or a tuple of tensors and anything else; leave context out"
    )
    for call in lambda: density.log_prob(torch.ones(5, 4), context=()), lambda: density.sample((2,), context=()):
        assert_refused(WireError, message, call)


class Mute(torch.distributions.Distribution):
    """A base that says nothing."""

    def __init__(self) -> None:
        super().__init__(event_shape=torch.Size([4]), validate_args=False)

    def log_prob(self, value: Tensor) -> Any:
        return None

    def sample(self, sample_shape: Any = ()) -> Any:
        return None


def test_a_base_that_says_nothing_is_named() -> None:
    density = inv.flow(ops.sinh(), Mute())
    message = "the base's log_prob of (5, 4) returned None, expected a tensor of shape (5, ...): the batch first"
    assert_refused(WireError, message, lambda: density.log_prob(torch.ones(5, 4)))
    assert_refused(WireError, "the base's sample returned None, expected a tensor", lambda: density.sample((2,)))
    message = "the base Mute has no rsample, expected samples that are functions of its parameters; sample() has no"
    for call in lambda: density.rsample((2,)), lambda: density.rsample_and_log_prob((2,)):
        assert_refused(NotDifferentiableError, message, call)


def test_a_context_of_the_base_alone_stays_away_from_an_op_on_two_components() -> None:
    op = inv.chain(inv.split(2), ops.log_det_pair(moved_by, moved_back_by), inv.concat(2))
    x, c = torch.randn(5, 4), torch.randn(5, 4)
    found = inv.flow(op, lambda c: Independent(Normal(c, 1.0), 1)).log_prob(x, context=c)
    assert_close(found, Normal(c, 1.0).log_prob(op(x)).sum(1) + x[:, 2:].sum(1))


def test_a_context_that_does_not_fit_is_named() -> None:
    density, x = inv.flow(conditional(Shift(), Shift()), Normal(torch.zeros(4), 1.0)), torch.randn(5, 4)
    message = "a flow got samples (5,) and a context of (6, 3), expected as many contexts as the last dim of the"
    assert_refused(WireError, message, lambda: density.log_prob(x, context=torch.randn(6, 3)))
    message = "a flow got samples (5,) and a context of ((5, 3), (4, 3)), expected as many contexts"
    context = torch.randn(5, 3), torch.randn(4, 3)
    assert_refused(WireError, message, lambda: density.log_prob(x, context=context))


def test_a_base_that_misses_its_context_is_named() -> None:
    def prior(context: Tensor) -> Independent:
        return Independent(Normal(context, 1.0), 1)

    density = inv.flow(ops.sinh(), prior)
    assert_refused(
        WireError, "the base prior got no context, expected one, its argument", lambda: density.log_prob(torch.ones(4))
    )


# ---- bases -----------------------------------------------------------------------------------------------------------


class Base(nn.Module):
    """A Gaussian with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_scale = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4) / 3)

    def forward(self) -> Normal:
        return Normal(self.mean, self.log_scale.exp())


@lowerings
def test_a_base_with_parameters_trains_step_after_step(wrap: Any) -> None:
    base, x = Base(), torch.randn(6, 4)
    density = inv.flow(wrap(ops.sinh()), base)
    for _ in range(2):
        loss = -density.log_prob(x).sum()
        found = torch.autograd.grad(loss, list(base.parameters()))
    expected = torch.autograd.grad(-base().log_prob(x.sinh()).sum(), list(base.parameters()))
    assert_close(found, expected)


@lowerings
def test_samples_have_gradients_with_respect_to_the_base(wrap: Any) -> None:
    base = Base()
    torch.manual_seed(1)
    x, found = inv.flow(wrap(~ops.sinh()), base).rsample_and_log_prob((6,))
    torch.manual_seed(1)
    z = base().rsample((6,))
    expected = base().log_prob(z).sum(1) - z.cosh().log().sum(1)
    assert_close((x, found), (z.sinh(), expected))
    wrt = list(base.parameters())
    assert_close(
        torch.autograd.grad((x.sum() + found.sum()), wrt), torch.autograd.grad(z.sinh().sum() + expected.sum(), wrt)
    )


@lowerings
def test_a_base_of_the_context(wrap: Any) -> None:
    net, c = mlp(3, 4), torch.randn(6, 3)
    density = inv.flow(wrap(ops.sinh()), lambda context: Independent(Normal(net(context), 1.0), 1))
    torch.manual_seed(1)
    x, found = density.rsample_and_log_prob((5,), context=c)
    assert x.shape == (5, 6, 4)
    expected = Normal(net(c), 1.0).log_prob(x.sinh()).sum(-1) + x.cosh().log().sum(-1)
    assert_close((found, density.log_prob(x, context=c)), (expected, expected))


@pytest.mark.parametrize("trailing", [(4,), (2, 2)])
def test_a_base_of_the_context_has_contexts_first_with_or_without_an_event(trailing: tuple[int, ...]) -> None:
    c, x = torch.randn(6, *trailing), torch.randn(7, 6, *trailing)
    bases = lambda c: Normal(c, 2.0), lambda c: Independent(Normal(c, 2.0), len(trailing))  # noqa: E731
    bare, declared = (inv.flow(ops.sinh(), base) for base in bases)
    expected = (Normal(c, 2.0).log_prob(x.sinh()) + x.cosh().log()).flatten(2).sum(2)
    for density in bare, declared:
        assert_close(density.log_prob(x, context=c), expected)
        assert_close(density.log_prob(x[:, :1], context=c)[:, 0], expected[:, 0])
        found, own = density.rsample_and_log_prob((3, 2), context=c)
        assert found.shape == (3, 2, 6, *trailing)
        assert_close(own, density.log_prob(found, context=c))


def test_a_base_of_the_context_that_is_the_same_for_all_is_repeated() -> None:
    density = inv.flow(ops.sinh(), lambda c: Normal(c.mean(0, keepdim=True), 1.0))
    c, x = torch.randn(6, 4), torch.randn(6, 4)
    expected = (Normal(c.mean(0), 1.0).log_prob(x.sinh()) + x.cosh().log()).sum(1)
    assert_close(density.log_prob(x, context=c), expected)
    assert density.sample((3,), context=c).shape == (3, 6, 4)


@pytest.mark.parametrize("made", [lambda c: Normal(torch.zeros(4), 1.0), lambda c: Normal(c[:, 0], 1.0)])
def test_a_base_of_the_context_whose_batch_is_not_of_contexts_is_named(made: Any) -> None:
    density, c = inv.flow(ops.sinh(), made), torch.randn(6, 4)
    for call in lambda: density.log_prob(torch.randn(6, 4), context=c), lambda: density.sample((2,), context=c):
        message = "expected a batch of shape (6, ...): contexts first, then one sample, got ("
        assert_refused(WireError, message, call, anywhere=True)


def test_a_base_that_takes_a_context_may_be_the_same_for_all() -> None:
    density = inv.flow(ops.sinh(), lambda c: Independent(Normal(torch.zeros(4), 1.0), 1))
    c, x = torch.randn(6, 4), torch.randn(6, 4)
    assert_close(density.log_prob(x, context=c), (Normal(0.0, 1.0).log_prob(x.sinh()) + x.cosh().log()).sum(1))
    assert density.sample((3,), context=c).shape == (3, 6, 4)


@lowerings
def test_one_number_is_a_sample(wrap: Any) -> None:
    density = inv.flow(wrap(ops.sinh()), Normal(0.0, 1.0))
    assert density.sample().shape == ()
    x, found = density.rsample_and_log_prob()
    assert x.shape == found.shape == ()
    assert_close((found, density.log_prob(x)), (Normal(0.0, 1.0).log_prob(x.sinh()) + x.cosh().log(),) * 2)


def test_samples_that_are_no_tensor_are_named() -> None:
    density = inv.flow(ops.sinh(), Normal(0.0, 1.0))
    message = "a flow got samples float, expected floating-point tensors"
    assert_refused(WireError, message, lambda: density.log_prob(1.0))


@pytest.mark.parametrize("shape", ["a", None, 2.5, -1, (-1,), (2, None)])
def test_a_shape_of_samples_that_is_none_is_named(shape: Any) -> None:
    density = inv.flow(ops.sinh(), Normal(torch.zeros(3), 1.0))
    message = f"a flow's sample: the shape is {shape!r}, expected a whole number or several, such as () or (5, 3)"
    for ask in density.sample, density.rsample, density.rsample_and_log_prob:
        assert_refused(OptionError, message, lambda: ask(shape))  # noqa: B023


@pytest.mark.parametrize("base", [Normal(torch.zeros(3), 1.0), Independent(Normal(torch.zeros(3), 1.0), 1)])
@pytest.mark.parametrize("x", [torch.zeros(5, 4), torch.zeros(5, 1), torch.zeros(5)])
def test_latents_that_are_no_sample_of_the_base_are_named_and_not_broadcast(base: Any, x: Tensor) -> None:
    message = "the latents of a flow, expected (batch, 3), what one sample of the base is, got "
    assert_refused(WireError, message, lambda: inv.flow(ops.sinh(), base).log_prob(x))


@pytest.mark.parametrize("op", [ops.sinh(), inv.chain(ops.dequantize(8), ops.logit())])
@pytest.mark.parametrize(
    "base", [Normal(0.0, 1.0), Normal(torch.zeros(4), 1.0), Independent(Normal(torch.zeros(4), 1.0), 1)]
)
@pytest.mark.parametrize("wrap", [lambda op: op, inv.checkpoint])
def test_an_empty_batch_has_no_densities(op: inv.Invertible, base: Any, wrap: Any) -> None:
    density = inv.flow(wrap(op), base)
    assert density.log_prob(torch.zeros(0, 4)).shape == (0,)
    assert density.rsample_and_log_prob((0,))[1].shape == (0,)


# ---- compiled --------------------------------------------------------------------------------------------------------


def normed_flow() -> tuple[inv.Invertible, nn.Module]:
    norm = inv.nn.BatchNorm1d(4, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(4) + 0.5)
    f = Shift(0)
    couple = inv.chain(inv.split(2), inv.couple(f, law=inv.affine), inv.concat(2))
    return inv.chain(norm.op, couple, ops.tanh(), ops.atanh(), ops.leaky_tanh(6.0)), nn.ModuleList([norm, f])


@lowerings
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
def test_a_flow_with_a_batch_norm_that_trains_is_one_graph(wrap: Any) -> None:
    op, modules = normed_flow()
    density, x = inv.flow(wrap(op), Normal(torch.zeros(4), 1.0)), torch.randn(8, 4)
    before = {name: buffer.clone() for name, buffer in modules.named_buffers()}

    def step(fn: Any) -> list[Tensor]:
        modules.load_state_dict(before, strict=False)
        inner = x.clone().requires_grad_()
        value = fn(inner)
        found = torch.autograd.grad(value.sum(), [inner, *modules.parameters()])
        return [value, *found, *(buffer.clone() for buffer in modules.buffers())]

    expected = step(inv.flow(op, Normal(torch.zeros(4), 1.0)).log_prob)
    assert_close(step(torch.compile(density.log_prob, backend="aot_eager", fullgraph=True)), expected, 1e-9)
    assert modules[0].num_batches_tracked == 1


# ---- half precision --------------------------------------------------------------------------------------------------


@lowerings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [Normal(torch.tensor(0.0), 1.0), Normal(torch.zeros(2**15), 1.0)])
def test_a_density_of_many_numbers_in_half_precision_is_summed_in_float32(wrap: Any, dtype: Any, base: Any) -> None:
    x = (torch.randn(2, 2**15) * 3000).to(dtype)  # 32768 slopes of about -8: their sum is no float16
    density = inv.flow(wrap(ops.asinh()), base)
    z = x.asinh().double()  # as it was rounded
    expected = (Normal(0.0, 1.0).log_prob(z) - z.cosh().log()).sum(1)
    found = density.log_prob(x)
    assert found.dtype == torch.promote_types(torch.float32, base.loc.dtype)
    assert_close(found.double(), expected, 1e-5)
    x.requires_grad_()
    assert torch.autograd.grad(density.log_prob(x).sum(), x)[0].isfinite().all()


@lowerings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_small_log_determinants_add_up_in_half_precision(wrap: Any, dtype: Any) -> None:
    op = wrap(inv.chain(*[ops.actnorm(torch.full((16,), 0.01, dtype=torch.float32), torch.zeros(16))] * 200))
    x = torch.randn(3, 16).to(dtype)
    y, total = inv.log_det(op, x)
    assert y.dtype == dtype and total.dtype == torch.float32
    assert_close(total, torch.full((3,), 32.0, dtype=torch.float32), 1e-3)
    assert_close(inv.log_det(~op, y)[1], -total, 1e-6)


def test_an_op_and_a_base_that_both_read_the_context() -> None:
    f, g, net, c = Shift(), Shift(), mlp(3, 4), torch.randn(6, 3)
    density = inv.flow(conditional(f, g), lambda context: Independent(Normal(net(context), 1.0), 1))
    x = torch.randn(6, 4)
    (z, _), total = inv.log_det(conditional(f, g), (x, c))
    assert_close(density.log_prob(x, context=c), Normal(net(c), 1.0).log_prob(z).sum(1) + total)


def test_parts_with_bases_of_their_own_and_a_context() -> None:
    f, g = Shift(), Shift()
    op = ops.given(inv.chain(inv.split(2), inv.couple(f, g, law=inv.affine)))
    scale = torch.zeros(2, requires_grad=True)
    density = inv.flow(op, (Normal(torch.zeros(2), 1.0), lambda: Normal(torch.ones(2), scale.exp())))
    c = torch.randn(6, 3)
    x, found = density.rsample_and_log_prob((5,), context=c)
    assert x.shape == (5, 6, 4)
    assert_close(found, density.log_prob(x, context=c))
    assert torch.autograd.grad(density.log_prob(x.detach(), context=c).sum(), scale)[0].abs().min() > 0


# ---- torch.distributions ---------------------------------------------------------------------------------------------


@lowerings
def test_the_log_prob_of_a_cached_sample_evaluates_nothing(wrap: Any) -> None:
    f, g = Counted(Shift(0)), Counted(Shift(0))
    op = wrap(inv.chain(inv.split(2), inv.couple(f, g, law=inv.affine), inv.concat(2)))
    base = Independent(Normal(torch.zeros(4), 1.0), 1)
    cached = TransformedDistribution(base, [ops.as_transform(~op).with_cache()])
    x = cached.rsample((5,))
    before = f.count, g.count
    found = cached.log_prob(x)
    assert (f.count, g.count) == before
    assert_close(found, inv.flow(op, base).log_prob(x))
    wrt = list(f.net.parameters())
    expected = TransformedDistribution(base, [ops.as_transform(~op)]).log_prob(x)
    gradients = [torch.autograd.grad(value.sum(), wrt, retain_graph=True) for value in (found, expected)]
    assert_close(*gradients, 1e-11)


def test_a_cache_knows_its_latest_pair_alone() -> None:
    t = ops.as_transform(ops.sinh()).with_cache()
    x, other = torch.randn(2, 3, 4)
    y = t(x)
    assert_close(t.log_abs_det_jacobian(x, y), x.cosh().log().sum(1))
    assert_close(t.log_abs_det_jacobian(other, other.sinh()), other.cosh().log().sum(1))
    assert_close(t.inv.log_abs_det_jacobian(y, t.inv(y)), -x.cosh().log().sum(1))
    back = t.inv(other)
    assert_close(t.log_abs_det_jacobian(back, other), back.cosh().log().sum(1))


def cached_density(op: inv.Invertible, width: int) -> TransformedDistribution:
    base = Independent(Normal(torch.zeros(width), 1.0), 1)
    return TransformedDistribution(base, [ops.as_transform(op).with_cache()])


def test_a_density_behind_a_sample_has_the_gradient_of_its_parameters() -> None:
    w = torch.rand(3, requires_grad=True)
    density = cached_density(ops.diagonal(w), 3)
    sample = density.sample((5,))  # without gradients, and it is kept with the latents that it was made of
    (found,) = torch.autograd.grad(density.log_prob(sample).sum(), w)
    by_hand = Normal(0.0, 1.0).log_prob(sample / w).sum() - 5 * w.log().sum()
    assert_close(found, torch.autograd.grad(by_hand, w)[0])
    assert_close(found, ((sample / w).square() - 1).sum(0).div(w).detach())


@pytest.mark.parametrize("grad", [True, False])
def test_a_density_behind_a_sample_follows_an_update_of_the_parameters(grad: bool) -> None:
    net = nn.Linear(1, 1)
    op = inv.chain(inv.split(2), inv.couple(net), inv.concat(2))
    density = cached_density(op, 2)
    sample = density.sample((5,))
    with torch.set_grad_enabled(grad):
        density.log_prob(sample)
        net.load_state_dict({name: tensor + 1 for name, tensor in net.state_dict().items()})
        assert_close(density.log_prob(sample), cached_density(op, 2).log_prob(sample))


def test_a_cached_density_compiles_to_one_graph() -> None:
    density, x = cached_density(ops.diagonal(torch.rand(3, requires_grad=True)), 3), torch.randn(5, 3)
    found = torch.compile(density.log_prob, backend="eager", fullgraph=True)(x)
    assert_close(found, density.log_prob(x))


def test_two_losses_of_one_sample_have_their_gradients() -> None:
    w = torch.rand(3, requires_grad=True)
    density = cached_density(ops.diagonal(w), 3)
    sample = density.sample((5,))
    gradients = [torch.autograd.grad(density.log_prob(sample).sum(), w) for _ in range(2)]
    assert_close(*gradients, 0)


@pytest.mark.parametrize("is_leaf", [False, True])
@pytest.mark.parametrize("invert", [False, True])
def test_a_cached_density_of_the_same_x_runs_backward_twice_and_is_not_stale(invert: bool, is_leaf: bool) -> None:
    w, x = torch.rand(3, requires_grad=True), torch.randn(5, 3, requires_grad=is_leaf)
    op = ops.diagonal(w)
    t = ops.as_transform(~op).with_cache() if invert else ops.as_transform(op).with_cache().inv
    density = TransformedDistribution(Independent(Normal(torch.zeros(3), 1.0), 1), [t])
    for _ in range(2):
        found = density.log_prob(x)
        assert_close(found, Normal(0.0, 1.0).log_prob(x * w).sum(1) + w.log().sum())
        found.sum().backward()
        w.data.mul_(1.5)


def test_a_cache_forgets_numbers_that_were_written_over() -> None:
    t, x = ops.as_transform(ops.sinh()).with_cache(), torch.randn(2, 3)
    t(x)
    x.mul_(2)
    assert_close(t(x), x.sinh())
    assert t(x) is t(x)


# ---- dequantisation --------------------------------------------------------------------------------------------------

WHOLE = torch.arange(4.0, dtype=torch.float64)[:, None]  # four levels of one number


def levelled(noise: Any = None, wrap: Any = lambda op: op) -> Any:
    """A density of four levels, by one between 0 and 1."""
    base = Normal(torch.full((1,), 0.4, dtype=torch.float64), 0.7)
    return inv.flow(wrap(inv.chain(ops.dequantize(4, noise), ops.logit())), base)


def probabilities() -> Tensor:
    """Of the four levels, by the distribution function."""
    return Normal(0.4, 0.7).cdf(torch.logit(torch.linspace(0, 1, 5))).diff()


def read_noise(net: nn.Module) -> Any:
    """Noise that depends on the level."""
    return inv.flow(ops.logit(), lambda context: Independent(Normal(net(context), 2.0), 1))


@pytest.mark.parametrize("is_variational", [False, True])
def test_the_bound_is_below_and_its_exponential_has_the_probability_as_its_mean(is_variational: bool) -> None:
    density = levelled(read_noise(mlp(1)) if is_variational else None)
    bound = density.log_prob(WHOLE.expand(20000, 4, 1))
    assert (bound.mean(0) < probabilities().log()).all()
    torch.testing.assert_close(bound.exp().mean(0), probabilities(), rtol=0.03, atol=0)


def test_noise_that_is_trained_tightens_the_bound() -> None:
    net = mlp(1)
    density, x = levelled(read_noise(net)), WHOLE.expand(500, 4, 1)
    optimizer = torch.optim.Adam(net.parameters(), 2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (-density.log_prob(x).mean()).backward()
        optimizer.step()
    gaps = [probabilities().log() - flow.log_prob(x).mean(0) for flow in (density, levelled())]
    assert gaps[0].mean() < gaps[1].mean()


class Fixed:
    """Noise that is always the same."""

    def __init__(self, value: float) -> None:
        self.value = value

    def rsample(self, shape: Any = (), context: Any = None) -> Tensor:
        return torch.full_like(context, self.value)

    def log_prob(self, x: Tensor, context: Any = None) -> Tensor:
        return torch.zeros(len(x))


@pytest.mark.parametrize("levels", [2, 17, 255, 256, 65536])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_draw_reaches_another_level(levels: int, value: float, dtype: torch.dtype) -> None:
    x = torch.arange(levels, dtype=dtype)[None]
    op = ops.dequantize(levels, Fixed(value))
    assert torch.equal(op.inverse(op(x)), x)
    assert 0 < op(x).min() and op(x).max() < 1


def test_a_lowered_bound_draws_the_same_noise_again() -> None:
    net, x = mlp(1), WHOLE.expand(8, 4, 1)

    def gradients(wrap: Any) -> list[Tensor]:
        torch.manual_seed(1)
        bound = levelled(read_noise(net), wrap).log_prob(x)
        torch.rand(3)
        return [bound, *torch.autograd.grad(bound.sum(), list(net.parameters()))]

    assert_close(gradients(inv.checkpoint), gradients(lambda op: op), 1e-10)


def test_whole_numbers_of_too_narrow_a_dtype_are_named() -> None:
    message = "dequantize received (1, 3) of torch.float16, expected floating-point numbers that tell 256 levels and"
    assert_refused(WireError, message, lambda: ops.dequantize()(torch.ones(1, 3, dtype=torch.float16)), anywhere=True)
    for dtype, most in (torch.float16, 31), (torch.bfloat16, 3), (torch.float32, 2**18 - 1):
        x = torch.arange(most + 1.0).to(dtype)[None]
        assert torch.equal(ops.dequantize(most).inverse(ops.dequantize(most)(x[:, :most])), x[:, :most])
        assert_refused(WireError, "dequantize received", lambda: ops.dequantize(most + 1)(x), anywhere=True)  # noqa: B023
    for levels in 1, None, 2.5, math.inf, torch.tensor([3, 4]):
        message = f"dequantize: levels is {levels}, expected 2 or more, and whole"
        assert_refused(OptionError, message, lambda: ops.dequantize(levels))  # noqa: B023
    with inv.debug(True):
        refused = lambda: ops.dequantize(4)(torch.tensor([[0.5]]))  # noqa: E731
        assert_refused(DomainError, "expected whole numbers from 0 to 3", refused, anywhere=True)


@pytest.mark.parametrize("drawn", [None, "noise", torch.rand(2), torch.zeros(2, 3, dtype=torch.int64)])
def test_noise_that_draws_something_else_is_named(drawn: Any) -> None:
    noise = Fixed(0.0)
    noise.rsample = lambda shape=(), context=None: drawn
    message = "the noise's rsample(context=...), expected (2, 3), got "
    assert_refused(WireError, message, lambda: ops.dequantize(8, noise)(torch.ones(2, 3)), anywhere=True)
    assert_refused(OptionError, "expected a density that reads a context", lambda: ops.dequantize(8, torch.rand), True)
    message = "dequantize: noise is Normal(loc: 0.0, scale: 1.0), expected a density that reads a context: a flow"
    assert_refused(OptionError, message, lambda: ops.dequantize(8, Normal(0.0, 1.0)))  # pyright: ignore


@pytest.mark.parametrize("density", [None, 0.5, torch.zeros(2, dtype=torch.int64)])
def test_noise_that_has_no_density_is_named(density: Any) -> None:
    noise = Fixed(0.0)
    noise.log_prob = lambda x, context=None: density
    message = "dequantize: the noise's log_prob(...), expected a number for each sample, got "
    assert_refused(WireError, message, lambda: inv.log_det(ops.dequantize(8, noise), torch.ones(2, 3)), anywhere=True)


def test_uniform_noise_alone_costs_the_logarithm_of_the_levels() -> None:
    density = inv.flow(ops.dequantize(256), Uniform(torch.zeros(2, 3), 1.0))
    found = density.log_prob(torch.randint(256, (5, 2, 3)).double())
    assert_close(found, torch.full((5,), -6 * math.log(256)), 1e-9)
