"""The cases of a check: optimizers, their variants and kinds of tensors; and the result that a case becomes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import product
from typing import Any

import torch

from tritopt.engine.state_dtype import Choice
from tritopt.engine.validate import did_you_mean
from tritopt.kernels.formats.format import PLAIN
from tritopt.kernels.formats.weights import MASTERS
from tritopt.mxnet.optimizer import Optimizer
from tritopt.tools.optimizers import registered
from tritopt.tools.storage import FORMATS, StorageFormat

LEARNING_RATE = 0.1
"""A tenth of the weights' size for optimizers that normalise: movement stands out from rounding in every dtype."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    # A third of the gradients is clipped, and wd * w is too small to cancel any of them.
    "wd, clip, rescale": {"wd": 0.05, "clip_gradient": 1.5, "rescale_grad": 2.0},
}
CHECKED: dict[str, tuple[torch.dtype, ...]] = {
    "fp32": (torch.float32, torch.bfloat16),
    "fp64": (torch.float64,),
    "fp16-none": (torch.float16,),
    "fp16-master": (torch.float16, torch.float32),
    "none": (torch.bfloat16,),
    "master": (torch.bfloat16, torch.float32),
    **dict.fromkeys((name for name in MASTERS if name != "fp32"), (torch.bfloat16,)),
    # A state's format and a weight's know nothing of each other: some pairs will do.
    "split16+bf16": (torch.bfloat16,),
    "split16+fp16": (torch.bfloat16,),
    "split8+int8": (torch.bfloat16,),
    "split8+fp8": (torch.bfloat16,),
    "fp32+int8": (torch.float32,),
    "fp32+fp8": (torch.float32,),
}
"""Dtypes of the gradients, the weights' own first, by name of the storage format."""


@dataclass(frozen=True)
class Case:
    """One optimizer with one set of arguments on one kind of tensors."""

    cls: type[Optimizer]
    variant: dict[str, Any]
    weight_dtype: torch.dtype
    grad_dtype: torch.dtype
    master: str | None
    """Format of masters, the optimizer's argument; None: no multi_precision."""
    state_dtype: Choice
    """Format of states, the optimizer's argument; None: the (master) weight's dtype."""
    option: str
    """Key of OPTIONS, whose arguments the case has."""

    @property
    def storage(self) -> str:
        """Name of the storage format, a key of CHECKED; empty for what is not in there."""
        stored = self.weight_dtype, self.master, self.state_dtype
        known = ((name, FORMATS[name]) for name in CHECKED)
        return next((name for name, fmt in known if (fmt.dtype, fmt.master, fmt.state_dtype) == stored), "")

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that the optimizer is constructed with."""
        master: dict[str, Any] = {"multi_precision": True} if self.master else {}
        if self.master not in (None, "fp32"):
            master["master"] = self.master
        states = {} if self.state_dtype is None else {"state_dtype": self.state_dtype}
        option = {key: value for key, value in OPTIONS[self.option].items() if key != "wd" or self.cls.decays}
        return {"learning_rate": LEARNING_RATE, **self.variant, **option, **master, **states}

    @property
    def has_kernel(self) -> bool:
        """Whether the optimizer, left alone, takes a fused step where it can."""
        if self.cls.fused_step is not Optimizer.fused_step:
            return True
        return self.cls.step is Optimizer.step and bool(self.cls(**self.arguments).phases)

    @property
    def rereads_states(self) -> bool:
        """Whether the weights depend on how the new states were rounded."""
        return self.state_dtype is not None and self.cls.rereads_states

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the arithmetic. A step of the user's own works in the weights' dtype."""
        if self.cls.step is not Optimizer.step and not self.master:
            return self.weight_dtype
        return torch.float64 if self.weight_dtype == torch.float64 else torch.float32


