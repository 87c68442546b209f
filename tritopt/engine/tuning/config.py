"""How the driver is launched: block and chunk sizes, warps; what is shipped for which GPU, and what is allowed.

A block is what a program holds in registers at a time, a chunk all that one program does. No configuration changes what
an elementwise phase computes. A phase that sums (norms, telemetry) adds in an order that block, chunk and warps decide,
so it always has `GENERIC`: the same bits from run to run, tuned or not. They are not those of every GPU: for sm_100
Triton adds pairs first, so that sums differ from sm_90's in the last bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from tritopt.kernels.formats.format import Format


class Config(NamedTuple):
    """Launch parameters. 8 elements a thread, one 128-bit access per 16-bit plane; in fp64 a quarter of block_size."""

    block_size: int = 1024
    chunk_size: int = 8192
    tail_size: int = 256
    """Of blocks of what is not a whole block, or not aligned."""
    num_warps: int = 4


NVIDIA = Config()
AMD = Config(block_size=2048)  # a warp has 64 threads there
GENERIC = AMD if torch.version.hip else NVIDIA

_LARGEST = {"block_size": 2**14, "chunk_size": 2**20, "tail_size": 2**14, "num_warps": 16}


def from_fields(fields: Any) -> Config:
    """A Config from a mapping by name of the field, as JSON has it; ValueError that says what is wrong with it."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"a launch configuration must be a mapping by name, got {fields!r:.60}")
    if unknown := [name for name in fields if name not in Config._fields]:
        raise ValueError(f"unknown field {unknown[0]!r:.60}; a launch configuration has {', '.join(Config._fields)}")
    if missing := [name for name in _LARGEST if name not in fields]:
        raise ValueError(f"field {missing[0]!r} is missing")
    for name, value in fields.items():
        lowest, largest = (1, _LARGEST[name]) if name in _LARGEST else (0, 2**10)
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= largest:
            raise ValueError(f"{name}={value!r:.60} must be an int of {lowest} to {largest}")
    config = Config(**fields)
    for name in ("block_size", "tail_size", "num_warps"):
        value = getattr(config, name)
        if value & (value - 1):
            raise ValueError(f"{name}={value} must be a power of two")
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


class SizeClass(NamedTuple):
    """Lists of tensors that one configuration is for."""

    name: str
    elements: int
    """Of the list that stands for all of them, about."""
    per_tensor: int
    """Likewise, of its large tensors; each is followed by a small one."""


