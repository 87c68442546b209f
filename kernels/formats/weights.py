"""Formats by which an fp16 or bf16 weight keeps what its own bits cannot hold; format.py says what a format is.

A weight may be written by anyone at any time. So whatever stands in plane 1, a loaded value rounds to the weight as the
format rounds, and what plane 1 holds of another weight is not taken.

    format         the weight, plane 0                        plane 1
    fp32 master    the master, rounded to nearest even        the master, fp32
    kahan          the value, rounded to nearest even         what the weight lacks, in its dtype
    split16        upper half of fp32's bits, nearest         the lower half, signed
    split8         upper 16 of 24 bits, nearest               the lower 8 of those 24, signed; rounded by chance
    stochastic     the value, rounded up or down by chance    -
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tritopt.kernels.assembly import is_nvidia, n_nvidia_threads, pack_of
from tritopt.kernels.conversions import complete, join_bits, second_bytes
from tritopt.kernels.formats.format import (
    LOW_PRECISION,
    PLAIN,
    Format,
    decode_plain,
    encode_plain,
    load_plain,
    shown_nearest,
)
from tritopt.kernels.language import INTERPRETED, tl, triton
from tritopt.kernels.ops import cast, widen
from tritopt.kernels.random import random_bits16
from tritopt.kernels.twins.random import Noise

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _completed(weight, value):
    """The value, where it rounds to nearest even to the very bits of the weight, or else the weight, in fp32.

    A master is not read without its weight: what somebody writes through `.data`, by NumPy or by another name of the
    memory raises no version counter, and is seen here alone. Bits, because 0 and -0 are two weights; NaN has many, but
    either of two NaN will do.
    """
    # In Adafactor's blocks of three dimensions, loads would sink behind it.
    if not _INTERPRETED and is_nvidia() and len(weight.shape) == 1:
        return complete(weight, value)
    else:
        rounded = cast(value, weight.dtype).to(tl.int16, bitcast=True)
        return tl.where(rounded == weight.to(tl.int16, bitcast=True), value, widen(weight, tl.float32))


def _completed_twin(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch twin of `_completed`."""
    rounded = value.to(weight.dtype).view(torch.int16)
    return torch.where(rounded == weight.resolve_neg().view(torch.int16), value, weight.float())


