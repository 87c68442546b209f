"""Signum and signSGD: their rule, and MXNet's face of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.signum import signsgd_update, signum_update
from tritopt.kernels.twins.ops import sign
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values, takes_arrays


class SignumScalars(NamedTuple):
    """Scalars that the update of Signum reads beside its tensors."""

    lr: float
    keep: float
    """Share of the old weight that stays, 1 - lr wd."""
    momentum: float
    one_minus_momentum: float


class SignumRule(Rule):
    """Sign of the averaged gradient (Bernstein et al. 2018, arXiv:1802.04434, algorithms 1 and 2).

        momentum == 0:  w_t = w_{t-1} - lr (wd + wd_lh) w_{t-1} - lr sign(grad_t)
        otherwise:      m_t = momentum m_{t-1} - (1 - momentum) g_t
                        w_t = w_{t-1} - lr wd_lh w_{t-1} + lr sign(m_t)

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1}; without momentum the gradient is taken as it
    is, so that neither rescale_grad, not even its sign, nor clip_gradient matters, and wd is decoupled. wd_lh is always
    decoupled (Loshchilov & Hutter). sign(0) = 0 and sign(NaN) = NaN: an element whose gradient was NaN once stays NaN.
    State: m, the (master) weight's shape and dtype, zero at first; none without momentum. The paper's m is -m.

    Differs from MXNet's: momentum outside [0, 1) is refused.

    Args:
        learning_rate: per update; also what an element moves by.
        momentum: share of the average that is kept, in [0, 1).
        wd_lh: decoupled weight decay.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: momentum out of range, or wd_lh NaN.
    """

    variants = ({}, {"momentum": 0.0}, {"momentum": 0.5, "wd_lh": 0.05}, {"momentum": 0.0, "wd_lh": 0.05})

    def __init__(self, momentum: float = 0.9, wd_lh: float = 0.0, **common: Any) -> None:
        super().__init__(**common)
        self.momentum = validate.fraction("momentum", momentum)
        self.wd_lh = validate.number("wd_lh", wd_lh)

    @property
    def preamble(self) -> str:
        """Preamble: without momentum the gradient itself."""
        return "coupled" if self.momentum else "raw"

    @property
    def phases(self) -> tuple[Apply, ...]:
        """Phases of a step: one launch."""
        return (Apply(signum_update if self.momentum else signsgd_update),)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The average, if there is momentum."""
        return ("momentum",) if self.momentum else ()

    def scalars(self, lr: float, wd: float, count: int) -> SignumScalars:
        """Scalars of a step, with its decay: with momentum wd is in the gradient."""
        decay = lr * (self.wd_lh if self.momentum else wd + self.wd_lh)
        return SignumScalars(lr, 1 - decay, self.momentum, 1 - self.momentum)

    @takes_arrays
    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: SignumScalars
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        if not self.momentum:
            return s.keep * w - s.lr * sign(g), ()
        (momentum,) = state
        momentum = s.momentum * momentum - s.one_minus_momentum * g
        return s.keep * w + s.lr * sign(momentum), (momentum,)


@register
class Signum(SignumRule, Optimizer, learning_rate=0.01): ...
