"""Donation: the input's storage is free between forward and backward, and nobody can read it meanwhile."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import WIDTH, assert_close, parameters
from torch import Tensor, nn

import invfunc as inv
from invfunc.engine.donation import Donated
from invfunc.errors import DonatedError, OptionError
from invfunc.look.memory import measure


class Net:
    """A stem that makes the tensor to be donated, and a pipeline that takes it."""

    def __init__(self, maker: Callable[[Tensor], Tensor] = torch.relu) -> None:
        self.stem, self.f, self.g = nn.Linear(3, 2 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.op = inv.chain(inv.split(2), inv.couple(self.f, self.g), inv.couple(torch.sin), inv.concat(2))
        self.maker = maker
        self.data = torch.randn(5, 3)

    def made(self) -> Tensor:
        return self.maker(self.stem(self.data))

    @property
    def parameters(self) -> list[Tensor]:
        return parameters(self.stem, self.f, self.g)

    def gradients(self, y: Tensor, **options: Any) -> Any:
        return torch.autograd.grad(y.pow(2).sum(), self.parameters, **options)


def donating(op: inv.Invertible, which: Any = True) -> inv.Invertible:
    return inv.checkpoint(op, donate=which)


# ---- what it does --------------------------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu module": nn.ReLU(),
    "relu in place": lambda x: (x * 1).relu_(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(-1),
    "linear": lambda x: x * 1,
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "layer norm": lambda x: nn.functional.layer_norm(x, (2 * WIDTH,)),
    "cat": lambda x: torch.cat([x[:2], x[2:]]),
    "checkpoint": lambda x: inv.checkpoint(torch.tanh)(x),
    "lowered": lambda x: inv.checkpoint(inv.pair(torch.sinh, torch.asinh))(x) + 0,
}


@pytest.mark.parametrize("name", MAKERS)
def test_whatever_made_the_tensor_its_gradients_are_those_of_plain_training(name: str) -> None:
    net = Net(MAKERS[name])
    found = []
    for fn in net.op, donating(net.op):
        torch.manual_seed(1)
        found.append(net.gradients(fn(net.made())))
    assert_close(*found)


def test_the_storage_is_empty_after_forward_and_filled_again_by_backward() -> None:
    net = Net()
    x = net.made()
    expected, storage, version, shape = x.detach().clone(), x.untyped_storage(), x._version, x.shape
    grad_fn, number = x.grad_fn, id(x)
    y = donating(net.op)(x)
    assert storage.nbytes() == 0
    assert type(x) is Donated
    net.gradients(y)
    assert type(x) is Tensor
    assert storage.nbytes() == expected.nbytes
    assert x.untyped_storage().data_ptr() == storage.data_ptr()
    assert (x._version, x.shape, x.grad_fn, id(x)) == (version, shape, grad_fn, number)
    assert_close(x.detach(), expected)


@pytest.mark.parametrize("make", [lambda: torch.randn(5, 2 * WIDTH), lambda: torch.randn(2 * WIDTH, 5).T.contiguous()])
def test_data_may_be_donated(make: Callable[[], Tensor]) -> None:
    net, x = Net(), make()
    expected = x.clone()
    parameters = [*net.f.parameters(), *net.g.parameters()]
    wanted = torch.autograd.grad(net.op(x).pow(2).sum(), parameters)
    y = donating(net.op)(x)
    assert type(x) is Donated
    assert_close(torch.autograd.grad(y.pow(2).sum(), parameters), wanted)
    y = donating(net.op)(expected.clone())
    y.pow(2).sum().backward()
    y = donating(net.op)(x := expected.clone())
    y.pow(2).sum().backward()
    assert type(x) is Tensor
    assert_close(x, expected)
    assert not x.requires_grad and x.grad is None


def test_it_saves_one_activation() -> None:
    w = nn.Linear(1000, 1000)
    op = inv.pair(lambda x: x * 2, lambda y: y / 2)
    data = torch.ones(1, 1000)

    def step(fn: Callable[[Tensor], Tensor]) -> Tensor:
        return fn(w(data))

    held = [measure(step, fn).held_bytes for fn in (op, inv.checkpoint(op), donating(op))]
    assert held == [8000, 8000, 8000]  # nobody else keeps the input here
    kept: list[Tensor] = []

    def keeping(fn: Callable[[Tensor], Tensor]) -> Tensor:
        kept[:] = [w(data)]
        return fn(kept[0])

    assert [measure(keeping, fn).held_bytes for fn in (inv.checkpoint(op), donating(op))] == [16000, 8000]


def test_two_backwards() -> None:
    net = Net()
    expected = net.gradients(net.op(net.made()))
    x = net.made()
    y = donating(net.op)(x)
    for _ in range(2):
        assert_close(net.gradients(y, retain_graph=True), expected)
    assert type(x) is Tensor


def test_double_backward() -> None:
    net, found = Net(torch.tanh), []
    for fn in net.op, donating(net.op):
        once = net.gradients(fn(net.made()), create_graph=True)
        found.append(torch.autograd.grad(sum(g.pow(2).sum() for g in once), net.parameters))
    assert_close(*found)


def test_the_tensor_may_be_read_again_after_backward() -> None:
    net = Net()
    x, plain = net.made(), net.made()
    seen: list[Tensor] = []
    x.register_hook(seen.append)
    donating(net.op)(x).pow(2).sum().backward()
    plain.register_hook(seen.append)
    net.op(plain).pow(2).sum().backward()
    assert len(seen) == 2
    assert_close(*seen)
    assert_close(x + 1, plain + 1)


def test_several_inputs_and_places() -> None:
    f = nn.Linear(WIDTH, WIDTH)
    op = inv.couple(f, f)
    for which, empty in [(True, [True, True]), ((0,), [True, False]), ([1], [False, True]), ((0, 1), [True, True])]:
        a, b = torch.randn(2, WIDTH).requires_grad_(), torch.randn(2, WIDTH).requires_grad_()
        xs = a.tanh(), b.tanh()
        values = [x.detach().clone() for x in xs]
        expected = torch.autograd.grad(sum(y.pow(2).sum() for y in op(a.tanh(), b.tanh())), [a, b, *f.parameters()])
        ys = donating(op, which)(*xs)
        assert [type(x) is Donated for x in xs] == empty
        assert_close(torch.autograd.grad(sum(y.pow(2).sum() for y in ys), [a, b, *f.parameters()]), expected)
        assert_close([x.detach() for x in xs], values)


def test_other_leaves_ride_along() -> None:
    op = inv.parallel(inv.pair(torch.sinh, torch.asinh), inv.chain())
    x, i = torch.randn(3).requires_grad_() * 2, torch.tensor([1, 2])
    y, j = donating(op)(x, i)
    assert type(x) is Donated and type(i) is Tensor and torch.equal(i, j)
    y.sum().backward()
    assert type(x) is Tensor


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_freed_without_gradients(context: Callable[[], Any]) -> None:
    net = Net()
    x = net.made()
    with context():
        y = donating(net.op)(x)
    assert type(x) is Tensor and x.untyped_storage().nbytes() == x.nbytes
    assert_close(y, net.op(x).detach())
    op, data = inv.pair(torch.sinh, torch.asinh), torch.randn(3)
    assert_close(donating(op)(data), torch.sinh(data))  # nothing requires grad
    assert type(data) is Tensor and data.untyped_storage().nbytes() == data.nbytes


@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_nothing_is_freed_in_a_mode_that_does_not_rebuild(mode: str) -> None:
    net = Net()
    x = net.made()
    with inv.mode(mode):
        y = donating(net.op)(x)
    assert type(x) is Tensor
    assert_close(net.gradients(y), net.gradients(net.op(net.made())))
    with inv.mode("invert"):
        donating(net.op)(x := net.made())
    assert type(x) is Donated


def test_a_failing_pipeline_frees_nothing() -> None:
    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    x = Net().made()
    with pytest.raises(ZeroDivisionError):
        donating(inv.chain(inv.split(2), inv.couple(fail)))(x)
    assert type(x) is Tensor and x.untyped_storage().nbytes() == x.nbytes


def test_the_first_call_of_a_lazy_module_frees_nothing_and_the_next_one_does() -> None:
    net = Net()
    net.f = nn.LazyLinear(WIDTH)
    net.op = inv.chain(inv.split(2), inv.couple(net.f, net.g), inv.concat(2))
    for freed in False, True:
        x = net.made()
        y = donating(net.op)(x)
        assert (type(x) is Donated) == freed
        assert_close(net.gradients(y), net.gradients(net.op(net.made())))


def test_an_empty_batch_is_donated() -> None:
    net = Net()
    net.data = net.data[:0]
    assert_close(net.gradients(donating(net.op)(net.made())), net.gradients(net.op(net.made())))


def test_nobody_is_kept_alive_when_backward_never_comes() -> None:
    net = Net()
    x = net.made()
    assert measure(lambda: [donating(net.op)(x)].clear()).held_bytes == -5 * 2 * WIDTH * 8
    with pytest.raises(DonatedError):
        x.sum()


# ---- what it refuses -----------------------------------------------------------------------------------------------------


def _viewed(x: Tensor) -> tuple[Tensor, Any]:
    return x, x[:, :2]


def _saved_by(op: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Any]]:
    return lambda x: (x, op(x))


REFUSED: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Any]], str]] = {
    "leaf": (
        lambda x: (x.detach().clone().requires_grad_(), None),
        "it is a leaf that requires grad, which its owner will",
    ),
    "parameter": (lambda x: (nn.Parameter(x.detach().clone()), None), "it is a leaf that requires grad"),
    "frozen parameter": (
        lambda x: (nn.Parameter(x.detach().clone(), False), None),
        "it is a Parameter of torch.float64",
    ),
    "view": (lambda x: (x.view(5, -1), None), "it is a view, does not fill its storage, or lies in memory that is not"),
    "slice": (lambda x: (torch.randn(6, 2 * WIDTH)[:5], None), "it is a view"),
    "expanded": (lambda x: (torch.randn(2 * WIDTH).expand(5, -1), None), "it is a view"),
    "large storage": (
        lambda x: (torch.empty(0).set_(torch.randn(99).untyped_storage(), 0, (5, 8)), None),
        "does not fill",
    ),
    "numpy": (lambda x: (y := x.detach().clone(), y.numpy()), "or lies in memory that is not torch's own"),
    "from numpy": (lambda x: (torch.from_numpy(x.detach().clone().numpy()), None), "memory that is not torch's own"),
    "a view of it": (_viewed, "1 other tensors share its storage"),
    "an alias of it": (lambda x: (x, x.detach()), "1 other tensors share its storage"),
    "two aliases": (lambda x: (x, (x.data, x.detach())), "2 other tensors share its storage"),
    "saved by mul": (_saved_by(lambda x: x * torch.ones(2 * WIDTH, requires_grad=True)), "an operation has saved it"),
    "saved by pow": (_saved_by(lambda x: x.pow(2)), "an operation has saved it for backward, or a view of it is alive"),
    "saved by linear": (
        _saved_by(lambda x: nn.functional.linear(x, torch.ones(1, 8, requires_grad=True))),
        "has saved it",
    ),
    "saved by a Function": (_saved_by(lambda x: Saving.apply(x)), "an operation has saved it"),
    "its gradient is retained": (lambda x: (x, x.retain_grad()), "its gradient is to be retained"),
    "saved twice": (_saved_by(lambda x: x * x), "an operation has saved it"),
}


class Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].sign()


@pytest.mark.parametrize("name", REFUSED)
def test_a_tensor_that_can_not_be_freed_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    net = Net()
    x, other = make(net.made())
    with pytest.raises(DonatedError, match=r"donate: input 0 can not be freed: .*" + reason) as error:
        donating(net.op)(x)
    assert str(error.value).endswith("; leave it out of donate=...")
    assert type(x) is not Donated and x.untyped_storage().nbytes() > 0
    del other


def test_what_is_not_there_is_refused() -> None:
    f = nn.Linear(WIDTH, WIDTH)
    xs = torch.randn(2, WIDTH) * 1, torch.randn(2, WIDTH) * 1
    for place in 2, -1:
        with pytest.raises(DonatedError, match=f"input {place} can not be freed: there is no tensor at this place"):
            donating(inv.couple(f), [place])(*xs)
    with pytest.raises(DonatedError, match="input 1 can not be freed: it is there twice"):
        donating(inv.couple(f))(xs[0], xs[0])
    with pytest.raises(DonatedError, match="input 1 can not be freed: it is a Tensor of torch.int64, not a plain"):
        donating(inv.parallel(f, inv.chain()), [1])(xs[0], torch.tensor([1, 2]))


def test_a_tensor_may_be_donated_once() -> None:
    net = Net()
    x = net.made()
    donating(net.op)(x)
    with pytest.raises(DonatedError, match="a donated tensor was read"):
        donating(net.op)(x)


def test_transforms_are_refused() -> None:
    net = Net()
    with pytest.raises(DonatedError, match="a torch.func transform is active"):
        torch.func.vmap(lambda x: donating(inv.couple(net.f, net.g))(x, x * 2))(torch.randn(2, 3, WIDTH))
    with pytest.raises(DonatedError, match="a torch.func transform is active"):
        torch.func.grad(lambda x: donating(inv.pair(torch.sinh, torch.asinh))(x * 1).sum())(torch.randn(3))


def test_an_output_that_is_a_view_of_the_input_is_refused() -> None:
    for op in inv.split(2), inv.chain(), inv.couple(nn.Linear(WIDTH, WIDTH)):
        xs = [torch.randn(2, WIDTH).requires_grad_() * 1 for _ in range(2 if "couple" in repr(op) else 1)]
        with pytest.raises(DonatedError, match="donate: the output is a view of the input; leave donate=False"):
            donating(op)(*xs)
        assert all(type(x) is Tensor for x in xs)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: donating(inv.chain(inv.mark(net.op, "store"))),
        lambda net: donating(inv.chain(inv.mark(net.op, "recompute"))),
        lambda net: donating(inv.chain(torch.sinh, net.op)),
        lambda net: inv.checkpoint(net.op, donate=True, cuts=(1,)),
        lambda net: donating(inv.chain(inv.pair(lambda x: (x * 2, x), lambda r, y: y / 2, residue=True), net.op)),
    ],
    ids=["store", "recompute", "one way", "cut", "residue"],
)
def test_a_pipeline_that_keeps_its_input_is_refused(make: Callable[[Net], inv.Invertible]) -> None:
    net = Net()
    x = net.made()
    with pytest.raises(
        DonatedError, match="donate: the pipeline itself keeps the input, expected one that begins with"
    ):
        make(net)(x)
    assert type(x) is Tensor and x.untyped_storage().nbytes() == x.nbytes


def test_a_pipeline_that_closes_over_its_input_is_refused() -> None:
    x = torch.randn(3, requires_grad=True) * 2
    y = x * 1
    with pytest.raises(DonatedError, match="the pipeline itself keeps the input"):
        donating(inv.pair(lambda z: z + y.sin(), lambda z: z - y.sin()))(y)


def test_donation_belongs_to_the_mode_that_rebuilds() -> None:
    for mode in "store", "recompute":
        with pytest.raises(OptionError, match="donate=True with mode='.*', expected mode 'invert': only it rebuilds"):
            inv.checkpoint(inv.swap(), donate=True, mode=mode)


def test_the_maker_reached_before_the_tensor_is_back_raises() -> None:
    net = Net()
    x = net.made()
    early = x + 1  # saves nothing, but leads to the ReLU, which saved the tensor
    y = donating(net.op)(x)
    with pytest.raises(DonatedError, match="a donated tensor was read"):
        early.sum().backward(retain_graph=True)
    net.gradients(y, retain_graph=True)
    early.sum().backward()


# ---- reading what is empty ---------------------------------------------------------------------------------------------

READS = """
x + 1                                          1 + x
x @ torch.ones(8, 1)                           -x
x[0]                                           x[:, 1:2]
x.sum()                                        x.exp_()
format(x.sum())                                x.tolist()
x.data                                         x.detach()
x.numpy()                                      x.detach().numpy()
np.asarray(x)                                  np.array(x) + 1
x.data_ptr()                                   x.cumsum(0)
x.storage_offset()                             x.share_memory_()
x.to(torch.float32)                            x.cpu()
x.clone()                                      copy.deepcopy(x)
copy.copy(x) + 1                               pickle.dumps(x)
torch.save(x, io.BytesIO())                    torch.cat([x, x])
torch.stack([x])                               F.linear(x, torch.ones(2, 8))
nn.Linear(8, 8)(x)                             torch.equal(x, x)
torch.tensor(x)                                torch.as_tensor(x, dtype=torch.float64)
torch.as_tensor(x) + 1                         torch.ones(5, 8).copy_(x)
torch.add(torch.ones(5, 8), 1, out=x)          torch.ones(5, 8).__setitem__(0, x[0])
torch.ones(8).__setitem__(slice(None), x)      setattr(torch.ones(5, 8), "data", x)
torch.Tensor._make_subclass(torch.Tensor, x).sum()    nn.Parameter(x).sum()
torch.utils.dlpack.to_dlpack(x)                torch.from_dlpack(x)
torch._C._nn.gelu(x)                           torch.ops.aten.add(x, 1)
torch.ops.aten.add.Tensor(x, 1)                torch._foreach_add([x], 1)
torch.func.vmap(lambda r: r + 1)(x)            torch.func.grad(lambda a: (a * a).sum())(x)
torch.func.jvp(torch.sin, (torch.ones(5, 8),), (x,))    Doubled.apply(x)
x.backward(torch.ones(5, 8))                   y.backward(x)
torch.autograd.forward_ad.make_dual(x, x)      inv.checkpoint(op)(x)
inv.checkpoint(torch.sin)(x)                   inv.couple(torch.sin)(x, x)
torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)    [x.add(1) for x in [x]]
float(x.sum())                                 len(x)
iter(x).__next__()                             x.unbind()
torch.jit.trace(torch.sin, (x,))               torch.utils.data.TensorDataset(x)[0]
unguarded(lambda: x + 1)                       unguarded(lambda: torch.cat([x, x]).sum())
unguarded(lambda: x.detach().sum())            unguarded(lambda: x.numpy())
"""

SCRIPT = """
import copy, io, pickle, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint, torch.utils.dlpack, torch.utils.data
from torch import nn
import invfunc as inv

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 2
    @staticmethod
    def backward(ctx, g): return g * 2

