"""A Trainer on a GPU that runs behind the host as far as it can: no step waits for it, and what it computes is right.

The GPU is a stand-in (tests/support/fake_cuda).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tritopt
from tests.support.fake_cuda.runtime import FakeCuda
from tests.support.fake_cuda.training import assert_same, numbers
from tritopt.kernels.language import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the stand-in interprets kernels")

SHAPES = ((7,), (3, 5), (2, 4))
OVERFLOWS = (2, 3)
STEPS = 7
CASES: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": 0.5},
    {"scaled": True},
    {"scaled": True, "max_grad_norm": 0.5},
]


class Training:
    """Parameters on one device, and their gradients, which are the same wherever and whenever it runs."""

    def __init__(self, device: str, scaled: bool = False, max_grad_norm: float | None = None) -> None:
        self.params = [numbers(shape, seed).to(device).requires_grad_() for seed, shape in enumerate(SHAPES)]
        self.device = device
        scaler = tritopt.LossScaler(2.0**4, scale_window=2) if scaled else None
        self.trainer = tritopt.Trainer(
            [(f"p{i}", param) for i, param in enumerate(self.params)],
            "adam",
            {"learning_rate": 0.1, "use_fused_step": True},
            max_grad_norm=max_grad_norm,
            loss_scaler=scaler,
        )

    def step(self, number: int) -> None:
        """Gradients as backward makes them, on the device and with the scale that is there."""
        scale: Any = 1.0
        if self.trainer.loss_scaler is not None:
            with self.trainer.scale_loss(torch.ones(()).to(self.device)) as scale:
                pass
        for i, param in enumerate(self.params):
            value = math.inf if (number, i) in [(n, 1) for n in OVERFLOWS] and self.clips else 1.0
            param.grad = (numbers(param.shape, 100 * number + i) * value).to(self.device) * scale
        self.trainer.step(4)

    @property
    def clips(self) -> bool:
        """Whether what overflows is skipped."""
        return self.trainer.loss_scaler is not None or self.trainer.optimizer.max_grad_norm is not None

    def results(self) -> list[torch.Tensor]:
        tensors = [*self.params, *[t for state in self.trainer._updater.states.values() for t in state]]
        if self.trainer.loss_scaler is not None:
            tensors.append(torch.tensor([float(x) for x in self.trainer.loss_scaler.state_dict().values()]))
        return [tensor.detach().cpu().clone() for tensor in tensors]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_step_waits(case: dict[str, Any]) -> None:
    """Many steps are in flight, two of which overflow; the host hears of none of them."""
    expected = Training("cpu", **case)
    for number in range(STEPS):
        expected.step(number)
    with FakeCuda().running() as cuda:
        training = Training("cuda:0", **case)
        for number in range(STEPS):
            training.step(number)
        assert "update" not in " ".join(cuda.log)
        assert_same(training.results(), expected.results())
        launched = [name for name in cuda.log if name.endswith("update")]
        assert launched.count("adam_update") == STEPS
        assert launched.count("loss_scale_update") == (STEPS if case.get("scaled") else 0)
