"""Teeth: seeded bugs, each caught by the law named beside it. A law that catches none might as well be absent."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from catalogue import closure, dropped, mlp, scale_by, weight
from pytest import MonkeyPatch
from torch._C._functorch import is_batchedtensor

import invfunc as inv
from invfunc import testing
from invfunc.checkpoint import Checkpointed
from invfunc.core import combine as combinators
from invfunc.core import couple as couplings
from invfunc.core.combine import Parallel
from invfunc.core.couple import Half
from invfunc.core.op import Chain, Invertible, Pair
from invfunc.engine import functional, lower, snapshot, trunk, watch
from invfunc.engine.random_numbers import RandomState
from invfunc.testing import LAWS, LawError, check_laws
from invfunc.wires import map_wire

# ---- on what the bugs show -------------------------------------------------------------------------------------------


def rows() -> Any:
    return torch.randn(2, 4)


def two_rows() -> Any:
    return torch.randn(2, 4), torch.randn(2, 4)


def exponential() -> inv.Invertible:
    return inv.pair(torch.exp, torch.log)


def both() -> inv.Invertible:
    return inv.parallel(exponential(), scale_by(weight(4)))


def coupling() -> inv.Invertible:
    return inv.couple(mlp(4), mlp(4))


def closures() -> inv.Invertible:
    return inv.couple(closure(weight(4)), closure(weight(4)))


def random_coupling() -> inv.Invertible:
    return inv.couple(dropped(4), dropped(4))


def exponentials() -> inv.Invertible:
    """The one in the middle saves nothing."""
    doubled = inv.pair(lambda x: 2 * x, lambda y: y / 2)
    return inv.chain(inv.pair(torch.asinh, torch.sinh), doubled, inv.pair(torch.exp, torch.log))


def normalised_coupling() -> inv.Invertible:
    return inv.couple(torch.nn.BatchNorm1d(4))


def interleaved() -> inv.Invertible:
    return inv.split(2, interleaved=True)


def affine() -> inv.Invertible:
    return inv.couple(inv.ops.tanh_scale(mlp(4, 8)), law=inv.affine)


# ---- a tooth ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tooth:
    """A seeded bug: the law that catches it, the op on which it shows, and laws that are blind to it."""

    law: str
    make: Callable[[], inv.Invertible]
    inputs: Callable[[], Any]
    blind: tuple[str, ...]
    plant: Callable[[MonkeyPatch], None]


TEETH: dict[str, Tooth] = {}


def tooth(law: str, make: Callable[[], inv.Invertible], inputs: Callable[[], Any] = rows, *blind: str) -> Any:
    """Register a function that plants a bug."""

    def register(plant: Callable[[MonkeyPatch], None]) -> Callable[[MonkeyPatch], None]:
        TEETH[plant.__name__] = Tooth(law, make, inputs, blind, plant)
        return plant

    return register


def wrap(patch: MonkeyPatch, owner: Any, name: str, wrong: Callable[..., Any]) -> None:
    """Replace a function by one that is given the right one first."""
    right = getattr(owner, name)
    patch.setattr(owner, name, lambda *a, **k: wrong(right, *a, **k))


def rewrite(patch: MonkeyPatch, right: Any, wrong: Any) -> None:
    """Give a function another body, wherever it has been imported to."""
    patch.setattr(right, "__code__", wrong.__code__)


# ---- iso -------------------------------------------------------------------------------------------------------------


@tooth("section", lambda: inv.pair(torch.neg, lambda y: -y))
def inverse_forgets_a_sign(patch: MonkeyPatch) -> None:
    wrap(patch, Pair, "inverse_with_residue", lambda right, self, residue, y: y)


@tooth("retraction", exponential)
def inverse_of_another_function(patch: MonkeyPatch) -> None:
    wrap(patch, Pair, "inverse_with_residue", lambda right, self, residue, y: torch.log1p(y))


@tooth("section", lambda: inv.split(2))
def concat_swaps_halves(patch: MonkeyPatch) -> None:
    rewrite(patch, combinators._concat, lambda sizes, dim, interleaved, y: torch.cat(y[::-1], dim))


@tooth("involution", exponential)
def invert_does_nothing(patch: MonkeyPatch) -> None:
    patch.setattr(Pair, "inverted", lambda self: self)


@tooth("hidden", both, two_rows)
def residues_come_from_another_forward(patch: MonkeyPatch) -> None:
    wrap(patch, Parallel, "forward", lambda right, self, x: right(self, x)[:1] + x[1:])


# ---- category --------------------------------------------------------------------------------------------------------


@tooth("identities", exponential)
def chain_forgets_its_last_op(patch: MonkeyPatch) -> None:
    wrap(patch, testing, "chain", lambda right, *ops: right(*ops[:-1]))


@tooth("associativity", exponential)
def chain_flattens_backwards(patch: MonkeyPatch) -> None:
    wrap(patch, testing, "chain", lambda right, *ops: right(*(part for op in ops for part in op.parts[::-1] or (op,))))


@tooth("order", exponential, rows, "section", "retraction", "associativity", "interchange")
def chain_in_wrong_order(patch: MonkeyPatch) -> None:
    wrap(patch, Chain, "_fold", lambda right, self, step, x, parts: right(self, step, x, reversed(list(parts))))


@tooth("groupoid", exponential)
def invert_does_not_reverse(patch: MonkeyPatch) -> None:
    patch.setattr(Chain, "inverted", lambda self: Chain(tuple(part.inverted() for part in self.parts)))


# ---- monoidal --------------------------------------------------------------------------------------------------------


@tooth("parallel_pointwise", exponential, rows, "interchange", "parallel_identity", "section")
def parallel_swaps_its_components(patch: MonkeyPatch) -> None:
    wrap(patch, Parallel, "_each", lambda right, self, *rest: right(Parallel(self.parts[::-1]), *rest))


@tooth("interchange", exponential)
def parallel_swaps_its_results(patch: MonkeyPatch) -> None:
    wrap(patch, Parallel, "_each", lambda right, self, *rest: right(self, *rest)[::-1])


@tooth("parallel_identity", exponential)
def parallel_returns_a_list(patch: MonkeyPatch) -> None:
    wrap(patch, Parallel, "_each", lambda right, self, *rest: list(right(self, *rest)))


@tooth("parallel_inverse", exponential)
def parallel_inverts_in_reverse(patch: MonkeyPatch) -> None:
    patch.setattr(Parallel, "inverted", lambda self: Parallel(tuple(part.inverted() for part in self.parts[::-1])))


# ---- pointwise -------------------------------------------------------------------------------------------------------


@tooth("split_pointwise", interleaved, rows, "section", "retraction", "pullback_is_vjp", "checkpoint_gradients")
def interleaved_split_is_off_by_one(patch: MonkeyPatch) -> None:
    def split(sizes, dim, interleaved, x):
        return tuple(x.roll(-1, dim).unflatten(dim, (-1, sizes)).unbind(dim + 1))

    def concat(sizes, dim, interleaved, y):
        return torch.stack(y, dim + 1).flatten(dim, dim + 1).roll(1, dim)

    rewrite(patch, combinators._split, split)
    rewrite(patch, combinators._concat, concat)


@tooth("couple_pointwise", coupling, two_rows, "section", "retraction", "pullback_is_vjp", "checkpoint_gradients")
def coupling_subtracts(patch: MonkeyPatch) -> None:
    def forward(right, self, t, x):
        y, residue = right(self, t, x)
        return map_wire(lambda a, b: 2 * a - b, x, y), residue

    def inverse(right, self, residue, y):
        return map_wire(lambda a, b: 2 * a - b, y, right(self, residue, y))

    wrap(patch, Half, "forward_by", forward)
    wrap(patch, Half, "inverse_with_residue", inverse)
    patch.setattr(Half, "pull", Invertible.pull)
    patch.setattr(Half, "rebuild", Invertible.rebuild)


@tooth("section", coupling, two_rows)
def coupling_undoes_with_the_changed_half(patch: MonkeyPatch) -> None:
    wrap(patch, Half, "inverse_with_residue", lambda right, self, r, y: right(self, r, y[::-1])[::-1])


# ---- reverse mode ----------------------------------------------------------------------------------------------------


@tooth("pullback_is_vjp", lambda: scale_by(weight(4)))
def pullback_with_a_wrong_factor(patch: MonkeyPatch) -> None:
    def pull(right, self, *rest):
        x, gx = right(self, *rest)
        return x, 2 * gx

    wrap(patch, Pair, "pull", pull)


@tooth("pullback_is_vjp", affine, two_rows, "section", "couple_pointwise", "checkpoint_gradients")
def law_forgets_the_gradient_of_its_scale(patch: MonkeyPatch) -> None:
    def pull(right, s, t, y, gy):
        x, gx, ((_, gs), shift) = right(s, t, y, gy)
        return x, gx, [(s, torch.zeros_like(gs)), shift]

    wrap(patch, couplings, "_pull_scale_shift", pull)


@tooth("log_det_is_jacobian", affine, two_rows, "section", "pullback_is_vjp", "couple_pointwise")
def log_det_forgets_the_logarithm(patch: MonkeyPatch) -> None:
    wrap(patch, couplings, "_scale_log_det", lambda right, s, t, x, y: s.flatten(1).sum(1))


# ---- lowering --------------------------------------------------------------------------------------------------------


@tooth("checkpoint_gradients", affine, two_rows, "pullback_is_vjp", "checkpoint_section", "checkpoint_functional")
def rebuild_applies_the_law_to_what_comes_out(patch: MonkeyPatch) -> None:
    """The gradient of the scale is that at y, not at x."""

    class Wrong(trunk.Evaluation):
        def hand_over(self, fn, x, like):
            super().hand_over(fn, self.y if fn.__name__ == "<lambda>" else x, like)

    def rebuild(right, self, residue, y, again):
        again.y = self.in_place(y)[0]
        return right(self, residue, y, again)

    patch.setattr(trunk, "Evaluation", Wrong)
    wrap(patch, Half, "rebuild", rebuild)


@tooth("checkpoint_gradients", closures, two_rows, "pullback_is_vjp", "checkpoint_section", "checkpoint_functional")
def saved_tensors_are_handed_over_in_reverse(patch: MonkeyPatch) -> None:
    def finish(right, self):
        self.made.reverse()
        right(self)

    wrap(patch, trunk.Evaluation, "finish", finish)


@tooth("checkpoint_gradients", exponentials, rows, "pullback_is_vjp", "checkpoint_section", "checkpoint_functional")
def a_level_that_nobody_asks_is_not_undone(patch: MonkeyPatch) -> None:
    wrap(
        patch,
        trunk.Stage,
        "undo",
        lambda right, self, y, is_asked, last: right(self, y, is_asked, last) if is_asked else y,
    )


@tooth("checkpoint_functional", closures, two_rows, "pullback_is_vjp", "checkpoint_section", "checkpoint_gradients")
def checkpoint_drops_a_captured_gradient(patch: MonkeyPatch) -> None:
    wrap(patch, watch.Replay, "finish", lambda right, self: [None, *right(self)[1:]])


@tooth("checkpoint_gradients", random_coupling, two_rows)
def stale_random_numbers(patch: MonkeyPatch) -> None:
    patch.setattr(RandomState, "_put_torch", lambda self: None)


@tooth("checkpoint_effects", random_coupling, two_rows, "checkpoint_gradients")
def backward_moves_the_random_numbers_on(patch: MonkeyPatch) -> None:
    wrap(patch, RandomState, "restored", lambda right, self: nullcontext(self.put()))


@tooth("checkpoint_effects", normalised_coupling, two_rows, "checkpoint_gradients")
def backward_moves_the_statistics_again(patch: MonkeyPatch) -> None:
    wrap(patch, snapshot.Snapshot, "restored", lambda right, self, copies, functions: nullcontext())


@tooth("checkpoint_section", coupling, two_rows, "checkpoint_gradients")
def lowered_inverse_is_forward(patch: MonkeyPatch) -> None:
    patch.setattr(Checkpointed, "inverse", Checkpointed.forward)


@tooth("checkpoint_inverse", coupling, two_rows, "checkpoint_gradients")
def invert_leaves_a_lowered_op_alone(patch: MonkeyPatch) -> None:
    patch.setattr(Checkpointed, "inverted", lambda self: self)


@tooth("checkpoint_idempotent", coupling, two_rows, "checkpoint_gradients")
def checkpoint_twice_runs_twice(patch: MonkeyPatch) -> None:
    wrap(patch, testing, "checkpoint", lambda right, op: inv.chain(op, op) if hasattr(op, "options") else right(op))


@tooth("checkpoint_modes", coupling, two_rows, "checkpoint_gradients")
def recompute_runs_the_op_once_more(patch: MonkeyPatch) -> None:
    wrap(patch, lower, "recompute", lambda right, op, *rest: right(inv.chain(op, op), *rest))


@tooth("checkpoint_composes", exponential, rows, "checkpoint_gradients")
def checkpoint_forgets_the_last_op(patch: MonkeyPatch) -> None:
    wrap(patch, testing, "checkpoint", lambda right, op: right(inv.chain(*op.parts[:-1]) if op.parts else op))


@tooth("checkpoint_twice", coupling, two_rows, "checkpoint_gradients", "checkpoint_functional")
def what_is_asked_for_again_is_zero(patch: MonkeyPatch) -> None:
    asked: list[tuple[Any, Any]] = []

    def unpack(right, self, packed):
        tensor, key = right(self, packed), (self, packed[0])
        if type(packed) is not list:
            return tensor
        if key in asked:
            return torch.zeros_like(tensor)
        asked.append(key)
        return tensor

    wrap(patch, trunk.Frame, "unpack", unpack)


@tooth("checkpoint_functional", coupling, two_rows, "checkpoint_gradients")
def functional_gradients_are_doubled(patch: MonkeyPatch) -> None:
    def evaluate(right, self, *rest):
        out, pull = right(self, *rest)
        return out, lambda gy: map_wire(lambda g: 2 * g, pull(gy))

    wrap(patch, watch.Replay, "__call__", evaluate)


@tooth("checkpoint_vmap", coupling, two_rows, "checkpoint_gradients", "checkpoint_functional")
def gradients_under_vmap_are_doubled(patch: MonkeyPatch) -> None:
    def pull(right, *rest):
        return tuple(2 * g if g is not None and is_batchedtensor(g) else g for g in right(*rest))

    wrap(patch, functional, "_pull", pull)


# ---- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", TEETH)
def test_a_law_catches_a_seeded_bug(bug: str, monkeypatch: MonkeyPatch) -> None:
    tooth = TEETH[bug]
    x = tooth.inputs()
    assert check_laws(tooth.make(), x, laws=[tooth.law]) == (tooth.law,)
    tooth.plant(monkeypatch)
    with pytest.raises(LawError, match=f"^law `{tooth.law}`: ") as caught:
        check_laws(tooth.make(), x, laws=[tooth.law])
    assert "\n  raised " not in str(caught.value)  # two terms differ: nothing broke by accident


@pytest.mark.parametrize("bug", [bug for bug, tooth in TEETH.items() if tooth.blind])
def test_other_laws_are_blind_to_it(bug: str, monkeypatch: MonkeyPatch) -> None:
    tooth = TEETH[bug]
    tooth.plant(monkeypatch)
    assert check_laws(tooth.make(), tooth.inputs(), laws=tooth.blind) == tooth.blind


def test_every_law_has_a_tooth() -> None:
    assert {tooth.law for tooth in TEETH.values()} == set(LAWS)
