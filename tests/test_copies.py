"""Copies and pickles of lowered pipelines and of modules that have them."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from kit import WIDTH, Counted, Net, assert_close, layer, leaf, loss
from torch import Tensor, nn

import invfunc as inv


@inv.checkpoint
def decorated(x: Tensor) -> Tensor:
    return x.sin().exp()


@inv.checkpoint(inverse=lambda y: y - 1)
def invertible(x: Tensor) -> Tensor:
    return x + 1


class Model(nn.Module):
    """A module with a lowered pipeline of its own submodules."""

    def __init__(self, mode: str = "invert") -> None:
        super().__init__()
        self.f, self.g = Counted(layer()), Counted(layer())
        self.op = inv.checkpoint(inv.chain(inv.split(2), inv.couple(self.f, self.g), inv.concat(2)), mode=mode)
        self.head = inv.checkpoint(self.g.net[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(x)[:, :WIDTH])


def copies() -> dict[str, Callable[[Any], Any]]:
    def saved(model: Any) -> Any:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("copied", copies().values(), ids=copies())
def test_a_copy_of_a_lowered_module_trains_its_own_parameters(
    copied: Callable[..., Any], mode: str, used: bool
) -> None:
    model, x = Model(mode), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(model(x)), [x, *model.parameters()])
    if not used:
        state = model.state_dict()
        model = Model(mode)
        model.load_state_dict(state)
    other = copied(model)
    assert {id(p) for p in model.parameters()}.isdisjoint({id(p) for p in other.parameters()})
    loss(other(x)).backward()
    assert_close([p.grad for p in other.parameters()], list(expected[1:]))
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    assert_close(torch.autograd.grad(loss(model(x)), [x, *model.parameters()]), expected)


@pytest.mark.parametrize(
    "op",
    [
        lambda: inv.checkpoint(inv.couple(nn.Linear(WIDTH, WIDTH), torch.tanh), segments=2),
        lambda: inv.chain(inv.mark(inv.swap(), "store"), inv.mark(torch.add, "recompute")),
        lambda: ~inv.checkpoint(inv.chain(inv.concat(2), inv.split(2))),
        lambda: inv.couple(inv.ops.tanh_scale(nn.Linear(WIDTH, 2 * WIDTH)), law=inv.affine),
    ],
)
@pytest.mark.parametrize("copied", copies().values(), ids=copies())
def test_copies_of_ops(copied: Callable[..., Any], op: Callable[[], inv.Invertible]) -> None:
    op = op()
    xs = [torch.randn(3, WIDTH)] * 2
    expected = op(*xs)
    assert repr(copied(op)) == repr(op)
    assert_close(copied(op)(*xs), expected)


def test_decorated_functions_are_pickled_by_name() -> None:
    for fn in decorated, invertible:
        assert pickle.loads(pickle.dumps(fn)) is fn
        assert copy.deepcopy(fn) is fn
    layer = nn.Linear(WIDTH, WIDTH)
    other = pickle.loads(pickle.dumps(inv.checkpoint(layer)))
    assert_close(other(torch.ones(2, WIDTH)), layer(torch.ones(2, WIDTH)))
    assert repr(other) == "checkpoint(Linear)" and other.__wrapped__ is not layer


def test_a_graph_outlives_its_op() -> None:
    net, x = Net(), leaf(3, 2 * WIDTH)
    expected = torch.autograd.grad(loss(net.op(x)), x)
    out = inv.checkpoint(copy.deepcopy(net.op))(x)
    del net
    assert_close(torch.autograd.grad(loss(out), x), expected)
