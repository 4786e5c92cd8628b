"""One test for each of the 21 defects of MemCNN that the peers' study lists (2b)."""

import gc
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from kit import close, is_free
from memcnn_modules import Multiply, assert_trains_as_plain, coupling, disabled, images, wrapped
from torch import nn

from invfunc.compat import memcnn
from invfunc.errors import WireError


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
        "(f(x), repr(x))[1]": "str",
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
