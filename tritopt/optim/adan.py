"""Adan with torch's interface."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import adan


class Adan(BeyondTorch):
    """Adaptive Nesterov momentum (Xie et al. 2022, arXiv:2208.06677, algorithm 1 as the authors' code has it).

        d_t = grad_t - grad_{t-1}, and d_1 = 0
        m_t = beta1 m_{t-1} + (1 - beta1) grad_t
        v_t = beta2 v_{t-1} + (1 - beta2) d_t
        n_t = beta3 n_{t-1} + (1 - beta3) (grad_t + beta2 d_t)^2
        u_t = (m_t / (1 - beta1^t) + beta2 v_t / (1 - beta2^t)) / (sqrt(n_t / (1 - beta3^t)) + eps)
        w_t = (w_{t-1} - lr u_t) / (1 + lr weight_decay)

    State: exp_avg (m), exp_avg_diff (v), exp_avg_sq (n), previous_grad. The gradient that is kept is the clipped one;
    the loss scale is taken out. Defaults are those of the authors' code, with the decay that they advise. It is their
    no_prox=False.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate, per step.
        betas: decay rates of the means of gradients, of their differences and of their squares, in [0, 1).
        eps: added to the corrected root.
        weight_decay: proximal, as above.
        options: see `Keywords`.
    """

    rule = adan.AdanRule
    arguments: ClassVar = {"betas": ("beta1", "beta2", "beta3"), "eps": "epsilon"}
    state_keys: ClassVar = {"mean": "exp_avg", "diff": "exp_avg_diff", "var": "exp_avg_sq"}

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: tuple[Rate, Rate, Rate] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.02,
        **options: Unpack[Keywords],
    ) -> None:
        super().__init__(params, options, lr, weight_decay, betas=betas, eps=eps)
