"""Find launch configurations ahead of time, for the phases of chosen optimizers and formats: `tritopt tune`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tritopt import optim
from tritopt.engine.driver import Apply
from tritopt.engine.group import Group
from tritopt.engine.phase import Launch, Phase, Recorder
from tritopt.engine.tuning import autotune, cache, config
from tritopt.engine.tuning.autotune import Timer, Variant
from tritopt.engine.tuning.cache import TuningCache
from tritopt.engine.tuning.config import Config, SizeClass
from tritopt.engine.validate import did_you_mean
from tritopt.tools.numerics import StorageFormat

FORMATS = ("fp32", "master", "split16+bf16", "split8+int8")
"""That are tuned if none is named."""
SIZES = ("small", "medium", "large")
"""Likewise."""


def find_sizes(names: Sequence[str] | None = None) -> list[SizeClass]:
    """The size classes of these names, or of lists of so many elements (None: SIZES); ValueError for any other.

    >>> [size.name for size in find_sizes(["large", "25_600_000"])]
    ['large', 'medium']
    """
    found = []
    for name in names or SIZES:
        elements = int(name) if name.replace("_", "").isdecimal() else 0
        if name not in config.SIZES and elements < 1:
            known = ", ".join(config.SIZES)
            nearest = did_you_mean(name, list(config.SIZES))
            raise ValueError(f"unknown size {name!r}{nearest} known: {known}, or a number of elements")
        found.append(config.SIZES.get(name) or config.size_of(elements))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Row:
    """What was found for one phase, in one format, of one size class."""

    optimizer: str
    format: str
    kernel: str
    """The update function. Empty: nothing here has a choice."""
    size: str
    best: Config | None = None
    default: Config | None = None
    microseconds: float | None = None
    """A launch over scratch of the size class, median."""
    default_microseconds: float | None = None
    gigabytes_per_second: float | None = None
    """Of the bytes that must move, in that time."""
    default_gigabytes_per_second: float | None = None
    tried: int = 0
    """Configurations that ran."""
    reason: str = ""
    """Why there is no measurement."""

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        configs = {name: value and value._asdict() for name, value in vars(self).items() if name in ("best", "default")}
        return {**vars(self), **configs}


class Job(NamedTuple):
    """What one row is made of; no variant, or no size: of what is not tuned."""

    optimizer: str
    format: str
    variant: Variant | None
    size: SizeClass | None
    reason: str = ""


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
        sizes: Sequence[SizeClass],
        device: torch.device,
        timer: Timer | None = None,
        gpu: str | None = None,
    ) -> None:
        found = autotune.gpu_of(device)
        if found is None and (gpu is None or timer is None):
            raise ValueError(f"only a GPU can be tuned for, and {device} is none")
        self._device, self._timer = device, timer
        self._cache = TuningCache(gpu or (found.name if found else ""))
        self._jobs = list(_jobs(classes, formats, sizes, device))

    def __len__(self) -> int:
        """How many rows there will be."""
        return len(self._jobs)

    def rows(self) -> Iterator[Row]:
        """Measure, one after the other."""
        for job in self._jobs:
            yield self._row(job)

    def _row(self, job: Job) -> Row:
        if job.variant is None or job.size is None:
            return Row(job.optimizer, job.format, "", "", reason=job.reason)
        key = job.variant.key(job.size)
        tuned = autotune.tune(job.variant, job.size, self._device, self._timer)
        if tuned.entry is not None:
            self._cache.put(key, tuned.entry)
        return Row(
            job.optimizer,
            job.format,
            key.kernel,
            job.size.name,
            tuned.config,
            tuned.default,
            _microseconds(tuned.seconds),
            _microseconds(tuned.default_seconds),
            _per_second(tuned.bytes_moved, tuned.seconds),
            _per_second(tuned.bytes_moved, tuned.default_seconds),
            tuned.tried,
            tuned.failure or "",
        )


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e6 * seconds


def _per_second(n_bytes: float, seconds: float | None) -> float | None:
    return None if seconds is None else 1e-9 * n_bytes / seconds


def _jobs(
    classes: Sequence[type[optim.Optimizer]],
    formats: Sequence[StorageFormat],
    sizes: Sequence[SizeClass],
    device: torch.device,
) -> Iterator[Job]:
    seen = set()
    for cls in classes:
        for storage in formats:
            try:
                variants = variants_of(cls, storage, device)
            except ValueError as error:
                yield Job(cls.__name__, storage.name, None, None, str(error))
                continue
            if not variants:
                yield Job(cls.__name__, storage.name, None, None, "all its phases sum, and always run as they are")
            for variant in variants:
                for size in sizes:
                    if (key := variant.key(size)) not in seen:
                        seen.add(key)
                        yield Job(cls.__name__, storage.name, variant, size)


class _Variants(Recorder):
    """The phases of a step that have a choice."""

    def __init__(self) -> None:
        self.found: list[Variant] = []

    def phase(self, phase: Phase, group: Group, launch: Launch, n_earlier: int) -> None:
        """Keep it, if it has a choice."""
        if isinstance(phase, Apply) and autotune.has_choice(phase, group, launch):
            self.found.append(autotune.variant_of(phase, group, launch, n_earlier))


def variants_of(cls: type[optim.Optimizer], storage: StorageFormat, device: torch.device) -> list[Variant]:
    """The phases of a step that have a choice, found by a step over a small parameter that launches nothing.

    Raises ValueError where the optimizer refuses the format.
    """
    param = torch.zeros(2, 64, dtype=storage.dtype, device=device, requires_grad=True)
    param.grad = torch.zeros_like(param)
    opt = cls([param], **storage.arguments)
    planner, recording = opt._stepper._planner, _Variants()
    planner.config, planner.record = config.GENERIC, recording
    opt.step()
    return recording.found


def shipped_rows() -> list[dict[str, Any]]:
    """What is shipped, a row for each GPU and class of phases and sizes; "generic" is any other GPU, and all sums."""
    rows = [
        {"gpu": gpu, "phases": kernel, "size": size, **shipped.config._asdict(), "mark": shipped.mark}
        for gpu, table in config.SHIPPED.items()
        for (kernel, size), shipped in table.items()
    ]
    generic = {"NVIDIA, generic": config.NVIDIA, "AMD, generic": config.AMD}
    any_size = {"phases": "any", "size": "any"}
    rows += [{"gpu": name, **any_size, **found._asdict(), "mark": "assumed"} for name, found in generic.items()]
    return rows


def cached_rows() -> list[dict[str, Any]]:
    """What the cache on disk has, a row for each GPU, phase and size class."""
    return [
        {
            "gpu": gpu,
            **key._asdict(),
            **entry._asdict(),
            "config": entry.config._asdict(),
            "default": entry.default._asdict(),
        }
        for gpu, entries in cache.known().items()
        for key, entry in entries.items()
    ]
