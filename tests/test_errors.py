"""The text of every error: where in the pipeline, what is wrong, what was expected, what came, and what to do."""

import ast
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogue import EXAMPLES
from kit import assert_refused
from torch import Tensor, nn

import invfunc as inv
from invfunc.errors import (
    DomainError,
    DonatedError,
    InvertibleError,
    NotDifferentiableError,
    NotInvertibleError,
    OptionError,
    ReplayError,
    WireError,
    place_error,
)

Call = Callable[[], Any]


def message(call: Call, kind: type[Exception]) -> str:
    with pytest.raises(kind) as raised:
        call()
    assert type(raised.value) is kind
    return str(raised.value)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def f(x: Tensor) -> Tensor:
    return x.sin()


def narrow(x: Tensor) -> Tensor:
    return x[:, :1].expand(-1, 2)


def two(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


exp = inv.pair(torch.exp, torch.log)
residual = inv.pair(lambda x: (x, x), lambda r, y: r, residue=True, name="residual")
PAIR = zeros(2, 3), zeros(2, 3)

# ---- wires -----------------------------------------------------------------------------------------------------------

WIRES: dict[str, Call] = {
    "linear(weight) received 2 components ((1, 2), (1, 2)), expected as many as it takes: (x: 'Tensor') -> 'Tensor'; a tuple "
    "wire becomes positional arguments: concat it first, or let the function take them all": lambda: inv.ops.linear(
        torch.eye(2)
    )(zeros(1, 2), zeros(1, 2)),
    "exp() received 2 components ((2,), (2,)), expected as many as it takes: (x: 'Tensor') -> 'Any'; a tuple "
    "wire becomes positional arguments: concat it first, or let the function take them all": lambda: inv.ops.exp()(
        zeros(2), zeros(2)
    ),
    "additive(t): t is (5, 2), expected (2,) like the input, or what broadcasts to it": lambda: inv.additive(
        zeros(5, 2)
    )(zeros(2)),
    "affine(s, t): s is (5, 2), expected (2,) like the input, or what broadcasts to it": lambda: inv.affine(
        zeros(5, 2), zeros(2)
    )(zeros(2)),
    "additive(t): t, expected a tensor, got float; wrap a number: torch.tensor(...)": lambda: inv.additive(2.0)(
        zeros(2)
    ),
    "affine(s, t): t, expected a tensor, got int; wrap a number: torch.tensor(...)": lambda: inv.affine(zeros(2), 1)(
        zeros(2)
    ),
    "parallel of 2 ops received the wrong number of components, expected a tuple of 2, got 3 components "
    "((1,), (1,), (1,)); pass a tuple of 2, or put split(2) before it": lambda: inv.parallel(exp, exp)(
        zeros(1), zeros(1), zeros(1)
    ),
    "parallel of 2 ops received the wrong number of components, expected a tuple of 2, got one (4, 2); pass a tuple of "
    "2, or put split(2) before it": lambda: inv.parallel(exp, exp)(zeros(4, 2)),
    "couple received the wrong number of components, expected a tuple of 2, got one (4, 2); pass a tuple of 2, or put "
    "split(2) before it": lambda: inv.couple(f)(zeros(4, 2)),
    "permute_wires([1, 2, 0]) received the wrong number of components, expected a tuple of 3, got 2 components "
    "((1,), None); pass a tuple of 3, or put split(3) before it": lambda: inv.permute_wires([1, 2, 0])(zeros(1), None),
    "concat(2, dim=1) received the wrong number of components, expected a tuple of 2, got 3 components "
    "((2, 1), (2, 1), (2, 1)); pass a tuple of 2, or put split(2) before it": lambda: inv.concat()(*[zeros(2, 1)] * 3),
    "split received ((2, 4), (2, 4)), expected one tensor; split acts on tensors, not tuples": lambda: inv.split()(
        zeros(2, 4), zeros(2, 4)
    ),
    "split along dim 2, expected a tensor with such a dim, got (2, 4)": lambda: inv.split(2, dim=2)(zeros(2, 4)),
    "split(2, dim=1) of (2, 5), expected a size that 2 divides, got 5; pass sizes instead: split([3, 2], dim=1)": (
        lambda: inv.split()(zeros(2, 5))
    ),
    "split(3, dim=-1) of (2, 5), expected a size that 3 divides, got 5; pass sizes instead: split([2, 2, 1], dim=-1)": (
        lambda: inv.split(3, -1, interleaved=True)(zeros(2, 5))
    ),
    "split([1, 2], dim=1) of (2, 5), expected sizes that add up to 5, got 3": lambda: inv.split([1, 2])(zeros(2, 5)),
    "concat along dim 1 received ((2, 1), (2, 3)), expected components of sizes [1, 1], got [1, 3]; pass sizes: "
    "concat([1, 3], dim=1)": lambda: inv.concat()(zeros(2, 1), zeros(2, 3)),
    "concat along dim 1 received ((2, 1), None), expected 2 tensors": lambda: inv.concat()(zeros(2, 1), None),
    "additive(t): the input, expected a tensor, got None": lambda: inv.additive(zeros(2))(None),
    "affine(s, t): the input, expected a tensor, got None": lambda: inv.affine(zeros(2), zeros(2))(None),
    "dequantize: the input, expected a tensor of at least 0 dims, got None": lambda: inv.ops.dequantize()(None),
    "exp(): the input, expected a floating-point tensor, got None": lambda: inv.ops.exp()(None),
    "the inverse of exp(): the input, expected a floating-point tensor, got None": lambda: inv.ops.exp().inverse(None),
    "exp(): the input, expected a floating-point tensor, got torch.int64; x.float()": lambda: inv.ops.exp()(
        torch.arange(2)
    ),
    "exp(): the input, expected real numbers, got torch.complex64; torch.view_as_real(x)": (
        lambda: inv.ops.exp()(torch.ones(2, dtype=torch.complex64))
    ),
    "f returned (2, 2), expected (2, 3) like its partner component; change the output size of f, or the sizes of the "
    "split before it": lambda: inv.couple(narrow)(*PAIR),
    "g returned (2, 2), expected (2, 3) like its partner component; change the output size of g, or the sizes of the "
    "split before it": lambda: inv.couple(f, narrow)(*PAIR),
    "f returned ((2, 3), (2, 3)), expected (t) for law additive; return one tensor, or pass another law": (
        lambda: inv.couple(two)(*PAIR)
    ),
    "f returned None, expected (t) for law additive; return one tensor, or pass another law": (
        lambda: inv.couple(lambda x: None)(*PAIR)
    ),
    "f returned (2, 3), expected (s, t) for law affine; return a tuple of tensors, or wrap the net: exp_scale(f), "
    "sigmoid_scale(f), tanh_scale(f, bound)": lambda: inv.couple(f, law=inv.affine)(*PAIR),
    "f's partner component is ((2, 3), (2, 3)), expected one tensor; pass a law that acts on nested components": (
        lambda: inv.couple(f)(PAIR, zeros(2, 3))
    ),
    "exp_scale(f): the net returned (2, 3), expected an even size along dim 1: scale and shift; let the net return "
    "twice the channels of the component that it changes, or a tuple (raw, t)": (
        lambda: inv.couple(inv.ops.exp_scale(f), law=inv.affine)(*PAIR)
    ),
    "law <lambda> made (3, 2) of (2, 3), expected a shape that does not change": (
        lambda: inv.couple(f, law=lambda t: inv.pair(Tensor.t, Tensor.t))(*PAIR)
    ),
}


@pytest.mark.parametrize("text", WIRES)
def test_what_a_wire_must_be(text: str) -> None:
    assert message(WIRES[text], WireError) == text


# ---- options ---------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Call] = {
    "rotate received one component ((2,),) and no 'b', expected as many as it takes: (a, b); tell it by name: "
    "context={'b': ...}; or pass a tuple: its components become positional arguments": lambda: inv.pair(
        lambda a, b: (b, a), lambda a, b: (b, a), name="rotate"
    )(zeros(2)),
    "pair: forward is int, expected a function": lambda: inv.pair(3, f),
    "pair: inverse is Tensor, expected a function": lambda: inv.pair(f, zeros(1)),
    "pair(two, f) returned Tensor, expected (y, residue), as pair(..., residue=True) promises": (
        lambda: inv.pair(lambda x: x, f, residue=True, name="pair(two, f)")(zeros(1))
    ),
    "one_way: got str, expected a function, a module or an invertible op": lambda: inv.chain(exp, "relu"),
    "permute_wires: got [0, 0], expected each of 0..1 exactly once": lambda: inv.permute_wires([0, 0]),
    "split: sizes is 0, expected a positive number of parts": lambda: inv.split(0),
    "split: sizes is (1, 2), expected a number when interleaved": lambda: inv.split([1, 2], interleaved=True),
    "couple: f is NoneType, expected a function or a module": lambda: inv.couple(None),
    "couple: g is int, expected a function or a module": lambda: inv.couple(f, 3),
    "couple: law is str, expected a function or a module": lambda: inv.couple(f, law="affine"),
    "law f returned Tensor, expected an invertible op; a law maps what the function returned to an op, as additive and "
    "affine do": lambda: inv.couple(f, law=f)(*PAIR),
    "tanh_scale: bound is 0, expected a positive number": lambda: inv.ops.tanh_scale(f, 0),
    "flow: the base is NoneType, expected a distribution, a function that returns one, or a tuple of these": (
        lambda: inv.flow(exp, None)
    ),
    "flow: the base is Normal, expected a distribution, a function that returns one, or a tuple of these": (
        lambda: inv.flow(exp, (torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal))
    ),
    "mode is 'fast', expected 'invert' or 'store' or 'recompute'": lambda: inv.checkpoint(exp, mode="fast"),
    "checkpoint: got int, expected an op, a function or a module": lambda: inv.checkpoint(3),
    "checkpoint: inverse=... for an op, expected an inverse for plain functions only": lambda: inv.checkpoint(exp, f),
    "checkpoint: segments=3 of an op with 2 parts, expected a number from 1 to 2": (
        lambda: inv.checkpoint(exp >> exp, segments=3)
    ),
    "checkpoint: cuts=(2,) of an op with 2 parts, expected increasing places from 1 to 1": (
        lambda: inv.checkpoint(exp >> exp, cuts=[2])
    ),
    "checkpoint(couple(f)) got keyword arguments ['scale'], expected none: only functions take them": (
        lambda: inv.checkpoint(inv.couple(f))(zeros(1), scale=2)
    ),
}


