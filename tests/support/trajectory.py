"""Runs an optimizer beside a formula written independently of it, from the paper, in float64 NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import tritopt

Array = npt.NDArray[np.float64]
Formula = Callable[[Array, Array, dict[str, Array], int], Array]
"""(weight, gradient, state kept between calls, t = 1, 2, ...) -> new weight. The state starts empty."""

STEPS = 6
SHAPE = (5, 7)


def assert_follows(formula: Formula, name: str, **arguments: Any) -> None:
    """Both paths of optimizer `name`, on float64 weights, follow the formula to 1e-12 of the distance moved."""
    for use_fused_step in (False, True):
        rng = np.random.default_rng(0)
        start = rng.standard_normal(SHAPE)
        expected, state = start, dict[str, Array]()
        weight = torch.tensor(start)
        opt = tritopt.create(name, use_fused_step=use_fused_step, **arguments)
        opt_state = opt.create_state(0, weight)
        for t in range(1, STEPS + 1):
            grad = rng.standard_normal(SHAPE)
            expected = formula(expected, grad, state, t)
            opt.update([0], [weight], [torch.tensor(grad)], [opt_state])
            error = np.abs(weight.cpu().numpy() - expected).max()
            moved = np.abs(expected - start).max()
            assert error <= 1e-12 * moved, f"{name}, step {t}: off by {error} of {moved} moved"


def zeros_at_first(state: dict[str, Array], name: str, like: Array) -> Array:
    """The state `name`, zero if this is its first use."""
    return state.setdefault(name, np.zeros_like(like))


def history(state: dict[str, Array], name: str, new: Array) -> Array:
    """All values so far under this name, [t, ...], the newest last: for sums that an optimizer forms step by step."""
    state[name] = np.concatenate([state.get(name, new[None][:0]), new[None]])
    return state[name]


def one_step(name: str, weight: float, *grads: float, **arguments: Any) -> float:
    """A single fp32 weight after one step per gradient: for numbers worked out by hand."""
    w = torch.tensor([weight])
    opt = tritopt.create(name, **arguments)
    state = opt.create_state(0, w)
    for grad in grads:
        opt.update([0], [w], [torch.tensor([grad])], [state])
    return w.item()
