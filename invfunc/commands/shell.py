"""What the commands share: errors in one line, and how an op and its inputs are named in a shell."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointedFunction
from ..core.op import Invertible
from ..errors import InvertibleError, OptionError


class Refusal(Exception):
    """What the user reads instead of a traceback."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest word where one is unknown."""

    def error(self, message: str) -> NoReturn:
        """Leave with the message."""
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_all(self, arguments: list[str]) -> argparse.Namespace:
        """Parse; what is left over is an error."""
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(unknown[0], known)}")
        return options


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean ...?"``, if a known word is near, in capitals or not.

    Example:
        >>> nearest("chek", ["check", "draw"])
        '; did you mean check?'
    """
    words = {one.lower(): one for one in known}
    found = get_close_matches(word.lower(), words, 1)
    return f"; did you mean {words[found[0]]}?" if found else ""


# ---- an op and its inputs --------------------------------------------------------------------------------------------


def add_op(parser: argparse.ArgumentParser, *, needs_input: bool) -> None:
    """The arguments that name an op and the shapes of its input."""
    parser.add_argument("op", help="package.module:name of an op or a module, or of a function that makes one")
    shape = "as 8,16,32,32; once for each component"
    parser.add_argument("--shape", action="append", required=needs_input, default=[], type=_shape, help=shape)


def _shape(text: str) -> list[int]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text}, expected sizes like 8,16,32,32")
    return [int(size) for size in sizes]


def random_inputs(shapes: list[list[int]], dtype: torch.dtype) -> list[Tensor]:
    """Normal numbers, the same in each call; zeros where they count something, such as tokens."""
    if not dtype.is_floating_point:
        return [torch.zeros(shape, dtype=dtype) for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def loaded(path: str) -> Any:
    """``package.module:name``: an op, or what a function that takes nothing makes; found from where the shell is.

    Raises:
        OptionError: When there is no such thing; the nearest name is suggested.
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module_name), name)
        return found if isinstance(found, (Invertible, CheckpointedFunction, nn.Module)) else found()
    except Exception as error:
        is_absent = module_name in sys.modules and not hasattr(sys.modules[module_name], name)
        near = nearest(name, vars(sys.modules[module_name])) if is_absent else ""
        raise OptionError(
            f"{path}: {_told(error)}", expected=f"package.module:name, of an op or what makes one{near}"
        ) from error


@contextmanager
def refuse(subject: str) -> Iterator[None]:
    """Where the user's code runs: what it raises is one line, and torch does not log it besides."""
    logged = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except InvertibleError:
        raise
    except Exception as error:
        raise Refusal(f"{subject}: {_told(error)}") from error
    finally:
        logging.disable(logged)


def _told(error: Exception) -> str:
    """An error in one line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def shown(options: argparse.Namespace, dtype: str = "") -> str:
    """The op and its input, as the command line names them."""
    shapes = ", ".join(str(tuple(shape)) for shape in options.shape)
    return " ".join(filter(None, [options.op, shapes and f"on {shapes}", dtype]))
