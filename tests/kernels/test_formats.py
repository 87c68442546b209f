"""Each kernel of a storage format beside its twin, on numbers at the edges: what both store and load, bit for bit."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from tritopt.engine.random_keys import noise_key
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.scales import BLOCK
from tritopt.kernels.formats.states import STATE_FORMATS
from tritopt.kernels.formats.weights import MASTERS
from tritopt.kernels.language import HAS_TRITON, tl, triton
from tritopt.kernels.twins.random import STEPS, Noise

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

SIZE = 2048
STATES = {fmt.name: fmt for kinds in STATE_FORMATS.values() for fmt in kinds.values()}
CASES: list[tuple[Format, torch.dtype]] = [
    *((fmt, dtype) for fmt in (PLAIN, *MASTERS.values()) for dtype in fmt.weight_dtypes),
    *((fmt, fmt.dtypes[0]) for fmt in STATES.values()),
]
EVERY_FORMAT = pytest.mark.parametrize(
    ("fmt", "dtype"), CASES, ids=[f"{fmt.name}-{dtype}".replace("torch.", "") for fmt, dtype in CASES]
)

# Bits of fp32 numbers, of either sign.
EDGES = [
    0x00000000, 0x00000001, 0x00400000, 0x007FFFFF, 0x00800000, 0x00800001,  # 0, subnormal, the smallest normal
    0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF,  # largest, infinity, NaN
    0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x3F818001,  # ties of bf16, and beside them
    0x3F801000, 0x3F803000, 0x3F800FFF, 0x3F801001,  # ties of fp16
    0x00008000, 0x00018000, 0x00007FFF,  # ties of bf16's subnormal numbers
    0x33000000, 0x33000001, 0x33800000, 0x33C00000, 0x387FC000, 0x38800000,  # fp16's smallest, and ties of those
    0x477FE000, 0x477FEFFF, 0x477FF000, 0x47800000,  # fp16's largest, below infinity, at infinity
    0x3F800000, 0x3F000000, 0x40000000, 0x3F7FFFFF, 0x3F800001, 0x7E800000, 0x7F000000, 0x7F000001,  # powers of two
]  # fmt: skip


def from_bits(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def directed(is_square: bool) -> torch.Tensor:
    """Blocks of edges, of zeros, of NaN alone, of what is rounded, beside outliers, of any bits: fp32 [SIZE]."""
    generator = torch.Generator("cpu").manual_seed(0)
    edges = from_bits([*EDGES, *(bits - 2**31 for bits in EDGES)])
    finite = edges[edges.isfinite()]
    bits = torch.randint(-(2**31), 2**31, (3 * BLOCK,), generator=generator, dtype=torch.int64, device="cpu")
    normal = torch.randn(3, BLOCK, generator=generator, device="cpu").to(edges.device)
    outlier = normal[2].clone()
    outlier[0] = 1e30
    blocks = [
        edges.repeat(3)[: 3 * BLOCK],
        finite.repeat(3)[: 3 * BLOCK],
        edges[edges.abs() < 1e-30].repeat(BLOCK)[:BLOCK],
        *(torch.full((BLOCK,), x) for x in (0.0, -0.0, torch.nan, torch.inf, 2.0**-149, 2.0**-126, 2.0**127)),
        *(torch.full((BLOCK,), x) for x in (1.0, 1.0 + 2.0**-23, 1.0 - 2.0**-24)),  # where a scale becomes the next
        normal[0],
        normal[1] * 1e-20,
        outlier,
        torch.arange(BLOCK, dtype=torch.float32) ** 4,
        torch.linspace(0, 1, BLOCK) ** 8,
        bits.to(edges.device, torch.int32).view(torch.float32),
    ]
    value = torch.cat(blocks).repeat(2)[:SIZE]
    return value.abs() if is_square else value


def dtypes_of(fmt: Format, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return fmt.dtypes or (dtype, fmt.dtype_of_companion(dtype))[: fmt.n_planes]


def fenced_planes(fmt: Format, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Planes full of a number that must stay where nothing is written."""
    sizes = (SIZE, SIZE // fmt.block if fmt.block else SIZE)
    return tuple(torch.full((size,), 77).to(d) for size, d in zip(sizes, dtypes_of(fmt, dtype), strict=False))


def part(fmt: Format, planes: tuple[torch.Tensor, ...], n: int) -> list[torch.Tensor]:
    """The first n elements' share of the planes."""
    ends = [n if i == 0 or not fmt.block else -(-n // fmt.block) for i in range(len(planes))]
    return [plane[:end] for plane, end in zip(planes, ends, strict=True)]


@triton.jit  # type: ignore[untyped-decorator]
def store_block(  # type: ignore[no-untyped-def]
    first_ptr, second_ptr, value_ptr, noise_ptr, n, STORE_FN: tl.constexpr, DRAWS: tl.constexpr, IS_FULL: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, SIZE)
    planes = (first_ptr,) if second_ptr is None else (first_ptr, second_ptr)
    mask = None if IS_FULL else offsets < n
    value = tl.load(value_ptr + offsets, mask=mask)
    if DRAWS:
        noise = (
            tl.load(noise_ptr), tl.load(noise_ptr + 1), tl.load(noise_ptr + 2), tl.load(noise_ptr + 3),
            tl.load(noise_ptr + 4).to(tl.uint32), tl.load(noise_ptr + 5).to(tl.int32),
        )  # fmt: skip
        STORE_FN(planes, offsets, mask, value, tl.load(noise_ptr + 6), noise)
    else:
        STORE_FN(planes, offsets, mask, value)


@triton.jit  # type: ignore[untyped-decorator]
def load_block(  # type: ignore[no-untyped-def]
    first_ptr, second_ptr, value_ptr, shown_ptr, n, LOAD_FN: tl.constexpr, SHOWN_FN: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr, IS_FULL: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, SIZE)
    planes = (first_ptr,) if second_ptr is None else (first_ptr, second_ptr)
    mask = None if IS_FULL else offsets < n
    value = LOAD_FN(planes, offsets, mask, COMPUTE_DTYPE)
    tl.store(value_ptr + offsets, value, mask=mask)
    if shown_ptr is not None:
        tl.store(shown_ptr + offsets, SHOWN_FN(planes, value), mask=mask)


def launch(kernel: Any, planes: tuple[torch.Tensor, ...], *args: Any, **options: Any) -> None:
    first, second = (*planes, None)[:2]
    with np.errstate(all="ignore"):
        kernel[(1,)](first, second, *args, **options, SIZE=SIZE, enable_fp_fusion=False)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in every bit; of NaN, which has many, any two will do."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = actual[~actual.isnan()], expected[~expected.isnan()]
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.dtype.itemsize]
    torch.testing.assert_close(actual.view(integer), expected.view(integer), rtol=0, atol=0)


# All there is; a tail that ends within a block and within eight neighbours; one element.
COUNTS = pytest.mark.parametrize("n", [SIZE, SIZE - BLOCK - 3, 1])
NOISES = [
    Noise(noise_key(0, "a"), 0, 0, 0, 1),
    Noise(noise_key(1, "b"), 2**40 + 64, 0, 0, STEPS - 1, shift=3),
    Noise(noise_key(2, "c"), 128, 64, 192, 7, shift=5),
    Noise(noise_key(3, "d"), 2**32 - 3, 7, 5, 2, shift=1),
]


@COUNTS
@EVERY_FORMAT
def test_kernel_stores_what_its_twin_does(fmt: Format, dtype: torch.dtype, n: int) -> None:
    value = directed("squares" in fmt.name).to(torch.float64 if dtype == torch.float64 else torch.float32)
    # Full blocks are for runs whose eights are whole.
    noises = [noise for noise in NOISES if n < SIZE or all(place % 8 == 0 for place in noise[1:4])]
    for noise in noises if fmt.draws else noises[:1]:
        planes, expected = fenced_planes(fmt, dtype), fenced_planes(fmt, dtype)
        numbers = torch.tensor([*noise[:4], int(noise.step), noise.shift, 0])
        launch(store_block, planes, value, numbers, n, STORE_FN=fmt.store, DRAWS=fmt.draws, IS_FULL=n == SIZE)
        fmt.encode(part(fmt, expected, n), value[:n], *([noise] if fmt.draws else []))
        for actual, wanted in zip(planes, expected, strict=True):
            assert_same_bits(actual, wanted)


def every_plane(fmt: Format, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Codes, or weights and what may stand beside them: all of 8 bits, and of more those at the edges."""
    codes = [edges_of(d) for d in dtypes_of(fmt, dtype)]
    if fmt.block:
        scales = torch.tensor([2.0**-126, 2.0**-30, 0.5, 1.0, 4.0, 2.0**100, torch.nan, 1.0]).to(fmt.dtypes[1])
        return [(codes[0], scales.roll(i).repeat(SIZE // fmt.block // 8)) for i in range(8)]
    return [tuple(code.roll(i * shift) for i, code in enumerate(codes)) for shift in (0, 1, 5, 29, 333)]


def edges_of(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (SIZE // 2,), generator=generator, dtype=torch.int64, device="cpu")
    numbers = directed(is_square=False)[: SIZE // 2]
    if dtype.is_floating_point:
        return torch.cat((numbers.to(dtype), bits.to(numbers.device, torch.int32).view(torch.float32).to(dtype)))
    whole = [*range(256)] if dtype.itemsize == 1 else [0, 1, -1, 2**15 - 1, -(2**15)]
    return torch.cat((torch.tensor(whole).repeat(SIZE)[: SIZE // 2], bits.to(numbers.device))).to(dtype)


@EVERY_FORMAT
def test_kernel_loads_what_its_twin_does(fmt: Format, dtype: torch.dtype) -> None:
    """A loaded value is also shown as the very weight that was loaded, whatever stands beside that."""
    compute, name = (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)
    for planes, n in product(every_plane(fmt, dtype), (SIZE, SIZE - BLOCK - 3)):
        value = torch.full((SIZE,), 77.0, dtype=compute)
        shown = None if fmt.shown is None else torch.full((SIZE,), 77.0).to(dtype)
        options = {"LOAD_FN": fmt.load, "SHOWN_FN": fmt.shown, "COMPUTE_DTYPE": name, "IS_FULL": n == SIZE}
        launch(load_block, planes, value, shown, n, **options)
        assert_same_bits(value[:n], fmt.decode(part(fmt, planes, n), compute))
        assert (value[n:] == 77).all()
        if shown is not None:
            assert_same_bits(shown[:n], planes[0][:n])
            assert (shown[n:] == 77).all()
