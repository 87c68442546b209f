"""Nadam: its rule, and MXNet's face of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.nadam import nadam_update
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values, takes_arrays

NEGLIGIBLE = 2.0**-54
"""Product of the schedule so small that 1 - product is 1."""


class NadamScalars(NamedTuple):
    """Scalars that the update of Nadam reads beside its tensors."""

    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    epsilon: float
    mean_share: float
    """Share of the mean in the step: mu_{t+1} / (1 - Pi_{t+1})."""
    grad_share: float
    """Share of the gradient in the step: (1 - mu_t) / (1 - Pi_t)."""
    var_correction: float
    """Bias correction of the second moment: 1 / (1 - beta2^t)."""


class NadamRule(Rule):
    """Adam with Nesterov momentum (Dozat 2016, "Incorporating Nesterov Momentum into Adam", ICLR workshop).

        mu_t = beta1 (1 - 0.96^(t schedule_decay) / 2),   Pi_t = mu_1 mu_2 ... mu_t
        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        n_t = mu_{t+1} / (1 - Pi_{t+1}) * m_t + (1 - mu_t) / (1 - Pi_t) * g_t
        w_t = w_{t-1} - lr n_t / (sqrt(v_t / (1 - beta2^t)) + epsilon)

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1}. States: m and v, the (master) weight's shape
    and dtype, zero at first. As in torch's NAdam, m_t has the constant rate beta1, and t and Pi_t are the parameter's
    own; MXNet multiplies one product for all parameters. Pi_t begins behind begin_num_update, with the run's first mu.

    Differs from MXNet's: has a fused kernel; one product of the schedule per parameter, not one for all tensors.

    Args:
        learning_rate: per update.
        beta1, beta2: decay rates of the moments, in [0, 1).
        epsilon: added to the root, >= 0.
        schedule_decay: rate at which mu_t warms up from beta1 / 2 to beta1, >= 0; 0: it stays at beta1 / 2.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: a beta, epsilon or schedule_decay out of range.
    """

    phases = (Apply(nadam_update),)
    state_names = ("mean", "var")
    variants = ({}, {"beta1": 0.5, "beta2": 0.8, "epsilon": 1e-3, "schedule_decay": 5.0})

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        schedule_decay: float = 0.004,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.beta1, self.beta2, self.epsilon = validate.moments(beta1, beta2, epsilon)
        self.schedule_decay = validate.nonnegative("schedule_decay", schedule_decay)
        # Products of 0, 1, 2, ... factors: a function of the count alone, so parameters share the list, not a product.
        self._schedule_products = [1.0]

    def _momentum(self, count: int) -> float:
        """Momentum mu_t that the schedule has at a count."""
        return self.beta1 * (1 - 0.5 * math.pow(0.96, count * self.schedule_decay))

    def _schedule_product(self, count: int) -> float:
        """Product Pi_t of the schedule. The list grows by one entry a step until the products are negligible."""
        products, n_factors = self._schedule_products, count - self.begin_num_update
        while len(products) <= n_factors and products[-1] > NEGLIGIBLE:
            products.append(products[-1] * self._momentum(self.begin_num_update + len(products)))
        return products[min(n_factors, len(products) - 1)]

    def scalars(self, lr: float, wd: float, count: int) -> NadamScalars:
        """Scalars of a step: the shares of mean and gradient, and the variance's correction as a factor."""
        momentum, next_momentum = self._momentum(count), self._momentum(count + 1)
        product = self._schedule_product(count)
        return NadamScalars(
            lr=lr,
            beta1=self.beta1,
            one_minus_beta1=1 - self.beta1,
            beta2=self.beta2,
            one_minus_beta2=1 - self.beta2,
            epsilon=self.epsilon,
            mean_share=next_momentum / (1 - product * next_momentum),
            grad_share=(1 - momentum) / (1 - product),
            var_correction=1 / (1 - self.beta2**count),
        )

    @takes_arrays
    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: NadamScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        mean, var = state
        mean = s.beta1 * mean + s.one_minus_beta1 * g
        var = s.beta2 * var + s.one_minus_beta2 * (g * g)
        ahead = s.mean_share * mean + s.grad_share * g
        return w - s.lr * (ahead / (sqrt(var * s.var_correction) + s.epsilon)), (mean, var)


@register
class Nadam(NadamRule, Optimizer, learning_rate=0.001): ...
