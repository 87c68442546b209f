"""Base of the optimizers that torch lacks: torch's keyword arguments, and its checks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import torch

from tritopt.optim.defaults import check_kind, torch_defaults
from tritopt.optim.optimizer import Optimizer, Options, Params

Rate: TypeAlias = float | torch.Tensor
Betas: TypeAlias = tuple[float | torch.Tensor, float | torch.Tensor]
_ADAMW, _SGD = torch.optim.AdamW, torch.optim.SGD


class Keywords(Options, total=False):
    """Keyword arguments of optimizers that torch lacks: torch's own, as its AdamW has them, and `Options`."""

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None


class BeyondTorch(Optimizer):
    """Base of optimizers that torch lacks.

    Args:
        params: parameters or param_groups, as torch takes them.
        options: the keyword arguments that all have.
        lr, weight_decay: defaults of a param_group.
        own: its other defaults. lr, weight_decay, betas, eps and momentum are checked as torch checks them, the rest
            by the rule.
    """

    keywords: ClassVar[Mapping[str, bool | None]] = {
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
    }

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show torch's keywords in the signature of a constructor that takes them among its options."""
        super().__init_subclass__(**kwargs)
        init: Any = vars(cls).get("__init__")
        given = list(inspect.signature(init).parameters.values()) if init else []
        if given and given[-1].kind is inspect.Parameter.VAR_KEYWORD and given[-1].name == "options":
            of_torch = [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
                for name, default in cls.keywords.items()
                if name not in {parameter.name for parameter in given}
            ]
            init.__signature__ = inspect.Signature([*given[:-1], *of_torch, given[-1]])

    def __init__(self, params: Params, options: Keywords, lr: Rate, weight_decay: float, **own: Any) -> None:
        given: dict[str, Any] = dict(options)
        of_torch = {name: given.pop(name, default) for name, default in self.keywords.items()}
        values = {"lr": lr, "weight_decay": weight_decay, **own, **of_torch}
        self.check_values(values)
        super().__init__(params, values, given)  # type: ignore[arg-type]

    def check_values(self, values: Mapping[str, Any]) -> None:
        """ValueError in the words of torch's AdamW and SGD, which take these hyperparameters."""
        known = {name: values[name] for name in ("lr", "eps", "weight_decay", *self.keywords) if name in values}
        if "betas" in values:
            betas = values["betas"]
            check_kind("betas", betas, (0.0,) * len(self.arguments["betas"]))
            known["betas"] = tuple(betas[:2])
            for i, beta in enumerate(betas[2:], 2):
                if not 0.0 <= beta < 1.0:
                    raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        torch_defaults(_ADAMW, **known)
        torch_defaults(_SGD, momentum=values.get("momentum", 0.0))
