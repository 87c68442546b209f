"""AdamW against its formula and by hand; with amsgrad also against torch's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, BETA1, BETA2, EPSILON, WD = 0.1, 0.8, 0.95, 1e-2, 0.3


# (kernel file, text that occurs once in it, {what is wrong: the text instead}), for tests/mutations.py
MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "adamw.py",
        "adam_update(s.keep * w, g, state, s)",
        {
            "weights grow": "adam_update((2 - s.keep) * w, g, state, s)",
            "no decay": "adam_update(w, g, state, s)",
            "learning rate twice": "adam_update((1 - s.lr * (1 - s.keep)) * w, g, state, s)",
            "coupled decay": "adam_update(w, g + (1 - s.keep) * w, state, s)",
            "ascends": "adam_update(s.keep * w, -g, state, s)",
        },
    ),
    (
        "adamw.py",
        "tl.maximum(max_var, var, propagate_nan=tl.PropagateNan.ALL)",
        {
            "no maximum": "var",
            "minimum": "tl.minimum(max_var, var, propagate_nan=tl.PropagateNan.ALL)",
            "maximum of the gradients": "tl.maximum(max_var, g * g, propagate_nan=tl.PropagateNan.ALL)",
        },
    ),
    (
        "adamw.py",
        "max_var, s.epsilon)",
        {"largest not used": "var, s.epsilon)", "epsilon inside the root": "max_var + s.epsilon, 0.0)"},
    ),
    (
        "adamw.py",
        "s.keep * w - s.lr",
        {
            "no decay": "w - s.lr",
            "weights grow": "(2 - s.keep) * w - s.lr",
        },
    ),
    ("adamw.py", "s.beta1 * mean", {"beta2 for beta1": "s.beta2 * mean"}),
    ("adamw.py", "s.beta2 * var", {"beta1 for beta2": "s.beta1 * var"}),
    ("adamw.py", "(mean, var, max_var)\n", {"largest is not kept": "(mean, var, var)\n"}),
]


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


@pytest.mark.parametrize("correct_bias", [True, False])
def test_amsgrad_formula(correct_bias: bool) -> None:
    """All second moments are kept, and the largest looked up; beta2 is so low that it is not always the last."""
    beta2, seconds = 0.4, list[Array]()

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        if t == 1:
            seconds.clear()
        state["m"] = BETA1 * zeros_at_first(state, "m", w) + (1 - BETA1) * g
        seconds.append(beta2 * seconds[-1] + (1 - beta2) * g**2 if seconds else (1 - beta2) * g**2)
        largest: Array = np.max(seconds, axis=0)
        a = LR * math.sqrt(1 - beta2**t) / (1 - BETA1**t) if correct_bias else LR
        return w - a * (state["m"] / (np.sqrt(largest) + EPSILON) + WD * w)

    moments = {"beta1": BETA1, "beta2": beta2, "epsilon": EPSILON}
    assert_follows(formula, "adamw", learning_rate=LR, wd=WD, correct_bias=correct_bias, amsgrad=True, **moments)


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_amsgrad_is_torch_s(use_fused_step: bool) -> None:
    """Epsilon and decay, which stand elsewhere in torch's, are 0."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    weight, parameter = start.clone(), torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([parameter], LR, betas=(BETA1, 0.4), eps=0.0, weight_decay=0.0, amsgrad=True)
    options: dict[str, Any] = {"learning_rate": LR, "beta1": BETA1, "beta2": 0.4, "epsilon": 0.0}
    ours = tritopt.create("adamw", amsgrad=True, use_fused_step=use_fused_step, **options)
    state = ours.create_state(0, weight)
    for _ in range(6):
        parameter.grad = torch.randn(4, 5, dtype=torch.float64, generator=generator)
        theirs.step()
        ours.update([0], [weight], [parameter.grad], [state])
        torch.testing.assert_close(weight, parameter.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(state[2], theirs.state[parameter]["max_exp_avg_sq"], rtol=0, atol=1e-14)


def test_amsgrad_by_hand() -> None:
    # v = 3, then 0.75 + 0.75 only: both steps divide by sqrt(3)
    options: dict[str, Any] = {"learning_rate": 0.5, "beta1": 0.0, "beta2": 0.25, "epsilon": 0.0}
    options |= {"correct_bias": False, "amsgrad": True}
    assert one_step("adamw", 1.0, 2.0, 1.0, **options) == pytest.approx(1 - 0.5 * (2 + 1) / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_nan_stays_the_largest(use_fused_step: bool) -> None:
    """Whether it is in the new second moment or, loaded from elsewhere, in the maximum alone."""
    opt = tritopt.create("adamw", amsgrad=True, use_fused_step=use_fused_step)
    weight = torch.ones(3)
    state = opt.create_state(0, weight)
    state[2][2] = float("nan")
    opt.update([0], [weight], [torch.tensor([1.0, float("nan"), 1.0])], [state])
    assert state[1].isnan().tolist() == [False, True, False]
    for tensor in (weight, state[2]):
        assert tensor.isnan().tolist() == [False, True, True]


def test_amsgrad_has_a_third_state_and_is_a_bool() -> None:
    weight = torch.ones(3)
    assert [len(tritopt.create("adamw", amsgrad=on).create_state(0, weight)) for on in (False, True)] == [2, 3]
    two = tritopt.create("adamw").create_state(0, weight)
    with pytest.raises(ValueError, match=r"states \(mean, var, max_var\)"):
        tritopt.create("adamw", amsgrad=True).update([0], [weight], [weight], [two])
    with pytest.raises(TypeError, match="amsgrad='False' must be True or False"):
        tritopt.create("adamw", amsgrad="False")
