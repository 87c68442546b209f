"""Matrices that are sharded over processes: gathered, orthogonalised once by one of them, and handed back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist

from tritopt.engine.matrix_phase import orthogonalize_all
from tritopt.engine.newton_schulz import Cut, Iteration
from tritopt.optim.distributed import is_dtensor, local

UNIT = 2**24
"""Largest number of elements of matrices that are a batch, unless one tensor has more: an eighth of what one process
would take at a time."""
Slices: TypeAlias = tuple[slice, ...]


class Unit(NamedTuple):
    """Tensors of one shape that one process orthogonalises as a batch."""

    members: list[int]
    """Places of the tensors among the parameters."""
    owner: int
    """Rank of that process in the process group."""


class Exchange:
    """Orthogonalises the directions of a list of parameters, each process having those of its own shards.

    Batches are made of shapes alone, so that results are the same bits on any number of processes. Work is shared over
    all of them by its cost, largest batches first. Two all-to-alls a step: pieces go to the owner of their matrix, and
    come back. Of replicas one sends its pieces, and all get the result.

    Args:
        params: the parameters, the same list in every process. Those that are no DTensors are this process's own.
        cut, iteration: of their rule.

    Raises:
        ValueError: a placement of which it is not known who has what.
    """

    def __init__(self, params: Sequence[torch.Tensor], cut: Cut, iteration: Iteration) -> None:
        self._cut, self._iteration = cut, iteration
        self._shapes = [tuple(param.shape) for param in params]
        self._own = [i for i, param in enumerate(params) if not is_dtensor(param)]
        by_mesh: dict[Any, list[int]] = {}
        for i, param in enumerate(params):
            if is_dtensor(param):
                by_mesh.setdefault(param.device_mesh, []).append(i)
        self._meshes = [_Sharing(mesh, members, params, cut) for mesh, members in by_mesh.items()]

    def __call__(self, directions: Sequence[torch.Tensor | None]) -> None:
        """Orthogonalise in place. directions: direction of each parameter's local part; None where that is empty."""
        for i in self._own:
            direction = directions[i]
            if direction is not None:
                orthogonalize_all(direction[None], self._cut, self._iteration)
        for mesh in self._meshes:
            self._share(mesh, directions)

    def _share(self, mesh: _Sharing, directions: Sequence[torch.Tensor | None]) -> None:
        like = next((x for x in directions if x is not None), None)
        dtype = self._iteration.dtype or (torch.float32 if like is None else like.dtype)
        device = mesh.device
        rank, size = mesh.rank, mesh.size

        def piece(i: int) -> torch.Tensor:
            direction = directions[i]
            if direction is None:
                return torch.empty(0, dtype=dtype, device=device)
            return direction.to(dtype).reshape(-1)

        # To the owners: pieces that no earlier replica sends.
        sent = [[piece(i) for i in mesh.members_of(owner) if mesh.sender(i, rank) == rank] for owner in range(size)]
        sizes = [sum(mesh.numel(i, r) for i in mesh.members_of(rank) if mesh.sender(i, r) == r) for r in range(size)]
        received = mesh.all_to_all(sent, sizes, dtype)
        wholes = {i: torch.empty(self._shapes[i], dtype=dtype, device=device) for i in mesh.members_of(rank)}
        for r in range(size):
            pieces = iter(
                received[r].split([mesh.numel(i, r) for i in mesh.members_of(rank) if mesh.sender(i, r) == r])
            )
            for i in mesh.members_of(rank):
                if mesh.sender(i, r) == r:
                    part = wholes[i][mesh.slices[i][r]]
                    part.copy_(next(pieces).view(part.shape))
        for unit in mesh.units:
            if unit.owner == rank:
                batch = torch.stack([wholes[i] for i in unit.members])
                orthogonalize_all(batch, self._cut, self._iteration)
                wholes.update(zip(unit.members, batch, strict=True))
        # And back, to replicas too.
        sent = [[wholes[i][mesh.slices[i][r]].reshape(-1) for i in mesh.members_of(rank)] for r in range(size)]
        sizes = [sum(mesh.numel(i, rank) for i in mesh.members_of(owner)) for owner in range(size)]
        for owner, back in enumerate(mesh.all_to_all(sent, sizes, dtype)):
            members = mesh.members_of(owner)
            for i, result in zip(members, back.split([mesh.numel(i, rank) for i in members]), strict=True):
                direction = directions[i]
                if direction is not None:
                    direction.copy_(result.view(direction.shape))


