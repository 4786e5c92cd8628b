"""`exact` of other compositions than couplings, under transforms, and twice differentiated."""

from collections.abc import Callable

import pytest
import torch
from exact_networks import F32, F64, Mlp, Modules, Straight, batch, hard, same_bits, step
from kit import assert_close, network
from torch import Tensor, nn

import invfunc as inv

# ---- other compositions ----


def rearranged(fs: Modules) -> inv.Invertible:
    f, g, h, i = fs
    return inv.chain(
        inv.split(2, 2, interleaved=True),
        inv.couple(f, g),
        inv.swap(),
        inv.mark(inv.couple(h), "store"),
        inv.mark(inv.couple(g), "recompute"),
        inv.parallel(inv.ops.roll(1, 1), inv.chain()),
        inv.invert(inv.couple(i)),
        inv.concat(2, 2, interleaved=True),
    )


def streams(fs: Modules) -> inv.Invertible:
    sizes = [8, 4, 4]
    return inv.chain(inv.split(sizes, 2), inv.ops.couple_streams([_joint, None, _product]), inv.concat(sizes, 2))


def _joint(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a * b, torch.cos(a)], -1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :4] * b


def modules(fs: Modules) -> inv.Invertible:
    f, g, h, i = fs
    net = inv.nn.Sequential(inv.nn.Coupling(f, g, dim=2), inv.nn.Coupling(h, dim=2))
    return inv.chain(net.op, inv.mark(inv.nn.Coupling(i, dim=2).op, "store"), inv.nn.Coupling(f, dim=2).op)


def _half(f: nn.Module) -> inv.Invertible:
    return inv.chain(inv.split(2, 2), inv.couple(f), inv.concat(2, 2))


def views(fs: Modules) -> inv.Invertible:
    """Each coupling is given slices, which it makes dense."""
    f, g, *_ = fs
    return inv.chain(_half(f), inv.ops.roll(1, 2), _half(g), inv.ops.roll(1, 2), _half(f))


COMPOSITIONS = {"rearranged": rearranged, "streams": streams, "modules": modules, "views": views}


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("mode", ["grid", "codes"])
@pytest.mark.parametrize("segments", [1, 3])
def test_compositions_are_exact(name, mode, segments):
    fs, x, _ = hard("attention")
    op = inv.exact(COMPOSITIONS[name](fs), mode)
    assert same_bits(step(inv.checkpoint(op, segments=segments), fs, x), step(op, fs, x))


@pytest.mark.parametrize("mode, dtype", [("codes", F32), ("grid", F64)])
@pytest.mark.parametrize("seed", range(10))
def test_parameter_gradients_have_the_bits_of_plain_where_a_split_comes_behind_a_concat(mode, dtype, seed):
    torch.manual_seed(seed)
    fs = [nn.Linear(1, 1).to(dtype) for _ in range(4)]
    op = inv.exact(inv.chain(network(fs[:2]), network(fs[2:])), mode)
    x = batch(15, 2, dtype=dtype)
    assert same_bits(step(inv.checkpoint(op), fs, x), step(op, fs, x))


def test_an_exact_module_follows_the_module() -> None:
    (f, *_), x, _ = hard("attention")
    module = inv.nn.Coupling(f, dim=2)
    op = inv.exact(module.op)
    before = op(x)
    module.f = nn.Identity()
    assert torch.equal(op(x), inv.exact(module.build())(x)) and not torch.equal(op(x), before)


def everything() -> inv.Invertible:
    return inv.chain(
        nn.Linear(16, 16, dtype=F32),
        inv.ops.linear(nn.Parameter(torch.eye(16, dtype=F32) + 0.1)),
        inv.pair(torch.sinh, torch.asinh),
        inv.split(2, 2),
        inv.couple(inv.ops.tanh_scale(Mlp(8, 16).float(), dim=2), law=inv.affine),
        inv.couple(Mlp(8).float(), law=_exponential),
        inv.concat(2, 2),
        inv.ops.tanh(),
        nn.Linear(16, 3, dtype=F32),
    )


def _exponential(t: Tensor) -> inv.Invertible:
    return inv.pair(lambda x: x * torch.exp(t), lambda y: y / torch.exp(t))


