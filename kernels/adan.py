"""Update function of Adan (tritopt/optimizers/adan.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div_by_root


@triton.jit
def adan_update(w, g, state, s):
    """Moments of the gradient, of its change, and of the gradient looked ahead along that change."""
    mean, diff, var, previous = state
    # No gradient came before the first. As a subtraction of g, so that NaN and infinity spread to `diff` too.
    change = g - tl.where(s.first != 0, g, previous)
    ahead = g + s.beta2 * change
    mean = s.beta1 * mean + s.one_minus_beta1 * g
    diff = s.beta2 * diff + s.one_minus_beta2 * change
    var = s.beta3 * var + s.one_minus_beta3 * (ahead * ahead)
    step = div_by_root(s.mean_lr * mean + s.diff_lr * diff, var, s.epsilon)
    return (w - step) * s.keep, (mean, diff, var, g)