def unguarded(read):
    with torch._C.DisableTorchFunctionSubclass():
        return read()

f = nn.Linear(4, 4)
op = inv.chain(inv.split(2), inv.couple(f), inv.concat(2))
for source in sys.stdin.read().splitlines():
    for made in (torch.relu(nn.Linear(3, 8)(torch.randn(5, 3))), torch.randn(5, 8)):
        x = made
        del made
        expected = x.detach().clone()
        y = inv.checkpoint(op, donate=True)(x)
        print(source, end="", flush=True)
        out, sys.stdout = sys.stdout, io.StringIO()
        try:
            eval(source)
            outcome = "nothing was raised"
        except Exception as error:
            outcome = "raised " + type(error).__name__
        sys.stdout = out
        print(" -> " + outcome, flush=True)
        y.sum().backward()
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6, msg=source)  # rebuilt in fp32
print("done")
"""


def test_no_use_of_a_donated_tensor_ends_in_a_signal() -> None:
    sources = [part.strip() for line in READS.splitlines() for part in line.split("    ") if part.strip()]
    assert len(sources) > 65
    run = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(run, input="\n".join(sources), capture_output=True, text=True, timeout=300)
    outcomes = [line.split(" -> ") for line in result.stdout.splitlines()]
    assert result.returncode == 0, (outcomes[-1:], result.stderr[-2000:])
    assert outcomes[-1] == ["done"]
    assert [source for source, *rest in outcomes[:-1] if not rest[0].startswith("raised ")] == []
    assert len(outcomes) == 2 * len(sources) + 1


@pytest.mark.parametrize("read", [lambda x: x + 1, lambda x: x.shape, torch.Tensor.tolist, lambda x: torch.cat([x])])
def test_reading_a_donated_tensor_says_so(read: Callable[[Tensor], Any]) -> None:
    net = Net()
    x = net.made()
    donating(net.op)(x)
    message = (
        "a donated tensor was read, expected that nobody reads it between forward and backward; "
        "use it before the call, keep x.clone(), or leave donate=False"
    )
    with pytest.raises(DonatedError) as error:
        read(x)
    assert str(error.value) == message


def test_a_donated_tensor_is_described() -> None:
    net = Net()
    x = net.made()
    donating(net.op)(x)
    text = "<donated tensor of shape (5, 8), float64: empty until backward rebuilds it>"
    assert [repr(x), str(x), f"{x}", f"{x!r}", format(x), f"{x:.2f}"] == [text] * 6
    assert f"{x:>80}" == text.rjust(80)
    assert repr([x]) == f"[{text}]"
