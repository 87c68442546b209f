"""The report: every problem in every format, and the table of what came out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import NamedTuple

from tritopt import optim
from tritopt.engine import validate
from tritopt.tools.numerics.digits import DIGITS, Digits, digits_result, train_digits
from tritopt.tools.numerics.record import FormatResult
from tritopt.tools.numerics.stress import (
    ANY_OUTLIERS,
    CASES,
    DECAY,
    GRADIENTS,
    SAME_OUTLIERS,
    Case,
    Stress,
    stress_results,
    train_stress,
)
from tritopt.tools.storage import TRUTH, StorageFormat, find_formats

STEPS = 3000
DIGITS_LR = 1e-4


@dataclass
class Report:
    """Results in these formats, the truth's before them."""

    cls: type[optim.Optimizer] = optim.AdamW
    formats: Sequence[StorageFormat] = field(default_factory=find_formats)
    steps: int = STEPS
    lr: float = DIGITS_LR
    """Learning rate of the digits."""
    with_digits: bool = True

    def __post_init__(self) -> None:
        if validate.finite("lr", self.lr) <= 0:
            raise ValueError(f"lr={self.lr!r} must be positive")
        if self.with_digits and find_spec("sklearn") is None:
            raise ImportError(
                "the digits need scikit-learn: pip install 'tritopt[numerics]', or leave them out with --no-digits"
            )

    def __len__(self) -> int:
        return (1 + len(self.formats)) * (len(self.cases) + self.with_digits)

    @property
    def cases(self) -> list[Case]:
        """Cases of the stress: all that the optimizer takes."""
        return [case for case in CASES if self.cls.rule.decays or not case.weight_decay]

    def results(self) -> Iterator[FormatResult]:
        """Train, and yield results as soon as they are known."""
        stress = Stress(self.cases, self.steps)
        truth = train_stress(self.cls, TRUTH, stress)
        if self.with_digits:
            digits = Digits.load()
            of_digits = train_digits(self.cls, TRUTH, digits, self.steps, self.lr)
        for fmt in (TRUTH, *self.formats):
            if self.with_digits:
                yield digits_result(self.cls, fmt, digits, self.steps, self.lr, of_digits)
            yield from stress_results(self.cls, fmt, stress, truth)


class Column(NamedTuple):
    """Column of the table: one number per format."""

    title: str
    number: str
    """Name of a field of `FormatResult`."""
    cases: tuple[str, ...]
    """Names of cases; the worst of them is shown."""


COLUMNS = (
    Column("bytes kept", "resident", tuple(GRADIENTS)),
    Column("bytes moved", "moved", tuple(GRADIENTS)),
    Column("digits: loss", "loss", (DIGITS,)),
    Column("digits: drift %", "drift", (DIGITS,)),
    *(Column(f"kept %, lr {rate}", "kept", (f"lr {rate}",)) for rate in ("1e-2", "1e-4", "1e-6")),
    Column("update %, any g", "update", tuple(GRADIENTS)),
    Column("drift %, any g", "drift", tuple(GRADIENTS)),
    Column("kept %, outliers", "kept", (SAME_OUTLIERS, ANY_OUTLIERS)),
    Column("decay to", "remains", (DECAY,)),
)
EXPLANATION = (
    "bytes: per parameter, the gradient included. kept: share of the truth's movement. update: rms of single updates, "
    "as a share of the truth's. drift: distance from the truth, as a share of its movement. g: rms of the gradients. "
    "lr: learning rate, about an update's share of the weight. Weights are compared as the arithmetic sees them."
)


def summary(results: Sequence[FormatResult]) -> dict[str, list[str]]:
    """Make the table: the cells of `COLUMNS` by name of the format. A format that was refused has dashes."""
    formats = dict.fromkeys(result.format for result in results)
    return {
        name: [_cell([result for result in results if result.format == name], column) for column in COLUMNS]
        for name in formats
    }


def _cell(results: Sequence[FormatResult], column: Column) -> str:
    known = [getattr(result, column.number) for result in results if result.case in column.cases]
    known = [value for value in known if value is not None]
    if not known:
        return "-"
    # Not a number is the worst of all, and no maximum would find it.
    value = max(known, key=lambda v: math.inf if math.isnan(v) else abs(v - (column.number in ("kept", "update"))))
    if column.number in ("resident", "moved"):
        return f"{value:.4g}"
    if column.number in ("loss", "remains"):
        return f"{value:.3f}"
    if column.number == "drift":
        return "0" if value == 0 else "<0.01" if value < 1e-4 else f"{100 * value:.{2 if value < 0.1 else 0}f}"
    return f"{100 * value:.1f}"
