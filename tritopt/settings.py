"""Attributes of an optimizer that were assigned after its constructor had checked them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from operator import is_
from typing import TYPE_CHECKING, Any

from tritopt import validate

if TYPE_CHECKING:
    from tritopt.optimizer import Optimizer


def parameters_of(function: Callable[..., Any] | None) -> list[str]:
    """Names of a constructor's named parameters; none where there is no constructor."""
    if function is None:
        return []
    skipped = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name for name, p in inspect.signature(function).parameters.items() if p.kind not in skipped and name != "self"
    ]


@cache
def _own_parameters(cls: Any, base: Any) -> tuple[str, ...]:
    """What the constructors of a class take beside the base's arguments."""
    inits = (vars(one).get("__init__") for one in cls.__mro__ if issubclass(one, base) and one is not base)
    names = dict.fromkeys(name for init in inits for name in parameters_of(init))
    return tuple(name for name in names if name not in parameters_of(base.__init__))


def check_settings(opt: Optimizer, base: Any) -> None:
    """Raise what the constructor raises for a value that one of its arguments now has as an attribute.

    The package's own classes are asked by making another one of these values; a user's constructor may do more than
    check.
    """
    validate.positive_or_none("clip_gradient", opt.clip_gradient)
    if opt.clip_gradient is not None:
        validate.number("clip_gradient", opt.clip_gradient)
    validate.boolean("multi_precision", opt.multi_precision)
    validate.count("rounding_seed", opt.rounding_seed)
    validate.nonnegative_count("aggregate_num", opt.aggregate_num)
    if opt.use_fused_step is not None:
        validate.boolean("use_fused_step", opt.use_fused_step)
    cls: Any = type(opt)
    names = [name for name in _own_parameters(cls, base) if name in vars(opt)]
    values = [opt.master, opt.state_dtype, *[getattr(opt, name) for name in names]]
    if len(values) == len(opt._checked) and all(map(is_, values, opt._checked)):
        return
    if cls.__module__.startswith("tritopt."):
        cls(master=opt.master, state_dtype=opt.state_dtype, **dict(zip(names, values[2:], strict=True)))
    opt._checked = tuple(values)
