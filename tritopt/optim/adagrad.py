"""Adagrad, as torch defines it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn.parameter import is_lazy
from typing_extensions import Unpack

from tritopt.engine import validate
from tritopt.optim.defaults import torch_defaults
from tritopt.optim.optimizer import Optimizer, Options, Params
from tritopt.optimizers.adagrad import AdaGradRule, AdaGradScalars
from tritopt.rule import Rule


class TorchAdagrad(AdaGradRule):
    """MXNet's AdaGrad with a decay of the learning rate, and a sum that need not begin with zero."""

    variants = ({}, {"lr_decay": 0.1, "initial": 0.5, "epsilon": 0.1})

    def __init__(self, lr_decay: float = 0.0, initial: float = 0.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.lr_decay = validate.nonnegative("lr_decay", lr_decay)
        self.initial = validate.nonnegative("initial_accumulator_value", initial)

    def create_state(self, index: Any, weight: torch.Tensor) -> torch.Tensor:
        """State that holds the sum's first value."""
        state: torch.Tensor = super().create_state(index, weight)
        return state.fill_(self.initial)

    def scalars(self, lr: Any, wd: float, count: Any) -> AdaGradScalars:
        """Scalars of a step, whose learning rate decays with the count."""
        return AdaGradScalars(lr / (1 + (count - 1) * self.lr_decay), self.epsilon)


class Adagrad(Optimizer):
    """`torch.optim.Adagrad`: adaptive subgradients (Duchi, Hazan & Singer 2011, JMLR 12:2121-2159).

        g_t = grad + weight_decay w_{t-1}
        s_t = s_{t-1} + g_t^2,  s_0 = initial_accumulator_value
        w_t = w_{t-1} - lr / (1 + (t - 1) lr_decay) * g_t / (sqrt(s_t) + eps)

    State: sum (s), the (master) weight's shape, at least fp32, and step; made by the constructor, as torch's. Sparse
    gradients are taken as dense ones with zero rows. As in torch, initial_accumulator_value is the constructor's,
    whatever a group says. Arguments and errors are torch's, and capturable; options: `Options`.
    """

    rule = TorchAdagrad
    torch_class = torch.optim.Adagrad
    arguments: ClassVar = {"lr_decay": "lr_decay", "eps": "epsilon", "initial_accumulator_value": "initial"}
    state_keys: ClassVar = {"history": "sum"}

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = torch_defaults(
            Adagrad.torch_class,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, {**defaults, "capturable": capturable}, options)

        if any(is_lazy(param) for group in self.param_groups for param in group["params"]):
            raise ValueError(
                "Adagrad makes the states of all parameters at once, and one is an uninitialized parameter, which has "
                "no shape before its module has run: run the module once before"
            )
        self._stepper.create_states(self)

    def share_memory(self) -> None:
        """Move the sums to shared memory, as torch does for training in several processes."""
        for state in self.state.values():
            for name, value in state.items():
                if name.startswith("sum"):
                    value.share_memory_()

    def rule_of(self, group: dict[str, Any]) -> Rule:
        """The rule with a group's hyperparameters; torch's takes the sum's first value from the constructor."""
        name = "initial_accumulator_value"
        return super().rule_of({**group, name: self.defaults[name]})

    def sparse_error_of(self, group: dict[str, Any]) -> str | None:
        """torch's message where a group has a decay, with which it takes no sparse gradients; None: it takes them."""
        return "weight_decay option is not compatible with sparse gradients" if group["weight_decay"] else None
