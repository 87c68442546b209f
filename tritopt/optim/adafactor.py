"""Adafactor, as torch defines it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from tritopt.kernels.formats.format import Format
from tritopt.optim.defaults import torch_defaults
from tritopt.optim.layout import Expected, Layout, Layouts, State
from tritopt.optim.optimizer import Optimizer, Options, Params
from tritopt.optimizers.adafactor import AdafactorRule
from tritopt.rule import Rule, Values

FACTORS = ("row_var", "col_var")


class FactoredLayouts(Layouts):
    """Two factors for a matrix, the whole second moment for what is none: torch keeps no empty tensors."""

    def names(self, rule: Rule, param: torch.Tensor) -> tuple[str, ...]:
        """Names of the factors, or one that is empty and that of the whole."""
        return FACTORS if param.dim() > 1 else ("row_var", "variance")

    def expected(
        self, param: torch.Tensor, group: dict[str, Any], rule: Rule, fmt: Format, formats: Mapping[str, Format]
    ) -> dict[str, Expected]:
        """Shapes and dtypes of the state tensors, without the empty one."""
        planes = super().expected(param, group, rule, fmt, formats)
        if param.dim() <= 1:
            del planes["row_var"]
        return planes

    def planes(self, layout: Layout, state: State) -> Values:
        """Planes of the rule's states, the empty one included."""
        if "row_var" in layout.expected:
            return super().planes(layout, state)
        variance = state["variance"]
        return variance.new_empty(0), variance


class Adafactor(Optimizer):
    """`torch.optim.Adafactor`: adaptive rates from a factored second moment (Shazeer & Stern 2018, arXiv:1804.04235).

        beta_t = 1 - t^beta2_decay
        R_t = beta_t R_{t-1} + (1 - beta_t) mean(g_t^2 over each row)
        C_t = beta_t C_{t-1} + (1 - beta_t) mean(g_t^2 over each column)
        V_t = R_t C_t / max(mean(R_t), eps1)
        u_t = g_t / max(sqrt(V_t), eps1)
        a_t = max(eps2, RMS(w_{t-1})) min(lr, 1 / sqrt(t))
        w_t = (1 - lr weight_decay) w_{t-1} - a_t u_t / max(1, RMS(u_t) / d)

    Rows and columns are those of the last two dimensions. A parameter of fewer has no factors:
    V_t = beta_t V_{t-1} + (1 - beta_t) g_t^2. State, at least fp32: row_var (R) [..., rows, 1] and col_var (C)
    [..., 1, columns], or variance (V).

    eps1=None is the machine epsilon of the arithmetic (fp32, or fp64 for fp64 parameters); torch's is that of a 16-bit
    parameter, whose RMS it takes too. mean(R) and V are at least 2^-126, so that a zero gradient moves nothing where
    eps1 is 0. Beside an infinite weight steps are infinite, as in torch. Arguments and errors are torch's, and
    capturable and fused; options: `Options`.
    """

    rule = AdafactorRule
    layouts_class = FactoredLayouts
    torch_class = torch.optim.Adafactor
    arguments: ClassVar = {"beta2_decay": "beta2_decay", "eps": ("epsilon1", "epsilon2"), "d": "clip_threshold"}
    sparse_error = "Adafactor does not support sparse gradients"

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = torch_defaults(
            Adafactor.torch_class,
            lr=lr,
            beta2_decay=beta2_decay,
            eps=eps,
            d=d,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
        )
        super().__init__(params, {**defaults, "capturable": capturable, "fused": fused}, options)
