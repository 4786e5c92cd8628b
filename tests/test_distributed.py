"""Several processes: each number of ranks is started once and runs all of its cases; see `distributed/`.

What needs one process alone is tested in it: the simulator against what the ranks measured, and errors.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

import pytest
import torch
from distributed import ddp, fsdp, mesh  # noqa: F401  (they register their cases)
from distributed.harness import CASES, Run
from distributed.memory import MODES, ROWS, SHAPES, SHARDINGS
from distributed.networks import normed, reversible
from torch import nn

import invfunc as inv
from invfunc.__main__ import main
from invfunc.nn.distributed import blocks_of
from invfunc.plan import simulate

SECONDS = 240.0  # what a run may take on a busy machine; a hang is a failure

distributed = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """The run of so many ranks, started when it is first asked for."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return lru_cache(lambda world: Run(world, shared / f"ranks{world}", SECONDS))


@distributed
@pytest.mark.parametrize(("world", "name"), [(world, name) for world in CASES for name in CASES[world]])
def test_case(world: int, name: str, run: Callable[[int], Run]) -> None:
    run(world).seen(name)


@distributed
@pytest.mark.parametrize("pattern", ["R2", "R3", "R6", "R6f", "R9"])
def test_the_refusal_names_the_op_the_module_and_the_cure(pattern: str, run: Callable[[int], Run]) -> None:
    for message in run(2).seen(f"fsdp_guard-{pattern}"):
        assert message == (
            "chain stage 1 (couple): FSDPSequential, which the op calls, is under fully_shard on its own: its gradients "
            "would be lost, expected fully_shard on the module whose forward runs the op, and on nothing inside; shard "
            "the blocks instead, as invfunc.nn.fully_shard_blocks(model) does"
        )


@distributed
def test_the_refusal_names_a_part(run: Callable[[int], Run]) -> None:
    assert "Sequential, which the op calls, has a part, 0, that is under" in run(2).seen("fsdp_guard_of_a_part")[0]


# ---- the simulator ---------------------------------------------------------------------------------------------------


def _on_meta(shape: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    with torch.device("meta"):
        return reversible(**SHAPES[shape]), torch.empty(ROWS[shape], 6), torch.empty(ROWS[shape], 3)


@distributed
@pytest.mark.parametrize(("world", "sharding", "mode", "shape"), list(product((2, 4), SHARDINGS, MODES, SHAPES)))
def test_simulated_peaks_are_the_measured_ones(
    world: int, sharding: str, mode: str, shape: str, run: Callable[[int], Run]
) -> None:
    net, x, y = _on_meta(shape)
    with inv.mode(mode):
        found = simulate(
            net, x, ranks=world, sharding=sharding, optimizer_states=1, loss=lambda out: ((out - y) ** 2).mean()
        )
    for measured in run(world).seen(f"peak-{sharding}-{mode}-{shape}"):
        assert found.peak_bytes == pytest.approx(measured, rel=0.1)


def test_simulated_memory_is_flat_in_blocks_but_for_the_shares() -> None:
    def steps(ranks: int, depth: int) -> int:
        with torch.device("meta"):
            net, x = reversible(depth=depth, width=32), torch.empty(256, 6)
        found = simulate(net, x, ranks=ranks, sharding="fsdp", optimizer_states=0)
        return found.step - found.weights  # the gradients' share is as large as the weights'

    assert steps(8, 16) <= 1.05 * steps(8, 6)


def test_simulation_leaves_the_model_alone() -> None:
    with torch.device("meta"):
        net, x = reversible(), torch.empty(2, 6)
    net(x).sum().backward()
    before = [p.grad for p in net.parameters()]
    simulate(net, x, ranks=2, sharding="fsdp")
    assert all(p.grad is gradient for p, gradient in zip(net.parameters(), before, strict=True))
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in [net, *blocks_of(net)])
    assert simulate(net, x).peak_bytes == simulate(net, x).peak_bytes


def test_simulation_runs_batch_norm_and_frozen_parts() -> None:
    with torch.device("meta"):
        net, x = reversible(normed), torch.empty(4, 6)
    whole = simulate(net, x, ranks=2, sharding="fsdp").step
    for block in net[1:-1]:
        block.requires_grad_(False)
    assert simulate(net, x, ranks=2, sharding="fsdp").step < whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharding": "zero"}, "simulate: sharding is 'zero', expected 'none', 'ddp' or 'fsdp'"),
        ({"ranks": 2}, "simulate: 2 ranks with sharding='none', expected one rank, or 'ddp' or 'fsdp'"),
        (
            {"ranks": 0, "sharding": "ddp"},
            "simulate: 0 ranks with sharding='ddp', expected one rank, or 'ddp' or 'fsdp'",
        ),
        (
            {},
            "simulate: 0.weight is not on the meta device, expected a model without memory; "
            'build it inside `with torch.device("meta")`',
        ),
    ],
)
def test_simulate_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(inv.errors.OptionError) as found:
        simulate(reversible(), torch.empty(2, 6, device="meta"), **options)
    assert str(found.value) == message


# ---- which modules are blocks ----------------------------------------------------------------------------------------


def test_blocks_are_the_parts_of_pipelines() -> None:
    net = reversible()
    couplings = list(net[1:-1])
    assert blocks_of(net) == couplings
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), *couplings)) == couplings
    assert blocks_of(inv.nn.Lowered(inv.chain(*(~block.op for block in couplings)))) == couplings
    assert blocks_of(inv.nn.Sequential(inv.nn.Sequential(*couplings[:2]), *couplings[2:])) == couplings
    assert blocks_of(couplings[0]) == couplings[:1]
    assert blocks_of(nn.Sequential(couplings[0], couplings[0])) == couplings[:1]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(inv.errors.OptionError) as found:
        inv.nn.fully_shard_blocks(nn.Linear(2, 2))
    assert str(found.value) == (
        "fully_shard_blocks: Linear has no blocks, expected modules of this package inside, with parameters; make each block a module, "
        "inv.nn.Lowered(op) or inv.nn.Coupling(f, g), and chain them in an inv.nn.Sequential"
    )


@distributed
def test_a_model_with_sharded_parts_is_refused(run: Callable[[int], Run]) -> None:
    for _, message in run(2).seen("fsdp_errors_of_fully_shard_blocks"):
        assert message == (
            "fully_shard_blocks: 2.g is under fully_shard already, expected a model of which nothing is sharded; "
            "leave the other call out"
        )


# ---- the command -----------------------------------------------------------------------------------------------------


@distributed
def test_the_command_starts_its_ranks_and_compares() -> None:
    command = [sys.executable, "-m", "invfunc", "demo", "--distributed", "fsdp", "--depth", "2", "--batch", "64"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert shown.returncode == 0, shown.stderr
    rows = re.findall(r"^ +([01]) +(\S+) +(\S+) +\S+$", shown.stdout, re.MULTILINE)
    assert [rank for rank, *_ in rows] == ["0", "1"]
    for _, measured, predicted in rows:
        assert float(predicted) == pytest.approx(float(measured), rel=0.1)
    apart = re.search(r"losses off by (\S+), weights by (\S+)", shown.stdout)
    assert apart is not None
    assert max(map(float, apart.groups())) <= 1e-5  # float32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "meta"], "--distributed runs on the CPU, not on meta"),
        (["--batch", "63"], "--batch 63 can not be shared evenly by 2 ranks"),
    ],
)
def test_what_the_command_can_not_do_is_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["demo", "--distributed", "ddp", *flags])
    assert left.value.code == 2
    assert capsys.readouterr().err == f"python -m invfunc demo: {message}\n"
