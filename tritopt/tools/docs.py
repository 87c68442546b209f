"""Parts of the optimizers' docstrings, for tables."""

from __future__ import annotations

import inspect
import re

from tritopt.mxnet.optimizer import Optimizer

_DIFFERS = "Differs from MXNet's:"


def source(cls: type[Optimizer]) -> str:
    """Cite the source of the formula: what stands in parentheses in the docstring's first paragraph.

    >>> import tritopt
    >>> source(tritopt.LAMB)
    'You et al. 2019, arXiv:1904.00962, algorithm 2'
    """
    found = re.search(r"\(((?:[^()]|\([^()]*\))*)\)", _paragraphs(cls)[0])
    return found.group(1) if found else ""


def differences(cls: type[Optimizer]) -> str:
    """Say how it departs from MXNet's: the docstring's paragraph that says so."""
    found = (text for text in _paragraphs(cls) if text.startswith((_DIFFERS, "Not in MXNet")))
    return next(found, "").removeprefix(_DIFFERS).strip().rstrip(".")


def _paragraphs(cls: type[Optimizer]) -> list[str]:
    text = inspect.cleandoc(cls.__doc__ or "")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
