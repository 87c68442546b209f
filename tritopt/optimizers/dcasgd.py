"""DCASGD: asynchronous SGD with delay compensation."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.dcasgd import dcasgd_momentum_update, dcasgd_update
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values


class DCASGDScalars(NamedTuple):
    """Scalars that the update of DCASGD reads beside its tensors."""

    lr: float
    momentum: float
    lamda: float


class DCASGDRule(Rule):
    """Delay-compensated asynchronous SGD (Zheng et al. 2016, arXiv:1609.08326).

        d_t = g_t + lamda g_t^2 (w_{t-1} - p_{t-1})
        p_t = w_{t-1}
        momentum == 0:  w_t = w_{t-1} - lr d_t
        otherwise:      m_t = momentum m_{t-1} - lr d_t
                        w_t = w_{t-1} + m_t

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1}. States: m, zero at first, or None without
    momentum, and p, the weight before the last update, at first a copy of the weight; both of the (master) weight's
    shape and dtype. So the state is always a pair, and the first step is that of SGD. The paper's p is the weight that
    a worker computed its gradient from.

    Differs from MXNet's: negative momentum is refused; there is a fused step.

    Args:
        learning_rate: per update.
        momentum: share of the last update that is kept, >= 0.
        lamda: strength of the compensation.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: momentum < 0, or lamda NaN.
    """

    variants = ({}, {"momentum": 0.9}, {"lamda": 2.0})

    def __init__(self, momentum: float = 0.0, lamda: float = 0.04, **common: Any) -> None:
        super().__init__(**common)
        self.momentum = validate.nonnegative("momentum", momentum)
        self.lamda = validate.number("lamda", lamda)

    @property
    def phases(self) -> tuple[Apply, ...]:
        """Phases of a step: one launch."""
        return (Apply(dcasgd_momentum_update if self.momentum else dcasgd_update),)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the states: the momentum, if there is any, and behind it the previous weight."""
        return ("momentum", "previous_weight") if self.momentum else ("previous_weight",)

    def create_state(self, index: Hashable, weight: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Fresh state: (momentum or None, previous weight)."""
        momentum = torch.zeros_like(weight, requires_grad=False) if self.momentum else None
        return momentum, weight.detach().clone()

    def scalars(self, lr: float, wd: float, count: int) -> DCASGDScalars:
        """Scalars of a step, constant but for the learning rate."""
        return DCASGDScalars(lr, self.momentum, self.lamda)

    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: DCASGDScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        *momentum, previous = state
        moved = w - previous
        # An infinite weight has not moved, though infinity minus infinity is NaN.
        compensated = g + s.lamda * (g * g) * torch.where(moved.isfinite(), moved, 0.0)
        previous = w.clone()  # w may be the weight itself, which is written first
        if not self.momentum:
            return w - s.lr * compensated, (previous,)
        moved = s.momentum * momentum[0] - s.lr * compensated
        return w + moved, (moved, previous)


@register
class DCASGD(DCASGDRule, Optimizer, learning_rate=0.1): ...