@pytest.mark.parametrize("pack", [False, True])
def test_codes_take_any_op(pack):
    base, x = everything(), batch(4, 5, 16)
    fs = [f for part in base.parts for f in part.functions if isinstance(f, nn.Module)]
    op = inv.exact(base, "codes", pack=pack)
    expected = step(op, fs, x)
    assert same_bits(step(base, fs, x)[:1], expected[:1])
    assert same_bits(step(inv.checkpoint(op), fs, x), expected)


def test_codes_take_random_numbers_in_an_op():
    noisy = inv.pair(lambda x: x + torch.randn_like(x), lambda y: y - torch.randn_like(y))
    base = inv.chain(noisy, inv.pair(torch.exp, torch.log), noisy)
    x = batch(4, 3)
    assert same_bits(step(inv.checkpoint(inv.exact(base, "codes")), [], x), step(base, [], x))


def test_codes_take_complex_numbers():
    op = inv.exact(inv.chain(*[inv.couple(torch.sin, torch.cos)] * 4), "codes")
    x = tuple(torch.randn(5, dtype=torch.complex64).requires_grad_() for _ in range(2))
    found, expected = (torch.autograd.grad(f(x)[0].abs().sum(), x) for f in (inv.checkpoint(op), op))
    assert same_bits(list(found), list(expected))


def test_codes_are_a_functor():
    f, g = inv.couple(torch.sin), inv.pair(torch.exp, torch.log)

    def exact(op: inv.Invertible) -> inv.Invertible:
        return inv.exact(op, "codes")

    assert exact(inv.chain(f, g)) == inv.chain(exact(f), exact(g))
    assert exact(exact(inv.chain(f, g))) == exact(inv.chain(f, g))
    assert exact(inv.checkpoint(f)) == inv.checkpoint(exact(f))
    assert exact(inv.chain()) == inv.chain()


def test_the_laws_hold():
    op = inv.chain(inv.split(2), inv.couple(torch.sin, torch.cos), inv.swap(), inv.concat(2))
    inv.testing.check_laws(inv.exact(op, "codes"), torch.randn(3, 4))
    inv.testing.check_laws(inv.exact(op), Straight.apply(torch.randn(3, 4), F64, 16))


def test_the_inverse_of_a_grid_is_exact_too():
    op = inv.exact(network([torch.sin, torch.cos] * 8))
    x = Straight.apply(torch.randn(3, 4), F64, 32)
    assert same_bits([op.inverse(op(x)), (~op)(op(x)), inv.checkpoint(op).inverse(op(x))], [x] * 3)


# ---- transforms and second gradients ----


def closing_over(w: Tensor, mode: str) -> inv.Invertible:
    def f(x: Tensor) -> Tensor:
        return torch.tanh(x @ w)

    scaled = inv.couple(lambda x: (torch.exp(f(x)), f(x)), law=inv.affine)
    block = inv.couple(f, torch.sin) if mode == "grid" else scaled
    return inv.exact(inv.chain(inv.split(2), block, inv.swap(), block, inv.concat(2)), mode)


def loss_of(lower: Callable[[inv.Invertible], inv.Invertible], mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda w, x: (lower(closing_over(w, mode))(x) ** 3).sum()


def twice(loss: Callable[..., Tensor], w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    given = w.requires_grad_(), x.requires_grad_()
    gradients = torch.autograd.grad(loss(*given), given, create_graph=True)
    return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), given)


TRANSFORMS = {
    "grad": lambda loss, w, x: torch.func.grad(loss, (0, 1))(w, x),
    "vmap of grad": lambda loss, w, x: torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, 0))(w, x[:, None]),
    "jvp": lambda loss, w, x: torch.func.jvp(loss, (w, x), (w, x)),
    "hessian": lambda loss, w, x: torch.func.hessian(loss, 1)(w, x),
    "jacrev of jacrev": lambda loss, w, x: torch.func.jacrev(torch.func.jacrev(loss))(w, x),
    "second gradient": twice,
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_transforms_and_second_gradients_are_right(name, mode):
    w, x = torch.randn(2, 2), torch.randn(3, 4)
    found = TRANSFORMS[name](loss_of(inv.checkpoint, mode), w.clone(), x.clone())
    expected = TRANSFORMS[name](loss_of(lambda op: op, mode), w.clone(), x.clone())
    assert_close(found, expected)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_a_graph_that_is_retained_gives_the_same_bits_again(mode):
    x = torch.randn(3, 4, requires_grad=True)
    y = inv.checkpoint(closing_over(torch.randn(2, 2), mode))(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True) for _ in range(2))
    assert same_bits(list(first), list(second))
