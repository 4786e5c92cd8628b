"""`check` measures what is true, finds what is wrong and names it, and leaves no trace; `calibrate` stores the fewest."""

import json
import math
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import pytest
import torch
from kit import SINGLE, Hiding, branch, network
from pytest import MonkeyPatch
from torch import Tensor, nn

import invfunc as inv
from invfunc.__main__ import main
from invfunc.core.compare import cosine, largest, largest_difference, relative_error, relative_error_of_numbers
from invfunc.errors import DomainError, OptionError
from invfunc.look.diagnosis import HAZARDS, Run, cast, stages_of
from invfunc.look.report import Report

# ---- ops -------------------------------------------------------------------------------------------------------------


def additive(depth: int, gain: float = 1.0, width: int = 4, dtype: torch.dtype = torch.float32) -> inv.Invertible:
    return network(branch(width, gain, dtype=dtype) for _ in range(2 * depth))


def steep(at: int, depth: int = 4) -> inv.Invertible:
    """Affine couplings whose scale is bounded, but for one."""
    bounded = [inv.ops.tanh_scale(branch(4, out=8, **SINGLE), 0.5) for _ in range(depth)]
    nets = [inv.ops.exp_scale(branch(4, 15.0, out=8, **SINGLE)) if i == at else net for i, net in enumerate(bounded)]
    return inv.chain(inv.split(2), *[inv.couple(net, law=inv.affine) for net in nets], inv.concat(2))


def rows(width: int = 8, count: int = 5) -> Tensor:
    return torch.randn(count, width, **SINGLE)


def exponential() -> inv.Invertible:
    return inv.pair(torch.exp, torch.log)


# ---- comparison ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_the_relative_error_is_that_of_the_norms(dtype: torch.dtype) -> None:
    a, b = ((torch.randn(4, 3).to(dtype), torch.randn(5).to(dtype)) for _ in range(2))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    flat_a, flat_b = (torch.cat([t.flatten().to(wide) for t in w]) for w in (a, b))
    expected = float(torch.dist(flat_a, flat_b) / flat_b.norm())
    assert math.isclose(relative_error(a, b), expected)
    if not dtype.is_complex:
        assert math.isclose(relative_error_of_numbers(flat_a.tolist(), flat_b.tolist()), expected)
        assert math.isclose(cosine(a, b), float(torch.cosine_similarity(flat_a, flat_b, 0)))
    assert largest_difference(a[0], b[0]) == float((a[0] - b[0]).abs().max()) and largest(a[0]) == float(
        a[0].abs().max()
    )


def test_lost_numbers_and_other_shapes_are_infinitely_far() -> None:
    x, bad = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert (
        relative_error(bad, x) == largest_difference(bad, x) == relative_error_of_numbers([math.nan], [1.0]) == math.inf
    )
    assert relative_error(x, bad) == relative_error_of_numbers([1.0], [math.nan]) == 0  # plain training has it, too
    assert relative_error(torch.ones(2), x) == relative_error((x, x), x) == math.inf
    assert relative_error(torch.full((4,), 0.5), torch.zeros(4)) == 1.0  # absolute
    assert cosine(torch.zeros(2), torch.zeros(2)) == 1.0 and cosine(torch.ones(2), torch.zeros(2)) == 0.0


# ---- what is measured ------------------------------------------------------------------------------------------------


def true_drift(op: inv.Invertible, x: Tensor, cuts: tuple[int, ...] = ()) -> list[float]:
    """The error of each rebuilt input, by running the parts forward and back, from what is stored on the way."""
    with torch.no_grad():
        values = [x]
        for part in op.parts:
            values.append(part(values[-1]))
        back, found = values[-1], []
        for i, (part, value) in reversed(list(enumerate(zip(op.parts, values, strict=False)))):
            back = part.inverse(values[i + 1] if i + 1 in cuts else back)
            pair = [torch.cat(w if isinstance(w, tuple) else (w,), 1).double() for w in (back, value)]
            found.append(float(torch.dist(*pair) / pair[1].norm()))
    return found[::-1]


