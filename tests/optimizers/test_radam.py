"""RAdam against the paper's derivation, against torch's, and where it begins to adapt."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, BETA1, BETA2, WD = 0.1, 0.7, 0.8, 0.05

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    ("radam.py", "s.beta1 * mean", {"beta2 for beta1": "s.beta2 * mean"}),
    ("radam.py", "s.beta2 * var", {"beta1 for beta2": "s.beta1 * var"}),
    ("radam.py", "s.one_minus_beta1 * g", {"gradient not averaged": "g"}),
    ("radam.py", "(g * g)", {"gradient not squared": "g"}),
    (
        "radam.py",
        "tl.where(s.adaptive != 0, div_by_root(mean, var, s.epsilon), mean)",
        {
            "always adaptive": "div_by_root(mean, var, s.epsilon)",
            "never adaptive": "mean",
            "the other way round": "tl.where(s.adaptive == 0, div_by_root(mean, var, s.epsilon), mean)",
            "gradient without momentum": "tl.where(s.adaptive != 0, div_by_root(mean, var, s.epsilon), g)",
        },
    ),
    (
        "radam.py",
        "var, s.epsilon)",
        {
            "epsilon inside the root": "var + s.epsilon, 0.0)",
            "no epsilon": "var, 0.0)",
            "no root": "var * var, s.epsilon)",
        },
    ),
    ("radam.py", "w - s.lr * direction", {"ascends": "w + s.lr * direction", "no learning rate": "w - direction"}),
    ("radam.py", "(mean, var)\n", {"moments are not kept": "state\n", "moments change places": "(var, mean)\n"}),
]


def sma_length(beta2: float, t: int) -> float:
    """The paper's section 4.1: length of the plain average with the same centre of mass as t decaying weights."""
    age = np.arange(1, t + 1)
    weight = beta2 ** (age - 1.0)
    return float(2 * (age * weight).sum() / weight.sum() - 1)


@pytest.mark.parametrize("epsilon", [0.0, 1e-2])
def test_formula(epsilon: float) -> None:
    """Plain momentum up to step 4, rectified from step 5; both are among the six."""
    forever = sma_length(BETA2, 1000)
    assert sma_length(BETA2, 4) < 4 < sma_length(BETA2, 5)

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        g = g + WD * w
        state["m"] = BETA1 * zeros_at_first(state, "m", w) + (1 - BETA1) * g
        state["v"] = BETA2 * zeros_at_first(state, "v", w) + (1 - BETA2) * g**2
        m_hat, rho = state["m"] / (1 - BETA1**t), sma_length(BETA2, t)
        if rho <= 4:
            return w - LR * m_hat
        r = math.sqrt((rho - 4) / (forever - 4) * (rho - 2) / (forever - 2) * forever / rho)
        return w - LR * r * m_hat * (math.sqrt(1 - BETA2**t) / (np.sqrt(state["v"]) + epsilon))

    assert_follows(formula, "radam", learning_rate=LR, beta1=BETA1, beta2=BETA2, epsilon=epsilon, wd=WD)


def distances_to_torch(n_steps: int, **arguments: Any) -> list[float]:
    """The largest difference between torch's step and ours, each step from torch's weights: one that differs is one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    parameter = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.RAdam([parameter], lr=LR, betas=(BETA1, 0.9), eps=1e-3, weight_decay=WD)
    ours = tritopt.create("radam", learning_rate=LR, beta1=BETA1, beta2=0.9, epsilon=1e-3, wd=WD, **arguments)
    state = ours.create_state(0, weight)
    distances = []
    for _ in range(n_steps):
        weight.copy_(parameter.detach())
        parameter.grad = torch.randn(4, 5, dtype=torch.float64, generator=generator)
        ours.update([0], [weight], [parameter.grad], [state])
        theirs.step()
        distances.append(float((weight - parameter.detach()).abs().max()))
    return distances


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_rectify_above_5_is_torch_s(use_fused_step: bool) -> None:
    """Same epsilon, same L2 decay: for any hyperparameters."""
    assert max(distances_to_torch(8, rectify_above=5.0, use_fused_step=use_fused_step)) <= 1e-14


def test_the_paper_s_threshold_differs_from_torch_s_in_one_step() -> None:
    assert [t for t, distance in enumerate(distances_to_torch(8), start=1) if distance > 1e-14] == [5]


@pytest.mark.parametrize(("rectify_above", "first"), [(4.0, 5), (5.0, 6)])
def test_first_adaptive_step_of_the_defaults(rectify_above: float, first: int) -> None:
    opt = tritopt.create("radam", rectify_above=rectify_above)
    assert [opt.scalars(1.0, 0.0, t)[-1] for t in (1, first - 1, first, first + 1, 10**6)] == [0, 0, 1, 1, 1]


def test_rectification_fades() -> None:
    opt = tritopt.create("radam", epsilon=0.0)
    rates = [opt.scalars(1.0, 0.0, t)[0] for t in (5, 10, 100, 1000, 10**5)]
    assert rates[0] < 0.03
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("beta2", [0.0, 0.3, 0.6])
def test_short_memory_never_adapts(beta2: float) -> None:
    opt = tritopt.create("radam", beta2=beta2)
    assert not any(opt.scalars(1.0, 0.0, t)[-1] for t in range(1, 200))


def test_by_hand() -> None:
    # the corrected mean of one gradient is that gradient, undivided
    assert one_step("radam", 1.0, 0.5, learning_rate=0.25) == 0.875
    # m = 0.25, 0.375 + 0.25; corrected by 0.5, 0.75: steps of 0.5 and 0.75 of the rate
    assert one_step("radam", 1.0, 0.5, 0.875, learning_rate=0.25, beta1=0.5) == 1 - 0.125 - 0.1875


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_a_parameter_seen_late_starts_from_its_own_first_step(use_fused_step: bool) -> None:
    opt = tritopt.create("radam", learning_rate=0.25, use_fused_step=use_fused_step)
    weights = [torch.ones(3), torch.ones(3)]
    states = [opt.create_state(i, w) for i, w in enumerate(weights)]
    for _ in range(9):
        opt.update([0], weights[:1], [torch.ones(3)], states[:1])
    opt.update([0, 1], weights, [torch.ones(3), torch.full((3,), 0.5)], states)
    assert weights[1].eq(0.875).all()


@pytest.mark.parametrize("begin_num_update", [0, 8])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_nan_spreads_to_its_element_only(use_fused_step: bool, begin_num_update: int) -> None:
    opt = tritopt.create("radam", use_fused_step=use_fused_step, begin_num_update=begin_num_update)
    weight = torch.ones(3)
    state = opt.create_state(0, weight)
    opt.update([0], [weight], [torch.tensor([1.0, float("nan"), 1.0])], [state])
    for tensor in (weight, *state):
        assert tensor.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("value", "error"), [(3.9, ValueError), (float("nan"), ValueError), ("5", TypeError)])
def test_refuses_rectify_above(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"rectify_above=.* must"):
        tritopt.create("radam", rectify_above=value)
