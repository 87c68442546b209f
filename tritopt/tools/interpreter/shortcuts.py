"""Shortcuts of the interpreter: what it does over and over again.

It replaces triton.language at every call of a jit function, describes the type of every value anew, and works out for
each operation once more what becomes of its operands. None of this changes a result, and together it takes four fifths
of the time of a step.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from tritopt.tools.interpreter.launches import Launches
from tritopt.tools.interpreter.recorder import recorders

_launches: Launches | None = None


def launches() -> Launches | None:
    """Return the interpreter's launches and their tapes; None where `speed_up` has done nothing."""
    return _launches


def speed_up() -> None:
    """Make interpreted kernels about five times as fast, with the same results, until the process ends.

    Programs that do what one before them did take a fifth of that: they are replayed (tape.py). A loop over
    `tl.range` that ends at a tensor counts in tensors, as in compiled code, where the interpreter has Python's numbers.

    Does nothing where kernels are compiled, or Triton is of a version that this was not tried with.
    """
    global _launches
    from tritopt.kernels.language import INTERPRETED
    from tritopt.tools.interpreter import private

    if _launches is not None or not INTERPRETED or not private.is_tried_interpreter():
        return
    private.wrap_interpreter(
        _once_per_launch, _by_name, _plain_first, _with_shared_shapes, _without_checks, _with_known_types
    )
    _launches = private.wrap_programs(Launches)


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


def _without_checks(patch_attr: Callable[..., None], semantic: Any) -> Callable[..., None]:
    """Let each function of the language be called as it is, without a check that `_semantic` was passed."""
    from triton.language import core

    checks = core.builtin(lambda: None).__code__

    @functools.wraps(patch_attr)
    def patch(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = member.__wrapped__ if getattr(member, "__code__", None) is checks else member

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    return patch


_FLOATS: dict[str, np.dtype[Any]] = {"fp32": np.dtype("float32"), "fp64": np.dtype("float64")}
_INTEGERS: dict[str, np.dtype[Any]] = {
    name: np.dtype(name) for size in (8, 16, 32, 64) for name in (f"int{size}", f"uint{size}")
}
_BOUNDS = {name: (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)) for name, dtype in _INTEGERS.items()}


def _with_known_types(semantic: Any, handle: Any) -> dict[str, Callable[..., Any]]:
    """Methods of the class of the language's semantics that know what became of operands of the same types before.

    handle: class of what holds a NumPy array.
    """
    binary, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    overflow = semantic.binary_op_sanitize_overflow_impl

    @functools.wraps(overflow)
    def in_debug(self: Any, lhs: Any, rhs: Any, op: Any) -> None:
        # The operation is done once more in 64 bits, for an assertion that is one in debug mode only.
        if self.builder.options.debug:
            overflow(self, lhs, rhs, op)

    return {
        binary.__name__: _of_both(binary, handle),
        broadcast.__name__: _to_one_shape(broadcast),
        overflow.__name__: in_debug,
    }


def _of_both(binary: Callable[..., Any], handle: Any) -> Callable[..., Any]:
    """Give both operands one type and shape, as `binary` does."""
    from triton.language import core

    tensor = core.tensor
    # By the names of both types, which say all of them, and flags: what each operand is repeated to; None: nothing.
    known: dict[Any, tuple[Any, Any]] = {}

    def repeated(self: Any, value: Any, type_: Any) -> Any:
        return value if type_ is None else tensor(self.builder.create_splat(type_, value.handle), type_)

    @functools.wraps(binary)
    def of_both(self: Any, lhs: Any, rhs: Any, *flags: Any, **named: Any) -> Any:
        is_first, is_second = type(lhs) is tensor, type(rhs) is tensor
        if is_first and is_second and not named:
            key = lhs.type.name, rhs.type.name, flags
            if key in known:
                first, second = known[key]
                return repeated(self, lhs, first), repeated(self, rhs, second)
            new = binary(self, lhs, rhs, *flags)
            if _is_repeated(new[0], lhs) and _is_repeated(new[1], rhs):
                known[key] = None if new[0] is lhs else new[0].type, None if new[1] is rhs else new[1].type
            return new
        if is_first != is_second and not named and all(flags[2:3]):  # a type that both have is looked for
            number, beside = (rhs, lhs) if is_first else (lhs, rhs)
            dtype = _dtype_of_constant(number, beside.type.scalar.name)
            if dtype is not None:
                shape = beside.type.shape if beside.type.is_block() else 1
                constant = handle(np.full(shape, number, dtype), beside.type.scalar)
                if recorders.current is not None:
                    recorders.current.constant(constant)
                made = tensor(constant, beside.type)
                return (lhs, made) if is_first else (made, rhs)
        return binary(self, lhs, rhs, *flags, **named)

    return of_both


def _is_repeated(new: Any, old: Any) -> bool:
    """Whether an operand is the old one, or that scalar for each element of a block."""
    return new is old or (not old.type.is_block() and new.type.scalar.name == old.type.name)


def _dtype_of_constant(number: Any, name: str) -> np.dtype[Any] | None:
    """Dtype of a number beside an operand of this type; None where another type may become of it, and for 0."""
    if number == 0:  # which older versions make otherwise
        return None
    kind = type(number)
    if name in _FLOATS and (kind is float or kind is int):
        return _FLOATS[name]
    if kind is int and name in _BOUNDS and _BOUNDS[name][0] <= number <= _BOUNDS[name][1]:
        return _INTEGERS[name]
    return None


def _to_one_shape(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Give both operands one shape, as `broadcast` does."""
    as_is: set[Any] = set()

    @functools.wraps(broadcast)
    def to_one_shape(self: Any, lhs: Any, rhs: Any) -> Any:
        key = lhs.type.name, rhs.type.name
        if key in as_is:
            return lhs, rhs
        new = broadcast(self, lhs, rhs)
        if new[0] is lhs and new[1] is rhs:
            as_is.add(key)
        return new

    return to_one_shape
