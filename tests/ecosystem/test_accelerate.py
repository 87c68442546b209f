"""Accelerate prepares our optimizers, saves their masters, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training import assert_same, everything
from tritopt.optim import AdamW

accelerate = pytest.importorskip("accelerate", reason="pip install tritopt[ecosystem]")


def prepared() -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=not torch.cuda.is_available())
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(torch.bfloat16)
    return accelerator, *accelerator.prepare(model, AdamW(model.parameters(), lr=0.05, max_grad_norm=0.1))


def train(accelerator: Any, model: Any, opt: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator("cpu").manual_seed(step), device="cpu").bfloat16()
        opt.zero_grad()
        accelerator.backward(model(x.to(accelerator.device)).float().square().mean())
        opt.step()


def test_trains_saves_and_resumes_bit_exactly(tmp_path: Path) -> None:
    accelerator, model, opt = prepared()
    train(accelerator, model, opt, range(2))
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, opt, range(2, 4))
    assert opt.optimizer.grad_norm > 0.1

    accelerator, resumed_model, resumed = prepared()
    accelerator.load_state(str(tmp_path))
    train(accelerator, resumed_model, resumed, range(2, 4))
    assert_same(everything(resumed.optimizer), everything(opt.optimizer))
    assert all(state["master_remainder"].dtype == torch.int16 for state in resumed.optimizer.state.values())
