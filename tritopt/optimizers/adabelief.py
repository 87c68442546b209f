"""AdaBelief: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.adabelief import adabelief_update
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.optimizers.adam import bias_corrected
from tritopt.rule import Rule, Values, takes_arrays


class AdaBeliefScalars(NamedTuple):
    """Scalars that the update of AdaBelief reads beside its tensors."""

    lr: float
    """Learning rate times both bias corrections, if correct_bias."""
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    epsilon: float


class AdaBeliefRule(Rule):
    """Adam that steps by its belief in the gradient (Zhuang et al. 2020, arXiv:2010.07468, algorithm 2).

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) (g_t - m_t)^2 + epsilon
        a_t = lr sqrt(1 - beta2^t) / (1 - beta1^t), or lr without correct_bias
        w_t = w_{t-1} - a_t m_t / (sqrt(v_t) + epsilon)

    g_t is the gradient after rescaling, adding wd w_{t-1} and only then clipping. States: m and v, the (master)
    weight's shape and dtype, zero at first. epsilon accumulates in v, up to epsilon / (1 - beta2); unlike in the paper
    the other one is added to the uncorrected root. rescale_grad = 0 skips the update.

    Differs from MXNet's: `aggregate_num` is honoured; rescale_grad = 0, NaN or infinity skips in `step` as well.

    Args:
        learning_rate: per update.
        beta1, beta2: decay rates of the moments, in [0, 1).
        epsilon: added to the variance at each step, and to its root, >= 0.
        correct_bias: whether to correct the moments for their zero start.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: a beta or epsilon out of range. TypeError: correct_bias is no bool.
    """

    phases = (Apply(adabelief_update),)
    state_names = ("mean", "var")
    preamble = "coupled_in_clip"
    skips_zero_rescale = True
    variants = ({}, {"beta1": 0.5, "beta2": 0.8, "epsilon": 1e-3, "correct_bias": False})

    def __init__(
        self, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-6, correct_bias: bool = True, **common: Any
    ) -> None:
        super().__init__(**common)
        self.beta1, self.beta2, self.epsilon = validate.moments(beta1, beta2, epsilon)
        self.correct_bias = validate.boolean("correct_bias", correct_bias)

    def scalars(self, lr: float, wd: float, count: int) -> AdaBeliefScalars:
        """Scalars of a step, bias corrections folded into the learning rate."""
        if self.correct_bias:
            lr = bias_corrected(lr, self.beta1, self.beta2, count)
        return AdaBeliefScalars(lr, self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, self.epsilon)

    @takes_arrays
    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: AdaBeliefScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        mean, var = state
        mean = s.beta1 * mean + s.one_minus_beta1 * g
        surprise = g - mean
        var = s.beta2 * var + s.one_minus_beta2 * (surprise * surprise) + s.epsilon
        return w - s.lr * (mean / (sqrt(var) + s.epsilon)), (mean, var)


@register
class AdaBelief(AdaBeliefRule, Optimizer, learning_rate=0.001): ...
