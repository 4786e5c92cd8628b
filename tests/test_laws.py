"""The catalogue against every law, and random pipelines against the laws that speak of whole pipelines."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES, Example, closure, mlp, scale_by, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import assert_close
from torch import Tensor, func

import invfunc as inv
from invfunc.look.memory import measure
from invfunc.testing import LAWS, LawError, check_laws, is_undone, needs_no_residue
from invfunc.wires import is_differentiable, leaves, map_wire

# ---- catalogue x laws ------------------------------------------------------------------------------------------------

SPECIAL = {"split_pointwise", "couple_pointwise", "log_det_is_jacobian"}  # laws of some kinds of op

# What depends on the numbers is tested on every input. The other laws speak of how ops are combined and lowered: each
# is tested on one of an op's inputs, in turn.
OF_INVERSES = {"section", "retraction", "checkpoint_section"}
OF_VALUES = SPECIAL | OF_INVERSES | {"hidden", "pullback_is_vjp", "checkpoint_gradients"}


def required(op: inv.Invertible, x: Any) -> set[str]:
    """The laws that have to apply to an op, so that none is left out unseen."""
    kinds = {is_undone: is_undone(op, x), needs_no_residue: needs_no_residue(op, x)}
    return {name for name, law in LAWS.items() if name not in SPECIAL and kinds.get(law.applies, True)}


def failure(op: inv.Invertible, x: Any, name: str) -> str:
    """Why a law does not hold of an op, or does not apply; nothing when it holds."""
    try:
        tested = check_laws(op, x, laws=[name])
    except LawError as error:
        return str(error)
    return "" if tested or name in SPECIAL else f"law `{name}` does not apply to {op!r}"


def failures(example: Example) -> Iterator[str]:
    """The laws that do not hold of an example."""
    inputs = example.inputs()
    for i, x in enumerate(inputs):
        op = example.make()
        laws = required(op, x) | SPECIAL
        for k, law in enumerate(LAWS):
            if law in laws and law not in example.without and (law in OF_VALUES or k % len(inputs) == i):
                yield failure(op, x, law)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_law_holds_of_every_op(name: str) -> None:
    assert len(EXAMPLES[name].inputs()) >= 3
    assert "\n".join(filter(None, failures(EXAMPLES[name]))) == ""


# What the laws of inverses do not say of an op's inverse as an op: each is tested on one of an op's outputs, in turn.
OF_INVERTED = ["log_det_is_jacobian", "pullback_is_vjp", "checkpoint_vmap", "checkpoint_twice"]


def failures_of_inverse(example: Example) -> Iterator[str]:
    """The laws that do not hold of an example read backwards."""
    for i, x in enumerate(example.inputs()):
        op = example.make()
        if needs_no_residue(op, x):
            y = map_wire(lambda leaf: leaf.detach() if is_differentiable(leaf) else leaf, op.forward(x))
            laws = required(~op, y) | SPECIAL
            for k, law in enumerate(OF_INVERTED):
                if law in laws and law not in example.without and (law in SPECIAL or k % 3 == i % 3):
                    yield failure(~op, y, law)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_inverse_is_an_op_as_well(name: str) -> None:
    assert "\n".join(filter(None, failures_of_inverse(EXAMPLES[name]))) == ""


def test_the_catalogue_is_complete() -> None:
    """Every constructor of `inv.ops` is in a line of its name."""
    made = {name for name in inv.ops.__all__ if getattr(inv.ops, name).__annotations__["return"] == "Invertible"}
    assert made - {example.partition(",")[0] for example in EXAMPLES} == set()


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.without])
def test_a_law_that_is_left_out_really_fails(name: str) -> None:
    example = EXAMPLES[name]
    for law in example.without:
        assert any(failure(example.make(), x, law) for x in example.inputs()), f"`{law}` holds"


# ---- what is kept ----------------------------------------------------------------------------------------------------

# What a step keeps, as a part of its input, where that is not nothing: residues, and buffers as they were.
KEEPS = {
    "pair, residue": 1 / 3,
    "parallel, residue": 1 / 8,
    "relu": 1,
    "abs": 1 / 64,
    "momentum, 0": 1 / 2,
    "batch_norm, training": 1 / 64,
    "couple, batch norm": 1 / 64,
    "dequantize, variational": 1,
    **dict.fromkeys(["sigmoid", "logit", "tanh", "atanh", "mixture_cdf"], 1),  # which saturate, or overflow:
    **dict.fromkeys(["exp", "log", "softplus", "softplus, inverse", "sinh", "asinh"], 1),
    **dict.fromkeys(["power", "power, negative", "power, tensor", "cbrt", "cbrt, inverse"], 1),
    "parallel": 1 / 2,  # of sinh
}
ONE_WAY = {"one_way", "checkpoint, one_way"}


def enlarged(leaf: Any) -> Any:
    """A batch that is large beside what an op keeps for each channel."""
    large = leaf.repeat(64, *[1] * (leaf.dim() - 1)) if is_differentiable(leaf) and leaf.dim() else leaf
    return large.detach().requires_grad_() if is_differentiable(leaf) else leaf


def kept(op: inv.Invertible, x: Any, depth: int) -> int:
    fast = inv.checkpoint(inv.chain(*(op,) * depth), drift="off")
    return measure(lambda: fast.forward(x)).held_bytes


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - ONE_WAY))
def test_a_lowered_step_keeps_what_it_says(name: str) -> None:
    op, x = EXAMPLES[name].make(), map_wire(enlarged, EXAMPLES[name].inputs()[1])
    if shapes(op.forward(x)) != shapes(x):
        return  # a chain of it does not exist
    kept(op, x, 1)  # what is made once and for all is made here; and its output may share an input
    grown = (kept(op, x, 4) - kept(op, x, 2)) / 2 / sum(leaf.nbytes for leaf in leaves(x) if is_differentiable(leaf))
    assert grown <= KEEPS.get(name, 0) + 0.01  # what belongs to no activation is small beside this batch


# ---- check_laws ------------------------------------------------------------------------------------------------------

X = torch.linspace(0.1, 1, 6, dtype=torch.float64).reshape(2, 3)


def test_a_failure_names_the_law_the_terms_and_the_difference() -> None:
    op = inv.pair(torch.exp, torch.neg)
    with pytest.raises(LawError) as raised:
        check_laws(op, X)
    assert str(raised.value) == (
        "law `section`: inverse(forward(x)) = x\n"
        "  f = pair(exp, neg)\n"
        "  inverse(forward(x)) and x: leaf 0 differs by at most 3.72 (tolerance 1e-09)"
    )


@pytest.mark.parametrize(
    ("inverse", "difference"),
    [
        (lambda a, b: a, "(2, 3) is not of the structure of ((2, 3), (2, 3))"),
        (lambda a, b: (a, b[:1]), "leaf 1 is torch.float64 of shape (1, 3), not torch.float64 of shape (2, 3)"),
        (lambda a, b: (a.float(), b), "leaf 0 is torch.float32 of shape (2, 3), not torch.float64 of shape (2, 3)"),
        (lambda a, b: (a, b / 0), "leaf 1 is not finite where the other is"),
        (lambda a, b: (a, None), "leaf 1 is None, not tensor("),
    ],
)
def test_a_failure_tells_what_is_different(inverse: Callable[..., Any], difference: str) -> None:
    op = inv.pair(lambda a, b: (a, b), inverse)
    with pytest.raises(LawError, match=re.escape(difference)):
        LAWS["section"](op, (X, X))


def test_an_error_within_a_law_is_its_failure() -> None:
    def fails(y: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(LawError, match="(?s)law `section`: .* f = pair.*raised KeyError: 'mine'") as raised:
        check_laws(inv.pair(torch.exp, fails), X)
    assert isinstance(raised.value.__cause__, KeyError)
    assert isinstance(raised.value, AssertionError)


def test_laws_are_chosen_by_value_or_name_and_told() -> None:
    op = inv.pair(torch.exp, torch.log)
    assert check_laws(op, X, laws=["order", LAWS["section"]]) == ("order", "section")
    assert check_laws(inv.one_way(torch.exp), X, laws=["order", "section"]) == ("order",)
    assert {"section", "checkpoint_gradients", "checkpoint_vmap"} <= set(check_laws(op, X))


def test_the_docstring_of_a_law_is_its_equation() -> None:
    assert LAWS["section"].__doc__ == LAWS["section"].equation == "inverse(forward(x)) = x"


def test_a_tolerance_for_approximate_inverses() -> None:
    op = inv.pair(torch.exp, lambda y: y.log() + 1e-5)
    check_laws(op, X, laws=["section"], tolerance=1e-4)
    with pytest.raises(LawError, match="differs by at most 1e-05"):
        check_laws(op, X, laws=["section"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_have_their_tolerance(dtype: torch.dtype) -> None:
    check_laws(inv.pair(torch.exp, torch.log), X.to(dtype), laws=["section", "retraction", "checkpoint_gradients"])


def test_laws_leave_buffers_and_random_numbers_as_they_were() -> None:
    norm = torch.nn.BatchNorm1d(3).double()
    before, state = {name: b.clone() for name, b in norm.named_buffers()}, torch.get_rng_state()
    check_laws(inv.couple(norm, torch.nn.Dropout()), (X, X))
    assert all(torch.equal(b, before[name]) for name, b in norm.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)


# ---- random pipelines ------------------------------------------------------------------------------------------------


def bend(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, x / 2)


def unbend(y: Tensor) -> Tensor:
    return torch.where(y > 0, y, y * 2)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[inv.Invertible, Any]:
    """A pipeline and an input: any op that fits the wire, then any that fits what came of it, nested to some depth."""
    torch.manual_seed(draw(st.integers(0, 99)))
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    x = draw(st.sampled_from([a, (a, b), ((a, b[:, :2]), torch.tensor([True, False])), (a, (b, None))]))
    return several(draw, x, depth=2), x


def several(draw: st.DrawFn, x: Any, depth: int) -> inv.Invertible:
    """A chain of up to three ops that takes x."""
    ops: list[inv.Invertible] = []
    for _ in range(draw(st.integers(1, 3))):
        ops.append(wrapped(draw, x, depth))
        x = ops[-1].forward(x)
    return inv.chain(*ops)


def wrapped(draw: st.DrawFn, x: Any, depth: int) -> inv.Invertible:
    """An op that takes x, as it is or wrapped by a transformer."""
    how = draw(st.sampled_from(["bare", "bare", "checkpoint", "invert", "mark", "on"])) if depth else "bare"
    if how == "bare":
        return one(draw, x, depth)
    op = several(draw, x, depth - 1)
    if how == "checkpoint":
        return inv.checkpoint(op, mode=draw(st.sampled_from(["invert", "store", "recompute"])))
    if how == "mark":
        return inv.mark(op, draw(st.sampled_from(["store", "recompute", "invert"])))
    if how == "invert" and shapes(op.forward(x)) == shapes(x):
        return inv.invert(op)
    return inv.chain(op, one(draw, op.forward(x), 0), inv.chain())


def shapes(x: Any) -> Any:
    return map_wire(lambda leaf: getattr(leaf, "shape", None), x)


def one(draw: st.DrawFn, x: Any, depth: int) -> inv.Invertible:
    """A single op that takes x."""
    if isinstance(x, tuple):
        return draw(st.sampled_from(on_pairs(draw, x, depth)))()
    return draw(st.sampled_from(on_tensors(x)))() if is_differentiable(x) else inv.chain()


def on_tensors(x: Tensor) -> list[Callable[[], inv.Invertible]]:
    """Constructors of ops on one tensor."""
    size = x.shape[-1]
    ops = [
        lambda: scale_by(1 + weight(size, scale=0.2)),
        lambda: inv.pair(bend, unbend),
        lambda: inv.pair(torch.neg, torch.neg, pullback=lambda y, gy: (-y, -gy)),
    ]
    split = [lambda: inv.split([1, size - 1], dim=-1), lambda: inv.split([size - 1, 1], dim=-1)] * (size > 1)
    halved = [lambda: inv.split(2, dim=-1), lambda: inv.split(2, dim=-1, interleaved=True)] * (size % 2 == 0)
    return [*ops, *split, *halved]


def on_pairs(draw: st.DrawFn, x: tuple[Any, Any], depth: int) -> list[Callable[[], inv.Invertible]]:
    """Constructors of ops on two components."""
    inner = max(depth - 1, 0)
    side = lambda: inv.parallel(wrapped(draw, x[0], inner), wrapped(draw, x[1], inner))  # noqa: E731
    if not all(map(is_differentiable, x)):
        return [inv.swap, side]
    m, n = x[0].shape[-1], x[1].shape[-1]
    return [
        inv.swap,
        side,
        lambda: inv.concat([m, n], dim=-1),
        lambda: inv.couple(mlp(n, m), mlp(m, n)),
        lambda: inv.couple(inv.ops.tanh_scale(mlp(n, 2 * m), 0.5, dim=-1), law=inv.affine),
        lambda: inv.couple(mlp(n, m)) if m != n else inv.couple(closure(weight(n)), closure(2 * weight(n))),
    ]


OF_PIPELINES = ["section", "retraction", "pullback_is_vjp", "checkpoint_gradients", "checkpoint_inverse"]


@given(pipelines())
@settings(max_examples=40)
def test_random_pipelines(example: tuple[inv.Invertible, Any]) -> None:
    op, x = example
    assert check_laws(op, x, laws=OF_PIPELINES, tolerance=1e-8) == tuple(OF_PIPELINES)


# ---- random pipelines under torch.func ------------------------------------------------------------------------------


def scalar(fn: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *ts: sum((leaf.sin().sum() for leaf in leaves(fn(*ts))), torch.zeros(()))


def argnums(ts: Any) -> tuple[int, ...]:
    return tuple(range(len(ts)))


def batched(ts: Any) -> list[Tensor]:
    return [torch.stack([t, t / 2, -t]) for t in ts]


def tangents(ts: Any) -> tuple[Tensor, ...]:
    return tuple(t.cos() for t in ts)


TRANSFORMS: dict[str, Callable[[Any, Any], Any]] = {
    "grad": lambda fn, ts: func.grad(scalar(fn), argnums(ts))(*ts),
    "vjp": lambda fn, ts: func.vjp(scalar(fn), *ts)[1](torch.ones(())),
    "jvp": lambda fn, ts: func.jvp(scalar(fn), tuple(ts), tangents(ts)),
    "vmap": lambda fn, ts: func.vmap(fn)(*batched(ts)),
    "vmap of grad": lambda fn, ts: func.vmap(func.grad(scalar(fn), argnums(ts)))(*batched(ts)),
    "grad of vmap": lambda fn, ts: func.grad(scalar(func.vmap(scalar(fn))), argnums(ts))(*batched(ts)),
    "jacrev": lambda fn, ts: func.jacrev(fn)(*ts),
    "jacfwd": lambda fn, ts: func.jacfwd(fn)(*ts),
    "hessian": lambda fn, ts: func.hessian(scalar(fn))(*ts),
    "grad of grad": lambda fn, ts: func.grad(scalar(func.grad(scalar(fn), argnums(ts))), argnums(ts))(*ts),
    "jvp of grad": lambda fn, ts: func.jvp(func.grad(scalar(fn), argnums(ts)), tuple(ts), tangents(ts)),
}


def closing_over(op: inv.Invertible, x: Any) -> Callable[..., Any]:
    """``(p, *tensors) -> y`` where the pipeline is built inside the transform and closes over its tensor p."""

    def run(lowered: bool, p: Tensor, *tensors: Tensor) -> Any:
        left = iter(tensors)
        given = map_wire(lambda leaf: next(left) if is_differentiable(leaf) else leaf, x)
        scaling = map_wire(lambda leaf: scale_by(1 + p / 9) if is_differentiable(leaf) else inv.chain(), x)
        whole = inv.chain(beside(scaling), op, inv.chain())
        y = (inv.checkpoint(whole) if lowered else whole)(given)
        return tuple(filter(is_differentiable, leaves(y)))

    return run


def beside(ops: Any) -> inv.Invertible:
    return inv.parallel(*map(beside, ops)) if isinstance(ops, tuple) else ops


@given(pipelines(), st.sampled_from(sorted(TRANSFORMS)))
@settings(max_examples=40)
def test_random_pipelines_under_transforms(example: tuple[inv.Invertible, Any], name: str) -> None:
    op, x = example
    ts = [torch.tensor(0.5), *filter(is_differentiable, leaves(x))]
    run = closing_over(op, x)
    found, expected = (TRANSFORMS[name](lambda *ts, on=on: run(on, *ts), ts) for on in (True, False))
    assert_close(found, expected)
