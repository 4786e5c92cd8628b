"""In a process of `test_device`: the simulated accelerator, in the disguise that it asks for."""

import os
from collections.abc import Iterator

import pytest
import torch

from . import sim

DISGUISE = os.environ.get("INVFUNC_DEVICE", "")

if DISGUISE:
    sim.load(DISGUISE)


@pytest.fixture(autouse=True)
def in_order(seeded: None) -> Iterator[None]:
    """Begin with seeded generators and no drift in flight, and check that nothing is left of a test."""
    state = [torch.sim.get_rng_state(index) for index in range(sim.DEVICES)]  # type: ignore[attr-defined]
    yield
    assert torch.accelerator.current_device_index() == 0
    for index in range(sim.DEVICES):
        torch.sim.set_rng_state(state[index], index)  # type: ignore[attr-defined]
