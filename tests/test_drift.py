"""The drift meter: what it estimates, what it says, when it keeps silent, and what it costs. And cuts."""

import copy
import gc
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain, count, repeat
from typing import Any

import pytest
import torch
from kit import WIDE, Counted, branch, leaf, network
from torch import Tensor, nn

import invfunc as inv
from invfunc import ops
from invfunc.compat import memcnn
from invfunc.core.compare import relative_error_of_numbers
from invfunc.engine import meter as drift
from invfunc.errors import DriftError, NotInvertibleError, OptionError
from invfunc.look.memory import measure

# ---- chains that drift -----------------------------------------------------------------------------------------------


def additive(depth: int, gain: float = 1.0, width: int = WIDE) -> inv.Invertible:
    return network([branch(width, gain) for _ in range(2 * depth)], dim=-1)


def scaled(depth: int, gain: float = 1.0) -> inv.Invertible:
    def half() -> Any:
        return inv.ops.tanh_scale(branch(WIDE, gain, 2 * WIDE), 1.0, dim=-1)

    return network([half() for _ in range(2 * depth)], dim=-1, law=inv.affine)


def convolutional(depth: int) -> inv.Invertible:
    def half() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    return inv.chain(inv.split(2), *[inv.couple(half(), half()) for _ in range(depth)], inv.concat(2))


def on_tuples(depth: int) -> inv.Invertible:
    """No split: the first stage is a coupling of two components of different sizes."""
    up, down = (lambda: nn.Linear(3, 16)), (lambda: nn.Linear(16, 3))
    return inv.chain(*[inv.couple(up(), down()) for _ in range(depth)])


TWO = torch.tensor(2.0)  # a tensor, so that the graph of a product with it has something to ask for


def wrong_by(error: float) -> inv.Invertible:
    """A pair whose inverse is off by a known part of x."""
    return inv.pair(lambda x: TWO * x, lambda y: y / 2 * (1 + error), name="wrong")


def drawn(x: Tensor) -> Tensor:
    """Another value whenever it is asked."""
    return TWO * (x * (1 + next(DRAWS) / 2**16)).exp()


DRAWS = count()


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


CHAINS: dict[str, tuple[Callable[[], inv.Invertible], Callable[[], Any]]] = {
    "additive, depth 8": (lambda: additive(8, 2.0), rows(16, 2 * WIDE)),
    "additive, depth 32": (lambda: additive(32, 1.5), rows(16, 2 * WIDE)),
    "additive, wide": (lambda: additive(4, 2.0, 64), rows(8, 128)),
    "affine, depth 4": (lambda: scaled(4), rows(16, 2 * WIDE)),
    "affine, depth 8": (lambda: scaled(8, 2.0), rows(16, 2 * WIDE)),
    "convolutional": (lambda: convolutional(8), rows(2, 8, 6, 6)),
    "components": (lambda: on_tuples(12), lambda: (torch.randn(32, 16), torch.randn(32, 3))),
}


