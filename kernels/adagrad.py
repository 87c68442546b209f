"""Update function of AdaGrad (tritopt/optimizers/adagrad.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div_by_root


@triton.jit
def adagrad_update(w, g, state, s):
    """The sum of all squares so far scales the rate; epsilon is added to its root."""
    (history,) = state
    history = history + g * g
    return w - s.lr * div_by_root(g, history, s.epsilon), (history,)
