"""Distance of Muon's iteration from the orthogonal matrix that a singular value decomposition in fp64 finds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from tritopt.engine.newton_schulz import DTYPES, POLAR_EXPRESS, QUINTIC, iteration_of, orthogonalize

COEFFICIENTS: tuple[str | tuple[float, float, float], ...] = (QUINTIC, POLAR_EXPRESS)
STEPS = (3, 5, 7)
SHAPE = (128, 256)
N_MATRICES = 4
SMALLEST = 1e-2
"""Smallest singular value, as a share of the largest: gradients of a layer have some far below."""


@dataclass(frozen=True)
class Orthogonality:
    """Result of the iteration with one set of coefficients."""

    coefficients: str
    steps: int
    dtype: str
    """Dtype of the products."""
    lowest: float
    """Smallest singular value that it ends with; 1 is orthogonal."""
    highest: float
    """Largest singular value that it ends with."""
    error: float
    """Distance to the orthogonal matrix, as a share of its norm."""


def orthogonality() -> Iterator[Orthogonality]:
    """Measure each set of coefficients, number of steps and dtype, on matrices of evenly spread singular values."""
    generator = torch.Generator("cpu").manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(N_MATRICES, n, n, dtype=torch.float64, device="cpu", generator=generator))[0]
        for n in SHAPE
    )
    values = torch.logspace(0, math.log10(SMALLEST), SHAPE[0], dtype=torch.float64, device="cpu")
    orthogonal = left @ right[:, : SHAPE[0]]
    matrices = (left * values) @ right[:, : SHAPE[0]]
    for coefficients, steps, dtype in product(COEFFICIENTS, STEPS, DTYPES):
        iteration = iteration_of(coefficients, steps, dtype, 1e-7, None)
        x = matrices.to(iteration.dtype or torch.float32, copy=True)
        orthogonalize(x, iteration, 1.0)
        singular_values = torch.linalg.svdvals(x.double())
        error = (x.double() - orthogonal).norm() / orthogonal.norm()
        name = coefficients if isinstance(coefficients, str) else ", ".join(f"{c:g}" for c in coefficients)
        yield Orthogonality(
            name, steps, dtype, float(singular_values.min()), float(singular_values.max()), float(error)
        )
