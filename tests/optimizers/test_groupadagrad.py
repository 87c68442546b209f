"""GroupAdaGrad against its formula, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows

MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    ("groupadagrad.py", "return g * g", {"gradient not squared": "return g", "absolute values": "return tl.abs(g)"}),
    (
        "groupadagrad.py",
        "return (history + mean,)",
        {
            "forgets the past": "return (mean,)",
            "history is not kept": "return (history,)",
            "sign": "return (history - mean,)",
        },
    ),
    (
        "groupadagrad.py",
        "sqrt(history) + s.epsilon",
        {"epsilon inside the root": "sqrt(history + s.epsilon)", "no root": "history + s.epsilon"},
    ),
    (
        "groupadagrad.py",
        "return w - s.lr * div",
        {"ascends": "return w + s.lr * div", "no learning rate": "return w - div"},
    ),
    ("drivers/row_apply.py", "div(tl.sum(total), n_columns.to(COMPUTE_DTYPE))", {"sum for mean": "tl.sum(total)"}),
]


def test_formula() -> None:
    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        past = state.setdefault("norms", np.zeros(len(w)))
        past += np.linalg.norm(g, axis=1) ** 2
        rate: Array = 0.3 / (np.sqrt(past / w.shape[1]) + 0.05)
        return w - np.diag(rate) @ g

    assert_follows(formula, "groupadagrad", learning_rate=0.3, epsilon=0.05)


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_by_hand(use_fused_step: bool) -> None:
    weight = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    opt = tritopt.create("groupadagrad", learning_rate=0.5, epsilon=0.0, use_fused_step=use_fused_step)
    history = opt.create_state(0, weight)
    # means of the squares: (1 + 49) / 2 = 25 and (4 + 4) / 2 = 4
    opt.update(0, weight, torch.tensor([[1.0, 7.0], [2.0, -2.0]]), history)
    assert history.tolist() == [[25.0], [4.0]]
    torch.testing.assert_close(weight, torch.tensor([[0.9, 0.3], [0.5, 1.5]]))


def test_a_row_of_zeros_stays() -> None:
    weight = torch.ones(3, 4)
    opt = tritopt.create("groupadagrad")
    history = opt.create_state(0, weight)
    rows = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 4), (3, 4))
    opt.update(0, weight, rows, history)
    assert weight[[0, 2]].eq(1).all()
    assert weight[1].lt(1).all()
    assert history.tolist() == [[0.0], [1.0], [0.0]]


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_nan_spreads_to_its_row_only(use_fused_step: bool) -> None:
    weight, grad = torch.ones(2, 3), torch.ones(2, 3)
    grad[0, 1] = torch.nan
    opt = tritopt.create("groupadagrad", use_fused_step=use_fused_step)
    opt.update(0, weight, grad, opt.create_state(0, weight))
    assert weight[0].isnan().all()
    assert weight[1].isfinite().all()


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_a_weight_without_rows_is_refused(shape: tuple[int, ...]) -> None:
    opt, weight = tritopt.create("groupadagrad"), torch.ones(shape)
    message = r"2-D weight, got one of shape \(.*\): pass weight.view\(rows, -1\)"
    with pytest.raises(ValueError, match=message):
        opt.create_state(0, weight)
    with pytest.raises(ValueError, match=message):
        opt.update(0, weight, torch.ones(shape), torch.zeros(1, 1))
    assert weight.eq(1).all()
    assert opt.num_update == 0


def test_decay_is_refused_by_the_constructor() -> None:
    with pytest.raises(ValueError, match=r"no weight decay, got wd=0\.1: set wd"):
        tritopt.create("groupadagrad", wd=0.1)
    tritopt.create("groupadagrad", wd=0.0)


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_decay_is_refused_later_too(use_fused_step: bool) -> None:
    opt = tritopt.create("groupadagrad", use_fused_step=use_fused_step)
    weights = [torch.ones(2, 2), torch.ones(2, 2)]
    states = [opt.create_state(i, w) for i, w in enumerate(weights)]
    opt.wd = 0.1
    opt.set_wd_mult({0: 0.0})  # the second parameter is the one that decays
    with pytest.raises(ValueError, match=r"got wd=0\.1"):
        opt.update([0, 1], weights, [torch.ones(2, 2)] * 2, states)
    assert all(w.eq(1).all() for w in weights)
    assert not any(s.any() for s in states)
    assert opt.num_update == 0
    opt.set_wd_mult({0: 0.0, 1: 0.0})
    opt.update([0, 1], weights, [torch.ones(2, 2)] * 2, states)
    assert all(w.lt(1).all() for w in weights)
