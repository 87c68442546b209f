"""Programs that are replayed from a tape give what the interpreter gives, bit for bit, and nothing stale."""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritopt.kernels.language import HAS_TRITON, INTERPRETED

if not (HAS_TRITON and INTERPRETED):
    pytest.skip("kernels are compiled here", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from tritopt import optim
from tritopt.engine import private
from tritopt.tools.interpreter import launches as tapes
from tritopt.tools.interpreter import live, recorder, shortcuts

LAUNCHES: Any = shortcuts.launches()
N = 16
FACTOR = 2
TABLE: Any = ModuleType("table")
TABLE.offset = 3
TABLE.other = 1


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Positive and negative numbers of a few dozen."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cpu") * 40).to(dtype)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


def launched(kernel: Any, grid: Any, *args: Any, **constants: Any) -> Any:
    """Launch a kernel on copies of its tensors, and return these, or the error."""
    copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    try:
        kernel[grid](*copies, **constants, enable_fp_fusion=False)
    except Exception as error:
        return type(error), str(error)
    return [bits(copy) for copy in copies if isinstance(copy, torch.Tensor)]


def both(kernel: Any, grid: Any, *args: Any, fails: bool = False, **constants: Any) -> int:
    """Compare a launch with one that is not replayed. Returns how many programs were replayed.

    Skips the test where an older version's interpreter has an error that the newest one does not have.
    """
    with live():
        expected = launched(kernel, grid, *args, **constants)
    if isinstance(expected, tuple) > fails and not triton.__version__.startswith(private.TRIED_TRITON[-1]):
        assert launched(kernel, grid, *args, **constants) == expected
        pytest.skip(f"Triton {triton.__version__}: {expected[1]}")
    assert isinstance(expected, tuple) == fails, expected
    before = LAUNCHES.n_replayed
    assert launched(kernel, grid, *args, **constants) == expected
    return int(LAUNCHES.n_replayed - before)


