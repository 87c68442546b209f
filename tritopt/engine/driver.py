"""The phase of the driver (kernels/drivers/multi_tensor_apply.py), and its tables and compile-time arguments."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from tritopt.engine import private
from tritopt.engine.group import LaunchGroup
from tritopt.engine.launcher import BoundKernel
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.telemetry import Tracked
from tritopt.engine.tuning import autotune
from tritopt.engine.tuning.config import AMD, GENERIC, Config, adapted, unrolled
from tritopt.kernels.drivers.multi_tensor_apply import multi_tensor_apply
from tritopt.kernels.drivers.multi_tensor_norm import sum_blocks, sum_partials
from tritopt.kernels.formats.format import PLAIN
from tritopt.kernels.language import tl
from tritopt.kernels.preambles import PREAMBLES
from tritopt.kernels.telemetry import OF_GRADIENT, OF_UPDATE

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
    scratch: str = ""
    """"read" or "write": what phases of one step hand on by element, for `update` one more state; empty: nothing."""
    states: tuple[int, ...] | None = None
    """Places of the states that `update` takes; None: all. Formats that draw random bits keep their places."""

    @property
    def kernels(self) -> tuple[str, ...]:
        """Name of the update function, as a tuple of one."""
        return (str(self.update.__name__),)

    @property
    def sums_elements(self) -> bool:
        """Whether there are sums for the next phases."""
        return self.n_sums > 0

    @property
    def is_driver(self) -> bool:
        """It is the driver."""
        return True

    def traffic(self, weight: tuple[float, float], grad: float, states: float) -> tuple[float, float]:
        """Bytes per parameter (read, written), as `Phase` has it."""
        read = weight[0] * self.reads_weight + grad * self.reads_grad + states * self.reads_states
        return read, weight[1] * self.writes_weight + states * self.writes_states

    def source(self, group: LaunchGroup, launch: LaunchSpec, n_earlier: int) -> str:
        """Hash of the driver, of the functions that it is given, and of what the phase reads, writes and sums."""
        functions = (multi_tensor_apply, PREAMBLES[launch.preamble].kernel)
        sources = [private.source_key(function) for function in functions]
        given = phase_constants(self, launch, group, n_earlier)["SOURCE_HASH"]
        return hashlib.sha256(repr((given, sources, self[1:])).encode()).hexdigest()[:16]

    def launch(self, group: LaunchGroup, launch: LaunchSpec, sums: torch.Tensor | None) -> torch.Tensor | None:
        """Launch the driver, and where sums are emitted the second stage of the reduction."""
        n_earlier = 0 if sums is None else sums.shape[1]
        is_tracked = launch.tracked is not None
        how = (launch.preamble, launch.scalars, launch.skip_zero_rescale, launch.draws, is_tracked, n_earlier)
        key = (self, *how, _config_of(self, group, launch, n_earlier), group.stream)
        return group.ready(key, lambda: BoundPhase(self, group, launch, n_earlier))(group, launch, sums)


class Part(NamedTuple):
    """Some tensors of a group, to be launched by themselves."""

    members: list[int]
    """Places in the list of those that the group has, some of its `members`."""
    tensor_table: torch.Tensor
    """The driver's table; rows of other tensors mean nothing."""
    chunk_table: torch.Tensor
    """The driver's table, of these tensors."""
    sum_table: torch.Tensor
    """Rows of `tensor_table` of these tensors alone, in the order of their chunks."""
    scratch_at: torch.Tensor
    """The driver's table, of all tensors of the group."""


SUM_BLOCK = 1024
"""Number of partial sums that a program adds: of a tensor that has more, in two stages."""


