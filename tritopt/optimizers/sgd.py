"""SGD, with or without momentum."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.sgd import sgd_momentum_update, sgd_update
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values, takes_arrays


class SGDScalars(NamedTuple):
    """Scalars that the update of SGD reads beside its tensors."""

    lr: float
    momentum: float


class SGDRule(Rule):
    """Stochastic gradient descent with heavy-ball momentum (Polyak 1964; MXNet's `sgd_mom_update`).

        momentum == 0:  w_t = w_{t-1} - lr g_t
        otherwise:      m_t = momentum m_{t-1} - lr g_t
                        w_t = w_{t-1} + m_t

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1}. State: m, the (master) weight's shape and
    dtype, zero at first; none without momentum. Unlike torch's, the buffer holds the learning rate: a new lr leaves the
    past as it was.

    Differs from MXNet's: negative momentum is refused, which MXNet honours or drops, depending on the path.

    Args:
        learning_rate: per update.
        momentum: share of the last update that is kept, >= 0.
        lazy_update: update only the rows present in a row-sparse gradient.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: momentum < 0, or lazy_update with use_fused_step=False or multi_precision=True.
    """

    variants = ({}, {"momentum": 0.9})

    def __init__(self, momentum: float = 0.0, **common: Any) -> None:
        super().__init__(**common)
        self.momentum = validate.nonnegative("momentum", momentum)

    @property
    def phases(self) -> tuple[Apply, ...]:
        """Phases of a step: one launch."""
        return (Apply(sgd_momentum_update if self.momentum else sgd_update),)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The momentum buffer, if there is momentum."""
        return ("momentum",) if self.momentum else ()

    def scalars(self, lr: float, wd: float, count: int) -> SGDScalars:
        """Scalars of a step, constant but for the learning rate."""
        return SGDScalars(lr, self.momentum)

    @takes_arrays
    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: SGDScalars) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        if not self.momentum:
            return w - s.lr * g, ()
        (momentum,) = state
        momentum = s.momentum * momentum - s.lr * g
        return w + momentum, (momentum,)


@register
class SGD(SGDRule, Optimizer):
    supports_lazy_update = True

    def __init__(
        self,
        learning_rate: float | None = 0.1,
        momentum: float = 0.0,
        lazy_update: bool = False,
        multi_precision: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            momentum=momentum,
            learning_rate=learning_rate,
            multi_precision=multi_precision,
            lazy_update=lazy_update,
            **kwargs,
        )
        if lazy_update and multi_precision:
            raise ValueError("lazy_update=True keeps no fp32 master: drop multi_precision=True")
