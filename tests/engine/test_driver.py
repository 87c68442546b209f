"""The driver and the norm kernel by themselves, with update functions of their own."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tritopt.engine import driver, plan
from tritopt.engine.driver import Apply
from tritopt.engine.group import LaunchGroup
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.plan import Planner, Task
from tritopt.engine.tuning.config import Config
from tritopt.kernels.drivers.multi_tensor_apply import multi_tensor_apply
from tritopt.kernels.drivers.multi_tensor_norm import square_update, sum_partials
from tritopt.kernels.formats.format import PLAIN
from tritopt.kernels.formats.weights import MASTER_FP32
from tritopt.kernels.language import INTERPRETED, tl, triton

COMMON = (1.0, math.inf, 0.0)  # rescale, clip bound, wd


class Scale(NamedTuple):
    factor: float


@triton.jit
def add_scaled(w, g, state, s):  # type: ignore[no-untyped-def]
    return w + s.factor * g, state


@triton.jit
def emit_sums(w, g, state, s):  # type: ignore[no-untyped-def]
    return w, state, (w, g)


@triton.jit
def divide_by_sums(w, g, state, s, sums):  # type: ignore[no-untyped-def]
    return w / (sums[0] + sums[1]).to(tl.float32), state


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and chunks out of a small tensor."""
    monkeypatch.setattr(Planner, "config", Config(block_size=16, chunk_size=64, num_warps=1))


def plain_task(weight: torch.Tensor, grad: torch.Tensor) -> Task:
    return Task((weight,), PLAIN, grad, ())


def add(tasks: list[Task], factors: list[float], **options: Any) -> None:
    launch = LaunchSpec((Apply(add_scaled),), Scale, "decoupled", **options)
    Planner().apply("key", tasks, [(*COMMON, factor) for factor in factors], launch)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 63, 64, 65, 200])
def test_every_element_is_updated_once(size: int, small_chunks: None) -> None:
    weight, grad = torch.zeros(size), torch.arange(1.0, size + 1)
    add([plain_task(weight, grad)], [2.0])
    torch.testing.assert_close(weight, 2 * grad, rtol=0, atol=0)


def test_each_tensor_has_its_own_scalars(small_chunks: None) -> None:
    weights = [torch.zeros(n) for n in (5, 130, 64)]
    add([plain_task(w, torch.ones_like(w)) for w in weights], [1.0, 2.0, 3.0])
    assert [set(w.tolist()) for w in weights] == [{1.0}, {2.0}, {3.0}]


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_views_touch_nothing_around_them(offset: int, small_chunks: None) -> None:
    buffer = torch.full((300,), 7.0)
    weight = buffer[offset : offset + 200]
    grad = torch.full((300,), math.nan)
    grad[offset : offset + 200] = 1.0
    add([plain_task(weight, grad[offset : offset + 200])], [1.0])
    assert torch.all(weight == 8.0)
    assert torch.all(buffer[:offset] == 7.0)
    assert torch.all(buffer[offset + 200 :] == 7.0)


@pytest.mark.parametrize(("flag", "moved"), [(0.0, 1.0), (1.0, 0.0)])
def test_noop_flag(flag: float, moved: float) -> None:
    weight = torch.zeros(5)
    add([plain_task(weight, torch.ones(5))], [1.0], noop=torch.tensor(flag))
    assert weight.tolist() == [moved] * 5


@pytest.mark.parametrize(
    ("rescale", "skip_zero", "moved"),
    [(0.5, False, 0.5), (math.nan, False, 0.0), (math.inf, False, 0.0), (-math.inf, False, 0.0), (0.0, True, 0.0)],
)
def test_device_rescale(rescale: float, skip_zero: bool, moved: float) -> None:
    weight = torch.zeros(5)
    options = {"rescale": torch.tensor(rescale), "skip_zero_rescale": skip_zero}
    add([plain_task(weight, torch.ones(5))], [1.0], **options)
    assert weight.tolist() == [moved] * 5


