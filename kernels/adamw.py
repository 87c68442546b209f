"""Update functions of AdamW (tritopt/optimizers/adamw.py)."""

from __future__ import annotations

from tritopt.kernels.adam import adam_update
from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div_by_root


@triton.jit
def adamw_update(w, g, state, s):
    """Adam, and apart from the moments a decay of the old weight."""
    return adam_update(s.keep * w, g, state, s)


@triton.jit
def adamw_amsgrad_update(w, g, state, s):
    """AdamW, whose root is that of the largest variance so far."""
    mean, var, max_var = state
    mean = s.beta1 * mean + s.one_minus_beta1 * g
    var = s.beta2 * var + s.one_minus_beta2 * (g * g)
    max_var = tl.maximum(max_var, var, propagate_nan=tl.PropagateNan.ALL)
    return s.keep * w - s.lr * div_by_root(mean, max_var, s.epsilon), (mean, var, max_var)
