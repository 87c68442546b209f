"""Scalars of an update: one set for all parameters that have learning rate, weight decay and count in common."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tritopt.engine.group import Array, ScalarTable
from tritopt.kernels.twins.random import STEPS
from tritopt.mxnet.replay import Launched


class ParameterScalars(NamedTuple):
    """Scalars of an update: each different set once, and which of them each parameter has."""

    scalars: list[Any]
    """NamedTuples of the rule's scalars, one per set."""
    values: list[tuple[float, ...]]
    """Sets of rescale, clip bound, decay, the rule's scalars, and the step in [0, STEPS)."""
    place_of: np.ndarray[Any, np.dtype[np.int64]]
    """Place of each parameter's set in `values`, int64 [parameters]."""

    def of_launch(self, launched: Launched) -> ScalarTable:
        """Table of a launch's parameters, with the step where it draws."""
        values = np.array(self.values, dtype=np.float64)
        if not launched.draws:
            values = np.ascontiguousarray(values[:, :-1])
        return ScalarTable(
            values, self.place_of if len(launched.places) == len(self.place_of) else self.place_of[launched.places]
        )


class Partition:
    """Sets of parameters with equal scalars, kept for the next update, where they mostly are the same."""

    def __init__(self) -> None:
        self._rates: list[list[float]] = []
        self._firsts: list[int] = []
        self._place_of: Array = np.empty(0, np.int64)

    def __reduce__(self) -> tuple[type[Partition], tuple[()]]:
        """A copy begins without any."""
        return Partition, ()

    def of(
        self, rates: list[list[float]], counts: list[int], others: list[Sequence[Hashable]]
    ) -> tuple[list[int], Array]:
        """A parameter of each set, and the place of each parameter's set, int64 [parameters].

        rates: learning rates and decays of all parameters. others: more that parameters of a set must have in common.
        """
        has_one_count = bool(counts) and counts.count(counts[0]) == len(counts) and not others
        if has_one_count and rates == self._rates:
            return self._firsts, self._place_of
        if has_one_count and all(column.count(column[0]) == len(column) for column in rates):
            firsts, place_of = [0], np.zeros(len(counts), np.int64)
        else:
            places: dict[Any, int] = {}
            firsts, place_of = [], np.empty(len(counts), np.int64)
            for i, key in enumerate(zip(*rates, counts, *others, strict=True)):
                place_of[i] = places.setdefault(key, len(places))
                if len(places) > len(firsts):
                    firsts.append(i)
        if has_one_count:
            self._rates, self._firsts, self._place_of = [list(column) for column in rates], firsts, place_of
        return firsts, place_of


def scalars_at(
    common: tuple[float, float],
    firsts: Sequence[int],
    place_of: Array,
    lrs: Sequence[float],
    wds: Sequence[float],
    counts: Sequence[int],
    scalars_of: Callable[[int, float, float, int], Any],
) -> ParameterScalars:
    """Scalars of an update, from a parameter of each set.

    common: rescale and clip bound. scalars_of: returns the rule's scalars for a place, its rates and its count.
    """
    scalars = [scalars_of(i, lrs[i], wds[i], counts[i]) for i in firsts]
    values = [(*common, wds[i], *own, float(counts[i] % STEPS)) for i, own in zip(firsts, scalars, strict=True)]
    return ParameterScalars(scalars, values, place_of)
