"""Adamax, as torch defines it."""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import Unpack

from tritopt.engine.driver import Apply
from tritopt.kernels.adamax import adamax_floored_update
from tritopt.kernels.twins.ops import maximum
from tritopt.optim.defaults import torch_defaults
from tritopt.optim.optimizer import Optimizer, Options, Params
from tritopt.optimizers.adamax import AdamaxRule, AdamaxScalars
from tritopt.rule import Values, takes_arrays


class TorchAdamax(AdamaxRule):
    """MXNet's Adamax with torch's place of epsilon: on the gradient's size, and so inside the norm that is kept."""

    phases = (Apply(adamax_floored_update),)

    @takes_arrays
    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: AdamaxScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence of `Adamax` below: the new weight and states."""
        mean, norm = state
        mean = s.beta1 * mean + s.one_minus_beta1 * g
        norm = maximum(s.beta2 * norm, abs(g) + s.epsilon)
        return w - s.lr * (mean / norm), (mean, norm)


class Adamax(Optimizer):
    """`torch.optim.Adamax`: Adam with the infinity norm (Kingma & Ba 2014, arXiv:1412.6980, section 7.1).

        g_t = grad + weight_decay w_{t-1}
        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        u_t = max(beta2 u_{t-1}, |g_t| + eps)
        w_t = w_{t-1} - lr / (1 - beta1^t) * m_t / u_t

    State: exp_avg (m), exp_inf (u), the (master) weight's shape and dtype. Arguments and errors are torch's, and fused;
    options: `Options`.
    """

    rule = TorchAdamax
    torch_class = torch.optim.Adamax
    state_keys: ClassVar = {"mean": "exp_avg", "norm": "exp_inf"}
    sparse_error = "Adamax does not support sparse gradients"

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = torch_defaults(
            Adamax.torch_class,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )
        super().__init__(params, {**defaults, "fused": fused}, options)
