"""Which launch configuration a phase gets: the best known one for this GPU, measured if that is asked for.

Measuring runs the phase on scratch tensors, stored as the user's are and about as many, never on the user's: a kernel
that updates in place would update them once for every run. Only elementwise phases have a choice, and what they compute
does not depend on it; see tritopt/engine/tuning/config.py.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from tritopt.engine.device import is_capturing
from tritopt.engine.group import Group, on_device_of, upload_table
from tritopt.engine.phase import Launch, Tunable
from tritopt.engine.tuning.cache import Entry, Key, TuningCache
from tritopt.engine.tuning.config import (
    GENERIC,
    SMALL_TENSOR,
    Config,
    SizeClass,
    from_fields,
    kernel_class,
    known_gpu,
    shipped,
    size_of,
)
from tritopt.engine.warning import warn
from tritopt.kernels.formats.format import Format
from tritopt.kernels.language import triton

Timer: TypeAlias = Callable[[Callable[[], object], float], float]
"""Takes what to run and how many seconds it may take; returns seconds per run."""

MEASURE_SECONDS = 2.0
"""Of running kernels, per variant, about."""
VARIANT_SECONDS = 60.0
"""With compiling: no configuration is begun after that."""
PROCESS_SECONDS = 300.0
"""Of all variants that steps meet in one process; what comes after takes what is shipped."""
SHARE_OF_MEMORY = 0.25
"""Of what is free: for scratch."""
GAIN = 0.98
"""A configuration must take less than this share of the best one's time so far: noise is to change nothing."""
_MAX_TRIED = 16
"""As many configurations as there may be, about."""
_ALIGN = 1024
"""Elements, that scratch tensors begin at a multiple of: 16 bytes also of scales, which 64 elements share."""
_SCALAR = 2.0**-10
"""The scratch tensors' learning rate, epsilon and so on: nothing overflows in thousands of steps."""


def is_enabled() -> bool:
    """TRITOPT_AUTOTUNE: whether a step measures what it has no configuration for; ValueError unless 0 or 1."""
    value = os.environ.get("TRITOPT_AUTOTUNE", "0")
    if value not in ("0", "1"):
        raise ValueError(
            f"TRITOPT_AUTOTUNE={value!r} must be 0 (launch with what is shipped or was tuned before, the default) or 1 "
            "(measure what is not known yet, when a step first needs it)"
        )
    return value == "1"


