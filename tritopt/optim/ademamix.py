"""AdEMAMix with torch's interface."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import ademamix


class AdEMAMix(BeyondTorch):
    """AdamW with a second, slower mean of the gradients (Pagliardini et al. 2024, arXiv:2409.03137, algorithm 1).

        m_t = beta1 m_{t-1} + (1 - beta1) grad
        s_t = beta3_t s_{t-1} + (1 - beta3_t) grad
        v_t = beta2 v_{t-1} + (1 - beta2) grad^2
        u_t = (m_t / (1 - beta1^t) + alpha_t s_t) / (sqrt(v_t / (1 - beta2^t)) + eps)
        w_t = w_{t-1} - lr (u_t + weight_decay w_{t-1})

        alpha_t = alpha min(t / t_alpha, 1)
        ln beta3_t = ln beta1 ln beta3 / ((1 - a) ln beta3 + a ln beta1),  a = min(t / t_beta3, 1)

    State: exp_avg (m), exp_avg_slow (s), exp_avg_sq (v). Defaults are those of bitsandbytes.
    The paper lets both warm-ups last as long as the training: give t_alpha and t_beta3 the number of its steps.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate, per step.
        betas: decay rates of the fast mean, of the squares, and of the slow mean after its warm-up; in [0, 1).
        alpha: weight of the slow mean after its warm-up, >= 0.
        t_alpha, t_beta3: steps that the warm-ups of alpha and beta3 last. None or 0: none.
        eps: added to the corrected root.
        weight_decay: decoupled.
        options: see `Keywords`.
    """

    rule = ademamix.AdEMAMixRule
    arguments: ClassVar = {
        "betas": ("beta1", "beta2", "beta3"),
        "alpha": "alpha",
        "t_alpha": "t_alpha",
        "t_beta3": "t_beta3",
        "eps": "epsilon",
    }
    state_keys: ClassVar = {"mean": "exp_avg", "slow_mean": "exp_avg_slow", "var": "exp_avg_sq"}

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: tuple[Rate, Rate, Rate] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **options: Unpack[Keywords],
    ) -> None:
        super().__init__(
            params, options, lr, weight_decay, betas=betas, alpha=alpha, t_alpha=t_alpha, t_beta3=t_beta3, eps=eps
        )
