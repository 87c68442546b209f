"""DCASGD against its formula and by hand; its state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tests.support.trajectory import Array, assert_follows, one_step, zeros_at_first

LR, MOMENTUM, LAMDA, WD, CLIP, RESCALE = 0.1, 0.9, 0.7, 0.05, 0.9, 0.7


# (kernel file, text that occurs once in it, {what is wrong: the text instead}), for tests/mutations.py
MUTATIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "dcasgd.py",
        "g + s.lamda * (g * g) *",
        {
            "not compensated": "g + 0 *",
            "sign of the compensation": "g - s.lamda * (g * g) *",
            "gradient not squared": "g + s.lamda * g *",
            "no lamda": "g + (g * g) *",
        },
    ),
    ("dcasgd.py", "moved = w - previous", {"sign of the distance": "moved = w + previous"}),
    ("dcasgd.py", ", (w,)", {"previous weight is not kept": ", state", "the new weight is kept": ", (w - s.lr * g,)"}),
    (
        "dcasgd.py",
        "return w - s.lr * _comp",
        {"ascends": "return w + s.lr * _comp", "no learning rate": "return w - _comp"},
    ),
    (
        "dcasgd.py",
        "s.momentum * momentum - s.lr * _comp",
        {"momentum never fades": "momentum - s.lr * _comp", "sign": "s.momentum * momentum + s.lr * _comp"},
    ),
    (
        "dcasgd.py",
        "w + momentum, (momentum, w)",
        {
            "the new weight is kept": "w + momentum, (momentum, w + momentum)",
            "momentum is not kept": "w + momentum, (state[0], w)",
            "states change places": "w + momentum, (w, momentum)",
        },
    ),
]


@pytest.mark.parametrize("momentum", [0.0, MOMENTUM])
def test_formula(momentum: float) -> None:
    """The compensation written as the paper's approximate Hessian, diag(g g^T), times how far the weight has moved."""

    def formula(w: Array, g: Array, state: dict[str, Array], t: int) -> Array:
        g = np.clip(RESCALE * g, -CLIP, CLIP) + WD * w
        hessian = LAMDA * np.diag(np.outer(g, g)).reshape(g.shape)
        displacement = momentum * zeros_at_first(state, "v", w) - LR * (g + hessian * state.get("last", 0 * w))
        state["v"] = state["last"] = displacement
        return w + displacement

    options = {"wd": WD, "clip_gradient": CLIP, "rescale_grad": RESCALE}
    assert_follows(formula, "dcasgd", learning_rate=LR, momentum=momentum, lamda=LAMDA, **options)


def test_by_hand() -> None:
    # The first step is SGD's, to 0.875. The second one's gradient is 0.5 + 2 * 0.25 * -0.125 = 0.4375.
    options = {"learning_rate": 0.25, "lamda": 2.0}
    assert one_step("dcasgd", 1.0, 0.5, **options) == 0.875
    assert one_step("dcasgd", 1.0, 0.5, 0.5, **options) == 0.875 - 0.25 * 0.4375
    assert one_step("dcasgd", 1.0, 0.5, 0.5, momentum=0.5, **options) == 0.875 - 0.0625 - 0.25 * 0.4375


@pytest.mark.parametrize("use_fused_step", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"multi_precision": True}], ids=repr)
def test_state_is_a_pair_that_ends_in_the_weight_before_the_step(options: dict[str, Any], use_fused_step: bool) -> None:
    opt = tritopt.create("dcasgd", use_fused_step=use_fused_step, **options)
    weight = torch.linspace(-1, 1, 7, dtype=torch.bfloat16 if opt.multi_precision else torch.float32)
    state = opt.create_state_multi_precision(0, weight)
    held, (momentum, previous) = state if opt.multi_precision else (weight, state)
    assert (momentum is None) == ("momentum" not in options)
    assert previous.dtype == torch.float32
    assert torch.equal(previous, held)
    for _ in range(2):
        before = held.clone()
        opt.update_multi_precision([0], [weight], [torch.ones(7)], [state])
        assert torch.equal(previous, before)
        assert (held < before).all()


def test_previous_weight_belongs_to_no_graph() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    momentum, previous = tritopt.create("dcasgd", momentum=0.9).create_state(0, weight)
    assert [momentum.requires_grad, previous.requires_grad] == [False, False]
    assert previous.data_ptr() != weight.data_ptr()


def test_momentum_needs_its_buffer() -> None:
    weight = torch.ones(3)
    state = tritopt.create("dcasgd").create_state(0, weight)
    with pytest.raises(ValueError, match=r"DCASGD keeps states \(momentum, previous_weight\)"):
        tritopt.create("dcasgd", momentum=0.9).update([0], [weight], [torch.ones(3)], [state])


@pytest.mark.parametrize("wrong", [{"momentum": -0.1}, {"lamda": float("nan")}], ids=repr)
def test_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tritopt.create("dcasgd", **wrong)
