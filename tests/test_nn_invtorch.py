"""InvTorch's surface: what its README promises holds, and what it warned of does not."""

import copy
import gc
import subprocess
import sys
import warnings

import pytest
import torch
from kit import close, is_free
from torch import Tensor, nn

import invfunc as inv
from invfunc import nn as inn
from invfunc.compat import invtorch
from invfunc.errors import NotInvertibleError, OptionError, WireError
from invfunc.look.memory import measure
from invfunc.testing import LawError


class Affine(inn.InvertibleModule):
    """A tall linear map, undone by the pseudo-inverse: the example of InvTorch's README."""

    def __init__(self, size=3, out=5, **flags):
        super().__init__(**flags)
        self.weight, self.bias = nn.Parameter(torch.randn(out, size)), nn.Parameter(torch.randn(out))

    def function(self, x):
        return x @ self.weight.T + self.bias

    def inverse(self, y):
        return (y - self.bias) @ self.weight.T.pinverse()


class Sum(inn.InvertibleModule):
    """Two inputs and a number; the second input is returned."""

    def __init__(self, **flags):
        super().__init__(**flags)
        self.net = nn.Linear(3, 3)

    def function(self, x, y, factor=1.0):
        return x + factor * self.net(y), y, factor

    def inverse(self, z, y, factor=1.0):
        return z - factor * self.net(y), y, factor


class Normalised(inn.InvertibleModule):
    """Shows one output; its norm is for the inverse alone."""

    num_outputs = num_inputs = 1

    def function(self, x):
        norm = x.norm(dim=-1, keepdim=True)
        return x / norm, norm

    def inverse(self, y, norm=None):
        return (y if norm is None else y * norm), norm


def leaf_and_copy(*shape: int) -> tuple[Tensor, Tensor]:
    leaf = torch.randn(*shape, requires_grad=True)
    return leaf, leaf * 1


# ---- flags -----------------------------------------------------------------------------------------------------------


def test_flags_are_coupled_as_in_the_readme():
    module = Affine()
    assert (module.invertible, module.checkpoint) == (True, True)
    module.checkpoint = False
    assert (module.invertible, module.checkpoint) == (False, False)
    module.checkpoint = True
    assert (module.invertible, module.checkpoint) == (False, True)
    module.checkpoint = False
    module.invertible = True
    assert (module.invertible, module.checkpoint) == (True, True)
    assert Affine(checkpoint=False).invertible is False
    assert Affine(invertible=False).checkpoint is True


def test_flags_may_change_at_any_time_and_change_no_gradient():
    module, plain = Affine(), Affine(checkpoint=False)
    plain.load_state_dict({k: v for k, v in module.state_dict().items()})
    for flags in (
        {"invertible": True},
        {"invertible": False},
        {"checkpoint": False},
        {"invertible": True},
        {"seed": True},
    ):
        for name, value in flags.items():
            setattr(module, name, value)
        leaf, x = leaf_and_copy(4, 3)
        y, expected = module(x), plain(leaf)
        assert close(y, expected)
        found = torch.autograd.grad(y.cos().sum(), [leaf, module.weight, module.bias])
        for a, b in zip(
            found, torch.autograd.grad(expected.cos().sum(), [leaf, plain.weight, plain.bias]), strict=True
        ):
            assert close(a, b)


def test_flags_may_change_between_forward_and_backward():
    module, (leaf, x) = Affine(), leaf_and_copy(4, 3)
    y = module(x)
    module.checkpoint = False
    y.sum().backward()
    assert close(leaf.grad, module.weight.sum(0).expand(4, 3))


def test_what_each_mode_keeps():
    for flags, freed in (({}, True), ({"invertible": False}, False), ({"checkpoint": False}, False)):
        _, x = leaf_and_copy(4, 3)
        Affine(**flags)(x)
        assert is_free(x) == freed


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_plain_function(switch):
    module, x = Affine(), torch.randn(4, 3)
    with switch():
        assert close(module(x), module.function(x)) and not is_free(x)
    frozen = Affine().requires_grad_(False)
    frozen(x)
    assert not is_free(x)


