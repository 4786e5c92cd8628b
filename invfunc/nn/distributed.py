"""Sharding: `fully_shard_blocks` puts FSDP2 on the modules that train rightly under it; see NOTE [FSDP2]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.op import Invertible
from ..engine.sharding import is_sharded
from ..errors import OptionError
from ..wires import map_wire
from .actnorm import ActNorm
from .lowered import Lowered, Sequential
from .module import Live, Module

M = TypeVar("M", bound=nn.Module)


def fully_shard_blocks(model: M, **options: Any) -> M:
    r"""Shard a model by FSDP2: every block of its pipelines on its own, and what is left as the root.

    .. math:: \nabla\, fully\_shard\_blocks(model) = \nabla\, model \quad \text{of the union of the ranks' batches}

    A *block* is a module of this package with parameters: a part of an `invfunc.nn.Sequential`, one whose ``op`` is in
    the chain of an `invfunc.nn.Lowered`, or one that an ordinary module calls. The parts of a pipeline stay on one
    trunk, so that the activations held do not grow with their number; blocks that an ordinary module calls one by one
    keep their outputs, one for each.

    Args:
        model: The model, changed in place; its blocks' functions must not be sharded yet.
        options: Those of `torch.distributed.fsdp.fully_shard`. With a ``mp_policy`` that has a ``param_dtype``, the
            stream between the blocks stays in the dtype of the parameters, and every module that owns parameters casts
            its inputs: at depth 48 a bf16 stream loses the gradient, and an fp32 stream with bf16 compute does not.

    Returns:
        The model.

    Cost:
        Memory on each rank: parameters, gradients and optimizer state over the number of ranks, the gathered parameters
        of two blocks, one block's gradients twice, and what a block takes on one process. Communication is that of a
        plain sharded model: two all-gathers and one reduce-scatter for each block; recomputation gathers nothing again.

    Raises:
        OptionError: When the model has no blocks, a part of one is sharded already, or an `ActNorm` has not seen its
            first batch: what that would set in gathered parameters would be lost.

    Limits:
        The ops of a block that use parameters without a module must take a stream of another dtype than theirs, if
        ``param_dtype`` says so.

    Example:
        >>> import torch, invfunc as inv
        >>> half = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        >>> net = inv.nn.Sequential(torch.nn.Linear(2, 8), *(inv.nn.Coupling(*half) for _ in range(4)))
        >>> sharded = fully_shard_blocks(net) if torch.distributed.is_initialized() else net  # under torchrun
        >>> sharded(torch.randn(3, 2)).sum().backward()

    Source:
        Zhao et al., PyTorch FSDP (2023); `torch.distributed.fsdp.fully_shard`.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    blocks = blocks_of(model)
    _check_blocks(model, blocks)
    policy = options.pop("mp_policy", MixedPrecisionPolicy())
    if policy.param_dtype is not None:
        _mix(model, blocks, policy.param_dtype)
    for block in blocks:
        fully_shard(block, mp_policy=replace(policy, cast_forward_inputs=False, output_dtype=None), **options)
        register_fsdp_forward_method(block, "inverse")
    if model not in blocks:
        fully_shard(model, mp_policy=policy, **options)
    return model


# ---- which modules are blocks ----------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[Module]:
    """The units of sharding, each once, in the order of the model."""
    return list(dict.fromkeys(_blocks(model)))


def _blocks(module: nn.Module) -> Iterator[Module]:
    inner = _parts(module) if isinstance(module, Module) else list(module.children())
    for part in inner:
        yield from _blocks(part)
    if isinstance(module, Module) and not inner and any(True for _ in module.parameters()):
        yield module


def _parts(module: Module) -> list[Module]:
    """The modules of this package that a pipeline is made of; none if it is made of functions."""
    if isinstance(module, Sequential):
        return [part for part in module if isinstance(part, Module)]
    return list(_live(module.op)) if isinstance(module, Lowered) else []


def _live(op: Invertible) -> Iterator[Module]:
    for part in op.parts:
        if isinstance(part, Live):
            yield part.module
        else:
            yield from _live(part)


def _check_blocks(model: nn.Module, blocks: list[Module]) -> None:
    if not blocks:
        raise OptionError(
            f"fully_shard_blocks: {type(model).__name__} has no blocks",
            expected="modules of this package inside, with parameters",
            cure="make each block a module, inv.nn.Lowered(op) or inv.nn.Coupling(f, g), and chain them in an "
            "inv.nn.Sequential",
        )
    for name, part in model.named_modules():
        if is_sharded(part):
            raise OptionError(
                f"fully_shard_blocks: {name or type(model).__name__} is under fully_shard already",
                expected="a model of which nothing is sharded",
                cure="leave the other call out",
            )
        if isinstance(part, ActNorm) and not part.initialised:
            raise OptionError(
                f"fully_shard_blocks: {name or 'the model'}, an ActNorm, has not started",
                expected="one that has seen its first batch",
                cure="call the model in training mode before, or load a state dict",
            )


# ---- mixed precision -------------------------------------------------------------------------------------------------


def _mix(model: nn.Module, blocks: list[Module], compute: torch.dtype) -> None:
    """Keep the stream in the parameters' dtype; let every module that owns parameters compute in another."""
    for module in model.modules():
        if module in blocks:
            stream = next(parameter.dtype for parameter in module.parameters())
            module.register_forward_pre_hook(partial(_cast_inputs, stream))
        elif any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(partial(_cast_inputs, compute))


def _cast_inputs(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return map_wire(partial(_cast, dtype), inputs)


def _cast(dtype: torch.dtype, leaf: Any) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
