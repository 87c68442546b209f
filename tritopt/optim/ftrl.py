"""Ftrl with torch's interface."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import ftrl


class Ftrl(BeyondTorch):
    """Follow the regularized leader, proximally (McMahan et al. 2013, KDD, doi:10.1145/2487575.2488200, algorithm 1).

        n_t = n_{t-1} + grad^2
        z_t = z_{t-1} + grad - (sqrt(n_t) - sqrt(n_{t-1})) / lr w_{t-1}
        w_t = -sign(z_t) max(|z_t| - lambda1, 0) / ((beta + sqrt(n_t)) / lr + weight_decay)

    State: z and n, at least fp32. The weight follows from the states alone: one whose gradient has always been 0
    becomes 0, also where a sparse gradient has no row, and an infinite one NaN. A learning rate of 0 leaves weight and
    states alone. Defaults are MXNet's.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate, per step.
        lambda1: strength of the L1 penalty, >= 0.
        beta: added to the root, >= 0. The larger, the shorter are the first steps.
        weight_decay: strength of the L2 penalty.
        options: see `Keywords`.
    """

    rule = ftrl.FtrlRule
    arguments: ClassVar = {"lambda1": "lamda1", "beta": "beta"}

    def __init__(
        self,
        params: Params,
        lr: Rate = 0.1,
        lambda1: float = 0.01,
        beta: float = 1.0,
        weight_decay: float = 0.0,
        **options: Unpack[Keywords],
    ) -> None:
        super().__init__(params, options, lr, weight_decay, lambda1=lambda1, beta=beta)
