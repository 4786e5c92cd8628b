"""`ActNorm`: what starts it and what does not, on one process; on several, see `distributed/ddp.py`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import assert_close, assert_refused
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import invfunc as inv
from invfunc.errors import DomainError, OptionError, WireError

inn = inv.nn
F32, F64 = torch.float32, torch.float64


def batch(*shape: int) -> Tensor:
    """A batch with another mean and variance in each channel."""
    return torch.randn(shape) * torch.arange(1.0, shape[1] + 1).reshape(-1, *[1] * (len(shape) - 2)) * 9 + 5


def assert_normal(y: Tensor) -> None:
    """Every channel has mean 0 and variance 1."""
    y = y.detach().transpose(0, 1).flatten(1)
    assert_close(y.mean(1), torch.zeros(len(y)), 1e-5)
    assert_close(y.std(1, correction=0), torch.ones(len(y)), 1e-5)


def behind(layer: nn.Module) -> nn.Module:
    """A network that loses its first layer's statistics to an `ActNorm`."""
    return nn.Sequential(layer, inn.ActNorm(3))


# ---- the first batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 3), (8, 3, 5), (2, 3, 4, 4), (1, 3, 4, 4)])
def test_the_first_training_batch_gets_mean_0_and_variance_1(shape: tuple[int, ...]) -> None:
    layer, x = inn.ActNorm(3), batch(*shape)
    assert torch.equal(layer.eval()(x), x) and not layer.initialised
    assert_normal(layer.train()(x))
    assert layer.initialised
    before = [p.detach().clone() for p in layer.parameters()]
    layer(batch(4, *shape[1:])).sum().backward()
    assert_close(list(layer.parameters()), before, 0)
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("mode", ["invert", "recompute", "store"])
def test_it_starts_inside_of_a_lowered_call(mode: str) -> None:
    norm, mixing = inn.ActNorm(4), inn.Linear(4, 4)
    op = inv.chain(mixing.op, norm.op, inv.split(2), inv.couple(nn.Linear(2, 2)), inv.concat(2), inn.ActNorm(4).op)
    fast, x = inv.checkpoint(op, mode=mode), batch(64, 4).requires_grad_()
    y = fast(x)
    assert norm.initialised
    assert_normal(y)
    found = torch.autograd.grad(y.pow(3).sum(), [x, norm.log_scale, mixing.weight])
    assert_close(found, torch.autograd.grad(op(x).pow(3).sum(), [x, norm.log_scale, mixing.weight]), 1e-9)


def blockwise(module: nn.Module) -> nn.Module:
    inn.checkpoint_blocks(module, "*")
    return module


@pytest.mark.parametrize("lower", [inv.checkpoint, blockwise, inn.Lowered], ids=["checkpoint", "blocks", "Lowered"])
@pytest.mark.parametrize("make", [inn.Sequential, nn.Sequential])
def test_a_module_that_runs_again_starts_once(make: Callable[..., nn.Module], lower: Callable[..., Any]) -> None:
    module, x = make(inn.ActNorm(4), inn.Linear(4, 4), inn.ActNorm(4)), batch(8, 4).requires_grad_()
    wrt = [x, *module.parameters()]
    fast = lower(module)
    found = torch.autograd.grad(fast(x).pow(3).sum(), wrt)
    assert all(norm.initialised for norm in (module[0], module[2]))
    assert_close(found, torch.autograd.grad(fast(x).pow(3).sum(), wrt), 1e-12)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
