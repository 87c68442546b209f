"""FTML against the paper's weighted sums, by hand, and its corners: lr = 0, no gradient, half precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, history, one_step

LR, BETA1, BETA2, EPSILON, WD = 0.1, 0.7, 0.9, 1e-2, 0.05

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "ftml.py",
        "s.beta2 * v + s.one_minus_beta2 * (g * g)",
        {
            "beta1 for beta2": "s.beta1 * v + s.one_minus_beta1 * (g * g)",
            "a sum": "v + g * g",
            "gradient not averaged": "s.beta2 * v + g * g",
        },
    ),
    (
        "ftml.py",
        "sqrt(v * s.var_correction) + s.epsilon",
        {
            "epsilon inside the root": "sqrt(v * s.var_correction + s.epsilon)",
            "no correction": "sqrt(v) + s.epsilon",
            "correction outside the root": "sqrt(v) * s.var_correction + s.epsilon",
            "no epsilon": "sqrt(v * s.var_correction)",
        },
    ),
    ("ftml.py", "new_d = s.inverse_lr * (", {"no learning rate": "new_d = ("}),
    (
        "ftml.py",
        "s.beta1 * z + s.one_minus_beta1 * g",
        {
            "beta2 for beta1": "s.beta2 * z + s.one_minus_beta2 * g",
            "sign of the gradient": "s.beta1 * z - s.one_minus_beta1 * g",
            "gradient not averaged": "s.beta1 * z + g",
        },
    ),
    (
        "ftml.py",
        "(new_d - s.beta1 * d) * w",
        {
            "sigma of this step alone": "new_d * w",
            "d never fades": "(new_d - d) * w",
            "sign of sigma": "(s.beta1 * d - new_d) * w",
        },
    ),
    ("ftml.py", "div(-z, new_d)", {"sign of the weight": "div(z, new_d)", "divided by the old d": "div(-z, d)"}),
    ("ftml.py", "(new_d, v, z)", {"d is not kept": "(d, v, z)"}),
]


def test_formula() -> None:
    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        g = g + WD * w
        fading = np.arange(t)[::-1]
        v = np.tensordot((1 - BETA2) * BETA2**fading, history(state, "g", g) ** 2, 1) / (1 - BETA2**t)
        d = history(state, "d", (1 - BETA1**t) / LR * (np.sqrt(v) + EPSILON))
        sigma = history(state, "sigma", d[-1] - (BETA1 * d[-2] if t > 1 else 0))
        terms = (1 - BETA1) * state["g"] - sigma * history(state, "w", w)
        z = np.asarray(np.tensordot(BETA1**fading, terms, 1))
        return np.asarray(-z / d[-1])

    assert_follows(formula, "ftml", learning_rate=LR, beta1=BETA1, beta2=BETA2, epsilon=EPSILON, wd=WD)


def test_minimises_what_the_paper_says() -> None:
    """Sum of beta1^(t-i) ((1 - beta1) g_i w + sigma_i (w - w_{i-1})^2 / 2), found on a grid."""
    w, grads, seen, sigmas, old_d = torch.tensor([0.8]), [0.9, -0.3, 0.4], list[float](), list[float](), 0.0
    opt = tritopt.create("ftml", learning_rate=LR, beta1=BETA1, beta2=BETA2, epsilon=EPSILON)
    state = opt.create_state(0, w)
    grid = np.linspace(0, 1, 100001)
    for t, grad in enumerate(grads, 1):
        seen.append(w.item())
        opt.update([0], [w], [torch.tensor([grad])], [state])
        d = state[0].item()
        sigmas.append(d - BETA1 * old_d)
        old_d = d
        terms = zip(grads, sigmas, seen, strict=False)
        losses = [(1 - BETA1) * g * grid + sigma * (grid - old) ** 2 / 2 for g, sigma, old in terms]
        objective = np.tensordot(BETA1 ** np.arange(t)[::-1], np.stack(losses), 1)
        assert abs(grid[objective.argmin()] - w.item()) < 1.1e-5  # the grid's spacing


def test_by_hand() -> None:
    # v = 4, corrected 16; d = 0.5 / 0.25 * (4 + 4) = 16; z = 0.5 * 4 - 16 = -14
    assert one_step("ftml", 1.0, 4.0, learning_rate=0.25, beta1=0.5, beta2=0.75, epsilon=4.0) == 0.875


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_weight_without_gradient_stays(dtype: torch.dtype, use_fused_step: bool) -> None:
    """The weight is -z / d: states in half precision would let it drift, and d = 4e-8 would be 0 in fp16."""
    start = torch.linspace(0.5, 1.5, 50).to(dtype)
    w = start.clone()
    opt = tritopt.create("ftml", use_fused_step=use_fused_step)
    state = opt.create_state(0, w)
    for _ in range(5):
        opt.update([0], [w], [torch.zeros_like(w)], [state])
    assert {s.dtype for s in state} == {torch.float32}
    if dtype == torch.float32:
        torch.testing.assert_close(w, start, rtol=1e-6, atol=0)
    else:
        assert torch.equal(w, start)


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_learning_rate_of_zero_leaves_weight_and_states(use_fused_step: bool) -> None:
    """A parameter's own rate, by its multiplier, and the schedule's; the counts advance."""
    weights = [torch.ones(3), torch.ones(3)]
    opt = tritopt.create("ftml", learning_rate=0.5, wd=0.1, use_fused_step=use_fused_step)
    opt.set_lr_mult({1: 0.0})
    states = [opt.create_state(i, w) for i, w in enumerate(weights)]
    grads = [torch.full((3,), 2.0)] * 2
    opt.update([0, 1], weights, grads, states)
    moved, kept = weights[0].clone(), [s.clone() for s in states[0]]
    assert torch.all(moved != 1)
    opt.set_learning_rate(0.0)
    opt.update([0, 1], weights, grads, states)
    assert torch.equal(weights[0], moved)
    assert all(map(torch.equal, states[0], kept))
    assert weights[1].eq(1).all()
    assert all(s.eq(0).all() for s in states[1])
    assert opt._index_update_count == {0: 2, 1: 2}


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_nan_gradient_spreads(use_fused_step: bool) -> None:
    w = torch.ones(2)
    opt = tritopt.create("ftml", clip_gradient=1.0, use_fused_step=use_fused_step)
    opt.update([0], [w], [torch.tensor([math.nan, 1.0])], [opt.create_state(0, w)])
    assert w.isnan().tolist() == [True, False]


@pytest.mark.parametrize("wrong", [{"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": -1e-8}, {"beta1": math.nan}])
def test_arguments_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        tritopt.create("ftml", **wrong)
