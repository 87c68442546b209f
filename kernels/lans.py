"""Update functions of LANS (tritopt/optimizers/lans.py), three phases.

The directions are computed in both of the later phases rather than written out between them: that needs no memory, and
reading gradient and moments again moves fewer bytes than writing and reading two directions in fp32.
"""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import clip, div, sqrt


@triton.jit
def _normalised(g, square_sum, s):
    """g over its norm, then clipped; a gradient of norm 0 stays as it is."""
    norm = sqrt(square_sum)
    return clip(div(g, tl.where(norm == 0, 1.0, norm).to(g.dtype)), s.bound)


@triton.jit
def _directions(w, g, mean, var, s):
    """Of the mean and of the gradient, both with the decay."""
    root = sqrt(var * s.var_correction) + s.epsilon
    decay = s.wd * w
    return div(mean * s.mean_correction, root) + decay, div(g, root) + decay


@triton.jit
def _trust_ratio(weight_sum, direction_sum, s):
    """|w| within its bounds over |direction|, fp64; 1 where either is 0."""
    weight_norm = sqrt(weight_sum)
    weight_norm = tl.where(weight_norm < s.lower_bound, s.lower_bound, weight_norm)
    weight_norm = tl.where(weight_norm > s.upper_bound, s.upper_bound, weight_norm)
    direction_norm = sqrt(direction_sum)
    is_zero = (weight_norm == 0) | (direction_norm == 0)
    return tl.where(is_zero, 1.0, weight_norm / tl.where(is_zero, 1.0, direction_norm))


@triton.jit
def lans_gradient(w, g, state, s):
    """Phase 1: the sum of squares of the gradient."""
    return w, state, (g * g,)


@triton.jit
def lans_moments(w, g, state, s, sums):
    """Phase 2: the moments, and the sums of squares of the weight and of both directions."""
    mean, var = state
    unit = _normalised(g, sums[0], s)
    mean = s.beta1 * mean + s.one_minus_beta1 * unit
    var = s.beta2 * var + s.one_minus_beta2 * (unit * unit)
    by_mean, by_grad = _directions(w, unit, mean, var, s)
    return w, (mean, var), (w * w, by_mean * by_mean, by_grad * by_grad)


@triton.jit
def lans_update(w, g, state, s, sums):
    """Phase 3: the weight, along both directions, each scaled by its own trust ratio. `sums`: of phase 1, then 2."""
    mean, var = state
    by_mean, by_grad = _directions(w, _normalised(g, sums[0], s), mean, var, s)
    mean_ratio = _trust_ratio(sums[1], sums[2], s).to(w.dtype)
    grad_ratio = _trust_ratio(sums[1], sums[3], s).to(w.dtype)
    return w - s.lr * (s.beta1 * (mean_ratio * by_mean) + s.one_minus_beta1 * (grad_ratio * by_grad)), state
