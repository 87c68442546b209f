"""SGLD: stochastic gradient Langevin dynamics."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.engine.random_keys import halves, key_words
from tritopt.engine.scalars import sqrt
from tritopt.kernels.sgld import sgld_update
from tritopt.kernels.twins.random import STEPS, normal
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, Values


class SGLDScalars(NamedTuple):
    """Scalars that the update of SGLD reads beside its tensors."""

    half_lr: float
    deviation: float
    """Standard deviation of the noise, sqrt(lr)."""
    step: float
    """Update count, which the noise's counter takes."""
    key_0: float
    """First 16 bits of the noise's key; the next three fields are the others."""
    key_1: float
    key_2: float
    key_3: float


class SGLDRule(Rule):
    """Stochastic gradient Langevin dynamics (Welling & Teh 2011, ICML, equation 4).

        w_t = w_{t-1} - lr / 2 g_t + sqrt(lr) z_t,   z_t normal with mean 0 and variance 1, independent

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1}; it should be that of the log posterior of the
    whole data set, so rescale_grad is its size. The noise is neither rescaled nor clipped. No state.

    z is a function of (seed, the parameter's index, its update count, the element's position in row-major order), the
    same in both steps and on every machine to the last bit; it has the precision of fp32, also for fp64 weights, and
    begins anew after 2^24 updates. Indices are therefore ints, strings or tuples of such. Weights that are not
    contiguous (channels_last, transposed) are copied to be updated.

    Differs from MXNet's: noise has a seed of its own; a learning rate of 0 leaves the weight as it is; there is a fused
    step.

    Args:
        learning_rate: per update; also the variance of the noise.
        use_fused_step, kwargs: see `Optimizer`.
        seed: seed of the noise, an int >= 0.

    Raises:
        ValueError: seed < 0. TypeError: seed not an int, or at the update an index of another type.
    """

    phases = (Apply(sgld_update, reads_offsets=True),)
    is_per_parameter = True

    def __init__(self, seed: int = 0, **common: Any) -> None:
        super().__init__(**common)
        self.seed = validate.count("seed", seed)

    def scalars_at(self, index: Hashable, lr: Any, wd: float, count: Any, *numbers: Any) -> SGLDScalars:
        """Scalars of a parameter, each of which has a key of its own."""
        return SGLDScalars(lr / 2, sqrt(lr), count % STEPS, *halves(key_words(self.seed, index)))

    def scalars(self, lr: float, wd: float, count: int) -> SGLDScalars:
        """Scalars of parameter 0, and of no other."""
        return self.scalars_at(0, lr, wd, count)

    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: SGLDScalars) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        offsets = torch.arange(w.numel(), dtype=torch.int64, device=w.device).view(w.shape)
        noise = normal((s.key_0, s.key_1, s.key_2, s.key_3), offsets, s.step, 0).to(w.dtype)
        return w - s.half_lr * g + s.deviation * noise, ()


@register
class SGLD(SGLDRule, Optimizer, learning_rate=0.1): ...
