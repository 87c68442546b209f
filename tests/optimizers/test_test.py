"""Test against its formula: no clipping, an untouched state."""

from __future__ import annotations

import torch

import tritopt
from tests.support.trajectory import Array, assert_follows

LR, WD, RESCALE = 0.1, 0.05, 0.7


# (kernel file, text that occurs once in it, {what is wrong: the text instead}), for tests/mutations.py
MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "test.py",
        "w - s.lr * g",
        {
            "ascends": "w + s.lr * g",
            "no learning rate": "w - g",
            "learning rate twice": "w - s.lr * (s.lr * g)",
            "weight forgotten": "-s.lr * g",
            "gradient ignored": "w - s.lr * w",
        },
    )
]


def test_formula() -> None:
    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        return w - LR * (RESCALE * g + WD * w)

    assert_follows(formula, "test", learning_rate=LR, wd=WD, rescale_grad=RESCALE, clip_gradient=1e-3)


def test_state_is_never_read_nor_written() -> None:
    opt, w = tritopt.create("test"), torch.ones(3)
    state = opt.create_state(0, w)
    assert isinstance(state, torch.Tensor)
    state.fill_(float("nan"))
    opt.update([0], [w], [torch.ones(3)], [state])
    assert w.isfinite().all()
    assert state.isnan().all()
