"""States in 8 bits whose codes are whole numbers: roots of the number that the scale is multiplied by.

    format             codes                   value / scale
    int8               int8, -127 ... 127      c^3 |c|
    int8 of squares    uint8, 0 ... 255        c^8 / 2^64

Codes come of approximate roots: that of a number next to a 4th or 8th power may be its neighbour's.

With c^2 for squares, what stands beside an outlier of 1e4 times its size is stored as 1, and hardly moves; with c |c|
for numbers of either sign it would be stored as 1 or 2, and move by chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tritopt.kernels.assembly import is_nvidia, n_nvidia_threads, pack_of
from tritopt.kernels.conversions import add_down, add_where_less, fractions
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
from tritopt.kernels.ops import rough_root
from tritopt.kernels.random import random_bits16
from tritopt.kernels.twins import ops as twins
from tritopt.kernels.twins.random import Noise

_INTERPRETED = tl.constexpr(INTERPRETED)
LARGEST = 127**4
LARGEST_SQUARE = float((np.float32(255) ** 4 * np.float32(2.0**-32)) ** 2)
"""Code 255 in fp32's arithmetic; scales of squares must not leave fp32."""
_LARGEST, _LARGEST_SQUARE = tl.constexpr(LARGEST), tl.constexpr(LARGEST_SQUARE)


@triton.jit
def _to_compare(scaled, lower, higher, start, offsets, mask, noise):
    """Two numbers of which the first is the smaller where one between two others is rounded up.

    That is with the probability that keeps the mean. It holds too where `lower` is the neighbour of what it should be
    because a root was not exact: a number at `higher` is rounded up to it always, one below `lower` never further down.
    """
    bits = random_bits16(noise, start, offsets, mask)
    # 128 + bits / 2^16, put together: a conversion takes longer.
    chance = (bits | 0x43000000).to(tl.float32, bitcast=True) - 128.0
    return chance * (higher - lower), scaled - lower


def _goes_up_twin(
    scaled: torch.Tensor, lower: torch.Tensor, higher: torch.Tensor, codes: torch.Tensor, noise: Noise
) -> torch.Tensor:
    chance = flat_like(codes, noise.bits16(codes)) * 2.0**-16
    return chance * (higher - lower) < scaled - lower


