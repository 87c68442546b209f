"""Warnings that point at the user's line, however deep in this package they arise."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch

# torch wraps what it does not compile, and the steps of its optimizers.
_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_NOT_THE_USERS = tuple(os.path.join(folder, "") for folder in (_PACKAGE, os.path.dirname(torch.__file__)))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """`warnings.warn`, reported for the nearest caller outside this package and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def warn_once(owner: Any, message: str) -> None:
    """`warn`, unless this object has given this warning before."""
    given: set[str] = vars(owner).setdefault("_warnings_given", set())
    if message not in given:
        given.add(message)
        warn(message)
