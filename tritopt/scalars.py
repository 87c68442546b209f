"""Arithmetic of scalars that are numbers on the host, or fp64 tensors on the device (tritopt.optim's capturable)."""

from __future__ import annotations

import math
from typing import Any

import torch


def sqrt(x: Any) -> Any:
    """Square root."""
    return torch.sqrt(x) if isinstance(x, torch.Tensor) else math.sqrt(x)


def where(condition: Any, x: Any, y: Any) -> Any:
    """x where the condition holds, otherwise y."""
    return torch.where(condition, x, y) if isinstance(condition, torch.Tensor) else (x if condition else y)


def minimum(x: Any, y: Any) -> Any:
    """The smaller."""
    return where(x < y, x, y)


def reciprocal(x: Any) -> Any:
    """1 / x, infinity for 0."""
    return x.reciprocal() if isinstance(x, torch.Tensor) else (1 / x if x else math.inf)
