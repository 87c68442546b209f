"""NAG: SGD with Nesterov momentum."""

from __future__ import annotations

from typing import Any

import torch

from tritopt.engine.driver import Apply
from tritopt.kernels.nag import nag_update
from tritopt.kernels.sgd import sgd_update
from tritopt.mxnet.optimizer import register
from tritopt.optimizers.sgd import SGD, SGDRule, SGDScalars
from tritopt.rule import Values, takes_arrays


class NAGRule(SGDRule):
    """Nesterov accelerated gradient (Sutskever et al. 2013, eq. 3-4, stored one momentum step ahead).

        m_t = momentum m_{t-1} - lr g_t
        w_t = w_{t-1} + momentum m_t - lr g_t

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1}. State: m, as in SGD, whose checks it shares;
    momentum=0 is plain SGD. The learning rate is inside the buffer.

    Differs from MXNet's: negative momentum is refused.

    Args:
        learning_rate: per update.
        momentum: share of the last update that is kept, >= 0.
        kwargs: see `Optimizer`.
    """

    variants = ({}, {"momentum": 0.0})

    def __init__(self, momentum: float = 0.9, **common: Any) -> None:
        super().__init__(momentum=momentum, **common)

    @property
    def phases(self) -> tuple[Apply, ...]:
        """Phases of a step: one launch."""
        return (Apply(nag_update if self.momentum else sgd_update),)

    @takes_arrays
    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: SGDScalars) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        if not self.momentum:
            return super().reference(w, g, state, s)
        (momentum,) = state
        momentum = s.momentum * momentum - s.lr * g
        return w + (s.momentum * momentum - s.lr * g), (momentum,)


@register
class NAG(NAGRule, SGD, learning_rate=0.1):
    supports_lazy_update = False
