"""Host half of a fused step: group tensors by dtypes, build the driver's tables, upload what changed, launch.

A plan is what is built once for a list of tensors: the groups, and the chunk tables. It holds addresses and numbers,
never a tensor, so nothing outlives its owner; a step recomputes the signature and the addresses, so a swapped `.data`,
a new gradient or a reloaded state is always seen.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from tritopt import validate
from tritopt.kernels.formats import PLAIN, Format
from tritopt.kernels.language import HAS_TRITON, INTERPRETED, MISSING_TRITON, tl
from tritopt.kernels.multi_tensor_apply import decay_in_gradient, decay_in_update, multi_tensor_apply
from tritopt.kernels.multi_tensor_norm import square_update, sum_partials

GRADIENT_FNS = {"gradient": decay_in_gradient, "update": decay_in_update}
MAX_PLANS = 4096
Value = TypeVar("Value")


class Apply(NamedTuple):
    """A phase: one launch that applies `update` to the whole list, moving only what it says."""

    update: Any
    """The @triton.jit update function."""
    reads_weight: bool = True
    reads_grad: bool = True
    reads_states: bool = True
    writes_weight: bool = True
    writes_states: bool = True
    n_sums: int = 0
    """Sums per tensor that `update` emits; the next phase receives them."""


class Task(NamedTuple):
    """One parameter's tensors in a step; all planes and states have the weight's shape."""

    weight: tuple[torch.Tensor, ...]
    """The planes of the weight's storage format."""
    format: Format
    grad: torch.Tensor
    state: tuple[torch.Tensor, ...]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order of the driver's pointer table."""
        return (*self.weight, self.grad, *self.state)

    def written(self) -> tuple[torch.Tensor, ...]:
        """The tensors that a step may write."""
        return (*self.weight, *self.state)


class Config(NamedTuple):
    """Launch parameters. 1024 elements a block on 4 warps: 8 a thread, one 128-bit access per 16-bit plane."""

    block_size: int = 1024
    chunk_size: int = 8192
    num_warps: int = 4


CONFIG = Config()


def unavailable(tensor: torch.Tensor) -> str | None:
    """Why the fused path cannot take this tensor and what to do about it, or None if it can."""
    if not HAS_TRITON:
        return MISSING_TRITON
    if tensor.device.type != ("cpu" if INTERPRETED else "cuda"):
        return (
            f"the fused path cannot update a tensor on {tensor.device}"
            + (
                " while TRITON_INTERPRET=1: unset it"
                if INTERPRETED
                else ": move it to a GPU, or set TRITON_INTERPRET=1"
            )
            + ", or pass use_fused_step=False to run the reference step"
        )
    return None


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether multi_precision keeps an fp32 master for a weight of this dtype."""
    return dtype in (torch.float16, torch.bfloat16)


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic: fp64 for fp64 weights, fp32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@dataclass
class Launch:
    """What the tasks of one step have in common."""

    phases: Sequence[Apply]
    scalars: type
    """The NamedTuple of the optimizer's scalars."""
    decay: str
    rescale: torch.Tensor | None = None
    """Device scalar that multiplies the rows' rescale; NaN or Inf skips the update."""
    noop: torch.Tensor | None = None
    """Device flag; anything but 0 skips the update."""
    skip_zero_rescale: bool = False


@dataclass
class Group:
    """Tasks of one device, format and list of dtypes: they share a launch."""

    members: list[int]
    device: torch.device
    format: Format
    dtypes: tuple[torch.dtype, ...]
    n_chunks: int
    tensor_table: torch.Tensor
    chunk_table: torch.Tensor
    host_table: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.empty(0, np.int64))
    device_table: torch.Tensor | None = None
    stream: int = 0


class Planner:
    """The plans of one optimizer, and the fused step over a list of tasks."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Hashable, tuple[Hashable, list[Group]]] = OrderedDict()
        self._places: OrderedDict[Hashable, list[Any]] = OrderedDict()

    def __reduce__(self) -> tuple[type[Planner], tuple[()]]:
        """Plans hold addresses of this process: a copy starts without any."""
        return Planner, ()

    def apply(self, key: Hashable, tasks: Sequence[Task], rows: Sequence[tuple[float, ...]], launch: Launch) -> None:
        """Update all tasks in place. `rows[i]`: rescale, clip bound, wd and then the optimizer's scalars of task i."""
        dense, copied_back = _as_dense(tasks)
        for group in self._groups(key, dense):
            with _on_device(group.device):
                _upload_table(group, dense, rows)
                _run_phases(group, launch, len(rows[0]))
        for original, copy in copied_back:
            original.copy_(copy)
        # Autograd must learn of writes that it did not make, as it does of torch's own in-place operations.
        written = [t for task in tasks for t in task.written() if not t.is_inference()]
        torch.autograd.graph.increment_version(written)

    def check_aliases(self, key: Hashable, owners: Sequence[Hashable], tasks: Sequence[Task]) -> None:
        """ValueError if the step would write an element twice; looked at again only when a tensor has moved."""
        places = [(t.data_ptr(), t.shape, t.stride()) for task in tasks for t in task.written()]
        if self._places.get(key) == places:
            return
        owner_of = [owner for owner, task in zip(owners, tasks, strict=True) for _ in task.written()]
        validate.no_aliases(owner_of, [tensor for task in tasks for tensor in task.written()])
        _remember(self._places, key, places)

    def _groups(self, key: Hashable, tasks: Sequence[Task]) -> list[Group]:
        signature = tuple(
            (task.format.name, tuple(t.dtype for t in task.tensors()), task.grad.numel(), task.grad.device)
            for task in tasks
        )
        found = self._plans.get(key)
        if found is None or found[0] != signature:
            found = (signature, _build_groups(tasks))
            _remember(self._plans, key, found)
        return found[1]


