"""Choice of the format that each state of an optimizer is stored in, and the tensors that this takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from tritopt.engine.random_keys import noise_key
from tritopt.engine.validate import did_you_mean
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.scales import scales_shape
from tritopt.kernels.formats.states import STATE_FORMATS
from tritopt.kernels.memory import is_dense
from tritopt.kernels.twins.random import Noise

Choice: TypeAlias = str | dict[str, str] | None
"""A key of STATE_FORMATS, "fp32", or one of these by name of the state. None: as an optimizer has it without."""
FP32 = "fp32"
NAMES = (FP32, *STATE_FORMATS)
OF_DTYPE = {
    torch.float32: FP32,
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}
_CONVERSION = Noise(noise_key(0, "conversion"), 0, 0, 0, 0)


def checked(value: Any) -> Choice:
    """A `state_dtype` as it is kept, torch's dtypes by name; ValueError for any other."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(name): _checked_name(choice, f" of {name!r}") for name, choice in value.items()}
    return _checked_name(value, "")


def _checked_name(value: Any, of: str) -> str:
    name = OF_DTYPE.get(value) if isinstance(value, torch.dtype) else value
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(
            f"state_dtype={value!r}{of} must be one of {', '.join(map(repr, NAMES))}, a dict of such by name of the "
            "state, or None"
        )
    return name


def formats_of(choice: Choice, kinds: Mapping[str, str | None]) -> tuple[Format, ...]:
    """Format of each state. kinds: SIGNED or SQUARES by name, None for a state that must stay as it is.

    Raises:
        ValueError: a name that is no state's, or a format that its state must not have.
    """
    if not isinstance(choice, dict):
        by_kind: Mapping[str | None, Format] = {} if choice in (None, FP32) else STATE_FORMATS[str(choice)]  # type: ignore[assignment]
        return tuple(by_kind.get(kind, PLAIN) for kind in kinds.values())
    for name, wanted in choice.items():
        if name not in kinds:
            known = ", ".join(map(repr, kinds)) or "none"
            raise ValueError(
                f"state_dtype={choice!r}: no state {name!r}{did_you_mean(name, list(kinds))} known: {known}"
            )
        if wanted != FP32 and kinds[name] not in STATE_FORMATS[wanted]:
            takes = [other for other in STATE_FORMATS if kinds[name] in STATE_FORMATS[other]]
            raise ValueError(
                f"state_dtype={choice!r}: {name!r} must not be rounded to {wanted}; take "
                + " or ".join(map(repr, (FP32, *takes)))
            )
    wanted_of = [choice.get(name, FP32) for name in kinds]
    return tuple(
        PLAIN if wanted == FP32 else STATE_FORMATS[wanted][str(kind)]
        for wanted, kind in zip(wanted_of, kinds.values(), strict=True)
    )


def stored(fmt: Format, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """New planes that hold a value, laid out like it where that is dense. The bits to round by are always the same."""
    if fmt is PLAIN:
        return (value,)
    value = value if is_dense(value) else value.contiguous()
    planes = [torch.zeros_like(value, dtype=fmt.dtypes[0])]
    if fmt.block:
        shape = scales_shape(value.shape, fmt.block)
        planes.append(torch.zeros(shape, dtype=fmt.dtypes[1], device=value.device))
    fmt.encode(planes, value.float(), _CONVERSION)
    return tuple(planes)


def format_of_planes(planes: Sequence[torch.Tensor], kind: str | None) -> Format:
    """The format of a state whose planes these are."""
    dtypes = tuple(plane.dtype for plane in planes)
    if len(planes) == 1:
        return PLAIN
    matching = [
        by_kind[kind] for by_kind in STATE_FORMATS.values() if kind in by_kind and by_kind[kind].dtypes == dtypes
    ]
    if not matching:
        raise ValueError(f"a state cannot be stored in {', '.join(map(str, dtypes))}")
    return matching[0]
