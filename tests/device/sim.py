"""The Python of the simulated accelerator in ``sim.cpp``: its device module, and its disguise as CUDA.

A process that has loaded it has an accelerator for good, so that only processes of their own do: see `test_device`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "device"
DEVICES = 2

_sim = torch.ops.sim


def build() -> None:
    """Compile what runs on the devices, unless it has been; half a minute on one core."""
    BUILD.mkdir(parents=True, exist_ok=True)
    cpp_extension.load(
        "sim", [str(HERE / "sim.cpp")], extra_cflags=["-O1", "-g0"], build_directory=str(BUILD), is_python_module=False
    )


def load(disguise: str = "sim") -> None:
    """Give this process the devices ``sim:0`` and ``sim:1``; as ``"cuda"``, they look like CUDA's to who asks."""
    build()
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_packed_sequence=False, for_storage=True)
    if disguise == "cuda":
        _wear_cuda()


# ---- the device module -----------------------------------------------------------------------------------------------


def _index(device: Any = None) -> int:
    if device is None:
        return torch.accelerator.current_device_index()
    index = device if isinstance(device, int) else torch.device(device).index
    return torch.accelerator.current_device_index() if index is None else index


def _generators() -> tuple[torch.Generator, ...]:
    """Those of the devices, one each."""
    _sim.show_generators(True)
    try:
        return tuple(torch.Generator(f"sim:{index}") for index in range(DEVICES))
    finally:
        _sim.show_generators(False)


@contextmanager
def _stream(stream: torch.Stream | None) -> Iterator[None]:
    with stream or torch.Stream():
        yield


def _module() -> ModuleType:
    module: Any = ModuleType("torch.sim")
    module.device_count = lambda: DEVICES
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module._initialized = True  # what torch's own checkpoint asks before it keeps a generator's state
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.is_current_stream_capturing = lambda: _sim.is_capturing()
    module.current_device = torch.accelerator.current_device_index
    module.device = torch.accelerator.device_index
    module.set_device = torch.accelerator.set_device_index
    module.synchronize = torch.accelerator.synchronize
    module.current_stream = torch.accelerator.current_stream
    module.default_generators = own = _generators()
    module.get_rng_state = lambda device=None: own[_index(device)].get_state()
    module.set_rng_state = lambda state, device=None: own[_index(device)].set_state(state)
    module.manual_seed_all = lambda seed: [generator.manual_seed(seed) for generator in own]
    module.manual_seed = lambda seed: own[_index()].manual_seed(seed)
    module.initial_seed = lambda: own[_index()].initial_seed()
    module.Stream, module.Event, module.stream = torch.Stream, torch.Event, _stream
    for name in ("memory_stats", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        setattr(module, name, getattr(torch.accelerator, name))
    module.mem_get_info = torch.accelerator.get_memory_info
    return module


def _wear_cuda() -> None:
    """``is_cuda``, the queries of `torch.cuda` and ``torch.autocast("cuda")`` answer as of CUDA's devices."""
    own = sys.modules["torch.sim"] if "torch.sim" in sys.modules else torch.get_device_module("sim")
    for name in vars(own):
        if not name.startswith("__"):
            setattr(torch.cuda, name, getattr(own, name))
    torch.Tensor.is_cuda = property(lambda tensor: tensor.device.type in ("sim", "cuda"))  # type: ignore[assignment]
    before = torch.autocast.__init__

    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        before(self, "sim" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast.__init__ = autocast


# ---- what tests ask of it --------------------------------------------------------------------------------------------


class Waits(dict[str, int]):
    """How often the host has waited for a device, by what it waited for."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.values())


@contextmanager
def waits(raising: bool = False) -> Iterator[Waits]:
    """Count the waits inside, or raise at the first."""
    found = Waits()
    _sim.forget_waits()
    before = _sim.raise_at_waits(raising)
    try:
        yield found
    finally:
        _sim.raise_at_waits(before)
        found.update(_sim.waits())


@contextmanager
def capture() -> Iterator[None]:
    """As while a graph is captured: who waits or reads a generator raises."""
    before = _sim.capture(True)
    try:
        yield
    finally:
        _sim.capture(before)
