"""What FSDP2 does to a module, and the calls of sharded modules that would not train.

NOTE [FSDP2] ``fully_shard`` puts a module's gathered parameters into its slots when it is *called*, and reduces their
gradients when its inputs have theirs.

1.  A stage calls its functions a second time in backward, outside of the order in which FSDP gathers and reshards. Were
    a function sharded on its own, its hooks would run for the second call as well, and reduce gradients that are not
    complete. So a stage refuses to call what is sharded.
2.  The right unit is the module whose `forward` *makes* the stages: when they are recorded, the parameters are there.
    It is called as a module even inside a pipeline, with the strands of the trunk (NOTE [Trunk]) as its arguments: FSDP
    looks into dataclasses, so that its hooks see the values as well as the carriers, and the trunk stays open.
3.  Before backward reaches the stages, the hooks on the strands gather the same parameters into the same objects; the
    gradients reach them before the hooks on its inputs reduce them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..errors import ReplayError

_PRETENDING: set[nn.Module] = set()


def is_sharded(module: nn.Module) -> bool:
    """Whether a module is a unit of FSDP2, or plays one; free where nobody has imported it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (fsdp is not None and isinstance(module, fsdp.FSDPModule)) or module in _PRETENDING


def is_any_sharded() -> bool:
    """Whether there can be a sharded module at all: ``fully_shard`` makes a class for each class that it shards."""
    if _PRETENDING:
        return True
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and torch.distributed.is_initialized() and bool(fsdp.FSDPModule.__subclasses__())


@contextmanager
def pretending(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules be called as if they were units of FSDP2: a simulation has no ranks."""
    added = [module for module in modules if module not in _PRETENDING]
    _PRETENDING.update(added)
    try:
        yield
    finally:
        for module in added:
            _PRETENDING.discard(module)


def check_callee(module: nn.Module, is_called: bool = True) -> None:
    """Raise where a function of a stage is sharded on its own, or has a part that is: rule 1 of NOTE [FSDP2].

    Args:
        module: What a stage calls.
        is_called: Not so where the stage calls another method of the module, which gathers nothing.
    """
    if not is_any_sharded():
        return
    for path, part in module.named_modules():
        if is_sharded(part) and (path or is_called):
            raise ReplayError(
                f"{type(module).__name__}, which the op calls, {f'has a part, {path}, that ' * bool(path)}is under "
                "fully_shard on its own: its gradients would be lost",
                expected="fully_shard on the module whose forward runs the op, and on nothing inside",
                cure="shard the blocks instead, as invfunc.nn.fully_shard_blocks(model) does",
            )


def check_callees(functions: Iterable[Any]) -> None:
    """`check_callee` for the functions of a stage, as far as their structure tells."""
    for fn in functions:
        if isinstance(fn, nn.Module):
            check_callee(fn)
        elif isinstance(fn, MethodType) and isinstance(fn.__self__, nn.Module):
            check_callee(fn.__self__, False)
        elif isinstance(fn, partial):
            check_callees([fn.func, *fn.args, *fn.keywords.values()])


def checking_calls(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)``, and `check_callee` for every module that it calls."""
    thread = threading.get_ident()

    def enter(module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if threading.get_ident() == thread and is_sharded(module):
            check_callee(module)

    with register_module_forward_pre_hook(enter):
        return fn(*args)
