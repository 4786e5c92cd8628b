"""To and from transforms of `torch.distributions`, and functions that tell value and log-determinant in one call."""

import math

import pytest
import torch
from catalogue import mlp, weight
from kit import assert_close, assert_refused
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions import transforms as T

import invfunc as inv
from invfunc.errors import NotInvertibleError, OptionError, WireError
from invfunc.log_det import autodiff_log_det
from invfunc.look.memory import measure
from invfunc.ops import transforms
from invfunc.testing import check_laws
from invfunc.wires import is_differentiable, map_wire

LAWS = ["section", "retraction", "checkpoint_gradients", "checkpoint_twice", "checkpoint_functional", "checkpoint_vmap"]


# ---- to and from torch.distributions -------------------------------------------------------------------------------


def pipeline() -> inv.Invertible:
    scales = [inv.ops.tanh_scale(mlp(2, 4), 0.5) for _ in range(2)]
    middle = inv.parallel(inv.ops.leaky_relu(0.5), inv.ops.asinh())
    return inv.chain(inv.split(2), inv.couple(*scales, law=inv.affine), middle, inv.concat(2))


def test_a_distribution_function_is_refused_with_the_reason():
    distribution = TransformedDistribution(Normal(0.0, 1.0), [inv.ops.as_transform(inv.ops.sinh(), event_dim=0)])
    message = "as_transform(sinh(), event_dim=0) does not know whether it rises or falls, which cdf and icdf ask"
    assert_refused(NotImplementedError, message, lambda: distribution.cdf(torch.zeros(3)), anywhere=True)


def test_as_transform_in_a_transformed_distribution():
    op, x = pipeline(), torch.randn(5, 4)
    base = Independent(Normal(torch.zeros(4), torch.ones(4)), 1)
    distribution = TransformedDistribution(base, [inv.ops.as_transform(inv.invert(op))])
    assert_close(distribution.log_prob(x), inv.flow(op, base).log_prob(x))
    assert distribution.rsample((2, 3)).shape == (2, 3, 4)
    assert distribution.log_prob(torch.randn(2, 3, 4)).shape == (2, 3)


@pytest.mark.parametrize("event_dim", [0, 1, 2])
def test_event_dims(event_dim):
    x = torch.randn(2, 3, 4)
    t, expected = inv.ops.as_transform(inv.ops.sinh(), event_dim=event_dim), torch.cosh(x).log()
    for _ in range(event_dim):
        expected = expected.sum(-1)
    assert_close(t(x), torch.sinh(x))
    assert_close(t.inv(torch.sinh(x)), x)
    assert_close(t.log_abs_det_jacobian(x, t(x)), expected)
    assert t.domain.event_dim == t.codomain.event_dim == event_dim
    single = torch.randn(x.shape[3 - event_dim :])
    assert t.log_abs_det_jacobian(single, t(single)).shape == ()


def test_a_transform_composes_and_caches():
    op, x = pipeline(), torch.randn(3, 4)
    t = inv.ops.as_transform(op)
    composed = T.ComposeTransform([t, inv.ops.as_transform(inv.ops.exp(), event_dim=0)])
    assert_close(composed.inv(composed(x)), x)
    cached = t.with_cache(1)
    y = cached(x)
    assert cached.inv(y) is x
    with torch.no_grad():  # a graph may have been freed by a backward
        assert cached(x) is cached(x) and t(x) is not t(x)
    assert cached == t == inv.ops.as_transform(op) and t.with_cache(0) is t
    assert t != inv.ops.as_transform(op, event_dim=2)


def test_a_transform_keeps_shapes():
    with pytest.raises(WireError, match=r"as_transform: split\(2, dim=1\) made \(\(3, 2\), \(3, 2\)\) of \(3, 4\)"):
        inv.ops.as_transform(inv.split(2))(torch.randn(3, 4))
    with pytest.raises(OptionError, match=r"as_transform: event_dim is -1, expected 0, 1, 2, \.\.\."):
        inv.ops.as_transform(inv.ops.exp(), event_dim=-1)


