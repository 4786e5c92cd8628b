"""invfunc: deep networks at constant activation memory, by composing invertible functions and lowering them once."""

from .checkpoint import checkpoint
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
from .invertible import Invertible, chain, identity, invert, one_way, pair
from .replay import record
