"""Constructors of MXNet's face: made for a rule, and their error for an unknown keyword."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from tritopt.engine import validate
from tritopt.mxnet.settings import parameters_of


def constructor_of(cls: Any, rule: type, default: float) -> Any:
    """`__init__` with the learning rate first, then what the rule's takes."""

    def __init__(self: Any, learning_rate: float | None = default, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        super(cls, self).__init__(*args, learning_rate=learning_rate, **kwargs)

    first, *rest = inspect.signature(__init__).parameters.values()
    of_rule = [p for p in inspect.signature(rule).parameters.values() if p.name != "common"]
    keywords = rest[-1]
    __init__.__signature__ = inspect.Signature([first, rest[0], *of_rule, keywords])  # type: ignore[attr-defined]
    return __init__


def unknown_keywords(cls: Any, unknown: Iterable[str]) -> str:
    """The message for keywords that no constructor of a class takes, with the nearest that one does."""
    names = {name for base in cls.__mro__[:-1] for name in parameters_of(vars(base).get("__init__"))}
    known = sorted(names if cls.supports_lazy_update else names - {"lazy_update"})
    complaints = [f"{name!r}{validate.did_you_mean(name, known)}" for name in unknown]
    return f"{cls.__name__}() has no argument {' '.join(complaints)} known: {', '.join(known)}"
