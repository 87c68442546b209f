"""Lion with torch's interface."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import Betas, BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import lion


class Lion(BeyondTorch):
    """Evolved sign momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

        c_t = beta1 m_{t-1} + (1 - beta1) grad
        m_t = beta2 m_{t-1} + (1 - beta2) grad
        w_t = w_{t-1} - lr (sign(c_t) + weight_decay w_{t-1})

    State: exp_avg (m). Every element moves by lr, so the paper advises a learning rate 3 to 10 times smaller than
    AdamW's and a weight decay as much larger. Defaults are those of the authors' code.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate, per step; also what an element moves by.
        betas: share of the past in the direction, and decay rate of the momentum; in [0, 1).
        weight_decay: decoupled.
        options: see `Keywords`.
    """

    rule = lion.LionRule
    arguments: ClassVar = {"betas": ("beta1", "beta2")}
    state_keys: ClassVar = {"momentum": "exp_avg"}

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Keywords],
    ) -> None:
        super().__init__(params, options, lr, weight_decay, betas=betas)
