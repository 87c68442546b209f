"""Newton-Schulz iteration: orthogonalises stacks of matrices by products alone, a batch of equal shape at a time.

Kernel and reference call the same functions; only the kernel's side has products of ours, if asked for. A matrix's
result is made of that matrix alone, but how many are in its stack may change the order in which a product's terms are
added: equal stacks give equal bits, others equal numbers within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from tritopt.engine import validate
from tritopt.engine.gram import symmetric_product

Quintic: TypeAlias = tuple[float, float, float]
"""Coefficients a, b, c of p(x) = a x + b x^3 + c x^5, which each step applies to the singular values."""
QUINTIC: Quintic = (3.4445, -4.7750, 2.0315)
"""torch's default: steep at 0, and never settled, so that singular values end between 0.68 and 1.2."""
_STEEPEST: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
"""Amsel et al. 2025, arXiv:2505.16932, algorithm 1: best in each step for singular values between 1e-3 and 1."""
SAFETY = 1.01
"""Singular values that rounding has brought above 1 must not leave the interval that a polynomial is made for."""
POLAR_EXPRESS = "polar_express"
RATIOS = ("original", "match_rms_adamw", "spectral_unclamped")
"""Names of `ratio_of`, as torch's `adjust_lr_fn` has them."""
DTYPES = {"bf16": torch.bfloat16, "fp32": None}
"""Dtypes of products by their names; None: that of the arithmetic."""
MAX_STEPS = 99
"""Largest number of steps; torch refuses more."""
_TINY = 2.0**-126
ROW_EPS = 1e-10
"""Least root of a row's second moment and least norm of normalised rows, as in the authors' code of NorMuon."""


class Iteration(NamedTuple):
    """Settings of the iteration."""

    steps: tuple[Quintic, ...]
    """Coefficients of each step."""
    eps: float
    """Least norm that a matrix is divided by."""
    dtype: torch.dtype | None
    """Dtype of the products, which add up in fp32 at least; None: that of the arithmetic."""
    ratio: str
    """Factor of the result by the matrix's shape: one of RATIOS."""
    safety: float
    """Factor of the norm that a matrix is divided by."""
    beta2: float | None = None
    """Decay rate of the rows' second moments (NorMuon); None: rows are not normalised."""
    symmetric: bool = False
    """Whether a kernel computes one triangle of symmetric products; else torch computes all of them."""


def iteration_of(
    coefficients: str | Sequence[float],
    n_steps: int,
    dtype: str,
    eps: float,
    ratio: str | None,
    beta2: float | None = None,
    symmetric: bool = False,
) -> Iteration:
    """Settings by the names that users give them. ValueError for what cannot be."""
    if not 1 <= validate.count("ns_steps", n_steps) <= MAX_STEPS:
        raise ValueError(f"ns_steps={n_steps!r} must be 1 to {MAX_STEPS}; 5 is usual")
    if dtype not in DTYPES:
        raise ValueError(f"ns_dtype={dtype!r} must be one of {', '.join(map(repr, DTYPES))}")
    if validate.nonnegative("epsilon", eps) == 0:
        raise ValueError("epsilon=0 must be > 0: a zero gradient would be divided by 0; 1e-7 is usual")
    if ratio is not None and ratio not in RATIOS:
        raise ValueError(
            f"Adjust learning rate function {ratio} is not supported: adjust_lr_fn must be one of "
            f"{', '.join(map(repr, RATIOS))}, or None"
        )
    if beta2 is not None:
        beta2 = validate.fraction("beta2", beta2)
    safety = SAFETY if coefficients == POLAR_EXPRESS else 1.0
    symmetric = validate.boolean("ns_symmetric", symmetric)
    return Iteration(steps_of(coefficients, n_steps), eps, DTYPES[dtype], ratio or RATIOS[0], safety, beta2, symmetric)


def steps_of(coefficients: str | Sequence[float], n: int) -> tuple[Quintic, ...]:
    """Return the coefficients of n steps: POLAR_EXPRESS, or three numbers for all of them.

    Raises:
        ValueError: singular values would not come near 1.
    """
    if coefficients == POLAR_EXPRESS:
        safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in _STEEPEST[:n]]
        return (*safe, *[(1.875, -1.25, 0.375)] * (n - len(safe)))
    if isinstance(coefficients, str) or len(coefficients) != 3:
        raise ValueError(f"ns_coefficients={coefficients!r} must be three numbers or {POLAR_EXPRESS!r}")
    a, b, c = map(float, coefficients)
    _check_convergence((a, b, c), n)
    return ((a, b, c),) * n


