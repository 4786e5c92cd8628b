"""Plan a model: print the fastest way to train it within a budget, and save it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..plan.value import plan
from .shell import add_op, loaded, random_inputs

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``python -m invfunc plan`` takes."""
    parser.set_defaults(run=run)
    add_op(parser, needs_input=True)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the input")
    parser.add_argument("--budget", help="the most memory of a step, as 2GiB")
    parser.add_argument("--max-time", type=float, help="the most time of a step, over a plain one")
    parser.add_argument("--max-error", type=float, help="the largest relative gradient error of inverses")
    parser.add_argument("--out", type=Path, default=Path("plan.json"), help="where the plan goes; see Plan.load")


def run(options: argparse.Namespace) -> None:
    """Print the plan, and save it."""
    inputs = tuple(random_inputs(options.shape, getattr(torch, options.dtype)))
    x = inputs[0] if len(inputs) == 1 else inputs
    limits = {"budget": options.budget, "max_time": options.max_time, "max_error": options.max_error}
    found = plan(loaded(options.op), x, **limits)
    found.save(options.out)
    print(f"{found}\nsaved    {options.out}")
