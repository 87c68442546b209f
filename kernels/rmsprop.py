"""Update functions of RMSProp (tritopt/optimizers/rmsprop.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import clip, div, sqrt


@triton.jit
def rmsprop_update(w, g, state, s):
    """Divided by the root of the second moment, epsilon added to the root."""
    (var,) = state
    var = s.rho * var + s.one_minus_rho * (g * g)
    return clip(w - s.lr * div(g, sqrt(var) + s.epsilon), s.clip_weights), (var,)


@triton.jit
def rmsprop_centered_update(w, g, state, s):
    """Divided by the root of the variance, epsilon inside the root, with heavy-ball momentum."""
    mean, var, mom = state
    mean = s.rho * mean + s.one_minus_rho * g
    var = s.rho * var + s.one_minus_rho * (g * g)
    mom = s.momentum * mom - s.lr * div(g, sqrt(var - mean * mean + s.epsilon))
    return clip(w + mom, s.clip_weights), (mean, var, mom)
