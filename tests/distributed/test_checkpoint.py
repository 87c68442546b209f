"""torch.distributed.checkpoint: saved by 2 processes, loaded by 4 and by 1, and the run goes on as if nothing was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tritopt.optim
from tests.distributed.layouts import CLOSE, EXACT, assert_same, mesh_of
from tests.distributed.test_models import full, loss_of, mlp
from tests.distributed.world import REASON, World
from tritopt.optim import distributed

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.skipif(bool(REASON), reason=str(REASON))]

CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "AdamW": ("AdamW", {}, EXACT),
    "AdamW, clipped": ("AdamW", {"fused": False, "max_grad_norm": 0.1}, CLOSE),
    "LAMB": ("LAMB", {}, CLOSE),
    "Adafactor": ("Adafactor", {}, CLOSE),
}
DTYPE = torch.bfloat16


def build(case: str, is_sharded: bool | None = None) -> tuple[nn.Module, Any]:
    from torch.distributed.fsdp import fully_shard

    name, options, _ = CASES[case]
    model = mlp(DTYPE)
    if dist.get_world_size() > 1 if is_sharded is None else is_sharded:
        fully_shard(model, mesh=mesh_of(dist.get_world_size()))
    return model, getattr(tritopt.optim, name)(model.parameters(), lr=0.01, **options)


def train(model: nn.Module, opt: Any, steps: range) -> None:
    """On the same data in all processes: averages over 1, 2 and 4 equal gradients are exact."""
    for step in steps:
        opt.zero_grad()
        loss_of(model, step, 0, DTYPE).backward()
        opt.step()


def snapshot(model: nn.Module, opt: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, param in model.named_parameters():
        found[name] = full(param)
        found |= {f"{key} of {name}": full(value) for key, value in sorted(opt.state[param].items())}
    return found


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert list(found) == list(expected)
    assert any(key.startswith("master_remainder of ") for key in found)
    for key, value in expected.items():
        # A weight is its master, rounded.
        assert_same(found[key], value, 2.0**-8 if tolerance and value.dtype == DTYPE else tolerance, key)


@pytest.mark.parametrize("case", CASES)
def test_resharding(case: str, worlds: dict[int, World], tmp_path: Path) -> None:
    worlds[2].run(save_and_go_on, case, tmp_path)
    for size in (1, 2, 4):
        worlds[size].run(load_and_go_on, case, tmp_path)


def save_and_go_on(case: str, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    model, opt = build(case)
    train(model, opt, range(2))
    saved = snapshot(model, opt)
    state: dict[str, Any] = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, opt)}
    save(state, checkpoint_id=folder / "checkpoint")
    opt.param_groups[0]["lr"] = 0.005
    train(model, opt, range(2, 4))
    later = snapshot(model, opt)
    if dist.get_rank() == 0:
        torch.save((saved, later), folder / "expected.pt")
    dist.barrier()


def load_and_go_on(case: str, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load

    saved, later = torch.load(folder / "expected.pt")
    model, opt = build(case)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)  # nothing of it may be left
    state: dict[str, Any] = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, opt)}
    load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, opt, state["optim"])
    compare(snapshot(model, opt), saved, EXACT)
    assert opt.param_groups[0]["lr"] == 0.01
    opt.param_groups[0]["lr"] = 0.005
    train(model, opt, range(2, 4))
    compare(snapshot(model, opt), later, CASES[case][2])


@pytest.mark.parametrize("case", ["AdamW", "Adafactor"])
def test_full_state_dict_on_the_cpu(case: str, worlds: dict[int, World]) -> None:
    worlds[2].run(check_full_state_dict, case)


def check_full_state_dict(case: str) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    model, opt = build(case)
    train(model, opt, range(2))
    weights, states = get_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    expected = snapshot(model, opt)
    if dist.get_rank() == 0:
        whole: Any = states["state"]
        for name, state in whole.items():
            for key, value in state.items():
                assert type(value) is torch.Tensor
                assert_same(value, expected[f"{key} of {name}"], EXACT, f"{key} of {name}")
    # From rank 0, which alone has it.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    resumed, resumed_opt = build(case)
    # One after the other: torch's set_state_dict takes ranks whose model_state_dict is empty to load no model.
    set_model_state_dict(resumed, weights, options=options)
    set_optimizer_state_dict(resumed, resumed_opt, states, options=options)
    compare(snapshot(resumed, resumed_opt), expected, EXACT)
    train(model, opt, range(2, 4))
    train(resumed, resumed_opt, range(2, 4))
    compare(snapshot(resumed, resumed_opt), snapshot(model, opt), EXACT)


@pytest.mark.parametrize("case", ["AdamW", "Adafactor"])
def test_state_dict_of_one_process_loads_into_shards_and_back(case: str, worlds: dict[int, World]) -> None:
    worlds[4].run(check_plain_state_dict, case)


def check_plain_state_dict(case: str) -> None:
    model, opt = build(case, is_sharded=False)
    train(model, opt, range(2))
    sharded, sharded_opt = build(case, is_sharded=True)
    state = model.state_dict()
    with torch.no_grad():
        for name, param in sharded.named_parameters():
            param.copy_(distributed.laid_out(param, state[name]))
    sharded_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    expected = snapshot(model, opt)
    compare(snapshot(sharded, sharded_opt), expected, EXACT)
    back, back_opt = build(case, is_sharded=False)
    back.load_state_dict(state)
    back_opt.load_state_dict(copy.deepcopy(sharded_opt.state_dict()))
    compare(snapshot(back, back_opt), expected, EXACT)
    for one, its in ((model, opt), (sharded, sharded_opt), (back, back_opt)):
        train(one, its, range(2, 4))
    compare(snapshot(sharded, sharded_opt), snapshot(model, opt), CASES[case][2])
    compare(snapshot(back, back_opt), snapshot(model, opt), EXACT)
