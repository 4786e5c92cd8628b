"""Bit-exact inverses: every comparison is of raw bits, with plain autograd of networks that are written out here."""

import random
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import invfunc as inv
from invfunc.core.packing import pack_codes, unpack_codes
from invfunc.errors import DomainError, NotInvertibleError, OptionError, ReplayError, WireError
from invfunc.exact.bits import bit_hash, bits_of, corrected, difference, from_bits

exact_module = sys.modules["invfunc.exact.transform"]  # the name in the package is that of the function

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Modules = list[nn.Module]


def same_bits(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return len(found) == len(expected) and all(
        a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(bits_of(a), bits_of(b))
        for a, b in zip(found, expected, strict=True)
    )


class Mlp(nn.Sequential):
    def __init__(self, d: int, out: int | None = None):
        super().__init__(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, out or d))


class Spy(nn.Module):
    """Keeps what its net is given."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.given = net, []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.detach().clone())
        return self.net(x)


def nets(count: int, make: Callable[[], nn.Module], dtype: torch.dtype) -> Modules:
    torch.manual_seed(0)
    return [make().to(dtype) for _ in range(count)]


def coupled(fs: Modules, dim: int = 1, law: Callable = inv.additive) -> inv.Invertible:
    blocks = [inv.couple(f, g, law=law) for f, g in zip(fs[::2], fs[1::2], strict=True)]
    return inv.chain(inv.split(2, dim), *blocks, inv.concat(2, dim))


def plain(fs: Modules, x: Tensor, dim: int = 1, law: Callable = lambda x, t: x + t) -> Tensor:
    """The network, written out; its functions get dense tensors."""
    x1, x2 = (part.contiguous() for part in x.chunk(2, dim))
    for f, g in zip(fs[::2], fs[1::2], strict=True):
        x1 = law(x1, f(x2))
        x2 = law(x2, g(x1))
    return torch.cat([x1, x2], dim)


def affine(x: Tensor, t: Tensor) -> Tensor:
    raw, shift = t.chunk(2, 1)
    return x * torch.exp(torch.tanh(raw)) + shift


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype, k: int) -> Tensor:
        ctx.dtype = x.dtype
        return torch.round(x.to(dtype) * 2.0**k) * 2.0**-k

    @staticmethod
    def backward(ctx, gy: Tensor):
        return gy.to(ctx.dtype), None, None


def plain_on_grid(fs: Modules, x: Tensor, dtype: torch.dtype, k: int) -> Tensor:
    """The network with its stream on a grid, written out."""
    stream = Straight.apply(x, dtype, k) + 0.0
    onto = [lambda x2, f=f: Straight.apply(f(x2.to(x.dtype)), dtype, k) for f in fs]
    return plain(onto, stream).to(x.dtype)


def step(call: Callable[[Tensor], Tensor], fs: Modules, x: Tensor) -> list[Tensor | None]:
    """The value and all gradients of one training step."""
    torch.manual_seed(1)
    parameters = [p for f in fs for p in f.parameters()]
    for p in parameters:
        p.grad = None
    x = x.detach().requires_grad_()
    y = call(x)
    y.backward(torch.randn_like(y))
    return [y.detach(), x.grad, *[p.grad for p in parameters]]


def batch(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, dtype=F64).to(dtype)


# ---- the bars: bits of plain autograd ----


def assert_exact(op: inv.Invertible, oracle: Callable[[Tensor], Tensor], fs: Modules, x: Tensor) -> None:
    expected = step(oracle, fs, x)
    assert same_bits(step(op, fs, x), expected)
    assert same_bits(step(inv.checkpoint(op), fs, x), expected)


def check_grid(depth: int, net: torch.dtype, carrier: torch.dtype, k: int) -> None:
    fs = nets(2 * depth, lambda: Mlp(8), net)
    assert_exact(inv.exact(coupled(fs)), lambda x: plain_on_grid(fs, x, carrier, k), fs, batch(4, 16, dtype=net))


def check_codes(depth: int, dtype: torch.dtype, is_affine: bool, pack: bool = False) -> None:
    fs = nets(2 * depth, lambda: Mlp(8, 16 if is_affine else 8), dtype)
    if is_affine:
        op, law = inv.chain(inv.split(2), *_affine_blocks(fs), inv.concat(2)), affine
    else:
        op, law = coupled(fs), lambda x, t: x + t
    oracle = lambda x: plain(fs, x, law=law)  # noqa: E731
    assert_exact(inv.exact(op, "codes", pack=pack), oracle, fs, batch(4, 16, dtype=dtype))


def _affine_blocks(fs: Modules) -> list[inv.Invertible]:
    def exp_tanh(f: nn.Module) -> Callable:
        return inv.ops.tanh_scale(f, 1.0)

    return [inv.couple(exp_tanh(f), exp_tanh(g), law=inv.affine) for f, g in zip(fs[::2], fs[1::2], strict=True)]


GRIDS = [(BF16, F32, 14), (F16, F32, 14), (F32, F64, 32), (F64, F64, 32)]


@pytest.mark.parametrize("net, carrier, k", GRIDS)
def test_on_a_grid_gradients_have_the_bits_of_plain_autograd(net, carrier, k):
    check_grid(20, net, carrier, k)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("is_affine", [False, True])
def test_with_codes_gradients_have_the_bits_of_plain_autograd(dtype, is_affine):
    check_codes(12, dtype, is_affine)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_packed_codes_are_exact(dtype):
    check_codes(12, dtype, True, pack=True)


@pytest.mark.exact
@pytest.mark.parametrize("net, carrier, k", GRIDS[::2])
def test_a_grid_is_exact_at_depth_1000(net, carrier, k):
    check_grid(1000, net, carrier, k)


@pytest.mark.exact
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_codes_are_exact_at_depth_1000(dtype):
    check_codes(1000, dtype, False)


@pytest.mark.exact
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_affine_codes_are_exact_at_depth_512(dtype):
    check_codes(512, dtype, True)


def test_without_exact_they_drift():
    fs = nets(40, lambda: Mlp(8), F32)
    x = batch(4, 16)
    drifting = inv.checkpoint(coupled(fs), drift="off")
    assert not same_bits(step(drifting, fs, x), step(lambda x: plain(fs, x), fs, x))


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_every_state_is_rebuilt_bit_for_bit_and_every_function_runs_twice(mode):
    fs = nets(16, lambda: Spy(Mlp(8)), F32)
    step(inv.checkpoint(inv.exact(coupled(fs), mode)), fs, batch(4, 16))
    assert all(len(f.given) == 2 for f in fs)
    assert all(same_bits(f.given[:1], f.given[1:]) for f in fs)


def losses(fs: Modules, call: Callable[[Tensor], Tensor], steps: int) -> list[Tensor]:
    torch.manual_seed(2)
    x, target = batch(16, 16, dtype=BF16), batch(16, 16, dtype=BF16)
    optimizer = torch.optim.Adam([p for f in fs for p in f.parameters()], 1e-3)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (call(x) - target).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found


def check_training(blocks: int, steps: int, seed: int) -> None:
    def trained(make_call: Callable[[Modules], Callable]) -> list[Tensor]:
        torch.manual_seed(seed)
        fs = [Mlp(8).to(BF16) for _ in range(2 * blocks)]
        return losses(fs, make_call(fs), steps)

    expected = trained(lambda fs: lambda x: plain(fs, x))
    assert expected[-1] < expected[0]
    assert same_bits(trained(lambda fs: inv.checkpoint(inv.exact(coupled(fs), "codes"))), expected)


def test_the_training_curve_is_that_of_the_plain_network():
    check_training(blocks=6, steps=6, seed=0)


@pytest.mark.exact
@pytest.mark.parametrize("seed", range(3))
def test_the_training_curve_of_64_blocks_is_that_of_the_plain_network(seed):
    check_training(blocks=64, steps=60, seed=seed)


# ---- functions that are hard to run twice ----


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Attention(nn.Module):
    """Reads its input four times."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)) + torch.sin(x)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))


