"""The faster interpreter describes types and values as Triton's own does."""

from __future__ import annotations

from typing import Any

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
