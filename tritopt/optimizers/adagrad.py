"""AdaGrad: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.adagrad import adagrad_update
from tritopt.kernels.formats.states import SQUARES
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values, takes_arrays


class AdaGradScalars(NamedTuple):
    """Scalars that the update of AdaGrad reads beside its tensors."""

    lr: float
    epsilon: float


class AdaGradRule(Rule):
    """Adaptive subgradients, diagonal form (Duchi, Hazan & Singer 2011, JMLR 12:2121-2159, figure 1).

        h_t = h_{t-1} + g_t^2
        w_t = w_{t-1} - lr g_t / (sqrt(h_t) + epsilon)

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1}. State: h, the (master) weight's shape, at least
    fp32, zero at first. As torch's Adagrad with lr_decay=0. A row-sparse gradient is the dense one with zero rows, also
    with wd, which MXNet refuses.

    Differs from MXNet's: fused for dense gradients as well; sparse ones go with decay.

    Args:
        learning_rate: length of the first step, whatever the gradient; later ones shrink.
        epsilon: added to the root, >= 0.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: epsilon < 0.
    """

    phases = (Apply(adagrad_update),)
    state_names = ("history",)
    state_kinds: ClassVar = {"history": SQUARES}
    least_state_dtype = torch.float32
    variants = ({}, {"epsilon": 0.1})

    def __init__(self, epsilon: float = 1e-6, **common: Any) -> None:
        super().__init__(**common)
        self.epsilon = validate.nonnegative("epsilon", epsilon)

    def scalars(self, lr: float, wd: float, count: int) -> AdaGradScalars:
        """Scalars of a step, constant but for the learning rate."""
        return AdaGradScalars(lr, self.epsilon)

    @takes_arrays
    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: AdaGradScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        (history,) = state
        history = history + g * g
        return w - s.lr * (g / (sqrt(history) + s.epsilon)), (history,)


@register
class AdaGrad(AdaGradRule, Optimizer, learning_rate=0.01): ...
