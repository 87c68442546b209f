"""Adadelta, as torch defines it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from tritopt.engine import validate
from tritopt.optim.defaults import torch_defaults
from tritopt.optim.optimizer import Optimizer, Options, Params
from tritopt.optimizers.adadelta import AdaDeltaRule


class TorchAdadelta(AdaDeltaRule):
    """MXNet's AdaDelta, which is torch's; rho may be 1."""

    def __init__(self, rho: float = 0.9, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.rho = validate.nonnegative("rho", rho)


class Adadelta(Optimizer):
    """`torch.optim.Adadelta`: steps in the units of the weight (Zeiler 2012, arXiv:1212.5701).

        g_t = grad + weight_decay w_{t-1}
        v_t = rho v_{t-1} + (1 - rho) g_t^2
        d_t = sqrt(u_{t-1} + eps) / sqrt(v_t + eps) g_t
        u_t = rho u_{t-1} + (1 - rho) d_t^2
        w_t = w_{t-1} - lr d_t

    State: square_avg (v) and acc_delta (u), the (master) weight's shape, at least fp32. Arguments and errors are
    torch's, and fused; options: `Options`.
    """

    rule = TorchAdadelta
    torch_class = torch.optim.Adadelta
    arguments: ClassVar = {"rho": "rho", "eps": "epsilon"}
    state_keys: ClassVar = {"acc_g": "square_avg"}
    sparse_error = "Adadelta does not support sparse gradients"

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = torch_defaults(
            Adadelta.torch_class,
            lr=lr,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
        )
        super().__init__(params, {**defaults, "fused": fused}, options)
