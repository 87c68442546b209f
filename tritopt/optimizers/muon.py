"""Muon: its rule, and MXNet's face of it."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.matrices import Cut, cut_of, orthogonalize_each
from tritopt.engine.matrix_phase import SCRATCH_BYTES, ApplyMatrices
from tritopt.engine.newton_schulz import POLAR_EXPRESS, QUINTIC, Iteration, iteration_of
from tritopt.kernels.muon import muon_direction, muon_update
from tritopt.mxnet.optimizer import Optimizer, register
from tritopt.mxnet.plain import AsTuple
from tritopt.rule import Rule, State, Values


class MuonScalars(NamedTuple):
    """Scalars that the update of Muon reads beside its tensors; those of beta2 only where rows are normalised."""

    lr: float
    momentum: float
    one_minus_momentum: float
    ahead: float  # share of the momentum in the direction: 1, or with Nesterov's step the momentum's decay rate
    one_minus_ahead: float
    keep: float  # share of the old weight that stays, 1 - lr wd
    beta2: float
    one_minus_beta2: float


class MuonRule(Rule):
    """Momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), as torch.optim.Muon.

        m_t = momentum m_{t-1} + (1 - momentum) g_t
        d_t = momentum m_t + (1 - momentum) g_t            without nesterov m_t
        X_0 = d_t / max(|d_t|_F, eps)
        X_k = a X_{k-1} + (b X X^T + c (X X^T)^2) X        k = 1 ... ns_steps, X = X_{k-1}
        w_t = (1 - lr wd) w_{t-1} - lr ratio X             X = X_{ns_steps}

    With beta2 (NorMuon, Li et al. 2025, arXiv:2510.05491, as in the authors' code) rows are normalised:

        v_t = beta2 v_{t-1} + (1 - beta2) mean(X^2 over each row)
        w_t = (1 - lr wd) w_{t-1} - lr ratio |X|_F Y / |Y|_F      Y = X / (sqrt(v_t) + 1e-10)

    For "match_rms_adamw" sqrt(min(rows, columns)) takes the place of |X|_F, as in the paper. g_t is the gradient after
    rescaling and clipping. Weights are matrices, or made of some (`flatten`, `split`), each orthogonalised by itself.
    States, 0 at first: m, the (master) weight's shape; v, at least fp32, [..., rows, parts of columns]. Not in MXNet.

    Args:
        learning_rate: per update. Every step moves a matrix by about so much in spectral norm, times the ratio.
        momentum, nesterov: decay rate of m, in [0, 1); whether the direction is ahead of the momentum.
        ns_coefficients, ns_steps: a, b and c, or "polar_express" (Amsel et al. 2025, arXiv:2505.16932); 1 to 99 steps.
        ns_dtype: dtype of the products: "bf16", or "fp32", the dtype of the arithmetic. They add up in fp32 at least.
        epsilon: least norm that a direction is divided by, > 0.
        adjust_lr_fn: ratio by the shape of a matrix. "original" or None: sqrt(max(1, rows / columns)).
            "match_rms_adamw": 0.2 sqrt(max(rows, columns)). "spectral_unclamped": sqrt(rows / columns).
        flatten: how weights of more dimensions are taken. True: a matrix, whose columns are all dimensions after the
            first. False: a stack of matrices, the last two dimensions. None: they are refused.
        split: fused projections, whose parts are matrices by themselves: number of equal parts, or their sizes.
        split_dim: dimension of the matrix that is split: -2, its rows, or -1, its columns.
        scratch_bytes: bound on what directions and products take beside weights and states, if one weight fits.
        beta2: decay rate of v, in [0, 1), NorMuon's is 0.95; None: rows are not normalised.
        ns_symmetric: whether a kernel of fused steps computes half of X X^T and of its square; not measured on a GPU.
        use_fused_step, kwargs: see `Optimizer`.

    Raises:
        ValueError: an argument out of range, coefficients that do not converge, or a weight that is no matrix.
    """

    preamble, wide_states = "decoupled", ("row_var",)
    iteration, cut = AsTuple(Iteration), AsTuple(Cut)
    variants = (
        {},
        {"momentum": 0.6, "nesterov": False, "ns_coefficients": POLAR_EXPRESS, "ns_dtype": "fp32", "flatten": False},
        {"beta2": 0.7, "adjust_lr_fn": "match_rms_adamw", "ns_dtype": "fp32"},
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
        beta2: float | None = None,
        ns_symmetric: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.momentum, self.nesterov = validate.fraction("momentum", momentum), validate.boolean("nesterov", nesterov)
        self.iteration = iteration_of(ns_coefficients, ns_steps, ns_dtype, epsilon, adjust_lr_fn, beta2, ns_symmetric)
        self.cut = cut_of(flatten, split, split_dim)
        self.scratch_bytes = validate.positive_count("scratch_bytes", scratch_bytes)

    @property
    def phases(self) -> tuple[ApplyMatrices, ...]:
        """Phases of a step: the directions, their products, and the weights."""
        return (ApplyMatrices(muon_direction, muon_update, self.cut, self.iteration, self.scratch_bytes),)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the momentum, and with beta2 of the rows' second moments."""
        return ("momentum",) if self.iteration.beta2 is None else ("momentum", "row_var")

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the iteration's products."""
        return self.iteration.dtype or torch.float32

    def state_shapes(self, shape: torch.Size) -> list[tuple[int, ...]]:
        """Shapes of the states: the weight's, and a number for each row. ValueError if there are no matrices in it."""
        return [shape, self.cut.shape_of_moments(shape)][: len(self.state_names)]

    def scalars(self, lr: float, wd: float, count: int) -> MuonScalars:
        """Scalars of a step, constant but for the learning rate."""
        ahead, beta2 = self.momentum if self.nesterov else 1.0, self.iteration.beta2 or 0.0
        return MuonScalars(lr, self.momentum, 1 - self.momentum, ahead, 1 - ahead, 1 - lr * wd, beta2, 1 - beta2)

    def update_parts(
        self, w: torch.Tensor, g: torch.Tensor, state: Values, s: MuonScalars, **again: Any
    ) -> Generator[Values, Values, tuple[torch.Tensor, Values]]:
        """The recurrence, which yields d, with v, and goes on with what the weight moves along and mean(X^2)."""
        momentum, *moments = state
        momentum = s.momentum * momentum + s.one_minus_momentum * g
        direction, *squares = yield (s.ahead * momentum + s.one_minus_ahead * g, *moments)
        moments = [s.beta2 * v + s.one_minus_beta2 * q for v, q in zip(moments, squares, strict=True)]
        return s.keep * w - s.lr * direction, (momentum, *moments)

    def orthogonalized(self, values: Sequence[Values]) -> Sequence[Values]:
        """Orthogonalise each d, rows normalised with beta2: those of one shape are a batch."""
        return orthogonalize_each(values, self.cut, self.iteration)


@register
class Muon(MuonRule, Optimizer, learning_rate=1e-3):
    __doc__ = MuonRule.__doc__

    def create_state(self, index: Hashable, weight: torch.Tensor) -> State:
        """The momentum. ValueError that names the weight if it is no matrix."""
        with validate.naming(index):
            self.cut.check(weight.shape)
        return super().create_state(index, weight)
