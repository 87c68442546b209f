"""Update functions of RMSProp (tritopt/optimizers/rmsprop.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import clip, div, sqrt


@triton.jit
def rmsprop_update(w, g, state, s):
    """Divided by the root of the second moment, epsilon added to the root."""
    (var,) = state
    var = s.rho * var + s.one_minus_rho * (g * g)
    return clip(w - s.lr * div(g, sqrt(var) + s.epsilon), s.clip_weights), (var,)


@triton.jit
def rmsprop_centered_update(w, g, state, s):
    """Divided by the root of the variance, epsilon inside the root, with heavy-ball momentum."""
    mean, var, mom = state
    mean = s.rho * mean + s.one_minus_rho * g
    var = s.rho * var + s.one_minus_rho * (g * g)
    mom = s.momentum * mom - s.lr * div(g, sqrt(var - mean * mean + s.epsilon))
    return clip(w + mom, s.clip_weights), (mean, var, mom)


@triton.jit
def rmsprop_quotient_update(w, g, state, s):
    """torch's plain form."""
    (var,) = state
    var = s.rho * var + s.one_minus_rho * (g * g)
    return w - s.lr * div(g, sqrt(var) + s.epsilon), (var,)


@triton.jit
def rmsprop_momentum_update(w, g, state, s):
    """torch's momentum: the buffer holds quotients, and the learning rate multiplies all of it."""
    var, buffer = state
    var = s.rho * var + s.one_minus_rho * (g * g)
    buffer = s.momentum * buffer + div(g, sqrt(var) + s.epsilon)
    return w - s.lr * buffer, (var, buffer)


@triton.jit
def _centered_quotient(g, var, mean, s):
    var = s.rho * var + s.one_minus_rho * (g * g)
    mean = s.rho * mean + s.one_minus_rho * g
    return div(g, sqrt(var - mean * mean) + s.epsilon), var, mean


@triton.jit
def rmsprop_deviation_update(w, g, state, s):
    """torch's centered form: epsilon is added to the root of the variance."""
    var, mean = state
    quotient, var, mean = _centered_quotient(g, var, mean, s)
    return w - s.lr * quotient, (var, mean)


@triton.jit
def rmsprop_deviation_momentum_update(w, g, state, s):
    """torch's centered form, with its momentum."""
    var, mean, buffer = state
    quotient, var, mean = _centered_quotient(g, var, mean, s)
    buffer = s.momentum * buffer + quotient
    return w - s.lr * buffer, (var, mean, buffer)
