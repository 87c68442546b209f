"""Adam: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.engine.scalars import sqrt as root
from tritopt.kernels.adam import adam_update
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values, takes_arrays


class AdamScalars(NamedTuple):
    """Scalars that the update of Adam reads beside its tensors."""

    lr: float
    """Learning rate times both bias corrections."""
    beta1: float
    one_minus_beta1: float
    """1 - beta1, formed in double: 1 - 0.999 in fp32 is 1.3e-5 off."""
    beta2: float
    one_minus_beta2: float
    epsilon: float


def bias_corrected(lr: Any, beta1: float, beta2: float, count: Any) -> Any:
    """Learning rate with both bias corrections: lr sqrt(1 - beta2^count) / (1 - beta1^count)."""
    return lr * root(1 - beta2**count) / (1 - beta1**count)


class AdamRule(Rule):
    """Adaptive moments (Kingma & Ba 2014, arXiv:1412.6980, the efficient form at the end of section 2).

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        w_t = w_{t-1} - lr sqrt(1 - beta2^t) / (1 - beta1^t) * m_t / (sqrt(v_t) + epsilon)

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1} (L2, not decoupled: see AdamW). States: m and v,
    the (master) weight's shape and dtype, zero at first. Unlike torch's, epsilon is added to the uncorrected root.

    Differs from MXNet's: fp16 without a master computes in fp32, so epsilon does not vanish.

    Args:
        learning_rate: per update.
        beta1, beta2: decay rates of the moments, in [0, 1).
        epsilon: added to the root, >= 0.
        lazy_update: update only the rows present in a row-sparse gradient.
        kwargs: see `Optimizer`.

    Raises:
        ValueError: a beta or epsilon out of range, or lazy_update with use_fused_step=False.
    """

    phases = (Apply(adam_update),)
    state_names = ("mean", "var")
    variants = ({}, {"beta1": 0.5, "beta2": 0.8, "epsilon": 1e-3})

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, **common: Any) -> None:
        super().__init__(**common)
        self.beta1, self.beta2, self.epsilon = validate.moments(beta1, beta2, epsilon)

    def scalars(self, lr: float, wd: float, count: int) -> AdamScalars:
        """Scalars of a step, bias corrections folded into the learning rate."""
        lr = bias_corrected(lr, self.beta1, self.beta2, count)
        return AdamScalars(lr, self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, self.epsilon)

    @takes_arrays
    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: AdamScalars) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        mean, var = state
        mean = s.beta1 * mean + s.one_minus_beta1 * g
        var = s.beta2 * var + s.one_minus_beta2 * (g * g)
        return w - s.lr * (mean / (sqrt(var) + s.epsilon)), (mean, var)


@register
class Adam(AdamRule, Optimizer, learning_rate=0.001):
    supports_lazy_update = True
