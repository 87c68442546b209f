"""Update function of AdaDelta (tritopt/optimizers/adadelta.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div, sqrt


@triton.jit
def adadelta_update(w, g, state, s):
    """The ratio of two running roots is the rate: of past steps, this one not yet included, and of gradients."""
    acc_g, acc_delta = state
    acc_g = s.rho * acc_g + s.one_minus_rho * (g * g)
    delta = div(sqrt(acc_delta + s.epsilon), sqrt(acc_g + s.epsilon)) * g
    acc_delta = s.rho * acc_delta + s.one_minus_rho * (delta * delta)
    return w - s.lr * delta, (acc_g, acc_delta)