@pytest.mark.parametrize("text", OPTIONS)
def test_what_an_option_must_be(text: str) -> None:
    assert message(OPTIONS[text], OptionError) == text


# ---- inverses --------------------------------------------------------------------------------------------------------

INVERSES: dict[str, Call] = {
    "one_way(f) has no inverse; give it one with pair(forward, inverse), or invert the rest without it": (
        lambda: inv.one_way(f).inverse(zeros(1))
    ),
    "one_way(Linear) has no inverse; give it one with pair(forward, inverse), or invert the rest without it": (
        lambda: inv.invert(inv.one_way(nn.Linear(1, 1)))(zeros(1))
    ),
    "invert: f is function, expected an invertible op; build it with pair(...)": lambda: inv.invert(f),
    "residual needs its residue for the inverse; keep it: y, r = op.forward_with_residue(x); "
    "op.inverse_with_residue(r, y)": lambda: residual.inverse(zeros(1)),
    "chain stage 1 (one_way): one_way(sum) has no inverse; give it one with pair(forward, inverse), or invert the rest "
    "without it": lambda: inv.chain(exp, torch.sum).inverse(zeros(1)),
    "checkpoint: f has no inverse; segments, cuts, donate and stream need an invertible op, or inverse=...": (
        lambda: inv.checkpoint(f, donate=True)
    ),
}


