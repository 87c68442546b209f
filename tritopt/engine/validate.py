"""Checks of what users pass. Every message carries the value and the way out."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from tritopt.engine.private import is_fake, is_zero_tensor
from tritopt.kernels.formats.format import Format
from tritopt.kernels.formats.scales import scales_shape
from tritopt.kernels.memory import lies_like

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def number(name: str, value: Any) -> float:
    """`value` as a plain number; TypeError unless it is a real one, ValueError if it is NaN or no float is as large."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name}={value!r} must be a number")
    try:
        is_nan = math.isnan(value)
    except OverflowError:
        raise ValueError(f"{name}={value!r:.40}... is larger than any float") from None
    if is_nan:
        raise ValueError(f"{name}={value!r} must not be NaN")
    return value if isinstance(value, int) else float(value)


def finite(name: str, value: Any) -> float:
    """`value` as a plain number; ValueError unless it is finite."""
    if math.isinf(number(name, value)):
        raise ValueError(f"{name}={value!r} must be finite")
    return number(name, value)


def boolean(name: str, value: Any) -> bool:
    """`value` as it is; TypeError unless it is a bool: a configuration file's "False" is true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False")
    return value


def count(name: str, value: Any) -> int:
    """`value` as it is; TypeError unless it is an int, ValueError unless it is >= 0."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}={value!r} must be an int")
    if value < 0:
        raise ValueError(f"{name}={value!r} must be >= 0")
    return int(value)


def positive_count(name: str, value: int) -> int:
    """Return a `count` as it is; ValueError unless it is at least 1."""
    if count(name, value) < 1:
        raise ValueError(f"{name}={value!r} must be at least 1")
    return value


def rescale(value: Any) -> None:
    """TypeError or ValueError unless `value` can be rescale_grad; NaN and infinity can, they skip the update."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"rescale_grad of shape {tuple(value.shape)} and {value.dtype} must be a number or a real tensor of "
                "one element"
            )
    elif isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"rescale_grad={value!r} must be a number or a tensor of one element")


def nonnegative(name: str, value: Any) -> float:
    """`value` as it is; ValueError unless value >= 0 and finite."""
    if not 0 <= number(name, value) < math.inf:
        raise ValueError(f"{name}={value!r} must be >= 0 and finite")
    return number(name, value)


def fraction(name: str, value: Any) -> float:
    """`value` as it is; ValueError unless 0 <= value < 1."""
    if not 0 <= number(name, value) < 1:
        raise ValueError(f"{name}={value!r} must be in [0, 1)")
    return number(name, value)


def nonnegative_count(name: str, value: Any) -> float:
    """`value` as it is; ValueError unless value >= 0 (infinity is a count too)."""
    if number(name, value) < 0:
        raise ValueError(f"{name}={value!r} must be >= 0")
    return number(name, value)


def positive_or_none(name: str, value: Any) -> float | None:
    """`value` as a bound: None and values <= 0 mean that there is none."""
    return None if value is None or number(name, value) <= 0 else number(name, value)


def bound_or(bound: float | None, unbounded: float) -> float:
    """The bound, or `unbounded` where there is none."""
    return bound if bound is not None and bound > 0 else unbounded


def clip_bound(name: str, value: Any) -> None:
    """ValueError unless `value` is > 0, or None, which does not clip."""
    if value is not None and not number(name, value) > 0:
        raise ValueError(f"{name}={value!r} must be > 0; None does not clip")


def moments(beta1: Any, beta2: Any, epsilon: Any) -> tuple[float, float, float]:
    """The three as they are; ValueError unless both betas are in [0, 1) and epsilon >= 0."""
    return fraction("beta1", beta1), fraction("beta2", beta2), nonnegative("epsilon", epsilon)


def same_length(**lists: Any) -> None:
    """TypeError unless all are lists or tuples, ValueError unless all are equally long."""
    for name, items in lists.items():
        if not isinstance(items, list | tuple):
            raise TypeError(f"{name} must be a list or a tuple beside a list of indices, got {items!r:.60}")
    if len({len(items) for items in lists.values()}) > 1:
        lengths = ", ".join(f"{len(items)} {name}" for name, items in lists.items())
        raise ValueError(f"one of each per parameter, got {lengths}")


def weight_and_grad(index: Hashable, weight: Any, grad: Any) -> None:
    """TypeError or ValueError unless `grad` is a gradient that can update `weight`, under a hashable index."""
    try:
        hash(index)
    except TypeError as error:
        raise TypeError(f"parameter {index!r}: an index must be hashable, such as an int or a str") from error
    for name, tensor in (("weight", weight), ("gradient", grad)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"parameter {index!r}: the {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in WEIGHT_DTYPES:
            raise TypeError(
                f"parameter {index!r}: the {name} is {tensor.dtype}; supported are float16, bfloat16, float32, float64"
                + (" (optimize torch.view_as_real(weight))" if tensor.is_complex() else "")
            )
    if weight.layout != torch.strided:
        raise TypeError(f"parameter {index!r}: the weight has layout {weight.layout}; call .to_dense()")
    has_memory(index, "weight", weight)
    if grad.shape != weight.shape:
        raise ValueError(
            f"parameter {index!r}: gradient of shape {tuple(grad.shape)} for a weight of shape {tuple(weight.shape)}; "
            "pass each weight's own gradient, in the same order"
        )
    if grad.device != weight.device:
        raise ValueError(f"parameter {index!r}: gradient on {grad.device}, weight on {weight.device}; move one")
    if grad.dtype == torch.float64 != weight.dtype:
        raise TypeError(f"parameter {index!r}: a float64 gradient needs a float64 weight, not {weight.dtype}")


def not_spread(index: Hashable, weight: Any, grad: Any) -> None:
    """TypeError for a DTensor, whose elements lie in several processes."""
    # Whoever made one has imported the module, which a torch built without torch.distributed does not have.
    module = sys.modules.get("torch.distributed.tensor")
    for name, tensor in (("weight", weight), ("gradient", grad)):
        if module is not None and isinstance(tensor, module.DTensor):
            raise TypeError(
                f"parameter {index!r}: the {name} is a DTensor, which is spread over processes: take the class of "
                "tritopt.optim, or pass .to_local() of weight and gradient to an optimizer that is elementwise"
            )


def has_memory(index: Hashable, name: str, tensor: torch.Tensor) -> None:
    """ValueError for one of torch's zero tensors, which have no memory that a step could write to."""
    if is_zero_tensor(tensor):
        raise ValueError(f"parameter {index!r}: the {name} is a tensor of zeros that has no memory; take its .clone()")


