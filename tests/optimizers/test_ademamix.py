"""AdEMAMix against the paper's algorithm, by hand, and against torch's AdamW where the two are the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first
from tritopt import optim
from tritopt.optimizers.ademamix import AdEMAMixRule

LR, BETA1, BETA2, BETA3, ALPHA, EPSILON, WD = 0.1, 0.7, 0.8, 0.95, 3.0, 1e-2, 0.3
T_ALPHA, T_BETA3 = 5, 4
HYPERPARAMETERS = {"beta1": BETA1, "beta2": BETA2, "beta3": BETA3, "alpha": ALPHA, "epsilon": EPSILON}

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    ("ademamix.py", "s.beta1 * mean", {"beta3 for beta1": "s.beta3 * mean"}),
    (
        "ademamix.py",
        "s.beta3 * slow + s.one_minus_beta3 * g",
        {
            "beta1 for beta3": "s.beta1 * slow + s.one_minus_beta1 * g",
            "mean of the fast mean": "s.beta3 * slow + s.one_minus_beta3 * mean",
            "gradient not averaged": "s.beta3 * slow + g",
        },
    ),
    ("ademamix.py", "(g * g)", {"not squared": "g", "square of the mean": "(mean * mean)"}),
    (
        "ademamix.py",
        "s.mean_lr * mean + s.slow_lr * slow",
        {
            "no slow mean": "s.mean_lr * mean",
            "sign of the slow mean": "s.mean_lr * mean - s.slow_lr * slow",
            "one rate for both": "s.mean_lr * (mean + slow)",
        },
    ),
    (
        "ademamix.py",
        "var, s.epsilon)",
        {
            "epsilon inside the root": "var + s.epsilon, 0.0)",
            "no epsilon": "var, 0.0)",
            "no root": "var * var, s.epsilon)",
        },
    ),
    (
        "ademamix.py",
        "s.keep * w - step",
        {"no decay": "w - step", "decays the moved weight": "s.keep * (w - step)", "ascends": "s.keep * w + step"},
    ),
    ("ademamix.py", "(mean, slow, var)\n", {"slow mean is not kept": "(mean, state[1], var)\n"}),
]


@pytest.mark.parametrize("warm_up", [{}, {"t_alpha": T_ALPHA, "t_beta3": T_BETA3}], ids=["no warm-up", "warm-up"])
def test_formula(warm_up: dict[str, int]) -> None:
    """The formula is in the paper's words, whose schedule of beta3 is an exponential of logarithms."""

    def slow_decay(t: int) -> float:
        if not warm_up:
            return BETA3
        share = t / T_BETA3
        first, last = math.log(BETA1), math.log(BETA3)
        return min(math.exp(first * last / ((1 - share) * last + share * first)), BETA3) if share < 1 else BETA3

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        m, s, v = (zeros_at_first(state, name, w) for name in "msv")
        b3 = slow_decay(t)
        m, s, v = BETA1 * m + (1 - BETA1) * g, b3 * s + (1 - b3) * g, BETA2 * v + (1 - BETA2) * g**2
        state.update(m=m, s=s, v=v)
        alpha = min(t * ALPHA / T_ALPHA, ALPHA) if warm_up else ALPHA
        moved = (m / (1 - BETA1**t) + alpha * s) / (np.sqrt(v / (1 - BETA2**t)) + EPSILON)
        return w - LR * (moved + WD * w)

    assert_follows(formula, "ademamix", learning_rate=LR, wd=WD, **HYPERPARAMETERS, **warm_up)


def test_half_life_of_the_slow_mean_grows_evenly() -> None:
    """Updates until a gradient's share has halved: from beta1's to beta3's, by the same number at each update."""
    rule = AdEMAMixRule(beta1=0.9, beta3=0.9999, t_beta3=100)
    half_lives = [math.log(0.5) / math.log(rule.scalars(0.1, 0.0, t).beta3) for t in range(1, 103)]
    first, last = math.log(0.5) / math.log(0.9), math.log(0.5) / math.log(0.9999)
    np.testing.assert_allclose(half_lives[:100], first + (last - first) * np.arange(1, 101) / 100, rtol=1e-9)
    assert [rule.scalars(0.1, 0.0, t).beta3 for t in (100, 101, 10**9)] == [0.9999] * 3


