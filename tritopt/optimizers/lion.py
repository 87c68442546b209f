"""Lion: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.lion import lion_update
from tritopt.kernels.twins.ops import sign
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values, takes_arrays


class LionScalars(NamedTuple):
    """Scalars that the update of Lion reads beside its tensors."""

    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    keep: float
    """Share of the old weight that stays, 1 - lr wd."""


class LionRule(Rule):
    """Evolved sign momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

        c_t = beta1 m_{t-1} + (1 - beta1) g_t
        m_t = beta2 m_{t-1} + (1 - beta2) g_t
        w_t = w_{t-1} - lr (sign(c_t) + wd w_{t-1})

    g_t is the gradient after rescaling and clipping. State: m, the (master) weight's shape and dtype, zero at first.
    sign(0) = 0 and sign(NaN) = NaN. Every element moves by lr, so the paper advises a learning rate 3 to 10 times
    smaller than AdamW's, and a wd as much larger.

    Not in MXNet, nor in torch.

    Args:
        learning_rate: per update; also what an element moves by.
        beta1: share of the past in the direction, in [0, 1).
        beta2: decay rate of the momentum, in [0, 1).
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: a beta out of range.
    """

    phases = (Apply(lion_update),)
    state_names = ("momentum",)
    preamble = "decoupled"
    variants = ({}, {"beta1": 0.5, "beta2": 0.8})

    def __init__(self, beta1: float = 0.9, beta2: float = 0.99, **common: Any) -> None:
        super().__init__(**common)
        self.beta1, self.beta2 = validate.fraction("beta1", beta1), validate.fraction("beta2", beta2)

    def scalars(self, lr: float, wd: float, count: int) -> LionScalars:
        """Scalars of a step, constant but for learning rate and decay."""
        return LionScalars(lr, self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, 1 - lr * wd)

    @takes_arrays
    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: LionScalars) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        (momentum,) = state
        direction = sign(s.beta1 * momentum + s.one_minus_beta1 * g)
        momentum = s.beta2 * momentum + s.one_minus_beta2 * g
        return s.keep * w - s.lr * direction, (momentum,)


@register
class Lion(LionRule, Optimizer, learning_rate=0.0001): ...
