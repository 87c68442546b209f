"""NAG: SGD with Nesterov momentum."""

from __future__ import annotations

from typing import Any

import torch

from tritopt.engine.driver import Apply
from tritopt.kernels.nag import nag_update
from tritopt.kernels.sgd import sgd_update
from tritopt.mxnet.optimizer import Values
from tritopt.mxnet.registry import register
from tritopt.optimizers.sgd import SGD, SGDScalars


@register
class NAG(SGD):
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

    supports_lazy_update = False
    variants = ({}, {"momentum": 0.0})

    def __init__(
        self,
        learning_rate: float | None = 0.1,
        momentum: float = 0.9,
        multi_precision: bool = False,
        use_fused_step: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate, momentum, multi_precision=multi_precision, use_fused_step=use_fused_step, **kwargs
        )

    @property
    def phases(self) -> tuple[Apply, ...]:
        """One launch."""
        return (Apply(nag_update if self.momentum else sgd_update),)

    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: SGDScalars) -> tuple[torch.Tensor, Values]:
        """The recurrence above."""
        if not self.momentum:
            return super().reference(w, g, state, s)
        (momentum,) = state
        momentum = s.momentum * momentum - s.lr * g
        return w + (s.momentum * momentum - s.lr * g), (momentum,)
