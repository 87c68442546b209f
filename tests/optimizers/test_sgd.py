"""SGD against its formula, by hand, and lazily on sparse gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, MOMENTUM, WD, CLIP, RESCALE = 0.1, 0.9, 0.05, 0.4, 0.7


# (kernel file, text that occurs once in it, {what is wrong: the text instead}), for tests/mutations.py
MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "sgd.py",
        "return w - s.lr * g, state",
        {
            "ascends": "return w + s.lr * g, state",
            "no learning rate": "return w - g, state",
            "learning rate twice": "return w - s.lr * (s.lr * g), state",
            "a decay nobody asked": "return w - s.lr * (g + 1e-4 * w), state",
        },
    ),
    (
        "sgd.py",
        "s.momentum * momentum - s.lr * g",
        {
            "momentum never fades": "momentum - s.lr * g",
            "sign of the gradient": "s.momentum * momentum + s.lr * g",
            "no learning rate": "s.momentum * momentum - g",
            "dampened": "s.momentum * momentum - (1 - s.momentum) * s.lr * g",
        },
    ),
    (
        "sgd.py",
        "return w + momentum, (momentum,)",
        {"sign of the step": "return w - momentum, (momentum,)", "momentum is not kept": "return w + momentum, state"},
    ),
]


def clipped(g: Array) -> Array:
    return np.clip(RESCALE * g, -CLIP, CLIP)


def test_formula() -> None:
    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        return w - LR * (clipped(g) + WD * w)

    assert_follows(formula, "sgd", learning_rate=LR, wd=WD, clip_gradient=CLIP, rescale_grad=RESCALE)


def test_formula_with_momentum() -> None:
    """Written as Polyak does: the velocity is the last displacement."""

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        displacement = MOMENTUM * zeros_at_first(state, "v", w) - LR * (clipped(g) + WD * w)
        state["v"] = displacement
        return w + displacement

    options = {"wd": WD, "clip_gradient": CLIP, "rescale_grad": RESCALE}
    assert_follows(formula, "sgd", learning_rate=LR, momentum=MOMENTUM, **options)


def test_by_hand() -> None:
    assert one_step("sgd", 1.0, 0.5, learning_rate=0.25) == 0.875
    # buffer -0.125, then -0.0625 - 0.125
    assert one_step("sgd", 1.0, 0.5, 0.5, learning_rate=0.25, momentum=0.5) == 0.6875


def test_learning_rate_is_inside_the_buffer() -> None:
    opt, w = tritopt.create("sgd", learning_rate=1.0, momentum=0.5), torch.zeros(1)
    state = opt.create_state(0, w)
    opt.update([0], [w], [torch.ones(1)], [state])
    opt.set_learning_rate(0.0)
    opt.update([0], [w], [torch.ones(1)], [state])
    assert w.item() == -1.5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lazy_update_touches_only_the_rows_present(momentum: float) -> None:
    w = torch.ones(5, 3)
    opt = tritopt.create("sgd", learning_rate=0.1, momentum=momentum, wd=0.5, lazy_update=True)
    state = opt.create_state(0, w)
    duplicated = torch.sparse_coo_tensor(torch.tensor([[3, 1, 3]]), torch.ones(3, 3), (5, 3))
    opt.update([0], [w], [duplicated], [state])
    assert w[[0, 2, 4]].eq(1).all()
    torch.testing.assert_close(w[1], torch.full((3,), 1 - 0.1 * 1.5))
    torch.testing.assert_close(w[3], torch.full((3,), 1 - 0.1 * 2.5))


def test_sparse_gradient_without_lazy_update_is_dense_with_zero_rows() -> None:
    rows = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (5, 3))
    sparse, dense = torch.ones(5, 3), torch.ones(5, 3)
    tritopt.create("sgd", wd=0.5).update([0], [sparse], [rows], [None])
    tritopt.create("sgd", wd=0.5).update([0], [dense], [rows.to_dense()], [None])
    assert torch.equal(sparse, dense)


@pytest.mark.parametrize("wrong", [{"use_fused_step": False}, {"multi_precision": True}])
def test_lazy_update_refuses(wrong: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"lazy_update=True .* drop"):
        tritopt.create("sgd", lazy_update=True, **wrong)


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_row_out_of_range_is_refused(use_fused_step: bool) -> None:
    opt, w = tritopt.create("sgd", lazy_update=True), torch.ones(5, 3)
    opt.use_fused_step = use_fused_step
    grad = torch.sparse_coo_tensor(torch.tensor([[1, 5]]), torch.ones(2, 3), (5, 3), check_invariants=False)
    with pytest.raises(ValueError, match=r"index 5 for a weight of shape \(5, 3\)"):
        opt.update([0], [w], [grad], [None])
    assert w.eq(1).all()
    assert opt.num_update == 0