class WayOut(NamedTuple):
    """Advice of a face of the package where a state does not fit its weight."""

    create: str
    """Advice in place of a state that cannot stand beside the weight."""
    convert: str
    """Advice for a state in another format."""


MXNETS = WayOut(
    "create it with create_state_multi_precision(index, weight)",
    "bring it into that with convert_state(index, weight, state)",
)
TORCHS = WayOut(
    "optimizer.load_state_dict(optimizer.state_dict()) converts and moves states after model.to(...); a parameter of "
    "another shape needs a new optimizer",
    "optimizer.load_state_dict(optimizer.state_dict()) brings it into that",
)


def state_tensor(
    index: Hashable,
    state: torch.Tensor,
    weight: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
    way_out: WayOut = MXNETS,
) -> None:
    """ValueError unless the state has this shape, and this dtype or any real one, and can stand beside the weight."""
    if state.dtype not in WEIGHT_DTYPES if dtype is None else state.dtype != dtype:
        expected = "float16, bfloat16, float32 or float64" if dtype is None else str(dtype)
        raise ValueError(
            f"parameter {index!r}: a state is {state.dtype} beside a weight that is {weight.dtype}, and must be "
            f"{expected}; {way_out.create}"
        )
    has_memory(index, "state", state)
    if tuple(state.shape) != tuple(shape) or state.device != weight.device:
        raise ValueError(
            f"parameter {index!r}: state of shape {tuple(state.shape)} on {state.device} for a weight of shape "
            f"{tuple(weight.shape)} on {weight.device}; {way_out.create}"
        )


