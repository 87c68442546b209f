"""Signum against its formula and by hand, with and without momentum; signs of zero and NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, MOMENTUM, WD, WD_LH, CLIP, RESCALE = 0.1, 0.8, 0.3, 0.2, 0.4, -0.7


# (kernel file, text that occurs once in it, {what is wrong: the text instead}), for tests/mutations.py
MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "signum.py",
        "s.keep * w - s.lr * sign(g)",
        {
            "ascends": "s.keep * w + s.lr * sign(g)",
            "no sign": "s.keep * w - s.lr * g",
            "no decay": "w - s.lr * sign(g)",
            "weights grow": "(2 - s.keep) * w - s.lr * sign(g)",
            "learning rate twice": "(1 - s.lr * (1 - s.keep)) * w - s.lr * sign(g)",
        },
    ),
    (
        "signum.py",
        "s.momentum * momentum - s.one_minus_momentum * g",
        {
            "gradient not averaged": "s.momentum * momentum - g",
            "sign of the gradient": "s.momentum * momentum + s.one_minus_momentum * g",
            "momentum never fades": "momentum - s.one_minus_momentum * g",
            "shares change places": "s.one_minus_momentum * momentum - s.momentum * g",
        },
    ),
    (
        "signum.py",
        "s.keep * w + s.lr * sign(momentum), (momentum,)",
        {
            "ascends": "s.keep * w - s.lr * sign(momentum), (momentum,)",
            "no decay": "w + s.lr * sign(momentum), (momentum,)",
            "no sign": "s.keep * w + s.lr * momentum, (momentum,)",
            "the gradient's sign": "s.keep * w - s.lr * sign(g), (momentum,)",
            "momentum is not kept": "s.keep * w + s.lr * sign(momentum), state",
        },
    ),
    (
        "ops.py",
        "return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))",
        {"1 for 0": "return tl.where(x >= 0, 1.0, -1.0)"},
    ),
]


@pytest.mark.parametrize("wd_lh", [0.0, WD_LH])
def test_formula_with_momentum(wd_lh: float) -> None:
    """Written with the average of the gradients themselves, whose sign is opposite to the buffer's."""

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        g = np.clip(RESCALE * g, -CLIP, CLIP) + WD * w
        state["average"] = MOMENTUM * zeros_at_first(state, "average", w) + (1 - MOMENTUM) * g
        return (1 - LR * wd_lh) * w - LR * np.sign(state["average"])

    options = {"wd": WD, "clip_gradient": CLIP, "rescale_grad": RESCALE}
    assert_follows(formula, "signum", learning_rate=LR, momentum=MOMENTUM, wd_lh=wd_lh, **options)


@pytest.mark.parametrize("options", [{}, {"rescale_grad": RESCALE, "clip_gradient": 1e-30}], ids=repr)
def test_formula_without_momentum(options: dict[str, Any]) -> None:
    """The raw gradient decides, whatever its scale; both decays act on the weight."""

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        return (1 - LR * (WD + WD_LH)) * w - LR * np.sign(g)

    assert_follows(formula, "signum", learning_rate=LR, momentum=0.0, wd=WD, wd_lh=WD_LH, **options)


def test_by_hand() -> None:
    assert one_step("signum", 1.0, 0.5, learning_rate=0.25, momentum=0.0, wd=0.5, wd_lh=0.5) == 0.5
    # averages 0.25, then -0.125
    assert one_step("signum", 1.0, 0.5, -0.5, learning_rate=0.25, momentum=0.5) == 1.0
    assert one_step("signum", 1.0, -0.5, learning_rate=0.25, momentum=0.5, wd_lh=0.5) == 1.125


@pytest.mark.parametrize("use_fused_step", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sign_of_zero_is_zero_and_of_nan_is_nan(momentum: float, use_fused_step: bool) -> None:
    opt = tritopt.create("signum", learning_rate=0.25, momentum=momentum, use_fused_step=use_fused_step)
    weight = torch.ones(5)
    grad = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -1e-40])
    state = opt.create_state(0, weight)
    opt.update([0], [weight], [grad], [state])
    torch.testing.assert_close(weight, torch.tensor([1.0, 1.0, float("nan"), 0.75, 1.25]), equal_nan=True)
    opt.update([0], [weight], [torch.ones(5)], [state])
    assert weight.isnan().tolist() == [False, False, True, False, False]


def test_negative_rescale_turns_the_average_only() -> None:
    assert one_step("signum", 1.0, 0.5, learning_rate=0.25, momentum=0.0, rescale_grad=-2.0) == 0.75
    assert one_step("signum", 1.0, 0.5, learning_rate=0.25, momentum=0.5, rescale_grad=-2.0) == 1.25


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_momentum_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=f"momentum={value}"):
        tritopt.create("signum", momentum=value)


def test_wd_lh_is_a_number() -> None:
    with pytest.raises(TypeError, match=r"wd_lh='0\.1' must be a number"):
        tritopt.create("signum", wd_lh="0.1")


def test_state_only_with_momentum() -> None:
    weight = torch.ones(2, 3)
    assert tritopt.create("signum", momentum=0.0).create_state(0, weight) is None
    assert torch.equal(tritopt.create("signum").create_state(0, weight), torch.zeros(2, 3))
