"""Update function of SGLD (tritopt/optimizers/sgld.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.random import normal


@triton.jit
def sgld_update(w, g, state, s, place):
    """Half a gradient step, and normal noise whose variance is the learning rate."""
    noise = normal((s.key_0, s.key_1, s.key_2, s.key_3), place, s.step, 0).to(w.dtype)
    return w - s.half_lr * g + s.deviation * noise, state
