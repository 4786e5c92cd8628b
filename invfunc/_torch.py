"""Every private name of torch that the package uses, and what stands in for it in a torch that has it no more.

A name is looked up once, by `_private`, and one that is missing never breaks ``import invfunc``. Its *fallback* uses
public names only: it is slower, or leaves out an optimisation, or, where nothing public tells, raises `TorchNameError`
when it is needed. ``tests/test_torch_contract.py`` pins what each name has to do, and takes them away one by one.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import count
from operator import attrgetter
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils import parametrize
from torch.overrides import has_torch_function
from torch.utils import checkpoint as torch_checkpoint

from .errors import TorchNameError

if TYPE_CHECKING:
    import torch.utils._pytree as trees
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

T = TypeVar("T")

# ---- looking up ------------------------------------------------------------------------------------------------------


def _private(path: str, fallback: Any = None) -> Any:
    """What torch has under a private name, or the fallback."""
    try:
        return resolve_name(path)
    except (AttributeError, ImportError):
        return fallback


def _getter(path: str, sample: Any, fallback: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What reads a private attribute that only instances have, as a sample has it; or the fallback."""
    try:
        read = attrgetter(path.rpartition(".")[2])
        read(sample)
    except AttributeError:
        return fallback
    return read


def _attribute(path: str, sample: Any, fallback: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same where Dynamo traces: it knows no attrgetter."""
    name = path.rpartition(".")[2]
    return fallback if _getter(path, sample, fallback) is fallback else lambda item: getattr(item, name)


def _missing(path: str, feature: str) -> TorchNameError:
    return TorchNameError(f"{feature} needs {path}", got=f"torch {torch.__version__}, which has no such name")


def _refuse(path: str, feature: str) -> Callable[..., NoReturn]:
    """A fallback for what has none."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise _missing(path, feature)

    return refuse


# ---- transforms of torch.func ----------------------------------------------------------------------------------------


class _Probe(torch.autograd.Function):
    """Has no ``setup_context``, so that torch refuses it under a transform, and only there."""

    @staticmethod
    def forward(ctx: Any, x: None) -> None:
        return None


def _refuses_a_probe() -> bool:
    try:
        _Probe.apply(None)
    except RuntimeError:
        return True
    return False


def _has_no_storage(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return True
    return False


def _level_outside_of_transforms() -> int | None:
    if active():
        raise _missing("torch._C._functorch.maybe_current_level", "a function that is watched under a transform")
    return None


def _unwrapped_by_nobody(tensor: Tensor) -> Tensor:
    raise _missing("torch._C._functorch.get_unwrapped", "a value that is read under a transform")


def _level_of_plain(tensor: Tensor) -> int:
    if is_wrapped(tensor):
        raise _missing("torch._C._functorch.maybe_get_level", "a function that is watched under a transform")
    return -1


def _same(item: T) -> T:
    return item


# Whether a transform is running. Asked at every stage. Otherwise a Function that no transform takes tells.
active: Callable[[], bool] = _private("torch._C._are_functorch_transforms_active", _refuses_a_probe)

# Whether a tensor belongs to a transform, which has ended or not. Otherwise: it has no storage.
is_wrapped: Callable[[Tensor], bool] = _private("torch._C._functorch.is_functorch_wrapped_tensor", _has_no_storage)

# The number of transforms, one inside the other, or None. Otherwise only where there is none.
_current_level = _private("torch._C._functorch.maybe_current_level", _level_outside_of_transforms)

# The transform that a tensor belongs to. Otherwise only of a tensor that belongs to none.
_level_of = _private("torch._C._functorch.maybe_get_level", _level_of_plain)

# A tensor without its outermost wrapper, which every check of values needs. Otherwise nothing public tells.
_get_unwrapped = _private("torch._C._functorch.get_unwrapped", _unwrapped_by_nobody)

# A tensor without the wrappers of transforms that have ended. Otherwise as it is: torch's operators look through them.
_unwrap_if_dead = _private("torch._C._functorch.unwrap_if_dead", _same)

# The transforms that are running, to find a jvp among them. Otherwise none: `forward_ad`, which jvp enters, is asked.
_interpreters = _private("torch._C._functorch.get_interpreter_stack", tuple)
_JVP = _private("torch._C._functorch.TransformType.Jvp", object())

# A tensor with a dimension that a vmap hides, and how long it is. Otherwise a wire that has no samples is refused.
_VMAP = _private("torch._C._functorch.TransformType.Vmap", object())
_vmap_of = _private(
    "torch._C._functorch.CVmapInterpreterPtr",
    _refuse("torch._C._functorch.CVmapInterpreterPtr", "a wire that vmap does not map"),
)
_add_batch_dim = _private(
    "torch._C._functorch._add_batch_dim", _refuse("torch._C._functorch._add_batch_dim", "a wire that vmap does not map")
)


def level() -> int:
    """How many transforms are running, one inside the other."""
    current = _current_level()
    return 0 if current is None else current


def below(tensor: Tensor, height: int) -> Tensor:
    """A tensor without the wrappers of transforms above a level."""
    while _level_of(tensor) > height:
        tensor = _get_unwrapped(tensor)
    return tensor


def unwrapped(tensor: Tensor) -> Tensor:
    """The data below the wrappers: all samples of a ``vmap``, with its dimension."""
    while is_wrapped(tensor):
        tensor = _get_unwrapped(tensor)
    return tensor


def _levels_of(tensor: Tensor) -> Iterator[int]:
    while is_wrapped(tensor):
        yield _level_of(tensor)
        tensor = _get_unwrapped(tensor)


def in_every_vmap(tensor: Tensor) -> Tensor:
    """A tensor that has a sample for each one of every ``vmap`` that is running, be they the same."""
    levels = set(_levels_of(tensor))
    for transform in _interpreters() or ():
        if transform.key() == _VMAP and transform.level() not in levels:
            with below_transforms():
                zeros = torch.zeros(_vmap_of(transform).batchSize(), dtype=tensor.dtype, device=tensor.device)
            tensor = tensor + _add_batch_dim(zeros, 0, transform.level())
    return tensor


def alive(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """Tensors without the wrappers of transforms that have ended: `torch.func.vjp` runs backward after its own end."""
    return tuple([None if tensor is None else _unwrap_if_dead(tensor) for tensor in tensors])


# ---- forward mode ----------------------------------------------------------------------------------------------------


def _current_dual_level() -> bool:
    return forward_ad._current_level >= 0


def _takes_tangents() -> bool:
    try:
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
    except RuntimeError:
        return False
    return True


# Whether a level of `forward_ad` is open. Otherwise a dual tensor is made, which needs one.
_KNOWS_LEVEL = _private("torch.autograd.forward_ad._current_level") is not None
_in_dual_level = _current_dual_level if _KNOWS_LEVEL else _takes_tangents

# Computes values without tangents for a while. Otherwise with them, for nobody.
_set_forward_mode = _private("torch.autograd.forward_ad._set_fwd_grad_enabled", lambda enabled: nullcontext())


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed, by a transform or by `torch.autograd.forward_ad`."""
    if _in_dual_level():
        return True
    if not active():
        return False
    return any(transform.key() == _JVP for transform in _interpreters() or ())


def without_tangents() -> AbstractContextManager[Any]:
    """Do not compute forward-mode derivatives inside."""
    return _set_forward_mode(False)


# ---- gradients -------------------------------------------------------------------------------------------------------


def _grad(outputs: Any, seeds: Any, keep: bool, create: bool, sources: Any, *_: Any, **__: Any) -> Any:
    return torch.autograd.grad(outputs, sources, seeds, allow_unused=True)


# Turns gradients on or off, at a quarter of what the public context manager costs. Otherwise the public function.
_set_grad_enabled = _private("torch._C._set_grad_enabled", torch.set_grad_enabled)

# `torch.autograd.grad` without its checks, which take two thirds of its time. Otherwise with them.
_run_engine = _private("torch.autograd.graph._engine_run_backward", _grad)


def gradient_edge(tensor: Tensor) -> GradientEdge:
    """`torch.autograd.graph.get_gradient_edge`; without its ceremony where C++ owns the node."""
    node = tensor.grad_fn
    if node is None or isinstance(node, BackwardCFunction):
        return get_gradient_edge(tensor)
    return GradientEdge(node, tensor.output_nr)


def gradients(
    roots: Sequence[tuple[GradientEdge | Tensor, Tensor]], sources: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` of outputs and seeds that fit them: what it asks of them would take a third of the time."""
    outputs, seeds = zip(*roots, strict=True)
    if has_torch_function(tuple(sources)):
        return torch.autograd.grad(outputs, sources, seeds, allow_unused=True)
    return _run_engine(outputs, seeds, False, False, tuple(sources), True, accumulate_grad=False)


def with_gradients(enabled: bool, fn: Callable[..., T], *args: Any) -> T:
    """``fn(*args)`` under `torch.enable_grad` or `torch.no_grad`, at a quarter of what entering and leaving costs."""
    before = torch.is_grad_enabled()
    _set_grad_enabled(enabled)
    try:
        return fn(*args)
    finally:
        _set_grad_enabled(before)


# ---- nodes of the graph ----------------------------------------------------------------------------------------------

_NEVER = 2**63 - 1

# When a node was made, to tell those of one call from those before it. Otherwise every node counts as made before.
_position = _private("torch._C._autograd._get_sequence_nr")
_number = _private("torch.autograd.graph.Node._sequence_nr")
_KNOWS_NUMBERS = _position is not None and _number is not None


def graph_position() -> int:
    """A number that every autograd node made from now on, in this thread, reaches or exceeds."""
    return _position() if _KNOWS_NUMBERS else _NEVER


def made_since(node: Any, position: int) -> bool:
    """Whether a node was made after `graph_position` has told its position."""
    return _KNOWS_NUMBERS and node._sequence_nr() >= position


def number_of(node: Any) -> int:
    """The number of a node: those of one thread are numbered in the order in which they were made.

    A node that a backward has made, on whatever thread, has the number of the node whose backward it was, if anomaly
    mode was on. Otherwise it has one of its thread.
    """
    if not _KNOWS_NUMBERS:
        raise _missing("torch.autograd.graph.Node._sequence_nr", "a list of what a call has saved")
    while "parent_" in node.metadata:
        node = node.metadata["parent_"]
    return node._sequence_nr()


@lru_cache(1)
def _knows_what_it_saved() -> bool:
    with outside_modes(), torch.inference_mode(False), torch.enable_grad():
        node = torch.ones(1, device="cpu", requires_grad=True).exp().grad_fn
    return _attribute("torch.autograd.graph.Node._saved_result", node, _same) is not _same


def saved_by(node: Any) -> Iterator[tuple[str, Any]]:
    """``(name, value)`` of what a node of torch has saved."""
    if not _knows_what_it_saved():
        raise _missing("torch.autograd.graph.Node._saved_...", "a list of what a call has saved")
    for name in dir(node):
        if name.startswith("_saved_") and not name.startswith("_saved_tensors"):
            yield name.removeprefix("_saved_"), getattr(node, name)


def values_saved_by(node: Any) -> list[Any]:
    """All values that a node has saved, lists of tensors too; a `RuntimeError` once its backward has freed them."""
    if node is None:
        return []
    if not _knows_what_it_saved():
        raise _missing("torch.autograd.graph.Node._saved_...", "the donation of an input")
    return [getattr(node, name, None) for name in dir(node) if name.startswith("_saved_")]


# The class of the nodes that a Function makes. Otherwise its name tells.
_node_class = _attribute("torch.autograd.Function._backward_cls", _Probe, lambda function: None)


def is_node_of(node: Any, function: type[torch.autograd.Function]) -> bool:
    """Whether an autograd node was made by a Function."""
    kind = _node_class(function)
    return isinstance(node, kind) if kind is not None else type(node).__name__ == f"{function.__name__}Backward"


# ---- Dynamo ----------------------------------------------------------------------------------------------------------

# Lets frames run as they are where Dynamo has given up the one that calls, which may not set the stance. Otherwise the
# stance alone.
_set_eval_frame = _private("torch._C._dynamo.eval_frame.set_eval_frame", _same)

# Tells Dynamo to leave a function out. Otherwise it looks into it, which takes the longer to compile.
_set_strategy = _private("torch._C._dynamo.eval_frame.set_code_exec_strategy")
_STRATEGY = _private("torch._C._dynamo.eval_frame._FrameExecStrategy")
_ACTION = _private("torch._C._dynamo.eval_frame._FrameAction")


@contextmanager
def without_compiler() -> Iterator[None]:
    """Run compiled functions as they were written: Dynamo would trace what watches them, instead of being watched."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        yield
        return
    prior = _set_eval_frame(None)
    _STANCE.enter()
    try:
        yield
    finally:
        _STANCE.leave()
        _set_eval_frame(prior)


def unseen_by_dynamo(fn: Callable[..., T]) -> Callable[..., T]:
    """A function that Dynamo does not look into on its own, where it has given up the frame that calls it."""
    if not (_set_strategy is None or _STRATEGY is None or _ACTION is None):
        _set_strategy(fn.__code__, _STRATEGY(_ACTION.SKIP, _ACTION.SKIP))
    return fn


class _Stance:
    """Dynamo's stance is one for all threads: the first that enters sets it, the last that leaves sets it back."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.stack = ExitStack()

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                self.stack.enter_context(torch.compiler.set_stance("force_eager"))
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.stack.close()


_STANCE = _Stance()


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` makes of one. Otherwise none is: it is called as any module is."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # where it is not imported, nothing is compiled
    found = None if dynamo is None else getattr(dynamo, "OptimizedModule", None)
    return found is not None and isinstance(module, found)


def called_not_traced(fn: Callable[..., T]) -> Callable[..., T]:
    """A function that Dynamo calls while it traces: of an error that it traces it would show no more than the subject.

    `torch.compiler.assume_constant_result`, which would import Dynamo. Otherwise the function is traced.
    """
    setattr(fn, "_dynamo_marked_constant", True)  # noqa: B010 - pyright knows no such attribute
    return fn


def shown_to_modes(functions: Iterable[Callable[..., Any]]) -> None:
    """Let function modes see functions under Dynamo, as they do outside of it: it forgets those without overrides.

    Otherwise nothing public tells, and random numbers that a mode does not see would be others in backward.
    """
    path = "torch._dynamo.variables.torch.get_overridable_functions"  # looked up here, since it imports Dynamo
    _private(path, _refuse(path, "a pipeline under torch.compile"))().update(functions)  # it caches the set


def at_compile_time(fn: Callable[[Any], None]) -> None:
    """Run a function on what Dynamo knows, while it traces the frame that calls: its context is the argument."""
    from torch._dynamo.comptime import comptime  # looked up here, since it imports Dynamo

    comptime(fn)


def in_compiled_backward() -> bool:
    """Whether compiled autograd runs backward, which adds gradients up without looking for None.

    Otherwise whether tensors are fake, as they are while it traces.
    """
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    found = False if module is None else getattr(module, "in_compiled_autograd_region", None)
    return on_fake_tensors() if found is None else found


def run_backward(backward: Callable[..., Any], *args: Any) -> Any:
    """Call a backward; compiled autograd leaves it out of its graph, since it is no function of its arguments alone."""
    return torch.compiler.disable(backward)(*args) if in_compiled_backward() else backward(*args)


is_tracing: Callable[[], bool] = torch.jit.is_tracing  # pyright: ignore[reportPrivateImportUsage]

# Where `torch.jit.trace` writes down what is called. Otherwise it can not be asked to look away.
_tracing_state = _private("torch._C._get_tracing_state")
_set_tracing_state = _private("torch._C._set_tracing_state")
_CAN_LOOK_AWAY = not (_tracing_state is None or _set_tracing_state is None)


@contextmanager
def untraced() -> Iterator[None]:
    """Leave what is called inside out of a graph that `torch.jit.trace` makes."""
    if torch.compiler.is_compiling() or not is_tracing():
        yield
        return
    if not _CAN_LOOK_AWAY:
        raise _missing("torch._C._set_tracing_state", "a first batch that is traced")
    state = _tracing_state()
    _set_tracing_state(None)
    try:
        yield
    finally:
        _set_tracing_state(state)


# ---- modes and fake tensors ------------------------------------------------------------------------------------------


class _NoDispatchMode:
    """Stands for the class of a mode that sees operators: nothing public shows them."""

    def __init__(self) -> None:
        raise _missing("torch.utils._python_dispatch.TorchDispatchMode", "what measures, keeps or shows operators")


class _NoFakeTensor(Tensor):
    """Stands for the class of fake tensors: there are none."""


class _InEarnest:
    """Stands for the mode of fake tensors: real ones, which take their time and memory."""

    def __init__(self, allow_non_fake_inputs: bool = True) -> None:
        pass

    def __enter__(self) -> _InEarnest:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def from_tensor(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()


def _only_without_modes() -> AbstractContextManager[Any]:
    if type(torch.empty(0)) is not Tensor:
        raise _missing("torch.utils._python_dispatch._disable_current_modes", "what is kept from under a mode")
    return nullcontext()


def _mode_of_a_new_tensor(key: Any) -> Any:
    return getattr(torch.empty(0), "fake_mode", None)


if not TYPE_CHECKING:
    # Sees every operator with its tensors. Otherwise memory is not measured.
    DispatchMode = _private("torch.utils._python_dispatch.TorchDispatchMode", _NoDispatchMode)

    # Tensors that have shapes and no data. Otherwise sizes are found with real ones.
    FakeTensor = _private("torch._subclasses.fake_tensor.FakeTensor", _NoFakeTensor)
    FakeTensorMode = _private("torch._subclasses.fake_tensor.FakeTensorMode", _InEarnest)
    if FakeTensor is _NoFakeTensor:
        FakeTensorMode = _InEarnest

# What is raised where an op looks at the values of fake tensors, to go on with real ones. Otherwise after any error.
LOOKS_AT_VALUES: tuple[type[Exception], ...] = (
    _private("torch._subclasses.fake_tensor.DataDependentOutputException", RuntimeError),
    _private("torch._subclasses.fake_tensor.DynamicOutputShapeException", RuntimeError),
    _private("torch._subclasses.fake_tensor.UnsupportedFakeTensorException", RuntimeError),
)

# The mode of fake tensors, if it is on. Otherwise a new tensor tells.
_FAKE = _private("torch._C._TorchDispatchModeKey.FAKE")
_get_mode = _private("torch._C._get_dispatch_mode", _mode_of_a_new_tensor)
_get_mode = _mode_of_a_new_tensor if _FAKE is None else _get_mode

# Runs outside of every dispatch mode. Otherwise only where there is none.
outside_modes: Callable[[], AbstractContextManager[Any]] = _private(
    "torch.utils._python_dispatch._disable_current_modes", _only_without_modes
)


# How many dispatch modes are on, and which. Otherwise none is known.
_count_dispatch_modes = _private("torch._C._len_torch_dispatch_stack", lambda: 0)
_dispatch_mode_at = _private("torch._C._get_dispatch_stack_at", lambda place: None)


def dispatch_modes() -> list[Any]:
    """The dispatch modes of this thread, the innermost last; an autograd worker has those of the backward's caller."""
    count = _count_dispatch_modes()
    return [_dispatch_mode_at(place) for place in range(count)] if count else []


def fake_mode() -> FakeTensorMode | None:
    """The mode under which tensors have shapes and no data, if there is one."""
    return _get_mode(_FAKE)


# Where `make_fx` writes down what is called. Otherwise its graph has no gradients of what is lowered.
_proxy_mode = _private("torch.fx.experimental.proxy_tensor.get_proxy_mode", lambda: None)


def is_making_graph() -> bool:
    """Whether `make_fx` writes down what is called."""
    return _proxy_mode() is not None


def on_fake_tensors() -> bool:
    """Whether tensors have shapes and no data: a compiled function would read what is not there."""
    return fake_mode() is not None


def fake_device(tensor: Tensor) -> torch.device | None:
    """The device of a fake tensor, which every mode would be asked for; None where it is another one at the moment."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) and not tensor.fake_mode.in_kernel_invocation else None


# ---- modules ---------------------------------------------------------------------------------------------------------

_MODULE = nn.Module()


def _named_parameters(module: nn.Module) -> Mapping[str, Any]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def _named_buffers(module: nn.Module) -> Mapping[str, Any]:
    return dict(module.named_buffers(recurse=False, remove_duplicate=False))


def _named_children(module: nn.Module) -> Mapping[str, Any]:
    held = dict(nn.Module.named_children(module))  # not what a module of ours makes of it, which asks here
    twins = set(dir(module)).difference(dir(type(module)), vars(module), held)  # it names each module once
    return held | {name: child for name in sorted(twins) if isinstance(child := getattr(module, name), nn.Module)}


def _always(item: Any) -> bool:
    return True


# What a module holds under which name, None among it. Otherwise copies, without None.
parameters_of = _attribute("torch.nn.Module._parameters", _MODULE, _named_parameters)
buffers_of = _attribute("torch.nn.Module._buffers", _MODULE, _named_buffers)
children_of = _attribute("torch.nn.Module._modules", _MODULE, _named_children)

# Whether a call of a module does more than its ``forward``. Otherwise it is called as if it did.
_HOOKS = (
    _attribute("torch.nn.Module._forward_hooks", _MODULE, _always),
    _attribute("torch.nn.Module._forward_pre_hooks", _MODULE, _always),
    _attribute("torch.nn.Module._backward_hooks", _MODULE, _always),
    _attribute("torch.nn.Module._backward_pre_hooks", _MODULE, _always),
)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run when a module is called."""
    return any([hooks(module) for hooks in _HOOKS])


def check_input_dim(norm: Any, x: Tensor) -> None:
    """What torch's batch norms ask of their input. Otherwise its operator says what is wrong."""
    getattr(norm, "_check_input_dim", _same)(x)


@contextmanager
def _set_attributes(module: nn.Module, contents: dict[str, Tensor]) -> Iterator[None]:
    places = {name: (module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in contents}
    before = [(home, dict(parameters_of(home)), _buffers_and_kind(home)) for home, _ in places.values()]
    for name, (home, last) in places.items():
        delattr(home, last)
        setattr(home, last, contents[name])
    try:
        yield
    finally:
        for home, last in set(places.values()):
            delattr(home, last)
        for home, parameters, buffers in before:
            _put_back(home, parameters, buffers)


def _buffers_and_kind(module: nn.Module) -> dict[str, tuple[Any, bool]]:
    """What a module has registered as buffers, and whether a state dict shows it."""
    shown = module.state_dict().keys()
    return {name: (buffer, name in shown) for name, buffer in buffers_of(module).items()}


def _put_back(home: nn.Module, parameters: dict[str, Any], buffers: dict[str, tuple[Any, bool]]) -> None:
    """Register everything anew, in the order in which it was."""
    for name in [*parameters_of(home), *buffers_of(home)]:
        delattr(home, name)
    for name, parameter in parameters.items():
        home.register_parameter(name, parameter)
    for name, (buffer, persistent) in buffers.items():
        home.register_buffer(name, buffer, persistent)


# Puts tensors into a module for a while. Otherwise its attributes are set.
_swap = _private("torch.nn.utils.stateless._reparametrize_module", _set_attributes)


def substitute(module: nn.Module, contents: dict[str, Tensor]) -> AbstractContextManager[None]:
    """A module that holds other tensors inside, as under `torch.func.functional_call`."""
    return _swap(module, contents)


# What parametrized modules have computed, to be set aside, and whether ``parametrize.cached()`` is open. Otherwise an
# iteration inside of that is refused, and elsewhere a weight that it holds is computed again.
_KNOWS_CACHE = _private("torch.nn.utils.parametrize._cache") is not None
_KNOWS_CACHING = _KNOWS_CACHE and _private("torch.nn.utils.parametrize._cache_enabled") is not None


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Another tensor."""
        return 2 * x


def _is_caching() -> bool:
    """Whether a surrounding ``parametrize.cached()`` is open: one and the same tensor is read twice."""
    probe = nn.Module()
    probe.register_buffer("x", torch.ones(()))
    parametrize.register_parametrization(probe, "x", _Doubled())
    return probe.x is probe.x


class _ThreadWeights(dict[Any, Any]):
    """What `parametrize` holds weights in, for all threads: of each that asks for it its own, of the others theirs."""

    def __init__(self, others: dict[Any, Any] | None) -> None:
        super().__init__()
        self.others, self.inside, self.local = others, 0, threading.local()  # others: of an open ``cached()``

    @property
    def here(self) -> dict[Any, Any] | None:
        """What this thread holds weights in; None where it computes them each time."""
        return getattr(self.local, "weights", self.others)

    def get(self, key: Any, default: Any = None) -> Any:
        here = self.here
        return default if here is None else here.get(key, default)

    def __setitem__(self, key: Any, value: Any) -> None:
        here = self.here
        if here is not None:
            here[key] = value


_WEIGHTS_LOCK = threading.Lock()


@contextmanager
def _holding_weights(weights: dict[Any, Any] | None) -> Iterator[None]:
    """Have this thread hold its parametrized weights in a dict, or compute them each time; others do as they did."""
    with _WEIGHTS_LOCK:
        if not isinstance(parametrize._cache, _ThreadWeights):
            parametrize._cache = _ThreadWeights(parametrize._cache if parametrize._cache_enabled else None)
        shared = parametrize._cache
        parametrize._cache_enabled += 1
        shared.inside += 1
    before = vars(shared.local).copy()
    shared.local.weights = weights
    try:
        yield
    finally:
        del shared.local.weights
        vars(shared.local).update(before)
        with _WEIGHTS_LOCK:
            parametrize._cache_enabled -= 1
            shared.inside -= 1
            if not shared.inside:
                parametrize._cache = shared.others if shared.others and parametrize._cache_enabled else {}


@contextmanager
def parametrized_once() -> Iterator[None]:
    """Compute parametrized weights once inside; a surrounding ``parametrize.cached()`` is neither read nor changed."""
    if not _KNOWS_CACHING and _is_caching():
        raise _missing("torch.nn.utils.parametrize._cache", "an iteration inside of parametrize.cached()")
    with _holding_weights({}) if _KNOWS_CACHING else parametrize.cached():
        yield


# ---- trees of tuples, lists and dicts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spec:
    """A tree without its leaves."""

    kind: Any  # how to make the node of its parts; None for a leaf
    parts: tuple[_Spec, ...] = ()


@dataclass(frozen=True)
class _Dict:
    """Makes a dict of its values."""

    keys: tuple[Any, ...]

    def __call__(self, parts: Iterable[Any]) -> dict[Any, Any]:
        return dict(zip(self.keys, parts, strict=True))


class _Trees:
    """Stands for ``torch.utils._pytree``: tuples, named ones too, lists and dicts, and no class of somebody else."""

    TreeSpec = _Spec

    @staticmethod
    def tree_flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], _Spec]:
        if is_leaf is not None and is_leaf(tree):
            return [tree], _Spec(None)
        if type(tree) is dict:
            kind, parts = _Dict(tuple(tree)), list(tree.values())
        elif type(tree) in (tuple, list) or (isinstance(tree, tuple) and hasattr(tree, "_make")):
            kind, parts = getattr(type(tree), "_make", type(tree)), list(tree)
        else:
            return [tree], _Spec(None)
        flat = [_Trees.tree_flatten(part, is_leaf) for part in parts]
        return [leaf for leaves, _ in flat for leaf in leaves], _Spec(kind, tuple([spec for _, spec in flat]))

    @staticmethod
    def tree_unflatten(leaves: Iterable[Any], spec: _Spec) -> Any:
        left = iter(leaves)

        def build(spec: _Spec) -> Any:
            return next(left) if spec.kind is None else spec.kind([build(part) for part in spec.parts])

        return build(spec)

    @staticmethod
    def tree_leaves(tree: Any) -> list[Any]:
        return _Trees.tree_flatten(tree)[0]

    @staticmethod
    def tree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
        return _Trees.tree_map_only(object, fn, tree)

    @staticmethod
    def tree_map_only(kind: type, fn: Callable[[Any], Any], tree: Any) -> Any:
        leaves, spec = _Trees.tree_flatten(tree)
        return _Trees.tree_unflatten([fn(leaf) if isinstance(leaf, kind) else leaf for leaf in leaves], spec)


if not TYPE_CHECKING:
    # Takes nested containers apart, those of other libraries too. Otherwise Python's own alone.
    trees = _private("torch.utils._pytree", _Trees)


# ---- who holds a tensor ----------------------------------------------------------------------------------------------


# What tells storages from each other. Otherwise their Python objects, which live as long as they do.
storage_id: Callable[[torch.UntypedStorage], int] = getattr(_private("torch.UntypedStorage._cdata"), "__get__", id)

# How many holders a tensor has in C++ and Python together. Otherwise nothing is written in place, nor donated.
use_count: Callable[[Tensor], int] = _private(
    "torch.Tensor._use_count", _refuse("torch.Tensor._use_count", "the donation of an input")
)

# Lets a tensor be written without notice to who has saved it. Otherwise torch refuses their backward.
preserved_version: Callable[[Tensor], AbstractContextManager[Any]] = _private(
    "torch.autograd._unsafe_preserve_version_counter", nullcontext
)


def storage_of(tensor: Tensor) -> int:
    """Where a tensor lives: equal for tensors that share memory."""
    return storage_id(tensor.untyped_storage())


def parametrized_so_far() -> dict[Any, Any] | None:
    """The weights that an open ``parametrize.cached()`` holds; None where none is open."""
    if not (_KNOWS_CACHING and parametrize._cache_enabled):
        return None
    cache = parametrize._cache
    here = cache.here if isinstance(cache, _ThreadWeights) else cache
    return None if here is None else dict(here)


def under_parametrized(cache: dict[Any, Any] | None) -> AbstractContextManager[None]:
    """Run as `parametrized_so_far` found it."""
    return _holding_weights(None if cache is None else dict(cache))


# Whether a tensor is a view. Otherwise it is one if it has a base.
is_view: Callable[[Tensor], bool] = _private("torch.Tensor._is_view", lambda tensor: tensor._base is not None)


def base_of(tensor: Tensor) -> Tensor:
    """What a tensor is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def is_view_of_leaf(tensor: Tensor, given: Sequence[Tensor] = ()) -> bool:
    """Whether a tensor is a view of one that nobody has computed, such as a weight, and shares nothing with these."""
    base = tensor._base
    return base is not None and base.is_leaf and not any([base is t or base is t._base for t in given])


# What runs when the gradient of a leaf is there. Otherwise every leaf is said to have some.
_on_gradient = _getter("torch.Tensor._backward_hooks", Tensor, _always)
_after_accumulation = _getter("torch.Tensor._post_accumulate_grad_hooks", Tensor, _always)


def have_gradient_hooks(tensors: Sequence[Tensor]) -> bool:
    """Whether hooks run when the gradient of one of these tensors is there: they may write into the tensor."""
    return any(map(_on_gradient, tensors)) or any(map(_after_accumulation, tensors))


_DONATION = "the donation of an input"

# Gives two Python tensors each other's insides. Otherwise nothing is donated.
swap_insides: Callable[[Tensor, Tensor], None] = _private(
    "torch._C._swap_tensor_impl", _refuse("torch._C._swap_tensor_impl", _DONATION)
)

# Makes a tensor of a subclass that has a shape and no data. Otherwise nothing is donated.
make_wrapper: Callable[..., Any] = _private(
    "torch.Tensor._make_wrapper_subclass", _refuse("torch.Tensor._make_wrapper_subclass", _DONATION)
)

# How many hold a storage, by its address. Otherwise nothing is donated.
_count_storage = _private("torch._C._storage_Use_Count", _refuse("torch._C._storage_Use_Count", _DONATION))
if storage_id is id:  # no address to ask with
    _count_storage = _refuse("torch.UntypedStorage._cdata", _DONATION)


def storage_use_count(storage: torch.UntypedStorage) -> int:
    """How many hold a storage, its Python object among them."""
    return _count_storage(storage_id(storage))


# ---- saved-tensor hooks ----------------------------------------------------------------------------------------------


class _Open(threading.local):
    """The hooks that a thread has pushed by `_enter_hooks`."""

    def __init__(self) -> None:
        self.hooks: list[Any] = []


_OPEN = _Open()


def _enter_hooks(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    hooks.__enter__()
    _OPEN.hooks.append(hooks)


def _leave_hooks() -> None:
    _OPEN.hooks.pop().__exit__()


def _only_without_hooks(ignore_tracing: bool) -> None:
    """Torch refuses to turn hooks off where there are some."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("hooks are being looked for"):
            return
    except RuntimeError:
        raise _missing(
            "torch._C._autograd._top_saved_tensors_default_hooks", "a call below saved-tensor hooks"
        ) from None


# Put hooks in force, and take them back, at a fraction of what the public context manager costs. Otherwise by that.
push_hooks: Callable[..., Any] = _private("torch._C._autograd._push_saved_tensors_default_hooks", _enter_hooks)
pop_hooks: Callable[[], Any] = _private("torch._C._autograd._pop_saved_tensors_default_hooks", _leave_hooks)
if push_hooks is _enter_hooks or pop_hooks is _leave_hooks:  # they go in pairs
    push_hooks, pop_hooks = _enter_hooks, _leave_hooks

# The hooks in force. Otherwise only where there are none.
_top_hooks = _private("torch._C._autograd._top_saved_tensors_default_hooks", _only_without_hooks)

# Forbid hooks. Otherwise transforms that refuse hooks refuse those of this package, too.
_forbid_hooks = _private("torch._C._autograd._saved_tensors_hooks_disable")
_CAN_ALLOW = _forbid_hooks is not None and _top_hooks is not _only_without_hooks


def stops_early(early_stop: bool) -> bool:
    """Whether a replay stops early: `torch.utils.checkpoint.set_checkpoint_early_stop` goes before the option."""
    enforced = getattr(torch_checkpoint, "_enable_checkpoint_early_stop", None)
    return early_stop if enforced is None else enforced


def debugs(debug: bool) -> bool:
    """Whether operators are noted: `torch.utils.checkpoint.set_checkpoint_debug_enabled` goes before the option."""
    enforced = getattr(torch_checkpoint, "_checkpoint_debug_enabled", None)
    return debug if enforced is None else enforced


def top_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The saved-tensor hooks that are in force, such as those of `torch.autograd.graph.save_on_cpu`."""
    return _top_hooks(False)


def allow_hooks_below_transforms() -> None:
    """Let a `torch.func` transform begin below saved-tensor hooks that are this package's own.

    ``grad``, ``vjp``, ``jacrev`` and ``hessian`` refuse hooks of any kind, since a hook may do with a tensor of theirs
    what it wants (https://github.com/pytorch/pytorch/issues/95327). Ours number tensors, and give them back.
    """
    autograd: Any = sys.modules["torch._C._autograd"]
    if not _CAN_ALLOW or autograd._saved_tensors_hooks_disable is not _forbid_hooks:
        return

    @wraps(_forbid_hooks)  # Dynamo writes the function's name into its graphs
    def forbid_hooks(error_message: str, fail_if_non_empty: bool = True) -> None:
        hooks = top_hooks() if fail_if_non_empty else None
        is_ours = hooks is not None and getattr(hooks[0], "__module__", "").startswith("invfunc.")
        _forbid_hooks(error_message, fail_if_non_empty and not is_ours)

    autograd._saved_tensors_hooks_disable = forbid_hooks


# Whether the backward that is running keeps its graph for another one. Otherwise it is taken to: memory goes later.
keeps_graph: Callable[[], bool] = _private("torch._C._autograd._get_current_graph_task_keep_graph", lambda: True)


def _only_without_transforms() -> AbstractContextManager[Any]:
    if active():
        raise _missing(
            "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack", "a backward that runs under a transform"
        )
    return nullcontext()


# Go into the vmap of ``is_grads_batched``, and out of it; each returns how deep. Otherwise one is never known to be in
# it, and what draws random numbers can not run again there.
_go_in: Callable[[], int] = _private("torch._C._vmapmode_increment_nesting", lambda: 1)
_go_out: Callable[[], int] = _private("torch._C._vmapmode_decrement_nesting", lambda: 0)


def batched_depth() -> int:
    """In how many ``is_grads_batched`` this runs."""
    _go_in()
    return _go_out()


@contextmanager
def below_transforms() -> Iterator[None]:
    """Outside of every `torch.func` transform, and of ``is_grads_batched``. Otherwise only where there is none."""
    clear = _private("torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack", _only_without_transforms)
    depth = batched_depth()
    for _ in range(depth):
        _go_out()
    try:
        with clear():
            yield
    finally:
        for _ in range(depth):
            _go_in()


# ---- what surrounds a call -------------------------------------------------------------------------------------------

set_grad_enabled: Callable[[bool], Any] = _set_grad_enabled

# Whether autocast is on for any device. Otherwise every device is asked.
is_any_autocast_enabled: Callable[[], bool] = _private("torch._C._is_any_autocast_enabled", lambda: True)

# Lets neither modes nor subclasses see what is called inside. Otherwise enclosing ones see it.
without_torch_function: Callable[[], AbstractContextManager[Any]] = _private(
    "torch._C.DisableTorchFunction", nullcontext
)

# Draws what `torch.distributions.Gamma` draws. Otherwise it is not noticed in a compiled function.
standard_gamma: Callable[..., Any] = _private("torch._standard_gamma", torch.poisson)

_compare = (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).memcmp
_compare.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t


def is_same_state(a: Tensor, b: Tensor) -> bool:
    """Whether two states of a generator are the same: ten times faster than as tensors, and not dispatched."""
    return not _compare(a.data_ptr(), b.data_ptr(), a.nbytes)


_WORDS = struct.Struct("=624I")  # of the Mersenne twister that a generator of the CPU is
_SEED, _PAIR = 20, 28  # bytes before them, for the seed and the place of the next; and behind, for the second normal
_START = 100  # bytes, at most, from the start of a generator to its words
_FIRST = 8  # bytes of the words themselves: all of them are others once each has been drawn

# Where a generator lies in memory. Otherwise, or where it is laid out in another way, its whole state is the mark.
_address_of: Callable[[torch.Generator], int] = getattr(_private("torch.Generator._cdata"), "__get__", lambda _: 0)


class WholeState:
    """A mark of a generator of the CPU: what is another after every draw."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def read(self) -> Any:
        """What it is now."""
        state = self.generator.get_state()
        return ctypes.string_at(state.data_ptr(), state.nbytes)

    begin = read


class StateInMemory:
    """A mark that is another, too, when a state has been set, even if that is the one before: `torch.random.fork_rng`.

    The structure around the words is padded with four bytes. They are tagged: whoever sets a state, writes over them.
    """

    __slots__ = ("around", "behind", "tag")

    def __init__(self, words: int) -> None:
        self.around = (ctypes.c_char * (_SEED + _FIRST)).from_address(words - _SEED)
        self.behind = (ctypes.c_char * _PAIR).from_address(words + _WORDS.size)
        self.tag = ctypes.c_uint32.from_address(words + _WORDS.size)

    def read(self) -> Any:
        """What it is now."""
        return self.around.raw, self.behind.raw

    def begin(self) -> Any:
        """Tag the generator, unless it has a tag; and read."""
        if self.tag.value >> 16 != _TAG:  # another one than before: who has read that sees that it is gone
            self.tag.value = _TAG << 16 | next(_TAGS) % 2**16
        return self.read()


_TAG, _TAGS = 0x17F5, count()
Mark: TypeAlias = WholeState | StateInMemory


def _find_words() -> int:
    """How far inside of a generator its words lie; below zero where that is not as expected."""
    own = torch.Generator()
    address, state = _address_of(own), WholeState(own).read()
    if not address or len(state) < 24 + 8 * 624:
        return -1
    words = _WORDS.pack(*(word & 0xFFFFFFFF for word in struct.unpack_from("=624Q", state, 24)))
    place = ctypes.string_at(address, _START + _WORDS.size + _PAIR).find(words)
    return place if _SEED <= place <= _START and _tells_all(own, StateInMemory(address + place)) else -1


def _tells_all(own: torch.Generator, mark: StateInMemory) -> bool:
    """Whether a mark is another after a draw, after one that takes the second of a pair, and when a state is set."""
    marks = [mark.begin()]
    for _ in range(3):
        torch.empty(1, device="cpu").normal_(generator=own)
        marks.append(mark.read())
    own.set_state(own.get_state())
    return len({*marks, mark.read()}) == len(marks) + 1


_PLACE_OF_WORDS = _find_words()


def mark_of(generator: torch.Generator) -> Mark:
    """The mark of a generator of the CPU."""
    if _PLACE_OF_WORDS < 0:
        return WholeState(generator)
    return StateInMemory(_address_of(generator) + _PLACE_OF_WORDS)


cpu_mark = mark_of(torch.default_generator)


# How many function modes are on, of which a default device is one. Otherwise torch is asked for the device each time.
_count_function_modes = _private("torch._C._len_torch_function_stack", lambda: 1)


def default_device() -> torch.device | None:
    """The device of `torch.set_default_device` or ``with torch.device(...)``; None where nobody has set one."""
    if not _count_function_modes():
        return None
    device = torch.get_default_device()
    return None if device == torch.device("cpu") else device


# The flags of the process that choose a kernel and have no public functions: of each, what reads and what writes it.
# Otherwise that flag is not kept.
_REGULAR = """
    blas_preferred_backend cpu_allow_fp16_reduced_precision_reduction cublas_allow_bf16_reduced_precision_reduction
    cublas_allow_fp16_accumulation cublas_allow_fp16_reduced_precision_reduction cudnn_benchmark cudnn_depthwise_kernel
    cudnn_deterministic cudnn_enabled deterministic_fill_uninitialized_memory linalg_preferred_backend
    miopen_immediate mkldnn_deterministic mkldnn_enabled nnpack_enabled
    onednn_allow_tf32 rocm_fa_preferred_backend sdp_priority_order sm_carveout_experimental
"""
KERNEL_FLAGS = [
    *[(f"_get_{name}", f"_set_{name}") for name in _REGULAR.split()],
    ("_get_fa3_sdp_enabled", "_set_sdp_use_fa3"),
    ("_get_overrideable_sdp_enabled", "_set_sdp_use_overrideable"),
    ("_cuda_get_cudnn_benchmark_limit", "_cuda_set_cudnn_benchmark_limit"),
]


def _writer(write: Callable[..., Any]) -> Callable[[Any], Any]:
    """``write``, which takes the components of a pair one by one."""
    return lambda value: write(*value) if isinstance(value, tuple) else write(value)


def flags_of(names: Iterable[tuple[str, str]]) -> dict[Callable[[], Any], Callable[[Any], Any]]:
    """What reads a flag, and what writes it, as far as torch has both."""
    found = [(_private(f"torch._C.{read}"), _private(f"torch._C.{write}")) for read, write in names]
    return {read: _writer(write) for read, write in found if read and write}


kernel_flags = flags_of(KERNEL_FLAGS)

# The precision of float32 products, of a library and a kind of product. Otherwise only what has older names is kept.
fp32_precision: Callable[[str, str], str] = _private(
    "torch._C._get_fp32_precision_getter", lambda library, kind: "none"
)
set_fp32_precision: Callable[[str, str, str], Any] = _private(
    "torch._C._set_fp32_precision_setter", lambda library, kind, value: None
)

# What an operator takes and returns. Otherwise attention counts as drawing even without dropout,
# a write into a result that is kept is noticed only where the operator says that it makes no views,
# and an operator counts as one that writes if its name says so.
_schema_of = _attribute("torch._ops.OpOverload._schema", torch.ops.aten.bernoulli.default, lambda operator: None)


def signature_of(operator: Any) -> list[tuple[str, str]]:
    """The names and types of an operator's arguments, as far as they are known."""
    schema = _schema_of(operator)
    return [] if schema is None else [(argument.name, str(argument.type)) for argument in schema.arguments]


def arguments_of(operator: Any) -> list[str]:
    """Their names alone."""
    return [name for name, _ in signature_of(operator)]


def gives_views(operator: Any) -> bool:
    """Whether an operator returns memory that it was given."""
    schema = _schema_of(operator)
    if schema is None:
        return getattr(operator, "is_view", True)
    return any(result.alias_info is not None for result in schema.returns)


def writes_in_place(operator: Any) -> bool:
    """Whether an operator writes into what it is given."""
    schema = _schema_of(operator)
    if schema is None:
        return operator.__name__.partition(".")[0].endswith("_")
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)


# Which backward is running; below zero where none is. Otherwise what could be asked once in it is asked each time.
graph_task_id: Callable[[], int] = _private("torch._C._current_graph_task_id", lambda: -1)

# Calls a function when the backward that is running has ended. Otherwise nothing is donated.
at_end_of_backward: Callable[[Callable[[], None]], None] = _private(
    "torch.autograd.Variable._execution_engine.queue_callback",
    _refuse("torch.autograd.Variable._execution_engine.queue_callback", _DONATION),
)

# The same. Otherwise the function is called at once.
when_backward_ends: Callable[[Callable[[], None]], None] = _private(
    "torch.autograd.Variable._execution_engine.queue_callback", lambda fn: fn()
)


def has_accelerator() -> bool:
    """Whether there can be tensors on another device than the CPU."""
    return torch.accelerator.current_accelerator() is not None


def check_donation() -> None:
    """Raise at once where a name is missing that donation needs later."""
    for need in (swap_insides, make_wrapper, _count_storage, at_end_of_backward):
        if getattr(need, "__qualname__", "").startswith("_refuse."):
            need()  # pyright: ignore[reportCallIssue]
    if not _knows_what_it_saved():
        raise _missing("torch.autograd.graph.Node._saved_...", _DONATION)