def test_the_drift_of_every_stage_in_its_dtype_and_in_others() -> None:
    op, x = additive(4, 2.0), rows()
    report = inv.check(op, x)
    assert report.errors("float32") == pytest.approx(true_drift(op, x), rel=1e-6, abs=1e-12)
    twin = additive(4, dtype=torch.float64)
    for mine, theirs in zip(_parameters(twin), _parameters(op), strict=True):
        mine.data.copy_(theirs.data)
    assert report.errors("float64") == pytest.approx(true_drift(twin, x.double()), rel=1e-3, abs=1e-19)
    for mine in _parameters(twin):
        mine.data = mine.data.bfloat16()
    assert report.errors("bfloat16") == pytest.approx(true_drift(twin, x.bfloat16()), rel=1e-3, abs=1e-12)


def _parameters(op: inv.Invertible) -> list[Tensor]:
    found = [fn for fn in op.functions if isinstance(fn, nn.Module)]
    return [p for module in found for p in module.parameters()]


def test_both_round_trips_of_a_stage() -> None:
    x = rows()
    (trip,) = (stage.trips["float32"] for stage in inv.check(exponential(), x).stages)
    y, back = x.exp(), x.exp().log()
    expected = [float(torch.dist(a.double(), b.double()) / b.double().norm()) for a, b in ((back, x), (back.exp(), y))]
    assert [trip.section, trip.retraction] == pytest.approx(expected) and trip.drift == trip.section


def test_the_growth_of_the_error() -> None:
    report = inv.check(additive(3), rows())
    errors, eps = [*report.errors("bfloat16"), 0.0], torch.finfo(torch.bfloat16).eps
    factors = [max(a, eps) / max(b, eps) for a, b in zip(errors, errors[1:], strict=False)]
    assert report.growth("bfloat16") == factors and len(factors) == len(report.stages)


def test_a_module_is_checked_as_the_op_that_it_stands_for() -> None:
    module = inv.nn.Lowered(additive(2))
    report = inv.check(module, rows())
    assert report and [stage.name for stage in report.stages][1:3] == ["stage 1 (couple)", "stage 2 (couple)"]
    assert inv.look.calibrate(module, rows(), 1e-3) == ()


def test_gradients_by_name_against_plain_autograd() -> None:
    w = torch.randn(4, **SINGLE, requires_grad=True)
    f = branch(4, **SINGLE)
    op = inv.chain(inv.split(2), inv.couple(f, lambda x: x * w), inv.concat(2))
    report = inv.check(op, rows())
    assert [g.name for g in report.inputs] == ["input 0"]
    names = {g.name for g in report.stages[1].gradients}
    assert {"f.0.weight", "f.0.bias", "f.2.weight", "f.2.bias"} < names
    assert len(names) == 5 and any(re.fullmatch(r"tensor \d of shape \(4,\)", name) for name in names)
    assert all(g.error < 1e-5 and (g.cosine is None or g.cosine > 0.9999) for g in report.gradients)


def test_a_gradient_that_is_rounding_alone_is_not_wrong() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).float()
    (bias,) = [g for g in inv.check(inv.couple(net), rows(4), rows(4)).gradients if g.name == "f.0.bias"]
    assert bias.cosine is None and bias.error < 1e-4


def test_what_is_kept() -> None:
    op, x = additive(6), rows(count=50)
    report = inv.check(op, x)
    assert report.held_bytes == x.nbytes < report.plain_bytes / 4
    assert inv.check(inv.checkpoint(op, segments=3), x).held_bytes == 3 * x.nbytes


def test_cuts_and_one_way_stages_end_the_sweep() -> None:
    op, x = additive(8, 2.0), rows()
    free, anchored = (inv.check(inv.checkpoint(op, cuts=cuts), x).errors("float32") for cuts in ((), [5]))
    assert anchored[5:] == free[5:] and max(anchored[:5]) < max(free[:5])
    assert Run(stages_of(op), x).error(4, Run(stages_of(op), x).undo(4, Run(stages_of(op), x).values[5])) == anchored[4]
    assert inv.check(inv.chain(exponential(), torch.tanh), x).errors("float32")[1] is None


