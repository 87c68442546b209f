"""AdEMAMix: its rule, and MXNet's face of it."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.engine.scalars import minimum
from tritopt.engine.scalars import sqrt as scalar_sqrt
from tritopt.kernels.ademamix import ademamix_update
from tritopt.kernels.formats.states import SIGNED
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values, takes_arrays


class AdEMAMixScalars(NamedTuple):
    """Scalars that the update of AdEMAMix reads beside its tensors."""

    mean_lr: float
    """Rate of the mean: lr sqrt(1 - beta2^t) / (1 - beta1^t)."""
    slow_lr: float
    """Rate of the slow mean: lr sqrt(1 - beta2^t) alpha_t."""
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    beta3: float
    """Decay rate beta3_t of the slow mean at this count."""
    one_minus_beta3: float
    epsilon: float
    """Epsilon times sqrt(1 - beta2^t): what it is beside the uncorrected root."""
    keep: float
    """Share of the old weight that stays, 1 - lr wd."""


class AdEMAMixRule(Rule):
    """AdamW with a second, slower mean of the gradients (Pagliardini et al. 2024, arXiv:2409.03137, algorithm 1).

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        s_t = beta3_t s_{t-1} + (1 - beta3_t) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        u_t = (m_t / (1 - beta1^t) + alpha_t s_t) / (sqrt(v_t / (1 - beta2^t)) + epsilon)
        w_t = w_{t-1} - lr (u_t + wd w_{t-1})

        alpha_t = alpha min(t / t_alpha, 1)
        ln beta3_t = ln beta1 ln beta3 / ((1 - a) ln beta3 + a ln beta1),  a = min(t / t_beta3, 1)

    g_t is the gradient after rescaling and clipping. States: m, s and v, the (master) weight's shape, zero at first,
    of the weight's dtype but at least fp32: fewer bits rounded to nearest do not hold moves of 1 - beta3. The slow mean
    is not corrected for its zero start; the warm-up of beta3 makes up for it, and lets its half-life grow evenly. The
    paper lets both warm-ups last as long as the training.

    Not in MXNet, nor in torch.

    Args:
        learning_rate: per update.
        beta1, beta2: decay rates of the fast mean and of the squares, in [0, 1).
        beta3: decay rate of the slow mean after its warm-up, in [0, 1). At most beta1: there is no warm-up.
        alpha: weight of the slow mean after its warm-up, >= 0. The paper uses 4 to 10.
        t_alpha, t_beta3: updates that the warm-ups of alpha and beta3 last. None or 0: none.
        epsilon: added to the corrected root, >= 0.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: a beta, alpha, epsilon or warm-up out of range.
    """

    phases = (Apply(ademamix_update),)
    state_names = ("mean", "slow_mean", "var")
    state_kinds: ClassVar = {"slow_mean": SIGNED}
    least_state_dtype = torch.float32
    preamble = "decoupled"
    variants = (
        {},
        {"beta1": 0.5, "beta2": 0.8, "beta3": 0.95, "alpha": 2.0, "t_alpha": 5, "t_beta3": 3, "epsilon": 1e-3},
    )

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        beta3: float = 0.9999,
        alpha: float = 5.0,
        t_alpha: float | None = None,
        t_beta3: float | None = None,
        epsilon: float = 1e-8,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.beta1, self.beta2, self.epsilon = validate.moments(beta1, beta2, epsilon)
        self.beta3 = validate.fraction("beta3", beta3)
        self.alpha = validate.nonnegative("alpha", alpha)
        self.t_alpha = None if t_alpha is None else validate.nonnegative("t_alpha", t_alpha)
        self.t_beta3 = None if t_beta3 is None else validate.nonnegative("t_beta3", t_beta3)

    def _slow_decay(self, count: Any) -> Any:
        """Decay rate beta3_t: beta3 to the power ln beta1 / ((1 - a) ln beta3 + a ln beta1)."""
        if not self.t_beta3 or self.beta3 <= self.beta1:
            return self.beta3
        progress = minimum(count / self.t_beta3, 1.0)
        start = math.log(self.beta3) / math.log(self.beta1) if self.beta1 else 0.0
        return self.beta3 ** (1 / (progress + (1 - progress) * start))

    def scalars(self, lr: Any, wd: float, count: Any) -> AdEMAMixScalars:
        """Scalars of a step: both warm-ups at this count, and the corrections folded into the rates and epsilon."""
        root = scalar_sqrt(1 - self.beta2**count)
        alpha = self.alpha * minimum(count / self.t_alpha, 1.0) if self.t_alpha else self.alpha
        beta3 = self._slow_decay(count)
        return AdEMAMixScalars(
            mean_lr=lr * root / (1 - self.beta1**count),
            slow_lr=lr * root * alpha,
            beta1=self.beta1,
            one_minus_beta1=1 - self.beta1,
            beta2=self.beta2,
            one_minus_beta2=1 - self.beta2,
            beta3=beta3,
            one_minus_beta3=1 - beta3,
            epsilon=self.epsilon * root,
            keep=1 - lr * wd,
        )

    @takes_arrays
    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: AdEMAMixScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        mean, slow, var = state
        mean = s.beta1 * mean + s.one_minus_beta1 * g
        slow = s.beta3 * slow + s.one_minus_beta3 * g
        var = s.beta2 * var + s.one_minus_beta2 * (g * g)
        step = (s.mean_lr * mean + s.slow_lr * slow) / (sqrt(var) + s.epsilon)
        return s.keep * w - step, (mean, slow, var)


@register
class AdEMAMix(AdEMAMixRule, Optimizer, learning_rate=0.001): ...
