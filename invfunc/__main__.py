"""``python -m invfunc``: the commands, each in a file of `invfunc.commands`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from .commands.shell import Parser, Refusal, nearest
from .errors import InvertibleError

PROGRAM = "python -m invfunc"

COMMANDS = {
    "check": "measure whether an op can be trusted to be rebuilt",
    "plan": "the fastest way to train a model within a budget",
    "draw": "a picture of a pipeline, and what it keeps",
    "demo": "train a reversible network on real images at flat memory",
}


UNREAD = 141  # what a shell has for a program that writes where nobody reads, as into head: no verdict of ours


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what is wrong with it is one line on stderr and exit code 2."""
    try:
        _main(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        sys.exit(UNREAD)


def _main(given: list[str]) -> None:
    if not given or given[0] in ("-h", "--help"):
        print(_help())
    elif given[0] == "--version":
        print(_versions())
    elif code := _run(*given):
        sys.exit(code)


def _run(name: str, *arguments: str) -> int | None:
    if name not in COMMANDS:
        Parser(PROGRAM).error(f"there is no command {name}{nearest(name, [*COMMANDS, '--help', '--version'])}")
    command = import_module(f"invfunc.commands.{name}")
    parser = Parser(f"{PROGRAM} {name}", description=command.__doc__)
    command.add_arguments(parser)
    options = parser.parse_all(list(arguments))
    try:
        return options.run(options)
    except (Refusal, InvertibleError) as refusal:
        parser.error(str(refusal))


def _help() -> str:
    lines = [f"usage: {PROGRAM} [--help] [--version] COMMAND ...", "", "commands:"]
    lines += [f"  {name:6} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", f"`{PROGRAM} COMMAND --help` tells what a command takes."])


def _versions() -> str:
    try:
        own = version("invfunc")
    except PackageNotFoundError:
        own = "(not installed)"
    return f"invfunc {own}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
