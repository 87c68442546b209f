"""Update function of NAG (tritopt/optimizers/nag.py); without momentum it is `sgd_update`."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton


@triton.jit
def nag_update(w, g, state, s):
    """Nesterov: step to where the momentum will carry the weight."""
    (momentum,) = state
    momentum = s.momentum * momentum - s.lr * g
    return w + (s.momentum * momentum - s.lr * g), (momentum,)