@triton.jit  # type: ignore[untyped-decorator]
def steps(x_ptr: Any, y_ptr: Any, n: Any, start: Any, bound: Any, BLOCK: tl.constexpr) -> Any:
    """Two loops and a store between them, which the second one reads."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(start, bound):
        total += tl.load(x_ptr + at, mask=at < n) * (i + 1)
    tl.store(y_ptr + at, total + tl.load(y_ptr + at, mask=at < n), mask=at < n)
    for i in range(bound % 3):
        if i == 1:
            total += tl.load(y_ptr + at, mask=at < n, other=1.0)
        total = total * 0.5
    tl.store(x_ptr + at, total, mask=at < n)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(-2, 4), st.integers(-1, 6), st.integers(1, 4))
def test_loops_of_any_length(n: int, start: int, bound: int, n_programs: int) -> None:
    both(steps, (n_programs,), random(64), random(64, seed=1), n, start, bound, BLOCK=N)


def test_only_what_is_new_is_interpreted() -> None:
    """Six programs of one kind: one is recorded. Another bound: one more."""
    x, y = random(96), random(96, seed=1)
    LAUNCHES.forget()
    assert both(steps, (6,), x, y, 90, 0, 4, BLOCK=N) == 5
    assert both(steps, (6,), x, y, 91, 0, 4, BLOCK=N) == 6
    assert both(steps, (6,), x, y, 91, 0, 5, BLOCK=N) == 5
    assert both(steps, (6,), x, y, 91, 0, 4, BLOCK=N) == 6


@triton.jit  # type: ignore[untyped-decorator]
def adds_up(x_ptr: Any, step: Any) -> Any:
    """Each program reads what the one before it stored, and stores twice."""
    pid = tl.program_id(0)
    before = tl.load(x_ptr + pid)
    tl.store(x_ptr + pid, before + 1)
    if tl.load(x_ptr + pid) > step:
        tl.store(x_ptr + pid + 1, tl.load(x_ptr + pid + 1) + before * 2)
    else:
        tl.store(x_ptr + pid + 1, tl.load(x_ptr + pid) - before)
    tl.store(x_ptr + pid, tl.load(x_ptr + pid) + 0.25)


@pytest.mark.parametrize("step", [-100, 3, 100])
def test_a_program_reads_what_the_one_before_it_stored(step: int) -> None:
    LAUNCHES.forget()
    assert both(adds_up, (15,), random(N), step) in (13, 14)


@triton.jit  # type: ignore[untyped-decorator]
def operations(x_ptr: Any, y_ptr: Any, out_ptr: Any, n: Any, BLOCK: tl.constexpr, OPERATION: tl.constexpr) -> Any:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    y = tl.load(y_ptr + at, mask=at < n, other=x.to(y_ptr.dtype.element_ty))
    tl.store(out_ptr + at, OPERATION(x, y).to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit  # type: ignore[untyped-decorator]
def quotient(x: Any, y: Any) -> Any:
    return x // tl.where(y == 0, 1, y)


@triton.jit  # type: ignore[untyped-decorator]
def remainder(x: Any, y: Any) -> Any:
    return x % tl.where(y == 0, 1, y)


@triton.jit  # type: ignore[untyped-decorator]
def bitwise(x: Any, y: Any) -> Any:
    return (x & y) ^ (x | 5) ^ ~y


@triton.jit  # type: ignore[untyped-decorator]
def shifted(x: Any, y: Any) -> Any:
    return (x >> 2) ^ (y << 1)


@triton.jit  # type: ignore[untyped-decorator]
def compared(x: Any, y: Any) -> Any:
    return (x < y) + (x == y) * 2


@triton.jit  # type: ignore[untyped-decorator]
def booleans(x: Any, y: Any) -> Any:
    a, b = x > 0, y > 0
    return (a & b) ^ (a | ~b) ^ (a != b)


@triton.jit  # type: ignore[untyped-decorator]
def high_half(x: Any, y: Any) -> Any:
    return tl.umulhi(x, y)


@triton.jit  # type: ignore[untyped-decorator]
def fused(x: Any, y: Any) -> Any:
    return tl.fma(x, y, x) + tl.sqrt(tl.abs(y)) + tl.maximum(x, y) - tl.clamp(x, -3.0, 3.0) + x / (y * y + 1)


@triton.jit  # type: ignore[untyped-decorator]
def functions(x: Any, y: Any) -> Any:
    return (
        tl.exp(x * 0.01)
        + tl.log(tl.abs(y) + 1)
        + tl.sin(x)
        + tl.floor(y)
        + tl.rsqrt(x * x + 1)
        + tl.erf(y)
        - tl.ceil(x)
    )


@triton.jit  # type: ignore[untyped-decorator]
def reduced(x: Any, y: Any) -> Any:
    return x * tl.sum(y, 0) + tl.max(x, 0) - tl.min(y, 0)


@triton.jit  # type: ignore[untyped-decorator]
def rearranged(x: Any, y: Any) -> Any:
    a, b = tl.split(tl.reshape(tl.interleave(x, y), (x.numel, 2)))
    return tl.ravel(tl.trans(tl.reshape(a, (4, x.numel // 4)))) + b


@triton.jit  # type: ignore[untyped-decorator]
def transposed(x: Any, y: Any) -> Any:
    return tl.ravel(tl.reshape(x, (4, x.numel // 4)).T) + y


@triton.jit  # type: ignore[untyped-decorator]
def multiplied(x: Any, y: Any) -> Any:
    a, b = tl.reshape(x, (4, 4)), tl.reshape(y, (4, 4))
    return tl.ravel(tl.dot(a, b, tl.zeros((4, 4), tl.float32)) + a[None, :, :].reshape(4, 4))


@triton.jit  # type: ignore[untyped-decorator]
def sorted_(x: Any, y: Any) -> Any:
    return tl.sort(x) + tl.flip(y)


@triton.jit  # type: ignore[untyped-decorator]
def gathered(x: Any, y: Any) -> Any:
    return tl.gather(x, (tl.abs(y).to(tl.int32) % x.numel), 0)


@triton.jit  # type: ignore[untyped-decorator]
def counted(x: Any, y: Any) -> Any:
    return tl.histogram(tl.abs(x).to(tl.int32), 16) + y


@triton.jit  # type: ignore[untyped-decorator]
def with_index(x: Any, y: Any) -> Any:
    largest, place = tl.max(x, 0, return_indices=True)
    return y + largest * place + tl.argmin(y, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _both_added(a: Any, b: Any) -> Any:
    return a + b


@triton.jit  # type: ignore[untyped-decorator]
def scanned(x: Any, y: Any) -> Any:
    return tl.cumsum(x, 0) + tl.associative_scan(y, 0, _both_added, reverse=True) + tl.reduce(x, 0, _both_added)


@triton.jit  # type: ignore[untyped-decorator]
def rounded(x: Any, y: Any) -> Any:
    small = x.to(tl.float8e5).to(tl.float32) + y.to(tl.float16).to(tl.float32)
    return small + x.to(tl.bfloat16) + (x.to(tl.int32, bitcast=True) & 255) + y.to(tl.float8e4nv).to(tl.bfloat16)


@triton.jit  # type: ignore[untyped-decorator]
def drawn(x: Any, y: Any) -> Any:
    return x + tl.rand(7, tl.arange(0, x.numel)) + y


INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
OF_INTEGERS = [(f, dtype) for f in (bitwise, compared, booleans, quotient, remainder) for dtype in INTEGERS]
OF_INTEGERS = [(f, dtype) for f, dtype in OF_INTEGERS if dtype != torch.bool or f not in (quotient, remainder)]
OF_INTEGERS += [(shifted, dtype) for dtype in INTEGERS[:-1]]
OF_INTEGERS += [(high_half, dtype) for dtype in (torch.int32, torch.int64, torch.uint32)]
OF_FLOATS = [(f, dtype) for f in (fused, functions, compared) for dtype in (torch.float32, torch.float64)]
OF_FLOATS += [(f, dtype) for f in (compared, reduced) for dtype in (torch.float16, torch.bfloat16)]
REPLAYED = (reduced, multiplied, gathered, counted, rounded, drawn)
NOT_REPLAYED = (transposed, rearranged, sorted_, with_index, scanned)


@pytest.mark.parametrize(
    ("function", "dtype"),
    [*OF_INTEGERS, *OF_FLOATS, *((f, torch.float32) for f in (*REPLAYED, *NOT_REPLAYED))],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_operations(function: Any, dtype: torch.dtype) -> None:
    LAUNCHES.forget()
    for seed, n_replayed in ((0, 2), (1, 3)):
        x, y = random(41, dtype=dtype, seed=seed), random(41, dtype=dtype, seed=seed + 7)
        out = torch.zeros(41, dtype=dtype if dtype.is_floating_point or dtype.itemsize > 2 else torch.int32)
        expected = 0 if function in NOT_REPLAYED else n_replayed
        assert both(operations, (3,), x, y, out, 40, BLOCK=N, OPERATION=function) == expected


@triton.jit  # type: ignore[untyped-decorator]
def filled(x_ptr: Any, value: Any, scale: tl.constexpr) -> Any:
    at = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(x_ptr + at, tl.load(x_ptr + at) + tl.full((4,), scale, x_ptr.dtype.element_ty) * value)


@triton.jit  # type: ignore[untyped-decorator]
def written(x_ptr: Any, value: tl.constexpr) -> Any:
    tl.store(x_ptr + tl.program_id(0) + tl.arange(0, 4), tl.full((4,), value, x_ptr.dtype.element_ty))


@dataclass(frozen=True)
class Setting:
    """A compile-time value whose equals are not the same."""

    value: Any


@triton.jit  # type: ignore[untyped-decorator]
def set_to(x_ptr: Any, setting: tl.constexpr) -> Any:
    value: tl.constexpr = setting.value
    tl.store(x_ptr + tl.program_id(0), tl.full((1,), 1.0, tl.float32).sum(0) / value)


NANS = struct.unpack("<2d", struct.pack("<2Q", 0x7FF8 << 48, 0xFFF8 << 48))


@pytest.mark.parametrize(
    "values", [(1, 1.0, True), (0.0, -0.0, 0), NANS, (2**31, 2**31 + 0.0), (tl.constexpr(0.0), tl.constexpr(-0.0))]
)
def test_equal_constants_that_are_not_the_same(values: tuple[Any, ...]) -> None:
    LAUNCHES.forget()
    for value in (*values, *values):
        both(written, (3,), random(8), value)
        both(written, (3,), random(8, dtype=torch.float64), value)


def test_settings_whose_values_are_equal() -> None:
    for value in (1.0, 1, 0.0, -0.0):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            both(set_to, (3,), random(8), Setting(value))


class Changing:
    """A setting that has a hash, and may change all the same."""

    value = 1.0


def test_a_setting_that_changes() -> None:
    """Settings that may change without another name or object are never replayed."""
    setting = Changing()
    for setting.value in (1.0, 5.0):
        assert both(set_to, (3,), random(8), setting) == 0


@pytest.mark.parametrize(
    "value", [0, 1, -1, True, 2**31 - 1, 2**31, 2**40, -(2**40), 2**63, 0.5, -0.0, tl.constexpr(3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8], ids=str)
def test_numbers_of_every_type(value: Any, dtype: torch.dtype) -> None:
    for scale in (1, 3):
        both(filled, (3,), random(16, dtype=dtype), value, scale)


def test_other_types_of_the_same_memory() -> None:
    """Each is of uint8 for torch."""
    x = random(16).abs().to(torch.uint8)
    for name in ("float8e5", "float8e4nv", "int8", "uint8", "float8e5"):
        results = []
        for is_live in (True, False):
            copy = x.clone()
            with live() if is_live else nullcontext():
                operands = [triton.reinterpret(y, getattr(tl, name)) for y in (copy, x)]
                operations[(4,)](*operands, operands[0], 15, BLOCK=4, OPERATION=added, enable_fp_fusion=False)
            results.append(bits(copy))
        assert results[0] == results[1]


@triton.jit  # type: ignore[untyped-decorator]
def added(x: Any, y: Any) -> Any:
    return x.to(tl.float32) + y.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _twice(x: Any) -> Any:
    return x * 2


@triton.jit  # type: ignore[untyped-decorator]
def _thrice(x: Any) -> Any:
    return x * 3


def _plus() -> int:
    return PLUS + int(TABLE.other)


PLUS = 1
_constant = (
    triton.language.constexpr_function(_plus) if hasattr(tl, "constexpr_function") else triton.constexpr_function(_plus)
)


@triton.jit  # type: ignore[untyped-decorator]
def global_names(x_ptr: Any) -> Any:
    at = tl.program_id(0) * 4 + tl.arange(0, 4)
    more = [y + FACTOR for y in (1, 2)]
    tl.store(
        x_ptr + at, _twice(tl.load(x_ptr + at)) + TABLE.offset + TABLE.function(1) + more[1] + _constant() + _plus()
    )


def test_names_that_mean_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch after each change: of a jit function, a constant, a module's constant, what a Python function reads."""
    here, x = sys.modules[__name__], random(12)
    TABLE.function = _twice
    changes: list[tuple[Any, str, Any]] = [
        (here, "_twice", _thrice), (here, "FACTOR", 5), (TABLE, "offset", 7), (TABLE, "function", _thrice),
        (here, "PLUS", 9), (TABLE, "other", 6), (here, "_plus", lambda: 4), (here, "range", lambda *_: [0]),
    ]  # fmt: skip
    both(global_names, (3,), x)
    for owner, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value, raising=False)
            both(global_names, (3,), x)
        both(global_names, (3,), x)
    assert both(global_names, (3,), x) == 3


