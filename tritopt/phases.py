"""The phases of a fused step: what each launch is, what it moves, and how the driver is called for it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from tritopt.kernels.formats import Format
from tritopt.kernels.language import tl
from tritopt.kernels.multi_tensor_apply import multi_tensor_apply
from tritopt.kernels.multi_tensor_norm import sum_partials
from tritopt.kernels.preambles import PREAMBLES
from tritopt.telemetry import OF_GRADIENT, OF_UPDATE, Tracked

if TYPE_CHECKING:
    from tritopt.group import Group, Launch

TRITON_DTYPES = {
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
    torch.int64: tl.int64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Config(NamedTuple):
    """Launch parameters. 8 elements a thread, one 128-bit access per 16-bit plane; in fp64 a quarter of block_size."""

    block_size: int = 1024
    chunk_size: int = 8192
    tail_size: int = 256
    """Of blocks of what is not a whole block, or not aligned."""
    num_warps: int = 4


NVIDIA = Config()
AMD = Config(block_size=2048)  # a warp has 64 threads there
CONFIG = AMD if torch.version.hip else NVIDIA


class Phase(Protocol):
    """One launch over a group, or a few that belong together."""

    def launch(self, group: Group, launch: Launch, sums: torch.Tensor | None) -> torch.Tensor | None:
        """Run it. `sums`: of the phases before, fp64 [tensors, sums]; returns those that this one emits, or None."""
        ...

    def traffic(self, weight: tuple[float, float], grad: float, states: float) -> tuple[float, float]:
        """Bytes per parameter (read, written). `weight`: what loading and storing it moves; the others: their size."""
        ...

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of what is launched."""
        ...

    @property
    def n_sums(self) -> int:
        """Sums per tensor that later phases receive."""
        ...

    @property
    def sums_elements(self) -> bool:
        """Whether results depend on the order in which elements are summed."""
        ...


class Apply(NamedTuple):
    """A phase of the driver: one launch applies `update` to the whole list, moving only what it says."""

    update: Any
    """The @triton.jit update function."""
    reads_weight: bool = True
    reads_grad: bool = True
    reads_states: bool = True
    writes_weight: bool = True
    writes_states: bool = True
    n_sums: int = 0
    """Sums per tensor that `update` emits; the phases after it receive them."""
    reads_offsets: bool = False
    """Whether `update` takes the elements' offsets in their tensor, int64 [BLOCK_SIZE]."""

    @property
    def kernels(self) -> tuple[str, ...]:
        """The update function's name."""
        return (str(self.update.__name__),)

    @property
    def sums_elements(self) -> bool:
        """Whether there are sums for the next phases."""
        return self.n_sums > 0

    def traffic(self, weight: tuple[float, float], grad: float, states: float) -> tuple[float, float]:
        """Bytes per parameter (read, written), as `Phase` has it."""
        read = weight[0] * self.reads_weight + grad * self.reads_grad + states * self.reads_states
        return read, weight[1] * self.writes_weight + states * self.writes_states

    def launch(self, group: Group, launch: Launch, sums: torch.Tensor | None) -> torch.Tensor | None:
        """Launch the driver, and where sums are emitted the second stage of the reduction."""
        config = _config_of(group)
        tensor_table, chunk_table = group.tables(
            ("chunks", config.chunk_size), partial(chunk_tables, chunk_size=config.chunk_size)
        )
        n_chunks, n_tensors = len(chunk_table), len(group.members)
        tracks = tracks_of(self, launch)
        n_totals = self.n_sums + len(tracks[0]) + len(tracks[1])
        partials = group.empty(n_chunks, n_totals) if n_totals else None
        variant = (self, group.formats, group.dtypes, launch.preamble, bool(n_totals))
        kernel = multi_tensor_apply[(n_chunks,)](
            group.device_table,
            tensor_table,
            chunk_table,
            launch.rescale,
            launch.noop,
            partials,
            sums,
            group.tables("noise", lambda _: (np.array(group.noise, dtype=np.int64),))[0] if launch.draws else None,
            n_tensors,
            **phase_constants(self, launch, group.formats, group.dtypes, 0 if sums is None else sums.shape[1]),
            CHUNK_SIZE=config.chunk_size,
            BLOCK_SIZE=config.block_size,
            TAIL_SIZE=min(config.tail_size, config.block_size),
            num_warps=config.num_warps,
            enable_fp_fusion=False,
            **_MORE_REGISTERS.get(variant, {}),
        )
        if getattr(kernel, "n_spills", 0) and variant not in _MORE_REGISTERS:
            _MORE_REGISTERS[variant] = more_registers(kernel.n_regs)
        if partials is None:
            return None
        totals = group.empty(n_tensors, n_totals)
        sum_partials[(n_tensors,)](
            partials, tensor_table, totals, n_chunks, n_tensors, N_SUMS=n_totals, BLOCK_SIZE=1024,
            enable_fp_fusion=False,
        )  # fmt: skip
        if launch.tracked is not None and any(tracks):
            launch.tracked.append(Tracked(group.members, (*tracks[0], *tracks[1]), totals[:, self.n_sums :]))
        return totals[:, : self.n_sums].contiguous() if self.n_sums else None


