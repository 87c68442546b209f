"""Update functions of RMSProp (tritopt/optimizers/rmsprop.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import clip, div, div_by_root, sqrt


@triton.jit
def _quotient(g, var, s):
    """The gradient over the root of the second moment, epsilon added to the root; and that moment."""
    var = s.rho * var + s.one_minus_rho * (g * g)
    return div_by_root(g, var, s.epsilon), var


@triton.jit
def _averages(g, mean, var, s):
    """Running averages of the gradient and of its square."""
    mean = s.rho * mean + s.one_minus_rho * g
    return mean, s.rho * var + s.one_minus_rho * (g * g)


@triton.jit
def rmsprop_update(w, g, state, s):
    """Gradient over the root of the second moment, epsilon added to the root."""
    quotient, var = _quotient(g, state[0], s)
    return clip(w - s.lr * quotient, s.clip_weights), (var,)


@triton.jit
def rmsprop_centered_update(w, g, state, s):
    """Gradient over the root of the variance, epsilon inside the root, with heavy-ball momentum."""
    mean, var, mom = state
    mean, var = _averages(g, mean, var, s)
    mom = s.momentum * mom - s.lr * div(g, sqrt(var - mean * mean + s.epsilon))
    return clip(w + mom, s.clip_weights), (mean, var, mom)


@triton.jit
def rmsprop_momentum_update(w, g, state, s):
    """torch's momentum: the buffer holds quotients, and the learning rate multiplies all of it."""
    quotient, var = _quotient(g, state[0], s)
    buffer = s.momentum * state[1] + quotient
    return w - s.lr * buffer, (var, buffer)


@triton.jit
def _deviations(g, var, mean, s):
    """The gradient over its standard deviation, epsilon added to that; and the moments."""
    mean, var = _averages(g, mean, var, s)
    return div_by_root(g, var - mean * mean, s.epsilon), var, mean


@triton.jit
def rmsprop_deviation_update(w, g, state, s):
    """Centered as in torch, whose epsilon is outside the root of the deviation."""
    step, var, mean = _deviations(g, state[0], state[1], s)
    return w - s.lr * step, (var, mean)


@triton.jit
def rmsprop_deviation_momentum_update(w, g, state, s):
    """torch's centered form, with its momentum."""
    step, var, mean = _deviations(g, state[0], state[1], s)
    buffer = s.momentum * state[2] + step
    return w - s.lr * buffer, (var, mean, buffer)
