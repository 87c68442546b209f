"""Matrices that are sharded over processes: gathered, orthogonalised once by one of them, and handed back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist

from tritopt.engine.matrices import Cut, orthogonalize_all
from tritopt.engine.newton_schulz import Iteration
from tritopt.optim.distributed import is_dtensor, local, placements_for

UNIT = 2**24
"""Largest number of elements of matrices that are a batch, unless one tensor has more: an eighth of what one process
would take at a time."""
Slices: TypeAlias = tuple[slice, ...]
Shape: TypeAlias = tuple[int, ...]
Values: TypeAlias = Sequence[torch.Tensor | None]


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
    come back. Of replicas one sends its pieces, and all get the result. Second moments of rows go the same way, in two
    more.

    Args:
        params: the parameters, the same list in every process. Those that are no DTensors are this process's own.
        cut, iteration: of their rule.

    Raises:
        ValueError: a placement of which it is not known who has what.
    """

    def __init__(self, params: Sequence[torch.Tensor], cut: Cut, iteration: Iteration) -> None:
        self._cut, self._iteration = cut, iteration
        self._own = [i for i, param in enumerate(params) if not is_dtensor(param)]
        by_mesh: dict[Any, list[int]] = {}
        for i, param in enumerate(params):
            if is_dtensor(param):
                by_mesh.setdefault(param.device_mesh, []).append(i)
        self._meshes = [_Sharing(mesh, members, params, cut) for mesh, members in by_mesh.items()]

    def __call__(self, directions: Values, moments: Values) -> None:
        """Orthogonalise in place.

        directions: direction of each parameter's local part; None where that is empty. moments: second moments of its
        rows, where the iteration normalises them; see `normalize_rows`.
        """
        for i in self._own:
            direction, of_rows = directions[i], moments[i]
            if direction is not None:
                orthogonalize_all(
                    direction[None], self._cut, self._iteration, None if of_rows is None else of_rows[None]
                )
        for mesh in self._meshes:
            self._share(mesh, directions, moments)

    def _share(self, mesh: _Sharing, directions: Values, moments: Values) -> None:
        compute = next((x.dtype for x in (*moments, *directions) if x is not None), torch.float32)
        wholes = mesh.gathered(mesh.directions, directions, self._iteration.dtype or compute)
        has_moments = self._iteration.beta2 is not None
        of_rows = mesh.gathered(mesh.moments, moments, compute) if has_moments else {}
        for unit in mesh.units:
            if unit.owner == mesh.rank:
                batch = torch.stack([wholes[i] for i in unit.members])
                rows = torch.stack([of_rows[i] for i in unit.members]) if has_moments else None
                orthogonalize_all(batch, self._cut, self._iteration, rows)
                wholes.update(zip(unit.members, batch, strict=True))
                if rows is not None:
                    of_rows.update(zip(unit.members, rows, strict=True))
        mesh.hand_back(mesh.directions, wholes, directions, self._iteration.dtype or compute)
        if has_moments:
            mesh.hand_back(mesh.moments, of_rows, moments, compute)


class _Places:
    """Slices of tensors that each process has, and which of those that have the same sends them.

    Args:
        tensors: shape and placements of each tensor, by its number.
        mesh: their mesh.
        coordinates: those of each process in it.
    """

    def __init__(self, tensors: Mapping[int, tuple[Shape, Any]], mesh: Any, coordinates: Sequence[Sequence[int]]):
        self.shapes = {i: shape for i, (shape, _) in tensors.items()}
        self.slices: dict[int, list[Slices]] = {
            i: [_slices(shape, placements, mesh, at) for at in coordinates]
            for i, (shape, placements) in tensors.items()
        }
        self._senders = {i: [_first_equal(slices, r) for r in range(len(slices))] for i, slices in self.slices.items()}

    def sends(self, i: int, rank: int) -> bool:
        """Whether no earlier process has what this one has of a tensor."""
        return self._senders[i][rank] == rank

    def numel(self, i: int, rank: int) -> int:
        """Elements that a process has of a tensor."""
        return math.prod(self.shape(i, rank))

    def shape(self, i: int, rank: int) -> Shape:
        """Shape of what a process has of a tensor."""
        return tuple(s.stop - s.start for s in self.slices[i][rank])


