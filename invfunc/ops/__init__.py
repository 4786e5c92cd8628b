"""The catalogue: invertible ops, one constructor each, one family a file."""

from ..combinators import additive, affine
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
from .iterative import autoregressive, exact_log_det, power_series_log_det, residual_flow, roulette_log_det
from .linear import diagonal, householder, linear, lu, orthogonal, tall_linear, triangular
from .mixture import mixture_cdf, mixture_logit
from .normalisation import actnorm, actnorm_init, batch_norm
from ..packing import pack_bits, unpack_bits
from .residual import (
    enter_streams,
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
from .streams import (
    couple_streams,
    given,
    masked_couple,
    per_element,
    recursive_couple,
    spline_couple,
    split_mask,
)
