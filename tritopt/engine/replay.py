"""Tables of a step that is made again: only the gradients' addresses and the scalars are new in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tritopt.engine.group import Array, LaunchGroup, refresh_table, upload_table
from tritopt.engine.phase import Reduce
from tritopt.engine.plan import Planner

_NO_SCALARS = np.array([[1.0, np.inf, 0.0]])


class ReplayTable:
    """Table of addresses of a group; only those of gradients are new in a step.

    Args:
        group: the engine's group, which was launched.
        members: places of the group's tensors among the gradients that `upload` is given.
        in_launch: places of the same tensors among the tasks of the launch, which `place_of` is for.
        words: int64 [members, pointers + 1], as the group's table has them.
        columns: columns of the table that hold the gradient's address; two for a norm.
    """

    def __init__(self, group: LaunchGroup, members: Array, in_launch: Array, words: Array, columns: slice) -> None:
        self.group = group
        self._members = slice_if_run(members)
        self._in_launch = slice_if_run(in_launch)
        self._words = words
        self._columns = columns
        self._grads: Array | None = None
        self._place_of: Array | None = None
        self._writer = object()

    def upload(self, grads: Array, place_of: Array, values: Array | torch.Tensor) -> None:
        """Bring to the device what is new: addresses of the gradients are new where their array is."""
        group, n_words = self.group, self._words.size
        n_values = values.numel() if isinstance(values, torch.Tensor) else values.size
        # Steps with gradients of other parameters may have the group in common.
        is_another = group.writer is not self._writer
        if is_another or place_of is not self._place_of or group.host_table.size != n_words + n_values:
            self._words[:, -1] = place_of[self._in_launch]
            self._words[:, self._columns] = grads[self._members, None]
            upload_table(group, self._words, values)
        elif grads is not self._grads:
            words = group.host_table[:n_words].reshape(self._words.shape)
            words[:, self._columns] = grads[self._members, None]
            refresh_table(group, n_words, values, is_dirty=True)
        else:
            refresh_table(group, n_words, values)
        self._grads, self._place_of, group.writer = grads, place_of, self._writer


def table_of(group: LaunchGroup, places: Array) -> ReplayTable:
    """The table of a group that was just launched. places: its launch's tensors among all gradients, int64."""
    in_launch = np.array(group.members, dtype=np.int64)
    members = places[in_launch]
    n_words = len(group.dtypes) + 1
    words = group.host_table[: len(members) * n_words].reshape(-1, n_words).copy()
    column = group.format.n_planes
    return ReplayTable(group, members, in_launch, words, slice(column, column + 1))


class NormTables:
    """Tables of the gradients' norm in a step that is made again; false where a kernel measures none.

    Args:
        planner: the planner of the step.
        groups: the engine's groups of the norm that was measured when the step was built.
        places: places of the gradients that are normed among those that `squares` is given, int64.
    """

    def __init__(self, planner: Planner, groups: Sequence[LaunchGroup], places: Array) -> None:
        self._planner, self._groups, self._n = planner, list(groups), len(places)
        self._place_of = np.zeros(len(places), np.int64)
        self._tables = []
        for group in groups:
            members = np.array(group.members, dtype=np.int64)
            # A gradient's norm is that of a weight which is the gradient.
            words = np.zeros((len(members), 3), np.int64)
            self._tables.append(ReplayTable(group, places[members], members, words, slice(0, 2)))

    def __bool__(self) -> bool:
        """Whether there are tables."""
        return bool(self._tables)

    def squares(self, grads: Array, device: torch.device, reduce: Reduce | None = None) -> torch.Tensor:
        """Sum of squares of each gradient that is normed, fp64 [gradients, 1]. grads: addresses of all, int64."""
        for table in self._tables:
            table.upload(grads, self._place_of, _NO_SCALARS)
        return self._planner.squares_of(self._groups, self._n, device, reduce)


def slice_if_run(places: Array) -> Array | slice:
    """An index that needs no copy, where that says the same."""
    is_run = len(places) > 0 and np.array_equal(places, np.arange(places[0], places[0] + len(places)))
    return slice(int(places[0]), int(places[0]) + len(places)) if is_run else places
