"""The storage formats of weights and states by name: the one list that every tool and command chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch

from tritopt.engine.state_dtype import Choice
from tritopt.engine.validate import did_you_mean
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.weights import MASTERS

WEIGHTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "master": (torch.bfloat16, {"master": "fp32"}),
    **{name: (torch.bfloat16, {"master": name}) for name in MASTERS if name != "fp32"},
    "none": (torch.bfloat16, {"master": None}),
    "fp16-master": (torch.float16, {"master": "fp32"}),
    "fp16-kahan": (torch.float16, {"master": "kahan"}),
}
"""Dtype of the weights and gradients, and arguments that say how the weights' master is kept, by name."""
STATES: dict[str, dict[str, Any]] = {
    "": {},
    "bf16": {"state_dtype": "bf16"},
    "int8": {"state_dtype": "int8"},
    "fp8": {"state_dtype": "fp8"},
    "fp16": {"state_dtype": "fp16"},
    "int8/bf16": {"state_dtype": {"exp_avg": "int8", "exp_avg_sq": "bf16"}},
    "int8/fp8": {"state_dtype": {"exp_avg": "int8", "exp_avg_sq": "fp8"}},
}
"""Arguments that say how states are kept, by name: first as the weights bring along; those with a stroke are Adam's."""
NOT_OFFERED: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp64": (torch.float64, {}),
    "fp16-none": (torch.float16, {"master": None}),
}
"""Weights that no command takes by name: the truth that others are compared with, and fp16 as only a check has it."""
BY_DEFAULT = (
    "fp32", "master", "split16", "split8", "kahan", "stochastic", "none", "fp16-master", "fp16-kahan",
    "fp32+bf16", "fp32+fp16", "fp32+int8", "fp32+int8/bf16", "fp32+int8/fp8", "fp32+fp8",
    "split16+bf16", "split16+int8", "split8+bf16", "split8+int8", "split8+fp8", "stochastic+int8",
)  # fmt: skip
"""Formats of `tritopt numerics` where none is named."""


class StorageFormat(NamedTuple):
    """Way in which an optimizer stores weights and states."""

    name: str
    """Key of WEIGHTS or NOT_OFFERED; where states are not what these bring along, then a plus and a key of STATES."""
    dtype: torch.dtype
    """Dtype of the weights and the gradients."""
    arguments: dict[str, Any]
    """Arguments that a class of tritopt.optim takes for it."""

    @property
    def master(self) -> str | None:
        """Format of the weights' master, a key of MASTERS; None: there is none."""
        master: str | None = self.arguments.get("master")
        return master

    @property
    def state_dtype(self) -> Choice:
        """Format of states; None: the (master) weight's dtype."""
        state_dtype: Choice = self.arguments.get("state_dtype")
        return state_dtype

    @property
    def weight_format(self) -> Format:
        """Format by which kernels load and store the weights."""
        return PLAIN if self.master is None else MASTERS[self.master]

    @property
    def rule_arguments(self) -> dict[str, Any]:
        """Arguments that a registered optimizer takes for it."""
        return self.arguments if self.master is None else {"multi_precision": True, **self.arguments}


OFFERED = {
    name: StorageFormat(name, dtype, {**weights, **states})
    for (weight, (dtype, weights)), (state, states) in product(WEIGHTS.items(), STATES.items())
    for name in [f"{weight}+{state}" if state else weight]
}
"""Formats that commands take, by name: every one of weights with every one of states."""
FORMATS = {**OFFERED, **{name: StorageFormat(name, *stored) for name, stored in NOT_OFFERED.items()}}
"""Formats that there are, by name: those that commands take, and the rest."""
TRUTH = FORMATS["fp64"]
"""Format that others are compared with."""


def find_formats(names: Sequence[str] | None = None) -> list[StorageFormat]:
    """Find the formats of these names (None: BY_DEFAULT); ValueError for a name that is not OFFERED."""
    for name in names or ():
        if name not in OFFERED:
            known = f"{', '.join(WEIGHTS)}, and after a plus {', '.join(filter(None, STATES))}"
            raise ValueError(f"unknown format {name!r}{did_you_mean(name, list(OFFERED))} known: {known}")
    return [FORMATS[name] for name in dict.fromkeys(names or BY_DEFAULT)]
