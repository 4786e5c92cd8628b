"""What one asks autograd for, a lowered pipeline gives as a plain one: gradients of any order, of some of the tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from kit import LOWERINGS, TOLERANCE, TWO, WIDTH, Counted, Net, assert_close, every_lowering, layer, leaf, loss
from torch import Tensor, nn

import invfunc as inv

# ---- calls of the engine -----------------------------------------------------------------------------------------------


@every_lowering
def test_autograd_grad(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    for wrt in [x], net.parameters, [x, *net.parameters], net.parameters[5:6], [x, net.modules[-1].net[0].weight]:
        expected = torch.autograd.grad(loss(net.op(x)), wrt)
        assert_close(torch.autograd.grad(loss(lower(net.op)(x)), wrt), expected)
    assert all(t.grad is None for t in [x, *net.parameters])


@every_lowering
def test_backward_accumulates_into_leaves(lower: Callable[..., Any]) -> None:
    found = []
    for fn in lambda op: op, lower:
        torch.manual_seed(0)
        net, x = Net(), leaf(3, 2 * WIDTH)
        for _ in range(2):
            loss(fn(net.op)(x)).backward()
        found.append([t.grad for t in [x, *net.parameters]])
    assert_close(*found)


@every_lowering
def test_backward_with_inputs(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    chosen = [x, net.parameters[3]]
    expected = torch.autograd.grad(loss(net.op(x)), chosen)
    loss(lower(net.op)(x)).backward(inputs=chosen)
    assert_close([t.grad for t in chosen], list(expected))
    assert all(p.grad is None for i, p in enumerate(net.parameters) if i != 3)


@every_lowering
def test_two_backwards_with_retain_graph(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    out = lower(net.op)(x)
    expected = torch.autograd.grad(loss(net.op(x)), [x, *net.parameters])
    total = loss(out)
    for _ in range(3):
        assert_close(torch.autograd.grad(total, [x, *net.parameters], retain_graph=True), expected)
    torch.autograd.grad(total, [x, *net.parameters])
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(total, [x, *net.parameters])


@every_lowering
def test_two_backwards_from_two_places(lower: Callable[..., Any]) -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    found = []
    for fn in net.op, lower(net.op):
        out = fn(x)
        first = torch.autograd.grad(out[:, 0].sum(), [x, *net.parameters], retain_graph=True)
        found.append([*first, *torch.autograd.grad(out[:, 1:].pow(2).sum(), [x, *net.parameters])])
    assert_close(*found)


@pytest.mark.parametrize("lower", [LOWERINGS[name] for name in TWO], ids=TWO)
def test_outputs_that_share_no_graph_are_backwarded_one_by_one(lower: Callable[..., Any]) -> None:
    first, second = Net(), Net()
    xs, op = (leaf(3, 2 * WIDTH), leaf(3, 2 * WIDTH)), inv.parallel(first.op, second.op)
    wrt = [*xs, *first.parameters, *second.parameters]
    expected = torch.autograd.grad(sum(map(loss, op(*xs))), wrt)
    ys = lower(op)(*xs)
    for y in reversed(ys):
        loss(y).backward()
    assert_close([t.grad for t in wrt], list(expected))
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss(ys[0]).backward()


def test_the_half_that_an_output_does_not_depend_on_runs_once() -> None:
    f, g, (x1, x2) = Counted(layer()), Counted(layer()), (leaf(3, WIDTH), leaf(3, WIDTH))
    op = inv.parallel(inv.couple(f, layer()), inv.couple(g, layer()))
    y, _ = inv.checkpoint(op)(((x1, x2), (x1, x2)))
    loss(y).backward()
    assert f.count == 2
    assert g.count == 1


@every_lowering
def test_a_leaf_that_a_function_makes_for_a_gradient_of_its_own(lower: Callable[..., Any]) -> None:
    def cube(x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = torch.ones(WIDTH, requires_grad=True)
            (slope,) = torch.autograd.grad((z * z * z).sum(), z)
        return x.sin() * slope

    op = inv.chain(inv.split(2), inv.couple(cube), inv.swap(), inv.couple(cube), inv.concat(2))
    x = leaf(3, 2 * WIDTH)
    assert_close(torch.autograd.grad(loss(lower(op)(x)), x), torch.autograd.grad(loss(op(x)), x))


@every_lowering
def test_double_backward(lower: Callable[..., Any]) -> None:
    net, x, found = Net(), leaf(3, 2 * WIDTH), []
    for fn in net.op, lower(net.op):
        once = torch.autograd.grad(loss(fn(x)), [x, *net.parameters], create_graph=True)
        found.append([*once, *torch.autograd.grad(loss(once), [x, *net.parameters])])
    assert_close(*found, TOLERANCE)


@every_lowering
def test_triple_backward(lower: Callable[..., Any]) -> None:
    net, x, found = Net(depth=1), leaf(2, 2 * WIDTH), []
    for fn in net.op, lower(inv.chain(*net.op.parts[:2], inv.chain(), *net.op.parts[2:])):
        (once,) = torch.autograd.grad(loss(fn(x)), x, create_graph=True)
        (twice,) = torch.autograd.grad(loss(once), x, create_graph=True)
        found.append(torch.autograd.grad(loss(twice), [x, *net.parameters]))
    assert_close(*found)


@every_lowering
def test_gradcheck(lower: Callable[..., Any]) -> None:
    op = inv.chain(
        inv.split(2, dim=-1), inv.couple(torch.sin, torch.tanh), inv.couple(torch.cos), inv.concat(2, dim=-1)
    )
    assert torch.autograd.gradcheck(lower(op), leaf(2, 4))
    assert torch.autograd.gradgradcheck(lower(op), leaf(2, 4))


def test_is_grads_batched() -> None:
    net, x, found = Net(), leaf(3, 2 * WIDTH), []
    seeds = torch.randn(5, 3, 2 * WIDTH)
    for fn in net.op, inv.checkpoint(net.op):
        found.append(torch.autograd.grad(fn(x), [x, *net.parameters], seeds, is_grads_batched=True))
    assert_close(*found)


def test_functional_jacobian_and_hessian() -> None:
    net, x = Net(depth=1), torch.randn(2, 2 * WIDTH)
    fast = inv.checkpoint(net.op)
    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    for vectorize in False, True:
        assert_close(jacobian(fast, x, vectorize=vectorize), jacobian(net.op, x))
        found = hessian(lambda x: loss(fast(x)), x, vectorize=vectorize)
        assert_close(found, hessian(lambda x: loss(net.op(x)), x))


# ---- partly frozen, partly used ----------------------------------------------------------------------------------------


def test_a_frozen_first_half_is_not_rebuilt() -> None:
    net, x = Net(depth=4), torch.randn(3, 2 * WIDTH)
    for module in net.modules[:4]:
        module.requires_grad_(False)
    trained = [p for p in net.parameters if p.requires_grad]
    expected = torch.autograd.grad(loss(net.op(x)), trained)
    for module in net.modules:
        module.count = 0
    found = torch.autograd.grad(loss(inv.checkpoint(net.op)(x)), trained)
    assert_close(found, expected)
    assert net.counts == [1] * 4 + [2] * 4


def test_what_nobody_asks_for_is_not_run_again() -> None:
    net, x = Net(depth=4), leaf(3, 2 * WIDTH)
    out = inv.checkpoint(net.op)(x)
    torch.autograd.grad(loss(out), net.modules[-1].net[0].weight)
    assert net.counts == [1] * 7 + [2]


@every_lowering
def test_partly_frozen_networks(lower: Callable[..., Any]) -> None:
    for frozen in [0], [1], [5], [0, 1], [4, 5], [2, 3], [0, 3, 4]:
        for needed in True, False:
            net, x = Net(), torch.randn(3, 2 * WIDTH).requires_grad_(needed)
            for i in frozen:
                net.modules[i].requires_grad_(False)
            net.modules[1].net[0].bias.requires_grad_(False)
            wrt = [t for t in [x, *net.parameters] if t.requires_grad]
            expected = torch.autograd.grad(loss(net.op(x)), wrt)
            assert_close(torch.autograd.grad(loss(lower(net.op)(x)), wrt), expected)


def test_a_wholly_frozen_network_needs_no_graph() -> None:
    net, x = Net(), torch.randn(3, 2 * WIDTH)
    for module in net.modules:
        module.requires_grad_(False)
    assert not inv.checkpoint(net.op)(x).requires_grad
    y = inv.checkpoint(net.op)(x.requires_grad_())
    assert_close(torch.autograd.grad(loss(y), x), torch.autograd.grad(loss(net.op(x)), x))


@pytest.mark.parametrize("name", TWO)
def test_unused_outputs(name: str) -> None:
    f, g = Counted(layer()), Counted(layer())
    op = inv.chain(inv.couple(f, g), inv.couple(torch.sin, f))
    wrt = [leaf(3, WIDTH), leaf(3, WIDTH), *f.parameters(), *g.parameters()]
    for pick in lambda a, b: a, lambda a, b: b, lambda a, b: a[:1], lambda a, b: b.detach() + a:
        expected = torch.autograd.grad(loss(pick(*op(*wrt[:2]))), wrt, allow_unused=True)
        found = torch.autograd.grad(loss(pick(*LOWERINGS[name](op)(*wrt[:2]))), wrt, allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            assert_close(a if a is not None else torch.zeros_like(b), b if b is not None else torch.zeros_like(a))


def test_an_unused_parameter_gets_no_gradient() -> None:
    class Lazy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    module = Lazy(WIDTH, WIDTH)
    for fn in (
        inv.checkpoint(inv.couple(module)),
        inv.checkpoint(inv.couple(lambda x: module(x))),
        inv.checkpoint(module),
    ):
        xs = [leaf(3, WIDTH)] * (1 if fn.__class__.__name__ == "CheckpointedFunction" else 2)
        weight, bias = torch.autograd.grad(loss(fn(*xs)), [module.weight, module.bias], allow_unused=True)
        assert weight is not None and bias is None


def test_a_parameter_in_many_places() -> None:
    f = Counted(layer())
    op = inv.chain(inv.couple(f, f), inv.swap(), inv.couple(f), inv.couple(lambda x: f(x) * f.net[0].bias))
    wrt = [leaf(3, WIDTH), leaf(3, WIDTH), *f.parameters()]
    expected = torch.autograd.grad(loss(op(*wrt[:2])), wrt)
    for name in TWO:
        assert_close(torch.autograd.grad(loss(LOWERINGS[name](op)(*wrt[:2])), wrt), expected)
