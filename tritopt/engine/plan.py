"""Host half of a fused step: group tensors by dtypes, build the driver's tables, upload what changed, launch.

A plan is what is built once for a list of tensors: the groups, and the chunk tables. It holds addresses and numbers,
never a tensor, so nothing outlives its owner; a step recomputes the signature and the addresses, so a swapped `.data`,
a new gradient or a reloaded state is always seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tritopt.engine import private, validate
from tritopt.engine.driver import Apply
from tritopt.engine.group import LaunchGroup, ScalarTable, upload_table
from tritopt.engine.phase import LaunchSpec, Recorder, Reduce, run_phases
from tritopt.engine.recent import Recent
from tritopt.engine.tuning.config import Config
from tritopt.engine.walk import holds_values, walk
from tritopt.kernels.drivers.multi_tensor_norm import square_update
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.language import HAS_TRITON, INTERPRETED, MISSING_TRITON
from tritopt.kernels.memory import is_dense


class Task(NamedTuple):
    """One parameter's tensors in a step. States may have a shape of their own (`Optimizer.state_shapes`)."""

    weight: tuple[torch.Tensor, ...]
    """The planes of the weight's storage format."""
    format: Format
    grad: torch.Tensor
    state: tuple[torch.Tensor, ...]
    rows: torch.Tensor | None = None
    """Numbers of the weight's and states' rows that the gradient's rows are for, int64; None: all, in order."""
    noise: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Key, first position, width and gap of the random bits, where a format draws: `Noise` says what they are."""
    state_formats: tuple[Format, ...] = ()
    """Format of each state, whose planes stand in `state` one after the other. Empty: all plain."""

    @property
    def formats(self) -> tuple[Format, ...]:
        """Formats of the weight and of each state."""
        return (self.format, *(self.state_formats or (PLAIN,) * len(self.state)))

    @property
    def draws(self) -> bool:
        """Whether storing takes random bits."""
        return any(fmt.draws for fmt in self.formats)

    def states(self) -> list[tuple[torch.Tensor, ...]]:
        """The planes of each state."""
        planes = iter(self.state)
        return [tuple(itertools.islice(planes, fmt.n_planes)) for fmt in self.formats[1:]]

    def shared(self) -> set[int]:
        """`id` of the tensors of numbers that several elements share."""
        return {id(planes[-1]) for planes, fmt in zip(self.states(), self.formats[1:], strict=True) if fmt.block}

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, in the order of the driver's pointer table."""
        return (*self.weight, self.grad, *self.state, *(() if self.rows is None else (self.rows,)))

    def written(self) -> tuple[torch.Tensor, ...]:
        """The tensors that a step may write."""
        return (*self.weight, *self.state)

    def versions(self) -> list[int]:
        """Version counters of `written()`, by which autograd knows of writes; 0 for tensors of inference mode."""
        parts = map(private.local_part, self.written())
        return [0 if part.is_inference() else private.version_of(part) for part in parts]


kernel_device = "cpu" if INTERPRETED else "cuda"
"""Type of the devices whose tensors kernels take; "cpu" too while the PTX machine runs them (tritopt/tools/ptx)."""


def unavailable(tensor: torch.Tensor, way_out: str = "") -> str | None:
    """Reason why the fused path cannot take this tensor, and what to do about it; None if it can.

    way_out: advice on what else the caller can do, such as "pass fused=False to run the reference step".
    """
    otherwise = way_out and f", or {way_out}"
    if not HAS_TRITON:
        return MISSING_TRITON + otherwise
    if tensor.device.type != kernel_device:
        remedy = ": move it to a GPU, or set TRITON_INTERPRET=1"
        if kernel_device == "cpu":
            remedy = " while TRITON_INTERPRET=1: unset it" if INTERPRETED else ": switch the PTX machine off"
        return f"the fused path cannot update a tensor on {tensor.device}{remedy}{otherwise}"
    return None


