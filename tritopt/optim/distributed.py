"""What differs for DTensors: their local parts, and sums over the processes that share a tensor."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor; itself unless it is a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def aligned(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient, laid out over the processes as the weight is: a pending sum is carried out."""
    if isinstance(grad, DTensor) and isinstance(weight, DTensor) and grad.placements != weight.placements:
        return grad.redistribute(weight.device_mesh, weight.placements)
    return grad


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether other processes hold other elements of it."""
    return isinstance(tensor, DTensor) and any(not p.is_replicate() for p in tensor.placements)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(param: torch.Tensor, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A state made for the local part of a parameter, laid out over the processes as that is. `shape`: of the whole."""
    if not isinstance(param, DTensor):
        return value
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        value, param.device_mesh, placements_for(param, shape), run_check=False, shape=torch.Size(shape), stride=strides
    )


def placements_for(param: DTensor, shape: tuple[int, ...]) -> list[Placement]:
    """Of a state of this shape: as the parameter along dimensions that are as long, replicated elsewhere."""
    return [
        Replicate()
        if isinstance(placement, Shard)
        and (len(shape) != param.dim() or shape[placement.dim] != param.shape[placement.dim])
        else placement
        for placement in param.placements
    ]


def key_of_shard(name: Hashable, param: torch.Tensor) -> Hashable:
    """A name for random numbers: replicas draw the same, shards others."""
    if not isinstance(param, DTensor) or not is_sharded(param):
        return name
    coordinate = param.device_mesh.get_coordinate()
    placed = zip(coordinate or (), param.placements, strict=True)
    return (name, *[x for x, placement in placed if not placement.is_replicate()])


class ShardSums:
    """Completes per-tensor sums over the processes: one all-reduce of one vector per mesh dimension, for all tensors.

    A replicated tensor is whole in every process and not summed again.

    Args:
        tensors: the parameters, in the order of the rows of the sums; the same in every process.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.device = local(tensors[0]).device if tensors else torch.device("cpu")
        rows: dict[dist.ProcessGroup, list[int]] = {}
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, DTensor):
                for dim, placement in enumerate(tensor.placements):
                    if not placement.is_replicate():
                        rows.setdefault(tensor.device_mesh.get_group(dim), []).append(i)
        self._rows = [(group, torch.tensor(found, device=self.device)) for group, found in rows.items()]

    def __bool__(self) -> bool:
        """Whether there is anything to complete."""
        return bool(self._rows)

    def __call__(self, sums: torch.Tensor) -> None:
        """In place: fp64 [tensors, sums]."""
        for group, rows in self._rows:
            part = sums.index_select(0, rows)
            dist.all_reduce(part, group=group)
            sums.index_copy_(0, rows, part)
