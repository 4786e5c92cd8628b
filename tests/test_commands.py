"""``python -m invfunc``: which commands there are, what they print, and that every error is one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import invfunc as inv
from invfunc.__main__ import COMMANDS, main

linear = torch.nn.Linear(4, 4)
blocks = torch.nn.Sequential(linear, torch.nn.Tanh())
five = 5
net = inv.chain(inv.split(2), *[inv.couple(torch.sin, torch.cos)] * 3, inv.concat(2))


BLOCKS = "test_commands:blocks", "--max-time", "1.5"


def main_of(command: str) -> None:
    main([command])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_alone_it_prints_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments)
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m invfunc [--help] [--version] COMMAND")
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"invfunc 0.1.0, torch {torch.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m invfunc {name}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chek"], "python -m invfunc: there is no command chek; did you mean check?"),
        (["--versoin"], "python -m invfunc: there is no command --versoin; did you mean --version?"),
        (["CHECK"], "python -m invfunc: there is no command CHECK; did you mean check?"),
        (["draw", "test_commands:Net"], "of an op or what makes one; did you mean net?"),
        (["xyzzy"], "python -m invfunc: there is no command xyzzy"),
        (["demo", "--dept", "3", "--epohcs", "1"], "demo: unrecognized arguments: --epohcs 1; did you mean --epochs?"),
        (["draw", "test_commands:nt"], "expected package.module:name, of an op or what makes one; did you mean net?"),
        (["draw", "test_commands:net", "--out", "x.pdf"], "draw: can not save x.pdf, expected a name ending in .svg, "),
        (["draw", "test_commands:net", "--out", "no/x.svg"], "--out no/x.svg: No such file or directory"),
        (["draw", "test_commands:net", "--shape", "8,x"], "argument --shape: 8,x, expected sizes like 8,16,32,32"),
        (["draw", "test_commands:net", "--shape", "8,0"], "argument --shape: 8,0, expected sizes like 8,16,32,32"),
        (["draw", "test_commands:linear", "--shape", "8,5"], "draw: test_commands:linear on (8, 5): "),
        (["check", "test_commands:linear", "--shape", "8,5"], "check: test_commands:linear on (8, 5) float32: "),
        (["plan", *BLOCKS, "--shape", "8,5"], "plan: test_commands:blocks on (8, 5) float32: "),
        (["plan", *BLOCKS, "--shape=-8,4"], "argument --shape: -8,4, expected sizes like 8,16,32,32"),
        (["plan", *BLOCKS, "--shape", "8,4", "--dtype", "int64"], "plan: test_commands:blocks on (8, 4) int64: "),
        (["plan", *BLOCKS, "--shape", "8,4", "--dtype", "float"], "argument --dtype: invalid choice: 'float'"),
        (["plan", *BLOCKS, "--shape", "8,4", "--out", "no/plan.json"], "--out no/plan.json: No such file or directory"),
        (["plan", *BLOCKS, "--shape", "8,4", "--out", "."], "--out .: Is a directory"),
        (["draw", "test_commands"], "module 'test_commands' has no attribute '', expected package.module:name"),
        (["draw", "no_such_module:net"], "no_such_module:net: No module named 'no_such_module', expected package.mod"),
        (["draw", ".relative:net"], "the 'package' argument is required to perform a relative import for '.relative'"),
        (["draw", "test_commands:five"], "test_commands:five: 'int' object is not callable, expected package.module:"),
        (["draw", "test_commands:main_of"], "test_commands:main_of: main_of() missing 1 required positional argument"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_where_nobody_reads_it_ends_without_a_word(unbuffered: str) -> None:
    unread, output = os.pipe()
    os.close(unread)
    command = [sys.executable, "-m", "invfunc", "--help"]
    ended = subprocess.run(
        command, stdout=output, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, check=False
    )
    os.close(output)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_draw_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main(["draw", "test_commands:net", "--shape", "16,8"])
    assert capsys.readouterr().out == f"{inv.draw(net, (16, 8))}\n"


def test_draw_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["draw", "test_commands:net", "--out", str(tmp_path / "net.svg")])
    assert (tmp_path / "net.svg").read_text(encoding="utf-8") == inv.draw(net)._repr_svg_()
    assert capsys.readouterr().out == ""


def test_what_stands_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine_alone.py").write_text("import invfunc as inv\n\n\ndef make():\n    return inv.ops.exp()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["draw", "mine_alone:make"])
    assert capsys.readouterr().out == "exp()\n"


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("imports_nothing", "import no_such_module_either", "No module named 'no_such_module_either'"),
        ("no_code", "def (", "invalid syntax"),
        ("divides", "1 / 0", "division by zero"),
        ("makes_none", "def net():\n    raise ValueError('two\\nlines')", "two, expected"),
        ("says_nothing", "def net():\n    raise ValueError", "ValueError, expected"),
    ],
)
def test_a_module_that_fails_is_one_line(
    name: str,
    code: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as left:
        main(["draw", f"{name}:net"])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith(f"python -m invfunc draw: {name}:net: {message}")
    assert error.count("\n") == 1
