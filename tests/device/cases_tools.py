"""Measuring, planning, checking and drawing what is on a device."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import assert_close, network
from torch import nn

import invfunc as inv
from invfunc.__main__ import main

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import device as benchmark
from invfunc.look.memory import measure
from invfunc.look.trial import states
from invfunc.plan.profiling import profile

from . import sim
from .cases_training import DEVICE, branch, random_states


def test_measure_adds_up_all_devices_and_the_cpu() -> None:
    def call() -> list[Any]:
        kept = [torch.empty(1024, device=device) for device in ("cpu", "sim:0", "sim:1", "sim:1")]
        torch.empty(2048, device="sim:1")
        return kept

    found = measure(call)
    assert found.held_bytes == 4 * 8192 and found.peak_bytes == 6 * 8192
    assert found.devices == {"sim:0": (8192, 8192), "sim:1": (4 * 8192, 2 * 8192)}
    assert measure(torch.ones, 1024).devices == {}


def test_memory_is_flat_in_depth() -> None:
    def held(depth: int) -> int:
        op, x = network([branch("plain") for _ in range(2 * depth)], dim=-1), torch.randn(512, 8, device=DEVICE)
        fast = inv.checkpoint(op)
        return measure(lambda: fast(x.requires_grad_())).held_bytes

    held(2)  # makes what the meter keeps for a size
    assert held(2) == held(8)


def test_seconds_are_those_of_the_device() -> None:
    with sim.waits() as seen:
        measure(lambda: torch.ones(2, device=DEVICE), timed=True)
    assert seen["synchronize"] >= 2


@pytest.mark.parametrize("given", ["a shape", "a tensor"])
def test_a_chain_on_a_device_is_planned(given: str) -> None:
    op = network([branch() for _ in range(4)], dim=-1)
    x = (6, 8) if given == "a shape" else torch.randn(6, 8, device=DEVICE)
    before = random_states()
    costs = profile(op, x, repeats=1)
    assert all(cost.forward > 0 for cost in costs.ops)
    assert inv.plan(op, x, budget="1GiB").peak_bytes > 0
    assert_close(random_states(), before)


def test_checks_leave_the_generators_of_devices_alone() -> None:
    op, x = network([branch() for _ in range(2)], dim=-1), torch.randn(6, 8, device=DEVICE)
    before = random_states()
    assert len(states()) == 3
    inv.check(op, x)
    str(inv.draw(op, x))
    assert_close(random_states(), before)


def test_drawing_forks_no_generators_it_does_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    own = torch.sim.default_generators

    class Watched:
        def __init__(self, index: int) -> None:
            self.index = index

        def __getattr__(self, name: str) -> Any:
            asked.append(self.index)
            return getattr(own[self.index], name)

    monkeypatch.setattr(torch.get_device_module("sim"), "default_generators", (Watched(0), Watched(1)))
    inv.draw(network([nn.Linear(4, 4).to(DEVICE)] * 2, dim=-1), (6, 8))
    assert set(asked) <= {0}


def test_the_benchmark_of_a_device_runs(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    benchmark.main("small", tmp_path)
    text, found = (tmp_path / "device.md").read_text(), json.loads((tmp_path / "device.json").read_text())
    rows = {row["engine"]: row for row in found["rows"]}
    assert rows["invfunc"]["evaluations"] == 2 and rows["invfunc"]["peak"] < rows["plain"]["peak"]
    assert all("error" not in row for row in found["filled"]) and len(found["filled"]) == 3
    assert "a second forward is" in text and not found["left out"]


def test_the_demo_trains_on_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--depth", "2", "--epochs", "1", "--batch", "512", "--out", str(tmp_path / "memory.png")]
    main(["demo", "--device", "sim:1", *options])
    shown = capsys.readouterr().out
    plain, lowered = (
        [cell.strip() for cell in row.split("|")] for row in shown.splitlines() if row.startswith("|     2")
    )
    assert (plain[2], lowered[2]) == ("plain", "lowered") and plain[3] == lowered[3]
    assert float(lowered[5]) < float(plain[5]) and "float32 on sim:1" in shown
