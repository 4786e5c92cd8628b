"""A pytest plugin: torch's own tests of its checkpoint, with `invfunc.checkpoint` in the place of the one without a
reentrant backward.

Calls with ``use_reentrant=True``, and calls that do not say, stay torch's. A test that makes no other calls tells
nothing of ours: it counts as skipped. Texts of errors are ours, and the few tests that ask for what torch's engine does,
and not for what a user gets, are expected to fail; the summary says which, and why.
"""

from __future__ import annotations

import inspect
import unittest
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest
import torch.utils.checkpoint as theirs

import invfunc as inv
from invfunc.errors import ReplayError

OPTIONS = ("preserve_rng_state", "determinism_check", "debug", "early_stop", "context_fn")

TEXTS = {
    "A different number of tensors was saved": r"the function saved \d+ tensors when it ran again, expected \d+",
    "trying to save more tensors during recomputation": r"the function saved \d+ tensors when it ran again",
    "tensors have different metadata": r"the function saved as number \d+ .* expected .* as in forward",
    "Recomputed values for the following tensors have different": r"as in forward; the function must do the same twice",
    "You are seeing this error because you passed `debug=True` to checkpoint": r"got operator \d+ was .* in forward",
}

EXCLUDED = {
    "test_checkpointing_without_reentrant_custom_function_works": "asserts that a custom backward can not read its "
    "saved tensors twice: here it can",
    "test_checkpointing_without_reentrant_with_context_fn": "asserts that torch's hooks run a detach among the "
    "operators of the replay: ours do not",
    "test_nested_checkpoint_set_early_stop_no_recompution_needed": "asserts that the function runs again to save a "
    "tensor that is its input: here the input is at hand, and nothing runs again",
    "test_checkpoint_graph_execution_group": "asserts that two backwards over parts of one call run it twice, unless "
    "in a GraphExecGroup, and that they can not overlap in one: here they share what was computed, and may overlap",
}


# ---- in torch's place ------------------------------------------------------------------------------------------------

TORCH = theirs.checkpoint, theirs.checkpoint_sequential
CALLED: list[str] = []  # by the test that runs


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool | None = None, **kwargs: Any) -> Any:
    """Torch's signature over ours."""
    if use_reentrant is not False:
        return TORCH[0](function, *args, use_reentrant=use_reentrant, **kwargs)
    CALLED.append("checkpoint")
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    return inv.checkpoint(function, **options)(*args, **kwargs)


def checkpoint_sequential(
    functions: Sequence[Callable[..., Any]], segments: int, input: Any, use_reentrant: bool | None = None, **kwargs: Any
) -> Any:
    """Torch's signature over a chain of ours; torch does not run the last segment again."""
    if use_reentrant is not False:
        return TORCH[1](functions, segments, input, use_reentrant=use_reentrant, **kwargs)
    CALLED.append("checkpoint_sequential")
    parts, size = [*functions], len(functions) // segments
    last = size * (segments - 1)
    net = inv.chain(*parts[:last], inv.mark(inv.chain(*parts[last:]), "store"))
    cuts = range(size, last + 1, size) if last else ()
    return inv.checkpoint(net, mode="recompute", cuts=cuts, **kwargs)(input)


def pytest_configure() -> None:
    """Replace the names before a test module imports them."""
    theirs.checkpoint, theirs.checkpoint_sequential = checkpoint, checkpoint_sequential
    theirs.CheckpointError = ReplayError
    asked = unittest.TestCase.assertRaisesRegex

    def assert_raises(self: Any, error: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        return asked(self, error, TEXTS.get(text, text), *args, **kwargs)

    unittest.TestCase.assertRaisesRegex = assert_raises


# ---- which tests, and what is said of them ---------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the tests that speak of checkpoints, and expect the excluded ones to fail."""
    others = [item for item in items if "checkpoint" not in inspect.getsource(item.function)]  # type: ignore[attr-defined]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    for item in items:
        if item.name in EXCLUDED:
            item.add_marker(pytest.mark.xfail(reason=EXCLUDED[item.name], strict=True, raises=AssertionError))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test that did not call ours tells nothing."""
    CALLED.clear()
    result = yield
    if not CALLED:
        pytest.skip(f"{item.name} makes no call with use_reentrant=False")
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which texts are others."""
    terminalreporter.section("what errors say in torch, and what they have to say here")
    for text, ours in TEXTS.items():
        terminalreporter.line(f"{text}\n    {ours}")
