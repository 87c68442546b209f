"""SGLD: stochastic gradient Langevin dynamics."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import sgld


class SGLD(BeyondTorch):
    """Stochastic gradient Langevin dynamics (Welling & Teh 2011, ICML, equation 4).

        w_t = w_{t-1} - lr / 2 (grad + weight_decay w_{t-1}) + sqrt(lr) z_t,   z_t normal, mean 0, variance 1

    grad should be that of the negative log posterior of the whole data set. No state beside the step. z is a function
    of (seed, the parameter's name or, without names, its place among all parameters, step, the element's position), the
    same on every machine: a resumed run continues with the noise that an uninterrupted one has. A shard of a parameter
    has noise of its own. Defaults are MXNet's.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: learning rate, per step; also the variance of the noise.
        weight_decay: coupled (L2): a normal prior.
        seed: seed of the noise, an int >= 0.
        options: see `Keywords`. The noise is neither scaled nor clipped.
    """

    rule = sgld.SGLDRule
    arguments: ClassVar = {"seed": "seed"}

    def __init__(
        self,
        params: Params,
        lr: Rate = 0.1,
        weight_decay: float = 0.0,
        seed: int = 0,
        **options: Unpack[Keywords],
    ) -> None:
        super().__init__(params, options, lr, weight_decay, seed=seed)
