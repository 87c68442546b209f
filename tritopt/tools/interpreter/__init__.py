"""Triton's interpreter, made faster."""

from tritopt.tools.interpreter.shortcuts import speed_up

__all__ = ["speed_up"]
