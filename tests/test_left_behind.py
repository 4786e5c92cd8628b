"""What a function leaves elsewhere than in its result is there once, as in plain autograd, and holds no graph for long."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import WIDTH, assert_close, leaf
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import invfunc as inv
from invfunc.engine.snapshot import Snapshot
from invfunc.errors import ReplayError

# ---- auxiliary losses, wherever they are put -------------------------------------------------------------------------

Left = tuple[Callable[[Tensor], Tensor], nn.Module, Callable[[], Tensor]]  # a function, its module, and what takes


class Leaves(nn.Module):
    """Leaves an auxiliary loss with ``put(module, loss)``."""

    def __init__(self, put: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.put = nn.Linear(WIDTH, WIDTH), put
        self.aux: Any = None
        self.listed, self.named, self.nested = list[Tensor](), dict[str, Tensor](), {"losses": list[Any]()}

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.net(x))
        self.put(self, y.square().mean())
        return y.sin()


def of_module(put: Callable[[Any, Tensor], Any], take: Callable[[Any], Tensor]) -> Callable[[], Left]:
    def make() -> Left:
        module = Leaves(put)
        return module, module, lambda: take(module)

    return make


def in_closure() -> Left:
    net, found = nn.Linear(WIDTH, WIDTH), list[Tensor]()

    def f(x: Tensor) -> Tensor:
        y = torch.tanh(net(x))
        found.append(y.square().mean())
        return y.sin()

    return f, net, lambda: sum_of(found)


def in_cell() -> Left:
    net, total = nn.Linear(WIDTH, WIDTH), torch.zeros(())

    def f(x: Tensor) -> Tensor:
        nonlocal total
        y = torch.tanh(net(x))
        total = total + y.square().mean()
        return y.sin()

    def take() -> Tensor:
        nonlocal total
        found, total = total, torch.zeros(())
        return found

    return f, net, take


def sum_of(losses: list[Any]) -> Tensor:
    found = torch.stack([loss[1] if isinstance(loss, tuple) else loss for loss in losses]).sum()
    losses.clear()
    return found


def given_up(module: Any) -> Tensor:
    found, module.aux = module.aux, None
    return found


def added(module: Any, loss: Tensor) -> None:
    module.aux = loss if module.aux is None else module.aux + loss


LEFT: dict[str, Callable[[], Left]] = {
    "attribute": of_module(lambda m, t: setattr(m, "aux", t), given_up),
    "sum": of_module(added, given_up),
    "tuple": of_module(lambda m, t: setattr(m, "aux", (t, t)), lambda m: given_up(m)[0]),
    "new dict": of_module(lambda m, t: setattr(m, "aux", {"loss": t}), lambda m: given_up(m)["loss"]),
    "list": of_module(lambda m, t: m.listed.append(t), lambda m: sum_of(m.listed)),
    "list of pairs": of_module(lambda m, t: m.listed.append(("loss", t)), lambda m: sum_of(m.listed)),
    "dict": of_module(lambda m, t: m.named.update(loss=t), lambda m: m.named.pop("loss")),
    "list in a dict": of_module(lambda m, t: m.nested["losses"].append(t), lambda m: sum_of(m.nested["losses"])),
    "list in a closure": in_closure,
    "cell of a closure": in_cell,
}


def pipeline(f: Callable[..., Tensor]) -> inv.Invertible:
    return inv.chain(inv.split(2), inv.couple(f), inv.swap(), inv.couple(torch.tanh), inv.concat(2))


def two_steps(lower: Callable[[Any], Any], make: Callable[[], Left]) -> list[Any]:
    """Values and gradients of two steps of one function, whose auxiliary loss is taken in each."""
    torch.manual_seed(0)
    f, module, take = make()
    fast, found = lower(f), []
    for seed in range(2):
        x = torch.randn(3, 2 * WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        y = fast(x)
        aux = take()
        (y.sin().sum() + 3 * aux).backward()
        found += [y.detach(), aux.detach(), x.grad, *(p.grad for p in module.parameters())]
        module.zero_grad()
    return found


@pytest.mark.parametrize("mode", ["invert", "recompute"])
@pytest.mark.parametrize("name", LEFT)
def test_an_auxiliary_loss_is_left_once(name: str, mode: str) -> None:
    found = two_steps(lambda f: inv.checkpoint(pipeline(f), mode=mode), LEFT[name])
    assert_close(found, two_steps(pipeline, LEFT[name]))


def of_half(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x: f(x[:, :WIDTH])


@pytest.mark.parametrize("name", LEFT)
def test_a_plain_function_leaves_its_loss_once(name: str) -> None:
    def halved(lower: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda f: of_half(lower(f))

    assert_close(two_steps(halved(inv.checkpoint), LEFT[name]), two_steps(halved(lambda f: f), LEFT[name]))


# ---- nothing stays alive ---------------------------------------------------------------------------------------------


def snapshots() -> int:
    """How many calls are remembered."""
    gc.collect()
    return sum(type(item) is Snapshot for item in gc.get_objects())


@pytest.mark.parametrize("is_buffer", [False, True], ids=["attribute", "buffer"])
@pytest.mark.parametrize("lower", [inv.checkpoint, lambda f: inv.checkpoint(inv.one_way(f), mode="recompute")])
def test_a_loss_that_nobody_takes_holds_one_graph_at_most(lower: Callable[[Any], Any], is_buffer: bool) -> None:
    module = Leaves(lambda m, t: setattr(m, "aux", t))
    if is_buffer:
        del module.aux
        module.register_buffer("aux", torch.zeros(()))
    fast, before = lower(module), snapshots()
    for _ in range(4):
        fast(leaf(3, WIDTH)).sum().backward()
    assert snapshots() <= before + 1


def test_what_is_left_in_a_dropped_graph_is_freed(no_gc: None) -> None:
    module, outputs = Leaves(lambda m, t: setattr(m, "aux", t)), []
    module.register_forward_hook(lambda m, xs, y: outputs.append(weakref.ref(y)))
    op = inv.chain(inv.split(2), inv.couple(torch.tanh), inv.mark(inv.couple(module), "store"), inv.concat(2))
    y = inv.checkpoint(op)(leaf(3, 2 * WIDTH))
    module.aux = None
    del y
    assert outputs[0]() is None


def test_a_first_call_of_a_lazy_module_is_freed(no_gc: None) -> None:
    net, outputs = nn.Sequential(nn.LazyLinear(WIDTH), nn.LazyBatchNorm1d(), nn.Tanh()), []
    net.register_forward_hook(lambda m, xs, y: outputs.append(weakref.ref(y)))
    y = inv.checkpoint(pipeline(net), mode="recompute")(leaf(3, 2 * WIDTH))
    y.sum().backward()
    del y
    assert outputs[0]() is None
    assert all([p.grad is not None for p in net.parameters()])


def test_a_first_call_of_a_lazy_module_below_a_transform_is_refused() -> None:
    net = nn.LazyLinear(WIDTH)
    with pytest.raises(ReplayError) as error:
        torch.func.jacrev(inv.checkpoint(inv.couple(net)))(torch.randn(3, WIDTH), torch.randn(3, WIDTH))
    assert str(error.value) == (
        "couple(LazyLinear) has a lazy module that has not run yet, expected parameters, below a torch.func transform; "
        "call it once before"
    )


def test_recurrent_weights_stay_those_of_the_call() -> None:
    cell = nn.LSTM(WIDTH, WIDTH)
    op = inv.chain(inv.split(2), *[inv.couple(lambda x: cell(x)[0]), inv.swap()] * 2, inv.concat(2))
    leaves = [p.detach().clone().requires_grad_() for p in cell.parameters()]
    x = leaf(3, 2 * WIDTH)

    def gradients(fn: Callable[[Tensor], Tensor]) -> Any:
        named = dict(zip(dict(cell.named_parameters()), [0.9 * t for t in leaves], strict=True))
        holder = nn.Module()
        holder.cell, holder.forward = cell, fn
        y = torch.func.functional_call(holder, {f"cell.{name}": t for name, t in named.items()}, (x,))
        with torch.no_grad():
            cell(torch.randn(3, WIDTH))
        return torch.autograd.grad(y.sin().sum(), [x, *leaves])

    assert_close(gradients(inv.checkpoint(op)), gradients(op))


# ---- what is kept is looked at when it comes back --------------------------------------------------------------------


def test_an_input_that_is_written_after_a_lazy_call() -> None:
    x = leaf(3, WIDTH) * 1
    y = inv.checkpoint(nn.Sequential(nn.LazyLinear(WIDTH), nn.Dropout(0.5)))(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(ReplayError, match=r"tensor of shape \(3, \d\) that backward needs has been modified"):
        y.sum().backward()


@pytest.mark.parametrize("hooks", [save_on_cpu, lambda: saved_tensors_hooks(lambda t: t, lambda t: t)])
@pytest.mark.parametrize("mode", ["invert", "recompute"])
def test_hooks_that_keep_the_tensor_itself_hide_no_write(mode: str, hooks: Callable[[], Any]) -> None:
    x = leaf(3, 2 * WIDTH) * 1
    with hooks():
        y = inv.checkpoint(pipeline(nn.Linear(WIDTH, WIDTH)), mode=mode)(x)
    z = y * 1
    with torch.no_grad():
        (y if mode == "invert" else x).add_(1)
    with pytest.raises(ReplayError, match="has been modified by an inplace operation"):
        z.sum().backward()


def test_hooks_that_copy_are_taken_at_their_word() -> None:
    x, op = leaf(3, 2 * WIDTH), pipeline(nn.Linear(WIDTH, WIDTH))
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = inv.checkpoint(op)(x)
    found = torch.autograd.grad(y.mul_(2).sum(), x)
    assert_close(found, torch.autograd.grad((2 * op(x)).sum(), x))


def test_a_gradient_inside_of_what_was_written_is_refused_as_by_autograd() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.exp()
        loss = y.sum()
        with torch.no_grad():
            y.add_(1)
        return torch.autograd.grad(loss, x)[0]

    for call, kind in (f, RuntimeError), (inv.checkpoint(f), ReplayError):
        with pytest.raises(kind, match="modified by an inplace operation"):
            call(leaf(3, WIDTH))


# ---- a leaf that a function makes for itself -------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["input", "result"])
def test_a_gradient_by_backward_inside_of_a_coupling(of: str) -> None:
    net, w = nn.Linear(WIDTH, WIDTH), leaf(WIDTH)

    def f(x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = (x if of == "input" else net(x)).detach().requires_grad_()
            net(z).square().sum().backward(inputs=[z])
            assert z.grad is not None
            return torch.tanh(x) * z.grad * w

    def gradients(lower: Callable[[Any], Any]) -> Any:
        x = torch.linspace(-1, 1, 6 * WIDTH).reshape(3, -1).requires_grad_()
        op = lower(inv.chain(inv.split(2), inv.couple(f), inv.swap(), inv.couple(f), inv.concat(2)))
        return torch.autograd.grad(op(x).sin().sum(), [x, w])

    assert_close(gradients(inv.checkpoint), gradients(lambda op: op))
