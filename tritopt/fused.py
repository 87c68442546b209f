"""Host half of a fused step: group tensors by dtypes, build the driver's tables, upload what changed, launch.

A plan is what is built once for a list of tensors: the groups, and the chunk tables. It holds addresses and numbers,
never a tensor, so nothing outlives its owner; a step recomputes the signature and the addresses, so a swapped `.data`,
a new gradient or a reloaded state is always seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from tritopt import validate
from tritopt.kernels.formats import PLAIN, Format
from tritopt.kernels.language import HAS_TRITON, INTERPRETED, MISSING_TRITON
from tritopt.kernels.multi_tensor_norm import square_update
from tritopt.phases import Apply, Phase

MAX_PLANS = 4096
Value = TypeVar("Value")


class Task(NamedTuple):
    """One parameter's tensors in a step. States may have a shape of their own (`Optimizer.state_shapes`)."""

    weight: tuple[torch.Tensor, ...]
    """The planes of the weight's storage format."""
    format: Format
    grad: torch.Tensor
    state: tuple[torch.Tensor, ...]
    rows: torch.Tensor | None = None
    """int64: which rows of the weight and the states the rows of the gradient are for; None: all, in order."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order of the driver's pointer table."""
        return (*self.weight, self.grad, *self.state, *(() if self.rows is None else (self.rows,)))

    def written(self) -> tuple[torch.Tensor, ...]:
        """The tensors that a step may write."""
        return (*self.weight, *self.state)


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

    phases: Sequence[Phase]
    scalars: type
    """The NamedTuple of the optimizer's scalars."""
    preamble: str
    """A key of kernels/preambles.py."""
    rescale: torch.Tensor | None = None
    """Device scalar that multiplies the rows' rescale; NaN or Inf skips the update."""
    noop: torch.Tensor | None = None
    """Device flag; anything but 0 skips the update."""
    skip_zero_rescale: bool = False
    reduce: Reduce | None = None
    """Completes sums whose tensors are sharded over processes, between phases."""

    @property
    def n_scalars(self) -> int:
        """Length of a row: rescale, clip bound, wd, then the optimizer's."""
        return 3 + len(self.scalars._fields)  # type: ignore[attr-defined]


class DeviceRows(NamedTuple):
    """Scalars that are formed on the device, as when steps or learning rates live there."""

    values: torch.Tensor
    """fp64 [rows, 3 + scalars]."""
    row_of: Sequence[int]
    """Each task's row."""


class Reduce(Protocol):
    """Adds up over processes."""

    device: torch.device

    def __call__(self, sums: torch.Tensor) -> None:
        """In place: fp64 [tasks, sums], of all tasks, also of those that are empty here."""
        ...


