"""The demo: it learns, the lowered network walks the same path as the plain one, and what is wrong is one line."""

import sys
from pathlib import Path

import pytest
import torch

import invfunc as inv
from invfunc.__main__ import main
from invfunc.commands import demo

PNG = b"\x89PNG\r\n\x1a\n"


def test_lowered_and_plain_have_the_same_loss_curve() -> None:
    setting = demo.Setting(epochs=1, batch=256, dtype=torch.float64)
    images, _ = demo.data(setting)
    plain, lowered = (demo.train(way(demo.network(8, setting)), images, setting) for way in demo.WAYS.values())
    assert len(plain) > 4
    assert plain[-1] < plain[0]
    assert max(abs(a - b) for a, b in zip(plain, lowered, strict=True)) <= 1e-6


def test_the_lowered_network_learns() -> None:
    setting = demo.Setting(epochs=2, batch=128)
    images, held_out = demo.data(setting)
    net = inv.checkpoint(demo.network(4, setting))
    demo.train(net, images, setting)
    assert demo.accuracy(net, held_out, setting) > 0.8


def test_lowered_memory_does_not_grow_with_depth() -> None:
    setting = demo.Setting(batch=32)
    images, _ = demo.data(setting)
    batch = demo.batches(images, setting)[0]
    held = [demo.memory(inv.checkpoint(demo.network(depth, setting)), batch, setting)[1] for depth in (2, 8)]
    plain = [demo.memory(demo.network(depth, setting), batch, setting)[1] for depth in (2, 8)]
    assert held[1] <= 1.05 * held[0]
    assert plain[1] > 2 * plain[0]


def test_the_command_prints_a_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.png"
    main(["demo", "--depth", "2", "--epochs", "1", "--batch", "512", "--out", str(out)])
    shown = capsys.readouterr().out
    for word in "depth", "test accuracy", "peak MB", "held MB", "ms per step", "plain", "lowered":
        assert word in shown
    assert out.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth", "-1"], "-1 is not a positive whole number"),
        (["--epochs", "0"], "0 is not a positive whole number"),
        (["--dtype", "int8"], "int8 is not one of float32, float64, bfloat16"),
        (["--device", "abacus"], "abacus is not a device"),
        (["--out", "no/such/folder/x.png"], "--out no/such/folder/x.png: No such file or directory"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_a_wrong_flag_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["demo", *flags])
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "tqdm"])
def test_a_missing_extra_is_one_line(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as left:
        main(["demo"])
    assert left.value.code == 2
    assert f"the demo needs {demo.EXTRAS[module]}; pip install 'invfunc[demo]'\n" in capsys.readouterr().err
