"""Floating-point arithmetic as a GPU does it, where NumPy rounds otherwise or has nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
NAN: dict[int, Any] = {2: np.uint16(0x7FFF), 4: np.uint32(0x7FFFFFFF), 8: np.uint64(2**63 - 1)}
"""Bits of the NaN that arithmetic gives, by size in bytes."""
_SIGN: dict[int, Any] = {2: np.uint16(2**15), 4: np.uint32(2**31), 8: np.uint64(2**63)}


def bits(x: Array) -> Array:
    """View as unsigned integers."""
    return np.asarray(x.view(f"u{x.dtype.itemsize}"))


def canonical(x: Array) -> Array:
    """Replace every NaN by the canonical one; a CPU's has a sign, or the operand's payload."""
    is_nan = np.isnan(x)
    if is_nan.any():
        x = np.array(x)
        bits(x)[is_nan] = NAN[x.dtype.itemsize]
    return x


def flush(x: Array) -> Array:
    """Replace subnormal fp32 numbers by zeros of their sign (.ftz)."""
    is_subnormal = (np.abs(x) < np.float32(2.0**-126)) & (x != 0)
    return np.where(is_subnormal, np.copysign(np.float32(0), x), x) if is_subnormal.any() else x


def to_bf16(x: Array) -> Array:
    """Bits of bf16 of fp32 numbers, rounded to nearest even."""
    b = bits(x)
    odd = (b >> np.uint32(16)) & np.uint32(1)
    return np.where(np.isnan(x), NAN[2], (b + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def to_f16(x: Array) -> Array:
    """Bits of fp16, rounded to nearest even."""
    return bits(canonical(x.astype(np.float16)))


def from_bf16(b: Array) -> Array:
    """Widen bits of bf16 to fp32: exact, NaN keeps its payload."""
    return (b.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_f16(b: Array) -> Array:
    """Widen bits of fp16 to fp32: exact."""
    return canonical(b.view(np.float16).astype(np.float32))


def absolute(x: Array) -> Array:
    """Clear the sign, that of NaN too."""
    return np.asarray(bits(x) & ~_SIGN[x.dtype.itemsize]).view(x.dtype)


def negated(x: Array) -> Array:
    """Flip the sign, that of NaN too."""
    return np.asarray(bits(x) ^ _SIGN[x.dtype.itemsize]).view(x.dtype)


def minimum(x: Array, y: Array, keeps_nan: bool) -> Array:
    """Smaller number, -0 below +0. Beside NaN: the number, or NaN if `keeps_nan`."""
    smaller = np.minimum(x, y) if keeps_nan else np.fmin(x, y)
    return canonical(np.where((x == 0) & (y == 0), (bits(x) | bits(y)).view(x.dtype), smaller))


def maximum(x: Array, y: Array, keeps_nan: bool) -> Array:
    """Larger number, +0 above -0. Beside NaN: the number, or NaN if `keeps_nan`."""
    larger = np.maximum(x, y) if keeps_nan else np.fmax(x, y)
    return canonical(np.where((x == 0) & (y == 0), (bits(x) & bits(y)).view(x.dtype), larger))


def fma_to_odd(a: Array, b: Array, c: Array) -> Array:
    """Sum a * b + c of fp64 numbers whose product is exact, rounded to odd: what is rounded once more is rounded right.

    fp64 has more than twice the bits of fp32 and two to spare, so rounding to odd first does no harm (Boldo and
    Melquiond, "Emulation of a FMA and correctly rounded sums").
    """
    x, y = np.broadcast_arrays(a * b, c)
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)
    b64 = np.array(total).view(np.int64)
    is_inexact = (error != 0) & np.isfinite(total) & (b64 & 1 == 0)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(is_inexact, b64 + toward, b64).view(np.float64)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Fused multiply-add of fp32, rounded once."""
    return fma_to_odd(*(x.astype(np.float64) for x in (a, b, c))).astype(np.float32)


def add_down(x: Array, y: Array) -> Array:
    """Sum of fp32 numbers, rounded down; a sum of 0 is negative unless both numbers are 0 and positive."""
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    total = fma_to_odd(x64, np.ones_like(x64), y64)
    nearest = total.astype(np.float32)
    down = np.where(nearest > total, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    is_negative = np.signbit(x) | np.signbit(y)
    return np.where((total == 0) & is_negative, np.float32(-0.0), down)


def f64_to_bf16(x: Array) -> Array:
    """Bits of bf16 of fp64 numbers, rounded once: by way of fp32, rounded to odd."""
    cut = x.astype(np.float32)
    cut = np.where(np.abs(cut) > np.abs(x), np.nextafter(cut, np.float32(0)), cut)
    is_lost = (cut != x) & ~np.isnan(x)
    return to_bf16((bits(cut) | is_lost.astype(np.uint32)).view(np.float32))


def in_double(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Compute in fp64 and round to fp32 what NumPy's fp32 functions leave an ulp off."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


def one_ulp_off(operand: Array, exact: Array) -> Array:
    """Move normal results up or down by an ulp, or not at all, as the bits of the operand say."""
    by = (bits(operand) * np.uint32(2654435761) >> np.uint32(30)).astype(np.int32) % 3 - 1
    is_normal = np.isfinite(exact) & (np.abs(exact) > 1e-37)
    return np.where(is_normal, (exact.view(np.int32) + by).view(np.float32), exact)


def to_integer(x: Array, dtype: np.dtype[Any]) -> Array:
    """Convert whole numbers: out of range gives the nearest integer, NaN 0, or 2^(n-1) if either side has 64 bits."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    is_above, is_below = x >= float(high), x <= float(low)
    inside = np.where(is_above | is_below | np.isnan(x), 0, x).astype(dtype)
    clamped = np.where(is_above, dtype.type(high), np.where(is_below, dtype.type(low), inside))
    is_wide = 8 in (x.dtype.itemsize, dtype.itemsize)
    of_nan = np.array(1 << (8 * dtype.itemsize - 1) if is_wide else 0, f"u{dtype.itemsize}").view(dtype)
    return np.where(np.isnan(x), of_nan, clamped).astype(dtype)
