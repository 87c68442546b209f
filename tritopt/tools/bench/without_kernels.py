"""A step of torch's optimizers without its kernels: functions of torch that launch them are replaced by nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from tritopt.engine import private
from tritopt.tools.replaced import replaced

OF_FUSED = ("_fused_adamw_", "_foreach_add_", "_foreach_norm", "_foreach_mul_")
"""Functions that launch the kernels of the fused step and of the clip."""
FOREACH = tuple(name for name in dir(torch) if name.startswith("_foreach_"))


@contextmanager
def no_fused() -> Iterator[None]:
    """Leave out what the fused step launches, and the clip."""
    with ExitStack() as stack:
        for name in OF_FUSED:
            stack.enter_context(replaced(torch, name, _fake_of(name)))
        yield


@contextmanager
def no_iteration() -> Iterator[None]:
    """Leave out what `no_fused` does, and the Newton-Schulz iteration of torch.optim.Muon, matrix by matrix."""
    with no_fused(), replaced(*private.iteration_of_muon(), _first):
        yield


@contextmanager
def no_foreach() -> Iterator[None]:
    """Leave out what the foreach step launches, and the clip."""
    with ExitStack() as stack:
        for name in FOREACH:
            fake = _unless_counters(getattr(torch, name), _fake_of(name))
            stack.enter_context(replaced(torch, name, fake))
        yield


def _fake_of(name: str) -> Callable[..., Any]:
    return _norms if name == "_foreach_norm" else _nothing if name.endswith("_") else _first


def _nothing(*_: Any, **__: Any) -> None:
    """Stand in for a kernel that writes."""


def _first(tensors: Sequence[torch.Tensor], *_: Any, **__: Any) -> Sequence[torch.Tensor]:
    """Stand in for a kernel that returns as many tensors as it takes."""
    return tensors


_ZEROS: dict[tuple[int, torch.device], list[torch.Tensor]] = {}


def _norms(tensors: Sequence[torch.Tensor], *_: Any, **__: Any) -> list[torch.Tensor]:
    key = len(tensors), tensors[0].device
    if key not in _ZEROS:
        _ZEROS[key] = list(torch.zeros(len(tensors), dtype=torch.float32, device=tensors[0].device).unbind())
    return _ZEROS[key]


def _unless_counters(real: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Let counters of steps, [] each and on the host, be counted: foreach derives its rates from them, there."""

    def call(tensors: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        counts = isinstance(tensors, list | tuple) and tensors and tensors[0].dim() == 0
        return (real if counts else fake)(tensors, *args, **kwargs)

    return call
