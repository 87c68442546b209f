"""Treatment of DTensors: their local parts, and sums over the processes that share a tensor."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist

from tritopt.engine import private
from tritopt.engine.random_keys import noise_key

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

    from tritopt.kernels.formats.format import Format


_PLAIN = {torch.Tensor, torch.nn.Parameter}


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is spread over processes by torch.distributed.tensor."""
    if type(tensor) in _PLAIN:  # asked many times a parameter
        return False
    # Whoever made one has imported the module, which a torch built without torch.distributed does not have.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Part of a tensor that this process holds; the tensor itself unless it is a DTensor."""
    if not is_dtensor(tensor):
        return tensor
    # For a parameter, to_local makes a view through the dispatcher: 1.3 us to the attribute's 0.01 us, several times a
    # step for each parameter. Without autograd the two are the same memory.
    part: Any = tensor.to_local() if torch.is_grad_enabled() else private.local_tensor(tensor)
    return part if type(part) is torch.Tensor else private.awaited(part)


def aligned(grad: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """The gradient, laid out over the processes as the parameter is: a pending sum is carried out.

    Raises:
        TypeError: one is a DTensor and the other is not.
    """
    if is_dtensor(grad) and is_dtensor(param):
        if grad.placements == param.placements:
            return grad
        return grad.redistribute(param.device_mesh, param.placements)
    if is_dtensor(grad) or is_dtensor(param):
        said = [f"a {'DTensor' if is_dtensor(t) else 'plain tensor'} of shape {tuple(t.shape)}" for t in (grad, param)]
        raise TypeError(
            f"the gradient is {said[0]}, its parameter {said[1]}: give a DTensor parameter a gradient made by "
            "distribute_tensor or DTensor.from_local on the parameter's device_mesh, and a plain one grad.full_tensor()"
        )
    return grad


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether other processes hold other elements of it."""
    return is_dtensor(tensor) and any(not p.is_replicate() for p in tensor.placements)


def has_whole_rows(tensor: torch.Tensor) -> bool:
    """Whether each row, all elements of one index along the first dimension, lies in one process."""
    return not is_dtensor(tensor) or all(p.is_replicate() or _dim_of(p) == 0 for p in tensor.placements)


LONG = 2**15
"""Number of elements from which a tensor without rows of whole blocks is stored in blocks, too. Shorter ones, norms and
biases, are next to nothing of a model."""


def takes_blocks(param: torch.Tensor, block: int) -> bool:
    """Whether runs of so many elements may share a number: each run must lie in one process.

    The answer for a matrix does not depend on the number of processes, so that checkpoint keys agree after resharding.
    1-D tensors are the exception: where they are split, their length must be a multiple of block times the parts.
    """
    row = param.shape[1:].numel() if param.dim() > 1 else 1
    n_parts = [1, 1]
    if is_dtensor(param) and is_sharded(param):
        for size, placement in zip(param.device_mesh.shape, param.placements, strict=True):
            dim = _dim_of(placement)
            if placement.is_partial() or (dim is not None and dim > 1):
                return False
            if dim is not None:
                n_parts[dim] *= size
        if param.dim() == 1:
            return param.numel() >= LONG and param.numel() % (n_parts[0] * block) == 0
        return param.shape[1] % n_parts[1] == 0 and row % (n_parts[1] * block) == 0
    return row % block == 0 or param.numel() >= LONG


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered in every process."""
    if not is_dtensor(tensor):
        return tensor
    if tensor.dtype == torch.int16:  # which is not sent
        sent: Any = seen_as(tensor, torch.float16)
        return seen_as(sent.full_tensor(), torch.int16)
    return tensor.full_tensor()


def like(param: torch.Tensor, value: torch.Tensor, shape: tuple[int, ...], per_block: bool = False) -> torch.Tensor:
    """A state made for the local part of a parameter, laid out over the processes as that is.

    shape: that of the whole. per_block: whether it has a number for each run of elements, and is split as they are.
    """
    if not is_dtensor(param):
        return value
    from torch.distributed.tensor import DTensor

    usual = torch.empty(shape, dtype=param.dtype, device="meta").stride()
    strides = param.stride() if shape == tuple(param.shape) else usual
    return DTensor.from_local(
        value,
        param.device_mesh,
        placements_for(param, shape, per_block),
        run_check=False,
        shape=torch.Size(shape),
        stride=strides,
    )


def laid_out(param: torch.Tensor, value: torch.Tensor, per_block: bool = False) -> torch.Tensor:
    """A state made for the whole parameter, the same in every process, laid out as the parameter is: nothing is sent.

    A value that is laid out already is moved if its layout is another.
    """
    if not is_dtensor(param):
        return whole(value)
    from torch.distributed.tensor import DTensor, Replicate

    placements = placements_for(param, tuple(value.shape), per_block)
    if is_dtensor(value):
        if value.dtype == torch.int16:  # which is not sent
            moved: Any = seen_as(value, torch.float16)
            return seen_as(moved.redistribute(param.device_mesh, placements), torch.int16)
        return value.redistribute(param.device_mesh, placements)
    everywhere = DTensor.from_local(value, param.device_mesh, [Replicate()] * param.device_mesh.ndim, run_check=False)
    # A shard is a view at first, which would keep the whole tensor in memory.
    return everywhere.redistribute(placements=placements).clone(memory_format=torch.contiguous_format)


def seen_as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same memory, its bits as those of another dtype of that size."""
    if not is_dtensor(tensor):
        return tensor.detach().view(dtype)
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local(tensor).detach().view(dtype),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def encode(fmt: Format, planes: Sequence[torch.Tensor], value: torch.Tensor, noise: Any) -> None:
    """Store a value in the planes of a format, each process in its own part.

    DTensor's own copy_ takes neither every layout nor bits that are seen as those of another dtype.
    """
    first = planes[0]
    if is_dtensor(first):
        if is_dtensor(value) and value.placements != first.placements:
            value = value.redistribute(first.device_mesh, first.placements)
        planes, value = list(map(local, planes)), local(value)
    fmt.encode(planes, value, noise)


def placements_for(param: DTensor, shape: tuple[int, ...], per_block: bool = False) -> list[Placement]:
    """Placements of a state of this shape: the parameter's along dimensions that are as long, replicated elsewhere.

    per_block: whether it has a number for each run of elements, and is placed like the parameter.
    """
    if per_block:
        return list(param.placements)
    from torch.distributed.tensor import Replicate

    def fits(dim: int) -> bool:
        return len(shape) == param.dim() and shape[dim] == param.shape[dim]

    dims = [(placement, _dim_of(placement)) for placement in param.placements]
    return [placement if dim is None or fits(dim) else Replicate() for placement, dim in dims]


def _dim_of(placement: Placement) -> int | None:
    """The dimension that is split, in whatever manner; None if none is."""
    return getattr(placement, "dim", None)


def key_of_shard(name: Hashable, param: torch.Tensor) -> Hashable:
    """A name for random numbers: replicas draw the same, shards others."""
    if not is_dtensor(param) or not is_sharded(param):
        return name
    coordinate = param.device_mesh.get_coordinate()
    placed = zip(coordinate or (), param.placements, strict=True)
    return (name, *[x for x, placement in placed if not placement.is_replicate()])


def noise_of(seed: int, name: Hashable, param: torch.Tensor) -> tuple[int, int, int, int]:
    """Key, first position, width and gap of the random bits of what is here of a parameter: fields of `Noise`.

    Elements have their positions in the whole parameter, so the bits do not depend on how it is split; but where two
    dimensions after the first are, or a part does not lie in the usual order, each shard draws its own.
    """
    place = _place(param)
    if place is None:
        return noise_key(seed, key_of_shard(name, param)), 0, 0, 0
    return noise_key(seed, name), *place


def _place(param: torch.Tensor) -> tuple[int, int, int] | None:
    """First position, width and gap of the local part; None where that does not describe it."""
    if not is_dtensor(param) or not is_sharded(param) or local(param).numel() == 0:
        return 0, 0, 0
    split = {dim for placement in param.placements if (dim := _dim_of(placement))}
    if len(split) > 1 or not local(param).is_contiguous():
        return None
    shape, offset = private.shape_and_offset(param)
    first = int(offset[0]) * param.shape[1:].numel()
    if not split:
        return first, 0, 0
    (dim,) = split
    inner = param.shape[dim + 1 :].numel()
    return first + int(offset[dim]) * inner, shape[dim] * inner, (param.shape[dim] - shape[dim]) * inner


def mark_written(params: Iterable[torch.Tensor]) -> None:
    """Tell autograd that the local parts of DTensors were written to, which their own version counters do not see."""
    torch.autograd.graph.increment_version([param for param in params if is_dtensor(param)])


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
            if is_dtensor(tensor):
                for dim, placement in enumerate(tensor.placements):
                    if not placement.is_replicate():
                        rows.setdefault(tensor.device_mesh.get_group(dim), []).append(i)
        self._rows = [
            (
                group,
                None if len(places) == len(tensors) else torch.tensor(places, dtype=torch.int64, device=self.device),
            )
            for group, places in rows.items()
        ]

    def __bool__(self) -> bool:
        """Whether there is anything to complete."""
        return bool(self._rows)

    def __call__(self, sums: torch.Tensor) -> None:
        """Add up in place over the processes: fp64 [tensors, sums]."""
        for group, rows in self._rows:
            part = sums if rows is None else sums.index_select(0, rows)
            dist.all_reduce(part, group=group)
            if rows is not None:
                sums.index_copy_(0, rows, part)
