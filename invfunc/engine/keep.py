"""What of a call's results is kept for its replay, and what else surrounds the two: contexts, a trace of operators.

NOTE [Keep] Recomputing attention costs as much as running it, and its result is small beside what it reads.

1.  While a call runs, its operators are counted below autograd. Those that the policy names keep their results; when
    the call runs again, the operator with that number gives what was kept and does not run. Autograd above builds the
    same graph from it.
2.  `keep` names a tensor in the function itself: the operator that made its memory keeps its results. What may be asked
    for is held until the call returns.
3.  A random operator that is kept draws nothing when the call runs again: the generators are set to where it left them.
4.  A kept result is a value of forward: the rest of the call computes from it as forward did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from .. import _torch
from ..core.op import name_of
from ..errors import OptionError, ReplayError
from .conditions import RandomState
from .devices import accelerators

Policy: TypeAlias = Callable[..., Any]  # (context, operator, *args, **kwargs) -> CheckpointPolicy, or whether to keep
Keep: TypeAlias = "Policy | Sequence[Any]"  # or operators, and names that `keep` gives
Contexts: TypeAlias = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

# ---- what to keep ----------------------------------------------------------------------------------------------------

_KEPT = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE, True
_OPERATORS = type(torch.ops.aten.detach), type(torch.ops.aten.detach.default)
_IGNORED = torch.ops.aten.detach.default  # as often as autograd hands a tensor over: not the same in both


def check_keep(keep: Any) -> Any:
    """Return the option in values that compare, since options are a value; raise if it is none."""
    if keep is None or callable(keep):
        return keep
    is_listed = isinstance(keep, Sequence) and not isinstance(keep, str)
    if is_listed and all(isinstance(item, (str, *_OPERATORS)) for item in keep):
        return tuple(keep)
    raise OptionError(
        f"checkpoint: keep={keep!r}",
        expected="a policy, or a sequence of operators (torch.ops.aten...) and names that inv.keep gives",
    )


def _policy(keep: Keep) -> Policy:
    if callable(keep):
        return keep
    listed = frozenset(item for item in keep if not isinstance(item, str))
    return lambda context, op, *args, **kwargs: op in listed or op.overloadpacket in listed


_KEEPING: ContextVar[tuple[Keeping, ...]] = ContextVar("keeping", default=())  # the calls that are running


def keep(name: str, tensor: Tensor) -> Tensor:
    """Name an intermediate result, so that a lowered function can keep it in place of computing it again.

    .. math:: keep(name, t) = t

    Args:
        name: What ``checkpoint(..., keep=[name])`` calls it.
        tensor: A result inside of the function.

    Cost:
        Nothing where nobody asks for the name. Otherwise the results of the operator that made the tensor are held
        from forward to backward, and that operator runs once.

    Example:
        >>> import torch, invfunc as inv
        >>> def f(x):
        ...     return torch.tanh(inv.keep("squared", x @ x))
        >>> x = torch.eye(2, requires_grad=True)
        >>> inv.checkpoint(f, keep=["squared"])(x).sum().backward()  # the product is computed once
    """
    for keeping in () if torch.compiler.is_compiling() else _KEEPING.get():
        if name in keeping.names:
            keeping.keep(tensor)
    return tensor


# ---- forward, and again ----------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What an operator returned."""

    op: Any
    out: Any
    versions: list[int]
    random: RandomState | None  # behind it, if it draws


def _tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in _torch.trees.tree_flatten(out)[0] if isinstance(leaf, Tensor)]


def _detached(out: Any) -> Any:
    flat, spec = _torch.trees.tree_flatten(out)
    return _torch.trees.tree_unflatten([t.detach() if isinstance(t, Tensor) else t for t in flat], spec)


