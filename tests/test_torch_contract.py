"""What every private name of torch has to do on this torch, and what happens on one that has it no more."""

import ast
import contextlib
import importlib
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import traced_by_jit
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from without import is_tried

import invfunc as inv
from invfunc import _torch
from invfunc.errors import TorchNameError

PACKAGE = Path(inv.__file__).parent
CONTRACTS: dict[str, Callable[[], None]] = {}


def looked_up() -> list[str]:
    """The names that `_torch.py` looks up, in order."""
    calls = [node for node in ast.walk(ast.parse(Path(_torch.__file__).read_text())) if isinstance(node, ast.Call)]
    found = [call.args[0] for call in calls if ast.unparse(call.func) in ("_private", "_attribute", "_getter")]
    texts = [arg.value for arg in found if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return [*dict.fromkeys(texts), "torch._dynamo.variables.torch.get_overridable_functions"]  # a variable there


def contract(*paths: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """What names of torch have to do."""

    def registered(fn: Callable[[], None]) -> Callable[[], None]:
        CONTRACTS.update(dict.fromkeys(paths, fn))
        return fn

    return registered


# Attributes that are set, or asked of what is there.
UNSEEN = ["_dynamo_marked_constant", "_check_input_dim", "in_compiled_backward", "OptimizedModule"]
UNSEEN += [
    "torch.utils.checkpoint._enable_checkpoint_early_stop",
    "torch.utils.checkpoint._checkpoint_debug_enabled",
    "torch.Tensor._base",
    "torch.Tensor._version",
    "torch.nn.Module.__dict__",
    "torch.autograd.graph.Node.metadata.parent_",
]


def found(path: str) -> Any:
    """What torch has there; the test fails where there is nothing."""
    return _torch.resolve_name(path)


def test_every_name_has_a_contract():
    assert set(looked_up()) | set(UNSEEN) == CONTRACTS.keys()


@pytest.mark.parametrize("path", [*looked_up(), *UNSEEN])
def test_contract(path):
    CONTRACTS[path]()


# ---- transforms ------------------------------------------------------------------------------------------------------


def inside(look: Callable[[Tensor], Any], transform: Any = torch.func.grad) -> list[Any]:
    """What a function sees of its input under a transform."""
    seen: list[Any] = []

    def fn(x: Tensor) -> Tensor:
        seen.append(look(x))
        return x.sum()

    transform(fn)(torch.ones(2, 3))
    return seen


TRANSFORMS = [torch.func.grad, torch.func.vmap, lambda fn: lambda x: torch.func.jvp(fn, (x,), (x,))]


@contract("torch._C._are_functorch_transforms_active")
def _() -> None:
    name = found("torch._C._are_functorch_transforms_active")
    for asks in (name, _torch._refuses_a_probe):
        assert not asks()
        for transform in TRANSFORMS:
            assert inside(lambda x, asks=asks: asks(), transform) == [True]


@contract("torch._C._functorch.is_functorch_wrapped_tensor")
def _() -> None:
    name = found("torch._C._functorch.is_functorch_wrapped_tensor")
    for asks in (name, _torch._has_no_storage):
        assert not asks(torch.ones(2)) and not asks(nn.Parameter(torch.ones(2))) and not asks(torch.eye(2).to_sparse())
        for transform in TRANSFORMS:
            assert inside(asks, transform) == [True]
            assert asks(inside(lambda x: x, transform)[0])  # the transform has ended


@contract("torch._C._get_tracing_state", "torch._C._set_tracing_state")
def _() -> None:
    state, set_state = found("torch._C._get_tracing_state"), found("torch._C._set_tracing_state")
    assert state() is None

    def fn(x: Tensor) -> Tensor:
        before = state()
        assert (before is not None) == torch.jit.is_tracing()
        set_state(None)
        hidden = x.exp()
        assert not torch.jit.is_tracing()
        set_state(before)
        return x + hidden

    for traced in traced_by_jit(fn, torch.ones(2)), traced_by_jit(_untraced_exp, torch.ones(2)):
        assert "exp" not in str(traced.graph)


def _untraced_exp(x: Tensor) -> Tensor:
    with _torch.untraced():
        hidden = x.exp()
    return x + hidden


@contract("torch._C._functorch.maybe_current_level", "torch._C._functorch.maybe_get_level")
def _() -> None:
    level, level_of = found("torch._C._functorch.maybe_current_level"), found("torch._C._functorch.maybe_get_level")
    assert level() is None and level_of(torch.ones(2)) == -1
    assert inside(lambda x: (level(), level_of(x))) == [(1, 1)]
    assert inside(lambda x: inside(lambda y: (level(), level_of(x), level_of(y)))) == [[(2, 1, 2)]]
    assert _torch._level_outside_of_transforms() is None and _torch._level_of_plain(torch.ones(2)) == -1


@contract("torch._C._functorch.get_unwrapped")
def _() -> None:
    unwrap = found("torch._C._functorch.get_unwrapped")
    assert inside(lambda x: unwrap(x).shape, torch.func.vmap) == [(2, 3)]
    assert inside(lambda x: _torch.is_wrapped(unwrap(x))) == [False]


@contract("torch._C._functorch.unwrap_if_dead")
def _() -> None:
    unwrap = found("torch._C._functorch.unwrap_if_dead")
    assert inside(lambda x: unwrap(x) is x) == [True]
    (dead,) = inside(lambda x: x)
    assert _torch.is_wrapped(dead) and not _torch.is_wrapped(unwrap(dead))
    assert torch.equal(2 * dead, 2 * torch.ones(2, 3))  # what the fallback relies on


@contract("torch._C._functorch.get_interpreter_stack", "torch._C._functorch.TransformType.Jvp")
def _() -> None:
    stack, jvp = found("torch._C._functorch.get_interpreter_stack"), found("torch._C._functorch.TransformType.Jvp")
    assert not stack()
    assert inside(lambda x: [t.key() == jvp for t in stack()], TRANSFORMS[2]) == [[True]]
    assert inside(lambda x: [t.key() == jvp for t in stack()]) == [[False]]


@contract(
    "torch._C._functorch.TransformType.Vmap",
    "torch._C._functorch.CVmapInterpreterPtr",
    "torch._C._functorch._add_batch_dim",
)
def _() -> None:
    vmap, size = found("torch._C._functorch.TransformType.Vmap"), found("torch._C._functorch.CVmapInterpreterPtr")
    stack, add = found("torch._C._functorch.get_interpreter_stack"), found("torch._C._functorch._add_batch_dim")

    def sizes(x: Tensor) -> Tensor:
        assert [size(t).batchSize() for t in stack() if t.key() == vmap] == [3]
        return add(torch.arange(3.0), 0, stack()[-1].level()) + x.sum()

    assert torch.equal(torch.func.vmap(sizes)(torch.zeros(3, 2)), torch.arange(3.0))


# ---- forward mode and gradients --------------------------------------------------------------------------------------


@contract("torch.autograd.forward_ad._current_level")
def _() -> None:
    for asks in (_torch._current_dual_level, _torch._takes_tangents):
        assert not asks()
        with forward_ad.dual_level():
            assert asks()
        assert inside(lambda x, asks=asks: asks(), TRANSFORMS[2]) == [True]
        assert inside(lambda x, asks=asks: asks()) == [False]


@contract("torch.autograd.forward_ad._set_fwd_grad_enabled")
def _() -> None:
    enabled = found("torch.autograd.forward_ad._set_fwd_grad_enabled")
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with enabled(False):
            y = 2 * x
        assert forward_ad.unpack_dual(y).tangent is None and forward_ad.unpack_dual(2 * x).tangent is not None


@contract("torch._C._set_grad_enabled")
def _() -> None:
    enable = found("torch._C._set_grad_enabled")
    enable(False)
    off = torch.is_grad_enabled()
    enable(True)
    assert not off and torch.is_grad_enabled()


@contract("torch.autograd.graph._engine_run_backward")
def _() -> None:
    x, unused = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    roots = [(_torch.gradient_edge(x.sin()), torch.ones(3)), (x.exp(), torch.ones(3))]
    for engine in (found("torch.autograd.graph._engine_run_backward"), _torch._grad):
        outputs, seeds = zip(*roots, strict=True)
        gx, none = engine(outputs, seeds, True, False, (x, unused), True, accumulate_grad=False)
        assert torch.allclose(gx, x.cos() + x.exp()) and none is None and x.grad is None
        roots = [(_torch.gradient_edge(x.sin()), torch.ones(3)), (x.exp(), torch.ones(3))]


# ---- nodes -----------------------------------------------------------------------------------------------------------


@contract("torch._C._autograd._get_sequence_nr", "torch.autograd.graph.Node._sequence_nr")
def _() -> None:
    position = found("torch._C._autograd._get_sequence_nr")
    x = torch.ones(2, requires_grad=True)
    before, between, after = x.exp(), position(), x.sin()
    assert before.grad_fn._sequence_nr() < between <= after.grad_fn._sequence_nr() < 2**63 - 1  # type: ignore[union-attr]
    assert not _torch.made_since(before.grad_fn, between) and _torch.made_since(after.grad_fn, between)


@contract("torch.autograd.graph.Node._saved_result")
def _() -> None:
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(x.exp().grad_fn._saved_result, x.exp())  # type: ignore[union-attr]
    assert [name for name, _ in _torch.saved_by((x * x).grad_fn)] == ["other", "self"]


# ---- Dynamo ----------------------------------------------------------------------------------------------------------


@contract("torch._C._dynamo.eval_frame.set_eval_frame")
def _() -> None:
    set_eval_frame, callback = found("torch._C._dynamo.eval_frame.set_eval_frame"), lambda *args: None
    assert set_eval_frame(None) is None
    before = set_eval_frame(callback)
    assert set_eval_frame(None) is callback and before is None


@contract(
    "torch._C._dynamo.eval_frame.set_code_exec_strategy",
    "torch._C._dynamo.eval_frame._FrameExecStrategy",
    "torch._C._dynamo.eval_frame._FrameAction",
)
def _() -> None:
    traced: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append("a graph")
        return graph.forward

    def fn(x: Tensor) -> Tensor:
        return x.exp()

    torch.compile(fn, backend=backend)(torch.ones(2))

    @_torch.unseen_by_dynamo
    def unseen(x: Tensor) -> Tensor:
        return x.exp()

    torch.compile(unseen, backend=backend)(torch.ones(2))
    assert traced == ["a graph"]


@contract("torch.utils.checkpoint._enable_checkpoint_early_stop")
def _() -> None:
    assert found("torch.utils.checkpoint._enable_checkpoint_early_stop") is None
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        assert not _torch.stops_early(True)
    assert _torch.stops_early(True)


@contract("torch.utils.checkpoint._checkpoint_debug_enabled")
def _() -> None:
    assert found("torch.utils.checkpoint._checkpoint_debug_enabled") is None
    with torch.utils.checkpoint.set_checkpoint_debug_enabled(True):
        assert _torch.debugs(False)
    assert not _torch.debugs(False)


@contract("_dynamo_marked_constant")
def _() -> None:
    def public() -> None: ...

    def ours() -> None: ...

    torch.compiler.assume_constant_result(public)
    assert vars(_torch.called_not_traced(ours)) == vars(public) != {}


@contract("torch._dynamo.variables.torch.get_overridable_functions")
def _() -> None:
    functions = found("torch._dynamo.variables.torch.get_overridable_functions")()
    assert isinstance(functions, set) and torch.exp in functions
    assert found("torch._dynamo.variables.torch.get_overridable_functions")() is functions


@contract("OptimizedModule")
def _() -> None:
    plain = nn.Linear(2, 2)
    assert _torch.is_compiled(torch.compile(plain)) and not _torch.is_compiled(plain)


@contract("in_compiled_backward")
def _() -> None:
    assert importlib.import_module("torch._dynamo.compiled_autograd").in_compiled_autograd_region is False
    assert not _torch.in_compiled_backward()


def test_compiled_autograd_without_its_flag(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo.compiled_autograd", types.ModuleType("empty"))
    assert not _torch.in_compiled_backward()
    with _torch.FakeTensorMode():
        assert _torch.in_compiled_backward()


# ---- modes and fake tensors ------------------------------------------------------------------------------------------


@contract("torch.utils._python_dispatch.TorchDispatchMode")
def _() -> None:
    seen: list[str] = []

    class Sees(found("torch.utils._python_dispatch.TorchDispatchMode")):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            assert hasattr(func, "decompose")  # what tells operators from others
            return func(*args, **(kwargs or {}))

    with Sees():
        torch.ones(2).exp()
    assert seen == ["aten::ones", "aten::exp"]


@contract("torch.utils._python_dispatch._disable_current_modes")
def _() -> None:
    with _torch.FakeTensorMode():
        with pytest.raises(TorchNameError, match="_disable_current_modes"):
            _torch._only_without_modes()
        with found("torch.utils._python_dispatch._disable_current_modes")():
            assert type(torch.ones(2)) is Tensor
        assert type(torch.ones(2)) is not Tensor
    with _torch._only_without_modes():
        pass


@contract(
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch._C._TorchDispatchModeKey.FAKE",
    "torch._C._get_dispatch_mode",
)
def _() -> None:
    mode_class, tensor_class = _torch.FakeTensorMode, _torch.FakeTensor
    asked = lambda: found("torch._C._get_dispatch_mode")(found("torch._C._TorchDispatchModeKey.FAKE"))  # noqa: E731
    for asks in (asked, lambda: _torch._mode_of_a_new_tensor(None)):
        assert asks() is None
        with mode_class(allow_non_fake_inputs=True) as mode:
            assert asks() is mode
    fake = mode.from_tensor(torch.ones(2, 3))
    assert type(fake) is tensor_class and fake.shape == (2, 3)
    assert _torch.fake_device(fake) == torch.device("cpu") and _torch.fake_device(torch.ones(2)) is None


@contract("torch.fx.experimental.proxy_tensor.get_proxy_mode")
def _() -> None:
    seen: list[bool] = []
    make_fx(lambda x: seen.append(_torch.is_making_graph()) or x.sin())(torch.ones(2))
    assert seen == [True] and not _torch.is_making_graph()


@contract(
    "torch._subclasses.fake_tensor.DataDependentOutputException",
    "torch._subclasses.fake_tensor.DynamicOutputShapeException",
    "torch._subclasses.fake_tensor.UnsupportedFakeTensorException",
)
def _() -> None:
    assert len({*_torch.LOOKS_AT_VALUES}) == 3 and all(issubclass(e, RuntimeError) for e in _torch.LOOKS_AT_VALUES)
    for looks in (Tensor.item, Tensor.nonzero):
        with _torch.FakeTensorMode(), pytest.raises(_torch.LOOKS_AT_VALUES):
            looks(torch.ones(1))


# ---- modules ---------------------------------------------------------------------------------------------------------


def module() -> nn.Module:
    made = nn.BatchNorm1d(3)
    made.child, made.twin, made.none = (child := nn.Linear(2, 2)), child, None
    made.register_buffer("shy", torch.ones(1), persistent=False)
    return made


@contract("torch.nn.Module._parameters", "torch.nn.Module._buffers", "torch.nn.Module._modules")
def _() -> None:
    asks = [
        (_torch.parameters_of, _torch._named_parameters),
        (_torch.buffers_of, _torch._named_buffers),
        (_torch.children_of, _torch._named_children),
    ]
    for private, public in asks:
        held = {name: value for name, value in private(module()).items() if value is not None}
        assert list(held) == list(public(module())) and len(held) >= 2


@contract(
    "torch.nn.Module._forward_hooks",
    "torch.nn.Module._forward_pre_hooks",
    "torch.nn.Module._backward_hooks",
    "torch.nn.Module._backward_pre_hooks",
)
def _() -> None:
    kinds = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
    for kind in kinds:
        hooked = nn.Linear(2, 2)
        assert not _torch.has_hooks(hooked)
        handle = getattr(hooked, f"register_{kind}")(lambda *args: None)
        assert _torch.has_hooks(hooked)
        handle.remove()
        assert not _torch.has_hooks(hooked)


@contract("torch.Tensor._backward_hooks", "torch.Tensor._post_accumulate_grad_hooks")
def _() -> None:
    for kind in ["hook", "post_accumulate_grad_hook"]:
        weight = torch.zeros(2, requires_grad=True)
        assert not _torch.have_gradient_hooks([weight])
        handle = getattr(weight, f"register_{kind}")(lambda g: None)
        assert _torch.have_gradient_hooks([weight])
        handle.remove()
        assert not _torch.have_gradient_hooks([weight])


@contract("_check_input_dim")
def _() -> None:
    _torch.check_input_dim(nn.BatchNorm2d(2), torch.ones(1, 2, 1, 1))
    with pytest.raises(ValueError, match="expected 4D input"):
        _torch.check_input_dim(nn.BatchNorm2d(2), torch.ones(1, 2))
    _torch.check_input_dim(nn.Identity(), torch.ones(1))


@contract("torch.nn.utils.stateless._reparametrize_module")
def _() -> None:
    for swap in (found("torch.nn.utils.stateless._reparametrize_module"), _torch._set_attributes):
        outer = module()
        tensors = {**dict(outer.named_parameters()), **dict(outer.named_buffers())}
        others = {name: 2.0 * value.detach() for name, value in tensors.items()}
        state, before = outer.state_dict(), list(tensors.items())
        for leaves_by_error in (False, True):
            with contextlib.suppress(ZeroDivisionError), swap(outer, dict(others)):
                assert outer.weight is others["weight"] and outer.child.bias is others["child.bias"]
                assert outer.shy is others["shy"]
                1 / (not leaves_by_error)
            after = [*outer.named_parameters(), *outer.named_buffers()]
            assert all(a == b and x is y for (a, x), (b, y) in zip(after, before, strict=True))
            assert outer.state_dict().keys() == state.keys()


@contract("torch.nn.utils.parametrize._cache")
def _() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with nn.utils.parametrize.cached():
        outside = layer.weight
        with _torch.parametrized_once():
            within = layer.weight
            assert within is layer.weight and within is not outside
        assert layer.weight is outside
    assert layer.weight is not outside


def test_whether_weights_are_cached_shows_without_the_cache():
    assert not _torch._is_caching()
    with nn.utils.parametrize.cached():
        assert _torch._is_caching()


@contract("torch.nn.utils.parametrize._cache_enabled")
def _() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert _torch.parametrized_so_far() is None
    with nn.utils.parametrize.cached():
        assert _torch.parametrized_so_far() == {}
        weight = layer.weight
        held = _torch.parametrized_so_far()
        assert held is not None and [*held.values()] == [weight]
        with _torch.under_parametrized(None):
            assert _torch.parametrized_so_far() is None and layer.weight is not weight
        assert layer.weight is weight
    with _torch.under_parametrized(held):
        assert layer.weight is weight
    assert _torch.parametrized_so_far() is None and layer.weight is not weight


@contract("torch.nn.Module.__dict__")
def _() -> None:
    """A module keeps what it holds, and its hooks, in dicts of these names among its attributes."""
    layer = nn.BatchNorm1d(2)
    kept = {name: value for name, value in vars(layer).items() if isinstance(value, dict)}
    assert SPELLED["Module"].keys() <= kept.keys()
    assert kept["_parameters"]["weight"] is layer.weight and kept["_buffers"]["running_mean"] is layer.running_mean
    layer.register_forward_hook(lambda *args, **kwargs: None, with_kwargs=True, always_call=True)
    layer.register_forward_pre_hook(lambda *args: None, with_kwargs=True)
    layer.register_full_backward_hook(lambda *args: None)
    layer.register_full_backward_pre_hook(lambda *args: None)
    assert all(kept[name] for name in SPELLED["Module"] if "hook" in name)


# ---- trees -----------------------------------------------------------------------------------------------------------

TREES = [1, (1, 2), [1, (2, [3])], {"b": 1, "a": (2, None)}, torch.return_types.max((1, 2)), (), {}]


@contract("torch.utils._pytree")
def _() -> None:
    for tree in TREES:
        for trees in (found("torch.utils._pytree"), _torch._Trees):
            flat, spec = trees.tree_flatten(tree)
            assert flat == trees.tree_leaves(tree) and spec == trees.tree_flatten(tree)[1]
            back = trees.tree_unflatten(flat, spec)
            assert back == tree and type(back) is type(tree) and isinstance(spec, trees.TreeSpec)
            assert trees.tree_map_only(int, lambda n: n + 1, [tree, "a"])[1] == "a"
            assert trees.tree_flatten(tree, lambda node: True)[0] == [tree]
        if not isinstance(tree, torch.return_types.max):
            assert _torch._Trees.tree_leaves(tree) == found("torch.utils._pytree").tree_leaves(tree)


# ---- who holds a tensor ----------------------------------------------------------------------------------------------


@contract("torch.UntypedStorage._cdata")
def _() -> None:
    x, y = torch.ones(4), torch.ones(4)
    for identity in (lambda storage: storage._cdata, id):
        places = [identity(t.untyped_storage()) for t in (x, x[1:], x.detach(), y)]
        assert places[0] == places[1] == places[2] != places[3]


@contract("torch.Tensor._use_count", "torch._C._storage_Use_Count")
def _() -> None:
    x = torch.ones(4)
    one = found("torch.Tensor._use_count")(x)
    node = x.requires_grad_().square()
    assert one == 1 and found("torch.Tensor._use_count")(x) > 1 and node.shape == (4,)
    base = torch.ones(4)
    view = base[1:]
    count = found("torch._C._storage_Use_Count")
    lonely = torch.ones(4)
    alone = count(lonely.untyped_storage()._cdata)
    assert count(base.untyped_storage()._cdata) == alone + 1 and len(view) == 3
    assert _torch.storage_use_count(base.untyped_storage()) == alone + 1


@contract("torch.Tensor._is_view", "torch.Tensor._base")
def _() -> None:
    x = torch.ones(4)
    for asks in (found("torch.Tensor._is_view"), lambda t: t._base is not None):
        assert asks(x[1:]) and not asks(x) and not asks(x.detach()) and not asks(nn.Parameter(x))


@contract("torch.Tensor._version")
def _() -> None:
    x = torch.ones(4)
    view, alias, before = x[1:], x.detach(), x._version
    x.add_(1)
    view.add_(1)
    assert x._version == view._version == alias._version == before + 2
    with torch.inference_mode():
        inference = torch.ones(1)
    with pytest.raises(RuntimeError, match="version counter"):
        _ = inference._version


@contract("torch._C._swap_tensor_impl", "torch.Tensor._make_wrapper_subclass")
def _() -> None:
    class Wrapper(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotImplementedError

    x, y = torch.ones(4), torch.zeros(2)
    wrapper = found("torch.Tensor._make_wrapper_subclass")(Wrapper, x.shape, dtype=x.dtype, device=x.device)
    assert type(wrapper) is Wrapper and wrapper.shape == x.shape and wrapper.dtype == x.dtype
    places = x.data_ptr(), y.data_ptr()
    found("torch._C._swap_tensor_impl")(x, y)
    assert (y.data_ptr(), x.data_ptr()) == places and x.shape == (2,)


# ---- saved-tensor hooks ----------------------------------------------------------------------------------------------


@contract(
    "torch._C._autograd._push_saved_tensors_default_hooks",
    "torch._C._autograd._pop_saved_tensors_default_hooks",
    "torch._C._autograd._top_saved_tensors_default_hooks",
)
def _() -> None:
    path = "torch._C._autograd._{}_saved_tensors_default_hooks"
    top = found(path.format("top"))
    for push, pop in (
        (found(path.format("push")), found(path.format("pop"))),
        (_torch._enter_hooks, _torch._leave_hooks),
    ):
        seen: list[Tensor] = []
        hooks = (lambda t, seen=seen: seen.append(t) or len(seen) - 1), (lambda n, seen=seen: seen[n])
        x = torch.ones(2, requires_grad=True)
        assert top(False) is None and _torch._only_without_hooks(False) is None
        push(*hooks)
        y = x.exp()
        assert top(False) == hooks
        with pytest.raises(TorchNameError, match="_top_saved_tensors_default_hooks"):
            _torch._only_without_hooks(False)
        pop()
        x.exp()
        assert top(False) is None and len(seen) == 1
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)


@contract("torch._C._autograd._saved_tensors_hooks_disable")
def _() -> None:
    disable = found("torch._C._autograd._saved_tensors_hooks_disable")
    enable = torch._C._autograd._saved_tensors_hooks_enable
    _torch.push_hooks(_torch._same, _torch._same)
    try:
        disable("not here", False)  # although there are hooks
        with pytest.raises(RuntimeError, match="not here"):
            _torch.push_hooks(_torch._same, _torch._same)
    finally:
        enable()
        _torch.pop_hooks()
    with torch.autograd.graph.saved_tensors_hooks(str, str), pytest.raises(RuntimeError, match="nor here"):
        disable("nor here")
    enable()


@contract(
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._C._current_graph_task_id",
    "torch.autograd.Variable._execution_engine.queue_callback",
)
def _() -> None:
    keeps = found("torch._C._autograd._get_current_graph_task_keep_graph")
    task = found("torch._C._current_graph_task_id")
    at_end = found("torch.autograd.Variable._execution_engine.queue_callback")
    seen: list[Any] = []
    x = torch.ones(2, requires_grad=True)
    y = 2 * (z := 3 * x)
    z.register_hook(lambda g: seen.append((keeps(), task())))
    y.register_hook(lambda g: at_end(lambda: seen.append("end")))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    (first, one), _, (second, other), _ = seen
    assert seen[1] == seen[3] == "end" and first and not second
    assert task() < 0 <= one != other >= 0


@contract("torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack")
def _() -> None:
    def look(x: Tensor) -> list[bool]:
        with pytest.raises(TorchNameError, match="temporarily_clear"):
            _torch._only_without_transforms()
        with _torch.below_transforms():
            below = _torch.active()
        return [below, _torch.active()]

    for transform in TRANSFORMS:
        assert inside(look, transform) == [[False, True]]
    with _torch._only_without_transforms():
        pass


@contract("torch._C._vmapmode_increment_nesting", "torch._C._vmapmode_decrement_nesting")
def _() -> None:
    depths: list[Any] = []

    def look(gradient: Tensor) -> None:
        with _torch.below_transforms():
            depths.append((_torch.batched_depth(), torch.rand(()).shape))
        depths.append(_torch.batched_depth())
        with pytest.raises(RuntimeError, match="random operations inside of vmap"):
            torch.rand(())

    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(look)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert depths == [(0, ()), 1] and _torch.batched_depth() == 0


@contract("torch.autograd.Function._backward_cls")
def _() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

    x = torch.ones(2, requires_grad=True)
    node = Twice.apply(x).grad_fn
    assert type(node) is Twice._backward_cls and type(node).__name__ == "TwiceBackward"  # type: ignore[attr-defined]
    assert _torch.is_node_of(node, Twice) and not _torch.is_node_of(x.exp().grad_fn, Twice)


# ---- what surrounds a call -------------------------------------------------------------------------------------------


@contract("torch._C._is_any_autocast_enabled")
def _() -> None:
    asks = found("torch._C._is_any_autocast_enabled")
    assert not asks()
    with torch.autocast("cpu", torch.bfloat16):
        assert asks()


@contract("torch.Generator._cdata")
def _():
    for kind in (_torch.WholeState, _torch.mark_of):
        generator = torch.Generator()
        mark = kind(generator)
        seen = {mark.begin()}
        for _ in range(3):
            torch.rand(624, generator=generator)  # as many as it has words: the place of the next is the same
            seen.add(mark.read())
        assert len(seen) == 4 and mark.begin() == mark.read()
    generator.set_state(generator.get_state())
    assert mark.read() not in seen  # the whole state would be
    assert mark.begin() == mark.read() and len(b"".join(mark.read())) < 64


@contract("torch._C._len_torch_function_stack")
def _() -> None:
    count = found("torch._C._len_torch_function_stack")
    assert count() == 0 and _torch.default_device() is None
    with torch.device("meta"):
        assert count() == 1 and _torch.default_device() == torch.device("meta")


@contract("torch._C.DisableTorchFunction")
def _() -> None:
    seen: list[Any] = []

    class Sees(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Sees():
        with found("torch._C.DisableTorchFunction")():
            torch.sin(torch.ones(1))
        torch.exp(torch.zeros(1))
    assert torch.sin not in seen and torch.exp in seen


@contract("torch.autograd.graph.Node.metadata.parent_")
def _() -> None:
    x = torch.ones(2, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        y = x.sin()
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert y.grad_fn is not None and g.grad_fn is not None and "parent_" not in y.grad_fn.metadata
        assert g.grad_fn.metadata["parent_"] is y.grad_fn
        assert _torch.number_of(g.grad_fn) == _torch.number_of(y.grad_fn) < g.grad_fn._sequence_nr()


@contract("torch._C._get_fp32_precision_getter", "torch._C._set_fp32_precision_setter")
def _() -> None:
    read, write = found("torch._C._get_fp32_precision_getter"), found("torch._C._set_fp32_precision_setter")
    before, matmul = read("cuda", "matmul"), torch.backends.cuda.matmul
    try:
        write("cuda", "matmul", "tf32")
        assert matmul.fp32_precision == read("cuda", "matmul") == "tf32"
    finally:
        write("cuda", "matmul", before)


@contract("torch._C._len_torch_dispatch_stack", "torch._C._get_dispatch_stack_at")
def _() -> None:
    class Mode(_torch.DispatchMode):
        """Sees nothing."""

    assert _torch.dispatch_modes() == []
    with Mode() as outer, Mode() as inner:
        assert _torch.dispatch_modes() == [outer, inner]


@contract("torch._ops.OpOverload._schema")
def _() -> None:
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert "dropout_p" in _torch.arguments_of(attend) and "dropout_p" not in _torch.arguments_of(
        torch.ops.aten.mm.default
    )
    writers = (
        torch.ops.aten.relu_.default,
        torch.ops.aten.mm.out,
        torch.ops.aten.mm.default,
        torch.ops.aten.view.default,
    )
    assert list(map(_torch.writes_in_place, writers)) == [True, True, False, False]


@contract("torch._standard_gamma")
def _() -> None:
    torch.manual_seed(0)
    expected = torch.distributions.Gamma(2.0, 1.0).sample()
    torch.manual_seed(0)
    assert torch.equal(found("torch._standard_gamma")(torch.tensor(2.0)), expected)


@contract("torch.autograd._unsafe_preserve_version_counter")
def _() -> None:
    x = torch.ones(2)
    before = x._version
    with found("torch.autograd._unsafe_preserve_version_counter")(x):
        x.add_(1)
    assert x._version == before


# ---- methods of ours that torch calls by private names ----------------------------------------------------------------

# torch's own means to change what its classes do; ours are not called by a torch that does not know the name, and then:
OVERRIDES = {
    ("invfunc/nn/lowered.py", "_apply"): "the op of a module that was moved is built at every call, not once",
    (
        "invfunc/nn/lowered.py",
        "_save_to_state_dict",
    ): "a state dict goes round in a module that holds a closure of itself",
    ("invfunc/nn/lowered.py", "_load_from_state_dict"): "likewise",
    ("invfunc/nn/layers.py", "_apply"): "what a module has computed of its weights is of their dtype before",
    ("invfunc/nn/module.py", "_save_to_state_dict"): "flags that are the default are in the state dict, too",
    ("invfunc/nn/module.py", "_load_from_state_dict"): "a state dict without flags is refused",
    ("invfunc/nn/actnorm.py", "_load_from_state_dict"): "an older state dict has no flag: nothing has started",
    ("invfunc/ops/transforms.py", "_call"): "torch.distributions documents it",
    ("invfunc/ops/transforms.py", "_inverse"): "torch.distributions documents it",
}


def test_torch_calls_what_overrides_its_methods():
    lowered = inv.nn.Lowered(inv.couple(nn.Linear(2, 2)))
    before = lowered.make()
    lowered.to(torch.float32)
    assert lowered.make() is lowered._op and before is not None
    assert {"_apply", "_save_to_state_dict", "_load_from_state_dict"} <= set(dir(nn.Module))
    assert {"_call", "_inverse"} <= set(dir(torch.distributions.Transform))


# ---- without the names -----------------------------------------------------------------------------------------------

# What a name is needed for: there, its absence is an error that says so.
NEEDED = {
    "torch._C._functorch.maybe_current_level": {"transforms", "closures_under_transforms"},
    "torch._C._functorch.maybe_get_level": {"transforms", "closures_under_transforms"},
    "torch._C._functorch.get_unwrapped": {
        "transforms",
        "closures_under_transforms",
        "iterate",
        "iterate_while_cached",
        "check_domains",
    },
    "torch._C._autograd._get_sequence_nr": {"list_saved"},
    "torch.autograd.graph.Node._sequence_nr": {"list_saved"},
    "torch.autograd.graph.Node._saved_result": {"list_saved", "donate"},
    "torch._dynamo.variables.torch.get_overridable_functions": {"compile_"},
    "torch.utils._python_dispatch.TorchDispatchMode": {"look"},
    "torch.nn.utils.parametrize._cache": {"iterate_while_cached"},
    "torch.nn.utils.parametrize._cache_enabled": {"iterate_while_cached"},
    "torch.Tensor._use_count": {"donate"},
    "torch.UntypedStorage._cdata": {"donate"},
    "torch._C._storage_Use_Count": {"donate"},
    "torch._C._swap_tensor_impl": {"donate"},
    "torch.Tensor._make_wrapper_subclass": {"donate"},
    "torch.autograd.Variable._execution_engine.queue_callback": {"donate"},
}


@pytest.mark.parametrize("compiled", [True, False])
def test_without_a_name(compiled):
    """The package imports, and trains with plain autograd's gradient; or the error says what the feature needs."""
    names = [name for name in looked_up() if is_tried("compile_", name) is compiled]
    command = [sys.executable, str(Path(__file__).with_name("without.py")), *names]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == len(names)
    for line in printed:
        ((name, outcomes),) = json.loads(line).items()
        refused = {task for task, outcome in outcomes.items() if outcome.startswith("TorchNameError")}
        others = {task: outcome for task, outcome in outcomes.items() if task not in refused and outcome != "right"}
        assert not others, f"without {name}: {others}"
        assert refused == NEEDED.get(name, set()), name
        assert {"train", "train_large", "train_closure", "modules"} <= outcomes.keys() - refused
        assert NEEDED.get(name, set()) <= outcomes.keys()


# ---- nobody else asks ------------------------------------------------------------------------------------------------

# Files that still ask by themselves.
NOT_YET = [
    "engine/closures.py",  # Dynamo's variables and sources, by which it finds what a compiled function closes over
]

# Names that files may spell out, since a call of a function for each would be felt at every stage. All have contracts.
SPELLED = {
    "Tensor": {"_version": "read of every tensor that a call is given or saves"},
    "Module": {
        **dict.fromkeys(["_parameters", "_buffers", "_modules"], "read of every module, before and after every call"),
        **dict.fromkeys(["_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"], "as above"),
        **dict.fromkeys(["_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"], "as above"),
        **dict.fromkeys(["_backward_hooks", "_backward_pre_hooks"], "as above"),
    },
    "numpy.random.mtrand": {"_rand": "NumPy's, not torch's"},
}

# Private by their spelling alone.
PUBLIC = {"_replace", "_asdict", "_make"}  # of named tuples
PUBLIC |= {"_exit"}  # of Python's os
PUBLIC |= {"_actions", "_flows", "_transform"}  # not torch's: of argparse, normflows and nflows


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def of_torch() -> set[str]:
    """The private names of what the package has to do with."""
    node = torch.ones(1, requires_grad=True).exp().grad_fn
    samples = [torch, torch._C, nn.Linear(1, 1), torch.ones(1), torch.ones(1).untyped_storage(), node, torch.autograd]
    samples += [torch.autograd.Function, torch.autograd.graph, torch.distributions.Transform(), forward_ad]
    return {name for sample in samples for name in dir(sample) if is_private(name)}


def own_names(tree: ast.AST) -> Iterator[str]:
    """The names that a file gives to something."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def borrowed(tree: ast.Module, own: set[str], known: set[str]) -> Iterator[tuple[int, str]]:
    """``(line, name)`` of what a file takes from torch by a private name."""
    ours = {name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level for name in names(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, path) for path in paths if any(map(is_private, path.split("."))))
        elif isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names if alias.name.startswith("torch")]
            yield from ((node.lineno, path) for path in paths if any(map(is_private, path.split("."))))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in PUBLIC:
            root = ast.unparse(node.value)
            if root not in ours and (node.attr not in own or root.split(".")[0] in ("torch", "nn", "F", "Tensor")):
                yield node.lineno, f"{root}.{node.attr}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
            if node.value in known | {"_saved_", "_dynamo_marked_constant"} - own:
                yield node.lineno, repr(node.value)


def names(node: ast.ImportFrom) -> list[str]:
    return [alias.asname or alias.name for alias in node.names]


def test_only_one_file_knows_private_names():
    trees = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    own = {name for tree in trees.values() for name in own_names(tree)}
    known = of_torch()
    found = {name: list(borrowed(tree, own, known)) for name, tree in trees.items() if name != "_torch.py"}
    spelled = {name for group in SPELLED.values() for name in group}
    found = {
        name: [u for u in uses if u[1].strip("'").rpartition(".")[2] not in spelled] for name, uses in found.items()
    }
    assert {name: uses for name, uses in found.items() if uses and name not in NOT_YET} == {}
    assert sorted(NOT_YET) == sorted(name for name in NOT_YET if found[name])  # one that is done goes from the list


def test_what_overrides_methods_of_torch_is_listed():
    methods = {name for kind in (nn.Module, torch.distributions.Transform) for name in vars(kind) if is_private(name)}
    listed = {name for _, name in OVERRIDES}
    assert listed <= methods
    for path, name in OVERRIDES:
        assert f"def {name}(" in (PACKAGE.parent / path).read_text()
    for path in (PACKAGE / "nn").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in methods:
                assert (f"invfunc/nn/{path.name}", node.name) in OVERRIDES
