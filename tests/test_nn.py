"""The module face: modules own what their ops use, under stable names, and compute what the ops compute."""

import copy
import io
import pickle
from collections import OrderedDict
from functools import partial

import pytest
import torch
from catalogue import mlp
from kit import close
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import invfunc as inv
from invfunc import nn as inn
from invfunc.errors import DonatedError, NotInvertibleError, OptionError, WireError
from invfunc.look.memory import measure


def block(size: int = 4) -> inv.Invertible:
    return inv.couple(mlp(size), mlp(size))


def pipeline(depth: int = 3) -> inv.Invertible:
    return inv.chain(inv.split(2), *(block() for _ in range(depth)), inv.concat(2))


def gradients(module: nn.Module, *xs: Tensor) -> dict[str, Tensor | None]:
    """The gradients of parameters, by name, and of inputs, of a loss that weighs every output."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in xs]
    module.zero_grad()
    y = module(*(x * 1 for x in inputs))
    ys = y if isinstance(y, tuple) else (y,)
    sum((out * torch.arange(1.0, 1 + out.numel()).view_as(out).cos()).sum() for out in ys).backward()
    return {**{n: p.grad for n, p in module.named_parameters()}, **{f"x{i}": x.grad for i, x in enumerate(inputs)}}


def assert_same_gradients(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or close(other, gradient), name


# ---- Lowered: one source of truth ------------------------------------------------------------------------------------


def test_lowered_computes_what_its_op_computes():
    op = pipeline()
    module, x = inn.Lowered(op), torch.randn(2, 8, requires_grad=True)
    assert module.op is op
    assert torch.equal(module(x), op(x))
    assert close(module.inverse(module(x)), x)


def test_lowered_names_say_where_a_module_is():
    op = inv.chain(inv.split(2), inv.couple(nn.Linear(4, 4), nn.Linear(4, 4)), inv.concat(2), nn.Linear(8, 3))
    names = [name for name, _ in inn.Lowered(op).named_parameters()]
    assert names == [
        *("1.f.weight", "1.f.bias", "1.g.weight", "1.g.bias"),
        *("3.weight", "3.bias"),
    ]


def test_lowered_names_are_those_of_sequential():
    parts = [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)]
    module, plain = inn.Lowered(inv.chain(*parts)), nn.Sequential(*copy.deepcopy(parts))
    plain.load_state_dict({name: torch.randn_like(t) for name, t in plain.state_dict().items()})
    module.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3)
    assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda net: inv.couple(net), ["f.weight"]),
        (lambda net: inv.couple(inv.ops.exp_scale(net), law=inv.affine), ["f.weight"]),
        (lambda net: inv.invert(inv.couple(net)), ["f.weight"]),
        (lambda net: inv.checkpoint(inv.couple(net)), ["f.weight"]),
        (lambda net: inv.chain(inv.split(2), inv.mark(inv.couple(net), "store"), inv.concat(2)), ["1.f.weight"]),
        (lambda net: inv.parallel(inv.chain(), inv.pair(net.forward, torch.exp)), ["1.weight"]),
        (lambda net: inv.pair(net.forward, torch.exp), ["module.weight"]),
        (lambda net: inv.pair(partial(scaled, net), partial(scaled, net)), ["net.weight"]),
        (lambda net: inv.pair(net.forward, nn.Bilinear(1, 1, 1).forward), None),
        (lambda net: inv.ops.couple_streams([net, net]), None),
        (lambda net: inv.couple(net, net), ["f.weight", "g.weight"]),
    ],
)
def test_lowered_finds_modules_wherever_an_op_keeps_them(make, names):
    net = nn.Linear(2, 2, bias=False)
    module = inn.Lowered(make(net))
    assert any(child is net for child in module.modules())
    found = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    assert names is None or found == names


def scaled(net: nn.Module, x: Tensor) -> Tensor:
    return 2 * net(x)


def test_lowered_owns_parameters_that_ops_were_given():
    weight, bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
    module = inn.Lowered(inv.chain(inv.ops.linear(weight, bias), inv.additive(torch.ones(3))))
    assert dict(module.named_parameters()) == {"0.weight": weight, "0.bias": bias}
    assert list(dict(module.named_buffers())) == ["1.t"]


def test_lowered_refuses_tensors_that_no_module_can_own():
    with pytest.raises(OptionError) as caught:
        inn.Lowered(inv.additive(torch.ones(2, requires_grad=True)))
    assert str(caught.value) == (
        "Lowered: the op closes over a tensor (2,) that requires grad and is no parameter, expected a parameter, which "
        "a module can own; make it one with torch.nn.Parameter, or let a module compute it"
    )


def test_lowered_to_moves_every_tensor():
    module = inn.Lowered(
        inv.chain(pipeline(1), inv.ops.linear(nn.Parameter(torch.randn(8, 8))), inv.additive(torch.ones(8)))
    )
    module.to(torch.float32)
    y = module(torch.randn(2, 8, dtype=torch.float32))
    assert y.dtype == torch.float32
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_lowered_has_modules_of_its_own(copied):
    first = inn.Lowered(
        inv.chain(pipeline(1), inv.ops.linear(nn.Parameter(torch.randn(8, 8))), inv.additive(torch.ones(8)))
    )
    second, x = copied(first), torch.randn(2, 8)
    before = first(x)
    assert torch.equal(second(x), before)
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(0.5)
    assert torch.equal(first(x), before) and not close(second(x), before)
    found = {id(owner) for _, owner, _ in inn.lowered.owned(second.op)}
    assert found == {id(second.get_submodule("1.f")), id(second.get_submodule("1.g")), *found} and found
    assert all(any(p is q for q in second.parameters()) for p in _parameters_of(second.op))
    second(x).sum().backward()
    assert all(p.grad is not None for p in second.parameters()) and all(p.grad is None for p in first.parameters())


def _parameters_of(op: inv.Invertible) -> list[Tensor]:
    owners = [owner for _, owner, _ in inn.lowered.owned(op)]
    return [p for o in owners for p in (o.parameters() if isinstance(o, nn.Module) else [o]) if p.requires_grad]


def test_lowered_loads_with_assign():
    first, second = inn.Lowered(inv.ops.linear(nn.Parameter(torch.randn(3, 3)))), None
    second = copy.deepcopy(first)
    second.load_state_dict({k: 2 * v for k, v in first.state_dict().items()}, assign=True)
    x = torch.randn(2, 3)
    assert close(second(x), 2 * first(x))


def test_lowered_under_functional_call_and_grad():
    module = inn.Lowered(inv.chain(pipeline(2), inv.ops.linear(nn.Parameter(torch.randn(8, 8)))))
    other = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    x = torch.randn(2, 8)
    plain = copy.deepcopy(module)
    plain.load_state_dict(other)
    found = grad(lambda p: functional_call(module, p, (x,)).square().sum())(other)
    plain(x).square().sum().backward()
    for name, p in plain.named_parameters():
        assert close(found[name], p.grad)


def test_lowered_under_vmap_of_grad():
    module, x = inn.Lowered(pipeline(1)), torch.randn(3, 2, 8)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    per_sample = vmap(grad(lambda p, x: functional_call(module, p, (x,)).square().sum()), (None, 0))(parameters, x)
    first = grad(lambda p: functional_call(module, p, (x[0],)).square().sum())(parameters)
    for name in parameters:
        assert close(per_sample[name][0], first[name])


def test_closures_are_owned_and_copied():
    net = nn.Linear(2, 2)
    module = inn.Lowered(inv.couple(lambda x: 2 * net(x)))
    assert [name for name, _ in module.named_parameters()] == ["f.net.weight", "f.net.bias"]
    other, x = copy.deepcopy(module), (torch.randn(3, 2), torch.randn(3, 2))
    with torch.no_grad():
        net.weight.zero_()
    total = sum(y.sum() for y in other(*x))
    assert not close(total, sum(y.sum() for y in module(*x)))
    total.backward()
    assert net.weight.grad is None and all(p.grad is not None for p in other.parameters())
    with pytest.raises(OptionError) as caught:
        pickle.dumps(module)
    assert str(caught.value) == (
        "Lowered: a function of couple(<lambda>) closes over modules that a pickle would not use; pass the module "
        "itself, a bound method or a functools.partial"
    )


def test_a_closure_over_a_parameter_is_given_another():
    weight = nn.Parameter(torch.randn(2))
    module, x = inn.Lowered(inv.couple(lambda x: weight * x)), torch.ones(1, 2)
    assert list(dict(module.named_parameters())) == ["f.weight"]
    y, _ = functional_call(module, {"f.weight": 2 * torch.ones(2)}, ((x, x),))
    assert torch.equal(y, 3 * x)


@pytest.mark.parametrize(
    "options", [{"segments": 2}, {"mode": "recompute"}, {"mode": "store"}, {"preserve_rng_state": False}]
)
def test_options_change_no_value_and_no_gradient(options):
    op, x = pipeline(), torch.randn(2, 8, requires_grad=True)
    plain, module = inn.Lowered(op, mode="store"), inn.Lowered(op, **options)
    assert torch.equal(plain(x), module(x)) and close(module.inverse(module(x)), x)
    expected = gradients(plain, x)
    assert_same_gradients(gradients(module, x), expected)


@pytest.mark.parametrize(
    "make",
    [lambda **o: inn.Lowered(inv.chain(), **o), lambda **o: inn.Sequential(**o), lambda **o: inn.Coupling(abs, **o)],
)
@pytest.mark.parametrize("options", [{"mode": "invet"}, {"segment": 2}])
def test_unknown_options_raise(make, options):
    with pytest.raises(OptionError):
        make(**options)


def test_segments_are_checked_at_once():
    with pytest.raises(OptionError, match="segments=9"):
        inn.Lowered(pipeline(1), segments=9)


def test_donate_is_that_of_checkpoint():
    module, x = inn.Lowered(pipeline(), donate=True), torch.randn(2, 8, requires_grad=True)
    with pytest.raises(DonatedError, match="a leaf that requires grad"):
        module(x)
    h = x * 1
    y = module(h)
    with pytest.raises(DonatedError):
        h + 1
    y.sum().backward()
    assert close(h, x)


def test_a_lowered_module_in_a_lowered_pipeline():
    inner = inn.Lowered(inv.couple(mlp(4), mlp(4)))
    outer = inn.Lowered(inv.chain(inv.split(2), inner.op, inn.Coupling(mlp(4), sizes=None).op, inv.concat(2)))
    x = torch.randn(2, 8, requires_grad=True)
    assert close(outer.inverse(outer(x)), x)
    plain = copy.deepcopy(outer)
    plain.checkpoint = False
    assert_same_gradients(gradients(outer, x), gradients(plain, x))


def test_a_layer_is_live_inside_an_op():
    layer = inn.Linear(4, 4)
    net = inn.Lowered(inv.chain(layer.op, inv.ops.tanh(), inv.invert(layer.op)))
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias"]
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    x = torch.randn(2, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
        layer.bias.zero_()
    assert close(net(x), torch.tanh(x)) and close(net.inverse(net(x)), x)
    functional = functional_call(net, {"0.bias": torch.ones(4)}, (x,))
    assert not close(functional, torch.tanh(x))


def test_names_are_not_called():
    with pytest.raises(OptionError, match="names of an op's modules"):
        inn.Lowered(pipeline(1)).get_submodule("1")()


# ---- Sequential and Coupling -----------------------------------------------------------------------------------------


def test_sequential_is_one_pipeline():
    net = inn.Sequential(
        nn.Linear(6, 8), inn.Coupling(mlp(4), mlp(4)), inv.ops.tanh(), inn.Linear(8, 8), nn.Linear(8, 2)
    )
    x = torch.randn(3, 6, requires_grad=True)
    plain = copy.deepcopy(net)
    plain.checkpoint = False
    assert close(net(x), plain(x))
    assert_same_gradients(gradients(net, x), gradients(plain, x))
    with pytest.raises(NotInvertibleError, match="Linear"):
        net.inverse(net(x))
    assert close(net[1:4].inverse(net[1:4](net[0](x))), net[0](x))


def test_sequential_takes_an_ordered_dict_and_loads_what_nn_sequential_saved():
    layers = OrderedDict(first=nn.Linear(3, 3), act=nn.Tanh(), last=nn.Linear(3, 3))
    plain = nn.Sequential(copy.deepcopy(layers))
    ours = inn.Sequential(OrderedDict(first=inn.Linear(3, 3), act=inv.ops.tanh(), last=inn.Linear(3, 3)))
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3)
    assert close(ours(x), plain(x)) and close(ours.inverse(ours(x)), x)


def test_sequential_respects_the_flags_of_its_children():
    calls = []
    net = nn.Linear(2, 2)
    net.register_forward_pre_hook(lambda *_: calls.append(1))  # a recomputed layer stops before it has an output
    seq = inn.Sequential(inn.Coupling(net), inn.Coupling(net))
    for flags, expected in (({}, 4), ({"invertible": False}, 4), ({"checkpoint": False}, 3)):
        calls.clear()
        with seq[0].temp_mode(**flags):
            seq(torch.randn(2, 4)).sum().backward()
        assert len(calls) == expected


def test_sequential_reversed_is_the_inverse():
    net, x = inn.Sequential(inn.Linear(3, 3), inv.ops.sinh()), torch.randn(2, 3)
    y = net(x)
    assert net.reverse() is net and net.reversed
    assert close(net(y), x) and close(net.inverse(x), y)
    assert net.reverse(False)(x).equal(y)
    with pytest.raises(NotInvertibleError, match="Sequential is not reversible"):
        inn.Sequential(nn.ReLU()).reverse()


def test_sequential_frees_what_is_inside_whatever_the_depth():
    x = torch.randn(64, 256)
    held = []
    for depth in (4, 16):
        net = inn.Sequential(*(inn.Coupling(nn.Linear(128, 128)) for _ in range(depth)))
        net(x)
        held.append(measure(net, x).held_bytes)
    assert held == [x.nbytes, x.nbytes]


@pytest.mark.parametrize("options", [{}, {"dim": -1}, {"interleaved": True}, {"sizes": [4, 4]}, {"law": inv.affine}])
def test_coupling_is_the_chain(options):
    nets = [mlp(4), mlp(4)]
    if options.get("law"):
        nets = [inv.ops.tanh_scale(mlp(4, 8)), inv.ops.tanh_scale(mlp(4, 8))]
    module, x = inn.Coupling(*nets, **options), torch.randn(2, 8, requires_grad=True)
    law = options.pop("law", inv.additive)
    parts = inv.split(options.pop("sizes", 2), **options)
    assert torch.equal(module(x), inv.chain(parts, inv.couple(*nets, law=law), ~parts)(x))
    assert close(module.inverse(module(x)), x)


def test_coupling_of_components():
    module = inn.Coupling(mlp(4), sizes=None)
    x = torch.randn(2, 4), torch.randn(2, 4)
    y = module(*x)
    assert torch.equal(y[1], x[1]) and close(module.inverse(*y)[0], x[0])


# ---- layers ----------------------------------------------------------------------------------------------------------

LAYERS = {
    "Linear": (lambda: inn.Linear(4, 4), (3, 4)),
    "Linear tall": (lambda: inn.Linear(4, 6), (3, 4)),
    "Linear without bias": (lambda: inn.Linear(4, 4, bias=False), (3, 4)),
    "OrthogonalLinear": (lambda: inn.OrthogonalLinear(4, 4), (3, 4)),
    "OrthogonalLinear tall": (lambda: inn.OrthogonalLinear(4, 6), (3, 4)),
    "LULinear": (lambda: inn.LULinear(4), (3, 4)),
    "Conv1d": (lambda: inn.Conv1d(2, 6, 3, 3), (2, 2, 9)),
    "Conv2d": (lambda: inn.Conv2d(2, 8, 2, stride=2), (2, 2, 4, 6)),
    "Conv2d 1x1": (lambda: inn.Conv2d(3, 3, 1), (2, 3, 4, 4)),
    "Conv2d groups": (lambda: inn.Conv2d(2, 10, 2, stride=2, groups=2), (2, 2, 4, 4)),
    "Conv2d padded": (lambda: inn.Conv2d(2, 9, 2, stride=2, padding=1), (2, 2, 4, 4)),
    "Conv2d overlapping": (lambda: inn.Conv2d(1, 9, 3, stride=1, patchwise=False), (2, 1, 5, 5)),
    "Conv3d": (lambda: inn.Conv3d(1, 8, 2, stride=2), (2, 1, 4, 4, 2)),
    "BatchNorm1d": (lambda: inn.BatchNorm1d(3).eval(), (4, 3)),
    "BatchNorm2d": (lambda: inn.BatchNorm2d(3).eval(), (4, 3, 2, 2)),
    "BatchNorm3d": (lambda: inn.BatchNorm3d(3, affine=False).eval(), (4, 3, 2, 2, 2)),
    "ActNorm": (lambda: inn.ActNorm(3), (4, 3, 2)),
    "Identity": (lambda: inn.Identity(54, unused=1), (2, 3)),
    "PixelShuffle": (lambda: inn.PixelShuffle(2), (1, 8, 2, 3)),
    "PixelShuffle anisotropic": (lambda: inn.PixelShuffle((1, 2), channels_first=False), (1, 8, 2, 3)),
    "PixelUnshuffle": (lambda: inn.PixelUnshuffle(2), (1, 2, 4, 6)),
    "Flatten": (lambda: inn.Flatten(dims=(3, 4)), (2, 3, 4)),
    "Pad": (lambda: inn.Pad([1, 2, 0, 1]), (1, 1, 3, 3)),
    "SplineCoupling": (lambda: inn.SplineCoupling(mlp(2, 22), mlp(2, 22), bins=4), (3, 4)),
}
ALL = pytest.mark.parametrize("name", LAYERS)


def test_every_layer_is_tested():
    """But for those that hold what they are given, and bases."""
    classes = {name for name in inn.__all__ if isinstance(getattr(inn, name), type)}
    of_others = {"Lowered", "Module", "Coupling", "InvertibleModule", "Layer", "Sequential"}
    assert classes - {name.partition(" ")[0] for name in LAYERS} == of_others


@ALL
def test_layers_undo_themselves_and_have_the_gradients_of_plain_autograd(name):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert torch.allclose(layer.inverse(y), x, atol=1e-6)
    plain = copy.deepcopy(layer)
    plain.checkpoint = False
    assert close(plain(x), y)
    assert_same_gradients(gradients(layer, x), gradients(plain, x))
    assert layer.check(x)


@ALL
def test_layers_invert_lowered_with_the_gradients_of_plain_autograd(name):
    make, shape = LAYERS[name]
    layer = make()
    with torch.no_grad():
        y = layer(torch.randn(shape))
    if not layer.reversible:
        return
    plain = copy.deepcopy(layer)
    plain.checkpoint = False
    for module in (layer, plain):
        module.forward = module.inverse
    y.requires_grad_()
    expected = gradients(plain, y)
    found = gradients(layer, y)
    for key, gradient in expected.items():
        assert gradient is None or torch.allclose(found[key], gradient, rtol=1e-7, atol=1e-8)


@ALL
def test_layers_copy_and_save(name):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    if "Orthogonal" not in name:  # torch's parametrizations do not pickle
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), y)


TORCH = {
    "Linear": (nn.Linear, (3, 4), {}),
    "Conv1d": (nn.Conv1d, (2, 6, 3, 3), {}),
    "Conv2d": (nn.Conv2d, (2, 8, 2), {"stride": 2}),
    "Conv3d": (nn.Conv3d, (1, 8, 2, 2), {}),
    "BatchNorm1d": (nn.BatchNorm1d, (3,), {}),
    "BatchNorm2d": (nn.BatchNorm2d, (3,), {"momentum": None}),
    "BatchNorm3d": (nn.BatchNorm3d, (3,), {"track_running_stats": False}),
    "PixelShuffle": (nn.PixelShuffle, (2,), {}),
    "PixelUnshuffle": (nn.PixelUnshuffle, (2,), {}),
    "Flatten": (nn.Flatten, (1, 2), {}),
    "Identity": (nn.Identity, (), {}),
}


@pytest.mark.parametrize("name", TORCH)
def test_layers_are_torchs_own(name):
    """The same class, initialisation, state dict and representation."""
    base, args, options = TORCH[name]
    torch.manual_seed(1)
    theirs = base(*args, **options)
    torch.manual_seed(1)
    ours = getattr(inn, name)(*args, **options)
    assert isinstance(ours, base)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(t, theirs.state_dict()[k]) for k, t in ours.state_dict().items())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(theirs)


def test_flags_that_are_not_the_default_are_shown_and_saved():
    layer = inn.Linear(2, 2)
    layer.invertible, layer.seed = False, True
    assert repr(layer) == "Linear(in_features=2, out_features=2, bias=True, seed=True, invertible=False)"
    fresh = inn.Linear(2, 2)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.get_extra_state() == layer.get_extra_state()
    layer.checkpoint = False
    assert repr(layer).endswith("seed=True, checkpoint=False)")


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}])
@pytest.mark.parametrize("lowered", [True, False], ids=["alone", "in a pipeline"])
def test_batch_norm_trains_as_torchs(options, lowered):
    ours, theirs = inn.BatchNorm1d(3, **options), nn.BatchNorm1d(3, **options)
    module = ours if lowered else inn.Sequential(inn.Linear(3, 3), ours)
    plain = theirs if lowered else nn.Sequential(nn.Linear(3, 3), theirs)
    plain.load_state_dict(module.state_dict())
    for step in range(3):
        x = torch.randn(5, 3, requires_grad=True) * (1 + step)
        x = x.detach().requires_grad_()
        assert_same_gradients(gradients(module, x), gradients(plain, x))
    for (name, a), (_, b) in zip(module.state_dict().items(), plain.state_dict().items(), strict=True):
        assert close(a.double(), b.double()), name
    module.eval(), plain.eval()
    assert close(module(x), plain(x))
    assert_same_gradients(gradients(module, x), gradients(plain, x))


def test_batch_norm_needs_the_batch_to_be_undone():
    layer = inn.BatchNorm1d(3)
    with pytest.raises(NotInvertibleError, match="needs its residue"):
        layer.inverse(layer(torch.randn(4, 3)))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        layer(torch.randn(2, 3, 4, 4))


def test_orthogonal_stays_orthogonal_while_it_is_trained():
    layer = inn.OrthogonalLinear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 4)).pow(4).sum().backward()
        optimizer.step()
    assert torch.allclose(layer.weight @ layer.weight.T, torch.eye(4))
    x = torch.randn(2, 4)
    assert close(layer.inverse(layer(x)), x)


def test_flatten_needs_dims_to_be_undone_alone():
    layer, x = inn.Flatten(), torch.randn(2, 3, 4)
    with pytest.raises(NotInvertibleError):
        layer.inverse(layer(x))
    net = inn.Sequential(inn.Conv1d(3, 3, 1), layer)
    net(x).sum().backward()
    assert net[0].weight.grad is not None


def test_pad_takes_its_amounts_from_the_call_too():
    layer, x = inn.Pad(mode="reflect"), torch.randn(1, 4)
    assert torch.equal(layer(x, [1, 2]), nn.functional.pad(x, (1, 2), "reflect"))
    assert torch.equal(layer.inverse(layer(x, [1, 2]), [1, 2]), x)
    with pytest.raises(OptionError, match="Pad: no padding"):
        layer(x)
    with pytest.raises(OptionError, match=r"cure|Pad\(mode='reflect'\)"):
        inn.Pad("reflect")


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: inn.Linear(4, 3), "Linear: 3 outputs of 4 inputs, expected at least as many outputs"),
        (lambda: inn.Conv2d(2, 3, 1, dilation=2, padding="same"), "padding='same'"),
        (lambda: inn.Conv2d(2, 8, 2, 2, dilation=2), "dilation is (2, 2)"),
        (lambda: inn.Conv2d(2, 3, 2, 2), "at least 8"),
        (lambda: inn.Conv2d(1, 9, 3), "pass patchwise=False"),
        (lambda: inn.Conv2d(2, 8, 2, 2, padding_mode="reflect"), "a number of zeros"),
        (lambda: inn.PixelShuffle(0), "positive numbers"),
        (lambda: inn.Linear(2, 2).reverse().reverse() and inn.Pad([1, 1]).reverse(), "Pad is not reversible"),
    ],
)
def test_what_can_not_be_undone_is_refused_at_once(make, text):
    with pytest.raises((OptionError, NotInvertibleError)) as caught:
        make()
    assert text in str(caught.value)


def test_wires_that_do_not_fit_name_the_place():
    net = inn.Sequential(inn.Coupling(nn.Linear(2, 2)), inn.Linear(4, 4))
    with pytest.raises(WireError) as caught:
        net(torch.randn(2, 5))
    assert str(caught.value).startswith("chain stage 0 (split): split(2, dim=1) of (2, 5)")