_MORE_REGISTERS: dict[Hashable, dict[str, int]] = {}
"""Options of launches that spilled the first time."""


def more_registers(n: int) -> dict[str, int]:
    """Options for a kernel that spills with so many registers a thread.

    NVIDIA's compiler spills a few bytes to fit one more block on a core, unless it is told how many it may take.
    """
    return {} if torch.version.hip else {"maxnreg": min(n + 32, 255)}


def tracks_of(phase: Apply, launch: Launch) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a phase sums up of the gradient, and of the update: each by one phase of the step."""
    if launch.tracked is None:
        return (), ()
    reader = next(other for other in launch.phases if isinstance(other, Apply) and other.reads_grad)
    return OF_GRADIENT if phase is reader else (), OF_UPDATE if phase.writes_weight else ()


def _config_of(group: Group) -> Config:
    """CONFIG, adapted to what is stored."""
    if group.dtypes[0] == torch.float64:
        # One 128-bit access a thread, and twice the registers an element.
        return CONFIG._replace(block_size=CONFIG.block_size // 4)
    whole = max(1, *(fmt.block for fmt in group.formats))
    block, chunk, tail = (-(-size // whole) * whole for size in CONFIG[:3])
    return Config(block, chunk, tail, CONFIG.num_warps)


def chunk_tables(shapes: Sequence[torch.Size], chunk_size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The driver's tables of tensors and of chunks."""
    sizes = np.array([shape.numel() for shape in shapes], dtype=np.int64)
    chunks = -(-sizes // chunk_size)
    widths = [shape[1:].numel() for shape in shapes]
    tensors = np.stack([sizes, np.cumsum(chunks) - chunks, np.array(widths, dtype=np.int64)], axis=1)
    return tensors, np.repeat(np.arange(len(sizes), dtype=np.int32), chunks)


def phase_constants(
    phase: Apply, launch: Launch, formats: Sequence[Format], dtypes: Sequence[torch.dtype], n_earlier_sums: int
) -> dict[str, Any]:
    """The driver's compile-time arguments for one phase, but for the launch's sizes."""
    n_states = len(formats) - 1
    of_gradient, of_update = tracks_of(phase, launch)
    # Behind the weight's planes stands the gradient, which is plain.
    past_grad = itertools.accumulate((fmt.n_planes for fmt in formats[1:]), initial=formats[0].n_planes + 1)
    ends = [formats[0].n_planes, *itertools.islice(past_grad, 1, None)]
    functions = (phase.update, formats[0].shown, *[f for fmt in formats for f in (fmt.load, fmt.store)])
    return {
        "UPDATE_FN": phase.update,
        "PREAMBLE_FN": PREAMBLES[launch.preamble].kernel,
        "SCALARS": launch.scalars,
        "N_SCALARS": launch.n_scalars,
        "N_OWN_SCALARS": len(launch.scalars._fields),  # type: ignore[attr-defined]
        "FORMATS": tuple(
            (end - fmt.n_planes, end, fmt.load, fmt.store, fmt.draws) for end, fmt in zip(ends, formats, strict=True)
        ),
        "DTYPES": tuple(TRITON_DTYPES[dtype] for dtype in dtypes),
        "READS": (phase.reads_weight, phase.reads_grad, *[phase.reads_states] * n_states),
        "WRITES": (phase.writes_weight, False, *[phase.writes_states] * n_states),
        "READS_OFFSETS": phase.reads_offsets,
        "HAS_ROWS": dtypes[-1] == torch.int64,
        "N_EARLIER_SUMS": n_earlier_sums,
        "N_SUMS": phase.n_sums,
        "N_TOTALS": phase.n_sums + len(of_gradient) + len(of_update),
        "TRACKS": (bool(of_gradient), bool(of_update)),
        "SHOWN_FN": formats[0].shown,
        "SKIP_ZERO_RESCALE": launch.skip_zero_rescale,
        "COMPUTE_DTYPE": tl.float64 if dtypes[0] == torch.float64 else tl.float32,
        "SOURCE_HASH": source_hash(functions, launch.scalars),
    }


_HASHES: dict[Hashable, str] = {}


def source_hash(functions: tuple[Any, ...], scalars: type) -> str:
    """A key to what Triton's disk cache does not see: sources of functions inside tuples, fields of `scalars`."""
    key = (functions, scalars)
    if key not in _HASHES:
        sources = [getattr(f, "cache_key", "") for f in functions]
        text = repr((sources, getattr(scalars, "_fields", ())))
        _HASHES[key] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return _HASHES[key]
