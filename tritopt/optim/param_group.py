"""Param_groups: what they hold beside what checkpoints do, and whether their settings can be."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from tritopt.engine import validate
from tritopt.engine.state_dtype import checked
from tritopt.optim.defaults import arguments_of, check_flag
from tritopt.optim.layout import checked_master
from tritopt.rule import Rule

_OPTIONAL = {"clip_value": None, "flatten": None, "split": None, "split_dim": -2, "ns_dtype": "bf16", "beta2": None}
"""Keys that torch's classes lack, and values that make of a group what it would be there: these are not saved."""


class ParamGroup(dict[str, Any]):
    """A param_group that has everything for who asks, and for who iterates over it what a checkpoint holds.

    torch.distributed.checkpoint iterates over a param_group to find out which keys a flattened checkpoint must have.

    Args:
        group: its keys and values.
        unsaved: keys that checkpoints do not hold.
    """

    def __init__(self, group: Mapping[str, Any], unsaved: Collection[str]) -> None:
        super().__init__(group)
        self.unsaved = unsaved

    def __iter__(self) -> Iterator[str]:
        """The keys that `state_dict` has."""
        return iter(saved(self, self.unsaved))


def refusal(param: torch.Tensor) -> str:
    """Reason, after an optimizer's name, why it takes no parameter of this dtype; empty if it takes it."""
    if param.is_complex():
        return "does not support complex parameters: optimize torch.view_as_real(parameter)"
    return "" if param.dtype in validate.WEIGHT_DTYPES else "takes float16 to float64 parameters"


def check_dtypes(optimizer: str, params: Sequence[torch.Tensor]) -> None:
    """ValueError for a parameter that no step can update. Frozen ones may be of any dtype, such as packed integers."""
    for param in params:
        if param.requires_grad and (why := refusal(param)):
            raise ValueError(f"a parameter is {param.dtype}, and {optimizer} {why}")


def is_kept(param: torch.Tensor) -> bool:
    """Whether a parameter has a shape, which a lazy module's gets later, and a dtype that can be updated."""
    return not is_lazy(param) and param.dtype in validate.WEIGHT_DTYPES


def declared(optimizer: Any) -> dict[str, Any]:
    """Defaults of the hyperparameters that an optimizer's class declares: an older pickle may lack some."""
    known = arguments_of(type(optimizer))
    return {name: known[name] for name in optimizer.arguments if name in known}


def saved(group: Mapping[str, Any], unsaved: Collection[str]) -> dict[str, Any]:
    """The part of a group that a checkpoint holds: what torch's does, and beyond that what is set."""
    return {
        name: value
        for name, value in group.items()
        if name not in unsaved and not (name in _OPTIONAL and value == _OPTIONAL[name])
    }


def check_settings(cls: type, defaults: Mapping[str, Any], group: dict[str, Any]) -> None:
    """ValueError unless a group has all keys, and flags, formats and bounds that the constructor takes."""
    missing = [name for name in defaults if name not in group]
    if missing:
        raise ValueError(
            f"a param_group lacks {missing[0]!r}: give it a value, such as the default of this "
            f"{cls.__name__}, {defaults[missing[0]]!r}"
        )
    for name, default in arguments_of(cls).items():
        if isinstance(default, bool) or (name in ("foreach", "fused") and group.get(name) is not None):
            check_flag(name, group.get(name, default))
    check_flag("multi_precision", group["multi_precision"])
    checked_master(group["master"])
    checked(group["state_dtype"])
    validate.clip_bound("clip_value", group["clip_value"])


def rule_from(rule_class: type[Rule], names: Mapping[str, str | tuple[str, ...]], values: Mapping[str, Any]) -> Rule:
    """Make a rule with a param_group's values. names: the rule's names of keys, which errors name as the group does."""
    arguments: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for key, target in names.items():
        if isinstance(target, str):
            arguments[target], keys[target] = values[key], key
        else:
            arguments.update(zip(target, values[key], strict=True))
            keys.update((name, f"{key}[{i}]") for i, name in enumerate(target))
    try:
        return rule_class(**arguments)
    except (TypeError, ValueError) as error:
        name, equals, rest = str(error).partition("=")  # "epsilon=-1.0 must be ..."
        error.args = (keys.get(name, name) + equals + rest,)
        raise