class BoundPhase:
    """A phase's launches for one group, or a part of it, with the tables and the scratch that they need."""

    def __init__(
        self, phase: Apply, group: LaunchGroup, launch: LaunchSpec, n_earlier_sums: int, part: Part | None = None
    ) -> None:
        config = _config_of(phase, group, launch, n_earlier_sums)
        if part is None:
            tensors, chunks = group.tables(
                ("chunks", config.chunk_size), partial(chunk_tables, chunk_size=config.chunk_size)
            )
            part = Part(group.members, tensors, chunks, tensors, tensors)
        self._part = part
        self._noise = group.tables("noise", _noise_table(group))[0] if launch.draws else None
        self._n_chunks, self._n_tensors = len(part.chunk_table), len(part.members)
        self._n_sums = phase.n_sums
        self._tracks = tracks_of(phase, launch)
        self._n_totals = phase.n_sums + len(self._tracks[0]) + len(self._tracks[1])
        of_group = (group.formats, group.dtypes, group.aligned)
        self._variant = (phase, *of_group, launch.preamble, bool(self._n_totals), config)
        self._constants = {
            **phase_constants(phase, launch, group, n_earlier_sums),
            "CHUNK_SIZE": config.chunk_size,
            "BLOCK_SIZE": config.block_size,
            "TAIL_SIZE": min(config.tail_size, config.block_size),
            "UNROLL": unrolled(config, launch.generic or GENERIC, group.dtypes),
            "num_warps": config.num_warps,
            "enable_fp_fusion": False,
        }
        n_states = len(group.formats) - 1 if phase.states is None else len(phase.states)
        self._limit = register_limit(phase, launch, n_states, config)
        self._apply = self._launcher()
        of_sums = {"N_SUMS": self._n_totals, "BLOCK_SIZE": SUM_BLOCK, "enable_fp_fusion": False}
        self._sum = BoundKernel(sum_partials, self._n_tensors, of_sums)
        self._blocks = self._blocks_of(group, config.chunk_size) if part.tensor_table is part.sum_table else None
        if self._blocks is not None:
            self._sum_blocks = BoundKernel(sum_blocks, len(self._blocks[1]), of_sums)
        # What is tracked is read later, perhaps after other steps: it gets memory of its own each time.
        self._scratch = None if launch.tracked is not None else self._fresh(group)

    def __call__(
        self, group: LaunchGroup, launch: LaunchSpec, sums: torch.Tensor | None, scratch: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Launch. scratch: elements that the phase reads or writes for another one, if it does."""
        partials, block_sums, totals = self._scratch or self._fresh(group)
        if self._n_chunks:  # none where shards have no element here
            self._launch(group, launch, sums, partials, scratch)
        if totals is None:
            return None
        table, n_partials = self._part.sum_table, self._n_chunks
        if self._blocks is not None:
            self._sum_blocks(launch.record, partials, table, *self._blocks, block_sums)
            partials, (table, block_table) = block_sums, self._blocks
            n_partials = len(block_table)
        self._sum(launch.record, partials, table, totals, n_partials, self._n_tensors)
        if launch.tracked is not None and any(self._tracks):
            columns = (*self._tracks[0], *self._tracks[1])
            launch.tracked.append(Tracked(self._part.members, columns, totals[:, self._n_sums :]))
        if self._n_sums == self._n_totals:
            return totals
        return totals[:, : self._n_sums].contiguous() if self._n_sums else None

    def _launch(
        self,
        group: LaunchGroup,
        launch: LaunchSpec,
        sums: torch.Tensor | None,
        partials: torch.Tensor | None,
        scratch: torch.Tensor | None,
    ) -> None:
        compiled = self._apply(
            launch.record,
            group.device_table,
            self._part.tensor_table,
            self._part.chunk_table,
            launch.rescale,
            launch.noop,
            partials,
            sums,
            self._noise,
            len(group.members),
            scratch,
            None if scratch is None else self._part.scratch_at,
        )
        if private.n_spills(compiled) and self._variant not in _OPTIONS_OF_SPILLED:
            _OPTIONS_OF_SPILLED[self._variant] = more_registers(private.n_registers(compiled))
            self._apply = self._launcher()

    def _launcher(self) -> BoundKernel:
        more = _OPTIONS_OF_SPILLED.get(self._variant, self._limit)
        return BoundKernel(multi_tensor_apply, self._n_chunks, {**self._constants, **more})

    def _blocks_of(self, group: LaunchGroup, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Tables of `sum_blocks`, where there are sums and a tensor has so many chunks."""
        n_chunks = [torch.Size([-(-shape.numel() // chunk_size)]) for shape in group.shapes]
        if not self._n_totals or max(n_chunks)[0] <= SUM_BLOCK:
            return None
        name = ("blocks of chunks", chunk_size)
        longs, blocks = group.tables(name, lambda _: chunk_tables(n_chunks, SUM_BLOCK))
        return longs, blocks

    def _fresh(self, group: LaunchGroup) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Sums of chunks, of blocks of them and of tensors, if there are any."""
        if not self._n_totals:
            return None, None, None
        sums = [group.empty(n, self._n_totals) for n in (self._n_chunks, self._n_tensors)]
        blocks = None if self._blocks is None else group.empty(len(self._blocks[1]), self._n_totals)
        return sums[0], blocks, sums[1]


_OPTIONS_OF_SPILLED: dict[Hashable, dict[str, int]] = {}
"""Options for the compiler, by launch variant, where a kernel spilled registers without them: `more_registers`."""


def register_limit(phase: Apply, launch: LaunchSpec, n_states: int, config: Config) -> dict[str, int]:
    """Options that say how many registers a thread may take, for launches with eight elements a thread.

    NVIDIA: two states that are updated in formats which draw random bits take 95 to 125 registers, as the compiler
    pleases, and do as well with 96: five programs of four warps then fit on a core, instead of four. Others spill so,
    or take fewer anyway.
    AMD: what updates states and sums, or draws random bits, takes 70 to 160, and the compiler moves loads behind what
    waits for others, to save some: a wave of `lans_moments` waits six times a block. Told that no more than three waves
    share a SIMD, it loads all first.
    """
    generic = launch.generic or GENERIC
    has_eight = config.block_size == generic.block_size // generic.num_warps * config.num_warps
    if not has_eight or not phase.writes_states:
        return {}
    if generic == AMD:
        return {"waves_per_eu": 3} if phase.n_sums or launch.draws else {}
    is_of_two = launch.draws and n_states == 2 and not phase.n_sums and launch.tracked is None
    return {"maxnreg": 96} if is_of_two else {}


def more_registers(n: int) -> dict[str, int]:
    """Options for a kernel that spills with so many registers a thread.

    NVIDIA's compiler spills a few bytes to fit one more block on a core, unless it is told how many it may take.
    """
    return {} if torch.version.hip else {"maxnreg": min(n + 32, 255)}


def tracks_of(phase: Apply, launch: LaunchSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Columns of telemetry that a phase sums up, of the gradient and of the update: each by one phase of the step."""
    if launch.tracked is None:
        return (), ()
    reader = next(other for other in launch.phases if isinstance(other, Apply) and other.reads_grad)
    return OF_GRADIENT if phase is reader else (), OF_UPDATE if phase.writes_weight else ()


def _config_of(phase: Apply, group: LaunchGroup, launch: LaunchSpec, n_earlier: int) -> Config:
    """The launch's configuration or, if it has none, the phase's choice; adapted to what is stored."""
    if launch.config is not None:
        return adapted(launch.config, group.formats, group.dtypes)
    # Not by the function itself, whose hash takes longer than all of this; it stays alive with what is kept.
    key = (id(phase.update), phase.n_sums, launch.tracked is None)
    chosen: tuple[Config, Any] | None = group.configs.get(key)
    if chosen is None:
        unadapted = (launch.generic or GENERIC) if phase.scratch else autotune.choose(phase, group, launch, n_earlier)
        config = adapted(unadapted, group.formats, group.dtypes)
        chosen = group.configs[key] = config, phase.update
    return chosen[0]


def _noise_table(group: LaunchGroup) -> Callable[[object], tuple[np.ndarray[Any, Any]]]:
    return lambda _: (np.array(group.noise, dtype=np.int64),)


def chunk_tables(shapes: Sequence[torch.Size], chunk_size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The driver's tables of tensors and of chunks."""
    sizes = np.array([shape.numel() for shape in shapes], dtype=np.int64)
    chunks = -(-sizes // chunk_size)
    widths = [shape[1:].numel() for shape in shapes]
    tensors = np.stack([sizes, np.cumsum(chunks) - chunks, np.array(widths, dtype=np.int64)], axis=1)
    return tensors, np.repeat(np.arange(len(sizes), dtype=np.int32), chunks)


def phase_constants(phase: Apply, launch: LaunchSpec, group: LaunchGroup, n_earlier_sums: int) -> dict[str, Any]:
    """The driver's compile-time arguments for one phase, but for the launch's sizes."""
    formats, dtypes = group.formats, group.dtypes
    of_gradient, of_update = tracks_of(phase, launch)
    # Behind the weight's planes stands the gradient, which is plain.
    past_grad = itertools.accumulate((fmt.n_planes for fmt in formats[1:]), initial=formats[0].n_planes + 1)
    ends = [formats[0].n_planes, *itertools.islice(past_grad, 1, None)]
    if phase.states is not None:
        taken = (0, *[i + 1 for i in phase.states])
        formats, ends = tuple(formats[i] for i in taken), [ends[i] for i in taken]
    n_states = len(formats) - 1
    if phase.scratch:
        formats, ends = (*formats, PLAIN), [*ends, len(dtypes) + 1]
    functions = (phase.update, formats[0].shown, *[f for fmt in formats for f in (fmt.load, fmt.store)])
    return {
        "UPDATE_FN": phase.update,
        "PREAMBLE_FN": PREAMBLES[launch.preamble].kernel,
        "SCALARS": as_constant(launch.scalars),
        "N_SCALARS": launch.n_scalars,
        "N_OWN_SCALARS": len(launch.scalars._fields),  # type: ignore[attr-defined]
        "FORMATS": tuple(
            (end - fmt.n_planes, end, fmt.load, fmt.store, fmt.draws) for end, fmt in zip(ends, formats, strict=True)
        ),
        "DTYPES": tuple(TRITON_DTYPES[dtype] for dtype in dtypes),
        "READS": (phase.reads_weight, phase.reads_grad, *[phase.reads_states] * n_states)
        + (phase.scratch == "read",) * bool(phase.scratch),
        "WRITES": (phase.writes_weight, False, *[phase.writes_states] * n_states)
        + (phase.scratch == "write",) * bool(phase.scratch),
        "READS_OFFSETS": phase.reads_offsets,
        "HAS_ROWS": group.has_rows,
        "ALIGNED": () if all(group.aligned) else group.aligned,
        "N_EARLIER_SUMS": n_earlier_sums,
        "N_SUMS": phase.n_sums,
        "N_TOTALS": phase.n_sums + len(of_gradient) + len(of_update),
        "TRACKS": (bool(of_gradient), bool(of_update)),
        "SHOWN_FN": formats[0].shown,
        "SKIP_ZERO_RESCALE": launch.skip_zero_rescale,
        "COMPUTE_DTYPE": tl.float64 if dtypes[0] == torch.float64 else tl.float32,
        "SOURCE_HASH": source_hash(functions, launch.scalars),
    }


def as_constant(scalars: type) -> Any:
    """A NamedTuple class as a compile-time argument: bare, Triton takes it for a tuple and iterates over it."""
    return tl.constexpr(scalars)


_HASHES: dict[Hashable, str] = {}


def source_hash(functions: tuple[Any, ...], scalars: type) -> str:
    """A key to what Triton's disk cache does not see: sources of functions inside tuples, fields of `scalars`."""
    key = (functions, scalars)
    if key not in _HASHES:
        sources = [private.source_key(f) for f in functions]
        text = repr((sources, getattr(scalars, "_fields", ())))
        _HASHES[key] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return _HASHES[key]