TRANSFORMS = {
    "exp": lambda loc, scale: T.ExpTransform(),
    "exp, inverse": lambda loc, scale: T.ExpTransform().inv,
    "exp, twice inverse": lambda loc, scale: T.ExpTransform().inv.inv,
    "sigmoid, cached": lambda loc, scale: T.SigmoidTransform(cache_size=1),
    "power": lambda loc, scale: T.PowerTransform(scale),
    "affine": lambda loc, scale: T.AffineTransform(loc, scale),
    "affine, event": lambda loc, scale: T.AffineTransform(loc, scale, event_dim=1),
    "compose": lambda loc, scale: T.ComposeTransform([T.AffineTransform(loc, scale), T.TanhTransform()]),
    "independent": lambda loc, scale: T.IndependentTransform(T.SoftplusTransform(), 1),
    "reshape": lambda loc, scale: T.ReshapeTransform((3,), (1, 3)),
    "cat": lambda loc, scale: T.CatTransform([T.ExpTransform(), T.TanhTransform()], dim=1, lengths=[1, 2]),
    "cdf": lambda loc, scale: T.CumulativeDistributionTransform(Normal(0.0, 1.0)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_from_transform(name):
    t, x = TRANSFORMS[name](weight(3), 1 + weight(3, scale=0.1)), torch.rand(2, 3) + 0.1
    op = inv.ops.from_transform(t)
    assert_close(op(x), t(x))
    assert_close(inv.log_det(op, x)[1], autodiff_log_det(op, x, None))
    check_laws(op, x)
    check_laws(inv.with_log_det(op), (x, torch.randn(2)), laws=LAWS)


@pytest.mark.parametrize("name", ["exp", "power", "affine", "affine, event", "compose", "independent", "cdf"])
def test_there_and_back(name):
    op, t, x = pipeline(), TRANSFORMS[name](weight(3), 1 + weight(3, scale=0.1)), torch.rand(4, 2, 3) + 0.1
    assert inv.ops.from_transform(inv.ops.as_transform(op)) is op
    t = T.IndependentTransform(t, 1 - t.domain.event_dim)
    back = inv.ops.as_transform(inv.ops.from_transform(t))
    y = t(x)
    assert_close(back(x), y)
    assert_close(back.inv(y), t.inv(y))
    assert_close(back.log_abs_det_jacobian(x, y), t.log_abs_det_jacobian(x, y))


def test_a_transform_between_dimensions():
    t, x = T.StickBreakingTransform(), torch.randn(4, 3)
    op = inv.ops.from_transform(t)
    assert_close((op(x), op.inverse(t(x)), inv.log_det(op, x)[1]), (t(x), x, t.log_abs_det_jacobian(x, t(x))))
    with pytest.raises(WireError, match=r"made \(4, 4\) of \(4, 3\), expected events of the same shape"):
        inv.ops.as_transform(op)(x)


def test_a_composition_is_taken_apart():
    inner = T.IndependentTransform(T.ComposeTransform([T.TanhTransform(), T.AffineTransform(0.0, 2.0)]), 1)
    op = inv.ops.from_transform(T.ComposeTransform([T.ExpTransform(), inner]))
    names = "ExpTransform()", "TanhTransform()", "AffineTransform()"
    assert repr(op) == f"chain({', '.join(f'from_transform({name})' for name in names)})"


def test_a_composition_trains_at_flat_memory():
    def peak(depth):
        parts = [T.AffineTransform(0.0, weight(8)) if i % 2 else T.SoftplusTransform() for i in range(depth)]
        op, x = inv.checkpoint(inv.ops.from_transform(T.ComposeTransform(parts))), torch.rand(64, 8) + 1
        return measure(lambda: inv.log_det(op, x)[1].sum().backward()).peak_bytes

    assert peak(16) <= 1.05 * peak(8)


def test_a_transform_of_another_kind():
    with pytest.raises(
        OptionError, match=r"from_transform: got Linear, expected a transform of torch\.distributions, .*"
    ):
        inv.ops.from_transform(nn.Linear(2, 2))


class BatchNorm(nn.Module):
    """As that of nflows: in training there is no inverse."""

    __module__ = "nflows.transforms.normalization"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.std(0)
        return x / scale, -scale.log().sum().expand(len(x))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("only available in eval mode")


class FlowTransform(BatchNorm):
    """Known by what it inherits from."""


def test_a_layer_without_an_inverse_in_training_is_run_again(monkeypatch):
    monkeypatch.setitem(transforms.RULES, "nflows.BatchNorm", transforms.RULES["nflows.Transform"])
    op, x = inv.ops.from_transform([BatchNorm(), T.AffineTransform(0.0, 2.0), FlowTransform()]), torch.rand(5, 3)
    assert repr(op).count("mark(from_transform(") == 2

    def gradient(fn):
        at = x.clone().requires_grad_()
        y, log_det = inv.log_det(fn, at)
        return torch.autograd.grad(y.sin().sum() + log_det.sum(), at)[0]

    assert_close(gradient(inv.checkpoint(op)), gradient(op))


# ---- value and log-determinant from one call -----------------------------------------------------------------------


def scaling(w, calls):
    """The two functions of ``x * exp(w)``, which note that they were called."""

    def forward(x):
        calls.append("forward")
        return x * w.exp(), w.sum().expand(len(x))

    def inverse(y):
        calls.append("inverse")
        return y / w.exp(), -w.sum().expand(len(y))

    return forward, inverse


def test_a_log_det_pair_holds_the_laws():
    op, x = inv.ops.log_det_pair(*scaling(weight(3), [])), torch.randn(2, 3)
    assert_close(inv.log_det(op, x)[1], autodiff_log_det(op, x, None))
    check_laws(op, x)
    check_laws(inv.with_log_det(op), (x, torch.randn(2)), laws=LAWS)
    assert repr(op) == "log_det_pair(forward, inverse)"


def test_a_log_det_pair_calls_each_function_once_in_each_pass():
    calls: list[str] = []
    op = inv.checkpoint(inv.ops.log_det_pair(*scaling(weight(3), calls)))
    y, log_det = inv.log_det(op, torch.randn(2, 3))
    log_det.sum().backward(retain_graph=True)  # needs nothing of what was computed
    assert calls == ["forward"]
    (y.sum() + log_det.sum()).backward()
    assert calls == ["forward", "inverse", "forward"]


def test_a_log_det_pair_of_tuples():
    op = inv.ops.log_det_pair(lambda a, b: ((a.exp(), b), a.sum(1)), lambda a, b: ((a.log(), b), -a.log().sum(1)))
    x = torch.randn(2, 3), torch.randn(2, 1)
    assert_close(inv.log_det(op, x)[1], autodiff_log_det(op, x, None))
    check_laws(inv.with_log_det(op), (x, torch.randn(2)), laws=LAWS)


@pytest.mark.parametrize("one", [0.0, 3, torch.tensor(3.0), torch.tensor([3.0])])
def test_one_number_holds_for_the_batch(one):
    op = inv.ops.log_det_pair(lambda x: (x, one), lambda y: (y, -one))
    assert_close(inv.log_det(op, torch.ones(2, 3))[1], torch.full((2,), float(one)))
    total = torch.zeros(2)
    assert_close(inv.with_log_det(op).inverse((torch.ones(2, 3), total))[1], torch.full((2,), -float(one)))


def test_a_rule_may_say_one_plain_number():
    op = inv.pair(torch.neg, torch.neg, log_det=lambda x, y: 0.0)
    assert_close(inv.log_det(op, torch.ones(2, 3))[1], torch.zeros(2))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.ones(2, 3), r"log_det_pair\(.*\) returned \(2, 3\), expected \(value, log_det\)"),
        ((torch.ones(2, 3), torch.ones(3)), r"log_det of .* returned \(3,\), expected \(2,\), one number for each"),
        ((torch.ones(2, 3), None), r"log_det of .* returned None, expected \(2,\), one number for each"),
    ],
)
def test_what_a_log_det_pair_returns_is_checked(found, message):
    op = inv.ops.log_det_pair(lambda x: found, lambda y: found)
    with pytest.raises(WireError, match=message):
        inv.log_det(op, torch.ones(2, 3))


