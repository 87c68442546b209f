"""The phase of an optimizer that orthogonalises directions: two launches of the driver, and products between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from tritopt.engine.driver import Apply, BoundPhase, Part, chunk_tables
from tritopt.engine.group import LaunchGroup, on_device_of
from tritopt.engine.launcher import is_launching
from tritopt.engine.newton_schulz import Cut, Iteration, orthogonalize, ratio_of
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.tuning.config import GENERIC, adapted

SCRATCH_BYTES = 2**30
"""Default bound on the bytes that directions and their products take."""
_VECTOR = 16
"""Bytes to whose multiples the beginnings of tensors in the scratch are rounded up."""


class ApplyMatrices(NamedTuple):
    """A launch that writes directions to a scratch, their orthogonalisation, and a launch that moves the weights.

    They are made once for each part of the list whose scratch is at most `scratch_bytes`, or one tensor's; in each part
    one sequence of batched products for each shape of matrices.
    """

    direction: Any
    """The @triton.jit function of the first launch: gradient and states in; states, and behind them the direction."""
    update: Any
    """The @triton.jit function of the second launch: weight and direction in, weight out."""
    cut: Cut
    """Cut that says which matrices a tensor is made of."""
    iteration: Iteration
    scratch_bytes: int = SCRATCH_BYTES

    @property
    def passes(self) -> tuple[Apply, Apply]:
        """The two launches of the driver."""
        return (
            Apply(self.direction, reads_weight=False, writes_weight=False, scratch="write"),
            Apply(self.update, reads_grad=False, reads_states=False, writes_states=False, scratch="read"),
        )

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the update functions."""
        return tuple(name for one in self.passes for name in one.kernels)

    @property
    def n_sums(self) -> int:
        """0: no sum leaves the phase."""
        return 0

    @property
    def sums_elements(self) -> bool:
        """Norms and products depend on the order of summation."""
        return True

    @property
    def is_driver(self) -> bool:
        """The driver moves all tensors."""
        return True

    def traffic(self, weight: tuple[float, float], grad: float, states: float) -> tuple[float, float]:
        """Bytes per parameter (read, written) of the two launches; products not included."""
        direction = 4 if self.iteration.dtype is None else self.iteration.dtype.itemsize
        return weight[0] + grad + states + direction, weight[1] + states + direction

    def launch(self, group: LaunchGroup, launch: LaunchSpec, sums: torch.Tensor | None) -> None:
        """Launch all parts; one scratch serves them one after the other."""
        key = (
            *(self, launch.preamble, launch.scalars, launch.skip_zero_rescale, launch.draws),
            *(launch.tracked is not None, launch.config, group.stream),
        )
        group.ready(key, lambda: _Prepared(self, group, launch))(group, launch)

    def launch_sharded(self, groups: Sequence[LaunchGroup], launch: LaunchSpec, n_tasks: int) -> None:
        """Launch for shards of matrices: all directions first, `LaunchSpec.exchange`, and then all weights."""
        assert launch.exchange is not None
        directions: list[torch.Tensor | None] = [None] * n_tasks
        prepared = []
        for group in groups:
            key = ("sharded", self, launch.preamble, launch.scalars, launch.draws, launch.tracked is not None)
            ready = group.ready((*key, launch.config, group.stream), partial(_Prepared, self, group, launch, True))
            with on_device_of(group):
                prepared.append((group, ready, ready.direct(group, launch, directions)))
        if launch.record is None and is_launching():
            launch.exchange(directions)
        for group, ready, scratch in prepared:
            with on_device_of(group):
                ready.update(group, launch, scratch)


