"""Kernel of tritopt.LossScaler (tritopt/gluon/loss_scaler.py)."""

from __future__ import annotations

from tritopt.kernels.language import tl, triton


@triton.jit
def loss_scale_update(
    factor_ptr,
    scale_ptr,
    clean_ptr,
    GROWTH: tl.constexpr,
    BACKOFF: tl.constexpr,
    WINDOW: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """Shrink the scale after a step that was skipped, grow it after WINDOW steps in a row that were not.

    factor_ptr: fp64, what a step multiplied gradients by, NaN where it was skipped. scale_ptr: fp32. clean_ptr: int32,
    steps since the scale changed or one was skipped.
    """
    factor = tl.load(factor_ptr)
    scale = tl.load(scale_ptr)
    clean = tl.load(clean_ptr) + 1
    is_skipped = factor != factor
    is_grown = clean >= WINDOW
    grown = tl.where(is_grown, tl.minimum(scale * GROWTH, MOST), scale)
    tl.store(scale_ptr, tl.where(is_skipped, tl.maximum(scale * BACKOFF, LEAST), grown))
    tl.store(clean_ptr, tl.where(is_skipped | is_grown, 0, clean))
