"""Triton, or a stand-in under which kernel files still import where Triton has no build (macOS, Windows)."""

from __future__ import annotations

from inspect import isfunction
from typing import Any

INSTALL_TRITON = (
    "Triton, which is not installed: `pip install 'triton>=3.6'` (Linux; on Windows `pip install triton-windows`)"
)
MISSING_TRITON = f"the fused path needs {INSTALL_TRITON}"

try:
    import triton
    import triton.language as tl
except ImportError:

    class _MissingTriton:
        """Takes the place of decorators, annotations and kernels; only a launch (`kernel[grid]`) fails."""

        def __init__(self, name: str) -> None:
            self.__name__ = name

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # What is decorated keeps its name, which tables of launches show.
            return _MissingTriton(args[0].__name__) if args and isfunction(args[0]) else self

        def __getitem__(self, grid: Any) -> Any:
            raise ImportError(MISSING_TRITON)

    triton = tl = _MissingTriton("triton")
    HAS_TRITON = False
    INTERPRETED = False
else:
    HAS_TRITON = True
    # Triton reads TRITON_INTERPRET when @triton.jit runs, that is while kernel files are imported.
    INTERPRETED = bool(triton.knobs.runtime.interpret)


def _let_arrays_of_one_be_indices() -> None:
    """Let Triton 3.6's interpreter take a number for an index with NumPy 2.4, which refuses `int` of a 1-d array.

    `tl.range` and other loops need it. Newer interpreters squeeze the array as this does. Tried with Triton 3.6.0 and
    NumPy 2.4.6 and 2.5.5.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


if INTERPRETED and triton.__version__.startswith("3.6."):
    _let_arrays_of_one_be_indices()

__all__ = ["HAS_TRITON", "INSTALL_TRITON", "INTERPRETED", "MISSING_TRITON", "tl", "triton"]