class Stack(NamedTuple):
    """Tensors of one shape, next to each other in the scratch."""

    n: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Strides of each tensor, which lies as its weight does."""
    first: int
    """Element of the scratch at which they begin."""
    stride: int
    """Elements from one to the next."""

    def of(self, scratch: torch.Tensor) -> torch.Tensor:
        """View of these tensors in the scratch, [tensors, *shape]."""
        return scratch.as_strided((self.n, *self.shape), (self.stride, *self.strides), self.first)


class Layout(NamedTuple):
    """Part of a list in the scratch."""

    members: list[int]
    """Places in the group, those of equal shape together."""
    stacks: list[Stack]
    at: np.ndarray[Any, np.dtype[np.int64]]
    """Element of the scratch at which each tensor of the list begins; it means nothing for others than the members."""
    size: int
    """Size of the scratch in elements."""


class _Prepared:
    """The phase for one group: launches, and stacks of the scratch."""

    def __init__(self, phase: ApplyMatrices, group: LaunchGroup, launch: LaunchSpec, is_sharded: bool = False) -> None:
        self._phase = phase
        compute = torch.float64 if group.dtypes[0] == torch.float64 else torch.float32
        self._dtype = phase.iteration.dtype or compute
        if is_sharded:
            layouts = [_layout_of_shards(group.shapes, group.strides, self._dtype.itemsize)]
        else:
            layouts = layouts_of(phase, group.shapes, group.strides, self._dtype.itemsize)
        self._size = max(layout.size for layout in layouts)
        config = adapted(launch.config or launch.generic or GENERIC, group.formats, group.dtypes)
        first, second = phase.passes
        launch = launch._replace(phases=(first, second))  # which of them tracks what goes by identity
        self._parts = []
        kind = "shards" if is_sharded else "matrices"
        for i, layout in enumerate(layouts):
            tables = group.tables(
                (kind, phase.cut, phase.scratch_bytes, self._dtype, config.chunk_size, i),
                partial(_tables, layout=layout, chunk_size=config.chunk_size),
            )
            part = Part([group.members[place] for place in layout.members], *tables)
            self._parts.append(
                (BoundPhase(first, group, launch, 0, part), layout.stacks, BoundPhase(second, group, launch, 0, part))
            )

    def __call__(self, group: LaunchGroup, launch: LaunchSpec) -> None:
        scratch = torch.empty(self._size, dtype=self._dtype, device=group.device)
        is_made = launch.record is None and is_launching()
        for direct, stacks, update in self._parts:
            direct(group, launch, None, scratch)
            if is_made:
                for stack in stacks:
                    orthogonalize_all(stack.of(scratch), self._phase.cut, self._phase.iteration)
            update(group, launch, None, scratch)

    def direct(self, group: LaunchGroup, launch: LaunchSpec, directions: list[torch.Tensor | None]) -> torch.Tensor:
        """Launch the first pass of shards, and enter their directions."""
        scratch = torch.empty(self._size, dtype=self._dtype, device=group.device)
        ((direct, stacks, _),) = self._parts
        direct(group, launch, None, scratch)
        for place, stack in zip(group.members, stacks, strict=True):
            directions[place] = stack.of(scratch)[0]
        return scratch

    def update(self, group: LaunchGroup, launch: LaunchSpec, scratch: torch.Tensor) -> None:
        """Launch the second pass of shards."""
        ((*_, update),) = self._parts
        update(group, launch, None, scratch)


def _layout_of_shards(shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]], itemsize: int) -> Layout:
    """Put the parts of a list into one scratch, whatever matrices they are of."""
    sizes = [-(-shape.numel() * itemsize // _VECTOR) * _VECTOR // itemsize for shape in shapes]
    at = np.cumsum([0, *sizes])[:-1].astype(np.int64)
    stacks = [
        Stack(1, tuple(shape), lie, int(first), size)
        for shape, lie, first, size in zip(shapes, strides, at, sizes, strict=True)
    ]
    return Layout(list(range(len(shapes))), stacks, at, sum(sizes))


def orthogonalize_all(x: torch.Tensor, cut: Cut, iteration: Iteration) -> None:
    """Orthogonalise every matrix of tensors of one shape, [tensors, *shape], in place."""
    matrices = x.reshape(len(x), *cut.shape_of(x.shape[1:]))  # a copy where dimensions that become one lie apart
    for stack in cut.stacks(matrices):
        orthogonalize(stack, iteration, ratio_of(iteration.ratio, *stack.shape[-2:]))
    if matrices.data_ptr() != x.data_ptr():
        x.copy_(matrices.view(x.shape))


def orthogonalize_each(directions: Sequence[torch.Tensor], cut: Cut, iteration: Iteration) -> list[torch.Tensor]:
    """Orthogonalise tensors, those of one shape as a batch; returns new ones of the dtypes that they have."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, direction in enumerate(directions):
        alike.setdefault((direction.shape, direction.dtype, direction.device), []).append(i)
    results = list(directions)
    for places in alike.values():
        dtype = iteration.dtype or directions[places[0]].dtype
        batch = torch.stack([directions[i].to(dtype) for i in places])
        orthogonalize_all(batch, cut, iteration)
        for i, result in zip(places, batch, strict=True):
            results[i] = result.to(directions[i].dtype)
    return results


def layouts_of(
    phase: ApplyMatrices, shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]], itemsize: int
) -> list[Layout]:
    """Divide a list into parts whose scratch and products fit: equal shapes together, in the order they first come."""
    alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for place, kind in enumerate(zip(map(tuple, shapes), strides, strict=True)):
        alike.setdefault(kind, []).append(place)
    layouts: list[Layout] = []
    left = 0
    for (shape, lie), places in alike.items():
        n_matrices, rows, columns = phase.cut.shape_of(shape)
        size = math.prod(shape)
        stride = -(-size * itemsize // _VECTOR) * _VECTOR // itemsize
        # The iteration makes a second one of each matrix, and twice its Gram matrix.
        cost = 2 * itemsize * (stride + n_matrices * min(rows, columns) ** 2)
        while places:
            n = min(len(places), left // cost)
            if n == 0:
                layouts.append(Layout([], [], np.zeros(len(shapes), np.int64), 0))
                left, n = phase.scratch_bytes, min(len(places), max(1, phase.scratch_bytes // cost))
            layout, here, places = layouts[-1], places[:n], places[n:]
            layout.at[here] = layout.size + stride * np.arange(n)
            layout.members.extend(here)
            layout.stacks.append(Stack(n, shape, lie, layout.size, stride))
            layouts[-1] = layout._replace(size=layout.size + n * stride)
            left = max(0, left - n * cost)
    return layouts


def _tables(
    shapes: Sequence[torch.Size], layout: Layout, chunk_size: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tables of a `driver.Part`."""
    rows, owners = chunk_tables([shapes[place] for place in layout.members], chunk_size)
    members = np.array(layout.members, dtype=np.int32)
    tensors = np.zeros((len(shapes), rows.shape[1]), dtype=np.int64)
    tensors[members] = rows
    return tensors, members[owners], rows, layout.at
