"""Modes, marks and segments of `checkpoint`: none changes a value or a gradient."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import TOLERANCE, A, assert_close, assert_same, count, gradients, leaf, loss, parameters
from torch import Tensor, nn

import invfunc as inv
from invfunc.engine.snapshot import Parts
from invfunc.errors import NotInvertibleError, OptionError
from invfunc.look.memory import measure

# ---- modes and marks -------------------------------------------------------------------------------------------------


def test_the_modes_keep_what_they_say() -> None:
    n, depth = 8000, 4
    x = torch.ones(1, 1000, requires_grad=True)
    net = inv.chain(*[inv.pair(torch.sinh, torch.asinh)] * depth)
    held = {m: measure(lambda m=m: inv.checkpoint(net, mode=m)(x)).held_bytes for m in ("invert", "store", "recompute")}
    assert held["invert"] == n  # the output, which the caller holds as well
    assert held["store"] == depth * n
    assert held["recompute"] == n
    for m in held:
        with inv.mode(m):
            assert measure(lambda: inv.checkpoint(net)(x)).held_bytes == held[m]


@pytest.mark.parametrize(("mode", "calls"), [("invert", 2), ("store", 1), ("recompute", 2)])
def test_how_often_a_coupling_function_runs(mode: str, calls: int) -> None:
    f, g = count(torch.tanh), count(torch.sin)
    fast = inv.checkpoint(inv.chain(inv.couple(f, g), inv.couple(f)), mode=mode)
    loss(fast(leaf(A), leaf(A))).backward()
    assert (f.calls, g.calls) == (2 * calls, calls)


def mode_of(fast: Callable[..., Any], x: Tensor) -> str:
    """The mode in which a pair is lowered, by what it keeps."""
    (row,) = inv.look.saved(fast, x * 1)
    found = {"output": "invert", "input": "recompute"}
    return "store" if row.where == "SinhBackward0" else found[row.what.split()[0]]


def test_a_mode_nests_and_is_restored() -> None:
    fast, x = inv.checkpoint(inv.pair(torch.sinh, torch.asinh)), leaf(A)
    with inv.mode("store"):
        assert mode_of(fast, x) == "store"
        with inv.mode("recompute"):
            assert mode_of(fast, x) == "recompute"
        assert mode_of(fast, x) == "store"
        with pytest.raises(ZeroDivisionError), inv.mode("invert"):
            raise ZeroDivisionError
        assert mode_of(fast, x) == "store"
    assert mode_of(fast, x) == "invert"


def test_a_mode_is_local_to_its_thread_and_task() -> None:
    fast, x, found = inv.checkpoint(inv.pair(torch.sinh, torch.asinh)), leaf(A), {}

    async def task(name: str) -> None:
        with inv.mode(name):
            await asyncio.sleep(0)
            found[name] = mode_of(fast, x)
            await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(*map(task, ("store", "recompute", "invert")))

    asyncio.run(both())
    assert found == {m: m for m in found} and len(found) == 3
    with inv.mode("store"):
        thread = threading.Thread(target=lambda: found.update(thread=mode_of(fast, x)))
        thread.start()
        thread.join()
    assert found["thread"] == "invert"


def test_a_mode_may_change_between_forward_and_backward() -> None:
    w, x = leaf(A), leaf(A)
    net = inv.chain(inv.pair(lambda x: x * w, lambda y: y / w), inv.pair(torch.sinh, torch.asinh))
    with inv.mode("recompute"):
        y = inv.checkpoint(net)(x)
    with inv.mode("store"):
        assert_close(gradients(y, [x, w]), gradients(net(x), [x, w]))


def test_the_innermost_mark_wins_and_a_mode_overrides_marks() -> None:
    op, x = inv.pair(torch.sinh, torch.asinh), leaf(A)
    for mark, expected in [
        (lambda op: inv.mark(op, "store"), "store"),
        (lambda op: inv.mark(op, "recompute"), "recompute"),
        (lambda op: inv.mark(op, "invert"), "invert"),
        (lambda op: inv.mark(inv.mark(op, "recompute"), "store"), "recompute"),
        (lambda op: inv.mark(inv.mark(op, "store"), "recompute"), "store"),
        (lambda op: inv.mark(inv.chain(inv.mark(op, "invert")), "store"), "invert"),
        (lambda op: inv.mark(inv.checkpoint(op, mode="recompute"), "store"), "recompute"),
    ]:
        for mode in ("invert", "store", "recompute"):
            fast = inv.checkpoint(mark(op), mode=mode)
            assert mode_of(fast, x) == expected
            for override in ("invert", "store", "recompute"):
                with inv.mode(override):
                    assert mode_of(fast, x) == override


def test_marks_do_not_change_what_an_op_means() -> None:
    op, x = inv.pair(torch.sinh, torch.asinh), leaf(A)
    for word in "store", "recompute", "invert":
        marked = inv.mark(op, word)
        assert_close(marked(x), op(x))
        assert_close((~marked)(op(x)), x)
        assert_same(op, ~~marked, [x], x)
        assert repr(marked) == f"mark(pair(sinh, asinh), {word!r})"
        assert repr(~marked) == f"mark(invert(pair(sinh, asinh)), {word!r})"


def test_a_plain_callable_may_be_marked() -> None:
    linear, x = nn.Linear(A, A), leaf(2, A)
    for word in "store", "recompute":
        net = inv.chain(inv.pair(torch.sinh, torch.asinh), inv.mark(linear, word), torch.tanh)
        assert_same(net, inv.checkpoint(net), [x, *linear.parameters()], x)


def test_store_keeps_what_is_inside_and_recompute_its_entry() -> None:
    n = 8000
    x = torch.ones(1, 1000, requires_grad=True)
    op = inv.pair(torch.sinh, torch.asinh)
    inside = inv.chain(op, op, op)

    def held(net: inv.Invertible) -> int:
        return measure(lambda: inv.checkpoint(net)(x)).held_bytes

    assert held(inv.chain(op, inside, op)) == n
    assert held(inv.chain(op, inv.mark(inside, "store"), op)) == 4 * n  # the inputs of three sinh, and the output
    assert (
        held(inv.chain(op, inv.mark(inside, "recompute"), op)) == 2 * n
    )  # the entry; the exit is rebuilt by the last op


@pytest.mark.parametrize(
    "make",
    [
        lambda: inv.mode("sideways").__enter__(),
        lambda: inv.checkpoint(inv.swap(), mode="fast"),
        lambda: inv.mark(inv.swap(), "keep"),
    ],
)
def test_an_unknown_mode(make: Callable[[], Any]) -> None:
    with pytest.raises(OptionError, match=r"mode is '\w+', expected 'invert' or 'store' or 'recompute'"):
        make()


# ---- segments --------------------------------------------------------------------------------------------------------


def test_memory_grows_by_one_activation_a_cut() -> None:
    n, depth = 8000, 12
    w = torch.ones(1, requires_grad=True)
    blocks = [inv.pair(lambda x: x * w, lambda y: y / w)] * depth
    x = torch.ones(1, 1000, requires_grad=True)
    for mode in "invert", "recompute":
        held = [
            measure(lambda k=k, m=mode: inv.checkpoint(inv.chain(*blocks), segments=k, mode=m)(x)).held_bytes
            for k in (1, 2, 3, 6)
        ]
        assert held == [n, 2 * n, 3 * n, 6 * n]
        cut = inv.checkpoint(inv.chain(*blocks), cuts=(2, 3, 11), mode=mode)
        assert measure(lambda cut=cut: cut(x)).held_bytes == 4 * n


@pytest.mark.parametrize("mode", ["invert", "store", "recompute"])
@pytest.mark.parametrize(
    "where",
    [*({"segments": k} for k in (1, 2, 4, 7)), *({"cuts": c} for c in ((1,), (3, 5), (1, 2, 3, 4, 5, 6)))],
    ids=str,
)
def test_segments_change_no_gradient(where: Any, mode: str) -> None:
    w = leaf(A)
    blocks = [inv.pair(lambda x: x * w, lambda y: y / w), inv.pair(torch.asinh, torch.sinh)] * 4
    net, x = inv.chain(*blocks[:7]), leaf(A)
    assert_same(net, inv.checkpoint(net, mode=mode, **where), [x, w], x)
    fast = inv.checkpoint(net, mode=mode, **where)
    assert_same(~net, ~fast, [x, w], net(x).detach().requires_grad_())
    assert ~~fast == fast


@pytest.mark.parametrize("segments", [0, -1, 4, 10**6])
def test_segments_out_of_range(segments: int) -> None:
    net = inv.chain(*[inv.pair(torch.sinh, torch.asinh)] * 3)
    with pytest.raises(OptionError, match=r"segments=-?\d+ of an op with 3 parts, expected a number from 1 to 3$"):
        inv.checkpoint(net, segments=segments)


@pytest.mark.parametrize("cuts", [(0,), (3,), (2, 1), (1, 1), (-1,)])
def test_cuts_out_of_range(cuts: tuple[int, ...]) -> None:
    net = inv.chain(*[inv.pair(torch.sinh, torch.asinh)] * 3)
    with pytest.raises(OptionError, match=r"cuts=\(.*\) of an op with 3 parts, expected increasing places from 1 to 2"):
        inv.checkpoint(net, cuts=cuts)


def test_segments_of_what_has_no_inverse() -> None:
    for option in {"segments": 2}, {"cuts": [1]}, {"donate": True}:
        with pytest.raises(
            NotInvertibleError, match=r"tanh has no inverse; segments, cuts, donate and stream need an invertible op"
        ):
            inv.checkpoint(torch.tanh, **option)


# ---- other bad input -------------------------------------------------------------------------------------------------


def test_bad_input_of_checkpoint() -> None:
    with pytest.raises(OptionError, match="checkpoint: got int, expected an op, a function or a module"):
        inv.checkpoint(3)
    with pytest.raises(OptionError, match="inverse=... for an op, expected an inverse for plain functions only"):
        inv.checkpoint(inv.swap(), torch.neg)
    with pytest.raises(
        OptionError, match=r"got keyword arguments \['scale'\], expected none: only functions take them"
    ):
        inv.checkpoint(inv.swap())(1, 2, scale=3)
    for mode in "store", "recompute":
        with pytest.raises(
            OptionError, match=f"donate=True with mode='{mode}', expected mode 'invert': only it rebuilds"
        ):
            inv.checkpoint(inv.swap(), donate=True, mode=mode)


# ---- the law: no mode changes a value or a gradient ------------------------------------------------------------------


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(A, A)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def _closure() -> Callable[[Tensor], Tensor]:
    w = leaf(A)
    fn = lambda x: torch.sin(x * w)  # noqa: E731
    fn.tensors = [w]
    return fn


def _residual() -> inv.Invertible:
    """Forgets signs, and keeps them as its residue."""
    return inv.pair(
        lambda a, b: ((a.abs(), b.abs()), (a.sign(), b.sign())),
        lambda r, a, b: (a * r[0], b * r[1]),
        residue=True,
    )


PARTS: dict[str, Callable[[], Any]] = {
    "module": lambda: inv.couple(Affine(), Affine()),
    "closure": lambda: inv.couple(_closure(), torch.sin),
    "affine": lambda: inv.couple(inv.ops.tanh_scale(nn.Linear(A, 2 * A)), law=inv.affine),
    "one half": lambda: inv.couple(Affine()),
    "swap": inv.swap,
    "parallel": lambda: inv.parallel(inv.pair(torch.asinh, torch.sinh), inv.pair(torch.atan, torch.tan)),
    "rearranged": lambda: inv.chain(inv.concat(2), inv.split(2, interleaved=True)),
    "one way": lambda: inv.one_way(lambda a, b: (a + b.tanh(), b - a.tanh())),
    "residue": _residual,
}
MARKS = {
    "store": lambda op: inv.mark(op, "store"),
    "recompute": lambda op: inv.mark(op, "recompute"),
    "invert": lambda op: inv.mark(op, "invert"),
    "checkpoint": inv.checkpoint,
    "checkpoint recompute": lambda op: inv.checkpoint(op, mode="recompute"),
}
SINGLE = {  # on one component
    "asinh": lambda: inv.pair(torch.asinh, torch.sinh),
    "two": lambda: inv.chain(inv.pair(torch.atan, torch.tan), inv.mark(inv.pair(torch.asinh, torch.sinh), "store")),
    "one way": lambda: inv.one_way(torch.sin),
    "coupled": lambda: inv.chain(
        inv.split([1, 2]), inv.couple(lambda b: b.sum(1, keepdim=True).sin()), inv.concat([1, 2])
    ),
}
modes = st.sampled_from(["invert", "store", "recompute"])
singles = st.tuples(st.sampled_from(["plain", *sorted(MARKS)]), st.sampled_from(sorted(SINGLE)))
pipelines = st.recursive(
    st.one_of(st.sampled_from(sorted(PARTS)), st.tuples(singles, singles).map(lambda pair: ["parallel", *pair])),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(sorted(MARKS)), inner),
        st.lists(inner, min_size=1, max_size=4).map(lambda x: ["chain", *x]),
    ),
    max_leaves=6,
)


def build(plan: Any, parameters: list[Tensor]) -> tuple[inv.Invertible, inv.Invertible]:
    """A pipeline with its marks, and the same one without."""
    if isinstance(plan, str):
        op = PARTS[plan]()
        parameters += [p for module in Parts(op.functions).roots for p in module.parameters()]
        parameters += [t for fn in op.functions for t in getattr(fn, "tensors", [])]
        return op, op
    if isinstance(plan, tuple):
        marked, plain = build(plan[1], parameters)
        return MARKS[plan[0]](marked), plain
    if plan[0] == "parallel":
        plain = [SINGLE[name]() for _, name in plan[1:]]
        marked = [op if mark == "plain" else MARKS[mark](op) for op, (mark, _) in zip(plain, plan[1:], strict=True)]
        return inv.parallel(*marked), inv.parallel(*plain)
    marked, plain = zip(*[build(part, parameters) for part in plan[1:]], strict=True)
    return inv.chain(*marked), inv.chain(*plain)


@pytest.mark.parametrize("single", sorted(SINGLE))
@pytest.mark.parametrize("mark", sorted(MARKS))
def test_a_component_may_leave_the_trunk_that_others_follow(mark: str, single: str) -> None:
    nets = nn.Linear(A, A), nn.Linear(A, A)
    plain = inv.parallel(SINGLE[single](), inv.pair(torch.atan, torch.tan))
    marked = inv.parallel(MARKS[mark](plain.parts[0]), plain.parts[1])
    pipeline, twin = (inv.chain(inv.couple(*nets), op, inv.couple(*nets), op) for op in (marked, plain))
    xs = leaf(2, A), leaf(2, A)
    assert_same(twin, inv.checkpoint(pipeline), [*xs, *parameters(*nets)], *xs)
    by_func, expected = (
        torch.func.grad(lambda a, b, op=op: loss(op(a, b)), argnums=(0, 1))(*xs)
        for op in (inv.checkpoint(pipeline), twin)
    )
    assert_close(by_func, expected)


def by_autograd(op: inv.Invertible, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss(op(x)), x)[0]


WAYS = {
    "autograd": by_autograd,
    "torch.func": lambda op, x: torch.func.grad(lambda x: loss(op(x)))(x.detach()),
    "vmap": lambda op, x: torch.func.vmap(torch.func.grad(lambda x: loss(op(x[None]))))(x.detach()),
    "stages compiled": lambda op, x: by_autograd(inv.compile_stages(op, backend="eager"), x),
    "compiled": lambda op, x: by_autograd(torch.compile(op, backend="aot_eager"), x),
}


def without_gradient(b: Tensor, x: Tensor) -> Tensor:
    return x.detach() * b


@pytest.mark.compile
@pytest.mark.parametrize("way", WAYS)
def test_a_component_that_gives_its_input_no_gradient_leaves_those_of_the_others(way: str) -> None:
    halves, stopped = inv.split(2), inv.one_way(partial(without_gradient, torch.tensor([0.5, 2.0])))
    below = inv.couple(torch.sin, torch.cos)
    op = inv.chain(halves, below, inv.parallel(stopped, inv.pair(torch.asinh, torch.sinh)), ~halves)
    x = leaf(3, 4)
    assert_close(WAYS[way](inv.checkpoint(op), x), by_autograd(op, x))


def test_of_a_parallel_the_stored_component_alone_is_kept() -> None:
    n, x = 8000, torch.ones(1, 1000, requires_grad=True)
    sinh = inv.pair(torch.sinh, torch.asinh)
    both = inv.parallel(sinh, sinh)
    one = inv.parallel(inv.mark(sinh, "store"), sinh)
    pipeline = inv.checkpoint(inv.chain(both, one, both))
    assert measure(lambda: pipeline(x, x)).held_bytes == 2 * n + n  # the output, and what sinh's graph keeps


@settings(max_examples=100)
@given(
    st.lists(pipelines, min_size=1, max_size=4).map(lambda x: ["chain", *x]),
    modes,
    st.one_of(st.none(), modes),
    st.integers(1, 4),
    st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    st.integers(0, 2**30),
)
def test_no_mode_changes_a_value_or_a_gradient(
    plan: Any, mode: str, override: str | None, segments: int, needs: tuple[bool, bool], seed: int
) -> None:
    torch.manual_seed(seed)
    parameters: list[Tensor] = []
    marked, plain = build(plan, parameters)
    x = tuple(torch.randn(2, A, requires_grad=need) for need in needs)
    wrt = [*filter(lambda t: t.requires_grad, x), *parameters]
    fast = inv.checkpoint(marked, mode=mode, segments=min(segments, max(len(marked.parts), 1)))
    expected = plain(*x)
    with inv.mode(override) if override else torch.enable_grad():
        found = fast(*x)
    assert_close(found, expected, TOLERANCE)
    assert [t.requires_grad for t in found] == [t.requires_grad for t in expected]
    if any(t.requires_grad for t in expected):
        assert_close(gradients(found, wrt), gradients(expected, wrt), TOLERANCE)