def gelu() -> nn.Module:
    return nn.GELU()


SEQUENCE, IMAGE = (4, 5, 16), (3, 16, 7, 7)
HARD = {
    "lstm": (Lstm, SEQUENCE, True),
    "lstm in eval": (Lstm, SEQUENCE, False),
    "encoder with dropout": (encoder, SEQUENCE, True),
    "encoder in eval": (encoder, SEQUENCE, False),
    "attention": (Attention, SEQUENCE, True),
    "spectral norm": (spectral, SEQUENCE, True),
    "batch norm": (conv, IMAGE, True),
    "batch norm in eval": (conv, IMAGE, False),
    "gelu of slices": (gelu, (3, 7, 16), True),
}


def hard(name: str) -> tuple[Modules, Tensor, int]:
    make, shape, training = HARD[name]
    fs = [f.train(training) for f in nets(4, make, F32)]
    return fs, batch(*shape), 1 if shape == IMAGE else 2


def buffers(fs: Modules) -> list[Tensor]:
    return [b.clone() for f in fs for b in f.buffers()]


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_functions_give_the_same_bits_again(name, mode):
    fs, x, dim = hard(name)
    op = inv.exact(coupled(fs, dim), mode)
    expected = step(op if mode == "grid" else lambda x: plain(fs, x, dim), fs, x), buffers(fs)
    fs, x, dim = hard(name)
    torch.manual_seed(0)
    assert same_bits(step(inv.checkpoint(inv.exact(coupled(fs, dim), mode)), fs, x), expected[0])
    assert all(map(torch.equal, buffers(fs), expected[1]))


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_autocast_is_replayed(mode):
    fs, x, _ = hard("attention")

    def under_autocast(op: inv.Invertible) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", BF16):
                return op(x)

        return call

    op = inv.exact(coupled(fs, 2), mode)
    expected = step(under_autocast(op), fs, x)
    assert same_bits(step(under_autocast(inv.checkpoint(op)), fs, x), expected)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_the_memory_format_is_that_of_forward(mode):
    fs, x, _ = hard("batch norm in eval")
    spies = [Spy(f) for f in fs]
    op = inv.exact(inv.chain(*[inv.couple(f, g) for f, g in (spies[:2], spies[2:])]), mode)
    halves = [half.contiguous(memory_format=torch.channels_last) for half in x.chunk(2, 1)]

    def call(op: inv.Invertible, scale: Tensor) -> Tensor:
        return torch.cat(op(tuple(scale * half for half in halves)), 1)

    scale = torch.ones((), dtype=F32)
    expected = step(lambda scale: call(op, scale), fs, scale)
    for spy in spies:
        spy.given.clear()
    assert same_bits(step(lambda scale: call(inv.checkpoint(op), scale), fs, scale), expected)
    assert all(given.is_contiguous(memory_format=torch.channels_last) for spy in spies for given in spy.given)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_the_number_of_threads_is_that_of_forward(mode):
    seen = []

    def counting(x: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return torch.sin(x)

    y = inv.checkpoint(inv.exact(inv.couple(counting), mode))(batch(3).requires_grad_(), batch(3).requires_grad_())
    torch.set_num_threads(2)
    try:
        y[0].sum().backward()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [1, 1]


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


COMPOSITIONS = {"rearranged": rearranged, "streams": streams}


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("mode", ["grid", "codes"])
@pytest.mark.parametrize("segments", [1, 3])
def test_compositions_are_exact(name, mode, segments):
    fs, x, _ = hard("attention")
    op = inv.exact(COMPOSITIONS[name](fs), mode)
    assert same_bits(step(inv.checkpoint(op, segments=segments), fs, x), step(op, fs, x))


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
    op = inv.exact(coupled([torch.sin, torch.cos] * 8))
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
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_a_graph_that_is_retained_gives_the_same_bits_again(mode):
    x = torch.randn(3, 4, requires_grad=True)
    y = inv.checkpoint(closing_over(torch.randn(2, 2), mode))(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True) for _ in range(2))
    assert same_bits(list(first), list(second))


