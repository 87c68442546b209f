"""RMSprop, as torch defines it."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from typing_extensions import Unpack

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.formats.states import SQUARES
from tritopt.kernels.rmsprop import (
    rmsprop_deviation_momentum_update,
    rmsprop_deviation_update,
    rmsprop_momentum_update,
    rmsprop_update,
)
from tritopt.kernels.twins.ops import sqrt
from tritopt.optim.defaults import torch_defaults
from tritopt.optim.optimizer import Optimizer, Options, Params
from tritopt.rule import Rule, Values, takes_arrays


class TorchRMSpropScalars(NamedTuple):
    """Scalars that the update reads beside its tensors."""

    lr: float
    rho: float
    one_minus_rho: float
    momentum: float
    epsilon: float
    clip_weights: float
    """Bound on weights, which MXNet's plain update has; infinity: there is none."""


class TorchRMSprop(Rule):
    """The recurrence of `RMSprop` below; MXNet's centered form and momentum are others."""

    least_state_dtype = torch.float32
    variants = ({}, {"momentum": 0.9}, {"centered": True}, {"centered": True, "momentum": 0.9})

    def __init__(
        self,
        alpha: float = 0.99,
        epsilon: float = 1e-8,
        momentum: float = 0.0,
        centered: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.alpha = validate.nonnegative("alpha", alpha)
        if self.alpha > 1:  # torch takes it; a checkpoint of a class that means something else by it may bring it
            raise ValueError(f"alpha={alpha!r} must be in [0, 1]: beyond, the mean of squares becomes negative")
        self.epsilon = validate.nonnegative("epsilon", epsilon)
        self.momentum = validate.nonnegative("momentum", momentum)
        self.centered = bool(centered)

    @property
    def phases(self) -> tuple[Apply, ...]:
        """Phases of a step: one launch."""
        if self.centered:
            return (Apply(rmsprop_deviation_momentum_update if self.momentum else rmsprop_deviation_update),)
        return (Apply(rmsprop_momentum_update if self.momentum else rmsprop_update),)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The second moment, the mean if centered, the buffer if there is momentum."""
        return ("square_avg", *["grad_avg"] * self.centered, *["momentum_buffer"] * (self.momentum > 0))

    @property
    def state_kinds(self) -> dict[str, str | None]:
        """Kind of the second moment; none if centered, where rounding would make v - n^2 negative."""
        return {"square_avg": None if self.centered else SQUARES}

    def scalars(self, lr: Any, wd: float, count: Any) -> TorchRMSpropScalars:
        """Scalars of a step, constant but for the learning rate."""
        return TorchRMSpropScalars(lr, self.alpha, 1 - self.alpha, self.momentum, self.epsilon, math.inf)

    @takes_arrays
    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: TorchRMSpropScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence of `RMSprop` below: the new weight and states."""
        var, *others = state
        var = s.rho * var + s.one_minus_rho * (g * g)
        new, variance = [var], var
        if self.centered:
            mean = s.rho * others.pop(0) + s.one_minus_rho * g
            new, variance = [var, mean], var - mean * mean
        step = g / (sqrt(variance) + s.epsilon)
        if self.momentum:
            step = s.momentum * others.pop() + step
            new.append(step)
        return w - s.lr * step, tuple(new)


class RMSprop(Optimizer):
    """`torch.optim.RMSprop`: gradients over their root mean square (Tieleman & Hinton 2012, Coursera lecture 6.5), or
    over their standard deviation if centered (Graves 2013, arXiv:1308.0850).

        g_t = grad + weight_decay w_{t-1}
        v_t = alpha v_{t-1} + (1 - alpha) g_t^2
        n_t = alpha n_{t-1} + (1 - alpha) g_t          if centered, otherwise 0
        q_t = g_t / (sqrt(v_t - n_t^2) + eps)
        b_t = momentum b_{t-1} + q_t
        w_t = w_{t-1} - lr b_t

    State: square_avg (v), grad_avg (n) if centered, momentum_buffer (b) with momentum, the (master) weight's shape, at
    least fp32. As in torch, a centered weight becomes NaN where gradients vary so little that rounding makes v - n^2
    negative. Arguments and errors are torch's, and fused; an alpha above 1, which torch takes, is refused. options:
    `Options`.
    """

    rule = TorchRMSprop
    torch_class = torch.optim.RMSprop
    arguments: ClassVar = {"alpha": "alpha", "eps": "epsilon", "momentum": "momentum", "centered": "centered"}
    sparse_error = "RMSprop does not support sparse gradients"

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = torch_defaults(
            RMSprop.torch_class,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
        super().__init__(params, {**defaults, "fused": fused}, options)
