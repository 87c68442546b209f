"""LANS with torch's interface."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import Betas, BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import lans


class LANS(BeyondTorch):
    """Nesterov-like LAMB on normalised gradients (Zheng et al. 2020, arXiv:2006.13484, algorithm 2).

        g_t = grad / |grad|, or 0 where the norm is 0
        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        d_t = sqrt(v_t / (1 - beta2^t)) + eps
        p_t = m_t / (1 - beta1^t) / d_t + weight_decay w_{t-1}
        q_t = g_t / d_t + weight_decay w_{t-1}
        w_t = w_{t-1} - lr (beta1 r(p_t) p_t + (1 - beta1) r(q_t) q_t)

    where r(x) = min(max(|w_{t-1}|, lower_bound), upper_bound) / |x|, or 1 where a norm is 0 or |w| infinite; |.| is the
    norm of a whole parameter, of its master if there is one; where |w| is infinite, nothing decays. State: exp_avg (m),
    exp_avg_sq (v), at least fp32. clip_value bounds the elements of the normalised gradient. Defaults are those of
    `LAMB`.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate per step, relative to a parameter's norm.
        betas: decay rates of the moments, in [0, 1); the first is the mean's share in the step, too.
        eps: added to the root.
        weight_decay: share of the weight in both directions.
        lower_bound, upper_bound: bounds on the weight's norm. None or <= 0: unbounded.
        options: see `Keywords`.
    """

    rule = lans.LANSRule
    arguments: ClassVar = {
        "betas": ("beta1", "beta2"),
        "eps": "epsilon",
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
        lower_bound: float | None = None,
        upper_bound: float | None = None,
        **options: Unpack[Keywords],
    ) -> None:
        own = {"lower_bound": lower_bound, "upper_bound": upper_bound}
        super().__init__(params, options, lr, weight_decay, betas=betas, eps=eps, **own)
