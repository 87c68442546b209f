"""Update functions of GroupAdaGrad (tritopt/optimizers/groupadagrad.py), for kernels/drivers/row_apply.py."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div, sqrt


@triton.jit
def groupadagrad_square(g, s):
    """Squares of the gradient, to be averaged over a row."""
    return g * g


@triton.jit
def groupadagrad_history(state, mean, s):
    """A row's history, `mean` being that of the squares in its gradient."""
    (history,) = state
    return (history + mean,)


@triton.jit
def groupadagrad_update(w, g, state, s):
    """AdaGrad, with one rate for the whole row."""
    (history,) = state
    return w - s.lr * div(g, sqrt(history) + s.epsilon)