class Variant(NamedTuple):
    """A phase as it is launched for a group."""

    phase: Tunable
    formats: tuple[Format, ...]
    dtypes: tuple[torch.dtype, ...]
    launch: Launch
    source: str
    """Hash of all source that decides its kernel."""
    n_earlier: int
    """Sums per tensor that it receives."""

    def key(self, size: SizeClass) -> Key:
        """What a configuration of it is kept under."""
        return Key(
            self.phase.kernels[0],
            self.launch.preamble,
            tuple(fmt.name for fmt in self.formats),
            tuple(str(dtype).removeprefix("torch.") for dtype in self.dtypes),
            size.name,
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
        """Of each tensor, how many numbers there are for an element."""
        planes = [[1.0] * (fmt.n_planes - 1) + [1 / fmt.block if fmt.block else 1.0] for fmt in self.formats]
        return [*planes[0], 1.0, *(n for state in planes[1:] for n in state)]


def variant_of(phase: Tunable, group: Group, launch: Launch, n_earlier: int) -> Variant:
    """The phase as it is launched for this group."""
    return Variant(phase, group.formats, group.dtypes, launch, phase.source(group, launch, n_earlier), n_earlier)


def choose(phase: Tunable, group: Group, launch: Launch, n_earlier: int) -> Config:
    """The configuration for a phase of a group, before `config.adapted`. The same while this process lives.

    What this process has chosen before, else what the cache on disk has, else what `tune` finds if TRITOPT_AUTOTUNE=1,
    else what is shipped. `n_earlier`: as `Variant` has it.
    """
    wanted = is_enabled()
    gpu = gpu_of(group.device)
    if gpu is None or not has_choice(phase, group, launch):
        return GENERIC
    variant = variant_of(phase, group, launch, n_earlier)
    size = size_of(sum(shape.numel() for shape in group.shapes), len(group.shapes))
    key = variant.key(size)
    with _LOCK:
        place = (group.device, key)
        if place in _CHOSEN:
            return _CHOSEN[place]
        cache = TuningCache(gpu.name)
        found = cache.get(key)
        if found is not None:
            _CHOSEN[place] = found.config
        elif wanted and is_capturing(group.device):
            return gpu.shipped(variant, size)  # what is met again outside of the capture may still be tuned
        else:
            _CHOSEN[place] = gpu.shipped(variant, size)
            if wanted:
                _tune_in_step(variant, size, place, cache)
        return _CHOSEN[place]


def has_choice(phase: Tunable, group: Group, launch: Launch) -> bool:
    """Whether the configuration changes nothing that is computed, and is worth a measurement."""
    # A gradient of some rows has their numbers behind it: small, and never twice alike.
    return not phase.n_sums and launch.tracked is None and not group.has_rows


_CHOSEN: dict[tuple[torch.device, Key], Config] = {}
_LOCK = threading.RLock()
_spent = 0.0


def _tune_in_step(variant: Variant, size: SizeClass, place: tuple[torch.device, Key], cache: TuningCache) -> None:
    """Choose by measurement, or leave the choice; it stands before a warning, which may be an error, ends the step."""
    global _spent
    device = place[0]
    if _spent >= PROCESS_SECONDS:
        warn(
            f"{variant.phase.kernels[0]}: launched as shipped, as this process has tuned for more than "
            f"{PROCESS_SECONDS:.0f} seconds; `tritopt tune` does it ahead of time"
        )
        return
    began = time.monotonic()
    tuned = tune(variant, size, device)
    _spent += time.monotonic() - began
    _CHOSEN[place] = tuned.config
    if tuned.failure is not None:
        warn(f"{variant.phase.kernels[0]}: launched as shipped, as tuning failed with {tuned.failure}")
    if tuned.entry is not None:
        cache.put(variant.key(size), tuned.entry)


class Gpu(NamedTuple):
    """What a configuration depends on, of a GPU."""

    name: str
    architecture: str
    """Such as sm_90 or gfx942."""

    def shipped(self, variant: Variant, size: SizeClass) -> Config:
        """The configuration that comes with the package."""
        return shipped(known_gpu(*self), kernel_class(variant.moved[0]), size).config


def gpu_of(device: torch.device) -> Gpu | None:
    """None for the CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Gpu(properties.name, properties.gcnArchName.partition(":")[0])
    return Gpu(properties.name, f"sm_{properties.major}{properties.minor}")


def default_of(variant: Variant, size: SizeClass, device: torch.device) -> Config:
    """What is shipped for it; generic on the CPU."""
    gpu = gpu_of(device)
    return GENERIC if gpu is None else gpu.shipped(variant, size)


# Measuring.


@dataclass(frozen=True)
class Tuned:
    """What `tune` found."""

    config: Config
    """The best one; the default where nothing could be measured."""
    default: Config
    seconds: float | None = None
    """A launch with `config`, median."""
    default_seconds: float | None = None
    bytes_moved: float = 0.0
    """By a launch, that must be."""
    tried: int = 0
    """Configurations that ran."""
    failure: str | None = None
    """Why there is no measurement."""

    @property
    def entry(self) -> Entry | None:
        """For the cache; None without a measurement."""
        if self.failure is not None or self.seconds is None or self.default_seconds is None:
            return None
        when = f"{date.today().isoformat()}, torch {torch.__version__}"
        microseconds = [round(1e6 * seconds, 3) for seconds in (self.seconds, self.default_seconds)]
        return Entry(self.config, microseconds[0], self.default, microseconds[1], when)


def event_median(run: Callable[[], object], seconds: float) -> float:
    """A `Timer`: the median over launches between two CUDA events, L2 overwritten before each."""
    milliseconds = triton.testing.do_bench(run, warmup=200 * seconds, rep=800 * seconds, return_mode="median")
    return 1e-3 * float(milliseconds)


def tune(
    variant: Variant,
    size: SizeClass,
    device: torch.device,
    timer: Timer | None = None,
    report: Callable[[Config, float], object] | None = None,
) -> Tuned:
    """Measure the configurations of a phase, the default first, on scratch tensors of a size class.

    Takes MEASURE_SECONDS of running and at most VARIANT_SECONDS, or one compilation more, and SHARE_OF_MEMORY. What
    does not compile or launch is passed over. Without memory, or if not even the default runs, that is what comes back.

    Args:
        timer: measures a launch; `event_median` by default.
        report: called with each configuration and the seconds of a launch.
    """
    timer = timer or event_median
    default = default_of(variant, size, device)
    began = time.monotonic()
    seconds: dict[Config, float] = {}
    best = [default]
    scratch = None
    try:
        scratch = Scratch(variant, size, device)
        for config in candidates(variant, size, best):
            if seconds and time.monotonic() - began > VARIANT_SECONDS:
                break
            try:
                scratch.launch(config)  # compiles it
                seconds[config] = timer(partial(scratch.launch, config), MEASURE_SECONDS / _MAX_TRIED)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                # Of a configuration that asks for too much of the GPU, whatever type this has in this Triton.
                if config == default:
                    raise
                continue
            if report is not None:
                report(config, seconds[config])
            if seconds[config] < GAIN * seconds[best[-1]]:
                best.append(config)
    except Exception as error:
        # A step must not fail for it: if the kernel cannot run, its own launch will say so.
        return Tuned(default, default, failure=f"{type(error).__name__}: {error}")
    else:
        moved = sum(variant.moved) * scratch.n_elements
        return Tuned(best[-1], default, seconds[best[-1]], seconds[default], moved, len(seconds))
    finally:
        del scratch
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def candidates(variant: Variant, size: SizeClass, best: Sequence[Config]) -> Iterator[Config]:
    """The default; blocks and warps; chunks for the best of them; tails, where most of a list runs in these.

    `best`: the default, and behind it what turns out to be better.
    """
    default = best[0]
    yield default
    # 8-bit planes leave no choice: 16 elements a thread may spill where there are such.
    narrowest = min((dtype.itemsize for dtype in variant.dtypes if dtype.itemsize > 1), default=2)
    if variant.dtypes[0] == torch.float64:
        narrowest //= 4  # as `adapted` has it
    warp = 64 if torch.version.hip else 32
    seen = {default}

    def new(**changes: int) -> Iterator[Config]:
        config = best[-1]._replace(**changes)
        chunk = max(config.chunk_size, config.block_size)
        config = config._replace(chunk_size=chunk, tail_size=min(config.tail_size, config.block_size))
        if config not in seen and _is_allowed(config):
            seen.add(config)
            yield config

    for num_warps in (2, 4, 8):
        for per_thread in (4, 8, 16):
            if per_thread * narrowest >= 16:  # 128 bits an access
                yield from new(block_size=warp * num_warps * per_thread, num_warps=num_warps)
    for chunk in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        if default.chunk_size // 4 <= chunk <= default.chunk_size * 4:
            yield from new(chunk_size=chunk)
    if size.per_tensor <= SMALL_TENSOR:
        for tail in (128, 512):
            yield from new(tail_size=tail)


def _is_allowed(config: Config) -> bool:
    try:
        from_fields(config._asdict())
    except ValueError:
        return False
    return True


class Scratch:
    """Tensors for a variant, as many and as large as those of a size class, or as there is memory for.

    Raises torch.OutOfMemoryError.
    """

    def __init__(self, variant: Variant, size: SizeClass, device: torch.device) -> None:
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
        self._launch = Launch(
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
        self._group = Group(list(range(len(lengths))), device, variant.formats, variant.dtypes, shapes, noise)
        upload_table(self._group, self._words, self._scalars)

    def launch(self, config: Config) -> None:
        """The phase, over all of them."""
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
    """Memory of the device that is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _lengths(size: SizeClass) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Large and small tensors in turn, `size.elements` in all, about."""
    pair = [size.per_tensor, min(size.per_tensor, SMALL_TENSOR)]
    return np.array(pair * max(1, round(size.elements / sum(pair))), dtype=np.int64)


def _spaced(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where each tensor begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(-(-lengths // _ALIGN) * _ALIGN)]).astype(np.int64)
