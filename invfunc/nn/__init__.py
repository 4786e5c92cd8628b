"""The `torch.nn` face of the same values: modules that own parameters."""

from .blocks import checkpoint_blocks
from .distributed import fully_shard_blocks
from .layers import (
    ActNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Conv1d,
    Conv2d,
    Conv3d,
    Flatten,
    Identity,
    Linear,
    LULinear,
    OrthogonalLinear,
    Pad,
    PixelShuffle,
    PixelUnshuffle,
    SplineCoupling,
)
from .lowered import Coupling, Layer, Lowered, Sequential
from .module import InvertibleModule, Module
from .residual import reversible

__all__ = [
    "ActNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Coupling",
    "Flatten",
    "Identity",
    "InvertibleModule",
    "LULinear",
    "Layer",
    "Linear",
    "Lowered",
    "Module",
    "OrthogonalLinear",
    "Pad",
    "PixelShuffle",
    "PixelUnshuffle",
    "Sequential",
    "SplineCoupling",
    "checkpoint_blocks",
    "fully_shard_blocks",
    "reversible",
]
