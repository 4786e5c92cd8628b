"""MemCNN's surface, with its semantics, and one test for each of its 21 defects that the peers' study lists."""

import copy
import gc
import pickle
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn

import invfunc as inv
from invfunc.compat import memcnn
from invfunc.errors import DonatedError, NotInvertibleError, OptionError, WireError
from invfunc.look.memory import measure


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def is_free(x: Tensor) -> bool:
    try:
        x + 1
    except DonatedError:
        return True
    return False


def net(channels: int = 2, out: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out or channels, 3, padding=1), nn.Tanh())


def coupling(kind: str = "additive", **options) -> nn.Module:
    return memcnn.create_coupling(net(), net(), kind, adapter=memcnn.AffineAdapterNaive, **options)


def wrapped(kind: str = "additive", **options) -> memcnn.InvertibleModuleWrapper:
    return memcnn.InvertibleModuleWrapper(coupling(kind), **options)


def images() -> tuple[Tensor, Tensor]:
    """A leaf that requires grad, and a tensor made from it, which may be donated."""
    leaf = torch.randn(2, 4, 3, 3, requires_grad=True)
    return leaf, leaf * 1


def disabled(module: nn.Module) -> nn.Module:
    """The same module with every wrapper switched off: plain autograd."""
    plain = copy.deepcopy(module)
    for part in plain.modules():
        if isinstance(part, memcnn.InvertibleModuleWrapper):
            part.disable = True
    return plain


def step(module: nn.Module, x: Tensor, seed: int = 0) -> list[Tensor | None]:
    """One training step: the value, the gradients of input and parameters, the buffers, and the next random number."""
    torch.manual_seed(seed)
    leaf = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(leaf * 1)
    (y * torch.arange(1.0, 1 + y.numel()).view_as(y).cos()).sum().backward()
    return [y, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers(), torch.rand(1)]


