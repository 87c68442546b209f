"""Update functions of Muon (tritopt/optimizers/muon.py), for two passes of the driver, and the rows of NorMuon."""

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