def test_a_cached_value_does_not_lose_its_gradient():
    w = weight(3)
    op = inv.checkpoint(inv.ops.from_transform(T.AffineTransform(0.0, w, cache_size=1)))
    x = torch.randn(2, 3)
    with torch.no_grad():
        op(x)
    (gradient,) = torch.autograd.grad(op(x).sum(), w)
    assert_close(gradient, x.sum(0))


@pytest.mark.parametrize("needs", [True, False])
def test_a_function_that_takes_a_derivative_of_its_own_saves_the_same_for_an_input_without_a_gradient(needs):
    w = weight(3)

    def forward(x):
        with torch.enable_grad():  # as zuko's monotonic transforms do, so that y has a graph in any case
            x = x if x.requires_grad else x.clone().requires_grad_()
            y = w.exp() * x
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y, slope.log().sum(1)

    op = ~inv.ops.log_det_pair(forward, lambda y: (y * (-w).exp(), -w.sum().expand(len(y))))
    y = torch.randn(2, 3)

    def gradients(wrap):
        x, log_det = inv.log_det(wrap(op), y.clone().requires_grad_(needs))
        return torch.autograd.grad(x.square().sum() + log_det.sum(), w)

    assert_close(gradients(inv.checkpoint), gradients(lambda op: op))


