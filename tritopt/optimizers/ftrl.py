"""Ftrl: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.engine.scalars import reciprocal
from tritopt.kernels.ftrl import ftrl_update
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values


class FtrlScalars(NamedTuple):
    """Scalars that the update of Ftrl reads beside its tensors."""

    inverse_lr: float
    offset: float
    """Offset of the divisor: beta / lr + wd."""
    lamda1: float


class FtrlRule(Rule):
    """Follow the regularized leader, proximally (McMahan et al. 2013, "Ad Click Prediction: a View from the Trenches",
    KDD, doi:10.1145/2487575.2488200, algorithm 1).

        n_t = n_{t-1} + g_t^2
        z_t = z_{t-1} + g_t - (sqrt(n_t) - sqrt(n_{t-1})) / lr w_{t-1}
        w_t = -sign(z_t) max(|z_t| - lamda1, 0) / ((beta + sqrt(n_t)) / lr + wd)

    g_t is the gradient after rescaling and clipping. States: z and n, the (master) weight's shape, at least fp32, zero
    at first. wd is the paper's lambda_2, lr its alpha. The weight is exactly 0 while |z_t| <= lamda1. It follows from
    the states alone: with fresh ones, a weight whose gradient is 0 or that is in no row of a sparse gradient becomes 0,
    and an infinite one NaN. A learning rate of 0 leaves weight and states alone.

    Differs from MXNet's: `lazy_update` is asked for by name, where MXNet goes by the weight's storage type.

    Args:
        learning_rate: per update.
        lamda1: strength of the L1 penalty, >= 0.
        beta: added to the root, >= 0. The larger, the shorter are the first steps.
        lazy_update: update only the rows present in a row-sparse gradient; absent rows keep their weight.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: lamda1 or beta out of range, or lazy_update with use_fused_step=False.
    """

    phases = (Apply(ftrl_update),)
    state_names = ("z", "n")
    least_state_dtype = torch.float32
    preamble = "decoupled"
    skips_zero_lr = True
    variants = ({}, {"lamda1": 1.0, "beta": 0.1})

    def __init__(self, lamda1: float = 0.01, beta: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        self.lamda1 = validate.nonnegative("lamda1", lamda1)
        self.beta = validate.nonnegative("beta", beta)

    def scalars(self, lr: Any, wd: float, count: Any) -> FtrlScalars:
        """Scalars of a step, constant but for the learning rate; those of a rate of 0 are never read."""
        inverse_lr = reciprocal(lr)
        return FtrlScalars(inverse_lr, self.beta * inverse_lr + wd, self.lamda1)

    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: FtrlScalars) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above; z - clamp(z) is z shrunk towards 0 by lamda1."""
        z, n = state
        lamda1 = z.new_tensor(s.lamda1)  # torch clamps to no Python number that its dtype cannot hold
        new_n = n + g * g
        root = sqrt(new_n)
        z = z + (g - (root - sqrt(n)) * s.inverse_lr * w)
        shrunk = z.clamp(-lamda1, lamda1) - z
        # Not 0 / 0 where beta, wd and all gradients so far are 0.
        w = torch.where(shrunk == 0, shrunk, shrunk / (root * s.inverse_lr + s.offset))
        return w, (z, new_n)


@register
class Ftrl(FtrlRule, Optimizer, learning_rate=0.1):
    supports_lazy_update = True
