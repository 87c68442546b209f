"""Products of matrices with their transposes, of which a kernel computes one triangle and mirrors it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import torch

from tritopt.engine import private
from tritopt.engine.device import on_device
from tritopt.engine.launcher import KernelRecorder, launch_once
from tritopt.engine.tuning import autotune, cache
from tritopt.engine.tuning.autotune import Timer, Tuned
from tritopt.engine.tuning.config import Tiles, size_of, tiles_of
from tritopt.kernels.gram import gram
from tritopt.kernels.language import triton


def symmetric_product(
    x: torch.Tensor,
    added: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    tiles: Tiles | None = None,
    record: KernelRecorder | None = None,
) -> torch.Tensor:
    """Return X X^T, or alpha X X^T + beta added, for each X of a stack: [matrices, M, M].

    Sums are in fp32, and the kernel's results symmetric to the bit. torch computes all of it in fp64, and where M is at
    most a tile, so that no half can be left out; its results are symmetric within rounding.

    Args:
        x: X, [matrices, M, K] of any strides.
        added: symmetric matrices, [matrices, M, M], contiguous and of x's dtype.
        alpha, beta: factors, used if there is something to add.
        tiles: launch configuration; None: `choose`.
        record: told of the launch, which then is not made.
    """
    n, m, k = x.shape
    tiles = tiles or choose(x.device, x.dtype, n * m * m)
    if m <= tiles.block_size or x.dtype == torch.float64:
        return torch.bmm(x, x.mT) if added is None else torch.baddbmm(added, x, x.mT, beta=beta, alpha=alpha)
    if 1 not in x.stride()[1:]:
        x = x.contiguous()
    is_transposed = x.stride(2) != 1
    stride = x.stride(2 if is_transposed else 1)
    is_aligned = not any(size % 8 for size in (m, k, stride, x.stride(0)))
    if not is_aligned:
        # Elements are loaded one by one, each with an address in registers.
        tiles = tiles._replace(block_size=min(tiles.block_size, 64), block_k=min(tiles.block_k, 32))
    out = torch.empty(n, m, m, dtype=x.dtype, device=x.device)
    n_rows = -(-m // tiles.block_size)
    with on_device(x.device):
        launch_once(
            record,
            gram,
            n * n_rows * (n_rows + 1) // 2,
            x,
            added,
            out,
            alpha,
            beta,
            m,
            k,
            x.stride(0),
            stride,
            IS_TRANSPOSED=is_transposed,
            IS_ALIGNED=is_aligned,
            IS_WHOLE=is_aligned and not m % tiles.block_size and not k % tiles.block_k,
            BLOCK_SIZE=tiles.block_size,
            BLOCK_K=tiles.block_k,
            GROUP=tiles.group,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out


_CHOSEN: dict[tuple[torch.device, torch.dtype, int], Any] = {}


def choose(device: torch.device, dtype: torch.dtype, n_elements: int) -> Tiles:
    """Tiles for products of so many elements: what `tritopt tune` has found for this GPU, or else the default.

    A step measures nothing: tiles may decide the order of sums, and processes that measure would part. The same while
    this process lives.
    """
    product = Product(dtype)
    place = (device, dtype, size_of(n_elements))
    if place not in _CHOSEN:
        gpu = autotune.gpu_of(device)
        entry = None if gpu is None else cache.read(gpu).get(product.key(place[2]))
        _CHOSEN[place] = tiles_of(dtype) if entry is None else entry.config
    return _CHOSEN[place]  # type: ignore[no-any-return]


class Product(NamedTuple):
    """Products of matrices of a dtype, of which `tritopt tune` measures how they are launched best."""

    dtype: torch.dtype

    def key(self, size: int) -> cache.Key:
        """Key under which the cache keeps tiles for products of so many elements, as `size_of` has it."""
        name = str(self.dtype).removeprefix("torch.")
        source = private.source_key(gram)[:16]
        return cache.Key(cache.PRODUCT, "", ("plain",), (name,), size, str(triton.__version__), source)

    def tune(self, size: int, device: torch.device, timer: Timer | None = None) -> Tuned:
        """Measure tiles on a square matrix, the default first; see `autotune.tune`."""
        side = max(8, isqrt(size) // 8 * 8)
        random = torch.Generator(device).manual_seed(0)
        x = torch.empty(1, side, side, dtype=self.dtype, device=device).normal_(generator=random)
        best = [tiles_of(self.dtype)]
        try:
            entry, tried = autotune.fastest(candidates(best), best, partial(_launch, x), timer)
            return Tuned(entry, 2 * x.nbytes, tried)
        finally:
            del x
            autotune.free_scratch(device)


def _launch(x: torch.Tensor, tiles: Tiles) -> None:
    symmetric_product(x, tiles=tiles)


def candidates(best: Sequence[Tiles]) -> Iterator[Tiles]:
    """The default; tiles and warps; stages and groups for the best of them, which comes to stand last in `best`."""
    blocks = [
        {"block_size": size, "block_k": k, "num_warps": num_warps}
        for size, num_warps in ((128, 8), (64, 4), (128, 4))
        for k in (32, 64, 128)
    ]
    seen = set()
    for changes in ({}, *blocks, *[{"num_stages": n} for n in (2, 3, 5)], {"group": 4}, {"group": 16}):
        tiles = best[-1]._replace(**changes)
        if tiles not in seen:
            seen.add(tiles)
            yield tiles
