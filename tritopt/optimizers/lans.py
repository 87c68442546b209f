"""LANS: its rule, and MXNet's face of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.kernels.lans import lans_gradient, lans_moments, lans_update
from tritopt.kernels.twins.ops import add_decay, decay_of, norm, sqrt, trust_ratio
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Stored, Values


class LANSScalars(NamedTuple):
    """Scalars that the update of LANS reads beside its tensors."""

    lr: float
    wd: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    epsilon: float
    mean_correction: float
    """Bias correction of the mean: 1 / (1 - beta1^t)."""
    var_correction: float
    """Bias correction of the second moment: 1 / (1 - beta2^t)."""
    bound: float
    """Bound on elements of the normalised gradient; infinity: there is none."""
    lower_bound: float
    """Lower bound on the weight's norm in the trust ratio; 0: there is none."""
    upper_bound: float
    """Upper bound on the weight's norm in the trust ratio; infinity: there is none."""


class LANSRule(Rule):
    """Nesterov-like LAMB on normalised gradients (Zheng et al. 2020, arXiv:2006.13484, algorithm 2).

        g_t = clip(grad / |grad|), or 0 where the norm is 0
        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
        d_t = sqrt(v_t / (1 - beta2^t)) + epsilon
        p_t = m_t / (1 - beta1^t) / d_t + wd w_{t-1}
        q_t = g_t / d_t + wd w_{t-1}
        w_t = w_{t-1} - lr (beta1 r(p_t) p_t + (1 - beta1) r(q_t) q_t)

    where r(x) = min(max(|w_{t-1}|, lower_bound), upper_bound) / |x|, or 1 where a norm is 0 or |w| infinite. |.| is the
    Euclidean norm of a whole tensor, of the master if there is one; where |w| is infinite, nothing decays. Of
    rescale_grad only the sign matters, and clip_gradient bounds the elements of the normalised gradient (the paper has
    no clip). States: m and v, the weight's shape, at least fp32, zero at first. Three launches.

    Differs from MXNet's: a zero gradient is not divided by its norm; `step` is as fused; norms are the master's.

    Args:
        learning_rate: per update, relative to the weight's norm.
        beta1, beta2: decay rates of the moments, in [0, 1); beta1 is the mean's share in the step, too.
        epsilon: added to the root, >= 0.
        lower_bound, upper_bound: bounds on the weight's norm. None or <= 0: unbounded.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: a beta or epsilon out of range.
    """

    phases = (
        Apply(
            lans_gradient, reads_weight=False, reads_states=False, writes_weight=False, writes_states=False, n_sums=1
        ),
        Apply(lans_moments, writes_weight=False, n_sums=3),
        Apply(lans_update, writes_states=False),
    )
    state_names = ("mean", "var")
    least_state_dtype = torch.float32
    rereads_states = True
    preamble = "rescaled"
    variants = (
        {},
        {"beta1": 0.5, "beta2": 0.8, "epsilon": 1e-3, "lower_bound": 1e-3, "upper_bound": 1.5, "clip_gradient": 0.1},
    )

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-6,
        lower_bound: float | None = None,
        upper_bound: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.beta1, self.beta2, self.epsilon = validate.moments(beta1, beta2, epsilon)
        self.lower_bound = validate.positive_or_none("lower_bound", lower_bound)
        self.upper_bound = validate.positive_or_none("upper_bound", upper_bound)

    def scalars(self, lr: float, wd: float, count: int) -> LANSScalars:
        """Scalars of a step, with the bias corrections as factors."""
        bound = validate.bound_or(self.clip_gradient, math.inf)
        return LANSScalars(
            lr=lr,
            wd=wd,
            beta1=self.beta1,
            one_minus_beta1=1 - self.beta1,
            beta2=self.beta2,
            one_minus_beta2=1 - self.beta2,
            epsilon=self.epsilon,
            mean_correction=1 / (1 - self.beta1**count),
            var_correction=1 / (1 - self.beta2**count),
            bound=bound if bound < 2 else math.inf,  # no element of a unit vector is larger, nor every bound an fp32
            lower_bound=validate.bound_or(self.lower_bound, 0.0),
            upper_bound=validate.bound_or(self.upper_bound, math.inf),
        )

    def reference(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: LANSScalars, stored: Stored = lambda values: values
    ) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states. The directions are computed again, from the
        moments as they are stored."""

        def directions(wd: float, mean: torch.Tensor, var: torch.Tensor) -> Values:
            root = sqrt(var * s.var_correction) + s.epsilon
            return tuple(add_decay(x, w, wd) for x in (mean * s.mean_correction / root, g / root))

        grad_norm = norm(g)
        g = (g / torch.where(grad_norm == 0, 1.0, grad_norm).to(g.dtype)).clamp(-s.bound, s.bound)
        mean, var = state
        mean = s.beta1 * mean + s.one_minus_beta1 * g
        var = s.beta2 * var + s.one_minus_beta2 * (g * g)
        by_both = directions(s.wd, mean, var)
        mean_ratio, grad_ratio = (trust_ratio(w, d, s.lower_bound, s.upper_bound) for d in by_both)
        mean_step, grad_step = s.lr * s.beta1 * mean_ratio, s.lr * s.one_minus_beta1 * grad_ratio
        by_mean, by_grad = directions(decay_of(w, s.wd), *stored((mean, var)))
        return w - (mean_step * by_mean + grad_step * by_grad), (mean, var)


@register
class LANS(LANSRule, Optimizer, learning_rate=0.001): ...
