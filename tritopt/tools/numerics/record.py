"""The record of one format and problem, and how far weights went beside the truth."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tritopt import optim
from tritopt.tools.storage import StorageFormat


@dataclass(frozen=True)
class FormatResult:
    """Outcome of one format in one case. None: it says nothing here, or the format was refused."""

    optimizer: str
    format: str
    arguments: dict[str, Any]
    """Arguments of the optimizer that choose the format."""
    weight_dtype: str
    problem: str
    """Name of the problem, digits or stress."""
    case: str
    steps: int
    lr: float
    weight_decay: float = 0.0
    gradient_rms: float | None = None
    """Root mean square of the stress's gradients; None: the problem has none of its own."""
    resident: float | None = None
    """Bytes per parameter of weight, gradient and states, of the tensors that were allocated."""
    moved: float | None = None
    """Bytes per parameter of these tensors that a step reads and writes."""
    kept: float | None = None
    """Share of the truth's movement: that part of the movement which goes along it. 1 is right."""
    drift: float | None = None
    """Distance from the truth, as a share of the truth's movement. 0 is right."""
    update: float | None = None
    """Rms of single updates, as a multiple of the truth's. Noise of the rounding counts. 1 is right."""
    remains: float | None = None
    """Share of the first weight that is left; the truth's is exp(-lr decay steps) or so where there is only decay."""
    loss: float | None = None
    """Cross-entropy over the training images, after the last step."""
    accuracy: float | None = None
    """Share of the test images that are recognised."""
    refused: str | None = None
    """Reason why the optimizer does not take the format; None: it does."""


class Movement(NamedTuple):
    """Distance that weights went, beside the truth's; as in FormatResult. None where the truth does not move."""

    kept: float | None
    drift: float | None

    @classmethod
    def of(cls, weights: torch.Tensor, truth: torch.Tensor, start: torch.Tensor) -> Movement:
        """Compare one tensor with the truth. None where the truth does not move."""
        moved, expected = weights.double() - start.double(), truth.double() - start.double()
        size = float(expected.square().sum())
        if size == 0:
            return cls(None, None)
        kept, drift = float((moved * expected).sum()) / size, math.sqrt(float((moved - expected).square().sum()) / size)
        return cls(kept, drift)


def described(cls: type[optim.Optimizer], fmt: StorageFormat) -> dict[str, Any]:
    """Say which optimizer trains in which format: the first fields of a record."""
    return {
        "optimizer": cls.__name__,
        "format": fmt.name,
        "arguments": fmt.arguments,
        "weight_dtype": str(fmt.dtype).removeprefix("torch."),
    }


def load(path: Path) -> list[FormatResult]:
    """Read results that `tritopt numerics --json` printed; ValueError for a file that holds anything else."""
    try:
        return [FormatResult(**record) for record in json.loads(path.read_text())]
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold what `tritopt numerics --json` prints: {error}") from error
