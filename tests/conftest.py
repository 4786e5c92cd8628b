"""What every test starts from, beside the random numbers: float64, one thread, nothing compiled."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import invfunc.engine.mode
from invfunc.engine.strands import carriers

# What inductor has compiled stays in the checkout, for the next run.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "inductor"))

# The same examples on every run and machine, and no verdict that depends on how busy the machine is.
settings.register_profile("invfunc", derandomize=True, deadline=None)
settings.load_profile("invfunc")

# With one thread a reduction always adds in the same order, so that "the same bits" can be asserted; the tests' tensors
# are also too small to gain from a second one.
torch.set_num_threads(1)

# The element that all carriers of a dtype share is made once in a process: not while a test counts bytes.
carriers([torch.zeros((), dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)])


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Make float64 the default dtype: a law is judged by its error, not by float32's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def fresh_dynamo(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile each test's functions as if they were the first: Dynamo gives a function up after some compilations."""
    if request.node.get_closest_marker("compile"):
        torch._dynamo.reset()
    yield


@pytest.fixture
def no_gc() -> Iterator[None]:
    """What is freed is freed by reference counts."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `cuda` where there is no device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a transform or a mode behind."""
    yield
    assert not torch._C._are_functorch_transforms_active(), "a transform is still running"
    assert invfunc.engine.mode._LATEST is None, "a mode is still in force"
