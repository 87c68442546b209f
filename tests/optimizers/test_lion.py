"""Lion against the paper's algorithm, by hand, and against torch's AdamW where the two are the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, BETA1, BETA2, WD, CLIP, RESCALE = 0.1, 0.7, 0.95, 0.3, 0.8, 0.7

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "lion.py",
        "sign(s.beta1 * momentum + s.one_minus_beta1 * g)",
        {
            "no sign": "s.beta1 * momentum + s.one_minus_beta1 * g",
            "sign of the gradient": "sign(g)",
            "sign of the momentum": "sign(momentum)",
            "beta2 in the direction": "sign(s.beta2 * momentum + s.one_minus_beta2 * g)",
        },
    ),
    (
        "lion.py",
        "momentum = s.beta2 * momentum + s.one_minus_beta2 * g",
        {
            "beta1 in the momentum": "momentum = s.beta1 * momentum + s.one_minus_beta1 * g",
            "momentum of signs": "momentum = s.beta2 * momentum + s.one_minus_beta2 * direction",
            "gradient not averaged": "momentum = s.beta2 * momentum + g",
        },
    ),
    (
        "lion.py",
        "s.keep * w - s.lr * direction",
        {
            "ascends": "s.keep * w + s.lr * direction",
            "no decay": "w - s.lr * direction",
            "decays the moved weight": "s.keep * (w - s.lr * direction)",
            "weights grow": "(2 - s.keep) * w - s.lr * direction",
        },
    ),
    ("lion.py", ", (momentum,)\n", {"momentum is not kept": ", state\n"}),
    ("ops.py", "tl.where(x < 0, -1.0, x)", {"no negative sign": "x"}),
]


def test_formula() -> None:
    """Averages as steps towards the gradient; decay as a shrinking of the weight."""

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        g = np.clip(RESCALE * g, -CLIP, CLIP)
        m = zeros_at_first(state, "m", w)
        state["m"] = m + (1 - BETA2) * (g - m)
        return (1 - LR * WD) * w - LR * np.sign(m + (1 - BETA1) * (g - m))

    options = {"wd": WD, "clip_gradient": CLIP, "rescale_grad": RESCALE}
    assert_follows(formula, "lion", learning_rate=LR, beta1=BETA1, beta2=BETA2, **options)


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_with_beta1_0_it_is_torch_s_adamw_without_memory(use_fused_step: bool) -> None:
    """Adam with both betas and epsilon 0 divides a gradient by its size; both decay by lr wd."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    weight, parameter = start.clone(), torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([parameter], lr=LR, betas=(0.0, 0.0), eps=0.0, weight_decay=WD)
    ours = tritopt.create("lion", learning_rate=LR, beta1=0.0, wd=WD, use_fused_step=use_fused_step)
    state = ours.create_state(0, weight)
    for _ in range(6):
        parameter.grad = torch.randn(4, 5, dtype=torch.float64, generator=generator)
        theirs.step()
        ours.update([0], [weight], [parameter.grad], [state])
        torch.testing.assert_close(weight, parameter.detach(), rtol=0, atol=1e-14)


def test_by_hand() -> None:
    # the sign and half of the weight, times lr
    assert one_step("lion", 1.0, 4.0, learning_rate=0.25, wd=0.5) == 0.625
    # m = 1; then c = 0.5 - 1 goes back, though m stays positive: 0.75 - 0.5
    assert one_step("lion", 1.0, 4.0, -2.0, learning_rate=0.25, beta1=0.5, beta2=0.75) == 1.0


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_sign_of_zero_and_of_nan(use_fused_step: bool) -> None:
    """A direction of 0 leaves the weight alone; NaN shows, and stays where it is. An infinite one is a direction."""
    grad = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45])
    weight = torch.ones(5)
    opt = tritopt.create("lion", learning_rate=0.25, use_fused_step=use_fused_step)
    momentum = opt.create_state(0, weight)
    opt.update([0], [weight], [grad], [momentum])
    expected = torch.tensor([1.0, 1.0, float("nan"), 0.75, 1.0])  # 1e-45 is lost when multiplied by 0.1
    torch.testing.assert_close(weight, expected, rtol=0, atol=0, equal_nan=True)
    assert momentum.isnan().tolist() == [False, False, True, False, False]


def test_scale_of_the_gradients_does_not_matter() -> None:
    for scale in (2.0**-20, 2.0**20):
        weights = [torch.linspace(-1, 1, 9) for _ in range(2)]
        for weight, rescale in zip(weights, (1.0, scale), strict=True):
            opt = tritopt.create("lion", rescale_grad=rescale)
            state = opt.create_state(0, weight)
            for step in range(3):
                opt.update([0], [weight], [torch.linspace(1 - step, 1, 9)], [state])
        assert torch.equal(*weights)


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_refuses_a_beta_of_1(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=1\.0 must be in \[0, 1\)"):
        tritopt.create("lion", **{name: 1.0})
