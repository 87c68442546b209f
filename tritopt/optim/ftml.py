"""FTML with torch's interface."""

from __future__ import annotations

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import Betas, BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import ftml


class FTML(BeyondTorch):
    """Follow the moving leader (Zheng & Kwok 2017, ICML, PMLR 70:4110-4119, algorithm 1).

        g_t = grad + weight_decay w_{t-1}
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        d_t = (1 - beta1^t) / lr (sqrt(v_t / (1 - beta2^t)) + eps)
        z_t = beta1 z_{t-1} + (1 - beta1) g_t - (d_t - beta1 d_{t-1}) w_{t-1}
        w_t = -z_t / d_t

    State: d, v and z, at least fp32. A learning rate of 0 leaves weight and states alone. Defaults are the paper's
    betas and eps, and MXNet's rate.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate, per step.
        betas: decay rates of the samples' influence and of the second moment, in [0, 1).
        eps: added to the root.
        weight_decay: coupled (L2).
        options: see `Keywords`.
    """

    rule = ftml.FTMLRule

    def __init__(
        self,
        params: Params,
        lr: Rate = 0.0025,
        betas: Betas = (0.6, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Keywords],
    ) -> None:
        super().__init__(params, options, lr, weight_decay, betas=betas, eps=eps)