# ---- what is kept ----


def kept_bytes(op: inv.Invertible, x: Tensor | tuple[Tensor, ...]) -> int:
    residue = torch.utils._pytree.tree_leaves(op.forward_with_residue(x)[1])
    return sum(t.numel() * t.element_size() for t in residue if isinstance(t, Tensor))


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_packed_codes_take_a_third_of_a_byte(dtype):
    """Per element and half coupling, where a block moves the stream by a third of its size."""
    x = 3 * batch(1 << 12, 16, dtype=dtype), 3 * batch(1 << 12, 16, dtype=dtype)
    f, g = (lambda x, w=w: x @ w for w in (batch(16, 16, dtype=dtype) / 12 for _ in range(2)))
    changed = 2 * x[0].numel()
    assert kept_bytes(inv.exact(inv.couple(f, g), "codes", pack=True), x) / changed <= 0.35
    assert kept_bytes(inv.exact(inv.couple(f, g), "codes"), x) / changed <= 1.05


def test_packed_codes_of_a_normalised_network_take_a_third_of_a_byte():
    fs = nets(32, lambda: Mlp(32), BF16)
    op = inv.exact(coupled(fs), "codes", pack=True)
    assert kept_bytes(op, batch(256, 64, dtype=BF16)) / (32 * 256 * 32) <= 0.35


