"""Triton's interpreter, without its largest waste: it replaces triton.language anew at every call of a jit function.

Once per launch suffices, and makes tests twice as fast. Nothing else changes; a Triton that does it otherwise is left
as it is.
"""

from __future__ import annotations

import inspect
from typing import Any


class _Nothing:
    def restore(self) -> None:
        pass


class _Patched:
    """A scope that says when it ends."""

    def __init__(self, scope: Any, modules: set[int], ended: set[int]) -> None:
        self._scope, self._modules, self._under_way = scope, modules, ended

    def restore(self) -> None:
        self._under_way -= self._modules
        self._scope.restore()


def patch_once_per_launch() -> None:
    """Let calls inside a launch find the language as the launch has replaced it."""
    from triton import language
    from triton.runtime import interpreter

    original = getattr(interpreter, "_patch_lang", None)
    if original is None:
        return
    under_way: set[int] = set()

    def patch(fn: Any) -> Any:
        values = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
        modules = {id(value) for value in values if value in (language, language.core)} - under_way
        if not modules and under_way:
            return _Nothing()
        scope = original(fn)
        if not hasattr(scope, "restore"):  # of a version that never restores
            return scope
        under_way.update(modules)
        return _Patched(scope, modules, under_way)

    interpreter._patch_lang = patch
