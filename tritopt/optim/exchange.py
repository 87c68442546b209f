"""Matrices that are sharded over processes: gathered, orthogonalised once by one of them, and handed back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist

from tritopt.engine.matrices import Cut, orthogonalize_all
from tritopt.engine.newton_schulz import Iteration
from tritopt.optim.distributed import is_dtensor, local, placements_for

UNIT = 2**24
"""Largest number of elements of matrices that are a batch, unless one tensor has more: an eighth of what one process
would take at a time."""
Shape: TypeAlias = tuple[int, ...]
Values: TypeAlias = Sequence[torch.Tensor | None]


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
        by_mesh: dict[Any, list[int]] = {}
        for i, param in enumerate(params):
            by_mesh.setdefault(param.device_mesh if is_dtensor(param) else None, []).append(i)
        self._own = by_mesh.pop(None, [])
        has_rows = iteration.beta2 is not None
        self._meshes = [_Sharing(mesh, members, params, cut, has_rows) for mesh, members in by_mesh.items()]

    def __call__(self, directions: Values, moments: Values) -> None:
        """Orthogonalise in place.

        directions: direction of each parameter's local part; None where that is empty. moments: second moments of its
        rows, where the iteration normalises them; see `normalize_rows`.
        """
        values = [directions] if self._iteration.beta2 is None else [directions, moments]
        for i in self._own:
            batches = [x[None] for each in values if (x := each[i]) is not None]
            if directions[i] is not None:
                orthogonalize_all(batches[0], self._cut, self._iteration, *batches[1:])
        for mesh in self._meshes:
            dtypes = self._iteration.dtype or mesh.compute, mesh.compute
            sent = list(zip(mesh.shares, values, dtypes, strict=False))
            wholes = [mesh.gathered(*each) for each in sent]
            for members in mesh.batches_of[mesh.rank]:
                batches = [torch.stack([whole[i] for i in members]) for whole in wholes]
                orthogonalize_all(batches[0], self._cut, self._iteration, *batches[1:])
                for whole, batch in zip(wholes, batches, strict=True):
                    whole.update(zip(members, batch, strict=True))
            for each, whole in zip(sent, wholes, strict=True):
                mesh.hand_back(*each, whole)


class _Shares(NamedTuple):
    """Parts of a tensor that the processes have."""

    shape: Shape
    """Shape of the whole."""
    slices: list[tuple[slice, ...]]
    """Part of each process."""
    is_sent: list[bool]
    """Whether no earlier process has the same part."""


ByPlace: TypeAlias = Mapping[int, _Shares]


class _Sharing:
    """Parameters on one mesh: which process has what of them, and orthogonalises what."""

    def __init__(self, mesh: Any, members: Sequence[int], params: Sequence[Any], cut: Cut, has_rows: bool) -> None:
        # Of the parameters: a process whose shards are all empty has no direction whose dtype could tell.
        self.compute = reduce(torch.promote_types, [params[i].dtype for i in members], torch.float32)
        self._device, self._group = local(params[members[0]]).device, _group_of(mesh, [params[i] for i in members])
        self.rank, ranks = dist.get_rank(self._group), dist.get_process_group_ranks(self._group)
        coordinates = [(mesh.mesh == rank).nonzero()[0].tolist() for rank in ranks]
        directions, moments = {}, {}
        for i in members:
            shape, placements, here = tuple(params[i].shape), params[i].placements, tuple(local(params[i]).shape)
            directions[i] = _shares_of(shape, placements, mesh, coordinates)
            rows = cut.shape_of_moments(shape)
            moments[i] = _shares_of(rows, placements_for(params[i], rows), mesh, coordinates)
            expected = tuple(s.stop - s.start for s in directions[i].slices[self.rank])
            if expected != here:
                raise ValueError(
                    f"a parameter of shape {shape} is placed as {placements}, and it is not known who has what: "
                    f"expected a shard of shape {expected}, got {here}; shard it by Shard placements alone"
                )
            if has_rows and rows == shape and any(part[-1].start == part[-1].stop for part in directions[i].slices):
                raise ValueError(f"beta2 and {placements} of shape {shape}, one column: replicate it or shard its rows")
        self.shares = directions, moments
        self.batches_of = _batches_of({i: directions[i].shape for i in members}, cut, len(ranks))
        self._members_of = [list(chain(*batches)) for batches in self.batches_of]

    def gathered(self, shares: ByPlace, values: Values, dtype: torch.dtype) -> dict[int, torch.Tensor]:
        """Whole tensors of the matrices that this process orthogonalises, of which each process sends what it has."""
        own = self._members_of[self.rank]
        wholes = {i: torch.empty(shares[i].shape, dtype=dtype, device=self._device) for i in own}
        sent = [[values[i] for i in members if shares[i].is_sent[self.rank]] for members in self._members_of]
        parts = [[wholes[i][shares[i].slices[r]] for i in own if shares[i].is_sent[r]] for r in range(len(sent))]
        self._all_to_all(sent, parts, dtype)
        return wholes

    def hand_back(
        self, shares: ByPlace, values: Values, dtype: torch.dtype, wholes: Mapping[int, torch.Tensor]
    ) -> None:
        """Write to each process's values what the owners have of them, replicas too."""
        received = [[values[i] for i in members] for members in self._members_of]
        own = self._members_of[self.rank]
        sent = [[wholes[i][shares[i].slices[r]] for i in own] for r in range(len(received))]
        self._all_to_all(sent, received, dtype)

    def _all_to_all(self, sent: Sequence[Values], received: Sequence[Values], dtype: torch.dtype) -> None:
        """Send to each process its tensors, and write to those that each sends; None is one without elements."""
        out, back = ([[x for x in of_rank if x is not None] for of_rank in each] for each in (sent, received))
        n_out, n_back = ([dtype.itemsize * sum(x.numel() for x in of_rank) for of_rank in each] for each in (out, back))
        nothing = torch.empty(0, dtype=dtype, device=self._device)
        flat = torch.cat([nothing, *(x.to(dtype).reshape(-1) for x in chain(*out))])
        buffer = nothing.new_empty(sum(n_back) // dtype.itemsize)
        # As bytes, which every backend sends.
        dist.all_to_all_single(buffer.view(torch.uint8), flat.view(torch.uint8), n_back, n_out, group=self._group)
        for x, values in zip(chain(*back), buffer.split([x.numel() for x in chain(*back)]), strict=True):
            x.copy_(values.view(x.shape))


def _batches_of(shapes: Mapping[int, Shape], cut: Cut, n_ranks: int) -> list[list[list[int]]]:
    """Batches of equal shapes that each process orthogonalises: the costliest first to whoever has least to do."""
    alike: dict[Shape, list[int]] = {}
    for i, shape in shapes.items():
        alike.setdefault(shape, []).append(i)
    batches = []
    for shape, places in alike.items():
        n_matrices, rows, columns = cut.shape_of(shape)
        n = max(1, UNIT // max(1, math.prod(shape)))
        cost = n_matrices * rows * columns * min(rows, columns)
        batches += [(cost * len(places[at : at + n]), places[at : at + n]) for at in range(0, len(places), n)]
    loads = [0] * n_ranks
    of_rank: list[list[list[int]]] = [[] for _ in loads]
    for cost, places in sorted(batches, key=lambda batch: -batch[0]):
        owner = loads.index(min(loads))
        loads[owner] += cost
        of_rank[owner].append(places)
    return of_rank


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


def _shares_of(shape: Shape, placements: Any, mesh: Any, coordinates: Sequence[Sequence[int]]) -> _Shares:
    """Shares of the processes at these coordinates: each placement cuts in equal chunks what those before it left."""
    placed = [(dim, placement) for dim, placement in enumerate(placements) if not placement.is_replicate()]
    # A strided shard is cut after the others, though it stands before them: FSDP of what TP has cut.
    placed.sort(key=lambda each: type(each[1]).__name__ == "_StridedShard")
    parts: list[tuple[slice, ...]] = []
    first: dict[Any, int] = {}
    for rank, coordinate in enumerate(coordinates):
        bounds = [(0, n) for n in shape]
        for dim, placement in placed:
            start, stop = bounds[placement.dim]
            chunk = -(-(stop - start) // mesh.size(dim))
            start = min(start + chunk * coordinate[dim], stop)
            bounds[placement.dim] = start, min(start + chunk, stop)
        parts.append(tuple(slice(*each) for each in bounds))
        first.setdefault(tuple(bounds), rank)
    senders = set(first.values())
    return _Shares(shape, parts, [rank in senders for rank in range(len(parts))])
