"""AdamW against its formula and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tritopt
from tests.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, BETA1, BETA2, EPSILON, WD = 0.1, 0.8, 0.95, 1e-2, 0.3


@pytest.mark.parametrize("correct_bias", [True, False])
def test_formula(correct_bias: bool) -> None:
    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        state["m"] = BETA1 * zeros_at_first(state, "m", w) + (1 - BETA1) * g
        state["v"] = BETA2 * zeros_at_first(state, "v", w) + (1 - BETA2) * g**2
        a = LR * math.sqrt(1 - BETA2**t) / (1 - BETA1**t) if correct_bias else LR
        return w - a * (state["m"] / (np.sqrt(state["v"]) + EPSILON) + WD * w)

    moments = {"beta1": BETA1, "beta2": BETA2, "epsilon": EPSILON}
    assert_follows(formula, "adamw", learning_rate=LR, wd=WD, correct_bias=correct_bias, **moments)


def test_decay_alone_by_hand() -> None:
    # the gradient is 0: what is left is lr sqrt(0.25) / 0.5 * wd = 0.25 * 0.5 of the weight
    assert one_step("adamw", 1.0, 0.0, learning_rate=0.25, beta1=0.5, beta2=0.75, wd=0.5) == 0.875


def test_negative_decay_is_honoured() -> None:
    assert one_step("adamw", 1.0, 0.0, learning_rate=0.25, beta1=0.5, beta2=0.75, wd=-0.5) == 1.125


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_rescale_of_zero_skips(use_fused_step: bool) -> None:
    w = torch.ones(3)
    opt = tritopt.create("adamw", wd=0.5, rescale_grad=0.0, use_fused_step=use_fused_step)
    state = opt.create_state(0, w)
    opt.update([0], [w], [torch.ones(3)], [state])
    assert w.eq(1).all()
    assert opt.num_update == 1
