"""Launches of interpreted kernels, most of whose programs are replayed from a tape."""

from __future__ import annotations

import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from tritopt.tools.interpreter.recorder import Recorder, recorders
from tritopt.tools.interpreter.tape import Tape, replay

if TYPE_CHECKING:
    from tritopt.engine.private import InterpreterParts

MOST_TAPES = 256
"""Number of tapes that are kept, the latest ones: one takes up to a megabyte."""

_SEEN: dict[str, Callable[[Any], Any]] = {
    "__index__": lambda array: int(array.squeeze()),
    "__bool__": lambda array: bool(array) if array.size == 1 else True,
}
"""Value that Python sees of a tensor's array, by the method that it asks."""


class Launches:
    """Launches of the interpreter, and the tapes of their kernels. parts: of the interpreter."""

    def __init__(self, parts: InterpreterParts) -> None:
        self.n_programs = self.n_replayed = 0
        self._parts = parts
        self._tapes: OrderedDict[Any, Tape] = OrderedDict()
        self._signatures: dict[Any, inspect.Signature] = {}
        # The interpreter has one place for the number of the program that runs.
        self._lock = threading.RLock()

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
        """Return a method that calls a function of NumPy's, its last argument, and says so."""

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
                recorder.tape.enter(function.rewrite(), function)
            return call(function, *args, **named)

        return called

    def patch_tensor(self, tensor: Any, scope: Any) -> None:
        """Say so where Python looks at a tensor's value. scope: restores the class's methods."""
        for name, seen in _SEEN.items():
            scope.set_attr(tensor, name, _looking(getattr(tensor, name), seen))

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
            if isinstance(end, parts.tensor) and isinstance(step, int) and step > 0:
                return places(start, end, step)
            return counted(first, second, step, **named)

        scope.set_attr(language, "range", ranged)

    def _prepare(self, executor: Any, args: tuple[Any, ...], constants: Mapping[str, Any]) -> _Prepared | None:
        """Return the launch's arguments and its tape; None: it is unlike all that we launch, and has none."""
        tensors = [arg for arg in (*args, *constants.values()) if hasattr(arg, "data_ptr")]
        if executor.pre_run_hooks or any(tensor.device.type != "cpu" for tensor in tensors):
            return None
        if executor.fn not in self._signatures:
            self._signatures[executor.fn] = inspect.signature(executor.fn)
        signature = self._signatures[executor.fn]
        bound = signature.bind(*args, **{name: x for name, x in constants.items() if name in signature.parameters})
        bound.apply_defaults()
        given, inputs, key = {}, [], [executor.fn]
        try:
            for name, value in bound.arguments.items():
                made = value if name in executor.constexprs else self._parts.to_tensors(value)
                given[name] = made
                if isinstance(made, self._parts.tensor):
                    inputs.append(made.handle)
                    key.append((made.type.name, made.handle.data.dtype.char))
                else:
                    key.append(self._exact(made))
            tape = self._tapes.pop(tuple(key), None)
        except TypeError:  # which has no hash
            return None
        if tape is None or not tape.is_current:
            tape = Tape(len(inputs))
        self._tapes[tuple(key)] = tape
        if len(self._tapes) > MOST_TAPES:
            self._tapes.popitem(last=False)
        return _Prepared(given, inputs, tape)

    def _exact(self, value: Any) -> Any:
        """Return what equal compile-time arguments share alone: 1, 1.0 and True are equal, so are 0.0 and -0.0."""
        if isinstance(value, self._parts.constexpr):
            return self._parts.constexpr, self._exact(value.value)
        if isinstance(value, float):
            return float, value.hex()
        if isinstance(value, tuple):
            return (type(value), *map(self._exact, value))
        return type(value), value

    def _run(self, executor: Any, prepared: _Prepared) -> None:
        given, inputs, tape = prepared
        parts, scope = self._parts, None
        grid = executor.grid(given) if callable(executor.grid) else executor.grid
        grid = grid + (1,) * (3 - len(grid))
        arrays = [handle.data for handle in inputs]
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
                    tape.enter(executor.fn)
                scope = scope or parts.patch_lang(executor.fn)
                try:
                    executor.fn(**given)
                except BaseException:
                    tape.is_usable = False
                    raise
                finally:
                    recorders.current = None
        except Exception as error:
            raise parts.error(repr(error)) from error
        finally:
            if scope is not None:
                scope.restore()


class _Prepared(NamedTuple):
    """Arguments of a launch as a kernel gets them, what holds those that are tensors, and the tape."""

    given: dict[str, Any]
    inputs: list[Any]
    tape: Tape


def _looking(look: Callable[[Any], Any], seen: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def looked(tensor: Any) -> Any:
        value = look(tensor)
        recorder = recorders.current
        if recorder is not None:
            recorder.looked(tensor.handle, value, seen)
        return value

    return looked


_is_taped = True


@contextmanager
def live() -> Iterator[None]:
    """Have the interpreter run every program itself: for who replaces a part of it."""
    global _is_taped
    before, _is_taped = _is_taped, False
    try:
        yield
    finally:
        _is_taped = before
