"""Optimizers by name: `create`, `find`, `names`; `register` stands beside `Optimizer`."""

from __future__ import annotations

from typing import Any

from tritopt.mxnet.optimizer import Optimizer
from tritopt.mxnet.optimizer import find as find
from tritopt.mxnet.optimizer import registered as registered


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


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(registered())
