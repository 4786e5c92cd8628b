"""invfunc: deep networks at constant activation memory, by composing invertible functions and lowering them once."""

from . import errors, nn, ops, testing
from .checkpoint import checkpoint, compile_stages, mode, recompute, reconstruct, store
from .combinators import (
    additive,
    affine,
    concat,
    couple,
    exp_scale,
    parallel,
    permute_wires,
    sigmoid_scale,
    split,
    swap,
    tanh_scale,
)
from .debug import debug
from .draw import Drawing, draw
from .drift import DriftWarning
from .exact import exact
from .invertible import Invertible, chain, identity, invert, one_way, pair
from .log_det import as_transform, flow, from_transform, log_det, with_log_det
from .memory import Measurement, measure
from .ops import reversible_residual
from .planning import Costs, Plan, plan, profile
from .replay import record
from .report import Report, calibrate, check
from .saved import print_saved, saved

__all__ = [
    "Costs",
    "Drawing",
    "DriftWarning",
    "Invertible",
    "Measurement",
    "Plan",
    "Report",
    "additive",
    "affine",
    "as_transform",
    "calibrate",
    "chain",
    "check",
    "checkpoint",
    "compile_stages",
    "concat",
    "couple",
    "debug",
    "draw",
    "errors",
    "exact",
    "exp_scale",
    "flow",
    "from_transform",
    "identity",
    "invert",
    "log_det",
    "measure",
    "mode",
    "nn",
    "one_way",
    "ops",
    "pair",
    "parallel",
    "permute_wires",
    "plan",
    "print_saved",
    "profile",
    "recompute",
    "reconstruct",
    "record",
    "reversible_residual",
    "saved",
    "sigmoid_scale",
    "split",
    "store",
    "swap",
    "tanh_scale",
    "testing",
    "with_log_det",
]
