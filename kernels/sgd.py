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


@triton.jit
def sgd_buffer_update(w, g, state, s):
    """torch's momentum: the buffer holds gradients, and the learning rate multiplies all of it."""
    (buffer,) = state
    buffer = s.momentum * buffer + s.grad_share * g
    return w - s.lr * buffer, (buffer,)


@triton.jit
def sgd_nesterov_update(w, g, state, s):
    """torch's Nesterov momentum: the gradient, and the share of the buffer that the next step will keep."""
    (buffer,) = state
    buffer = s.momentum * buffer + g
    return w - s.lr * (g + s.momentum * buffer), (buffer,)
