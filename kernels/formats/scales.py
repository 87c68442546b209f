"""Scales that elements next to each other in memory share, so that the elements may be stored as small codes.

A scale is for BLOCK elements: squares of gradients of 1e-6 are no numbers of fp16. It is a power of two, in bf16, so
that a number which is stored already stays what it is when the scale of its block is formed anew. With a scale that
follows the largest element exactly, all others would be rounded again in each step.

What is not finite stays an element's own affair: it must not reach its neighbours through their scale. Infinity is
stored as the largest number (one gradient of 1e20 has a square that fp32 cannot hold), NaN as the largest of its block.
Nothing is hidden by that: an update writes the weight from the states before they are stored, so that weight is NaN
already. A block of NaN alone has the scale NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import pad

from tritopt.kernels.language import tl, triton
from tritopt.kernels.memory import in_memory
from tritopt.kernels.ops import cast, max_of_numbers

BLOCK = 64
"""Elements that share a scale."""
_BLOCK = tl.constexpr(BLOCK)
_BLOCK_LOG2 = tl.constexpr(BLOCK.bit_length() - 1)
LARGEST_PEAK = 2.0**127
"""Largest number that scales are made for: the largest code times the scale must be finite."""
_LARGEST_PEAK = tl.constexpr(LARGEST_PEAK)


def scales_shape(shape: Sequence[int], block: int) -> tuple[int, ...]:
    """Shape of the scales of a state of this shape: its rows stay rows where they are whole blocks."""
    row = torch.Size(shape[1:]).numel()
    if len(shape) > 1 and row % block == 0:
        return shape[0], row // block
    return (-(-torch.Size(shape).numel() // block),)


@triton.jit
def _spread(per_block, N: tl.constexpr):
    """Repeat the number of each block for each of its elements."""
    wide = tl.broadcast_to(per_block[:, None], [N // _BLOCK, _BLOCK])
    return tl.reshape(wide, [N])


def _spread_twin(per_block: torch.Tensor, n: int) -> torch.Tensor:
    """PyTorch twin of `_spread`; n: number of elements, of which the last block may have fewer."""
    return per_block.repeat_interleave(BLOCK)[:n]


@triton.jit
def load_scales(planes, offsets, mask):
    """The scale of each element."""
    return tl.load(planes[1] + (offsets >> _BLOCK_LOG2), mask=mask).to(tl.float32)


def decode_scales(planes: Sequence[torch.Tensor]) -> torch.Tensor:
    """PyTorch twin of `load_scales`: fp32, in the order of the codes in memory."""
    return _spread_twin(planes[1].view(-1).float(), planes[0].numel())


@triton.jit
def store_scales(planes, mask, value, start, LARGEST: tl.constexpr):
    """Store the blocks' scales, and divide sizes by them: at most LARGEST, and so are NaN and what is too large."""
    n: tl.constexpr = value.shape[0]
    size = tl.abs(value)
    if mask is not None:
        size = tl.where(mask, size, 0.0)
    if mask is None:
        peak = max_of_numbers(max_of_numbers(tl.reshape(size, [n // _BLOCK, 8, 8]), 2), 1)
    else:
        peak = max_of_numbers(tl.reshape(size, [n // _BLOCK, _BLOCK]), 1)
    bits = (tl.minimum(peak, _LARGEST_PEAK) * (1.0 / LARGEST)).to(tl.int32, bitcast=True)  # NaN too
    exponent = tl.minimum(tl.maximum((bits + 0x7FFFFF) >> 23, 1), 253)
    scale = tl.where(peak == peak, (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
    ptrs = planes[1] + (start >> _BLOCK_LOG2) + tl.arange(0, n // _BLOCK)
    if mask is None:
        copies = tl.arange(0, n // 8)
        wide = tl.reshape(tl.broadcast_to(cast(scale, tl.bfloat16)[:, None], [n // _BLOCK, 8]), [n // 8])
        tl.store(planes[1] + ((start + 8 * copies) >> _BLOCK_LOG2), wide, mask=(copies & 7) == 0)
    else:
        is_there = tl.max(tl.reshape(mask.to(tl.int32), [n // _BLOCK, _BLOCK]), axis=1) > 0
        tl.store(ptrs, cast(scale, tl.bfloat16), mask=is_there)
    return tl.minimum(size * _spread(((254 - exponent) << 23).to(tl.float32, bitcast=True), n), LARGEST * 1.0)


def encode_scales(planes: Sequence[torch.Tensor], value: torch.Tensor, largest: float) -> torch.Tensor:
    """PyTorch twin of `store_scales`; the value is in the order of the codes in memory."""
    size = value.abs()
    peak = pad(torch.where(size.isnan(), -1.0, size), (0, -len(size) % BLOCK)).view(-1, BLOCK).amax(1)
    peak = torch.where(peak < 0, torch.nan, peak)
    bits = (_at_most(peak, LARGEST_PEAK) * float(np.float32(1.0 / largest))).view(torch.int32)
    exponent = ((bits + 0x7FFFFF) >> 23).clamp(1, 253)
    planes[1].view(-1).copy_(torch.where(peak.isnan(), torch.nan, (exponent << 23).view(torch.float32)))
    return _at_most(size * _spread_twin(((254 - exponent) << 23).view(torch.float32), len(size)), largest)


def _at_most(scaled: torch.Tensor, largest: float) -> torch.Tensor:
    """The smaller of the two, as a GPU's minimum has it: NaN becomes `largest`, too."""
    return torch.where(scaled < largest, scaled, largest)


def flat_like(codes: torch.Tensor, value: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Elements of a value in the order in which its codes lie in memory, in one dimension."""
    return in_memory(torch.empty_like(codes, dtype=dtype).copy_(value))


def shaped_like(codes: torch.Tensor, numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers in the order in which the codes lie in memory, as a tensor of their shape that lies as they do."""
    value = torch.empty_like(codes, dtype=torch.float32)
    in_memory(value).copy_(numbers)
    return value.to(dtype)
