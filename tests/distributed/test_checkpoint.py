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
from tests.distributed.test_models import full, loss_of, mlp
from tests.support.layouts import CLOSE, EXACT, assert_same, mesh_of
from tests.support.training import CLASSES
from tests.support.world import REASON, World
from tritopt.kernels.formats.weights import SPLIT16
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
    """Train on the same data in all processes: averages over 1, 2 and 4 equal gradients are exact."""
    for step in steps:
        opt.zero_grad()
        loss_of(model, step, 0, DTYPE).backward()
        opt.step()


def snapshot(model: nn.Module, opt: Any) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, param in model.named_parameters():
        tensors[name] = full(param)
        tensors |= {f"{key} of {name}": full(value) for key, value in sorted(opt.state[param].items())}
    return tensors


def compare(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert list(actual) == list(expected)
    assert any(key.startswith("master_remainder of ") for key in actual)
    for key, value in expected.items():
        # A weight is its master, rounded, and a remainder the rest of it: together they are compared below.
        if not (tolerance and value.dtype in (DTYPE, torch.int16)):
            assert_same(actual[key], value, tolerance, key)
    names = [key.removeprefix("master_remainder of ") for key in expected if key.startswith("master_remainder of ")]
    for name in names:
        ours, theirs = (
            SPLIT16.decode((tensors[name], tensors[f"master_remainder of {name}"]), torch.float32)
            for tensors in (actual, expected)
        )
        assert_same(ours, theirs, tolerance, f"master of {name}")


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
                if key == "master_remainder":  # shown as fp16, which can be sent
                    value = value.view(torch.int16)
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


def template(model: nn.Module, opt: Any, options: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    return {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, opt, options=options),
    }


def put(model: nn.Module, opt: Any, state: dict[str, Any], options: Any) -> None:
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, opt, state["optim"], options=options)


def through(folder: Path, one: tuple[nn.Module, Any], other: tuple[nn.Module, Any], options: Any, partly: bool) -> None:
    """Saved from one, and loaded into the other."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    save(template(*one, options), checkpoint_id=folder)
    state = template(*other, options)
    load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=partly))
    put(*other, state, options)


def alone(
    cls: Any, seed: int, n_steps: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Any]:
    """A model in one process, and its optimizer after some steps."""
    torch.manual_seed(seed)
    model = nn.Linear(64, 4, bias=False).to(dtype)
    opt = cls(model.parameters(), lr=0.01, **options)
    for _ in range(n_steps):
        model(torch.ones(2, 64, dtype=dtype)).float().sum().backward()
        opt.step()
        opt.zero_grad()
    return model, opt


def flat(value: Any) -> list[Any]:
    """List what is in a state dict, in an order that is always the same."""
    if isinstance(value, dict):
        return [item for key in sorted(value, key=str) for item in (key, *flat(value[key]))]
    if isinstance(value, list | tuple):
        return [item for entry in value for item in flat(entry)]
    return [value.tolist() if isinstance(value, torch.Tensor) else value]


NAMES = [cls.__name__ for cls in CLASSES]


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", NAMES)
def test_round_trips(name: str, flatten: bool, worlds: dict[int, World], tmp_path: Path) -> None:
    worlds[1].run(check_round_trips, name, flatten, tmp_path)


def check_round_trips(name: str, flatten: bool, folder: Path) -> None:
    """Load checkpoints of ours and of torch's class into fresh optimizers and such that have stepped, in all
    directions."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    ours = getattr(tritopt.optim, name)
    classes = [cls for cls in (ours, getattr(torch.optim, name, None)) if cls is not None]
    settings: list[dict[str, Any]] = (
        [{}, {"momentum": 0.9}] if name in ("SGD", "RMSprop") else [{"amsgrad": True}] if name == "Adam" else [{}]
    )
    for at, setting in enumerate(settings):
        for i, one in enumerate(classes):
            for j, other in enumerate(classes):
                for n_steps in (0, 3):
                    a, b = alone(one, 0, 2, **setting), alone(other, 1, n_steps, **setting)
                    through(folder / f"{at}{i}{j}{n_steps}", a, b, options, partly=False)
                    assert flat(template(*b, options)) == flat(template(*a, options)), (one, other, n_steps)


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("master", ["fp32", "split16", "split8", "kahan"])
def test_no_master_outlives_its_weight(master: str, flatten: bool, worlds: dict[int, World], tmp_path: Path) -> None:
    worlds[1].run(check_no_master_outlives_its_weight, master, flatten, tmp_path)


def check_no_master_outlives_its_weight(master: str, flatten: bool, folder: Path) -> None:
    """torch's checkpoint has none, and allow_partial_load leaves what it lacks as it was."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    ours, theirs = tritopt.optim.AdamW, torch.optim.AdamW
    for n_steps in (0, 4):
        one: Any = alone(theirs, 0, 2, DTYPE)
        model: Any
        model, opt = alone(ours, 1, n_steps, DTYPE, master=master, fused=False)
        with pytest.warns(UserWarning, match="the checkpoint has no master for 1 "):
            through(folder / f"theirs{n_steps}", one, (model, opt), options, partly=True)
        assert torch.equal(model.weight, one[0].weight)
        assert torch.equal(opt.master_weights()[0], model.weight.float())
        # Ours has one, which stays.
        model, opt = alone(ours, 2, 3, DTYPE, master=master, fused=False)
        expected = opt.master_weights()[0].clone()
        again = alone(ours, 1, n_steps, DTYPE, master=master, fused=False)
        through(folder / f"ours{n_steps}", (model, opt), again, options, partly=True)
        assert torch.equal(again[1].master_weights()[0], expected)
        assert not torch.equal(expected, model.weight.float())
