"""A kernel's launch that is made again and again: Triton binds and looks up its arguments once.

`kernel[grid](...)` takes 6 to 9 us, and as long again to make up the compile-time arguments, of which a step changes
none. What Triton has compiled can be run directly, in a microsecond.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from tritopt.engine import private
from tritopt.kernels.language import INTERPRETED

Owner = TypeVar("Owner")


class KernelRecorder(Protocol):
    """Receiver of launches that are told to it in place of being made; every way to launch asks for it first."""

    def kernel(self, kernel: Any, grid: int, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
        """Note one launch, as `Recorder.kernel` of engine/phase.py has it."""


class BoundKernel:
    """One kernel with its grid and compile-time arguments.

    Args:
        kernel: a @triton.jit function.
        grid: number of programs.
        constants: compile-time arguments and options, by name.
    """

    def __init__(self, kernel: Any, grid: int, constants: Mapping[str, Any]) -> None:
        self._kernel = kernel
        self._grid = (grid, 1, 1)
        self._constants = constants
        self._args: tuple[Any, ...] = ()
        self._kinds: list[Any] = []
        self._run: Any = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, record: KernelRecorder | None, *args: Any) -> Any:
        """Launch with these arguments, the kernel's first ones in order. Returns what Triton compiled, if it is new.

        Tensors must lie where they did as long as they are the same objects. record: told of the launch, which then
        is not made, unless it is None.
        """
        if record is not None:
            record.kernel(self._kernel, self._grid[0], args, self._constants)
            return None
        # Before, since an interrupt may come at any moment: a kernel that may have run is one that has.
        launches.n_begun += 1
        try:
            return self._launch(args)
        except Exception:
            launches.n_begun -= 1
            raise

    def _launch(self, args: tuple[Any, ...]) -> Any:
        if self._run is not None and self._binds_as_before(args):
            self._run(*args, *self._rest)
            return None
        if not _is_launching:
            self._bind(_nothing, args)
            return None
        if INTERPRETED:
            # A GPU does not warn of 0 / 0 in lanes past the end; nor should NumPy, which the interpreter computes with.
            with np.errstate(all="ignore"):
                return self._kernel[self._grid](*args, **self._constants)
        compiled = self._kernel[self._grid](*args, **self._constants)
        if compiled is not None:
            self._bind(private.bound(compiled, self._grid), args)
        return compiled

    def _bind(self, run: Any, args: tuple[Any, ...]) -> None:
        self._run, self._args, self._kinds = run, args, list(map(_kind, args))
        # Triton's launchers take all arguments by position, the compile-time ones too, whose values they do not read.
        names = private.names_of(self._kernel)[len(args) :]
        self._rest = tuple(self._constants[name] for name in names)

    def _binds_as_before(self, args: tuple[Any, ...]) -> bool:
        """Whether Triton would run the same binary: it tells apart None, dtypes and alignment."""
        if all(map(is_, args, self._args)):
            return True
        for new, old, kind in zip(args, self._args, self._kinds, strict=True):
            if new is not old and _kind(new) != kind:
                return False
        self._args = args
        return True


def launch_once(record: KernelRecorder | None, kernel: Any, grid: int, *args: Any, **constants: Any) -> None:
    """Launch a kernel that is not bound, since its tables and constants differ from launch to launch.

    Contraction to fma, which changes bits, is forbidden. record: told of the launch, which then is not made, unless it
    is None.
    """
    if record is not None:
        record.kernel(kernel, grid, args, {**constants, "enable_fp_fusion": False})
        return
    launches.n_begun += 1
    try:
        if _is_launching:
            # Lanes past the end hold 0 / 0, as in BoundKernel.
            with np.errstate(all="ignore"):
                kernel[(grid, 1, 1)](*args, **constants, enable_fp_fusion=False)
    except Exception:
        launches.n_begun -= 1
        raise


class _Launches(threading.local):
    """Launches that this thread has made: a step that fails asks whether it has made any."""

    n_begun = 0


launches = _Launches()


def n_launches() -> int:
    """Launches that this thread has begun."""
    return launches.n_begun


class Updates(Generic[Owner]):
    """Updates that a step has come to, of which a failure tells those that wrote something."""

    def __init__(self) -> None:
        self._begun: list[tuple[Iterable[Owner], Callable[[], Any], Any]] = []

    def begin(self, owners: Iterable[Owner], written: Callable[[], Any] = n_launches) -> None:
        """Note who is about to be updated. written: gives another value once something was written for them."""
        self._begun.append((owners, written, written()))

    def written(self) -> list[Owner]:
        """Owners for whom something was written."""
        return [owner for owners, written, before in self._begun if written() != before for owner in owners]


def _kind(arg: Any) -> Any:
    return (arg.dtype, arg.data_ptr() % 16 == 0) if isinstance(arg, torch.Tensor) else None if arg is None else int


_is_launching = True


def is_launching() -> bool:
    """Whether launches are made, as they are outside of `no_launches`."""
    return _is_launching


def _nothing(*args: Any) -> None:
    """Stand in for a kernel within `no_launches`."""


@contextmanager
def no_launches() -> Iterator[None]:
    """Prepare launches and do not make them: what a step then takes is the host's part of it.

    This holds for optimizers that were made within only, since a launch that was made before is bound to its kernel.
    """
    global _is_launching
    before, _is_launching = _is_launching, False
    try:
        yield
    finally:
        _is_launching = before
