"""Update function of Lion (tritopt/optimizers/lion.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import sign


@triton.jit
def lion_update(w, g, state, s):
    """The sign of one average of the gradients moves the weight, another average is kept."""
    (momentum,) = state
    direction = sign(s.beta1 * momentum + s.one_minus_beta1 * g)
    momentum = s.beta2 * momentum + s.one_minus_beta2 * g
    return s.keep * w - s.lr * direction, (momentum,)