def test_another_dtype_is_given_to_every_function() -> None:
    x, w = rows(), torch.randn(8, **SINGLE)
    op = inv.pair(lambda x: torch.cat([x * w], 1), lambda y: y / w)
    for dtype in torch.float64, torch.bfloat16, torch.float16:
        assert Run([op], x, dtype).values[1].dtype == dtype
    assert torch.equal(Run([op], x, torch.float64).values[1], x.double() * w.double())
    assert cast({"a": [torch.ones(1, dtype=torch.int64), 2]}, torch.float64)["a"][0].dtype == torch.int64


def test_a_dtype_without_kernels_is_left_out() -> None:
    a = torch.eye(3, **SINGLE)
    op = inv.pair(lambda x: torch.linalg.solve(a, x), lambda y: a @ y)
    assert inv.check(op, torch.randn(3, 2, **SINGLE)).dtypes == ("float32", "float64")


def test_random_numbers_and_tuples_and_integers() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).float()
    report = inv.check(inv.couple(net, net), (rows(4), rows(4)))
    assert report and report.drift < 1e-6
    ids = torch.arange(3)
    assert inv.check(inv.parallel(exponential(), inv.chain()), rows(), ids)


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def wrong_inverse() -> tuple[Any, tuple[Any, ...]]:
    return inv.chain(inv.ops.tanh(), inv.pair(torch.exp, lambda y: 2 * torch.log(y))), (rows(),)


def clock() -> tuple[Any, tuple[Any, ...]]:
    return inv.couple(lambda x: x * (time.perf_counter_ns() % 1000)), (rows(), rows())


def counter() -> tuple[Any, tuple[Any, ...]]:
    calls: list[int] = []
    return inv.couple(lambda x: x * len(calls + [calls.append(1)])), (rows(), rows())


def in_place() -> tuple[Any, tuple[Any, ...]]:
    return inv.couple(torch.tanh_), (rows(), rows())


def impure_function() -> tuple[Any, tuple[Any, ...]]:
    calls: list[int] = []
    return lambda x: x * len(calls + [calls.append(1)]), (rows(),)


def wrong_pullback() -> tuple[Any, tuple[Any, ...]]:
    return inv.pair(torch.exp, torch.log, pullback=lambda y, gy: (y.log(), gy)), (rows(),)


def steep_scale() -> tuple[Any, tuple[Any, ...]]:
    return steep(2), (rows(),)


