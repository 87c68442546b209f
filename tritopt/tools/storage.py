"""Storage formats by name: how weights and states are kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch

from tritopt.mxnet import registry

WEIGHTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "master": (torch.bfloat16, {"master": "fp32"}),
    "split16": (torch.bfloat16, {"master": "split16"}),
    "split8": (torch.bfloat16, {"master": "split8"}),
    "kahan": (torch.bfloat16, {"master": "kahan"}),
    "stochastic": (torch.bfloat16, {"master": "stochastic"}),
    "none": (torch.bfloat16, {"master": None}),
    "fp16-master": (torch.float16, {"master": "fp32"}),
    "fp16-kahan": (torch.float16, {"master": "kahan"}),
}
"""Name: dtype of the weights and gradients, and how the weights' master is kept."""
STATES: dict[str, dict[str, Any]] = {
    "": {},
    "bf16": {"state_dtype": "bf16"},
    "int8": {"state_dtype": "int8"},
    "fp8": {"state_dtype": "fp8"},
    "fp16": {"state_dtype": "fp16"},
    "int8/bf16": {"state_dtype": {"exp_avg": "int8", "exp_avg_sq": "bf16"}},
    "int8/fp8": {"state_dtype": {"exp_avg": "int8", "exp_avg_sq": "fp8"}},
}
"""Name: how states are kept. The first one is what the weights' format brings along; those with a stroke are Adam's."""
BY_DEFAULT = (
    "fp32", "master", "split16", "split8", "kahan", "stochastic", "none", "fp16-master", "fp16-kahan",
    "fp32+bf16", "fp32+fp16", "fp32+int8", "fp32+int8/bf16", "fp32+int8/fp8", "fp32+fp8",
    "split16+bf16", "split16+int8", "split8+bf16", "split8+int8", "split8+fp8", "stochastic+int8",
)  # fmt: skip


class StorageFormat(NamedTuple):
    """How weights and states are stored."""

    name: str
    """A key of WEIGHTS, and after a plus one of STATES."""
    dtype: torch.dtype
    """Of weights and gradients."""
    arguments: dict[str, Any]
    """Of the optimizer."""


TRUTH = StorageFormat("fp64", torch.float64, {})
FORMATS = {
    name: StorageFormat(name, dtype, {**weights, **states})
    for (weight, (dtype, weights)), (state, states) in product(WEIGHTS.items(), STATES.items())
    for name in [f"{weight}+{state}" if state else weight]
}
"""By name: every format of weights with every one of states."""


def find_formats(names: Sequence[str] | None = None) -> list[StorageFormat]:
    """The formats of these names (None: BY_DEFAULT); ValueError for an unknown one."""
    for name in names or ():
        if name not in FORMATS:
            known = f"{', '.join(WEIGHTS)}, and after a plus {', '.join(filter(None, STATES))}"
            raise ValueError(f"unknown format {name!r}{registry.did_you_mean(name, list(FORMATS))} known: {known}")
    return [FORMATS[name] for name in dict.fromkeys(names or BY_DEFAULT)]
