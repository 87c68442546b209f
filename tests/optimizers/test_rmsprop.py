"""RMSProp, plain and centered, against the averages written out as sums, by hand, and its clamp of the weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, history, one_step, zeros_at_first

LR, RHO, MOMENTUM, EPSILON, WD = 0.1, 0.8, 0.7, 1e-2, 0.05
FORMS = [{}, {"centered": True}]

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "rmsprop.py",
        "    var = s.rho * var + s.one_minus_rho * (g * g)\n",
        {
            "a sum": "    var = var + g * g\n",
            "rho changes places": "    var = s.one_minus_rho * var + s.rho * (g * g)\n",
        },
    ),
    (
        "rmsprop.py",
        "(g, var, s.epsilon)",
        {
            "epsilon inside the plain root": "(g, var + s.epsilon, 0.0)",
            "no root": "(g, var * var, s.epsilon)",
            "no epsilon": "(g, var, 0.0)",
        },
    ),
    (
        "rmsprop.py",
        "clip(w - s.lr * quotient, s.clip_weights)",
        {
            "ascends": "clip(w + s.lr * quotient, s.clip_weights)",
            "no learning rate": "clip(w - quotient, s.clip_weights)",
            "bound is not the weights'": "clip(w, s.clip_weights) - s.lr * clip(quotient, s.clip_weights)",
        },
    ),
    (
        "rmsprop.py",
        "sqrt(var - mean * mean + s.epsilon)",
        {
            "epsilon outside the centered root": "(sqrt(var - mean * mean) + s.epsilon)",
            "not centered": "sqrt(var + s.epsilon)",
            "mean not squared": "sqrt(tl.abs(var - mean) + s.epsilon)",
            "sign of the mean": "sqrt(var + mean * mean + s.epsilon)",
        },
    ),
    (
        "rmsprop.py",
        "mean = s.rho * mean + s.one_minus_rho * g",
        {
            "mean of the absolute": "mean = s.rho * mean + s.one_minus_rho * tl.abs(g)",
            "gradient not averaged": "mean = s.rho * mean + g",
        },
    ),
    (
        "rmsprop.py",
        "mom = s.momentum * mom - s.lr",
        {
            "momentum never fades": "mom = mom - s.lr",
            "rho for momentum": "mom = s.rho * mom - s.lr",
            "sign of the gradient": "mom = s.momentum * mom + s.lr",
        },
    ),
    (
        "rmsprop.py",
        "clip(w + mom, s.clip_weights)",
        {
            "centered never clamps": "w + mom",
            "clamps the step": "w + clip(mom, s.clip_weights)",
        },
    ),
]


def average(values: Array) -> Array:
    """The running average of [t, ...], written out."""
    return np.asarray(np.tensordot((1 - RHO) * RHO ** np.arange(len(values))[::-1], values, 1))


@pytest.mark.parametrize("clip_weights", [None, 0.5])
def test_formula(clip_weights: float | None) -> None:
    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        g = g + WD * w
        w = w - LR * g / (np.sqrt(average(history(state, "g", g) ** 2)) + EPSILON)
        return w if clip_weights is None else np.clip(w, -clip_weights, clip_weights)

    options = {"epsilon": EPSILON, "wd": WD, "clip_weights": clip_weights}
    assert_follows(formula, "rmsprop", learning_rate=LR, rho=RHO, momentum=MOMENTUM, **options)


@pytest.mark.parametrize("clip_weights", [None, 0.5])
def test_formula_centered(clip_weights: float | None) -> None:
    """Graves's equations 38 to 41, which have lr = 1e-4, rho = 0.95, momentum = 0.9 and epsilon = 1e-4."""

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        g = g + WD * w
        grads = history(state, "g", g)
        variance = average(grads**2) - average(grads) ** 2
        state["delta"] = MOMENTUM * zeros_at_first(state, "delta", w) - LR * g / np.sqrt(variance + EPSILON)
        w = w + state["delta"]
        return w if clip_weights is None else np.clip(w, -clip_weights, clip_weights)

    options = {"epsilon": EPSILON, "wd": WD, "clip_weights": clip_weights, "centered": True}
    assert_follows(formula, "rmsprop", learning_rate=LR, rho=RHO, momentum=MOMENTUM, **options)


