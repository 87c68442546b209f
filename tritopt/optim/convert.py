"""States brought into the formats of their layout, and shown as collectives can send them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tritopt.engine import validate
from tritopt.engine.state_dtype import stored
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.states import STATE_FORMATS
from tritopt.kernels.formats.weights import MASTERS, SPLIT16
from tritopt.kernels.memory import lies_like
from tritopt.optim.distributed import like, local, seen_as
from tritopt.optim.layout import Expected, keys_of

COMPANIONS = {fmt.companion for fmt in MASTERS.values() if fmt.companion}


def sendable(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """States for a state_dict: a remainder is shown as fp16 numbers of the same bits, in the same memory.

    Neither NCCL nor Gloo sends int16, so no full state dict could be gathered of it.
    """
    return {key: _with_remainder(values, torch.int16, torch.float16) for key, values in state.items()}


def received(values: Any) -> Any:
    """The states of `sendable`, as an optimizer keeps them; the same object if there is no remainder."""
    return _with_remainder(values, torch.float16, torch.int16)


def _with_remainder(values: Any, old: torch.dtype, wanted: torch.dtype) -> Any:
    value = values.get(SPLIT16.companion) if isinstance(values, dict) else None
    if not isinstance(value, torch.Tensor) or value.dtype != old:
        return values
    return {**values, SPLIT16.companion: seen_as(value, wanted)}


def take_companion(param: torch.Tensor, state: dict[str, Any], fmt: Format) -> bool:
    """Bring the master in a state into this format, or make it from the weight. False if that was rounded.

    That of a weight of another dtype, as it is after `model.to(dtype)`, says nothing of this weight and is dropped.
    """
    old = next((other for other in MASTERS.values() if other.companion in state), None)
    if old is not None and not completes(param, state, old):
        del state[old.companion]
        old = None
    if old is fmt:
        return True
    weight = local(param.detach()).resolve_neg()
    value = weight.float()
    if old is not None:
        value = old.decode((weight, local(state.pop(old.companion))), torch.float32)
    if fmt.companion_of is not None:
        state[fmt.companion] = like(param, fmt.companion_of(weight, value), tuple(param.shape))
    return old is not None or fmt.companion_of is None


def completes(param: torch.Tensor, state: Mapping[str, Any], fmt: Format) -> bool:
    """Whether the master in a state can be one of a parameter of this dtype."""
    kept = state[fmt.companion].dtype
    # Any other dtype than those of weights is no master at all, and refused by the step.
    of_another = fmt.companion_dtype is None and kept != param.dtype and kept in validate.WEIGHT_DTYPES
    return param.dtype in fmt.weight_dtypes and not of_another


def take_states(
    param: torch.Tensor,
    state: dict[str, Any],
    formats: Mapping[str, Format],
    kinds: Mapping[str, str | None],
    expected: Mapping[str, Expected],
) -> None:
    """Bring the states of a parameter into these formats. One that it lacks is made at the next gradient."""
    for name, fmt in formats.items():
        kind = kinds[name] or ""
        forms = (PLAIN, *[of_kind[kind] for of_kind in STATE_FORMATS.values() if kind in of_kind])
        old = next((form for form in forms if keys_of(name, form)[0] in state), None)
        if old is None or is_stored_as(param, state, name, fmt, expected):
            continue
        if fmt is PLAIN and old is PLAIN:
            state[name] = state[name].to(expected[name].dtype)
            continue
        planes = [local(state.pop(key)) for key in keys_of(name, old)]
        value = torch.empty_like(local(param.detach()), dtype=torch.float32).copy_(old.decode(planes, torch.float32))
        for key, plane in zip(keys_of(name, fmt), stored(fmt, value), strict=True):
            state[key] = like(param, plane, expected[key].shape, expected[key].per_block)


def is_stored_as(
    param: torch.Tensor, state: Mapping[str, Any], name: str, fmt: Format, expected: Mapping[str, Expected]
) -> bool:
    """Whether a state is there in this format; where elements share scales, also in the parameter's order in memory."""
    keys = [key for key in keys_of(name, fmt) if key in expected]
    if not all(key in state for key in keys):
        return False
    if fmt is PLAIN:
        return all(state[key].dtype.itemsize >= expected[key].dtype.itemsize for key in keys)
    return all(state[key].dtype == expected[key].dtype for key in keys) and (
        not fmt.block or lies_like(local(state[keys[0]]), local(param))
    )
