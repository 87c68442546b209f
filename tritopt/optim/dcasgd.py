"""DCASGD: asynchronous SGD with delay compensation."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import dcasgd


class DCASGD(BeyondTorch):
    """Delay-compensated asynchronous SGD (Zheng et al. 2016, arXiv:1609.08326).

        g_t = grad + weight_decay w_{t-1}
        d_t = g_t + lambd g_t^2 (w_{t-1} - p_{t-1})
        p_t = w_{t-1}
        m_t = momentum m_{t-1} - lr d_t
        w_t = w_{t-1} + m_t

    State: previous_weight (p), at first the weight, and momentum_buffer (m), none with momentum=0. The paper's p is the
    weight that a worker computed its gradient from. Defaults are MXNet's.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate, per step.
        momentum: share of the last update that is kept, >= 0.
        lambd: strength of the compensation.
        weight_decay: coupled (L2).
        options: see `Keywords`.
    """

    rule = dcasgd.DCASGDRule
    arguments: ClassVar = {"momentum": "momentum", "lambd": "lamda"}

    def __init__(
        self,
        params: Params,
        lr: Rate = 0.1,
        momentum: float = 0.0,
        lambd: float = 0.04,
        weight_decay: float = 0.0,
        **options: Unpack[Keywords],
    ) -> None:
        super().__init__(params, options, lr, weight_decay, momentum=momentum, lambd=lambd)
