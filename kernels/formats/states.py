"""Formats that store states in fewer bits than they are computed in; format.py says what a format is.

All of these round stochastically: a state moves by a thousandth of itself in a step, less than half the distance of two
stored numbers, and rounding to nearest would never move it. Random bits come from the step's one Philox call for eight
elements: the weight takes an element's own, state i those of its neighbour i + 1 places on.

All but bf16 have scales, which scales.py explains. What is not 0 is not stored as 0 of squares: what divides by its
root would take a step of any size.
"""

from __future__ import annotations

from tritopt.kernels.formats.format import Format
from tritopt.kernels.formats.fp8 import FP8, FP8_SQUARES
from tritopt.kernels.formats.fp16 import BF16, FP16, FP16_SQUARES
from tritopt.kernels.formats.int8 import INT8, INT8_SQUARES

SIGNED, SQUARES = "signed", "squares"
"""Kinds of states: of either sign, linear in the gradients; sums of squares of them, never negative."""
STATE_FORMATS: dict[str, dict[str, Format]] = {
    "bf16": {SIGNED: BF16, SQUARES: BF16},
    "fp16": {SIGNED: FP16, SQUARES: FP16_SQUARES},
    "int8": {SIGNED: INT8, SQUARES: INT8_SQUARES},
    "fp8": {SIGNED: FP8, SQUARES: FP8_SQUARES},
}
"""Formats by the name that `state_dtype` has for them, and by the kind of state."""
