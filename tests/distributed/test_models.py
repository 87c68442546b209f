"""Real models under DDP, FSDP2, tensor parallelism and both, HSDP and ZeRO: the step is that of one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tritopt
import tritopt.optim
from tests.support.layouts import CLOSE, EXACT, assert_same, mesh_of
from tests.support.world import REASON, World
from tritopt.optim.distributed import whole

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.skipif(bool(REASON), reason=str(REASON))]

KINDS = {
    2: ("ddp", "fsdp", "tensor parallel"),
    4: ("hybrid", "fsdp of tensor parallel"),
}


def mlp(dtype: torch.dtype) -> nn.Sequential:
    """Odd sizes, so that shards are uneven and some empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5), Scale()).to(dtype)


class Scale(nn.Module):
    """A parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def spread_over_the_world(model: nn.Sequential, kind: str) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    size = dist.get_world_size()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    plan: Any = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    mesh = mesh_of(2, 2) if kind in ("hybrid", "fsdp of tensor parallel") else mesh_of(size)
    if kind == "tensor parallel":
        return parallelize_module(model, mesh, plan)
    if kind == "fsdp of tensor parallel":
        parallelize_module(model, mesh["y"], plan)
        mesh = mesh["x"]
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def full(tensor: Any) -> torch.Tensor:
    assembled = whole(tensor)
    return assembled.detach().clone()


def loss_of(model: nn.Module, step: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(4, 3, generator=generator).to(dtype)
    y = torch.randn(4, 5, generator=generator)
    loss: torch.Tensor = (model(x).float() - y).square().mean()
    return loss


@pytest.mark.parametrize(("size", "kind"), [(size, kind) for size, kinds in KINDS.items() for kind in kinds])
def test_steps_of_a_model(size: int, kind: str, worlds: dict[int, World]) -> None:
    world = worlds[size]
    world.run(check_model, kind, "AdamW", torch.bfloat16, {"weight_decay": 0.1}, EXACT)
    world.run(check_model, kind, "LAMB", torch.float32, {"max_grad_norm": 0.1}, CLOSE)
    world.run(check_model, kind, "Adafactor", torch.float32, {"max_grad_norm": 0.1, "fused": False}, CLOSE)


def check_model(kind: str, name: str, dtype: torch.dtype, options: dict[str, Any], tolerance: float) -> None:
    """Against an optimizer of plain copies that gets the gradients which the processes have between them."""
    optimizer = getattr(tritopt.optim, name)
    whole = mlp(dtype)
    plain = [nn.Parameter(param.detach().clone()) for param in whole.parameters()]
    model = spread_over_the_world(whole, kind)
    params = list(model.parameters())
    many, one = optimizer(params, lr=0.01, **options), optimizer(plain, lr=0.01, **options)
    rank = 0 if kind == "tensor parallel" else dist.get_rank() // (2 if kind == "fsdp of tensor parallel" else 1)
    for step in range(2):
        many.zero_grad()
        loss_of(model, step, rank, dtype).backward()
        for ours, theirs in zip(plain, params, strict=True):
            ours.grad = full(theirs.grad)
        one.step()
        many.step()
    for i, (ours, theirs) in enumerate(zip(plain, params, strict=True)):
        assert_same(full(theirs), ours, tolerance, f"parameter {i} of {name} under {kind}")
        for key, value in one.state[ours].items():
            assert_same(
                full(many.state[theirs][key]), value, tolerance, f"{key} of parameter {i} of {name} under {kind}"
            )
    if "max_grad_norm" in options:
        assert float(one.grad_norm) > options["max_grad_norm"]
        assert_same(many.grad_norm, one.grad_norm, CLOSE, "grad_norm")


def test_zero_redundancy_optimizer(worlds: dict[int, World]) -> None:
    worlds[2].run(check_zero)


def check_zero() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    models = [mlp(torch.bfloat16) for _ in range(3)]
    one = tritopt.optim.AdamW(models[0].parameters(), **options)
    zero, resumed = (
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=tritopt.optim.AdamW, **options)
        for model in models[1:]
    )

    def step(model: nn.Module, opt: Any, i: int) -> None:
        opt.zero_grad()
        loss_of(model, i, 0, torch.bfloat16).backward()
        opt.step()

    for i in range(2):
        step(models[0], one, i)
        step(models[1], zero, i)
    zero.param_groups[0]["lr"] = one.param_groups[0]["lr"] = 0.02
    zero.consolidate_state_dict(to=0)
    held = [zero.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(held)
    saved: Any = held[0]
    assert saved["param_groups"][0]["lr"] == 0.02
    for key, state in one.state_dict()["state"].items():
        assert state["master_remainder"].dtype == torch.float16  # of the same bits
        for name, value in state.items():
            theirs = saved["state"][key][name]
            if name == "master_remainder":
                theirs, value = theirs.view(torch.int16), value.view(torch.int16)
            assert_same(theirs, value, EXACT, f"{name} of parameter {key}")
    models[2].load_state_dict(models[1].state_dict())
    resumed.load_state_dict(copy.deepcopy(saved))
    for i in range(2, 4):
        for model, opt in zip(models, (one, zero, resumed), strict=True):
            step(model, opt, i)
    for model in models[1:]:
        for ours, theirs in zip(models[0].parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_zero_clips_by_the_norm_of_a_part(worlds: dict[int, World]) -> None:
    """The documentation warns of this, and here is how it shows."""
    worlds[2].run(check_zero_clips)


def check_zero_clips() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = mlp(torch.float32)
    zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=tritopt.optim.AdamW, max_grad_norm=1.0)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    zero.step()
    whole = tritopt.clip_grad_norm_(model.parameters(), 1.0)
    assert float(zero.optim.grad_norm) < float(whole)
