"""Update function of AdaBelief (tritopt/optimizers/adabelief.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div_by_root


@triton.jit
def adabelief_update(w, g, state, s):
    """Adam with the variance about the mean; epsilon enters it at each step, and the root once more."""
    mean, var = state
    mean = s.beta1 * mean + s.one_minus_beta1 * g
    surprise = g - mean
    var = s.beta2 * var + s.one_minus_beta2 * (surprise * surprise) + s.epsilon
    return w - s.lr * div_by_root(mean, var, s.epsilon), (mean, var)