@pytest.mark.parametrize("text", INVERSES)
def test_what_has_no_inverse(text: str) -> None:
    assert message(INVERSES[text], NotInvertibleError) == text


# ---- paths -----------------------------------------------------------------------------------------------------------

BAD = inv.couple(f, narrow)
DEEP = inv.chain(inv.parallel(inv.chain(), inv.chain(inv.swap(), BAD)), inv.swap())
CLAIM = "g returned (2, 2), expected (2, 3) like its partner component"
PATH = "chain stage 0 (parallel): parallel component 1 (chain): chain stage 1 (couple): "


@pytest.mark.parametrize("op", [DEEP, inv.checkpoint(DEEP)], ids=["plain", "lowered"])
def test_a_message_begins_with_the_path_of_the_op(op: inv.Invertible) -> None:
    x = None, tuple(part.requires_grad_() for part in (zeros(2, 3), zeros(2, 3)))
    assert message(lambda: op(x), WireError).startswith(PATH + CLAIM)


same = inv.pair(lambda *x: x if len(x) != 1 else x[0], lambda *y: y, name="same")


def test_every_op_that_refuses_a_wire_says_where_it_stands() -> None:
    wires = torch.zeros(()), (torch.zeros(2), torch.zeros(3), torch.zeros(4))
    refused = set()
    for name, example in EXAMPLES.items():
        for op in (example.make(), inv.invert(example.make())):
            for wire in wires:
                for call in (inv.chain(same, op), inv.checkpoint(inv.chain(same, op))):
                    try:
                        call(wire)
                    except InvertibleError as error:
                        assert str(error).startswith("chain stage 1 ("), (name, str(error))
                        refused.add(name)
                    except Exception:
                        pass
    assert len(refused) > len(EXAMPLES) / 2


