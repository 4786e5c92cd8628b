"""Measure whether an op can be trusted to be rebuilt: the report of `invfunc.check` on random numbers."""

from __future__ import annotations

import argparse

import torch

from ..engine.meter import TOLERANCES
from ..look.report import check
from .shell import add_op, loaded, random_inputs, refuse, shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``python -m invfunc check`` takes."""
    add_op(parser, needs_input=True)
    names = [str(dtype).removeprefix("torch.") for dtype in TOLERANCES]
    parser.add_argument("--dtype", default="float32", choices=names)
    parser.add_argument("--tolerance", type=float, help="the relative error that is allowed")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the report; 0 if nothing is wrong, else 1."""
    op = loaded(options.op)
    with refuse(shown(options, options.dtype)):
        inputs = random_inputs(options.shape, getattr(torch, options.dtype))
        report = check(op, *inputs, tolerance=options.tolerance)
    print(report)
    return 0 if report else 1