def test_a_grid_keeps_nothing():
    x = batch(64, 16).requires_grad_()
    few, many = (inv.measure(inv.checkpoint(inv.exact(coupled([torch.sin] * n))), x).held_bytes for n in (4, 32))
    assert many == few


# ---- what goes wrong raises ----


def backward_after(change: Callable[[], object], op: inv.Invertible, x: Tensor, **options) -> None:
    y = inv.checkpoint(op, **options)(x.requires_grad_())
    change()
    y.sum().backward()


def nothing() -> None:
    pass


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_weights_that_change_behind_autograd_raise(mode):
    fs, x, _ = hard("attention")
    message = "was not rebuilt with the bits of forward; a function gave other bits than in forward: weights"
    with pytest.raises(ReplayError, match=message):
        backward_after(lambda: fs[1].v.weight.data.add_(0.1), inv.exact(coupled(fs, 2), mode), x)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_weights_that_an_optimiser_changes_raise(mode):
    fs, x, _ = hard("attention")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), torch.no_grad():
        with torch.enable_grad():
            backward_after(torch.no_grad()(lambda: fs[1].v.weight.add_(0.1)), inv.exact(coupled(fs, 2), mode), x)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_a_trunk_whose_input_needs_no_gradient_has_a_witness_too(mode):
    fs, x, _ = hard("attention")
    y = inv.checkpoint(inv.exact(coupled(fs, 2), mode))(x)
    fs[1].v.weight.data.add_(0.1)
    with pytest.raises(ReplayError, match=r"^exact\(half\(Attention, target=0\)\) was not rebuilt"):
        torch.autograd.grad(y.sum(), [fs[0].q.weight])


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_buffers_that_change_behind_autograd_raise(mode):
    fs, x, _ = hard("batch norm in eval")
    with pytest.raises(ReplayError, match="was not rebuilt"):
        backward_after(lambda: fs[1][1].running_mean.data.add_(0.1), inv.exact(coupled(fs), mode), x)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_random_numbers_that_are_not_replayed_raise(mode):
    fs, x, _ = hard("encoder with dropout")
    with pytest.raises(ReplayError, match="was not rebuilt"):
        backward_after(nothing, inv.exact(coupled(fs, 2), mode), x, preserve_rng_state=False)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_random_numbers_of_python_raise(mode):
    op = inv.exact(inv.chain(inv.split(2), inv.couple(lambda x: x * random.random()), inv.concat(2)), mode)
    with pytest.raises(ReplayError, match="was not rebuilt"):
        backward_after(nothing, op, batch(4, 4))


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_a_forward_without_gradients_raises(mode, monkeypatch):
    """The fault is seeded: with gradients off, LSTM takes another kernel."""
    monkeypatch.setattr(exact_module.Exact, "taped", False)
    monkeypatch.setattr(exact_module.Witnessed, "taped", False)
    fs, x, _ = hard("lstm in eval")
    with pytest.raises(ReplayError, match="was not rebuilt"):
        backward_after(nothing, inv.exact(coupled(fs, 2), mode), x)


def far(x: Tensor) -> Tensor:
    return 1e3 * torch.sin(x)


def test_a_range_that_was_not_asked_raises_in_backward(monkeypatch):
    """The fault is seeded: nothing is noted, and a state leaves the grid."""
    monkeypatch.setattr(exact_module, "_noted", lambda path, wire: wire)
    with pytest.raises(ReplayError, match="was not rebuilt"):
        backward_after(nothing, inv.exact(coupled([far] * 4), k=20, carrier=F32), batch(4, 4))


