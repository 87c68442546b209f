"""Adamax against its closed form, which needs no recurrence, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step

LR, BETA1, BETA2, EPSILON, WD = 0.1, 0.8, 0.95, 1e-2, 0.05

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    ("adamax.py", "s.beta1 * mean", {"beta2 for beta1": "s.beta2 * mean"}),
    ("adamax.py", "s.lr * mean", {"no learning rate": "mean"}),
    ("adamax.py", "s.one_minus_beta1 * g", {"gradient not averaged": "g"}),
    ("adamax.py", "s.beta2 * norm", {"norm never fades": "norm", "beta1 for beta2": "s.beta1 * norm"}),
    ("adamax.py", "tl.abs(g)", {"sign of the gradient": "g", "gradient squared": "g * g"}),
    ("adamax.py", "tl.maximum(", {"the smaller": "tl.minimum("}),
    (
        "adamax.py",
        "norm + s.epsilon)",
        {"no epsilon": "norm)", "norm squared": "norm * norm + s.epsilon)"},
    ),
    ("adamax.py", "return w - div", {"ascends": "return w + div"}),
    ("adamax.py", ", (mean, norm)\n", {"norm is not kept": ", (mean, state[1])\n", "swapped": ", (norm, mean)\n"}),
]


def test_formula() -> None:
    """m_t = (1 - beta1) sum_i beta1^(t-i) g_i and u_t = max_i beta2^(t-i) |g_i|."""

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        past = state["past"] = np.stack([*state.get("past", []), g + WD * w])
        age = np.arange(t)[::-1, None, None]
        mean: Array = (1 - BETA1) * (BETA1**age * past).sum(0)
        norm: Array = (BETA2**age * np.abs(past)).max(0)
        return w - LR * mean / (1 - BETA1**t) / (norm + EPSILON)

    assert_follows(formula, "adamax", learning_rate=LR, beta1=BETA1, beta2=BETA2, epsilon=EPSILON, wd=WD)


def test_by_hand() -> None:
    # m = 4, u = 8, corrected by 1/2: a step of 0.75; then m = 1, u = max(4, 2), by 3/4: 0.25
    arguments = {"learning_rate": 0.75, "beta1": 0.5, "beta2": 0.5, "epsilon": 0.0}
    assert one_step("adamax", 1.0, 8.0, **arguments) == 0.25
    assert one_step("adamax", 1.0, 8.0, -2.0, **arguments) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_zero_gradient_in_half_precision_is_not_nan(dtype: torch.dtype, use_fused_step: bool) -> None:
    """epsilon = 1e-8 is 0 in fp16; the arithmetic is fp32, so it is not lost."""
    w = torch.ones(3, dtype=dtype)
    opt = tritopt.create("adamax", use_fused_step=use_fused_step)
    state = opt.create_state(0, w)
    opt.update([0], [w], [torch.zeros(3, dtype=dtype)], [state])
    assert w.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_nan_stays_in_the_norm(dtype: torch.dtype, use_fused_step: bool) -> None:
    """NaN stays on either side of the maximum, and with its element."""
    w = torch.ones(3, dtype=dtype)
    opt = tritopt.create("adamax", use_fused_step=use_fused_step)
    mean, norm = opt.create_state(0, w)
    for grad in ([1.0, float("nan"), 1.0], [1.0, 1.0, 1.0]):
        opt.update([0], [w], [torch.tensor(grad, dtype=dtype)], [(mean, norm)])
        for tensor in (w, mean, norm):
            assert tensor.isnan().tolist() == [False, True, False]
