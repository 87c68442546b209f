"""Test, the simplest optimizer there is: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritopt.engine.driver import Apply
from tritopt.kernels.test import test_update
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values, takes_arrays


class TestScalars(NamedTuple):
    """Scalars that the update of Test reads beside its tensors."""

    lr: float


class TestRule(Rule):
    """Gradient descent without clipping, MXNet's `Test`: for testing what surrounds an optimizer.

        w_t = w_{t-1} - lr (rescale_grad grad_t + wd w_{t-1})

    State: zeros of the weight's shape, at least fp32, never read nor written. Arguments: see `Optimizer`.

    Differs from MXNet's: has a fused kernel.
    """

    phases = (Apply(test_update, reads_states=False, writes_states=False),)
    state_names = ("unused",)
    least_state_dtype = torch.float32
    clips = False

    def scalars(self, lr: float, wd: float, count: int) -> TestScalars:
        """Scalars of a step: the learning rate."""
        return TestScalars(lr)

    @takes_arrays
    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: TestScalars) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        return w - s.lr * g, state


@register
class Test(TestRule, Optimizer): ...
