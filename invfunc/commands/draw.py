"""Draw a pipeline, as text or into a file: its parts and, for an input, what flows through them and what is kept."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..look.draw import draw
from .shell import Refusal, add_op, loaded, refuse, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``python -m invfunc draw`` takes."""
    add_op(parser, needs_input=False)
    parser.add_argument("--out", type=Path, help="a file that ends in .svg, .html, .png or .txt, instead of text here")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the drawing, or save it."""
    op = loaded(options.op)
    with refuse(shown(options)):
        drawing = draw(op, *map(tuple, options.shape))
    if options.out is None:
        print(drawing)
        return
    try:
        drawing.save(options.out)
    except OSError as error:
        raise Refusal(f"--out {options.out}: {error.strerror}") from error