def amplifying() -> tuple[Any, tuple[Any, ...]]:
    grows = inv.pair(lambda x: x / 1e5 + 1, lambda y: (y - 1) * 1e5, name="grows")
    return inv.chain(*[exponential(), grows, inv.ops.tanh()]), (rows(),)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "wrong inverse": (
        wrong_inverse,
        r"stage 1 \(pair\): its inverse does not give x back, it is off by 1.0e\+00 in float64; mend it \(inv.testing",
    ),
    "clock": (
        clock,
        r"stage 0 \(couple\): run twice, it gives other values, off by .*; it reads what changes from call",
    ),
    "counter": (
        counter,
        r"stage 0 \(couple\): run twice, it gives other values, off by .*; it reads what changes from",
    ),
    "plain function": (impure_function, r"stage 0 \(one_way\): run twice, it gives other values"),
    "in place": (in_place, r"stage 0 \(couple\): it can not be replayed; ReplayError: .* changed its input in place"),
    "wrong pullback": (
        wrong_pullback,
        r"stage 0 \(pair\): its pullback gives another gradient of input 0 than autograd, off by .*; mend it, or leave",
    ),
    "steep scale": (
        steep_scale,
        r"stage 3 \(couple\): scale reaches \de\+\d+, and what is rebuilt is off by .* in float32, more than 1.0e-03; "
        r"bound it with inv.ops.tanh_scale\(f, 1.0\)",
    ),
    "amplification": (
        amplifying,
        r"stage 1 \(grows\): the error grows most here, .* times, and what is rebuilt is off by .*; store more on the way",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found_and_named_with_its_cure(name: str) -> None:
    make, verdict = WRONG[name]
    op, inputs = make()
    report = inv.check(op, *inputs)
    assert not report
    assert re.match(verdict, report.verdict), report.verdict


def test_an_op_that_holds_says_so() -> None:
    report = inv.check(additive(2), rows())
    assert report and not report.findings
    assert report.verdict.startswith("holds: what is rebuilt is off by ") and " e" not in report.verdict
    assert inv.check(torch.tanh, rows()) and inv.check(inv.checkpoint(torch.tanh), rows())
    assert inv.check(branch(8, **SINGLE), rows()) and inv.check(inv.chain(), rows())
    w = torch.ones(8, **SINGLE, requires_grad=True) * 2
    assert inv.check(inv.chain(inv.swap(), inv.couple(lambda x: Hiding.apply(x, w))), rows(), rows())


@pytest.mark.parametrize(
    ("hazard", "factor"),
    [
        ("grad mode", lambda x: torch.is_grad_enabled()),
        ("layout", lambda x: x.is_contiguous()),
    ],
)
@pytest.mark.parametrize("error", [1e-6, 1e-2])
def test_a_function_that_does_not_stand_a_hazard(hazard: str, factor: Callable[[Tensor], Any], error: float) -> None:
    report = inv.check(inv.couple(lambda x: x * (1 + error * factor(x))), rows(4), rows(4))
    assert [name for name, outcome in report.stages[0].replay.items() if outcome] == [hazard]
    assert f"  {hazard}\n" in str(report) and bool(report) == (
        error < 1e-3
    )  # what is below the tolerance is shown only
    assert report or report.verdict.startswith(
        f"stage 0 (couple): its replay does not stand the hazard of {hazard}: off"
    )


@pytest.mark.parametrize(
    ("hazard", "what", "broken"),
    [
        ("random numbers", "invfunc.engine.random_numbers.RandomState._put_torch", lambda self: None),
        ("buffers", "invfunc.engine.snapshot.Snapshot.restored", lambda *args: nullcontext()),
        ("autocast", "invfunc.engine.conditions.autocast", lambda state: nullcontext()),
        ("threads", "invfunc.engine.conditions.threads", lambda count: nullcontext()),
    ],
)
def test_what_replay_does_not_restore_is_seen(hazard: str, what: str, broken: Any, monkeypatch: MonkeyPatch) -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            factors = {"buffers": self.count, "threads": torch.get_num_threads()}
            return super().forward(x) * factors.get(hazard, 1)

    net = Net(4, 4, **SINGLE)
    net.register_buffer("count", torch.zeros((), **SINGLE))
    op = inv.couple(nn.Sequential(net, nn.Dropout(0.5 * (hazard == "random numbers"))))
    inputs = rows(4), rows(4)
    assert inv.check(op, *inputs).stages[0].replay == dict.fromkeys(HAZARDS, 0.0)
    monkeypatch.setattr(what, broken)
    replay = inv.check(op, *inputs).stages[0].replay
    assert replay.get(hazard, replay["again"])


# ---- no trace --------------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).float()
    net[0].weight.grad = torch.ones(4, 4, **SINGLE)
    op, x = inv.chain(inv.couple(net), inv.swap()), (rows(4).requires_grad_(), rows(4))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    versions = [p._version for p in net.parameters()]
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    for mode in torch.no_grad(), torch.enable_grad():
        with mode:
            enabled = torch.is_grad_enabled()
            inv.check(op, *x)
            assert torch.is_grad_enabled() == enabled
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [p._version for p in net.parameters()] == versions
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads
    assert torch.equal(net[0].weight.grad, torch.ones(4, 4, **SINGLE)) and x[0].grad is None
    assert net[1].weight.grad is None and not torch.is_autocast_enabled("cpu")


# ---- as text, data and picture ---------------------------------------------------------------------------------------


def test_it_prints_as_a_table() -> None:
    report = inv.check(additive(2), rows())
    lines = str(report).splitlines()
    assert lines[0].startswith("chain(split(2, dim=1), couple(Sequential, Sequential)")
    assert lines[0].endswith(" on (5, 8) float32")
    assert lines[1].split("  ")[0] == "stage" and "rebuilt in bfloat16" in lines[1] and lines[1].endswith("replay")
    assert [line.split("  ")[0] for line in lines[2:7]] == [*(s.name for s in report.stages), "worst"]
    assert len({len(line) for line in lines[1:7]}) == 1
    assert lines[7].startswith("gradient of input 0: off by ") and lines[8].startswith(
        "kept: 160 bytes; by plain autograd"
    )
    assert lines[9] == report.verdict


def test_it_is_data() -> None:
    found = json.loads(json.dumps(inv.check(additive(2), rows()).to_dict()))
    assert found["holds"] and found["verdict"].startswith("holds") and found["dtype"] == "float32"
    assert found["stages"][1]["trips"]["float64"]["drift"] < 1e-12
    assert {g["name"][0] for g in found["stages"][1]["gradients"]} == {"f", "g"}
    assert found["stages"][1]["replay"] == dict.fromkeys(HAZARDS, 0.0)


def test_it_draws_the_error_of_each_stage_as_the_table_counts_them() -> None:
    pytest.importorskip("matplotlib")
    report = inv.check(additive(2), rows())
    (axes,) = report.plot().axes
    assert [line.get_label() for line in axes.lines] == [*report.dtypes, f"tolerance in {report.dtype}"]
    errors = report.errors("float32")
    assert list(axes.lines[0].get_ydata()) == [error for error in errors if error]
    assert list(axes.lines[0].get_xdata()) == [stage for stage, error in enumerate(errors) if error]


@pytest.mark.parametrize("depth", [1, 2, 4, 12])
def test_the_ticks_of_its_drawing_are_stages(depth: int) -> None:
    """Of few stages, too, where fractions would fit between."""
    pytest.importorskip("matplotlib")
    op = inv.chain(*[inv.couple(branch(4), branch(4)) for _ in range(depth)])
    report = inv.check(op, *rows().double().chunk(2, 1))
    (axes,) = report.plot().axes
    low, high = axes.get_xlim()
    ticks = {tick for tick in axes.get_xticks() if low <= tick <= high}
    assert ticks and ticks <= set(range(depth))


def test_without_matplotlib_it_says_so(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError) as caught:
        inv.check(exponential(), rows()).plot()
    assert str(caught.value) == "report.plot needs matplotlib; pip install matplotlib"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [inv.check, lambda op, x: inv.look.calibrate(op, x, 1e-3)])