@np.errstate(over="ignore", invalid="ignore")  # refused below, in words
def _check_convergence(step: Quintic, n: int) -> None:
    """ValueError unless the iteration keeps [0, 1] bounded and positive, and brings 1 between 1/2 and 3/2."""
    a, b, c = step
    values = x = np.linspace(0.0, 1.0, 1001)
    # As many as it takes to see where it ends: what grows slowly is still bounded after a few.
    for _ in range(max(n, 20)):
        square = values * values
        values = values * (a + square * (b + square * c))
        is_bounded = bool(((values >= -1e-9) & (values < 2.0)).all())
        if not is_bounded:
            break
    # What was 1/10 must have come up by the end, and 1 must not have gone down.
    low, end = float(values[x >= 0.1].min()), float(values[-1])
    if not (is_bounded and 0.5 < end < 1.5 and low > 0.5):
        raise ValueError(
            f"ns_coefficients={step!r} do not converge: iterated, a x + b x^3 + c x^5 must bring what lies between 0 "
            f"and 1 near 1, as the default {QUINTIC} does; or pass {POLAR_EXPRESS!r}"
        )


def ratio_of(name: str, n_rows: int, n_columns: int) -> float:
    """Factor that makes updates of matrices of other shapes comparable.

    "original" (Keller Jordan): sqrt(max(1, rows / columns)). "match_rms_adamw" (Liu et al. 2025, arXiv:2502.16982):
    0.2 sqrt(max(rows, columns)), the usual RMS of AdamW's updates. "spectral_unclamped": sqrt(rows / columns).
    """
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(n_rows, n_columns))
    ratio = n_rows / max(n_columns, 1)
    return math.sqrt(ratio if name == "spectral_unclamped" else max(1.0, ratio))


def orthogonalize(stack: torch.Tensor, iteration: Iteration, ratio: float) -> None:
    """Bring all singular values of each matrix near `ratio`, in place; [..., rows, columns] of any strides.

    A zero matrix stays zero. One with an element that is not finite becomes NaN, and no other does.
    """
    if not stack.numel():
        return
    x = stack.flatten(0, -3)  # a copy where strides want it
    with torch.autocast(x.device.type, enabled=False):
        _iterate(x, iteration, ratio)
    if x.data_ptr() != stack.data_ptr():
        stack.copy_(x.view(stack.shape))


def _iterate(x: torch.Tensor, iteration: Iteration, ratio: float) -> None:
    """Iterate in place, [matrices, rows, columns]. The smaller of the two products of x with itself is taken."""
    norm = norms_of(x).to(x.dtype)
    if iteration.safety != 1.0:
        norm = norm * iteration.safety
    norm = norm.clamp(min=max(iteration.eps, _TINY))
    is_tall = x.shape[1] > x.shape[2]
    old, new = x, torch.empty_like(x)
    if len(iteration.steps) % 2:
        torch.div(x, norm, out=new)
        old, new = new, old
    else:
        x.div_(norm)
    for i, (a, b, c) in enumerate(iteration.steps):
        factor = ratio if i == len(iteration.steps) - 1 else 1.0
        if iteration.symmetric:
            gram = symmetric_product(old.mT if is_tall else old)
            gram = symmetric_product(gram, gram, alpha=c, beta=b)
        else:
            gram = torch.bmm(old.mT, old) if is_tall else torch.bmm(old, old.mT)
            gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        # Not the transpose of a wide product: a transposed `out` takes PyTorch on the CPU 300 times as long.
        left, right = (old, gram) if is_tall else (gram, old)
        torch.baddbmm(old, left, right, beta=a * factor, alpha=factor, out=new)
        old, new = new, old


def norms_of(x: torch.Tensor) -> torch.Tensor:
    """Frobenius norms [matrices, 1, 1], at least fp32: over rows and then over their norms, always in that order."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms[:, None, None]


def normalize_rows(x: torch.Tensor, moments: torch.Tensor, iteration: Iteration, ratio: float) -> None:
    """Divide rows of orthogonal matrices by the roots of their second moments, in place, and put back the norm.

        q = mean of squares over each row of X
        v_t = beta2 v_{t-1} + (1 - beta2) q
        Y = X / (sqrt(v_t) + 1e-10)
        X = ratio |X|_F Y / |Y|_F                 "match_rms_adamw": sqrt(min(rows, columns)) in place of |X|_F

    Li et al. 2025, arXiv:2510.05491: as in the authors' code, with "match_rms_adamw" as in the paper, whose updates
    have an RMS of 0.2 lr.

    Args:
        x: [..., rows, columns], written.
        moments: v_{t-1}, [..., rows, 1], overwritten with q: who keeps them makes the same v_t of it.
        iteration: settings; its beta2 is not None.
        ratio: `ratio_of` this shape.
    """
    assert iteration.beta2 is not None
    n_rows, n_columns = x.shape[-2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square() / max(1, n_columns)
    now = iteration.beta2 * moments + (1 - iteration.beta2) * squares
    scale = 1.0 / (now.sqrt() + ROW_EPS)
    # Norms are over rows and then over their norms; both lack the same factor, the root of the columns.
    new_norm = (squares * scale.square()).sum(-2, keepdim=True).sqrt().clamp(min=ROW_EPS)
    if iteration.ratio == "match_rms_adamw":
        factor = ratio * math.sqrt(min(n_rows, n_columns) / max(1, n_columns)) / new_norm
    else:
        factor = ratio * squares.sum(-2, keepdim=True).sqrt() / new_norm
    x.mul_(scale * factor)
    moments.copy_(squares)