def test_a_transform_that_is_not_bijective():
    with pytest.raises(NotInvertibleError, match=r"from_transform: AbsTransform\(\) is not bijective"):
        inv.ops.from_transform(T.AbsTransform())


def test_a_transform_has_a_domain():
    op = inv.ops.from_transform(T.ExpTransform().inv)
    with inv.debug(True), pytest.raises(inv.errors.DomainError, match="expected its domain, GreaterThan"):
        op(-torch.ones(2))
    assert math.isnan(op(-torch.ones(1)).item())
    assert is_differentiable(map_wire(op.forward, torch.ones(1)))


SATURATING = {
    "tanh": (T.TanhTransform(), [-12.0, -9.0, 4.0, 8.0, 12.0, 40.0]),
    "sigmoid": (T.SigmoidTransform(), [-90.0, -12.0, 8.0, 20.0]),
    "softplus": (T.SoftplusTransform(), [-90.0, -20.0, 3.0, 30.0]),
    "exp": (T.ExpTransform(), [-90.0, -20.0, 30.0]),
}


@pytest.mark.parametrize("name", SATURATING)
def test_a_parameter_before_a_transform_that_saturates_has_the_gradient_of_plain(name):
    transform, points = SATURATING[name]
    x, found = torch.tensor(points, dtype=torch.float32)[:, None], []
    for way in (lambda op: op, inv.checkpoint):
        scale = torch.ones(1, dtype=torch.float32, requires_grad=True)
        op = inv.chain(inv.affine(scale, torch.zeros(1, dtype=torch.float32)), inv.ops.from_transform(transform))
        y, total = inv.log_det(way(op), x)
        found.append([torch.autograd.grad(t.sum(), scale, retain_graph=True)[0] for t in (y, total)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


class OneWayTransform(T.Transform):
    """A transform of torch that says nothing of its inverse."""

    domain = codomain = torch.distributions.constraints.real
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return x.exp()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x


def test_a_transform_that_has_no_inverse_is_named_where_it_is_asked_for() -> None:
    op = inv.chain(inv.ops.exp(), inv.ops.from_transform(OneWayTransform()))
    expected = (
        "chain stage 1 (from_transform): from_transform(OneWayTransform()) has no inverse; inv.mark(op, 'recompute') "
        "runs it again in backward, from its stored input"
    )
    assert_refused(NotInvertibleError, expected, lambda: op.inverse(torch.ones(3)))
    x = torch.randn(3, requires_grad=True)
    assert_refused(NotInvertibleError, expected, lambda: inv.checkpoint(op)(x).sum().backward())
    marked = inv.chain(inv.ops.exp(), inv.mark(inv.ops.from_transform(OneWayTransform()), "recompute"))
    (found,) = torch.autograd.grad(inv.checkpoint(marked)(x).sum(), x)
    assert_close(found, torch.autograd.grad(op(x).sum(), x)[0])
