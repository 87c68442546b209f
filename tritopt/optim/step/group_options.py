"""Options of param_groups, read again only where they have changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch

from tritopt.engine import validate
from tritopt.engine.walk import walk
from tritopt.optim.step.members import Number, lives_on_device, rate
from tritopt.optim.step.owner import Owner
from tritopt.rule import Rule

_SETTLED = (float, int, bool, str, torch.dtype, type(None))
"""Types whose values do not change without becoming other objects."""
_LISTS = ("params", "param_names")


class GroupOptions(NamedTuple):
    """Options of one param_group, as a step needs them."""

    rate: Number
    """Learning rate; a tensor, fp64 [], where it is read on the device."""
    common: tuple[float, float, float]
    """Rescale (-1 to maximize), clip bound (inf: none), weight decay."""
    rule: Rule
    build_key: tuple[Any, ...]
    """(fused, differentiable, multi_precision, master, state_dtype): a step is built again where these change."""
    on_device: bool
    """Whether scalars are formed on the device, from a learning rate or steps that live there."""


class OptionsByGroup:
    """Options of some param_groups, with numbers that tell whether they have changed."""

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] = []
        self.lists: list[list[torch.Tensor]] = []
        """Lists of the groups' parameters."""
        self.rates: dict[int, Number] = {}
        """Learning rates by `id` of the group."""
        self.on_device = False
        self.version = 0
        """Incremented by any change except of learning rates that are read on the device."""
        self.structure_version = 0
        """Incremented by changes other than of learning rates."""
        self._of_groups: list[GroupOptions] = []
        self._values: list[tuple[Any, ...]] = []
        self._unsettled: list[int] = []
        self._walk = walk()

    def refresh(self, opt: Owner, groups: Sequence[dict[str, Any]]) -> None:
        """Take up what has changed. ValueError for values out of range; then nothing is taken up."""
        groups = list(groups)
        if not self._walk.same(groups, self.groups):
            options = [_options_of(opt, group) for group in groups]
            self._unsettled = [i for i, group in enumerate(groups) if not _is_settled(group)]
            self._values = [_items(group) for group in groups]
            self.groups = groups
            self._take(options)
            # Equal or not: what was derived knows the groups by their identity.
            self.version += 1
            self.structure_version += 1
            return
        moved = self._walk.changed(groups, self._values)
        if not self._unsettled and (not moved or self._takes_rates(moved)):
            return
        options, unsettled = list(self._of_groups), set(self._unsettled)
        for i in {*moved, *unsettled}:
            options[i] = _options_of(opt, groups[i])
        for i in moved:
            self._values[i] = _items(groups[i])
            (unsettled.discard if _is_settled(groups[i]) else unsettled.add)(i)
        self._unsettled = sorted(unsettled)
        self._take(options)

    def _takes_rates(self, moved: Sequence[int]) -> bool:
        """Take up new learning rates, which a scheduler sets in each step. False, and nothing taken, if more is new."""
        taken = []
        for i in moved:
            group = self.groups[i]
            values, before = _items(group), self._values[i]
            lr = group.get("lr")
            if type(lr) is not float or not 0.0 <= lr < math.inf or len(values) != len(before):
                return False
            at = 2 * list(group.keys()).index("lr") + 1
            if type(before[at]) is not float:
                return False
            if not all(map(is_, values[:at], before[:at])) or not all(map(is_, values[at + 1 :], before[at + 1 :])):
                return False
            taken.append((i, values, lr))
        for i, values, lr in taken:
            self._values[i] = values
            old = self._of_groups[i]
            if lr != old.rate:
                self._of_groups[i] = GroupOptions(lr, *old[1:])
                self.rates[id(self.groups[i])] = lr
                self.version += 1
        return True

    def of(self, group: dict[str, Any]) -> GroupOptions:
        """Options of one of the groups."""
        return self._of_groups[self._places[id(group)]]

    def _take(self, options: list[GroupOptions]) -> None:
        is_same = len(options) == len(self._of_groups) and all(map(_agree, options, self._of_groups))
        self._of_groups = options
        self._places = {id(group): i for i, group in enumerate(self.groups)}
        self.lists = [group["params"] for group in self.groups]
        self.rates = {id(group): of_group.rate for group, of_group in zip(self.groups, options, strict=True)}
        self.on_device = any(of_group.on_device for of_group in options)
        self.version += not is_same
        self.structure_version += not is_same


def _items(group: dict[str, Any]) -> tuple[Any, ...]:
    """Keys and values in turn, which `Walk.changed` compares."""
    return tuple(chain.from_iterable(group.items()))


def _agree(a: GroupOptions, b: GroupOptions) -> bool:
    if a[1:] != b[1:] or isinstance(a.rate, torch.Tensor) != isinstance(b.rate, torch.Tensor):
        return False
    return isinstance(a.rate, torch.Tensor) or a.rate == b.rate


def _refuse_derivatives(group: dict[str, Any]) -> None:
    """ValueError for hyperparameters that wait for a derivative which no step gives them."""
    for name, value in group.items():
        for number in value if isinstance(value, tuple | list) and name not in _LISTS else (value,):
            if isinstance(number, torch.Tensor) and number.requires_grad:
                raise ValueError(
                    f"differentiable=True differentiates by gradients and weights, and {name}={value!r} requires a "
                    "gradient: pass numbers or a detached tensor, or take torch.optim's class for this derivative"
                )


def _options_of(opt: Owner, group: dict[str, Any]) -> GroupOptions:
    opt.check_group(group)
    if group.get("differentiable"):
        _refuse_derivatives(group)
    rule = opt.rule_of(group)
    bound = validate.bound_or(group["clip_value"], math.inf) if rule.clips else math.inf
    common = (-1.0 if group.get("maximize") else 1.0, bound, float(group.get("weight_decay", 0.0)))
    choice = group["state_dtype"]
    build_key = (
        *map(group.get, ("fused", "differentiable", "multi_precision", "master", "algorithm", "in_norm")),
        tuple(choice.items()) if isinstance(choice, dict) else choice,
        bound < math.inf,
    )
    return GroupOptions(rate(group), common, rule, build_key, bool(group["capturable"] or lives_on_device(group["lr"])))


def _is_settled(group: dict[str, Any]) -> bool:
    return all(name in _LISTS or _is_fixed(value) for name, value in group.items())


def _is_fixed(value: Any) -> bool:
    return all(map(_is_fixed, value)) if type(value) is tuple else type(value) in _SETTLED
