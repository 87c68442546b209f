"""Choice of a phase's launch configuration: the best known one for this GPU, measured if that is asked for.

Measuring runs the phase on scratch tensors, stored as the user's are and about as many, never on the user's: a kernel
that updates in place would update them once for every run. Only elementwise phases have a choice, and what they compute
does not depend on it; see tritopt/engine/tuning/config.py.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from tritopt.engine.device import is_capturing
from tritopt.engine.group import LaunchGroup, on_device_of, upload_table
from tritopt.engine.phase import LaunchSpec, Tunable
from tritopt.engine.tuning import cache
from tritopt.engine.tuning.cache import Entry, Key
from tritopt.engine.tuning.config import GENERIC, Config, default_of, size_of, takes_four
from tritopt.engine.warning import warn
from tritopt.kernels.formats.format import Format
from tritopt.kernels.language import triton

Timer: TypeAlias = Callable[[Callable[[], object], float], float]
"""Takes what to run and how many seconds it may take; returns seconds per run."""

MEASURE_SECONDS = 0.125
"""Time for running the kernel with one configuration, in seconds."""
VARIANT_SECONDS = 60.0
"""Time budget for one variant in seconds, compiling included: after it no further configuration is begun."""
SHARE_OF_MEMORY = 0.25
"""Share of the device's free memory that scratch tensors may take, 0 to 1."""
GAIN = 0.98
"""A configuration must take less than this share of the best one's time so far: noise is to change nothing."""
_ALIGN = 1024
"""Alignment of scratch tensors in elements: 16 bytes also of scales, which 64 elements share."""
_SMALL = 1000
"""Size of small scratch tensors in elements: no multiple of anything, as sizes of biases and norms are."""
_SCALAR = 2.0**-10
"""The scratch tensors' learning rate, epsilon and so on: nothing overflows in thousands of steps."""


def is_enabled() -> bool:
    """TRITOPT_AUTOTUNE: whether a step measures what it has no configuration for; ValueError unless 0 or 1."""
    value = os.environ.get("TRITOPT_AUTOTUNE", "0")
    if value not in ("0", "1"):
        raise ValueError(
            f"TRITOPT_AUTOTUNE={value!r} must be 0 (the default: launch with what was tuned before) or 1 (measure what "
            "is not known yet, when a step first needs it)"
        )
    return value == "1"


class Variant(NamedTuple):
    """A phase as it is launched for a group."""

    phase: Tunable
    formats: tuple[Format, ...]
    dtypes: tuple[torch.dtype, ...]
    launch: LaunchSpec
    source: str
    """Hash of all source that decides its kernel."""
    n_earlier: int
    """Number of sums per tensor that the phase receives."""

    def key(self, size: int) -> Key:
        """Key under which the cache keeps a configuration of this variant."""
        return Key(
            self.phase.kernels[0],
            self.launch.preamble,
            tuple(fmt.name for fmt in self.formats),
            tuple(str(dtype).removeprefix("torch.") for dtype in self.dtypes),
            size,
            str(triton.__version__),
            self.source,
        )

    @property
    def resident(self) -> float:
        """Bytes per element of all its tensors."""
        return sum(n * dtype.itemsize for n, dtype in zip(self.per_element(), self.dtypes, strict=True))

    @property
    def moved(self) -> tuple[float, float]:
        """Bytes per element that it loads and stores."""
        n_planes = self.formats[0].n_planes
        sizes = [n * dtype.itemsize for n, dtype in zip(self.per_element(), self.dtypes, strict=True)]
        weight_read = sum(size for size, is_read in zip(sizes, self.formats[0].plane_reads, strict=False) if is_read)
        return self.phase.traffic((weight_read, sum(sizes[:n_planes])), sizes[n_planes], sum(sizes[n_planes + 1 :]))

    def per_element(self) -> list[float]:
        """Numbers that each tensor has per element of the weight."""
        planes = [[1.0] * (fmt.n_planes - 1) + [1 / fmt.block if fmt.block else 1.0] for fmt in self.formats]
        return [*planes[0], 1.0, *(n for state in planes[1:] for n in state)]


def variant_of(phase: Tunable, group: LaunchGroup, launch: LaunchSpec, n_earlier: int) -> Variant:
    """The phase as it is launched for this group."""
    return Variant(phase, group.formats, group.dtypes, launch, phase.source(group, launch, n_earlier), n_earlier)


