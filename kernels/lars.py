"""Update functions of LARS (tritopt/optimizers/lars.py), two phases."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import add_decay, clip, sqrt


@triton.jit
def lars_norms(w, g, state, s):
    """Phase 1: the sums of squares of the weight and of the rescaled gradient."""
    return w, state, (w * w, g * g)


@triton.jit
def _scaled_gradient(w, g, s, sums):
    """The gradient, clipped and with decay, times the layer's learning rate."""
    weight_norm = sqrt(sums[0] + s.other_rows)
    grad_norm = sqrt(sums[1])
    is_plain = (s.is_layer_wise == 0) | (weight_norm == 0) | (weight_norm == float("inf")) | (grad_norm == 0)
    trust_ratio = s.eta * weight_norm / tl.where(is_plain, 1.0, grad_norm + s.wd * weight_norm + s.epsilon)
    return s.lr * tl.where(is_plain, 1.0, trust_ratio).to(w.dtype) * add_decay(clip(g, s.bound), w, s.wd)


@triton.jit
def lars_update(w, g, state, s, sums):
    """Phase 2: gradient descent at the layer's learning rate."""
    return w - _scaled_gradient(w, g, s, sums), state


@triton.jit
def lars_momentum_update(w, g, state, s, sums):
    """Phase 2 with momentum: heavy ball; the layer's learning rate is inside the momentum buffer."""
    (momentum,) = state
    momentum = s.momentum * momentum - _scaled_gradient(w, g, s, sums)
    return w + momentum, (momentum,)
