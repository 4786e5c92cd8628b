"""InvTorch's modules: those of `invfunc.nn` by the names that they had; its ``Module`` is our `InvertibleModule`."""

from ...nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Conv1d,
    Conv2d,
    Conv3d,
    Flatten,
    Identity,
    InvertibleModule,
    Linear,
    Pad,
    PixelShuffle,
    Sequential,
)

Module = InvertibleModule

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Flatten",
    "Identity",
    "InvertibleModule",
    "Linear",
    "Module",
    "Pad",
    "PixelShuffle",
    "Sequential",
]
