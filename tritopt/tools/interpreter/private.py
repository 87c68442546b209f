"""Private names of Triton's interpreter: all that this package relies on.

Tried with Triton 3.6 to 3.9; `speed_up` leaves other versions alone. tests/engine/test_private.py refuses such names
elsewhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from tritopt.engine.private import TRIED_TRITON
from tritopt.kernels.language import triton

AnyLaunches = TypeVar("AnyLaunches")


def is_tried_interpreter() -> bool:
    """Whether `wrap_interpreter` knows this version of Triton."""
    return str(triton.__version__).startswith(tuple(f"{version}." for version in TRIED_TRITON))


def wrap_interpreter(
    patch_lang: Callable[[Any], Any],
    np_dtype: Callable[[Any], Any],
    unwrap: Callable[[Any], Any],
    constructors: Callable[[Any], tuple[Any, Any]],
    patch_attr: Callable[[Any, Any], Any],
    methods: Callable[[Any, Any], Mapping[str, Any]],
) -> None:
    """Replace internals of the interpreter until the process ends.

    Args:
        patch_lang: takes the function that replaces triton.language in a kernel's names, and returns another.
        np_dtype: takes the function that gives NumPy's dtype of a type, and returns another.
        unwrap: takes the function that takes values out of constexpr, and returns another.
        constructors: takes triton.language.core, and returns constructors of block_type and tensor.
        patch_attr: takes the function that replaces one function of triton.language, and the semantics that it
            passes; returns another such function.
        methods: takes the class of these semantics and that of handles; returns methods of the first by name.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    core: Any = importlib.import_module("triton.language.core")
    interpreter._patch_lang = patch_lang(interpreter._patch_lang)
    interpreter._get_np_dtype = np_dtype(interpreter._get_np_dtype)
    core._unwrap_if_constexpr = unwrap(core._unwrap_if_constexpr)
    core.block_type.__init__, core.tensor.__init__ = constructors(core)
    interpreter._patch_attr = patch_attr(interpreter._patch_attr, interpreter.interpreter_semantic)
    semantic = type(interpreter.interpreter_semantic)
    for name, method in methods(semantic, interpreter.TensorHandle).items():
        setattr(semantic, name, method)


class InterpreterParts(NamedTuple):
    """Internals of the interpreter that a recorder of its programs takes."""

    handle: Any
    """Class of what holds a NumPy array and Triton's type of it."""
    tensor: Any
    """Class of a kernel's values, which have a handle."""
    constexpr: Any
    """Class of a compile-time value that says so."""
    builder: Any
    """Object that carries out operations, each a method that takes handles and returns one."""
    semantic: Any
    """Object that makes operations of a kernel's expressions."""
    memory: Any
    """Module with `load` and `store`."""
    to_tensors: Callable[[Any], Any]
    """Makes of a launch's arguments those of a kernel."""
    patch_lang: Callable[[Any], Any]
    """Replaces triton.language in a kernel's names, until what it returns is restored."""
    error: type[Exception]
    """Class of the error that a launch raises."""
    is_debugged: Callable[[], bool]
    """Says whether a launch raises a kernel's own error."""


def wrap_programs(make: Callable[[InterpreterParts], AnyLaunches]) -> AnyLaunches:
    """Let `Launches` wrap the interpreter until the process ends. make: takes its parts, and returns them."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    core: Any = importlib.import_module("triton.language.core")
    builder, kind, executor = interpreter.interpreter_builder, interpreter.InterpreterBuilder, interpreter.GridExecutor
    launches = make(
        InterpreterParts(
            interpreter.TensorHandle,
            core.tensor,
            core.constexpr,
            builder,
            interpreter.interpreter_semantic,
            interpreter._interpreter,
            interpreter._implicit_cvt,
            lambda function: interpreter._patch_lang(function),
            interpreter.InterpreterError,
            lambda: triton.knobs.compilation.front_end_debugging,
        )
    )
    wrappers: Any = launches

    def method(name: str) -> Callable[..., Any]:
        return lambda builder, *args, **named: getattr(kind, name)(builder, *args, **named)  # as it is by then

    operations = [name for name in dir(kind) if name.startswith(("create_", "get_")) and not name.endswith("_ty")]
    methods = {name: wrappers.wrap_method(name, method(name)) for name in operations}
    methods |= {f"{n}_op": wrappers.wrap_numpy(method(f"{n}_op")) for n in ("unary", "binary", "ternary")}
    builder.__class__ = type(kind.__name__, (kind,), methods)
    for name in ("sum", "min_max"):
        setattr(interpreter.ReduceOps, name, wrappers.wrap_reduction(getattr(interpreter.ReduceOps, name)))
    called = interpreter.InterpretedFunction
    called.__call__ = wrappers.wrap_call(called.__call__)
    executor.__call__ = wrappers.wrap_launch(executor.__call__)
    interpreter._patch_lang_tensor = _then(interpreter._patch_lang_tensor, wrappers.patch_tensor)
    interpreter._patch_lang_core = _then(interpreter._patch_lang_core, wrappers.patch_language)
    return launches


def _then(first: Callable[..., None], second: Callable[..., None]) -> Callable[..., None]:
    def both(*args: Any) -> None:
        first(*args)
        second(*args)

    return both