def test_temp_mode_restores_and_refuses_a_conflict():
    module = Sum()
    with module.temp_mode(checkpoint=False) as same:
        assert same is module and not module.invertible
    assert module.invertible
    with pytest.raises(KeyError), module.temp_mode(invertible=False, seed=True):
        assert module.seed and module.checkpoint and not module.invertible
        raise KeyError
    assert module.invertible and not module.seed
    for invertible in (True, False):  # InvTorch overlooked the conflict where a flag was set already
        module.invertible = invertible
        with (
            pytest.raises(OptionError, match="checkpoint=False and invertible=True"),
            module.temp_mode(checkpoint=False, invertible=True),
        ):
            pass
    with pytest.raises(OptionError, match="expected some of"), module.temp_mode(train=True):
        pass


# ---- one test for each defect of InvTorch (the peers' study, 2a) -----------------------------------------------------


class Dropping(inn.InvertibleModule):
    def __init__(self, p=0.5, **flags):
        super().__init__(**flags)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(p))

    def function(self, x1, x2):
        return x1 + self.net(x2), x2

    def inverse(self, y1, y2):
        return y1 - self.net(y2), y2


@pytest.mark.parametrize("seed", [False, True])
def test_defect_1_dropout_has_the_gradients_of_plain_training(seed):
    module = Dropping(seed=seed)
    plain = copy.deepcopy(module)
    plain.checkpoint = False
    results = []
    for net in (module, plain):
        torch.manual_seed(7)
        leaf = torch.ones(5, 4, requires_grad=True)
        for _ in range(1):
            y1, y2 = net(leaf * 1, leaf * 2)
            (y1.cos() * y2.sin()).sum().backward()
        results.append([leaf.grad, *(p.grad for p in net.parameters()), torch.rand(1)])
    assert all(close(a, b) for a, b in zip(*results, strict=True))
    assert module.check(torch.ones(5, 4), torch.ones(5, 4))


def test_defect_2_sequential_holds_one_activation_at_any_depth():
    x = torch.randn(64, 128)
    held = [measure(inn.Sequential(*(inn.Coupling(nn.Linear(64, 64)) for _ in range(n))), x).held_bytes for n in (2, 8)]
    assert held[0] == held[1] == x.nbytes


def test_defect_3_nothing_leaks_when_backward_never_runs():
    module, alive = Affine(), []
    gc.disable()
    try:
        for _ in range(3):
            _, x = leaf_and_copy(4, 3)
            y = module(x)
            alive.append(__import__("weakref").ref(y))
            del x, y
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()


def test_defect_4_autograd_grad_and_backward_inputs():
    module, (leaf, x) = Affine(), leaf_and_copy(4, 3)
    (found,) = torch.autograd.grad(module(x).sum(), module.weight)
    module(leaf * 1).sum().backward(inputs=[module.weight])
    assert close(found, module.weight.grad) and leaf.grad is None


def test_defect_5_backward_twice_and_for_each_output():
    module, (leaf, x) = Sum(), leaf_and_copy(4, 3)
    z, y, _ = module(x, leaf * 2)
    z.sum().backward(retain_graph=True)
    first = leaf.grad.clone()
    y.sum().backward(retain_graph=True)
    z.sum().backward()
    assert close(leaf.grad, 2 * first + 2)


