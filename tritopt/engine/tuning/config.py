"""Launch configurations of the driver: block and chunk sizes, warps; the defaults, and what is allowed.

A block is what a program holds in registers at a time, a chunk all that one program does. No configuration changes what
an elementwise phase computes. A phase that sums (norms, telemetry) adds in an order that block, chunk and warps decide,
so it always has `GENERIC`: the same bits from run to run, tuned or not. They are not those of every GPU: for sm_100
Triton adds pairs first, so that sums differ from sm_90's in the last bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tritopt.kernels.formats.format import Format


class Config(NamedTuple):
    """Launch parameters. 8 elements a thread, one 128-bit access per 16-bit plane; in fp64 a quarter of block_size."""

    block_size: int = 1024
    chunk_size: int = 8192
    tail_size: int = 256
    """Elements of a block of what is not a whole block, or not aligned."""
    num_warps: int = 4


NVIDIA = Config()
AMD = Config(block_size=2048)  # a warp has 64 threads there
GENERIC = AMD if torch.version.hip else NVIDIA
"""The default; none of it was measured on a GPU. Of elementwise phases `default_of` makes the chunks smaller."""

_LARGEST = {"block_size": 2**14, "chunk_size": 2**20, "tail_size": 2**14, "num_warps": 16}


def default_of(n_elements: int) -> Config:
    """Default of elementwise phases over a list of so many elements.

    Chunks are as large as leaves 4096 programs, six waves of the 660 that an H200 holds at once (132 cores, 5 each): of
    8192 elements, a list of a million would leave most cores idle. `GENERIC`'s chunk is the largest, its block the
    smallest.

    >>> [default_of(n)._replace(block_size=1024).chunk_size for n in (2**20, 25_557_032, 2**30)]
    [1024, 4096, 8192]
    """
    chunk = 1 << max(0, (n_elements // 4096).bit_length() - 1)
    return GENERIC._replace(chunk_size=min(GENERIC.chunk_size, max(GENERIC.block_size, chunk)))


def size_of(n_elements: int) -> int:
    """Power of two that stands for a list of so many elements, 2**20 to 2**27, beyond which little changes."""
    return int(min(2**27, max(2**20, 1 << max(0, n_elements.bit_length() - 1))))


def from_fields(fields: Any) -> Config:
    """A Config from a mapping by name of the field, as JSON has it; ValueError that says what is wrong with it."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"a launch configuration must be a mapping by name, got {fields!r:.60}")
    if fields.keys() != _LARGEST.keys():
        raise ValueError(f"a launch configuration has {', '.join(_LARGEST)}, got {', '.join(map(str, fields))}")
    for name, value in fields.items():
        if type(value) is not int or not 1 <= value <= _LARGEST[name]:
            raise ValueError(f"{name}={value!r:.60} must be an int of 1 to {_LARGEST[name]}")
        if name != "chunk_size" and value & (value - 1):
            raise ValueError(f"{name}={value} must be a power of two")
    config = Config(**fields)
    if config.chunk_size % config.block_size:
        raise ValueError(f"chunk_size={config.chunk_size} must be a multiple of block_size={config.block_size}")
    if config.tail_size > config.block_size:
        raise ValueError(f"tail_size={config.tail_size} must not be more than block_size={config.block_size}")
    return config


def adapted(config: Config, formats: Sequence[Format], dtypes: Sequence[torch.dtype]) -> Config:
    """The configuration for tensors that are stored so: whole blocks of what shares a scale, less of fp64."""
    if dtypes[0] == torch.float64:
        # One 128-bit access a thread, and twice the registers an element.
        return config._replace(block_size=config.block_size // 4)
    whole = max(1, *(fmt.block for fmt in formats))
    block, chunk, tail = (-(-size // whole) * whole for size in config[:3])
    return config._replace(block_size=block, chunk_size=chunk, tail_size=tail)
