"""AdaBelief with torch's interface."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import Betas, BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import adabelief


class TorchAdaBelief(adabelief.AdaBeliefRule):
    """MXNet's AdaBelief; a scale of 0 is nothing special in torch."""

    skips_zero_rescale = False


class AdaBelief(BeyondTorch):
    """Adam that steps by its belief in the gradient (Zhuang et al. 2020, arXiv:2010.07468, algorithm 2).

        g_t = grad + weight_decay w_{t-1}
        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) (g_t - m_t)^2 + eps
        w_t = w_{t-1} - lr sqrt(1 - beta2^t) / (1 - beta1^t) m_t / (sqrt(v_t) + eps)

    State: exp_avg (m), exp_avg_var (v). eps accumulates in v, up to eps / (1 - beta2). clip_value bounds grad and decay
    together. Defaults are those of the authors' package for PyTorch, which adds the second eps to the corrected root,
    and decays the weight itself.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate, per step.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the variance at each step, and to its root.
        weight_decay: coupled (L2).
        correct_bias: whether to correct the moments for their zero start.
        options: see `Keywords`.
    """

    rule = TorchAdaBelief
    arguments: ClassVar = {"betas": ("beta1", "beta2"), "eps": "epsilon", "correct_bias": "correct_bias"}
    state_keys: ClassVar = {"mean": "exp_avg", "var": "exp_avg_var"}

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        **options: Unpack[Keywords],
    ) -> None:
        super().__init__(params, options, lr, weight_decay, betas=betas, eps=eps, correct_bias=correct_bias)
