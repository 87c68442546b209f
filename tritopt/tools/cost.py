"""Costs of an optimizer: bytes per parameter that a step moves, and that stay in memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch

from tritopt import optim
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.scales import BLOCK
from tritopt.kernels.formats.weights import MASTERS
from tritopt.mxnet import registry
from tritopt.mxnet.optimizer import Optimizer
from tritopt.rule import State
from tritopt.tools.storage import FORMATS

PRECISIONS = {
    "fp32": FORMATS["fp32"],
    "bf16 + fp32 master": FORMATS["master"],
    "bf16 + 16-bit remainder": FORMATS["split16"],
    "split16, bf16 states": FORMATS["split16+bf16"],
    "split8, int8 states": FORMATS["split8+int8"],
    "bf16": FORMATS["none"],
}
"""Storage formats that `tritopt list` shows, by the title of their column."""


class Traffic(NamedTuple):
    """Bytes per parameter that one step must move. Fractions are those of scales that 64 elements share."""

    read: float
    written: float

    @property
    def total(self) -> float:
        """Bytes per parameter in both directions."""
        return self.read + self.written


@dataclass(frozen=True)
class Listing:
    """Entry of `tritopt list`: an optimizer with constructor arguments that change its launches or states."""

    optimizer: str
    arguments: dict[str, Any]
    kernels: tuple[str, ...]
    """Names of update functions, one per launch. Empty: no kernel."""
    states: tuple[str, ...]
    """Names of states, in the rule's order."""
    moved: dict[str, Traffic]
    """Bytes that a step moves, by name of PRECISIONS, but for those that the optimizer refuses. Empty: no kernel."""
    resident: dict[str, float]
    """Bytes per parameter in memory without gradients, by name of PRECISIONS, but for those that it refuses."""

    def to_json(self) -> dict[str, Any]:
        """Convert to what JSON knows."""
        return {**vars(self), "moved": {name: traffic._asdict() for name, traffic in self.moved.items()}}


def bytes_per_parameter(
    opt: Optimizer, weight_dtype: torch.dtype, grad_dtype: torch.dtype, fmt: Format = PLAIN
) -> Traffic:
    """Bytes per parameter that the phases of a fused step read and write, states stored as `opt.state_dtype` says.

    Tables and sums per tensor do not count, nor do states of a matrix's rows: as if all were large matrices. A global
    gradient norm (max_grad_norm) reads the gradient once more.

    >>> import tritopt
    >>> from tritopt.kernels.formats.weights import MASTER_FP32, SPLIT8
    >>> bytes_per_parameter(tritopt.create("adam"), torch.bfloat16, torch.bfloat16, MASTER_FP32)
    Traffic(read=16, written=14)
    >>> bytes_per_parameter(tritopt.create("adam", state_dtype="int8"), torch.bfloat16, torch.bfloat16, SPLIT8)
    Traffic(read=7.0625, written=5.0625)

    Raises:
        ValueError: the optimizer has no kernel, or refuses the format, or that does not go with the dtype.
    """
    return _summed(phase_traffic(opt, weight_dtype, grad_dtype, fmt))


def phase_traffic(
    opt: Optimizer, weight_dtype: torch.dtype, grad_dtype: torch.dtype, fmt: Format = PLAIN
) -> list[Traffic]:
    """Tell `bytes_per_parameter` of each phase."""
    _check_kernel(opt)
    planes, states = _stored(opt, weight_dtype, fmt)
    weight_read = sum(size for size, is_read in zip(planes, fmt.plane_reads, strict=True) if is_read)
    weight = (weight_read, sum(planes))
    return _moved(opt, weight, grad_dtype.itemsize, sum(states.values()))


def _moved(opt: Optimizer, weight: tuple[float, float], grad: float, states: float) -> list[Traffic]:
    """Bytes that each phase moves of tensors of this many bytes per parameter."""
    return [Traffic(*map(_shortest, phase.traffic(weight, grad, states))) for phase in opt.phases]


def _summed(moved: Sequence[Traffic]) -> Traffic:
    return Traffic(_shortest(sum(phase.read for phase in moved)), _shortest(sum(phase.written for phase in moved)))


def traffic_by_tensor(
    opt: Optimizer, weight_dtype: torch.dtype, grad_dtype: torch.dtype, fmt: Format = PLAIN
) -> dict[str, Traffic]:
    """Tell `bytes_per_parameter` of each tensor: gradient, weight, what completes it to the master, and each state.

    >>> import tritopt
    >>> from tritopt.kernels.formats.weights import SPLIT16
    >>> list(traffic_by_tensor(tritopt.create("adam"), torch.bfloat16, torch.bfloat16, SPLIT16).items())[2]
    ('master', Traffic(read=2, written=2))

    Raises:
        ValueError: as `bytes_per_parameter`.
    """
    _check_kernel(opt)
    planes, states = _stored(opt, weight_dtype, fmt)
    weights = {
        name: (size * is_read, size)
        for name, size, is_read in zip(("weight", "master"), planes, fmt.plane_reads, strict=False)
    }
    return {
        "gradient": _summed(_moved(opt, (0, 0), grad_dtype.itemsize, 0)),
        **{name: _summed(_moved(opt, sizes, 0, 0)) for name, sizes in weights.items()},
        **{name: _summed(_moved(opt, (0, 0), 0, size)) for name, size in states.items()},
    }