@pytest.fixture
def float32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the meter has estimated, trunk by trunk as backward meets them."""
    found: list[float] = []

    def noted(now: Any, was: Any) -> float:
        found.append(relative_error_of_numbers(now, was))
        return found[-1]

    monkeypatch.setattr(drift, "relative_error_of_numbers", noted)
    return found


def step(op: inv.Invertible, x: Any, **options: Any) -> None:
    """A training step; its gradients go nowhere."""
    y = inv.checkpoint(op, **options)(x)
    outs = y if isinstance(y, tuple) else (y,)
    sum(out.sum() for out in outs).backward()


def flat(x: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in (x if isinstance(x, tuple) else (x,))])


def true_error(op: inv.Invertible, x: Any) -> float:
    """The relative error of the whole input after the round trip, by the norm."""
    with torch.no_grad():
        back = flat(op.inverse(op(x))).double()
    return float(torch.dist(back, flat(x).double()) / flat(x).double().norm())


# ---- what it estimates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
def test_the_estimate_is_within_a_factor_of_2(name: str, float32: None, estimates: list[float]) -> None:
    make, inputs = CHAINS[name]
    for seed in range(3):
        torch.manual_seed(seed)
        op, x = make(), inputs()
        step(op, x, drift=0.5, early_stop=False)
        assert 0.5 < estimates.pop() / true_error(op, x) < 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_every_dtype_is_measured(dtype: torch.dtype, estimates: list[float]) -> None:
    op, w = wrong_by(0.25), torch.ones((), requires_grad=True)
    x = torch.randn(40, 40).to(dtype) * (1 + 0 * w).to(dtype)
    y = inv.checkpoint(op, drift=0.5)(x)
    (y.abs().float() if dtype.is_complex else y).sum().backward()
    assert math.isclose(estimates[0], 0.25, rel_tol=0.05)


def test_an_exact_inverse_has_no_drift(estimates: list[float]) -> None:
    step(inv.chain(wrong_by(0.0), inv.split(2), inv.concat(2)), torch.randn(4, 6, requires_grad=True))
    assert estimates == [0.0]


def test_what_only_moves_values_has_no_trunk(estimates: list[float]) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    op = inv.checkpoint(inv.chain(ops.transpose(0, 1), inv.split(2, dim=0), inv.swap(), inv.concat(2, dim=0)))
    assert inv.look.saved(op, x) == []
    assert inv.measure(op, x).held_bytes == 4 * 6 * x.element_size()  # its output
    step(op, x)
    assert estimates == []


def test_a_tensor_of_few_values_is_read_whole(estimates: list[float]) -> None:
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    step(inv.pair(lambda x: TWO * (x + 1), lambda y: y / 2 - 1.5), x, drift=0.5)
    assert math.isclose(estimates[0], math.hypot(0.5, 0.5) / 5)


def test_where_all_values_are_zero_the_error_is_absolute(estimates: list[float]) -> None:
    op = inv.pair(lambda x: TWO * (x + 1), lambda y: y / 2 - 1.25)
    step(op, torch.zeros(4, requires_grad=True), drift=0.9)
    assert estimates == [0.5]


def test_the_sampled_values_are_spread_over_the_whole_tensor() -> None:
    x = torch.arange(64 * 32.0).reshape(64, 32)
    found = torch.tensor(drift._sample(x, drift._spread(x.numel(), 64, x.device))).long()
    assert len(set(found.tolist())) == 64
    assert len(set((found // 32).tolist())) > 40 and len(set((found % 32).tolist())) > 20
    assert found.diff().abs().max() < 64 * 32 and (found.sort().values.diff() < 64).all()


def test_strides_do_not_matter() -> None:
    x = torch.randn(6, 5, 8, 8)
    places = drift._spread(x.numel(), 64, x.device)
    for same in x.to(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 0], x.mT.contiguous().mT:
        assert not same.is_contiguous() and drift._sample(same, places) == drift._sample(x, places)


# ---- what it says ----------------------------------------------------------------------------------------------------


CHECK = "; inv.check(op, x) measures every stage"
MESSAGE = (
    "the input of wrong, rebuilt in backward, is off by about 1e-02 of its size: the inverse of wrong does not give its "
    "input back, off by about 1e-02, expected at most 1e-06 (float64); mend the inverse" + CHECK
)


def test_it_warns_by_default_with_the_error_and_the_cause() -> None:
    with pytest.warns(inv.errors.DriftWarning) as caught:
        step(wrong_by(0.01), leaf(3, 4))
    assert [str(w.message) for w in caught] == [MESSAGE]


def test_it_raises_when_asked() -> None:
    with pytest.raises(DriftError) as caught:
        step(wrong_by(0.01), leaf(3, 4), drift="raise")
    assert str(caught.value) == MESSAGE


def test_it_names_the_stage_behind_a_cut_and_what_is_stored() -> None:
    op = inv.chain(
        wrong_by(0.0), torch.neg, wrong_by(0.0), inv.mark(torch.sin, "recompute"), wrong_by(0.01), wrong_by(0.02)
    )
    with pytest.warns(inv.errors.DriftWarning) as caught:
        step(op, leaf(3, 4), cuts=[5])
    assert [str(w.message).partition(", ")[0] for w in caught] == [
        "chain stage 5 (wrong): its input",
        "what one_way(sin) gives",
    ]


def test_a_tolerance_of_ones_own() -> None:
    step(wrong_by(0.01), leaf(3, 4), drift=0.02)
    with pytest.warns(inv.errors.DriftWarning, match="expected at most 5e-03"):
        step(wrong_by(0.01), leaf(3, 4), drift=0.005)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-3), (torch.float64, 1e-6), (torch.bfloat16, 3e-2), (torch.float16, 3e-2)]
)
def test_the_default_tolerance_is_that_of_the_stream(dtype: torch.dtype, bound: float) -> None:
    step(wrong_by(0.5 * bound), leaf(50, 4).to(dtype))
    with pytest.warns(inv.errors.DriftWarning):
        step(wrong_by(4 * bound), leaf(50, 4).to(dtype))


def test_off_is_off() -> None:
    step(wrong_by(0.5), leaf(3, 4), drift="off")


def test_a_value_that_is_lost_is_named() -> None:
    lost = inv.pair(lambda x: TWO * x, lambda y: torch.where(y > 0, y / 2, torch.nan))
    with pytest.raises(
        DriftError, match="is not finite where it was: the inverse of pair.* not finite for what it gave"
    ):
        step(lost, torch.tensor([1.0, -1.0], requires_grad=True), drift="raise")


def test_what_is_not_finite_in_forward_is_not_drift() -> None:
    step(wrong_by(0.0), torch.tensor([1.0, math.inf, math.nan], requires_grad=True), drift="raise")


def test_python_shows_a_warning_of_one_size_once() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            step(wrong_by(0.01), leaf(3, 4))
    assert len(shown) == 1


@pytest.mark.parametrize("bad", ["on", 0, -1.0, math.nan, math.inf, True, None])
def test_other_options_are_named(bad: Any) -> None:
    with pytest.raises(OptionError, match="checkpoint: drift=.*, expected 'warn', 'raise', 'off', or a tolerance"):
        inv.checkpoint(wrong_by(0.0), drift=bad)


def test_a_tolerance_below_the_rounding_of_the_stream_is_named() -> None:
    with pytest.raises(OptionError) as caught:
        step(wrong_by(0.0), leaf(3).to(torch.bfloat16), drift=1e-3)
    expected = "checkpoint: drift=0.001, expected at least 0.0078, the rounding of bfloat16; ask for less, or widen the"
    assert str(caught.value) == f"{expected} stream"


# ---- a first stage that stops early, whose input is not rebuilt -------------------------------------------------------


def test_the_estimate_is_that_of_the_first_wire_that_is_rebuilt(float32: None, estimates: list[float]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        fs, x = [branch(WIDE, 1.5) for _ in range(32)], torch.randn(16, 2 * WIDE)
        step(network(fs, dim=-1), x, drift=0.5)
        behind, (left, right) = network([torch.zeros_like, *fs[1:]], dim=-1), x.chunk(2, -1)
        wire, saved = estimates
        assert 0.5 < wire / true_error(behind, torch.cat([left + fs[0](right), right], -1).detach()) < 2
        assert 0.1 < saved / wire < 10
        estimates.clear()


TOLD: dict[str, tuple[Callable[[], inv.Invertible], str]] = {
    "a later stage": (
        lambda: inv.chain(inv.couple(nn.Linear(4, 4)), inv.couple(drawn)),
        "what chain stage 0 (couple) gives, rebuilt in backward, .*: chain stage 1 (couple) gave two values for one input",
    ),
    "the first": (
        lambda: inv.chain(inv.couple(drawn), inv.couple(nn.Linear(4, 4))),
        "what chain stage 0 (couple) saves for backward, rebuilt in backward, .*: chain stage 0 (couple) gave two values",
    ),
    "the only one": (
        lambda: inv.couple(drawn),
        "what the pipeline saves for backward, .*: half(drawn, target=0) gave two",
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_of_a_stage_that_stops_early_what_it_gave_and_saved_is_told(name: str) -> None:
    make, text = TOLD[name]
    with pytest.warns(inv.errors.DriftWarning) as caught:
        step(make(), (leaf(3, 4), leaf(3, 4)))
    assert len(caught) == 1
    assert re.search(re.escape(text).replace(r"\.\*", ".*"), str(caught[0].message))


# ---- where it is silent ----------------------------------------------------------------------------------------------


def test_transforms_and_second_derivatives_are_not_measured(estimates: list[float]) -> None:
    fast, x = inv.checkpoint(wrong_by(0.5), drift="raise"), leaf(3)
    torch.func.grad(lambda x: fast(x).sum())(x.detach())
    torch.func.vmap(lambda x: fast(x))(x)
    torch.autograd.grad(fast(x).sum(), x, create_graph=True)
    with torch.no_grad():
        fast(x)
    assert estimates == []


def test_what_is_frozen_is_not_rebuilt_for_the_meter(estimates: list[float]) -> None:
    calls: list[str] = []
    frozen = inv.pair(lambda x: TWO * x, lambda y: calls.append("inverse") or y / 2)
    w = torch.ones(3, requires_grad=True)
    step(inv.chain(frozen, inv.pair(lambda x: x * w, lambda y: y / w)), torch.randn(3))
    assert calls == [] and len(estimates) == 1


def test_subclasses_and_empty_tensors_are_not_measured(estimates: list[float]) -> None:
    class Named(Tensor):
        pass

    step(wrong_by(0.5), torch.ones(3).as_subclass(Named).requires_grad_())
    step(wrong_by(0.5), leaf(0, 3))
    assert estimates == []


def test_a_donated_input_is_measured(estimates: list[float]) -> None:
    x = leaf(4, 4) * 1
    step(additive(2, width=2), x, donate=True)
    assert len(estimates) == 1 and estimates[0] < 1e-12


# ---- what it costs ---------------------------------------------------------------------------------------------------


def test_nothing_is_evaluated_again() -> None:
    calls = {"f": 0, "g": 0}

    def counted(name: str, fn: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            calls[name] += 1
            return fn(x)

        return call

    step(inv.couple(counted("f", nn.Linear(3, 3)), counted("g", nn.Linear(3, 3))), (leaf(2, 3), leaf(2, 3)))
    assert calls == {"f": 2, "g": 2}


def test_nothing_of_the_size_of_an_activation_is_kept() -> None:
    op, x = additive(4), leaf(50, 2 * WIDE)
    step(op, x)
    with_meter, without = (measure(lambda d=d: inv.checkpoint(op, drift=d)(x)).held_bytes for d in ("warn", "off"))
    assert with_meter == without
    peaks = [measure(lambda d=d: step(op, x, drift=d)).peak_bytes for d in ("warn", "off")]
    assert peaks[0] == peaks[1]


def test_the_probe_does_not_keep_the_input_alive() -> None:
    gc.disable()
    try:
        x = leaf(50, 4) * 1
        seen = weakref.ref(x)
        y = inv.checkpoint(wrong_by(0.0))(x)
        del x
        assert seen() is None
        y.sum().backward()
    finally:
        gc.enable()


# ---- devices, whose samples arrive later: more in device/cases_waits.py -----------------------------------------------


@pytest.mark.cuda
def test_on_cuda_the_warning_comes_in_its_own_backward() -> None:
    op, x = wrong_by(0.1), torch.randn(64, 64, device="cuda", requires_grad=True)
    for text in "the next backward looks for the cause", "the inverse of wrong does not give its input back":
        with pytest.warns(inv.errors.DriftWarning, match=text):
            step(op, x)


# ---- causes ----------------------------------------------------------------------------------------------------------


def around(*stages: inv.Invertible) -> inv.Invertible:
    """Stages between two sound couplings."""
    return inv.chain(inv.split(2), inv.couple(nn.Linear(4, 4)), *stages, inv.couple(nn.Linear(4, 4)), inv.concat(2))


CAUSES: dict[str, tuple[Callable[[], inv.Invertible], str]] = {
    "random": (lambda: around(inv.couple(drawn)), "chain stage 2 (couple) gave two values for one input"),
    "wrong": (
        lambda: around(inv.parallel(wrong_by(0.01), inv.chain())),
        "the inverse of chain stage 2 (parallel): parallel component 0 (wrong) does not give its input back, off by "
        "about 1e-02",
    ),
    "wrong residue": (
        lambda: inv.chain(
            inv.pair(lambda x: (TWO * x, x.mean()), lambda r, y: y / 2 + 0 * r + 1, residue=True), ops.exp()
        ),
        "the inverse of chain stage 0 (pair) does not give its input back",
    ),
    "saturated": (
        lambda: inv.chain(inv.pair(lambda x: 30 * TWO * x, lambda y: y / 60), inv.pair(torch.tanh, ops.tanh().inverse)),
        "chain stage 1 (pair) has lost values, by saturation or a mask",
    ),
    "wrong, and not finite": (
        lambda: inv.chain(inv.pair(torch.tanh, torch.atanh), inv.pair(lambda x: 3 * TWO * x, lambda y: y / 4)),
        "is not finite where it was: the inverse of chain stage 1 (pair) does not give its input back, off by about 5e-01",
    ),
    "saturated, and not finite": (
        lambda: inv.chain(inv.pair(lambda x: 90 * TWO * x, lambda y: y / 180), inv.pair(torch.tanh, torch.atanh)),
        "is not finite where it was: the inverse of chain stage 1 (pair) gives values that are not finite for what it "
        "gave, expected at most 1e-06 (float64); mend the inverse or, where the function saturates, bound what it is",
    ),
    "lost where values are masked": (
        lambda: inv.chain(inv.pair(torch.sinh, torch.asinh), inv.pair(lambda x: x * MASK, lambda y: y), ops.tanh()),
        "chain stage 1 (pair) has lost values, by saturation or a mask",
    ),
}
MASK = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_told_with_its_stage(name: str) -> None:
    make, text = CAUSES[name]
    with pytest.warns(inv.errors.DriftWarning) as caught:
        step(make(), leaf(3, 8))
    assert text in str(caught[0].message)
    assert str(caught[0].message).endswith(CHECK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stage_that_saturates_is_named_in_half_precision_too(dtype: torch.dtype) -> None:
    op = inv.chain(inv.pair(torch.sinh, torch.asinh), inv.pair(torch.exp, ops.log().forward))
    text = r"chain stage 1 \(pair\) has lost values, by saturation or a mask, .*; keep its input \(inv.mark\(op, 'store'\)\)"
    with pytest.warns(inv.errors.DriftWarning, match=text):
        step(op, torch.tensor([-6.0, -3.0, -2.5, -1.0, 0.5, 1e-3], dtype=dtype).requires_grad_())


def test_a_function_that_is_another_one_in_backward_is_told_from_rounding() -> None:
    scales = chain([1.0], repeat(1.5))
    op = around(inv.couple(lambda x: next(scales) * TWO * x))
    y = inv.checkpoint(op)(leaf(3, 8))
    with pytest.warns(inv.errors.DriftWarning, match="a function did something else in forward"):
        y.sum().backward()


def test_rounding_names_the_stage_where_it_grows_most() -> None:
    steep = inv.couple(lambda x: (1e-3 * TWO * torch.ones_like(x), x), law=inv.affine)
    sound = [inv.couple(torch.sin, torch.cos)] * 3
    op = inv.chain(inv.split(2), *sound, steep, *sound, inv.concat(2))
    text = r": rounding, which grows about \de\+\d\d times on the way, most at chain stage 4 \(couple\), [\d.e+]+ times"
    with pytest.warns(inv.errors.DriftWarning, match=text):
        step(op, leaf(3, 8), drift=1e-15)


def linear(width: int) -> nn.Module:
    return nn.Linear(width, width, dtype=torch.float32)


def test_rounding_that_has_grown_above_the_size_of_what_was_is_still_told_to_be_rounding() -> None:
    torch.manual_seed(0)
    op = inv.chain(inv.split(2), *[inv.couple(linear(64), linear(64)) for _ in range(64)], inv.concat(2))
    with pytest.warns(inv.errors.DriftWarning, match=r"off by about \de\+0[1-9] of its size: rounding, which grows"):
        step(op, torch.randn(64, 128, dtype=torch.float32, requires_grad=True))


def test_of_blocks_that_free_their_input_the_drift_is_told_to_come_from_those_behind() -> None:
    torch.manual_seed(0)
    blocks = [memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(linear(64), linear(64))) for _ in range(64)]
    x = torch.randn(64, 128, dtype=torch.float32, requires_grad=True)
    with pytest.warns(inv.errors.DriftWarning) as caught:
        nn.Sequential(*blocks)(x * 1).sum().backward()
    behind = r"its output came back off by about \de[+-]\d\d from the blocks behind, which free their input: rounding adds up"
    assert len(caught) > 3
    assert all([re.search(behind, str(warning.message)) for warning in caught])


def test_the_cause_is_looked_for_once() -> None:
    calls, wrong = [0], wrong_by(0.01)
    op = inv.chain(inv.pair(lambda x: [calls.__setitem__(0, calls[0] + 1), TWO * x][1], lambda y: y / 2), wrong)
    counts = []
    for _ in range(3):
        calls[0] = 0
        with pytest.warns(inv.errors.DriftWarning):
            step(op, leaf(3, 4))
        counts.append(calls[0])
    assert counts == [5, 2, 2]  # forward and its replay; the first time three times more


def test_the_cause_is_looked_for_once_where_functions_are_made_anew_for_each_call() -> None:
    net, wrong, counts = Counted(nn.Linear(4, 4)), inv.parallel(wrong_by(0.01), inv.chain()), []
    for _ in range(3):
        net.count = 0
        couplings = [inv.couple(lambda x: net(x).sin()), wrong, inv.couple(lambda x: net(x).cos()), inv.swap()]
        op = inv.chain(inv.split(2), *couplings, inv.couple(torch.sin), inv.concat(2))
        with pytest.warns(inv.errors.DriftWarning):
            step(op, torch.ones(3, 8, requires_grad=True))
        counts.append(net.count)
    assert counts[0] > 4
    assert counts[1:] == [4, 4]


def test_looking_for_the_cause_changes_nothing() -> None:
    net, found = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), []
    wrong = inv.parallel(wrong_by(0.01), inv.chain())
    op = inv.chain(inv.split(2), inv.couple(net), wrong, inv.couple(torch.sin), inv.concat(2))
    before, x = copy.deepcopy(net.state_dict()), leaf(3, 8)
    for on in "warn", "off":
        torch.manual_seed(0)
        net.load_state_dict(before)
        with pytest.warns(inv.errors.DriftWarning) if on == "warn" else nullcontext():
            gradients = torch.autograd.grad(inv.checkpoint(op, drift=on)(x).sum(), [x, *net.parameters()])
        found.append([*gradients, *net.buffers(), torch.rand(3)])
        found[-1] = [t.clone() for t in found[-1]]
    assert all(map(torch.equal, *found))


# ---- cuts ------------------------------------------------------------------------------------------------------------


def test_segments_and_cuts_store_alike(float32: None) -> None:
    op, x = additive(10), torch.randn(4, 2 * WIDE)
    ways = {}, {"cuts": [3, 6, 9]}, {"segments": 4}
    held = [measure(lambda o=o: inv.checkpoint(op, **o)(x)).held_bytes for o in ways]
    assert held[1] == held[2] == held[0] + 3 * x.nbytes
    assert repr(inv.checkpoint(op, cuts=[2, 5])).endswith(", cuts=(2, 5))")
    assert inv.checkpoint(op, cuts=()) == inv.checkpoint(op, segments=1) == inv.checkpoint(op)


def test_cuts_bound_the_drift(float32: None, estimates: list[float]) -> None:
    op, x = additive(32, 1.5), torch.randn(16, 2 * WIDE)
    step(op, x, drift=0.5, early_stop=False)
    (free,) = estimates
    estimates.clear()
    step(op, x, drift=0.5, segments=8, early_stop=False)
    assert len(estimates) == 8 and max(estimates) < free / 10


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cuts": "all"}, "cuts='all', expected a sequence of places; segments=... is a number"),
        ({"cuts": 2}, "cuts=2, expected a sequence of places; segments=... is a number"),
        ({"segments": "all"}, "segments='all', expected a number; cuts=... tells before which parts"),
        ({"cuts": [2], "segments": 2}, r"segments=2 with cuts=\(2,\), expected one of the two"),
        ({"segments": 99}, "segments=99 of an op with 4 parts, expected a number from 1 to 4"),
        ({"cuts": [3, 2]}, r"cuts=\(3, 2\) of an op with 4 parts, expected increasing places from 1 to 3"),
    ],
)
def test_cuts_that_do_not_fit_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        inv.checkpoint(additive(2), **options)


def test_cuts_need_an_inverse() -> None:
    with pytest.raises(NotInvertibleError, match="tanh has no inverse"):
        inv.checkpoint(torch.tanh, cuts=[2])


@pytest.mark.parametrize("lower", [inv.checkpoint, lambda f: inv.checkpoint(inv.chain(f), mode="recompute")])
def test_a_recomputed_function_that_does_something_else_is_told(lower: Callable[[Any], Any]) -> None:
    dice = torch.Generator().manual_seed(0)
    x = leaf(3, 8)

    def draws(x: Tensor) -> Tensor:
        return (x * torch.rand(x.shape, generator=dice, dtype=x.dtype)).exp()

    with pytest.warns(inv.errors.DriftWarning, match="saves for backward.*did something else when it ran again"):
        lower(draws)(x).sum().backward()


def test_a_weight_that_is_written_below_autograd_is_told() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    y = inv.checkpoint(net, drift="raise")(leaf(3, 8))
    net[0].weight.data.add_(0.1)
    with pytest.raises(inv.errors.DriftError, match=r"^what checkpoint\(Sequential\) saves for backward"):
        y.sum().backward()
