"""Small tensors of the CPU as NumPy's arrays, whose operations take a third of the time of torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tritopt.engine.plan import Task
from tritopt.kernels.formats.format import PLAIN

MAX_ELEMENTS = 2**15
"""Largest tensor for which torch would take one thread as well."""
_DTYPES = (torch.float32, torch.float64)
_HAS_WEAK_SCALARS = int(np.__version__.partition(".")[0]) >= 2
"""Whether a Python number leaves an array's dtype as it is, however large it is."""


def arrays_of(task: Task) -> list[np.ndarray[Any, Any]] | None:
    """The weight, the gradient and the states in their own memory; None if an array is not what arithmetic may see."""
    weight = task.weight[0]
    dtype = weight.dtype
    if dtype not in _DTYPES or not _HAS_WEAK_SCALARS or weight.is_cuda or weight.numel() > MAX_ELEMENTS:
        return None
    if task.format is not PLAIN or any(fmt is not PLAIN for fmt in task.state_formats):
        return None
    arrays = []
    for tensor in (weight, task.grad, *task.state):
        if type(tensor) is not torch.Tensor or tensor.dtype is not dtype:
            return None
        try:
            arrays.append(tensor.numpy())
        except (RuntimeError, TypeError):  # negated or zero by a bit, under autograd, or on another device
            return None
    return arrays
