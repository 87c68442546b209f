"""How a value that the arithmetic sees in the compute dtype is stored.

A format is a pair of @triton.jit functions, passed to the driver as constexpr, and their two-line twins in PyTorch:

    load(planes, offsets, mask, COMPUTE_DTYPE) -> value          decode(planes, dtype) -> tensor
    store(planes, offsets, mask, value)                          encode(planes, tensor), in place

`planes` are the tensors that together hold the value, all of the value's shape: pointers in the kernel, tensors in
PyTorch. Any format goes with any update function; neither knows of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import cast


class Format(NamedTuple):
    """A storage format: its name, number of planes and the two pairs of functions (module docstring)."""

    name: str
    n_planes: int
    load: Any
    store: Any
    decode: Callable[[Sequence[torch.Tensor], torch.dtype], torch.Tensor]
    encode: Callable[[Sequence[torch.Tensor], torch.Tensor], None]
    plane_reads: tuple[bool, ...]
    """Which planes `load` reads; `store` writes all of them."""


@triton.jit
def load_plain(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """The one plane, widened."""
    return tl.load(planes[0] + offsets, mask=mask).to(COMPUTE_DTYPE)


@triton.jit
def store_plain(planes, offsets, mask, value):
    """The one plane, rounded to nearest even."""
    tl.store(planes[0] + offsets, cast(value, planes[0].dtype.element_ty), mask=mask)


def decode_plain(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Twin of `load_plain`."""
    return planes[0].to(dtype)


def encode_plain(planes: Sequence[torch.Tensor], value: torch.Tensor) -> None:
    """Twin of `store_plain`."""
    planes[0].copy_(value)


@triton.jit
def load_master(planes, offsets, mask, COMPUTE_DTYPE: tl.constexpr):
    """The fp32 master, plane 1; the fp16/bf16 weight, plane 0, is not read."""
    return tl.load(planes[1] + offsets, mask=mask).to(COMPUTE_DTYPE)


@triton.jit
def store_master(planes, offsets, mask, value):
    """The master, and the weight as the master rounded to nearest even."""
    tl.store(planes[1] + offsets, value, mask=mask)
    tl.store(planes[0] + offsets, cast(value, planes[0].dtype.element_ty), mask=mask)


def decode_master(planes: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Twin of `load_master`."""
    return planes[1].to(dtype)


def encode_master(planes: Sequence[torch.Tensor], value: torch.Tensor) -> None:
    """Twin of `store_master`."""
    planes[1].copy_(value)
    planes[0].copy_(planes[1])


def format_of(load: Any) -> Format:
    """The format that `load` belongs to."""
    return next(fmt for fmt in (PLAIN, MASTER_FP32) if fmt.load is load)


PLAIN = Format("plain", 1, load_plain, store_plain, decode_plain, encode_plain, (True,))
MASTER_FP32 = Format("fp32 master", 2, load_master, store_master, decode_master, encode_master, (False, True))