class Keeping(_torch.DispatchMode):
    """Forward: keeps the results of operators; rules 1 and 2 of NOTE [Keep]."""

    def __init__(self, keep: Keep) -> None:
        super().__init__()
        self.policy = _policy(keep)
        self.names = frozenset() if callable(keep) else frozenset(item for item in keep if isinstance(item, str))
        self.results: dict[int, Result] = {}
        self.count = 0
        self.made: dict[int, tuple[int, Any, Any]] = {}  # by storage: which operator made it, and all its results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is _IGNORED:
            return out
        number, self.count = self.count, self.count + 1
        context = SelectiveCheckpointContext(is_recompute=False)
        context.op_output = out
        if self.policy(context, func, *args, **kwargs) in _KEPT:
            self._keep(number, func, out)
        elif self.names:
            old = {_torch.storage_of(t) for t in _tensors((args, kwargs))}
            self.made.update({s: (number, func, out) for s in map(_torch.storage_of, _tensors(out)) if s not in old})
        return out

    def keep(self, tensor: Tensor) -> None:
        """Keep the results of the operator that made a tensor."""
        made = self.made.get(_torch.storage_of(tensor))
        if made is not None:
            self._keep(*made)

    def _keep(self, number: int, func: Any, out: Any) -> None:
        draws = torch.Tag.nondeterministic_seeded in func.tags
        random = RandomState(accelerators(_tensors(out))) if draws else None
        self.results[number] = Result(func, out, [t._version for t in _tensors(out)], random)

    @contextmanager
    def around(self) -> Iterator[None]:
        """While the call runs."""
        token = _KEEPING.set((*_KEEPING.get(), self))
        try:
            with self:
                yield
        finally:
            _KEEPING.reset(token)
            self.made.clear()
            # Not before: below autograd a detached tensor has a version of its own. Not as they are: they have nodes.
            self.results = {n: result._replace(out=_detached(result.out)) for n, result in self.results.items()}


class Giving(_torch.DispatchMode):
    """The call again: operators whose results were kept do not run."""

    def __init__(self, results: dict[int, Result]) -> None:
        super().__init__()
        self.results, self.count = results, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _IGNORED:
            return func(*args, **(kwargs or {}))
        number, self.count = self.count, self.count + 1
        result = self.results.get(number)
        if result is None:
            return func(*args, **(kwargs or {}))
        if result.op is not func:
            raise ReplayError(
                f"the function ran {func} when it ran again",
                expected=f"{result.op} as in forward, whose results were kept",
                cure="the function must do the same twice",
            )
        if [t._version for t in _tensors(result.out)] != result.versions:
            raise ReplayError(
                f"the kept results of {func} have been modified by an inplace operation",
                expected="the values that forward read",
                cure="use the out-of-place operation, or do not keep them",
            )
        if result.random is not None:
            result.random.put()
        return _detached(result.out)


# ---- a trace of operators --------------------------------------------------------------------------------------------


class Trace(_torch.DispatchMode):
    """Notes the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _IGNORED:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def difference(self, forward: Trace) -> str:
        """The first operator that is not the one of forward."""
        mine, theirs = self.names, forward.names
        for place, (now, was) in enumerate(zip(mine, theirs, strict=False)):
            if now != was:
                return f"operator {place} was {was} in forward and {now} again"
        return f"{len(theirs)} operators in forward and {len(mine)} again, the same as far as both go"


# ---- around a call ---------------------------------------------------------------------------------------------------


class Around:
    """What surrounds a call and its replays: what is kept, contexts of the user's own, and a trace.

    Args:
        keep: What to keep, if anything.
        contexts: Makes a context for the call, and one for its replay.
        debug: Whether to note operators.
    """

    __slots__ = ("again", "contexts", "keeping", "trace")

    def __init__(self, keep: Keep | None, contexts: Contexts | None, debug: bool) -> None:
        self.keeping = None if keep is None else Keeping(keep)
        self.contexts = None if contexts is None else _checked_pair(contexts)
        self.trace, self.again = (Trace(), Trace()) if debug else (None, None)

    def forward(self) -> AbstractContextManager[None]:
        """Around the call."""
        around = None if self.keeping is None else self.keeping.around()
        return _within(self.contexts and self.contexts[0], around, self.trace)

    def replay(self) -> AbstractContextManager[None]:
        """Around the call when it runs again."""
        if self.again is not None:
            self.again.names = []
        giving = None if self.keeping is None else Giving(self.keeping.results)
        return _within(self.contexts and self.contexts[1], giving, self.again)

    def let_go(self) -> None:
        """Nobody asks for a replay again, or nearly: one that is asked for does without what was kept."""
        if self.keeping is not None:
            self.keeping.results = {}

    def difference(self) -> str:
        """What the trace tells of a replay that was not the same."""
        return "" if self.trace is None or self.again is None else self.again.difference(self.trace)


@contextmanager
def _within(*contexts: AbstractContextManager[Any] | None) -> Iterator[None]:
    """Inside of those contexts that there are."""
    with ExitStack() as stack:
        for context in contexts:
            if context is not None:
                stack.enter_context(context)
        yield


def _checked_pair(contexts: Contexts) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    pair = contexts()
    if not (isinstance(pair, tuple) and len(pair) == 2):
        raise OptionError(
            f"checkpoint: context_fn {name_of(contexts)} returned {type(pair).__name__}",
            expected="two context managers: for the call, and for its replay",
        )
    return pair
