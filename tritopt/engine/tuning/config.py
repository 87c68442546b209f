"""Launch configurations of the driver, and of products: sizes and warps; the defaults, and what is allowed.

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
    """Launch parameters. 8 elements a thread, one 128-bit access per 16-bit plane; in fp64 a quarter of block_size.

    The default of elementwise phases over fp32 has half of that, `default_of`.
    """

    block_size: int = 1024
    chunk_size: int = 8192
    tail_size: int = 256
    """Elements of a block of what is not a whole block, or not aligned."""
    num_warps: int = 4


NVIDIA = Config()
AMD = Config(block_size=2048)  # a warp has 64 threads there
GENERIC = AMD if torch.version.hip else NVIDIA
"""The default; none of it was measured on a GPU. Elementwise phases have smaller chunks and blocks, `default_of`."""


class Tiles(NamedTuple):
    """Launch parameters of the product of a matrix X with its transpose (kernels/gram.py)."""

    block_size: int = 128
    """Rows and columns of the product that a program computes."""
    block_k: int = 64
    """Columns of X that it multiplies at a time."""
    group: int = 8
    """Rows of tiles whose programs run side by side, and find each other's tiles of X in the cache."""
    num_warps: int = 8
    """Warps of a program; with 4 a thread has 128 sums of a tile, and spills."""
    num_stages: int = 4
    """Steps whose loads are under way at once: 128 KiB of shared memory on sm_90, 96 elsewhere on NVIDIA."""


def tiles_of(dtype: torch.dtype, is_amd: bool = torch.version.hip is not None) -> Tiles:
    """Default of products, not measured on a GPU. AMD's 64 KiB of shared memory hold less, and fp32 takes twice of it.

    >>> tiles_of(torch.bfloat16, is_amd=True)
    Tiles(block_size=128, block_k=64, group=8, num_warps=8, num_stages=2)
    """
    tiles = Tiles() if dtype.itemsize == 2 else Tiles(block_size=64, block_k=32)
    return tiles._replace(num_stages=2) if is_amd else tiles


_LARGEST = {
    Config: {"block_size": 2**14, "chunk_size": 2**20, "tail_size": 2**14, "num_warps": 16},
    Tiles: {"block_size": 256, "block_k": 256, "group": 64, "num_warps": 16, "num_stages": 8},
}
_POWERS_OF_TWO = ("block_size", "tail_size", "block_k", "num_warps")


def default_of(n_elements: int, has_four: bool = False, generic: Config | None = None) -> Config:
    """Default of elementwise phases over a list of so many elements.

    Chunks are as large as leaves 4096 programs, six waves of the 660 that an H200 holds at once (132 cores, 5 each): of
    8192 elements, a list of a million would leave most cores idle. The generic chunk is the largest, the generic block
    the smallest.

    Args:
        n_elements: number of elements of the list.
        has_four: whether a thread has 4 elements instead of 8, `takes_four`.
        generic: the architecture's default; None: `GENERIC`.

    >>> [default_of(n, generic=NVIDIA).chunk_size for n in (2**20, 25_557_032, 2**30)]
    [1024, 4096, 8192]
    >>> default_of(2**30, True, NVIDIA)
    Config(block_size=512, chunk_size=8192, tail_size=256, num_warps=4)
    """
    generic = generic or GENERIC
    chunk = 1 << max(0, (n_elements // 4096).bit_length() - 1)
    chunk = min(generic.chunk_size, max(generic.block_size, chunk))
    return generic._replace(chunk_size=chunk, block_size=generic.block_size // (2 if has_four else 1))


def takes_four(formats: Sequence[Format], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether four elements a thread are better than eight in elementwise phases: beside fp32, where nothing draws.

    Four numbers of fp32 fill an access of 128 bits. Eight are two, each of half sectors; and beside a plane of 16 bits
    the compiler exchanges them through shared memory, with six barriers a block. AdamW with a master takes 64 registers
    on sm_90 instead of 92, so that 32 warps fit on a core instead of 20 (`tritopt inspect`). Eight elements that draw
    random bits share a call.
    """
    return torch.float32 in dtypes and torch.float64 not in dtypes and not any(fmt.draws for fmt in formats)


def unrolled(config: Config, generic: Config, dtypes: Sequence[torch.dtype]) -> int:
    """Number of blocks in one iteration of the driver's loop, where a thread has four elements of a block.

    They share the addresses of one. With a master, AdamW takes 36.3 instructions an element instead of 39.3 on sm_90.
    Blocks of fp32 alone are short, so that four share them; of others, more than two let the compiler move loads behind
    what waits for memory.
    """
    n_threads = generic.block_size // (8 * generic.num_warps) * config.num_warps
    if config.block_size != 4 * n_threads:
        return 1
    return 4 if set(dtypes) == {torch.float32} else 2


def size_of(n_elements: int) -> int:
    """Power of two that stands for a list of so many elements, 2**20 to 2**27, beyond which little changes."""
    return int(min(2**27, max(2**20, 1 << max(0, n_elements.bit_length() - 1))))


def from_fields(fields: Any, cls: type[Config] | type[Tiles] = Config) -> Any:
    """A configuration from a mapping by name of field, as JSON has it; ValueError that says what is wrong with it."""
    largest = _LARGEST[cls]
    if not isinstance(fields, Mapping):
        raise ValueError(f"a launch configuration must be a mapping by name, got {fields!r:.60}")
    if fields.keys() != largest.keys():
        raise ValueError(f"a launch configuration has {', '.join(largest)}, got {', '.join(map(str, fields))}")
    for name, value in fields.items():
        if type(value) is not int or not 1 <= value <= largest[name]:
            raise ValueError(f"{name}={value!r:.60} must be an int of 1 to {largest[name]}")
        if name in _POWERS_OF_TWO and value & (value - 1):
            raise ValueError(f"{name}={value} must be a power of two")
    config = cls(**fields)
    if isinstance(config, Tiles):
        if min(config.block_size, config.block_k) < 16:
            raise ValueError(
                f"block_size={config.block_size}, block_k={config.block_k} must be at least 16, as a product's"
            )
        return config
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
