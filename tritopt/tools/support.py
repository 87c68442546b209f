"""Table of support: what each optimizer takes, in both faces, asked of the code itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tritopt.engine.driver import Apply
from tritopt.engine.matrix_phase import ApplyMatrices
from tritopt.engine.row_phase import ApplyRows
from tritopt.kernels.formats.weights import MASTERS
from tritopt.mxnet import registry
from tritopt.mxnet.optimizer import Optimizer
from tritopt.rule import Rule
from tritopt.tools.optimizers import torch_classes

TORCH, MXNET = "tritopt.optim", "tritopt.create"
"""Names of the two faces."""
LEGEND: dict[str, dict[str, str]] = {
    "masters": {
        "all": "every `master=` goes with bf16 weights",
        "fp32, split16, kahan": "the kernels draw no random bits, so those that round stochastically are refused",
    },
    "sparse": {
        "rows": "`lazy_update=True` updates only the rows present; otherwise the gradient is taken as a dense one",
        "dense": "a sparse gradient is taken as a dense one whose other rows are zero",
        "refused": "a sparse gradient is an error, as it is in torch",
    },
    "sharded": {
        "local": "each process updates its part of a DTensor, and nothing is sent",
        "sums": "each process updates its part; one small vector of norms is summed over the processes for each phase "
        "that needs them",
        "matrices": "each matrix is sent to the process that orthogonalises it, and back",
        "rows": "nothing is sent where each row lies in one process; otherwise DTensor's operations, in the reference",
        "DTensor": "DTensor's operations, in the reference; on a GPU `fused=True` is an error",
        "no": "a DTensor is an error: take `tritopt.optim`",
    },
    "capturable": {
        "yes": "`capturable=True` lets a CUDA graph capture the step",
        "no": "the face has no such argument",
    },
    "telemetry": {
        "yes": "`track=True` sums up in the kernel and in the reference",
        "reference": "`track=True` works in the reference; the kernel refuses it",
    },
    "differentiable": {
        "yes": "`differentiable=True` lets autograd differentiate the step",
        "no": "the class has no such argument",
    },
}
"""Meanings of the words in the table, by column."""


@dataclass(frozen=True)
class Support:
    """Support of one optimizer in one face."""

    optimizer: str
    """Name of the class in tritopt.optim, or the name that tritopt.create takes."""
    face: str
    """Name of the face, TORCH or MXNET."""
    launches: int
    """Number of kernels that a step launches; 0: there is no kernel."""
    masters: tuple[str, ...]
    """Values of `master=` that go with bf16 weights, None aside."""
    narrow: tuple[str, ...]
    """States that take every `state_dtype`."""
    wide: tuple[str, ...]
    """States that stay fp32, whatever `state_dtype` says; a state in both depends on constructor arguments."""
    sparse: str
    """Treatment of sparse gradients, a key of LEGEND."""
    sharded: str
    """Treatment of DTensors, a key of LEGEND."""
    capturable: str
    telemetry: str
    differentiable: str

    def to_json(self) -> dict[str, Any]:
        """Convert to what JSON knows."""
        return asdict(self)

    def cells(self) -> dict[str, str]:
        """Cells of the table, by title of the column."""
        return {
            "optimizer": self.optimizer,
            "launches": str(self.launches or "no kernel"),
            "masters": "all" if self.masters == tuple(MASTERS) else ", ".join(self.masters),
            "states in fewer bits": ", ".join(self.narrow) or "-",
            "states in fp32": ", ".join(self.wide) or "-",
            "sparse": self.sparse,
            "sharded": self.sharded,
            "capturable": self.capturable,
            "telemetry": self.telemetry,
            "differentiable": self.differentiable,
        }


def supported(classes: Sequence[type[Optimizer]] | None = None) -> Iterator[Support]:
    """Tell what registered optimizers take (None: all), first in tritopt.optim, then in tritopt.create."""
    known = [registry.find(name) for name in registry.names()] if classes is None else classes
    names = {cls.__name__.lower() for cls in known}
    for name, cls in sorted(torch_classes().items(), key=lambda item: item[0].lower()):
        if name.lower() in names:
            yield _of_torch(name, cls)
    for registered in known:
        yield _of_mxnet(registered)


def _of_torch(name: str, cls: Any) -> Support:
    known = inspect.signature(cls).parameters
    weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16, device="cpu"))

    def takes(master: str) -> bool:
        return _takes(lambda: cls([weight], master=master))

    made = cls([weight])
    refuses_sparse = made.sparse_error_of(made.param_groups[0]) is not None
    return Support(
        optimizer=name,
        face=TORCH,
        masters=tuple(filter(takes, MASTERS)),
        sparse="refused" if refuses_sparse else "dense",
        sharded=_sharded(cls.rule),
        capturable=_yes_or_no("capturable" in known),
        differentiable=_yes_or_no("differentiable" in known),
        **_of_rule(cls.rule, cls.state_keys),
    )


def _of_mxnet(cls: type[Optimizer]) -> Support:
    weight = torch.zeros(2, 2, dtype=torch.bfloat16, device="cpu")

    def takes(master: str) -> bool:
        return _takes(lambda: cls(multi_precision=True, master=master).create_state_multi_precision(0, weight))

    return Support(
        optimizer=cls.__name__.lower(),
        face=MXNET,
        masters=tuple(filter(takes, MASTERS)),
        sparse="rows" if cls.supports_lazy_update else "dense",
        sharded="no",
        capturable="no",
        differentiable="no",
        **_of_rule(cls, {}),
    )


def _takes(make: Callable[[], Any]) -> bool:
    """Whether the constructor's arguments go together, or the states can be made."""
    try:
        make()
    except ValueError:
        return False
    return True


def _of_rule(cls: type[Rule], state_keys: Mapping[str, str]) -> dict[str, Any]:
    """Fields that both faces take from the rule. state_keys: the face's names of states."""
    variants = [cls(**arguments) for arguments in cls.variants]
    kinds: dict[str, set[bool]] = {}
    for rule in variants:
        for name in rule.state_names:
            kinds.setdefault(state_keys.get(name, name), set()).add(rule.kind_of(name) is not None)
    phases = [phase for rule in variants for phase in rule.phases]
    return {
        "launches": max(sum(len(phase.kernels) for phase in rule.phases) for rule in variants),
        "narrow": tuple(name for name, are_narrow in kinds.items() if True in are_narrow),
        "wide": tuple(name for name, are_narrow in kinds.items() if False in are_narrow),
        "telemetry": "yes" if all(phase.is_driver for phase in phases) else "reference",
    }


def _sharded(cls: type[Rule]) -> str:
    phases = [phase for arguments in cls.variants for phase in cls(**arguments).phases]
    if not any(phase.sums_elements for phase in phases):
        return "local"
    if all(isinstance(phase, Apply) for phase in phases):
        return "sums"
    if all(isinstance(phase, ApplyMatrices) for phase in phases):
        return "matrices"
    return "rows" if all(isinstance(phase, ApplyRows) for phase in phases) else "DTensor"


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"
