"""What of a call's results is kept for its replay, and what else surrounds the two: contexts, a trace of operators.

NOTE [Keep] Recomputing attention costs as much as running it, and its result is small beside what it reads.

1.  While a call runs, the calls of each operator are counted below autograd. Those that the policy names keep their
    results; when the call runs again, that call of the operator gives what was kept and does not run. Autograd above
    builds the same graph from it. Each is counted by itself: autocast's cache may spare a cast the second time. An
    operator that writes into what it is given runs again, whatever the policy says: others read what it writes.
2.  `keep` names a tensor in the function itself: the operator that made its memory keeps its results. What may be asked
    for is held until the call returns.
3.  A random operator that is kept draws nothing when the call runs again: the generators are set to where it left them.
4.  A kept result is a value of forward: the rest of the call computes from it as forward did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from .. import _torch
from ..core.op import name_of
from ..errors import OptionError, ReplayError
from .devices import accelerators
from .parts import version, versions_of
from .random_numbers import RandomState

Policy: TypeAlias = Callable[..., Any]  # (context, operator, *args, **kwargs) -> CheckpointPolicy, or whether to keep
Keep: TypeAlias = "Policy | Sequence[Any]"  # or operators, and names that `keep` gives
Contexts: TypeAlias = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

# ---- what to keep ----------------------------------------------------------------------------------------------------

_KEPT = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE, True
_OPERATORS = type(torch.ops.aten.detach), type(torch.ops.aten.detach.default)
_IGNORED = torch.ops.aten.detach.default  # as often as autograd hands a tensor over: not the same in both


def check_keep(keep: Any) -> Any:
    """Return the option in values that compare, since options are a value; raise if it is none."""
    if keep is None or (callable(keep) and not isinstance(keep, _OPERATORS)):
        return keep
    if isinstance(keep, (tuple, list)) and all(isinstance(item, (str, *_OPERATORS)) for item in keep):
        return tuple(keep)
    raise OptionError(
        f"checkpoint: keep={keep!r}",
        expected="a policy, or a sequence of operators (torch.ops.aten...) and names that inv.keep gives",
    )


class _Listed:
    """Whether an operator is one of those that are listed; its own hash is Python's, and asked for every operator."""

    def __init__(self, keep: Sequence[Any]) -> None:
        self.ids = frozenset(id(item) for item in keep if not isinstance(item, str))

    def __call__(self, op: Any) -> bool:
        return id(op) in self.ids or id(op.overloadpacket) in self.ids


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


Call: TypeAlias = tuple[Any, int]  # an operator, and which of its calls


class Result(NamedTuple):
    """What an operator returned."""

    out: Any
    versions: list[int] | None  # None of a view while the call runs; behind it, where the call has written into it
    random: RandomState | None  # behind it, if it draws


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):  # as most are; this runs for every operator
        return [out]
    return [leaf for leaf in _torch.trees.tree_flatten(out)[0] if isinstance(leaf, Tensor)]


def _versions_of(out: Any) -> list[int]:
    return versions_of(_tensors(out))