def assert_trains_as_plain(module: nn.Module, x: Tensor) -> None:
    plain = disabled(module)
    for found, expected in zip(step(module, x), step(plain, x), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or close(found.double(), expected.double())


class Multiply(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.factor * x

    def inverse(self, y):
        return y / self.factor


# ---- semantics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["additive", "affine"])
@pytest.mark.parametrize("implementation", [-1, 0, 1])
def test_couplings_are_the_equations(kind, implementation):
    f, g = net(), net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = memcnn.create_coupling(f, g, kind, implementation, implementation, memcnn.AffineAdapterNaive)
    leaf, x = images()
    x1, x2 = leaf.chunk(2, 1)
    if kind == "additive":
        y1 = x1 + f(x2)
        y2 = x2 + g(y1)
    else:
        y1 = x1 * f(x2).exp() + f(x2)
        y2 = x2 * g(y1).exp() + g(y1)
    expected = torch.cat([y1, y2], 1)
    assert close(module(x), expected)
    parameters = list(module.parameters())
    found = torch.autograd.grad(module(x).cos().sum(), [leaf, *parameters])
    assert all(map(close, found, torch.autograd.grad(expected.cos().sum(), [leaf, *parameters])))
    y = module(x).detach().requires_grad_()
    back = module.inverse(y)
    assert close(back, x)
    found = torch.autograd.grad(back.cos().sum(), [y, *parameters])
    plain = module.build_inverse()(y)
    assert all(map(close, found, torch.autograd.grad(plain.cos().sum(), [y, *parameters])))


def test_gm_is_a_copy_of_fm_unless_it_is_given():
    f = net()
    module = memcnn.AdditiveCoupling(f)
    assert module.Fm is f and module.Gm is not f and torch.equal(module.Gm[0].weight, f[0].weight)
    assert memcnn.AdditiveCoupling(f, f).Gm is f
    assert [name for name, _ in module.named_children()] == ["Gm", "Fm"]  # as in MemCNN, for optimizers' states


def test_state_dicts_are_memcnns():
    module = memcnn.InvertibleModuleWrapper(memcnn.AffineCoupling(nn.Linear(2, 2), adapter=memcnn.AffineAdapterNaive))
    assert list(module.state_dict()) == ["_fn.Gm.f.weight", "_fn.Gm.f.bias", "_fn.Fm.f.weight", "_fn.Fm.f.bias"]


def test_adapters():
    h = torch.randn(2, 4, 3)
    t = memcnn.AffineAdapterNaive(nn.Identity())(h)
    assert torch.equal(t[0], h.exp()) and torch.equal(t[1], h)
    s, t = memcnn.AffineAdapterSigmoid(nn.Identity())(h)
    assert torch.equal(s, torch.sigmoid(h[:, 1::2] + 2)) and torch.equal(t, h[:, 0::2])


@pytest.mark.parametrize("kind", ["additive", "affine"])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_wrapper_trains_as_plain_in_both_directions(kind, keep, backwards):
    module = wrapped(kind, keep_input=keep, keep_input_inverse=keep)
    if backwards:
        module.forward = module.inverse
    leaf, x = images()
    y = module(x)
    assert is_free(x) != keep
    found = torch.autograd.grad(y.cos().sum(), [leaf, *module.parameters()])
    assert close(x, leaf)
    op = module.build_inverse() if backwards else module.build()
    assert all(map(close, found, torch.autograd.grad(op(leaf).cos().sum(), [leaf, *module.parameters()])))


def test_keep_input_is_read_at_the_call_and_disable_too():
    module = wrapped()
    for attribute, expected in (("keep_input", False), ("disable", False)):
        setattr(module, attribute, True)
        _, x = images()
        module(x)
        assert is_free(x) is expected
        setattr(module, attribute, False)
    _, x = images()
    module(x)
    assert is_free(x)


def test_keep_input_needs_no_inverse():
    class OneWay(nn.Module):
        def forward(self, x):
            return x.relu()

    leaf, x = images()
    memcnn.InvertibleModuleWrapper(OneWay(), keep_input=True)(x).sum().backward()
    assert close(leaf.grad, (leaf > 0).double())
    with pytest.raises(NotInvertibleError) as caught:
        memcnn.InvertibleModuleWrapper(OneWay())(x)
    assert str(caught.value) == (
        "InvertibleModuleWrapper: OneWay has no inverse; give it a method inverse(self, *y), or pass keep_input=True"
    )


def test_several_tensors_in_and_out():
    class Split(nn.Module):
        def forward(self, x):
            return x[:, :1], x[:, 1:]

        def inverse(self, a, b):
            return torch.cat([a, b], 1)

    module, (leaf, x) = memcnn.InvertibleModuleWrapper(Split()), images()
    a, b = module(x)
    assert torch.equal(module.inverse(a, b), leaf)
    _, x = images()
    a, b = module(leaf * 1)
    a.cos().sum().backward()
    expected = torch.zeros_like(leaf)
    expected[:, :1] = -leaf[:, :1].detach().sin()
    assert close(leaf.grad, expected)


def test_a_tuple_of_one_is_unpacked():
    class One(Multiply):
        def forward(self, x):
            return (3 * x,)

        def inverse(self, y):
            return (y / 3,)

    leaf, x = images()
    module = memcnn.InvertibleModuleWrapper(One())
    y = module(x)
    y.sum().backward()
    assert close(leaf.grad, torch.full_like(leaf, 3)) and close(module.inverse(y.detach()), leaf)


def test_f_and_g_run_twice_a_step_whatever_the_implementation():
    for implementation in (-1, 0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = memcnn.InvertibleModuleWrapper(coupling(implementation_fwd=implementation))
        calls: list[int] = []
        for part in (module._fn.Fm, module._fn.Gm):
            part.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        module(images()[1]).sum().backward()
        assert len(calls) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_wrappers_copy(copied):
    module, x = wrapped("affine"), torch.randn(2, 4, 3, 3)
    twin = copied(module)
    assert torch.equal(twin(x * 1), module(x * 1))
    twin(x * 1).sum().backward()
    assert all(p.grad is None for p in module.parameters())


def test_legacy_names_warn_and_work():
    x = torch.randn(2, 4, 3, 3)
    with pytest.warns(DeprecationWarning, match="use InvertibleModuleWrapper"):
        block = memcnn.ReversibleBlock(net(), keep_input=True)
    assert isinstance(block, memcnn.InvertibleModuleWrapper) and close(block.inverse(block(x)), x)
    with pytest.warns(DeprecationWarning, match="use AdditiveCoupling"):
        block = memcnn.AdditiveBlock(net())
    assert close(block.inverse(block(x)), x)
    with pytest.warns(DeprecationWarning, match="use AffineCoupling"):
        memcnn.AffineBlock(net())
    with pytest.warns(DeprecationWarning, match="there is one implementation"):
        memcnn.AdditiveCoupling(net(), implementation_bwd=1)


def test_other_implementations_raise_when_they_are_called():
    x = torch.randn(2, 4, 3, 3)
    with pytest.warns(DeprecationWarning):
        fwd, bwd = coupling(implementation_fwd=-2), coupling(implementation_bwd=2)
    for call in (fwd, bwd.inverse, memcnn.InvertibleModuleWrapper(fwd), memcnn.InvertibleModuleWrapper(bwd).inverse):
        with pytest.raises(NotImplementedError, match="expected -1, 0 or 1, which are the same"):
            call(x)
    assert close(fwd.inverse(bwd(x)), fwd.inverse(bwd(x)))
    with pytest.raises(NotImplementedError, match="coupling 'unknown': expected 'additive' or 'affine'"):
        memcnn.create_coupling(net(), coupling="unknown")


# ---- is_invertible_module --------------------------------------------------------------------------------------------


def test_is_invertible_module():
    check = memcnn.is_invertible_module
    assert check(wrapped(), (1, 4, 3, 3), torch.float64) and check(coupling("affine"), (1, 4, 3, 3), torch.float64)
    assert check(coupling().float(), [1, 4, 3, 3])
    assert not check(nn.Conv2d(4, 4, 1), (1, 4, 3, 3)) and not check(memcnn.InvertibleModuleWrapper(nn.ReLU()), (3,))

    class Wrong(Multiply):
        def inverse(self, y):
            return y * self.factor

    class Projects(nn.Module):  # forward is undone, the inverse is not
        def forward(self, x):
            return torch.cat([x, x], 1)

        def inverse(self, y):
            return y[:, : y.shape[1] // 2]

    assert not check(Wrong(), (3,), torch.float64)
    assert check(Projects(), (3, 2))


def test_is_invertible_module_disturbs_nothing():
    module = memcnn.AdditiveCoupling(nn.BatchNorm2d(2))
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    assert memcnn.is_invertible_module(module, (3, 4, 5, 5), torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_is_invertible_module_warns_of_what_it_sees():
    class Twice(nn.Module):
        def forward(self, x):
            y = x * 1
            return y, y

        def inverse(self, y, _):
            return y * 1

    with pytest.warns(UserWarning, match="some outputs are the same tensor"):
        assert memcnn.is_invertible_module(Twice(), (3,))

    class Same(nn.Module):
        def forward(self, x):
            return x

        inverse = forward

    with pytest.warns(UserWarning, match="some outputs are inputs"):
        assert memcnn.is_invertible_module(Same(), (3,))

    class Zero(nn.Module):
        def forward(self, x):
            return 0 * x

        inverse = forward

    with pytest.warns(UserWarning, match="some outputs are all zeros"):
        assert not memcnn.is_invertible_module(Zero(), (3,))


@pytest.mark.parametrize("shape", ["string", (2.3, 1.4), None, True, ((1, 3), 12.4), ((1, 3), False)])
def test_is_invertible_module_refuses_what_is_no_shape(shape):
    with pytest.raises(ValueError, match="expected a tuple of ints, or a tuple of such tuples"):
        memcnn.is_invertible_module(Multiply(), shape)


# ---- one test for each defect of MemCNN (the peers' study, 2b) -------------------------------------------------------


def test_defect_1_a_leafs_gradient_is_not_doubled_nor_overwritten():
    module, (leaf, _) = wrapped(), images()
    leaf.grad = torch.ones_like(leaf)
    y = module(leaf)
    y.sum().backward()
    (expected,) = torch.autograd.grad(module.build()(leaf).sum(), leaf)
    assert close(leaf.grad, 1 + expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert y.grad is None


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("preserve", [False, True])
def test_defect_2_dropout_has_the_gradients_of_plain_training(keep, preserve):
    block = memcnn.AdditiveCoupling(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(0.5)))
    module = memcnn.InvertibleModuleWrapper(block, keep_input=keep, preserve_rng_state=preserve)
    assert_trains_as_plain(module, images()[0])


@pytest.mark.parametrize("kind", ["additive", "affine"])
@pytest.mark.parametrize("implementation", [0, 1])
def test_defect_3_the_deprecated_implementations_have_the_right_input_gradients(kind, implementation):
    with pytest.warns(DeprecationWarning):
        module = coupling(kind, implementation_fwd=implementation, implementation_bwd=implementation)
    for call, op in ((module, module.build()), (module.inverse, module.build_inverse())):
        leaf, x = images()
        (found,) = torch.autograd.grad(call(x).cos().sum(), leaf)
        assert close(found, torch.autograd.grad(op(leaf).cos().sum(), leaf)[0])


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_defect_4_nothing_is_freed_where_there_is_no_backward(switch):
    module, x = wrapped(), torch.randn(2, 4, 3, 3)
    with switch():
        module(x)
        module.inverse(x)
    module.eval().requires_grad_(False)
    module(x)
    assert not is_free(x)


READS = """
import torch
from torch import nn
from invfunc.errors import DonatedError
from invfunc.compat.memcnn import AdditiveCoupling, InvertibleModuleWrapper
class Same(nn.Module):
    def forward(self, x):
        return x
    inverse = forward
class Few(nn.Module):
    def forward(self, x):
        return 2 * x
    def inverse(self, y):
        return y[:1] / 2
f, same, few = InvertibleModuleWrapper(AdditiveCoupling(nn.Linear(2, 2))), InvertibleModuleWrapper(Same()), None
few = InvertibleModuleWrapper(Few())
def read(expression):
    big = torch.ones(4, 8, requires_grad=True) * 1
    x = torch.ones(4, 4, requires_grad=True) * 1
    try:
        print(type(eval(expression)).__name__)
    except Exception as error:
        print("DonatedError" if isinstance(error, DonatedError) else "RuntimeError")
for expression in {expressions}:
    read(expression)
"""


def test_defect_4_no_use_of_a_freed_input_ends_in_a_signal():
    expected = {
        "x + f(x)": "DonatedError",
        "f(x) + x": "DonatedError",
        "(f(x), repr(x))[1]": "DonatedError",
        "(f(x), x.numpy())": "DonatedError",
        "(f(x), x.tolist())": "DonatedError",
        "(f(big[:, :4]), big.sum())": "tuple",
        "x + same(x)": "DonatedError",
        "same(x).sum().backward()": "NoneType",
        "few(x).sum().backward()": "RuntimeError",
        "(f(x).sum().backward(), x + 1)": "tuple",
    }
    script = READS.replace("{expressions}", repr(list(expected)))
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert dict(zip(expected, ran.stdout.split(), strict=True)) == expected


@pytest.mark.parametrize(
    "before", [torch.relu, torch.sigmoid, nn.ELU(), nn.Dropout(0.5), nn.MaxPool2d(3, 1, 1), nn.Tanh()]
)
def test_defect_5_any_operation_may_come_before(before):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = wrapped()

        def forward(self, x):
            return self.block(before(x))

    assert_trains_as_plain(Net(), images()[0])


def test_defect_6_autograd_grad_backward_inputs_and_gradcheck():
    module = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(nn.Linear(2, 2)))
    x = torch.randn(2, 4, requires_grad=True)
    weight = module._fn.Fm.weight
    (found,) = torch.autograd.grad(module(x).sum(), weight)
    module(x).sum().backward(inputs=[weight])
    assert close(found, weight.grad) and x.grad is None
    assert torch.autograd.gradcheck(module, x) and torch.autograd.gradgradcheck(module, x)


def test_defect_7_backward_runs_as_often_as_it_is_asked_to():
    module, (leaf, x) = wrapped(num_bwd_passes=1), images()
    y = module(x)
    for _ in range(3):
        y.sum().backward(retain_graph=True)
    (expected,) = torch.autograd.grad(module.build()(leaf).sum(), leaf)
    assert close(leaf.grad, 3 * expected)


class Structured(nn.Module):
    """Takes and returns all that MemCNN would not."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, inputs, index, scale=1.0):
        a, b = inputs["ab"]
        return [a + scale * self.net(b)[index], {"b": b}], index

    def inverse(self, outputs, index, scale=1.0):
        y, rest = outputs
        return {"ab": (y - scale * self.net(rest["b"])[index], rest["b"])}, index


def test_defect_8_integers_numbers_keywords_lists_and_dicts():
    module = memcnn.InvertibleModuleWrapper(Structured())
    index, leaves = torch.tensor([1, 0]), [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    results = []
    for keep, off in ((False, False), (True, False), (False, True)):
        module.keep_input, module.disable = keep, off
        a, b = (leaf * 1 for leaf in leaves)
        (y, rest), same = module({"ab": (a, b)}, index, scale=0.5)
        assert same is index or torch.equal(same, index)
        results.append(torch.autograd.grad((y.cos() * rest["b"]).sum(), [*leaves, *module.parameters()]))
    assert all(map(close, results[0], results[2])) and all(map(close, results[1], results[2]))
    module.disable = False
    outputs, _ = module({"ab": tuple(leaves)}, index)
    back, _ = module.inverse(outputs, index)
    assert all(map(close, back["ab"], leaves))


def test_defect_9_unused_parameters():
    class Idle(Multiply):
        def __init__(self):
            super().__init__()
            self.idle = nn.Parameter(torch.ones(1))

    module, (leaf, x) = memcnn.InvertibleModuleWrapper(Idle()), images()
    module(x).sum().backward()
    assert module._fn.idle.grad is None and close(leaf.grad, torch.full_like(leaf, 3))


def test_defect_10_functional_call_gives_gradients_to_what_it_was_given():
    module, x = wrapped("affine"), images()[0].detach()
    given = {name: (p + 1).detach().requires_grad_() for name, p in module.named_parameters()}
    torch.func.functional_call(module, given, (x,)).cos().sum().backward()
    plain = disabled(module)
    plain.load_state_dict({k: v.detach() for k, v in given.items()})
    plain(x).cos().sum().backward()
    assert all(close(given[name].grad, p.grad) for name, p in plain.named_parameters())


def test_defect_11_an_output_may_be_a_view_of_the_input():
    class View(nn.Module):
        def forward(self, x):
            return x.flatten(1)

        def inverse(self, y):
            return y.unflatten(1, (4, 3, 3))

    module, (leaf, x) = memcnn.InvertibleModuleWrapper(View()), images()
    y = module(x)
    assert is_free(x) and torch.equal(y, leaf.flatten(1))
    y.cos().sum().backward()
    assert close(leaf.grad, -leaf.sin()) and torch.equal(x, leaf)


@pytest.mark.parametrize("keep", [False, True])
def test_defect_12_statistics_move_once_a_step(keep):
    block = memcnn.AdditiveCoupling(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    module = memcnn.InvertibleModuleWrapper(block, keep_input=keep)
    assert_trains_as_plain(module, images()[0])
    assert module._fn.Fm[1].num_batches_tracked == 1


def test_defect_13_what_was_changed_before_backward_raises():
    module, (_, x) = wrapped(), images()
    y = module(x)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = module(images()[1])
    with torch.no_grad():
        next(module.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_defect_14_the_callers_tensor_is_restored_or_left_alone(layout):
    leaf = torch.randn(2, 4, 3, 3, requires_grad=True)
    x = leaf * 1
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = (leaf.transpose(2, 3).contiguous() * 1).transpose(2, 3)
    strides, value = x.stride(), x.detach().clone()
    wrapped("affine")(x).sum().backward()
    assert x.stride() == strides and close(x, value)
    leaf_value = leaf.detach().clone()
    wrapped("affine")(leaf).sum().backward()
    assert torch.equal(leaf, leaf_value)


def test_defect_15_outputs_require_grad_only_where_they_should():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 3)

        def forward(self, x, y):
            return x + self.net(y), y * 2

        def inverse(self, z, y):
            return z - self.net(y / 2), y / 2

    module = memcnn.InvertibleModuleWrapper(Both())
    z, y = module(torch.randn(2, 3), torch.randn(2, 3))
    assert z.requires_grad and not y.requires_grad
    module.requires_grad_(False)
    assert not any(t.requires_grad for t in module(torch.randn(2, 3), torch.randn(2, 3)))


def test_defect_16_odd_channels_are_named():
    for call in (coupling(), coupling().inverse, wrapped(), wrapped().inverse):
        with pytest.raises(WireError) as caught:
            call(torch.randn(2, 5, 3, 3))
        assert str(caught.value).endswith(
            "AdditiveCoupling: the input is (2, 5, 3, 3), expected an even size along split_dim=1, got 5; pad it, or "
            "use invfunc.nn.Coupling(f, g, sizes=[3, 2], dim=1)"
        )


def test_defect_17_hooks_fire_and_spectral_norm_learns():
    module, seen = wrapped(), []
    module._fn.register_forward_hook(lambda *_: seen.append("coupling"))
    module._fn.Fm.register_forward_hook(lambda *_: seen.append("Fm"))
    assert_trains_as_plain(module, images()[0])
    assert {"coupling", "Fm"} <= set(seen)

    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    block = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(normed, split_dim=-1))
    before = [b.clone() for b in block.buffers()]
    for _ in range(3):
        assert_trains_as_plain(block, torch.randn(3, 8))
    assert not all(torch.equal(b, c) for b, c in zip(before, block.buffers(), strict=True))


def test_defect_18_nothing_is_held_until_the_garbage_collector_runs():
    module = wrapped("affine")
    gc.disable()
    try:
        y = module(images()[1])
        alive = weakref.ref(y)
        del y
        assert alive() is None
    finally:
        gc.enable()


def test_defect_19_autocast_is_what_the_user_set():
    module, seen = wrapped().float(), []
    module._fn.Fm[0].register_forward_hook(lambda *_: seen.append(_[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(torch.randn(2, 4, 3, 3).float())
    y.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_defect_20_importing_changes_no_warning_filter():
    script = (
        "import warnings, torch; a = list(warnings.filters); import invfunc.compat.memcnn; assert a == warnings.filters"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", script]).returncode == 0


def test_defect_21_parameters_are_found_where_they_are_not_listed():
    """A replica of DataParallel has its weights as plain attributes: ``parameters()`` is empty there."""

    class Replica(nn.Module):
        def __init__(self):
            super().__init__()
            self.__dict__["weight"] = torch.randn(2, 2, requires_grad=True)

        def forward(self, x):
            return x @ self.weight

    block = Replica()
    module = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(block, block, split_dim=-1))
    x = torch.randn(3, 4)
    module(x).sum().backward()
    found, block.weight.grad = block.weight.grad, None
    module.build()(x).sum().backward()
    assert close(found, block.weight.grad)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_wrong_split_dim_is_named():
    with pytest.raises(WireError) as caught:
        memcnn.AdditiveCoupling(nn.Identity(), split_dim=3)(torch.randn(2, 4))
    assert str(caught.value).endswith("AdditiveCoupling: the input is (2, 4), expected a dimension split_dim=3")
    with pytest.raises(OptionError) as caught:
        memcnn.AffineCoupling(nn.Identity(), split_dim=None)
    assert str(caught.value) == "AffineCoupling: split_dim is None, expected a dimension, an int"


@pytest.mark.parametrize("batch", [2, 3])
def test_a_missing_adapter_is_named_and_nothing_is_unpacked_along_the_batch(batch):
    module = memcnn.AffineCoupling(net())
    for call in (module, module.inverse):
        with pytest.raises(WireError) as caught:
            call(torch.randn(batch, 4, 3, 3))
        name = "Fm" if call is module else "Gm"
        assert (
            f"AffineCoupling: {name} returned ({batch}, 2, 3, 3), expected (s, t), scale and shift; "
            "pass adapter=AffineAdapterNaive or adapter=AffineAdapterSigmoid, or return a tuple"
        ) in str(caught.value)


def test_an_adapter_with_odd_channels_is_named():
    with pytest.raises(WireError) as caught:
        memcnn.AffineCoupling(net(2, 3), adapter=memcnn.AffineAdapterSigmoid)(torch.randn(2, 4, 3, 3))
    assert str(caught.value).endswith(
        "AffineAdapterSigmoid: the net returned (2, 3, 3, 3), expected an even number of channels (dim 1): scale and "
        "shift; let the net return twice the channels of its input"
    )


def test_a_module_that_does_not_fit_its_partner_is_named():
    with pytest.raises(WireError, match="f returned .* like its partner component"):
        memcnn.AdditiveCoupling(net(2, 3), net())(torch.randn(2, 4, 3, 3))


# ---- a stack ---------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """50 wrapped blocks between ordinary layers: ReLU before, residual around, shared modules, frozen parts."""

    def __init__(self, depth: int = 50):
        super().__init__()
        shared = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
        self.blocks, self.between = nn.ModuleList(), nn.ModuleList()
        for i in range(depth):
            fm = shared if i % 4 == 0 else nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.1))
            if i % 3:
                block = memcnn.AdditiveCoupling(fm, shared if i % 8 == 0 else None)
            else:
                block = memcnn.AffineCoupling(nn.Conv2d(2, 4, 1), adapter=memcnn.AffineAdapterSigmoid)
            residual = i % 5 == 0
            self.blocks.append(memcnn.InvertibleModuleWrapper(block, keep_input=residual).requires_grad_(i % 7 != 0))
            self.between.append(nn.Conv2d(4, 4, 1).requires_grad_(i % 6 != 0) if i % 2 else nn.Identity())

    def forward(self, x):
        for i, (block, between) in enumerate(zip(self.blocks, self.between, strict=True)):
            x = between(x).relu() if i % 2 else between(x)
            x = x + block(x) if i % 5 == 0 else block(x)
            x = x / (1 + x.square().mean().sqrt())
        return x


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_50_blocks_among_ordinary_layers_train_as_plain(training):
    module = Mixed().train(training)
    assert_trains_as_plain(module, images()[0])


def test_blocks_wrapped_one_by_one_hold_one_activation():
    x = torch.randn(16, 64, 8, 8)
    held = []
    for depth in (2, 12):
        blocks = [memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(nn.Conv2d(32, 32, 1))) for _ in range(depth)]
        model = nn.Sequential(*blocks)
        model(x * 1)
        held.append(measure(lambda model=model: model(x * 1)).held_bytes)
    assert held[1] <= 1.01 * x.nbytes and held[1] - held[0] < 10 * 64  # a few numbers a block, no activation


def test_wrapped_blocks_in_a_sequential_are_one_pipeline():
    x = torch.randn(4, 4, 3, 3)
    net = inv.nn.Sequential(wrapped("affine"), wrapped(disable=True), wrapped(keep_input=True))
    plain = disabled(net)
    plain.checkpoint = False
    assert all(map(close, step(net, x)[:2], step(plain, x)[:2]))
    assert close(net.inverse(net(x)), x)
