"""States in 8 bits whose codes are short floating-point numbers, rounded up or down by chance.

    format            codes                                        value / scale
    fp8               uint8 of 1 + 4 + 3 bits, as float8_e4m3fn    that number
    fp8 of squares    int8 of 8 unsigned bits, 5 + 3               (8 + mantissa) 2^(exponent - 18)

Both are the upper bits of an fp32 number whose exponent was moved; at exponent 0 they are subnormal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tritopt.kernels.conversions import widen_e4m3, widens_e4m3
from tritopt.kernels.formats.format import state_format
from tritopt.kernels.formats.scales import (
    BLOCK,
    decode_scales,
    encode_scales,
    flat_like,
    load_scales,
    shaped_like,
    store_scales,
)
from tritopt.kernels.language import INTERPRETED, tl, triton
from tritopt.kernels.memory import in_memory
from tritopt.kernels.random import random_bits16
from tritopt.kernels.twins.random import Noise

_INTERPRETED = tl.constexpr(INTERPRETED)
LARGEST = 2**8  # and not 448, so that rounding up does not reach NaN
LARGEST_SQUARE = 2**16
TO_E4M3, TO_E5M3 = 2.0**-120, 2.0**-112
"""Factors from fp32's exponents to these: the bits that remain are the code."""
_LARGEST, _LARGEST_SQUARE = tl.constexpr(LARGEST), tl.constexpr(LARGEST_SQUARE)
_TO_E4M3, _TO_E5M3 = tl.constexpr(TO_E4M3), tl.constexpr(TO_E5M3)
_FROM_E4M3, _FROM_E5M3 = tl.constexpr(1 / TO_E4M3), tl.constexpr(1 / TO_E5M3)


@triton.jit
def _rounded_code(scaled, start, offsets, mask, noise, TO: tl.constexpr):
    """The upper bits of each number, its exponent moved by the factor TO, rounded up or down by chance."""
    return (
        (scaled * TO).to(tl.int32, bitcast=True) + (random_bits16(noise, start, offsets, mask) << 4).to(tl.int32)
    ) >> 20


def _rounded_code_twin(scaled: torch.Tensor, codes: torch.Tensor, noise: Noise, to: float) -> torch.Tensor:
    bits = flat_like(codes, noise.bits16(codes), torch.int32)
    return ((scaled * to).view(torch.int32) + (bits << 4)) >> 20


@triton.jit
def _number(code):
    """Value of the codes of either sign, fp32. Of 0x7F and 0xFF, which are never stored, 480 or NaN."""
    if not _INTERPRETED and widens_e4m3(code):
        return widen_e4m3(code)
    else:
        bits = (code.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
        return bits.to(tl.float32, bitcast=True) * _FROM_E4M3


@triton.jit
def load_fp8(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """Load numbers of either sign: the code's times the scale."""
    number = _number(tl.load(planes[0] + offsets, mask=mask))
    scale = load_scales(planes, offsets, mask)
    return (number * scale).to(COMPUTE_DTYPE)


def decode_fp8(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """PyTorch twin of `load_fp8`."""
    code = in_memory(planes[0]).to(torch.int32)
    size = ((code & 0x7F) << 20).view(torch.float32) * (1 / TO_E4M3)
    return shaped_like(planes[0], torch.where(code >= 0x80, -size, size) * decode_scales(planes), dtype)


@triton.jit
def store_fp8(planes, offsets, mask, value, start, noise):
    """Store numbers of either sign."""
    scaled = store_scales(planes, mask, value, start, _LARGEST)
    code = _rounded_code(scaled, start, offsets, mask, noise, _TO_E4M3)
    # Not the sign bit, which a GPU's NaN and a CPU's have differently.
    code = tl.where(value < 0, code | 0x80, code)
    tl.store(planes[0] + offsets, code.to(tl.uint8), mask=mask)


def encode_fp8(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise) -> None:
    """PyTorch twin of `store_fp8`."""
    value = flat_like(planes[0], value)
    code = _rounded_code_twin(encode_scales(planes, value, LARGEST), planes[0], noise, TO_E4M3)
    in_memory(planes[0]).copy_(torch.where(value < 0, code | 0x80, code) & 0xFF)


@triton.jit
def load_fp8_squares(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """Load squares: the code's number times the scale."""
    code = tl.load(planes[0] + offsets, mask=mask).to(tl.int32) & 0xFF
    scale = load_scales(planes, offsets, mask)
    return ((code << 20).to(tl.float32, bitcast=True) * _FROM_E5M3 * scale).to(COMPUTE_DTYPE)


def decode_fp8_squares(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """PyTorch twin of `load_fp8_squares`."""
    code = in_memory(planes[0]).to(torch.int32) & 0xFF
    numbers = (code << 20).view(torch.float32) * (1 / TO_E5M3)
    return shaped_like(planes[0], numbers * decode_scales(planes), dtype)


@triton.jit
def store_fp8_squares(planes, offsets, mask, value, start, noise):
    """Store squares; what is not 0 is not stored as 0."""
    scaled = store_scales(planes, mask, value, start, _LARGEST_SQUARE)
    code = _rounded_code(scaled, start, offsets, mask, noise, _TO_E5M3)
    code = tl.maximum(code, tl.minimum(value.to(tl.int32, bitcast=True), 1))
    tl.store(planes[0] + offsets, code.to(tl.int8), mask=mask)


def encode_fp8_squares(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise) -> None:
    """PyTorch twin of `store_fp8_squares`."""
    value = flat_like(planes[0], value)
    code = _rounded_code_twin(encode_scales(planes, value, LARGEST_SQUARE), planes[0], noise, TO_E5M3)
    code = torch.where((code == 0) & (value > 0), 1, code)
    in_memory(planes[0]).copy_(code.to(torch.uint8).view(torch.int8))


FP8 = state_format("fp8", load_fp8, store_fp8, decode_fp8, encode_fp8, (torch.uint8, torch.bfloat16), BLOCK)
FP8_SQUARES = state_format(
    "fp8 of squares", load_fp8_squares, store_fp8_squares, decode_fp8_squares, encode_fp8_squares,
    (torch.int8, torch.bfloat16), BLOCK,
)  # fmt: skip