def test_master_and_weight_are_written_together() -> None:
    weight, master = torch.zeros(40, dtype=torch.bfloat16), torch.zeros(40)
    grad = torch.linspace(-1, 1, 40, dtype=torch.float16)
    add([Task((weight, master), MASTER_FP32, grad, ())], [1 / 3])
    torch.testing.assert_close(master, grad.float() * torch.tensor(1 / 3), rtol=0, atol=0)
    torch.testing.assert_close(weight, master.to(torch.bfloat16), rtol=0, atol=0)


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-8, 1 + 2**-8 + 2**-20, -1 - 3 * 2**-8, 3.4e38, math.nan])
    weight = torch.zeros(7, dtype=torch.bfloat16)
    add([plain_task(weight, values)], [1.0])
    torch.testing.assert_close(weight, values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_sums_reach_the_next_phase(small_chunks: None) -> None:
    sizes = (3, 64, 131)
    weights = [torch.full((n,), 2.0) for n in sizes]
    launch = LaunchSpec((Apply(emit_sums, writes_weight=False, n_sums=2), Apply(divide_by_sums)), Scale, "decoupled")
    Planner().apply("key", [plain_task(w, torch.ones_like(w)) for w in weights], [(*COMMON, 0.0)] * 3, launch)
    for n, weight in zip(sizes, weights, strict=True):
        torch.testing.assert_close(weight, torch.full((n,), 2 / (3 * n)))


def test_norms_are_right_and_repeatable(small_chunks: None) -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    tensors = [
        torch.randn(n, generator=generator).to(dtype)
        for n in (0, 1, 100, 333)
        for dtype in (torch.float32, torch.float16)
    ]
    tensors.append(torch.randn(20, 30, generator=generator)[::2, ::3])
    expected = torch.stack([t.double().norm() for t in tensors])
    torch.testing.assert_close(plan.norms(tensors), expected, rtol=1e-6, atol=0)
    assert torch.equal(plan.norms(tensors), plan.norms(tensors))


def test_norms_of_nothing() -> None:
    assert plan.norms([]).shape == (0,)


def test_ten_thousand_tensors_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch, whose tables name every tensor; run for real on a GPU, where it does not take a minute."""
    launches = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **constants: Any) -> None:
                launches.append((grid, [a.cpu() if isinstance(a, torch.Tensor) else a for a in args]))
                if not INTERPRETED:
                    multi_tensor_apply[grid](*args, **{**constants, "enable_fp_fusion": False})

            return launch

    monkeypatch.setattr(driver, "multi_tensor_apply", Recorder())
    n = 10_000
    buffer, grad = torch.zeros(n, 4), torch.ones(n, 4)
    add([plain_task(w, g) for w, g in zip(buffer, grad, strict=True)], [float(i % 7) for i in range(n)])
    ((grid, (table, tensor_table, chunk_table, *_)),) = launches
    assert grid == (n, 1, 1)
    assert chunk_table.tolist() == list(range(n))
    assert tensor_table.tolist() == [[4, i, 1] for i in range(n)]
    rows = table[: 3 * n].view(n, 3)
    assert rows[:, 0].tolist() == [w.data_ptr() for w in buffer]
    assert rows[:, 1].tolist() == [g.data_ptr() for g in grad]
    scalars = table[3 * n :].view(torch.float64).view(7, 4)
    assert scalars[rows[:, 2], 3].tolist() == [i % 7 for i in range(n)]
    if not INTERPRETED:
        torch.testing.assert_close(buffer, (torch.arange(n) % 7).float()[:, None].expand(-1, 4))


def test_many_tensors_run(small_chunks: None) -> None:
    buffer = torch.zeros(300, 3)
    add([plain_task(w, torch.ones(3)) for w in buffer], [float(i % 7) for i in range(300)])
    torch.testing.assert_close(buffer, (torch.arange(300) % 7).float()[:, None].expand(-1, 3))


def test_offsets_beyond_2_to_the_31(small_chunks: None) -> None:
    """The last chunk of a tensor of 2^31 + 40 elements, in memory that is reserved but for its last page untouched."""
    size, chunk = 2**31 + 40, 64
    if torch.cuda.is_available():
        weight = torch.zeros(size, dtype=torch.float16)
        grad = torch.ones(size, dtype=torch.float16)
    else:
        weight, grad = (torch.from_numpy(np.zeros(size, dtype=np.float16)) for _ in range(2))
        grad[-60:] = 1.0
    first_chunk = -(2**31 // chunk)
    tensors = torch.tensor([[size, first_chunk, 1]], dtype=torch.int64)
    words = [weight.data_ptr(), grad.data_ptr(), 0, *np.array([*COMMON, 1.0]).view(np.int64).tolist()]
    launch = LaunchSpec((Apply(add_scaled),), Scale, "decoupled")
    group = LaunchGroup([0], weight.device, (PLAIN,), (torch.float16, torch.float16), [weight.shape])
    constants = driver.phase_constants(Apply(add_scaled), launch, group, 0)
    multi_tensor_apply[(1,)](
        torch.tensor(words), tensors, torch.zeros(1, dtype=torch.int32), None, None, None, None, None, 1, None, None,
        **constants, CHUNK_SIZE=chunk, BLOCK_SIZE=16, TAIL_SIZE=16, UNROLL=1, enable_fp_fusion=False,
    )  # fmt: skip
    assert weight[-40:].tolist() == [1.0] * 40
    assert weight[-60:-40].tolist() == [0.0] * 20


def test_rows_are_found_in_place(small_chunks: None) -> None:
    """A gradient of some rows updates these rows of weight and state, whatever their number and width."""
    for width in (1, 5, 70):
        weight, master = torch.zeros(9, width, dtype=torch.bfloat16), torch.zeros(9, width)
        rows = torch.tensor([1, 4, 8])
        grad = torch.arange(3.0 * width).reshape(3, width) + 1
        add([Task((weight, master), MASTER_FP32, grad, (), rows)], [0.5])
        expected = torch.zeros(9, width).index_copy(0, rows, grad / 2)
        torch.testing.assert_close(master, expected, rtol=0, atol=0)
        torch.testing.assert_close(weight, expected.bfloat16(), rtol=0, atol=0)


def test_partials_are_summed_per_tensor() -> None:
    chunks = torch.tensor([3, 1, 2500])
    first = torch.cumsum(chunks, 0) - chunks
    partials = torch.arange(2 * int(chunks.sum()), dtype=torch.float64).reshape(-1, 2)
    sums = torch.empty(3, 2, dtype=torch.float64)
    table = torch.stack([chunks, first, chunks], dim=1)
    sum_partials[(3,)](partials, table, sums, len(partials), 3, N_SUMS=2, BLOCK_SIZE=1024, enable_fp_fusion=False)
    expected = torch.stack([part.sum(0) for part in partials.split(chunks.tolist())])
    torch.testing.assert_close(sums, expected, rtol=0, atol=0)


def test_source_of_nested_functions_is_in_the_cache_key() -> None:
    """Triton's disk cache sees a function inside a tuple, and the fields of SCALARS, only through SOURCE_HASH."""

    class Renamed(NamedTuple):
        scale: float

    def key(update: Any, scalars: type) -> str:
        launch = LaunchSpec((Apply(update),), scalars, "decoupled")
        group = LaunchGroup([0], torch.device("cpu"), (PLAIN,), (torch.float32,) * 2, [torch.Size([4])])
        return str(driver.phase_constants(Apply(update), launch, group, 0)["SOURCE_HASH"])

    if hasattr(add_scaled, "cache_key"):
        assert key(add_scaled, Scale) != key(square_update, Scale)
    assert key(add_scaled, Scale) != key(add_scaled, Renamed)
    assert key(add_scaled, Scale) == key(add_scaled, Scale)


@pytest.mark.parametrize("block", [1, 4, 1024])
def test_long_tensors_are_summed_in_two_stages(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers, whose sums are exact in any order; tensors of one block of chunks, of more, and of none."""
    monkeypatch.setattr(driver, "SUM_BLOCK", block)
    lengths = (64, 64 * 4, 64 * 4 + 1, 0, 700)
    tensors = [torch.randint(-3, 4, (n,)).float() for n in lengths]
    seen: list[int] = []
    original = driver.BoundPhase._blocks_of

    def blocks_of(self: driver.BoundPhase, group: LaunchGroup, chunk_size: int) -> Any:
        tables = original(self, group, chunk_size)
        seen.append(0 if tables is None else len(tables[1]))
        return tables

    monkeypatch.setattr(driver.BoundPhase, "_blocks_of", blocks_of)
    planner = Planner()
    planner.config = Config(block_size=64, chunk_size=64, tail_size=64, num_warps=1)
    expected = [float((tensor.double() ** 2).sum()) for tensor in tensors]
    for _ in range(2):
        assert planner.squares("sums", tensors).tolist() == expected
    n_chunks = [-(-n // 64) for n in lengths]
    assert seen == [sum(-(-n // block) for n in n_chunks) if max(n_chunks) > block else 0]