def choose(phase: Tunable, group: LaunchGroup, launch: LaunchSpec, n_earlier: int) -> Config:
    """The configuration for a phase of a group, before `config.adapted`. The same while this process lives.

    It is what this process has chosen before, else what the cache on disk has, else what `tune` finds if
    TRITOPT_AUTOTUNE=1, else the default. `n_earlier`: as `Variant` has it.
    """
    wanted = is_enabled()
    gpu = gpu_of(group.device)
    if not has_choice(phase, group, launch):
        return launch.generic or GENERIC
    has_four = takes_four(group.formats, group.dtypes)
    if gpu is None:
        # Where kernels are compiled or interpreted and not timed, for lists of any size.
        return default_of(2**40, has_four, launch.generic)
    variant = variant_of(phase, group, launch, n_earlier)
    size = size_of(sum(shape.numel() for shape in group.shapes))
    key = variant.key(size)
    with _LOCK:
        place = (group.device, key)
        if place not in _CHOSEN:
            cached = cache.read(gpu).get(key)
            if cached is None and wanted and is_capturing(group.device):
                return default_of(size, has_four)  # what is met again outside of the capture may still be tuned
            _CHOSEN[place] = default_of(size, has_four) if cached is None else cached.config
            if cached is None and wanted:
                try:
                    tuned = tune(variant, size, group.device)
                except Exception as error:
                    # A step must not fail for it: if the kernel cannot run, its own launch will say so.
                    warn(f"{key.kernel}: launched with the default, as tuning failed: {type(error).__name__}: {error}")
                else:
                    _CHOSEN[place] = tuned.entry.config
                    cache.put(gpu, key, tuned.entry)
        return _CHOSEN[place]  # type: ignore[no-any-return]


def has_choice(phase: Tunable, group: LaunchGroup, launch: LaunchSpec) -> bool:
    """Whether the configuration changes nothing that is computed, and is worth a measurement."""
    # A gradient of some rows has their numbers behind it: small, and never twice alike.
    return not phase.n_sums and launch.tracked is None and not group.has_rows


_CHOSEN: dict[tuple[torch.device, Key], Any] = {}
_LOCK = threading.RLock()


