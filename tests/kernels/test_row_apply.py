"""The row kernel by itself, with functions of its own."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tritopt.engine.group import LaunchGroup
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.plan import Planner, Task
from tritopt.engine.row_phase import ApplyRows
from tritopt.engine.tuning.config import Config
from tritopt.kernels.formats.format import PLAIN
from tritopt.kernels.formats.weights import MASTER_FP32
from tritopt.kernels.language import tl, triton  # noqa: F401

COMMON = (1.0, math.inf, 0.0)  # rescale, clip bound, wd


class Scale(NamedTuple):
    factor: float


@triton.jit
def gradient(g, s):  # type: ignore[no-untyped-def]
    return g


@triton.jit
def add_mean(state, mean, s):  # type: ignore[no-untyped-def]
    return (state[0] + mean,)


@triton.jit
def add_both(w, g, state, s):  # type: ignore[no-untyped-def]
    return w + s.factor * g + state[0]


PHASE = ApplyRows(gradient, add_mean, add_both)


CONFIG = Config(block_size=16, chunk_size=64, num_warps=1)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "config", CONFIG)


def plain_task(weight: torch.Tensor, grad: torch.Tensor) -> Task:
    return Task((weight,), PLAIN, grad, (torch.zeros(len(weight), 1),))


def run(tasks: list[Task], factors: list[float], common: tuple[float, ...] = COMMON, **options: Any) -> None:
    launch = LaunchSpec((PHASE,), Scale, "decoupled", **options)
    Planner().apply("key", tasks, [(*common, factor) for factor in factors], launch)


def whole(rows: int, columns: int) -> torch.Tensor:
    """Whole numbers, whose sums are exact."""
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns) % 31 - 7


# Past a block, a block and its neighbours, whole vectors and not, one column, one row.
@pytest.mark.parametrize(
    ("rows", "columns"), [(3, 1), (70, 1), (1, 1), (1, 200), (4, 16), (4, 15), (4, 17), (5, 64), (5, 36), (2, 333)]
)
def test_every_element_is_updated_once_and_every_row_has_its_mean(rows: int, columns: int) -> None:
    grad = whole(rows, columns)
    task = plain_task(torch.zeros(rows, columns), grad)
    for step in (1, 2):
        run([task], [2.0])
        mean = grad.double().mean(1, keepdim=True).float()
        torch.testing.assert_close(task.state[0], step * mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(task.weight[0], 4 * grad + 3 * mean, rtol=1e-6, atol=1e-5)


def test_matrices_of_several_shapes_share_a_launch_and_have_scalars_of_their_own() -> None:
    shapes = [(5, 3), (1, 40), (0, 4), (9, 1), (2, 16)]
    tasks = [plain_task(torch.zeros(shape), torch.ones(shape)) for shape in shapes]
    run(tasks, [1.0, 2.0, 3.0, 4.0, 5.0])
    for factor, task in enumerate(tasks, 1):
        assert torch.all(task.weight[0] == factor + 1)
        assert torch.all(task.state[0] == 1)


@pytest.mark.parametrize("columns", [16, 40])
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_unaligned_views_touch_nothing_around_them(offset: int, columns: int) -> None:
    """Aligned and not; NaN around what is read, a sentinel around what is written."""
    size = 5 * columns
    buffer, grad = torch.full((size + 64,), 7.0), torch.full((size + 64,), math.nan)
    inside = slice(offset, offset + size)
    grad[inside] = 1.0
    task = plain_task(buffer[inside].view(5, columns), grad[inside].view(5, columns))
    run([task], [1.0])
    assert torch.all(buffer[inside] == 9.0)
    assert torch.all(task.state[0] == 1.0)
    assert torch.all(buffer[:offset] == 7.0)
    assert torch.all(buffer[offset + size :] == 7.0)


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({"noop": 0.0}, 2.0),
        ({"noop": 1.0}, 0.0),
        ({"rescale": 0.5}, 1.0),
        ({"rescale": math.nan}, 0.0),
        ({"rescale": -math.inf}, 0.0),
        ({"rescale": 0.0, "skip_zero_rescale": True}, 0.0),
    ],
)
@pytest.mark.parametrize("columns", [5, 32])
def test_device_flag_and_rescale(options: dict[str, Any], moved: float, columns: int) -> None:
    task = plain_task(torch.zeros(3, columns), torch.ones(3, columns))
    given: dict[str, Any] = {name: torch.tensor(v) if isinstance(v, float) else v for name, v in options.items()}
    run([task], [1.0], **given)
    assert torch.all(task.weight[0] == moved)
    assert torch.all(task.state[0] == moved / 2)


def test_the_mean_is_that_of_the_clipped_gradient() -> None:
    task = plain_task(torch.zeros(1, 4), torch.tensor([[1.0, -8.0, 2.0, 8.0]]))
    run([task], [1.0], common=(2.0, 3.0, 0.0))
    assert task.state[0].item() == (2 - 3 + 3 + 3) / 4
    assert task.weight[0].tolist() == [[3.25, -1.75, 4.25, 4.25]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [7, 48])
def test_master_and_weight_are_written_together(dtype: torch.dtype, columns: int) -> None:
    master = torch.full((4, columns), 1 / 3)
    weight = master.to(dtype)
    grad = whole(4, columns).to(torch.float16)
    state = torch.zeros(4, 1)
    run([Task((weight, master), MASTER_FP32, grad, (state,))], [0.1])
    expected = 1 / 3 + 0.1 * grad.double() + grad.double().mean(1, keepdim=True)
    torch.testing.assert_close(master, expected.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight, master.to(dtype), rtol=0, atol=0)


def test_repeats_to_the_bit() -> None:
    grad = torch.randn(6, 1000)
    results = []
    for _ in range(3):
        task = plain_task(torch.ones(6, 1000), grad)
        run([task], [0.3])
        results.append(torch.cat([task.weight[0], task.state[0]], dim=1))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_offsets_beyond_2_to_the_31() -> None:
    """The row behind 2^31 elements, in memory that is reserved but otherwise untouched."""
    columns, last = 40, 2**31 // 40 + 1
    shape = (last + 1, columns)
    if torch.cuda.is_available():
        weight, grad = torch.zeros(shape, dtype=torch.float16), torch.zeros(shape, dtype=torch.float16)
    else:
        weight, grad = (torch.from_numpy(np.zeros(shape, dtype=np.float16)) for _ in range(2))
    grad[-1] = 3.0
    state = torch.zeros(last + 1, 1)
    group = LaunchGroup([0], weight.device, (PLAIN,), (torch.float16, torch.float16, torch.float32), [weight.shape])
    words = [weight.data_ptr(), grad.data_ptr(), state.data_ptr(), 0]
    group.device_table = torch.tensor([*words, *np.array([*COMMON, 1.0]).view(np.int64).tolist()])
    # One program alone, whose row is `last`.
    group.tables("rows", lambda shapes: (np.array([[columns, -last]]), np.zeros(1, dtype=np.int32)))
    PHASE.launch(group, LaunchSpec((PHASE,), Scale, "decoupled", config=CONFIG), None)
    assert weight[-1].tolist() == [6.0] * columns
    assert state[-1].item() == 3.0
    assert not weight[-3:-1].any()


def test_transposed_matrices_have_rows_too() -> None:
    grad = whole(20, 6)
    weight = torch.zeros(6, 20).t()
    task = plain_task(weight, grad)
    run([task], [1.0])
    torch.testing.assert_close(weight, grad + grad.mean(1, keepdim=True))
