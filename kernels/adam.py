"""Update function of Adam (tritopt/optimizers/adam.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div_by_root


@triton.jit
def adam_update(w, g, state, s):
    """Adaptive moments; s.lr carries both bias corrections, epsilon is added to the uncorrected root."""
    mean, var = state
    mean = s.beta1 * mean + s.one_minus_beta1 * g
    var = s.beta2 * var + s.one_minus_beta2 * (g * g)
    return w - s.lr * div_by_root(mean, var, s.epsilon), (mean, var)
