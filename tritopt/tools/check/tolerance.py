"""The distances that two results may lie apart, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Distance that two results may lie apart: the sum of these allowances."""

    stored: float
    """Number of ulps of the dtype that the tensor is stored in."""
    computed: float
    """Number of ulps of the dtype of the arithmetic."""
    moved: float
    """Share of the tensor's largest movement in this step, in epsilons of the dtype of the arithmetic."""
    reason: str
    """Roundings that it allows for, in words for a message."""
    codes: float = 0
    """Distances to the next number, on the other result's side, that a state of fewer bits could have been stored as.
    Its `stored` is that of fp32, which it is compared as."""


# The only tolerances there are. An ulp is that of the larger of an element's old and expected new value.
TOLERANCES = {
    "identical": Tolerance(0, 0, 0, "nothing: both do the same operations in the same order, each rounded to nearest"),
    "reordered": Tolerance(
        1,
        1,
        8,
        "a few roundings: for sums in another order, torch's root in fp64, a user's own choice of operations",
        codes=2,  # each result is less than one from what it was before rounding
    ),
    "truth": Tolerance(
        0.5,
        2,
        16,
        "half an ulp for the store, two roundings of the weight, and 16 operations that make the movement",
        codes=1,  # as rounding goes up or down by chance
    ),
    # Weights and masters that are stored otherwise have these in place of the two. A master is compared as the fp32
    # number that is behind it, and an ulp is that of fp32.
    "kahan master, truth": Tolerance(
        128, 2, 16, "2^-16: a compensation of 8 bits, below half an ulp of bf16, so that it is one of its weight"
    ),
    "kahan master, reordered": Tolerance(128, 1, 8, "2^-16: two of these, rounded apart"),
    "split8 master, truth": Tolerance(256, 2, 16, "2^-15: one unit of 16 bits, as rounding goes up or down by chance"),
    "split8 master, reordered": Tolerance(256, 1, 8, "2^-15: the bits drawn are the same, and one unit may be crossed"),
    "split8 weight, truth": Tolerance(0.51, 2, 16, "half an ulp for the store, and one of the master behind it"),
    "stochastic weight, truth": Tolerance(1, 2, 16, "one ulp, as rounding goes up or down by chance"),
}

PRODUCTS = {torch.bfloat16: 8.0, torch.float32: 128.0}
"""Share of the largest movement that matrix products add to a tolerance, in epsilons of the dtype they are rounded to.

Their sums may have any order. An iteration of 15 products turns that, or a rounding of what it reads, into 4.1 epsilons
of bfloat16 and 73 of float32 at most, measured on matrices of 1 to 128 rows: in bfloat16 most roundings agree.
"""


def with_products(tolerance: Tolerance, products: torch.dtype, compute: torch.dtype, power: int = 1) -> Tolerance:
    """Widen the tolerance of a tensor whose update is made of products that are rounded to this dtype.

    power: 1, or 2 if it is made of their squares, whose errors are twice as large.
    """
    n = power * PRODUCTS[products]
    more = n * torch.finfo(products).eps / torch.finfo(compute).eps
    name = str(products).removeprefix("torch.")
    reason = f"{tolerance.reason}; and {n:g} epsilons of {name}, for products in any order"
    return tolerance._replace(moved=tolerance.moved + more, reason=reason)