@triton.jit
def load_master(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """Load the fp32 master, plane 1, unless the fp16/bf16 weight, plane 0, is another's."""
    weight = tl.load(planes[0] + offsets, mask=mask)
    return _completed(weight, tl.load(planes[1] + offsets, mask=mask)).to(COMPUTE_DTYPE)


def decode_master(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """PyTorch twin of `load_master`."""
    return _completed_twin(planes[0], planes[1]).to(dtype)


@triton.jit
def store_master(planes, offsets, mask, value):
    """Store the master, and the weight as the master rounded to nearest even."""
    tl.store(planes[1] + offsets, value, mask=mask)
    rounded = shown_nearest(planes, value)
    tl.store(planes[0] + offsets, rounded, mask=mask)
    return rounded


def encode_master(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise | None = None) -> None:
    """PyTorch twin of `store_master`."""
    planes[1].copy_(value)
    encode_plain(planes, planes[1])


def _master_of(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value, or its neighbour towards the weight where a tie was rounded the other way."""
    value = torch.where(value.to(weight.dtype) == weight, value, torch.nextafter(value, weight.float()))
    return _completed_twin(weight, value)


@triton.jit
def load_kahan(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """Load the weight and its compensation, added up in fp32, unless that is another weight's."""
    weight = tl.load(planes[0] + offsets, mask=mask)
    value = widen(weight, tl.float32) + widen(tl.load(planes[1] + offsets, mask=mask), tl.float32)
    return _completed(weight, value).to(COMPUTE_DTYPE)


def decode_kahan(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """PyTorch twin of `load_kahan`."""
    return _completed_twin(planes[0], planes[0].float() + planes[1].float()).to(dtype)


@triton.jit
def store_kahan(planes, offsets, mask, value):
    """Store the weight, rounded to nearest even, and what it lacks: to nearest too, if then the two round to it.

    Just below half an ulp of the weight, what it lacks can round up to that half, and the sum to another weight: there
    it is the next number towards zero.
    """
    dtype: tl.constexpr = planes[0].dtype.element_ty
    weight = cast(value, dtype)
    lacks = value - widen(weight, tl.float32)
    lacks = tl.where(tl.abs(lacks) < float("inf"), lacks, 0.0)  # beside an infinite weight or NaN
    nearest = cast(lacks, dtype)
    is_far = cast(widen(weight, tl.float32) + widen(nearest, tl.float32), dtype) != weight
    bits = nearest.to(tl.int16, bitcast=True)
    bits -= (is_far & (lacks != 0.0)).to(tl.int16)
    tl.store(planes[0] + offsets, weight, mask=mask)
    tl.store(planes[1] + offsets, bits.to(dtype, bitcast=True), mask=mask)
    return weight


def encode_kahan(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise | None = None) -> None:
    """PyTorch twin of `store_kahan`."""
    encode_plain(planes, value)
    planes[1].copy_(_compensation_of(planes[0], value))


def _compensation_of(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compensation beside a weight, for the two to hold the value, rounded as `store_kahan` does."""
    lacks = value - weight.float()
    lacks = torch.where(lacks.isfinite(), lacks, 0.0)
    nearest = lacks.to(weight.dtype)
    is_far = (weight.float() + nearest.float()).to(weight.dtype) != weight
    bits = nearest.view(torch.int16)
    return (bits - (is_far & (lacks != 0)).to(torch.int16)).view(weight.dtype)


@triton.jit
def _joined(weight, remainder, SHIFT: tl.constexpr):
    """The bits of the weight, in front, and the remainder's, shifted: but not beside 0, infinity or NaN.

    Whoever sets a weight to 0, as pruning does, wants it to be 0: what a remainder adds to that is below 2^-134. Beside
    infinity there are NaN, and numbers that only round to it.
    """
    if not _INTERPRETED and pack_of(weight.numel, n_nvidia_threads(), 4) == 4 and len(weight.shape) == 1:
        return join_bits(weight, remainder)
    else:
        high = widen(weight, tl.float32).to(tl.int32, bitcast=True)
        # Both ends of the numbers in one comparison: 0, less 1, is the largest.
        is_alone = ((high & 0x7FFFFFFF) - 1).to(tl.uint32, bitcast=True) >= 0x7F7FFFFF
        return tl.where(is_alone, high, high + (remainder.to(tl.int32) << SHIFT)).to(tl.float32, bitcast=True)


def _joined_twin(high: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """PyTorch twin of `_joined`."""
    size = high & 0x7FFFFFFF
    return torch.where((size == 0) | (size >= 0x7F800000), high, high + rest).view(torch.float32)


def _fitting(difference: torch.Tensor, half: int) -> torch.Tensor:
    """A remainder from -half to half - 1; 0 where it is that of another weight.

    A weight that was rounded to even at a tie can lack all of `half`, and gets one less.
    """
    return torch.where(difference.abs() <= half, difference.clamp(max=half - 1), 0)


@triton.jit
def _bits_of(value):
    """Bits of an fp32 number, int32, that are to be rounded; NaN's, which would be carried over into the sign, changed.

    NVIDIA's arithmetic makes one NaN, 0x7FFFFFFF, and beside another that was loaded the lower bits are 0.
    """
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    if not _INTERPRETED and is_nvidia():
        return tl.minimum(bits, 0x7FC00000)
    else:
        return tl.where(value == value, bits, 0x7FC00000)


@triton.jit
def load_split16(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """Load the bits of an fp32 number: those of the bf16 weight in front, and a signed remainder added to them."""
    remainder = tl.load(planes[1] + offsets, mask=mask)
    return _joined(tl.load(planes[0] + offsets, mask=mask), remainder, 0).to(COMPUTE_DTYPE)


def decode_split16(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """PyTorch twin of `load_split16`."""
    return _joined_twin(planes[0].float().view(torch.int32), planes[1].to(torch.int32)).to(dtype)


@triton.jit
def store_split16(planes, offsets, mask, value):
    """Store the weight, rounded to nearest, away from zero where two are, and what it lacks."""
    bits = _bits_of(value)
    high = (bits + 0x8000) >> 16
    tl.store(planes[1] + offsets, (bits - (high << 16)).to(tl.int16), mask=mask)
    rounded = high.to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(planes[0] + offsets, rounded, mask=mask)
    return rounded


def encode_split16(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise | None = None) -> None:
    """PyTorch twin of `store_split16`."""
    value = value.float()
    bits = torch.where(value.isnan(), 0x7FC00000, value.view(torch.int32))
    high = (bits + 0x8000) >> 16
    planes[1].copy_(bits - (high << 16))
    planes[0].copy_(high.to(torch.int16).view(torch.bfloat16))


@triton.jit
def shown_split(planes, value):
    """Round to nearest, away from zero where two are."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    return ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


def _remainder16_of(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Remainder of split16 beside a weight, for the two to hold the value."""
    difference = value.view(torch.int32) - (weight.resolve_neg().view(torch.int16).to(torch.int32) << 16)
    return _fitting(difference, 0x8000).to(torch.int16)


@triton.jit
def load_split8(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """Load the upper 24 bits of an fp32 number: those of the bf16 weight in front, and a signed remainder."""
    remainder = tl.load(planes[1] + offsets, mask=mask)
    return _joined(tl.load(planes[0] + offsets, mask=mask), remainder, 8).to(COMPUTE_DTYPE)


def decode_split8(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """PyTorch twin of `load_split8`."""
    return _joined_twin(planes[0].float().view(torch.int32), planes[1].to(torch.int32) << 8).to(dtype)


@triton.jit
def store_split8(planes, offsets, mask, value, start, noise):
    """Store 24 bits, rounded up or down with the probabilities that keep the mean, and the nearest weight."""
    bits = _bits_of(value) + (random_bits16(noise, start, offsets, mask) >> 8).to(tl.int32)
    if not _INTERPRETED and pack_of(value.numel, n_nvidia_threads(), 4) == 4 and len(value.shape) == 1:
        tl.store(planes[1] + offsets, second_bytes(bits), mask=mask)
    else:
        tl.store(planes[1] + offsets, (bits >> 8).to(tl.int8), mask=mask)
    rounded = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(planes[0] + offsets, rounded, mask=mask)
    return rounded


def encode_split8(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise) -> None:
    """PyTorch twin of `store_split8`."""
    bits = (value.float().view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + (noise.bits16(planes[0]) >> 8)
    bits = torch.where(value.isnan(), 0x7FC00000, _signed(bits & 0xFFFFFFFF)) >> 8
    high = (bits + 0x80) >> 8
    planes[1].copy_(bits - (high << 8))
    planes[0].copy_(high.to(torch.int16).view(torch.bfloat16))


def _signed(bits: torch.Tensor) -> torch.Tensor:
    """Reinterpret 32 unsigned bits in int64 as int32."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)


def _remainder8_of(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Remainder of split8 beside a weight, for the two to hold the value."""
    difference = (value.view(torch.int32) >> 8) - (weight.resolve_neg().view(torch.int16).to(torch.int32) << 8)
    return _fitting(difference, 0x80).to(torch.int8)


@triton.jit
def store_stochastic(planes, offsets, mask, value, start, noise):
    """Store the one plane, bf16, rounded up or down with the probabilities that keep the mean."""
    bits = _bits_of(value) + random_bits16(noise, start, offsets, mask).to(tl.int32)
    rounded = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(planes[0] + offsets, rounded, mask=mask)
    return rounded


def encode_stochastic(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise) -> None:
    """PyTorch twin of `store_stochastic`."""
    bits = value.float().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    bits = torch.where(value.isnan(), 0x7FC00000, bits + noise.bits16(planes[0])) >> 16
    planes[0].copy_(bits.to(torch.int16).view(torch.bfloat16))


MASTER_FP32 = Format(
    "fp32 master", 2, load_master, store_master, decode_master, encode_master, (True, True), LOW_PRECISION,
    "master_param", torch.float32, _master_of, shown=shown_nearest,
)  # fmt: skip
SPLIT16 = Format(
    "split16", 2, load_split16, store_split16, decode_split16, encode_split16, (True, True), (torch.bfloat16,),
    "master_remainder", torch.int16, _remainder16_of, shown=shown_split,
)  # fmt: skip
KAHAN = Format(
    "kahan", 2, load_kahan, store_kahan, decode_kahan, encode_kahan, (True, True), LOW_PRECISION,
    "compensation", None, _compensation_of, shown=shown_nearest,
)  # fmt: skip
SPLIT8 = Format(
    "split8", 2, load_split8, store_split8, decode_split8, encode_split8, (True, True), (torch.bfloat16,),
    "master_remainder8", torch.int8, _remainder8_of, draws=True, shown=shown_split,
)  # fmt: skip
STOCHASTIC = Format(
    "stochastic", 1, load_plain, store_stochastic, decode_plain, encode_stochastic, (True,), (torch.bfloat16,),
    draws=True, shown=shown_nearest,
)  # fmt: skip
MASTERS = {"fp32": MASTER_FP32, "split16": SPLIT16, "split8": SPLIT8, "kahan": KAHAN, "stochastic": STOCHASTIC}
"""Formats by the name that `master` has for them."""


def format_of(load: Any) -> Format:
    """The format that `load` belongs to."""
    return next(fmt for fmt in (PLAIN, *MASTERS.values()) if fmt.load is load)
