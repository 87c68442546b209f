"""What the param_groups say, read again only where it has changed."""

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


class Hyper(NamedTuple):
    """One group's."""

    rate: Number
    """fp64 [] where it is read on the device."""
    common: tuple[float, float, float]
    """Rescale, clip bound, decay."""
    rule: Rule
    way: tuple[Any, ...]
    """What decides how the step is made."""
    on_device: bool
    """Whether its scalars are formed there."""


class Hypers:
    """Of some param_groups."""

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] = []
        self.lists: list[list[torch.Tensor]] = []
        """Their parameters."""
        self.rates: dict[int, Number] = {}
        """By `id` of the group."""
        self.on_device = False
        self.generation = 0
        """Counts the changes, but for those of rates that are read on the device."""
        self.kinds = 0
        """Likewise, but for those of any rates."""
        self._hypers: list[Hyper] = []
        self._values: list[tuple[Any, ...]] = []
        self._unsettled: list[int] = []
        self._walk = walk()

    def refresh(self, opt: Owner, groups: Sequence[dict[str, Any]]) -> None:
        """Take up what has changed. ValueError for values out of range; then nothing is taken up."""
        groups = list(groups)
        if not self._walk.same(groups, self.groups):
            hypers = [_hyper(opt, group) for group in groups]
            self._unsettled = [i for i, group in enumerate(groups) if not _is_settled(group)]
            self._values = [_items(group) for group in groups]
            self.groups = groups
            self._take(hypers)
            # Equal or not: what was derived knows the groups by their identity.
            self.generation += 1
            self.kinds += 1
            return
        moved = self._walk.changed(groups, self._values)
        if not self._unsettled and (not moved or self._takes_rates(moved)):
            return
        hypers, unsettled = list(self._hypers), set(self._unsettled)
        for i in {*moved, *unsettled}:
            hypers[i] = _hyper(opt, groups[i])
        for i in moved:
            self._values[i] = _items(groups[i])
            (unsettled.discard if _is_settled(groups[i]) else unsettled.add)(i)
        self._unsettled = sorted(unsettled)
        self._take(hypers)

    def _takes_rates(self, moved: Sequence[int]) -> bool:
        """What a scheduler does to all groups in each step. False if more than rates is new; then nothing is taken."""
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
            old = self._hypers[i]
            if lr != old.rate:
                self._hypers[i] = Hyper(lr, *old[1:])
                self.rates[id(self.groups[i])] = lr
                self.generation += 1
        return True

    def of(self, group: dict[str, Any]) -> Hyper:
        """Of one of the groups."""
        return self._hypers[self._places[id(group)]]

    def _take(self, hypers: list[Hyper]) -> None:
        is_same = len(hypers) == len(self._hypers) and all(map(_agree, hypers, self._hypers))
        self._hypers = hypers
        self._places = {id(group): i for i, group in enumerate(self.groups)}
        self.lists = [group["params"] for group in self.groups]
        self.rates = {id(group): hyper.rate for group, hyper in zip(self.groups, hypers, strict=True)}
        self.on_device = any(hyper.on_device for hyper in hypers)
        self.generation += not is_same
        self.kinds += not is_same


def _items(group: dict[str, Any]) -> tuple[Any, ...]:
    """Keys and values in turn, which `Walk.changed` compares."""
    return tuple(chain.from_iterable(group.items()))


def _agree(a: Hyper, b: Hyper) -> bool:
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


def _hyper(opt: Owner, group: dict[str, Any]) -> Hyper:
    opt.check_group(group)
    if group.get("differentiable"):
        _refuse_derivatives(group)
    rule = opt.rule_of(group)
    bound = validate.bound_or(group["clip_value"], math.inf) if rule.clips else math.inf
    common = (-1.0 if group.get("maximize") else 1.0, bound, float(group.get("weight_decay", 0.0)))
    choice = group["state_dtype"]
    way = (
        *map(group.get, ("fused", "differentiable", "multi_precision", "master")),
        tuple(choice.items()) if isinstance(choice, dict) else choice,
        bound < math.inf,
    )
    return Hyper(rate(group), common, rule, way, bool(group["capturable"] or lives_on_device(group["lr"])))


def _is_settled(group: dict[str, Any]) -> bool:
    return all(name in _LISTS or _is_fixed(value) for name, value in group.items())


def _is_fixed(value: Any) -> bool:
    return all(map(_is_fixed, value)) if type(value) is tuple else type(value) in _SETTLED
