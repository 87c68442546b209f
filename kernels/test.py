"""Update function of Test (tritopt/optimizers/test.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton


@triton.jit
def test_update(w, g, state, s):
    """Plain gradient descent; the state is left alone."""
    return w - s.lr * g, state
