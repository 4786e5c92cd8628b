"""The catalogue: invertible ops, one constructor each, one family a file, and what makes functions for them.

What flow libraries call by other names; `inv` is the package, the rest is here:

- `inv.chain`, `inv.invert`: nflows ``CompositeTransform``, ``InverseTransform``; zuko ``ComposedTransform``.
- `inv.couple`: FrEIA ``NICECouplingBlock``; with ``law=inv.affine`` its ``RNVPCouplingBlock`` and
  ``GLOWCouplingBlock``, nflows ``AffineCouplingTransform``, normflows ``AffineCouplingBlock``.
- `given`: FrEIA ``dims_c``, nflows ``context``, zuko ``context``.
- `masked_couple`: normflows ``MaskedAffineFlow``, zuko ``CouplingTransform``.
- `spline_couple`: nflows ``PiecewiseRationalQuadraticCouplingTransform``, normflows
  ``CoupledRationalQuadraticSpline``.
- `autoregressive`: nflows ``MaskedAffineAutoregressiveTransform``, zuko ``AutoregressiveTransform``.
- `residual_flow`: FrEIA ``IResNetLayer``, normflows ``Residual``.
- `lu`, `orthogonal`: nflows ``LULinear``, zuko ``LULinearTransform`` and ``RotationTransform``.
- `conv1x1`: FrEIA ``Fixed1x1Conv``, nflows ``OneByOneConvolution``, normflows ``Invertible1x1Conv``.
- `permute_channels`: FrEIA ``PermuteRandom``, nflows ``RandomPermutation``, zuko ``PermutationTransform``.
- `pixel_unshuffle`, `haar`: FrEIA ``IRevNetDownsampling``, ``HaarDownsampling``, nflows ``SqueezeTransform``.
- `inv.split` and `inv.parallel`: nflows ``MultiscaleCompositeTransform``, FrEIA and normflows ``Split``.

zuko's transforms are those of `torch.distributions`, with more of them: `from_transform` takes each as it is,
and `as_transform` gives one back.
"""

from ..core.couple import exp_scale, sigmoid_scale, tanh_scale
from ..log_det import as_transform, from_transform
from .conv import conv1d, conv1x1, conv2d, conv3d, mix_channels
from .elementwise import (
    abs,
    asinh,
    atanh,
    cbrt,
    exp,
    leaky_relu,
    leaky_tanh,
    log,
    logit,
    power,
    relu,
    sigmoid,
    sinh,
    softplus,
    tanh,
)
from .grids import bdia, on_grid
from .iterative import autoregressive, exact_log_det, power_series_log_det, residual_flow, roulette_log_det
from .linear import diagonal, householder, linear, lu, orthogonal, tall_linear, triangular
from .mixture import mixture_cdf, mixture_logit
from .normalisation import actnorm, actnorm_init, batch_norm
from .residual import (
    enter_streams,
    hamiltonian,
    hyperbolic,
    leapfrog,
    leave_streams,
    midpoint,
    momentum,
    residual_branch,
    reversible_residual,
)
from .shape import (
    along,
    checkerboard,
    checkerboard_mask,
    flatten,
    flip,
    haar,
    movedim,
    pad,
    pad_to_multiple,
    permute,
    permute_channels,
    pixel_shuffle,
    pixel_unshuffle,
    reshape,
    roll,
    transpose,
)
from .spectral import dct, fft, rfft
from .splines import linear_spline, rational_quadratic_spline
from .streams import couple_streams, given, masked_couple, per_element, recursive_couple, spline_couple, split_mask

__all__ = [
    "abs",
    "actnorm",
    "actnorm_init",
    "along",
    "as_transform",
    "asinh",
    "atanh",
    "autoregressive",
    "batch_norm",
    "bdia",
    "cbrt",
    "checkerboard",
    "checkerboard_mask",
    "conv1d",
    "conv1x1",
    "conv2d",
    "conv3d",
    "couple_streams",
    "dct",
    "diagonal",
    "enter_streams",
    "exact_log_det",
    "exp",
    "exp_scale",
    "fft",
    "flatten",
    "flip",
    "from_transform",
    "given",
    "haar",
    "hamiltonian",
    "householder",
    "hyperbolic",
    "leaky_relu",
    "leaky_tanh",
    "leapfrog",
    "leave_streams",
    "linear",
    "linear_spline",
    "log",
    "logit",
    "lu",
    "masked_couple",
    "midpoint",
    "mix_channels",
    "mixture_cdf",
    "mixture_logit",
    "momentum",
    "movedim",
    "on_grid",
    "orthogonal",
    "pad",
    "pad_to_multiple",
    "per_element",
    "permute",
    "permute_channels",
    "pixel_shuffle",
    "pixel_unshuffle",
    "power",
    "power_series_log_det",
    "rational_quadratic_spline",
    "recursive_couple",
    "relu",
    "reshape",
    "residual_branch",
    "residual_flow",
    "reversible_residual",
    "rfft",
    "roll",
    "roulette_log_det",
    "sigmoid",
    "sigmoid_scale",
    "sinh",
    "softplus",
    "spline_couple",
    "split_mask",
    "tall_linear",
    "tanh",
    "tanh_scale",
    "transpose",
    "triangular",
]