def test_defect_6_create_graph_is_differentiable():
    module, (leaf, x) = Affine(), leaf_and_copy(4, 3)
    (first,) = torch.autograd.grad(module(x).pow(3).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    (first,) = torch.autograd.grad(module.function(leaf).pow(3).sum(), leaf, create_graph=True)
    assert close(second, torch.autograd.grad(first.sum(), leaf)[0])


def test_defect_7_functional_call_gives_gradients_to_what_it_was_given():
    module, x = Affine(), torch.randn(4, 3)
    given = {name: torch.randn_like(p).requires_grad_() for name, p in module.named_parameters()}
    torch.func.functional_call(module, given, (x,)).cos().sum().backward()
    expected = torch.autograd.grad((x @ given["weight"].T + given["bias"]).cos().sum(), list(given.values()))
    assert all(close(g.grad, e) for g, e in zip(given.values(), expected, strict=True))
    assert module.weight.grad is None


RESIDUAL = """
import torch
from invfunc.nn import InvertibleModule
from invfunc.errors import DonatedError
class Double(InvertibleModule):
    def function(self, x):
        return 2 * x
    def inverse(self, y):
        return y / 2
f = Double()
for expression in ("x + f(x)", "f(x) + x", "(f(x), x)[1]", "x.view(3) + f(x)", "x[:2] + x[:2]"):
    x = torch.ones(3, requires_grad=True) * 1
    try:
        print(eval(expression).sum().item())
    except DonatedError as error:
        print(error)
"""


def test_defect_8_reading_an_input_that_was_freed_is_no_crash():
    ran = subprocess.run([sys.executable, "-c", RESIDUAL], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    read = "a donated tensor was read"
    expected = [read, read, read, "9.0", "4.0"]  # a view is alive in the fourth, so nothing was freed
    assert all(line.startswith(text) for line, text in zip(ran.stdout.splitlines(), expected, strict=True))


def test_defect_8_keep_leaves_an_input_alone():
    module, (leaf, x) = Affine(3, 3), leaf_and_copy(4, 3)
    (x + module(x, keep=x)).sum().backward()
    _, (other, y) = leaf.grad, leaf_and_copy(4, 3)
    module(y, keep=(y,))
    assert not is_free(y)
    module.donate = False
    (other * 1 + module(other * 1)).sum().backward()
    assert close(other.grad, leaf.grad)


@pytest.mark.parametrize(
    "before", [torch.relu, torch.sigmoid, nn.LeakyReLU(), nn.Softmax(-1), nn.Dropout(0.0), nn.Tanh()]
)
def test_defect_9_any_operation_may_come_before(before):
    module, leaf = Affine(), torch.randn(6, 3, requires_grad=True)
    (found,) = torch.autograd.grad(module(before(leaf)).cos().sum(), leaf)
    (expected,) = torch.autograd.grad(module.function(before(leaf)).cos().sum(), leaf)
    assert close(found, expected)


def test_defect_11_autocast_is_restored():
    module, seen = Sum().float(), []
    module.net.register_forward_hook(lambda *_: seen.append((torch.is_autocast_enabled("cpu"), _[2].dtype)))
    x, y = torch.randn(4, 3).float(), torch.randn(4, 3).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z, *_ = module(x, y)
    z.sum().backward()  # forward, and the inverse; the second forward stops before the layer has an output
    assert z.dtype == torch.float32 and len(seen) == 2 and set(seen) == {(True, torch.bfloat16)}


def test_defect_12_and_13_batch_norm_is_torchs():
    ours, theirs, x = inn.BatchNorm1d(3), nn.BatchNorm1d(3), torch.randn(8, 3)
    with torch.no_grad():
        ours.weight[0] = theirs.weight[0] = 0.0
    grads = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with torch.no_grad():
            layer.eval()(leaf)
        assert layer.weight[0] == 0
        layer.train()
        with torch.no_grad():
            layer.weight[0] = 1.0
        layer(leaf).pow(3).sum().backward()
        grads.append(leaf.grad)
    assert close(*grads)


def test_defect_14_plain_state_dicts_load_and_so_do_invtorchs():
    layer, module = inn.Linear(3, 3), Affine()
    layer.load_state_dict(nn.Linear(3, 3).state_dict())
    nn.Linear(3, 3).load_state_dict(layer.state_dict())
    theirs = module.state_dict()
    theirs["_extra_state"] = {"seed": False, "checkpoint": True, "invertible": False, "reversed": False}
    module.load_state_dict(theirs)
    assert module.checkpoint and not module.invertible


def test_defect_15_sequential_takes_ordinary_modules():
    net = inn.Sequential(inn.Linear(3, 3), nn.ReLU(), inn.Linear(3, 3))
    net(torch.randn(2, 3)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_defect_17_lists_are_refused_by_name():
    class Listing(Affine):
        def function(self, x):
            return [super().function(x)]

    with pytest.raises(WireError) as caught:
        Listing()(torch.randn(4, 3))
    assert str(caught.value) == "Listing.function returned list, expected a tensor or a tuple; return tuple(outputs)"


def test_defect_19_a_wrong_inverse_is_found_by_check():
    class Wrong(Affine):
        def inverse(self, y):
            return 2 * super().inverse(y)

    with pytest.raises(AssertionError) as caught:
        Wrong().check_inverse(torch.ones(2, 3))
    assert isinstance(caught.value, LawError)
    assert str(caught.value) == "Wrong: inverse(function(x)) and x: leaf 0 differs by at most 1"


def test_defect_20_a_view_does_not_free_its_base():
    module, big = Affine(), torch.randn(6, 3)
    module(big[:3]).sum().backward()
    assert not is_free(big)


def test_defect_21_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leaf, x = leaf_and_copy(4, 3)
        Affine()(x).sum().backward()


# ---- what the surface promises ---------------------------------------------------------------------------------------


def test_do_require_grad():
    yes, no = torch.ones(1, requires_grad=True), torch.ones(1)
    require = inn.InvertibleModule.do_require_grad
    assert require(yes, no, 3) and not require(no, 3) and not require()
    assert require(yes, yes, at_least_one=False) and not require(yes, no, at_least_one=False)
    assert require(at_least_one=False)


def test_outputs_require_grad_without_being_told():
    module = Sum()
    z, y, factor = module(torch.randn(4, 3), torch.randn(4, 3), 2.0)
    assert z.requires_grad and not y.requires_grad and factor == 2.0


def test_several_inputs_numbers_and_an_output_that_is_an_input():
    module = Sum()
    for flags in ({}, {"invertible": False}, {"checkpoint": False}):
        with module.temp_mode(**flags):
            (a, x), (b, y) = leaf_and_copy(4, 3), leaf_and_copy(4, 3)
            z, same, _ = module(x, y, 0.5)
            assert same is not y or not module.invertible
            (z.cos() * same).sum().backward()
            plain = a + 0.5 * module.net(b)
            expected = torch.autograd.grad((plain.cos() * b).sum(), [a, b])
            assert close(a.grad, expected[0]) and close(b.grad, expected[1])


def test_num_outputs_hides_what_only_the_inverse_needs():
    module, (leaf, x) = Normalised(), leaf_and_copy(4, 3)
    y = module(x)
    assert isinstance(y, Tensor) and is_free(x)
    y.cos().sum().backward()
    other = leaf.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad((other / other.norm(dim=-1, keepdim=True)).cos().sum(), other)
    assert close(leaf.grad, expected)
    assert module.check(leaf.detach())
    pipeline = inn.Sequential(Normalised(), inn.Linear(3, 3), Normalised())
    leaf, x = leaf_and_copy(4, 3)
    pipeline(x).cos().sum().backward()
    found, leaf.grad = leaf.grad, None
    pipeline.checkpoint = False
    pipeline(leaf).cos().sum().backward()
    assert close(found, leaf.grad)


def test_process_slices_by_number_also_from_the_end():
    module = Normalised()
    assert module.process((1, 2)) == 1
    type(module).num_outputs = -1
    try:
        assert module.process((1, 2, 3)) == (1, 2)
        with pytest.raises(WireError) as caught:
            module.process((1,))
        assert str(caught.value) == "Normalised.function returned (int,), expected at least 1, for num_outputs is -1"
    finally:
        type(module).num_outputs = 1


def test_the_inverse_may_return_anything_for_what_is_no_tensor_and_more_than_there_is():
    class Lazy(Sum):
        def inverse(self, z, y, factor):
            return z - factor * self.net(y), y, None, "more"

    module, plain = Lazy(), Lazy(checkpoint=False)
    plain.load_state_dict(module.state_dict())
    for args in ((2.0,), ()):
        (a, x), (b, y) = leaf_and_copy(4, 3), leaf_and_copy(4, 3)
        found = torch.autograd.grad(module(x, y, *args)[0].cos().sum(), [a, b])
        expected = torch.autograd.grad(plain(a, b, *args)[0].cos().sum(), [a, b])
        assert all(close(f, e) for f, e in zip(found, expected, strict=True))

    class Short(Sum):
        def inverse(self, z, y, factor):
            return z

    z, *_ = Short()(x, torch.ones(4, 3))
    with pytest.raises(WireError) as caught:
        z.sum().backward()
    assert str(caught.value) == "Short.inverse returned ((4, 3),), expected 2 like the inputs of function"


def test_forward_may_be_overridden():
    class First(Sum):
        def forward(self, x, y):
            return super().forward(x, y)[0]

    (a, x), (_, y) = leaf_and_copy(4, 3), leaf_and_copy(4, 3)
    First()(x, y).sum().backward()
    assert close(a.grad, torch.ones(4, 3))


def test_reverse_exchanges_function_and_inverse():
    class Square(Affine):
        reversible = True

        def __init__(self):
            super().__init__(3, 3)

    module, x = Square(), torch.randn(4, 3)
    y = module(x.clone())
    assert module.reverse() is module and module.reversed
    assert close(module(y.detach().clone()), x) and module.check(x)
    module.reversed = False
    assert not module.reversed and close(module(x.clone()), y)
    with pytest.raises(NotInvertibleError) as caught:
        Affine().reverse()
    assert str(caught.value) == "reverse: Affine is not reversible; let its property `reversible` return True"


def test_check_tells_randomness_and_structure():
    class Counting(Affine):
        calls = 0

        def function(self, x):
            self.calls += 1
            return super().function(x) + (self.calls > 1)

    with pytest.raises(LawError, match="a second function"):
        Counting().check(torch.ones(2, 3))

    class Short(Sum):
        def inverse(self, *ys):
            return ys[0]

    with pytest.raises(LawError, match="is not of the kind of"):
        Short().check(torch.ones(2, 3), torch.ones(2, 3))
    dropping, state = Dropping(), torch.get_rng_state()
    assert dropping.check(torch.ones(5, 4), torch.ones(5, 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_check_moves_no_statistics():
    class Batch(inn.InvertibleModule):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def function(self, x, y):
            return x + self.bn(y), y

        def inverse(self, z, y):
            return z - self.bn(y), y

    module = Batch()
    before = copy.deepcopy(module.state_dict())
    assert module.check(torch.randn(4, 3), torch.randn(4, 3))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    module(torch.randn(4, 3), torch.randn(4, 3))[0].sum().backward()
    assert module.bn.num_batches_tracked == 1


def test_a_missing_inverse_is_named_before_anything_is_freed():
    class Half(inn.InvertibleModule):
        def function(self, x):
            return x.relu()

    module, (leaf, x) = Half(), leaf_and_copy(4, 3)
    with pytest.raises(NotInvertibleError) as caught:
        module(x)
    assert str(caught.value) == (
        "Half has no inverse; define inverse(self, *outputs), or set invertible=False to keep the inputs instead"
    )
    assert not is_free(x)
    module.invertible = False
    module(x).sum().backward()
    assert close(leaf.grad, (leaf > 0).double())
    with torch.no_grad():
        Half()(x)
    with pytest.raises(
        NotInvertibleError, match=r"InvertibleModule has no function; define function\(self, \*inputs\)"
    ):
        inn.InvertibleModule(checkpoint=False)(x)


def test_modules_compose_with_ops():
    net = inv.checkpoint(inv.chain(Affine(3, 3).op, inv.ops.tanh(), Affine(3, 5).op))
    leaf = torch.randn(4, 3, requires_grad=True)
    assert torch.allclose(net.inverse(net(leaf)), leaf, atol=1e-6)
    net(leaf).sum().backward()
    assert leaf.grad is not None


# ---- functions -------------------------------------------------------------------------------------------------------


def test_invertible_checkpoint():
    leaf, x = leaf_and_copy(3)
    y = invtorch.invertible_checkpoint(torch.exp, torch.log, x, preserve_rng_state=True)
    assert is_free(x)
    y.sum().backward()
    assert close(leaf.grad, leaf.exp()) and not is_free(x)


def test_checkpoint_in_all_its_modes():
    weight = torch.randn(3, requires_grad=True)

    def function(x, y):
        return weight * x + y, y

    def inverse(z, y):
        return (z - y) / weight, y

    results = []
    for options in ({"enabled": False}, {"seed": False}, {"inverse": inverse}, {"inverse": inverse, "keep": ()}):
        (a, x), (b, y) = leaf_and_copy(3), leaf_and_copy(3)
        with torch.no_grad():
            a.copy_(torch.arange(3.0)), b.copy_(torch.ones(3))
        x, y = a * 1, b * 1
        z, same = invtorch.checkpoint(function, x, y, **options)
        results.append(torch.autograd.grad((z.cos() * same).sum(), [a, b, weight]))
    for found in results[1:]:
        assert all(close(f, e) for f, e in zip(found, results[0], strict=True))
    _, x = leaf_and_copy(3)
    _, y = leaf_and_copy(3)
    invtorch.checkpoint(function, x, y, inverse=inverse, keep=[x])
    assert not is_free(x) and is_free(y)


def test_the_names_are_where_invtorch_had_them():
    assert invtorch.nn.Module is invtorch.InvertibleModule is inn.InvertibleModule
    for name in ("Identity", "Linear", "Conv1d", "Conv2d", "Conv3d", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
        assert issubclass(getattr(invtorch.nn, name), invtorch.nn.Module)
        assert issubclass(getattr(invtorch.nn, name), getattr(nn, name))
    for name in ("PixelShuffle", "Flatten", "Pad", "Sequential"):
        assert issubclass(getattr(invtorch.nn, name), invtorch.nn.Module)
