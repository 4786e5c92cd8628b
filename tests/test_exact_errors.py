"""What goes wrong with `exact` raises: what was not rebuilt, what leaves the grid, and options that do not fit."""

import sys
from collections.abc import Callable

import pytest
import torch
from exact_networks import BF16, F32, F64, Spy, batch, hard, nets, same_bits, step
from kit import network
from torch import Tensor, nn

import invfunc as inv
from invfunc.errors import DomainError, NotInvertibleError, OptionError, ReplayError, WireError
from invfunc.exact.bits import difference

exact_module = sys.modules["invfunc.exact.transform"]  # the name in the package is that of the function


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
        backward_after(lambda: fs[1].v.weight.data.add_(0.1), inv.exact(network(fs, 2), mode), x)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_weights_that_an_optimiser_changes_raise(mode):
    fs, x, _ = hard("attention")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), torch.no_grad():
        with torch.enable_grad():
            backward_after(torch.no_grad()(lambda: fs[1].v.weight.add_(0.1)), inv.exact(network(fs, 2), mode), x)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_a_trunk_whose_input_needs_no_gradient_has_a_witness_too(mode):
    fs, x, _ = hard("attention")
    y = inv.checkpoint(inv.exact(network(fs, 2), mode))(x)
    fs[1].v.weight.data.add_(0.1)
    with pytest.raises(
        ReplayError, match=r"^chain stage \d \(exact\): exact\(half\(Attention, target=0\)\) was not rebuilt"
    ):
        torch.autograd.grad(y.sum(), [fs[0].q.weight])


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_buffers_that_change_behind_autograd_raise(mode):
    fs, x, _ = hard("batch norm in eval")
    with pytest.raises(ReplayError, match="was not rebuilt"):
        backward_after(lambda: fs[1][1].running_mean.data.add_(0.1), inv.exact(network(fs), mode), x)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_random_numbers_that_are_not_replayed_raise(mode):
    fs, x, _ = hard("encoder with dropout")
    with pytest.raises(ReplayError, match="was not rebuilt"):
        backward_after(nothing, inv.exact(network(fs, 2), mode), x, preserve_rng_state=False)


@pytest.mark.parametrize("mode", ["grid", "codes"])
def test_random_numbers_of_a_generator_of_ones_own_raise(mode):
    own = torch.Generator()
    op = inv.exact(
        inv.chain(inv.split(2), inv.couple(lambda x: x.sin() * torch.rand((), generator=own)), inv.concat(2)), mode
    )
    with pytest.raises(ReplayError, match="was not rebuilt"):
        backward_after(nothing, op, batch(4, 4))


def far(x: Tensor) -> Tensor:
    return 1e3 * torch.sin(x)


def test_a_range_that_was_not_asked_raises_in_backward(monkeypatch):
    """The fault is seeded: nothing is noted, and a state leaves the grid."""
    monkeypatch.setattr(exact_module, "_noted", lambda path, wire: wire)
    with pytest.raises(ReplayError, match="was not rebuilt"):
        backward_after(nothing, inv.exact(network([far] * 4), k=20, carrier=F32), batch(4, 4))


def test_codes_that_are_lost_raise(monkeypatch):
    """The fault is seeded: escapes are dropped."""
    none = torch.empty(0, dtype=torch.int32)
    monkeypatch.setattr(exact_module, "difference", lambda x, guess: (*difference(x, guess)[:2], none, none))
    with pytest.raises(ReplayError, match="was not rebuilt"):
        backward_after(nothing, inv.exact(network([far] * 4), "codes"), batch(64, 64))


def test_debug_names_the_stage_that_was_not_rebuilt():
    fs = nets(6, lambda: nn.Linear(8, 8), F32)
    fs[3] = Spy(fs[3])
    message = r"^chain stage \d \(exact\): exact\(half\(Spy, target=1\)\) was not rebuilt"
    with inv.debug(True), pytest.raises(ReplayError, match=message):
        backward_after(lambda: fs[3].net.bias.data.add_(1), inv.exact(network(fs), "codes"), batch(4, 16))


def test_a_state_out_of_range_is_named_with_k():
    op = inv.exact(network([torch.sin, torch.sin, torch.sin, far]), carrier=F32, k=16)
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
        inv.exact(network([torch.sin, torch.sin]))(x)


def test_nan_from_a_function_on_a_grid_raises():
    op = inv.exact(network([torch.log, torch.sin]))
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
    spies = [Spy(Of(fn)) for fn in (torch.abs, torch.sin, far, torch.cos)]
    step(inv.checkpoint(inv.exact(network(spies), "codes")), spies, x)
    assert all(same_bits(f.given[:1], f.given[1:]) for f in spies)


def test_a_grid_has_no_negative_zero():
    x = torch.tensor([[-0.0, 0.0, -1e-12, 1.0]])
    assert same_bits([inv.exact(network([torch.zeros_like] * 2))(x)], [torch.tensor([[0.0, 0.0, 0.0, 1.0]])])


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
    fast = inv.checkpoint(inv.exact(network([torch.sin, torch.cos]), mode))
    compiled = torch.compile(lambda x: fast(x), backend="eager", fullgraph=True)  # code that no test before has run
    with pytest.raises(Exception, match="ReplayError: an exact op is being compiled, expected that it runs as it is"):
        compiled(torch.ones(2, 4, requires_grad=True))


def test_the_exact_inverse_needs_its_codes():
    op = inv.exact(inv.pair(torch.exp, torch.log), "codes")
    with pytest.raises(NotInvertibleError, match=r"^exact\(pair\(exp, log\)\) needs its codes for the inverse; op.inv"):
        op.inverse_with_residue(None, torch.ones(2))


@pytest.mark.compile
@pytest.mark.parametrize(
    "part", [inv.exact, lambda op: inv.exact(op, "codes"), lambda op: inv.chain(op, inv.exact(op))]
)
def test_compiled_stages_refuse_an_exact_op_by_name_where_it_is_inverted(part):
    op = inv.chain(inv.split(2), part(inv.couple(torch.sin)), inv.concat(2))
    fast = inv.compile_stages(inv.checkpoint(op), backend="aot_eager")
    with pytest.raises(
        ReplayError, match=r"stage [12] \(exact\): an exact op is being compiled, .* compile the functions"
    ):
        fast(torch.ones(2, 4, requires_grad=True))
    stored, x = inv.compile_stages(inv.checkpoint(op, mode="store"), backend="aot_eager"), torch.rand(2, 4)
    torch.testing.assert_close(stored(x.requires_grad_()), op(x))


def test_compile_stages_takes_ops_alone():
    with pytest.raises(NotInvertibleError, match=r"compile_stages: Lowered is Lowered, .* pass its op: module.op"):
        inv.compile_stages(inv.nn.Lowered(inv.split(2)))
    with pytest.raises(NotInvertibleError, match="compile_stages: sin is .*, expected an invertible op"):
        inv.compile_stages(torch.sin)
