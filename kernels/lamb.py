"""Update functions of LAMB (tritopt/optimizers/lamb.py), two phases.

The direction is computed in both phases rather than written out between them: it needs no memory, and reading the
moments again moves fewer bytes than writing and reading a direction in fp32.
"""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import add_decay, div_by_root, sqrt


@triton.jit
def _direction(mean, var, s):
    """The bias-corrected mean over the root of the second moment, without the decay."""
    return div_by_root(mean * s.mean_correction, var * s.var_correction, s.epsilon)


@triton.jit
def trust_ratio(weight_sum, direction_sum, s):
    """|w| within its bounds over |direction|, fp64; 1 where either is 0 or |w| infinite. Arguments: sums of squares."""
    is_plain = weight_sum == float("inf")
    weight_norm = sqrt(weight_sum)
    weight_norm = tl.where(weight_norm < s.lower_bound, s.lower_bound, weight_norm)
    weight_norm = tl.where(weight_norm > s.upper_bound, s.upper_bound, weight_norm)
    direction_norm = sqrt(direction_sum)
    is_plain = is_plain | (weight_norm == 0) | (direction_norm == 0)
    return tl.where(is_plain, 1.0, weight_norm / tl.where(is_plain, 1.0, direction_norm))


@triton.jit
def decay_of(weight_sum, s):
    """wd, but none of a tensor whose |w| is infinite, where it would make NaN of what is."""
    return tl.where(weight_sum == float("inf"), 0.0, s.wd)


@triton.jit
def lamb_moments(w, g, state, s):
    """Phase 1: the moments, and the sums of squares of the weight and of the direction."""
    mean, var = state
    mean = s.beta1 * mean + s.one_minus_beta1 * g
    var = s.beta2 * var + s.one_minus_beta2 * (g * g)
    direction = add_decay(_direction(mean, var, s), w, s.wd)
    return w, (mean, var), (w * w, direction * direction)


@triton.jit
def lamb_update(w, g, state, s, sums):
    """Phase 2: the weight, along the direction scaled by the trust ratio |w| / |direction|."""
    mean, var = state
    step = s.lr * trust_ratio(sums[0], sums[1], s).to(w.dtype)
    return w - step * add_decay(_direction(mean, var, s), w, decay_of(sums[0], s)), state
