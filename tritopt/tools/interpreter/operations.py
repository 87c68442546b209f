"""Operations of the interpreter as functions of NumPy's arrays, without what describes them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tritopt.tools.interpreter.private import InterpreterParts


STORES = frozenset({"create_store", "create_masked_store"})
_ACCESSES = STORES | {"create_load", "create_masked_load"}
_IMPURE = _ACCESSES | {"create_get_program_id", "create_get_num_programs"}
_LIVE_ONLY = (
    "advance", "assert", "assume", "atomic", "block_ptr", "descriptor", "extern", "inline_asm", "print",
    "tensor_pointer",
)  # fmt: skip
_CASTS = frozenset(
    f"create_{cast}" for cast in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc", "int_cast")
)
_BITCASTS = frozenset({"create_bitcast", "create_int_to_ptr", "create_ptr_to_int"})
_OF_BITS = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def is_impure(name: str) -> bool:
    """Whether an operation gives something else, or does something, each time."""
    return name in _IMPURE


def is_live_only(name: str) -> bool:
    """Whether an operation is not recorded: it prints, asserts, or reads and writes memory at once."""
    return any(part in name for part in _LIVE_ONLY)


class Call(NamedTuple):
    """An operation that was carried out."""

    name: str
    method: Callable[..., Any]
    builder: Any
    args: tuple[Any, ...]
    result: Any


def function_of(
    call: Call, last: tuple[Any, tuple[Any, ...], Any] | None, parts: InterpreterParts
) -> Callable[..., Any]:
    """Return what makes the result's array of those of the handles among the arguments.

    Args:
        call: the operation.
        last: NumPy's function that it called at last, its operands and its result; None: it called none.
        parts: of the interpreter.
    """
    if last is not None and last[2] is call.result and _is_plain(last[0], last[1], call):
        return last[0]  # type: ignore[no-any-return]
    fast = _access(call, parts.memory) if call.name in _IMPURE else _fast(call)
    return _described(call, parts.handle) if fast is None else fast


def _is_plain(function: Any, operands: tuple[Any, ...], call: Call) -> bool:
    """Whether the result is what the function returns of the arguments, neither widened before nor narrowed after."""
    if len(operands) != len(call.args) or not all(map(operator.is_, operands, call.args)):
        return False
    dtypes = [operand.data.dtype for operand in operands]
    if len(dtypes) == 2 and dtypes[0] == dtypes[1] == np.bool_:
        return function in _OF_BITS
    return bool(_dtype_of(function, *dtypes) == call.result.data.dtype)


@functools.cache
def _dtype_of(function: Any, *dtypes: np.dtype[Any]) -> np.dtype[Any]:
    with np.errstate(all="ignore"):
        return function(*[np.ones(1, dtype) for dtype in dtypes]).dtype  # type: ignore[no-any-return]


def _fast(call: Call) -> Callable[..., Any] | None:
    """Return a function of arrays for the operations that kernels make most; None: this is another one."""
    name, args, result = call.name, call.args, call.result
    if name == "create_addptr":
        size = np.uint64(max(1, args[0].get_element_ty().primitive_bitwidth // 8))
        return lambda pointer, offset: pointer + size * offset.astype(np.uint64)
    if name in _BITCASTS:
        return _viewing(result.data.dtype)
    if name in _CASTS and "bf16" not in (args[0].dtype.scalar.name, args[1].scalar.name):
        return _casting(result.data.dtype)
    if name == "create_splat":
        return _filling(result.data.shape, result.data.dtype)
    if name == "create_join":
        return _joining(result.data.shape, result.data.dtype)
    if name == "create_ashr" and all(arg.data.dtype.kind == "i" for arg in args):
        return np.right_shift
    if name == "create_umulhi" and result.data.dtype == np.uint32 and args[1].data.dtype == np.uint32:
        return lambda a, b: ((a.astype(np.uint64) * b) >> 32).astype(np.uint32)
    return None


def _access(call: Call, memory: Any) -> Callable[..., Any] | None:
    """Return a load or a store, with a mask of ones where it has none; None: it is neither."""
    name, args, result = call.name, call.args, call.result
    if name not in _ACCESSES:
        return None
    load, store, shape = memory.load, memory.store, args[0].data.shape
    ones = np.ones(shape, bool)
    if name == "create_store":
        return lambda pointers, value: store(pointers, value, ones)
    if name == "create_masked_store":
        return lambda pointers, value, mask: store(pointers, value, mask)
    dtype = result.data.dtype
    zeros = np.zeros(shape, dtype)
    if name == "create_load":
        return lambda pointers: load(pointers, ones, zeros, dtype)
    if args[2] is None:
        return lambda pointers, mask: load(pointers, mask, zeros, dtype)
    return lambda pointers, mask, other: load(pointers, mask, other, dtype)


def _described(call: Call, handle: Any) -> Callable[..., Any]:
    """Return the interpreter's own operation, on arrays that are described as at first. handle: its class."""
    _, method, builder, args, _ = call
    dtypes = [arg.dtype if type(arg) is handle else None for arg in args]
    # Not the handles, which would keep the first program's arrays.
    others = [None if type(arg) is handle else arg for arg in args]

    def operation(*arrays: Any) -> Any:
        given = iter(arrays)
        described = [
            other if dtype is None else handle(next(given), dtype) for other, dtype in zip(others, dtypes, strict=True)
        ]
        result = method(builder, *described)
        return None if result is None else result.data

    return operation


def _viewing(dtype: np.dtype[Any]) -> Callable[[Any], Any]:
    return lambda array: array.view(dtype)


def _casting(dtype: np.dtype[Any]) -> Callable[[Any], Any]:
    return lambda array: array.astype(dtype)


def _filling(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Callable[[Any], Any]:
    def filled(scalar: Any) -> Any:
        array = np.empty(shape, dtype)
        array[...] = scalar
        return array

    return filled


def _joining(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Callable[[Any, Any], Any]:
    def joined(first: Any, second: Any) -> Any:
        array = np.empty(shape, dtype)
        array[..., 0], array[..., 1] = first, second
        return array

    return joined
