"""Sums over a tensor's elements, taken from registers while a step passes over them, and their twin."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import is_finite

OF_GRADIENT = ("grad_square", "nonfinite")
OF_UPDATE = ("weight_square", "update_square", "unchanged")
COLUMNS = (*OF_GRADIENT, *OF_UPDATE)
"""Names of the sums: those of `track_gradient`, and after them those of `track_update`."""


@triton.jit
def track_gradient(g):
    """Terms of OF_GRADIENT: the square of an element, and whether it is not finite."""
    return (g * g, tl.where(is_finite(g), 0.0, 1.0))


@triton.jit
def track_update(w, new, shown, rounded):
    """Terms of OF_UPDATE: squares of the new weight and of its change, and whether what is stored of it stayed."""
    moved = tl.where(new == w, 0.0, new - w)  # an infinite weight that stays has not moved
    return (new * new, moved * moved, tl.where(shown == rounded, 1.0, 0.0))


def measure(
    grad: torch.Tensor,
    weights: Sequence[torch.Tensor] = (),
    shown: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Sums of COLUMNS over one tensor, fp64: the twin of `track_gradient` and `track_update`.

    weights, shown: before and after the step, as computed and as stored; none if it was skipped.
    """
    grad = grad.double()
    terms = torch.zeros(len(COLUMNS), dtype=torch.float64, device=grad.device)
    terms[0], terms[1] = grad.square().sum(), (~grad.isfinite()).sum()
    if weights:
        old, new = (weight.double() for weight in weights)
        moved = torch.where(new == old, 0.0, new - old)  # an infinite weight that stays has not moved
        terms[2], terms[3], terms[4] = new.square().sum(), moved.square().sum(), (shown[0] == shown[1]).sum()
    return terms


@triton.jit
def zeros(N: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Make N blocks of zeros, one for each sum."""
    values = ()
    for _ in tl.static_range(N):
        values = values + (tl.zeros([SIZE], dtype=DTYPE),)
    return values


@triton.jit
def add_terms(totals, terms, mask):
    """Add each block of terms to its own total."""
    added = ()
    for i in tl.static_range(len(totals)):
        added = added + (totals[i] + (terms[i] if mask is None else tl.where(mask, terms[i], 0.0)),)
    return added
