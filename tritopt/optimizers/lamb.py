"""LAMB: its rule, and MXNet's face of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.lamb import lamb_moments, lamb_update
from tritopt.kernels.twins.ops import add_decay, decay_of, sqrt, trust_ratio
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Stored, Values


class LAMBScalars(NamedTuple):
    """Scalars that the update of LAMB reads beside its tensors."""

    lr: float
    wd: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    epsilon: float
    mean_correction: float
    """Bias correction of the mean: 1 / (1 - beta1^t), or 1 without bias_correction."""
    var_correction: float
    """Bias correction of the second moment: 1 / (1 - beta2^t), or 1 without bias_correction."""
    lower_bound: float
    """Lower bound on the weight's norm in the trust ratio; 0: there is none."""
    upper_bound: float
    """Upper bound on the weight's norm in the trust ratio; infinity: there is none."""


class LAMBRule(Rule):
    """Layer-wise adaptive moments (You et al. 2019, arXiv:1904.00962, algorithm 2).

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        u_t = (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + epsilon) + wd w_{t-1}
        r_t = min(max(|w_{t-1}|, lower_bound), upper_bound) / |u_t|, or 1 where a norm is 0 or |w| infinite
        w_t = w_{t-1} - lr r_t u_t

    g_t is the gradient after rescaling and clipping; |.| is the Euclidean norm of a whole tensor, of the master if
    there is one; where |w| is infinite, nothing decays. States: m and v, the weight's shape, at least fp32, zero at
    first. Two launches.

    Differs from MXNet's: each step counts once and the master is written also without aggregation; bounds <= 0 are off;
    any number of tensors.

    Args:
        learning_rate: per update, relative to the weight's norm.
        beta1, beta2: decay rates of the moments, in [0, 1).
        epsilon: added to the root, >= 0.
        lower_bound, upper_bound: bounds on the weight's norm. None or <= 0: unbounded.
        bias_correction: whether to correct the moments for their zero start.
        kwargs: see `Optimizer`.

    Raises:
        ValueError: a beta or epsilon out of range.
    """

    phases = (
        Apply(lamb_moments, writes_weight=False, n_sums=2),
        Apply(lamb_update, reads_grad=False, writes_states=False),
    )
    state_names = ("mean", "var")
    least_state_dtype = torch.float32
    rereads_states = True
    preamble = "decoupled"
    variants = ({}, {"beta1": 0.5, "beta2": 0.8, "lower_bound": 1e-3, "upper_bound": 1.5, "bias_correction": False})

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-6,
        lower_bound: float | None = None,
        upper_bound: float | None = None,
        bias_correction: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.beta1, self.beta2, self.epsilon = validate.moments(beta1, beta2, epsilon)
        self.lower_bound = validate.positive_or_none("lower_bound", lower_bound)
        self.upper_bound = validate.positive_or_none("upper_bound", upper_bound)
        self.bias_correction = bias_correction

    def scalars(self, lr: float, wd: float, count: int) -> LAMBScalars:
        """Scalars of a step, with the bias corrections as factors."""
        return LAMBScalars(
            lr=lr,
            wd=wd,
            beta1=self.beta1,
            one_minus_beta1=1 - self.beta1,
            beta2=self.beta2,
            one_minus_beta2=1 - self.beta2,
            epsilon=self.epsilon,
            mean_correction=1 / (1 - self.beta1**count) if self.bias_correction else 1.0,
            var_correction=1 / (1 - self.beta2**count) if self.bias_correction else 1.0,
            lower_bound=validate.bound_or(self.lower_bound, 0.0),
            upper_bound=validate.bound_or(self.upper_bound, math.inf),
        )

    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: LAMBScalars, stored: Stored = lambda values: values
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states. u is computed again, from the moments as they
        are stored."""

        def direction(wd: float, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
            return add_decay(mean * s.mean_correction / (sqrt(var * s.var_correction) + s.epsilon), w, wd)

        mean, var = state
        mean = s.beta1 * mean + s.one_minus_beta1 * g
        var = s.beta2 * var + s.one_minus_beta2 * (g * g)
        step = s.lr * trust_ratio(w, direction(s.wd, mean, var), s.lower_bound, s.upper_bound)
        return w - step * direction(decay_of(w, s.wd), *stored((mean, var))), (mean, var)


@register
class LAMB(LAMBRule, Optimizer, learning_rate=0.001): ...
