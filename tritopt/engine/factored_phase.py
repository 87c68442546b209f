"""The phase of an optimizer whose second moment is factored into that of rows and that of columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from tritopt.engine import driver
from tritopt.engine.group import LaunchGroup
from tritopt.engine.launcher import launch_once
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.row_phase import group_constants
from tritopt.engine.tuning.config import GENERIC, Config
from tritopt.kernels.drivers.factored_apply import (
    N_SHAPE,
    factored_apply,
    factored_means,
    factored_moments,
    factored_sums,
)
from tritopt.kernels.drivers.multi_tensor_norm import sum_partials

BLOCK_PARTS, BLOCK_LINES = 8, 128


class ApplyFactored(NamedTuple):
    """Launches of kernels/drivers/factored_apply.py, and one that adds up sums. States: row moments, column moments.

    One more launch of each kind for every further kind of small matrices (`block_of`) in the list. The preamble must
    not read the weight ("decoupled", "rescaled" or "raw").
    """

    square: Any
    """The @triton.jit functions of the module, in its order."""
    moment: Any
    variance: Any
    direction: Any
    update: Any

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the update functions, in the order of the launches."""
        return (
            "factored_sums",
            "factored_moments",
            "factored_means",
            "factored_norms",
            str(self.update.__name__),
        )

    @property
    def n_sums(self) -> int:
        """0: no sum leaves the phase."""
        return 0

    @property
    def sums_elements(self) -> bool:
        """All moments and norms depend on the order of summation."""
        return True

    @property
    def is_driver(self) -> bool:
        """Kernels of its own do."""
        return False

    def traffic(self, weight: tuple[float, float], grad: float, states: float) -> tuple[float, float]:
        """Bytes per parameter of matrices (read, written): the gradient three times, the weight twice.

        The moments of vectors are advanced by the norms, and read again by the update.
        """
        return 3 * grad + 2 * weight[0] + 2 * states, weight[1] + states

    def launch(self, group: LaunchGroup, launch: LaunchSpec, sums: torch.Tensor | None) -> None:
        """Make all launches of the phase, in the order that the kernels' module gives."""
        config = launch.config or launch.generic or GENERIC
        shape_table, tile_counts, line_table, sizes, *flat = group.tables(
            ("factored", config), partial(tables_of, config=config)
        )
        kinds = [Kind(*flat[i : i + len(Kind._fields)]) for i in range(0, len(flat), len(Kind._fields))]
        constants = group_constants(group, launch)
        scratch = partial(torch.empty, device=group.device)
        dtype = torch.float64 if group.dtypes[0] == torch.float64 else torch.float32
        parts, means = scratch(sizes.parts, dtype=dtype), scratch(sizes.means, dtype=dtype)
        partials = scratch((sizes.tiles, 2), dtype=torch.float64)
        totals = scratch((len(group.members), 2), dtype=torch.float64)
        functions = (*self, group.format.load, group.format.store)
        common = {
            **constants,
            "SOURCE_HASH": driver.source_hash(functions, launch.scalars),
            "num_warps": config.num_warps,
        }
        without = partial(_without, common)
        once = partial(launch_once, launch.record)
        flags = (launch.rescale, launch.noop)
        table, n_tensors = group.device_table, len(group.members)

        for kind in kinds:
            if kind.factored_tiles:
                once(
                    factored_sums, kind.factored_tiles, table, shape_table, kind.tiles, *flags, parts, n_tensors,
                    SQUARE_FN=self.square, **kind.block(config), **without("LOAD_FN", "STORE_FN"),
                )  # fmt: skip
        if len(line_table):
            once(
                factored_moments, len(line_table), table, shape_table, line_table, *flags, parts, n_tensors,
                MOMENT_FN=self.moment, BLOCK_PARTS=BLOCK_PARTS, BLOCK_LINES=BLOCK_LINES,
                **without("LOAD_FN", "STORE_FN", "PREAMBLE_FN", "VECTOR"),
            )  # fmt: skip
        for kind in kinds:
            if len(kind.matrices):
                once(
                    factored_means, len(kind.matrices), table, shape_table, kind.matrices, means,
                    BB=kind.shape[0], BLOCK_ROWS=max(1, config.block_size // kind.shape[0]),
                    **{name: constants[name] for name in ("N_PLANES", "DTYPES", "COMPUTE_DTYPE")},
                    num_warps=config.num_warps,
                )  # fmt: skip
        for is_update in (False, True):
            for kind in kinds:
                once(
                    factored_apply, len(kind.tiles), table, shape_table, kind.tiles, *flags, means, partials, totals,
                    n_tensors, FUNCTIONS=tuple(self), IS_UPDATE=is_update, **kind.block(config), **common,
                )  # fmt: skip
            if not is_update:
                once(
                    sum_partials, n_tensors, partials, tile_counts, totals, sizes.tiles, n_tensors,
                    N_SUMS=2, BLOCK_SIZE=1024,
                )  # fmt: skip


class Kind(NamedTuple):
    """The tensors of a list whose tiles go in blocks of one shape."""

    shape: tuple[int, int, int]
    """Matrices, rows and columns of a block."""
    factored_tiles: int
    """Number of tiles of factored tensors, which stand in front of the others."""
    tiles: Any
    matrices: Any

    def block(self, config: Config) -> dict[str, int]:
        """Compile-time arguments for this shape of block."""
        return {**dict(zip(("BB", "BR", "BC"), self.shape, strict=True)), "TILE_ROWS": _tile_rows(self.shape, config)}


class Sizes(NamedTuple):
    """Sizes of the scratch memory that a step allocates, in elements."""

    parts: int
    means: int
    tiles: int


def block_of(n_rows: int, n_columns: int, config: Config) -> tuple[int, int, int]:
    """Matrices, rows and columns of a block for matrices of this size.

    One block of a large matrix, or small matrices side by side, 512 elements at most: they need more registers.

    >>> from tritopt.engine.tuning.config import NVIDIA
    >>> block_of(4096, 14336, NVIDIA), block_of(3, 3, NVIDIA)
    ((1, 8, 128), (32, 4, 4))
    """
    columns = min(_power_of_2(n_columns), _widest(config))
    rows = min(_power_of_2(n_rows), config.block_size // columns)
    return max(1, min(config.block_size, 512) // (columns * rows)), rows, columns


def tables_of(shapes: Sequence[torch.Size], config: Config) -> tuple[Any, ...]:
    """The kernels' tables: of shapes, tiles per tensor, lines, the sizes of scratch; then a Kind after the other."""
    widest = _widest(config)
    table = np.zeros((len(shapes), int(getattr(N_SHAPE, "value", N_SHAPE))), dtype=np.int64)
    members: dict[tuple[int, int, int], list[int]] = {}
    counts = []
    parts = means = tiles = 0
    for i, shape in enumerate(shapes):
        size, is_factored = shape.numel(), len(shape) >= 2
        rows, columns = (shape[-2], shape[-1]) if is_factored else (-(-size // widest), widest)
        matrices = size // (rows * columns) if is_factored else 1
        block = block_of(rows, columns, config) if is_factored else (1, config.block_size // widest, widest)
        down, across = -(-rows // _tile_rows(block, config)), -(-columns // block[2])
        n_tiles = down * across * -(-matrices // block[0])
        row_parts, column_parts = across * matrices * rows, down * matrices * columns
        table[i] = (
            *(matrices, rows, columns, size, is_factored, down, across, tiles),
            *(parts, parts + row_parts, means),
        )
        members.setdefault(block, []).append(i)
        counts.append(n_tiles)
        tiles += n_tiles
        if is_factored:
            parts, means = parts + row_parts + column_parts, means + matrices
    kinds: list[Any] = []
    for block, those in members.items():
        those.sort(key=lambda i: -table[i, 4])  # vectors behind
        factored = [i for i in those if table[i, 4]]
        blocks = [-(-int(table[i, 0]) // block[0]) for i in factored]
        kinds.extend(
            Kind(block, sum(counts[i] for i in factored), _numbered(those, [counts[i] for i in those]),
                 _numbered(factored, blocks))
        )  # fmt: skip
    factored = [i for i in range(len(shapes)) if table[i, 4]]
    lines = []
    for is_column in (0, 1):
        n_blocks = [-(-int(table[i, 0] * table[i, 1 + is_column]) // BLOCK_LINES) for i in factored]
        numbered = _numbered(factored, n_blocks)
        lines.append(np.insert(numbered, 1, is_column, axis=1))
    tile_counts = np.ascontiguousarray(table[:, [3, 7, 2]])  # with the columns of the driver's table of tensors
    return table, tile_counts, np.concatenate(lines), Sizes(parts, means, tiles), *kinds


def _numbered(owners: Sequence[int], counts: Sequence[int]) -> np.ndarray[Any, Any]:
    """Rows (owner, 0), (owner, 1), ... up to its count, for each owner; int32."""
    ends = np.cumsum(counts, dtype=np.int64)
    numbers = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - np.array(counts, dtype=np.int64), counts)
    return np.stack([np.repeat(np.array(owners, dtype=np.int64), counts), numbers], axis=1).astype(np.int32)


def _widest(config: Config) -> int:
    """Most columns that a block has: rows are whole sectors of memory, and eight of them share the sum of a column."""
    return max(1, config.block_size // 8)


def _tile_rows(block: tuple[int, int, int], config: Config) -> int:
    return block[1] * (config.chunk_size // config.block_size)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _without(constants: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in constants.items() if name not in names}
