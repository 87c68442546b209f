"""Update functions of Muon (tritopt/optimizers/muon.py), for passes of the driver."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton


@triton.jit
def muon_direction(w, g, state, s):
    """The momentum, and behind it the direction that is to be orthogonalised."""
    momentum = s.momentum * state[0] + s.one_minus_momentum * g
    return w, (momentum, s.ahead * momentum + s.one_minus_ahead * g)


@triton.jit
def muon_update(w, g, state, s):
    """A step along the orthogonal direction; the old weight decays."""
    (direction,) = state
    return s.keep * w - s.lr * direction, ()


@triton.jit
def normuon_read(w, g, state, s):
    """Second moments of rows, as they are, for those who normalise the rows."""
    return w, (state[0], state[0])


@triton.jit
def normuon_moments(w, g, state, s):
    """Second moments of rows, given the means of squares of this step."""
    moments, squares = state
    return w, (s.beta2 * moments + s.one_minus_beta2 * squares,)
