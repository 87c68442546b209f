"""NAG with torch's interface."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import nag


class NAG(BeyondTorch):
    """Nesterov accelerated gradient (Sutskever et al. 2013, ICML, equations 3 and 4, one momentum step ahead).

        g_t = grad + weight_decay w_{t-1}
        m_t = momentum m_{t-1} - lr g_t
        w_t = w_{t-1} + momentum m_t - lr g_t

    `SGD` with nesterov=True is the same as long as lr is constant; here lr is inside the buffer, so a change of it
    reaches the weights bit by bit. State: momentum_buffer (m), none with momentum=0. Defaults: lr of torch's SGD, the
    usual momentum.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate, per step.
        momentum: share of the last update that is kept, >= 0.
        weight_decay: coupled (L2).
        options: see `Keywords`.
    """

    rule = nag.NAGRule
    arguments: ClassVar = {"momentum": "momentum"}

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **options: Unpack[Keywords],
    ) -> None:
        super().__init__(params, options, lr, weight_decay, momentum=momentum)
