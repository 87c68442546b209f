"""States in 16 bits, rounded up or down by chance: bf16 as it is, fp16 with a scale, since its exponents are few."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tritopt.kernels.formats.format import decode_plain, load_plain, state_format
from tritopt.kernels.formats.scales import (
    BLOCK,
    decode_scales,
    encode_scales,
    flat_like,
    load_scales,
    shaped_like,
    store_scales,
)
from tritopt.kernels.formats.weights import encode_stochastic, store_stochastic
from tritopt.kernels.language import tl, triton
from tritopt.kernels.memory import in_memory
from tritopt.kernels.random import random_bits16
from tritopt.kernels.twins.random import Noise

LARGEST = 2**15
TO_FP16 = 2.0**-112
"""Factor from fp32's exponents to fp16's: the bits that remain are the code."""
_LARGEST, _TO_FP16 = tl.constexpr(LARGEST), tl.constexpr(TO_FP16)


@triton.jit
def load_fp16(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """Load the number times the scale, of either sign or a square."""
    scale = load_scales(planes, offsets, mask)
    return (tl.load(planes[0] + offsets, mask=mask).to(tl.float32) * scale).to(COMPUTE_DTYPE)


def decode_fp16(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """PyTorch twin of `load_fp16`."""
    return shaped_like(planes[0], in_memory(planes[0]).float() * decode_scales(planes), dtype)


@triton.jit
def _rounded_code(planes, mask, value, start, offsets, noise):
    """Bits of the sizes of the numbers in fp16, rounded up or down by chance."""
    scaled = store_scales(planes, mask, value, start, _LARGEST)
    bits = (random_bits16(noise, start, offsets, mask) >> 3).to(tl.int32)
    return ((scaled * _TO_FP16).to(tl.int32, bitcast=True) + bits) >> 13


def _rounded_code_twin(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise) -> torch.Tensor:
    bits = flat_like(planes[0], noise.bits16(planes[0]), torch.int32)
    return ((encode_scales(planes, value, LARGEST) * TO_FP16).view(torch.int32) + (bits >> 3)) >> 13


@triton.jit
def store_fp16(planes, offsets, mask, value, start, noise):
    """Store numbers of either sign."""
    code = _rounded_code(planes, mask, value, start, offsets, noise)
    code = tl.where(value < 0, code | 0x8000, code)
    tl.store(planes[0] + offsets, code.to(tl.int16).to(tl.float16, bitcast=True), mask=mask)


def encode_fp16(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise) -> None:
    """PyTorch twin of `store_fp16`."""
    value = flat_like(planes[0], value)
    code = _rounded_code_twin(planes, value, noise)
    code = torch.where(value < 0, code | 0x8000, code)
    in_memory(planes[0]).copy_(code.to(torch.int16).view(torch.float16))


@triton.jit
def store_fp16_squares(planes, offsets, mask, value, start, noise):
    """Store squares; what is not 0 is not stored as 0."""
    code = _rounded_code(planes, mask, value, start, offsets, noise)
    code = tl.where((code == 0) & (value > 0), 1, code)
    tl.store(planes[0] + offsets, code.to(tl.int16).to(tl.float16, bitcast=True), mask=mask)


def encode_fp16_squares(planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Noise) -> None:
    """PyTorch twin of `store_fp16_squares`."""
    value = flat_like(planes[0], value)
    code = _rounded_code_twin(planes, value, noise)
    code = torch.where((code == 0) & (value > 0), 1, code)
    in_memory(planes[0]).copy_(code.to(torch.int16).view(torch.float16))


BF16 = state_format("bf16", load_plain, store_stochastic, decode_plain, encode_stochastic, (torch.bfloat16,))
FP16 = state_format("fp16", load_fp16, store_fp16, decode_fp16, encode_fp16, (torch.float16, torch.bfloat16), BLOCK)
FP16_SQUARES = state_format(
    "fp16 of squares", load_fp16, store_fp16_squares, decode_fp16, encode_fp16_squares,
    (torch.float16, torch.bfloat16), BLOCK,
)  # fmt: skip
