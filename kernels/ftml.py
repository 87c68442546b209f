"""Update function of FTML (tritopt/optimizers/ftml.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div, sqrt


@triton.jit
def ftml_update(w, g, state, s):
    """The weight is solved for anew from z and d; s.inverse_lr carries the first moment's bias correction."""
    d, v, z = state
    v = s.beta2 * v + s.one_minus_beta2 * (g * g)
    new_d = s.inverse_lr * (sqrt(v * s.var_correction) + s.epsilon)
    z = s.beta1 * z + s.one_minus_beta1 * g - (new_d - s.beta1 * d) * w
    return div(-z, new_d), (new_d, v, z)
