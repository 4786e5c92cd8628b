"""invfunc: deep networks at constant activation memory, by composing invertible functions and lowering them once."""

from . import errors, nn, ops, testing
from .checkpoint import checkpoint, compile_stages, mode, recompute, reconstruct, store
from .core.combine import concat, parallel, permute_wires, split, swap
from .core.couple import additive, affine, couple, exp_scale, sigmoid_scale, tanh_scale
from .core.op import Invertible, chain, identity, invert, one_way, pair
from .debug import debug
from .engine.meter import DriftWarning
from .engine.replay import record
from .exact.transform import exact
from .log_det import as_transform, flow, from_transform, log_det, with_log_det
from .look.draw import Drawing, draw
from .look.memory import Measurement, measure
from .look.report import Report, calibrate, check
from .look.saved import print_saved, saved
from .ops import reversible_residual
from .plan import Costs, Plan, plan, profile

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
