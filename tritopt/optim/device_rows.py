"""Scalars formed on the device, from steps, learning rates and loss scales that live there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tritopt.fused import DeviceRows


class RowTable:
    """The rows of scalars of one launch. What is constant is uploaded once, and again only when it changes."""

    def __init__(self) -> None:
        self._constants = np.empty(0)
        self._values = torch.empty(0)

    def fill(
        self, blocks: Sequence[Sequence[float | torch.Tensor]], n_rows: Sequence[int], device: torch.device
    ) -> DeviceRows:
        """One row per parameter.

        Args:
            blocks: for each set of parameters with equal hyperparameters its row; where that has a tensor, [n] or [],
                a number for each parameter of the set.
            n_rows: the sets' numbers of parameters.
            device: of the table.
        """
        constants = np.array([[0.0 if isinstance(x, torch.Tensor) else x for x in row] for row in blocks])
        constants = np.repeat(constants, n_rows, axis=0)
        if self._values.device != device or not np.array_equal(constants, self._constants):
            self._constants, self._values = constants, torch.from_numpy(constants.copy()).to(device)
        start = 0
        for row, n in zip(blocks, n_rows, strict=True):
            for column, x in enumerate(row):
                if isinstance(x, torch.Tensor):
                    self._values[start : start + n, column] = x
            start += n
        return DeviceRows(self._values, range(start))
