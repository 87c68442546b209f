"""LARS: its rule, and MXNet's face of it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.driver import Apply
from tritopt.engine.plan import Task, compute_dtype
from tritopt.engine.private import stored_indices
from tritopt.kernels.lars import lars_momentum_update, lars_norms, lars_update
from tritopt.kernels.twins.ops import add_decay, norm
from tritopt.mxnet.optimizer import register
from tritopt.optimizers.sgd import SGD, SGDRule
from tritopt.rule import State, Values

PLAIN_NAMES = ("gamma", "beta", "bias")


class LARSScalars(NamedTuple):
    """Scalars that the update of LARS reads beside its tensors."""

    lr: float
    wd: float
    bound: float
    """Bound on elements of the gradient; infinity: there is none."""
    momentum: float
    eta: float
    epsilon: float
    is_layer_wise: float
    """Flag: 1 for a rate of the layer's own, 0 for plain SGD."""
    other_rows: float
    """Sum of squares of the rows of the weight that a lazy update leaves alone."""


class LARSRule(SGDRule):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, arXiv:1708.03888, algorithm 1).

        r_t = eta |w_{t-1}| / (|rescale_grad grad_t| + wd |w_{t-1}| + epsilon), or 1 where a norm is 0 or |w| infinite
        momentum == 0:  w_t = w_{t-1} - lr r_t g_t
        otherwise:      m_t = momentum m_{t-1} - lr r_t g_t
                        w_t = w_{t-1} + m_t

    g_t is the gradient after rescaling, clipping and adding wd w_{t-1}; |.| is the Euclidean norm of a whole tensor,
    of the master if there is one, and of the gradient before it is clipped. r_t = 1 for parameters whose name (in
    param_idx2name, otherwise the index as a str) ends in "gamma", "beta" or "bias". State as in SGD, whose checks it
    shares. Two launches. A lazy update takes |w| of all rows, so it reads the whole weight, and waits for the sum.

    Differs from MXNet's: norms are of the master and of at least fp32; negative rescale_grad keeps its sign; negative
    momentum is refused; any number of tensors.

    Args:
        learning_rate: per update, of a layer's norm times eta.
        momentum: share of the last update that is kept, >= 0.
        eta: trust coefficient, >= 0.
        epsilon: added to the norms, >= 0.
        lazy_update: update only the rows present in a row-sparse gradient.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: momentum, eta or epsilon < 0, or lazy_update with use_fused_step=False or multi_precision=True.
    """

    preamble = "rescaled"
    variants: ClassVar[Any] = (
        {},
        {"momentum": 0.9},
        {"momentum": 0.5, "eta": 0.5, "epsilon": 0.5},
    )

    def __init__(self, momentum: float = 0.0, eta: float = 0.001, epsilon: float = 1e-8, **common: Any) -> None:
        super().__init__(momentum=momentum, **common)
        self.eta, self.epsilon = validate.nonnegative("eta", eta), validate.nonnegative("epsilon", epsilon)

    @property
    def phases(self) -> tuple[Apply, ...]:
        """Phases of a step: the norms, then the update."""
        norms = Apply(lars_norms, reads_states=False, writes_weight=False, writes_states=False, n_sums=2)
        return norms, Apply(lars_momentum_update if self.momentum else lars_update)

    def scalars(self, lr: float, wd: float, count: int) -> Any:
        """Scalars of a step for a parameter with a rate of its own."""
        bound = validate.bound_or(self.clip_gradient, math.inf)
        return LARSScalars(lr, wd, bound, self.momentum, self.eta, self.epsilon, 1.0, 0.0)

    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: Any) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        weight_norm, grad_norm = (norm(w) ** 2 + s.other_rows).sqrt(), norm(g)
        trust_ratio = s.eta * weight_norm / (grad_norm + s.wd * weight_norm + s.epsilon)
        if not s.is_layer_wise:
            trust_ratio = torch.ones_like(trust_ratio)
        trust_ratio = torch.where((weight_norm == 0) | weight_norm.isinf() | (grad_norm == 0), 1.0, trust_ratio)
        bound = s.bound if s.bound <= torch.finfo(g.dtype).max else math.inf
        scaled = s.lr * trust_ratio.to(w.dtype) * add_decay(g.clamp(-bound, bound), w, s.wd)
        if not self.momentum:
            return w - scaled, ()
        (momentum,) = state
        momentum = s.momentum * momentum - scaled
        return w + momentum, (momentum,)


@register
class LARS(LARSRule, SGD, learning_rate=0.1):
    variants: ClassVar[Any] = (
        *LARSRule.variants[:-1],
        {**LARSRule.variants[-1], "param_idx2name": {0: "bn_gamma", 4: "fc_bias"}},
    )

    _other_rows: Mapping[Hashable, float] = MappingProxyType({})

    def scalars_of(self, index: Hashable, lr: float, wd: float, count: int) -> Any:
        """Scalars of a step; the name decides whether the rate is the layer's own."""
        if self.idx2name.get(index, str(index)).endswith(PLAIN_NAMES):
            return self.scalars(lr, wd, count)._replace(is_layer_wise=0.0)
        if index in self._other_rows:
            return self.scalars(lr, wd, count)._replace(other_rows=self._other_rows[index])
        return super().scalars_of(index, lr, wd, count)

    def _tasks(
        self,
        indices: Sequence[Hashable],
        weights: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        states: Sequence[State],
        fused: bool | None,
    ) -> tuple[list[Task], list[bool]]:
        tasks, on_kernel = super()._tasks(indices, weights, grads, states, fused)
        other_rows = {}
        for index, task in zip(indices, tasks, strict=True):
            if self.lazy_update and task.grad.layout == torch.sparse_coo and task.grad.sparse_dim() == 1:
                other_rows[index] = _squares_of_absent_rows(task.weight[0], task.grad)
        self._other_rows = other_rows
        return tasks, on_kernel


def _squares_of_absent_rows(weight: torch.Tensor, grad: torch.Tensor) -> float:
    rows = torch.arange(len(weight), dtype=torch.int64, device=weight.device)
    absent = weight[~torch.isin(rows, stored_indices(grad)[0])].to(compute_dtype(weight))
    return float((absent * absent).sum(dtype=torch.float64))
