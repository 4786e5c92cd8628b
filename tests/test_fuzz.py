"""The fuzzer: fixed programs lowered as in plain autograd, and that it finds what is wrong. `make fuzz` runs more."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fuzz import mutations, nested, stages
from fuzz.apart import verdicts
from fuzz.functions import FUNCTIONS
from fuzz.programs import (
    BETWEEN,
    FACES,
    INVERTIBLE,
    KINDS,
    MIDWAY,
    NESTED,
    SINGLE,
    STAGES,
    WRAPS,
    Fn,
    Mutation,
    Program,
    Stage,
    Step,
    generate,
    text,
)
from fuzz.run import STEPS, Verdict, least, run
from torch import Tensor

import invfunc as inv

BATCH = 50


@pytest.mark.parametrize("first", range(0, 300, BATCH))
def test_random_programs_are_the_same_lowered(first: int) -> None:
    seeds = range(first, first + BATCH)
    wrong = [
        f"seed {seed}, step {verdict.step}: {verdict.reason}"
        for seed, verdict in zip(seeds, verdicts(seeds), strict=True)
        if verdict.kind == "wrong"
    ]
    assert not wrong, "\n".join([*wrong, "python -m tests.fuzz --seed N shows one, and the least like it"])


# ---- the fuzzer itself -----------------------------------------------------------------------------------------------


def test_what_is_drawn_exists() -> None:
    assert set(BETWEEN) | set(MIDWAY) <= set(mutations.MUTATIONS) | set(mutations.OF_VALUES)
    assert set(KINDS) == set(STEPS)
    assert set(FACES) == set(stages.FACES)
    assert set(STAGES) == set(stages.OPS) == set(stages.PLAIN)
    assert set(NESTED) | set(SINGLE) | {"line"} == set(nested.OPS) == set(nested.PLAIN)
    assert set(INVERTIBLE) == set(nested.BACK)
    assert {None, *WRAPS} == set(nested.WRAPS)


def test_a_program_is_determined_by_its_seed() -> None:
    assert generate(5) == generate(5) != generate(6)
    state = torch.get_rng_state()
    assert run(generate(5)) == run(generate(5))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_text_of_a_program_makes_it() -> None:
    names = {kind.__name__: kind for kind in (Fn, Mutation, Program, Stage, Step)}
    for seed in range(20):
        assert eval(text(generate(seed)), names) == generate(seed)


NOISE = Mutation("write_data", 1, 3), Mutation("freeze", 2)


def noisy(kind: str) -> Program:
    """A program with a stage of one kind among others, and more than one step."""
    f, g = Fn("mlp", 1), Fn("dropout", 2)
    around = Stage("couple", f, g), Stage(kind, f, mark="invert"), Stage("swap", f), Stage("couple", g, f)
    return Program(around, (Step(seed=1), Step("two", NOISE, NOISE[1:], seed=2), Step("grad", seed=3)), segments=2)


def too_much(w: Tensor, y: Tensor) -> Tensor:
    return y / w[0].exp() * 1.1


def without_gradient(fn: Callable[..., Any], x: Tensor) -> Tensor:
    return fn(x).detach()


def broken_inverse(part: stages.Part) -> inv.Invertible:
    return stages.beside(inv.pair(partial(stages.grow, part.w), partial(too_much, part.w)))


def dropped_gradient(part: stages.Part) -> inv.Invertible:
    return inv.ops.midpoint(partial(without_gradient, part.f), 0.5)


@pytest.mark.parametrize(("kind", "broken"), [("pair", broken_inverse), ("midpoint", dropped_gradient)])
def test_what_is_broken_is_found_with_its_least_program(
    kind: str, broken: Callable[[stages.Part], inv.Invertible], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(noisy(kind)).kind == "agrees"
    monkeypatch.setitem(stages.OPS, kind, broken)
    verdict, small = run(noisy(kind)), least(noisy(kind))
    assert verdict.kind == "wrong" and "grad" in verdict.reason
    assert kind in [stage.kind for stage in small.stages] and len(small.stages) <= 2
    assert small.steps == (Step(seed=small.steps[0].seed),)


KEPT: list[Tensor] = []


def keeping(fn: Callable[..., Any], x: Tensor) -> Tensor:
    KEPT.append(fn(x))
    return KEPT[-1]


def test_what_stays_alive_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program((Stage("midpoint", Fn("mlp", 1)),), (Step("leak", seed=1),))
    assert run(program).kind == "agrees"
    monkeypatch.setitem(stages.OPS, "midpoint", lambda part: inv.ops.midpoint(partial(keeping, part.f), 0.5))
    verdict = run(program)
    assert (verdict.kind, verdict.reason) == ("wrong", "alive: True, plain False")
    KEPT.clear()


def test_another_error_than_the_packages_is_wrong_and_one_of_the_package_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = IndexError("mine"), inv.errors.ReplayError("mine")
    for error, kind in zip(errors, ("wrong", "refused"), strict=True):

        def fails(part: stages.Part) -> inv.Invertible:
            raise error

        monkeypatch.setitem(stages.OPS, "swap", fails)
        verdict = run(Program((Stage("swap", Fn("mlp", 1)),)))
        assert (verdict.kind, verdict.reason) == (kind, f"{type(error).__name__}: mine")


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "checkpointed"])
def test_each_stage_is_the_same_by_hand(stage: str) -> None:
    """Nothing is lowered: what differs is a fault of the fuzzer."""
    for side in (False, True):
        program = Program((Stage(stage, Fn("mlp", 1)),), (Step(seed=1),), mode="store", side=side)
        assert run(program) == Verdict("agrees")


def test_each_function_is_the_same_twice() -> None:
    """Nothing is lowered, and both worlds are of one seed."""
    for kind in FUNCTIONS:
        program = Program((Stage("couple", Fn(kind, 1)),), (Step(seed=1), Step(seed=2)), mode="store")
        assert run(program).kind == "agrees", kind
