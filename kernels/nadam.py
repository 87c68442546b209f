"""Update functions of Nadam (tritopt/optimizers/nadam.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div_by_root


@triton.jit
def nadam_update(w, g, state, s):
    """Adam that looks ahead: the next step's share of the mean, and the gradient itself in place of this step's."""
    mean, var = state
    mean = s.beta1 * mean + s.one_minus_beta1 * g
    var = s.beta2 * var + s.one_minus_beta2 * (g * g)
    ahead = s.mean_share * mean + s.grad_share * g
    return w - s.lr * div_by_root(ahead, var * s.var_correction, s.epsilon), (mean, var)


@triton.jit
def nadam_decayed_update(w, g, state, s):
    """Nadam, and apart from the moments a decay of the old weight."""
    return nadam_update(s.keep * w, g, state, s)