def gpu_of(device: torch.device) -> str | None:
    """Name of a GPU; None for the CPU, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).name if device.type == "cuda" else None


class Tuned(NamedTuple):
    """Result of measuring a variant."""

    entry: Entry
    bytes_moved: float
    """Bytes that a launch over the scratch tensors must move."""
    tried: int
    """Number of configurations that ran."""


def event_median(run: Callable[[], object], seconds: float) -> float:
    """A `Timer`: the median over launches between two CUDA events, L2 overwritten before each."""
    milliseconds = triton.testing.do_bench(run, warmup=200 * seconds, rep=800 * seconds, return_mode="median")
    return 1e-3 * float(milliseconds)


def tune(variant: Variant, size: int, device: torch.device, timer: Timer | None = None) -> Tuned:
    """Measure the configurations of a phase, the default first, on scratch tensors of so many elements.

    Takes VARIANT_SECONDS at most, or one compilation more, and SHARE_OF_MEMORY. What does not compile or launch is
    passed over; without memory, or if not even the default runs, it raises. timer: `event_median` by default.
    """
    best = [default_of(size, takes_four(variant.formats, variant.dtypes))]
    scratch = None
    try:
        scratch = Scratch(variant, size, device)
        entry, tried = fastest(candidates(variant, best), best, scratch.launch, timer)
        return Tuned(entry, sum(variant.moved) * scratch.n_elements, tried)
    finally:
        del scratch
        free_scratch(device)


def fastest(
    configs: Iterable[Any], best: list[Any], launch: Callable[[Any], object], timer: Timer | None
) -> tuple[Entry, int]:
    """Measure launches with these configurations; return the fastest, and how many ran.

    best: the default, which must come first; what turns out to be better is appended meanwhile.
    """
    timer = timer or event_median
    default, began = best[0], time.monotonic()
    seconds: dict[Any, float] = {}
    for config in configs:
        if seconds and time.monotonic() - began > VARIANT_SECONDS:
            break
        try:
            launch(config)  # compiles it
            seconds[config] = timer(partial(launch, config), MEASURE_SECONDS)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # A configuration may ask for too much of the GPU: which error says so differs between Tritons.
            if config == default:
                raise
            continue
        if seconds[config] < GAIN * seconds[best[-1]]:
            best.append(config)
    times = [round(1e6 * seconds[config], 3) for config in (best[-1], default)]
    when = f"{date.today().isoformat()}, torch {torch.__version__}"
    return Entry(best[-1], times[0], default, times[1], when), len(seconds)


def free_scratch(device: torch.device) -> None:
    """Give the memory of scratch tensors, which nobody holds any more, back to the device."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def candidates(variant: Variant, best: Sequence[Config]) -> Iterator[Config]:
    """The default; blocks and warps; chunks for the best of them.

    `best`: the default, and behind it what turns out to be better.
    """
    default = best[0]
    fewest = 4 if takes_four(variant.formats, variant.dtypes) else 8
    warp = 64 if torch.version.hip else 32
    blocks = [
        {"block_size": warp * num_warps * per_thread, "num_warps": num_warps}
        for num_warps in (2, 4, 8)
        for per_thread in (4, 8, 16)
        if per_thread >= fewest
    ]
    chunks = [{"chunk_size": default.chunk_size * factor // 4} for factor in (1, 2, 4, 8, 16)]
    seen = set()
    for changes in ({}, *blocks, *chunks):
        config = best[-1]._replace(**changes)
        chunk, tail = max(config.chunk_size, config.block_size), min(config.tail_size, config.block_size)
        config = config._replace(chunk_size=chunk, tail_size=tail)
        if config not in seen:
            seen.add(config)
            yield config


class Scratch:
    """Tensors for a variant, of so many elements in all, or as there is memory for.

    Raises torch.OutOfMemoryError.
    """

    def __init__(self, variant: Variant, size: int, device: torch.device) -> None:
        room = SHARE_OF_MEMORY * free_bytes(device)
        lengths = _lengths(size)
        while len(lengths) > 2 and variant.resident * _spaced(lengths)[-1] > room:
            lengths = lengths[: len(lengths) // 2]
        starts = _spaced(lengths)
        if variant.resident * starts[-1] > room:
            raise torch.OutOfMemoryError(
                f"scratch of {variant.resident * starts[-1] / 2**20:.0f} MiB is more than {SHARE_OF_MEMORY:.0%} of "
                "what is free"
            )
        self.n_elements = int(lengths.sum())
        self._variant, self._device, shapes = variant, device, [torch.Size([int(n)]) for n in lengths]
        # Its own random numbers: the user's must be the same with and without tuning.
        random = torch.Generator(device).manual_seed(0)
        self._planes = self._filled(int(starts[-1]), random)
        per_element = variant.per_element()
        self._words = np.array(
            [
                plane.data_ptr() + (starts[:-1] * share).astype(np.int64) * plane.element_size()
                for plane, share in zip(self._planes, per_element, strict=True)
            ]
            + [np.zeros(len(lengths), dtype=np.int64)]
        ).T
        n_own = variant.launch.n_scalars - 3
        self._scalars = np.array([[1.0, np.inf, _SCALAR, *[_SCALAR] * n_own]])
        if variant.launch.draws:
            self._scalars[0, -1] = 1.0  # the step
        scalar = torch.ones((), device=device, dtype=torch.float64)
        self._launch = LaunchSpec(
            variant.launch.phases,
            variant.launch.scalars,
            variant.launch.preamble,
            None if variant.launch.rescale is None else scalar,
            None if variant.launch.noop is None else torch.zeros((), dtype=torch.float32, device=device),
            variant.launch.skip_zero_rescale,
            variant.launch.draws,
        )
        n_sums = variant.n_earlier
        self._sums = torch.ones(len(lengths), n_sums, dtype=torch.float64, device=device) if n_sums else None
        noise = [(i, 0, 0, 0) for i in range(len(lengths))]
        self._group = LaunchGroup(list(range(len(lengths))), device, variant.formats, variant.dtypes, shapes, noise)
        upload_table(self._group, self._words, self._scalars)

    def launch(self, config: Config) -> None:
        """Launch the phase over all scratch tensors with this configuration."""
        with on_device_of(self._group):
            self._variant.phase.launch(self._group, self._launch._replace(config=config), self._sums)

    def _filled(self, n: int, random: torch.Generator) -> list[torch.Tensor]:
        """One tensor for each plane: weights, masters and gradients like real ones, all else 0 as in a first step."""
        variant = self._variant
        planes = [
            torch.zeros(round(n * share), dtype=dtype, device=self._device)
            for share, dtype in zip(variant.per_element(), variant.dtypes, strict=True)
        ]
        grad_at = variant.formats[0].n_planes
        planes[0].normal_(std=2e-2, generator=random)
        planes[grad_at].normal_(std=1e-3, generator=random)
        for plane in planes[1:grad_at]:
            if plane.dtype == torch.float32:
                plane.copy_(planes[0])
        return planes


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _lengths(size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Large and small tensors in turn, `size` elements in all, about; at most 64 of each."""
    n_pairs = max(1, min(64, size // 2**14))
    small = min(_SMALL, size // 2)
    return np.array([size // n_pairs - small, small] * n_pairs, dtype=np.int64)


def _spaced(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Offsets at which the tensors begin, in elements, and the end of the last."""
    return np.concatenate([[0], np.cumsum(-(-lengths // _ALIGN) * _ALIGN)]).astype(np.int64)
