"""Sums over a tensor's elements, taken from registers while a step passes over them (tritopt/engine/telemetry.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import is_finite


@triton.jit
def track_gradient(g):
    """Two terms: its square, and whether it is not finite."""
    return (g * g, tl.where(is_finite(g), 0.0, 1.0))


@triton.jit
def track_update(w, new, shown, rounded):
    """Three: squares of the new weight and of its change, and whether what is stored of it stayed."""
    moved = tl.where(new == w, 0.0, new - w)  # an infinite weight that stays has not moved
    return (new * new, moved * moved, tl.where(shown == rounded, 1.0, 0.0))


@triton.jit
def zeros(N: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """N blocks of zeros."""
    values = ()
    for _ in tl.static_range(N):
        values = values + (tl.zeros([SIZE], dtype=DTYPE),)
    return values


@triton.jit
def add_terms(totals, terms, mask):
    """Blocks, each to its own."""
    added = ()
    for i in tl.static_range(len(totals)):
        added = added + (totals[i] + (terms[i] if mask is None else tl.where(mask, terms[i], 0.0)),)
    return added