def test_rewritten_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/mutations.py lets one function stand for another in the interpreter's own table."""
    TABLE.function = _thrice
    both(global_names, (3,), random(12))
    with monkeypatch.context() as patch:
        patch.setitem(_twice.rewritten_fn, _twice.fn, _thrice.rewrite())
        both(global_names, (3,), random(12))
        patch.undo()
        both(global_names, (3,), random(12))


def kernel_of(expression: str, folder: Path) -> Any:
    """A kernel of a file of its own, whose name others have too."""
    path = folder / f"kernel_{len(list(folder.iterdir()))}.py"
    path.write_text(
        f"import triton, triton.language as tl\n@triton.jit\ndef kernel(x_ptr):\n"
        f"    at = tl.program_id(0)\n    tl.store(x_ptr + at, tl.load(x_ptr + at) {expression})\n"
    )
    names: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names["kernel"]


def test_kernels_of_one_name(tmp_path: Path) -> None:
    for expression in ("+ 1", "* 2", "+ 1"):
        assert both(kernel_of(expression, tmp_path), (3,), random(4)) == 2


@triton.jit  # type: ignore[untyped-decorator]
def prints(x_ptr: Any, HOW: tl.constexpr) -> Any:
    x = tl.load(x_ptr + tl.program_id(0))
    if HOW == 0:
        print("constant")
    elif HOW == 1:
        tl.static_print("constant")
    elif HOW == 2:
        tl.static_print(x)
    elif HOW == 3:
        tl.device_print("x", x)
    elif HOW == 4:
        tl.static_assert(f"{x}" != "")
    tl.store(x_ptr + tl.program_id(0), x + 1)


