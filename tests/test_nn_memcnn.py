"""MemCNN's surface, with its semantics."""

import copy
import pickle
import warnings

import pytest
import torch
from kit import close, is_free
from memcnn_modules import Multiply, assert_trains_as_plain, coupling, disabled, images, net, step, wrapped
from torch import nn

import invfunc as inv
from invfunc.compat import memcnn
from invfunc.errors import NotInvertibleError, OptionError, WireError
from invfunc.look.memory import measure

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
