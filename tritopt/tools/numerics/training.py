"""Parts that training on either problem shares."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tritopt import optim
from tritopt.tools.environment import device
from tritopt.tools.storage import StorageFormat


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: tensors this small take longer on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_optimizer(cls: type[optim.Optimizer], params: Any, fmt: StorageFormat, **arguments: Any) -> optim.Optimizer:
    """Make an optimizer with kernels on a GPU, elsewhere the reference: the same bits, faster than the interpreter."""
    make: Callable[..., optim.Optimizer] = cls
    fused = None if device().type == "cuda" else False
    eps = inspect.signature(cls).parameters.get("eps")
    if eps is not None and isinstance(eps.default, tuple) and eps.default[0] is None:
        # Adafactor's goes by the weights' dtype, and all formats are to compute the same.
        arguments["eps"] = (torch.finfo(torch.float32).eps, *eps.default[1:])
    return make(params, fused=fused, **arguments, **fmt.arguments)


def weights_of(opt: optim.Optimizer) -> torch.Tensor:
    """Collect all weights, one after another, fp64."""
    return torch.cat([weight.to(torch.float64).flatten() for weight in opt.master_weights()])


def unless_refused(train: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return what training returns, or why the optimizer does not take the format."""
    with warnings.catch_warnings():
        # Of weights without a master, which are here to show what the warning is about.
        warnings.filterwarnings("ignore", r".*accumulates in torch\.", UserWarning)
        try:
            return train(), None
        except ValueError as error:
            return None, str(error)
