"""Update functions of LANS (tritopt/optimizers/lans.py), three phases.

The directions are computed in both of the later phases rather than written out between them: that needs no memory, and
reading gradient and moments again moves fewer bytes than writing and reading two directions in fp32.
"""

from __future__ import annotations

from tritopt.kernels.lamb import decay_of, trust_ratio
from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import add_decay, clip, div, sqrt


@triton.jit
def _normalised(g, square_sum, s):
    """g over its norm, then clipped; a gradient of norm 0 stays as it is."""
    norm = sqrt(square_sum)
    return clip(div(g, tl.where(norm == 0, 1.0, norm).to(g.dtype)), s.bound)


@triton.jit
def _directions(w, g, mean, var, wd, s):
    """Directions of the mean and of the gradient, both with the decay."""
    root = sqrt(var * s.var_correction) + s.epsilon
    return add_decay(div(mean * s.mean_correction, root), w, wd), add_decay(div(g, root), w, wd)


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
    by_mean, by_grad = _directions(w, unit, mean, var, s.wd, s)
    return w, (mean, var), (w * w, by_mean * by_mean, by_grad * by_grad)


@triton.jit
def lans_update(w, g, state, s, sums):
    """Phase 3: the weight, along both directions, each scaled by its own trust ratio. `sums`: of phase 1, then 2."""
    mean, var = state
    mean_step = s.lr * s.beta1 * trust_ratio(sums[1], sums[2], s).to(w.dtype)
    grad_step = s.lr * s.one_minus_beta1 * trust_ratio(sums[1], sums[3], s).to(w.dtype)
    by_mean, by_grad = _directions(w, _normalised(g, sums[0], s), mean, var, decay_of(sums[1], s), s)
    return w - (mean_step * by_mean + grad_step * by_grad), state
