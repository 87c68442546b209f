"""Adamax: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.adamax import adamax_update
from tritopt.kernels.twins.ops import maximum
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values, takes_arrays


class AdamaxScalars(NamedTuple):
    """Scalars that the update of Adamax reads beside its tensors."""

    lr: float
    """Learning rate over 1 - beta1^t, the bias correction of the mean."""
    beta1: float
    one_minus_beta1: float
    beta2: float
    epsilon: float


class AdamaxRule(Rule):
    """Adam with the infinity norm (Kingma & Ba 2014, arXiv:1412.6980, section 7.1).

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        u_t = max(beta2 u_{t-1}, |g_t|)
        w_t = w_{t-1} - lr / (1 - beta1^t) * m_t / (u_t + epsilon)

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1}. States: m and u, the (master) weight's shape
    and dtype, zero at first. The paper has no epsilon, so a weight that has never had a gradient would become NaN;
    torch's is added to |g_t| instead.

    Differs from MXNet's: has a fused kernel.

    Args:
        learning_rate: per update; bounds what an element moves, while gradients keep their size.
        beta1, beta2: decay rates of the mean and of the norm, in [0, 1).
        epsilon: added to the norm, >= 0.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: a beta or epsilon out of range.
    """

    phases = (Apply(adamax_update),)
    state_names = ("mean", "norm")
    variants = ({}, {"beta1": 0.5, "beta2": 0.8, "epsilon": 1e-3})

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, **common: Any) -> None:
        super().__init__(**common)
        self.beta1, self.beta2, self.epsilon = validate.moments(beta1, beta2, epsilon)

    def scalars(self, lr: float, wd: float, count: int) -> AdamaxScalars:
        """Scalars of a step, the mean's bias correction folded into the learning rate; the norm needs none."""
        return AdamaxScalars(lr / (1 - self.beta1**count), self.beta1, 1 - self.beta1, self.beta2, self.epsilon)

    @takes_arrays
    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: AdamaxScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        mean, norm = state
        mean = s.beta1 * mean + s.one_minus_beta1 * g
        norm = maximum(s.beta2 * norm, abs(g))
        return w - s.lr * mean / (norm + s.epsilon), (mean, norm)


@register
class Adamax(AdamaxRule, Optimizer, learning_rate=0.002): ...
