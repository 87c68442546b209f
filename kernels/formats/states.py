"""How states are stored in fewer bits than they are computed in; kernels/formats/weights.py says what a format is.

All of these round stochastically: a state moves by a thousandth of itself in a step, less than half the distance of two
stored numbers, and rounding to nearest would never move it. Random bits come from the step's one Philox call for eight
elements: the weight takes an element's own, state i those of its neighbour i + 1 places on.

All but bf16 share a scale among BLOCK elements that lie next to each other in memory: squares of gradients of 1e-6 are
no numbers of fp16. It is a power of two, in bf16, so that a number which is stored already stays what it is when the
scale of its block is formed anew. With a scale that follows the largest element exactly, all others would be rounded
again in each step.

    format          codes                                     value / scale
    fp16            float16                                   that number
    int8, signed    int8, -127 ... 127                        c^3 |c|
    int8, squares   uint8, 0 ... 255                          c^8 / 2^64
    fp8, signed     uint8, 1 + 4 + 3 bits as in float8_e4m3fn that number
    fp8, squares    int8 of 8 unsigned bits, 5 + 3            (8 + mantissa) 2^(exponent - 18), subnormal at exponent 0

With c^2 for squares, what stands beside an outlier of 1e4 times its size is stored as 1, and hardly moves; with c |c|
for numbers of either sign it would be stored as 1 or 2, and move by chance.

What is not 0 is not stored as 0 of squares: what divides by its root would take a step of any size.

What is not finite stays an element's own affair: it must not reach its neighbours through their scale. Infinity is
stored as the largest number (one gradient of 1e20 has a square that fp32 cannot hold), NaN as the largest of its block.
Nothing is hidden by that: an update writes the weight from the states before they are stored, so that weight is NaN
already. A block of NaN alone has the scale NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from tritopt.kernels.formats.weights import Format, decode_plain, encode_stochastic, load_plain, store_stochastic
from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import cast, floor_of_root, max_of_numbers
from tritopt.kernels.random import random_bits16

BLOCK = 64
_BLOCK = tl.constexpr(BLOCK)
_LARGEST_INT8 = tl.constexpr(127**4)
LARGEST_SQUARE = float((np.float32(255) ** 4 * np.float32(2.0**-32)) ** 2)
"""Code 255 in fp32's arithmetic; scales of squares must not leave fp32."""
_LARGEST_UINT8 = tl.constexpr(LARGEST_SQUARE)
_LARGEST_E4M3 = tl.constexpr(2**8)  # and not 448, so that rounding up does not reach NaN
_LARGEST_E5M3 = tl.constexpr(2**16)
_LARGEST_FP16 = tl.constexpr(2**15)
_TO_E4M3 = tl.constexpr(2.0**-120)  # from fp32's exponents to these: the bits that remain are the code
_TO_E5M3 = tl.constexpr(2.0**-112)
_FROM_E4M3 = tl.constexpr(2.0**120)
_FROM_E5M3 = tl.constexpr(2.0**112)
_TO_FP16 = tl.constexpr(2.0**-112)
LARGEST_PEAK = 2.0**127
"""Scales are for no larger numbers: the largest code times the scale must be finite."""
_LARGEST_PEAK = tl.constexpr(LARGEST_PEAK)


