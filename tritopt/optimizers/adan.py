"""Adan: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.engine.scalars import sqrt as scalar_sqrt
from tritopt.engine.scalars import where
from tritopt.kernels.adan import adan_update
from tritopt.kernels.formats.states import SIGNED
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values, takes_arrays


class AdanScalars(NamedTuple):
    """Scalars that the update of Adan reads beside its tensors."""

    mean_lr: float
    """Rate of the mean: lr sqrt(1 - beta3^t) / (1 - beta1^t)."""
    diff_lr: float
    """Rate of the mean difference: lr sqrt(1 - beta3^t) beta2 / (1 - beta2^t)."""
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    beta3: float
    one_minus_beta3: float
    epsilon: float
    """Epsilon times sqrt(1 - beta3^t): what it is beside the uncorrected root."""
    keep: float
    """Share of the moved weight that decay leaves, 1 / (1 + lr wd)."""
    first: float
    """Flag: 1 at the parameter's first update, whose gradient has none before it; else 0."""


class AdanRule(Rule):
    """Adaptive Nesterov momentum (Xie et al. 2022, arXiv:2208.06677, algorithm 1 as the authors' code has it).

        d_t = g_t - g_{t-1}, and d_1 = 0
        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) d_t
        n_t = beta3 n_{t-1} + (1 - beta3) (g_t + beta2 d_t)^2
        u_t = (m_t / (1 - beta1^t) + beta2 v_t / (1 - beta2^t)) / (sqrt(n_t / (1 - beta3^t)) + epsilon)
        w_t = (w_{t-1} - lr u_t) / (1 + lr wd)

    g_t is the gradient after rescaling and clipping. States: m, v, n and the last g, the (master) weight's shape and
    dtype, zero at first.

    This is the authors' implementation (no_prox=False). The betas are its decay rates: the paper calls 1 - beta what is
    beta here. Moments are corrected for their zero start, where the paper starts from m_0 = g_0 and n_0 = g_0^2; there
    are no restarts. If a parameter's first update is skipped (rescale_grad NaN or Inf), the next takes g_0 for 0.

    Not in MXNet, nor in torch.

    Args:
        learning_rate: per update.
        beta1, beta2, beta3: decay rates of the means of the gradients, of their differences and of their squares, in
            [0, 1).
        epsilon: added to the corrected root, >= 0.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: a beta or epsilon out of range, or, at an update, lr wd <= -1.
    """

    phases = (Apply(adan_update),)
    state_names = ("mean", "diff", "var", "previous_grad")
    state_kinds: ClassVar = {"diff": SIGNED, "previous_grad": SIGNED}
    preamble = "decoupled"
    variants = ({}, {"beta1": 0.5, "beta2": 0.7, "beta3": 0.8, "epsilon": 1e-3})

    def __init__(
        self, beta1: float = 0.98, beta2: float = 0.92, beta3: float = 0.99, epsilon: float = 1e-8, **common: Any
    ) -> None:
        super().__init__(**common)
        self.beta1, self.beta2, self.epsilon = validate.moments(beta1, beta2, epsilon)
        self.beta3 = validate.fraction("beta3", beta3)

    def scalars(self, lr: Any, wd: float, count: Any) -> AdanScalars:
        """Scalars of a step: corrections folded into the rates and epsilon, and whether this is the first update."""
        # Only a negative decay is worth a look at a learning rate that may live on the device.
        if wd < 0 and lr * wd <= -1:
            raise ValueError(f"wd={wd!r} with a learning rate of {lr!r} must keep 1 + lr wd above 0; raise wd")
        root = scalar_sqrt(1 - self.beta3**count)
        return AdanScalars(
            mean_lr=lr * root / (1 - self.beta1**count),
            diff_lr=lr * root * self.beta2 / (1 - self.beta2**count),
            beta1=self.beta1,
            one_minus_beta1=1 - self.beta1,
            beta2=self.beta2,
            one_minus_beta2=1 - self.beta2,
            beta3=self.beta3,
            one_minus_beta3=1 - self.beta3,
            epsilon=self.epsilon * root,
            keep=1 / (1 + lr * wd),
            first=where(count == self.begin_num_update + 1, 1.0, 0.0),
        )

    @takes_arrays
    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: AdanScalars) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        mean, diff, var, previous = state
        change = g - (g if s.first else previous)
        ahead = g + s.beta2 * change
        mean = s.beta1 * mean + s.one_minus_beta1 * g
        diff = s.beta2 * diff + s.one_minus_beta2 * change
        var = s.beta3 * var + s.one_minus_beta3 * (ahead * ahead)
        step = (s.mean_lr * mean + s.diff_lr * diff) / (sqrt(var) + s.epsilon)
        return (w - step) * s.keep, (mean, diff, var, g)


@register
class Adan(AdanRule, Optimizer, learning_rate=0.001): ...
