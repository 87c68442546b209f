"""Signum and signSGD with torch's interface."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import signum


class TorchSignum(signum.SignumRule):
    """MXNet's Signum, which takes the gradient as it is without momentum; here maximize must turn it."""

    @property
    def preamble(self) -> str:
        """Preamble: without momentum the scaled gradient, unclipped."""
        return "coupled" if self.momentum else "rescaled"


class Signum(BeyondTorch):
    """Sign of the averaged gradient (Bernstein et al. 2018, arXiv:1802.04434, algorithms 1 and 2).

        momentum == 0:  w_t = w_{t-1} - lr (weight_decay + wd_lh) w_{t-1} - lr sign(grad)
        otherwise:      m_t = momentum m_{t-1} - (1 - momentum) (grad + weight_decay w_{t-1})
                        w_t = w_{t-1} - lr wd_lh w_{t-1} + lr sign(m_t)

    sign(0) = 0 and sign(NaN) = NaN. State: momentum_buffer (m), none with momentum=0. Defaults are MXNet's.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate, per step; also what an element moves by.
        momentum: share of the average that is kept, in [0, 1).
        weight_decay: coupled (L2) with momentum, otherwise decoupled.
        wd_lh: decoupled decay (Loshchilov & Hutter 2017, arXiv:1711.05101) in both cases.
        options: see `Keywords`.
    """

    rule = TorchSignum
    arguments: ClassVar = {"momentum": "momentum", "wd_lh": "wd_lh"}

    def __init__(
        self,
        params: Params,
        lr: Rate = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        wd_lh: float = 0.0,
        **options: Unpack[Keywords],
    ) -> None:
        super().__init__(params, options, lr, weight_decay, momentum=momentum, wd_lh=wd_lh)
