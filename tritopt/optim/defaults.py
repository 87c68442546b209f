"""torch's own argument checks and defaults, of the version that is installed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from tritopt.engine import private

HOW = ("fused", "foreach", "capturable", "differentiable", "multi_precision", "master", "state_dtype")
"""Keys of a param_group that say how to compute and to store, not what."""
_SYNONYMS = {
    "max_grad_norm": ("max_norm", "clip_norm", "clip_grad", "clip_grad_norm", "grad_clip", "grad_clip_norm",
                      "grad_norm", "gradient_clip", "gradient_clip_val", "gradient_clipping", "global_clipnorm"),
    "clip_value": ("clip_gradient", "clip_grad_value", "clipvalue", "grad_clip_value"),
    "weight_decay": ("wd", "decay", "l2"),
    "lr": ("learning_rate", "alpha", "eta"),
    "eps": ("epsilon",),
    "betas": ("beta1", "beta2", "b1", "b2"),
    "multi_precision": ("mixed_precision", "master_weights", "use_master_weights"),
    "state_dtype": ("optim_bits", "state_bits", "state_precision"),
    "rounding_seed": ("seed",),
}  # fmt: skip
MEANT = {word: name for name, words in _SYNONYMS.items() for word in words}
"""Our keyword for what other libraries call otherwise, by their word."""


class WrongKindError(TypeError, ValueError):
    """A value of a type that cannot be: the first of a constructor's argument, the second of a param_group's value."""


def torch_defaults(torch_class: type[torch.optim.Optimizer], **arguments: Any) -> dict[str, Any]:
    """The defaults of torch's optimizer for these arguments; raises what it raises.

    WrongKindError also for values of another kind than its constructor's own, which torch takes ("no" is true) or
    stumbles over.
    """
    kinds = arguments_of(torch_class)
    for name, value in arguments.items():
        check_kind(name, value, kinds[name])
    dummy = torch.zeros(1, 1, dtype=torch.float32, device="cpu")  # a matrix, for Muon
    # As torch's, but that its first one is made in microseconds and not in a second.
    add_param_group = private.without_dynamo(torch_class.add_param_group)
    same_class = type(torch_class.__name__, (torch_class,), {"add_param_group": add_param_group})
    defaults: dict[str, Any] = same_class([dummy], **arguments).defaults
    return defaults


def arguments_of(cls: Any) -> Mapping[str, Any]:
    """Names of the optional arguments of a class's constructor and of its bases', and what they are by default."""
    return _arguments_of(cls)


@cache
def _arguments_of(cls: Any) -> Mapping[str, Any]:
    defaults: dict[str, Any] = {}
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        parameters = inspect.signature(init).parameters if inspect.isfunction(init) else {}
        for name, parameter in parameters.items():
            if parameter.default is not parameter.empty:
                defaults.setdefault(name, parameter.default)
    return MappingProxyType(defaults)


def check_kind(name: str, value: Any, like: Any) -> None:
    """WrongKindError unless a hyperparameter is of the kind of a default: a bool, a number, or as many numbers."""
    if isinstance(like, bool):
        check_flag(name, value)
    elif isinstance(like, tuple):
        if not isinstance(value, list | tuple) or len(value) != len(like):
            raise WrongKindError(f"{name}={value!r} must be {len(like)} numbers")
        for one, its in zip(value, like, strict=True):
            if not (one is None and its is None):
                _check_number(name, value, one)
    elif isinstance(like, Real):
        _check_number(name, value, value)


def check_flag(name: str, value: Any) -> None:
    """WrongKindError unless `value` is true or false: a configuration file's "False" is true."""
    if not isinstance(value, Real | np.bool_) or value not in (0, 1):
        raise WrongKindError(f"{name}={value!r} must be True or False")


def _check_number(name: str, value: Any, one: Any) -> None:
    is_scalar = isinstance(one, torch.Tensor) and not one.is_complex() and (one.numel() == 1 or name in ("lr", "betas"))
    if not isinstance(one, Real) and not is_scalar:  # torch has words of its own for these with more elements
        raise WrongKindError(f"{name}={value!r} must be a number" + ("" if one is value else f", and not {one!r}"))


def floats(value: Any) -> Any:
    """The numbers of a tuple as floats."""
    return tuple(float(x) if isinstance(x, Real) else x for x in value) if isinstance(value, tuple) else value


def plain(value: Any, like: Any = None) -> Any:
    """Hashable, and without tensors: a hyperparameter as the rule takes it. like: its default in torch."""
    if isinstance(like, bool) and isinstance(value, Real | np.bool_) and value in (0, 1):
        return bool(value)
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"a hyperparameter of shape {tuple(value.shape)} must be a tensor of one element")
        return value.item()
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value
