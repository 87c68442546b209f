"""Adam and AdamW, as torch defines them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from tritopt.engine.scalars import sqrt
from tritopt.optim.defaults import torch_defaults
from tritopt.optim.optimizer import Optimizer, Options, Params
from tritopt.optimizers.adam import bias_corrected
from tritopt.optimizers.adamw import AdamWRule, AdamWScalars


class TorchAdam(AdamWRule):
    """MXNet's AdamW with torch's scalars: epsilon is added to the corrected root, and the decay is lr wd."""

    skips_zero_rescale = False

    def __init__(self, decoupled: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.decoupled = decoupled

    @property
    def preamble(self) -> str:  # type: ignore[override]
        """Decoupled or coupled (L2) decay."""
        return "decoupled" if self.decoupled else "coupled"

    def scalars(self, lr: Any, wd: float, count: Any) -> AdamWScalars:
        """Multiplying divisor and rate by sqrt(1 - beta2^t) moves epsilon to the corrected root."""
        epsilon = self.epsilon * sqrt(1 - self.beta2**count)
        keep = 1 - lr * wd if self.decoupled else 1.0
        lr = bias_corrected(lr, self.beta1, self.beta2, count)
        return AdamWScalars(lr, self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, epsilon, keep)


class Adam(Optimizer):
    """`torch.optim.Adam`: adaptive moments (Kingma & Ba 2014, arXiv:1412.6980; amsgrad: arXiv:1904.09237).

        g_t = grad + weight_decay w_{t-1}
        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        w_t = w_{t-1} - lr (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps)

    With amsgrad the root is that of the largest v so far. With decoupled_weight_decay it is AdamW. State: exp_avg (m),
    exp_avg_sq (v), max_exp_avg_sq with amsgrad. Arguments and errors are torch's; options: `Options`.
    """

    rule = TorchAdam
    torch_class: ClassVar[Any] = torch.optim.Adam
    arguments: ClassVar = {
        "betas": ("beta1", "beta2"),
        "eps": "epsilon",
        "amsgrad": "amsgrad",
        "decoupled_weight_decay": "decoupled",
    }
    sparse_error = "Adam does not support sparse gradients, please consider SparseAdam instead"

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = torch_defaults(
            Adam.torch_class,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, defaults, options)


class AdamW(Adam):
    """`torch.optim.AdamW`: Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv:1711.05101).

        m_t = beta1 m_{t-1} + (1 - beta1) grad
        v_t = beta2 v_{t-1} + (1 - beta2) grad^2
        w_t = (1 - lr weight_decay) w_{t-1} - lr (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps)

    With amsgrad the root is that of the largest v so far. State: exp_avg (m), exp_avg_sq (v), max_exp_avg_sq with
    amsgrad. Arguments and errors are torch's; options: `Options`.
    """

    torch_class = torch.optim.AdamW

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )
