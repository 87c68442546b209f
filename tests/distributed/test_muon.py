"""Muon's matrices over processes: gathered, orthogonalised once, and the same bits on any number of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.world import REASON, World
from tritopt import optim
from tritopt.engine import gram, matrices, newton_schulz
from tritopt.engine.plan import Planner
from tritopt.engine.tuning.config import Config, Tiles
from tritopt.optim import exchange
from tritopt.optim.distributed import whole
from tritopt.tools.replaced import replaced

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.skipif(bool(REASON), reason=str(REASON))]

# Uneven over 2 and 4 processes; one that leaves some of them without a row; tall, wide, and of one row.
SHAPES = ((6, 5), (6, 5), (5, 7), (3, 8), (16, 16), (1, 6), (2, 3), (16, 16))
paths = pytest.mark.parametrize("fused", [None, False])


def values(seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def train(
    placements: list[Any],
    mesh: Any,
    fused: bool | None,
    shapes: Any = SHAPES,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[list[Any], Any]:
    """Parameters after three steps, and their optimizer."""
    from torch.distributed.tensor import distribute_tensor

    Planner.config = Config(block_size=64, chunk_size=128, num_warps=1)
    params = [
        torch.nn.Parameter(distribute_tensor(value.to(dtype), mesh, placements[i % len(placements)]))
        for i, value in enumerate(values(0, shapes))
    ]
    opt = optim.Muon(params, lr=0.1, fused=fused, **options)
    for step in range(1, 4):
        for i, (p, grad) in enumerate(zip(params, values(step, shapes), strict=True)):
            p.grad = distribute_tensor(grad.to(dtype), mesh, placements[i % len(placements)])
        opt.step()
    return params, opt


def check(fused: bool | None, layout: str, beta2: float | None) -> list[torch.Tensor]:
    """Check what all processes have in the end."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    placements: dict[str, list[Any]] = {
        "rows": [[Shard(0)]],
        "columns": [[Shard(1)]],
        "all": [[Shard(0)], [Shard(1)], [Replicate()]],
    }
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2))
        placements = {"hsdp": [[Replicate(), Shard(0)]]}
    elif layout == "2d":
        mesh = init_device_mesh("cpu", (2, size // 2))
        placements = {"2d": [[Shard(0), Shard(1)], [Shard(0), Shard(0)]]}
    done: Counter[tuple[int, ...]] = Counter()
    real = newton_schulz.orthogonalize

    def counting(stack: torch.Tensor, *rest: Any) -> None:
        done[tuple(stack.shape[-2:])] += stack.shape[:-2].numel()
        real(stack, *rest)

    with replaced(matrices, "orthogonalize", counting):
        params, opt = train(placements[layout], mesh, fused, beta2=beta2)
    counts: list[Any] = [None] * size
    dist.all_gather_object(counts, dict(done))
    total: Counter[tuple[int, ...]] = Counter()
    for one in counts:
        total.update(one)
    # Each matrix once in each of three steps, whole, by one process.
    assert total == Counter({shape: 3 * SHAPES.count(shape) for shape in SHAPES}), total
    names = ["momentum_buffer"] if beta2 is None else ["momentum_buffer", "second_momentum_buffer"]
    for p in params if beta2 is not None else ():
        check_replicas(opt.state[p]["second_momentum_buffer"])
    return [*(whole(p.detach()) for p in params), *(whole(opt.state[p][name]) for name in names for p in params)]


def check_replicas(moments: Any) -> None:
    """Processes that have the same rows have the same numbers for them, also one that has no column of the matrix."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, moments.to_local())
    if all(placement.is_replicate() for placement in moments.placements):
        assert all(torch.equal(part, parts[0]) for part in parts)


@paths
@pytest.mark.parametrize("beta2", [None, 0.9], ids=["muon", "normuon"])
@pytest.mark.parametrize("layout", ["rows", "columns", "all"])
def test_the_same_bits_on_1_2_and_4_processes(
    layout: str, beta2: float | None, fused: bool | None, worlds: dict[int, World]
) -> None:
    results = [worlds[size].run(check, fused, layout, beta2) for size in (1, 2, 4)]
    first = results[0][0]
    for of_world in results:
        for of_rank in of_world:
            for a, b in zip(of_rank, first, strict=True):
                assert torch.equal(a, b)


@paths
@pytest.mark.parametrize("beta2", [None, 0.9], ids=["muon", "normuon"])
@pytest.mark.parametrize("layout", ["hsdp", "2d"])
def test_meshes_of_two_dimensions_too(
    layout: str, beta2: float | None, fused: bool | None, worlds: dict[int, World]
) -> None:
    """Replicas compute once."""
    (expected, *_) = worlds[1].run(check, fused, "rows", beta2)
    for of_rank in worlds[4].run(check, fused, layout, beta2):
        for a, b in zip(of_rank, expected, strict=True):
            assert torch.equal(a, b)


def test_states_stay_sharded(worlds: dict[int, World]) -> None:
    worlds[2].run(check_states)


def check_states() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    params, opt = train([[Shard(0)]], init_device_mesh("cpu", (2,)), None, beta2=0.9)
    for p in params:
        moments = opt.state[p]["second_momentum_buffer"]
        assert moments.placements == p.placements
        assert moments.to_local().shape == (p.to_local().shape[0], 1)
        assert opt.state[p]["momentum_buffer"].placements == p.placements
        assert opt.state[p]["momentum_buffer"].to_local().shape == p.to_local().shape


@pytest.mark.parametrize("beta2", [None, 0.9], ids=["muon", "normuon"])
def test_experts_and_projections(beta2: float | None, worlds: dict[int, World]) -> None:
    """Stacks that are split by experts, and parts that shards cut across."""
    cases: list[tuple[dict[str, Any], tuple[tuple[int, ...], ...]]] = [
        ({"flatten": False}, ((4, 3, 5), (3, 4, 4))),
        ({"split": 3}, ((9, 4), (12, 6))),
        ({"split": 2, "split_dim": -1}, ((9, 4), (3, 6))),
    ]
    for given, shapes in cases:
        options = {**given, "beta2": beta2}
        results = [worlds[size].run(check_options, options, shapes) for size in (1, 2, 4)]
        for of_world in results:
            for of_rank in of_world:
                assert all(map(torch.equal, of_rank, results[0][0]))


def check_options(options: dict[str, Any], shapes: Any) -> list[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params, _ = train([[Shard(0)]], mesh, None, shapes, **options)
    return [whole(p.detach()) for p in params]


def test_work_is_shared_by_cost() -> None:
    cut = matrices.Cut(None, None, -2)
    shapes = dict(enumerate([(8, 8)] + [(4, 4)] * 4 + [(2, 2)]))
    with replaced(exchange, "UNIT", 16):
        assert exchange._batches_of(shapes, cut, 2) == [[[0]], [[1], [2], [3], [4], [5]]]
    assert exchange._batches_of(shapes, cut, 2) == [[[0]], [[1, 2, 3, 4], [5]]]


@paths
def test_fp64_where_a_process_has_nothing(fused: bool | None, worlds: dict[int, World]) -> None:
    """Two rows on four processes: one without a direction owns a matrix, and receives it in the dtype of the others."""
    results = [worlds[size].run(check_fp64, fused) for size in (1, 4)]
    for of_rank in (of_rank for of_world in results for of_rank in of_world):
        assert all(map(torch.equal, of_rank, results[0][0]))


def check_fp64(fused: bool | None) -> list[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = ((2, 3), (1, 6), (2, 4), (1, 5))
    params, _ = train([[Shard(0)]], mesh, fused, shapes, torch.float64, ns_dtype="fp32", beta2=0.9)
    return [whole(p.detach()) for p in params]


def test_products_of_one_triangle(worlds: dict[int, World]) -> None:
    """The owner of a matrix makes its products by our kernel, if the step is fused, and all have the same bits."""
    for fused, n_products in ((None, 2 * 2 * 2 * 3), (False, 0)):
        results = [worlds[size].run(check_symmetric, fused) for size in (1, 2)]
        for of_world in results:
            assert sum(n for _, n in of_world) == n_products
            for params, _ in of_world:
                assert all(map(torch.equal, params, results[0][0][0]))


def check_symmetric(fused: bool | None) -> tuple[list[torch.Tensor], int]:
    """Parameters of two shapes after three steps with an iteration of two steps, and this process's products."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    n, real = 0, gram.symmetric_product

    def counting(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal n
        n += 1
        return real(*args, **options)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    small = replaced(gram, "choose", lambda *_: Tiles(16, 16, 2, 4, 2))
    with small, replaced(newton_schulz, "symmetric_product", counting):
        params, _ = train([[Shard(0)]], mesh, fused, ((24, 40), (40, 18)), ns_symmetric=True, ns_steps=2)
    return [whole(p.detach()) for p in params], n


def train_a_column() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    try:
        train([[Shard(1)]], mesh, False, ((3, 1),), beta2=0.9)
    except ValueError as error:
        return str(error)
    return ""


def test_a_single_column_that_is_sharded_by_columns(worlds: dict[int, World]) -> None:
    """Second moments of its rows have the weight's shape, and would be taken for sharded: an error in every process."""
    expected = "beta2 and (Shard(dim=1),) of shape (3, 1), one column: replicate it or shard its rows"
    assert worlds[2].run(train_a_column) == [expected] * 2
