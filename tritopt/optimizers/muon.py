"""Muon: its rule, and MXNet's face of it."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.matrix_phase import SCRATCH_BYTES, ApplyMatrices, orthogonalize_each
from tritopt.engine.newton_schulz import POLAR_EXPRESS, QUINTIC, cut_of, iteration_of
from tritopt.kernels.muon import muon_direction, muon_update
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.rule import Rule, State, Values


class MuonScalars(NamedTuple):
    """Scalars that the update of Muon reads beside its tensors."""

    lr: float
    momentum: float
    one_minus_momentum: float
    ahead: float
    """Share of the momentum in the direction: 1, or with Nesterov's step the momentum's decay rate."""
    one_minus_ahead: float
    keep: float
    """Share of the old weight that stays, 1 - lr wd."""


class MuonRule(Rule):
    """Momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), as torch.optim.Muon.

        m_t = momentum m_{t-1} + (1 - momentum) g_t
        d_t = momentum m_t + (1 - momentum) g_t            without nesterov m_t
        X_0 = d_t / max(|d_t|_F, eps)
        X_k = a X_{k-1} + (b X X^T + c (X X^T)^2) X        k = 1 ... ns_steps, X = X_{k-1}
        w_t = (1 - lr wd) w_{t-1} - lr ratio X_{ns_steps}

    g_t is the gradient after rescaling and clipping. Weights are matrices, or made of some (`flatten`, `split`), each
    of which is orthogonalised by itself. State: m, the (master) weight's shape, zero at first. Products of a weight
    whose columns are fewer than its rows are of its transpose. Those of one shape are a batch.

    Not in MXNet. Biases, norms, embeddings and heads are for another optimizer.

    Args:
        learning_rate: per update. Every step moves a matrix by about so much in spectral norm, times the ratio.
        momentum: decay rate of m, in [0, 1).
        nesterov: whether the direction is ahead of the momentum.
        ns_coefficients: a, b and c; or "polar_express", those of Amsel et al. 2025, arXiv:2505.16932, for each step.
        ns_steps: number of steps, 1 to 99.
        ns_dtype: dtype of the products: "bf16", or "fp32", the dtype of the arithmetic. They add up in fp32 at least.
        epsilon: least norm that a direction is divided by, > 0.
        adjust_lr_fn: ratio by the shape of a matrix. "original" or None: sqrt(max(1, rows / columns)).
            "match_rms_adamw": 0.2 sqrt(max(rows, columns)). "spectral_unclamped": sqrt(rows / columns).
        flatten: how weights of more dimensions are taken. True: a matrix whose columns are all dimensions after the
            first, as of convolutions. False: a stack of matrices, the last two dimensions. None: they are refused.
        split: fused projections, whose parts are matrices by themselves: number of equal parts, or their sizes.
        split_dim: dimension of the matrix that is split: -2, its rows, or -1, its columns.
        scratch_bytes: bound on what directions and products take beside weights and states, if one weight fits.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: an argument out of range, coefficients that do not converge, or a weight that is no matrix.
    """

    state_names = ("momentum",)
    preamble = "decoupled"
    variants = (
        {},
        {"momentum": 0.6, "nesterov": False, "ns_coefficients": POLAR_EXPRESS, "ns_dtype": "fp32", "flatten": False},
    )

    def __init__(
        self,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] = QUINTIC,
        ns_steps: int = 5,
        ns_dtype: str = "bf16",
        epsilon: float = 1e-7,
        adjust_lr_fn: str | None = None,
        flatten: bool | None = None,
        split: int | Sequence[int] | None = None,
        split_dim: int = -2,
        scratch_bytes: int = SCRATCH_BYTES,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.momentum = validate.fraction("momentum", momentum)
        self.nesterov = validate.boolean("nesterov", nesterov)
        self.iteration = iteration_of(ns_coefficients, ns_steps, ns_dtype, epsilon, adjust_lr_fn)
        self.cut = cut_of(flatten, split, split_dim)
        if validate.count("scratch_bytes", scratch_bytes) < 1:
            raise ValueError(f"scratch_bytes={scratch_bytes!r} must be at least 1")
        self.scratch_bytes = scratch_bytes

    @property
    def phases(self) -> tuple[ApplyMatrices, ...]:
        """Phases of a step: the directions, their products, and the weights."""
        return (ApplyMatrices(muon_direction, muon_update, self.cut, self.iteration, self.scratch_bytes),)

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the iteration's products."""
        return self.iteration.dtype or torch.float32

    def state_shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        """Shape of the state: the weight's. ValueError if there are no matrices in it."""
        self.cut.shape_of(shape)
        return [shape]

    def scalars(self, lr: float, wd: float, count: int) -> MuonScalars:
        """Scalars of a step, constant but for the learning rate."""
        ahead = self.momentum if self.nesterov else 1.0
        return MuonScalars(lr, self.momentum, 1 - self.momentum, ahead, 1 - ahead, 1 - lr * wd)

    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Values, s: MuonScalars) -> tuple[torch.Tensor, Values]:
        """One update by the recurrence above: the new weight and states."""
        parts = self.update_parts(w, g, state, s)
        try:
            parts.send(self.orthogonalized([next(parts)])[0])
        except StopIteration as end:
            weight_and_state: tuple[torch.Tensor, Values] = end.value
        return weight_and_state

    def update_parts(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: MuonScalars, **again: Any
    ) -> Generator[torch.Tensor, torch.Tensor, tuple[torch.Tensor, Values]]:
        """The recurrence, which yields d and goes on with X."""
        momentum = s.momentum * state[0] + s.one_minus_momentum * g
        direction = yield s.ahead * momentum + s.one_minus_ahead * g
        return s.keep * w - s.lr * direction, (momentum,)

    def orthogonalized(self, directions: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """X of each d: those of one shape are a batch."""
        return orthogonalize_each(directions, self.cut, self.iteration)


@register
class Muon(MuonRule, Optimizer, learning_rate=1e-3):
    __doc__ = MuonRule.__doc__

    def create_state(self, index: Hashable, weight: torch.Tensor) -> State:
        """The momentum. ValueError that names the weight if it is no matrix."""
        try:
            self.cut.check(weight.shape)
        except ValueError as error:
            raise ValueError(f"parameter {index!r}: {error}") from error
        return super().create_state(index, weight)
