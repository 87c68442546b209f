"""Adam against the paper's first form, whose epsilon is translated, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, BETA1, BETA2, EPSILON, WD = 0.1, 0.8, 0.95, 1e-2, 0.05


# (kernel file, text that occurs once in it, {what is wrong: the text instead}), for tests/mutations.py
MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    ("adam.py", "return w - s.lr", {"ascends": "return w + s.lr"}),
    ("adam.py", "return w - s.lr * div", {"no learning rate": "return w - div"}),
    ("adam.py", "s.beta1 * mean", {"beta2 for beta1": "s.beta2 * mean"}),
    ("adam.py", "s.beta2 * var", {"beta1 for beta2": "s.beta1 * var"}),
    ("adam.py", "s.one_minus_beta1 * g", {"gradient not averaged": "g"}),
    ("adam.py", "s.one_minus_beta2 * (g * g)", {"1 - beta2 formed in fp32": "(1 - s.beta2) * (g * g)"}),
    ("adam.py", "(g * g)", {"gradient not squared": "g"}),
    (
        "adam.py",
        "var, s.epsilon)",
        {
            "epsilon inside the root": "var + s.epsilon, 0.0)",
            "no epsilon": "var, 0.0)",
            "no root": "var * var, s.epsilon)",
        },
    ),
    (
        "adam.py",
        "epsilon), (mean, var)",
        {"moments are not kept": "epsilon), state", "moments change places": "epsilon), (var, mean)"},
    ),
]


def test_formula() -> None:
    """Corrected moments; MXNet's epsilon beside the uncorrected root is epsilon / sqrt(1 - beta2^t) beside this one."""

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        g = g + WD * w
        state["m"] = BETA1 * zeros_at_first(state, "m", w) + (1 - BETA1) * g
        state["v"] = BETA2 * zeros_at_first(state, "v", w) + (1 - BETA2) * g**2
        m_hat, v_hat = state["m"] / (1 - BETA1**t), state["v"] / (1 - BETA2**t)
        return w - LR * m_hat / (np.sqrt(v_hat) + EPSILON / math.sqrt(1 - BETA2**t))

    assert_follows(formula, "adam", learning_rate=LR, beta1=BETA1, beta2=BETA2, epsilon=EPSILON, wd=WD)


def test_by_hand() -> None:
    # m = 0.5 g, v = 0.25 g^2, and the corrections 0.5 / 0.5: a step of lr, whatever the gradient
    for grad in (8.0, -0.125):
        stepped = one_step("adam", 1.0, grad, learning_rate=0.25, beta1=0.5, beta2=0.75, epsilon=0.0)
        assert stepped == 1 - math.copysign(0.25, grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_gradient_in_half_precision_is_not_nan(dtype: torch.dtype) -> None:
    """epsilon = 1e-8 is 0 in fp16; the arithmetic is fp32, so it is not lost."""
    w = torch.ones(3, dtype=dtype)
    opt = tritopt.create("adam")
    state = opt.create_state(0, w)
    opt.update([0], [w], [torch.zeros(3, dtype=dtype)], [state])
    assert w.eq(1).all()


def test_lazy_update_touches_only_the_rows_present() -> None:
    w = torch.ones(5, 3)
    opt = tritopt.create("adam", lazy_update=True, wd=0.1)
    mean, var = opt.create_state(0, w)
    opt.update([0], [w], [torch.sparse_coo_tensor(torch.tensor([[2]]), torch.zeros(1, 3), (5, 3))], [(mean, var)])
    touched = torch.tensor([False, False, True, False, False])
    assert torch.equal((w != 1).all(1), touched)
    assert torch.equal((mean != 0).all(1), touched)
    assert torch.equal((var != 0).all(1), touched)
