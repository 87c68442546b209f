"""What an optimizer costs: bytes per parameter that a step moves, and that stay in memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tritopt import registry
from tritopt.kernels.formats import MASTER_FP32, PLAIN, SPLIT16, Format
from tritopt.optimizer import Optimizer, State

PRECISIONS: dict[str, tuple[torch.dtype, Format]] = {
    "fp32": (torch.float32, PLAIN),
    "bf16 + fp32 master": (torch.bfloat16, MASTER_FP32),
    "bf16 + 16-bit remainder": (torch.bfloat16, SPLIT16),
    "bf16": (torch.bfloat16, PLAIN),
}
"""Dtype of weights and gradients, and storage format, that `tritopt list` shows."""


class Traffic(NamedTuple):
    """Bytes per parameter that one step must move."""

    read: int
    written: int

    @property
    def total(self) -> int:
        """Both directions."""
        return self.read + self.written


@dataclass(frozen=True)
class Listing:
    """A row of `tritopt list`: an optimizer with constructor arguments that change its launches or states."""

    optimizer: str
    arguments: dict[str, Any]
    kernels: tuple[str, ...]
    """Update functions, one per launch; "?" where Triton is missing. Empty: no kernel."""
    states: tuple[str, ...]
    moved: dict[str, Traffic]
    """By name of PRECISIONS. Empty: no kernel."""
    resident: dict[str, int]
    """Bytes per parameter in memory, likewise, without gradients."""

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**vars(self), "moved": {name: traffic._asdict() for name, traffic in self.moved.items()}}


def bytes_per_parameter(
    opt: Optimizer, weight_dtype: torch.dtype, grad_dtype: torch.dtype, fmt: Format = PLAIN
) -> Traffic:
    """Bytes per parameter that the phases of a fused step read and write; tables and sums per tensor do not count.

    >>> import tritopt
    >>> bytes_per_parameter(tritopt.create("adam"), torch.bfloat16, torch.bfloat16, MASTER_FP32)
    Traffic(read=14, written=14)

    Raises:
        ValueError: the optimizer has no kernel, or the format does not go with the dtype.
    """
    if not opt.phases:
        raise ValueError(f"{type(opt).__name__} declares no phases, so the bytes its step moves are not known")
    planes, states = _stored(opt, weight_dtype, fmt)
    weight_read = sum(size for size, is_read in zip(planes, fmt.plane_reads, strict=True) if is_read)
    moved = [phase.traffic((weight_read, sum(planes)), grad_dtype.itemsize, sum(states)) for phase in opt.phases]
    return Traffic(round(sum(read for read, _ in moved)), round(sum(written for _, written in moved)))


def resident_bytes(opt: Optimizer, weight_dtype: torch.dtype, fmt: Format = PLAIN) -> int:
    """Bytes per parameter of the weight's planes and the states, gradients not included."""
    planes, states = _stored(opt, weight_dtype, fmt)
    return sum(planes) + round(sum(states))


def fresh_state(opt: Optimizer, index: Hashable, weight: torch.Tensor) -> State:
    """`create_state_multi_precision` without its warning about accumulating in 16 bits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*accumulates in", UserWarning)
        return opt.create_state_multi_precision(index, weight)


def listings(classes: Sequence[type[Optimizer]] | None = None) -> Iterator[Listing]:
    """A row for each variant of the optimizers (None: all registered) that has launches or states of its own."""
    for cls in [registry.find(name) for name in registry.names()] if classes is None else classes:
        seen = set()
        for arguments in cls.variants:
            listing = _listing(cls, arguments)
            if (listing.kernels, listing.states) not in seen:
                seen.add((listing.kernels, listing.states))
                yield listing


def _listing(cls: type[Optimizer], arguments: dict[str, Any]) -> Listing:
    opt = cls(**arguments)
    return Listing(
        optimizer=cls.__name__.lower(),
        arguments=arguments,
        kernels=tuple(name for phase in opt.phases for name in phase.kernels),
        states=tuple(opt.state_names),
        moved={
            name: bytes_per_parameter(opt, dtype, dtype, fmt) for name, (dtype, fmt) in PRECISIONS.items() if opt.phases
        },
        resident={name: resident_bytes(opt, dtype, fmt) for name, (dtype, fmt) in PRECISIONS.items()},
    )


def _stored(opt: Optimizer, weight_dtype: torch.dtype, fmt: Format) -> tuple[list[int], list[float]]:
    """Bytes per parameter of each plane of the weight and of each state; of a matrix, where a row's state is small."""
    if weight_dtype not in fmt.weight_dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in fmt.weight_dtypes)
        raise ValueError(f"format {fmt.name!r} stores {names} weights, not {weight_dtype}; pass PLAIN")
    opt = copy.copy(opt)
    opt.multi_precision = False
    weight = torch.empty(256, 256, dtype=weight_dtype)
    planes = [weight.dtype.itemsize]
    if fmt.n_planes > 1:
        planes.append(fmt.dtype_of_companion(weight_dtype).itemsize)
    if fmt is not PLAIN:
        weight = weight.float()
    return planes, [tensor.nbytes / weight.numel() for tensor in tensors_of(fresh_state(opt, 0, weight))]


def tensors_of(state: Any) -> list[torch.Tensor]:
    """The tensors of a state in order; TypeError if it holds anything else."""
    if state is None:
        return []
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, tuple | list):
        return [tensor for item in state for tensor in tensors_of(item)]
    raise TypeError(f"a state must be None, a tensor or a tuple of such, got {state!r:.60}")
