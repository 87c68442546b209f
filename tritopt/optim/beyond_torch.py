"""What the optimizers that torch lacks have in common: torch's keyword arguments, and its checks."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch

from tritopt.optim.defaults import adam_defaults, torch_defaults
from tritopt.optim.optimizer import Optimizer, Options, Params

Rate: TypeAlias = float | torch.Tensor
Betas: TypeAlias = tuple[float | torch.Tensor, float | torch.Tensor]


class How(NamedTuple):
    """Keyword arguments of every optimizer, as torch's have them."""

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None


class BeyondTorch(Optimizer):
    """Base of optimizers that torch lacks.

    Args:
        params, how, options: as torch's; `Options`.
        lr, weight_decay: defaults of a param_group.
        own: its other defaults. lr, weight_decay, betas, eps and momentum are checked as torch checks them, the rest
            by the rule.
    """

    def __init__(self, params: Params, how: How, options: Options, lr: Rate, weight_decay: float, **own: Any) -> None:
        betas, n_betas = own.get("betas", (0.0, 0.0)), len(self.arguments.get("betas", "12"))
        if not isinstance(betas, list | tuple) or len(betas) != n_betas:
            raise ValueError(f"betas={betas!r} must be {n_betas} numbers")
        adam_defaults(lr, tuple(betas[:2]), own.get("eps", 0.0), weight_decay, **how._asdict())
        for i, beta in enumerate(betas[2:], 2):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        torch_defaults(torch.optim.SGD, momentum=own.get("momentum", 0.0))
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **own, **how._asdict()}, options)
