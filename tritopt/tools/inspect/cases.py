"""Cases as the compiler needs them: the optimizer, how it stores, and the bytes that it must move."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tritopt.engine.validate import did_you_mean
from tritopt.mxnet import registry
from tritopt.mxnet.optimizer import Optimizer
from tritopt.mxnet.registry import with_api
from tritopt.tools.cost import Traffic, bytes_per_parameter
from tritopt.tools.inspect.record import Case
from tritopt.tools.optimizers import find_optimizers, torch_classes
from tritopt.tools.storage import FORMATS

NORM = "norm"
"""Name that stands for the global norm of the gradients, which max_grad_norm takes."""
GRAD_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def known_optimizers() -> dict[str, type[Optimizer]]:
    """Collect the registered optimizers by name, and the rules of tritopt.optim's classes that are not among them."""
    by_name = {name: registry.find(name) for name in registry.names()}
    of_torch = {with_api(cls.rule) for cls in torch_classes().values()}
    others = {cls.__name__.lower(): cls for cls in of_torch if cls not in by_name.values()}
    return {**by_name, **dict(sorted(others.items()))}


def find_key(name: str, known: Mapping[str, type[Optimizer]]) -> str:
    """Find the key for a name that users give an optimizer: one of `known`, NORM, or a "module:Class" itself."""
    if ":" in name:
        find_optimizers([name])
        return name
    prefix, _, last = name.lower().rpartition(".")
    torchs = {key.lower(): with_api(cls.rule) for key, cls in torch_classes().items()}
    if prefix in ("optim", "tritopt.optim") and last in torchs:
        return next(key for key, cls in known.items() if cls is torchs[last])
    if name.lower() in (*known, NORM):
        return name.lower()
    names = [*registry.names(), *(f"optim.{key}" for key in torch_classes()), NORM]
    near = did_you_mean(name.lower(), names)
    raise ValueError(f"unknown optimizer {name!r}{near} known: {', '.join(names)}; or my_module:MyOptimizer")


def class_of(key: str, known: Mapping[str, type[Optimizer]]) -> type[Optimizer]:
    """Find the class that a key of `known`, or a "module:Class", stands for."""
    return known[key] if key in known else find_optimizers([key])[0]


def stored_as(cls: type[Optimizer], case: Case) -> tuple[str, ...]:
    """Tell how the optimizer stores weights and states; ValueError if it does not take the format."""
    opt = make(cls, case)
    traffic_of(opt, case)
    return (case.storage.partition("+")[0], *(fmt.name for fmt in opt.state_formats()))


def make(cls: type[Optimizer], case: Case) -> Optimizer:
    """Construct the case's optimizer; ValueError if it does not take the format."""
    return cls(**case.arguments, **FORMATS[case.storage].rule_arguments)


def grad_dtype_of(case: Case) -> torch.dtype:
    """Tell the dtype of the case's gradients."""
    return FORMATS[case.storage].dtype if case.grad_dtype is None else GRAD_DTYPES[case.grad_dtype]


def traffic_of(opt: Optimizer, case: Case) -> Traffic:
    """Tell the bytes per parameter that the case's step must move."""
    storage = FORMATS[case.storage]
    return bytes_per_parameter(opt, storage.dtype, grad_dtype_of(case), storage.weight_format)