class _Sharing:
    """Shares of the parameters on one mesh: which process has what of them, and which one orthogonalises what."""

    def __init__(self, mesh: Any, members: Sequence[int], params: Sequence[torch.Tensor], cut: Cut) -> None:
        self.device = local(params[members[0]]).device
        of_mesh: dict[int, Any] = {i: params[i] for i in members}
        self._group = _group_of(mesh, list(of_mesh.values()))
        ranks = dist.get_process_group_ranks(self._group)
        self.rank, self.size = dist.get_rank(self._group), len(ranks)
        coordinates = [_coordinate(mesh, rank) for rank in ranks]
        self.directions = _Places(
            {i: (tuple(param.shape), param.placements) for i, param in of_mesh.items()}, mesh, coordinates
        )
        rows = {i: cut.shape_of_moments(param.shape) for i, param in of_mesh.items()}
        self.moments = _Places(
            {i: (rows[i], placements_for(param, rows[i])) for i, param in of_mesh.items()}, mesh, coordinates
        )
        for i, param in of_mesh.items():
            here = self.directions.shape(i, self.rank)
            if here != tuple(local(param).shape):
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} is placed as {param.placements}, and it is not known "
                    f"who has what: expected a shard of shape {here}, got {tuple(local(param).shape)}; shard it by "
                    "Shard placements alone"
                )
        self.units = list(_units(members, [tuple(param.shape) for param in params], cut, self.size))
        self._members_of = [
            [i for unit in self.units if unit.owner == r for i in unit.members] for r in range(self.size)
        ]

    def gathered(self, places: _Places, values: Values, dtype: torch.dtype) -> dict[int, torch.Tensor]:
        """Whole tensors of the matrices that this process orthogonalises, of which each process sends what it has."""

        def piece(i: int) -> torch.Tensor:
            value = values[i]
            return torch.empty(0, dtype=dtype, device=self.device) if value is None else value.to(dtype).reshape(-1)

        own = self._members_of[self.rank]
        sent = [[piece(i) for i in of_owner if places.sends(i, self.rank)] for of_owner in self._members_of]
        sizes = [[places.numel(i, r) for i in own if places.sends(i, r)] for r in range(self.size)]
        received = self._all_to_all(sent, [sum(of_rank) for of_rank in sizes], dtype)
        wholes = {i: torch.empty(places.shapes[i], dtype=dtype, device=self.device) for i in own}
        for r in range(self.size):
            pieces = iter(received[r].split(sizes[r]))
            for i in own:
                if places.sends(i, r):
                    part = wholes[i][places.slices[i][r]]
                    part.copy_(next(pieces).view(part.shape))
        return wholes

    def hand_back(
        self, places: _Places, wholes: Mapping[int, torch.Tensor], values: Values, dtype: torch.dtype
    ) -> None:
        """Write to each process's values what the owners have of them, replicas too."""
        own = self._members_of[self.rank]
        sent = [[wholes[i][places.slices[i][r]].reshape(-1) for i in own] for r in range(self.size)]
        sizes = [[places.numel(i, self.rank) for i in of_owner] for of_owner in self._members_of]
        received = self._all_to_all(sent, [sum(of_owner) for of_owner in sizes], dtype)
        for members, back, of_owner in zip(self._members_of, received, sizes, strict=True):
            for i, result in zip(members, back.split(of_owner), strict=True):
                value = values[i]
                if value is not None:
                    value.copy_(result.view(value.shape))

    def _all_to_all(
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


def _slices(shape: Shape, placements: Any, mesh: Any, coordinate: Sequence[int]) -> Slices:
    """Slices that the process at a coordinate has: each placement cuts in equal chunks what those before it left."""
    bounds = [(0, n) for n in shape]
    placed = [(i, placement) for i, placement in enumerate(placements) if not placement.is_replicate()]
    # A strided shard is cut after the others, though it stands before them: FSDP of what TP has cut.
    for i, placement in sorted(placed, key=lambda one: type(one[1]).__name__ == "_StridedShard"):
        start, stop = bounds[placement.dim]
        chunk = -(-(stop - start) // mesh.size(i))
        first = min(start + chunk * coordinate[i], stop)
        bounds[placement.dim] = first, min(first + chunk, stop)
    return tuple(slice(*one) for one in bounds)


def _first_equal(slices: Sequence[Slices], rank: int) -> int:
    return next(r for r, other in enumerate(slices) if other == slices[rank])
