"""LAMB with torch's interface."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import Betas, BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import lamb


class LAMB(BeyondTorch):
    """Layer-wise adaptive moments (You et al. 2019, arXiv:1904.00962, algorithm 2).

        m_t = beta1 m_{t-1} + (1 - beta1) grad
        v_t = beta2 v_{t-1} + (1 - beta2) grad^2
        u_t = (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps) + weight_decay w_{t-1}
        r_t = min(max(|w_{t-1}|, lower_bound), upper_bound) / |u_t|, or 1 where a norm is 0 or |w| infinite
        w_t = w_{t-1} - lr r_t u_t

    |.| is the norm of a whole parameter, of its master if there is one; where |w| is infinite, nothing decays. State:
    exp_avg (m), exp_avg_sq (v), at least fp32. Defaults are those of apex's FusedLAMB, which also clips to a global
    norm of 1: pass max_grad_norm=1.0.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate per step, relative to a parameter's norm.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the root.
        weight_decay: share of the weight in the direction.
        bias_correction: whether to correct the moments for their zero start.
        lower_bound, upper_bound: bounds on the weight's norm. None or <= 0: unbounded.
        options: see `Keywords`.
    """

    rule = lamb.LAMBRule
    arguments: ClassVar = {
        "betas": ("beta1", "beta2"),
        "eps": "epsilon",
        "bias_correction": "bias_correction",
        "lower_bound": "lower_bound",
        "upper_bound": "upper_bound",
    }

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        lower_bound: float | None = None,
        upper_bound: float | None = None,
        **options: Unpack[Keywords],
    ) -> None:
        own = {"bias_correction": bias_correction, "lower_bound": lower_bound, "upper_bound": upper_bound}
        super().__init__(params, options, lr, weight_decay, betas=betas, eps=eps, **own)
