"""invfunc: deep networks at constant activation memory, by composing invertible functions and lowering them once."""

from . import compat, errors, look, nn, ops, testing
from .checkpoint import checkpoint, compile_stages, mark
from .core.combine import concat, parallel, permute_wires, split, swap
from .core.couple import additive, affine, couple
from .core.op import Invertible, chain, invert, one_way, pair
from .debug import debug
from .engine.conditions import pin
from .engine.keep import keep
from .engine.mode import mode
from .exact.transform import exact
from .flows import flow
from .log_det import log_det, with_log_det
from .look import check, draw, measure
from .plan import plan

__all__ = [
    "Invertible",
    "additive",
    "affine",
    "chain",
    "check",
    "checkpoint",
    "compat",
    "compile_stages",
    "concat",
    "couple",
    "debug",
    "draw",
    "errors",
    "exact",
    "flow",
    "invert",
    "keep",
    "log_det",
    "look",
    "mark",
    "measure",
    "mode",
    "nn",
    "one_way",
    "ops",
    "pair",
    "parallel",
    "permute_wires",
    "pin",
    "plan",
    "split",
    "swap",
    "testing",
    "with_log_det",
]
