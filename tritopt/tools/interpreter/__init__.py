"""Triton's interpreter, made faster."""

from tritopt.tools.interpreter.launches import live
from tritopt.tools.interpreter.shortcuts import speed_up

__all__ = ["live", "speed_up"]