SMALL_TENSOR = 1000
"""Elements: no multiple of anything, as biases and norms are; most of it runs in blocks of the tail."""
TINY_BELOW = 4096
"""Elements of a tensor on average: a chunk is a whole tensor then, and most are no full block."""
_BELOW = {"small": 2**23, "medium": 2**27, "large": 2**63}
_STANDS_FOR = {"small": 2**21, "medium": 2**25, "large": 2**27}
SIZES = {
    **{name: SizeClass(name, n, n // 64) for name, n in _STANDS_FOR.items()},
    **{f"{name}+tiny": SizeClass(f"{name}+tiny", n, SMALL_TENSOR) for name, n in _STANDS_FOR.items()},
}
"""By name: below 8 million elements, below 128 million, more; and the same of tensors of less than 4096 on average."""


def size_of(n_elements: int, n_tensors: int = 1) -> SizeClass:
    """The class of a list.

    >>> size_of(25_557_032, 161).name, size_of(10_000_000, 10_000).name
    ('medium', 'medium+tiny')
    """
    name = next(name for name, below in _BELOW.items() if n_elements < below)
    return SIZES[name if n_elements >= TINY_BELOW * n_tensors or n_tensors == 1 else f"{name}+tiny"]


KernelClass: TypeAlias = Literal["wide", "narrow"]
NARROW = 8
"""Bytes that a phase loads per element, at most, to be "narrow"; AdamW with an fp32 master loads 16, with 8 bits 7."""


def kernel_class(bytes_loaded: float) -> KernelClass:
    """The class of a phase that loads so many bytes per element."""
    return "narrow" if bytes_loaded <= NARROW else "wide"


class Shipped(NamedTuple):
    """A configuration that comes with the package."""

    config: Config
    mark: Literal["measured", "assumed"]
    """Whether a run of `tritopt tune` on such a GPU found it, or the reasons beside `SHIPPED` alone."""


def _assumed(block_size: int, chunk_size: int) -> Shipped:
    return Shipped(Config(block_size, chunk_size), "assumed")


_Table: TypeAlias = dict[tuple[KernelClass, str], Shipped]
# Blocks. 1024 elements are 8 a thread, one 128-bit load of each 16-bit plane. AdamW, compiled for sm_90, takes 94
# registers with an fp32 master: 5 programs a core, which have 5 * 1024 * 16 bytes under way, 11 MB on 132 cores, where
# an H200 needs 3 to 4 and a B200 6. With split8 and int8 126 registers: 4 * 1024 * 7 bytes, 3.8 MB. Blocks of 2048
# would have 5.7 MB, but take 166 registers for instructions that are likely the limit there.
# Chunks. A program begins with three reads that wait for each other, some 2 us, in which the others of its core
# move on; the last wave of programs leaves cores idle. ResNet-50 (25.6 million) in chunks of 8192 is 3.1 thousand
# programs, 4.7 waves of 660; of 4096, 9.5. Below 8 million elements, 2048 lets all cores take part from 1 million on.
# From 128 million on, waves are many, and a narrow phase takes twice the elements to move as many bytes.
_NVIDIA_TABLE: _Table = {
    ("wide", "small"): _assumed(1024, 2048),
    ("wide", "medium"): _assumed(1024, 4096),
    ("wide", "large"): _assumed(1024, 8192),
    ("narrow", "small"): _assumed(1024, 2048),
    ("narrow", "medium"): _assumed(1024, 4096),
    ("narrow", "large"): _assumed(1024, 16384),
}
SHIPPED: dict[str, _Table] = {
    "A100": _NVIDIA_TABLE,
    "H100": _NVIDIA_TABLE,
    "H200": _NVIDIA_TABLE,
    "B200": _NVIDIA_TABLE,
    # 304 cores and warps of 64 threads: blocks twice as long hold 8 elements a thread.
    "MI300": {
        ("wide", "small"): _assumed(2048, 2048),
        ("wide", "medium"): _assumed(2048, 4096),
        ("wide", "large"): _assumed(2048, 8192),
        ("narrow", "small"): _assumed(2048, 2048),
        ("narrow", "medium"): _assumed(2048, 4096),
        ("narrow", "large"): _assumed(2048, 16384),
    },
}
"""By GPU: of each class of phases and sizes. Nothing here was measured on a GPU."""
OF_ARCHITECTURE = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200", "gfx942": "MI300"}
"""Whose table other GPUs take."""


def known_gpu(name: str, architecture: str) -> str | None:
    """The key of SHIPPED for a GPU, as torch names it; its architecture's for one that is not known; else None.

    >>> known_gpu("NVIDIA H200", "sm_90"), known_gpu("NVIDIA GH200 480GB", "sm_90"), known_gpu("NVIDIA L4", "sm_89")
    ('H200', 'H100', None)
    """
    found = next((gpu for gpu in SHIPPED if re.search(rf"\b{gpu}(?!\d)", name)), None)
    return found or OF_ARCHITECTURE.get(architecture)


def shipped(gpu: str | None, kernel: KernelClass, size: SizeClass) -> Shipped:
    """What is shipped for a GPU (`known_gpu`), a class of phases and one of sizes; generic where none is."""
    generic = Shipped(GENERIC, "assumed")
    return SHIPPED[gpu].get((kernel, size.name.partition("+")[0]), generic) if gpu is not None else generic
