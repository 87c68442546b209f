"""Reason why a case failed, out of an error: the first one's text, and the line of the author's code that raised it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

import tritopt

_PACKAGES = Path(tritopt.__file__).parent, Path(tritopt.__file__).parents[1] / "kernels"


def reason_of(error: BaseException) -> str:
    """Say what went wrong in one of an optimizer's own functions, also beneath what Triton makes of that.

    Triton's interpreter and its compiler raise an error of their own for each function that was called, of which the
    first says what was wrong, and the compiler's ones where.
    """
    chain = list(_chain(error))
    compiling = [each for each in chain if any(kind.__name__ == "CompilationError" for kind in type(each).__mro__)]
    shown = compiling[-1] if compiling else chain[-1]
    reason = f"{type(shown).__name__}: {shown}"
    if shown is not chain[-1] and str(chain[-1]) not in reason:
        reason += f"\n{type(chain[-1]).__name__}: {chain[-1]}"
    frames = [frame for each in chain for frame in traceback.extract_tb(each.__traceback__) if _is_own(frame.filename)]
    return f"{reason} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else reason


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and then each that it was raised from."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__


def _is_own(filename: str) -> bool:
    """Whether a file belongs neither to tritopt nor to what is installed."""
    path = Path(filename)
    is_installed = {"site-packages", "dist-packages"}.intersection(path.parts) or filename.startswith("<")
    return not is_installed and not any(path.is_relative_to(package) for package in _PACKAGES)