def is_low_precision(dtype: torch.dtype) -> bool:
    """Whether multi_precision keeps an fp32 master for a weight of this dtype."""
    return dtype in (torch.float16, torch.bfloat16)


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype of the arithmetic: fp64 for fp64 weights, fp32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class Planner:
    """The plans of one optimizer, and the fused step over a list of tasks."""

    config: Config | None = None
    """`LaunchSpec.config` of all its launches; tools and tests set it, and the next, before the first step."""
    record: Recorder | None = None
    """`LaunchSpec.record` of all its launches, and told of those that a step makes beside its phases."""
    generic: Config | None = None
    """`LaunchSpec.generic` of all launches that `record` is told of."""

    def __init__(self) -> None:
        self._plans: Recent[tuple[Any, list[LaunchGroup]]] = Recent()
        self._places: Recent[frozenset[Any]] = Recent()
        """Address, dtype, shape and strides of each tensor of a list whose tensors were found to share no element."""
        self.replays: Recent[Any] = Recent()
        """Steps that a face of the package may make again."""

    def __reduce__(self) -> tuple[type[Planner], tuple[()]]:
        """Plans hold addresses of this process: a copy starts without any."""
        return Planner, ()

    def forget(self) -> None:
        """Let go of all plans, as after a step that failed, whose tables may be half written."""
        self._plans, self._places, self.replays = Recent(), Recent(), Recent()

    def configured(self, launch: LaunchSpec) -> LaunchSpec:
        """The launch as this planner makes it."""
        if self.config is None and self.record is None:
            return launch
        return launch._replace(config=self.config, record=self.record, generic=self.generic)

    def apply(
        self,
        key: Hashable,
        tasks: Sequence[Task],
        scalars: ScalarTable | Sequence[tuple[float, ...]],
        launch: LaunchSpec,
    ) -> list[LaunchGroup] | None:
        """Update all tasks in place. Returns the groups that were launched, None if tensors had to be copied.

        `scalars[i]` is task i's: rescale, clip bound, wd, the optimizer's scalars.
        """
        scalars = scalars if isinstance(scalars, ScalarTable) else ScalarTable.of(scalars)
        by_position = any(isinstance(phase, Apply) and phase.reads_offsets for phase in launch.phases)
        # The driver never looks for an element's row: states of rows have launches of their own.
        dense, copied_back = _as_dense(tasks, by_position, all(phase.is_driver for phase in launch.phases))
        groups = self._uploaded(key, dense, scalars, launch.exchange is not None)
        run_phases(groups, self.configured(launch), len(dense))
        for original, copy in copied_back:
            original.copy_(copy)
        # Autograd must learn of writes that it did not make, as it does of torch's own in-place operations.
        walk().mark_written([tensor for task in tasks for tensor in task.written()])
        return None if copied_back or any(a is not b for a, b in zip(dense, tasks, strict=True)) else groups

    def squares(self, key: Hashable, tensors: Sequence[torch.Tensor], reduce: Reduce | None = None) -> torch.Tensor:
        """Sum of squares of each tensor, fp64 [tensors], one launch per dtype; bit-identical from run to run."""
        tasks, _ = _as_dense([Task((t,), PLAIN, t, ()) for t in tensors])
        groups = self._uploaded(("squares", key), tasks, ScalarTable.of([(1.0, np.inf, 0.0)] * len(tasks)))
        device = tensors[0].device if tensors else torch.device("cpu")
        return self.squares_of(groups, len(tasks), device, reduce).view(-1)

    def squares_of(
        self, groups: Sequence[LaunchGroup], n: int, device: torch.device, reduce: Reduce | None
    ) -> torch.Tensor:
        """Sums of squares, fp64 [n, 1], of tensors whose tables are uploaded; 0 for those that no group has."""
        by_group = run_phases(groups, self.configured(_OF_SQUARES), n)
        if len(groups) == 1 and len(groups[0].members) == n and reduce is None:
            assert by_group[0] is not None
            return by_group[0]
        sums = torch.zeros(n, 1, dtype=torch.float64, device=device)
        for group, values in zip(groups, by_group, strict=True):
            assert values is not None
            sums.index_copy_(0, group.places.to(device), values.to(device))
        if reduce is not None:
            reduce(sums)
        return sums

    def groups_of_squares(self, key: Hashable) -> list[LaunchGroup] | None:
        """Groups of the last `squares` with this key; None if there was none, or it had to go for others."""
        plan = self._plans.get(("squares", key))
        return None if plan is None else plan[1]

    def held(self) -> list[Any]:
        """All groups, and what they have on the device (`LaunchGroup.held`)."""
        return [(group, group.held()) for _, groups in self._plans.values() for group in groups]

    def check_aliases(self, key: Hashable, owners: Sequence[Hashable], tasks: Sequence[Task]) -> None:
        """ValueError if the step would write an element twice; looked at again only when a tensor has moved."""
        if not any(validate.is_allocated(task.weight[0]) for task in tasks):
            return
        places = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for task in tasks for t in task.written()]
        known = self._places.get(key)
        distinct = frozenset(places)
        # Without some of its tensors a list that shares none still shares none; one that is there twice does.
        if known is not None and len(distinct) == len(places) and distinct <= known:
            return
        owner_of = [owner for owner, task in zip(owners, tasks, strict=True) for _ in task.written()]
        validate.no_aliases(owner_of, [tensor for task in tasks for tensor in task.written()])
        self._places.put(key, distinct, len(places))

    def _uploaded(
        self, key: Hashable, tasks: Sequence[Task], scalars: ScalarTable, has_replicas: bool = False
    ) -> list[LaunchGroup]:
        """The groups of a list of tasks, with their tables on the device."""
        tensors = [task.tensors() for task in tasks]
        addresses = [[tensor.data_ptr() for tensor in of_task] for of_task in tensors]
        group_keys = list(map(_group_key, tasks, tensors, addresses))
        signature = [
            (group_key, task.grad.shape, task.weight[0].stride(), task.noise)
            for group_key, task in zip(group_keys, tasks, strict=True)
        ]
        plan = self._plans.get(key)
        if plan is None or plan[0] != signature:
            plan = self._plans.put(key, (signature, _build_groups(tasks, group_keys, has_replicas)), len(tasks))
        _, groups = plan
        for group in groups:
            words = np.empty((len(group.members), len(group.dtypes) + 1), np.int64)
            words[:, :-1] = [addresses[i] for i in group.members]
            words[:, -1] = scalars.place_of[group.members]
            upload_table(group, words, scalars.values)
        return groups


def norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of each tensor, fp64 [len(tensors)], one launch per dtype; bit-identical from run to run."""
    return Planner().squares("norms", tensors).sqrt()


class NoScalars(NamedTuple):
    """Scalars of a phase that has none."""


_SQUARES = Apply(square_update, reads_grad=False, writes_weight=False, n_sums=1)
_OF_SQUARES = LaunchSpec((_SQUARES,), NoScalars, "rescaled")


class _GroupKey(NamedTuple):
    """Facts that the tasks of one group have in common."""

    device: torch.device
    formats: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    aligned: tuple[bool, ...]
    """Whether each tensor begins at a multiple of 16 bytes, which the widest accesses need."""


def _group_key(task: Task, tensors: Sequence[torch.Tensor], addresses: Sequence[int]) -> _GroupKey:
    names = tuple([fmt.name for fmt in task.formats])
    aligned = tuple([address % 16 == 0 for address in addresses])
    return _GroupKey(task.grad.device, names, tuple([tensor.dtype for tensor in tensors]), aligned)


def _build_groups(tasks: Sequence[Task], keys: Sequence[_GroupKey], has_replicas: bool = False) -> list[LaunchGroup]:
    """Groups of the tasks that have an element; has_replicas: also where that is in a replicated state alone."""
    members: dict[_GroupKey, list[int]] = {}
    for i, (task, key) in enumerate(zip(tasks, keys, strict=True)):
        if task.grad.numel() > 0 or (has_replicas and any(state.numel() for state in task.state)):
            members.setdefault(key, []).append(i)
    groups = []
    for key, positions in members.items():
        first = tasks[positions[0]]
        shapes = [tasks[i].grad.shape for i in positions]
        noise = [tasks[i].noise for i in positions]
        strides = [tasks[i].weight[0].stride() for i in positions]
        has_rows = first.rows is not None
        groups.append(
            LaunchGroup(positions, key.device, first.formats, key.dtypes, shapes, noise, strides, key.aligned, has_rows)
        )
    return groups


def _as_dense(
    tasks: Sequence[Task], by_position: bool = False, has_rows_apart: bool = False
) -> tuple[list[Task], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Tasks whose tensors all lie in memory like the weight, and the (original, copy) pairs to copy back afterwards.

    A dense weight runs as flat memory in its own order of dimensions (channels_last, transposed), a copy of a strided
    one runs contiguous. Whatever lies otherwise is copied. `by_position`: an element's place in memory must be its
    position in row-major order, so all run contiguous. `has_rows_apart`: states of another shape ask for no order.
    """
    dense, copied_back = [], []
    for task in tasks:
        tensors = task.tensors()
        for tensor in tensors:
            if not (tensor.is_contiguous() and holds_values(tensor)):
                break
        else:
            dense.append(task)
            continue
        weight = task.weight[0]
        # States of another shape (a row's, a column's) are told apart by position, which only the usual order gives.
        shared = task.shared()
        same_shape = has_rows_apart or all(t.shape == weight.shape for t in tensors if id(t) not in shared)
        keeps_order = same_shape and is_dense(weight) and not by_position
        flat = weight.stride() if keeps_order else _contiguous_strides(weight.shape)
        grad_at = len(task.weight)
        moved = []
        for i, tensor in enumerate(tensors):
            copy, strides = tensor, flat if tensor.shape == weight.shape else _contiguous_strides(tensor.shape)
            is_placed = id(tensor) in shared or _strides_equal(tensor.shape, tensor.stride(), strides)
            if not (is_placed and holds_values(tensor)):
                copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(
                    tensor
                )
                if i != grad_at:
                    copied_back.append((tensor, copy))
            moved.append(copy)
        if all(a is b for a, b in zip(moved, tensors, strict=True)):
            dense.append(task)
        else:
            planes, states = tuple(moved[:grad_at]), tuple(moved[grad_at + 1 :])
            dense.append(task._replace(weight=planes, grad=moved[grad_at], state=states))
    return dense, copied_back


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, dtype=torch.float32, device="meta").stride()


def _strides_equal(shape: Iterable[int], a: Iterable[int], b: Iterable[int]) -> bool:
    return all(x == y or n == 1 for n, x, y in zip(shape, a, b, strict=True))