@pytest.mark.parametrize(
    ("betas", "at_first"),
    [((0.0, 0.81), 0.81**2), ((0.5, 0.5), 0.5), ((0.9, 0.25), 0.25), ((0.9, 0.0), 0.0), ((0.0, 0.0), 0.0)],
)
def test_warm_up_between_betas_at_their_bounds(betas: tuple[float, float], at_first: float) -> None:
    """The half-life grows from 0 for a beta1 of 0; down to a smaller beta3 there is no way to go."""
    rule = AdEMAMixRule(beta1=betas[0], beta3=betas[1], t_beta3=2)
    assert rule.scalars(0.1, 0.0, 1).beta3 == pytest.approx(at_first, abs=1e-15)
    assert rule.scalars(0.1, 0.0, 2).beta3 == betas[1]


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_without_its_slow_mean_it_is_torch_s_adamw(use_fused_step: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    weight, parameter = start.clone(), torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([parameter], lr=LR, betas=(BETA1, BETA2), eps=EPSILON, weight_decay=WD)
    without = {**HYPERPARAMETERS, "alpha": 0.0}
    ours = tritopt.create("ademamix", learning_rate=LR, wd=WD, use_fused_step=use_fused_step, **without)
    state = ours.create_state(0, weight)
    for _ in range(6):
        parameter.grad = torch.randn(4, 5, dtype=torch.float64, generator=generator)
        theirs.step()
        ours.update([0], [weight], [parameter.grad], [state])
        torch.testing.assert_close(weight, parameter.detach(), rtol=0, atol=1e-14)


def test_by_hand() -> None:
    # The corrected mean and root are the gradient and its size; the slow mean has a quarter of it, twice.
    options = {"learning_rate": 0.25, "beta3": 0.75, "alpha": 2.0, "epsilon": 0.0}
    assert one_step("ademamix", 1.0, 8.0, **options) == pytest.approx(1 - 0.25 * 1.5, abs=1e-7)
    # Half way to t_alpha the slow mean weighs half; the old weight decays by a quarter of a half.
    assert one_step("ademamix", 1.0, 8.0, wd=0.5, t_alpha=2, **options) == pytest.approx(0.875 - 0.3125, abs=1e-7)


def test_capturable_warm_ups_are_the_host_s() -> None:
    """The count is a tensor on the device: so is all that the schedules make of it, before and after they end."""
    rule = AdEMAMixRule(alpha=8.0, t_alpha=7, t_beta3=5)
    for count in range(1, 10):
        on_host = rule.scalars(0.1, 0.3, count)
        on_device = rule.scalars(0.1, 0.3, torch.tensor(float(count), dtype=torch.float64))
        np.testing.assert_allclose([float(x) for x in on_device], on_host, rtol=1e-12)


def test_slow_mean_of_a_bf16_weight_remembers_a_long_time() -> None:
    """Rounded to nearest in bf16, it would stop short once a step moves it by less than half a bit."""
    weight, grad = torch.zeros(16, dtype=torch.bfloat16), torch.ones(16, dtype=torch.bfloat16)
    opt = tritopt.create("ademamix", learning_rate=0.0, beta3=0.999)
    state = opt.create_state(0, weight)
    for _ in range(700):
        opt.update([0], [weight], [grad], [state])
    torch.testing.assert_close(state[1], torch.full((16,), 1 - 0.999**700), rtol=1e-4, atol=0)


def test_torch_face_hands_the_schedule_down_by_group() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": params[:1], "t_alpha": 10, "t_beta3": 10}, {"params": params[1:]}]
    opt = optim.AdEMAMix(groups, lr=0.1, betas=(0.9, 0.99, 0.999), alpha=4.0)
    for p in params:
        p.grad = torch.ones(3)
    opt.step()
    warming, warm = (opt.state[p]["exp_avg_slow"] for p in params)
    assert warming[0] > 5 * warm[0]
    torch.testing.assert_close(warm, torch.full((3,), 0.001))


@pytest.mark.parametrize("name", ["beta1", "beta2", "beta3"])
def test_refuses_a_beta_of_1(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=1\.0 must be in \[0, 1\)"):
        tritopt.create("ademamix", **{name: 1.0})


@pytest.mark.parametrize("name", ["alpha", "t_alpha", "t_beta3"])
def test_refuses_what_is_below_0(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=-1 must be >= 0"):
        tritopt.create("ademamix", **{name: -1})
