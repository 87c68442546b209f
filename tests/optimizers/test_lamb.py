"""LAMB against the paper's algorithm, and the corners of its trust ratio."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, BETA1, BETA2, EPSILON, WD = 0.1, 0.8, 0.95, 1e-2, 0.3


# (kernel file, text that occurs once in it, {what is wrong: the text instead}), for tests/mutations.py
MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    ("lamb.py", "mean * s.mean_correction", {"mean not corrected": "mean"}),
    (
        "lamb.py",
        "var * s.var_correction",
        {"variance not corrected": "var", "the mean's correction": "var * s.mean_correction"},
    ),
    (
        "lamb.py",
        "var * s.var_correction, s.epsilon)",
        {"epsilon inside the root": "var * s.var_correction + s.epsilon, 0.0)"},
    ),
    (
        "lamb.py",
        "add_decay(_direction(mean, var, s), w, decay_of(sums[0], s))",
        {"no decay": "_direction(mean, var, s)"},
    ),
    ("lamb.py", "add_decay(_direction(mean, var, s), w, s.wd)", {"norm without decay": "_direction(mean, var, s)"}),
    ("lamb.py", "s.beta1 * mean", {"beta2 for beta1": "s.beta2 * mean"}),
    ("lamb.py", "s.beta2 * var", {"beta1 for beta2": "s.beta1 * var"}),
    ("lamb.py", "s.one_minus_beta1 * g", {"gradient not averaged": "g"}),
    (
        "lamb.py",
        "(w * w, direction * direction)",
        {
            "norm of the gradient": "(g * g, direction * direction)",
            "norms change places": "(direction * direction, w * w)",
        },
    ),
    ("lamb.py", "sqrt(weight_sum)", {"norm not rooted": "weight_sum"}),
    ("lamb.py", "tl.where(weight_norm < s.lower_bound, s.lower_bound, weight_norm)", {"no lower bound": "weight_norm"}),
    ("lamb.py", "tl.where(weight_norm > s.upper_bound, s.upper_bound, weight_norm)", {"no upper bound": "weight_norm"}),
    (
        "lamb.py",
        "is_plain | (weight_norm == 0) | (direction_norm == 0)",
        {"divides by zero": "weight_norm == 0", "zero weights stay zero": "direction_norm == 0"},
    ),
    ("lamb.py", "s.lr * trust_ratio(sums[0], sums[1], s).to(w.dtype)", {"no trust ratio": "s.lr"}),
    ("lamb.py", "return w - step", {"ascends": "return w + step"}),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias_correction": False},
        {"lower_bound": 8.0},
        {"upper_bound": 2.0},
        {"lower_bound": 0.0, "upper_bound": 0.0},
    ],
)
def test_formula(options: dict[str, Any]) -> None:
    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        state["m"] = BETA1 * zeros_at_first(state, "m", w) + (1 - BETA1) * g
        state["v"] = BETA2 * zeros_at_first(state, "v", w) + (1 - BETA2) * g**2
        m, v = state["m"], state["v"]
        if options.get("bias_correction", True):
            m, v = m / (1 - BETA1**t), v / (1 - BETA2**t)
        update = m / (np.sqrt(v) + EPSILON) + WD * w
        size = max(np.linalg.norm(w), options.get("lower_bound") or 0)
        size = min(size, options.get("upper_bound") or np.inf)
        return w - LR * size / np.linalg.norm(update) * update

    moments = {"beta1": BETA1, "beta2": BETA2, "epsilon": EPSILON}
    assert_follows(formula, "lamb", learning_rate=LR, wd=WD, **moments, **options)


def test_by_hand() -> None:
    # the direction is the gradient's sign, of norm 1; the trust ratio is |w| = 2
    assert one_step("lamb", 2.0, 5.0, learning_rate=0.25, beta1=0.5, beta2=0.75, epsilon=0.0) == 1.5


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_trust_ratio_is_one_where_a_norm_is_zero(use_fused_step: bool) -> None:
    opt = tritopt.create("lamb", learning_rate=0.25, beta1=0.5, beta2=0.75, use_fused_step=use_fused_step)
    zero_weight, zero_grad = torch.zeros(3), torch.ones(3)
    states = [opt.create_state(i, zero_weight) for i in range(2)]
    opt.update([0, 1], [zero_weight, zero_grad], [torch.ones(3), torch.zeros(3)], states)
    torch.testing.assert_close(zero_weight, torch.full((3,), -0.25))
    assert zero_grad.eq(1).all()


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_nan_spreads_to_its_tensor_only(use_fused_step: bool) -> None:
    opt = tritopt.create("lamb", use_fused_step=use_fused_step)
    weights = [torch.ones(3), torch.ones(3)]
    states = [opt.create_state(i, w) for i, w in enumerate(weights)]
    opt.update([0, 1], weights, [torch.tensor([1.0, float("nan"), 1.0]), torch.ones(3)], states)
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()


def test_norms_are_of_the_master() -> None:
    """Rounded to bf16 the weight's norm would be 0.2% larger, and so would the step."""
    weight = torch.full((100,), 1.0, dtype=torch.bfloat16)
    opt = tritopt.create("lamb", learning_rate=0.1, multi_precision=True)
    state = opt.create_state_multi_precision(0, weight)
    master, _ = state
    master.fill_(1 - 2**-9)
    opt.update_multi_precision([0], [weight], [torch.ones(100)], [state])
    torch.testing.assert_close(master, torch.full((100,), (1 - 2**-9) * 0.9))
