"""Exact arithmetic: the only place that names Triton's inexact defaults."""

from __future__ import annotations

from tritopt.kernels.assembly import (
    constraints,
    is_nvidia,
    n_nvidia_threads,
    pack_of,
    quotients,
    quotients_by_roots,
    roots,
)
from tritopt.kernels.conversions import widen_bf16
from tritopt.kernels.language import INTERPRETED, tl, triton

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def div(x, y):
    """x / y, rounded to nearest; Triton's fp32 `/` is approximate on NVIDIA."""
    if x.dtype == tl.float64 or y.dtype == tl.float64:
        return x / y
    elif _INTERPRETED:
        return tl.div_rn(x, y)
    else:
        n: tl.constexpr = pack_of(max(x.numel, y.numel), n_nvidia_threads(), 4)
        if n == 0:
            return tl.div_rn(x, y)
        else:
            return tl.inline_asm_elementwise(quotients(n), constraints(n, 2), [x, y], tl.float32, is_pure=True, pack=n)


@triton.jit
def sqrt(x):
    """Square root, rounded to nearest; Triton's fp32 `tl.sqrt` is approximate on NVIDIA."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    elif _INTERPRETED:
        return tl.sqrt_rn(x)
    else:
        n: tl.constexpr = pack_of(x.numel, n_nvidia_threads(), 8)
        if n == 0:
            return tl.sqrt_rn(x)
        else:
            return tl.inline_asm_elementwise(roots(n), constraints(n, 1), [x], tl.float32, is_pure=True, pack=n)


@triton.jit
def div_by_root(x, square, epsilon):
    """x / (sqrt(square) + epsilon), each rounded to nearest; `div` and `sqrt` apart take more registers."""
    if x.dtype == tl.float64 or _INTERPRETED:
        return div(x, sqrt(square) + epsilon)
    else:
        n: tl.constexpr = pack_of(x.numel, n_nvidia_threads(), 8)
        if n == 0:
            return div(x, sqrt(square) + epsilon)
        else:
            operands = [x, square, epsilon]
            return tl.inline_asm_elementwise(
                quotients_by_roots(n), constraints(n, 3), operands, tl.float32, is_pure=True, pack=n
            )


@triton.jit
def clip(x, bound):
    """Clamp to [-bound, bound]. NaN stays NaN (min and max would drop it); an infinite bound changes nothing."""
    x = tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def is_finite(x):
    """True unless x is NaN or infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def add_decay(x, w, wd):
    """x + wd w; x alone where wd is 0, for 0 times an infinite weight is NaN."""
    decay = wd * w
    if x.dtype == tl.float64:
        # Of a choice that is the same for all elements, the compiler makes two loops here.
        return x + tl.where((decay != decay) & (w == w), 0.0, decay)
    else:
        return tl.where(wd == 0, x, x + decay)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Convert, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates where a GPU rounds, and gets subnormal numbers wrong. NaN has no room to round.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif x.dtype == tl.float64 and dtype == tl.bfloat16:
        return x.to(tl.float32).to(dtype)  # as torch does
    else:
        return x.to(dtype)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """Convert to a dtype that holds every number of the old one."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        # The interpreter gets subnormal numbers wrong.
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True).to(dtype)
    elif not _INTERPRETED and is_nvidia() and x.dtype == tl.bfloat16 and len(x.shape) == 1:
        return widen_bf16(x).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def sign(x):
    """1, -1, or x itself where it is zero or NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def rough_root(x, N: tl.constexpr):
    """The 4th or 8th root of x >= 0, fp32, by approximate roots, which take half the instructions of exact ones."""
    root = tl.sqrt(tl.sqrt(x))
    if N == 8:
        root = tl.sqrt(root)
    return root


@triton.jit
def max_of_numbers(x, AXIS: tl.constexpr):
    """The largest of some sizes along an axis, whatever NaN is among them; NaN where there is nothing else."""
    if _INTERPRETED:
        # NumPy, which stands behind the interpreter, warns of NaN alone.
        peak = tl.max(tl.where(x == x, x, -1.0), axis=AXIS)
        return tl.where(peak < 0, float("nan"), peak)
    else:
        return tl.max(x, axis=AXIS)
