"""RMSProp, plain or centered."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.rmsprop import rmsprop_centered_update, rmsprop_update
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values


class RMSPropScalars(NamedTuple):
    """Scalars that the update of RMSProp reads beside its tensors."""

    lr: float
    rho: float
    one_minus_rho: float
    momentum: float
    epsilon: float
    clip_weights: float
    """Bound on weights; infinity: there is none."""


class RMSPropRule(Rule):
    """Gradients divided by a running root mean square (Tieleman & Hinton 2012, Coursera lecture 6.5), or by a running
    standard deviation (`centered`: Graves 2013, arXiv:1308.0850, equations 38 to 41).

        v_t = rho v_{t-1} + (1 - rho) g_t^2
        plain:     w_t = w_{t-1} - lr g_t / (sqrt(v_t) + epsilon)
        centered:  n_t = rho n_{t-1} + (1 - rho) g_t
                   m_t = momentum m_{t-1} - lr g_t / sqrt(v_t - n_t^2 + epsilon)
                   w_t = w_{t-1} + m_t
        with clip_weights, w_t is then clamped to +-clip_weights, element by element

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1}. States: v, or (n, v, m) if centered, the
    (master) weight's shape, at least fp32, zero at first. Unlike torch's, momentum is of the centered form alone and
    holds lr, and epsilon is inside that form's root. Where gradients hardly vary, rounding can make v_t - n_t^2
    negative, and the weight NaN if epsilon is less than about 1e-6 v_t.

    Differs from MXNet's: clip_weights <= 0 is off.

    Args:
        learning_rate: per update.
        rho: decay rate of both averages, in [0, 1).
        momentum: share of the last update that is kept, >= 0. Read only if centered.
        epsilon: added to the root, or inside it if centered, >= 0.
        centered: whether to subtract the squared mean.
        clip_weights: bound on each element of the weights. None or <= 0: off.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: rho, momentum or epsilon out of range. TypeError: centered is no bool, or gamma1 or gamma2 is given.
    """

    least_state_dtype = torch.float32
    variants = (
        {},
        {"rho": 0.5, "epsilon": 0.1, "clip_weights": 1.0},
        {"centered": True},
        {"centered": True, "rho": 0.5, "momentum": 0.7, "epsilon": 0.1, "clip_weights": 1.0},
    )

    def __init__(
        self,
        rho: float = 0.9,
        momentum: float = 0.9,
        epsilon: float = 1e-8,
        centered: bool = False,
        clip_weights: float | None = None,
        **common: Any,
    ) -> None:
        for old, new in (("gamma1", "rho"), ("gamma2", "momentum")):
            if old in common:
                raise TypeError(f"{old}={common[old]!r}, as MXNet 1.x named it, is {new} now: pass {new} instead")
        super().__init__(**common)
        self.rho = validate.fraction("rho", rho)
        self.momentum = validate.nonnegative("momentum", momentum)
        self.epsilon = validate.nonnegative("epsilon", epsilon)
        self.centered = validate.boolean("centered", centered)
        self.clip_weights = validate.positive_or_none("clip_weights", clip_weights)

    @property
    def phases(self) -> tuple[Apply, ...]:
        """Phases of a step: one launch."""
        return (Apply(rmsprop_centered_update if self.centered else rmsprop_update),)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The second moment; if centered, between the mean and the momentum buffer."""
        return ("mean", "var", "mom") if self.centered else ("var",)

    @property
    def state_kinds(self) -> dict[str, str | None]:
        """Kinds of the states; none if centered, where rounding would make v - m^2 negative."""
        return {"mean": None, "var": None} if self.centered else {}

    def scalars(self, lr: float, wd: float, count: int) -> RMSPropScalars:
        """Scalars of a step, constant but for the learning rate."""
        bound = validate.bound_or(self.clip_weights, math.inf)
        return RMSPropScalars(lr, self.rho, 1 - self.rho, self.momentum, self.epsilon, bound)

    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: RMSPropScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrences above: the new weight and states."""
        bound = w.new_tensor(s.clip_weights)  # torch clamps to no Python number that its dtype cannot hold
        if not self.centered:
            (var,) = state
            var = s.rho * var + s.one_minus_rho * (g * g)
            return (w - s.lr * (g / (sqrt(var) + s.epsilon))).clamp(-bound, bound), (var,)
        mean, var, mom = state
        mean = s.rho * mean + s.one_minus_rho * g
        var = s.rho * var + s.one_minus_rho * (g * g)
        mom = s.momentum * mom - s.lr * (g / sqrt(var - mean * mean + s.epsilon))
        return (w + mom).clamp(-bound, bound), (mean, var, mom)


@register
class RMSProp(RMSPropRule, Optimizer, learning_rate=0.001): ...
