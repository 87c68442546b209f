"""Optimizers by name: `create`, `find`, `names`; `register` stands beside `Optimizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tritopt.engine.validate import did_you_mean

if TYPE_CHECKING:
    from tritopt.mxnet.optimizer import Optimizer

OPTIMIZERS: dict[str, type[Optimizer]] = {}
"""Registered classes by lower-cased class name."""


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
