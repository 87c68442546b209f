"""The faster interpreter describes types and values as Triton's own does."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
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


def described(constructed: Any) -> dict[str, str]:
    """What an object says of itself; tuples of Triton's are described by their values."""
    return {
        name: repr(value.values) if isinstance(value, core.tuple) else repr(value)
        for name, value in vars(constructed).items()
    }


def original(init: Any, kind: Any, *arguments: Any) -> Any:
    made = kind.__new__(kind)
    init.__wrapped__(made, *arguments)
    return made


def test_it_is_on() -> None:
    functions = [interpreter._patch_lang, interpreter._get_np_dtype, core._unwrap_if_constexpr]
    assert all(hasattr(function, "__wrapped__") for function in functions)


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
        with pytest.raises(type(expected.value)) as found:
            core.block_type(core.int8, shape)
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    "value",
    [1, True, 2.5, None, "a", core.float32, core.constexpr(3), (1, core.constexpr(2)), [core.constexpr([4]), 5],
     core.tuple([core.constexpr(6), core.constexpr(7)]), (), []],
    ids=str,
)  # fmt: skip
def test_values(value: Any) -> None:
    unwrap = core._unwrap_if_constexpr
    found, expected = unwrap(value), unwrap.__wrapped__(value)
    assert type(found) is type(expected)
    assert str(getattr(found, "values", found)) == str(getattr(expected, "values", expected))


NUMBERS = [core.int1, core.int8, core.int32, core.uint32, core.int64, core.float16, core.bfloat16, core.float32,
           core.float64, core.pointer_type(core.float32)]  # fmt: skip
SEMANTIC = interpreter.interpreter_semantic


def operands() -> dict[str, Any]:
    """A number and a block of each type, blocks of other shapes, and Python's numbers."""
    made: dict[str, Any] = {"2": 2, "-1.5": -1.5, "True": True}
    for scalar in NUMBERS:
        dtype = interpreter._get_np_dtype(scalar)
        for shape in ([], [1], [4], [2, 4]):
            kind = core.block_type(scalar, shape) if shape else scalar
            data = np.ones(shape or [1], dtype)
            made[str(kind)] = core.tensor(interpreter.TensorHandle(data, scalar), kind)
    return made


OPERANDS = operands()


def outcome(function: Any, *arguments: Any, **options: Any) -> Any:
    """Types, numbers and handles of what it returns, or what it raises."""
    try:
        returned = function(SEMANTIC, *arguments, **options)
    except Exception as error:
        return type(error), str(error)
    return [(str(value.type), value.handle.data.dtype, value.handle.data.tolist()) for value in returned]


@pytest.mark.parametrize("name", OPERANDS)
def test_operands_are_made_alike(name: str) -> None:
    check, broadcast = (
        getattr(type(SEMANTIC), name) for name in ("binary_op_type_checking_impl", "broadcast_impl_value")
    )
    for other in OPERANDS.values():
        pair = OPERANDS[name], other
        for options in (
            {},
            {"div_or_mod": True},
            {"allow_lhs_ptr": True, "allow_rhs_ptr": True},
            {"arithmetic_check": False},
        ):
            assert outcome(check, *pair, **options) == outcome(check.__wrapped__, *pair, **options)
        if all(isinstance(value, core.tensor) for value in pair):
            assert outcome(broadcast, *pair) == outcome(broadcast.__wrapped__, *pair)


@pytest.mark.parametrize("debug", [False, True])
def test_overflows_are_checked_where_debugging_reads_it(debug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    most = core.tensor(interpreter.TensorHandle(np.array([2**31 - 1], np.int32), core.int32), core.int32)
    options = SEMANTIC.builder.options
    monkeypatch.setattr(SEMANTIC.builder, "options", replace(options, debug=debug))
    with pytest.raises(AssertionError, match="int32 overflow") if debug else nullcontext(), np.errstate(over="ignore"):
        SEMANTIC.add(most, most, True)


def test_functions_of_the_language_are_called_alike() -> None:
    class Scope:
        def set_attr(self, owner: Any, name: str, value: Any) -> None:
            bound[name] = value

    bound: dict[str, Any] = {}
    left, right = OPERANDS["<['4'], fp32>"], OPERANDS["<['4'], int32>"]
    for name, arguments in (("__add__", (left, right)), ("to", (left, core.bfloat16))):
        member = getattr(core.tensor, name)
        interpreter._patch_attr(core.tensor, name, member, None, Scope())
        for semantic in ({}, {"_semantic": None}):  # a function that another calls is given none
            found, expected = bound[name](*arguments, **semantic), member(*arguments, _semantic=SEMANTIC)
            assert found.type == expected.type
            assert found.handle.data.tolist() == expected.handle.data.tolist()
        assert not core.is_builtin(bound[name]), "it would be bound once more"
