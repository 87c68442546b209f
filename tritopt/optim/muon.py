"""Muon, as torch defines it, and what torch's class lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from tritopt.engine.matrix_phase import SCRATCH_BYTES
from tritopt.engine.newton_schulz import QUINTIC
from tritopt.kernels.formats.format import Format
from tritopt.optim.layout import Expected, Layouts
from tritopt.optim.optimizer import Optimizer, Options, Params
from tritopt.optimizers.muon import MuonRule
from tritopt.rule import Rule

MOMENTS = "second_momentum_buffer"
"""Key in the state of the rows' second moments, as in the authors' code of NorMuon."""


class MuonLayouts(Layouts):
    """A momentum, and as torch's no step: but one that random bits depend on must be in checkpoints."""

    def shows_numbers(self, formats: tuple[Format, ...]) -> bool:
        """Whether the step stands in a state: where a format draws random bits."""
        return any(fmt.draws for fmt in formats)

    def expected(
        self, param: torch.Tensor, group: dict[str, Any], rule: Rule, fmt: Format, formats: Mapping[str, Format]
    ) -> dict[str, Expected]:
        """Shapes and dtypes of the state tensors. ValueError for what is no matrix, or has not the parts that its group
        says."""
        assert isinstance(rule, MuonRule)
        rule.cut.check(param.shape)
        return super().expected(param, group, rule, fmt, formats)


class Muon(Optimizer):
    """`torch.optim.Muon`: momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

        m_t = momentum m_{t-1} + (1 - momentum) grad
        d_t = momentum m_t + (1 - momentum) grad          without nesterov m_t
        X_0 = d_t / max(|d_t|_F, eps)
        X_k = a X_{k-1} + (b X X^T + c (X X^T)^2) X       k = 1 ... ns_steps, X = X_{k-1}
        w_t = (1 - lr weight_decay) w_{t-1} - lr ratio X_{ns_steps}

    With beta2 it is NorMuon (Li et al. 2025, arXiv:2510.05491): rows of X = X_{ns_steps} are divided by the roots of
    their second moments.

        v_t = beta2 v_{t-1} + (1 - beta2) mean(X^2 over each row)
        Y = X / (sqrt(v_t) + 1e-10)
        w_t = (1 - lr weight_decay) w_{t-1} - lr ratio |X|_F Y / |Y|_F

    as in the authors' code; for "match_rms_adamw" sqrt(min(rows, columns)) takes the place of |X|_F, as in the paper.

    Parameters are the matrices of hidden layers; biases, norms, embeddings and heads are another optimizer's, or all
    are `Mixed`'s. Matrices of one shape are orthogonalised as a batch, and each by itself: an element that is not
    finite spoils its own. State: momentum_buffer (m), the (master) weight's shape; with beta2 second_momentum_buffer
    (v), a number for each row, [..., rows, 1] or of parts of the columns [..., rows, parts], at least fp32. There is a
    step only where formats draw random bits. Arguments and errors are torch's, except that momentum is less than 1,
    ns_steps at least 1, eps above 0, and coefficients that do not converge are refused.

    Args:
        params: as torch's.
        lr: per step. A step moves a matrix by about lr times the ratio in spectral norm.
        weight_decay: decoupled.
        momentum: decay rate of m, in [0, 1).
        nesterov: whether the direction is ahead of the momentum.
        ns_coefficients: a, b and c; or "polar_express", those of Amsel et al. 2025, arXiv:2505.16932, for each step.
        eps: least norm that a direction is divided by, > 0.
        ns_steps: number of steps, 1 to 99.
        adjust_lr_fn: ratio by the shape of a matrix. "original" or None: sqrt(max(1, rows / columns)).
            "match_rms_adamw": 0.2 sqrt(max(rows, columns)), with which AdamW's lr and weight_decay serve.
            "spectral_unclamped": sqrt(rows / columns).
        flatten: how parameters of more dimensions are taken. True: a matrix whose columns are all dimensions after the
            first, as of convolutions. False: a stack of matrices, the last two dimensions, such as experts. None: they
            are refused, as torch does.
        split: fused projections (query, key and value; gate and up), whose parts are matrices by themselves: number of
            equal parts, such as heads, or the sizes of all.
        split_dim: dimension of the matrix that is split: -2, its rows, or -1, its columns.
        ns_dtype: of the products: "bf16", or "fp32", the dtype of the arithmetic. They add up in fp32 at least.
        scratch_bytes: bound on what directions and products take while a step runs, if one parameter fits.
        beta2: decay rate of v, in [0, 1), 0.95 in the paper of NorMuon; None: rows are not normalised.
        ns_symmetric: whether a Triton kernel of fused steps computes a triangle of X X^T and of its square, and mirrors
            it; False: torch computes all of both. Not measured on a GPU.
        maximize, foreach, capturable, fused: as torch's other classes have them.
        options: see `Options`.

    Raises:
        ValueError: an argument out of range, or a parameter that is no matrix.
    """

    rule = MuonRule
    layouts_class = MuonLayouts
    torch_class = torch.optim.Muon
    may_lack = frozenset({"step", MOMENTS})
    state_keys: ClassVar = {**Optimizer.state_keys, "row_var": MOMENTS}
    sparse_error = "Muon does not support sparse gradients"
    arguments: ClassVar = {
        "momentum": "momentum",
        "nesterov": "nesterov",
        "ns_coefficients": "ns_coefficients",
        "eps": "epsilon",
        "ns_steps": "ns_steps",
        "adjust_lr_fn": "adjust_lr_fn",
        "flatten": "flatten",
        "split": "split",
        "split_dim": "split_dim",
        "ns_dtype": "ns_dtype",
        "scratch_bytes": "scratch_bytes",
        "beta2": "beta2",
        "ns_symmetric": "ns_symmetric",
    }

    def __init__(
        self,
        params: Params,
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | tuple[float, float, float] = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        flatten: bool | None = None,
        split: int | Sequence[int] | None = None,
        split_dim: int = -2,
        ns_dtype: str = "bf16",
        scratch_bytes: int = SCRATCH_BYTES,
        beta2: float | None = None,
        ns_symmetric: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        self.check_values(defaults)
        ours = {
            "flatten": flatten,
            "split": split,
            "split_dim": split_dim,
            "ns_dtype": ns_dtype,
            "scratch_bytes": scratch_bytes,
            "beta2": beta2,
            "ns_symmetric": ns_symmetric,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "fused": fused,
        }
        super().__init__(params, {**defaults, **ours}, options)

    @property
    def unsaved(self) -> frozenset[str]:
        """Keys of param_groups that checkpoints do not hold: also what torch's class lacks and a constructor says
        again."""
        return super().unsaved | {"maximize", "scratch_bytes", "ns_symmetric"}

    def check_values(self, values: Mapping[str, Any]) -> None:
        """ValueError in torch's words, but for what its class does not know; the rule knows that."""
        ours = {"ns_coefficients": str, "adjust_lr_fn": str}
        super().check_values(
            {
                name: value
                for name, value in values.items()
                if not (isinstance(value, ours.get(name, ())) and value not in ("original", "match_rms_adamw"))
            }
        )
