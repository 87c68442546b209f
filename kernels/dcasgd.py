"""Update functions of DCASGD (tritopt/optimizers/dcasgd.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import is_finite


@triton.jit
def _compensated(w, g, previous, s):
    moved = w - previous
    # An infinite weight has not moved, though infinity minus infinity is NaN.
    return g + s.lamda * (g * g) * tl.where(is_finite(moved), moved, 0.0)


@triton.jit
def dcasgd_update(w, g, state, s):
    """Gradient descent along the compensated gradient; the weight that it starts from is kept."""
    (previous,) = state
    return w - s.lr * _compensated(w, g, previous, s), (w,)


@triton.jit
def dcasgd_momentum_update(w, g, state, s):
    """Heavy ball on the compensated gradient; the learning rate is inside the momentum buffer."""
    momentum, previous = state
    momentum = s.momentum * momentum - s.lr * _compensated(w, g, previous, s)
    return w + momentum, (momentum, w)
