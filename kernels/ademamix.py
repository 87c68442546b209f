"""Update function of AdEMAMix (tritopt/optimizers/ademamix.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div_by_root


@triton.jit
def ademamix_update(w, g, state, s):
    """Moments and a second, slower mean; the rates carry the corrections, and the slow mean's its weight too."""
    mean, slow, var = state
    mean = s.beta1 * mean + s.one_minus_beta1 * g
    slow = s.beta3 * slow + s.one_minus_beta3 * g
    var = s.beta2 * var + s.one_minus_beta2 * (g * g)
    step = div_by_root(s.mean_lr * mean + s.slow_lr * slow, var, s.epsilon)
    return s.keep * w - step, (mean, slow, var)