@dataclass
class CheckResult:
    """Outcome of a case. Errors are the largest of all steps and elements, in ulp of the dtype of storage.

    The error of a state in fewer bits is the distance to the next number that it could have been stored as.
    """

    optimizer: str
    arguments: dict[str, Any]
    """Arguments to construct it with."""
    variant: dict[str, Any]
    """Arguments among these that are a variant of the optimizer."""
    option: str
    """Key of OPTIONS that the rest of these are of."""
    weight_dtype: str
    grad_dtype: str
    master: str | None
    """Format of the weights' master, a key of MASTERS. None: there is none."""
    state_dtype: Choice
    """Format of states. None: the (master) weight's dtype."""
    fused_vs_reference: float | None = None
    """Largest error of the weights, fused against reference. None: not compared."""
    fused_vs_truth: float | None = None
    """Largest error of the weights, fused against the truth. None: not compared."""
    reference_vs_truth: float | None = None
    """Largest error of the weights, reference against the truth. None: not compared."""
    states: float | None = None
    """Largest error of states and masters in any of the three. None: not compared, or there are none."""
    passed: bool = True
    reason: str = ""
    """Reason why it failed, or why something was not compared; empty: neither."""

    def enter(self, column: str, error: float) -> None:
        """Keep the larger error. Infinity becomes the largest number, which JSON can say."""
        setattr(self, column, max(getattr(self, column) or 0.0, min(error, sys.float_info.max)))

    def fail(self, reason: str) -> None:
        """Mark as failed; the first reason stays."""
        if self.passed:
            self.passed, self.reason = False, reason


def unchecked(case: Case) -> CheckResult:
    """Make the result of a case that was not checked yet."""
    return CheckResult(
        case.cls.__name__.lower(),
        case.arguments,
        case.variant,
        case.option,
        str(case.weight_dtype).removeprefix("torch."),
        str(case.grad_dtype).removeprefix("torch."),
        case.master,
        case.state_dtype,
    )


MEASURED = [field.name for field in fields(CheckResult) if field.default is not MISSING]
"""Fields of a result that checking its case fills; the rest is known before."""


def check_formats(names: Sequence[str]) -> None:
    """Raise ValueError for a storage format that is not CHECKED."""
    for name in names:
        if name not in CHECKED:
            known = ", ".join(CHECKED)
            raise ValueError(f"unknown format {name!r}{did_you_mean(name, list(CHECKED))} known: {known}")


def find_cases(
    classes: Sequence[type[Optimizer]] | None = None, quick: bool = False, formats: Sequence[str] = ()
) -> list[Case]:
    """List the cases to check.

    Args:
        classes: optimizers; None: all that are registered.
        quick: whether to leave out most combinations.
        formats: keys of CHECKED, of which to list the cases; none: of all.
    """
    check_formats(formats)
    cases = []
    chosen = {name: grad_dtypes for name, grad_dtypes in CHECKED.items() if not formats or name in formats}
    for cls in registered() if classes is None else classes:
        for variant, (name, grad_dtypes), option in product(cls.variants, chosen.items(), OPTIONS):
            storage = FORMATS[name]
            # What the options do comes before anything is stored: one of them will do for most formats.
            is_special = storage.master not in (None, "fp32") or storage.state_dtype is not None
            if option == "plain" and (is_special or (quick and storage.dtype != torch.float32)):
                continue
            if is_special and not _goes_with(cls, variant, storage):
                continue
            for grad_dtype in grad_dtypes[:1] if quick else grad_dtypes:
                stored = storage.dtype, grad_dtype, storage.master, storage.state_dtype
                cases.append(Case(cls, dict(variant), *stored, option))
    return cases


def _goes_with(cls: type[Optimizer], variant: dict[str, Any], storage: StorageFormat) -> bool:
    """Whether the optimizer takes these, as its documentation says, and they change anything."""
    if cls.step is not Optimizer.step or cls.fused_step is not Optimizer.fused_step:
        return False
    try:
        opt = cls(**variant, state_dtype=storage.state_dtype)
        launches, formats = opt.phases, opt.state_formats()
    except Exception:  # the result that shows it will say why
        return True
    if storage.state_dtype is not None and all(fmt is PLAIN for fmt in formats):
        return False
    return not storage.weight_format.draws or all(phase.is_driver for phase in launches)
