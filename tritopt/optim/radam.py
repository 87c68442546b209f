"""RAdam, as torch defines it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from typing_extensions import Unpack

from tritopt.engine.driver import Apply
from tritopt.kernels.radam import radam_decayed_update
from tritopt.optim.defaults import torch_defaults
from tritopt.optim.optimizer import Optimizer, Options, Params
from tritopt.optimizers.radam import RAdamRule
from tritopt.rule import Values, takes_arrays


class TorchRAdamScalars(NamedTuple):
    """`RAdamScalars`, and the decay that torch's RAdam may have."""

    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    epsilon: float
    adaptive: float
    keep: float
    """Share of the old weight that stays."""


class TorchRAdam(RAdamRule):
    """The paper's RAdam that rectifies from 5 on, with a choice of decays."""

    phases = (Apply(radam_decayed_update),)
    variants = ({}, {"beta1": 0.5, "beta2": 0.8, "epsilon": 1e-3, "decoupled": True, "begin_num_update": 8})

    def __init__(self, decoupled: bool = False, **arguments: Any) -> None:
        super().__init__(rectify_above=5.0, **arguments)
        self.decoupled = bool(decoupled)

    @property
    def preamble(self) -> str:
        """Decoupled or coupled (L2) decay."""
        return "decoupled" if self.decoupled else "coupled"

    def scalars(self, lr: Any, wd: float, count: Any) -> TorchRAdamScalars:  # type: ignore[override]
        """Scalars of the paper's RAdam, and the decay."""
        return TorchRAdamScalars(*super().scalars(lr, wd, count), 1 - lr * wd if self.decoupled else 1.0)

    @takes_arrays
    def reference(  # type: ignore[override]
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: TorchRAdamScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence of `RAdam` below: the new weight and states."""
        return super().reference(s.keep * w, g, state, s)  # type: ignore[arg-type]


class RAdam(Optimizer):
    """`torch.optim.RAdam`: rectified Adam (Liu et al. 2019, arXiv:1908.03265).

        g_t = grad + weight_decay w_{t-1}
        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t),  rho_inf = 2 / (1 - beta2) - 1
        rho_t > 5:  r_t = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))
                    w_t = w_{t-1} - lr r_t m_t / (1 - beta1^t) * sqrt(1 - beta2^t) / (sqrt(v_t) + eps)
        otherwise:  w_t = w_{t-1} - lr m_t / (1 - beta1^t)

    With decoupled_weight_decay g_t is the gradient alone, and w_t is less lr weight_decay w_{t-1}. State: exp_avg (m),
    exp_avg_sq (v), the (master) weight's shape and dtype. Arguments and errors are torch's, and fused; options:
    `Options`.
    """

    rule = TorchRAdam
    torch_class = torch.optim.RAdam
    arguments: ClassVar = {
        "betas": ("beta1", "beta2"),
        "eps": "epsilon",
        "decoupled_weight_decay": "decoupled",
    }
    sparse_error = "RAdam does not support sparse gradients"

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = torch_defaults(
            RAdam.torch_class,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        super().__init__(params, {**defaults, "fused": fused}, options)
