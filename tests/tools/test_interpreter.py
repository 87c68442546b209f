"""The faster interpreter describes types and values as Triton's own does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from tritopt.kernels.language import HAS_TRITON, INTERPRETED

if not (HAS_TRITON and INTERPRETED):
    pytest.skip("kernels are compiled here", allow_module_level=True)

from triton.language import core
from triton.runtime import interpreter

SCALARS = [
    core.int1, core.int8, core.uint8, core.int16, core.uint16, core.int32, core.uint32, core.int64, core.uint64,
    core.float16, core.bfloat16, core.float32, core.float64, core.float8e4nv, core.float8e5,
]  # fmt: skip
SHAPES: list[Any] = [[1], [64], [4, 16], core.tuple([8]), core.tuple([core.constexpr(2), 4]), [core.constexpr(32)]]


SEMANTIC = interpreter.interpreter_semantic
KIND = type(SEMANTIC)
METHODS = [KIND.binary_op_type_checking_impl, KIND.broadcast_impl_value, KIND.binary_op_sanitize_overflow_impl]
NUMBERS = (0, 1, -1, True, 2.5, -0.0, 300, 70_000, 2**31, 2**40, 2**64 - 1, 1e300, float("nan"), float("inf"))


def described(constructed: Any) -> dict[str, str]:
    """Describe an object as it does itself; tuples of Triton's are described by their values."""
    return {
        name: repr(value.values) if isinstance(value, core.tuple) else repr(value)
        for name, value in vars(constructed).items()
    }


def original(init: Any, kind: Any, *arguments: Any) -> Any:
    made = kind.__new__(kind)
    init.__wrapped__(made, *arguments)
    return made


def test_it_is_on() -> None:
    functions = [interpreter._patch_lang, interpreter._get_np_dtype, core._unwrap_if_constexpr, interpreter._patch_attr]
    assert all(hasattr(function, "__wrapped__") for function in [*functions, *METHODS])


@pytest.mark.parametrize("scalar", SCALARS, ids=str)
def test_types(scalar: Any) -> None:
    lookup = interpreter._get_np_dtype
    for kind in (scalar, core.pointer_type(scalar), *(core.block_type(scalar, shape) for shape in SHAPES)):
        for _ in range(2):
            assert lookup(kind) == lookup.__wrapped__(kind)
    for shape in SHAPES:
        expected = original(core.block_type.__init__, core.block_type, scalar, shape)
        for _ in range(2):
            assert described(core.block_type(scalar, shape)) == described(expected)
        assert core.block_type(scalar, shape) == expected


@pytest.mark.parametrize("shape", [None, *SHAPES], ids=str)
def test_tensors(shape: Any) -> None:
    for scalar in SCALARS:
        kind = scalar if shape is None else core.block_type(scalar, shape)
        expected = original(core.tensor.__init__, core.tensor, None, kind)
        assert described(core.tensor(None, kind)) == described(expected)


@pytest.mark.parametrize("shape", [[], [3], [2, 3], [64, core.constexpr(5)], [True, 1.0]], ids=str)
def test_wrong_shapes_are_refused_alike(shape: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as expected:
        original(core.block_type.__init__, core.block_type, core.int8, shape)
    for _ in range(2):
        with pytest.raises(type(expected.value)) as raised:
            core.block_type(core.int8, shape)
        assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize(
    "value",
    [1, True, 2.5, None, "a", core.float32, core.constexpr(3), (1, core.constexpr(2)), [core.constexpr([4]), 5],
     core.tuple([core.constexpr(6), core.constexpr(7)]), (), []],
    ids=str,
)  # fmt: skip
def test_values(value: Any) -> None:
    unwrap = core._unwrap_if_constexpr
    actual, expected = unwrap(value), unwrap.__wrapped__(value)
    assert type(actual) is type(expected)
    assert str(getattr(actual, "values", actual)) == str(getattr(expected, "values", expected))


def operand(scalar: Any, shape: tuple[int, ...] = ()) -> Any:
    """A tensor of the interpreter that counts up."""
    values = np.arange(1, 1 + max(1, int(np.prod(shape)))).astype(interpreter._get_np_dtype(scalar))
    handle = interpreter.TensorHandle(values.reshape(shape or (1,)), scalar)
    return core.tensor(handle, core.block_type(scalar, [*shape]) if shape else scalar)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """Types, memory and identity of what it returns, or what it says is wrong."""
    try:
        with np.errstate(all="ignore"):
            result = function(SEMANTIC, *arguments)
    except Exception as error:
        return type(error), str(error)
    return [
        (made is given, str(made.type), str(made.handle.dtype), made.handle.data.dtype, made.handle.data.shape,
         made.handle.data.tobytes())
        for made, given in zip(result, arguments, strict=False)
    ]  # fmt: skip


@pytest.mark.parametrize("flags", [(), (True, True), (False, False, True, True), (False, False, False)], ids=str)
def test_operands_of_every_pair_of_types(flags: tuple[bool, ...]) -> None:
    """Casts, repetitions and refusals are the same, when types meet for the first time and later."""
    pointers = [core.pointer_type(core.float32), core.pointer_type(core.int8)]
    tensors = [operand(scalar, shape) for scalar in [*SCALARS, *pointers] for shape in ((), (4,), (2, 4), (1, 4))]
    function = KIND.binary_op_type_checking_impl
    for first, second in (*product(tensors, tensors), *product(tensors, NUMBERS), *product(NUMBERS, tensors)):
        expected = outcome(function.__wrapped__, first, second, *flags)
        for _ in range(2):
            assert outcome(function, first, second, *flags) == expected, (first.type, second)


def test_operands_of_every_pair_of_shapes() -> None:
    function = KIND.broadcast_impl_value
    tensors = [operand(core.float32, shape) for shape in ((), (4,), (1,), (8,), (2, 4), (2, 1), (1, 4))]
    for first, second in product(tensors, tensors):
        expected = outcome(function.__wrapped__, first, second)
        for _ in range(2):
            assert outcome(function, first, second) == expected, (first.type, second.type)


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
@pytest.mark.parametrize("scalar", [scalar for scalar in SCALARS if scalar.is_int() and scalar != core.int1], ids=str)
def test_overflow_is_asserted_in_debug_mode_only(scalar: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = np.iinfo(interpreter._get_np_dtype(scalar))
    check, op = KIND.binary_op_sanitize_overflow_impl, getattr(SEMANTIC, name)
    for is_debug in (False, True):
        options = dataclasses.replace(SEMANTIC.builder.options, debug=is_debug)
        monkeypatch.setattr(SEMANTIC.builder, "options", options)
        refusals = []
        for values in product((bounds.min, bounds.min + 1, 0, 1, 2, bounds.max - 1, bounds.max), repeat=2):
            pair = [operand(scalar, (4,)) for _ in range(2)]
            for tensor, value in zip(pair, values, strict=True):
                tensor.handle.data[2] = value
            expected = outcome(lambda *args: check.__wrapped__(*args) or (), *pair, op)
            assert outcome(lambda *args: check(*args) or (), *pair, op) == expected, values
            refusals.append(expected)
        assert any(refusals) == (is_debug and bounds.bits < 64)
