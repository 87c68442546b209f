"""GroupAdaGrad: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.row_phase import ApplyRows
from tritopt.kernels.groupadagrad import groupadagrad_history, groupadagrad_square, groupadagrad_update
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values


class GroupAdaGradScalars(NamedTuple):
    """Scalars that the update of GroupAdaGrad reads beside its tensors."""

    lr: float
    epsilon: float


class GroupAdaGradRule(Rule):
    """AdaGrad with one learning rate per row (MXNet's `contrib.GroupAdaGrad`, for embeddings; no paper).

        h_t = h_{t-1} + mean(g_t^2 over each row)
        w_t = w_{t-1} - lr g_t / (sqrt(h_t) + epsilon)

    g_t is the gradient after rescaling and clipping; there is no weight decay. Weights are matrices. State: h,
    [rows, 1], at least fp32, zero at first. `step` adds up a row's squares in fp64, the kernel in fp32 (fp64 for fp64
    weights), each lane its own columns and then the lanes in a tree: the same from run to run, and within rounding of
    `step`. A row-sparse gradient is the dense one with zero rows, which change nothing.

    Differs from MXNet's: fused for dense gradients as well.

    Args:
        learning_rate: length of the first step of a row whose gradients are equal; later ones shrink.
        epsilon: added to the root, >= 0.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: epsilon < 0, a wd or wd_mult that asks for decay, or a weight that is not 2-D.
    """

    phases = (ApplyRows(groupadagrad_square, groupadagrad_history, groupadagrad_update),)
    state_names = ("history",)
    least_state_dtype = torch.float32
    preamble = "decoupled"
    decays = False
    variants = ({}, {"epsilon": 0.1})

    def __init__(self, epsilon: float = 1e-6, **common: Any) -> None:
        super().__init__(**common)
        self.epsilon = validate.nonnegative("epsilon", epsilon)

    def state_shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        """Shape of the state: one number per row. ValueError unless there are rows."""
        if len(shape) != 2:
            raise ValueError(
                f"GroupAdaGrad keeps one number per row and needs a 2-D weight, got one of shape {tuple(shape)}: pass "
                "weight.view(rows, -1), or give it to another optimizer such as AdaGrad"
            )
        return [(shape[0], 1)]

    def scalars(self, lr: float, wd: float, count: int) -> GroupAdaGradScalars:
        """Scalars of a step, constant but for the learning rate. ValueError if there is decay."""
        self.check_decay(wd)
        return GroupAdaGradScalars(lr, self.epsilon)

    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: GroupAdaGradScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        (history,) = state
        squares = (g * g).sum(dim=1, keepdim=True, dtype=torch.float64)
        history = history + (squares / max(g.shape[1], 1)).to(g.dtype)
        return w - s.lr * (g / (sqrt(history) + s.epsilon)), (history,)


@register
class GroupAdaGrad(GroupAdaGradRule, Optimizer, learning_rate=0.01): ...
