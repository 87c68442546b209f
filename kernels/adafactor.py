"""Update functions of Adafactor (tritopt/optimizers/adafactor.py), for kernels/drivers/factored_apply.py."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div, sqrt

TINY = tl.constexpr(2.0**-126)  # the smallest normal fp32


@triton.jit
def _at_least(x, bound):
    return tl.where(x < bound, bound, x)  # NaN stays, which a maximum would drop


@triton.jit
def _epsilon1(x, s):
    """The scalar, or the machine epsilon of x's dtype where that is negative."""
    if x.dtype == tl.float64:
        return tl.where(s.epsilon1 < 0, 2.0**-52, s.epsilon1)
    else:
        return tl.where(s.epsilon1 < 0, 2.0**-23, s.epsilon1)


@triton.jit
def adafactor_square(g, s):
    """Squares of the gradient, to be averaged over rows and over columns."""
    return g * g


@triton.jit
def adafactor_moment(var, squares, s):
    """Running mean of the squares: of one element, or of their mean over a row or a column."""
    return s.beta2 * var + s.one_minus_beta2 * squares


@triton.jit
def adafactor_variance(row_var, col_var, row_mean, s):
    """The second moment out of its factors. `row_mean`: mean of a matrix's row_var."""
    floor = _at_least(_epsilon1(row_mean, s), TINY)
    return div(row_var, _at_least(row_mean, floor)) * col_var


@triton.jit
def adafactor_direction(g, var, s):
    """The gradient over its root mean square."""
    epsilon = _epsilon1(var, s)
    return div(g, sqrt(_at_least(var, _at_least(epsilon * epsilon, TINY))))


@triton.jit
def adafactor_update(w, direction, s, weight_square, direction_square):
    """A step relative to the weight's size, the direction bounded; `*_square`: fp64, mean squares of the tensor."""
    size = _at_least(sqrt(weight_square), s.epsilon2.to(tl.float64))
    excess = _at_least(sqrt(direction_square) / s.clip_threshold.to(tl.float64), 1.0)
    step = (s.rate.to(tl.float64) * size / excess).to(w.dtype)
    return s.keep * w - step * direction