@triton.jit
def _spread(per_block, N: tl.constexpr):
    """One number per block, for each of its elements."""
    wide = tl.broadcast_to(per_block[:, None], [N // _BLOCK, _BLOCK])
    return tl.reshape(wide, [N])


@triton.jit
def _scaled(planes, mask, value, start, LARGEST: tl.constexpr):
    """Store the blocks' scales, and divide sizes by them: at most LARGEST, and so are NaN and what is too large."""
    n: tl.constexpr = value.shape[0]
    size = tl.abs(value)
    if mask is not None:
        size = tl.where(mask, size, 0.0)
    peak = max_of_numbers(tl.reshape(size, [n // _BLOCK, _BLOCK]), 1)
    bits = (tl.minimum(peak, _LARGEST_PEAK) * (1.0 / LARGEST)).to(tl.int32, bitcast=True)  # NaN too
    exponent = tl.minimum(tl.maximum((bits + 0x7FFFFF) >> 23, 1), 253)
    scale = tl.where(peak == peak, (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
    ptrs = planes[1] + start // _BLOCK + tl.arange(0, n // _BLOCK)
    if mask is None:
        tl.store(ptrs, cast(scale, tl.bfloat16))
    else:
        is_there = tl.max(tl.reshape(mask.to(tl.int32), [n // _BLOCK, _BLOCK]), axis=1) > 0
        tl.store(ptrs, cast(scale, tl.bfloat16), mask=is_there)
    return tl.minimum(size * _spread(((254 - exponent) << 23).to(tl.float32, bitcast=True), n), LARGEST * 1.0)


def _at_most(scaled: torch.Tensor, largest: float) -> torch.Tensor:
    """NaN becomes `largest`, too."""
    return torch.where(scaled < largest, scaled, largest)


def _spread_twin(per_block: torch.Tensor, n: int) -> torch.Tensor:
    return per_block.repeat_interleave(BLOCK)[:n]


def _scaled_twin(planes: Sequence[torch.Tensor], value: torch.Tensor, largest: float) -> torch.Tensor:
    size = value.abs()
    peak = pad(torch.where(size.isnan(), -1.0, size), (0, -len(size) % BLOCK)).view(-1, BLOCK).amax(1)
    peak = torch.where(peak < 0, torch.nan, peak)
    bits = (_at_most(peak, LARGEST_PEAK) * float(np.float32(1.0 / largest))).view(torch.int32)
    exponent = ((bits + 0x7FFFFF) >> 23).clamp(1, 253)
    planes[1].view(-1).copy_(torch.where(peak.isnan(), torch.nan, (exponent << 23).view(torch.float32)))
    return _at_most(size * _spread_twin(((254 - exponent) << 23).view(torch.float32), len(size)), largest)


def _in_memory(plane: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as they lie."""
    return plane.as_strided((plane.numel(),), (1,))


def _like_codes(codes: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A value's elements in the order of its codes, fp32."""
    return _in_memory(torch.empty_like(codes, dtype=torch.float32).copy_(value))


def _decoder(
    numbers: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[Sequence[torch.Tensor], torch.dtype], torch.Tensor]:
    """Twin of a load: `numbers` makes fp32 numbers of codes, whose scale is 1."""

    def decode(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        codes, scales = planes
        value = torch.empty_like(codes, dtype=torch.float32)
        scale = _spread_twin(scales.view(-1).float(), codes.numel())
        _in_memory(value).copy_(numbers(_in_memory(codes)) * scale)
        return value.to(dtype)

    return decode


@triton.jit
def _goes_up(scaled, lower, higher, start, offsets, mask, noise):
    """Whether a number between two others is rounded up: with the probability that keeps the mean.

    Also where `lower` is the neighbour of what it should be because a root was not exact: a number at `higher` is
    rounded up to it always, one below `lower` never further down.
    """
    bits = random_bits16(noise, start, offsets, mask)
    # 2^23 + bits, put together: a conversion takes longer.
    chance = ((bits | 0x4B000000).to(tl.float32, bitcast=True) - 2.0**23) * 2.0**-16
    return chance * (higher - lower) < scaled - lower


def _goes_up_twin(
    scaled: torch.Tensor, lower: torch.Tensor, higher: torch.Tensor, codes: torch.Tensor, noise: Any
) -> torch.Tensor:
    chance = _in_memory(torch.empty_like(codes, dtype=torch.float32).copy_(noise.bits16(codes))) * 2.0**-16
    return chance * (higher - lower) < scaled - lower


@triton.jit
def _low_bits(x):
    """Whole numbers from -2^15 to 2^16 as int32, of which the lower 16 bits are theirs: an addition, no conversion.

    Beside 1.5 * 2^23 the last bit of an fp32 number is a 1.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _fourth_power(code):
    square = code * code
    return square * square


@triton.jit
def _eighth_power(code):
    fourth = _fourth_power(code)
    return fourth * fourth


def _fourth_power_twin(code: torch.Tensor) -> torch.Tensor:
    square = code.float() * code.float()
    return square * square


def _eighth_power_twin(code: torch.Tensor) -> torch.Tensor:
    fourth = _fourth_power_twin(code)
    return fourth * fourth


def _floor_of_root(value: torch.Tensor, n: int) -> torch.Tensor:
    root = value.sqrt().sqrt()
    return (root.sqrt() if n == 8 else root).floor()


@triton.jit
def _short_float_code(scaled, start, offsets, mask, noise, TO: tl.constexpr):
    """The upper bits of each number, its exponent moved by the factor TO, rounded up or down by chance."""
    return (
        (scaled * TO).to(tl.int32, bitcast=True) + (random_bits16(noise, start, offsets, mask) << 4).to(tl.int32)
    ) >> 20


def _short_float_code_twin(scaled: torch.Tensor, codes: torch.Tensor, noise: Any, to: float) -> torch.Tensor:
    bits = _in_memory(torch.empty_like(codes, dtype=torch.int32).copy_(noise.bits16(codes)))
    return ((scaled * to).view(torch.int32) + (bits << 4)) >> 20


@triton.jit
def load_int8(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """c^3 |c| times the scale."""
    code = tl.load(planes[0] + offsets, mask=mask).to(tl.float32)
    scale = tl.load(planes[1] + offsets // _BLOCK, mask=mask).to(tl.float32)
    return ((code * tl.abs(code)) * (code * code) * scale).to(COMPUTE_DTYPE)


@triton.jit
def store_int8(planes, offsets, mask, value, start, noise):
    """Store numbers of either sign."""
    scaled = _scaled(planes, mask, value, start, _LARGEST_INT8)
    code = floor_of_root(scaled, 4)
    lower, higher = _fourth_power(code), _fourth_power(code + 1.0)
    code = tl.where(_goes_up(scaled, lower, higher, start, offsets, mask, noise), code + 1.0, code)
    code = tl.where(value < 0, -code, code)
    tl.store(planes[0] + offsets, _low_bits(code).to(tl.int8), mask=mask)


def encode_int8(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Any) -> None:
    """Twin of `store_int8`."""
    value = _like_codes(planes[0], value)
    scaled = _scaled_twin(planes, value, 127**4)
    code = _floor_of_root(scaled, 4)
    lower, higher = _fourth_power_twin(code), _fourth_power_twin(code + 1.0)
    code = torch.where(_goes_up_twin(scaled, lower, higher, planes[0], noise), code + 1.0, code)
    _in_memory(planes[0]).copy_(torch.where(value < 0, -code, code))


@triton.jit
def load_uint8(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """c^8 / 2^64 times the scale."""
    code = tl.load(planes[0] + offsets, mask=mask).to(tl.float32)
    scale = tl.load(planes[1] + offsets // _BLOCK, mask=mask).to(tl.float32)
    return (_eighth_power(code) * 2.0**-64 * scale).to(COMPUTE_DTYPE)


@triton.jit
def store_uint8(planes, offsets, mask, value, start, noise):
    """Store squares."""
    scaled = _scaled(planes, mask, value, start, _LARGEST_UINT8) * 2.0**64
    code = floor_of_root(scaled, 8)
    lower, higher = _eighth_power(code), _eighth_power(code + 1.0)
    code = tl.where(_goes_up(scaled, lower, higher, start, offsets, mask, noise), code + 1.0, code)
    code = tl.where((code == 0) & (value > 0), 1.0, code)
    tl.store(planes[0] + offsets, _low_bits(code).to(tl.uint8), mask=mask)


def encode_uint8(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Any) -> None:
    """Twin of `store_uint8`."""
    value = _like_codes(planes[0], value)
    scaled = _scaled_twin(planes, value, LARGEST_SQUARE) * 2.0**64
    code = _floor_of_root(scaled, 8)
    lower, higher = _eighth_power_twin(code), _eighth_power_twin(code + 1.0)
    code = torch.where(_goes_up_twin(scaled, lower, higher, planes[0], noise), code + 1.0, code)
    _in_memory(planes[0]).copy_(torch.where((code == 0) & (value > 0), 1.0, code))


@triton.jit
def load_e4m3(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """The number times the scale."""
    code = tl.load(planes[0] + offsets, mask=mask).to(tl.int8, bitcast=True).to(tl.int32)
    scale = tl.load(planes[1] + offsets // _BLOCK, mask=mask).to(tl.float32)
    number = ((code << 20) & -0x78100000).to(tl.float32, bitcast=True) * _FROM_E4M3
    return (number * scale).to(COMPUTE_DTYPE)


@triton.jit
def store_e4m3(planes, offsets, mask, value, start, noise):
    """Store numbers of either sign."""
    scaled = _scaled(planes, mask, value, start, _LARGEST_E4M3)
    code = _short_float_code(scaled, start, offsets, mask, noise, _TO_E4M3)
    # Not the sign bit, which a GPU's NaN and a CPU's have differently.
    code = tl.where(value < 0, code | 0x80, code)
    tl.store(planes[0] + offsets, code.to(tl.uint8), mask=mask)


def encode_e4m3(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Any) -> None:
    """Twin of `store_e4m3`."""
    value = _like_codes(planes[0], value)
    code = _short_float_code_twin(_scaled_twin(planes, value, 2**8), planes[0], noise, 2.0**-120)
    _in_memory(planes[0]).copy_(torch.where(value < 0, code | 0x80, code) & 0xFF)


@triton.jit
def load_e5m3(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """The number times the scale."""
    code = tl.load(planes[0] + offsets, mask=mask).to(tl.int32) & 0xFF
    scale = tl.load(planes[1] + offsets // _BLOCK, mask=mask).to(tl.float32)
    return ((code << 20).to(tl.float32, bitcast=True) * _FROM_E5M3 * scale).to(COMPUTE_DTYPE)


@triton.jit
def store_e5m3(planes, offsets, mask, value, start, noise):
    """Store squares."""
    scaled = _scaled(planes, mask, value, start, _LARGEST_E5M3)
    code = _short_float_code(scaled, start, offsets, mask, noise, _TO_E5M3)
    code = tl.maximum(code, tl.minimum(value.to(tl.int32, bitcast=True), 1))
    tl.store(planes[0] + offsets, code.to(tl.int8), mask=mask)


def encode_e5m3(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Any) -> None:
    """Twin of `store_e5m3`."""
    value = _like_codes(planes[0], value)
    code = _short_float_code_twin(_scaled_twin(planes, value, 2**16), planes[0], noise, 2.0**-112)
    code = torch.where((code == 0) & (value > 0), 1, code)
    _in_memory(planes[0]).copy_(code.to(torch.uint8).view(torch.int8))


@triton.jit
def load_fp16(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """The number times the scale."""
    scale = tl.load(planes[1] + offsets // _BLOCK, mask=mask).to(tl.float32)
    return (tl.load(planes[0] + offsets, mask=mask).to(tl.float32) * scale).to(COMPUTE_DTYPE)


@triton.jit
def _fp16_code(planes, mask, value, start, offsets, noise):
    scaled = _scaled(planes, mask, value, start, _LARGEST_FP16)
    bits = (random_bits16(noise, start, offsets, mask) >> 3).to(tl.int32)
    return ((scaled * _TO_FP16).to(tl.int32, bitcast=True) + bits) >> 13


def _fp16_code_twin(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Any) -> torch.Tensor:
    bits = _in_memory(torch.empty_like(planes[0], dtype=torch.int32).copy_(noise.bits16(planes[0])))
    return ((_scaled_twin(planes, value, 2**15) * 2.0**-112).view(torch.int32) + (bits >> 3)) >> 13


@triton.jit
def store_fp16(planes, offsets, mask, value, start, noise):
    """Store numbers of either sign."""
    code = _fp16_code(planes, mask, value, start, offsets, noise)
    code = tl.where(value < 0, code | 0x8000, code)
    tl.store(planes[0] + offsets, code.to(tl.int16).to(tl.float16, bitcast=True), mask=mask)


def encode_fp16(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Any) -> None:
    """Twin of `store_fp16`."""
    value = _like_codes(planes[0], value)
    code = _fp16_code_twin(planes, value, noise)
    code = torch.where(value < 0, code | 0x8000, code)
    _in_memory(planes[0]).copy_(code.to(torch.int16).view(torch.float16))


@triton.jit
def store_fp16_squares(planes, offsets, mask, value, start, noise):
    """Store squares."""
    code = _fp16_code(planes, mask, value, start, offsets, noise)
    code = tl.where((code == 0) & (value > 0), 1, code)
    tl.store(planes[0] + offsets, code.to(tl.int16).to(tl.float16, bitcast=True), mask=mask)


def encode_fp16_squares(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Any) -> None:
    """Twin of `store_fp16_squares`."""
    value = _like_codes(planes[0], value)
    code = _fp16_code_twin(planes, value, noise)
    code = torch.where((code == 0) & (value > 0), 1, code)
    _in_memory(planes[0]).copy_(code.to(torch.int16).view(torch.float16))


def _from_fourth_root(code: torch.Tensor) -> torch.Tensor:
    size = _fourth_power_twin(code)
    return torch.where(code < 0, -size, size)


def _from_eighth_root(code: torch.Tensor) -> torch.Tensor:
    return _eighth_power_twin(code) * 2.0**-64


def _e4m3(code: torch.Tensor) -> torch.Tensor:
    code = code.to(torch.int32)
    size = ((code & 0x7F) << 20).view(torch.float32) * 2.0**120
    return torch.where(code >= 0x80, -size, size)


def _e5m3(code: torch.Tensor) -> torch.Tensor:
    return ((code.to(torch.int32) & 0xFF) << 20).view(torch.float32) * 2.0**112


def scales_shape(shape: Sequence[int], block: int) -> tuple[int, ...]:
    """Of the scales of a state of this shape: its rows stay rows where they are whole blocks."""
    row = torch.Size(shape[1:]).numel()
    if len(shape) > 1 and row % block == 0:
        return shape[0], row // block
    return (-(-torch.Size(shape).numel() // block),)


def _of_states(
    name: str, load: Any, store: Any, decode: Any, encode: Any, dtypes: tuple[torch.dtype, ...], block: int = 0
) -> Format:
    n_planes = len(dtypes)
    return Format(
        name, n_planes, load, store, decode, encode, (True,) * n_planes, (), draws=True, dtypes=dtypes, block=block
    )


_BF16 = _of_states("bf16", load_plain, store_stochastic, decode_plain, encode_stochastic, (torch.bfloat16,))
_FP16 = _of_states(
    "fp16", load_fp16, store_fp16, _decoder(torch.Tensor.float), encode_fp16, (torch.float16, torch.bfloat16), BLOCK
)
_FP16_SQUARES = _of_states(
    "fp16 of squares",
    load_fp16,
    store_fp16_squares,
    _decoder(torch.Tensor.float),
    encode_fp16_squares,
    (torch.float16, torch.bfloat16),
    BLOCK,
)
_INT8 = _of_states(
    "int8", load_int8, store_int8, _decoder(_from_fourth_root), encode_int8, (torch.int8, torch.bfloat16), BLOCK
)
_UINT8 = _of_states(
    "int8 of squares",
    load_uint8,
    store_uint8,
    _decoder(_from_eighth_root),
    encode_uint8,
    (torch.uint8, torch.bfloat16),
    BLOCK,
)
_E4M3 = _of_states("fp8", load_e4m3, store_e4m3, _decoder(_e4m3), encode_e4m3, (torch.uint8, torch.bfloat16), BLOCK)
_E5M3 = _of_states(
    "fp8 of squares", load_e5m3, store_e5m3, _decoder(_e5m3), encode_e5m3, (torch.int8, torch.bfloat16), BLOCK
)

SIGNED, SQUARES = "signed", "squares"
"""Kinds of states: of either sign, linear in the gradients; sums of squares of them, never negative."""
STATE_FORMATS: dict[str, dict[str, Format]] = {
    "bf16": {SIGNED: _BF16, SQUARES: _BF16},
    "fp16": {SIGNED: _FP16, SQUARES: _FP16_SQUARES},
    "int8": {SIGNED: _INT8, SQUARES: _UINT8},
    "fp8": {SIGNED: _E4M3, SQUARES: _E5M3},
}
"""By name of `state_dtype` and kind."""