class _Sharing:
    """Shares of the parameters on one mesh: which process has what of them, and which one orthogonalises what."""

    def __init__(self, mesh: Any, members: Sequence[int], params: Sequence[torch.Tensor], cut: Cut) -> None:
        self.device = local(params[members[0]]).device
        self._group = _group_of(mesh, [params[i] for i in members])
        ranks = dist.get_process_group_ranks(self._group)
        self.rank, self.size = dist.get_rank(self._group), len(ranks)
        coordinates = [_coordinate(mesh, rank) for rank in ranks]
        self.slices: dict[int, list[Slices]] = {}
        """Slices of each parameter that each process has."""
        self._senders: dict[int, list[int]] = {}
        for i in members:
            param: Any = params[i]
            slices = [_slices(param, mesh, at) for at in coordinates]
            here = tuple(s.stop - s.start for s in slices[self.rank])
            if here != tuple(local(param).shape):
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} is placed as {param.placements}, and it is not known "
                    f"who has what: expected a shard of shape {here}, got {tuple(local(param).shape)}; shard it by "
                    "Shard placements alone"
                )
            self.slices[i] = slices
            self._senders[i] = [_first_equal(slices, r) for r in range(self.size)]
        self.units = list(_units(members, [tuple(param.shape) for param in params], cut, self.size))
        self._members_of = [
            [i for unit in self.units if unit.owner == r for i in unit.members] for r in range(self.size)
        ]

    def members_of(self, owner: int) -> list[int]:
        """Parameters that a process orthogonalises."""
        return self._members_of[owner]

    def sender(self, i: int, rank: int) -> int:
        """The first process that has what this one has of a parameter."""
        return self._senders[i][rank]

    def numel(self, i: int, rank: int) -> int:
        """Elements that a process has of a parameter."""
        return math.prod(s.stop - s.start for s in self.slices[i][rank])

    def all_to_all(
        self, sent: Sequence[Sequence[torch.Tensor]], sizes: Sequence[int], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Send to each process its elements; return what came from each. As bytes, which every backend sends."""
        flat = [torch.cat([torch.empty(0, dtype=dtype, device=self.device), *pieces]) for pieces in sent]
        width = dtype.itemsize
        out = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        dist.all_to_all_single(
            out.view(torch.uint8),
            torch.cat(flat).view(torch.uint8),
            [n * width for n in sizes],
            [part.numel() * width for part in flat],
            group=self._group,
        )
        return list(out.split(list(sizes)))


def _units(members: Sequence[int], shapes: Sequence[tuple[int, ...]], cut: Cut, n_ranks: int) -> Iterator[Unit]:
    """Batches of equal shapes, the costliest first to whoever has least to do."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i in members:
        alike.setdefault(shapes[i], []).append(i)
    batches = []
    for shape, places in alike.items():
        n_matrices, rows, columns = cut.shape_of(shape)
        n = max(1, UNIT // max(1, math.prod(shape)))
        cost = n_matrices * rows * columns * min(rows, columns)
        batches += [(cost * len(places[at : at + n]), places[at : at + n]) for at in range(0, len(places), n)]
    loads = [0] * n_ranks
    for cost, places in sorted(batches, key=lambda batch: -batch[0]):
        owner = loads.index(min(loads))
        loads[owner] += cost
        yield Unit(places, owner)


def _group_of(mesh: Any, params: Sequence[Any]) -> Any:
    """The process group that shares the work: of all the mesh, or of the one dimension that is sharded."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    sharded = {dim for param in params for dim, placed in enumerate(param.placements) if not placed.is_replicate()}
    if len(sharded) > 1:
        raise ValueError(
            "Muon's matrices are sharded over two dimensions of a mesh that is not all processes: make the mesh of all "
            "of them, or shard over one dimension"
        )
    return mesh.get_group(min(sharded, default=0))


def _coordinate(mesh: Any, rank: int) -> list[int]:
    return list((mesh.mesh == rank).nonzero()[0].tolist())


def _slices(param: Any, mesh: Any, coordinate: Sequence[int]) -> Slices:
    """Slices that the process at a coordinate has: each placement cuts in equal chunks what those before it left."""
    bounds = [(0, n) for n in param.shape]
    placed = [(i, placement) for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    # A strided shard is cut after the others, though it stands before them: FSDP of what TP has cut.
    for i, placement in sorted(placed, key=lambda one: type(one[1]).__name__ == "_StridedShard"):
        start, stop = bounds[placement.dim]
        chunk = -(-(stop - start) // mesh.size(i))
        first = min(start + chunk * coordinate[i], stop)
        bounds[placement.dim] = first, min(first + chunk, stop)
    return tuple(slice(*one) for one in bounds)


def _first_equal(slices: Sequence[Slices], rank: int) -> int:
    return next(r for r, other in enumerate(slices) if other == slices[rank])
