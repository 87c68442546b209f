"""Optimizers of DTensors do what they do in one process, and send no more than they must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard

import tritopt.optim
from tests.support.layouts import (
    CLOSE,
    EXACT,
    SHAPES,
    Communication,
    Pair,
    cycle,
    fitting,
    layouts,
    mesh_of,
    spread,
)
from tests.support.training import CLASSES as EVERY_OPTIMIZER
from tests.support.world import REASON, World
from tritopt.engine.driver import Apply
from tritopt.optim import AdamW
from tritopt.optim.distributed import local, whole

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.skipif(bool(REASON), reason=str(REASON))]

PHASES = {cls.__name__: cls.rule().phases for cls in sorted(EVERY_OPTIMIZER, key=lambda cls: cls.__name__)}
CLASSES = list(PHASES)
RANDOM = ("SGLD",)
N_SUMS = {name: sum(phase.sums_elements for phase in phases) for name, phases in PHASES.items()}
"""Number of phases that leave sums."""
BY_SUMS = [name for name in CLASSES if N_SUMS[name] and name != "Muon"]
"""Optimizers that need more of a tensor than the element; test_muon.py has the one of matrices."""
BY_NORMS = [name for name in BY_SUMS if all(isinstance(phase, Apply) for phase in PHASES[name])]
"""Optimizers whose sums are those of whole tensors."""
MATRICES: list[tuple[int, ...]] = [shape for shape in SHAPES if len(shape) == 2]
sizes = pytest.mark.parametrize("size", [2, 4])
paths = pytest.mark.parametrize("fused", [None, False])


def options_of(name: str) -> dict[str, Any]:
    return {"SGD": {"momentum": 0.9}, "NAG": {"momentum": 0.9}, "LARS": {"momentum": 0.9}}.get(name, {})


def shapes_of(name: str) -> list[tuple[int, ...]]:
    return list(MATRICES) if name == "GroupAdaGrad" else list(SHAPES)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in RANDOM and not N_SUMS[name]])
@pytest.mark.parametrize(("size", "fused"), [(2, None), (4, False)])
def test_elementwise_ones_equal_one_process(name: str, fused: bool | None, size: int, worlds: dict[int, World]) -> None:
    worlds[size].run(check_equals_one_process, name, fused, EXACT, 5)


@pytest.mark.parametrize("name", BY_SUMS)
@paths
@sizes
def test_others_equal_one_process(name: str, fused: bool | None, size: int, worlds: dict[int, World]) -> None:
    worlds[size].run(check_equals_one_process, name, fused, CLOSE)


def check_equals_one_process(name: str, fused: bool | None, tolerance: float, n_shapes: int | None = None) -> None:
    shapes = shapes_of(name)[:n_shapes]
    pair = Pair(getattr(tritopt.optim, name), cycle(shapes), shapes, lr=0.01, fused=fused, **options_of(name))
    for _ in range(2):
        pair.step()
    pair.assert_same(tolerance)


@paths
@sizes
def test_clips_by_the_norm_of_the_whole(fused: bool | None, size: int, worlds: dict[int, World]) -> None:
    worlds[size].run(check_clips, "AdamW", fused)
    for name in BY_NORMS[:1]:
        worlds[size].run(check_clips, name, fused)


def check_clips(name: str, fused: bool | None) -> None:
    pair = Pair(
        getattr(tritopt.optim, name), cycle(offset=1), lr=0.01, fused=fused, max_grad_norm=0.5, weight_decay=0.1
    )
    for _ in range(3):
        pair.step()
    pair.assert_same(CLOSE)


@sizes
def test_masters(size: int, worlds: dict[int, World]) -> None:
    worlds[size].run(check_masters)


def check_masters() -> None:
    pair = Pair(AdamW, cycle(), dtype=torch.bfloat16, lr=1e-4)
    for _ in range(3):
        pair.step()
    pair.assert_same(EXACT)
    assert all(master.dtype == torch.float32 for master in pair.many.master_weights())


@sizes
def test_a_write_to_the_parameter_takes_its_master_along(size: int, worlds: dict[int, World]) -> None:
    worlds[size].run(check_master_follows_a_write)


def check_master_follows_a_write() -> None:
    """Write to the parameter, to its data, and to what lies in this process, which no version counter shows."""
    for master in ("auto", "fp32", "kahan"):
        pair = Pair(AdamW, cycle(), dtype=torch.bfloat16, lr=1e-4, master=master)
        pair.step()
        names: tuple[Any, ...] = (lambda p: p, lambda p: p.data, lambda p: getattr(p, "_local_tensor", p.data))
        for written in names:
            with torch.no_grad():
                for param in (*pair.plain, *pair.shared):
                    written(param).mul_(2.0)
            pair.step()
            pair.assert_same(EXACT)


@paths
@sizes
def test_pending_gradients(fused: bool | None, size: int, worlds: dict[int, World]) -> None:
    """Sums that tensor parallelism leaves to be carried out are, once."""
    worlds[size].run(check_pending_gradients, fused)


def check_pending_gradients(fused: bool | None) -> None:
    pair = Pair(AdamW, cycle(), lr=0.01, fused=fused, max_grad_norm=0.5)
    for _ in range(2):
        pair.step(is_pending=True)
    pair.assert_same(CLOSE)
    exact = Pair(AdamW, cycle(), lr=0.01, fused=fused)
    exact.set_grads(is_pending=True)
    once, twice = Communication(), Communication()
    with once:
        exact.many.step()
    pair.set_grads(is_pending=True)
    with twice:
        pair.many.step()
    n_groups = 1 + 2 * (dist.get_world_size() == 4)
    assert len(twice.calls) == len(once.calls) + n_groups, (once.calls, twice.calls)


@paths
@sizes
def test_elementwise_optimizers_send_nothing(fused: bool | None, size: int, worlds: dict[int, World]) -> None:
    worlds[size].run(check_sends_nothing, fused)


def check_sends_nothing(fused: bool | None) -> None:
    pair = Pair(AdamW, cycle(), dtype=torch.bfloat16, lr=0.01, fused=fused)
    for _ in range(2):
        pair.set_grads()
        with Communication() as seen:
            pair.many.step()
        assert seen.calls == []
    with Communication() as seen:
        dist.all_reduce(torch.zeros(1))
        whole(pair.shared[0])
    assert seen.calls[0] == "allreduce_"
    assert len(seen.calls) > 1


def test_sends_one_vector_for_all_tensors(worlds: dict[int, World]) -> None:
    for name in ("AdamW", *BY_NORMS):
        worlds[4].run(check_sends_one_vector, name, 0.5)
    worlds[4].run(check_sends_one_vector, "LAMB", None)


def check_sends_one_vector(name: str, max_grad_norm: float | None) -> None:
    shapes = [(3, 2), (1, 3)]
    for layout, n_dims in {"rows": 1, "replicated": 0, "hybrid": 1, "blocks": 2}.items():
        where = [layouts()[layout]] * len(shapes)
        pair = Pair(getattr(tritopt.optim, name), where, shapes, lr=0.01, max_grad_norm=max_grad_norm)
        expected = ["allreduce_"] * n_dims * (N_SUMS[name] + (max_grad_norm is not None))
        for _ in range(2):
            pair.set_grads()
            with Communication() as seen:
                pair.many.step()
            assert seen.calls == expected, (name, layout, seen.calls)


def test_ranks_whose_shards_are_all_empty_take_part(worlds: dict[int, World]) -> None:
    for name in ("AdamW", *BY_NORMS):
        worlds[4].run(check_empty_ranks, name, None)
        worlds[4].run(check_empty_ranks, name, False)


def check_empty_ranks(name: str, fused: bool | None) -> None:
    shapes = [(1, 3), (1,)]
    where = [layouts()["rows"]] * len(shapes)
    pair = Pair(getattr(tritopt.optim, name), where, shapes, lr=0.01, fused=fused, max_grad_norm=0.5)
    for _ in range(2):
        pair.step()
    pair.assert_same(CLOSE)


def test_whole_rows_stay_where_they_are(worlds: dict[int, World]) -> None:
    worlds[4].run(check_whole_rows)


def check_whole_rows() -> None:
    where = [layouts()[name] for name in ("rows", "hybrid", "rows twice", "replicated")]
    pair = Pair(tritopt.optim.GroupAdaGrad, where, [(5, 3), (2, 7), (1, 3), (4, 5)], lr=0.01, fused=True)
    for _ in range(2):
        pair.set_grads()
        if dist.get_rank() == 0:
            pair.one.step()
        with Communication() as seen:
            pair.many.step()
        assert seen.calls == []
    pair.assert_same(EXACT)


@sizes
def test_an_overflow_in_one_shard_skips_the_step_everywhere(size: int, worlds: dict[int, World]) -> None:
    worlds[size].run(check_overflow_in_one_shard)


def check_overflow_in_one_shard() -> None:
    for scaled in (False, True):
        pair = Pair(AdamW, cycle(), lr=0.01, max_grad_norm=None if scaled else 1.0)
        pair.step()
        before = [whole(param).clone() for param in pair.shared]
        counts = [float(state["step"]) for state in pair.many.state.values()]
        pair.set_grads()
        bad = torch.zeros(5, 3)
        bad[4, 2] = torch.inf
        pair.shared[0].grad = spread(bad, pair.where[0])
        if scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            scaler.scale(torch.ones(()))
            scaler.step(pair.many)
            scaler.update()
            assert scaler.get_scale() == 2.0
        else:
            pair.many.step()
        for param, old in zip(pair.shared, before, strict=True):
            assert torch.equal(whole(param), old)
        if scaled:
            assert counts == [float(state["step"]) for state in pair.many.state.values()]


@sizes
def test_random_numbers_differ_between_shards_only(size: int, worlds: dict[int, World]) -> None:
    worlds[size].run(check_random_numbers)


def check_random_numbers() -> None:
    mesh = mesh_of(dist.get_world_size())
    rank = dist.get_rank()
    for name, same in {"replicated": True, "rows": False}.items():
        param = torch.nn.Parameter(spread(torch.zeros(8, 3), layouts()[name]))
        param.grad = torch.zeros_like(param)
        tritopt.optim.SGLD([param], lr=0.01).step()
        part = local(param.detach()).reshape(-1)[:6].contiguous()
        others = [torch.empty_like(part) for _ in range(mesh.size())]
        dist.all_gather(others, part)
        assert torch.any(part != 0)
        assert all(torch.equal(part, other) == same for i, other in enumerate(others) if i != rank)


def test_a_write_is_seen_by_autograd(worlds: dict[int, World]) -> None:
    worlds[2].run(check_write_is_seen_by_autograd)


def check_write_is_seen_by_autograd() -> None:
    for fused in (None, False):
        pair = Pair(AdamW, cycle(), fused=fused)
        pair.set_grads()
        loss = (pair.shared[0] ** 2).sum()
        pair.many.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_plain_gradient_of_a_dtensor(worlds: dict[int, World]) -> None:
    worlds[2].run(check_plain_gradient)


def check_plain_gradient() -> None:
    pair = Pair(AdamW, cycle())
    pair.set_grads()
    mesh, placements = fitting(layouts()["rows"], (5, 3))
    wrong = torch.nn.Parameter(torch.zeros(5, 3))
    for param, grad in ((pair.shared[0], torch.zeros(5, 3)), (wrong, spread(torch.zeros(5, 3), (mesh, placements)))):
        opt = AdamW([param])
        before = param.detach().clone()
        try:
            param.grad = grad
        except RuntimeError:
            continue  # torch itself refuses to assign it
        with pytest.raises(TypeError, match=r"the gradient is a .*, its parameter a .* of shape \(5, 3\)"):
            opt.step()
        assert not opt.state
        assert torch.equal(param.detach(), before)


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "LAMB", "Muon"])
def test_states_of_shards_without_memory(name: str, worlds: dict[int, World]) -> None:
    worlds[2].run(check_states_without_memory, name)


def check_states_without_memory(name: str) -> None:
    mesh, seen = mesh_of(2), Communication()

    def states() -> list[tuple[str, torch.dtype, torch.Size, torch.Size]]:
        part = DTensor.from_local(torch.zeros(3, 64, dtype=torch.bfloat16), mesh, [Shard(0)], run_check=False)
        param = torch.nn.Parameter(part)
        opt = getattr(tritopt.optim, name)([param], max_grad_norm=1.0)
        param.grad = torch.ones_like(param)
        opt.step()
        return [(key, t.dtype, t.shape, local(t).shape) for key, t in opt.state[param].items()]

    with FakeTensorMode(), seen:
        fake = states()
    assert not seen.calls
    assert fake == states()
