"""Kernels of Triton in the machine, against NumPy. test_kernels.py runs this file where kernels are compiled."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.test_exact import EDGES
from tritopt import optim
from tritopt.engine import plan
from tritopt.kernels.drivers.multi_tensor_norm import sum_partials
from tritopt.kernels.formats.format import Format
from tritopt.kernels.formats.weights import KAHAN, MASTER_FP32, SPLIT8, SPLIT16
from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div, div_by_root, sqrt
from tritopt.tools.ptx import driver
from tritopt.tools.ptx.driver import Record, allocations, switch_on
from tritopt.tools.ptx.machine import Machine
from tritopt.tools.ptx.memory import Fault, Memory
from tritopt.tools.ptx.program import parse
from tritopt.tools.ptx.threads import Options


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    with switch_on(getattr(request, "param", 90)) as record:
        yield record


every_target = pytest.mark.parametrize("record", [80, 90, 100], indirect=True)


@triton.jit  # type: ignore[untyped-decorator]
def scaled_sum(x, y, out, n, factor, beyond, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n + beyond
    a = tl.load(x + i, mask=inside, other=0.0)
    tl.store(out + i, a + factor * tl.load(y + i, mask=inside, other=0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def row_sums(x, out, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    block = tl.load(x + rows[:, None] * n_columns + columns[None, :], mask=columns[None, :] < n_columns, other=0.0)
    tl.store(out + rows, tl.sum(block, axis=1))


@triton.jit  # type: ignore[untyped-decorator]
def softmax(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < n, other=-float("inf"))
    powers = tl.exp(values - tl.max(values, axis=0))
    tl.store(out + i, powers / tl.sum(powers, axis=0), mask=i < n)


@triton.jit  # type: ignore[untyped-decorator]
def copy_overlapping(x, out, STEP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i))


@triton.jit  # type: ignore[untyped-decorator]
def exact(x, y, quotients, roots, by_roots, epsilon, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(quotients + i, div(a, b))
    tl.store(roots + i, sqrt(b))
    tl.store(by_roots + i, div_by_root(a, b, epsilon))


@triton.jit  # type: ignore[untyped-decorator]
def loaded(plane, companion, out, BLOCK: tl.constexpr, LOAD_FN: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, LOAD_FN((plane, companion), i, None, tl.float32))


def add(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, beyond: int = 0, fusion: bool = False) -> Any:
    n = x.numel()
    grid = (triton.cdiv(n, 128),)
    return scaled_sum[grid](x, y, out, n, 0.1, beyond, BLOCK=128, num_warps=2, enable_fp_fusion=fusion)


@every_target
@pytest.mark.parametrize("n", [1, 127, 128, 129, 1000])
def test_elementwise(record: Record, n: int) -> None:
    x, y, out = torch.randn(n), torch.randn(n), torch.full((n,), math.nan)
    add(x, y, out)
    assert np.array_equal(out.numpy(), x.numpy() + np.float32(0.1) * y.numpy())
    assert record.launches == {"scaled_sum": 1}
    assert record.faults == []


@every_target
@pytest.mark.parametrize("elements", [1, 4, 8, 16])
def test_exact_arithmetic_at_the_edges(record: Record, elements: int) -> None:
    """All pairs of numbers at which something changes, and of ordinary ones, which stand among them in every thread."""
    edges = np.array([*EDGES, *(bits + 2**31 for bits in EDGES)], np.uint32).view(np.float32)
    numbers = np.concatenate([edges, np.random.default_rng(0).standard_normal(64 - len(edges) % 64).astype(np.float32)])
    x, y = (np.ascontiguousarray(each).ravel() for each in np.meshgrid(numbers, numbers))
    ordinary = np.random.default_rng(1).random((2, len(x)), np.float32) + np.float32(0.5)
    x, y = (
        np.stack([edge, *[other] * 15], 1)[:, : max(2, elements)].ravel()
        for edge, other in zip((x, y), ordinary, strict=True)
    )
    for epsilon in (1e-8, 0.0, 1e-30, math.inf, 2.0):
        actual = [torch.full((len(x),), math.nan) for _ in range(3)]
        given = torch.from_numpy(x), torch.from_numpy(y)
        exact[(len(x) // (32 * elements),)](
            *given, *actual, epsilon, BLOCK=32 * elements, num_warps=1, enable_fp_fusion=False
        )
        with np.errstate(all="ignore"):
            root = np.sqrt(y)
            for ours, expected in zip(actual, (x / y, root, x / (root + np.float32(epsilon))), strict=True):
                assert np.array_equal(ours.numpy(), expected, equal_nan=True)
                assert np.array_equal(np.signbit(ours.numpy()), np.signbit(expected) & ~np.isnan(expected))


def companions(fmt: Format, weight: torch.Tensor) -> list[torch.Tensor]:
    """The weight's own, its neighbours', and any."""
    random = np.random.default_rng(0)
    if fmt.companion_dtype == torch.float32:
        bits = (
            weight.float().view(torch.int32)[:, None] + torch.tensor([0, 2**12, 2**15, -(2**15)], dtype=torch.int32)
        ).T
        return [each.contiguous().view(torch.float32) for each in bits]
    dtype = fmt.dtype_of_companion(weight.dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    some = torch.from_numpy(random.integers(0, 256, size * len(weight), dtype=np.uint8)).view(dtype)
    if dtype.is_floating_point:
        return [torch.zeros_like(weight), some, (weight.float() * 2.0**-9).to(dtype)]
    return [some, *(torch.full_like(some, edge) for edge in (torch.iinfo(dtype).min, torch.iinfo(dtype).max, -1))]


@pytest.mark.parametrize("elements", [1, 4])
@pytest.mark.parametrize("fmt", [MASTER_FP32, KAHAN, SPLIT16, SPLIT8], ids=lambda fmt: fmt.name)
def test_every_weight_is_joined_as_its_twin_does(record: Record, fmt: Format, elements: int) -> None:
    for dtype in fmt.weight_dtypes:
        weight = torch.arange(2**16).to(torch.int16).view(dtype)
        for companion in companions(fmt, weight):
            out = torch.full((2**16,), math.nan)
            loaded[(2**16 // (32 * elements),)](
                weight, companion, out, BLOCK=32 * elements, LOAD_FN=fmt.load, num_warps=1, enable_fp_fusion=False
            )
            expected = fmt.decode([weight, companion], torch.float32)
            is_nan = expected.isnan()
            assert torch.equal(out.isnan(), is_nan)
            assert torch.equal(out[~is_nan].view(torch.int32), expected[~is_nan].view(torch.int32))


def test_views_that_are_aligned_otherwise(record: Record) -> None:
    x, y, out = torch.randn(300), torch.randn(300), torch.full((300,), math.nan)
    add(x[1:-1], y[2:], out[1:-1])
    assert np.array_equal(out[1:-1].numpy(), x[1:-1].numpy() + np.float32(0.1) * y[2:].numpy())
    assert out[[0, -1]].isnan().all()


def test_contraction_to_fma_shows(record: Record) -> None:
    x, y, plain, contracted = torch.randn(1000), torch.randn(1000), torch.empty(1000), torch.empty(1000)
    add(x, y, plain)
    add(x, y, contracted, fusion=True)
    exact = x.double() + torch.tensor(0.1).double() * y.double()
    assert torch.equal(contracted, exact.float())
    assert not torch.equal(plain, contracted)


def test_a_mask_one_too_far_is_out_of_bounds(record: Record) -> None:
    x, y, out = torch.randn(100), torch.randn(100), torch.empty(100)
    with pytest.raises(Fault, match="read of 4 bytes outside of live tensors") as error:
        add(x, y, out, beyond=1)
    assert error.value.address == x.data_ptr() + 400
    assert record.faults == [str(error.value)]


def test_overlapping_programs_race(record: Record) -> None:
    x, out = torch.randn(256), torch.empty(256)
    copy_overlapping[(2,)](x, out, STEP=64, BLOCK=64, num_warps=2, enable_fp_fusion=False)
    assert torch.equal(out[:128], x[:128])
    with pytest.raises(Fault, match="race: write of what program 0"):
        copy_overlapping[(2,)](x, out, STEP=32, BLOCK=64, num_warps=2, enable_fp_fusion=False)
    record.watches = False
    copy_overlapping[(2,)](x, out, STEP=32, BLOCK=64, num_warps=2, enable_fp_fusion=False)


def test_a_tensor_owns_its_extent_and_not_its_storage(record: Record) -> None:
    x, out = torch.randn(256), torch.empty(256)
    kept = torch.empty(0).set_(x.untyped_storage(), 0, (128,), (1,))
    copy_overlapping[(2,)](kept, out, STEP=128, BLOCK=128, num_warps=2, enable_fp_fusion=False)
    del x
    with pytest.raises(Fault, match=r"read of \d+ bytes outside"):
        copy_overlapping[(2,)](kept, out, STEP=128, BLOCK=128, num_warps=2, enable_fp_fusion=False)


@every_target
@pytest.mark.parametrize(("num_warps", "seed"), [(1, None), (4, None), (4, 0), (8, 1)])
def test_sums_over_warps(record: Record, num_warps: int, seed: int | None) -> None:
    record.warp_seed = seed
    x = torch.randint(-100, 100, (32, 100)).float()
    out = torch.full((32,), math.nan)
    row_sums[(4,)](x, out, 100, ROWS=8, COLUMNS=128, num_warps=num_warps, enable_fp_fusion=False)
    assert torch.equal(out, x.sum(1))


def test_softmax_within_an_ulp_of_its_approximations(record: Record) -> None:
    x, exact, off = torch.randn(1000), torch.empty(1000), torch.empty(1000)
    softmax[(1,)](x, exact, 1000, BLOCK=1024, num_warps=4, enable_fp_fusion=False)
    torch.testing.assert_close(exact, x.softmax(0), rtol=1e-6, atol=0)
    record.inexact = True
    softmax[(1,)](x, off, 1000, BLOCK=1024, num_warps=4, enable_fp_fusion=False)
    torch.testing.assert_close(off, exact, rtol=1e-6, atol=0)
    assert not torch.equal(off, exact)


def test_order_of_programs(record: Record) -> None:
    x, out = torch.randn(256), torch.zeros(256)
    record.order = lambda numbers: numbers[::-2]
    copy_overlapping[(4,)](x, out, STEP=64, BLOCK=64, num_warps=2, enable_fp_fusion=False)
    expected = x.view(4, 64) * torch.tensor([0.0, 1, 0, 1])[:, None]
    assert torch.equal(out, expected.view(-1))


def outcome(machine: Machine, arguments: list[Any], out: torch.Tensor, options: Options) -> list[float] | str:
    out.fill_(math.nan)
    try:
        machine.launch(arguments, (len(out), 1, 1), Memory(allocations(), options.watches), options)
    except Fault as fault:
        return str(fault)
    return [float(value) for value in out.view(-1)]


def test_every_barrier_of_a_reduction_is_needed(record: Record) -> None:
    """Two warps race if any one is missing; and most show in the sums, too, if warps run one after the other."""
    chunks = torch.tensor([3, 1, 1100])
    first = torch.cumsum(chunks, 0) - chunks
    partials = torch.randint(-1000, 1000, (int(chunks.sum()), 2)).double()
    table, sums = torch.stack([chunks, first, chunks], dim=1), torch.empty(3, 2, dtype=torch.float64)
    compiled = sum_partials[(3,)](
        partials, table, sums, len(partials), 3, N_SUMS=2, BLOCK_SIZE=1024, num_warps=4, enable_fp_fusion=False
    )
    expected = torch.stack([part.sum(0) for part in partials.split(chunks.tolist())])
    assert torch.equal(sums, expected)
    ptx = compiled.asm["ptx"]
    ptx = ptx if isinstance(ptx, str) else ptx.decode()
    program = parse(ptx)
    arguments = [partials.data_ptr(), table.data_ptr(), sums.data_ptr(), len(partials), 3]
    arguments += [0] * (len(program.parameters) - len(arguments))
    wanted = [float(value) for value in expected.view(-1)]
    seeds = range(4)
    whole = Machine(program, compiled.metadata.shared)
    assert all(outcome(whole, arguments, sums, Options(warp_seed=seed)) == wanted for seed in seeds)
    barriers = [match.span() for match in re.finditer(r"bar\.sync\s+0;", ptx)]
    assert len(barriers) >= 3
    n_shown = 0
    for start, end in barriers:
        broken = Machine(parse(ptx[:start] + ptx[end:]), compiled.metadata.shared)
        outcomes = [outcome(broken, arguments, sums, Options(warp_seed=seed, watches=False)) for seed in seeds]
        n_shown += any(one != wanted for one in outcomes)
        assert "race in shared memory" in str(outcome(broken, arguments, sums, Options()))
    # Triton 3.6 has all warps read a sum that only the first one stores: what the others read does not matter.
    assert n_shown == len(barriers) or (len(barriers) == 5 and n_shown == 2)


def test_what_was_compiled_for_the_machine_needs_it(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, out = torch.randn(9), torch.randn(9), torch.empty(9)
    add(x, y, out)
    monkeypatch.setattr(driver, "_record", None)
    with pytest.raises(RuntimeError, match="PTX machine, which is switched off"):
        add(x, y, out)


def test_tensors_of_other_devices_are_refused(record: Record) -> None:
    reason = plan.unavailable(torch.empty(3, device="meta"))
    assert reason is not None
    assert "cannot update a tensor on meta: switch the PTX machine off" in reason


def test_an_optimizer_is_bound_to_the_machine_that_is_on() -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    outer = driver._record
    with switch_on(80) as record:
        assert plan.unavailable(param) is None
        opt = optim.SGD([param], lr=1.0)
        param.grad = torch.ones(4)
        opt.step()
        assert record.launches.total() == 1
    assert driver._record is outer
    assert param.tolist() == [-1.0] * 4
