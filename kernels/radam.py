"""Update functions of RAdam (tritopt/optimizers/radam.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div_by_root


@triton.jit
def radam_update(w, g, state, s):
    """Adam, or momentum alone while s.adaptive is 0; s.lr carries the corrections and the rectification."""
    mean, var = state
    mean = s.beta1 * mean + s.one_minus_beta1 * g
    var = s.beta2 * var + s.one_minus_beta2 * (g * g)
    # Data, not a constant: a step is never compiled anew because training has gone on.
    direction = tl.where(s.adaptive != 0, div_by_root(mean, var, s.epsilon), mean)
    return w - s.lr * direction, (mean, var)


@triton.jit
def radam_decayed_update(w, g, state, s):
    """RAdam, and apart from the moments a decay of the old weight."""
    return radam_update(s.keep * w, g, state, s)
