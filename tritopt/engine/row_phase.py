"""The phase of an optimizer whose states hold one number per row of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tritopt.engine import driver
from tritopt.engine.group import LaunchGroup
from tritopt.engine.launcher import launch_once
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.tuning.config import GENERIC
from tritopt.kernels.drivers.row_apply import row_apply
from tritopt.kernels.language import tl
from tritopt.kernels.preambles import PREAMBLES


class ApplyRows(NamedTuple):
    """A phase of kernels/drivers/row_apply.py: one launch, one program per row of all matrices of the list.

    The preamble must not read the weight ("decoupled", "rescaled" or "raw").
    """

    mean: Any
    """The @triton.jit function of what is averaged over a row."""
    state: Any
    """The @triton.jit function of a row's new states, given the mean."""
    update: Any
    """The @triton.jit function of the new weight, given the new states."""

    @property
    def kernels(self) -> tuple[str, ...]:
        """Name of the update function, as a tuple of one."""
        return (str(self.update.__name__),)

    @property
    def n_sums(self) -> int:
        """0: no sum leaves the phase."""
        return 0

    @property
    def sums_elements(self) -> bool:
        """The mean depends on the order in which a row is summed."""
        return True

    @property
    def is_driver(self) -> bool:
        """A kernel of its own does."""
        return False

    def traffic(self, weight: tuple[float, float], grad: float, states: float) -> tuple[float, float]:
        """Bytes per parameter (read, written). The gradient is read twice, the second time mostly from the cache."""
        return weight[0] + 2 * grad + states, weight[1] + states

    def launch(self, group: LaunchGroup, launch: LaunchSpec, sums: torch.Tensor | None) -> None:
        """One launch; rows that fit into less than a block get a smaller one and fewer warps."""
        config = launch.config or launch.generic or GENERIC
        matrix_table, row_table = group.tables("rows", row_tables)
        longest = max(shape[1] for shape in group.shapes)
        # Down to one warp, whose threads still move 16 bytes each.
        smallest = config.block_size // config.num_warps
        block_size = min(max(1 << (longest - 1).bit_length(), smallest), config.block_size)
        functions = (self.mean, self.state, self.update, group.format.load, group.format.store)
        launch_once(
            launch.record,
            row_apply,
            len(row_table),
            group.device_table,
            matrix_table,
            row_table,
            launch.rescale,
            launch.noop,
            len(group.members),
            MEAN_FN=self.mean,
            STATE_FN=self.state,
            UPDATE_FN=self.update,
            **group_constants(group, launch),
            SOURCE_HASH=driver.source_hash(functions, launch.scalars),
            BLOCK_SIZE=block_size,
            num_warps=max(1, block_size // smallest),
        )


def row_tables(shapes: Sequence[torch.Size]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The kernel's tables of matrices and of rows."""
    rows, columns = np.array(shapes, dtype=np.int64).reshape(-1, 2).T
    matrices = np.stack([columns, np.cumsum(rows) - rows], axis=1)
    return matrices, np.repeat(np.arange(len(rows), dtype=np.int32), rows)


def group_constants(group: LaunchGroup, launch: LaunchSpec) -> dict[str, Any]:
    """Compile-time arguments that say how a group's tensors are stored and what its scalars are called."""
    moved = group.dtypes[: group.format.n_planes + 1]  # by whole vectors: the weight's planes and the gradient
    return {
        "PREAMBLE_FN": PREAMBLES[launch.preamble].kernel,
        "SCALARS": driver.as_constant(launch.scalars),
        "N_SCALARS": launch.n_scalars,
        "N_PLANES": group.format.n_planes,
        "LOAD_FN": group.format.load,
        "STORE_FN": group.format.store,
        "DTYPES": tuple(driver.TRITON_DTYPES[dtype] for dtype in group.dtypes),
        "VECTOR": 16 // min(dtype.itemsize for dtype in moved),
        "SKIP_ZERO_RESCALE": launch.skip_zero_rescale,
        "COMPUTE_DTYPE": tl.float64 if group.dtypes[0] == torch.float64 else tl.float32,
    }