def resident_bytes(opt: Optimizer, weight_dtype: torch.dtype, fmt: Format = PLAIN) -> float:
    """Bytes per parameter of the weight's planes and the states, which count as above; gradients not included."""
    planes, states = _stored(opt, weight_dtype, fmt)
    return _shortest(sum(planes) + sum(states.values()))


def _check_kernel(opt: Optimizer) -> None:
    if not opt.phases:
        raise ValueError(f"{type(opt).__name__} declares no phases, so the bytes its step moves are not known")


def _shortest(n: float) -> float:
    """Make whole numbers int, which print without a point. Sums of bytes over 64 are exact."""
    return int(n) if n == int(n) else n


def fresh_state(opt: Optimizer, index: Hashable, weight: torch.Tensor) -> State:
    """Call `create_state_multi_precision` without its warning about accumulating in 16 bits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*accumulates in", UserWarning)
        return opt.create_state_multi_precision(index, weight)


class Bytes(NamedTuple):
    """Bytes per parameter, gradients included: in memory, and moved by a step."""

    resident: float
    moved: float


def counted_bytes(opt: optim.Optimizer) -> Bytes:
    """Count the bytes of the tensors that an optimizer holds after a step: parameters, gradients and states.

    What a step moves is what the phases of its kernel say they load and store of these tensors;
    tests/kernels/test_traffic.py counts that they do.
    """
    resident = moved = 0.0
    n_elements = 0
    for group in opt.param_groups:
        rule = opt.rule_of(group)
        for param in group["params"]:
            fmt = opt.layout_of(param, group).format
            n_elements += param.numel()
            kept = {key: value for key, value in opt.state[param].items() if getattr(value, "ndim", 0)}
            planes = [param.nbytes, *[kept[name].nbytes for name in kept if name == fmt.companion]]
            states = sum(tensor.nbytes for tensor in kept.values()) - sum(planes[1:])
            grad = param.dtype.itemsize * param.numel()
            resident += sum(planes) + grad + states
            loaded = sum(size for size, is_read in zip(planes, fmt.plane_reads, strict=True) if is_read)
            for phase in rule.phases:
                moved += sum(phase.traffic((loaded, sum(planes)), grad, states))
    return Bytes(resident / n_elements, moved / n_elements)


def listings(classes: Sequence[type[Optimizer]] | None = None) -> Iterator[Listing]:
    """List each variant of the optimizers (None: all registered) that has launches or states of its own."""
    for cls in [registry.find(name) for name in registry.names()] if classes is None else classes:
        seen = set()
        for arguments in cls.variants:
            listing = _listing(cls, arguments)
            if (listing.kernels, listing.states) not in seen:
                seen.add((listing.kernels, listing.states))
                yield listing


def _listing(cls: type[Optimizer], arguments: dict[str, Any]) -> Listing:
    opt = cls(**arguments)
    moved, resident = {}, {}
    for name, storage in PRECISIONS.items():
        dtype, fmt = storage.dtype, storage.weight_format
        try:
            stores = cls(**arguments, **storage.rule_arguments)
            resident[name] = resident_bytes(stores, dtype, fmt)
        except ValueError:
            continue  # a format that this optimizer refuses
        if opt.phases:
            moved[name] = bytes_per_parameter(stores, dtype, dtype, fmt)
    return Listing(
        optimizer=cls.__name__.lower(),
        arguments=arguments,
        kernels=tuple(name for phase in opt.phases for name in phase.kernels),
        states=tuple(opt.state_names),
        moved=moved,
        resident=resident,
    )


def _stored(opt: Optimizer, weight_dtype: torch.dtype, fmt: Format) -> tuple[list[int], dict[str, float]]:
    """Tell the bytes per parameter of each plane of the weight, and of each state, as allocated for a matrix."""
    if weight_dtype not in fmt.weight_dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in fmt.weight_dtypes)
        raise ValueError(f"format {fmt.name!r} stores {names} weights, not {weight_dtype}; pass PLAIN")
    opt = copy.copy(opt)
    opt.multi_precision = fmt is not PLAIN
    if opt.multi_precision:
        opt.master = _name_of(fmt)
    # Whole blocks, and rows longer than one: what a row shares is less than scales are, and does not count.
    weight = torch.zeros(72, 72, dtype=weight_dtype, device="cpu")
    state = fresh_state(opt, "weight", weight)
    planes = [weight]
    if fmt.companion:
        companion, state = state
        planes.append(companion)
    tensors = iter(tensors_of(state))
    states = {
        name: sum(t.nbytes for t in islice(tensors, 2 if of_state.block else 1) if t.numel() * BLOCK >= weight.numel())
        for name, of_state in zip(opt.state_names, opt.state_formats(), strict=True)
    }
    # An optimizer that makes its own states need not name them.
    states["unnamed"] = sum(t.nbytes for t in tensors if t.numel() * BLOCK >= weight.numel())
    return [plane.dtype.itemsize for plane in planes], {k: n / weight.numel() for k, n in states.items() if n}


def _name_of(fmt: Format) -> str:
    return next(name for name, known in MASTERS.items() if known is fmt)


def tensors_of(state: Any) -> list[torch.Tensor]:
    """Collect the tensors of a state in order; TypeError if it holds anything else."""
    if state is None:
        return []
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, tuple | list):
        return [tensor for item in state for tensor in tensors_of(item)]
    raise TypeError(f"a state must be None, a tensor or a tuple of such, got {state!r:.60}")
