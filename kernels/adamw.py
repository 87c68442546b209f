"""Update function of AdamW (tritopt/optimizers/adamw.py)."""

from __future__ import annotations

from tritopt.kernels.adam import adam_update
from tritopt.kernels.language import tl, triton


@triton.jit
def adamw_update(w, g, state, s):
    """Adam, and apart from the moments a decay of the old weight."""
    moved, state = adam_update(w, g, state, s)
    return moved - s.decay * w, state