@pytest.mark.parametrize("how", range(5))
def test_each_program_prints(how: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert both(prints, (4,), random(4), how) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (0 if how == 4 else 8)
    assert lines[:4] == lines[4:]


@triton.jit  # type: ignore[untyped-decorator]
def where(x_ptr: Any, n: Any, BLOCK: tl.constexpr) -> Any:
    place = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0) + tl.program_id(2) * 100
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(x_ptr + at, tl.load(x_ptr + at) + place, mask=at < n)


@pytest.mark.parametrize(
    ("grid", "n_replayed"),
    [((5,), 4), ((2, 3), 5), ((2, 2, 3), 10), ((0,), 0), ((2, 0, 3), 0), ((-1,), 0),
     (lambda meta: (triton.cdiv(12, meta["BLOCK"]),), 2), (lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]), 2), 5)],
)  # fmt: skip
def test_grids(grid: Any, n_replayed: int) -> None:
    """Two programs of (2, 2, 3) stand behind the end of x: one more is recorded."""
    LAUNCHES.forget()
    assert both(where, grid, random(16), 10, BLOCK=4) == n_replayed


@pytest.mark.parametrize("grid", [(1, 1, 1, 1), [2], (2.0,), 3, lambda meta: meta["m"]])
def test_grids_that_are_refused(grid: Any) -> None:
    both(where, grid, random(16), 10, BLOCK=4, fails=True)


