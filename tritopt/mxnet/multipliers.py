"""Multipliers of learning rate and weight decay by index, name or pattern, and how they are saved."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch

from tritopt.engine.names import first_match, is_pattern, no_match, shown, unmatched
from tritopt.engine.warning import warn

_PLAIN = {torch.Tensor, torch.nn.Parameter}
_attributes = attrgetter("__dict__")


class Factors:
    """Multipliers of parameters, looked up once for as long as they and the names of parameters stay the same."""

    def __init__(self) -> None:
        self._given: dict[Any, float] = {}
        self._names: dict[Any, str] = {}
        self._indices: list[Hashable] = []
        self._factors: list[float] = []

    def __reduce__(self) -> tuple[type[Factors], tuple[()]]:
        """A copy looks them up again."""
        return Factors, ()

    def of(self, indices: Sequence[Hashable], given: Mapping[Any, float], names: Mapping[Any, str]) -> list[float]:
        """Multiplier of each index: under itself, its name, or the first pattern that matches the name; otherwise 1.

        The same list as long as it says the same.
        """
        is_known = given == self._given and names == self._names and list(given) == list(self._given)
        if not is_known or self._indices != list(indices):
            self._given, self._names, self._indices = dict(given), dict(names), list(indices)
            self._factors = [self._look_up(index) for index in indices]
        return self._factors

    def _look_up(self, index: Hashable) -> float:
        if index in self._given:
            return self._given[index]
        name = self._names.get(index)
        key = None if name is None else first_match(self._given, name)
        return 1.0 if key is None else self._given[key]


def carried(objects: Sequence[Any], attribute: str) -> list[Any] | None:
    """The attribute `attribute` of each object, None where it has none; None if none has it. Attributes are read live.

    torch's own parameters have none but those in their `__dict__`: to ask that takes a tenth of the time.
    """
    if not set(map(type, objects)) <= _PLAIN:
        return [getattr(one, attribute, None) for one in objects]
    if not any(map(_attributes, objects)):
        return None
    values = [attributes.get(attribute) for attributes in map(_attributes, objects)]
    return None if values.count(None) == len(values) else values


def check_names(
    attribute: str, keys: Iterable[Any], names: Mapping[Any, str], params: Mapping[Any, Any], is_strict: bool
) -> None:
    """Warn of names and patterns that match no parameter.

    Where neither names nor parameters are known, nothing can be said about a name, as in MXNet.

    Raises:
        ValueError: patterns, and no names; one that matches nothing, if `is_strict`.
    """
    keys = list(keys)
    patterns = [key for key in keys if is_pattern(key)]
    if patterns and not names:
        raise ValueError(
            f"{attribute}: {shown(patterns[0])} is matched with names of parameters, and none has a name: construct it "
            "with param_idx2name=tritopt.module_parameters(model).idx2name, or a Trainer with named parameters"
        )
    if not (names or params):
        return
    for key in unmatched(keys, names.values(), {*names, *params}):
        message = f"{attribute}: {no_match(key, names.values())}"
        if is_strict:
            raise ValueError(message)
        warn(f"{message}; strict=True makes this an error")


def packed(multipliers: Mapping[Any, float]) -> list[tuple[Any, ...]]:
    """Multipliers as plain data: (key, multiplier), or (expression, multiplier, flags) for a compiled one."""
    return [
        (key.pattern, value, key.flags) if isinstance(key, re.Pattern) else (key, value)
        for key, value in multipliers.items()
    ]


def unpacked(saved: Any) -> dict[Any, float]:
    """Multipliers that `packed` has packed, or those of a save that knew no expressions: a dict."""
    if isinstance(saved, dict):
        return saved
    return {re.compile(key, *flags) if flags else key: value for key, value, *flags in saved}
