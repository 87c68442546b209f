"""Launches of interpreted kernels, most of whose programs are replayed from a tape."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import struct
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from tritopt.tools.interpreter.recorder import Recorder, recorders
from tritopt.tools.interpreter.tape import Tape, is_of_triton, replay

if TYPE_CHECKING:
    from tritopt.tools.interpreter.private import InterpreterParts

MOST_TAPES = 256
"""Number of tapes that are kept, the latest ones: one takes up to a megabyte."""

_VALUE_SEEN_BY: dict[str, Callable[[Any], Any]] = {
    "__index__": lambda array: int(array.squeeze()),
    "__bool__": lambda array: bool(array) if array.size == 1 else True,
}
"""Value that Python sees of a tensor's array, by the method that it asks."""

_UNCHANGING = (bytes, complex, enum.Enum, type, types.BuiltinFunctionType, types.FunctionType, types.ModuleType)
"""Types of compile-time arguments that stay as they are; those of Triton's are besides, and frozen dataclasses."""

_LARGEST = {"int32": 2**31 - 1, "int64": 2**63 - 1}


class Launches:
    """Launches of the interpreter, and the tapes of their kernels. parts: of the interpreter."""

    def __init__(self, parts: InterpreterParts) -> None:
        self.n_programs = self.n_replayed = 0
        self._parts = parts
        self._tapes: OrderedDict[Any, Tape] = OrderedDict()
        self._signatures: dict[Any, inspect.Signature] = {}
        # The interpreter has one place for the number of the program that runs.
        self._lock = threading.RLock()

    def forget(self) -> None:
        """Drop all tapes: each kernel is recorded anew."""
        self._tapes.clear()

    def wrap_launch(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """Return the interpreter's launch, with tapes."""

        @functools.wraps(launch)
        def launched(executor: Any, *args: Any, **constants: Any) -> None:
            with self._lock:
                prepared = self._prepare(executor, args, constants) if _is_taped else None
                if prepared is None:
                    launch(executor, *args, **constants)
                else:
                    self._run(executor, prepared)

        return launched

    def wrap_method(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return an operation of the interpreter that is recorded."""

        @functools.wraps(method)
        def operation(builder: Any, *args: Any, **named: Any) -> Any:
            recorder = recorders.current
            if recorder is None or recorder.is_busy:
                return method(builder, *args, **named)
            recorder.is_busy = True
            try:
                return recorder.call(method, name, builder, args, named)
            finally:
                recorder.is_busy = False

        return operation

    def wrap_numpy(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that calls a function of NumPy's, its last argument, of which the recorder is told."""

        @functools.wraps(method)
        def called(builder: Any, *args: Any) -> Any:
            result = method(builder, *args)
            recorder = recorders.current
            if recorder is not None:
                recorder.last_operation = args[-1], args[:-1], result
            return result

        return called

    def wrap_reduction(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        """Return a reduction of one tensor that is recorded."""
        parts = self._parts

        @functools.wraps(reduce)
        def reduced(reduction: Any, operand: Any, *args: Any, **named: Any) -> Any:
            result = reduce(reduction, operand, *args, **named)
            recorder = recorders.current
            if recorder is None:
                return result
            if not isinstance(result, parts.tensor):
                recorder.stop()
                return result
            kind, dtype = operand.type, operand.handle.dtype

            def again(array: Any) -> Any:
                return reduce(reduction, parts.tensor(parts.handle(array, dtype), kind), *args, **named).handle.data

            recorder.reduced(again, operand.handle, result.handle)
            return result

        return reduced

    def wrap_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call of a jit function by another one, of which the tape is told."""

        @functools.wraps(call)
        def called(function: Any, *args: Any, **named: Any) -> Any:
            recorder = recorders.current
            if recorder is not None:
                recorder.enter(function.rewrite(), function)
            return call(function, *args, **named)

        return called

    def patch_tensor(self, tensor: Any, scope: Any) -> None:
        """Tell the recorder where Python looks at a tensor's value. scope: restores the class's methods."""
        for name, seen in _VALUE_SEEN_BY.items():
            scope.set_attr(tensor, name, _looking(getattr(tensor, name), seen))
        for name in ("__repr__", "__str__"):
            scope.set_attr(tensor, name, _stopping(getattr(tensor, name)))

    def patch_language(self, language: Any, scope: Any) -> None:
        """Let a range that a tensor bounds give tensors, as compiled kernels have them, and not Python's numbers.

        A loop then goes through the same operations whatever number it begins with.
        """
        counted, parts = language.range, self._parts

        def places(at: Any, end: Any, step: Any) -> Iterator[Any]:
            at = parts.semantic.cast(parts.semantic.to_tensor(at), end.type)
            while at < end:
                yield at
                at = at + step

        def ranged(first: Any, second: Any = None, step: Any = 1, **named: Any) -> Any:
            start, end = (0, first) if second is None else (first, second)
            most = _LARGEST.get(end.type.name) if isinstance(end, parts.tensor) else None
            if most is not None and type(step) is int and 0 < step <= most:
                fits = -most <= start <= most if type(start) is int else getattr(start, "type", None) == end.type
                # A sum that wraps around would never come to the end.
                if fits and end <= most - step:
                    return places(start, end, step)
            return counted(first, second, step, **named)

        scope.set_attr(language, "range", ranged)

    def _prepare(self, executor: Any, args: tuple[Any, ...], constants: Mapping[str, Any]) -> _Prepared | None:
        """Return the launch's arguments and its tape; None: it is unlike all that we launch, and has none."""
        if executor.pre_run_hooks or self._parts.is_debugged():
            return None
        try:
            tensors = [arg for arg in (*args, *constants.values()) if hasattr(arg, "data_ptr")]
            if any(tensor.device.type != "cpu" for tensor in tensors):
                return None
            return self._given(executor, args, constants)
        except (AttributeError, RuntimeError, TypeError, ValueError):  # The launch itself says what is wrong.
            return None

    def _given(self, executor: Any, args: tuple[Any, ...], constants: Mapping[str, Any]) -> _Prepared:
        """Return the launch's arguments and its tape. TypeError: it has an argument that may change."""
        if executor.fn not in self._signatures:
            self._signatures[executor.fn] = inspect.signature(executor.fn)
        signature = self._signatures[executor.fn]
        bound = signature.bind(*args, **{name: x for name, x in constants.items() if name in signature.parameters})
        bound.apply_defaults()
        given: dict[str, Any] = {}
        inputs, key = [], [executor.fn, self._parts.builder.options]
        for name, value in bound.arguments.items():
            made = given[name] = value if name in executor.constexprs else self._parts.to_tensors(value)
            if isinstance(made, self._parts.tensor):
                inputs.append(made.handle)
                key.append((made.type.name, made.handle.data.dtype.char))
            elif made is value:
                key.append(self._exact(made))
            else:
                raise TypeError(f"{name} is several values: {value!r}")
        tape = self._tapes.pop(tuple(key), None)
        if tape is None or not tape.is_current:
            tape = Tape(len(inputs))
        self._tapes[tuple(key)] = tape
        if len(self._tapes) > MOST_TAPES:
            self._tapes.popitem(last=False)
        return _Prepared(given, inputs, tape)

    def _exact(self, value: Any) -> Any:
        """Return what the same compile-time arguments share alone: 1, 1.0 and True are equal, so are 0.0 and -0.0."""
        kind = type(value)
        if kind is self._parts.constexpr:
            return kind, self._exact(value.value)
        if kind is float:  # NaNs differ in their bits.
            return kind, struct.pack("d", value)
        if isinstance(value, tuple):
            return (kind, *map(self._exact, value))
        if kind in (int, bool, str):
            return kind, value
        is_frozen = dataclasses.is_dataclass(value) and kind.__dataclass_params__.frozen
        if not (value is None or is_frozen or isinstance(value, _UNCHANGING) or is_of_triton(kind.__module__)):
            raise TypeError(f"{value!r} may change")
        return kind, _Itself(value)

    def _run(self, executor: Any, prepared: _Prepared) -> None:
        given, inputs, tape = prepared
        parts, arrays = self._parts, [handle.data for handle in inputs]
        with ExitStack() as scopes:

            @functools.cache
            def patch() -> None:
                scopes.callback(parts.patch_lang(executor.fn).restore)

            if callable(executor.grid) or tape.first is None:
                patch()
            grid = executor.grid(given) if callable(executor.grid) else executor.grid
            assert len(grid) <= 3, "grid must have at most 3 dimensions"
            grid = grid + (1,) * (3 - len(grid))
            # Of a number among the arguments, a grid makes a tensor, which no program knows.
            grid = [int(size) if isinstance(size, parts.tensor) else size for size in grid]
            parts.builder.set_grid_dim(*grid)
            try:
                for place in product(*map(range, grid)):
                    parts.builder.set_grid_idx(*place)
                    self.n_programs += 1
                    if tape.is_usable:
                        replayed = replay(tape, arrays)
                        if replayed.is_done:
                            self.n_replayed += 1
                            continue
                        recorders.current = Recorder(tape, inputs, replayed, parts)
                        recorders.current.enter(executor.fn)
                    patch()
                    try:
                        executor.fn(**given)
                    except BaseException:
                        tape.give_up()
                        raise
                    finally:
                        recorders.current = None
            except Exception as error:
                raise parts.error(repr(error)) from error


class _Prepared(NamedTuple):
    """Arguments of a launch as a kernel gets them, what holds those that are tensors, and the tape."""

    given: dict[str, Any]
    inputs: list[Any]
    tape: Tape


class _Itself:
    """A value that equals itself alone, whatever its own class says: a setting of 0.0 and one of -0.0 are equal."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def _looking(look: Callable[[Any], Any], seen: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def looked(tensor: Any) -> Any:
        value = look(tensor)
        recorder = recorders.current
        if recorder is not None:
            recorder.looked(tensor.handle, value, seen)
        return value

    return looked


def _stopping(look: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def looked(tensor: Any) -> Any:
        if recorders.current is not None:
            recorders.current.stop()
        return look(tensor)

    return looked


_is_taped = True


@contextmanager
def live() -> Iterator[None]:
    """Have the interpreter run every program itself, for callers that replace a part of it."""
    global _is_taped
    before, _is_taped = _is_taped, False
    try:
        yield
    finally:
        _is_taped = before