def test_codes_that_are_lost_raise(monkeypatch):
    """The fault is seeded: escapes are dropped."""
    none = torch.empty(0, dtype=torch.int32)
    monkeypatch.setattr(exact_module, "difference", lambda x, guess: (*difference(x, guess)[:2], none, none))
    with pytest.raises(ReplayError, match="was not rebuilt"):
        backward_after(nothing, inv.exact(coupled([far] * 4), "codes"), batch(64, 64))


def test_debug_names_the_stage_that_was_not_rebuilt():
    fs = nets(6, lambda: nn.Linear(8, 8), F32)
    fs[3] = Spy(fs[3])
    message = r"^exact\(half\(Spy, target=1\)\) was not rebuilt"
    with inv.debug(True), pytest.raises(ReplayError, match=message):
        backward_after(lambda: fs[3].net.bias.data.add_(1), inv.exact(coupled(fs), "codes"), batch(4, 16))


def test_a_state_out_of_range_is_named_with_k():
    op = inv.exact(coupled([torch.sin, torch.sin, torch.sin, far]), carrier=F32, k=16)
    with pytest.raises(DomainError) as caught:
        inv.chain(torch.sin, op)(batch(8, 8))
    assert str(caught.value).startswith(
        "chain stage 1 (exact): chain stage 2 (couple): g: exact(mode='grid', k=16): a state left the range of the "
        "grid, expected magnitudes below 256 = 2^(24 - k), float32's exact sums, got "
    )
    assert str(caught.value).endswith("bound what the functions return, or take mode='codes'")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**22])
def test_an_input_outside_of_a_grid_raises(value):
    x = batch(4, 4)
    x[1, 2] = value
    with pytest.raises(DomainError, match=r"^its input: exact\(mode='grid', k=32\): a state left the range"):
        inv.exact(coupled([torch.sin, torch.sin]))(x)


def test_nan_from_a_function_on_a_grid_raises():
    op = inv.exact(coupled([torch.log, torch.sin]))
    with pytest.raises(DomainError, match=r"^chain stage 1 \(couple\): f: .* got nan; pass a smaller k"):
        inv.checkpoint(op)(-batch(4, 4).abs().requires_grad_())