def test_every_error_says_what_was_expected_or_what_to_do() -> None:
    kinds = {
        kind.__name__
        for kind in vars(inv.errors).values()
        if isinstance(kind, type) and issubclass(kind, InvertibleError)
    }
    calls = [
        node
        for path in Path(inv.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds
    ]
    assert len(calls) > 200
    bare = [ast.unparse(c) for c in calls if not {k.arg for k in c.keywords} & {"expected", "got", "cure"}]
    assert not bare


def test_the_path_of_an_inverse_counts_the_parts_of_the_op() -> None:
    op = inv.chain(exp, inv.split(2), exp)
    text = message(lambda: op.inverse(zeros(2)), WireError)
    assert text.startswith("chain stage 1 (split): concat(2, dim=1) received the wrong number of components")
    assert message(lambda: (~op)(zeros(2)), WireError).startswith("chain stage 1 (concat): ")


def test_an_error_of_the_user_gets_a_note_and_stays_what_it_is() -> None:
    def fails(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as raised:
        inv.chain(inv.swap(), inv.parallel(inv.chain(), inv.couple(fails)))((PAIR, None))
    assert raised.value.__notes__ == ["in parallel component 1 (couple)", "in chain stage 1 (parallel)"]


# ---- replay ----------------------------------------------------------------------------------------------------------


def step(op: Any, between: Call = lambda: None) -> None:
    """A step of training, with something done between forward and backward."""
    y = op(zeros(2, 4).requires_grad_())
    between()
    y.sum().backward()


def below_a_transform(make: Callable[[Tensor], Any], w: Tensor) -> Call:
    """A gradient by `torch.func`, where what functions close over has to be found."""
    return lambda: torch.func.grad(lambda w: make(w)(zeros(2, 4)).sum())(w)


def halves(*fns: Any) -> inv.Invertible:
    return inv.checkpoint(inv.chain(inv.split(2), inv.couple(*fns), inv.concat(2)))


def test_other_pins_in_backward() -> None:
    names = iter(["first", "second"])
    text = message(lambda: step(halves(lambda x: (x * inv.pin(next(names), 2)).sin())), ReplayError)
    assert text == (
        "chain stage 1 (couple): pin('second') on replay, expected pin('first'); pin the same names in the same order in every run of "
        "the function"
    )


def test_more_pins_in_backward() -> None:
    calls: list[int] = []

    def more(x: Tensor) -> Tensor:
        calls.append(1)
        for _ in calls:
            x = x * inv.pin("n", 2)
        return x.sin()

    text = message(lambda: step(halves(more)), ReplayError)
    assert text.startswith("chain stage 1 (couple): pin('n') on replay, expected nothing more; pin the same names")


def test_a_pullback_that_forgets_a_captured_tensor() -> None:
    def op(w: Tensor) -> inv.Invertible:
        return inv.checkpoint(inv.pair(lambda x: x * w, lambda y: y / w, pullback=lambda y, gy: (y / w, gy * w)))

    assert message(below_a_transform(op, torch.ones(4)), ReplayError) == (
        "a pullback gave no gradient for a tensor of shape (4,) that its op closes over, expected (x, gx, [(tensor, "
        "gradient), ...]) with each of them; return the gradient, or leave the pullback out"
    )


def test_a_buffer_that_changes_between_forward_and_backward() -> None:
    norm = nn.BatchNorm1d(2).eval()
    text = message(lambda: step(halves(norm), lambda: norm.running_mean.add_(1)), ReplayError)
    assert text == (
        "chain stage 1 (couple): ['running_mean'] of a module changed between forward and backward, expected the "
        "tensors that forward read, got some that were modified by an inplace operation; run backward before changing "
        "them, or clone them in forward"
    )


def test_a_weight_that_changes_between_forward_and_backward() -> None:
    """As in plain autograd, and with its message: a weight is a saved tensor."""
    module = nn.Linear(2, 2)

    def change() -> None:
        with torch.no_grad():
            module.weight.add_(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(halves(module), change)


COUPLING = "chain stage 1 (couple): "
REBOUND = (
    ", expected the tensors that it closed over in forward; do not rebind what a function closes over between forward "
    "and backward"
)


class Held:
    """Holds a tensor where nobody looks: what is in a closure itself is put back."""

    w: Any


def test_what_is_rebound_where_nobody_looks() -> None:
    Held.w = torch.ones(2, requires_grad=True)
    rebind = lambda: setattr(Held, "w", torch.full((2,), 2.0, requires_grad=True))  # noqa: E731
    text = message(lambda: step(halves(lambda x: x * Held.w), rebind), ReplayError)
    assert text == f"{COUPLING}the function met a tensor of shape (2,) that it did not meet in forward{REBOUND}"


def test_what_is_emptied_where_nobody_looks() -> None:
    Held.w = torch.ones(2, requires_grad=True)
    text = message(lambda: step(halves(lambda x: x * Held.w), lambda: setattr(Held, "w", 1.0)), ReplayError)
    assert text == (
        f"{COUPLING}the function saved 0 tensors when it ran again, expected 1 as in forward; the function must do the "
        "same twice; test an op with invfunc.testing.check_laws"
    )


@pytest.mark.parametrize("rule", [False, True], ids=["forward runs again", "pullback"])
def test_an_inverse_of_another_shape(rule: bool) -> None:
    crop = lambda y: y[:, :2] / 2  # noqa: E731
    pullback = (lambda y, gy: (crop(y), 2 * gy)) if rule else None
    op = inv.pair(lambda x: 2 * x, crop, pullback=pullback, name="crop")
    text = message(lambda: step(inv.checkpoint(inv.chain(exp, op))), ReplayError)
    assert "crop" in text
    assert text.endswith(
        " returned (2, 2) float64, expected (2, 4) float64 as in forward; the function must be pure; test an op with "
        "invfunc.testing.check_laws"
    )


def test_an_input_changed_in_place() -> None:
    text = message(lambda: step(halves(torch.relu_)), ReplayError)
    assert text == (
        "chain stage 1 (couple): half(relu_, target=0).forward_with_residue changed its input in place, expected a "
        "function that leaves its input alone: backward runs it again; use the out-of-place operation, or clone the "
        "input first"
    )


def test_a_tensor_that_a_transform_hides() -> None:
    op = lambda w: halves(lambda x: x * torch.func.grad(lambda w: w.square().sum())(w))  # noqa: E731
    assert message(below_a_transform(op, torch.ones(2)), ReplayError).endswith(
        "a tensor of shape (2,) of the function's closure goes straight into a torch.func transform, expected tensors "
        "that can be replayed: arguments, parameters of modules, or what torch functions are given; pass it as an "
        "argument, or give the transform tensor.clone()"
    )


# ---- donation --------------------------------------------------------------------------------------------------------


def fresh(*shape: int) -> Tensor:
    """A tensor that an operation has made, and nobody else holds."""
    return zeros(*shape).requires_grad_() * 1


def donated(op: inv.Invertible = inv.couple(f), which: Any = True) -> inv.Invertible:  # noqa: B008
    return inv.checkpoint(op, donate=which)


def alias() -> Any:
    x = fresh(2, 3)
    donated()(x, x.detach())


def saved() -> Any:
    x = fresh(2, 3)
    y = x.sin()
    donated()(x, fresh(2, 3))
    return y


def twice() -> Any:
    x = fresh(2, 3)
    donated()(x, x)


def in_a_transform() -> Any:
    torch.func.grad(lambda x: donated(inv.pair(torch.sinh, torch.asinh))(x.clone()).sum())(zeros(3))


REFUSED: dict[str, Call] = {
    "input 0 can not be freed: it is a leaf that requires grad, which its owner will read": (
        lambda: donated()(zeros(2, 3).requires_grad_(), fresh(2, 3))
    ),
    "input 1 can not be freed: it is a view, does not fill its storage, or lies in memory that is not torch's own": (
        lambda: donated()(fresh(2, 3), fresh(4, 3)[:2])
    ),
    "input 0 can not be freed: 1 other tensors share its storage (views, detached aliases, or results saved for "
    "backward)": alias,
    "input 0 can not be freed: an operation has saved it for backward, or a view of it is alive": saved,
    "input 1 can not be freed: it is there twice": twice,
    "input 2 can not be freed: there is no tensor at this place of the wire": (
        lambda: donated(which=[2])(fresh(2, 3), fresh(2, 3))
    ),
    "input 1 can not be freed: it is a Tensor of torch.int64, not a plain floating-point tensor": (
        lambda: donated(inv.parallel(exp, inv.chain()), [1])(fresh(3), torch.tensor([1]))
    ),
    "input 0 can not be freed: a torch.func transform is active": in_a_transform,
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_can_not_be_donated(text: str) -> None:
    assert message(REFUSED[text], DonatedError) == f"donate: {text}; leave it out of donate=..."


def test_a_donated_input_that_the_output_shares() -> None:
    op = donated(inv.pair(lambda x: x.view(3, 2), lambda y: y.view(2, 3)))
    text = "donate: the output is a view of the input; leave donate=False"
    assert message(lambda: op(fresh(2, 3)), DonatedError) == text


def test_a_donated_input_that_the_pipeline_keeps() -> None:
    assert message(lambda: donated(inv.chain(f, exp))(fresh(2, 3)), DonatedError) == (
        "donate: the pipeline itself keeps the input, expected one that begins with what can be rebuilt, and closes "
        "over no input; leave donate=False, or move stored and recomputed parts, and cuts, behind the first coupling"
    )


@pytest.mark.parametrize("read", [lambda x: x + 1, lambda x: x.sum(), torch.clone, donated(exp)])
def test_a_donated_tensor_is_read(read: Callable[[Tensor], Any]) -> None:
    x = fresh(3)
    y = donated(exp)(x)
    assert message(lambda: read(x), DonatedError) == (
        "a donated tensor was read, expected that nobody reads it between forward and backward; use it before the "
        "call, keep x.clone(), or leave donate=False"
    )
    y.sum().backward()


# ---- errors as values ------------------------------------------------------------------------------------------------

KINDS = WireError, NotInvertibleError, NotDifferentiableError, ReplayError, DomainError, DonatedError, OptionError


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_one_of_the_package_and_a_runtime_error(kind: type[InvertibleError]) -> None:
    assert issubclass(kind, InvertibleError)
    assert issubclass(kind, RuntimeError)


def test_errors_about_values_are_value_errors() -> None:
    assert [issubclass(kind, ValueError) for kind in KINDS] == [True, False, False, False, True, False, True]


def test_a_message_is_made_of_its_terms() -> None:
    error = WireError("this", expected="that", got="the other", cure="do so")
    assert str(error) == "this, expected that, got the other; do so"
    assert str(WireError("this")) == "this"
    assert str(WireError("this", cure="do so")) == "this; do so"
    place_error(error, "inner")
    place_error(error, "")
    place_error(error, "outer")
    assert str(error) == "outer: inner: this, expected that, got the other; do so"


def test_an_error_pickles_with_its_path() -> None:
    error = WireError("this", expected="that")
    place_error(error, "here")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.path) == (WireError, "here: this, expected that", ("here",))


# ---- a value is no module --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parameters", "to", "state_dict", "train"])
def test_an_op_that_is_asked_for_what_modules_have_names_the_module(name: str) -> None:
    op = inv.couple(nn.Linear(2, 2))
    for value in op, inv.checkpoint(op):
        message = f"has no attribute '{name}': an op is a value and no module; inv.nn.Lowered(op) is one"
        assert_refused(AttributeError, message, lambda value=value: getattr(value, name), anywhere=True)
    message = f"has no attribute '{name}': it is a function; module.forward = inv.checkpoint(module.forward)"
    assert_refused(AttributeError, message, lambda: getattr(inv.checkpoint(nn.Linear(2, 2)), name), anywhere=True)


@pytest.mark.parametrize("hold", [nn.Sequential, lambda value: nn.ModuleList([value])])
def test_an_op_that_is_put_among_modules_names_the_module(hold: Callable[[Any], Any]) -> None:
    op = inv.couple(nn.Linear(2, 2))
    for value in op, inv.checkpoint(op):
        message = f"{type(value).__name__} (an op is a value and no module; inv.nn.Lowered(op) is one"
        assert_refused(TypeError, message, lambda value=value: hold(value), anywhere=True)
    message = "CheckpointedFunction (it is a function; module.forward = inv.checkpoint(module.forward) leaves"
    assert_refused(TypeError, message, lambda: hold(inv.checkpoint(nn.Linear(2, 2))), anywhere=True)


def test_an_op_that_is_asked_for_anything_else_says_what_python_says() -> None:
    for value in inv.couple(torch.sin), inv.checkpoint(torch.sin):
        assert not hasattr(value, "zork") and not hasattr(value, "__torch_function__")
        message = f"'{type(value).__name__}' object has no attribute 'zork'"
        assert_refused(AttributeError, message, lambda value=value: value.zork)


@pytest.mark.parametrize(
    "use",
    [
        inv.invert,
        inv.exact,
        inv.with_log_det,
        inv.ops.as_transform,
        lambda module: inv.log_det(module, torch.ones(2, 3)),
        lambda module: inv.flow(module, torch.distributions.Normal(torch.zeros(3), 1.0)),
        lambda module: inv.testing.check_laws(module, torch.ones(2, 3)),
    ],
)
def test_a_module_where_an_op_is_expected_is_told_that_it_has_one(use: Callable[[Any], Any]) -> None:
    message = "ActNorm is ActNorm, expected an invertible op; pass its op: module.op"
    assert_refused(NotInvertibleError, message, lambda: use(inv.nn.ActNorm(3)), anywhere=True)


PLAIN = [inv.ops.cbrt(), inv.ops.power(2.0), inv.ops.abs(), inv.ops.leaky_tanh()]
SPLINES = [inv.ops.linear_spline(torch.zeros(4)), inv.ops.rational_quadratic_spline(torch.zeros(8))]
NO_REALS = [None, torch.arange(3), torch.ones(3, dtype=torch.complex64), torch.ones(3).to(torch.float8_e4m3fn)]


@pytest.mark.parametrize("op", [*PLAIN, *SPLINES, inv.ops.mixture_logit(torch.zeros(3))])
@pytest.mark.parametrize("bad", NO_REALS)
@pytest.mark.parametrize("lower", [lambda op: op, inv.checkpoint])
def test_what_is_no_real_number_is_refused_in_the_name_of_its_elementwise_op(
    op: inv.Invertible, bad: Any, lower: Any
) -> None:
    assert_refused(WireError, f"{op!r}: the input, expected ", lambda: lower(op)(bad), anywhere=True)
    if not getattr(op, "residue", False):
        assert_refused(WireError, f"the inverse of {op!r}: the ", lambda: lower(op).inverse(bad), anywhere=True)


@pytest.mark.parametrize("returned", [None, "Normal", torch.zeros(3)])
def test_a_base_that_returns_no_distribution_is_named(returned: Any) -> None:
    for base, context in (lambda: returned, None), (lambda c: returned, torch.ones(2, 1)):
        flow = inv.flow(inv.ops.exp(), base)
        for call in lambda: flow.log_prob(torch.ones(2, 3), context), lambda: flow.sample((2,), context):  # noqa: B023
            assert_refused(WireError, "the base <lambda> returned ", call)


@pytest.mark.parametrize("op", [inv.ops.linear(1.5 * torch.eye(3)), inv.ops.diagonal(torch.ones(3))])
def test_integers_are_refused_by_what_computes_with_real_numbers(op: inv.Invertible) -> None:
    message = "expected a floating-point tensor, got torch.int64; x.float()"
    assert_refused(WireError, message, lambda: op(torch.arange(6).view(2, 3)), anywhere=True)