def state_planes(
    index: Hashable,
    planes: Sequence[torch.Tensor],
    weight: torch.Tensor,
    shape: Sequence[int],
    fmt: Format,
    way_out: WayOut = MXNETS,
) -> None:
    """ValueError unless these are the planes of a state of this shape in this format, and can stand beside the weight.

    Elements that share a scale must lie in memory as the weight does when a step reads it.
    """
    if weight.dtype == torch.float64 and fmt.dtypes:
        raise ValueError(
            f"parameter {index!r}: a float64 weight keeps float64 states, which {fmt.name} is not for; no state_dtype"
        )
    if len(planes) != fmt.n_planes or any(p.dtype != dtype for p, dtype in zip(planes, fmt.dtypes, strict=False)):
        raise ValueError(
            f"parameter {index!r}: a state of {', '.join(str(plane.dtype) for plane in planes)} is not stored as "
            f"state_dtype says, in {', '.join(map(str, fmt.dtypes)) or 'one tensor'}; {way_out.convert}"
        )
    state_tensor(index, planes[0], weight, shape, fmt.dtypes[0] if fmt.dtypes else None, way_out)
    if not fmt.block:
        return
    state_tensor(index, planes[1], weight, scales_shape(shape, fmt.block), fmt.dtypes[1], way_out)
    if not lies_like(planes[0], weight):
        raise ValueError(
            f"parameter {index!r}: the weight has strides {weight.stride()}, a state in blocks {planes[0].stride()}: "
            "it was made for a weight that lay otherwise in memory; make a new state for this one"
        )
    if not planes[1].is_contiguous():
        raise ValueError(f"parameter {index!r}: the scales of a state must be contiguous")


def no_aliases(owners: Sequence[Hashable], tensors: Sequence[torch.Tensor]) -> None:
    """ValueError if two of the tensors, or two elements of one, share memory: a step writes each of them.

    `owners[i]` is the parameter that `tensors[i]` belongs to.
    """
    if not any(map(is_allocated, tensors)):
        return
    has_memory = [not tensor.is_meta for tensor in tensors]
    owners = [owner for owner, has in zip(owners, has_memory, strict=True) if has]
    tensors = [tensor for tensor, has in zip(tensors, has_memory, strict=True) if has]
    extents = [extent_of(tensor) for tensor in tensors]
    starts = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    order = np.argsort(starts, kind="stable")
    ends = np.maximum.accumulate((starts + np.array(extents, dtype=np.int64))[order]) if len(tensors) else starts
    suspects = np.flatnonzero(ends[:-1] > starts[order][1:])
    for position in suspects:
        first = _earlier_overlap(order, int(position) + 1, starts, extents)
        second = int(order[position + 1])
        for candidate in first:
            if _share_memory(tensors[candidate], tensors[second]):
                raise ValueError(
                    f"parameters {owners[candidate]!r} and {owners[second]!r} share memory, and one call would update "
                    "both: pass a shared (tied) weight once, and give each parameter states of its own"
                )
    for owner, tensor in zip(owners, tensors, strict=True):
        if _overlaps_itself(tensor):
            raise ValueError(f"parameter {owner!r}: elements share memory (an expanded tensor); call .contiguous()")


def is_allocated(tensor: torch.Tensor) -> bool:
    """Whether there is anything to update: not on meta, nor under FakeTensorMode."""
    return not (tensor.is_meta or is_fake(tensor))


def _earlier_overlap(order: Any, position: int, starts: Any, extents: Sequence[int]) -> list[int]:
    start = starts[order[position]]
    return [int(i) for i in order[:position] if starts[i] + extents[i] > start]


def extent_of(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements are at one address."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return False
    seen = torch.zeros(extent_of(tensor) // tensor.element_size(), dtype=torch.bool, device="cpu")
    seen.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(seen.sum()) < tensor.numel()


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether any element is in both; their extents are known to overlap."""
    if a.element_size() != b.element_size() or a.numel() == 0 or b.numel() == 0:
        return a.numel() > 0 and b.numel() > 0
    base, size = min(a.data_ptr(), b.data_ptr()), a.element_size()
    end = max(t.data_ptr() + extent_of(t) for t in (a, b))
    seen = torch.zeros(-(-(end - base) // size), dtype=torch.bool, device="cpu")
    views = [seen.as_strided(t.shape, t.stride(), (t.data_ptr() - base) // size) for t in (a, b)]
    views[0].fill_(True)
    return bool(views[1].any())


@contextmanager
def naming(name: Hashable) -> Iterator[None]:
    """Let a ValueError name the parameter that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from error


def did_you_mean(word: str, known: list[str]) -> str:
    """'; did you mean 'adam'?', or ';' if nothing known is near."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
