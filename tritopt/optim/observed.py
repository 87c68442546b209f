"""Hooks, profiler and compiler around `step`: torch's, which are entered only where somebody looks on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tritopt.engine import private

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def uncompiled(function: AnyFunction) -> AnyFunction:
    """`function` as a break in a compiled function's graph.

    `torch.compiler.disable` imports torch._dynamo, which takes as long as torch: it is called where something compiles.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not disabled:  # one for ever: another one each time would be compiled for each time
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def observed(step: AnyFunction) -> AnyFunction:
    """`step` with torch's hooks and profiler range, and as a break in a compiled function's graph.

    torch's wrappers take 10 us of each step also where there is no hook, no profiler and no compiler; this takes 0.5.
    """
    in_full = private.hooked_step(step)
    unseen = uncompiled(in_full)

    @functools.wraps(step)
    def wrapper(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return unseen(self, *args, **kwargs)
        if private.is_observed(self):
            return in_full(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    private.mark_hooked(wrapper)
    return wrapper  # type: ignore[return-value]
