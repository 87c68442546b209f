"""Adafactor: its rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.factored_phase import ApplyFactored
from tritopt.engine.scalars import minimum
from tritopt.engine.scalars import sqrt as scalar_sqrt
from tritopt.kernels.adafactor import (
    adafactor_direction,
    adafactor_moment,
    adafactor_square,
    adafactor_update,
    adafactor_variance,
)
from tritopt.kernels.twins.ops import sqrt
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values

TINY = 2.0**-126  # the smallest normal fp32


class AdafactorScalars(NamedTuple):
    """Scalars that the update of Adafactor reads beside its tensors."""

    rate: float
    """Step relative to the weight's size: min(lr, 1 / sqrt(t))."""
    keep: float
    """Share of the old weight that stays: 1 - lr wd."""
    beta2: float
    one_minus_beta2: float
    epsilon1: float
    """Epsilon of the second moment; negative: the machine epsilon of the arithmetic takes its place."""
    epsilon2: float
    clip_threshold: float


class AdafactorRule(Rule):
    """Adaptive rates from a factored second moment (Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5).

        beta_t = 1 - t^beta2_decay
        R_t = beta_t R_{t-1} + (1 - beta_t) mean(g_t^2 over each row)
        C_t = beta_t C_{t-1} + (1 - beta_t) mean(g_t^2 over each column)
        V_t = R_t C_t / max(mean(R_t), epsilon1)
        u_t = g_t / max(sqrt(V_t), epsilon1)
        a_t = max(epsilon2, RMS(w_{t-1})) min(lr, 1 / sqrt(t))
        w_t = w_{t-1} - lr wd w_{t-1} - a_t u_t / max(1, RMS(u_t) / clip_threshold)

    g_t is the gradient after rescaling and clipping. Rows and columns are those of the last two dimensions, each
    matrix of a stack by itself. A weight of fewer dimensions has no factors: V_t = beta_t V_{t-1} + (1 - beta_t) g_t^2.
    States, at least fp32, zero at first: R [..., rows, 1] and C [..., 1, columns]; or an empty tensor and V.

    Defaults and the place of epsilon1 are those of torch.optim.Adafactor; the paper adds epsilon1 = 1e-30 to g_t^2
    and has lr = 0.01. Unlike torch's, epsilon1=None is the machine epsilon of the arithmetic (fp32, or fp64 for fp64
    weights) and not of 16-bit weights; RMS(w) is of the master; and mean(R) and V_t are at least 2^-126, so a zero
    gradient moves nothing whatever epsilon1 is. Kernels add up in fp32 (fp64 for fp64 weights), always in the same
    order; `step` in fp64.

    Not in MXNet.

    Args:
        learning_rate: bound on the relative step, which falls as 1 / sqrt(t); factor of the decay.
        beta2_decay: exponent of the running mean's growth, <= 0.
        epsilon1: floor of mean(R) and of u's divisor, >= 0. None: machine epsilon.
        epsilon2: floor of the weight's RMS, >= 0: smaller ones move as if they had this size.
        clip_threshold: bound on the RMS of u, >= 1.
        kwargs: see `Optimizer`; wd is decoupled.

    Raises:
        ValueError: an argument out of range.
    """

    phases = (
        ApplyFactored(adafactor_square, adafactor_moment, adafactor_variance, adafactor_direction, adafactor_update),
    )
    state_names = ("row_var", "col_var")
    least_state_dtype = torch.float32
    preamble = "decoupled"
    variants = ({}, {"beta2_decay": -2.0, "epsilon1": 0.5, "epsilon2": 2.0, "clip_threshold": 1.25})

    def __init__(
        self,
        beta2_decay: float = -0.8,
        epsilon1: float | None = None,
        epsilon2: float = 1e-3,
        clip_threshold: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.beta2_decay = validate.number("beta2_decay", beta2_decay)
        if beta2_decay > 0:
            raise ValueError(f"beta2_decay={beta2_decay!r} must be <= 0")
        self.epsilon1 = None if epsilon1 is None else validate.nonnegative("epsilon1", epsilon1)
        self.epsilon2 = validate.nonnegative("epsilon2", epsilon2)
        self.clip_threshold = validate.number("clip_threshold", clip_threshold)
        if clip_threshold < 1:
            raise ValueError(f"clip_threshold={clip_threshold!r} must be >= 1; infinity bounds nothing")

    def state_shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        """A number for each row and one for each column of every matrix; without matrices one for each element."""
        if len(shape) < 2:
            return [(0,), shape]
        return [(*shape[:-1], 1), (*shape[:-2], 1, shape[-1])]

    def scalars(self, lr: Any, wd: float, count: Any) -> AdafactorScalars:
        """Scalars of a step. 1 - beta_t is a power of t and needs no subtraction."""
        return AdafactorScalars(
            rate=minimum(lr, 1 / scalar_sqrt(count)),
            keep=1 - lr * wd,
            beta2=1 - count**self.beta2_decay,
            one_minus_beta2=count**self.beta2_decay,
            epsilon1=-1.0 if self.epsilon1 is None else self.epsilon1,
            epsilon2=self.epsilon2,
            clip_threshold=self.clip_threshold,
        )

    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: AdafactorScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        row_var, col_var = state
        if not g.numel():
            return w, state
        epsilon1 = torch.finfo(g.dtype).eps if s.epsilon1 < 0 else s.epsilon1
        squares = g * g
        if g.dim() < 2:
            var = col_var = s.beta2 * col_var + s.one_minus_beta2 * squares
        else:
            row_var = s.beta2 * row_var + s.one_minus_beta2 * _mean(squares, -1)
            col_var = s.beta2 * col_var + s.one_minus_beta2 * _mean(squares, -2)
            var = row_var / _mean(row_var, -2).clamp(min=max(epsilon1, TINY)) * col_var
        u = g / sqrt(var.clamp(min=max(epsilon1**2, TINY)))
        size, excess = _rms(w).clamp(min=s.epsilon2), (_rms(u) / s.clip_threshold).clamp(min=1.0)
        return s.keep * w - (s.rate * size / excess).to(w.dtype) * u, (row_var, col_var)


@register
class Adafactor(AdafactorRule, Optimizer, learning_rate=0.01): ...


def _mean(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.mean(dim, keepdim=True, dtype=torch.float64).to(x.dtype)


def _rms(x: torch.Tensor) -> torch.Tensor:
    return (x * x).mean(dtype=torch.float64).sqrt()
