"""Update functions of Adamax (tritopt/optimizers/adamax.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div


@triton.jit
def _moments(g, state, s, floor):
    """The mean, and the infinity norm of gradients to whose sizes `floor` is added."""
    mean, norm = state
    mean = s.beta1 * mean + s.one_minus_beta1 * g
    return mean, tl.maximum(s.beta2 * norm, tl.abs(g) + floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def adamax_update(w, g, state, s):
    """Adam with the infinity norm of the gradients; s.lr carries the correction of the mean."""
    mean, norm = _moments(g, state, s, 0.0)
    return w - div(s.lr * mean, norm + s.epsilon), (mean, norm)


@triton.jit
def adamax_floored_update(w, g, state, s):
    """torch's Adamax: epsilon is added to each gradient's size, and so is part of the norm."""
    state = _moments(g, state, s, s.epsilon)
    return w - s.lr * div(state[0], state[1]), state
