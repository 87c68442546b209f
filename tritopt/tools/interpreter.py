"""Triton's interpreter, without what it does over and over again.

It replaces triton.language at every call of a jit function, and describes the type of every value anew. Both change no
result, and take more than half of the time of a check.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_is_fast = False


def speed_up() -> None:
    """Make interpreted kernels more than twice as fast, with the same results, until the process ends.

    Does nothing where kernels are compiled, or Triton is of a version that this was not tried with.
    """
    global _is_fast
    from tritopt.engine import private
    from tritopt.kernels.language import INTERPRETED

    if _is_fast or not INTERPRETED or not private.is_tried_interpreter():
        return
    _is_fast = True
    private.wrap_interpreter(_once_per_launch, _by_name, _plain_first, _with_shared_shapes)


class _Nothing:
    def restore(self) -> None:
        pass


class _Patched:
    """A scope that says when it ends."""

    def __init__(self, scope: Any, modules: set[int], under_way: set[int]) -> None:
        self._scope, self._modules, self._under_way = scope, modules, under_way

    def restore(self) -> None:
        self._under_way -= self._modules
        self._scope.restore()


def _once_per_launch(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let calls inside a launch find the language as the launch has replaced it."""
    from triton import language

    under_way: set[int] = set()
    known: dict[int, tuple[dict[str, Any], set[int]]] = {}

    def languages(names: dict[str, Any]) -> set[int]:
        if id(names) not in known:
            values = [value for value in names.values() if inspect.ismodule(value)]
            # The names themselves, too: another dict must not get the same id.
            known[id(names)] = names, {id(value) for value in values if value in (language, language.core)}
        return known[id(names)][1]

    @functools.wraps(patch_lang)
    def patch(fn: Any) -> Any:
        modules = languages(fn.__globals__) - under_way
        if not modules and under_way:
            return _Nothing()
        scope = patch_lang(fn)
        if not hasattr(scope, "restore"):  # of a version that never restores
            return scope
        under_way.update(modules)
        return _Patched(scope, modules, under_way)

    return patch


def _by_name(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Look up NumPy's dtype of a type by its name, for which Triton makes a table in each call."""
    known: dict[str, Any] = {}

    @functools.wraps(np_dtype)
    def lookup(dtype: Any) -> Any:
        name = dtype.name
        if name not in known:
            known[name] = np_dtype(dtype)
        return known[name]

    return lookup


def _plain_first(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Ask first whether a value is of a type that has nothing to unwrap."""
    from triton.language import core

    plain = {int, float, bool, str, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type}
    constexpr = core.constexpr

    @functools.wraps(unwrap)
    def unwrapped(value: Any) -> Any:
        kind = type(value)
        if kind in plain:
            return value
        return value.value if kind is constexpr else unwrap(value)

    return unwrapped


def _with_shared_shapes(core: Any) -> tuple[Callable[..., None], Callable[..., None]]:
    """Constructors of block types and of tensors whose shapes are checked and wrapped once."""
    init_type, init_tensor = core.block_type.__init__, core.tensor.__init__
    known: dict[tuple[str, tuple[int, ...]], tuple[Any, int, str]] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    wrapped: dict[int, tuple[Any, Any]] = {id(()): (core.constexpr(1), core.tuple([]))}

    @functools.wraps(init_type)
    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        dims = tuple(shape.values if type(shape) is core.tuple else shape)
        for dim in dims:
            if type(dim) is not int:
                init_type(self, element_ty, shape)
                return
        key = element_ty.name, dims
        if key not in known:
            init_type(self, element_ty, shape)
            shape = shapes.setdefault(dims, self.shape)
            wrapped[id(shape)] = core.constexpr(self.numel), core.tuple([core.constexpr(dim) for dim in dims])
            known[key] = shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = known[key]

    @functools.wraps(init_tensor)
    def tensor(self: Any, handle: Any, type: Any) -> None:
        parts = wrapped.get(id(type.shape if type.is_block() else ()))
        if parts is None:
            init_tensor(self, handle, type)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = parts

    return block_type, tensor
