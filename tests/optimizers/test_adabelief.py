"""AdaBelief against the paper's algorithm, whose epsilon is translated, and by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, BETA1, BETA2, EPSILON, WD, RESCALE, CLIP = 0.1, 0.8, 0.95, 1e-2, 0.3, 0.7, 0.6

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    ("adabelief.py", "s.beta1 * mean", {"beta2 for beta1": "s.beta2 * mean"}),
    ("adabelief.py", "s.beta2 * var +", {"beta1 for beta2": "s.beta1 * var +", "variance never fades": "var +"}),
    ("adabelief.py", "surprise = g - mean", {"Adam": "surprise = g", "the old mean": "surprise = g - state[0]"}),
    ("adabelief.py", "(surprise * surprise) + s.epsilon", {"epsilon not accumulated": "(surprise * surprise)"}),
    (
        "adabelief.py",
        "var, s.epsilon)",
        {"no epsilon beside the root": "var, 0.0)", "no root": "var * var, s.epsilon)"},
    ),
    ("adabelief.py", "return w - s.lr", {"ascends": "return w + s.lr"}),
    (
        "adabelief.py",
        ", (mean, var)\n",
        {"epsilon not kept": ", (mean, var - s.epsilon)\n", "swapped": ", (var, mean)\n"},
    ),
]


@pytest.mark.parametrize("correct_bias", [True, False])
def test_formula(correct_bias: bool) -> None:
    """Corrected moments; MXNet's epsilon beside the uncorrected root is epsilon / sqrt(1 - beta2^t) beside this one."""

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        g = np.clip(RESCALE * g + WD * w, -CLIP, CLIP)
        mean = zeros_at_first(state, "m", w)
        state["m"] = mean + (1 - BETA1) * (g - mean)
        # g - m_t is beta1 (g - m_{t-1})
        state["v"] = BETA2 * zeros_at_first(state, "v", w) + (1 - BETA2) * (BETA1 * (g - mean)) ** 2 + EPSILON
        c1, c2 = (1 - BETA1**t, 1 - BETA2**t) if correct_bias else (1, 1)
        return w - LR * (state["m"] / c1) / (np.sqrt(state["v"] / c2) + EPSILON / math.sqrt(c2))

    moments = {"beta1": BETA1, "beta2": BETA2, "epsilon": EPSILON, "correct_bias": correct_bias}
    assert_follows(formula, "adabelief", learning_rate=LR, wd=WD, rescale_grad=RESCALE, clip_gradient=CLIP, **moments)


def test_by_hand() -> None:
    # m = g / 2, the surprise is g / 2, v = g^2 / 16, and the corrections 0.5 / 0.5: two learning rates
    for grad in (8.0, -0.125):
        stepped = one_step("adabelief", 1.0, grad, learning_rate=0.25, beta1=0.5, beta2=0.75, epsilon=0.0)
        assert stepped == 1 - math.copysign(0.5, grad)


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_states_by_hand(use_fused_step: bool) -> None:
    """The decay is clipped with the gradient, 1 + 0.5 * 10 to 2; epsilon is added to the state at every step."""
    w = torch.tensor([10.0])
    opt = tritopt.create(
        "adabelief",
        learning_rate=0.0,
        beta1=0.5,
        beta2=0.5,
        epsilon=1.0,
        wd=0.5,
        clip_gradient=2.0,
        use_fused_step=use_fused_step,
    )
    mean, var = opt.create_state(0, w)
    # surprises of 1, 0.5 and 0.25
    for expected in ((1.0, 1.5), (1.5, 1.875), (1.75, 1.96875)):
        opt.update([0], [w], [torch.ones(1)], [(mean, var)])
        assert (mean.item(), var.item()) == expected
    assert w.item() == 10


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_rescale_of_zero_skips(use_fused_step: bool) -> None:
    w = torch.ones(3)
    opt = tritopt.create("adabelief", wd=0.5, rescale_grad=0.0, use_fused_step=use_fused_step)
    mean, var = opt.create_state(0, w)
    opt.update([0], [w], [torch.ones(3)], [(mean, var)])
    assert w.eq(1).all()
    assert mean.eq(0).all()
    assert var.eq(0).all()
    assert opt.num_update == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_zero_gradient_in_half_precision_is_not_nan(dtype: torch.dtype, use_fused_step: bool) -> None:
    """A state in fp16 could not hold this epsilon."""
    w = torch.ones(3, dtype=dtype)
    opt = tritopt.create("adabelief", epsilon=1e-8, use_fused_step=use_fused_step)
    state = opt.create_state(0, w)
    opt.update([0], [w], [torch.zeros(3, dtype=dtype)], [state])
    assert w.eq(1).all()


def test_aggregate_num_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """MXNet accepts the argument and ignores it."""
    opt = tritopt.create("adabelief", aggregate_num=2)
    sizes: list[int] = []
    update = opt.update_multi_precision

    def recorded(indices: Any, *lists: Any) -> None:
        sizes.append(len(indices))
        update(indices, *lists)

    monkeypatch.setattr(opt, "update_multi_precision", recorded)
    tritopt.get_updater(opt)(list(range(5)), [torch.ones(2)] * 5, [torch.ones(2) for _ in range(5)])
    assert sizes == [2, 2, 1]


def test_correct_bias_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="correct_bias='False' must be True or False"):
        tritopt.create("adabelief", correct_bias="False")
