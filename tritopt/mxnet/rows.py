"""Scalars of an update: one row for all parameters that have their learning rate, weight decay and count in common."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tritopt.engine.group import Array, Rows
from tritopt.kernels.twins.random import STEPS
from tritopt.mxnet.replay import Launched


class ParameterRows(NamedTuple):
    """Scalars of an update."""

    scalars: list[Any]
    """The rule's, of each different row."""
    values: list[tuple[float, ...]]
    """Rows of rescale, clip bound, decay, the rule's scalars, and the step in [0, STEPS)."""
    row_of: np.ndarray[Any, np.dtype[np.int64]]
    """Place of each parameter's row among them."""

    def of_launch(self, launched: Launched) -> Rows:
        """The rows of its parameters, with the step where it draws."""
        values = np.array(self.values, dtype=np.float64)
        if not launched.draws:
            values = np.ascontiguousarray(values[:, :-1])
        return Rows(values, self.row_of if len(launched.places) == len(self.row_of) else self.row_of[launched.places])


class Partition:
    """Which parameters have a row in common, kept for the next update, where it mostly is the same."""

    def __init__(self) -> None:
        self._rates: list[list[float]] = []
        self._firsts: list[int] = []
        self._row_of: Array = np.empty(0, np.int64)

    def __reduce__(self) -> tuple[type[Partition], tuple[()]]:
        """A copy finds it again."""
        return Partition, ()

    def of(
        self, rates: list[list[float]], counts: list[int], others: list[Sequence[Hashable]]
    ) -> tuple[list[int], Array]:
        """A parameter of each row, and each parameter's row, int64.

        rates: of all parameters. others: more that parameters must have in common.
        """
        has_one_count = bool(counts) and counts.count(counts[0]) == len(counts) and not others
        if has_one_count and rates == self._rates:
            return self._firsts, self._row_of
        if has_one_count and all(column.count(column[0]) == len(column) for column in rates):
            firsts, row_of = [0], np.zeros(len(counts), np.int64)
        else:
            places: dict[Any, int] = {}
            firsts, row_of = [], np.empty(len(counts), np.int64)
            for i, key in enumerate(zip(*rates, counts, *others, strict=True)):
                row_of[i] = places.setdefault(key, len(places))
                if len(places) > len(firsts):
                    firsts.append(i)
        if has_one_count:
            self._rates, self._firsts, self._row_of = [list(column) for column in rates], firsts, row_of
        return firsts, row_of


def rows_of(
    common: tuple[float, float],
    firsts: Sequence[int],
    row_of: Array,
    lrs: Sequence[float],
    wds: Sequence[float],
    counts: Sequence[int],
    scalars_of: Callable[[int, float, float, int], Any],
) -> ParameterRows:
    """The rows. common: rescale and clip bound. scalars_of: the rule's, of a place, its rates and its count."""
    scalars = [scalars_of(i, lrs[i], wds[i], counts[i]) for i in firsts]
    values = [(*common, wds[i], *own, float(counts[i] % STEPS)) for i, own in zip(firsts, scalars, strict=True)]
    return ParameterRows(scalars, values, row_of)
