"""Targets for a step, and whether they are met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from tritopt.tools.bench.measure import OURS, Measurement
from tritopt.tools.bench.peers import PEERS
from tritopt.tools.bench.plan import ELEMENTWISE, MAIN, MIXED
from tritopt.tools.bench.shapes import MODELS

Verdict = Literal["met", "missed", "not measured"]
Numbers: TypeAlias = Callable[[Sequence[Measurement]], list[float]]
"""Selects the numbers that a target is about."""


class Target(NamedTuple):
    """A number that must be reached by the worst of what it is about."""

    name: str
    required: float
    worst: Callable[[Sequence[float]], float]
    """Function that picks the worst number: min where more is better, max where less is."""
    numbers: Numbers
    """Function that selects the numbers that the target is about."""
    percent: bool = False
    unit: str = ""

    def is_met_by(self, value: float) -> bool:
        """Tell whether the number reaches it."""
        return value >= self.required if self.worst is min else value <= self.required

    def shown(self, value: float) -> str:
        """Write a number as the table has it."""
        return f"{100 * value:.1f}%" if self.percent else f"{value:.3g}{self.unit}"


class Judged(NamedTuple):
    """Verdict on a target."""

    target: str
    required: str
    measured: str | None
    """The worst of the numbers; None: there is none."""
    verdict: Verdict
    of: int
    """Number of numbers that the target was about."""


def _shares(model: tuple[str, ...] | None, optimizers: tuple[str, ...]) -> Numbers:
    names = None if model is None else tuple(MODELS[key].name for key in model)

    def numbers(rows: Sequence[Measurement]) -> list[float]:
        return [
            row.share
            for row in rows
            if row.contestant == OURS and row.format == MAIN and row.optimizer in optimizers
            # A step of less than 10^8 parameters has targets of its own, or none.
            if (row.shapes.startswith(names) if names else row.elements > 10**8)
            if row.share is not None
        ]

    return numbers


def _ratios(
    peers: tuple[str, ...], name: str, formats: tuple[str, ...] | None = None, model: str | None = None
) -> Numbers:
    def numbers(rows: Sequence[Measurement]) -> list[float]:
        values = [
            getattr(row, name)
            for row in rows
            if row.contestant in peers
            if formats is None or row.format in formats
            if model is None or row.shapes == MODELS[model].name
        ]
        return [value for value in values if value is not None]

    return numbers


def _replayed(name: str) -> Numbers:
    def numbers(rows: Sequence[Measurement]) -> list[float]:
        # Products of matrices are torch's, which allocates for them.
        values = [getattr(row, name) for row in rows if row.contestant == OURS and row.optimizer not in ("Muon", MIXED)]
        return [float(value) for value in values if value is not None]

    return numbers


PER_TENSOR = tuple(dict.fromkeys(peer.name for peer in PEERS if peer.per_tensor))
_BILLION = ("gpt2-xl", "llama3-8b")

TARGETS = (
    Target("AdamW, bf16 + 16 bits, 1B parameters: share of a copy", 0.92, min, _shares(_BILLION, ("AdamW",)), True),
    Target("AdamW, bf16 + 16 bits, ResNet-50: likewise", 0.85, min, _shares(("resnet50",), ("AdamW",)), True),
    Target("other elementwise optimizers: share of a copy", 0.90, min, _shares(None, ELEMENTWISE), True),
    Target("LAMB, LANS, LARS: share of a copy", 0.85, min, _shares(None, ("LAMB", "LANS", "LARS")), True),
    Target(
        "torch fused, fp32: its time in units of ours", 1.0, min, _ratios(("torch fused",), "device_ratio")
    ),
    Target(
        "FlashOptim, 24 + 8 bit: its time in units of ours", 1.4, min,
        _ratios(("FlashOptim",), "device_ratio", ("split8+int8",)),
    ),
    Target(
        "libraries with a launch per tensor, 10,000 tensors: their time in units of ours", 10.0, min,
        _ratios(PER_TENSOR, "ratio", None, "tiny"),
    ),
    Target("allocations of a warm step", 0, max, _replayed("allocations")),
    Target("synchronisations of a warm step", 0, max, _replayed("synchronises")),
)  # fmt: skip
"""Targets for an H200."""


def judge(rows: Sequence[Measurement], is_rehearsal: bool = False) -> list[Judged]:
    """Judge for each target whether all that was measured meets it. A rehearsal measures nothing."""
    verdicts = []
    for target in TARGETS:
        required = f"{'>=' if target.worst is min else '<='} {target.shown(target.required)}"
        values = [] if is_rehearsal else target.numbers(rows)
        if not values:
            verdicts.append(Judged(target.name, required, None, "not measured", 0))
            continue
        value = target.worst(values)
        verdict: Verdict = "met" if target.is_met_by(value) else "missed"
        verdicts.append(Judged(target.name, required, target.shown(value), verdict, len(values)))
    return verdicts