def test_by_hand() -> None:
    # 4 / (sqrt(4) + 2) = 1
    assert one_step("rmsprop", 1.0, 4.0, learning_rate=0.25, rho=0.75, epsilon=2.0) == 0.75
    # 4 / sqrt(4 - 1 + 1) = 2; then no gradient, and half of the momentum
    centered = {"rho": 0.75, "momentum": 0.5, "epsilon": 1.0, "centered": True}
    assert one_step("rmsprop", 1.0, 4.0, learning_rate=0.25, **centered) == 0.5
    assert one_step("rmsprop", 1.0, 4.0, 0.0, learning_rate=0.25, **centered) == 0.25


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_clip_weights(form: dict[str, Any], use_fused_step: bool) -> None:
    """Elements beyond the bound, within it and NaN; 1e39 is infinite in fp32; None and values <= 0 are no bound."""
    start = torch.tensor([3.0, -3.0, 0.25, math.nan])
    for bound, expected in [
        (0.5, [0.5, -0.5, 0.25, math.nan]),
        *[(off, start.tolist()) for off in (None, 0, 0.0, -1.0, math.inf, 1e39)],
    ]:
        w = start.clone()
        opt = tritopt.create("rmsprop", clip_weights=bound, use_fused_step=use_fused_step, **form)
        opt.update([0], [w], [torch.zeros(4)], [opt.create_state(0, w)])
        torch.testing.assert_close(w, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_clip_weights_is_of_the_master(use_fused_step: bool) -> None:
    bound = 0.1  # no bf16 number
    w = torch.ones(3, dtype=torch.bfloat16)
    opt = tritopt.create("rmsprop", clip_weights=bound, multi_precision=True, use_fused_step=use_fused_step)
    state = opt.create_state_multi_precision(0, w)
    opt.update_multi_precision([0], [w], [torch.ones(3)], [state])
    assert torch.equal(state[0], torch.full((3,), bound))
    assert torch.equal(w, state[0].bfloat16())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_negative_variance_is_not_hidden(use_fused_step: bool) -> None:
    """Rounding can make it so; both paths say NaN, as MXNet does, and the clamp keeps it."""
    w = torch.ones(3)
    opt = tritopt.create("rmsprop", centered=True, clip_weights=1.0, use_fused_step=use_fused_step)
    mean, var, mom = opt.create_state(0, w)
    mean.fill_(2)
    var.fill_(3.9)
    opt.update([0], [w], [torch.full((3,), 2.0)], [(mean, var, mom)])
    assert w.isnan().all()


def test_states() -> None:
    w = torch.ones(2, 3)
    assert tritopt.create("rmsprop").create_state(0, w).shape == (2, 3)
    mean_var_mom = tritopt.create("rmsprop", centered=True).create_state(0, w)
    assert [s.shape for s in mean_var_mom] == [(2, 3)] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_states_are_at_least_fp32(dtype: torch.dtype, use_fused_step: bool) -> None:
    """A gradient of 1e-4 squared is 0 in fp16."""
    w = torch.zeros(3, dtype=dtype)
    opt = tritopt.create("rmsprop", use_fused_step=use_fused_step)
    state = opt.create_state(0, w)
    opt.update([0], [w], [torch.full((3,), 1e-4, dtype=dtype)], [state])
    assert state.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.all(state > 0)
    assert torch.all(w < 0)


def test_momentum_is_of_the_centered_form_alone() -> None:
    results = {momentum: one_step("rmsprop", 1.0, 0.5, 0.5, momentum=momentum) for momentum in (0.0, 0.9)}
    assert results[0.0] == results[0.9]


def test_state_of_the_other_form_is_refused() -> None:
    w = torch.ones(3)
    plain, centered = (tritopt.create("rmsprop", centered=value) for value in (False, True))
    with pytest.raises(ValueError, match=r"states \(mean, var, mom\) per weight, got a float32 tensor"):
        centered.update([0], [w], [w], [plain.create_state(0, w)])
    with pytest.raises(ValueError, match=r"states \(var\) per weight, got a tuple"):
        plain.update([0], [w], [w.clone()], [centered.create_state(0, w)])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"rho": 1.0}, ValueError, "rho=1.0"),
        ({"momentum": -0.9}, ValueError, "momentum=-0.9"),
        ({"epsilon": -1e-8}, ValueError, "epsilon=-1e-08"),
        ({"clip_weights": math.nan}, ValueError, "clip_weights=nan"),
        ({"clip_weights": True}, TypeError, "clip_weights=True"),
        ({"centered": 0.9}, TypeError, "centered=0.9 must be True or False"),
        ({"gamma1": 0.9}, TypeError, "pass rho instead"),
        ({"gamma2": 0.9}, TypeError, "pass momentum instead"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tritopt.create("rmsprop", **wrong)
