"""Attributes of an optimizer that were assigned after its constructor had checked them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cache
from operator import is_
from typing import TYPE_CHECKING, Any

from tritopt.engine import validate
from tritopt.mxnet.rates import Rates

if TYPE_CHECKING:
    from tritopt.mxnet.update import Update


def parameters_of(function: Callable[..., Any] | None) -> list[str]:
    """Names of a constructor's named parameters; none where there is no constructor."""
    if function is None:
        return []
    skipped = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name for name, p in inspect.signature(function).parameters.items() if p.kind not in skipped and name != "self"
    ]


@cache
def _hyperparameters(cls: Any) -> dict[Any, tuple[str, ...]]:
    """The package's rules that a class stands on, and what the constructor of each takes.

    They are asked one by one, since a class may settle what the one above it takes.
    """
    own = [one for one in cls.__mro__ if one.__module__.startswith("tritopt.optimizers.")]
    return {one: tuple(parameters_of(vars(one).get("__init__"))) for one in own if not issubclass(one, Rates)}


def check_kinds(rescale_grad: Any, param_dict: Any, lr_scheduler: Any, param_idx2name: Any) -> None:
    """Raise for arguments of a constructor that are of the wrong kind."""
    validate.rescale(rescale_grad)
    if param_dict is not None and not isinstance(param_dict, Mapping):
        raise TypeError(f"param_dict={param_dict!r} must be a dict of parameters by index")
    if lr_scheduler is not None and not callable(lr_scheduler):
        raise TypeError(f"lr_scheduler={lr_scheduler!r} must be an LRScheduler, or any callable with a base_lr")
    if param_idx2name is not None and not isinstance(param_idx2name, dict):
        raise TypeError(f"param_idx2name={param_idx2name!r} must be a dict of names by index")


def check_clip(opt: Update) -> None:
    """Raise for a `max_grad_norm` that is no bound, or that does not go with the rest."""
    validate.clip_bound("max_grad_norm", opt.max_grad_norm)
    if opt.max_grad_norm is not None:
        check_norm(opt, f"max_grad_norm={opt.max_grad_norm!r}")


def check_norm(opt: Update, asked_by: str) -> None:
    """ValueError unless an optimizer can measure the norm of gradients, which `asked_by` takes."""
    if opt._overrides_step():
        raise ValueError(
            f"{asked_by} is not for {type(opt).__name__}, which overrides step and takes "
            "gradients as they are: call tritopt.clip_global_norm, or define scalars() and reference() in place of step"
        )
    if opt.aggregate_num != math.inf:
        raise ValueError(
            f"{asked_by} is of all gradients together, and aggregate_num={opt.aggregate_num!r} splits them "
            "into several updates: leave aggregate_num at None"
        )


def check_settings(opt: Update) -> None:
    """Raise what the constructor raises for a value that one of its arguments now has as an attribute.

    The package's own rules are asked by making another one of these values; a user's constructor may do more than
    check.
    """
    validate.positive_or_none("clip_gradient", opt.clip_gradient)
    if opt.clip_gradient is not None:
        validate.number("clip_gradient", opt.clip_gradient)
    validate.boolean("multi_precision", opt.multi_precision)
    validate.count("rounding_seed", opt.rounding_seed)
    validate.nonnegative_count("aggregate_num", opt.aggregate_num)
    check_clip(opt)
    if opt.use_fused_step is not None:
        validate.boolean("use_fused_step", opt.use_fused_step)
    cls: Any = type(opt)
    own = _hyperparameters(cls)
    names = [name for arguments in own.values() for name in arguments if name in vars(opt)]
    values = [opt.master, opt.state_dtype, *[getattr(opt, name) for name in names]]
    if len(values) == len(opt._checked) and all(map(is_, values, opt._checked)):
        return
    for rule, arguments in own.items():
        rule(**{name: getattr(opt, name) for name in arguments if name in vars(opt)})
    if own and cls.__module__.startswith("tritopt."):
        cls(master=opt.master, state_dtype=opt.state_dtype)
    opt._checked = tuple(values)
