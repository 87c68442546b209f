"""AdaDelta: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.adadelta import adadelta_update
from tritopt.kernels.formats.states import SQUARES
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values, takes_arrays


class AdaDeltaScalars(NamedTuple):
    """Scalars that the update of AdaDelta reads beside its tensors."""

    lr: float
    rho: float
    one_minus_rho: float
    epsilon: float


class AdaDeltaRule(Rule):
    """Steps in the units of the weight (Zeiler 2012, arXiv:1212.5701, algorithm 1).

        A_t = rho A_{t-1} + (1 - rho) g_t^2
        d_t = sqrt(D_{t-1} + epsilon) / sqrt(A_t + epsilon) g_t
        D_t = rho D_{t-1} + (1 - rho) d_t^2
        w_t = w_{t-1} - lr d_t

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1}. States: A (acc_g) and D (acc_delta), the
    (master) weight's shape, at least fp32, zero at first. As torch's, but for rho and D, which here as in the paper
    holds d_t without lr; the paper has no lr.

    Differs from MXNet's: has a fused kernel.

    Args:
        learning_rate: a factor of every step; 1 is the paper's method.
        rho: decay rate of both averages, in [0, 1).
        epsilon: added inside both roots, >= 0. The first steps are of its root; 0 never moves.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: rho or epsilon out of range.
    """

    phases = (Apply(adadelta_update),)
    state_names = ("acc_g", "acc_delta")
    state_kinds: ClassVar = {"acc_g": SQUARES, "acc_delta": SQUARES}
    least_state_dtype = torch.float32
    variants = ({}, {"rho": 0.5, "epsilon": 0.1})

    def __init__(self, rho: float = 0.9, epsilon: float = 1e-6, **common: Any) -> None:
        super().__init__(**common)
        self.rho = validate.fraction("rho", rho)
        self.epsilon = validate.nonnegative("epsilon", epsilon)

    def scalars(self, lr: float, wd: float, count: int) -> AdaDeltaScalars:
        """Scalars of a step, constant but for the learning rate."""
        return AdaDeltaScalars(lr, self.rho, 1 - self.rho, self.epsilon)

    @takes_arrays
    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: AdaDeltaScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        acc_g, acc_delta = state
        acc_g = s.rho * acc_g + s.one_minus_rho * (g * g)
        delta = sqrt(acc_delta + s.epsilon) / sqrt(acc_g + s.epsilon) * g
        acc_delta = s.rho * acc_delta + s.one_minus_rho * (delta * delta)
        return w - s.lr * delta, (acc_g, acc_delta)


@register
class AdaDelta(AdaDeltaRule, Optimizer, learning_rate=1.0): ...
