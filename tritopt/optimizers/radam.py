"""RAdam: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.engine.scalars import sqrt as scalar_sqrt
from tritopt.engine.scalars import where
from tritopt.kernels.radam import radam_update
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.optimizers.adam import bias_corrected
from tritopt.rule import Rule, Values, takes_arrays


class RAdamScalars(NamedTuple):
    """Scalars that the update of RAdam reads beside its tensors."""

    lr: float
    """Learning rate times the bias corrections, and times r_t where the step is adaptive."""
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    epsilon: float
    adaptive: float
    """Flag: 1, or 0 while there are too few gradients to divide by their root mean square."""


class RAdamRule(Rule):
    """Rectified Adam (Liu et al. 2019, arXiv:1908.03265, algorithm 2).

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t),  rho_inf = 2 / (1 - beta2) - 1
        rho_t > rectify_above:  r_t = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))
                                w_t = w_{t-1} - lr r_t m_t / (1 - beta1^t) * sqrt(1 - beta2^t) / (sqrt(v_t) + epsilon)
        otherwise:              w_t = w_{t-1} - lr m_t / (1 - beta1^t)

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1} (L2, as torch's default; the authors' code
    decouples it). States: m and v, the (master) weight's shape and dtype, zero at first.

    The paper rectifies once rho_t > 4, the authors' code and torch once it is above 5: with beta2 = 0.999 from step 5
    and from step 6 on. That one step differs by default; rectify_above=5 gives torch's trajectory. The paper has no
    epsilon; here it is added to the uncorrected root, as in torch's RAdam. With beta2 <= 0.6 no step is adaptive.

    Not in MXNet.

    Args:
        learning_rate: per update.
        beta1, beta2: decay rates of the moments, in [0, 1).
        epsilon: added to the root, >= 0.
        rectify_above: bound on rho_t, the number of gradients that v_t is worth; >= 4, where r_t starts from 0.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: a beta, epsilon or rectify_above out of range.
    """

    phases = (Apply(radam_update),)
    state_names = ("mean", "var")
    # No step before the fifth is adaptive, whatever beta2: rho_t < t.
    variants = ({}, {"beta1": 0.5, "beta2": 0.8, "epsilon": 1e-3, "begin_num_update": 8})

    def __init__(
        self, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, rectify_above: float = 4.0, **common: Any
    ) -> None:
        super().__init__(**common)
        self.beta1, self.beta2, self.epsilon = validate.moments(beta1, beta2, epsilon)
        self.rectify_above = validate.number("rectify_above", rectify_above)
        if self.rectify_above < 4:
            raise ValueError(f"rectify_above={rectify_above!r} must be >= 4; 4 is the paper's, 5 is torch's")

    def scalars(self, lr: Any, wd: float, count: Any) -> RAdamScalars:
        """Scalars of a step, bias corrections and rectification folded into the learning rate."""
        is_adaptive, rectification = self.rectification(count)
        adaptive_lr = bias_corrected(lr, self.beta1, self.beta2, count) * rectification
        moments = (self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, self.epsilon)
        return RAdamScalars(
            where(is_adaptive, adaptive_lr, lr / (1 - self.beta1**count)),
            *moments,
            adaptive=where(is_adaptive, 1.0, 0.0),
        )

    def rectification(self, count: Any) -> tuple[Any, Any]:
        """Whether rho_t is large enough for an adaptive step, and r_t; 1 where it is not."""
        limit = 2 / (1 - self.beta2) - 1
        if limit <= self.rectify_above:  # which rho_t does not reach then; nor has r_t a root
            return count < 0, 1.0
        rho = limit - 2 * count * self.beta2**count / (1 - self.beta2**count)
        is_adaptive = rho > self.rectify_above
        rho = where(is_adaptive, rho, limit)
        return is_adaptive, scalar_sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))

    @takes_arrays
    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: RAdamScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        mean, var = state
        mean = s.beta1 * mean + s.one_minus_beta1 * g
        var = s.beta2 * var + s.one_minus_beta2 * (g * g)
        direction = mean / (sqrt(var) + s.epsilon) if s.adaptive else mean
        return w - s.lr * direction, (mean, var)


@register
class RAdam(RAdamRule, Optimizer, learning_rate=0.001): ...
