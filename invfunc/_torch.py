"""What torch tells of the transforms that are active. The one file that asks its private modules."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from sys import getrefcount
from typing import Any, TypeVar

import torch
import torch._C._functorch as functorch  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy, set_eval_frame
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")

LOOKS_AT_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


def active() -> bool:
    """Whether a `torch.func` transform is running."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a transform."""
    return functorch.is_functorch_wrapped_tensor(tensor)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled functions as they were written: Dynamo would trace what watches them, instead of being watched."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        yield
        return
    prior = set_eval_frame(None)  # a frame that Dynamo has given up runs eagerly, and may not set the stance
    _STANCE.enter()
    try:
        yield
    finally:
        _STANCE.leave()
        set_eval_frame(prior)


def unseen_by_dynamo(fn: Callable[..., T]) -> Callable[..., T]:
    """A function that Dynamo does not look into on its own, where it has given up the frame that calls it."""
    set_code_exec_strategy(fn.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
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


def gradient_edge(tensor: Tensor) -> GradientEdge:
    """`torch.autograd.graph.get_gradient_edge`; without its ceremony where C++ owns the node."""
    node = tensor.grad_fn
    if node is None or isinstance(node, torch._C._FunctionBase):
        return get_gradient_edge(tensor)
    return GradientEdge(node, tensor.output_nr)


def gradients(
    roots: Sequence[tuple[GradientEdge | Tensor, Tensor]], sources: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` of outputs and seeds that fit them: what it asks of them would take a third of the time."""
    outputs, seeds = zip(*roots, strict=True)
    if has_torch_function(tuple(sources)):
        return torch.autograd.grad(outputs, sources, seeds, allow_unused=True)
    return _engine_run_backward(outputs, seeds, False, False, tuple(sources), True, accumulate_grad=False)


def with_gradients(enabled: bool, fn: Callable[..., T], *args: Any) -> T:
    """``fn(*args)`` under `torch.enable_grad` or `torch.no_grad`, at a quarter of what entering and leaving costs."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(enabled)
    try:
        return fn(*args)
    finally:
        torch._C._set_grad_enabled(before)


def shown_to_modes(functions: Iterable[Callable[..., Any]]) -> None:
    """Let function modes see functions under Dynamo, as they do outside of it: it forgets those without overrides."""
    get_overridable_functions = importlib.import_module("torch._dynamo.variables.torch").get_overridable_functions
    get_overridable_functions().update(functions)  # it caches the set


def outside_modes() -> AbstractContextManager[Any]:
    """Run outside of every dispatch mode."""
    return _disable_current_modes()


def swapped(module: nn.Module, contents: dict[str, Tensor]) -> AbstractContextManager[None]:
    """A module that holds other tensors inside, as under `torch.func.functional_call`."""
    return _reparametrize_module(module, contents)


def fake_mode() -> FakeTensorMode | None:
    """The mode under which tensors have shapes and no data, if there is one."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def on_fake_tensors() -> bool:
    """Whether tensors have shapes and no data: a compiled function would read what is not there."""
    return fake_mode() is not None


def fake_device(tensor: Tensor) -> torch.device | None:
    """The device of a fake tensor, which every mode would be asked for; None where it is another one at the moment."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) and not tensor.fake_mode.in_kernel_invocation else None


def in_compiled_backward() -> bool:
    """Whether compiled autograd runs backward; it adds gradients up without looking for None."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and module.in_compiled_autograd_region


def run_backward(backward: Callable[..., Any], *args: Any) -> Any:
    """Call a backward; compiled autograd leaves it out of its graph, since it is no function of its arguments alone."""
    return torch._dynamo.disable(backward)(*args) if in_compiled_backward() else backward(*args)


def level() -> int:
    """How many transforms are running, one inside the other."""
    current = functorch.maybe_current_level()
    return 0 if current is None else current


def below(tensor: Tensor, height: int) -> Tensor:
    """A tensor without the wrappers of transforms above a level."""
    while functorch.maybe_get_level(tensor) > height:
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def unwrapped(tensor: Tensor) -> Tensor:
    """The data below the wrappers: all samples of a ``vmap``, with its dimension."""
    while is_wrapped(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed, by a transform or by `torch.autograd.forward_ad`."""
    if forward_ad._current_level >= 0:
        return True
    if not active():
        return False
    return any(level.key() == functorch.TransformType.Jvp for level in functorch.get_interpreter_stack() or ())


def alive(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """Tensors without the wrappers of transforms that have ended: `torch.func.vjp` runs backward after its own end."""
    return tuple([None if tensor is None else functorch.unwrap_if_dead(tensor) for tensor in tensors])


def graph_position() -> int:
    """A number that every autograd node made from now on, in this thread, reaches or exceeds."""
    return torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]


def preserved_version(tensor: Tensor) -> AbstractContextManager[Any]:
    """A tensor that is written inside keeps the version that others have seen."""
    return torch.autograd._unsafe_preserve_version_counter(tensor)  # pyright: ignore[reportPrivateImportUsage]


def use_count(tensor: Tensor) -> int:
    """How many holders a tensor has in C++ and Python together."""
    return tensor._use_count()  # pyright: ignore[reportAttributeAccessIssue]


def is_spare(tensor: Tensor, like: Tensor) -> bool:
    """Whether a result on the CPU that lies in memory as ``like`` does may be written there.

    It may when one variable of the caller is all that holds the tensor, in Python and in C++, and nothing else its
    storage, but the tensor that it is a view of: neither what a backward has saved, nor a hook, nor another view. And
    when that storage is torch's and this process's own, no larger, and so large that it is worth the question.
    """
    if type(tensor) is not Tensor or tensor.numel() < _LARGE or not torch._C._has_storage(tensor):
        return False
    if not tensor.is_cpu or tensor.dtype is not like.dtype or tensor.stride() != like.stride():
        return False
    if getrefcount(tensor) != _ONE_VARIABLE or use_count(tensor) != 1:
        return False
    if tensor.is_inference() or torch._debug_has_internal_overlap(tensor):  # pyright: ignore[reportPrivateImportUsage]
        return False
    return _holders(tensor) in (_OF_A_TENSOR, _OF_A_VIEW)


def _holders(tensor: Tensor) -> tuple[int, ...] | None:
    """How many hold a tensor's storage, and what it is a view of, in Python and in C++; None if that is not all."""
    storage, base = tensor.untyped_storage(), tensor._base
    if storage.nbytes() != tensor.nbytes or storage.is_shared() or not storage.resizable():
        return None
    found = getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)
    return found if base is None else (*found, getrefcount(base), use_count(base))


def _references(tensor: Tensor) -> int:
    return getrefcount(tensor)


def _counted() -> tuple[int, Any, Any]:
    """What Python and torch count, which is up to their versions, where nobody else holds anything."""
    fresh, view = torch.empty(1, device="cpu"), torch.empty(1, device="cpu").view(1)
    return _references(fresh), _holders(fresh), _holders(view)


with outside_modes(), torch.inference_mode(False):
    _ONE_VARIABLE, _OF_A_TENSOR, _OF_A_VIEW = _counted()
_LARGE = 2**14  # numbers: what is smaller is in the processor's caches anyway
