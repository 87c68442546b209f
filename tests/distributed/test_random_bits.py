"""Formats that draw random bits: a shard draws those of its elements, so that no sharding changes a bit of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tritopt.optim
from tests.distributed.test_models import full
from tests.support.layouts import EXACT, Layout, Pair, assert_same, layouts, mesh_of
from tests.support.world import REASON, World
from tritopt.kernels.formats.weights import SPLIT8

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.skipif(bool(REASON), reason=str(REASON))]

BF16 = torch.bfloat16
OPTIONS: dict[str, dict[str, Any]] = {"AdamW": {"weight_decay": 0.1}, "SGD": {"momentum": 0.9, "nesterov": True}}
SPLIT = (
    ((16, 8), "rows"), ((9, 2, 4), "rows twice"), ((31,), "hybrid"), ((3, 16), "replicated"), ((), "rows"),
    ((5, 3), "rows"), ((7, 3), "rows twice"), ((13,), "hybrid"), ((5, 3, 5), "hybrid"), ((300, 9), "rows"),
    ((4, 32), "columns"), ((5, 7), "columns"), ((3, 6, 4), "columns"), ((80, 40), "columns"),
    ((6, 6), "blocks"), ((5, 5, 3), "blocks"), ((16, 32), "blocks"),
)  # fmt: skip
"""Uneven shards, empty ones, and such that do not begin at a multiple of eight elements."""
pairs = pytest.mark.parametrize(("name", "master"), [("AdamW", "split8"), ("SGD", "split8"), ("SGD", "stochastic")])
masters = pytest.mark.parametrize("master", ["split8", "stochastic"])


@pairs
@pytest.mark.parametrize(("size", "fused"), [(2, None), (4, None), (4, False)])
def test_shards_equal_one_process(
    name: str, master: str, size: int, fused: bool | None, worlds: dict[int, World]
) -> None:
    worlds[size].run(check_shards, name, master, fused)


def check_shards(name: str, master: str, fused: bool | None) -> None:
    """Every rank has the one process beside it, so that replicas are compared as well."""
    placements = layouts()
    shapes, where = zip(*[(shape, placements.get(layout, placements["rows"])) for shape, layout in SPLIT], strict=True)
    pair = Pair(getattr(tritopt.optim, name), where, shapes, BF16, lr=0.01, master=master, fused=fused, **OPTIONS[name])
    for _ in range(2):
        pair.set_grads()
        pair.one.step()
        pair.many.step()
    for (shape, layout), plain, shared in zip(SPLIT, pair.plain, pair.shared, strict=True):
        for key, value in {"weight": plain, **pair.one.state[plain]}.items():
            ours = shared if key == "weight" else pair.many.state[shared][key]
            assert_same(full(ours), value, EXACT, f"{key} of {shape}, {layout}")


STATES = (
    ((6, 128), "rows"), ((5, 64), "rows twice"), ((3, 2, 64), "hybrid"), ((2**13,), "rows"), ((4, 256), "columns"),
    ((6, 128), "blocks"), ((3, 64), "replicated"), ((1, 64), "rows"),
)  # fmt: skip
"""Split between the runs of elements that share a scale."""


@pytest.mark.parametrize(("state_dtype", "size"), [("bf16", 2), ("fp16", 2), ("fp8", 2), ("int8", 4)])
def test_states_of_shards_equal_one_process(state_dtype: str, size: int, worlds: dict[int, World]) -> None:
    worlds[size].run(check_states, state_dtype)


def check_states(state_dtype: str) -> None:
    placements = layouts()
    shapes, where = zip(*[(shape, placements.get(layout, placements["rows"])) for shape, layout in STATES], strict=True)
    options = {"lr": 0.01, "master": "split8", "state_dtype": state_dtype, "track": True}
    pair = Pair(tritopt.optim.AdamW, where, shapes, BF16, **options)
    for _ in range(2):
        pair.set_grads()
        pair.one.step()
        pair.many.step()
    for (shape, layout), plain, shared in zip(STATES, pair.plain, pair.shared, strict=True):
        assert list(pair.one.state[plain]) == list(pair.many.state[shared])
        for key, value in {"weight": plain, **pair.one.state[plain]}.items():
            ours = shared if key == "weight" else pair.many.state[shared][key]
            assert_same(full(ours).float(), value.float(), EXACT, f"{key} of {shape}, {layout}")
    for a, b in zip(pair.one.telemetry(), pair.many.telemetry(), strict=True):
        assert (a.elements, a.nonfinite, a.unchanged) == (b.elements, b.nonfinite, b.unchanged)
        assert abs(a.update_norm / b.update_norm - 1) < 1e-6


@masters
def test_columns_and_odd_places_are_the_same_in_replicas(master: str, worlds: dict[int, World]) -> None:
    worlds[4].run(check_replicas, master)


def check_replicas(master: str) -> None:
    """Ranks that hold the same elements of a sharded tensor round them alike, kernel and reference too."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = mesh_of(2, 2)
    shapes = [(5, 3), (4, 5), (7,)]
    for dim in (0, 1):
        where: list[Layout] = [(mesh, [Replicate(), Shard(dim if len(shape) > dim else 0)]) for shape in shapes]
        pairs = [
            Pair(tritopt.optim.AdamW, where, shapes, BF16, lr=0.01, master=master, fused=fused)
            for fused in (None, False)
        ]
        for pair in pairs:
            pair.step()
        kernel, reference = ([full(value) for value in stored(pair)] for pair in pairs)
        for actual, expected in zip(kernel, reference, strict=True):
            assert torch.equal(actual, expected)
            others = [torch.empty_like(actual) for _ in range(mesh.size())]
            dist.all_gather(others, actual.contiguous())
            assert all(torch.equal(actual, other) for other in others)