def test_it_starts_inside_of_a_compiled_call() -> None:
    layer, x = inn.ActNorm(3), batch(64, 3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_normal(compiled(x))
    assert layer.initialised
    assert_close(compiled(2 * x), layer(2 * x))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
def test_a_channel_that_is_not_finite_does_not_start_inside_of_a_compiled_call() -> None:
    layer, x = inn.ActNorm(3), batch(64, 3)
    bad = x.clone()
    bad[5, 1] = torch.nan
    torch.compile(layer, backend="eager", fullgraph=True)(bad)
    assert layer.log_scale[1] == layer.bias[1] == 0
    assert_normal(layer(x)[:, [0, 2]])


def test_neither_a_transform_nor_a_meta_tensor_starts_it() -> None:
    layer = inn.ActNorm(3)
    torch.func.grad(lambda x: layer(x).sum())(batch(4, 3))
    assert not layer.initialised
    with torch.device("meta"):
        assert inn.ActNorm(3)(torch.empty(4, 3)).is_meta


# ---- a batch that tells no scale ---------------------------------------------------------------------------------------


def test_a_batch_of_one_vector_leaves_the_start_to_the_next() -> None:
    layer, x = inn.ActNorm(3), batch(1, 3)
    assert torch.equal(layer(x), x) and not layer.initialised
    assert torch.equal(layer(x[:0]), x[:0]) and not layer.initialised
    assert_normal(layer(batch(64, 3)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("wrap", [lambda layer: layer, lambda layer: inv.checkpoint(inv.chain(layer, inv.ops.sinh()))])
def test_a_first_batch_that_is_not_finite_is_refused_and_the_next_starts(wrap: Any, value: float) -> None:
    layer, x = inn.ActNorm(3), batch(64, 3)
    bad = x.clone()
    bad[5, 1] = value
    message = (
        "ActNorm: the first batch, expected statistics that are finite, got NaN or infinity in channels [1]; mend what "
        "comes before; or call initialise on another batch"
    )
    for call in lambda: wrap(layer)(bad), lambda: layer.initialise(bad):
        assert_refused(DomainError, message, call, anywhere=True)
        assert not layer.initialised and not layer.log_scale.any() and not layer.bias.any()
    wrap(layer)(x)
    assert_normal(layer(x))


def test_a_later_batch_that_is_not_finite_changes_nothing() -> None:
    layer, x = inn.ActNorm(3), batch(64, 3)
    layer(x)
    before = layer.log_scale.detach().clone()
    assert layer(torch.full((2, 3), float("nan"))).isnan().all()
    assert torch.equal(layer.log_scale, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 300.0])
def test_a_constant_channel_is_centred_and_keeps_its_scale(value: float, dtype: torch.dtype) -> None:
    x = torch.randn(1000, 2).to(dtype)
    x[:, 1] = value
    log_scale, bias = inv.ops.actnorm_init(x)
    y = inv.ops.actnorm(log_scale, bias)(x)
    assert y.dtype == dtype and log_scale.dtype == torch.promote_types(dtype, torch.float32)
    assert log_scale[1] == 0
    assert_close(y[:, 1], torch.zeros_like(y[:, 1]), 1e-4)


@pytest.mark.parametrize(
    "dtype, size", [(F64, 1e-4), (F64, 1e-6), (F64, 1e-300), (F32, 1e-6), (F32, 1e-30), (F32, 1e20)]
)
def test_a_channel_of_small_or_large_numbers_gets_variance_1(dtype: torch.dtype, size: float) -> None:
    x = (torch.randn(1000, 2, dtype=F64) * torch.tensor([size, 1.0]) + torch.tensor([3 * size, 0.0])).to(dtype)
    y = inn.ActNorm(2, dtype=dtype)(x).detach().double()
    assert_close(y.mean(0), torch.zeros(2), 1e-4)
    assert_close(y.var(0, correction=0), torch.ones(2), 1e-12 if dtype is F64 else 1e-4)


def test_initialise_takes_one_vector() -> None:
    layer = inn.ActNorm(3)
    layer.initialise(torch.full((1, 3), 7.0))
    assert_close(list(layer.parameters()), [torch.zeros(3), torch.full((3,), -7.0)])
    assert layer.initialised


# ---- state dicts -------------------------------------------------------------------------------------------------------


def test_a_state_dict_without_its_keys_does_not_switch_the_start_off() -> None:
    net, pretrained = behind(nn.Linear(3, 3)), nn.Linear(3, 3)
    found = net.load_state_dict({f"0.{k}": v for k, v in pretrained.state_dict().items()}, strict=False)
    assert found.missing_keys == ["1.log_scale", "1.bias", "1.started"]
    assert_normal(net(batch(64, 3)))


def test_a_state_dict_without_its_keys_does_not_start_it_again() -> None:
    net = behind(nn.Linear(3, 3))
    net(batch(64, 3))
    before = net[1].log_scale.detach().clone()
    net.load_state_dict(nn.Sequential(nn.Linear(3, 3)).state_dict(), strict=False)
    net(batch(64, 3))
    assert torch.equal(net[1].log_scale, before)


def test_a_state_dict_of_a_model_that_has_not_started_leaves_the_start_to_come() -> None:
    net = behind(nn.Linear(3, 3))
    net.load_state_dict(behind(nn.Linear(3, 3)).state_dict())
    assert_normal(net(batch(64, 3)))
    net.load_state_dict(behind(nn.Linear(3, 3)).state_dict())
    assert not net[1].initialised
    assert_normal(net(batch(64, 3)))


@pytest.mark.parametrize("assign", [False, True])
def test_training_resumes_from_a_state_dict(assign: bool) -> None:
    first, second = behind(nn.Identity()), behind(nn.Identity())
    first(batch(64, 3))
    second.load_state_dict(copy.deepcopy(first.state_dict()), assign=assign)
    assert second[1].initialised
    x = batch(64, 3)
    assert torch.equal(second(x), first(x))


def test_an_older_state_dict_has_started_unless_all_of_it_is_0() -> None:
    for value in 0.0, 1.0:
        layer = inn.ActNorm(3)
        layer.load_state_dict({"log_scale": torch.zeros(3), "bias": torch.full((3,), value)})
        assert layer.initialised == bool(value)


def test_the_flag_can_be_set() -> None:
    layer, x = inn.ActNorm(3), batch(64, 3)
    layer.initialised = True
    assert torch.equal(layer(x), x)
    assert torch.equal(layer.state_dict()["started"], torch.tensor(True))


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state, as a user of `torch.func` keeps it."""
    return copy.deepcopy({name: tensor.detach() for name, tensor in net.state_dict().items()})


@pytest.mark.parametrize("wrap", [lambda call: call, lambda call: torch.compile(call, backend="eager")])
@pytest.mark.parametrize("lower", [lambda net: net, lambda net: inn.Sequential(*net)])
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
def test_functional_call_starts_from_the_state_that_it_is_given(lower: Any, wrap: Any) -> None:
    started, fresh, x = lower(behind(nn.Identity())), lower(behind(nn.Identity())), batch(64, 3)
    started(batch(64, 3))
    new, old = state_of(fresh), state_of(started)
    for _ in range(2):
        assert_normal(wrap(lambda x: torch.func.functional_call(started, new, (x,)))(x))
        y = wrap(lambda x: torch.func.functional_call(fresh, old, (x,)))(x)
        assert_close([y, old], [started(x), dict(started.state_dict())])
    assert started[1].initialised and not fresh[1].initialised
    assert_normal(fresh(x))


# ---- copies and averages -----------------------------------------------------------------------------------------------

AVERAGES: dict[str, Callable[[nn.Module], AveragedModel]] = {
    "mean": AveragedModel,
    "EMA": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "EMA of buffers": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_an_averaged_model_starts_with_its_model_and_never_again(average: Callable[[nn.Module], Any]) -> None:
    net = behind(nn.Linear(3, 3))
    mean = average(net)
    for _ in range(2):
        net(batch(64, 3))
        mean.update_parameters(net)
    assert mean.module[1].initialised
    assert_close(list(mean.module.parameters()), list(net.parameters()))
    mean.train()(batch(64, 3))
    assert_close(list(mean.module.parameters()), list(net.parameters()))


def test_a_copy_and_an_ensemble_start_as_their_model_has() -> None:
    fresh = inn.ActNorm(3)
    started = copy.deepcopy(fresh)
    started(batch(64, 3))
    assert copy.deepcopy(started).initialised and not copy.deepcopy(fresh).initialised
    stacked, buffers = torch.func.stack_module_state([started, copy.deepcopy(started)])
    x = batch(64, 3)
    ys = torch.func.vmap(lambda p, b: torch.func.functional_call(started, (p, b), (x,)))(stacked, buffers)
    assert_close(ys, torch.stack([started(x)] * 2))


# ---- refused -----------------------------------------------------------------------------------------------------------


def test_a_start_that_would_be_lost_is_refused() -> None:
    net = inn.Sequential(inn.Linear(3, 3), inn.ActNorm(3))
    message = (
        "fully_shard_blocks: 1, an ActNorm, has not started, expected one that has seen its first batch; call the model "
        "in training mode before, or load a state dict"
    )
    assert_refused(OptionError, message, lambda: inn.fully_shard_blocks(net))


def test_an_input_without_channels_is_named() -> None:
    assert_refused(
        WireError,
        "actnorm_init: the input, expected a tensor of at least 2 dims",
        lambda: inn.ActNorm(3)(torch.ones(3)),
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(4, 5), "ActNorm: the input, expected size 3 along dim 1, got (4, 5)"),
        (None, "actnorm_init: the input, expected a tensor of at least 2 dims, got None"),
        (torch.ones(4, 3, dtype=torch.int64), "actnorm_init: the input, expected a floating-point tensor, got torch.i"),
        (torch.ones(4, 3, dtype=torch.complex64), "actnorm_init: the input, expected real numbers, got torch.complex"),
    ],
)
def test_what_it_can_not_start_from_is_named_and_starts_nothing(bad: Any, message: str) -> None:
    layer = inn.ActNorm(3)
    for call in lambda: layer(bad), lambda: layer.initialise(bad), lambda: inn.Sequential(layer)(bad):
        assert_refused(WireError, message, call, anywhere=True)
    assert not layer.initialised and not layer.bias.any()


def test_a_first_batch_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, checked, check = [inn.ActNorm(3), inn.ActNorm(3)], [], inn.ActNorm._check
    monkeypatch.setattr(inn.ActNorm, "_check", lambda layer, x: [checked.append(x), check(layer, x)])
    x = batch(4, 3)
    layers[0](x), layers[0](x), layers[1].initialise(x)
    assert len(checked) == 2


def test_the_op_of_a_module_has_a_log_determinant_that_follows_the_module() -> None:
    norm, x = inv.nn.ActNorm(3), torch.randn(64, 3) * 5 + 7
    flow = inv.flow(norm.op, torch.distributions.Normal(torch.zeros(3), 1.0))
    before = inv.log_det(norm.op, x)[1]  # starts the module
    with torch.no_grad():
        norm.log_scale.add_(1.0)
    assert_close(inv.log_det(norm.op, x)[1], before + 3)
    assert_close(inv.log_det(inv.invert(norm.op), norm(x))[1], -before - 3)
    flow.log_prob(x).sum().backward()
    assert norm.log_scale.grad is not None and norm.log_scale.grad.abs().min() > 0


@pytest.mark.parametrize("names", [["started"], ["started", "bias"], ["started", "log_scale"]])
def test_a_flag_without_its_scale_and_shift_starts_nothing(names: list[str]) -> None:
    norm, other, x = inv.nn.ActNorm(3), inv.nn.ActNorm(3), torch.randn(64, 3) * 5 + 7
    norm(x)
    other.load_state_dict({name: norm.state_dict()[name] for name in names}, strict=False)
    assert not other.initialised
    assert_close(other(x).mean(0), torch.zeros(3), 1e-9)


def test_an_average_with_buffers_is_updated_more_than_once() -> None:
    norm = inv.nn.ActNorm(3)
    norm(torch.randn(64, 3))
    average = torch.optim.swa_utils.AveragedModel(norm, use_buffers=True)
    for _ in range(3):
        average.update_parameters(norm)
    assert_close(average.module.log_scale, norm.log_scale)
    assert average.module.initialised