def _detached(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.detach()
    flat, spec = _torch.trees.tree_flatten(out)
    return _torch.trees.tree_unflatten([t.detach() if isinstance(t, Tensor) else t for t in flat], spec)


_gives_views = lru_cache(maxsize=None)(_torch.gives_views)
_writes_in_place = lru_cache(maxsize=None)(_torch.writes_in_place)


class Keeping(_torch.DispatchMode):
    """Forward: keeps the results of operators; rules 1 and 2 of NOTE [Keep]."""

    def __init__(self, keep: Keep) -> None:
        super().__init__()
        self.policy, self.listed = (keep, None) if callable(keep) else (None, _Listed(keep))
        self.names = frozenset() if callable(keep) else frozenset(item for item in keep if isinstance(item, str))
        self.results: dict[Call, Result] = {}
        self.counts: Counter[int] = Counter()  # by the operator's id
        self.made: dict[int, tuple[Call, Any, int]] = {}  # by storage: who made it, all its results, and its version

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is _IGNORED:
            return out
        call = func, self.counts[id(func)]
        self.counts[id(func)] += 1
        if self._is_kept(func, out, args, kwargs) and not _writes_in_place(func):
            self._keep(call, out, _gives_views(func))
        elif self.names:
            old = {_torch.storage_of(t) for t in _tensors((args, kwargs))}
            new = {_torch.storage_of(t): version(t) for t in _tensors(out)}
            self.made.update({storage: (call, out, new[storage]) for storage in new.keys() - old})
        return out

    def _is_kept(self, func: Any, out: Any, args: Any, kwargs: Any) -> bool:
        if self.listed is not None:
            return self.listed(func)
        assert self.policy is not None
        context = SelectiveCheckpointContext(is_recompute=False)
        context.op_output = out
        return self.policy(context, func, *args, **kwargs) in _KEPT

    def keep(self, tensor: Tensor) -> None:
        """Keep the results of the operator that made a tensor."""
        made = self.made.get(_torch.storage_of(tensor))
        if made is None:
            return
        call, out, before = made
        if any([version(t) != before for t in _tensors(out) if _torch.storage_of(t) == _torch.storage_of(tensor)]):
            raise _was_written(call[0])
        self._keep(call, out, False)

    def _keep(self, call: Call, out: Any, is_view: bool) -> None:
        draws = torch.Tag.nondeterministic_seeded in call[0].tags
        random = RandomState(accelerators(_tensors(out))) if draws else None
        self.results[call] = Result(out, None if is_view else _versions_of(out), random)

    def _detach_results(self) -> Iterator[tuple[Call, Result]]:
        """Not before the end: below autograd a detached tensor has its own version. Nor as they are, with nodes."""
        for call, (out, versions, random) in self.results.items():
            is_same, detached = versions in (None, _versions_of(out)), _detached(out)
            yield call, Result(detached, _versions_of(detached) if is_same else None, random)

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
            self.results = dict(self._detach_results())


class Giving(_torch.DispatchMode):
    """The call again: operators whose results were kept do not run."""

    def __init__(self, results: dict[Call, Result]) -> None:
        super().__init__()
        self.results = results
        self.counts = dict.fromkeys([id(func) for func, _ in results], 0)  # of the operators that have some

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if id(func) not in self.counts:
            return func(*args, **(kwargs or {}))
        result = self.results.get((func, self.counts[id(func)]))
        self.counts[id(func)] += 1
        if result is None:
            return func(*args, **(kwargs or {}))
        if _versions_of(result.out) != result.versions:
            raise _was_written(func)
        if result.random is not None:
            result.random.put()
        return _detached(result.out)


def _was_written(func: Any) -> ReplayError:
    return ReplayError(
        f"the kept results of {func} have been modified by an inplace operation",
        expected="the values that forward read",
        cure="use the out-of-place operation, or do not keep them",
    )


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

    __slots__ = ("again", "caches_casts", "contexts", "keeping", "trace")

    def __init__(self, keep: Keep | None, contexts: Contexts | None, debug: bool) -> None:
        self.keeping = None if keep is None else Keeping(keep)
        self.contexts = None if contexts is None else _checked_pair(contexts)
        self.trace, self.again = (Trace(), Trace()) if debug else (None, None)
        self.caches_casts = contexts is not None and torch.is_autocast_cache_enabled()

    def forward(self) -> AbstractContextManager[None]:
        """Around the call."""
        around = None if self.keeping is None else self.keeping.around()
        return _within(self.contexts and self.contexts[0], around, self.trace)

    def replay(self) -> AbstractContextManager[None]:
        """Around the call when it runs again."""
        if self.again is not None:
            self.again.names = []
        results = {} if self.keeping is None else self.keeping.results
        giving = Giving(results) if results else None
        casts = _cache_casts() if self.caches_casts and _torch.is_any_autocast_enabled() else None
        return _within(self.contexts and self.contexts[1], giving, self.again, casts)

    def let_go(self) -> None:
        """Nobody asks for a replay again, or nearly: one that is asked for does without what was kept."""
        if self.keeping is not None:
            self.keeping.results = {}

    def difference(self) -> str:
        """What the trace tells of a replay that was not the same."""
        return "" if self.trace is None or self.again is None else self.again.difference(self.trace)


@contextmanager
def _cache_casts() -> Iterator[None]:
    """Cast a weight once, as in forward: contexts of the user's own may count casts."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()


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
