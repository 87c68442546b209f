"""Telemetry: what a step does to each tensor, summed up in its kernels' registers, so no byte of it moves for that.

One reads here what a loss curve does not show: a tensor whose stored weight no longer changes because its updates are
below the distance of two bf16 numbers, gradients that are not finite and of which tensor, updates out of proportion.
"""

from __future__ import annotations

import io
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from tritopt.kernels.telemetry import COLUMNS


class Tracked(NamedTuple):
    """Sums that one launch formed over its tensors."""

    places: Sequence[int]
    """Places of the tensors among those of the launch."""
    columns: tuple[str, ...]
    """Names of the columns of `sums`, some of COLUMNS."""
    sums: torch.Tensor
    """Sums over each tensor, fp64 [places, columns], on the device."""


class TensorTelemetry(NamedTuple):
    """Telemetry of one tensor in the last step."""

    name: Hashable
    elements: int
    grad_norm: float
    """Euclidean norm of the gradient as it was given: before unscaling and clipping."""
    weight_norm: float
    """Euclidean norm of the weight after the step, the master if there is one; 0 if the step was skipped."""
    update_norm: float
    """Euclidean norm of the change that was computed, before the weight was rounded."""
    unchanged: float
    """Share of elements whose stored weight did not change; 0 to 1."""
    nonfinite: int
    """Number of elements of the gradient that are NaN or infinite."""


class Telemetry(list[TensorTelemetry]):
    """A row for each tensor; printed as a table."""

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("name", *[f.replace("_", " ") for f in TensorTelemetry._fields[1:]])
        for row in self:
            numbers = (f"{row.grad_norm:.3e}", f"{row.weight_norm:.3e}", f"{row.update_norm:.3e}")
            table.add_row(str(row.name), f"{row.elements:,}", *numbers, f"{row.unchanged:.1%}", f"{row.nonfinite:,}")
        text = io.StringIO()
        Console(file=text, width=max(100, 60 + max((len(str(row.name)) for row in self), default=0))).print(table)
        return text.getvalue().rstrip()


class Tracker:
    """Sums over each tensor in its last step. Nothing waits for them until somebody asks."""

    def __init__(self) -> None:
        self._last: dict[Hashable, tuple[list[Tracked], int, int]] = {}

    def __reduce__(self) -> tuple[type[Tracker], tuple[()]]:
        """Reduce to a tracker without sums: a copy starts without any."""
        return Tracker, ()

    def add(self, names: Sequence[Hashable], tracked: list[Tracked]) -> None:
        """Take what a launch over these tensors summed up."""
        self._last.update((name, (tracked, len(names), place)) for place, name in enumerate(names))

    def sums(self, names: Sequence[Hashable]) -> torch.Tensor:
        """Sums of these tensors, fp64 [tensors, COLUMNS], on the CPU; NaN for tensors that had no step."""
        sums = torch.full((len(names), len(COLUMNS)), torch.nan, dtype=torch.float64, device="cpu")
        launches: dict[int, torch.Tensor] = {}
        for row, name in enumerate(names):
            if name in self._last:
                tracked, size, place = self._last[name]
                if id(tracked) not in launches:
                    launches[id(tracked)] = _joined(tracked, size)
                sums[row] = launches[id(tracked)][place]
        return sums


def _joined(tracked: Sequence[Tracked], size: int) -> torch.Tensor:
    """Sums of all launches, fp64 [size, COLUMNS]; 0 where a tensor has no elements here."""
    table = torch.zeros(size, len(COLUMNS), dtype=torch.float64, device="cpu")
    for places, columns, values in tracked:
        at = [COLUMNS.index(column) for column in columns]
        for place, row in zip(places, values.cpu(), strict=True):
            table[place, at] = row
    return table


def telemetry(names: Sequence[Hashable], sizes: Sequence[int], sums: torch.Tensor) -> Telemetry:
    """The table of the tensors that had a step. sums: fp64 [tensors, COLUMNS]."""
    rows = []
    for name, size, values in zip(names, sizes, sums.tolist(), strict=True):
        of = dict(zip(COLUMNS, values, strict=True))
        if math.isnan(of["unchanged"]):
            continue
        rows.append(
            TensorTelemetry(
                name,
                size,
                grad_norm=of["grad_square"] ** 0.5,
                weight_norm=of["weight_square"] ** 0.5,
                update_norm=of["update_square"] ** 0.5,
                unchanged=of["unchanged"] / max(size, 1),
                nonfinite=int(of["nonfinite"]),
            )
        )
    return Telemetry(rows)


def whole(place: int, columns: torch.Tensor) -> Tracked:
    """Sums of one tensor that has all COLUMNS, as a launch would give them."""
    return Tracked((place,), COLUMNS, columns[None])


def check_asked(is_tracked: bool, name: str) -> None:
    """ValueError where nothing was summed up because nobody asked for it."""
    if not is_tracked:
        raise ValueError(
            f"this {name} sums up nothing: construct it with track=True, and call telemetry() after a step"
        )


def refuse(name: str, way_out: str) -> None:
    """ValueError: kernels that track nothing. way_out: the argument that runs the reference."""
    raise ValueError(
        f"track=True is not for {name}, whose kernels sum up nothing else: "
        f"leave it out, or run the reference ({way_out})"
    )
