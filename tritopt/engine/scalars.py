"""Arithmetic of scalars that are numbers on the host, or fp64 tensors on the device (tritopt.optim's capturable)."""

from __future__ import annotations

import math
from typing import Any

import torch


def sqrt(x: Any) -> Any:
    """Square root of a number, or of an fp64 tensor."""
    return torch.sqrt(x) if isinstance(x, torch.Tensor) else math.sqrt(x)


def where(condition: Any, x: Any, y: Any) -> Any:
    """x where the condition holds, otherwise y."""
    if not isinstance(condition, torch.Tensor):
        return x if condition else y
    if not isinstance(x, torch.Tensor) and not isinstance(y, torch.Tensor):
        x = torch.full_like(condition, x, dtype=torch.float64)  # of two numbers torch makes fp32
    return torch.where(condition, x, y)


def minimum(x: Any, y: Any) -> Any:
    """The smaller of x and y, numbers or fp64 tensors."""
    return where(x < y, x, y)


def divide(x: Any, y: Any) -> Any:
    """x / y, infinity for y = 0; x > 0."""
    return x / y if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor) or y else math.inf


def reciprocal(x: Any) -> Any:
    """1 / x, infinity for 0."""
    return x.reciprocal() if isinstance(x, torch.Tensor) else (1 / x if x else math.inf)
