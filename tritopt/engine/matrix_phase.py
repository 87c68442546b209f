"""The phase of an optimizer that orthogonalises directions: launches of the driver, and products between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from tritopt.engine.driver import Apply, BoundPhase, Part, chunk_tables
from tritopt.engine.group import LaunchGroup, on_device_of
from tritopt.engine.launcher import is_launching
from tritopt.engine.matrices import Cut, orthogonalize_all
from tritopt.engine.newton_schulz import Iteration
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.tuning.config import GENERIC, adapted
from tritopt.kernels.muon import normuon_moments, normuon_read

SCRATCH_BYTES = 2**30
"""Default bound on the bytes that directions and their products take."""
_VECTOR = 16
"""Bytes to whose multiples the beginnings of tensors in the scratch are rounded up."""


class ApplyMatrices(NamedTuple):
    """A launch that writes directions to a scratch, their orthogonalisation, and a launch that moves the weights.

    They are made once for each part of the list whose scratch is at most `scratch_bytes`, or one tensor's; in each part
    one sequence of batched products for each shape of matrices. Where rows are normalised, two launches more read and
    write their second moments, which are the second state.
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
        """The launches of the driver that write the directions, and read them again."""
        return (
            Apply(self.direction, reads_weight=False, writes_weight=False, scratch="write", states=(0,)),
            Apply(self.update, reads_grad=False, reads_states=False, writes_states=False, scratch="read"),
        )

    @property
    def moment_passes(self) -> tuple[Apply, ...]:
        """The launches of the driver that read and write the second moments of rows; none if there are none."""
        if self.iteration.beta2 is None:
            return ()
        read = Apply(
            normuon_read, reads_weight=False, reads_grad=False, writes_weight=False, writes_states=False,
            scratch="write", states=(1,),
        )  # fmt: skip
        write = Apply(
            normuon_moments, reads_weight=False, reads_grad=False, writes_weight=False, scratch="read", states=(1,)
        )
        return read, write

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the update functions, in the order of the launches."""
        first, last = self.passes
        return tuple(name for one in (first, *self.moment_passes, last) for name in one.kernels)

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
        moments: list[torch.Tensor | None] = [None] * n_tasks
        prepared = []
        for group in groups:
            key = ("sharded", self, launch.preamble, launch.scalars, launch.draws, launch.tracked is not None)
            ready = group.ready((*key, launch.config, group.stream), partial(_Prepared, self, group, launch, True))
            with on_device_of(group):
                prepared.append((group, ready, ready.direct(group, launch, directions, moments)))
        if launch.record is None and is_launching():
            launch.exchange(directions, moments)
        for group, ready, scratches in prepared:
            with on_device_of(group):
                ready.update(group, launch, *scratches)


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


class _Launches(NamedTuple):
    """Launches for one part of a list, and where its tensors lie in the scratch."""

    direct: BoundPhase
    stacks: list[Stack]
    update: BoundPhase
    read: BoundPhase | None
    """Launch that reads second moments of rows; None: there are none."""
    write: BoundPhase | None
    moments: list[Stack]
    """Stacks of the moments in a scratch of theirs, beside `stacks`."""


class _Prepared:
    """The phase for one group: launches, and stacks of the scratch."""

    def __init__(self, phase: ApplyMatrices, group: LaunchGroup, launch: LaunchSpec, is_sharded: bool = False) -> None:
        self._phase = phase
        self._compute = torch.float64 if group.dtypes[0] == torch.float64 else torch.float32
        self._dtype = phase.iteration.dtype or self._compute
        if is_sharded:
            layouts = [_layout_of_shards(group.shapes, group.strides, self._dtype.itemsize)]
        else:
            layouts = layouts_of(phase, group.shapes, group.strides, self._dtype.itemsize)
        self._size = max(layout.size for layout in layouts)
        config = adapted(launch.config or launch.generic or GENERIC, group.formats, group.dtypes)
        passes = phase.passes
        launch = launch._replace(phases=passes)  # which of them tracks what goes by identity
        key = ("shards" if is_sharded else "matrices", phase.cut, phase.scratch_bytes, self._dtype, config.chunk_size)

        def part_of(layout: Layout, shapes: Sequence[torch.Size], *rest: Any) -> Part:
            build = partial(_tables, layout=layout, chunk_size=config.chunk_size)
            tables = group.tables((*key, *rest), lambda _: build(shapes))
            return Part([group.members[place] for place in layout.members], *tables)

        def bound(one: Apply, part: Part) -> BoundPhase:
            return BoundPhase(one, group, launch, 0, part)

        self._parts = []
        self._moments_size = 0
        shapes = [torch.Size(phase.cut.shape_of_moments(shape)) for shape in group.shapes]
        for i, layout in enumerate(layouts):
            first, second = (bound(one, part_of(layout, group.shapes, i)) for one in passes)
            read = write = None
            moments = _layout_of_moments(layout, shapes, self._compute.itemsize)
            if phase.moment_passes:
                read, write = (bound(one, part_of(moments, shapes, i, "moments")) for one in phase.moment_passes)
                self._moments_size = max(self._moments_size, moments.size)
            self._parts.append(_Launches(first, layout.stacks, second, read, write, moments.stacks))

    def __call__(self, group: LaunchGroup, launch: LaunchSpec) -> None:
        scratch, of_moments = self._scratches(group)
        is_made = launch.record is None and is_launching()
        for part in self._parts:
            part.direct(group, launch, None, scratch)
            if part.read is not None:
                part.read(group, launch, None, of_moments)
            if is_made:
                for stack, rows in zip(part.stacks, part.moments, strict=True):
                    moments = None if of_moments is None else rows.of(of_moments)
                    orthogonalize_all(stack.of(scratch), self._phase.cut, self._phase.iteration, moments)
            self._finish(part, group, launch, scratch, of_moments)

    def direct(
        self,
        group: LaunchGroup,
        launch: LaunchSpec,
        directions: list[torch.Tensor | None],
        moments: list[torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Launch the first passes of shards, and enter their directions and second moments."""
        scratch, of_moments = self._scratches(group)
        (part,) = self._parts
        part.direct(group, launch, None, scratch)
        for place, stack in zip(group.members, part.stacks, strict=True):
            directions[place] = stack.of(scratch)[0]
        if of_moments is not None and part.read is not None:
            part.read(group, launch, None, of_moments)
            for place, stack in zip(group.members, part.moments, strict=True):
                moments[place] = stack.of(of_moments)[0]
        return scratch, of_moments

    def update(
        self, group: LaunchGroup, launch: LaunchSpec, scratch: torch.Tensor, of_moments: torch.Tensor | None
    ) -> None:
        """Launch the last passes of shards."""
        (part,) = self._parts
        self._finish(part, group, launch, scratch, of_moments)

    def _finish(
        self,
        part: _Launches,
        group: LaunchGroup,
        launch: LaunchSpec,
        scratch: torch.Tensor,
        of_moments: torch.Tensor | None,
    ) -> None:
        if part.write is not None:
            part.write(group, launch, None, of_moments)
        part.update(group, launch, None, scratch)

    def _scratches(self, group: LaunchGroup) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Memory for directions, and for second moments of rows if there are any."""
        scratch = torch.empty(self._size, dtype=self._dtype, device=group.device)
        if self._phase.iteration.beta2 is None:
            return scratch, None
        return scratch, torch.empty(self._moments_size, dtype=self._compute, device=group.device)


def _layout_of_moments(layout: Layout, shapes: Sequence[torch.Size], itemsize: int) -> Layout:
    """Put the second moments of a part's rows into a scratch of theirs, stack by stack as the matrices."""
    stacks, at, size, members = [], np.zeros(len(shapes), np.int64), 0, iter(layout.members)
    for stack in layout.stacks:
        here = list(islice(members, stack.n))
        shape = shapes[here[0]]
        stride = -(-shape.numel() * itemsize // _VECTOR) * _VECTOR // itemsize
        at[here] = size + stride * np.arange(stack.n)
        lie = torch.empty(shape, dtype=torch.float32, device="meta").stride()
        stacks.append(Stack(stack.n, tuple(shape), lie, size, stride))
        size += stride * stack.n
    return Layout(layout.members, stacks, at, size)


def _layout_of_shards(shapes: Sequence[torch.Size], strides: Sequence[tuple[int, ...]], itemsize: int) -> Layout:
    """Put the parts of a list into one scratch, whatever matrices they are of."""
    sizes = [-(-shape.numel() * itemsize // _VECTOR) * _VECTOR // itemsize for shape in shapes]
    at = np.cumsum([0, *sizes])[:-1].astype(np.int64)
    stacks = [
        Stack(1, tuple(shape), lie, int(first), size)
        for shape, lie, first, size in zip(shapes, strides, at, sizes, strict=True)
    ]
    return Layout(list(range(len(shapes))), stacks, at, sum(sizes))


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
