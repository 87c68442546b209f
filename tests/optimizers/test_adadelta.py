"""AdaDelta against the paper's averages written out as sums, by hand, and its states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, history, one_step

LR, RHO, EPSILON, WD = 0.7, 0.8, 1e-2, 0.05

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "adadelta.py",
        "s.rho * acc_g + s.one_minus_rho * (g * g)",
        {
            "a sum": "acc_g + g * g",
            "rho changes places": "s.one_minus_rho * acc_g + s.rho * (g * g)",
            "gradient not averaged": "s.rho * acc_g + g * g",
        },
    ),
    (
        "adadelta.py",
        "sqrt(acc_delta + s.epsilon)",
        {
            "epsilon outside the upper root": "(sqrt(acc_delta) + s.epsilon)",
            "no root above": "(acc_delta + s.epsilon)",
            "epsilon alone above": "sqrt(s.epsilon + 0.0 * g)",
        },
    ),
    (
        "adadelta.py",
        "sqrt(acc_g + s.epsilon)",
        {
            "epsilon outside the lower root": "(sqrt(acc_g) + s.epsilon)",
            "no epsilon below": "sqrt(acc_g)",
        },
    ),
    (
        "adadelta.py",
        "s.one_minus_rho * (delta * delta)",
        {
            "step averaged with lr": "s.one_minus_rho * (s.lr * delta * (s.lr * delta))",
            "gradients for steps": "s.one_minus_rho * (g * g)",
        },
    ),
    ("adadelta.py", "return w - s.lr * delta", {"ascends": "return w + s.lr * delta", "no lr": "return w - delta"}),
    ("adadelta.py", "(acc_g, acc_delta)\n", {"states change places": "(acc_delta, acc_g)\n"}),
]


def test_formula() -> None:
    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        def rms(values: Array) -> Array:
            shares = (1 - RHO) * RHO ** np.arange(len(values))[::-1]
            return np.asarray(np.sqrt(np.tensordot(shares, values**2, 1) + EPSILON))

        g = g + WD * w
        steps = state.get("steps", g[None][:0])
        step = -rms(steps) / rms(history(state, "g", g)) * g
        history(state, "steps", step)
        return w + LR * step

    assert_follows(formula, "adadelta", learning_rate=LR, rho=RHO, epsilon=EPSILON, wd=WD)


def test_by_hand() -> None:
    # 2 / sqrt(12 + 4) * 4 = 2
    assert one_step("adadelta", 1.0, 4.0, learning_rate=0.25, rho=0.25, epsilon=4.0) == 0.5


def test_learning_rate_is_one_and_outside_the_average() -> None:
    w, other = torch.ones(1), torch.ones(1)
    one, half = tritopt.create("adadelta"), tritopt.create("adadelta", learning_rate=0.5)
    assert one.learning_rate == 1
    states = [one.create_state(0, w), half.create_state(0, other)]
    one.update([0], [w], [torch.ones(1)], [states[0]])
    half.update([0], [other], [torch.ones(1)], [states[1]])
    assert torch.equal(states[0][1], states[1][1])
    torch.testing.assert_close(1 - other, (1 - w) / 2, rtol=0, atol=6e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_states_are_at_least_fp32(dtype: torch.dtype, use_fused_step: bool) -> None:
    """A step of 1e-3 squared, times 1 - rho, would be lost in fp16, and so would epsilon."""
    w = torch.zeros(3, dtype=dtype)
    opt = tritopt.create("adadelta", use_fused_step=use_fused_step)
    state = opt.create_state(0, w)
    opt.update([0], [w], [torch.ones(3, dtype=dtype)], [state])
    assert [s.dtype for s in state] == [torch.promote_types(dtype, torch.float32)] * 2
    assert all(torch.all(s > 0) for s in state)
    assert torch.all(w < 0)


@pytest.mark.parametrize("wrong", [{"rho": 1.0}, {"rho": -0.1}, {"epsilon": -1e-6}, {"rho": float("nan")}])
def test_arguments_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        tritopt.create("adadelta", **wrong)
