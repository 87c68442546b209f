"""A function of somebody else, replaced for a while: how the bench leaves out kernels and counts launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let an attribute of a module or class have another value inside of the context.

    >>> import math
    >>> with replaced(math, "sqrt", abs):
    ...     math.sqrt(-4)
    4
    >>> math.sqrt(4)
    2.0
    """
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
