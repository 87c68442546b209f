"""Find launch configurations ahead of time, for the phases of chosen optimizers and formats: `tritopt tune`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tritopt import optim
from tritopt.engine.driver import Apply
from tritopt.engine.gram import Product
from tritopt.engine.group import LaunchGroup
from tritopt.engine.matrix_phase import ApplyMatrices
from tritopt.engine.phase import LaunchSpec, Phase, Recorder
from tritopt.engine.tuning import autotune, cache, config
from tritopt.engine.tuning.autotune import Timer, Variant
from tritopt.engine.tuning.config import Config, Tiles
from tritopt.engine.validate import did_you_mean
from tritopt.tools.numerics import StorageFormat

FORMATS = ("fp32", "master", "split16+bf16", "split8+int8")
"""Storage formats that are tuned if none is named."""
SIZES = {"small": 2**21, "medium": 2**25, "large": 2**27}
"""Sizes of lists in elements that are tuned for if none is named."""


def find_sizes(names: Sequence[str] | None = None) -> list[int]:
    """Sizes that stand for these names or numbers of elements (None: SIZES); ValueError for any other.

    >>> find_sizes(["large", "25_600_000"])
    [134217728, 16777216]
    """
    sizes = []
    for name in names or SIZES:
        elements = SIZES.get(name) or (int(name) if name.replace("_", "").isdecimal() else 0)
        if elements < 1:
            known = ", ".join(SIZES)
            nearest = did_you_mean(name, list(SIZES))
            raise ValueError(f"unknown size {name!r}{nearest} known: {known}, or a number of elements")
        sizes.append(config.size_of(elements))
    return list(dict.fromkeys(sizes))


@dataclass(frozen=True)
class Row:
    """Finding for one phase, in one format, of one size."""

    optimizer: str
    format: str
    kernel: str = ""
    """Name of the update function, or of the kernel of products. Empty: nothing here has a choice."""
    size: int | None = None
    """Number of elements of the scratch, about; None: nothing here has a choice."""
    best: Config | Tiles | None = None
    """Fastest configuration; None: nothing was measured."""
    default: Config | Tiles | None = None
    """Default configuration, which it is measured against; None: nothing was measured."""
    microseconds: float | None = None
    """Median time of a launch with the best configuration, in microseconds; None: not measured."""
    default_microseconds: float | None = None
    """Median time of a launch with the default, in microseconds; None: not measured."""
    gigabytes_per_second: float | None = None
    """Rate at which the bytes that must move do so, 10^9 bytes per second; None: not measured."""
    default_gigabytes_per_second: float | None = None
    """Rate of the default, 10^9 bytes per second; None: not measured."""
    tried: int = 0
    """Number of configurations that ran."""
    reason: str = ""
    """Reason why there is no measurement; empty: there is one."""

    def to_json(self) -> dict[str, Any]:
        """The fields, with configurations by name."""
        configs = {name: value and value._asdict() for name, value in vars(self).items() if name in ("best", "default")}
        return {**vars(self), **configs}


class Tuning:
    """Measures the phases of `classes` in `formats` on a GPU, and keeps what it finds in the cache on disk.

    Args:
        device: the GPU. On the CPU, whose kernels are interpreted, give a timer and a `gpu` of your own: a rehearsal.
        timer: measures a launch; by default with CUDA events.
        gpu: whose cache the findings go to; by default the device's.
    """

    def __init__(
        self,
        classes: Sequence[type[optim.Optimizer]],
        formats: Sequence[StorageFormat],
        sizes: Sequence[int],
        device: torch.device,
        timer: Timer | None = None,
        gpu: str | None = None,
    ) -> None:
        detected = autotune.gpu_of(device)
        if detected is None and (gpu is None or timer is None):
            raise ValueError(f"only a GPU can be tuned for, and {device} is none")
        self._device, self._timer, self._gpu = device, timer, gpu or detected or ""
        self._rows: list[tuple[Row, Variant | Product | None]] = []
        """Rows to be, with what is measured for them; None: nothing."""
        seen = set()
        for cls, storage in [(cls, storage) for cls in classes for storage in formats]:
            row, variants = Row(cls.__name__, storage.name, reason="all its phases sum, and always run as they are"), []
            try:
                variants = variants_of(cls, storage, device)
            except ValueError as error:
                row = Row(cls.__name__, storage.name, reason=str(error))
            if not variants:
                self._rows.append((row, None))
            for key, variant in [(variant.key(size), variant) for variant in variants for size in sizes]:
                if key not in seen:
                    seen.add(key)
                    self._rows.append((Row(cls.__name__, storage.name, key.kernel, key.size), variant))

    def __len__(self) -> int:
        """Number of rows that there will be."""
        return len(self._rows)

    def rows(self) -> Iterator[Row]:
        """Measure one phase after the other, and yield a row for each."""
        for row, variant in self._rows:
            yield row if variant is None or row.size is None else self._measured(row, variant, row.size)

    def _measured(self, row: Row, variant: Variant | Product, size: int) -> Row:
        tune = variant.tune if isinstance(variant, Product) else partial(autotune.tune, variant)
        try:
            entry, n_bytes, tried = tune(size, self._device, self._timer)
        except Exception as error:
            return replace(row, reason=f"{type(error).__name__}: {error}")
        cache.put(self._gpu, variant.key(size), entry)
        return replace(
            row,
            best=entry.config,
            default=entry.default,
            microseconds=entry.microseconds,
            default_microseconds=entry.default_microseconds,
            gigabytes_per_second=1e-3 * n_bytes / entry.microseconds,
            default_gigabytes_per_second=1e-3 * n_bytes / entry.default_microseconds,
            tried=tried,
        )


class _Variants(Recorder):
    """The phases of a step that have a choice."""

    def __init__(self) -> None:
        self.collected: list[Variant | Product] = []

    def phase(self, phase: Phase, group: LaunchGroup, launch: LaunchSpec, n_earlier: int) -> None:
        """Keep a phase, if it has a choice."""
        if isinstance(phase, Apply) and autotune.has_choice(phase, group, launch):
            self.collected.append(autotune.variant_of(phase, group, launch, n_earlier))
        if isinstance(phase, ApplyMatrices):
            self.collected.append(Product(phase.iteration.dtype or torch.float32))


def variants_of(cls: type[optim.Optimizer], storage: StorageFormat, device: torch.device) -> list[Variant | Product]:
    """The phases of a step that have a choice, found by a step over a small parameter that launches nothing.

    Raises ValueError where the optimizer refuses the format.
    """
    param = torch.zeros(2, 64, dtype=storage.dtype, device=device, requires_grad=True)
    param.grad = torch.zeros_like(param)
    opt = cls([param], **storage.arguments)
    planner, recording = opt._stepper._planner, _Variants()
    planner.config, planner.record = config.GENERIC, recording
    opt.step()
    return recording.collected


def shipped_rows() -> list[dict[str, Any]]:
    """Rows of the defaults for long lists: for each architecture that of most phases, and that of `takes_four`."""
    return [
        {"gpu": f"{gpu}{', fp32' if has_four else ''}", **config.default_of(2**40, has_four, generic)._asdict()}
        for gpu, generic in (("NVIDIA", config.NVIDIA), ("AMD", config.AMD))
        for has_four in (False, True)
    ]


def cached_rows() -> list[dict[str, Any]]:
    """Rows of what the cache on disk has, one for each GPU, phase and size."""
    return [
        {"gpu": gpu, **key._asdict(), **cache.as_json(entry)}
        for gpu, entries in cache.known().items()
        for key, entry in entries.items()
    ]
