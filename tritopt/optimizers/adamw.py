"""AdamW: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.adamw import adamw_amsgrad_update, adamw_update
from tritopt.kernels.twins.ops import maximum, sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.optimizers.adam import bias_corrected
from tritopt.rule import Rule, Values, takes_arrays


class AdamWScalars(NamedTuple):
    """Scalars that the update of AdamW reads beside its tensors."""

    lr: float
    """Learning rate times both bias corrections, if correct_bias."""
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    epsilon: float
    keep: float
    """Share of the old weight that stays. A factor, which leaves an infinite weight infinite."""


class AdamWRule(Rule):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2).

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        a_t = lr sqrt(1 - beta2^t) / (1 - beta1^t), or lr without correct_bias
        w_t = w_{t-1} - a_t (m_t / (sqrt(v_t) + epsilon) + wd w_{t-1})

    With amsgrad (Reddi et al. 2018, arXiv:1904.09237, algorithm 2) max(v_1 ... v_t) stands under the root.

    g_t is the gradient after rescaling and clipping. States: m, v and with amsgrad that maximum, the (master) weight's
    shape and dtype, zero at first. The decay is multiplied by a_t where torch and the paper multiply it by lr; epsilon
    is added to the uncorrected root. rescale_grad = 0 skips the update.

    Differs from MXNet's: `step` is the fused formula, so it decays the old weight, honours wd < 0 and skips where
    rescale_grad is 0; amsgrad is new.

    Args:
        learning_rate: per update.
        beta1, beta2: decay rates of the moments, in [0, 1).
        epsilon: added to the root, >= 0.
        correct_bias: whether to correct the moments for their zero start.
        amsgrad: whether to divide by the largest v so far, which a third state holds.
        kwargs: see `Optimizer`.

    Raises:
        ValueError: a beta or epsilon out of range. TypeError: amsgrad is no bool.
    """

    preamble = "decoupled"
    skips_zero_rescale = True
    variants = (
        {},
        {"beta1": 0.5, "beta2": 0.8, "epsilon": 1e-3, "correct_bias": False},
        # So low a beta2 that v falls within a few steps, and is not its own maximum.
        {"amsgrad": True, "beta1": 0.7, "beta2": 0.4, "epsilon": 1e-3},
    )

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-6,
        correct_bias: bool = True,
        amsgrad: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.beta1, self.beta2, self.epsilon = validate.moments(beta1, beta2, epsilon)
        self.correct_bias = correct_bias
        self.amsgrad = validate.boolean("amsgrad", amsgrad)

    @property
    def phases(self) -> tuple[Apply, ...]:
        """Phases of a step: one launch."""
        return (Apply(adamw_amsgrad_update if self.amsgrad else adamw_update),)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the moments, and with amsgrad of the largest second one."""
        return ("mean", "var", "max_var") if self.amsgrad else ("mean", "var")

    def scalars(self, lr: float, wd: float, count: int) -> AdamWScalars:
        """Scalars of a step, bias corrections folded into the learning rate, and with it into the decay."""
        if self.correct_bias:
            lr = bias_corrected(lr, self.beta1, self.beta2, count)
        return AdamWScalars(lr, self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, self.epsilon, 1 - lr * wd)

    @takes_arrays
    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: AdamWScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        mean, var, *largest = state
        mean = s.beta1 * mean + s.one_minus_beta1 * g
        var = s.beta2 * var + s.one_minus_beta2 * (g * g)
        if largest:
            largest = [maximum(largest[0], var)]
        root = sqrt(largest[0] if largest else var)
        return s.keep * w - s.lr * (mean / (root + s.epsilon)), (mean, var, *largest)


@register
class AdamW(AdamWRule, Optimizer, learning_rate=0.001): ...