@triton.jit  # type: ignore[untyped-decorator]
def guarded(x_ptr: Any, places_ptr: Any, BLOCK: tl.constexpr, NESTED: tl.constexpr) -> Any:
    """Raises where a place is out of bounds, or where x is negative."""
    pid = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + pid * BLOCK + at)
    tl.store(x_ptr + pid * BLOCK + at, x + 1)
    places = tl.load(places_ptr + pid * BLOCK + at)
    taken = _taken(x, places) if NESTED else tl.gather(x, places, 0)
    assert tl.sum(taken, 0) > -1000
    tl.store(x_ptr + pid * BLOCK + at, tl.load(x_ptr + pid * BLOCK + at) + taken)


@triton.jit  # type: ignore[untyped-decorator]
def _taken(x: Any, places: Any) -> Any:
    return tl.gather(x, places, 0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bad", ["place", "sum"])
def test_a_program_that_raises(nested: bool, bad: str) -> None:
    """The third program raises after its first store: what lies in memory and what is raised are the interpreter's."""
    LAUNCHES.forget()
    x, places = random(16), torch.arange(4).repeat(4)
    assert both(guarded, (4,), x, places, BLOCK=4, NESTED=nested) == 3
    wrong_x, wrong_places = x.clone(), places.clone()
    if bad == "place":
        wrong_places[10] = 99
    else:
        wrong_x[8:12] = -1e6
    made = []
    for is_live in (True, False):
        copy = wrong_x.clone()
        with live() if is_live else nullcontext(), pytest.raises(InterpreterError) as raised:
            guarded[(4,)](copy, wrong_places, BLOCK=4, NESTED=nested, enable_fp_fusion=False)
        made.append((bits(copy), str(raised.value)))
    assert made[0] == made[1]
    both(guarded, (4,), x, places, BLOCK=4, NESTED=nested)


WRONG_ARGUMENTS: list[tuple[Any, ...]] = [
    (), (1, 2, 3, 4), (2**70, 2, 4), (torch.zeros(1, device="meta"), 2, 4), ([], {}, 4), ([], 2, []),
    (torch.zeros(1).to_sparse(), 2, 4), (object(), 2, 4), ("x", 2, 4),
]  # fmt: skip


@pytest.mark.parametrize("args", WRONG_ARGUMENTS)
def test_wrong_arguments_are_refused_alike(args: tuple[Any, ...]) -> None:
    outcomes = []
    for is_live in (True, False):
        with live() if is_live else nullcontext():
            outcomes.append(launched(where, (2,), *args))
    assert isinstance(outcomes[0], tuple)
    assert outcomes[0] == outcomes[1]


@triton.jit  # type: ignore[untyped-decorator]
def loops(x_ptr: Any, start: Any, end: Any, step: Any, STEP: tl.constexpr) -> Any:
    total = tl.load(x_ptr + tl.program_id(0))
    for i in tl.range(start, end, STEP):
        total = total * 0.5 + i
    for i in tl.range(start, end, step):
        total = total * 0.5 + i
    for i in tl.range(-3, end, 2**62 if STEP == 1 else STEP):
        total = total * 0.5 + i
    for i in tl.range(start, 7):
        total = total * 0.5 + i
    for i in tl.static_range(0, end % 5, 2):
        total += i
    tl.store(x_ptr + tl.program_id(0), total)


@pytest.mark.parametrize(
    ("start", "end", "step"),
    [(0, 5, 1), (0, 0, 1), (5, 2, 1), (-3, 3, 2), (5, -2, -2), (2**33, 7, 1), (2**31 - 4, 2**31 - 1, 2),
     (2**31 - 4, 2**31 - 1, 5), (-1, 2**31 + 1, 2**30), (2**31 - 1, 2**31 + 1, 1), (2**40, 2**40 + 3, 1),
     (2**63 - 4, 2**63 - 2, 3)],
)  # fmt: skip
def test_ranges(start: int, end: int, step: int) -> None:
    """The counts of Python's range, whatever the types; also close to the end of a type."""
    LAUNCHES.forget()
    assert both(counts, (3,), torch.zeros(2, dtype=torch.int64), start, end, step, step) == 2
    (actual,) = launched(counts, (1,), torch.zeros(2, dtype=torch.int64), start, end, step, step)
    n = len(range(start, end, step))
    assert actual == bits(torch.tensor([n, n]))
    if max(abs(start), abs(end)) < 100:
        assert both(loops, (3,), random(4), start, end, step, step) == 2


@triton.jit  # type: ignore[untyped-decorator]
def counts(x_ptr: Any, start: Any, end: Any, step: Any, STEP: tl.constexpr) -> Any:
    for _ in tl.range(start, end, step):
        tl.store(x_ptr, tl.load(x_ptr) + 1)
    for _ in tl.range(start, end, STEP):
        tl.store(x_ptr + 1, tl.load(x_ptr + 1) + 1)


@triton.jit  # type: ignore[untyped-decorator]
def block_range(x_ptr: Any, BLOCK: tl.constexpr) -> Any:
    for i in tl.range(0, tl.arange(0, BLOCK) + 1):
        tl.store(x_ptr + tl.program_id(0), i)


def test_a_range_up_to_a_block_is_refused_alike() -> None:
    both(block_range, (2,), random(2), BLOCK=4, fails=True)
    both(block_range, (2,), random(2), BLOCK=1)


@triton.jit  # type: ignore[untyped-decorator]
def asserts(x_ptr: Any, limit: Any) -> Any:
    x = tl.load(x_ptr + tl.program_id(0))
    tl.device_assert(x < limit, "too large")
    tl.store(x_ptr + tl.program_id(0), (x.to(tl.int8) + x.to(tl.int8)).to(tl.float32))


def test_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of the interpreter decide on a launch: on assertions, and on sums that are checked."""
    LAUNCHES.forget()
    builder = interpreter.interpreter_builder
    x = torch.tensor([1.0, 2.0, 100.0])
    debug = dataclasses.replace(builder.options, debug=True)
    assert both(asserts, (3,), x, 50) == 2
    with monkeypatch.context() as patch:
        patch.setattr(builder, "options", debug)
        assert both(asserts, (3,), x, 50, fails=True) == 0
        assert both(asserts, (3,), x, 101, fails=True) == 0
        assert both(asserts, (2,), x, 50) == 0
    assert both(asserts, (3,), x, 50) == 3


@triton.jit  # type: ignore[untyped-decorator]
def fails(x_ptr: Any) -> Any:
    tl.static_assert(tl.load(x_ptr + tl.program_id(0)) > 0)


def test_errors_of_kernels_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.compilation, "front_end_debugging", True)
    with pytest.raises(AssertionError):
        fails[(2,)](torch.tensor([1.0, 0.0]), enable_fp_fusion=False)
    monkeypatch.undo()
    both(fails, (2,), torch.tensor([1.0, 0.0]), fails=True)


@triton.jit  # type: ignore[untyped-decorator]
def atomics(x_ptr: Any) -> Any:
    old = tl.atomic_add(x_ptr, 1.0)
    tl.atomic_max(x_ptr + 1 + tl.program_id(0), old)
    tl.store(x_ptr + 7, tl.atomic_cas((x_ptr + 6).to(tl.pointer_type(tl.int32), bitcast=True), 0, 5))


@triton.jit  # type: ignore[untyped-decorator]
def volatile(x_ptr: Any) -> Any:
    first = tl.load(x_ptr + tl.program_id(0), volatile=True)
    tl.store(x_ptr + tl.program_id(0), first + 1)
    tl.debug_barrier()
    tl.store(x_ptr + tl.program_id(0), tl.load(x_ptr + tl.program_id(0), volatile=True) + first)


def test_memory_that_is_read_and_written_at_once() -> None:
    assert both(atomics, (4,), random(8)) == 0
    LAUNCHES.forget()
    assert both(volatile, (4,), random(8)) == 3


@triton.jit  # type: ignore[untyped-decorator]
def _countdown(x: Any, N: tl.constexpr) -> Any:
    if N == 0:
        return x
    return _countdown(x * 0.5 + N, N - 1)


@triton.jit  # type: ignore[untyped-decorator]
def recursive(x_ptr: Any, DEPTH: tl.constexpr) -> Any:
    at = tl.program_id(0) * 2 + tl.arange(0, 2)
    tl.store(x_ptr + at, _countdown(tl.load(x_ptr + at), DEPTH))


def test_recursion() -> None:
    LAUNCHES.forget()
    assert both(recursive, (3,), random(6), DEPTH=60) == 2
    assert both(recursive, (3,), random(6), DEPTH=59) == 2


@triton.jit  # type: ignore[untyped-decorator]
def uneven(x_ptr: Any) -> Any:
    """Every program sees another number."""
    pid = tl.program_id(0)
    x = tl.load(x_ptr + pid)
    for i in range(pid, pid + 3):
        x += i
    tl.store(x_ptr + pid, x)


def test_a_tape_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    LAUNCHES.forget()
    monkeypatch.setattr(recorder, "MOST_EVENTS", 100)
    x = random(64)
    assert both(uneven, (64,), x) == 0
    assert both(uneven, (64,), x) == 0
    (tape,) = LAUNCHES._tapes.values()
    assert not tape.is_usable
    assert len(tape.registers) < 200
    assert tape.first is None


def test_a_long_program_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    LAUNCHES.forget()
    monkeypatch.setattr(recorder, "MOST_EVENTS", 30)
    assert both(recursive, (3,), random(6), DEPTH=60) == 0
    assert both(recursive, (3,), random(6), DEPTH=2) == 2


def test_tapes_that_are_dropped_are_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    LAUNCHES.forget()
    monkeypatch.setattr(tapes, "MOST_TAPES", 2)
    assert [both(recursive, (3,), random(6), DEPTH=depth) for depth in (1, 2, 1, 3, 1, 2)] == [2, 2, 3, 2, 3, 2]
    assert len(LAUNCHES._tapes) == 2


def test_launches_of_two_threads() -> None:
    LAUNCHES.forget()
    x = random(96)
    with live():
        expected = launched(steps, (6,), x, x, 90, 0, 4, BLOCK=N)
    results: list[Any] = []

    def launch() -> None:
        results.extend(launched(steps, (6,), x, x, 90, 0, 4, BLOCK=N) for _ in range(5))

    threads = [threading.Thread(target=launch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 15


def test_kernels_of_the_package_are_replayed() -> None:
    """A step that is like the last one, of other values, is replayed from end to end."""
    param = torch.nn.Parameter(random(5000))
    opt = optim.AdamW([param], lr=0.1)
    for _ in range(3):
        param.grad = random(5000)
        before = LAUNCHES.n_programs - LAUNCHES.n_replayed
        opt.step()
    assert LAUNCHES.n_programs - LAUNCHES.n_replayed == before


STEPS = """
import torch, zlib
from tritopt import optim

def hashes():
    made = []
    for name, dtype, options in (
        ("AdamW", torch.bfloat16, {"master": "split8", "state_dtype": "int8", "max_grad_norm": 1.0}),
        ("LAMB", torch.float16, {"clip_value": 0.5}),
        ("Adafactor", torch.float32, {}),
    ):
        random = torch.Generator("cpu").manual_seed(0)
        shapes = [(64, 70), (33,), (5, 3, 7), ()]
        params = [torch.nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes]
        opt = getattr(optim, name)(params, lr=0.01, **options)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=random).to(dtype)
            opt.step()
        tensors = [x for param in params for x in (param.detach(), *opt.state[param].values())]
        made += [zlib.crc32(x.reshape(-1).view(torch.uint8).numpy().tobytes()) for x in tensors if torch.is_tensor(x)]
    return made
"""


def test_steps_have_the_bits_of_tritons_own_interpreter() -> None:
    """The other process does not `speed_up`; this one's interpreter has its shortcuts even where it runs live."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    names: dict[str, Any] = {}
    exec(STEPS, names)
    program = f"{STEPS}\nprint(hashes())"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before = LAUNCHES.n_replayed
    assert str(names["hashes"]()) == done.stdout.strip()
    assert LAUNCHES.n_replayed > before + 50
