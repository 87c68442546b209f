"""Parameters chosen by name: exact names, shell patterns as `fnmatch` has them, compiled regular expressions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Container, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

Selector: TypeAlias = "str | re.Pattern[str]"
"""A name, a shell pattern of the whole name (`*`, `?`, `[...]`), or a compiled expression that `search` finds in it."""

_WILDCARDS = frozenset("*?[")
N_NEAREST = 3


def is_pattern(key: object) -> bool:
    """Whether it is a pattern, and not a name."""
    if isinstance(key, re.Pattern):
        if not isinstance(key.pattern, str):
            raise TypeError(f"{key!r} is an expression for bytes, and names of parameters are str")
        return True
    return isinstance(key, str) and not _WILDCARDS.isdisjoint(key)


def matches(key: Selector, name: str) -> bool:
    """Whether a selector chooses this name; the case counts."""
    if isinstance(key, re.Pattern):
        return key.search(name) is not None
    return key == name or (is_pattern(key) and fnmatchcase(name, key))


def first_match(keys: Collection[Any], name: str) -> Any:
    """The key that chooses a name: the name itself if it is one of them, or else the first pattern; None if none does.

    >>> first_match(["*", "*.bias", "fc.bias"], "fc.bias"), first_match(["*.bias", "*"], "conv.bias")
    ('fc.bias', '*.bias')
    """
    if name in keys:
        return name
    return next((key for key in keys if is_pattern(key) and matches(key, name)), None)


def unmatched(keys: Iterable[Any], names: Iterable[str], known: Container[Any] = ()) -> list[Selector]:
    """The selectors among some keys that choose none of these names and are not `known` for another reason."""
    names = list(names)
    given = [key for key in keys if isinstance(key, str | re.Pattern) and not (isinstance(key, str) and key in known)]
    return [key for key in given if not any(matches(key, name) for name in names)]


def shown(key: object) -> str:
    """A selector as it is written in a program."""
    return f"re.compile({key.pattern!r})" if isinstance(key, re.Pattern) else repr(key)


def no_match(key: Selector, names: Iterable[str]) -> str:
    """Message that a selector chooses nothing, with the names that come nearest.

    >>> no_match("*.biass", ["fc.weight", "fc.bias", "norm.scale"])
    "'*.biass' matches no parameter; the nearest are 'fc.bias', 'norm.scale', 'fc.weight'"
    """
    text = key.pattern if isinstance(key, re.Pattern) else key
    wanted = re.sub(r"\\.|[^\w.]", lambda match: "." if match[0] == r"\." else "", text).strip(".")
    # A pattern mostly says the end of a name, so the ends of names are compared with it as well.
    ends: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            ends.setdefault(".".join(parts[i:]), name)
    near = difflib.get_close_matches(wanted, ends, n=len(ends), cutoff=0.0) if ends else []
    nearest = list(dict.fromkeys(ends[end] for end in near))[:N_NEAREST]
    told = f"; the nearest are {', '.join(map(repr, nearest))}" if nearest else "; there are no names"
    return f"{shown(key)} matches no parameter{told}"


def uncompiled(name: str) -> str:
    """Name of a parameter as it was before torch.compile wrapped its module."""
    return name.replace("_orig_mod.", "")
