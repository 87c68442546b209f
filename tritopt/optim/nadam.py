"""NAdam, as torch defines it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from typing_extensions import Unpack

from tritopt.engine.driver import Apply
from tritopt.kernels.nadam import nadam_decayed_update
from tritopt.optim.defaults import torch_defaults
from tritopt.optim.optimizer import Optimizer, Options, Params
from tritopt.optimizers.nadam import NadamRule
from tritopt.rule import Values, takes_arrays


class TorchNAdamScalars(NamedTuple):
    """`NadamScalars`, and the decay that torch's NAdam may have."""

    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    epsilon: float
    mean_share: float
    grad_share: float
    var_correction: float
    keep: float
    """Share of the old weight that stays."""


class TorchNAdam(NadamRule):
    """MXNet's Nadam, with the schedule's product as a state, and with a choice of decays."""

    phases = (Apply(nadam_decayed_update),)
    scalar_states: ClassVar = {"mu_product": 1.0}
    variants = ({}, {"beta1": 0.5, "beta2": 0.8, "epsilon": 1e-3, "schedule_decay": 5.0, "decoupled": True})

    def __init__(self, decoupled: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.decoupled = bool(decoupled)

    @property
    def preamble(self) -> str:
        """Decoupled or coupled (L2) decay."""
        return "decoupled" if self.decoupled else "coupled"

    def _mu(self, count: Any) -> Any:
        return self.beta1 * (1 - 0.5 * 0.96 ** (count * self.schedule_decay))

    def factors(self, name: str, counts: torch.Tensor) -> torch.Tensor:
        """Factor mu_t of the schedule's product at these counts, fp64 [parameters]."""
        mu: torch.Tensor = self._mu(counts)
        return mu

    def scalars(  # type: ignore[override]
        self, lr: Any, wd: float, count: Any, mu_product: Any = 0.0
    ) -> TorchNAdamScalars:
        """The shares of mean and gradient, and the variance's correction as a factor. `mu_product`: Pi_t."""
        mu, next_mu = self._mu(count), self._mu(count + 1)
        return TorchNAdamScalars(
            lr=lr,
            beta1=self.beta1,
            one_minus_beta1=1 - self.beta1,
            beta2=self.beta2,
            one_minus_beta2=1 - self.beta2,
            epsilon=self.epsilon,
            mean_share=next_mu / (1 - mu_product * next_mu),
            grad_share=(1 - mu) / (1 - mu_product),
            var_correction=1 / (1 - self.beta2**count),
            keep=1 - lr * wd if self.decoupled else 1.0,
        )

    @takes_arrays
    def reference(  # type: ignore[override]
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: TorchNAdamScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence of `NAdam` below: the new weight and states."""
        return super().reference(s.keep * w, g, state, s)  # type: ignore[arg-type]


class NAdam(Optimizer):
    """`torch.optim.NAdam`: Adam with Nesterov momentum (Dozat 2016, "Incorporating Nesterov Momentum into Adam").

        g_t = grad + weight_decay w_{t-1}
        mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2),   Pi_t = mu_1 mu_2 ... mu_t
        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        n_t = mu_{t+1} / (1 - Pi_{t+1}) m_t + (1 - mu_t) / (1 - Pi_t) g_t
        w_t = w_{t-1} - lr n_t / (sqrt(v_t / (1 - beta2^t)) + eps)

    With decoupled_weight_decay g_t is the gradient alone, and w_t is less lr weight_decay w_{t-1}. State: exp_avg (m),
    exp_avg_sq (v), the (master) weight's shape and dtype, and mu_product (Pi), fp32 []. Arguments and errors are
    torch's, and fused; options: `Options`.
    """

    rule = TorchNAdam
    torch_class = torch.optim.NAdam
    arguments: ClassVar = {
        "betas": ("beta1", "beta2"),
        "eps": "epsilon",
        "momentum_decay": "schedule_decay",
        "decoupled_weight_decay": "decoupled",
    }
    sparse_error = "NAdam does not support sparse gradients"

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            NAdam.torch_class,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        super().__init__(params, {**defaults, "fused": fused}, options)
