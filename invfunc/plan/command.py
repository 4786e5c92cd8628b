"""Plan a model: print the fastest way to train it within a budget, and save it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..look.report import _loaded, _shape
from .value import plan

DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``python -m invfunc plan`` takes."""
    parser.set_defaults(run=_from_shell)
    parser.add_argument("op", help="package.module:name of a model or an op, or of a function that makes one")
    parser.add_argument("--shape", action="append", required=True, help="as 8,16,32,32; once for each component")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the input")
    parser.add_argument("--budget", help="the most memory of a step, as 2GiB")
    parser.add_argument("--max-time", type=float, help="the most time of a step, over a plain one")
    parser.add_argument("--max-error", type=float, help="the largest relative gradient error of inverses")
    parser.add_argument("--out", type=Path, default=Path("plan.json"), help="where the plan goes; see Plan.load")


def _from_shell(options: argparse.Namespace) -> int:
    """Print the plan, and save it."""
    inputs = tuple(_input(text, getattr(torch, options.dtype)) for text in options.shape)
    x = inputs[0] if len(inputs) == 1 else inputs
    limits = {"budget": options.budget, "max_time": options.max_time, "max_error": options.max_error}
    found = plan(_loaded(options.op), x, **limits)
    found.save(options.out)
    print(f"{found}\nsaved    {options.out}")
    return 0


def _input(shape: str, dtype: torch.dtype) -> Tensor:
    """Random numbers; zeros where they count something, such as tokens."""
    if not dtype.is_floating_point:
        return torch.zeros(_shape(shape), dtype=dtype)
    return torch.randn(_shape(shape), generator=torch.Generator().manual_seed(0), dtype=dtype)