def _remember(cache: OrderedDict[Hashable, Value], key: Hashable, value: Value) -> None:
    cache[key] = value
    if len(cache) > MAX_PLANS:
        cache.popitem(last=False)


def norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of each tensor, fp64 [len(tensors)], one launch per dtype; bit-identical from run to run."""
    sums = torch.zeros(len(tensors), dtype=torch.float64, device=tensors[0].device if tensors else "cpu")
    tasks = [Task((t,), PLAIN, t, ()) for t in tensors]
    tasks, _ = _as_dense(tasks)
    phase = Apply(square_update, reads_grad=False, writes_weight=False, n_sums=1)
    for group in _build_groups(tasks):
        with _on_device(group.device):
            _upload_table(group, tasks, [(1.0, np.inf, 0.0)] * len(tasks))
            total = _run_phases(group, Launch((phase,), _NoScalars, "update"), 3)
            assert total is not None
            sums[group.members] = total[:, 0].to(sums.device)
    return sums.sqrt()


class _NoScalars(NamedTuple):
    """Scalars of a phase that has none."""


def _build_groups(tasks: Sequence[Task]) -> list[Group]:
    members: dict[Hashable, list[int]] = {}
    for i, task in enumerate(tasks):
        if task.grad.numel() > 0:
            key = (task.grad.device, task.format.name, tuple(t.dtype for t in task.tensors()))
            members.setdefault(key, []).append(i)
    groups = []
    for positions in members.values():
        first = tasks[positions[0]]
        sizes = np.array([tasks[i].grad.numel() for i in positions], dtype=np.int64)
        chunks = -(-sizes // CONFIG.chunk_size)
        tensor_table = np.stack([sizes, np.cumsum(chunks) - chunks], axis=1)
        chunk_table = np.repeat(np.arange(len(positions), dtype=np.int32), chunks)
        device = first.grad.device
        with _on_device(device):
            groups.append(
                Group(
                    positions,
                    device,
                    first.format,
                    tuple(t.dtype for t in first.tensors()),
                    len(chunk_table),
                    _upload(tensor_table, device),
                    _upload(chunk_table, device),
                )
            )
    return groups


def _upload_table(group: Group, tasks: Sequence[Task], rows: Sequence[tuple[float, ...]]) -> None:
    row_of: dict[tuple[float, ...], int] = {}
    words: list[int] = []
    for i in group.members:
        words.extend([t.data_ptr() for t in tasks[i].tensors()])
        words.append(row_of.setdefault(rows[i], len(row_of)))
    scalars = np.array(list(row_of), dtype=np.float64)
    table = np.concatenate([np.array(words, dtype=np.int64), scalars.reshape(-1).view(np.int64)])
    stream = torch.cuda.current_stream(group.device).cuda_stream if group.device.type == "cuda" else 0
    # A table is freed to the stream it was made on, so another stream gets its own.
    if group.device_table is None or group.stream != stream or not np.array_equal(table, group.host_table):
        group.host_table, group.stream = table, stream
        group.device_table = _upload(table, group.device)


def _run_phases(group: Group, launch: Launch, n_scalars: int) -> torch.Tensor | None:
    """Launch the phases one after the other; returns the sums that the last one emitted."""
    compute = torch.float64 if group.dtypes[0] == torch.float64 else torch.float32
    n_tensors = len(group.members)
    formats = (group.format, *[PLAIN] * (len(group.dtypes) - group.format.n_planes - 1))
    sums: torch.Tensor | None = None
    for phase in launch.phases:
        partials = _empty(group, group.n_chunks, phase.n_sums)
        multi_tensor_apply[(group.n_chunks,)](
            group.device_table,
            group.tensor_table,
            group.chunk_table,
            launch.rescale,
            launch.noop,
            partials,
            sums,
            n_tensors,
            **phase_constants(phase, launch, formats, group.dtypes, n_scalars, 0 if sums is None else sums.shape[1]),
            COMPUTE_DTYPE=TRITON_DTYPES[compute],
            CHUNK_SIZE=CONFIG.chunk_size,
            BLOCK_SIZE=CONFIG.block_size,
            num_warps=CONFIG.num_warps,
            enable_fp_fusion=False,
        )
        sums = None
        if partials is not None:
            sums = _empty(group, n_tensors, phase.n_sums)
            sum_partials[(n_tensors,)](
                partials, group.tensor_table, sums, group.n_chunks, n_tensors, N_SUMS=phase.n_sums, BLOCK_SIZE=1024
            )
    return sums


def phase_constants(
    phase: Apply,
    launch: Launch,
    formats: Sequence[Format],
    dtypes: Sequence[torch.dtype],
    n_scalars: int,
    n_earlier_sums: int,
) -> dict[str, Any]:
    """The driver's compile-time arguments for one phase, but for the compute dtype and the launch's sizes."""
    n_states = len(formats) - 1
    # Behind the weight's planes stands the gradient, which is plain.
    past_grad = itertools.accumulate((fmt.n_planes for fmt in formats[1:]), initial=formats[0].n_planes + 1)
    ends = [formats[0].n_planes, *itertools.islice(past_grad, 1, None)]
    functions = (phase.update, *[f for fmt in formats for f in (fmt.load, fmt.store)])
    return {
        "UPDATE_FN": phase.update,
        "GRADIENT_FN": GRADIENT_FNS[launch.decay],
        "SCALARS": launch.scalars,
        "N_SCALARS": n_scalars,
        "FORMATS": tuple(
            (end - fmt.n_planes, end, fmt.load, fmt.store) for end, fmt in zip(ends, formats, strict=True)
        ),
        "DTYPES": tuple(TRITON_DTYPES[dtype] for dtype in dtypes),
        "READS": (phase.reads_weight, phase.reads_grad, *[phase.reads_states] * n_states),
        "WRITES": (phase.writes_weight, False, *[phase.writes_states] * n_states),
        "N_EARLIER_SUMS": n_earlier_sums,
        "N_SUMS": phase.n_sums,
        "SKIP_ZERO_RESCALE": launch.skip_zero_rescale,
        "SOURCE_HASH": _source_hash(functions, launch.scalars),
    }


_HASHES: dict[Hashable, str] = {}


def _source_hash(functions: tuple[Any, ...], scalars: type) -> str:
    key = (functions, scalars)
    if key not in _HASHES:
        sources = [getattr(f, "cache_key", "") for f in functions]
        text = repr((sources, getattr(scalars, "_fields", ())))
        _HASHES[key] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return _HASHES[key]


def _as_dense(tasks: Sequence[Task]) -> tuple[list[Task], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Tasks whose tensors all lie in memory like the weight, and the (original, copy) pairs to copy back afterwards.

    A dense weight runs as flat memory in its own order of dimensions (channels_last, transposed), a copy of a strided
    one runs contiguous. Whatever lies otherwise is copied.
    """
    dense, copied_back = [], []
    for task in tasks:
        tensors = task.tensors()
        if all(t.is_contiguous() for t in tensors):
            dense.append(task)
            continue
        weight = task.weight[0]
        strides = weight.stride() if is_dense(weight) else torch.empty(weight.shape, device="meta").stride()
        grad_at = len(task.weight)
        moved = []
        for i, tensor in enumerate(tensors):
            copy = tensor
            if not _strides_equal(tensor.shape, tensor.stride(), strides):
                copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(
                    tensor
                )
                if i != grad_at:
                    copied_back.append((tensor, copy))
            moved.append(copy)
        dense.append(Task(tuple(moved[:grad_at]), task.format, moved[grad_at], tuple(moved[grad_at + 1 :])))
    return dense, copied_back


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a block of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _strides_equal(shape: Iterable[int], a: Iterable[int], b: Iterable[int]) -> bool:
    return all(x == y or n == 1 for n, x, y in zip(shape, a, b, strict=True))


def _empty(group: Group, rows: int, columns: int) -> torch.Tensor | None:
    return torch.empty((rows, columns), dtype=torch.float64, device=group.device) if columns else None


def _upload(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host
    # torch keeps a pinned block until the copies out of it are done, so the next step cannot overwrite it in flight.
    return host.pin_memory().to(device, non_blocking=True)


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cuda":
        make: Callable[[torch.device], AbstractContextManager[Any]] = torch.cuda.device
        return make(device)
    # A GPU does not warn of 0 / 0 in lanes past the end; nor should NumPy, which the interpreter computes with.
    return np.errstate(all="ignore")


TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