def test_an_input_that_is_not_finite_is_named(measure: Callable[..., Any]) -> None:
    with pytest.raises(DomainError, match="input 0, expected finite numbers, got 2 of 3 that are not; measure on data"):
        measure(exponential(), torch.tensor([1.0, math.nan, math.inf]))


def test_a_tolerance_below_the_rounding_is_named() -> None:
    with pytest.raises(
        OptionError, match="check: tolerance=1e-12, expected at least 1.2e-07, the rounding of float32; ask"
    ):
        inv.check(exponential(), rows(), tolerance=1e-12)
    with pytest.raises(
        OptionError, match="calibrate: tolerance=1e-12, expected at least 1.2e-07, the rounding of float32"
    ):
        inv.look.calibrate(exponential(), rows(), 1e-12)


def test_an_error_of_the_op_says_in_which_stage() -> None:
    with pytest.raises(inv.errors.WireError, match=r"^stage 1 \(split\): split\(3, dim=1\)"):
        inv.check(inv.chain(exponential(), inv.split(3)), rows())


# ---- calibrate -------------------------------------------------------------------------------------------------------


def test_calibrate_keeps_the_round_trip_under_the_tolerance() -> None:
    op, x = additive(24, 3.0), rows()
    free = max(true_drift(op, x))
    for tolerance in free / 3, free / 30:
        cuts = inv.look.calibrate(op, x, tolerance)
        assert cuts and max(true_drift(op, x, cuts)) <= tolerance < free
        assert len(inv.look.calibrate(op, x, tolerance / 2)) >= len(cuts)
    assert inv.look.calibrate(op, x, 2 * free) == ()
    assert inv.look.calibrate(inv.checkpoint(op), x, free / 3) == inv.look.calibrate(op, x, free / 3)