@triton.jit
def _low_bits(x):
    """Whole numbers from -2^15 to 2^16 as int32, of which the lower 16 bits are theirs: an addition, no conversion.

    Beside 1.5 * 2^23 the last bit of an fp32 number is a 1.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True)


_BITS_OF_49152 = tl.constexpr(0x47400000)


@triton.jit
def _fourth_power(code):
    square = code * code
    return square * square


def _fourth_power_twin(code: torch.Tensor) -> torch.Tensor:
    square = code.float() * code.float()
    return square * square


@triton.jit
def _eighth_power(code):
    fourth = _fourth_power(code)
    return fourth * fourth


def _eighth_power_twin(code: torch.Tensor) -> torch.Tensor:
    fourth = _fourth_power_twin(code)
    return fourth * fourth


@triton.jit
def load_int8(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """Load numbers of either sign: c^3 |c| times the scale."""
    code = tl.load(planes[0] + offsets, mask=mask).to(tl.float32)
    scale = load_scales(planes, offsets, mask)
    signed_square = code * tl.abs(code)
    return (signed_square * tl.abs(signed_square) * scale).to(COMPUTE_DTYPE)


def decode_int8(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """PyTorch twin of `load_int8`."""
    code = in_memory(planes[0])
    size = _fourth_power_twin(code)
    return shaped_like(planes[0], torch.where(code < 0, -size, size) * decode_scales(planes), dtype)


@triton.jit
def store_int8(planes, offsets, mask, value, start, noise):
    """Store numbers of either sign."""
    scaled = store_scales(planes, mask, value, start, _LARGEST)
    code = tl.floor(rough_root(scaled, 4))
    lower, higher = _fourth_power(code), _fourth_power(code + 1.0)
    part, rest = _to_compare(scaled, lower, higher, start, offsets, mask, noise)
    code = tl.where(part < rest, code + 1.0, code)
    bits = code.to(tl.int32, bitcast=True)
    if not _INTERPRETED and is_nvidia():
        # The sign bit of the value: NaN of NVIDIA's arithmetic is positive. A CPU's is not.
        bits = bits | (value.to(tl.int32, bitcast=True) & -0x80000000)
    else:
        bits = tl.where(value < 0, bits | -0x80000000, bits)
    tl.store(planes[0] + offsets, _low_bits(bits.to(tl.float32, bitcast=True)).to(tl.int8), mask=mask)


def encode_int8(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise) -> None:
    """PyTorch twin of `store_int8`."""
    value = flat_like(planes[0], value)
    scaled = encode_scales(planes, value, LARGEST)
    code = twins.rough_root(scaled, 4).floor()
    lower, higher = _fourth_power_twin(code), _fourth_power_twin(code + 1.0)
    code = torch.where(_goes_up_twin(scaled, lower, higher, planes[0], noise), code + 1.0, code)
    in_memory(planes[0]).copy_(torch.where(value < 0, -code, code))


@triton.jit
def load_int8_squares(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """Load squares: c^8 / 2^64 times the scale."""
    code = tl.load(planes[0] + offsets, mask=mask)
    scale = load_scales(planes, offsets, mask)
    if not _INTERPRETED and pack_of(code.numel, n_nvidia_threads(), 4) == 4:
        number = _eighth_power(fractions(code))
    else:
        number = _eighth_power(code.to(tl.float32)) * 2.0**-64
    return (number * scale).to(COMPUTE_DTYPE)


def decode_int8_squares(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """PyTorch twin of `load_int8_squares`."""
    numbers = _eighth_power_twin(in_memory(planes[0])) * 2.0**-64
    return shaped_like(planes[0], numbers * decode_scales(planes), dtype)


@triton.jit
def _root_down(x):
    """The 8th root of x, which is at most 1, down to 256ths, and 49152: the last bits of the sum are the code."""
    root = rough_root(x, 8)
    if not _INTERPRETED and is_nvidia():
        return add_down(root, 49152.0)
    else:
        return tl.floor(root * 256.0) * 2.0**-8 + 49152.0


@triton.jit
def store_int8_squares(planes, offsets, mask, value, start, noise):
    """Store squares; what is not 0 is not stored as 0."""
    scaled = store_scales(planes, mask, value, start, _LARGEST_SQUARE)
    code = _root_down(scaled)
    lower, higher = _eighth_power(code - 49152.0), _eighth_power(code - (49152.0 - 2.0**-8))
    part, rest = _to_compare(scaled, lower, higher, start, offsets, mask, noise)
    bits = code.to(tl.int32, bitcast=True)
    if not _INTERPRETED and is_nvidia():
        bits = add_where_less(bits, part, rest)
    else:
        bits = tl.where(part < rest, bits + 1, bits)
    least = _BITS_OF_49152 + tl.minimum(value.to(tl.int32, bitcast=True), 1)
    tl.store(planes[0] + offsets, tl.maximum(bits, least).to(tl.uint8), mask=mask)


def encode_int8_squares(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise) -> None:
    """PyTorch twin of `store_int8_squares`."""
    value = flat_like(planes[0], value)
    scaled = encode_scales(planes, value, LARGEST_SQUARE) * 2.0**64
    code = twins.rough_root(scaled, 8).floor()
    lower, higher = _eighth_power_twin(code), _eighth_power_twin(code + 1.0)
    code = torch.where(_goes_up_twin(scaled, lower, higher, planes[0], noise), code + 1.0, code)
    in_memory(planes[0]).copy_(torch.where((code == 0) & (value > 0), 1.0, code))


INT8 = state_format(
    "int8", load_int8, store_int8, decode_int8, encode_int8, (torch.int8, torch.bfloat16), BLOCK
)  # fmt: skip
INT8_SQUARES = state_format(
    "int8 of squares", load_int8_squares, store_int8_squares, decode_int8_squares, encode_int8_squares,
    (torch.uint8, torch.bfloat16), BLOCK,
)  # fmt: skip
