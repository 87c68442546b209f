"""Ftrl against the paper's sums over all rounds and its argmin, by hand, and its corners: ties, lr = 0, no gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, history, one_step

LR, LAMDA1, BETA, WD = 0.3, 0.4, 0.7, 0.2

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    ("ftrl.py", "new_n = n + g * g", {"gradient not squared": "new_n = n + tl.abs(g)", "forgets": "new_n = g * g"}),
    (
        "ftrl.py",
        "(root - sqrt(n)) * s.inverse_lr * w",
        {
            "root of the difference": "sqrt(new_n - n) * s.inverse_lr * w",
            "no learning rate in z": "(root - sqrt(n)) * w",
            "weight forgotten": "(root - sqrt(n)) * s.inverse_lr",
            "sigma of all rounds": "root * s.inverse_lr * w",
        },
    ),
    ("ftrl.py", "z = z + (g -", {"sign of the proximal term": "z = z + (g +", "sign of the gradient": "z = z + (-g -"}),
    (
        "ftrl.py",
        "clip(z, s.lamda1) - z",
        {
            "sign of the weight": "z - clip(z, s.lamda1)",
            "no L1": "-z",
            "thresholds without shrinking": "tl.where(tl.abs(z) <= s.lamda1, 0.0, -z)",
            "L1 of one side": "tl.where(z > s.lamda1, s.lamda1, z) - z",
        },
    ),
    (
        "ftrl.py",
        "root * s.inverse_lr + s.offset",
        {
            "no beta, no decay": "root * s.inverse_lr",
            "no root": "s.offset",
            "offset divided by lr": "(root + s.offset) * s.inverse_lr",
            "no learning rate": "root + s.offset",
            "root before this gradient": "sqrt(n) * s.inverse_lr + s.offset",
        },
    ),
    ("ftrl.py", "(z, new_n)", {"n is not kept": "(z, n)", "states change places": "(new_n, z)"}),
]


def test_formula() -> None:
    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        root = np.sqrt(np.cumsum(history(state, "g", g) ** 2, axis=0))  # of each round
        sigma = np.diff(root, axis=0, prepend=0) / LR
        z = state["g"].sum(0) - (sigma * history(state, "w", w)).sum(0)
        return np.where(np.abs(z) <= LAMDA1, 0, -(z - np.sign(z) * LAMDA1) / ((BETA + root[-1]) / LR + WD))

    assert_follows(formula, "ftrl", learning_rate=LR, lamda1=LAMDA1, beta=BETA, wd=WD)


def test_minimises_what_the_paper_says() -> None:
    """g_{1:t} w + sum sigma_s (w - w_s)^2 / 2 + lamda1 |w| + (wd + beta / lr) w^2 / 2, found on a grid."""
    w, grads, seen = torch.tensor([0.8]), [0.9, -0.3, 0.4], []
    opt = tritopt.create("ftrl", learning_rate=LR, lamda1=LAMDA1, beta=BETA, wd=WD)
    state = opt.create_state(0, w)
    grid = np.linspace(-1, 1, 200001)
    for t, grad in enumerate(grads, 1):
        seen.append(w.item())
        opt.update([0], [w], [torch.tensor([grad])], [state])
        sigma = np.diff(np.sqrt(np.cumsum(np.square(grads[:t]))), prepend=0) / LR
        objective = sum(grads[:t]) * grid + LAMDA1 * np.abs(grid) + (WD + BETA / LR) * grid**2 / 2
        objective += sum(s * (grid - old) ** 2 / 2 for s, old in zip(sigma, seen, strict=True))
        assert abs(grid[objective.argmin()] - w.item()) < 1.1e-5  # the grid's spacing


def test_by_hand() -> None:
    # n = 9, z = 3 - 3 / 0.5 = -3, shrunk to -2, over (1 + 3) / 0.5 + wd
    options = {"learning_rate": 0.5, "beta": 1.0, "lamda1": 1.0}
    assert one_step("ftrl", 1.0, 3.0, **options) == 0.25
    assert one_step("ftrl", 1.0, 3.0, wd=8.0, **options) == 0.125
    # z = -3 + 4 - (5 - 3) / 0.5 * 0.25 = 0
    assert one_step("ftrl", 1.0, 3.0, 4.0, **options) == 0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_tie_is_zero(sign: int, use_fused_step: bool) -> None:
    options = {"learning_rate": 0.5, "use_fused_step": use_fused_step}
    assert one_step("ftrl", 1.0 * sign, 3.0 * sign, lamda1=3.0, **options) == 0
    assert one_step("ftrl", 1.0 * sign, 3.0 * sign, lamda1=1e39, **options) == 0
    assert one_step("ftrl", 1.0 * sign, 3.0 * sign, lamda1=2.999, **options) * sign > 0


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_learning_rate_of_zero_leaves_weight_and_states(use_fused_step: bool) -> None:
    """A parameter's own rate, by its multiplier, and the schedule's; the counts advance."""
    weights = [torch.ones(3), torch.ones(3)]
    opt = tritopt.create("ftrl", learning_rate=0.5, wd=0.1, use_fused_step=use_fused_step)
    opt.set_lr_mult({1: 0.0})
    states = [opt.create_state(i, w) for i, w in enumerate(weights)]
    grads = [torch.full((3,), 2.0)] * 2
    opt.update([0, 1], weights, grads, states)
    moved, (z, n) = weights[0].clone(), (s.clone() for s in states[0])
    assert torch.all(moved != 1)
    assert torch.all(n == 4)
    opt.set_learning_rate(0.0)
    opt.update([0, 1], weights, grads, states)
    assert torch.equal(weights[0], moved)
    assert torch.equal(states[0][0], z)
    assert torch.equal(states[0][1], n)
    assert weights[1].eq(1).all()
    assert all(s.eq(0).all() for s in states[1])
    assert opt._index_update_count == {0: 2, 1: 2}


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_weight_without_gradient_is_zeroed(use_fused_step: bool) -> None:
    """The weight is a function of z, which is 0 at first: so also in rows that a sparse gradient has not."""
    w = torch.ones(4, 3)
    opt = tritopt.create("ftrl", use_fused_step=use_fused_step)
    state = opt.create_state(0, w)
    opt.update([0], [w], [torch.sparse_coo_tensor(torch.tensor([[2]]), torch.ones(1, 3), (4, 3))], [state])
    assert torch.equal((w != 0).all(1), torch.tensor([False, False, True, False]))
    assert torch.equal((w == 0).all(1), torch.tensor([True, True, False, True]))


def test_lazy_update_keeps_absent_rows() -> None:
    rows = torch.sparse_coo_tensor(torch.tensor([[2, 0, 2]]), torch.ones(3, 3), (4, 3))
    lazy, dense = torch.ones(4, 3), torch.ones(4, 3)
    for w, grad, is_lazy in ((lazy, rows, True), (dense, rows.to_dense(), False)):
        opt = tritopt.create("ftrl", wd=0.1, lazy_update=is_lazy)
        z, n = opt.create_state(0, w)
        for _ in range(2):
            opt.update([0], [w], [grad], [(z, n)])
        assert torch.equal((n != 0).all(1), torch.tensor([True, False, True, False]))
    assert lazy[[1, 3]].eq(1).all()
    assert dense[[1, 3]].eq(0).all()
    assert torch.equal(lazy[[0, 2]], dense[[0, 2]])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_nothing_to_divide_by(use_fused_step: bool) -> None:
    """beta = 0 and no gradient yet: the paper asks for |z| <= lamda1 first, so the weight is 0 and not 0 / 0."""
    assert one_step("ftrl", 1.0, 0.0, beta=0.0, lamda1=0.0, use_fused_step=use_fused_step) == 0


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_nan_gradient_is_not_shrunk_away(use_fused_step: bool) -> None:
    w = torch.ones(2)
    opt = tritopt.create("ftrl", lamda1=0.5, clip_gradient=1.0, use_fused_step=use_fused_step)
    opt.update([0], [w], [torch.tensor([math.nan, 1.0])], [opt.create_state(0, w)])
    assert w.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("use_fused_step", [True, False])
def test_states_are_at_least_fp32(dtype: torch.dtype, use_fused_step: bool) -> None:
    w = torch.ones(3, dtype=dtype)
    opt = tritopt.create("ftrl", use_fused_step=use_fused_step)
    state = opt.create_state(0, w)
    opt.update([0], [w], [torch.full((3,), 1e-4, dtype=dtype)], [state])
    assert [s.dtype for s in state] == [torch.promote_types(dtype, torch.float32)] * 2
    assert torch.all(state[1] > 0)  # in fp16 the square is 0
    assert w.isfinite().all()


@pytest.mark.parametrize("wrong", [{"lamda1": -0.1}, {"beta": -1.0}, {"lamda1": math.inf}, {"beta": math.nan}])
def test_arguments_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        tritopt.create("ftrl", **wrong)


def test_lamda1_by_its_right_name_is_refused() -> None:
    with pytest.raises(TypeError, match="did you mean 'lamda1'"):
        tritopt.create("ftrl", lambda1=0.1)
