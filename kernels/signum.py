"""Update functions of Signum (tritopt/optimizers/signum.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import sign


@triton.jit
def signsgd_update(w, g, state, s):
    """The gradient's sign moves the weight, no state."""
    return s.keep * w - s.lr * sign(g), state


@triton.jit
def signum_update(w, g, state, s):
    """The sign of an average of the gradients moves the weight; the average is kept with the opposite sign."""
    (momentum,) = state
    momentum = s.momentum * momentum - s.one_minus_momentum * g
    return s.keep * w + s.lr * sign(momentum), (momentum,)
