"""Adan against the authors' algorithm, against torch's Adam where the two are the same, and its first difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, BETA1, BETA2, BETA3, EPSILON, WD = 0.1, 0.9, 0.7, 0.8, 1e-2, 0.3
MOMENTS = {"beta1": BETA1, "beta2": BETA2, "beta3": BETA3, "epsilon": EPSILON}

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "adan.py",
        "g - tl.where(s.first != 0, g, previous)",
        {
            "first difference from zero": "g - previous",
            "never a difference": "g - g",
            "sign of the difference": "tl.where(s.first != 0, g, previous) - g",
            "a sum": "g + tl.where(s.first != 0, -g, previous)",
        },
    ),
    (
        "adan.py",
        "g + s.beta2 * change",
        {"no look-ahead": "g", "undamped": "g + change", "beta1": "g + s.beta1 * change"},
    ),
    ("adan.py", "s.beta1 * mean + s", {"beta2 for beta1": "s.beta2 * mean + s"}),
    ("adan.py", "s.one_minus_beta2 * change", {"gradient for its change": "s.one_minus_beta2 * g"}),
    ("adan.py", "s.beta3 * var", {"beta2 for beta3": "s.beta2 * var"}),
    ("adan.py", "(ahead * ahead)", {"square of the gradient": "(g * g)", "not squared": "ahead"}),
    (
        "adan.py",
        "s.mean_lr * mean + s.diff_lr * diff",
        {
            "no difference": "s.mean_lr * mean",
            "sign of the difference": "s.mean_lr * mean - s.diff_lr * diff",
            "one correction for both": "s.mean_lr * (mean + s.beta2 * diff)",
        },
    ),
    (
        "adan.py",
        "var, s.epsilon)",
        {
            "epsilon inside the root": "var + s.epsilon, 0.0)",
            "no epsilon": "var, 0.0)",
            "no root": "var * var, s.epsilon)",
        },
    ),
    (
        "adan.py",
        "(w - step) * s.keep",
        {"no decay": "w - step", "decays the old weight": "w * s.keep - step", "ascends": "(w + step) * s.keep"},
    ),
    ("adan.py", "(mean, diff, var, g)", {"gradient is not kept": "(mean, diff, var, previous)"}),
]


def test_formula() -> None:
    """The formula is in the paper's convention: its betas weigh the new term."""
    a1, a2, a3 = 1 - BETA1, 1 - BETA2, 1 - BETA3

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        d = g - state.get("g", g)
        state["g"] = g
        m, v, n = (zeros_at_first(state, name, w) for name in "mvn")
        m, v, n = (1 - a1) * m + a1 * g, (1 - a2) * v + a2 * d, (1 - a3) * n + a3 * (g + (1 - a2) * d) ** 2
        state.update(m=m, v=v, n=n)
        rate = LR / (np.sqrt(n) / math.sqrt(1 - BETA3**t) + EPSILON)
        return (w - rate * m / (1 - BETA1**t) - (1 - a2) * rate * v / (1 - BETA2**t)) / (1 + LR * WD)

    assert_follows(formula, "adan", learning_rate=LR, wd=WD, **MOMENTS)


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_with_beta2_0_it_is_torch_s_adam(use_fused_step: bool) -> None:
    """beta2 also weighs the difference: at 0, and without decay, none of it is left."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    weight, parameter = start.clone(), torch.nn.Parameter(start.clone())
    theirs = torch.optim.Adam([parameter], lr=LR, betas=(BETA1, BETA3), eps=EPSILON)
    ours = tritopt.create("adan", learning_rate=LR, use_fused_step=use_fused_step, **{**MOMENTS, "beta2": 0.0})
    state = ours.create_state(0, weight)
    for _ in range(6):
        parameter.grad = torch.randn(4, 5, dtype=torch.float64, generator=generator)
        theirs.step()
        ours.update([0], [weight], [parameter.grad], [state])
        torch.testing.assert_close(weight, parameter.detach(), rtol=0, atol=1e-14)


def test_by_hand() -> None:
    # the first step is lr, whatever the gradient; then the moved weight is divided by 1 + 0.25 * 4
    for grad in (8.0, -0.125):
        moved = 1 - math.copysign(0.25, grad)
        assert one_step("adan", 1.0, grad, learning_rate=0.25, beta3=0.75, epsilon=0.0) == pytest.approx(
            moved, abs=1e-7
        )
    stepped = one_step("adan", 1.0, 8.0, learning_rate=0.25, beta3=0.75, epsilon=0.0, wd=4.0)
    assert stepped == pytest.approx(0.375, abs=1e-7)


def test_equal_gradients_have_no_difference() -> None:
    weight = torch.zeros(3)
    opt = tritopt.create("adan", learning_rate=0.25, epsilon=0.0)
    state = opt.create_state(0, weight)
    for _ in range(4):
        opt.update([0], [weight], [torch.tensor([3.0, -1e-3, 1e3])], [state])
    assert state[1].eq(0).all()
    torch.testing.assert_close(weight, torch.tensor([-1.0, 1.0, -1.0]))


@pytest.mark.parametrize("begin_num_update", [0, 7])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_first_difference_of_a_parameter_is_zero(use_fused_step: bool, begin_num_update: int) -> None:
    """A parameter that is seen late has none either; from then on differences are the gradients' own."""
    opt = tritopt.create("adan", beta2=0.5, use_fused_step=use_fused_step, begin_num_update=begin_num_update)
    weights = [torch.ones(3), torch.ones(3)]
    states = [opt.create_state(i, w) for i, w in enumerate(weights)]
    opt.update([0], weights[:1], [torch.full((3,), 2.0)], states[:1])
    opt.update([0, 1], weights, [torch.full((3,), 5.0), torch.full((3,), 9.0)], states)
    (_, diff, _, previous), (_, late_diff, _, late_previous) = states
    assert (diff[0], previous[0], late_diff[0], late_previous[0]) == (1.5, 5.0, 0.0, 9.0)


def test_differences_do_not_see_the_loss_scale() -> None:
    """The gradient is kept after rescaling: the scale may change between two steps."""
    steady, scaled = torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 9)
    opts = [tritopt.create("adan") for _ in range(2)]
    states = [opt.create_state(0, steady) for opt in opts]
    for scale in (1024.0, 512.0, 2048.0):
        grad = torch.linspace(-scale, 2, 9)
        opts[0].update([0], [steady], [grad], [states[0]])
        opts[1].rescale_grad = 1 / scale
        opts[1].update([0], [scaled], [grad * scale], [states[1]])
    assert torch.equal(steady, scaled)


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_nan_spreads_to_its_element_only(use_fused_step: bool) -> None:
    opt = tritopt.create("adan", use_fused_step=use_fused_step)
    weight = torch.ones(3)
    state = opt.create_state(0, weight)
    opt.update([0], [weight], [torch.tensor([1.0, float("nan"), 1.0])], [state])
    for tensor in (weight, *state):
        assert tensor.isnan().tolist() == [False, True, False]


def test_refuses_a_decay_that_divides_by_zero() -> None:
    opt, weight = tritopt.create("adan", learning_rate=0.5, wd=-2.0), torch.ones(3)
    state = opt.create_state(0, weight)
    with pytest.raises(ValueError, match=r"wd=-2\.0 .* raise wd"):
        opt.update([0], [weight], [torch.ones(3)], [state])
    assert weight.eq(1).all()
    assert opt.num_update == 0


@pytest.mark.parametrize("name", ["beta1", "beta2", "beta3"])
def test_refuses_a_beta_of_1(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=1\.0 must be in \[0, 1\)"):
        tritopt.create("adan", **{name: 1.0})