def stored(pair: Pair) -> list[torch.Tensor]:
    """The weights and their companions."""
    states = [pair.many.state[param].get(SPLIT8.companion) for param in pair.shared]
    return [*pair.shared, *[value for value in states if value is not None]]


@pairs
def test_saved_by_two_and_resumed(name: str, master: str, worlds: dict[int, World], tmp_path: Path) -> None:
    """Kernel and reference go on from each other's checkpoints."""
    worlds[2].run(save_and_go_on, name, master, tmp_path)
    for size, fused in ((1, False), (2, False), (4, None)):
        worlds[size].run(load_and_go_on, name, master, fused, tmp_path)


def build(name: str, master: str, fused: bool | None = None) -> tuple[nn.Module, Any]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 9, bias=False)).to(BF16)
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=mesh_of(dist.get_world_size()))
    options = {**OPTIONS[name], "master": master, "fused": fused, "rounding_seed": 3}
    return model, getattr(tritopt.optim, name)(model.parameters(), lr=0.01, **options)


def train(model: nn.Module, opt: Any, steps: range) -> None:
    """Train on the same data in all processes: averages over 1, 2 and 4 equal gradients are exact."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        opt.zero_grad()
        x, y = torch.randn(4, 8, generator=generator), torch.randn(4, 9, generator=generator)
        (model(x.to(BF16)).float() - y).square().mean().backward()
        opt.step()


def snapshot(model: nn.Module, opt: Any) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, param in model.named_parameters():
        tensors[name] = full(param)
        tensors |= {f"{key} of {name}": full(value) for key, value in sorted(opt.state[param].items())}
    return tensors


def save_and_go_on(name: str, master: str, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    model, opt = build(name, master)
    train(model, opt, range(2))
    save(dict(zip(("model", "optim"), get_state_dict(model, opt), strict=True)), checkpoint_id=folder / "checkpoint")
    train(model, opt, range(2, 4))
    later = snapshot(model, opt)
    if dist.get_rank() == 0:
        torch.save(later, folder / "later.pt")
    dist.barrier()


def load_and_go_on(name: str, master: str, fused: bool | None, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    model, opt = build(name, master, fused)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)  # nothing of it may be left
    state: dict[str, Any] = dict(zip(("model", "optim"), get_state_dict(model, opt), strict=True))
    load(state, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optim"])
    train(model, opt, range(2, 4))
    actual, expected = snapshot(model, opt), torch.load(folder / "later.pt")
    assert list(actual) == list(expected)
    assert (master == "split8") == any(key.startswith("master_remainder8 of ") for key in actual)
    for key, value in expected.items():
        assert_same(actual[key], value, EXACT, key)
