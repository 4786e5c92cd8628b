"""Blocks of a model that exists: found by a pattern, changed in place, and put back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from types import TracebackType
from typing import Any, Protocol

from torch import nn

from ..checkpoint import checkpoint
from ..errors import OptionError

# ---- which -----------------------------------------------------------------------------------------------------------


def find_blocks(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The submodules whose path fits a pattern such as ``"transformer.h.*"``, in the order of the model."""
    words = pattern.split(".")
    named = list(model.named_modules())[1:]  # without the model itself
    found = {path: module for path, module in named if _fits(path.split("."), words)}
    if not found:
        raise OptionError(
            f"{type(model).__name__} has no {pattern!r}",
            expected="the path of submodules, as in get_submodule, with * for any name",
            cure=f"its lists are {', '.join(_lists(model)) or 'none'}",
        )
    return found


def find_repeat(model: nn.Module, pattern: str) -> tuple[str, str] | None:
    """Two paths that fit a pattern and lead to one module; None where there are none."""
    words, first = pattern.split("."), dict[nn.Module, str]()
    for path, module in model.named_modules(remove_duplicate=False):
        if _fits(path.split("."), words) and first.setdefault(module, path) != path:
            return first[module], path
    return None


def _fits(path: Sequence[str], words: Sequence[str]) -> bool:
    return len(path) == len(words) and all(map(fnmatchcase, path, words))


def _lists(model: nn.Module) -> list[str]:
    """Patterns for the model's lists of blocks."""
    kinds = (nn.ModuleList, nn.Sequential)
    return [f"{path}.*" for path, module in model.named_modules() if path and isinstance(module, kinds)]


# ---- changed and put back --------------------------------------------------------------------------------------------


class Joined:
    """A forward that goes on where the one of the block before has stopped: nothing can be put around it alone."""


class Handle:
    """What was done to the blocks of a model, and how to undo it.

    Attributes:
        blocks: The blocks by their paths.

    Raises:
        OptionError: When the blocks are reversible.
    """

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        self.blocks = blocks
        self._before = {path: vars(block).get("forward") for path, block in blocks.items()}
        self._after: dict[str, Callable[..., Any]] = {}
        for path, before in self._before.items():
            if isinstance(before, Joined):
                raise OptionError(f"{path} is reversible already", cure="call remove() of its handle")

    def put(self, path: str, forward: Callable[..., Any]) -> None:
        """Give a block another forward: the block stays the same module, with the same parameters and hooks."""
        if forward is not self._before[path]:
            self.blocks[path].forward = self._after[path] = forward

    def remove(self) -> None:
        """Put the blocks back as they were; once more, it does nothing.

        Raises:
            OptionError: When a block has got yet another forward since.
        """
        for path, after in self._after.items():
            if vars(self.blocks[path]).get("forward") is not after:
                raise OptionError(f"{path} has been changed again", cure="undo what was done to it last first")
        for path in self._after:
            before = self._before[path]
            del self.blocks[path].forward
            if before is not None:
                self.blocks[path].forward = before
        self._after = {}

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        return f"<{len(self)} blocks: {', '.join(self.blocks)}>"


class Chooses(Protocol):
    """Who chooses the blocks that run again: a plan."""

    def recomputed(self, model: nn.Module) -> Mapping[str, Mapping[str, Any]]:
        """Their paths, each with the options that it has."""
        ...


def checkpoint_blocks(model: nn.Module, blocks: str | Chooses, **options: Any) -> Handle:
    r"""Run the blocks of a model that exists again in backward, each from its stored input; in place.

    .. math:: checkpoint\_blocks(model) = model \quad \text{to the bit, in value and in every gradient}

    The blocks stay the modules that they are: paths, state-dict keys, hooks, length, order and indexing of their list
    do not change, and they take and return what they did (keyword arguments, tuples, output classes, caches).

    - transformers: in place of ``model.gradient_checkpointing_enable()``. Where its own switch is to be used, give it
      our function: ``model._set_gradient_checkpointing(True, lambda f, *a, **k: inv.checkpoint(f)(*a, **k))``.
    - timm: in place of ``model.set_grad_checkpointing()``, with ``"blocks.*"`` or ``"stages.*.blocks.*"``.
    - peft: before or after the adapters are put in, with no `enable_input_require_grads`.

    Args:
        model: The model, changed in place.
        blocks: The path of the blocks, as in `torch.nn.Module.get_submodule`, with ``*`` for any name of a level. Or
            what ``inv.plan(model, x, ...)`` has made: the blocks that it runs again, and no others.
        options: Those of `invfunc.checkpoint` for functions.

    Returns:
        A handle with the method ``remove()``, which undoes it; also a context manager. Its ``blocks`` are by path.

    Cost:
        One input for each block is kept, and backward runs each block once more. Blocks below the lowest trained
        parameter are run once, and nothing of them is kept: with adapters in the top two of eight blocks, two more
        evaluations, where torch's checkpoint makes eight.

    Raises:
        OptionError: When no submodule has such a path, the blocks are reversible, or an option is unknown.

    Limits:
        `torch.nn.DataParallel` copies what a module is called with, and not whose it is: use DDP. With a cache in
        training, what the cache held is kept until backward: pass ``use_cache=False`` if nobody reads it. Below
        `torch.compile` blocks that get a cache run as they are written, and keep their activations, and attention with
        dropout, as GPT-2's by default, raises: a graph can not draw the same again. Set its dropout to 0 there.

    Example:
        >>> import torch, invfunc as inv
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> handle = inv.nn.checkpoint_blocks(model, "*")
        >>> model(torch.randn(2, 4)).sum().backward()
        >>> handle.remove()
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...
        ...     def forward(self, x):
        ...         for block in self.blocks:
        ...             x = block(x)
        ...         return x
        >>> net, x = Net(), torch.randn(256, 4)
        >>> handle = inv.nn.checkpoint_blocks(net, inv.plan(net, x, max_time=1.5))

    Source:
        Chen et al., Training Deep Nets with Sublinear Memory Cost (2016).
    """
    chosen = dict.fromkeys(find_blocks(model, blocks), {}) if isinstance(blocks, str) else blocks.recomputed(model)
    handle = Handle({path: model.get_submodule(path) for path in chosen})
    for path, block in handle.blocks.items():
        handle.put(path, checkpoint(block.forward, **{**chosen[path], **options}))
    return handle


# ---- arguments -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def by_name(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a block is called with: its first argument, and the others by the names of its forward."""
    signature = _signature(type(block).forward)
    given = signature.bind(block, *args, **kwargs).arguments
    parameters = list(signature.parameters.values())
    named = {p.name: given[p.name] for p in parameters[1:] if p.name in given}
    for p in parameters:
        if p.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(p.name, {}))
    return named.pop(parameters[1].name), named
