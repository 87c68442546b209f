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
    match = re.search(r"\(((?:[^()]|\([^()]*\))*)\)", _paragraphs(cls)[0])
    return match.group(1) if match else ""


def differences(cls: type[Optimizer]) -> str:
    """Say how it departs from MXNet's: the docstring's paragraph that says so."""
    differing = (text for text in _paragraphs(cls) if text.startswith((_DIFFERS, "Not in MXNet")))
    return next(differing, "").removeprefix(_DIFFERS).strip().rstrip(".")


def _paragraphs(cls: type[Optimizer]) -> list[str]:
    text = inspect.cleandoc(cls.__doc__ or "")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