def test_calibrate_changes_nothing_and_its_cuts_are_stored() -> None:
    op, x = additive(24, 3.0), rows()
    free = max(true_drift(op, x))
    for tolerance in free / 3, free / 30, 2 * free:
        cuts = inv.look.calibrate(op, x, tolerance)
        assert cuts == inv.look.calibrate(op, x, tolerance)
        fast, whole = inv.checkpoint(op, cuts=cuts), inv.checkpoint(op)
        assert (fast == whole) == (cuts == ())
        stored = inv.measure(fast, x.requires_grad_()).held_bytes - inv.measure(whole, x).held_bytes
        assert stored == len(cuts) * x.nbytes


def test_calibrate_stores_the_fewest() -> None:
    """Every smaller set of cuts, tried one by one, exceeds the tolerance."""
    op, x = additive(6, 4.0), rows()
    tolerance = max(true_drift(op, x)) / 20
    cuts = inv.look.calibrate(op, x, tolerance)
    assert 1 <= len(cuts) <= 2
    fewer = combinations(range(1, len(op.parts)), len(cuts) - 1)
    assert all(max(true_drift(op, x, some)) > tolerance for some in fewer)


def test_calibrate_starts_anew_at_what_is_stored_anyway() -> None:
    grows = inv.pair(lambda x: x / 1e2, lambda y: y * 1e2 * (1 + 1e-6))
    op = inv.chain(*[grows] * 3, inv.mark(exponential(), "store"), *[grows] * 3)
    assert inv.look.calibrate(op, rows(), 3.5e-6) == () and inv.look.calibrate(op, rows(), 2.5e-6) == (1, 5)


def test_a_tolerance_that_no_cut_reaches_is_named() -> None:
    with pytest.raises(OptionError) as caught:
        inv.look.calibrate(wrong_inverse()[0], rows(), 1e-3)
    assert str(caught.value) == (
        "calibrate: stage 1 (pair) alone is off by 1.0e+00, expected at most 1.0e-03; allow more, or mark the stage: "
        "inv.mark(op, 'recompute' or 'store')"
    )


# ---- from the shell --------------------------------------------------------------------------------------------------


def made() -> inv.Invertible:
    return additive(2)


broken = inv.pair(torch.exp, lambda y: 2 * torch.log(y))


def test_from_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "test_report:made", "--shape", "8,8"])
    assert "rebuilt in float32" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["check", "test_report:broken", "--shape", "8", "--dtype", "float64"])
    assert left.value.code == 1 and "mend it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["test_report:nothing", "--shape", "8"],
            "module 'test_report' has no attribute 'nothing', expected package.mod",
        ),
        (["no_such_module:x", "--shape", "8"], "No module named 'no_such_module', expected package.module:name, of an"),
        (["test_report:made", "--shape", "8,x"], "argument --shape: 8,x, expected sizes like 8,16,32,32"),
        (["test_report:made", "--shape", "8,7"], "stage 0 (split): split(2, dim=1) of (8, 7), expected a size that 2"),
        (["test_report:made"], "the following arguments are required: --shape"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["check", *arguments])
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and error.count("\n") == 1


def test_it_is_a_command(monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["invfunc", "check", "invfunc:chain", "--shape", "2,3", "--shape", "4"])
    main()
    assert capsys.readouterr().out.startswith("chain() on ((2, 3), (4,)) float32")


def test_a_report_is_a_value() -> None:
    first, second = (inv.check(exponential(), torch.ones(3)) for _ in range(2))
    assert first == second and isinstance(first, Report) and hash(first.findings) == hash(second.findings)
