"""What the optimizers that torch lacks have in common: torch's keyword arguments, and its checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch

from tritopt.optim.defaults import check_kind, torch_defaults
from tritopt.optim.optimizer import Optimizer, Options, Params

Rate: TypeAlias = float | torch.Tensor
Betas: TypeAlias = tuple[float | torch.Tensor, float | torch.Tensor]
_ADAMW, _SGD = torch.optim.AdamW, torch.optim.SGD


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
        values = {"lr": lr, "weight_decay": weight_decay, **own}
        self.check_values({**values, **how._asdict()})
        super().__init__(params, {**values, **how._asdict()}, options)

    def check_values(self, values: Mapping[str, Any]) -> None:
        """In the words of torch's AdamW and SGD, which take them."""
        known = {name: values[name] for name in ("lr", "eps", "weight_decay", *How._fields) if name in values}
        if "betas" in values:
            betas = values["betas"]
            check_kind("betas", betas, (0.0,) * len(self.arguments["betas"]))
            known["betas"] = tuple(betas[:2])
            for i, beta in enumerate(betas[2:], 2):
                if not 0.0 <= beta < 1.0:
                    raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        torch_defaults(_ADAMW, **known)
        torch_defaults(_SGD, momentum=values.get("momentum", 0.0))
