"""`param_groups`: from names of parameters and patterns of them to the param_groups of any torch optimizer."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from tritopt.engine.names import Selector, is_pattern, matches, no_match, shown, uncompiled, unmatched

Settings: TypeAlias = Mapping[str, Any]
DEFAULT = "default"
_OWN_KEYS = ("params", "param_names", "name")


class ParamGroups(list[dict[str, Any]]):
    """The groups that `param_groups` has made; printed as a table. An optimizer takes them as they are."""

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("pattern")
        for column in ("tensors", "elements"):
            table.add_column(column, justify="right")
        table.add_column("settings")
        width = 100
        for group in self:
            params = [param[1] if isinstance(param, tuple) else param for param in group["params"]]
            settings = ", ".join(f"{key}={value!r}" for key, value in group.items() if key not in _OWN_KEYS)
            table.add_row(group["name"], f"{len(params):,}", f"{sum(param.numel() for param in params):,}", settings)
            width = max(width, len(group["name"]) + len(settings) + 40)
        text = io.StringIO()
        Console(file=text, width=width).print(table)
        return text.getvalue().rstrip()

    __repr__ = __str__


def param_groups(
    model: nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    rules: Mapping[Any, Settings] | Sequence[tuple[Selector, Settings]],
    default: Settings | None = None,
    no_decay_1d: bool = False,
) -> ParamGroups:
    """Named param_groups for any torch optimizer, of parameters chosen by name.

    A selector is a name, a shell pattern of the whole name (`fnmatch`), or a compiled regular expression that is
    searched in it. A name comes before patterns. In a dict each parameter must be chosen by one pattern at most; in a
    list of pairs the first that matches wins.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    >>> groups = param_groups(model, {"*.bias": {"weight_decay": 0.0}}, default={"weight_decay": 0.1})
    >>> [(group["name"], [name for name, _ in group["params"]], group["weight_decay"]) for group in groups]
    [('*.bias', ['0.bias', '1.bias'], 0.0), ('default', ['0.weight', '1.weight'], 0.1)]
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)

    Args:
        model: a module, or named parameters. A parameter that has several names, as tied weights do, is chosen by any
            of them and is in one group, once, under its first name.
        rules: settings by selector: keys of a param_group such as `lr` and `weight_decay`.
        default: settings of the parameters that no rule chooses.
        no_decay_1d: give parameters of at most one dimension, biases and scales of norms, weight_decay=0 in a group of
            their own, unless the rule that chooses them says a weight_decay.

    Returns:
        A list of dicts with "params" (pairs of name and parameter), "name" (the selector, or "default") and the
        settings. Groups without parameters are left out.

    Raises:
        ValueError: a selector that chooses nothing, or nothing that those before it leave; a parameter that two
            patterns of a dict choose. TypeError: what is no selector or no settings.
    """
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    for key, settings in [*pairs, (DEFAULT, default or {})]:
        _check(key, settings)
    keys = [key for key, _ in pairs]
    names_of = _names_of(model)
    every_name = [name for names, _ in names_of for name in names]
    for key in unmatched(keys, every_name):
        raise ValueError(no_match(key, every_name))
    chosen: list[list[tuple[str, torch.Tensor]]] = [[] for _ in (*keys, DEFAULT)]
    for names, param in names_of:
        chosen[_choice(names, keys, is_ordered=not isinstance(rules, Mapping))].append((names[0], param))
    for key, pairs_of_key in zip(keys, chosen, strict=False):
        if not pairs_of_key:
            raise ValueError(f"{shown(key)} chooses no parameter that those before it leave: put it before them")
    groups = ParamGroups()
    for (key, settings), named in zip([*pairs, (DEFAULT, default or {})], chosen, strict=True):
        name = key.pattern if isinstance(key, re.Pattern) else key
        is_split = no_decay_1d and ("weight_decay" not in settings or named is chosen[-1])
        flat = [pair for pair in named if is_split and pair[1].dim() <= 1]
        rest = [pair for pair in named if not (is_split and pair[1].dim() <= 1)]
        groups += [{"params": rest, "name": name, **settings}] if rest else []
        groups += [{"params": flat, "name": f"{name}, 1-d", **settings, "weight_decay": 0.0}] if flat else []
    return groups


def _check(key: Any, settings: Any) -> None:
    if not isinstance(key, str | re.Pattern):
        raise TypeError(f"{key!r} chooses no parameters: give a name, a pattern such as '*.bias', or re.compile(...)")
    is_pattern(key)  # TypeError for an expression of bytes
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise TypeError(f"{shown(key)}: {settings!r} must be a dict of settings, such as {{'weight_decay': 0.0}}")
    for name in _OWN_KEYS:
        if name in settings:
            raise ValueError(f"{shown(key)}: {name!r} is the group's own key, so it cannot be a setting")


def _names_of(model: Any) -> list[tuple[list[str], torch.Tensor]]:
    """Each parameter once, with all of its names."""
    if isinstance(model, nn.Module):
        named = [(uncompiled(name), param) for name, param in model.named_parameters(remove_duplicate=False)]
    else:
        named = list(model.items() if isinstance(model, Mapping) else model)
    names_of: dict[int, tuple[list[str], torch.Tensor]] = {}
    for pair in named:
        is_pair = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
        if not (is_pair and isinstance(pair[1], torch.Tensor)):
            raise TypeError(
                f"a module or named parameters are expected, got {type(pair).__name__} {pair!r:.40}: pass "
                "named_parameters()"
            )
        if isinstance(pair[1], nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {pair[0]!r} has no shape yet: run the model once before it is grouped")
        names_of.setdefault(id(pair[1]), ([], pair[1]))[0].append(pair[0])
    if not names_of:
        raise ValueError(f"{model!r:.80} has no parameters")
    return list(names_of.values())


def _choice(names: list[str], keys: list[Selector], is_ordered: bool) -> int:
    """Place of the key that chooses a parameter with these names; -1 if none does."""
    exact = [i for i, key in enumerate(keys) if isinstance(key, str) and key in names]
    places = exact or [i for i, key in enumerate(keys) if is_pattern(key) and any(matches(key, name) for name in names)]
    if len(places) > 1 and not is_ordered:
        both = " and ".join(shown(keys[i]) for i in places[:2])
        raise ValueError(
            f"parameter {names[0]!r} is chosen by {both}: give a list of pairs, of which the first that matches wins, "
            "or its name, which comes before patterns"
        )
    return places[0] if places else -1
