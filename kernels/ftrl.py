"""Update function of Ftrl (tritopt/optimizers/ftrl.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import clip, div, sqrt


@triton.jit
def ftrl_update(w, g, state, s):
    """The weight is solved for anew from z and n; z - clip(z) is z shrunk towards 0 by lamda1."""
    z, n = state
    new_n = n + g * g
    root = sqrt(new_n)
    z = z + (g - (root - sqrt(n)) * s.inverse_lr * w)
    shrunk = clip(z, s.lamda1) - z
    # Not 0 / 0 where beta, wd and all gradients so far are 0.
    w = tl.where(shrunk == 0, shrunk, div(shrunk, root * s.inverse_lr + s.offset))
    return w, (z, new_n)
