"""AdaGrad against the paper's sum over all gradients, by hand, and on sparse gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, history, one_step

LR, EPSILON, WD = 0.1, 1e-2, 0.05

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "adagrad.py",
        "history = history + g * g",
        {
            "gradient not squared": "history = history + g",
            "forgets": "history = g * g",
            "an average": "history = 0.9 * history + g * g",
        },
    ),
    (
        "adagrad.py",
        "history, s.epsilon)",
        {
            "epsilon inside the root": "history + s.epsilon, 0.0)",
            "no root": "history * history, s.epsilon)",
            "no epsilon": "history, 0.0)",
            "history before this gradient": "history - g * g, s.epsilon)",
        },
    ),
    ("adagrad.py", "return w - s.lr", {"ascends": "return w + s.lr", "no learning rate": "return w - 1.0"}),
    ("adagrad.py", "(history,)\n", {"history is not kept": "state\n"}),
]


def test_formula() -> None:
    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        g = g + WD * w
        root = np.sqrt((history(state, "g", g) ** 2).sum(0))
        return np.asarray(w - LR * g / (root + EPSILON))

    assert_follows(formula, "adagrad", learning_rate=LR, epsilon=EPSILON, wd=WD)


def test_by_hand() -> None:
    # 3 / (3 + 3), then 4 / (5 + 3)
    assert one_step("adagrad", 1.0, 3.0, 4.0, learning_rate=0.5, epsilon=3.0) == 0.5


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_first_step_is_of_the_learning_rate(use_fused_step: bool) -> None:
    for grad in (1e-3, -50.0):
        stepped = one_step("adagrad", 1.0, grad, learning_rate=0.25, epsilon=0.0, use_fused_step=use_fused_step)
        assert stepped == 1 - 0.25 * np.sign(grad)


@pytest.mark.parametrize("wd", [0.0, 0.5])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_sparse_gradient_is_dense_with_zero_rows(wd: float, use_fused_step: bool) -> None:
    """A decay, for which MXNet has no operator, is no exception."""
    rows = torch.sparse_coo_tensor(torch.tensor([[3, 1, 3]]), torch.ones(3, 3), (5, 3))
    weights = [torch.ones(5, 3), torch.ones(5, 3)]
    for w, grad in zip(weights, (rows, rows.to_dense()), strict=True):
        opt = tritopt.create("adagrad", wd=wd, use_fused_step=use_fused_step)
        state = opt.create_state(0, w)
        for _ in range(2):
            opt.update([0], [w], [grad], [state])
    assert torch.equal(*weights)
    assert torch.equal((weights[0] != 1).all(1), torch.tensor([wd > 0, True, wd > 0, True, wd > 0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_history_is_at_least_fp32(dtype: torch.dtype) -> None:
    """A sum of squares would overflow fp16 at 65504, and stand still long before."""
    w = torch.ones(3, dtype=dtype)
    opt = tritopt.create("adagrad")
    if dtype in (torch.float16, torch.bfloat16):
        with pytest.warns(UserWarning, match="multi_precision"):
            state = opt.create_state_multi_precision(0, w)
    else:
        state = opt.create_state_multi_precision(0, w)
    opt.update([0], [w], [torch.full((3,), 300.0, dtype=dtype)], [state])
    assert state.dtype == torch.promote_types(dtype, torch.float32)
    assert state.isfinite().all()
    assert torch.all(w < 1)


def test_epsilon_by_its_old_name_is_refused() -> None:
    with pytest.raises(TypeError, match="'eps'; did you mean 'epsilon'"):
        tritopt.create("adagrad", eps=1e-7)


def test_negative_epsilon_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon=-1"):
        tritopt.create("adagrad", epsilon=-1)
