"""LANS against the paper's algorithm, by hand, and the corners of its norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, BETA1, BETA2, EPSILON, WD = 0.1, 0.8, 0.95, 1e-2, 0.3

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    ("lans.py", "return w, state, (g * g,)", {"absolute values summed": "return w, state, (tl.abs(g),)"}),
    ("lans.py", "div(g, tl.where(norm == 0, 1.0, norm).to(g.dtype))", {"not normalised": "g"}),
    (
        "lans.py",
        "clip(div(g, tl.where(norm == 0, 1.0, norm).to(g.dtype)), s.bound)",
        {
            "never clips": "div(g, tl.where(norm == 0, 1.0, norm).to(g.dtype))",
            "clips before it normalises": "div(clip(g, s.bound), tl.where(norm == 0, 1.0, norm).to(g.dtype))",
            "a zero norm divides": "clip(div(g, norm.to(g.dtype)), s.bound)",
        },
    ),
    (
        "lans.py",
        "sqrt(var * s.var_correction) + s.epsilon",
        {
            "epsilon inside the root": "sqrt(var * s.var_correction + s.epsilon)",
            "variance not corrected": "sqrt(var) + s.epsilon",
            "no epsilon": "sqrt(var * s.var_correction)",
        },
    ),
    ("lans.py", "mean * s.mean_correction", {"mean not corrected": "mean"}),
    (
        "lans.py",
        "add_decay(div(mean * s.mean_correction, root), w, wd), add_decay(div(g, root), w, wd)",
        {
            "the mean's part not decayed": "div(mean * s.mean_correction, root), add_decay(div(g, root), w, wd)",
            "the gradient's not": "add_decay(div(mean * s.mean_correction, root), w, wd), div(g, root)",
        },
    ),
    ("lans.py", "s.beta1 * mean +", {"beta2 for beta1": "s.beta2 * mean +"}),
    ("lans.py", "s.beta2 * var +", {"beta1 for beta2": "s.beta1 * var +"}),
    ("lans.py", "_directions(w, unit,", {"norm of another direction": "_directions(w, g,"}),
    ("lans.py", "sums[1], sums[3], s)", {"one ratio for both": "sums[1], sums[2], s)"}),
    (
        "lans.py",
        "s.one_minus_beta1 * trust_ratio(sums[1]",
        {"the gradient's": "s.one_minus_beta1 * trust_ratio(sums[0]"},
    ),
    ("lans.py", "s.lr * s.beta1 * trust", {"shares swapped": "s.lr * s.one_minus_beta1 * trust"}),
    ("lans.py", " + grad_step * by_grad", {"no gradient in the step": ""}),
    ("lans.py", "return w - (", {"ascends": "return w + ("}),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rescale_grad": -3.0, "clip_gradient": 0.1},
        {"clip_gradient": 1e39},
        {"lower_bound": 8.0},
        {"upper_bound": 2.0},
        {"lower_bound": 3.0, "upper_bound": 2.0},
        {"lower_bound": 0.0, "upper_bound": 0.0},
    ],
)
def test_algorithm_2_of_the_paper(options: dict[str, Any]) -> None:
    """Names are the paper's: r and c are the two directions, phi bounds the weight's norm; the clip is MXNet's own."""

    def formula(x: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        g = np.sign(options.get("rescale_grad", 1)) * g / np.sqrt(np.sum(g**2))
        g = np.clip(g, -options.get("clip_gradient", 1), options.get("clip_gradient", 1))
        state["m"] = BETA1 * zeros_at_first(state, "m", x) + (1 - BETA1) * g
        state["v"] = BETA2 * zeros_at_first(state, "v", x) + (1 - BETA2) * g**2
        m_hat, v_hat = state["m"] / (1 - BETA1**t), state["v"] / (1 - BETA2**t)
        r, c = m_hat / (np.sqrt(v_hat) + EPSILON), g / (np.sqrt(v_hat) + EPSILON)
        phi = max(np.sqrt(np.sum(x**2)), options.get("lower_bound", 0))
        phi = min(phi, options.get("upper_bound") or np.inf)
        d: Array = BETA1 * phi * (r + WD * x) / np.sqrt(np.sum((r + WD * x) ** 2))
        d += (1 - BETA1) * phi * (c + WD * x) / np.sqrt(np.sum((c + WD * x) ** 2))
        return x - LR * d

    moments = {"beta1": BETA1, "beta2": BETA2, "epsilon": EPSILON}
    assert_follows(formula, "lans", learning_rate=LR, wd=WD, **moments, **options)


def test_by_hand() -> None:
    # both directions are the gradient's sign, of norm 1; the trust ratios are |w| = 2
    arguments = {"learning_rate": 0.25, "beta1": 0.5, "beta2": 0.75, "epsilon": 0.0}
    assert one_step("lans", 2.0, 5.0, **arguments) == 1.5
    # then m = -1/4 and the gradient is -1: the directions point one way again; |w| = 1.5
    assert one_step("lans", 2.0, 5.0, -3.0, **arguments) == 1.875


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_only_decay_acts_on_a_zero_gradient(use_fused_step: bool) -> None:
    """MXNet divides 0 by 0. Both directions are wd w, and the trust ratio takes wd out again."""
    opt = tritopt.create("lans", learning_rate=0.25, wd=0.5, use_fused_step=use_fused_step)
    w = torch.tensor([3.0, -4.0])
    state = opt.create_state(0, w)
    opt.update([0], [w], [torch.zeros(2)], [state])
    torch.testing.assert_close(w, torch.tensor([2.25, -3.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_zero_gradient_without_decay_changes_nothing(dtype: torch.dtype, use_fused_step: bool) -> None:
    opt = tritopt.create("lans", use_fused_step=use_fused_step)
    w = torch.ones(3, dtype=dtype)
    mean, var = opt.create_state(0, w)
    opt.update([0], [w], [torch.zeros(3, dtype=dtype)], [(mean, var)])
    assert w.eq(1).all()
    assert mean.eq(0).all()
    assert var.eq(0).all()


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_trust_ratio_is_one_for_a_zero_weight(use_fused_step: bool) -> None:
    opt = tritopt.create("lans", learning_rate=0.25, beta1=0.5, beta2=0.75, use_fused_step=use_fused_step)
    w = torch.zeros(4)
    state = opt.create_state(0, w)
    opt.update([0], [w], [torch.ones(4)], [state])
    torch.testing.assert_close(w, torch.full((4,), -0.25))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_nan_spreads_to_its_tensor_only(bad: float, use_fused_step: bool) -> None:
    opt = tritopt.create("lans", clip_gradient=0.5, use_fused_step=use_fused_step)
    weights = [torch.ones(3), torch.ones(3)]
    states = [opt.create_state(i, w) for i, w in enumerate(weights)]
    opt.update([0, 1], weights, [torch.tensor([1.0, bad, 1.0]), torch.ones(3)], states)
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_norms_are_of_the_master(use_fused_step: bool) -> None:
    """Rounded to bf16 the weight's norm would be 0.2% larger, and so would the step."""
    weight = torch.full((100,), 1.0, dtype=torch.bfloat16)
    opt = tritopt.create("lans", learning_rate=0.1, multi_precision=True, use_fused_step=use_fused_step)
    state = opt.create_state_multi_precision(0, weight)
    master, _ = state
    master.fill_(1 - 2**-9)
    opt.update_multi_precision([0], [weight], [torch.ones(100)], [state])
    torch.testing.assert_close(master, torch.full((100,), (1 - 2**-9) * 0.9))


def test_aggregate_num_has_no_upper_limit() -> None:
    """MXNet asserts that it is at most 45."""
    assert tritopt.create("lans", aggregate_num=1000).aggregate_num == 1000
