"""FTML: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.engine.scalars import divide
from tritopt.kernels.formats.states import SQUARES
from tritopt.kernels.ftml import ftml_update
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values


class FTMLScalars(NamedTuple):
    """Scalars that the update of FTML reads beside its tensors."""

    inverse_lr: float
    """Inverse of the rate with the mean's bias correction: (1 - beta1^t) / lr."""
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    epsilon: float
    var_correction: float
    """Bias correction of the second moment: 1 / (1 - beta2^t)."""


class FTMLRule(Rule):
    """Follow the moving leader (Zheng & Kwok 2017, ICML, PMLR 70:4110-4119, algorithm 1).

        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        d_t = (1 - beta1^t) / lr (sqrt(v_t / (1 - beta2^t)) + epsilon)
        z_t = beta1 z_{t-1} + (1 - beta1) g_t - (d_t - beta1 d_{t-1}) w_{t-1}
        w_t = -z_t / d_t

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1}. States: d, v and z, the (master) weight's
    shape, at least fp32, zero at first (MXNet's have the weight's dtype, but z and d in half precision would lose the
    weight, which is their quotient). A learning rate of 0 leaves weight and states alone.

    Differs from MXNet's: a learning rate of 0 leaves weight and states alone.

    Args:
        learning_rate: per update.
        beta1, beta2: decay rates of the samples' influence and of the second moment, in [0, 1).
        epsilon: added to the root, >= 0.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: a beta or epsilon out of range.
    """

    phases = (Apply(ftml_update),)
    state_names = ("d", "v", "z")
    state_kinds: ClassVar = {"v": SQUARES}  # w = -z / d
    least_state_dtype = torch.float32
    skips_zero_lr = True
    variants = ({}, {"beta1": 0.5, "beta2": 0.8, "epsilon": 0.1})

    def __init__(self, beta1: float = 0.6, beta2: float = 0.999, epsilon: float = 1e-8, **common: Any) -> None:
        super().__init__(**common)
        self.beta1, self.beta2, self.epsilon = validate.moments(beta1, beta2, epsilon)

    def scalars(self, lr: Any, wd: float, count: Any) -> FTMLScalars:
        """Scalars of a step, with bias corrections as factors; those of a rate of 0 are never read."""
        return FTMLScalars(
            inverse_lr=divide(1 - self.beta1**count, lr),
            beta1=self.beta1,
            one_minus_beta1=1 - self.beta1,
            beta2=self.beta2,
            one_minus_beta2=1 - self.beta2,
            epsilon=self.epsilon,
            var_correction=1 / (1 - self.beta2**count),
        )

    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: FTMLScalars) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        d, v, z = state
        v = s.beta2 * v + s.one_minus_beta2 * (g * g)
        new_d = s.inverse_lr * (sqrt(v * s.var_correction) + s.epsilon)
        z = s.beta1 * z + s.one_minus_beta1 * g - (new_d - s.beta1 * d) * w
        return -z / new_d, (new_d, v, z)


@register
class FTML(FTMLRule, Optimizer, learning_rate=0.0025): ...
