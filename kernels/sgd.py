"""Update functions of SGD (tritopt/optimizers/sgd.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton


@triton.jit
def sgd_update(w, g, state, s):
    """Plain gradient descent, no state."""
    return w - s.lr * g, state


@triton.jit
def sgd_momentum_update(w, g, state, s):
    """Heavy ball; the learning rate is inside the momentum buffer."""
    (momentum,) = state
    momentum = s.momentum * momentum - s.lr * g
    return w + momentum, (momentum,)