@dataclass
class Group:
    """Tasks of one device, format and list of dtypes: they share a launch."""

    members: list[int]
    device: torch.device
    format: Format
    dtypes: tuple[torch.dtype, ...]
    """Of the pointer table's columns: the weight's planes, gradient, states, and int64 where there are rows."""
    shapes: list[torch.Size]
    """Of the members' gradients."""
    host_table: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.empty(0, np.int64))
    device_table: torch.Tensor | None = None
    stream: int = 0
    staging: torch.Tensor | None = None
    """Pinned, for a table that is uploaded while a CUDA graph is captured: each replay reads it again."""
    captured: list[torch.Tensor] = field(default_factory=list)
    """What CUDA graphs read when they are replayed."""
    _tables: dict[Hashable, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def formats(self) -> tuple[Format, ...]:
        """Of the weight and of each state."""
        n_states = len(self.dtypes) - self.format.n_planes - 1 - (self.dtypes[-1] == torch.int64)
        return (self.format, *[PLAIN] * n_states)

    def tables(self, name: Hashable, build: Callable[[Sequence[torch.Size]], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What `build` makes of the shapes, arrays on the device; made and uploaded once."""
        if name not in self._tables:
            made = build(self.shapes)
            self._tables[name] = tuple(_upload(x, self.device) if isinstance(x, np.ndarray) else x for x in made)
        return self._tables[name]

    @property
    def places(self) -> torch.Tensor:
        """The members, int64 on the device."""
        (found,) = self.tables("places", lambda _: (np.array(self.members, dtype=np.int64),))
        return found  # type: ignore[no-any-return]

    def empty(self, *shape: int) -> torch.Tensor:
        """Uninitialised fp64 scratch on the device."""
        return torch.empty(shape, dtype=torch.float64, device=self.device)


class Planner:
    """The plans of one optimizer, and the fused step over a list of tasks."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Hashable, tuple[Hashable, list[Group]]] = OrderedDict()
        self._places: OrderedDict[Hashable, list[Any]] = OrderedDict()

    def __reduce__(self) -> tuple[type[Planner], tuple[()]]:
        """Plans hold addresses of this process: a copy starts without any."""
        return Planner, ()

    def apply(
        self, key: Hashable, tasks: Sequence[Task], rows: Sequence[tuple[float, ...]] | DeviceRows, launch: Launch
    ) -> None:
        """Update all tasks in place. A row: rescale, clip bound, wd, the optimizer's scalars; `rows[i]` is task i's."""
        dense, copied_back = _as_dense(tasks)
        groups = self._groups(key, dense)
        for group in groups:
            with _on_device(group.device):
                _upload_table(group, dense, rows)
        _run_phases(groups, launch, len(dense))
        for original, copy in copied_back:
            original.copy_(copy)
        # Autograd must learn of writes that it did not make, as it does of torch's own in-place operations.
        written = [t for task in tasks for t in task.written() if not t.is_inference()]
        torch.autograd.graph.increment_version(written)

    def squares(self, key: Hashable, tensors: Sequence[torch.Tensor], reduce: Reduce | None = None) -> torch.Tensor:
        """Sum of squares of each tensor, fp64 [tensors], one launch per dtype; bit-identical from run to run."""
        tasks, _ = _as_dense([Task((t,), PLAIN, t, ()) for t in tensors])
        groups = self._groups(("squares", key), tasks)
        for group in groups:
            with _on_device(group.device):
                _upload_table(group, tasks, [(1.0, np.inf, 0.0)] * len(tasks))
        phase = Apply(square_update, reads_grad=False, writes_weight=False, n_sums=1)
        found = _run_phases(groups, Launch((phase,), _NoScalars, "decoupled"), len(tasks))
        sums = torch.zeros(len(tensors), 1, dtype=torch.float64, device=tensors[0].device if tensors else "cpu")
        for group, values in zip(groups, found, strict=True):
            assert values is not None
            sums.index_copy_(0, group.places.to(sums.device), values.to(sums.device))
        if reduce is not None:
            reduce(sums)
        return sums[:, 0]

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
            (task.format.name, tuple(t.dtype for t in task.tensors()), task.grad.shape, task.grad.device)
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
    return Planner().squares("norms", tensors).sqrt()


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
        dtypes = tuple(t.dtype for t in first.tensors())
        shapes = [tasks[i].grad.shape for i in positions]
        groups.append(Group(positions, first.grad.device, first.format, dtypes, shapes))
    return groups


def _upload_table(group: Group, tasks: Sequence[Task], rows: Sequence[tuple[float, ...]] | DeviceRows) -> None:
    row_of: dict[tuple[float, ...], int] = {}
    words: list[int] = []
    on_device = isinstance(rows, DeviceRows)
    for i in group.members:
        words.extend([t.data_ptr() for t in tasks[i].tensors()])
        words.append(rows.row_of[i] if isinstance(rows, DeviceRows) else row_of.setdefault(rows[i], len(row_of)))
    scalars = np.zeros(rows.values.numel()) if isinstance(rows, DeviceRows) else np.array(list(row_of), np.float64)
    table = np.concatenate([np.array(words, dtype=np.int64), scalars.reshape(-1).view(np.int64)])
    stream = torch.cuda.current_stream(group.device).cuda_stream if group.device.type == "cuda" else 0
    # A table is freed to the stream it was made on, so another stream gets its own.
    if group.device_table is None or group.stream != stream or not np.array_equal(table, group.host_table):
        group.host_table, group.stream = table, stream
        group.device_table = _upload_for_graph(group, table) if on_device else _upload(table, group.device)
    if isinstance(rows, DeviceRows):
        group.device_table[len(words) :].view(torch.float64).copy_(rows.values.reshape(-1))


def _upload_for_graph(group: Group, table: np.ndarray[Any, Any]) -> torch.Tensor:
    """`_upload` that may be captured: pinned memory is allocated before, and belongs to the graph afterwards."""
    host = torch.from_numpy(table)
    if group.device.type != "cuda":
        return host.clone()
    staging, group.staging = group.staging, None
    if not torch.cuda.is_current_stream_capturing():
        group.staging = staging if staging is not None else torch.empty_like(host, pin_memory=True)
        return _upload(table, group.device)
    if staging is None or staging.shape != host.shape:
        raise RuntimeError(
            "a CUDA graph captured an optimizer's first step: run a few steps before the capture, and do not change "
            "which parameters have gradients in it"
        )
    staging.copy_(host)
    group.captured.append(staging)
    return staging.to(group.device, non_blocking=True)


def _run_phases(groups: Sequence[Group], launch: Launch, n_tasks: int) -> list[torch.Tensor | None]:
    """Launch the phases one after the other; a phase receives the sums of all before it. Returns all sums."""
    sums: list[torch.Tensor | None] = [None] * len(groups)
    for phase in launch.phases:
        emitted = []
        for group, earlier in zip(groups, sums, strict=True):
            with _on_device(group.device):
                emitted.append(phase.launch(group, launch, earlier))
        if launch.reduce is not None and phase.n_sums:
            _reduce(launch.reduce, groups, emitted, n_tasks, phase.n_sums)
        sums = [_joined(earlier, new) for earlier, new in zip(sums, emitted, strict=True)]
    return sums


def _reduce(
    reduce: Reduce, groups: Sequence[Group], sums: Sequence[torch.Tensor | None], n_tasks: int, n_sums: int
) -> None:
    """One vector for all groups: a process whose shards are all empty takes part like the others."""
    total = torch.zeros(n_tasks, n_sums, dtype=torch.float64, device=reduce.device)
    for group, values in zip(groups, sums, strict=True):
        assert values is not None
        total.index_copy_(0, group.places, values)
    reduce(total)
    for group, values in zip(groups, sums, strict=True):
        assert values is not None
        values.copy_(total[group.places])


def _joined(earlier: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    return torch.cat((earlier, new), dim=1) if earlier is not None and new is not None else new


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
        # States of another shape (a row's, a column's) are told apart by position, which only the usual order gives.
        same_shape = all(t.shape == weight.shape for t in tensors)
        flat = weight.stride() if same_shape and is_dense(weight) else _contiguous_strides(weight.shape)
        grad_at = len(task.weight)
        moved = []
        for i, tensor in enumerate(tensors):
            copy, strides = tensor, flat if tensor.shape == weight.shape else _contiguous_strides(tensor.shape)
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


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _strides_equal(shape: Iterable[int], a: Iterable[int], b: Iterable[int]) -> bool:
    return all(x == y or n == 1 for n, x, y in zip(shape, a, b, strict=True))


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