class Of(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


def test_codes_take_infinities_nan_and_negative_zeros():
    x = batch(8, 16)
    x[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    spies = [Spy(Of(fn)) for fn in (torch.sign, torch.sin, far, torch.cos)]
    step(inv.checkpoint(inv.exact(coupled(spies), "codes")), spies, x)
    assert all(same_bits(f.given[:1], f.given[1:]) for f in spies)


def test_a_grid_has_no_negative_zero():
    x = torch.tensor([[-0.0, 0.0, -1e-12, 1.0]])
    assert same_bits([inv.exact(coupled([torch.zeros_like] * 2))(x)], [torch.tensor([[0.0, 0.0, 0.0, 1.0]])])


REFUSED = {
    "affine": (
        lambda: inv.chain(inv.split(2), inv.couple(torch.sin, law=inv.affine)),
        r"^chain stage 1 \(couple\): exact\(mode='grid'\): half\(sin, target=0, law=affine\) does not stay on a grid, "
        r"expected additive couplings, and ops that move elements; mode='codes' takes any op; a stem or a head",
    ),
    "pair": (
        lambda: inv.parallel(inv.chain(), inv.pair(torch.exp, torch.log)),
        r"^parallel component 1 \(pair\): exact\(mode='grid'\): pair\(exp, log\) does not stay on a grid",
    ),
    "one way": (lambda: inv.chain(torch.sin, inv.split(2)), r"one_way\(sin\) does not stay on a grid"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_grid_refuses_what_does_not_stay_on_it(name):
    make, message = REFUSED[name]
    with pytest.raises(OptionError, match=message):
        inv.exact(make())


OPTIONS = {
    "mode": (
        dict(mode="bits"),
        "exact: mode='bits' with no options, expected mode='grid' with carrier and k, or mode=",
    ),
    "pack on a grid": (dict(pack=True), "exact: mode='grid' with pack, expected"),
    "k with codes": (dict(mode="codes", k=3), "exact: mode='codes' with k, expected"),
    "carrier with codes": (dict(mode="codes", carrier=F64), "exact: mode='codes' with carrier, expected"),
    "carrier": (dict(carrier=BF16), "exact: carrier is torch.bfloat16, expected torch.float32 or torch.float64"),
    "k": (dict(carrier=F32, k=24), "exact: k is 24, expected 0 to 23, the bits of torch.float32"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_do_not_fit_raise(name):
    options, message = OPTIONS[name]
    with pytest.raises(OptionError, match=f"^{message}"):
        inv.exact(inv.couple(torch.sin), **options)


@pytest.mark.parametrize("dtypes", [(F32, F64), (torch.complex64, torch.complex64), (torch.int64, torch.int64)])
def test_a_grid_refuses_wires_that_are_not_real_and_of_one_dtype(dtypes):
    x = tuple(torch.ones(2, dtype=dtype) for dtype in dtypes)
    with pytest.raises(
        WireError, match=r"received \(\(2,\), \(2,\)\), expected real floating-point tensors, all of one"
    ):
        inv.exact(inv.couple(torch.sin))(x)


def test_exact_refuses_what_is_no_op():
    with pytest.raises(
        NotInvertibleError, match="^exact: sin is builtin_function_or_method, expected an invertible op"
    ):
        inv.exact(torch.sin)


@pytest.mark.compile
@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_a_lowered_exact_op_refuses_to_be_compiled(mode):
    compiled = torch.compile(inv.checkpoint(inv.exact(coupled([torch.sin, torch.cos]), mode)), backend="eager")
    with pytest.raises(Exception, match="ReplayError: an exact op is being compiled, expected that it runs as it is"):
        compiled(torch.ones(2, 4, requires_grad=True))


def test_the_exact_inverse_needs_its_codes():
    op = inv.exact(inv.pair(torch.exp, torch.log), "codes")
    with pytest.raises(NotInvertibleError, match=r"^exact\(pair\(exp, log\)\) needs its codes for the inverse; op.inv"):
        op.inverse_with_residue(None, torch.ones(2))


# ---- bit patterns ----

REALS = [BF16, F16, F32, F64]


def awkward(dtype: torch.dtype) -> Tensor:
    finite = torch.randn(64) * 10.0 ** torch.randint(-6, 6, (64,))
    return torch.cat([finite, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])]).to(dtype)


@pytest.mark.parametrize("dtype", [*REALS, torch.complex64, torch.complex128])
def test_a_difference_corrects_any_guess(dtype):
    x = awkward(dtype)
    for guess in (x, x.flip(0), (x + 3) - 3, torch.zeros_like(x)):
        assert same_bits([corrected(guess, difference(x, guess))], [x])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4, 5)])
def test_a_difference_takes_any_shape(shape):
    x = torch.randn(shape)
    codes = difference(x, x + 1)
    assert same_bits([corrected(x + 1, codes)], [x])
    assert torch.equal(unpack_codes(*pack_codes(codes[1]), shape), codes[1])


def test_a_corrected_tensor_has_the_layout_of_the_original():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    found = corrected(x.contiguous() + 1, difference(x, x.contiguous() + 1))
    assert same_bits([found], [x]) and found.stride() == x.stride()


@pytest.mark.parametrize("dtype", REALS)
def test_bits_are_those_of_numpy(dtype):
    x = awkward(dtype)
    if dtype is not BF16:  # which numpy lacks
        assert bits_of(x).tolist() == x.numpy().view(f"int{8 * x.element_size()}").tolist()
    assert same_bits([from_bits(bits_of(x), dtype)], [x])


@pytest.mark.parametrize("dtype", REALS)
def test_a_hash_sees_one_bit_and_one_exchange(dtype):
    x = awkward(dtype)[:-1]
    for i in range(1, len(x), 7):
        flipped, exchanged = x.clone(), x.clone()
        bits_of(flipped)[i] ^= 1
        exchanged[[0, i]] = x[[i, 0]]
        assert bit_hash(flipped) != bit_hash(x) != bit_hash(exchanged)


def test_codes_pack_every_value():
    codes = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(unpack_codes(*pack_codes(codes), codes.shape), codes)
