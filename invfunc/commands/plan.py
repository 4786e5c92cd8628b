"""Plan a model: print the fastest way to train it within a budget, and save it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..plan.value import plan
from .shell import Refusal, add_op, loaded, random_inputs, refuse, shown

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
    f = loaded(options.op)
    limits = {"budget": options.budget, "max_time": options.max_time, "max_error": options.max_error}
    with refuse(shown(options, options.dtype)):
        inputs = tuple(random_inputs(options.shape, getattr(torch, options.dtype)))
        found = plan(f, inputs[0] if len(inputs) == 1 else inputs, **limits)
    print(found)
    try:
        found.save(options.out)
    except OSError as error:
        raise Refusal(f"--out {options.out}: {error.strerror}") from error
    print(f"saved    {options.out}")
