"""torchtitan's container of optimizers takes ours in torch's place, with their options, and saves and loads them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import tritopt.optim
from tests.support.training import assert_same, everything, set_grads

pytest.importorskip("torchtitan", reason="pip install tritopt[ecosystem]")
components = pytest.importorskip("torchtitan.components.optimizer", reason="needs torchtitan 0.3 or newer")


def container() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).to(torch.bfloat16)
    config = components.default_adamw(lr=0.01, state_dtype="int8")
    config.optimizer_factory_kwargs_by_name = {"AdamW": {"max_grad_norm": 0.1}}
    return components.OptimizersContainer(config, model_parts=[model])


def step(optimizers: Any, seed: int) -> None:
    set_grads(list(optimizers.model_parts[0].parameters()), seed)
    optimizers.step()
    optimizers.zero_grad()


def test_trains_saves_and_resumes_bit_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", tritopt.optim.AdamW)
    whole = container()
    (opt,) = whole.optimizers
    assert type(opt) is tritopt.optim.AdamW
    step(whole, 0)
    saved = copy.deepcopy(whole.state_dict())
    weights = copy.deepcopy(whole.model_parts[0].state_dict())
    assert any(key.endswith("exp_avg_int8") for key in saved)
    step(whole, 1)
    assert opt.grad_norm is not None

    resumed = container()
    resumed.model_parts[0].load_state_dict(weights)
    resumed.load_state_dict(saved)
    step(resumed, 1)
    (again,) = resumed.optimizers
    assert_same(everything(again), everything(opt))
