"""Optimizers by name: `register`, `create`, `names`."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, TypeVar

from tritopt.engine.warning import warn

if TYPE_CHECKING:
    from tritopt.mxnet.optimizer import Optimizer

OPTIMIZERS: dict[str, type[Optimizer]] = {}
"""Registered classes by lower-cased class name."""

OptimizerClass = TypeVar("OptimizerClass", bound="type[Optimizer]")


def register(cls: OptimizerClass) -> OptimizerClass:
    """Class decorator: make `cls` known to `create` under its lower-cased name.

    A name that is taken is given to the new class, with a UserWarning. Raises TypeError for anything but a subclass.
    """
    from tritopt.mxnet.optimizer import Optimizer

    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"register() takes an Optimizer subclass, got {cls!r}")
    name = cls.__name__.lower()
    old = OPTIMIZERS.get(name)
    if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
        warn(f"optimizer {name!r}: {cls.__module__}.{cls.__qualname__} replaces {old.__module__}.{old.__qualname__}")
    OPTIMIZERS[name] = cls
    return cls


def create(name: str, **kwargs: Any) -> Optimizer:
    """Construct the optimizer registered as `name` (case does not matter) with `kwargs`.

    Raises ValueError for an unknown name, with the nearest known ones.

    >>> import tritopt
    >>> tritopt.create("sgd", learning_rate=0.5).learning_rate
    0.5
    >>> tritopt.create("lambb")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: unknown optimizer 'lambb'; did you mean 'lamb'...? known: ...
    """
    return find(name)(**kwargs)


def find(name: str) -> type[Optimizer]:
    """The class registered as `name`; ValueError if there is none."""
    if not isinstance(name, str):
        raise TypeError(f"an optimizer is created by its name, a str, got {name!r}")
    cls = OPTIMIZERS.get(name.lower())
    if cls is None:
        raise ValueError(f"unknown optimizer {name!r}{did_you_mean(name.lower(), names())} known: {', '.join(names())}")
    return cls


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(OPTIMIZERS)


def did_you_mean(word: str, known: list[str]) -> str:
    """'; did you mean 'adam'?', or ';' if nothing known is near."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
